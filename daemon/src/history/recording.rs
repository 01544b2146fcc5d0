//! One build that is recorded, from its start to its end.

use std::collections::BTreeMap;
use std::panic::Location;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use prost::Message as _;
use prost_types::Any;
use serde_json::json;
use slipway_engine::id::random;
use slipway_engine::provenance::{Provenance, ProvenanceOptions};
use slipway_engine::store::now_nanos;
use slipway_spec::manifest::Document;
use slipway_spec::wire::control::{
    BuildHistoryEventType, BuildHistoryRecord, BuildResultInfo, Exporter, SolveRequest, Vertex,
};
use slipway_spec::wire::rpc;
use slipway_spec::{Descriptor, Digest};
use tonic::Status;

use super::book::{HistoryError, nanos};
use super::{History, Later, OpenTrace, Shared, TRACE_WAIT, descriptor, event, log};
use crate::record::Record;
use crate::timestamp;
use crate::trace::{OwnSpan, TraceContext};

/// The type of an error with its details, spelt as upstream spells it.
const ERROR_TYPE: &str = "application/vnd.googeapis.google.rpc.status+proto";
/// The type of statements about how a result was made.
const STATEMENT_TYPE: &str = "application/vnd.in-toto+json";
/// Says what a statement is about.
const PREDICATE_TYPE: &str = "in-toto.io/predicate-type";
const STACK: &str = "github.com/moby/buildkit/stack.Stack+json";
/// Documents of results that are kept with a record: indexes, manifests, configs.
const MAX_DOCUMENTS: usize = 256;
const MAX_DOCUMENT: u64 = 4 << 20;
/// What is said of a result, such as a bill of materials, may be long.
const MAX_STATEMENT: u64 = 48 << 20;

/// A build that is recorded. One that is dropped before [`finish`](Self::finish) was canceled.
#[derive(Debug)]
pub struct Recording {
    history: History,
    progress: Arc<Record>,
    trace: TraceContext,
    /// Nothing once it has ended.
    record: Option<BuildHistoryRecord>,
    results: Mutex<Results>,
}

/// What came of a build.
#[derive(Clone, Debug, Default)]
struct Results {
    /// What outputs made, by the number of the output.
    exported: BTreeMap<i64, Descriptor>,
    /// What the frontend and the outputs say.
    response: BTreeMap<String, String>,
    /// Where results come from; by their id, if there may be several.
    provenance: Vec<(Option<String>, Arc<Provenance>)>,
    /// Who builds, as the client says.
    builder: String,
}

impl History {
    /// Begins to record a build. Nothing is waited for.
    pub fn begin(
        &self,
        request: &SolveRequest,
        exporters: &[Exporter],
        progress: Arc<Record>,
        trace: TraceContext,
    ) -> Recording {
        let record = BuildHistoryRecord {
            r#ref: request.r#ref.clone(),
            frontend: request.frontend.clone(),
            frontend_attrs: request.frontend_attrs.clone(),
            exporters: exporters.to_vec(),
            created_at: Some(timestamp(now_nanos())),
            ..BuildHistoryRecord::default()
        };
        self.shared.traces.begin(trace.trace);
        {
            let mut state = self.shared.lock();
            state.condemned.remove(&record.r#ref);
            state.active.insert(record.r#ref.clone(), record.clone());
        }
        self.shared.tell(event(BuildHistoryEventType::Started, record.clone()));
        let written = record.clone();
        self.queue(move |shared, later| {
            // The trace of an earlier build of the same name.
            shared.add_trace(later, &written.r#ref);
            shared.report("told of a build that began", shared.book.put(&written, &[]));
        });
        let results = Mutex::default();
        Recording { history: self.clone(), progress, trace, record: Some(record), results }
    }
}

impl Recording {
    fn change(&self, change: impl FnOnce(&mut Results)) {
        change(&mut self.results.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Remembers what an output made.
    pub fn exported(&self, output: usize, made: &Descriptor) {
        let output = i64::try_from(output).unwrap_or(i64::MAX);
        self.change(|results| {
            results.exported.insert(output, made.clone());
        });
    }

    /// Remembers what clients are told of the result.
    pub fn answered(&self, response: impl IntoIterator<Item = (String, String)>) {
        self.change(|results| results.response.extend(response));
    }

    /// Remembers where results come from; those of a build for several platforms have ids. `builder` is who builds, as the
    /// client says.
    pub fn made_from(
        &self,
        results: impl IntoIterator<Item = (Option<String>, Option<Arc<Provenance>>)>,
        builder: String,
    ) {
        self.change(|known| {
            let results = results.into_iter().filter_map(|(id, found)| Some((id, found?)));
            known.provenance.extend(results);
            known.builder = builder;
        });
    }

    /// Ends the record. It is written down in the background.
    #[track_caller]
    pub fn finish<T>(mut self, outcome: &Result<T, Status>) {
        let error = outcome.as_ref().err().map(|status| Failure::of(status, Location::caller()));
        self.end(error);
    }

    fn end(&mut self, error: Option<Failure>) {
        let Some(mut record) = self.record.take() else { return };
        record.completed_at = Some(timestamp(now_nanos()));
        // Everything that will be told has been told.
        self.progress.end();
        let results = {
            let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *results)
        };
        let completion = Completion {
            record,
            progress: self.progress.clone(),
            trace: self.trace,
            error,
            results,
        };
        self.history.queue(move |shared, later| completion.write(shared, later));
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let status = Status::cancelled("context canceled");
        let error = Failure::of(&status, Location::caller());
        self.end(Some(error));
    }
}

/// Why a build failed.
#[derive(Debug)]
struct Failure {
    /// For the record.
    brief: rpc::Status,
    /// With all details.
    whole: Vec<u8>,
}

impl Failure {
    fn of(status: &Status, place: &Location<'_>) -> Self {
        let mut whole = rpc::Status::from(status);
        // Clients show where in the daemon an error came from.
        let version = concat!("slipway v", env!("CARGO_PKG_VERSION"));
        let frame = json!({ "Name": "slipway_daemon::control", "File": place.file(), "Line": place.line() });
        let stack = json!({ "frames": [frame], "pid": std::process::id(), "version": version });
        whole.details.push(Any { type_url: STACK.into(), value: stack.to_string().into_bytes() });
        let brief = rpc::Status { details: vec![], ..whole.clone() };
        Self { brief, whole: whole.encode_to_vec() }
    }
}

/// A build that has ended and is not written down.
struct Completion {
    record: BuildHistoryRecord,
    progress: Arc<Record>,
    trace: TraceContext,
    error: Option<Failure>,
    results: Results,
}

impl Completion {
    fn write(mut self, shared: &Shared, later: &mut Later) {
        let id = self.record.r#ref.clone();
        let (mut vertices, mut more) = (vec![], vec![]);
        // What cannot be written is left out; that the build has ended must be known in any case.
        shared.report("told all of a build", self.fill(shared, &mut vertices, &mut more));
        let spans = self.spans(&vertices);
        let due = Instant::now() + TRACE_WAIT;
        later.traces.insert(id.clone(), OpenTrace { due, trace: self.trace.trace, spans });
        // Not one that began since under the same name.
        let current = {
            let mut state = shared.lock();
            let current = state
                .active
                .get(&id)
                .is_some_and(|active| active.created_at == self.record.created_at);
            if current {
                state.active.remove(&id);
            }
            current
        };
        if !current {
            return;
        }
        let put = shared.book.put(&self.record, &more);
        shared.report("told how a build ended", put);
        shared.tell(event(BuildHistoryEventType::Complete, self.record));
    }

    fn fill(
        &mut self,
        shared: &Shared,
        vertices: &mut Vec<Vertex>,
        more: &mut Vec<Digest>,
    ) -> Result<(), HistoryError> {
        let record = &mut self.record;
        record.exporter_response = std::mem::take(&mut self.results.response);
        if let Some(error) = &self.error {
            record.error = Some(error.brief.clone());
            record.external_error =
                Some(descriptor(ERROR_TYPE, shared.book.put_blob(&error.whole)?));
        }
        let log = log::write(&shared.book, &self.progress)?;
        record.num_total_steps = log.steps.total;
        record.num_cached_steps = log.steps.cached;
        record.num_completed_steps = log.steps.completed;
        record.num_warnings = log.steps.warnings;
        record.logs = Some(descriptor(log::MEDIA_TYPE, (log.digest, log.size)));
        *vertices = log.vertices;
        for (output, made) in &self.results.exported {
            keep_documents(shared, made, more)?;
            let mut wire = descriptor(made.media_type.as_str(), (made.digest.clone(), made.size));
            wire.annotations.extend(made.annotations.clone());
            let result: &mut BuildResultInfo = record.result.get_or_insert_default();
            result.result_deprecated.get_or_insert_with(|| wire.clone());
            result.results.insert(*output, wire);
        }
        let options = ProvenanceOptions {
            builder_id: std::mem::take(&mut self.results.builder),
            ..ProvenanceOptions::default()
        };
        for (id, provenance) in std::mem::take(&mut self.results.provenance) {
            let told = match provenance.predicate(&shared.store, &options) {
                Ok(told) => told,
                Err(error) => {
                    tracing::warn!(%error, "the record of a build has no provenance");
                    continue;
                }
            };
            let mut wire = descriptor(STATEMENT_TYPE, shared.book.put_blob(&told)?);
            let kind = options.version.predicate_type();
            wire.annotations.insert(PREDICATE_TYPE.into(), kind.into());
            let result = match id {
                None => record.result.get_or_insert_default(),
                Some(id) => record.results.entry(id).or_default(),
            };
            result.attestations.push(wire);
        }
        Ok(())
    }

    /// The build and its steps as spans.
    fn spans(&self, vertices: &[Vertex]) -> Vec<String> {
        let record = &self.record;
        let id: [u8; 8] = random();
        let started = nanos(record.created_at.as_ref()).unwrap_or(0);
        let ended = nanos(record.completed_at.as_ref()).unwrap_or(started);
        let whole = OwnSpan {
            context: self.trace,
            id,
            name: "moby.buildkit.v1.Control/Solve",
            is_call: true,
            started,
            ended,
            attributes: &[
                ("rpc.system", "grpc"),
                ("rpc.service", "moby.buildkit.v1.Control"),
                ("rpc.method", "Solve"),
                ("ref", &record.r#ref),
            ],
            error: record.error.as_ref().map(|error| error.message.as_str()),
        };
        let mut spans = vec![(started, whole.document().to_string())];
        for vertex in vertices {
            let (Some(started), Some(ended)) =
                (nanos(vertex.started.as_ref()), nanos(vertex.completed.as_ref()))
            else {
                continue;
            };
            let cached = if vertex.cached { "true" } else { "false" };
            let span = OwnSpan {
                context: TraceContext { parent: id, ..self.trace },
                id: random(),
                name: &vertex.name,
                is_call: false,
                started,
                ended,
                attributes: &[("vertex", &vertex.digest), ("cached", cached)],
                error: (!vertex.error.is_empty()).then_some(vertex.error.as_str()),
            };
            spans.push((started, span.document().to_string()));
        }
        spans.sort_by_key(|(started, _)| *started);
        spans.into_iter().map(|(_, span)| span).collect()
    }
}

/// Keeps the small documents of a result, so that they can be looked at when the image is gone.
fn keep_documents(
    shared: &Shared,
    made: &Descriptor,
    kept: &mut Vec<Digest>,
) -> Result<(), HistoryError> {
    let mut todo = vec![made.clone()];
    while let Some(document) = todo.pop() {
        if kept.contains(&document.digest) || kept.len() >= MAX_DOCUMENTS {
            continue;
        }
        let is_statement = document.media_type.as_str() == STATEMENT_TYPE;
        let limit = if is_statement { MAX_STATEMENT } else { MAX_DOCUMENT };
        let bytes = match shared.store.read_blob(&document.digest, limit) {
            Ok(bytes) => bytes,
            Err(error) => {
                tracing::debug!(digest = %document.digest, %error, "a document is not kept");
                continue;
            }
        };
        kept.push(shared.book.put_blob(&bytes)?.0);
        if !document.media_type.is_index() && !document.media_type.is_manifest() {
            continue;
        }
        match Document::parse(&bytes) {
            Ok(Document::Index(index)) => todo.extend(index.manifests),
            Ok(Document::Manifest(manifest)) => {
                // What attestations say is small as well, unlike layers of files.
                let statements = manifest.layers.iter();
                let statements =
                    statements.filter(|layer| layer.media_type.as_str() == STATEMENT_TYPE);
                todo.extend(statements.cloned());
                todo.push(manifest.config);
            }
            Err(error) => tracing::debug!(digest = %document.digest, %error, "not read"),
        }
    }
    Ok(())
}
