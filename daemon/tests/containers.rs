//! Processes that a frontend starts, and frontends that are processes: a daemon that runs programs for real. Needs root and
//! the Debian package busybox-static.
//!
//! Not the usual test harness: this program must be able to serve as the sandbox helper before any test thread starts.
#![expect(
    clippy::unwrap_used,
    reason = "all of it is tests, without the harness that clippy knows tests by"
)]

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use futures::{SinkExt as _, StreamExt as _};
use libtest_mimic::{Arguments, Trial};
use prost::Message as _;
use slipway_daemon::control::Allowed;
use slipway_daemon::{Daemon, DaemonOptions};
use slipway_engine::solver::executor::{helper_main, is_helper};
use slipway_engine::{Engine, EngineOptions};
use slipway_spec::llb::pb;
use slipway_spec::wire::MESSAGE_BYTES;
use slipway_spec::wire::control::control_client::ControlClient;
use slipway_spec::wire::control::{
    Exporter, SolveRequest, SolveResponse, StatusRequest, StatusResponse,
};
use slipway_spec::wire::gateway::exec_message::Input;
use slipway_spec::wire::gateway::llb_bridge_client::LlbBridgeClient;
use slipway_spec::wire::gateway::{
    self, ExecMessage, ExitMessage, FdMessage, InitMessage, NewContainerRequest, PingRequest,
    ReadDirRequest, ReadFileRequest, ReleaseContainerRequest, ResizeMessage, ReturnRequest,
    SignalMessage, StatFileRequest, result,
};
use slipway_spec::wire::rpc;
use slipway_transport::channel::Channel;
use tokio::task::JoinHandle;
use tonic::{Code, Request, Response, Status, Streaming};

#[path = "../src/control/tests/messages.rs"]
mod messages;

#[path = "containers/scanners.rs"]
mod scanners;

use messages::{Connection, definition, file_op, mkdir, mkfile, result_of, symlink, tagged};

const BUSYBOX: &str = "/bin/busybox";
/// Nothing that is tested takes as long as this.
const SOON: Duration = Duration::from_secs(50);

fn main() -> ExitCode {
    if is_helper(std::env::args_os()) {
        helper_main()
    }
    let tests: &[(&str, fn())] = &[
        ("processes_run_in_a_container", processes_run_in_a_container),
        ("terminals_have_a_size", terminals_have_a_size),
        ("files_of_a_container_are_read", files_of_a_container_are_read),
        ("what_makes_no_sense_is_refused", what_makes_no_sense_is_refused),
        ("what_a_failed_step_left_can_be_looked_into", what_a_failed_step_left_can_be_looked_into),
        (
            "what_a_failed_file_operation_left_can_be_looked_into",
            what_a_failed_file_operation_left_can_be_looked_into,
        ),
        ("a_client_that_vanishes_takes_its_processes", a_client_that_vanishes_takes_its_processes),
        ("frontends_that_are_none_say_why", frontends_that_are_none_say_why),
        ("a_frontend_that_hangs_ends_with_its_client", a_frontend_that_hangs_ends_with_its_client),
        ("dockerfiles_are_scanned", scanners::dockerfiles_are_scanned),
        (
            "what_no_frontend_scanned_is_scanned_afterwards",
            scanners::what_no_frontend_scanned_is_scanned_afterwards,
        ),
        ("a_scanner_that_fails_fails_the_build", scanners::a_scanner_that_fails_fails_the_build),
    ];
    let trials = tests.iter().map(|(name, test)| {
        let test = *test;
        Trial::test(*name, move || {
            test();
            Ok(())
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}

fn block_on<F: Future>(future: F) -> F::Output {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let output = runtime
        .block_on(async { tokio::time::timeout(SOON, future).await.expect("it takes too long") });
    runtime.shutdown_timeout(Duration::from_secs(5));
    output
}

struct Rig {
    daemon: Daemon,
    _root: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        let root = tempfile::tempdir().unwrap();
        let engine = Engine::open(EngineOptions::new(root.path())).unwrap();
        let allowed = Allowed::default();
        let options = DaemonOptions { allowed, ..DaemonOptions::default() };
        Self { daemon: Daemon::new(engine, options).unwrap(), _root: root }
    }

    async fn connect(&self) -> Peer {
        Peer { connection: Connection::open(self.daemon.router().clone()).await }
    }
}

/// A client. Dropping it is as if it were killed.
struct Peer {
    connection: Connection,
}

type Solving = JoinHandle<Result<SolveResponse, Status>>;

impl Peer {
    fn gateway(&self) -> LlbBridgeClient<Channel> {
        LlbBridgeClient::new(self.connection.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES)
    }

    /// Begins a build.
    fn solve(&self, request: SolveRequest) -> Solving {
        let mut control = ControlClient::new(self.connection.channel.clone());
        tokio::spawn(async move { control.solve(request).await.map(Response::into_inner) })
    }

    /// Begins a build whose frontend is this client.
    async fn begin(&self, id: &'static str, exporters: Vec<Exporter>) -> Building<'_> {
        let begun = self.solve(SolveRequest { r#ref: id.into(), exporters, ..Default::default() });
        self.gateway().ping(tagged(id, PingRequest {})).await.unwrap();
        Building { peer: self, id, begun }
    }
}

/// A build under way.
struct Building<'a> {
    peer: &'a Peer,
    id: &'static str,
    begun: Solving,
}

impl Building<'_> {
    fn ask<T>(&self, message: T) -> Request<T> {
        tagged(self.id, message)
    }

    async fn load(&self, ops: Vec<pb::Op>, evaluate: bool) -> Result<String, Status> {
        let request = gateway::SolveRequest {
            definition: Some(definition(ops)),
            allow_result_return: true,
            allow_result_array_ref: true,
            evaluate,
            ..Default::default()
        };
        let answer = self.peer.gateway().solve(self.ask(request)).await?.into_inner();
        match answer.result.unwrap().result {
            Some(result::Result::Ref(reference)) => Ok(reference.id),
            other => panic!("{other:?}"),
        }
    }

    async fn give(self, result: gateway::Result) {
        let request = self.ask(ReturnRequest { result: Some(result), error: None });
        self.peer.gateway().r#return(request).await.unwrap();
        self.begun.await.unwrap().unwrap();
    }

    async fn container(&self, id: &str, mounts: Vec<pb::Mount>) -> Result<(), Status> {
        let request = NewContainerRequest {
            container_id: id.into(),
            mounts,
            hostname: "inside".into(),
            extra_hosts: vec![pb::HostIp { host: "other".into(), ip: "10.9.8.7".into() }],
            ..Default::default()
        };
        self.peer.gateway().new_container(self.ask(request)).await.map(drop)
    }

    async fn release(&self, id: &str) -> Result<(), Status> {
        let request = ReleaseContainerRequest { container_id: id.into() };
        self.peer.gateway().release_container(self.ask(request)).await.map(drop)
    }

    async fn talk(&self) -> Talk {
        let (sender, messages) = futures::channel::mpsc::channel(100);
        let incoming = self.peer.gateway().exec_process(self.ask(messages)).await;
        Talk { sender, incoming: incoming.unwrap().into_inner() }
    }

    async fn read(&self, mount_index: i32, path: &str) -> Result<String, Status> {
        let request =
            ReadFileRequest { r#ref: "c".into(), file_path: path.into(), mount_index, range: None };
        let read = self.peer.gateway().read_file_container(self.ask(request)).await?;
        Ok(String::from_utf8(read.into_inner().data.to_vec()).unwrap())
    }
}

/// A stream of messages about processes.
struct Talk {
    sender: futures::channel::mpsc::Sender<ExecMessage>,
    incoming: Streaming<ExecMessage>,
}

/// What was told of a process.
#[derive(Debug, Default)]
struct Told {
    stdout: String,
    stderr: String,
    /// The outputs that were ended.
    ends: Vec<u32>,
    exit: ExitMessage,
}

impl Talk {
    async fn send(&mut self, id: &str, input: Input) {
        let message = ExecMessage { process_id: id.into(), input: Some(input) };
        self.sender.send(message).await.unwrap();
    }

    async fn start(&mut self, id: &str, script: &str) {
        self.send(id, Input::Init(init("c", script))).await;
    }

    async fn input(&mut self, id: &str, text: &str, eof: bool) {
        let data = text.to_owned().into_bytes().into();
        self.send(id, Input::File(FdMessage { fd: 0, eof, data })).await;
    }

    /// Waits until a process has written something.
    async fn until(&mut self, wanted: &str) {
        let mut seen = String::new();
        while !seen.contains(wanted) {
            if let Some(Input::File(data)) = self.incoming.next().await.unwrap().unwrap().input {
                seen.push_str(std::str::from_utf8(&data.data).unwrap());
            }
        }
    }

    /// Reads all that is told of processes until these are done.
    async fn finish(&mut self, ids: &[&str]) -> BTreeMap<String, Told> {
        let mut all: BTreeMap<String, Told> = BTreeMap::new();
        let mut done = 0;
        while done < ids.len() {
            let ExecMessage { process_id, input } = self.incoming.next().await.unwrap().unwrap();
            let known = all.contains_key(&process_id);
            let told = all.entry(process_id).or_default();
            match input.unwrap() {
                Input::Started(_) => assert!(!known, "Started comes first"),
                Input::File(FdMessage { fd, eof, data }) => {
                    let text = std::str::from_utf8(&data).unwrap();
                    if fd == 1 { &mut told.stdout } else { &mut told.stderr }.push_str(text);
                    assert!(!told.ends.contains(&fd), "an output ends once");
                    told.ends.extend(eof.then_some(fd));
                }
                Input::Exit(exit) => told.exit = exit,
                Input::Done(_) => done += 1,
                other => panic!("{other:?}"),
            }
        }
        all
    }

    async fn refused(&mut self) -> Status {
        loop {
            match self.incoming.next().await.unwrap() {
                Ok(_) => {}
                Err(status) => return status,
            }
        }
    }
}

fn init(container: &str, script: &str) -> InitMessage {
    let args = ["/bin/busybox", "sh", "-c", script].map(str::to_owned).to_vec();
    InitMessage {
        container_id: container.into(),
        meta: Some(pb::Meta { args, env: vec!["PATH=/bin".into()], ..Default::default() }),
        fds: vec![0, 1, 2],
        ..Default::default()
    }
}

/// A file system with busybox and a few applets.
fn base() -> pb::Op {
    use pb::file_action::Action;
    assert!(
        std::path::Path::new(BUSYBOX).exists(),
        "{BUSYBOX} is missing: install the Debian package busybox-static"
    );
    let link = |name: &str| symlink("busybox", &format!("/bin/{name}"));
    let busybox = Action::Mkfile(pb::FileActionMkFile {
        path: "/bin/busybox".into(),
        mode: 0o755,
        data: std::fs::read(BUSYBOX).unwrap(),
        owner: None,
        timestamp: -1,
    });
    let mut actions = vec![mkdir("/bin"), mkdir("/srv"), busybox];
    actions.extend(["sh", "cat", "echo", "sleep", "stty", "hostname", "grep"].map(link));
    file_op(None, actions)
}

fn root(id: &str) -> pb::Mount {
    pb::Mount { dest: "/".into(), result_id: id.into(), ..Default::default() }
}

fn processes(word: &str) -> usize {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    all.filter(|entry| {
        // A shell may become its last command, whose arguments are then set apart.
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).replace('\0', " ").contains(word)
            && entry.file_name() != *std::process::id().to_string()
    })
    .count()
}

/// Waits for a program: the shell speaks before it starts it.
async fn started(word: &str) {
    while processes(word) == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn gone(word: &str) {
    while processes(word) > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn processes_run_in_a_container() {
    let rig = Rig::new();
    block_on(async {
        let peer = rig.connect().await;
        let build = peer.begin("r", vec![]).await;
        let id = build.load(vec![base()], false).await.unwrap();
        let tmpfs = pb::Mount {
            dest: "/mem".into(),
            mount_type: pb::MountType::Tmpfs as i32,
            ..Default::default()
        };
        let read_only = pb::Mount {
            dest: "/ro".into(),
            selector: "/bin".into(),
            readonly: true,
            result_id: id.clone(),
            ..Default::default()
        };
        let scratch = pb::Mount { dest: "/scratch".into(), ..Default::default() };
        let mounts = vec![root(&id), tmpfs, read_only, scratch];
        build.container("c", mounts.clone()).await.unwrap();
        let twice = build.container("c", mounts).await.unwrap_err();
        assert_eq!(twice.code(), Code::AlreadyExists);

        let mut talk = build.talk().await;
        talk.start("1", "echo one > /mem/x; cat; echo bad >&2; exit 3").await;
        // Others join the first one, and see what it sees.
        let script = "while ! cat /mem/x; do sleep 0.01; done 2> /scratch/x; echo x > /ro/x; \
                      hostname; grep -c other /etc/hosts; exec cat";
        talk.start("2", script).await;
        talk.input("2", "typed", true).await;
        let told = talk.finish(&["2"]).await;
        let second = &told["2"];
        assert_eq!(second.stdout, "one\ninside\n1\ntyped");
        assert!(second.stderr.contains("Read-only"), "{}", second.stderr);
        assert_eq!((second.exit.code, second.ends.len()), (0, 2));
        talk.start("3", "echo up; sleep 1234").await;
        talk.until("up").await;
        talk.send("3", Input::Signal(SignalMessage { name: "KILL".into() })).await;
        assert_eq!(talk.finish(&["3"]).await["3"].exit.code, 137);
        // The end of the first is the end of all.
        talk.start("4", "sleep 1235").await;
        talk.start("5", "cat").await;
        talk.input("1", "to the first", false).await;
        talk.input("1", "", true).await;
        let told = talk.finish(&["1", "4", "5"]).await;
        assert_eq!(told["1"].stdout, "to the first");
        assert_eq!(told["1"].stderr, "bad\n");
        assert_eq!(told["1"].exit.code, 3);
        let error = told["1"].exit.error.clone().unwrap();
        assert_eq!(error.message, "exit code: 3");
        assert_eq!(error.details[0].value, br#"{"Code":3}"#);
        assert_eq!((told["4"].exit.code, told["5"].exit.code), (137, 137));
        talk.start("6", "true").await;
        let late = &talk.finish(&["6"]).await["6"];
        assert_eq!(late.exit.code, 255);
        assert!(late.exit.error.as_ref().unwrap().message.contains("has ended"));

        // How the first process ended that failed is told by the end of the container.
        assert_eq!(build.release("c").await.unwrap_err().message(), "exit code: 137");
        // A new one begins with nothing of that.
        assert_eq!(build.release("c").await.unwrap_err().code(), Code::NotFound);
        build.container("c", vec![root(&id)]).await.unwrap();
        talk.start("7", "cat /mem/x; sleep 1236").await;
        talk.until("/mem/x").await;
        started("sleep 1236").await;
        let ended = build.release("c").await.unwrap_err();
        assert_eq!(ended.message(), "exit code: 137: context canceled");
        assert_eq!(processes("sleep 1236"), 0);
        let exit = &talk.finish(&["7"]).await["7"].exit;
        let said = exit.error.as_ref().unwrap().message.as_str();
        assert_eq!((exit.code, said), (137, "exit code: 137: context canceled"));
        build.give(gateway::Result::default()).await;
    });
}

fn terminals_have_a_size() {
    let rig = Rig::new();
    block_on(async {
        let peer = rig.connect().await;
        let build = peer.begin("r", vec![]).await;
        let id = build.load(vec![base()], false).await.unwrap();
        build.container("c", vec![root(&id)]).await.unwrap();
        let mut talk = build.talk().await;
        for process in ["1", "2"] {
            let script =
                "echo ready $TERM; read line; stty size; echo got $line >&2; read line; exit 2";
            let init = InitMessage { tty: true, ..init("c", script) };
            talk.send(process, Input::Init(init)).await;
            talk.until("ready xterm").await;
            talk.send(process, Input::Resize(ResizeMessage { rows: 31, cols: 71 })).await;
            talk.input(process, "line\n", false).await;
            talk.until("31 71\r\ngot line\r\n").await;
        }
        talk.input("2", "\n", false).await;
        let told = talk.finish(&["2"]).await;
        assert_eq!(told["2"].exit.code, 2);
        assert!(!told["2"].ends.is_empty(), "a terminal has an end");
    });
}

fn files_of_a_container_are_read() {
    let rig = Rig::new();
    block_on(async {
        let peer = rig.connect().await;
        let build = peer.begin("r", vec![]).await;
        let id = build.load(vec![base()], false).await.unwrap();
        let part = pb::Mount { dest: "/part".into(), selector: "/bin".into(), ..root(&id) };
        build.container("c", vec![root(&id), part]).await.unwrap();
        let mut talk = build.talk().await;
        let script =
            "echo new > /srv/new; echo part > /part/new; busybox rm /bin/stty; echo ok; cat";
        talk.start("1", script).await;
        talk.until("ok").await;
        assert_eq!(build.read(0, "/srv/new").await.unwrap(), "new\n");
        assert_eq!(build.read(1, "/new").await.unwrap(), "part\n");
        assert_eq!(build.read(1, "/../../new").await.unwrap(), "part\n");
        assert_eq!(build.read(0, "/bin/new").await.unwrap_err().code(), Code::NotFound);
        assert_eq!(build.read(2, "/new").await.unwrap_err().code(), Code::InvalidArgument);
        let request = ReadDirRequest {
            r#ref: "c".into(),
            dir_path: "/bin".into(),
            include_pattern: "s*".into(),
            mount_index: 0,
        };
        let listed = peer.gateway().read_dir_container(build.ask(request)).await.unwrap();
        let listed = listed.into_inner().entries;
        let names: Vec<_> = listed.iter().map(|stat| stat.path.to_vec()).collect();
        assert_eq!(names, [b"sh".to_vec(), b"sleep".to_vec()]);
        let request =
            StatFileRequest { r#ref: "c".into(), path: "/srv/new".into(), mount_index: 0 };
        let stat = peer.gateway().stat_file_container(build.ask(request)).await.unwrap();
        assert_eq!(stat.into_inner().stat.unwrap().size, 4);
    });
}

fn what_makes_no_sense_is_refused() {
    let rig = Rig::new();
    block_on(async {
        let peer = rig.connect().await;
        let build = peer.begin("r", vec![]).await;
        let id = build.load(vec![base()], false).await.unwrap();
        let missing = build.container("x", vec![root("no such result")]).await.unwrap_err();
        assert_eq!(missing.code(), Code::NotFound);
        assert!(build.container("x", vec![root(&id), root(&id)]).await.is_err());
        let hosts = NewContainerRequest {
            container_id: "x".into(),
            mounts: vec![root(&id)],
            extra_hosts: vec![pb::HostIp { host: "a".into(), ip: "b".into() }],
            ..Default::default()
        };
        let hosts = peer.gateway().new_container(build.ask(hosts)).await.unwrap_err();
        assert_eq!(hosts.message(), "failed to parse IP b");

        let signal = |name: &str| Input::Signal(SignalMessage { name: name.into() });
        let cases = [
            ("", Input::Init(init("c", "true")), Code::InvalidArgument),
            ("1", Input::Init(init("other", "true")), Code::NotFound),
            ("1", signal("HUP"), Code::NotFound),
            ("1", Input::Resize(ResizeMessage { rows: 1, cols: 1 }), Code::NotFound),
            ("1", Input::Done(Default::default()), Code::InvalidArgument),
            ("first", Input::Init(init("c", "true")), Code::AlreadyExists),
            ("first", signal("SIGHUP"), Code::InvalidArgument),
            ("first", Input::File(FdMessage { fd: 1, ..Default::default() }), Code::OutOfRange),
        ];
        for (process, input, code) in cases {
            build.container("c", vec![root(&id)]).await.unwrap();
            let mut talk = build.talk().await;
            talk.start("first", "exec cat").await;
            let what = format!("{input:?}");
            talk.send(process, input).await;
            assert_eq!(talk.refused().await.code(), code, "{process} {what}");
            build.release("c").await.unwrap();
        }
        // What cannot be started has an exit, and says why.
        build.container("c", vec![root(&id)]).await.unwrap();
        let mut talk = build.talk().await;
        let insecure = pb::SecurityMode::Insecure as i32;
        let mut nobody = init("c", "true");
        nobody.meta.as_mut().unwrap().user = "nobody-knows".into();
        let mut nothing = init("c", "true");
        nothing.meta.as_mut().unwrap().args = vec!["no-such-program".into()];
        for (process, init, why) in [
            ("a", InitMessage { security: insecure, ..init("c", "true") }, "not allowed"),
            ("b", nobody, "nobody-knows"),
            ("c", nothing, "no-such-program"),
            ("d", InitMessage { security: 7, ..init("c", "true") }, "invalid security mode 7"),
        ] {
            talk.send(process, Input::Init(init)).await;
            let told = &talk.finish(&[process]).await[process];
            assert_eq!((told.exit.code, told.ends.len()), (255, 2));
            let message = &told.exit.error.as_ref().unwrap().message;
            assert!(message.contains(why), "{message}");
        }
    });
}

/// A step that runs a script on the operation before it.
fn step(script: &str) -> pb::Op {
    let args = ["sh", "-c", script].map(str::to_owned).to_vec();
    let exec = pb::ExecOp {
        meta: Some(pb::Meta { args, env: vec!["PATH=/bin".into()], ..Default::default() }),
        mounts: vec![pb::Mount { input: 0, dest: "/".into(), ..Default::default() }],
        ..Default::default()
    };
    let inputs = vec![pb::Input { digest: "0".into(), index: 0 }];
    pb::Op { inputs, op: Some(pb::op::Op::Exec(exec)), ..pb::Op::default() }
}

/// Returns what a status tells of the step that failed.
fn solve_detail(failed: &Status) -> serde_json::Value {
    let details = rpc::Status::decode(failed.details()).unwrap().details;
    let solve = details.iter().find(|any| any.type_url.ends_with("errdefs.Solve+json"));
    serde_json::from_slice(&solve.unwrap().value).unwrap()
}

fn what_a_failed_step_left_can_be_looked_into() {
    let rig = Rig::new();
    block_on(async {
        let peer = rig.connect().await;
        let build = peer.begin("r", vec![]).await;
        let ops = vec![base(), step("echo here > /left; busybox rm /bin/stty; exit 5")];
        let solve = solve_detail(&build.load(ops, true).await.unwrap_err());
        assert_eq!(solve["op"]["exec"]["mounts"][0]["dest"], "/");
        assert_eq!(solve["op"]["exec"]["meta"]["args"][0], "sh");
        let script = "cat /left; busybox test -e /bin/stty && echo stty; true";
        for (kind, seen) in [("mountIDs", "here\n"), ("inputIDs", "stty\n")] {
            let left = solve[kind][0].as_str().unwrap();
            build.container(kind, vec![root(left)]).await.unwrap();
            let mut talk = build.talk().await;
            talk.send("1", Input::Init(init(kind, script))).await;
            assert_eq!(talk.finish(&["1"]).await["1"].stdout, seen, "{kind}");
        }
    });
}

fn what_a_failed_file_operation_left_can_be_looked_into() {
    let rig = Rig::new();
    block_on(async {
        let peer = rig.connect().await;
        let build = peer.begin("r", vec![]).await;
        let id = build.load(vec![base()], false).await.unwrap();
        let see = async |name: &str, left: &str, script: &str| {
            let mount = pb::Mount { dest: "/left".into(), result_id: left.into(), ..root(&id) };
            build.container(name, vec![root(&id), mount]).await.unwrap();
            let mut talk = build.talk().await;
            talk.send("1", Input::Init(init(name, script))).await;
            talk.finish(&["1"]).await["1"].stdout.clone()
        };

        let actions = ["/one", "/nothing/two", "/three"].map(|path| mkfile(path, "here"));
        let ops = vec![base(), file_op(Some(0), actions.to_vec())];
        let failed = build.load(ops, true).await.unwrap_err();
        let solve = solve_detail(&failed);
        assert_eq!(solve["file"]["index"], "1");
        let left = solve["mountIDs"].as_array().unwrap();
        assert_eq!((left.len(), &left[0], &left[2]), (3, &"".into(), &"".into()));
        let script = "cat /left/one; busybox ls /left/bin | busybox grep -x stty";
        assert_eq!(see("after", left[1].as_str().unwrap(), script).await, "herestty\n");
        let before = solve["inputIDs"][0].as_str().unwrap();
        assert_eq!(see("before", before, "busybox ls /left | busybox grep one").await, "");

        // What is to be copied is looked for before anything is written.
        let mut copy = file_op(
            Some(0),
            vec![pb::file_action::Action::Copy(pb::FileActionCopy {
                src: "/nothing".into(),
                dest: "/x".into(),
                mode: -1,
                timestamp: -1,
                ..Default::default()
            })],
        );
        if let Some(pb::op::Op::File(op)) = &mut copy.op {
            (op.actions[0].input, op.actions[0].secondary_input) = (-1, 0);
        }
        let solve = solve_detail(&build.load(vec![base(), copy], true).await.unwrap_err());
        assert_eq!(solve["cache"]["index"], "0");
        assert_eq!(solve["mountIDs"], serde_json::json!([]));
        let read = solve["inputIDs"][0].as_str().unwrap();
        assert_eq!(see("read", read, "busybox ls /left/bin/stty").await, "/left/bin/stty\n");
    });
}

fn a_client_that_vanishes_takes_its_processes() {
    let rig = Rig::new();
    block_on(async {
        let peer = rig.connect().await;
        let build = peer.begin("r", vec![]).await;
        let id = build.load(vec![base()], false).await.unwrap();
        build.container("c", vec![root(&id)]).await.unwrap();
        let mut talk = build.talk().await;
        talk.start("1", "echo here; sleep 1237").await;
        talk.until("here").await;
        started("sleep 1237").await;
        build.begun.abort();
        drop(talk);
        drop(peer);
        gone("sleep 1237").await;
    });
}

/// Makes an image whose program is a script.
async fn image(rig: &Rig, name: &str, script: &str) {
    let peer = rig.connect().await;
    let attrs = BTreeMap::from([("name".to_owned(), name.to_owned())]);
    let build = peer.begin("image", vec![Exporter { r#type: "image".into(), attrs }]).await;
    let id = build.load(vec![base()], false).await.unwrap();
    let platform = slipway_spec::Platform::host();
    let config = serde_json::json!({
        "architecture": platform.architecture,
        "os": platform.os,
        "config": {
            "Entrypoint": ["/bin/sh", "-c", script],
            "Env": ["PATH=/bin"],
            "Labels": { "moby.buildkit.frontend.network.none": "true" },
        },
        "rootfs": { "type": "layers", "diff_ids": [] },
    });
    let mut result = result_of(&id);
    let config = serde_json::to_vec(&config).unwrap().into();
    result.metadata.insert("containerimage.config".into(), config);
    build.give(result).await;
}

fn asking(id: &str, name: &str) -> SolveRequest {
    SolveRequest {
        r#ref: id.into(),
        frontend: "gateway.v0".into(),
        frontend_attrs: BTreeMap::from([
            ("source".to_owned(), name.to_owned()),
            ("filename".to_owned(), "a=b".to_owned()),
        ]),
        ..Default::default()
    }
}

fn frontends_that_are_none_say_why() {
    let rig = Rig::new();
    let env = "busybox env | grep -c ^BUILDKIT_ >&2; busybox env | grep OPT_0 >&2; \
               grep -c : /proc/net/dev >&2; \
               busybox test -s /run/config/buildkit/metadata/frontend.bin || exit 1; exit 4";
    block_on(async {
        for (name, script, why) in [
            ("garbage", "echo hello; sleep 1238", "it wrote \"hello\\n\""),
            ("polite", "echo hello", "does not speak gRPC"),
            ("silent", "exit 0", "has ended without a result"),
            ("failing", "echo because >&2; exit 9", "failed: exit code: 9: because"),
            ("env", env, "exit code: 4: 5\nBUILDKIT_FRONTEND_OPT_0=filename=a=b\n1"),
        ] {
            let name = format!("frontend.test/{name}:1");
            image(&rig, &name, script).await;
            let peer = rig.connect().await;
            let failed = peer.solve(asking(&name, &name)).await.unwrap().unwrap_err();
            assert!(failed.message().contains(why), "{name}: {}", failed.message());
            assert_eq!(processes("sleep 1238"), 0, "{name}");
        }
        // What it said is shown.
        let peer = rig.connect().await;
        let begun = peer.solve(asking("shown", "frontend.test/failing:1"));
        let mut control = ControlClient::new(peer.connection.channel.clone());
        let told = control.status(StatusRequest { r#ref: "shown".into() }).await.unwrap();
        let told: Vec<StatusResponse> =
            told.into_inner().filter_map(|told| async { told.ok() }).collect().await;
        assert!(told.iter().flat_map(|told| &told.logs).any(|log| log.msg.starts_with(b"because")));
        begun.await.unwrap().unwrap_err();

        let mut missing = asking("x", "");
        missing.frontend_attrs.remove("source");
        let missing = peer.solve(missing).await.unwrap().unwrap_err();
        assert_eq!(missing.message(), "no source specified for gateway");
        let mut capable = asking("y", "frontend.test/silent:1");
        capable.frontend_attrs.insert("frontend.caps".into(), "a.b.c+forward".into());
        let capable = peer.solve(capable).await.unwrap().unwrap_err();
        assert_eq!(capable.code(), Code::Unimplemented);
        assert_eq!(capable.message(), "unsupported frontend capability a.b.c");
    });
}

fn a_frontend_that_hangs_ends_with_its_client() {
    let rig = Rig::new();
    block_on(async {
        image(&rig, "frontend.test/hanging:1", "cat > /dev/null & sleep 1240; :").await;
        let peer = rig.connect().await;
        let begun = peer.solve(asking("hang", "frontend.test/hanging:1"));
        while processes("sleep 1240") == 0 {
            assert!(!begun.is_finished());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        drop(peer);
        gone("sleep 1240").await;
    });
}
