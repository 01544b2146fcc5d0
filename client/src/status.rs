//! Progress as a daemon tells it, turned into events.
//!
//! A daemon sends whole vertices again whenever something about them changes, and may start one again after it had ended.
//! Vertices of one group are shown as one.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost_types::Timestamp;
use slipway_spec::Digest;
use slipway_spec::progress::{ProgressEvent, ProgressSink, Stream, Warning};
use slipway_spec::wire::control::{StatusResponse, Vertex, VertexLog, VertexStatus, VertexWarning};

/// An end is told after this time: daemons end a vertex when they know its key, and start it again at once to run it.
const SETTLE: Duration = Duration::from_millis(100);

/// Vertices that are remembered; a build with more shows the first ones.
const MAX_VERTICES: usize = 1 << 20;

/// Turns what a daemon tells of one build into events.
#[derive(Debug, Default)]
pub struct StatusTranslator {
    vertices: HashMap<String, Seen>,
    rows: HashMap<Digest, Row>,
    /// Rows that have begun and not ended, in the order in which they began.
    open: Vec<Digest>,
    /// Rows that have ended well, and may start again.
    settling: Vec<(Digest, Instant)>,
    warnings: usize,
}

/// What was last heard of a vertex.
#[derive(Debug)]
struct Seen {
    row: Digest,
    started: Option<Timestamp>,
    ended: bool,
}

/// What is shown of one vertex, or of all of a group.
#[derive(Debug)]
struct Row {
    name: Arc<str>,
    /// Members that run.
    running: usize,
    cached: bool,
    error: Option<String>,
}

impl StatusTranslator {
    /// Returns how many warnings there were.
    pub fn warnings(&self) -> usize {
        self.warnings
    }

    /// Takes one message, and sends what follows from it.
    pub fn take(&mut self, response: StatusResponse, sink: &dyn ProgressSink) {
        for vertex in response.vertexes {
            self.vertex(vertex, sink);
        }
        for status in response.statuses {
            self.status(status, sink);
        }
        for log in response.logs {
            self.log(log, sink);
        }
        for warning in response.warnings {
            self.warning(warning, sink);
        }
    }

    /// Tells the ends that have lasted, and returns when to ask again, if there are others.
    pub fn settle(&mut self, now: Instant, sink: &dyn ProgressSink) -> Option<Instant> {
        let lasted = |at: &Instant| now.saturating_duration_since(*at) >= SETTLE;
        let (ended, waiting) =
            std::mem::take(&mut self.settling).into_iter().partition(|(_, at)| lasted(at));
        self.settling = waiting;
        let ended: Vec<(Digest, Instant)> = ended;
        for (row, _) in ended {
            self.tell_end(&row, sink);
        }
        self.settling.first().map(|(_, at)| *at + SETTLE)
    }

    /// Ends what was not ended, as the daemon will tell no more.
    pub fn end(&mut self, sink: &dyn ProgressSink) {
        for (row, _) in std::mem::take(&mut self.settling) {
            self.tell_end(&row, sink);
        }
        for vertex in std::mem::take(&mut self.open) {
            sink.send(ProgressEvent::Canceled { vertex });
        }
    }

    fn vertex(&mut self, vertex: Vertex, sink: &dyn ProgressSink) {
        // One without times says only that it will come.
        let Some(started) = vertex.started else { return };
        let known = self.vertices.get(&vertex.digest);
        let again = known.is_some_and(|seen| seen.ended && seen.started != Some(started));
        let begins = known.is_none() || again;
        if known.is_some_and(|seen| seen.ended && !again)
            || (known.is_none() && self.vertices.len() >= MAX_VERTICES)
        {
            return;
        }
        let (row, name) = match &vertex.progress_group {
            Some(group) => (Digest::of(group.id.as_bytes()), group.name.clone()),
            None if again
                && !self
                    .settling
                    .iter()
                    .any(|(row, _)| known.is_some_and(|seen| seen.row == *row)) =>
            {
                // What has ended has ended; the rest of it is shown as one more.
                let id = format!("{} {}.{}", vertex.digest, started.seconds, started.nanos);
                (Digest::of(id.as_bytes()), vertex.name.clone())
            }
            None => {
                let row = known.map_or_else(|| digest(&vertex.digest), |seen| seen.row.clone());
                (row, vertex.name.clone())
            }
        };
        let ended = vertex.completed.is_some();
        let seen = Seen { row: row.clone(), started: Some(started), ended };
        self.vertices.insert(vertex.digest, seen);
        if begins {
            self.begin(&row, &name, ended && vertex.cached, sink);
        }
        if ended {
            self.finish(&row, vertex.cached, &vertex.error, sink);
        }
    }

    fn begin(&mut self, row: &Digest, name: &str, cached: bool, sink: &dyn ProgressSink) {
        let fresh = || Row { name: name.into(), running: 0, cached: true, error: None };
        let shown = self.rows.entry(row.clone()).or_insert_with(fresh);
        shown.running += 1;
        if self.open.contains(row) {
            // It goes on, where an end was not told yet.
            self.settling.retain(|(settling, _)| settling != row);
            return;
        }
        self.open.push(row.clone());
        // What was there already is told by its end alone.
        if !cached {
            let name = shown.name.clone();
            sink.send(ProgressEvent::Started { vertex: row.clone(), name });
        }
    }

    fn finish(&mut self, row: &Digest, cached: bool, error: &str, sink: &dyn ProgressSink) {
        let Some(shown) = self.rows.get_mut(row) else { return };
        shown.running = shown.running.saturating_sub(1);
        shown.cached &= cached;
        if !error.is_empty() && shown.error.is_none() {
            shown.error = Some(error.to_owned());
        }
        if shown.running > 0 {
            return;
        }
        if shown.error.is_none() && !shown.cached {
            self.settling.push((row.clone(), Instant::now()));
            return;
        }
        self.tell_end(row, sink);
    }

    fn tell_end(&mut self, row: &Digest, sink: &dyn ProgressSink) {
        let Some(shown) = self.rows.get(row) else { return };
        self.open.retain(|open| open != row);
        let vertex = row.clone();
        sink.send(match &shown.error {
            Some(error) if is_cancel(error) => ProgressEvent::Canceled { vertex },
            Some(error) => ProgressEvent::Failed { vertex, error: error.as_str().into() },
            None if shown.cached => ProgressEvent::Cached { vertex, name: shown.name.clone() },
            None => ProgressEvent::Done { vertex },
        });
    }

    fn row(&self, vertex: &str) -> Option<Digest> {
        self.vertices.get(vertex).map(|seen| seen.row.clone())
    }

    fn status(&self, status: VertexStatus, sink: &dyn ProgressSink) {
        let Some(vertex) = self.row(&status.vertex) else { return };
        sink.send(ProgressEvent::Status {
            vertex,
            id: status.id.into(),
            current: u64::try_from(status.current).unwrap_or(0),
            total: u64::try_from(status.total).unwrap_or(0),
            done: status.completed.is_some(),
        });
    }

    fn log(&self, log: VertexLog, sink: &dyn ProgressSink) {
        let Some(vertex) = self.row(&log.vertex) else { return };
        let stream = if log.stream == 2 { Stream::Stderr } else { Stream::Stdout };
        sink.send(ProgressEvent::Log { vertex, stream, data: Arc::from(&log.msg[..]) });
    }

    fn warning(&mut self, warning: VertexWarning, sink: &dyn ProgressSink) {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        self.warnings += 1;
        let warning = Warning {
            vertex: self.row(&warning.vertex),
            level: u32::try_from(warning.level).unwrap_or(1).max(1),
            short: text(&warning.short),
            detail: warning.detail.iter().map(|line| text(line)).collect(),
            url: warning.url,
            source: warning.info,
            ranges: warning.ranges,
        };
        sink.send(ProgressEvent::Warning { warning: Arc::new(warning) });
    }
}

/// Digests of steps that are none of the build graph need not be digests.
fn digest(text: &str) -> Digest {
    text.parse().unwrap_or_else(|_| Digest::of(text.as_bytes()))
}

/// A step that was given up says so in the words of the Go language.
fn is_cancel(error: &str) -> bool {
    error.ends_with("context canceled") || error.ends_with("context canceled: context canceled")
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use slipway_spec::llb::pb;

    use super::*;

    #[derive(Default)]
    struct Told(Mutex<Vec<String>>);

    impl ProgressSink for Told {
        fn send(&self, event: ProgressEvent) {
            let row = |vertex: &Digest| vertex.hex()[..2].to_owned();
            self.0.lock().unwrap().push(match event {
                ProgressEvent::Started { vertex, name } => format!("{} start {name}", row(&vertex)),
                ProgressEvent::Cached { vertex, name } => format!("{} cached {name}", row(&vertex)),
                ProgressEvent::Status { vertex, id, current, total, done } => {
                    format!("{} {id} {current}/{total} {done}", row(&vertex))
                }
                ProgressEvent::Log { vertex, stream, data } => {
                    format!("{} {stream:?} {}", row(&vertex), String::from_utf8_lossy(&data))
                }
                ProgressEvent::Warning { warning } => {
                    format!("{:?} warns {}", warning.vertex.as_ref().map(row), warning.short)
                }
                ProgressEvent::Done { vertex } => format!("{} done", row(&vertex)),
                ProgressEvent::Failed { vertex, error } => {
                    format!("{} failed {error}", row(&vertex))
                }
                ProgressEvent::Canceled { vertex } => format!("{} canceled", row(&vertex)),
            });
        }
    }

    const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn vertex(digest: &str, started: i64, completed: i64) -> Vertex {
        let time = |seconds: i64| (seconds > 0).then_some(Timestamp { seconds, nanos: 0 });
        Vertex {
            digest: digest.into(),
            name: digest[7..9].into(),
            started: time(started),
            completed: time(completed),
            ..Vertex::default()
        }
    }

    fn told(vertices: Vec<Vertex>) -> Vec<String> {
        let (sink, mut translator) = (Told::default(), StatusTranslator::default());
        for vertex in vertices {
            let vertexes = vec![vertex];
            translator.take(StatusResponse { vertexes, ..StatusResponse::default() }, &sink);
        }
        translator.end(&sink);
        sink.0.into_inner().unwrap()
    }

    #[test]
    fn a_vertex_begins_and_ends_once() {
        assert_eq!(
            told(vec![
                vertex(A, 0, 0),
                vertex(A, 1, 0),
                vertex(A, 1, 0),
                vertex(A, 1, 2),
                vertex(A, 1, 2)
            ]),
            ["aa start aa", "aa done"]
        );
        let cached = Vertex { cached: true, ..vertex(A, 1, 1) };
        assert_eq!(told(vec![cached]), ["aa cached aa"]);
        let failed = |error: &str| Vertex { error: error.into(), ..vertex(A, 1, 2) };
        assert_eq!(told(vec![failed("exit code: 1")]), ["aa start aa", "aa failed exit code: 1"]);
        assert_eq!(told(vec![failed("x: context canceled")]), ["aa start aa", "aa canceled"]);
        assert_eq!(told(vec![vertex(A, 1, 0)]), ["aa start aa", "aa canceled"]);
    }

    #[test]
    fn a_vertex_that_starts_again_goes_on_or_is_shown_again() {
        // At once, it is still the same.
        let shown = told(vec![vertex(A, 1, 2), vertex(A, 3, 0), vertex(A, 3, 4)]);
        assert_eq!(shown, ["aa start aa", "aa done"]);
        // Once its end was told, it is one more.
        let (sink, mut translator) = (Told::default(), StatusTranslator::default());
        let take = |translator: &mut StatusTranslator, vertex: Vertex| {
            let vertexes = vec![vertex];
            translator.take(StatusResponse { vertexes, ..StatusResponse::default() }, &sink);
        };
        take(&mut translator, vertex(A, 1, 2));
        assert!(translator.settle(Instant::now(), &sink).is_some());
        assert_eq!(translator.settle(Instant::now() + SETTLE, &sink), None);
        take(&mut translator, vertex(A, 3, 4));
        translator.end(&sink);
        let shown = sink.0.into_inner().unwrap();
        assert_eq!(shown[..2], ["aa start aa", "aa done"]);
        assert!(shown[2].ends_with(" start aa") && shown[3].ends_with(" done"), "{shown:?}");
    }

    #[test]
    fn a_group_is_one_row() {
        let group = |vertex: Vertex| Vertex {
            progress_group: Some(pb::ProgressGroup {
                id: "g".into(),
                name: "COPY".into(),
                ..pb::ProgressGroup::default()
            }),
            ..vertex
        };
        let shown = told(vec![
            group(vertex(A, 1, 0)),
            group(vertex(B, 1, 0)),
            group(vertex(A, 1, 2)),
            group(vertex(B, 1, 3)),
        ]);
        assert_eq!(shown.len(), 2, "{shown:?}");
        assert!(shown[0].ends_with(" start COPY") && shown[1].ends_with(" done"), "{shown:?}");
    }

    #[test]
    fn lines_logs_and_warnings_go_with_their_vertex() {
        let (sink, mut translator) = (Told::default(), StatusTranslator::default());
        translator.take(
            StatusResponse {
                vertexes: vec![vertex(A, 1, 0)],
                statuses: vec![
                    VertexStatus {
                        id: "part".into(),
                        vertex: A.into(),
                        current: 3,
                        total: -1,
                        ..VertexStatus::default()
                    },
                    VertexStatus { id: "lost".into(), vertex: B.into(), ..VertexStatus::default() },
                ],
                logs: vec![VertexLog {
                    vertex: A.into(),
                    stream: 2,
                    msg: b"hi\xff"[..].into(),
                    ..VertexLog::default()
                }],
                warnings: vec![VertexWarning {
                    vertex: B.into(),
                    short: b"w"[..].into(),
                    ..VertexWarning::default()
                }],
            },
            &sink,
        );
        assert_eq!(translator.warnings(), 1);
        let told = sink.0.into_inner().unwrap();
        assert_eq!(
            told,
            ["aa start aa", "aa part 3/0 false", "aa Stderr hi\u{fffd}", "None warns w"]
        );
    }
}
