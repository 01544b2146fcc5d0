//! The merged tree of a stack of layers, written out whole: as an archive or as a folder.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, XattrFlags};
use rustix::io::Errno;

use super::stack::{FileKind, LayerStack, Located, Walk};
use super::tar::{Entry, EntryKind, TarWriter};
use super::{LayerError, host, join, split};

/// How to copy a tree into a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyOptions {
    /// Sets owners and makes devices; needs root. Without, everything belongs to the caller and devices are left out.
    pub privileged: bool,
    /// The time of everything, in seconds since 1970; `None` keeps the times that there are.
    pub mtime: Option<i64>,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self { privileged: rustix::process::geteuid().is_root(), mtime: None }
    }
}

/// Writes the merged tree as an archive, without its root; the archive is not finished.
///
/// Entries are depth first in byte order; of several names of one file the first carries the content. All extended attributes are kept.
///
/// # Errors
/// Fails if a layer cannot be read or the output fails.
pub fn write_tree<W: Write>(stack: &LayerStack, tar: &mut TarWriter<W>) -> Result<(), LayerError> {
    write_tree_below(stack, b"", None, tar)
}

/// As [`write_tree`], with all names below a folder, which gets no entry of its own, and, where it is given, with one time
/// for everything, in seconds since 1970.
///
/// # Errors
/// As there.
pub fn write_tree_below<W: Write>(
    stack: &LayerStack,
    folder: &[u8],
    mtime: Option<i64>,
    tar: &mut TarWriter<W>,
) -> Result<(), LayerError> {
    if stack.is_empty() {
        return Ok(());
    }
    let mut first_names: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    stack.walk(b"", |located| {
        let metadata = &located.metadata;
        let inode = (metadata.file_system, metadata.inode);
        let (major, minor) = metadata.device;
        let mut file = None;
        let kind = match metadata.kind {
            FileKind::Socket => return Ok(Walk::Continue),
            FileKind::Directory => EntryKind::Directory,
            _ if first_names.contains_key(&inode) => {
                EntryKind::HardLink { target: first_names[&inode].clone() }
            }
            FileKind::File => {
                file = Some(stack.open(located)?);
                EntryKind::File { size: metadata.size }
            }
            FileKind::Symlink => EntryKind::Symlink { target: stack.read_link(located)? },
            FileKind::CharDevice => EntryKind::CharDevice { major, minor },
            FileKind::BlockDevice => EntryKind::BlockDevice { major, minor },
            FileKind::Fifo => EntryKind::Fifo,
        };
        if metadata.links > 1 && !metadata.is_directory() {
            first_names.entry(inode).or_insert_with(|| join(folder, &located.path));
        }
        let mut entry = Entry::new(join(folder, &located.path), kind, metadata.mode);
        (entry.uid, entry.gid) = (metadata.uid, metadata.gid);
        // Cut, not rounded, so that a file has the same time here as in its layer.
        entry.mtime_seconds = mtime.unwrap_or(metadata.mtime_seconds);
        entry.xattrs = stack.xattrs(located)?;
        let written = match &mut file {
            Some(file) => tar.append(&entry, file),
            None => tar.append(&entry, &mut io::empty()),
        };
        written.map_err(|error| LayerError::stream(&located.path, "write the archive", error))?;
        Ok(Walk::Continue)
    })
}

/// Copies the merged tree into an existing folder, over what is there: directories merge, everything else is replaced.
///
/// Paths in the folder are never followed through symbolic links: one that stands where the tree has a directory is replaced.
///
/// # Errors
/// Fails if a layer cannot be read or the folder not be written.
pub fn copy_tree(
    stack: &LayerStack,
    folder: &Path,
    options: &CopyOptions,
) -> Result<(), LayerError> {
    if stack.is_empty() {
        return Ok(());
    }
    let root = rustix::fs::open(
        folder,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| {
        LayerError::storage(folder.as_os_str().as_bytes(), "open the folder", error)
    })?;
    let mut copier = Copier {
        stack,
        options,
        parent: (
            Vec::new(),
            root.try_clone().map_err(|error| LayerError::storage(b"", "open the folder", error))?,
        ),
        root,
        first_names: HashMap::new(),
        directories: Vec::new(),
    };
    stack.walk(b"", |located| copier.entry(located).map(|()| Walk::Continue))?;
    copier.finish()
}

struct Copier<'a> {
    stack: &'a LayerStack,
    options: &'a CopyOptions,
    root: OwnedFd,
    /// The directory of the last entry.
    parent: (Vec<u8>, OwnedFd),
    first_names: HashMap<(u64, u64), Vec<u8>>,
    directories: Vec<Located>,
}

impl Copier<'_> {
    fn entry(&mut self, located: &Located) -> Result<(), LayerError> {
        let (parent, name) = split(&located.path);
        if self.parent.0 != parent {
            let opened =
                host::open_beneath(self.root.as_fd(), parent, OFlags::PATH | OFlags::DIRECTORY)
                    .map_err(|error| {
                        LayerError::storage(parent, "open the target folder", error)
                    })?;
            self.parent = (parent.to_vec(), opened);
        }
        let metadata = &located.metadata;
        let inode = (metadata.file_system, metadata.inode);
        if metadata.links > 1
            && !metadata.is_directory()
            && let Some(first) = self.first_names.get(&inode)
        {
            let (first_parent, first_name) = split(first);
            let source = host::open_beneath(
                self.root.as_fd(),
                first_parent,
                OFlags::PATH | OFlags::DIRECTORY,
            )
            .map_err(|error| LayerError::storage(first, "open the target folder", error))?;
            return self.replacing(located, |parent| {
                rustix::fs::linkat(&source, first_name, parent, name, AtFlags::empty())
            });
        }
        match metadata.kind {
            FileKind::Socket => return Ok(()),
            FileKind::Directory => {
                self.directory(located, name)?;
                self.directories.push(located.clone());
            }
            FileKind::File => self.file(located, name)?,
            FileKind::Symlink => {
                let target = self.stack.read_link(located)?;
                self.replacing(located, |parent| {
                    rustix::fs::symlinkat(target.as_slice(), parent, name)
                })?;
                self.attributes(located, name)?;
            }
            FileKind::CharDevice | FileKind::BlockDevice if !self.options.privileged => {
                return Ok(());
            }
            FileKind::CharDevice => self.node(located, name, FileType::CharacterDevice)?,
            FileKind::BlockDevice => self.node(located, name, FileType::BlockDevice)?,
            FileKind::Fifo => self.node(located, name, FileType::Fifo)?,
        }
        if metadata.links > 1 && !metadata.is_directory() {
            self.first_names.insert(inode, located.path.clone());
        }
        Ok(())
    }

    fn directory(&self, located: &Located, name: &[u8]) -> Result<(), LayerError> {
        let fail = |error| LayerError::storage(&located.path, "create the directory", error);
        match rustix::fs::mkdirat(&self.parent.1, name, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let existing = host::stat_at(self.parent.1.as_fd(), name).map_err(fail)?;
                if !existing.is_some_and(|metadata| metadata.is_directory()) {
                    host::remove_all(self.parent.1.as_fd(), name).map_err(fail)?;
                    rustix::fs::mkdirat(&self.parent.1, name, Mode::RWXU).map_err(fail)?;
                }
            }
            Err(error) => return Err(fail(error)),
        }
        self.owner(located, name)
    }

    fn file(&self, located: &Located, name: &[u8]) -> Result<(), LayerError> {
        let mut content = self.stack.open(located)?;
        let file = self.replacing(located, |parent| {
            let flags =
                OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)
        })?;
        let mut file = File::from(file);
        // Between two files the standard library copies inside the kernel, by reflink where the file system can.
        io::copy(&mut content, &mut file)
            .map_err(|error| LayerError::storage(&located.path, "copy", error))?;
        self.owner(located, name)?;
        for (key, value) in self.stack.xattrs(located)? {
            match rustix::fs::fsetxattr(&file, key, &value, XattrFlags::empty()) {
                // The target may be any file system, and the caller anybody.
                Ok(()) | Err(Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP) => {}
                Err(error) => {
                    return Err(LayerError::storage(
                        &located.path,
                        "set an extended attribute",
                        error,
                    ));
                }
            }
        }
        let fail = |error| LayerError::storage(&located.path, "set the mode and time", error);
        rustix::fs::fchmod(&file, Mode::from_raw_mode(located.metadata.mode)).map_err(fail)?;
        rustix::fs::futimens(&file, &self.times(located)).map_err(fail)
    }

    fn node(&self, located: &Located, name: &[u8], kind: FileType) -> Result<(), LayerError> {
        let (major, minor) = located.metadata.device;
        let device = rustix::fs::makedev(major, minor);
        self.replacing(located, |parent| {
            rustix::fs::mknodat(parent, name, kind, Mode::RUSR | Mode::WUSR, device)
        })?;
        self.owner(located, name)?;
        let mode = Mode::from_raw_mode(located.metadata.mode);
        rustix::fs::chmodat(&self.parent.1, name, mode, AtFlags::empty())
            .map_err(|error| LayerError::storage(&located.path, "set the mode", error))?;
        self.attributes(located, name)
    }

    fn replacing<T>(
        &self,
        located: &Located,
        create: impl Fn(BorrowedFd<'_>) -> Result<T, Errno>,
    ) -> Result<T, LayerError> {
        let parent = self.parent.1.as_fd();
        let made = match create(parent) {
            Err(Errno::EXIST) => {
                host::remove_all(parent, located.name()).and_then(|()| create(parent))
            }
            other => other,
        };
        made.map_err(|error| LayerError::storage(&located.path, "create", error))
    }

    fn owner(&self, located: &Located, name: &[u8]) -> Result<(), LayerError> {
        if !self.options.privileged {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(located.metadata.uid), Gid::from_raw(located.metadata.gid));
        rustix::fs::chownat(&self.parent.1, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| LayerError::storage(&located.path, "set the owner", error))
    }

    fn attributes(&self, located: &Located, name: &[u8]) -> Result<(), LayerError> {
        self.owner(located, name)?;
        rustix::fs::utimensat(&self.parent.1, name, &self.times(located), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| LayerError::storage(&located.path, "set the time", error))
    }

    fn times(&self, located: &Located) -> rustix::fs::Timestamps {
        let metadata = &located.metadata;
        match self.options.mtime {
            Some(seconds) => host::times(seconds, 0),
            None => host::times(metadata.mtime_seconds, metadata.mtime_nanoseconds),
        }
    }

    /// Modes and times of directories come last: entries made inside change the times, and a mode may forbid making them.
    fn finish(self) -> Result<(), LayerError> {
        for located in self.directories.iter().rev() {
            let fail = |error| LayerError::storage(&located.path, "set the mode and time", error);
            let directory = host::open_beneath(
                self.root.as_fd(),
                &located.path,
                OFlags::RDONLY | OFlags::DIRECTORY,
            )
            .map_err(fail)?;
            rustix::fs::futimens(&directory, &self.times(located)).map_err(fail)?;
            rustix::fs::fchmod(&directory, Mode::from_raw_mode(located.metadata.mode))
                .map_err(fail)?;
        }
        Ok(())
    }
}
