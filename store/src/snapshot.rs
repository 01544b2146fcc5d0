//! Snapshots: stacks of layers.
//!
//! A layer is known by a small number, and by its diff id once somebody has computed it. It may exist as a folder, as
//! blobs, or as a [`Tree`] whose contents are elsewhere; each form is made from another when it is needed, once, whatever
//! stack the layer is part of.
//!
//! Folders are not synced one by one. A folder made since the machine started is trusted, because what the kernel was
//! told it shows; [`Store::sync_layers`] syncs the file system once and marks all folders made until then as durable. A
//! folder that was never marked and is older than the last start may have lost data in a power cut: it is forgotten.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::OptionalExtension as _;
use slipway_spec::media_type::Compression;
use slipway_spec::{Descriptor, Digest, Hasher, MediaType};

use crate::Store;
use crate::error::{Error, ErrorKind, IoContext as _, Result};
use crate::layer::compression::{self, Encoder};
use crate::layer::{self, ApplyOptions, DiffOptions, LayerErrorKind, LayerStack, TarWriter};
use crate::lease::{now_nanos, remove_tree};
use crate::tree::Tree;

/// A layer of this store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerId(pub i64);

/// A stack of layers, base first. The empty stack is the empty file system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Snapshot {
    /// The layers.
    pub layers: Vec<LayerId>,
}

impl Snapshot {
    /// Returns this stack with a layer on top.
    #[must_use]
    pub fn with(&self, layer: LayerId) -> Self {
        let mut layers = self.layers.clone();
        layers.push(layer);
        Self { layers }
    }
}

/// How a layer should be compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobOptions {
    /// The compression.
    pub compression: Compression,
    /// The level, in the compression's own scale; `None` is the default.
    pub level: Option<i32>,
    /// Whether a blob in another compression is converted rather than used as it is.
    pub force: bool,
    /// Whether to use Docker's media types.
    pub docker: bool,
}

impl Default for BlobOptions {
    fn default() -> Self {
        Self { compression: Compression::Gzip, level: None, force: false, docker: false }
    }
}

/// A layer as content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerBlob {
    /// The blob.
    pub descriptor: Descriptor,
    /// The digest of its uncompressed bytes.
    pub diff_id: Digest,
}

#[derive(Debug, Default)]
struct Row {
    diff_id: Option<Digest>,
    folder: bool,
    created: i64,
    description: String,
}

#[derive(Clone, Debug)]
struct BlobRow {
    digest: Digest,
    media_type: MediaType,
    compression: Compression,
    level: Option<i32>,
    size: u64,
}

/// One lock per layer under work.
#[derive(Debug, Default)]
pub(crate) struct Busy(Mutex<HashMap<LayerId, Arc<Mutex<()>>>>);

impl Busy {
    fn of(&self, layer: LayerId) -> Arc<Mutex<()>> {
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Forget locks that nobody holds or waits for.
        if locks.len() > 256 {
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        }
        locks.entry(layer).or_default().clone()
    }
}

fn parse_compression(text: &str) -> Compression {
    match text {
        "gzip" => Compression::Gzip,
        "zstd" => Compression::Zstd,
        _ => Compression::Uncompressed,
    }
}

fn encoder_kind(compression: Compression) -> compression::Compression {
    match compression {
        Compression::Uncompressed => compression::Compression::None,
        Compression::Gzip => compression::Compression::Gzip,
        Compression::Zstd => compression::Compression::Zstd,
    }
}

fn layer_error(what: impl std::fmt::Display, error: layer::LayerError) -> Error {
    let kind = match error.kind() {
        LayerErrorKind::InvalidArchive => ErrorKind::Corrupt,
        LayerErrorKind::NotFound => ErrorKind::NotFound,
        LayerErrorKind::Unsupported => ErrorKind::Invalid,
        LayerErrorKind::NeedsLower | LayerErrorKind::Storage | LayerErrorKind::Stream => {
            let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<io::Error>());
            match source.map(io::Error::kind) {
                Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => ErrorKind::NoSpace,
                _ => ErrorKind::Io,
            }
        }
    };
    Error::new(kind, what.to_string()).because(error)
}

impl Store {
    /// Returns where a layer's folder is or would be.
    pub fn layer_folder(&self, layer: LayerId) -> PathBuf {
        self.layer_home(layer).join("fs")
    }

    fn layer_home(&self, layer: LayerId) -> PathBuf {
        self.root().join("layers").join(layer.0.to_string())
    }

    fn insert_layer(&self, diff_id: Option<&Digest>, created: i64, description: &str) -> Result<LayerId> {
        self.metadata().with(|c| {
            c.prepare_cached("INSERT INTO layer (diff_id, created, used, description) VALUES (?1, ?2, ?3, ?4)")?
                .execute((diff_id.map(ToString::to_string), created, now_nanos(), description))?;
            Ok(LayerId(c.last_insert_rowid()))
        })
    }

    /// Returns the layer with a diff id, making it known where it is new. `created` is used for new ones.
    ///
    /// # Errors
    /// When the database fails.
    pub fn layer_by_diff_id(&self, diff_id: &Digest, created: i64, description: &str) -> Result<LayerId> {
        let found = self.metadata().with(|c| {
            Ok(c.prepare_cached(
                "UPDATE layer SET used = ?2 WHERE id = (SELECT max(id) FROM layer WHERE diff_id = ?1) RETURNING id",
            )?
            .query_row((diff_id.to_string(), now_nanos()), |row| row.get(0).map(LayerId))
            .optional()?)
        })?;
        found.map_or_else(|| self.insert_layer(Some(diff_id), created, description), Ok)
    }

    /// Makes a layer of a folder that a step has written: `home` holds `fs` and is moved into the store.
    ///
    /// # Errors
    /// When it cannot be moved or recorded.
    pub fn adopt_folder(&self, home: &Path, description: &str) -> Result<LayerId> {
        let layer = self.insert_layer(None, now_nanos(), description)?;
        let target = self.layer_home(layer);
        fs::rename(home, &target).at("create", &target)?;
        self.record_folder(layer)?;
        Ok(layer)
    }

    /// Makes a layer that is written down only when somebody needs its bytes.
    ///
    /// # Errors
    /// When the database fails.
    pub fn adopt_tree(&self, tree: Tree, description: &str) -> Result<LayerId> {
        let layer = self.insert_layer(None, now_nanos(), description)?;
        self.pending_trees().insert(layer, Arc::new(tree));
        Ok(layer)
    }

    fn pending_trees(&self) -> std::sync::MutexGuard<'_, HashMap<LayerId, Arc<Tree>>> {
        self.0.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the tree of a layer that has not been written down.
    pub fn pending_tree(&self, layer: LayerId) -> Option<Arc<Tree>> {
        self.pending_trees().get(&layer).cloned()
    }

    fn record_folder(&self, layer: LayerId) -> Result<()> {
        self.metadata().with(|c| {
            c.prepare_cached("UPDATE layer SET folder = 1, boot = ?2, used = ?3 WHERE id = ?1")?.execute((
                layer.0,
                &self.0.boot,
                now_nanos(),
            ))?;
            Ok(())
        })
    }

    fn row(&self, layer: LayerId) -> Result<Option<Row>> {
        let row = self.metadata().with(|c| {
            Ok(c.prepare_cached(
                "UPDATE layer SET used = ?2 WHERE id = ?1 RETURNING diff_id, folder, boot, created, description",
            )?
            .query_row((layer.0, now_nanos()), |row| {
                let boot: Option<String> = row.get(2)?;
                Ok((row.get::<_, Option<String>>(0)?, row.get::<_, bool>(1)?, boot, row.get(3)?, row.get(4)?))
            })
            .optional()?)
        })?;
        let Some((diff_id, folder, boot, created, description)) = row else { return Ok(None) };
        let diff_id = diff_id.map(|text| text.parse()).transpose().map_err(|error| {
            Error::new(ErrorKind::Corrupt, format!("layer {} in the database", layer.0)).because(error)
        })?;
        let trusted = boot.is_none_or(|boot| boot == self.0.boot);
        Ok(Some(Row { diff_id, folder: folder && trusted, created, description }))
    }

    fn blob_rows(&self, layer: LayerId) -> Result<Vec<BlobRow>> {
        let rows = self.metadata().with(|c| {
            let mut statement = c.prepare_cached(
                "SELECT digest, media_type, compression, level, size FROM layer_blob WHERE layer = ?1",
            )?;
            let rows = statement.query_map([layer.0], |row| {
                Ok((
                    row.get::<_, String>(0)?,
                    row.get::<_, String>(1)?,
                    row.get::<_, String>(2)?,
                    row.get(3)?,
                    row.get::<_, i64>(4)?,
                ))
            })?;
            Ok(rows.collect::<rusqlite::Result<Vec<_>>>()?)
        })?;
        rows.into_iter()
            .map(|(digest, media_type, compression, level, size)| {
                let digest = digest.parse().map_err(|error| {
                    Error::new(ErrorKind::Corrupt, format!("blob of layer {} in the database", layer.0)).because(error)
                })?;
                Ok(BlobRow {
                    digest,
                    media_type: MediaType::new(media_type),
                    compression: parse_compression(&compression),
                    level,
                    size: u64::try_from(size).unwrap_or(0),
                })
            })
            .collect()
    }

    /// Records that a blob holds a layer.
    ///
    /// # Errors
    /// When the database fails.
    pub fn record_layer_blob(&self, layer: LayerId, descriptor: &Descriptor, level: Option<i32>) -> Result<()> {
        let compression = descriptor.media_type.compression().unwrap_or(Compression::Uncompressed);
        self.metadata().with(|c| {
            c.prepare_cached("INSERT OR REPLACE INTO layer_blob VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?.execute((
                layer.0,
                descriptor.digest.to_string(),
                descriptor.media_type.as_str(),
                compression.as_str(),
                level,
                i64::try_from(descriptor.size).unwrap_or(i64::MAX),
            ))?;
            Ok(())
        })
    }

    /// Whether a layer's bytes can be had here: from a folder, a blob or the places a tree names.
    ///
    /// # Errors
    /// When the database fails.
    pub fn obtainable(&self, layer: LayerId) -> Result<bool> {
        if self.pending_tree(layer).is_some() {
            return Ok(true);
        }
        let Some(row) = self.row(layer)? else { return Ok(false) };
        if row.folder && self.layer_folder(layer).exists() {
            return Ok(true);
        }
        Ok(row.diff_id.is_some() && self.usable_blob(layer)?.is_some())
    }

    fn usable_blob(&self, layer: LayerId) -> Result<Option<BlobRow>> {
        for blob in self.blob_rows(layer)? {
            if self.has_blob(&blob.digest)? {
                return Ok(Some(blob));
            }
        }
        Ok(None)
    }

    /// When a layer was made, in nanoseconds since 1970, and by what.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when the layer is unknown.
    pub fn layer_origin(&self, layer: LayerId) -> Result<(i64, String)> {
        let row = self.row(layer)?.ok_or_else(|| unknown(layer))?;
        Ok((row.created, row.description))
    }

    /// Returns a layer's folder, unpacking it where needed. `below` are the layers under it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when its bytes are not here, [`ErrorKind::Corrupt`] when they are damaged.
    pub fn ensure_folder(&self, layer: LayerId, below: &[LayerId]) -> Result<PathBuf> {
        let lock = self.0.busy.of(layer);
        let _held = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let target = self.layer_folder(layer);
        let row = self.row(layer)?.ok_or_else(|| unknown(layer))?;
        if row.folder && target.exists() {
            return Ok(target);
        }
        let home = self.temporary("layer");
        let folder = home.join("fs");
        fs::create_dir_all(&folder).at("create", &folder)?;
        let made = self.fill_folder(layer, &row, below, &folder).and_then(|()| self.move_in(layer, &home));
        if made.is_err()
            && let Err(error) = remove_tree(&home)
        {
            tracing::debug!(path = %home.display(), %error, "unfinished layer stays behind");
        }
        made?;
        Ok(target)
    }

    fn move_in(&self, layer: LayerId, home: &Path) -> Result<()> {
        let target = self.layer_home(layer);
        if target.exists() {
            // What is there is not trusted, or another process was first; either way ours is good.
            let old = self.temporary("old");
            match fs::rename(&target, &old) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error).at("replace", &target),
                _ => {}
            }
        }
        match fs::rename(home, &target) {
            Ok(()) => {}
            // Another process unpacked the same layer in this moment.
            Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {}
            Err(error) => return Err(error).at("create", &target),
        }
        self.record_folder(layer)
    }

    fn fill_folder(&self, layer: LayerId, row: &Row, below: &[LayerId], folder: &Path) -> Result<()> {
        if let Some(tree) = self.pending_tree(layer) {
            rustix::fs::chmod(folder, rustix::fs::Mode::from_raw_mode(0o755)).at("set the mode of", folder)?;
            return tree.write_folder(folder, self.overlay());
        }
        let blob = self.usable_blob(layer)?.ok_or_else(|| not_here(layer, &row.description))?;
        // Nothing lies below a base layer, so there is nothing that it could need.
        let nothing = LayerStack::empty();
        match self.unpack(&blob, row, folder, below.is_empty().then_some(&nothing)) {
            Err(Unpack::NeedsLower) => {}
            Err(Unpack::Failed(error)) => return Err(error),
            Ok(()) => return Ok(()),
        }
        // The layer refers to what is below it, so that must be there first.
        let lower = self.stack(below)?;
        let parent = folder.parent().expect("a layer's folder has a home");
        remove_tree(folder).at("remove", folder)?;
        fs::create_dir_all(parent).and_then(|()| fs::create_dir(folder)).at("create", folder)?;
        match self.unpack(&blob, row, folder, Some(&lower)) {
            Ok(()) => Ok(()),
            Err(Unpack::Failed(error)) => Err(error),
            Err(Unpack::NeedsLower) => Err(Error::new(
                ErrorKind::Corrupt,
                format!("layer {} has a hard link to a file that no layer below it has", blob.digest),
            )),
        }
    }

    fn unpack(
        &self,
        blob: &BlobRow,
        row: &Row,
        folder: &Path,
        lower: Option<&LayerStack>,
    ) -> std::result::Result<(), Unpack> {
        let file = self.open_blob(&blob.digest)?;
        let damaged = |error: Error| match error.kind() {
            ErrorKind::Corrupt => self.damaged(&blob.digest).because(error),
            _ => error,
        };
        let reader = compression::decoder(Box::new(BufReader::with_capacity(256 * 1024, file)))
            .context(|| format!("cannot read layer {}", blob.digest))?;
        let mut hashing = HashingReader { inner: reader, hasher: Hasher::sha256() };
        let options = ApplyOptions { overlay: self.overlay(), lower, ..ApplyOptions::default() };
        match layer::apply(&mut hashing, folder, &options) {
            Ok(_) => {}
            Err(error) if error.kind() == LayerErrorKind::NeedsLower && lower.is_none() => {
                return Err(Unpack::NeedsLower);
            }
            Err(error) => {
                return Err(damaged(layer_error(format!("cannot unpack layer {}", blob.digest), error)).into());
            }
        }
        let found = hashing.hasher.finish();
        if row.diff_id.as_ref().is_some_and(|expected| *expected != found) {
            return Err(damaged(Error::new(
                ErrorKind::Corrupt,
                format!("layer {} unpacks to {found}, which is not the diff id its image names", blob.digest),
            ))
            .into());
        }
        Ok(())
    }

    /// Returns a stack of layers as folders, unpacking what is not, several layers at a time.
    ///
    /// # Errors
    /// As [`ensure_folder`](Self::ensure_folder).
    pub fn folders(&self, layers: &[LayerId]) -> Result<Vec<PathBuf>> {
        let ready = |layer: LayerId| -> Result<Option<PathBuf>> {
            let folder = self.layer_folder(layer);
            Ok(self.row(layer)?.filter(|row| row.folder && folder.exists()).map(|_| folder))
        };
        let found = layers.iter().map(|layer| ready(*layer)).collect::<Result<Vec<_>>>()?;
        if found.iter().filter(|folder| folder.is_none()).count() > 1 {
            let threads = std::thread::available_parallelism().map_or(2, usize::from).max(2);
            let missing: Vec<usize> = (0..layers.len()).filter(|at| found[*at].is_none()).collect();
            let cursor = std::sync::atomic::AtomicUsize::new(0);
            let work = || -> Result<()> {
                while let Some(at) = missing.get(cursor.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    self.ensure_folder(layers[*at], &layers[..*at])?;
                }
                Ok(())
            };
            std::thread::scope(|scope| {
                let workers: Vec<_> = (0..threads.min(missing.len())).map(|_| scope.spawn(work)).collect();
                workers
                    .into_iter()
                    .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                    .collect::<Result<Vec<()>>>()
            })?;
        }
        layers.iter().enumerate().map(|(at, layer)| self.ensure_folder(*layer, &layers[..at])).collect()
    }

    /// Returns a stack of layers as one tree that can be read without mounting it.
    ///
    /// # Errors
    /// As [`ensure_folder`](Self::ensure_folder).
    pub fn stack(&self, layers: &[LayerId]) -> Result<LayerStack> {
        let folders = self.folders(layers)?;
        LayerStack::open_folders(&folders, self.overlay()).map_err(|error| layer_error("cannot read the layers", error))
    }

    /// Returns a layer as a blob, making it where needed. `below` are the layers under it.
    ///
    /// # Errors
    /// As [`ensure_folder`](Self::ensure_folder).
    pub fn ensure_blob(&self, layer: LayerId, below: &[LayerId], options: &BlobOptions) -> Result<LayerBlob> {
        let lock = self.0.busy.of(layer);
        let held = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let row = self.row(layer)?.ok_or_else(|| unknown(layer))?;
        let mut other = None;
        for blob in self.blob_rows(layer)? {
            let wanted = blob.compression == options.compression
                && (options.level.is_none() || blob.level == options.level);
            if let Some(diff_id) = &row.diff_id
                && (wanted || !options.force)
                && self.has_blob(&blob.digest)?
            {
                if wanted {
                    return Ok(blob.into_layer(diff_id.clone(), options.docker));
                }
                other = Some(blob.into_layer(diff_id.clone(), options.docker));
            }
        }
        if let Some(other) = other {
            return Ok(other);
        }
        let folder = self.layer_folder(layer);
        let packed = if let Some(tree) = self.pending_tree(layer) {
            self.pack(options, |tar| tree.write_tar(tar))?
        } else if row.folder && folder.exists() {
            // Other layers are unpacked under their own locks; ours is not needed for that.
            drop(held);
            let lower = self.stack(below)?;
            self.pack(options, |tar| {
                let diff = DiffOptions { overlay: self.overlay(), ..DiffOptions::default() };
                layer::write_folder(&folder, &lower, tar, &diff)
                    .map(drop)
                    .map_err(|error| layer_error(format!("cannot pack layer {}", layer.0), error))
            })?
        } else {
            let blob = self.usable_blob(layer)?.ok_or_else(|| not_here(layer, &row.description))?;
            self.convert(&blob, options)?
        };
        if let Some(expected) = &row.diff_id
            && *expected != packed.diff_id
            && self.blob_rows(layer)?.is_empty()
        {
            tracing::debug!(layer = layer.0, %expected, found = %packed.diff_id, "layer packs differently from before");
        }
        self.metadata().with(|c| {
            c.prepare_cached("UPDATE layer SET diff_id = ?2 WHERE id = ?1")?
                .execute((layer.0, packed.diff_id.to_string()))?;
            Ok(())
        })?;
        self.record_layer_blob(layer, &packed.descriptor, options.level)?;
        Ok(packed)
    }

    fn pack(
        &self,
        options: &BlobOptions,
        write: impl FnOnce(&mut TarWriter<HashingWriter<Encoder<crate::content::ContentWriter>>>) -> Result<()>,
    ) -> Result<LayerBlob> {
        let failed = || "cannot write a layer".to_owned();
        let encoder = Encoder::new(self.write_blob()?, encoder_kind(options.compression), options.level);
        let inner = HashingWriter { inner: encoder.context(failed)?, hasher: Hasher::sha256() };
        let mut tar = TarWriter::new(inner);
        write(&mut tar)?;
        let done = tar.finish().context(failed)?;
        self.finish_blob(done, options)
    }

    fn finish_blob(
        &self,
        done: HashingWriter<Encoder<crate::content::ContentWriter>>,
        options: &BlobOptions,
    ) -> Result<LayerBlob> {
        let diff_id = done.hasher.finish();
        let writer = done.inner.finish().context(|| "cannot write a layer".to_owned())?;
        let (digest, size) = writer.commit(None)?;
        let media_type = MediaType::layer(options.compression, options.docker);
        Ok(LayerBlob { descriptor: Descriptor::new(media_type, digest, size), diff_id })
    }

    fn convert(&self, blob: &BlobRow, options: &BlobOptions) -> Result<LayerBlob> {
        let failed = || format!("cannot convert layer {}", blob.digest);
        let file = self.open_blob(&blob.digest)?;
        let mut reader = compression::decoder(Box::new(BufReader::with_capacity(256 * 1024, file))).context(failed)?;
        let encoder = Encoder::new(self.write_blob()?, encoder_kind(options.compression), options.level);
        let mut writer = HashingWriter { inner: encoder.context(failed)?, hasher: Hasher::sha256() };
        io::copy(&mut reader, &mut writer).context(failed)?;
        self.finish_blob(writer, options)
    }

    /// Makes all layer folders written so far survive a power cut.
    ///
    /// # Errors
    /// When the file system or the database fails.
    pub fn sync_layers(&self) -> Result<()> {
        let unsynced: Vec<i64> = self.metadata().with(|c| {
            let mut statement = c.prepare_cached("SELECT id FROM layer WHERE folder = 1 AND boot = ?1")?;
            let ids = statement.query_map([&self.0.boot], |row| row.get(0))?;
            Ok(ids.collect::<rusqlite::Result<_>>()?)
        })?;
        if unsynced.is_empty() {
            return Ok(());
        }
        let root = File::open(self.root()).at("open", self.root())?;
        rustix::fs::syncfs(&root).at("sync", self.root())?;
        // Only what was there when the sync began.
        self.metadata().write(|t| {
            let mut statement = t.prepare_cached("UPDATE layer SET boot = NULL WHERE id = ?1")?;
            for id in &unsynced {
                statement.execute([id])?;
            }
            Ok(())
        })
    }
}

impl BlobRow {
    fn into_layer(self, diff_id: Digest, docker: bool) -> LayerBlob {
        // The same bytes go by either vocabulary's name; types of neither are left alone.
        let media_type = if self.media_type.is_docker() == docker {
            self.media_type
        } else {
            MediaType::layer(self.compression, docker)
        };
        LayerBlob { descriptor: Descriptor::new(media_type, self.digest, self.size), diff_id }
    }
}

fn unknown(layer: LayerId) -> Error {
    Error::new(ErrorKind::NotFound, format!("layer {} is not in the store", layer.0))
}

fn not_here(layer: LayerId, description: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!("the bytes of layer {} ({description}) are neither in the store nor named by an image", layer.0),
    )
}

/// How unpacking may end.
enum Unpack {
    NeedsLower,
    Failed(Error),
}

impl From<Error> for Unpack {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

struct HashingReader<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// Hashes what goes through.
struct HashingWriter<W> {
    inner: W,
    hasher: Hasher,
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
