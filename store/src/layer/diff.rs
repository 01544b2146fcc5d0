//! From a layer folder to an archive.
//!
//! Only the folder is walked, so the cost is that of the changes, not of the image. Order, choice of entries and bytes are those of BuildKit's
//! overlay differ, so that the same changes give the same diff id:
//!
//! - depth first, names in byte order; a directory before what is in it, even if only its content changed;
//! - a whiteout only for what the layers below have; an opaque directory as one whiteout per removed entry;
//! - what is equal to its counterpart below is left out (overlayfs copies files up that are then not changed);
//! - the first name of an inode carries the content, further names are hard links; sockets are left out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::stack::{Child, FileKind, MergedDir, Metadata};
use super::tar::{Entry, EntryKind, TarWriter};
use super::{LayerError, LayerErrorKind, LayerStack, Overlay, host, join, show, split};

/// The buffer for comparing content.
const COMPARE_BUFFER: usize = 64 * 1024;

/// How to turn a folder into an archive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiffOptions {
    /// Which attributes mark opaque directories.
    pub overlay: Overlay,
    /// Keeps `user.*` attributes of files and directories, which BuildKit drops.
    pub keep_user_xattrs: bool,
    /// Dates later than this many seconds since 1970 are written as this.
    pub clamp_mtime: Option<i64>,
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiffStats {
    /// Entries, whiteouts included. With 0 the layer changes nothing.
    pub entries: u64,
    /// Whiteouts among them.
    pub whiteouts: u64,
    /// Bytes of file content.
    pub content_bytes: u64,
}

/// Writes what a layer folder changes in the layers below; the archive is not finished, so the caller may still look at the writer.
///
/// # Errors
/// `Unsupported` if the folder was written by an overlay mount with `redirect_dir` or `metacopy`, `Storage` if the folder or a
/// lower layer cannot be read, `Stream` if the output fails or a file changes meanwhile.
pub fn write_folder<W: Write>(
    folder: &Path,
    lowers: &LayerStack,
    tar: &mut TarWriter<W>,
    options: &DiffOptions,
) -> Result<DiffStats, LayerError> {
    let upper = LayerStack::open_folders([folder], options.overlay)?;
    let root = rustix::fs::open(
        folder,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| LayerError::storage(b"", "open the layer folder", error))?;
    let mut writer = Writer {
        upper,
        lowers,
        root,
        tar,
        options: *options,
        listed: BTreeSet::new(),
        first_names: HashMap::new(),
        held_names: HashMap::new(),
        stats: DiffStats::default(),
    };
    writer.folder()?;
    Ok(writer.stats)
}

struct Writer<'a, W: Write> {
    /// The folder alone, seen as a tree: what an opaque directory contains.
    upper: LayerStack,
    lowers: &'a LayerStack,
    root: OwnedFd,
    tar: &'a mut TarWriter<W>,
    options: DiffOptions,
    /// Directories that are in the archive.
    listed: BTreeSet<Vec<u8>>,
    /// Inodes with several names: the name in the archive.
    first_names: HashMap<u64, Vec<u8>>,
    /// Inodes with several names: unchanged names, written only if another name of the inode is.
    held_names: HashMap<u64, Vec<Vec<u8>>>,
    stats: DiffStats,
}

impl<W: Write> Writer<'_, W> {
    fn folder(&mut self) -> Result<(), LayerError> {
        let below = self.lowers.root()?.and_then(|root| root.directory(b""));
        if self.marks(b"")? {
            return self.opaque(b"", below);
        }
        let mut levels = vec![self.level(b"", below.as_ref())?];
        while let Some((parent, entries)) = levels.last_mut() {
            let Some((name, metadata, below)) = entries.next() else {
                levels.pop();
                continue;
            };
            let path = join(parent, &name);
            if metadata.is_whiteout() {
                if below.is_some() {
                    self.whiteout(&path)?;
                }
                continue;
            }
            let is_same = match &below {
                Some(below) => self.is_same(&path, &metadata, below)?,
                None => false,
            };
            if !is_same {
                self.changed(&path, &metadata)?;
            }
            if metadata.is_directory() {
                let opaque = self.marks(&path)?;
                let directory = below.as_ref().and_then(|below| below.directory(&path));
                if opaque && below.is_some() {
                    self.opaque(&path, directory)?;
                } else {
                    let next = self.level(&path, directory.as_ref())?;
                    levels.push(next);
                }
            }
        }
        Ok(())
    }

    fn level(
        &self,
        path: &[u8],
        below: Option<&MergedDir>,
    ) -> Result<(Vec<u8>, Names), LayerError> {
        let fail = |error| LayerError::storage(path, "read the directory", error);
        let directory = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let below = below.map(|below| self.lowers.enter(below)).transpose()?;
        let mut entries = Vec::new();
        for name in host::names(directory.as_fd()).map_err(fail)? {
            let Some(metadata) = host::stat_at(directory.as_fd(), &name).map_err(fail)? else {
                return Err(LayerError::new(
                    LayerErrorKind::Storage,
                    show(path),
                    "changed while it was read",
                ));
            };
            let below = match &below {
                Some(below) => self.lowers.child(below, &name).map_err(fail)?,
                None => None,
            };
            entries.push((name, metadata, below));
        }
        Ok((path.to_vec(), entries.into_iter()))
    }

    /// Whether a directory is opaque; refuses the other marks, whose meaning would be lost.
    fn marks(&self, path: &[u8]) -> Result<bool, LayerError> {
        let directory = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let overlay = self.options.overlay;
        let read = |name: &str| {
            host::xattr(directory.as_fd(), name.as_bytes())
                .map_err(|error| LayerError::storage(path, "read the extended attributes", error))
        };
        if read(overlay.redirect())?.is_some() {
            return Err(unsupported(path, "was renamed by overlayfs; mount with redirect_dir=off"));
        }
        match read(overlay.opaque())?.as_deref() {
            None => Ok(false),
            Some(b"y") => Ok(true),
            Some(_) => Err(unsupported(
                path,
                "holds whiteouts in a form that cannot be read; mount the layers plainly",
            )),
        }
    }

    /// An opaque directory that the layers below have too: the difference between the two trees.
    fn opaque(&mut self, path: &[u8], below: Option<MergedDir>) -> Result<(), LayerError> {
        let Some(root) = self
            .upper
            .resolve(path, super::Follow::None)?
            .and_then(|(path, child)| child.directory(&path))
        else {
            return Err(LayerError::new(
                LayerErrorKind::Storage,
                show(path),
                "vanished while it was read",
            ));
        };
        let mut levels = vec![self.merged_level(path, Some(&root), below.as_ref())?];
        while let Some((parent, names)) = levels.last_mut() {
            let Some((name, upper, below)) = names.next() else {
                levels.pop();
                continue;
            };
            let path = join(parent, &name);
            let Some(upper) = upper else {
                self.whiteout(&path)?;
                continue;
            };
            let is_same = match &below {
                Some(below) => self.is_same(&path, &upper.metadata, below)?,
                None => false,
            };
            if !is_same {
                self.changed(&path, &upper.metadata)?;
            } else if upper.metadata.links > 1 && !upper.metadata.is_directory() {
                self.unchanged_link(&path, &upper.metadata)?;
            }
            if let Some(directory) = upper.directory(&path) {
                self.marks(&path)?;
                let below = below.and_then(|below| below.directory(&path));
                let next = self.merged_level(&path, Some(&directory), below.as_ref())?;
                levels.push(next);
            }
        }
        Ok(())
    }

    fn merged_level(
        &self,
        path: &[u8],
        upper: Option<&MergedDir>,
        below: Option<&MergedDir>,
    ) -> Result<(Vec<u8>, MergedNames), LayerError> {
        let mut merged: BTreeMap<Vec<u8>, (Option<Child>, Option<Child>)> = BTreeMap::new();
        for (name, child) in
            upper.map(|upper| self.upper.children(upper)).transpose()?.unwrap_or_default()
        {
            merged.entry(name).or_default().0 = Some(child);
        }
        for (name, child) in
            below.map(|below| self.lowers.children(below)).transpose()?.unwrap_or_default()
        {
            merged.entry(name).or_default().1 = Some(child);
        }
        let merged: Vec<_> =
            merged.into_iter().map(|(name, (upper, below))| (name, upper, below)).collect();
        Ok((path.to_vec(), merged.into_iter()))
    }

    fn whiteout(&mut self, path: &[u8]) -> Result<(), LayerError> {
        self.list_parents(path)?;
        self.tar
            .whiteout(path)
            .map_err(|error| LayerError::stream(path, "write the layer archive", error))?;
        self.stats.entries += 1;
        self.stats.whiteouts += 1;
        Ok(())
    }

    /// Writes an entry that differs from the layers below.
    fn changed(&mut self, path: &[u8], metadata: &Metadata) -> Result<(), LayerError> {
        let mut held = Vec::new();
        let mut first = None;
        if metadata.links > 1 && !metadata.is_directory() && metadata.kind != FileKind::Socket {
            first = self.first_names.get(&metadata.inode).cloned();
            if first.is_none() {
                self.first_names.insert(metadata.inode, path.to_vec());
                held = self.held_names.remove(&metadata.inode).unwrap_or_default();
            }
        }
        self.write(path, metadata, first)?;
        for name in held {
            self.write(&name, metadata, Some(path.to_vec()))?;
        }
        Ok(())
    }

    /// An unchanged name of an inode with several names: part of the layer only if another name is.
    fn unchanged_link(&mut self, path: &[u8], metadata: &Metadata) -> Result<(), LayerError> {
        match self.first_names.get(&metadata.inode).cloned() {
            Some(first) => self.write(path, metadata, Some(first)),
            None => {
                self.held_names.entry(metadata.inode).or_default().push(path.to_vec());
                Ok(())
            }
        }
    }

    fn write(
        &mut self,
        path: &[u8],
        metadata: &Metadata,
        link: Option<Vec<u8>>,
    ) -> Result<(), LayerError> {
        let (major, minor) = metadata.device;
        let mut file = None;
        let kind = match (metadata.kind, link) {
            (FileKind::Socket, _) => return Ok(()),
            (kind, Some(target)) => {
                if kind == FileKind::File {
                    file = Some(self.open_file(path)?);
                }
                EntryKind::HardLink { target }
            }
            (FileKind::Directory, None) => EntryKind::Directory,
            (FileKind::File, None) => {
                file = Some(self.open_file(path)?);
                EntryKind::File { size: metadata.size }
            }
            (FileKind::Symlink, None) => EntryKind::Symlink { target: self.read_link(path)? },
            (FileKind::CharDevice, None) => EntryKind::CharDevice { major, minor },
            (FileKind::BlockDevice, None) => EntryKind::BlockDevice { major, minor },
            (FileKind::Fifo, None) => EntryKind::Fifo,
        };
        let mut entry = Entry::new(path, kind, metadata.mode);
        (entry.uid, entry.gid) = (metadata.uid, metadata.gid);
        entry.mtime_seconds =
            metadata.mtime_seconds.min(self.options.clamp_mtime.unwrap_or(i64::MAX));
        if let Some(file) = &file {
            entry.xattrs = self.xattrs(path, file)?;
        } else if metadata.is_directory() && self.options.keep_user_xattrs {
            entry.xattrs = self
                .xattrs(path, &File::from(self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?))?;
        }
        if metadata.is_directory() {
            // Before the parents, as it would be found missing again on the way back.
            self.listed.insert(path.to_vec());
        }
        self.list_parents(path)?;
        let mut content: Box<dyn Read> = match file {
            Some(file) => Box::new(file),
            None => Box::new(io::empty()),
        };
        self.tar
            .append(&entry, &mut content)
            .map_err(|error| LayerError::stream(path, "write the layer archive", error))?;
        self.stats.entries += 1;
        if let EntryKind::File { size } = entry.kind {
            self.stats.content_bytes += size;
        }
        Ok(())
    }

    /// Writes the directories on the way to an entry that are not in the archive yet, outermost first.
    fn list_parents(&mut self, path: &[u8]) -> Result<(), LayerError> {
        let mut missing = Vec::new();
        let mut parent = split(path).0;
        while !parent.is_empty() && !self.listed.contains(parent) {
            missing.push(parent.to_vec());
            parent = split(parent).0;
        }
        while let Some(parent) = missing.pop() {
            self.listed.insert(parent.clone());
            let metadata = self.stat(&parent)?;
            self.write(&parent, &metadata, None)?;
        }
        Ok(())
    }

    fn xattrs(&self, path: &[u8], file: &File) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, LayerError> {
        let fail = |error| LayerError::storage(path, "read the extended attributes", error);
        let mut xattrs = BTreeMap::new();
        let mut keep = |name: &[u8]| -> Result<(), Errno> {
            if let Some(value) = host::xattr(file.as_fd(), name)?.filter(|value| !value.is_empty())
            {
                xattrs.insert(name.to_vec(), value);
            }
            Ok(())
        };
        keep(b"security.capability").map_err(fail)?;
        if self.options.keep_user_xattrs {
            for name in host::xattr_names(file.as_fd()).map_err(fail)? {
                if name.starts_with(b"user.") && !super::stack::is_overlay_xattr(&name) {
                    keep(&name).map_err(fail)?;
                }
            }
        }
        Ok(xattrs)
    }

    /// Whether an entry of the folder is the same as the one below it. Like containerd's differs this looks at content only
    /// where size and time are equal, but then always: the clock of file systems stands still for some milliseconds, and
    /// steps that run at the same time write different files at the same time.
    fn is_same(&self, path: &[u8], upper: &Metadata, below: &Child) -> Result<bool, LayerError> {
        let lower = &below.metadata;
        if (upper.file_system, upper.inode) == (lower.file_system, lower.inode) {
            return Ok(true);
        }
        let key = |m: &Metadata| (m.kind, m.mode, m.uid, m.gid, m.device);
        if key(upper) != key(lower) {
            return Ok(false);
        }
        if upper.is_directory() {
            return Ok(true);
        }
        let key = |m: &Metadata| (m.size, m.mtime_seconds, m.mtime_nanoseconds);
        if key(upper) != key(lower) {
            return Ok(false);
        }
        let located = self.lowers.locate(path.to_vec(), below);
        match upper.kind {
            FileKind::File => {
                let (ours, theirs) = (self.open_file(path)?, self.lowers.open(&located)?);
                let capability = |file: &File| {
                    host::xattr(file.as_fd(), b"security.capability").map_err(|error| {
                        LayerError::storage(path, "read the extended attributes", error)
                    })
                };
                if capability(&ours)? != capability(&theirs)? {
                    return Ok(false);
                }
                same_content(ours, theirs).map_err(|error| {
                    LayerError::storage(path, "compare with the layers below", error)
                })
            }
            FileKind::Symlink => Ok(self.read_link(path)? == self.lowers.read_link(&located)?),
            _ => Ok(true),
        }
    }

    fn stat(&self, path: &[u8]) -> Result<Metadata, LayerError> {
        let handle = self.open(path, OFlags::PATH)?;
        host::stat_of(handle.as_fd()).map_err(|error| LayerError::storage(path, "read", error))
    }

    fn open(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, LayerError> {
        host::open_beneath(self.root.as_fd(), path, flags)
            .map_err(|error| LayerError::storage(path, "open", error))
    }

    fn open_file(&self, path: &[u8]) -> Result<File, LayerError> {
        let file = self.open(path, OFlags::RDONLY | OFlags::NONBLOCK)?;
        let metacopy = host::xattr(file.as_fd(), self.options.overlay.metacopy().as_bytes())
            .map_err(|error| LayerError::storage(path, "read the extended attributes", error))?;
        if metacopy.is_some() {
            return Err(unsupported(
                path,
                "has its content in a lower layer; mount with metacopy=off",
            ));
        }
        Ok(File::from(file))
    }

    fn read_link(&self, path: &[u8]) -> Result<Vec<u8>, LayerError> {
        let handle = self.open(path, OFlags::PATH)?;
        rustix::fs::readlinkat(&handle, "", Vec::new())
            .map(std::ffi::CString::into_bytes)
            .map_err(|error| LayerError::storage(path, "read the symbolic link", error))
    }
}

/// Names in a directory of the folder, with what the layers below have.
type Names = std::vec::IntoIter<(Vec<u8>, Metadata, Option<Child>)>;
/// Names in either of two directories, with what each has.
type MergedNames = std::vec::IntoIter<(Vec<u8>, Option<Child>, Option<Child>)>;

fn unsupported(path: &[u8], detail: &str) -> LayerError {
    LayerError::new(LayerErrorKind::Unsupported, show(path), detail)
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

fn read_full(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match input.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}
