//! Tests of redirects.

use super::*;

#[tokio::test]
async fn credentials_stay_behind_on_a_redirect_to_another_origin() {
    let bytes = content(1000);
    let served = bytes.clone();
    let storage = Scripted::start(move |request| ranged(request, &served)).await;
    let location = storage.url("/signed?signature=1");
    let server = Scripted::start(move |request| match request.header("authorization") {
        Some(_) => Reply::new(307).header("location", location.clone()),
        None => Reply::new(401).header("www-authenticate", "Basic"),
    })
    .await;
    let registry = client_with(RegistryOptions::default(), password());
    assert_eq!(pull(&registry, &server, &blob_of(&bytes)).await.unwrap(), bytes);
    assert_eq!(storage.lines(), ["GET /signed?signature=1"]);
    assert_eq!(storage.received()[0].header("authorization"), None);
}

#[tokio::test]
async fn credentials_stay_on_a_redirect_within_the_origin() {
    let server =
        Scripted::start(|request| match (request.header("authorization"), request.path()) {
            (Some(_), "/elsewhere") => manifest_reply(),
            (Some(_), _) => Reply::new(302).header("location", "/elsewhere"),
            (None, _) => Reply::new(401).header("www-authenticate", "Basic"),
        })
        .await;
    let registry = client_with(RegistryOptions::default(), password());
    registry.manifest(&image(&server), None).await.unwrap();
}

#[tokio::test]
async fn redirects_without_end_end() {
    let server = Scripted::start(|request| {
        Reply::new(302).header("location", format!("{}x", request.target))
    })
    .await;
    let error = client().manifest(&image(&server), None).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Protocol);
    assert_eq!(server.lines().len(), 11);
    let metadata =
        Scripted::start(|_| Reply::new(302).header("location", "http://169.254.169.254/")).await;
    let error = client().manifest(&image(&metadata), None).await.unwrap_err();
    assert!(error.message().contains("link-local"), "{error}");
}

#[tokio::test]
async fn a_signed_url_that_ran_out_is_renewed() {
    let bytes = content(1000);
    let served = bytes.clone();
    let storage = Scripted::start(move |request| match request.target.as_str() {
        "/signed?n=1" => Reply::new(403).body("expired"),
        _ => ranged(request, &served),
    })
    .await;
    let location = storage.url("/signed?n=");
    let mut count = 0;
    let server = Scripted::start(move |_| {
        count += 1;
        Reply::new(307).header("location", format!("{location}{count}"))
    })
    .await;
    assert_eq!(pull(&client(), &server, &blob_of(&bytes)).await.unwrap(), bytes);
    assert_eq!(storage.lines(), ["GET /signed?n=1", "GET /signed?n=2"]);
}
