//! What is said of a result beside the result itself: what it was built from, and what it is made of.
//!
//! A frontend or the builder gives [`Attestation`]s; outputs make in-toto statements of them (in-toto Attestation
//! Framework, `https://in-toto.io/Statement/v1`).

pub mod beside;
mod json;
pub(crate) mod manifest;
pub(crate) mod reading;
pub(crate) mod sbom;
mod statement;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
pub use slipway_spec::attestation::{INLINE_ONLY, SBOM_CORE, SPDX, Subject};
use slipway_store::Store;
use slipway_store::snapshot::Snapshot;

use crate::error::Result;

/// Something that is said of a result.
#[derive(Clone, Debug)]
pub struct Attestation {
    /// Where it is said.
    pub content: Content,
    /// The type of what is said, a URI. Of a bundle: the only type that its statements may have; empty is any.
    pub predicate_type: String,
    /// What it is said of; nothing is the result itself.
    pub subjects: Vec<Subject>,
    /// The file, in the file system it comes from and beside files that are exported. Of a bundle: the folder.
    pub path: String,
    /// What frontends say of it under BuildKit's names, such as `reason`.
    pub metadata: BTreeMap<String, Bytes>,
}

/// Where what is said is found.
#[derive(Clone, Debug)]
pub enum Content {
    /// The predicate is a file, in JSON.
    File(Snapshot),
    /// A folder of whole statements, in JSON.
    Bundle(Snapshot),
    /// The predicate is made when everything else is.
    Made(Arc<dyn MakePredicate>),
}

/// Makes a predicate, which may speak of blobs in the store.
pub trait MakePredicate: fmt::Debug + Send + Sync {
    /// Returns the predicate in JSON. Blocks.
    ///
    /// # Errors
    /// When the store fails, or it cannot be said.
    fn make(&self, store: &Store) -> Result<Vec<u8>>;
}

impl Attestation {
    /// Returns the file system it comes from, if it comes from one.
    pub fn snapshot(&self) -> Option<&Snapshot> {
        match &self.content {
            Content::File(snapshot) | Content::Bundle(snapshot) => Some(snapshot),
            Content::Made(_) => None,
        }
    }

    /// Whether it belongs into images alone.
    pub fn is_inline_only(&self) -> bool {
        self.metadata.get(INLINE_ONLY).is_some_and(|value| value.as_ref() == b"true")
    }
}
