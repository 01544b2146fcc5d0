//! Archives that are written, and hostile ones that are read.

use std::io::Cursor;
use std::process::Command;
use std::time::{Duration, Instant};

use slipway_spec::{Descriptor, Digest, MediaType, Platform};
use slipway_store::layout::ArchiveImage;
use slipway_store::{ErrorKind, Store};

use crate::harness::{self, gzip, tar};

const NAME: &str = "docker.io/library/a:latest";

fn load(store: &Store, bytes: Vec<u8>) -> slipway_store::Result<Vec<ArchiveImage>> {
    store.load(Box::new(Cursor::new(bytes)))
}

fn save(store: &Store, names: &[&str], target: &Descriptor) -> Vec<u8> {
    let image = ArchiveImage {
        names: names.iter().map(ToString::to_string).collect(),
        target: target.clone(),
    };
    let mut bytes = vec![];
    store.save(&[image], &"linux/amd64".parse::<Platform>().unwrap(), &mut bytes).unwrap();
    bytes
}

fn blob(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn index(digest: &Digest, size: usize) -> Vec<u8> {
    let text = r#"{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"D","size":S}]}"#;
    text.replace('D', &digest.to_string()).replace(":S", &format!(":{size}")).into_bytes()
}

#[test]
fn what_is_saved_is_the_same_each_time_and_loads_elsewhere() {
    let (_one, store) = harness::store();
    let (_, target) = harness::image(&store, NAME, &[("f", "text"), ("d/g", "more")]);
    let bytes = save(&store, &[NAME], &target);
    assert_eq!(bytes, save(&store, &[NAME], &target));
    for archive in [bytes.clone(), gzip(&bytes)] {
        let (_two, other) = harness::store();
        let images = load(&other, archive).unwrap();
        assert_eq!(images.len(), 1);
        assert_eq!((images[0].names.clone(), &images[0].target), (vec![NAME.to_owned()], &target));
        assert_eq!(other.image(NAME).unwrap().unwrap().target, target);
        assert_eq!(save(&other, &[NAME], &target), bytes);
        let platform = other.platforms(&target).unwrap().remove(0);
        let config = other.image_config(&platform.manifest.config).unwrap();
        let layer = other.layer_by_diff_id(&config.rootfs.diff_ids[0], 0, "").unwrap();
        let folder = other.ensure_folder(layer, &[]).unwrap();
        assert_eq!(std::fs::read(folder.join("d/g")).unwrap(), b"more");
    }
}

#[test]
fn other_tools_read_archives_and_the_content_folder() {
    let (folder, store) = harness::store();
    let (_, target) = harness::image(&store, NAME, &[("f", "text")]);
    let path = folder.path().join("a.tar");
    std::fs::write(&path, save(&store, &[NAME], &target)).unwrap();
    let content = store.content_folder();
    let sources = [
        format!("oci-archive:{}:latest", path.display()),
        format!("docker-archive:{}:a:latest", path.display()),
        format!("oci:{}:a:latest", content.display()),
    ];
    for source in sources {
        let seen = Command::new("skopeo")
            .args(["inspect", "--raw", "--config", &source])
            .output()
            .expect("this test needs skopeo (Debian package skopeo)");
        assert!(seen.status.success(), "{source}: {}", String::from_utf8_lossy(&seen.stderr));
        assert!(String::from_utf8_lossy(&seen.stdout).contains("diff_ids"), "{source}");
        let copy = folder.path().join("copy");
        let copied = Command::new("skopeo")
            .args(["--insecure-policy", "copy", &source])
            .arg(format!("dir:{}", copy.display()))
            .output()
            .unwrap();
        assert!(copied.status.success(), "{source}: {}", String::from_utf8_lossy(&copied.stderr));
    }
}

#[test]
fn damaged_content_is_not_saved() {
    let (_folder, store) = harness::store();
    let (_, target) = harness::image(&store, NAME, &[("f", "text")]);
    let layer = store.platforms(&target).unwrap().remove(0).manifest.layers.remove(0);
    let path = store.blob_path(&layer.digest);
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    harness::overwrite(&path, &bytes);
    let image = ArchiveImage { names: vec![NAME.into()], target };
    let platform = "linux/amd64".parse::<Platform>().unwrap();
    let error = store.save(&[image], &platform, &mut std::io::sink()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

#[test]
fn an_archive_that_ends_anywhere_is_refused_or_whole() {
    let (_one, store) = harness::store();
    let (_, target) = harness::image(&store, NAME, &[("f", "text")]);
    let bytes = save(&store, &[NAME], &target);
    let end = bytes.iter().rposition(|b| *b != 0).unwrap();
    for length in (0..end).step_by(300) {
        let (_two, other) = harness::store();
        match load(&other, bytes[..length].to_vec()) {
            Ok(_) => assert!(other.closure(&target).unwrap().missing.is_empty(), "{length}"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Invalid, "{length}: {error}");
                assert_eq!(other.images().unwrap(), vec![], "{length}");
            }
        }
    }
    let packed = gzip(&bytes);
    for length in (0..packed.len() - 8).step_by(50) {
        let (_two, other) = harness::store();
        let error = load(&other, packed[..length].to_vec()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{length}: {error}");
    }
}

#[test]
fn hostile_archives_are_refused_and_change_no_name() {
    let zero = Digest::of(b"absent");
    let manifest = br#"{"schemaVersion":2,"config":{"mediaType":"x","digest":"sha256:00","size":1},"layers":[]}"#;
    let huge = vec![b' '; 21 << 20];
    let wrong = b"not what its name says".to_vec();
    let index_of_wrong = index(&zero, wrong.len());
    let index_of_bad = index(&Digest::of(manifest), manifest.len());
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty", vec![]),
        ("text", b"this is no archive at all".repeat(100)),
        ("gzip of text", gzip(&b"this is no archive at all".repeat(100))),
        ("no index", tar(&[("a", b"b")])),
        ("empty index", tar(&[("index.json", br#"{"schemaVersion":2,"manifests":[]}"#)])),
        ("garbage index", tar(&[("index.json", b"[[[[")])),
        ("deep json", tar(&[("index.json", "[".repeat(1 << 20).as_bytes())])),
        ("huge index", tar(&[("index.json", &huge)])),
        ("huge list", tar(&[("manifest.json", &huge)])),
        ("absent manifest", tar(&[("index.json", &index(&zero, 5))])),
        ("wrong digest", tar(&[(&blob(&zero), &wrong), ("index.json", &index_of_wrong)])),
        (
            "bad manifest",
            tar(&[(&blob(&Digest::of(manifest)), manifest), ("index.json", &index_of_bad)]),
        ),
        ("two indexes", tar(&[("index.json", &index(&zero, 5)), ("index.json", &index(&zero, 6))])),
        ("two files", tar(&[("x", b"1"), ("x", b"2"), ("manifest.json", b"[]")])),
        (
            "absolute config",
            tar(&[(
                "manifest.json",
                br#"[{"Config":"/etc/passwd","RepoTags":["a:1"],"Layers":[]}]"#,
            )]),
        ),
        (
            "config above",
            tar(&[(
                "manifest.json",
                br#"[{"Config":"../../../etc/passwd","RepoTags":["a:1"],"Layers":[]}]"#,
            )]),
        ),
        ("null list", tar(&[("manifest.json", b"null")])),
        ("list of null", tar(&[("manifest.json", b"[null]")])),
    ];
    for (case, archive) in cases {
        let (folder, store) = harness::store();
        let error = load(&store, archive).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Corrupt), "{case}: {error}");
        assert_eq!(store.images().unwrap(), vec![], "{case}");
        assert_eq!(harness::unfinished(&store), Vec::<std::path::PathBuf>::new(), "{case}");
        assert_eq!(harness::names(folder.path()), ["root"], "{case}");
    }
}

#[test]
fn headers_that_would_fill_memory_are_refused() {
    let (_folder, store) = harness::store();
    let mut header = tar::Header::new_gnu();
    header.set_path("././@LongLink").unwrap();
    header.set_entry_type(tar::EntryType::GNULongName);
    header.set_size(1 << 40);
    header.set_cksum();
    let endless =
        std::io::Read::chain(Cursor::new(header.as_bytes().to_vec()), std::io::repeat(b'x'));
    let error = store.load(Box::new(endless)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
}

fn docker(config: &str, layers: &[&str]) -> Vec<u8> {
    serde_json::to_vec(
        &serde_json::json!([{"Config": config, "RepoTags": ["a:1"], "Layers": layers}]),
    )
    .unwrap()
}

fn config(diff_ids: &[&Digest]) -> Vec<u8> {
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    serde_json::to_vec(&config).unwrap()
}

fn with_links(files: &[(&str, &[u8])], links: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(vec![]);
    for (name, target) in links {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[157..157 + target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        builder.append(&header, std::io::empty()).unwrap();
    }
    for (name, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_path(name).unwrap();
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn links_in_docker_archives_lead_only_inside() {
    let layer = tar(&[("f", b"text")]);
    let diff_id = Digest::of(&layer);
    let config = config(&[&diff_id]);
    let list = docker("c.json", &["two/layer.tar"]);
    let files: [(&str, &[u8]); 3] =
        [("c.json", &config), ("one/layer.tar", &layer), ("manifest.json", &list)];
    let (_folder, store) = harness::store();
    let images =
        load(&store, with_links(&files, &[("two/layer.tar", "../one/layer.tar")])).unwrap();
    assert_eq!(images[0].names, ["docker.io/library/a:1"]);
    let bad =
        ["/etc/passwd", "../../../../etc/passwd", "layer.tar", "../two/layer.tar", "", "../one"];
    for target in bad {
        let (_folder, store) = harness::store();
        let error = load(&store, with_links(&files, &[("two/layer.tar", target)])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{target}: {error}");
        assert_eq!(store.images().unwrap(), vec![]);
    }
    let circle = [("two/layer.tar", "../three"), ("three", "two/layer.tar")];
    assert_eq!(load(&store, with_links(&files, &circle)).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn layers_of_docker_archives_are_compared_with_their_config() {
    let layer = tar(&[("f", b"text")]);
    let good = Digest::of(&layer);
    let packed = gzip(&layer);
    let mut broken = packed.clone();
    let middle = broken.len() / 2;
    broken[middle] ^= 0x10;
    let cases: [(&str, &[u8], Digest, bool); 5] = [
        ("plain", &layer, good.clone(), true),
        ("packed", &packed, good.clone(), true),
        ("another", b"other bytes", good.clone(), false),
        ("broken", &broken, good, false),
        ("the digest of the packed bytes", &packed, Digest::of(&packed), false),
    ];
    for (case, bytes, diff_id, fine) in cases {
        let (_folder, store) = harness::store();
        let archive = tar(&[
            ("c", &config(&[&diff_id])),
            ("l", bytes),
            ("manifest.json", &docker("c", &["l"])),
        ]);
        match load(&store, archive) {
            Ok(_) => assert!(fine, "{case}"),
            Err(error) => {
                assert!(!fine, "{case}: {error}");
                assert_eq!(error.kind(), ErrorKind::Invalid, "{case}: {error}");
            }
        }
    }
}

#[test]
fn an_index_of_partly_fetched_platforms_is_saved_and_loaded() {
    let (_folder, store) = harness::store();
    let (_, target) = harness::image(&store, NAME, &[("f", "text")]);
    let other = Descriptor::new(MediaType::OCI_MANIFEST, Digest::of(b"never fetched"), 13);
    let note = store.put(MediaType::from("text/plain"), b"a note").unwrap();
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": MediaType::OCI_INDEX.as_str(), "manifests": [target, other, note],
    });
    let index = store.put(MediaType::OCI_INDEX, &serde_json::to_vec(&index).unwrap()).unwrap();
    let closure = store.closure(&index).unwrap();
    assert_eq!(closure.missing, [other]);
    assert_eq!(closure.documents.last(), Some(&index));
    let bytes = save(&store, &[NAME], &index);
    let (_folder, elsewhere) = harness::store();
    load(&elsewhere, bytes).unwrap();
    assert_eq!(elsewhere.platforms(&index).unwrap().len(), 1);
}

#[test]
fn what_is_said_of_an_image_is_not_the_image() {
    let (_folder, store) = harness::store();
    let (_, image) = harness::image(&store, NAME, &[("f", "text")]);
    let empty = store.put(MediaType::OCI_EMPTY, b"{}").unwrap();
    let statement = MediaType::from("application/vnd.in-toto+json");
    let statement = store.put(statement, b"{\"said\":1}").unwrap();
    let said = |mut manifest: Descriptor| {
        let kind = ("vnd.docker.reference.type".into(), "attestation-manifest".into());
        manifest.annotations.extend([kind]);
        manifest.platform =
            Some(Platform { os: "unknown".into(), ..Platform::new("linux", "unknown", None) });
        manifest
    };
    let index = |manifests: [&Descriptor; 2]| {
        let index = serde_json::json!({
            "schemaVersion": 2, "mediaType": MediaType::OCI_INDEX.as_str(), "manifests": manifests,
        });
        store.put(MediaType::OCI_INDEX, &serde_json::to_vec(&index).unwrap()).unwrap()
    };
    let here = said(harness::manifest(&store, &empty, &[&statement]));
    let lost = Descriptor::new(MediaType::OCI_MANIFEST, Digest::of(b"never fetched"), 13);
    for (index, fine) in [
        (index([&image, &here]), true),
        (index([&image, &said(lost.clone())]), true),
        (index([&lost, &here]), false),
    ] {
        let (_folder, elsewhere) = harness::store();
        let loaded = load(&elsewhere, save(&store, &[NAME], &index));
        assert_eq!(loaded.is_ok(), fine, "{loaded:?}");
        if fine {
            let unknown =
                Platform { os: "unknown".into(), ..Platform::new("linux", "unknown", None) };
            assert!(elsewhere.select(&index, &unknown).unwrap().is_none());
            assert_eq!(elsewhere.platforms(&index).unwrap().len(), 1);
        }
    }
}

#[test]
fn indexes_that_name_the_same_one_over_and_over_take_no_time() {
    let (_folder, store) = harness::store();
    let (_, mut target) = harness::image(&store, NAME, &[("f", "text")]);
    for _ in 0..4 {
        let index = serde_json::json!({
            "schemaVersion": 2, "mediaType": MediaType::OCI_INDEX.as_str(), "manifests": vec![&target; 5000],
        });
        target = store.put(MediaType::OCI_INDEX, &serde_json::to_vec(&index).unwrap()).unwrap();
    }
    let began = Instant::now();
    assert_eq!(store.platforms(&target).unwrap().len(), 1);
    assert!(store.closure(&target).unwrap().missing.is_empty());
    assert!(began.elapsed() < Duration::from_secs(20));
}
