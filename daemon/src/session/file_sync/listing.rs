//! What a sender says there is: checked entry by entry, so that nothing it says can lead anywhere else.
//!
//! Entries come in the order of a walk: a directory, then what is in it, then its next sibling, names in byte order. So one
//! path per level is all that has to be remembered to refuse whatever is out of order, comes twice, or lies below something
//! that is not a directory.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering as Atomic};

use slipway_engine::store::tree::{Content, Entry, Kind, Tree, split};
use slipway_engine::store::{Error, ErrorKind};
use slipway_spec::wire::fsutil::Stat;

use slipway_transport::packet::{FileType, permissions, show};

/// The longest path, in bytes: what the kernel takes.
const MAX_PATH: usize = 4096;

/// How much a sender may list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Entries.
    pub(crate) entries: usize,
    /// Bytes of names, link targets and attributes.
    pub(crate) text: u64,
}

impl Default for Limits {
    /// Several times the largest folders that are seen, and no more memory than a build machine has to spare.
    fn default() -> Self {
        Self { entries: 4_000_000, text: 1 << 30 }
    }
}

/// The entries so far, each at the place that is its id.
#[derive(Debug)]
pub(crate) struct Listing {
    limits: Limits,
    text: u64,
    entries: Vec<(Vec<u8>, Entry)>,
    // The directories that the next entry may be in, and the last name in each.
    levels: Vec<(Vec<u8>, Vec<u8>)>,
    // Which entries are further names of which.
    links: Vec<(u32, u32)>,
    // Tells the inodes of this listing from those of others.
    device: u64,
}

/// Hard links of listings have devices that no kernel hands out.
static NEXT_DEVICE: AtomicU64 = AtomicU64::new(1 << 63);

impl Listing {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            limits,
            text: 0,
            entries: vec![],
            levels: vec![(vec![], vec![])],
            links: vec![],
            device: NEXT_DEVICE.fetch_add(1, Atomic::Relaxed),
        }
    }

    /// Takes an entry and returns its id. Files have no content yet.
    ///
    /// # Errors
    /// When the entry may not be here; the error names it.
    pub(crate) fn add(&mut self, stat: &Stat) -> Result<u32, Error> {
        let path = &stat.path[..];
        let refused = |why: &str| refused(path, why);
        check_path(path)?;
        self.check_room(stat)?;
        self.check_order(path)?;
        let id = u32::try_from(self.entries.len()).map_err(|_| refused("is one too many"))?;
        let file_type = FileType::of(stat.mode).ok_or_else(|| {
            refused("is neither a file nor a folder nor anything else that can be sent")
        })?;
        let target = (!stat.linkname.is_empty()).then_some(&stat.linkname[..]);
        let mut inode = None;
        let kind = match file_type {
            FileType::Directory => {
                self.levels.push((path.to_vec(), vec![]));
                Kind::Directory { opaque: false }
            }
            FileType::Symlink => {
                let target = target.ok_or_else(|| refused("is a symbolic link to nowhere"))?;
                if target.contains(&0) {
                    return Err(refused("is a symbolic link with a zero byte in its target"));
                }
                Kind::Symlink { target: target.to_vec() }
            }
            _ if target.is_some_and(|target| target != path) => {
                let first = self.first_name(path, target.unwrap_or_default())?;
                self.links.push((id, first));
                inode = Some((self.device, u64::from(first)));
                self.entries[first as usize].1.inode = inode;
                // What it is and has is known once its first name has its content.
                Kind::Fifo
            }
            FileType::Regular => {
                let size = u64::try_from(stat.size).map_err(|_| refused("has a negative size"))?;
                Kind::File { content: Content::Inline(Arc::default()), size }
            }
            FileType::Fifo => Kind::Fifo,
            FileType::CharDevice | FileType::BlockDevice => {
                let (Ok(major), Ok(minor)) =
                    (u32::try_from(stat.devmajor), u32::try_from(stat.devminor))
                else {
                    return Err(refused("is a device with impossible numbers"));
                };
                match file_type {
                    FileType::CharDevice => Kind::CharDevice { major, minor },
                    _ => Kind::BlockDevice { major, minor },
                }
            }
        };
        let entry = Entry {
            kind,
            mode: permissions(stat.mode),
            uid: stat.uid,
            gid: stat.gid,
            mtime: stat.mod_time,
            xattrs: kept_xattrs(stat),
            inode,
        };
        self.entries.push((path.to_vec(), entry));
        Ok(id)
    }

    /// Returns the path of an entry.
    pub(crate) fn path(&self, id: u32) -> Option<&[u8]> {
        self.entries.get(id as usize).map(|(path, _)| path.as_slice())
    }

    /// Returns how many entries there are.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Says where the bytes of a file are.
    pub(crate) fn set_content(&mut self, id: u32, content: Content, size: u64) {
        if let Some((_, entry)) = self.entries.get_mut(id as usize) {
            entry.kind = Kind::File { content, size };
        }
    }

    /// Returns everything as a tree.
    pub(crate) fn into_tree(mut self) -> Tree {
        for (link, first) in self.links {
            // One file has one owner, mode and time, whatever was said about its other names.
            self.entries[link as usize].1 = self.entries[first as usize].1.clone();
        }
        self.entries.into_iter().collect()
    }

    fn check_room(&mut self, stat: &Stat) -> Result<(), Error> {
        let attributes: usize =
            stat.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.text += (stat.path.len() + stat.linkname.len() + attributes) as u64;
        if self.entries.len() < self.limits.entries && self.text <= self.limits.text {
            return Ok(());
        }
        Err(refused(
            &stat.path,
            "is more than can be transferred; leave out files with a .dockerignore file",
        ))
    }

    fn check_order(&mut self, path: &[u8]) -> Result<(), Error> {
        let (parent, name) = split(path);
        while self.levels.last().is_some_and(|(at, _)| at != parent) {
            self.levels.pop();
        }
        // The root is the only level that is never left, so none means that the parent was not listed.
        let Some((_, last)) = self.levels.last_mut() else {
            return Err(refused(path, "comes without or not next to the folder that it is in"));
        };
        match last.as_slice().cmp(name) {
            Ordering::Less => {
                *last = name.to_vec();
                Ok(())
            }
            Ordering::Equal => Err(refused(path, "comes twice")),
            Ordering::Greater => {
                Err(refused(path, &format!("comes out of order, after {}", show(last))))
            }
        }
    }

    /// Finds the entry that a hard link is another name of.
    fn first_name(&self, path: &[u8], target: &[u8]) -> Result<u32, Error> {
        let found = self.entries.binary_search_by(|(path, _)| walk_order(path, target));
        let Ok(at) = found else {
            return Err(refused(
                path,
                &format!("is a link to {}, which was not sent", show(target)),
            ));
        };
        let entry = &self.entries[at].1;
        let further = self.links.binary_search_by_key(&at, |(link, _)| *link as usize).is_ok();
        if further || matches!(entry.kind, Kind::Directory { .. } | Kind::Symlink { .. }) {
            return Err(refused(path, &format!("is a link to {}, which is no file", show(target))));
        }
        Ok(u32::try_from(at).unwrap_or(u32::MAX))
    }
}

/// Only what a layer would hold: the rest says something about the client's machine, not about the file.
fn kept_xattrs(stat: &Stat) -> BTreeMap<Vec<u8>, Vec<u8>> {
    stat.xattrs
        .iter()
        .filter(|(name, _)| name.starts_with("user.") || *name == "security.capability")
        .map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec()))
        .collect()
}

fn check_path(path: &[u8]) -> Result<(), Error> {
    let why = match path {
        b"" => "is no path",
        path if path.len() > MAX_PATH => "is longer than a path may be",
        path if path.contains(&0) => "has a zero byte in it",
        path if path.starts_with(b"/") => "is an absolute path",
        path if path.split(|b| *b == b'/').any(|part| part == b"..") => "leads out of the folder",
        path if path.split(|b| *b == b'/').any(|part| part.is_empty() || part == b".") => {
            "is not a clean path"
        }
        _ => return Ok(()),
    };
    Err(refused(path, why))
}

/// Orders paths as a walk visits them.
pub(crate) fn walk_order(a: &[u8], b: &[u8]) -> Ordering {
    let key = |byte: &u8| if *byte == b'/' { 0 } else { *byte };
    a.iter().map(key).cmp(b.iter().map(key))
}

/// An error about an entry that the client sent.
pub(crate) fn refused(path: &[u8], why: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("the client sent {}, which {why}", show(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(path: &str, file_type: FileType) -> Stat {
        let linkname = if file_type == FileType::Symlink { "target" } else { "" };
        Stat {
            path: path.as_bytes().to_vec().into(),
            mode: file_type.mode(0o755),
            linkname: linkname.into(),
            ..Stat::default()
        }
    }

    fn hard_link(path: &str, target: &str) -> Stat {
        Stat { linkname: target.as_bytes().to_vec().into(), ..stat(path, FileType::Regular) }
    }

    /// Lists entries; a path that ends in `/` is a directory, one that ends in `@` a symbolic link, `a=b` a hard link.
    fn list(entries: &[&str]) -> Result<Listing, Error> {
        let mut listing = Listing::new(Limits::default());
        for entry in entries {
            let stat =
                match (entry.strip_suffix('/'), entry.strip_suffix('@'), entry.split_once('=')) {
                    (Some(path), ..) if !path.is_empty() => stat(path, FileType::Directory),
                    (_, Some(path), _) => stat(path, FileType::Symlink),
                    (.., Some((path, target))) => hard_link(path, target),
                    _ => stat(entry, FileType::Regular),
                };
            listing.add(&stat)?;
        }
        Ok(listing)
    }

    #[test]
    fn a_walk_is_taken_and_kept_in_order() {
        let listing = list(&["a/", "a/b/", "a/b/c", "a/d", "a-b", "a.d", "ab/", "ab/x"]).unwrap();
        let paths: Vec<Vec<u8>> = listing.into_tree().iter().map(|(path, _)| path).collect();
        assert_eq!(paths, [&b"a"[..], b"a/b", b"a/b/c", b"a/d", b"a-b", b"a.d", b"ab", b"ab/x"]);
    }

    #[test]
    fn what_could_lead_elsewhere_is_refused_by_name() {
        for (entries, message) in [
            (&["../a"][..], r#"the client sent "../a", which leads out of the folder"#),
            (&[".."], r#"the client sent "..", which leads out of the folder"#),
            (&["a/", "a/../b"], r#"the client sent "a/../b", which leads out of the folder"#),
            (&["/etc"], r#"the client sent "/etc", which is an absolute path"#),
            (&[""], r#"the client sent "", which is no path"#),
            (&["."], r#"the client sent ".", which is not a clean path"#),
            (&["a/", "a//b"], r#"the client sent "a//b", which is not a clean path"#),
            (&["a/", "a/./b"], r#"the client sent "a/./b", which is not a clean path"#),
            (&["a\0b"], r#"the client sent "a\x00b", which has a zero byte in it"#),
            (&["b", "a"], r#"the client sent "a", which comes out of order, after "b""#),
            (&["a", "a"], r#"the client sent "a", which comes twice"#),
            (&["a/", "a/x", "a/x"], r#"the client sent "a/x", which comes twice"#),
            (
                &["a/", "b", "a/x"],
                r#"the client sent "a/x", which comes without or not next to the folder that it is in"#,
            ),
            (
                &["a/b"],
                r#"the client sent "a/b", which comes without or not next to the folder that it is in"#,
            ),
            (
                &["a", "a/b"],
                r#"the client sent "a/b", which comes without or not next to the folder that it is in"#,
            ),
            (
                &["a@", "a/b"],
                r#"the client sent "a/b", which comes without or not next to the folder that it is in"#,
            ),
            (&["a-b", "a/"], r#"the client sent "a", which comes out of order, after "a-b""#),
            (&["a=b"], r#"the client sent "a", which is a link to "b", which was not sent"#),
            (&["d/", "e=d"], r#"the client sent "e", which is a link to "d", which is no file"#),
            (&["d@", "e=d"], r#"the client sent "e", which is a link to "d", which is no file"#),
            (
                &["a", "b=a", "c=b"],
                r#"the client sent "c", which is a link to "b", which is no file"#,
            ),
            (
                &["a", "b=../a"],
                r#"the client sent "b", which is a link to "../a", which was not sent"#,
            ),
        ] {
            assert_eq!(list(entries).unwrap_err().to_string(), message, "{entries:?}");
        }
    }

    #[test]
    fn impossible_attributes_are_refused() {
        let mut listing = Listing::new(Limits::default());
        let negative = Stat { size: -1, ..stat("n", FileType::Regular) };
        let device = Stat { devmajor: -1, ..stat("d", FileType::CharDevice) };
        let nowhere = Stat { linkname: "".into(), ..stat("s", FileType::Symlink) };
        let zero = Stat { linkname: "a\0b".into(), ..stat("z", FileType::Symlink) };
        let socket = Stat { mode: 1 << 24, ..stat("so", FileType::Regular) };
        let long = stat(&"x".repeat(5000), FileType::Regular);
        for bad in [device, long, negative, nowhere, socket, zero] {
            let error = listing.add(&bad).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        }
        assert_eq!(listing.len(), 0);
    }

    #[test]
    fn endless_lists_are_refused() {
        let mut listing = Listing::new(Limits { entries: 2, text: 100 });
        listing.add(&stat("a", FileType::Regular)).unwrap();
        listing.add(&stat("b", FileType::Regular)).unwrap();
        let error = listing.add(&stat("c", FileType::Regular)).unwrap_err();
        assert!(error.to_string().contains("\"c\", which is more than can be"), "{error}");
        let mut listing = Listing::new(Limits { entries: 10, text: 100 });
        let fat = Stat {
            xattrs: [("user.x".into(), vec![0; 100].into())].into(),
            ..stat("a", FileType::Regular)
        };
        listing.add(&fat).unwrap_err();
    }

    #[test]
    fn hard_links_share_what_their_first_name_has() {
        let mut listing = list(&["a", "b=a", "d/", "d/c=a"]).unwrap();
        let content = Content::Inline(b"text"[..].into());
        listing.set_content(0, content.clone(), 4);
        let tree = listing.into_tree();
        let first = tree.get(b"a").unwrap();
        assert_eq!(first.kind, Kind::File { content, size: 4 });
        assert!(first.inode.is_some());
        assert_eq!(tree.get(b"b"), Some(first));
        assert_eq!(tree.get(b"d/c"), Some(first));
    }
}
