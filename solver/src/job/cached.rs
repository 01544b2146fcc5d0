//! Caches from elsewhere: looked into where the store knows nothing, fetched from when layers are needed, and what a build
//! has to tell for one.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use futures::future::{join_all, try_join_all};
use slipway_spec::progress::{ProgressEvent, Warning};
use slipway_spec::{Descriptor, Digest};
use slipway_store::result::{ResultKey, StepResult};
use slipway_store::snapshot::{LayerId, Snapshot};
use slipway_store::{Error, ErrorKind, blocking};
use tokio::sync::OnceCell;

use super::announce::Announced;
use super::key::output_key;
use super::local::is_local;
use super::result::output_count;
use super::{Job, lock};
use crate::cache::{CacheRecords, ImportedCache, ImportedLayer};
use crate::error::{Cause, Result};
use crate::graph::{Edge, Vertex};
use crate::source::is_layered;

/// Stands for an output of a step that nobody asked for and that is not known.
const UNKNOWN: LayerId = LayerId(-1);

/// The caches that a build looks into.
#[derive(Default)]
pub(super) struct Imports {
    caches: Mutex<Vec<Arc<ImportedCache>>>,
    /// Who has layers that may not be here.
    offers: Mutex<HashMap<LayerId, Vec<Offer>>>,
    /// Whether something that was offered turned out not to be had.
    any_lost: AtomicBool,
}

#[derive(Clone)]
struct Offer {
    cache: Arc<ImportedCache>,
    layer: Arc<ImportedLayer>,
}

impl Imports {
    fn useful(&self) -> Vec<Arc<ImportedCache>> {
        let caches = lock(&self.caches);
        caches.iter().filter(|cache| !cache.is_lost()).cloned().collect()
    }

    /// Returns who still offers a layer, if anybody ever did.
    fn offers(&self, layer: LayerId) -> Option<Vec<Offer>> {
        let offers = lock(&self.offers);
        let known = offers.get(&layer)?;
        Some(known.iter().filter(|offer| !offer.cache.is_lost()).cloned().collect())
    }
}

/// What caches have to do with one vertex.
#[derive(Debug, Default)]
pub(crate) struct VertexCache {
    /// Outputs that somebody asked for, as bits; the last one stands for all from there on.
    used: AtomicU64,
    /// Further attempts to get the results, after a cache did not have what it promised.
    attempts: Mutex<Vec<Attempt>>,
    /// Another name of the key, and the key.
    alias: Mutex<Option<(ResultKey, ResultKey)>>,
}

type Attempt = Arc<OnceCell<Result<Vec<Snapshot>>>>;

impl VertexCache {
    fn bit(output: usize) -> u64 {
        1 << output.min(63)
    }

    /// Takes note that somebody may ask for an output.
    pub(crate) fn mark_used(&self, output: usize) {
        self.used.fetch_or(Self::bit(output), Ordering::AcqRel);
    }

    fn uses(&self, output: usize) -> bool {
        self.used.load(Ordering::Acquire) & Self::bit(output) != 0
    }

    /// Returns the cell of an attempt, counted from 0.
    pub(super) fn attempt(&self, number: usize) -> Attempt {
        let mut attempts = lock(&self.attempts);
        while attempts.len() <= number {
            attempts.push(Arc::default());
        }
        attempts[number].clone()
    }
}

/// Layers that are to be fetched from one cache.
type Wanted = (Arc<ImportedCache>, Vec<(LayerId, Arc<ImportedLayer>)>);

impl Job {
    /// Has the build look into a cache from now on.
    pub fn add_cache(&self, cache: ImportedCache) {
        lock(&self.0.imports.caches).push(Arc::new(cache));
    }

    /// Finds results from before whose layers can be had. Outputs that nobody asked for need not be known.
    pub(super) fn recall(
        &self,
        vertex: &Vertex,
        key: &ResultKey,
        outputs: usize,
    ) -> Result<Option<Vec<Snapshot>>> {
        let mut found = vec![];
        for output in 0..outputs {
            let key = output_key(key, output);
            found.push(match self.recall_output(&key)? {
                Some(result) => result.snapshot,
                None if vertex.cache.uses(output) => return Ok(None),
                None => Snapshot { layers: vec![UNKNOWN] },
            });
        }
        Ok(Some(found))
    }

    fn recall_output(&self, key: &ResultKey) -> Result<Option<StepResult>> {
        if let Some(result) = self.store().result(key)?
            && self.can_be_had(&result.snapshot)?
        {
            return Ok(Some(result));
        }
        for cache in self.0.imports.useful() {
            let Some((layers, created)) = cache.result(key) else { continue };
            let mut snapshot = Snapshot::default();
            for layer in layers {
                let ImportedLayer { diff_id, created, description, .. } = &*layer;
                let id = self.store().layer_by_diff_id(diff_id, *created, description)?;
                snapshot.layers.push(id);
                let mut offers = lock(&self.0.imports.offers);
                let known = offers.entry(id).or_default();
                if !known.iter().any(|offer| Arc::ptr_eq(&offer.cache, &cache)) {
                    known.push(Offer { cache: cache.clone(), layer });
                }
            }
            if self.can_be_had(&snapshot)? {
                let result = StepResult { snapshot, created };
                let description = format!("step of the cache {}", cache.source().name());
                self.store().remember(key, &result, &description)?;
                return Ok(Some(result));
            }
        }
        Ok(None)
    }

    fn can_be_had(&self, snapshot: &Snapshot) -> Result<bool> {
        for layer in &snapshot.layers {
            let offered = || self.0.imports.offers(*layer).is_some_and(|offers| !offers.is_empty());
            if !offered() && !self.is_at_hand(*layer)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Finds what the definition of a file operation is another name of. What leads to a result is preferred.
    pub(super) fn known_alias(
        &self,
        vertex: &Vertex,
        definition: &ResultKey,
    ) -> Result<Option<ResultKey>> {
        let here = self.store().alias(definition)?;
        let caches = self.0.imports.useful();
        let elsewhere = caches.iter().filter_map(|cache| cache.alias(definition));
        let mut best = None;
        for target in here.into_iter().chain(elsewhere) {
            best = best.or(Some(target));
            if caches.is_empty() || self.recall_output(&output_key(&target, 0))?.is_some() {
                best = Some(target);
                break;
            }
        }
        if let Some(target) = best {
            if here != best {
                self.store().remember_alias(definition, &target)?;
            }
            *lock(&vertex.cache.alias) = Some((*definition, target));
        }
        Ok(best)
    }

    /// Remembers what the definition of a file operation turned out to stand for.
    pub(super) fn remember_alias(
        &self,
        vertex: &Vertex,
        definition: &ResultKey,
        target: &ResultKey,
    ) -> Result<()> {
        *lock(&vertex.cache.alias) = Some((*definition, *target));
        Ok(self.store().remember_alias(definition, target)?)
    }

    /// Whether results that a cache had are of no use any more, because layers could not be fetched, or because an output
    /// is asked for now that is not known. The step has to run then.
    pub(super) fn is_lost(&self, vertex: &Vertex, results: &[Snapshot]) -> Result<bool> {
        for (output, snapshot) in results.iter().enumerate() {
            let unknown = snapshot.layers.contains(&UNKNOWN);
            if vertex.cache.uses(output) && (unknown || self.has_lost(snapshot)?) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Has a step that was shown as cached shown anew when it runs after all, and so those below it that nobody needed
    /// until then.
    pub(super) fn show_again(&self, vertex: &Arc<Vertex>) {
        vertex.announced.store(false, Ordering::Relaxed);
        let mut todo: Vec<&Arc<Vertex>> = vertex.inputs.iter().map(|edge| &edge.vertex).collect();
        while let Some(below) = todo.pop() {
            let waiting = below.results.get().is_none() && !is_local(&below.op);
            if waiting && below.announced.swap(false, Ordering::Relaxed) {
                todo.extend(below.inputs.iter().map(|edge| &edge.vertex));
            }
        }
    }

    fn has_lost(&self, snapshot: &Snapshot) -> Result<bool> {
        if !self.0.imports.any_lost.load(Ordering::Acquire) {
            return Ok(false);
        }
        for layer in &snapshot.layers {
            let lost = self.0.imports.offers(*layer).is_some_and(|offers| offers.is_empty());
            if lost && !self.is_at_hand(*layer)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns the file system that an edge stands for, with all of its layers here. Where a cache promised layers that it
    /// does not have, the steps run instead.
    ///
    /// # Errors
    /// The first failure of a step it needs.
    pub async fn obtain(&self, edge: &Edge) -> Result<Snapshot> {
        loop {
            let snapshot = self.solve(edge).await?;
            match self.provide(&snapshot).await {
                Err(_) if self.has_lost(&snapshot)? => {}
                provided => return provided.map(|()| snapshot),
            }
        }
    }

    /// Returns the file systems of all inputs of a step, with all of their layers here.
    pub(super) async fn obtain_inputs(&self, vertex: &Arc<Vertex>) -> Result<Vec<Snapshot>> {
        loop {
            let inputs = self.input_results(vertex).await?;
            let provided = try_join_all(inputs.iter().map(|input| self.provide(input))).await;
            let Err(error) = provided else { return Ok(inputs) };
            let lost =
                inputs.iter().map(|input| self.has_lost(input)).collect::<Result<Vec<_>>>()?;
            if !lost.contains(&true) {
                return Err(error);
            }
        }
    }

    /// Fetches those layers of a snapshot that are not here and that a cache has.
    pub(super) async fn provide_imported(&self, snapshot: &Snapshot) -> Result<()> {
        if lock(&self.0.imports.offers).is_empty() {
            return Ok(());
        }
        loop {
            let wanted = self.wanted(snapshot)?;
            if wanted.is_empty() {
                return Ok(());
            }
            try_join_all(wanted.into_iter().map(|wanted| self.fetch_imported(wanted))).await?;
        }
    }

    /// Decides which cache each layer is to be fetched from.
    fn wanted(&self, snapshot: &Snapshot) -> Result<Vec<Wanted>> {
        let mut all: Vec<Wanted> = vec![];
        let mut seen = HashSet::new();
        for layer in &snapshot.layers {
            let Some(offers) = self.0.imports.offers(*layer) else { continue };
            if !seen.insert(*layer) || self.is_at_hand(*layer)? {
                continue;
            }
            let Some(Offer { cache, layer: known }) = offers.into_iter().next() else {
                let cause = "a layer that a cache was to have cannot be fetched from it";
                return Err(Cause::Missing(cause.into()).into());
            };
            match all.iter_mut().find(|(of, _)| Arc::ptr_eq(of, &cache)) {
                Some((_, layers)) => layers.push((*layer, known)),
                None => all.push((cache, vec![(*layer, known)])),
            }
        }
        Ok(all)
    }

    /// Fetches layers from a cache; one that fails is not asked again, which is no error.
    async fn fetch_imported(&self, (cache, layers): Wanted) -> Result<()> {
        let _turn = cache.turn.lock().await;
        // Another step may have fetched them while this one waited, or found out that the cache is of no use.
        let mut missing = vec![];
        for (layer, known) in layers {
            if !self.store().obtainable(layer)? {
                missing.push((layer, known));
            }
        }
        if missing.is_empty() || cache.is_lost() {
            return Ok(());
        }
        let source = cache.source();
        let name: Arc<str> = format!("pulling layers of the cache {}", source.name()).into();
        let blobs: Vec<String> =
            missing.iter().map(|(_, known)| known.descriptor.digest.to_string()).collect();
        let id = Digest::of(format!("{name} {}", blobs.join(" ")).as_bytes());
        let announced = Announced::begin(&*self.0.progress, &id, name);
        let fetched = join_all(
            missing
                .iter()
                .map(|(layer, known)| self.fetch_imported_layer(&id, &cache, *layer, known)),
        );
        let fetched = fetched.await;
        let fetched: std::result::Result<(), Error> = fetched.into_iter().collect();
        announced.finish(&fetched);
        let Err(error) = fetched else { return Ok(()) };
        if error.kind() == ErrorKind::NoSpace {
            return Err(error.into());
        }
        self.0.imports.any_lost.store(true, Ordering::Release);
        if cache.lose() {
            let short = format!("the cache {} is not used any more: {error}", source.name());
            let warning = Warning { vertex: Some(id), level: 1, short, ..Warning::default() };
            self.0.progress.send(ProgressEvent::Warning { warning: Arc::new(warning) });
        }
        Ok(())
    }

    async fn fetch_imported_layer(
        &self,
        vertex: &Digest,
        cache: &ImportedCache,
        layer: LayerId,
        known: &ImportedLayer,
    ) -> std::result::Result<(), Error> {
        let descriptor = &known.descriptor;
        let report = self.blob_report(vertex, descriptor);
        report(0, false);
        let progress = |current: u64| report(current, false);
        cache.source().fetch(self.store(), descriptor, &progress).await?;
        // Only what was seen to hold the layer counts: nobody vouches for what a cache says.
        let (store, claimed) = (self.store().clone(), descriptor.clone());
        blocking::run(move || store.adopt_layer_blob(layer, &claimed)).await?;
        report(descriptor.size, true);
        Ok(())
    }

    /// Tells the blob of a layer that is not here, where a cache has it.
    ///
    /// # Errors
    /// When the database fails.
    pub fn offered(&self, layer: LayerId) -> Result<Option<(Descriptor, Digest)>> {
        let offer = self.0.imports.offers(layer).and_then(|offers| offers.into_iter().next());
        match offer {
            Some(Offer { layer: known, .. }) if !self.store().obtainable(layer)? => {
                Ok(Some((known.descriptor.clone(), known.diff_id.clone())))
            }
            _ => Ok(None),
        }
    }

    /// Tells what is known of the steps that results came out of. `all` are the results of every step; otherwise those that
    /// consist of nothing but layers of the results themselves.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn records(&self, edges: &[Edge], all: bool) -> Result<CacheRecords> {
        let mut own: HashSet<LayerId> = HashSet::new();
        for edge in edges {
            own.extend(self.solve(edge).await?.layers);
        }
        let mut records = CacheRecords::default();
        let mut todo: Vec<Arc<Vertex>> = edges.iter().map(|edge| edge.vertex.clone()).collect();
        let mut seen = HashSet::new();
        while let Some(vertex) = todo.pop() {
            if !seen.insert(Arc::as_ptr(&vertex)) {
                continue;
            }
            todo.extend(vertex.inputs().map(|edge| edge.vertex.clone()));
            if let Some(Ok(nested)) = vertex.nested.get() {
                todo.push(nested.vertex.clone());
            }
            if let Some((definition, target)) = *lock(&vertex.cache.alias) {
                records.aliases.insert(definition, target);
            }
            // What ran on something else than its key says is nothing for others.
            if is_local(&vertex.op) || is_image(&vertex) || vertex.unkept.load(Ordering::Relaxed) {
                continue;
            }
            let Some(key) = known_key(&vertex) else { continue };
            for output in 0..output_count(&vertex.op) {
                let key = output_key(&key, output);
                let Some(result) = self.recall_output(&key)? else { continue };
                if all || result.snapshot.layers.iter().all(|layer| own.contains(layer)) {
                    records.results.insert(key, result);
                }
            }
        }
        records.results = nonempty(records.results);
        Ok(records)
    }
}

/// The empty file system is known without a cache.
fn nonempty(results: BTreeMap<ResultKey, StepResult>) -> BTreeMap<ResultKey, StepResult> {
    results.into_iter().filter(|(_, result)| !result.snapshot.layers.is_empty()).collect()
}

fn is_image(vertex: &Vertex) -> bool {
    use slipway_spec::llb::pb::op::Op;
    matches!(&vertex.op, Op::Source(source) if is_layered(source))
}

/// Returns the key of a vertex where solving has come across it.
fn known_key(vertex: &Vertex) -> Option<ResultKey> {
    match vertex.key.get() {
        Some(key) => key.clone().ok(),
        None => vertex.quick_key.get()?.clone().ok()?,
    }
}
