//! What a client offers the daemon while it builds: a stream to the daemon carries HTTP/2 with the roles turned around,
//! and through it the daemon calls the services of this module.

pub mod auth;
pub mod content;
pub mod file_send;
pub mod file_sync;
pub mod secrets;
pub mod ssh;
pub mod upload;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt as _, stream};
use slipway_solver::client::{SecretProvider, SshAgents, Uploads};
use slipway_spec::wire::MESSAGE_BYTES;
use slipway_spec::wire::auth::auth_server::AuthServer;
use slipway_spec::wire::content::content_server::ContentServer;
use slipway_spec::wire::control::BytesMessage;
use slipway_spec::wire::filesync::file_sync_server::FileSyncServer;
use slipway_spec::wire::health::health_server::HealthServer;
use slipway_spec::wire::secrets::secrets_server::SecretsServer;
use slipway_spec::wire::sshforward::ssh_server::SshServer;
use slipway_spec::wire::upload::upload_server::UploadServer;
use slipway_transport::health::Alive;
use slipway_transport::router::Router;
use slipway_transport::tunnel::{Inbound, Tunnel, messages};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::{Request, Status};

use self::auth::{Keychain, RegistryLogin};
use self::content::{ContentFolder, Contents};
use self::file_send::{Destination, FileSendService};
use self::file_sync::{Folder, Folders};
use crate::connection::Connection;
use crate::error::{ClientError, ClientErrorKind};

pub(crate) const SESSION_ID: &str = "x-docker-expose-session-uuid";
const SHARED_KEY: &str = "x-docker-expose-session-sharedkey";
pub(crate) const METHOD: &str = "x-docker-expose-session-grpc-method";

/// How long a daemon may take to end a session of which it was told that it is over.
const FAREWELL: Duration = Duration::from_secs(5);

/// What is offered.
#[derive(Debug, Default)]
pub struct SessionServices {
    /// Folders that builds read, by the name that they have there: `context`, `dockerfile`.
    pub folders: BTreeMap<String, Folder>,
    /// Where results go, by the place of their export in the list.
    pub outputs: BTreeMap<usize, Destination>,
    /// Stores of content by id, such as `local:/path`, `oci:name` and `export`.
    pub stores: BTreeMap<String, ContentFolder>,
    /// Secrets.
    pub secrets: Option<Arc<dyn SecretProvider>>,
    /// SSH agents.
    pub ssh: Option<Arc<dyn SshAgents>>,
    /// Files that are sent under a URL of the host `buildkit-session`.
    pub uploads: Option<Arc<dyn Uploads>>,
    /// Credentials for registries, and who fetches tokens with them.
    pub login: Option<RegistryLogin>,
}

impl SessionServices {
    /// Makes the services, and the list of calls that are answered.
    pub(crate) fn serve(self) -> (Router, Vec<&'static str>) {
        let mut router = Router::new().with(HealthServer::new(Alive));
        let mut methods = vec!["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"];
        if !self.folders.is_empty() {
            router = router.with(FileSyncServer::new(Folders::new(self.folders)));
            methods.push("/moby.filesync.v1.FileSync/DiffCopy");
        }
        if !self.outputs.is_empty() {
            router = router.with(FileSendService::new(self.outputs));
            methods.push("/moby.filesync.v1.FileSend/DiffCopy");
        }
        if !self.stores.is_empty() {
            let server = ContentServer::new(Contents::new(self.stores));
            router = router.with(server.max_decoding_message_size(MESSAGE_BYTES));
            methods.extend([
                "/containerd.services.content.v1.Content/Info",
                "/containerd.services.content.v1.Content/Update",
                "/containerd.services.content.v1.Content/List",
                "/containerd.services.content.v1.Content/Delete",
                "/containerd.services.content.v1.Content/Read",
                "/containerd.services.content.v1.Content/Status",
                "/containerd.services.content.v1.Content/ListStatuses",
                "/containerd.services.content.v1.Content/Write",
                "/containerd.services.content.v1.Content/Abort",
            ]);
        }
        if let Some(secrets) = self.secrets {
            router = router.with(SecretsServer::new(secrets::SecretsService(secrets)));
            methods.push("/moby.buildkit.secrets.v1.Secrets/GetSecret");
        }
        if let Some(agents) = self.ssh {
            router = router.with(SshServer::new(ssh::SshService(agents)));
            methods.extend([
                "/moby.sshforward.v1.SSH/CheckAgent",
                "/moby.sshforward.v1.SSH/ForwardAgent",
            ]);
        }
        if let Some(uploads) = self.uploads {
            router = router.with(UploadServer::new(upload::UploadService(uploads)));
            methods.push("/moby.upload.v1.Upload/Pull");
        }
        if let Some(login) = self.login {
            router = router.with(AuthServer::new(Keychain::new(login)));
            methods.extend([
                "/moby.filesync.v1.Auth/Credentials",
                "/moby.filesync.v1.Auth/FetchToken",
                "/moby.filesync.v1.Auth/GetTokenAuthority",
                "/moby.filesync.v1.Auth/VerifyTokenAuthority",
            ]);
        }
        (router, methods)
    }
}

/// A session with a daemon. Dropping it ends it.
pub struct ClientSession {
    id: String,
    outgoing: futures::channel::mpsc::Sender<bytes::Bytes>,
    server: AbortOnDropHandle<()>,
}

impl std::fmt::Debug for ClientSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientSession").field("id", &self.id).finish_non_exhaustive()
    }
}

impl ClientSession {
    /// Opens a session; `shared_key` is what folders are remembered under from one build to the next.
    ///
    /// # Errors
    /// When the daemon refuses it.
    pub async fn open(
        connection: &Connection,
        shared_key: &str,
        services: SessionServices,
    ) -> Result<Self, ClientError> {
        let id = new_id()?;
        let (router, methods) = services.serve();
        let mut metadata = MetadataMap::new();
        let header = |text: &str| {
            text.parse::<AsciiMetadataValue>().map_err(|_| {
                let what = format!("{text:?} cannot be sent in a header");
                ClientError::new(ClientErrorKind::Local, what)
            })
        };
        metadata.insert(SESSION_ID, header(&id)?);
        metadata.insert(SHARED_KEY, header(shared_key)?);
        for method in methods {
            metadata.append(METHOD, header(method)?);
        }
        let (outgoing, sent) = messages();
        let mut call = Request::new(sent.map(|data| BytesMessage { data }));
        *call.metadata_mut() = metadata;
        let mut control = connection.control();
        let tried = "the builder refuses the session";
        let answer =
            control.session(call).await.map_err(|status| ClientError::call(tried, &status))?;
        let received = answer.into_inner().map(|message| message.map(|message| message.data));
        let io = Tunnel::new(Inbound::new(received), outgoing.clone());
        let server: JoinHandle<()> = tokio::spawn(async move {
            if let Err(error) = router.serve(io, std::future::pending()).await {
                let why = std::error::Error::source(&error).map(ToString::to_string);
                tracing::debug!(%error, why, "the session broke");
            }
        });
        Ok(Self { id, outgoing, server: AbortOnDropHandle::new(server) })
    }

    /// Returns the id, by which a build names the session.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Tells the daemon that the session is over, and waits until it has taken notice.
    pub async fn close(mut self) {
        self.outgoing.close_channel();
        // A daemon that does not care finds the connection closed soon enough.
        drop(tokio::time::timeout(FAREWELL, &mut self.server).await);
    }
}

/// Makes an id that nobody else has: 25 letters and digits, as BuildKit's are.
///
/// # Errors
/// When the system has no random numbers.
pub fn new_id() -> Result<String, ClientError> {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut bytes = [0; 25];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(
        |error| {
            ClientError::new(ClientErrorKind::Local, "cannot get random numbers").because(error)
        },
    )?;
    Ok(bytes.iter().map(|byte| char::from(DIGITS[usize::from(*byte) % DIGITS.len()])).collect())
}

/// Reads to the end, in pieces of this many bytes but for the last.
fn pieces(
    reader: impl AsyncRead + Send + Unpin,
    size: usize,
) -> impl Stream<Item = Result<Bytes, Status>> + Send {
    stream::try_unfold(reader, move |mut reader| async move {
        let mut piece = BytesMut::with_capacity(size);
        while piece.len() < size {
            let read = reader.read_buf(&mut piece).await;
            if read.map_err(|error| Status::unknown(error.to_string()))? == 0 {
                break;
            }
        }
        Ok((!piece.is_empty()).then(|| (piece.freeze(), reader)))
    })
}
