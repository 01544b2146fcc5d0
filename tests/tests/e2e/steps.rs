//! What the processes of `RUN` are given by flags: secrets, agents, limits.

use slipway_tests::{BASE, Sandbox, Tree};

#[test]
fn secrets_caches_and_limits_reach_the_steps() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.file("token", "hush");
    context.dockerfile(&format!(
        "FROM {BASE}\n\
         RUN --mount=type=secret,id=t --mount=type=secret,id=v,env=V --mount=type=cache,target=/c \\\n\
         \x20 {{ cat /run/secrets/t; echo \"-$V\"; ulimit -n; grep x.test /etc/hosts; cat /c/n; }} > /seen; \
         echo kept > /c/n\n"
    ));
    let token = format!("id=t,src={}/token", context.arg());
    let flags = [
        "--secret",
        &token,
        "--secret",
        "id=v,env=V",
        "--add-host",
        "x.test:10.1.2.3",
        "--ulimit",
        "nofile=77",
    ];
    let build = |more: &[&str], out: &str| {
        let output = format!("type=local,dest={}", sandbox.arg(out));
        let words = ["build", "-o", &output, context.arg()];
        let all: Vec<&str> = words.iter().chain(&flags).chain(more).copied().collect();
        sandbox.slipway(all).env("V", "variable").succeeds();
        let tree = Tree::read(&sandbox.path(out));
        assert!(
            !tree.paths().iter().any(|path| path.starts_with("c/") || path.starts_with("run/"))
        );
        std::fs::read_to_string(sandbox.path(out).join("seen")).unwrap()
    };
    assert_eq!(build(&[], "one"), "hush-variable\n77\n10.1.2.3\tx.test\n");
    // A step that is to run again begins with empty caches.
    assert!(!build(&["--no-cache"], "two").contains("kept"));
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN --mount=type=secret,required,id=t cat /run/secrets/t\n"
    ));
    let ran = sandbox.build_fails(&context, []);
    assert!(ran.error().contains("secret t: not found"), "{}", ran.error());
}

#[test]
fn leave_must_be_given_by_name() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM {BASE}\nRUN --security=insecure mount -t tmpfs none /tmp\n"));
    let ran = sandbox.build_fails(&context, []);
    assert!(ran.error().contains("--allow security.insecure"), "{}", ran.error());
    sandbox.build_tree(&context, ["--allow", "security.insecure"]);
}
