//! Frontends that are images: each runs in a sandbox, and its standard streams are a connection on which it asks what any
//! frontend asks.
//!
//! A frontend ends by saying what the result is, or what went wrong. What it says on standard error is shown to the user.
//! One that speaks something else, or ends without a word, fails the build; one that nobody waits for any more is killed.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::json;
use slipway_engine::Build;
use slipway_engine::frontend::{
    BridgeError, BridgeErrorKind, FrontendImage, FrontendResult, PlatformImage,
};
use slipway_engine::frontends::{FrontendProcess, FrontendRunner, MAX_DEPTH};
use slipway_engine::provenance::{Asked, Scope};
use slipway_engine::solver::executor::StreamReader;
use slipway_spec::llb::{Definition, pb};
use slipway_spec::progress::{ProgressEvent, ProgressSink, Stream};
use slipway_spec::wire::MESSAGE_BYTES;
use slipway_spec::wire::gateway::llb_bridge_server::LlbBridgeServer;
use slipway_spec::wire::health::health_server::HealthServer;
use slipway_spec::{Digest, ImageReference, Platform};
use slipway_transport::health::Alive;
use tokio::io::{AsyncRead, AsyncReadExt as _, ReadBuf};
use tonic::{Code, Status};

use super::service::GatewayService;
use super::{Gateway, Outcome};
use crate::failure::{frontend_status, solve_status, unsupported_capability};
use crate::record::Record;
use crate::router::Router;
use crate::worker::WorkerInfo;

/// How long a frontend may take to end after it has closed its standard output, or said what the result is.
const PATIENCE: Duration = Duration::from_secs(10);

/// How much of what a frontend says is repeated where it fails, in bytes.
const LAST_WORDS: usize = 2000;

/// The first bytes of what a frontend sends, if it speaks HTTP/2.
const PREFACE: &[u8] = b"PRI * HTTP/2.0";

/// What frontends see as the product that builds; many know no other.
const PRODUCT: &str = "buildkit";

/// Lists what a frontend can do that its image does not say of older ones.
const CAPABILITIES: &str = "moby.buildkit.frontend.caps";

/// Runs frontends that are images.
#[derive(Clone, Debug)]
pub struct FrontendImages {
    worker: WorkerInfo,
    /// Whether there are any.
    enabled: bool,
    /// Repositories that frontends may come from, without tags; none is any.
    allowed: Arc<[String]>,
    /// What a build told of its progress, and its client's session.
    client: Option<(Arc<Record>, String)>,
}

impl FrontendImages {
    /// Runs frontends for the builds of an engine.
    pub fn new(worker: WorkerInfo) -> Self {
        Self { worker, enabled: true, allowed: Arc::new([]), client: None }
    }

    /// Sets whether there are such frontends, and which repositories they may come from; none is any.
    ///
    /// # Errors
    /// When one of the repositories is no image name.
    pub fn restricted(mut self, enabled: bool, allowed: &[String]) -> Result<Self, String> {
        let parse = |name: &String| {
            let reference: ImageReference = name.parse().map_err(|error| {
                format!("frontend \"gateway.v0\": allowedRepositories: {name:?}: {error}")
            })?;
            Ok::<_, String>(repository(&reference))
        };
        self.enabled = enabled;
        self.allowed = allowed.iter().map(parse).collect::<Result<Vec<_>, _>>()?.into();
        Ok(self)
    }

    /// Runs frontends for one build of a client.
    #[must_use]
    pub(crate) fn for_client(&self, record: Arc<Record>, session: String) -> Self {
        Self { client: Some((record, session)), ..self.clone() }
    }

    fn check(&self, frontend: &FrontendImage) -> Result<(), Status> {
        if frontend.attrs.contains_key("gateway-devel") {
            return Err(Status::unknown("development gateway is no longer supported"));
        }
        if !self.enabled {
            return Err(Status::unknown("invalid frontend: gateway.v0"));
        }
        if self.allowed.is_empty() {
            return Ok(());
        }
        let source = &frontend.source;
        let reference: ImageReference =
            source.parse().map_err(|error: slipway_spec::ReferenceError| {
                Status::invalid_argument(error.to_string())
            })?;
        if self.allowed.contains(&repository(&reference)) {
            return Ok(());
        }
        Err(Status::unknown(format!("'{source}' is not an allowed gateway source")))
    }

    /// Has a frontend say what the result is.
    ///
    /// # Errors
    /// What the frontend says went wrong, or why it said nothing.
    pub(crate) async fn answer(
        &self,
        build: &Build,
        frontend: FrontendImage,
        depth: usize,
        within: &Scope,
    ) -> Result<(Outcome, Arc<Scope>), Status> {
        self.check(&frontend)?;
        let scope = within.within(Asked::new("gateway.v0", &frontend.attrs, &frontend.inputs));
        let name = frontend.source.clone();
        let source = build.frontend_source(&name, frontend.attrs.clone()).await;
        let source = source.map_err(|error| frontend_status(&error))?;
        let own = source.config.config.labels.get(CAPABILITIES).map_or("", String::as_str);
        let wanted = frontend.attrs.get("frontend.caps").map_or("", String::as_str);
        let mut wanted = capabilities(wanted);
        if !frontend.inputs.is_empty() {
            wanted.insert("moby.buildkit.frontend.inputs");
        }
        if let Some(missing) = wanted.difference(&capabilities(own)).next() {
            return Err(unsupported_capability(missing));
        }

        let (record, session) = match &self.client {
            Some((record, session)) => (record.clone(), session.clone()),
            // What is announced there is shown by the build itself.
            None => (Arc::new(Record::default()), slipway_engine::id::new_id()),
        };
        let inputs: BTreeMap<String, pb::Definition> = frontend
            .inputs
            .iter()
            .map(|(name, definition)| (name.clone(), definition.to_pb()))
            .collect();
        let gateway =
            Gateway::new(build.clone(), record, inputs, self.clone(), depth, scope.clone());
        let gateway = Arc::new(gateway);
        let env = self.environment(build, &frontend.attrs, &session)?;
        let failed = |error: &dyn std::error::Error| {
            Status::unknown(format!("the frontend {name} cannot be started: {error}"))
        };
        let started = build.start_frontend(&source, env).await;
        let mut process = match started {
            Ok(process) => process,
            Err(slipway_engine::frontends::StartError::Solve(error)) => {
                return Err(solve_status(&error));
            }
            Err(error) => return Err(failed(&error)),
        };
        let ended = self.talk(build, &name, &gateway, &mut process).await;
        gateway.release_containers().await;
        process.discard().await;
        // What the frontend says went wrong is better than how it ended, and how it ended better than a success.
        match (gateway.said(), ended) {
            (Some(Err(error)), _) => Err(error),
            (Some(Ok(outcome)), Ok(())) => Ok((outcome, scope)),
            (None, Ok(())) => Err(Status::unknown(format!(
                "the frontend {name} has ended without a result; is it a frontend?"
            ))),
            (_, Err(error)) => Err(error),
        }
    }

    fn environment(
        &self,
        build: &Build,
        attrs: &BTreeMap<String, String>,
        session: &str,
    ) -> Result<Vec<String>, Status> {
        let mut env: Vec<String> = attrs
            .iter()
            .enumerate()
            .map(|(at, (key, value))| format!("BUILDKIT_FRONTEND_OPT_{at}={key}={value}"))
            .collect();
        let record = self.worker.record(build.engine().executor().emulation());
        let platforms: Vec<Platform> = record.platforms.iter().map(Platform::from).collect();
        let version = record.buildkit_version.unwrap_or_default();
        let workers = json!([{
            "id": record.id,
            "labels": record.labels,
            "platforms": platforms,
            "buildkitVersion": {
                "package": version.package,
                "version": version.version,
                "revision": version.revision,
            },
        }]);
        env.push(format!("BUILDKIT_SESSION_ID={session}"));
        env.push(format!("BUILDKIT_WORKERS={workers}"));
        env.push(format!("BUILDKIT_EXPORTEDPRODUCT={PRODUCT}"));
        if let Some(at) = env.iter().find(|variable| variable.contains('\0')) {
            let name = at.split_once('\0').map_or("", |(name, _)| name);
            return Err(Status::invalid_argument(format!(
                "a frontend cannot be given a zero byte: {name}"
            )));
        }
        Ok(env)
    }

    /// Answers a frontend's calls until it ends.
    async fn talk(
        &self,
        build: &Build,
        name: &str,
        gateway: &Arc<Gateway>,
        process: &mut FrontendProcess,
    ) -> Result<(), Status> {
        let (Some(stdin), Some(stdout)) = (process.stdin.take(), process.stdout.take()) else {
            return Err(Status::internal("a frontend without standard streams"));
        };
        let service = GatewayService::of(
            gateway.clone(),
            self.worker.clone(),
            build.engine().executor().emulation().clone(),
        );
        let router = Router::new()
            .with(
                LlbBridgeServer::new(service)
                    .max_decoding_message_size(MESSAGE_BYTES)
                    .max_encoding_message_size(MESSAGE_BYTES),
            )
            .with(HealthServer::new(Alive));
        let begin = Arc::new(Mutex::new(vec![]));
        let stdout = Begun { stream: Arc::new(Mutex::new(stdout)), begin: begin.clone() };
        let io = tokio::io::join(stdout.clone(), stdin);
        let words = LastWords::default();
        let (progress, stderr) = (build.progress().clone(), process.stderr.take());
        let shown = tokio::spawn(show(progress, name.to_owned(), stderr, words.clone()));
        let serve = router.serve(io, std::future::pending());
        tokio::pin!(serve);
        let said = async {
            gateway.wait_for_word().await;
            tokio::time::sleep(PATIENCE).await;
        };
        tokio::pin!(said);
        let mut spoken = None;
        let exit = tokio::select! {
            exit = process.wait() => Some(exit),
            ended = &mut serve => {
                spoken = Some(ended);
                // It has closed its output, or is not to be understood: it may end by itself, but not for ever.
                let patience = PATIENCE.min(closing(&begin));
                tokio::time::timeout(patience, process.wait()).await.ok()
            }
            () = &mut said => None,
        };
        // What is still in the pipes is read; what others hold open is not waited for.
        let moment = Duration::from_secs(1);
        if begin.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            // Who found nobody to write to has not read.
            let (mut rest, mut start) = (stdout, [0; BEGIN]);
            drop(tokio::time::timeout(moment, rest.read(&mut start)).await);
        }
        let shown = tokio::time::timeout(moment, shown).await;
        drop(shown);
        let begin = std::mem::take(&mut *begin.lock().unwrap_or_else(PoisonError::into_inner));
        let nonsense = || {
            let text = String::from_utf8_lossy(&begin);
            Status::unknown(format!(
                "the frontend {name} does not speak gRPC on its standard output; it wrote {text:?}"
            ))
        };
        let garbled =
            !begin.is_empty() && !PREFACE.starts_with(&begin[..begin.len().min(PREFACE.len())]);
        match exit {
            Some(Ok(0)) if garbled => Err(nonsense()),
            Some(Ok(0)) => Ok(()),
            Some(Ok(code)) => Err(Status::unknown(format!(
                "the frontend {name} failed: exit code: {code}{words}"
            ))),
            Some(Err(error)) => {
                Err(Status::unknown(format!("the frontend {name} cannot be run: {error}")))
            }
            // It has said all there is to say, and does not end: that is no reason to fail.
            None if gateway.said().is_some() => Ok(()),
            None if garbled => Err(nonsense()),
            None => {
                let broke = match spoken {
                    Some(Err(error)) => format!(": {error}"),
                    _ => String::new(),
                };
                Err(Status::unknown(format!(
                    "the frontend {name} has closed its connection without a result{broke}{words}"
                )))
            }
        }
    }
}

/// What is no HTTP/2 is not waited for.
fn closing(begin: &Mutex<Vec<u8>>) -> Duration {
    let begin = begin.lock().unwrap_or_else(PoisonError::into_inner);
    let garbled = !begin.is_empty() && !begin.starts_with(PREFACE);
    if garbled { Duration::from_millis(500) } else { PATIENCE }
}

fn repository(reference: &ImageReference) -> String {
    format!("{}/{}", reference.host(), reference.repository())
}

fn capabilities(list: &str) -> BTreeSet<&str> {
    let names = list.split(',').map(|name| name.split('+').next().unwrap_or_default());
    names.filter(|name| !name.is_empty()).collect()
}

#[async_trait]
impl FrontendRunner for FrontendImages {
    async fn run(
        &self,
        build: &Build,
        frontend: FrontendImage,
        depth: usize,
        within: &Scope,
    ) -> Result<FrontendResult, BridgeError> {
        let answered = self.answer(build, frontend, depth, within).await;
        let result = answered.and_then(|(outcome, _)| found(outcome));
        result.map_err(|status| {
            let kind = match status.code() {
                Code::NotFound => BridgeErrorKind::NotFound,
                Code::PermissionDenied => BridgeErrorKind::Unauthorized,
                Code::Cancelled => BridgeErrorKind::Canceled,
                Code::Unimplemented => BridgeErrorKind::Unsupported,
                _ => BridgeErrorKind::Other,
            };
            BridgeError::new(kind, status.message()).with_source(status)
        })
    }
}

/// Turns what a frontend says into what the one that is built in would have found.
fn found(outcome: Outcome) -> Result<FrontendResult, Status> {
    let Outcome { images, multi_platform, metadata, .. } = outcome;
    let of = |key: &str, platform: &Platform| -> Option<Bytes> {
        let suffixed = multi_platform.then(|| metadata.get(&format!("{key}/{platform}"))).flatten();
        suffixed.or_else(|| metadata.get(key)).cloned()
    };
    let one = |image: super::OutcomeImage| {
        let said = image.attestations.into_iter().map(|said| {
            let (made, said) = said.split();
            Ok::<_, Status>(said.at(made.definition()?))
        });
        let base = of("containerimage.base.config", &image.platform);
        Ok::<_, Status>(PlatformImage {
            definition: image.made.definition()?,
            config: image.config,
            base_history_len: image.base_history,
            base_config: base.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
            epoch: image.epoch,
            attestations: said.collect::<Result<_, _>>()?,
            platform: image.platform,
        })
    };
    let images = images.into_iter().map(one).collect::<Result<Vec<_>, _>>()?;
    let told = ["containerimage.config", "containerimage.base.config", "source.date.epoch"];
    let known = |key: &String| {
        key == "refs.platforms" || told.contains(&key.split('/').next().unwrap_or_default())
    };
    let rest = metadata.iter().filter(|(key, _)| images.is_empty() || !known(key));
    let metadata = rest.map(|(key, value)| (key.clone(), value.to_vec())).collect();
    Ok(FrontendResult { images, multi_platform, metadata, ..FrontendResult::default() })
}

/// Remembers how a stream begins.
#[derive(Clone)]
struct Begun {
    stream: Arc<Mutex<StreamReader>>,
    begin: Arc<Mutex<Vec<u8>>>,
}

/// Enough to tell what a frontend speaks instead.
const BEGIN: usize = 200;

impl AsyncRead for Begun {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let polled = Pin::new(&mut *stream).poll_read(context, into);
        if let Poll::Ready(Ok(())) = polled {
            let mut begin = self.begin.lock().unwrap_or_else(PoisonError::into_inner);
            let room = BEGIN.saturating_sub(begin.len());
            let new = &into.filled()[before..];
            begin.extend_from_slice(&new[..new.len().min(room)]);
        }
        polled
    }
}

/// The end of what a frontend said to people.
#[derive(Clone, Default)]
struct LastWords(Arc<Mutex<Vec<u8>>>);

impl LastWords {
    fn add(&self, bytes: &[u8]) {
        let mut words = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        words.extend_from_slice(bytes);
        let surplus = words.len().saturating_sub(LAST_WORDS);
        words.drain(..surplus);
    }
}

impl std::fmt::Display for LastWords {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let words = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match String::from_utf8_lossy(&words).trim() {
            "" => Ok(()),
            text => write!(f, ": {text}"),
        }
    }
}

/// Shows what a frontend says to people; one that says nothing is not shown.
async fn show(
    progress: Arc<dyn ProgressSink>,
    name: String,
    stderr: Option<StreamReader>,
    words: LastWords,
) {
    let Some(mut stderr) = stderr else { return };
    let title: Arc<str> = format!("[internal] frontend {name}").into();
    // Each one that runs is another, even if it is the same image.
    let vertex = Digest::of(format!("{title} {}", slipway_engine::id::new_id()).as_bytes());
    let mut buffer = vec![0; 16 << 10];
    let mut started = false;
    while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
        if !started {
            started = true;
            let name = title.clone();
            progress.send(ProgressEvent::Started { vertex: vertex.clone(), name });
        }
        words.add(&buffer[..count]);
        progress.send(ProgressEvent::Log {
            vertex: vertex.clone(),
            stream: Stream::Stderr,
            data: buffer[..count].into(),
        });
    }
    if started {
        progress.send(ProgressEvent::Done { vertex });
    }
}

impl Gateway {
    /// Runs a frontend that is an image for another frontend. Returns also where its results belong.
    ///
    /// # Errors
    /// What that frontend says went wrong.
    pub(super) async fn run_image(
        &self,
        attrs: BTreeMap<String, String>,
        inputs: &BTreeMap<String, pb::Definition>,
    ) -> Result<(FrontendResult, Arc<Scope>), Status> {
        if self.depth >= MAX_DEPTH {
            let message = format!("more than {MAX_DEPTH} frontends wait for each other");
            return Err(Status::resource_exhausted(message));
        }
        let frontend = frontend_image(attrs, inputs)?;
        // Boxed, since a frontend may ask for another one.
        let answered = self.frontends.answer(&self.build, frontend, self.depth + 1, &self.scope);
        let (outcome, scope) = Box::pin(answered).await?;
        Ok((found(outcome)?, scope))
    }
}

/// Reads a request for a frontend that is an image.
///
/// # Errors
/// When it names none, or an input makes no sense.
pub(crate) fn frontend_image(
    attrs: BTreeMap<String, String>,
    inputs: &BTreeMap<String, pb::Definition>,
) -> Result<FrontendImage, Status> {
    let Some(source) = attrs.get("source").cloned() else {
        return Err(Status::invalid_argument("no source specified for gateway"));
    };
    Ok(FrontendImage { source, attrs, inputs: definitions(inputs)? })
}

/// Reads inputs; those without an operation are left out.
///
/// # Errors
/// When one makes no sense.
pub(crate) fn definitions(
    inputs: &BTreeMap<String, pb::Definition>,
) -> Result<BTreeMap<String, Definition>, Status> {
    let mut read = BTreeMap::new();
    for (name, definition) in inputs.iter().filter(|(_, definition)| !definition.def.is_empty()) {
        let definition = Definition::from_pb(definition.clone())
            .map_err(|error| Status::invalid_argument(format!("the input {name:?}: {error}")))?;
        read.insert(name.clone(), definition);
    }
    Ok(read)
}
