//! What a build told of its progress, for every client that asks, also for one that comes late.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use futures::Stream;
use prost_types::Timestamp;
use slipway_spec::Digest;
use slipway_spec::llb::pb;
use slipway_spec::progress::{self, ProgressEvent, ProgressSink};
use slipway_spec::wire::control::{StatusResponse, Vertex, VertexLog, VertexStatus, VertexWarning};
use tokio::sync::watch;

/// What one message carries of logs, in bytes.
const LOG_BYTES: usize = 1 << 20;
/// What is kept of the output of one step, in bytes.
const STEP_LOG_BYTES: usize = 2 << 20;

/// The progress of one build.
#[derive(Debug)]
pub struct Record {
    inner: Mutex<Inner>,
    /// How many items there are, and whether there will be more.
    changed: watch::Sender<(usize, bool)>,
}

#[derive(Debug, Default)]
struct Inner {
    items: Vec<Item>,
    vertices: HashMap<Digest, Vertex>,
    /// When parts of vertices began, by vertex and id.
    parts: HashMap<(Digest, Arc<str>), Timestamp>,
    /// Bytes of the transfers that are done, in the same way.
    transferred: HashMap<(Digest, Arc<str>), u64>,
    /// Bytes of output so far.
    logged: HashMap<Digest, usize>,
    /// The vertex that warnings without one belong to.
    first: Option<Digest>,
}

#[derive(Clone, Debug)]
enum Item {
    Vertex(Vertex),
    Status(VertexStatus),
    Log(VertexLog),
    Warning(VertexWarning),
}

/// A vertex that is not worked on yet.
#[derive(Clone, Debug)]
pub struct Announced {
    /// Its digest.
    pub digest: Digest,
    /// Its name for people.
    pub name: Arc<str>,
    /// What it needs.
    pub inputs: Vec<Digest>,
}

impl Default for Record {
    fn default() -> Self {
        Self { inner: Mutex::default(), changed: watch::Sender::new((0, false)) }
    }
}

fn now() -> Timestamp {
    Timestamp::from(SystemTime::now())
}

impl Record {
    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let value = change(&mut inner);
        let count = inner.items.len();
        drop(inner);
        self.changed.send_modify(|(items, _)| *items = count);
        value
    }

    /// Tells of vertices before work on them begins, so that clients know how many there are.
    pub fn announce(&self, vertices: Vec<Announced>) {
        self.change(|inner| {
            for Announced { digest, name, inputs } in vertices {
                let known = inner.vertices.contains_key(&digest);
                if known {
                    continue;
                }
                let vertex = Vertex {
                    digest: digest.to_string(),
                    name: name.to_string(),
                    inputs: inputs.iter().map(ToString::to_string).collect(),
                    ..Vertex::default()
                };
                inner.put(digest, vertex);
            }
        });
    }

    /// Shows something that a frontend warns of.
    pub fn warn(&self, warning: VertexWarning) {
        self.change(|inner| inner.items.push(Item::Warning(warning)));
    }

    /// Shows how far a transfer of a step is. A step may need several of one name, each of which counts from zero: clients
    /// are told what came in all of them.
    pub fn transfer(&self, vertex: &Digest, id: &str, bytes: u64, done: bool) {
        self.change(|inner| {
            let id: Arc<str> = id.into();
            let before = inner.transferred.entry((vertex.clone(), id.clone())).or_default();
            let bytes = before.saturating_add(bytes);
            if done {
                *before = bytes;
            }
            inner.status(vertex, id, "transferring", (bytes, 0), done);
        });
    }

    /// Says that nothing more will come: what is still under way was given up.
    pub fn end(&self) {
        self.change(|inner| {
            let open: Vec<Digest> = inner
                .vertices
                .iter()
                .filter(|(_, vertex)| vertex.started.is_some() && vertex.completed.is_none())
                .map(|(digest, _)| digest.clone())
                .collect();
            for digest in open {
                inner.update(&digest, None, |vertex| {
                    vertex.completed = Some(now());
                    vertex.error = "context canceled".into();
                });
            }
        });
        self.changed.send_modify(|(_, ended)| *ended = true);
    }

    /// Returns all there was and all that comes, until the end.
    pub fn follow(self: Arc<Self>) -> impl Stream<Item = StatusResponse> + Send {
        let changed = self.changed.subscribe();
        futures::stream::unfold((self, changed, 0), |(record, mut changed, at)| async move {
            let seen = changed.wait_for(|(count, ended)| *count > at || *ended).await.ok()?;
            let (count, _) = *seen;
            drop(seen);
            if count <= at {
                return None;
            }
            let (response, next) = record.response(at);
            Some((response, (record, changed, next)))
        })
    }

    /// Returns what came after an item, as one message, and where the next begins; nothing when that was all so far.
    pub(crate) fn message(&self, from: usize) -> Option<(StatusResponse, usize)> {
        let (message, next) = self.response(from);
        (next > from).then_some((message, next))
    }

    /// Returns what came after an item, as one message, and where the next begins.
    fn response(&self, from: usize) -> (StatusResponse, usize) {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut response = StatusResponse::default();
        let (mut at, mut bytes) = (from, 0);
        while let Some(item) = inner.items.get(at)
            && bytes < LOG_BYTES
        {
            match item.clone() {
                Item::Vertex(vertex) => response.vertexes.push(vertex),
                Item::Status(status) => response.statuses.push(status),
                Item::Log(log) => {
                    bytes += log.msg.len();
                    response.logs.push(log);
                }
                Item::Warning(warning) => response.warnings.push(warning),
            }
            at += 1;
        }
        (response, at)
    }
}

impl Inner {
    fn put(&mut self, digest: Digest, vertex: Vertex) {
        self.first.get_or_insert_with(|| digest.clone());
        self.items.push(Item::Vertex(vertex.clone()));
        self.vertices.insert(digest, vertex);
    }

    fn update(&mut self, digest: &Digest, name: Option<&str>, change: impl FnOnce(&mut Vertex)) {
        let mut vertex = self
            .vertices
            .get(digest)
            .cloned()
            .unwrap_or_else(|| Vertex { digest: digest.to_string(), ..Vertex::default() });
        if let Some(name) = name {
            vertex.name = name.to_owned();
        }
        change(&mut vertex);
        self.put(digest.clone(), vertex);
    }

    fn status(
        &mut self,
        vertex: &Digest,
        id: Arc<str>,
        action: &str,
        (current, total): (u64, u64),
        done: bool,
    ) {
        let now = now();
        let started = *self.parts.entry((vertex.clone(), id.clone())).or_insert(now);
        let number = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        self.items.push(Item::Status(VertexStatus {
            id: id.to_string(),
            vertex: vertex.to_string(),
            name: action.to_owned(),
            current: number(current),
            total: number(total),
            timestamp: Some(now),
            started: Some(started),
            completed: done.then_some(now),
        }));
    }

    fn log(&mut self, vertex: Digest, stream: progress::Stream, data: &[u8]) {
        let logged = self.logged.entry(vertex.clone()).or_default();
        let room = STEP_LOG_BYTES.saturating_sub(*logged);
        let clipped = data.len() > room && room > 0;
        *logged = logged.saturating_add(data.len());
        let mut msg = data[..data.len().min(room)].to_vec();
        if clipped {
            msg.extend_from_slice(b"\n[output clipped, log limit 2MiB reached]\n");
        }
        if msg.is_empty() {
            return;
        }
        let stream = match stream {
            progress::Stream::Stdout => 1,
            progress::Stream::Stderr => 2,
        };
        self.items.push(Item::Log(VertexLog {
            vertex: vertex.to_string(),
            timestamp: Some(now()),
            stream,
            msg: msg.into(),
        }));
    }
}

impl ProgressSink for Record {
    fn send(&self, event: ProgressEvent) {
        self.change(|inner| match event {
            ProgressEvent::Started { vertex, name } => {
                inner.update(&vertex, Some(&name), |vertex| {
                    vertex.started = Some(now());
                    vertex.completed = None;
                });
            }
            ProgressEvent::Cached { vertex, name } => {
                inner.update(&vertex, Some(&name), |vertex| {
                    let now = now();
                    vertex.started.get_or_insert(now);
                    vertex.completed = Some(now);
                    vertex.cached = true;
                });
            }
            ProgressEvent::Done { vertex } => {
                inner.update(&vertex, None, |vertex| vertex.completed = Some(now()));
            }
            ProgressEvent::Failed { vertex, error } => inner.update(&vertex, None, |vertex| {
                vertex.completed = Some(now());
                vertex.error = error.to_string();
            }),
            ProgressEvent::Canceled { vertex } => inner.update(&vertex, None, |vertex| {
                vertex.completed = Some(now());
                vertex.error = "context canceled".into();
            }),
            ProgressEvent::Status { vertex, id, current, total, done } => {
                inner.status(&vertex, id, "", (current, total), done);
            }
            ProgressEvent::Log { vertex, stream, data } => inner.log(vertex, stream, &data),
            ProgressEvent::Warning { warning } => {
                // Clients drop what belongs to no vertex they know.
                let vertex = warning.vertex.clone().or_else(|| inner.first.clone());
                inner.items.push(Item::Warning(to_wire(&warning, vertex)));
            }
        });
    }
}

fn to_wire(warning: &progress::Warning, vertex: Option<Digest>) -> VertexWarning {
    let bytes = |text: &String| text.clone().into_bytes().into();
    let ranges: Vec<pb::Range> = warning.ranges.clone();
    VertexWarning {
        vertex: vertex.map(|vertex| vertex.to_string()).unwrap_or_default(),
        level: warning.level.max(1).into(),
        short: bytes(&warning.short),
        detail: warning.detail.iter().map(bytes).collect(),
        url: warning.url.clone(),
        info: warning.source.clone(),
        ranges,
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;

    use super::*;

    #[tokio::test]
    async fn late_readers_see_everything_and_all_see_the_end() {
        let record = Arc::new(Record::default());
        let vertex = Digest::of(b"v");
        let early = tokio::spawn(record.clone().follow().collect::<Vec<_>>());
        record.send(ProgressEvent::Started { vertex: vertex.clone(), name: "step".into() });
        let data: Arc<[u8]> = b"hello\n".as_slice().into();
        record.send(ProgressEvent::Log {
            vertex: vertex.clone(),
            stream: progress::Stream::Stdout,
            data,
        });
        tokio::task::yield_now().await;
        record.send(ProgressEvent::Done { vertex: vertex.clone() });
        record.send(ProgressEvent::Started { vertex: Digest::of(b"w"), name: "other".into() });
        record.end();
        let late: Vec<StatusResponse> = record.clone().follow().collect().await;
        assert_eq!(late.len(), 1);
        for seen in [early.await.unwrap(), late] {
            let vertices: Vec<Vertex> =
                seen.iter().flat_map(|message| message.vertexes.clone()).collect();
            assert_eq!(vertices.len(), 4);
            assert_eq!(vertices[1].name, "step");
            assert!(vertices[1].completed.is_some() && vertices[1].error.is_empty());
            assert_eq!(vertices[3].error, "context canceled");
            assert_eq!(seen.iter().map(|message| message.logs.len()).sum::<usize>(), 1);
        }
    }

    #[tokio::test]
    async fn transfers_of_one_name_add_up() {
        let record = Arc::new(Record::default());
        let vertex = Digest::of(b"v");
        for (bytes, done) in [(0, false), (300, false), (300, true), (0, false), (2, true)] {
            record.transfer(&vertex, "transferring dockerfile:", bytes, done);
        }
        record.transfer(&vertex, "transferring context:", 7, true);
        record.end();
        let told: Vec<StatusResponse> = record.follow().collect().await;
        let told: Vec<i64> = told
            .iter()
            .flat_map(|message| &message.statuses)
            .map(|status| status.current)
            .collect();
        assert_eq!(told, [0, 300, 300, 300, 302, 7]);
    }

    #[tokio::test]
    async fn output_without_end_is_clipped() {
        let record = Arc::new(Record::default());
        let vertex = Digest::of(b"v");
        for _ in 0..40 {
            let data: Arc<[u8]> = vec![b'x'; 100_000].into();
            let stream = progress::Stream::Stderr;
            record.send(ProgressEvent::Log { vertex: vertex.clone(), stream, data });
        }
        record.end();
        let messages: Vec<StatusResponse> = record.follow().collect().await;
        let bytes: usize = messages.iter().flat_map(|m| &m.logs).map(|log| log.msg.len()).sum();
        assert!((STEP_LOG_BYTES..STEP_LOG_BYTES + 100).contains(&bytes), "{bytes}");
        let last = messages.last().unwrap().logs.last().unwrap();
        assert!(last.msg.ends_with(b"limit 2MiB reached]\n"));
        assert!(
            messages
                .iter()
                .all(|m| m.logs.iter().map(|l| l.msg.len()).sum::<usize>() < 2 * LOG_BYTES)
        );
    }
}
