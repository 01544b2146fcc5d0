//! A connection to a daemon: HTTP/2 over a socket, TLS, or the standard streams of a program.

use std::fmt;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use slipway_spec::wire::MESSAGE_BYTES;
use slipway_spec::wire::control::ListWorkersRequest;
use slipway_spec::wire::control::control_client::ControlClient;
use slipway_spec::wire::gateway::llb_bridge_client::LlbBridgeClient;
use slipway_spec::wire::worker::WorkerRecord;
use slipway_transport::channel::Channel;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::process::Command;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::address::{Address, TlsOptions};
use crate::error::{ClientError, ClientErrorKind};

/// How long a daemon may take to be there.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a program may take: it may have to connect, and to ask for a passphrase.
const PROGRAM_PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a daemon. Dropping the last clone closes it.
#[derive(Clone)]
pub struct Connection {
    channel: Channel,
    address: Arc<Address>,
    _guard: Arc<Guard>,
}

struct Guard {
    end: CancellationToken,
    _task: AbortOnDropHandle<()>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("address", &self.address).finish_non_exhaustive()
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Connection {
    /// Connects to a daemon.
    ///
    /// # Errors
    /// When it cannot be reached, or TLS fails.
    pub async fn open(address: &Address, tls: &TlsOptions) -> Result<Self, ClientError> {
        let failed = |why: String| {
            let what = format!("cannot connect to the builder {address}: {why}");
            ClientError::new(ClientErrorKind::Connect, what)
        };
        if tls.is_set() && !matches!(address, Address::Tcp { .. }) {
            let what = format!("TLS is for tcp:// only, and the builder is {address}");
            return Err(ClientError::new(ClientErrorKind::Address, what));
        }
        let io: Box<dyn Stream> = match address {
            Address::Unix(path) => Box::new(
                UnixStream::connect(path).await.map_err(|error| failed(error.to_string()))?,
            ),
            Address::Tcp { host, port } => {
                let dial = TcpStream::connect((host.as_str(), *port));
                let stream = tokio::time::timeout(PATIENCE, dial)
                    .await
                    .map_err(|_| failed(format!("no answer in {} s", PATIENCE.as_secs())))?
                    .map_err(|error| failed(error.to_string()))?;
                // Small messages go back and forth; waiting for more of them costs time.
                stream.set_nodelay(true).map_err(|error| failed(error.to_string()))?;
                if tls.is_set() {
                    Box::new(handshake(stream, host, tls).await.map_err(failed)?)
                } else {
                    Box::new(stream)
                }
            }
            Address::Program { words, .. } => Box::new(Piped::start(words).map_err(|error| {
                failed(format!("{}: {error}", words.first().map_or("", String::as_str)))
            })?),
        };
        Self::over(io, Arc::new(address.clone())).await
    }

    /// Speaks to a daemon on a connection that exists already.
    ///
    /// # Errors
    /// When the connection is broken.
    pub async fn over<I>(io: I, address: Arc<Address>) -> Result<Self, ClientError>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let end = CancellationToken::new();
        let opened = Channel::open(io, end.clone()).await;
        let (channel, connection) = opened.map_err(|error| {
            let what = format!("cannot connect to the builder {address}");
            ClientError::new(ClientErrorKind::Connect, what).because(error)
        })?;
        let task = AbortOnDropHandle::new(tokio::spawn(connection));
        Ok(Self { channel, address, _guard: Arc::new(Guard { end, _task: task }) })
    }

    /// Returns where the daemon is.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Returns a client of the main interface.
    pub fn control(&self) -> ControlClient<Channel> {
        ControlClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES)
    }

    /// Returns a client of what a frontend builds with.
    pub(crate) fn bridge(&self) -> LlbBridgeClient<Channel> {
        LlbBridgeClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES)
    }

    /// Lists the workers of the daemon, which shows that there is one.
    ///
    /// # Errors
    /// When whoever answers is no build daemon, or nobody does.
    pub async fn workers(&self) -> Result<Vec<WorkerRecord>, ClientError> {
        let patience = if matches!(*self.address, Address::Program { .. }) {
            PROGRAM_PATIENCE
        } else {
            PATIENCE * 4
        };
        let tried = format!("cannot use the builder {}", self.address);
        let mut control = self.control();
        match tokio::time::timeout(patience, control.list_workers(ListWorkersRequest::default()))
            .await
        {
            Ok(Ok(answer)) => Ok(answer.into_inner().record),
            Ok(Err(status)) => Err(ClientError::call(&tried, &status)),
            Err(_) => {
                let what = format!("{tried}: no answer in {} s", patience.as_secs());
                Err(ClientError::new(ClientErrorKind::Connect, what))
            }
        }
    }
}

/// The standard streams of a program. Dropping them ends it.
struct Piped {
    _process: tokio::process::Child,
    from: tokio::process::ChildStdout,
    to: tokio::process::ChildStdin,
}

impl Piped {
    fn start(words: &[String]) -> io::Result<Self> {
        let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut process = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // A Ctrl-C is for this program, which then ends that one.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        let from = process.stdout.take().ok_or_else(broken)?;
        let to = process.stdin.take().ok_or_else(broken)?;
        Ok(Self { _process: process, from, to })
    }
}

impl AsyncRead for Piped {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        into: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.from).poll_read(context, into)
    }
}

impl AsyncWrite for Piped {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::pin::Pin::new(&mut self.to).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.to).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.to).poll_shutdown(context)
    }
}

async fn handshake(
    stream: TcpStream,
    host: &str,
    options: &TlsOptions,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, String> {
    let name = options.server_name.as_deref().unwrap_or(host);
    let name = ServerName::try_from(name.to_owned())
        .map_err(|_| format!("{name:?} cannot be the name of a certificate"))?;
    let connector = TlsConnector::from(Arc::new(config(options)?));
    let shaking = connector.connect(name, stream);
    match tokio::time::timeout(PATIENCE, shaking).await {
        Ok(done) => done.map_err(|error| format!("TLS failed: {error}")),
        Err(_) => Err(format!("TLS took more than {} s", PATIENCE.as_secs())),
    }
}

fn config(options: &TlsOptions) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    match &options.ca {
        Some(ca) => {
            for certificate in certificates(ca)? {
                roots.add(certificate).map_err(|error| bad_file(ca, &error))?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    let provider = Arc::new(crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let mut config = match (&options.cert, &options.key) {
        (Some(cert), Some(key)) => {
            let secret =
                PrivateKeyDer::from_pem_file(key).map_err(|error| bad_file(key, &error))?;
            builder
                .with_client_auth_cert(certificates(cert)?, secret)
                .map_err(|error| bad_file(cert, &error))?
        }
        (None, None) => builder.with_no_client_auth(),
        (Some(_), None) => return Err("there is a certificate, but no key; give --tlskey".into()),
        (None, Some(_)) => return Err("there is a key, but no certificate; give --tlscert".into()),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn bad_file(file: &Path, error: &dyn fmt::Display) -> String {
    format!("cannot use {}: {error}", file.display())
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let found =
        CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match found {
        Ok(found) if found.is_empty() => Err(bad_file(file, &"it holds no certificate")),
        Ok(found) => Ok(found),
        Err(error) => Err(bad_file(file, &error)),
    }
}
