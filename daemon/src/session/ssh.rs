//! SSH agents, and other sockets, that the client forwards.

use async_trait::async_trait;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use slipway_engine::solver::client::ssh::DEFAULT_AGENT;
use slipway_engine::solver::client::{AgentStream, SshAgents};
use slipway_engine::store::Error;
use slipway_spec::wire::sshforward::ssh_client::SshClient;
use slipway_spec::wire::sshforward::{BytesMessage, CheckAgentRequest};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status};

use super::tunnel::{Inbound, Tunnel, messages};
use super::{Session, SessionError, SessionErrorKind, SessionGroup};

/// The header that says which agent is meant.
const AGENT_ID: &str = "buildkit.ssh.id";

impl Session {
    /// Fails unless the client forwards an agent of this id; the empty id is the default agent.
    ///
    /// # Errors
    /// When it has none of that id, forwards none at all, or does not answer.
    pub async fn check_agent(&self, id: &str) -> Result<(), SessionError> {
        let request = CheckAgentRequest { id: named(id).to_owned() };
        match SshClient::new(self.channel()).check_agent(request).await {
            Ok(_) => Ok(()),
            Err(status) => Err(SessionError::from_status(subject(id), status)),
        }
    }

    /// Opens a connection to an agent. The end of what is written is passed on, and that of what is read as well.
    ///
    /// That the client refuses is seen when the connection is read: it may say nothing before it has heard something.
    ///
    /// # Errors
    /// When the id cannot be sent.
    pub fn connect_agent(&self, id: &str) -> Result<Tunnel, SessionError> {
        let (outbound, sent) = messages();
        let mut request = Request::new(sent.map(|data| BytesMessage { data }));
        let value = named(id).parse().map_err(|_| {
            let message = "the id of an agent must be printable ASCII";
            SessionError::new(SessionErrorKind::NotFound, subject(id), message)
        })?;
        request.metadata_mut().insert(AGENT_ID, value);
        let mut client = SshClient::new(self.channel());
        let call = tokio::spawn(async move { client.forward_agent(request).await });
        let call = AbortOnDropHandle::new(call);
        let received = stream::once(async move {
            let answer = call.await.map_err(|error| Status::internal(error.to_string()))?;
            answer.map(Response::into_inner)
        });
        let received = received.try_flatten().map_ok(|message| message.data);
        Ok(Tunnel::new(Inbound::new(received), outbound))
    }
}

fn named(id: &str) -> &str {
    if id.is_empty() { DEFAULT_AGENT } else { id }
}

fn subject(id: &str) -> String {
    format!("cannot use SSH agent {:?} of the client", named(id))
}

/// Clients refuse an agent that they do not have with a status of any kind.
async fn has_agent(session: &Session, id: &str) -> Result<Option<()>, SessionError> {
    match session.check_agent(id).await {
        Ok(()) => Ok(Some(())),
        Err(error)
            if matches!(error.kind(), SessionErrorKind::Closed | SessionErrorKind::Timeout) =>
        {
            Err(error)
        }
        Err(_) => Ok(None),
    }
}

#[async_trait]
impl SshAgents for SessionGroup {
    async fn check(&self, id: &str) -> Result<bool, Error> {
        let ask = move |session: Session| async move { has_agent(&session, id).await };
        Ok(self.find(&subject(id), ask).await?.is_some())
    }

    async fn connect(&self, id: &str) -> Result<Box<dyn AgentStream>, Error> {
        let ask = move |session: Session| async move {
            // Another client of the group may be the one that has it.
            match has_agent(&session, id).await? {
                Some(()) => session.connect_agent(id).map(Some),
                None => Ok(None),
            }
        };
        match self.find(&subject(id), ask).await? {
            Some(agent) => Ok(Box::new(agent)),
            None => Err(SessionError::new(
                SessionErrorKind::NotFound,
                subject(id),
                "the client does not forward it; build with --ssh",
            )
            .into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::stream::BoxStream;
    use slipway_spec::wire::sshforward::CheckAgentResponse;
    use slipway_spec::wire::sshforward::ssh_server::{Ssh, SshServer};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tonic::Streaming;

    use super::*;
    use crate::fake_client::FakeClient;
    use crate::session::SessionManager;

    /// An agent that says its id and repeats what it hears; one called `rude` hangs up, one called `shy` says nothing
    /// before it is spoken to.
    struct Echo;

    #[async_trait]
    impl Ssh for Echo {
        type ForwardAgentStream = BoxStream<'static, Result<BytesMessage, Status>>;

        async fn check_agent(
            &self,
            request: Request<CheckAgentRequest>,
        ) -> Result<Response<CheckAgentResponse>, Status> {
            match request.into_inner().id.as_str() {
                DEFAULT_AGENT | "rude" | "shy" => Ok(Response::new(CheckAgentResponse {})),
                id => Err(Status::unknown(format!("unset ssh forward key {id}"))),
            }
        }

        async fn forward_agent(
            &self,
            request: Request<Streaming<BytesMessage>>,
        ) -> Result<Response<Self::ForwardAgentStream>, Status> {
            let id = request.metadata().get(AGENT_ID).unwrap().to_str().unwrap().to_owned();
            let greeting = BytesMessage { data: format!("{id}:").into() };
            let greeting = stream::iter([Ok(greeting)]);
            if id == "rude" {
                return Ok(Response::new(greeting.boxed()));
            }
            let mut heard = request.into_inner();
            if id == "shy" {
                let first = heard.message().await?.ok_or_else(|| Status::aborted("silence"))?;
                let first = stream::iter([Ok(first)]);
                return Ok(Response::new(first.chain(heard).boxed()));
            }
            Ok(Response::new(greeting.chain(heard).boxed()))
        }
    }

    async fn group() -> (crate::fake_client::FakeConnection, SessionGroup) {
        let manager = SessionManager::new();
        let client = FakeClient::new("a").with(SshServer::new(Echo), &[]).connect(&manager).await;
        (client, manager.group(["a".to_owned()]))
    }

    #[tokio::test]
    async fn bytes_and_ends_pass_both_ways() {
        let (_client, group) = group().await;
        assert!(group.check("").await.unwrap());
        let agent = group.connect("").await.unwrap();
        let (mut read, mut write) = tokio::io::split(agent);
        let much: Vec<u8> = (0..3_000_000_u32).map(|at| at as u8).collect();
        let sent = much.clone();
        let writing = tokio::spawn(async move {
            write.write_all(&sent).await.unwrap();
            // The agent hears the end, and still answers.
            write.shutdown().await.unwrap();
        });
        let mut heard = vec![];
        read.read_to_end(&mut heard).await.unwrap();
        writing.await.unwrap();
        assert_eq!(heard, [b"default:".as_slice(), &much].concat());
    }

    #[tokio::test]
    async fn the_end_of_the_agent_is_seen() {
        let (_client, group) = group().await;
        let mut agent = group.connect("rude").await.unwrap();
        let mut heard = String::new();
        agent.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "rude:");
    }

    #[tokio::test]
    async fn whoever_connects_may_speak_first() {
        let (_client, group) = group().await;
        let mut agent = group.connect("shy").await.unwrap();
        agent.write_all(b"hello").await.unwrap();
        let mut heard = [0; 5];
        agent.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"hello");
        let mut silent = group.connect("shy").await.unwrap();
        silent.shutdown().await.unwrap();
        let error = silent.read(&mut heard).await.unwrap_err();
        assert!(error.to_string().contains("silence"), "{error}");
    }

    #[tokio::test]
    async fn an_agent_that_is_not_there_is_told_from_one_that_fails() {
        let (client, group) = group().await;
        assert!(!group.check("work").await.unwrap());
        let error = group.connect("work").await.err().unwrap();
        assert_eq!(
            error.to_string(),
            "cannot use SSH agent \"work\" of the client: the client does not forward it; build with --ssh"
        );
        let session = group.first().await.unwrap();
        drop(client);
        session.closed().await;
        assert!(session.check_agent("").await.is_err());
        assert!(has_agent(&session, "").await.is_err());
    }
}
