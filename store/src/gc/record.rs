//! What the cache holds, one record for each thing that can go by itself.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde::Serialize;
use slipway_spec::Digest;

use super::Needed;
use crate::Store;
use crate::error::{IoContext as _, Result};
use crate::folder::disk_usage;
use crate::kept::KeptKind;
use crate::snapshot::LayerId;

/// What a record is, under the names that BuildKit's clients know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum RecordKind {
    /// What a step made, or a layer of an image that was pulled.
    #[default]
    #[serde(rename = "regular")]
    Regular,
    /// What a build uses without its user knowing.
    #[serde(rename = "internal")]
    Internal,
    /// A layer of a frontend's image.
    #[serde(rename = "frontend")]
    Frontend,
    /// Files of a client, kept so that it sends only what changed.
    #[serde(rename = "source.local")]
    LocalSource,
    /// A git repository, or the files of one of its commits.
    #[serde(rename = "source.git.checkout")]
    GitCheckout,
    /// A cache mount.
    #[serde(rename = "exec.cachemount")]
    CacheMount,
    /// Content of an image that has a name. It goes with its last name only.
    #[serde(rename = "image")]
    Image,
}

impl RecordKind {
    /// Returns the name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Regular => "regular",
            Self::Internal => "internal",
            Self::Frontend => "frontend",
            Self::LocalSource => "source.local",
            Self::GitCheckout => "source.git.checkout",
            Self::CacheMount => "exec.cachemount",
            Self::Image => "image",
        }
    }

    /// Reads a name of the database; one that a later version wrote is nothing special here.
    fn of(name: &str) -> Self {
        match name {
            "internal" => Self::Internal,
            "frontend" => Self::Frontend,
            "source.git.checkout" => Self::GitCheckout,
            _ => Self::Regular,
        }
    }
}

/// Something that takes space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CacheRecord {
    /// What it is called here.
    pub id: String,
    /// What it is.
    pub kind: RecordKind,
    /// The bytes that are free again when it is gone.
    pub bytes: u64,
    /// The records that it stands on, which cannot go before it.
    pub parents: Vec<String>,
    /// When it was made, in nanoseconds since 1970.
    pub created: i64,
    /// When it was last used, in nanoseconds since 1970; true to ten minutes.
    pub used: i64,
    /// What it is for.
    pub description: String,
    /// Whether it can still change.
    pub mutable: bool,
    /// Whether something that runs may need it.
    pub in_use: bool,
    /// Whether an image needs it too.
    pub shared: bool,
}

/// The fields of records that filters may name.
pub const FIELDS: &[&str] =
    &["id", "parents", "description", "inuse", "mutable", "immutable", "type", "shared", "private"];

impl CacheRecord {
    /// Returns a field as filters see it.
    pub fn field(&self, path: &[String]) -> Option<String> {
        let text = |text: String| (!text.is_empty()).then_some(text);
        let flag = |set: bool| set.then(|| "true".to_owned());
        let [name] = path else { return None };
        match name.as_str() {
            "id" => text(self.id.clone()),
            "parents" => text(self.parents.join(";")),
            "description" => text(self.description.clone()),
            "type" => text(self.kind.as_str().into()),
            "inuse" => flag(self.in_use),
            "mutable" => flag(self.mutable),
            "immutable" => flag(!self.mutable),
            "shared" => flag(self.shared),
            "private" => flag(!self.shared),
            _ => None,
        }
    }
}

/// A layer as the database has it.
struct LayerRow {
    id: i64,
    diff_id: Option<String>,
    folder: bool,
    size: i64,
    created: i64,
    used: i64,
    description: String,
    kind: String,
}

#[derive(Default)]
struct Blobs {
    bytes: u64,
    own: bool,
    shared: bool,
    used: i64,
}

impl Store {
    /// Says what a layer is, where it is more than what a step made.
    ///
    /// # Errors
    /// When the database fails.
    pub fn set_layer_kind(&self, layer: LayerId, kind: RecordKind) -> Result<()> {
        self.metadata().with(|c| {
            c.prepare_cached("UPDATE layer SET kind = ?2 WHERE id = ?1 AND kind <> ?2")?
                .execute((layer.0, kind.as_str()))?;
            Ok(())
        })
    }

    /// Lists what the cache holds, children after what they stand on. `working_since` is when the oldest work of this very
    /// process began, in nanoseconds since 1970. What only images need is not cache and is left out.
    ///
    /// # Errors
    /// When the disk or the database fails.
    pub fn cache_records(&self, working_since: Option<i64>) -> Result<Vec<CacheRecord>> {
        let needed = self.needed_by_images()?;
        self.records(&needed, working_since)
    }

    pub(super) fn records(
        &self,
        needed: &Needed,
        working_since: Option<i64>,
    ) -> Result<Vec<CacheRecord>> {
        let busy_since = self.busy_since(working_since)?.unwrap_or(i64::MAX);
        let layers = self.layer_rows()?;
        let (mut blobs, loose) = self.blob_records(needed, busy_since)?;
        let stacks = self.stacks()?;
        let mut records = vec![];
        let mut known = HashSet::new();
        for row in layers {
            let image = row.diff_id.as_ref().is_some_and(|id| needed.diff_ids.contains(id));
            let blobs = blobs.remove(&row.id).unwrap_or_default();
            let has_blob = blobs.own || blobs.shared;
            let in_stack = has_blob && stacks.members.contains(&row.id);
            if !(row.folder || blobs.own || in_stack) {
                continue;
            }
            known.insert(row.id);
            let used = row.used.max(blobs.used);
            let folder_bytes = if row.folder { u64::try_from(row.size).unwrap_or(0) } else { 0 };
            records.push(CacheRecord {
                id: row.id.to_string(),
                kind: RecordKind::of(&row.kind),
                bytes: folder_bytes + blobs.bytes,
                parents: vec![],
                // Images may say that their layers were made in 1970.
                created: row.created,
                used,
                description: row.description,
                mutable: false,
                // What an image has nowhere else cannot go either.
                in_use: used >= busy_since || (image && !has_blob),
                shared: image || blobs.shared,
            });
        }
        for record in &mut records {
            let below = record.id.parse().ok().and_then(|id: i64| stacks.below.get(&id));
            let below = below.into_iter().flatten().filter(|layer| known.contains(*layer));
            record.parents = below.map(ToString::to_string).collect();
        }
        records.extend(loose);
        records.extend(self.kept_records()?);
        Ok(records)
    }

    /// Returns since when everything that was used may be needed by something that runs.
    pub(super) fn busy_since(&self, working_since: Option<i64>) -> Result<Option<i64>> {
        let others = crate::lease::oldest_living(&self.root().join("tmp"), &self.0.lease)?;
        let oldest = others.into_iter().chain(working_since).min();
        Ok(oldest.map(|began| began.saturating_sub(crate::metadata::USED_PRECISION)))
    }

    /// Reads the rows of layers, and measures folders that nobody has measured yet: what is in them never changes.
    fn layer_rows(&self) -> Result<Vec<LayerRow>> {
        let mut rows = self.metadata().with(|c| {
            let mut statement = c.prepare_cached(
                "SELECT id, diff_id, folder, size, created, used, description, kind FROM layer ORDER BY id",
            )?;
            let rows = statement.query_map([], |row| {
                Ok(LayerRow {
                    id: row.get(0)?,
                    diff_id: row.get(1)?,
                    folder: row.get(2)?,
                    size: row.get(3)?,
                    created: row.get(4)?,
                    used: row.get(5)?,
                    description: row.get(6)?,
                    kind: row.get(7)?,
                })
            })?;
            Ok(rows.collect::<rusqlite::Result<Vec<_>>>()?)
        })?;
        let mut measured = vec![];
        for row in rows.iter_mut().filter(|row| row.folder && row.size == 0) {
            let folder = self.layer_folder(LayerId(row.id));
            let bytes = disk_usage(&folder).at("read", &folder)?;
            row.size = i64::try_from(bytes).unwrap_or(i64::MAX);
            measured.push((row.id, row.size));
        }
        if !measured.is_empty() {
            self.metadata().write(|t| {
                let mut statement =
                    t.prepare_cached("UPDATE layer SET size = ?2 WHERE id = ?1 AND folder = 1")?;
                for row in &measured {
                    statement.execute(*row)?;
                }
                Ok(())
            })?;
        }
        Ok(rows)
    }

    /// Returns what blobs add to layers, and those that belong to none.
    fn blob_records(
        &self,
        needed: &Needed,
        busy_since: i64,
    ) -> Result<(HashMap<i64, Blobs>, Vec<CacheRecord>)> {
        let rows = self.metadata().with(|c| {
            let mut statement = c.prepare_cached(
                "SELECT blob.digest, layer, blob.size, created, used FROM blob
                 LEFT JOIN layer_blob USING (digest) ORDER BY blob.digest, layer",
            )?;
            let rows = statement.query_map([], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?))
            })?;
            Ok(rows.collect::<rusqlite::Result<Vec<(String, Option<i64>, i64, i64, i64)>>>()?)
        })?;
        let (mut layers, mut loose) = (HashMap::<i64, Blobs>::new(), vec![]);
        let mut counted = String::new();
        for (digest, layer, size, created, used) in rows {
            let image = digest.parse().is_ok_and(|digest: Digest| needed.blobs.contains(&digest));
            let bytes = u64::try_from(size).unwrap_or(0);
            let Some(layer) = layer else {
                if !image {
                    loose.push(CacheRecord {
                        id: digest,
                        kind: RecordKind::Regular,
                        bytes,
                        parents: vec![],
                        created,
                        used,
                        description: "content that no image names".into(),
                        mutable: false,
                        in_use: used >= busy_since,
                        shared: false,
                    });
                }
                continue;
            };
            let blobs = layers.entry(layer).or_default();
            blobs.used = blobs.used.max(used);
            if image {
                blobs.shared = true;
            } else {
                blobs.own = true;
                // A blob that several layers have takes space once.
                if counted != digest {
                    blobs.bytes += bytes;
                }
            }
            counted = digest;
        }
        Ok((layers, loose))
    }

    fn stacks(&self) -> Result<Stacks> {
        let mut stacks = Stacks::default();
        self.metadata().with(|c| {
            let mut statement = c.prepare_cached("SELECT DISTINCT layers FROM result")?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                let layers = row.get_ref(0)?.as_str().unwrap_or_default();
                let mut last = None;
                for id in layers.split_ascii_whitespace().filter_map(|id| id.parse::<i64>().ok()) {
                    stacks.members.insert(id);
                    if let Some(last) = last.filter(|last| *last != id) {
                        stacks.below.entry(id).or_default().insert(last);
                    }
                    last = Some(id);
                }
            }
            Ok(())
        })?;
        open_circles(&mut stacks.below);
        Ok(stacks)
    }

    fn kept_records(&self) -> Result<Vec<CacheRecord>> {
        let record = |item: crate::kept::KeptItem| CacheRecord {
            id: item.path,
            kind: match item.kind {
                KeptKind::Cache => RecordKind::CacheMount,
                KeptKind::Git => RecordKind::GitCheckout,
            },
            bytes: item.bytes,
            parents: vec![],
            created: item.created,
            used: item.used,
            description: match item.kind {
                KeptKind::Cache => format!("cache mount {}", item.name),
                KeptKind::Git => format!("git repository {}", item.name),
            },
            mutable: true,
            in_use: item.busy,
            shared: false,
        };
        Ok(self.kept()?.into_iter().map(record).collect())
    }
}

/// What stacks of results say of layers.
#[derive(Default)]
struct Stacks {
    members: HashSet<i64>,
    /// Which layers lie directly below each.
    below: BTreeMap<i64, BTreeSet<i64>>,
}

/// Takes away what closes circles: merges may stack two layers one way and the other, so that each lies below the other, and
/// nothing could ever go first.
fn open_circles(below: &mut BTreeMap<i64, BTreeSet<i64>>) {
    let (mut seen, mut on_path) = (HashSet::new(), HashSet::new());
    let mut closing = vec![];
    for (start, lower) in &*below {
        if !seen.insert(*start) {
            continue;
        }
        on_path.insert(*start);
        let mut path = vec![(*start, lower.iter())];
        while let Some((layer, rest)) = path.last_mut() {
            let Some(next) = rest.next() else {
                on_path.remove(layer);
                path.pop();
                continue;
            };
            if on_path.contains(next) {
                closing.push((*layer, *next));
            } else if seen.insert(*next)
                && let Some(lower) = below.get(next)
            {
                on_path.insert(*next);
                path.push((*next, lower.iter()));
            }
        }
    }
    for (layer, lower) in closing {
        below.entry(layer).or_default().remove(&lower);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(edges: &[(i64, i64)]) -> Vec<(i64, i64)> {
        let mut below = BTreeMap::<i64, BTreeSet<i64>>::new();
        for (layer, lower) in edges {
            below.entry(*layer).or_default().insert(*lower);
        }
        open_circles(&mut below);
        let pairs = |(layer, lower): (i64, BTreeSet<i64>)| {
            lower.into_iter().map(move |lower| (layer, lower))
        };
        below.into_iter().flat_map(pairs).collect()
    }

    #[test]
    fn only_what_closes_a_circle_is_taken_away() {
        let diamond = [(2, 1), (3, 1), (4, 2), (4, 3), (4, 9)];
        assert_eq!(opened(&diamond), diamond);
        assert_eq!(opened(&[(1, 2), (2, 1)]), [(1, 2)]);
        assert_eq!(
            opened(&[(1, 2), (2, 3), (3, 1), (3, 4), (5, 1)]),
            [(1, 2), (2, 3), (3, 4), (5, 1)]
        );
        assert_eq!(opened(&[(1, 2), (2, 1), (3, 4), (4, 3), (2, 3)]).len(), 3);
    }
}
