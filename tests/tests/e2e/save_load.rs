//! Archives in and out of the store, to and from other tools.

use std::fs;
use std::process::Command;

use slipway_tests::{BASE, Layout, Sandbox, Tree, base_archive, tool};

#[test]
fn a_saved_image_is_read_by_skopeo_with_all_platforms() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.file("f", "f\n").dockerfile(&format!("FROM {BASE}\nCOPY f /f\n"));
    sandbox.build(&context, ["-t", "saved:1", "--platform=linux/amd64,linux/arm64"]);
    let archive = sandbox.arg("saved.tar");
    sandbox.run(["save", "-o", &archive, "saved:1"]);

    let layout = sandbox.path("layout");
    tool(
        Command::new("skopeo")
            .args(["copy", "--quiet", "--all", &format!("oci-archive:{archive}")])
            .arg(format!("oci:{}:it", layout.display())),
    );
    let layout = Layout::open(layout);
    let images = layout.images(&layout.descriptors()[0]);
    assert_eq!(images.keys().collect::<Vec<_>>(), ["linux/amd64", "linux/arm64"]);
    for platform in images.keys() {
        assert!(Tree::read(&layout.umoci_unpack("it", platform)).has("f"));
    }

    // As `docker load` would read it.
    let one = sandbox.path("one");
    tool(
        Command::new("skopeo")
            .args(["copy", "--quiet", &format!("docker-archive:{archive}")])
            .arg(format!("oci:{}:it", one.display())),
    );
    let one = Layout::open(one);
    assert_eq!(one.images(&one.descriptors()[0]).len(), 1);
}

#[test]
fn a_saved_image_loads_into_another_store_unchanged() {
    let first = Sandbox::with_base();
    let archive = first.arg("saved.tar");
    first.run(["save", "-o", &archive, BASE]);
    let second = Sandbox::new();
    let ran = second.run(["load", "-i", &archive]);
    assert_eq!(ran.stdout, format!("Loaded image: {BASE}\n"));
    for platform in ["linux/amd64", "linux/arm64"] {
        assert_eq!(first.inspect(BASE, Some(platform)), second.inspect(BASE, Some(platform)));
    }
    let again = second.arg("again.tar");
    second.run(["save", "-o", &again, BASE]);
    assert!(
        fs::read(archive).unwrap() == fs::read(again).unwrap(),
        "the same image gave two different archives"
    );
}

#[test]
fn save_and_load_work_through_pipes() {
    let first = Sandbox::with_base();
    let saved = first.run(["save", BASE, slipway_tests::DEV]).bytes;
    let second = Sandbox::new();
    let ran = second.slipway(["load"]).stdin(saved).succeeds();
    let mut loaded: Vec<_> = ran.stdout.lines().collect();
    loaded.sort_unstable();
    assert_eq!(
        loaded,
        [format!("Loaded image: {BASE}"), format!("Loaded image: {}", slipway_tests::DEV)]
    );
}

#[test]
fn archives_made_by_skopeo_are_loaded() {
    let sandbox = Sandbox::new();
    let base = format!("oci-archive:{}:base", base_archive().display());
    let (oci, docker) = (sandbox.arg("oci.tar"), sandbox.arg("docker.tar"));
    tool(Command::new("skopeo").args([
        "copy",
        "--quiet",
        "--all",
        &base,
        &format!("oci-archive:{oci}:tag-only"),
    ]));
    tool(Command::new("skopeo").args([
        "copy",
        "--quiet",
        &base,
        &format!("docker-archive:{docker}:example.com/from-docker:2"),
    ]));

    let ran = sandbox.run(["load", "-i", &docker]);
    assert_eq!(ran.stdout, "Loaded image: example.com/from-docker:2\n");
    // skopeo compresses no layer of a docker archive, and names the image in manifest.json only.
    let context = sandbox.context("context");
    context.dockerfile("FROM example.com/from-docker:2\nRUN echo ran > /said\n");
    let tree = sandbox.build_tree(&context, []);
    assert_eq!(fs::read_to_string(tree.join("said")).unwrap(), "ran\n");

    let ran = sandbox.run(["load", "-i", &oci]);
    assert!(ran.stdout.starts_with("Loaded image"), "{}", ran.stdout);
    let name = ran.stdout.trim_end().rsplit(' ').next().unwrap().to_owned();
    let platforms = ["linux/amd64", "linux/arm64"]
        .map(|platform| sandbox.inspect(&name, Some(platform))["Architecture"].clone());
    assert_eq!(platforms, ["amd64", "arm64"]);
}

#[test]
fn compressed_archives_are_loaded() {
    let expected = format!("Loaded image: {BASE}\nLoaded image: {}\n", slipway_tests::DEV);
    for program in ["gzip", "xz", "zstd"] {
        let sandbox = Sandbox::new();
        let packed = Command::new(program)
            .arg("-c")
            .arg("-1")
            .arg(base_archive())
            .output()
            .expect("start the packer");
        assert!(packed.status.success());
        fs::write(sandbox.path("packed"), packed.stdout).unwrap();
        assert_eq!(
            sandbox.run(["load", "-i", &sandbox.arg("packed")]).stdout,
            expected,
            "{program}"
        );
    }
}

#[test]
fn broken_archives_are_refused_and_leave_the_store_as_it_was() {
    let sandbox = Sandbox::new();
    let whole = fs::read(base_archive()).unwrap();
    let path = sandbox.arg("broken.tar");
    let mut flipped = whole.clone();
    // In the middle of the archive is the middle of a layer.
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x40;
    for (what, bytes) in [
        ("nothing", vec![]),
        ("text", b"this is no archive\n".repeat(100)),
        ("half of an archive", whole[..whole.len() / 2].to_vec()),
        ("a changed byte", flipped),
    ] {
        fs::write(&path, bytes).unwrap();
        let ran = sandbox.fail(["load", "-i", &path]);
        assert!(!ran.stdout.contains("Loaded"), "{what}: {}", ran.stdout);
        assert_eq!(sandbox.run(["images", "-q"]).stdout, "", "{what} left an image");
    }
    let ran = sandbox.fail(["load", "-i", &sandbox.arg("absent.tar")]);
    assert!(ran.error().contains("absent.tar"), "{}", ran.error());
    sandbox.run(["load", "-i", base_archive().to_str().unwrap()]);
}
