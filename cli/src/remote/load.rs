//! An image that a daemon sends, on its way into the store of this machine.

use std::io::{self, Read, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use slipway_client::session::file_send::OutputStream;

use crate::client::open_engine;
use crate::command::Context;
use crate::failure::Failure;

/// Pieces that wait to be taken in.
const WAITING: usize = 4;

enum Piece {
    Data(Vec<u8>),
    End,
}

/// The store that an image is loaded into. It is open as long as this lives.
#[derive(Debug)]
pub(super) struct Loading {
    _engine: slipway_engine::Engine,
}

impl Loading {
    /// Opens the store, and returns what the image is written to.
    ///
    /// # Errors
    /// When the store cannot be opened.
    pub(super) fn start(context: &Context) -> Result<(Self, LoadStream), Failure> {
        let engine = open_engine(context)?;
        let (pieces, queue) = sync_channel(WAITING);
        let store = engine.store().clone();
        let worker = std::thread::Builder::new().name("load".into()).spawn(move || {
            let archive = Archive { queue, piece: vec![], at: 0, ended: false };
            let loaded = store.load(Box::new(archive));
            loaded.map(drop).map_err(io::Error::other)
        });
        let worker =
            worker.map_err(|error| Failure::new(format!("cannot load the image: {error}")))?;
        Ok((Self { _engine: engine }, LoadStream { pieces: Some(pieces), worker: Some(worker) }))
    }
}

/// What an archive is written to. One that is dropped before it is finished is not loaded.
pub(super) struct LoadStream {
    pieces: Option<SyncSender<Piece>>,
    worker: Option<JoinHandle<io::Result<()>>>,
}

impl LoadStream {
    fn send(&mut self, piece: Piece) -> io::Result<()> {
        let sent = self.pieces.as_ref().is_some_and(|pieces| pieces.send(piece).is_ok());
        // When nobody takes it any more, loading has failed.
        if sent { Ok(()) } else { self.end().and(Err(io::ErrorKind::BrokenPipe.into())) }
    }

    /// Waits for the outcome.
    fn end(&mut self) -> io::Result<()> {
        self.pieces = None;
        let worker = self.worker.take().ok_or(io::ErrorKind::BrokenPipe)?;
        worker.join().unwrap_or_else(|_| Err(io::Error::other("loading the image broke")))
    }
}

impl Write for LoadStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(Piece::Data(bytes.to_vec()))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl OutputStream for LoadStream {
    fn open(&mut self) -> io::Result<&mut dyn Write> {
        Ok(self)
    }

    fn finish(mut self: Box<Self>) -> io::Result<()> {
        self.send(Piece::End)?;
        self.end()
    }
}

/// An archive as it comes.
struct Archive {
    queue: Receiver<Piece>,
    piece: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Read for Archive {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() {
            if self.ended {
                return Ok(0);
            }
            match self.queue.recv() {
                Ok(Piece::Data(piece)) => (self.piece, self.at) = (piece, 0),
                Ok(Piece::End) => self.ended = true,
                // Not an end, as half of an image is none.
                Err(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        let rest = self.piece.get(self.at..).unwrap_or_default();
        let length = rest.len().min(into.len());
        into[..length].copy_from_slice(&rest[..length]);
        self.at += length;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_that_breaks_off_is_not_taken_for_a_whole_one() {
        let (pieces, queue) = sync_channel(WAITING);
        let mut archive = Archive { queue, piece: vec![], at: 0, ended: false };
        let mut writer = LoadStream { pieces: Some(pieces), worker: None };
        writer.write_all(b"half").unwrap();
        drop(writer);
        let mut read = vec![];
        let error = archive.read_to_end(&mut read).unwrap_err();
        assert_eq!((read, error.kind()), (b"half".to_vec(), io::ErrorKind::UnexpectedEof));
    }
}
