//! Stores, images and archives to test with.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use slipway_spec::{Descriptor, Digest, MediaType};
use slipway_store::Store;
use slipway_store::pack::BlobOptions;
use slipway_store::snapshot::LayerId;

pub(crate) fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("root")).unwrap();
    (folder, store)
}

/// Makes a layer of files, as a build step would.
pub(crate) fn layer(store: &Store, files: &[(&str, &str)]) -> LayerId {
    let home = store.temporary("step");
    fs::create_dir_all(home.join("fs")).unwrap();
    for (name, text) in files {
        let path = home.join("fs").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    store.adopt_folder(&home, &[], "a step").unwrap()
}

/// Describes an image of layers whose diff ids are given.
pub(crate) fn image_of(store: &Store, layers: &[(Descriptor, String)]) -> Descriptor {
    let diff_ids: Vec<&String> = layers.iter().map(|(_, diff_id)| diff_id).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = store.put(MediaType::OCI_CONFIG, &serde_json::to_vec(&config).unwrap()).unwrap();
    let layers: Vec<&Descriptor> = layers.iter().map(|(descriptor, _)| descriptor).collect();
    manifest(store, &config, &layers)
}

pub(crate) fn manifest(store: &Store, config: &Descriptor, layers: &[&Descriptor]) -> Descriptor {
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": MediaType::OCI_MANIFEST.as_str(), "config": config, "layers": layers,
    });
    store.put(MediaType::OCI_MANIFEST, &serde_json::to_vec(&manifest).unwrap()).unwrap()
}

/// Makes an image of one layer and names it.
pub(crate) fn image(store: &Store, name: &str, files: &[(&str, &str)]) -> (LayerId, Descriptor) {
    let layer = layer(store, files);
    let blob = store.ensure_blob(layer, &BlobOptions::default()).unwrap();
    let target = image_of(store, &[(blob.descriptor, blob.diff_id.to_string())]);
    store.name_image(&[name.to_owned()], &target).unwrap();
    (layer, target)
}

/// Writes a tar; names and contents as given.
pub(crate) fn tar(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(vec![]);
    for (name, bytes) in entries {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        // Not by the crate's own way, which refuses what an attacker would write.
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Makes a layer known as a pull does: a blob, and the diff id that an image claims for it.
pub(crate) fn pulled(store: &Store, blob: &[u8], diff_id: &Digest) -> LayerId {
    let media_type = if blob.starts_with(&[0x1f, 0x8b]) {
        MediaType::OCI_LAYER_GZIP
    } else {
        MediaType::OCI_LAYER
    };
    let descriptor = store.put(media_type, blob).unwrap();
    let layer = store.layer_by_diff_id(diff_id, 0, "pulled").unwrap();
    store.record_layer_blob(layer, &descriptor, None).unwrap();
    layer
}

/// Changes a file that is kept read-only.
pub(crate) fn overwrite(path: &Path, bytes: &[u8]) {
    let copy = path.with_extension("new");
    fs::write(&copy, bytes).unwrap();
    fs::rename(copy, path).unwrap();
}

pub(crate) fn database(store: &Store) -> rusqlite::Connection {
    rusqlite::Connection::open(store.root().join("metadata.db")).unwrap()
}

/// Everything under the folders of unfinished work but their locks.
pub(crate) fn unfinished(store: &Store) -> Vec<PathBuf> {
    let mut found = vec![];
    for lease in fs::read_dir(store.root().join("tmp")).unwrap() {
        for entry in fs::read_dir(lease.unwrap().path()).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap() != "lock" {
                found.push(path);
            }
        }
    }
    found
}

pub(crate) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
