//! Dockerfiles that are read by a frontend that is an image: our own, packed by the test.

use std::fs;
use std::path::Path;
use std::process::Command;

use slipway_tests::{BASE, Registry, Sandbox, frontend_binary, tool};

/// Packs the stand-alone frontend, with the libraries that it was linked with, and pushes it.
pub(crate) fn pack(sandbox: &Sandbox, image: &str) {
    let context = sandbox.context("frontend");
    let binary = frontend_binary();
    // What is linked statically has nothing to list.
    let listed = Command::new("ldd").arg(&binary).output().expect("run ldd");
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let libraries: Vec<&str> = listed.split_whitespace().filter(|at| at.starts_with('/')).collect();
    let mut text = String::from("FROM scratch\n");
    let mut add = |from: &Path, to: &str| {
        let name = to.trim_start_matches('/').replace('/', "-");
        fs::copy(from, context.path().join(&name)).expect("copy into the context");
        text.push_str(&format!("COPY {name} {to}\n"));
    };
    add(&binary, "/frontend");
    for library in libraries {
        add(Path::new(library), library);
    }
    text.push_str(
        "LABEL moby.buildkit.frontend.network.none=true\n\
         LABEL moby.buildkit.frontend.caps=moby.buildkit.frontend.inputs,moby.buildkit.frontend.subrequests,moby.buildkit.frontend.contexts\n\
         ENTRYPOINT [\"/frontend\"]\n",
    );
    context.dockerfile(&text);
    tool(Command::new("chmod").arg("0755").arg(context.path().join("frontend")));
    sandbox.build(&context, ["--push", "-t", image]);
}

#[test]
fn a_syntax_line_has_its_image_read_the_dockerfile() {
    let sandbox = Sandbox::with_base();
    let registry = Registry::start();
    let image = registry.image("team/frontend:1");
    pack(&sandbox, &image);

    let context = sandbox.context("context");
    context.file("f", "content\n").dockerfile(&format!(
        "# syntax={image} and more\nFROM {BASE} AS first\nARG WORD=none\nCOPY f /f\nRUN cat /f > /g && echo $WORD >> /g\n"
    ));
    let tree = sandbox.build_tree(&context, ["--build-arg=WORD=given"]);
    assert_eq!(fs::read_to_string(tree.join("g")).unwrap(), "content\ngiven\n");

    // What it makes is what the frontend that is built in makes.
    sandbox.build(&context, ["-t", "one:1", "--platform=linux/amd64,linux/arm64"]);
    let line = "build-arg:BUILDKIT_SYNTAX";
    let builtin = ["-t", "two:1", "--platform=linux/amd64,linux/arm64", "--build-arg"];
    sandbox.build(&context, builtin.into_iter().chain(["BUILDKIT_SYNTAX=dockerfile.v0"]));
    for platform in ["linux/amd64", "linux/arm64"] {
        let layers = |image: &str| sandbox.inspect(image, Some(platform))["RootFS"].clone();
        assert_eq!(layers("one:1"), layers("two:1"), "{platform} {line}");
        let config = |image: &str| sandbox.inspect(image, Some(platform))["Config"].clone();
        assert_eq!(config("one:1"), config("two:1"), "{platform}");
    }

    // Its errors have their place.
    context.dockerfile(&format!("# syntax={image}\nFROM {BASE}\nRUNN x\n"));
    let failed = sandbox.fail(["build", context.arg()]);
    assert!(failed.stderr.contains("unknown instruction: RUNN"), "{}", failed.stderr);
    context.dockerfile(&format!("# syntax={image}\nFROM {BASE}\nRUN exit 7\n"));
    let failed = sandbox.fail(["build", context.arg()]);
    assert!(failed.stderr.contains("exit code: 7"), "{}", failed.stderr);
}

#[test]
fn a_frontend_that_is_none_fails_at_the_syntax_line() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("none");
    context.dockerfile(&format!(
        "FROM {BASE}\nENTRYPOINT [\"/bin/sh\", \"-c\", \"echo why >&2; exit 3\"]\n"
    ));
    sandbox.build(&context, ["-t", "none.test/frontend:1"]);
    let context = sandbox.context("context");
    context.dockerfile("# syntax=none.test/frontend:1\nFROM scratch\nCOPY Dockerfile /\n");
    let failed = sandbox.fail(["build", context.arg()]);
    for part in ["none.test/frontend:1 failed: exit code: 3: why", ">>> # syntax="] {
        assert!(failed.stderr.contains(part), "{part}: {}", failed.stderr);
    }
}
