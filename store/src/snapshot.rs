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
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::OptionalExtension as _;
use slipway_spec::media_type::Compression;
use slipway_spec::{Descriptor, Digest, Hasher, MediaType};

use crate::Store;
use crate::error::{Error, ErrorKind, IoContext as _, Result};
use crate::folder::remove_tree;
use crate::layer::compression;
use crate::layer::{self, ApplyOptions, LayerErrorKind, LayerStack};
use crate::lease::now_nanos;
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

/// A layer that is not written down yet.
#[derive(Debug)]
pub(crate) struct Pending {
    tree: Arc<Tree>,
    /// When somebody last asked for it, in nanoseconds since 1970.
    touched: i64,
}

#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) id: LayerId,
    pub(crate) diff_id: Option<Digest>,
    pub(crate) folder: bool,
    pub(crate) created: i64,
    pub(crate) description: String,
}

#[derive(Clone, Debug)]
pub(crate) struct BlobRow {
    pub(crate) digest: Digest,
    /// Whether it was seen to hold the layer; otherwise an image merely claims so.
    pub(crate) checked: bool,
    pub(crate) media_type: MediaType,
    pub(crate) compression: Compression,
    pub(crate) level: Option<i32>,
    pub(crate) size: u64,
}

/// One lock per layer under work.
#[derive(Debug, Default)]
pub(crate) struct Busy(Mutex<HashMap<LayerId, Arc<Mutex<()>>>>);

impl Busy {
    pub(crate) fn of(&self, layer: LayerId) -> Arc<Mutex<()>> {
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

pub(crate) fn layer_error(what: impl std::fmt::Display, error: layer::LayerError) -> Error {
    let kind = match error.kind() {
        LayerErrorKind::InvalidArchive => ErrorKind::Corrupt,
        LayerErrorKind::NotFound => ErrorKind::NotFound,
        LayerErrorKind::Unsupported => ErrorKind::Invalid,
        LayerErrorKind::NeedsLower | LayerErrorKind::Storage | LayerErrorKind::Stream => {
            let source = std::error::Error::source(&error)
                .and_then(|source| source.downcast_ref::<io::Error>());
            match source.map(io::Error::kind) {
                Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                    ErrorKind::NoSpace
                }
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

    fn insert_layer(
        &self,
        diff_id: Option<&Digest>,
        created: i64,
        description: &str,
    ) -> Result<LayerId> {
        self.metadata().with(|c| {
            c.prepare_cached(
                "INSERT INTO layer (diff_id, created, used, description) VALUES (?1, ?2, ?3, ?4)",
            )?
            .execute((
                diff_id.map(ToString::to_string),
                created,
                now_nanos(),
                description,
            ))?;
            Ok(LayerId(c.last_insert_rowid()))
        })
    }

    /// Returns the layer with a diff id, making it known where it is new. `created` is used for new ones.
    ///
    /// # Errors
    /// When the database fails.
    pub fn layer_by_diff_id(
        &self,
        diff_id: &Digest,
        created: i64,
        description: &str,
    ) -> Result<LayerId> {
        let found = self.metadata().find(
            diff_id.to_string(),
            "SELECT id, used FROM layer WHERE diff_id = ?1 ORDER BY id DESC LIMIT 1",
            "UPDATE layer SET used = ?2 WHERE diff_id = ?1",
            |row| row.get(0).map(LayerId),
        )?;
        found.map_or_else(|| self.insert_layer(Some(diff_id), created, description), Ok)
    }

    /// Makes a layer of a folder that a step has written on top of others, base first: `home` holds `fs`, is reduced to the
    /// changes and moved into the store. Nothing may have it mounted.
    ///
    /// # Errors
    /// When it cannot be compared with what is below, moved or recorded.
    pub fn adopt_folder(
        &self,
        home: &Path,
        below: &[PathBuf],
        description: &str,
    ) -> Result<LayerId> {
        LayerStack::open_folders(below, self.overlay())
            .and_then(|below| layer::reduce(&home.join("fs"), &below, self.overlay()))
            .map_err(|error| layer_error("cannot find out what a step has changed", error))?;
        // In one transaction, so that the collector sees either both the row and the folder or neither.
        self.metadata().write(|t| {
            t.prepare_cached(
                "INSERT INTO layer (folder, boot, created, used, description) VALUES (1, ?1, ?2, ?2, ?3)",
            )?
            .execute((&self.0.boot, now_nanos(), description))?;
            let layer = LayerId(t.last_insert_rowid());
            self.put_home(layer, home)?;
            Ok(layer)
        })
    }

    /// Moves a folder to where its layer belongs, inside the transaction that records it.
    fn put_home(&self, layer: LayerId, home: &Path) -> Result<()> {
        let target = self.layer_home(layer);
        // What is there has no row that vouches for it: a power cut took the row, or the folder is not trusted.
        match fs::rename(&target, self.temporary("old")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).at("replace", &target);
            }
            _ => {}
        }
        fs::rename(home, &target).at("create", &target)
    }

    /// Makes a layer that is written down only when somebody needs its bytes.
    ///
    /// # Errors
    /// When the database fails.
    pub fn adopt_tree(&self, tree: Tree, description: &str) -> Result<LayerId> {
        let layer = self.insert_layer(None, now_nanos(), description)?;
        let pending = Pending { tree: Arc::new(tree), touched: now_nanos() };
        self.pending_trees().insert(layer, pending);
        Ok(layer)
    }

    fn pending_trees(&self) -> std::sync::MutexGuard<'_, HashMap<LayerId, Pending>> {
        self.0.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the layers of which this process alone knows what they hold.
    pub(crate) fn pending_layers(&self) -> Vec<LayerId> {
        self.pending_trees().keys().copied().collect()
    }

    /// Returns the tree of a layer that has not been written down.
    pub fn pending_tree(&self, layer: LayerId) -> Option<Arc<Tree>> {
        let mut pending = self.pending_trees();
        let found = pending.get_mut(&layer)?;
        found.touched = now_nanos();
        Some(found.tree.clone())
    }

    /// Forgets trees that nobody has asked for since a time, in nanoseconds since 1970: a process that goes on for long
    /// would keep those of all its builds. A layer that has no other form is then made again by those who want it.
    pub fn forget_trees(&self, before: i64) -> usize {
        let mut gone = vec![];
        // Trees are large, so they are dropped once the lock is free.
        self.pending_trees().retain(|_, pending| {
            let keep = pending.touched >= before;
            if !keep {
                gone.push(pending.tree.clone());
            }
            keep
        });
        gone.len()
    }

    pub(crate) fn row(&self, layer: LayerId) -> Result<Option<Row>> {
        let row = self.metadata().find(
            layer.0,
            "SELECT diff_id, folder, boot, created, description, used FROM layer WHERE id = ?1",
            "UPDATE layer SET used = ?2 WHERE id = ?1",
            |row| {
                let (diff_id, boot): (Option<String>, Option<String>) = (row.get(0)?, row.get(2)?);
                Ok((diff_id, row.get::<_, bool>(1)?, boot, row.get(3)?, row.get(4)?))
            },
        )?;
        let Some((diff_id, folder, boot, created, description)) = row else { return Ok(None) };
        let diff_id = diff_id.map(|text| text.parse()).transpose().map_err(|error| {
            Error::new(ErrorKind::Corrupt, format!("layer {} in the database", layer.0))
                .because(error)
        })?;
        let trusted = boot.is_none_or(|boot| boot == self.0.boot);
        Ok(Some(Row { id: layer, diff_id, folder: folder && trusted, created, description }))
    }

    pub(crate) fn blob_rows(&self, layer: LayerId) -> Result<Vec<BlobRow>> {
        let rows = self.metadata().with(|c| {
            let mut statement = c.prepare_cached(
                "SELECT digest, media_type, compression, level, size, checked FROM layer_blob WHERE layer = ?1
                 ORDER BY checked DESC, digest",
            )?;
            let rows = statement.query_map([layer.0], |row| {
                Ok((
                    row.get::<_, String>(0)?,
                    row.get::<_, String>(1)?,
                    row.get::<_, String>(2)?,
                    row.get(3)?,
                    row.get::<_, i64>(4)?,
                    row.get::<_, bool>(5)?,
                ))
            })?;
            Ok(rows.collect::<rusqlite::Result<Vec<_>>>()?)
        })?;
        rows.into_iter()
            .map(|(digest, media_type, compression, level, size, checked)| {
                let digest = digest.parse().map_err(|error| {
                    Error::new(
                        ErrorKind::Corrupt,
                        format!("blob of layer {} in the database", layer.0),
                    )
                    .because(error)
                })?;
                Ok(BlobRow {
                    digest,
                    checked,
                    media_type: MediaType::new(media_type),
                    compression: parse_compression(&compression),
                    level,
                    size: u64::try_from(size).unwrap_or(0),
                })
            })
            .collect()
    }

    /// Records that an image says a blob holds a layer.
    ///
    /// # Errors
    /// When the database fails.
    pub fn record_layer_blob(
        &self,
        layer: LayerId,
        descriptor: &Descriptor,
        level: Option<i32>,
    ) -> Result<()> {
        self.metadata().with(|c| insert_layer_blob(c, layer, descriptor, level, false))
    }

    /// Settles whether a blob holds a layer as some image says, now that somebody has seen.
    pub(crate) fn settle(&self, layer: LayerId, digest: &Digest, holds: bool) -> Result<()> {
        let statement = if holds {
            "UPDATE layer_blob SET checked = 1 WHERE layer = ?1 AND digest = ?2 AND checked = 0"
        } else {
            "DELETE FROM layer_blob WHERE layer = ?1 AND digest = ?2"
        };
        self.metadata().with(|c| {
            c.prepare_cached(statement)?.execute((layer.0, digest.to_string()))?;
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
        // Nothing lies below a base layer, so there is nothing that it could need.
        let nothing = LayerStack::empty();
        match self.make_folder(layer, below.is_empty().then_some(&nothing)) {
            Err(Unpack::NeedsLower) => {}
            Err(Unpack::Failed(error)) => return Err(error),
            Ok(folder) => return Ok(folder),
        }
        // The layer refers to what is below it, so that must be there first. The layer's lock is free meanwhile: an image
        // may name a layer twice, or two images the same layers in another order.
        let lower = self.stack(below)?;
        match self.make_folder(layer, Some(&lower)) {
            Ok(folder) => Ok(folder),
            Err(Unpack::Failed(error)) => Err(error),
            Err(Unpack::NeedsLower) => Err(Error::new(
                ErrorKind::Corrupt,
                format!("layer {} has a hard link to a file that no layer below it has", layer.0),
            )),
        }
    }

    fn make_folder(
        &self,
        layer: LayerId,
        lower: Option<&LayerStack>,
    ) -> std::result::Result<PathBuf, Unpack> {
        let lock = self.0.busy.of(layer);
        let _held = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let target = self.layer_folder(layer);
        let row = self.row(layer)?.ok_or_else(|| unknown(layer))?;
        if row.folder && target.exists() {
            return Ok(target);
        }
        let home = self.temporary("layer");
        fs::create_dir(&home).at("create", &home)?;
        let made = self
            .fill_folder(layer, &row, lower, &home.join("fs"))
            .and_then(|()| self.move_in(layer, &home).map_err(Unpack::Failed));
        // Also when another process was first.
        if home.exists()
            && let Err(error) = remove_tree(&home)
        {
            tracing::debug!(path = %home.display(), %error, "unfinished layer stays behind");
        }
        made.map(|()| target)
    }

    /// Gives a layer its folder, unless another process was first: what that one made may already be mounted.
    fn move_in(&self, layer: LayerId, home: &Path) -> Result<()> {
        self.metadata().write(|t| {
            let (folder, boot): (bool, Option<String>) = t
                .prepare_cached("SELECT folder, boot FROM layer WHERE id = ?1")?
                .query_row([layer.0], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()?
                .ok_or_else(|| unknown(layer))?;
            let trusted = folder && boot.is_none_or(|boot| boot == self.0.boot);
            if trusted && self.layer_folder(layer).exists() {
                return Ok(());
            }
            t.prepare_cached("UPDATE layer SET folder = 1, boot = ?2, used = ?3 WHERE id = ?1")?
                .execute((layer.0, &self.0.boot, now_nanos()))?;
            self.put_home(layer, home)
        })
    }

    fn fill_folder(
        &self,
        layer: LayerId,
        row: &Row,
        lower: Option<&LayerStack>,
        folder: &Path,
    ) -> std::result::Result<(), Unpack> {
        if let Some(tree) = self.pending_tree(layer) {
            create_root(folder)?;
            return Ok(tree.write_folder(folder, self.overlay())?);
        }
        let mut failed = None;
        while let Some(blob) = self.usable_blob(layer)? {
            create_root(folder)?;
            match self.unpack(&blob, row, folder, lower) {
                // The claim is forgotten now; another image may have named a blob that really holds the layer.
                Err(Unpack::Failed(error)) if error.kind() == ErrorKind::Corrupt => {
                    failed = Some(error);
                }
                Ok(()) => {
                    self.settle(layer, &blob.digest, true)?;
                    return Ok(());
                }
                Err(other) => return Err(other),
            }
            remove_tree(folder).at("remove", folder)?;
        }
        Err(failed.unwrap_or_else(|| not_here(layer, &row.description)).into())
    }

    fn unpack(
        &self,
        blob: &BlobRow,
        row: &Row,
        folder: &Path,
        lower: Option<&LayerStack>,
    ) -> std::result::Result<(), Unpack> {
        let file = self.open_blob(&blob.digest)?;
        let reader = compression::decoder(Box::new(BufReader::with_capacity(256 * 1024, file)))
            .context(|| format!("cannot read layer {}", blob.digest))?;
        let hasher = row.diff_id.as_ref().map_or_else(Hasher::sha256, Digest::verifier);
        let mut hashing = HashingReader { inner: reader, hasher };
        let options = ApplyOptions { overlay: self.overlay(), lower, ..ApplyOptions::default() };
        match layer::apply(&mut hashing, folder, &options) {
            Ok(_) => {}
            Err(error) if error.kind() == LayerErrorKind::NeedsLower && lower.is_none() => {
                return Err(Unpack::NeedsLower);
            }
            Err(error) => {
                let blames_archive = matches!(
                    error.kind(),
                    LayerErrorKind::InvalidArchive
                        | LayerErrorKind::NeedsLower
                        | LayerErrorKind::Stream
                );
                let error = layer_error(format!("cannot unpack layer {}", blob.digest), error);
                return Err(
                    if blames_archive { self.blame(blob, row, error) } else { error }.into()
                );
            }
        }
        let found = hashing.hasher.finish();
        if row.diff_id.as_ref().is_some_and(|expected| *expected != found) {
            return Err(self.blame(blob, row, not_as_named(blob, &found)).into());
        }
        Ok(())
    }

    /// Finds out whether a blob that cannot be used was damaged here or has always been like that. Either way nobody takes
    /// it for the layer again.
    pub(crate) fn blame(&self, blob: &BlobRow, row: &Row, error: Error) -> Error {
        if let Err(damaged) = self.verify_blob(&blob.digest) {
            return damaged.because(error);
        }
        if let Err(error) = self.settle(row.id, &blob.digest, false) {
            return error;
        }
        Error::new(
            ErrorKind::Corrupt,
            format!("layer {} is broken as its image has it", blob.digest),
        )
        .because(error)
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
                while let Some(at) =
                    missing.get(cursor.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
                {
                    self.ensure_folder(layers[*at], &layers[..*at])?;
                }
                Ok(())
            };
            std::thread::scope(|scope| {
                let workers: Vec<_> =
                    (0..threads.min(missing.len())).map(|_| scope.spawn(work)).collect();
                workers
                    .into_iter()
                    .map(|worker| {
                        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                    })
                    .collect::<Result<Vec<()>>>()
            })?;
        }
        layers
            .iter()
            .enumerate()
            .map(|(at, layer)| self.ensure_folder(*layer, &layers[..at]))
            .collect()
    }

    /// Returns a stack of layers as one tree that can be read without mounting it.
    ///
    /// # Errors
    /// As [`ensure_folder`](Self::ensure_folder).
    pub fn stack(&self, layers: &[LayerId]) -> Result<LayerStack> {
        self.stack_folders(&self.folders(layers)?)
    }

    /// Opens folders in overlay form, base first, that need be no layers; they may be those of a process that runs.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn stack_folders(&self, folders: &[PathBuf]) -> Result<LayerStack> {
        LayerStack::open_folders(folders, self.overlay())
            .map_err(|error| layer_error("cannot read the layers", error))
    }

    /// Makes all layer folders written so far survive a power cut.
    ///
    /// # Errors
    /// When the file system or the database fails.
    pub fn sync_layers(&self) -> Result<()> {
        let unsynced: Vec<i64> = self.metadata().with(|c| {
            let mut statement =
                c.prepare_cached("SELECT id FROM layer WHERE folder = 1 AND boot = ?1")?;
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

pub(crate) fn insert_layer_blob(
    connection: &rusqlite::Connection,
    layer: LayerId,
    descriptor: &Descriptor,
    level: Option<i32>,
    checked: bool,
) -> Result<()> {
    let compression = descriptor.media_type.compression().unwrap_or(Compression::Uncompressed);
    connection
        .prepare_cached(
            "INSERT INTO layer_blob (layer, digest, media_type, compression, level, size, checked)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
             ON CONFLICT (layer, digest) DO UPDATE SET media_type = ?3, compression = ?4,
             level = coalesce(?5, level), size = ?6, checked = max(checked, ?7)",
        )?
        .execute((
            layer.0,
            descriptor.digest.to_string(),
            descriptor.media_type.as_str(),
            compression.as_str(),
            level,
            i64::try_from(descriptor.size).unwrap_or(i64::MAX),
            checked,
        ))?;
    Ok(())
}

/// Makes the root of a layer's folder, whose mode most archives do not name, independent of the umask.
fn create_root(folder: &Path) -> Result<()> {
    fs::create_dir(folder).at("create", folder)?;
    rustix::fs::chmod(folder, rustix::fs::Mode::from_raw_mode(0o755)).at("set the mode of", folder)
}

pub(crate) fn not_as_named(blob: &BlobRow, found: &Digest) -> Error {
    Error::new(
        ErrorKind::Corrupt,
        format!(
            "layer {} unpacks to {found}, which is not the diff id its image names",
            blob.digest
        ),
    )
}

pub(crate) fn unknown(layer: LayerId) -> Error {
    Error::new(ErrorKind::NotFound, format!("layer {} is not in the store", layer.0))
}

pub(crate) fn not_here(layer: LayerId, description: &str) -> Error {
    Error::new(
        ErrorKind::NotFound,
        format!(
            "the bytes of layer {} ({description}) are neither in the store nor named by an image",
            layer.0
        ),
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
