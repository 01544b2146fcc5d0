//! What a frontend may ask, answered by one job.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use slipway_frontend::{
    Bridge, BridgeError, BridgeErrorKind, BridgeRef, Diagnostic, Feature, ResolveMode,
    ResolvedImage,
};
use slipway_solver::graph::Edge;
use slipway_solver::source::image::{Lookup, is_missing};
use slipway_solver::{Cause, Job, SolveError};
use slipway_spec::llb::Definition;
use slipway_spec::progress::{ProgressEvent, ProgressSink};
use slipway_spec::{Digest, ImageReference, Platform};
use slipway_store::registry::RegistryErrorKind;
use tokio::sync::OnceCell;

/// Files that a frontend reads may have this many bytes.
const MAX_FILE: u64 = 32 * 1024 * 1024;

/// A job as a frontend sees it.
pub(crate) struct JobBridge {
    job: Job,
    progress: Arc<dyn ProgressSink>,
    edges: Mutex<Vec<Edge>>,
    images: Mutex<HashMap<(String, Platform), Question>>,
    inputs: BTreeMap<String, Definition>,
}

/// What was found out about an image, or why nothing was.
type Answer = Result<ResolvedImage, (BridgeErrorKind, String)>;

/// A question that whoever asks first has answered for all.
type Question = Arc<OnceCell<Answer>>;

/// Says that a question was given up, unless it was answered.
struct Asked<'a> {
    progress: &'a dyn ProgressSink,
    vertex: Digest,
    answered: bool,
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.progress.send(ProgressEvent::Canceled { vertex: self.vertex.clone() });
        }
    }
}

impl JobBridge {
    pub(crate) fn new(job: Job, progress: Arc<dyn ProgressSink>) -> Self {
        let inputs = BTreeMap::new();
        Self { job, progress, edges: Mutex::default(), images: Mutex::default(), inputs }
    }

    /// Gives the frontend graphs that stand for folders.
    pub(crate) fn with_inputs(mut self, inputs: BTreeMap<String, Definition>) -> Self {
        self.inputs = inputs;
        self
    }

    async fn ask(&self, image: &ImageReference, platform: &Platform, lookup: Lookup) -> Answer {
        let name: Arc<str> = format!("[internal] load metadata for {image}").into();
        let vertex = Digest::of(format!("{name} {platform}").as_bytes());
        self.progress.send(ProgressEvent::Started { vertex: vertex.clone(), name });
        let mut asked =
            Asked { progress: &*self.progress, vertex: vertex.clone(), answered: false };
        let found = self.job.worker().images.resolve(image, platform, lookup).await;
        asked.answered = true;
        self.progress.send(match &found {
            Ok(_) => ProgressEvent::Done { vertex },
            Err(error) => ProgressEvent::Failed { vertex, error: error.to_string().into() },
        });
        match found {
            Ok(found) => Ok(ResolvedImage { digest: found.target.digest, config: found.config }),
            Err(error) => {
                let error = to_bridge_error(error);
                Err((error.kind, error.message))
            }
        }
    }
}

fn to_bridge_error(error: SolveError) -> BridgeError {
    let kind = match &*error.cause {
        _ if is_missing(&error) => BridgeErrorKind::NotFound,
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
    BridgeError::new(kind, error.to_string())
}

#[async_trait]
impl Bridge for JobBridge {
    async fn resolve_image(
        &self,
        image: &ImageReference,
        platform: &Platform,
        mode: ResolveMode,
    ) -> Result<ResolvedImage, BridgeError> {
        let key = (image.to_string(), platform.clone());
        // Stages that ask for the same image at once ask the registry once; different images are asked for at once.
        let answer = self
            .images
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(key)
            .or_default()
            .clone();
        let lookup = match mode {
            ResolveMode::Default => Lookup::StoreFirst,
            ResolveMode::Pull => Lookup::Registry,
            ResolveMode::Local => Lookup::StoreOnly,
        };
        let answer = answer.get_or_init(|| self.ask(image, platform, lookup)).await.clone();
        answer.map_err(|(kind, message)| BridgeError::new(kind, message))
    }

    async fn solve(&self, definition: Definition) -> Result<BridgeRef, BridgeError> {
        let edge = self.job.load(&definition).map_err(to_bridge_error)?;
        let mut edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner);
        edges.push(edge);
        Ok(BridgeRef(edges.len() as u64 - 1))
    }

    async fn read_file(&self, from: &BridgeRef, path: &str) -> Result<Option<Bytes>, BridgeError> {
        let edge = {
            let edges = self.edges.lock().unwrap_or_else(PoisonError::into_inner);
            usize::try_from(from.0).ok().and_then(|at| edges.get(at).cloned())
        };
        let edge =
            edge.ok_or_else(|| BridgeError::new(BridgeErrorKind::NotFound, "no such result"))?;
        self.job.read_file(&edge, path, MAX_FILE).await.map_err(to_bridge_error)
    }

    fn supports(&self, feature: Feature) -> bool {
        match feature {
            Feature::Merge => true,
            // Nothing runs scanners yet.
            Feature::Sbom => false,
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
