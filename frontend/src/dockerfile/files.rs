//! Where the Dockerfile and the files to build from come from, and reading the former through the bridge.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use slipway_spec::llb::{Copy, Definition, FileActions, State, VertexOptions, marshal};
use slipway_spec::pattern::{PatternMatcher, clean_path, parse_ignore_file};

use super::go_format::json_list;
use super::settings::Settings;
use super::{archive, git};
use crate::{Bridge, BridgeError, BridgeErrorKind, BridgeRef, Diagnostic, FrontendError};

/// The name of the local source with the files to build from.
pub(crate) const CONTEXT: &str = "context";

/// What was read, and what there is to build from.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    pub(crate) dockerfile: Bytes,
    /// The Dockerfile's path where it was found.
    pub(crate) filename: String,
    /// The graph that it was read from.
    pub(crate) origin: Option<Arc<Definition>>,
    /// Patterns of paths that are no part of the context; there are none unless the client sends it.
    pub(crate) ignored: Vec<String>,
    /// The files to build from, unless the client sends them.
    pub(crate) remote: Option<State>,
    /// The ignore file that belongs to the Dockerfile.
    own_ignore_file: Option<Bytes>,
}

/// Finds the context and reads the Dockerfile.
pub(crate) async fn read(settings: &Settings, bridge: &dyn Bridge) -> Result<Files, FrontendError> {
    let mut filename = settings.filename.clone();
    let found = find(settings, bridge).await?;
    if let Some(only) = found.only_file {
        filename = only;
    }
    let ignore_name = format!("{filename}.dockerignore");
    // Files may also be called this, because people do it.
    let lower = match filename.rsplit_once('/') {
        Some((dir, "Dockerfile")) => Some(clean_path(&format!("{dir}/dockerfile"))),
        None if filename == "Dockerfile" => Some("dockerfile".to_owned()),
        _ => None,
    };
    let source = match found.dockerfile.filter(|_| !settings.force_local_dockerfile) {
        Some(state) => state,
        None => {
            let mut wanted = vec![filename.clone(), ignore_name.clone()];
            wanted.extend(lower.clone());
            let name = format!("load build definition from {filename}");
            let local = &settings.dockerfile_source;
            some_files(settings, local, &wanted, local, internal(&name))
        }
    };
    let reading = format!("read {filename}");
    let (definition, result) = solve(bridge, &source).await.map_err(trying(&reading))?;
    let mut dockerfile = bridge.read_file(&result, &filename).await.map_err(trying(&reading))?;
    if let (None, Some(lower)) = (&dockerfile, &lower) {
        dockerfile = bridge.read_file(&result, lower).await.map_err(trying(&reading))?;
    }
    let Some(dockerfile) = dockerfile else {
        let diagnostic = Diagnostic {
            message: format!("failed to read dockerfile: {filename}: no such file"),
            hint: Some("name the file to build from, such as with --file".into()),
            ..Diagnostic::default()
        };
        let source =
            BridgeError::new(BridgeErrorKind::NotFound, format!("{filename}: no such file"));
        let error = FrontendError::from(diagnostic);
        return Err(FrontendError { source: Some(source), ..error });
    };
    let own_ignore_file = bridge
        .read_file(&result, &ignore_name)
        .await
        .map_err(trying(&format!("read {ignore_name}")))?;
    Ok(Files {
        dockerfile,
        filename,
        origin: Some(Arc::new(definition)),
        ignored: vec![],
        remote: found.context,
        own_ignore_file,
    })
}

impl Files {
    /// Reads which files of the client are no part of the context. What is fetched has no such files.
    pub(crate) async fn read_ignored(
        &mut self,
        settings: &Settings,
        bridge: &dyn Bridge,
    ) -> Result<(), FrontendError> {
        if self.remote.is_some() {
            return Ok(());
        }
        let (name, bytes) = match self.own_ignore_file.take() {
            Some(bytes) => (format!("{}.dockerignore", self.filename), Some(bytes)),
            None => {
                let name = ".dockerignore";
                let hint = format!("{CONTEXT}-{name}");
                let options = internal(&format!("load {name}"));
                let state = some_files(settings, CONTEXT, &[name.into()], &hint, options);
                let reading = format!("read {name}");
                let (_, result) = solve(bridge, &state).await.map_err(trying(&reading))?;
                // Whoever sends no context has no ignore file; a build that reads the context finds out.
                let bytes = match bridge.read_file(&result, name).await {
                    Err(error) if error.kind == BridgeErrorKind::NotFound => None,
                    other => other.map_err(trying(&reading))?,
                };
                (name.to_owned(), bytes)
            }
        };
        self.ignored = read_patterns(&name, bytes)?;
        Ok(())
    }

    /// Returns the files to build from, of the client's only those that are used; `/` is all of them.
    pub(crate) fn context(&self, settings: &Settings, used: &BTreeSet<String>) -> State {
        if let Some(remote) = &self.remote {
            return remote.clone();
        }
        let options = internal("load build context");
        let mut attrs = BTreeMap::from([("local.sharedkeyhint".to_owned(), CONTEXT.to_owned())]);
        restrict(&mut attrs, used, &self.ignored);
        local(settings, CONTEXT, attrs, options)
    }
}

/// Parses an ignore file.
pub(crate) fn read_patterns(name: &str, file: Option<Bytes>) -> Result<Vec<String>, FrontendError> {
    let Some(bytes) = file else { return Ok(vec![]) };
    parse_ignore_file(&bytes)
        .and_then(|patterns| PatternMatcher::new(&patterns).map(|_| patterns))
        .map_err(|error| {
            FrontendError::from(Diagnostic {
                file: name.to_owned(),
                message: format!("failed parsing {name}: {error}"),
                ..Diagnostic::default()
            })
        })
}

/// Adds which files of a folder are to be sent.
pub(crate) fn restrict(
    attrs: &mut BTreeMap<String, String>,
    used: &BTreeSet<String>,
    ignored: &[String],
) {
    if !used.contains("/") && !used.is_empty() {
        let used: Vec<String> =
            used.iter().map(|path| path.trim_start_matches('/').to_owned()).collect();
        attrs.insert("local.followpaths".into(), json_list(&used));
    }
    if !ignored.is_empty() {
        attrs.insert("local.excludepatterns".into(), json_list(ignored));
    }
}

/// A folder of the client.
pub(crate) fn local(
    settings: &Settings,
    name: &str,
    mut attrs: BTreeMap<String, String>,
    options: VertexOptions,
) -> State {
    if let Some(session) = settings.local_sessions.get(name).or(settings.session.as_ref()) {
        attrs.insert("local.session".into(), session.clone());
    }
    State::local(name, attrs, options)
}

/// A few files of a folder of the client, sent whatever was sent before.
pub(crate) fn some_files(
    settings: &Settings,
    name: &str,
    paths: &[String],
    hint: &str,
    options: VertexOptions,
) -> State {
    let attrs = [
        ("local.followpaths", json_list(paths)),
        ("local.sharedkeyhint", hint.to_owned()),
        ("local.differ", "none".to_owned()),
    ];
    let attrs = attrs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    local(settings, name, attrs, options)
}

/// Names a vertex that no instruction asked for.
pub(crate) fn internal(name: &str) -> VertexOptions {
    VertexOptions { name: format!("[internal] {name}"), ..VertexOptions::default() }
}

/// Makes an error that says what was tried.
pub(crate) fn trying(what: &str) -> impl FnOnce(BridgeError) -> FrontendError {
    let message = format!("cannot {what}");
    move |error| FrontendError::from_bridge(Diagnostic { message, ..Diagnostic::default() }, error)
}

/// Hands a state to the bridge.
pub(crate) async fn solve(
    bridge: &dyn Bridge,
    state: &State,
) -> Result<(Definition, BridgeRef), BridgeError> {
    match marshal(state, None) {
        Some(definition) => Ok((definition.clone(), bridge.solve(definition).await?)),
        None => Err(BridgeError::new(BridgeErrorKind::NotFound, "there are no files")),
    }
}

/// Where the Dockerfile and the files to build from are, as far as they are not folders of the client.
#[derive(Default)]
struct Found {
    context: Option<State>,
    dockerfile: Option<State>,
    /// What is built from is this file alone, and it is the Dockerfile.
    only_file: Option<String>,
}

async fn find(settings: &Settings, bridge: &dyn Bridge) -> Result<Found, FrontendError> {
    let text = &settings.remote_context;
    let mut found = match git::parse(text) {
        git::Found::Wrong(reason) => {
            let message = format!("the build context {text} cannot be read: {reason}");
            return Err(Diagnostic { message, ..Diagnostic::default() }.into());
        }
        git::Found::Git(git) => {
            // A time that was asked for is worth nothing if files are dated when they are fetched.
            let epoch = settings.build_args.get("SOURCE_DATE_EPOCH");
            let mtime = if epoch.is_some_and(|epoch| !epoch.is_empty()) { "commit" } else { "" };
            let state = git_context(&git, text, settings.keep_git_dir == Some(true), mtime);
            Found { context: Some(state.clone()), dockerfile: Some(state), only_file: None }
        }
        git::Found::Other if text.starts_with("http://") || text.starts_with("https://") => {
            http_context(text, bridge).await?
        }
        git::Found::Other => inputs(settings, bridge).await?,
    };
    if let (Some(context), Some(dir)) = (&found.context, &settings.context_subdir) {
        let copy = Copy {
            src: clean_path(&format!("/{dir}")),
            dest: "/".into(),
            dir_copy_contents: true,
            ..Copy::default()
        };
        let actions = FileActions::new().copy(context, copy);
        found.context = Some(State::scratch().file(actions, VertexOptions::default()));
    }
    Ok(found)
}

/// The files of a repository, as context.
pub(crate) fn git_context(git: &git::GitRef, text: &str, keep_git_dir: bool, mtime: &str) -> State {
    let keep = keep_git_dir || git.keep_git_dir == Some(true);
    let mtime = if git.mtime.is_empty() { mtime } else { &git.mtime };
    git.to_state(keep, &git.checksum, mtime, internal(&format!("load git source {text}")))
}

async fn http_context(url: &str, bridge: &dyn Bridge) -> Result<Found, FrontendError> {
    const NAME: &str = "context";
    /// Enough to know an archive by.
    const START: usize = 1024;
    let attrs = BTreeMap::from([("http.filename".to_owned(), NAME.to_owned())]);
    let file = State::http(url, attrs, internal("load remote build context"));
    let reading = format!("read the build context {url}");
    let (_, result) = solve(bridge, &file).await.map_err(trying(&reading))?;
    let start = bridge.read_start(&result, NAME, START).await.map_err(trying(&reading))?;
    let start = start.ok_or_else(|| {
        let missing = BridgeError::new(BridgeErrorKind::NotFound, "nothing was downloaded");
        trying(&reading)(missing)
    })?;
    if !archive::is_archive(&start) {
        return Ok(Found {
            context: Some(file.clone()),
            dockerfile: Some(file),
            only_file: Some(NAME.into()),
        });
    }
    let copy =
        Copy { src: format!("/{NAME}"), dest: "/".into(), attempt_unpack: true, ..Copy::default() };
    let actions = FileActions::new().copy(&file, copy);
    let unpacked = State::scratch().file(actions, VertexOptions::default());
    Ok(Found { context: Some(unpacked.clone()), dockerfile: Some(unpacked), only_file: None })
}

async fn inputs(settings: &Settings, bridge: &dyn Bridge) -> Result<Found, FrontendError> {
    let inputs = bridge.inputs().await.map_err(trying("get the inputs of the frontend"))?;
    let take = |name: &str| match inputs.get(name) {
        None => Ok(None),
        Some(definition) => State::from_definition(definition).map(Some).map_err(|error| {
            let message = format!("the input {name:?} cannot be read: {error}");
            FrontendError::from(Diagnostic { message, ..Diagnostic::default() })
        }),
    };
    let dockerfile =
        if settings.force_local_dockerfile { None } else { take(&settings.dockerfile_source)? };
    Ok(Found { context: take(CONTEXT)?, dockerfile, only_file: None })
}
