//! What is in a directory, in every respect that an image keeps.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// A file, directory, link or device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `file`, `directory`, `link`, `fifo`, `character` or `block`.
    pub kind: &'static str,
    /// Permission bits, with set-user-id and the like.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
    /// The digest of a file's bytes, a link's target, a device's numbers.
    pub content: String,
    /// The first of the names that share this file.
    pub hard_link_to: Option<String>,
    /// Seconds since the epoch; directories have none, as unpacking touches them.
    pub mtime: Option<i64>,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

/// All entries below a directory, by path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    entries: BTreeMap<String, Entry>,
}

impl Tree {
    /// Reads a directory.
    pub fn read(root: &Path) -> Self {
        let mut tree = Self { entries: BTreeMap::new() };
        tree.walk(root, root, &mut HashMap::new());
        tree
    }

    fn walk(&mut self, root: &Path, directory: &Path, names: &mut HashMap<(u64, u64), String>) {
        let mut paths: Vec<PathBuf> = fs::read_dir(directory)
            .unwrap_or_else(|error| panic!("read {}: {error}", directory.display()))
            .map(|entry| entry.expect("read a directory").path())
            .collect();
        paths.sort();
        for path in paths {
            let name = path.strip_prefix(root).expect("below the root").display().to_string();
            let about = fs::symlink_metadata(&path).expect("read metadata");
            let kind = about.file_type();
            let mut entry = Entry {
                kind: "file",
                mode: about.mode() & 0o7777,
                owner: (about.uid(), about.gid()),
                content: String::new(),
                hard_link_to: None,
                mtime: Some(about.mtime()),
                xattrs: xattrs(&path),
            };
            if kind.is_dir() {
                (entry.kind, entry.mtime) = ("directory", None);
                self.walk(root, &path, names);
            } else if kind.is_symlink() {
                entry.kind = "link";
                entry.content = fs::read_link(&path).expect("read a link").display().to_string();
            } else if kind.is_fifo() {
                entry.kind = "fifo";
            } else if kind.is_char_device() || kind.is_block_device() {
                entry.kind = if kind.is_char_device() { "character" } else { "block" };
                entry.content = about.rdev().to_string();
            } else {
                let bytes = fs::read(&path)
                    .unwrap_or_else(|error| panic!("read {}: {error}", path.display()));
                entry.content =
                    Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
            }
            if about.nlink() > 1 && !kind.is_dir() {
                let first = names.entry((about.dev(), about.ino())).or_insert_with(|| name.clone());
                entry.hard_link_to = Some(first.clone()).filter(|first| *first != name);
            }
            self.entries.insert(name, entry);
        }
    }

    /// Returns what is at a path.
    ///
    /// # Panics
    /// When nothing is.
    pub fn entry(&self, path: &str) -> &Entry {
        self.entries
            .get(path)
            .unwrap_or_else(|| panic!("no {path} among {:?}", self.entries.keys()))
    }

    /// Tells whether something is at a path.
    pub fn has(&self, path: &str) -> bool {
        self.entries.contains_key(path)
    }

    /// Returns all paths.
    pub fn paths(&self) -> Vec<&str> {
        self.entries.keys().map(String::as_str).collect()
    }

    /// Leaves out what is below a path, and the path.
    pub fn without(mut self, path: &str) -> Self {
        let below = format!("{path}/");
        self.entries.retain(|name, _| name != path && !name.starts_with(&below));
        self
    }

    /// Forgets owners: a directory that is exported for a user belongs to that user.
    pub fn without_owners(mut self) -> Self {
        for entry in self.entries.values_mut() {
            entry.owner = (0, 0);
        }
        self
    }

    /// Compares with another tree.
    ///
    /// # Panics
    /// When they differ; the message tells each difference.
    pub fn assert_equals(&self, other: &Self, what: &str) {
        let mut differences = vec![];
        for (name, entry) in &self.entries {
            match other.entries.get(name) {
                None => differences.push(format!("only left:  {name}")),
                Some(theirs) if theirs != entry => {
                    differences.push(format!(
                        "differs:    {name}\n   left  {entry:?}\n   right {theirs:?}"
                    ));
                }
                Some(_) => {}
            }
        }
        differences.extend(
            other
                .entries
                .keys()
                .filter(|name| !self.has(name))
                .map(|name| format!("only right: {name}")),
        );
        assert!(differences.is_empty(), "{what}:\n{}", differences.join("\n"));
    }
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 4096];
    let Ok(length) = rustix::fs::llistxattr(path, &mut names) else { return BTreeMap::new() };
    names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let name = String::from_utf8_lossy(name).into_owned();
            let mut value = vec![0; 4096];
            let length = rustix::fs::lgetxattr(path, name.as_str(), &mut value)
                .expect("read an extended attribute");
            value.truncate(length);
            (name, value)
        })
        .collect()
}
