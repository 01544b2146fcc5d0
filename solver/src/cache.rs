//! Build caches that are kept elsewhere: in a registry, in a folder, in an image.
//!
//! An [`ImportedCache`] is such a cache as a build looks into it: results by key, of whose layers only the descriptors are
//! known. They are fetched when something needs them. [`CacheRecords`] is what a build has to tell, for a cache to be
//! written. Both sides know results by slipway's own keys, in the form of digests; the documents are BuildKit's.
//!
//! Nothing in a cache is taken on trust but that a result is what its key stands for. A document that makes no sense is
//! refused as a whole, and a layer whose bytes are not what was promised is as good as missing: the step runs instead.

mod document;
mod records;

use std::fmt::Debug;

use async_trait::async_trait;
use slipway_spec::{Descriptor, Digest};
use slipway_store::{Error, ErrorKind, Store, blocking};

pub use self::document::{DocumentError, ImportedCache, ImportedLayer};
pub use self::records::CacheRecords;
use crate::client::ByteStream;

/// A key leads to another one by this selector; BuildKit's documents do not have it.
const ALIAS: &str = "slipway.alias";

/// Where the blobs of a cache are.
#[async_trait]
pub trait CacheSource: Debug + Send + Sync {
    /// Returns what people call it.
    fn name(&self) -> &str;

    /// Saves a blob in the store, unless it is there. What is saved has the digest and the size that were asked for.
    ///
    /// # Errors
    /// When it is not there, or something else is.
    async fn fetch(
        &self,
        store: &Store,
        blob: &Descriptor,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), Error>;
}

/// Saves a blob that comes as a stream, if it is what its descriptor says.
///
/// # Errors
/// When it is something else, or cannot be read; nothing is stored then.
pub async fn save(
    store: &Store,
    what: &str,
    from: ByteStream,
    blob: &Descriptor,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(), Error> {
    let report = |current: u64, _: u64| progress(current);
    crate::source::http::save_stream(store, what, from, Some(&blob.digest), &report).await?;
    check_size(store, blob).await
}

/// Compares the size of content that is here with what is said of it.
///
/// # Errors
/// When they differ, or it is not here.
pub async fn check_size(store: &Store, blob: &Descriptor) -> Result<(), Error> {
    let (store, digest) = (store.clone(), blob.digest.clone());
    let size = blocking::run(move || store.blob_size(&digest)).await?;
    if size == Some(blob.size) {
        return Ok(());
    }
    let found = size.map_or("none".to_owned(), |size| size.to_string());
    let why =
        format!("{} has {} bytes by its descriptor, and {found} in truth", blob.digest, blob.size);
    Err(Error::new(ErrorKind::Corrupt, why))
}

/// Writes a key as a digest.
fn to_digest(key: slipway_store::result::ResultKey) -> Digest {
    Digest::from_sha256(key.0)
}
