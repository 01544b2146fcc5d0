//! `--check`, `--call`, and what a build says of what could be better.

use std::fs;

use serde_json::Value;
use slipway_tests::Sandbox;

const WITH_FINDINGS: &str = "# name of the file\nARG NAME=f\nFROM scratch AS Build\nARG NAME\nENV A b\nCOPY $NAME $NAMES /x/\n\
     FROM scratch\nCOPY f /\n";

#[test]
fn check_shows_findings_and_fails() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.file("f", "").dockerfile(WITH_FINDINGS);
    let ran = sandbox.slipway(["build", "--check", context.arg()]).fails(1);
    let text = ran.stdout;
    assert!(text.starts_with("Check complete, 3 warnings have been found!\n\nWARNING: "), "{text}");
    let place = format!("{}/Dockerfile:5\n--------------------\n", context.arg());
    let excerpt = format!(
        "WARNING: LegacyKeyValueFormat - https://docs.docker.com/go/dockerfile/rule/legacy-key-value-format/\n\
         \"ENV key=value\" should be used instead of legacy \"ENV key value\" format\n{place}   3 |     FROM scratch AS \
         Build\n   4 |     ARG NAME\n   5 | >>> ENV A b\n   6 |     COPY $NAME $NAMES /x/\n   7 |     FROM scratch\n\
         --------------------\n"
    );
    assert!(text.contains(&excerpt), "{text}");
    assert!(text.contains("Usage of undefined variable '$NAMES' (did you mean $NAME?)"), "{text}");
    assert!(!ran.stderr.contains("ERROR"), "{}", ran.stderr);

    // Nothing was built, and stages that the target does not need are not looked at.
    assert_eq!(sandbox.run(["images", "-q"]).stdout, "");
    context.dockerfile("FROM scratch AS a\nMAINTAINER me\nFROM scratch AS b\nENV C d\n");
    let ran = sandbox.slipway(["build", "--call=check", "--target=b", context.arg()]).fails(1);
    assert!(ran.stdout.contains("MaintainerDeprecated"), "{}", ran.stdout);
    context.dockerfile("FROM scratch AS a\nENV A b\nFROM scratch AS b\nENV C d\n");
    let ran = sandbox.slipway(["build", "--call=check", "--target=b", context.arg()]).fails(1);
    assert!(ran.stdout.starts_with("Check complete, 1 warning has been found!"), "{}", ran.stdout);
}

#[test]
fn check_of_a_good_file_succeeds_and_of_a_wrong_one_tells_why() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.file("f", "").dockerfile("FROM scratch\nCOPY f /\n");
    let ran = sandbox.run(["build", "--check", context.arg()]);
    assert_eq!(ran.stdout, "Check complete, no warnings found.\n");

    context.dockerfile("FROM scratch AS A\nRUNN x\n");
    let ran = sandbox.slipway(["build", "--check", context.arg()]).fails(1);
    assert!(
        ran.error().contains("unknown instruction: RUNN (did you mean RUN?)"),
        "{}",
        ran.stderr
    );
    assert!(ran.stderr.contains("   2 | >>> RUNN x\n"), "{}", ran.stderr);
    assert!(ran.stdout.starts_with("Check complete, 1 warning has been found!"), "{}", ran.stdout);
}

#[test]
fn answers_are_json_where_asked() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.file("f", "").dockerfile(WITH_FINDINGS);
    let metadata = sandbox.arg("metadata.json");
    let call = "--call=check,format=json,ignorestatus=true";
    let ran = sandbox.run(["build", call, "--metadata-file", &metadata, context.arg()]);
    let answer: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(answer["warnings"].as_array().unwrap().len(), 3);
    assert_eq!(answer["warnings"][0]["ruleName"], "StageNameCasing");
    assert_eq!(answer["warnings"][0]["location"]["ranges"][0]["start"]["line"], 3);
    assert_eq!(answer["sources"][0]["filename"], "Dockerfile");
    let written: Value = serde_json::from_str(&fs::read_to_string(&metadata).unwrap()).unwrap();
    assert_eq!(written["result.json"], answer);
    assert_eq!(
        (written["result.statuscode"].as_str(), written["version"].as_str()),
        (Some("1"), Some("1.0.0"))
    );
}

#[test]
fn outline_and_targets_tell_what_a_file_offers() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.file("f", "").dockerfile(
        "# NAME what to copy\nARG NAME=f\n# base has the files\nFROM scratch AS base\nARG NAME\nCOPY $NAME /\n\
         # final is all\nFROM base AS final\nARG UNSET\n",
    );
    let ran = sandbox.run(["build", "--call=outline", "--build-arg", "UNSET=given", context.arg()]);
    assert_eq!(
        ran.stdout,
        "TARGET:      final\nDESCRIPTION: is all\n\nBUILD ARG   VALUE   DESCRIPTION\nNAME        f       what to copy\n\
         UNSET       given   \n\n"
    );
    let ran = sandbox.run(["build", "--call", "targets", context.arg()]);
    assert_eq!(
        ran.stdout,
        "TARGET          DESCRIPTION\nbase            has the files\nfinal (default) is all\n"
    );
    let ran = sandbox.run(["build", "--call=targets,format=json", context.arg()]);
    let answer: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        (answer["targets"][1]["base"].as_str(), answer["targets"][1]["default"].as_bool()),
        (Some("base"), Some(true))
    );
    let ran = sandbox.run(["build", "--call=convertllb", context.arg()]);
    let answer: Value = serde_json::from_str(&ran.stdout).unwrap();
    let copies = answer["def"]
        .as_object()
        .unwrap()
        .values()
        .filter_map(|op| op["file"]["actions"][0]["copy"]["src"].as_str());
    assert_eq!(copies.collect::<Vec<_>>(), ["/f"]);
    assert_eq!(answer["source"]["infos"][0]["filename"], "Dockerfile");
    let ran = sandbox.run(["build", "--call=subrequests.describe", context.arg()]);
    assert!(ran.stdout.contains("outline              1.0.0"), "{}", ran.stdout);
    let ran = sandbox.slipway(["build", "--call=nope", context.arg()]).fails(1);
    assert!(ran.error().contains("unsupported request frontend.nope"), "{}", ran.error());
    let ran = sandbox.slipway(["build", "--call=targets,format=xml", context.arg()]).fails(1);
    assert!(ran.stderr.contains("xml"), "{}", ran.stderr);
}

#[test]
fn a_build_lists_what_could_be_better_at_its_end() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.file("f", "").dockerfile("FROM scratch AS Build\nCOPY f /\n");
    let finding = "StageNameCasing: Stage name 'Build' should be lowercase (line 1)";
    let ran = sandbox.build(&context, ["-t", "warned:1"]);
    let end = format!("\n 1 warning found (use slipway --debug to expand):\n - {finding}\n");
    assert!(ran.stderr.ends_with(&end), "{}", ran.stderr);
    let ran = sandbox.run(["--debug", "build", "-t", "warned:2", context.arg()]);
    let end = format!(
        "\n 1 warning found:\n - {finding}\nStage names should be lowercase\nMore info: \
         https://docs.docker.com/go/dockerfile/rule/stage-name-casing/\nDockerfile:1\n"
    );
    assert!(ran.stderr.contains(&end), "{}", ran.stderr);
    assert!(ran.stderr.contains("   1 | >>> FROM scratch AS Build\n"), "{}", ran.stderr);

    let ran = sandbox.run(["build", "--progress=rawjson", "-t", "warned:3", context.arg()]);
    let updates = ran.stderr.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let warnings: Vec<Value> =
        updates.filter_map(|update| update.get("warnings").cloned()).collect();
    assert_eq!(warnings.len(), 1, "{}", ran.stderr);
    let warning = &warnings[0][0];
    assert!(warning["vertex"].as_str().unwrap().starts_with("sha256:"), "{warning}");
    assert_eq!((&warning["range"][0]["start"]["line"], &warning["level"]), (&1.into(), &1.into()));
    assert_eq!(warning["sourceInfo"]["filename"], "Dockerfile");
}

#[test]
fn findings_may_fail_a_build() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.file("f", "").dockerfile("# check=error=true\nFROM scratch AS Build\nCOPY f /\n");
    let ran = sandbox.build_fails(&context, ["-t", "a:1"]);
    assert!(
        ran.error().contains("lint violation found for rules: StageNameCasing"),
        "{}",
        ran.error()
    );
    sandbox.build(
        &context,
        ["-t", "a:1", "--build-arg", "BUILDKIT_DOCKERFILE_CHECK=skip=StageNameCasing"],
    );
    // A file that only warns can be made to fail by the caller.
    context.dockerfile("FROM scratch AS Build\nCOPY f /\n");
    sandbox.build_fails(&context, ["--build-arg=BUILDKIT_DOCKERFILE_CHECK=error=true"]);
}
