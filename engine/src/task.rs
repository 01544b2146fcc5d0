//! Work beside the graph, such as making an output.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use slipway_spec::Digest;
use slipway_spec::progress::{ProgressEvent, ProgressSink};

use crate::error::BuildError;

/// Work that is not part of the graph, shown like a step. One that is dropped before its end was given up.
pub struct Task {
    progress: Arc<dyn ProgressSink>,
    digest: Digest,
    ended: AtomicBool,
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task").field("digest", &self.digest).finish_non_exhaustive()
    }
}

impl Task {
    /// Says that the work begins.
    pub fn start(progress: &Arc<dyn ProgressSink>, name: &str) -> Self {
        // Two outputs may have the same name; they are different work.
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let digest = Digest::of(format!("{name} {number}").as_bytes());
        progress.send(ProgressEvent::Started { vertex: digest.clone(), name: name.into() });
        Self { progress: progress.clone(), digest, ended: false.into() }
    }

    /// Returns what identifies the work in progress.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Names a part of the work that is done.
    pub fn status(&self, id: &str) {
        self.moved(id, 0, 0, true);
    }

    /// Says how far a part of the work is, in bytes; a `total` of 0 is not known.
    pub fn moved(&self, id: &str, current: u64, total: u64, done: bool) {
        self.progress.send(ProgressEvent::Status {
            vertex: self.digest.clone(),
            id: id.into(),
            current,
            total,
            done,
        });
    }

    /// Says how the work ended.
    ///
    /// # Errors
    /// Those of `result`.
    pub fn end<T>(&self, result: Result<T, BuildError>) -> Result<T, BuildError> {
        self.ended.store(true, Ordering::Relaxed);
        self.progress.send(match &result {
            Ok(_) => ProgressEvent::Done { vertex: self.digest.clone() },
            Err(error) => ProgressEvent::Failed {
                vertex: self.digest.clone(),
                error: error.to_string().into(),
            },
        });
        result
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if !self.ended.load(Ordering::Relaxed) {
            self.progress.send(ProgressEvent::Canceled { vertex: self.digest.clone() });
        }
    }
}
