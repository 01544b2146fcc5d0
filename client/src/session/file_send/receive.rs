//! Takes entries and contents that a daemon sends, and puts them into a folder.
//!
//! Nothing that a daemon says leads outside of the folder: paths are checked, entries come in the order of a walk, and
//! each is made relative to a directory that was opened without following any link. A link that stands in the way of a
//! directory is replaced. Files get their names when they are complete.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType as NodeType, Mode, OFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;
use slipway_spec::wire::fsutil::packet::PacketType;
use slipway_spec::wire::fsutil::{Packet, Stat};
use slipway_store::tree::split;
use slipway_store::{Error, ErrorKind};
use slipway_transport::packet::{self, FileType, permissions, reason, show};
use tokio::sync::mpsc;
use tonic::Status;

/// Files that are asked for and written at the same time.
pub(super) const OPEN_FILES: usize = 32;

/// A result with more entries is none.
const MAX_ENTRIES: u32 = 8_000_000;

/// Paths and links may have this many bytes, as in Linux.
const MAX_PATH: usize = 4096;

/// Receives until the daemon has said that it is done. Blocks.
///
/// # Errors
/// When the daemon fails or breaks a rule of the protocol, or the folder cannot be written.
pub(super) fn receive(
    folder: &Path,
    mut incoming: mpsc::Receiver<Result<Packet, Status>>,
    outgoing: &mpsc::Sender<Packet>,
) -> Result<(), Error> {
    let failed = |error: io::Error| Error::io(format!("cannot write {}", folder.display()), error);
    std::fs::create_dir_all(folder).map_err(failed)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(folder, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
    let mut receiver = Receiver::new(folder, root);
    let mut finished = false;
    while let Some(packet) = incoming.blocking_recv() {
        let packet = packet.map_err(|status| {
            let what = format!("the builder cannot send the files: {}", status.message());
            Error::new(ErrorKind::Io, what)
        })?;
        let kind = PacketType::try_from(packet.r#type);
        match kind {
            Ok(PacketType::PacketErr) => {
                let what = format!("error from sender: {}", reason(&packet.data));
                return Err(Error::new(ErrorKind::Io, what));
            }
            Ok(PacketType::PacketFin) if finished => return Ok(()),
            Ok(PacketType::PacketStat) if !finished => receiver.announced(packet.stat)?,
            Ok(PacketType::PacketData) if !finished => receiver.data(packet.id, &packet.data)?,
            Ok(other) => {
                let what = format!("the builder sent {} out of turn", other.as_str_name());
                return Err(Error::new(ErrorKind::Invalid, what));
            }
            Err(_) => {
                let what = format!("the builder sent a packet of unknown type {}", packet.r#type);
                return Err(Error::new(ErrorKind::Invalid, what));
            }
        }
        let gone = |_| Error::new(ErrorKind::Io, "the builder ended the transfer early");
        while let Some(id) = receiver.next_request() {
            outgoing.blocking_send(packet::request(id)).map_err(gone)?;
        }
        if !finished && receiver.is_complete() {
            receiver.finish()?;
            outgoing.blocking_send(packet::finish()).map_err(gone)?;
            finished = true;
        }
    }
    Err(Error::new(ErrorKind::Io, "the builder ended the transfer early"))
}

/// A file that is wanted, or on its way.
struct Wanted {
    path: Vec<u8>,
    stat: Stat,
    partial: Option<Partial>,
}

/// A file without its name. Dropping it removes it.
struct Partial {
    parent: OwnedFd,
    name: String,
    file: File,
    written: u64,
    complete: bool,
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.complete {
            // There is nobody left to tell if even that fails.
            let _gone = rustix::fs::unlinkat(&self.parent, &self.name, AtFlags::empty());
        }
    }
}

struct Receiver<'a> {
    folder: &'a Path,
    root: OwnedFd,
    /// The place of the next entry in the list.
    next: u32,
    /// The last path, with separators that sort before all else: what comes must be greater.
    last: Vec<u8>,
    /// The directories on the way to the last entry.
    trail: Vec<Vec<u8>>,
    /// The directory that was opened last.
    parent: Option<(Vec<u8>, OwnedFd)>,
    waiting: VecDeque<u32>,
    wanted: HashMap<u32, Wanted>,
    asked: HashSet<u32>,
    files: HashSet<Vec<u8>>,
    links: Vec<(Vec<u8>, Vec<u8>)>,
    directories: Vec<(Vec<u8>, Stat)>,
    listed: bool,
}

fn invalid(text: String) -> Error {
    Error::new(ErrorKind::Invalid, text)
}

impl<'a> Receiver<'a> {
    fn new(folder: &'a Path, root: OwnedFd) -> Self {
        Self {
            folder,
            root,
            next: 0,
            last: vec![],
            trail: vec![],
            parent: None,
            waiting: VecDeque::new(),
            wanted: HashMap::new(),
            asked: HashSet::new(),
            files: HashSet::new(),
            links: vec![],
            directories: vec![],
            listed: false,
        }
    }

    fn failed(&self, path: &[u8], error: impl Into<io::Error>) -> Error {
        let what = format!("cannot write {} in {}", show(path), self.folder.display());
        Error::io(what, error.into())
    }

    fn is_complete(&self) -> bool {
        self.listed && self.wanted.is_empty()
    }

    fn next_request(&mut self) -> Option<u32> {
        if self.asked.len() >= OPEN_FILES {
            return None;
        }
        let id = self.waiting.pop_front()?;
        self.asked.insert(id);
        Some(id)
    }

    /// Takes an entry of the list; none at all ends it.
    fn announced(&mut self, stat: Option<Stat>) -> Result<(), Error> {
        if self.listed {
            return Err(invalid("the builder ended its list twice".into()));
        }
        let Some(stat) = stat else {
            self.listed = true;
            return Ok(());
        };
        let id = self.next;
        if id >= MAX_ENTRIES {
            return Err(invalid(format!("the builder lists more than {MAX_ENTRIES} entries")));
        }
        self.next += 1;
        let path = stat.path.to_vec();
        self.check(&path)?;
        let Some(kind) = FileType::of(stat.mode) else {
            return Err(invalid(format!("{} is of no known kind", show(&path))));
        };
        if stat.linkname.len() > MAX_PATH || stat.linkname.contains(&0) {
            return Err(invalid(format!("the link {} is not usable", show(&path))));
        }
        match kind {
            FileType::Directory => {
                self.directory(&path)?;
                self.trail.push(path.clone());
                self.directories.push((path, stat));
            }
            _ if kind != FileType::Symlink && !stat.linkname.is_empty() => {
                let first = stat.linkname.to_vec();
                if !self.files.contains(&first) {
                    return Err(invalid(format!(
                        "{} is a link to {}, which was not sent",
                        show(&path),
                        show(&first)
                    )));
                }
                self.files.insert(path.clone());
                self.links.push((first, path));
            }
            FileType::Regular => {
                self.files.insert(path.clone());
                self.waiting.push_back(id);
                self.wanted.insert(id, Wanted { path, stat, partial: None });
            }
            FileType::Symlink => self.symlink(&path, &stat)?,
            FileType::CharDevice | FileType::BlockDevice | FileType::Fifo => {
                self.node(&path, &stat, kind)?;
            }
        }
        Ok(())
    }

    /// Fails unless a path is a plain one inside of the folder, comes after the last one, and is in a directory that came.
    fn check(&mut self, path: &[u8]) -> Result<(), Error> {
        let good = |part: &[u8]| {
            !part.is_empty()
                && part != b"."
                && part != b".."
                && part.len() <= 255
                && !part.contains(&0)
        };
        if path.len() > MAX_PATH || !path.split(|byte| *byte == b'/').all(good) {
            return Err(invalid(format!(
                "the builder sent the path {}, which is not usable",
                show(path)
            )));
        }
        let key: Vec<u8> = path.iter().map(|byte| if *byte == b'/' { 0 } else { *byte }).collect();
        if key <= self.last {
            return Err(invalid(format!("the builder sent {} out of order", show(path))));
        }
        self.last = key;
        let parent = split(path).0;
        while self.trail.last().is_some_and(|last| last != parent) {
            self.trail.pop();
        }
        if !parent.is_empty() && self.trail.is_empty() {
            return Err(invalid(format!("the builder sent {} before its directory", show(path))));
        }
        Ok(())
    }

    /// Opens the directory of a path, without following links.
    fn open_parent(&mut self, path: &[u8]) -> Result<BorrowedFd<'_>, Error> {
        let parent = split(path).0;
        if parent.is_empty() {
            return Ok(self.root.as_fd());
        }
        if self.parent.as_ref().is_none_or(|(at, _)| at != parent) {
            let opened = open_directory(self.root.as_fd(), parent)
                .map_err(|error| self.failed(parent, error))?;
            self.parent = Some((parent.to_vec(), opened));
        }
        // It was set above.
        Ok(self.parent.as_ref().map_or(self.root.as_fd(), |(_, opened)| opened.as_fd()))
    }

    fn directory(&mut self, path: &[u8]) -> Result<(), Error> {
        let name = split(path).1;
        let parent = self.open_parent(path)?;
        let made = (|| {
            match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
                Err(Errno::EXIST) => {}
                other => return other,
            }
            let found = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if NodeType::from_raw_mode(found.st_mode) == NodeType::Directory {
                return Ok(());
            }
            rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
            rustix::fs::mkdirat(parent, name, Mode::RWXU)
        })();
        made.map_err(|error| self.failed(path, error))
    }

    /// Makes something that has no content, in place of what is there.
    fn replace(
        &mut self,
        path: &[u8],
        make: impl Fn(BorrowedFd<'_>, &[u8]) -> Result<(), Errno>,
    ) -> Result<(), Error> {
        let name = split(path).1;
        let parent = self.open_parent(path)?;
        let made = match make(parent, name) {
            Err(Errno::EXIST) => {
                remove(parent, name).and_then(|()| make(parent, name).map_err(Into::into))
            }
            other => other.map_err(io::Error::from),
        };
        made.map_err(|error| self.failed(path, error))
    }

    fn symlink(&mut self, path: &[u8], stat: &Stat) -> Result<(), Error> {
        let time = times(stat.mod_time);
        self.replace(path, |parent, name| {
            rustix::fs::symlinkat(&stat.linkname[..], parent, name)?;
            rustix::fs::utimensat(parent, name, &time, AtFlags::SYMLINK_NOFOLLOW)
        })
    }

    fn node(&mut self, path: &[u8], stat: &Stat, kind: FileType) -> Result<(), Error> {
        let kind = match kind {
            FileType::CharDevice => NodeType::CharacterDevice,
            FileType::BlockDevice => NodeType::BlockDevice,
            _ => NodeType::Fifo,
        };
        let number = |number: i64| u32::try_from(number).unwrap_or(0);
        let device = rustix::fs::makedev(number(stat.devmajor), number(stat.devminor));
        let (mode, time) = (mode(stat), times(stat.mod_time));
        self.replace(path, |parent, name| {
            rustix::fs::mknodat(parent, name, kind, Mode::RUSR | Mode::WUSR, device)?;
            rustix::fs::chmodat(parent, name, mode, AtFlags::empty())?;
            rustix::fs::utimensat(parent, name, &time, AtFlags::SYMLINK_NOFOLLOW)
        })
    }

    /// Takes a piece of a file; an empty one ends it.
    fn data(&mut self, id: u32, bytes: &[u8]) -> Result<(), Error> {
        if !self.asked.contains(&id) {
            return Err(invalid(format!(
                "the builder sent content of entry {id}, which was not asked for"
            )));
        }
        let Some(mut wanted) = self.wanted.remove(&id) else {
            return Err(invalid(format!("the builder sent entry {id} twice")));
        };
        let mut partial = match wanted.partial.take() {
            Some(partial) => partial,
            None => self.create(&wanted.path, id)?,
        };
        let announced = wanted.stat.size;
        if bytes.is_empty() {
            if i64::try_from(partial.written) != Ok(announced) {
                return Err(invalid(format!(
                    "{} came with {} bytes, where {announced} were announced",
                    show(&wanted.path),
                    partial.written
                )));
            }
            self.asked.remove(&id);
            return self.complete(partial, &wanted.path, &wanted.stat);
        }
        partial.written = partial.written.saturating_add(bytes.len() as u64);
        if i64::try_from(partial.written).map_or(true, |written| written > announced) {
            return Err(invalid(format!(
                "{} came with more than the {announced} bytes that were announced",
                show(&wanted.path)
            )));
        }
        partial.file.write_all(bytes).map_err(|error| self.failed(&wanted.path, error))?;
        wanted.partial = Some(partial);
        self.wanted.insert(id, wanted);
        Ok(())
    }

    fn create(&mut self, path: &[u8], id: u32) -> Result<Partial, Error> {
        let name = format!(".slipway-{}-{id}.part", std::process::id());
        let parent = self.open_parent(path)?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = (|| {
            let parent = parent.try_clone_to_owned()?;
            let file = match rustix::fs::openat(&parent, &name, flags, Mode::RUSR | Mode::WUSR) {
                Err(Errno::EXIST) => {
                    // Left by a process of the same number.
                    rustix::fs::unlinkat(&parent, &name, AtFlags::empty())?;
                    rustix::fs::openat(&parent, &name, flags, Mode::RUSR | Mode::WUSR)?
                }
                other => other?,
            };
            Ok::<_, io::Error>((parent, file))
        })();
        let (parent, file) = opened.map_err(|error| self.failed(path, error))?;
        Ok(Partial { parent, name, file: file.into(), written: 0, complete: false })
    }

    fn complete(&self, mut partial: Partial, path: &[u8], stat: &Stat) -> Result<(), Error> {
        let name = split(path).1;
        let done = (|| {
            set_xattrs(&partial.file, stat);
            rustix::fs::fchmod(&partial.file, mode(stat))?;
            rustix::fs::futimens(&partial.file, &times(stat.mod_time))?;
            let rename =
                || rustix::fs::renameat(&partial.parent, &partial.name, &partial.parent, name);
            match rename() {
                Err(Errno::ISDIR | Errno::NOTEMPTY | Errno::EXIST) => {
                    remove(partial.parent.as_fd(), name)?;
                    rename()?;
                }
                other => other?,
            }
            Ok::<_, io::Error>(())
        })();
        done.map_err(|error| self.failed(path, error))?;
        partial.complete = true;
        Ok(())
    }

    /// Makes what needs all files to be there: further names of them, and attributes of directories.
    fn finish(&mut self) -> Result<(), Error> {
        for (first, path) in std::mem::take(&mut self.links) {
            let (parent, name) = split(&first);
            let from = if parent.is_empty() {
                self.root.try_clone().map_err(|error| self.failed(&first, error))?
            } else {
                open_directory(self.root.as_fd(), parent)
                    .map_err(|error| self.failed(&first, error))?
            };
            self.replace(&path, |to, link| {
                rustix::fs::linkat(&from, name, to, link, AtFlags::empty())
            })?;
        }
        // Entries change the time of their directory, and some directories cannot be entered any more.
        for (path, stat) in std::mem::take(&mut self.directories).into_iter().rev() {
            let done = (|| {
                let opened = open_directory(self.root.as_fd(), &path)?;
                set_xattrs(&opened, &stat);
                rustix::fs::fchmod(&opened, mode(&stat))?;
                rustix::fs::futimens(&opened, &times(stat.mod_time))
            })();
            done.map_err(|error| self.failed(&path, error))?;
        }
        Ok(())
    }
}

/// Opens a directory below another one without following links, however deep it is.
fn open_directory(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut parts = path.split(|byte| *byte == b'/');
    let first = parts.next().ok_or(Errno::INVAL)?;
    let mut opened = rustix::fs::openat(root, first, flags, Mode::empty())?;
    for part in parts {
        opened = rustix::fs::openat(&opened, part, flags, Mode::empty())?;
    }
    Ok(opened)
}

/// Removes an entry, and what is below it if it is a directory.
fn remove(parent: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        other => return other.map_err(Into::into),
    }
    use std::os::unix::ffi::OsStrExt as _;
    // Names exactly the directory that is open; below it, no link is followed.
    let path = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string());
    std::fs::remove_dir_all(path.join(std::ffi::OsStr::from_bytes(name)))
}

fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(permissions(stat.mode))
}

fn times(nanos: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: nanos.div_euclid(1_000_000_000),
        tv_nsec: nanos.rem_euclid(1_000_000_000),
    };
    Timestamps { last_access: time, last_modification: time }
}

/// Sets the attributes that are part of a file's content for its user. File systems without them do without.
fn set_xattrs(file: impl std::os::fd::AsFd, stat: &Stat) {
    for (name, value) in &stat.xattrs {
        if (name.starts_with("user.") || name == "security.capability")
            && let Err(error) = rustix::fs::fsetxattr(&file, name, value, XattrFlags::empty())
        {
            tracing::debug!(name, %error, "an attribute is not kept");
        }
    }
}
