//! What a frontend may ask, answered by one job.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use slipway_frontend::{
    Bridge, BridgeError, BridgeErrorKind, BridgeRef, Diagnostic, Feature, FrontendImage,
    FrontendResult, LayoutImage, ResolveMode, ResolvedImage, SourceMetadata as SourceAge,
};
use slipway_solver::graph::Edge;
use slipway_solver::policy::Policy;
use slipway_solver::source::image::{Lookup, is_missing};
use slipway_solver::source::metadata::{MetadataRequest, SourceMetadata};
use slipway_solver::{Cause, Job, SolveError};
use slipway_spec::llb::{Definition, pb};
use slipway_spec::progress::{ProgressEvent, ProgressSink};
use slipway_spec::{ImageReference, Platform, ReferenceError};
use slipway_store::registry::RegistryErrorKind;
use tokio::sync::OnceCell;

use crate::build::WeakBuild;
use crate::frontends::{FrontendRunner, MAX_DEPTH, too_deep};
use crate::provenance::Scope;

/// Files that a frontend reads may have this many bytes.
const MAX_FILE: u64 = 32 * 1024 * 1024;

/// A job as a frontend sees it.
pub(crate) struct JobBridge {
    job: Job,
    progress: Arc<dyn ProgressSink>,
    scope: Arc<Scope>,
    edges: Mutex<Vec<Edge>>,
    images: Mutex<HashMap<(String, Platform), Question>>,
    inputs: BTreeMap<String, Definition>,
    /// Runs frontends that are images, for the build that this is the bridge of.
    frontends: Option<(Arc<dyn FrontendRunner>, WeakBuild)>,
    /// How many frontends wait for this one.
    depth: usize,
}

/// A question that whoever asks first has answered for all.
type Question = Arc<OnceCell<Result<SourceMetadata, SolveError>>>;

impl JobBridge {
    pub(crate) fn new(job: Job, progress: Arc<dyn ProgressSink>, scope: Arc<Scope>) -> Self {
        Self {
            job,
            progress,
            scope,
            edges: Mutex::default(),
            images: Mutex::default(),
            inputs: BTreeMap::new(),
            frontends: None,
            depth: 0,
        }
    }

    /// Lets frontends have others do their work.
    pub(crate) fn with_frontends(
        mut self,
        runner: Option<Arc<dyn FrontendRunner>>,
        build: WeakBuild,
    ) -> Self {
        self.frontends = runner.map(|runner| (runner, build));
        self
    }

    /// Makes one for a frontend that is asked something. `inputs` are graphs that stand for folders.
    pub(crate) fn nested(
        &self,
        inputs: BTreeMap<String, Definition>,
        depth: usize,
        scope: Arc<Scope>,
    ) -> Self {
        let bridge = Self::new(self.job.clone(), self.progress.clone(), scope);
        Self { frontends: self.frontends.clone(), depth, inputs, ..bridge }
    }

    /// Finds out about a source after policies decided about it, which may make another one of it. What an image is, is
    /// found out once; different ones are asked for at once.
    ///
    /// # Errors
    /// When a policy denies the source, or there is none.
    pub(crate) async fn metadata(
        &self,
        request: &mut MetadataRequest,
        policies: &[Policy],
    ) -> Result<SourceMetadata, SolveError> {
        let platform = request.platform.as_ref().map(pb::Platform::from);
        self.job.admit_source(&mut request.source, platform.as_ref(), policies).await?;
        if !request.source.identifier.starts_with("docker-image://") {
            return self.job.metadata(request).await;
        }
        let key = (
            request.source.identifier.clone(),
            request.platform.clone().unwrap_or_else(Platform::host),
        );
        let question = {
            let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
            images.entry(key).or_default().clone()
        };
        question.get_or_init(|| self.job.metadata(request)).await.clone()
    }

    /// Finds out about an image that something may be made from.
    async fn noted(&self, request: &mut MetadataRequest) -> Result<SourceMetadata, BridgeError> {
        let found = self.metadata(request, &[]).await.map_err(to_bridge_error)?;
        self.scope.add_metadata(request, &found);
        Ok(found)
    }

    fn edge(&self, from: &BridgeRef) -> Result<Edge, BridgeError> {
        let edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner);
        let edge = usize::try_from(from.0).ok().and_then(|at| edges.get(at).cloned());
        edge.ok_or_else(|| BridgeError::new(BridgeErrorKind::NotFound, "no such result"))
    }
}

/// Writes an image as a source.
fn image_source(image: &ImageReference) -> pb::SourceOp {
    pb::SourceOp { identifier: format!("docker-image://{image}"), ..pb::SourceOp::default() }
}

fn to_bridge_error(error: SolveError) -> BridgeError {
    let kind = match &*error.cause {
        _ if is_missing(&error) => BridgeErrorKind::NotFound,
        // The client has no such folder.
        Cause::Store(store) if store.kind() == slipway_store::ErrorKind::NotFound => {
            BridgeErrorKind::NotFound
        }
        Cause::Registry(registry)
            if matches!(
                registry.kind(),
                RegistryErrorKind::Unauthorized | RegistryErrorKind::Denied
            ) =>
        {
            BridgeErrorKind::Unauthorized
        }
        _ => BridgeErrorKind::Other,
    };
    BridgeError::new(kind, error.to_string()).with_source(error)
}

#[async_trait]
impl Bridge for JobBridge {
    async fn resolve_image(
        &self,
        image: &ImageReference,
        platform: &Platform,
        mode: ResolveMode,
    ) -> Result<ResolvedImage, BridgeError> {
        let mut request = MetadataRequest::new(image_source(image));
        request.shown_as = format!("[internal] load metadata for {image}");
        request.platform = Some(platform.clone());
        request.lookup = match mode {
            ResolveMode::Default | ResolveMode::Local => Lookup::StoreFirst,
            ResolveMode::Pull => Lookup::Registry,
        };
        let asked = image_source(image).identifier;
        let found = self.noted(&mut request).await?;
        let identifier = request.source.identifier.as_str();
        let reference = match identifier.strip_prefix("docker-image://") {
            _ if identifier == asked => Ok(None),
            Some(name) => name.parse().map(Some),
            None => return Err(BridgeError::not_an_image(asked, identifier)),
        };
        let reference = reference.map_err(|error: ReferenceError| {
            BridgeError::new(BridgeErrorKind::Other, error.to_string())
        })?;
        let found = found.image.ok_or_else(|| {
            BridgeError::new(BridgeErrorKind::Other, format!("{identifier} is no image"))
        })?;
        Ok(ResolvedImage { reference, digest: found.digest, config: found.config })
    }

    async fn resolve_layout(
        &self,
        image: &LayoutImage,
        platform: &Platform,
    ) -> Result<ResolvedImage, BridgeError> {
        let mut request = MetadataRequest::new(image.source());
        request.shown_as = format!("[internal] load metadata for {}", image.reference);
        request.platform = Some(platform.clone());
        let found = self.noted(&mut request).await?;
        let found = found.image.ok_or_else(|| {
            let message = format!("{} is no image", request.source.identifier);
            BridgeError::new(BridgeErrorKind::Other, message)
        })?;
        Ok(ResolvedImage { reference: None, digest: found.digest, config: found.config })
    }

    async fn resolve_source(
        &self,
        source: &pb::SourceOp,
        shown_as: &str,
    ) -> Result<SourceAge, BridgeError> {
        let mut request = MetadataRequest::new(source.clone());
        request.shown_as = shown_as.to_owned();
        request.git_objects = true;
        let found = self.metadata(&mut request, &[]).await.map_err(to_bridge_error)?;
        Ok(SourceAge {
            commit: found.git.and_then(|git| git.commit_object),
            last_modified: found.http.and_then(|http| http.last_modified),
        })
    }

    async fn youngest_file(
        &self,
        from: &BridgeRef,
        archive: &str,
    ) -> Result<Option<i64>, BridgeError> {
        let edge = self.edge(from)?;
        self.job.youngest_file(&edge, archive).await.map_err(to_bridge_error)
    }

    async fn read_start(
        &self,
        from: &BridgeRef,
        path: &str,
        length: usize,
    ) -> Result<Option<Bytes>, BridgeError> {
        let edge = self.edge(from)?;
        self.job.read_start(&edge, path, length as u64).await.map_err(to_bridge_error)
    }

    async fn solve(&self, definition: Definition) -> Result<BridgeRef, BridgeError> {
        let edge = self.job.load(&definition).await.map_err(to_bridge_error)?;
        self.scope.add_result(&edge);
        let mut edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner);
        edges.push(edge);
        Ok(BridgeRef(edges.len() as u64 - 1))
    }

    async fn read_file(&self, from: &BridgeRef, path: &str) -> Result<Option<Bytes>, BridgeError> {
        let edge = self.edge(from)?;
        self.job.read_file(&edge, path, MAX_FILE).await.map_err(to_bridge_error)
    }

    async fn run_frontend(&self, image: FrontendImage) -> Result<FrontendResult, BridgeError> {
        let build = self.frontends.as_ref().and_then(|(_, build)| build.upgrade());
        let (Some((runner, _)), Some(build)) = (&self.frontends, build) else {
            let what = format!("the frontend image {:?}", image.source);
            return Err(BridgeError::unsupported(what));
        };
        if self.depth >= MAX_DEPTH {
            return Err(too_deep());
        }
        runner.run(&build, image, self.depth + 1, &self.scope).await
    }

    fn supports(&self, feature: Feature) -> bool {
        match feature {
            Feature::Merge | Feature::Sbom => true,
        }
    }

    async fn inputs(&self) -> Result<BTreeMap<String, Definition>, BridgeError> {
        Ok(self.inputs.clone())
    }

    fn warn(&self, warning: Diagnostic) {
        let warning = Arc::new(warning.to_warning());
        self.progress.send(ProgressEvent::Warning { warning });
    }
}
