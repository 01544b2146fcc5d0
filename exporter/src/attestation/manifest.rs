//! The manifest that stands beside an image in its index and holds what is said of it.

use std::collections::BTreeMap;

use serde::Serialize;
use slipway_spec::manifest::to_bytes;
use slipway_spec::purl::{PurlKind, image_purl};
use slipway_spec::{Descriptor, Digest, ImageReference, Manifest, MediaType, Platform, RootFs};
use slipway_store::Store;

use super::reading::Said;
use super::statement::{Named, statement};

const STATEMENT_TYPE: &str = "application/vnd.in-toto+json";
const ARTIFACT_TYPE: &str = "application/vnd.docker.attestation.manifest.v1+json";

/// The two bytes that artifacts have instead of a config, as they are and in base64.
const EMPTY: (&[u8], &str) = (b"{}", "e30=");

const UNKNOWN: &str = "unknown";

/// An image that something is said of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    /// Its manifest.
    pub(crate) manifest: &'a Descriptor,
    /// The names it gets.
    pub(crate) names: &'a [ImageReference],
    pub(crate) platform: &'a Platform,
}

/// The config where the manifest is to look like that of an image.
#[derive(Serialize)]
struct NoImage {
    architecture: &'static str,
    os: &'static str,
    config: BTreeMap<String, String>,
    rootfs: RootFs,
}

/// Writes statements and their manifest into the store, as an artifact or in the form of an image. Returns the entry of
/// the index. Blocks.
///
/// # Errors
/// When the store fails.
pub(crate) fn write(
    store: &Store,
    all: &[Said],
    target: Target<'_>,
    artifact: bool,
) -> slipway_store::Result<Descriptor> {
    let own: Vec<Named> = target
        .names
        .iter()
        .map(|name| {
            let purl = image_purl(PurlKind::Docker, name, Some(target.platform));
            Named::new(purl, &target.manifest.digest)
        })
        .collect();
    let mut layers = vec![];
    for said in all {
        let bytes = statement(said, &own);
        let mut layer = store.put(MediaType::new(STATEMENT_TYPE), bytes.as_bytes())?;
        let kind = ("in-toto.io/predicate-type".into(), said.predicate_type.clone());
        layer.annotations.extend([kind]);
        layers.push(layer);
    }
    let config = if artifact {
        let (bytes, text) = EMPTY;
        Descriptor { data: Some(text.into()), ..store.put(MediaType::OCI_EMPTY, bytes)? }
    } else {
        let diff_ids: Vec<Digest> = layers.iter().map(|layer| layer.digest.clone()).collect();
        let config = NoImage {
            architecture: UNKNOWN,
            os: UNKNOWN,
            config: BTreeMap::new(),
            rootfs: RootFs { diff_ids, ..RootFs::default() },
        };
        let bytes = serde_json::to_vec(&config).expect("configs have string keys only");
        store.put(MediaType::OCI_CONFIG, &bytes)?
    };
    let subject = |image: &Descriptor| {
        Descriptor::new(image.media_type.clone(), image.digest.clone(), image.size)
    };
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(MediaType::OCI_MANIFEST),
        artifact_type: artifact.then(|| ARTIFACT_TYPE.into()),
        config,
        layers,
        subject: artifact.then(|| subject(target.manifest)),
        annotations: BTreeMap::new(),
    };
    let written = store.put(MediaType::OCI_MANIFEST, &to_bytes(&manifest))?;
    let platform = Platform {
        os: UNKNOWN.into(),
        architecture: UNKNOWN.into(),
        variant: None,
        os_version: None,
        os_features: vec![],
    };
    let annotations = [
        ("vnd.docker.reference.digest".into(), target.manifest.digest.to_string()),
        ("vnd.docker.reference.type".into(), "attestation-manifest".into()),
    ];
    Ok(Descriptor { annotations: annotations.into(), platform: Some(platform), ..written })
}
