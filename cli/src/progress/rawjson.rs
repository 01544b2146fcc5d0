//! Progress for programs: one JSON object per update, with the field names of BuildKit's status messages.

use std::io::Write;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};
use slipway_spec::llb::pb;
use slipway_spec::progress::{ProgressEvent, Stream, Warning};

use super::trace::{Outcome, Part, Trace};
use super::{Ended, Pace, Renderer};
use crate::printer::time::rfc3339;

/// Updates are gathered for this long.
const INTERVAL: Duration = Duration::from_millis(100);

/// Writes updates as JSON, one object on a line.
pub(super) struct RawJson {
    out: Box<dyn Write + Send>,
    /// The time at which the display began.
    epoch: SystemTime,
    trace: Trace,
    vertexes: Vec<Value>,
    statuses: Vec<Value>,
    logs: Vec<Value>,
    warnings: Vec<Value>,
}

impl RawJson {
    pub(super) fn new(out: Box<dyn Write + Send>, epoch: SystemTime) -> Self {
        Self {
            out,
            epoch,
            trace: Trace::default(),
            vertexes: vec![],
            statuses: vec![],
            logs: vec![],
            warnings: vec![],
        }
    }

    fn time(&self, at: Duration) -> String {
        rfc3339(self.epoch + at)
    }

    fn vertex(&self, index: usize) -> Value {
        let step = &self.trace.steps()[index];
        let mut vertex = Map::new();
        vertex.insert("digest".into(), step.digest.to_string().into());
        vertex.insert("name".into(), step.title().into());
        if let Some(started) = step.started {
            vertex.insert("started".into(), self.time(started).into());
        }
        if let Some((at, outcome)) = &step.ended {
            vertex.insert("completed".into(), self.time(*at).into());
            match outcome {
                Outcome::Done => {}
                Outcome::Cached => drop(vertex.insert("cached".into(), true.into())),
                Outcome::Failed(error) => {
                    drop(vertex.insert("error".into(), error.as_str().into()));
                }
                // BuildKit has no field for this: clients know a cancelled vertex by its error.
                Outcome::Canceled => drop(vertex.insert("error".into(), "context canceled".into())),
            }
        }
        Value::Object(vertex)
    }

    fn status(&self, vertex: &str, name: &str, part: &Part, at: Duration) -> Value {
        let mut status = json!({
            "id": name,
            "vertex": vertex,
            "total": part.total,
            "current": part.current,
            "timestamp": self.time(at),
            "started": self.time(part.started),
        });
        if let Some(ended) = part.ended {
            status["completed"] = self.time(ended).into();
        }
        status
    }
}

/// Writes a warning as BuildKit's clients do; texts are bytes in its messages.
fn json_warning(warning: &Warning) -> Value {
    let mut json = Map::new();
    let vertex = warning.vertex.as_ref().map(ToString::to_string).unwrap_or_default();
    json.insert("vertex".into(), vertex.into());
    json.insert("level".into(), warning.level.into());
    json.insert("short".into(), STANDARD.encode(&warning.short).into());
    if !warning.detail.is_empty() {
        let lines = warning.detail.iter().map(|line| STANDARD.encode(line));
        json.insert("detail".into(), lines.collect::<Vec<_>>().into());
    }
    if !warning.url.is_empty() {
        json.insert("url".into(), warning.url.as_str().into());
    }
    if let Some(source) = &warning.source {
        let info = json!({
            "filename": source.filename,
            "data": STANDARD.encode(&source.data),
            "language": source.language,
        });
        json.insert("sourceInfo".into(), info);
    }
    if !warning.ranges.is_empty() {
        let line = |position: &Option<pb::Position>| json!({ "line": position.as_ref().map_or(0, |p| p.line) });
        let ranges = warning.ranges.iter();
        let ranges =
            ranges.map(|range| json!({ "start": line(&range.start), "end": line(&range.end) }));
        json.insert("range".into(), ranges.collect::<Vec<_>>().into());
    }
    Value::Object(json)
}

impl Renderer for RawJson {
    fn event(&mut self, at: Duration, event: &ProgressEvent) {
        let change = self.trace.apply(at, event);
        match event {
            ProgressEvent::Warning { warning } => self.warnings.push(json_warning(warning)),
            ProgressEvent::Log { vertex, stream, data } => {
                let stream = match stream {
                    Stream::Stdout => 1,
                    Stream::Stderr => 2,
                };
                self.logs.push(json!({
                    "vertex": vertex.to_string(),
                    "stream": stream,
                    "data": STANDARD.encode(data),
                    "timestamp": self.time(at),
                }));
            }
            ProgressEvent::Status { vertex, id, .. } => {
                let id = crate::printer::text::clean(id);
                let parts = change.map(|change| &self.trace.steps()[change.step].parts);
                if let Some(part) = parts.and_then(|parts| parts.iter().find(|part| part.id == id))
                {
                    self.statuses.push(self.status(&vertex.to_string(), &id, part, at));
                }
            }
            ProgressEvent::Started { .. }
            | ProgressEvent::Cached { .. }
            | ProgressEvent::Done { .. }
            | ProgressEvent::Failed { .. }
            | ProgressEvent::Canceled { .. } => {
                if let Some(change) = change {
                    self.vertexes.push(self.vertex(change.step));
                }
            }
        }
    }

    fn tick(&mut self, _now: Duration) {
        let mut update = Map::new();
        for (name, values) in [
            ("vertexes", &mut self.vertexes),
            ("statuses", &mut self.statuses),
            ("logs", &mut self.logs),
            ("warnings", &mut self.warnings),
        ] {
            if !values.is_empty() {
                update.insert(name.into(), Value::Array(std::mem::take(values)));
            }
        }
        if !update.is_empty() {
            // Progress that cannot be written is no failure of the work.
            drop(writeln!(self.out, "{}", Value::Object(update)).and_then(|()| self.out.flush()));
        }
    }

    fn finish(&mut self, now: Duration, _ended: Ended) {
        self.tick(now);
    }

    fn pace(&self) -> Pace {
        Pace::Steady(INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::super::script::*;
    use super::*;
    use crate::printer::capture::Buffer;

    #[test]
    fn one_object_per_update() {
        let buffer = Buffer::default();
        let mut raw = RawJson::new(Box::new(buffer.clone()), UNIX_EPOCH);
        raw.event(ms(0), &started("a"));
        raw.event(ms(500), &log("a", b"hi\xff"));
        raw.tick(ms(500));
        raw.tick(ms(600));
        raw.event(ms(1000), &status("a", "blob", 5, 10, true));
        raw.event(ms(1500), &failed("a", "broken"));
        raw.event(ms(1500), &cached("b"));
        raw.event(ms(1500), &warning("w"));
        raw.finish(ms(2000), Ended::Failure);
        let (a, b) = (vertex("a").to_string(), vertex("b").to_string());
        let lines: Vec<Value> =
            buffer.take().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(
            lines,
            [
                json!({
                    "vertexes": [{ "digest": a, "name": "a", "started": "1970-01-01T00:00:00Z" }],
                    "logs": [{ "vertex": a, "stream": 1, "data": "aGn/", "timestamp": "1970-01-01T00:00:00.5Z" }],
                }),
                json!({
                    "vertexes": [
                        {
                            "digest": a,
                            "name": "a",
                            "started": "1970-01-01T00:00:00Z",
                            "completed": "1970-01-01T00:00:01.5Z",
                            "error": "broken",
                        },
                        {
                            "digest": b,
                            "name": "b",
                            "started": "1970-01-01T00:00:01.5Z",
                            "completed": "1970-01-01T00:00:01.5Z",
                            "cached": true,
                        },
                    ],
                    "statuses": [{
                        "id": "blob",
                        "vertex": a,
                        "total": 10,
                        "current": 5,
                        "timestamp": "1970-01-01T00:00:01Z",
                        "started": "1970-01-01T00:00:01Z",
                        "completed": "1970-01-01T00:00:01Z",
                    }],
                    "warnings": [{ "vertex": "", "level": 1, "short": "dw==" }],
                }),
            ]
        );
    }
}
