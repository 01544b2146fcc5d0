//! The last scan of a folder compared with it while the caller does other things.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use super::kept::{self, Kept};

/// A scan smaller than this, in bytes, is compared sooner than a thread is started.
const WORTH: u64 = 64 << 10;

/// A comparison on its way. Who scans the folder in the same way as the last time gets its outcome; for others it was in
/// vain.
#[derive(Debug)]
pub struct Ahead {
    place: PathBuf,
    root: PathBuf,
    thread: Mutex<Option<JoinHandle<Option<Verified>>>>,
}

/// A scan from before, and which of its directories are as they were.
pub(super) type Verified = (Kept, Vec<bool>);

impl Ahead {
    /// Begins to compare; `None` when no scan is kept in the folder `memory`, or so little that there is nothing to gain.
    pub fn start(memory: &Path, root: &Path) -> Option<Self> {
        let kept = kept::of_folder(memory, kept::folder(root).as_bytes());
        let (_, place, size) = kept.into_iter().max()?;
        if size < WORTH {
            return None;
        }
        let (from, of) = (place.clone(), root.to_path_buf());
        let compare = move || verified(&from, &of);
        let thread = std::thread::Builder::new().name("scan".to_owned()).spawn(compare).ok()?;
        Some(Self { place, root: root.to_path_buf(), thread: Mutex::new(Some(thread)) })
    }

    /// Waits for the outcome, once, if it is about what is kept at this place for this folder.
    pub(super) fn take(&self, place: &Path, root: &Path) -> Option<Option<Verified>> {
        if self.place != place || self.root != root {
            return None;
        }
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }
}

/// Returns the scan kept at a place, compared with its folder.
pub(super) fn verified(place: &Path, root: &Path) -> Option<Verified> {
    let kept = Kept::load(place, root)?;
    let same = kept.verify()?;
    Some((kept, same))
}
