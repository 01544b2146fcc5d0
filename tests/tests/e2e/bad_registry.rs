//! Registries that are down, broken or lying.

use slipway_tests::{Context, Registry, Reply, Request, Sandbox, Server, base_archive};

fn seeded() -> Registry {
    let registry = Registry::start();
    registry.seed(base_archive(), "base", "debian:base");
    registry
}

fn context_on(sandbox: &Sandbox, host: &str) -> Context {
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM {host}/debian:base\nRUN true\n"));
    context
}

/// Builds behind a server with this rule, expects an error with all these words, then a good build without it.
fn refuses(rule: impl Fn(&Request) -> Reply + Send + Sync + 'static, words: &[&str]) {
    let sandbox = Sandbox::new();
    let registry = seeded();
    let server = Server::start(Some(&registry.host()), rule);
    let ran = sandbox.build_fails(&context_on(&sandbox, &server.host()), ["-t", "x:1"]);
    for word in words.iter().copied().chain([server.host().as_str()]) {
        assert!(ran.error().contains(word), "{word:?} should be in {}", ran.error());
    }
    sandbox.build(&context_on(&sandbox, &registry.host()), ["-t", "x:1"]);
}

#[test]
fn a_registry_that_is_down_is_named() {
    let sandbox = Sandbox::new();
    let registry = seeded();
    // Nobody listens on this port any more.
    let gone = Server::counter().host();
    let ran = sandbox.build_fails(&context_on(&sandbox, &gone), ["-t", "x:1"]);
    assert!(ran.error().contains(&gone), "{}", ran.error());
    sandbox.build(&context_on(&sandbox, &registry.host()), ["-t", "x:1"]);
}

#[test]
fn an_image_that_does_not_exist_is_named() {
    let sandbox = Sandbox::new();
    let registry = seeded();
    let context = sandbox.context("context");
    let image = registry.image("debian:no-such-tag");
    context.dockerfile(&format!("FROM {image}\n"));
    let ran = sandbox.build_fails(&context, ["-t", "x:1"]);
    assert!(ran.error().contains(&image) && ran.error().contains("not found"), "{}", ran.error());
    assert!(ran.stderr.contains("Dockerfile:1"), "the line is shown: {}", ran.stderr);
    let ran = sandbox.fail(["pull", &image]);
    assert!(ran.error().contains(&image), "{}", ran.error());
}

#[test]
fn unauthorized_is_told() {
    refuses(
        |_| Reply::Answer(401, vec![("WWW-Authenticate", "Basic realm=\"tests\"".into())], vec![]),
        &["401"],
    );
}

#[test]
fn a_token_service_that_refuses_is_told() {
    refuses(
        |request| {
            if request.path.starts_with("/token") {
                return Reply::status(403, "no");
            }
            let host = request.header("host").unwrap_or_default();
            let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"tests\"");
            Reply::Answer(401, vec![("WWW-Authenticate", challenge)], vec![])
        },
        &["403", "login"],
    );
}

#[test]
fn a_server_error_that_stays_is_told() {
    refuses(|_| Reply::status(500, "out of order"), &["500"]);
}

#[test]
fn a_server_error_that_passes_is_waited_out() {
    let sandbox = Sandbox::new();
    let registry = seeded();
    let failures = std::sync::atomic::AtomicUsize::new(0);
    let server = Server::start(Some(&registry.host()), move |request| {
        // Each kind of request fails once.
        let first = request.path.contains("/blobs/")
            && failures.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0;
        if first { Reply::status(503, "in a moment") } else { Reply::Forward }
    });
    sandbox.build(&context_on(&sandbox, &server.host()), ["-t", "x:1"]);
}

#[test]
fn an_answer_that_is_no_registry_is_refused() {
    refuses(
        |_| {
            Reply::Answer(
                200,
                vec![("Content-Type", "text/html".into())],
                b"<html>Welcome!</html>".to_vec(),
            )
        },
        &[],
    );
}

#[test]
fn a_wrong_blob_is_refused() {
    refuses(
        |request| if request.path.contains("/blobs/") { Reply::Corrupt } else { Reply::Forward },
        &["digest"],
    );
}

#[test]
fn a_wrong_manifest_is_refused() {
    refuses(
        |request| {
            if request.path.contains("/manifests/sha256:") {
                Reply::Corrupt
            } else {
                Reply::Forward
            }
        },
        &["digest"],
    );
}

#[test]
fn a_blob_that_always_breaks_off_is_an_error_and_one_that_does_once_is_not() {
    refuses(
        |request| {
            if request.path.contains("/blobs/") { Reply::Truncate(100) } else { Reply::Forward }
        },
        &[],
    );

    let sandbox = Sandbox::new();
    let registry = seeded();
    let broken = std::sync::atomic::AtomicUsize::new(0);
    let server = Server::start(Some(&registry.host()), move |request| {
        if request.path.contains("/blobs/")
            && broken.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0
        {
            Reply::Truncate(100)
        } else {
            Reply::Forward
        }
    });
    sandbox.build(&context_on(&sandbox, &server.host()), ["-t", "x:1"]);
}

#[test]
fn a_push_that_is_refused_leaves_the_old_tag() {
    let sandbox = Sandbox::new();
    let registry = seeded();
    let server = Server::start(Some(&registry.host()), |request| {
        if request.method == "PUT" && request.path.ends_with("/manifests/base") {
            Reply::status(500, "full")
        } else {
            Reply::Forward
        }
    });
    let before = registry.skopeo(&["inspect", "--raw"], "debian:base");
    let image = format!("{}/debian:base", server.host());
    let context = sandbox.context("context");
    context.dockerfile("FROM scratch\nCOPY Dockerfile /\n");
    let ran = sandbox.build_fails(&context, ["-t", &image, "--push"]);
    assert!(ran.error().contains(&server.host()) && ran.error().contains("500"), "{}", ran.error());
    assert_eq!(registry.skopeo(&["inspect", "--raw"], "debian:base"), before);
}
