//! The commands that look after the store.

use serde_json::Value;
use slipway_tests::{
    BASE, DEV, Registry, Sandbox, Server, base_archive, foreign_platform, host_platform, tool,
};

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
    for name in
        ["UPPER", "host.invalid/UPPER", "a b", "x:", ":1", "a//b", "x:tag!", "", "x@sha256:1"]
    {
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

#[test]
fn prune_without_all_keeps_what_the_last_build_needs() {
    let sandbox = Sandbox::with_base();
    let counter = Server::counter();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN wget -q -O /dev/null http://{}/ran\n",
        counter.host()
    ));
    sandbox.build(&context, ["-t", "kept:1"]);
    sandbox.run(["prune", "--force"]);
    sandbox.build(&context, ["-t", "kept:1"]);
    assert_eq!(counter.count("/ran"), 1);
    // Another process, another working directory, the same store.
    sandbox
        .slipway(["build", "-t", "again:1", context.arg()])
        .current_dir(context.path())
        .succeeds();
    assert_eq!(counter.count("/ran"), 1);
}

#[test]
fn prune_asks_before_it_deletes() {
    let sandbox = Sandbox::with_base();
    let before = walk(&sandbox.root()).len();
    let ran = sandbox.slipway(["prune", "--all"]).stdin("n\n").ran();
    assert_eq!(walk(&sandbox.root()).len(), before, "{}{}", ran.stdout, ran.stderr);
}

#[test]
fn platforms_can_be_chosen_one_by_one() {
    let sandbox = Sandbox::with_base();
    let registry = Registry::start();
    let (archive, image) = (sandbox.arg("one.tar"), registry.image("debian:base"));
    sandbox.run(["save", "--platform=linux/arm64", "-o", &archive, BASE]);
    sandbox.run(["tag", BASE, &image]);
    sandbox.run(["push", "--platform=linux/arm64", &image]);
    let pushed: Value =
        serde_json::from_str(&registry.skopeo(&["inspect", "--raw"], "debian:base")).unwrap();
    assert!(pushed["layers"].is_array(), "a manifest and no index: {pushed}");
    let ran = sandbox.fail(["push", "--platform=linux/s390x", &image]);
    assert!(ran.error().contains("linux/s390x"), "{}", ran.error());
    let ran = sandbox.fail(["save", "--platform=linux/s390x", "-o", &sandbox.arg("no.tar"), BASE]);
    assert!(ran.error().contains("linux/s390x"), "{}", ran.error());
    assert!(!sandbox.path("no.tar").exists(), "no half of an archive is left");

    let other = Sandbox::new();
    other.run(["load", "-i", &archive]);
    assert_eq!(other.inspect(BASE, None)["Architecture"], "arm64");
    other.fail(["inspect", "--platform=linux/amd64", BASE]);

    let third = Sandbox::new();
    sandbox.run(["push", &image]);
    third.run(["pull", "--all-platforms", &image]);
    for platform in ["linux/amd64", "linux/arm64"] {
        third.inspect(&image, Some(platform));
    }
}

#[test]
fn run_can_be_told_how_to_start() {
    let sandbox = Sandbox::with_base();
    let ran = sandbox
        .slipway(["run", "--rm", "-e", "A=b c", "-e", "FROM_HERE", "-w", "/etc", "-u", "33:33"])
        .env("FROM_HERE", "here");
    let ran =
        ran.args([BASE, "sh", "-c", "echo $A $FROM_HERE $(pwd) $(id -u):$(id -g)"]).succeeds();
    assert_eq!(ran.stdout, "b c here /etc 33:33\n");
    let ran = sandbox.run(["run", "--rm", "--entrypoint", "echo", BASE, "a", "-b", "--help"]);
    assert_eq!(ran.stdout, "a -b --help\n");

    // As `docker run` tells its own errors from those of the command.
    let codes = [
        (&["run", "--rm", "absent.invalid/image:1"][..], 125),
        (&["run", "--rm", "--no-such-flag", BASE], 125),
        (&["run", "--rm", BASE, "/etc/passwd"], 126),
        (&["run", "--rm", BASE, "no-such-command"], 127),
        (&["run", "--rm", BASE, "sh", "-c", "sh -c 'kill -9 $$'; exit $?"], 137),
    ];
    for (words, code) in codes {
        sandbox.slipway(words).fails(code);
        sandbox.assert_nothing_left();
    }
}

#[test]
fn a_user_without_rights_has_a_store_below_the_data_directory() {
    let sandbox = Sandbox::new();
    // The scratch directory is closed to other users, and so may be those above it: here is another.
    let script = format!(
        "mount -t tmpfs -o mode=777 none {0} && cp \"$1\" {0}/slipway && shift && cd {0} && \
         HOME={0}/home XDG_DATA_HOME={0}/data SLIPWAY_CERTS_DIR={0}/certs DOCKER_CONFIG={0}/docker TMPDIR={0} setpriv --reuid 12345 --regid 12345 --clear-groups {0}/slipway \"$@\"; \
         code=$?; ls {0}/data; exit $code",
        "/mnt"
    );
    let ran = sandbox
        .slipway(["images", "-q"])
        .without("SLIPWAY_ROOT")
        .under(["unshare", "--mount", "sh", "-c", &script, "sh"])
        .succeeds();
    assert_eq!(ran.stdout, "slipway\n", "{}", ran.stderr);
}

#[test]
fn an_image_is_removed_by_its_id() {
    let sandbox = Sandbox::with_base();
    let id = sandbox.inspect(BASE, None)["Id"].as_str().unwrap().to_owned();
    sandbox.run(["tag", BASE, "second:1"]);
    let ran = sandbox.fail(["rmi", &id]);
    assert!(ran.error().contains("-f") || ran.stderr.contains("--force"), "{}", ran.stderr);
    sandbox.run(["rmi", "--force", &id]);
    sandbox.fail(["inspect", "second:1"]);
    sandbox.fail(["inspect", BASE]);
    sandbox.inspect(DEV, None);
    let short =
        &sandbox.inspect(DEV, None)["Id"].as_str().unwrap()["sha256:".len()..][..12].to_owned();
    sandbox.run(["rmi", short]);
    assert_eq!(sandbox.run(["images", "-q"]).stdout, "");
}

/// Changes one byte in the middle of each layer that the store keeps.
fn damage_layers(sandbox: &Sandbox) {
    let layers = walk(&sandbox.root())
        .into_iter()
        .filter(|(path, size)| path.contains("blobs/sha256/") && *size > 100_000);
    let mut damaged = 0;
    for (path, size) in layers {
        let mut bytes = std::fs::read(&path).expect("read a blob");
        *bytes.get_mut(size as usize / 2).expect("the middle of a blob") ^= 0x10;
        std::fs::remove_file(&path).expect("remove a blob");
        std::fs::write(&path, bytes).expect("write a blob");
        damaged += 1;
    }
    assert_eq!(damaged, 4, "two layers for each of two platforms");
}

#[test]
fn a_damaged_layer_is_not_used() {
    let sandbox = Sandbox::with_base();
    damage_layers(&sandbox);
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM {BASE}\nRUN touch /x\n"));
    let ran = sandbox.build_fails(&context, ["-t", "x:1"]);
    assert!(ran.error().contains("damaged") && ran.error().contains("sha256:"), "{}", ran.error());

    sandbox.run(["load", "-i", base_archive().to_str().unwrap()]);
    sandbox.build(&context, ["-t", "x:1"]);
}

#[test]
fn a_damaged_layer_is_not_pushed() {
    let sandbox = Sandbox::with_base();
    let registry = Registry::start();
    damage_layers(&sandbox);
    let image = registry.image("debian:base");
    sandbox.run(["tag", BASE, &image]);
    let ran = sandbox.fail(["push", &image]);
    assert!(ran.error().contains("sha256:"), "{}", ran.error());
}

#[test]
fn a_damaged_layer_is_not_saved() {
    let sandbox = Sandbox::with_base();
    damage_layers(&sandbox);
    let archive = sandbox.arg("saved.tar");
    let ran = sandbox.fail(["save", "-o", &archive, DEV]);
    assert!(ran.error().contains("sha256:"), "{}", ran.error());
    assert!(!sandbox.path("saved.tar").exists(), "no half of an archive is left");
}

#[test]
fn a_damaged_database_is_an_error_that_names_it() {
    let sandbox = Sandbox::with_base();
    let database = sandbox.root().join("metadata.db");
    // Folds the log into the database, so that there is something to damage.
    let vacuum = "import sqlite3,sys; sqlite3.connect(sys.argv[1]).execute('VACUUM')";
    tool(std::process::Command::new("python3").args(["-c", vacuum]).arg(&database));
    let whole = std::fs::read(&database).unwrap();
    for damaged in [whole[..whole.len() / 2].to_vec(), b"no database\n".repeat(1000)] {
        std::fs::write(&database, damaged).unwrap();
        // The log may hold every page of so young a database, and would heal it.
        for log in ["metadata.db-wal", "metadata.db-shm"] {
            let _gone = std::fs::remove_file(sandbox.root().join(log));
        }
        let ran = sandbox.fail(["images"]);
        assert!(ran.error().contains("metadata.db"), "{}", ran.error());
    }
}
