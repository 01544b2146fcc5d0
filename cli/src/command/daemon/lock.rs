//! One daemon to a state folder.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::failure::Failure;

/// Held while a daemon uses a state folder. The file stays: removing it would let two daemons hold two files.
#[derive(Debug)]
pub(crate) struct RootLock {
    _file: File,
}

impl RootLock {
    /// Takes the lock; makes the folder if need be.
    ///
    /// # Errors
    /// When another daemon has it, or the folder cannot be used.
    pub(crate) fn take(root: &Path) -> Result<Self, Failure> {
        let path = root.join("daemon.lock");
        let failed = |error: std::io::Error| {
            Failure::new(format!("cannot lock {}: {error}", path.display()))
                .hint("choose another state folder with --root DIR")
        };
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(failed)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                // For the message only.
                let _read = file.take(32).read_to_string(&mut holder);
                let holder = match holder.trim().parse::<u32>() {
                    Ok(process) => format!("process {process}"),
                    Err(_) => "another daemon".into(),
                };
                return Err(Failure::new(format!("{holder} serves {} already", root.display()))
                    .hint("stop it, or choose another state folder with --root DIR"));
            }
            Err(error) => return Err(failed(error.into())),
        }
        file.set_len(0)
            .and_then(|()| file.write_all(std::process::id().to_string().as_bytes()))
            .map_err(failed)?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_refused_until_the_first_ends() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("made/root");
        let first = RootLock::take(&root).unwrap();
        let failure = RootLock::take(&root).unwrap_err();
        let expected = format!("process {} serves {} already", std::process::id(), root.display());
        assert_eq!(failure.message, expected);
        drop(first);
        RootLock::take(&root).unwrap();
    }

    #[test]
    fn folders_that_cannot_be_used_are_named() {
        let failure = RootLock::take(Path::new("/proc/slipway")).unwrap_err();
        assert!(
            failure.message.starts_with("cannot lock /proc/slipway/daemon.lock: "),
            "{failure}"
        );
    }
}
