//! The list of the files that are kept of a client's folder, as it is on disk and in memory.
//!
//! One block of bytes: a head, one record per file in the order of a walk, and the sha256 of all that. Listing 50 000 files
//! takes some 5 MB and no allocation per file.

use std::cmp::Ordering;
use std::collections::HashMap;

use sha2::{Digest as _, Sha256};

use super::listing::walk_order;

const MAGIC: &[u8; 8] = b"sliplst2";
/// Transfers with this many different selections keep their files; the one that was not made for longest loses them.
const MAX_SCOPES: usize = 16;
/// What follows a path in a record.
const FIXED: usize = 8 + 8 + 3 * 4 + 32 + 8 + 8 + 8;
const SUM: usize = 32;

/// What must be the same for a file to be taken as unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) size: u64,
    pub(crate) mtime: i64,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// A file that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kept<P = Box<[u8]>> {
    pub(crate) path: P,
    pub(crate) stamp: Stamp,
    pub(crate) digest: [u8; 32],
    pub(crate) place: Place,
}

/// Where the bytes of a file are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The number of the file that has them.
    pub(crate) object: u64,
    /// Where they begin in it, in bytes; nothing where it has no others.
    pub(crate) offset: Option<u64>,
}

/// All files that are kept.
#[derive(Debug)]
pub(crate) struct Index {
    /// Which start of the machine the files were written under.
    pub(crate) boot: u64,
    /// The selections that files were seen under, the last first.
    scopes: Vec<u64>,
    records: Vec<u8>,
}

/// What one transfer changes.
#[derive(Debug)]
pub(crate) struct Change<'a> {
    /// What the transfer selected.
    pub(crate) scope: u64,
    /// The files it saw, in the order of a walk.
    pub(crate) seen: &'a [Kept],
    /// Whether it saw all there are; files of its selection that it did not see are dropped then.
    pub(crate) complete: bool,
}

impl Index {
    pub(crate) fn empty(boot: u64) -> Self {
        Self { boot, scopes: vec![], records: vec![] }
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote; `None` when it is damaged.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (body, sum) = bytes.split_at_checked(bytes.len().checked_sub(SUM)?)?;
        if Sha256::digest(body)[..] != *sum {
            return None;
        }
        let mut rest = body.strip_prefix(MAGIC)?;
        let boot = take_u64(&mut rest)?;
        let scopes = (0..take_u64(&mut rest)?.min(MAX_SCOPES as u64))
            .map(|_| take_u64(&mut rest))
            .collect::<Option<_>>()?;
        Some(Self { boot, scopes, records: rest.to_vec() })
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.records.len() + 256);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.boot.to_le_bytes());
        bytes.extend_from_slice(&(self.scopes.len() as u64).to_le_bytes());
        for scope in &self.scopes {
            bytes.extend_from_slice(&scope.to_le_bytes());
        }
        bytes.extend_from_slice(&self.records);
        let sum = Sha256::digest(&bytes);
        bytes.extend_from_slice(&sum);
        bytes
    }

    /// Visits the files in the order of a walk.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Kept<&[u8]>> {
        Records(&self.records).map(|(kept, _)| kept)
    }

    /// Looks files up, in the order of a walk.
    pub(crate) fn cursor(self: &std::sync::Arc<Self>) -> Cursor {
        Cursor { index: self.clone(), at: 0 }
    }

    /// Keeps only the files that `keep` says yes to.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&Kept<&[u8]>) -> bool) {
        let mut records = vec![];
        for (kept, scope) in Records(&self.records).filter(|(kept, _)| keep(kept)) {
            push(&mut records, &kept, scope);
        }
        self.records = records;
    }

    /// Returns the files after a transfer, and whether there is any difference.
    pub(crate) fn changed(&self, change: &Change<'_>) -> (Self, bool) {
        let mut scopes = vec![change.scope];
        scopes.extend(self.scopes.iter().filter(|scope| **scope != change.scope));
        scopes.truncate(MAX_SCOPES);
        let mut records = Vec::with_capacity(self.records.len());
        let mut seen = change.seen.iter().peekable();
        let new =
            |records: &mut Vec<u8>, kept: &Kept| push(records, &kept.borrowed(), change.scope);
        for (old, scope) in Records(&self.records) {
            let mut again = None;
            while let Some(kept) = seen.next_if(|kept| walk_order(&kept.path, old.path).is_le()) {
                if *kept.path == *old.path {
                    again = Some(kept);
                } else {
                    new(&mut records, kept);
                }
            }
            match again {
                // It stays with the selection that saw it first, so that two that take turns do not rewrite each other.
                Some(kept) if kept.borrowed() == old && scopes.contains(&scope) => {
                    push(&mut records, &old, scope);
                }
                Some(kept) => new(&mut records, kept),
                None if change.complete && scope == change.scope => {}
                None if scopes.contains(&scope) => push(&mut records, &old, scope),
                None => {}
            }
        }
        for kept in seen {
            new(&mut records, kept);
        }
        let differs = records != self.records || !self.scopes.contains(&change.scope);
        (Self { boot: self.boot, scopes, records }, differs)
    }

    /// Returns the objects that `after` does not use any more.
    pub(crate) fn dropped(&self, after: &Self) -> Vec<u64> {
        let mut old: HashMap<u64, ()> = self.iter().map(|kept| (kept.place.object, ())).collect();
        for kept in after.iter() {
            old.remove(&kept.place.object);
        }
        old.into_keys().collect()
    }
}

impl Kept {
    fn borrowed(&self) -> Kept<&[u8]> {
        Kept { path: &self.path, stamp: self.stamp, digest: self.digest, place: self.place }
    }
}

/// Goes through an index in step with a sender.
#[derive(Debug)]
pub(crate) struct Cursor {
    index: std::sync::Arc<Index>,
    at: usize,
}

impl Cursor {
    /// Returns what is kept of a file; paths must be asked for in the order of a walk.
    pub(crate) fn find(&mut self, path: &[u8]) -> Option<Kept<&[u8]>> {
        let all = &self.index.records[..];
        loop {
            let mut records = Records(all.get(self.at..)?);
            let (kept, _) = records.next()?;
            match walk_order(kept.path, path) {
                Ordering::Less => self.at = all.len() - records.0.len(),
                Ordering::Equal => return Some(kept),
                Ordering::Greater => return None,
            }
        }
    }
}

struct Records<'a>(&'a [u8]);

impl<'a> Iterator for Records<'a> {
    type Item = (Kept<&'a [u8]>, u64);

    fn next(&mut self) -> Option<Self::Item> {
        let (length, rest) = self.0.split_first_chunk::<2>()?;
        let length = usize::from(u16::from_le_bytes(*length));
        let (path, rest) = rest.split_at_checked(length)?;
        let (mut fixed, rest) = rest.split_at_checked(FIXED)?;
        self.0 = rest;
        let stamp = Stamp {
            size: take_u64(&mut fixed)?,
            mtime: take_u64(&mut fixed)?.cast_signed(),
            mode: take_u32(&mut fixed)?,
            uid: take_u32(&mut fixed)?,
            gid: take_u32(&mut fixed)?,
        };
        let (digest, mut fixed) = fixed.split_first_chunk::<32>()?;
        let object = take_u64(&mut fixed)?;
        let offset = take_u64(&mut fixed)?.checked_sub(1);
        let scope = take_u64(&mut fixed)?;
        let place = Place { object, offset };
        Some((Kept { path, stamp, digest: *digest, place }, scope))
    }
}

fn push(records: &mut Vec<u8>, kept: &Kept<&[u8]>, scope: u64) {
    // A listing takes no path that is longer than two bytes can say.
    let Ok(length) = u16::try_from(kept.path.len()) else { return };
    records.extend_from_slice(&length.to_le_bytes());
    records.extend_from_slice(kept.path);
    records.extend_from_slice(&kept.stamp.size.to_le_bytes());
    records.extend_from_slice(&kept.stamp.mtime.to_le_bytes());
    for number in [kept.stamp.mode, kept.stamp.uid, kept.stamp.gid] {
        records.extend_from_slice(&number.to_le_bytes());
    }
    records.extend_from_slice(&kept.digest);
    records.extend_from_slice(&kept.place.object.to_le_bytes());
    // No file is so long that its last byte has the highest number.
    let offset = kept.place.offset.map_or(0, |offset| offset + 1);
    records.extend_from_slice(&offset.to_le_bytes());
    records.extend_from_slice(&scope.to_le_bytes());
}

fn take_u64(bytes: &mut &[u8]) -> Option<u64> {
    let (number, rest) = bytes.split_first_chunk::<8>()?;
    *bytes = rest;
    Some(u64::from_le_bytes(*number))
}

fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    *bytes = rest;
    Some(u32::from_le_bytes(*number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(path: &str, object: u64) -> Kept {
        let stamp = Stamp { size: object, mtime: -1, mode: 0o644, uid: 1, gid: 2 };
        let place = Place { object, offset: object.is_multiple_of(2).then_some(object) };
        Kept { path: path.as_bytes().into(), stamp, digest: [object as u8; 32], place }
    }

    fn apply(index: &Index, scope: u64, files: &[(&str, u64)], complete: bool) -> (Index, bool) {
        let seen: Vec<Kept> = files.iter().map(|(path, object)| kept(path, *object)).collect();
        index.changed(&Change { scope, seen: &seen, complete })
    }

    fn objects(index: &Index) -> Vec<(String, u64)> {
        let text = |path: &[u8]| String::from_utf8(path.to_vec()).unwrap();
        index.iter().map(|kept| (text(kept.path), kept.place.object)).collect()
    }

    #[test]
    fn bytes_round_trip_and_damage_is_seen() {
        let (index, _) = apply(&Index::empty(7), 1, &[("a/b", 1), ("a-b", 2)], true);
        let bytes = index.to_bytes();
        let again = Index::from_bytes(&bytes).unwrap();
        assert_eq!(again.to_bytes(), bytes);
        assert_eq!((again.boot, objects(&again)), (7, objects(&index)));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert!(Index::from_bytes(&damaged).is_none(), "byte {at}");
            assert!(Index::from_bytes(&bytes[..at]).is_none(), "length {at}");
        }
    }

    #[test]
    fn a_complete_transfer_drops_what_it_did_not_see() {
        let (one, _) = apply(&Index::empty(0), 1, &[("a", 1), ("b", 2), ("c", 3)], true);
        let (two, differs) = apply(&one, 1, &[("a", 1), ("c", 4), ("d", 5)], true);
        assert!(differs);
        assert_eq!(objects(&two), [("a".into(), 1), ("c".into(), 4), ("d".into(), 5)]);
        let mut dropped = one.dropped(&two);
        dropped.sort_unstable();
        assert_eq!(dropped, [2, 3]);
        assert!(!apply(&two, 1, &[("a", 1), ("c", 4), ("d", 5)], true).1);
        // One that broke off says nothing about what it had not come to.
        let (three, _) = apply(&two, 1, &[("b", 6)], false);
        assert_eq!(objects(&three).len(), 4);
    }

    #[test]
    fn selections_do_not_drop_each_others_files() {
        let (one, _) = apply(&Index::empty(0), 1, &[("a", 1), ("b", 2)], true);
        let (two, _) = apply(&one, 2, &[("b", 2), ("c", 3)], true);
        assert_eq!(objects(&two).len(), 3);
        assert!(!apply(&two, 1, &[("a", 1), ("b", 2)], true).1);
        assert!(!apply(&two, 2, &[("b", 2), ("c", 3)], true).1);
        // But only so many are remembered.
        let last = (3..3 + MAX_SCOPES as u64)
            .fold(two, |index, scope| apply(&index, scope, &[("z", 9)], true).0);
        assert_eq!(objects(&last), [("z".into(), 9)]);
    }

    #[test]
    fn a_cursor_finds_files_in_step() {
        let files = [("a/b", 1), ("a/c", 2), ("a-b", 3), ("b", 4)];
        let index = std::sync::Arc::new(apply(&Index::empty(0), 1, &files, true).0);
        let mut cursor = index.cursor();
        let found: Vec<Option<u64>> = ["a", "a/a", "a/c", "a-b", "aa", "b", "c"]
            .iter()
            .map(|path| cursor.find(path.as_bytes()).map(|kept| kept.place.object))
            .collect();
        assert_eq!(found, [None, None, Some(2), Some(3), None, Some(4), None]);
    }
}
