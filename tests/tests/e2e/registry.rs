//! Pull and push against a real registry.

use slipway_tests::{BASE, Context, Layout, Registry, Reply, Sandbox, Server, base_archive};

fn is_upload(request: &slipway_tests::Request) -> bool {
    matches!(request.method.as_str(), "POST" | "PUT" | "PATCH") && request.path.contains("/blobs/")
}

fn context_on(sandbox: &Sandbox, base: &str) -> Context {
    let context = sandbox.context("context");
    context.file("f", "f\n").dockerfile(&format!("FROM {base}\nCOPY f /f\n"));
    context
}

#[test]
fn a_base_image_is_pulled_only_for_the_platform_that_is_built() {
    let sandbox = Sandbox::new();
    let registry = Registry::start();
    registry.seed(base_archive(), "base", "debian:base");
    let watcher = Server::watching(&registry.host());
    let base = format!("{}/debian:base", watcher.host());
    let context = context_on(&sandbox, &base);
    context.dockerfile(&format!("FROM {base}\nCOPY f /f\nRUN cat /f > /g\n"));
    sandbox.build(&context, ["-t", "x:1"]);
    let blobs = watcher
        .requests()
        .iter()
        .filter(|request| request.method == "GET" && request.path.contains("/blobs/"))
        .count();
    assert_eq!(blobs, 2, "one layer and one configuration: {:?}", watcher.requests());

    watcher.forget();
    sandbox.build(&context, ["-t", "x:1", "--no-cache"]);
    let gets = watcher
        .requests()
        .iter()
        .filter(|request| request.method == "GET" && request.path.contains("/blobs/"))
        .count();
    assert_eq!(gets, 0, "blobs that are in the store are not fetched again");
}

#[test]
fn pull_fetches_the_platforms_asked_for_and_checks_them_into_the_store() {
    let sandbox = Sandbox::new();
    let registry = Registry::start();
    registry.seed(base_archive(), "base", "debian:base");
    let image = registry.image("debian:base");
    sandbox.run(["pull", "--platform=linux/arm64", &image]);
    assert_eq!(sandbox.inspect(&image, Some("linux/arm64"))["Architecture"], "arm64");
    sandbox.fail(["inspect", "--platform=linux/amd64", &image]);
    sandbox.run(["pull", "--platform=linux/arm64,linux/amd64", &image]);
    assert_eq!(sandbox.inspect(&image, Some("linux/amd64"))["Architecture"], "amd64");
}

#[test]
fn a_base_image_by_digest_is_pulled_once_and_for_good() {
    let sandbox = Sandbox::new();
    let registry = Registry::start();
    registry.seed(base_archive(), "base", "debian:base");
    let digest = registry.skopeo(&["inspect", "--format", "{{.Digest}}"], "debian:base");
    let watcher = Server::watching(&registry.host());
    let context = context_on(&sandbox, &format!("{}/debian@{}", watcher.host(), digest.trim()));
    sandbox.build(&context, ["-t", "x:1"]);
    watcher.forget();
    sandbox.build(&context, ["-t", "x:1"]);
    assert_eq!(watcher.requests(), [], "a digest cannot change");
}

#[test]
fn pull_looks_for_a_newer_base_image() {
    let sandbox = Sandbox::new();
    let registry = Registry::start();
    registry.seed(base_archive(), "base", "debian:it");
    let base = registry.image("debian:it");
    let context = sandbox.context("context");
    context.dockerfile(&format!(
        "FROM {base}\nRUN test -e /usr/bin/tcc && echo dev > /kind || echo base > /kind\n"
    ));
    let kind = |options: &[&str]| {
        let tree = sandbox.build_tree(&context, options.iter().copied());
        std::fs::read_to_string(tree.join("kind")).unwrap()
    };
    assert_eq!(kind(&[]), "base\n");
    registry.seed(base_archive(), "dev", "debian:it");
    assert_eq!(kind(&["--pull"]), "dev\n");
}

#[test]
fn a_second_push_sends_no_blob() {
    let sandbox = Sandbox::with_base();
    let registry = Registry::start();
    let watcher = Server::watching(&registry.host());
    let image = format!("{}/team/app:1", watcher.host());
    let context = context_on(&sandbox, BASE);
    sandbox.build(&context, ["-t", &image, "--platform=linux/amd64,linux/arm64"]);

    sandbox.run(["push", &image]);
    assert!(watcher.requests().iter().any(is_upload));
    watcher.forget();
    sandbox.run(["push", &image]);
    let uploads: Vec<_> = watcher.requests().into_iter().filter(is_upload).collect();
    assert_eq!(uploads, []);

    // A change sends what is new: two configurations, and one layer that both platforms share.
    context.file("f", "changed\n");
    sandbox.build(&context, ["-t", &image, "--platform=linux/amd64,linux/arm64"]);
    watcher.forget();
    sandbox.run(["push", &image]);
    let finished = watcher
        .requests()
        .iter()
        .filter(|request| request.method == "PUT" && request.path.contains("/blobs/"))
        .count();
    assert_eq!(finished, 3, "{:?}", watcher.requests());
    let order: Vec<_> = watcher
        .requests()
        .iter()
        .filter(|request| request.method == "PUT")
        .map(|request| request.path.clone())
        .collect();
    assert!(order.last().unwrap().ends_with("/manifests/1"), "the tag comes last: {order:?}");
}

#[test]
fn tls_and_a_password_are_used_where_the_registry_wants_them() {
    let sandbox = Sandbox::with_base();
    let registry = Registry::start_secure();
    sandbox.trust(&registry);
    let image = registry.image("private/app:1");
    let context = context_on(&sandbox, BASE);

    let ran = sandbox.build_fails(&context, ["-t", &image, "--push"]);
    assert!(ran.error().contains(&registry.host()), "{}", ran.error());

    sandbox.log_in(&registry);
    sandbox.build(&context, ["-t", &image, "--push"]);
    let raw = registry.skopeo(&["inspect", "--raw"], "private/app:1");
    assert!(raw.contains("\"layers\""), "{raw}");

    let other = Sandbox::new();
    other.trust(&registry);
    other.log_in(&registry);
    other.run(["pull", &image]);
    assert_eq!(other.inspect(&image, None)["Id"], sandbox.inspect(&image, None)["Id"]);

    let stranger = Sandbox::new();
    stranger.trust(&registry);
    for arguments in [&["pull", &image][..], &["run", "--rm", &image]] {
        let ran = stranger.slipway(arguments).ran();
        assert!(!ran.status.success());
        let error = ran.error();
        assert!(error.contains(&registry.host()) && error.contains("401"), "{error}");
        assert!(error.contains("log in"), "what to do is said: {error}");
    }

    // The host is on the loopback interface; an authority that is named for it counts all the same.
    let misled = Sandbox::new();
    misled.trust_authority_of(&Registry::start_secure(), &registry);
    misled.log_in(&registry);
    let ran = misled.fail(["pull", &image]);
    assert!(
        ran.error().contains(&registry.host()) && ran.error().contains("certificate"),
        "{}",
        ran.error()
    );
}

#[test]
fn only_a_registry_on_the_loopback_interface_is_spoken_to_without_tls() {
    let sandbox = Sandbox::new();
    std::fs::write(
        sandbox.path("registry.yml"),
        format!(
            "version: 0.1\nlog: {{ accesslog: {{ disabled: false }} }}\n\
             storage: {{ filesystem: {{ rootdirectory: {} }} }}\nhttp:\n  addr: 0.0.0.0:5000\n",
            sandbox.arg("data")
        ),
    )
    .unwrap();
    // In a network namespace of its own the loopback interface can have an address that is not one of the loopback.
    let script = "busybox ip link set lo up && busybox ip addr add 192.0.2.1/32 dev lo || exit 90\n\
                  docker-registry serve ../registry.yml > ../registry.log 2>&1 & registry=$!\n\
                  for i in $(seq 1 500); do busybox wget -q -O /dev/null http://127.0.0.1:5000/v2/ && break; sleep 0.02; done\n\
                  \"$@\" pull 127.0.0.1:5000/near/it; echo near $? >&2\n\
                  \"$@\" pull 192.0.2.1:5000/far/it; echo far $? >&2\n\
                  kill $registry; wait $registry; exit 0";
    let none: [&str; 0] = [];
    let ran =
        sandbox.slipway(none).under(["unshare", "--net", "sh", "-c", script, "sh"]).succeeds();
    assert!(ran.stderr.contains("near 1") && ran.stderr.contains("far 1"), "{}", ran.stderr);
    let errors: Vec<_> = ran.stderr.lines().filter(|line| line.starts_with("ERROR: ")).collect();
    assert!(errors[0].to_lowercase().contains("not found"), "{errors:?}");
    assert!(errors[1].contains("192.0.2.1:5000") && errors[1].contains("TLS"), "{errors:?}");
    let log = std::fs::read_to_string(sandbox.path("registry.log")).unwrap();
    assert!(log.contains("/v2/near/it/"), "{log}");
    assert!(!log.contains("/v2/far/it/"), "it was asked without TLS: {log}");
}

#[test]
fn an_image_goes_from_one_registry_to_another_bit_by_bit_the_same() {
    let sandbox = Sandbox::new();
    let (from, to) = (Registry::start(), Registry::start());
    from.seed(base_archive(), "dev", "debian:dev");
    let (source, target) = (from.image("debian:dev"), to.image("mirror/debian:dev"));
    sandbox.run(["pull", "--platform=linux/amd64,linux/arm64", &source]);
    sandbox.run(["tag", &source, &target]);
    sandbox.run(["push", &target]);
    assert_eq!(
        from.skopeo(&["inspect", "--raw"], "debian:dev"),
        to.skopeo(&["inspect", "--raw"], "mirror/debian:dev")
    );
}

/// Answers none of these requests before `count` of them are there at the same time.
fn together(
    upstream: &Registry,
    count: usize,
    matches: impl Fn(&slipway_tests::Request) -> bool + Send + Sync + 'static,
) -> Server {
    let waiting = std::sync::Mutex::new(0);
    let changed = std::sync::Condvar::new();
    Server::start(Some(&upstream.host()), move |request| {
        if !matches(request) {
            return Reply::Forward;
        }
        let mut now = waiting.lock().expect("no thread panics with the lock");
        *now += 1;
        changed.notify_all();
        let patience = std::time::Duration::from_secs(20);
        let (now, _) = changed
            .wait_timeout_while(now, patience, |now| *now < count)
            .expect("no thread panics with the lock");
        if *now < count { Reply::status(504, "alone") } else { Reply::Forward }
    })
}

#[test]
fn blobs_travel_at_the_same_time() {
    let registry = Registry::start();
    let sandbox = Sandbox::with_base();
    std::fs::copy(base_archive(), sandbox.path("base.tar")).unwrap();
    let layout = Layout::unpack(&sandbox.path("base.tar"));
    let dev = layout
        .descriptors()
        .into_iter()
        .find(|image| image["annotations"]["org.opencontainers.image.ref.name"] == "dev")
        .unwrap();
    let image = &layout.images(&dev)[slipway_tests::host_platform()];
    let layers: Vec<String> = image.manifest["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer["digest"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(layers.len(), 2);

    let upload = together(&registry, 2, |request| {
        request.method == "POST" && request.path.contains("/blobs/uploads/")
    });
    let name = format!("{}/debian:dev", upload.host());
    sandbox.run(["tag", slipway_tests::DEV, &name]);
    sandbox.run(["push", &name]);

    let download = together(&registry, 2, move |request| {
        request.method == "GET" && layers.iter().any(|layer| request.path.ends_with(layer))
    });
    Sandbox::new().run(["pull", &format!("{}/debian:dev", download.host())]);
}
