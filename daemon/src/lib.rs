//! BuildKit's protocols in front of the engine, for unmodified `docker buildx` and `buildctl`.
//!
//! - [`control`] is the main interface, [`gateway`] what a frontend builds with;
//! - [`session`] calls services of the client, through the stream that the client opened for it;
//! - [`builds`] is the table of builds that run, [`record`] what each told of its progress, [`history`] what there was;
//! - [`collector`] looks after disk space; [`content`] and [`trace`] are services beside the main ones;
//! - [`failure`] turns errors into the statuses that clients expect;
//! - [`router`] serves gRPC services on a connection.

pub mod builds;
pub mod capability;
pub mod collector;
pub mod content;
pub mod control;
pub mod failure;
#[cfg(any(test, feature = "testing"))]
pub mod fake_client;
pub mod gateway;
pub mod history;
pub mod listen;
mod memory;
pub mod notify;
pub mod policy;
pub mod record;
pub mod session;
pub mod trace;
pub mod worker;

pub use slipway_transport::router;

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use prost_types::Timestamp;
use slipway_engine::Engine;
use slipway_engine::config::FrontendConfig;
use slipway_engine::config::{GcConfig, HistoryConfig};
use slipway_spec::wire::MESSAGE_BYTES;
use slipway_spec::wire::content::content_server::ContentServer;
use slipway_spec::wire::control::control_server::ControlServer;
use slipway_spec::wire::gateway::llb_bridge_server::LlbBridgeServer;
use slipway_spec::wire::health::health_server::HealthServer;
use slipway_spec::wire::trace::trace_service_server::TraceServiceServer;
use slipway_transport::health::Alive;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::builds::Builds;
use crate::collector::Collector;
use crate::content::ContentService;
use crate::control::{Allowed, ControlService};
use crate::gateway::frontends::FrontendImages;
use crate::gateway::service::GatewayService;
use crate::history::History;
use crate::router::Router;
use crate::session::SessionManager;
use crate::session::file_sync::FileCache;
use crate::trace::Traces;
use crate::worker::WorkerInfo;

/// How long builds may go on when the daemon is to stop.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long connections without a build have to end by themselves.
const IDLE_PATIENCE: Duration = Duration::from_secs(1);

/// How a daemon serves.
#[derive(Clone, Debug, Default)]
pub struct DaemonOptions {
    /// Which frontends builds may use.
    pub frontends: FrontendConfig,
    /// Labels of the worker beside those that every worker has.
    pub labels: BTreeMap<String, String>,
    /// What builds may ask for.
    pub allowed: Allowed,
    /// How long builds are remembered.
    pub history: HistoryConfig,
    /// When the cache is cleaned up.
    pub gc: GcConfig,
}

/// Serves clients of one engine.
#[derive(Clone, Debug)]
pub struct Daemon {
    router: Router,
    builds: Builds,
    collector: Collector,
    history: History,
}

impl Daemon {
    /// Makes a daemon; nothing is served yet.
    ///
    /// # Errors
    /// When the state folder cannot be written.
    pub fn new(engine: Engine, options: DaemonOptions) -> io::Result<Self> {
        let store = engine.store().clone();
        let (sessions, builds) = (SessionManager::new(), Builds::default());
        let files = FileCache::new(store.root().join("local"));
        // Without the size of the disk there are no parts of it.
        let rules = collector::disk(&store).map(|(bytes, _)| options.gc.rules(bytes));
        let rules = rules.unwrap_or_default();
        let collector = Collector::new(store.clone(), files, builds.clone(), rules);
        let traces = Traces::default();
        let folder = store.root().join("history");
        let history = History::open(&folder, options.history, store.clone(), traces.clone())
            .map_err(io::Error::other)?;
        let worker = WorkerInfo::open(store.root(), options.labels)?.with_rules(collector.rules());
        let emulation = engine.executor().emulation().clone();
        let gateway = GatewayService::new(builds.clone(), worker.clone(), emulation);
        let FrontendConfig { gateway: enabled, allowed_repositories, .. } = &options.frontends;
        let frontends = FrontendImages::new(worker.clone())
            .restricted(*enabled, allowed_repositories)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let control = ControlService::new(
            engine,
            sessions,
            builds.clone(),
            worker,
            options.allowed,
            frontends,
            (collector.clone(), history.clone()),
        );
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
            .with(ContentServer::new(ContentService::new(store, history.clone())))
            .with(TraceServiceServer::new(traces).max_decoding_message_size(MESSAGE_BYTES))
            .with(HealthServer::new(Alive));
        Ok(Self { router, builds, collector, history })
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
        let collecting = tokio::spawn(self.collector.clone().run());
        let resting =
            tokio::spawn(memory::keep_small(self.builds.clone(), self.collector.files().clone()));
        let mut tasks = JoinSet::new();
        let serve = |tasks: &mut JoinSet<()>, connection: I| {
            let (router, stopping) = (self.router.clone(), stopping.clone());
            tasks.spawn(async move {
                if let Err(error) = router.serve(connection, stopping.cancelled_owned()).await {
                    tracing::debug!(%error, "a connection broke");
                }
            });
        };
        let (mut connections, mut stop) = (std::pin::pin!(connections), std::pin::pin!(stop));
        let ended = loop {
            tokio::select! {
                () = &mut stop => break Ok(()),
                // What has ended is forgotten at once.
                Some(_) = tasks.join_next() => {}
                next = connections.next() => match next {
                    None => break Ok(()),
                    Some(Err(error)) => break Err(error),
                    Some(Ok(connection)) => serve(&mut tasks, connection),
                },
            }
        };
        // A client whose frontend runs at its own end makes calls until its build has ended, over new connections as well, and
        // one that is told to go away makes no more.
        self.builds.close();
        let mut open = ended.is_ok();
        let mut idle = std::pin::pin!(tokio::time::timeout(PATIENCE, self.builds.idle()));
        let given_up = loop {
            tokio::select! {
                idle = &mut idle => break idle.is_err(),
                Some(_) = tasks.join_next() => {}
                next = connections.next(), if open => match next {
                    Some(Ok(connection)) => serve(&mut tasks, connection),
                    Some(Err(_)) | None => open = false,
                },
            }
        };
        if given_up {
            tracing::info!("builds that still run are given up");
        }
        stopping.cancel();
        let drained = async { while tasks.join_next().await.is_some() {} };
        let patience = async {
            // Who listens to it would stay otherwise.
            self.history.stop().await;
            // Their clients have yet to hear of the result.
            tokio::time::sleep(IDLE_PATIENCE).await;
        };
        tokio::select! {
            () = drained => {}
            () = patience => {}
        }
        tasks.shutdown().await;
        // The calls that were cut off end a moment later, and with them their builds, which are to be remembered.
        drop(tokio::time::timeout(IDLE_PATIENCE, self.builds.idle()).await);
        collecting.abort();
        resting.abort();
        self.history.stop().await;
        ended
    }
}

/// Returns a time in nanoseconds since 1970 as it stands in messages.
pub(crate) fn timestamp(nanos: i64) -> Timestamp {
    Timestamp {
        seconds: nanos.div_euclid(1_000_000_000),
        nanos: i32::try_from(nanos.rem_euclid(1_000_000_000)).unwrap_or(0),
    }
}
