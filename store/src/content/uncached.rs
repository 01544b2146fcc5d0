//! Files that are written past the page cache once they are large, and read past it where they are not in it.
//!
//! What a build packs is rarely read again soon. Through the page cache each byte of it would be copied into a page that
//! has to be found first, and the disk would begin with it only when it is synced in the end.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rustix::fs::{FallocateFlags, OFlags};

use super::beginning::{Beginning, Copying};

/// Files up to this size, in bytes, go through the page cache.
const SMALL: u64 = 16 << 20;
/// Bytes written at once.
pub(super) const CHUNK: usize = 1 << 20;
/// What places, lengths and memory must be multiples of; enough for every file system and disk in use.
pub(super) const ALIGNMENT: usize = 4096;

/// The writer. [`finish`](Self::finish) writes what is left; one that is dropped leaves a file that is cut short.
#[derive(Debug)]
pub(super) struct Uncached {
    file: File,
    written: u64,
    state: State,
    /// What comes first, if that is copied meanwhile.
    copying: Option<Copying>,
}

#[derive(Debug)]
enum State {
    /// Through the page cache: the file is small so far, or its file system knows no other way.
    Cached {
        /// Whether the other way is worth a try.
        may_change: bool,
    },
    Direct(Chunk),
}

/// Memory at an aligned address.
#[derive(Debug)]
struct Chunk {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Chunk {
    fn new() -> Self {
        let memory = vec![0; CHUNK + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { memory, start, length: 0 }
    }

    fn put(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(CHUNK - self.length);
        let from = self.start + self.length;
        self.memory[from..from + count].copy_from_slice(&bytes[..count]);
        self.length += count;
        count
    }

    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl Uncached {
    pub(super) fn new(file: File) -> Self {
        Self { file, written: 0, state: State::Cached { may_change: true }, copying: None }
    }

    /// Begins a file that is empty so far. Where that is a lot, it goes on while more is written.
    pub(super) fn begin_with(&mut self, beginning: Beginning) -> io::Result<()> {
        self.written = beginning.length();
        if self.written < SMALL || direct(&self.file, true).is_err() {
            return beginning.write_to(&mut self.file);
        }
        let aligned = self.written - self.written % ALIGNMENT as u64;
        let behind = beginning.from(aligned)?;
        let mut chunk = Chunk::new();
        chunk.put(&behind);
        self.state = State::Direct(chunk);
        // In one place on the disk, and without waiting for what is written behind it.
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, aligned) {
            Err(error) if error == rustix::io::Errno::NOSPC => return Err(error.into()),
            // Not every file system can; each part finds its place when it is written.
            _ => {}
        }
        self.file.seek(SeekFrom::Start(aligned))?;
        self.copying = Some(Copying::start(beginning, self.file.try_clone()?, behind)?);
        Ok(())
    }

    /// Writes what is left and returns the file.
    pub(super) fn finish(mut self) -> io::Result<File> {
        if let Some(copying) = self.copying.take() {
            copying.finish()?;
        }
        if let State::Direct(chunk) = &self.state {
            // The end is no multiple of anything.
            direct(&self.file, false)?;
            self.file.write_all(chunk.bytes())?;
        }
        Ok(self.file)
    }

    /// Writes a full chunk; a file system that refuses it after all gets it the ordinary way, and all that follows.
    fn write_chunk(&mut self) -> io::Result<()> {
        let State::Direct(chunk) = &mut self.state else { return Ok(()) };
        let mut rest = chunk.bytes();
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                // A disk that takes less than it was given goes on at a place that may not be aligned.
                Ok(count) if count % ALIGNMENT == 0 => rest = &rest[count..],
                Ok(count) => {
                    direct(&self.file, false)?;
                    self.file.write_all(&rest[count..])?;
                    self.state = State::Cached { may_change: false };
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    direct(&self.file, false)?;
                    self.file.write_all(rest)?;
                    self.state = State::Cached { may_change: false };
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        chunk.length = 0;
        Ok(())
    }
}

impl Write for Uncached {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if matches!(self.state, State::Cached { may_change: true })
            && self.written >= SMALL
            && self.written.is_multiple_of(ALIGNMENT as u64)
        {
            self.state = match direct(&self.file, true) {
                Ok(()) => State::Direct(Chunk::new()),
                Err(_) => State::Cached { may_change: false },
            };
        }
        let count = match &mut self.state {
            State::Cached { may_change } => {
                let ahead = match usize::try_from(self.written) {
                    // Up to a place where the other way may begin.
                    Ok(written) if *may_change && self.written >= SMALL => {
                        bytes.len().min(ALIGNMENT - written % ALIGNMENT)
                    }
                    _ => bytes.len(),
                };
                self.file.write(&bytes[..ahead])?
            }
            State::Direct(chunk) => {
                let count = chunk.put(bytes);
                if chunk.length == CHUNK {
                    self.write_chunk()?;
                }
                count
            }
        };
        self.written += count as u64;
        Ok(count)
    }

    /// Does nothing: [`finish`](Self::finish) writes the rest.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that is read in large parts, past the page cache if it is large itself.
#[derive(Debug)]
pub(crate) struct Source {
    file: File,
    direct: bool,
    /// Memory of parts that nobody holds any more.
    spare: Arc<Mutex<Vec<Vec<u8>>>>,
}

/// Part of a file; its memory is used again when it is dropped.
struct Part {
    memory: Vec<u8>,
    range: Range<usize>,
    spare: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        &self.memory[self.range.clone()]
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
    }
}

impl Source {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let large = file.metadata()?.len() >= SMALL;
        let direct = large && direct(&file, true).is_ok();
        Ok(Self { file, direct, spare: Arc::default() })
    }

    /// Reads a part of the file, which must be there.
    pub(crate) fn read(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let skip = usize::try_from(offset % ALIGNMENT as u64).unwrap_or(0);
        let whole = (skip + length).next_multiple_of(ALIGNMENT);
        let memory = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut memory = memory.unwrap_or_default();
        memory.resize(memory.len().max(whole + ALIGNMENT), 0);
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        let range = start + skip..start + skip + length;
        let mut done = 0;
        if self.direct {
            let place = offset - skip as u64;
            match self.file.read_at(&mut memory[start..start + whole], place) {
                // Less only at the end of the file, or where the file system is of another mind.
                Ok(read) => done = read.saturating_sub(skip).min(length),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                Err(error) => return Err(error),
            }
            if done < length {
                direct(&self.file, false)?;
            }
        }
        let rest = start + skip + done..range.end;
        let read = self.file.read_exact_at(&mut memory[rest], offset + done as u64);
        if self.direct && done < length {
            direct(&self.file, true)?;
        }
        read?;
        Ok(Bytes::from_owner(Part { memory, range, spare: self.spare.clone() }))
    }
}

pub(super) fn direct(file: &File, on: bool) -> io::Result<()> {
    let mut flags = rustix::fs::fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, on);
    Ok(rustix::fs::fcntl_setfl(file, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(folder: &std::path::Path, length: usize, part: usize) {
        let bytes: Vec<u8> = (0..length).map(|n| (n / 5) as u8).collect();
        let path = folder.join("file");
        let mut out = Uncached::new(File::create(&path).unwrap());
        for part in bytes.chunks(part) {
            out.write_all(part).unwrap();
        }
        drop(out.finish().unwrap());
        assert!(std::fs::read(&path).unwrap() == bytes, "{length} bytes in parts of {part}");

        let file = File::open(&path).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let source = Source::open(&path).unwrap();
        for (at, count) in [(0, 1), (0, length), (length / 2, length / 3), (length, 0)] {
            if at + count <= length {
                assert!(source.read(at as u64, count).unwrap() == bytes[at..at + count]);
            }
        }
        assert!(source.read(length as u64, 1).is_err());
        assert!(source.read(0, length + 1).is_err());
    }

    #[test]
    fn what_goes_in_is_in_the_file() {
        let large = usize::try_from(SMALL).unwrap();
        // Not in a file system in memory.
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for length in [0, 1, large - 1, large, large + 1, large + CHUNK, large + 3 * CHUNK + 17] {
            written(folder.path(), length, 1_000_003);
        }
        written(folder.path(), large + 5 * CHUNK, 4096);
        written(folder.path(), large + 2 * CHUNK, 300_001);
    }

    #[test]
    fn a_file_system_without_the_other_way_does_as_well() {
        let memory = std::path::Path::new("/dev/shm");
        assert!(memory.is_dir(), "this test needs /dev/shm");
        let folder = tempfile::tempdir_in(memory).unwrap();
        written(folder.path(), usize::try_from(SMALL).unwrap() + 3 * CHUNK + 17, 1_000_003);
    }
}
