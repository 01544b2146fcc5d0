//! The few file system operations of layers, all relative to open directories and never through a symbolic link.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps};
use rustix::io::Errno;

use super::stack::{FileKind, Metadata, is_overlay_xattr};

/// Longer paths are opened in steps; the kernel's limit is 4096 bytes.
const PATH_STEP: usize = 3500;

/// Opens a path inside `root` (empty for the root itself) without following any symbolic link.
pub(super) fn open_beneath(
    root: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    let mut held: Option<OwnedFd> = None;
    let mut rest = path;
    while rest.len() > PATH_STEP {
        let Some(at) = rest[..PATH_STEP].iter().rposition(|&b| b == b'/') else {
            return Err(Errno::NAMETOOLONG);
        };
        let from = held.as_ref().map_or(root, AsFd::as_fd);
        held = Some(open_step(from, &rest[..at], OFlags::PATH | OFlags::DIRECTORY)?);
        rest = &rest[at + 1..];
    }
    open_step(
        held.as_ref().map_or(root, AsFd::as_fd),
        if rest.is_empty() { b"." } else { rest },
        flags,
    )
}

fn open_step(from: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    retry(|| {
        rustix::fs::openat2(
            from,
            path,
            flags | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        )
    })
}

/// `openat2` answers EAGAIN when a rename elsewhere races with it, and EINTR on signals.
fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    for _ in 0..128 {
        match call() {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
    call()
}

/// Opens a directory entry that must be a directory.
pub(super) fn open_directory_at(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(
        parent,
        name,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// Returns the metadata of a directory entry itself, or `None` if there is none.
pub(super) fn stat_at(parent: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Metadata>, Errno> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(metadata(&stat))),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns the metadata of an open file.
pub(super) fn stat_of(file: BorrowedFd<'_>) -> Result<Metadata, Errno> {
    Ok(metadata(&rustix::fs::fstat(file)?))
}

fn metadata(stat: &Stat) -> Metadata {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        FileType::CharacterDevice => FileKind::CharDevice,
        FileType::BlockDevice => FileKind::BlockDevice,
        FileType::Fifo => FileKind::Fifo,
        FileType::Socket => FileKind::Socket,
        FileType::RegularFile | FileType::Unknown => FileKind::File,
    };
    Metadata {
        kind,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mtime_seconds: stat.st_mtime,
        mtime_nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        device: (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)),
        #[expect(
            clippy::useless_conversion,
            reason = "the width of st_nlink differs between architectures"
        )]
        links: u64::from(stat.st_nlink),
        inode: stat.st_ino,
        file_system: stat.st_dev,
    }
}

/// Returns the names in a directory, sorted by their bytes.
pub(super) fn names(directory: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>, Errno> {
    let mut names: Vec<Vec<u8>> = entries(directory)?.into_iter().map(|(name, _)| name).collect();
    names.sort_unstable();
    Ok(names)
}

/// Returns the names in a directory in any order, each with what it is, where the file system tells that with the name.
pub(super) fn entries(directory: BorrowedFd<'_>) -> Result<Vec<(Vec<u8>, FileType)>, Errno> {
    let mut entries = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            entries.push((name.to_vec(), entry.file_type()));
        }
    }
    Ok(entries)
}

/// Returns an extended attribute of an open file; `None` if it is absent or the file system has none.
pub(super) fn xattr(file: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
    let mut value = vec![0; 256];
    loop {
        match rustix::fs::fgetxattr(file, name, value.as_mut_slice()) {
            Ok(length) => {
                value.truncate(length);
                return Ok(Some(value));
            }
            Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
            // 64 KiB is the kernel's limit for a value.
            Err(Errno::RANGE) if value.len() < 1 << 16 => value.resize(1 << 16, 0),
            Err(error) => return Err(error),
        }
    }
}

/// Returns the names of all extended attributes of an open file.
pub(super) fn xattr_names(file: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>, Errno> {
    let mut list = vec![0; 1024];
    loop {
        match rustix::fs::flistxattr(file, list.as_mut_slice()) {
            Ok(length) => {
                list.truncate(length);
                return Ok(list
                    .split(|&b| b == 0)
                    .filter(|name| !name.is_empty())
                    .map(<[u8]>::to_vec)
                    .collect());
            }
            Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
            Err(Errno::RANGE) if list.len() < 1 << 16 => list.resize(1 << 16, 0),
            Err(error) => return Err(error),
        }
    }
}

/// Returns the extended attributes of an open file, without overlayfs's own.
pub(super) fn xattrs(file: BorrowedFd<'_>) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Errno> {
    let mut xattrs = BTreeMap::new();
    for name in xattr_names(file)?.into_iter().filter(|name| !is_overlay_xattr(name)) {
        if let Some(value) = xattr(file, &name)? {
            xattrs.insert(name, value);
        }
    }
    Ok(xattrs)
}

/// Sets an extended attribute of anything, symbolic links and devices included, without following or opening it.
///
/// `/proc/self/fd` names exactly the inode of a descriptor opened with `O_PATH`.
pub(super) fn set_xattr_at(
    parent: BorrowedFd<'_>,
    name: &[u8],
    key: &[u8],
    value: &[u8],
) -> Result<(), Errno> {
    let handle = rustix::fs::openat(
        parent,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
    rustix::fs::setxattr(path, key, value, rustix::fs::XattrFlags::empty())
}

/// Returns times with this modification time; access time is the same, so that a folder's content depends on its layer only.
pub(super) fn times(seconds: i64, nanoseconds: u32) -> Timestamps {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}

/// Removes a directory entry and everything below it; its absence is fine.
///
/// Works level by level with at most two open directories, so deep trees need neither stack nor descriptors.
pub(super) fn remove_all(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error),
    }
    let mut trail: Vec<Vec<u8>> = Vec::new();
    let mut directory = open_directory_at(parent, name)?;
    loop {
        let mut deeper = None;
        for child in names(directory.as_fd())? {
            match rustix::fs::unlinkat(&directory, child.as_slice(), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR | Errno::PERM) => {
                    match rustix::fs::unlinkat(&directory, child.as_slice(), AtFlags::REMOVEDIR) {
                        Ok(()) | Err(Errno::NOENT) => {}
                        Err(Errno::NOTEMPTY | Errno::EXIST) => {
                            deeper = Some(child);
                            break;
                        }
                        Err(error) => return Err(error),
                    }
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(child) = deeper {
            directory = open_directory_at(directory.as_fd(), &child)?;
            trail.push(child);
        } else if let Some(done) = trail.pop() {
            // "..": the directory was reached from its parent, and nothing else renames inside a layer being written.
            directory = open_directory_at(directory.as_fd(), b"..")?;
            rustix::fs::unlinkat(&directory, done.as_slice(), AtFlags::REMOVEDIR)?;
        } else {
            return rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR);
        }
    }
}
