//! Results that the daemon sends: as one stream of bytes, or file by file into a folder.

mod receive;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use futures::StreamExt as _;
use futures::future::{BoxFuture, Either};
use futures::stream::{self, BoxStream};
use slipway_spec::wire::filesync::BytesMessage;
use slipway_spec::wire::fsutil::Packet;
use slipway_store::blocking;
use slipway_transport::packet;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

/// The header that says which export a result is of.
const EXPORTER_ID: &str = "buildkit-attachable-exporter-id";

/// Messages that wait to be written, of up to 4 MiB each.
const WAITING: usize = 4;

/// Where a stream of bytes goes. What is dropped before it is finished must leave nothing behind.
pub trait OutputStream: Send {
    /// Opens the output, once. What is written may block.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn open(&mut self) -> io::Result<&mut dyn Write>;

    /// Completes the output, also one that was not opened. Blocks.
    ///
    /// # Errors
    /// When it cannot be completed.
    fn finish(self: Box<Self>) -> io::Result<()>;
}

/// Where a result goes.
pub enum Destination {
    /// Into a folder, which is made if it is not there; what is in it stays unless it is overwritten.
    Folder(PathBuf),
    /// Into a stream, once.
    Stream(Mutex<Option<Box<dyn OutputStream>>>),
}

impl Destination {
    /// Makes a destination of a stream.
    pub fn stream(output: Box<dyn OutputStream>) -> Self {
        Self::Stream(Mutex::new(Some(output)))
    }
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => f.debug_tuple("Folder").field(path).finish(),
            Self::Stream(_) => f.debug_tuple("Stream").finish_non_exhaustive(),
        }
    }
}

/// Answers `moby.filesync.v1.FileSend`, whose one call carries messages of two types: which one is up to the export.
#[derive(Clone)]
pub(super) struct FileSendService(Arc<BTreeMap<usize, Destination>>);

impl FileSendService {
    pub(super) fn new(outputs: BTreeMap<usize, Destination>) -> Self {
        Self(Arc::new(outputs))
    }
}

impl NamedService for FileSendService {
    const NAME: &'static str = "moby.filesync.v1.FileSend";
}

/// An id that is missing or none stands for the first export.
fn exporter(headers: &http::HeaderMap) -> usize {
    let id = headers.get(EXPORTER_ID).and_then(|id| id.to_str().ok());
    id.and_then(|id| id.parse().ok()).unwrap_or(0)
}

impl tonic::codegen::Service<http::Request<Body>> for FileSendService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let outputs = self.0.clone();
        Box::pin(async move {
            if request.uri().path() != "/moby.filesync.v1.FileSend/DiffCopy" {
                return Ok(Status::unimplemented("no such call").into_http());
            }
            let id = exporter(request.headers());
            Ok(match outputs.get(&id) {
                None => Status::unknown(format!("exporter {id} not found")).into_http(),
                Some(Destination::Folder(path)) => {
                    let codec = ProstCodec::<Packet, Packet>::default();
                    Grpc::new(codec).streaming(IntoFolder(path.clone()), request).await
                }
                Some(Destination::Stream(output)) => {
                    let output = output.lock().unwrap_or_else(PoisonError::into_inner).take();
                    let codec = ProstCodec::<BytesMessage, BytesMessage>::default();
                    Grpc::new(codec).streaming(IntoStream(output), request).await
                }
            })
        })
    }
}

type Answers<M> = BoxStream<'static, Result<M, Status>>;
type Answer<M> = BoxFuture<'static, Result<Response<Answers<M>>, Status>>;

struct IntoStream(Option<Box<dyn OutputStream>>);

impl StreamingService<BytesMessage> for IntoStream {
    type Response = BytesMessage;
    type ResponseStream = Answers<BytesMessage>;
    type Future = Answer<BytesMessage>;

    fn call(&mut self, request: Request<Streaming<BytesMessage>>) -> Self::Future {
        let output = self.0.take();
        Box::pin(async move {
            let output = output.ok_or_else(|| Status::already_exists("target already exists"))?;
            write_stream(output, request.into_inner()).await?;
            Ok(Response::new(stream::empty().boxed()))
        })
    }
}

async fn write_stream(
    mut output: Box<dyn OutputStream>,
    mut incoming: Streaming<BytesMessage>,
) -> Result<(), Status> {
    let (pieces, mut queue) = mpsc::channel::<Option<bytes::Bytes>>(WAITING);
    let failed = |error: io::Error| Status::unknown(error.to_string());
    let writing = tokio::task::spawn_blocking(move || {
        let writer = output.open()?;
        loop {
            match queue.blocking_recv() {
                Some(Some(piece)) => writer.write_all(&piece)?,
                Some(None) => break,
                // The stream broke; what was written of it is dropped with the output.
                None => return Ok(()),
            }
        }
        output.finish()
    });
    let broken = loop {
        match incoming.next().await {
            Some(Ok(message)) => {
                if pieces.send(Some(message.data)).await.is_err() {
                    break None;
                }
            }
            Some(Err(status)) => break Some(status),
            None => {
                // When nobody takes it, the error comes below.
                pieces.send(None).await.ok();
                break None;
            }
        }
    };
    drop(pieces);
    let written = writing.await.map_err(|error| Status::internal(error.to_string()))?;
    written.map_err(failed)?;
    broken.map_or(Ok(()), Err)
}

struct IntoFolder(PathBuf);

impl StreamingService<Packet> for IntoFolder {
    type Response = Packet;
    type ResponseStream = Answers<Packet>;
    type Future = Answer<Packet>;

    fn call(&mut self, request: Request<Streaming<Packet>>) -> Self::Future {
        let folder = self.0.clone();
        Box::pin(async move { Ok(Response::new(into_folder(folder, request).boxed())) })
    }
}

fn into_folder(
    folder: PathBuf,
    request: Request<Streaming<Packet>>,
) -> impl futures::Stream<Item = Result<Packet, Status>> + Send + 'static {
    // Room for a request of each file that is asked for at the same time, and what is said at the end.
    let (outgoing, queue) = mpsc::channel(receive::OPEN_FILES + 8);
    let (packets, incoming) = mpsc::channel(WAITING);
    let receiving = async move {
        let mut stream = request.into_inner();
        let farewell = outgoing.clone();
        let forward = async {
            while let Some(packet) = stream.next().await {
                let broken = packet.is_err();
                if packets.send(packet).await.is_err() || broken {
                    break;
                }
            }
            drop(packets);
        };
        let receive = blocking::run(move || receive::receive(&folder, incoming, &outgoing));
        // Daemons need not end what they send before the answer has come.
        let received = match futures::future::select(pin!(receive), pin!(forward)).await {
            Either::Left((received, _)) => received,
            Either::Right(((), receive)) => receive.await,
        };
        if let Err(error) = &received {
            farewell.send(packet::failure(&error.to_string())).await.ok();
        }
        received
    };
    let receiving = AbortOnDropHandle::new(tokio::spawn(receiving));
    let packets = stream::unfold(queue, |mut queue| async move {
        queue.recv().await.map(|packet| (Ok(packet), queue))
    });
    let outcome = stream::once(receiving).filter_map(|ended| {
        std::future::ready(match ended {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Err(Status::unknown(error.to_string()))),
            Err(error) => Some(Err(Status::internal(error.to_string()))),
        })
    });
    packets.chain(outcome)
}
