//! Named contexts: files or images that the caller gives a name, in place of a stage or an image of that name.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use slipway_spec::llb::{State, VertexOptions};
use slipway_spec::{ImageConfig, ImageReference, Platform};

use super::files::{self, git_context, restrict, some_files};
use super::git;
use super::problem::{Problem, Result};
use super::settings::Settings;
use super::stage::format_all;
use crate::{Bridge, BridgeError, LayoutImage};

/// How often policies may make a context something else.
const MAX_REPLACED: usize = 10;

/// A named context as the caller gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedContext {
    /// What it is, such as `docker-image://alpine`.
    input: String,
    /// Its name.
    name: String,
    /// Its name, with the platform if it was given for that alone.
    key: String,
}

/// What a named context turned out to be.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    files: Contents,
    /// The config of an image, without the time it was made.
    pub(crate) config: Option<ImageConfig>,
    /// The config as it was found.
    pub(crate) original: Option<ImageConfig>,
}

#[derive(Clone, Debug)]
enum Contents {
    Ready(State),
    /// A folder of the client, of which only what is used is sent.
    Local {
        folder: String,
        key: String,
        ignored: Vec<String>,
    },
}

/// Why a named context could not be used.
#[derive(Debug)]
pub(crate) enum LoadError {
    Problem(Problem),
    /// What was tried, and the bridge's answer.
    Bridge(String, BridgeError),
}

impl From<Problem> for LoadError {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

impl Settings {
    /// Finds the context that stands for a stage or image.
    pub(crate) fn context_for(
        &self,
        name: &str,
        platform: &Platform,
    ) -> Result<Option<NamedContext>> {
        if name.eq_ignore_ascii_case("scratch") || name.eq_ignore_ascii_case(files::CONTEXT) {
            return Ok(None);
        }
        self.context_named(name, platform)
    }

    /// Finds a context by name: the one for this platform before the one for all.
    pub(crate) fn context_named(
        &self,
        name: &str,
        platform: &Platform,
    ) -> Result<Option<NamedContext>> {
        let reference: ImageReference = name
            .parse()
            .map_err(|error| Problem::new(format!("invalid context name {name}: {error}")))?;
        let name = reference.familiar();
        let name = name.strip_suffix(":latest").unwrap_or(&name);
        let specific = format!("{name}::{}", format_all(&platform.normalized()));
        let found = [specific.as_str(), name]
            .into_iter()
            .find_map(|key| self.contexts.get(key).map(|input| (key, input)));
        Ok(found.map(|(key, input)| NamedContext {
            input: input.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
        }))
    }
}

impl NamedContext {
    fn called(&self, what: &str) -> VertexOptions {
        VertexOptions { name: format!("[context {}] {what}", self.key), ..VertexOptions::default() }
    }

    /// Finds out what it is. An image is that for `platform`, unless a policy makes it something else.
    pub(crate) async fn load(
        &self,
        settings: &Settings,
        platform: &Platform,
        bridge: &dyn Bridge,
    ) -> std::result::Result<Loaded, LoadError> {
        let mut context = self.clone();
        for _ in 0..MAX_REPLACED {
            let error = match context.load_once(settings, platform, bridge).await {
                Err(LoadError::Bridge(what, error)) => (what, error),
                other => return other,
            };
            match error.1.as_not_an_image().and_then(|image| as_context(&image.becomes)) {
                Some(input) => context.input = input,
                None => return Err(LoadError::Bridge(error.0, error.1)),
            }
        }
        let message = format!("policies make one thing of another without end: {}", self.input);
        Err(Problem::new(message).into())
    }

    async fn load_once(
        &self,
        settings: &Settings,
        platform: &Platform,
        bridge: &dyn Bridge,
    ) -> std::result::Result<Loaded, LoadError> {
        let ready =
            |state: State| Loaded { files: Contents::Ready(state), config: None, original: None };
        let Some((kind, rest)) = self.input.split_once(':') else {
            let message = format!("invalid context specifier {} for {}", self.input, self.key);
            let hint = "it begins with docker-image://, oci-layout://, local:, input:, or is a URL";
            return Err(Problem::new(message).hint(hint).into());
        };
        let path = rest.strip_prefix("//").unwrap_or(rest);
        // Repositories may be named as for ssh.
        let kind = if kind.starts_with("git@") { "git" } else { kind };
        match kind {
            "docker-image" if path == "scratch" => Ok(ready(State::scratch())),
            "docker-image" => self.image(path, settings, platform, bridge).await,
            "oci-layout" => self.layout(path, settings, platform, bridge).await,
            "git" | "http" | "https" => match git::parse(&self.input) {
                git::Found::Git(git) => Ok(ready(git_context(&git, &self.input, false, ""))),
                git::Found::Wrong(reason) => Err(Problem::new(reason).into()),
                git::Found::Other if kind == "git" => {
                    Err(Problem::new(format!("invalid git context {}", self.input)).into())
                }
                git::Found::Other => {
                    let attrs =
                        BTreeMap::from([("http.filename".to_owned(), "context".to_owned())]);
                    Ok(ready(State::http(&self.input, attrs, self.called(&self.input))))
                }
            },
            "local" => self.local(rest, settings, bridge).await,
            "input" => self.input(rest, settings, bridge).await,
            _ => {
                let message = format!("unsupported context source {kind} for {}", self.key);
                Err(Problem::new(message).into())
            }
        }
    }

    fn bridge_error(&self) -> impl FnOnce(BridgeError) -> LoadError {
        let what = format!("cannot load the context {}", self.key);
        move |error| LoadError::Bridge(what, error)
    }

    async fn image(
        &self,
        name: &str,
        settings: &Settings,
        platform: &Platform,
        bridge: &dyn Bridge,
    ) -> std::result::Result<Loaded, LoadError> {
        let reference: ImageReference = name
            .parse()
            .map_err(|error| Problem::new(format!("the context {}: {error}", self.key)))?;
        let found = bridge.resolve_image(&reference, platform, settings.resolve_mode).await;
        let found = found.map_err(self.bridge_error())?;
        let options = VertexOptions { platform: Some(platform.clone()), ..self.called(name) };
        let named = found.reference.as_ref().unwrap_or(&reference);
        let state = State::image(named, BTreeMap::new(), options);
        self.with_config(state, &found.config)
    }

    async fn layout(
        &self,
        name: &str,
        settings: &Settings,
        platform: &Platform,
        bridge: &dyn Bridge,
    ) -> std::result::Result<Loaded, LoadError> {
        let lacks = |what: &str| {
            LoadError::from(Problem::new(format!("oci-layout reference {name:?} has no {what}")))
        };
        let (store, digest) = name.split_once('@').ok_or_else(|| lacks("digest"))?;
        let store = match store.rsplit_once(':') {
            Some((store, tag)) if !tag.contains('/') => store,
            _ => store,
        };
        if store.is_empty() {
            return Err(lacks("name"));
        }
        // The name is for people; the digest says what is meant.
        let reference: ImageReference =
            format!("{}@{digest}", self.name).parse().map_err(|error| {
                Problem::new(format!("could not parse oci-layout reference {name:?}: {error}"))
            })?;
        let image =
            LayoutImage { reference, store: store.to_owned(), session: settings.session.clone() };
        let found = bridge.resolve_layout(&image, platform).await.map_err(self.bridge_error())?;
        let options = VertexOptions {
            platform: Some(platform.clone()),
            ..self.called("OCI load from client")
        };
        let state = State::oci_layout(&image.reference, image.attrs(), options);
        self.with_config(state, &found.config)
    }

    async fn local(
        &self,
        folder: &str,
        settings: &Settings,
        bridge: &dyn Bridge,
    ) -> std::result::Result<Loaded, LoadError> {
        const NAME: &str = ".dockerignore";
        let hint = format!("context:{}-{NAME}", self.key);
        let options = self.called(&format!("load {NAME}"));
        let state = some_files(settings, folder, &[NAME.into()], &hint, options);
        let (_, result) = files::solve(bridge, &state).await.map_err(self.bridge_error())?;
        // As upstream does it, an ignore file that cannot be read counts as none.
        let file = bridge.read_file(&result, NAME).await.unwrap_or_default();
        let ignored = files::read_patterns(NAME, file).map_err(|error| {
            Problem::new(error.diagnostics.into_iter().map(|d| d.message).collect::<String>())
        })?;
        let files = Contents::Local { folder: folder.to_owned(), key: self.key.clone(), ignored };
        Ok(Loaded { files, config: None, original: None })
    }

    async fn input(
        &self,
        name: &str,
        settings: &Settings,
        bridge: &dyn Bridge,
    ) -> std::result::Result<Loaded, LoadError> {
        let inputs = bridge.inputs().await.map_err(self.bridge_error())?;
        let definition = inputs
            .get(name)
            .ok_or_else(|| Problem::new(format!("invalid input {name} for {}", self.key)))?;
        let state = State::from_definition(definition)
            .map_err(|error| Problem::new(format!("invalid input {name}: {error}")))?;
        let Some(metadata) = settings.input_metadata.get(name) else {
            return Ok(Loaded { files: Contents::Ready(state), config: None, original: None });
        };
        let unreadable = |reason: &dyn std::fmt::Display| {
            Problem::new(format!("failed to parse input metadata {metadata}: {reason}"))
        };
        let values: BTreeMap<String, Option<String>> =
            serde_json::from_str(metadata).map_err(|error| unreadable(&error))?;
        match values.get("containerimage.config").and_then(Option::as_ref) {
            Some(text) => {
                let config = base64::engine::general_purpose::STANDARD
                    .decode(text)
                    .map_err(|error| unreadable(&error))?;
                self.with_config(state, &config)
            }
            None => Ok(Loaded { files: Contents::Ready(state), config: None, original: None }),
        }
    }

    fn with_config(&self, state: State, config: &[u8]) -> std::result::Result<Loaded, LoadError> {
        let original: ImageConfig = serde_json::from_slice(config).map_err(|error| {
            Problem::new(format!("failed to parse image config for {}: {error}", self.key))
        })?;
        let mut config = original.clone();
        config.created = None;
        config.rootfs.diff_ids.clear();
        Ok(Loaded { files: Contents::Ready(state), config: Some(config), original: Some(original) })
    }
}

/// Writes the identifier of a source as callers name contexts.
fn as_context(identifier: &str) -> Option<String> {
    let (scheme, rest) = identifier.split_once("://")?;
    Some(match scheme {
        "local" => format!("local:{rest}"),
        // Policies name repositories without what they are reached by.
        "git" => Some(format!("https://{rest}")).filter(|url| git::is_git(url))?,
        _ => identifier.to_owned(),
    })
}

impl Loaded {
    /// Returns the files, of a folder of the client only those that are used; `/` is all of them.
    pub(crate) fn state(&self, settings: &Settings, used: &BTreeSet<String>) -> State {
        match &self.files {
            Contents::Ready(state) => state.clone(),
            Contents::Local { folder, key, ignored } => {
                let shared_key = settings.shared_keys.get(key).map_or("", String::as_str);
                let hint = format!("context:{key}-{shared_key}");
                let mut attrs = BTreeMap::from([("local.sharedkeyhint".to_owned(), hint)]);
                restrict(&mut attrs, used, ignored);
                let name = format!("[context {key}] load from client");
                let options = VertexOptions { name, ..VertexOptions::default() };
                files::local(settings, folder, attrs, options)
            }
        }
    }

    /// Returns whether which files are used makes a difference.
    pub(crate) fn is_local(&self) -> bool {
        matches!(self.files, Contents::Local { .. })
    }
}
