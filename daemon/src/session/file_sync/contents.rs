//! The bytes of clients' files, kept between builds so that a client sends only what changed.
//!
//! ```text
//! <root>/<hash of a shared key>/
//!   lock               held by the process that uses this folder
//!   index              which file of the client has which bytes, see `index`
//!   <hex>/<number>     the bytes of one file, or of many small ones, never changed once written
//! ```
//!
//! Small files are put together, because a file system takes longer to make a file than to write a few thousand bytes.
//! When less than half of such a pack is still wanted, it is dropped, and the client sends the rest of it again.
//!
//! No name that a client chose is ever a name on this disk, so no path of a client can lead anywhere. A file that changed
//! gets a new number; the old bytes stay for as long as a tree refers to them.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};
use slipway_engine::store::tree::scan::digest_file;
use slipway_engine::store::tree::{Content, PartFile};
use slipway_engine::store::{Error, ErrorKind};
use slipway_spec::digest::to_hex;

use super::index::{Change, Index, Kept, Place};

/// Files per folder: few enough for any file system, enough that folders are few.
const PER_FOLDER: u64 = 1024;
/// Processes that may use the files of one shared key at the same time, each with a folder of its own.
const MAX_FOLDERS: u32 = 16;
/// How often a folder is made again that is removed at the same time.
const MAX_TRIES: u32 = 8;
const INDEX: &str = "index";
const LOCK: &str = "lock";

/// The kept files of all clients.
#[derive(Clone, Debug)]
pub struct FileCache(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    open: Mutex<HashMap<String, Slot>>,
}

/// Opened once, while those who come meanwhile wait.
type Slot = Arc<Mutex<Option<Arc<Contents>>>>;

/// What is kept of one folder of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedFolder {
    /// Tells it from others.
    pub id: String,
    /// Files that are kept.
    pub files: usize,
    /// Their bytes.
    pub bytes: u64,
    /// When a transfer last began.
    pub used: SystemTime,
}

/// The kept files of one shared key.
#[derive(Debug)]
pub(crate) struct Contents {
    folder: PathBuf,
    next: AtomicU64,
    state: Mutex<State>,
    // Held for its lock, and for its time, which is that of the last use.
    lock: File,
}

#[derive(Debug)]
struct State {
    index: Arc<Index>,
    // What trees may refer to.
    lent: HashMap<u64, Lent>,
    // Numbers that the index names no more.
    condemned: HashSet<u64>,
    // Transfers under way, which may lend anything that was in the index when they began.
    active: usize,
}

/// What trees refer to an object by.
#[derive(Debug)]
enum Lent {
    Whole(Weak<Path>),
    Pack(Weak<PartFile>),
}

impl Lent {
    fn is_used(&self) -> bool {
        match self {
            Self::Whole(path) => path.strong_count() > 0,
            Self::Pack(file) => file.strong_count() > 0,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn at(verb: &str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let tried = format!("cannot {verb} {}", path.display());
    move |error| Error::io(tried, error)
}

impl FileCache {
    /// Keeps files in a folder, which is made when it is first needed.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self(Arc::new(Inner { root: root.into(), open: Mutex::default() }))
    }

    /// Opens the files of a shared key. Blocks.
    pub(crate) fn contents(&self, shared_key: &str) -> Result<Arc<Contents>, Error> {
        let slot = lock(&self.0.open).entry(shared_key.to_owned()).or_default().clone();
        let mut slot = lock(&slot);
        if let Some(contents) = &*slot {
            return Ok(contents.clone());
        }
        let name = to_hex(&Sha256::digest(shared_key.as_bytes())[..16]);
        let contents = Arc::new(Contents::open(&self.0.root, &name)?);
        *slot = Some(contents.clone());
        Ok(contents)
    }

    /// Closes what neither a transfer nor a tree uses; it is opened again when it is needed. Returns how many folders that
    /// were.
    pub(crate) fn close_unused(&self) -> usize {
        let mut open = lock(&self.0.open);
        let before = open.len();
        // Nobody gets at a slot meanwhile who has not got it already.
        open.retain(|_, slot| {
            Arc::strong_count(slot) > 1
                || lock(slot)
                    .as_ref()
                    .is_some_and(|contents| Arc::strong_count(contents) > 1 || contents.is_used())
        });
        before - open.len()
    }

    /// Lists what is kept. Blocks.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn folders(&self) -> Result<Vec<CachedFolder>, Error> {
        let root = &self.0.root;
        let entries = match fs::read_dir(root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => return Err(at("read", root)(error)),
        };
        let mut found = vec![];
        for entry in entries {
            let entry = entry.map_err(at("read", root))?;
            let lock = entry.path().join(LOCK);
            let Ok(used) = fs::metadata(&lock).and_then(|lock| lock.modified()) else { continue };
            let index = fs::read(entry.path().join(INDEX)).ok();
            let Some(index) = index.and_then(|bytes| Index::from_bytes(&bytes)) else { continue };
            let (files, bytes) = index
                .iter()
                .fold((0, 0), |(files, bytes), kept| (files + 1, bytes + kept.stamp.size));
            if files > 0 {
                let id = entry.file_name().to_string_lossy().into_owned();
                found.push(CachedFolder { id, files, bytes, used });
            }
        }
        Ok(found)
    }

    /// Drops what is kept of a folder; what a tree refers to stays until it does not any more. Returns whether anything
    /// could be dropped: not while a transfer runs or another process uses the folder. Blocks.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn remove(&self, id: &str) -> Result<bool, Error> {
        let slots: Vec<Slot> = lock(&self.0.open).values().cloned().collect();
        for slot in slots {
            if let Some(contents) = &*lock(&slot)
                && contents.folder.file_name().is_some_and(|name| name == id)
            {
                return Ok(contents.clear());
            }
        }
        let folder = self.0.root.join(id);
        if Path::new(id).components().count() != 1 || !folder.join(LOCK).is_file() {
            return Ok(false);
        }
        match Contents::try_open(folder)? {
            Some(contents) => Ok(contents.clear()),
            None => Ok(false),
        }
    }
}

impl Contents {
    fn open(root: &Path, name: &str) -> Result<Self, Error> {
        for attempt in 0..MAX_FOLDERS {
            let folder = match attempt {
                0 => root.join(name),
                _ => root.join(format!("{name}.{attempt}")),
            };
            if let Some(contents) = Self::try_open(folder)? {
                return Ok(contents);
            }
        }
        Err(Error::new(
            ErrorKind::Io,
            format!("more than {MAX_FOLDERS} processes use {}", root.join(name).display()),
        ))
    }

    /// Opens a folder; `None` when another process uses it.
    fn try_open(folder: PathBuf) -> Result<Option<Self>, Error> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(at("create", &folder))?;
        let path = folder.join(LOCK);
        let lock = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(at("open", &path))?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Self::load(folder, lock).map(Some),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(at("lock", &path)(error.into())),
        }
    }

    fn load(folder: PathBuf, held: File) -> Result<Self, Error> {
        let boot = boot();
        let path = folder.join(INDEX);
        let mut index = match fs::read(&path) {
            // Without a list, or with a damaged one, everything is simply transferred again.
            Ok(bytes) => Index::from_bytes(&bytes).unwrap_or_else(|| Index::empty(boot)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Index::empty(boot),
            Err(error) => return Err(at("read", &path)(error)),
        };
        let present = present(&folder)?;
        // Nothing was waited for to reach the disk: what was written before the machine stopped may not be there.
        let trusted = index.boot == boot;
        let mut kept_bytes = KeptBytes::new(&folder);
        index.retain(|kept| {
            present.contains(&kept.place.object)
                && (trusted || kept_bytes.digest(kept) == Some(kept.digest))
        });
        index.boot = boot;
        let named: HashSet<u64> = index.iter().map(|kept| kept.place.object).collect();
        let condemned = present.iter().copied().filter(|object| !named.contains(object)).collect();
        let contents = Self {
            next: AtomicU64::new(present.iter().max().map_or(0, |last| last + 1)),
            state: Mutex::new(State {
                index: Arc::new(index),
                lent: HashMap::new(),
                condemned,
                active: 0,
            }),
            folder,
            lock: held,
        };
        contents.sweep(lock(&contents.state));
        Ok(contents)
    }

    /// Begins a transfer.
    pub(crate) fn begin(self: &Arc<Self>) -> Transfer {
        if let Err(error) = self.lock.set_modified(SystemTime::now()) {
            tracing::debug!(folder = %self.folder.display(), %error, "the time of use is not kept");
        }
        let mut state = lock(&self.state);
        state.active += 1;
        Transfer { index: state.index.clone(), contents: self.clone() }
    }

    /// Lends the bytes of a file; they stay as long as the content is held.
    fn lend(&self, place: Place, digest: [u8; 32]) -> Content {
        let mut state = lock(&self.state);
        let path = || object_path(&self.folder, place.object);
        let known = state.lent.get(&place.object);
        match place.offset {
            None => {
                let known = match known {
                    Some(Lent::Whole(path)) => path.upgrade(),
                    _ => None,
                };
                let path = known.unwrap_or_else(|| {
                    let path: Arc<Path> = path().into();
                    state.lent.insert(place.object, Lent::Whole(Arc::downgrade(&path)));
                    path
                });
                Content::Host { path, digest: Some(digest) }
            }
            Some(offset) => {
                let known = match known {
                    Some(Lent::Pack(file)) => file.upgrade(),
                    _ => None,
                };
                let file = known.unwrap_or_else(|| {
                    let file = Arc::new(PartFile::new(path()));
                    state.lent.insert(place.object, Lent::Pack(Arc::downgrade(&file)));
                    file
                });
                Content::Part { file, offset, digest }
            }
        }
    }

    /// Tells whether a transfer runs or a tree refers to files.
    fn is_used(&self) -> bool {
        let state = lock(&self.state);
        state.active > 0 || state.lent.values().any(Lent::is_used)
    }

    /// Drops everything, unless a transfer runs.
    fn clear(&self) -> bool {
        let mut state = lock(&self.state);
        let empty = Index::empty(state.index.boot);
        if state.active > 0 {
            return false;
        }
        if let Err(error) = self.save(&empty) {
            tracing::debug!(folder = %self.folder.display(), %error, "the list was not emptied");
        }
        let dropped = state.index.dropped(&empty);
        state.condemned.extend(dropped);
        state.index = Arc::new(empty);
        self.sweep(state);
        true
    }

    /// Does something while nothing can be lent.
    #[cfg(test)]
    pub(crate) fn hold(&self, work: impl FnOnce()) {
        let state = lock(&self.state);
        work();
        drop(state);
    }

    fn commit(&self, change: &Change<'_>) {
        let mut state = lock(&self.state);
        let (mut after, differs) = state.index.changed(change);
        if !differs {
            return;
        }
        let sparse = self.sparse(&after);
        if !sparse.is_empty() {
            after.retain(|kept| !sparse.contains(&kept.place.object));
        }
        let dropped = state.index.dropped(&after);
        state.condemned.extend(dropped);
        // Another transfer may have dropped meanwhile what this one still saw.
        if !state.condemned.is_empty() {
            for kept in after.iter() {
                state.condemned.remove(&kept.place.object);
            }
        }
        if let Err(error) = self.save(&after) {
            // Only an aid to speed: what the list does not name is transferred again after the next start.
            tracing::warn!(folder = %self.folder.display(), %error, "the list of transferred files was not written");
        }
        state.index = Arc::new(after);
    }

    /// Finds packs of which less than half is wanted.
    fn sparse(&self, index: &Index) -> HashSet<u64> {
        let mut wanted: HashMap<u64, u64> = HashMap::new();
        for kept in index.iter().filter(|kept| kept.place.offset.is_some()) {
            *wanted.entry(kept.place.object).or_default() += kept.stamp.size;
        }
        let is_sparse = |(object, wanted): (u64, u64)| {
            let size = fs::metadata(object_path(&self.folder, object)).map_or(0, |file| file.len());
            (wanted < size / 2).then_some(object)
        };
        wanted.into_iter().filter_map(is_sparse).collect()
    }

    fn save(&self, index: &Index) -> io::Result<()> {
        let temporary = self.folder.join(format!("{INDEX}.new"));
        fs::write(&temporary, index.to_bytes())?;
        fs::rename(&temporary, self.folder.join(INDEX))
    }

    /// Removes what is neither in the index nor used by a tree. No transfer may be under way that began before this was
    /// asked: nothing else can want back what is not in the index.
    fn sweep(&self, mut state: MutexGuard<'_, State>) {
        state.lent.retain(|_, lent| lent.is_used());
        let condemned = std::mem::take(&mut state.condemned);
        let (used, unused): (HashSet<u64>, HashSet<u64>) =
            condemned.into_iter().partition(|object| state.lent.contains_key(object));
        state.condemned = used;
        drop(state);
        let mut folders = HashSet::new();
        for object in unused {
            let path = object_path(&self.folder, object);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    // It is found again at the next start.
                    tracing::debug!(path = %path.display(), %error, "an old file stays behind");
                }
                _ => folders.extend(path.parent().map(Path::to_path_buf)),
            }
        }
        for folder in folders {
            // Fails as long as anything is in it, which is most of the time.
            fs::remove_dir(folder).ok();
        }
    }
}

/// A transfer under way. Blocks when it is dropped, to remove what nobody needs any more.
#[derive(Debug)]
pub(crate) struct Transfer {
    contents: Arc<Contents>,
    index: Arc<Index>,
}

impl Transfer {
    /// Returns the files as they were when the transfer began.
    pub(crate) fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Returns a handle that lends, and does not block.
    pub(crate) fn lender(&self) -> Lender {
        Lender(self.contents.clone())
    }

    /// Creates a file for new bytes.
    pub(crate) fn create(&self) -> Result<(u64, File, PathBuf), Error> {
        let object = self.contents.next.fetch_add(1, Ordering::Relaxed);
        let path = object_path(&self.contents.folder, object);
        let mut tries = 0;
        let file = loop {
            let made = fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(&path);
            // The folder is not there yet, or was just removed for being empty.
            let missing = made.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
            let Some(folder) = path.parent().filter(|_| missing && tries < MAX_TRIES) else {
                break made;
            };
            tries += 1;
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)
                .map_err(at("create", folder))?;
        };
        Ok((object, file.map_err(at("create", &path))?, path))
    }

    /// Creates a file for the bytes of many files. It stays if one of them comes into the index.
    pub(crate) fn create_pack(&self) -> Result<(u64, File, PathBuf), Error> {
        let made = self.create()?;
        self.discard(made.0);
        Ok(made)
    }

    /// Removes an object once no tree uses it; it is not to be in the index.
    pub(crate) fn discard(&self, object: u64) {
        lock(&self.contents.state).condemned.insert(object);
    }

    /// Puts what the transfer brought into the index.
    pub(crate) fn commit(&self, scope: u64, seen: &[Kept], complete: bool) {
        self.contents.commit(&Change { scope, seen, complete });
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let mut state = lock(&self.contents.state);
        state.active -= 1;
        if state.active == 0 {
            self.contents.sweep(state);
        }
    }
}

/// Lends kept files during a transfer.
#[derive(Clone, Debug)]
pub(crate) struct Lender(Arc<Contents>);

impl Lender {
    /// Lends the bytes of a file; they stay as long as the content is held.
    pub(crate) fn lend(&self, place: Place, digest: [u8; 32]) -> Content {
        self.0.lend(place, digest)
    }
}

/// Reads what is kept of files, one after the other.
struct KeptBytes<'a> {
    folder: &'a Path,
    buffer: Vec<u8>,
    /// Opened once for all that is in them.
    packs: HashMap<u64, PartFile>,
}

impl<'a> KeptBytes<'a> {
    fn new(folder: &'a Path) -> Self {
        Self { folder, buffer: vec![0; 128 * 1024], packs: HashMap::new() }
    }

    /// Computes the digest of what is kept of a file.
    fn digest(&mut self, kept: &Kept<&[u8]>) -> Option<[u8; 32]> {
        let Place { object, offset } = kept.place;
        let path = || object_path(self.folder, object);
        let Some(offset) = offset else { return digest_file(&path(), &mut self.buffer).ok() };
        let pack = self.packs.entry(object).or_insert_with(|| PartFile::new(path()));
        let mut bytes = vec![0; usize::try_from(kept.stamp.size).ok()?];
        pack.read(offset, &mut bytes).ok()?;
        Some(Sha256::digest(&bytes).into())
    }
}

fn object_path(folder: &Path, object: u64) -> PathBuf {
    folder.join(format!("{:x}/{object:x}", object / PER_FOLDER))
}

/// Lists the objects that are on disk.
fn present(folder: &Path) -> Result<HashSet<u64>, Error> {
    let number = |entry: &fs::DirEntry| {
        entry.file_name().to_str().and_then(|name| u64::from_str_radix(name, 16).ok())
    };
    let mut found = HashSet::new();
    for group in fs::read_dir(folder).map_err(at("read", folder))? {
        let group = group.map_err(at("read", folder))?;
        if number(&group).is_none() || !group.file_type().map_err(at("read", folder))?.is_dir() {
            continue;
        }
        let path = group.path();
        for object in fs::read_dir(&path).map_err(at("read", &path))? {
            found.extend(number(&object.map_err(at("read", &path))?));
        }
    }
    Ok(found)
}

/// Tells this start of the machine from others.
fn boot() -> u64 {
    let id = fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_else(|_| {
        // Nothing is trusted then, across starts of the program.
        format!("{}-{:?}", std::process::id(), std::time::SystemTime::now()).into_bytes()
    });
    let digest = Sha256::digest(id);
    digest.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}
