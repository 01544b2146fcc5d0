//! Tests of reading blobs.

use super::*;

#[tokio::test]
async fn a_broken_blob_continues_where_it_broke() {
    let bytes = content(100_000);
    for cut in [0, 1, 60_000, 99_999] {
        for chunked in [false, true] {
            let served = bytes.clone();
            let mut first = true;
            let server = Scripted::start(move |request| {
                let reply = ranged(request, &served);
                let reply = if chunked { reply.chunked() } else { reply };
                if std::mem::take(&mut first) { reply.cut(cut) } else { reply }
            })
            .await;
            assert_eq!(
                pull(&client(), &server, &blob_of(&bytes)).await.unwrap(),
                bytes,
                "{cut} {chunked}"
            );
            let expected = if cut == 0 { None } else { Some(format!("bytes={cut}-")) };
            let received = server.received();
            assert_eq!(received.len(), 2);
            assert_eq!(received[1].header("range").map(str::to_owned), expected, "{chunked}");
        }
    }
}

#[tokio::test]
async fn a_silent_connection_is_given_up_and_continued() {
    let bytes = content(50_000);
    let served = bytes.clone();
    let mut first = true;
    let server = Scripted::start(move |request| {
        let reply = ranged(request, &served);
        if std::mem::take(&mut first) { reply.hang(20_000) } else { reply }
    })
    .await;
    assert_eq!(pull(&client(), &server, &blob_of(&bytes)).await.unwrap(), bytes);
    assert_eq!(server.received()[1].header("range"), Some("bytes=20000-"));
}

#[tokio::test]
async fn a_range_that_is_ignored_is_skipped_here() {
    let bytes = content(50_000);
    let served = bytes.clone();
    let mut first = true;
    let server = Scripted::start(move |_| {
        let reply = Reply::ok(served.clone());
        if std::mem::take(&mut first) { reply.cut(20_000) } else { reply }
    })
    .await;
    assert_eq!(pull(&client(), &server, &blob_of(&bytes)).await.unwrap(), bytes);
    let mut reader = client().blob(&image(&server), &blob_of(&bytes), 40_000).await.unwrap();
    assert_eq!(read_all(&mut reader).await.unwrap(), bytes[40_000..]);
    assert_eq!(reader.position(), 50_000);
}

#[tokio::test]
async fn a_blob_may_start_anywhere() {
    let bytes = content(5000);
    let served = bytes.clone();
    let server = Scripted::start(move |request| ranged(request, &served)).await;
    let registry = client();
    for offset in [0, 1, 4999, 5000] {
        let mut reader =
            registry.blob(&image(&server), &blob_of(&bytes), offset as u64).await.unwrap();
        assert_eq!(read_all(&mut reader).await.unwrap(), bytes[offset..]);
    }
    // There is nothing to ask for at the end.
    assert_eq!(server.lines().len(), 3);
    assert!(registry.blob(&image(&server), &blob_of(&bytes), 5001).await.is_err());
    let empty =
        registry.blob(&image(&server), &blob_of(b""), 0).await.unwrap().chunk().await.unwrap();
    assert_eq!(empty, None);
}

#[tokio::test]
async fn another_range_than_asked_for_is_refused() {
    let bytes = content(5000);
    for reply in [
        Reply::new(206).header("content-range", "bytes 0-4999/5000").body(bytes.clone()),
        Reply::new(206).body(&bytes[100..]),
        Reply::new(206).header("content-range", "bytes 100-5000/5001").body(&bytes[100..]),
        Reply::new(416),
    ] {
        let shown = format!("{reply:?}").chars().take(120).collect::<String>();
        let server = Scripted::start(move |_| reply.clone()).await;
        let error = client().blob(&image(&server), &blob_of(&bytes), 100).await.unwrap_err();
        assert_eq!(error.kind(), RegistryErrorKind::Protocol, "{shown}");
        assert_eq!(server.lines().len(), 1, "{shown}");
    }
}

#[tokio::test]
async fn a_blob_of_another_length_is_refused() {
    let bytes = content(5000);
    let longer = content(5001);
    let served = longer.clone();
    let announced = Scripted::start(move |_| Reply::ok(served.clone())).await;
    let error = pull(&client(), &announced, &blob_of(&bytes)).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Protocol);
    let unannounced = Scripted::start(move |_| Reply::ok(longer.clone()).chunked()).await;
    let mut reader = client().blob(&image(&unannounced), &blob_of(&bytes), 0).await.unwrap();
    let mut count = 0;
    let error = loop {
        match reader.chunk().await {
            Ok(Some(chunk)) => count += chunk.len(),
            Ok(None) => panic!("the surplus was not noticed"),
            Err(error) => break error,
        }
    };
    assert!(count <= 5000);
    assert_eq!(error.kind(), RegistryErrorKind::Protocol);
    assert!(error.subject().starts_with("blob sha256:"), "{error}");
}

#[tokio::test]
async fn a_blob_that_always_breaks_ends() {
    let bytes = content(5000);
    let served = bytes.clone();
    let server = Scripted::start(move |request| ranged(request, &served).cut(10)).await;
    let error = pull(&client(), &server, &blob_of(&bytes)).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Unreachable);
    assert!(error.message().contains("40 of 5000 bytes"), "{error}");
    assert_eq!(server.lines().len(), 4);
}

#[tokio::test]
async fn a_mirror_that_breaks_hands_over_in_the_middle() {
    let bytes = content(5000);
    let (served, good) = (bytes.clone(), bytes.clone());
    let mirror = Scripted::start(move |request| match request.header("range") {
        None => Reply::ok(served.clone()).cut(1000),
        Some(_) => Reply::new(404),
    })
    .await;
    let origin = Scripted::start(move |request| ranged(request, &good)).await;
    let mut options = RegistryOptions::default();
    let mirrors = vec![mirror.authority()];
    options.hosts.insert(origin.authority(), HostOptions { mirrors, ..HostOptions::default() });
    let registry = client_with(options, None);
    assert_eq!(pull(&registry, &origin, &blob_of(&bytes)).await.unwrap(), bytes);
    assert_eq!(mirror.lines().len(), 2);
    assert_eq!(origin.received()[0].header("range"), Some("bytes=1000-"));
}

#[tokio::test]
async fn content_encoding_is_undone() {
    use std::io::Write as _;
    let bytes = content(300_000);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&bytes).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd::stream::encode_all(bytes.as_slice(), 1).unwrap();
    for (name, encoded) in [("gzip", gzip), ("zstd", zstd)] {
        let mut first = true;
        let served = encoded.clone();
        let server = Scripted::start(move |_| {
            let reply = Reply::ok(served.clone()).header("content-encoding", name);
            // A broken one must start again at the front, whatever was yielded before.
            if std::mem::take(&mut first) { reply.cut(served.len() / 2) } else { reply }
        })
        .await;
        assert_eq!(pull(&client(), &server, &blob_of(&bytes)).await.unwrap(), bytes, "{name}");
        assert_eq!(server.received()[1].header("range"), None, "{name}");
        // A blob that is itself a gzip file, which storage calls encoded.
        let raw = encoded.clone();
        let server =
            Scripted::start(move |_| Reply::ok(raw.clone()).header("content-encoding", name)).await;
        assert_eq!(pull(&client(), &server, &blob_of(&encoded)).await.unwrap(), encoded, "{name}");
    }
}

#[tokio::test]
async fn foreign_layers_are_fetched_without_credentials() {
    let bytes = content(1000);
    let served = bytes.clone();
    let elsewhere = Scripted::start(move |request| ranged(request, &served)).await;
    let server = Scripted::start(|request| match request.header("authorization") {
        Some(_) => not_found("BLOB_UNKNOWN"),
        None => Reply::new(401).header("www-authenticate", "Basic"),
    })
    .await;
    let mut descriptor = blob_of(&bytes);
    descriptor.urls = vec!["ftp://x/y".into(), elsewhere.url("/layer")];
    let registry = client_with(RegistryOptions::default(), password());
    assert_eq!(pull(&registry, &server, &descriptor).await.unwrap(), bytes);
    assert_eq!(elsewhere.received()[0].header("authorization"), None);
}

#[tokio::test]
async fn readers_share_the_places_of_a_host() {
    let bytes = content(5000);
    let served = bytes.clone();
    let server = Scripted::start(move |request| ranged(request, &served)).await;
    let options = RegistryOptions { max_connections_per_host: 2, ..RegistryOptions::default() };
    let registry = client_with(options, None);
    let descriptor = blob_of(&bytes);
    let first = registry.blob(&image(&server), &descriptor, 0).await.unwrap();
    let second = registry.blob(&image(&server), &descriptor, 0).await.unwrap();
    let reference = image(&server);
    let third = registry.blob(&reference, &descriptor, 0);
    tokio::pin!(third);
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut third).await.is_err());
    drop(first);
    assert_eq!(read_all(&mut third.await.unwrap()).await.unwrap(), bytes);
    drop(second);
}

#[tokio::test]
async fn has_blob_tells_missing_from_failing() {
    for (status, expected) in
        [(200, Ok(true)), (404, Ok(false)), (403, Err(RegistryErrorKind::Denied))]
    {
        let server = Scripted::start(move |_| Reply::new(status)).await;
        let found = client().has_blob(&image(&server), &Digest::of(b"")).await;
        assert_eq!(found.map_err(|error| error.kind()), expected);
    }
}
