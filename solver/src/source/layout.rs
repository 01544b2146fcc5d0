//! Images in layouts of the client.

use std::sync::Arc;

use slipway_spec::llb::pb;
use slipway_spec::manifest::{Document, MAX_MANIFEST_BYTES};
use slipway_spec::{Descriptor, Digest, ImageConfig, Manifest, MediaType, Platform};
use slipway_store::image::MAX_CONFIG_BYTES;
use slipway_store::snapshot::{LayerId, Snapshot};
use slipway_store::{Store, blocking};

use super::http::save_stream;
use crate::client::LayoutStore;
use crate::error::{Cause, Result};

/// An image of a layout, for one platform.
#[derive(Clone, Debug)]
pub(crate) struct LayoutImage {
    /// What was asked for: an index or a manifest.
    pub(crate) target: Digest,
    pub(crate) snapshot: Snapshot,
    pub(crate) diff_ids: Vec<Digest>,
    /// The layers with their blobs.
    pub(crate) layers: Vec<(LayerId, Descriptor)>,
    pub(crate) store: String,
}

/// An image of a layout, as far as its manifest and config tell.
#[derive(Debug)]
pub(crate) struct ResolvedLayout {
    /// What was asked for: an index or a manifest.
    pub(crate) target: Digest,
    pub(crate) manifest: Manifest,
    /// The config as it is written.
    pub(crate) config: Vec<u8>,
    /// The layout.
    pub(crate) store: String,
}

/// Finds an image; its layers stay where they are.
pub(crate) async fn find(
    store: &Store,
    layouts: &dyn LayoutStore,
    source: &pb::SourceOp,
    platform: &Platform,
) -> Result<LayoutImage> {
    let resolved = resolve(store, layouts, source, platform).await?;
    read_image(store, source, resolved).await
}

/// Finds the manifest and the config of an image for a platform.
pub(crate) async fn resolve(
    store: &Store,
    layouts: &dyn LayoutStore,
    source: &pb::SourceOp,
    platform: &Platform,
) -> Result<ResolvedLayout> {
    let fail = |what: &str| Cause::Invalid(format!("the source {}: {what}", source.identifier));
    let name = source.identifier.trim_start_matches("oci-layout://");
    let (image, digest) = name.rsplit_once('@').ok_or_else(|| fail("it has no digest"))?;
    let target: Digest = digest.parse().map_err(|_| fail("it has no digest"))?;
    // Without a store of its own the image's name is that of the store.
    let from = source.attrs.get("oci.store").filter(|store| !store.is_empty()).cloned();
    let from = from.unwrap_or_else(|| image.split(':').next().unwrap_or_default().to_owned());
    let mut digest = target.clone();
    // Indexes may be nested, but not without end.
    for _ in 0..4 {
        let bytes = fetch(store, layouts, &from, &digest, MAX_MANIFEST_BYTES).await?;
        match Document::parse(&bytes).map_err(|error| fail(&error.to_string()))? {
            Document::Manifest(manifest) => {
                let digest = &manifest.config.digest;
                let config = fetch(store, layouts, &from, digest, MAX_CONFIG_BYTES).await?;
                return Ok(ResolvedLayout { target, manifest, config, store: from });
            }
            Document::Index(index) => {
                let Some(entry) = index.best_for(platform) else {
                    return Err(Cause::Missing(format!(
                        "the image {} has nothing for {platform}",
                        source.identifier
                    ))
                    .into());
                };
                digest = entry.digest.clone();
            }
        }
    }
    Err(fail("its indexes are nested too deeply").into())
}

async fn read_image(
    store: &Store,
    source: &pb::SourceOp,
    resolved: ResolvedLayout,
) -> Result<LayoutImage> {
    let fail = |what: String| Cause::Invalid(format!("the source {}: {what}", source.identifier));
    let ResolvedLayout { target, manifest, config, store: from } = resolved;
    let config: ImageConfig = serde_json::from_slice(&config)
        .map_err(|error| fail(format!("invalid config: {error}")))?;
    if config.rootfs.diff_ids.len() != manifest.layers.len() {
        return Err(fail("its config and its manifest name different layers".into()).into());
    }
    if let Some(odd) = manifest.layers.iter().find(|layer| !layer.media_type.is_layer()) {
        return Err(Cause::Unsupported(format!("a layer of type {}", odd.media_type)).into());
    }
    let limit = layer_limit(source, "oci.layerlimit")?.unwrap_or(usize::MAX);
    let pairs: Vec<_> =
        manifest.layers.into_iter().zip(config.rootfs.diff_ids).take(limit).collect();
    let (rows, description) = (store.clone(), format!("layer of {}", source.identifier));
    let known = pairs.clone();
    let layers = blocking::run(move || {
        known
            .iter()
            .map(|(descriptor, diff_id)| {
                let layer = rows.layer_by_diff_id(diff_id, 0, &description)?;
                rows.record_layer_blob(layer, descriptor, None)?;
                Ok(layer)
            })
            .collect::<slipway_store::Result<Vec<_>>>()
    })
    .await?;
    let (descriptors, diff_ids): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    Ok(LayoutImage {
        target,
        snapshot: Snapshot { layers: layers.clone() },
        diff_ids,
        layers: layers.into_iter().zip(descriptors).collect(),
        store: from,
    })
}

/// Reads how many layers of an image are wanted.
pub(crate) fn layer_limit(source: &pb::SourceOp, name: &str) -> Result<Option<usize>> {
    let Some(text) = source.attrs.get(name).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    match text.parse() {
        Ok(limit) if limit > 0 => Ok(Some(limit)),
        _ => Err(Cause::Invalid(format!("invalid layer limit {text:?}")).into()),
    }
}

/// Fetches the layers that are not here.
pub(crate) async fn provide(
    store: &Store,
    layouts: &dyn LayoutStore,
    image: &Arc<LayoutImage>,
    progress: &(dyn Fn(&Descriptor, u64) + Send + Sync),
) -> Result<()> {
    for (layer, descriptor) in &image.layers {
        let (rows, layer) = (store.clone(), *layer);
        if blocking::run(move || rows.obtainable(layer)).await? {
            continue;
        }
        let report = |current: u64, _: u64| progress(descriptor, current);
        save(store, layouts, &image.store, &descriptor.digest, &report).await?;
        let (rows, descriptor) = (store.clone(), descriptor.clone());
        blocking::run(move || rows.record_layer_blob(layer, &descriptor, None)).await?;
    }
    Ok(())
}

/// Saves a blob of a layout unless it is here.
pub(crate) async fn save(
    store: &Store,
    layouts: &dyn LayoutStore,
    from: &str,
    digest: &Digest,
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> Result<()> {
    let (here, wanted) = (store.clone(), digest.clone());
    if blocking::run(move || here.has_blob(&wanted)).await? {
        return Ok(());
    }
    let what = format!("content {digest} of the layout {from:?}");
    let Some(stream) = layouts.open(from, digest).await? else {
        return Err(Cause::Missing(format!("{what}: not found")).into());
    };
    save_stream(store, &what, stream, Some(digest), progress).await?;
    Ok(())
}

async fn fetch(
    store: &Store,
    layouts: &dyn LayoutStore,
    from: &str,
    digest: &Digest,
    limit: u64,
) -> Result<Vec<u8>> {
    save(store, layouts, from, digest, &|_, _| {}).await?;
    let (store, digest) = (store.clone(), digest.clone());
    Ok(blocking::run(move || store.read_blob(&digest, limit)).await?)
}

/// What a blob is called where nothing says what it is.
pub(crate) fn anonymous(digest: &Digest, size: u64) -> Descriptor {
    Descriptor::new(MediaType::from("application/octet-stream"), digest.clone(), size)
}
