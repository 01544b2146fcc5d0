//! What the processes of `RUN` are given by flags: secrets, agents, limits.

use std::fs;

use slipway_tests::{BASE, Sandbox, Tree};

#[test]
fn secrets_caches_and_limits_reach_the_steps() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.file("token", "hush");
    context.dockerfile(&format!(
        "FROM {BASE}\n\
         RUN --mount=type=secret,id=t --mount=type=secret,id=v,env=V --mount=type=cache,target=/c \\\n\
         \x20 {{ cat /run/secrets/t; echo \"-$V\"; ulimit -n; grep x.test /etc/hosts; cat /c/n; }} > /seen; \
         echo kept > /c/n\n"
    ));
    let token = format!("id=t,src={}/token", context.arg());
    let flags = [
        "--secret",
        &token,
        "--secret",
        "id=v,env=V",
        "--add-host",
        "x.test:10.1.2.3",
        "--ulimit",
        "nofile=77",
    ];
    let build = |more: &[&str], out: &str| {
        let output = format!("type=local,dest={}", sandbox.arg(out));
        let words = ["build", "-o", &output, context.arg()];
        let all: Vec<&str> = words.iter().chain(&flags).chain(more).copied().collect();
        sandbox.slipway(all).env("V", "variable").succeeds();
        let tree = Tree::read(&sandbox.path(out));
        assert!(
            !tree.paths().iter().any(|path| path.starts_with("c/") || path.starts_with("run/"))
        );
        std::fs::read_to_string(sandbox.path(out).join("seen")).unwrap()
    };
    assert_eq!(build(&[], "one"), "hush-variable\n77\n10.1.2.3\tx.test\n");
    // A step that is to run again begins with empty caches.
    assert!(!build(&["--no-cache"], "two").contains("kept"));
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN --mount=type=secret,required,id=t cat /run/secrets/t\n"
    ));
    let ran = sandbox.build_fails(&context, []);
    assert!(ran.error().contains("secret t: not found"), "{}", ran.error());
}

#[test]
fn leave_must_be_given_by_name() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM {BASE}\nRUN --security=insecure mount -t tmpfs none /tmp\n"));
    let ran = sandbox.build_fails(&context, []);
    assert!(ran.error().contains("--allow security.insecure"), "{}", ran.error());
    sandbox.build_tree(&context, ["--allow", "security.insecure"]);
}

#[test]
fn devices_are_described_by_files_and_given_with_leave() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    let specs = sandbox.path("cdi");
    fs::create_dir(&specs).unwrap();
    fs::write(sandbox.path("gift"), "given\n").unwrap();
    let gift = sandbox.arg("gift");
    let spec = serde_json::json!({
        "cdiVersion": "0.6.0",
        "kind": "example.com/gpu",
        "devices": [{
            "name": "one",
            "annotations": { "org.mobyproject.buildkit.device.class": "fast" },
            "containerEdits": {
                "env": ["DEVICE=one"],
                "deviceNodes": [{ "path": "/dev/gpu0", "hostPath": "/dev/zero", "fileMode": 0o640 }],
                "mounts": [{ "hostPath": gift, "containerPath": "/gift", "options": ["ro", "bind"] }],
            },
        }],
    });
    fs::write(specs.join("gpu.json"), spec.to_string()).unwrap();
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN --device=example.com/gpu,required --device=example.com/none \\\n  \
         {{ echo $DEVICE; cat /gift; stat -c '%a %t:%T' /dev/gpu0; head -c 2 /dev/gpu0 | od -An -tx1; }} > /said\n"
    ));
    let folder = format!("--cdi-spec-dir={}", specs.display());
    let ran = sandbox.build_fails(&context, [folder.as_str()]);
    assert!(
        ran.error()
            .contains("device example.com/gpu=one is requested by the build but not allowed")
            && ran.error().contains("--allow device=example.com/gpu=one"),
        "{}",
        ran.error()
    );
    assert!(ran.stderr.contains("Dockerfile:2"), "{}", ran.stderr);
    for allow in ["device", "device=example.com/gpu", "device=fast"] {
        let tree = sandbox.build_tree(&context, [&folder, "--allow", allow]);
        let said = fs::read_to_string(tree.join("said")).unwrap();
        assert_eq!(said, "one\ngiven\n640 1:5\n 00 00\n", "{allow}");
        assert!(!tree.join("gift").exists() && !tree.join("dev/gpu0").exists());
    }
    // By another name, and when nothing of that name is there.
    context.dockerfile(&format!("FROM {BASE}\nRUN --device=mine,required echo $DEVICE > /said\n"));
    let alias = "device=example.com/gpu=one,alias=mine";
    let tree = sandbox.build_tree(&context, [&folder, "--allow", alias]);
    assert_eq!(fs::read_to_string(tree.join("said")).unwrap(), "one\n");
    fs::write(specs.join("broken.yaml"), "kind: [").unwrap();
    let ran = sandbox.build_fails(&context, [&folder, "--allow", "device"]);
    assert!(
        ran.error().contains("required device \"mine\" is not registered")
            && ran.error().contains("cdi/broken.yaml: "),
        "{}",
        ran.error()
    );
}
