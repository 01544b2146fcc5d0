//! Reads a folder of this machine into a [`Tree`], remembering digests between runs.
//!
//! A digest is taken from memory when device, inode, size, modification and change time are what they were. A file that
//! changed within [`RACY`] of being read is read again next time: its next change might leave no trace in the times.

mod ahead;
pub(crate) mod digest;
mod kept;
mod memory;
mod walk;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustix::fs::FileType;
use sha2::{Digest as _, Sha256};

pub use self::ahead::Ahead;
use self::digest::digest_all;
pub use self::digest::digest_file;
pub(crate) use self::digest::{open_regular, open_sized};
use self::kept::{Draft, Kept, Known, Listed};
use self::walk::{examine, walk};
use super::{Content, Entry, Kind, Tree};
use crate::error::{Error, ErrorKind, IoContext as _, Result};
use crate::lease::now_nanos;

/// Times are not finer than this on any file system we meet.
const RACY: i64 = 2_000_000_000;

/// The kernel's limit for the value of an extended attribute, in bytes.
const MAX_XATTR: usize = 64 * 1024;

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

/// A path that is part of the scan, with what is known of it.
struct Scanned {
    path: Vec<u8>,
    host: PathBuf,
    /// The directory it is in, as a place in the list of directories.
    parent: usize,
    /// The place of a directory in that list.
    listed: Option<usize>,
    stamp: Stamp,
    /// Type and permissions.
    mode: u32,
    uid: u32,
    gid: u32,
    links: u64,
    /// The device that a device file stands for.
    device: u64,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    link: Option<Vec<u8>>,
    digest: Option<[u8; 32]>,
}

impl Scanned {
    fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.mode)
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
                let read = Arc::new(kept.tree(*ownership)?);
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
    scan_ahead(root, filter, options, None)
}

/// As [`scan_or_recall`], where the comparison with the last scan has perhaps begun already.
///
/// # Errors
/// As [`scan`].
pub fn scan_ahead(
    root: &Path,
    filter: &mut dyn Filter,
    options: &ScanOptions<'_>,
    ahead: Option<&Ahead>,
) -> Result<Scan> {
    let place = options.memory.zip(filter.identity()).map(|(memory, identity)| {
        let mut hash = Sha256::new();
        hash.update(identity);
        hash.update([u8::from(options.ownership == Ownership::Keep)]);
        kept::place(memory, root, &hash.finalize().into())
    });
    let verified = place.as_deref().and_then(|place| {
        let begun = ahead.and_then(|ahead| ahead.take(place, root));
        begun.unwrap_or_else(|| ahead::verified(place, root))
    });
    let known = match verified {
        Some((kept, same)) if same.iter().all(|same| *same) => {
            let (digest, ownership) = (kept.digest(), options.ownership);
            let source = ScanSource::Kept { kept, ownership, tree: OnceLock::new() };
            return Ok(Scan { digest, source });
        }
        other => other,
    };
    let known = known.as_ref().and_then(|(kept, same)| kept.known(same)).unwrap_or_default();
    let began = now_nanos();
    let (found, listed) = look(root, filter, options, &known)?;
    let draft = place.map(|place| Draft::new(place, began, &listed, &found));
    let scan = Scan::of(to_tree(found, options.ownership))?;
    if let Some(draft) = draft {
        draft.save(&scan.digest);
    }
    Ok(scan)
}

/// Scans `root`. Sockets are left out. File contents are digested, on all cores.
///
/// # Errors
/// When something cannot be read; the error names the path.
pub fn scan(root: &Path, filter: &mut dyn Filter, options: &ScanOptions<'_>) -> Result<Tree> {
    Ok(to_tree(look(root, filter, options, &Known::default())?.0, options.ownership))
}

/// Lists `root` as [`scan`] does, with all extended attributes, but reads no contents and so knows no digests.
///
/// # Errors
/// When something cannot be read; the error names the path.
pub fn survey(root: &Path, filter: &mut dyn Filter, ownership: Ownership) -> Result<Tree> {
    let (mut found, _) = find(root, filter, &Known::default())?;
    // A thread costs as much as the attributes of about this many files.
    let threads =
        std::thread::available_parallelism().map_or(1, usize::from).min(found.len().div_ceil(1024));
    let part = found.len().div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        let workers: Vec<_> = found
            .chunks_mut(part)
            .map(|part| {
                scope.spawn(|| -> Result<()> {
                    for scanned in part {
                        scanned.xattrs = all_xattrs(&scanned.host)?;
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    Ok(to_tree(found, ownership))
}

/// Reads the extended attributes of an entry itself, whatever it is. One that cannot be read, or is gone, has none.
fn all_xattrs(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    use rustix::io::Errno;
    let mut xattrs = BTreeMap::new();
    let mut names = vec![];
    loop {
        match rustix::fs::llistxattr(path, names.as_mut_slice()) {
            Ok(0) => return Ok(xattrs),
            Ok(length) if length <= names.len() => {
                names.truncate(length);
                break;
            }
            Ok(length) => names.resize(length, 0),
            Err(Errno::RANGE) => names.resize((names.len() + 1) * 2, 0),
            Err(Errno::OPNOTSUPP | Errno::NOENT | Errno::ACCESS) => return Ok(xattrs),
            Err(error) => return Err(error).at("list the attributes of", path),
        }
    }
    let mut value = vec![0; MAX_XATTR];
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        match rustix::fs::lgetxattr(path, name, value.as_mut_slice()) {
            Ok(length) => {
                xattrs.insert(name.to_vec(), value.get(..length).unwrap_or_default().to_vec());
            }
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOENT | Errno::ACCESS) => {}
            Err(error) => return Err(error).at("read an attribute of", path),
        }
    }
    Ok(xattrs)
}

fn to_tree(found: Vec<Scanned>, ownership: Ownership) -> Tree {
    found.into_iter().filter_map(|scanned| to_entry(scanned, ownership)).collect()
}

fn look(
    root: &Path,
    filter: &mut dyn Filter,
    options: &ScanOptions<'_>,
    known: &Known<'_>,
) -> Result<(Vec<Scanned>, Vec<Listed>)> {
    let (mut found, listed) = find(root, filter, known)?;
    digest_all(root, &mut found, options)?;
    Ok((found, listed))
}

/// Finds what there is, and which directories were listed.
fn find(
    root: &Path,
    filter: &mut dyn Filter,
    known: &Known<'_>,
) -> Result<(Vec<Scanned>, Vec<Listed>)> {
    let metadata = fs::metadata(root).at("read", root)?;
    if !metadata.is_dir() {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("{} is not a directory", root.display()),
        ));
    }
    let mut listed = vec![Listed { path: vec![], stamp: Stamp::of(&metadata) }];
    let found = examine(walk(root, filter, &mut listed, known)?)?;
    Ok((found, listed))
}

fn to_entry(scanned: Scanned, ownership: Ownership) -> Option<(Vec<u8>, Entry)> {
    let (major, minor) = (rustix::fs::major(scanned.device), rustix::fs::minor(scanned.device));
    let kind = match scanned.file_type() {
        FileType::Directory => Kind::Directory { opaque: false },
        FileType::RegularFile => {
            let content = Content::Host { path: scanned.host.into(), digest: scanned.digest };
            Kind::File { content, size: scanned.stamp.size }
        }
        FileType::Symlink => Kind::Symlink { target: scanned.link.unwrap_or_default() },
        FileType::CharacterDevice => Kind::CharDevice { major, minor },
        FileType::BlockDevice => Kind::BlockDevice { major, minor },
        FileType::Fifo => Kind::Fifo,
        // No layer holds sockets.
        _ => return None,
    };
    let (uid, gid) = match ownership {
        Ownership::Root => (0, 0),
        Ownership::Keep => (scanned.uid, scanned.gid),
    };
    let shared = scanned.links > 1 && !matches!(kind, Kind::Directory { .. });
    let entry = Entry {
        kind,
        mode: scanned.mode & 0o7777,
        uid,
        gid,
        mtime: scanned.stamp.mtime,
        xattrs: scanned.xattrs,
        inode: shared.then_some((scanned.stamp.device, scanned.stamp.inode)),
    };
    Some((scanned.path, entry))
}

/// Returns the modification time in nanoseconds since 1970.
pub(crate) fn mtime(metadata: &fs::Metadata) -> i64 {
    metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec())
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

    /// Whether the next change was bound to leave a trace, seen at `began`.
    fn is_settled(&self, began: i64) -> bool {
        self.mtime.max(self.ctime) <= began - RACY
    }
}

/// Makes the host content of a file.
pub(crate) fn host_content(path: PathBuf) -> Content {
    Content::Host { path: Arc::from(path), digest: None }
}

#[cfg(test)]
mod tests {
    use super::digest::digest_file;
    use super::memory::Memory;
    use super::*;
    use std::sync::atomic::Ordering;

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
        let scanned = walk::scanned(
            walk::Seen { path: b"a".to_vec(), host: path.clone(), parent: 0, listed: None },
            &fs::metadata(&path).unwrap(),
            None,
        );
        let scanned = Scanned { digest: Some([7; 32]), ..scanned };
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
