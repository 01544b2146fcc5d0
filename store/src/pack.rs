//! Layers as blobs: folders and trees become compressed tars, and blobs of one compression those of another.
//!
//! The bytes of a layer pass once through a short pipeline: one thread makes the tar, one hashes it for the diff id, some
//! compress, one hashes and writes the result. Segments of the tar that some blob here already holds are copied from it: what
//! they hold is known from the digests of the files, which need not be read. Up to the first segment that has changed they
//! are copied, while the rest is made, without being decompressed and hashed: how far the hashes had come there was
//! remembered.

mod packer;
mod segment;

use std::io::{self, BufReader, Read, Write};
use std::sync::PoisonError;

use rusqlite::Connection;
use slipway_spec::media_type::Compression;
use slipway_spec::{Descriptor, Digest, Hasher, MediaType};

use self::packer::{Packer, Unnamed};
use self::segment::PackedSegment;
use crate::Store;
use crate::error::{Error, ErrorKind, IoContext as _, Result};
use crate::layer::compression;
use crate::layer::{self, TarWriter};
use crate::snapshot::{
    BlobRow, LayerId, Row, insert_layer_blob, layer_error, not_as_named, not_here, unknown,
};

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

impl BlobOptions {
    fn is_met_by(&self, blob: &BlobRow) -> bool {
        blob.compression == self.compression && (self.level.is_none() || blob.level == self.level)
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

impl Store {
    /// Returns a layer's blob if it is here as wanted and beyond doubt; unlike [`ensure_blob`](Self::ensure_blob) this does
    /// no work.
    ///
    /// # Errors
    /// When the database fails.
    pub fn blob_at_hand(&self, layer: LayerId, options: &BlobOptions) -> Result<Option<LayerBlob>> {
        let Some(diff_id) = self.row(layer)?.and_then(|row| row.diff_id) else { return Ok(None) };
        let mut rows = self.blob_rows(layer)?;
        if rows.len() != 1 {
            return Ok(None);
        }
        let Some(blob) = rows.pop() else { return Ok(None) };
        let wanted = !options.force || options.is_met_by(&blob);
        if !wanted || !self.has_blob(&blob.digest)? {
            return Ok(None);
        }
        Ok(Some(blob.into_layer(diff_id, options.docker)))
    }

    /// Returns a layer as a blob, making it where needed.
    ///
    /// # Errors
    /// As [`ensure_folder`](Self::ensure_folder).
    pub fn ensure_blob(&self, layer: LayerId, options: &BlobOptions) -> Result<LayerBlob> {
        let lock = self.0.busy.of(layer);
        let _held = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let row = self.row(layer)?.ok_or_else(|| unknown(layer))?;
        if let Some(diff_id) = &row.diff_id {
            let mut blobs = self.believable_blobs(layer, &row)?;
            let at = blobs
                .iter()
                .position(|blob| options.is_met_by(blob))
                .or((!options.force && !blobs.is_empty()).then_some(0));
            if let Some(at) = at {
                return Ok(blobs.swap_remove(at).into_layer(diff_id.clone(), options.docker));
            }
            // Another form of the same bytes keeps the diff id, which packing the folder anew may not.
            if let Some(blob) = blobs.first() {
                let packed = self.convert(blob, &row, options)?;
                self.metadata().write(|t| packed.record(t, layer, options))?;
                return Ok(packed.blob);
            }
        }
        let folder = self.layer_folder(layer);
        let packed = if let Some(tree) = self.pending_tree(layer) {
            self.pack(options, |tar| tree.write_tar(tar))?
        } else if row.folder && folder.exists() {
            self.pack(options, |tar| {
                layer::write_folder(&folder, self.overlay(), tar)
                    .map_err(|error| layer_error(format!("cannot pack layer {}", layer.0), error))
            })?
        } else {
            return Err(not_here(layer, &row.description));
        };
        let diff_id = packed.blob.diff_id.to_string();
        self.metadata().write(|t| {
            let changed = t
                .prepare_cached(
                    "UPDATE layer SET diff_id = ?2 WHERE id = ?1 AND diff_id IS NOT ?2",
                )?
                .execute((layer.0, &diff_id))?;
            if changed > 0 {
                // Blobs of other bytes than these must never be shown together with the new diff id.
                t.prepare_cached("DELETE FROM layer_blob WHERE layer = ?1")?.execute([layer.0])?;
            }
            packed.record(t, layer, options)
        })?;
        Ok(packed.blob)
    }

    /// Takes note that a blob holds a layer, as somebody says whom nobody vouches for, once that was seen to be true.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] when it holds something else, or is not what its descriptor says.
    pub fn adopt_layer_blob(&self, layer: LayerId, descriptor: &Descriptor) -> Result<()> {
        let row = self.row(layer)?.ok_or_else(|| unknown(layer))?;
        let compression = descriptor.media_type.compression().ok_or_else(|| {
            let what = format!("{} is no layer but {}", descriptor.digest, descriptor.media_type);
            Error::new(ErrorKind::Corrupt, what)
        })?;
        let blob = BlobRow {
            digest: descriptor.digest.clone(),
            checked: false,
            media_type: descriptor.media_type.clone(),
            compression,
            level: None,
            size: descriptor.size,
        };
        let mut start = vec![];
        let file = self.open_blob(&blob.digest)?;
        file.take(compression::SNIFF_LEN as u64)
            .read_to_end(&mut start)
            .context(|| format!("cannot read layer {}", blob.digest))?;
        if compression::sniff(&start).of_layer() != Some(compression) {
            let what = format!(
                "layer {} is not compressed as its media type {} says",
                blob.digest, blob.media_type
            );
            return Err(Error::new(ErrorKind::Corrupt, what));
        }
        self.read_layer(&blob, &row, &mut io::sink())?;
        self.metadata().with(|c| insert_layer_blob(c, layer, descriptor, None, true))
    }

    /// Returns the blobs of a layer that are here. Where images name several for one layer, none is taken at its word:
    /// anybody can write any diff id into an image's config.
    fn believable_blobs(&self, layer: LayerId, row: &Row) -> Result<Vec<BlobRow>> {
        let rows = self.blob_rows(layer)?;
        let doubtful = rows.len() > 1;
        let mut believable = vec![];
        for blob in rows {
            if !self.has_blob(&blob.digest)? {
                continue;
            }
            if doubtful && !blob.checked {
                match self.read_layer(&blob, row, &mut io::sink()) {
                    Ok(_) => self.settle(layer, &blob.digest, true)?,
                    Err(error) if error.kind() == ErrorKind::Corrupt => {
                        tracing::warn!(digest = %blob.digest, %error, "a blob does not hold the layer its image names");
                        continue;
                    }
                    Err(error) => return Err(error),
                }
            }
            believable.push(blob);
        }
        Ok(believable)
    }

    /// Writes a layer's uncompressed bytes, which are compared with its diff id in passing.
    fn read_layer(&self, blob: &BlobRow, row: &Row, out: &mut dyn Write) -> Result<Digest> {
        let file = self.open_blob(&blob.digest)?;
        let failed = || format!("cannot read layer {}", blob.digest);
        let mut reader = compression::decoder(Box::new(BufReader::with_capacity(256 * 1024, file)))
            .context(failed)?;
        let mut hasher = row.diff_id.as_ref().map_or_else(Hasher::sha256, Digest::verifier);
        let mut buffer = vec![0; 128 * 1024];
        loop {
            let read = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.blame(blob, row, Error::io(failed(), error))),
            };
            hasher.update(&buffer[..read]);
            out.write_all(&buffer[..read])
                .context(|| format!("cannot convert layer {}", blob.digest))?;
        }
        let found = hasher.finish();
        if row.diff_id.as_ref().is_some_and(|expected| *expected != found) {
            return Err(self.blame(blob, row, not_as_named(blob, &found)));
        }
        Ok(found)
    }

    fn pack(
        &self,
        options: &BlobOptions,
        write: impl Fn(&mut TarWriter<Packer>) -> Result<()>,
    ) -> Result<Packed> {
        loop {
            let packer = Packer::new(self, options)?;
            let spoiled = packer.spoiled();
            let mut tar = TarWriter::with_segments(packer, Packer::segment);
            let packed = write(&mut tar)
                .and_then(|()| tar.finish().and_then(Packer::finish).context(cannot_write))
                .and_then(|unnamed| unnamed.commit(options));
            match (packed, spoiled.get()) {
                // Nothing more is taken from that blob, so this comes to an end.
                (Err(error), Some(blob)) => {
                    tracing::warn!(%blob, %error, "a damaged blob is not used any more");
                    self.forget_segments(blob)?;
                }
                (packed, _) => return packed,
            }
        }
    }

    fn convert(&self, blob: &BlobRow, row: &Row, options: &BlobOptions) -> Result<Packed> {
        let mut packer = Packer::new(self, options)?;
        self.read_layer(blob, row, &mut packer)?;
        packer.finish().context(cannot_write)?.commit(options)
    }
}

fn cannot_write() -> String {
    "cannot write a layer".to_owned()
}

/// A layer that has become a blob.
struct Packed {
    blob: LayerBlob,
    segments: Vec<PackedSegment>,
}

impl Unnamed {
    fn commit(self, options: &BlobOptions) -> Result<Packed> {
        let (digest, size) = self.writer.commit(None)?;
        let media_type = MediaType::layer(options.compression, options.docker);
        let descriptor = Descriptor::new(media_type, digest, size);
        let blob = LayerBlob { descriptor, diff_id: self.diff_id };
        Ok(Packed { blob, segments: self.segments })
    }
}

impl Packed {
    fn record(&self, c: &Connection, layer: LayerId, options: &BlobOptions) -> Result<()> {
        insert_layer_blob(c, layer, &self.blob.descriptor, options.level, true)?;
        // A single segment is as quickly compressed as found.
        if self.segments.len() < 2 {
            return Ok(());
        }
        self.segments.iter().try_for_each(|one| one.record(c, &self.blob.descriptor.digest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Content, Entry, Kind, Tree};
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    /// Files of some 20 KiB each, as a scan would find them.
    fn tree(folder: &Path, files: usize) -> Tree {
        let text = |n| format!("{n} of many lines that are somewhat alike\n").repeat(500);
        tree_of(folder, files, |n| text(n).into_bytes())
    }

    /// As [`tree`] with 600 KiB each that cannot be compressed.
    fn large_tree(folder: &Path, files: usize) -> Tree {
        tree_of(folder, files, |n| {
            let mut noise = vec![0; 600 << 10];
            blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut noise);
            noise
        })
    }

    fn tree_of(folder: &Path, files: usize, content: impl Fn(usize) -> Vec<u8>) -> Tree {
        let mut tree = Tree::default();
        for n in 0..files {
            let path = folder.join(n.to_string());
            let bytes = content(n);
            if !path.exists() {
                std::fs::write(&path, &bytes).unwrap();
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
            }
            let mtime = crate::tree::scan::mtime(&std::fs::metadata(&path).unwrap());
            let digest = <sha2::Sha256 as sha2::Digest>::digest(&bytes);
            let digest = Some(digest.into());
            let content = Content::Host { path: path.into(), digest };
            let entry = Entry {
                kind: Kind::File { content, size: bytes.len() as u64 },
                mtime,
                ..Entry::directory(0o644, 0)
            };
            tree.insert(format!("f/{n}").as_bytes(), entry);
        }
        tree
    }

    fn pack(store: &Store, tree: Tree) -> Result<LayerBlob> {
        let layer = store.adopt_tree(tree, "COPY").unwrap();
        store.ensure_blob(layer, &BlobOptions::default())
    }

    fn segments(store: &Store) -> i64 {
        let count = |c: &Connection| c.query_row("SELECT count(*) FROM segment", [], |r| r.get(0));
        store.metadata().with(|c| Ok(count(c)?)).unwrap()
    }

    #[test]
    fn unchanged_segments_are_not_read_again_and_the_bytes_are_the_same() {
        let (files, first, second) = (
            tempfile::tempdir().unwrap(),
            tempfile::tempdir().unwrap(),
            tempfile::tempdir().unwrap(),
        );
        let warm = Store::open(first.path()).unwrap();
        pack(&warm, tree(files.path(), 400)).unwrap();
        assert!(segments(&warm) > 5, "{}", segments(&warm));
        let mut changed = tree(files.path(), 400);
        let kind = Kind::File { content: Content::Inline((*b"new").into()), size: 3 };
        changed.insert(b"f/17", Entry { kind, ..Entry::directory(0o644, 0) });
        let cold = Store::open(second.path()).unwrap();
        let expected = pack(&cold, changed.clone()).unwrap();
        // Now only the files near the change can still be read.
        for n in 300..400 {
            let path = files.path().join(n.to_string());
            std::fs::remove_file(&path).unwrap();
        }
        let missing = pack(&cold, tree_without_reading(&changed, 3)).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        assert_eq!(pack(&warm, changed).unwrap(), expected);
    }

    #[test]
    fn what_comes_before_a_change_is_copied_as_it_is() {
        let (files, warm) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let warm = Store::open(warm.path()).unwrap();
        pack(&warm, tree(files.path(), 400)).unwrap();
        // First near the end, then where that one was copied from the one before, then at the beginning.
        for at in ["f/98", "f/5", "f/300", "a", "z"] {
            let mut changed = tree(files.path(), 400);
            let kind = Kind::File {
                content: Content::Inline(at.as_bytes().into()),
                size: at.len() as u64,
            };
            changed.insert(at.as_bytes(), Entry { kind, ..Entry::directory(0o644, 0) });
            let cold = tempfile::tempdir().unwrap();
            let expected = pack(&Store::open(cold.path()).unwrap(), changed.clone()).unwrap();
            let found = pack(&warm, changed).unwrap();
            assert_eq!(found, expected, "{at}");
            warm.verify_blob(&found.descriptor.digest).unwrap();
        }
    }

    #[test]
    fn states_that_are_damaged_are_not_used() {
        let (files, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = Store::open(root.path()).unwrap();
        pack(&store, tree(files.path(), 400)).unwrap();
        let spoil = "UPDATE segment SET after = CAST(substr(after, 1, 40) || x'fe' || substr(after, 42) AS BLOB)";
        store.metadata().with(|c| Ok(c.execute(spoil, [])?)).unwrap();
        let mut changed = tree(files.path(), 400);
        changed.insert(b"z", Entry::directory(0o755, 0));
        let blob = pack(&store, changed.clone()).unwrap();
        store.verify_blob(&blob.descriptor.digest).unwrap();
        let other = tempfile::tempdir().unwrap();
        assert_eq!(pack(&Store::open(other.path()).unwrap(), changed).unwrap(), blob);
    }

    /// The same tree with other modes, so that no segment of it is known.
    fn tree_without_reading(tree: &Tree, mode: u32) -> Tree {
        tree.iter().map(|(path, entry)| (path, Entry { mode, ..entry.clone() })).collect()
    }

    #[test]
    fn a_damaged_source_of_segments_is_noticed_and_forgotten() {
        let (files, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = Store::open(root.path()).unwrap();
        let before = pack(&store, tree(files.path(), 400)).unwrap();
        let path = store.blob_path(&before.descriptor.digest);
        let mut bytes = std::fs::read(&path).unwrap();
        for at in (1000..bytes.len()).step_by(1000) {
            bytes[at] ^= 0x55;
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        std::fs::write(&path, &bytes).unwrap();
        let mut changed = tree(files.path(), 400);
        changed.insert(b"z", Entry::directory(0o755, 0));
        let expected = {
            let other = tempfile::tempdir().unwrap();
            pack(&Store::open(other.path()).unwrap(), changed.clone()).unwrap()
        };
        assert_eq!(pack(&store, changed).unwrap(), expected);
    }

    #[test]
    fn a_long_beginning_is_copied_while_the_rest_is_made() {
        // Not in a file system in memory.
        let work = || tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (files, root) = (work(), work());
        let warm = Store::open(root.path()).unwrap();
        let mut last = pack(&warm, large_tree(files.path(), 60)).unwrap();
        for (at, damage) in [("z", None), ("f/9", None), ("f/8", Some(4_000_001)), ("f/91", None)] {
            if let Some(at) = damage {
                let path = warm.blob_path(&last.descriptor.digest);
                let mut bytes = std::fs::read(&path).unwrap();
                bytes[at] ^= 1;
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
                std::fs::write(&path, &bytes).unwrap();
            }
            let mut changed = large_tree(files.path(), 60);
            let kind = Kind::File { content: Content::Inline((*b"new").into()), size: 3 };
            changed.insert(at.as_bytes(), Entry { kind, ..Entry::directory(0o644, 0) });
            let cold = work();
            let expected = pack(&Store::open(cold.path()).unwrap(), changed.clone()).unwrap();
            let before = segments(&warm);
            let found = pack(&warm, changed).unwrap();
            assert_eq!(found, expected, "{at}");
            warm.verify_blob(&found.descriptor.digest).unwrap();
            assert!(segments(&warm) >= before, "{at}");
            last = found;
        }
    }

    #[test]
    fn a_file_that_changes_meanwhile_does_not_stand_for_what_it_was() {
        let (files, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store = Store::open(root.path()).unwrap();
        let seen = tree(files.path(), 400);
        let path = files.path().join("250");
        let original = std::fs::read(&path).unwrap();
        std::fs::write(&path, vec![b'x'; original.len()]).unwrap();
        let wrong = pack(&store, seen.clone()).unwrap();
        std::fs::write(&path, &original).unwrap();
        let right = pack(&store, tree(files.path(), 400)).unwrap();
        assert_ne!(wrong.diff_id, right.diff_id);
        let other = tempfile::tempdir().unwrap();
        let elsewhere = pack(&Store::open(other.path()).unwrap(), tree(files.path(), 400)).unwrap();
        assert_eq!(right, elsewhere);
    }
}
