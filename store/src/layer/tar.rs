//! The writing half of tar: one canonical form, equal to the byte to what BuildKit and containerd write.
//!
//! The form is POSIX ustar with PAX records only where ustar cannot say it (IEEE Std 1003.1, "pax"), with the free choices
//! made as Go's `archive/tar` makes them, because diff ids are digests of these bytes.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

/// The tar block size.
const BLOCK: usize = 512;
/// Field widths of a ustar header.
const NAME_SIZE: usize = 100;
const PREFIX_SIZE: usize = 155;
/// Readers written in Go refuse extended headers over 1 MiB, so none may be written.
const MAX_EXTENDED_HEADER: usize = 1 << 20;
/// The copy buffer for file content.
const COPY_BUFFER: usize = 128 * 1024;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A regular file; `size` bytes of content follow the header.
    File {
        /// Length of the content in bytes.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// The text of the link.
        target: Vec<u8>,
    },
    /// Another name of an earlier entry.
    HardLink {
        /// The path of the earlier entry, in the form of [`Entry::path`].
        target: Vec<u8>,
    },
    /// A character device.
    CharDevice {
        /// Major device number.
        major: u32,
        /// Minor device number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major device number.
        major: u32,
        /// Minor device number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// One entry of a layer archive.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Entry {
    /// Path relative to the root: no leading `/` or `./`, no trailing `/`.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits with set-id and sticky bits, `0o7777`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, whole seconds since 1970.
    pub mtime_seconds: i64,
    /// Extended attributes, by full name.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Entry {
    /// Returns an entry owned by root, dated 1970, without extended attributes.
    pub fn new(path: impl Into<Vec<u8>>, kind: EntryKind, mode: u32) -> Self {
        Self {
            path: path.into(),
            kind,
            mode,
            uid: 0,
            gid: 0,
            mtime_seconds: 0,
            xattrs: BTreeMap::new(),
        }
    }

    fn size(&self) -> u64 {
        match self.kind {
            EntryKind::File { size } => size,
            _ => 0,
        }
    }

    fn type_flag(&self) -> u8 {
        match self.kind {
            EntryKind::File { .. } => b'0',
            EntryKind::HardLink { .. } => b'1',
            EntryKind::Symlink { .. } => b'2',
            EntryKind::CharDevice { .. } => b'3',
            EntryKind::BlockDevice { .. } => b'4',
            EntryKind::Directory => b'5',
            EntryKind::Fifo => b'6',
        }
    }
}

/// Writes a layer archive.
///
/// Entries are written in the order of the calls; the caller keeps the order lexical by path component. [`TarWriter::finish`] writes
/// the end mark; an archive dropped before that is cut short.
#[derive(Debug)]
pub struct TarWriter<W: Write> {
    out: W,
    buffer: Vec<u8>,
    segments: Option<Segmented<W>>,
}

/// An archive that is told where one segment ends and the next begins.
#[derive(Debug)]
struct Segmented<W> {
    tell: Tell<W>,
    rule: SegmentRule,
}

/// Tells an output of a segment; the answer is whether it has written the segment itself.
type Tell<W> = fn(&mut W, Segment<'_>) -> io::Result<bool>;

/// The name of what a segment holds.
pub(crate) type SegmentKey = [u8; 32];

/// What there is to say about segments.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Segment<'a> {
    /// One begins here that holds what the key names.
    Known(&'a SegmentKey),
    /// One begins here.
    Unknown,
    /// The one that was just written does not hold what its key names.
    Spoiled,
}

/// Decides where an archive is cut into segments: by the names of entries, so that after a change the segments elsewhere
/// are what they were, and at least half a megabyte apart.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SegmentRule {
    /// About how many bytes the segment has so far.
    bytes: u64,
}

/// No segment but the last is shorter.
const SHORTEST_SEGMENT: u64 = 512 << 10;
/// Segments that are longer end with any entry.
const LONG_SEGMENT: u64 = 4 << 20;
/// Otherwise one entry in so many begins a segment.
const SEGMENT_ENTRIES: u32 = 32;

impl SegmentRule {
    /// Takes an entry into account that has so many bytes of content; returns whether a segment begins with it.
    pub(crate) fn next(&mut self, path: &[u8], size: u64) -> bool {
        let begins = self.bytes >= LONG_SEGMENT
            || (self.bytes >= SHORTEST_SEGMENT
                && libdeflater::crc32(path).is_multiple_of(SEGMENT_ENTRIES));
        if begins {
            self.bytes = 0;
        }
        self.bytes = self.bytes.saturating_add(BLOCK as u64).saturating_add(size);
        begins
    }
}

impl<W: Write> TarWriter<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Self {
        Self { out, buffer: Vec::new(), segments: None }
    }

    /// Starts an archive whose output is told where segments begin, and answers whether it has written one itself.
    pub(crate) fn with_segments(out: W, tell: Tell<W>) -> Self {
        let segments = Some(Segmented { tell, rule: SegmentRule::default() });
        Self { segments, ..Self::new(out) }
    }

    /// Tells of a segment, for callers who follow [`SegmentRule`] themselves. Returns whether its entries must not be
    /// written any more.
    pub(crate) fn segment(&mut self, segment: Segment<'_>) -> io::Result<bool> {
        let Some(segmented) = &mut self.segments else { return Ok(false) };
        segmented.rule = SegmentRule::default();
        (segmented.tell)(&mut self.out, segment)
    }

    /// Whether the output wants to know of segments.
    pub(crate) fn has_segments(&self) -> bool {
        self.segments.is_some()
    }

    /// Writes an entry; `content` must yield exactly the size a [`EntryKind::File`] names and is not read for other kinds.
    ///
    /// # Errors
    /// `InvalidInput` if tar cannot express the entry, `UnexpectedEof` or `InvalidData` if the content has another length (the archive
    /// is then broken and must be thrown away), and whatever the output or the content reports.
    pub fn append(&mut self, entry: &Entry, content: &mut dyn Read) -> io::Result<()> {
        let size = entry.size();
        if let Some(Segmented { tell, rule }) = &mut self.segments
            && rule.next(&entry.path, size)
        {
            tell(&mut self.out, Segment::Unknown)?;
        }
        let header = encode(entry)?;
        self.out.write_all(&header)?;
        if size == 0 && !matches!(entry.kind, EntryKind::File { .. }) {
            return Ok(());
        }
        self.copy(entry, size, content)
    }

    /// Writes a whiteout: the mark that `path` of a lower layer is removed.
    ///
    /// # Errors
    /// Fails as [`TarWriter::append`] does.
    pub fn whiteout(&mut self, path: &[u8]) -> io::Result<()> {
        let (parent, name) = super::split(path);
        let marker = super::join(parent, &[WHITEOUT_PREFIX, name].concat());
        self.append(&Entry::new(marker, EntryKind::File { size: 0 }, 0), &mut io::empty())
    }

    /// Writes an opaque mark: everything lower layers have inside the directory `path` is removed.
    ///
    /// # Errors
    /// Fails as [`TarWriter::append`] does.
    pub fn opaque(&mut self, path: &[u8]) -> io::Result<()> {
        let marker = super::join(path, OPAQUE_MARKER);
        self.append(&Entry::new(marker, EntryKind::File { size: 0 }, 0), &mut io::empty())
    }

    /// Writes the end mark and returns the output.
    ///
    /// # Errors
    /// Fails if the output does.
    pub fn finish(mut self) -> io::Result<W> {
        // The end mark belongs to no segment.
        self.segment(Segment::Unknown)?;
        self.out.write_all(&[0; 2 * BLOCK])?;
        self.out.flush()?;
        Ok(self.out)
    }

    /// Returns the output, to count or hash what was written so far.
    pub fn get_ref(&self) -> &W {
        &self.out
    }

    fn copy(&mut self, entry: &Entry, size: u64, content: &mut dyn Read) -> io::Result<()> {
        self.buffer.resize(COPY_BUFFER, 0);
        let mut remaining = size;
        while remaining > 0 {
            let want = usize::try_from(remaining).unwrap_or(COPY_BUFFER).min(COPY_BUFFER);
            match content.read(&mut self.buffer[..want]) {
                Ok(0) => {
                    let text = format!(
                        "\"{}\" became shorter while it was read",
                        entry.path.escape_ascii()
                    );
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
                }
                Ok(count) => {
                    self.out.write_all(&self.buffer[..count])?;
                    remaining -= count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if !at_end(content)? {
            let text = format!("\"{}\" became longer while it was read", entry.path.escape_ascii());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let padding = padding(size);
        self.out.write_all(&[0; BLOCK][..padding])
    }
}

/// The prefix of the name of a whiteout.
pub const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// The name of an opaque mark.
pub const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";

fn at_end(content: &mut dyn Read) -> io::Result<bool> {
    let mut probe = [0];
    loop {
        match content.read(&mut probe) {
            Ok(count) => return Ok(count == 0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Returns how many zero bytes fill the last block of content of this size.
pub(crate) fn padding(size: u64) -> usize {
    ((BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64) as usize
}

/// Returns the header blocks of an entry.
fn encode(entry: &Entry) -> io::Result<Vec<u8>> {
    let mut name = entry.path.clone();
    if entry.kind == EntryKind::Directory {
        name.push(b'/');
    }
    let link: &[u8] = match &entry.kind {
        EntryKind::Symlink { target } | EntryKind::HardLink { target } => target,
        _ => b"",
    };
    if name.contains(&0) || link.contains(&0) || entry.path.is_empty() {
        return Err(unencodable(entry, "its name or link target is empty or contains a zero byte"));
    }
    let (major, minor) = match entry.kind {
        EntryKind::CharDevice { major, minor } | EntryKind::BlockDevice { major, minor } => {
            (major, minor)
        }
        _ => (0, 0),
    };
    if !fits(8, major.into()) || !fits(8, minor.into()) {
        return Err(unencodable(entry, "its device number is too large for tar"));
    }

    let split = split_ustar(&name);
    let records = pax_records(entry, &name, link, split.is_some())?;
    let fields = Fields { entry, major, minor };
    if records.needed {
        let mut out = pax_header(&name, &records.bytes);
        out.extend_from_slice(&fields.block(&ascii_only(&name), &ascii_only(link), b""));
        return Ok(out);
    }
    let (prefix, suffix) = split.unwrap_or((b"", &name));
    Ok(fields.block(suffix, link, prefix).to_vec())
}

fn unencodable(entry: &Entry, why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("cannot archive \"{}\": {why}", entry.path.escape_ascii()),
    )
}

struct Records {
    needed: bool,
    bytes: Vec<u8>,
}

fn pax_records(entry: &Entry, name: &[u8], link: &[u8], can_split: bool) -> io::Result<Records> {
    let mut records: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    // A long name that fits after splitting does not ask for PAX by itself, but is repeated in full if something else does.
    let mut needed = false;
    if !is_ascii(name) || name.len() > NAME_SIZE {
        needed |= !can_split;
        records.insert(b"path".to_vec(), name.to_vec());
    }
    let mut record = |key: &[u8], value: Vec<u8>| {
        needed = true;
        records.insert(key.to_vec(), value);
    };
    if !is_ascii(link) || link.len() > NAME_SIZE {
        record(b"linkpath", link.to_vec());
    }
    for (key, value, width) in [
        ("uid", i64::from(entry.uid), 8),
        ("gid", i64::from(entry.gid), 8),
        ("mtime", entry.mtime_seconds, 12),
    ] {
        if !fits(width, value) {
            record(key.as_bytes(), value.to_string().into_bytes());
        }
    }
    let size =
        i64::try_from(entry.size()).map_err(|_| unencodable(entry, "it is too large for tar"))?;
    if !fits(12, size) {
        record(b"size", size.to_string().into_bytes());
    }
    for (key, value) in &entry.xattrs {
        if key.is_empty() || key.contains(&0) || key.contains(&b'=') {
            return Err(unencodable(
                entry,
                "the name of an extended attribute contains '=' or a zero byte",
            ));
        }
        record(&[b"SCHILY.xattr.", key.as_slice()].concat(), value.clone());
    }
    let mut bytes = Vec::new();
    for (key, value) in &records {
        pax_record(&mut bytes, key, value);
    }
    if needed && bytes.len() > MAX_EXTENDED_HEADER {
        return Err(unencodable(entry, "its names and extended attributes exceed 1 MiB"));
    }
    Ok(Records { needed, bytes })
}

/// Appends `length key=value\n`, where the length counts its own digits.
fn pax_record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + digits(rest);
    // The digits of the length may add a digit to the length.
    if digits(length) != digits(rest) {
        length = rest + digits(length);
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

fn digits(number: usize) -> usize {
    number.checked_ilog10().unwrap_or(0) as usize + 1
}

/// Returns the `x` header and its content, padded.
fn pax_header(name: &[u8], records: &[u8]) -> Vec<u8> {
    let mut title = match name.iter().rposition(|&b| b == b'/') {
        Some(at) => {
            let mut title = name[..=at].to_vec();
            title.extend_from_slice(b"PaxHeaders.0/");
            title.extend_from_slice(&name[at + 1..]);
            title
        }
        None => [b"PaxHeaders.0/", name].concat(),
    };
    title = ascii_only(&title);
    title.truncate(NAME_SIZE);
    while title.last() == Some(&b'/') {
        title.pop();
    }

    let mut block = [0; BLOCK];
    put_text(&mut block[..100], &title);
    put_octal(&mut block[100..108], 0);
    put_octal(&mut block[108..116], 0);
    put_octal(&mut block[116..124], 0);
    put_octal(&mut block[124..136], records.len() as i64);
    put_octal(&mut block[136..148], 0);
    block[156] = b'x';
    seal(&mut block);

    let mut out = block.to_vec();
    out.extend_from_slice(records);
    out.resize(out.len() + padding(records.len() as u64), 0);
    out
}

struct Fields<'a> {
    entry: &'a Entry,
    major: u32,
    minor: u32,
}

impl Fields<'_> {
    fn block(&self, name: &[u8], link: &[u8], prefix: &[u8]) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        put_text(&mut block[..100], name);
        put_octal(&mut block[100..108], i64::from(self.entry.mode & 0o7777));
        put_octal(&mut block[108..116], self.entry.uid.into());
        put_octal(&mut block[116..124], self.entry.gid.into());
        put_octal(&mut block[124..136], i64::try_from(self.entry.size()).unwrap_or(i64::MAX));
        put_octal(&mut block[136..148], self.entry.mtime_seconds);
        block[156] = self.entry.type_flag();
        put_text(&mut block[157..257], link);
        put_octal(&mut block[329..337], self.major.into());
        put_octal(&mut block[337..345], self.minor.into());
        put_text(&mut block[345..500], prefix);
        seal(&mut block);
        block
    }
}

/// Writes the magic and the checksum.
fn seal(block: &mut [u8; BLOCK]) {
    block[257..265].copy_from_slice(b"ustar\x0000");
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
    // Six digits, a zero byte, a space: the historical layout of this field.
    put_octal(&mut block[148..155], sum.into());
}

/// Writes text, zero-terminated if there is room; over-long text is cut and must not end in a slash then, because readers that
/// ignore the PAX path would take the entry for a directory.
fn put_text(field: &mut [u8], text: &[u8]) {
    let length = text.len().min(field.len());
    field[..length].copy_from_slice(&text[..length]);
    if text.len() > field.len() {
        for byte in field.iter_mut().rev() {
            if *byte != b'/' {
                break;
            }
            *byte = 0;
        }
    }
}

/// Writes a number in octal with leading zeros and a final zero byte; one that does not fit is written as 0 (a PAX record has it).
fn put_octal(field: &mut [u8], number: i64) {
    let mut rest = if fits(field.len(), number) { number } else { 0 };
    let last = field.len() - 1;
    field[last] = 0;
    for byte in field[..last].iter_mut().rev() {
        *byte = b'0' + (rest & 7) as u8;
        rest >>= 3;
    }
}

/// Whether a number fits an octal field of this width, terminator included.
fn fits(width: usize, number: i64) -> bool {
    number >= 0 && number < 1_i64 << ((width - 1) * 3)
}

fn is_ascii(text: &[u8]) -> bool {
    text.iter().all(|&b| b < 0x80 && b != 0)
}

fn ascii_only(text: &[u8]) -> Vec<u8> {
    text.iter().copied().filter(|&b| b < 0x80 && b != 0).collect()
}

/// Splits a long ASCII name at a slash into the ustar prefix and name fields, at the last slash that works.
fn split_ustar(name: &[u8]) -> Option<(&[u8], &[u8])> {
    if name.len() <= NAME_SIZE || !is_ascii(name) {
        return None;
    }
    let mut length = name.len();
    if length > PREFIX_SIZE + 1 {
        length = PREFIX_SIZE + 1;
    } else if name.last() == Some(&b'/') {
        length -= 1;
    }
    let at = name[..length].iter().rposition(|&b| b == b'/')?;
    let (prefix, suffix) = (&name[..at], &name[at + 1..]);
    (at > 0 && suffix.len() <= NAME_SIZE && !suffix.is_empty()).then_some((prefix, suffix))
}
