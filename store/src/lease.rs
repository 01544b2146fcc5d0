//! A process's hold on the store: what it uses is not collected, what it leaves half written is.
//!
//! Every process that writes owns a folder `tmp/<id>` with a locked file in it. All unfinished work lives in that folder,
//! so when the kernel has released the lock of a dead process, removing one folder removes everything it left behind.
//! The collector never touches what was used after the oldest living lease began.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use rustix::fs::FlockOperation;

use crate::error::{IoContext as _, Result};
use crate::folder::remove_tree;

/// A living process's hold. Dropping it removes what is unfinished.
#[derive(Debug)]
pub(crate) struct ProcessLease {
    folder: PathBuf,
    // Held for its lock.
    _lock: File,
    next: AtomicU64,
}

const LOCK: &str = "lock";

impl ProcessLease {
    /// Takes a lease under `tmp`, and clears what dead processes left there.
    pub(crate) fn acquire(tmp: &Path) -> Result<Self> {
        clear_dead(tmp)?;
        let pid = std::process::id();
        for attempt in 0u32.. {
            let folder = tmp.join(format!("{pid}-{attempt}-{:x}", now_nanos()));
            match fs::create_dir(&folder) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(error).at("create", &folder),
            }
            let path = folder.join(LOCK);
            let lock = match File::create_new(&path) {
                Ok(lock) => lock,
                // Another process took the folder, still without a lock, for a dead one's.
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::NotFound | std::io::ErrorKind::AlreadyExists
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(error).at("create", &path),
            };
            // Another process that looks for dead ones may hold the lock for a moment, and then leaves the folder alone
            // or removes it.
            rustix::io::retry_on_intr(|| rustix::fs::flock(&lock, FlockOperation::LockExclusive))
                .at("lock", &path)?;
            if path.exists() {
                return Ok(Self { folder, _lock: lock, next: AtomicU64::new(0) });
            }
        }
        unreachable!("the loop ends only by returning")
    }

    /// Returns a fresh path for unfinished work; nothing is created.
    pub(crate) fn temporary(&self, what: &str) -> PathBuf {
        self.folder.join(format!("{what}-{}", self.next.fetch_add(1, Ordering::Relaxed)))
    }
}

impl Drop for ProcessLease {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.folder) {
            // The next process that opens the store tries again.
            tracing::debug!(folder = %self.folder.display(), %error, "unfinished work stays behind");
        }
    }
}

/// Nanoseconds since 1970 now; never goes back within a process, whatever is done to the clock, so that nothing a process
/// uses looks older than the process itself.
pub fn now_nanos() -> i64 {
    static LATEST: AtomicI64 = AtomicI64::new(0);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX));
    LATEST.fetch_max(now, Ordering::Relaxed).max(now)
}

struct Found {
    folder: PathBuf,
    began: i64,
    // Present when the owner is dead: we hold its lock now.
    dead: Option<File>,
}

fn scan(tmp: &Path) -> Result<Vec<Found>> {
    let mut found = vec![];
    for entry in fs::read_dir(tmp).at("read", tmp)? {
        let folder = entry.at("read", tmp)?.path();
        if !folder.is_dir() {
            continue;
        }
        let path = folder.join(LOCK);
        let began = folder
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.rsplit('-').next())
            .and_then(|hex| i64::from_str_radix(hex, 16).ok())
            .unwrap_or(0);
        match File::open(&path) {
            Ok(lock) => {
                let dead =
                    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok();
                found.push(Found { folder, began, dead: dead.then_some(lock) });
            }
            // Between making the folder and the lock file there is a moment; an old folder without one is dead.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let young = now_nanos().saturating_sub(began) < 60_000_000_000;
                // Who makes the lock file owns the folder, so a process that was only very slow notices.
                if !young
                    && let Ok(lock) = File::create_new(&path)
                    && rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
                {
                    found.push(Found { folder, began, dead: Some(lock) });
                }
            }
            Err(error) => return Err(error).at("open", &path),
        }
    }
    Ok(found)
}

/// Removes what dead processes left.
pub(crate) fn clear_dead(tmp: &Path) -> Result<()> {
    for found in scan(tmp)? {
        // What cannot be removed, such as a mount that is still there, must not keep anybody from working.
        if found.dead.is_some()
            && let Err(error) = remove_tree(&found.folder)
        {
            tracing::warn!(folder = %found.folder.display(), %error, "what a dead process left cannot be removed");
        }
    }
    Ok(())
}

/// Returns when the oldest living lease began, in nanoseconds since 1970; `own` is not counted.
pub(crate) fn oldest_living(tmp: &Path, own: &ProcessLease) -> Result<Option<i64>> {
    Ok(scan(tmp)?
        .into_iter()
        .filter(|found| found.dead.is_none() && found.folder != own.folder)
        .map(|found| found.began)
        .min())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_never_goes_back() {
        let times: Vec<i64> = (0..1000).map(|_| now_nanos()).collect();
        assert!(times.is_sorted());
    }

    #[test]
    fn leases_may_be_taken_while_others_look_for_dead_ones() {
        let tmp = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let lease = ProcessLease::acquire(tmp.path()).unwrap();
                        fs::write(lease.temporary("x"), "").unwrap();
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
    }

    #[test]
    fn dead_processes_are_cleared_and_living_ones_kept() {
        let tmp = tempfile::tempdir().unwrap();
        let living = ProcessLease::acquire(tmp.path()).unwrap();
        fs::write(living.temporary("blob"), "half").unwrap();
        let dead = tmp.path().join("1-0-1");
        fs::create_dir_all(dead.join("layer-0/fs")).unwrap();
        fs::write(dead.join(LOCK), "").unwrap();

        let mine = ProcessLease::acquire(tmp.path()).unwrap();
        assert!(!dead.exists());
        assert!(living.folder.join("blob-0").exists());
        assert!(oldest_living(tmp.path(), &mine).unwrap().is_some());

        let (young, old) =
            (tmp.path().join(format!("1-1-{:x}", now_nanos())), tmp.path().join("1-2-7"));
        fs::create_dir(&young).unwrap();
        fs::create_dir(&old).unwrap();
        clear_dead(tmp.path()).unwrap();
        assert!(young.exists(), "its process is about to make the lock");
        assert!(!old.exists());

        let folder = living.folder.clone();
        drop(living);
        assert!(!folder.exists());
        assert_eq!(oldest_living(tmp.path(), &mine).unwrap(), None);
    }
}
