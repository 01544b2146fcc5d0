//! Builds that a daemon makes: the client sends what is read, and takes what is made.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use slipway_tests::{
    BASE, Context, Daemon, Layout, Registry, Sandbox, Server, Tree, base_archive, tool,
};

fn small(sandbox: &Sandbox) -> Context {
    let context = sandbox.context("context");
    context
        .file("f", "content\n")
        .file("d/g", "more\n")
        .file("ignored", "x")
        .file(".dockerignore", "ignored\nDockerfile\n.dockerignore\n")
        .dockerfile("FROM scratch\nCOPY . /files/\nENTRYPOINT [\"/files/f\"]\n");
    context.symlink("d/link", "g");
    context
}

#[test]
fn results_come_as_folders_tars_and_archives() {
    let sandbox = Sandbox::new();
    let daemon = Daemon::start(&sandbox);
    let context = small(&sandbox);
    let (out, tar, oci) = (sandbox.arg("out"), sandbox.arg("files.tar"), sandbox.arg("oci.tar"));
    fs::create_dir(&out).unwrap();
    fs::write(sandbox.path("out/kept"), "kept").unwrap();
    let outputs = [
        format!("type=local,dest={out}"),
        format!("type=tar,dest={tar}"),
        format!("type=oci,dest={oci}"),
    ];
    let [local, files, archive] = outputs.each_ref();
    let metadata = sandbox.arg("meta.json");
    let options = [
        "-t",
        "a.example/x:1",
        "-o",
        local,
        "-o",
        files,
        "-o",
        archive,
        "--metadata-file",
        &metadata,
    ];
    let ran = sandbox.run(daemon.words(&context, &options));
    assert!(ran.stderr.contains("COPY . /files/"), "{}", ran.stderr);
    let tree = Tree::read(&sandbox.path("out"));
    assert_eq!(tree.paths(), ["files", "files/d", "files/d/g", "files/d/link", "files/f", "kept"]);
    assert_eq!(fs::read_to_string(sandbox.path("out/files/f")).unwrap(), "content\n");
    let listed = tool(Command::new("tar").args(["-tf", &tar]));
    assert!(listed.contains("files/d/g"), "{listed}");
    let layout = Layout::unpack(Path::new(&oci));
    let descriptors = layout.descriptors();
    assert_eq!(layout.images(&descriptors[0]).len(), 1);
    let told: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&metadata).unwrap()).unwrap();
    assert_eq!(told["containerimage.digest"], descriptors[0]["digest"]);
    assert_eq!(told["image.name"], "a.example/x:1");

    // Unchanged, it comes from the cache of the daemon; and an archive can go to standard output.
    let ran = sandbox.run(daemon.words(&context, &["-o", "type=docker,dest=-", "-t", "x:1"]));
    assert!(ran.is_cached("COPY . /files/"), "{}", ran.stderr);
    fs::write(sandbox.path("docker.tar"), &ran.bytes).unwrap();
    let listed = tool(Command::new("tar").args(["-tf", &sandbox.arg("docker.tar")]));
    assert!(listed.contains("manifest.json"), "{listed}");
    assert_eq!(daemon.holdings().temporary, Vec::<String>::new());
}

#[test]
fn several_platforms_are_loaded_into_the_store_of_this_machine() {
    let sandbox = Sandbox::new();
    let daemon = Daemon::start(&sandbox);
    let context = small(&sandbox);
    let iidfile = sandbox.arg("iid");
    let platforms = "--platform=linux/amd64,linux/arm64";
    let options = [platforms, "--load", "-t", "loaded:1", "-q", "--iidfile", &iidfile];
    let words: Vec<_> = daemon.words(&context, &options);
    let words: Vec<_> = words.into_iter().filter(|word| *word != "--progress=plain").collect();
    let ran = sandbox.run(words);
    let id = fs::read_to_string(&iidfile).unwrap();
    assert_eq!(ran.stdout.trim(), id);
    for platform in ["linux/amd64", "linux/arm64"] {
        let image = sandbox.inspect("loaded:1", Some(platform));
        assert!(image.to_string().contains(&id), "{image}");
    }
    // Nobody asked for anything: it stays where it is, and that is said.
    let ran = sandbox.run(daemon.words(&context, &["-t", "nowhere:1"]));
    assert!(ran.stderr.contains("WARNING: No output specified"), "{}", ran.stderr);
    assert!(!sandbox.run(["images"]).stdout.contains("nowhere"));
}

#[test]
fn images_are_pushed_with_the_credentials_of_this_machine() {
    let sandbox = Sandbox::new();
    let registry = Registry::start();
    let daemon = Daemon::start(&sandbox);
    let context = small(&sandbox);
    let name = registry.image("team/app:1");
    let named = || {
        let root = daemon.root().to_str().unwrap();
        let repository = name.strip_suffix(":1").unwrap();
        sandbox.run(["--root", root, "images"]).stdout.contains(repository)
    };
    sandbox.run(daemon.words(&context, &["--push", "-t", &name]));
    assert!(registry.skopeo(&["inspect", "--raw"], "team/app:1").contains("layers"));
    // No client could remove it from the daemon's store again.
    assert!(!named());
    let output = format!("type=image,name={name},push=true,store=true");
    sandbox.run(daemon.words(&context, &["-o", &output]));
    assert!(named());
}

#[test]
fn secrets_and_agents_of_this_machine_reach_the_steps() {
    let sandbox = Sandbox::new();
    let daemon = Daemon::start(&sandbox);
    let context = sandbox.context("context");
    let secret = sandbox.path("secret");
    fs::write(&secret, "hush").unwrap();
    let socket = sandbox.path("agent.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    // An agent that knows one answer; what it is asked is not looked at.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            use std::io::{Read as _, Write as _};
            let Ok(mut stream) = stream else { break };
            let mut asked = [0; 5];
            if stream.read_exact(&mut asked).is_ok() {
                drop(stream.write_all(b"\0\0\0\x05\x0c\0\0\0\0"));
            }
        }
    });
    context.dockerfile(&format!(
        "FROM {BASE}\n\
         RUN --mount=type=secret,id=s,required --mount=type=ssh,required \\\n\
         \x20 cat /run/secrets/s > /seen; printf '\\000\\000\\000\\001\\013' | nc -w 3 local:$SSH_AUTH_SOCK | od -An -tx1 >> /seen; test -S $SSH_AUTH_SOCK\n"
    ));
    let secret = format!("id=s,src={}", secret.display());
    let agent = format!("default={}", socket.display());
    let out = format!("type=local,dest={}", sandbox.arg("out"));
    sandbox.run(daemon.words(&context, &["--secret", &secret, "--ssh", &agent, "-o", &out]));
    let seen = fs::read_to_string(sandbox.path("out/seen")).unwrap();
    assert!(seen.starts_with("hush"), "{seen}");
    let ran = sandbox.fail(daemon.words(&context, &["-o", &out, "--no-cache", "--ssh", &agent]));
    assert!(ran.error().contains("secret s: not found"), "{}", ran.error());
}

#[test]
fn a_failing_step_shows_its_log_and_its_lines() {
    let sandbox = Sandbox::new();
    let daemon = Daemon::start(&sandbox);
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM {BASE}\nRUN echo said; exit 7\n"));
    let ran = sandbox.fail(daemon.words(&context, &[]));
    assert!(ran.error().ends_with("exit code: 7"), "{}", ran.error());
    for line in ["said", "Dockerfile:2", "   2 | >>> RUN echo said; exit 7"] {
        assert!(ran.stderr.contains(line), "{line}: {}", ran.stderr);
    }
    context.dockerfile("FROM scratch\nNONSENSE x\n");
    let ran = sandbox.fail(daemon.words(&context, &[]));
    assert!(ran.error().contains("NONSENSE"), "{}", ran.error());
    assert!(ran.stderr.contains("   2 | >>> NONSENSE x"), "{}", ran.stderr);
}

#[test]
fn control_c_stops_the_build_of_the_daemon() {
    let sandbox = Sandbox::new();
    let daemon = Daemon::start(&sandbox);
    let server = Server::counter();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN wget -q -O /dev/null http://{0}/started; trap '' INT TERM; sleep 5000\n",
        server.host()
    ));
    let out = format!("type=oci,dest={}", sandbox.arg("never.tar"));
    let running = sandbox.slipway(daemon.words(&context, &["-o", &out])).start();
    server.wait_for("/started");
    running.signal(Signal::INT);
    let ran = running.wait();
    assert_eq!(ran.status.code(), Some(130), "{}", ran.stderr);
    assert!(ran.error().contains("cancel"), "{}", ran.error());
    assert!(!sandbox.path("never.tar").exists());
    // The daemon has ended the step, and builds on.
    let sleeps = || {
        let shown = Command::new("pgrep").args(["-f", "sleep 5000"]).output().unwrap().stdout;
        let ids = String::from_utf8_lossy(&shown).into_owned();
        let mine = |id: &&str| {
            let root = fs::read_to_string(format!("/proc/{id}/mountinfo")).unwrap_or_default();
            root.contains(&daemon.root().display().to_string())
        };
        ids.lines().filter(mine).count()
    };
    let began = Instant::now();
    while sleeps() > 0 {
        assert!(began.elapsed() < Duration::from_secs(15), "the step still runs");
        std::thread::sleep(Duration::from_millis(50));
    }
    context.dockerfile("FROM scratch\nLABEL a=b\n");
    sandbox.run(daemon.words(&context, &[]));
}

#[test]
fn contexts_come_from_standard_input_folders_and_layouts() {
    let sandbox = Sandbox::new();
    let daemon = Daemon::start(&sandbox);
    let context = small(&sandbox);
    let out = sandbox.arg("out");
    let local = format!("type=local,dest={out}");
    let build = ["build", "--progress=plain", "--builder", daemon.address(), "-o", &local];
    let tar = Command::new("tar").args(["-C", context.arg(), "-cz", "."]).output().unwrap().stdout;
    sandbox.slipway(build).args(["-"]).stdin(tar).succeeds();
    assert_eq!(fs::read_to_string(sandbox.path("out/files/f")).unwrap(), "content\n");

    let dockerfile = "FROM scratch\nCOPY d/g /from-stdin\n";
    sandbox.slipway(build).args(["-f", "-", context.arg()]).stdin(dockerfile).succeeds();
    assert_eq!(fs::read_to_string(sandbox.path("out/from-stdin")).unwrap(), "more\n");

    let other = sandbox.context("other");
    other.file("h", "other\n");
    let layout = sandbox.arg("layout");
    fs::create_dir(&layout).unwrap();
    tool(Command::new("tar").args(["-C", &layout, "-xf", base_archive().to_str().unwrap()]));
    context.dockerfile(
        "FROM img AS i\nFROM scratch\nCOPY --from=other h /h\nCOPY --from=i /etc/passwd /p\n",
    );
    let tagged = Layout::open(&layout).descriptors()[0]["digest"].as_str().unwrap().to_owned();
    sandbox
        .slipway(build)
        .args(["--build-context", &format!("other={}", other.arg())])
        .args(["--build-context", &format!("img=oci-layout://{layout}@{tagged}")])
        .args([context.arg()])
        .succeeds();
    assert_eq!(fs::read_to_string(sandbox.path("out/h")).unwrap(), "other\n");
    assert!(fs::read_to_string(sandbox.path("out/p")).unwrap().contains("root"));
}

#[test]
fn questions_are_answered_and_disk_space_is_told() {
    let sandbox = Sandbox::new();
    let daemon = Daemon::start(&sandbox);
    let context = small(&sandbox);
    let ran = sandbox.run(daemon.words(&context, &["--call=targets"]));
    assert!(!ran.stdout.is_empty(), "{}", ran.stderr);
    sandbox.run(daemon.words(&context, &[]));
    let shown = sandbox.run(["du", "--builder", daemon.address()]).stdout;
    assert!(shown.contains("Total:"), "{shown}");
    let shown = sandbox.run(["prune", "--builder", daemon.address(), "--all", "--force"]).stdout;
    assert!(shown.contains("Total reclaimed space:"), "{shown}");
}

#[test]
fn a_builder_is_named_by_the_environment_and_missed_by_name() {
    let sandbox = Sandbox::new();
    let daemon = Daemon::start(&sandbox);
    let context = small(&sandbox);
    let by_environment = |address: &str| {
        let words = ["build", "--progress=plain", context.arg()];
        sandbox.slipway(words).env("BUILDKIT_HOST", address)
    };
    let ran = by_environment(daemon.address()).succeeds();
    assert!(ran.stderr.contains("No output specified"), "{}", ran.stderr);
    let ran = by_environment("unix:///no/such/socket").fails(1);
    assert!(ran.error().contains("unix:///no/such/socket"), "{}", ran.error());
    let ran = by_environment("default").fails(1);
    assert!(ran.error().contains("it is no address"), "{}", ran.error());
    // An empty flag is this process, which puts the image into its store.
    by_environment(daemon.address()).args(["--builder", "", "-t", "here:1"]).succeeds();
    assert!(sandbox.run(["images"]).stdout.contains("here"));
}
