//! One build under way, for callers who drive it step by step: they load graphs, look into results, ask about images, and
//! say in the end what is to be made of which results.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;
use futures::future::try_join_all;
use slipway_exporter::{Attestation, PlatformResult};
use slipway_frontend::{
    Bridge as _, BridgeError, FrontendRequest, FrontendResult, ResolveMode, ResolvedImage,
    dockerfile,
};
use slipway_solver::graph::Edge;
use slipway_solver::policy::Policy;
use slipway_solver::source::image::Images;
use slipway_solver::source::metadata::{MetadataRequest, SourceMetadata};
use slipway_solver::{Job, LocalFiles, Services, SolveError, Worker};
use slipway_spec::llb::Definition;
use slipway_spec::progress::ProgressSink;
use slipway_spec::{ImageReference, Platform};
use slipway_store::registry::{Credentials, Registry};
use slipway_store::snapshot::Snapshot;
use slipway_store::view::View;
use slipway_store::{blocking, now_nanos};
use tokio::sync::OnceCell;

use crate::Engine;
use crate::bridge::JobBridge;
use crate::cache::{CacheEntry, CacheFolders};
use crate::error::BuildError;
use crate::frontends::FrontendRunner;
use crate::provenance::{Asked, Invocation, Scope};

/// Whom a build is for.
#[derive(Clone, Debug)]
pub struct BuildClient {
    /// The folders the build may read.
    pub files: Arc<dyn LocalFiles>,
    /// What it may use beside them.
    pub services: Services,
    /// How registries know the client; `None` is how they know the engine.
    pub credentials: Option<Arc<dyn Credentials>>,
    /// The time of what the build makes, in seconds since 1970, where it is not to be the present.
    pub epoch: Option<i64>,
    /// Runs frontends that are images; `None` is what the engine has for that.
    pub frontends: Option<Arc<dyn FrontendRunner>>,
    /// The folders that caches are in.
    pub caches: Arc<dyn CacheFolders>,
    /// What the whole build is asked.
    pub asked: Asked,
    /// What the build is called where it is told of.
    pub id: String,
}

/// A build under way. Cheap to clone; what nobody waits for any more is not done.
#[derive(Clone)]
pub struct Build(Arc<Inner>);

struct Inner {
    engine: Engine,
    job: Job,
    bridge: JobBridge,
    progress: Arc<dyn ProgressSink>,
    epoch: Option<i64>,
    caches: Arc<dyn CacheFolders>,
    /// The caches that it looks into, or tried to.
    imported: Mutex<BTreeMap<CacheEntry, Arc<OnceCell<()>>>>,
    scope: Arc<Scope>,
    invocation: Invocation,
}

impl fmt::Debug for Build {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Build").field("job", &self.0.job).finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts a build.
    ///
    /// # Errors
    /// When the registry client cannot be made.
    pub fn begin(
        &self,
        client: BuildClient,
        progress: Arc<dyn ProgressSink>,
    ) -> Result<Build, BuildError> {
        let mut engine = self.clone();
        if let Some(credentials) = client.credentials {
            engine.registry = Registry::new(self.settings.clone(), credentials.clone())?;
            engine.credentials = credentials;
            let images = Images::new(self.store().clone(), engine.registry.clone());
            engine.worker = Worker { images, ..self.worker.clone() };
        }
        let time = client.epoch.map(|seconds| seconds.saturating_mul(1_000_000_000));
        let worker = engine.worker.clone();
        let job = Job::with(worker, client.files, progress.clone(), time, client.services);
        let scope = Scope::of_build(client.asked, self.producers.clone());
        let bridge = JobBridge::new(job.clone(), progress.clone(), scope.clone());
        let environment = self.provenance_environment.clone();
        let invocation = Invocation { id: client.id, began: now_nanos(), environment };
        let frontends = client.frontends.or_else(|| self.frontends.clone());
        Ok(Build(Arc::new_cyclic(|build| {
            let bridge = bridge.with_frontends(frontends, WeakBuild(build.clone()));
            let (epoch, caches) = (client.epoch, client.caches);
            let imported = Mutex::default();
            Inner { engine, job, bridge, progress, epoch, caches, imported, scope, invocation }
        })))
    }
}

/// A build that others keep.
#[derive(Clone)]
pub(crate) struct WeakBuild(Weak<Inner>);

impl WeakBuild {
    pub(crate) fn upgrade(&self) -> Option<Build> {
        self.0.upgrade().map(Build)
    }
}

impl Build {
    /// Has a Dockerfile read, and returns what it asks for. Nothing is solved but what it takes to read it. `inputs` are
    /// graphs that stand for folders of these names, `depth` is how many frontends wait for the answer, and `within` is what
    /// was asked by who asks. The results belong into the scope that is returned.
    ///
    /// # Errors
    /// When something is wrong with the Dockerfile or its base images.
    pub async fn dockerfile(
        &self,
        attrs: BTreeMap<String, String>,
        inputs: BTreeMap<String, Definition>,
        depth: usize,
        within: &Scope,
    ) -> Result<(FrontendResult, Arc<Scope>), BuildError> {
        let scope = within.within(Asked::new("dockerfile.v0", &attrs, &inputs));
        let bridge = self.0.bridge.nested(inputs, depth, scope.clone());
        let request = FrontendRequest { attrs, build_platform: Platform::host() };
        let found = dockerfile::build(&request, &bridge).await?;
        // What is answered instead of a build needs no caches.
        if !found.images.is_empty() {
            self.import_caches(found.cache_imports.iter().cloned().map(CacheEntry::from)).await;
        }
        Ok((found, scope))
    }

    /// Returns what is noted of who asked for what.
    pub fn scope(&self) -> &Arc<Scope> {
        &self.0.scope
    }

    /// Returns what the build is called.
    pub(crate) fn invocation(&self) -> &Invocation {
        &self.0.invocation
    }

    /// Returns what answers a frontend's questions.
    pub(crate) fn bridge(&self) -> &JobBridge {
        &self.0.bridge
    }

    /// Returns the cell that says whether a cache was read.
    pub(crate) fn imported(&self, cache: &CacheEntry) -> Arc<OnceCell<()>> {
        let mut imported = self.0.imported.lock().unwrap_or_else(PoisonError::into_inner);
        imported.entry(cache.clone()).or_default().clone()
    }

    /// Returns the folders of the client that caches are in.
    pub(crate) fn cache_folders(&self) -> &Arc<dyn CacheFolders> {
        &self.0.caches
    }

    /// Returns what solves.
    pub(crate) fn job(&self) -> &Job {
        &self.0.job
    }

    /// Loads a graph without solving it.
    ///
    /// # Errors
    /// When it is not well formed, or asks for what is not allowed.
    pub async fn load(&self, definition: &Definition) -> Result<Edge, SolveError> {
        self.0.job.load(definition).await
    }

    /// As [`load`](Self::load), under further policies about sources.
    ///
    /// # Errors
    /// As there.
    pub async fn load_under(
        &self,
        definition: &Definition,
        policies: &[Policy],
    ) -> Result<Edge, SolveError> {
        self.0.job.load_under(definition, policies).await
    }

    /// Returns the file system that an edge stands for.
    ///
    /// # Errors
    /// The first failure of a step it needs.
    pub async fn solve(&self, edge: &Edge) -> Result<Snapshot, SolveError> {
        self.0.job.solve(edge).await
    }

    /// Returns the file system that an edge stands for, with all of its layers here.
    ///
    /// # Errors
    /// The first failure of a step it needs.
    pub async fn obtain(&self, edge: &Edge) -> Result<Snapshot, SolveError> {
        self.0.job.obtain(edge).await
    }

    /// Reads a small file of a result; `None` when there is none.
    ///
    /// # Errors
    /// When the result cannot be had, or the file is larger than `limit` bytes.
    pub async fn read_file(
        &self,
        edge: &Edge,
        path: &str,
        limit: u64,
    ) -> Result<Option<Bytes>, SolveError> {
        self.0.job.read_file(edge, path, limit).await
    }

    /// Opens a result for reading.
    ///
    /// # Errors
    /// When the result cannot be had.
    pub async fn view(&self, edge: &Edge) -> Result<View, SolveError> {
        let snapshot = self.obtain(edge).await?;
        let store = self.0.engine.store().clone();
        Ok(blocking::run(move || store.view(&snapshot.layers)).await?)
    }

    /// Finds what an image name points at.
    ///
    /// # Errors
    /// When there is no such image, or not for the platform.
    pub async fn resolve_image(
        &self,
        image: &ImageReference,
        platform: &Platform,
        mode: ResolveMode,
    ) -> Result<ResolvedImage, BridgeError> {
        self.0.bridge.resolve_image(image, platform, mode).await
    }

    /// Finds out about a source after policies decided about it; they may make another one of it.
    ///
    /// # Errors
    /// When a policy denies the source, or there is none.
    pub async fn source_metadata(
        &self,
        request: &mut MetadataRequest,
        policies: &[Policy],
    ) -> Result<SourceMetadata, SolveError> {
        self.0.bridge.metadata(request, policies).await
    }

    /// Returns what the build tells its caller with.
    pub fn progress(&self) -> &Arc<dyn ProgressSink> {
        &self.0.progress
    }

    /// Returns the engine as this build's client sees it.
    pub fn engine(&self) -> &Engine {
        &self.0.engine
    }

    /// Has everything that results consist of, wherever it has to come from.
    ///
    /// # Errors
    /// When a registry fails.
    pub async fn provide(&self, results: &[PlatformResult]) -> Result<(), BuildError> {
        let snapshots = results.iter().flat_map(|result| {
            // What is said of a result may be said anywhere.
            let said = result.attestations.iter().filter_map(Attestation::snapshot);
            std::iter::once(&result.snapshot).chain(said)
        });
        try_join_all(snapshots.map(|snapshot| self.0.job.provide(snapshot))).await?;
        Ok(())
    }

    /// Returns the time of what the build makes, in seconds since 1970, where it is not to be the present.
    pub fn epoch(&self) -> Option<i64> {
        self.0.epoch
    }

    /// Makes what the build left on the disk survive a power cut.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn settle(&self) -> Result<(), BuildError> {
        let store = self.0.engine.store().clone();
        Ok(blocking::run(move || store.sync_layers()).await?)
    }
}
