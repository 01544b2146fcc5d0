//! `TraceService`: takes the spans of clients, and keeps those of builds that run for the record of the build.
//!
//! Nothing is passed on to a collector.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use prost::Message;
use serde_json::{Map, Value, json};
use slipway_spec::digest::to_hex;
use slipway_spec::timestamp;
use slipway_spec::wire::trace::trace_service_server::TraceService;
use slipway_spec::wire::trace::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

/// Spans of clients that are kept for one build.
const MAX_SPANS: usize = 4096;
/// What they may take in all, in bytes.
const MAX_BYTES: usize = 4 << 20;

/// Which trace a build belongs to, and which span of its client it was started in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The trace.
    pub trace: [u8; 16],
    /// The span; zeros when there is none.
    pub parent: [u8; 8],
}

impl TraceContext {
    /// Reads what a call says of its trace, in W3C's notation; a call that says nothing begins a trace of its own.
    pub fn of_call(metadata: &MetadataMap) -> Self {
        let header = metadata.get("traceparent").and_then(|value| value.to_str().ok());
        header
            .and_then(Self::parse)
            .unwrap_or_else(|| Self { trace: slipway_engine::id::random(), parent: [0; 8] })
    }

    fn parse(header: &str) -> Option<Self> {
        let mut parts = header.split('-');
        let (_version, trace, parent) = (parts.next()?, parts.next()?, parts.next()?);
        let context = Self { trace: from_hex(trace)?, parent: from_hex(parent)? };
        (context.trace != [0; 16]).then_some(context)
    }
}

fn from_hex<const N: usize>(hex: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if hex.len() != 2 * N || !hex.is_ascii() {
        return None;
    }
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(bytes)
}

/// The spans of clients whose builds run. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Traces(Arc<Mutex<HashMap<[u8; 16], Kept>>>);

#[derive(Debug, Default)]
struct Kept {
    /// Builds that belong to the trace.
    builds: usize,
    spans: Vec<String>,
    bytes: usize,
}

impl Traces {
    fn change<T>(&self, change: impl FnOnce(&mut HashMap<[u8; 16], Kept>) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Begins to keep the spans of a trace.
    pub(crate) fn begin(&self, trace: [u8; 16]) {
        self.change(|traces| traces.entry(trace).or_default().builds += 1);
    }

    /// Returns the spans that came, one document each, and keeps no more.
    pub(crate) fn end(&self, trace: [u8; 16]) -> Vec<String> {
        self.change(|traces| {
            let Some(kept) = traces.get_mut(&trace) else { return vec![] };
            kept.builds = kept.builds.saturating_sub(1);
            if kept.builds > 0 {
                return kept.spans.clone();
            }
            traces.remove(&trace).map(|kept| kept.spans).unwrap_or_default()
        })
    }

    fn add(&self, encoded: &[u8]) -> Result<(), prost::DecodeError> {
        let ResourceSpans { resource, scope_spans } = ResourceSpans::decode(encoded)?;
        let resource = attributes(&resource.unwrap_or_default().attributes);
        for ScopeSpans { scope, spans } in scope_spans {
            let scope = scope.unwrap_or_default();
            for span in spans {
                let Ok(trace) = <[u8; 16]>::try_from(&span.trace_id[..]) else { continue };
                self.change(|traces| {
                    let Some(kept) = traces.get_mut(&trace) else { return };
                    if kept.spans.len() >= MAX_SPANS || kept.bytes >= MAX_BYTES {
                        return;
                    }
                    let text = span.document(&scope, &resource).to_string();
                    kept.bytes += text.len();
                    kept.spans.push(text);
                });
            }
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl TraceService for Traces {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for spans in request.into_inner().resource_spans {
            self.add(&spans).map_err(|error| Status::invalid_argument(error.to_string()))?;
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// A span of the daemon itself.
#[derive(Clone, Debug)]
pub(crate) struct OwnSpan<'a> {
    pub(crate) context: TraceContext,
    pub(crate) id: [u8; 8],
    pub(crate) name: &'a str,
    /// Whether it answers a call.
    pub(crate) is_call: bool,
    /// Nanoseconds since 1970.
    pub(crate) started: i64,
    pub(crate) ended: i64,
    pub(crate) attributes: &'a [(&'a str, &'a str)],
    pub(crate) error: Option<&'a str>,
}

impl OwnSpan<'_> {
    /// Returns the span as clients read it.
    pub(crate) fn document(&self) -> Value {
        let text = |key: &str, value: &str| json!({ "Key": key, "Value": { "Type": "STRING", "Value": value } });
        let attributes: Vec<Value> =
            self.attributes.iter().map(|(key, value)| text(key, value)).collect();
        let version = env!("CARGO_PKG_VERSION");
        json!({
            "Name": self.name,
            "SpanContext": context(&self.context.trace, &self.id, false),
            "Parent": context(&self.context.trace, &self.context.parent, self.is_call),
            "SpanKind": if self.is_call { 2 } else { 1 },
            "StartTime": timestamp::format(self.started),
            "EndTime": timestamp::format(self.ended),
            "Attributes": attributes,
            "Events": null,
            "Links": null,
            "Status": match self.error {
                Some(error) => json!({ "Code": "Error", "Description": error }),
                None => json!({ "Code": "Unset", "Description": "" }),
            },
            "DroppedAttributes": 0,
            "DroppedEvents": 0,
            "DroppedLinks": 0,
            "ChildSpanCount": 0,
            "Resource": [text("service.name", "slipway"), text("service.version", version)],
            "InstrumentationLibrary": { "Name": "slipway", "Version": version, "SchemaURL": "" },
        })
    }
}

fn context(trace: &[u8], span: &[u8], remote: bool) -> Value {
    json!({
        "TraceID": to_hex(trace), "SpanID": to_hex(span), "TraceFlags": "01", "TraceState": "", "Remote": remote,
    })
}

fn time(nanos: u64) -> String {
    timestamp::format(i64::try_from(nanos).unwrap_or(i64::MAX))
}

fn attributes(all: &[KeyValue]) -> Value {
    let one = |attribute: &KeyValue| {
        let value = attribute.value.clone().unwrap_or_default();
        let (kind, value) = match value {
            AnyValue { text: Some(text), .. } => ("STRING", json!(text)),
            AnyValue { flag: Some(flag), .. } => ("BOOL", json!(flag)),
            AnyValue { whole: Some(whole), .. } => ("INT64", json!(whole)),
            AnyValue { number: Some(number), .. } => ("FLOAT64", json!(number)),
            AnyValue { array: Some(array), .. } => {
                let items = array.values.into_iter().map(|item| item.text.unwrap_or_default());
                ("STRINGSLICE", items.collect())
            }
            AnyValue { .. } => ("STRING", json!("")),
        };
        json!({ "Key": attribute.key, "Value": { "Type": kind, "Value": value } })
    };
    Value::Array(all.iter().map(one).collect())
}

// The part of OpenTelemetry's messages that documents have, by their numbers in its protocol files.

#[derive(Clone, PartialEq, Message)]
struct ResourceSpans {
    #[prost(message, optional, tag = "1")]
    resource: Option<Resource>,
    #[prost(message, repeated, tag = "2")]
    scope_spans: Vec<ScopeSpans>,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(message, repeated, tag = "1")]
    attributes: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ScopeSpans {
    #[prost(message, optional, tag = "1")]
    scope: Option<Scope>,
    #[prost(message, repeated, tag = "2")]
    spans: Vec<Span>,
}

#[derive(Clone, PartialEq, Message)]
struct Scope {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Span {
    #[prost(bytes = "vec", tag = "1")]
    trace_id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    span_id: Vec<u8>,
    #[prost(string, tag = "3")]
    trace_state: String,
    #[prost(bytes = "vec", tag = "4")]
    parent_span_id: Vec<u8>,
    #[prost(string, tag = "5")]
    name: String,
    #[prost(int32, tag = "6")]
    kind: i32,
    #[prost(fixed64, tag = "7")]
    started: u64,
    #[prost(fixed64, tag = "8")]
    ended: u64,
    #[prost(message, repeated, tag = "9")]
    attributes: Vec<KeyValue>,
    #[prost(uint32, tag = "10")]
    dropped_attributes: u32,
    #[prost(message, repeated, tag = "11")]
    events: Vec<Event>,
    #[prost(uint32, tag = "12")]
    dropped_events: u32,
    #[prost(uint32, tag = "14")]
    dropped_links: u32,
    #[prost(message, optional, tag = "15")]
    status: Option<SpanStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(fixed64, tag = "1")]
    time: u64,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(message, repeated, tag = "3")]
    attributes: Vec<KeyValue>,
    #[prost(uint32, tag = "4")]
    dropped_attributes: u32,
}

#[derive(Clone, PartialEq, Message)]
struct SpanStatus {
    #[prost(string, tag = "2")]
    message: String,
    #[prost(int32, tag = "3")]
    code: i32,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<AnyValue>,
}

/// One of these is set.
#[derive(Clone, PartialEq, Message)]
struct AnyValue {
    #[prost(string, optional, tag = "1")]
    text: Option<String>,
    #[prost(bool, optional, tag = "2")]
    flag: Option<bool>,
    #[prost(int64, optional, tag = "3")]
    whole: Option<i64>,
    #[prost(double, optional, tag = "4")]
    number: Option<f64>,
    #[prost(message, optional, tag = "5")]
    array: Option<ArrayValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ArrayValue {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Text>,
}

#[derive(Clone, PartialEq, Message)]
struct Text {
    #[prost(string, optional, tag = "1")]
    text: Option<String>,
}

impl Span {
    fn document(&self, scope: &Scope, resource: &Value) -> Value {
        let event = |event: &Event| {
            json!({
                "Name": event.name,
                "Attributes": attributes(&event.attributes),
                "DroppedAttributeCount": event.dropped_attributes,
                "Time": time(event.time),
            })
        };
        let status = self.status.clone().unwrap_or_default();
        let code = match status.code {
            1 => "Ok",
            2 => "Error",
            _ => "Unset",
        };
        let mut span = [0; 8];
        let mut parent = [0; 8];
        // One of another length is none.
        for (to, from) in [(&mut span, &self.span_id), (&mut parent, &self.parent_span_id)] {
            if let Ok(id) = <[u8; 8]>::try_from(&from[..]) {
                *to = id;
            }
        }
        let mut document = Map::new();
        let events: Vec<Value> = self.events.iter().map(event).collect();
        for (key, value) in [
            ("Name", json!(self.name)),
            ("SpanContext", context(&self.trace_id, &span, false)),
            ("Parent", context(&self.trace_id, &parent, false)),
            ("SpanKind", json!(self.kind)),
            ("StartTime", json!(time(self.started))),
            ("EndTime", json!(time(self.ended))),
            ("Attributes", attributes(&self.attributes)),
            ("Events", json!(events)),
            ("Links", Value::Null),
            ("Status", json!({ "Code": code, "Description": status.message })),
            ("DroppedAttributes", json!(self.dropped_attributes)),
            ("DroppedEvents", json!(self.dropped_events)),
            ("DroppedLinks", json!(self.dropped_links)),
            ("ChildSpanCount", json!(0)),
            ("Resource", resource.clone()),
            (
                "InstrumentationLibrary",
                json!({ "Name": scope.name, "Version": scope.version, "SchemaURL": "" }),
            ),
        ] {
            document.insert(key.to_owned(), value);
        }
        Value::Object(document)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exported(trace: u8) -> Vec<u8> {
        let text = |key: &str, value: &str| KeyValue {
            key: key.into(),
            value: Some(AnyValue { text: Some(value.into()), ..AnyValue::default() }),
        };
        let whole = KeyValue {
            key: "n".into(),
            value: Some(AnyValue { whole: Some(7), ..AnyValue::default() }),
        };
        let span = Span {
            trace_id: vec![trace; 16],
            span_id: vec![2; 8],
            name: "client".into(),
            kind: 3,
            started: 1_000_000_000,
            ended: 2_000_000_001,
            attributes: vec![text("a", "b"), whole],
            status: Some(SpanStatus { message: "no".into(), code: 2 }),
            ..Span::default()
        };
        ResourceSpans {
            resource: Some(Resource { attributes: vec![text("service.name", "buildx")] }),
            scope_spans: vec![ScopeSpans { scope: None, spans: vec![span] }],
        }
        .encode_to_vec()
    }

    #[test]
    fn spans_of_builds_are_kept_and_others_are_not() {
        let traces = Traces::default();
        traces.add(&exported(1)).unwrap();
        traces.begin([1; 16]);
        traces.begin([1; 16]);
        traces.add(&exported(1)).unwrap();
        traces.add(&exported(3)).unwrap();
        assert_eq!(traces.end([3; 16]), [""; 0]);
        let spans = traces.end([1; 16]);
        let document: Value = serde_json::from_str(&spans[0]).unwrap();
        assert_eq!(spans.len(), 1);
        assert_eq!(document["Name"], "client");
        assert_eq!(document["SpanContext"]["TraceID"], "01".repeat(16));
        assert_eq!(document["EndTime"], "1970-01-01T00:00:02.000000001Z");
        assert_eq!(document["Attributes"][1]["Value"], json!({ "Type": "INT64", "Value": 7 }));
        assert_eq!(document["Status"], json!({ "Code": "Error", "Description": "no" }));
        assert_eq!(traces.end([1; 16]), spans, "another build of the same trace");
        assert_eq!(traces.end([1; 16]), [""; 0]);
        assert!(traces.add(b"\xff\xff").is_err());
    }

    #[test]
    fn clients_cannot_fill_the_memory() {
        let traces = Traces::default();
        traces.begin([1; 16]);
        for _ in 0..MAX_SPANS + 10 {
            traces.add(&exported(1)).unwrap();
        }
        assert!(traces.end([1; 16]).len() <= MAX_SPANS);
    }

    #[test]
    fn a_call_says_what_trace_it_belongs_to() {
        let of = |header: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("traceparent", header.parse().unwrap());
            TraceContext::of_call(&metadata)
        };
        let header = format!("00-{}-{}-01", "0a".repeat(16), "0b".repeat(8));
        assert_eq!(of(&header), TraceContext { trace: [10; 16], parent: [11; 8] });
        for bad in
            ["", "00", "00-zz-00-01", &format!("00-{}-{}-01", "00".repeat(16), "0b".repeat(8))]
        {
            let own = of(bad);
            assert!(own.trace != [0; 16] && own.parent == [0; 8], "{bad}");
        }
    }
}
