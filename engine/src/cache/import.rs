//! Caches that a build looks into.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use futures::future::join_all;
use serde::Deserialize;
use slipway_solver::cache::{CacheSource as _, ImportedCache};
use slipway_spec::cache_config::{
    CREATED_ANNOTATION, CacheConfig, CacheLayer, CacheRecord, DESCRIPTION_ANNOTATION,
    DIFF_ID_ANNOTATION, MAX_CACHE_CONFIG_BYTES,
};
use slipway_spec::manifest::Document;
use slipway_spec::{Descriptor, History, Manifest, MediaType, RootFs};
use slipway_store::image::MAX_CONFIG_BYTES;

use super::options::{CacheEntry, ImportPlace};
use super::place::{Place, Source};
use crate::build::Build;
use crate::error::BuildError;
use crate::task::Task;

/// An image that carries a cache may be for this many platforms.
const MAX_MANIFESTS: usize = 256;

/// What of an image's config tells of a cache.
#[derive(Deserialize)]
struct InlineConfig {
    #[serde(default)]
    rootfs: RootFs,
    #[serde(default)]
    history: Option<Vec<History>>,
    #[serde(default, rename = "moby.buildkit.cache.v0")]
    cache: Option<String>,
}

impl Build {
    /// Has the build look into caches from now on; what it looks into already is not read again. A cache that cannot be
    /// read is shown as such, and does without it.
    pub async fn import_caches(&self, entries: impl IntoIterator<Item = CacheEntry>) {
        join_all(entries.into_iter().map(|entry| self.import_cache(entry))).await;
    }

    async fn import_cache(&self, entry: CacheEntry) {
        let read = || async {
            let name = entry.name();
            let task =
                Task::start(self.progress(), &format!("importing cache manifest from {name}"));
            let found = self.read_cache(&entry, &task).await;
            // Whoever looks on is told; to the build it is no failure.
            match task.end(found) {
                Ok(found) => found.into_iter().for_each(|cache| self.job().add_cache(cache)),
                Err(error) => tracing::debug!(name, %error, "a build goes without a cache"),
            }
        };
        let cell = self.imported(&entry.identity());
        cell.get_or_init(read).await;
    }

    async fn read_cache(
        &self,
        entry: &CacheEntry,
        task: &Task,
    ) -> Result<Vec<ImportedCache>, BuildError> {
        let engine = self.engine();
        let (place, digest) = match entry.import()? {
            ImportPlace::Registry { reference, insecure } => {
                let registry = if insecure {
                    engine.insecure_registry(std::slice::from_ref(&reference))?
                } else {
                    engine.registry().clone()
                };
                (Place::Registry { registry, reference }, None)
            }
            ImportPlace::Folder { folder, tag, digest } => {
                let folders = self.cache_folders().clone();
                let digest = match digest {
                    Some(digest) => Some(digest),
                    None => folders.find(&folder, &tag).await?,
                };
                if digest.is_none() {
                    return Err(BuildError::Invalid(format!("{folder} has no cache {tag:?}")));
                }
                (Place::Folder { folders, folder }, digest)
            }
        };
        let source = Arc::new(Source { name: entry.name(), place });
        let bytes = source.manifest(digest.as_ref()).await?;
        let damaged = |why: String| BuildError::Invalid(format!("{}: {why}", source.name()));
        let document = Document::parse(&bytes).map_err(|error| damaged(error.to_string()))?;
        let kind = slipway_store::transfer::media_type(&document);
        task.status(&format!("inferred cache manifest type: {kind}"));
        let (config, blobs) = match document {
            Document::Index(index) => {
                let (configs, blobs): (Vec<_>, Vec<_>) =
                    index.manifests.into_iter().partition(is_cache_config);
                match configs.into_iter().next() {
                    Some(config) => (config, blobs),
                    None => return self.read_images(&source, blobs).await,
                }
            }
            Document::Manifest(manifest) if is_cache_config(&manifest.config) => {
                (manifest.config, manifest.layers)
            }
            Document::Manifest(manifest) => {
                return Ok(self.read_inline(&source, manifest).await?.into_iter().collect());
            }
        };
        let store = engine.store();
        let bytes = source.document(store, &config, MAX_CACHE_CONFIG_BYTES).await?;
        let config: CacheConfig = serde_json::from_slice(&bytes)
            .map_err(|error| damaged(format!("its document cannot be read: {error}")))?;
        let cache = ImportedCache::read(source.clone(), &config, &blobs)
            .map_err(|error| damaged(error.to_string()))?;
        Ok(vec![cache])
    }

    /// Reads what the images of an index carry.
    async fn read_images(
        &self,
        source: &Arc<Source>,
        entries: Vec<Descriptor>,
    ) -> Result<Vec<ImportedCache>, BuildError> {
        let images: Vec<_> = entries.into_iter().filter(|entry| !entry.is_attestation()).collect();
        if images.len() > MAX_MANIFESTS {
            let why = format!("{} has {} images", source.name(), images.len());
            return Err(BuildError::Invalid(why));
        }
        let mut caches = vec![];
        for entry in images.iter().filter(|entry| entry.media_type.is_manifest()) {
            let bytes = source.manifest(Some(&entry.digest)).await?;
            let Ok(Document::Manifest(manifest)) = Document::parse(&bytes) else { continue };
            caches.extend(self.read_inline(source, manifest).await?);
        }
        Ok(caches)
    }

    /// Reads what an image carries for its own layers.
    async fn read_inline(
        &self,
        source: &Arc<Source>,
        manifest: Manifest,
    ) -> Result<Option<ImportedCache>, BuildError> {
        let damaged = |why: String| {
            BuildError::Invalid(format!(
                "{}: image config {}: {why}",
                source.name(),
                manifest.config.digest
            ))
        };
        if !manifest.config.media_type.is_config() || manifest.layers.is_empty() {
            return Ok(None);
        }
        let store = self.engine().store();
        let bytes = source.document(store, &manifest.config, MAX_CONFIG_BYTES).await?;
        let config: InlineConfig =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        let Some(cache) = config.cache.filter(|cache| !cache.is_empty()) else { return Ok(None) };
        if config.rootfs.diff_ids.len() != manifest.layers.len() {
            return Err(damaged("it names another number of layers than its manifest".into()));
        }
        let records = base64::engine::general_purpose::STANDARD.decode(cache);
        let records = records.map_err(|error| damaged(error.to_string()))?;
        let records: Option<Vec<CacheRecord>> =
            serde_json::from_slice(&records).map_err(|error| damaged(error.to_string()))?;
        let history = config.history.unwrap_or_default();
        let mut origins = history.iter().filter(|entry| !entry.empty_layer);
        let mut layers = vec![];
        let mut blobs = vec![];
        for (at, (mut blob, diff_id)) in
            manifest.layers.iter().cloned().zip(&config.rootfs.diff_ids).enumerate()
        {
            let mut annotations =
                BTreeMap::from([(DIFF_ID_ANNOTATION.into(), diff_id.to_string())]);
            if let Some(origin) = origins.next() {
                let told = [
                    (CREATED_ANNOTATION, &origin.created),
                    (DESCRIPTION_ANNOTATION, &origin.created_by),
                ];
                let told = told.into_iter().filter_map(|(key, text)| Some((key, text.clone()?)));
                annotations.extend(told.map(|(key, text)| (key.to_owned(), text)));
            }
            blob.annotations = annotations;
            let parent = i64::try_from(at).unwrap_or(i64::MAX) - 1;
            layers.push(CacheLayer { blob: blob.digest.clone(), parent });
            blobs.push(blob);
        }
        let config = CacheConfig { layers, records: records.unwrap_or_default() };
        let cache = ImportedCache::read(source.clone(), &config, &blobs);
        cache.map(Some).map_err(|error| damaged(error.to_string()))
    }
}

fn is_cache_config(blob: &Descriptor) -> bool {
    blob.media_type == MediaType::cache_config()
}
