//! Blobs by digest.
//!
//! A blob is written to a temporary file while it is hashed, then committed: synced, renamed to its name, its folder
//! synced, and only then given a row. A committed blob never changes.

pub(crate) mod beginning;
pub(crate) mod uncached;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rusqlite::OptionalExtension as _;
use slipway_spec::{Descriptor, Digest, Hasher, MediaType};

use self::beginning::Beginning;
use self::uncached::{Source, Uncached};
use crate::Store;
use crate::error::{Error, ErrorKind, IoContext as _, Result};
use crate::lease::now_nanos;

/// An open blob that has no name yet. Dropping it without [`commit`](Self::commit) discards it.
#[derive(Debug)]
pub struct ContentWriter {
    store: Store,
    path: PathBuf,
    file: Sink,
    hasher: Hasher,
    size: u64,
    committed: bool,
}

/// Where the bytes go.
#[derive(Debug)]
enum Sink {
    File(File),
    Uncached(Uncached),
    /// They have all been written.
    Finished,
}

impl Sink {
    fn finish(&mut self) -> io::Result<File> {
        match std::mem::replace(self, Self::Finished) {
            Self::File(file) => Ok(file),
            Self::Uncached(file) => file.finish(),
            Self::Finished => Err(finished()),
        }
    }
}

fn finished() -> io::Error {
    io::Error::other("the content was written already")
}

impl ContentWriter {
    /// Returns the number of bytes written.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Names the content by its digest and returns both digest and size. Content that is there already is kept.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when the content is not what `expected` says; nothing is stored then.
    pub fn commit(mut self, expected: Option<&Descriptor>) -> Result<(Digest, u64)> {
        let hasher = std::mem::replace(&mut self.hasher, Hasher::sha256());
        let digest = hasher.finish();
        if let Some(expected) = expected {
            if expected.size != self.size {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "{} has {} bytes instead of {}",
                        expected.digest, self.size, expected.size
                    ),
                ));
            }
            if expected.digest != digest {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "content does not match its digest: expected {}, received {digest}",
                        expected.digest
                    ),
                ));
            }
        }
        let target = self.store.blob_path(&digest);
        if !self.store.has_blob(&digest)? {
            let file = self.file.finish().at("write", &self.path)?;
            rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o444))
                .at("set the mode of", &self.path)?;
            file.sync_all().at("write", &self.path)?;
            let parent = target.parent().expect("a blob's path has a folder");
            if !parent.is_dir() {
                fs::create_dir_all(parent).at("create", parent)?;
                parent.parent().map_or(Ok(()), sync_folder)?;
            }
            // Without its row the file would be litter to a collector that runs now.
            let _no_sweep = self.store.sweep_lock(false)?;
            fs::rename(&self.path, &target).at("create", &target)?;
            self.committed = true;
            sync_folder(parent)?;
            self.store.record_blob(&digest, self.size)?;
        }
        Ok((digest, self.size))
    }
}

impl ContentWriter {
    /// Begins with what a blob in the store begins with, whose hash is known. Nothing may be written before.
    pub(crate) fn begin_with(&mut self, beginning: Beginning, hasher: Hasher) -> io::Result<()> {
        self.size = beginning.length();
        self.hasher = hasher;
        match &mut self.file {
            Sink::File(file) => beginning.write_to(file),
            Sink::Uncached(file) => file.begin_with(beginning),
            Sink::Finished => Err(finished()),
        }
    }

    /// Returns the hash of what was written.
    pub(crate) fn hasher(&self) -> &Hasher {
        &self.hasher
    }
}

impl Write for ContentWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match &mut self.file {
            Sink::File(file) => file.write(bytes)?,
            Sink::Uncached(file) => file.write(bytes)?,
            Sink::Finished => return Err(finished()),
        };
        self.hasher.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for ContentWriter {
    fn drop(&mut self) {
        if !self.committed
            && let Err(error) = fs::remove_file(&self.path)
        {
            // The lease's folder is removed as a whole in the end.
            tracing::debug!(path = %self.path.display(), %error, "temporary file stays behind");
        }
    }
}

/// Makes renames in a folder survive a power cut.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|f| f.sync_all()).at("sync", folder)
}

/// A blob of the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// When it came here, in nanoseconds since 1970.
    pub created: i64,
}

impl Store {
    /// Describes content; nothing when it is not there.
    ///
    /// # Errors
    /// When the database fails.
    pub fn blob_info(&self, digest: &Digest) -> Result<Option<BlobInfo>> {
        let row = self.metadata().with(|c| {
            Ok(c.prepare_cached("SELECT size, created FROM blob WHERE digest = ?1")?
                .query_row([digest.to_string()], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?)
        })?;
        let row = row.filter(|(size, _): &(i64, i64)| self.is_on_disk(digest, *size));
        Ok(row.map(|(size, created)| BlobInfo {
            digest: digest.clone(),
            size: u64::try_from(size).unwrap_or(0),
            created,
        }))
    }

    /// Lists some content in the order of digests, after one of them.
    ///
    /// # Errors
    /// When the database fails.
    pub fn blob_page(&self, after: &str, count: usize) -> Result<Vec<BlobInfo>> {
        let rows = self.metadata().with(|c| {
            let mut statement = c.prepare_cached(
                "SELECT digest, size, created FROM blob WHERE digest > ?1 ORDER BY digest LIMIT ?2",
            )?;
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            let rows = statement
                .query_map((after, count), |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
            Ok(rows.collect::<rusqlite::Result<Vec<(String, i64, i64)>>>()?)
        })?;
        rows.into_iter()
            .map(|(digest, size, created)| {
                let parsed = digest.parse().map_err(|error| {
                    Error::new(ErrorKind::Corrupt, format!("{digest:?} in the database"))
                        .because(error)
                })?;
                Ok(BlobInfo { digest: parsed, size: u64::try_from(size).unwrap_or(0), created })
            })
            .collect()
    }

    /// Returns where a blob is or would be.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.content_folder().join("blobs").join(digest.algorithm().as_str()).join(digest.hex())
    }

    /// Opens a new blob for writing, to be hashed with sha256.
    ///
    /// # Errors
    /// When the temporary file cannot be made.
    pub fn write_blob(&self) -> Result<ContentWriter> {
        self.writer(Hasher::sha256(), Sink::File)
    }

    /// As [`write_blob`](Self::write_blob), for content that nobody is likely to read soon: if it is large, it does not
    /// pass through the page cache.
    ///
    /// # Errors
    /// When the temporary file cannot be made.
    pub(crate) fn write_uncached(&self) -> Result<ContentWriter> {
        self.writer(Hasher::sha256(), |file| Sink::Uncached(Uncached::new(file)))
    }

    /// Opens a new blob for writing whose digest is known beforehand.
    ///
    /// # Errors
    /// When the temporary file cannot be made.
    pub fn write_expected(&self, digest: &Digest) -> Result<ContentWriter> {
        self.writer(digest.verifier(), Sink::File)
    }

    fn writer(&self, hasher: Hasher, sink: fn(File) -> Sink) -> Result<ContentWriter> {
        let path = self.temporary("blob");
        let file = sink(File::create_new(&path).at("create", &path)?);
        Ok(ContentWriter { store: self.clone(), path, file, hasher, size: 0, committed: false })
    }

    /// Stores a small document and describes it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put(&self, media_type: MediaType, bytes: &[u8]) -> Result<Descriptor> {
        let digest = Digest::of(bytes);
        if !self.has_blob(&digest)? {
            let mut writer = self.write_blob()?;
            writer.write_all(bytes).context(|| format!("cannot write {digest}"))?;
            writer.commit(None)?;
        }
        Ok(Descriptor::new(media_type, digest, bytes.len() as u64))
    }

    /// Whether content is there; if so it is protected from collection for the life of this process.
    ///
    /// # Errors
    /// When the database fails.
    pub fn has_blob(&self, digest: &Digest) -> Result<bool> {
        let size = self.metadata().find(
            digest.to_string(),
            "SELECT size, used FROM blob WHERE digest = ?1",
            "UPDATE blob SET used = ?2 WHERE digest = ?1",
            |row| row.get::<_, i64>(0),
        )?;
        Ok(size.is_some_and(|size| self.is_on_disk(digest, size)))
    }

    /// Whether a row tells the truth: one whose file was lost or cut short (a damaged disk, a careless hand) must not keep
    /// anybody from fetching it again.
    fn is_on_disk(&self, digest: &Digest, size: i64) -> bool {
        fs::symlink_metadata(self.blob_path(digest))
            .is_ok_and(|m| m.is_file() && i64::try_from(m.len()) == Ok(size))
    }

    /// Returns the size of content that is there, in bytes.
    ///
    /// # Errors
    /// When the database fails.
    pub fn blob_size(&self, digest: &Digest) -> Result<Option<u64>> {
        self.metadata().with(|c| {
            let size = c
                .prepare_cached("SELECT size FROM blob WHERE digest = ?1")?
                .query_row([digest.to_string()], |row| row.get::<_, i64>(0))
                .optional()?;
            Ok(size
                .filter(|size| self.is_on_disk(digest, *size))
                .and_then(|size| u64::try_from(size).ok()))
        })
    }

    pub(crate) fn record_blob(&self, digest: &Digest, size: u64) -> Result<()> {
        let now = now_nanos();
        self.metadata().with(|c| {
            c.prepare_cached(
                "INSERT INTO blob VALUES (?1, ?2, ?3, ?3) ON CONFLICT (digest) DO UPDATE SET used = ?3, size = ?2",
            )?
            .execute((digest.to_string(), i64::try_from(size).unwrap_or(i64::MAX), now))?;
            Ok(())
        })
    }

    /// Opens content for reading.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when it is not there.
    pub fn open_blob(&self, digest: &Digest) -> Result<File> {
        let path = self.blob_path(digest);
        File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::missing_blob(digest),
            _ => Error::io(format!("cannot open {}", path.display()), error),
        })
    }

    /// Opens content for reading large parts of it.
    pub(crate) fn blob_source(&self, digest: &Digest) -> io::Result<Source> {
        Source::open(&self.blob_path(digest))
    }

    /// Reads a small document whole and verifies it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when it is not there, [`ErrorKind::Corrupt`] when it does not match its digest or is
    /// larger than `limit` bytes.
    pub fn read_blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![];
        self.open_blob(digest)?
            .take(limit + 1)
            .read_to_end(&mut bytes)
            .context(|| format!("cannot read content {digest}"))?;
        if bytes.len() as u64 > limit {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("content {digest} is larger than {limit} bytes"),
            ));
        }
        let mut hasher = digest.verifier();
        hasher.update(&bytes);
        if hasher.finish() != *digest {
            return Err(self.damaged(digest));
        }
        Ok(bytes)
    }

    /// Reads content whole to see whether it is still what its digest says; if not, it is forgotten.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when it is not there, [`ErrorKind::Corrupt`] when it is damaged.
    pub fn verify_blob(&self, digest: &Digest) -> Result<()> {
        let mut file = self.open_blob(digest)?;
        let mut hasher = digest.verifier();
        let mut buffer = vec![0; 256 * 1024];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => hasher.update(&buffer[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(Error::io(format!("cannot read content {digest}"), error));
                }
            }
        }
        if hasher.finish() == *digest { Ok(()) } else { Err(self.damaged(digest)) }
    }

    /// Forgets content that turned out to be damaged, so that it is fetched again, and says so.
    pub(crate) fn damaged(&self, digest: &Digest) -> Error {
        let forgotten = self.metadata().with(|c| {
            c.execute("DELETE FROM blob WHERE digest = ?1", [digest.to_string()])?;
            c.execute("DELETE FROM layer_blob WHERE digest = ?1", [digest.to_string()])?;
            Ok(())
        });
        if let Err(error) = forgotten.and_then(|()| {
            let path = self.blob_path(digest);
            fs::remove_file(&path).at("remove", &path)
        }) {
            tracing::warn!(%digest, %error, "damaged content could not be removed");
        }
        Error::new(
            ErrorKind::Corrupt,
            format!(
                "content {digest} in the store was damaged on disk and has been removed; run the command again"
            ),
        )
    }

    /// Returns the size of a file on disk that holds content: a helper for transports.
    ///
    /// # Errors
    /// When the content is not there.
    pub fn describe_blob(&self, digest: &Digest, media_type: MediaType) -> Result<Descriptor> {
        let Some(size) = self.blob_size(digest)? else { return Err(Error::missing_blob(digest)) };
        Ok(Descriptor::new(media_type, digest.clone(), size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        (folder, store)
    }

    #[test]
    fn content_is_visible_only_once_committed() {
        let (_folder, store) = store();
        let mut writer = store.write_blob().unwrap();
        writer.write_all(b"hello").unwrap();
        assert!(!store.has_blob(&Digest::of(b"hello")).unwrap());
        let (digest, size) = writer.commit(None).unwrap();
        assert_eq!((digest.clone(), size), (Digest::of(b"hello"), 5));
        assert!(store.has_blob(&digest).unwrap());
        assert_eq!(store.read_blob(&digest, 100).unwrap(), b"hello");
    }

    #[test]
    fn wrong_content_leaves_nothing() {
        let (_folder, store) = store();
        let expected = Descriptor::new(MediaType::OCI_LAYER, Digest::of(b"good"), 4);
        let mut writer = store.write_expected(&expected.digest).unwrap();
        writer.write_all(b"evil").unwrap();
        assert_eq!(writer.commit(Some(&expected)).unwrap_err().kind(), ErrorKind::Corrupt);
        let mut writer = store.write_expected(&expected.digest).unwrap();
        writer.write_all(b"goo").unwrap();
        assert_eq!(writer.commit(Some(&expected)).unwrap_err().kind(), ErrorKind::Corrupt);
        assert!(!store.has_blob(&expected.digest).unwrap());
        assert!(!store.blob_path(&expected.digest).exists());
    }

    #[test]
    fn damaged_content_is_noticed_and_may_be_stored_again() {
        let (_folder, store) = store();
        let descriptor = store.put(MediaType::OCI_CONFIG, b"{}").unwrap();
        let path = store.blob_path(&descriptor.digest);
        fs::remove_file(&path).unwrap();
        fs::write(&path, b"[]").unwrap();
        assert_eq!(
            store.read_blob(&descriptor.digest, 100).unwrap_err().kind(),
            ErrorKind::Corrupt
        );
        assert_eq!(store.put(MediaType::OCI_CONFIG, b"{}").unwrap(), descriptor);
        assert_eq!(store.read_blob(&descriptor.digest, 100).unwrap(), b"{}");
    }
}
