//! Where the documents and blobs of a cache are.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use slipway_solver::cache::{self, CacheSource};
use slipway_spec::manifest::MAX_MANIFEST_BYTES;
use slipway_spec::{Descriptor, Digest, ImageReference, MediaType};
use slipway_store::registry::{ManifestName, Registry};
use slipway_store::{Error, ErrorKind, Store, blocking, transfer};
use tokio::io::AsyncReadExt as _;

use super::folder::CacheFolders;

/// A repository, or a folder of the client.
#[derive(Clone, Debug)]
pub(super) enum Place {
    Registry { registry: Registry, reference: ImageReference },
    Folder { folders: Arc<dyn CacheFolders>, folder: String },
}

/// A cache that is read.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) name: String,
    pub(super) place: Place,
}

#[async_trait]
impl CacheSource for Source {
    fn name(&self) -> &str {
        &self.name
    }

    async fn fetch(
        &self,
        store: &Store,
        blob: &Descriptor,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), Error> {
        match &self.place {
            Place::Registry { registry, reference } => {
                transfer::fetch_blob(store, registry, reference, blob, progress).await?;
            }
            Place::Folder { folders, folder } => {
                let (here, digest) = (store.clone(), blob.digest.clone());
                if !blocking::run(move || here.has_blob(&digest)).await? {
                    let what = format!("content {} of {folder}", blob.digest);
                    let Some(stream) = folders.open(folder, &blob.digest).await? else {
                        return Err(Error::new(
                            ErrorKind::NotFound,
                            format!("{what} is not there"),
                        ));
                    };
                    return cache::save(store, &what, stream, blob, progress).await;
                }
            }
        }
        cache::check_size(store, blob).await
    }
}

impl Source {
    /// Reads a manifest or index by its digest; without one, that which the repository's tag points at.
    pub(super) async fn manifest(&self, digest: Option<&Digest>) -> Result<Bytes, Error> {
        match (&self.place, digest) {
            (Place::Registry { registry, reference }, digest) => {
                Ok(registry.manifest(reference, digest).await?.1)
            }
            (Place::Folder { folders, folder }, Some(digest)) => {
                let what = format!("the manifest {digest} in {folder}");
                let Some(stream) = folders.open(folder, digest).await? else {
                    return Err(Error::new(ErrorKind::NotFound, format!("{what} is not there")));
                };
                let mut bytes = vec![];
                let read = stream.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut bytes).await;
                read.map_err(|error| Error::io(format!("cannot read {what}"), error))?;
                if bytes.len() as u64 > MAX_MANIFEST_BYTES {
                    let why = format!("{what} is larger than {MAX_MANIFEST_BYTES} bytes");
                    return Err(Error::new(ErrorKind::Corrupt, why));
                }
                let mut hasher = digest.verifier();
                hasher.update(&bytes);
                if hasher.finish() != *digest {
                    let why = format!("{what} does not match its digest");
                    return Err(Error::new(ErrorKind::Corrupt, why));
                }
                Ok(bytes.into())
            }
            (Place::Folder { folder, .. }, None) => {
                Err(Error::new(ErrorKind::Invalid, format!("a cache in {folder} needs a digest")))
            }
        }
    }

    /// Reads a small document whole.
    pub(super) async fn document(
        &self,
        store: &Store,
        blob: &Descriptor,
        limit: u64,
    ) -> Result<Vec<u8>, Error> {
        if blob.size > limit {
            let why = format!("{} has {} bytes; at most {limit} are read", blob.digest, blob.size);
            return Err(Error::new(ErrorKind::Corrupt, why));
        }
        self.fetch(store, blob, &|_| {}).await?;
        let (store, digest) = (store.clone(), blob.digest.clone());
        blocking::run(move || store.read_blob(&digest, limit)).await
    }
}

impl Place {
    /// Whether it has a blob.
    pub(super) async fn has(&self, blob: &Descriptor) -> Result<bool, Error> {
        match self {
            Self::Registry { registry, reference } => {
                Ok(registry.has_blob(reference, &blob.digest).await?)
            }
            Self::Folder { folders, folder } => {
                Ok(folders.size(folder, &blob.digest).await? == Some(blob.size))
            }
        }
    }

    /// Writes a blob that is in a file.
    pub(super) async fn write(
        &self,
        blob: &Descriptor,
        file: &Path,
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), Error> {
        match self {
            Self::Registry { registry, reference } => {
                registry.push_blob(reference, blob, file, &[], progress).await?;
                Ok(())
            }
            Self::Folder { folders, folder } => folders.write(folder, blob, file).await,
        }
    }

    /// Writes the manifest of a cache, which is named by that.
    pub(super) async fn finish(
        &self,
        manifest: &Descriptor,
        file: &Path,
        bytes: Bytes,
        name: &FolderName<'_>,
    ) -> Result<(), Error> {
        match self {
            Self::Registry { registry, reference } => {
                let tag = match (reference.tag(), reference.digest()) {
                    (Some(tag), None) => ManifestName::Tag(tag.to_owned()),
                    _ => ManifestName::Digest(manifest.digest.clone()),
                };
                let media_type: &MediaType = &manifest.media_type;
                registry.push_manifest(reference, &tag, media_type, bytes).await?;
                Ok(())
            }
            Self::Folder { folders, folder } => {
                folders.write(folder, manifest, file).await?;
                folders.name(folder, name.tag, manifest, name.reset).await
            }
        }
    }
}

/// What a cache is called in its folder.
pub(super) struct FolderName<'a> {
    pub(super) tag: &'a str,
    pub(super) reset: bool,
}
