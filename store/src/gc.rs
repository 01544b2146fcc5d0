//! What takes space here, and how to get it back.
//!
//! The collector deletes rows in one transaction and files after it. It deletes nothing that was used since the oldest
//! living process began, so that a build under way never loses what it has found.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use serde::Serialize;
use slipway_spec::Digest;

use crate::error::{IoContext as _, Result};
use crate::lease::{now_nanos, oldest_living, remove_tree};
use crate::snapshot::LayerId;
use crate::{Store, lease};

/// What may go.
#[derive(Clone, Debug, Default)]
pub struct PruneOptions {
    /// Results that no image needs go even if they could still save work.
    pub all: bool,
    /// Only what was last used this many nanoseconds ago or longer.
    pub older_than: Option<i64>,
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
    /// One line for each layer folder and each kind of content.
    pub items: Vec<UsageItem>,
    /// Bytes in blobs.
    pub content_bytes: u64,
    /// Bytes in layer folders.
    pub layer_bytes: u64,
    /// Bytes that `prune -a` would free.
    pub reclaimable_bytes: u64,
}

/// One thing that takes space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UsageItem {
    /// What it is called here.
    pub id: String,
    /// `layer` or `blob`.
    pub kind: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// What it is for.
    pub description: String,
    /// Whether no image needs it.
    pub reclaimable: bool,
    /// When it was last used, in nanoseconds since 1970.
    pub used: i64,
}

/// What images need.
#[derive(Debug, Default)]
struct Needed {
    blobs: HashSet<Digest>,
    diff_ids: HashSet<String>,
}

/// Returns the space a tree of files takes, in bytes.
fn disk_usage(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    let mut total = 0;
    let mut todo = vec![path.to_path_buf()];
    let mut linked = HashSet::new();
    while let Some(path) = todo.pop() {
        let metadata = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            other => other.at("read", &path)?,
        };
        if metadata.nlink() == 1 || metadata.is_dir() || linked.insert(metadata.ino()) {
            total += metadata.blocks() * 512;
        }
        if metadata.is_dir() {
            for entry in fs::read_dir(&path).at("read", &path)? {
                todo.push(entry.at("read", &path)?.path());
            }
        }
    }
    Ok(total)
}

impl Store {
    fn needed_by_images(&self) -> Result<Needed> {
        let mut needed = Needed::default();
        for image in self.images()? {
            let closure = self.closure(&image.target)?;
            let digests = closure.documents.iter().chain(&closure.blobs).map(|descriptor| descriptor.digest.clone());
            needed.blobs.extend(digests);
            for platform in self.platforms(&image.target)? {
                if self.blob_size(&platform.manifest.config.digest)?.is_some() {
                    let config = self.image_config(&platform.manifest.config)?;
                    needed.diff_ids.extend(config.rootfs.diff_ids.iter().map(ToString::to_string));
                }
            }
        }
        Ok(needed)
    }

    /// Lists what takes space.
    ///
    /// # Errors
    /// When the disk or the database fails.
    pub fn usage(&self) -> Result<Usage> {
        let needed = self.needed_by_images()?;
        let mut usage = Usage::default();
        let layers = self.metadata().with(|c| {
            let mut statement =
                c.prepare_cached("SELECT id, diff_id, used, description FROM layer WHERE folder = 1 ORDER BY used")?;
            let rows = statement.query_map([], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, Option<String>>(1)?, row.get(2)?, row.get(3)?))
            })?;
            Ok(rows.collect::<rusqlite::Result<Vec<(i64, Option<String>, i64, String)>>>()?)
        })?;
        for (id, diff_id, used, description) in layers {
            let bytes = disk_usage(&self.layer_folder(LayerId(id)))?;
            usage.layer_bytes += bytes;
            let reclaimable = !diff_id.is_some_and(|diff_id| needed.diff_ids.contains(&diff_id));
            usage.items.push(UsageItem {
                id: id.to_string(),
                kind: "layer".into(),
                bytes,
                description,
                reclaimable,
                used,
            });
        }
        let blobs = self.metadata().with(|c| {
            let mut statement = c.prepare_cached("SELECT digest, size, used FROM blob ORDER BY used")?;
            let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
            Ok(rows.collect::<rusqlite::Result<Vec<(String, i64, i64)>>>()?)
        })?;
        for (digest, size, used) in blobs {
            let bytes = u64::try_from(size).unwrap_or(0);
            usage.content_bytes += bytes;
            let reclaimable = !digest.parse().is_ok_and(|digest| needed.blobs.contains(&digest));
            let description = if reclaimable { "content that no image names" } else { "content of an image" };
            usage.items.push(UsageItem {
                id: digest,
                kind: "blob".into(),
                bytes,
                description: description.into(),
                reclaimable,
                used,
            });
        }
        usage.reclaimable_bytes = usage.items.iter().filter(|item| item.reclaimable).map(|item| item.bytes).sum();
        Ok(usage)
    }

    /// Frees space. Images and what they need stay; so does what a process that runs now has used. Without
    /// [`PruneOptions::all`] what could still save work stays too: layers and blobs behind a remembered result.
    ///
    /// # Errors
    /// When the disk or the database fails; what was freed until then stays freed.
    pub fn prune(&self, options: &PruneOptions) -> Result<Pruned> {
        let tmp = self.root().join("tmp");
        let living = oldest_living(&tmp, &self.0.lease)?.unwrap_or(i64::MAX);
        let aged = options.older_than.map_or(i64::MAX, |age| now_nanos().saturating_sub(age));
        let cutoff = living.min(aged);
        // Rows first: this process's own look-ups below must not count as use.
        let old = |table: &str, key: &str| -> Result<Vec<String>> {
            self.metadata().with(|c| {
                let mut statement = c.prepare(&format!("SELECT {key} FROM {table} WHERE used < ?1"))?;
                let rows = statement.query_map([cutoff], |row| row.get(0))?;
                Ok(rows.collect::<rusqlite::Result<Vec<String>>>()?)
            })
        };
        let old_blobs = old("blob", "digest")?;
        let old_layers = old("layer", "CAST(id AS TEXT)")?;
        let began = now_nanos();
        let needed = self.needed_by_images()?;
        let mut pruned = Pruned::default();
        let (layers, blobs) = self.metadata().write(|t| {
            if options.all {
                pruned.results = t.execute("DELETE FROM result WHERE used < ?1", [cutoff])?;
                t.execute("DELETE FROM alias WHERE used < ?1", [cutoff])?;
            }
            let mut kept: HashSet<i64> = HashSet::new();
            let mut statement = t.prepare("SELECT layers FROM result")?;
            for row in statement.query_map([], |row| row.get::<_, String>(0))? {
                kept.extend(row?.split_ascii_whitespace().filter_map(|id| id.parse::<i64>().ok()));
            }
            drop(statement);
            let mut layers = vec![];
            for id in old_layers.iter().filter_map(|id| id.parse::<i64>().ok()).filter(|id| !kept.contains(id)) {
                // Another process may have come to use it since the list was made.
                let (diff_id, used): (Option<String>, i64) =
                    t.query_row("SELECT diff_id, used FROM layer WHERE id = ?1", [id], |r| Ok((r.get(0)?, r.get(1)?)))?;
                let image = diff_id.is_some_and(|diff_id| needed.diff_ids.contains(&diff_id));
                // A folder of an image's layer can be unpacked again; the row keeps what its blobs are.
                if (image && !options.all) || used >= began {
                    continue;
                }
                if image {
                    t.execute("UPDATE layer SET folder = 0, boot = NULL WHERE id = ?1", [id])?;
                } else {
                    t.execute("DELETE FROM layer_blob WHERE layer = ?1", [id])?;
                    t.execute("DELETE FROM layer WHERE id = ?1", [id])?;
                }
                layers.push(LayerId(id));
            }
            let mut held: HashSet<String> = HashSet::new();
            let mut statement = t.prepare("SELECT digest FROM layer_blob")?;
            for row in statement.query_map([], |row| row.get::<_, String>(0))? {
                held.insert(row?);
            }
            drop(statement);
            let mut blobs = vec![];
            for digest in old_blobs {
                let Ok(parsed) = digest.parse::<Digest>() else { continue };
                if needed.blobs.contains(&parsed) || (held.contains(&digest) && !options.all) {
                    continue;
                }
                let used = t.query_row("SELECT used FROM blob WHERE digest = ?1", [&digest], |row| row.get::<_, i64>(0));
                if used? >= began {
                    continue;
                }
                t.execute("DELETE FROM layer_blob WHERE digest = ?1", [&digest])?;
                t.execute("DELETE FROM blob WHERE digest = ?1", [&digest])?;
                blobs.push(parsed);
            }
            Ok((layers, blobs))
        })?;
        for layer in layers {
            let folder = self.layer_folder(layer);
            if let Some(home) = folder.parent().filter(|home| home.exists()) {
                pruned.bytes += disk_usage(home)?;
                // Out of sight in one step, so that a crash leaves no half a layer behind.
                let old = self.temporary("pruned");
                fs::rename(home, &old).at("remove", home)?;
                remove_tree(&old).at("remove", &old)?;
                pruned.layers += 1;
            }
        }
        for digest in blobs {
            let path = self.blob_path(&digest);
            pruned.bytes += fs::metadata(&path).map_or(0, |metadata| metadata.len());
            match fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).at("remove", &path),
                _ => pruned.blobs += 1,
            }
        }
        self.remove_litter(cutoff, &mut pruned)?;
        Ok(pruned)
    }

    /// Removes files that no row names: what a power cut left between a rename and its row.
    fn remove_litter(&self, cutoff: i64, pruned: &mut Pruned) -> Result<()> {
        use std::os::unix::fs::MetadataExt as _;
        let old = |path: &Path| -> bool {
            let limit = cutoff.min(lease::now_nanos() - 3_600_000_000_000);
            fs::symlink_metadata(path).is_ok_and(|m| m.ctime().saturating_mul(1_000_000_000) < limit)
        };
        let blobs = self.content_folder().join("blobs/sha256");
        for entry in fs::read_dir(&blobs).at("read", &blobs)? {
            let path = entry.at("read", &blobs)?.path();
            let digest = path.file_name().and_then(|n| n.to_str()).map(|hex| format!("sha256:{hex}"));
            let known = match digest.and_then(|text| text.parse::<Digest>().ok()) {
                Some(digest) => self.blob_size(&digest)?.is_some(),
                None => true,
            };
            if !known && old(&path) {
                pruned.bytes += fs::metadata(&path).map_or(0, |metadata| metadata.len());
                fs::remove_file(&path).at("remove", &path)?;
            }
        }
        let layers = self.root().join("layers");
        for entry in fs::read_dir(&layers).at("read", &layers)? {
            let path = entry.at("read", &layers)?.path();
            let id = path.file_name().and_then(|n| n.to_str()).and_then(|name| name.parse::<i64>().ok());
            let known = match id {
                Some(id) => self.metadata().with(|c| {
                    let count = "SELECT count(*) FROM layer WHERE id = ?1 AND folder = 1";
                    Ok(c.query_row(count, [id], |row| row.get::<_, i64>(0))? > 0)
                })?,
                None => true,
            };
            if !known && old(&path) {
                pruned.bytes += disk_usage(&path)?;
                let gone = self.temporary("pruned");
                fs::rename(&path, &gone).at("remove", &path)?;
                remove_tree(&gone).at("remove", &gone)?;
            }
        }
        Ok(())
    }
}
