//! Several layer folders read as one tree, without mounting them.
//!
//! The rules are overlayfs's: the topmost layer that has a path wins, directories merge, a whiteout (character device 0:0) or a
//! non-directory hides everything below, an opaque directory hides what lower layers have inside it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::{LayerError, LayerErrorKind, Overlay, host, join, show};

/// The most symbolic links one look-up follows, as in the kernel.
const MAX_LINKS: usize = 40;

/// What a path is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket, which never becomes part of a layer archive.
    Socket,
}

/// The metadata of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits with set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Modification time, seconds since 1970.
    pub mtime_seconds: i64,
    /// Modification time, nanoseconds within the second.
    pub mtime_nanoseconds: u32,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Number of hard links.
    pub links: u64,
    /// Inode number, unique within `file_system`.
    pub inode: u64,
    /// Number of the host's file system.
    pub file_system: u64,
}

impl Metadata {
    /// Whether this is overlayfs's mark of a removed path.
    pub fn is_whiteout(&self) -> bool {
        self.kind == FileKind::CharDevice && self.device == (0, 0)
    }

    /// Whether this is a directory.
    pub fn is_directory(&self) -> bool {
        self.kind == FileKind::Directory
    }
}

/// How a look-up treats symbolic links.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Follow {
    /// Follows every link, as `stat` does.
    All,
    /// Follows links in all components but the last, as `lstat` does.
    Parents,
    /// Follows none: a link in the middle means that the path does not exist.
    None,
}

/// A path found in a [`LayerStack`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The path inside the tree, links resolved; empty for the root.
    pub path: Vec<u8>,
    /// The index of the topmost layer that has it; 0 is the base.
    pub layer: usize,
    /// Where that layer keeps it on the host. For messages; open it with [`LayerStack::open`].
    pub host_path: PathBuf,
    /// Its metadata.
    pub metadata: Metadata,
}

impl Located {
    /// Returns the last component of the path.
    pub fn name(&self) -> &[u8] {
        super::split(&self.path).1
    }
}

/// What a visitor of [`LayerStack::walk`] wants next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Walk {
    /// Go on, into this directory.
    Continue,
    /// Go on, but not into this directory.
    Skip,
}

/// Layer folders, base first, seen as one tree.
///
/// Cheap to clone. The folders must not change while they are read, except for an upper layer between two steps.
#[derive(Clone, Debug, Default)]
pub struct LayerStack {
    layers: Arc<[Layer]>,
    overlay: Overlay,
}

#[derive(Debug)]
struct Layer {
    folder: PathBuf,
    root: OwnedFd,
}

/// A directory of the merged tree: which layers take part in it, topmost first.
#[derive(Clone, Debug)]
pub(super) struct MergedDir {
    pub(super) path: Vec<u8>,
    layers: Vec<usize>,
}

/// A merged directory with open descriptors, to look at its entries.
#[derive(Debug)]
pub(super) struct OpenDir {
    parts: Vec<(usize, OwnedFd)>,
}

/// An entry of a merged directory.
#[derive(Clone, Debug)]
pub(super) struct Child {
    pub(super) layer: usize,
    pub(super) metadata: Metadata,
    /// For directories: the layers that take part, topmost first.
    layers: Vec<usize>,
}

impl Child {
    /// Returns the merged directory at `path` if this is one.
    pub(super) fn directory(&self, path: &[u8]) -> Option<MergedDir> {
        self.metadata
            .is_directory()
            .then(|| MergedDir { path: path.to_vec(), layers: self.layers.clone() })
    }
}

impl LayerStack {
    /// Opens layer folders, base first.
    ///
    /// # Errors
    /// Fails if a folder is missing or is not a directory.
    pub fn open_folders<P: AsRef<Path>>(
        folders: impl IntoIterator<Item = P>,
        overlay: Overlay,
    ) -> Result<Self, LayerError> {
        let mut layers = Vec::new();
        for folder in folders {
            let folder = folder.as_ref().to_path_buf();
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let root = rustix::fs::open(&folder, flags, Mode::empty()).map_err(|error| {
                LayerError::storage(folder.as_os_str().as_bytes(), "open the layer folder", error)
            })?;
            layers.push(Layer { folder, root });
        }
        Ok(Self { layers: layers.into(), overlay })
    }

    /// Returns a stack without layers, whose tree is empty.
    pub fn empty() -> Self {
        Self::default()
    }

    /// Whether there is no layer.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Returns how many layers there are.
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Returns the folders, base first.
    pub fn folders(&self) -> impl Iterator<Item = &Path> {
        self.layers.iter().map(|layer| layer.folder.as_path())
    }

    /// Finds a path; leading, doubled and trailing slashes, `.` and `..` are allowed and never leave the root.
    ///
    /// # Errors
    /// Fails on more than 40 symbolic links or when the disk fails; an absent path is `Ok(None)`.
    pub fn lookup(&self, path: &[u8], follow: Follow) -> Result<Option<Located>, LayerError> {
        Ok(self.resolve(path, follow)?.map(|(path, child)| self.locate(path, &child)))
    }

    /// Returns the entries of a directory, sorted by name; links in `path` are followed.
    ///
    /// # Errors
    /// Fails if the path is absent or is not a directory, or when the disk fails.
    pub fn read_dir(&self, path: &[u8]) -> Result<Vec<Located>, LayerError> {
        let Some((resolved, child)) = self.resolve(path, Follow::All)? else {
            return Err(LayerError::new(
                LayerErrorKind::NotFound,
                show(path),
                "no such directory in the layers below",
            ));
        };
        let Some(directory) = child.directory(&resolved) else {
            return Err(LayerError::new(
                LayerErrorKind::NotFound,
                show(path),
                "is not a directory",
            ));
        };
        let entries = self.children(&directory)?;
        Ok(entries
            .into_iter()
            .map(|(name, child)| self.locate(join(&directory.path, &name), &child))
            .collect())
    }

    /// Visits everything below a directory (not the directory itself), parents before children, each directory in byte order.
    ///
    /// # Errors
    /// Fails as [`LayerStack::read_dir`] does, and with what the visitor returns.
    pub fn walk<E: From<LayerError>>(
        &self,
        path: &[u8],
        mut visitor: impl FnMut(&Located) -> Result<Walk, E>,
    ) -> Result<(), E> {
        let Some((resolved, child)) = self.resolve(path, Follow::All)? else {
            return Err(LayerError::new(
                LayerErrorKind::NotFound,
                show(path),
                "no such directory in the layers",
            )
            .into());
        };
        let Some(directory) = child.directory(&resolved) else {
            return Err(LayerError::new(
                LayerErrorKind::NotFound,
                show(path),
                "is not a directory",
            )
            .into());
        };
        // An explicit stack: image trees may be deeper than the thread's stack allows.
        let mut levels = vec![(directory.path.clone(), self.children(&directory)?.into_iter())];
        while let Some((parent, entries)) = levels.last_mut() {
            let Some((name, child)) = entries.next() else {
                levels.pop();
                continue;
            };
            let path = join(parent, &name);
            let wants = visitor(&self.locate(path.clone(), &child))?;
            if let (Walk::Continue, Some(directory)) = (wants, child.directory(&path)) {
                let entries = self.children(&directory)?.into_iter();
                levels.push((path, entries));
            }
        }
        Ok(())
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// Fails if it is not a regular file, or is gone.
    pub fn open(&self, located: &Located) -> Result<File, LayerError> {
        if located.metadata.kind != FileKind::File {
            return Err(LayerError::new(
                LayerErrorKind::Unsupported,
                show(&located.path),
                "is not a regular file",
            ));
        }
        let file = self.open_as(located, OFlags::RDONLY | OFlags::NONBLOCK)?;
        Ok(File::from(file))
    }

    /// Returns the text of a symbolic link.
    ///
    /// # Errors
    /// Fails if it is not a symbolic link, or is gone.
    pub fn read_link(&self, located: &Located) -> Result<Vec<u8>, LayerError> {
        let handle = self.open_as(located, OFlags::PATH)?;
        rustix::fs::readlinkat(&handle, "", Vec::new())
            .map(std::ffi::CString::into_bytes)
            .map_err(|error| LayerError::storage(&located.path, "read the symbolic link", error))
    }

    /// Returns the extended attributes of a file or directory, without overlayfs's own; other kinds have none.
    ///
    /// # Errors
    /// Fails when the disk does.
    pub fn xattrs(
        &self,
        located: &Located,
    ) -> Result<std::collections::BTreeMap<Vec<u8>, Vec<u8>>, LayerError> {
        if !matches!(located.metadata.kind, FileKind::File | FileKind::Directory) {
            return Ok(std::collections::BTreeMap::new());
        }
        let file = self.open_as(located, OFlags::RDONLY | OFlags::NONBLOCK)?;
        host::xattrs(file.as_fd()).map_err(|error| {
            LayerError::storage(&located.path, "read the extended attributes", error)
        })
    }

    fn open_as(&self, located: &Located, flags: OFlags) -> Result<OwnedFd, LayerError> {
        let layer = self.layers.get(located.layer).ok_or_else(|| {
            LayerError::new(
                LayerErrorKind::NotFound,
                show(&located.path),
                "was found in another stack of layers",
            )
        })?;
        host::open_beneath(layer.root.as_fd(), &located.path, flags)
            .map_err(|error| LayerError::storage(&located.path, "open", error))
    }

    pub(super) fn locate(&self, path: Vec<u8>, child: &Child) -> Located {
        let folder = &self.layers[child.layer].folder;
        let host_path = folder.join(std::ffi::OsStr::from_bytes(&path));
        Located { path, layer: child.layer, host_path, metadata: child.metadata }
    }

    /// Returns the merged root.
    pub(super) fn root(&self) -> Result<Option<Child>, LayerError> {
        let mut layers = Vec::new();
        for (index, layer) in self.layers.iter().enumerate().rev() {
            layers.push(index);
            if self
                .is_opaque(&layer.root)
                .map_err(|error| LayerError::storage(b"", "read the layer folder", error))?
            {
                break;
            }
        }
        let Some(&top) = layers.first() else { return Ok(None) };
        let metadata = host::stat_of(self.layers[top].root.as_fd())
            .map_err(|error| LayerError::storage(b"", "read the layer folder", error))?;
        Ok(Some(Child { layer: top, metadata, layers }))
    }

    /// Opens a merged directory.
    pub(super) fn enter(&self, directory: &MergedDir) -> Result<OpenDir, LayerError> {
        let mut parts = Vec::with_capacity(directory.layers.len());
        for &index in &directory.layers {
            let root = self.layers[index].root.as_fd();
            let part =
                host::open_beneath(root, &directory.path, OFlags::RDONLY | OFlags::DIRECTORY)
                    .map_err(|error| LayerError::storage(&directory.path, "open", error))?;
            parts.push((index, part));
        }
        Ok(OpenDir { parts })
    }

    /// Finds an entry of an open merged directory.
    pub(super) fn child(&self, directory: &OpenDir, name: &[u8]) -> Result<Option<Child>, Errno> {
        let mut found: Option<Child> = None;
        // A directory is there when some layer makes it, and not only says when something was in it last.
        let mut is_made = false;
        for (index, part) in &directory.parts {
            let Some(metadata) = host::stat_at(part.as_fd(), name)? else { continue };
            if !metadata.is_directory() {
                if found.is_none() && !metadata.is_whiteout() {
                    is_made = true;
                    found = Some(Child { layer: *index, metadata, layers: Vec::new() });
                }
                break;
            }
            found
                .get_or_insert_with(|| Child { layer: *index, metadata, layers: Vec::new() })
                .layers
                .push(*index);
            let handle = host::open_directory_at(part.as_fd(), name)?;
            if !is_made {
                let mark = self.overlay.unchanged();
                is_made = host::xattr(handle.as_fd(), mark.as_bytes())?.is_none();
            }
            if self.is_opaque(&handle)? {
                break;
            }
        }
        Ok(found.filter(|_| is_made))
    }

    /// Returns the entries of a merged directory, sorted by name.
    pub(super) fn children(
        &self,
        directory: &MergedDir,
    ) -> Result<Vec<(Vec<u8>, Child)>, LayerError> {
        let fail = |error| LayerError::storage(&directory.path, "read the directory", error);
        let open = self.enter(directory)?;
        let mut names = Vec::new();
        for (_, part) in &open.parts {
            names.append(&mut host::names(part.as_fd()).map_err(fail)?);
        }
        if open.parts.len() > 1 {
            names.sort_unstable();
            names.dedup();
        }
        let mut children = Vec::with_capacity(names.len());
        for name in names {
            if let Some(child) = self.child(&open, &name).map_err(fail)? {
                children.push((name, child));
            }
        }
        Ok(children)
    }

    fn is_opaque(&self, directory: &OwnedFd) -> Result<bool, Errno> {
        Ok(host::xattr(directory.as_fd(), self.overlay.opaque().as_bytes())?.as_deref()
            == Some(b"y"))
    }

    /// Walks a path component by component.
    pub(super) fn resolve(
        &self,
        path: &[u8],
        follow: Follow,
    ) -> Result<Option<(Vec<u8>, Child)>, LayerError> {
        let Some(root) = self.root()? else { return Ok(None) };
        // Directories from the root to where the walk is; ".." pops.
        let mut trail: Vec<(Vec<u8>, Child)> = vec![(Vec::new(), root)];
        let mut pending: Vec<Vec<u8>> = components(path);
        let mut links = 0;
        while let Some(name) = pending.pop() {
            if name == b".." {
                if trail.len() > 1 {
                    trail.pop();
                }
                continue;
            }
            let Some((parent, here)) = trail.last() else { return Ok(None) };
            let Some(directory) = here.directory(parent) else { return Ok(None) };
            let open = self.enter(&directory)?;
            let path = join(parent, &name);
            let found = self
                .child(&open, &name)
                .map_err(|error| LayerError::storage(&path, "look up", error))?;
            let Some(child) = found else { return Ok(None) };
            let follows = match follow {
                Follow::All => true,
                Follow::Parents => !pending.is_empty(),
                Follow::None => false,
            };
            if child.metadata.kind != FileKind::Symlink || !follows {
                trail.push((path, child));
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(LayerError::new(
                    LayerErrorKind::NotFound,
                    show(&path),
                    "leads through too many symbolic links",
                ));
            }
            let target = self.read_link(&self.locate(path, &child))?;
            if target.first() == Some(&b'/') {
                trail.truncate(1);
            }
            pending.append(&mut components(&target));
        }
        Ok(trail.pop())
    }
}

/// Returns the components of a path, last first, without empty ones and `.`.
pub(super) fn components(path: &[u8]) -> Vec<Vec<u8>> {
    let parts = path.split(|&b| b == b'/').filter(|part| !part.is_empty() && *part != b".");
    parts.rev().map(<[u8]>::to_vec).collect()
}

/// Whether overlayfs gives this attribute a meaning, in either flavour.
pub(super) fn is_overlay_xattr(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
}
