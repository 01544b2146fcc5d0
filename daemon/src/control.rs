//! `Control`, the main interface: clients open sessions, ask for builds, follow them, and look after the store.

mod outputs;
mod records;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use slipway_engine::solver::{Entitlements, Services};
use slipway_engine::store::now_nanos;
use slipway_engine::{BuildClient, Engine};
use slipway_spec::llb::Definition;
use slipway_spec::progress::{ProgressEvent, ProgressSink};
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
use crate::failure::{build_status, not_yet};
use crate::gateway::{Gateway, Outcome};
use crate::session::file_sync::{FileCache, SessionFiles, TransferProgress};
use crate::session::{SessionGroup, SessionManager, WAIT};
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
}

/// Serves clients of one engine.
#[derive(Clone, Debug)]
pub struct ControlService {
    engine: Engine,
    sessions: SessionManager,
    builds: Builds,
    files: FileCache,
    worker: WorkerInfo,
    allowed: Allowed,
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
    ) -> Self {
        let files = FileCache::new(engine.store().root().join("local"));
        Self { engine, sessions, builds, files, worker, allowed }
    }

    fn entitlements(&self, wanted: &[String]) -> Result<Entitlements, Status> {
        let mut granted = Entitlements { network_host: false, security_insecure: false };
        for name in wanted {
            let (flag, allowed) = match name.as_str() {
                "network.host" => (&mut granted.network_host, self.allowed.network_host),
                "security.insecure" => {
                    (&mut granted.security_insecure, self.allowed.security_insecure)
                }
                other => return Err(Status::unknown(format!("unknown entitlement {other}"))),
            };
            if !allowed {
                return Err(Status::unknown(format!(
                    "granting entitlement {name} is not allowed by build daemon configuration"
                )));
            }
            *flag = true;
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
            ..Services::default()
        };
        let files = SessionFiles::new(sessions.clone(), self.files.clone());
        let mut inputs = BTreeMap::new();
        for (name, definition) in &request.frontend_inputs {
            if definition.def.is_empty() {
                continue;
            }
            let definition = Definition::from_pb(definition.clone()).map_err(|error| {
                Status::invalid_argument(format!("the input {name:?}: {error}"))
            })?;
            inputs.insert(name.clone(), definition);
        }
        let epoch = outputs::epoch(request)?;
        // Transfers belong to no vertex that the graph has; each client folder has a line of its own.
        let record = running.record().clone();
        let progress: TransferProgress = Arc::new(move |status| {
            let name: Arc<str> = format!("[internal] {}", status.id.trim_end_matches(':')).into();
            let vertex = slipway_spec::Digest::of(name.as_bytes());
            if status.bytes == 0 && !status.done {
                record.send(ProgressEvent::Started { vertex: vertex.clone(), name });
            }
            record.send(ProgressEvent::Status {
                vertex: vertex.clone(),
                id: status.id.into(),
                current: status.bytes,
                total: 0,
                done: status.done,
            });
            if status.done {
                record.send(ProgressEvent::Done { vertex });
            }
        });
        Ok(BuildClient {
            files: Arc::new(files.with_progress(progress)),
            services,
            credentials: Some(group),
            inputs,
            epoch,
        })
    }

    async fn build(&self, request: SolveRequest) -> Result<SolveResponse, Status> {
        let exporters = exporters(&request);
        refuse_unsupported(&request)?;
        outputs::check(&exporters)?;
        let sessions = self.sessions.group([request.session.clone()]);
        let running = self.builds.start(&request.r#ref)?;
        let build = async {
            let client = self.client(&request, &running, &sessions)?;
            let build = self
                .engine
                .begin(client, running.record().clone())
                .map_err(|error| build_status(&error))?;
            let gateway = Arc::new(Gateway::new(
                build.clone(),
                running.record().clone(),
                request.frontend_inputs.clone(),
            ));
            let outcome = match (&request.definition, request.frontend.as_str()) {
                (Some(definition), "") => gateway.outcome_of_graph(definition.clone())?,
                (_, "") => {
                    running.offer(gateway.clone());
                    gateway.returned().await?
                }
                (_, "dockerfile.v0") => {
                    let attrs = request.frontend_attrs.clone();
                    let found = gateway.dockerfile(attrs, &request.frontend_inputs).await?;
                    gateway.outcome_of(found)?
                }
                (_, other) => {
                    return Err(Status::unimplemented(format!("invalid frontend: {other}")));
                }
            };
            let results = gateway.solve_outcome(&outcome).await?;
            let target = outputs::Target { build: &build, sessions: &sessions };
            let mut response =
                outputs::export(&target, &results, outcome.multi_platform, &exporters).await?;
            response.extend(frontend_metadata(&outcome));
            build.settle().await.map_err(|error| build_status(&error))?;
            Ok(SolveResponse { exporter_response: response })
        };
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
    if let Some(cache) = &request.cache {
        let old = &cache.export_ref_deprecated;
        let export = cache.exports.iter().map(|entry| entry.r#type.as_str());
        if let Some(kind) = export.chain((!old.is_empty()).then_some("registry")).next() {
            return Err(not_yet(&format!("exporting a cache (type={kind})")));
        }
        let import = cache.imports.iter().map(|entry| entry.r#type.as_str());
        let old = cache.import_refs_deprecated.first().map(|_| "registry");
        if let Some(kind) = import.chain(old).next() {
            return Err(not_yet(&format!("importing a cache (type={kind})")));
        }
    }
    if request.source_policy.is_some() || !request.source_policy_session.is_empty() {
        return Err(not_yet("a source policy"));
    }
    if request.enable_session_exporter {
        return Err(not_yet("an exporter of the client"));
    }
    if request.proxy_network {
        return Err(not_yet("the proxy network"));
    }
    if let Some(name) = request.frontend_attrs.keys().find(|name| name.starts_with("attest:")) {
        return Err(not_yet(&format!("an attestation ({name})")));
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
        let record = records::usage(self.engine.store(), &filter, age_limit).await?;
        Ok(Response::new(DiskUsageResponse { record }))
    }

    async fn prune(&self, request: Request<PruneRequest>) -> Answer<Self::PruneStream> {
        let working_since = self.builds.working_since();
        let gone =
            records::prune(self.engine.store(), &request.into_inner(), working_since).await?;
        Ok(Response::new(futures::stream::iter(gone.into_iter().map(Ok)).boxed()))
    }

    async fn solve(&self, request: Request<SolveRequest>) -> Answer<SolveResponse> {
        self.build(request.into_inner()).await.map(Response::new)
    }

    async fn status(&self, request: Request<StatusRequest>) -> Answer<Self::StatusStream> {
        let id = request.into_inner().r#ref;
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
        let record = self.worker.record(self.engine.executor().emulation());
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
        _: Request<BuildHistoryRequest>,
    ) -> Answer<Self::ListenBuildHistoryStream> {
        Err(not_yet("the history of builds"))
    }

    async fn update_build_history(
        &self,
        _: Request<UpdateBuildHistoryRequest>,
    ) -> Answer<UpdateBuildHistoryResponse> {
        Err(not_yet("the history of builds"))
    }
}

#[cfg(test)]
mod tests;
