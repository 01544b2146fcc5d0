//! Which steps run again, and which do not.

use std::fs;

use slipway_tests::{BASE, Context, Sandbox, Server};

/// A Dockerfile whose steps report to a server each time that they are executed.
fn counted(sandbox: &Sandbox, counter: &Server) -> Context {
    let context = sandbox.context("context");
    context.file("first", "first\n").file("second/file", "second\n").file("unread", "unread\n").dockerfile(&format!(
        "FROM {BASE}\nRUN wget -q -O /dev/null http://{0}/before && cat /proc/sys/kernel/random/uuid > /id\n\
         COPY first /first\nRUN wget -q -O /dev/null http://{0}/between\nCOPY second /second\n\
         RUN wget -q -O /dev/null http://{0}/after && cat /first /second/file > /both\n",
        counter.host()
    ));
    context
}

fn executed(counter: &Server) -> Vec<String> {
    let executed = counter.requests().into_iter().map(|request| request.path).collect();
    counter.forget();
    executed
}

#[test]
fn an_unchanged_build_runs_no_step() {
    let sandbox = Sandbox::with_base();
    let counter = Server::counter();
    let context = counted(&sandbox, &counter);
    let (first_id, second_id) = (sandbox.arg("id-1"), sandbox.arg("id-2"));

    sandbox.build(&context, ["-t", "cached:1", "--iidfile", &first_id]);
    assert_eq!(executed(&counter), ["/before", "/between", "/after"]);

    let again = sandbox.build(&context, ["-t", "cached:1", "--iidfile", &second_id]);
    assert_eq!(executed(&counter), [""; 0]);
    for step in ["/before", "COPY first", "/between", "COPY second", "/after"] {
        assert!(again.is_cached(step), "{step}: {}", again.stderr);
    }
    assert_eq!(fs::read(&first_id).unwrap(), fs::read(&second_id).unwrap());
}

#[test]
fn a_new_time_on_a_file_invalidates_nothing() {
    let sandbox = Sandbox::with_base();
    let counter = Server::counter();
    let context = counted(&sandbox, &counter);
    sandbox.build(&context, ["-t", "cached:1"]);
    executed(&counter);

    context.touch("first", 1_000_000_000).touch("second/file", 2_000_000_000);
    sandbox.build(&context, ["-t", "cached:1"]);
    assert_eq!(executed(&counter), [""; 0]);
}

#[test]
fn a_changed_file_invalidates_the_copy_that_reads_it_and_what_follows() {
    let sandbox = Sandbox::with_base();
    let counter = Server::counter();
    let context = counted(&sandbox, &counter);
    sandbox.build(&context, ["-t", "cached:1"]);
    executed(&counter);

    context.file("second/file", "SECOND\n");
    let ran = sandbox.build(&context, ["-t", "cached:1"]);
    assert_eq!(executed(&counter), ["/after"]);
    assert!(ran.is_cached("COPY first") && !ran.is_cached("COPY second"), "{}", ran.stderr);

    context.file("unread", "changed\n");
    sandbox.build(&context, ["-t", "cached:1"]);
    assert_eq!(executed(&counter), [""; 0], "no step reads that file");

    // Same size, same time: the content decides.
    context.file("first", "FIRST\n");
    sandbox.build(&context, ["-t", "cached:1"]);
    assert_eq!(executed(&counter), ["/between", "/after"]);

    context.mode("first", 0o755);
    sandbox.build(&context, ["-t", "cached:1"]);
    assert_eq!(executed(&counter), ["/between", "/after"], "the mode is content");

    context.file("second/new", "").mode("second/new", 0o644);
    sandbox.build(&context, ["-t", "cached:1"]);
    assert_eq!(executed(&counter), ["/after"], "so is a new name in a copied directory");

    let tree = sandbox.build_tree(&context, []);
    assert_eq!(fs::read_to_string(tree.join("both")).unwrap(), "FIRST\nSECOND\n");
    assert_eq!(executed(&counter), [""; 0]);
}

#[test]
fn going_back_to_an_earlier_content_finds_the_earlier_result() {
    let sandbox = Sandbox::with_base();
    let counter = Server::counter();
    let context = counted(&sandbox, &counter);
    sandbox.build(&context, ["-t", "cached:1"]);
    context.file("first", "other\n");
    sandbox.build(&context, ["-t", "cached:1"]);
    executed(&counter);
    context.file("first", "first\n");
    sandbox.build(&context, ["-t", "cached:1"]);
    assert_eq!(executed(&counter), [""; 0]);
}

#[test]
fn no_cache_runs_every_step() {
    let sandbox = Sandbox::with_base();
    let counter = Server::counter();
    let context = counted(&sandbox, &counter);
    sandbox.build(&context, ["-t", "cached:1"]);
    executed(&counter);
    let ran = sandbox.build(&context, ["-t", "cached:1", "--no-cache"]);
    assert_eq!(executed(&counter), ["/before", "/between", "/after"]);
    for step in ["/before", "COPY first", "/between", "COPY second", "/after"] {
        assert!(!ran.is_cached(step), "{step}: {}", ran.stderr);
    }
}

#[test]
fn a_build_argument_invalidates_from_where_it_is_used() {
    let sandbox = Sandbox::with_base();
    let counter = Server::counter();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN wget -q -O /dev/null http://{0}/before\nARG VALUE=1\nRUN wget -q -O /dev/null http://{0}/after-$VALUE\n",
        counter.host()
    ));
    sandbox.build(&context, ["-t", "x:1"]);
    assert_eq!(executed(&counter), ["/before", "/after-1"]);
    sandbox.build(&context, ["-t", "x:1", "--build-arg=VALUE=2"]);
    assert_eq!(executed(&counter), ["/after-2"]);
    sandbox.build(&context, ["-t", "x:1", "--build-arg=VALUE=1"]);
    assert_eq!(executed(&counter), [""; 0]);
    sandbox.build(&context, ["-t", "x:1", "--label", "new=label"]);
    assert_eq!(executed(&counter), [""; 0], "a label is no step");
}

#[test]
fn copy_from_a_stage_follows_the_files_and_not_how_they_came_about() {
    let sandbox = Sandbox::with_base();
    let counter = Server::counter();
    let context = sandbox.context("context");
    let write = |comment: &str| {
        context.dockerfile(&format!(
            "FROM {BASE} AS made\nRUN echo content > /file && touch -d 2020-01-01 /file # {comment}\n\
             FROM {BASE}\nCOPY --from=made /file /file\nRUN wget -q -O /dev/null http://{}/after\n",
            counter.host()
        ));
    };
    write("one");
    sandbox.build(&context, ["-t", "x:1"]);
    assert_eq!(executed(&counter), ["/after"]);
    write("two");
    sandbox.build(&context, ["-t", "x:1"]);
    assert_eq!(executed(&counter), [""; 0], "the stage ran again, to the same file");
}

#[test]
fn a_failed_step_is_not_remembered() {
    let sandbox = Sandbox::with_base();
    let counter = Server::counter();
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN wget -q -O /dev/null http://{0}/good\nRUN wget -q -O /dev/null http://{0}/bad && exit 3\n",
        counter.host()
    ));
    sandbox.build_fails(&context, ["-t", "x:1"]);
    sandbox.build_fails(&context, ["-t", "x:1"]);
    assert_eq!(executed(&counter), ["/good", "/bad", "/bad"]);
}
