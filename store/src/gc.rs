//! What takes space here, and how to get it back.
//!
//! The collector deletes rows and takes their files out of sight in one transaction. It deletes nothing that was used since the oldest
//! living process began, so that a build under way never loses what it has found. No process begins meanwhile: that takes
//! the lock that the collector holds.
//!
//! [`record`] lists what there is, [`rule`] decides what of it goes, [`collect`] takes it away; [`Store::prune`] does
//! without records and takes all that it may.

pub mod collect;
pub mod record;
pub mod rule;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use slipway_spec::manifest::Document;
use slipway_spec::{Descriptor, Digest};

use crate::error::{ErrorKind, IoContext as _, Result};
use crate::folder::{disk_usage, remove_tree};
use crate::lease::now_nanos;
use crate::snapshot::LayerId;
use crate::tree::scan::mtime;
use crate::{Store, lease};

pub use self::record::{CacheRecord, RecordKind};
pub use self::rule::Rule;

/// What may go.
#[derive(Clone, Debug, Default)]
pub struct PruneOptions {
    /// Results that no image needs go even if they could still save work.
    pub all: bool,
    /// Only what was last used this many nanoseconds ago or longer.
    pub older_than: Option<i64>,
    /// What was used since this time stays, in nanoseconds since 1970: when the oldest work of this very process began.
    pub working_since: Option<i64>,
}

/// What went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// Results of build steps.
    pub results: usize,
    /// Unpacked layers.
    pub layers: usize,
    /// Blobs.
    pub blobs: usize,
    /// Bytes that are free again.
    pub bytes: u64,
}

/// What takes space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// One record for each thing that can go by itself, and one for each blob of an image.
    pub records: Vec<CacheRecord>,
}

/// What images need.
#[derive(Debug, Default)]
struct Needed {
    blobs: HashSet<Digest>,
    diff_ids: HashSet<String>,
}

impl Store {
    /// What is missing or damaged is left out: neither may keep anybody from making room.
    fn needed_by_images(&self) -> Result<Needed> {
        let mut needed = Needed::default();
        for image in self.images()? {
            match self.needed_by(&image.target, &mut needed) {
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound) => {
                    tracing::warn!(image = image.name, %error, "a part of the image is damaged");
                }
                other => other?,
            }
        }
        Ok(needed)
    }

    fn needed_by(&self, target: &Descriptor, needed: &mut Needed) -> Result<()> {
        let mut todo = vec![target.clone()];
        while let Some(descriptor) = todo.pop() {
            if self.blob_size(&descriptor.digest)?.is_none()
                || !needed.blobs.insert(descriptor.digest.clone())
            {
                continue;
            }
            if !descriptor.media_type.is_index() && !descriptor.media_type.is_manifest() {
                continue;
            }
            match self.document(&descriptor)? {
                Document::Index(index) => todo.extend(index.manifests),
                Document::Manifest(manifest) => {
                    if manifest.config.media_type.is_config()
                        && self.blob_size(&manifest.config.digest)?.is_some()
                    {
                        let config = self.image_config(&manifest.config)?;
                        needed
                            .diff_ids
                            .extend(config.rootfs.diff_ids.iter().map(ToString::to_string));
                    }
                    todo.extend(manifest.layers);
                    todo.push(manifest.config);
                }
            }
        }
        Ok(())
    }

    /// Lists what takes space, images included.
    ///
    /// # Errors
    /// When the disk or the database fails.
    pub fn usage(&self) -> Result<Usage> {
        let needed = self.needed_by_images()?;
        let mut records = self.records(&needed, None)?;
        let blobs = self.metadata().with(|c| {
            let mut statement =
                c.prepare_cached("SELECT digest, size, created, used FROM blob ORDER BY used")?;
            let rows = statement
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?;
            Ok(rows.collect::<rusqlite::Result<Vec<(String, i64, i64, i64)>>>()?)
        })?;
        for (digest, size, created, used) in blobs {
            if !digest.parse().is_ok_and(|digest| needed.blobs.contains(&digest)) {
                continue;
            }
            records.push(CacheRecord {
                id: digest,
                kind: RecordKind::Image,
                bytes: u64::try_from(size).unwrap_or(0),
                parents: vec![],
                created,
                used,
                description: "content of an image".into(),
                mutable: false,
                in_use: true,
                shared: false,
            });
        }
        Ok(Usage { records })
    }

    /// Frees space. Images and what they need stay; so does what a process that runs now has used. Without
    /// [`PruneOptions::all`] what could still save work stays too: layers and blobs behind a remembered result.
    ///
    /// # Errors
    /// When the disk or the database fails; what was freed until then stays freed.
    pub fn prune(&self, options: &PruneOptions) -> Result<Pruned> {
        // The database needs room to write down what went.
        self.spend_reserve();
        let pruned = self.collect_garbage(options);
        self.keep_reserve();
        pruned
    }

    fn collect_garbage(&self, options: &PruneOptions) -> Result<Pruned> {
        let sweep = self.sweep_lock(true)?;
        lease::clear_dead(&self.root().join("tmp"))?;
        let began = now_nanos();
        let living = self.busy_since(options.working_since)?.unwrap_or(i64::MAX);
        let aged = options.older_than.map_or(i64::MAX, |age| began.saturating_sub(age));
        let cutoff = living.min(aged).min(began);
        let needed = self.needed_by_images()?;
        let pending = self.pending_layers();
        let mut pruned = Pruned::default();
        let mut doomed = vec![];
        self.metadata().write_durably(|t| {
            if options.all {
                pruned.results = t.execute("DELETE FROM result WHERE used < ?1", [cutoff])?;
                t.execute("DELETE FROM alias WHERE used < ?1", [cutoff])?;
            }
            let mut kept: HashSet<i64> = pending.iter().map(|layer| layer.0).collect();
            let mut statement = t.prepare("SELECT layers FROM result")?;
            for row in statement.query_map([], |row| row.get::<_, String>(0))? {
                kept.extend(row?.split_ascii_whitespace().filter_map(|id| id.parse::<i64>().ok()));
            }
            let mut statement =
                t.prepare("SELECT id, diff_id, folder FROM layer WHERE used < ?1")?;
            let old =
                statement.query_map([cutoff], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
            let old = old.collect::<rusqlite::Result<Vec<(i64, Option<String>, bool)>>>()?;
            let mut has_blob =
                t.prepare("SELECT 1 FROM layer_blob JOIN blob USING (digest) WHERE layer = ?1")?;
            for (id, diff_id, folder) in old {
                if kept.contains(&id) {
                    continue;
                }
                if diff_id.is_some_and(|diff_id| needed.diff_ids.contains(&diff_id)) {
                    // A folder of an image's layer can be unpacked again; the row keeps what its blobs are.
                    if !options.all || !folder || !has_blob.exists([id])? {
                        continue;
                    }
                    t.execute(
                        "UPDATE layer SET folder = 0, boot = NULL, size = 0 WHERE id = ?1",
                        [id],
                    )?;
                } else {
                    t.execute("DELETE FROM layer_blob WHERE layer = ?1", [id])?;
                    t.execute("DELETE FROM layer WHERE id = ?1", [id])?;
                }
                if let Some(home) = self.layer_folder(LayerId(id)).parent()
                    && self.doom(home, &mut doomed)?
                {
                    pruned.layers += 1;
                }
            }
            let mut held: HashSet<String> = HashSet::new();
            let mut statement = t.prepare("SELECT digest FROM layer_blob")?;
            for row in statement.query_map([], |row| row.get::<_, String>(0))? {
                held.insert(row?);
            }
            let mut statement = t.prepare("SELECT digest FROM blob WHERE used < ?1")?;
            let old = statement
                .query_map([cutoff], |row| row.get(0))?
                .collect::<rusqlite::Result<Vec<String>>>()?;
            for digest in old {
                let Ok(parsed) = digest.parse::<Digest>() else { continue };
                if needed.blobs.contains(&parsed) || (held.contains(&digest) && !options.all) {
                    continue;
                }
                t.execute("DELETE FROM layer_blob WHERE digest = ?1", [&digest])?;
                t.execute("DELETE FROM blob WHERE digest = ?1", [&digest])?;
                self.doom(&self.blob_path(&parsed), &mut doomed)?;
                pruned.blobs += 1;
            }
            t.execute("DELETE FROM segment WHERE blob NOT IN (SELECT digest FROM blob)", [])?;
            // Other tools read this file, and a power cut or a careless hand may have changed it.
            self.write_index(t)
        })?;
        drop(sweep);
        self.doom_litter(&mut doomed)?;
        if options.all {
            self.forget_digests(cutoff)?;
            self.forget_downloads(cutoff)?;
            // Locks tell who uses one, whatever lives.
            pruned.bytes += self.prune_kept(aged.min(began))?.1;
        }
        for path in doomed {
            pruned.bytes += remove(&path)?;
        }
        Ok(pruned)
    }

    /// Takes a file or folder out of sight in one step, inside the transaction that forgets it, so that whoever makes the
    /// same thing anew never finds it half gone.
    fn doom(&self, path: &Path, doomed: &mut Vec<PathBuf>) -> Result<bool> {
        let gone = self.temporary("pruned");
        match fs::rename(path, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other.at("remove", path)?,
        }
        doomed.push(gone);
        Ok(true)
    }

    /// Takes away files that no row names: what a crash left between a rename and its row.
    fn doom_litter(&self, doomed: &mut Vec<PathBuf>) -> Result<()> {
        let blobs = self.content_folder().join("blobs");
        let has_row = |c: &rusqlite::Connection, digest: &Digest| -> Result<bool> {
            Ok(c.prepare_cached("SELECT 1 FROM blob WHERE digest = ?1")?
                .exists([digest.to_string()])?)
        };
        let mut suspects = vec![];
        for algorithm in names(&blobs)? {
            for hex in names(&blobs.join(&algorithm))? {
                let Ok(digest) = format!("{algorithm}:{hex}").parse::<Digest>() else { continue };
                if !self.metadata().with(|c| has_row(c, &digest))? {
                    suspects.push(digest);
                }
            }
        }
        if !suspects.is_empty() {
            // Now that nobody is between the two, those still without a row have lost their maker.
            let _sweep = self.sweep_lock(true)?;
            for digest in suspects {
                if !self.metadata().with(|c| has_row(c, &digest))? {
                    self.doom(&self.blob_path(&digest), doomed)?;
                }
            }
        }
        let layers = self.root().join("layers");
        let has_folder = |c: &rusqlite::Connection, layer: LayerId| -> Result<bool> {
            Ok(c.prepare_cached("SELECT 1 FROM layer WHERE id = ?1 AND folder = 1")?
                .exists([layer.0])?)
        };
        let mut suspects = vec![];
        for layer in names(&layers)?.iter().filter_map(|name| name.parse().ok().map(LayerId)) {
            if !self.metadata().with(|c| has_folder(c, layer))? {
                suspects.push(layer);
            }
        }
        if suspects.is_empty() {
            return Ok(());
        }
        self.metadata().write(|t| {
            for layer in suspects {
                if !has_folder(t, layer)? {
                    self.doom(&layers.join(layer.0.to_string()), doomed)?;
                }
            }
            Ok(())
        })
    }

    /// Forgets digests of build contexts that were not looked at for long.
    fn forget_digests(&self, cutoff: i64) -> Result<()> {
        let folder = self.root().join("digests");
        for name in names(&folder)? {
            let path = folder.join(name);
            if fs::symlink_metadata(&path).is_ok_and(|metadata| mtime(&metadata) < cutoff) {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

/// Lists a folder, whose names are all text if they are ours; a missing one is empty.
fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            return Ok(vec![]);
        }
        other => other.at("read", folder)?,
    };
    let mut names = vec![];
    for entry in entries {
        names.extend(entry.at("read", folder)?.file_name().into_string());
    }
    Ok(names)
}

/// Removes a file or folder and returns the space it took, in bytes.
fn remove(path: &Path) -> Result<u64> {
    let bytes = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Ok(metadata) if metadata.is_dir() => disk_usage(path).at("read", path)?,
        other => other.at("read", path)?.len(),
    };
    delete(path).map(|()| bytes)
}

/// Removes a file or folder, if it is there.
fn delete(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => return remove_tree(path).at("remove", path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.at("remove", path),
    }
}
