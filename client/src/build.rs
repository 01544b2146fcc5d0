//! One build by a daemon, with the order of calls that BuildKit's own clients keep: a session is opened, `Solve` waits for
//! the whole build, `Status` tells of its progress, and in the meantime the client has the daemon's frontend solve its
//! request and hands the result back, which is then exported.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::TryStreamExt as _;
use serde_json::json;
use slipway_solver::policy::Policy;
use slipway_spec::Descriptor;
use slipway_spec::progress::ProgressSink;
use slipway_spec::wire::control::{
    CacheOptions, CacheOptionsEntry, Exporter, SolveRequest, StatusRequest,
};
use slipway_spec::wire::gateway::{self, PingRequest, PongResponse, ReturnRequest};
use slipway_spec::wire::rpc;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Request, Status};

use crate::connection::Connection;
use crate::error::{ClientError, ClientErrorKind};
use crate::failure::RemoteFailure;
use crate::policy;
use crate::session::content::{ContentFolder, LayoutName};
use crate::session::{ClientSession, SessionServices, new_id};
use crate::status::StatusTranslator;

/// The frontend that daemons have inside.
const FRONTEND: &str = "dockerfile.v0";

/// The header that says which build a call of a frontend belongs to.
const BUILD_ID: &str = "buildkit-controlapi-buildid";

/// How long one side of a build may go on after the other one has ended.
const FAREWELL: Duration = Duration::from_secs(5);

/// How long a daemon may take to begin.
const BEGIN: Duration = Duration::from_secs(15);

/// The name of a store that an image is written into.
pub const EXPORT_STORE: &str = "export";

/// Something that a daemon makes or uses, with its attributes: an export, or a cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Typed {
    /// Its type, such as `image` or `registry`.
    pub kind: String,
    /// Everything else that is said of it.
    pub attrs: BTreeMap<String, String>,
}

/// A build.
#[derive(Clone, Debug, Default)]
pub struct BuildRequest {
    /// What the frontend is told: `filename`, `build-arg:NAME`, `platform` and so on.
    pub attrs: BTreeMap<String, String>,
    /// Where the result goes; the place of each is the key of its destination in [`SessionServices::outputs`].
    pub exports: Vec<Typed>,
    /// Caches that are written.
    pub cache_exports: Vec<Typed>,
    /// Caches that are used.
    pub cache_imports: Vec<Typed>,
    /// What steps may do beyond the usual: `network.host`, `security.insecure`.
    pub entitlements: Vec<String>,
    /// What the daemon is to do with sources before it uses them.
    pub source_policy: Option<Policy>,
    /// What folders are remembered under from one build to the next.
    pub shared_key: String,
    /// Layouts that caches are written into, with the tag that each gets.
    pub cache_layouts: Vec<(ContentFolder, String)>,
    /// The layout that an image is written into.
    pub image_layout: Option<ContentFolder>,
}

/// What a daemon says of a build that it has done.
#[derive(Clone, Debug, Default)]
pub struct BuildResult {
    /// What the exports told: `containerimage.digest` and so on.
    pub response: BTreeMap<String, String>,
    /// What the frontend told: `result.json` of a request that builds nothing.
    pub metadata: BTreeMap<String, Bytes>,
}

impl BuildResult {
    /// Returns the image that was made, if one was.
    pub fn descriptor(&self) -> Option<Descriptor> {
        let text = self.response.get("containerimage.descriptor")?;
        serde_json::from_slice(&STANDARD.decode(text).ok()?).ok()
    }

    /// Returns the names that the image got.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let names = self.response.get("image.name").map(String::as_str).unwrap_or_default();
        names.split(',').filter(|name| !name.is_empty())
    }
}

/// Has a daemon build. Dropping the future gives the build up.
///
/// # Errors
/// When the build fails, or the daemon cannot be reached any more.
pub async fn build(
    connection: &Connection,
    request: BuildRequest,
    services: SessionServices,
    sink: Arc<dyn ProgressSink>,
) -> Result<BuildResult, ClientError> {
    let session = ClientSession::open(connection, &request.shared_key, services).await?;
    let id = new_id()?;
    let mut attrs = request.attrs.clone();
    if !request.cache_imports.is_empty() {
        let imports: Vec<_> = request
            .cache_imports
            .iter()
            .map(|import| json!({ "Type": import.kind, "Attrs": import.attrs }))
            .collect();
        attrs.insert("cache-imports".into(), json!(imports).to_string());
    }
    let solving = {
        let (mut control, solve) =
            (connection.control(), solve_request(&request, &attrs, &id, &session));
        async move { control.solve(solve).await.map(|answer| answer.into_inner().exporter_response) }
    };
    let status = AbortOnDropHandle::new(tokio::spawn(follow(connection.clone(), id.clone(), sink)));
    let driving = drive(connection, &id, attrs, request.exports.len());
    let (solved, driven) = both(solving, driving).await;
    session.close().await;
    // A daemon that tells no more progress has none to tell.
    drop(tokio::time::timeout(FAREWELL, status).await);
    let response = match (solved, driven) {
        (Ok(response), Ok(metadata)) => BuildResult { response, metadata },
        (Err(status), driven) => return Err(failed(&status, driven.err())),
        (Ok(_), Err(error)) => return Err(error.into_error()),
    };
    name_layouts(&request, &response)?;
    Ok(response)
}

fn entries(list: &[Typed]) -> Vec<CacheOptionsEntry> {
    let one = |typed: &Typed| CacheOptionsEntry {
        r#type: typed.kind.clone(),
        attrs: typed.attrs.clone(),
    };
    list.iter().map(one).collect()
}

fn solve_request(
    request: &BuildRequest,
    attrs: &BTreeMap<String, String>,
    id: &str,
    session: &ClientSession,
) -> SolveRequest {
    let exporters: Vec<Exporter> = request
        .exports
        .iter()
        .map(|export| Exporter { r#type: export.kind.clone(), attrs: export.attrs.clone() })
        .collect();
    // Daemons that know of one export only look for it here.
    let first = exporters.first().cloned().unwrap_or_default();
    SolveRequest {
        r#ref: id.to_owned(),
        exporter_deprecated: first.r#type,
        exporter_attrs_deprecated: first.attrs,
        session: session.id().to_owned(),
        // Also here, as what is attested, and the time of exports, depend on them.
        frontend_attrs: attrs.clone(),
        cache: Some(CacheOptions {
            exports: entries(&request.cache_exports),
            imports: entries(&request.cache_imports),
            ..CacheOptions::default()
        }),
        entitlements: request.entitlements.clone(),
        source_policy: request.source_policy.as_ref().map(policy::message),
        exporters,
        ..SolveRequest::default()
    }
}

/// Why the result was not handed over.
enum DriveError {
    /// The daemon said so.
    Status(Box<Status>),
    /// It cannot do what is asked.
    Unsupported(String),
}

impl DriveError {
    fn into_error(self) -> ClientError {
        match self {
            Self::Status(status) => failed(&status, None),
            Self::Unsupported(what) => ClientError::new(ClientErrorKind::Unsupported, what),
        }
    }
}

/// Runs the two sides of a build. When one has failed the other one has a while to say more.
async fn both<S, D>(
    solving: impl Future<Output = Result<S, Status>>,
    driving: impl Future<Output = Result<D, DriveError>>,
) -> (Result<S, Status>, Result<D, DriveError>) {
    tokio::pin!(solving);
    tokio::pin!(driving);
    let canceled = || Status::cancelled("the build was given up");
    tokio::select! {
        solved = &mut solving => {
            // The daemon has ended the build; what the frontend said of it is on its way, or will never come.
            let patience = if solved.is_ok() { FAREWELL } else { Duration::from_millis(500) };
            let driven = tokio::time::timeout(patience, driving).await;
            (solved, driven.unwrap_or_else(|_| Err(DriveError::Status(Box::new(canceled())))))
        }
        driven = &mut driving => {
            let solved = match &driven {
                Ok(_) => solving.await,
                Err(_) => {
                    let solved = tokio::time::timeout(FAREWELL, solving).await;
                    solved.unwrap_or_else(|_| Err(canceled()))
                }
            };
            (solved, driven)
        }
    }
}

/// Asks the daemon's frontend for the result, and hands it back. Returns what the frontend said beside it.
async fn drive(
    connection: &Connection,
    id: &str,
    attrs: BTreeMap<String, String>,
    exports: usize,
) -> Result<BTreeMap<String, Bytes>, DriveError> {
    let status = |status: Status| DriveError::Status(Box::new(status));
    let mut bridge = connection.bridge();
    let pong = tokio::time::timeout(BEGIN, bridge.ping(of_build(PingRequest {}, id)?)).await;
    let pong = pong.unwrap_or_else(|_| Err(Status::deadline_exceeded("the build does not begin")));
    let pong = pong.map_err(status)?.into_inner();
    let returned = if exports > 1 && !has_cap(&pong, "exporter.multiple") {
        Err(DriveError::Unsupported("the builder makes one output at a time; give one -o".into()))
    } else {
        let solve = gateway::SolveRequest {
            frontend: FRONTEND.into(),
            frontend_opt: attrs,
            allow_result_return: true,
            allow_result_array_ref: true,
            ..gateway::SolveRequest::default()
        };
        bridge.solve(of_build(solve, id)?).await.map_err(status)
    };
    let (answer, returned) = match returned {
        Ok(answer) => {
            let result = answer.into_inner().result.unwrap_or_default();
            let answer = ReturnRequest { result: Some(result.clone()), error: None };
            (answer, Ok(result.metadata))
        }
        Err(error) => {
            let told = match &error {
                DriveError::Status(status) => rpc::Status::from(&**status),
                DriveError::Unsupported(what) => {
                    rpc::Status::from(&Status::unimplemented(what.as_str()))
                }
            };
            (ReturnRequest { result: None, error: Some(told) }, Err(error))
        }
    };
    let handed = bridge.r#return(of_build(answer, id)?).await;
    match (handed, returned) {
        (Err(refused), Ok(_)) => Err(status(refused)),
        (_, returned) => returned,
    }
}

fn has_cap(pong: &PongResponse, id: &str) -> bool {
    pong.llb_caps.iter().chain(&pong.frontend_api_caps).any(|cap| cap.id == id && cap.enabled)
}

fn of_build<T>(message: T, id: &str) -> Result<Request<T>, DriveError> {
    let mut request = Request::new(message);
    let value = id.parse().map_err(|_| {
        DriveError::Status(Box::new(Status::internal("an id is letters and digits")))
    })?;
    request.metadata_mut().insert(BUILD_ID, value);
    Ok(request)
}

/// Joins what is known of a failed build.
fn failed(status: &Status, driven: Option<DriveError>) -> ClientError {
    let unreachable = |status: &Status| {
        let what = format!("the connection to the builder broke: {}", status.message());
        ClientError::new(ClientErrorKind::Connect, what)
    };
    let mut failure = RemoteFailure::of(status);
    match driven {
        Some(DriveError::Unsupported(what)) => {
            return ClientError::new(ClientErrorKind::Unsupported, what);
        }
        // The frontend's own error says where, where the other one does not.
        Some(DriveError::Status(own)) if failure.places.is_empty() => {
            let own = RemoteFailure::of(&own);
            if !own.places.is_empty() || (failure.is_canceled() && !own.is_canceled()) {
                failure = own;
            }
        }
        _ => {}
    }
    if failure.code == Code::Unavailable && failure.places.is_empty() {
        return unreachable(status);
    }
    ClientError::build(failure)
}

/// Tells the progress of a build, until there is no more.
async fn follow(connection: Connection, id: String, sink: Arc<dyn ProgressSink>) {
    let mut translator = StatusTranslator::default();
    let mut control = connection.control();
    match control.status(StatusRequest { r#ref: id }).await {
        Ok(answer) => {
            let mut answer = answer.into_inner();
            loop {
                let settled = translator.settle(Instant::now(), &*sink);
                let next = match settled {
                    None => answer.try_next().await,
                    Some(at) => match tokio::time::timeout_at(at.into(), answer.try_next()).await {
                        Ok(next) => next,
                        Err(_) => continue,
                    },
                };
                match next {
                    Ok(Some(message)) => translator.take(message, &*sink),
                    Ok(None) => break,
                    Err(error) => {
                        // The build itself goes on, and tells its own error.
                        tracing::debug!(%error, "progress is not told any more");
                        break;
                    }
                }
            }
        }
        Err(error) => tracing::debug!(%error, "progress is not told"),
    }
    translator.end(&*sink);
}

/// Names what was written into layouts of this machine.
fn name_layouts(request: &BuildRequest, result: &BuildResult) -> Result<(), ClientError> {
    let unreadable = |what: &str| {
        ClientError::new(
            ClientErrorKind::Protocol,
            format!("the builder sent {what} that cannot be read"),
        )
    };
    if !request.cache_layouts.is_empty()
        && let Some(text) = result.response.get("cache.manifest")
    {
        let target: Descriptor =
            serde_json::from_str(text).map_err(|_| unreadable("a cache manifest"))?;
        for (layout, tag) in &request.cache_layouts {
            layout.name(&target, &[LayoutName::Tag(tag.clone())])?;
        }
    }
    if let Some(layout) = &request.image_layout {
        let target = result.descriptor().ok_or_else(|| unreadable("a descriptor"))?;
        let mut names: Vec<_> =
            result.names().map(|name| LayoutName::Name(name.to_owned())).collect();
        if names.is_empty() {
            names.push(LayoutName::Tag("latest".into()));
        }
        layout.name(&target, &names)?;
    }
    Ok(())
}
