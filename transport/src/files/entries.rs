//! What is sent of a tree, entry by entry.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use slipway_spec::wire::fsutil::Stat;
use slipway_store::tree::{Content, Entry, Kind, Tree};

use crate::packet::FileType;

/// Returns the type of an entry; `None` for a whiteout, which is the absence of one.
pub fn file_type(kind: &Kind) -> Option<FileType> {
    Some(match kind {
        Kind::File { .. } => FileType::Regular,
        Kind::Directory { .. } => FileType::Directory,
        Kind::Symlink { .. } => FileType::Symlink,
        Kind::CharDevice { .. } => FileType::CharDevice,
        Kind::BlockDevice { .. } => FileType::BlockDevice,
        Kind::Fifo => FileType::Fifo,
        Kind::Whiteout => return None,
    })
}

/// An entry as it is announced, and where its bytes are if it is a file with bytes of its own.
#[derive(Clone, Debug)]
pub struct Announced {
    /// What is said of it.
    pub stat: Stat,
    /// Its bytes.
    pub content: Option<Content>,
}

/// Lists the entries of a tree in the order of a walk; the place of each is its id.
pub fn list(tree: &Tree) -> Vec<Announced> {
    let mut first_names: HashMap<(u64, u64), Bytes> = HashMap::new();
    let mut entries = Vec::with_capacity(tree.len());
    for (path, entry) in tree.iter().filter(|(path, _)| !path.is_empty()) {
        let Some(file_type) = file_type(&entry.kind) else { continue };
        let path = Bytes::from(path);
        let mut stat = Stat {
            path: path.clone(),
            mode: file_type.mode(entry.mode),
            uid: entry.uid,
            gid: entry.gid,
            mod_time: entry.mtime,
            xattrs: xattrs(entry),
            ..Stat::default()
        };
        let mut content = None;
        match &entry.kind {
            Kind::File { content: bytes, size } => {
                content = Some(bytes.clone());
                stat.size = i64::try_from(*size).unwrap_or(i64::MAX);
            }
            Kind::Symlink { target } => {
                stat.linkname = target.clone().into();
                stat.size = i64::try_from(target.len()).unwrap_or(i64::MAX);
            }
            Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
                (stat.devmajor, stat.devminor) = (i64::from(*major), i64::from(*minor));
            }
            Kind::Directory { .. } | Kind::Fifo | Kind::Whiteout => {}
        }
        // A further name of a symbolic link cannot be said: the place for it has the target.
        if let Some(inode) = entry.inode.filter(|_| file_type != FileType::Symlink) {
            match first_names.get(&inode) {
                Some(first) => {
                    stat.linkname = first.clone();
                    stat.size = 0;
                    // It can still be asked for: by its mode it is a file.
                }
                None => {
                    first_names.insert(inode, path);
                }
            }
        }
        entries.push(Announced { stat, content });
    }
    entries
}

fn xattrs(entry: &Entry) -> BTreeMap<String, Bytes> {
    entry
        .xattrs
        .iter()
        .filter_map(|(name, value)| {
            Some((String::from_utf8(name.clone()).ok()?, Bytes::copy_from_slice(value)))
        })
        .collect()
}
