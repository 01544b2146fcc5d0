//! Mounts made step by step: first without a place, then attached to one that is already open.

use std::collections::HashSet;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags,
};

use super::protocol::{During, Failure};
use super::{Writable, sys};

/// The kernel's limit on an overlay's folders.
const MAX_LAYERS: usize = 500;

/// Makes a new file system, not yet anywhere.
pub(super) fn new_mount(
    fs: &str,
    options: &[(&str, &str)],
    flags: MountAttrFlags,
) -> Result<OwnedFd, Errno> {
    let context = rustix::mount::fsopen(fs, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        if value.is_empty() {
            rustix::mount::fsconfig_set_flag(&context, *key)?;
        } else {
            rustix::mount::fsconfig_set_string(&context, *key, *value)?;
        }
    }
    rustix::mount::fsconfig_create(&context)?;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)
}

/// Makes a second view of what is at a path.
pub(super) fn bind(
    at: impl AsFd,
    path: impl rustix::path::Arg,
    attributes: u64,
    recursive: bool,
) -> Result<OwnedFd, Errno> {
    open_tree(at.as_fd(), path, AtFlags::SYMLINK_NOFOLLOW, attributes, recursive)
}

/// Makes a second view of what is open.
pub(super) fn bind_fd(
    source: BorrowedFd<'_>,
    attributes: u64,
    recursive: bool,
) -> Result<OwnedFd, Errno> {
    open_tree(source, c"", AtFlags::EMPTY_PATH, attributes, recursive)
}

fn open_tree(
    at: BorrowedFd<'_>,
    path: impl rustix::path::Arg,
    how: AtFlags,
    attributes: u64,
    recursive: bool,
) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if how.contains(AtFlags::EMPTY_PATH) {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    if how.contains(AtFlags::SYMLINK_NOFOLLOW) {
        flags |= OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    }
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let mount = rustix::mount::open_tree(at, path, flags)?;
    if attributes != 0 {
        sys::restrict_mount(mount.as_fd(), attributes, recursive)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    }
    Ok(mount)
}

/// Mounts on what is open.
pub(super) fn attach(mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, c"", place, c"", flags)
}

/// Mounts on a name in an open folder; a link is not followed.
pub(super) fn attach_at(
    mount: BorrowedFd<'_>,
    folder: BorrowedFd<'_>,
    name: &str,
) -> Result<(), Errno> {
    rustix::mount::move_mount(mount, c"", folder, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Returns the layers top first, each once: a layer's second, lower appearance can't add anything to its upper one,
/// and the kernel refuses it.
fn stack(lower: &[PathBuf]) -> Vec<&PathBuf> {
    let mut seen = HashSet::new();
    lower.iter().rev().filter(|path| seen.insert(*path)).collect()
}

/// Mounts an overlay at `place`, a folder of the host that only this mount namespace then sees covered.
///
/// All folders are named by descriptor: the kernel takes one page of options, which would not hold the paths of a
/// hundred layers, and a path could contain its separators.
pub(super) fn mount_overlay(
    lower: &[PathBuf],
    writable: Option<&Writable>,
    place: &Path,
    flags: MountFlags,
    in_user_namespace: bool,
) -> Result<OwnedFd, Failure> {
    let open = |path: &Path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
            .during_at("open the layer", &path.to_string_lossy())
    };
    let lower = stack(lower);
    if lower.len() > MAX_LAYERS {
        return Err(Failure::setup(
            "mount more layers than the kernel can stack (500)",
            None,
            Errno::TOOBIG,
        ));
    }
    let lower = lower.into_iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
    let numbers: Vec<String> = lower.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
    // Redirects are not followed: an image could otherwise name any folder of the host's layers.
    let mut options =
        format!("lowerdir={},index=off,metacopy=off,redirect_dir=nofollow", numbers.join(":"));
    if in_user_namespace {
        options.push_str(",userxattr");
    }
    let upper = match writable {
        None => None,
        Some(writable) => Some((open(&writable.upper)?, open(&writable.work)?)),
    };
    if let Some((upper, work)) = &upper {
        options.push_str(&format!(
            ",upperdir={},workdir={},volatile",
            upper.as_raw_fd(),
            work.as_raw_fd()
        ));
        // Left by an earlier mount of the same folders, this would make the kernel refuse them. It guards against a
        // crash in between; whoever keeps a folder over a crash must sync it.
        for (path, flags) in [
            ("work/incompat/volatile/dirty", AtFlags::empty()),
            ("work/incompat/volatile", AtFlags::REMOVEDIR),
            ("work/incompat", AtFlags::REMOVEDIR),
        ] {
            let _absent = rustix::fs::unlinkat(work, path, flags);
        }
    }
    let options = CString::new(options)
        .map_err(|_| Failure::setup("mount the layers", None, Errno::INVAL))?;
    rustix::process::chdir("/proc/self/fd").during("enter /proc/self/fd")?;
    let count = format!("{} layers", lower.len());
    rustix::mount::mount("overlay", place, "overlay", flags, Some(options.as_c_str()))
        .during_at("mount", &count)?;
    rustix::process::chdir("/").during("enter the host's root")?;
    open(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_layer_counts_where_it_is_highest() {
        let lower = ["a", "b", "a", "c", "b"].map(PathBuf::from);
        assert_eq!(stack(&lower), ["b", "c", "a"].map(PathBuf::from).iter().collect::<Vec<_>>());
    }
}
