//! Processes that share a store.

use std::fs;

use slipway_tests::{BASE, Sandbox, Server, base_archive};

#[test]
fn builds_in_the_same_store_at_the_same_time_all_succeed() {
    let sandbox = Sandbox::with_base();
    let contexts: Vec<_> = (0..6)
        .map(|number| {
            let context = sandbox.context(&format!("context-{number}"));
            context.file("f", format!("{number}\n")).dockerfile(&format!(
                "FROM {BASE}\nRUN echo shared > /shared\nCOPY f /f\nRUN cat /f > /copy\n"
            ));
            context
        })
        .collect();
    let running: Vec<_> = contexts
        .iter()
        .enumerate()
        .map(|(number, context)| {
            sandbox
                .slipway([
                    "build",
                    "--progress=plain",
                    "-t",
                    &format!("at-once:{number}"),
                    context.arg(),
                ])
                .start()
        })
        .collect();
    for running in running {
        let ran = running.wait();
        assert!(ran.status.success(), "{}", ran.stderr);
    }
    for number in 0..6 {
        let ran = sandbox.run(["run", "--rm", &format!("at-once:{number}"), "cat", "/copy"]);
        assert_eq!(ran.stdout, format!("{number}\n"));
    }
}

#[test]
fn a_store_that_is_new_may_be_opened_by_several_at_once() {
    let sandbox = Sandbox::new();
    let archive = base_archive().to_str().unwrap();
    let running: Vec<_> =
        (0..4).map(|_| sandbox.slipway(["load", "-i", archive]).start()).collect();
    for running in running {
        let ran = running.wait();
        assert!(ran.status.success(), "{}", ran.stderr);
    }
    assert_eq!(sandbox.run(["images", "-q"]).stdout.lines().count(), 2);
}

#[test]
fn prune_takes_nothing_from_a_build_that_is_under_way() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    let server = Server::rendezvous("/waiting", "/go-on");
    context.file("f", "f\n").dockerfile(&format!(
        "FROM {BASE}\nCOPY f /f\nRUN wget -q -O /dev/null http://{}/waiting\nRUN cat /f > /g\n",
        server.host()
    ));
    let running =
        sandbox.slipway(["build", "--progress=plain", "-t", "kept:1", context.arg()]).start();
    server.wait_for("/waiting");
    sandbox.run(["rmi", BASE]);
    sandbox.run(["prune", "--all", "--force"]);
    slipway_tests::tool(std::process::Command::new("busybox").args([
        "wget",
        "-q",
        "-O",
        "/dev/null",
        &format!("http://{}/go-on", server.host()),
    ]));
    let ran = running.wait();
    assert!(ran.status.success(), "{}", ran.stderr);
    let ran = sandbox.run(["run", "--rm", "kept:1", "cat", "/g"]);
    assert_eq!(ran.stdout, "f\n");
    let archive = sandbox.arg("kept.tar");
    sandbox.run(["save", "-o", &archive, "kept:1"]);
    assert!(fs::metadata(archive).unwrap().len() > 1_000_000, "with the layer of the base image");
}
