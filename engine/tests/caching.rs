//! Caches in folders: written by one store, read by another that knows nothing.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use slipway_engine::cache::{CacheEntry, CacheExport, parse_exports};
use slipway_engine::exporter::{FileOptions, ImageOptions};
use slipway_engine::solver::emulation::EmulationOptions;
use slipway_engine::solver::executor::HelperCommand;
use slipway_engine::{BuildError, BuildRequest, BuildResult, Engine, EngineOptions, Export};
use slipway_spec::cache_config::{CacheConfig, DIFF_ID_ANNOTATION};
use slipway_spec::progress::{ProgressEvent, ProgressSink};
use slipway_spec::{Descriptor, Digest, Index, Manifest};

#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<ProgressEvent>>);

impl ProgressSink for Recorder {
    fn send(&self, event: ProgressEvent) {
        self.0.lock().unwrap().push(event);
    }
}

/// What a build told: how each vertex ended at last, and warnings.
struct Told {
    ends: BTreeMap<String, String>,
    warnings: Vec<String>,
}

impl Recorder {
    fn told(&self) -> Told {
        let mut names: BTreeMap<Digest, String> = BTreeMap::new();
        let mut told = Told { ends: BTreeMap::new(), warnings: vec![] };
        for event in self.0.lock().unwrap().iter() {
            let (vertex, how) = match event {
                ProgressEvent::Started { vertex, name } => {
                    names.insert(vertex.clone(), name.to_string());
                    continue;
                }
                ProgressEvent::Cached { vertex, name } => {
                    names.insert(vertex.clone(), name.to_string());
                    (vertex, "cached".to_owned())
                }
                ProgressEvent::Warning { warning } => {
                    told.warnings.push(warning.short.clone());
                    continue;
                }
                ProgressEvent::Done { vertex } => (vertex, "done".to_owned()),
                ProgressEvent::Failed { vertex, error } => (vertex, format!("failed: {error}")),
                ProgressEvent::Canceled { vertex } => (vertex, "canceled".to_owned()),
                _ => continue,
            };
            told.ends.insert(names[vertex].clone(), how);
        }
        told
    }
}

impl Told {
    fn end(&self, part: &str) -> &str {
        let mut found = self.ends.iter().filter(|(name, _)| name.contains(part));
        let Some((_, how)) = found.next() else {
            panic!("nothing is called {part}: {:?}", self.ends)
        };
        how
    }
}

/// A context, a folder for a cache, and any number of stores.
struct Room {
    folder: tempfile::TempDir,
}

const STAGES: &str = "FROM scratch AS one\nCOPY a /a\nFROM scratch AS two\nCOPY --from=one /a /b\n\
                      FROM scratch\nCOPY --from=two /b /c\nCOPY d /d\n";

impl Room {
    fn new(dockerfile: &str) -> Self {
        let room = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(room.path("context")).unwrap();
        fs::write(room.path("context/Dockerfile"), dockerfile).unwrap();
        fs::write(room.path("context/a"), "the content of a").unwrap();
        fs::write(room.path("context/d"), "the content of d").unwrap();
        room
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn export(&self, options: &str) -> Vec<CacheExport> {
        let mut attrs = BTreeMap::from([("dest".to_owned(), self.text("cache"))]);
        let options = options.split(',').filter_map(|pair| pair.split_once('='));
        attrs.extend(options.map(|(key, value)| (key.to_owned(), value.to_owned())));
        parse_exports(&[CacheEntry { kind: "local".into(), attrs }]).unwrap()
    }

    async fn build(
        &self,
        store: &str,
        attrs: &[(&str, &str)],
        import: bool,
        cache_exports: Vec<CacheExport>,
        exports: Vec<Export>,
    ) -> (Result<BuildResult, BuildError>, Told) {
        let mut options = EngineOptions::new(self.path(store));
        options.sandbox.helper = HelperCommand { program: "/bin/false".into() };
        options.sandbox.emulation =
            EmulationOptions { search: vec![], host_table: self.path("nowhere"), private: true };
        let mut attrs: BTreeMap<String, String> =
            attrs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        if import {
            let list = serde_json::json!([{"Type": "local", "Attrs": {"src": self.text("cache")}}]);
            attrs.insert("cache-imports".into(), list.to_string());
        }
        let context = self.path("context");
        let request = BuildRequest {
            attrs,
            folders: ["context", "dockerfile"].map(|n| (n.to_owned(), context.clone())).into(),
            exports,
            cache_exports,
            ..BuildRequest::default()
        };
        let progress = Arc::new(Recorder::default());
        let result = Engine::open(options).unwrap().build(request, progress.clone()).await;
        (result, progress.told())
    }

    fn cache_blob(&self, digest: &Digest) -> PathBuf {
        self.path("cache/blobs/sha256").join(digest.hex())
    }

    fn cache_manifest(&self) -> (Descriptor, Manifest) {
        let index = fs::read(self.path("cache/index.json")).unwrap();
        let index: Index = serde_json::from_slice(&index).unwrap();
        let entry = index.manifests[0].clone();
        let bytes = fs::read(self.cache_blob(&entry.digest)).unwrap();
        (entry, serde_json::from_slice(&bytes).unwrap())
    }

    fn write_blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        fs::write(self.cache_blob(&digest), bytes).unwrap();
        digest
    }

    /// Puts another manifest in the place of the cache's.
    fn replace_manifest(&self, bytes: &[u8]) {
        let digest = self.write_blob(bytes);
        let path = self.path("cache/index.json");
        let mut index: Index = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        index.manifests[0].digest = digest;
        index.manifests[0].size = bytes.len() as u64;
        fs::write(path, serde_json::to_vec(&index).unwrap()).unwrap();
    }

    fn replace_document(&self, config: &[u8]) {
        let (_, mut manifest) = self.cache_manifest();
        manifest.config.digest = self.write_blob(config);
        manifest.config.size = config.len() as u64;
        self.replace_manifest(&serde_json::to_vec(&manifest).unwrap());
    }
}

fn image() -> Vec<Export> {
    vec![Export::Image(
        ImageOptions::parse(&[("name".to_owned(), "app".to_owned())].into()).unwrap(),
    )]
}

fn files(folder: &Path) -> Vec<Export> {
    vec![Export::Local { folder: folder.to_path_buf(), options: FileOptions::default() }]
}

fn copied(told: &Told) -> Vec<&str> {
    ["COPY a /a", "COPY --from=one", "COPY --from=two", "COPY d"]
        .map(|step| told.end(step))
        .to_vec()
}

#[tokio::test]
async fn a_store_that_knows_nothing_makes_the_same_image_without_a_step() {
    for options in [
        "mode=min",
        "mode=max",
        "mode=max,image-manifest=false",
        "mode=max,oci-mediatypes=false",
        "mode=max,compression=zstd",
    ] {
        let room = Room::new(STAGES);
        let (first, told) = room.build("a", &[], false, room.export(options), image()).await;
        let first = first.unwrap();
        assert_eq!(copied(&told), ["done"; 4], "{options}");
        assert_eq!(told.end("exporting cache to client directory"), "done");
        assert_eq!(first.cache.unwrap().digest, {
            let index = fs::read(room.path("cache/index.json")).unwrap();
            serde_json::from_slice::<Index>(&index).unwrap().manifests[0].digest.clone()
        });

        let (second, told) = room.build("b", &[], true, vec![], image()).await;
        assert_eq!(told.end("importing cache manifest from local:"), "done", "{options}");
        assert_eq!(copied(&told), ["cached"; 4], "{options}");
        assert_eq!(told.warnings, [""; 0]);
        if !options.contains("zstd") && !options.contains("oci-mediatypes") {
            assert_eq!(second.unwrap().image, first.image, "{options}: times are kept too");
        }
        let out = room.path("out");
        room.build("b", &[], false, vec![], files(&out)).await.0.unwrap();
        assert_eq!(fs::read_to_string(out.join("c")).unwrap(), "the content of a");
        assert_eq!(fs::read_to_string(out.join("d")).unwrap(), "the content of d");
    }
}

#[tokio::test]
async fn min_has_the_results_layers_alone_and_max_those_of_all_steps() {
    let room = Room::new(STAGES);
    room.build("a", &[], false, room.export("mode=min"), image()).await.0.unwrap();
    assert_eq!(room.cache_manifest().1.layers.len(), 2);
    room.build("c", &[], false, room.export("mode=max,reset=true"), image()).await.0.unwrap();
    assert_eq!(room.cache_manifest().1.layers.len(), 4);
    // What another step needs is there as well.
    fs::write(room.path("context/Dockerfile"), STAGES.replace("/b /c", "/b /e")).unwrap();
    let (built, told) = room.build("b", &[], true, vec![], image()).await;
    built.unwrap();
    assert_eq!(copied(&told), ["cached", "cached", "done", "done"]);
}

#[tokio::test]
async fn nothing_is_fetched_that_nothing_needs() {
    let room = Room::new(STAGES);
    room.build("a", &[], false, room.export("mode=max"), image()).await.0.unwrap();
    let (_, manifest) = room.cache_manifest();
    for layer in &manifest.layers {
        fs::remove_file(room.cache_blob(&layer.digest)).unwrap();
    }
    let (built, told) = room.build("b", &[], true, vec![], vec![]).await;
    built.unwrap();
    assert_eq!(copied(&told), ["cached"; 4]);
    assert_eq!(told.warnings, [""; 0], "nobody missed them");
}

#[tokio::test]
async fn a_cache_is_passed_on_without_its_layers() {
    let room = Room::new(STAGES);
    room.build("a", &[], false, room.export("mode=max"), image()).await.0.unwrap();
    let (before, _) = room.cache_manifest();
    let (built, told) = room.build("b", &[], true, room.export("mode=max"), vec![]).await;
    built.unwrap();
    assert!(!told.ends.keys().any(|name| name.contains("pulling")), "{:?}", told.ends);
    assert_eq!(room.cache_manifest().0, before, "the same results make the same cache");
}

#[tokio::test]
async fn layers_that_are_gone_or_damaged_are_made_here() {
    type Spoil = fn(&Path);
    let spoil: [(&str, Spoil); 4] = [
        ("gone", |path| fs::remove_file(path).unwrap()),
        ("short", |path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("other", |path| {
            let mut bytes = fs::read(path).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(path, bytes).unwrap();
        }),
        ("a folder", |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
    ];
    for (how, spoil) in spoil {
        let room = Room::new(STAGES);
        room.build("a", &[], false, room.export("mode=max"), image()).await.0.unwrap();
        let (_, manifest) = room.cache_manifest();
        for layer in &manifest.layers {
            let path = room.cache_blob(&layer.digest);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
            spoil(&path);
        }
        let out = room.path("out");
        let (built, told) = room.build("b", &[], true, vec![], files(&out)).await;
        built.unwrap_or_else(|error| panic!("{how}: {error}"));
        assert_eq!(fs::read_to_string(out.join("c")).unwrap(), "the content of a", "{how}");
        assert_eq!(fs::read_to_string(out.join("d")).unwrap(), "the content of d", "{how}");
        assert_eq!(told.warnings.len(), 1, "{how}: {:?}", told.warnings);
        assert!(told.warnings[0].contains("is not used any more"), "{:?}", told.warnings);
        assert!(told.end("pulling layers of the cache").starts_with("failed"), "{how}");
        assert_eq!(told.end("COPY d"), "done", "{how}");
    }
}

#[tokio::test]
async fn a_layer_that_is_another_than_was_said_is_not_used() {
    let room = Room::new(STAGES);
    room.build("a", &[], false, room.export("mode=max"), image()).await.0.unwrap();
    let (_, mut manifest) = room.cache_manifest();
    let diff_ids: Vec<String> =
        manifest.layers.iter().map(|layer| layer.annotations[DIFF_ID_ANNOTATION].clone()).collect();
    let count = diff_ids.len();
    for (at, layer) in manifest.layers.iter_mut().enumerate() {
        let other = diff_ids[(at + 1) % count].clone();
        layer.annotations.insert(DIFF_ID_ANNOTATION.into(), other);
    }
    room.replace_manifest(&serde_json::to_vec(&manifest).unwrap());
    let out = room.path("out");
    let (built, told) = room.build("b", &[], true, vec![], files(&out)).await;
    built.unwrap();
    assert_eq!(fs::read_to_string(out.join("c")).unwrap(), "the content of a");
    assert_eq!(fs::read_to_string(out.join("d")).unwrap(), "the content of d");
    assert!(told.warnings[0].contains("diff id"), "{:?}", told.warnings);
}

#[tokio::test]
async fn a_document_that_makes_no_sense_is_no_reason_to_fail() {
    type Change = fn(&Room);
    let change: [(&str, Change); 9] = [
        ("no folder", |room| fs::remove_dir_all(room.path("cache")).unwrap()),
        ("no index", |room| fs::remove_file(room.path("cache/index.json")).unwrap()),
        ("an index of something", |room| fs::write(room.path("cache/index.json"), "[1]").unwrap()),
        ("no manifest", |room| {
            fs::remove_file(room.cache_blob(&room.cache_manifest().0.digest)).unwrap();
        }),
        ("another manifest", |room| {
            let path = room.cache_blob(&room.cache_manifest().0.digest);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
            fs::write(path, "{\"schemaVersion\":2}").unwrap();
        }),
        ("no document", |room| {
            fs::remove_file(room.cache_blob(&room.cache_manifest().1.config.digest)).unwrap();
        }),
        ("a document of something", |room| room.replace_document(b"[[[[")),
        ("a loop", |room| {
            let (_, manifest) = room.cache_manifest();
            let bytes = fs::read(room.cache_blob(&manifest.config.digest)).unwrap();
            let mut config: CacheConfig = serde_json::from_slice(&bytes).unwrap();
            config.layers.iter_mut().for_each(|layer| layer.parent = 0);
            room.replace_document(&serde_json::to_vec(&config).unwrap());
        }),
        ("a size that is not true", |room| {
            let (_, mut manifest) = room.cache_manifest();
            manifest.config.size = 1 << 40;
            room.replace_manifest(&serde_json::to_vec(&manifest).unwrap());
        }),
    ];
    for (what, change) in change {
        let room = Room::new(STAGES);
        room.build("a", &[], false, room.export("mode=max"), image()).await.0.unwrap();
        change(&room);
        let (built, told) = room.build("b", &[], true, vec![], image()).await;
        built.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(told.end("importing cache manifest").starts_with("failed: "), "{what}");
        assert_eq!(copied(&told), ["done"; 4], "{what}");
    }
}

#[tokio::test]
async fn what_cannot_be_written_fails_the_build_unless_that_was_allowed() {
    let room = Room::new(STAGES);
    fs::write(room.path("cache"), "a file").unwrap();
    let (built, told) = room.build("a", &[], false, room.export("mode=max"), image()).await;
    assert!(built.unwrap_err().to_string().contains("cache"));
    assert!(told.end("exporting cache to client directory").starts_with("failed"));
    let (built, told) =
        room.build("a", &[], false, room.export("ignore-error=true"), image()).await;
    assert_eq!(built.unwrap().cache, None);
    assert!(told.end("exporting cache to client directory").starts_with("failed"));
}

#[tokio::test]
async fn platforms_share_a_cache() {
    let room = Room::new("FROM scratch\nARG TARGETARCH\nCOPY a /$TARGETARCH\nCOPY d /d\n");
    // The same files of two platforms are one layer to a cache, with one time.
    let attrs = [("platform", "linux/amd64,linux/arm64"), ("build-arg:SOURCE_DATE_EPOCH", "5")];
    let (first, _) = room.build("a", &attrs, false, room.export("mode=max"), image()).await;
    let (second, told) = room.build("b", &attrs, true, vec![], image()).await;
    assert_eq!(second.unwrap().image, first.unwrap().image);
    assert_eq!(told.end("COPY a /amd64"), "cached");
    assert_eq!(told.end("COPY a /arm64"), "cached");
}

#[tokio::test]
async fn what_is_to_run_again_runs_whatever_a_cache_has() {
    let room = Room::new(STAGES);
    room.build("a", &[], false, room.export("mode=max"), image()).await.0.unwrap();
    let (built, told) = room.build("b", &[("no-cache", "")], true, vec![], image()).await;
    built.unwrap();
    assert_eq!(copied(&told), ["done"; 4]);
}
