//! Serves gRPC services on connections that exist already: a socket that was accepted, a tunnel, the standard streams of
//! a container.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tower_service::Service;

/// Headers of one call. Patterns of a context and details of errors travel in them.
pub const HEADER_BYTES: u32 = 1024 * 1024;

/// What may be on its way to us in one stream. A whole session is one stream.
const STREAM_WINDOW: u32 = 4 * 1024 * 1024;

/// What may be on its way to us in one connection. Half of it is what small messages that wait may cost, at 256 bytes each,
/// before a connection is taken for an attack: enough for a stream full of them.
const CONNECTION_WINDOW: u32 = 64 * 1024 * 1024;

/// What is read from a connection at once. Without this it is 8 KiB, and a client that sends files makes as many wake-ups.
const AT_ONCE: usize = 128 * 1024;

/// Calls at the same time on one connection.
const STREAMS: u32 = 4096;

type Route =
    Arc<dyn Fn(http::Request<Body>) -> BoxFuture<'static, http::Response<Body>> + Send + Sync>;

/// gRPC services by name. Cheap to clone.
#[derive(Clone, Default)]
pub struct Router {
    routes: BTreeMap<&'static str, Route>,
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.routes.keys()).finish()
    }
}

impl Router {
    /// A router without services.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a service: one of the generated servers. A service of the same name is replaced.
    #[must_use]
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        let route: Route = Arc::new(move |request| {
            // Generated servers are always ready.
            let answer = service.clone().call(request);
            answer.map(|Ok(response): Result<_, Infallible>| response).boxed()
        });
        self.routes.insert(S::NAME, route);
        self
    }

    /// Answers one call.
    pub fn answer(&self, request: http::Request<Body>) -> BoxFuture<'static, http::Response<Body>> {
        let path = request.uri().path();
        let name = path.trim_start_matches('/').rsplit_once('/').map_or("", |(name, _)| name);
        match self.routes.get(name) {
            Some(route) => route(request),
            None => {
                let status = Status::unimplemented(format!("unknown service {name}"));
                std::future::ready(status.into_http()).boxed()
            }
        }
    }

    /// Serves a connection that speaks HTTP/2 from its first byte, until the peer closes it, it breaks, or `stop`
    /// resolves; then calls that run are finished and no new ones taken.
    ///
    /// # Errors
    /// When the connection breaks or the peer does not speak HTTP/2.
    pub async fn serve<I>(
        &self,
        io: I,
        stop: impl Future<Output = ()> + Send,
    ) -> Result<(), hyper::Error>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let router = self.clone();
        let service = service_fn(move |request: http::Request<Incoming>| {
            let answer = router.answer(request.map(Body::new));
            async move { Ok::<_, Infallible>(answer.await) }
        });
        let connection = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(HEADER_BYTES)
            .serve_connection(TokioIo::new(BufReader::with_capacity(AT_ONCE, io)), service);
        tokio::pin!(connection);
        tokio::select! {
            ended = &mut connection => return ended,
            () = stop => connection.as_mut().graceful_shutdown(),
        }
        connection.await
    }
}

#[cfg(test)]
mod tests {
    use slipway_spec::wire::health::HealthCheckRequest;
    use slipway_spec::wire::health::health_client::HealthClient;
    use tonic::Code;

    use super::*;
    use crate::channel::Channel;
    use tokio_util::sync::CancellationToken;

    #[tokio::test]
    async fn a_service_that_is_not_there_is_unimplemented() {
        let (ours, theirs) = tokio::io::duplex(1024);
        let server =
            tokio::spawn(async move { Router::new().serve(theirs, std::future::pending()).await });
        let ended = CancellationToken::new();
        let (channel, connection) = Channel::open(ours, ended.clone()).await.unwrap();
        let connection = tokio::spawn(connection);
        let status =
            HealthClient::new(channel).check(HealthCheckRequest::default()).await.unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented);
        assert_eq!(status.message(), "unknown service grpc.health.v1.Health");
        ended.cancel();
        connection.abort();
        server.await.unwrap().unwrap();
    }
}
