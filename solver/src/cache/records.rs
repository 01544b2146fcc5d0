//! What a build has to tell of its steps, for a cache.

use std::collections::{BTreeMap, HashMap, HashSet};

use slipway_spec::cache_config::{
    CacheChain, CacheConfig, CacheInput, CacheLayer, CacheRecord, CacheResult, NO_PARENT,
};
use slipway_spec::{Digest, timestamp};
use slipway_store::result::{ResultKey, StepResult};
use slipway_store::snapshot::{LayerId, Snapshot};

use super::{ALIAS, to_digest};

/// Results of steps by key, and further names of keys.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheRecords {
    /// Results.
    pub results: BTreeMap<ResultKey, StepResult>,
    /// Keys, and which other key each of them stands for.
    pub aliases: BTreeMap<ResultKey, ResultKey>,
}

impl CacheRecords {
    /// Lists each layer once.
    pub fn layers(&self) -> Vec<LayerId> {
        let mut seen = HashSet::new();
        let layers = self.results.values().flat_map(|result| &result.snapshot.layers);
        layers.copied().filter(|layer| seen.insert(*layer)).collect()
    }

    /// Writes the document; `blobs` are the layers' blobs. Results with a layer that has none are left out.
    pub fn document(&self, blobs: &HashMap<LayerId, Digest>) -> CacheConfig {
        let mut numbers: HashMap<(Digest, i64), i64> = HashMap::new();
        let mut layers: Vec<CacheLayer> = vec![];
        let mut results: Vec<(ResultKey, CacheResult)> = vec![];
        for (key, result) in &self.results {
            let stack: Option<Vec<&Digest>> =
                result.snapshot.layers.iter().map(|layer| blobs.get(layer)).collect();
            let Some(stack) = stack.filter(|stack| !stack.is_empty()) else { continue };
            let mut parent = NO_PARENT;
            for blob in stack {
                parent = *numbers.entry((blob.clone(), parent)).or_insert_with(|| {
                    layers.push(CacheLayer { blob: blob.clone(), parent });
                    number(layers.len() - 1)
                });
            }
            let created_at = timestamp::format(result.created);
            results.push((*key, CacheResult { layer: parent, created_at }));
        }
        let mut records = Records::default();
        for (key, result) in results {
            records.of(key).layers.push(result);
        }
        records.add_aliases(&self.aliases);
        CacheConfig { layers, records: records.all }
    }

    /// Writes the records whose layers an image has, for that image's config; `None` where there are none.
    pub fn inline(&self, image: &Snapshot) -> Option<Vec<CacheRecord>> {
        let mut positions: HashMap<LayerId, i64> = HashMap::new();
        for (at, layer) in image.layers.iter().enumerate() {
            positions.entry(*layer).or_insert(number(at));
        }
        let mut records = Records::default();
        for (key, result) in &self.results {
            let layers = &result.snapshot.layers;
            let list: Option<Vec<i64>> =
                layers.iter().map(|layer| positions.get(layer).copied()).collect();
            let Some(list) = list.filter(|list| !list.is_empty()) else { continue };
            let created_at = timestamp::format(result.created);
            // In an image each layer lies on the one before it.
            if image.layers.starts_with(layers) {
                let layer = number(layers.len() - 1);
                records.of(*key).layers.push(CacheResult { layer, created_at });
            } else {
                records.of(*key).chains.push(CacheChain { layers: list, created_at });
            }
        }
        if records.all.is_empty() {
            return None;
        }
        records.add_aliases(&self.aliases);
        Some(records.all)
    }
}

fn number(at: usize) -> i64 {
    i64::try_from(at).unwrap_or(i64::MAX)
}

/// Records under way, each key once.
#[derive(Default)]
struct Records {
    all: Vec<CacheRecord>,
    numbers: HashMap<ResultKey, usize>,
}

impl Records {
    fn at(&mut self, key: ResultKey) -> usize {
        *self.numbers.entry(key).or_insert_with(|| {
            let digest = to_digest(key).to_string();
            self.all.push(CacheRecord { digest, ..CacheRecord::default() });
            self.all.len() - 1
        })
    }

    fn of(&mut self, key: ResultKey) -> &mut CacheRecord {
        let at = self.at(key);
        &mut self.all[at]
    }

    fn add_aliases(&mut self, aliases: &BTreeMap<ResultKey, ResultKey>) {
        // A name of a name is none: what is looked up is followed once.
        for (key, target) in aliases.iter().filter(|(_, target)| !aliases.contains_key(target)) {
            let link = number(self.at(*target));
            self.of(*key).inputs = vec![vec![CacheInput { selector: ALIAS.into(), link }]];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> ResultKey {
        ResultKey([n; 32])
    }

    fn result(layers: &[i64]) -> StepResult {
        let layers = layers.iter().map(|n| LayerId(*n)).collect();
        StepResult { snapshot: Snapshot { layers }, created: 7_500_000_000 }
    }

    fn blob(n: i64) -> Digest {
        Digest::of(&n.to_le_bytes())
    }

    fn records() -> CacheRecords {
        CacheRecords {
            results: [
                (key(1), result(&[1])),
                (key(2), result(&[1, 2])),
                (key(3), result(&[3])),
                (key(4), result(&[1, 2, 3])),
            ]
            .into(),
            aliases: [(key(9), key(8)), (key(8), key(7)), (key(6), key(2))].into(),
        }
    }

    fn text(key: ResultKey) -> String {
        to_digest(key).to_string()
    }

    #[test]
    fn a_document_has_each_layer_once_on_each_that_it_lies_on() {
        let records = records();
        assert_eq!(records.layers(), [1, 2, 3].map(LayerId));
        let blobs: HashMap<_, _> = (1..=3).map(|n| (LayerId(n), blob(n))).collect();
        let document = records.document(&blobs);
        let layers: Vec<_> =
            document.layers.iter().map(|layer| (layer.blob.clone(), layer.parent)).collect();
        assert_eq!(layers, [(blob(1), -1), (blob(2), 0), (blob(3), -1), (blob(3), 1)]);
        let tops: Vec<_> = document
            .records
            .iter()
            .filter_map(|record| Some((record.digest.clone(), record.layers.first()?.layer)))
            .collect();
        let expected = [(1, 0), (2, 1), (3, 2), (4, 3)].map(|(n, top)| (text(key(n)), top));
        assert_eq!(tops, expected);
        assert_eq!(document.records[0].layers[0].created_at, "1970-01-01T00:00:07.5Z");
        let link = |n: u8| {
            let record = document.records.iter().find(|r| r.digest == text(key(n)))?;
            let link = record.inputs.first()?.first()?.link;
            Some(document.records[usize::try_from(link).unwrap()].digest.clone())
        };
        assert_eq!((link(8), link(6)), (Some(text(key(7))), Some(text(key(2)))));
        assert_eq!(link(9), None, "names are followed once");
        assert_eq!(records.document(&blobs), document);
    }

    #[test]
    fn results_with_a_layer_that_has_no_blob_are_left_out() {
        let blobs: HashMap<_, _> = [1, 3].map(|n| (LayerId(n), blob(n))).into();
        let document = records().document(&blobs);
        let told: Vec<_> = document
            .records
            .iter()
            .filter(|record| !record.layers.is_empty())
            .map(|record| record.digest.clone())
            .collect();
        assert_eq!(told, [text(key(1)), text(key(3))]);
        assert!(records().document(&HashMap::new()).layers.is_empty());
    }

    #[test]
    fn an_image_tells_of_its_own_layers() {
        let image = Snapshot { layers: vec![LayerId(1), LayerId(2), LayerId(3)] };
        let inline = records().inline(&image).unwrap();
        let told: Vec<_> = inline
            .iter()
            .filter(|record| record.inputs.is_empty())
            .map(|record| {
                let tops = record.layers.iter().map(|result| result.layer).collect::<Vec<_>>();
                let lists = record.chains.iter().map(|chain| chain.layers.clone());
                (record.digest.clone(), tops, lists.collect::<Vec<_>>())
            })
            .collect();
        assert_eq!(
            told,
            [
                (text(key(1)), vec![0], vec![]),
                (text(key(2)), vec![1], vec![]),
                (text(key(3)), vec![], vec![vec![2]]),
                (text(key(4)), vec![2], vec![]),
                (text(key(7)), vec![], vec![]),
            ]
        );
        assert_eq!(records().inline(&Snapshot { layers: vec![LayerId(9)] }), None);
        assert_eq!(CacheRecords::default().inline(&image), None);
    }
}
