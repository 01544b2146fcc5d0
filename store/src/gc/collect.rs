//! Taking records away.

use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;

use rusqlite::{OptionalExtension as _, Transaction};
use slipway_spec::Digest;

use super::record::{CacheRecord, RecordKind};
use super::{Needed, delete};
use crate::Store;
use crate::error::Result;
use crate::lease::{self, now_nanos};
use crate::snapshot::LayerId;

/// What nobody has looked up for this long goes with the next collection, though it takes next to no space: two weeks, in
/// nanoseconds.
const FORGET_AFTER: i64 = 14 * 24 * 3600 * 1_000_000_000;

/// What is to be taken away.
#[derive(Clone, Copy, Debug, Default)]
pub struct Collection<'a> {
    /// The records, each after all that stand on it.
    pub records: &'a [CacheRecord],
    /// When the oldest work of this very process began, in nanoseconds since 1970.
    pub working_since: Option<i64>,
    /// Whether what takes next to no space goes too, unless it was used a moment ago: names of results, digests of
    /// contexts, files without a row.
    pub everything: bool,
}

/// What was taken out of sight and is not removed yet.
#[derive(Debug, Default)]
pub struct Collected {
    /// The records that are gone, as they were.
    pub records: Vec<CacheRecord>,
    doomed: Vec<PathBuf>,
    kept: Vec<CacheRecord>,
    forget: i64,
    everything: bool,
}

impl Store {
    /// Takes records out of sight that nobody has used meanwhile, quickly. Their files are removed by
    /// [`finish_collection`](Self::finish_collection), which takes its time. No work of this process may begin while this
    /// runs: what it found would not be known to be in use.
    ///
    /// # Errors
    /// When the disk or the database fails; nothing is gone then.
    pub fn take_records(&self, collection: &Collection<'_>) -> Result<Collected> {
        // The database needs room to write down what went.
        self.spend_reserve();
        let collected = self.take_away(collection);
        if collected.is_err() {
            self.keep_reserve();
        }
        collected
    }

    fn take_away(&self, collection: &Collection<'_>) -> Result<Collected> {
        let sweep = self.sweep_lock(true)?;
        lease::clear_dead(&self.root().join("tmp"))?;
        let now = now_nanos();
        let cutoff = self.busy_since(collection.working_since)?.unwrap_or(i64::MAX).min(now);
        let forget = if collection.everything {
            cutoff
        } else {
            cutoff.min(now.saturating_sub(FORGET_AFTER))
        };
        let mut taking = Taking {
            store: self,
            needed: self.needed_by_images()?,
            pending: self.pending_layers().into_iter().map(|layer| layer.0).collect(),
            cutoff,
            gone: HashSet::new(),
            collected: Collected {
                forget,
                everything: collection.everything,
                ..Collected::default()
            },
        };
        self.metadata().write_durably(|t| taking.records(t, collection.records, forget))?;
        drop(sweep);
        Ok(taking.collected)
    }

    /// Removes the files of what was taken away, and what else can go without being missed. Returns what is gone.
    ///
    /// # Errors
    /// When the disk fails; what is left is removed when the store is next opened.
    pub fn finish_collection(&self, collected: Collected) -> Result<Vec<CacheRecord>> {
        let Collected { mut records, mut doomed, kept, forget, everything } = collected;
        let removed = (|| {
            if everything {
                self.doom_litter(&mut doomed)?;
            }
            for path in doomed {
                delete(&path)?;
            }
            for record in kept {
                // Its lock tells who uses it, whatever else runs.
                if self.remove_kept(&record.id, record.used.saturating_add(1))? {
                    records.push(record);
                }
            }
            self.forget_digests(forget)?;
            self.forget_downloads(forget)
        })();
        self.keep_reserve();
        removed.map(|()| records)
    }
}

/// A collection under way, inside its transaction.
struct Taking<'a> {
    store: &'a Store,
    needed: Needed,
    pending: HashSet<i64>,
    cutoff: i64,
    gone: HashSet<i64>,
    collected: Collected,
}

impl Taking<'_> {
    fn records(&mut self, t: &Transaction<'_>, records: &[CacheRecord], forget: i64) -> Result<()> {
        // What something that stays stands on.
        let mut held: BTreeSet<&str> = BTreeSet::new();
        for record in records {
            let gone = !held.contains(record.id.as_str())
                && match record.kind {
                    RecordKind::CacheMount => self.kept(record),
                    RecordKind::Image | RecordKind::LocalSource => false,
                    _ => match record.id.parse::<i64>() {
                        Ok(layer) => self.layer(t, layer)?,
                        Err(_) if record.id.starts_with("kept/") => self.kept(record),
                        Err(_) => self.loose_blob(t, &record.id)?,
                    },
                };
            if !gone {
                held.extend(record.parents.iter().map(String::as_str));
            } else if !record.id.starts_with("kept/") {
                self.collected.records.push(record.clone());
            }
        }
        self.results(t, forget)?;
        t.execute("DELETE FROM alias WHERE used < ?1", [forget])?;
        t.execute("DELETE FROM segment WHERE blob NOT IN (SELECT digest FROM blob)", [])?;
        Ok(())
    }

    /// Folders with locks of their own are removed later.
    fn kept(&mut self, record: &CacheRecord) -> bool {
        self.collected.kept.push(record.clone());
        true
    }

    fn layer(&mut self, t: &Transaction<'_>, id: i64) -> Result<bool> {
        let row = t
            .prepare_cached("SELECT diff_id, folder, used FROM layer WHERE id = ?1")?
            .query_row([id], |row| {
                Ok((
                    row.get::<_, Option<String>>(0)?,
                    row.get::<_, bool>(1)?,
                    row.get::<_, i64>(2)?,
                ))
            })
            .optional()?;
        let Some((diff_id, folder, used)) = row else { return Ok(false) };
        if used >= self.cutoff || self.pending.contains(&id) {
            return Ok(false);
        }
        let blobs = t
            .prepare_cached(
                "SELECT digest FROM layer_blob JOIN blob USING (digest) WHERE layer = ?1",
            )?
            .query_map([id], |row| row.get(0))?
            .collect::<rusqlite::Result<Vec<String>>>()?;
        let image = diff_id.is_some_and(|diff_id| self.needed.diff_ids.contains(&diff_id));
        let of_image = |digest: &String| {
            digest.parse().is_ok_and(|digest: Digest| self.needed.blobs.contains(&digest))
        };
        if image && folder && !blobs.iter().any(of_image) {
            return Ok(false);
        }
        let own: Vec<String> = blobs.into_iter().filter(|digest| !of_image(digest)).collect();
        if image {
            // A folder of an image's layer can be unpacked again; the row keeps what its blobs are.
            t.execute("UPDATE layer SET folder = 0, boot = NULL, size = 0 WHERE id = ?1", [id])?;
            for digest in &own {
                t.execute("DELETE FROM layer_blob WHERE layer = ?1 AND digest = ?2", (id, digest))?;
            }
        } else {
            t.execute("DELETE FROM layer_blob WHERE layer = ?1", [id])?;
            t.execute("DELETE FROM layer WHERE id = ?1", [id])?;
        }
        for digest in own {
            self.loose_blob(t, &digest)?;
        }
        if let Some(home) = self.store.layer_folder(LayerId(id)).parent() {
            self.store.doom(home, &mut self.collected.doomed)?;
        }
        self.gone.insert(id);
        Ok(true)
    }

    /// Takes away a blob that belongs to nothing.
    fn loose_blob(&mut self, t: &Transaction<'_>, digest: &str) -> Result<bool> {
        let Ok(parsed) = digest.parse::<Digest>() else { return Ok(false) };
        let held =
            t.prepare_cached("SELECT 1 FROM layer_blob WHERE digest = ?1")?.exists([digest])?;
        if held || self.needed.blobs.contains(&parsed) {
            return Ok(false);
        }
        let deleted = t
            .prepare_cached("DELETE FROM blob WHERE digest = ?1 AND used < ?2")?
            .execute((digest, self.cutoff))?;
        if deleted > 0 {
            self.store.doom(&self.store.blob_path(&parsed), &mut self.collected.doomed)?;
        }
        Ok(deleted > 0)
    }

    /// Forgets results that cannot be had any more, and rows of layers that stand for nothing.
    fn results(&self, t: &Transaction<'_>, forget: i64) -> Result<()> {
        let mut layers = HashSet::new();
        // Layers without any form here; a remote one has a blob that can be fetched.
        let mut hollow = HashSet::new();
        let mut spare = vec![];
        let mut statement = t.prepare(
            "SELECT id, diff_id, used, folder OR EXISTS (SELECT 1 FROM layer_blob WHERE layer = id) FROM layer",
        )?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let id: i64 = row.get(0)?;
            layers.insert(id);
            if row.get::<_, bool>(3)? || self.pending.contains(&id) {
                continue;
            }
            hollow.insert(id);
            let image = row
                .get_ref(1)?
                .as_str_or_null()
                .ok()
                .flatten()
                .is_some_and(|diff_id| self.needed.diff_ids.contains(diff_id));
            if !image && row.get::<_, i64>(2)? < self.cutoff {
                spare.push(id);
            }
        }
        let (mut doomed, mut members) = (vec![], HashSet::new());
        let mut statement = t.prepare("SELECT key, layers, used FROM result")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let stack: Vec<i64> = row
                .get_ref(1)?
                .as_str()
                .unwrap_or_default()
                .split_ascii_whitespace()
                .filter_map(|id| id.parse().ok())
                .collect();
            let used: i64 = row.get(2)?;
            let lost = stack.iter().any(|id| self.gone.contains(id) || !layers.contains(id));
            let stale = used < forget && stack.last().is_none_or(|top| hollow.contains(top));
            if lost || stale {
                doomed.push(row.get::<_, Vec<u8>>(0)?);
            } else {
                members.extend(stack);
            }
        }
        for key in doomed {
            t.prepare_cached("DELETE FROM result WHERE key = ?1")?.execute([key])?;
        }
        for id in spare.into_iter().filter(|id| !members.contains(id)) {
            t.prepare_cached("DELETE FROM layer WHERE id = ?1")?.execute([id])?;
        }
        Ok(())
    }
}
