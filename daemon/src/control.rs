//! `Control`, the main interface: clients open sessions, ask for builds, follow them, and look after the store.

mod attest;
mod caches;
mod layout;
mod outputs;
pub(crate) mod records;
mod verify;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use slipway_engine::provenance::Asked;
use slipway_engine::solver::{Entitlements, Services};
use slipway_engine::store::{blocking, now_nanos};
use slipway_engine::{BuildClient, Engine};
use slipway_spec::llb::Definition;
use slipway_spec::timestamp;
use slipway_spec::wire::control::control_server::Control;
use slipway_spec::wire::control::{
    BuildHistoryEvent, BuildHistoryRequest, BytesMessage, DiskUsageRequest, DiskUsageResponse,
    Exporter, InfoRequest, InfoResponse, ListWorkersRequest, ListWorkersResponse, PruneRequest,
    SolveRequest, SolveResponse, StatusRequest, StatusResponse, UpdateBuildHistoryRequest,
    UpdateBuildHistoryResponse, UsageRecord,
};
use tonic::{Request, Response, Status, Streaming};

use crate::builds::{Builds, Running};
use crate::collector::Collector;
use crate::failure::{build_status, not_yet};
use crate::gateway::frontends::{FrontendImages, frontend_image};
use crate::gateway::{Gateway, Outcome};
use crate::history::{History, Recording};
use crate::policy;
use crate::session::file_sync::{SessionFiles, TransferProgress};
use crate::session::{SessionGroup, SessionManager, WAIT};
use crate::trace::TraceContext;
use crate::worker::{self, WorkerInfo};

/// How long a client that asks for the progress of a build waits for the build to be started.
const STATUS_WAIT: Duration = Duration::from_secs(6);

/// The header with the daemon's idea of the present.
const TIME: &str = "buildkit-current-timestamp";

/// What the daemon's owner lets builds ask for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowed {
    /// Steps on the host's network, where the client allows it as well.
    pub network_host: bool,
    /// Steps without a sandbox, where the client allows it as well.
    pub security_insecure: bool,
    /// Devices, where the client allows them as well.
    pub devices: bool,
}

/// Serves clients of one engine.
#[derive(Clone, Debug)]
pub struct ControlService {
    engine: Engine,
    sessions: SessionManager,
    builds: Builds,
    worker: WorkerInfo,
    allowed: Allowed,
    frontends: FrontendImages,
    collector: Collector,
    history: History,
}

type Answer<T> = Result<Response<T>, Status>;

impl ControlService {
    /// Serves clients of an engine.
    pub fn new(
        engine: Engine,
        sessions: SessionManager,
        builds: Builds,
        worker: WorkerInfo,
        allowed: Allowed,
        frontends: FrontendImages,
        (collector, history): (Collector, History),
    ) -> Self {
        Self { engine, sessions, builds, worker, allowed, frontends, collector, history }
    }

    fn entitlements(&self, wanted: &[String]) -> Result<Entitlements, Status> {
        let mut granted = Entitlements { network_host: false, ..Entitlements::default() };
        for text in wanted {
            let (name, rest) = text.split_once('=').unwrap_or((text, ""));
            let allowed = match name {
                "network.host" if name == text => {
                    granted.network_host = true;
                    self.allowed.network_host
                }
                "security.insecure" if name == text => {
                    granted.security_insecure = true;
                    self.allowed.security_insecure
                }
                "device" => {
                    granted.devices.add(rest).map_err(Status::unknown)?;
                    self.allowed.devices
                }
                _ => return Err(Status::unknown(format!("unknown entitlement {text}"))),
            };
            if !allowed {
                return Err(Status::unknown(format!(
                    "granting entitlement {name} is not allowed by build daemon configuration"
                )));
            }
        }
        Ok(granted)
    }

    fn client(
        &self,
        request: &SolveRequest,
        running: &Running,
        sessions: &SessionGroup,
    ) -> Result<BuildClient, Status> {
        let group = Arc::new(sessions.clone());
        let services = Services {
            secrets: group.clone(),
            ssh: group.clone(),
            layouts: group.clone(),
            uploads: group.clone(),
            entitlements: self.entitlements(&request.entitlements)?,
            policies: policy::of_build(request, &self.sessions)?,
            keep_failed: true,
            ..Services::default()
        };
        let files = SessionFiles::new(sessions.clone(), self.collector.files().clone());
        let epoch = outputs::epoch(request)?;
        let record = running.record().clone();
        let progress: TransferProgress = Arc::new(move |status| {
            // Whoever reads a folder does so for a step.
            if let Some(vertex) = status.vertex {
                record.transfer(vertex, status.id, status.bytes, status.done);
            }
        });
        Ok(BuildClient {
            files: Arc::new(files.with_progress(progress)),
            services,
            credentials: Some(group.clone()),
            caches: group,
            epoch,
            asked: asked(request)?,
            id: slipway_engine::id::new_id(),
            frontends: Some(Arc::new(self.frontends_of(request, running))),
        })
    }

    /// Runs frontends for one build.
    fn frontends_of(&self, request: &SolveRequest, running: &Running) -> FrontendImages {
        self.frontends.for_client(running.record().clone(), request.session.clone())
    }

    /// Builds, and remembers that unless the client says that it is nobody's business.
    async fn recorded(
        &self,
        request: SolveRequest,
        trace: TraceContext,
    ) -> Result<SolveResponse, Status> {
        let starting = self.collector.starting().await;
        let running = self.builds.start(&request.r#ref)?;
        drop(starting);
        let recording = (!request.internal).then(|| {
            let progress = running.record().clone();
            self.history.begin(&request, &exporters(&request), progress, trace)
        });
        let done = self.build(request, &running, recording.as_ref()).boxed().await;
        if let Some(recording) = recording {
            recording.finish(&done);
        }
        drop(running);
        self.collector.build_ended();
        done
    }

    async fn build(
        &self,
        request: SolveRequest,
        running: &Running,
        recording: Option<&Recording>,
    ) -> Result<SolveResponse, Status> {
        let exporters = exporters(&request);
        refuse_unsupported(&request)?;
        outputs::check(&exporters)?;
        let caches = caches::Caches::read(&request)?;
        let wanted = attest::wanted(&request.frontend_attrs)?;
        let sessions = self.sessions.group([request.session.clone()]);
        let build = async {
            let client = self.client(&request, running, &sessions)?;
            let build = self
                .engine
                .begin(client, running.record().clone())
                .map_err(|error| build_status(&error))?;
            let frontends = self.frontends_of(&request, running);
            let (record, inputs) = (running.record().clone(), request.frontend_inputs.clone());
            let gateway = Gateway::new(
                build.clone(),
                record,
                inputs,
                frontends.clone(),
                0,
                build.scope().clone(),
            );
            let gateway = Arc::new(gateway);
            let outcome = match (&request.definition, request.frontend.as_str()) {
                (Some(definition), "") => {
                    // Frontends are told by their attributes.
                    build.import_caches(caches.imports.clone()).await;
                    gateway.outcome_of_graph(definition.clone()).await?
                }
                (_, "") => {
                    running.offer(gateway.clone());
                    gateway.returned().await?
                }
                (_, "gateway.v0") if !is_builtin(&request.frontend_attrs) => {
                    let attrs = request.frontend_attrs.clone();
                    let frontend = frontend_image(attrs, &request.frontend_inputs)?;
                    frontends.answer(&build, frontend, 1, build.scope()).await?.0
                }
                (_, "dockerfile.v0" | "gateway.v0") => {
                    let mut attrs = request.frontend_attrs.clone();
                    if request.frontend == "gateway.v0" {
                        attrs.remove("source");
                    }
                    let found = gateway.dockerfile(attrs, &request.frontend_inputs).await?;
                    gateway.outcome_of(found.0, &found.1).await?
                }
                (_, other) => {
                    return Err(Status::unimplemented(format!("invalid frontend: {other}")));
                }
            };
            let mut results = gateway.solve_outcome(&outcome, !exporters.is_empty()).await?;
            attest::attest(&gateway, &outcome, &mut results, &wanted).boxed().await?;
            attest::provenance(&build, &outcome, &mut results, &wanted, recording).boxed().await?;
            let edges: Vec<_> =
                outcome.images.iter().map(|image| image.made.edge.clone()).collect();
            if caches.inline() {
                let added = build.add_inline_caches(&mut results, &edges).await;
                added.map_err(|error| build_status(&error))?;
            }
            if let Some(recording) = recording {
                recording.answered(outcome.metadata.iter().map(|(key, value)| {
                    (key.clone(), String::from_utf8_lossy(value).into_owned())
                }));
            }
            verify::warn(&build, &request.frontend_attrs, &outcome);
            let target = outputs::Target {
                build: &build,
                sessions: &sessions,
                recording,
                metadata: &outcome.metadata,
            };
            let mut response =
                outputs::export(&target, &results, outcome.multi_platform, &exporters)
                    .boxed()
                    .await?;
            let edges: Vec<_> = edges.into_iter().flatten().collect();
            response.extend(caches.export(&build, &edges).boxed().await?);
            response.extend(frontend_metadata(&outcome));
            build.settle().await.map_err(|error| build_status(&error))?;
            if let Some(recording) = recording {
                recording.answered(response.clone());
            }
            Ok(SolveResponse { exporter_response: response })
        }
        // The compiler cannot see through so many futures in each other.
        .boxed();
        let lost = self.lost(&request.session);
        tokio::select! {
            done = build => done,
            why = lost => Err(Status::cancelled(format!("session lost: {why}"))),
        }
    }

    /// Resolves when the client's session has ended; a build without a session has nothing to lose.
    async fn lost(&self, id: &str) -> String {
        let session = match id {
            "" => None,
            id => self.sessions.get(id, WAIT).await.ok(),
        };
        let Some(session) = session else { return std::future::pending().await };
        session.closed().await;
        session.why().unwrap_or("the client has gone").to_owned()
    }
}

/// Returns what a whole build is asked, for its provenance.
fn asked(request: &SolveRequest) -> Result<Asked, Status> {
    let mut inputs = BTreeMap::new();
    for (name, graph) in request.frontend_inputs.iter().filter(|(_, graph)| !graph.def.is_empty()) {
        let graph = Definition::from_pb(graph.clone())
            .map_err(|error| Status::invalid_argument(format!("the input {name:?}: {error}")))?;
        inputs.insert(name.clone(), graph);
    }
    Ok(Asked::new(&request.frontend, &request.frontend_attrs, &inputs))
}

/// Returns whether a frontend that is said to be an image is the one that is built in.
fn is_builtin(attrs: &BTreeMap<String, String>) -> bool {
    let replaced = |key: &String| {
        let name = key.strip_prefix("context:dockerfile.v0");
        name.is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    };
    attrs.get("source").is_some_and(|source| source == "dockerfile.v0")
        && !attrs.keys().any(replaced)
}

/// Returns what is to be made of the result. New clients name it twice, for old daemons.
fn exporters(request: &SolveRequest) -> Vec<Exporter> {
    if request.exporters.is_empty() && !request.exporter_deprecated.is_empty() {
        return vec![Exporter {
            r#type: request.exporter_deprecated.clone(),
            attrs: request.exporter_attrs_deprecated.clone(),
        }];
    }
    request.exporters.clone()
}

/// What a client asked for must not be left out without a word.
fn refuse_unsupported(request: &SolveRequest) -> Result<(), Status> {
    if request.enable_session_exporter {
        return Err(not_yet("an exporter of the client"));
    }
    if request.proxy_network {
        return Err(not_yet("the proxy network"));
    }
    Ok(())
}

fn frontend_metadata(outcome: &Outcome) -> BTreeMap<String, String> {
    outcome
        .metadata
        .iter()
        .filter(|(key, _)| key.starts_with("frontend."))
        .map(|(key, value)| (key.clone(), String::from_utf8_lossy(value).into_owned()))
        .collect()
}

/// Adds the present to the headers of an answer.
fn timed<T>(stream: T) -> Response<T> {
    let mut response = Response::new(stream);
    if let Ok(value) = timestamp::format(now_nanos()).parse() {
        response.metadata_mut().insert(TIME, value);
    }
    response
}

#[tonic::async_trait]
impl Control for ControlService {
    type PruneStream = BoxStream<'static, Result<UsageRecord, Status>>;
    type StatusStream = BoxStream<'static, Result<StatusResponse, Status>>;
    type SessionStream = BoxStream<'static, Result<BytesMessage, Status>>;
    type ListenBuildHistoryStream = BoxStream<'static, Result<BuildHistoryEvent, Status>>;

    async fn disk_usage(&self, request: Request<DiskUsageRequest>) -> Answer<DiskUsageResponse> {
        let DiskUsageRequest { filter, age_limit } = request.into_inner();
        let record = records::usage(&self.collector, &filter, age_limit).await?;
        Ok(Response::new(DiskUsageResponse { record }))
    }

    async fn prune(&self, request: Request<PruneRequest>) -> Answer<Self::PruneStream> {
        let gone = records::prune(&self.collector, &request.into_inner()).await?;
        Ok(Response::new(futures::stream::iter(gone.into_iter().map(Ok)).boxed()))
    }

    async fn solve(&self, request: Request<SolveRequest>) -> Answer<SolveResponse> {
        let trace = TraceContext::of_call(request.metadata());
        self.recorded(request.into_inner(), trace).await.map(Response::new)
    }

    async fn status(&self, request: Request<StatusRequest>) -> Answer<Self::StatusStream> {
        let id = request.into_inner().r#ref;
        let running = self.builds.record(&id, Duration::ZERO).await;
        if running.is_err()
            && let Some(told) = self.history.replay(&id).await?
        {
            return Ok(timed(told));
        }
        let record = self.builds.record(&id, STATUS_WAIT).await?;
        Ok(timed(record.follow().map(Ok).boxed()))
    }

    async fn session(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Answer<Self::SessionStream> {
        let metadata = request.metadata().clone();
        let stream = self.sessions.open(&metadata, request.into_inner()).await?;
        Ok(Response::new(stream.boxed()))
    }

    async fn list_workers(
        &self,
        request: Request<ListWorkersRequest>,
    ) -> Answer<ListWorkersResponse> {
        let filter = request.into_inner().filter;
        let mut record = self.worker.record(self.engine.executor().emulation());
        let devices = self.engine.worker().devices.clone();
        let devices = blocking::run(move || Ok(worker::devices(&devices.read()))).await;
        record.cdi_devices = devices.map_err(|error| Status::unknown(error.to_string()))?;
        let wanted = records::matches_worker(&filter, &record)?;
        Ok(Response::new(ListWorkersResponse {
            record: wanted.then_some(record).into_iter().collect(),
        }))
    }

    async fn info(&self, _: Request<InfoRequest>) -> Answer<InfoResponse> {
        Ok(Response::new(InfoResponse { buildkit_version: Some(worker::version()) }))
    }

    async fn listen_build_history(
        &self,
        request: Request<BuildHistoryRequest>,
    ) -> Answer<Self::ListenBuildHistoryStream> {
        Ok(timed(self.history.listen(request.into_inner()).await?))
    }

    async fn update_build_history(
        &self,
        request: Request<UpdateBuildHistoryRequest>,
    ) -> Answer<UpdateBuildHistoryResponse> {
        let UpdateBuildHistoryRequest { r#ref, pinned, delete, finalize } = request.into_inner();
        if delete {
            self.history.delete(r#ref).await?;
        } else if finalize {
            self.history.finalize(r#ref).await?;
        } else {
            self.history.pin(r#ref, pinned).await?;
        }
        Ok(Response::new(UpdateBuildHistoryResponse {}))
    }
}

#[cfg(test)]
mod tests;
