//! Errors as clients of BuildKit expect them: a status with details that say which vertex failed and where the user wrote
//! it. The value of each detail is JSON, whatever its message is.

use base64::Engine as _;
use prost::Message as _;
use prost_types::Any;
use serde_json::{Map, Value, json};
use slipway_engine::BuildError;
use slipway_engine::frontend::{BridgeError, BridgeErrorKind, FrontendError};
use slipway_engine::solver::{Cause, SolveError};
use slipway_engine::store::ErrorKind;
use slipway_spec::llb::pb;
use slipway_spec::wire::rpc;
use tonic::{Code, Status};

const ERRDEFS: &str = "github.com/moby/buildkit/errdefs.";
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

/// Returns a failed step as a status.
pub fn solve_status(error: &SolveError) -> Status {
    let mut details = vec![];
    if let Some(vertex) = &error.vertex {
        details.push(detail("Vertex", &json!({ "digest": vertex.digest.to_string() })));
        if let Some(source) = &vertex.source {
            details.push(source_detail(source, &vertex.ranges));
        }
    }
    let mut code = Code::Unknown;
    match &*error.cause {
        Cause::Exit { code, .. } => {
            let value = json!({ "Code": code }).to_string().into_bytes();
            details.push(Any { type_url: EXIT.into(), value });
        }
        Cause::Store(error) if error.kind() == ErrorKind::NoSpace => code = Code::ResourceExhausted,
        Cause::Unsupported(_) => code = Code::Unimplemented,
        _ => {}
    }
    status(code, chain(error), details)
}

/// Returns what is wrong with what the user wrote as a status.
pub fn frontend_status(error: &FrontendError) -> Status {
    let mut details = vec![];
    for diagnostic in &error.diagnostics {
        let place = diagnostic.to_warning();
        if let Some(source) = &place.source {
            details.push(source_detail(source, &place.ranges));
        }
    }
    let messages: Vec<&str> =
        error.diagnostics.iter().map(|diagnostic| diagnostic.message.as_str()).collect();
    let message = if messages.is_empty() { chain(error) } else { messages.join("\n") };
    status(Code::Unknown, message, details)
}

/// Returns an answer that a frontend did not get as a status.
pub fn bridge_status(error: &BridgeError) -> Status {
    let code = match error.kind {
        BridgeErrorKind::NotFound => Code::NotFound,
        BridgeErrorKind::Unauthorized => Code::PermissionDenied,
        BridgeErrorKind::Canceled => Code::Cancelled,
        BridgeErrorKind::Unsupported => Code::Unimplemented,
        BridgeErrorKind::Other => Code::Unknown,
    };
    status(code, chain(error), vec![])
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
    let data = base64::engine::general_purpose::STANDARD.encode(&source.data);
    info.insert("data".into(), data.into());
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
            definition: None,
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
        assert_eq!(place["ranges"][0]["start"]["line"], 2);
        assert_eq!(details[2].value, br#"{"Code":7}"#);
    }
}
