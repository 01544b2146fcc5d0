//! Folders that outlive builds beside layers: what processes keep in cache mounts, and clones of git repositories.
//!
//! ```text
//! kept/<kind>/<hash>/            one name: `cache` or `git`
//!   lock                         held while an instance is chosen, made or removed
//!   info                         what the name is, for people, and the first instance that may still be had
//!   <n>/                         an instance
//!     lock                       held by whoever uses it: shared, or alone; its time is when it was last used
//!     size                       how large it was when it had last been used, where somebody asked
//!     fs/                        the files
//! ```
//!
//! The kernel keeps the locks, so they hold between processes and end with them. There are several instances of a name
//! where processes that must not share it ran at the same time.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::Store;
use crate::error::{IoContext as _, Result};
use crate::folder::{disk_usage, remove_tree};

/// What a kept folder is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub enum KeptKind {
    /// A cache mount.
    Cache,
    /// A clone of a git repository.
    Git,
}

impl KeptKind {
    const ALL: [Self; 2] = [Self::Cache, Self::Git];

    fn folder(self) -> &'static str {
        match self {
            Self::Cache => "cache",
            Self::Git => "git",
        }
    }
}

/// How a folder may be used by several at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Anybody who shares it may use it at the same time.
    Shared,
    /// Nobody else uses it; who comes meanwhile gets another.
    Private,
    /// Nobody else uses it; who comes meanwhile waits.
    Locked,
}

/// A folder in use. Dropping it lets others have it.
#[derive(Debug)]
pub struct KeptFolder {
    home: PathBuf,
    lock: File,
}

impl KeptFolder {
    /// Returns the folder with the files.
    pub fn folder(&self) -> PathBuf {
        self.home.join("fs")
    }
}

impl Drop for KeptFolder {
    fn drop(&mut self) {
        touch(&self.lock);
    }
}

/// One instance of a kept folder, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct KeptItem {
    /// What it is for.
    pub kind: KeptKind,
    /// What it is called: a cache mount's id, a repository's URL.
    pub name: String,
    /// Where it is in the state folder.
    pub path: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// When it was made, in nanoseconds since 1970.
    pub created: i64,
    /// When it was last used, in nanoseconds since 1970.
    pub used: i64,
    /// Whether a process uses it now.
    pub busy: bool,
}

#[derive(Serialize, Deserialize)]
struct Info {
    name: String,
    /// Instances of lower numbers are only for those who have them.
    #[serde(default)]
    first: u64,
}

impl Store {
    /// Takes the folder of a name and what it begins with; `None` when it is in use and must be waited for. `key` tells
    /// folders of one name apart; `fill` puts into a new one what it begins with.
    ///
    /// # Errors
    /// When the disk fails, or `fill` does.
    pub fn try_keep(
        &self,
        kind: KeptKind,
        name: &str,
        key: &[u8],
        sharing: Sharing,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Option<KeptFolder>> {
        let top = self.kept_top(kind, name, key);
        let (_choosing, first) = self.choose(&top, name)?;
        let instances: Vec<u64> =
            instances(&top)?.into_iter().filter(|number| *number >= first).collect();
        let operation = match sharing {
            Sharing::Shared => FlockOperation::NonBlockingLockShared,
            Sharing::Private | Sharing::Locked => FlockOperation::NonBlockingLockExclusive,
        };
        for number in &instances {
            let home = top.join(number.to_string());
            // Half an instance is what a crash while removing left.
            let Ok(lock) = File::open(home.join("lock")) else { continue };
            if try_lock(&lock, operation).at("lock", &home)? && home.join("fs").is_dir() {
                touch(&lock);
                return Ok(Some(KeptFolder { home, lock }));
            }
        }
        if sharing == Sharing::Locked && !instances.is_empty() {
            return Ok(None);
        }
        let made = self.temporary("kept");
        let files = made.join("fs");
        fs::create_dir_all(&files).at("create", &files)?;
        // The umask must not decide.
        rustix::fs::chmod(&files, rustix::fs::Mode::from_raw_mode(0o755))
            .at("set the mode of", &files)?;
        fill(&files)?;
        let path = made.join("lock");
        let lock = File::create_new(&path).at("create", &path)?;
        try_lock(&lock, operation).at("lock", &path)?;
        let home = top.join(instances.last().map_or(first, |last| last + 1).to_string());
        fs::rename(&made, &home).at("create", &home)?;
        Ok(Some(KeptFolder { home, lock }))
    }

    /// Makes whoever asks for folders of this name from now on begin anew. Who uses one now goes on with it.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn forget_kept(&self, kind: KeptKind, name: &str) -> Result<()> {
        for top in self.kept_tops(kind)? {
            if info(&top).is_none_or(|info| info.name != name) {
                continue;
            }
            // Folders keep their names: who uses one may still be about to open it.
            let (_choosing, first) = self.choose(&top, name)?;
            let first = instances(&top)?.last().map_or(first, |last| last + 1);
            self.write_info(&top, &Info { name: name.into(), first })?;
            for number in instances(&top)? {
                let home = top.join(number.to_string());
                if let Some(_idle) = idle(&home, i64::MAX)? {
                    self.remove_whole(&home)?;
                }
            }
        }
        Ok(())
    }

    /// Lists kept folders.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn kept(&self) -> Result<Vec<KeptItem>> {
        let mut items = vec![];
        for kind in KeptKind::ALL {
            for top in self.kept_tops(kind)? {
                let name = info(&top).map(|info| info.name).unwrap_or_default();
                let (_choosing, _) = self.choose(&top, &name)?;
                for number in instances(&top)? {
                    let home = top.join(number.to_string());
                    let Ok(lock) = File::open(home.join("lock")) else { continue };
                    let busy = !try_lock(&lock, FlockOperation::NonBlockingLockExclusive)
                        .at("lock", &home)?;
                    items.push(KeptItem {
                        kind,
                        name: name.clone(),
                        path: home
                            .strip_prefix(self.root())
                            .unwrap_or(&home)
                            .to_string_lossy()
                            .into_owned(),
                        bytes: 0,
                        created: created(&home).unwrap_or_else(|| used(&lock)),
                        used: used(&lock),
                        busy,
                    });
                }
            }
        }
        // Measuring takes long, so nobody is kept waiting for it.
        for item in &mut items {
            item.bytes = measure(&self.root().join(&item.path), item)?;
        }
        Ok(items)
    }

    /// Removes the folders that nobody uses and nobody has used since `cutoff`, in nanoseconds since 1970. Returns how
    /// many and how many bytes.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn prune_kept(&self, cutoff: i64) -> Result<(usize, u64)> {
        let (mut count, mut bytes) = (0, 0);
        for kind in KeptKind::ALL {
            for top in self.kept_tops(kind)? {
                let name = info(&top).map(|info| info.name).unwrap_or_default();
                let (_choosing, first) = self.choose(&top, &name)?;
                for number in instances(&top)? {
                    // What nobody can have any more is never too young.
                    let cutoff = if number < first { i64::MAX } else { cutoff };
                    let home = top.join(number.to_string());
                    let Some(_idle) = idle(&home, cutoff)? else { continue };
                    bytes += disk_usage(&home).at("read", &home)?;
                    count += 1;
                    self.remove_whole(&home)?;
                }
                if instances(&top)?.is_empty() {
                    self.remove_whole(&top)?;
                }
            }
        }
        Ok((count, bytes))
    }

    /// Removes one instance, unless somebody uses it or has used it since `cutoff`, in nanoseconds since 1970. Returns
    /// whether it went.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn remove_kept(&self, path: &str, cutoff: i64) -> Result<bool> {
        let mut parts = Path::new(path).components().map(|part| part.as_os_str().to_str());
        let parts: [Option<&str>; 4] = std::array::from_fn(|_| parts.next().flatten());
        let [Some("kept"), Some(kind), Some(name), Some(number)] = parts else { return Ok(false) };
        let Some(kind) = KeptKind::ALL.into_iter().find(|known| known.folder() == kind) else {
            return Ok(false);
        };
        let top = self.kept_folder(kind).join(name);
        let Ok(number) = number.parse::<u64>() else { return Ok(false) };
        if !name.bytes().all(|byte| byte.is_ascii_hexdigit())
            || !top.join(number.to_string()).is_dir()
        {
            return Ok(false);
        }
        let (_choosing, _) =
            self.choose(&top, &info(&top).map(|info| info.name).unwrap_or_default())?;
        let home = top.join(number.to_string());
        let Some(_idle) = idle(&home, cutoff)? else { return Ok(false) };
        self.remove_whole(&home)?;
        if instances(&top)?.is_empty() {
            self.remove_whole(&top)?;
        }
        Ok(true)
    }

    /// Removes a folder at once for everybody else.
    fn remove_whole(&self, folder: &Path) -> Result<()> {
        let gone = self.temporary("pruned");
        fs::rename(folder, &gone).at("remove", folder)?;
        remove_tree(&gone).at("remove", &gone)
    }

    fn kept_folder(&self, kind: KeptKind) -> PathBuf {
        self.root().join("kept").join(kind.folder())
    }

    fn kept_top(&self, kind: KeptKind, name: &str, key: &[u8]) -> PathBuf {
        let mut hash = Sha256::new();
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        hash.update(key);
        let hex: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        self.kept_folder(kind).join(hex)
    }

    fn kept_tops(&self, kind: KeptKind) -> Result<Vec<PathBuf>> {
        let folder = self.kept_folder(kind);
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            other => other.at("read", &folder)?,
        };
        let mut tops = vec![];
        for entry in entries {
            let path = entry.at("read", &folder)?.path();
            if path.is_dir() {
                tops.push(path);
            }
        }
        tops.sort();
        Ok(tops)
    }

    /// Holds a name's instances still, making the name where it is new.
    fn choose(&self, top: &Path, name: &str) -> Result<(File, u64)> {
        loop {
            fs::create_dir_all(top).at("create", top)?;
            let path = top.join("lock");
            let lock = match File::options().create(true).append(true).open(&path) {
                // It was removed in between.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                other => other.at("open", &path)?,
            };
            rustix::io::retry_on_intr(|| rustix::fs::flock(&lock, FlockOperation::LockExclusive))
                .at("lock", &path)?;
            let ours = lock.metadata().at("read", &path)?;
            // The name may have been removed while this one waited.
            let Ok(there) = fs::metadata(&path) else { continue };
            if (there.dev(), there.ino()) != (ours.dev(), ours.ino()) {
                continue;
            }
            let first = match info(top) {
                Some(info) => info.first,
                None => {
                    let first = instances(top)?.last().map_or(0, |last| last + 1);
                    self.write_info(top, &Info { name: name.into(), first })?;
                    first
                }
            };
            return Ok((lock, first));
        }
    }

    fn write_info(&self, top: &Path, info: &Info) -> Result<()> {
        self.replace_file(&top.join("info"), &serde_json::to_vec(info).unwrap_or_default())
    }
}

/// Whether nobody uses an instance and nobody has used it since `cutoff`, while the name's lock is held. What is returned then
/// is its lock, if it has one, which keeps it idle.
fn idle(home: &Path, cutoff: i64) -> Result<Option<Option<File>>> {
    let lock = File::open(home.join("lock")).ok();
    if let Some(lock) = &lock
        && (used(lock) >= cutoff
            || !try_lock(lock, FlockOperation::NonBlockingLockExclusive).at("lock", home)?)
    {
        return Ok(None);
    }
    Ok(Some(lock))
}

fn instances(top: &Path) -> Result<Vec<u64>> {
    let mut numbers = vec![];
    let entries = match fs::read_dir(top) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(numbers),
        other => other.at("read", top)?,
    };
    for entry in entries {
        numbers.extend(
            entry.at("read", top)?.file_name().to_str().and_then(|n| n.parse::<u64>().ok()),
        );
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn info(top: &Path) -> Option<Info> {
    serde_json::from_slice(&fs::read(top.join("info")).ok()?).ok()
}

fn try_lock(lock: &File, operation: FlockOperation) -> io::Result<bool> {
    match rustix::io::retry_on_intr(|| rustix::fs::flock(lock, operation)) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Returns the size of an instance. It is written down where nobody uses the instance, so that a large one that nobody has
/// used since is not measured again.
fn measure(home: &Path, item: &KeptItem) -> Result<u64> {
    let note = home.join("size");
    let noted = fs::read_to_string(&note).ok().and_then(|text| {
        let (bytes, used) = text.split_once(' ')?;
        let used: i64 = used.trim_end().parse().ok()?;
        (used == item.used && !item.busy).then(|| bytes.parse().ok())?
    });
    if let Some(bytes) = noted {
        return Ok(bytes);
    }
    let bytes = disk_usage(home).at("read", home)?;
    // A full disk, or one that removed it meanwhile: it is measured again the next time.
    if !item.busy
        && let Err(error) = fs::write(&note, format!("{bytes} {}\n", item.used))
    {
        tracing::debug!(path = %note.display(), %error, "the size is not kept");
    }
    Ok(bytes)
}

fn created(home: &Path) -> Option<i64> {
    let created = fs::metadata(home).and_then(|metadata| metadata.created()).ok()?;
    let since = created.duration_since(UNIX_EPOCH).ok()?;
    i64::try_from(since.as_nanos()).ok()
}

/// The time of use is a help for the collector; a lock whose time cannot be set still locks.
fn touch(lock: &File) {
    let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
    let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
    let _set = rustix::fs::futimens(lock, &times);
}

fn used(lock: &File) -> i64 {
    lock.metadata()
        .and_then(|metadata| metadata.modified())
        .ok()
        .and_then(|time: SystemTime| time.duration_since(UNIX_EPOCH).ok())
        .map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        (folder, store)
    }

    fn take(store: &Store, name: &str, sharing: Sharing) -> Option<KeptFolder> {
        store.try_keep(KeptKind::Cache, name, b"", sharing, |_| Ok(())).unwrap()
    }

    #[test]
    fn what_is_kept_is_found_again_by_another_process() {
        let (folder, store) = store();
        let first = take(&store, "go", Sharing::Shared).unwrap();
        fs::write(first.folder().join("f"), "x").unwrap();
        drop((first, store));
        let store = Store::open(&folder.path().join("store")).unwrap();
        let again = take(&store, "go", Sharing::Private).unwrap();
        assert_eq!(fs::read(again.folder().join("f")).unwrap(), b"x");
        let other = take(&store, "npm", Sharing::Shared).unwrap();
        assert!(!other.folder().join("f").exists());
        let keyed = store
            .try_keep(KeptKind::Cache, "go", b"base", Sharing::Shared, |fs| {
                fs::write(fs.join("seed"), "s").at("write", fs)
            })
            .unwrap()
            .unwrap();
        assert!(keyed.folder().join("seed").exists() && !keyed.folder().join("f").exists());
    }

    #[test]
    fn sharing_decides_who_gets_what() {
        let (folder, store) = store();
        let second = Store::open(&folder.path().join("store")).unwrap();
        let one = take(&store, "s", Sharing::Shared).unwrap();
        let two = take(&second, "s", Sharing::Shared).unwrap();
        assert_eq!(one.folder(), two.folder());
        let alone = take(&second, "s", Sharing::Private).unwrap();
        assert_ne!(alone.folder(), one.folder());
        drop((one, two));
        assert_ne!(take(&store, "s", Sharing::Private).unwrap().folder(), alone.folder());

        let held = take(&store, "l", Sharing::Locked).unwrap();
        assert!(take(&second, "l", Sharing::Locked).is_none());
        let folder = held.folder();
        drop(held);
        assert_eq!(take(&second, "l", Sharing::Locked).unwrap().folder(), folder);
    }

    #[test]
    fn forgetting_spares_who_uses_it() {
        let (_folder, store) = store();
        let used = take(&store, "a", Sharing::Shared).unwrap();
        let file = File::create(used.folder().join("f")).unwrap();
        store.forget_kept(KeptKind::Cache, "a").unwrap();
        let new = take(&store, "a", Sharing::Shared).unwrap();
        assert!(!new.folder().join("f").exists());
        assert_eq!(file.metadata().unwrap().nlink(), 1, "still there for who uses it");
        drop((used, new));
        assert_eq!(store.kept().unwrap().len(), 2);
        assert_eq!(store.prune_kept(1).unwrap().0, 1, "what nobody can have goes, however young");
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        assert_eq!(store.kept().unwrap().len(), 1);
    }

    #[test]
    fn pruning_takes_what_is_old_and_idle() {
        let (_folder, store) = store();
        let busy = take(&store, "busy", Sharing::Shared).unwrap();
        let idle = take(&store, "idle", Sharing::Shared).unwrap();
        fs::write(idle.folder().join("f"), vec![1; 10_000]).unwrap();
        drop(idle);
        let listed: Vec<_> =
            store.kept().unwrap().into_iter().map(|item| (item.name, item.busy)).collect();
        assert!(
            listed.contains(&("busy".into(), true)) && listed.contains(&("idle".into(), false))
        );
        assert_eq!(store.prune_kept(1).unwrap(), (0, 0), "nothing is that old");
        let (count, bytes) = store.prune_kept(i64::MAX).unwrap();
        assert!(count == 1 && bytes >= 10_000, "{count} {bytes}");
        assert!(busy.folder().exists());
        assert_eq!(store.kept().unwrap().len(), 1);
    }

    #[test]
    fn many_threads_never_share_a_private_folder() {
        let (folder, _store) = store();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let path = folder.path().join("store");
                scope.spawn(move || {
                    let store = Store::open(&path).unwrap();
                    for round in 0..20 {
                        let kept = take(&store, "p", Sharing::Private).unwrap();
                        File::create_new(kept.folder().join("mine")).unwrap();
                        if round % 7 == 0 {
                            store.forget_kept(KeptKind::Cache, "p").unwrap();
                        }
                        fs::remove_file(kept.folder().join("mine")).unwrap();
                    }
                });
            }
        });
    }
}
