//! What exports write, compared as bytes and documents.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Write};
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex};

use slipway_exporter::attestation::{
    Attestation, Content as Said, INLINE_ONLY, MakePredicate, SBOM_CORE, SPDX,
};
use slipway_exporter::files::{self, Files};
use slipway_exporter::image::response;
use slipway_exporter::{
    ExportError, FileOptions, ImageOptions, OutputSink, PlatformResult, assemble,
};
use slipway_spec::media_type::Compression;
use slipway_spec::{
    Descriptor, Digest, History, ImageConfig, Index, Manifest, MediaType, Platform,
};
use slipway_store::Store;
use slipway_store::gc::PruneOptions;
use slipway_store::layout::ArchiveImage;
use slipway_store::snapshot::Snapshot;
use slipway_store::tree::{Content, Entry, Kind, Tree};

struct Room {
    folder: tempfile::TempDir,
    store: Store,
}

impl Room {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        Self { folder, store }
    }

    fn result(&self, platform: &str, files: &[(&str, &str)]) -> PlatformResult {
        let layer = |(path, text): &(&str, &str)| {
            let content = Content::Inline(text.as_bytes().into());
            let kind = Kind::File { content, size: text.len() as u64 };
            let mut tree = Tree::default();
            tree.insert(
                path.as_bytes(),
                Entry { kind, ..Entry::directory(0o640, 1_500_000_000_000_000_000) },
            );
            self.store.adopt_tree(tree, path).unwrap()
        };
        let platform: Platform = platform.parse().unwrap();
        let entry = |text: &str, empty_layer| History {
            created_by: Some(text.into()),
            empty_layer,
            ..History::default()
        };
        let config = ImageConfig {
            os: platform.os.clone(),
            architecture: platform.architecture.clone(),
            history: vec![entry("ENV a=b", true), entry("COPY", false)],
            ..ImageConfig::default()
        };
        let snapshot = Snapshot { layers: files.iter().map(layer).collect() };
        PlatformResult {
            platform,
            snapshot,
            config,
            base_history: 0,
            inline_cache: None,
            epoch: None,
            attestations: vec![],
        }
    }

    /// Collects garbage as another process would, which uses nothing of what this one made.
    fn collect(&mut self) {
        let elsewhere = Store::open(&self.folder.path().join("elsewhere")).unwrap();
        drop(std::mem::replace(&mut self.store, elsewhere));
        self.store = Store::open(&self.folder.path().join("store")).unwrap();
        self.store.prune(&PruneOptions { all: true, ..PruneOptions::default() }).unwrap();
    }

    fn manifest(&self, target: &Descriptor) -> Manifest {
        serde_json::from_slice(&self.store.read_blob(&target.digest, 1 << 20).unwrap()).unwrap()
    }

    fn config(&self, manifest: &Manifest) -> ImageConfig {
        serde_json::from_slice(&self.store.read_blob(&manifest.config.digest, 1 << 20).unwrap())
            .unwrap()
    }
}

fn options(attrs: &[(&str, &str)]) -> ImageOptions {
    ImageOptions::parse(
        &attrs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
    )
    .unwrap()
}

const EPOCH: i64 = 1_000_000_000;

static PLAIN: FileOptions = FileOptions { split: None, attestation_prefix: String::new() };

fn plain(results: &[PlatformResult], multi_platform: bool) -> Files<'_> {
    Files { results, multi_platform, options: &PLAIN, epoch: Some(EPOCH) }
}

#[tokio::test]
async fn one_platform_gives_a_manifest() {
    let room = Room::new();
    let results = [room.result("linux/amd64", &[("a", "one"), ("b", "two")])];
    let assembled =
        assemble(&room.store, &results, false, &options(&[]), Some(EPOCH)).await.unwrap();
    assert_eq!(assembled.target.media_type, MediaType::OCI_MANIFEST);
    // Whoever is told of the image is told what it is for.
    let told = &response(&assembled, &[])["containerimage.descriptor"]["platform"];
    assert_eq!(told.to_string(), r#"{"architecture":"amd64","os":"linux"}"#);
    let manifest = room.manifest(&assembled.target);
    assert_eq!(assembled.config.as_ref(), Some(&manifest.config));
    assert_eq!(manifest.config.media_type, MediaType::OCI_CONFIG);
    let types: Vec<_> = manifest.layers.iter().map(|layer| layer.media_type.as_str()).collect();
    assert_eq!(types, ["application/vnd.oci.image.layer.v1.tar+gzip"; 2]);
    let config = room.config(&manifest);
    assert_eq!(config.rootfs.diff_ids.len(), 2);
    // One layer has no entry of the frontend's.
    let history: Vec<_> = config
        .history
        .iter()
        .map(|h| {
            (
                h.created_by.as_deref().unwrap(),
                h.empty_layer,
                h.comment.as_deref(),
                h.created.as_deref().unwrap(),
            )
        })
        .collect();
    let time = "2001-09-09T01:46:40Z";
    assert_eq!(
        history,
        [
            ("ENV a=b", true, None, time),
            ("COPY", false, None, time),
            ("b", false, Some("buildkit.exporter.image.v0"), time)
        ]
    );
    assert_eq!(config.created.as_deref(), Some(time));
    let response = response(&assembled, &["x:1".into(), "y:2".into()]);
    assert_eq!(response["containerimage.digest"], assembled.target.digest.to_string());
    assert_eq!(response["containerimage.config.digest"], manifest.config.digest.to_string());
    assert_eq!(response["image.name"], "x:1,y:2");
    assert_eq!(response["containerimage.descriptor"]["size"], assembled.target.size);
}

#[tokio::test]
async fn equal_results_give_equal_bytes() {
    let mut digests = vec![];
    for attrs in [&[][..], &[("compression", "gzip")], &[("oci-mediatypes", "true")]] {
        let room = Room::new();
        let results = [room.result("linux/amd64", &[("a", "one"), ("b", "two")])];
        let assembled =
            assemble(&room.store, &results, false, &options(attrs), Some(EPOCH)).await.unwrap();
        let again =
            assemble(&room.store, &results, false, &options(attrs), Some(EPOCH)).await.unwrap();
        assert_eq!(assembled, again);
        digests.push(assembled.target.digest);
    }
    digests.dedup();
    assert_eq!(digests.len(), 1);
}

#[tokio::test]
async fn several_platforms_give_an_index() {
    let room = Room::new();
    let results =
        [room.result("linux/amd64", &[("a", "one")]), room.result("linux/arm/v7", &[("a", "two")])];
    let attrs = [
        ("annotation-index.k", "v"),
        ("annotation.m", "w"),
        ("annotation[linux/amd64].x", "y"),
        ("annotation-manifest-descriptor[linux/arm/v7].d", "e"),
        ("annotation-index-descriptor.t", "u"),
    ];
    let assembled =
        assemble(&room.store, &results, true, &options(&attrs), Some(EPOCH)).await.unwrap();
    assert_eq!((&assembled.target.media_type, &assembled.config), (&MediaType::OCI_INDEX, &None));
    let bytes = room.store.read_blob(&assembled.target.digest, 1 << 20).unwrap();
    let index: Index = serde_json::from_slice(&bytes).unwrap();
    let platforms: Vec<_> =
        index.manifests.iter().map(|entry| entry.platform.as_ref().unwrap().to_string()).collect();
    assert_eq!(platforms, ["linux/amd64", "linux/arm/v7"]);
    assert_eq!(index.annotations, BTreeMap::from([("k".into(), "v".into())]));
    let manifest = room.manifest(&index.manifests[1]);
    assert_eq!(manifest.annotations, BTreeMap::from([("m".into(), "w".into())]));
    assert_eq!(room.manifest(&index.manifests[0]).annotations["x"], "y");
    let entries: Vec<_> = index.manifests.iter().map(|entry| entry.annotations.len()).collect();
    assert_eq!((entries, &index.manifests[1].annotations["d"]), (vec![0, 1], &"e".into()));
    assert_eq!(assembled.target.annotations, BTreeMap::from([("t".into(), "u".into())]));
    assert_eq!(room.config(&manifest).architecture, "arm");
    for (attr, why) in [
        ("annotation[linux/s390x].a", "no platform linux/s390x found in source"),
        ("annotation-index.a", "index annotations not supported for single platform export"),
    ] {
        let one = &results[..1];
        let refused = assemble(&room.store, one, false, &options(&[(attr, "b")]), None).await;
        let error = refused.unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    // One platform of a build for several is an index all the same.
    let one = assemble(&room.store, &results[..1], true, &options(&[]), Some(EPOCH)).await.unwrap();
    assert_eq!(one.target.media_type, MediaType::OCI_INDEX);
}

#[tokio::test]
async fn media_types_and_compressions() {
    let room = Room::new();
    let result = |name: &str| room.result("linux/amd64", &[(name, "text")]);
    for (name, attrs, manifest_type, layer_type) in [
        (
            "a",
            &[("oci-mediatypes", "false")][..],
            MediaType::DOCKER_MANIFEST,
            MediaType::layer(Compression::Gzip, true),
        ),
        (
            "b",
            &[("compression", "zstd")],
            MediaType::OCI_MANIFEST,
            MediaType::layer(Compression::Zstd, false),
        ),
        (
            "c",
            &[("compression", "uncompressed")],
            MediaType::OCI_MANIFEST,
            MediaType::layer(Compression::Uncompressed, false),
        ),
    ] {
        let assembled = assemble(&room.store, &[result(name)], false, &options(attrs), Some(EPOCH))
            .await
            .unwrap();
        let manifest = room.manifest(&assembled.target);
        assert_eq!(
            (&assembled.target.media_type, &manifest.layers[0].media_type),
            (&manifest_type, &layer_type)
        );
        if name == "a" {
            assert_eq!(manifest.config.media_type, MediaType::DOCKER_CONFIG);
        }
        if name == "c" {
            assert_eq!(manifest.layers[0].digest, room.config(&manifest).rootfs.diff_ids[0]);
        }
    }
    // A layer in another compression is used as it is, unless that is refused; its diff id stays.
    let results = [result("d")];
    let gzip = assemble(&room.store, &results, false, &options(&[]), Some(EPOCH)).await.unwrap();
    let zstd = [("compression", "zstd")];
    let kept = assemble(&room.store, &results, false, &options(&zstd), Some(EPOCH)).await.unwrap();
    assert_eq!(kept.target.digest, gzip.target.digest);
    let forced = [("compression", "zstd"), ("force-compression", "1")];
    let forced =
        assemble(&room.store, &results, false, &options(&forced), Some(EPOCH)).await.unwrap();
    let (kept, forced) = (room.manifest(&kept.target), room.manifest(&forced.target));
    assert_eq!(forced.layers[0].media_type, MediaType::layer(Compression::Zstd, false));
    assert_eq!(room.config(&kept).rootfs, room.config(&forced).rootfs);
}

#[derive(Debug, Default)]
struct Memory {
    written: Vec<u8>,
    finished: Arc<Mutex<Option<Vec<u8>>>>,
    broken: bool,
}

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.broken {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.written.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl OutputSink for Memory {
    fn destination(&self) -> String {
        "memory".into()
    }

    fn open(&mut self) -> io::Result<&mut dyn Write> {
        Ok(self)
    }

    fn finish(self: Box<Self>) -> io::Result<()> {
        *self.finished.lock().unwrap() = Some(self.written);
        Ok(())
    }
}

#[tokio::test]
async fn folders_keep_what_is_in_them() {
    let room = Room::new();
    let out = tempfile::tempdir().unwrap();
    fs::write(out.path().join("mine"), "mine").unwrap();
    fs::write(out.path().join("a"), "before").unwrap();
    let results = [
        room.result("linux/amd64", &[("a", "one"), ("b", "two")]),
        room.result("linux/arm64", &[("a", "three")]),
    ];
    files::local(&room.store, plain(&results[..1], false), out.path()).await.unwrap();
    let read = |path: &str| fs::read_to_string(out.path().join(path)).unwrap();
    assert_eq!((read("a"), read("b"), read("mine")), ("one".into(), "two".into(), "mine".into()));
    let time = |path: &str| fs::metadata(out.path().join(path)).unwrap().mtime();
    assert_eq!((time("a"), time("b")), (EPOCH, EPOCH));
    assert_ne!(time("mine"), EPOCH);
    files::local(&room.store, plain(&results, true), &out.path().join("new/folder")).await.unwrap();
    assert_eq!(read("new/folder/linux_amd64/a"), "one");
    assert_eq!(read("new/folder/linux_arm64/a"), "three");
    let files = plain(&results, false);
    let error = files::local(&room.store, files, &out.path().join("a")).await.unwrap_err();
    assert!(matches!(error, ExportError::Output { .. }), "{error}");
}

#[tokio::test]
async fn tars_hold_the_files_and_appear_only_when_whole() {
    let room = Room::new();
    let results = [room.result("linux/amd64", &[("a", "one"), ("b", "two")])];
    let finished = Arc::new(Mutex::new(None));
    let sink = Box::new(Memory { finished: finished.clone(), ..Memory::default() });
    files::tar(&room.store, plain(&results, false), sink).await.unwrap();
    let bytes = finished.lock().unwrap().take().unwrap();
    let mut archive = tar::Archive::new(bytes.as_slice());
    let mut found = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        found.insert(
            entry.path().unwrap().display().to_string(),
            (entry.header().mode().unwrap() & 0o7777, text),
        );
        assert_eq!(entry.header().mtime().unwrap(), EPOCH as u64);
    }
    assert_eq!(found["a"], (0o640, "one".into()));
    assert_eq!(found["b"], (0o640, "two".into()));

    let both = [results[0].clone(), room.result("linux/arm/v7", &[("a", "three")])];
    let sink = Box::new(Memory { finished: finished.clone(), ..Memory::default() });
    files::tar(&room.store, plain(&both, true), sink).await.unwrap();
    let bytes = finished.lock().unwrap().take().unwrap();
    let mut archive = tar::Archive::new(bytes.as_slice());
    let names: Vec<String> = archive
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect();
    assert_eq!(
        names,
        ["linux_amd64/", "linux_amd64/a", "linux_amd64/b", "linux_arm_v7/", "linux_arm_v7/a"]
    );
    let sink = Box::new(Memory { finished: finished.clone(), broken: true, ..Memory::default() });
    let error = files::tar(&room.store, plain(&results, false), sink).await.unwrap_err();
    assert!(error.to_string().contains("memory"), "{error}");
    assert_eq!(*finished.lock().unwrap(), None);
}

#[tokio::test]
async fn archives_can_be_loaded_again() {
    let room = Room::new();
    let results = [room.result("linux/amd64", &[("a", "one")])];
    let said = options(&[("annotation-manifest-descriptor.said", "so")]);
    let assembled = assemble(&room.store, &results, false, &said, Some(EPOCH)).await.unwrap();
    let finished = Arc::new(Mutex::new(None));
    let image = |target| ArchiveImage { names: vec!["docker.io/library/app:1".into()], target };
    let sink = Box::new(Memory { finished: finished.clone(), ..Memory::default() });
    let platform = Platform::host();
    files::archive(&room.store, vec![image(assembled.target.clone())], &platform, sink)
        .await
        .unwrap();
    let bytes = finished.lock().unwrap().take().unwrap();
    let mut archive = tar::Archive::new(bytes.as_slice());
    let mut index = String::new();
    let names: Vec<String> = archive
        .entries()
        .unwrap()
        .map(|entry| {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            if name == "index.json" {
                entry.read_to_string(&mut index).unwrap();
            }
            name
        })
        .collect();
    let index: Index = serde_json::from_str(&index).unwrap();
    assert_eq!(index.manifests[0].annotations["said"], "so");
    assert!(
        names.contains(&"oci-layout".into()) && names.contains(&"index.json".into()),
        "{names:?}"
    );
    assert!(
        names.contains(&format!("blobs/sha256/{}", assembled.target.digest.hex())),
        "{names:?}"
    );
    let mut lost = assembled.target;
    lost.digest = Digest::of(b"nothing");
    let sink = Box::new(Memory { finished: finished.clone(), ..Memory::default() });
    assert!(files::archive(&room.store, vec![image(lost)], &platform, sink).await.is_err());
    assert_eq!(*finished.lock().unwrap(), None);
}

#[test]
fn options_that_contradict_each_other() {
    let parse = |attrs: &[(&str, &str)]| {
        let attrs =
            attrs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        ImageOptions::parse(&attrs).map(drop).map_err(|error| error.to_string())
    };
    for (attrs, expected) in [
        (&[("push", "yes")][..], "output option push: \"yes\" is neither true nor false"),
        (
            &[("compression", "estargz")],
            "output option compression=estargz: this compression is not supported yet",
        ),
        (
            &[("compression", "xz")],
            "output option compression=xz: expected uncompressed, gzip or zstd",
        ),
        (
            &[("compression-level", "high")],
            "output option compression-level=high: expected a number",
        ),
        (
            &[("compression", "zstd"), ("compression-level", "23")],
            "output option compression-level=23: zstd takes 0 to 22",
        ),
        (&[("compression-level", "-1")], "output option compression-level=-1: gzip takes 0 to 9"),
        (
            &[("push-by-digest", "1")],
            "an image without a name cannot be pushed: name it with --tag",
        ),
        (
            &[("push-by-digest", "1"), ("name", "a:1")],
            "push-by-digest cannot be combined with a tag",
        ),
        (&[("oci-mediatypes", "0"), ("annotation.a", "b")], "annotations need oci-mediatypes=true"),
        (
            &[("oci-mediatypes", "0"), ("annotation-index.a", "b")],
            "annotations need oci-mediatypes=true",
        ),
        (&[("colour", "blue")], "output option colour=blue: this option is not supported yet"),
    ] {
        assert_eq!(parse(attrs), Err(expected.into()), "{attrs:?}");
    }
    for good in [
        &[("name", "a:1,,b"), ("push", "T")][..],
        &[("push-by-digest", ""), ("name", "a")],
        &[("store", "true"), ("unpack", "false"), ("tar", "1"), ("buildinfo-attrs", "x")],
        &[("compression-level", "0")],
    ] {
        assert_eq!(parse(good), Ok(()), "{good:?}");
    }
}

#[derive(Debug)]
struct Says(&'static str);

impl MakePredicate for Says {
    fn make(&self, _store: &Store) -> slipway_exporter::Result<Vec<u8>> {
        Ok(self.0.into())
    }
}

fn said(predicate: &'static str, kind: &str, metadata: &[(&str, &'static str)]) -> Attestation {
    Attestation {
        content: Said::Made(Arc::new(Says(predicate))),
        predicate_type: kind.into(),
        subjects: vec![],
        path: "said.json".into(),
        metadata: metadata
            .iter()
            .map(|(key, value)| ((*key).to_owned(), value.as_bytes().into()))
            .collect(),
    }
}

const TYPE: &str = "https://example.com/type";
const BILL: &str = r#"{"spdxVersion":"SPDX-2.3","files":[{"fileName":"/a"},{"fileName":"/b"}]}"#;

/// Two platforms, of which one is spoken about.
fn spoken(room: &Room) -> [PlatformResult; 2] {
    let mut results = [
        room.result("linux/amd64", &[("a", "one"), ("b", "two")]),
        room.result("linux/arm/v7", &[("a", "three")]),
    ];
    results[0].attestations = vec![said("{}", TYPE, &[]), said(BILL, SPDX, &[(SBOM_CORE, "said")])];
    results
}

fn json(room: &Room, target: &Descriptor) -> serde_json::Value {
    serde_json::from_slice(&room.store.read_blob(&target.digest, 1 << 20).unwrap()).unwrap()
}

#[tokio::test]
async fn what_is_said_stands_beside_the_images() {
    let room = Room::new();
    let results = spoken(&room);
    let attrs = [("name", "app:1,localhost:5000/x/app:2")];
    let options = options(&attrs);
    let assembled = assemble(&room.store, &results, true, &options, Some(EPOCH)).await.unwrap();
    let written: Vec<&str> = assembled.written.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(
        written,
        ["manifest", "config", "attestation manifest", "manifest", "config", "manifest list"]
    );
    let index: Index = serde_json::from_value(json(&room, &assembled.target)).unwrap();
    let [amd64, arm, attestation] = index.manifests.as_slice() else { panic!("{index:?}") };
    assert_eq!(attestation.platform.as_ref().unwrap().to_string(), "unknown/unknown");
    assert_eq!(assembled.written[2].1, attestation.digest);
    assert_eq!(
        attestation.annotations,
        BTreeMap::from([
            ("vnd.docker.reference.digest".into(), amd64.digest.to_string()),
            ("vnd.docker.reference.type".into(), "attestation-manifest".into()),
        ])
    );
    let manifest = room.manifest(attestation);
    assert_eq!(manifest.subject.as_ref().unwrap().digest, amd64.digest);
    assert!(manifest.artifact_type.is_some());
    // What the image itself is made of comes first, and learned where its files are.
    let layers = room.manifest(amd64).layers;
    let statement = json(&room, &manifest.layers[0]);
    let (first, second) = (layers[0].digest.to_string(), layers[1].digest.to_string());
    let files = &statement["predicate"]["files"];
    assert_eq!(files[0]["comment"], format!("layerID: {first}"));
    assert_eq!(files[1]["comment"], format!("layerID: {second}"));
    let statement = json(&room, &manifest.layers[1]);
    let hex = amd64.digest.hex();
    assert_eq!(
        statement,
        serde_json::json!({
            "_type": "https://in-toto.io/Statement/v1",
            "predicateType": TYPE,
            "subject": [
                { "name": "pkg:docker/app@1?platform=linux%2Famd64", "digest": { "sha256": hex } },
                {
                    "name": "pkg:docker/localhost%3A5000/x/app@2?platform=linux%2Famd64",
                    "digest": { "sha256": hex }
                },
            ],
            "predicate": {},
        })
    );
    // It is part of the image for whoever copies it, and nothing that runs.
    let closure = room.store.closure(&assembled.target).unwrap();
    assert!(closure.missing.is_empty());
    let held: Vec<_> = closure.blobs.iter().chain(&closure.documents).map(|d| &d.digest).collect();
    for one in manifest.layers.iter().chain([&manifest.config, attestation]) {
        assert!(held.contains(&&one.digest), "{}", one.digest);
    }
    let unknown =
        Platform { os: "unknown".into(), architecture: "unknown".into(), ..amd64_platform() };
    assert!(room.store.select(&assembled.target, &unknown).unwrap().is_none());
    let platforms = room.store.platforms(&assembled.target).unwrap();
    let platforms: Vec<_> = platforms.iter().map(|one| &one.descriptor.digest).collect();
    assert_eq!(platforms, [&amd64.digest, &arm.digest]);
}

fn amd64_platform() -> Platform {
    "linux/amd64".parse().unwrap()
}

#[tokio::test]
async fn what_is_said_makes_an_index_where_it_counts() {
    let room = Room::new();
    let mut result = room.result("linux/amd64", &[("a", "one")]);
    let inline = said("{}", TYPE, &[(INLINE_ONLY, "true")]);
    for (attestations, attrs, entries) in [
        (vec![], &[][..], None),
        (vec![inline.clone()], &[], Some(2)),
        (vec![inline.clone()], &[("attestation-inline", "false")], None),
        (vec![said("{}", TYPE, &[])], &[("attestation-inline", "false")], Some(2)),
        (vec![inline.clone()], &[("attestation-inline", "false"), ("oci-mediatypes", "0")], None),
    ] {
        result.attestations = attestations;
        let assembled =
            assemble(&room.store, &[result.clone()], false, &options(attrs), Some(EPOCH)).await;
        let assembled = assembled.unwrap();
        let found =
            assembled.target.media_type.is_index().then(|| {
                json(&room, &assembled.target)["manifests"].as_array().map_or(0, Vec::len)
            });
        assert_eq!(found, entries, "{attrs:?}");
    }
    result.attestations = vec![inline];
    let docker = options(&[("oci-mediatypes", "false")]);
    let error = assemble(&room.store, &[result.clone()], false, &docker, None).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot export attestations with \"oci-mediatypes=false\"");
    let legacy = options(&[("oci-artifact", "false")]);
    let assembled = assemble(&room.store, &[result], false, &legacy, None).await.unwrap();
    let index: Index = serde_json::from_value(json(&room, &assembled.target)).unwrap();
    let manifest = room.manifest(&index.manifests[1]);
    assert_eq!((manifest.subject.as_ref(), manifest.artifact_type.as_ref()), (None, None));
    assert_eq!(room.config(&manifest).rootfs.diff_ids, [manifest.layers[0].digest.clone()]);
}

#[tokio::test]
async fn what_is_said_outlives_a_collection_and_goes_with_the_image() {
    for artifact in ["true", "false"] {
        let mut room = Room::new();
        let options = options(&[("oci-artifact", artifact)]);
        let results = spoken(&room);
        let assembled = assemble(&room.store, &results, true, &options, Some(EPOCH)).await.unwrap();
        let target = assembled.target;
        let name = "docker.io/library/app:1".to_owned();
        room.store.name_image(std::slice::from_ref(&name), &target).unwrap();
        room.collect();
        let closure = room.store.closure(&target).unwrap();
        assert!(closure.missing.is_empty(), "{:?}", closure.missing);

        // Copies carry it along: the archive is loaded where nothing is known.
        let finished = Arc::new(Mutex::new(None));
        let sink = Box::new(Memory { finished: finished.clone(), ..Memory::default() });
        let image = ArchiveImage { names: vec![name.clone()], target: target.clone() };
        files::archive(&room.store, vec![image], &Platform::host(), sink).await.unwrap();
        let bytes = finished.lock().unwrap().take().unwrap();
        let mut other = Room::new();
        let loaded = other.store.load(Box::new(io::Cursor::new(bytes))).unwrap();
        assert_eq!(loaded[0].target.digest, target.digest);
        other.collect();
        assert!(other.store.closure(&target).unwrap().missing.is_empty());
        let found = other.store.select(&target, &amd64_platform()).unwrap().unwrap();
        assert_eq!(found.platform, amd64_platform());

        let digests: Vec<Digest> =
            closure.blobs.into_iter().chain(closure.documents).map(|one| one.digest).collect();
        room.store.remove_images(&[name]).unwrap();
        room.collect();
        for digest in digests {
            assert!(!room.store.has_blob(&digest).unwrap(), "{digest}");
        }
    }
}

#[tokio::test]
async fn statements_lie_beside_files() {
    let room = Room::new();
    let mut results = spoken(&room);
    results[0].attestations.truncate(1);
    results[0].attestations.push(said("{}", TYPE, &[(INLINE_ONLY, "true")]));
    results[1].attestations = results[0].attestations.clone();
    let out = tempfile::tempdir().unwrap();
    // Neither what is there nor what it points at decides where a statement goes.
    let outside = out.path().join("outside");
    fs::write(&outside, "mine").unwrap();
    fs::create_dir(out.path().join("one")).unwrap();
    std::os::unix::fs::symlink(&outside, out.path().join("one/x-said.json")).unwrap();

    let prefix = |split| FileOptions { split, attestation_prefix: "x-".into() };
    let options = prefix(None);
    let files = Files { options: &options, ..plain(&results[..1], false) };
    files::local(&room.store, files, &out.path().join("one")).await.unwrap();
    let read = |path: &str| -> serde_json::Value {
        serde_json::from_slice(&fs::read(out.path().join(path)).unwrap()).unwrap()
    };
    let statement = read("one/x-said.json");
    assert_eq!(statement["predicateType"], TYPE);
    let subjects: Vec<_> =
        statement["subject"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!(subjects, ["a", "b"]);
    assert_eq!(fs::read_to_string(&outside).unwrap(), "mine");
    let metadata = fs::symlink_metadata(out.path().join("one/x-said.json")).unwrap();
    use std::os::unix::fs::MetadataExt as _;
    assert!(metadata.is_file());
    assert_eq!((metadata.mode() & 0o7777, metadata.mtime()), (0o600, EPOCH));
    assert_eq!(fs::read_dir(out.path().join("one")).unwrap().count(), 3);

    let files = Files { options: &options, ..plain(&results, true) };
    files::local(&room.store, files, &out.path().join("split")).await.unwrap();
    assert_eq!(read("split/linux_amd64/x-said.json")["subject"][1]["name"], "b");
    assert_eq!(read("split/linux_arm_v7/x-said.json")["subject"][0]["name"], "a");
    let options = prefix(Some(false));
    let files = Files { options: &options, ..plain(&results, true) };
    files::local(&room.store, files, &out.path().join("shared")).await.unwrap();
    assert_eq!(read("shared/x-said.linux_amd64.json")["subject"][1]["name"], "b");
    assert_eq!(read("shared/x-said.linux_arm_v7.json")["subject"][0]["name"], "a");

    let finished = Arc::new(Mutex::new(None));
    let sink = Box::new(Memory { finished: finished.clone(), ..Memory::default() });
    files::tar(&room.store, plain(&results, true), sink).await.unwrap();
    let bytes = finished.lock().unwrap().take().unwrap();
    let mut archive = tar::Archive::new(bytes.as_slice());
    let mut names = vec![];
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().display().to_string();
        if path.ends_with("said.json") {
            let header = entry.header();
            assert_eq!((header.mode().unwrap(), header.mtime().unwrap()), (0o600, 1_000_000_000));
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            assert!(text.starts_with("{\n  \"_type\""), "{text}");
        }
        names.push(path);
    }
    assert_eq!(
        names,
        [
            "linux_amd64/",
            "linux_amd64/a",
            "linux_amd64/b",
            "linux_amd64/said.json",
            "linux_arm_v7/",
            "linux_arm_v7/a",
            "linux_arm_v7/said.json"
        ]
    );
}
