//! What each instruction leaves in the files and in the configuration.

use std::fs;
use std::process::Command;

use serde_json::json;
use slipway_tests::{BASE, Sandbox, Tree, tool};

#[test]
fn instructions_shape_the_configuration() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        r#"# syntax=docker/dockerfile:1.7
FROM {BASE}
ARG VERSION=2
ENV NAME="two words" VERSION=$VERSION.1
ENV PATH="/opt/bin:$PATH"
LABEL one=1 "two words"="a b" version="${{VERSION}}"
WORKDIR /srv
WORKDIR app
USER 33:33
EXPOSE 80 53/udp
VOLUME ["/data", "/more data"]
STOPSIGNAL SIGINT
HEALTHCHECK --interval=5s --timeout=2s --retries=4 CMD ["true"]
SHELL ["/bin/sh", "-ec"]
ENTRYPOINT ["/bin/echo", "$NAME"]
CMD echo done
"#
    ));
    sandbox
        .build(&context, ["-t", "config:1", "--label", "two words=changed", "--label", "three=3"]);
    let image = sandbox.inspect("config:1", None);
    let config = &image["Config"];
    assert_eq!(config["Shell"], json!(["/bin/sh", "-ec"]));
    assert_eq!(
        config["Env"],
        json!([
            "PATH=/opt/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "NAME=two words",
            "VERSION=2.1"
        ])
    );
    assert_eq!(
        config["Labels"],
        json!({ "one": "1", "two words": "changed", "version": "2.1", "three": "3" })
    );
    assert_eq!(config["WorkingDir"], "/srv/app");
    assert_eq!(config["User"], "33:33");
    assert_eq!(config["ExposedPorts"], json!({ "80/tcp": {}, "53/udp": {} }));
    assert_eq!(config["Volumes"], json!({ "/data": {}, "/more data": {} }));
    assert_eq!(config["StopSignal"], "SIGINT");
    assert_eq!(config["Healthcheck"]["Test"], json!(["CMD", "true"]));
    assert_eq!(config["Healthcheck"]["Interval"], 5_000_000_000_u64);
    assert_eq!(config["Healthcheck"]["Timeout"], 2_000_000_000_u64);
    assert_eq!(config["Healthcheck"]["Retries"], 4);
    assert_eq!(config["Entrypoint"], json!(["/bin/echo", "$NAME"]));
    assert_eq!(config["Cmd"], json!(["/bin/sh", "-ec", "echo done"]));
}

#[test]
fn variables_have_defaults_and_alternatives() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "ARG TAG=base\nFROM slipway.local/debian:${{TAG:-none}}\nARG GIVEN\nARG ABSENT\nARG PRESET=preset\nENV E=$PRESET\n\
         ENV A=${{ABSENT:-default}} B=${{PRESET:+set}} C=${{ABSENT:+set}} D=\\$PRESET F=${{GIVEN:-no}} G='$PRESET'\n\
         RUN echo \"$A|$B|$C|$D|$E|$F|$G|$GIVEN|${{ABSENT-unset}}\" > /said\n# {BASE}\n"
    ));
    let tree = sandbox.build_tree(&context, ["--build-arg", "GIVEN=yes"]);
    assert_eq!(
        fs::read_to_string(tree.join("said")).unwrap(),
        "default|set||$PRESET|preset|yes|$PRESET|yes|unset\n"
    );
}

#[test]
fn a_build_argument_is_taken_from_the_environment_when_it_has_no_value() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {BASE}\nARG FROM_OUTSIDE=inside\nRUN echo $FROM_OUTSIDE > /said\n"
    ));
    let output = format!("type=local,dest={}", sandbox.arg("out"));
    let arguments = ["build", "--build-arg", "FROM_OUTSIDE", "-o", &output, context.arg()];
    sandbox.slipway(arguments).env("FROM_OUTSIDE", "outside").succeeds();
    assert_eq!(fs::read_to_string(sandbox.path("out/said")).unwrap(), "outside\n");
}

#[test]
fn copy_and_add_place_files_with_owners_and_modes() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context
        .file("one.txt", "one\n")
        .file("two.txt", "two\n")
        .file("tool", "#!/bin/sh\n")
        .mode("tool", 0o755)
        .file("dir/inner/file", "deep\n")
        .symlink("dir/to-inner", "inner")
        .file("other.md", "not text\n")
        .dockerfile(&format!(
            "FROM {BASE} AS first\nRUN mkdir -p /made/sub && echo made > /made/sub/file && chmod 0711 /made/sub\n\
             FROM {BASE}\nWORKDIR /work\n\
             COPY one.txt renamed\nCOPY *.txt texts/\nCOPY dir here/\nCOPY dir/ /absolute/\n\
             COPY --chown=www-data:www-data tool /owned-by-name\nCOPY --chown=1234 --chmod=0600 tool /owned-by-number\n\
             COPY --from=first /made /from-stage\nCOPY --from=0 /made/sub/file /from-number\n\
             COPY --from={BASE} /etc/debian_version /from-image\nADD --chmod=0444 one.txt two.txt /added/\n\
             COPY --chmod=u=rwX,go=r one.txt /symbolic\nCOPY [\"one.txt\", \"/name with spaces/\"]\n"
        ));
    let tree = Tree::read(&sandbox.build_tree(&context, []));
    for path in [
        "work/renamed",
        "work/texts/one.txt",
        "work/texts/two.txt",
        "work/here/inner/file",
        "absolute/inner/file",
        "from-stage/sub/file",
        "from-number",
        "from-image",
        "added/two.txt",
        "name with spaces/one.txt",
    ] {
        assert!(tree.has(path), "{path}");
    }
    assert!(!tree.has("work/texts/other.md") && !tree.has("work/here/dir"));
    assert_eq!(tree.entry("work/here/to-inner").content, "inner");
    assert_eq!(format!("{:o}", tree.entry("owned-by-number").mode), "600");
    assert_eq!(format!("{:o}", tree.entry("owned-by-name").mode), "755");
    assert_eq!(format!("{:o}", tree.entry("symbolic").mode), "644");
    assert_eq!(format!("{:o}", tree.entry("added/one.txt").mode), "444");
    assert_eq!(format!("{:o}", tree.entry("from-stage/sub").mode), "711");

    // Who owns what is seen from inside, since an export of type=local belongs to whoever exports.
    let context = sandbox.context("owners");
    context.file("tool", "").dockerfile(&format!(
        "FROM {BASE}\nCOPY --chown=www-data:www-data tool /by-name\nCOPY --chown=1234 tool /by-number\nCOPY tool /root-owned\n\
         USER 55:66\nWORKDIR /made\nRUN stat -c '%u:%g %n' /by-name /by-number /root-owned /made > /tmp/said; id -u >> /tmp/said\n"
    ));
    let tree = sandbox.build_tree(&context, []);
    let said = fs::read_to_string(tree.join("tmp/said")).unwrap();
    assert_eq!(said, "33:33 /by-name\n1234:1234 /by-number\n0:0 /root-owned\n55:66 /made\n55\n");
}

#[test]
fn add_unpacks_a_local_archive() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    let make = "mkdir b; echo a > a; echo c > b/c; ln a hard; ln -s b soft; chmod 4750 a; chown 12:34 b; touch -d @1000000000 a b/c b";
    tool(Command::new("sh").args(["-ec", make]).current_dir(&source));
    let mut dockerfile = "FROM scratch\n".to_owned();
    for (name, option) in [
        ("plain", "--no-auto-compress"),
        ("gzip", "--gzip"),
        ("bzip2", "--bzip2"),
        ("xz", "--xz"),
        ("zstd", "--zstd"),
    ] {
        // Contents tell what is an archive; a name does not.
        let archive = context.path().join(name);
        let words = ["--numeric-owner", option, "-cf"];
        tool(Command::new("tar").args(words).arg(archive).arg("-C").arg(&source).arg("."));
        dockerfile.push_str(&format!("ADD {name} /{name}/\n"));
    }
    context.file("no.tar.gz", "no archive\n");
    dockerfile.push_str("COPY plain /copied\nADD no.tar.gz /\n");
    context.dockerfile(&dockerfile);

    let output = sandbox.arg("out.tar");
    sandbox.build(&context, ["-o", &format!("type=tar,dest={output}")]);
    let tree = sandbox.path("tree");
    fs::create_dir(&tree).unwrap();
    tool(Command::new("tar").args(["-xpf", &output, "-C"]).arg(&tree));
    let expected = Tree::read(&source);
    for name in ["plain", "gzip", "bzip2", "xz", "zstd"] {
        expected.assert_equals(&Tree::read(&tree.join(name)), name);
    }
    assert_eq!(fs::read_to_string(tree.join("no.tar.gz")).unwrap(), "no archive\n");
    assert_eq!(
        fs::read(tree.join("copied")).unwrap(),
        fs::read(context.path().join("plain")).unwrap(),
        "COPY unpacks nothing"
    );
}

#[test]
fn what_is_not_supported_yet_is_said_and_never_ignored() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    for (dockerfile, line, words, why) in [
        (
            format!("FROM {BASE}\nRUN --device=example.com/gpu,required true\n"),
            2,
            "example.com/gpu",
            "is not registered",
        ),
        (
            format!("# syntax=localhost:1/other:1\nFROM {BASE}\n"),
            1,
            "localhost:1/other:1",
            "cannot find the frontend",
        ),
    ] {
        context.dockerfile(&format!("{dockerfile}RUN touch /never\n"));
        let ran = sandbox.build_fails(&context, ["-t", "x:1"]);
        for part in [words, why] {
            assert!(ran.error().contains(part), "{part:?} should be in {}", ran.error());
        }
        assert!(ran.stderr.contains(&format!("Dockerfile:{line}")), "{}", ran.stderr);
        let text = dockerfile.lines().nth(line - 1).unwrap();
        assert!(ran.stderr.contains(&format!(">>> {text}")), "{}", ran.stderr);
    }
}

#[test]
fn linked_copies_and_copies_with_parents_have_the_same_files() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.file("deep/er/file", "text");
    context.dockerfile(&format!(
        "FROM {BASE} AS made\nRUN echo linked >/result\n\
         FROM {BASE}\nCOPY --link --from=made /result /link/\nCOPY --parents deep/er/file /parents/\n\
         RUN cat /link/result /parents/deep/er/file >/both\n"
    ));
    let output = format!("type=local,dest={}", sandbox.arg("out"));
    sandbox.build(&context, ["-o", &output]);
    let both = std::fs::read_to_string(sandbox.path("out/both")).unwrap();
    assert_eq!(both, "linked\ntext");
}

#[test]
fn a_stage_inherits_the_configuration_of_its_base_and_may_reset_it() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {BASE} AS first\nENV A=1\nLABEL l=1\nUSER 7\nWORKDIR /w\nEXPOSE 1\nVOLUME /v\nCMD [\"first\"]\n\
         ENTRYPOINT [\"entry\"]\nCMD [\"second\"]\nHEALTHCHECK CMD true || false\nSTOPSIGNAL 9\n\
         FROM first\nENV B=2\nLABEL l=2 m=3\nEXPOSE 2/udp\nENTRYPOINT [\"other\"]\nHEALTHCHECK NONE\n"
    ));
    sandbox.build(&context, ["-t", "first:1", "--target", "first"]);
    let first = sandbox.inspect("first:1", None)["Config"].clone();
    assert_eq!((&first["Entrypoint"], &first["Cmd"]), (&json!(["entry"]), &json!(["second"])));
    assert_eq!(first["Healthcheck"]["Test"], json!(["CMD-SHELL", "true || false"]));
    assert_eq!(first["StopSignal"], "9");

    sandbox.build(&context, ["-t", "second:1"]);
    let second = sandbox.inspect("second:1", None)["Config"].clone();
    for field in ["User", "WorkingDir", "Volumes", "StopSignal"] {
        assert_eq!(second[field], first[field], "{field}");
    }
    let environment = second["Env"].as_array().unwrap();
    assert!(environment.contains(&json!("A=1")) && environment.contains(&json!("B=2")), "{second}");
    assert_eq!(second["Labels"], json!({ "l": "2", "m": "3" }));
    assert_eq!(second["ExposedPorts"], json!({ "1/tcp": {}, "2/udp": {} }));
    assert_eq!(second["Entrypoint"], json!(["other"]));
    assert_eq!(second.get("Cmd").filter(|cmd| !cmd.is_null()), None, "a new ENTRYPOINT resets CMD");
    assert_eq!(second["Healthcheck"]["Test"], json!(["NONE"]));
}

#[test]
fn copy_replaces_files_and_merges_directories() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context
        .file("tree/kept-name", "new\n")
        .file("tree/sub/added", "added\n")
        .symlink("tree/now-a-link", "kept-name")
        .file("a file with spaces", "")
        .file("-dash", "")
        .file("weird[1].txt", "")
        .dockerfile(&format!(
            "FROM {BASE} AS old\nRUN mkdir -p /d/sub /real && echo old > /d/kept-name && echo old > /d/sub/stays && echo old > /d/now-a-link \\\n\
             && chmod 0700 /d/sub && ln -s /real /absolute && ln -s d /relative\n\
             COPY tree/ /d/\nCOPY tree/kept-name /absolute/\nCOPY tree/kept-name /relative/through\n\
             COPY [\"a file with spaces\", \"-dash\", \"weird[[]1].txt\", \"/odd/\"]\n"
        ));
    let tree = sandbox.build_tree(&context, []);
    let read = |name: &str| fs::read_to_string(tree.join(name)).unwrap();
    assert_eq!((read("d/kept-name"), read("d/sub/stays")), ("new\n".into(), "old\n".into()));
    assert_eq!(read("d/sub/added"), "added\n");
    assert_eq!((read("real/kept-name"), read("d/through")), ("new\n".into(), "new\n".into()));
    let tree = Tree::read(&tree);
    assert_eq!(tree.entry("d/now-a-link").content, "kept-name");
    assert_eq!((tree.entry("absolute").kind, tree.entry("relative").kind), ("link", "link"));
    for name in ["odd/a file with spaces", "odd/-dash", "odd/weird[1].txt"] {
        assert!(tree.has(name), "{name}");
    }
}

#[test]
fn dockerignore_hides_files_and_exceptions_bring_them_back() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context
        .dockerfile("FROM scratch\nCOPY . /\n")
        .file(
            ".dockerignore",
            "# comment\n*.log\n**/cache\nsecret\n!keep.log\ndocs/*\n!docs/index.md\n",
        )
        .file("a.log", "")
        .file("keep.log", "")
        .file("sub/b.log", "")
        .file("sub/cache/x", "")
        .file("secret/key", "")
        .file("docs/index.md", "")
        .file("docs/other.md", "");
    let tree = Tree::read(&sandbox.build_tree(&context, []))
        .without("Dockerfile")
        .without(".dockerignore");
    assert_eq!(tree.paths(), ["docs", "docs/index.md", "keep.log", "sub", "sub/b.log"]);
}

#[test]
fn shell_and_exec_forms_run_as_written() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {BASE}\nENV WORD=expanded\nRUN echo $WORD > /shell\nRUN [\"/bin/sh\", \"-c\", \"echo $WORD > /exec\"]\n\
         RUN [\"touch\", \"/$WORD\"]\nSHELL [\"/bin/busybox\", \"sh\", \"-c\"]\nRUN echo $0 > /other-shell\n\
         RUN echo one && \\\n    # a comment in between\n    echo two > /continued\n\
         WORKDIR /in/here\nRUN pwd > where\nUSER nobody\nRUN id -un > /tmp/who; echo $HOME >> /tmp/who\n"
    ));
    let tree = sandbox.build_tree(&context, []);
    let read = |name: &str| fs::read_to_string(tree.join(name)).unwrap();
    assert_eq!(read("shell"), "expanded\n");
    assert_eq!(read("exec"), "expanded\n", "the shell that the exec form names does expand");
    assert!(tree.join("$WORD").exists(), "the exec form itself expands nothing");
    assert_eq!(read("continued"), "two\n");
    assert_eq!(read("in/here/where"), "/in/here\n");
    assert_eq!(read("tmp/who").lines().next(), Some("nobody"));
}

#[test]
fn a_step_sees_a_proper_system_and_not_the_machine() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN {{ ps | wc -l; echo $$; ls /dev/null /dev/zero /dev/urandom /dev/fd /dev/pts /dev/shm; \
         (cat /proc/sys/vm/swappiness > /proc/sys/vm/swappiness) && echo writable; grep Seccomp: /proc/self/status; \
         mount -t tmpfs none /mnt 2>/dev/null && echo mounted; mknod /dev/sda b 8 0 && head -c 1 /dev/sda; \
         cat /proc/kcore 2>/dev/null | head -c 1 | wc -c; true; }} > /said 2>&1; dd if=/dev/zero of=/dev/null count=1\n"
    ));
    let tree = sandbox.build_tree(&context, []);
    let said = fs::read_to_string(tree.join("said")).unwrap();
    assert!(!said.contains("mounted") && !said.contains("writable"), "{said}");
    for device in ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/pts", "/dev/shm"] {
        assert!(said.lines().any(|line| line.starts_with(device)), "{device}: {said}");
    }
    let processes: usize = said.lines().next().unwrap().trim().parse().unwrap();
    assert!(processes < 10, "a step sees its own processes only: {said}");
    let seccomp = said.lines().find_map(|line| line.strip_prefix("Seccomp:"));
    assert_eq!(seccomp.map(str::trim), Some("2"), "a system call filter is in force: {said}");
    assert!(said.contains("/dev/sda: "), "devices of the machine cannot be opened: {said}");
    // What the sandbox mounts must not stay in the image.
    let image = Tree::read(&tree);
    let left: Vec<_> = image
        .paths()
        .into_iter()
        .filter(|path| {
            path.starts_with("dev/") || path.starts_with("proc/") || path.starts_with("sys/")
        })
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(
        !image.has("etc/resolv.conf") || image.entry("etc/resolv.conf").content.is_empty(),
        "files of the machine stay out"
    );
}

#[test]
fn copy_takes_a_context_as_it_is() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    let inside = context.path().join("all");
    fs::create_dir(&inside).unwrap();
    let make = "printf x > \"$(printf 'not-utf8-\\377')\"; touch \"$(printf 'new\\nline')\" ümläut; mkdir -p deep/$(seq -s/ 1 60); \
                echo one > one; ln one two; ln -s one soft; ln -s /nowhere dangling; mkfifo fifo; truncate -s 5M sparse; \
                chmod 4711 one; mkdir -m 1777 open; touch -d @1 one sparse; chmod 000 ümläut; setcap cap_net_raw+ep one; \
                for i in $(seq 1 2000); do echo $i > deep/f$i; done";
    tool(Command::new("sh").args(["-ec", make]).current_dir(&inside));
    context.dockerfile("FROM scratch\nCOPY all /all/\n");
    let tree = sandbox.build_tree(&context, []);
    Tree::read(&inside).assert_equals(&Tree::read(&tree.join("all")), "the context and its copy");
}
