//! Files that hold the bytes of many others, one after the other.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::scan::digest::open_regular;
use crate::error::{IoContext as _, Result};

/// A file whose parts are contents. It is opened when the first of them is read, and stays open as long as it is known.
#[derive(Debug)]
pub struct PartFile {
    path: PathBuf,
    file: OnceLock<File>,
}

impl PartialEq for PartFile {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path
    }
}

impl Eq for PartFile {}

impl PartFile {
    /// Names a file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), file: OnceLock::new() }
    }

    /// Returns where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self) -> Result<&File> {
        if let Some(file) = self.file.get() {
            return Ok(file);
        }
        let file = open_regular(&self.path)?;
        Ok(self.file.get_or_init(|| file))
    }

    /// Fills a buffer with the bytes from `offset` on.
    ///
    /// # Errors
    /// When the file cannot be read or ends before that.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.file()?
            .read_exact_at(buffer, offset)
            .context(|| format!("cannot read {}", self.path.display()))
    }

    /// Reads `size` bytes from `offset` on, one after the other.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn reader(self: &Arc<Self>, offset: u64, size: u64) -> Result<PartReader> {
        self.file()?;
        Ok(PartReader { file: self.clone(), offset, left: size })
    }
}

/// Reads one part of a file.
#[derive(Debug)]
pub struct PartReader {
    file: Arc<PartFile>,
    offset: u64,
    left: u64,
}

impl Read for PartReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let file = self.file.file().map_err(io::Error::other)?;
        let read = file.read_at(&mut buffer[..wanted], self.offset)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_and_nothing_beyond_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("parts");
        std::fs::write(&path, "onetwothree").unwrap();
        let file = Arc::new(PartFile::new(&path));
        let mut buffer = [0; 3];
        file.read(3, &mut buffer).unwrap();
        assert_eq!(&buffer, b"two");
        let mut text = String::new();
        file.reader(6, 5).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "three");
        // What is shorter than it was is an error, not an end.
        assert!(file.read(9, &mut buffer).is_err());
        assert!(file.reader(6, 6).unwrap().read_to_string(&mut text).is_err());
        assert!(PartFile::new(folder.path().join("none")).read(0, &mut buffer).is_err());
    }
}
