//! Tests of faults of the server and of the network.

use std::time::Instant;

use futures::StreamExt as _;

use super::*;

/// Fails `times`, then answers.
fn failing(times: usize, failure: Reply) -> impl FnMut(&Received) -> Reply + Send {
    let mut left = times;
    move |_| {
        if left == 0 {
            return manifest_reply();
        }
        left -= 1;
        failure.clone()
    }
}

#[tokio::test]
async fn faults_that_may_pass_are_tried_again() {
    for status in [408, 429, 500, 502, 503, 504] {
        let server = Scripted::start(failing(2, Reply::new(status))).await;
        client()
            .manifest(&image(&server), None)
            .await
            .unwrap_or_else(|error| panic!("{status}: {error}"));
        assert_eq!(server.lines().len(), 3, "{status}");
    }
    let server = Scripted::start(failing(2, Reply::unread())).await;
    // A GET has no body, so the connection closes without an answer.
    client().manifest(&image(&server), None).await.unwrap();
}

#[tokio::test]
async fn faults_that_stay_end() {
    for (status, kind) in [(500, RegistryErrorKind::Server), (429, RegistryErrorKind::RateLimited)]
    {
        let server = Scripted::start(move |_| Reply::new(status)).await;
        let error = client().manifest(&image(&server), None).await.unwrap_err();
        assert_eq!(error.kind(), kind);
        assert_eq!(server.lines().len(), 4);
    }
    for status in [400, 403, 404, 405] {
        let server = Scripted::start(move |_| Reply::new(status)).await;
        client().manifest(&image(&server), None).await.unwrap_err();
        assert_eq!(server.lines().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn retry_after_is_waited_for_by_everybody() {
    let server = Scripted::start(failing(1, Reply::new(429).header("retry-after", "1"))).await;
    let registry = client();
    let first = registry.clone();
    let reference = image(&server);
    let waiting = tokio::spawn(async move { first.manifest(&reference, None).await.map(drop) });
    while server.lines().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    // The server would answer this one at once; it must wait with the first all the same.
    let started = Instant::now();
    registry.manifest(&image(&server), None).await.unwrap();
    assert!(started.elapsed() >= Duration::from_millis(600), "{:?}", started.elapsed());
    waiting.await.unwrap().unwrap();
    assert_eq!(server.lines().len(), 3);
}

#[tokio::test]
async fn a_limit_that_lasts_is_told_at_once() {
    let quota = r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"You have reached your pull rate limit."}]}"#;
    for reply in [Reply::new(429).header("retry-after", "21600"), Reply::new(429).body(quota)] {
        let server = Scripted::start(move |_| reply.clone()).await;
        let error = client().manifest(&image(&server), None).await.unwrap_err();
        assert_eq!(error.kind(), RegistryErrorKind::RateLimited);
        assert_eq!(server.lines().len(), 1);
    }
}

/// Everything the client does, by name.
const OPERATIONS: [&str; 6] =
    ["resolve", "manifest", "blob", "has_blob", "push_blob", "push_manifest"];

async fn run(operation: &str, registry: &Registry, server: &Scripted) -> Result<(), RegistryError> {
    let bytes = content(2000);
    match operation {
        "resolve" => registry.resolve(&image(server)).await.map(drop),
        "manifest" => registry.manifest(&image(server), None).await.map(drop),
        "blob" => {
            pull(registry, server, &blob_of(&bytes)).await.map(|found| assert_eq!(found, bytes))
        }
        "has_blob" => registry.has_blob(&image(server), &Digest::of(b"")).await.map(drop),
        "push_blob" => {
            let file = file_of(&bytes);
            registry
                .push_blob(&image(server), &blob_of(&bytes), file.path(), &["a".into()], &|_| {})
                .await
                .map(drop)
        }
        _ => {
            let name = ManifestName::Tag("v1".into());
            registry
                .push_manifest(&image(server), &name, &MediaType::OCI_MANIFEST, MANIFEST.into())
                .await
        }
    }
}

fn healthy(request: &Received) -> Reply {
    match (request.method.as_str(), request.path().contains("/manifests/")) {
        ("PUT", _) => Reply::new(201),
        ("POST", _) => Reply::new(202).header("location", "/session"),
        (_, true) => manifest_reply(),
        ("HEAD", _) => Reply::new(404),
        _ => ranged(request, &content(2000)),
    }
}

/// Faults, and whether one of them must be survived.
fn faults() -> Vec<(&'static str, Reply, bool)> {
    let mut faults = vec![
        ("no answer", Reply::silent(), true),
        ("hang-up", Reply::unread(), true),
        ("not HTTP", Reply::garbage(), false),
        ("redirect loop", Reply::new(307).header("location", "/loop"), false),
        ("redirect to nowhere", Reply::new(307), false),
        (
            "redirect to metadata",
            Reply::new(307).header("location", "http://169.254.169.254/"),
            false,
        ),
        (
            "asks for an unknown login",
            Reply::new(401).header("www-authenticate", "Negotiate"),
            false,
        ),
    ];
    for status in [408, 429, 500, 502, 503, 504] {
        faults.push(("passing status", Reply::new(status), true));
        faults.push((
            "passing status that says when",
            Reply::new(status).header("retry-after", "0"),
            true,
        ));
    }
    for status in [400, 403, 404, 405, 409, 410, 413, 416, 418, 501] {
        faults.push(("lasting status", Reply::new(status), false));
    }
    faults
}

/// Every operation meets every fault at each of its requests, once and for good; it must succeed or fail, and
/// soon. A fault that passes must be survived.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_meets_every_fault() {
    let timing =
        Timing { answer: Duration::from_millis(250), commit: Duration::from_millis(250), ..QUICK };
    let mut cases = Vec::new();
    for operation in OPERATIONS {
        for (name, fault, survivable) in faults() {
            for stage in 0..4_usize {
                for lasting in [false, true] {
                    let fault = fault.clone();
                    cases.push(async move {
                        let shown = format!(
                            "{operation}, {name} {fault:?}, stage {stage}, lasting {lasting}"
                        );
                        let mut seen = 0;
                        let server = Scripted::start(move |request| {
                            seen += 1;
                            let hit = if lasting { seen > stage } else { seen == stage + 1 };
                            if hit { fault.clone() } else { healthy(request) }
                        })
                        .await;
                        let registry = Registry::with_timing(
                            RegistryOptions::default(),
                            Arc::new(Anonymous),
                            timing,
                        )
                        .unwrap();
                        let limit = Duration::from_secs(20);
                        let result =
                            tokio::time::timeout(limit, run(operation, &registry, &server)).await;
                        let result = result.unwrap_or_else(|_| panic!("did not end: {shown}"));
                        if let Err(error) = &result {
                            assert!(!lasting || !error.message().is_empty(), "{shown}");
                            assert!(lasting || !survivable, "{shown}: {error}");
                        }
                        assert!(
                            server.lines().len() < 60,
                            "{shown}: {} requests",
                            server.lines().len()
                        );
                    });
                }
            }
        }
    }
    futures::stream::iter(cases).buffer_unordered(64).collect::<Vec<()>>().await;
}
