//! The Dockerfile and its ignore file, read through the bridge.

use std::collections::BTreeMap;

use bytes::Bytes;
use slipway_spec::llb::{State, VertexOptions, marshal};
use slipway_spec::pattern::{PatternMatcher, parse_ignore_file};

use super::go_format::json_list;
use super::problem::Problem;
use super::settings::Settings;
use crate::{Bridge, BridgeError, BridgeErrorKind, BridgeRef, Diagnostic, FrontendError};

/// The name of the local source with the files to build from.
pub(crate) const CONTEXT: &str = "context";

/// What was read.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    pub(crate) dockerfile: Bytes,
    /// Patterns of paths that are no part of the context.
    pub(crate) ignored: Vec<String>,
}

pub(crate) async fn read(settings: &Settings, bridge: &dyn Bridge) -> Result<Files, FrontendError> {
    let filename = &settings.filename;
    let ignore_name = format!("{filename}.dockerignore");
    let mut wanted = vec![filename.clone(), ignore_name.clone()];
    let lower = match filename.rsplit_once('/') {
        Some((dir, "Dockerfile")) => Some(format!("{dir}/dockerfile")),
        None if filename == "Dockerfile" => Some("dockerfile".to_owned()),
        _ => None,
    };
    wanted.extend(lower.clone());
    let name = format!("load build definition from {filename}");
    let source = &settings.dockerfile_source;
    let trying = |what: &str| {
        let what = format!("cannot {what}");
        move |error| from_bridge(what, error)
    };
    let reading = format!("read {filename}");
    let found = solve(bridge, source, &wanted, source, &name).await.map_err(trying(&reading))?;
    let mut dockerfile = bridge.read_file(&found, filename).await.map_err(trying(&reading))?;
    if let (None, Some(lower)) = (&dockerfile, &lower) {
        dockerfile = bridge.read_file(&found, lower).await.map_err(trying(&reading))?;
    }
    let Some(dockerfile) = dockerfile else {
        let diagnostic = Diagnostic {
            message: format!("failed to read dockerfile: {filename}: no such file"),
            hint: Some("name the file to build from, such as with --file".into()),
            ..Diagnostic::default()
        };
        let source =
            BridgeError::new(BridgeErrorKind::NotFound, format!("{filename}: no such file"));
        return Err(FrontendError { diagnostics: vec![diagnostic], source: Some(source) });
    };
    let own = bridge
        .read_file(&found, &ignore_name)
        .await
        .map_err(trying(&format!("read {ignore_name}")))?;
    let (ignore_name, ignore_file) = match own {
        Some(bytes) => (ignore_name, Some(bytes)),
        None => {
            let name = ".dockerignore";
            let reading = format!("read {name}");
            let hint = format!("{CONTEXT}-{name}");
            let context =
                solve(bridge, CONTEXT, &[name.to_owned()], &hint, &format!("load {name}"))
                    .await
                    .map_err(trying(&reading))?;
            (name.to_owned(), bridge.read_file(&context, name).await.map_err(trying(&reading))?)
        }
    };
    let ignored = match ignore_file {
        Some(bytes) => parse_ignore_file(&bytes)
            .and_then(|patterns| PatternMatcher::new(&patterns).map(|_| patterns)),
        None => Ok(vec![]),
    };
    let ignored = ignored.map_err(|error| {
        let message = Problem::new(format!("failed parsing {ignore_name}: {error}")).message;
        FrontendError::from(Diagnostic {
            file: ignore_name.clone(),
            message,
            ..Diagnostic::default()
        })
    })?;
    Ok(Files { dockerfile, ignored })
}

/// The files to build from, only those that are used.
pub(crate) fn context(used: &[String], ignored: &[String]) -> State {
    let mut attrs = BTreeMap::from([("local.sharedkeyhint".to_owned(), CONTEXT.to_owned())]);
    if !used.is_empty() {
        attrs.insert("local.followpaths".into(), json_list(used));
    }
    if !ignored.is_empty() {
        attrs.insert("local.excludepatterns".into(), json_list(ignored));
    }
    State::local(CONTEXT, attrs, internal("load build context"))
}

/// Names a vertex that no instruction asked for.
pub(crate) fn internal(name: &str) -> VertexOptions {
    VertexOptions { name: format!("[internal] {name}"), ..VertexOptions::default() }
}

fn from_bridge(message: String, error: BridgeError) -> FrontendError {
    FrontendError::from_bridge(Diagnostic { message, ..Diagnostic::default() }, error)
}

async fn solve(
    bridge: &dyn Bridge,
    local: &str,
    paths: &[String],
    hint: &str,
    name: &str,
) -> Result<BridgeRef, BridgeError> {
    let attrs = [
        ("local.followpaths", json_list(paths)),
        ("local.sharedkeyhint", hint.into()),
        ("local.differ", "none".into()),
    ];
    let attrs = attrs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    let state = State::local(local, attrs, internal(name));
    match marshal(&state, None) {
        Some(definition) => bridge.solve(definition).await,
        None => Err(BridgeError::new(BridgeErrorKind::Other, "a local source cannot be empty")),
    }
}
