//! `LLBBridge` on the daemon's socket: every call names the build that it is about.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use slipway_engine::solver::emulation::Emulation;
use slipway_spec::wire::control::VertexWarning;
use slipway_spec::wire::gateway::llb_bridge_server::LlbBridge;
use slipway_spec::wire::gateway::{
    EvaluateRequest, EvaluateResponse, ExecMessage, InputsRequest, InputsResponse,
    NewContainerRequest, NewContainerResponse, PingRequest, PongResponse, ReadDirRequest,
    ReadDirResponse, ReadFileRequest, ReadFileResponse, ReleaseContainerRequest,
    ReleaseContainerResponse, ResolveImageConfigRequest, ResolveImageConfigResponse,
    ResolveSourceMetaRequest, ResolveSourceMetaResponse, ReturnRequest, ReturnResponse,
    SolveRequest, SolveResponse, StatFileRequest, StatFileResponse, WarnRequest, WarnResponse,
};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::{Gateway, process};
use crate::builds::Builds;
use crate::capability;
use crate::failure::from_wire;
use crate::worker::WorkerInfo;

/// The header with the id of the build.
const BUILD_ID: &str = "buildkit-controlapi-buildid";

/// Builds and calls about them are started at the same time.
const WAIT: Duration = Duration::from_secs(3);

/// Passes calls on to the build that they are about.
#[derive(Clone, Debug)]
pub struct GatewayService {
    of: Of,
    worker: WorkerInfo,
    emulation: Arc<Emulation>,
}

/// Which builds calls are about.
#[derive(Clone, Debug)]
enum Of {
    /// Each call names one.
    Builds(Builds),
    /// All of a connection are about the same.
    One(Arc<Gateway>),
}

type Answer<T> = Result<Response<T>, Status>;

impl GatewayService {
    /// Serves the builds of a table.
    pub fn new(builds: Builds, worker: WorkerInfo, emulation: Arc<Emulation>) -> Self {
        Self { of: Of::Builds(builds), worker, emulation }
    }

    /// Serves the one frontend at the other end of a connection.
    pub(super) fn of(gateway: Arc<Gateway>, worker: WorkerInfo, emulation: Arc<Emulation>) -> Self {
        Self { of: Of::One(gateway), worker, emulation }
    }

    async fn gateway(&self, metadata: &MetadataMap) -> Result<Arc<Gateway>, Status> {
        let builds = match &self.of {
            Of::Builds(builds) => builds,
            Of::One(gateway) => return Ok(gateway.clone()),
        };
        let mut ids = metadata.get_all(BUILD_ID).iter();
        let (Some(id), None) = (ids.next().and_then(|id| id.to_str().ok()), ids.next()) else {
            return Err(Status::unknown("no buildid found in context"));
        };
        builds.gateway(id, WAIT).await
    }
}

#[tonic::async_trait]
impl LlbBridge for GatewayService {
    type ExecProcessStream = BoxStream<'static, Result<ExecMessage, Status>>;

    async fn ping(&self, request: Request<PingRequest>) -> Answer<PongResponse> {
        self.gateway(request.metadata()).await?;
        Ok(Response::new(PongResponse {
            frontend_api_caps: capability::frontend(),
            llb_caps: capability::llb(),
            workers: vec![self.worker.record(&self.emulation)],
        }))
    }

    async fn solve(&self, request: Request<SolveRequest>) -> Answer<SolveResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        gateway.solve(request.into_inner()).await.map(Response::new)
    }

    async fn resolve_image_config(
        &self,
        request: Request<ResolveImageConfigRequest>,
    ) -> Answer<ResolveImageConfigResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        gateway.image_config(request.into_inner()).await.map(Response::new)
    }

    async fn resolve_source_meta(
        &self,
        request: Request<ResolveSourceMetaRequest>,
    ) -> Answer<ResolveSourceMetaResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        gateway.source_metadata(request.into_inner()).await.map(Response::new)
    }

    async fn read_file(&self, request: Request<ReadFileRequest>) -> Answer<ReadFileResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        let ReadFileRequest { r#ref, file_path, range, .. } = request.into_inner();
        let data = gateway.read_file(&r#ref, &file_path, range).await?;
        Ok(Response::new(ReadFileResponse { data }))
    }

    async fn read_dir(&self, request: Request<ReadDirRequest>) -> Answer<ReadDirResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        let ReadDirRequest { r#ref, dir_path, include_pattern, .. } = request.into_inner();
        let entries = gateway.read_dir(&r#ref, &dir_path, &include_pattern).await?;
        Ok(Response::new(ReadDirResponse { entries }))
    }

    async fn stat_file(&self, request: Request<StatFileRequest>) -> Answer<StatFileResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        let StatFileRequest { r#ref, path, .. } = request.into_inner();
        let stat = gateway.stat_file(&r#ref, &path).await?;
        Ok(Response::new(StatFileResponse { stat: Some(stat) }))
    }

    async fn evaluate(&self, request: Request<EvaluateRequest>) -> Answer<EvaluateResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        gateway.evaluate(&request.into_inner().r#ref).await?;
        Ok(Response::new(EvaluateResponse {}))
    }

    async fn r#return(&self, request: Request<ReturnRequest>) -> Answer<ReturnResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        let ReturnRequest { result, error } = request.into_inner();
        let outcome = match (result, error) {
            (_, Some(error)) if error.code != 0 => Err(from_wire(&error)),
            (result, _) => Ok(result.unwrap_or_default()),
        };
        gateway.take(outcome)?;
        Ok(Response::new(ReturnResponse {}))
    }

    async fn inputs(&self, request: Request<InputsRequest>) -> Answer<InputsResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        Ok(Response::new(InputsResponse { definitions: gateway.inputs.clone() }))
    }

    async fn warn(&self, request: Request<WarnRequest>) -> Answer<WarnResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        let WarnRequest { digest, level, short, detail, url, info, ranges } = request.into_inner();
        let vertex = digest;
        gateway.record.warn(VertexWarning {
            vertex,
            level: level.max(1),
            short,
            detail,
            url,
            info,
            ranges,
        });
        Ok(Response::new(WarnResponse {}))
    }

    async fn new_container(
        &self,
        request: Request<NewContainerRequest>,
    ) -> Answer<NewContainerResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        gateway.new_container(request.into_inner()).await?;
        Ok(Response::new(NewContainerResponse {}))
    }

    async fn release_container(
        &self,
        request: Request<ReleaseContainerRequest>,
    ) -> Answer<ReleaseContainerResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        gateway.release_container(&request.into_inner().container_id).await?;
        Ok(Response::new(ReleaseContainerResponse {}))
    }

    async fn exec_process(
        &self,
        request: Request<Streaming<ExecMessage>>,
    ) -> Answer<Self::ExecProcessStream> {
        let gateway = self.gateway(request.metadata()).await?;
        Ok(Response::new(process::talk(gateway, request.into_inner()).boxed()))
    }

    async fn read_file_container(
        &self,
        request: Request<ReadFileRequest>,
    ) -> Answer<ReadFileResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        let data = gateway.read_file_container(request.into_inner()).await?;
        Ok(Response::new(ReadFileResponse { data }))
    }

    async fn read_dir_container(
        &self,
        request: Request<ReadDirRequest>,
    ) -> Answer<ReadDirResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        let entries = gateway.read_dir_container(request.into_inner()).await?;
        Ok(Response::new(ReadDirResponse { entries }))
    }

    async fn stat_file_container(
        &self,
        request: Request<StatFileRequest>,
    ) -> Answer<StatFileResponse> {
        let gateway = self.gateway(request.metadata()).await?;
        let stat = gateway.stat_file_container(request.into_inner()).await?;
        Ok(Response::new(StatFileResponse { stat: Some(stat) }))
    }
}
