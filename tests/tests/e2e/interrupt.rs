//! Builds that are ended from outside.

use std::time::Duration;

use rustix::process::Signal;
use slipway_tests::{BASE, Context, Registry, Reply, Sandbox, Server, foreign_platform};

fn endless(sandbox: &Sandbox, server: &Server) -> Context {
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN wget -q -O /dev/null http://{0}/before\n\
         RUN wget -q -O /dev/null http://{0}/started; trap '' INT TERM; (sleep 5000 & sleep 5000)\n",
        server.host()
    ));
    context
}

fn stops_on(signal: Signal, options: &[&str]) {
    let sandbox = Sandbox::with_base();
    let server = Server::counter();
    let context = endless(&sandbox, &server);
    let mut arguments = vec!["build", "--progress=plain", "-t", "x:1"];
    arguments.extend(options);
    arguments.push(context.arg());
    let running = sandbox.slipway(arguments).start();
    server.wait_for("/started");
    let signalled = std::time::Instant::now();
    running.signal(signal);
    let ran = running.wait();
    assert!(
        signalled.elapsed() < Duration::from_secs(15),
        "it took {:?} to stop",
        signalled.elapsed()
    );
    if signal == Signal::KILL {
        assert_eq!(ran.status.code(), None);
    } else {
        assert_eq!(ran.status.code(), Some(130), "{}", ran.stderr);
        assert!(
            ran.error().contains("cancel") || ran.error().contains("interrupt"),
            "{}",
            ran.error()
        );
    }
    if signal != Signal::KILL {
        sandbox.assert_nothing_left();
    }

    // The next build works, and what was finished need not run again.
    server.forget();
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN wget -q -O /dev/null http://{0}/before\nRUN wget -q -O /dev/null http://{0}/ended\n",
        server.host()
    ));
    let mut arguments = vec!["-t", "x:1"];
    arguments.extend(options);
    sandbox.build(&context, arguments);
    let asked: Vec<_> = server.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(asked, ["/ended"]);
    // What a killed process could not tidy up, the next one does.
    sandbox.assert_nothing_left();
}

#[test]
fn control_c_stops_a_step_and_tidies_up() {
    stops_on(Signal::INT, &[]);
}

#[test]
fn control_c_stops_an_emulated_step() {
    stops_on(Signal::INT, &["--platform", foreign_platform()]);
}

#[test]
fn terminate_stops_a_step_as_well() {
    stops_on(Signal::TERM, &[]);
}

#[test]
fn a_killed_build_leaves_no_process_and_the_next_one_works() {
    stops_on(Signal::KILL, &[]);
}

#[test]
fn an_interrupted_load_leaves_a_usable_store() {
    let sandbox = Sandbox::new();
    // Half of an archive, and a pipe that stays open: the process waits for the rest.
    let archive = std::fs::read(slipway_tests::base_archive()).unwrap();
    let fifo = sandbox.arg("fifo");
    slipway_tests::tool(std::process::Command::new("mkfifo").arg(&fifo));
    let running = sandbox.slipway(["load", "-i", &fifo]).start();
    let mut pipe = std::fs::File::options().write(true).open(&fifo).unwrap();
    std::io::Write::write_all(&mut pipe, &archive[..archive.len() / 2]).unwrap();
    running.signal(Signal::INT);
    let ran = running.wait();
    assert_eq!(ran.status.code(), Some(130), "{}", ran.stderr);
    drop(pipe);
    assert_eq!(sandbox.run(["images", "-q"]).stdout, "");
    sandbox.assert_nothing_left();
    sandbox.run(["load", "-i", slipway_tests::base_archive().to_str().unwrap()]);
}

#[test]
fn an_interrupted_pull_leaves_a_usable_store() {
    let sandbox = Sandbox::new();
    let registry = Registry::start();
    registry.seed(slipway_tests::base_archive(), "base", "debian:base");
    let slow = Server::start(Some(&registry.host()), |request| {
        if request.path.contains("/blobs/") {
            std::thread::sleep(Duration::from_secs(20));
        }
        Reply::Forward
    });
    let running = sandbox.slipway(["pull", &format!("{}/debian:base", slow.host())]).start();
    let began = std::time::Instant::now();
    while !slow.requests().iter().any(|request| request.path.contains("/blobs/")) {
        assert!(began.elapsed() < Duration::from_secs(30), "no blob was asked for");
        std::thread::sleep(Duration::from_millis(5));
    }
    running.signal(Signal::INT);
    let ran = running.wait();
    assert_eq!(ran.status.code(), Some(130), "{}", ran.stderr);
    assert!(ran.took < Duration::from_secs(15), "it took {:?}", ran.took);
    sandbox.assert_nothing_left();
    assert_eq!(sandbox.run(["images", "-q"]).stdout, "");
    sandbox.run(["pull", &registry.image("debian:base")]);
}
