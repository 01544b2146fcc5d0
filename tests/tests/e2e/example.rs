//! `examples/hello`, as `make demo` builds it.

use slipway_tests::{Context, Sandbox, foreign_platform, host_platform, tool};

#[test]
fn the_example_is_built_for_two_platforms_and_answers_on_both() {
    let sandbox = Sandbox::with_base();
    let source = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/hello");
    let context: Context = sandbox.context("hello");
    tool(std::process::Command::new("cp").arg("-r").arg(source.join(".")).arg(context.path()));
    let build = || {
        sandbox.build(&context, ["--platform=linux/amd64,linux/arm64", "-t", "slipway.local/hello"])
    };

    let first = build();
    assert!(
        first.stderr.contains("self-test on x86_64")
            && first.stderr.contains("self-test on aarch64"),
        "{}",
        first.stderr
    );
    for (platform, machine) in [("linux/amd64", "x86_64"), ("linux/arm64", "aarch64")] {
        let ran = sandbox.run([
            "run",
            "--rm",
            "--platform",
            platform,
            "slipway.local/hello",
            "--self-test",
        ]);
        assert_eq!(
            ran.stdout,
            format!("hello: self-test on {machine}: / 200, missing page 404, outside 403\n")
        );
        let built =
            sandbox.build_tree(&context, ["--platform", platform]).join("srv/site/build.txt");
        let said = std::fs::read_to_string(built).unwrap();
        assert_eq!(said.trim(), format!("built on {} for {platform} ({machine})", host_platform()));
        let image = sandbox.inspect("slipway.local/hello", Some(platform));
        assert_eq!(image["Config"]["User"], "www-data");
        assert_eq!(
            image["Config"]["Labels"]["slipway.example.architecture"],
            platform.trim_start_matches("linux/")
        );
    }
    assert_ne!(host_platform(), foreign_platform());

    let again = build();
    for step in ["RUN sh generate.sh", "RUN mkdir /out", "RUN [\"hello\""] {
        assert!(again.is_cached(step), "{step}: {}", again.stderr);
    }
}
