//! Connections: names, proxies, TLS, and one HTTP exchange with its time limits.

use std::fmt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, HOST, PROXY_AUTHORIZATION};
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::client::legacy::{Client, Error as ClientError};
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tower_service::Service;

use super::Progress;
use super::error::{RegistryError, RegistryErrorKind, one_line};
use super::retry::{STALL_BYTES, Timing};
use super::url::{Scheme, Url};

/// How much of a file is read and handed to the connection at once.
const FILE_CHUNK_BYTES: usize = 256 * 1024;

/// How often an upload reports and is checked for being stuck.
const UPLOAD_TICK: Duration = Duration::from_millis(100);

// ---- what is sent -----------------------------------------------------------------------------

/// What goes into a request; can be made afresh for every attempt.
#[derive(Clone)]
pub(crate) enum Payload<'a> {
    Empty,
    Bytes(Bytes),
    File { path: &'a Path, size: u64, progress: Progress<'a> },
}

/// A request body on the wire.
enum Outgoing {
    Bytes(Option<Bytes>),
    File { file: tokio::fs::File, remaining: u64, sent: Arc<AtomicU64>, buffer: BytesMut },
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        match self.get_mut() {
            Self::Bytes(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::File { remaining: 0, .. } => Poll::Ready(None),
            Self::File { file, remaining, sent, buffer } => {
                let wanted =
                    FILE_CHUNK_BYTES.min(usize::try_from(*remaining).unwrap_or(FILE_CHUNK_BYTES));
                buffer.resize(wanted, 0);
                let mut into = ReadBuf::new(buffer);
                match Pin::new(file).poll_read(context, &mut into) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(error))),
                    Poll::Ready(Ok(())) => {}
                }
                let read = into.filled().len();
                if read == 0 {
                    let message = "the file became shorter while it was sent";
                    return Poll::Ready(Some(Err(std::io::Error::new(
                        std::io::ErrorKind::UnexpectedEof,
                        message,
                    ))));
                }
                *remaining -= read as u64;
                sent.fetch_add(read as u64, Ordering::Relaxed);
                Poll::Ready(Some(Ok(Frame::data(buffer.split_to(read).freeze()))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Bytes(bytes) => bytes.is_none(),
            Self::File { remaining, .. } => *remaining == 0,
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match self {
            Self::Bytes(bytes) => bytes.as_ref().map_or(0, |bytes| bytes.len() as u64),
            Self::File { remaining, .. } => *remaining,
        })
    }
}

// ---- connections ------------------------------------------------------------------------------

trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

/// A connection, whatever it is made of.
struct Stream {
    socket: Box<dyn Socket>,
    proxied: bool,
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_read(context, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(context)
    }
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new().proxy(self.proxied)
    }
}

/// Why there is no connection.
#[derive(Debug)]
struct ConnectError {
    message: String,
    /// The other side does not speak TLS, as far as one can tell.
    not_tls: bool,
    transient: bool,
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ConnectError {}

impl ConnectError {
    fn network(error: &(dyn std::error::Error + 'static)) -> Self {
        let message = chain_text(error);
        let transient =
            chain(error).filter_map(|error| error.downcast_ref::<std::io::Error>()).any(|error| {
                use std::io::ErrorKind as Kind;
                // The resolver's "try again" has no kind of its own.
                matches!(
                    error.kind(),
                    Kind::ConnectionReset
                        | Kind::ConnectionAborted
                        | Kind::TimedOut
                        | Kind::Interrupted
                ) || error.to_string().contains("Temporary failure in name resolution")
            });
        Self { message, not_tls: false, transient }
    }

    /// Names the proxy, without its password.
    fn through(self, proxy: &Uri) -> Self {
        let (host, port) = (proxy.host().unwrap_or_default(), proxy.port_u16().unwrap_or(80));
        Self { message: format!("through the proxy {host}:{port}: {}", self.message), ..self }
    }

    fn tls(error: &std::io::Error) -> Self {
        use std::io::ErrorKind as Kind;
        let reason = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match reason {
            Some(rustls::Error::InvalidCertificate(reason)) => Self {
                message: format!(
                    "the certificate is not trusted ({reason:?}); add the authority's certificate to this registry's \
                     configuration, or mark the registry as insecure"
                ),
                not_tls: false,
                transient: false,
            },
            Some(rustls::Error::InvalidMessage(_)) => Self {
                message: "the other side does not speak TLS".into(),
                not_tls: true,
                transient: false,
            },
            Some(reason) => {
                Self { message: format!("TLS: {reason}"), not_tls: false, transient: false }
            }
            // A plain server may hang up on a greeting it cannot read.
            None => Self {
                message: format!("TLS handshake: {error}"),
                not_tls: matches!(
                    error.kind(),
                    Kind::UnexpectedEof | Kind::ConnectionReset | Kind::BrokenPipe
                ),
                transient: true,
            },
        }
    }

    fn timeout(what: &str, limit: Duration, not_tls: bool) -> Self {
        Self {
            message: format!("{what} took longer than {} s", limit.as_secs()),
            not_tls,
            transient: !not_tls,
        }
    }
}

/// Opens connections for one host.
#[derive(Clone)]
struct Connector {
    tcp: HttpConnector,
    tls: Arc<ClientConfig>,
    proxy: Option<Arc<Matcher>>,
    timing: Timing,
}

impl Connector {
    async fn connect(mut self, uri: Uri) -> Result<Stream, ConnectError> {
        let secure = uri.scheme_str() == Some("https");
        let through = self.proxy.as_ref().and_then(|proxy| proxy.intercept(&uri));
        let tcp = match through {
            None => {
                self.tcp.call(uri.clone()).await.map_err(|error| ConnectError::network(&error))?
            }
            Some(proxy) if secure => {
                let mut tunnel = Tunnel::new(proxy.uri().clone(), self.tcp);
                if let Some(auth) = proxy.basic_auth() {
                    tunnel = tunnel.with_auth(auth.clone());
                }
                let tunnel = tunnel.call(with_port(&uri)).await;
                tunnel.map_err(|error| ConnectError::network(&error).through(proxy.uri()))?
            }
            Some(proxy) => {
                let tcp = self
                    .tcp
                    .call(proxy.uri().clone())
                    .await
                    .map_err(|error| ConnectError::network(&error))?;
                return Ok(Stream { socket: Box::new(tcp.into_inner()), proxied: true });
            }
        };
        let tcp = tcp.into_inner();
        if !secure {
            return Ok(Stream { socket: Box::new(tcp), proxied: false });
        }
        let host = uri.host().unwrap_or_default();
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let name = ServerName::try_from(host.to_owned()).map_err(|_| ConnectError {
            message: format!("{host:?} cannot be a server's name"),
            not_tls: false,
            transient: false,
        })?;
        let tls = TlsConnector::from(self.tls)
            .connect(name, tcp)
            .await
            .map_err(|error| ConnectError::tls(&error))?;
        Ok(Stream { socket: Box::new(tls), proxied: false })
    }
}

/// `CONNECT` needs a port even where the URL leaves it out.
fn with_port(uri: &Uri) -> Uri {
    let authority = uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
    if uri.port().is_some() {
        return uri.clone();
    }
    format!("https://{authority}:443/").parse().unwrap_or_else(|_| uri.clone())
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Stream>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ConnectError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move {
            let limit = connector.timing.connect;
            match tokio::time::timeout(limit, connector.connect(uri)).await {
                Ok(result) => result.map(TokioIo::new),
                Err(_) => Err(ConnectError::timeout("connecting", limit, false)),
            }
        })
    }
}

// ---- exchanges --------------------------------------------------------------------------------

/// What speaks to one host: its connections and how they are made.
pub(crate) struct Transport {
    client: Client<Connector, Outgoing>,
    connector: Connector,
    user_agent: HeaderValue,
    timing: Timing,
}

impl Transport {
    pub(crate) fn new(
        tls: Arc<ClientConfig>,
        proxy: Option<Arc<Matcher>>,
        user_agent: HeaderValue,
        timing: Timing,
    ) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(timing.connect));
        tcp.set_keepalive(Some(Duration::from_secs(60)));
        let connector = Connector { tcp, tls, proxy, timing };
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .build(connector.clone());
        Self { client, connector, user_agent, timing }
    }

    /// Finds out whether a port speaks TLS, by greeting it.
    pub(crate) async fn speaks_tls(&self, url: &Url) -> Result<bool, RegistryError> {
        let uri = url.clone().with_scheme(Scheme::Https).to_uri()?;
        let limit = self.timing.probe;
        let result = match tokio::time::timeout(limit, self.connector.clone().connect(uri)).await {
            Ok(result) => result.map(drop),
            Err(_) => Err(ConnectError::timeout("TLS handshake", limit, true)),
        };
        match result {
            Ok(()) => Ok(true),
            Err(error) if error.not_tls => Ok(false),
            Err(error) => Err(unreachable(url, &error)),
        }
    }

    /// Sends one request and waits for the head of its answer.
    pub(crate) async fn send(
        &self,
        method: &Method,
        url: &Url,
        headers: &HeaderMap,
        payload: &Payload<'_>,
    ) -> Result<Response<Incoming>, RegistryError> {
        let sent = Arc::new(AtomicU64::new(0));
        let (body, size) = match payload {
            Payload::Empty => (Outgoing::Bytes(None), 0),
            Payload::Bytes(bytes) => (Outgoing::Bytes(Some(bytes.clone())), 0),
            Payload::File { path, size, .. } => {
                let mut file =
                    tokio::fs::File::open(path).await.map_err(|error| local(url, path, error))?;
                file.set_max_buf_size(FILE_CHUNK_BYTES);
                let buffer = BytesMut::new();
                (Outgoing::File { file, remaining: *size, sent: Arc::clone(&sent), buffer }, *size)
            }
        };
        let uri = url.to_uri()?;
        let mut request = Request::new(body);
        *request.method_mut() = method.clone();
        *request.headers_mut() = headers.clone();
        request.headers_mut().insert(http::header::USER_AGENT, self.user_agent.clone());
        let host = HeaderValue::from_str(url.authority()).map_err(|error| {
            RegistryError::new(RegistryErrorKind::Protocol, url.to_string(), error.to_string())
        })?;
        request.headers_mut().insert(HOST, host);
        if matches!(payload, Payload::Empty) && *method != Method::GET && *method != Method::HEAD {
            // Some registries answer 411 to a POST that does not say it is empty.
            request.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
        }
        if url.scheme() == Scheme::Http
            && let Some(auth) =
                self.connector.proxy.as_ref().and_then(|proxy| proxy.intercept(&uri))
            && let Some(auth) = auth.basic_auth()
        {
            request.headers_mut().insert(PROXY_AUTHORIZATION, auth.clone());
        }
        *request.uri_mut() = uri;

        let answer = self.client.request(request);
        tokio::pin!(answer);
        let mut mark = (0, Instant::now());
        loop {
            tokio::select! {
                result = &mut answer => {
                    if let (Ok(_), Payload::File { progress, size, .. }) = (&result, payload) {
                        progress(sent.load(Ordering::Relaxed).min(*size));
                    }
                    return result.map_err(|error| failed(url, &error));
                }
                () = tokio::time::sleep(UPLOAD_TICK) => {}
            }
            let now_sent = sent.load(Ordering::Relaxed);
            if let Payload::File { progress, .. } = payload {
                progress(now_sent);
            }
            let all_sent = now_sent >= size;
            if now_sent >= mark.0 + STALL_BYTES || (all_sent && now_sent > mark.0) {
                mark = (now_sent, Instant::now());
            }
            let limit = match payload {
                Payload::File { .. } if all_sent => self.timing.commit,
                // The connection is opened within this time, too.
                Payload::File { .. } => self.timing.stall + self.timing.connect,
                Payload::Empty | Payload::Bytes(_) => self.timing.answer,
            };
            if mark.1.elapsed() > limit {
                let waited = limit.as_secs();
                let message =
                    format!("{} did not answer within {waited} s; try again", url.authority());
                return Err(RegistryError::new(
                    RegistryErrorKind::Unreachable,
                    url.to_string(),
                    message,
                )
                .transient());
            }
        }
    }
}

fn local(url: &Url, path: &Path, error: std::io::Error) -> RegistryError {
    let message = format!("cannot read {} to send it: {error}", path.display());
    RegistryError::new(RegistryErrorKind::Local, url.to_string(), message).with_source(error)
}

fn unreachable(url: &Url, error: &ConnectError) -> RegistryError {
    let message = format!("cannot connect to {}: {}", url.authority(), error.message);
    let described = RegistryError::new(RegistryErrorKind::Unreachable, url.to_string(), message);
    if error.transient { described.transient() } else { described }
}

/// Describes an exchange that ended without an answer.
fn failed(url: &Url, error: &ClientError) -> RegistryError {
    if let Some(error) = chain(error).find_map(|error| error.downcast_ref::<ConnectError>()) {
        return unreachable(url, error);
    }
    let broken = chain(error).filter_map(|error| error.downcast_ref::<hyper::Error>()).next();
    if broken.is_some_and(hyper::Error::is_parse) {
        let message = format!("{} does not speak HTTP: {}", url.authority(), chain_text(error));
        return RegistryError::new(RegistryErrorKind::Protocol, url.to_string(), message);
    }
    if broken.is_some_and(hyper::Error::is_user) {
        let message = format!("the upload stopped on this side: {}", chain_text(error));
        return RegistryError::new(RegistryErrorKind::Local, url.to_string(), message);
    }
    let message = format!("the connection to {} broke: {}", url.authority(), chain_text(error));
    RegistryError::new(RegistryErrorKind::Unreachable, url.to_string(), message).transient()
}

fn chain<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

/// Returns what the deepest error says, which is what people can act on, and the one above it.
pub(crate) fn chain_text(error: &(dyn std::error::Error + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    for error in chain(error) {
        let text = error.to_string();
        if !texts.iter().any(|seen| seen.contains(&text)) {
            texts.push(text);
        }
    }
    one_line(&texts[texts.len().saturating_sub(2)..].join(": "))
}
