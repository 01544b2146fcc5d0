//! What a daemon says of a build that failed: a message, and details that say which vertex failed and where the user
//! wrote it. The value of each detail is JSON, whatever its type is.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost::Message as _;
use serde::Deserialize;
use slipway_spec::llb::pb;
use slipway_spec::wire::rpc;
use tonic::{Code, Status};

const VERTEX: &str = "github.com/moby/buildkit/errdefs.Vertex+json";
const SOURCE: &str = "github.com/moby/buildkit/errdefs.Source+json";
const EXIT: &str = "github.com/moby/buildkit/gatewayapi.ExitMessage+json";

/// Details that are looked at; a status with more is not one of a build.
const MAX_DETAILS: usize = 256;

/// A build that failed, as the daemon tells it.
#[derive(Clone, Debug, PartialEq)]
pub struct RemoteFailure {
    /// Of what kind it is.
    pub code: Code,
    /// What went wrong.
    pub message: String,
    /// The digest of the vertex that failed.
    pub vertex: Option<String>,
    /// Where the user wrote what failed, the innermost place first.
    pub places: Vec<Place>,
    /// What the process of the vertex ended with.
    pub exit_code: Option<i64>,
}

/// Lines of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The file.
    pub source: pb::SourceInfo,
    /// The lines.
    pub ranges: Vec<pb::Range>,
}

#[derive(Deserialize)]
struct VertexDetail {
    digest: String,
}

#[derive(Deserialize)]
struct SourceDetail {
    #[serde(default)]
    info: InfoDetail,
    #[serde(default)]
    ranges: Vec<RangeDetail>,
}

#[derive(Default, Deserialize)]
struct InfoDetail {
    #[serde(default)]
    filename: String,
    #[serde(default)]
    data: String,
    #[serde(default)]
    language: String,
}

#[derive(Deserialize)]
struct RangeDetail {
    #[serde(default)]
    start: PositionDetail,
    #[serde(default)]
    end: PositionDetail,
}

#[derive(Default, Deserialize)]
struct PositionDetail {
    #[serde(default)]
    line: i32,
    #[serde(default)]
    character: i32,
}

#[derive(Deserialize)]
struct ExitDetail {
    #[serde(rename = "Code")]
    code: i64,
}

impl RemoteFailure {
    /// Reads a status. What cannot be read of its details is left out.
    pub fn of(status: &Status) -> Self {
        let mut failure = Self {
            code: status.code(),
            message: status.message().to_owned(),
            vertex: None,
            places: vec![],
            exit_code: None,
        };
        let details = rpc::Status::decode(status.details()).unwrap_or_default().details;
        // The outermost comes first on the wire.
        for detail in details.into_iter().take(MAX_DETAILS).rev() {
            let value = detail.value.as_slice();
            match detail.type_url.as_str() {
                VERTEX if failure.vertex.is_none() => {
                    let vertex = serde_json::from_slice::<VertexDetail>(value).ok();
                    failure.vertex = vertex.map(|vertex| vertex.digest);
                }
                SOURCE => {
                    let place = serde_json::from_slice::<SourceDetail>(value).ok().map(place);
                    failure.places.extend(place.filter(|place| !place.ranges.is_empty()));
                }
                EXIT if failure.exit_code.is_none() => {
                    let exit = serde_json::from_slice::<ExitDetail>(value).ok();
                    failure.exit_code = exit.map(|exit| exit.code);
                }
                _ => {}
            }
        }
        failure
    }

    /// Whether the build was given up rather than failed.
    pub fn is_canceled(&self) -> bool {
        self.code == Code::Cancelled
    }
}

fn place(detail: SourceDetail) -> Place {
    let position =
        |at: PositionDetail| Some(pb::Position { line: at.line, character: at.character });
    Place {
        source: pb::SourceInfo {
            filename: detail.info.filename,
            data: STANDARD.decode(detail.info.data).unwrap_or_default(),
            definition: None,
            language: detail.info.language,
        },
        ranges: detail
            .ranges
            .into_iter()
            .map(|range| pb::Range { start: position(range.start), end: position(range.end) })
            .collect(),
    }
}

impl fmt::Display for RemoteFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for RemoteFailure {}

#[cfg(test)]
mod tests {
    use prost_types::Any;

    use super::*;

    fn status(details: &[(&str, &str)]) -> Status {
        let details = details.iter().map(|(kind, value)| Any {
            type_url: (*kind).into(),
            value: value.as_bytes().to_vec(),
        });
        let status = rpc::Status { code: 2, message: "m".into(), details: details.collect() };
        Status::with_details(Code::Unknown, "m", status.encode_to_vec().into())
    }

    #[test]
    fn details_tell_vertex_places_and_exit_code() {
        let outer = r#"{"info":{"filename":"outer","data":"RlJPTSB4"},"ranges":[{"start":{"line":1},"end":{"line":1}}]}"#;
        let inner = r#"{"info":{"filename":"inner","data":"UlVO"},"ranges":[{"start":{"line":2,"character":3},"end":{"line":4}}]}"#;
        let failure = RemoteFailure::of(&status(&[
            (SOURCE, outer),
            (VERTEX, r#"{"digest":"sha256:ab"}"#),
            (SOURCE, inner),
            (EXIT, r#"{"Code":7}"#),
            ("github.com/moby/buildkit/errdefs.Solve+json", "{}"),
        ]));
        assert_eq!(failure.vertex.as_deref(), Some("sha256:ab"));
        assert_eq!(failure.exit_code, Some(7));
        let names: Vec<_> = failure.places.iter().map(|place| &*place.source.filename).collect();
        assert_eq!(names, ["inner", "outer"]);
        assert_eq!(failure.places[0].source.data, b"RUN");
        assert_eq!(
            failure.places[0].ranges,
            [pb::Range {
                start: Some(pb::Position { line: 2, character: 3 }),
                end: Some(pb::Position { line: 4, character: 0 }),
            }]
        );
        assert!(!failure.is_canceled());
    }

    #[test]
    fn details_that_are_none_are_left_out() {
        for detail in ["", "null", "{", "7", r#"{"ranges":1}"#, r#"{"Code":"x"}"#] {
            for kind in [VERTEX, SOURCE, EXIT] {
                let failure = RemoteFailure::of(&status(&[(kind, detail)]));
                assert_eq!(
                    (failure.vertex, failure.places, failure.exit_code),
                    (None, vec![], None)
                );
            }
        }
        let garbage =
            Status::with_details(Code::Cancelled, "gone", b"\xff\xff\xff".to_vec().into());
        let failure = RemoteFailure::of(&garbage);
        assert!(failure.is_canceled());
        assert_eq!(failure.message, "gone");
    }
}
