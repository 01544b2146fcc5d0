//! Where a result can go.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use slipway_tests::{BASE, Context, Layout, Registry, Sandbox, Tree, tool};

fn small(sandbox: &Sandbox) -> Context {
    let context = sandbox.context("context");
    context
        .file("f", "content\n")
        .file("d/g", "more\n")
        .dockerfile("FROM scratch\nCOPY . /files/\nENTRYPOINT [\"/files/f\"]\n");
    context.file(".dockerignore", "Dockerfile\n.dockerignore\n");
    context
}

#[test]
fn an_oci_archive_is_a_layout_with_an_index_for_several_platforms() {
    let sandbox = Sandbox::new();
    let context = small(&sandbox);
    let archive = sandbox.arg("image.tar");
    sandbox.build(
        &context,
        [
            "-t",
            "example.com/team/app:1.0",
            "--platform=linux/amd64,linux/arm64",
            "-o",
            &format!("type=oci,dest={archive}"),
        ],
    );
    let layout = Layout::unpack(Path::new(&archive));
    let descriptors = layout.descriptors();
    assert_eq!(descriptors.len(), 1, "{descriptors:?}");
    assert_eq!(descriptors[0]["mediaType"], "application/vnd.oci.image.index.v1+json");
    assert_eq!(
        descriptors[0]["annotations"]["io.containerd.image.name"],
        "example.com/team/app:1.0"
    );
    assert_eq!(descriptors[0]["annotations"]["org.opencontainers.image.ref.name"], "1.0");
    let images = layout.images(&descriptors[0]);
    assert_eq!(images.keys().collect::<Vec<_>>(), ["linux/amd64", "linux/arm64"]);
    for image in images.values() {
        assert_eq!(image.manifest["mediaType"], "application/vnd.oci.image.manifest.v1+json");
        assert_eq!(image.config["config"]["Entrypoint"], serde_json::json!(["/files/f"]));
    }
}

#[test]
fn an_archive_can_go_to_standard_output() {
    let sandbox = Sandbox::new();
    let context = small(&sandbox);
    let ran = sandbox.build(&context, ["-t", "out:1", "-o", "type=oci,dest=-"]);
    fs::write(sandbox.path("image.tar"), &ran.bytes).unwrap();
    let layout = Layout::unpack(&sandbox.path("image.tar"));
    assert_eq!(layout.images(&layout.descriptors()[0]).len(), 1);

    let ran = sandbox.build(&context, ["-o", "-"]);
    fs::write(sandbox.path("files.tar"), &ran.bytes).unwrap();
    let names = tool(Command::new("tar").arg("-tf").arg(sandbox.path("files.tar")));
    let names: Vec<_> =
        names.lines().map(|name| name.trim_start_matches("./").trim_end_matches('/')).collect();
    assert_eq!(names, ["files", "files/d", "files/d/g", "files/f"]);
}

#[test]
fn a_docker_archive_is_read_by_skopeo() {
    let sandbox = Sandbox::new();
    let context = small(&sandbox);
    let archive = sandbox.arg("docker.tar");
    sandbox.build(&context, ["-t", "team/app:1.0", "-o", &format!("type=docker,dest={archive}")]);

    let manifest = tool(Command::new("tar").args(["-xOf", &archive, "manifest.json"]));
    let manifest: Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest[0]["RepoTags"], serde_json::json!(["team/app:1.0"]));

    let layout = sandbox.path("layout");
    tool(
        Command::new("skopeo")
            .args(["copy", "--quiet", &format!("docker-archive:{archive}")])
            .arg(format!("oci:{}:it", layout.display())),
    );
    let layout = Layout::open(layout);
    let images = layout.images(&layout.descriptors()[0]);
    let image = images.values().next().unwrap();
    assert_eq!(image.config["config"]["Entrypoint"], serde_json::json!(["/files/f"]));
}

#[test]
fn several_platforms_go_to_a_folder_each() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context
        .file("amd64", "")
        .file("arm64", "")
        .dockerfile("FROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH /it\nCOPY $TARGETARCH /\n");
    let tree = sandbox.build_tree(&context, ["--platform=linux/amd64,linux/arm64"]);
    let tree = Tree::read(&tree);
    assert_eq!(
        tree.paths(),
        [
            "linux_amd64",
            "linux_amd64/amd64",
            "linux_amd64/it",
            "linux_arm64",
            "linux_arm64/arm64",
            "linux_arm64/it"
        ]
    );
}

#[test]
fn a_local_export_leaves_other_files_of_the_folder_alone() {
    let sandbox = Sandbox::new();
    let context = small(&sandbox);
    fs::create_dir_all(sandbox.path("out/files")).unwrap();
    fs::write(sandbox.path("out/mine"), "mine").unwrap();
    fs::write(sandbox.path("out/files/f"), "old and longer than the new content").unwrap();
    sandbox.build(&context, ["-o", &sandbox.arg("out")]);
    assert_eq!(fs::read_to_string(sandbox.path("out/mine")).unwrap(), "mine");
    assert_eq!(fs::read_to_string(sandbox.path("out/files/f")).unwrap(), "content\n");
}

#[test]
fn equal_inputs_give_equal_bytes() {
    let build = |name: &str| {
        let sandbox = Sandbox::with_base();
        let context = small(&sandbox);
        context.dockerfile(&format!("FROM {BASE}\nCOPY . /files/\nLABEL a=b\n"));
        for file in ["f", "d/g"] {
            context.touch(file, 1_600_000_000);
        }
        for directory in ["d", ""] {
            fs::File::open(context.path().join(directory))
                .unwrap()
                .set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_600_000_000))
                .unwrap();
        }
        let archive = sandbox.arg(name);
        let option = format!("type=oci,dest={archive}");
        let arguments = ["build", "-t", "same:1", "-o", &option, context.arg()];
        sandbox.slipway(arguments).env("SOURCE_DATE_EPOCH", "1600000000").succeeds();
        fs::read(archive).unwrap()
    };
    // Two stores, so nothing is shared but the input; and not in the same second of the clock.
    let one = build("one.tar");
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert!(one == build("two.tar"), "the same input gave two different archives");
}

#[test]
fn what_cannot_be_written_is_named() {
    let sandbox = Sandbox::new();
    let context = small(&sandbox);
    let ran = sandbox
        .build_fails(&context, ["-t", "x:1", "-o", "type=oci,dest=/no/such/folder/image.tar"]);
    assert!(ran.error().contains("/no/such/folder"), "{}", ran.error());
    let ran = sandbox.build_fails(&context, ["-o", "type=floppy,dest=x"]);
    assert!(ran.error().contains("floppy"), "{}", ran.error());
    let ran = sandbox.build_fails(&context, ["-o", "type=local"]);
    assert!(ran.error().contains("dest"), "{}", ran.error());
    let ran = sandbox.build_fails(&context, ["--push"]);
    assert!(ran.error().contains("-t NAME"), "a push needs a name: {}", ran.error());
    sandbox.build(&context, ["-t", "x:1"]);
}

#[test]
fn one_build_can_have_several_outputs() {
    let sandbox = Sandbox::new();
    let registry = Registry::start();
    let context = small(&sandbox);
    let (oci, docker) = (sandbox.arg("oci.tar"), sandbox.arg("docker.tar"));
    let image = registry.image("several/outputs:1");
    let metadata = sandbox.arg("metadata.json");
    sandbox.build(
        &context,
        [
            "--platform=linux/amd64,linux/arm64",
            "--metadata-file",
            &metadata,
            "-o",
            &format!("type=image,name={image},push=true"),
            "-o",
            &format!("type=oci,dest={oci}"),
            "-o",
            &format!("type=local,dest={}", sandbox.arg("files")),
        ],
    );
    let metadata: Value = serde_json::from_str(&fs::read_to_string(metadata).unwrap()).unwrap();
    let digest = metadata["containerimage.digest"].as_str().unwrap();
    let pushed = registry.skopeo(&["inspect", "--format", "{{.Digest}}"], "several/outputs:1");
    assert_eq!(pushed.trim(), digest);
    let layout = Layout::unpack(Path::new(&oci));
    assert_eq!(layout.descriptors()[0]["digest"], digest);
    assert!(sandbox.path("files/linux_arm64/files/f").exists());
    assert_eq!(sandbox.inspect(&image, None)["Id"], digest);

    // A docker archive holds one platform.
    let option = format!("type=docker,dest={docker}");
    sandbox.build(&context, ["--platform=linux/arm64", "-t", "small:1", "-o", &option]);
    let config = tool(Command::new("skopeo").args([
        "inspect",
        "--config",
        &format!("docker-archive:{docker}"),
    ]));
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["architecture"], "arm64");
}

#[test]
fn load_keeps_the_image_beside_other_outputs() {
    let sandbox = Sandbox::new();
    let context = small(&sandbox);
    let output = format!("type=oci,dest={}", sandbox.arg("image.tar"));
    sandbox.build(&context, ["-t", "not-kept:1", "-o", &output]);
    sandbox.fail(["inspect", "not-kept:1"]);
    sandbox.build(&context, ["-t", "kept:1", "-o", &output, "--load"]);
    sandbox.inspect("kept:1", None);
}
