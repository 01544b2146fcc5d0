//! Images as sources: what a name points at, and which layers that is.

use std::sync::Arc;

use bytes::Bytes;
use slipway_spec::manifest::{Document, MAX_MANIFEST_BYTES};
use slipway_spec::{
    Descriptor, Digest, ImageConfig, ImageReference, Manifest, Platform, timestamp,
};
use slipway_store::image::MAX_CONFIG_BYTES;
use slipway_store::registry::{Registry, RegistryErrorKind};
use slipway_store::snapshot::{LayerId, Snapshot};
use slipway_store::{Store, blocking, transfer};

use crate::error::{Cause, Result, SolveError};

/// Where a name is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lookup {
    /// In the store, then at the registry.
    StoreFirst,
    /// At the registry, even when the store knows the name.
    Registry,
    /// In the store alone.
    StoreOnly,
}

/// Finds images in the store and at registries.
#[derive(Clone, Debug)]
pub struct Images {
    store: Store,
    registry: Registry,
}

/// An image of one platform.
#[derive(Clone, Debug)]
pub struct ResolvedImage {
    /// What the name points at: an index or a manifest.
    pub target: Descriptor,
    /// The platform's manifest.
    pub manifest: Manifest,
    /// The config as it is written.
    pub config: Bytes,
    /// The config.
    pub parsed: ImageConfig,
}

/// A layer that is known here, and where to fetch its bytes when they are needed.
#[derive(Clone, Debug)]
pub struct RemoteLayer {
    /// The layer.
    pub layer: LayerId,
    /// The image it is part of.
    pub reference: ImageReference,
    /// Its blob.
    pub descriptor: Descriptor,
}

impl Images {
    /// Looks in a store and at registries.
    pub fn new(store: Store, registry: Registry) -> Self {
        Self { store, registry }
    }

    /// Returns the registry client.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Finds an image and its config for a platform; layers are not fetched.
    ///
    /// # Errors
    /// When there is no such image, or not for that platform.
    pub async fn resolve(
        &self,
        reference: &ImageReference,
        platform: &Platform,
        lookup: Lookup,
    ) -> Result<ResolvedImage> {
        if lookup != Lookup::Registry
            && let Some(found) = self.resolve_in_store(reference, platform).await?
        {
            return Ok(found);
        }
        if lookup == Lookup::StoreOnly {
            return Err(Cause::Missing(format!(
                "image {reference} is not in the store for {platform}"
            ))
            .into());
        }
        match self.resolve_at_registry(reference, platform).await {
            Err(error) => Err(self.explain(reference, platform, error).await?),
            found => found,
        }
    }

    async fn resolve_at_registry(
        &self,
        reference: &ImageReference,
        platform: &Platform,
    ) -> Result<ResolvedImage> {
        let target = match reference.digest() {
            Some(digest) => self.document(reference, digest).await?.0,
            None => self.registry.resolve(reference).await?,
        };
        self.resolve_target(reference, platform, target).await
    }

    /// A name that the store knows, but not for this platform, is the better explanation of a registry's failure.
    async fn explain(
        &self,
        reference: &ImageReference,
        platform: &Platform,
        error: SolveError,
    ) -> Result<SolveError> {
        let (store, name) = (self.store.clone(), reference.to_string());
        let offered = blocking::run(move || match store.image(&name)? {
            Some(image) => store.platforms(&image.target),
            None => Ok(vec![]),
        })
        .await?;
        if offered.is_empty() || !matches!(*error.cause, Cause::Registry(_)) {
            return Ok(error);
        }
        let offered: Vec<String> = offered.iter().map(|offer| offer.platform.to_string()).collect();
        Ok(Cause::Missing(format!(
            "image {reference} is in the store for {}, not for {platform}, and its registry did not help: {error}",
            offered.join(", ")
        ))
        .into())
    }

    async fn resolve_in_store(
        &self,
        reference: &ImageReference,
        platform: &Platform,
    ) -> Result<Option<ResolvedImage>> {
        let (store, name) = (self.store.clone(), reference.clone());
        let platform_wanted = platform.clone();
        let found = blocking::run(move || {
            let target = match name.digest() {
                Some(digest) => store.blob_size(digest)?.map(|size| {
                    // The bytes say what they are.
                    Descriptor::new(slipway_spec::MediaType::OCI_INDEX, digest.clone(), size)
                }),
                None => store.image(&name.to_string())?.map(|image| image.target),
            };
            let Some(target) = target else { return Ok(None) };
            let Some(found) = store.select(&target, &platform_wanted)? else { return Ok(None) };
            if !store.has_blob(&target.digest)? || !store.has_blob(&found.manifest.config.digest)? {
                return Ok(None);
            }
            let config = store.read_blob(&found.manifest.config.digest, MAX_CONFIG_BYTES)?;
            Ok(Some((target, found.manifest, config)))
        })
        .await?;
        let Some((target, manifest, config)) = found else { return Ok(None) };
        Ok(Some(self.finish(reference, target, manifest, config.into())?))
    }

    /// Fetches a manifest or index unless it is here, and keeps it.
    async fn document(
        &self,
        reference: &ImageReference,
        digest: &Digest,
    ) -> Result<(Descriptor, Document)> {
        let (store, wanted) = (self.store.clone(), digest.clone());
        let here = blocking::run(move || {
            if store.has_blob(&wanted)? {
                store.read_blob(&wanted, MAX_MANIFEST_BYTES).map(Some)
            } else {
                Ok(None)
            }
        })
        .await?;
        let bytes = match here {
            Some(bytes) => Bytes::from(bytes),
            None => {
                let (descriptor, bytes) = self.registry.manifest(reference, Some(digest)).await?;
                let (store, kept) = (self.store.clone(), bytes.clone());
                blocking::run(move || store.put(descriptor.media_type, &kept)).await?;
                bytes
            }
        };
        let document = Document::parse(&bytes)
            .map_err(|error| Cause::Invalid(format!("image {reference}: {error}")))?;
        let media_type = match &document {
            Document::Manifest(manifest) => {
                manifest.media_type.clone().unwrap_or(slipway_spec::MediaType::OCI_MANIFEST)
            }
            Document::Index(index) => {
                index.media_type.clone().unwrap_or(slipway_spec::MediaType::OCI_INDEX)
            }
        };
        Ok((Descriptor::new(media_type, digest.clone(), bytes.len() as u64), document))
    }

    async fn resolve_target(
        &self,
        reference: &ImageReference,
        platform: &Platform,
        target: Descriptor,
    ) -> Result<ResolvedImage> {
        let (target, mut document) = self.document(reference, &target.digest).await?;
        // Indexes may be nested, but not without end.
        for _ in 0..4 {
            match document {
                Document::Manifest(manifest) => {
                    let config = self.config(reference, &manifest).await?;
                    return self.finish(reference, target, manifest, config);
                }
                Document::Index(index) => {
                    let Some(entry) = index.best_for(platform) else {
                        let offered: Vec<String> = index
                            .manifests
                            .iter()
                            .filter(|entry| !entry.is_attestation())
                            .filter_map(|entry| entry.platform.as_ref().map(ToString::to_string))
                            .collect();
                        return Err(Cause::Missing(format!(
                            "image {reference} has nothing for {platform}; it is offered for {}",
                            offered.join(", ")
                        ))
                        .into());
                    };
                    document = self.document(reference, &entry.digest).await?.1;
                }
            }
        }
        Err(Cause::Invalid(format!("image {reference}: indexes are nested too deeply")).into())
    }

    async fn config(&self, reference: &ImageReference, manifest: &Manifest) -> Result<Bytes> {
        let descriptor = &manifest.config;
        if !descriptor.media_type.is_config() {
            let kind = manifest.artifact_type.as_deref().unwrap_or(descriptor.media_type.as_str());
            return Err(Cause::Invalid(format!(
                "{reference} is not an image but an artifact of type {kind}"
            ))
            .into());
        }
        if descriptor.size > MAX_CONFIG_BYTES {
            return Err(Cause::Invalid(format!(
                "image {reference}: its config has {} bytes",
                descriptor.size
            ))
            .into());
        }
        transfer::fetch_blob(&self.store, &self.registry, reference, descriptor, &|_| {}).await?;
        let (store, digest) = (self.store.clone(), descriptor.digest.clone());
        Ok(blocking::run(move || store.read_blob(&digest, MAX_CONFIG_BYTES)).await?.into())
    }

    #[expect(clippy::unused_self, reason = "reads as a step of resolving")]
    fn finish(
        &self,
        reference: &ImageReference,
        target: Descriptor,
        manifest: Manifest,
        config: Bytes,
    ) -> Result<ResolvedImage> {
        let parsed: ImageConfig = serde_json::from_slice(&config).map_err(|error| {
            Cause::Invalid(format!("image {reference}: invalid config: {error}"))
        })?;
        if parsed.rootfs.diff_ids.len() != manifest.layers.len() {
            return Err(Cause::Invalid(format!(
                "image {reference}: the config names {} layers and the manifest {}",
                parsed.rootfs.diff_ids.len(),
                manifest.layers.len()
            ))
            .into());
        }
        Ok(ResolvedImage { target, manifest, config, parsed })
    }

    /// Makes an image's layers known and returns them with where their bytes can be fetched.
    ///
    /// # Errors
    /// When the image has layers of an unknown kind.
    pub async fn layers(
        &self,
        reference: &ImageReference,
        image: &Arc<ResolvedImage>,
    ) -> Result<(Snapshot, Vec<RemoteLayer>)> {
        if let Some(odd) = image.manifest.layers.iter().find(|layer| !layer.media_type.is_layer()) {
            return Err(Cause::Unsupported(format!(
                "image {reference}: a layer of type {}",
                odd.media_type
            ))
            .into());
        }
        let (store, image, reference) = (self.store.clone(), image.clone(), reference.clone());
        Ok(blocking::run(move || {
            let mut snapshot = Snapshot::default();
            let mut remote = vec![];
            // History entries that made a layer, in the same order as the layers.
            let mut history = image.parsed.history.iter().filter(|entry| !entry.empty_layer);
            for (descriptor, diff_id) in
                image.manifest.layers.iter().zip(&image.parsed.rootfs.diff_ids)
            {
                let origin = history.next();
                let created =
                    origin.and_then(|entry| entry.created.as_deref()).and_then(timestamp::parse);
                let description =
                    origin.and_then(|entry| entry.created_by.as_deref()).unwrap_or("pulled layer");
                let layer = store.layer_by_diff_id(diff_id, created.unwrap_or(0), description)?;
                store.record_layer_blob(layer, descriptor, None)?;
                snapshot.layers.push(layer);
                remote.push(RemoteLayer {
                    layer,
                    reference: reference.clone(),
                    descriptor: descriptor.clone(),
                });
            }
            Ok((snapshot, remote))
        })
        .await?)
    }
}

/// Whether an error means that the image does not exist, rather than that it could not be asked for.
pub fn is_missing(error: &crate::SolveError) -> bool {
    match &*error.cause {
        Cause::Missing(_) => true,
        Cause::Registry(error) => error.kind() == RegistryErrorKind::NotFound,
        _ => false,
    }
}
