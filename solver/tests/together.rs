//! Builds of one process that want the same: what is executed once, what each of them sees, and what happens when the one
//! that executes leaves.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use async_trait::async_trait;
use futures::future::join_all;
use slipway_solver::client::{SecretBytes, SecretProvider};
use slipway_solver::executor::{ExecError, ExecSpec, Executor, Exit, Stdio, Stream};
use slipway_solver::source::image::Images;
use slipway_solver::{Cause, Job, LocalFolders, Services, Shared, SolveError, Worker};
use slipway_spec::llb::{Copy, Definition, Exec, FileActions, State, VertexOptions, marshal, pb};
use slipway_spec::progress::{ProgressEvent, ProgressSink};
use slipway_spec::{Digest, Platform};
use slipway_store::registry::{Anonymous, Registry, RegistryOptions};
use slipway_store::snapshot::Snapshot;
use slipway_store::{Error, Store};
use tokio::sync::Semaphore;

/// Understands `write path text`, `fail`, and `gate path`, which says something, waits until it may go on, says more,
/// and writes.
#[derive(Debug)]
struct Counting {
    runs: Mutex<Vec<String>>,
    gate: Semaphore,
    arrived: Semaphore,
}

#[async_trait]
impl Executor for Counting {
    async fn run(&self, spec: ExecSpec, stdio: Stdio) -> Result<Exit, ExecError> {
        self.runs.lock().unwrap().push(format!("{} {}", spec.platform, spec.args.join(" ")));
        let Stdio::Piped(output) = stdio else { panic!("a step's output is read") };
        let say = |text: &'static str| output.send((Stream::Stdout, text.into()));
        let mut code = 0;
        match spec.args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            ["write", path, text] => {
                say("writing\n").await.unwrap();
                tokio::task::yield_now().await;
                fs::write(spec.upper.join(path), text).unwrap();
            }
            ["gate", path] => {
                say("first\n").await.unwrap();
                self.arrived.add_permits(1);
                self.gate.acquire().await.unwrap().forget();
                say("second\n").await.unwrap();
                fs::write(spec.upper.join(path), "x").unwrap();
            }
            ["fail"] => {
                say("failing\n").await.unwrap();
                self.arrived.add_permits(1);
                self.gate.acquire().await.unwrap().forget();
                code = 7;
            }
            other => panic!("{other:?}"),
        }
        Ok(Exit { code, signal: None, created_stubs: vec![] })
    }
}

/// What a build told, as `name what`.
#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<ProgressEvent>>);

impl ProgressSink for Recorder {
    fn send(&self, event: ProgressEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Recorder {
    /// Returns what was told of one vertex.
    fn of(&self, wanted: &Digest) -> Vec<String> {
        let events = self.0.lock().unwrap();
        let told = events.iter().filter_map(|event| {
            let (vertex, what) = match event {
                ProgressEvent::Started { vertex, .. } => (vertex, "started".to_owned()),
                ProgressEvent::Cached { vertex, .. } => (vertex, "cached".to_owned()),
                ProgressEvent::Done { vertex } => (vertex, "done".to_owned()),
                ProgressEvent::Failed { vertex, .. } => (vertex, "failed".to_owned()),
                ProgressEvent::Canceled { vertex } => (vertex, "canceled".to_owned()),
                ProgressEvent::Log { vertex, data, .. } => {
                    (vertex, String::from_utf8(data.to_vec()).unwrap())
                }
                _ => return None,
            };
            (vertex == wanted).then_some(what)
        });
        told.collect()
    }

    /// Checks that whatever began ended, once.
    fn check(&self) {
        let mut open = BTreeMap::new();
        for event in self.0.lock().unwrap().iter() {
            match event {
                ProgressEvent::Started { vertex, name } => {
                    assert_eq!(open.insert(vertex.clone(), true), None, "{name} started twice");
                }
                ProgressEvent::Cached { vertex, name } => {
                    assert_eq!(open.insert(vertex.clone(), false), None, "{name} ended before");
                }
                ProgressEvent::Done { vertex }
                | ProgressEvent::Failed { vertex, .. }
                | ProgressEvent::Canceled { vertex } => {
                    assert_eq!(open.insert(vertex.clone(), false), Some(true), "{vertex}");
                }
                _ => {}
            }
        }
        assert!(open.values().all(|open| !open), "something did not end");
    }
}

/// One process with a store and a context.
struct Process {
    folder: tempfile::TempDir,
    executor: Arc<Counting>,
    worker: Worker,
}

struct Build {
    result: Result<Snapshot, SolveError>,
    progress: Arc<Recorder>,
    head: Digest,
}

impl Build {
    fn layers(&self) -> Vec<u64> {
        self.result.as_ref().unwrap().layers.iter().map(|layer| layer.0 as u64).collect()
    }

    /// What was told of the vertex that was asked for.
    fn told(&self) -> Vec<String> {
        self.progress.of(&self.head)
    }
}

impl Process {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("context")).unwrap();
        fs::write(folder.path().join("context/a"), "content").unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let registry = Registry::new(RegistryOptions::default(), Arc::new(Anonymous)).unwrap();
        let executor = Arc::new(Counting {
            runs: Mutex::default(),
            gate: Semaphore::new(0),
            arrived: Semaphore::new(0),
        });
        let worker = Worker {
            images: Images::new(store.clone(), registry),
            store,
            executor: executor.clone(),
            parallel: Arc::new(Semaphore::new(1)),
            shared: Shared::default(),
            devices: slipway_solver::device::Devices::none(),
        };
        Self { folder, executor, worker }
    }

    async fn build(&self, graph: &State) -> Build {
        self.solve(&marshal(graph, None).unwrap(), Services::default()).await
    }

    async fn solve(&self, definition: &Definition, services: Services) -> Build {
        let folders = BTreeMap::from([("context".into(), self.folder.path().join("context"))]);
        let progress = Arc::new(Recorder::default());
        let job = Job::with(
            self.worker.clone(),
            Arc::new(LocalFolders::new(folders, None)),
            progress.clone(),
            None,
            services,
        );
        let edge = job.load(definition).await.unwrap();
        let build =
            Build { result: job.solve(&edge).await, progress, head: edge.vertex.digest.clone() };
        build.progress.check();
        build
    }

    fn runs(&self) -> Vec<String> {
        let mut runs = std::mem::take(&mut *self.executor.runs.lock().unwrap());
        runs.sort();
        runs
    }

    /// Waits until a gated step has said what it says first.
    async fn arrived(&self) {
        self.executor.arrived.acquire().await.unwrap().forget();
    }

    fn open(&self) {
        self.executor.gate.add_permits(1);
    }
}

fn named(name: &str) -> VertexOptions {
    VertexOptions { name: name.into(), ..Default::default() }
}

/// Runs a command; what `host` is does not count for the key, so that steps of different digests are one.
fn run_with(base: &State, command: &str, host: &str, options: VertexOptions) -> State {
    let args = command.split(' ').map(ToOwned::to_owned).collect();
    let extra_hosts = vec![pb::HostIp { host: "h".into(), ip: host.into() }];
    let meta = pb::Meta { args, extra_hosts, cwd: "/".into(), ..Default::default() };
    base.exec(Exec { meta, ..Default::default() }, options)
}

fn run(base: &State, command: &str) -> State {
    run_with(base, command, "10.0.0.1", named(command))
}

fn copy(base: &State, from: &State, src: &str, dest: &str) -> State {
    let action = Copy {
        src: src.into(),
        dest: dest.into(),
        create_dest_path: true,
        follow_symlink: true,
        ..Default::default()
    };
    base.file(FileActions::new().copy(from, action), named(&format!("copy {src} {dest}")))
}

/// A bit of everything.
fn graph() -> State {
    let context = State::local("context", BTreeMap::new(), named("context"));
    let stage = run(&State::scratch(), "write out text");
    let base = copy(&run(&State::scratch(), "write base b"), &context, "/a", "/a");
    let made = base
        .file(FileActions::new().mkfile("/made", 0o644, b"m".to_vec(), None, None), named("made"));
    run(&copy(&made, &stage, "/out", "/in"), "write last l")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_two_builds_execute_each_step_once() {
    let process = Process::new();
    let graph = graph();
    let builds = join_all((0..32).map(|_| process.build(&graph))).await;
    let host = Platform::host();
    let expected = ["write base b", "write last l", "write out text"];
    assert_eq!(process.runs(), expected.map(|run| format!("{host} {run}")));
    for build in &builds {
        assert_eq!(build.layers(), builds[0].layers());
        assert!(build.layers().len() >= 5);
    }
}

#[tokio::test]
async fn who_comes_late_sees_what_was_said_under_its_own_name() {
    let process = Process::new();
    let step = |host: &str| run_with(&State::scratch(), "gate f", host, named("step"));
    let (early, late) = (step("10.0.0.1"), step("10.0.0.2"));
    let script = async {
        process.arrived().await;
        let late = process.build(&late);
        tokio::pin!(late);
        for _ in 0..100 {
            tokio::task::yield_now().await;
            assert!(futures::poll!(&mut late).is_pending());
        }
        process.open();
        late.await
    };
    let (early, late) = tokio::join!(process.build(&early), script);
    assert_ne!(early.head, late.head);
    assert_eq!(process.runs().len(), 1);
    for build in [&early, &late] {
        assert_eq!(build.told(), ["started", "first\n", "second\n", "done"]);
    }
    assert_eq!(early.layers(), late.layers());
    let again = process.build(&step("10.0.0.3")).await;
    assert_eq!(again.told(), ["cached"]);
}

#[tokio::test]
async fn a_failure_is_everyones_and_each_is_told_where_it_wrote_the_step() {
    let process = Process::new();
    let step = |at: usize| {
        run_with(&State::scratch(), "fail", &format!("10.0.0.{at}"), named(&format!("step {at}")))
    };
    let steps: Vec<State> = (0..8).map(step).collect();
    let script = async {
        process.arrived().await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        process.open();
    };
    let (builds, ()) = tokio::join!(join_all(steps.iter().map(|step| process.build(step))), script);
    assert_eq!(process.runs().len(), 1);
    for (at, build) in builds.iter().enumerate() {
        let error = build.result.as_ref().unwrap_err();
        assert!(matches!(*error.cause, Cause::Exit { code: 7, .. }));
        let failed = error.vertex.as_ref().unwrap();
        assert_eq!((&failed.digest, &*failed.name), (&build.head, format!("step {at}").as_str()));
        assert_eq!(build.told(), ["started", "failing\n", "failed"]);
    }
    // A failure is not remembered.
    process.open();
    assert!(process.build(&steps[0]).await.result.is_err());
    assert_eq!(process.runs().len(), 1);
}

/// Gives up after so many polls.
struct Impatient<F>(Pin<Box<F>>, usize);

impl<F: Future> Future for Impatient<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.1 == 0 {
            return Poll::Ready(None);
        }
        self.1 -= 1;
        let poll = self.0.as_mut().poll(context).map(Some);
        if self.1 == 0 && poll.is_pending() {
            return Poll::Ready(None);
        }
        poll
    }
}

#[tokio::test]
async fn a_build_that_leaves_at_any_moment_takes_nothing_away() {
    let graph = graph();
    // How far a build gets in so many polls is for the machine to say: not every round has a step executed again.
    for _ in 0..10 {
        if leave_at_any_moment(&graph).await > 3 {
            return;
        }
    }
    panic!("no step was ever executed again by who stayed");
}

/// Has one of two builds leave, a little later each time, until it does not any more. Returns the most steps that were
/// executed.
async fn leave_at_any_moment(graph: &State) -> usize {
    let mut runs = 0;
    for polls in 0.. {
        let process = Process::new();
        let leaving = async { Impatient(Box::pin(process.build(graph)), polls).await.is_some() };
        let staying = async {
            // The one that leaves is the first everywhere.
            tokio::task::yield_now().await;
            process.build(graph).await
        };
        let (left, stayed) = tokio::join!(leaving, staying);
        assert!(stayed.layers().len() >= 5, "after {polls} polls");
        let view = process.worker.store.view(&stayed.result.as_ref().unwrap().layers).unwrap();
        for path in ["a", "made", "in", "last", "base"] {
            assert!(view.get(path.as_bytes()).unwrap().is_some(), "{path} after {polls} polls");
        }
        runs = runs.max(process.runs().len());
        assert_eq!(format!("{:?}", process.worker.shared).matches("under_way: 0").count(), 3);
        if left {
            assert!(polls > 10, "{polls}");
            break;
        }
    }
    runs
}

#[tokio::test]
async fn the_next_one_takes_over_and_is_told_of_one_run() {
    let process = Process::new();
    let step = run(&State::scratch(), "gate f");
    let mut first = Box::pin(process.build(&step));
    let mut second = Box::pin(process.build(&step));
    tokio::select! {
        biased;
        _ = &mut first => panic!("it waits"),
        _ = &mut second => panic!("it waits"),
        () = process.arrived() => {}
    }
    drop(first);
    let script = async {
        process.arrived().await;
        let third = process.build(&step);
        tokio::pin!(third);
        for _ in 0..100 {
            tokio::task::yield_now().await;
            assert!(futures::poll!(&mut third).is_pending());
        }
        process.open();
        third.await
    };
    let (second, third) = tokio::join!(second, script);
    assert_eq!(process.runs().len(), 2);
    assert_eq!(second.told().last().unwrap(), "done");
    assert_eq!(third.told(), ["started", "first\n", "second\n", "done"]);
}

#[derive(Debug)]
struct OneSecret;

#[async_trait]
impl SecretProvider for OneSecret {
    async fn secret(&self, id: &str) -> Result<Option<SecretBytes>, Error> {
        Ok((id == "token").then(|| SecretBytes::new("hush")))
    }
}

#[tokio::test]
async fn a_client_without_the_secret_fails_alone() {
    let process = Process::new();
    let meta = pb::Meta {
        args: ["write", "f", "text"].map(String::from).to_vec(),
        cwd: "/".into(),
        ..Default::default()
    };
    let root = pb::Mount { input: -1, dest: "/".into(), output: 0, ..Default::default() };
    let token = pb::SecretEnv { id: "token".into(), name: "TOKEN".into(), optional: false };
    let op = pb::ExecOp {
        meta: Some(meta),
        mounts: vec![root],
        secretenv: vec![token],
        ..Default::default()
    };
    let step = pb::Op { op: Some(pb::op::Op::Exec(op)), ..Default::default() };
    let bytes = prost::Message::encode_to_vec(&step);
    let input = pb::Input { digest: Digest::of(&bytes).to_string(), index: 0 };
    let last = pb::Op { inputs: vec![input], ..Default::default() };
    let def = vec![bytes, prost::Message::encode_to_vec(&last)];
    let definition = Definition::from_pb(pb::Definition { def, ..Default::default() }).unwrap();
    let rich = Services { secrets: Arc::new(OneSecret), ..Services::default() };
    let (poor, rich) = tokio::join!(
        process.solve(&definition, Services::default()),
        process.solve(&definition, rich)
    );
    assert!(poor.result.unwrap_err().to_string().contains("token"));
    assert_eq!(rich.layers().len(), 1);
    assert_eq!(process.runs().len(), 1);
}

#[tokio::test]
async fn steps_that_must_run_again_run_once_for_all_who_ask_meanwhile() {
    let process = Process::new();
    let fresh = VertexOptions { ignore_cache: true, ..named("gate") };
    let fresh = run_with(&State::scratch(), "gate f", "10.0.0.1", fresh);
    let usual = run(&State::scratch(), "gate f");
    process.open();
    assert!(process.build(&usual).await.result.is_ok());
    process.arrived().await;
    assert_eq!(process.runs().len(), 1);
    // What is known does not count, but what runs just now does.
    let builds = [process.build(&fresh), process.build(&fresh), process.build(&fresh)];
    let script = async {
        process.arrived().await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        process.open();
    };
    let (builds, ()) = tokio::join!(join_all(builds), script);
    assert_eq!(process.runs().len(), 1);
    assert_eq!(builds[0].layers(), builds[2].layers());
    assert_eq!(process.build(&usual).await.layers(), builds[0].layers());
    process.open();
    assert_ne!(process.build(&fresh).await.layers(), builds[0].layers());
    assert_eq!(process.runs().len(), 1);
}

#[tokio::test]
async fn platforms_are_different_work() {
    let process = Process::new();
    let definition = |architecture: &str| {
        let meta = pb::Meta {
            args: ["write", "f", "text"].map(String::from).to_vec(),
            cwd: "/".into(),
            ..Default::default()
        };
        let root = pb::Mount { input: -1, dest: "/".into(), output: 0, ..Default::default() };
        let op = pb::ExecOp { meta: Some(meta), mounts: vec![root], ..Default::default() };
        let platform = pb::Platform {
            os: "linux".into(),
            architecture: architecture.into(),
            ..Default::default()
        };
        let step = pb::Op {
            op: Some(pb::op::Op::Exec(op)),
            platform: Some(platform),
            ..Default::default()
        };
        let bytes = prost::Message::encode_to_vec(&step);
        let input = pb::Input { digest: Digest::of(&bytes).to_string(), index: 0 };
        let last = pb::Op { inputs: vec![input], ..Default::default() };
        let def = vec![bytes, prost::Message::encode_to_vec(&last)];
        Definition::from_pb(pb::Definition { def, ..Default::default() }).unwrap()
    };
    let definitions = [definition("amd64"), definition("arm64")];
    let builds =
        join_all((0..8).map(|at| process.solve(&definitions[at % 2], Services::default()))).await;
    assert_eq!(process.runs(), ["linux/amd64 write f text", "linux/arm64 write f text"]);
    assert_ne!(builds[0].layers(), builds[1].layers());
    assert_eq!(builds[0].layers(), builds[2].layers());
}
