//! Clients that vanish, and daemons that are killed: nothing of it stays, and nothing is lost.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use slipway_tests::{BASE, Context, Daemon, Holdings, Registry, Reply, Running, Sandbox, Server};

/// Nothing that is waited for takes as long.
const LIMIT: Duration = Duration::from_secs(60);
/// Large enough that it is on its way for seconds.
const LARGE: u64 = 3 << 30;

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < LIMIT, "{what} did not happen");
        thread::sleep(Duration::from_millis(2));
    }
}

fn kill(client: Running<'_>) {
    client.signal(Signal::KILL);
    let ran = client.wait();
    assert_eq!(ran.status.code(), None, "it was still under way: {}", ran.stderr);
}

/// The size of the largest file below a folder, in bytes.
fn largest(folder: &Path) -> u64 {
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => largest(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    fs::read_dir(folder).into_iter().flatten().flatten().map(size).max().unwrap_or(0)
}

/// Starts a daemon that has done everything once, so that what it keeps open for good is open, with what it holds then.
fn start_warm(sandbox: &Sandbox) -> (Daemon<'_>, Holdings) {
    let daemon = Daemon::start(sandbox);
    let context = sandbox.context("warm");
    context.file("f", "x").dockerfile(&format!("FROM {BASE}\nCOPY f /f\nRUN cat /f\n"));
    let out = format!("type=local,dest={}", sandbox.arg("warm-out"));
    sandbox.run(daemon.words(&context, &["-o", &out]));
    fs::remove_dir_all(sandbox.path("warm-out")).expect("remove the result");
    // The build's own record is written a moment later.
    thread::sleep(Duration::from_millis(500));
    let holdings = daemon.holdings();
    (daemon, holdings)
}

/// Builds something new with every part of the daemon.
fn works(sandbox: &Sandbox, daemon: &Daemon<'_>) {
    let context = sandbox.context("works");
    let text = format!("{:?}", Instant::now());
    context.file("f", &text).dockerfile(&format!("FROM {BASE}\nCOPY f /f\nRUN cp /f /g\n"));
    let out = sandbox.arg("works-out");
    sandbox.run(daemon.words(&context, &["-o", &format!("type=local,dest={out}")]));
    let made = fs::read_to_string(sandbox.path("works-out/g")).expect("read the result");
    assert_eq!(made, text);
    fs::remove_dir_all(out).expect("remove the result");
}

/// Steps that nobody can end politely, and that have children.
fn endless(context: &Context, server: &Server) {
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN wget -q -O /dev/null http://{0}/started; \
         trap '' INT TERM HUP; (sleep 5000 & setsid sleep 5000)\n",
        server.host()
    ));
}

#[test]
fn a_client_that_vanishes_while_it_sends_a_file_leaves_no_half_of_it() {
    let sandbox = Sandbox::new();
    let (daemon, before) = start_warm(&sandbox);
    let context = sandbox.context("context");
    context.dockerfile("FROM scratch\nCOPY large /\n").file("large", "");
    let file = fs::File::options().write(true).open(context.path().join("large")).unwrap();
    file.set_len(LARGE).unwrap();
    let received = daemon.root().join("local");
    for bytes in [1, 64 << 20] {
        let client = sandbox.slipway(daemon.words(&context, &[])).start();
        wait_until("the transfer", || largest(&received) >= bytes);
        kill(client);
        daemon.settles(&before, &format!("after {bytes} bytes"));
        wait_until("half a file goes", || largest(&received) < 1 << 20);
    }
    // One that stands still, and never says another word.
    let client = sandbox.slipway(daemon.words(&context, &[])).start();
    wait_until("the transfer", || largest(&received) >= 1 << 20);
    client.signal(Signal::STOP);
    thread::sleep(Duration::from_millis(300));
    kill(client);
    daemon.settles(&before, "after a pause");
    wait_until("half a file goes", || largest(&received) < 1 << 20);
    works(&sandbox, &daemon);
}

#[test]
fn a_client_that_vanishes_during_a_step_takes_all_its_processes_along() {
    let sandbox = Sandbox::new();
    let (daemon, before) = start_warm(&sandbox);
    let server = Server::counter();
    let context = sandbox.context("context");
    endless(&context, &server);
    let output = "type=image,name=never:1";
    for _ in 0..3 {
        server.forget();
        let client = sandbox.slipway(daemon.words(&context, &["-o", output])).start();
        server.wait_for("/started");
        kill(client);
        daemon.settles(&before, "during a step");
    }
    let images = sandbox.run(["--root", &sandbox.arg("builder"), "images"]).stdout;
    assert!(!images.contains("never"), "{images}");
    works(&sandbox, &daemon);
}

#[test]
fn a_client_that_vanishes_while_it_gets_a_result_leaves_nothing() {
    let sandbox = Sandbox::new();
    let (daemon, _) = start_warm(&sandbox);
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM {BASE}\nRUN head -c {} /dev/zero > /large\n", 1u64 << 30));
    sandbox.run(daemon.words(&context, &[]));
    thread::sleep(Duration::from_millis(500));
    let before = daemon.holdings();
    let out = sandbox.path("out");
    for kind in ["local", "tar", "oci"] {
        fs::create_dir(&out).unwrap();
        let dest = if kind == "local" { out.clone() } else { out.join("result") };
        let compression = if kind == "oci" { ",compression=uncompressed" } else { "" };
        let output = format!("type={kind},dest={}{compression}", dest.display());
        let client = sandbox.slipway(daemon.words(&context, &["-o", &output])).start();
        wait_until("the result comes", || largest(&out) >= 8 << 20);
        kill(client);
        daemon.settles(&before, &format!("during type={kind}"));
        assert!(!out.join("result").exists() && !out.join("large").exists(), "half a {kind}");
        fs::remove_dir_all(&out).unwrap();
    }
    works(&sandbox, &daemon);
}

#[test]
fn a_client_that_vanishes_during_a_push_leaves_no_tag() {
    let sandbox = Sandbox::new();
    let registry = Registry::start();
    let (daemon, before) = start_warm(&sandbox);
    let context = sandbox.context("context");
    // The registry takes its time for the content of blobs, or for the manifest.
    for (part, tag) in [("/blobs/uploads/", "one"), ("/manifests/", "two")] {
        let slow = Server::start(Some(&registry.host()), move |request| {
            if request.method == "PUT" && request.path.contains(part) {
                thread::sleep(Duration::from_secs(3));
                return Reply::Close;
            }
            Reply::Forward
        });
        context.dockerfile(&format!("FROM {BASE}\nRUN echo {tag} > /made\n"));
        let name = format!("{}/team/app:{tag}", slow.host());
        let client = sandbox.slipway(daemon.words(&context, &["--push", "-t", &name])).start();
        let asked = |method: &str, part: &str| {
            let mut requests = slow.requests().into_iter();
            requests.any(|request| request.method == method && request.path.contains(part))
        };
        wait_until("the upload", || asked("PUT", part));
        kill(client);
        daemon.settles(&before, &format!("during a PUT of {part}"));
        // What was on its way to the registry arrives; another attempt comes only after the slow answer.
        thread::sleep(Duration::from_secs(1));
        let seen = slow.requests().len();
        thread::sleep(Duration::from_secs(4));
        assert_eq!(slow.requests().len(), seen, "the push went on");
        assert!(part == "/manifests/" || !asked("PUT", "/manifests/"), "it has a tag");
    }
    let name = registry.image("team/app:two");
    sandbox.run(daemon.words(&context, &["--push", "-t", &name]));
    assert!(registry.skopeo(&["inspect", "--raw"], "team/app:two").contains("layers"));
}

#[test]
fn a_client_that_vanishes_during_a_pull_leaves_no_half_of_a_blob() {
    let sandbox = Sandbox::new();
    let registry = Registry::start();
    // Another image than the daemon has.
    let context = sandbox.context("context");
    context.file("f", slipway_tests::noise(1 << 20)).dockerfile("FROM scratch\nCOPY f /f\n");
    sandbox.build(&context, ["--push", "-t", &registry.image("team/app:1")]);
    let (daemon, before) = start_warm(&sandbox);
    let slow = Server::start(Some(&registry.host()), |request| {
        if request.path.contains("/blobs/") {
            thread::sleep(Duration::from_secs(5));
        }
        Reply::Forward
    });
    context.dockerfile(&format!("FROM {}/team/app:1\nCOPY --from={BASE} /etc /etc\n", slow.host()));
    let client = sandbox.slipway(daemon.words(&context, &[])).start();
    wait_until("the download", || slow.requests().iter().any(|r| r.path.contains("/blobs/")));
    kill(client);
    daemon.settles(&before, "during a pull");
    works(&sandbox, &daemon);
}

#[test]
fn of_clients_that_share_a_step_any_may_vanish() {
    let sandbox = Sandbox::new();
    let (daemon, before) = start_warm(&sandbox);
    let server = Server::counter();
    let context = sandbox.context("context");
    let out = sandbox.arg("out");
    let output = format!("type=local,dest={out}");
    for (round, executes) in [(0, true), (1, false)] {
        server.forget();
        context.dockerfile(&format!(
            "FROM {BASE}\nRUN wget -q -O /dev/null http://{0}/ran && sleep 3 && echo {round} > /made\n",
            server.host()
        ));
        let first = sandbox.slipway(daemon.words(&context, &["-o", &output])).start();
        server.wait_for("/ran");
        let second = sandbox.slipway(daemon.words(&context, &["-o", &output])).start();
        // It has nothing to do but to wait.
        thread::sleep(Duration::from_secs(1));
        let (killed, stays) = if executes { (first, second) } else { (second, first) };
        kill(killed);
        let ran = stays.wait();
        assert!(ran.status.success(), "{}", ran.stderr);
        assert_eq!(fs::read_to_string(sandbox.path("out/made")).unwrap(), format!("{round}\n"));
        let expected = if executes { 2 } else { 1 };
        assert_eq!(server.count("/ran"), expected, "whoever executes is replaced, who waits not");
        daemon.settles(&before, "of two that wait for a step");
    }
}

#[test]
fn a_client_may_vanish_at_any_moment() {
    let sandbox = Sandbox::new();
    let daemon = Daemon::start(&sandbox);
    let context = sandbox.context("context");
    for at in 0..300 {
        context.file(&format!("files/{at}"), vec![b'x'; 20_000]);
    }
    context.dockerfile(&format!(
        "FROM {BASE}\nCOPY files /files\n\
         RUN (sleep 3000 & sleep 0.2; cat /files/* > /all; kill $!)\n\
         FROM scratch\nCOPY --from=0 /all /files /out/\n"
    ));
    let output = format!("type=local,dest={}", sandbox.arg("out"));
    let mut whole = sandbox.run(daemon.words(&context, &["-o", &output])).took;
    thread::sleep(Duration::from_millis(500));
    let before = daemon.holdings();
    let mut cut = 0;
    for part in 0..16u32 {
        context.file("files/0", format!("{part} {}", "y".repeat(20_000)));
        fs::remove_dir_all(sandbox.path("out")).ok();
        let client = sandbox.slipway(daemon.words(&context, &["-o", &output])).start();
        thread::sleep(whole * part / 16);
        client.signal(Signal::KILL);
        let ended = client.wait();
        if ended.status.success() {
            // The machine has become faster.
            whole = whole.min(ended.took);
        } else {
            cut += 1;
        }
        daemon.settles(&before, &format!("killed after {part} of 16 parts of {whole:?}"));
    }
    assert!(cut >= 8, "only {cut} clients were killed before they were done");
    // No half result is taken for a whole one.
    fs::remove_dir_all(sandbox.path("out")).ok();
    sandbox.run(daemon.words(&context, &["-o", &output]));
    let first = fs::read(context.path().join("files/0")).unwrap();
    assert_eq!(fs::read(sandbox.path("out/out/0")).unwrap(), first);
    let all = fs::metadata(sandbox.path("out/out/all")).unwrap().len();
    assert_eq!(all, 299 * 20_000 + first.len() as u64);
}

#[test]
fn a_killed_daemon_comes_back_with_its_cache_and_its_history() {
    let sandbox = Sandbox::new();
    let server = Server::counter();
    let context = sandbox.context("context");
    let dockerfile = |last: &str| {
        context.dockerfile(&format!(
            "FROM {BASE}\nCOPY f /f\n\
             RUN wget -q -O /dev/null http://{0}/before && head -c 50000000 /dev/urandom > /before\n\
             RUN {last}\n",
            server.host()
        ));
    };
    context.file("f", "content");
    let ran = format!("wget -q -O /dev/null http://{}/ran", server.host());
    let out = sandbox.path("out.tar");
    let output = format!("type=oci,dest={}", out.display());
    let mut known: Vec<String> = vec![];
    for (at, moment) in ["at rest", "during a step", "during an export"].into_iter().enumerate() {
        let daemon = Daemon::start(&sandbox);
        let value = format!("number-{at}");
        let label = format!("moment={value}");
        // What is a blob already is packed anew, which takes a while.
        let packed = format!("{output},compression=zstd,force-compression=true");
        let output_now = if moment == "during an export" { &packed } else { &output };
        let options = ["--label", &label, "-o", output_now];
        let last = format!("wget -q -O /dev/null http://{}/at; sleep 3000", server.host());
        dockerfile(if moment == "during a step" { &last } else { &ran });
        let mut client = Some(sandbox.slipway(daemon.words(&context, &options)).start());
        match moment {
            "during a step" => server.wait_for("/at"),
            "during an export" => {
                wait_until("the export", || {
                    daemon.holdings().temporary.iter().any(|path| Path::new(path).is_file())
                });
            }
            _ => {
                let done = client.take().unwrap().wait();
                assert!(done.status.success(), "{}", done.stderr);
                wait_until("the record", || daemon.history().contains(&value));
                fs::remove_file(&out).unwrap();
            }
        }
        daemon.end(Signal::KILL);
        if let Some(client) = client {
            let ended = client.wait();
            assert_eq!(ended.status.code(), Some(1), "{moment}: {}", ended.stderr);
            ended.error();
            assert!(!out.exists(), "{moment}: half a result");
        }

        let daemon = Daemon::start(&sandbox);
        known.push(value);
        let history = daemon.history();
        for value in &known {
            assert!(history.contains(value.as_str()), "{moment}: no record of {value}");
        }
        let before = daemon.holdings();
        assert!(before.processes.is_empty(), "{moment}: {:?}", before.processes);
        assert!(before.mounts.is_empty(), "{moment}: {:?}", before.mounts);
        assert!(before.temporary.is_empty(), "{moment}: {:?}", before.temporary);
        dockerfile(&ran);
        let again = sandbox.run(daemon.words(&context, &["-o", &output]));
        assert!(again.is_cached("/before"), "{moment}: {}", again.stderr);
        assert!(again.is_cached("COPY f"), "{moment}: {}", again.stderr);
        assert_eq!(server.count("/before"), 1, "{moment}");
        assert_eq!(server.count("/ran"), 1, "{moment}");
        fs::remove_file(&out).unwrap();
        drop(daemon);
    }
}

#[test]
fn a_second_daemon_on_the_same_folder_is_refused() {
    let sandbox = Sandbox::new();
    let daemon = Daemon::start(&sandbox);
    let (other, root) = (format!("unix://{}", sandbox.arg("other.sock")), sandbox.arg("builder"));
    let ran = sandbox.slipway(["--root", &root, "daemon", "--addr", &other]).fails(1);
    let error = ran.error();
    assert!(error.contains(&root), "{error}");
    assert!(error.contains(&daemon.id().to_string()), "{error}");
    assert!(!sandbox.path("other.sock").exists());
    // The first is as it was.
    works(&sandbox, &daemon);
    // A lock is nobody's once its process is gone, however that went.
    daemon.end(Signal::KILL);
    let daemon = Daemon::start(&sandbox);
    works(&sandbox, &daemon);
}
