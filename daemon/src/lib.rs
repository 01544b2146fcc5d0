//! BuildKit's protocols in front of the engine, for unmodified `docker buildx` and `buildctl`.
//!
//! - [`control`] is the main interface, [`gateway`] what a frontend builds with;
//! - [`session`] calls services of the client, through the stream that the client opened for it;
//! - [`builds`] is the table of builds that run, [`record`] what each told of its progress;
//! - [`failure`] turns errors into the statuses that clients expect;
//! - [`router`] serves gRPC services on a connection.

pub mod builds;
pub mod capability;
pub mod control;
pub mod failure;
#[cfg(any(test, feature = "testing"))]
pub mod fake_client;
pub mod gateway;
pub mod health;
pub mod listen;
pub mod notify;
pub mod record;
pub mod router;
pub mod session;
pub mod worker;

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use slipway_engine::Engine;
use slipway_spec::wire::MESSAGE_BYTES;
use slipway_spec::wire::control::control_server::ControlServer;
use slipway_spec::wire::gateway::llb_bridge_server::LlbBridgeServer;
use slipway_spec::wire::health::health_server::HealthServer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::builds::Builds;
use crate::control::{Allowed, ControlService};
use crate::gateway::service::GatewayService;
use crate::health::Alive;
use crate::router::Router;
use crate::session::SessionManager;
use crate::worker::WorkerInfo;

/// How long builds may go on when the daemon is to stop.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long connections without a build have to end by themselves.
const IDLE_PATIENCE: Duration = Duration::from_secs(1);

/// How a daemon serves.
#[derive(Clone, Debug, Default)]
pub struct DaemonOptions {
    /// Labels of the worker beside those that every worker has.
    pub labels: BTreeMap<String, String>,
    /// What builds may ask for.
    pub allowed: Allowed,
}

/// Serves clients of one engine.
#[derive(Clone, Debug)]
pub struct Daemon {
    router: Router,
    builds: Builds,
}

impl Daemon {
    /// Makes a daemon; nothing is served yet.
    ///
    /// # Errors
    /// When the state folder cannot be written.
    pub fn new(engine: Engine, options: DaemonOptions) -> io::Result<Self> {
        let worker = WorkerInfo::open(engine.store().root(), options.labels)?;
        let (sessions, builds) = (SessionManager::new(), Builds::default());
        let emulation = engine.executor().emulation().clone();
        let gateway = GatewayService::new(builds.clone(), worker.clone(), emulation);
        let allowed = options.allowed;
        let control = ControlService::new(engine, sessions, builds.clone(), worker, allowed);
        let router = Router::new()
            .with(
                ControlServer::new(control)
                    .max_decoding_message_size(MESSAGE_BYTES)
                    .max_encoding_message_size(MESSAGE_BYTES),
            )
            .with(
                LlbBridgeServer::new(gateway)
                    .max_decoding_message_size(MESSAGE_BYTES)
                    .max_encoding_message_size(MESSAGE_BYTES),
            )
            .with(HealthServer::new(Alive));
        Ok(Self { router, builds })
    }

    /// Returns the services, for those who have connections of their own.
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// Serves connections until `stop` resolves; builds that run then may go on for [`PATIENCE`].
    ///
    /// # Errors
    /// When no more connections can be taken.
    pub async fn serve<I>(
        &self,
        connections: impl Stream<Item = io::Result<I>> + Send,
        stop: impl Future<Output = ()> + Send,
    ) -> io::Result<()>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let stopping = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let (mut connections, mut stop) = (std::pin::pin!(connections), std::pin::pin!(stop));
        let ended = loop {
            tokio::select! {
                () = &mut stop => break Ok(()),
                // What has ended is forgotten at once.
                Some(_) = tasks.join_next() => {}
                next = connections.next() => match next {
                    None => break Ok(()),
                    Some(Err(error)) => break Err(error),
                    Some(Ok(connection)) => {
                        let (router, stopping) = (self.router.clone(), stopping.clone());
                        tasks.spawn(async move {
                            let served = router.serve(connection, stopping.cancelled_owned()).await;
                            if let Err(error) = served {
                                tracing::debug!(%error, "a connection broke");
                            }
                        });
                    }
                },
            }
        };
        stopping.cancel();
        let drained = async { while tasks.join_next().await.is_some() {} };
        let patience = async {
            if tokio::time::timeout(PATIENCE, self.builds.idle()).await.is_err() {
                tracing::info!("builds that still run are given up");
            }
            // Their clients have yet to hear of the result.
            tokio::time::sleep(IDLE_PATIENCE).await;
        };
        tokio::select! {
            () = drained => {}
            () = patience => {}
        }
        tasks.shutdown().await;
        ended
    }
}

/// Returns an id that nobody else will make: 25 letters and digits, as BuildKit's are.
pub(crate) fn new_id() -> String {
    const LETTERS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut bytes = [0u8; 25];
    // The kernel has randomness from the moment that it starts programs.
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    debug_assert_eq!(filled, Ok(bytes.len()));
    bytes.iter().map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()])).collect()
}
