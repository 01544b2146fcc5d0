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
    let root = rustix::fs::open(
        folder,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| LayerError::storage(b"", "open the layer folder", error))?;
    Writer { folder: Folder { root, overlay }, tar, first_names: HashMap::new() }.write()
}

/// A layer folder and the marks that overlayfs makes in it.
pub(super) struct Folder {
    pub(super) root: OwnedFd,
    pub(super) overlay: Overlay,
}

impl Folder {
    /// Whether a directory is opaque; refuses the other marks, whose meaning would be lost.
    pub(super) fn is_opaque(&self, path: &[u8]) -> Result<bool, LayerError> {
        let directory = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let read = |name: &str| {
            host::xattr(directory.as_fd(), name.as_bytes())
                .map_err(|error| LayerError::storage(path, "read the extended attributes", error))
        };
        if read(self.overlay.redirect())?.is_some() {
            return Err(unsupported(path, "was renamed by overlayfs; mount with redirect_dir=off"));
        }
        match read(self.overlay.opaque())?.as_deref() {
            None => Ok(false),
            Some(b"y") => Ok(true),
            Some(_) => Err(unsupported(
                path,
                "holds whiteouts in a form that cannot be read; mount the layers plainly",
            )),
        }
    }

    /// Whether [`reduce`](mod@super::reduce) has found no change in a directory but that of its time.
    fn is_unchanged(&self, path: &[u8]) -> Result<bool, LayerError> {
        let directory = self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        host::xattr(directory.as_fd(), self.overlay.unchanged().as_bytes())
            .map(|mark| mark.is_some())
            .map_err(|error| LayerError::storage(path, "read the extended attributes", error))
    }

    pub(super) fn open(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, LayerError> {
        host::open_beneath(self.root.as_fd(), path, flags)
            .map_err(|error| LayerError::storage(path, "open", error))
    }

    pub(super) fn open_file(&self, path: &[u8]) -> Result<File, LayerError> {
        let file = self.open(path, OFlags::RDONLY | OFlags::NONBLOCK)?;
        let metacopy = host::xattr(file.as_fd(), self.overlay.metacopy().as_bytes())
            .map_err(|error| LayerError::storage(path, "read the extended attributes", error))?;
        if metacopy.is_some() {
            return Err(unsupported(
                path,
                "has its content in a lower layer; mount with metacopy=off",
            ));
        }
        Ok(File::from(file))
    }

    pub(super) fn read_link(&self, path: &[u8]) -> Result<Vec<u8>, LayerError> {
        let handle = self.open(path, OFlags::PATH)?;
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
        let mut levels = vec![self.level(Vec::new())?];
        while let Some((parent, entries)) = levels.last_mut() {
            let Some((name, metadata)) = entries.next() else {
                levels.pop();
                continue;
            };
            let path = join(parent, &name);
            if metadata.is_whiteout() {
                self.tar.whiteout(&path).map_err(|error| cannot_write(&path, error))?;
                continue;
            }
            if !metadata.is_directory() || !self.folder.is_unchanged(&path)? {
                self.entry(&path, &metadata)?;
            }
            if metadata.is_directory() {
                levels.push(self.level(path)?);
            }
        }
        Ok(())
    }

    fn level(&mut self, path: Vec<u8>) -> Result<(Vec<u8>, Names), LayerError> {
        if self.folder.is_opaque(&path)? {
            self.tar.opaque(&path).map_err(|error| cannot_write(&path, error))?;
        }
        let fail = |error| LayerError::storage(&path, "read the directory", error);
        let directory = self.folder.open(&path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut entries = Vec::new();
        for name in host::names(directory.as_fd()).map_err(fail)? {
            let Some(metadata) = host::stat_at(directory.as_fd(), &name).map_err(fail)? else {
                return Err(LayerError::new(
                    LayerErrorKind::Storage,
                    show(&path),
                    "changed while it was read",
                ));
            };
            entries.push((name, metadata));
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
    let name = b"security.capability";
    let value = host::xattr(file.as_fd(), name)
        .map_err(|error| LayerError::storage(path, "read the extended attributes", error))?;
    let value = value.filter(|value| !value.is_empty());
    Ok(value.into_iter().map(|value| (name.to_vec(), value)).collect())
}

fn cannot_write(path: &[u8], error: io::Error) -> LayerError {
    LayerError::stream(path, "write the layer archive", error)
}

fn unsupported(path: &[u8], detail: &str) -> LayerError {
    LayerError::new(LayerErrorKind::Unsupported, show(path), detail)
}
