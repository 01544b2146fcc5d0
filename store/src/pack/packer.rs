//! The bytes of a layer's tar on their way into a blob.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use slipway_spec::{Digest, Hasher};

use super::segment::{Hashes, KnownSegment, PackedSegment};
use super::{BlobOptions, cannot_write};
use crate::Store;
use crate::content::ContentWriter;
use crate::content::beginning::{Beginning, Origin, Piece};
use crate::content::uncached::Source;
use crate::error::{IoContext as _, Result};
use crate::layer::behind::Behind;
use crate::layer::compression::{Encoder, Member};
use crate::layer::expand::{Expanded, Expander};
use crate::layer::tar::{Segment, SegmentKey};

/// Takes the bytes of a layer's tar, hashes and compresses them.
pub(super) struct Packer {
    store: Store,
    level: Option<i32>,
    /// The blob that a segment was last found in.
    source: Option<(Digest, Arc<Source>)>,
    flow: Flow,
}

/// A layer whose bytes are written but have no name yet.
pub(super) struct Unnamed {
    pub(super) diff_id: Digest,
    pub(super) writer: ContentWriter,
    pub(super) segments: Vec<PackedSegment>,
}

/// What is on its way.
struct Flow {
    diff_id: Behind<Hashed>,
    encoder: Encoder<Behind<Output>>,
    segments: Vec<Begun>,
    /// Members of a blob from before.
    expander: Expander,
    /// For each of these, the segment that it is the first member of.
    firsts: VecDeque<Option<usize>>,
    /// The segment whose first byte has yet to come.
    waiting: Option<usize>,
    /// The segments whose beginnings both hashes took note of, in order.
    marked: Vec<usize>,
    start: Start,
    /// A blob that is not what was written, once a prefix of it was found to be wrong.
    spoiled: Arc<OnceLock<Digest>>,
}

/// What the blob begins with.
enum Start {
    /// Nothing came yet.
    Empty,
    /// Everything so far is the beginning of one blob.
    Prefix(Box<Prefix>),
    /// That has ended.
    Over,
}

/// A segment that was begun.
struct Begun {
    /// How many members come before it.
    first: usize,
    key: Option<SegmentKey>,
    /// How far the hashes have come at its end, where that was known before.
    after: Option<Hashes>,
}

/// The beginning of a blob, which will be copied without being looked into.
struct Prefix {
    blob: Digest,
    source: Arc<Source>,
    pieces: Vec<Piece>,
    length: u64,
    /// How far the hashes have come there.
    hashes: Hashes,
}

/// Members of a segment that are held in memory while the segment is checked.
const HELD: usize = 8;

/// Part of the key of each segment; raised when the compressor would give other bytes.
const COMPRESSOR: &[u8] = b"libdeflate 1.26, noise stored ";

impl Packer {
    pub(super) fn new(store: &Store, options: &BlobOptions) -> Result<Self> {
        let out = Behind::new(Output { writer: store.write_uncached()?, marks: vec![] });
        let encoder =
            Encoder::new(out, options.compression, options.level).context(cannot_write)?;
        let flow = Flow {
            diff_id: Behind::new(Hashed { hasher: Hasher::sha256(), marks: vec![] }),
            encoder,
            segments: vec![],
            expander: Expander::default(),
            firsts: VecDeque::new(),
            waiting: None,
            marked: vec![],
            start: Start::Empty,
            spoiled: Arc::default(),
        };
        Ok(Self { store: store.clone(), level: options.level, source: None, flow })
    }

    /// Takes note of a segment, or writes it from where it was written before.
    pub(super) fn segment(&mut self, segment: Segment<'_>) -> io::Result<bool> {
        if matches!(segment, Segment::Spoiled) {
            self.flow.segments.last_mut().into_iter().for_each(|segment| segment.key = None);
            return Ok(false);
        }
        let Some(begun) = self.flow.encoder.cut()? else { return Ok(false) };
        let first = begun + self.flow.expander.len();
        let key = match segment {
            Segment::Known(key) => {
                let mut hash = blake3::Hasher::new();
                hash.update(COMPRESSOR);
                hash.update(&self.level.unwrap_or(i32::MIN).to_le_bytes());
                hash.update(key);
                Some(hash.finalize().into())
            }
            Segment::Unknown | Segment::Spoiled => None,
        };
        let at = self.flow.segments.len();
        self.flow.segments.push(Begun { first, key, after: None });
        let known = key.and_then(|key| self.store.segment(&key).transpose());
        let spliced = match known.transpose().map_err(io::Error::other)? {
            Some(known) => self.splice(at, &known)?,
            None => false,
        };
        self.flow.waiting = (!spliced).then_some(at);
        Ok(spliced)
    }

    fn splice(&mut self, at: usize, known: &KnownSegment) -> io::Result<bool> {
        if self.source.as_ref().is_none_or(|(digest, _)| *digest != known.blob) {
            // A blob that is gone is no error: what it held is written anew.
            let Ok(source) = self.store.blob_source(&known.blob) else { return Ok(false) };
            self.source = Some((known.blob.clone(), Arc::new(source)));
        }
        let Some((digest, source)) = &self.source else { return Ok(false) };
        if self.flow.follow(at, known, source)? {
            return Ok(true);
        }
        let read = |offset: u64, member: &Member| {
            let bytes = source.read(offset, member.length).ok()?;
            (libdeflater::crc32(&bytes) == member.sum).then_some(bytes)
        };
        // All of it must be sound before any of it is used.
        let mut members = vec![];
        let mut offset = known.offset;
        for member in &known.members {
            let Some(bytes) = read(offset, member) else {
                self.store.forget_segments(digest).map_err(io::Error::other)?;
                return Ok(false);
            };
            if members.len() < HELD {
                members.push(bytes);
            }
            offset += member.length as u64;
        }
        let mut held = members.into_iter();
        let mut offset = known.offset;
        let mut first = Some(at);
        self.flow.end_prefix()?;
        for member in &known.members {
            let bytes = held.next().or_else(|| read(offset, member));
            let bytes =
                bytes.ok_or_else(|| io::Error::other("content changed while it was read"))?;
            offset += member.length as u64;
            self.flow.expand(first.take(), bytes, member.size)?;
        }
        Ok(true)
    }

    /// Returns where a blob is noted whose beginning was taken and turned out not to be what was written. What was made of
    /// it is of no use, and has failed or will.
    pub(super) fn spoiled(&self) -> Arc<OnceLock<Digest>> {
        self.flow.spoiled.clone()
    }

    pub(super) fn finish(self) -> io::Result<Unnamed> {
        self.flow.finish()
    }
}

impl Write for Packer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.flow.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Flow {
    /// Takes note of a segment that continues the blob that everything so far is the beginning of; returns whether it does.
    fn follow(
        &mut self,
        at: usize,
        known: &KnownSegment,
        source: &Arc<Source>,
    ) -> io::Result<bool> {
        let Some(after) = &known.after else { return Ok(false) };
        match &self.start {
            Start::Empty if known.offset == 0 => {
                self.start = Start::Prefix(Box::new(Prefix {
                    blob: known.blob.clone(),
                    source: source.clone(),
                    pieces: vec![],
                    length: 0,
                    hashes: after.clone(),
                }));
            }
            Start::Prefix(p) if p.blob == known.blob && p.length == known.offset => {}
            _ => return Ok(false),
        }
        let Start::Prefix(prefix) = &mut self.start else { return Ok(false) };
        for member in &known.members {
            self.encoder.pass(*member)?;
            prefix.pieces.push(Piece { length: member.length, sum: member.sum });
            prefix.length += member.length as u64;
        }
        prefix.hashes = after.clone();
        self.segments[at].after = Some(after.clone());
        Ok(true)
    }

    /// Has the beginning copied, if there is one, and looks at what follows.
    fn end_prefix(&mut self) -> io::Result<()> {
        let start = std::mem::replace(&mut self.start, Start::Over);
        let Start::Prefix(prefix) = start else { return Ok(()) };
        let Prefix { blob: digest, source, pieces, hashes, .. } = *prefix;
        self.diff_id.call(0, move |hashed| {
            hashed.hasher = hashes.diff_id;
            Ok(())
        })?;
        let origin = Origin { digest, source, spoiled: self.spoiled.clone() };
        let beginning = Beginning::new(origin, pieces);
        self.encoder.output(move |out| {
            out.call(0, move |output| output.writer.begin_with(beginning, hashes.blob))
        })
    }

    /// Has both hashes take note of how far they have come before the segment that is written next.
    fn mark(&mut self, segment: usize) -> io::Result<()> {
        self.marked.push(segment);
        self.diff_id.call(0, |hashed| {
            hashed.marks.push(hashed.hasher.clone());
            Ok(())
        })?;
        self.encoder.output(|out| {
            out.call(0, |output| {
                output.marks.push(output.writer.hasher().clone());
                Ok(())
            })
        })
    }

    /// Has a member from before looked into, to be written then.
    fn expand(&mut self, first: Option<usize>, bytes: Bytes, size: usize) -> io::Result<()> {
        while self.expander.is_full() {
            self.put_expanded()?;
        }
        self.expander.put(bytes, size)?;
        self.firsts.push_back(first);
        Ok(())
    }

    /// Writes the oldest member from before, and what it holds; returns whether there was one.
    fn put_expanded(&mut self) -> io::Result<bool> {
        let Some(Expanded { member, bytes }) = self.expander.take()? else { return Ok(false) };
        if let Some(segment) = self.firsts.pop_front().flatten() {
            self.mark(segment)?;
        }
        let size = bytes.len();
        self.diff_id.put(bytes.into())?;
        self.encoder.splice(&member, size)?;
        Ok(true)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        while self.put_expanded()? {}
        self.end_prefix()?;
        if let Some(segment) = self.waiting.take() {
            self.mark(segment)?;
        }
        let written = self.encoder.write(bytes)?;
        self.diff_id.write_all(&bytes[..written])?;
        Ok(written)
    }

    fn finish(mut self) -> io::Result<Unnamed> {
        while self.put_expanded()? {}
        self.end_prefix()?;
        let (out, members) = self.encoder.finish_members()?;
        let (hashed, output) = (self.diff_id.finish()?, out.finish()?);
        let mut offsets = vec![0];
        offsets.extend(members.iter().scan(0, |offset, member| {
            *offset += member.length as u64;
            Some(*offset)
        }));
        // What was noted at the beginning of a segment holds for the end of the one before.
        let marks = hashed.marks.into_iter().zip(output.marks);
        for (segment, (diff_id, blob)) in self.marked.into_iter().zip(marks) {
            if let Some(before) = segment.checked_sub(1) {
                let after = &mut self.segments[before].after;
                after.get_or_insert(Hashes { diff_id, blob });
            }
        }
        let mut ends: Vec<usize> = self.segments.iter().skip(1).map(|next| next.first).collect();
        ends.push(members.len());
        let segments = self.segments.into_iter().zip(ends).filter_map(|(segment, end)| {
            let Begun { first, key, after } = segment;
            let members = members.get(first..end)?.to_vec();
            Some(PackedSegment { key: key?, offset: *offsets.get(first)?, members, after })
        });
        let segments = segments.filter(|segment| !segment.members.is_empty()).collect();
        Ok(Unnamed { diff_id: hashed.hasher.finish(), writer: output.writer, segments })
    }
}

/// The tar, which is only hashed.
#[derive(Debug)]
struct Hashed {
    hasher: Hasher,
    marks: Vec<Hasher>,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.hasher.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The blob.
#[derive(Debug)]
struct Output {
    writer: ContentWriter,
    marks: Vec<Hasher>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.writer.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
