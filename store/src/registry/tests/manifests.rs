//! Tests of names and manifests.

use super::*;

#[tokio::test]
async fn a_loopback_port_without_tls_is_found_out_once() {
    let server = Scripted::start(|_| manifest_reply()).await;
    let registry = client();
    let descriptor = registry.resolve(&image(&server)).await.unwrap();
    assert_eq!(
        descriptor,
        Descriptor::new(
            MediaType::OCI_MANIFEST,
            Digest::of(MANIFEST.as_bytes()),
            MANIFEST.len() as u64
        )
    );
    let (same, bytes) = registry.manifest(&image(&server), None).await.unwrap();
    assert_eq!((same, bytes.as_ref()), (descriptor, MANIFEST.as_bytes()));
    assert_eq!(server.greetings(), 1);
    assert_eq!(server.lines(), ["HEAD /v2/team/app/manifests/v1", "GET /v2/team/app/manifests/v1"]);
    let accepts = server.received()[0].header("accept").unwrap().to_owned();
    assert_eq!(accepts, MediaType::OCI_INDEX.as_str());
}

#[tokio::test]
async fn a_host_told_to_use_tls_is_never_spoken_to_without() {
    let server = Scripted::start(|_| manifest_reply()).await;
    let mut options = RegistryOptions::default();
    options.hosts.insert(
        server.authority(),
        HostOptions { plain_http: Some(false), ..HostOptions::default() },
    );
    let error = client_with(options, None).resolve(&image(&server)).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Unreachable);
    assert!(error.message().contains("does not speak TLS"), "{error}");
    assert!(server.lines().is_empty());
}

#[tokio::test]
async fn a_closed_port_is_unreachable() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let reference = format!("{}/app", listener.local_addr().unwrap()).parse().unwrap();
    drop(listener);
    let error = client().resolve(&reference).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Unreachable);
    assert_eq!(error.subject(), reference.to_string());
}

#[tokio::test]
async fn a_registry_without_head_is_asked_with_get() {
    let server = Scripted::start(|request| match request.method.as_str() {
        "HEAD" => Reply::new(405),
        _ => manifest_reply(),
    })
    .await;
    let descriptor = client().resolve(&image(&server)).await.unwrap();
    assert_eq!(descriptor.digest, Digest::of(MANIFEST.as_bytes()));
}

#[tokio::test]
async fn a_head_without_a_digest_is_followed_by_get() {
    let server =
        Scripted::start(|_| Reply::ok(MANIFEST).header("content-type", "application/json")).await;
    let descriptor = client().resolve(&image(&server)).await.unwrap();
    assert_eq!(
        (descriptor.digest, descriptor.media_type),
        (Digest::of(MANIFEST.as_bytes()), MediaType::OCI_MANIFEST)
    );
}

#[tokio::test]
async fn a_manifest_with_another_digest_is_refused() {
    let server = Scripted::start(|_| Reply::ok(MANIFEST)).await;
    let pinned = image(&server).with_digest(Digest::of(b"other"));
    let error = client().manifest(&pinned, None).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Digest);
    let error = client().manifest(&image(&server), Some(&Digest::of(b"other"))).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Digest);
    let wrong = Digest::of(b"other").to_string();
    let lying = Scripted::start(move |_| {
        Reply::ok(MANIFEST).header("docker-content-digest", wrong.clone())
    })
    .await;
    let error = client().manifest(&image(&lying), None).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Digest);
}

#[tokio::test]
async fn an_oversize_manifest_is_refused_however_it_comes() {
    let announced =
        Scripted::start(|_| Reply::ok("x").header("content-length", "4194305").cut(1)).await;
    let error = client().manifest(&image(&announced), None).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::TooLarge);
    let unannounced = Scripted::start(|_| Reply::ok(vec![b' '; 4_194_305]).chunked()).await;
    let error = client().manifest(&image(&unannounced), None).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::TooLarge);
    assert_eq!(unannounced.lines().len(), 1);
}

#[tokio::test]
async fn a_manifest_that_breaks_off_is_read_again() {
    let mut first = true;
    let server = Scripted::start(move |_| {
        let reply = manifest_reply();
        if std::mem::take(&mut first) { reply.cut(9) } else { reply }
    })
    .await;
    let (_, bytes) = client().manifest(&image(&server), None).await.unwrap();
    assert_eq!(bytes, MANIFEST);
}

#[tokio::test]
async fn what_is_missing_is_told_in_the_registrys_words() {
    let server = Scripted::start(|_| not_found("MANIFEST_UNKNOWN")).await;
    let error = client().manifest(&image(&server), None).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::NotFound);
    let host = server.authority();
    let expected = format!(
        "{host}/team/app:v1: {host} answered 404: MANIFEST_UNKNOWN: not here; not found: check the name and the tag"
    );
    assert_eq!(error.to_string(), expected);
    assert_eq!(server.lines().len(), 1);
}

#[tokio::test]
async fn mirrors_come_first_and_are_told_whose_they_are() {
    let empty = Scripted::start(|_| not_found("NAME_UNKNOWN")).await;
    let broken = Scripted::start(|_| Reply::ok("garbage")).await;
    let origin = Scripted::start(|_| manifest_reply()).await;
    let mut options = RegistryOptions::default();
    let mirrors = vec![format!("{}/proxy/hub", empty.authority()), broken.url("/v2/")];
    options.hosts.insert(origin.authority(), HostOptions { mirrors, ..HostOptions::default() });
    let registry = client_with(options, None);
    let (_, bytes) = registry.manifest(&image(&origin), None).await.unwrap();
    assert_eq!(bytes, MANIFEST);
    let namespace = origin.authority();
    assert_eq!(empty.lines(), [format!("GET /v2/proxy/hub/team/app/manifests/v1?ns={namespace}")]);
    assert_eq!(broken.lines(), [format!("GET /v2/team/app/manifests/v1?ns={namespace}")]);
    assert_eq!(origin.lines(), ["GET /v2/team/app/manifests/v1"]);
}

#[test]
fn mirrors_are_written_in_several_forms() {
    let mirror = |text: &str| {
        Mirror::parse(text).map(|mirror| (mirror.scheme, mirror.authority, mirror.prefix))
    };
    assert_eq!(mirror("m.example:5000"), Some((None, "m.example:5000".into(), String::new())));
    assert_eq!(mirror("m.example/v2/hub/"), Some((None, "m.example".into(), "hub/".into())));
    assert_eq!(
        mirror("http://m.example/a/b"),
        Some((Some(Scheme::Http), "m.example".into(), "a/b/".into()))
    );
    assert_eq!((mirror(""), mirror("ftp://x"), mirror("a b")), (None, None, None));
}

#[tokio::test]
async fn docker_hub_has_its_own_names() {
    let registry = client();
    let debian = "debian".parse().unwrap();
    let origin = registry.inner.origin(&debian);
    assert_eq!(
        (origin.authority.as_str(), origin.repository.as_str()),
        ("registry-1.docker.io", "library/debian")
    );
    assert_eq!(origin.credentials_key, "https://index.docker.io/v1/");
}
