//! The tests' own tools: a check that cannot fail proves nothing.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};

use slipway_tests::{Layout, Registry, Reply, Sandbox, Server, Tree, base_archive, tool};

fn says_no(check: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(check)).expect_err("the check passed");
    panic.downcast_ref::<String>().cloned().unwrap_or_default()
}

#[test]
fn trees_differ_in_every_respect_that_an_image_keeps() {
    let sandbox = Sandbox::new();
    let make = |name: &str, change: &str| {
        let path = sandbox.path(name);
        fs::create_dir(&path).unwrap();
        let script = format!(
            "mkdir d; echo x > f; ln f hard; ln -s f soft; echo y > g; setfattr -n user.a -v b g; touch -h -d @1 f g soft; {change}"
        );
        tool(Command::new("sh").args(["-ec", &script]).current_dir(&path));
        Tree::read(&path)
    };
    let plain = make("plain", "");
    plain.assert_equals(&make("same", ""), "equal trees");
    for (name, change) in [
        ("content", "echo z > g; touch -d @1 g"),
        ("mode", "chmod 600 g"),
        ("owner", "chown 1 g"),
        ("group", "chgrp 1 d"),
        ("time", "touch -d @2 g"),
        ("link", "ln -sf g soft; touch -h -d @1 soft"),
        ("hard", "rm hard; cp -p f hard"),
        ("xattr", "setfattr -n user.a -v c g"),
        ("more", "mkdir d/e"),
        ("less", "rmdir d"),
        ("kind", "rmdir d; mkfifo d"),
    ] {
        let changed = make(name, change);
        assert!(
            says_no(|| plain.assert_equals(&changed, "changed")).contains("changed"),
            "{name} was not seen"
        );
    }
}

#[test]
fn leaks_are_seen() {
    let sandbox = Sandbox::new();
    sandbox.assert_nothing_left();

    fs::create_dir_all(sandbox.root().join("tmp")).unwrap();
    let leftover = sandbox.root().join("tmp/half-written");
    fs::write(&leftover, "").unwrap();
    assert!(says_no(|| sandbox.assert_nothing_left()).contains("half-written"));
    fs::remove_file(leftover).unwrap();

    let mount =
        format!("mount -t tmpfs none {} && echo mounted && exec sleep 1000", sandbox.arg("tmp"));
    let mut process = Command::new("unshare")
        .args(["--mount", "sh", "-c", &mount])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 8];
    process.stdout.take().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"mounted\n");
    let left = says_no(|| sandbox.assert_nothing_left());
    assert!(left.contains("sleep 1000"), "{left}");
    process.kill().unwrap();
    process.wait().unwrap();
    sandbox.assert_nothing_left();
}

#[test]
fn layouts_are_checked_to_the_last_byte() {
    let sandbox = Sandbox::new();
    let archive = sandbox.path("base.tar");
    fs::copy(base_archive(), &archive).unwrap();
    let layout = Layout::unpack(&archive);
    let descriptors = layout.descriptors();
    let images = layout.images(&descriptors[0]);
    assert_eq!(images.keys().collect::<Vec<_>>(), ["linux/amd64", "linux/arm64"]);
    for platform in images.keys() {
        let tree = Tree::read(&layout.umoci_unpack("base", platform));
        assert_eq!(tree.entry("usr/bin/sh").content, "busybox", "{platform}");
        assert_eq!(tree.entry("bin").content, "usr/bin", "{platform}");
    }
    let layer = images["linux/amd64"].manifest["layers"][0]["digest"].as_str().unwrap();
    let path = layout.path().join("blobs/sha256").join(layer.strip_prefix("sha256:").unwrap());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(says_no(|| drop(layout.images(&descriptors[0]))).contains("digest"));
}

#[test]
fn a_server_watches_and_spoils_what_a_registry_says() {
    let sandbox = Sandbox::new();
    let registry = Registry::start();
    let watcher = Server::watching(&registry.host());
    let copy = |host: &str, layout: &str| {
        let mut command = Command::new("skopeo");
        command.args([
            "copy",
            "--quiet",
            "--all",
            "--src-tls-verify=false",
            &format!("docker://{host}/a/b:c"),
        ]);
        command.arg(format!("oci:{}:it", sandbox.arg(layout))).output().unwrap().status.success()
    };
    let push = format!("docker://{}/a/b:c", watcher.host());
    let base = format!("oci-archive:{}:base", base_archive().display());
    tool(Command::new("skopeo").args([
        "copy",
        "--quiet",
        "--all",
        "--dest-tls-verify=false",
        &base,
        &push,
    ]));
    assert!(watcher.requests().iter().any(|request| request.method == "PUT"));
    assert!(copy(&watcher.host(), "good"));
    let layout = Layout::open(sandbox.path("good"));
    assert_eq!(layout.images(&layout.descriptors()[0]).len(), 2);

    let spoil = |reply: Reply| {
        Server::start(Some(&registry.host()), move |request| {
            if request.path.contains("/blobs/") { reply.clone() } else { Reply::Forward }
        })
    };
    for (number, reply) in
        [Reply::Corrupt, Reply::Truncate(10), Reply::status(404, "no"), Reply::Close]
            .into_iter()
            .enumerate()
    {
        assert!(!copy(&spoil(reply.clone()).host(), &format!("bad-{number}")), "{reply:?}");
    }
}

#[test]
fn a_secure_registry_lets_nobody_in_without_a_password() {
    let registry = Registry::start_secure();
    registry.seed(base_archive(), "base", "a/b:c");
    assert!(registry.skopeo(&["inspect", "--raw"], "a/b:c").contains("manifests"));
    let stranger = Command::new("skopeo")
        .args(["inspect", "--tls-verify=false", &format!("docker://{}", registry.image("a/b:c"))])
        .output()
        .unwrap();
    assert!(!stranger.status.success());
}
