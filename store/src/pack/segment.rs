//! Which part of which blob holds some entries of a layer.

use rusqlite::{Connection, OptionalExtension as _};
use slipway_spec::{Digest, Hasher};

use crate::Store;
use crate::error::Result;
use crate::layer::compression::{MEMBER_SIZE, Member};
use crate::layer::tar::SegmentKey;

/// A segment of a blob that was just written.
pub(super) struct PackedSegment {
    pub(super) key: SegmentKey,
    pub(super) offset: u64,
    pub(super) members: Vec<Member>,
    /// How far the hashes have come at its end.
    pub(super) after: Option<Hashes>,
}

/// A segment of a blob in the store.
pub(super) struct KnownSegment {
    pub(super) blob: Digest,
    pub(super) offset: u64,
    pub(super) members: Vec<Member>,
    pub(super) after: Option<Hashes>,
}

/// The hashes of a layer, on their way: of its tar, and of its blob.
#[derive(Clone)]
pub(super) struct Hashes {
    pub(super) diff_id: Hasher,
    pub(super) blob: Hasher,
}

impl PackedSegment {
    pub(super) fn record(&self, c: &Connection, blob: &Digest) -> Result<()> {
        let blob = blob.to_string();
        let offset = i64::try_from(self.offset).unwrap_or(i64::MAX);
        let after = self.after.as_ref().and_then(|after| after.to_bytes(&self.key, &blob));
        c.prepare_cached("INSERT OR REPLACE INTO segment VALUES (?1, ?2, ?3, ?4, ?5)")?
            .execute((self.key, &blob, offset, encode(&self.members), after))?;
        Ok(())
    }
}

impl Hashes {
    /// Writes both states, and a checksum that binds them to where they belong.
    fn to_bytes(&self, key: &SegmentKey, blob: &str) -> Option<Vec<u8>> {
        let mut bytes = [self.diff_id.state()?, self.blob.state()?].concat();
        bytes.extend_from_slice(&sum(&bytes, key, blob));
        Some(bytes)
    }

    fn from_bytes(bytes: &[u8], key: &SegmentKey, blob: &str) -> Option<Self> {
        let (states, found) = bytes.split_last_chunk::<8>()?;
        if *found != sum(states, key, blob) {
            return None;
        }
        let (diff_id, blob) = states.split_at(states.len() / 2);
        Some(Self { diff_id: Hasher::resume(diff_id)?, blob: Hasher::resume(blob)? })
    }
}

fn sum(states: &[u8], key: &SegmentKey, blob: &str) -> [u8; 8] {
    let mut hash = blake3::Hasher::new();
    hash.update(key);
    hash.update(blob.as_bytes());
    hash.update(states);
    let mut sum = [0; 8];
    sum.copy_from_slice(&hash.finalize().as_bytes()[..8]);
    sum
}

/// Writes members as three numbers each.
fn encode(members: &[Member]) -> Vec<u8> {
    let number = |number: usize| u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes();
    let three = |member: &Member| {
        [number(member.length), number(member.size), member.sum.to_le_bytes()].concat()
    };
    members.iter().flat_map(three).collect()
}

/// Reads them back; `None` when they cannot be what was written.
fn decode(bytes: &[u8]) -> Option<Vec<Member>> {
    let (numbers, rest) = bytes.as_chunks::<4>();
    let (members, odd) = numbers.as_chunks::<3>();
    let number =
        |bytes: &[u8; 4]| usize::try_from(u32::from_le_bytes(*bytes)).unwrap_or(usize::MAX);
    let members = members.iter().map(|[length, size, sum]| {
        let sum = u32::from_le_bytes(*sum);
        let member = Member { length: number(length), size: number(size), sum };
        // What cannot be compressed hardly grows.
        let fits = member.size <= MEMBER_SIZE && member.length <= 2 * MEMBER_SIZE;
        fits.then_some(member)
    });
    let members: Option<Vec<Member>> = members.collect();
    members.filter(|_| rest.is_empty() && odd.is_empty())
}

impl Store {
    pub(super) fn segment(&self, key: &SegmentKey) -> Result<Option<KnownSegment>> {
        let row = self.metadata().with(|c| {
            Ok(c.prepare_cached("SELECT blob, offset, members, after FROM segment WHERE key = ?1")?
                .query_row([key], |row| {
                    let (blob, offset): (String, i64) = (row.get(0)?, row.get(1)?);
                    let (members, after): (Vec<u8>, Option<Vec<u8>>) = (row.get(2)?, row.get(3)?);
                    Ok((blob, offset, members, after))
                })
                .optional()?)
        })?;
        Ok(row.and_then(|(blob, offset, members, after)| {
            let after = after.and_then(|after| Hashes::from_bytes(&after, key, &blob));
            let (blob, members) = (blob.parse().ok()?, decode(&members)?);
            Some(KnownSegment { blob, offset: offset.try_into().ok()?, members, after })
        }))
    }

    pub(super) fn forget_segments(&self, blob: &Digest) -> Result<()> {
        self.metadata().with(|c| {
            c.execute("DELETE FROM segment WHERE blob = ?1", [blob.to_string()])?;
            Ok(())
        })
    }
}
