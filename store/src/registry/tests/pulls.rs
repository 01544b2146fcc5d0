//! What of an image with attestations is fetched.

use std::collections::BTreeMap;

use serde_json::json;
use slipway_spec::Platform;

use super::*;
use crate::Store;
use crate::transfer::{self, Platforms};

/// Documents and blobs by digest, with their types.
#[derive(Clone, Default)]
struct Shelf(BTreeMap<String, (MediaType, Vec<u8>)>);

impl Shelf {
    fn put(&mut self, kind: MediaType, bytes: impl Into<Vec<u8>>) -> Descriptor {
        let bytes = bytes.into();
        let descriptor = Descriptor::new(kind.clone(), Digest::of(&bytes), bytes.len() as u64);
        self.0.insert(descriptor.digest.to_string(), (kind, bytes));
        descriptor
    }

    fn manifest(&mut self, config: &Descriptor, layer: &Descriptor) -> Descriptor {
        let kind = MediaType::OCI_MANIFEST;
        let document = json!({
            "schemaVersion": 2, "mediaType": kind.as_str(), "config": config, "layers": [layer],
        });
        self.put(kind, document.to_string())
    }

    fn image(&mut self, platform: &str) -> Descriptor {
        let platform: Platform = platform.parse().unwrap();
        let layer = self.put(MediaType::OCI_LAYER, platform.to_string());
        let config = json!({
            "os": platform.os, "architecture": platform.architecture,
            "rootfs": { "type": "layers", "diff_ids": [layer.digest] },
        });
        let config = self.put(MediaType::OCI_CONFIG, config.to_string());
        Descriptor { platform: Some(platform), ..self.manifest(&config, &layer) }
    }

    /// What is said of an image; the statement, and its manifest.
    fn said(&mut self, of: &Descriptor) -> (Descriptor, Descriptor) {
        let statement = MediaType::new("application/vnd.in-toto+json");
        let statement = self.put(statement, json!({ "of": of.digest }).to_string());
        let empty = self.put(MediaType::OCI_EMPTY, "{}");
        let mut manifest = self.manifest(&empty, &statement);
        let kind = ("vnd.docker.reference.type".into(), "attestation-manifest".into());
        manifest.annotations.extend([kind]);
        let mut unknown = Platform::new("unknown", "unknown", None);
        unknown.os = "unknown".into();
        (statement, Descriptor { platform: Some(unknown), ..manifest })
    }

    fn index(&mut self, manifests: &[&Descriptor]) -> Descriptor {
        let kind = MediaType::OCI_INDEX;
        let document =
            json!({ "schemaVersion": 2, "mediaType": kind.as_str(), "manifests": manifests });
        self.put(kind, document.to_string())
    }

    async fn serve(&self, root: &Descriptor) -> Scripted {
        let (shelf, root) = (self.clone(), root.digest.to_string());
        Scripted::start(move |request| {
            let name = request.path().rsplit('/').next().unwrap_or_default();
            let digest = if name == "v1" { &root } else { name };
            match shelf.0.get(digest) {
                None if request.path() == "/v2/" => Reply::ok("{}"),
                None => not_found("MANIFEST_UNKNOWN"),
                Some((kind, bytes)) => Reply::ok(bytes.as_slice())
                    .header("content-type", kind.as_str())
                    .header("docker-content-digest", digest),
            }
        })
        .await
    }
}

/// Pulls for `linux/amd64` and tells what is missing then.
async fn pull(shelf: &Shelf, root: &Descriptor) -> Result<Vec<Digest>, crate::Error> {
    let server = shelf.serve(root).await;
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("root")).unwrap();
    let wanted = Platforms::Only(vec!["linux/amd64".parse().unwrap()]);
    let target = transfer::pull(&store, &client(), &image(&server), &wanted, &|_, _, _| {}).await?;
    let closure = store.closure(&target)?;
    Ok(closure.missing.into_iter().map(|missing| missing.digest).collect())
}

#[tokio::test]
async fn what_is_said_comes_along_where_all_images_do() {
    let mut shelf = Shelf::default();
    let amd64 = shelf.image("linux/amd64");
    let (statement, said) = shelf.said(&amd64);
    let root = shelf.index(&[&amd64, &said]);
    assert_eq!(pull(&shelf, &root).await.unwrap(), []);

    // Somebody who tidied the registry left images alone; they can be run.
    for lost in [&statement, &said] {
        let mut shelf = shelf.clone();
        shelf.0.remove(&lost.digest.to_string());
        let missing = pull(&shelf, &root).await;
        assert_eq!(missing.unwrap(), std::slice::from_ref(&lost.digest));
    }
    let mut without = shelf.clone();
    without.0.remove(&amd64.digest.to_string());
    assert!(pull(&without, &root).await.is_err());
}

#[tokio::test]
async fn what_is_said_stays_where_images_stay() {
    let mut shelf = Shelf::default();
    let (amd64, arm) = (shelf.image("linux/amd64"), shelf.image("linux/arm64"));
    let (_, said) = shelf.said(&amd64);
    let root = shelf.index(&[&amd64, &said, &arm]);
    let missing = pull(&shelf, &root).await;
    assert_eq!(missing.unwrap(), [said.digest, arm.digest.clone()]);
    // Nobody is offered what is no image.
    let root = {
        let (_, said) = shelf.said(&arm);
        shelf.index(&[&arm, &said])
    };
    let error = pull(&shelf, &root).await.unwrap_err().to_string();
    assert!(
        error.ends_with("has nothing for linux/amd64; it is offered for linux/arm64"),
        "{error}"
    );
}
