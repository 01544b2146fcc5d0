//! One build under way, for callers who drive it step by step: they load graphs, look into results, ask about images, and
//! say in the end what is to be made of which results.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::try_join_all;
use slipway_exporter::PlatformResult;
use slipway_frontend::{
    Bridge as _, BridgeError, FrontendRequest, FrontendResult, ResolveMode, ResolvedImage,
    dockerfile,
};
use slipway_solver::graph::Edge;
use slipway_solver::source::image::Images;
use slipway_solver::{Job, LocalFiles, Services, SolveError, Worker};
use slipway_spec::llb::Definition;
use slipway_spec::progress::ProgressSink;
use slipway_spec::{ImageReference, Platform};
use slipway_store::blocking;
use slipway_store::registry::{Credentials, Registry};
use slipway_store::snapshot::Snapshot;
use slipway_store::view::View;

use crate::Engine;
use crate::bridge::JobBridge;
use crate::error::BuildError;

/// Whom a build is for.
#[derive(Clone, Debug)]
pub struct BuildClient {
    /// The folders the build may read.
    pub files: Arc<dyn LocalFiles>,
    /// What it may use beside them.
    pub services: Services,
    /// How registries know the client; `None` is how they know the engine.
    pub credentials: Option<Arc<dyn Credentials>>,
    /// Graphs that stand for folders of these names.
    pub inputs: BTreeMap<String, Definition>,
    /// The time of what the build makes, in seconds since 1970, where it is not to be the present.
    pub epoch: Option<i64>,
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
        let bridge = JobBridge::new(job.clone(), progress.clone()).with_inputs(client.inputs);
        Ok(Build(Arc::new(Inner { engine, job, bridge, progress, epoch: client.epoch })))
    }
}

impl Build {
    /// Has the Dockerfile read, and returns what it asks for. Nothing is solved but what it takes to read it.
    ///
    /// # Errors
    /// When something is wrong with the Dockerfile or its base images.
    pub async fn dockerfile(
        &self,
        attrs: BTreeMap<String, String>,
    ) -> Result<FrontendResult, BuildError> {
        let request = FrontendRequest { attrs, build_platform: Platform::host() };
        Ok(dockerfile::build(&request, &self.0.bridge).await?)
    }

    /// Loads a graph without solving it.
    ///
    /// # Errors
    /// When it is not well formed, or asks for what is not allowed.
    pub fn load(&self, definition: &Definition) -> Result<Edge, SolveError> {
        self.0.job.load(definition)
    }

    /// Returns the file system that an edge stands for.
    ///
    /// # Errors
    /// The first failure of a step it needs.
    pub async fn solve(&self, edge: &Edge) -> Result<Snapshot, SolveError> {
        self.0.job.solve(edge).await
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
        let snapshot = self.solve(edge).await?;
        self.0.job.provide(&snapshot).await?;
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
        try_join_all(results.iter().map(|result| self.0.job.provide(&result.snapshot))).await?;
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
