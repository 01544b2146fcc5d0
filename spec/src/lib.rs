//! The words of outside specifications: OCI images, platforms, references and LLB.
//!
//! This crate is a leaf. It performs no I/O and knows nothing of the other crates; everybody may use it.
//!
//! - [`Digest`] and [`Descriptor`] point at bytes;
//! - [`Platform`] and [`ImageReference`] say which image is meant;
//! - [`Manifest`], [`Index`] and [`ImageConfig`] are the documents of an image;
//! - [`attestation`] is what is said of a result beside the result itself;
//! - [`credentials`] keeps secrets out of what is shown;
//! - [`cache_config`] is the document of a build cache;
//! - [`llb`] is the build graph that frontends write and the solver reads;
//! - [`progress`] is what a build tells its caller while it runs;
//! - [`purl`] names images in package URLs;
//! - [`flag`] reads truth as Go does;
//! - [`pattern`] matches paths as `.dockerignore` does;
//! - `wire`, with the feature `grpc`, has the gRPC services of a build daemon and its clients.

pub mod attestation;
pub mod cache_config;
pub mod credentials;
pub mod descriptor;
pub mod digest;
pub mod flag;
pub mod image_config;
pub mod llb;
pub mod manifest;
pub mod media_type;
pub mod pattern;
pub mod platform;
pub mod progress;
pub mod purl;
pub mod reference;
pub mod timestamp;
#[cfg(feature = "grpc")]
pub mod wire;

pub use descriptor::Descriptor;
pub use digest::{Digest, DigestError, Hasher};
pub use image_config::{ContainerConfig, Healthcheck, History, ImageConfig, RootFs};
pub use manifest::{Index, Manifest};
pub use media_type::MediaType;
pub use platform::{Platform, PlatformError};
pub use reference::{ImageReference, ReferenceError};
