//! Content on its way into a layout.

use std::fs::{self, File};
use std::io::{Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use slipway_spec::{Digest, Hasher};
use slipway_store::{Error, ErrorKind};

/// Content on its way. Dropping it removes it.
pub(super) struct Ingest {
    layout: PathBuf,
    path: PathBuf,
    file: File,
    hasher: Hasher,
    offset: u64,
}

impl Ingest {
    pub(super) fn new(layout: &Path) -> Result<Self, Error> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = layout.join("ingest").join(format!("{}-{number}", std::process::id()));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file =
            file.map_err(|error| Error::io(format!("cannot create {}", path.display()), error))?;
        Ok(Self { layout: layout.to_path_buf(), path, file, hasher: Hasher::sha256(), offset: 0 })
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Returns the digest of what was written so far.
    pub(super) fn digest(&self) -> Digest {
        self.hasher.clone().finish()
    }

    fn failed(&self, error: std::io::Error) -> Error {
        Error::io(format!("cannot write {}", self.path.display()), error)
    }

    pub(super) fn truncate(&mut self) -> Result<(), Error> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.rewind());
        emptied.map_err(|error| self.failed(error))?;
        self.hasher = Hasher::sha256();
        self.offset = 0;
        Ok(())
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(|error| self.failed(error))?;
        self.hasher.update(bytes);
        self.offset += bytes.len() as u64;
        Ok(())
    }

    /// Gives the content its name; `false` when it was there already.
    pub(super) fn commit(
        self,
        total: Option<u64>,
        expected: Option<&Digest>,
    ) -> Result<bool, Error> {
        let (digest, size) = (self.digest(), self.offset);
        if total.is_some_and(|total| total != size) {
            let what = format!("unexpected commit size {size}, expected {}", total.unwrap_or(0));
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        if let Some(expected) = expected.filter(|expected| **expected != digest) {
            let what = format!("unexpected commit digest {digest}, expected {expected}");
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        let folder = self.layout.join("blobs").join(digest.algorithm().as_str());
        let place = folder.join(digest.hex());
        if place.exists() {
            return Ok(false);
        }
        let done = (|| {
            self.file.sync_all()?;
            fs::create_dir_all(&folder)?;
            fs::rename(&self.path, &place)?;
            // The name must last as long as the index that will have it.
            File::open(&folder)?.sync_all()
        })();
        done.map_err(|error| self.failed(error))?;
        Ok(true)
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        // After a commit it has gone to its place.
        let _gone = fs::remove_file(&self.path);
    }
}
