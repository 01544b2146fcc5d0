//! Compressed layers: recognising them, reading them, and writing them on all cores with the same bytes on any number of cores.

mod gzip;

use std::fmt;
use std::io::{self, BufRead, BufReader, Cursor, Read, Write};

pub use slipway_spec::media_type::Compression;
use zstd::stream::raw::CParameter;

/// What a stream starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// No known compression.
    Plain,
    /// gzip (RFC 1952).
    Gzip,
    /// Zstandard (RFC 8878), maybe starting with a skippable frame.
    Zstd,
    /// bzip2.
    Bzip2,
    /// xz.
    Xz,
}

impl Kind {
    /// Returns the compression of a layer; `None` when layers have no such.
    pub fn of_layer(self) -> Option<Compression> {
        match self {
            Self::Plain => Some(Compression::Uncompressed),
            Self::Gzip => Some(Compression::Gzip),
            Self::Zstd => Some(Compression::Zstd),
            Self::Bzip2 | Self::Xz => None,
        }
    }
}

/// How many bytes [`sniff`] wants to see.
pub const SNIFF_LEN: usize = 10;

/// Recognises a compression by the first bytes of a stream ([`SNIFF_LEN`] suffice).
pub fn sniff(start: &[u8]) -> Kind {
    match start {
        [0x1f, 0x8b, 0x08, ..] => Kind::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Kind::Zstd,
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => Kind::Bzip2,
        [0xfd, b'7', b'z', b'X', b'Z', 0x00, ..] => Kind::Xz,
        _ => Kind::Plain,
    }
}

/// Returns the uncompressed bytes of a stream in any form [`sniff`] knows.
///
/// Several gzip members or zstd frames are read as one; bytes after the last one that are not another member are read and dropped,
/// as other readers of layers do, so that whoever counts or hashes the compressed stream sees all of it.
///
/// # Errors
/// Fails if the first bytes cannot be read or a decompressor cannot be made. Damage shows when reading.
pub fn decoder(input: Box<dyn Read + Send>) -> io::Result<Box<dyn Read + Send>> {
    let mut input = input;
    let mut start = [0; SNIFF_LEN];
    let length = super::read_full(&mut input, &mut start)?;
    let kind = sniff(&start[..length]);
    let whole = Cursor::new(start[..length].to_vec()).chain(input);
    let buffered = BufReader::with_capacity(128 * 1024, whole);
    Ok(match kind {
        Kind::Plain => Box::new(buffered),
        Kind::Gzip => Box::new(Members::<Gzip, _>::new(buffered)),
        Kind::Zstd => Box::new(Members::<Zstd, _>::new(buffered)),
        Kind::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(buffered)),
        Kind::Xz => Box::new(xz2::bufread::XzDecoder::new_multi_decoder(buffered)),
    })
}

/// A compression whose streams are made of independent parts.
trait Parts {
    type Decoder<R: BufRead>: Read;

    fn start<R: BufRead>(input: R) -> io::Result<Self::Decoder<R>>;
    fn end<R: BufRead>(decoder: Self::Decoder<R>) -> R;
    /// Whether another part starts with these bytes.
    fn starts(bytes: &[u8]) -> bool;
}

struct Gzip;

impl Parts for Gzip {
    type Decoder<R: BufRead> = flate2::bufread::GzDecoder<R>;

    fn start<R: BufRead>(input: R) -> io::Result<Self::Decoder<R>> {
        Ok(flate2::bufread::GzDecoder::new(input))
    }

    fn end<R: BufRead>(decoder: Self::Decoder<R>) -> R {
        decoder.into_inner()
    }

    fn starts(bytes: &[u8]) -> bool {
        bytes.starts_with(&[0x1f, 0x8b])
    }
}

struct Zstd;

impl Parts for Zstd {
    type Decoder<R: BufRead> = zstd::stream::read::Decoder<'static, R>;

    fn start<R: BufRead>(input: R) -> io::Result<Self::Decoder<R>> {
        Ok(zstd::stream::read::Decoder::with_buffer(input)?.single_frame())
    }

    fn end<R: BufRead>(decoder: Self::Decoder<R>) -> R {
        decoder.finish()
    }

    fn starts(bytes: &[u8]) -> bool {
        sniff(bytes) == Kind::Zstd
    }
}

/// Reads part after part, then drains what is left.
struct Members<P: Parts, R: BufRead> {
    state: State<P::Decoder<PeekedReader<R>>, PeekedReader<R>>,
}

enum State<D, R> {
    Between(R),
    Inside(D),
    /// After the last part, or after an error.
    Done,
}

impl<P: Parts, R: BufRead> Members<P, R> {
    fn new(input: R) -> Self {
        Self { state: State::Between(PeekedReader::new(input)) }
    }
}

impl<P: Parts, R: BufRead> Read for Members<P, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        loop {
            match std::mem::replace(&mut self.state, State::Done) {
                State::Done => return Ok(0),
                State::Between(mut input) => {
                    if P::starts(input.peek()?) {
                        self.state = State::Inside(P::start(input)?);
                    } else {
                        io::copy(&mut input, &mut io::sink())?;
                    }
                }
                State::Inside(mut decoder) => match decoder.read(out) {
                    Ok(0) => self.state = State::Between(P::end(decoder)),
                    Ok(count) => {
                        self.state = State::Inside(decoder);
                        return Ok(count);
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                        self.state = State::Inside(decoder);
                    }
                    Err(error) => return Err(error),
                },
            }
        }
    }
}

/// A buffered reader that can look a few bytes ahead across the edges of its buffer.
struct PeekedReader<R> {
    ahead: Vec<u8>,
    at: usize,
    inner: R,
}

impl<R: BufRead> PeekedReader<R> {
    fn new(inner: R) -> Self {
        Self { ahead: Vec::new(), at: 0, inner }
    }

    /// Returns the next four bytes, fewer only at the end.
    fn peek(&mut self) -> io::Result<&[u8]> {
        self.ahead.drain(..self.at);
        self.at = 0;
        while self.ahead.len() < 4 {
            let chunk = match self.inner.fill_buf() {
                Ok(chunk) => chunk,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let count = chunk.len().min(4 - self.ahead.len());
            if count == 0 {
                break;
            }
            self.ahead.extend_from_slice(&chunk[..count]);
            self.inner.consume(count);
        }
        Ok(&self.ahead)
    }
}

impl<R: BufRead> Read for PeekedReader<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let chunk = self.fill_buf()?;
        let count = chunk.len().min(out.len());
        out[..count].copy_from_slice(&chunk[..count]);
        self.consume(count);
        Ok(count)
    }
}

impl<R: BufRead> BufRead for PeekedReader<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at < self.ahead.len() { Ok(&self.ahead[self.at..]) } else { self.inner.fill_buf() }
    }

    fn consume(&mut self, count: usize) {
        if self.at < self.ahead.len() {
            self.at += count;
        } else {
            self.inner.consume(count);
        }
    }
}

/// A part of a compressed stream that can be decompressed alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// Its bytes in the stream.
    pub(crate) length: usize,
    /// The bytes it holds.
    pub(crate) size: usize,
    /// The CRC-32 of its bytes in the stream.
    pub(crate) sum: u32,
}

/// The largest [`Member::size`] that is written.
pub(crate) const MEMBER_SIZE: usize = gzip::BLOCK;

/// Returns what a gzip member holds, which must be `size` bytes.
///
/// # Errors
/// `InvalidData` if the member is damaged, or its content has another length.
pub(crate) fn expand(member: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; size];
    match libdeflater::Decompressor::new().gzip_decompress(member, &mut bytes) {
        Ok(length) if length == size => Ok(bytes),
        Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "a gzip member is too short")),
        Err(error) => Err(io::Error::new(io::ErrorKind::InvalidData, error.to_string())),
    }
}

/// Compresses a stream.
///
/// The output depends on the input, its cuts and the level only: not on the number of cores, nor on how the input is split into writes.
/// Small inputs start no thread; memory is bounded by a few blocks per core. [`Encoder::finish`] writes the end; an encoder
/// dropped before that leaves a cut stream.
pub struct Encoder<W: Write> {
    inner: Inner<W>,
}

enum Inner<W: Write> {
    Plain(W),
    Gzip(gzip::Encoder<W>),
    Zstd(ZstdEncoder<W>),
}

impl<W: Write> fmt::Debug for Encoder<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.inner {
            Inner::Plain(_) => "Plain",
            Inner::Gzip(_) => "Gzip",
            Inner::Zstd(_) => "Zstd",
        };
        f.debug_tuple("Encoder").field(&name).finish()
    }
}

impl<W: Write> Encoder<W> {
    /// Starts a stream; `level` is clamped to what the compression knows (gzip 0 to 12, zstd -7 to 22), `None` is the default.
    ///
    /// # Errors
    /// Fails if the compressor cannot be made.
    pub fn new(out: W, compression: Compression, level: Option<i32>) -> io::Result<Self> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self::with_threads(out, compression, level, threads)
    }

    /// As [`Encoder::new`] with at most this many threads; the output does not depend on it.
    ///
    /// # Errors
    /// Fails if the compressor cannot be made.
    pub fn with_threads(
        out: W,
        compression: Compression,
        level: Option<i32>,
        threads: usize,
    ) -> io::Result<Self> {
        let inner = match compression {
            Compression::Uncompressed => Inner::Plain(out),
            Compression::Gzip => Inner::Gzip(gzip::Encoder::new(out, level, threads)?),
            Compression::Zstd => Inner::Zstd(ZstdEncoder::new(out, level, threads)),
        };
        Ok(Self { inner })
    }

    /// Writes the end of the stream and returns the output.
    ///
    /// # Errors
    /// Fails if the output does.
    pub fn finish(self) -> io::Result<W> {
        self.finish_members().map(|(out, _)| out)
    }

    /// As [`Encoder::finish`], and returns the members, where the compression has such.
    pub(crate) fn finish_members(self) -> io::Result<(W, Vec<Member>)> {
        match self.inner {
            Inner::Plain(mut out) => {
                out.flush()?;
                Ok((out, vec![]))
            }
            Inner::Gzip(encoder) => encoder.finish(),
            Inner::Zstd(encoder) => Ok((encoder.finish()?, vec![])),
        }
    }

    /// Ends a member here and returns how many there are so far; `None` where the compression has no members.
    pub(crate) fn cut(&mut self) -> io::Result<Option<usize>> {
        match &mut self.inner {
            Inner::Gzip(encoder) => encoder.cut().map(Some),
            Inner::Plain(_) | Inner::Zstd(_) => Ok(None),
        }
    }

    /// Calls with the output once all that was written so far has reached it; nothing may be written between
    /// [`cut`](Self::cut) and this.
    pub(crate) fn output(
        &mut self,
        call: impl FnOnce(&mut W) -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        match &mut self.inner {
            Inner::Gzip(encoder) => encoder.output(Box::new(call)),
            Inner::Plain(_) | Inner::Zstd(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Takes a member into account that the caller writes to the output itself.
    pub(crate) fn pass(&mut self, member: Member) -> io::Result<()> {
        match &mut self.inner {
            Inner::Gzip(encoder) => encoder.pass(member),
            Inner::Plain(_) | Inner::Zstd(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Writes a member from before, which holds `size` bytes.
    pub(crate) fn splice(&mut self, member: &[u8], size: usize) -> io::Result<()> {
        match &mut self.inner {
            Inner::Gzip(encoder) => encoder.splice(member, size),
            Inner::Plain(_) | Inner::Zstd(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.inner {
            Inner::Plain(out) => out.write(bytes),
            Inner::Gzip(encoder) => encoder.write(bytes),
            Inner::Zstd(encoder) => encoder.write(bytes),
        }
    }

    /// Does nothing for compressed streams: a flush would put the caller's timing into the bytes.
    fn flush(&mut self) -> io::Result<()> {
        match &mut self.inner {
            Inner::Plain(out) => out.flush(),
            Inner::Gzip(_) | Inner::Zstd(_) => Ok(()),
        }
    }
}

/// The level `zstd` itself takes by default.
const ZSTD_LEVEL: i32 = 3;
/// Input per zstd job. Fixed, because job borders show in the output.
const ZSTD_JOB: usize = 4 << 20;
/// Inputs up to this size are compressed at once, without the thread pool.
const ZSTD_SMALL: usize = 1 << 20;

/// zstd, started only when the input turns out to be large.
struct ZstdEncoder<W: Write> {
    level: i32,
    threads: u32,
    state: ZstdState<W>,
}

enum ZstdState<W: Write> {
    Small(W, Vec<u8>),
    Large(zstd::stream::write::Encoder<'static, W>),
    Failed,
}

impl<W: Write> ZstdEncoder<W> {
    fn new(out: W, level: Option<i32>, threads: usize) -> Self {
        let level = level.unwrap_or(ZSTD_LEVEL).clamp(-7, 22);
        let threads = u32::try_from(threads).unwrap_or(1).clamp(1, 64);
        Self { level, threads, state: ZstdState::Small(out, Vec::new()) }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.state {
            ZstdState::Small(_, buffer) if buffer.len() + bytes.len() <= ZSTD_SMALL => {
                buffer.extend_from_slice(bytes);
                return Ok(bytes.len());
            }
            ZstdState::Small(..) => self.grow()?,
            ZstdState::Large(_) | ZstdState::Failed => {}
        }
        match &mut self.state {
            ZstdState::Large(encoder) => {
                encoder.write_all(bytes)?;
                Ok(bytes.len())
            }
            _ => Err(failed()),
        }
    }

    fn grow(&mut self) -> io::Result<()> {
        let ZstdState::Small(out, buffer) = std::mem::replace(&mut self.state, ZstdState::Failed)
        else {
            return Err(failed());
        };
        let mut encoder = zstd::stream::write::Encoder::new(out, self.level)?;
        // At least one worker always: zstd's output differs between zero and one, but not between one and many.
        encoder.multithread(self.threads)?;
        encoder.set_parameter(CParameter::JobSize(ZSTD_JOB as u32))?;
        encoder.include_checksum(true)?;
        encoder.write_all(&buffer)?;
        self.state = ZstdState::Large(encoder);
        Ok(())
    }

    fn finish(self) -> io::Result<W> {
        match self.state {
            ZstdState::Small(mut out, buffer) => {
                let mut compressor = zstd::bulk::Compressor::new(self.level)?;
                compressor.include_checksum(true)?;
                out.write_all(&compressor.compress(&buffer)?)?;
                out.flush()?;
                Ok(out)
            }
            ZstdState::Large(encoder) => {
                let mut out = encoder.finish()?;
                out.flush()?;
                Ok(out)
            }
            ZstdState::Failed => Err(failed()),
        }
    }
}

fn failed() -> io::Error {
    io::Error::other("the compressor failed earlier")
}
