//! What a build told of its progress, as a blob: messages of the status stream, each after its length in four bytes, lowest
//! first.

use std::collections::HashMap;
use std::io::{self, BufReader, Read};

use prost::Message as _;
use slipway_spec::Digest;
use slipway_spec::wire::control::{StatusResponse, Vertex};

use super::book::{Book, Result};
use crate::record::Record;

/// The type of the blob.
pub(super) const MEDIA_TYPE: &str = "application/vnd.buildkit.status.v0";
/// No message is larger than this; one that says so is damaged.
const MAX_MESSAGE: usize = 16 << 20;

/// A log that was written down.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) steps: Steps,
    /// The steps as they ended.
    pub(super) vertices: Vec<Vertex>,
}

/// What a log says of steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Steps {
    pub(super) total: i32,
    pub(super) cached: i32,
    pub(super) completed: i32,
    pub(super) warnings: i32,
}

/// Counts steps, a message at a time.
#[derive(Debug, Default)]
struct Counter {
    steps: HashMap<String, Vertex>,
    warnings: usize,
}

impl Counter {
    fn add(&mut self, message: &StatusResponse) {
        self.warnings += message.warnings.len();
        for vertex in &message.vertexes {
            let known = self.steps.entry(vertex.digest.clone()).or_default();
            let (cached, completed) = (known.cached, known.completed);
            *known = vertex.clone();
            known.cached |= cached;
            known.completed = known.completed.or(completed);
        }
    }

    fn steps(&self) -> Steps {
        let number = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
        Steps {
            total: number(self.steps.len()),
            cached: number(self.steps.values().filter(|vertex| vertex.cached).count()),
            completed: number(self.steps.values().filter(|v| v.completed.is_some()).count()),
            warnings: number(self.warnings),
        }
    }
}

/// Writes down what a build told so far.
pub(super) fn write(book: &Book, record: &Record) -> Result<Log> {
    let mut blob = book.write_blob()?;
    let (mut at, mut counter) = (0, Counter::default());
    while let Some((message, next)) = record.message(at) {
        counter.add(&message);
        let bytes = message.encode_to_vec();
        // Messages have at most a few megabytes.
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        blob.write(&length.to_le_bytes())?;
        blob.write(&bytes)?;
        at = next;
    }
    let (digest, size) = blob.commit()?;
    let steps = counter.steps();
    Ok(Log { digest, size, steps, vertices: counter.steps.into_values().collect() })
}

/// Reads a log one message at a time.
#[derive(Debug)]
pub(super) struct LogReader<R>(BufReader<R>);

impl<R: Read> LogReader<R> {
    pub(super) fn new(log: R) -> Self {
        Self(BufReader::new(log))
    }
}

impl<R: Read> Iterator for LogReader<R> {
    type Item = io::Result<StatusResponse>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut length = [0; 4];
        match self.0.read_exact(&mut length[..1]) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return None,
            Err(error) => return Some(Err(error)),
        }
        Some(self.0.read_exact(&mut length[1..]).and_then(|()| {
            let damaged = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
            let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
            if length > MAX_MESSAGE {
                return Err(damaged(format!("a message of {length} bytes in a log")));
            }
            let mut bytes = vec![0; length];
            self.0.read_exact(&mut bytes)?;
            StatusResponse::decode(&bytes[..]).map_err(|error| damaged(error.to_string()))
        }))
    }
}

#[cfg(test)]
mod tests {
    use slipway_spec::progress::{ProgressEvent, ProgressSink as _, Stream};

    use super::*;

    #[test]
    fn a_log_round_trips_and_counts_steps() {
        let folder = tempfile::tempdir().unwrap();
        let book = Book::open(folder.path()).unwrap();
        let record = Record::default();
        let vertex = |name: &str| Digest::of(name.as_bytes());
        record.send(ProgressEvent::Started { vertex: vertex("a"), name: "a".into() });
        for _ in 0..3 {
            let data = vec![b'x'; 600_000].into();
            record.send(ProgressEvent::Log { vertex: vertex("a"), stream: Stream::Stdout, data });
        }
        record.send(ProgressEvent::Done { vertex: vertex("a") });
        record.send(ProgressEvent::Cached { vertex: vertex("b"), name: "b".into() });
        record.send(ProgressEvent::Started { vertex: vertex("c"), name: "c".into() });
        let log = write(&book, &record).unwrap();
        assert_eq!(log.steps, Steps { total: 3, cached: 1, completed: 2, warnings: 0 });
        let (file, info) = book.open_blob(&log.digest).unwrap().unwrap();
        assert_eq!(info.size, log.size);
        let messages: Vec<StatusResponse> =
            LogReader::new(file).collect::<io::Result<_>>().unwrap();
        assert!(messages.len() > 1, "logs are split");
        let bytes: usize = messages.iter().flat_map(|m| &m.logs).map(|log| log.msg.len()).sum();
        assert_eq!(bytes, 1_800_000);
    }

    #[test]
    fn damaged_logs_are_errors_and_no_more() {
        let message = StatusResponse::default().encode_to_vec();
        let whole = [&[0u8, 0, 0, 0][..], &message].concat();
        for (bytes, good) in [
            (&[][..], true),
            (&whole, true),
            (&[1, 0][..], false),
            (&[9, 0, 0, 0, 1][..], false),
            (&[255, 255, 255, 255][..], false),
            (&[2, 0, 0, 0, 255, 255][..], false),
        ] {
            assert_eq!(LogReader::new(bytes).all(|found| found.is_ok()), good, "{bytes:?}");
        }
    }
}
