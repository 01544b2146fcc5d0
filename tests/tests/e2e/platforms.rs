//! One Dockerfile, several platforms.

use std::path::Path;
use std::process::Command;

use slipway_tests::{
    BASE, DEV, Layout, Registry, Sandbox, Server, Tree, foreign_platform, host_platform, tool,
};

/// Files of every kind that a layer can hold, made by `RUN` and `COPY` on top of a base image.
const KINDS: &str = r#"
FROM slipway.local/debian:base
RUN mkdir -p /data/sub /data/sticky /data/empty && chmod 1777 /data/sticky && chmod 2750 /data/sub \
    && echo content > /data/file && ln /data/file /data/hard && ln -s ../data/file /data/soft \
    && ln -s nowhere /data/dangling && mkfifo /data/fifo && chown 1234:5678 /data/sub && chown -h 33:33 /data/soft \
    && cp /usr/bin/busybox /data/tool && chmod 4755 /data/tool && touch -d '2001-02-03 04:05:06' /data/old \
    && uname -m > /data/machine
RUN /sbin/setcap cap_net_raw+ep /data/tool
RUN rm -r /etc/os-release /usr/share/base-files && rm -r /etc/dpkg && mkdir /etc/dpkg && echo new > /etc/dpkg/new
COPY --chown=1000:1001 --chmod=0640 files/ /copied/
COPY files/link /copied-link
"#;

fn machine(platform: &str) -> &'static str {
    if platform == "linux/amd64" { "x86_64" } else { "aarch64" }
}

fn kinds_context(sandbox: &Sandbox) -> slipway_tests::Context {
    let context = sandbox.context("context");
    context
        .dockerfile(KINDS)
        .file("files/a", "a\n")
        .file("files/deep/er/b", vec![7; 100_000])
        .symlink("files/link", "a");
    context
}

fn untar(archive: &Path) -> std::path::PathBuf {
    let directory = archive.with_extension("files");
    std::fs::create_dir(&directory).expect("create a directory");
    tool(
        Command::new("tar")
            .args(["--numeric-owner", "--same-owner", "--xattrs", "--xattrs-include=*", "-p", "-C"])
            .arg(&directory)
            .arg("-xf")
            .arg(archive),
    );
    directory
}

#[test]
fn a_pushed_index_unpacks_elsewhere_to_the_files_that_were_built() {
    let sandbox = Sandbox::with_base();
    let registry = Registry::start();
    let context = kinds_context(&sandbox);
    let image = registry.image("team/kinds:1.0");

    sandbox.build(&context, ["--platform=linux/amd64,linux/arm64", "-t", &image, "--push"]);

    let index: serde_json::Value =
        serde_json::from_str(&registry.skopeo(&["inspect", "--raw"], "team/kinds:1.0")).unwrap();
    assert_eq!(index["mediaType"], "application/vnd.oci.image.index.v1+json");
    let platforms: Vec<_> = index["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|manifest| manifest["platform"]["architecture"].as_str().unwrap())
        .collect();
    assert_eq!(platforms, ["amd64", "arm64"]);

    registry.copy_to_layout("team/kinds:1.0", &sandbox.path("pulled"), "it");
    let layout = Layout::open(sandbox.path("pulled"));
    let images = layout.images(&layout.descriptors()[0]);
    assert_eq!(images.keys().collect::<Vec<_>>(), ["linux/amd64", "linux/arm64"]);

    for platform in images.keys() {
        let unpacked = Tree::read(&layout.umoci_unpack("it", platform));
        let option = format!("--platform={platform}");

        let tar = format!(
            "type=tar,dest={}",
            sandbox.arg(&format!("{}.tar", platform.replace('/', "-")))
        );
        sandbox.build(&context, [&option, "--output", &tar]);
        let exported = untar(Path::new(tar.split_once("dest=").unwrap().1));
        unpacked.assert_equals(&Tree::read(&exported), &format!("umoci and type=tar, {platform}"));

        let local = sandbox.build_tree(&context, [option.as_str()]);
        let (left, right) =
            (unpacked.clone().without_owners(), Tree::read(&local).without_owners());
        left.assert_equals(&right, &format!("umoci and type=local, {platform}"));

        // Both could be wrong in the same way: hold one of them to the Dockerfile.
        let machine_file = std::fs::read_to_string(local.join("data/machine")).unwrap();
        assert_eq!(machine_file.trim(), machine(platform), "RUN was executed for {platform}");
        assert_kinds(&unpacked);
    }
}

fn assert_kinds(tree: &Tree) {
    let owner_and_mode =
        |path: &str| (tree.entry(path).owner, format!("{:o}", tree.entry(path).mode));
    assert_eq!(owner_and_mode("data/sub"), ((1234, 5678), "2750".into()));
    assert_eq!(owner_and_mode("data/sticky"), ((0, 0), "1777".into()));
    assert_eq!(owner_and_mode("data/tool"), ((0, 0), "4755".into()));
    assert_eq!(owner_and_mode("copied/deep/er/b"), ((1000, 1001), "640".into()));
    assert_eq!(owner_and_mode("copied-link"), ((0, 0), "644".into()));
    assert_eq!(tree.entry("data/hard").hard_link_to.as_deref(), Some("data/file"));
    assert_eq!(tree.entry("data/soft").content, "../data/file");
    assert_eq!(tree.entry("data/soft").owner, (33, 33));
    assert_eq!(tree.entry("data/dangling").content, "nowhere");
    assert_eq!(tree.entry("data/fifo").kind, "fifo");
    assert_eq!(tree.entry("data/old").mtime, Some(981_173_106));
    assert_eq!(tree.entry("copied/link").content, "a");
    let capability =
        tree.entry("data/tool").xattrs.get("security.capability").expect("setcap was executed");
    assert_eq!(capability[4] & 0x20, 0, "cap_net_raw is number 13: {capability:x?}");
    assert_eq!(capability[5] & 0x20, 0x20, "cap_net_raw is number 13: {capability:x?}");
    assert!(
        !tree.has("etc/os-release") && !tree.has("usr/share/base-files"),
        "deleted files stay deleted"
    );
    assert_eq!(
        tree.paths().iter().filter(|path| path.starts_with("etc/dpkg/")).count(),
        1,
        "a new directory hides the old"
    );
    assert!(
        tree.has("usr/bin/busybox") && tree.has("data/empty"),
        "the base is there, and empty directories"
    );
}

#[test]
fn without_platform_the_result_is_a_single_manifest_for_this_machine() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM {BASE}\nRUN uname -m > /machine\n"));
    let archive = sandbox.arg("image.tar");
    sandbox.build(&context, ["-t", "one:1", "--output", &format!("type=oci,dest={archive}")]);

    let layout = Layout::unpack(Path::new(&archive));
    let descriptors = layout.descriptors();
    assert_eq!(descriptors.len(), 1);
    assert_eq!(descriptors[0]["mediaType"], "application/vnd.oci.image.manifest.v1+json");
    let images = layout.images(&descriptors[0]);
    assert_eq!(images.keys().collect::<Vec<_>>(), [host_platform()]);
}

#[test]
fn steps_of_a_foreign_platform_are_executed_under_emulation() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    // A dynamic program, a static one, the exec form, a script by its #! line, and a program that starts others.
    context
        .file("script", "#!/bin/sh\nuname -m\n")
        .mode("script", 0o755)
        .file("main.c", "int main(void) { return 42; }\n");
    context.dockerfile(&format!(
        "FROM {DEV}\nCOPY script main.c /src/\n\
         RUN uname -m > /shell\nRUN [\"/bin/busybox\", \"cp\", \"/bin/busybox\", \"/exec-form\"]\n\
         RUN /src/script > /script\nRUN cc -o /main /src/main.c && {{ /main; test $? = 42; }} && touch /compiled\n\
         RUN find /src -name script -exec {{}} \\; > /nested\nRUN /sbin/getcap /main && touch /dynamic\n"
    ));
    let tree = sandbox.build_tree(&context, ["--platform", foreign_platform()]);
    for file in ["shell", "script", "nested"] {
        let said = std::fs::read_to_string(tree.join(file)).unwrap();
        assert_eq!(said.trim(), machine(foreign_platform()), "/{file}");
    }
    let tree = Tree::read(&tree);
    assert!(tree.has("compiled") && tree.has("exec-form") && tree.has("dynamic"));
    // Neither the emulator nor anything for it may end up in the image.
    let added: Vec<_> = tree
        .paths()
        .into_iter()
        .filter(|path| {
            let name = path.rsplit('/').next().unwrap_or_default();
            name.starts_with("qemu-") || path.contains("slipway") || path.starts_with("dev/")
        })
        .collect();
    assert!(added.is_empty(), "{added:?}");
}

#[test]
fn a_stage_on_the_build_platform_runs_once_for_all_platforms() {
    let sandbox = Sandbox::with_base();
    let counter = Server::counter();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM --platform=$BUILDPLATFORM {BASE} AS shared\nRUN wget -q -O /dev/null http://{0}/shared && uname -m > /built-on\n\
         FROM {BASE}\nCOPY --from=shared /built-on /\nRUN wget -q -O /dev/null http://{0}/$(uname -m)\n",
        counter.host()
    ));
    sandbox.build(&context, ["--platform=linux/amd64,linux/arm64", "-t", "shared:1"]);
    assert_eq!(counter.count("/shared"), 1);
    assert_eq!((counter.count("/x86_64"), counter.count("/aarch64")), (1, 1));

    for platform in ["linux/amd64", "linux/arm64"] {
        let tree = sandbox.build_tree(&context, ["--platform", platform]);
        let built_on = std::fs::read_to_string(tree.join("built-on")).unwrap();
        assert_eq!(built_on.trim(), machine(host_platform()));
    }
    assert_eq!(counter.requests().len(), 3, "the second builds came from the cache");
}

#[test]
fn platform_arguments_describe_the_two_sides() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "ARG TARGETARCH\nFROM --platform=$BUILDPLATFORM {BASE} AS all\n\
         ARG BUILDPLATFORM BUILDOS BUILDARCH BUILDVARIANT TARGETPLATFORM TARGETOS TARGETARCH TARGETVARIANT\n\
         RUN printf '%s\\n' \"$BUILDPLATFORM|$BUILDOS|$BUILDARCH|$BUILDVARIANT\" \"$TARGETPLATFORM|$TARGETOS|$TARGETARCH|$TARGETVARIANT\" > /said\n\
         FROM scratch\nCOPY --from=all /said /\n"
    ));
    let (_, host) = host_platform().split_once('/').unwrap();
    for (platform, target) in [
        ("linux/amd64", "linux/amd64|linux|amd64|"),
        ("linux/arm64", "linux/arm64|linux|arm64|"),
        ("linux/arm/v7", "linux/arm/v7|linux|arm|v7"),
        ("linux/riscv64", "linux/riscv64|linux|riscv64|"),
    ] {
        let tree = sandbox.build_tree(&context, ["--platform", platform]);
        let said = std::fs::read_to_string(tree.join("said")).unwrap();
        assert_eq!(said, format!("linux/{host}|linux|{host}|\n{target}\n"));
    }
}

#[test]
fn stages_and_platforms_run_at_the_same_time() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    // Neither of the two steps gets an answer before the other has asked.
    let stages = Server::rendezvous("/left", "/right");
    context.dockerfile(&format!(
        "FROM {BASE} AS left\nRUN wget -q -O /met http://{0}/left\nFROM {BASE} AS right\nRUN wget -q -O /met http://{0}/right\n\
         FROM scratch\nCOPY --from=left /met /left\nCOPY --from=right /met /right\n",
        stages.host()
    ));
    sandbox.build_tree(&context, []);

    let platforms = Server::rendezvous("/x86_64", "/aarch64");
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN wget -q -O /met http://{}/$(uname -m)\n",
        platforms.host()
    ));
    sandbox.build(&context, ["--platform=linux/amd64,linux/arm64", "-t", "met:1"]);
}

#[test]
fn a_platform_that_the_base_does_not_have_is_named() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM {BASE}\nRUN true\n"));
    let ran = sandbox.build_fails(&context, ["--platform=linux/s390x", "-t", "x:1"]);
    assert!(ran.error().contains("linux/s390x") && ran.error().contains(BASE), "{}", ran.error());
    sandbox.build(&context, ["-t", "x:1"]);
}

/// Names, times, owners and changes that the older tar formats have no room for.
const EXTREMES: &str = r#"
FROM slipway.local/debian:base AS first
RUN mkdir /e && cd /e && touch "$(printf 'not-utf8-\377')" "new$(printf '\n')line" 'ümläut' ' spaces ' \
    && long=$(printf 'x%.0s' $(seq 1 250)) && mkdir -p $long/$long && echo deep > $long/$long/$long \
    && ln -s $long/$long/$long/$long to-long && ln $long/$long/$long hard-long \
    && echo old > old && touch -d '1969-12-31 12:00:00' old && touch -d '2200-01-01 00:00:00' future \
    && echo owned > owned && chown 3000000000:4000000000 owned && mknod null c 1 3 && chmod 666 null \
    && truncate -s 300M sparse && mkdir -p becomes-file/inner gone/deep replaced && touch gone/deep/file replaced/old \
    && echo file > becomes-dir && echo one > linked && ln linked linked-too && chmod 000 becomes-dir \
    && mkdir -m 3777 special && ln -s dangling becomes-real
RUN cd /e && rm -r becomes-file && echo now a file > becomes-file && rm becomes-dir && mkdir becomes-dir && touch becomes-dir/in \
    && rm -r gone && rm -r replaced && mkdir replaced && touch replaced/new && echo two >> linked && chmod 1755 special \
    && rm becomes-real && mkdir becomes-real && chown 5:6 /usr/bin && touch .wh-not-quite
"#;

#[test]
fn extremes_survive_layers_and_archives() {
    let sandbox = Sandbox::with_base();
    let registry = Registry::start();
    let context = sandbox.context("context");
    context.dockerfile(EXTREMES);
    let image = registry.image("extremes:1");
    sandbox.build(&context, ["-t", &image, "--push"]);
    registry.copy_to_layout("extremes:1", &sandbox.path("pulled"), "it");
    let rootfs = Layout::open(sandbox.path("pulled")).umoci_unpack("it", host_platform());
    let unpacked = Tree::read(&rootfs);

    let tar = sandbox.arg("out.tar");
    sandbox.build(&context, ["-o", &format!("type=tar,dest={tar}")]);
    unpacked.assert_equals(&Tree::read(&untar(Path::new(&tar))), "umoci and type=tar");
    let local = Tree::read(&sandbox.build_tree(&context, []));
    unpacked
        .clone()
        .without_owners()
        .assert_equals(&local.without_owners(), "umoci and type=local");

    let entry = |path: &str| unpacked.entry(path);
    assert_eq!(entry("e/owned").owner, (3_000_000_000, 4_000_000_000));
    assert_eq!(
        (entry("e/old").mtime, entry("e/future").mtime),
        (Some(-43_200), Some(7_258_118_400))
    );
    assert_eq!((entry("e/null").kind, entry("e/becomes-file").kind), ("character", "file"));
    assert!(
        unpacked.has("e/becomes-dir/in") && unpacked.has("e/ümläut") && unpacked.has("e/ spaces ")
    );
    assert!(
        !unpacked.has("e/gone")
            && !unpacked.has("e/replaced/old")
            && unpacked.has("e/replaced/new")
    );
    assert_eq!(format!("{:o}", entry("e/special").mode), "1755");
    assert_eq!(entry("usr/bin").owner, (5, 6));
    // A change in an upper layer parts the two names, as overlay file systems do.
    assert_eq!(std::fs::read_to_string(rootfs.join("e/linked")).unwrap(), "one\ntwo\n");

    // The bytes of a sparse file are stored as any others are, and compress well.
    let layers = sandbox.inspect(&image, None)["Size"].as_u64().unwrap();
    assert!(layers < 20_000_000, "{layers} bytes");
}
