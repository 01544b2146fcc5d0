//! A layer folder without what changes nothing.
//!
//! An overlay mount leaves more in its upper folder than the changes: files that it copied up and that were then left as
//! they were, and directories that hide all that is below them, whatever that is. Such a folder means something else on
//! other layers. This leaves exactly the changes, so that the folder, and the archive made of it, mean the same wherever the
//! layer is used: on the layers it was made on, in a merge, as a difference.
//!
//! What counts as a change is what BuildKit's overlay differ writes: what is equal to its counterpart below is none, nor is
//! a whiteout of what is not there, and an opaque directory is one whiteout for each removed entry. Beyond that, extended
//! attributes are compared, and names of one inode stay together when one of them has changed. The time of a
//! directory is kept for those who see the folder; the archive has it only with a change in the directory.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, XattrFlags};
use rustix::io::Errno;

use super::folder::{Folder, changed};
use super::stack::{Child, FileKind, LayerStack, MergedDir, Metadata};
use super::{LayerError, Overlay, host, join, read_full, split};

/// The buffer for comparing content.
const COMPARE_BUFFER: usize = 64 * 1024;

/// Takes everything out of a layer folder that does not change the layers below. Nothing may have the folder mounted.
///
/// Only the folder is walked, so the cost is that of the changes, not of the image.
///
/// # Errors
/// `Unsupported` if the folder was written by an overlay mount with `redirect_dir` or `metacopy`, `Storage` if something
/// cannot be read or changed. The folder is good for nothing then.
pub fn reduce(folder: &Path, lowers: &LayerStack, overlay: Overlay) -> Result<(), LayerError> {
    let Some(below) = lowers.root()?.and_then(|root| root.directory(b"")) else { return Ok(()) };
    let mut reducer = Reducer {
        folder: Folder::open(folder, overlay)?,
        lowers,
        unchanged_links: HashMap::new(),
        unchanged_directories: HashSet::new(),
    };
    reducer.walk(below)?;
    reducer.links()
}

struct Reducer<'a> {
    folder: Folder,
    lowers: &'a LayerStack,
    /// Inodes with several names: how many, and those that are as below.
    unchanged_links: HashMap<u64, (u64, Vec<Vec<u8>>)>,
    /// Directories that are as below, and have changes in them as far as is known.
    unchanged_directories: HashSet<Vec<u8>>,
}

/// How far a directory is as below. What is in it does not count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sameness {
    Not,
    ButForTime,
    Whole,
}

/// A directory of the folder.
struct Level {
    path: Vec<u8>,
    sameness: Sameness,
    /// Whether nothing of what is below shows in it.
    hides: bool,
    /// Whether there is a change in it.
    changes: bool,
    entries: std::vec::IntoIter<Found>,
}

/// A name in a directory, with what the folder and the layers below have by it; `None` is what the folder hides and does not
/// have.
type Found = (Vec<u8>, Option<(Metadata, Option<Child>)>);

impl Reducer<'_> {
    fn walk(&mut self, below: MergedDir) -> Result<(), LayerError> {
        let mut levels = vec![self.level(Vec::new(), Some(&below), Sameness::Not, false)?];
        while let Some(level) = levels.last_mut() {
            let Some((name, found)) = level.entries.next() else {
                let ended = levels.pop();
                if let (Some(ended), Some(parent)) = (ended, levels.last_mut()) {
                    parent.changes |= ended.changes || ended.sameness == Sameness::Not;
                    self.end(ended)?;
                }
                continue;
            };
            let path = join(&level.path, &name);
            match found {
                None => {
                    self.change(&path, "make the whiteout", |parent, name| {
                        let kind = FileType::CharacterDevice;
                        rustix::fs::mknodat(parent, name, kind, Mode::empty(), 0)
                    })?;
                    level.changes = true;
                }
                Some((ours, None)) if ours.is_whiteout() => self.remove(&path)?,
                Some((ours, _)) if ours.is_whiteout() => level.changes = true,
                Some((ours, below)) if ours.is_directory() => {
                    let sameness = match &below {
                        Some(below) if self.is_same(&path, &ours, below)? => {
                            let time = |m: &Metadata| (m.mtime_seconds, m.mtime_nanoseconds);
                            if time(&ours) == time(&below.metadata) {
                                Sameness::Whole
                            } else {
                                Sameness::ButForTime
                            }
                        }
                        _ => Sameness::Not,
                    };
                    let below = below.and_then(|below| below.directory(&path));
                    let next = self.level(path, below.as_ref(), sameness, level.hides)?;
                    levels.push(next);
                }
                Some((ours, Some(below))) if self.is_same(&path, &ours, &below)? => {
                    if ours.links > 1 {
                        level.changes = true;
                        let links = self.unchanged_links.entry(ours.inode);
                        links.or_insert((ours.links, vec![])).1.push(path);
                    } else {
                        self.remove(&path)?;
                    }
                }
                Some(_) => level.changes = true,
            }
        }
        Ok(())
    }

    fn level(
        &self,
        path: Vec<u8>,
        below: Option<&MergedDir>,
        sameness: Sameness,
        hidden: bool,
    ) -> Result<Level, LayerError> {
        let directory = self.folder.enter(&path)?;
        let is_opaque = self.folder.is_opaque(&directory, &path)?;
        if is_opaque {
            rustix::fs::fremovexattr(&directory, self.folder.overlay.opaque())
                .map_err(|error| LayerError::storage(&path, "make less opaque", error))?;
        }
        let hides = hidden || is_opaque;
        let fail = |error| LayerError::storage(&path, "read the directory", error);
        let mut entries: Vec<Found> = Vec::new();
        match below {
            None => {
                // Nothing in it can be as below: only marks are looked for.
                for (name, kind) in host::entries(directory.as_fd()).map_err(fail)? {
                    if !matches!(
                        kind,
                        FileType::Directory | FileType::CharacterDevice | FileType::Unknown
                    ) {
                        continue;
                    }
                    let metadata = host::stat_at(directory.as_fd(), &name).map_err(fail)?;
                    entries.push((name, Some((metadata.ok_or_else(|| changed(&path))?, None))));
                }
            }
            Some(below) => {
                let opened = self.lowers.enter(below)?;
                let names = host::names(directory.as_fd()).map_err(fail)?;
                if hides {
                    for (name, _) in self.lowers.children(below)? {
                        if names.binary_search(&name).is_err() {
                            entries.push((name, None));
                        }
                    }
                }
                for name in names {
                    let metadata = host::stat_at(directory.as_fd(), &name).map_err(fail)?;
                    let below = self.lowers.child(&opened, &name).map_err(fail)?;
                    entries.push((name, Some((metadata.ok_or_else(|| changed(&path))?, below))));
                }
            }
        }
        Ok(Level { path, sameness, hides, changes: false, entries: entries.into_iter() })
    }

    /// Ends a directory. One that is as below goes; one that has only other times, or such directories in it, is marked.
    fn end(&mut self, directory: Level) -> Result<(), LayerError> {
        let Level { path, sameness, changes, .. } = directory;
        match sameness {
            Sameness::Not => return Ok(()),
            Sameness::ButForTime if changes => return Ok(()),
            Sameness::Whole if changes => {
                self.unchanged_directories.insert(path);
                return Ok(());
            }
            Sameness::Whole if self.remove_directory(&path)? => return Ok(()),
            Sameness::ButForTime | Sameness::Whole => {}
        }
        let directory = self.folder.enter(&path)?;
        let mark = self.folder.overlay.unchanged();
        rustix::fs::fsetxattr(&directory, mark, b"y", XattrFlags::empty())
            .map_err(|error| LayerError::storage(&path, "mark the directory", error))
    }

    /// Removes files with several names if all of them are as below.
    fn links(mut self) -> Result<(), LayerError> {
        for (links, names) in std::mem::take(&mut self.unchanged_links).into_values() {
            if names.len() as u64 != links {
                continue;
            }
            for name in names {
                self.remove(&name)?;
                let mut parent = split(&name).0;
                while self.unchanged_directories.contains(parent)
                    && self.remove_directory(parent)?
                {
                    parent = split(parent).0;
                }
            }
        }
        Ok(())
    }

    fn remove(&self, path: &[u8]) -> Result<(), LayerError> {
        self.change(path, "remove what did not change", |parent, name| {
            rustix::fs::unlinkat(parent, name, AtFlags::empty())
        })
    }

    /// Removes a directory if nothing is left in it.
    fn remove_directory(&self, path: &[u8]) -> Result<bool, LayerError> {
        let mut is_gone = true;
        self.change(
            path,
            "remove what did not change",
            |parent, name| match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
                Err(Errno::NOTEMPTY | Errno::EXIST) => {
                    is_gone = false;
                    Ok(())
                }
                other => other,
            },
        )?;
        Ok(is_gone)
    }

    /// Changes an entry. The directory that it is in keeps its time.
    fn change(
        &self,
        path: &[u8],
        operation: &str,
        change: impl FnOnce(BorrowedFd<'_>, &[u8]) -> Result<(), Errno>,
    ) -> Result<(), LayerError> {
        let (parent, name) = split(path);
        let directory = self.folder.enter(parent)?;
        let fail = |error| LayerError::storage(path, operation, error);
        let Metadata { mtime_seconds, mtime_nanoseconds, .. } =
            host::stat_of(directory.as_fd()).map_err(fail)?;
        change(directory.as_fd(), name).map_err(fail)?;
        rustix::fs::futimens(&directory, &host::times(mtime_seconds, mtime_nanoseconds))
            .map_err(fail)
    }

    /// Whether an entry of the folder is the same as the one below it. Like containerd's differs this looks at content only
    /// where size and time are equal, but then always: the clock of file systems stands still for some milliseconds, and
    /// steps that run at the same time write different files at the same time.
    fn is_same(&self, path: &[u8], ours: &Metadata, below: &Child) -> Result<bool, LayerError> {
        let lower = &below.metadata;
        if (ours.file_system, ours.inode) == (lower.file_system, lower.inode) {
            return Ok(true);
        }
        let key = |m: &Metadata| (m.kind, m.mode, m.uid, m.gid, m.device);
        if key(ours) != key(lower) {
            return Ok(false);
        }
        let key = |m: &Metadata| (m.size, m.mtime_seconds, m.mtime_nanoseconds);
        if !ours.is_directory() && key(ours) != key(lower) {
            return Ok(false);
        }
        let located = self.lowers.locate(path.to_vec(), below);
        let fail = |error| LayerError::storage(path, "read the extended attributes", error);
        match ours.kind {
            FileKind::Directory => {
                let ours = self.folder.enter(path)?;
                Ok(host::xattrs(ours.as_fd()).map_err(fail)? == self.lowers.xattrs(&located)?)
            }
            FileKind::File => {
                let (ours, theirs) = (self.folder.open_file(path)?, self.lowers.open(&located)?);
                if host::xattrs(ours.as_fd()).map_err(fail)?
                    != host::xattrs(theirs.as_fd()).map_err(fail)?
                {
                    return Ok(false);
                }
                same_content(ours, theirs).map_err(|error| {
                    LayerError::storage(path, "compare with the layers below", error)
                })
            }
            FileKind::Symlink => {
                Ok(self.folder.read_link(path)? == self.lowers.read_link(&located)?)
            }
            _ => Ok(true),
        }
    }
}

fn same_content(mut ours: File, mut theirs: File) -> io::Result<bool> {
    let (mut a, mut b) = (vec![0; COMPARE_BUFFER], vec![0; COMPARE_BUFFER]);
    loop {
        let count = read_full(&mut ours, &mut a)?;
        if count != read_full(&mut theirs, &mut b)? || a[..count] != b[..count] {
            return Ok(false);
        }
        if count < COMPARE_BUFFER {
            return Ok(true);
        }
    }
}
