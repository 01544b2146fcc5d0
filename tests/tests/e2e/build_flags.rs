//! The flags of `slipway build`.

use std::fs;

use serde_json::Value;
use slipway_tests::{BASE, Sandbox, Server, Tree};

#[test]
fn the_last_stage_is_the_result_and_target_names_another() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.file("f", "").dockerfile("FROM scratch AS one\nCOPY f /one\nFROM one AS two\nCOPY f /two\nFROM scratch AS three\nCOPY f /three\n");
    let paths = |options: &[&str]| {
        let tree = Tree::read(&sandbox.build_tree(&context, options.iter().copied()));
        tree.paths().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(paths(&[]), ["three"]);
    assert_eq!(paths(&["--target=two"]), ["one", "two"]);
    // Stages are asked for by name; a number is a name that no stage has.
    for target in ["0", "four"] {
        let ran = sandbox.build_fails(&context, ["--target", target]);
        assert!(
            ran.error().contains(target) && ran.error().contains("could not be found"),
            "{}",
            ran.error()
        );
    }
}

#[test]
fn unused_stages_do_not_run() {
    let sandbox = Sandbox::with_base();
    let counter = Server::counter();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {BASE} AS used\nRUN wget -q -O /x http://{0}/used\nFROM {BASE} AS unused\nRUN wget -q -O /x http://{0}/unused && false\n\
         FROM no.such.registry.invalid/nothing AS absent\nRUN false\nFROM used\nRUN wget -q -O /x http://{0}/last\n",
        counter.host()
    ));
    sandbox.build_tree(&context, []);
    assert_eq!(
        (counter.count("/used"), counter.count("/last"), counter.count("/unused")),
        (1, 1, 0)
    );
}

#[test]
fn the_dockerfile_may_lie_elsewhere_or_come_by_standard_input() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.file("f", "").file("other/My.Dockerfile", "FROM scratch\nCOPY f /elsewhere\n");
    let file = format!("{}/other/My.Dockerfile", context.arg());
    assert_eq!(Tree::read(&sandbox.build_tree(&context, ["-f", &file])).paths(), ["elsewhere"]);

    let output = format!("type=local,dest={}", sandbox.arg("out"));
    sandbox
        .slipway(["build", "-f", "-", "-o", &output, context.arg()])
        .stdin("FROM scratch\nCOPY f /by-stdin\n")
        .succeeds();
    assert_eq!(Tree::read(&sandbox.path("out")).paths(), ["by-stdin"]);
}

#[test]
fn several_tags_name_the_same_image() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.file("f", "").dockerfile("FROM scratch\nCOPY f /\n");
    sandbox.build(&context, ["-t", "first:1", "-t", "second:2", "-t", "example.com/third"]);
    let id = |image: &str| sandbox.inspect(image, None)["Id"].as_str().unwrap().to_owned();
    assert_eq!(id("first:1"), id("second:2"));
    assert_eq!(id("first:1"), id("example.com/third:latest"));
}

#[test]
fn the_image_id_and_the_metadata_are_written_where_asked() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.file("f", "").dockerfile("FROM scratch\nCOPY f /\n");
    let (id_file, metadata_file) = (sandbox.arg("id"), sandbox.arg("metadata.json"));
    sandbox.build(
        &context,
        ["-t", "meta:1", "--iidfile", &id_file, "--metadata-file", &metadata_file],
    );

    let id = fs::read_to_string(&id_file).unwrap();
    assert!(id.starts_with("sha256:") && id.len() == 71, "{id:?}");
    let metadata: Value =
        serde_json::from_str(&fs::read_to_string(&metadata_file).unwrap()).unwrap();
    assert_eq!(metadata["containerimage.digest"], id.as_str());
    assert_eq!(metadata["containerimage.descriptor"]["digest"], id.as_str());
    assert!(metadata["containerimage.config.digest"].as_str().unwrap().starts_with("sha256:"));
    assert_eq!(metadata["image.name"], "docker.io/library/meta:1");
    assert_eq!(sandbox.inspect("meta:1", None)["Id"], id.as_str());
}

#[test]
fn quiet_prints_the_image_id_and_nothing_else() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.file("f", "").dockerfile("FROM scratch\nCOPY f /\n");
    let id_file = sandbox.arg("id");
    let ran = sandbox.run(["build", "-q", "-t", "quiet:1", "--iidfile", &id_file, context.arg()]);
    assert_eq!(ran.stdout.trim_end(), fs::read_to_string(&id_file).unwrap());
    assert_eq!(ran.stderr, "");
}

#[test]
fn plain_progress_shows_steps_and_their_output() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context
        .dockerfile(&format!("FROM {BASE}\nRUN echo a line of output; echo an error line >&2\n"));
    let ran = sandbox.build(&context, ["-t", "plain:1"]);
    assert_eq!(ran.stdout, "");
    let lines: Vec<_> = ran.stderr.lines().collect();
    let step =
        lines.iter().find(|line| line.contains("RUN echo a line")).expect("the step is announced");
    assert!(step.starts_with('#') && step.contains("[2/2]"), "{step}");
    assert!(lines.iter().any(|line| line.ends_with(" a line of output")), "{}", ran.stderr);
    assert!(lines.iter().any(|line| line.ends_with(" an error line")), "{}", ran.stderr);
    let number = step.split(' ').next().unwrap();
    assert!(
        lines.iter().any(|line| line.starts_with(&format!("{number} DONE "))),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_flag_that_does_not_exist_is_an_error() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.dockerfile("FROM scratch\n");
    let ran = sandbox.slipway(["build", "--no-such-flag", context.arg()]).fails(1);
    assert!(ran.stderr.contains("--no-such-flag"), "{}", ran.stderr);
    let ran = sandbox.slipway(["frobnicate"]).fails(1);
    assert!(ran.stderr.contains("frobnicate"), "{}", ran.stderr);
}
