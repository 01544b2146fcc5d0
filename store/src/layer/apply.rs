//! From an archive to a layer folder.
//!
//! The folder takes the form overlayfs wants: whiteouts become character devices 0:0, opaque marks an attribute. What the archive
//! says is never trusted: each operation is relative to an open directory inside the folder, symbolic links in the
//! middle of a path are resolved as inside the image, and overlayfs attributes that an archive carries are dropped.

mod name;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, XattrFlags};
use rustix::io::Errno;

use self::name::{Target, classify, clean};
use super::reader::{Fragment, TarReader};
use super::stack::{FileKind, Follow, Metadata, components, is_overlay_xattr};
use super::tar::{Entry, EntryKind};
use super::{LayerError, LayerErrorKind, LayerStack, Overlay, host, join, show, split};

/// Read-ahead on the archive, and the copy buffer for file content.
const BUFFER: usize = 256 * 1024;
/// How many directories on the way to the current one are kept open.
const OPEN_PARENTS: usize = 32;
/// The most symbolic links on the way to one entry, as in the kernel.
const MAX_LINKS: usize = 40;
/// The latest time whose nanoseconds fit 63 bits, in the year 2262; later ones overflow in other tools.
const MAX_SECONDS: i64 = i64::MAX / 1_000_000_000;

/// How to unpack.
#[derive(Clone, Copy, Debug)]
pub struct ApplyOptions<'a> {
    /// Which attributes mark opaque directories.
    pub overlay: Overlay,
    /// The layers below, needed for hard links to their files and for the attributes of directories that the archive does not
    /// list. With `None` such a layer fails with [`LayerErrorKind::NeedsLower`]; empty the folder and try again with the layers.
    pub lower: Option<&'a LayerStack>,
    /// Whether devices, owners and all extended attributes must be set. Without, devices are skipped and the rest is tried.
    pub privileged: bool,
}

impl Default for ApplyOptions<'_> {
    fn default() -> Self {
        Self { overlay: Overlay::default(), lower: None, privileged: true }
    }
}

/// What was unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ApplyStats {
    /// Entries in the archive, whiteouts included.
    pub entries: u64,
    /// Bytes of file content.
    pub content_bytes: u64,
    /// Hard links to files of lower layers; each such file was copied into this folder.
    pub links_to_lower: u64,
    /// Directories made because an entry lies in them and the archive does not list them first.
    pub implied_directories: u64,
    /// Whether the archive hides everything below it. overlayfs knows no opaque root: leave the lower layers out of the mount.
    pub opaque_root: bool,
    /// Devices that could not, or must not, be made.
    pub skipped_devices: u64,
    /// Extended attributes the file system or the lack of privileges kept out.
    pub skipped_xattrs: u64,
    /// Entries whose owner could not be set.
    pub skipped_owners: u64,
}

/// Unpacks an uncompressed archive into an empty folder.
///
/// The archive is read to its very end, so that a hash over it covers what follows the end mark. Nothing is synced to disk. On
/// failure the folder is left half-filled, for the caller to remove.
///
/// # Errors
/// `InvalidArchive` if the archive breaks a rule, `NeedsLower` as [`ApplyOptions::lower`] says, `Storage` or `Stream` if the disk or
/// the archive's source fails.
pub fn apply(
    tar: &mut dyn Read,
    folder: &Path,
    options: &ApplyOptions<'_>,
) -> Result<ApplyStats, LayerError> {
    apply_noting_implied(tar, folder, options).map(|(stats, _)| stats)
}

/// Like [`apply`]; also returns which directories are there only because an entry lies in them, by resolved path.
pub(crate) fn apply_noting_implied(
    tar: &mut dyn Read,
    folder: &Path,
    options: &ApplyOptions<'_>,
) -> Result<(ApplyStats, BTreeSet<Vec<u8>>), LayerError> {
    let root = rustix::fs::open(
        folder,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| {
        LayerError::storage(folder.as_os_str().as_bytes(), "open the layer folder", error)
    })?;
    let mut applier = Applier {
        root: Rc::new(root),
        options: *options,
        parents: Vec::new(),
        directories: BTreeMap::new(),
        opaque: BTreeSet::new(),
        implied: BTreeSet::new(),
        buffer: vec![0; BUFFER],
        stats: ApplyStats::default(),
    };
    let mut reader = TarReader::new(BufReader::with_capacity(BUFFER, tar));
    while let Some(entry) = reader.next_entry()? {
        applier.stats.entries += 1;
        applier.entry(&entry, &mut reader)?;
    }
    applier.finish()
}

struct Applier<'a> {
    root: Rc<OwnedFd>,
    options: ApplyOptions<'a>,
    /// Open directories, each inside the one before it. Archives list a directory's entries together, so mostly the last one serves.
    parents: Vec<Parent>,
    /// Mode and time of each directory, by resolved path; set at the end because entries inside change the time.
    directories: BTreeMap<Vec<u8>, (u32, i64)>,
    /// Opaque directories, by resolved path. The folder starts empty, so these are all.
    opaque: BTreeSet<Vec<u8>>,
    /// Directories that the archive has not listed so far, by resolved path.
    implied: BTreeSet<Vec<u8>>,
    buffer: Vec<u8>,
    stats: ApplyStats,
}

/// An open directory of the folder.
#[derive(Clone)]
struct Parent {
    /// The path as the archive spells it.
    spelled: Vec<u8>,
    /// The path without symbolic links.
    resolved: Vec<u8>,
    handle: Rc<OwnedFd>,
}

impl Parent {
    fn fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

/// The attributes of a directory below, for one that this layer implies.
type Model = (Metadata, BTreeMap<Vec<u8>, Vec<u8>>);

impl<'a> Applier<'a> {
    fn entry<R: Read>(
        &mut self,
        entry: &Entry,
        reader: &mut TarReader<R>,
    ) -> Result<(), LayerError> {
        let path = clean(&entry.path)?;
        match classify(&path)? {
            Target::Ignored => Ok(()),
            Target::Root => self.root_entry(entry),
            Target::Opaque(directory) => {
                let directory = self.parent(directory)?;
                self.mark_opaque(directory.fd(), &directory.resolved)
            }
            Target::Whiteout { parent, name } => self.whiteout(parent, name),
            Target::Path(path) => self.create(path, entry, reader),
        }
    }

    /// An entry named `./`: the attributes of the root directory.
    fn root_entry(&mut self, entry: &Entry) -> Result<(), LayerError> {
        if entry.kind != EntryKind::Directory {
            return Err(LayerError::invalid(&entry.path, "the root can only be a directory"));
        }
        let owner = rustix::fs::fchown(
            &*self.root,
            Some(Uid::from_raw(entry.uid)),
            Some(Gid::from_raw(entry.gid)),
        );
        self.owner_result(owner, entry)?;
        let root = Rc::clone(&self.root);
        self.set_xattrs(entry, &entry.xattrs, |key, value| {
            rustix::fs::fsetxattr(&*root, key, value, XattrFlags::empty())
        })?;
        self.directories.insert(Vec::new(), (entry.mode, entry.mtime_seconds));
        Ok(())
    }

    fn whiteout(&mut self, parent: &[u8], name: &[u8]) -> Result<(), LayerError> {
        let parent = self.parent(parent)?;
        let path = join(&parent.resolved, name);
        let made =
            rustix::fs::mknodat(parent.fd(), name, FileType::CharacterDevice, Mode::empty(), 0);
        match made {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => {
                let existing = host::stat_at(parent.fd(), name)
                    .map_err(|e| LayerError::storage(&path, "look up", e))?;
                // A whiteout speaks of lower layers only: what this layer has stays, and merely stops merging.
                if existing.is_some_and(|metadata| metadata.is_directory()) {
                    let handle = self.open_child(&parent, name, &path)?;
                    self.mark_opaque(handle.as_fd(), &path)?;
                }
                Ok(())
            }
            Err(error) => Err(LayerError::storage(&path, "make the whiteout", error)),
        }
    }

    fn mark_opaque(&mut self, directory: BorrowedFd<'_>, path: &[u8]) -> Result<(), LayerError> {
        let handle = format!("/proc/self/fd/{}", directory.as_raw_fd());
        rustix::fs::setxattr(handle, self.options.overlay.opaque(), b"y", XattrFlags::empty())
            .map_err(|error| LayerError::storage(path, "mark as opaque", error))?;
        self.opaque.insert(path.to_vec());
        self.stats.opaque_root |= path.is_empty();
        Ok(())
    }

    fn create<R: Read>(
        &mut self,
        path: &[u8],
        entry: &Entry,
        reader: &mut TarReader<R>,
    ) -> Result<(), LayerError> {
        let (parent, name) = split(path);
        let parent = self.parent(parent)?;
        let resolved = join(&parent.resolved, name);
        match &entry.kind {
            EntryKind::Directory => self.directory(&parent, name, &resolved, entry),
            EntryKind::File { size } => {
                let file = self
                    .replacing(&parent, name, &resolved, |parent| create_file(parent.fd(), name))?;
                self.fill_file(File::from(file), *size, entry, reader)
            }
            EntryKind::Symlink { target } => {
                if target.is_empty() || target.contains(&0) {
                    return Err(LayerError::invalid(
                        &entry.path,
                        "its symbolic link has no valid target",
                    ));
                }
                self.replacing(&parent, name, &resolved, |parent| {
                    rustix::fs::symlinkat(target.as_slice(), parent.fd(), name)
                })?;
                self.attributes_at(&parent, name, entry, false)
            }
            EntryKind::HardLink { target } => {
                self.hard_link(&parent, name, &resolved, target, entry)
            }
            EntryKind::CharDevice { major: 0, minor: 0 } => {
                // It would read as a whiteout, and hide files that the image has.
                self.skip_device(entry);
                Ok(())
            }
            EntryKind::CharDevice { major, minor } => self.node(
                &parent,
                name,
                &resolved,
                FileType::CharacterDevice,
                (*major, *minor),
                entry,
            ),
            EntryKind::BlockDevice { major, minor } => {
                self.node(&parent, name, &resolved, FileType::BlockDevice, (*major, *minor), entry)
            }
            EntryKind::Fifo => self.node(&parent, name, &resolved, FileType::Fifo, (0, 0), entry),
        }
    }

    fn directory(
        &mut self,
        parent: &Parent,
        name: &[u8],
        path: &[u8],
        entry: &Entry,
    ) -> Result<(), LayerError> {
        let fail = |error| LayerError::storage(path, "create the directory", error);
        if let Err(error) = rustix::fs::mkdirat(parent.fd(), name, Mode::RWXU) {
            if error != Errno::EXIST {
                return Err(fail(error));
            }
            let existing = host::stat_at(parent.fd(), name).map_err(fail)?;
            if existing.is_some_and(|metadata| metadata.is_directory()) {
                let handle = self.open_child(parent, name, path)?;
                clear_xattrs(&handle).map_err(fail)?;
            } else {
                // What stood here hid lower layers' directories of this name; that must not change.
                self.remove(parent, name, path)?;
                rustix::fs::mkdirat(parent.fd(), name, Mode::RWXU).map_err(fail)?;
                let handle = self.open_child(parent, name, path)?;
                self.mark_opaque(handle.as_fd(), path)?;
            }
        }
        self.owner_at(parent, name, entry)?;
        self.set_xattrs(entry, &entry.xattrs, |key, value| {
            host::set_xattr_at(parent.fd(), name, key, value)
        })?;
        self.directories.insert(path.to_vec(), (entry.mode, entry.mtime_seconds));
        self.implied.remove(path);
        Ok(())
    }

    fn fill_file<R: Read>(
        &mut self,
        mut file: File,
        size: u64,
        entry: &Entry,
        reader: &mut TarReader<R>,
    ) -> Result<(), LayerError> {
        if let Some(fragments) = reader.fragments() {
            let fragments = fragments.to_vec();
            rustix::fs::ftruncate(&file, size)
                .map_err(|error| LayerError::storage(&entry.path, "size the file", error))?;
            for Fragment { offset, length } in fragments {
                file.seek(SeekFrom::Start(offset))
                    .map_err(|error| LayerError::storage(&entry.path, "write", error))?;
                self.copy(&mut file, length, entry, reader)?;
            }
        } else {
            self.copy(&mut file, size, entry, reader)?;
        }
        // The order matters: changing the owner clears set-id bits and capabilities.
        let owner = rustix::fs::fchown(
            &file,
            Some(Uid::from_raw(entry.uid)),
            Some(Gid::from_raw(entry.gid)),
        );
        self.owner_result(owner, entry)?;
        self.set_xattrs(entry, &entry.xattrs, |key, value| {
            rustix::fs::fsetxattr(&file, key, value, XattrFlags::empty())
        })?;
        rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode))
            .and_then(|()| rustix::fs::futimens(&file, &host::times(clamp(entry.mtime_seconds), 0)))
            .map_err(|error| LayerError::storage(&entry.path, "set the mode and time", error))
    }

    fn copy<R: Read>(
        &mut self,
        file: &mut File,
        length: u64,
        entry: &Entry,
        reader: &mut TarReader<R>,
    ) -> Result<(), LayerError> {
        let mut remaining = length;
        while remaining > 0 {
            let want = usize::try_from(remaining).unwrap_or(BUFFER).min(BUFFER);
            let count = match reader.read(&mut self.buffer[..want]) {
                Ok(0) => {
                    return Err(LayerError::invalid(
                        &entry.path,
                        "its content is shorter than its size",
                    ));
                }
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                    return Err(LayerError::invalid(&entry.path, "the archive is cut short"));
                }
                Err(error) => {
                    return Err(LayerError::stream(&entry.path, "read the layer archive", error));
                }
            };
            file.write_all(&self.buffer[..count])
                .map_err(|error| LayerError::storage(&entry.path, "write", error))?;
            remaining -= count as u64;
            self.stats.content_bytes += count as u64;
        }
        Ok(())
    }

    fn hard_link(
        &mut self,
        parent: &Parent,
        name: &[u8],
        path: &[u8],
        target: &[u8],
        entry: &Entry,
    ) -> Result<(), LayerError> {
        let target = clean(target)?;
        if !matches!(classify(&target)?, Target::Path(_)) {
            return Err(LayerError::invalid(
                &entry.path,
                "its hard link target cannot be part of an image",
            ));
        }
        let (target_parent, target_name) = split(&target);
        let source = self.parent(target_parent)?;
        let source_path = join(&source.resolved, target_name);
        if source_path == path {
            return Ok(());
        }
        let fail = |error| LayerError::storage(path, "create the hard link", error);
        match host::stat_at(source.fd(), target_name).map_err(fail)? {
            Some(metadata) if metadata.is_directory() || metadata.is_whiteout() => {
                return Err(LayerError::invalid(
                    &entry.path,
                    "its hard link target is a directory or was removed",
                ));
            }
            Some(_) => {}
            None => self.copy_up(&source, target_name, &source_path, entry)?,
        }
        self.replacing(parent, name, path, |parent| {
            rustix::fs::linkat(source.fd(), target_name, parent.fd(), name, AtFlags::empty())
        })
    }

    /// Copies a file of a lower layer into the folder, so that it can be linked to.
    fn copy_up(
        &mut self,
        parent: &Parent,
        name: &[u8],
        path: &[u8],
        entry: &Entry,
    ) -> Result<(), LayerError> {
        let missing = || LayerError::invalid(&entry.path, "its hard link target does not exist");
        if self.is_hidden(&parent.resolved) {
            return Err(missing());
        }
        let lower = self.lower(path)?;
        let located = lower.lookup(path, Follow::None)?.ok_or_else(missing)?;
        let Metadata { mode, uid, gid, size, mtime_seconds, device: (major, minor), .. } =
            located.metadata;
        self.stats.links_to_lower += 1;
        let mut copy = Entry::new(path, EntryKind::Fifo, mode);
        (copy.uid, copy.gid, copy.mtime_seconds) = (uid, gid, mtime_seconds);
        copy.xattrs = lower.xattrs(&located)?;
        match located.metadata.kind {
            FileKind::File => {
                let fail = |error| LayerError::storage(path, "create", error);
                let file = File::from(create_file(parent.fd(), name).map_err(fail)?);
                let mut content = lower.open(&located)?;
                let copied = std::io::copy(&mut content, &mut &file)
                    .map_err(|error| LayerError::storage(path, "copy from a lower layer", error))?;
                if copied != size {
                    return Err(LayerError::new(
                        LayerErrorKind::Storage,
                        show(path),
                        "a lower layer changed while it was read",
                    ));
                }
            }
            FileKind::Symlink => {
                let target = lower.read_link(&located)?;
                rustix::fs::symlinkat(target, parent.fd(), name).map_err(|error| {
                    LayerError::storage(path, "create the symbolic link", error)
                })?;
                return self.attributes_at(parent, name, &copy, false);
            }
            FileKind::CharDevice => {
                return self.node(
                    parent,
                    name,
                    path,
                    FileType::CharacterDevice,
                    (major, minor),
                    &copy,
                );
            }
            FileKind::BlockDevice => {
                return self.node(parent, name, path, FileType::BlockDevice, (major, minor), &copy);
            }
            FileKind::Fifo => return self.node(parent, name, path, FileType::Fifo, (0, 0), &copy),
            FileKind::Directory | FileKind::Socket => {
                return Err(LayerError::invalid(
                    &entry.path,
                    "its hard link target is a directory",
                ));
            }
        }
        self.attributes_at(parent, name, &copy, true)
    }

    fn node(
        &mut self,
        parent: &Parent,
        name: &[u8],
        path: &[u8],
        kind: FileType,
        (major, minor): (u32, u32),
        entry: &Entry,
    ) -> Result<(), LayerError> {
        let is_device = kind != FileType::Fifo;
        if is_device && !self.options.privileged {
            self.skip_device(entry);
            return Ok(());
        }
        let device = if is_device { rustix::fs::makedev(major, minor) } else { 0 };
        self.replacing(parent, name, path, |parent| {
            rustix::fs::mknodat(parent.fd(), name, kind, Mode::RUSR | Mode::WUSR, device)
        })?;
        self.attributes_at(parent, name, entry, true)
    }

    fn skip_device(&mut self, entry: &Entry) {
        tracing::debug!(path = %entry.path.escape_ascii(), "device of a layer was not made");
        self.stats.skipped_devices += 1;
    }

    /// Runs a creating call, removing what stands in its way.
    fn replacing<T>(
        &mut self,
        parent: &Parent,
        name: &[u8],
        path: &[u8],
        create: impl Fn(&Parent) -> Result<T, Errno>,
    ) -> Result<T, LayerError> {
        let made = match create(parent) {
            Err(Errno::EXIST) => {
                self.remove(parent, name, path)?;
                create(parent)
            }
            other => other,
        };
        made.map_err(|error| LayerError::storage(path, "create", error))
    }

    fn remove(&mut self, parent: &Parent, name: &[u8], path: &[u8]) -> Result<(), LayerError> {
        host::remove_all(parent.fd(), name)
            .map_err(|error| LayerError::storage(path, "replace", error))?;
        // The open directories may be below what is gone.
        self.parents.clear();
        let is_gone = |other: &Vec<u8>| {
            other.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
        };
        self.directories.retain(|other, _| !is_gone(other));
        self.opaque.retain(|other| !is_gone(other));
        self.implied.retain(|other| !is_gone(other));
        Ok(())
    }

    /// Sets owner, attributes, mode and time of something that is not open.
    fn attributes_at(
        &mut self,
        parent: &Parent,
        name: &[u8],
        entry: &Entry,
        has_mode: bool,
    ) -> Result<(), LayerError> {
        self.owner_at(parent, name, entry)?;
        self.set_xattrs(entry, &entry.xattrs, |key, value| {
            host::set_xattr_at(parent.fd(), name, key, value)
        })?;
        let fail = |error| LayerError::storage(&entry.path, "set the mode and time", error);
        if has_mode {
            // Only for what was just created here and is no symbolic link, which chmod would follow.
            rustix::fs::chmodat(
                parent.fd(),
                name,
                Mode::from_raw_mode(entry.mode),
                AtFlags::empty(),
            )
            .map_err(fail)?;
        }
        let times = host::times(clamp(entry.mtime_seconds), 0);
        rustix::fs::utimensat(parent.fd(), name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(fail)
    }

    fn owner_at(&mut self, parent: &Parent, name: &[u8], entry: &Entry) -> Result<(), LayerError> {
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        let owner =
            rustix::fs::chownat(parent.fd(), name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW);
        self.owner_result(owner, entry)
    }

    fn owner_result(&mut self, result: Result<(), Errno>, entry: &Entry) -> Result<(), LayerError> {
        match result {
            Ok(()) => Ok(()),
            Err(Errno::PERM | Errno::INVAL) if !self.options.privileged => {
                self.stats.skipped_owners += 1;
                Ok(())
            }
            Err(error) => {
                let operation = format!(
                    "set the owner {}:{} (in a user namespace, /etc/subuid and /etc/subgid must cover it)",
                    entry.uid, entry.gid
                );
                Err(LayerError::storage(&entry.path, &operation, error))
            }
        }
    }

    fn set_xattrs(
        &mut self,
        entry: &Entry,
        xattrs: &BTreeMap<Vec<u8>, Vec<u8>>,
        set: impl Fn(&[u8], &[u8]) -> Result<(), Errno>,
    ) -> Result<(), LayerError> {
        for (key, value) in xattrs {
            if !is_wanted_xattr(key) {
                continue;
            }
            match set(key, value) {
                Ok(()) => {}
                // Losing a capability would break a program in silence; any other attribute is best effort, as elsewhere.
                Err(Errno::PERM | Errno::ACCESS)
                    if !self.options.privileged || key.as_slice() != b"security.capability" =>
                {
                    self.stats.skipped_xattrs += 1;
                }
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.stats.skipped_xattrs += 1,
                Err(error) => {
                    let operation = format!("set the extended attribute {}", key.escape_ascii());
                    return Err(LayerError::storage(&entry.path, &operation, error));
                }
            }
        }
        Ok(())
    }

    fn lower(&self, path: &[u8]) -> Result<&'a LayerStack, LayerError> {
        self.options.lower.ok_or_else(|| {
            LayerError::new(
                LayerErrorKind::NeedsLower,
                show(path),
                "depends on the layers below, which were not given",
            )
        })
    }

    /// Whether an opaque directory keeps lower layers out of this directory.
    fn is_hidden(&self, directory: &[u8]) -> bool {
        let mut path = directory;
        while !self.opaque.contains(path) {
            if path.is_empty() {
                return false;
            }
            path = split(path).0;
        }
        true
    }

    fn open_child(&self, parent: &Parent, name: &[u8], path: &[u8]) -> Result<OwnedFd, LayerError> {
        host::open_directory_at(parent.fd(), name)
            .map_err(|error| LayerError::storage(path, "open", error))
    }

    /// Opens a directory, given as the archive spells it, making what is missing.
    fn parent(&mut self, spelled: &[u8]) -> Result<Parent, LayerError> {
        let is_inside = |outer: &[u8]| {
            spelled.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
        };
        while self.parents.last().is_some_and(|last| !is_inside(&last.spelled)) {
            self.parents.pop();
        }
        let mut here = self.parents.last().cloned().unwrap_or_else(|| Parent {
            spelled: Vec::new(),
            resolved: Vec::new(),
            handle: Rc::clone(&self.root),
        });
        let rest = &spelled[here.spelled.len()..];
        for name in rest.split(|&b| b == b'/').filter(|name| !name.is_empty()) {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            here = match rustix::fs::openat(here.fd(), name, flags, Mode::empty()) {
                Ok(handle) => Parent {
                    spelled: join(&here.spelled, name),
                    resolved: join(&here.resolved, name),
                    handle: Rc::new(handle),
                },
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {
                    let resolved = self.make_path(spelled)?;
                    let handle = host::open_beneath(
                        self.root.as_fd(),
                        &resolved,
                        OFlags::PATH | OFlags::DIRECTORY,
                    )
                    .map_err(|error| LayerError::storage(&resolved, "open", error))?;
                    let parent =
                        Parent { spelled: spelled.to_vec(), resolved, handle: Rc::new(handle) };
                    self.remember(parent.clone());
                    return Ok(parent);
                }
                Err(error) => return Err(LayerError::storage(spelled, "open", error)),
            };
            self.remember(here.clone());
        }
        Ok(here)
    }

    fn remember(&mut self, parent: Parent) {
        if self.parents.len() == OPEN_PARENTS {
            self.parents.remove(0);
        }
        self.parents.push(parent);
    }

    /// Resolves a directory in this folder laid over the lower layers, creates it in the folder, and returns its real path.
    fn make_path(&mut self, spelled: &[u8]) -> Result<Vec<u8>, LayerError> {
        let mut path: Vec<u8> = Vec::new();
        let mut pending: Vec<Vec<u8>> = components(spelled);
        let mut links = 0;
        while let Some(name) = pending.pop() {
            if name == b".." {
                path.truncate(split(&path).0.len());
                continue;
            }
            let next = join(&path, &name);
            let fail = |error| LayerError::storage(&next, "look up", error);
            let directory =
                host::open_beneath(self.root.as_fd(), &path, OFlags::PATH | OFlags::DIRECTORY)
                    .map_err(fail)?;
            let parent =
                Parent { spelled: Vec::new(), resolved: path.clone(), handle: Rc::new(directory) };
            let link = match host::stat_at(parent.fd(), &name).map_err(fail)? {
                Some(metadata) if metadata.is_directory() => None,
                Some(metadata) if metadata.kind == FileKind::Symlink => Some(
                    rustix::fs::readlinkat(parent.fd(), name.as_slice(), Vec::new())
                        .map_err(fail)?
                        .into_bytes(),
                ),
                Some(metadata) if metadata.is_whiteout() => {
                    self.remove(&parent, &name, &next)?;
                    self.imply(&parent, &name, &next, None)?;
                    let handle = self.open_child(&parent, &name, &next)?;
                    self.mark_opaque(handle.as_fd(), &next)?;
                    None
                }
                Some(_) => {
                    return Err(LayerError::invalid(
                        spelled,
                        format!("{} is not a directory", show(&next)),
                    ));
                }
                None if self.is_hidden(&path) => {
                    self.imply(&parent, &name, &next, None)?;
                    None
                }
                None => {
                    let lower = self.lower(spelled)?;
                    let below = lower.lookup(&next, Follow::None)?;
                    match below {
                        Some(located) if located.metadata.kind == FileKind::Symlink => {
                            Some(lower.read_link(&located)?)
                        }
                        below => {
                            let model = below.filter(|located| located.metadata.is_directory());
                            let xattrs =
                                model.as_ref().map(|located| lower.xattrs(located)).transpose()?;
                            self.imply(
                                &parent,
                                &name,
                                &next,
                                model.map(|m| m.metadata).zip(xattrs),
                            )?;
                            None
                        }
                    }
                }
            };
            let Some(target) = link else {
                path = next;
                continue;
            };
            links += 1;
            if links > MAX_LINKS {
                return Err(LayerError::invalid(
                    spelled,
                    "it leads through too many symbolic links",
                ));
            }
            if target.first() == Some(&b'/') {
                path.clear();
            }
            pending.append(&mut components(&target));
        }
        Ok(path)
    }

    /// Makes a directory the archive does not list, like the one below if there is one.
    fn imply(
        &mut self,
        parent: &Parent,
        name: &[u8],
        path: &[u8],
        model: Option<Model>,
    ) -> Result<(), LayerError> {
        let mut entry = Entry::new(path, EntryKind::Directory, 0o755);
        if let Some((metadata, xattrs)) = model {
            (entry.mode, entry.uid, entry.gid) = (metadata.mode, metadata.uid, metadata.gid);
            entry.mtime_seconds = metadata.mtime_seconds;
            entry.xattrs = xattrs;
        }
        self.stats.implied_directories += 1;
        self.directory(parent, name, path, &entry)?;
        self.implied.insert(path.to_vec());
        Ok(())
    }

    fn finish(self) -> Result<(ApplyStats, BTreeSet<Vec<u8>>), LayerError> {
        // Backwards: children before parents, so that a mode without permissions locks nobody out.
        for (path, (mode, mtime_seconds)) in self.directories.iter().rev() {
            let fail = |error| LayerError::storage(path, "set the mode and time", error);
            let directory =
                host::open_beneath(self.root.as_fd(), path, OFlags::RDONLY | OFlags::DIRECTORY)
                    .map_err(fail)?;
            rustix::fs::fchmod(&directory, Mode::from_raw_mode(*mode)).map_err(fail)?;
            rustix::fs::futimens(&directory, &host::times(clamp(*mtime_seconds), 0))
                .map_err(fail)?;
        }
        Ok((self.stats, self.implied))
    }
}

fn create_file(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)
}

/// Removes all attributes but overlayfs's.
fn clear_xattrs(directory: &OwnedFd) -> Result<(), Errno> {
    for name in host::xattr_names(directory.as_fd())? {
        if is_wanted_xattr(&name) {
            match rustix::fs::fremovexattr(directory, name.as_slice()) {
                Ok(()) | Err(Errno::NODATA | Errno::PERM | Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Whether an attribute of an archive may be set: overlayfs's own would redirect or hide files, labels of security modules
/// and NFS belong to the host they come from.
fn is_wanted_xattr(name: &[u8]) -> bool {
    !is_overlay_xattr(name)
        && !matches!(name, b"security.selinux" | b"security.nfs4_acl" | b"system.nfs4_acl")
        && !name.is_empty()
        && !name.contains(&0)
}

fn clamp(seconds: i64) -> i64 {
    seconds.clamp(0, MAX_SECONDS)
}
