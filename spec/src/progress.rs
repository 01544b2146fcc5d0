//! What a build tells its caller while it runs.
//!
//! A vertex is announced by [`ProgressEvent::Started`] and ended by exactly one of `Cached`, `Done`, `Failed` or
//! `Canceled`. A vertex that is cached may be announced and ended by `Cached` alone.

use std::sync::Arc;

use crate::Digest;
use crate::llb::pb;

/// One event; events of one vertex come in order.
#[derive(Clone, Debug)]
pub enum ProgressEvent {
    /// Work on a vertex begins.
    Started {
        /// Which vertex.
        vertex: Digest,
        /// Its name for people.
        name: Arc<str>,
    },
    /// The result was there already.
    Cached {
        /// Which vertex.
        vertex: Digest,
        /// Its name for people.
        name: Arc<str>,
    },
    /// Work on part of a vertex, such as a blob on its way: `current` of `total` bytes where both are known.
    Status {
        /// Which vertex.
        vertex: Digest,
        /// What the part is called; the same id updates the same line.
        id: Arc<str>,
        /// How far it is, in bytes; 0 when the part has no size.
        current: u64,
        /// How far it goes, in bytes; 0 when not known.
        total: u64,
        /// Whether the part has ended.
        done: bool,
    },
    /// Output of a process.
    Log {
        /// Which vertex.
        vertex: Digest,
        /// Which output.
        stream: Stream,
        /// The bytes as they came; lines may be cut anywhere.
        data: Arc<[u8]>,
    },
    /// Something worth mending that does not stop the build.
    Warning {
        /// What is said, and where.
        warning: Arc<Warning>,
    },
    /// The vertex has its result.
    Done {
        /// Which vertex.
        vertex: Digest,
    },
    /// The vertex failed.
    Failed {
        /// Which vertex.
        vertex: Digest,
        /// Why.
        error: Arc<str>,
    },
    /// The vertex was given up because another one failed or the caller left.
    Canceled {
        /// Which vertex.
        vertex: Digest,
    },
}

/// Something worth mending, with what clients show of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Warning {
    /// The vertex that it belongs to, such as the one that loads the Dockerfile.
    pub vertex: Option<Digest>,
    /// How urgent it is; what is found in a Dockerfile has level 1.
    pub level: u32,
    /// One line.
    pub short: String,
    /// More lines, shown to who asks for them.
    pub detail: Vec<String>,
    /// Where to read more; may be empty.
    pub url: String,
    /// The file that it is about.
    pub source: Option<pb::SourceInfo>,
    /// The lines of that file.
    pub ranges: Vec<pb::Range>,
}

/// Which output of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// File descriptor 1.
    Stdout,
    /// File descriptor 2.
    Stderr,
}

/// Where events go. Implementations must not block.
pub trait ProgressSink: Send + Sync {
    /// Takes one event.
    fn send(&self, event: ProgressEvent);
}

/// A sink that forgets everything.
#[derive(Clone, Copy, Debug)]
pub struct NoProgress;

impl ProgressSink for NoProgress {
    fn send(&self, _event: ProgressEvent) {}
}
