//! What a job executes, what it takes from before, and what it tells: with an executor that only counts.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use slipway_solver::executor::{ExecError, ExecSpec, Executor, Exit, Stdio};
use slipway_solver::source::image::Images;
use slipway_solver::{Cause, Job, LocalFolders, SolveError, Worker};
use slipway_spec::llb::{
    Copy, Definition, Exec, ExecMount, FileActions, Owner, State, VertexOptions, WhoIs, marshal, pb,
};
use slipway_spec::manifest::to_bytes;
use slipway_spec::progress::{ProgressEvent, ProgressSink};
use slipway_spec::{Digest, ImageConfig, Manifest, MediaType};
use slipway_store::Store;
use slipway_store::registry::{Anonymous, Registry, RegistryOptions};
use slipway_store::snapshot::Snapshot;
use slipway_store::tree::{Entry, Tree};

/// Understands `write path text`, `fail`, and `hang`, which ends only by being dropped.
#[derive(Debug, Default)]
struct Counting {
    runs: Mutex<Vec<String>>,
    dropped: Arc<Mutex<Vec<String>>>,
}

struct Note(Arc<Mutex<Vec<String>>>, String);

impl Drop for Note {
    fn drop(&mut self) {
        self.0.lock().unwrap().push(self.1.clone());
    }
}

#[async_trait]
impl Executor for Counting {
    async fn run(&self, spec: ExecSpec, _stdio: Stdio) -> Result<Exit, ExecError> {
        self.runs.lock().unwrap().push(spec.args.join(" "));
        let mut code = 0;
        match spec.args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            ["write", path, text, ..] => fs::write(spec.upper.join(path), text).unwrap(),
            ["fail"] => {
                // Others have begun by then.
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                code = 7;
            }
            ["hang"] => {
                let _note = Note(self.dropped.clone(), "hang".into());
                std::future::pending::<()>().await;
            }
            other => panic!("{other:?}"),
        }
        Ok(Exit { code, signal: None, created_stubs: vec![] })
    }
}

#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<ProgressEvent>>);

impl ProgressSink for Recorder {
    fn send(&self, event: ProgressEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Recorder {
    /// Checks that each vertex ended exactly once, and returns how each one did.
    fn ends(&self) -> BTreeMap<String, &'static str> {
        let mut names: HashMap<Digest, Arc<str>> = HashMap::new();
        let mut ends = BTreeMap::new();
        for event in self.0.lock().unwrap().iter() {
            let (vertex, how) = match event {
                ProgressEvent::Started { vertex, name } => {
                    assert!(
                        names.insert(vertex.clone(), name.clone()).is_none(),
                        "{name} started twice"
                    );
                    continue;
                }
                ProgressEvent::Cached { vertex, name } => {
                    names.insert(vertex.clone(), name.clone());
                    (vertex, "cached")
                }
                ProgressEvent::Done { vertex } => (vertex, "done"),
                ProgressEvent::Failed { vertex, .. } => (vertex, "failed"),
                ProgressEvent::Canceled { vertex } => (vertex, "canceled"),
                _ => continue,
            };
            let name = names.get(vertex).expect("a vertex ends after it began").to_string();
            assert!(ends.insert(name.clone(), how).is_none(), "{name} ended twice");
        }
        for name in names.values() {
            assert!(ends.contains_key(&**name), "{name} did not end");
        }
        ends
    }
}

/// A store and a context; every build opens the store anew, as another process would.
struct Room {
    folder: tempfile::TempDir,
}

struct Built {
    result: Result<Vec<Snapshot>, SolveError>,
    runs: Vec<String>,
    ends: BTreeMap<String, &'static str>,
    dropped: Vec<String>,
    store: Store,
}

impl Built {
    fn error(&self) -> &SolveError {
        self.result.as_ref().unwrap_err()
    }

    /// Reads a file of the first result.
    fn read(&self, path: &str) -> Option<String> {
        let layers = &self.result.as_ref().unwrap()[0].layers;
        let bytes = self.store.view(layers).unwrap().read(path.as_bytes(), 1000).unwrap();
        bytes.map(|bytes| String::from_utf8(bytes).unwrap())
    }

    /// Writes all layers down, as an export would.
    fn written(self) -> Self {
        for snapshot in self.result.as_ref().unwrap() {
            self.store.folders(&snapshot.layers).unwrap();
        }
        self
    }
}

impl Room {
    fn new() -> Self {
        let room = Self { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(room.context()).unwrap();
        room
    }

    fn context(&self) -> PathBuf {
        self.folder.path().join("context")
    }

    fn put(&self, path: &str, text: &str) {
        fs::write(self.context().join(path), text).unwrap();
    }

    fn store(&self) -> Store {
        Store::open(&self.folder.path().join("store")).unwrap()
    }

    /// Solves all states at once in one job.
    async fn build(&self, states: &[&State]) -> Built {
        let definitions: Vec<_> =
            states.iter().map(|state| marshal(state, None).unwrap()).collect();
        self.solve(&definitions).await
    }

    async fn solve(&self, definitions: &[Definition]) -> Built {
        let store = self.store();
        let executor = Arc::new(Counting::default());
        let registry = Registry::new(RegistryOptions::default(), Arc::new(Anonymous)).unwrap();
        let worker = Worker {
            images: Images::new(store.clone(), registry),
            store: store.clone(),
            executor: executor.clone(),
            parallel: Arc::new(tokio::sync::Semaphore::new(4)),
            shared: slipway_solver::Shared::default(),
            devices: slipway_solver::device::Devices::none(),
        };
        let client = LocalFolders::new(BTreeMap::from([("context".into(), self.context())]), None);
        let progress = Arc::new(Recorder::default());
        let job = Job::new(worker, Arc::new(client), progress.clone());
        let solved = definitions.iter().map(|definition| {
            let job = &job;
            async move { job.solve(&job.load(definition).await?).await }
        });
        let result = futures::future::try_join_all(solved).await;
        let runs = std::mem::take(&mut *executor.runs.lock().unwrap());
        let dropped = std::mem::take(&mut *executor.dropped.lock().unwrap());
        Built { result, runs, ends: progress.ends(), dropped, store }
    }
}

fn named(name: &str) -> VertexOptions {
    VertexOptions { name: name.into(), ..Default::default() }
}

fn run(base: &State, command: &str) -> State {
    run_with(base, command, vec![], false)
}

fn run_with(base: &State, command: &str, mounts: Vec<ExecMount>, ignore_cache: bool) -> State {
    let args = command.split(' ').map(ToOwned::to_owned).collect();
    let meta = pb::Meta { args, cwd: "/".into(), ..Default::default() };
    base.exec(
        Exec { meta, mounts, ..Default::default() },
        VertexOptions { ignore_cache, ..named(command) },
    )
}

fn context() -> State {
    State::local("context", BTreeMap::new(), named("context"))
}

fn copy(base: &State, from: &State, src: &str, dest: &str) -> State {
    let action = Copy {
        src: src.into(),
        dest: dest.into(),
        create_dest_path: true,
        dir_copy_contents: true,
        follow_symlink: true,
        ..Default::default()
    };
    base.file(FileActions::new().copy(from, action), named(&format!("copy {src} {dest}")))
}

#[tokio::test]
async fn only_what_follows_a_change_runs_again() {
    let room = Room::new();
    room.put("a", "one");
    room.put("other", "x");
    let graph = {
        let first = run(&State::scratch(), "write base text");
        let copied = copy(&first, &context(), "/a", "/a");
        run(&copied, "write last text")
    };
    let built = room.build(&[&graph]).await;
    assert_eq!(built.runs, ["write base text", "write last text"]);
    assert_eq!(built.read("a").as_deref(), Some("one"));
    drop(built.written());
    // Nothing changed.
    let built = room.build(&[&graph]).await;
    assert_eq!(built.runs, Vec::<String>::new());
    assert_eq!(built.ends["write last text"], "cached");
    assert_eq!(built.ends["write base text"], "cached");
    assert_eq!(built.read("a").as_deref(), Some("one"));
    drop(built);
    // Times and files that nobody reads do not count.
    let file = fs::File::options().append(true).open(room.context().join("a")).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    room.put("other", "changed");
    room.put("new", "n");
    assert_eq!(room.build(&[&graph]).await.runs, Vec::<String>::new());
    // Content does.
    room.put("a", "two");
    let built = room.build(&[&graph]).await;
    assert_eq!(built.runs, ["write last text"]);
    assert_eq!(built.ends["write base text"], "cached");
    assert_eq!(built.ends["copy /a /a"], "done");
    assert_eq!(built.read("a").as_deref(), Some("two"));
    drop(built.written());
    // And what was there before is still known.
    room.put("a", "one");
    let built = room.build(&[&graph]).await;
    assert_eq!((built.runs.len(), built.read("a").as_deref()), (0, Some("one")));
}

#[tokio::test]
async fn a_stage_that_gives_the_same_content_changes_nothing_after_it() {
    let room = Room::new();
    let graph = |command: &str| {
        let stage = run(&State::scratch(), command);
        run(
            &copy(&run(&State::scratch(), "write base b"), &stage, "/out", "/in"),
            "write last text",
        )
    };
    drop(room.build(&[&graph("write out same first")]).await.written());
    let built = room.build(&[&graph("write out same second")]).await;
    assert_eq!(built.runs, ["write out same second"]);
    assert_eq!(built.ends["write last text"], "cached");
    drop(built);
    // The new way to the same content is known from now on.
    assert_eq!(room.build(&[&graph("write out same second")]).await.runs, Vec::<String>::new());
    let built = room.build(&[&graph("write out different third")]).await;
    assert_eq!(built.runs, ["write out different third", "write last text"]);
    assert_eq!(built.read("in").as_deref(), Some("different"));
}

#[tokio::test]
async fn fresh_steps_run_again_with_all_that_follows() {
    let room = Room::new();
    let graph = |fresh: bool| {
        let base = run(&State::scratch(), "write base b");
        run(&run_with(&base, "write middle m", vec![], fresh), "write last l")
    };
    drop(room.build(&[&graph(false)]).await);
    let built = room.build(&[&graph(true)]).await;
    assert_eq!(built.runs, ["write middle m", "write last l"]);
    drop(built);
    assert_eq!(room.build(&[&graph(false)]).await.runs, Vec::<String>::new());
}

#[tokio::test]
async fn what_heads_share_runs_once() {
    let room = Room::new();
    let shared = run(&State::scratch(), "write shared s");
    let heads = [
        run(&shared, "write a a"),
        run(&shared, "write b b"),
        copy(&State::scratch(), &shared, "/shared", "/x"),
    ];
    let built = room.build(&heads.each_ref()).await;
    let mut runs = built.runs.clone();
    runs.sort();
    assert_eq!(runs, ["write a a", "write b b", "write shared s"]);
    assert!(built.ends.values().all(|end| *end == "done"), "{:?}", built.ends);
}

#[tokio::test]
async fn a_failing_step_is_named_and_ends_the_others() {
    let room = Room::new();
    let failing = run(&State::scratch(), "fail");
    let mounts = |source: &State| {
        vec![ExecMount { dest: "/m".into(), source: source.clone(), ..Default::default() }]
    };
    let hanging = run(&State::scratch(), "hang");
    let both = run_with(&failing, "write x x", mounts(&hanging), false);
    let again = run(&failing, "write y y");
    let built = room.build(&[&both, &again]).await;
    let error = built.error();
    assert_eq!(error.vertex.as_ref().unwrap().name.as_ref(), "fail");
    assert!(matches!(*error.cause, Cause::Exit { code: 7, .. }));
    let mut runs = built.runs.clone();
    runs.sort();
    assert_eq!(runs, ["fail", "hang"]);
    assert_eq!(built.dropped, ["hang"]);
    assert_eq!(
        built.ends,
        BTreeMap::from([("fail".into(), "failed"), ("hang".into(), "canceled")])
    );
    // What the failed step wrote is gone; what was given up goes when the store is closed.
    let Built { store, .. } = built;
    drop(store);
    let built = room.build(&[&failing]).await;
    assert_eq!(built.runs, ["fail"], "a failure is not remembered");
}

#[tokio::test]
async fn a_missing_source_is_shown_at_the_copy() {
    let room = Room::new();
    let built = room.build(&[&copy(&State::scratch(), &context(), "/none", "/x")]).await;
    let error = built.error();
    assert_eq!(error.to_string(), "\"/none\": not found");
    assert_eq!(error.vertex.as_ref().unwrap().name.as_ref(), "copy /none /x");
    assert_eq!(built.ends["copy /none /x"], "failed");
    let stage = run(&State::scratch(), "write out o");
    let built = room.build(&[&copy(&State::scratch(), &stage, "/none", "/x")]).await;
    assert_eq!(
        built.ends,
        BTreeMap::from([("write out o".into(), "done"), ("copy /none /x".into(), "failed")])
    );
    let nowhere = State::local("unknown", BTreeMap::new(), named("unknown"));
    let built = room.build(&[&copy(&State::scratch(), &nowhere, "/a", "/x")]).await;
    assert_eq!(built.error().vertex.as_ref().unwrap().name.as_ref(), "unknown");
    assert_eq!(built.ends, BTreeMap::from([("unknown".into(), "failed")]));
}

fn layer_folders(room: &Room) -> PathBuf {
    room.folder.path().join("store/layers")
}

fn forget_layers(room: &Room) {
    for layer in fs::read_dir(layer_folders(room)).unwrap() {
        fs::remove_dir_all(layer.unwrap().path()).unwrap();
    }
}

#[tokio::test]
async fn a_result_whose_layers_are_gone_is_made_again() {
    let room = Room::new();
    let graph = run(&run(&State::scratch(), "write a a"), "write b b");
    drop(room.build(&[&graph]).await);
    forget_layers(&room);
    let built = room.build(&[&graph]).await;
    assert_eq!(built.runs, ["write a a", "write b b"]);
    assert_eq!((built.read("a").as_deref(), built.read("b").as_deref()), (Some("a"), Some("b")));
}

#[tokio::test]
async fn a_result_that_was_never_written_is_not_claimed_by_the_next_process() {
    let room = Room::new();
    room.put("a", "one");
    let graph = copy(&State::scratch(), &context(), "/a", "/a");
    let first = room.build(&[&graph]).await;
    assert_eq!(first.ends["copy /a /a"], "done");
    drop(first);
    let second = room.build(&[&graph]).await;
    assert_eq!(second.ends["copy /a /a"], "done");
    assert_eq!(second.read("a").as_deref(), Some("one"));
    drop(second.written());
    assert_eq!(room.build(&[&graph]).await.ends["copy /a /a"], "cached");
}

/// A step may give something else when it has to run again. What is copied of it must not be kept under the name of what
/// it gave before.
#[tokio::test]
async fn content_is_not_kept_under_the_name_of_other_content() {
    let room = Room::new();
    let scratch = State::scratch();
    let graph = |stage: &State| run(&copy(&scratch, stage, "/out", "/in"), "write last l");
    let stage = run(&scratch, "write out first");
    drop(room.build(&[&graph(&stage)]).await.written());
    // The same definition, but the executor behaves differently: here by changing what the first run left.
    let store = room.store();
    forget_layers(&room);
    drop(store);
    let other = run(&scratch, "write out first again");
    // "first again" writes the same bytes; both stages are now keyed by content.
    let built = room.build(&[&graph(&other)]).await;
    assert_eq!(built.runs, ["write out first again", "write last l"]);
    assert_eq!(built.read("in").as_deref(), Some("first"));
    drop(built.written());
    for layer in fs::read_dir(layer_folders(&room)).unwrap() {
        let file = layer.unwrap().path().join("fs/out");
        if file.exists() {
            fs::write(file, "second").unwrap();
        }
    }
    // Only the copies and what follows are lost; the stage is there and reads differently now.
    for layer in fs::read_dir(layer_folders(&room)).unwrap() {
        let path = layer.unwrap().path();
        if !path.join("fs/out").exists() {
            fs::remove_dir_all(path).unwrap();
        }
    }
    let built = room.build(&[&graph(&other)]).await;
    assert_eq!(built.read("in").as_deref(), Some("second"));
    drop(built.written());
    // A third way to the first content must not find the second.
    let third = run(&scratch, "write out first thrice");
    let built = room.build(&[&graph(&third)]).await;
    assert_eq!(built.read("in").as_deref(), Some("first"));
    assert_eq!(built.runs, ["write out first thrice", "write last l"]);
}

/// Puts an image with one layer into the store and returns its digest and the layer's blob.
fn image(store: &Store) -> (Digest, Digest) {
    let mut tree = Tree::default();
    tree.insert(b"etc", Entry::directory(0o755, 0));
    let layer = store.adopt_tree(tree, "base").unwrap();
    let blob = store.ensure_blob(layer, &Default::default()).unwrap();
    let host = slipway_spec::Platform::host();
    let mut config =
        ImageConfig { os: host.os, architecture: host.architecture, ..Default::default() };
    config.rootfs.diff_ids = vec![blob.diff_id];
    let config = store.put(MediaType::OCI_CONFIG, &serde_json::to_vec(&config).unwrap()).unwrap();
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(MediaType::OCI_MANIFEST),
        artifact_type: None,
        config,
        layers: vec![blob.descriptor.clone()],
        subject: None,
        annotations: BTreeMap::new(),
    };
    let target = store.put(MediaType::OCI_MANIFEST, &to_bytes(&manifest)).unwrap();
    (target.digest, blob.descriptor.digest)
}

#[tokio::test]
async fn layers_of_a_base_are_fetched_only_when_something_runs() {
    let room = Room::new();
    let (target, blob) = image(&room.store());
    // Nobody listens there.
    let reference = format!("127.0.0.1:9/none@{target}").parse().unwrap();
    let base = State::image(&reference, BTreeMap::new(), named("base"));
    let graph = run(&base, "write a a");
    let built = room.build(&[&graph]).await;
    assert_eq!(built.runs, ["write a a"], "{:?}", built.result);
    drop(built);
    fs::remove_file(room.folder.path().join("store/content/blobs/sha256").join(blob.hex()))
        .unwrap();
    let only_blob: Vec<_> =
        fs::read_dir(layer_folders(&room)).unwrap().map(|layer| layer.unwrap().path()).collect();
    for layer in only_blob.iter().filter(|layer| layer.join("fs/etc").exists()) {
        fs::remove_dir_all(layer).unwrap();
    }
    let built = room.build(&[&graph]).await;
    assert!(built.result.is_ok());
    assert_eq!(built.runs, Vec::<String>::new());
    assert_eq!(
        built.ends,
        BTreeMap::from([("base".into(), "cached"), ("write a a".into(), "cached")])
    );
    drop(built);
    let (one, two) = (run(&base, "write b b"), run(&base, "write c c"));
    let built = room.build(&[&one, &two]).await;
    let error = built.error();
    assert!(error.to_string().contains("cannot connect to 127.0.0.1:9"), "{error:?}");
    assert!(["write b b", "write c c"].contains(&&*error.vertex.as_ref().unwrap().name));
    assert_eq!(built.runs, Vec::<String>::new());
}

#[tokio::test]
async fn a_base_from_the_client_keeps_its_content() {
    let room = Room::new();
    room.put("a", "one");
    let made = FileActions::new().mkfile("/b", 0o644, b"two".to_vec(), None, None);
    let built = room.build(&[&context().file(made, named("mkfile"))]).await;
    assert_eq!(
        (built.read("a").as_deref(), built.read("b").as_deref()),
        (Some("one"), Some("two"))
    );
}

#[tokio::test]
async fn owners_are_looked_up_in_what_is_changed() {
    let room = Room::new();
    room.put("a", "one");
    let graph = |line: &str| {
        let accounts = FileActions::new().mkdir("/etc", 0o755, None, Some(0)).mkfile(
            "/etc/passwd",
            0o644,
            line.as_bytes().to_vec(),
            None,
            Some(0),
        );
        let base = State::scratch().file(accounts, named("accounts"));
        let owner = Some(Owner { user: Some(WhoIs::Name("app".into())), group: None });
        let action = Copy { src: "/a".into(), dest: "/a".into(), owner, ..Default::default() };
        base.file(FileActions::new().copy(&context(), action), named("copy"))
    };
    for (line, expected) in
        [("app:x:5:6::/:\n", (5, 6)), ("app:x:7:8::/:\n", (7, 8)), ("app:x:5:6::/:\n", (5, 6))]
    {
        let built = room.build(&[&graph(line)]).await;
        let view = built.store.view(&built.result.as_ref().unwrap()[0].layers).unwrap();
        let entry = view.get(b"a").unwrap().unwrap();
        assert_eq!((entry.uid, entry.gid), expected);
    }
}

#[tokio::test]
async fn merges_and_diffs() {
    let room = Room::new();
    let base = run(&State::scratch(), "write base b");
    let more = run(&base, "write more m");
    let other = run(&State::scratch(), "write base other");
    let merged = State::merge(&[more.clone(), other.clone()], named("merge"));
    let built = room.build(&[&merged]).await;
    assert_eq!(
        (built.read("base").as_deref(), built.read("more").as_deref()),
        (Some("other"), Some("m"))
    );
    assert_eq!(built.ends["merge"], "done");
    drop(built);
    let built = room.build(&[&State::diff(&base, &more, named("diff"))]).await;
    assert_eq!((built.read("base"), built.read("more").as_deref()), (None, Some("m")));
    drop(built);
    let built = room.build(&[&State::diff(&other, &more, named("diff"))]).await;
    assert_eq!(
        (built.read("base").as_deref(), built.read("more").as_deref()),
        (Some("b"), Some("m"))
    );
    assert_eq!(built.ends["diff"], "done");
}

#[tokio::test]
async fn merges_cannot_exhaust_memory() {
    let room = Room::new();
    let mut state = run(&State::scratch(), "write base b");
    for _ in 0..62 {
        state = State::merge(&[state.clone(), state], named("merge"));
    }
    // All have the same name, so the events cannot be told apart; the error can.
    let definition = marshal(&state, None).unwrap();
    let store = room.store();
    let registry = Registry::new(RegistryOptions::default(), Arc::new(Anonymous)).unwrap();
    let worker = Worker {
        images: Images::new(store.clone(), registry),
        store,
        executor: Arc::new(Counting::default()),
        parallel: Arc::new(tokio::sync::Semaphore::new(4)),
        shared: slipway_solver::Shared::default(),
        devices: slipway_solver::device::Devices::none(),
    };
    let client = Arc::new(LocalFolders::new(BTreeMap::new(), None));
    let job = Job::new(worker, client, Arc::new(Recorder::default()));
    let error = job.solve(&job.load(&definition).await.unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("10000 layers"), "{error}");
}

fn chain(length: usize, bottom: State) -> State {
    (0..length).fold(bottom, |state, at| {
        let made =
            FileActions::new().mkfile(&format!("/f{at}"), 0o644, b"x".to_vec(), None, Some(0));
        state.file(made, named(&format!("make {at}")))
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_chains_do_not_exhaust_the_stack() {
    let room = Room::new();
    room.put("a", "one");
    let graph = chain(1000, copy(&State::scratch(), &context(), "/a", "/a"));
    let definition = marshal(&graph, None).unwrap();
    let built = tokio::spawn(async move { (room.solve(&[definition]).await, room) });
    let (built, _room) = built.await.unwrap();
    assert_eq!(built.result.as_ref().unwrap()[0].layers.len(), 1001);
    assert_eq!(built.ends["make 999"], "done");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_travel_up_long_chains() {
    let room = Room::new();
    let missing = chain(2000, copy(&State::scratch(), &context(), "/none", "/a"));
    let built = room.build(&[&missing]).await;
    assert_eq!(built.error().vertex.as_ref().unwrap().name.as_ref(), "copy /none /a");
}

#[tokio::test]
async fn wide_graphs() {
    let room = Room::new();
    let actions = (0..500).fold(FileActions::new(), |actions, at| {
        let stage = run(&State::scratch(), &format!("write out {at}"));
        let dest = format!("/{at}");
        actions.copy(&stage, Copy { src: "/out".into(), dest, ..Default::default() })
    });
    let graph = State::scratch().file(actions, named("gather"));
    let built = room.build(&[&graph]).await;
    assert_eq!(built.runs.len(), 500);
    assert_eq!(built.read("499").as_deref(), Some("499"));
    drop(built.written());
    assert_eq!(room.build(&[&graph]).await.runs.len(), 0);
}

/// A small generator of numbers that are the same every time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

fn random_graph(numbers: &mut Numbers) -> Vec<State> {
    let mut states = vec![State::scratch(), context()];
    for at in 0..12 {
        let mut pick = || states[numbers.below(states.len())].clone();
        let (base, other) = (pick(), pick());
        let state = match numbers.below(4) {
            0 => run(&base, &format!("write f{} {at}", at % 3)),
            1 if !other.is_scratch() => {
                let mount = ExecMount {
                    dest: "/m".into(),
                    source: other,
                    readonly: true,
                    ..Default::default()
                };
                run_with(&base, &format!("write f{at} {at}"), vec![mount], false)
            }
            2 if !other.is_scratch() => copy(&base, &other, "/", &format!("/d{at}")),
            _ => {
                let made =
                    FileActions::new().mkfile(&format!("/f{at}"), 0o644, b"x".to_vec(), None, None);
                base.file(made, named(&format!("make {at}")))
            }
        };
        states.push(state);
    }
    states.split_off(states.len() - 3)
}

#[tokio::test]
async fn a_graph_solved_twice_runs_nothing_new() {
    for seed in 0..25 {
        let room = Room::new();
        room.put("a", "one");
        let heads = random_graph(&mut Numbers(seed));
        let heads: Vec<&State> = heads.iter().collect();
        let first = room.build(&heads).await.written();
        let before: Vec<_> = first.result.as_ref().unwrap().clone();
        let mut runs = first.runs.clone();
        runs.sort();
        runs.dedup();
        assert_eq!(runs.len(), first.runs.len(), "seed {seed}: nothing runs twice");
        let names = |built: &Built| -> Vec<Vec<Vec<u8>>> {
            let list = |snapshot: &Snapshot| {
                let tree = built.store.view(&snapshot.layers).unwrap().flatten().unwrap();
                tree.iter().map(|(path, _)| path).collect()
            };
            built.result.as_ref().unwrap().iter().map(list).collect()
        };
        let listed = names(&first);
        drop(first);
        let second = room.build(&heads).await;
        assert_eq!(second.runs, Vec::<String>::new(), "seed {seed}");
        assert_eq!(names(&second), listed, "seed {seed}");
        assert_eq!(second.result.as_ref().unwrap().len(), before.len());
    }
}

#[tokio::test]
async fn hostile_definitions_are_errors() {
    let room = Room::new();
    let scratch_exec = |output: i64| {
        let meta =
            pb::Meta { args: vec!["write".into(), "a".into(), "a".into()], ..Default::default() };
        let root = pb::Mount { input: -1, dest: "/".into(), output, ..Default::default() };
        pb::op::Op::Exec(pb::ExecOp { meta: Some(meta), mounts: vec![root], ..Default::default() })
    };
    let file = |output: i64, input: i64| {
        let mkdir = pb::FileActionMkDir {
            path: "/a".into(),
            mode: -1,
            timestamp: i64::MIN,
            ..Default::default()
        };
        let action = Some(pb::file_action::Action::Mkdir(mkdir));
        let action = pb::FileAction { input, secondary_input: -1, output, action };
        pb::op::Op::File(pb::FileOp { actions: vec![action] })
    };
    for kind in [
        scratch_exec(i64::MAX),
        scratch_exec(i64::MIN),
        scratch_exec(1),
        scratch_exec(-1),
        file(i64::MAX, -1),
        file(1 << 40, -1),
        file(-1, -1),
        file(0, i64::MAX),
        file(0, i64::MIN),
        pb::op::Op::Build(pb::BuildOp::default()),
        pb::op::Op::Source(pb::SourceOp {
            identifier: "docker-image://".into(),
            ..Default::default()
        }),
        pb::op::Op::Source(pb::SourceOp { identifier: "git://x".into(), ..Default::default() }),
        pb::op::Op::Source(pb::SourceOp {
            identifier: "local://context".into(),
            attrs: BTreeMap::from([("local.followpaths".into(), "{".into())]),
        }),
    ] {
        use prost::Message as _;
        let op = pb::Op { op: Some(kind.clone()), ..Default::default() }.encode_to_vec();
        let digest = Digest::of(&op).to_string();
        let head = pb::Op { inputs: vec![pb::Input { digest, index: 0 }], ..Default::default() };
        let message = pb::Definition { def: vec![op, head.encode_to_vec()], ..Default::default() };
        let built = room.solve(&[Definition::from_pb(message).unwrap()]).await;
        assert!(built.result.is_err(), "{kind:?}");
        assert_eq!(built.runs, Vec::<String>::new(), "{kind:?}");
    }
    // An output that a good vertex does not have.
    let mut definition = marshal(&run(&State::scratch(), "write a a"), None).unwrap();
    let last = definition.ops.last_mut().unwrap();
    let mut head = <pb::Op as prost::Message>::decode(last.as_slice()).unwrap();
    head.inputs[0].index = i64::MAX;
    *last = prost::Message::encode_to_vec(&head);
    assert!(matches!(*room.solve(&[definition]).await.error().cause, Cause::Invalid(_)));
    assert!(Path::new(&layer_folders(&room)).exists());
}
