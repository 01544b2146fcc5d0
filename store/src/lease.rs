//! A process's hold on the store: what it uses is not collected, what it leaves half written is.
//!
//! Every process that writes owns a folder `tmp/<id>` with a locked file in it. All unfinished work lives in that folder,
//! so when the kernel has released the lock of a dead process, removing one folder removes everything it left behind.
//! The collector never touches what was used after the oldest living lease began.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FlockOperation;

use crate::error::{IoContext as _, Result};

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
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error).at("create", &path),
            };
            rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).at("lock", &path)?;
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

/// Removes a folder and everything in it, whatever modes the folders have.
pub(crate) fn remove_tree(path: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            open_up(path)?;
            fs::remove_dir_all(path)
        }
        other => other,
    }
}

fn open_up(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    if !fs::symlink_metadata(path)?.is_dir() {
        return Ok(());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(path)? {
        open_up(&entry?.path())?;
    }
    Ok(())
}

/// Nanoseconds since 1970 now.
pub(crate) fn now_nanos() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
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
                let dead = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok();
                found.push(Found { folder, began, dead: dead.then_some(lock) });
            }
            // Between making the folder and the lock file there is a moment; an old folder without one is dead.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let young = now_nanos() - began < 60_000_000_000;
                if !young && let Ok(folder_file) = File::open(&folder) {
                    found.push(Found { folder, began, dead: Some(folder_file) });
                }
            }
            Err(error) => return Err(error).at("open", &path),
        }
    }
    Ok(found)
}

fn clear_dead(tmp: &Path) -> Result<()> {
    for found in scan(tmp)? {
        if found.dead.is_some() {
            remove_tree(&found.folder).at("remove", &found.folder)?;
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

        let folder = living.folder.clone();
        drop(living);
        assert!(!folder.exists());
        assert_eq!(oldest_living(tmp.path(), &mine).unwrap(), None);
    }
}
