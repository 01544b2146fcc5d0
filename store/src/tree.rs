//! File trees as lists of entries whose contents are elsewhere.
//!
//! A [`Tree`] is what a `COPY` reads (a scanned build context) and what it makes (a layer that nobody has needed as a
//! folder or as a tar yet). Contents stay where they are until the tree is written.

pub mod part;
pub mod scan;
pub mod write;

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::collections::btree_map::Range;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

pub use self::part::PartFile;
use crate::error::Result;

/// One node of a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Permission, set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification, in nanoseconds since 1970.
    pub mtime: i64,
    /// Extended attributes that travel with the entry.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Device and inode, where several names share it.
    pub inode: Option<(u64, u64)>,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory; an opaque one hides what lower layers have there.
    Directory {
        /// Whether lower layers' content is hidden.
        opaque: bool,
    },
    /// A regular file.
    File {
        /// Where its bytes are.
        content: Content,
        /// How many bytes it has.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Its text.
        target: Vec<u8>,
    },
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// The absence of what lower layers have here.
    Whiteout,
}

/// Where the bytes of a file are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A file of this machine.
    Host {
        /// Its path.
        path: Arc<Path>,
        /// The sha256 of its bytes, where known.
        digest: Option<[u8; 32]>,
    },
    /// A part of a file of this machine, which never changes.
    Part {
        /// The file.
        file: Arc<PartFile>,
        /// Where it begins, in bytes.
        offset: u64,
        /// The sha256 of its bytes.
        digest: [u8; 32],
    },
    /// In memory.
    Inline(Arc<[u8]>),
}

impl Content {
    /// Returns the sha256 of the bytes; `buffer` is for reading a file with, where that is needed.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn digest(&self, buffer: &mut Vec<u8>) -> Result<[u8; 32]> {
        match self {
            Self::Inline(bytes) => Ok(Sha256::digest(bytes).into()),
            Self::Host { digest: Some(digest), .. } | Self::Part { digest, .. } => Ok(*digest),
            Self::Host { path, digest: None } => {
                buffer.resize(128 * 1024, 0);
                scan::digest_file(path, buffer)
            }
        }
    }
}

impl Entry {
    /// Makes a root-owned directory.
    pub fn directory(mode: u32, mtime: i64) -> Self {
        Self {
            kind: Kind::Directory { opaque: false },
            mode,
            uid: 0,
            gid: 0,
            mtime,
            xattrs: BTreeMap::new(),
            inode: None,
        }
    }

    /// Adds all that a copy of the entry would keep to a hash; `buffer` is for reading files with, where needed.
    ///
    /// # Errors
    /// When a file whose digest is not known cannot be read.
    pub fn hash_into(&self, hash: &mut Sha256, buffer: &mut Vec<u8>) -> Result<()> {
        let sized = |hash: &mut Sha256, bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        for number in [self.mode, self.uid, self.gid] {
            hash.update(number.to_le_bytes());
        }
        hash.update((self.xattrs.len() as u64).to_le_bytes());
        for (name, value) in &self.xattrs {
            sized(hash, name);
            sized(hash, value);
        }
        let device = |hash: &mut Sha256, kind: &[u8], major: u32, minor: u32| {
            hash.update(kind);
            hash.update(major.to_le_bytes());
            hash.update(minor.to_le_bytes());
        };
        match &self.kind {
            Kind::Directory { .. } => hash.update(b"d"),
            Kind::File { content, size } => {
                hash.update(b"f");
                hash.update(size.to_le_bytes());
                hash.update(content.digest(buffer)?);
            }
            Kind::Symlink { target } => {
                hash.update(b"l");
                sized(hash, target);
            }
            Kind::CharDevice { major, minor } => device(hash, b"c", *major, *minor),
            Kind::BlockDevice { major, minor } => device(hash, b"b", *major, *minor),
            Kind::Fifo => hash.update(b"p"),
            Kind::Whiteout => hash.update(b"w"),
        }
        Ok(())
    }

    /// Whether this is a directory.
    pub fn is_directory(&self) -> bool {
        matches!(self.kind, Kind::Directory { .. })
    }
}

/// A path inside a tree, ordered as a walk visits: a directory, then what is in it, then its next sibling.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Key(Box<[u8]>);

impl Key {
    fn of(path: &[u8]) -> Self {
        Self(path.iter().copied().map(sorted).collect())
    }

    /// Calls with the bytes of a path's key, which need no memory of their own unless there are many.
    fn with<T>(path: &[u8], call: impl FnOnce(&[u8]) -> T) -> T {
        let mut short = [0; 256];
        let Some(key) = short.get_mut(..path.len()) else { return call(&Self::of(path).0) };
        for (to, from) in key.iter_mut().zip(path) {
            *to = sorted(*from);
        }
        call(key)
    }

    fn path(&self) -> Vec<u8> {
        self.0.iter().map(|b| if *b == 0 { b'/' } else { *b }).collect()
    }
}

/// A separator that sorts before every other byte makes the order of bytes the order of the walk.
fn sorted(byte: u8) -> u8 {
    if byte == b'/' { 0 } else { byte }
}

impl Borrow<[u8]> for Key {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

/// Entries by path: relative, without `.` or `..`, no slash at either end. The root itself is the empty path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    entries: BTreeMap<Key, Entry>,
}

impl Tree {
    /// Returns the entry at a path.
    pub fn get(&self, path: &[u8]) -> Option<&Entry> {
        Key::with(path, |key| self.entries.get(key))
    }

    /// Returns the entry at a path for change.
    pub fn get_mut(&mut self, path: &[u8]) -> Option<&mut Entry> {
        Key::with(path, |key| self.entries.get_mut(key))
    }

    /// Puts an entry at a path, replacing what was there. What was below a replaced directory stays: see
    /// [`remove`](Self::remove).
    pub fn insert(&mut self, path: &[u8], entry: Entry) {
        self.entries.insert(Key::of(path), entry);
    }

    /// Removes an entry and everything below it.
    pub fn remove(&mut self, path: &[u8]) {
        let doomed: Vec<Key> = self.range(path).map(|(key, _)| key.clone()).collect();
        for key in doomed {
            self.entries.remove(&key);
        }
    }

    /// Returns the number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no entry at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Visits all entries in the order of a walk.
    pub fn iter(&self) -> impl Iterator<Item = (Vec<u8>, &Entry)> {
        self.entries.iter().map(|(key, entry)| (key.path(), entry))
    }

    /// Visits an entry and everything below it, in the order of a walk.
    pub fn below(&self, path: &[u8]) -> impl Iterator<Item = (Vec<u8>, &Entry)> {
        self.range(path).map(|(key, entry)| (key.path(), entry))
    }

    /// Visits the names directly in a directory, in order.
    pub fn children(&self, path: &[u8]) -> impl Iterator<Item = (Vec<u8>, &Entry)> {
        let skip = if path.is_empty() { 0 } else { path.len() + 1 };
        let mut range = self.range(path);
        let end = after(path);
        std::iter::from_fn(move || {
            loop {
                let (key, entry) = range.next()?;
                let Some(name) = key.0.get(skip..) else { continue };
                if name.is_empty() || name.contains(&0) {
                    continue;
                }
                // What is in it is not visited.
                if entry.is_directory() {
                    let next = Bound::Included(Key([&key.0, &[1u8][..]].concat().into()));
                    let end = end.clone().map_or(Bound::Unbounded, Bound::Excluded);
                    range = self.entries.range((next, end));
                }
                return Some((name.to_vec(), entry));
            }
        })
    }

    /// Returns the sha256 over all that a copy of the tree would keep: paths, kinds, modes, owners, attributes and
    /// contents. Times are not part of it.
    ///
    /// # Errors
    /// When a file whose digest is not known cannot be read.
    pub fn digest(&self) -> Result<[u8; 32]> {
        let mut hash = Sha256::new();
        let mut buffer = vec![];
        for (key, entry) in &self.entries {
            hash.update((key.0.len() as u64).to_le_bytes());
            hash.update(&key.0);
            entry.hash_into(&mut hash, &mut buffer)?;
        }
        Ok(hash.finalize().into())
    }

    fn range(&self, path: &[u8]) -> Range<'_, Key, Entry> {
        if path.is_empty() {
            return self.entries.range::<Key, _>(..);
        }
        let end = after(path).map_or(Bound::Unbounded, Bound::Excluded);
        self.entries.range((Bound::Included(Key::of(path)), end))
    }
}

/// Where what comes after a path and everything below it begins: that sorts as "path\0…", the next sibling at the
/// earliest as "path\1".
fn after(path: &[u8]) -> Option<Key> {
    if path.is_empty() {
        return None;
    }
    let mut end = Key::of(path).0.to_vec();
    end.push(1);
    Some(Key(end.into()))
}

impl FromIterator<(Vec<u8>, Entry)> for Tree {
    fn from_iter<I: IntoIterator<Item = (Vec<u8>, Entry)>>(entries: I) -> Self {
        Self { entries: entries.into_iter().map(|(path, entry)| (Key::of(&path), entry)).collect() }
    }
}

/// Joins two paths of a tree.
pub fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() {
        return name.to_vec();
    }
    if name.is_empty() {
        return directory.to_vec();
    }
    [directory, b"/", name].concat()
}

/// Returns the directory part and the last component.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// Resolves `.` and `..` by text alone and drops slashes at both ends; `..` at the root stays at the root.
pub fn clean(path: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = vec![];
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_that_of_a_walk() {
        let tree: Tree = ["a", "a-b", "a/b", "a/b/c", "a.d", "ab"]
            .iter()
            .map(|path| (path.as_bytes().to_vec(), Entry::directory(0o755, 0)))
            .collect();
        let order: Vec<String> =
            tree.iter().map(|(path, _)| String::from_utf8(path).unwrap()).collect();
        assert_eq!(order, ["a", "a/b", "a/b/c", "a-b", "a.d", "ab"]);
        let below: Vec<Vec<u8>> = tree.below(b"a").map(|(path, _)| path).collect();
        assert_eq!(below, [&b"a"[..], b"a/b", b"a/b/c"]);
        let children: Vec<Vec<u8>> = tree.children(b"a").map(|(name, _)| name).collect();
        assert_eq!(children, [b"b"]);
        assert_eq!(tree.children(b"").count(), 4);
    }

    #[test]
    fn removing_takes_everything_below() {
        let mut tree: Tree = ["a", "a/b", "ab"]
            .iter()
            .map(|path| (path.as_bytes().to_vec(), Entry::directory(0o755, 0)))
            .collect();
        tree.remove(b"a");
        assert_eq!(tree.iter().map(|(path, _)| path).collect::<Vec<_>>(), [b"ab"]);
    }

    #[test]
    fn cleaning_cannot_escape() {
        for (path, expected) in
            [("/../../a/./b//c/..", "a/b"), ("", ""), ("..", ""), ("/", ""), ("a/", "a")]
        {
            assert_eq!(clean(path.as_bytes()), expected.as_bytes(), "{path}");
        }
    }
}
