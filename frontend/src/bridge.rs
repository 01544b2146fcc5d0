//! The few questions a frontend may ask.

use std::collections::BTreeMap;
use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use slipway_spec::llb::{Definition, pb};
use slipway_spec::{Digest, ImageReference, Platform};

use crate::{Diagnostic, FrontendResult};

/// What a frontend needs from whoever runs it.
///
/// The usual order of calls: `solve` a small definition that names the file to read, `read_file` from it, then
/// `resolve_image` for each base image, one after another or at once. Implementations should remember answers: the same
/// image may be asked for again for another stage.
///
/// Questions that most builds never ask have an answer already: that they cannot be answered here. The frontend puts the
/// place in the user's file to it.
#[async_trait]
pub trait Bridge: Send + Sync {
    /// Finds what an image name points at, and its config for a platform. Where a policy makes it something that is no
    /// image, the error's source is a [`NotAnImage`].
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

    /// Reads the first bytes of a file of a result, at most `length`; `None` when there is no such file.
    async fn read_start(
        &self,
        from: &BridgeRef,
        path: &str,
        length: usize,
    ) -> Result<Option<Bytes>, BridgeError> {
        let file = self.read_file(from, path).await?;
        Ok(file.map(|bytes| bytes.slice(..bytes.len().min(length))))
    }

    /// Finds the config of an image in an OCI layout that the client holds.
    async fn resolve_layout(
        &self,
        image: &LayoutImage,
        _platform: &Platform,
    ) -> Result<ResolvedImage, BridgeError> {
        Err(BridgeError::unsupported(format!("an image of the OCI layout {:?}", image.store)))
    }

    /// Asks a git or HTTP source for what it knows of its age, without fetching it. `shown_as` is for progress.
    async fn resolve_source(
        &self,
        source: &pb::SourceOp,
        _shown_as: &str,
    ) -> Result<SourceMetadata, BridgeError> {
        Err(BridgeError::unsupported(format!("the age of {}", source.identifier)))
    }

    /// Returns when the youngest file of an archive was changed, in seconds since 1970; `None` when the file is no
    /// archive or holds no regular file.
    async fn youngest_file(
        &self,
        _from: &BridgeRef,
        archive: &str,
    ) -> Result<Option<i64>, BridgeError> {
        Err(BridgeError::unsupported(format!("the age of the files in {archive:?}")))
    }

    /// Returns the graphs that the caller gave by name; they stand for local folders of these names.
    async fn inputs(&self) -> Result<BTreeMap<String, Definition>, BridgeError> {
        Ok(BTreeMap::new())
    }

    /// Has the file read by another frontend, which is an image.
    async fn run_frontend(&self, image: FrontendImage) -> Result<FrontendResult, BridgeError> {
        Err(BridgeError::unsupported(format!("the frontend image {:?}", image.source)))
    }

    /// Returns the session of the client whose folders are meant; `None` when there is no other client.
    fn session_id(&self) -> Option<&str> {
        None
    }

    /// Returns whether graphs and results may have what not every caller can handle.
    fn supports(&self, _feature: Feature) -> bool {
        false
    }

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
    /// What the image is called instead, where a policy says so.
    pub reference: Option<ImageReference>,
    /// The digest of the index or manifest.
    pub digest: Digest,
    /// The bytes of the image config for the platform.
    pub config: Bytes,
}

/// An image in an OCI layout of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayoutImage {
    /// Names it for people, and pins it by its digest.
    pub reference: ImageReference,
    /// Which of the client's layouts.
    pub store: String,
    /// The client's session, if it is another one.
    pub session: Option<String>,
}

impl LayoutImage {
    /// Says in the attributes of a source whose layout is meant.
    pub fn attrs(&self) -> BTreeMap<String, String> {
        let session = self.session.clone().map(|session| ("oci.session".to_owned(), session));
        std::iter::once(("oci.store".to_owned(), self.store.clone())).chain(session).collect()
    }

    /// Returns the image as a source.
    pub fn source(&self) -> pb::SourceOp {
        let identifier = format!("oci-layout://{}", self.reference);
        pb::SourceOp { identifier, attrs: self.attrs() }
    }
}

/// What a source knows of its age.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceMetadata {
    /// The commit object of a git source, as git stores it.
    pub commit: Option<Bytes>,
    /// When an HTTP source was last changed, in seconds since 1970.
    pub last_modified: Option<i64>,
}

/// A frontend that is an image, and what it is to be given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FrontendImage {
    /// The image's name.
    pub source: String,
    /// The frontend attributes, with `source` and `cmdline` among them.
    pub attrs: BTreeMap<String, String>,
    /// Graphs by name.
    pub inputs: BTreeMap<String, Definition>,
}

/// What not every caller can handle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Feature {
    /// Merge ops. Without them `COPY --link` is an ordinary copy.
    Merge,
    /// Scanning results for a bill of materials.
    Sbom,
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
    /// Whoever runs the frontend cannot do this.
    Unsupported,
    /// Anything else.
    Other,
}

impl BridgeError {
    /// Makes an error without a cause.
    pub fn new(kind: BridgeErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// Says that something cannot be done here.
    pub fn unsupported(what: impl fmt::Display) -> Self {
        Self::new(BridgeErrorKind::Unsupported, format!("{what} is not supported yet"))
    }

    /// Says that a policy makes an image something that is none.
    pub fn not_an_image(asked: impl Into<String>, becomes: impl Into<String>) -> Self {
        let replaced = NotAnImage { asked: asked.into(), becomes: becomes.into() };
        Self::new(BridgeErrorKind::Other, replaced.to_string()).with_source(replaced)
    }

    /// Returns what a policy makes of an image, where it is no image.
    pub fn as_not_an_image(&self) -> Option<&NotAnImage> {
        self.source.as_ref()?.downcast_ref()
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

/// An image that a policy makes something else. A context by name can be that, the image of a `FROM` cannot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("ref mutated by policy to non-image: {asked} -> {becomes}")]
pub struct NotAnImage {
    /// The identifier of the image.
    pub asked: String,
    /// That of the other source.
    pub becomes: String,
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
