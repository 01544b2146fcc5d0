//! A writer that another thread writes for.

use std::io::{self, Write};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::JoinHandle;

use bytes::Bytes;

/// Less than this, in bytes, is written in place: a thread costs more.
const ENOUGH: usize = 1 << 20;
/// Bytes handed over at once.
const CHUNK: usize = 256 << 10;
/// Chunks on their way; they bound the memory.
const IN_FLIGHT: usize = 4;

/// Hands what is written to a thread, once there is enough of it. Errors come back with a later write or with
/// [`finish`](Self::finish).
#[derive(Debug)]
pub(crate) struct Behind<W: Write + Send + 'static> {
    state: State<W>,
    buffer: Vec<u8>,
    written: usize,
}

#[derive(Debug)]
enum State<W> {
    Here(W),
    There(Thread<W>),
    Failed,
}

enum Message<W> {
    Chunk(Vec<u8>),
    Call(Call<W>),
}

type Call<W> = Box<dyn FnOnce(&mut W) -> io::Result<()> + Send>;

#[derive(Debug)]
struct Thread<W> {
    chunks: SyncSender<Message<W>>,
    spare: Receiver<Vec<u8>>,
    handle: JoinHandle<io::Result<W>>,
}

impl<W: Write + Send + 'static> Behind<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { state: State::Here(out), buffer: vec![], written: 0 }
    }

    /// Waits until everything is written and returns the writer.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.hand_over()?;
        match std::mem::replace(&mut self.state, State::Failed) {
            State::Here(out) => Ok(out),
            State::There(thread) => thread.end(),
            State::Failed => Err(failed()),
        }
    }

    /// Calls with the writer when all that was written before has reached it; `weight` is how many bytes of work that is.
    pub(crate) fn call(
        &mut self,
        weight: usize,
        call: impl FnOnce(&mut W) -> io::Result<()> + Send + 'static,
    ) -> io::Result<()> {
        if let Some(out) = self.here(weight)? {
            return call(out);
        }
        self.hand_over()?;
        self.send(Message::Call(Box::new(call)))
    }

    /// Writes bytes that need not be copied.
    pub(crate) fn put(&mut self, bytes: Bytes) -> io::Result<()> {
        self.call(bytes.len(), move |out| out.write_all(&bytes))
    }

    /// Returns the writer while there was so little work that it is done in place.
    fn here(&mut self, weight: usize) -> io::Result<Option<&mut W>> {
        if matches!(self.state, State::Here(_)) && self.written + weight > ENOUGH {
            self.start()?;
        }
        self.written += weight;
        match &mut self.state {
            State::Here(out) => Ok(Some(out)),
            State::There(_) => Ok(None),
            State::Failed => Err(failed()),
        }
    }

    fn hand_over(&mut self) -> io::Result<()> {
        let State::There(thread) = &mut self.state else { return Ok(()) };
        if self.buffer.is_empty() {
            return Ok(());
        }
        let next = thread.spare.try_recv().unwrap_or_else(|_| Vec::with_capacity(CHUNK));
        let chunk = std::mem::replace(&mut self.buffer, next);
        self.send(Message::Chunk(chunk))
    }

    fn send(&mut self, message: Message<W>) -> io::Result<()> {
        let State::There(thread) = &mut self.state else { return Err(failed()) };
        if thread.chunks.send(message).is_ok() {
            return Ok(());
        }
        // It ended early, so it has an error to tell.
        match std::mem::replace(&mut self.state, State::Failed) {
            State::There(thread) => Err(thread.end().err().unwrap_or_else(failed)),
            _ => Err(failed()),
        }
    }

    fn start(&mut self) -> io::Result<()> {
        let State::Here(out) = std::mem::replace(&mut self.state, State::Failed) else {
            return Err(failed());
        };
        let (chunks, todo) = mpsc::sync_channel(IN_FLIGHT);
        let (done, spare) = mpsc::sync_channel(IN_FLIGHT);
        let handle = std::thread::Builder::new()
            .name("writer".to_owned())
            .spawn(move || write_all(out, &todo, &done))?;
        self.state = State::There(Thread { chunks, spare, handle });
        Ok(())
    }
}

impl<W> Thread<W> {
    fn end(self) -> io::Result<W> {
        drop(self.chunks);
        self.handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn write_all<W: Write>(
    mut out: W,
    todo: &Receiver<Message<W>>,
    done: &SyncSender<Vec<u8>>,
) -> io::Result<W> {
    while let Ok(message) = todo.recv() {
        match message {
            Message::Chunk(mut chunk) => {
                out.write_all(&chunk)?;
                chunk.clear();
                // One buffer more or less is all that depends on this.
                drop(done.try_send(chunk));
            }
            Message::Call(call) => call(&mut out)?,
        }
    }
    Ok(out)
}

impl<W: Write + Send + 'static> Write for Behind<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(out) = self.here(bytes.len())? {
            out.write_all(bytes)?;
            return Ok(bytes.len());
        }
        let count = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() == CHUNK {
            self.hand_over()?;
        }
        Ok(count)
    }

    /// Does nothing: [`finish`](Self::finish) is what waits.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn failed() -> io::Error {
    io::Error::other("writing failed earlier")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out_in_order() {
        for length in [0, 1, ENOUGH - 1, ENOUGH + 1, ENOUGH + CHUNK, 5 * ENOUGH + 7] {
            let bytes: Vec<u8> = (0..length).map(|n| (n / 7) as u8).collect();
            let mut behind = Behind::new(vec![]);
            for part in bytes.chunks(100_003) {
                behind.write_all(part).unwrap();
            }
            assert!(behind.finish().unwrap() == bytes, "{length}");
        }
    }

    #[test]
    fn calls_and_parts_keep_their_place() {
        let mut behind = Behind::new(vec![]);
        let mut expected = vec![];
        for round in 0..40u8 {
            behind.write_all(&vec![round; 50_000]).unwrap();
            behind.call(0, move |out| out.write_all(&[round; 3])).unwrap();
            behind.put(vec![round; 30_000].into()).unwrap();
            expected.extend(vec![round; 80_003]);
        }
        assert!(behind.finish().unwrap() == expected);
    }

    #[test]
    fn an_error_of_the_thread_is_told() {
        struct Full(usize);
        impl Write for Full {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::StorageFull)?;
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        for room in [10, 2 * ENOUGH] {
            let mut behind = Behind::new(Full(room));
            let written = (0..100).try_for_each(|_| behind.write_all(&[7; 100_000]));
            let outcome = written.and_then(|()| behind.finish().map(drop));
            assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::StorageFull);
        }
    }
}
