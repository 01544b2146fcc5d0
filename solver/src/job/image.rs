//! Images as the base of steps: found once in a build, and their layers fetched when something needs them.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::try_join_all;
use slipway_spec::llb::pb;
use slipway_spec::progress::ProgressEvent;
use slipway_spec::{Descriptor, Digest, ImageReference, Platform};
use slipway_store::snapshot::{LayerId, Snapshot};
use slipway_store::{blocking, transfer};

use super::announce::Announced;
use super::{Job, lock};
use crate::error::{Cause, Result, SolveError};
use crate::graph::Vertex;
use crate::source::FoundImage;
use crate::source::image::{Lookup, RemoteLayer, ResolvedImage};
use crate::source::layout;

impl Job {
    pub(super) async fn image(
        &self,
        vertex: &Arc<Vertex>,
        source: &pb::SourceOp,
    ) -> Result<FoundImage> {
        vertex.image.get_or_init(|| self.find_image(vertex, source)).await.clone()
    }

    async fn find_image(&self, vertex: &Arc<Vertex>, source: &pb::SourceOp) -> Result<FoundImage> {
        let failed = |cause: Cause| SolveError::from(cause).at(|| vertex.failed());
        if source.identifier.starts_with("oci-layout://") {
            let image = self.layout(vertex, source).await;
            let image = image.map_err(|error| error.at(|| vertex.failed()))?;
            return Ok(FoundImage {
                digest: image.target.clone(),
                snapshot: image.snapshot.clone(),
                diff_ids: image.diff_ids.clone(),
            });
        }
        let Some(name) = source.identifier.strip_prefix("docker-image://") else {
            return Err(failed(Cause::Unsupported(format!("the source {}", source.identifier))));
        };
        let reference: ImageReference =
            name.parse().map_err(|error: slipway_spec::ReferenceError| {
                failed(Cause::Invalid(error.to_string()))
            })?;
        let platform = vertex.platform.clone().unwrap_or_else(Platform::host);
        let lookup = match source.attrs.get("image.resolvemode").map(String::as_str) {
            Some("pull") if reference.digest().is_none() => Lookup::Registry,
            // "local" prefers what is here, which is done anyway.
            _ => Lookup::StoreFirst,
        };
        let found = self.image_snapshot(&reference, &platform, lookup).await;
        let (image, mut snapshot) = found.map_err(|error| error.at(|| vertex.failed()))?;
        if let Some(wanted) = source.attrs.get("image.checksum").filter(|text| !text.is_empty())
            && *wanted != image.target.digest.to_string()
        {
            return Err(failed(Cause::Invalid(format!(
                "image {reference}: expected checksum {wanted}, got {}",
                image.target.digest
            ))));
        }
        let mut diff_ids = image.parsed.rootfs.diff_ids.clone();
        if let Some(limit) = layout::layer_limit(source, "image.layerlimit")? {
            snapshot.layers.truncate(limit);
            diff_ids.truncate(limit);
        }
        Ok(FoundImage { digest: image.target.digest.clone(), snapshot, diff_ids })
    }

    /// Finds an image and its file system; layers that are not here are fetched by [`provide`](Self::provide).
    ///
    /// # Errors
    /// When there is no such image.
    pub async fn image_snapshot(
        &self,
        reference: &ImageReference,
        platform: &Platform,
        lookup: Lookup,
    ) -> Result<(Arc<ResolvedImage>, Snapshot)> {
        let images = &self.0.worker.images;
        let image = self.resolve_image(reference, platform, lookup).await?;
        let (snapshot, remote) = images.layers(reference, &image).await?;
        lock(&self.0.remote).extend(remote.into_iter().map(|layer| (layer.layer, layer)));
        Ok((image, snapshot))
    }

    /// Fetches those layers of a snapshot that are not here in any form.
    ///
    /// # Errors
    /// When a registry fails, or a cache does not have what it promised; see [`obtain`](Self::obtain).
    pub async fn provide(&self, snapshot: &Snapshot) -> Result<()> {
        let wanted: Vec<RemoteLayer> = {
            let remote = lock(&self.0.remote);
            snapshot.layers.iter().filter_map(|layer| remote.get(layer).cloned()).collect()
        };
        let mut images: BTreeMap<String, Vec<RemoteLayer>> = BTreeMap::new();
        for layer in self.missing(wanted)? {
            images.entry(layer.reference.to_string()).or_default().push(layer);
        }
        try_join_all(images.into_iter().map(|(reference, layers)| self.pull(reference, layers)))
            .await?;
        self.provide_imported(snapshot).await
    }

    /// Whether a layer is here, can be made of what is here, or a registry has it.
    pub(super) fn is_at_hand(&self, layer: LayerId) -> Result<bool> {
        let remote = lock(&self.0.remote).contains_key(&layer);
        Ok(remote || self.store().obtainable(layer)?)
    }

    fn missing(&self, wanted: Vec<RemoteLayer>) -> Result<Vec<RemoteLayer>> {
        let mut missing = vec![];
        for layer in wanted {
            if !self.store().obtainable(layer.layer)? {
                missing.push(layer);
            }
        }
        Ok(missing)
    }

    async fn pull(&self, reference: String, layers: Vec<RemoteLayer>) -> Result<()> {
        let name: Arc<str> = format!("pulling {reference}").into();
        let turn = self.0.worker.shared.pull(&reference);
        let _turn = turn.lock().await;
        // Another step may have fetched them while this one waited.
        let missing = self.missing(layers)?;
        if missing.is_empty() {
            return Ok(());
        }
        // The platforms of an image have different layers and are different work.
        let blobs: Vec<String> =
            missing.iter().map(|layer| layer.descriptor.digest.to_string()).collect();
        let id = Digest::of(format!("{name} {}", blobs.join(" ")).as_bytes());
        let announced = Announced::begin(&*self.0.progress, &id, name);
        let fetched = try_join_all(missing.iter().map(|layer| self.fetch(&id, layer))).await;
        announced.finish(&fetched);
        fetched.map(drop)
    }

    async fn fetch(&self, vertex: &Digest, layer: &RemoteLayer) -> Result<()> {
        let report = self.blob_report(vertex, &layer.descriptor);
        report(0, false);
        let registry = self.0.worker.images.registry();
        transfer::fetch_blob(
            self.store(),
            registry,
            &layer.reference,
            &layer.descriptor,
            &|current| {
                report(current, false);
            },
        )
        .await?;
        let (store, layer) = (self.store().clone(), layer.clone());
        let layer_size = layer.descriptor.size;
        blocking::run(move || store.record_layer_blob(layer.layer, &layer.descriptor, None))
            .await?;
        report(layer_size, true);
        Ok(())
    }

    /// Returns what tells how much of a blob is here, as part of the work on a vertex.
    pub(super) fn blob_report(
        &self,
        vertex: &Digest,
        blob: &Descriptor,
    ) -> impl Fn(u64, bool) + Send + Sync + use<> {
        let (progress, vertex, total) = (self.0.progress.clone(), vertex.clone(), blob.size);
        let id: Arc<str> = blob.digest.to_string().into();
        move |current, done| {
            let (vertex, id) = (vertex.clone(), id.clone());
            progress.send(ProgressEvent::Status { vertex, id, current, total, done });
        }
    }
}
