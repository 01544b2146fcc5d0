//! Layers and configs become manifests, and manifests an index.

use std::collections::BTreeMap;

use serde::Serialize;
use slipway_spec::manifest::to_bytes;
use slipway_spec::{
    Descriptor, Digest, History, ImageConfig, Index, Manifest, MediaType, Platform, timestamp,
};
use slipway_store::pack::LayerBlob;
use slipway_store::snapshot::{LayerId, Snapshot};
use slipway_store::{Store, blocking};

use crate::attestation::{Attestation, manifest, reading, sbom};
use crate::error::{ExportError, Result};
use crate::options::ImageOptions;

/// What a build gave for one platform.
#[derive(Clone, Debug)]
pub struct PlatformResult {
    /// The platform.
    pub platform: Platform,
    /// The file system.
    pub snapshot: Snapshot,
    /// The config without `rootfs` and without the times of this build.
    pub config: ImageConfig,
    /// How many history entries come from the base image.
    pub base_history: usize,
    /// What the image is to say of the steps that its layers came out of, as BuildKit has it; in base64.
    pub inline_cache: Option<String>,
    /// The time of this build's entries, in seconds since 1970, where the caller of [`assemble`] sets none.
    pub epoch: Option<i64>,
    /// What is said of it.
    pub attestations: Vec<Attestation>,
}

/// An image in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assembled {
    /// The manifest, or the index over several.
    pub target: Descriptor,
    /// The config of a single manifest.
    pub config: Option<Descriptor>,
    /// What was written, in order: what clients call it, and its digest.
    pub written: Vec<(&'static str, Digest)>,
}

/// Layers being packed at once; packing itself uses all cores.
const AT_ONCE: usize = 2;

/// Writes manifests, configs and, for several platforms or on demand, an index into the store. The names are not moved.
/// `epoch` is `SOURCE_DATE_EPOCH`: the time, in seconds since 1970, that this build's entries get. What is said of the
/// results needs an index as well.
///
/// # Errors
/// When a layer cannot be packed, what is said of a result cannot be read, or the store fails.
pub async fn assemble(
    store: &Store,
    results: &[PlatformResult],
    multi_platform: bool,
    options: &ImageOptions,
    epoch: Option<i64>,
) -> Result<Assembled> {
    let is_index = multi_platform || results.iter().any(|result| options.attests(result));
    if is_index
        && options.blobs.docker
        && results.iter().any(|result| !result.attestations.is_empty())
    {
        let text = "cannot export attestations with \"oci-mediatypes=false\"";
        return Err(ExportError::Invalid(text.into()));
    }
    options.annotations.check(results, is_index)?;
    let (mut entries, mut attestations, mut written) = (vec![], vec![], vec![]);
    let mut config = None;
    for result in results {
        let layers = pack(store, &result.snapshot, options).await?;
        let (disk, mut result, options) = (store.clone(), result.clone(), options.clone());
        let epoch = epoch.or(result.epoch);
        if !is_index {
            result.attestations.clear();
        }
        let one = blocking::run(move || Ok(write_image(&disk, &result, &layers, &options, epoch)));
        let one = one.await??;
        written.push(("manifest", one.entry.digest.clone()));
        written.push(("config", one.config.digest.clone()));
        written.extend(one.attestation.iter().map(|a| ("attestation manifest", a.digest.clone())));
        entries.push(one.entry);
        attestations.extend(one.attestation);
        config = Some(one.config);
    }
    if let ([entry], false) = (entries.as_slice(), is_index) {
        // Clients and archives tell the platform of a manifest, as an index does.
        return Ok(Assembled { target: entry.clone(), config, written });
    }
    entries.append(&mut attestations);
    let media_type =
        if options.blobs.docker { MediaType::DOCKER_INDEX } else { MediaType::OCI_INDEX };
    let index = Index {
        schema_version: 2,
        media_type: Some(media_type.clone()),
        manifests: entries,
        annotations: options.annotations.index.clone(),
    };
    let store = store.clone();
    let mut target = blocking::run(move || store.put(media_type, &to_bytes(&index))).await?;
    target.annotations.clone_from(&options.annotations.index_descriptor);
    written.push(("manifest list", target.digest.clone()));
    Ok(Assembled { target, config: None, written })
}

/// What one platform gave.
struct Written {
    entry: Descriptor,
    config: Descriptor,
    attestation: Option<Descriptor>,
}

/// Writes one platform's image and what is said of it.
fn write_image(
    store: &Store,
    result: &PlatformResult,
    layers: &[LayerBlob],
    options: &ImageOptions,
    epoch: Option<i64>,
) -> Result<Written> {
    let (entry, config) = write_manifest(store, result, layers, options, epoch)?;
    let mut attestation = None;
    if !result.attestations.is_empty() {
        let mut all = reading::read(store, &result.attestations)?;
        let mut holders = sbom::Layers::new(store, &result.snapshot.layers, layers);
        for said in &mut all {
            sbom::supplement(said, &mut holders)?;
        }
        let target = manifest::Target {
            manifest: &entry,
            names: &options.names,
            platform: &result.platform,
        };
        attestation = Some(manifest::write(store, &all, target, options.is_artifact())?);
    }
    let annotations = options.annotations.manifest_descriptor(&result.platform);
    let entry = Descriptor { platform: Some(result.platform.clone()), annotations, ..entry };
    Ok(Written { entry, config, attestation })
}

/// Packs all layers of a snapshot, a few at once, and returns their blobs in order.
async fn pack(
    store: &Store,
    snapshot: &Snapshot,
    options: &ImageOptions,
) -> Result<Vec<LayerBlob>> {
    use futures::{StreamExt as _, TryStreamExt as _};
    let layers = &snapshot.layers;
    let one = |layer: LayerId| async move {
        // As a rule only the newest layers are not blobs yet.
        if let Some(blob) = store.blob_at_hand(layer, &options.blobs)? {
            return Ok(blob);
        }
        let (store, blobs) = (store.clone(), options.blobs);
        blocking::run(move || store.ensure_blob(layer, &blobs)).await
    };
    Ok(futures::stream::iter(layers.iter().copied().map(one))
        .buffered(AT_ONCE)
        .try_collect()
        .await?)
}

fn write_manifest(
    store: &Store,
    result: &PlatformResult,
    layers: &[LayerBlob],
    options: &ImageOptions,
    epoch: Option<i64>,
) -> slipway_store::Result<(Descriptor, Descriptor)> {
    let mut config = result.config.clone();
    config.rootfs.diff_ids = layers.iter().map(|layer| layer.diff_id.clone()).collect();
    let origins = result
        .snapshot
        .layers
        .iter()
        .map(|layer| store.layer_origin(*layer))
        .collect::<slipway_store::Result<Vec<_>>>()?;
    complete_history(
        &mut config,
        &origins,
        result.base_history,
        epoch.map(|s| s.saturating_mul(1_000_000_000)),
    );
    let (config_type, manifest_type) = if options.blobs.docker {
        (MediaType::DOCKER_CONFIG, MediaType::DOCKER_MANIFEST)
    } else {
        (MediaType::OCI_CONFIG, MediaType::OCI_MANIFEST)
    };
    let cache = result.inline_cache.as_deref();
    let bytes = serde_json::to_vec(&WithCache { config: &config, cache })
        .expect("configs have string keys only");
    let config_descriptor = store.put(config_type, &bytes)?;
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(manifest_type.clone()),
        artifact_type: None,
        config: config_descriptor.clone(),
        layers: layers.iter().map(|layer| layer.descriptor.clone()).collect(),
        subject: None,
        annotations: options.annotations.manifest(&result.platform),
    };
    let descriptor = store.put(manifest_type, &to_bytes(&manifest))?;
    Ok((descriptor, config_descriptor))
}

/// A config with what it says of the steps that its layers came out of.
#[derive(Serialize)]
struct WithCache<'a> {
    #[serde(flatten)]
    config: &'a ImageConfig,
    #[serde(rename = "moby.buildkit.cache.v0", skip_serializing_if = "Option::is_none")]
    cache: Option<&'a str>,
}

/// Gives every layer a history entry and every entry of this build a time. An entry without a layer has the time of the
/// layer before it, or of the first one of this build. With an epoch, nothing of this build is younger than it.
fn complete_history(
    config: &mut ImageConfig,
    origins: &[(i64, String)],
    base_history: usize,
    epoch: Option<i64>,
) {
    let clamp = |time: i64| epoch.map_or(time, |epoch| time.min(epoch));
    let mut next = 0;
    let mut last: Option<i64> = None;
    let first_own =
        config.history.iter().take(base_history).filter(|entry| !entry.empty_layer).count();
    for (at, entry) in config.history.iter_mut().enumerate() {
        if !entry.empty_layer {
            match origins.get(next) {
                Some((time, _)) => {
                    last = Some(*time);
                    next += 1;
                }
                // More entries claim a layer than there are.
                None => entry.empty_layer = true,
            }
        }
        if at < base_history {
            last = entry.created.as_deref().and_then(timestamp::parse).or(last);
            continue;
        }
        if entry.created.is_none() {
            let time = last.or_else(|| origins.get(first_own).map(|(time, _)| *time));
            entry.created = time.map(|time| timestamp::format(clamp(time)));
        }
    }
    for (created, description) in &origins[next.min(origins.len())..] {
        config.history.push(History {
            created: Some(timestamp::format(clamp(*created))),
            created_by: Some(description.clone()),
            comment: Some("buildkit.exporter.image.v0".into()),
            ..History::default()
        });
    }
    config.created = match (&config.created, epoch) {
        (Some(created), Some(epoch))
            if timestamp::parse(created).is_some_and(|time| time > epoch) =>
        {
            Some(timestamp::format(epoch))
        }
        (Some(created), _) => Some(created.clone()),
        (None, epoch) => config
            .history
            .last()
            .and_then(|entry| entry.created.clone())
            .or_else(|| epoch.map(timestamp::format))
            .or_else(|| Some(timestamp::format(0))),
    };
}

/// Returns what buildx writes into its metadata file for an image.
pub fn response(assembled: &Assembled, names: &[String]) -> BTreeMap<String, serde_json::Value> {
    let mut response = BTreeMap::new();
    response.insert("containerimage.digest".into(), assembled.target.digest.to_string().into());
    if let Some(config) = &assembled.config {
        response.insert("containerimage.config.digest".into(), config.digest.to_string().into());
    }
    let descriptor =
        serde_json::to_value(&assembled.target).expect("descriptors have string keys only");
    response.insert("containerimage.descriptor".into(), descriptor);
    if !names.is_empty() {
        response.insert("image.name".into(), names.join(",").into());
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(text: &str, empty_layer: bool) -> History {
        History { created_by: Some(text.into()), empty_layer, ..History::default() }
    }

    fn times(config: &ImageConfig) -> Vec<&str> {
        config.history.iter().map(|entry| entry.created.as_deref().unwrap_or("none")).collect()
    }

    #[test]
    fn entries_get_the_times_of_their_layers() {
        let base = History { created: Some("2020-01-01T00:00:00Z".into()), ..entry("base", false) };
        let mut config = ImageConfig {
            history: vec![base, entry("ENV", true), entry("RUN", false), entry("CMD", true)],
            ..ImageConfig::default()
        };
        let origins =
            [(0, String::new()), (5_000_000_000, String::new()), (9_000_000_000, "extra".into())];
        complete_history(&mut config, &origins, 1, None);
        assert_eq!(
            times(&config),
            [
                "2020-01-01T00:00:00Z",
                "2020-01-01T00:00:00Z",
                "1970-01-01T00:00:05Z",
                "1970-01-01T00:00:05Z",
                "1970-01-01T00:00:09Z"
            ]
        );
        assert_eq!(config.created.as_deref(), Some("1970-01-01T00:00:09Z"));
    }

    #[test]
    fn an_epoch_bounds_this_builds_entries_alone() {
        let base = History { created: Some("2020-01-01T00:00:00Z".into()), ..entry("base", false) };
        let mut config =
            ImageConfig { history: vec![base, entry("RUN", false)], ..ImageConfig::default() };
        let origins = [(0, String::new()), (5_000_000_000, String::new())];
        complete_history(&mut config, &origins, 1, Some(1_000_000_000));
        assert_eq!(times(&config), ["2020-01-01T00:00:00Z", "1970-01-01T00:00:01Z"]);
    }

    #[test]
    fn surplus_entries_lose_their_claim_to_a_layer() {
        let mut config = ImageConfig {
            history: vec![entry("a", false), entry("b", false)],
            ..ImageConfig::default()
        };
        complete_history(&mut config, &[(1, String::new())], 0, None);
        assert_eq!(config.history.iter().map(|e| e.empty_layer).collect::<Vec<_>>(), [false, true]);
    }
}
