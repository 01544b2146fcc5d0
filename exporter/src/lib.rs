//! Snapshots go in, something a person can use comes out: an image in the store, an archive, or plain files.
//!
//! [`image::assemble`] turns a build's results into a manifest or an index in the content store; the other exporters
//! write what the store holds somewhere else.

pub mod annotations;
pub mod attestation;
pub mod error;
pub mod files;
pub mod image;
pub mod options;
pub mod sink;

pub use attestation::Attestation;
pub use error::{ExportError, Result};
pub use files::FileOptions;
pub use image::{Assembled, PlatformResult, assemble};
pub use options::ImageOptions;
pub use sink::OutputSink;
