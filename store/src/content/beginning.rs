//! The beginning of new content that is the beginning of a blob in the store: copied as it is, not looked into.

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use libdeflater::Crc;
use slipway_spec::Digest;

use super::uncached::{ALIGNMENT, CHUNK, Source, direct};

/// A part of the beginning.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// Its length in bytes.
    pub(crate) length: usize,
    /// The CRC-32 of its bytes.
    pub(crate) sum: u32,
}

/// The blob that a beginning is taken from, with what it was found to be.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) digest: Digest,
    pub(crate) source: Arc<Source>,
    /// Set once it does not hold what was written there.
    pub(crate) spoiled: Arc<OnceLock<Digest>>,
}

/// What is to be copied, of one blob.
#[derive(Debug)]
pub(crate) struct Beginning {
    origin: Origin,
    pieces: Vec<Piece>,
    length: u64,
}

impl Beginning {
    pub(crate) fn new(origin: Origin, pieces: Vec<Piece>) -> Self {
        let length = pieces.iter().map(|piece| piece.length as u64).sum();
        Self { origin, pieces, length }
    }

    /// Returns its length in bytes.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Writes all of it.
    pub(super) fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let mut check = Check::new(&self.pieces);
        self.read(self.length, &mut check, |_, bytes| out.write_all(bytes))
    }

    /// Returns the bytes from a place on.
    pub(super) fn from(&self, offset: u64) -> io::Result<Vec<u8>> {
        let length = usize::try_from(self.length - offset).map_err(io::Error::other)?;
        self.origin.read(offset, length).map(|bytes| bytes.to_vec())
    }

    /// Reads up to a place.
    fn read(
        &self,
        end: u64,
        check: &mut Check<'_>,
        mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        for offset in (0..end).step_by(CHUNK) {
            let length = usize::try_from(end - offset).unwrap_or(CHUNK).min(CHUNK);
            let bytes = self.origin.read(offset, length)?;
            self.check(check, &bytes)?;
            each(offset, &bytes)?;
        }
        Ok(())
    }

    fn check(&self, check: &mut Check<'_>, bytes: &[u8]) -> io::Result<()> {
        if check.update(bytes) { Ok(()) } else { Err(self.origin.spoil()) }
    }
}

impl Origin {
    fn read(&self, offset: u64, length: usize) -> io::Result<bytes::Bytes> {
        self.source.read(offset, length).inspect_err(|_| drop(self.spoil()))
    }

    fn spoil(&self) -> io::Error {
        // Only the first to notice can say so.
        drop(self.spoiled.set(self.digest.clone()));
        io::Error::other(format!("{} does not hold what was written there", self.digest))
    }
}

/// The comparison of bytes with the sums of pieces.
struct Check<'a> {
    pieces: std::slice::Iter<'a, Piece>,
    piece: Option<&'a Piece>,
    /// The bytes of the piece that are yet to come.
    left: usize,
    sum: Crc,
}

impl<'a> Check<'a> {
    fn new(pieces: &'a [Piece]) -> Self {
        let mut check = Self { pieces: pieces.iter(), piece: None, left: 0, sum: Crc::new() };
        check.begin_next();
        check
    }

    fn begin_next(&mut self) {
        self.piece = self.pieces.next();
        self.left = self.piece.map_or(0, |piece| piece.length);
        self.sum = Crc::new();
    }

    /// Whether bytes are what is expected next, as far as they complete pieces.
    fn update(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let Some(piece) = self.piece else { return false };
            let (now, rest) = bytes.split_at(bytes.len().min(self.left));
            self.sum.update(now);
            self.left -= now.len();
            bytes = rest;
            if self.left == 0 {
                if self.sum.sum() != piece.sum {
                    return false;
                }
                self.begin_next();
            }
        }
        true
    }
}

/// A beginning that a thread copies to its place, while what follows is written by others.
#[derive(Debug)]
pub(super) struct Copying {
    thread: Option<JoinHandle<io::Result<()>>>,
    /// Set when nobody wants it any more.
    stop: Arc<AtomicBool>,
}

impl Copying {
    /// Begins. What is `behind` the last place that is a multiple of [`ALIGNMENT`] is written by the caller, and only
    /// checked here.
    pub(super) fn start(beginning: Beginning, file: File, behind: Vec<u8>) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let copy = move || {
            let end = beginning.length - behind.len() as u64;
            let mut check = Check::new(&beginning.pieces);
            beginning.read(end, &mut check, |offset, bytes| {
                if stopped.load(Ordering::Relaxed) {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                write_at(&file, bytes, offset)
            })?;
            beginning.check(&mut check, &behind)
        };
        let thread = std::thread::Builder::new().name("copier".to_owned()).spawn(copy)?;
        Ok(Self { thread: Some(thread), stop })
    }

    /// Waits until all of it is there.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.thread.take().map_or(Ok(()), |thread| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::debug!("a copy that nobody wants any more panicked");
        }
    }
}

/// Writes a part whose place, length and memory are aligned; where the file system refuses that after all, the ordinary way.
fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    debug_assert!(bytes.len().is_multiple_of(ALIGNMENT), "the rest is the caller's");
    match file.write_all_at(bytes, offset) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            direct(file, false)?;
            file.write_all_at(bytes, offset)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(bytes: &[u8]) -> Piece {
        Piece { length: bytes.len(), sum: libdeflater::crc32(bytes) }
    }

    #[test]
    fn pieces_are_compared_wherever_they_are_cut() {
        let bytes: Vec<u8> = (0..100u8).collect();
        let pieces = [piece(&bytes[..1]), piece(&bytes[1..60]), piece(&bytes[60..])];
        for size in [1, 7, 59, 60, 100] {
            let mut check = Check::new(&pieces);
            assert!(bytes.chunks(size).all(|part| check.update(part)), "{size}");
            assert!(!check.update(b"x"), "there is no more");
            for wrong in [0, 30, 99] {
                let mut bytes = bytes.clone();
                bytes[wrong] ^= 1;
                let mut check = Check::new(&pieces);
                assert!(!bytes.chunks(size).all(|part| check.update(part)), "{size}, {wrong}");
            }
        }
    }
}
