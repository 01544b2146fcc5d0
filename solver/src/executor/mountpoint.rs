//! Mount points: found or made without ever leaving the root, and taken away again.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// As many links as the kernel follows in one path.
const MAX_LINKS: usize = 40;

/// A mount point that was made in the upper folder because the image had none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountStub {
    /// Its path, relative to the root, free of links.
    pub path: String,
    /// Whether it is a folder.
    pub directory: bool,
}

/// What is needed to mount on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    Folder,
    File,
}

/// Makes the folder that [`super::ExecSpec::stub`] names: the lowest layer of every step's root, so that the usual
/// mount points exist without a trace in what the step writes. Safe to repeat, and to do in several processes.
///
/// # Errors
/// When the folder can't be written.
pub fn prepare_stub(stub: &Path) -> io::Result<()> {
    for folder in ["empty", "root/dev", "root/proc", "root/sys", "root/etc"] {
        std::fs::create_dir_all(stub.join(folder))?;
    }
    for file in ["root/etc/hosts", "root/etc/resolv.conf"] {
        std::fs::OpenOptions::new().create(true).append(true).open(stub.join(file))?;
    }
    Ok(())
}

/// Removes from `upper` the mount points that a step needed, unless the step put something into them.
///
/// Only empty folders and files go, each found without following a link: what a step swapped for a link stays.
///
/// # Errors
/// When `upper` can't be opened.
pub fn remove_stubs(upper: &Path, stubs: &[MountStub]) -> io::Result<()> {
    let upper =
        rustix::fs::open(upper, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // Made outermost first, so they go innermost first.
    for stub in stubs.iter().rev() {
        let path = Path::new(&stub.path);
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { continue };
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let Ok(parent) = rustix::fs::openat2(
            &upper,
            parent,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
        ) else {
            continue;
        };
        let Ok(stat) = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        let flags = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory if stub.directory => AtFlags::REMOVEDIR,
            FileType::RegularFile if !stub.directory && stat.st_size == 0 => AtFlags::empty(),
            _ => continue,
        };
        keeping_mtime(parent.as_fd(), || match rustix::fs::unlinkat(&parent, name, flags) {
            Ok(()) | Err(Errno::NOTEMPTY | Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno),
        })?;
    }
    Ok(())
}

/// Changes a folder's entries without changing its modification time: a stub is no change of the image.
fn keeping_mtime<T>(
    folder: BorrowedFd<'_>,
    change: impl FnOnce() -> Result<T, Errno>,
) -> Result<T, Errno> {
    let before = rustix::fs::fstat(folder)?;
    let result = change()?;
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec {
            tv_sec: before.st_mtime as _,
            tv_nsec: before.st_mtime_nsec as _,
        },
    };
    // Best effort: an old kernel that knows no empty path here costs a time stamp, not the step.
    let _kept = rustix::fs::utimensat(folder, c"", &times, AtFlags::EMPTY_PATH);
    Ok(result)
}

/// Opens what `path` names as a process inside `root` would see it, magic links refused.
pub(super) fn open_in_root(
    root: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b".".as_slice() } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    loop {
        match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            // The kernel asks to try again when something was renamed meanwhile.
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Finds or makes a mount point inside `root`, and notes in `stubs` what was made.
pub(super) fn ensure(
    root: BorrowedFd<'_>,
    dest: &str,
    want: Want,
    stubs: &mut Vec<MountStub>,
) -> Result<OwnedFd, Errno> {
    let found = match open_in_root(root, dest.as_bytes(), OFlags::PATH) {
        Ok(found) => found,
        Err(Errno::NOENT) => make(root, dest, want, stubs)?,
        Err(errno) => return Err(errno),
    };
    let folder = FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode) == FileType::Directory;
    match (want, folder) {
        (Want::Folder, false) => Err(Errno::NOTDIR),
        (Want::File, true) => Err(Errno::ISDIR),
        _ => Ok(found),
    }
}

/// Walks by hand, since the kernel cannot tell where a dangling link would have led.
fn make(
    root: BorrowedFd<'_>,
    dest: &str,
    want: Want,
    stubs: &mut Vec<MountStub>,
) -> Result<OwnedFd, Errno> {
    let open = |at: BorrowedFd<'_>, name: &OsStr| {
        rustix::fs::openat(
            at,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
    };
    let split = |path: &[u8]| -> Vec<OsString> {
        path.split(|b| *b == b'/')
            .filter(|part| !part.is_empty() && *part != b".")
            .map(|part| OsString::from_vec(part.to_vec()))
            .collect()
    };
    let mut rest: VecDeque<OsString> = split(dest.as_bytes()).into();
    let mut walked: Vec<(OwnedFd, OsString)> = vec![];
    let mut links = 0;
    while let Some(name) = rest.pop_front() {
        if name == ".." {
            // Up by our own record: the kernel's `..` may have been moved elsewhere by another step.
            walked.pop();
            continue;
        }
        let parent = walked.last().map_or(root, |(fd, _)| fd.as_fd());
        let fd = match open(parent, &name) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => {
                let mut path: Vec<u8> = vec![];
                for (_, part) in &walked {
                    path.extend_from_slice(part.as_bytes());
                    path.push(b'/');
                }
                path.extend_from_slice(name.as_bytes());
                let path = String::from_utf8(path).map_err(|_| Errno::ILSEQ)?;
                let directory = !rest.is_empty() || want == Want::Folder;
                let made = keeping_mtime(parent, || {
                    if directory {
                        rustix::fs::mkdirat(parent, &name, Mode::from_raw_mode(0o755))
                    } else {
                        let flags =
                            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                        rustix::fs::openat(parent, &name, flags, Mode::from_raw_mode(0o644))
                            .map(drop)
                    }
                });
                match made {
                    Ok(()) => stubs.push(MountStub { path, directory }),
                    // Another step made it meanwhile, in a cache that both mount.
                    Err(Errno::EXIST) => {}
                    Err(errno) => return Err(errno),
                }
                open(parent, &name)?
            }
            Err(errno) => return Err(errno),
        };
        if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) == FileType::Symlink {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::LOOP);
            }
            let target = rustix::fs::readlinkat(&fd, c"", vec![])?.into_bytes();
            if target.first() == Some(&b'/') {
                walked.clear();
            }
            for part in split(&target).into_iter().rev() {
                rest.push_front(part);
            }
            continue;
        }
        walked.push((fd, name));
    }
    match walked.pop() {
        Some((fd, _)) => Ok(fd),
        None => open_in_root(root, b".", OFlags::PATH),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(path: &Path) -> OwnedFd {
        rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap()
    }

    #[test]
    fn missing_mount_points_are_made_and_removed_again() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("var")).unwrap();
        let before = std::fs::metadata(root.path().join("var")).unwrap().modified().unwrap();
        let mut stubs = vec![];
        ensure(folder(root.path()).as_fd(), "/var/cache/apt", Want::Folder, &mut stubs).unwrap();
        ensure(folder(root.path()).as_fd(), "run/secrets/key", Want::File, &mut stubs).unwrap();
        let paths: Vec<&str> = stubs.iter().map(|s| s.path.as_str()).collect();
        assert_eq!(paths, ["var/cache", "var/cache/apt", "run", "run/secrets", "run/secrets/key"]);
        remove_stubs(root.path(), &stubs).unwrap();
        assert!(!root.path().join("run").exists() && !root.path().join("var/cache").exists());
        assert_eq!(std::fs::metadata(root.path().join("var")).unwrap().modified().unwrap(), before);
    }

    #[test]
    fn a_link_never_leads_outside_the_root() {
        let root = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("abs")).unwrap();
        std::os::unix::fs::symlink("../../../../../../../up", root.path().join("rel")).unwrap();
        let mut stubs = vec![];
        ensure(folder(root.path()).as_fd(), "abs/made", Want::Folder, &mut stubs).unwrap();
        ensure(folder(root.path()).as_fd(), "rel/made", Want::Folder, &mut stubs).unwrap();
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        assert!(root.path().join("up/made").is_dir());
        assert!(root.path().join(outside.path().strip_prefix("/").unwrap()).join("made").is_dir());
    }

    #[test]
    fn a_stub_swapped_for_a_link_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let canary = tempfile::tempdir().unwrap();
        std::fs::create_dir(canary.path().join("b")).unwrap();
        let mut stubs = vec![];
        ensure(folder(root.path()).as_fd(), "a/b", Want::Folder, &mut stubs).unwrap();
        std::fs::rename(root.path().join("a"), root.path().join("old")).unwrap();
        std::os::unix::fs::symlink(canary.path(), root.path().join("a")).unwrap();
        remove_stubs(root.path(), &stubs).unwrap();
        assert!(canary.path().join("b").is_dir());
    }

    #[test]
    fn a_loop_of_links_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("b", root.path().join("a")).unwrap();
        std::os::unix::fs::symlink("a", root.path().join("b")).unwrap();
        let result = ensure(folder(root.path()).as_fd(), "a/x", Want::Folder, &mut vec![]);
        assert_eq!(result.unwrap_err(), Errno::LOOP);
    }

    #[test]
    fn two_steps_may_need_the_same_mount_point_of_a_shared_cache_at_once() {
        for _ in 0..50 {
            let cache = tempfile::tempdir().unwrap();
            let path = cache.path();
            let prepare = || {
                let mut stubs = vec![];
                ensure(folder(path).as_fd(), "bar/baz", Want::Folder, &mut stubs).map(drop)
            };
            std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(prepare)).collect();
                for thread in threads {
                    thread.join().unwrap().unwrap();
                }
            });
        }
    }

    #[test]
    fn a_mount_point_of_the_wrong_kind_is_refused() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("file"), "").unwrap();
        let root = folder(root.path());
        assert_eq!(
            ensure(root.as_fd(), "file", Want::Folder, &mut vec![]).unwrap_err(),
            Errno::NOTDIR
        );
        assert_eq!(ensure(root.as_fd(), "/", Want::File, &mut vec![]).unwrap_err(), Errno::ISDIR);
    }
}
