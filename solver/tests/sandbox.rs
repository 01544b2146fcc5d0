//! The sandbox for real: needs root, and the Debian packages busybox-static and qemu-user-static.
//!
//! Not the usual test harness: this program must be able to serve as the sandbox helper before any thread starts.
#![expect(
    clippy::unwrap_used,
    reason = "all of it is tests, without the harness that clippy knows tests by"
)]

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use slipway_solver::executor::{
    ExecError, ExecMount, ExecMountKind, ExecSpec, Executor, Exit, Network, Process,
    SandboxExecutor, SandboxOptions, Stdio, Stream, StreamReader, Writable, helper_main, is_helper,
    pipes, prepare_stub, remove_stubs, terminal,
};
use slipway_spec::platform::Platform;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;

const BUSYBOX: &str = "/bin/busybox";

fn main() -> ExitCode {
    if is_helper(std::env::args_os()) {
        helper_main()
    }
    let tests: &[(&str, fn())] = &[
        ("exit_codes_and_signals_are_reported", exit_codes_and_signals_are_reported),
        ("output_arrives_whole_and_by_stream", output_arrives_whole_and_by_stream),
        ("environment_folder_and_user_are_set", environment_folder_and_user_are_set),
        ("bad_users_and_folders_are_errors", bad_users_and_folders_are_errors),
        (
            "a_working_directory_that_is_not_there_is_made",
            a_working_directory_that_is_not_there_is_made,
        ),
        ("writes_land_in_the_upper_folder_only", writes_land_in_the_upper_folder_only),
        ("commands_that_cannot_run_say_why", commands_that_cannot_run_say_why),
        ("without_a_network_only_loopback_is_there", without_a_network_only_loopback_is_there),
        ("dropping_a_run_kills_all_its_processes", dropping_a_run_kills_all_its_processes),
        ("what_a_command_leaves_behind_is_killed", what_a_command_leaves_behind_is_killed),
        ("no_mount_is_left_on_the_host", no_mount_is_left_on_the_host),
        ("only_standard_descriptors_are_open", only_standard_descriptors_are_open),
        ("the_sandbox_program_cannot_be_overwritten", the_sandbox_program_cannot_be_overwritten),
        ("masked_and_read_only_paths_hold", masked_and_read_only_paths_hold),
        ("fourteen_capabilities_and_a_filter", fourteen_capabilities_and_a_filter),
        ("namespaces_and_mounts_are_refused", namespaces_and_mounts_are_refused),
        ("insecure_steps_may_mount", insecure_steps_may_mount),
        ("device_nodes_can_be_made_but_not_opened", device_nodes_can_be_made_but_not_opened),
        ("hundreds_of_layers_work", hundreds_of_layers_work),
        ("images_cannot_redirect_our_mounts", images_cannot_redirect_our_mounts),
        ("mounts_of_every_kind_work", mounts_of_every_kind_work),
        ("a_swapped_source_never_shows_the_host", a_swapped_source_never_shows_the_host),
        ("mount_points_leave_no_trace", mount_points_leave_no_trace),
        ("hosts_and_host_name_are_the_steps_own", hosts_and_host_name_are_the_steps_own),
        ("a_read_only_root_refuses_writes", a_read_only_root_refuses_writes),
        ("a_terminal_becomes_the_steps_own", a_terminal_becomes_the_steps_own),
        ("processes_join_another", processes_join_another),
        ("what_joins_has_no_more_rights", what_joins_has_no_more_rights),
        ("what_joined_ends_with_the_first", what_joined_ends_with_the_first),
        ("signals_and_sizes_reach_a_process", signals_and_sizes_reach_a_process),
        ("a_process_that_cannot_start_says_why", a_process_that_cannot_start_says_why),
        ("many_steps_run_at_once", many_steps_run_at_once),
        ("a_killed_helper_is_replaced", a_killed_helper_is_replaced),
        ("foreign_programs_run_emulated", foreign_programs_run_emulated),
        ("the_emulator_cannot_be_overwritten", the_emulator_cannot_be_overwritten),
        ("the_host_has_no_new_registration", the_host_has_no_new_registration),
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

/// A folder with a busybox image and everything a step needs.
struct Scratch {
    folder: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "the sandbox tests need root");
        assert!(
            Path::new(BUSYBOX).exists(),
            "{BUSYBOX} is missing: install the Debian package busybox-static"
        );
        let folder = tempfile::tempdir().unwrap();
        let scratch = Self { folder };
        let base = scratch.path("base");
        for name in ["bin", "etc", "root", "tmp", "srv/app"] {
            fs::create_dir_all(base.join(name)).unwrap();
        }
        fs::copy(BUSYBOX, base.join("bin/busybox")).unwrap();
        for applet in applets() {
            let _exists = symlink("busybox", base.join("bin").join(applet));
        }
        fs::write(
            base.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/srv/app:/bin/sh\n",
        )
        .unwrap();
        fs::write(base.join("etc/group"), "root:x:0:\nstaff:x:50:app\napp:x:1001:\n").unwrap();
        prepare_stub(&scratch.path("stub")).unwrap();
        scratch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn made(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// A step that runs a shell script; its folders carry `name`.
    fn spec(&self, name: &str, script: &str) -> ExecSpec {
        ExecSpec {
            lower: vec![self.path("base")],
            stub: self.path("stub"),
            upper: self.made(&format!("{name}-upper")),
            work: self.made(&format!("{name}-work")),
            args: ["sh", "-c", script].map(Into::into).into(),
            env: vec!["PATH=/usr/bin:/bin".into()],
            network: Network::Host,
            ..ExecSpec::default()
        }
    }

    fn shell(&self, script: &str) -> Ran {
        run(self.spec("step", script))
    }
}

fn applets() -> &'static Vec<String> {
    static APPLETS: OnceLock<Vec<String>> = OnceLock::new();
    APPLETS.get_or_init(|| {
        let output = Command::new(BUSYBOX).arg("--list").output().unwrap();
        String::from_utf8(output.stdout).unwrap().lines().map(Into::into).collect()
    })
}

fn executor() -> SandboxExecutor {
    SandboxExecutor::new(SandboxOptions::default())
}

struct Ran {
    result: Result<Exit, ExecError>,
    stdout: String,
    stderr: String,
}

impl Ran {
    #[track_caller]
    fn out(&self) -> &str {
        assert_eq!(self.code(), 0, "{}{}", self.stdout, self.stderr);
        self.stdout.trim_end()
    }

    #[track_caller]
    fn code(&self) -> i32 {
        match &self.result {
            Ok(exit) => exit.code,
            Err(error) => panic!("{error}"),
        }
    }

    #[track_caller]
    fn error(&self) -> &ExecError {
        self.result.as_ref().expect_err("it ran")
    }
}

async fn run_with(executor: &SandboxExecutor, spec: ExecSpec) -> Ran {
    let (sink, mut source) = mpsc::channel::<(Stream, bytes::Bytes)>(16);
    let collect = async {
        let (mut stdout, mut stderr) = (vec![], vec![]);
        while let Some((stream, bytes)) = source.recv().await {
            if stream == Stream::Stdout { &mut stdout } else { &mut stderr }
                .extend_from_slice(&bytes);
        }
        (
            String::from_utf8_lossy(&stdout).into_owned(),
            String::from_utf8_lossy(&stderr).into_owned(),
        )
    };
    let (result, (stdout, stderr)) = tokio::join!(executor.run(spec, Stdio::Piped(sink)), collect);
    Ran { result, stdout, stderr }
}

fn block_on<F: Future>(future: F) -> F::Output {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_secs(60), future).await.expect("it hangs")
    })
}

fn run(spec: ExecSpec) -> Ran {
    block_on(async { run_with(&executor(), spec).await })
}

fn mount(dest: &str, kind: ExecMountKind) -> ExecMount {
    ExecMount { dest: dest.into(), kind }
}

fn exit_codes_and_signals_are_reported() {
    let scratch = Scratch::new();
    assert_eq!(scratch.shell("exit 0").code(), 0);
    assert_eq!(scratch.shell("exit 42").code(), 42);
    // The first process of its namespace survives what it sends itself; a child does not.
    assert_eq!(scratch.shell("sh -c 'kill -KILL $$'; exit $?").code(), 137);
    assert_eq!(scratch.shell("echo $$").out(), "1");
}

fn output_arrives_whole_and_by_stream() {
    let scratch = Scratch::new();
    let ran = scratch.shell("echo out; echo err >&2; cat");
    assert_eq!((ran.out(), ran.stderr.as_str()), ("out", "err\n"));
    let ran = scratch.shell("yes 0123456789abcde | head -c 8000000");
    assert_eq!(ran.stdout.len(), 8_000_000);
    assert!(ran.stdout.lines().all(|line| line == "0123456789abcde"));
}

fn environment_folder_and_user_are_set() {
    let scratch = Scratch::new();
    let mut spec = scratch.spec("env", "env | sort | grep -v -e ^SHLVL -e ^OLDPWD; id; pwd; umask");
    spec.env.push("NAME=a value".into());
    spec.cwd = "/srv/app".into();
    spec.user = "app".into();
    assert_eq!(
        run(spec).out(),
        "HOME=/srv/app\nNAME=a value\nPATH=/usr/bin:/bin\nPWD=/srv/app\n\
         uid=1000(app) gid=1001(app) groups=50(staff)\n/srv/app\n0022"
    );
    let mut spec = scratch.spec("numeric", "id -u; id -g; id -G; grep Cap /proc/self/status");
    spec.user = "1234:50".into();
    let ran = run(spec);
    let lines: Vec<&str> = ran.out().lines().collect();
    assert_eq!(lines[..3], ["1234", "50", "50"]);
    assert_eq!(lines[5], "CapEff:\t0000000000000000");
}

fn bad_users_and_folders_are_errors() {
    let scratch = Scratch::new();
    for user in ["nobody", "4294967296", "-1", "app:none"] {
        let ran = run(ExecSpec { user: user.into(), ..scratch.spec("user", "true") });
        assert!(
            matches!(ran.error(), ExecError::User { user: named, .. } if named == user),
            "{user}"
        );
    }
    fs::remove_file(scratch.path("base/etc/passwd")).unwrap();
    Command::new("mkfifo").arg(scratch.path("base/etc/passwd")).status().unwrap();
    let ran = run(ExecSpec { user: "app".into(), ..scratch.spec("fifo", "true") });
    assert!(ran.error().to_string().contains("not a regular file"), "{}", ran.error());

    let folders = (0..64).map(|n| format!("/proc/self/fd/{n}"));
    for cwd in folders.chain(["/etc/group".into(), "/proc/1/cwd".into(), "/proc/none".into()]) {
        let ran = run(ExecSpec { cwd: cwd.clone(), ..scratch.spec("cwd", "pwd") });
        assert!(matches!(ran.error(), ExecError::WorkingDirectory { .. }), "{cwd}");
    }
}

fn a_working_directory_that_is_not_there_is_made() {
    let scratch = Scratch::new();
    let mut spec = scratch.spec("made", "pwd; touch here; stat -c '%a %U' . ..; stat -c %U /");
    (spec.cwd, spec.user) = ("/new/deep".into(), "app".into());
    let upper = spec.upper.clone();
    let ran = run(spec);
    assert_eq!(ran.out(), "/new/deep\n755 app\n755 app\nroot");
    // It is part of what the step made.
    assert_eq!(fs::read_dir(upper.join("new/deep")).unwrap().count(), 1);
}

fn writes_land_in_the_upper_folder_only() {
    let scratch = Scratch::new();
    scratch
        .shell("echo new > /etc/new; rm /etc/group; chown 33:44 /etc/passwd; mkdir -m 711 /made")
        .out();
    let upper = scratch.path("step-upper");
    assert_eq!(fs::read_to_string(upper.join("etc/new")).unwrap(), "new\n");
    assert!(fs::symlink_metadata(upper.join("etc/group")).unwrap().file_type().is_char_device());
    let passwd = fs::metadata(upper.join("etc/passwd")).unwrap();
    assert_eq!((passwd.uid(), passwd.gid()), (33, 44));
    assert_eq!(fs::metadata(upper.join("made")).unwrap().permissions().mode() & 0o7777, 0o711);
    let mut names: Vec<_> = fs::read_dir(&upper).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["etc", "made"]);
    assert!(scratch.path("base/etc/group").exists() && !scratch.path("base/etc/new").exists());
    // The same folders can be mounted again.
    assert_eq!(scratch.shell("cat /etc/new").out(), "new");
}

fn commands_that_cannot_run_say_why() {
    let scratch = Scratch::new();
    let base = scratch.path("base");
    let program = |name: &str, content: &[u8], mode: u32| {
        fs::write(base.join("bin").join(name), content).unwrap();
        fs::set_permissions(base.join("bin").join(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    program("denied", b"#!/bin/sh\n", 0o644);
    program("orphan", b"#!/none\n", 0o755);
    program("text", b"\x01\x02\x03", 0o755);
    let error = |args: &[&str]| {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        run(ExecSpec { args, ..scratch.spec("missing", "") }).result.expect_err("it ran")
    };
    let missing = error(&["no-such-command"]);
    assert!(matches!(missing, ExecError::CommandNotFound { .. }), "{missing}");
    assert_eq!(
        missing.to_string(),
        "exec: \"no-such-command\": executable file not found in $PATH"
    );
    assert_eq!(missing.exit_code(), Some(127));
    assert!(matches!(error(&["/none/such"]), ExecError::CommandNotFound { .. }));
    assert!(matches!(error(&["denied"]), ExecError::NotExecutable { .. }));
    assert!(matches!(error(&["orphan"]), ExecError::InterpreterMissing { .. }));
    let format = error(&["text"]);
    assert!(matches!(format, ExecError::ExecFormat { .. }), "{format}");
    assert!(format.to_string().contains("exec format error"), "{format}");
    assert!(matches!(error(&[]), ExecError::Setup { .. }));
}

fn without_a_network_only_loopback_is_there() {
    let scratch = Scratch::new();
    let mut spec = scratch.spec(
        "net",
        "ls /sys/class/net; ip addr show lo | grep -c 127.0.0.1; wc -c < /etc/resolv.conf",
    );
    spec.network = Network::None;
    assert_eq!(run(spec).out(), "lo\n1\n0");
}

/// Processes on the host whose command line contains `word`.
fn processes(word: &str) -> usize {
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter(|entry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(word)
            && entry.file_name() != *std::process::id().to_string()
    })
    .count()
}

fn dropping_a_run_kills_all_its_processes() {
    let scratch = Scratch::new();
    block_on(async {
        let executor = executor();
        let spec = scratch.spec(
            "drop",
            "setsid sh -c 'sleep 7654321' & (sleep 7654321 &) ; echo up; sleep 7654321",
        );
        let (sink, mut source) = mpsc::channel(16);
        let mut step = executor.run(spec, Stdio::Piped(sink));
        tokio::select! {
            _ = &mut step => panic!("it ended"),
            chunk = source.recv() => assert_eq!(&chunk.unwrap().1[..], b"up\n"),
        }
        let start = Instant::now();
        while processes("7654321") < 3 {
            assert!(start.elapsed() < Duration::from_secs(10), "{}", processes("7654321"));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(step);
        assert_eq!(processes("7654321"), 0);
        // The helper lives on.
        assert_eq!(run_with(&executor, scratch.spec("next", "echo fine")).await.out(), "fine");
    });
}

fn what_a_command_leaves_behind_is_killed() {
    let scratch = Scratch::new();
    let start = Instant::now();
    scratch.shell("setsid sleep 1234567 & exit 0").out();
    assert_eq!(processes("1234567"), 0);
    assert!(start.elapsed() < Duration::from_secs(10));
}

fn no_mount_is_left_on_the_host() {
    let scratch = Scratch::new();
    scratch.shell("true").out();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(scratch.folder.path().to_str().unwrap()), "{mounts}");
    assert!(!mounts.contains("binfmt_misc"), "{mounts}");
}

fn only_standard_descriptors_are_open() {
    let scratch = Scratch::new();
    // A descriptor that the parent forgot to protect must not get there either.
    let leaked = fs::File::open("/").unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    // 3 is the folder that ls itself reads.
    assert_eq!(scratch.shell("ls /proc/self/fd").out(), "0\n1\n2\n3");
    let mut spec = scratch.spec("emulated-fds", "ls /proc/self/fd");
    spec.platform = Platform::new("linux", "arm64", None);
    assert_eq!(run(spec).out(), "0\n1\n2\n3");
}

fn the_sandbox_program_cannot_be_overwritten() {
    let scratch = Scratch::new();
    let own = fs::read("/proc/self/exe").unwrap();
    // A script whose interpreter is "this program", which at that moment still is the sandbox.
    fs::write(scratch.path("base/bin/trick"), "#!/proc/self/exe\n").unwrap();
    fs::set_permissions(scratch.path("base/bin/trick"), fs::Permissions::from_mode(0o755)).unwrap();
    let script = "trick --list >/dev/null & n=0; while [ $n -lt 3000 ]; do n=$((n+1)); \
                  for p in /proc/[0-9]*; do case \"$(readlink $p/exe)\" in *busybox|'') ;; \
                  *) echo saw; exec 7<$p/exe && sleep 1; (echo x > /proc/self/fd/7) 2>&1; exit;; esac; done; done";
    let _raced = scratch.shell(script);
    for args in [vec!["/proc/self/exe", "--list"], vec!["/bin/trick", "--list"]] {
        let args = args.into_iter().map(Into::into).collect();
        let _either = run(ExecSpec { args, ..scratch.spec("trick", "") });
    }
    assert!(own == fs::read("/proc/self/exe").unwrap());
    // Seen from the host: the helper's program is on a read-only mount.
    let executor = executor();
    block_on(async {
        let _ran = run_with(&executor, scratch.spec("start", "true")).await;
        let helper = helper_of_this_process();
        let mount = rustix::fs::statvfs(format!("/proc/{helper}/exe")).unwrap();
        assert!(mount.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
    });
}

fn helper_of_this_process() -> u32 {
    let own = std::process::id().to_string();
    let children = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:\t"))?;
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        (parent == own && line.starts_with(b"slipway-sandbox")).then_some(pid)
    });
    children.max().expect("no helper runs")
}

fn masked_and_read_only_paths_hold() {
    let scratch = Scratch::new();
    assert_eq!(
        scratch.shell("cat /proc/interrupts /proc/keys /proc/timer_list 2>/dev/null | wc -c").out(),
        "0"
    );
    assert_eq!(
        scratch.shell("ls -A /sys/firmware /proc/scsi 2>/dev/null | grep -v : | wc -w").out(),
        "0"
    );
    for path in [
        "/proc/sys/kernel/hostname",
        "/proc/sysrq-trigger",
        "/sys/kernel/uevent_helper",
        "/etc/hosts",
    ] {
        assert_ne!(scratch.shell(&format!("echo x > {path}")).code(), 0, "{path}");
    }
    assert_eq!(
        scratch.shell("ls /dev").out(),
        "fd\nfull\nmqueue\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero"
    );
    assert_eq!(
        scratch
            .shell(
                "echo x > /dev/null; head -c 4 /dev/zero | wc -c; head -c 4 /dev/urandom | wc -c"
            )
            .out(),
        "4\n4"
    );
    // Only the step's own process is to be seen.
    assert_eq!(scratch.shell("echo /proc/[0-9]*").out(), "/proc/1");
}

fn fourteen_capabilities_and_a_filter() {
    let scratch = Scratch::new();
    let status = "grep -e ^Cap -e ^Seccomp: -e ^NoNewPrivs /proc/self/status";
    let expected = "CapInh:\t0000000000000000\nCapPrm:\t00000000a80425fb\nCapEff:\t00000000a80425fb\n\
                    CapBnd:\t00000000a80425fb\nCapAmb:\t0000000000000000\nNoNewPrivs:\t0\nSeccomp:\t2";
    assert_eq!(scratch.shell(status).out(), expected);
    let mut spec = scratch.spec("emulated-caps", status);
    spec.platform = Platform::new("linux", "arm64", None);
    assert_eq!(run(spec).out(), expected);
}

fn namespaces_and_mounts_are_refused() {
    let scratch = Scratch::new();
    for command in [
        "unshare -m true",
        "unshare -U true",
        "mount -t tmpfs none /tmp",
        "umount /proc",
        "hostname x",
    ] {
        let ran = scratch.shell(command);
        assert_ne!(ran.code(), 0, "{command}");
        let said = ran.stderr.to_lowercase();
        assert!(
            said.contains("not permitted") || said.contains("denied") || said.contains("root"),
            "{said}"
        );
    }
}

fn insecure_steps_may_mount() {
    let scratch = Scratch::new();
    let script =
        "mount -t tmpfs none /tmp && echo mounted; grep -c '^Seccomp:.0' /proc/self/status";
    let spec = ExecSpec { insecure: true, ..scratch.spec("insecure", script) };
    assert_eq!(run(spec).out(), "mounted\n1");
}

fn device_nodes_can_be_made_but_not_opened() {
    let scratch = Scratch::new();
    for folder in ["/", "/dev", "/dev/shm", "/tmp", "/cache"] {
        let mut spec =
            scratch.spec("node", &format!("mknod {folder}/node c 1 3 && cat {folder}/node"));
        spec.mounts = vec![
            mount("/tmp", ExecMountKind::Tmpfs { size: None }),
            mount(
                "/cache",
                ExecMountKind::Bind {
                    source: scratch.made("cache"),
                    subpath: None,
                    readonly: false,
                },
            ),
        ];
        let ran = run(spec);
        assert!(ran.code() != 0 && ran.stderr.contains("can't open"), "{folder}: {}", ran.stderr);
        let _left = fs::remove_file(scratch.path("node-upper/node"));
        let _left = fs::remove_file(scratch.path("cache/node"));
    }
}

fn hundreds_of_layers_work() {
    let scratch = Scratch::new();
    let mut spec = scratch.spec("layers", "ls /layers | wc -l; cat /layers/top");
    for number in 0..300 {
        let layer = scratch.made(&format!("a-rather-long-name-for-one-layer-of-many-{number:060}"));
        fs::create_dir(layer.join("layers")).unwrap();
        fs::write(layer.join("layers").join(number.to_string()), "").unwrap();
        fs::write(layer.join("layers/top"), number.to_string()).unwrap();
        spec.lower.push(layer);
    }
    // A layer that comes twice.
    spec.lower.push(spec.lower[1].clone());
    assert_eq!(run(spec).out(), "301\n0");
}

fn images_cannot_redirect_our_mounts() {
    for place in ["proc", "sys", "dev"] {
        let scratch = Scratch::new();
        let elsewhere = scratch.made("base/elsewhere");
        symlink("/elsewhere", scratch.path("base").join(place)).unwrap();
        let error = scratch.shell("true").result.expect_err("it ran").to_string();
        assert!(error.contains("must not be a link") && error.contains(place), "{error}");
        assert_eq!(fs::read_dir(elsewhere).unwrap().count(), 0);
    }
    // Elsewhere links are fine, and stay inside.
    let scratch = Scratch::new();
    symlink("../../../../../run/resolve.conf", scratch.path("base/etc/resolv.conf")).unwrap();
    let mut spec = scratch.spec("link", "cat /run/resolve.conf");
    spec.resolv_conf = Some("nameserver 192.0.2.1\n".into());
    assert_eq!(run(spec).out(), "nameserver 192.0.2.1");
}

fn mounts_of_every_kind_work() {
    let scratch = Scratch::new();
    fs::write(scratch.made("data/sub").join("file"), "data").unwrap();
    symlink("/sub", scratch.path("data/inner")).unwrap();
    symlink("/etc", scratch.path("data/outer")).unwrap();
    fs::write(scratch.made("l1/d").join("one"), "1").unwrap();
    fs::write(scratch.made("l2/d").join("two"), "2").unwrap();
    let overlay = |writable: Option<Writable>, subpath: Option<&str>| ExecMountKind::Overlay {
        lower: vec![scratch.path("l1"), scratch.path("l2")],
        readonly: writable.is_none(),
        writable,
        subpath: subpath.map(Into::into),
    };
    let bind = |subpath: Option<&str>, readonly| ExecMountKind::Bind {
        source: scratch.path("data"),
        subpath: subpath.map(Into::into),
        readonly,
    };
    let writable = Writable { upper: scratch.made("o-upper"), work: scratch.made("o-work") };
    let secret = ExecMountKind::File { content: b"hush".into(), mode: 0o400, uid: 1000, gid: 50 };
    let script = "cat /bind/sub/file /file /in/file; (echo x > /bind/x) 2>&1 | grep -o 'Read-only'; echo y > /rw/y
        ls /over; ls /part; echo 3 > /write/three; ls /write; cat /run/secrets/key; stat -c '%a %u %g' /run/secrets/key
        df -k /small | tail -1 | awk '{print $2}'; stat -c %a /small; (echo z > /part/z) 2>&1 | grep -o 'Read-only'
        touch /bind/nested/ok && echo nested";
    let mut spec = scratch.spec("mounts", script);
    spec.mounts = vec![
        mount("/bind/nested", ExecMountKind::Tmpfs { size: None }),
        mount("/bind", bind(None, true)),
        mount("/rw", bind(None, false)),
        mount("/file", bind(Some("sub/file"), true)),
        mount("/in", bind(Some("inner"), true)),
        mount("/over", overlay(None, Some("d"))),
        mount("/part", overlay(None, Some("/d"))),
        mount("/write", overlay(Some(writable), Some("d"))),
        mount("/run/secrets/key", secret),
        mount("/small", ExecMountKind::Tmpfs { size: Some(1 << 20) }),
    ];
    fs::create_dir(scratch.path("data/nested")).unwrap();
    assert_eq!(
        run(spec).out(),
        "datadatadataRead-only\none\ntwo\none\ntwo\none\nthree\ntwo\nhush400 1000 50\n1024\n1777\nRead-only\nnested"
    );
    assert_eq!(fs::read_to_string(scratch.path("data/y")).unwrap(), "y\n");
    assert_eq!(fs::read_to_string(scratch.path("o-upper/d/three")).unwrap(), "3\n");
    // Nothing at all can be mounted, too.
    let nothing =
        ExecMountKind::Overlay { lower: vec![], writable: None, subpath: None, readonly: true };
    let script = "ls /nothing; (echo z > /nothing/z) 2>&1 | grep -o 'Read-only'";
    let mut spec = scratch.spec("nothing", script);
    spec.mounts = vec![mount("/nothing", nothing)];
    assert_eq!(run(spec).out(), "Read-only");
    // A link in a source is resolved inside that source: there is no /etc in it.
    let mut spec = scratch.spec("escape", "true");
    spec.mounts = vec![mount("/x", bind(Some("outer"), true))];
    assert!(run(spec).error().to_string().contains("open in the source"));
}

fn a_swapped_source_never_shows_the_host() {
    let scratch = Scratch::new();
    // What another step that shares the cache could do while ours starts: a folder becomes a link to the host's root.
    let cache = scratch.made("cache");
    fs::create_dir_all(cache.join("a/inner")).unwrap();
    symlink("/", cache.join("b")).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(
                    rustix::fs::CWD,
                    cache.join("a"),
                    rustix::fs::CWD,
                    cache.join("b"),
                    flags,
                )
                .unwrap();
            }
        });
        let seen: Vec<String> = block_on(async {
            let executor = executor();
            let mut seen = vec![];
            for n in 0..150 {
                let mut spec =
                    scratch.spec(&format!("swap{n}"), "ls -A /sub /cache/a/inner 2>&1; true");
                let bind = |subpath: Option<&str>| ExecMountKind::Bind {
                    source: cache.clone(),
                    subpath: subpath.map(Into::into),
                    readonly: false,
                };
                spec.mounts = vec![
                    mount("/sub", bind(Some("a"))),
                    mount("/cache", bind(None)),
                    mount("/cache/a/inner", ExecMountKind::Tmpfs { size: None }),
                ];
                let ran = run_with(&executor, spec).await;
                seen.push(ran.stdout);
            }
            seen
        });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        for text in seen {
            // The host's root has these; nothing that the step may see does.
            assert!(
                !text.contains("boot") && !text.contains("work") && !text.contains("lost+found"),
                "{text}"
            );
        }
    });
}

fn mount_points_leave_no_trace() {
    let scratch = Scratch::new();
    let mut spec = scratch
        .spec("stubs", "touch /root/.cache/tool/x; mkdir -p /made; echo kept > /opt/deep/kept");
    spec.mounts = vec![
        mount("/root/.cache/tool", ExecMountKind::Tmpfs { size: None }),
        mount("/opt/deep/er", ExecMountKind::Tmpfs { size: None }),
        mount("relative", ExecMountKind::Tmpfs { size: None }),
    ];
    let before = fs::metadata(scratch.path("base/root")).unwrap().modified().unwrap();
    let ran = run(spec);
    ran.out();
    let stubs = ran.result.unwrap().created_stubs;
    let paths: Vec<&str> = stubs.iter().map(|stub| stub.path.as_str()).collect();
    assert_eq!(
        paths,
        ["opt", "opt/deep", "opt/deep/er", "relative", "root/.cache", "root/.cache/tool"]
    );
    let upper = scratch.path("stubs-upper");
    remove_stubs(&upper, &stubs).unwrap();
    let find = Command::new("find")
        .arg(&upper)
        .args(["-mindepth", "1", "-printf", "%P\n"])
        .output()
        .unwrap();
    let mut left: Vec<String> =
        String::from_utf8(find.stdout).unwrap().lines().map(Into::into).collect();
    left.sort();
    // The folder that held a mount point was copied up, unchanged.
    assert_eq!(left, ["made", "opt", "opt/deep", "opt/deep/kept", "root"]);
    assert_eq!(fs::metadata(upper.join("root")).unwrap().modified().unwrap(), before);
}

fn hosts_and_host_name_are_the_steps_own() {
    let scratch = Scratch::new();
    let mut spec = scratch.spec("hosts", "hostname; cat /etc/hosts");
    spec.extra_hosts = vec![("registry.test".into(), "192.0.2.7".into())];
    assert_eq!(
        run(spec).out(),
        "buildkitsandbox\n127.0.0.1\tlocalhost buildkitsandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         192.0.2.7\tregistry.test"
    );
    let spec = ExecSpec {
        hostname: "other".into(),
        ..scratch.spec("name", "hostname; grep -c other /etc/hosts")
    };
    assert_eq!(run(spec).out(), "other\n1");
}

fn a_read_only_root_refuses_writes() {
    let scratch = Scratch::new();
    let mut spec = scratch.spec("ro", "echo x > /tmp/x && echo y > /etc/y");
    spec.readonly_root = true;
    spec.mounts = vec![mount("/tmp", ExecMountKind::Tmpfs { size: None })];
    let ran = run(spec);
    assert!(ran.code() != 0 && ran.stderr.contains("/etc/y: Read-only"), "{}", ran.stderr);
}

fn a_terminal_becomes_the_steps_own() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let scratch = Scratch::new();
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let theirs =
        rustix::fs::open(ptsname(&ours, vec![]).unwrap(), flags, rustix::fs::Mode::empty())
            .unwrap();
    let mut spec =
        scratch.spec("tty", "tty; test -t 0 && echo yes > /dev/tty; read line; echo got $line");
    spec.tty = true;
    rustix::io::write(&ours, b"typed\n").unwrap();
    let stdio = Stdio::Files {
        stdin: theirs.try_clone().unwrap(),
        stdout: theirs.try_clone().unwrap(),
        stderr: theirs,
    };
    let exit = block_on(async { executor().run(spec, stdio).await }).unwrap();
    assert_eq!(exit.code, 0);
    let mut text = [0; 256];
    let mut shown = String::new();
    while let Ok(count) = rustix::io::read(&ours, &mut text)
        && count > 0
    {
        shown.push_str(&String::from_utf8_lossy(&text[..count]));
    }
    assert_eq!(shown.replace('\r', ""), "typed\n/dev/console\nyes\ngot typed\n");
}

/// Reads to the end of a process, and waits for it.
async fn finish(mut process: Process, mut stdout: StreamReader) -> (String, i32) {
    let mut text = String::new();
    let (read, exit) = tokio::join!(stdout.read_to_string(&mut text), process.wait());
    read.unwrap();
    (text, exit.unwrap().code)
}

fn processes_join_another() {
    let scratch = Scratch::new();
    block_on(async {
        let executor = executor();
        let mut spec = scratch.spec("first", "echo one > /shared; sleep 1000; : joined-0");
        spec.network = Network::None;
        spec.hostname = "here".into();
        spec.mounts = vec![mount("/mnt", ExecMountKind::Tmpfs { size: None })];
        let first = executor.start(spec, pipes([false; 3]).unwrap().files).await.unwrap();
        let script = "while ! test -s /shared; do sleep 0.01; done; hostname; cat /shared /proc/1/comm; \
                      grep -c ' /mnt ' /proc/mounts; grep -c : /proc/net/dev; id -u; pwd; ls -d /proc/[0-9]* | wc -l; \
                      ls /proc/self/fd | wc -l; cat; exit 7";
        let mut spec = scratch.spec("second", script);
        (spec.cwd, spec.user) = ("/srv".into(), "app".into());
        let mut io = pipes([true, true, false]).unwrap();
        let second = executor.join(first.handle(), spec, io.files).await.unwrap();
        let mut stdin = io.stdin.take().unwrap();
        stdin.write_all(b"typed").await.unwrap();
        drop(stdin);
        let (text, code) = finish(second, io.stdout.unwrap()).await;
        assert_eq!(text, "here\none\nsh\n1\n1\n1000\n/srv\n5\n4\ntyped");
        assert_eq!(code, 7);

        // Another one sees what the one before did, and the first goes on.
        for n in 0..3 {
            let script = format!("echo {n} >> /shared; wc -l < /shared");
            let io = pipes([false, true, false]).unwrap();
            let spec = scratch.spec(&format!("more{n}"), &script);
            let process = executor.join(first.handle(), spec, io.files).await.unwrap();
            let (text, code) = finish(process, io.stdout.unwrap()).await;
            assert_eq!((text.trim(), code), (format!("{}", n + 2).as_str(), 0));
        }
        // A step of its own is none of its processes.
        assert_eq!(run_with(&executor, scratch.spec("alone", "echo $$")).await.out(), "1");
    });
    assert_eq!(processes("joined-0"), 0);
}

fn what_joins_has_no_more_rights() {
    let scratch = Scratch::new();
    let status = "grep -e ^Cap -e ^Seccomp: -e ^NoNewPrivs /proc/self/status; readlink /proc/self/ns/*; \
                  cat /proc/kcore | wc -c; echo x > /proc/sysrq-trigger";
    let mut arm64 = scratch.spec("emulated-first", "exec sleep 1000");
    arm64.platform = Platform::new("linux", "arm64", None);
    for first in [scratch.spec("first", "exec sleep 1000"), arm64] {
        block_on(async {
            let executor = executor();
            let platform = first.platform.clone();
            let first = executor.start(first, pipes([false; 3]).unwrap().files).await.unwrap();
            let mut seen = vec![];
            for name in ["a", "b"] {
                let io = pipes([false, true, false]).unwrap();
                let mut spec = scratch.spec(name, status);
                spec.platform = platform.clone();
                let process = executor.join(first.handle(), spec, io.files).await.unwrap();
                seen.push(finish(process, io.stdout.unwrap()).await.0);
            }
            assert_eq!(seen[0], seen[1]);
            let mut spec = scratch.spec("alone", status);
            spec.platform = platform.clone();
            let alone = run_with(&executor, spec).await.stdout;
            let rights = |text: &str| -> Vec<String> {
                text.lines().filter(|line| !line.contains(":[")).map(Into::into).collect()
            };
            assert_eq!(rights(&seen[0]), rights(&alone));
            assert_eq!(seen[0].lines().count(), alone.lines().count());
        });
    }
}

fn what_joined_ends_with_the_first() {
    let scratch = Scratch::new();
    block_on(async {
        let executor = executor();
        let join = async |first: &Process, name: &str, script: &str| {
            let spec = scratch.spec(name, script);
            executor.join(first.handle(), spec, pipes([false; 3]).unwrap().files).await
        };
        let start = async |name: &str, script: &str| {
            let spec = scratch.spec(name, script);
            executor.start(spec, pipes([false; 3]).unwrap().files).await.unwrap()
        };
        let mut first = start("first", "sleep 0.3; exit 5").await;
        let mut second = join(&first, "second", "sleep 1001; :").await.unwrap();
        assert_eq!(first.wait().await.unwrap().code, 5);
        assert_eq!(second.wait().await.unwrap().signal, Some(9));
        let late = join(&first, "third", "true").await.unwrap_err();
        assert!(late.to_string().contains("has ended"), "{late}");

        // Dropped, the first takes along what joined it; what joined may go alone.
        let first = start("fourth", "sleep 1002; : joined-2").await;
        let second = join(&first, "fifth", "sleep 1003; : joined-3").await.unwrap();
        let mut third = join(&first, "sixth", "sleep 1004; :").await.unwrap();
        drop(second);
        // It is killed at once, and gone a moment later.
        let began = std::time::Instant::now();
        while processes("joined-3") > 0 && began.elapsed() < Duration::from_secs(10) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!((processes("joined-3"), processes("joined-2")), (0, 1));
        drop(first);
        assert_eq!(third.wait().await.unwrap().signal, Some(9));
        assert_eq!(processes("joined-2"), 0);
    });
}

fn signals_and_sizes_reach_a_process() {
    let scratch = Scratch::new();
    block_on(async {
        let executor = executor();
        let script = "trap 'echo hup' HUP; trap 'stty size; exit 3' TERM; echo ready; \
                      while :; do sleep 0.01; done";
        let mut spec = scratch.spec("first", script);
        spec.tty = true;
        let io = terminal().unwrap();
        let process = executor.start(spec, io.files).await.unwrap();
        let (mut stdout, terminal) = (io.stdout.unwrap(), io.terminal.unwrap());
        terminal.resize(33, 77).unwrap();
        let mut seen = String::new();
        let mut buffer = [0; 100];
        while !seen.contains("ready") {
            let count = stdout.read(&mut buffer).await.unwrap();
            seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
        process.handle().signal(1).unwrap();
        while !seen.contains("hup") {
            let count = stdout.read(&mut buffer).await.unwrap();
            seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
        process.handle().signal(15).unwrap();
        let (rest, code) = finish(process, stdout).await;
        assert_eq!((rest.trim(), code), ("33 77", 3));
    });
}

fn a_process_that_cannot_start_says_why() {
    let scratch = Scratch::new();
    block_on(async {
        let executor = executor();
        let mut spec = scratch.spec("first", "");
        spec.user = "nobody-knows".into();
        let error = executor.start(spec, pipes([false; 3]).unwrap().files).await.unwrap_err();
        assert!(matches!(error, ExecError::User { .. }), "{error}");
        // What is no command is known only after others could have joined.
        let mut spec = scratch.spec("second", "");
        spec.args = vec!["no-such-command".into()];
        let mut process = executor.start(spec, pipes([false; 3]).unwrap().files).await.unwrap();
        let error = process.wait().await.unwrap_err();
        assert!(matches!(error, ExecError::CommandNotFound { .. }), "{error}");
    });
}

fn many_steps_run_at_once() {
    let scratch = Scratch::new();
    block_on(async {
        let executor = executor();
        let steps = (0..40).map(|n| {
            let spec = scratch
                .spec(&format!("many{n}"), &format!("sleep 0.{}; echo {n}; exit {n}", n % 5));
            run_with(&executor, spec)
        });
        let mut running = vec![];
        for step in steps {
            running.push(Box::pin(step));
        }
        for (n, step) in futures_join(running).await.into_iter().enumerate() {
            assert_eq!(
                (step.code(), step.stdout.trim()),
                (i32::try_from(n).unwrap(), n.to_string().as_str())
            );
        }
    });
}

/// Polls all futures together.
async fn futures_join<F: Future + Unpin>(mut futures: Vec<F>) -> Vec<F::Output> {
    let mut done: Vec<Option<F::Output>> = futures.iter().map(|_| None).collect();
    std::future::poll_fn(|context| {
        for (future, slot) in futures.iter_mut().zip(&mut done) {
            if slot.is_none()
                && let std::task::Poll::Ready(output) = std::pin::Pin::new(future).poll(context)
            {
                *slot = Some(output);
            }
        }
        if done.iter().all(Option::is_some) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    done.into_iter().map(Option::unwrap).collect()
}

fn a_killed_helper_is_replaced() {
    let scratch = Scratch::new();
    block_on(async {
        let executor = executor();
        let (sink, mut source) = mpsc::channel(16);
        let mut step =
            executor.run(scratch.spec("first", "echo up; sleep 3456789"), Stdio::Piped(sink));
        tokio::select! {
            _ = &mut step => panic!("it ended"),
            chunk = source.recv() => assert!(chunk.is_some()),
        }
        // The newest helper may be another test's when tests run side by side: find ours by its child.
        let sleeper = processes("3456789");
        assert!(sleeper > 0);
        let helper = parent_of_step("3456789");
        rustix::process::kill_process(
            rustix::process::Pid::from_raw(helper).unwrap(),
            rustix::process::Signal::KILL,
        )
        .unwrap();
        let error = step.await.expect_err("it ended well");
        assert!(matches!(error, ExecError::Helper { .. }), "{error}");
        let start = Instant::now();
        while processes("3456789") > 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "its steps survive it");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(run_with(&executor, scratch.spec("second", "echo again")).await.out(), "again");
    });
}

/// The helper that started the shell whose command line contains `word`.
fn parent_of_step(word: &str) -> i32 {
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let Ok(status) = fs::read_to_string(entry.path().join("status")) else { continue };
        let first = status.lines().any(|line| line.starts_with("NSpid:") && line.ends_with("\t1"));
        if first && String::from_utf8_lossy(&line).contains(word) {
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:\t")).unwrap();
            return parent.parse().unwrap();
        }
    }
    panic!("no such step");
}

/// A complete arm64 program: gives /file to 33:44, prints five bytes of its own name, sleeps if asked to by an
/// argument, and exits with what the first call returned.
fn arm64_program() -> Vec<u8> {
    let code: &[u32] = &[
        0x9280_0c60, // mov x0, #-100      AT_FDCWD
        0x1000_0221, // adr x1, path       17 words on
        0xd280_0422, // mov x2, #33
        0xd280_0583, // mov x3, #44
        0xd280_0004, // mov x4, #0
        0xd280_06c8, // mov x8, #54        fchownat
        0xd400_0001, // svc #0
        0xaa00_03f3, // mov x19, x0
        0xd280_0020, // mov x0, #1
        0xf940_07e1, // ldr x1, [sp, #8]   argv[0]
        0xd280_00a2, // mov x2, #5
        0xd280_0808, // mov x8, #64        write
        0xd400_0001, // svc #0
        0xaa13_03e0, // mov x0, x19
        0xd280_0ba8, // mov x8, #93        exit
        0xd400_0001, // svc #0
        0xd503_201f, // nop
        0xd503_201f, // nop
    ];
    let mut program = vec![];
    program.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2_u16, 0xb7] {
        program.extend(half.to_le_bytes());
    }
    program.extend(1_u32.to_le_bytes());
    for word in [0x40_0078_u64, 64, 0] {
        program.extend(word.to_le_bytes());
    }
    program.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        program.extend(half.to_le_bytes());
    }
    for word in [1_u32, 5] {
        program.extend(word.to_le_bytes());
    }
    for word in [0_u64, 0x40_0000, 0x40_0000, 0x1000, 0x1000, 0x1000] {
        program.extend(word.to_le_bytes());
    }
    assert_eq!(program.len(), 0x78);
    program.extend(code.iter().flat_map(|word| word.to_le_bytes()));
    program.extend(b"/file\0");
    program.resize(0x1000, 0);
    program
}

fn arm64(scratch: &Scratch, name: &str, script: &str) -> ExecSpec {
    let emulator = Path::new("/usr/bin/qemu-aarch64-static");
    assert!(
        emulator.exists(),
        "{} is missing: install the Debian package qemu-user-static",
        emulator.display()
    );
    let program = scratch.path("base/bin/foreign");
    fs::write(&program, arm64_program()).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(scratch.path("base/file"), "").unwrap();
    ExecSpec { platform: Platform::new("linux", "arm64", None), ..scratch.spec(name, script) }
}

fn foreign_programs_run_emulated() {
    let scratch = Scratch::new();
    // The first argument is the caller's choice, and set-user-id programs work.
    let script = "exec -a HELLO /bin/foreign";
    assert_eq!(run(arm64(&scratch, "argv", script)).out(), "HELLO");
    let file = fs::metadata(scratch.path("argv-upper/file")).unwrap();
    assert_eq!((file.uid(), file.gid()), (33, 44));
    let user =
        |script: &str, name: &str| ExecSpec { user: "app".into(), ..arm64(&scratch, name, script) };
    assert_eq!(run(user("/bin/foreign", "user")).code(), 255);
    fs::set_permissions(scratch.path("base/bin/foreign"), fs::Permissions::from_mode(0o755))
        .unwrap();
    let mut setuid = user("/bin/setuid", "setuid");
    fs::copy(scratch.path("base/bin/foreign"), scratch.path("base/bin/setuid")).unwrap();
    fs::set_permissions(scratch.path("base/bin/setuid"), fs::Permissions::from_mode(0o4755))
        .unwrap();
    assert_eq!(run(setuid.clone()).out(), "/bin/");
    // As the first process, with no shell around it.
    setuid.args = vec!["/bin/setuid".into()];
    assert_eq!(run(setuid).out(), "/bin/");
    // Without its platform being asked for, it has no format.
    let mut plain = arm64(&scratch, "plain", "");
    plain.platform = Platform::host();
    plain.args = vec!["foreign".into()];
    assert!(matches!(run(plain).error(), ExecError::ExecFormat { .. }));
}

fn the_emulator_cannot_be_overwritten() {
    let scratch = Scratch::new();
    let emulator = Path::new("/usr/bin/qemu-aarch64-static");
    let before = fs::metadata(emulator).map(|m| (m.mtime(), m.size())).ok();
    // Held open while it runs, written to when it does not.
    let script = "mkfifo /pipe; sh -c 'exec foreign > /pipe' & p=$!; n=0
        while [ $n -lt 2000 ]; do n=$((n+1)); case \"$(readlink /proc/$p/exe)\" in *qemu*) exec 7</proc/$p/exe; break;; esac; done &
        exec 8</pipe; wait; (echo x > /proc/self/fd/7) 2>&1; true";
    run(arm64(&scratch, "overwrite", script)).out();
    let direct = "foreign >/dev/null; for f in /proc/*/exe; do (: >> $f) 2>&1; done; true";
    run(arm64(&scratch, "direct", direct)).out();
    assert_eq!(before, fs::metadata(emulator).map(|m| (m.mtime(), m.size())).ok());
}

fn the_host_has_no_new_registration() {
    let scratch = Scratch::new();
    run(arm64(&scratch, "host", "foreign >/dev/null")).out();
    let result = Command::new(scratch.path("base/bin/foreign")).output();
    assert!(result.is_err() || Path::new("/proc/sys/fs/binfmt_misc/qemu-aarch64").exists());
}
