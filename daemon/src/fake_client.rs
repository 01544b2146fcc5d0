//! A client in the same process: it opens a session as buildx does, and serves what a test gives it.

use std::convert::Infallible;
use std::fmt;

use futures::channel::mpsc;
use futures::{StreamExt as _, stream};
use slipway_spec::wire::control::BytesMessage;
use slipway_spec::wire::control::control_client::ControlClient;
use slipway_spec::wire::health::health_server::HealthServer;
use slipway_transport::health::Alive;
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::server::NamedService;
use tonic::{Request, Status};
use tower_service::Service;

use crate::router::Router;
use crate::session::channel::Channel;
use crate::session::tunnel::{Inbound, Tunnel, messages};
use crate::session::{METHOD, SESSION_ID, SHARED_KEY, SessionManager};

/// A client that is not connected yet. It answers health checks, unless told otherwise.
#[derive(Clone, Debug)]
pub struct FakeClient {
    router: Router,
    metadata: MetadataMap,
}

impl FakeClient {
    /// A client that opens a session of this id.
    pub fn new(id: &str) -> Self {
        let client = Self { router: Router::new(), metadata: MetadataMap::new() };
        client.with_header(SESSION_ID, id).with(HealthServer::new(Alive), &[])
    }

    /// Adds a service; `methods` are what the client says it answers, such as `/moby.filesync.v1.FileSync/DiffCopy`.
    #[must_use]
    pub fn with<S>(mut self, service: S, methods: &[&'static str]) -> Self
    where
        S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.router = self.router.with(service);
        for method in methods {
            self.metadata.append(METHOD, tonic::metadata::MetadataValue::from_static(method));
        }
        self
    }

    /// Sets the key under which folders of the client are remembered.
    #[must_use]
    pub fn with_shared_key(self, key: &str) -> Self {
        self.with_header(SHARED_KEY, key)
    }

    /// Sets a header of the call that opens the session.
    ///
    /// # Panics
    /// When the value cannot be one.
    #[must_use]
    pub fn with_header(mut self, name: &'static str, value: &str) -> Self {
        self.metadata.insert(name, value.parse().expect("a header is printable ASCII"));
        self
    }

    /// Opens the session.
    ///
    /// # Panics
    /// When the daemon refuses.
    pub async fn connect(self, manager: &SessionManager) -> FakeConnection {
        let router = self.router.clone();
        self.connect_with(manager, |io| async move {
            // How the connection ends is what tests of the daemon's side look at.
            drop(router.serve(io, std::future::pending()).await);
        })
        .await
    }

    /// Opens the session with a call of `Control.Session`, as real clients do.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub async fn connect_over(self, channel: Channel) -> Result<FakeConnection, Status> {
        let (to_daemon, sent) = messages();
        let mut call = Request::new(sent.map(|data| BytesMessage { data }));
        *call.metadata_mut() = self.metadata;
        let answer = ControlClient::new(channel).session(call).await?.into_inner();
        let (over, ended) = tokio::sync::watch::channel(false);
        let received = answer.map(|message| message.map(|message| message.data));
        let received = received.chain(stream::once(async move {
            over.send_replace(true);
            Err(Status::cancelled("the call has ended"))
        }));
        let io = Tunnel::new(Inbound::new(received), to_daemon.clone());
        let router = self.router;
        let server = tokio::spawn(async move {
            drop(router.serve(io, std::future::pending()).await);
        });
        // A call that breaks takes its connection along: nothing listens for single faults.
        let (faults, _) = mpsc::unbounded();
        Ok(FakeConnection { to_daemon, faults, ended, server })
    }

    /// Opens the session, and leaves it to `serve` what is done with the stream.
    ///
    /// # Panics
    /// When the daemon refuses.
    pub async fn connect_with<F>(
        self,
        manager: &SessionManager,
        serve: impl FnOnce(Tunnel) -> F,
    ) -> FakeConnection
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (to_daemon, sent) = messages();
        let (faults, broken) = mpsc::unbounded();
        let inbound = stream::select(sent.map(|data| Ok(BytesMessage { data })), broken);
        let answer = manager.open(&self.metadata, inbound).await;
        let answer = answer.expect("the daemon takes the session");
        let (over, ended) = tokio::sync::watch::channel(false);
        let received = answer.map(|message| message.map(|message| message.data));
        // Seen here, as the server may have stopped reading before.
        let received = received.chain(stream::once(async move {
            over.send_replace(true);
            Err(Status::cancelled("the call has ended"))
        }));
        let io = Tunnel::new(Inbound::new(received), to_daemon.clone());
        FakeConnection { to_daemon, faults, ended, server: tokio::spawn(serve(io)) }
    }
}

/// A session as its client sees it. Dropping it is as if the client were killed.
pub struct FakeConnection {
    to_daemon: mpsc::Sender<bytes::Bytes>,
    faults: mpsc::UnboundedSender<Result<BytesMessage, Status>>,
    ended: tokio::sync::watch::Receiver<bool>,
    server: JoinHandle<()>,
}

impl fmt::Debug for FakeConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeConnection").finish_non_exhaustive()
    }
}

impl FakeConnection {
    /// Ends what the client sends, and goes on reading: what a client does when its build is over.
    pub fn half_close(&mut self) {
        self.to_daemon.close_channel();
        self.faults.close_channel();
    }

    /// Breaks the stream without an end.
    pub fn vanish(self) {
        drop(self.faults.unbounded_send(Err(Status::cancelled("the client was killed"))));
    }

    /// Resolves when the daemon has ended the call.
    pub async fn ended(&mut self) {
        // An error means that the stream was dropped before its end was seen, which counts.
        drop(self.ended.wait_for(|ended| *ended).await.map(|_| ()));
    }
}

impl Drop for FakeConnection {
    fn drop(&mut self) {
        self.server.abort();
        self.half_close();
    }
}
