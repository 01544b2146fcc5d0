//! A byte stream made of two streams of messages, one for each direction.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use futures::channel::mpsc;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::Status;

/// The largest message that is made. Clients of sessions take 4 MiB.
const CHUNK: usize = 64 * 1024;

/// Messages that wait to be sent. A writer that is faster waits.
const WAITING: usize = 8;

/// Reads what messages carry.
pub struct Inbound {
    messages: Option<BoxStream<'static, Result<Bytes, Status>>>,
    current: Bytes,
}

impl Inbound {
    /// Reads from messages; where they begin means nothing.
    pub fn new(messages: impl Stream<Item = Result<Bytes, Status>> + Send + 'static) -> Self {
        Self { messages: Some(messages.boxed()), current: Bytes::new() }
    }
}

impl fmt::Debug for Inbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbound").field("ended", &self.messages.is_none()).finish_non_exhaustive()
    }
}

impl AsyncRead for Inbound {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.current.is_empty() {
            let Some(messages) = &mut self.messages else { return Poll::Ready(Ok(())) };
            match ready!(messages.poll_next_unpin(context)) {
                Some(Ok(bytes)) => self.current = bytes,
                // A stream is not asked again after its end.
                Some(Err(status)) => {
                    self.messages = None;
                    return Poll::Ready(Err(io::Error::other(status)));
                }
                None => self.messages = None,
            }
        }
        let length = self.current.len().min(into.remaining());
        into.put_slice(&self.current[..length]);
        self.current.advance(length);
        Poll::Ready(Ok(()))
    }
}

/// Returns a sender of messages for a [`Tunnel`], and the messages that it sends.
pub fn messages() -> (mpsc::Sender<Bytes>, mpsc::Receiver<Bytes>) {
    mpsc::channel(WAITING)
}

/// A connection over two streams of messages. What is written is bounded; shutting it down ends the outgoing stream,
/// dropping it ends both.
#[derive(Debug)]
pub struct Tunnel {
    inbound: Inbound,
    outbound: mpsc::Sender<Bytes>,
}

impl Tunnel {
    /// Joins the two directions; see [`messages`].
    pub fn new(inbound: Inbound, outbound: mpsc::Sender<Bytes>) -> Self {
        Self { inbound, outbound }
    }
}

/// The other side does not read any more.
fn broken(_: mpsc::SendError) -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inbound).poll_read(context, into)
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.outbound.poll_ready(context)).map_err(broken)?;
        let length = bytes.len().min(CHUNK);
        self.outbound.start_send(Bytes::copy_from_slice(&bytes[..length])).map_err(broken)?;
        Poll::Ready(Ok(length))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let all: usize = pieces.iter().map(|piece| piece.len()).sum();
        if all == 0 {
            return Poll::Ready(Ok(0));
        }
        ready!(self.outbound.poll_ready(context)).map_err(broken)?;
        let mut message = BytesMut::with_capacity(all.min(CHUNK));
        for piece in pieces {
            let room = CHUNK - message.len();
            message.extend_from_slice(&piece[..piece.len().min(room)]);
        }
        let length = message.len();
        self.outbound.start_send(message.freeze()).map_err(broken)?;
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.outbound.close_channel();
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use futures::stream;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn boundaries_of_messages_do_not_show() {
        let pieces = ["ab", "", "cde", "f"].map(|text| Ok(Bytes::from_static(text.as_bytes())));
        let mut inbound = Inbound::new(stream::iter(pieces));
        let mut four = [0; 4];
        inbound.read_exact(&mut four).await.unwrap();
        assert_eq!(&four, b"abcd");
        let mut rest = String::new();
        inbound.read_to_string(&mut rest).await.unwrap();
        assert_eq!(rest, "ef");
        assert_eq!(inbound.read(&mut four).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn an_error_of_the_stream_is_one_of_the_connection() {
        let pieces = [Ok(Bytes::from_static(b"a")), Err(Status::cancelled("gone"))];
        let mut inbound = Inbound::new(stream::iter(pieces));
        let mut text = String::new();
        let error = inbound.read_to_string(&mut text).await.unwrap_err();
        assert!(error.to_string().contains("gone"), "{error}");
        // It is told once; afterwards the stream is over.
        assert_eq!(inbound.read_to_string(&mut text).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_writer_waits_for_a_reader() {
        let (sender, mut sent) = messages();
        let mut tunnel = Tunnel::new(Inbound::new(stream::pending()), sender);
        let much = vec![7; 4 * 1024 * 1024];
        let mut writing = tokio::spawn(async move {
            tunnel.write_all(&much).await.unwrap();
            tunnel.shutdown().await.unwrap();
        });
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        assert!((&mut writing).now_or_never().is_none());
        let mut read = 0;
        while let Some(bytes) = sent.next().await {
            assert!(bytes.len() <= CHUNK);
            read += bytes.len();
        }
        assert_eq!(read, 4 * 1024 * 1024);
        writing.await.unwrap();
    }

    #[tokio::test]
    async fn pieces_are_gathered_in_order() {
        let (sender, sent) = messages();
        let mut tunnel = Tunnel::new(Inbound::new(stream::pending()), sender);
        let long = vec![b'x'; CHUNK];
        let pieces = [io::IoSlice::new(b"ab"), io::IoSlice::new(b""), io::IoSlice::new(&long)];
        assert_eq!(tunnel.write_vectored(&pieces).await.unwrap(), CHUNK);
        drop(tunnel);
        let sent: Vec<_> = sent.collect().await;
        assert_eq!(sent, [Bytes::from([b"ab".as_slice(), &long[..CHUNK - 2]].concat())]);
    }

    #[tokio::test]
    async fn writing_to_nobody_fails() {
        let (sender, sent) = messages();
        let mut tunnel = Tunnel::new(Inbound::new(stream::pending()), sender);
        drop(sent);
        let error = tunnel.write_all(b"x").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
