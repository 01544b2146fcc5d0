//! Errors as clients of BuildKit expect them: a status with details that say which vertex failed and where the user wrote
//! it. The value of each detail is JSON, whatever its message is.

use base64::Engine as _;
use prost::Message as _;
use prost_types::Any;
use serde_json::{Map, Value, json};
use slipway_engine::BuildError;
use slipway_engine::frontend::FrontendError;
use slipway_engine::solver::{Cause, FailedPart, SolveError};
use slipway_engine::store::ErrorKind;
use slipway_spec::llb::json::Form;
use slipway_spec::llb::pb;
use slipway_spec::wire::rpc;
use tonic::{Code, Status};

const ERRDEFS: &str = "github.com/moby/buildkit/errdefs.";
const DENIAL: &str = "github.com/moby/buildkit/policysession.DecisionResponse+json";
const EXIT: &str = "github.com/moby/buildkit/gatewayapi.ExitMessage+json";

/// Returns a failed build as a status.
pub fn build_status(error: &BuildError) -> Status {
    match error {
        BuildError::Frontend(error) => frontend_status(error),
        BuildError::Solve(error) => solve_status(error),
        BuildError::Store(error) if error.kind() == ErrorKind::NoSpace => {
            Status::resource_exhausted(chain(error))
        }
        other => Status::unknown(chain(other)),
    }
}

/// A step that failed, with the names that a client can mount what it left by.
#[derive(Debug)]
pub(crate) struct Failed<'a> {
    /// What was executed, as it stands in the graph.
    pub(crate) op: &'a pb::Op,
    /// What of it failed.
    pub(crate) part: Option<FailedPart>,
    /// The file systems before; empty where there is none.
    pub(crate) inputs: Vec<String>,
    /// The file systems after.
    pub(crate) mounts: Vec<String>,
}

/// Returns a failed step as a status that lets clients look into what it left.
pub(crate) fn failed_status(error: &SolveError, failed: &Failed<'_>) -> Status {
    let (code, message, mut details) = solve_parts(error);
    let Failed { op, part, inputs, mounts } = failed;
    let op = Form::Protobuf.step(op);
    let mut solve = json!({ "inputIDs": inputs, "mountIDs": mounts, "op": op });
    // Numbers of 64 bits are text.
    match part {
        Some(FailedPart::Action(at)) => solve["file"] = json!({ "index": at.to_string() }),
        Some(FailedPart::Input(at)) => solve["cache"] = json!({ "index": at.to_string() }),
        None => {}
    }
    details.push(detail("Solve", &solve));
    status(code, message, details)
}

/// Returns a failed step as a status.
pub fn solve_status(error: &SolveError) -> Status {
    let (code, message, details) = solve_parts(error);
    status(code, message, details)
}

fn solve_parts(error: &SolveError) -> (Code, String, Vec<Any>) {
    let mut details = vec![];
    if let Some(vertex) = &error.vertex {
        details.push(detail("Vertex", &json!({ "digest": vertex.digest.to_string() })));
        if let Some(source) = &vertex.source {
            details.push(source_detail(source, &vertex.ranges));
        }
    }
    let mut code = Code::Unknown;
    match &*error.cause {
        Cause::Exit { code, .. } => details.push(exit_detail(*code)),
        Cause::Store(error) if error.kind() == ErrorKind::NoSpace => code = Code::ResourceExhausted,
        Cause::Unsupported(_) => code = Code::Unimplemented,
        Cause::Denied { reasons, .. } => details.extend(denial(reasons)),
        _ => {}
    }
    let message = match &*error.cause {
        // As clients know it, and look for it.
        Cause::MissingSource { vertex, what } => format!(
            "failed to compute cache key: failed to calculate checksum of ref {vertex}: {what}"
        ),
        _ => chain(error),
    };
    (code, message, details)
}

/// Says how a process ended.
pub(crate) fn exit_detail(code: i32) -> Any {
    Any { type_url: EXIT.into(), value: json!({ "Code": code }).to_string().into_bytes() }
}

/// Says that a frontend cannot do what it is asked for.
pub(crate) fn unsupported_capability(name: &str) -> Status {
    let details = vec![detail("FrontendCap", &json!({ "name": name }))];
    status(Code::Unimplemented, format!("unsupported frontend capability {name}"), details)
}

/// Returns why a question of the frontend was not answered, where solving is why.
fn cause_of(error: &FrontendError) -> Option<&Cause> {
    let source = error.source.as_ref()?.source.as_ref()?;
    source.downcast_ref::<SolveError>().map(|error| &*error.cause)
}

/// Says why a policy denies something, in its own words.
fn denial(reasons: &[String]) -> Option<Any> {
    let messages: Vec<Value> = reasons.iter().map(|text| json!({ "message": text })).collect();
    let value = json!({ "action": 1, "denyMessages": messages }).to_string().into_bytes();
    (!reasons.is_empty()).then(|| Any { type_url: DENIAL.into(), value })
}

/// Returns what is wrong with what the user wrote as a status.
pub fn frontend_status(error: &FrontendError) -> Status {
    // Another frontend has said it, with details of its own; what it has no place for was asked for here.
    let other = error.source.as_ref().and_then(|error| error.source.as_ref()?.downcast_ref());
    let (code, mut details) = match other {
        Some(status) => (Status::code(status), rpc::Status::from(status).details),
        None => (Code::Unknown, vec![]),
    };
    let placed = details.iter().any(|any| any.type_url == format!("{ERRDEFS}Source+json"));
    for diagnostic in error.diagnostics.iter().filter(|_| !placed) {
        let place = diagnostic.to_warning();
        if let Some(source) = &place.source {
            details.push(source_detail(source, &place.ranges));
        }
    }
    if let Some(Cause::Denied { reasons, .. }) = cause_of(error) {
        details.extend(denial(reasons));
    }
    let messages: Vec<&str> =
        error.diagnostics.iter().map(|diagnostic| diagnostic.message.as_str()).collect();
    let message = if messages.is_empty() { chain(error) } else { messages.join("\n") };
    status(code, message, details)
}

/// Says that something cannot be done here.
pub fn not_yet(what: &str) -> Status {
    Status::unimplemented(format!("{what} is not supported yet"))
}

/// Returns a status that came in a message, with its details as they are.
pub fn from_wire(error: &rpc::Status) -> Status {
    let details = error.encode_to_vec().into();
    Status::with_details(Code::from(error.code), error.message.clone(), details)
}

fn status(code: Code, message: String, details: Vec<Any>) -> Status {
    if details.is_empty() {
        return Status::new(code, message);
    }
    let encoded = rpc::Status { code: code as i32, message: message.clone(), details };
    Status::with_details(code, message, encoded.encode_to_vec().into())
}

fn detail(name: &str, value: &Value) -> Any {
    Any { type_url: format!("{ERRDEFS}{name}+json"), value: value.to_string().into_bytes() }
}

fn source_detail(source: &pb::SourceInfo, ranges: &[pb::Range]) -> Any {
    let mut info = Map::new();
    if !source.filename.is_empty() {
        info.insert("filename".into(), source.filename.clone().into());
    }
    info.insert("data".into(), base64(&source.data));
    if let Some(definition) = &source.definition {
        info.insert("definition".into(), definition_json(definition));
    }
    if !source.language.is_empty() {
        info.insert("language".into(), source.language.clone().into());
    }
    let position = |position: &Option<pb::Position>| {
        let position = position.as_ref().map(|p| (p.line, p.character)).unwrap_or_default();
        json!({ "line": position.0, "character": position.1 })
    };
    let ranges: Vec<Value> = ranges
        .iter()
        .map(|range| json!({ "start": position(&range.start), "end": position(&range.end) }))
        .collect();
    detail("Source", &json!({ "info": info, "ranges": ranges }))
}

fn base64(bytes: &[u8]) -> Value {
    base64::engine::general_purpose::STANDARD.encode(bytes).into()
}

/// The graph that a file came from, as far as a client needs it to get the file again.
fn definition_json(definition: &pb::Definition) -> Value {
    let metadata = definition.metadata.iter().map(|(vertex, metadata)| {
        let mut known = Map::new();
        if metadata.ignore_cache {
            known.insert("ignore_cache".into(), true.into());
        }
        if !metadata.description.is_empty() {
            known.insert("description".into(), json!(metadata.description));
        }
        if !metadata.caps.is_empty() {
            known.insert("caps".into(), json!(metadata.caps));
        }
        (vertex.clone(), Value::Object(known))
    });
    let metadata: Map<String, Value> = metadata.collect();
    let def: Vec<Value> = definition.def.iter().map(|op| base64(op)).collect();
    json!({ "def": def, "metadata": metadata })
}

/// An error with everything that caused it, outermost first, without saying anything twice.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use slipway_engine::solver::FailedVertex;
    use slipway_spec::Digest;

    use super::*;

    #[test]
    fn a_missing_source_is_told_in_the_words_that_clients_look_for() {
        let vertex = Digest::of(b"v");
        let error = SolveError::from(Cause::MissingSource {
            vertex: vertex.clone(),
            what: "\"/x\": not found".into(),
        });
        assert_eq!(error.to_string(), "\"/x\": not found");
        assert_eq!(
            solve_status(&error).message(),
            format!(
                "failed to compute cache key: failed to calculate checksum of ref {vertex}: \"/x\": not found"
            )
        );
    }

    #[test]
    fn a_failed_step_tells_its_vertex_its_place_and_its_code() {
        let position = |line| Some(pb::Position { line, character: 0 });
        let mut error = SolveError::from(Cause::Exit {
            command: "/bin/sh -c false".into(),
            code: 7,
            hint: String::new(),
        });
        let source = pb::SourceInfo {
            filename: "Dockerfile".into(),
            data: b"FROM x\nRUN false\n".to_vec(),
            definition: Some(pb::Definition {
                def: vec![b"op".to_vec()],
                metadata: [("sha256:x".to_owned(), pb::OpMetadata::default())].into(),
                source: None,
            }),
            language: "Dockerfile".into(),
        };
        error.vertex = Some(FailedVertex {
            digest: Digest::of(b"v"),
            name: "RUN false".into(),
            ranges: vec![pb::Range { start: position(2), end: position(2) }],
            source: Some(Arc::new(source)),
        });
        let status = solve_status(&error);
        assert_eq!(
            status.message(),
            "process \"/bin/sh -c false\" did not complete successfully: exit code: 7"
        );
        let details = rpc::Status::decode(status.details()).unwrap().details;
        let kinds: Vec<&str> = details.iter().map(|any| any.type_url.as_str()).collect();
        assert_eq!(
            kinds,
            [
                "github.com/moby/buildkit/errdefs.Vertex+json",
                "github.com/moby/buildkit/errdefs.Source+json",
                "github.com/moby/buildkit/gatewayapi.ExitMessage+json"
            ]
        );
        let place: Value = serde_json::from_slice(&details[1].value).unwrap();
        assert_eq!(place["info"]["filename"], "Dockerfile");
        let definition = &place["info"]["definition"];
        assert_eq!(definition, &json!({ "def": ["b3A="], "metadata": { "sha256:x": {} } }));
        assert_eq!(place["ranges"][0]["start"]["line"], 2);
        assert_eq!(details[2].value, br#"{"Code":7}"#);
    }
}
