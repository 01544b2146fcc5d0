//! What steps are given and what they leave, in the real sandbox: needs root, and the Debian packages busybox-static and
//! openssh-client.
//!
//! Not the usual test harness: this program must be able to serve as the sandbox helper before any thread starts.
#![expect(
    clippy::unwrap_used,
    reason = "all of it is tests, without the harness that clippy knows tests by"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

use async_trait::async_trait;
use libtest_mimic::{Arguments, Trial};
use prost::Message as _;
use slipway_solver::client::{AgentStream, SecretBytes, SecretProvider, SshAgents};
use slipway_solver::device::{DeviceOptions, Devices};
use slipway_solver::executor::{
    SandboxExecutor, SandboxOptions, helper_main, is_helper, prepare_stub,
};
use slipway_solver::source::image::Images;
use slipway_solver::{Job, LocalFolders, Services, SolveError, Worker};
use slipway_spec::Digest;
use slipway_spec::llb::{Definition, pb};
use slipway_spec::progress::NoProgress;
use slipway_store::registry::{Anonymous, Registry, RegistryOptions};
use slipway_store::snapshot::Snapshot;
use slipway_store::{Error, Store};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const BUSYBOX: &str = "/bin/busybox";

fn main() -> ExitCode {
    if is_helper(std::env::args_os()) {
        helper_main()
    }
    let tests: &[(&str, fn())] = &[
        ("caches_outlive_builds", caches_outlive_builds),
        ("caches_are_shared_as_asked", caches_are_shared_as_asked),
        ("ignoring_the_cache_empties_caches", ignoring_the_cache_empties_caches),
        ("secrets_are_seen_and_leave_no_trace", secrets_are_seen_and_leave_no_trace),
        ("agents_are_reached_through_a_socket", agents_are_reached_through_a_socket),
        ("every_mount_gives_what_it_should", every_mount_gives_what_it_should),
        ("mount_points_go_as_asked", mount_points_go_as_asked),
        ("limits_and_names_hold", limits_and_names_hold),
        ("control_groups_hold", control_groups_hold),
        ("insecure_steps_need_leave", insecure_steps_need_leave),
        ("devices_are_given_as_described", devices_are_given_as_described),
        ("devices_need_leave", devices_need_leave),
        ("hooks_of_devices_prepare_the_root", hooks_of_devices_prepare_the_root),
        ("parts_of_the_context_count_alone", parts_of_the_context_count_alone),
        ("mounted_parts_of_steps_count_by_content", mounted_parts_of_steps_count_by_content),
        ("a_layer_is_what_its_step_has_changed", a_layer_is_what_its_step_has_changed),
    ];
    let trials = tests
        .iter()
        .map(|(name, test)| {
            let test = *test;
            Trial::test(*name, move || {
                test();
                Ok(())
            })
        })
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

#[derive(Clone, Default)]
struct Graph {
    ops: Vec<pb::Op>,
    metadata: BTreeMap<String, pb::OpMetadata>,
}

#[derive(Clone)]
struct Node(String);

impl Graph {
    fn add(&mut self, kind: pb::op::Op, inputs: &[(&Node, i64)]) -> Node {
        let inputs = inputs
            .iter()
            .map(|(node, index)| pb::Input { digest: node.0.clone(), index: *index })
            .collect();
        let op = pb::Op { inputs, op: Some(kind), ..Default::default() };
        let node = Node(Digest::of(&op.encode_to_vec()).to_string());
        if !self.ops.contains(&op) {
            self.ops.push(op);
        }
        node
    }

    fn local(&mut self, name: &str) -> Node {
        let source = pb::SourceOp { identifier: format!("local://{name}"), attrs: BTreeMap::new() };
        self.add(pb::op::Op::Source(source), &[])
    }

    /// A script on the base, with further mounts; their inputs are counted from 1.
    fn step(&mut self, script: &str, mounts: Vec<pb::Mount>, inputs: &[(&Node, i64)]) -> Node {
        self.exec(shell(script, mounts), inputs)
    }

    fn exec(&mut self, op: pb::ExecOp, inputs: &[(&Node, i64)]) -> Node {
        let base = self.local("base");
        let all: Vec<_> = std::iter::once((&base, 0)).chain(inputs.iter().copied()).collect();
        self.add(pb::op::Op::Exec(op), &all)
    }

    fn definition(&self, node: &Node, index: i64) -> Definition {
        let last = pb::Op {
            inputs: vec![pb::Input { digest: node.0.clone(), index }],
            ..Default::default()
        };
        let def = self.ops.iter().chain([&last]).map(pb::Op::encode_to_vec).collect();
        let message = pb::Definition { def, metadata: self.metadata.clone(), source: None };
        Definition::from_pb(message).unwrap()
    }
}

fn shell(script: &str, mounts: Vec<pb::Mount>) -> pb::ExecOp {
    let root = pb::Mount { input: 0, dest: "/".into(), output: 0, ..Default::default() };
    let meta = pb::Meta {
        args: ["sh", "-c", script].map(Into::into).into(),
        env: vec!["PATH=/bin".into()],
        cwd: "/srv".into(),
        remove_mount_stubs_recursive: true,
        ..Default::default()
    };
    pb::ExecOp {
        meta: Some(meta),
        mounts: std::iter::once(root).chain(mounts).collect(),
        ..Default::default()
    }
}

fn mount(dest: &str, kind: pb::MountType) -> pb::Mount {
    pb::Mount {
        input: -1,
        output: -1,
        dest: dest.into(),
        mount_type: kind as i32,
        ..Default::default()
    }
}

fn cache(dest: &str, id: &str, sharing: pb::CacheSharingOpt) -> pb::Mount {
    let options = pb::CacheOpt { id: id.into(), sharing: sharing as i32 };
    pb::Mount { cache_opt: Some(options), ..mount(dest, pb::MountType::Cache) }
}

struct Room {
    folder: tempfile::TempDir,
}

impl Room {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        let room = Self { folder: tempfile::tempdir().unwrap() };
        let base = room.path("base");
        for name in ["bin", "etc", "srv", "tmp"] {
            fs::create_dir_all(base.join(name)).unwrap();
        }
        fs::copy(BUSYBOX, base.join("bin/busybox")).unwrap();
        for applet in [
            "sh", "cat", "echo", "ls", "mkdir", "rmdir", "sleep", "rm", "touch", "stat", "df",
            "id", "mount", "hostname", "head", "tr", "grep", "test", "[", "true",
        ] {
            symlink("busybox", base.join("bin").join(applet)).unwrap();
        }
        fs::create_dir(room.path("context")).unwrap();
        room
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The devices that a test has described.
    fn devices(&self) -> Devices {
        Devices::new(DeviceOptions { folders: vec![self.path("cdi")], auto_allowed: vec![] })
    }

    fn describe_devices(&self, name: &str, text: &str) {
        fs::create_dir_all(self.path("cdi")).unwrap();
        fs::write(self.path("cdi").join(name), text).unwrap();
    }

    fn store(&self) -> Store {
        let store = Store::open(&self.path("store")).unwrap();
        prepare_stub(&store.stub_folder()).unwrap();
        store
    }

    /// Solves outputs at once in one job over a store of its own, as another process would.
    fn solve(
        &self,
        graph: &Graph,
        wanted: &[(&Node, i64)],
        services: Services,
    ) -> Result<Vec<(Store, Snapshot)>, SolveError> {
        let store = self.store();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let registry = Registry::new(RegistryOptions::default(), Arc::new(Anonymous)).unwrap();
            let worker = Worker {
                images: Images::new(store.clone(), registry),
                store: store.clone(),
                executor: Arc::new(SandboxExecutor::new(SandboxOptions::default())),
                parallel: Arc::new(tokio::sync::Semaphore::new(8)),
                shared: slipway_solver::Shared::default(),
                devices: self.devices(),
            };
            let folders = ["base", "context"].map(|name| (name.to_owned(), self.path(name))).into();
            let client = Arc::new(LocalFolders::new(folders, None));
            let job = Job::with(worker, client, Arc::new(NoProgress), None, services);
            let solved = wanted.iter().map(|(node, index)| {
                let (job, definition) = (&job, graph.definition(node, *index));
                async move { job.solve(&job.load(&definition).await?).await }
            });
            let all = futures::future::try_join_all(solved).await?;
            Ok(all.into_iter().map(|snapshot| (store.clone(), snapshot)).collect())
        })
    }

    #[track_caller]
    fn ok(&self, graph: &Graph, node: &Node) -> (Store, Snapshot) {
        self.solve(graph, &[(node, 0)], Services::default()).unwrap().pop().unwrap()
    }
}

/// Reads a file of a result.
fn read((store, snapshot): &(Store, Snapshot), path: &str) -> Option<String> {
    let bytes = store.view(&snapshot.layers).unwrap().read(path.as_bytes(), 100_000).unwrap();
    bytes.map(|bytes| String::from_utf8_lossy(&bytes).trim_end().to_owned())
}

fn caches_outlive_builds() {
    let room = Room::new();
    let mut graph = Graph::default();
    let shared = pb::CacheSharingOpt::Shared;
    let first = graph.step("echo kept > /root/.c/f", vec![cache("/root/.c", "id", shared)], &[]);
    let result = room.ok(&graph, &first);
    assert_eq!(read(&result, "root/.c/f"), None);
    assert!(!result.0.layer_folder(*result.1.layers.last().unwrap()).join("root").exists());
    let second = graph.step("cat c/f > /out", vec![cache("c", "id", shared)], &[]);
    assert_eq!(read(&room.ok(&graph, &second), "out").as_deref(), Some("kept"));
    let other = graph.step("ls /c > /out", vec![cache("/c", "other", shared)], &[]);
    assert_eq!(read(&room.ok(&graph, &other), "out").as_deref(), Some(""));
    // A base is what a cache begins with, and tells caches of one name apart.
    let seed = graph.step("mkdir /seed && echo s > /seed/f", vec![], &[]);
    let based = pb::Mount { input: 1, selector: "/seed".into(), ..cache("/c", "id", shared) };
    let third =
        graph.step("cat /c/f > /out && echo more >> /c/f", vec![based.clone()], &[(&seed, 0)]);
    assert_eq!(read(&room.ok(&graph, &third), "out").as_deref(), Some("s"));
    let fourth = graph.step("cat /c/f > /out; true", vec![based], &[(&seed, 0)]);
    assert_eq!(read(&room.ok(&graph, &fourth), "out").as_deref(), Some("s\nmore"));
    let names: Vec<String> =
        room.store().kept().unwrap().into_iter().map(|item| item.name).collect();
    assert_eq!(names.len(), 3, "{names:?}");
}

fn caches_are_shared_as_asked() {
    let room = Room::new();
    for (sharing, instances) in
        [(pb::CacheSharingOpt::Locked, 1), (pb::CacheSharingOpt::Private, 2)]
    {
        let mut graph = Graph::default();
        let id = format!("{sharing:?}");
        // How a cache is shared is no part of what a step is.
        let script =
            |n: i32| format!("mkdir /c/busy && sleep 0.3 && rmdir /c/busy && echo {id} {n}");
        let steps: Vec<Node> =
            (0..3).map(|n| graph.step(&script(n), vec![cache("/c", &id, sharing)], &[])).collect();
        let wanted: Vec<_> = steps.iter().map(|node| (node, 0)).collect();
        room.solve(&graph, &wanted, Services::default()).unwrap();
        let kept = room.store().kept().unwrap();
        let count = kept.iter().filter(|item| item.name == id).count();
        assert!(if instances == 1 { count == 1 } else { count >= 2 }, "{id}: {count}");
    }
    // Two that share see each other.
    let mut graph = Graph::default();
    let shared = pb::CacheSharingOpt::Shared;
    let wait =
        "n=0; while [ ! -e /c/b ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n+1)); done; [ -e /c/b ]";
    let one = graph.step(wait, vec![cache("/c", "s", shared)], &[]);
    let two = graph.step("touch /c/b", vec![cache("/c", "s", shared)], &[]);
    room.solve(&graph, &[(&one, 0), (&two, 0)], Services::default()).unwrap();
    // Two that lock the same folders in another order do not wait for ever.
    let locked = |dest: &str, id: &str| cache(dest, id, pb::CacheSharingOpt::Locked);
    let mut graph = Graph::default();
    let steps: Vec<Node> = (0..6)
        .map(|n| {
            let (a, b) = if n % 2 == 0 { ("x", "y") } else { ("y", "x") };
            graph.step(
                &format!("sleep 0.05; echo {n}"),
                vec![locked("/a", a), locked("/b", b)],
                &[],
            )
        })
        .collect();
    let wanted: Vec<_> = steps.iter().map(|node| (node, 0)).collect();
    room.solve(&graph, &wanted, Services::default()).unwrap();
}

fn ignoring_the_cache_empties_caches() {
    let room = Room::new();
    let mut graph = Graph::default();
    let script = "ls /c > /out; touch /c/f";
    let step = graph.step(script, vec![cache("/c", "id", pb::CacheSharingOpt::Shared)], &[]);
    assert_eq!(read(&room.ok(&graph, &step), "out").as_deref(), Some(""));
    let again =
        graph.step("ls /c > /out; true", vec![cache("/c", "id", pb::CacheSharingOpt::Shared)], &[]);
    assert_eq!(read(&room.ok(&graph, &again), "out").as_deref(), Some("f"));
    let ignore = pb::OpMetadata { ignore_cache: true, ..Default::default() };
    graph.metadata.insert(again.0.clone(), ignore);
    assert_eq!(read(&room.ok(&graph, &again), "out").as_deref(), Some(""));
}

#[derive(Debug)]
struct OneSecret;

#[async_trait]
impl SecretProvider for OneSecret {
    async fn secret(&self, id: &str) -> Result<Option<SecretBytes>, Error> {
        Ok((id == "s").then(|| SecretBytes::new("hush")))
    }
}

fn secrets_are_seen_and_leave_no_trace() {
    let room = Room::new();
    let services = || Services { secrets: Arc::new(OneSecret), ..Services::default() };
    let secret = |id: &str, optional: bool| pb::Mount {
        secret_opt: Some(pb::SecretOpt { id: id.into(), uid: 7, gid: 8, mode: 0o440, optional }),
        // As clients write it: the field's default.
        output: 0,
        ..mount("/run/secrets/s", pb::MountType::Secret)
    };
    let mut graph = Graph::default();
    let script = "stat -c %u:%g:%a /run/secrets/s > /out; cat /run/secrets/s > /seen; \
                  ! echo x > /run/secrets/s";
    let step = graph.step(script, vec![secret("s", false)], &[]);
    let result = room.solve(&graph, &[(&step, 0)], services()).unwrap().pop().unwrap();
    assert_eq!(read(&result, "out").as_deref(), Some("7:8:440"));
    assert_eq!(read(&result, "seen").as_deref(), Some("hush"));
    assert!(!result.0.layer_folder(*result.1.layers.last().unwrap()).join("run").exists());
    let missing = graph.step("true", vec![secret("other", false)], &[]);
    let error = room.solve(&graph, &[(&missing, 0)], services()).unwrap_err().to_string();
    assert!(error.contains("secret other: not found"), "{error}");
    let optional = graph.step("[ ! -e /run/secrets/s ]", vec![secret("other", true)], &[]);
    room.solve(&graph, &[(&optional, 0)], services()).unwrap();
    let mut op = shell("echo \"$TOKEN-${GONE-unset}\" > /out", vec![]);
    op.meta.as_mut().unwrap().env.push("TOKEN=old".into());
    let variable =
        |name: &str, id: &str| pb::SecretEnv { id: id.into(), name: name.into(), optional: true };
    op.secretenv = vec![variable("TOKEN", "s"), variable("GONE", "other")];
    let step = graph.exec(op.clone(), &[]);
    let result = room.solve(&graph, &[(&step, 0)], services()).unwrap().pop().unwrap();
    assert_eq!(read(&result, "out").as_deref(), Some("hush-unset"));
    op.secretenv[1].optional = false;
    let step = graph.exec(op, &[]);
    assert!(room.solve(&graph, &[(&step, 0)], services()).is_err());
}

/// An agent without keys.
#[derive(Debug)]
struct EmptyAgent;

#[async_trait]
impl SshAgents for EmptyAgent {
    async fn check(&self, id: &str) -> Result<bool, Error> {
        Ok(id == "default")
    }

    async fn connect(&self, _: &str) -> Result<Box<dyn AgentStream>, Error> {
        let (ours, mut theirs) = tokio::io::duplex(1024);
        tokio::spawn(async move {
            while let Ok(length) = theirs.read_u32().await {
                let mut message = vec![0; length as usize];
                if theirs.read_exact(&mut message).await.is_err() {
                    return;
                }
                // No identities to whoever asks for them, a failure to all else.
                let answer: &[u8] =
                    if message == [11] { &[0, 0, 0, 5, 12, 0, 0, 0, 0] } else { &[0, 0, 0, 1, 5] };
                if theirs.write_all(answer).await.is_err() {
                    return;
                }
            }
        });
        Ok(Box::new(ours))
    }
}

/// Puts a program of this machine with its libraries into the base.
fn install(room: &Room, program: &str) {
    let put = |path: &Path| {
        let target = room.path("base").join(path.strip_prefix("/").unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(path, target).unwrap();
    };
    put(Path::new(program));
    let listed = Command::new("ldd").arg(program).output().unwrap();
    for word in String::from_utf8_lossy(&listed.stdout).split_whitespace() {
        if word.starts_with('/') {
            put(Path::new(word));
        }
    }
}

fn agents_are_reached_through_a_socket() {
    let room = Room::new();
    install(&room, "/usr/bin/ssh-add");
    let services = || Services { ssh: Arc::new(EmptyAgent), ..Services::default() };
    let agent = |id: &str, optional: bool| pb::Mount {
        ssh_opt: Some(pb::SshOpt { id: id.into(), uid: 3, gid: 4, mode: 0o600, optional }),
        output: 0,
        ..mount("/run/agent.0", pb::MountType::Ssh)
    };
    let mut graph = Graph::default();
    let script = "stat -c %u:%g:%a:%F /run/agent.0 > /out; \
                  SSH_AUTH_SOCK=/run/agent.0 /usr/bin/ssh-add -l > /seen; true";
    let step = graph.step(script, vec![agent("", false)], &[]);
    let result = room.solve(&graph, &[(&step, 0)], services()).unwrap().pop().unwrap();
    assert_eq!(read(&result, "out").as_deref(), Some("3:4:600:socket"));
    assert_eq!(read(&result, "seen").as_deref(), Some("The agent has no identities."));
    let missing = graph.step("true", vec![agent("other", false)], &[]);
    let error = room.solve(&graph, &[(&missing, 0)], services()).unwrap_err().to_string();
    assert!(error.contains("no SSH key \"other\" forwarded from the client"), "{error}");
    let optional = graph.step("[ ! -e /run/agent.0 ]", vec![agent("other", true)], &[]);
    room.solve(&graph, &[(&optional, 0)], services()).unwrap();
}

fn every_mount_gives_what_it_should() {
    let room = Room::new();
    let mut graph = Graph::default();
    let source = graph.step("mkdir -p /d/sub && echo one > /d/sub/f", vec![], &[]);
    let bind = |dest: &str| pb::Mount { input: 1, ..mount(dest, pb::MountType::Bind) };
    let mounts = vec![
        pb::Mount { output: 1, ..bind("/changed") },
        pb::Mount { output: 2, readonly: true, ..bind("/same") },
        pb::Mount { selector: "/d/sub".into(), readonly: true, ..bind("/part") },
        pb::Mount { selector: "/d/sub/f".into(), readonly: true, ..bind("/file") },
        bind("/lost"),
        pb::Mount { output: 3, ..mount("/new", pb::MountType::Bind) },
        pb::Mount {
            tmpfs_opt: Some(pb::TmpfsOpt { size: 1 << 20 }),
            output: 0,
            ..mount("/mem", pb::MountType::Tmpfs)
        },
    ];
    let script = "set -e; echo two > /changed/d/sub/f; ! echo x > /same/x; cat /part/f /file > /out; \
                  ! echo x > /part/x; echo gone > /lost/d/x; echo n > /new/f; mkdir /mem/m; \
                  ! head -c 2000000 /dev/zero > /mem/z; echo o > /changed/new";
    let step = graph.step(script, mounts, &[(&source, 0)]);
    let wanted: Vec<_> = (0..4).map(|index| (&step, index)).collect();
    let results = room.solve(&graph, &wanted, Services::default()).unwrap();
    assert_eq!(read(&results[0], "out").as_deref(), Some("one\none"));
    for gone in ["changed", "same", "part", "lost", "new", "mem"] {
        let view = results[0].0.view(&results[0].1.layers).unwrap();
        assert!(view.get(gone.as_bytes()).unwrap().is_none(), "{gone}");
    }
    assert_eq!(read(&results[1], "d/sub/f").as_deref(), Some("two"));
    assert_eq!(read(&results[1], "new").as_deref(), Some("o"));
    assert_eq!(read(&results[2], "d/sub/f").as_deref(), Some("one"));
    assert_eq!(read(&results[3], "f").as_deref(), Some("n"));
    // All are found again, and the source was never changed.
    let again = room.solve(&graph, &wanted, Services::default()).unwrap();
    let layers = |results: &[(Store, Snapshot)]| {
        results.iter().map(|(_, snapshot)| snapshot.layers.last().copied()).collect::<Vec<_>>()
    };
    assert_eq!(layers(&results), layers(&again));
    assert_eq!(read(&room.ok(&graph, &source), "d/sub/f").as_deref(), Some("one"));

    let readonly_root = {
        let mut op = shell("! echo x > /x && echo y > /out/f", vec![]);
        op.mounts[0].readonly = true;
        op.mounts[0].output = -1;
        op.mounts.push(pb::Mount { output: 0, ..mount("/out", pb::MountType::Bind) });
        graph.exec(op, &[])
    };
    let result = room.ok(&graph, &readonly_root);
    assert_eq!(read(&result, "f").as_deref(), Some("y"));
    assert_eq!(result.1.layers.len(), 1);
    let failed = graph.step("exit 3", vec![], &[]);
    assert!(room.solve(&graph, &[(&failed, 0)], Services::default()).is_err());
    let mut op = shell("exit 3", vec![]);
    op.meta.as_mut().unwrap().valid_exit_codes = vec![0, 3];
    let allowed = graph.exec(op, &[]);
    room.ok(&graph, &allowed);
}

fn mount_points_go_as_asked() {
    let room = Room::new();
    let mut graph = Graph::default();
    let deep = || mount("/a/b/c", pb::MountType::Tmpfs);
    let all = graph.step("true", vec![deep()], &[]);
    let (store, snapshot) = room.ok(&graph, &all);
    let folder = store.layer_folder(*snapshot.layers.last().unwrap());
    assert!(!folder.join("a").exists());
    let mut op = shell("true", vec![deep()]);
    op.meta.as_mut().unwrap().remove_mount_stubs_recursive = false;
    let some = graph.exec(op, &[]);
    let (store, snapshot) = room.ok(&graph, &some);
    let folder = store.layer_folder(*snapshot.layers.last().unwrap());
    assert!(folder.join("a/b").exists() && !folder.join("a/b/c").exists());
    // A mount point inside another mount is not left in what becomes of that.
    let outer = pb::Mount { output: 1, ..mount("/o", pb::MountType::Bind) };
    let nested = graph.step("touch /o/f", vec![outer, mount("/o/in", pb::MountType::Tmpfs)], &[]);
    let result = room.solve(&graph, &[(&nested, 1)], Services::default()).unwrap().pop().unwrap();
    let view = result.0.view(&result.1.layers).unwrap();
    assert!(view.get(b"f").unwrap().is_some() && view.get(b"in").unwrap().is_none());
}

fn limits_and_names_hold() {
    let room = Room::new();
    let mut graph = Graph::default();
    let mut op =
        shell("ulimit -n > /n; ulimit -c > /c; hostname > /h; grep x.test /etc/hosts > /e", vec![]);
    let meta = op.meta.as_mut().unwrap();
    let limit = |name: &str, soft, hard| pb::Ulimit { name: name.into(), soft, hard };
    meta.ulimit = vec![limit("nofile", 77, 99), limit("core", 0, -1)];
    meta.hostname = "here".into();
    meta.extra_hosts = vec![pb::HostIp { host: "x.test".into(), ip: "10.9.8.7".into() }];
    let step = graph.exec(op.clone(), &[]);
    let result = room.ok(&graph, &step);
    for (path, text) in [("n", "77"), ("c", "0"), ("h", "here"), ("e", "10.9.8.7\tx.test")] {
        assert_eq!(read(&result, path).as_deref(), Some(text), "{path}");
    }
    op.meta.as_mut().unwrap().ulimit = vec![limit("files", 1, 1)];
    let bad = graph.exec(op, &[]);
    let error = room.solve(&graph, &[(&bad, 0)], Services::default()).unwrap_err().to_string();
    assert!(error.contains("\"files\""), "{error}");
}

fn control_groups_hold() {
    let room = Room::new();
    let mut graph = Graph::default();
    let mut op = shell("cat /proc/self/cgroup > /out", vec![]);
    op.meta.as_mut().unwrap().cgroup_parent = "/slipway-test".into();
    let step = graph.exec(op, &[]);
    let seen = read(&room.ok(&graph, &step), "out").unwrap();
    // With one hierarchy the group is the root of what the step sees.
    assert!(seen.contains("/slipway-test/slipway/") || seen == "0::/", "{seen}");
    let limited = |memory| pb::OpMetadata {
        linux_resources: Some(pb::LinuxResources { memory, ..Default::default() }),
        ..Default::default()
    };
    let hungry = "x=$(head -c 100000000 /dev/zero | tr '\\0' a); echo ${#x} > /out";
    let step = graph.step(hungry, vec![], &[]);
    graph.metadata.insert(step.0.clone(), limited(20 << 20));
    let error = room.solve(&graph, &[(&step, 0)], Services::default()).unwrap_err().to_string();
    assert!(error.contains("exit code: 137") || error.contains("exit code"), "{error}");
    // Limits are no part of what a step is.
    graph.metadata.insert(step.0.clone(), limited(800 << 20));
    assert_eq!(read(&room.ok(&graph, &step), "out").as_deref(), Some("100000000"));
    let step = graph.step("true", vec![], &[]);
    let resources = pb::LinuxResources { cpuset_cpus: "4000".into(), ..Default::default() };
    let metadata = pb::OpMetadata { linux_resources: Some(resources), ..Default::default() };
    graph.metadata.insert(step.0.clone(), metadata);
    let error = room.solve(&graph, &[(&step, 0)], Services::default()).unwrap_err().to_string();
    assert!(error.contains("cpuset"), "{error}");
    for hierarchy in ["memory", "cpu", "unified", ""] {
        let folder = Path::new("/sys/fs/cgroup").join(hierarchy).join("slipway-test");
        if let Ok(groups) = fs::read_dir(folder.join("slipway")) {
            let left: Vec<_> = groups.flatten().filter(|entry| entry.path().is_dir()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
        let _absent = fs::remove_dir(folder.join("slipway"));
        let _absent = fs::remove_dir(&folder);
    }
}

fn insecure_steps_need_leave() {
    let room = Room::new();
    let mut graph = Graph::default();
    let mut op = shell("mount -t tmpfs none /tmp && echo yes > /out", vec![]);
    op.security = pb::SecurityMode::Insecure as i32;
    let step = graph.exec(op, &[]);
    let error = room.solve(&graph, &[(&step, 0)], Services::default()).unwrap_err().to_string();
    assert!(error.contains("security.insecure is not allowed"), "{error}");
    let mut services = Services::default();
    services.entitlements.security_insecure = true;
    let result = room.solve(&graph, &[(&step, 0)], services).unwrap().pop().unwrap();
    assert_eq!(read(&result, "out").as_deref(), Some("yes"));
}

fn with_devices(script: &str, devices: &[&str]) -> pb::ExecOp {
    let device = |name: &&str| pb::CdiDevice { name: (*name).into(), optional: false };
    pb::ExecOp { cdi_devices: devices.iter().map(device).collect(), ..shell(script, vec![]) }
}

fn allowing(devices: &[&str]) -> Services {
    let mut services = Services::default();
    for device in devices {
        services.entitlements.devices.add(device).unwrap();
    }
    services
}

fn devices_are_given_as_described() {
    let room = Room::new();
    let gift = room.path("gift");
    fs::create_dir(&gift).unwrap();
    fs::write(gift.join("f"), "given").unwrap();
    let gift = gift.display();
    room.describe_devices(
        "v.yaml",
        &format!(
            "cdiVersion: 0.7.0\nkind: v.com/c\ncontainerEdits:\n  env: [ALL=yes, PATH=/other:/bin]\n\
             devices:\n- name: a\n  containerEdits:\n    env: [ONE=a]\n    additionalGids: [0, 1234]\n    \
             mounts: [{{hostPath: {gift}, containerPath: /gift, options: [ro, rbind]}}, \
             {{hostPath: /dev/null, containerPath: /gone}}]\n    \
             deviceNodes: [{{path: /dev/nothing, hostPath: /dev/null}}, \
             {{path: /opt/v/zeros, type: c, major: 1, minor: 5, fileMode: 0640, gid: 9}}, {{path: /dev/pipe, type: p}}]\n"
        ),
    );
    let mut graph = Graph::default();
    let script = "set -e; echo $ONE $ALL $PATH $(id -G) > /srv/out
        echo x > /dev/nothing; echo x > /gone; head -c 3 /opt/v/zeros | tr '\\000' z >> /srv/out
        echo >> /srv/out; stat -c '%n %F %a %u:%g %t:%T' /dev/nothing /opt/v/zeros /dev/pipe >> /srv/out
        cat /gift/f >> /srv/out; echo more > /gift/f || echo ' once' >> /srv/out; ls -A /dev | grep slipway || true";
    let services = || allowing(&["v.com/c"]);
    let mut op = with_devices(script, &["v.com/c=a"]);
    let step = graph.exec(op.clone(), &[]);
    let result = room.solve(&graph, &[(&step, 0)], services()).unwrap().pop().unwrap();
    assert_eq!(
        read(&result, "srv/out").as_deref(),
        Some(
            "a yes /other:/bin 0 1234\nzzz\n/dev/nothing character special file 666 0:0 1:3\n\
             /opt/v/zeros character special file 640 0:9 1:5\n/dev/pipe fifo 666 0:0 0:0\ngiven once"
        )
    );
    // Nothing of it is in the result.
    let layer = result.0.layer_folder(*result.1.layers.last().unwrap());
    for path in ["opt", "gift", "gone", "dev"] {
        assert!(!layer.join(path).exists(), "{path}");
    }
    // Device files belong to whoever the process is.
    op = with_devices(
        "stat -c '%u:%g' /dev/nothing > /dev/shm/s; cat /dev/shm/s > /tmp/out",
        &["v.com/c=a"],
    );
    fs::set_permissions(room.path("base/tmp"), fs::Permissions::from_mode(0o777)).unwrap();
    op.meta.as_mut().unwrap().user = "33:44".into();
    let step = graph.exec(op, &[]);
    let result = room.solve(&graph, &[(&step, 0)], services()).unwrap().pop().unwrap();
    assert_eq!(read(&result, "tmp/out").as_deref(), Some("33:44"));
}

fn hooks_of_devices_prepare_the_root() {
    let room = Room::new();
    // As hooks do, these look the root up in the bundle that they are told of.
    let script = "set -e; state=$(cat); bundle=${state#*\\\"bundle\\\":\\\"}; bundle=${bundle%%\\\"*}\n\
                  root=$(sed 's/.*\"root\":{\"path\":\"\\([^\"]*\\).*/\\1/' $bundle/config.json)\n\
                  test -e $root/dev/nothing; echo $0 $1 $V $(pwd -P | grep -c $root) > $root/srv/hook; echo said; exit $CODE\n";
    let program = room.path("hook");
    fs::write(&program, format!("#!/bin/bash\n{script}")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let program = program.display();
    let describe = |hook: &str| {
        let text = format!(
            "cdiVersion: 0.6.0\nkind: v.com/c\ndevices:\n- name: a\n  containerEdits:\n    \
             deviceNodes: [{{path: /dev/nothing, hostPath: /dev/null}}]\n    hooks: [{{hookName: createContainer, {hook}}}]\n"
        );
        room.describe_devices("v.yaml", &text);
    };
    let run = |command: &str| {
        let mut graph = Graph::default();
        let step = graph.exec(with_devices(command, &["v.com/c=a"]), &[]);
        let results = room.solve(&graph, &[(&step, 0)], allowing(&[""]));
        results.map(|mut results| read(&results.pop().unwrap(), "srv/hook"))
    };
    describe(&format!("path: {program}, args: [name, one], env: [V=v, CODE=0]"));
    let said = run("cat /srv/hook && test -z \"$V\"").unwrap().unwrap();
    assert_eq!(said, format!("{program} one v 1"));
    describe(&format!("path: {program}, args: [name], env: [CODE=3]"));
    let error = run("true # 3").unwrap_err().to_string();
    assert!(
        error.contains(&format!("the hook {program} of a device failed: exit status: 3: said")),
        "{error}"
    );
    describe("path: /bin/sleep, args: [sleep, '1000'], timeout: 1");
    let error = run("true # slow").unwrap_err().to_string();
    assert!(
        error.contains("the hook /bin/sleep of a device failed: it took more than 1 s"),
        "{error}"
    );
    describe("path: /bin/no-such-hook");
    let error = run("true # none").unwrap_err().to_string();
    assert!(error.contains("cannot start it: No such file"), "{error}");
}

fn devices_need_leave() {
    let room = Room::new();
    let described = |name: &str, env: &str, auto: bool| {
        format!(
            "cdiVersion: 0.6.0\nkind: v.com/{name}\nannotations:\n  org.mobyproject.buildkit.device.autoallow: {auto}\n\
             devices:\n- name: a\n  containerEdits:\n    env: [{env}]\n"
        )
    };
    room.describe_devices("shut.yaml", &described("shut", "SHUT=1", false));
    room.describe_devices("open.yaml", &described("open", "OPEN=1", true));
    room.describe_devices("bad.json", "{");
    let script = "echo $OPEN-$SHUT $(cat /proc/sys/kernel/random/uuid) > /out";
    let said = |devices: &[&str], allowed: &[&str]| {
        // Leave is asked for all steps of a graph.
        let mut graph = Graph::default();
        let step = graph.exec(with_devices(script, devices), &[]);
        let results = room.solve(&graph, &[(&step, 0)], allowing(allowed));
        results.map(|mut results| read(&results.pop().unwrap(), "out").unwrap())
    };
    let open = said(&["v.com/open"], &[]).unwrap();
    assert!(open.starts_with("1- "), "{open}");
    // The first of a kind is known as the one that it was.
    assert_eq!(said(&["v.com/open=a"], &[]).unwrap(), open);
    assert_eq!(said(&["v.com/open=*"], &["v.com/shut"]).unwrap(), open);
    let both = said(&["v.com/open", "v.com/shut"], &["v.com/shut=a"]).unwrap();
    assert!(both.starts_with("1-1 "), "{both}");
    assert!(said(&["mine"], &["v.com/shut=a,alias=mine"]).unwrap().starts_with("-1 "));
    assert!(said(&["v.com/shut"], &[""]).unwrap().starts_with("-1 "));
    let error = said(&["v.com/open", "v.com/shut"], &[]).unwrap_err();
    assert!(
        error.to_string().contains("device v.com/shut=a is requested by the build but not allowed"),
        "{error}"
    );
    assert!(error.vertex.is_some_and(|vertex| vertex.name.contains("sh -c")));
    for allowed in [vec![], vec![""]] {
        let error = said(&["v.com/gone"], &allowed).unwrap_err().to_string();
        assert!(
            error.contains("required device \"v.com/gone\" is not registered; ")
                && error.contains("cdi/bad.json: "),
            "{error}"
        );
    }
    let mut graph = Graph::default();
    let mut op = with_devices(script, &["v.com/gone"]);
    op.cdi_devices[0].optional = true;
    let step = graph.exec(op, &[]);
    let results = room.solve(&graph, &[(&step, 0)], Services::default()).unwrap();
    assert!(read(&results[0], "out").unwrap().starts_with("- "));
}

fn parts_of_the_context_count_alone() {
    let room = Room::new();
    fs::write(room.path("context/used"), "1").unwrap();
    fs::write(room.path("context/other"), "1").unwrap();
    let mut graph = Graph::default();
    let context = graph.local("context");
    let part = pb::Mount {
        input: 1,
        selector: "/used".into(),
        readonly: true,
        ..mount("/m", pb::MountType::Bind)
    };
    let step =
        graph.step("cat /m /proc/sys/kernel/random/uuid > /out", vec![part], &[(&context, 0)]);
    let first = read(&room.ok(&graph, &step), "out").unwrap();
    fs::write(room.path("context/other"), "2").unwrap();
    assert_eq!(read(&room.ok(&graph, &step), "out").unwrap(), first);
    fs::write(room.path("context/used"), "2").unwrap();
    assert_ne!(read(&room.ok(&graph, &step), "out").unwrap(), first);
}

/// A step whose mounts are the same as before stays known, even if what made them had to run again.
fn mounted_parts_of_steps_count_by_content() {
    let room = Room::new();
    fs::write(room.path("context/bust"), "1").unwrap();
    let mut graph = Graph::default();
    let context = graph.local("context");
    let all = pb::Mount { input: 1, readonly: true, ..mount("/c", pb::MountType::Bind) };
    let made = |graph: &mut Graph, text: &str| {
        let script = format!("cat /c/bust > /seen; mkdir /d; echo {text} > /d/f");
        graph.step(&script, vec![all.clone()], &[(&context, 0)])
    };
    let reads = |graph: &mut Graph, from: &Node| {
        let part =
            pb::Mount { input: 1, selector: "/d".into(), ..mount("/m", pb::MountType::Bind) };
        let script = "echo x > /m/mine; cat /m/f /proc/sys/kernel/random/uuid > /out";
        graph.step(script, vec![part], &[(from, 0)])
    };
    let source = made(&mut graph, "same");
    let step = reads(&mut graph, &source);
    let first = read(&room.ok(&graph, &step), "out").unwrap();
    assert_eq!(read(&room.ok(&graph, &step), "out").unwrap(), first);
    fs::write(room.path("context/bust"), "2").unwrap();
    assert_eq!(read(&room.ok(&graph, &step), "out").unwrap(), first);
    assert_eq!(read(&room.ok(&graph, &source), "seen").as_deref(), Some("2"));
    let source = made(&mut graph, "other");
    let step = reads(&mut graph, &source);
    let other = read(&room.ok(&graph, &step), "out").unwrap();
    assert!(other.starts_with("other\n"), "{other}");
}

fn a_layer_is_what_its_step_has_changed() {
    let room = Room::new();
    let mut graph = Graph::default();
    let first = graph.step("echo kept > /kept; mkdir /made; echo 1 > /made/one", vec![], &[]);
    let script = "busybox mv /kept /k && busybox mv /k /kept && rm -r /made && mkdir /made && echo 2 > /made/two";
    let second = graph.add(pb::op::Op::Exec(shell(script, vec![])), &[(&first, 0)]);
    let result = room.ok(&graph, &second);
    assert_eq!(read(&result, "kept").as_deref(), Some("kept"));
    assert_eq!(read(&result, "made/one"), None);
    let (store, Snapshot { layers }) = &result;
    let folder = store.layer_folder(*layers.last().unwrap());
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = entries.collect();
        names.sort();
        names
    };
    assert_eq!(names(&folder), ["made"]);
    assert_eq!(names(&folder.join("made")), ["one", "two"]);
    // So on other layers it hides nothing of theirs.
    let third = graph.step("mkdir /made; echo 3 > /made/three; echo other > /kept", vec![], &[]);
    let (_, other) = room.ok(&graph, &third);
    let merged = Snapshot { layers: vec![*other.layers.last().unwrap(), *layers.last().unwrap()] };
    let merged = (store.clone(), merged);
    assert_eq!(read(&merged, "made/three").as_deref(), Some("3"));
    assert_eq!(read(&merged, "made/two").as_deref(), Some("2"));
    assert_eq!(read(&merged, "kept").as_deref(), Some("other"));
}
