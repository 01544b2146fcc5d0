//! The commands that look after the store.

use serde_json::Value;
use slipway_tests::{BASE, DEV, Sandbox, foreign_platform, host_platform};

fn images(sandbox: &Sandbox) -> Vec<Value> {
    let printed = sandbox.run(["images", "--format", "json"]).stdout;
    // One object a line, or one array: both are lists of objects.
    match serde_json::from_str(&printed) {
        Ok(Value::Array(all)) => all,
        Ok(one) => vec![one],
        Err(_) => printed
            .lines()
            .map(|line| serde_json::from_str(line).expect("a line of JSON"))
            .collect(),
    }
}

#[test]
fn images_lists_names_and_with_tree_a_row_for_each_platform() {
    let sandbox = Sandbox::with_base();
    let plain = sandbox.run(["images"]).stdout;
    let rows = |tag: &str| {
        plain
            .lines()
            .filter(|line| line.contains("slipway.local/debian") && line.contains(tag))
            .count()
    };
    assert_eq!((rows("base"), rows("dev")), (1, 1), "{plain}");

    let tree = sandbox.run(["images", "--tree"]).stdout;
    for platform in ["linux/amd64", "linux/arm64"] {
        assert_eq!(tree.lines().filter(|line| line.contains(platform)).count(), 2, "{tree}");
    }
    let digests = sandbox.run(["images", "--digests"]).stdout;
    assert_eq!(digests.matches("sha256:").count(), 2, "{digests}");
    assert_eq!(sandbox.run(["images", "-q"]).stdout.lines().count(), 2);
    assert_eq!(images(&sandbox).len(), 2);
}

#[test]
fn tag_and_rmi_move_names_and_prune_frees_what_has_none() {
    let sandbox = Sandbox::with_base();
    sandbox.run(["tag", BASE, "example.com/other:name"]);
    assert_eq!(
        sandbox.inspect("example.com/other:name", None)["Id"],
        sandbox.inspect(BASE, None)["Id"]
    );

    sandbox.run(["rmi", BASE]);
    let ran = sandbox.fail(["inspect", BASE]);
    assert!(ran.error().contains(BASE), "{}", ran.error());
    sandbox.inspect("example.com/other:name", None);

    sandbox.run(["rmi", "example.com/other:name", DEV]);
    assert_eq!(sandbox.run(["images", "-q"]).stdout, "");
    sandbox.run(["prune", "--all", "--force"]);
    let blobs = walk(&sandbox.root())
        .into_iter()
        .filter(|(path, _)| path.contains("blobs/sha256/"))
        .count();
    assert_eq!(blobs, 0, "nothing names these blobs any more");

    let ran = sandbox.fail(["rmi", BASE]);
    assert!(ran.error().contains(BASE), "{}", ran.error());
}

fn walk(directory: &std::path::Path) -> Vec<(String, u64)> {
    let mut found = vec![];
    for entry in std::fs::read_dir(directory).expect("read a directory") {
        let entry = entry.expect("read a directory");
        let about = entry.metadata().expect("read metadata");
        if about.is_dir() {
            found.extend(walk(&entry.path()));
        } else {
            found.push((entry.path().display().to_string(), about.len()));
        }
    }
    found
}

#[test]
fn prune_keeps_images_and_what_they_need() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM {DEV}\nRUN head -c 3000000 /dev/urandom > /big\n"));
    sandbox.build(&context, ["-t", "kept:1"]);
    let id = sandbox.inspect("kept:1", None)["Id"].clone();
    let bytes = |sandbox: &Sandbox| walk(&sandbox.root()).iter().map(|(_, size)| size).sum::<u64>();

    sandbox.run(["prune", "--all", "--force"]);
    assert_eq!(sandbox.inspect("kept:1", None)["Id"], id);
    let ran = sandbox.run(["run", "--rm", "kept:1", "wc", "-c", "/big"]);
    assert!(ran.stdout.contains("3000000"), "{}", ran.stdout);

    let before = bytes(&sandbox);
    sandbox.run(["rmi", "kept:1"]);
    sandbox.run(["prune", "--all", "--force"]);
    let freed = before.saturating_sub(bytes(&sandbox));
    assert!(freed >= 3_000_000, "only {freed} bytes were freed");
    sandbox.build(&context, ["-t", "kept:1"]);
}

#[test]
fn du_counts_what_the_store_holds() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM {BASE}\nRUN head -c 5000000 /dev/urandom > /big\n"));
    sandbox.build(&context, ["-t", "big:1"]);
    let printed = sandbox.run(["du"]).stdout;
    assert!(printed.lines().any(|line| line.to_ascii_lowercase().contains("total")), "{printed}");
}

#[test]
fn inspect_tells_the_configuration_of_a_platform() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM {BASE}\nENV A=b\nCMD [\"true\"]\n"));
    sandbox.build(&context, ["-t", "seen:1", "--platform=linux/amd64,linux/arm64"]);
    for platform in ["linux/amd64", "linux/arm64"] {
        let image = sandbox.inspect("seen:1", Some(platform));
        assert_eq!(
            format!(
                "{}/{}",
                image["Os"].as_str().unwrap(),
                image["Architecture"].as_str().unwrap()
            ),
            platform
        );
        assert_eq!(image["Config"]["Cmd"], serde_json::json!(["true"]));
        assert!(
            image["RootFS"]["Layers"].as_array().is_some_and(|layers| layers.len() == 1),
            "{image}"
        );
    }
    let ran = sandbox.fail(["inspect", "--platform=linux/s390x", "seen:1"]);
    assert!(ran.error().contains("linux/s390x"), "{}", ran.error());
}

#[test]
fn run_starts_a_command_in_an_image_of_either_platform() {
    let sandbox = Sandbox::with_base();
    for (platform, machine) in [("linux/amd64", "x86_64"), ("linux/arm64", "aarch64")] {
        let ran = sandbox.run(["run", "--rm", "--platform", platform, BASE, "uname", "-m"]);
        assert_eq!(ran.stdout.trim(), machine);
    }
    // The exit code and both streams are those of the command.
    let ran = sandbox
        .slipway(["run", "--rm", BASE, "sh", "-c", "echo out; echo err >&2; exit 7"])
        .fails(7);
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("out\n", "err\n"));

    let piped = sandbox.slipway(["run", "--rm", "-i", BASE, "wc", "-c"]).stdin("12345").succeeds();
    assert_eq!(piped.stdout.trim(), "5");

    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {BASE}\nENV WHO=world\nWORKDIR /tmp\nUSER 33\nENTRYPOINT [\"sh\", \"-c\", \"echo $0 $WHO $(pwd) $(id -u)\"]\nCMD [\"hello\"]\n"
    ));
    sandbox.build(
        &context,
        ["-t", "entry:1", "--platform", &format!("{},{}", host_platform(), foreign_platform())],
    );
    assert_eq!(sandbox.run(["run", "--rm", "entry:1"]).stdout, "hello world /tmp 33\n");
    assert_eq!(sandbox.run(["run", "--rm", "entry:1", "bye"]).stdout, "bye world /tmp 33\n");

    // What a command writes is gone with it.
    sandbox.run(["run", "--rm", BASE, "touch", "/written"]);
    sandbox.slipway(["run", "--rm", BASE, "test", "-e", "/written"]).fails(1);
}

#[test]
fn names_that_are_none_are_refused() {
    let sandbox = Sandbox::with_base();
    for name in ["UPPER", "host.invalid/UPPER", "a b", "x:", ":1", "a//b", "x:tag!", "", "x@sha256:1"] {
        let ran = sandbox.fail(["tag", BASE, name]);
        assert!(ran.error().contains(name), "{name:?}: {}", ran.error());
    }
    let ran = sandbox.fail(["tag", "absent:1", "x:1"]);
    assert!(ran.error().contains("absent:1"), "{}", ran.error());
    let context = sandbox.context("context");
    context.dockerfile("FROM scratch\nCOPY Dockerfile /\n");
    let ran = sandbox.build_fails(&context, ["-t", "Not A Name"]);
    assert!(ran.error().contains("Not A Name"), "{}", ran.error());
}

#[test]
fn the_store_is_an_oci_layout() {
    let sandbox = Sandbox::with_base();
    let layouts: Vec<_> = walk(&sandbox.root())
        .into_iter()
        .filter(|(path, _)| path.ends_with("/oci-layout"))
        .collect();
    assert_eq!(layouts.len(), 1, "{layouts:?}");
    let directory = std::path::Path::new(&layouts[0].0).parent().unwrap();
    let printed = slipway_tests::tool(
        std::process::Command::new("skopeo")
            .args(["inspect", "--raw"])
            .arg(format!("oci:{}:{BASE}", directory.display())),
    );
    assert!(printed.contains("\"manifests\""), "{printed}");
}

#[test]
fn commands_work_on_a_root_that_does_not_exist_yet() {
    let sandbox = Sandbox::new();
    assert_eq!(sandbox.run(["images", "-q"]).stdout, "");
    sandbox.run(["prune", "--force"]);
    let elsewhere = sandbox.arg("elsewhere/root");
    sandbox.run(["--root", &elsewhere, "images"]);
    assert!(std::path::Path::new(&elsewhere).exists(), "--root wins over the environment");
}
