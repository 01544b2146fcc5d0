//! What images of the store are made of, for people.

use std::collections::HashSet;

use slipway_spec::manifest::Document;
use slipway_spec::{Descriptor, Digest, ImageConfig, Platform, timestamp};
use slipway_store::image::Image;
use slipway_store::{Result, Store};

/// An image and its platforms.
#[derive(Clone, Debug)]
pub struct ImageSummary {
    /// The image.
    pub image: Image,
    /// When it was made, in nanoseconds since 1970, as its config says.
    pub created: Option<i64>,
    /// Bytes of all content that is here.
    pub size_bytes: u64,
    /// One entry per platform that the image is offered for.
    pub platforms: Vec<PlatformSummary>,
    /// The config of the platform that serves this machine best.
    pub config: Option<ImageConfig>,
}

/// One platform of an image.
#[derive(Clone, Debug)]
pub struct PlatformSummary {
    /// The platform.
    pub platform: Platform,
    /// The manifest.
    pub digest: Digest,
    /// Bytes of its content that are here.
    pub size_bytes: u64,
    /// Whether all of its content is here.
    pub present: bool,
}

/// Describes an image for a platform; without one, for this machine's.
///
/// # Errors
/// When a document is damaged.
pub fn summarize(store: &Store, image: Image, wanted: Option<&Platform>) -> Result<ImageSummary> {
    let mut platforms = vec![];
    let mut sizes: HashSet<Digest> = HashSet::new();
    let mut size_bytes = 0;
    let mut add = |descriptor: &Descriptor| -> Result<u64> {
        let size = store.blob_size(&descriptor.digest)?.unwrap_or(0);
        if sizes.insert(descriptor.digest.clone()) {
            size_bytes += size;
        }
        Ok(size)
    };
    add(&image.target)?;
    for candidate in store.platforms(&image.target)? {
        let mut bytes = add(&candidate.descriptor)?;
        let mut present = true;
        for blob in candidate.manifest.layers.iter().chain([&candidate.manifest.config]) {
            bytes += add(blob)?;
            present &= store.blob_size(&blob.digest)?.is_some();
        }
        platforms.push(PlatformSummary {
            platform: candidate.platform,
            digest: candidate.descriptor.digest,
            size_bytes: bytes,
            present,
        });
    }
    if let Ok(Document::Index(index)) = store.document(&image.target) {
        for entry in index.manifests.iter().filter(|entry| !entry.is_attestation()) {
            if let Some(platform) = &entry.platform
                && !platforms.iter().any(|known| known.digest == entry.digest)
            {
                let digest = entry.digest.clone();
                platforms.push(PlatformSummary {
                    platform: platform.clone(),
                    digest,
                    size_bytes: 0,
                    present: false,
                });
            }
        }
    }
    let host = Platform::host();
    let best = match store.select(&image.target, wanted.unwrap_or(&host))? {
        None if wanted.is_none() => store.platforms(&image.target)?.into_iter().next(),
        found => found,
    };
    let config = match best {
        Some(best) if store.blob_size(&best.manifest.config.digest)?.is_some() => {
            Some(store.image_config(&best.manifest.config)?)
        }
        _ => None,
    };
    let created =
        config.as_ref().and_then(|config| config.created.as_deref()).and_then(timestamp::parse);
    Ok(ImageSummary { image, created, size_bytes, platforms, config })
}
