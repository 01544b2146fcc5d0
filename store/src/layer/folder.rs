//! From a layer folder to an archive.
//!
//! The archive holds what the folder holds, whatever lies below; [`reduce`](mod@super::reduce) has taken out of the folder what
//! changes nothing there. Order and bytes are those of BuildKit's overlay differ, so that the same changes give the same diff id:
//!
//! - depth first, names in byte order; a directory before what is in it;
//! - the first name of an inode carries the content, further names are hard links; sockets are left out.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::stack::{FileKind, Metadata};
use super::tar::{Entry, EntryKind, TarWriter};
use super::{LayerError, LayerErrorKind, Overlay, host, join, show};

/// Writes a layer folder; the archive is not finished, so the caller may still look at the writer.
///
/// # Errors
/// `Unsupported` if the folder was written by an overlay mount with `redirect_dir` or `metacopy`, `Storage` if the folder
/// cannot be read, `Stream` if the output fails or a file changes meanwhile.
pub fn write_folder<W: Write>(
    folder: &Path,
    overlay: Overlay,
    tar: &mut TarWriter<W>,
) -> Result<(), LayerError> {
    let folder = Folder::open(folder, overlay)?;
    Writer { folder, tar, first_names: HashMap::new() }.write()
}

/// A layer folder and the marks that overlayfs makes in it.
pub(super) struct Folder {
    root: OwnedFd,
    pub(super) overlay: Overlay,
}

impl Folder {
    pub(super) fn open(folder: &Path, overlay: Overlay) -> Result<Self, LayerError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(folder, flags, Mode::empty())
            .map_err(|error| LayerError::storage(b"", "open the layer folder", error))?;
        Ok(Self { root, overlay })
    }

    /// Opens a directory.
    pub(super) fn enter(&self, path: &[u8]) -> Result<OwnedFd, LayerError> {
        self.open_at(path, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// Whether a directory is opaque; refuses the other marks, whose meaning would be lost.
    pub(super) fn is_opaque(&self, directory: &OwnedFd, path: &[u8]) -> Result<bool, LayerError> {
        if attribute(directory, self.overlay.redirect(), path)?.is_some() {
            return Err(unsupported(path, "was renamed by overlayfs; mount with redirect_dir=off"));
        }
        match attribute(directory, self.overlay.opaque(), path)?.as_deref() {
            None => Ok(false),
            Some(b"y") => Ok(true),
            Some(_) => Err(unsupported(
                path,
                "holds whiteouts in a form that cannot be read; mount the layers plainly",
            )),
        }
    }

    fn open_at(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, LayerError> {
        host::open_beneath(self.root.as_fd(), path, flags)
            .map_err(|error| LayerError::storage(path, "open", error))
    }

    pub(super) fn open_file(&self, path: &[u8]) -> Result<File, LayerError> {
        let file = self.open_at(path, OFlags::RDONLY | OFlags::NONBLOCK)?;
        if attribute(&file, self.overlay.metacopy(), path)?.is_some() {
            return Err(unsupported(
                path,
                "has its content in a lower layer; mount with metacopy=off",
            ));
        }
        Ok(File::from(file))
    }

    pub(super) fn read_link(&self, path: &[u8]) -> Result<Vec<u8>, LayerError> {
        let handle = self.open_at(path, OFlags::PATH)?;
        rustix::fs::readlinkat(&handle, "", Vec::new())
            .map(std::ffi::CString::into_bytes)
            .map_err(|error| LayerError::storage(path, "read the symbolic link", error))
    }
}

struct Writer<'a, W: Write> {
    folder: Folder,
    tar: &'a mut TarWriter<W>,
    /// Inodes with several names: the name in the archive.
    first_names: HashMap<u64, Vec<u8>>,
}

impl<W: Write> Writer<'_, W> {
    fn write(&mut self) -> Result<(), LayerError> {
        let mut levels = vec![self.level(Vec::new(), None)?];
        while let Some((parent, entries)) = levels.last_mut() {
            let Some((name, metadata)) = entries.next() else {
                levels.pop();
                continue;
            };
            let path = join(parent, &name);
            if metadata.is_whiteout() {
                self.tar.whiteout(&path).map_err(|error| cannot_write(&path, error))?;
            } else if metadata.is_directory() {
                levels.push(self.level(path, Some(&metadata))?);
            } else {
                self.entry(&path, &metadata)?;
            }
        }
        Ok(())
    }

    /// Writes a directory, unless it is the root, and lists what is in it.
    fn level(
        &mut self,
        path: Vec<u8>,
        metadata: Option<&Metadata>,
    ) -> Result<(Vec<u8>, Names), LayerError> {
        let directory = self.folder.enter(&path)?;
        // `reduce` has found no change in it but that of its time.
        let is_unchanged = attribute(&directory, self.folder.overlay.unchanged(), &path)?.is_some();
        if let Some(metadata) = metadata.filter(|_| !is_unchanged) {
            self.entry(&path, metadata)?;
        }
        if self.folder.is_opaque(&directory, &path)? {
            self.tar.opaque(&path).map_err(|error| cannot_write(&path, error))?;
        }
        let fail = |error| LayerError::storage(&path, "read the directory", error);
        let mut entries = Vec::new();
        for name in host::names(directory.as_fd()).map_err(fail)? {
            let metadata = host::stat_at(directory.as_fd(), &name).map_err(fail)?;
            entries.push((name, metadata.ok_or_else(|| changed(&path))?));
        }
        Ok((path, entries.into_iter()))
    }

    fn entry(&mut self, path: &[u8], metadata: &Metadata) -> Result<(), LayerError> {
        let mut first = None;
        if metadata.links > 1 && !metadata.is_directory() && metadata.kind != FileKind::Socket {
            first = self.first_names.get(&metadata.inode).cloned();
            if first.is_none() {
                self.first_names.insert(metadata.inode, path.to_vec());
            }
        }
        let (major, minor) = metadata.device;
        let mut file = None;
        let kind = match (metadata.kind, first) {
            (FileKind::Socket, _) => return Ok(()),
            (kind, Some(target)) => {
                if kind == FileKind::File {
                    file = Some(self.folder.open_file(path)?);
                }
                EntryKind::HardLink { target }
            }
            (FileKind::Directory, None) => EntryKind::Directory,
            (FileKind::File, None) => {
                file = Some(self.folder.open_file(path)?);
                EntryKind::File { size: metadata.size }
            }
            (FileKind::Symlink, None) => {
                EntryKind::Symlink { target: self.folder.read_link(path)? }
            }
            (FileKind::CharDevice, None) => EntryKind::CharDevice { major, minor },
            (FileKind::BlockDevice, None) => EntryKind::BlockDevice { major, minor },
            (FileKind::Fifo, None) => EntryKind::Fifo,
        };
        let mut entry = Entry::new(path, kind, metadata.mode);
        (entry.uid, entry.gid) = (metadata.uid, metadata.gid);
        entry.mtime_seconds = metadata.mtime_seconds;
        if let Some(file) = &file {
            entry.xattrs = xattrs(path, file)?;
        }
        let mut content: Box<dyn Read> = match file {
            Some(file) => Box::new(file),
            None => Box::new(io::empty()),
        };
        self.tar.append(&entry, &mut content).map_err(|error| cannot_write(path, error))
    }
}

/// Names in a directory of the folder.
type Names = std::vec::IntoIter<(Vec<u8>, Metadata)>;

/// Returns what BuildKit writes of a file's attributes, which is its capabilities.
fn xattrs(path: &[u8], file: &File) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, LayerError> {
    let name = "security.capability";
    let value = attribute(file, name, path)?.filter(|value| !value.is_empty());
    Ok(value.into_iter().map(|value| (name.into(), value)).collect())
}

/// Returns an extended attribute of an open file.
fn attribute(file: &impl AsFd, name: &str, path: &[u8]) -> Result<Option<Vec<u8>>, LayerError> {
    host::xattr(file.as_fd(), name.as_bytes())
        .map_err(|error| LayerError::storage(path, "read the extended attributes", error))
}

pub(super) fn changed(path: &[u8]) -> LayerError {
    LayerError::new(LayerErrorKind::Storage, show(path), "changed while it was read")
}

fn cannot_write(path: &[u8], error: io::Error) -> LayerError {
    LayerError::stream(path, "write the layer archive", error)
}

fn unsupported(path: &[u8], detail: &str) -> LayerError {
    LayerError::new(LayerErrorKind::Unsupported, show(path), detail)
}
