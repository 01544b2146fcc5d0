//! Reads a folder of this machine into a [`Tree`], remembering digests between runs.
//!
//! A digest is taken from memory when device, inode, size, modification and change time are what they were. A file that
//! changed within [`RACY`] of being read is read again next time: its next change might leave no trace in the times.

mod kept;
mod memory;

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use sha2::{Digest as _, Sha256};
use slipway_spec::digest::to_hex;

use self::kept::{Kept, Listed};
use self::memory::Memory;
use super::{Content, Entry, Kind, Tree};
use crate::error::{Error, ErrorKind, IoContext as _, Result};
use crate::lease::now_nanos;

/// Times are not finer than this on any file system we meet.
const RACY: i64 = 2_000_000_000;

/// What a scan does with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is part of the tree.
    Take,
    /// It is not, but something below it may be; it becomes part when something below it is.
    Look,
    /// Neither it nor anything below it is.
    Skip,
}

/// Decides what is part of a scan, asked once per path in the order of a walk.
pub trait Filter {
    /// Decides on a path relative to the folder.
    fn verdict(&mut self, path: &[u8], directory: bool) -> Verdict;

    /// Tells filters apart: two with the same identity decide the same about every path. Without one a scan is not kept.
    fn identity(&self) -> Option<[u8; 32]> {
        None
    }
}

/// Takes everything.
#[derive(Clone, Copy, Debug)]
pub struct Everything;

impl Filter for Everything {
    fn verdict(&mut self, _path: &[u8], _directory: bool) -> Verdict {
        Verdict::Take
    }
}

/// Whose entries the tree says they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// Root's, as build contexts are.
    Root,
    /// As they are on this machine.
    Keep,
}

/// How a folder is scanned.
#[derive(Debug)]
pub struct ScanOptions<'a> {
    /// Whose the entries are.
    pub ownership: Ownership,
    /// A folder for remembered digests; `None` reads every file.
    pub memory: Option<&'a Path>,
}

struct Scanned {
    path: Vec<u8>,
    host: PathBuf,
    /// The directory it is in, as a place in the list of directories.
    parent: usize,
    /// The place of a directory in that list.
    listed: Option<usize>,
    metadata: fs::Metadata,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    link: Option<Vec<u8>>,
    digest: Option<[u8; 32]>,
}

impl Scanned {
    fn is_dir(&self) -> bool {
        self.metadata.is_dir()
    }
}

/// What a scan saw, as a digest at once and as a tree on demand.
#[derive(Debug)]
pub struct Scan {
    digest: [u8; 32],
    source: ScanSource,
}

#[derive(Debug)]
enum ScanSource {
    Seen(Arc<Tree>),
    Kept { kept: Kept, ownership: Ownership, tree: OnceLock<Arc<Tree>> },
}

impl Scan {
    /// Makes a scan of a tree that is there already.
    ///
    /// # Errors
    /// When a file whose digest is not known cannot be read.
    pub fn of(tree: Tree) -> Result<Self> {
        Ok(Self { digest: tree.digest()?, source: ScanSource::Seen(Arc::new(tree)) })
    }

    /// Returns the digest of what was seen: see [`Tree::digest`].
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Returns what was seen.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when what was remembered of it cannot be read.
    pub fn tree(&self) -> Result<Arc<Tree>> {
        match &self.source {
            ScanSource::Seen(tree) => Ok(tree.clone()),
            ScanSource::Kept { kept, ownership, tree } => {
                if let Some(tree) = tree.get() {
                    return Ok(tree.clone());
                }
                let read = Arc::new(kept.tree(*ownership == Ownership::Keep)?);
                Ok(tree.get_or_init(|| read).clone())
            }
        }
    }
}

/// Scans `root` as [`scan`] does, or finds that nothing has changed since the last time.
///
/// # Errors
/// As [`scan`].
pub fn scan_or_recall(
    root: &Path,
    filter: &mut dyn Filter,
    options: &ScanOptions<'_>,
) -> Result<Scan> {
    let place = options.memory.zip(filter.identity()).map(|(memory, identity)| {
        let mut hash = Sha256::new();
        hash.update(identity);
        hash.update([u8::from(options.ownership == Ownership::Keep)]);
        kept::place(memory, root, &hash.finalize().into())
    });
    if let Some(kept) = place.as_deref().and_then(|place| Kept::load(place, root)) {
        let (digest, ownership) = (kept.digest(), options.ownership);
        let source = ScanSource::Kept { kept, ownership, tree: OnceLock::new() };
        return Ok(Scan { digest, source });
    }
    let began = now_nanos();
    let (found, listed) = look(root, filter, options)?;
    let scan = Scan::of(to_tree(&found, options.ownership))?;
    if let Some(place) = place {
        kept::save(&place, began, &listed, &found, &scan.digest);
    }
    Ok(scan)
}

/// Scans `root`. Sockets are left out. File contents are digested, on all cores.
///
/// # Errors
/// When something cannot be read; the error names the path.
pub fn scan(root: &Path, filter: &mut dyn Filter, options: &ScanOptions<'_>) -> Result<Tree> {
    Ok(to_tree(&look(root, filter, options)?.0, options.ownership))
}

fn to_tree(found: &[Scanned], ownership: Ownership) -> Tree {
    found.iter().filter_map(|scanned| to_entry(scanned, ownership)).collect()
}

fn look(
    root: &Path,
    filter: &mut dyn Filter,
    options: &ScanOptions<'_>,
) -> Result<(Vec<Scanned>, Vec<Listed>)> {
    let metadata = fs::metadata(root).at("read", root)?;
    if !metadata.is_dir() {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("{} is not a directory", root.display()),
        ));
    }
    let mut listed = vec![Listed { path: vec![], stamp: Stamp::of(&metadata) }];
    let mut found = examine(walk(root, filter, &mut listed)?)?;
    digest_all(root, &mut found, options)?;
    Ok((found, listed))
}

/// A path that is part of the scan, as its directory lists it.
struct Seen {
    path: Vec<u8>,
    host: PathBuf,
    parent: usize,
    listed: Option<usize>,
}

/// A directory whose entries are being visited.
struct Level {
    host: PathBuf,
    path: Vec<u8>,
    listed: usize,
    names: std::vec::IntoIter<(OsString, bool)>,
}

/// Visits everything below `root`, in the order of a walk. Not by recursion: contexts may be deeper than the stack.
fn walk(root: &Path, filter: &mut dyn Filter, listed: &mut Vec<Listed>) -> Result<Vec<Seen>> {
    let mut found = vec![];
    // Directories on the way to the current one that are taken only if something below them is.
    let mut waiting: Vec<Seen> = vec![];
    let names = list(root)?.into_iter();
    let mut levels = vec![Level { host: root.to_path_buf(), path: vec![], listed: 0, names }];
    while let Some(level) = levels.last_mut() {
        let Some((name, directory)) = level.names.next() else {
            // Still waiting means that nothing below was taken.
            if waiting.last().is_some_and(|last| last.path == level.path) {
                waiting.pop();
            }
            levels.pop();
            continue;
        };
        let path = super::join(&level.path, name.as_bytes());
        let host = level.host.join(&name);
        let verdict = filter.verdict(&path, directory);
        if verdict == Verdict::Skip || (verdict == Verdict::Look && !directory) {
            continue;
        }
        // Its attributes first: a change after that shows in them.
        let stamp = match directory.then(|| fs::symlink_metadata(&host)).transpose() {
            Err(error) if is_gone(&error) => continue,
            other => other.at("read", &host)?.map(|metadata| Stamp::of(&metadata)),
        };
        let names = match directory.then(|| list(&host)).transpose() {
            // Gone, or replaced by something else, since it was seen.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            other => other?,
        };
        let place = stamp.map(|stamp| {
            listed.push(Listed { path: path.clone(), stamp });
            listed.len() - 1
        });
        let (path_here, host_here) = (path.clone(), host.clone());
        let seen = Seen { path: path_here, host: host_here, parent: level.listed, listed: place };
        if verdict == Verdict::Take {
            found.append(&mut waiting);
            found.push(seen);
        } else {
            waiting.push(seen);
        }
        levels.extend(names.zip(place).map(|(names, listed)| Level {
            host,
            path,
            listed,
            names: names.into_iter(),
        }));
    }
    Ok(found)
}

/// Lists a directory in byte order, and which of its entries are directories.
fn list(folder: &Path) -> Result<Vec<(OsString, bool)>> {
    let entries = fs::read_dir(folder).map_err(|error| match error.kind() {
        io::ErrorKind::NotADirectory => io::Error::from(io::ErrorKind::NotFound),
        _ => error,
    });
    let mut names = vec![];
    for entry in entries.at("read", folder)? {
        let entry = entry.at("read", folder)?;
        match entry.file_type() {
            Ok(kind) => names.push((entry.file_name(), kind.is_dir())),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error).at("read", &entry.path()),
        }
    }
    names.sort_unstable_by(|(a, _), (b, _)| a.as_bytes().cmp(b.as_bytes()));
    Ok(names)
}

/// Reads the attributes of what was seen, on all cores. What went away meanwhile is as if it had never been there.
fn examine(seen: Vec<Seen>) -> Result<Vec<Scanned>> {
    let one = |seen: Seen| -> Result<Option<Scanned>> {
        let Seen { path, host, parent, listed } = seen;
        let metadata = match fs::symlink_metadata(&host) {
            Err(error) if is_gone(&error) => return Ok(None),
            other => other.at("read", &host)?,
        };
        let link = if metadata.is_symlink() {
            match fs::read_link(&host) {
                Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::InvalidInput => {
                    return Ok(None);
                }
                other => Some(other.at("read", &host)?.into_os_string().into_vec()),
            }
        } else {
            None
        };
        // A directory that has become something else was not listed as what it is now.
        if listed.is_some() != metadata.is_dir() {
            return Ok(None);
        }
        let xattrs = BTreeMap::new();
        Ok(Some(Scanned { path, host, parent, listed, metadata, xattrs, link, digest: None }))
    };
    let all = |part: Vec<Seen>| {
        part.into_iter().filter_map(|seen| one(seen).transpose()).collect::<Result<Vec<_>>>()
    };
    // A thread costs as much as the attributes of about this many files.
    let threads =
        std::thread::available_parallelism().map_or(1, usize::from).min(seen.len().div_ceil(1024));
    if threads <= 1 {
        return all(seen);
    }
    let mut rest = seen;
    let size = rest.len().div_ceil(threads);
    let mut parts = vec![];
    while rest.len() > size {
        parts.push(rest.split_off(rest.len() - size));
    }
    parts.push(rest);
    std::thread::scope(|scope| {
        // The last part was cut off first.
        let workers: Vec<_> =
            parts.into_iter().rev().map(|part| scope.spawn(|| all(part))).collect();
        let mut found = vec![];
        for worker in workers {
            found.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(found)
    })
}

/// Reads the one extended attribute that layers carry.
pub(crate) fn capability(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    const NAME: &str = "security.capability";
    let mut buffer = [0u8; 64];
    let mut xattrs = BTreeMap::new();
    match rustix::fs::lgetxattr(path, NAME, &mut buffer) {
        Ok(length) => {
            xattrs.insert(NAME.as_bytes().to_vec(), buffer[..length].to_vec());
        }
        Err(
            rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOENT,
        ) => {}
        Err(error) => return Err(error).at("read the capabilities of", path),
    }
    Ok(xattrs)
}

fn to_entry(scanned: &Scanned, ownership: Ownership) -> Option<(Vec<u8>, Entry)> {
    let metadata = &scanned.metadata;
    let kind = file_kind(metadata, scanned.link.clone(), || Content::Host {
        path: scanned.host.clone().into(),
        digest: scanned.digest,
    })?;
    let (uid, gid) = match ownership {
        Ownership::Root => (0, 0),
        Ownership::Keep => (metadata.uid(), metadata.gid()),
    };
    let entry = Entry {
        kind,
        mode: metadata.mode() & 0o7777,
        uid,
        gid,
        mtime: mtime(metadata),
        xattrs: scanned.xattrs.clone(),
        inode: (metadata.nlink() > 1 && !metadata.is_dir())
            .then(|| (metadata.dev(), metadata.ino())),
    };
    Some((scanned.path.clone(), entry))
}

/// Returns the modification time in nanoseconds since 1970.
pub(crate) fn mtime(metadata: &fs::Metadata) -> i64 {
    metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec())
}

/// Returns what a file is; `None` for sockets, which no layer holds.
pub(crate) fn file_kind(
    metadata: &fs::Metadata,
    link: Option<Vec<u8>>,
    content: impl FnOnce() -> Content,
) -> Option<Kind> {
    use std::os::unix::fs::FileTypeExt as _;
    let file_type = metadata.file_type();
    let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    Some(match () {
        () if file_type.is_dir() => Kind::Directory { opaque: false },
        () if file_type.is_file() => Kind::File { content: content(), size: metadata.size() },
        () if file_type.is_symlink() => Kind::Symlink { target: link.unwrap_or_default() },
        () if file_type.is_char_device() => Kind::CharDevice { major, minor },
        () if file_type.is_block_device() => Kind::BlockDevice { major, minor },
        () if file_type.is_fifo() => Kind::Fifo,
        () => return None,
    })
}

/// What must be unchanged for a remembered digest to hold.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    mtime: i64,
    ctime: i64,
}

impl Stamp {
    fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            mtime: mtime(metadata),
            ctime: metadata
                .ctime()
                .saturating_mul(1_000_000_000)
                .saturating_add(metadata.ctime_nsec()),
        }
    }
}

fn digest_all(root: &Path, found: &mut Vec<Scanned>, options: &ScanOptions<'_>) -> Result<()> {
    let memory = options.memory.map(|folder| {
        let name = to_hex(&Sha256::digest(root.as_os_str().as_bytes()));
        folder.join(name)
    });
    let remembered = memory.as_deref().map(Memory::load).unwrap_or_default();
    let mut cursor = remembered.iter();
    let mut next = cursor.next();
    let mut to_read = vec![];
    let mut unchanged = 0;
    for (at, scanned) in found.iter_mut().enumerate() {
        if !scanned.metadata.is_file() {
            continue;
        }
        // Both lists are in the order of a walk.
        while next.as_ref().is_some_and(|(path, ..)| walk_order(path, &scanned.path).is_lt()) {
            next = cursor.next();
        }
        match &next {
            Some((path, stamp, digest))
                if *path == scanned.path && *stamp == Stamp::of(&scanned.metadata) =>
            {
                scanned.digest = Some(*digest);
                unchanged += 1;
            }
            _ => to_read.push(at),
        }
    }
    let began = now_nanos();
    let gone = read_all(found, &to_read)?;
    if let Some(path) = memory
        && (!to_read.is_empty() || unchanged != remembered.count)
    {
        Memory::save(&path, found, began);
    }
    let mut at = 0;
    found.retain(|_| {
        at += 1;
        !gone.contains(&(at - 1))
    });
    Ok(())
}

/// Whether a path that was there a moment ago is not any more.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn walk_order(a: &[u8], b: &[u8]) -> std::cmp::Ordering {
    let key = |byte: &u8| if *byte == b'/' { 0 } else { *byte };
    a.iter().map(key).cmp(b.iter().map(key))
}

/// What reading a file gives: the digest of its bytes, and its attributes.
type Read = ([u8; 32], BTreeMap<Vec<u8>, Vec<u8>>);

/// Digests the files at `to_read` on all cores. Returns which of them went away meanwhile.
fn read_all(found: &mut [Scanned], to_read: &[usize]) -> Result<HashSet<usize>> {
    let threads =
        std::thread::available_parallelism().map_or(1, usize::from).min(to_read.len().div_ceil(64));
    let cursor = AtomicUsize::new(0);
    let files: &[Scanned] = found;
    let work = || -> Result<Vec<(usize, Option<Read>)>> {
        let mut digests = vec![];
        let mut buffer = vec![0; 128 * 1024];
        while let Some(at) = to_read.get(cursor.fetch_add(1, Ordering::Relaxed)) {
            let host = &files[*at].host;
            match digest_file(host, &mut buffer).and_then(|digest| Ok((digest, capability(host)?)))
            {
                Err(error) if error.kind() == ErrorKind::NotFound => digests.push((*at, None)),
                other => digests.push((*at, Some(other?))),
            }
        }
        Ok(digests)
    };
    let parts = if threads <= 1 {
        vec![work()]
    } else {
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .map(|worker| {
                    worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect()
        })
    };
    let mut gone = HashSet::new();
    for part in parts {
        for (at, digest) in part? {
            match digest {
                Some((digest, xattrs)) => {
                    found[at].digest = Some(digest);
                    found[at].xattrs = xattrs;
                }
                None => {
                    gone.insert(at);
                }
            }
        }
    }
    Ok(gone)
}

/// Returns the sha256 of a file's bytes.
///
/// # Errors
/// When it cannot be read.
pub fn digest_file(path: &Path, buffer: &mut [u8]) -> Result<[u8; 32]> {
    let mut file = open_regular(path)?;
    let mut hash = Sha256::new();
    loop {
        match file.read(buffer) {
            Ok(0) => return Ok(hash.finalize().into()),
            Ok(read) => hash.update(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).at("read", path),
        }
    }
}

/// Opens a file for reading that must still be a regular file.
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    open_sized(path).map(|(file, _)| file)
}

/// As [`open_regular`], and tells the size of the file in bytes.
pub(crate) fn open_sized(path: &Path) -> Result<(File, u64)> {
    use rustix::fs::{Mode, OFlags};
    // A file replaced by a link or a pipe must neither lead elsewhere nor block.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).at("open", path)?);
    let metadata = file.metadata().at("read", path)?;
    if !metadata.is_file() {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("{} is no regular file any more", path.display()),
        ));
    }
    Ok((file, metadata.len()))
}

/// Makes the host content of a file.
pub(crate) fn host_content(path: PathBuf) -> Content {
    Content::Host { path: Arc::from(path), digest: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

    fn options(memory: &Path) -> ScanOptions<'_> {
        ScanOptions { ownership: Ownership::Root, memory: Some(memory) }
    }

    fn age(path: &Path, seconds: i64) {
        let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }

    fn digest_of(tree: &Tree, path: &str) -> [u8; 32] {
        match &tree.get(path.as_bytes()).unwrap().kind {
            Kind::File { content: Content::Host { digest, .. }, .. } => digest.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_change_is_seen_even_when_size_and_mtime_stay() {
        let (context, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = context.path().join("a");
        fs::write(&file, "one").unwrap();
        age(&file, 1_000_000);
        let before = scan(context.path(), &mut Everything, &options(memory.path())).unwrap();
        fs::write(&file, "two").unwrap();
        age(&file, 1_000_000);
        let after = scan(context.path(), &mut Everything, &options(memory.path())).unwrap();
        assert_ne!(digest_of(&before, "a"), digest_of(&after, "a"));
        assert_eq!(digest_of(&after, "a"), <[u8; 32]>::from(Sha256::digest(b"two")));
    }

    #[test]
    fn files_that_come_and_go_during_a_scan_do_no_harm() {
        let context = tempfile::tempdir().unwrap();
        fs::write(context.path().join("stays"), "here").unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let at = |name: &str| context.path().join(name);
                while !stop.load(Ordering::Relaxed) {
                    for n in 0..20 {
                        fs::create_dir_all(at(&format!("d{n}"))).unwrap();
                        fs::write(at(&format!("d{n}/f")), "x").unwrap();
                        std::os::unix::fs::symlink("x", at(&format!("l{n}"))).unwrap();
                    }
                    for n in 0..20 {
                        fs::remove_dir_all(at(&format!("d{n}"))).unwrap();
                        fs::remove_file(at(&format!("l{n}"))).unwrap();
                    }
                }
            });
            let options = ScanOptions { ownership: Ownership::Root, memory: None };
            let results: Vec<_> =
                (0..200).map(|_| scan(context.path(), &mut Everything, &options)).collect();
            stop.store(true, Ordering::Relaxed);
            for tree in results {
                let tree = tree.unwrap();
                assert_eq!(digest_of(&tree, "stays"), <[u8; 32]>::from(Sha256::digest(b"here")));
                for (path, entry) in tree.iter() {
                    let Kind::File { content: Content::Host { digest, .. }, .. } = &entry.kind
                    else {
                        continue;
                    };
                    assert!(digest.is_some(), "{}", path.escape_ascii());
                }
            }
        });
    }

    #[test]
    fn links_are_taken_as_they_are_and_may_lead_in_circles_or_nowhere() {
        let context = tempfile::tempdir().unwrap();
        for (name, target) in
            [("a", "b"), ("b", "a"), ("self", "."), ("up", ".."), ("gone", "/no/such")]
        {
            std::os::unix::fs::symlink(target, context.path().join(name)).unwrap();
        }
        let options = ScanOptions { ownership: Ownership::Root, memory: None };
        let tree = scan(context.path(), &mut Everything, &options).unwrap();
        assert_eq!(tree.len(), 5);
        assert_eq!(tree.get(b"self").unwrap().kind, Kind::Symlink { target: b".".to_vec() });
    }

    #[test]
    fn what_is_no_regular_file_any_more_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let (pipe, link) = (folder.path().join("pipe"), folder.path().join("link"));
        rustix::fs::mknodat(CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0)
            .unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        for path in [&pipe, &link, &folder.path().to_path_buf()] {
            let error = digest_file(path, &mut [0; 16]).unwrap_err();
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_an_error_that_names_it() {
        use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
        use std::os::unix::fs::PermissionsExt as _;
        let context = tempfile::tempdir().unwrap();
        let secret = context.path().join("secret");
        fs::write(&secret, "x").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o000)).unwrap();
        // Root reads everything, so this thread gives that up.
        let error = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let mut sets = capabilities(None).unwrap();
                sets.effective -= CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
                set_capabilities(None, sets).unwrap();
                let options = ScanOptions { ownership: Ownership::Root, memory: None };
                scan(context.path(), &mut Everything, &options).unwrap_err()
            });
            thread.join().unwrap()
        });
        assert!(error.to_string().contains(secret.to_str().unwrap()), "{error}");
    }

    #[test]
    fn the_deepest_folders_a_path_can_name_fit_the_stack_of_a_worker() {
        let context = tempfile::tempdir().unwrap();
        let room = 4000 - context.path().as_os_str().len();
        let deep: PathBuf = std::iter::repeat_n("d", room / 2).collect();
        fs::create_dir_all(context.path().join(&deep)).unwrap();
        let root = context.path().to_path_buf();
        // As much as threads for blocking work get.
        let scanned = std::thread::Builder::new().stack_size(2 << 20).spawn(move || {
            let options = ScanOptions { ownership: Ownership::Root, memory: None };
            scan(&root, &mut Everything, &options).unwrap().len()
        });
        assert_eq!(scanned.unwrap().join().unwrap(), room / 2);
    }

    #[test]
    fn damaged_memory_is_ignored() {
        let (context, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(context.path().join("a"), "one").unwrap();
        let before = scan(context.path(), &mut Everything, &options(memory.path())).unwrap();
        for entry in fs::read_dir(memory.path()).unwrap() {
            let path = entry.unwrap().path();
            let mut bytes = fs::read(&path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(&path, bytes).unwrap();
        }
        assert_eq!(scan(context.path(), &mut Everything, &options(memory.path())).unwrap(), before);
    }

    #[test]
    fn memory_holds_for_files_that_have_settled() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "x").unwrap();
        let scanned = Scanned {
            path: b"a".to_vec(),
            host: path.clone(),
            parent: 0,
            listed: None,
            metadata: fs::metadata(&path).unwrap(),
            xattrs: BTreeMap::new(),
            link: None,
            digest: Some([7; 32]),
        };
        let memory = folder.path().join("memory");
        Memory::save(&memory, std::slice::from_ref(&scanned), now_nanos());
        assert_eq!(Memory::load(&memory).count, 0, "a file that changed just now is not trusted");
        Memory::save(&memory, &[scanned], now_nanos() + 2 * RACY);
        let loaded = Memory::load(&memory);
        let all: Vec<_> = loaded.iter().collect();
        assert_eq!((loaded.count, all.len()), (1, 1));
        assert_eq!((all[0].0, all[0].2), (&b"a"[..], [7; 32]));
    }

    #[test]
    fn directories_on_the_way_are_taken_when_something_in_them_is() {
        struct Only(&'static [u8]);
        impl Filter for Only {
            fn verdict(&mut self, path: &[u8], _directory: bool) -> Verdict {
                if path == self.0 { Verdict::Take } else { Verdict::Look }
            }
        }
        let context = tempfile::tempdir().unwrap();
        fs::create_dir_all(context.path().join("a/b")).unwrap();
        fs::create_dir_all(context.path().join("c/d")).unwrap();
        fs::write(context.path().join("a/b/f"), "").unwrap();
        fs::write(context.path().join("a/b/g"), "").unwrap();
        let options = ScanOptions { ownership: Ownership::Keep, memory: None };
        let tree = scan(context.path(), &mut Only(b"a/b/f"), &options).unwrap();
        let paths: Vec<_> = tree.iter().map(|(path, _)| String::from_utf8(path).unwrap()).collect();
        assert_eq!(paths, ["a", "a/b", "a/b/f"]);
    }
}
