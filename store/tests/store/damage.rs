//! Damaged disks and lying images.

use std::fs;
use std::time::Duration;

use slipway_spec::media_type::Compression;
use slipway_spec::{Digest, Index, MediaType};
use slipway_store::gc::PruneOptions;
use slipway_store::pack::BlobOptions;
use slipway_store::snapshot::LayerId;
use slipway_store::{ErrorKind, Store};

use crate::harness;

/// Runs something that must not hang.
fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(Duration::from_secs(30)).expect("it hangs, or panicked")
}

#[test]
fn any_flipped_bit_in_a_layer_is_noticed_and_the_blob_is_fetched_again() {
    let (_folder, store) = harness::store();
    let tar = harness::tar(&[("a", b"some text"), ("b", &[b'x'; 3000])]);
    for blob in [harness::gzip(&tar), tar.clone()] {
        let digest = Digest::of(&blob);
        for at in (0..blob.len()).step_by(blob.len() / 40 + 1) {
            let layer = harness::pulled(&store, &blob, &Digest::of(&tar));
            let mut damaged = blob.clone();
            damaged[at] ^= 1 << (at % 8);
            harness::overwrite(&store.blob_path(&digest), &damaged);
            match store.ensure_folder(layer, &[]) {
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "bit at {at}: {error}");
                    assert!(!store.layer_folder(layer).exists());
                }
                // gzip has bits that change nothing: in its header, and to fill the last byte.
                Ok(folder) => {
                    assert_ne!(blob, tar, "bit at {at}");
                    assert_eq!(fs::read(folder.join("a")).unwrap(), b"some text");
                    fs::remove_dir_all(folder).unwrap();
                    assert_eq!(store.verify_blob(&digest).unwrap_err().kind(), ErrorKind::Corrupt);
                }
            }
            assert!(!store.has_blob(&digest).unwrap(), "bit at {at}");
        }
        let layer = harness::pulled(&store, &blob, &Digest::of(&tar));
        let folder = store.ensure_folder(layer, &[]).unwrap();
        assert_eq!(fs::read(folder.join("a")).unwrap(), b"some text");
        store.prune(&PruneOptions { all: true, older_than: None, working_since: None }).unwrap();
    }
}

#[test]
fn damage_is_noticed_when_a_layer_is_converted() {
    let (_folder, store) = harness::store();
    let tar = harness::tar(&[("a", b"some text")]);
    let layer = harness::pulled(&store, &tar, &Digest::of(&tar));
    let mut damaged = tar.clone();
    damaged[512] ^= 1;
    harness::overwrite(&store.blob_path(&Digest::of(&tar)), &damaged);
    let options =
        BlobOptions { compression: Compression::Zstd, force: true, ..BlobOptions::default() };
    assert_eq!(store.ensure_blob(layer, &options).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(!store.has_blob(&Digest::of(&tar)).unwrap());
}

#[test]
fn content_that_was_cut_short_or_lost_is_not_there() {
    let (_folder, store) = harness::store();
    let descriptor = store.put(MediaType::OCI_CONFIG, b"some content").unwrap();
    for damage in [&b"some"[..], b""] {
        harness::overwrite(&store.blob_path(&descriptor.digest), damage);
        assert!(!store.has_blob(&descriptor.digest).unwrap());
        assert_eq!(store.blob_size(&descriptor.digest).unwrap(), None);
        assert_eq!(store.put(MediaType::OCI_CONFIG, b"some content").unwrap(), descriptor);
        assert_eq!(store.read_blob(&descriptor.digest, 100).unwrap(), b"some content");
    }
    fs::remove_file(store.blob_path(&descriptor.digest)).unwrap();
    assert!(!store.has_blob(&descriptor.digest).unwrap());
    assert_eq!(store.blob_size(&descriptor.digest).unwrap(), None);
}

#[test]
fn lost_folders_come_back_empty_and_their_layers_are_unpacked_again() {
    let (folder, store) = harness::store();
    let (with_blob, _) = harness::image(&store, "docker.io/library/a:latest", &[("f", "text")]);
    let without = harness::layer(&store, &[("f", "gone")]);
    let root = store.root().to_path_buf();
    drop(store);
    for name in ["layers", "digests", "stub", "tmp"] {
        fs::remove_dir_all(root.join(name)).unwrap();
    }
    fs::remove_file(root.join("content/index.json")).unwrap();
    fs::write(root.join("content/oci-layout"), "garbage").unwrap();
    let store = Store::open(&folder.path().join("root")).unwrap();
    assert_eq!(fs::read(store.ensure_folder(with_blob, &[]).unwrap().join("f")).unwrap(), b"text");
    assert!(!store.obtainable(without).unwrap());
    assert_eq!(store.ensure_folder(without, &[]).unwrap_err().kind(), ErrorKind::NotFound);
    let index: Index =
        serde_json::from_slice(&fs::read(root.join("content/index.json")).unwrap()).unwrap();
    assert_eq!(index.manifests.len(), 1);
}

#[test]
fn a_folder_whose_row_a_power_cut_took_does_not_block_its_number() {
    let (_folder, store) = harness::store();
    fs::create_dir_all(store.layer_folder(LayerId(1))).unwrap();
    fs::write(store.layer_folder(LayerId(1)).join("old"), "").unwrap();
    let layer = harness::layer(&store, &[("new", "text")]);
    assert_eq!(layer, LayerId(1));
    assert_eq!(harness::names(&store.layer_folder(layer)), ["new"]);
}

#[test]
fn layers_that_were_not_synced_before_a_power_cut_are_made_anew() {
    let (_folder, store) = harness::store();
    let tar = harness::tar(&[("f", b"text")]);
    let layer = harness::pulled(&store, &tar, &Digest::of(&tar));
    let folder = store.ensure_folder(layer, &[]).unwrap();
    let adopted = harness::layer(&store, &[("f", "text")]);
    let synced = harness::layer(&store, &[("f", "text")]);
    let cut = || {
        let database = harness::database(&store);
        database
            .execute(
                "UPDATE layer SET boot = 'another start' WHERE boot IS NOT NULL AND id != ?1",
                [synced.0],
            )
            .unwrap();
        fs::write(folder.join("f"), "").unwrap();
    };
    cut();
    assert_eq!(fs::read(store.ensure_folder(layer, &[]).unwrap().join("f")).unwrap(), b"text");
    assert!(!store.obtainable(adopted).unwrap());
    assert!(store.obtainable(synced).unwrap());
    store.sync_layers().unwrap();
    harness::database(&store)
        .execute("UPDATE layer SET boot = 'another start' WHERE boot IS NOT NULL", [])
        .unwrap();
    assert!(store.obtainable(synced).unwrap());
}

#[test]
fn an_image_with_damaged_parts_does_not_keep_the_collector_from_working() {
    for damage in [
        "missing manifest",
        "damaged manifest",
        "missing config",
        "damaged config",
        "config of nonsense",
    ] {
        let (_folder, store) = harness::store();
        let (_, whole) =
            harness::image(&store, "docker.io/library/whole:latest", &[("f", "whole")]);
        let (_, target) =
            harness::image(&store, "docker.io/library/broken:latest", &[("f", "broken")]);
        let config = store.platforms(&target).unwrap().remove(0).manifest.config;
        match damage {
            "missing manifest" => fs::remove_file(store.blob_path(&target.digest)).unwrap(),
            "damaged manifest" => {
                harness::overwrite(
                    &store.blob_path(&target.digest),
                    &vec![b'x'; usize::try_from(target.size).unwrap()],
                );
            }
            "missing config" => fs::remove_file(store.blob_path(&config.digest)).unwrap(),
            "damaged config" => {
                harness::overwrite(
                    &store.blob_path(&config.digest),
                    &vec![b'x'; usize::try_from(config.size).unwrap()],
                );
            }
            _ => {
                let nonsense = store.put(MediaType::OCI_CONFIG, b"[1]").unwrap();
                let target = harness::manifest(&store, &nonsense, &[]);
                store.name_image(&["docker.io/library/broken:latest".into()], &target).unwrap();
            }
        }
        let litter = store.put(MediaType::OCI_CONFIG, b"litter").unwrap();
        let pruned =
            store.prune(&PruneOptions { all: true, older_than: None, working_since: None });
        assert!(pruned.unwrap().blobs >= 1, "{damage}");
        assert!(!store.has_blob(&litter.digest).unwrap(), "{damage}");
        assert!(store.closure(&whole).unwrap().missing.is_empty(), "{damage}");
        assert_eq!(store.platforms(&whole).unwrap().len(), 1, "{damage}");
        store.usage().unwrap();
    }
}

#[test]
fn a_database_of_garbage_is_an_error_that_names_it_and_leaves_it_alone() {
    let (folder, store) = harness::store();
    let path = store.root().join("metadata.db");
    drop(store);
    for entry in ["metadata.db-wal", "metadata.db-shm"] {
        drop(fs::remove_file(path.with_file_name(entry)));
    }
    fs::write(&path, [7; 8192]).unwrap();
    let error = Store::open(&folder.path().join("root")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("metadata.db"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), [7; 8192]);
}

#[test]
fn an_image_that_names_the_diff_id_of_another_layer_cannot_take_its_place() {
    let (_folder, store) = harness::store();
    let good = harness::tar(&[("sh", b"good")]);
    let evil = harness::gzip(&harness::tar(&[("sh", b"evil")]));
    let diff_id = Digest::of(&good);
    // Whichever comes first by digest: both orders must hold.
    for good_blob in [harness::gzip(&good), good.clone()] {
        let layer = harness::pulled(&store, &evil, &diff_id);
        assert_eq!(harness::pulled(&store, &good_blob, &diff_id), layer);
        let blob = store.ensure_blob(layer, &BlobOptions::default()).unwrap();
        assert_eq!(blob.descriptor.digest, Digest::of(&good_blob));
        assert_eq!(blob.diff_id, diff_id);
        harness::pulled(&store, &evil, &diff_id);
        let folder = store.ensure_folder(layer, &[]).unwrap();
        assert_eq!(fs::read(folder.join("sh")).unwrap(), b"good");
        store.prune(&PruneOptions { all: true, older_than: None, working_since: None }).unwrap();
    }
    let layer = harness::pulled(&store, &evil, &diff_id);
    let error = store.ensure_folder(layer, &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(
        store.has_blob(&Digest::of(&evil)).unwrap(),
        "the blob is what its digest says and may be of use elsewhere"
    );
}

#[test]
fn layers_may_have_a_sha512_diff_id() {
    let (_folder, store) = harness::store();
    let tar = harness::tar(&[("f", b"text")]);
    let unknown: Digest = format!("sha512:{}", "0".repeat(128)).parse().unwrap();
    let mut hasher = unknown.verifier();
    hasher.update(&tar);
    let diff_id = hasher.finish();
    let layer = harness::pulled(&store, &harness::gzip(&tar), &diff_id);
    assert_eq!(fs::read(store.ensure_folder(layer, &[]).unwrap().join("f")).unwrap(), b"text");
    let zstd =
        BlobOptions { compression: Compression::Zstd, force: true, ..BlobOptions::default() };
    store.ensure_blob(layer, &zstd).unwrap();
}

fn tar_with_a_link(name: &str, target: &str) -> Vec<u8> {
    let mut builder = tar::Builder::new(vec![]);
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Link);
    header.set_size(0);
    header.set_mode(0o644);
    builder.append_link(&mut header, name, target).unwrap();
    builder.into_inner().unwrap()
}

#[test]
fn layers_that_need_each_other_in_circles_are_an_error_and_do_not_hang() {
    let (_folder, store) = harness::store();
    let (one, two) = (tar_with_a_link("a", "b"), tar_with_a_link("b", "a"));
    let a = harness::pulled(&store, &one, &Digest::of(&one));
    let b = harness::pulled(&store, &two, &Digest::of(&two));
    let clone = store.clone();
    assert!(in_time(move || clone.stack(&[a, a]).is_err()));
    let again = |store: &Store, blob: &[u8]| harness::pulled(store, blob, &Digest::of(blob));
    again(&store, &one);
    again(&store, &two);
    let (first, second) = (store.clone(), store.clone());
    let others = std::thread::spawn(move || first.stack(&[a, b]).is_err());
    assert!(in_time(move || second.stack(&[b, a]).is_err()));
    assert!(in_time(move || others.join().unwrap()));
}

#[test]
fn a_layer_may_link_to_a_file_below_it() {
    let (_folder, store) = harness::store();
    let (base, top) = (harness::tar(&[("b", b"below")]), tar_with_a_link("a", "b"));
    let base = harness::pulled(&store, &base, &Digest::of(&base));
    let top = harness::pulled(&store, &top, &Digest::of(&top));
    let folders = store.folders(&[base, top]).unwrap();
    assert_eq!(fs::read(folders[1].join("a")).unwrap(), b"below");
}

#[test]
fn a_layer_keeps_its_diff_id_in_every_compression() {
    let (_folder, store) = harness::store();
    // Packed by somebody else, so packing its folder anew would give other bytes.
    let tar = harness::tar(&[("z", b"1"), ("a", b"2")]);
    let layer = harness::pulled(&store, &harness::gzip(&tar), &Digest::of(&tar));
    store.ensure_folder(layer, &[]).unwrap();
    for compression in [Compression::Zstd, Compression::Uncompressed, Compression::Gzip] {
        let options = BlobOptions { compression, force: true, ..BlobOptions::default() };
        let blob = store.ensure_blob(layer, &options).unwrap();
        assert_eq!(blob.diff_id, Digest::of(&tar));
        assert_eq!(blob.descriptor.media_type.compression(), Some(compression));
    }
}

#[test]
fn blobs_of_other_bytes_go_when_a_layer_is_packed_anew() {
    let (_folder, store) = harness::store();
    let tar = harness::tar(&[("z", b"1"), ("a", b"2")]);
    let blob = harness::gzip(&tar);
    let layer = harness::pulled(&store, &blob, &Digest::of(&tar));
    store.ensure_folder(layer, &[]).unwrap();
    fs::remove_file(store.blob_path(&Digest::of(&blob))).unwrap();
    let packed = store.ensure_blob(layer, &BlobOptions::default()).unwrap();
    assert_ne!(packed.diff_id, Digest::of(&tar), "the order of entries is another");
    // The old blob comes back: it must not be shown together with the new diff id.
    store.put(MediaType::OCI_LAYER_GZIP, &blob).unwrap();
    assert_eq!(store.ensure_blob(layer, &BlobOptions::default()).unwrap(), packed);
}
