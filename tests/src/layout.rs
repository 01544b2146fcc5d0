//! OCI image layouts, read without any code of slipway.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::tools::tool;

/// An OCI image layout in a directory.
#[derive(Debug)]
pub struct Layout {
    path: PathBuf,
}

/// One platform of an image: its manifest and configuration.
#[derive(Debug)]
pub struct Image {
    /// The digest of the manifest.
    pub digest: String,
    /// The manifest.
    pub manifest: Value,
    /// The configuration.
    pub config: Value,
}

impl Layout {
    /// Opens a directory.
    pub fn open(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let version = fs::read_to_string(path.join("oci-layout")).expect("read oci-layout");
        assert!(version.contains("1.0.0"), "oci-layout says {version}");
        Self { path }
    }

    /// Unpacks an archive beside it and opens that.
    pub fn unpack(archive: &Path) -> Self {
        let path = archive.with_extension("layout");
        fs::create_dir(&path).expect("create a directory");
        tool(Command::new("tar").arg("-C").arg(&path).arg("-xf").arg(archive));
        Self::open(path)
    }

    /// Returns where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the descriptors of `index.json`.
    pub fn descriptors(&self) -> Vec<Value> {
        let bytes = fs::read(self.path.join("index.json")).expect("read index.json");
        let index: Value = serde_json::from_slice(&bytes).expect("index.json is JSON");
        index["manifests"].as_array().expect("index.json lists manifests").clone()
    }

    /// Returns a blob and checks that it has the digest that names it.
    pub fn blob(&self, digest: &str) -> Vec<u8> {
        let hex = digest.strip_prefix("sha256:").expect("a SHA-256 digest");
        let bytes = fs::read(self.path.join("blobs/sha256").join(hex)).expect("read a blob");
        let actual: String =
            Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(actual, hex, "the bytes of a blob have its digest");
        bytes
    }

    /// Reads what a descriptor points at, and checks the size it states.
    pub fn document(&self, descriptor: &Value) -> Value {
        let bytes = self.blob(descriptor["digest"].as_str().expect("a descriptor has a digest"));
        assert_eq!(
            Some(bytes.len() as u64),
            descriptor["size"].as_u64(),
            "the size of {descriptor}"
        );
        let document: Value = serde_json::from_slice(&bytes).expect("a document is JSON");
        if let Some(media_type) = document.get("mediaType") {
            assert_eq!(media_type, &descriptor["mediaType"], "a document and its descriptor agree");
        }
        document
    }

    /// Returns the images below a descriptor by platform, and checks all of their blobs.
    pub fn images(&self, descriptor: &Value) -> BTreeMap<String, Image> {
        let document = self.document(descriptor);
        let Some(manifests) = document["manifests"].as_array() else {
            let image = self.image(descriptor);
            return BTreeMap::from([(platform_of(&image.config), image)]);
        };
        let mut images = BTreeMap::new();
        for manifest in manifests {
            let image = self.image(manifest);
            let platform = platform_of(&manifest["platform"]);
            assert_eq!(
                platform,
                platform_of(&image.config),
                "the index and the configuration agree"
            );
            assert!(
                images.insert(platform, image).is_none(),
                "an index names each platform once: {document}"
            );
        }
        images
    }

    fn image(&self, descriptor: &Value) -> Image {
        let manifest = self.document(descriptor);
        let config = self.document(&manifest["config"]);
        let layers = manifest["layers"].as_array().expect("a manifest has layers");
        let diff_ids =
            config["rootfs"]["diff_ids"].as_array().expect("a configuration has diff ids");
        assert_eq!(layers.len(), diff_ids.len(), "each layer has a diff id");
        for layer in layers {
            let bytes = self.blob(layer["digest"].as_str().expect("a layer has a digest"));
            assert_eq!(Some(bytes.len() as u64), layer["size"].as_u64(), "the size of {layer}");
        }
        let history = config["history"].as_array().expect("a configuration has a history");
        let filled =
            history.iter().filter(|entry| entry["empty_layer"] != Value::Bool(true)).count();
        assert_eq!(filled, layers.len(), "the history accounts for each layer: {config}");
        let digest = descriptor["digest"].as_str().expect("a descriptor has a digest").to_owned();
        Image { digest, manifest, config }
    }

    /// Unpacks one platform of the image with this tag by `umoci` and returns the directory of its files.
    pub fn umoci_unpack(&self, tag: &str, platform: &str) -> PathBuf {
        // umoci does not choose from an index: skopeo makes a layout of the one platform.
        let (system, architecture) = platform.split_once('/').expect("os/architecture");
        let name = format!("{}-{}", self.path.display(), platform.replace('/', "-"));
        let (single, bundle) = (format!("{name}.single"), format!("{name}.bundle"));
        tool(
            Command::new("skopeo")
                .args(["--override-os", system, "--override-arch", architecture, "copy", "--quiet"])
                .arg(format!("oci:{}:{tag}", self.path.display()))
                .arg(format!("oci:{single}:one")),
        );
        tool(Command::new("umoci").args(["unpack", "--image", &format!("{single}:one"), &bundle]));
        Path::new(&bundle).join("rootfs")
    }
}

fn platform_of(value: &Value) -> String {
    let part = |name: &str| value[name].as_str().unwrap_or("?").to_owned();
    let mut text = format!("{}/{}", part("os"), part("architecture"));
    // arm64 is v8 wherever nothing else is said.
    if let Some(variant) = value["variant"].as_str().filter(|variant| *variant != "v8") {
        text.push_str(&format!("/{variant}"));
    }
    text
}
