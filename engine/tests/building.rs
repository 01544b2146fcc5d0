//! Whole builds through the engine, without a process being run.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use slipway_engine::exporter::{FileOptions, ImageOptions, OutputSink};
use slipway_engine::solver::Cause;
use slipway_engine::solver::emulation::EmulationOptions;
use slipway_engine::solver::executor::HelperCommand;
use slipway_engine::{BuildError, BuildRequest, BuildResult, Engine, EngineOptions, Export};
use slipway_spec::progress::{ProgressEvent, ProgressSink};
use slipway_spec::{Digest, ImageConfig, Platform};

#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<ProgressEvent>>);

impl ProgressSink for Recorder {
    fn send(&self, event: ProgressEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Recorder {
    /// Checks that each vertex ended exactly once, and returns name and end in the order of the ends.
    fn ends(&self) -> Vec<(String, &'static str)> {
        let mut open: BTreeMap<Digest, String> = BTreeMap::new();
        let mut ends: Vec<(Digest, String, &'static str)> = vec![];
        for event in self.0.lock().unwrap().iter() {
            let (vertex, how) = match event {
                ProgressEvent::Started { vertex, name } => {
                    assert!(ends.iter().all(|(ended, ..)| ended != vertex), "{name} started again");
                    assert!(
                        open.insert(vertex.clone(), name.to_string()).is_none(),
                        "{name} started twice"
                    );
                    continue;
                }
                ProgressEvent::Cached { vertex, name } => {
                    ends.push((vertex.clone(), name.to_string(), "cached"));
                    continue;
                }
                ProgressEvent::Done { vertex } => (vertex, "done"),
                ProgressEvent::Failed { vertex, .. } => (vertex, "failed"),
                ProgressEvent::Canceled { vertex } => (vertex, "canceled"),
                _ => continue,
            };
            ends.push((
                vertex.clone(),
                open.remove(vertex).expect("a vertex ends once, after it began"),
                how,
            ));
        }
        assert!(open.is_empty(), "{open:?} did not end");
        ends.into_iter().map(|(_, name, how)| (name, how)).collect()
    }
}

struct Room {
    folder: tempfile::TempDir,
}

impl Room {
    fn new(dockerfile: &str) -> Self {
        let room = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(room.context()).unwrap();
        room.put("Dockerfile", dockerfile);
        room
    }

    fn context(&self) -> PathBuf {
        self.folder.path().join("context")
    }

    fn put(&self, path: &str, text: &str) {
        fs::write(self.context().join(path), text).unwrap();
    }

    fn engine(&self) -> Engine {
        let mut options = EngineOptions::new(self.folder.path().join("state"));
        let nowhere = self.folder.path().join("nowhere");
        // Not this program: it is a test, and would run all tests once more in the place of a step.
        options.sandbox.helper = HelperCommand { program: "/bin/false".into() };
        options.sandbox.emulation =
            EmulationOptions { search: vec![], host_table: nowhere, private: true };
        Engine::open(options).unwrap()
    }

    async fn build(
        &self,
        attrs: &[(&str, &str)],
        exports: Vec<Export>,
    ) -> (Result<BuildResult, BuildError>, Vec<(String, &'static str)>) {
        let request = BuildRequest {
            attrs: attrs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            folders: ["context", "dockerfile"].map(|name| (name.to_owned(), self.context())).into(),
            exports,
            ..BuildRequest::default()
        };
        let progress = Arc::new(Recorder::default());
        let result = self.engine().build(request, progress.clone()).await;
        (result, progress.ends())
    }
}

fn image(attrs: &[(&str, &str)]) -> Export {
    let attrs = attrs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Export::Image(ImageOptions::parse(&attrs).unwrap())
}

const SIMPLE: &str = "FROM scratch\nENV A=b\nCOPY --chown=1:2 a /a\nCMD [\"/a\"]\n";

#[tokio::test]
async fn a_dockerfile_becomes_a_named_image() {
    let room = Room::new(SIMPLE);
    room.put("a", "one");
    let names = [("name", "app,localhost:5000/other:2")];
    let (result, ends) = room.build(&[], vec![image(&names)]).await;
    let result = result.unwrap();
    assert_eq!(result.names, ["docker.io/library/app:latest", "localhost:5000/other:2"]);
    assert!(ends.iter().all(|(_, how)| *how == "done"), "{ends:?}");
    let store = room.engine().store().clone();
    let target = result.image.clone().unwrap();
    for name in &result.names {
        assert_eq!(store.image(name).unwrap().unwrap().target.digest, target.digest);
    }
    let bytes = store.read_blob(&result.config.as_ref().unwrap().digest, 1 << 20).unwrap();
    let config: ImageConfig = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(config.config.cmd, Some(vec!["/a".to_owned()]));
    assert!(config.config.env.contains(&"A=b".to_owned()));
    assert_eq!(config.rootfs.diff_ids.len(), 1);
    let history: Vec<_> =
        config.history.iter().map(|h| (h.created_by.as_deref().unwrap(), h.empty_layer)).collect();
    assert_eq!(
        history,
        [("ENV A=b", true), ("COPY --chown=1:2 a /a # buildkit", false), ("CMD [\"/a\"]", true)]
    );
    assert!(config.history.iter().all(|entry| entry.created.is_some()));
    // The same again is the same image, times included.
    let (again, ends) = room.build(&[], vec![image(&names)]).await;
    assert_eq!(again.unwrap().image, Some(target.clone()));
    assert!(ends.contains(&("[1/1] COPY --chown=1:2 a /a".into(), "cached")), "{ends:?}");
    // Other content is another image.
    room.put("a", "two");
    let (changed, _) = room.build(&[], vec![image(&names)]).await;
    assert_ne!(changed.unwrap().image.unwrap().digest, target.digest);
}

#[tokio::test]
async fn an_epoch_makes_images_equal_everywhere() {
    let mut digests = vec![];
    for _ in 0..2 {
        let room = Room::new(SIMPLE);
        room.put("a", "one");
        let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000);
        fs::File::options()
            .append(true)
            .open(room.context().join("a"))
            .unwrap()
            .set_modified(time)
            .unwrap();
        let (result, _) =
            room.build(&[("build-arg:SOURCE_DATE_EPOCH", "5")], vec![image(&[])]).await;
        digests.push(result.unwrap().image.unwrap().digest);
    }
    assert_eq!(digests[0], digests[1]);
    let room = Room::new(SIMPLE);
    let (result, _) = room.build(&[("build-arg:SOURCE_DATE_EPOCH", "soon")], vec![]).await;
    assert!(result.unwrap_err().to_string().contains("soon"));
}

#[tokio::test]
async fn several_platforms_become_an_index() {
    let room = Room::new(SIMPLE);
    room.put("a", "one");
    let attrs = [("platform", "linux/amd64,linux/arm64")];
    let (result, ends) = room.build(&attrs, vec![image(&[("name", "app")])]).await;
    let target = result.unwrap().image.unwrap();
    assert!(target.media_type.is_index());
    let store = room.engine().store().clone();
    let platforms: Vec<String> = store
        .platforms(&target)
        .unwrap()
        .into_iter()
        .map(|found| found.platform.to_string())
        .collect();
    assert_eq!(platforms, ["linux/amd64", "linux/arm64"]);
    assert!(ends.iter().any(|(name, _)| name == "exporting to image"), "{ends:?}");
    let out = room.folder.path().join("out");
    let local = || Export::Local { folder: out.clone(), options: FileOptions::default() };
    room.build(&attrs, vec![local(), local()]).await.0.unwrap();
    assert_eq!(fs::read_to_string(out.join("linux_arm64/a")).unwrap(), "one");
}

#[derive(Debug)]
struct Memory(Vec<u8>, Arc<Mutex<Vec<u8>>>);

impl OutputSink for Memory {
    fn destination(&self) -> String {
        "memory".into()
    }

    fn open(&mut self) -> io::Result<&mut dyn Write> {
        Ok(&mut self.0)
    }

    fn finish(self: Box<Self>) -> io::Result<()> {
        *self.1.lock().unwrap() = self.0;
        Ok(())
    }
}

#[tokio::test]
async fn archives_and_tars() {
    let room = Room::new(SIMPLE);
    room.put("a", "one");
    let out: Arc<Mutex<Vec<u8>>> = Arc::default();
    let sink = || Box::new(Memory(vec![], out.clone()));
    room.build(&[], vec![Export::Tar { options: FileOptions::default(), sink: sink() }])
        .await
        .0
        .unwrap();
    assert!(out.lock().unwrap().windows(3).any(|bytes| bytes == b"one"));
    let options = ImageOptions::default();
    let archive = |docker| Export::Archive { options: options.clone(), docker, sink: sink() };
    let (result, _) = room.build(&[], vec![archive(true)]).await;
    assert!(result.unwrap().image.is_some());
    let marker = b"manifest.json";
    assert!(out.lock().unwrap().windows(marker.len()).any(|bytes| bytes == marker));
    let (result, _) =
        room.build(&[("platform", "linux/amd64,linux/arm64")], vec![archive(true)]).await;
    assert!(result.unwrap_err().to_string().contains("manifest lists"));
}

#[tokio::test]
async fn errors_point_into_the_dockerfile() {
    let room = Room::new("FROM scratch\nENV A=b\n\nCOPY none \\\n  /x\n");
    let (result, ends) = room.build(&[], vec![]).await;
    let error = result.unwrap_err();
    assert!(error.to_string().contains("\"/none\": not found"), "{error}");
    let excerpt = error.excerpt().unwrap();
    assert_eq!((excerpt.file.as_str(), excerpt.first, excerpt.last), ("Dockerfile", 4, 5));
    assert!(excerpt.text.starts_with("FROM scratch"));
    assert!(ends.contains(&("[1/1] COPY none   /x".into(), "failed")), "{ends:?}");
    let room = Room::new("FROM scratch\nFRUIT apple\n");
    let error = room.build(&[], vec![]).await.0.unwrap_err();
    assert!(matches!(error, BuildError::Frontend(_)));
    assert!(!error.diagnostics().is_empty());
    let room = Room::new("FROM scratch\n");
    fs::remove_file(room.context().join("Dockerfile")).unwrap();
    let error = room.build(&[], vec![]).await.0.unwrap_err();
    assert!(error.to_string().contains("Dockerfile"), "{error}");
    fs::create_dir(room.context().join("Dockerfile")).unwrap();
    let error = room.build(&[], vec![]).await.0.unwrap_err();
    assert!(error.to_string().contains("is not a file"), "{error}");
}

#[tokio::test]
async fn a_base_that_cannot_be_had_is_asked_for_once() {
    let room =
        Room::new("FROM 127.0.0.1:9/none AS a\nFROM 127.0.0.1:9/none\nCOPY --from=a /x /x\n");
    let (result, ends) = room.build(&[], vec![]).await;
    let error = result.unwrap_err();
    assert!(error.to_string().contains("127.0.0.1:9"), "{error}");
    let asked: Vec<_> = ends.iter().filter(|(name, _)| name.contains("load metadata")).collect();
    assert_eq!(asked.len(), 1, "{ends:?}");
    assert_eq!(asked[0].1, "failed");
}

#[tokio::test]
async fn a_platform_without_an_emulator_says_so() {
    let foreign =
        if Platform::host().architecture == "s390x" { "linux/amd64" } else { "linux/s390x" };
    let room = Room::new("FROM scratch\nCOPY a /a\nRUN [\"/a\"]\n");
    room.put("a", "one");
    let (result, ends) = room.build(&[("platform", foreign)], vec![]).await;
    let error = result.unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("cannot run {foreign} programs here")), "{text}");
    let BuildError::Solve(error) = error else { panic!("{error}") };
    assert!(matches!(*error.cause, Cause::Start { .. }));
    assert!(ends.iter().any(|(name, how)| name.contains("RUN") && *how == "failed"), "{ends:?}");
}
