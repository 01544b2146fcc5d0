//! Frontends: what a user wrote goes in, a marshalled build graph comes out.
//!
//! A frontend performs no I/O. It gets a [`FrontendRequest`] and asks the few things it must know of the outside
//! through a [`Bridge`]; it answers with one graph and image config for each platform, or with
//! [`Diagnostic`]s that point into the user's file.

pub mod attest;
mod bridge;
mod csv;
mod diagnostic;
pub mod dockerfile;
pub mod scan;

use std::collections::BTreeMap;

use slipway_spec::attestation::Attestation;
use slipway_spec::llb::Definition;
use slipway_spec::{ImageConfig, Platform};

pub use bridge::{
    Bridge, BridgeError, BridgeErrorKind, BridgeRef, Feature, FrontendImage, LayoutImage,
    NotAnImage, ResolveMode, ResolvedImage, SourceMetadata,
};
pub use diagnostic::{Diagnostic, FrontendError, Severity, Span};
pub use scan::Scanner;

/// What is to be built.
#[derive(Clone, Debug)]
pub struct FrontendRequest {
    /// BuildKit's frontend attributes: `filename`, `target`, `platform`, `build-arg:<NAME>` and so on.
    pub attrs: BTreeMap<String, String>,
    /// The platform that builds run on by default.
    pub build_platform: Platform,
}

/// One graph and config for each platform.
#[derive(Clone, Debug, Default)]
pub struct FrontendResult {
    /// In the order in which the platforms were asked for.
    pub images: Vec<PlatformImage>,
    /// Whether the result is meant to be an index even if it has one image.
    pub multi_platform: bool,
    /// The answer to a `requestid`, by BuildKit's names: `result.json`, `result.txt`, … There are no images then.
    pub metadata: BTreeMap<String, Vec<u8>>,
    /// Caches to look into, as the attributes `cache-imports` and `cache-from` name them.
    pub cache_imports: Vec<CacheImport>,
}

/// A cache to look into.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheImport {
    /// Its kind, such as `registry`.
    pub kind: String,
    /// Where it is, and so on.
    pub attrs: BTreeMap<String, String>,
}

/// What to build for one platform.
#[derive(Clone, Debug)]
pub struct PlatformImage {
    /// The platform.
    pub platform: Platform,
    /// The file system; `None` is the empty one.
    pub definition: Option<Definition>,
    /// The config, complete but for `rootfs` and times.
    ///
    /// Its history has the base image's entries first, then one entry for each instruction that leaves a trace.
    pub config: ImageConfig,
    /// How many entries of the history are the base image's.
    pub base_history_len: usize,
    /// The config of the image that the target was built on, as it was found.
    pub base_config: Option<ImageConfig>,
    /// The time that new things are dated with, in seconds since 1970.
    pub epoch: Option<i64>,
    /// What is to be said of it; a file system that is `None` is the empty one.
    pub attestations: Vec<Attestation<Option<Definition>>>,
}
