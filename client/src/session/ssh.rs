//! SSH agents, for steps and repositories that ask for them.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use slipway_solver::client::SshAgents;
use slipway_solver::client::ssh::DEFAULT_AGENT;
use slipway_spec::wire::sshforward::ssh_server::Ssh;
use slipway_spec::wire::sshforward::{BytesMessage, CheckAgentRequest, CheckAgentResponse};
use slipway_transport::tunnel::{Inbound, Tunnel, messages};
use tokio::io::copy_bidirectional;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};

/// The header that says which agent is meant.
const AGENT_ID: &str = "buildkit.ssh.id";

pub(super) struct SshService(pub(super) Arc<dyn SshAgents>);

fn named(id: &str) -> &str {
    if id.is_empty() { DEFAULT_AGENT } else { id }
}

impl SshService {
    async fn check(&self, id: &str) -> Result<(), Status> {
        match self.0.check(id).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Status::not_found(format!("no SSH agent {id:?} is forwarded"))),
            Err(error) => Err(Status::unknown(error.to_string())),
        }
    }
}

#[async_trait]
impl Ssh for SshService {
    type ForwardAgentStream = BoxStream<'static, Result<BytesMessage, Status>>;

    async fn check_agent(
        &self,
        request: Request<CheckAgentRequest>,
    ) -> Result<Response<CheckAgentResponse>, Status> {
        self.check(named(&request.get_ref().id)).await?;
        Ok(Response::new(CheckAgentResponse {}))
    }

    async fn forward_agent(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::ForwardAgentStream>, Status> {
        let id = request.metadata().get(AGENT_ID).and_then(|id| id.to_str().ok()).unwrap_or("");
        let id = named(id).to_owned();
        self.check(&id).await?;
        let mut agent =
            self.0.connect(&id).await.map_err(|error| Status::unknown(error.to_string()))?;
        let (outgoing, sent) = messages();
        let heard = request.into_inner().map(|message| message.map(|message| message.data));
        let mut tunnel = Tunnel::new(Inbound::new(heard), outgoing);
        let pump = AbortOnDropHandle::new(tokio::spawn(async move {
            // An end by error is an end; the agent's other connections are not concerned.
            drop(copy_bidirectional(&mut tunnel, &mut agent).await);
        }));
        // The pump lives as long as its answers are taken.
        let sent = sent.map(move |data: Bytes| {
            let _alive = &pump;
            Ok(BytesMessage { data })
        });
        Ok(Response::new(sent.boxed()))
    }
}
