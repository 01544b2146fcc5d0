//! What is wrong is said, where it is wrong, and nothing is left behind.

use slipway_tests::{BASE, Sandbox, noise};

#[test]
fn mistakes_in_a_dockerfile_are_shown_with_their_line() {
    let sandbox = Sandbox::with_base();
    for (dockerfile, line, words) in [
        ("FROM scratch\nCOPPY a b\n", 2, &["COPPY"][..]),
        ("FROM scratch\nCOPY missing.txt /\n", 2, &["missing.txt"]),
        ("FROM scratch\nCOPY missing*.txt other/ /\n", 2, &["other"]),
        (
            "FROM scratch AS a\nFROM scratch\nCOPY --from=nothing.invalid/x /f /\n",
            3,
            &["nothing.invalid/x"],
        ),
        ("FROM scratch\nCOPY --chowm=1 Dockerfile /\n", 2, &["chowm"]),
        ("FROM scratch\nCOPY Dockerfile\n", 2, &["COPY"]),
        ("FROM\n", 1, &["FROM"]),
        ("RUN true\n", 1, &["no build stage"]),
        ("FROM scratch\nENV novalue\n", 2, &["ENV"]),
        ("FROM scratch\nEXPOSE notaport\n", 2, &["notaport"]),
        ("FROM scratch\n\n\nSTOPSIGNAL SIGNONSENSE\n", 4, &["SIGNONSENSE"]),
        ("FROM --platform=linux/nonsense/a/b scratch\n", 1, &["nonsense"]),
        ("FROM scratch AS not/a/name\n", 1, &["not/a/name"]),
        ("FROM ${EMPTY}\n", 1, &["${EMPTY}", "blank"]),
    ] {
        let context = sandbox.context("context");
        context.dockerfile(dockerfile);
        let ran = sandbox.build_fails(&context, ["-t", "x:1"]);
        for word in words {
            assert!(
                ran.error().contains(word),
                "{dockerfile:?}: {word:?} should be in {}",
                ran.error()
            );
        }
        assert!(
            ran.stderr.contains(&format!("Dockerfile:{line}")),
            "{dockerfile:?}: line {line}:\n{}",
            ran.stderr
        );
    }
}

#[test]
fn stages_that_need_each_other_are_named() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.dockerfile(
        "FROM scratch AS one\nCOPY --from=two /f /\nFROM scratch AS two\nCOPY --from=one /f /\n",
    );
    let ran = sandbox.build_fails(&context, ["-t", "x:1"]);
    assert!(ran.error().contains("circular dependency"), "{}", ran.error());
    // Either of the two is to blame, and its line is shown.
    let (stage, line) = if ran.error().ends_with("stage: one") { ("one", 4) } else { ("two", 2) };
    assert!(ran.error().ends_with(&format!("stage: {stage}")), "{}", ran.error());
    assert!(ran.stderr.contains(&format!("Dockerfile:{line}")), "{}", ran.stderr);
}

#[test]
fn a_stage_or_a_dockerfile_or_a_context_that_is_not_there_is_named() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    let ran = sandbox.build_fails(&context, ["-t", "x:1"]);
    assert!(ran.error().contains("Dockerfile"), "{}", ran.error());

    context.dockerfile("FROM scratch AS only\nCOPY Dockerfile /\n");
    let ran = sandbox.build_fails(&context, ["-t", "x:1", "--target=other"]);
    assert!(ran.error().contains("other"), "{}", ran.error());

    let ran = sandbox.fail(["build", &sandbox.arg("no-such-context")]);
    assert!(ran.error().contains("no-such-context"), "{}", ran.error());

    context.dockerfile("# nothing but a comment\n");
    sandbox.build_fails(&context, ["-t", "x:1"]);

    let ran = sandbox.build_fails(&context, ["--platform=no/such/plat/form"]);
    assert!(ran.error().contains("no/such/plat/form"), "{}", ran.error());
}

#[test]
fn a_failing_step_stops_the_build_and_shows_its_output_and_its_place() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN true\nRUN for i in $(seq 1 50); do echo line $i; done; \\\n    echo last words >&2; exit 42\nRUN touch /never\n"
    ));
    let ran = sandbox.build_fails(&context, ["-t", "x:1"]);
    assert!(ran.error().contains("exit code: 42"), "{}", ran.error());
    assert!(ran.stderr.contains("Dockerfile:3"), "{}", ran.stderr);
    let excerpt = ran.stderr.rsplit_once("Dockerfile:3").unwrap().1;
    assert!(
        excerpt.contains(">>>") && excerpt.contains("exit 42"),
        "the lines are marked: {excerpt}"
    );
    let before_error = ran.stderr.rsplit_once("Dockerfile:3").unwrap().0;
    let repeated = before_error.matches("last words").count();
    assert!(repeated >= 2, "the last lines are shown again with the error: {}", ran.stderr);
    assert!(!ran.stderr.contains("never") || !ran.stderr.contains("DONE touch"), "{}", ran.stderr);

    for (step, words) in [
        ("RUN no-such-command", "127"),
        ("RUN [\"/no/such/program\"]", "/no/such/program"),
        // Nothing in a process namespace can kill its first process, so a child dies.
        ("RUN sh -c 'kill -9 $$'; exit $?", "137"),
        ("USER nosuchuser\nRUN true", "nosuchuser"),
    ] {
        context.dockerfile(&format!("FROM {BASE}\n{step}\n"));
        let ran = sandbox.build_fails(&context, ["-t", "x:1"]);
        assert!(ran.stderr.contains(words), "{step}: {words} should be in {}", ran.stderr);
    }
    context.dockerfile(&format!("FROM {BASE}\nRUN true\n"));
    sandbox.build(&context, ["-t", "x:1"]);
}

#[test]
fn the_other_branch_of_a_failing_build_is_stopped_too() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {BASE} AS slow\nRUN sleep 3000\nFROM {BASE} AS broken\nRUN sleep 0.2; exit 9\n\
         FROM scratch\nCOPY --from=slow /etc /slow\nCOPY --from=broken /etc /broken\n"
    ));
    let ran = sandbox.build_fails(&context, ["-t", "x:1"]);
    assert!(ran.error().contains("exit code: 9"), "{}", ran.error());
    assert!(ran.took.as_secs() < 30, "it took {:?}", ran.took);
}

#[test]
fn a_file_of_the_context_that_cannot_be_read_is_named() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.file("sealed", "x").mode("sealed", 0).dockerfile("FROM scratch\nCOPY sealed /\n");
    std::os::unix::fs::chown(context.path().join("sealed"), Some(12345), Some(12345))
        .expect("the tests run as root");
    // Root reads everything, until it is without the two capabilities that let it.
    let powerless = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"];
    let build = ["build", "--progress=plain", "-t", "x:1", context.arg()];
    let ran = sandbox.slipway(build).under(powerless).fails(1);
    assert!(ran.error().contains("sealed") && ran.error().contains("denied"), "{}", ran.error());
    sandbox.assert_nothing_left();

    context.dockerfile("FROM scratch\nCOPY Dockerfile /\n");
    sandbox.slipway(build).under(powerless).succeeds();
}

#[test]
fn a_platform_that_nothing_emulates_is_named() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    std::fs::copy("/bin/busybox", context.path().join("busybox")).expect("busybox is installed");
    context.dockerfile("FROM scratch\nCOPY busybox /bin/sh\nRUN true\n");
    let ran = sandbox.build_fails(&context, ["--platform=linux/mips64p32", "-t", "x:1"]);
    assert!(ran.error().contains("linux/mips64p32"), "{}", ran.error());
    assert!(ran.stderr.contains("emulat"), "{}", ran.stderr);

    // Without RUN nothing has to be emulated.
    context.dockerfile("FROM scratch\nCOPY busybox /bin/sh\n");
    sandbox.build(&context, ["--platform=linux/mips64p32", "-t", "x:1"]);
}

#[test]
fn a_full_disk_is_an_error_and_the_store_survives_it() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.file("big", noise(30_000_000)).dockerfile("FROM scratch\nCOPY big /\n");
    let small = sandbox.context("small");
    small.file("f", "f").dockerfile("FROM scratch\nCOPY f /\n");
    let disk = sandbox.arg("disk");
    std::fs::create_dir(&disk).unwrap();
    // The disk lives in a mount namespace of its own; one shell does all three builds in it.
    let script = format!(
        "mount -t tmpfs -o size=16m none {disk} || exit 99\n\
         \"$@\" --root {disk}/root build --progress=plain -t small:1 {small} || exit 98\n\
         if \"$@\" --root {disk}/root build --progress=plain -t big:1 {big}; then exit 97; fi\n\
         \"$@\" --root {disk}/root prune --force || exit 96\n\
         echo again > {small}/f\n\
         \"$@\" --root {disk}/root build --progress=plain -t small:2 {small} || exit 95\n\
         find {disk}/root/ingest {disk}/root/tmp -type f 2>/dev/null | grep . && exit 94\n\
         exit 0",
        small = small.arg(),
        big = context.arg(),
    );
    let none: [&str; 0] = [];
    let ran = sandbox.slipway(none).under(["unshare", "--mount", "sh", "-c", &script, "sh"]).ran();
    assert!(ran.status.success(), "{}: {}\n{}", ran.status, ran.stdout, ran.stderr);
    assert!(
        ran.error().contains("No space left") || ran.error().contains("no space left"),
        "{}",
        ran.error()
    );
}
