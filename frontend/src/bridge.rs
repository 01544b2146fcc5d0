//! The few questions a frontend may ask.

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use slipway_spec::llb::Definition;
use slipway_spec::{Digest, ImageReference, Platform};

use crate::Diagnostic;

/// What a frontend needs from whoever runs it.
///
/// The usual order of calls: `solve` a small definition that names the file to read, `read_file` from it, then
/// `resolve_image` for each base image, one after another or at once. Implementations should remember answers: the same
/// image may be asked for again for another stage.
#[async_trait]
pub trait Bridge: Send + Sync {
    /// Finds what an image name points at, and its config for a platform.
    async fn resolve_image(
        &self,
        image: &ImageReference,
        platform: &Platform,
        mode: ResolveMode,
    ) -> Result<ResolvedImage, BridgeError>;

    /// Accepts a graph. It need not be solved before it is read from.
    async fn solve(&self, definition: Definition) -> Result<BridgeRef, BridgeError>;

    /// Reads a file of a result; `None` when there is no such file.
    async fn read_file(&self, from: &BridgeRef, path: &str) -> Result<Option<Bytes>, BridgeError>;

    /// Shows the user something worth mending that does not stop the build.
    fn warn(&self, warning: Diagnostic);
}

/// Where an image name is looked up, frontend attribute `image-resolve-mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResolveMode {
    /// As the caller prefers.
    #[default]
    Default,
    /// At the registry, even if the name is known here.
    Pull,
    /// Here, if the name is known.
    Local,
}

/// What an image name points at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedImage {
    /// The digest of the index or manifest.
    pub digest: Digest,
    /// The bytes of the image config for the platform.
    pub config: Bytes,
}

/// A result that the bridge keeps for the frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BridgeRef(pub u64);

/// Why a question has no answer.
#[derive(Debug)]
pub struct BridgeError {
    /// For callers that act on it.
    pub kind: BridgeErrorKind,
    /// For people.
    pub message: String,
    /// What caused it.
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The kinds of [`BridgeError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BridgeErrorKind {
    /// The thing does not exist.
    NotFound,
    /// The caller may not have it.
    Unauthorized,
    /// The build was given up.
    Canceled,
    /// Anything else.
    Other,
}

impl BridgeError {
    /// Makes an error without a cause.
    pub fn new(kind: BridgeErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        self.source = Some(source.into());
        self
    }
}

impl fmt::Display for BridgeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for BridgeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as &(dyn std::error::Error + 'static))
    }
}
