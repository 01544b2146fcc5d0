//! One build: vertices on their way to results.

mod exec_key;
mod nested;
mod outside;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::future::{join_all, try_join_all};
use sha2::{Digest as _, Sha256};
use slipway_spec::llb::{Definition, pb};
use slipway_spec::progress::{ProgressEvent, ProgressSink};
use slipway_spec::{Digest, ImageReference, Platform};
use slipway_store::result::{ResultKey, StepResult};
use slipway_store::snapshot::{LayerId, Snapshot};
use slipway_store::tree::Tree;
use slipway_store::tree::scan::Scan;
use slipway_store::view::View;
use slipway_store::{Store, blocking, transfer};
use tokio::sync::Semaphore;

use crate::client::{LocalFiles, LocalRequest, Services};
use crate::deep::Deep;
use crate::error::{Cause, Result, SolveError};
use crate::executor::Executor;
use crate::graph::{self, Edge, Vertex, Vertices, encode};
use crate::operation::{diff, exec, file};
use crate::source::image::{Images, Lookup, RemoteLayer, ResolvedImage};
use crate::source::{is_layered, layout};

/// What all builds of a process share.
#[derive(Clone)]
pub struct Worker {
    /// Where results are.
    pub store: Store,
    /// Where images come from.
    pub images: Images,
    /// What runs processes.
    pub executor: Arc<dyn Executor>,
    /// How many processes may run at once.
    pub parallel: Arc<Semaphore>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("store", &self.store).finish_non_exhaustive()
    }
}

/// One build. Cheap to clone; dropping the futures it returned stops the work they did.
#[derive(Clone, Debug)]
pub struct Job(Arc<Inner>);

struct Inner {
    worker: Worker,
    client: Arc<dyn LocalFiles>,
    services: Services,
    progress: Arc<dyn ProgressSink>,
    vertices: Mutex<Vertices>,
    /// Cache mounts that were emptied in this build.
    reset: Mutex<BTreeSet<String>>,
    /// Where to fetch layers that are not in the store.
    remote: Mutex<HashMap<LayerId, RemoteLayer>>,
    /// Folders of the client, scanned once per way they are asked for.
    locals: tokio::sync::Mutex<HashMap<LocalRequest, Arc<Scan>>>,
    /// One lock per image that is being fetched.
    pulls: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// The time of what the build makes, in nanoseconds since 1970, where it is not to be the present.
    time: Option<i64>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("client", &self.client).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says that a vertex was given up, unless it ended in another way.
struct Announced<'a> {
    progress: &'a dyn ProgressSink,
    vertex: &'a Digest,
    ended: bool,
}

impl Announced<'_> {
    fn end(mut self, event: ProgressEvent) {
        self.ended = true;
        self.progress.send(event);
    }
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.progress.send(ProgressEvent::Canceled { vertex: self.vertex.clone() });
        }
    }
}

impl Job {
    /// Starts a build.
    pub fn new(
        worker: Worker,
        client: Arc<dyn LocalFiles>,
        progress: Arc<dyn ProgressSink>,
    ) -> Self {
        Self::at(worker, client, progress, None)
    }

    /// Starts a build that dates the folders it makes at `time`, in nanoseconds since 1970.
    pub fn at(
        worker: Worker,
        client: Arc<dyn LocalFiles>,
        progress: Arc<dyn ProgressSink>,
        time: Option<i64>,
    ) -> Self {
        Self::with(worker, client, progress, time, Services::default())
    }

    /// Starts a build that may use more of its client than folders.
    pub fn with(
        worker: Worker,
        client: Arc<dyn LocalFiles>,
        progress: Arc<dyn ProgressSink>,
        time: Option<i64>,
        services: Services,
    ) -> Self {
        Self(Arc::new(Inner {
            worker,
            client,
            services,
            progress,
            vertices: Mutex::default(),
            reset: Mutex::default(),
            remote: Mutex::default(),
            locals: tokio::sync::Mutex::default(),
            pulls: Mutex::default(),
            time,
        }))
    }

    /// Returns what this build shares with others.
    pub fn worker(&self) -> &Worker {
        &self.0.worker
    }

    /// Loads a definition without solving it.
    ///
    /// # Errors
    /// When the definition is not well formed.
    pub fn load(&self, definition: &Definition) -> Result<Edge> {
        graph::load(definition, &mut lock(&self.0.vertices), self.0.services.entitlements, 0)
    }

    /// Returns the file system that an edge stands for, executing what must be.
    ///
    /// # Errors
    /// The first failure of a step it needs.
    pub async fn solve(&self, edge: &Edge) -> Result<Snapshot> {
        let results = self.results(&edge.vertex).await?;
        results.get(edge.index).cloned().ok_or_else(|| {
            Cause::Invalid(format!("{} has no output {}", edge.vertex.name, edge.index)).into()
        })
    }

    /// Reads a small file of a result; `None` when there is none.
    ///
    /// # Errors
    /// When the result cannot be had or the file is larger than `limit` bytes.
    pub async fn read_file(&self, edge: &Edge, path: &str, limit: u64) -> Result<Option<Bytes>> {
        if let Some(request) = local_request(&edge.vertex.op)? {
            // Several files are read of one folder, which is one step to whoever looks on.
            let first = !edge.vertex.announced.load(Ordering::Relaxed);
            let announced = first.then(|| self.start(&edge.vertex));
            let read = self.0.client.read(&request.name, path).await.map_err(SolveError::from);
            return match announced {
                Some(announced) => self.end(&edge.vertex, announced, read),
                None => read,
            };
        }
        let snapshot = self.solve(edge).await?;
        self.provide(&snapshot).await?;
        let (store, path) = (self.store().clone(), path.to_owned());
        Ok(blocking::run(move || store.view(&snapshot.layers)?.read(path.as_bytes(), limit))
            .await?
            .map(Bytes::from))
    }

    fn store(&self) -> &Store {
        &self.0.worker.store
    }

    fn key<'a>(&'a self, vertex: &'a Arc<Vertex>) -> Deep<'a, Result<ResultKey>> {
        let compute =
            || async { self.compute_key(vertex).await.map_err(|error| self.blame(vertex, error)) };
        Deep::new(async move { vertex.key.get_or_init(compute).await.clone() })
    }

    fn quick_key<'a>(&'a self, vertex: &'a Arc<Vertex>) -> Deep<'a, Result<Option<ResultKey>>> {
        let compute = || async {
            self.compute_quick_key(vertex).await.map_err(|error| self.blame(vertex, error))
        };
        Deep::new(async move { vertex.quick_key.get_or_init(compute).await.clone() })
    }

    /// Finds the key without executing anything: `None` when a step below must run first, because its content is part
    /// of the key and was never seen.
    async fn compute_quick_key(&self, vertex: &Arc<Vertex>) -> Result<Option<ResultKey>> {
        let key = match &vertex.op {
            pb::op::Op::Source(source) if source.identifier.starts_with("local://") => {
                let mut hash = tagged(b"local");
                hash.update(self.local(vertex).await?.digest());
                ResultKey(hash.finalize().into())
            }
            pb::op::Op::Source(source) if !is_layered(source) => {
                self.outside_key(vertex, source).await?
            }
            pb::op::Op::Source(source) => {
                let (_, diff_ids) = self.image(vertex, source).await?;
                let mut hash = tagged(b"layers");
                for diff_id in diff_ids {
                    hash.update(diff_id.to_string());
                }
                ResultKey(hash.finalize().into())
            }
            pb::op::Op::File(op) => return self.quick_file_key(vertex, op).await,
            // Only the definition tells, which the step below has yet to give.
            pb::op::Op::Build(_) => return Ok(None),
            pb::op::Op::Exec(op) => {
                let inputs = try_join_all((0..vertex.inputs.len()).map(|at| async move {
                    match self.content_input_key(vertex, op, at).await? {
                        Some(key) => Ok(Some(key)),
                        None => self.quick_key(&vertex.inputs[at].vertex).await,
                    }
                }))
                .await?;
                match inputs.into_iter().collect::<Option<Vec<_>>>() {
                    Some(inputs) => definition_key(vertex, &inputs),
                    None => return Ok(None),
                }
            }
            pb::op::Op::Merge(_) | pb::op::Op::Diff(_) | pb::op::Op::Passthrough(_) => {
                let inputs =
                    try_join_all(vertex.inputs.iter().map(|edge| self.quick_key(&edge.vertex)))
                        .await?;
                match inputs.into_iter().collect::<Option<Vec<_>>>() {
                    Some(inputs) => definition_key(vertex, &inputs),
                    None => return Ok(None),
                }
            }
        };
        Ok(Some(key))
    }

    async fn compute_key(&self, vertex: &Arc<Vertex>) -> Result<ResultKey> {
        if let Some(key) = self.quick_key(vertex).await? {
            return Ok(key);
        }
        match &vertex.op {
            pb::op::Op::File(op) => self.file_key(vertex, op).await,
            pb::op::Op::Build(op) => self.build_key(vertex, op).await,
            pb::op::Op::Exec(op) => {
                let inputs = try_join_all((0..vertex.inputs.len()).map(|at| async move {
                    match self.content_input_key(vertex, op, at).await? {
                        Some(key) => Ok(key),
                        None => self.key(&vertex.inputs[at].vertex).await,
                    }
                }))
                .await?;
                Ok(definition_key(vertex, &inputs))
            }
            _ => {
                let inputs =
                    try_join_all(vertex.inputs.iter().map(|edge| self.key(&edge.vertex))).await?;
                Ok(definition_key(vertex, &inputs))
            }
        }
    }

    /// A file operation is identified by what it does, what it does it to, and the content it reads. The content of a
    /// step's result is known only once the step has run, so the step's key is kept as another name of it.
    async fn quick_file_key(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::FileOp,
    ) -> Result<Option<ResultKey>> {
        let reads = FileReads::of(vertex, op);
        let bases =
            try_join_all(reads.bases.iter().map(|at| self.quick_key(&vertex.inputs[*at].vertex)))
                .await?;
        let Some(bases) = bases.into_iter().collect::<Option<Vec<_>>>() else { return Ok(None) };
        let Some(definition) = self.file_definition(vertex, op, &reads, &bases).await? else {
            return Ok(None);
        };
        if !reads.certain() && vertex.fresh {
            return Ok(None);
        }
        let known = self.store().alias(&definition)?;
        if known.is_some() || !reads.certain() {
            return Ok(known);
        }
        let key = self.file_content(vertex, op, &reads, &bases).await?;
        self.store().remember_alias(&definition, &key)?;
        Ok(Some(key))
    }

    /// Finds the key by executing what is read; what is read and what it is copied onto are solved at the same time.
    async fn file_key(&self, vertex: &Arc<Vertex>, op: &pb::FileOp) -> Result<ResultKey> {
        let reads = FileReads::of(vertex, op);
        let bases = try_join_all(reads.bases.iter().map(|at| self.key(&vertex.inputs[*at].vertex)));
        let sources =
            try_join_all(reads.copies.iter().map(|(_, at)| self.view(&vertex.inputs[*at])));
        let (bases, _) = futures::try_join!(bases, sources)?;
        let key = self.file_content(vertex, op, &reads, &bases).await?;
        if let Some(definition) = self.file_definition(vertex, op, &reads, &bases).await? {
            self.store().remember_alias(&definition, &key)?;
        }
        Ok(key)
    }

    /// The name of a file operation by the keys of what it reads; `None` while one of them is not known.
    async fn file_definition(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::FileOp,
        reads: &FileReads<'_>,
        bases: &[ResultKey],
    ) -> Result<Option<ResultKey>> {
        let mut hash = reads.start(vertex, op, bases);
        hash.update(b"definition");
        for (_, at) in &reads.copies {
            let edge = &vertex.inputs[*at];
            if is_local(&edge.vertex.op) {
                // Where the client has it all as it was, what each copy reads of it need not be looked at.
                hash.update(self.local(&edge.vertex).await?.digest());
            } else {
                let known = match edge.vertex.key.get() {
                    Some(key) => Some(key.clone()?),
                    None => self.quick_key(&edge.vertex).await?,
                };
                let Some(key) = known else { return Ok(None) };
                hash.update(output_key(&key, edge.index).0);
            }
        }
        Ok(Some(ResultKey(hash.finalize().into())))
    }

    /// The name of a file operation by the content of what it reads.
    async fn file_content(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::FileOp,
        reads: &FileReads<'_>,
        bases: &[ResultKey],
    ) -> Result<ResultKey> {
        let mut hash = reads.start(vertex, op, bases);
        hash.update(b"content");
        for (copy, at) in &reads.copies {
            hash.update(self.read_digest(vertex, copy, &vertex.inputs[*at]).await?);
        }
        Ok(ResultKey(hash.finalize().into()))
    }

    async fn read_digest(
        &self,
        vertex: &Arc<Vertex>,
        copy: &pb::FileActionCopy,
        edge: &Edge,
    ) -> Result<[u8; 32]> {
        let view = self.view(edge).await?;
        let copy = copy.clone();
        blocking::run(move || Ok(file::source_digest(&copy, &view)))
            .await?
            .map_err(|error| error.at(|| vertex.failed()))
    }

    /// Opens an edge for reading, whatever it is.
    async fn view(&self, edge: &Edge) -> Result<Arc<View>> {
        if is_local(&edge.vertex.op) {
            return self.local_view(&edge.vertex).await;
        }
        let snapshot = self.solve(edge).await?;
        self.provide(&snapshot).await?;
        let store = self.store().clone();
        Ok(blocking::run(move || Ok(Arc::new(store.view(&snapshot.layers)?))).await?)
    }

    async fn local_view(&self, vertex: &Arc<Vertex>) -> Result<Arc<View>> {
        let scan = self.local(vertex).await?;
        Ok(blocking::run(move || Ok(Arc::new(View::of_tree(scan.tree()?)))).await?)
    }

    async fn local(&self, vertex: &Arc<Vertex>) -> Result<Arc<Scan>> {
        let request = local_request(&vertex.op)?.ok_or_else(|| {
            SolveError::from(Cause::Invalid(format!("{} is not a local source", vertex.name)))
        })?;
        let mut locals = self.0.locals.lock().await;
        if let Some(scan) = locals.get(&request) {
            return Ok(scan.clone());
        }
        let announced = self.start(vertex);
        let scanned = self.0.client.scan(&request).await;
        let scan = Arc::new(self.end(vertex, announced, scanned.map_err(SolveError::from))?);
        locals.insert(request, scan.clone());
        Ok(scan)
    }

    async fn image(
        &self,
        vertex: &Arc<Vertex>,
        source: &pb::SourceOp,
    ) -> Result<(Snapshot, Vec<Digest>)> {
        vertex.image.get_or_init(|| self.find_image(vertex, source)).await.clone()
    }

    async fn find_image(
        &self,
        vertex: &Arc<Vertex>,
        source: &pb::SourceOp,
    ) -> Result<(Snapshot, Vec<Digest>)> {
        let failed = |cause: Cause| SolveError::from(cause).at(|| vertex.failed());
        if source.identifier.starts_with("oci-layout://") {
            let image = self.layout(vertex, source).await;
            let image = image.map_err(|error| error.at(|| vertex.failed()))?;
            return Ok((image.snapshot.clone(), image.diff_ids.clone()));
        }
        let Some(name) = source.identifier.strip_prefix("docker-image://") else {
            return Err(failed(Cause::Unsupported(format!("the source {}", source.identifier))));
        };
        let reference: ImageReference =
            name.parse().map_err(|error: slipway_spec::ReferenceError| {
                failed(Cause::Invalid(error.to_string()))
            })?;
        let platform = vertex.platform.clone().unwrap_or_else(Platform::host);
        let lookup = match source.attrs.get("image.resolvemode").map(String::as_str) {
            Some("pull") if reference.digest().is_none() => Lookup::Registry,
            Some("local") => Lookup::StoreOnly,
            _ => Lookup::StoreFirst,
        };
        let found = self.image_snapshot(&reference, &platform, lookup).await;
        let (image, mut snapshot) = found.map_err(|error| error.at(|| vertex.failed()))?;
        if let Some(wanted) = source.attrs.get("image.checksum").filter(|text| !text.is_empty())
            && *wanted != image.target.digest.to_string()
        {
            return Err(failed(Cause::Invalid(format!(
                "image {reference}: expected checksum {wanted}, got {}",
                image.target.digest
            ))));
        }
        let mut diff_ids = image.parsed.rootfs.diff_ids.clone();
        if let Some(limit) = layout::layer_limit(source, "image.layerlimit")? {
            snapshot.layers.truncate(limit);
            diff_ids.truncate(limit);
        }
        Ok((snapshot, diff_ids))
    }

    /// Finds an image and its file system; layers that are not here are fetched by [`provide`](Self::provide).
    ///
    /// # Errors
    /// When there is no such image.
    pub async fn image_snapshot(
        &self,
        reference: &ImageReference,
        platform: &Platform,
        lookup: Lookup,
    ) -> Result<(Arc<ResolvedImage>, Snapshot)> {
        let images = &self.0.worker.images;
        let image = Arc::new(images.resolve(reference, platform, lookup).await?);
        let (snapshot, remote) = images.layers(reference, &image).await?;
        lock(&self.0.remote).extend(remote.into_iter().map(|layer| (layer.layer, layer)));
        Ok((image, snapshot))
    }

    /// Fetches those layers of a snapshot that are not here in any form.
    ///
    /// # Errors
    /// When a registry fails.
    pub async fn provide(&self, snapshot: &Snapshot) -> Result<()> {
        let wanted: Vec<RemoteLayer> = {
            let remote = lock(&self.0.remote);
            snapshot.layers.iter().filter_map(|layer| remote.get(layer).cloned()).collect()
        };
        let mut images: BTreeMap<String, Vec<RemoteLayer>> = BTreeMap::new();
        for layer in self.missing(wanted)? {
            images.entry(layer.reference.to_string()).or_default().push(layer);
        }
        try_join_all(images.into_iter().map(|(reference, layers)| self.pull(reference, layers)))
            .await
            .map(drop)
    }

    fn missing(&self, wanted: Vec<RemoteLayer>) -> Result<Vec<RemoteLayer>> {
        let mut missing = vec![];
        for layer in wanted {
            if !self.store().obtainable(layer.layer)? {
                missing.push(layer);
            }
        }
        Ok(missing)
    }

    async fn pull(&self, reference: String, layers: Vec<RemoteLayer>) -> Result<()> {
        let name: Arc<str> = format!("pulling {reference}").into();
        let turn = lock(&self.0.pulls).entry(reference).or_default().clone();
        let _turn = turn.lock().await;
        // Another step may have fetched them while this one waited.
        let missing = self.missing(layers)?;
        if missing.is_empty() {
            return Ok(());
        }
        // The platforms of an image have different layers and are different work.
        let blobs: Vec<String> =
            missing.iter().map(|layer| layer.descriptor.digest.to_string()).collect();
        let id = Digest::of(format!("{name} {}", blobs.join(" ")).as_bytes());
        self.0.progress.send(ProgressEvent::Started { vertex: id.clone(), name });
        let announced = Announced { progress: &*self.0.progress, vertex: &id, ended: false };
        let fetched = try_join_all(missing.iter().map(|layer| self.fetch(&id, layer))).await;
        announced.end(match &fetched {
            Ok(_) => ProgressEvent::Done { vertex: id.clone() },
            Err(error) => {
                ProgressEvent::Failed { vertex: id.clone(), error: error.to_string().into() }
            }
        });
        fetched.map(drop)
    }

    async fn fetch(&self, vertex: &Digest, layer: &RemoteLayer) -> Result<()> {
        let (total, id): (u64, Arc<str>) =
            (layer.descriptor.size, layer.descriptor.digest.to_string().into());
        let progress = self.0.progress.clone();
        let report = |current: u64, done: bool| {
            progress.send(ProgressEvent::Status {
                vertex: vertex.clone(),
                id: id.clone(),
                current,
                total,
                done,
            });
        };
        report(0, false);
        let registry = self.0.worker.images.registry();
        transfer::fetch_blob(
            self.store(),
            registry,
            &layer.reference,
            &layer.descriptor,
            &|current| {
                report(current, false);
            },
        )
        .await?;
        let (store, layer) = (self.store().clone(), layer.clone());
        blocking::run(move || store.record_layer_blob(layer.layer, &layer.descriptor, None))
            .await?;
        report(total, true);
        Ok(())
    }

    fn results<'a>(&'a self, vertex: &'a Arc<Vertex>) -> Deep<'a, Result<Vec<Snapshot>>> {
        let compute = || async {
            self.compute_results(vertex).await.map_err(|error| self.blame(vertex, error))
        };
        Deep::new(async move { vertex.results.get_or_init(compute).await.clone() })
    }

    /// Says that an error is this vertex's own unless one below is to blame, and shows it where nothing was shown yet.
    fn blame(&self, vertex: &Vertex, error: SolveError) -> SolveError {
        let error = error.at(|| vertex.failed());
        let own = error.vertex.as_ref().is_some_and(|failed| failed.digest == vertex.digest);
        if own && !vertex.announced.swap(true, Ordering::Relaxed) {
            let (digest, name) = (vertex.digest.clone(), vertex.name.clone());
            self.0.progress.send(ProgressEvent::Started { vertex: digest.clone(), name });
            self.0
                .progress
                .send(ProgressEvent::Failed { vertex: digest, error: error.to_string().into() });
        }
        error
    }

    async fn compute_results(&self, vertex: &Arc<Vertex>) -> Result<Vec<Snapshot>> {
        match &vertex.op {
            pb::op::Op::Source(source) if source.identifier.starts_with("local://") => {
                let scan = self.local(vertex).await?;
                let (store, name) = (self.store().clone(), vertex.name.clone());
                let adopt = move || store.adopt_tree(Tree::clone(&*scan.tree()?), &name);
                let layer = blocking::run(adopt).await?;
                return Ok(vec![Snapshot { layers: vec![layer] }]);
            }
            pb::op::Op::Source(source) if !is_layered(source) => {
                return self.outside_results(vertex, source).await;
            }
            pb::op::Op::Source(source) => {
                let announced = self.start(vertex);
                let image = match self.image(vertex, source).await {
                    Ok((snapshot, _)) => {
                        self.provide_layout(vertex, source).await.map(|()| vec![snapshot])
                    }
                    Err(error) => Err(error),
                };
                return self.end(vertex, announced, image);
            }
            pb::op::Op::Build(op) => return self.build_results(vertex, op).await,
            pb::op::Op::Passthrough(op) => return self.passthrough(vertex, op).await,
            pb::op::Op::Merge(op) => {
                let parts = self.input_results(vertex).await?;
                let announced = self.start(vertex);
                return self.end(vertex, announced, merge(op, &parts));
            }
            pb::op::Op::Diff(op) => {
                let parts = self.input_results(vertex).await?;
                if let Some(snapshot) = tail(op, &parts) {
                    let announced = self.start(vertex);
                    return self.end(vertex, announced, Ok(vec![snapshot]));
                }
            }
            _ => {}
        }
        let key = self.key(vertex).await?;
        if !vertex.fresh
            && let Some(results) = self.recall(&key, output_count(&vertex.op))?
        {
            self.announce_cached(vertex);
            return Ok(results);
        }
        let inputs = self.input_results(vertex).await?;
        try_join_all(inputs.iter().map(|input| self.provide(input))).await?;
        let keyed = !vertex.inputs.iter().any(|edge| edge.vertex.unkept.load(Ordering::Relaxed));
        let keep = keyed && self.is_as_keyed(vertex, &key).await?;
        vertex.unkept.store(!keep, Ordering::Relaxed);
        // Waiting for a place is not yet work on the step.
        let _place = match &vertex.op {
            pb::op::Op::Exec(_) => self.0.worker.parallel.acquire().await.ok(),
            _ => None,
        };
        let announced = self.start(vertex);
        let done = self.execute(vertex, inputs).await;
        let results = self.end(vertex, announced, done)?;
        if keep {
            self.remember(vertex, &key, &results)?;
        }
        Ok(results)
    }

    /// Whether what a file operation is about to read is what its key says. A key that was known before anything ran
    /// names the content of an earlier run; a step that had to run again may have given something else.
    async fn is_as_keyed(&self, vertex: &Arc<Vertex>, key: &ResultKey) -> Result<bool> {
        let pb::op::Op::File(op) = &vertex.op else { return Ok(true) };
        let reads = FileReads::of(vertex, op);
        if reads.certain() || !matches!(vertex.quick_key.get(), Some(Ok(Some(_)))) {
            return Ok(true);
        }
        let bases =
            try_join_all(reads.bases.iter().map(|at| self.key(&vertex.inputs[*at].vertex))).await?;
        let content = self.file_content(vertex, op, &reads, &bases).await?;
        if content == *key {
            return Ok(true);
        }
        if let Some(definition) = self.file_definition(vertex, op, &reads, &bases).await? {
            self.store().remember_alias(&definition, &content)?;
        }
        Ok(false)
    }

    /// Returns the file systems of all inputs; for a local source that is a layer nobody may need, so file operations
    /// read it as a view instead, unless they change it.
    async fn input_results(&self, vertex: &Arc<Vertex>) -> Result<Vec<Snapshot>> {
        let bases = match &vertex.op {
            pb::op::Op::File(op) => Some(FileReads::of(vertex, op).bases),
            _ => None,
        };
        let bases = bases.as_ref();
        try_join_all(vertex.inputs.iter().enumerate().map(|(at, edge)| async move {
            let read_only = bases.is_some_and(|bases| !bases.contains(&at));
            if read_only && is_local(&edge.vertex.op) {
                Ok(Snapshot::default())
            } else {
                self.solve(edge).await
            }
        }))
        .await
    }

    async fn execute(&self, vertex: &Arc<Vertex>, inputs: Vec<Snapshot>) -> Result<Vec<Snapshot>> {
        match &vertex.op {
            pb::op::Op::Exec(op) => {
                self.reset_caches(vertex, op).await?;
                let keys = self.exec_bases(vertex).await?;
                let step = exec::Step {
                    worker: &self.0.worker,
                    services: &self.0.services,
                    progress: &self.0.progress,
                    vertex,
                    inputs: &inputs,
                    keys: &keys,
                };
                exec::run(&step, op).await
            }
            pb::op::Op::Diff(op) => {
                let (lower, upper) = sides(op, &inputs);
                let (store, name) = (self.store().clone(), vertex.name.clone());
                let made = blocking::run(move || diff::between(&store, &lower, &upper, &name));
                Ok(vec![made.await?])
            }
            pb::op::Op::File(op) => {
                let locals = join_all(vertex.inputs.iter().map(|edge| async move {
                    if is_local(&edge.vertex.op) {
                        self.local_view(&edge.vertex).await.map(Some)
                    } else {
                        Ok(None)
                    }
                }))
                .await
                .into_iter()
                .collect::<Result<Vec<_>>>()?;
                let (store, op, name) = (self.store().clone(), op.clone(), vertex.name.clone());
                let now = self.0.time.unwrap_or_else(now);
                blocking::run(move || {
                    Ok(crate::operation::apply_file_op(&store, &op, &inputs, locals, &name, now))
                })
                .await?
            }
            _ => Err(Cause::Unsupported("this kind of build step".into()).into()),
        }
    }

    /// Finds results from before whose layers can still be had. A few look-ups in the database take less time than
    /// having another thread make them.
    fn recall(&self, key: &ResultKey, outputs: usize) -> Result<Option<Vec<Snapshot>>> {
        let store = self.store();
        let mut found = vec![];
        for output in 0..outputs {
            let Some(StepResult { snapshot, .. }) = store.result(&output_key(key, output))? else {
                return Ok(None);
            };
            for layer in &snapshot.layers {
                if !lock(&self.0.remote).contains_key(layer) && !store.obtainable(*layer)? {
                    return Ok(None);
                }
            }
            found.push(snapshot);
        }
        Ok(Some(found))
    }

    fn remember(&self, vertex: &Vertex, key: &ResultKey, results: &[Snapshot]) -> Result<()> {
        for (output, snapshot) in results.iter().enumerate() {
            let result = StepResult { snapshot: snapshot.clone(), created: now() };
            self.store().remember(&output_key(key, output), &result, &vertex.name)?;
        }
        Ok(())
    }

    fn start<'a>(&'a self, vertex: &'a Vertex) -> Announced<'a> {
        vertex.announced.store(true, Ordering::Relaxed);
        self.0.progress.send(ProgressEvent::Started {
            vertex: vertex.digest.clone(),
            name: vertex.name.clone(),
        });
        Announced { progress: &*self.0.progress, vertex: &vertex.digest, ended: false }
    }

    #[expect(clippy::unused_self, reason = "the counterpart of start")]
    fn end<T>(&self, vertex: &Vertex, announced: Announced<'_>, result: Result<T>) -> Result<T> {
        let vertex_digest = vertex.digest.clone();
        match result {
            Ok(value) => {
                announced.end(ProgressEvent::Done { vertex: vertex_digest });
                Ok(value)
            }
            Err(error) => {
                announced.end(ProgressEvent::Failed {
                    vertex: vertex_digest,
                    error: error.to_string().into(),
                });
                Err(error.at(|| vertex.failed()))
            }
        }
    }

    /// A result from before stands for everything that led to it.
    fn announce_cached(&self, vertex: &Arc<Vertex>) {
        let mut todo = vec![vertex.clone()];
        let mut order = vec![];
        while let Some(vertex) = todo.pop() {
            if !vertex.announced.swap(true, Ordering::Relaxed) {
                todo.extend(vertex.inputs.iter().map(|edge| edge.vertex.clone()));
                order.push(vertex);
            }
        }
        for vertex in order.into_iter().rev() {
            self.0.progress.send(ProgressEvent::Cached {
                vertex: vertex.digest.clone(),
                name: vertex.name.clone(),
            });
        }
    }
}

/// Nanoseconds since 1970 now.
pub(crate) fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// Keys of different kinds of steps never meet; the number is raised when what a kind of step does changes.
pub(crate) fn tagged(kind: &[u8]) -> Sha256 {
    let mut hash = Sha256::new();
    hash.update(b"slipway 1 ");
    hash.update(kind);
    hash.update([0]);
    hash
}

/// The key of a step that is identified by what it does and the keys of its inputs.
fn definition_key(vertex: &Vertex, inputs: &[ResultKey]) -> ResultKey {
    let (tag, op): (&[u8], Vec<u8>) = match &vertex.op {
        pb::op::Op::Exec(op) => {
            let op = exec::keyed(op);
            let platform = vertex.platform.clone().unwrap_or_else(Platform::host).to_string();
            (b"exec", [platform.as_bytes(), &[0], &encode(&op)].concat())
        }
        pb::op::Op::Merge(op) => (b"merge", encode(op)),
        pb::op::Op::Diff(op) => (b"diff", encode(op)),
        pb::op::Op::File(op) => (b"file", encode(op)),
        pb::op::Op::Source(op) => (b"source", encode(op)),
        pb::op::Op::Build(op) => (b"build", encode(op)),
        pb::op::Op::Passthrough(op) => (b"passthrough", encode(op)),
    };
    let mut hash = tagged(tag);
    hash.update((op.len() as u64).to_le_bytes());
    hash.update(op);
    for (key, edge) in inputs.iter().zip(&vertex.inputs) {
        hash.update(output_key(key, edge.index).0);
    }
    ResultKey(hash.finalize().into())
}

/// A merge may stack this many layers. More is not a file system but an attempt to exhaust memory: merging a merge with
/// itself doubles the layers each time.
const MAX_LAYERS: usize = 10_000;

/// Lays file systems over each other.
fn merge(op: &pb::MergeOp, parts: &[Snapshot]) -> Result<Vec<Snapshot>> {
    let mut layers = vec![];
    for part in op.inputs.iter().filter_map(|input| parts.get(usize::try_from(input.input).ok()?)) {
        if layers.len() + part.layers.len() > MAX_LAYERS {
            return Err(Cause::Invalid(format!("a merge of more than {MAX_LAYERS} layers")).into());
        }
        layers.extend_from_slice(&part.layers);
    }
    Ok(vec![Snapshot { layers }])
}

/// Returns the two file systems that a difference is between.
fn sides(op: &pb::DiffOp, parts: &[Snapshot]) -> (Snapshot, Snapshot) {
    let side = |input: Option<i64>| -> Snapshot {
        input
            .and_then(|i| usize::try_from(i).ok())
            .and_then(|i| parts.get(i).cloned())
            .unwrap_or_default()
    };
    (side(op.lower.as_ref().map(|side| side.input)), side(op.upper.as_ref().map(|side| side.input)))
}

/// Takes what one file system has on top of another, where it was made on top of it.
fn tail(op: &pb::DiffOp, parts: &[Snapshot]) -> Option<Snapshot> {
    let (lower, upper) = sides(op, parts);
    let rest = upper.layers.strip_prefix(lower.layers.as_slice())?;
    Some(Snapshot { layers: rest.to_vec() })
}

/// Which inputs a file operation changes and which it only reads.
struct FileReads<'a> {
    bases: Vec<usize>,
    /// Copies with the input they read.
    copies: Vec<(&'a pb::FileActionCopy, usize)>,
    all_local: bool,
}

impl<'a> FileReads<'a> {
    fn of(vertex: &Vertex, op: &'a pb::FileOp) -> Self {
        let count = vertex.inputs.len();
        let input = |index: i64| usize::try_from(index).ok().filter(|index| *index < count);
        // Owners are looked up in whatever the definition says; as a rule that is what is changed.
        let accounts = op.actions.iter().flat_map(file::accounts);
        let bases = op.actions.iter().map(|action| action.input).chain(accounts).filter_map(input);
        let bases: BTreeSet<usize> = bases.collect();
        let copies: Vec<_> = op
            .actions
            .iter()
            .filter_map(|action| {
                let Some(pb::file_action::Action::Copy(copy)) = &action.action else { return None };
                let at = input(action.secondary_input).filter(|at| !bases.contains(at))?;
                Some((copy, at))
            })
            .collect();
        let all_local = copies.iter().all(|(_, at)| is_local(&vertex.inputs[*at].vertex.op));
        Self { bases: bases.into_iter().collect(), copies, all_local }
    }

    /// Whether the content of everything that is read is known without executing anything.
    fn certain(&self) -> bool {
        self.all_local
    }

    fn start(&self, vertex: &Vertex, op: &pb::FileOp, bases: &[ResultKey]) -> Sha256 {
        let mut hash = tagged(b"file");
        let encoded = encode(op);
        hash.update((encoded.len() as u64).to_le_bytes());
        hash.update(&encoded);
        for (at, key) in self.bases.iter().zip(bases) {
            hash.update((*at as u64).to_le_bytes());
            hash.update(output_key(key, vertex.inputs[*at].index).0);
        }
        hash
    }
}

fn output_key(key: &ResultKey, output: usize) -> ResultKey {
    let mut hash = tagged(b"output");
    hash.update(key.0);
    hash.update((output as u64).to_le_bytes());
    ResultKey(hash.finalize().into())
}

fn output_count(op: &pb::op::Op) -> usize {
    let highest = match op {
        pb::op::Op::Exec(exec) => exec.mounts.iter().map(|mount| mount.output).max(),
        pb::op::Op::File(file) => file.actions.iter().map(|action| action.output).max(),
        _ => None,
    };
    highest.and_then(|output| usize::try_from(output.saturating_add(1)).ok()).unwrap_or(0).max(1)
}

fn is_local(op: &pb::op::Op) -> bool {
    matches!(op, pb::op::Op::Source(source) if source.identifier.starts_with("local://"))
}

fn local_request(op: &pb::op::Op) -> Result<Option<LocalRequest>> {
    let pb::op::Op::Source(source) = op else { return Ok(None) };
    let Some(name) = source.identifier.strip_prefix("local://") else { return Ok(None) };
    let list = |key: &str| -> Result<Option<Vec<String>>> {
        source
            .attrs
            .get(key)
            .map(|json| {
                serde_json::from_str(json).map_err(|error| {
                    Cause::Invalid(format!("local source {name:?}: {key}: {error}")).into()
                })
            })
            .transpose()
    };
    Ok(Some(LocalRequest {
        name: name.to_owned(),
        follow_paths: list("local.followpaths")?,
        include: list("local.includepattern")?.unwrap_or_default(),
        exclude: list("local.excludepatterns")?.unwrap_or_default(),
    }))
}
