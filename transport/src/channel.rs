//! gRPC calls over a connection that exists already.

use std::fmt;
use std::io;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use http::Uri;
use http::uri::{Authority, Scheme};
use http_body_util::BodyExt as _;
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;
use tower_service::Service;

use crate::router::HEADER_BYTES;

/// What may be on its way to us in one call.
const STREAM_WINDOW: u32 = 2 * 1024 * 1024;

/// What may be on its way to us in all calls; as large as it is for the reason given in [`crate::router`].
const CONNECTION_WINDOW: u32 = 32 * 1024 * 1024;

/// Calls services at the other end of one connection: `HealthClient::new(channel)`. Cheap to clone.
///
/// After the end of the connection, calls fail as unavailable.
#[derive(Clone)]
pub struct Channel {
    sender: SendRequest<Body>,
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("closed", &self.sender.is_closed()).finish()
    }
}

impl Channel {
    /// Speaks HTTP/2 on a connection from its first byte.
    ///
    /// The future that is returned must be polled for calls to go on, and resolves when the connection has ended.
    /// Cancelling `end` closes the connection at once, whatever runs on it.
    ///
    /// # Errors
    /// When the connection is broken already.
    pub async fn open<I>(
        io: I,
        end: CancellationToken,
    ) -> Result<(Self, impl Future<Output = ()> + Send + 'static), hyper::Error>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (sender, connection) = http2::Builder::new(Until(end))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_header_list_size(HEADER_BYTES)
            .handshake(TokioIo::new(io))
            .await?;
        let ended = async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection broke");
            }
        };
        Ok((Self { sender }, ended))
    }
}

/// Runs the parts of a connection until it is ended.
#[derive(Clone, Debug)]
struct Until(CancellationToken);

impl<F> hyper::rt::Executor<F> for Until
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, part: F) {
        let end = self.0.clone();
        tokio::spawn(async move { end.run_until_cancelled(part).await });
    }
}

impl Service<http::Request<Body>> for Channel {
    type Response = http::Response<Body>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        // A connection that has ended says so when it is called, since clients replace the status of one that is not ready.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let mut uri = std::mem::take(request.uri_mut()).into_parts();
        uri.scheme = Some(Scheme::HTTP);
        uri.authority = Some(Authority::from_static("localhost"));
        // Calls have a path, so that this cannot fail; if it did, the peer would answer that there is no such call.
        *request.uri_mut() = Uri::from_parts(uri).unwrap_or_default();
        let answer = self.sender.send_request(request);
        Box::pin(async move {
            let response = answer.await.map_err(|error| status_of(&error))?;
            Ok(response.map(|body| Body::new(body.map_err(|error| status_of(&error)))))
        })
    }
}

/// Says how a call ended that got no answer.
fn status_of(error: &hyper::Error) -> Status {
    let mut why = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        // The text of an error often repeats that of its source.
        let text = error.to_string();
        if !why.contains(&text) {
            why = format!("{why}: {text}");
        }
        if error.downcast_ref::<io::Error>().is_some() {
            break;
        }
        source = error.source();
    }
    Status::unavailable(format!("the connection broke: {why}"))
}
