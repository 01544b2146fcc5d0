//! A daemon in the same process, and a client that makes the calls that buildx makes, in its order.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use prost::Message as _;
use slipway_engine::{Engine, EngineOptions};
use slipway_spec::wire::MESSAGE_BYTES;
use slipway_spec::wire::content::content_server::ContentServer;
use slipway_spec::wire::control::control_client::ControlClient;
use slipway_spec::wire::control::{
    Exporter, SolveRequest, SolveResponse, StatusRequest, StatusResponse, Vertex,
};
use slipway_spec::wire::filesync::BytesMessage;
use slipway_spec::wire::filesync::file_send_server::{FileSend, FileSendServer};
use slipway_spec::wire::filesync::file_sync_server::{FileSync, FileSyncServer};
use slipway_spec::wire::fsutil::Packet;
use slipway_spec::wire::gateway::llb_bridge_client::LlbBridgeClient;
use slipway_spec::wire::gateway::{self, PingRequest, ReturnRequest, result};
use slipway_spec::wire::rpc;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::{Request, Response, Status, Streaming};

use super::go_sender::{self, Folder};
use super::messages::Connection;
pub(super) use super::messages::{definition, file_op, mkdir, mkfile, result_of, symlink, tagged};
use crate::control::Allowed;
use crate::fake_client::{FakeClient, FakeConnection};
use crate::session::channel::Channel;
use crate::session::content::tests::Stores;
use crate::{Daemon, DaemonOptions};

/// Nothing that is tested takes as long as this.
pub(super) const SOON: Duration = Duration::from_secs(30);

type Messages<M> = Pin<Box<dyn Stream<Item = Result<M, Status>> + Send>>;

/// A daemon over a state folder of its own.
pub(super) struct Rig {
    pub(super) daemon: Daemon,
    pub(super) root: Arc<tempfile::TempDir>,
}

impl Rig {
    pub(super) fn new() -> Self {
        Self::over(Arc::new(tempfile::tempdir().unwrap()), DaemonOptions::default())
    }

    /// A daemon over a folder that another one may have used, or may be using still.
    pub(super) fn over(root: Arc<tempfile::TempDir>, options: DaemonOptions) -> Self {
        let engine = Engine::open(EngineOptions::new(root.path())).unwrap();
        let allowed = Allowed::default();
        let options = DaemonOptions { allowed, ..options };
        Self { daemon: Daemon::new(engine, options).unwrap(), root }
    }

    /// Connects a client.
    pub(super) async fn connect(&self) -> Peer {
        Peer { connection: Connection::open(self.daemon.router().clone()).await }
    }
}

/// A client. Dropping it is as if it were killed.
pub(super) struct Peer {
    connection: Connection,
}

impl Peer {
    /// A client over a connection whose other end somebody serves.
    pub(super) async fn over(connection: tokio::io::DuplexStream) -> Self {
        Self { connection: Connection::over(connection).await }
    }

    pub(super) fn channel(&self) -> Channel {
        self.connection.channel.clone()
    }

    pub(super) fn control(&self) -> ControlClient<Channel> {
        ControlClient::new(self.channel()).max_decoding_message_size(MESSAGE_BYTES)
    }

    pub(super) fn gateway(&self) -> LlbBridgeClient<Channel> {
        LlbBridgeClient::new(self.channel()).max_decoding_message_size(MESSAGE_BYTES)
    }

    /// Opens a session of a client that has these folders.
    pub(super) async fn session(&self, id: &str, folders: &[(&str, Folder)]) -> Session {
        self.session_storing(id, folders, Stores::default()).await
    }

    /// Opens a session of a client that has these folders and content stores.
    pub(super) async fn session_storing(
        &self,
        id: &str,
        folders: &[(&str, Folder)],
        stores: Stores,
    ) -> Session {
        let got = Arc::new(Mutex::new(vec![]));
        let folders =
            folders.iter().map(|(name, folder)| ((*name).to_owned(), folder.clone())).collect();
        let client = FakeClient::new(id)
            .with(
                ContentServer::new(stores).max_decoding_message_size(MESSAGE_BYTES),
                &["/containerd.services.content.v1.Content/Write"],
            )
            .with_shared_key("test")
            .with(
                FileSyncServer::new(Folders { folders }),
                &["/moby.filesync.v1.FileSync/DiffCopy"],
            )
            .with(
                FileSendServer::new(Files { got: got.clone() }),
                &["/moby.filesync.v1.FileSend/DiffCopy"],
            );
        Session { connection: client.connect_over(self.channel()).await.unwrap(), got }
    }

    /// Asks for a build and follows it.
    pub(super) fn begin(&self, request: SolveRequest) -> Begun {
        let status = self.follow(&request.r#ref);
        let mut control = self.control();
        let solve =
            tokio::spawn(async move { control.solve(request).await.map(Response::into_inner) });
        Begun { solve, status }
    }

    /// Reads all that is told of a build.
    pub(super) fn follow(&self, id: &str) -> JoinHandle<Result<Vec<StatusResponse>, Status>> {
        let mut control = self.control();
        let request = StatusRequest { r#ref: id.to_owned() };
        tokio::spawn(async move { control.status(request).await?.into_inner().try_collect().await })
    }

    /// Solves for a build whose frontend is this client.
    pub(super) async fn bridge_solve(
        &self,
        id: &str,
        request: gateway::SolveRequest,
    ) -> Result<gateway::Result, Status> {
        let request = gateway::SolveRequest {
            allow_result_return: true,
            allow_result_array_ref: true,
            ..request
        };
        let answer = self.gateway().solve(tagged(id, request)).await?.into_inner();
        assert_eq!(answer.r#ref, "");
        Ok(answer.result.expect("an answer has a result"))
    }

    /// Says what the result is.
    pub(super) async fn give(
        &self,
        id: &str,
        outcome: Result<gateway::Result, Status>,
    ) -> Result<(), Status> {
        let request = match outcome {
            Ok(result) => ReturnRequest { result: Some(result), error: None },
            Err(status) => {
                let error = rpc::Status {
                    code: status.code().into(),
                    message: status.message().to_owned(),
                    details: details(&status),
                };
                ReturnRequest { result: None, error: Some(error) }
            }
        };
        self.gateway().r#return(tagged(id, request)).await.map(|_| ())
    }

    /// Builds a Dockerfile as buildx does, with a session of its own.
    pub(super) async fn buildx(&self, id: &str, folder: &Folder, wish: Wish<'_>) -> Built {
        let folders = [("context", folder.clone()), ("dockerfile", folder.clone())];
        let name = format!("session-{id}");
        let exporters: Vec<Exporter> =
            wish.outputs.iter().map(|(kind, attrs)| exporter(kind, attrs)).collect();
        let attrs: BTreeMap<String, String> = pairs(wish.attrs);
        let begun = self.begin(SolveRequest {
            r#ref: id.to_owned(),
            session: name.clone(),
            frontend_attrs: attrs.clone(),
            exporter_deprecated: exporters.first().map(|e| e.r#type.clone()).unwrap_or_default(),
            exporter_attrs_deprecated: exporters
                .first()
                .map(|e| e.attrs.clone())
                .unwrap_or_default(),
            exporters,
            ..SolveRequest::default()
        });
        // There is no order among the three.
        let mut session = self.session(&name, &folders).await;
        let pong = self.gateway().ping(tagged(id, PingRequest {})).await.unwrap().into_inner();
        assert_eq!(pong.workers.len(), 1);
        assert!(pong.llb_caps.iter().any(|cap| cap.id == "source.local" && cap.enabled));
        let request = gateway::SolveRequest {
            frontend: "dockerfile.v0".into(),
            frontend_opt: attrs,
            ..gateway::SolveRequest::default()
        };
        let result = self.bridge_solve(id, request).await;
        self.give(id, result.clone()).await.unwrap();
        let response = tokio::time::timeout(SOON, begun.solve).await.unwrap().unwrap();
        session.connection.half_close();
        tokio::time::timeout(SOON, session.connection.ended()).await.unwrap();
        let events = tokio::time::timeout(SOON, begun.status).await.unwrap().unwrap().unwrap();
        let archive = session.got.lock().unwrap().clone();
        Built { result, response, events, archive }
    }
}

/// A build that runs.
pub(super) struct Begun {
    pub(super) solve: JoinHandle<Result<SolveResponse, Status>>,
    pub(super) status: JoinHandle<Result<Vec<StatusResponse>, Status>>,
}

impl Begun {
    /// Waits for the build and for the end of its progress.
    pub(super) async fn end(self) -> (Result<SolveResponse, Status>, Vec<StatusResponse>) {
        let solved = tokio::time::timeout(SOON, self.solve).await.unwrap().unwrap();
        let events = tokio::time::timeout(SOON, self.status).await.unwrap().unwrap().unwrap();
        (solved, events)
    }
}

/// What is asked of a build.
#[derive(Clone, Copy, Default)]
pub(super) struct Wish<'a> {
    pub(super) attrs: &'a [(&'a str, &'a str)],
    pub(super) outputs: &'a [(&'a str, &'a [(&'a str, &'a str)])],
}

/// What came of a build.
pub(super) struct Built {
    pub(super) result: Result<gateway::Result, Status>,
    pub(super) response: Result<SolveResponse, Status>,
    pub(super) events: Vec<StatusResponse>,
    pub(super) archive: Vec<u8>,
}

/// A session of a client.
pub(super) struct Session {
    pub(super) connection: FakeConnection,
    pub(super) got: Arc<Mutex<Vec<u8>>>,
}

struct Folders {
    folders: BTreeMap<String, Folder>,
}

#[async_trait]
impl FileSync for Folders {
    type DiffCopyStream = Messages<Packet>;
    type TarStreamStream = Messages<Packet>;

    async fn diff_copy(
        &self,
        request: Request<Streaming<Packet>>,
    ) -> Result<Response<Messages<Packet>>, Status> {
        let name = request.metadata().get("dir-name").and_then(|name| name.to_str().ok());
        let name = name.unwrap_or_default();
        let Some(folder) = self.folders.get(name).cloned() else {
            return Err(Status::not_found(format!("no access allowed to dir {name:?}")));
        };
        let (answers, mut queue) = mpsc::channel(4);
        tokio::spawn(async move {
            let sent = go_sender::send(&folder, request.into_inner(), answers.clone()).await;
            if let Err(text) = sent {
                answers.send(Err(Status::unknown(text))).await.ok();
            }
        });
        Ok(Response::new(Box::pin(futures::stream::poll_fn(move |context| {
            queue.poll_recv(context)
        }))))
    }

    async fn tar_stream(
        &self,
        _: Request<Streaming<Packet>>,
    ) -> Result<Response<Messages<Packet>>, Status> {
        Err(Status::unimplemented("nobody does"))
    }
}

struct Files {
    got: Arc<Mutex<Vec<u8>>>,
}

#[async_trait]
impl FileSend for Files {
    type DiffCopyStream = Messages<BytesMessage>;

    async fn diff_copy(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Messages<BytesMessage>>, Status> {
        let mut messages = request.into_inner();
        while let Some(message) = messages.next().await {
            self.got.lock().unwrap().extend_from_slice(&message?.data);
        }
        Ok(Response::new(Box::pin(futures::stream::empty())))
    }
}

pub(super) fn pairs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

pub(super) fn exporter(kind: &str, attrs: &[(&str, &str)]) -> Exporter {
    Exporter { r#type: kind.to_owned(), attrs: pairs(attrs) }
}

pub(super) fn details(status: &Status) -> Vec<prost_types::Any> {
    rpc::Status::decode(status.details()).unwrap().details
}

/// The last that was told of each vertex, by name.
pub(super) fn vertices(events: &[StatusResponse]) -> BTreeMap<String, Vertex> {
    let all = events.iter().flat_map(|event| event.vertexes.iter().cloned());
    all.map(|vertex| (vertex.name.clone(), vertex)).collect()
}

/// The one file system of a result.
pub(super) fn single(result: &gateway::Result) -> gateway::Ref {
    match &result.result {
        Some(result::Result::Ref(reference)) => reference.clone(),
        other => panic!("not one file system: {other:?}"),
    }
}
