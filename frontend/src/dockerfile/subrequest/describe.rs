//! What `frontend.subrequests.describe` answers.

use serde::Serialize;

use super::json::pretty;
use super::table::Table;
use super::{DESCRIBE, OUTLINE, TARGETS, VERSION};

#[derive(Debug, Serialize)]
struct Request {
    name: &'static str,
    version: &'static str,
    r#type: &'static str,
    description: &'static str,
    opts: Option<Vec<Named>>,
    inputs: Option<Vec<Named>>,
    metadata: Vec<Named>,
    refs: Option<Vec<Named>>,
}

#[derive(Debug, Serialize)]
struct Named {
    name: &'static str,
    description: &'static str,
}

/// Returns the list of requests as JSON and as text. As in BuildKit, not every request is listed.
pub(super) fn requests() -> (String, String) {
    let request = |name, description, opts| Request {
        name,
        version: VERSION,
        r#type: "rpc",
        description,
        opts,
        inputs: None,
        metadata: ["result.json", "result.txt"]
            .map(|name| Named { name, description: "" })
            .into_iter()
            .collect(),
        refs: None,
    };
    let target = Named { name: "target", description: "Target build stage" };
    let requests = [
        request(OUTLINE, "List all parameters current build target supports", Some(vec![target])),
        request(TARGETS, "List all targets current build supports", Some(vec![])),
        request(DESCRIBE, "List available subrequest types", None),
    ];
    let mut table = Table::new(1);
    table.row(&["NAME", "VERSION", "DESCRIPTION"]);
    for request in &requests {
        let name = request.name.trim_start_matches("frontend.");
        table.row(&[name, request.version, request.description]);
    }
    (pretty(&requests), table.to_string())
}
