//! A result as one stream of bytes that a client puts into a file.

use std::collections::BTreeMap;
use std::fmt;
use std::future::pending;
use std::io::{self, Write};

use base64::Engine as _;
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use serde_json::Value;
use slipway_engine::exporter::OutputSink;
use slipway_spec::wire::filesync::BytesMessage;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tonic::{Code, Request, Status, Streaming};

use super::{METHOD, add_exporter, check_supported};
use crate::session::Session;
use crate::session::file_sync::call::{self, CancelOnDrop};

/// Bytes in one message: clients take no more than 4 MiB.
const MAX_PIECE: usize = 3 << 20;
/// Messages that wait to be sent.
const PIECES: usize = 2;

/// Streams to a client. Its methods block and are called outside of async code.
///
/// A sink that is dropped before it is finished breaks the call off, so that the client does not take half a result for a
/// whole one. A client that has the result already says so, and the rest is then thrown away.
pub struct SessionSink {
    session: Session,
    exporter: usize,
    metadata: BTreeMap<String, String>,
    runtime: Handle,
    open: Option<Output>,
}

impl fmt::Debug for SessionSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionSink").field("exporter", &self.exporter).finish_non_exhaustive()
    }
}

impl SessionSink {
    /// Streams to the client of a session: to the export with this place in the list of those it asked for. `metadata` is
    /// what is known of the result, such as `containerimage.digest`. Must be called where async code runs.
    pub fn new(session: Session, exporter: usize, metadata: BTreeMap<String, String>) -> Self {
        Self { session, exporter, metadata, runtime: Handle::current(), open: None }
    }
}

impl OutputSink for SessionSink {
    fn destination(&self) -> String {
        "the client's output".into()
    }

    fn describe(&mut self, known: &BTreeMap<String, Value>) {
        self.metadata.extend(known.iter().map(|(key, value)| (key.clone(), told(value))));
    }

    fn open(&mut self) -> io::Result<&mut dyn Write> {
        if self.open.is_none() {
            check_supported(&self.session).map_err(io::Error::other)?;
            let mut request = Request::new(());
            add_exporter(request.metadata_mut(), self.exporter).map_err(io::Error::other)?;
            for (key, value) in &self.metadata {
                let key = format!("exporter-md-{}", key.to_ascii_lowercase());
                call::append(request.metadata_mut(), &key, value).map_err(io::Error::other)?;
            }
            let channel = self.session.channel();
            let start = |request| call::call(channel, METHOD, request);
            self.open = Some(Output::start(&self.runtime, request, start));
        }
        match &mut self.open {
            Some(output) => Ok(output),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    fn finish(mut self: Box<Self>) -> io::Result<()> {
        self.open()?;
        self.open.take().map_or(Ok(()), Output::finish)
    }
}

/// Returns what is known of a result as clients expect it: what is more than a text comes as JSON in base64.
pub(crate) fn told(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => base64::engine::general_purpose::STANDARD.encode(other.to_string()),
    }
}

enum Piece {
    Data(Bytes),
    End,
}

/// How the call ended; `None` when the client has it already.
type Ended = Result<Option<()>, Status>;

/// A call under way.
pub(crate) struct Output {
    pieces: mpsc::Sender<Piece>,
    ended: Option<oneshot::Receiver<Ended>>,
    // Taken when the end was sent, after which the call ends by itself.
    cancel: Option<CancelOnDrop>,
    exists: bool,
}

impl Output {
    /// Starts a call with what is written as its body.
    pub(crate) fn start<F>(
        runtime: &Handle,
        request: Request<()>,
        call: impl FnOnce(Request<Body>) -> F,
    ) -> Self
    where
        F: Future<Output = Result<Streaming<BytesMessage>, Status>> + Send + 'static,
    {
        let (pieces, queue) = mpsc::channel(PIECES);
        let (tell, ended) = oneshot::channel();
        let mut request = request.map(|()| body(queue));
        let cancel = CancelOnDrop::new(&mut request);
        let answer = call(request);
        runtime.spawn(async move {
            let end = match drain(answer).await {
                Ok(()) => Ok(Some(())),
                Err(status) if status.code() == Code::AlreadyExists => Ok(None),
                Err(status) => Err(status),
            };
            // Nobody may wait for it any more.
            tell.send(end).ok();
        });
        Self { pieces, ended: Some(ended), cancel: Some(cancel), exists: false }
    }

    /// Ends the stream and waits until the client has it.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        if self.exists {
            return Ok(());
        }
        // When the call has ended, the result below says why.
        self.pieces.blocking_send(Piece::End).ok();
        if let Some(cancel) = self.cancel.take() {
            cancel.disarm();
        }
        self.wait().map(drop)
    }

    /// Waits for the end of the call; `None` when the client has the result already.
    fn wait(&mut self) -> io::Result<Option<()>> {
        let ended = self.ended.take().and_then(|ended| ended.blocking_recv().ok());
        match ended {
            Some(Ok(end)) => Ok(end),
            Some(Err(status)) => Err(io::Error::other(status.message().to_owned())),
            None => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.exists || bytes.is_empty() {
            return Ok(bytes.len());
        }
        let piece = &bytes[..bytes.len().min(MAX_PIECE)];
        if self.pieces.blocking_send(Piece::Data(Bytes::copy_from_slice(piece))).is_ok() {
            return Ok(piece.len());
        }
        match self.wait()? {
            None => self.exists = true,
            Some(()) => {
                let text = "the client stopped reading before the end";
                return Err(io::Error::new(io::ErrorKind::BrokenPipe, text));
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Body = std::pin::Pin<Box<dyn Stream<Item = BytesMessage> + Send>>;

fn body(queue: mpsc::Receiver<Piece>) -> Body {
    Box::pin(futures::stream::unfold(queue, |mut queue| async move {
        match queue.recv().await {
            Some(Piece::Data(data)) => Some((BytesMessage { data }, queue)),
            Some(Piece::End) => None,
            // Ending here would tell the client that it has everything.
            None => pending().await,
        }
    }))
}

async fn drain(
    answer: impl Future<Output = Result<Streaming<BytesMessage>, Status>>,
) -> Result<(), Status> {
    let mut answer = answer.await?;
    while let Some(message) = answer.next().await {
        message?;
    }
    Ok(())
}
