//! Tests of sending blobs and manifests.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::*;

/// A registry that takes uploads; `extra` may answer first.
async fn taking(mut extra: impl FnMut(&Received) -> Option<Reply> + Send + 'static) -> Scripted {
    Scripted::start(move |request| {
        if let Some(reply) = extra(request) {
            return reply;
        }
        match request.method.as_str() {
            "HEAD" => Reply::new(404),
            "POST" => Reply::new(202).header("location", "session?state=a%2Fb&n=1"),
            "PUT" => Reply::new(201),
            _ => Reply::new(405),
        }
    })
    .await
}

async fn push(
    registry: &Registry,
    server: &Scripted,
    bytes: &[u8],
    from: &[&str],
) -> Result<Pushed, RegistryError> {
    let file = file_of(bytes);
    let from: Vec<String> = from.iter().map(|from| (*from).to_owned()).collect();
    registry.push_blob(&image(server), &blob_of(bytes), file.path(), &from, &|_| {}).await
}

#[tokio::test]
async fn a_blob_is_sent_to_the_place_that_is_named() {
    let bytes = content(600_000);
    let server = taking(|_| None).await;
    let file = file_of(&bytes);
    let seen = AtomicU64::new(0);
    let progress = |sent| seen.store(sent, Ordering::Relaxed);
    let descriptor = blob_of(&bytes);
    let pushed = client()
        .push_blob(&image(&server), &descriptor, file.path(), &[], &progress)
        .await
        .unwrap();
    assert_eq!((pushed, seen.load(Ordering::Relaxed)), (Pushed::Uploaded, 600_000));
    let digest = &descriptor.digest;
    assert_eq!(
        server.lines(),
        [
            format!("HEAD /v2/team/app/blobs/{digest}"),
            "POST /v2/team/app/blobs/uploads/".into(),
            format!("PUT /v2/team/app/blobs/uploads/session?state=a%2Fb&n=1&digest={digest}"),
        ]
    );
    let received = server.received();
    assert_eq!(received[1].header("content-length"), Some("0"));
    assert_eq!(received[2].header("content-length"), Some("600000"));
    assert_eq!(received[2].header("content-type"), Some("application/octet-stream"));
    assert!(received[2].body == bytes);
    assert_eq!(push(&client(), &server, b"", &[]).await.unwrap(), Pushed::Uploaded);
}

#[tokio::test]
async fn a_blob_that_is_there_is_not_sent() {
    let server = Scripted::start(|_| Reply::new(200)).await;
    assert_eq!(push(&client(), &server, b"x", &[]).await.unwrap(), Pushed::Existed);
    assert_eq!(server.lines().len(), 1);
}

#[tokio::test]
async fn mounts_are_tried_first_and_may_fail() {
    let digest = Digest::of(b"x");
    let mount = format!("POST /v2/team/app/blobs/uploads/?mount={digest}&from=team/base");
    let plain = "POST /v2/team/app/blobs/uploads/".to_owned();
    let head = format!("HEAD /v2/team/app/blobs/{digest}");
    let put = format!("PUT /v2/team/app/blobs/uploads/session?state=a%2Fb&n=1&digest={digest}");
    for (status, expected, lines) in [
        (201, Pushed::Mounted, vec![head.clone(), mount.clone()]),
        (202, Pushed::Uploaded, vec![head.clone(), mount.clone(), put.clone()]),
        (404, Pushed::Uploaded, vec![head.clone(), mount.clone(), plain.clone(), put.clone()]),
        (401, Pushed::Uploaded, vec![head, mount, plain, put]),
    ] {
        let server = taking(move |request| {
            let reply = Reply::new(status).header("location", "session?state=a%2Fb&n=1");
            request.target.contains("mount=").then_some(reply)
        })
        .await;
        let pushed = push(&client(), &server, b"x", &["team/app", "team/base"]).await.unwrap();
        assert_eq!((pushed, server.lines()), (expected, lines), "{status}");
    }
}

#[tokio::test]
async fn the_next_repository_is_tried_when_the_first_does_not_have_it() {
    let mut sessions = 0;
    let server = taking(move |request| {
        if request.target.contains("from=team/base") {
            return Some(Reply::new(201));
        }
        sessions += 1;
        let location = format!("/session/{sessions}");
        request.target.contains("mount=").then(|| Reply::new(202).header("location", location))
    })
    .await;
    let pushed = push(&client(), &server, b"x", &["team/a", "team/base", "team/c"]).await.unwrap();
    assert_eq!(pushed, Pushed::Mounted);
    assert_eq!(server.lines()[3..], ["DELETE /session/2"]);
    assert_eq!(server.lines().len(), 4);
}

#[tokio::test]
async fn a_mount_asks_for_a_wider_token_and_lives_without() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let realm = format!("http://{}/token", listener.local_addr().unwrap());
    let server = Scripted::start_on(listener, move |request| {
        match (request.path(), request.header("authorization"), request.method.as_str()) {
            // Whoever asks for another repository gets nothing at all.
            ("/token", ..) if request.target.contains("team/base") => Reply::new(403),
            ("/token", ..) => Reply::json(r#"{"token":"t"}"#),
            (_, None, _) => {
                Reply::new(401).header("www-authenticate", format!(r#"Bearer realm="{realm}""#))
            }
            (_, _, "HEAD") => Reply::new(404),
            (_, _, "POST") => Reply::new(202).header("location", "/up"),
            _ => Reply::new(201),
        }
    });
    assert_eq!(push(&client(), &server, b"x", &["team/base"]).await.unwrap(), Pushed::Uploaded);
    let tokens: Vec<String> =
        server.lines().into_iter().filter(|line| line.contains("/token")).collect();
    assert_eq!(
        tokens,
        [
            "GET /token?scope=repository:team/app:pull,push",
            "GET /token?scope=repository:team/app:pull,push&scope=repository:team/base:pull",
        ]
    );
}

#[tokio::test]
async fn a_broken_upload_starts_anew() {
    let bytes = content(3_000_000);
    let mut faults = vec![Reply::new(404), Reply::new(503), Reply::unread()];
    let server =
        taking(move |request| if request.method == "PUT" { faults.pop() } else { None }).await;
    assert_eq!(push(&client(), &server, &bytes, &[]).await.unwrap(), Pushed::Uploaded);
    let received = server.received();
    assert_eq!(received.len(), 12);
    assert!(received[11].body == bytes);
}

#[tokio::test]
async fn a_place_on_another_host_gets_no_credentials() {
    let storage = Scripted::start(|_| Reply::new(201)).await;
    let location = storage.url("/put?signature=1");
    let server = Scripted::start(move |request| {
        match (request.header("authorization"), request.method.as_str()) {
            (None, _) => Reply::new(401).header("www-authenticate", "Basic"),
            (_, "HEAD") => Reply::new(404),
            _ => Reply::new(202).header("location", location.clone()),
        }
    })
    .await;
    let registry = client_with(RegistryOptions::default(), password());
    assert_eq!(push(&registry, &server, b"x", &[]).await.unwrap(), Pushed::Uploaded);
    let received = storage.received();
    assert_eq!((received.len(), received[0].header("authorization")), (1, None));
    assert_eq!(received[0].target, format!("/put?signature=1&digest={}", Digest::of(b"x")));
}

#[tokio::test]
async fn the_same_blob_is_sent_once() {
    let there = Arc::new(AtomicUsize::new(0));
    let stored = Arc::clone(&there);
    let server = taking(move |request| match request.method.as_str() {
        "HEAD" if stored.load(Ordering::SeqCst) > 0 => Some(Reply::new(200)),
        "PUT" => {
            stored.fetch_add(1, Ordering::SeqCst);
            None
        }
        _ => None,
    })
    .await;
    let registry = client();
    let (a, b) =
        tokio::join!(push(&registry, &server, b"x", &[]), push(&registry, &server, b"x", &[]));
    assert_eq!((a.unwrap(), b.unwrap()), (Pushed::Uploaded, Pushed::Existed));
    assert_eq!(there.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_file_of_another_length_is_not_sent() {
    let server = taking(|_| None).await;
    let file = file_of(b"longer");
    let descriptor = blob_of(b"short");
    let error = client()
        .push_blob(&image(&server), &descriptor, file.path(), &[], &|_| {})
        .await
        .unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Local);
    assert!(!server.lines().iter().any(|line| line.starts_with("PUT")));
}

#[tokio::test]
async fn a_manifest_is_put_and_its_digest_compared() {
    let bytes = Bytes::from_static(MANIFEST.as_bytes());
    let put = async |server: &Scripted, name: ManifestName| {
        client().push_manifest(&image(server), &name, &MediaType::OCI_MANIFEST, bytes.clone()).await
    };
    let digest = Digest::of(&bytes);
    let echoed = digest.to_string();
    let mut first = true;
    let server = Scripted::start(move |_| {
        if std::mem::take(&mut first) {
            return Reply::new(429).header("retry-after", "0");
        }
        Reply::new(201).header("docker-content-digest", echoed.clone())
    })
    .await;
    put(&server, ManifestName::Tag("v2".into())).await.unwrap();
    put(&server, ManifestName::Digest(digest.clone())).await.unwrap();
    let received = server.received();
    assert_eq!(received[1].line(), "PUT /v2/team/app/manifests/v2");
    assert_eq!(received[1].header("content-type"), Some(MediaType::OCI_MANIFEST.as_str()));
    assert_eq!(received[2].line(), format!("PUT /v2/team/app/manifests/{digest}"));
    assert_eq!(received[2].body, MANIFEST.as_bytes());

    let other = Digest::of(b"other").to_string();
    let server =
        Scripted::start(move |_| Reply::new(201).header("docker-content-digest", other.clone()))
            .await;
    assert_eq!(
        put(&server, ManifestName::Tag("v2".into())).await.unwrap_err().kind(),
        RegistryErrorKind::Digest
    );
    let server = Scripted::start(|_| {
        Reply::new(400)
            .body(r#"{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN","message":"blob unknown"}]}"#)
    })
    .await;
    assert_eq!(
        put(&server, ManifestName::Tag("v2".into())).await.unwrap_err().kind(),
        RegistryErrorKind::NotFound
    );
    let server = Scripted::start(|_| Reply::new(413)).await;
    assert_eq!(
        put(&server, ManifestName::Tag("v2".into())).await.unwrap_err().kind(),
        RegistryErrorKind::TooLarge
    );
}

#[tokio::test]
async fn plain_http_goes_through_a_configured_proxy() {
    let proxy = Scripted::start(|_| manifest_reply()).await;
    let mut options = RegistryOptions::default();
    options.hosts.insert(
        "r.invalid".into(),
        HostOptions { plain_http: Some(true), ..HostOptions::default() },
    );
    options.proxy.http = Some(format!("http://me:pw@{}", proxy.authority()));
    let registry = client_with(options, None);
    registry.resolve(&"r.invalid/app".parse().unwrap()).await.unwrap();
    assert_eq!(proxy.lines(), ["HEAD http://r.invalid/v2/app/manifests/latest"]);
    assert_eq!(proxy.received()[0].header("proxy-authorization"), Some(PASSWORD_HEADER));
}
