//! Caches that a build writes.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use base64::Engine as _;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use slipway_exporter::PlatformResult;
use slipway_solver::graph::Edge;
use slipway_spec::cache_config::{
    CREATED_ANNOTATION, CacheConfig, DESCRIPTION_ANNOTATION, DIFF_ID_ANNOTATION,
};
use slipway_spec::manifest::to_bytes;
use slipway_spec::{Descriptor, Digest, Index, Manifest, MediaType, timestamp};
use slipway_store::blocking;
use slipway_store::pack::BlobOptions;
use slipway_store::snapshot::{LayerId, Snapshot};

use super::options::{CacheExport, CachePlace};
use super::place::{FolderName, Place};
use crate::build::Build;
use crate::error::BuildError;
use crate::task::Task;

/// Layers that are packed at once; packing itself uses all cores.
const PACKED_AT_ONCE: usize = 2;

/// Blobs that are sent at once.
const SENT_AT_ONCE: usize = 6;

/// A layer on its way into a cache.
#[derive(Debug)]
struct CacheLayerBlob {
    layer: LayerId,
    /// The blob, with what a cache says of it.
    descriptor: Descriptor,
}

impl Build {
    /// Adds to results what their images are to say of their own layers. `edges` are what each result came out of.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn add_inline_caches(
        &self,
        results: &mut [PlatformResult],
        edges: &[Option<Edge>],
    ) -> Result<(), BuildError> {
        for (result, edge) in results.iter_mut().zip(edges) {
            let Some(edge) = edge else { continue };
            let records = self.job().records(std::slice::from_ref(edge), false).await?;
            result.inline_cache = records.inline(&result.snapshot).map(|records| {
                let json = serde_json::to_vec(&records).expect("records have string keys only");
                base64::engine::general_purpose::STANDARD.encode(json)
            });
        }
        Ok(())
    }

    /// Writes a cache of what results came out of; returns its manifest, unless there is nothing to be told.
    ///
    /// # Errors
    /// When it cannot be written, unless that is none of the build.
    pub async fn export_cache(
        &self,
        edges: &[Edge],
        export: &CacheExport,
    ) -> Result<Option<Descriptor>, BuildError> {
        let engine = self.engine();
        let (title, place, name) = match &export.place {
            // It is part of the image.
            CachePlace::Inline => return Ok(None),
            CachePlace::Registry { reference, insecure } => {
                let registry = if *insecure {
                    engine.insecure_registry(std::slice::from_ref(reference))?
                } else {
                    engine.registry().clone()
                };
                let place = Place::Registry { registry, reference: reference.clone() };
                ("exporting cache to registry", place, FolderName { tag: "", reset: false })
            }
            CachePlace::Folder { folder, tag, reset } => {
                let folders = self.cache_folders().clone();
                let place = Place::Folder { folders, folder: folder.clone() };
                ("exporting cache to client directory", place, FolderName { tag, reset: *reset })
            }
        };
        let task = Task::start(self.progress(), title);
        let written = self.write_cache(edges, export, &place, &name, &task).await;
        match task.end(written) {
            Err(error) if export.ignore_error => {
                tracing::warn!(%error, "a cache was not written");
                Ok(None)
            }
            written => written,
        }
    }

    async fn write_cache(
        &self,
        edges: &[Edge],
        export: &CacheExport,
        place: &Place,
        name: &FolderName<'_>,
        task: &Task,
    ) -> Result<Option<Descriptor>, BuildError> {
        let store = self.engine().store();
        task.moved("preparing build cache for export", 0, 0, false);
        let records = self.job().records(edges, export.all).await?;
        let packed = records.layers().into_iter();
        let packed = packed.map(|layer| self.cache_layer(layer, &export.blobs));
        let layers: Vec<CacheLayerBlob> =
            stream::iter(packed).buffered(PACKED_AT_ONCE).try_collect().await?;
        let digests: HashMap<LayerId, Digest> =
            layers.iter().map(|known| (known.layer, known.descriptor.digest.clone())).collect();
        let document = records.document(&digests);
        task.moved("preparing build cache for export", 0, 0, true);
        if document.layers.is_empty() {
            task.status("skipping cache export for empty result");
            return Ok(None);
        }
        // Two layers may have the same bytes.
        let mut seen = HashSet::new();
        let wanted: HashSet<&Digest> = document.layers.iter().map(|layer| &layer.blob).collect();
        let layers: Vec<CacheLayerBlob> = layers
            .into_iter()
            .filter(|known| wanted.contains(&known.descriptor.digest))
            .filter(|known| seen.insert(known.descriptor.digest.clone()))
            .collect();
        // A closure over references would not be one for every life of them, which futures of futures need.
        let mut sent = Vec::with_capacity(layers.len());
        for known in &layers {
            sent.push(self.send_layer(place, known, task));
        }
        let sent: Vec<()> = stream::iter(sent).buffer_unordered(SENT_AT_ONCE).try_collect().await?;
        tracing::debug!(layers = sent.len(), "the layers of a cache are there");
        let bytes = serde_json::to_vec(&document).expect("caches have string keys only");
        let config = self.put(MediaType::cache_config(), bytes).await?;
        place.write(&config, &store.blob_path(&config.digest), &|_| {}).await?;
        task.status(&format!("writing config {}", config.digest));
        let blobs = layers.into_iter().map(|known| known.descriptor).collect();
        let (media_type, bytes) = manifest(export, config, blobs, &document);
        let manifest = self.put(media_type, bytes.clone()).await?;
        let file: PathBuf = store.blob_path(&manifest.digest);
        place.finish(&manifest, &file, Bytes::from(bytes), name).await?;
        let kind = if export.image_manifest { "cache image manifest" } else { "cache manifest" };
        task.status(&format!("writing {kind} {}", manifest.digest));
        Ok(Some(manifest))
    }

    async fn put(&self, media_type: MediaType, bytes: Vec<u8>) -> Result<Descriptor, BuildError> {
        let store = self.engine().store().clone();
        Ok(blocking::run(move || store.put(media_type, &bytes)).await?)
    }

    /// Makes a layer a blob, unless the cache that it is from has one.
    async fn cache_layer(
        &self,
        layer: LayerId,
        options: &BlobOptions,
    ) -> Result<CacheLayerBlob, BuildError> {
        let store = self.engine().store();
        let offered = self.job().offered(layer)?.filter(|(descriptor, _)| {
            !options.force || descriptor.media_type.compression() == Some(options.compression)
        });
        let (mut descriptor, diff_id) = match offered {
            Some((mut descriptor, diff_id)) => {
                if let Some(compression) = descriptor.media_type.compression() {
                    descriptor.media_type = MediaType::layer(compression, options.docker);
                }
                (descriptor, diff_id)
            }
            None => {
                let blob = match store.blob_at_hand(layer, options)? {
                    Some(blob) => blob,
                    None => {
                        self.job().provide(&Snapshot { layers: vec![layer] }).await?;
                        let (store, options) = (store.clone(), *options);
                        blocking::run(move || store.ensure_blob(layer, &options)).await?
                    }
                };
                (blob.descriptor, blob.diff_id)
            }
        };
        let (created, description) = store.layer_origin(layer)?;
        descriptor.annotations.insert(DIFF_ID_ANNOTATION.into(), diff_id.to_string());
        if created != 0 {
            descriptor.annotations.insert(CREATED_ANNOTATION.into(), timestamp::format(created));
        }
        if !description.is_empty() {
            descriptor.annotations.insert(DESCRIPTION_ANNOTATION.into(), description);
        }
        Ok(CacheLayerBlob { layer, descriptor })
    }

    async fn send_layer(
        &self,
        place: &Place,
        known: &CacheLayerBlob,
        task: &Task,
    ) -> Result<(), BuildError> {
        let CacheLayerBlob { layer, descriptor } = known;
        let id = format!("writing layer {}", descriptor.digest);
        task.moved(&id, 0, 0, false);
        let store = self.engine().store();
        if !place.has(descriptor).await? {
            let (here, digest) = (store.clone(), descriptor.digest.clone());
            if !blocking::run(move || here.has_blob(&digest)).await? {
                self.job().provide(&Snapshot { layers: vec![*layer] }).await?;
            }
            let path = store.blob_path(&descriptor.digest);
            place
                .write(descriptor, &path, &|current| {
                    task.moved(&id, current, descriptor.size, false);
                })
                .await?;
        }
        task.moved(&id, 0, 0, true);
        Ok(())
    }
}

/// Writes what leads to the document and to the layers.
fn manifest(
    export: &CacheExport,
    config: Descriptor,
    mut blobs: Vec<Descriptor>,
    document: &CacheConfig,
) -> (MediaType, Vec<u8>) {
    // In the order in which the document names them first.
    let order: HashMap<&Digest, usize> =
        document.layers.iter().enumerate().rev().map(|(at, layer)| (&layer.blob, at)).collect();
    blobs.sort_by_key(|blob| order.get(&blob.digest).copied());
    if export.image_manifest {
        let media_type = MediaType::OCI_MANIFEST;
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media_type.clone()),
            artifact_type: None,
            config,
            layers: blobs,
            subject: None,
            annotations: Default::default(),
        };
        return (media_type, to_bytes(&manifest));
    }
    let media_type =
        if export.blobs.docker { MediaType::DOCKER_INDEX } else { MediaType::OCI_INDEX };
    blobs.push(config);
    let index = Index {
        schema_version: 2,
        media_type: Some(media_type.clone()),
        manifests: blobs,
        annotations: Default::default(),
    };
    (media_type, to_bytes(&index))
}
