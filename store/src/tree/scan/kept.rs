//! A whole scan kept for the next build, which then asks only whether anything has changed.
//!
//! A directory whose device, inode and times are what they were holds the same names; a file with the same stamp holds the
//! same bytes. So a kept scan is valid when all its stamps are, and a scan that is valid need not be turned into a
//! [`Tree`] until somebody wants to see it: its digest was kept with it. Where a time was too close to the present, the next
//! change might leave no trace: such directories are looked at again, as those are that have changed.
//!
//! The file: the magic, its checksum, the tree's digest, then each directory with the files in it. Numbers are
//! little-endian; paths end with a zero byte, so that the kernel can be asked about them in place.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, OsStr};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use sha2::{Digest as _, Sha256};
use slipway_spec::digest::to_hex;

use super::memory::replace;
use super::walk::Seen;
use super::{Ownership, Scanned, Stamp, to_entry};
use crate::error::{Error, ErrorKind, Result};
use crate::tree::{Tree, join, split};

const MAGIC: &[u8; 8] = b"slipscn3";
const HEADER: usize = MAGIC.len() + 4 + 32;

/// Kept scans of one folder, each with another selection of its files.
const PER_FOLDER: usize = 4;

/// A thread costs as much as asking about this many files.
const FILES_PER_THREAD: usize = 1024;

/// A directory that was listed, with its attributes from before it was.
pub(super) struct Listed {
    pub(super) path: Vec<u8>,
    pub(super) stamp: Stamp,
}

/// The stamp of nothing that exists.
const UNSETTLED: Stamp = Stamp { device: u64::MAX, inode: 0, size: 0, mtime: 0, ctime: 0 };

/// Where the scan of a folder with a selection is kept.
pub(super) fn place(memory: &Path, root: &Path, selection: &[u8; 32]) -> PathBuf {
    memory.join(format!("{}.{}", folder(root), to_hex(&selection[..8])))
}

/// What the names of all scans of a folder begin with.
pub(super) fn folder(root: &Path) -> String {
    to_hex(&Sha256::digest(root.as_os_str().as_bytes()))
}

/// How long the rest of such a name is, with the dot before it.
const SELECTION: usize = 17;

/// A scan on its way to being kept.
pub(super) struct Draft {
    place: PathBuf,
    bytes: Vec<u8>,
}

impl Draft {
    /// Writes down what a scan saw that began at `began`. Directories that have not settled, or hold a file that has not, are
    /// written down as if they had changed since.
    pub(super) fn new(place: PathBuf, began: i64, listed: &[Listed], found: &[Scanned]) -> Self {
        let mut files: Vec<Vec<&Scanned>> = listed.iter().map(|_| vec![]).collect();
        let mut entries: Vec<Option<&Scanned>> = listed.iter().map(|_| None).collect();
        for scanned in found {
            match scanned.listed {
                Some(at) => entries[at] = Some(scanned),
                // No tree has sockets.
                None if scanned.file_type() == FileType::Socket => {}
                None => files[scanned.parent].push(scanned),
            }
        }
        let mut out = vec![0; HEADER];
        for ((directory, entry), files) in listed.iter().zip(entries).zip(files) {
            let settled = directory.stamp.is_settled(began)
                && files.iter().all(|file| file.stamp.is_settled(began));
            out.extend_from_slice(&directory.path);
            out.push(0);
            put_stamp(&mut out, if settled { &directory.stamp } else { &UNSETTLED });
            out.push(entry.is_some().into());
            if let Some(entry) = entry {
                put_attributes(&mut out, entry);
            }
            out.extend_from_slice(&(files.len() as u32).to_le_bytes());
            let length = out.len();
            out.extend_from_slice(&[0; 4]);
            for file in files {
                let start = if directory.path.is_empty() { 0 } else { directory.path.len() + 1 };
                out.extend_from_slice(&file.path[start..]);
                out.push(0);
                put_stamp(&mut out, &file.stamp);
                put_attributes(&mut out, file);
                put_numbers(&mut out, &[file.links, file.device]);
                out.extend_from_slice(&file.digest.unwrap_or_default());
                put_bytes(&mut out, file.link.as_deref().unwrap_or_default());
            }
            // So that a reader who only wants to know how many there are can pass over them.
            let bytes = (out.len() - length - 4) as u32;
            out[length..length + 4].copy_from_slice(&bytes.to_le_bytes());
        }
        Self { place, bytes: out }
    }

    /// Keeps it, with the digest of the tree.
    pub(super) fn save(self, digest: &[u8; 32]) {
        let Self { place, bytes: mut out } = self;
        out[MAGIC.len() + 4..HEADER].copy_from_slice(digest);
        let sum = libdeflater::crc32(&out[MAGIC.len() + 4..]);
        out[..MAGIC.len()].copy_from_slice(MAGIC);
        out[MAGIC.len()..MAGIC.len() + 4].copy_from_slice(&sum.to_le_bytes());
        replace(&place, &out);
        forget_old(&place);
    }
}

/// Returns the scans of a folder with when they were kept, and their sizes in bytes. `folder` is what their names begin with.
pub(super) fn of_folder(memory: &Path, folder: &[u8]) -> Vec<(SystemTime, PathBuf, u64)> {
    let Ok(entries) = fs::read_dir(memory) else { return vec![] };
    let scan = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.ok()?;
        let name = entry.file_name();
        let rest = name.as_bytes().strip_prefix(folder)?;
        // Others are digests, or on their way to a place.
        (rest.len() == SELECTION && rest[0] == b'.').then_some(())?;
        let metadata = entry.metadata().ok()?;
        Some((metadata.modified().ok()?, entry.path(), metadata.len()))
    };
    entries.filter_map(scan).collect()
}

/// Selections come and go with every change of a Dockerfile: only the newest few are of use.
fn forget_old(place: &Path) {
    let (Some(memory), Some(name)) = (place.parent(), place.file_name()) else { return };
    let folder = name.as_bytes().split(|byte| *byte == b'.').next().unwrap_or_default();
    let mut kept = of_folder(memory, folder);
    kept.sort();
    let surplus = kept.len().saturating_sub(PER_FOLDER);
    for (_, path, _) in &kept[..surplus] {
        if let Err(error) = fs::remove_file(path) {
            tracing::debug!(path = %path.display(), %error, "an old scan stays behind");
        }
    }
}

fn put_numbers(out: &mut Vec<u8>, numbers: &[u64]) {
    for number in numbers {
        out.extend_from_slice(&number.to_le_bytes());
    }
}

fn put_stamp(out: &mut Vec<u8>, stamp: &Stamp) {
    let Stamp { device, inode, size, mtime, ctime } = *stamp;
    put_numbers(out, &[device, inode, size, mtime as u64, ctime as u64]);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

fn put_attributes(out: &mut Vec<u8>, scanned: &Scanned) {
    for number in [scanned.mode, scanned.uid, scanned.gid] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.push(u8::try_from(scanned.xattrs.len()).expect("one attribute is ever read"));
    for (name, value) in &scanned.xattrs {
        put_bytes(out, name);
        put_bytes(out, value);
    }
}

/// A scan kept by an earlier process.
pub(super) struct Kept {
    bytes: Vec<u8>,
    root: PathBuf,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").field("root", &self.root).finish_non_exhaustive()
    }
}

/// What is missing from a kept scan that ends too early, or says what no scan says. The checksum makes that unlikely.
struct Damaged;

/// The attributes that an entry has whatever it is.
#[derive(Clone)]
struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

struct File<'a> {
    name: &'a CStr,
    stamp: Stamp,
    attributes: Attributes,
    links: u64,
    device: u64,
    digest: [u8; 32],
    link: &'a [u8],
}

struct Directory<'a> {
    path: &'a CStr,
    stamp: Stamp,
    /// `None` when it is only on the way to something else.
    attributes: Option<Attributes>,
    files: usize,
    /// How many bytes describe them.
    length: usize,
}

#[derive(Clone, Copy)]
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> std::result::Result<&'a [u8], Damaged> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Damaged)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> std::result::Result<[u8; N], Damaged> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(Damaged)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u32(&mut self) -> std::result::Result<u32, Damaged> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> std::result::Result<u64, Damaged> {
        self.array().map(u64::from_le_bytes)
    }

    fn i64(&mut self) -> std::result::Result<i64, Damaged> {
        self.array().map(i64::from_le_bytes)
    }

    fn bytes(&mut self) -> std::result::Result<&'a [u8], Damaged> {
        let length = self.u32()?;
        self.take(usize::try_from(length).map_err(|_| Damaged)?)
    }

    fn text(&mut self) -> std::result::Result<&'a CStr, Damaged> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Damaged)?;
        self.0 = &self.0[text.count_bytes() + 1..];
        Ok(text)
    }

    fn stamp(&mut self) -> std::result::Result<Stamp, Damaged> {
        Ok(Stamp {
            device: self.u64()?,
            inode: self.u64()?,
            size: self.u64()?,
            mtime: self.i64()?,
            ctime: self.i64()?,
        })
    }

    fn attributes(&mut self) -> std::result::Result<Attributes, Damaged> {
        let (mode, uid, gid) = (self.u32()?, self.u32()?, self.u32()?);
        let [count] = self.array()?;
        let mut xattrs = BTreeMap::new();
        for _ in 0..count {
            xattrs.insert(self.bytes()?.to_vec(), self.bytes()?.to_vec());
        }
        Ok(Attributes { mode, uid, gid, xattrs })
    }

    fn directory(&mut self) -> std::result::Result<Directory<'a>, Damaged> {
        let (path, stamp) = (self.text()?, self.stamp()?);
        let attributes = match self.array()? {
            [0] => None,
            _ => Some(self.attributes()?),
        };
        let files = usize::try_from(self.u32()?).map_err(|_| Damaged)?;
        let length = usize::try_from(self.u32()?).map_err(|_| Damaged)?;
        Ok(Directory { path, stamp, attributes, files, length })
    }

    fn file(&mut self) -> std::result::Result<File<'a>, Damaged> {
        Ok(File {
            name: self.text()?,
            stamp: self.stamp()?,
            attributes: self.attributes()?,
            links: self.u64()?,
            device: self.u64()?,
            digest: self.array()?,
            link: self.bytes()?,
        })
    }
}

impl Kept {
    /// Returns the scan kept at a place; whether it still holds is for [`verify`](Self::verify) to say.
    pub(super) fn load(place: &Path, root: &Path) -> Option<Self> {
        let bytes = fs::read(place).ok()?;
        let sum = bytes.get(MAGIC.len()..MAGIC.len() + 4)?;
        let sound = bytes.len() >= HEADER
            && bytes.starts_with(MAGIC)
            && sum == libdeflater::crc32(&bytes[MAGIC.len() + 4..]).to_le_bytes();
        sound.then(|| Self { bytes, root: root.to_path_buf() })
    }

    /// Returns the digest of the tree.
    pub(super) fn digest(&self) -> [u8; 32] {
        self.bytes[HEADER - 32..HEADER].try_into().expect("the header was checked")
    }

    fn reader(&self) -> Reader<'_> {
        Reader(&self.bytes[HEADER..])
    }

    /// Asks the kernel, on all cores, which directories are as the scan saw them, with all files in them; `None` when the
    /// folder cannot be opened.
    pub(super) fn verify(&self) -> Option<Vec<bool>> {
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&self.root, directory, Mode::empty()).ok()?;
        self.compare(root.as_fd()).ok()
    }

    fn compare(&self, root: BorrowedFd<'_>) -> std::result::Result<Vec<bool>, Damaged> {
        // Where each part of the work begins: whole directories, about as many files in each.
        let mut starts = vec![];
        let mut reader = self.reader();
        let mut files = 0;
        while !reader.0.is_empty() {
            let here = reader;
            let directory = reader.directory()?;
            reader.take(directory.length)?;
            starts.push((files, here));
            files += directory.files + 1;
        }
        let threads = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(files.div_ceil(FILES_PER_THREAD))
            .max(1);
        let share = files.div_ceil(threads).max(1);
        let mut parts: Vec<(Reader<'_>, usize)> = vec![];
        for (before, reader) in starts {
            if before / share >= parts.len() {
                parts.push((reader, 0));
            }
            if let Some(part) = parts.last_mut() {
                part.1 += 1;
            }
        }
        let check = |(reader, directories)| check(root, reader, directories);
        let Some(last) = parts.pop() else { return Ok(vec![]) };
        std::thread::scope(|scope| {
            let others: Vec<_> =
                parts.into_iter().map(|part| scope.spawn(move || check(part))).collect();
            let last = check(last)?;
            let mut same = vec![];
            for other in others {
                same.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
            }
            same.extend(last);
            Ok(same)
        })
    }

    /// Returns the directories that are still as they were; `same` is what [`verify`](Self::verify) said.
    pub(super) fn known(&self, same: &[bool]) -> Option<Known<'_>> {
        let mut directories: HashMap<&[u8], KnownDirectory<'_>> = HashMap::new();
        let mut reader = self.reader();
        for same in same {
            let mut directory = reader.directory().ok()?;
            let files = Reader(reader.take(directory.length).ok()?);
            let path = directory.path.to_bytes();
            if !path.is_empty() {
                let (parent, name) = split(path);
                // A directory comes before what is in it.
                if let Some(parent) = directories.get_mut(parent) {
                    parent.below.push(name);
                }
            }
            if *same {
                let entry = directory.attributes.take();
                let known = KnownDirectory { directory, entry, files, below: vec![] };
                directories.insert(path, known);
            }
        }
        Some(Known(directories))
    }

    /// Turns the scan into the tree it saw.
    pub(super) fn tree(&self, ownership: Ownership) -> Result<Tree> {
        self.decode(ownership).map_err(|Damaged| {
            Error::new(
                ErrorKind::Corrupt,
                format!("the remembered scan of {} is damaged", self.root.display()),
            )
        })
    }

    fn decode(&self, ownership: Ownership) -> std::result::Result<Tree, Damaged> {
        let mut entries = vec![];
        let mut reader = self.reader();
        let mut put = |scanned| {
            entries.push(to_entry(scanned, ownership).ok_or(Damaged)?);
            Ok(())
        };
        while !reader.0.is_empty() {
            let directory = reader.directory()?;
            let path = directory.path.to_bytes();
            let host = self.root.join(OsStr::from_bytes(path));
            if let Some(attributes) = directory.attributes {
                let (path, host) = (path.to_vec(), host.clone());
                let seen = Seen { path, host, parent: 0, listed: None };
                put(attributes.scanned(seen, directory.stamp))?;
            }
            for _ in 0..directory.files {
                put(reader.file()?.scanned(path, &host, 0))?;
            }
        }
        Ok(entries.into_iter().collect())
    }
}

impl Attributes {
    /// Returns what is known of a directory with these attributes.
    fn scanned(self, seen: Seen, stamp: Stamp) -> Scanned {
        Scanned {
            path: seen.path,
            host: seen.host,
            parent: seen.parent,
            listed: seen.listed,
            stamp,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            links: 1,
            device: 0,
            xattrs: self.xattrs,
            link: None,
            digest: None,
        }
    }
}

impl File<'_> {
    /// Returns what is known of it. `folder` and `host` are where it is, `parent` the place of that in the list of directories.
    fn scanned(self, folder: &[u8], host: &Path, parent: usize) -> Scanned {
        let name = self.name.to_bytes();
        let kind = FileType::from_raw_mode(self.attributes.mode);
        Scanned {
            path: join(folder, name),
            host: host.join(OsStr::from_bytes(name)),
            parent,
            listed: None,
            stamp: self.stamp,
            mode: self.attributes.mode,
            uid: self.attributes.uid,
            gid: self.attributes.gid,
            links: self.links,
            device: self.device,
            xattrs: self.attributes.xattrs,
            link: (kind == FileType::Symlink).then(|| self.link.to_vec()),
            digest: (kind == FileType::RegularFile).then_some(self.digest),
        }
    }
}

/// Whether directories, and all files in each, are as they were.
fn check(
    root: BorrowedFd<'_>,
    mut reader: Reader<'_>,
    directories: usize,
) -> std::result::Result<Vec<bool>, Damaged> {
    let mut same = Vec::with_capacity(directories);
    for _ in 0..directories {
        let directory = reader.directory()?;
        let mut files = Reader(reader.take(directory.length)?);
        let opened = if directory.path.is_empty() {
            rustix::io::fcntl_dupfd_cloexec(root, 0)
        } else {
            open_below(root, directory.path)
        };
        same.push(opened.is_ok_and(|fd| {
            unchanged(&fd, c"", AtFlags::EMPTY_PATH, &directory.stamp)
                && (0..directory.files).all(|_| {
                    files.file().is_ok_and(|file| {
                        unchanged(&fd, file.name, AtFlags::SYMLINK_NOFOLLOW, &file.stamp)
                    })
                })
        }));
    }
    Ok(same)
}

/// The directories of a kept scan that are still as they were.
#[derive(Default)]
pub(super) struct Known<'a>(HashMap<&'a [u8], KnownDirectory<'a>>);

/// A directory that is as it was.
pub(super) struct KnownDirectory<'a> {
    directory: Directory<'a>,
    entry: Option<Attributes>,
    files: Reader<'a>,
    /// The names of directories in it.
    below: Vec<&'a [u8]>,
}

impl Known<'_> {
    pub(super) fn directory(&self, path: &[u8]) -> Option<&KnownDirectory<'_>> {
        self.0.get(path)
    }
}

impl KnownDirectory<'_> {
    pub(super) fn stamp(&self) -> Stamp {
        self.directory.stamp
    }

    pub(super) fn below(&self) -> &[&[u8]] {
        &self.below
    }

    /// Returns the directory itself, if it was part of the scan.
    pub(super) fn scanned(&self, seen: Seen) -> std::result::Result<Scanned, Seen> {
        match self.entry.clone() {
            Some(entry) => Ok(entry.scanned(seen, self.directory.stamp)),
            None => Err(seen),
        }
    }

    /// Returns the files in it. `host` is where the directory is, `place` its place in the list of directories.
    pub(super) fn files(&self, host: &Path, place: usize) -> impl Iterator<Item = Scanned> {
        let mut reader = self.files;
        let path = self.directory.path.to_bytes();
        (0..self.directory.files)
            .map_while(move |_| Some(reader.file().ok()?.scanned(path, host, place)))
    }
}

fn open_below(root: BorrowedFd<'_>, path: &CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(root, path, flags, Mode::empty())
}

fn unchanged(directory: &OwnedFd, name: &CStr, flags: AtFlags, stamp: &Stamp) -> bool {
    rustix::fs::statat(directory, name, flags).is_ok_and(|found| {
        let nanos =
            |seconds: i64, nanos: i64| seconds.saturating_mul(1_000_000_000).saturating_add(nanos);
        *stamp
            == Stamp {
                device: found.st_dev,
                inode: found.st_ino,
                size: u64::try_from(found.st_size).unwrap_or(0),
                mtime: nanos(found.st_mtime, found.st_mtime_nsec as i64),
                ctime: nanos(found.st_ctime, found.st_ctime_nsec as i64),
            }
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    use super::super::{
        Ahead, Filter, Ownership, Scan, ScanOptions, Verdict, scan, scan_ahead, scan_or_recall,
    };
    use super::*;

    struct All;

    impl Filter for All {
        fn verdict(&mut self, _: &[u8], _: bool) -> Verdict {
            Verdict::Take
        }

        fn identity(&self) -> Option<[u8; 32]> {
            Some([7; 32])
        }
    }

    fn look(root: &Path, memory: &Path) -> Scan {
        let options = ScanOptions { ownership: Ownership::Keep, memory: Some(memory) };
        scan_or_recall(root, &mut All, &options).unwrap()
    }

    fn load(root: &Path, memory: &Path) -> Option<Kept> {
        let mut hash = Sha256::new();
        hash.update([7; 32]);
        hash.update([1]);
        Kept::load(&place(memory, root, &hash.finalize().into()), root)
    }

    fn fill(root: &Path) {
        fs::create_dir_all(root.join("d/e")).unwrap();
        fs::create_dir(root.join("empty")).unwrap();
        for n in 0..20 {
            fs::write(root.join(format!("d/e/{n}")), n.to_string()).unwrap();
        }
        fs::write(root.join("top"), "top").unwrap();
        fs::hard_link(root.join("top"), root.join("same")).unwrap();
        symlink("d/e", root.join("link")).unwrap();
        drop(UnixListener::bind(root.join("socket")).unwrap());
    }

    type Change = fn(&Path);

    #[test]
    fn what_has_not_changed_is_recalled_and_every_change_is_seen() {
        let (contexts, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let changes: &[(&str, Change)] = &[
            ("content", |at| fs::write(at.join("d/e/7"), "8").unwrap()),
            ("new", |at| fs::write(at.join("d/new"), "").unwrap()),
            ("deep", |at| fs::write(at.join("empty/new"), "").unwrap()),
            ("removed", |at| fs::remove_file(at.join("d/e/3")).unwrap()),
            ("renamed", |at| fs::rename(at.join("top"), at.join("other")).unwrap()),
            ("swapped", |at| {
                fs::rename(at.join("d/e/1"), at.join("d/e/x")).unwrap();
                fs::rename(at.join("d/e/2"), at.join("d/e/1")).unwrap();
                fs::rename(at.join("d/e/x"), at.join("d/e/2")).unwrap();
            }),
            ("mode", |at| {
                fs::set_permissions(at.join("d/e/1"), fs::Permissions::from_mode(0o600)).unwrap();
            }),
            ("folder's mode", |at| {
                fs::set_permissions(at.join("d"), fs::Permissions::from_mode(0o700)).unwrap();
            }),
            ("link", |at| {
                fs::remove_file(at.join("link")).unwrap();
                symlink("d", at.join("link")).unwrap();
            }),
            ("folder for a file", |at| {
                fs::remove_file(at.join("d/e/9")).unwrap();
                fs::create_dir(at.join("d/e/9")).unwrap();
            }),
            ("link for a folder", |at| {
                fs::rename(at.join("d"), at.join("moved")).unwrap();
                symlink("moved", at.join("d")).unwrap();
            }),
            ("whole", |at| {
                fs::rename(at, at.with_extension("away")).unwrap();
                fs::create_dir(at).unwrap();
            }),
        ];
        let place_of = |name: &str| contexts.path().join(name);
        for (name, _) in changes {
            fill(&place_of(name));
        }
        let young = place_of(changes[0].0);
        look(&young, memory.path());
        let kept = |root: &Path| {
            let kept = load(root, memory.path())?;
            kept.verify()?.iter().all(|same| *same).then_some(kept)
        };
        assert!(kept(&young).is_none(), "what changed a moment ago is not trusted");
        std::thread::sleep(Duration::from_millis(2200));
        for (name, change) in changes {
            let root = place_of(name);
            let first = look(&root, memory.path());
            let recalled = kept(&root).unwrap_or_else(|| panic!("{name} should be kept"));
            assert_eq!(recalled.digest(), first.digest(), "{name}");
            let options = ScanOptions { ownership: Ownership::Keep, memory: None };
            let tree = scan(&root, &mut All, &options).unwrap();
            assert_eq!(recalled.tree(Ownership::Keep).unwrap(), tree, "{name}");
            assert_eq!(look(&root, memory.path()).tree().unwrap(), tree.into(), "{name}");
            change(&root);
            assert!(kept(&root).is_none(), "{name} should be seen");
            // What has not changed is not looked at again, which must not show.
            let tree = scan(&root, &mut All, &options).unwrap();
            assert_eq!(look(&root, memory.path()).tree().unwrap(), tree.into(), "{name}");
        }
    }

    #[test]
    fn only_what_changed_a_moment_ago_is_looked_at_again() {
        let (context, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let root = context.path();
        fill(root);
        std::thread::sleep(Duration::from_millis(2200));
        fs::write(root.join("d/e/7"), "x").unwrap();
        look(root, memory.path());
        let same = load(root, memory.path()).unwrap().verify().unwrap();
        assert_eq!(same.iter().filter(|same| !**same).count(), 1, "d/e is young: {same:?}");
        assert_eq!(same.len(), 4);
        // The times of the next change may be those of this one.
        let options = ScanOptions { ownership: Ownership::Keep, memory: None };
        for content in ["y", "z"] {
            fs::write(root.join("d/e/7"), content).unwrap();
            let tree = scan(root, &mut All, &options).unwrap();
            assert_eq!(look(root, memory.path()).tree().unwrap(), tree.into());
        }
    }

    #[test]
    fn a_comparison_that_has_begun_is_used_by_who_asks_for_the_same() {
        let (context, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for n in 0..1000 {
            fs::write(context.path().join(format!("file-{n}")), "x").unwrap();
        }
        assert!(Ahead::start(memory.path(), context.path()).is_none(), "nothing is kept yet");
        std::thread::sleep(Duration::from_millis(2200));
        let first = look(context.path(), memory.path());
        assert!(Ahead::start(memory.path(), memory.path()).is_none(), "another folder");
        let options = ScanOptions { ownership: Ownership::Keep, memory: Some(memory.path()) };
        let again = |ahead: &Ahead| {
            scan_ahead(context.path(), &mut All, &options, Some(ahead)).unwrap().digest()
        };
        let ahead = Ahead::start(memory.path(), context.path()).unwrap();
        assert_eq!(again(&ahead), first.digest());
        fs::write(context.path().join("file-7"), "y").unwrap();
        assert_ne!(again(&ahead), first.digest(), "an outcome is used once");
        let ahead = Ahead::start(memory.path(), context.path()).unwrap();
        assert_ne!(again(&ahead), first.digest());
    }

    #[test]
    fn a_damaged_scan_is_no_scan() {
        let (context, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fill(context.path());
        let options = ScanOptions { ownership: Ownership::Keep, memory: None };
        let known = Known::default();
        let (found, listed) =
            super::super::look(context.path(), &mut All, &options, &known).unwrap();
        let at = memory.path().join(format!("{}.{}", "0".repeat(64), "0".repeat(16)));
        Draft::new(at.clone(), i64::MAX, &listed, &found).save(&[3; 32]);
        assert_eq!(Kept::load(&at, context.path()).unwrap().digest(), [3; 32]);
        let bytes = fs::read(&at).unwrap();
        for length in (0..bytes.len()).step_by(11) {
            fs::write(&at, &bytes[..length]).unwrap();
            assert!(Kept::load(&at, context.path()).is_none(), "cut at {length}");
        }
        for place in (0..bytes.len()).step_by(13) {
            let mut bytes = bytes.clone();
            bytes[place] ^= 0x10;
            fs::write(&at, bytes).unwrap();
            assert!(Kept::load(&at, context.path()).is_none(), "changed at {place}");
        }
    }
}
