//! Image manifests and indexes (OCI image specification, "Image Manifest" and "Image Index").

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use crate::{Descriptor, MediaType, Platform};

/// Upper bound on the size of a manifest or index, in bytes; registries refuse more.
pub const MAX_MANIFEST_BYTES: u64 = 4 * 1024 * 1024;

/// Reads `null` as the default, as Go's decoder does.
pub(crate) fn null_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// One platform's image: a config and its layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// OCI's or Docker's manifest type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<MediaType>,
    /// The kind of artifact, when this is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The image config.
    pub config: Descriptor,
    /// The layers, base first.
    #[serde(default, deserialize_with = "null_default")]
    pub layers: Vec<Descriptor>,
    /// What this refers to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Free-form metadata.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "null_default"
    )]
    pub annotations: BTreeMap<String, String>,
}

/// Several manifests under one name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// OCI's or Docker's index type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<MediaType>,
    /// The entries in order of preference.
    #[serde(default, deserialize_with = "null_default")]
    pub manifests: Vec<Descriptor>,
    /// Free-form metadata.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "null_default"
    )]
    pub annotations: BTreeMap<String, String>,
}

/// Why a document is not a manifest or index.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It is not the JSON that was expected.
    #[error("not a valid {0}: {1}")]
    Json(&'static str, serde_json::Error),
    /// It could be read as two different things (CVE-2021-41190).
    #[error("ambiguous document: it has both layers and manifests")]
    Ambiguous,
    /// It is Docker's schema 1.
    #[error(
        "Docker image manifest schema 1 is not supported; push the image again with a newer client"
    )]
    Schema1,
    /// It is something else.
    #[error("unsupported manifest of media type {0}")]
    Unsupported(String),
}

/// A document that a name may point at.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "parsed a few times per build, matched at once")]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// Several images.
    Index(Index),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
}

impl Index {
    /// Returns the entry that serves a platform best; one that names no platform serves any, if nothing better does.
    pub fn best_for(&self, platform: &Platform) -> Option<&Descriptor> {
        let rank = |entry: &Descriptor| {
            entry.platform.as_ref().map_or(Some(usize::MAX), |offered| platform.rank(offered))
        };
        self.manifests
            .iter()
            .filter(|entry| !entry.is_attestation())
            .filter_map(|entry| Some((rank(entry)?, entry)))
            .min_by_key(|(rank, _)| *rank)
            .map(|(_, entry)| entry)
    }
}

impl Document {
    /// Reads a manifest or index, whatever the caller was told it is.
    ///
    /// # Errors
    /// When the bytes are neither, or could be both.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let shape: Shape =
            serde_json::from_slice(bytes).map_err(|e| ManifestError::Json("manifest", e))?;
        if shape.schema_version == 1 {
            return Err(ManifestError::Schema1);
        }
        let claimed = shape.media_type.as_deref().map(MediaType::from);
        let image = shape.layers.is_some() || shape.config.is_some();
        if image && shape.manifests.is_some() {
            return Err(ManifestError::Ambiguous);
        }
        let index = match &claimed {
            Some(kind) if kind.is_index() => true,
            Some(kind) if kind.is_manifest() => false,
            Some(kind) => return Err(ManifestError::Unsupported(kind.to_string())),
            None => shape.manifests.is_some(),
        };
        if index {
            serde_json::from_slice(bytes)
                .map(Self::Index)
                .map_err(|e| ManifestError::Json("image index", e))
        } else {
            serde_json::from_slice(bytes)
                .map(Self::Manifest)
                .map_err(|e| ManifestError::Json("image manifest", e))
        }
    }
}

/// Writes a manifest or index as BuildKit does: two spaces of indentation, no final newline.
pub fn to_bytes(document: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec_pretty(document).expect("documents have string keys only")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_that_serves_best_is_taken_and_an_attestation_never() {
        let index = |platforms: &[Option<&str>]| Index {
            schema_version: 2,
            media_type: None,
            manifests: platforms
                .iter()
                .enumerate()
                .map(|(at, platform)| Descriptor {
                    platform: platform.map(|text| Platform::parse_raw(text).unwrap()),
                    ..Descriptor::new(MediaType::OCI_MANIFEST, crate::Digest::of(b"m"), at as u64)
                })
                .collect(),
            annotations: BTreeMap::new(),
        };
        let best = |offered: &[Option<&str>], wanted: &str| {
            index(offered).best_for(&wanted.parse().unwrap()).map(|entry| entry.size)
        };
        assert_eq!(
            best(&[None, Some("linux/arm/v6"), Some("linux/arm/v7")], "linux/arm/v7"),
            Some(2)
        );
        assert_eq!(best(&[None, Some("linux/amd64")], "linux/s390x"), Some(0));
        assert_eq!(best(&[Some("linux/amd64")], "linux/s390x"), None);
        let mut attestation = index(&[None]);
        let kind = ("vnd.docker.reference.type".into(), "attestation-manifest".into());
        attestation.manifests[0].annotations.extend([kind]);
        assert_eq!(attestation.best_for(&Platform::host()), None);
    }

    #[test]
    fn refuses_documents_with_two_meanings() {
        let both = br#"{"schemaVersion":2,"layers":[],"manifests":[]}"#;
        assert!(matches!(Document::parse(both), Err(ManifestError::Ambiguous)));
        let lying = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","config":{}}"#;
        assert!(
            matches!(Document::parse(lying), Ok(Document::Index(index)) if index.manifests.is_empty())
        );
        assert!(matches!(Document::parse(br#"{"schemaVersion":1}"#), Err(ManifestError::Schema1)));
        assert!(matches!(Document::parse(b"[]"), Err(ManifestError::Json(..))));
    }
}
