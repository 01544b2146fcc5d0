//! The document of a cache, checked.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use slipway_spec::cache_config::{
    CREATED_ANNOTATION, CacheConfig, DESCRIPTION_ANNOTATION, DIFF_ID_ANNOTATION, NO_PARENT,
};
use slipway_spec::{Descriptor, Digest, timestamp};
use slipway_store::result::ResultKey;

use super::{ALIAS, CacheSource};

/// A result may have this many layers, as a merge of file systems may.
const MAX_LAYERS: usize = 10_000;

/// Why the document of a cache is not used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// A layer lies on one that is not there.
    #[error("its layer {0} lies on a layer {1} that it does not have")]
    Parent(usize, i64),
    /// A layer lies on itself.
    #[error("its layer {0} lies on itself")]
    LayerLoop(usize),
    /// Too many layers lie on each other.
    #[error("its record {0} has a result of more than {MAX_LAYERS} layers")]
    Deep(usize),
    /// A result names a layer that is not there.
    #[error("its record {0} names a layer {1} that it does not have")]
    Layer(usize, i64),
    /// A record names one that is not there.
    #[error("its record {0} names a record {1} that it does not have")]
    Record(usize, i64),
    /// A record depends on itself.
    #[error("its record {0} depends on itself")]
    RecordLoop(usize),
}

/// A layer of a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportedLayer {
    /// Its blob.
    pub descriptor: Descriptor,
    /// The digest of its uncompressed bytes, as the cache says.
    pub diff_id: Digest,
    /// When it was made, in nanoseconds since 1970.
    pub created: i64,
    /// What made it.
    pub description: String,
}

/// A cache that a build looks into.
pub struct ImportedCache {
    source: Arc<dyn CacheSource>,
    /// What is known of each layer; `None` where the cache does not have its bytes.
    layers: Vec<Option<Arc<ImportedLayer>>>,
    parents: Vec<Option<usize>>,
    results: HashMap<ResultKey, Found>,
    aliases: HashMap<ResultKey, ResultKey>,
    lost: AtomicBool,
    /// Held by whoever fetches from it.
    pub(crate) turn: tokio::sync::Mutex<()>,
}

/// A result of the document.
#[derive(Clone, Debug)]
struct Found {
    layers: Stack,
    created: i64,
}

#[derive(Clone, Debug)]
enum Stack {
    /// A layer with all that is below it.
    Top(usize),
    List(Vec<usize>),
}

impl fmt::Debug for ImportedCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImportedCache")
            .field("source", &self.source)
            .field("results", &self.results.len())
            .finish_non_exhaustive()
    }
}

impl ImportedCache {
    /// Reads a document; `blobs` are what its manifest says of the layers.
    ///
    /// # Errors
    /// When the document contradicts itself.
    pub fn read(
        source: Arc<dyn CacheSource>,
        config: &CacheConfig,
        blobs: &[Descriptor],
    ) -> Result<Self, DocumentError> {
        let parents = parents(config)?;
        let depths = depths(&parents)?;
        check_links(config)?;
        let known: HashMap<&Digest, Arc<ImportedLayer>> = blobs
            .iter()
            .filter_map(|blob| Some((&blob.digest, Arc::new(ImportedLayer::read(blob)?))))
            .collect();
        let layers: Vec<_> =
            config.layers.iter().map(|layer| known.get(&layer.blob).cloned()).collect();
        let mut cache = Self {
            source,
            layers,
            parents,
            results: HashMap::new(),
            aliases: HashMap::new(),
            lost: AtomicBool::new(false),
            turn: tokio::sync::Mutex::default(),
        };
        for (at, record) in config.records.iter().enumerate() {
            let layer = |number: i64| {
                let found = usize::try_from(number).ok().filter(|n| *n < config.layers.len());
                found.ok_or(DocumentError::Layer(at, number))
            };
            let key = key(&record.digest);
            let mut keep = |layers: Stack, created: &str| {
                let created = timestamp::parse(created).unwrap_or(0);
                if let Some(key) = key
                    && cache.results.get(&key).is_none_or(|before| before.created < created)
                {
                    cache.results.insert(key, Found { layers, created });
                }
            };
            for result in &record.layers {
                let top = layer(result.layer)?;
                if depths[top] > MAX_LAYERS {
                    return Err(DocumentError::Deep(at));
                }
                keep(Stack::Top(top), &result.created_at);
            }
            for chain in &record.chains {
                if chain.layers.len() > MAX_LAYERS {
                    return Err(DocumentError::Deep(at));
                }
                let list = chain.layers.iter().map(|n| layer(*n)).collect::<Result<_, _>>()?;
                keep(Stack::List(list), &chain.created_at);
            }
            if let [input] = record.inputs.as_slice()
                && let [link] = input.as_slice()
                && link.selector == ALIAS
                && let Some(key) = key
                && let Some(target) = usize::try_from(link.link)
                    .ok()
                    .and_then(|n| config.records.get(n))
                    .and_then(|target| self::key(&target.digest))
            {
                cache.aliases.insert(key, target);
            }
        }
        Ok(cache)
    }

    /// Returns where its blobs are.
    pub fn source(&self) -> &Arc<dyn CacheSource> {
        &self.source
    }

    /// Returns how many results it has.
    pub fn len(&self) -> usize {
        self.results.len()
    }

    /// Whether it has no results.
    pub fn is_empty(&self) -> bool {
        self.results.is_empty()
    }

    /// Returns the layers of a result and when the step ran; `None` where the result is not known, or a layer cannot be
    /// had.
    pub(crate) fn result(&self, key: &ResultKey) -> Option<(Vec<Arc<ImportedLayer>>, i64)> {
        let found = self.results.get(key)?;
        let numbers = match &found.layers {
            Stack::List(list) => list.clone(),
            Stack::Top(top) => {
                let mut stack: Vec<usize> =
                    std::iter::successors(Some(*top), |at| self.parents[*at]).collect();
                stack.reverse();
                stack
            }
        };
        let layers = numbers.iter().map(|at| self.layers[*at].clone()).collect::<Option<_>>()?;
        Some((layers, found.created))
    }

    /// Returns the key that `key` is another name of.
    pub(crate) fn alias(&self, key: &ResultKey) -> Option<ResultKey> {
        self.aliases.get(key).copied()
    }

    /// Whether a layer of it turned out not to be had, so that nothing more is expected of it.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Gives it up; returns whether it was of use until then.
    pub(crate) fn lose(&self) -> bool {
        !self.lost.swap(true, Ordering::AcqRel)
    }
}

impl ImportedLayer {
    /// Reads what a manifest says of a layer; `None` where that is not enough to use it.
    fn read(blob: &Descriptor) -> Option<Self> {
        let annotation = |name: &str| blob.annotations.get(name);
        let diff_id = annotation(DIFF_ID_ANNOTATION)?.parse().ok()?;
        let created = annotation(CREATED_ANNOTATION).and_then(|text| timestamp::parse(text));
        let mut descriptor =
            Descriptor::new(blob.media_type.clone(), blob.digest.clone(), blob.size);
        descriptor.urls.clone_from(&blob.urls);
        blob.media_type.is_layer().then(|| Self {
            descriptor,
            diff_id,
            created: created.unwrap_or(0),
            description: annotation(DESCRIPTION_ANNOTATION).cloned().unwrap_or_default(),
        })
    }
}

/// Reads a digest as a key; others identify nothing here.
fn key(text: &str) -> Option<ResultKey> {
    text.parse::<Digest>().ok()?.to_sha256().map(ResultKey)
}

fn parents(config: &CacheConfig) -> Result<Vec<Option<usize>>, DocumentError> {
    let one = |(at, parent): (usize, i64)| match usize::try_from(parent) {
        _ if parent == NO_PARENT => Ok(None),
        Ok(parent) if parent < config.layers.len() => Ok(Some(parent)),
        _ => Err(DocumentError::Parent(at, parent)),
    };
    config.layers.iter().map(|layer| layer.parent).enumerate().map(one).collect()
}

/// Returns how many layers each layer's stack has.
fn depths(parents: &[Option<usize>]) -> Result<Vec<usize>, DocumentError> {
    let mut depths = vec![0; parents.len()];
    for start in 0..parents.len() {
        // Down to what is known, and up again.
        let mut path = vec![];
        let mut at = Some(start);
        while let Some(layer) = at.filter(|layer| depths[*layer] == 0) {
            if path.len() > parents.len() {
                return Err(DocumentError::LayerLoop(start));
            }
            path.push(layer);
            at = parents[layer];
        }
        let mut depth = at.map_or(0, |layer| depths[layer]);
        for layer in path.into_iter().rev() {
            depth += 1;
            depths[layer] = depth;
        }
    }
    Ok(depths)
}

/// Checks that the records that a record depends on are there, and do not depend on it.
fn check_links(config: &CacheConfig) -> Result<(), DocumentError> {
    let count = config.records.len();
    let mut waits = vec![0_usize; count];
    let mut needed_by: Vec<Vec<usize>> = vec![vec![]; count];
    for (at, record) in config.records.iter().enumerate() {
        for link in record.inputs.iter().flatten().map(|input| input.link) {
            let target = usize::try_from(link).ok().filter(|target| *target < count);
            let target = target.ok_or(DocumentError::Record(at, link))?;
            needed_by[target].push(at);
            waits[at] += 1;
        }
    }
    // What depends on nothing goes first; what never goes is part of a loop, or depends on one.
    let mut free: Vec<usize> = (0..count).filter(|at| waits[*at] == 0).collect();
    while let Some(at) = free.pop() {
        for next in &needed_by[at] {
            waits[*next] -= 1;
            if waits[*next] == 0 {
                free.push(*next);
            }
        }
    }
    match waits.iter().position(|waits| *waits > 0) {
        Some(at) => Err(DocumentError::RecordLoop(at)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use slipway_spec::MediaType;
    use slipway_spec::cache_config::{
        CacheChain, CacheInput, CacheLayer, CacheRecord, CacheResult,
    };
    use slipway_store::{Error, Store};

    use super::*;

    #[derive(Debug)]
    struct Nowhere;

    #[async_trait]
    impl CacheSource for Nowhere {
        fn name(&self) -> &str {
            "nowhere"
        }

        async fn fetch(
            &self,
            _: &Store,
            blob: &Descriptor,
            _: &(dyn Fn(u64) + Send + Sync),
        ) -> Result<(), Error> {
            Err(Error::new(slipway_store::ErrorKind::NotFound, blob.digest.to_string()))
        }
    }

    fn digest(n: u8) -> Digest {
        Digest::of(&[n])
    }

    fn blob(n: u8) -> Descriptor {
        let mut blob = Descriptor::new(MediaType::OCI_LAYER_GZIP, digest(n), 1);
        blob.annotations.insert(DIFF_ID_ANNOTATION.into(), digest(n + 100).to_string());
        blob.annotations.insert(CREATED_ANNOTATION.into(), "1970-01-01T00:00:07Z".into());
        blob
    }

    fn layer(n: u8, parent: i64) -> CacheLayer {
        CacheLayer { blob: digest(n), parent }
    }

    fn result(n: u8, layer: i64, created_at: &str) -> CacheRecord {
        let layers = vec![CacheResult { layer, created_at: created_at.into() }];
        CacheRecord { layers, digest: digest(n).to_string(), ..CacheRecord::default() }
    }

    fn links(n: u8, selector: &str, links: &[i64]) -> CacheRecord {
        let links = links.iter().map(|link| CacheInput { selector: selector.into(), link: *link });
        let inputs = vec![links.collect()];
        CacheRecord { digest: digest(n).to_string(), inputs, ..CacheRecord::default() }
    }

    fn read(
        layers: &[CacheLayer],
        records: &[CacheRecord],
    ) -> Result<ImportedCache, DocumentError> {
        let config = CacheConfig { layers: layers.to_vec(), records: records.to_vec() };
        let blobs: Vec<_> = layers.iter().map(|layer| layer.blob.clone()).collect();
        let known: Vec<_> = (1..=9).map(blob).filter(|b| blobs.contains(&b.digest)).collect();
        ImportedCache::read(Arc::new(Nowhere), &config, &known)
    }

    fn key_of(n: u8) -> ResultKey {
        key(&digest(n).to_string()).unwrap()
    }

    fn stack(cache: &ImportedCache, n: u8) -> Option<Vec<Digest>> {
        let (layers, _) = cache.result(&key_of(n))?;
        Some(layers.iter().map(|layer| layer.descriptor.digest.clone()).collect())
    }

    #[test]
    fn results_are_stacks_of_layers() {
        let chain = CacheChain { layers: vec![2, 0], created_at: String::new() };
        let chains = CacheRecord {
            chains: vec![chain],
            digest: digest(22).to_string(),
            ..CacheRecord::default()
        };
        let records = [result(20, 2, ""), result(21, 0, ""), chains];
        let cache = read(&[layer(1, -1), layer(2, 0), layer(3, 1)], &records).unwrap();
        assert_eq!(cache.len(), 3);
        assert_eq!(stack(&cache, 20), Some(vec![digest(1), digest(2), digest(3)]));
        assert_eq!(stack(&cache, 21), Some(vec![digest(1)]));
        assert_eq!(stack(&cache, 22), Some(vec![digest(3), digest(1)]));
        assert_eq!(stack(&cache, 23), None);
        let (layers, _) = cache.result(&key_of(21)).unwrap();
        assert_eq!((&layers[0].diff_id, layers[0].created), (&digest(101), 7_000_000_000));
    }

    #[test]
    fn the_newest_result_of_a_key_counts() {
        let records = [
            result(20, 0, "2020-01-01T00:00:00Z"),
            result(20, 1, "2021-01-01T00:00:00Z"),
            result(20, 2, "2019-01-01T00:00:00Z"),
        ];
        let cache = read(&[layer(1, -1), layer(2, -1), layer(3, -1)], &records).unwrap();
        assert_eq!(stack(&cache, 20), Some(vec![digest(2)]));
    }

    #[test]
    fn only_our_own_links_are_aliases() {
        let records = [
            result(20, 0, ""),
            links(21, ALIAS, &[0]),
            links(22, "", &[0]),
            links(23, ALIAS, &[0, 1]),
        ];
        let cache = read(&[layer(1, -1)], &records).unwrap();
        assert_eq!(cache.alias(&key_of(21)), Some(key_of(20)));
        assert_eq!(cache.alias(&key_of(22)), None, "BuildKit's links mean something else");
        assert_eq!(cache.alias(&key_of(23)), None);
    }

    #[test]
    fn a_layer_that_cannot_be_used_makes_its_results_unknown() {
        let config = CacheConfig {
            layers: vec![layer(1, -1), layer(2, 0), layer(3, -1)],
            records: vec![result(20, 1, ""), result(21, 0, ""), result(22, 2, "")],
        };
        let mut nameless = blob(1);
        nameless.annotations.clear();
        let other = Descriptor { media_type: MediaType::OCI_CONFIG, ..blob(3) };
        let blobs = [nameless, blob(2), other];
        let cache = ImportedCache::read(Arc::new(Nowhere), &config, &blobs).unwrap();
        for n in 20..23 {
            assert_eq!(stack(&cache, n), None, "{n}");
        }
    }

    #[test]
    fn documents_that_contradict_themselves_are_refused() {
        use DocumentError as E;
        let one = [layer(1, -1)];
        for (layers, records, expected) in [
            (&[layer(1, 1)][..], &[][..], E::Parent(0, 1)),
            (&[layer(1, -2)], &[], E::Parent(0, -2)),
            (&[layer(1, i64::MAX)], &[], E::Parent(0, i64::MAX)),
            (&[layer(1, 0)], &[], E::LayerLoop(0)),
            (&[layer(1, -1), layer(2, 2), layer(3, 1)], &[], E::LayerLoop(1)),
            (&one, &[result(20, 1, "")], E::Layer(0, 1)),
            (&one, &[result(20, -1, "")], E::Layer(0, -1)),
            (&one, &[result(20, i64::MIN, "")], E::Layer(0, i64::MIN)),
            (&one, &[links(20, ALIAS, &[1])], E::Record(0, 1)),
            (&one, &[links(20, ALIAS, &[-1])], E::Record(0, -1)),
            (&one, &[links(20, ALIAS, &[0])], E::RecordLoop(0)),
            (
                &one,
                &[result(19, 0, ""), links(20, "", &[2]), links(21, "", &[1])],
                E::RecordLoop(1),
            ),
        ] {
            assert_eq!(read(layers, records).unwrap_err(), expected);
        }
    }

    #[test]
    fn long_documents_take_time_in_proportion() {
        const COUNT: usize = 60_000;
        // Each on the next one: the worst order.
        let mut config = CacheConfig::default();
        for at in 1..=COUNT {
            let parent = if at == COUNT { -1 } else { at as i64 };
            config.layers.push(layer(1, parent));
        }
        let read =
            |config: &CacheConfig| ImportedCache::read(Arc::new(Nowhere), config, &[blob(1)]);
        assert!(read(&config).unwrap().is_empty());
        config.records.push(result(20, 0, ""));
        assert_eq!(read(&config).unwrap_err(), DocumentError::Deep(0));
        config.records[0] = result(20, (COUNT - 5) as i64, "");
        assert_eq!(stack(&read(&config).unwrap(), 20).unwrap().len(), 5);
        config.layers[COUNT - 1].parent = 0;
        assert_eq!(read(&config).unwrap_err(), DocumentError::LayerLoop(0));
        let records = (0..COUNT).map(|at| match at {
            0 => result(20, 0, ""),
            at => links(20, ALIAS, &[at as i64 - 1]),
        });
        let config = CacheConfig { layers: vec![layer(1, -1)], records: records.collect() };
        assert_eq!(read(&config).unwrap().len(), 1);
    }

    #[test]
    fn what_is_no_digest_of_32_bytes_is_no_key() {
        for text in ["", "random:1", "sha256:1", &format!("sha512:{}", "a".repeat(128))] {
            assert_eq!(key(text), None, "{text}");
        }
        let records = [CacheRecord { digest: "random:1".into(), ..result(1, 0, "") }];
        assert!(read(&[layer(1, -1)], &records).unwrap().is_empty());
    }
}
