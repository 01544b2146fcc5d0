//! The reading half of tar: whatever other tools write into layers, strictly as a stream.
//!
//! Understood are v7, ustar, PAX and GNU headers, with long names, base-256 numbers and all four kinds of sparse files. The size a PAX
//! record gives counts for reading *and* for skipping, so that no two readers see different entries in one archive; a
//! malformed extended header is an error, never skipped.

use std::collections::BTreeMap;
use std::io::{self, Read};

use base64::Engine as _;

use super::tar::{Entry, EntryKind, padding};
use super::{LayerError, LayerErrorKind};

const BLOCK: usize = 512;
/// Extended headers and long names beyond this are refused: they are held in memory.
const MAX_EXTENDED_HEADER: u64 = 1 << 20;
/// Sparse maps beyond this many fragments are refused, for the same reason.
const MAX_FRAGMENTS: usize = 1 << 18;

/// One fragment of data in a sparse file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Where it lies in the file.
    pub offset: u64,
    /// How many bytes of the content belong to it.
    pub length: u64,
}

/// Reads a layer archive.
///
/// Call [`TarReader::next_entry`] until it returns `None`; after an entry, the reader itself yields the content that the archive stores
/// for it (for sparse files: the fragments, one after the other). Content that is not read is skipped. At the end everything after the
/// end mark has been read too, because it belongs to the diff id.
#[derive(Debug)]
pub struct TarReader<R: Read> {
    input: R,
    /// Content of the current entry that was not read yet.
    remaining: u64,
    padding: usize,
    path: Vec<u8>,
    sparse: Option<Vec<Fragment>>,
    finished: bool,
}

/// What extended headers said about the entry that follows them.
#[derive(Default)]
struct Extended {
    records: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Offset and length texts of sparse format 0.0, which repeats its keys.
    sparse_map: Vec<u64>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    any: bool,
}

impl<R: Read> TarReader<R> {
    /// Starts reading an uncompressed archive.
    pub fn new(input: R) -> Self {
        Self { input, remaining: 0, padding: 0, path: Vec::new(), sparse: None, finished: false }
    }

    /// Returns the next entry, its path and link target as they stand in the archive.
    ///
    /// # Errors
    /// Fails on anything that is not well-formed, on unknown types, and if the archive cannot be read.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, LayerError> {
        if self.finished {
            return Ok(None);
        }
        self.skip_content()?;
        let mut extended = Extended::default();
        loop {
            let Some(header) = self.header()? else {
                if extended.any {
                    return Err(LayerError::invalid(
                        &self.path,
                        "it ends after an extended header",
                    ));
                }
                self.drain()?;
                return Ok(None);
            };
            match header.type_flag() {
                b'x' | b'X' => {
                    let body = self.extended_body(&header)?;
                    self.parse_records(&body, &mut extended)?;
                    extended.any = true;
                }
                // Global records are about the archive, not the image.
                b'g' => drop(self.extended_body(&header)?),
                b'L' => {
                    extended.long_name = Some(c_string(&self.extended_body(&header)?).to_vec());
                    extended.any = true;
                }
                b'K' => {
                    extended.long_link = Some(c_string(&self.extended_body(&header)?).to_vec());
                    extended.any = true;
                }
                _ => return self.entry(&header, extended).map(Some),
            }
        }
    }

    /// Returns the fragments of the current entry if it is a sparse file.
    pub fn fragments(&self) -> Option<&[Fragment]> {
        self.sparse.as_deref()
    }

    fn invalid(&self, detail: impl Into<String>) -> LayerError {
        LayerError::invalid(&self.path, detail)
    }

    fn failed(&self, error: io::Error) -> LayerError {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return LayerError::new(
                LayerErrorKind::InvalidArchive,
                super::show(&self.path),
                "the layer archive is cut short",
            );
        }
        LayerError::stream(&self.path, "read the layer archive", error)
    }

    /// Reads one header block; `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>, LayerError> {
        let mut block = [0; BLOCK];
        if !self.read_block(&mut block)? {
            return Ok(None);
        }
        if block.iter().all(|&b| b == 0) {
            // The end mark is two zero blocks; a lone one at the very end is common and harmless.
            if !self.read_block(&mut block)? || block.iter().all(|&b| b == 0) {
                return Ok(None);
            }
            return Err(self.invalid("a header follows a single zero block"));
        }
        let header = Header(block);
        let stored = octal(&header.0[148..156]).and_then(|sum| i64::try_from(sum).ok());
        if stored != Some(header.checksum(false)) && stored != Some(header.checksum(true)) {
            return Err(self.invalid("a header has a wrong checksum"));
        }
        Ok(Some(header))
    }

    /// Reads a block; `false` at a clean end.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, LayerError> {
        match super::read_full(&mut self.input, block) {
            Ok(0) => Ok(false),
            Ok(BLOCK) => Ok(true),
            Ok(_) => Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(self.failed(error)),
        }
    }

    fn skip_content(&mut self) -> Result<(), LayerError> {
        let rest = self.remaining + self.padding as u64;
        self.remaining = 0;
        self.padding = 0;
        let skipped = io::copy(&mut (&mut self.input).take(rest), &mut io::sink())
            .map_err(|error| self.failed(error))?;
        if skipped < rest {
            return Err(self.failed(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<(), LayerError> {
        self.finished = true;
        io::copy(&mut self.input, &mut io::sink()).map_err(|error| self.failed(error))?;
        Ok(())
    }

    fn extended_body(&mut self, header: &Header) -> Result<Vec<u8>, LayerError> {
        let size =
            header.size().ok_or_else(|| self.invalid("an extended header has a bad size"))?;
        if size > MAX_EXTENDED_HEADER {
            return Err(self.invalid("an extended header is larger than 1 MiB"));
        }
        let mut body = Vec::with_capacity(size as usize);
        (&mut self.input).take(size).read_to_end(&mut body).map_err(|error| self.failed(error))?;
        if body.len() as u64 != size {
            return Err(self.failed(io::ErrorKind::UnexpectedEof.into()));
        }
        self.padding = padding(size);
        self.skip_content()?;
        Ok(body)
    }

    /// Parses `length key=value\n` records.
    fn parse_records(&self, body: &[u8], extended: &mut Extended) -> Result<(), LayerError> {
        let mut rest = body;
        while !rest.is_empty() {
            let bad = || self.invalid("a PAX extended header is malformed");
            let space = rest.iter().position(|&b| b == b' ').ok_or_else(bad)?;
            let length =
                decimal(&rest[..space]).and_then(|n| usize::try_from(n).ok()).ok_or_else(bad)?;
            if length > rest.len() || length < space + 3 || rest[length - 1] != b'\n' {
                return Err(bad());
            }
            let record = &rest[space + 1..length - 1];
            rest = &rest[length..];
            let equals = record.iter().position(|&b| b == b'=').ok_or_else(bad)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            if key.is_empty() || key.contains(&0) {
                return Err(bad());
            }
            match key {
                b"path" | b"linkpath" | b"uname" | b"gname" | b"GNU.sparse.name"
                    if value.contains(&0) =>
                {
                    return Err(bad());
                }
                b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                    // The two keys take turns, offset first.
                    if extended.sparse_map.len().is_multiple_of(2) != (key == b"GNU.sparse.offset")
                        || extended.sparse_map.len() >= 2 * MAX_FRAGMENTS
                    {
                        return Err(bad());
                    }
                    extended.sparse_map.push(decimal(value).ok_or_else(bad)?);
                }
                _ => {
                    extended.records.insert(key.to_vec(), value.to_vec());
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, header: &Header, extended: Extended) -> Result<Entry, LayerError> {
        // POSIX: an empty value takes a record back.
        let record = |key: &[u8]| extended.records.get(key).filter(|value| !value.is_empty());
        let path = record(b"GNU.sparse.name")
            .or_else(|| record(b"path"))
            .cloned()
            .or_else(|| extended.long_name.clone())
            .unwrap_or_else(|| header.name());
        self.path = path.clone();
        let link = record(b"linkpath")
            .cloned()
            .or_else(|| extended.long_link.clone())
            .unwrap_or_else(|| header.link().to_vec());

        let number = |key: &[u8], field: Option<u64>, what: &str| match record(key) {
            Some(text) => {
                decimal(text).ok_or_else(|| self.invalid(format!("its PAX {what} is malformed")))
            }
            None => field.ok_or_else(|| self.invalid(format!("its {what} is malformed"))),
        };
        let stored = number(b"size", header.size(), "size")?;
        let uid = number(b"uid", header.number(108..116), "uid")?;
        let gid = number(b"gid", header.number(116..124), "gid")?;
        let mode = header.number(100..108).ok_or_else(|| self.invalid("its mode is malformed"))?;
        let mtime_seconds = match record(b"mtime") {
            Some(text) => {
                seconds(text).ok_or_else(|| self.invalid("its PAX mtime is malformed"))?
            }
            None => {
                header.signed(136..148).ok_or_else(|| self.invalid("its mtime is malformed"))?
            }
        };
        let id = |id: u64, what: &str| {
            // The all-ones id means "leave it alone" to the kernel and must not be reachable from an archive.
            let id = u32::try_from(id).ok().filter(|&id| id != u32::MAX);
            id.ok_or_else(|| self.invalid(format!("its {what} is out of range")))
        };
        let (uid, gid) = (id(uid, "uid")?, id(gid, "gid")?);

        let device = || -> Result<(u32, u32), LayerError> {
            let major = header
                .number(329..337)
                .and_then(|n| u32::try_from(n).ok())
                .filter(|&n| n < 1 << 12);
            let minor = header
                .number(337..345)
                .and_then(|n| u32::try_from(n).ok())
                .filter(|&n| n < 1 << 20);
            major.zip(minor).ok_or_else(|| self.invalid("its device number is out of range"))
        };
        let is_file = matches!(header.type_flag(), b'0' | 0 | b'7' | b'S');
        let kind = match header.type_flag() {
            // Before POSIX, a directory was a file with a trailing slash.
            0 if path.last() == Some(&b'/') => EntryKind::Directory,
            b'0' | 0 | b'7' | b'S' => EntryKind::File { size: stored },
            b'1' => EntryKind::HardLink { target: link },
            b'2' => EntryKind::Symlink { target: link },
            b'3' => device().map(|(major, minor)| EntryKind::CharDevice { major, minor })?,
            b'4' => device().map(|(major, minor)| EntryKind::BlockDevice { major, minor })?,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => {
                return Err(self.invalid(format!("unknown entry type '{}'", other.escape_ascii())));
            }
        };
        let xattrs = self.xattrs(&extended)?;

        // Types without content have none whatever their size field says; this is how Go reads them, and so all of the container world.
        self.remaining = if is_file && !matches!(kind, EntryKind::Directory) { stored } else { 0 };
        self.padding = padding(self.remaining);
        if i64::try_from(stored).is_err() {
            return Err(self.invalid("its size is out of range"));
        }
        self.sparse = None;
        let mut kind = kind;
        if let EntryKind::File { size } = &mut kind
            && let Some((real, fragments)) = self.sparse_map(header, &extended)?
        {
            *size = real;
            self.sparse = Some(fragments);
        }
        Ok(Entry { path, kind, mode: (mode & 0o7777) as u32, uid, gid, mtime_seconds, xattrs })
    }

    fn xattrs(&self, extended: &Extended) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, LayerError> {
        let mut xattrs = BTreeMap::new();
        for (key, value) in &extended.records {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                xattrs.insert(name.to_vec(), value.clone());
            } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                let bad = || self.invalid("an extended attribute is malformed");
                let engine = base64::engine::GeneralPurpose::new(
                    &base64::alphabet::STANDARD,
                    base64::engine::GeneralPurposeConfig::new()
                        .with_decode_padding_mode(base64::engine::DecodePaddingMode::Indifferent),
                );
                let value = engine.decode(value).map_err(|_| bad())?;
                xattrs.entry(percent_decode(name).ok_or_else(bad)?).or_insert(value);
            }
        }
        Ok(xattrs)
    }

    /// Returns the real size and the fragments of a sparse file, reading the maps that lie in the content.
    fn sparse_map(
        &mut self,
        header: &Header,
        extended: &Extended,
    ) -> Result<Option<(u64, Vec<Fragment>)>, LayerError> {
        let record = |key: &[u8]| extended.records.get(key).map(Vec::as_slice);
        let (real, numbers) = if header.type_flag() == b'S' {
            self.old_gnu_map(header)?
        } else if record(b"GNU.sparse.major") == Some(b"1")
            && record(b"GNU.sparse.minor") == Some(b"0")
        {
            let real = record(b"GNU.sparse.realsize").and_then(decimal);
            (real.ok_or_else(|| self.invalid("its sparse size is malformed"))?, self.leading_map()?)
        } else if record(b"GNU.sparse.major").is_some() {
            return Err(LayerError::new(
                LayerErrorKind::Unsupported,
                super::show(&self.path),
                "uses an unknown sparse format; archive the layer again without sparse files",
            ));
        } else if let Some(map) = record(b"GNU.sparse.map") {
            let numbers: Option<Vec<u64>> = map.split(|&b| b == b',').map(decimal).collect();
            let real = record(b"GNU.sparse.size").and_then(decimal);
            real.zip(numbers).ok_or_else(|| self.invalid("its sparse map is malformed"))?
        } else if !extended.sparse_map.is_empty() {
            let real = record(b"GNU.sparse.size").and_then(decimal);
            (
                real.ok_or_else(|| self.invalid("its sparse size is malformed"))?,
                extended.sparse_map.clone(),
            )
        } else {
            return Ok(None);
        };

        let bad = || self.invalid("its sparse map is malformed");
        if !numbers.len().is_multiple_of(2)
            || numbers.len() > 2 * MAX_FRAGMENTS
            || i64::try_from(real).is_err()
        {
            return Err(bad());
        }
        let mut end = 0;
        let mut stored = 0_u64;
        let mut fragments = Vec::with_capacity(numbers.len() / 2);
        for pair in numbers.chunks_exact(2) {
            let (offset, length) = (pair[0], pair[1]);
            if offset < end {
                return Err(bad());
            }
            end = offset.checked_add(length).filter(|&end| end <= real).ok_or_else(bad)?;
            stored += length;
            if length > 0 {
                fragments.push(Fragment { offset, length });
            }
        }
        if stored != self.remaining {
            return Err(bad());
        }
        Ok(Some((real, fragments)))
    }

    fn old_gnu_map(&mut self, header: &Header) -> Result<(u64, Vec<u64>), LayerError> {
        let bad = |reader: &Self| reader.invalid("its sparse map is malformed");
        let real = header.number(483..495).ok_or_else(|| bad(self))?;
        let mut numbers = Vec::new();
        let mut block = header.0;
        let (mut slots, mut more) = (386..482, header.0[482]);
        loop {
            for slot in block[slots.clone()].chunks_exact(24) {
                // An unused slot ends the map.
                if slot[0] == 0 {
                    break;
                }
                let pair = number(&slot[..12]).zip(number(&slot[12..]));
                let (offset, length) = pair.ok_or_else(|| bad(self))?;
                numbers.extend([offset, length]);
            }
            if more == 0 {
                return Ok((real, numbers));
            }
            if numbers.len() > 2 * MAX_FRAGMENTS || !self.read_block(&mut block)? {
                return Err(bad(self));
            }
            (slots, more) = (0..504, block[504]);
        }
    }

    /// Reads the map of sparse format 1.0: decimal lines in whole blocks before the data.
    fn leading_map(&mut self) -> Result<Vec<u64>, LayerError> {
        let mut text = Vec::new();
        let mut numbers: Vec<u64> = Vec::new();
        let mut count = None;
        loop {
            if self.remaining < BLOCK as u64 {
                return Err(self.invalid("its sparse map is malformed"));
            }
            let mut block = [0; BLOCK];
            self.input.read_exact(&mut block).map_err(|error| self.failed(error))?;
            self.remaining -= BLOCK as u64;
            text.extend_from_slice(&block);
            let mut at = 0;
            while count.is_none_or(|count| numbers.len() < count) {
                let Some(end) = text[at..].iter().position(|&b| b == b'\n') else { break };
                let number = decimal(&text[at..at + end])
                    .ok_or_else(|| self.invalid("its sparse map is malformed"))?;
                at += end + 1;
                if count.is_none() {
                    let pairs =
                        usize::try_from(number).ok().filter(|&pairs| pairs <= MAX_FRAGMENTS);
                    count =
                        Some(2 * pairs.ok_or_else(|| self.invalid("its sparse map is too large"))?);
                } else {
                    numbers.push(number);
                }
            }
            if count == Some(numbers.len()) {
                return Ok(numbers);
            }
            text.drain(..at);
            // A number has at most 20 digits.
            if text.len() > BLOCK {
                return Err(self.invalid("its sparse map is malformed"));
            }
        }
    }
}

impl<R: Read> Read for TarReader<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.remaining).unwrap_or(out.len()).min(out.len());
        if want == 0 {
            return Ok(0);
        }
        let count = self.input.read(&mut out[..want])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.remaining -= count as u64;
        Ok(count)
    }
}

struct Header([u8; BLOCK]);

impl Header {
    fn type_flag(&self) -> u8 {
        self.0[156]
    }

    fn name(&self) -> Vec<u8> {
        let name = c_string(&self.0[..100]);
        // Only POSIX ustar has a prefix; GNU keeps other fields there. An xstar header ends its prefix early.
        let is_ustar = &self.0[257..263] == b"ustar\0";
        let is_star = is_ustar && &self.0[508..512] == b"tar\0";
        let prefix =
            if is_star { c_string(&self.0[345..476]) } else { c_string(&self.0[345..500]) };
        if is_ustar && !prefix.is_empty() { super::join(prefix, name) } else { name.to_vec() }
    }

    fn link(&self) -> &[u8] {
        c_string(&self.0[157..257])
    }

    fn size(&self) -> Option<u64> {
        self.number(124..136)
    }

    fn number(&self, field: std::ops::Range<usize>) -> Option<u64> {
        number(&self.0[field])
    }

    fn signed(&self, field: std::ops::Range<usize>) -> Option<i64> {
        let field = &self.0[field];
        if field[0] & 0x80 != 0 { base_256(field) } else { i64::try_from(octal(field)?).ok() }
    }

    /// The sum of all bytes with the checksum field as spaces; ancient writers summed signed bytes.
    fn checksum(&self, signed: bool) -> i64 {
        let sum = |bytes: &[u8]| -> i64 {
            bytes
                .iter()
                .map(|&b| if signed { i64::from(b.cast_signed()) } else { i64::from(b) })
                .sum()
        };
        sum(&self.0[..148]) + sum(&self.0[156..]) + 8 * i64::from(b' ')
    }
}

fn c_string(field: &[u8]) -> &[u8] {
    field.split(|&b| b == 0).next().unwrap_or(field)
}

/// Parses a number field that must not be negative.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 { u64::try_from(base_256(field)?).ok() } else { octal(field) }
}

/// Parses octal digits between spaces and zero bytes; an empty field is 0.
fn octal(field: &[u8]) -> Option<u64> {
    let is_fill = |b: &u8| *b == b' ' || *b == 0;
    let Some(start) = field.iter().position(|b| !is_fill(b)) else { return Some(0) };
    let digits = field[start..].split(is_fill).next()?;
    digits.iter().try_fold(0_u64, |value, &digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// Parses GNU's binary numbers: two's complement, the top bit of the first byte being a marker.
fn base_256(field: &[u8]) -> Option<i64> {
    let negative = field[0] & 0x40 != 0;
    let mut value: i64 = if negative { -1 } else { 0 };
    for (index, &byte) in field.iter().enumerate() {
        let byte = if index == 0 && !negative { byte & 0x7f } else { byte };
        value = value.checked_mul(256)?.checked_add(i64::from(byte))?;
    }
    Some(value)
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Parses a PAX time and rounds towards the past, as whole seconds are kept.
fn seconds(text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = whole.strip_prefix('-').unwrap_or(whole);
    if !digits.bytes().all(|b| b.is_ascii_digit())
        || !fraction.bytes().all(|b| b.is_ascii_digit())
        || text.is_empty()
    {
        return None;
    }
    let value: i64 = if digits.is_empty() { 0 } else { whole.parse().ok()? };
    let below = whole.starts_with('-') && fraction.bytes().any(|b| b != b'0');
    value.checked_sub(i64::from(below))
}

fn percent_decode(name: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'%' {
            let (digits, tail) = rest.split_at_checked(2)?;
            out.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = tail;
        } else {
            out.push(byte);
        }
    }
    Some(out)
}
