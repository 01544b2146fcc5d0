//! `slipway inspect`.

use serde_json::{Map, Value, json};
use slipway_spec::{Descriptor, ImageConfig, ImageReference};

use super::Context;
use super::images::PlatformRow;

/// An image and the config of one of its platforms.
#[derive(Clone, Debug)]
pub(crate) struct InspectedImage {
    /// The index, or the manifest of a single image.
    pub(crate) descriptor: Descriptor,
    /// Its names.
    pub(crate) names: Vec<ImageReference>,
    /// The config of the platform that was asked for, or else of the host's or the first that is in the store.
    pub(crate) config: ImageConfig,
    /// The bytes of the blobs of that platform.
    pub(crate) size_bytes: u64,
    /// All platforms.
    pub(crate) platforms: Vec<PlatformRow>,
}

impl InspectedImage {
    /// Returns the document, with docker's field names and the platforms besides.
    pub(crate) fn to_json(&self) -> Value {
        let digest = &self.descriptor.digest;
        let mut digests: Vec<String> = self
            .names
            .iter()
            .map(|name| format!("{}@{digest}", name.familiar_repository()))
            .collect();
        digests.dedup();
        let tags: Vec<String> = self
            .names
            .iter()
            .filter(|name| name.tag().is_some())
            .map(ImageReference::familiar)
            .collect();
        let mut document = Map::new();
        let mut set = |key: &str, value: Value| drop(document.insert(key.into(), value));
        set("Id", digest.to_string().into());
        set("RepoTags", tags.into());
        set("RepoDigests", digests.into());
        set("Created", self.config.created.clone().into());
        set("Author", self.config.author.clone().unwrap_or_default().into());
        set("Architecture", self.config.architecture.clone().into());
        if let Some(variant) = &self.config.variant {
            set("Variant", variant.clone().into());
        }
        set("Os", self.config.os.clone().into());
        set("Size", self.size_bytes.into());
        set("Config", serde_json::to_value(&self.config.config).unwrap_or_default());
        let layers: Vec<String> =
            self.config.rootfs.diff_ids.iter().map(ToString::to_string).collect();
        set("RootFS", json!({ "Type": "layers", "Layers": layers }));
        set("Descriptor", serde_json::to_value(&self.descriptor).unwrap_or_default());
        let platforms = self.platforms.iter().map(|row| {
            json!({
                "Platform": row.platform.to_string(),
                "Digest": row.digest.to_string(),
                "Size": row.size_bytes,
                "Available": row.is_present,
            })
        });
        set("Platforms", platforms.collect());
        Value::Object(document)
    }
}

/// Prints the images as a JSON array.
pub(crate) fn print(images: &[InspectedImage], context: &Context) {
    let array = Value::Array(images.iter().map(InspectedImage::to_json).collect());
    context.printer.line(&format!("{array:#}"));
}

#[cfg(test)]
mod tests {
    use slipway_spec::{ContainerConfig, Digest, MediaType};

    use super::*;
    use crate::command::testing;

    #[test]
    fn a_document_with_dockers_fields() {
        let (context, stdout, _) = testing::context(&[]);
        let digest = Digest::of(b"i");
        let image = InspectedImage {
            descriptor: Descriptor::new(MediaType::OCI_INDEX, digest.clone(), 9),
            names: ["a:1", "a:2"].map(|name| name.parse().unwrap()).into(),
            config: ImageConfig {
                architecture: "arm".into(),
                os: "linux".into(),
                variant: Some("v7".into()),
                created: Some("2026-01-01T00:00:00Z".into()),
                config: ContainerConfig { env: vec!["A=b".into()], ..ContainerConfig::default() },
                ..ImageConfig::default()
            },
            size_bytes: 42,
            platforms: vec![PlatformRow {
                platform: "linux/arm".parse().unwrap(),
                digest: Digest::of(b"m"),
                size_bytes: 42,
                is_present: true,
            }],
        };
        print(&[image], &context);
        let printed: Value = serde_json::from_str(&stdout.take()).unwrap();
        assert_eq!(
            printed,
            json!([{
                "Id": digest.to_string(),
                "RepoTags": ["a:1", "a:2"],
                "RepoDigests": [format!("a@{digest}")],
                "Created": "2026-01-01T00:00:00Z",
                "Author": "",
                "Architecture": "arm",
                "Variant": "v7",
                "Os": "linux",
                "Size": 42,
                "Config": { "Env": ["A=b"] },
                "RootFS": { "Type": "layers", "Layers": [] },
                "Descriptor": { "mediaType": MediaType::OCI_INDEX, "digest": digest.to_string(), "size": 9 },
                "Platforms": [{
                    "Platform": "linux/arm/v7",
                    "Digest": Digest::of(b"m").to_string(),
                    "Size": 42,
                    "Available": true,
                }],
            }])
        );
        print(&[], &context);
        assert_eq!(stdout.take(), "[]\n");
    }
}
