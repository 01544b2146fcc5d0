//! Builds from the first call to the last, and builds that end early.

use std::time::Instant;

use serde_json::Value;
use slipway_spec::wire::control::SolveRequest;
use slipway_spec::wire::gateway::{self, PingRequest, result};
use tonic::Code;

use super::go_sender::Folder;
use super::peer::*;
use crate::session::content::tests::Stores;

const OCI: Wish<'_> = Wish { attrs: &[], outputs: &[("oci", &[("tar", "true")])] };

fn app() -> Folder {
    Folder::of(&["Dockerfile=FROM scratch\nCOPY a b/ /x/\n", "a=1", "b/", "b/c=2"])
}

/// The paths in a tar archive of short names.
fn paths(tar: &[u8]) -> Vec<String> {
    let (mut at, mut found) = (0, vec![]);
    while let Some(header) = tar.get(at..at + 512) {
        let name: Vec<u8> = header[..100].iter().copied().take_while(|byte| *byte != 0).collect();
        if name.is_empty() {
            break;
        }
        found.push(String::from_utf8(name).unwrap());
        let size = std::str::from_utf8(&header[124..135]).unwrap().trim();
        let size = usize::from_str_radix(size, 8).unwrap();
        at += 512 + size.div_ceil(512) * 512;
    }
    found
}

#[tokio::test]
async fn a_client_asks_what_the_daemon_can_do() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let begun = peer.begin(SolveRequest {
        r#ref: "r0".into(),
        session: "s0".into(),
        internal: true,
        ..SolveRequest::default()
    });
    let mut session = peer.session("s0", &[]).await;
    let pong = peer.gateway().ping(tagged("r0", PingRequest {})).await.unwrap().into_inner();
    assert!(!pong.frontend_api_caps.is_empty() && !pong.llb_caps.is_empty());
    // Without these, buildx refuses `prune --max-used-space` and policies that are strict.
    for name in ["gc.freespacefilter", "history.filter", "source.policy", "source.policy.session"] {
        assert!(pong.llb_caps.iter().any(|cap| cap.id == name && cap.enabled), "{name}");
    }
    assert!(!pong.workers[0].platforms.is_empty());
    peer.give("r0", Ok(result_of(""))).await.unwrap();
    let (solved, events) = begun.end().await;
    assert!(solved.unwrap().exporter_response.is_empty());
    assert!(vertices(&events).is_empty());
    session.connection.half_close();
    tokio::time::timeout(SOON, session.connection.ended()).await.unwrap();
}

#[tokio::test]
async fn a_dockerfile_becomes_an_archive_of_the_client() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let built = peer.buildx("r1", &app(), OCI).await;
    let result = built.result.unwrap();
    let config: Value = serde_json::from_slice(&result.metadata["containerimage.config"]).unwrap();
    assert_eq!(config["os"], "linux");
    assert!(result.metadata.contains_key("refs.platforms"));
    assert!(single(&result).def.is_some());

    let response = built.response.unwrap().exporter_response;
    let keys: Vec<&str> = response.keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        ["containerimage.config.digest", "containerimage.descriptor", "containerimage.digest",]
    );
    let digest = response["containerimage.digest"].strip_prefix("sha256:").unwrap();
    let paths = paths(&built.archive);
    assert!(paths.contains(&"index.json".to_owned()), "{paths:?}");
    assert!(paths.contains(&format!("blobs/sha256/{digest}")), "{paths:?}");

    let told = vertices(&built.events);
    assert!(told.values().all(|v| v.completed.is_some() && v.error.is_empty()), "{told:#?}");
    assert!(told.keys().any(|name| name.contains("COPY a b/ /x/")), "{told:#?}");

    // The same once more is not made again, and is the same to the byte.
    let again = peer.buildx("r2", &app(), OCI).await;
    assert_eq!(
        again.response.unwrap().exporter_response["containerimage.digest"],
        response["containerimage.digest"]
    );
    let told = vertices(&again.events);
    assert!(told.iter().any(|(name, v)| name.contains("COPY") && v.cached), "{told:#?}");
}

#[tokio::test]
async fn an_image_may_become_loose_content_of_the_client() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let stores = Stores::default();
    stores.0.lock().unwrap().insert("export".into(), [].into());
    let _session = peer.session_storing("s", &[], stores.clone()).await;
    let graph = definition(vec![file_op(None, vec![mkfile("/hello", "world")])]);
    let attrs = [("tar", "false"), ("name", "app:1,app:2")];
    let begun = peer.begin(SolveRequest {
        r#ref: "r".into(),
        session: "s".into(),
        definition: Some(graph),
        exporters: vec![exporter("oci", &attrs)],
        ..SolveRequest::default()
    });
    let (solved, events) = begun.end().await;
    let response = solved.unwrap().exporter_response;
    let names = "docker.io/library/app:1,docker.io/library/app:2";
    assert_eq!(response["image.name"], names);
    let content = stores.0.lock().unwrap()["export"].clone();
    let manifest = &content[&response["containerimage.digest"]];
    let manifest: Value = serde_json::from_slice(manifest).unwrap();
    assert!(content.contains_key(manifest["config"]["digest"].as_str().unwrap()));
    assert!(content.contains_key(manifest["layers"][0]["digest"].as_str().unwrap()));
    assert_eq!(content.len(), 3);
    let told = vertices(&events);
    assert!(told["exporting to oci image format"].completed.is_some());
}

#[tokio::test]
async fn transfers_are_shown_as_parts_of_the_steps_that_read() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let built = peer.buildx("r", &app(), OCI).await;
    built.response.unwrap();
    let told = vertices(&built.events);
    let statuses: Vec<_> = built.events.iter().flat_map(|event| &event.statuses).collect();
    for (step, id) in [
        ("[internal] load build definition from Dockerfile", "transferring dockerfile:"),
        ("[internal] load .dockerignore", "transferring context:"),
        ("[internal] load build context", "transferring context:"),
    ] {
        let digest = &told[step].digest;
        let last = statuses.iter().rfind(|s| s.vertex == *digest && s.id == id);
        let last = last.unwrap_or_else(|| panic!("{step}: {statuses:#?}"));
        assert_eq!(last.name, "transferring");
        assert!(last.completed.is_some());
    }
    assert!(!told.keys().any(|name| name.contains("transferring")), "{told:#?}");
}

#[tokio::test]
async fn a_folder_may_be_that_of_another_session() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let _other = peer.session("other", &[("dockerfile", app()), ("context", app())]).await;
    let attrs = [("local-sessionid:dockerfile", "other"), ("local-sessionid:context", "other")];
    let request = SolveRequest {
        r#ref: "r".into(),
        session: "own".into(),
        frontend: "dockerfile.v0".into(),
        frontend_attrs: pairs(&attrs),
        ..SolveRequest::default()
    };
    let begun = peer.begin(request.clone());
    let _own = peer.session("own", &[]).await;
    begun.end().await.0.unwrap();
    let begun =
        peer.begin(SolveRequest { r#ref: "r2".into(), frontend_attrs: [].into(), ..request });
    assert!(begun.end().await.0.is_err());
}

#[tokio::test]
async fn several_platforms_become_an_index() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let wish = Wish { attrs: &[("platform", "linux/amd64,linux/arm64")], ..OCI };
    let built = peer.buildx("r", &app(), wish).await;
    let result = built.result.unwrap();
    let Some(result::Result::Refs(refs)) = &result.result else { panic!("{result:?}") };
    let ids: Vec<&str> = refs.refs.keys().map(String::as_str).collect();
    assert_eq!(ids, ["linux/amd64", "linux/arm64"]);
    let platforms: Value = serde_json::from_slice(&result.metadata["refs.platforms"]).unwrap();
    assert_eq!(platforms["Platforms"][1]["ID"], "linux/arm64");
    assert_eq!(platforms["Platforms"][1]["Platform"]["architecture"], "arm64");
    let config = &result.metadata["containerimage.config/linux/arm64"];
    let config: Value = serde_json::from_slice(config).unwrap();
    assert_eq!(config["architecture"], "arm64");
    let response = built.response.unwrap().exporter_response;
    assert!(!response.contains_key("containerimage.config.digest"));
    assert!(response.contains_key("containerimage.digest"));
    assert!(!built.archive.is_empty());
}

#[tokio::test]
async fn a_graph_needs_no_frontend() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let session = peer.session("s", &[]).await;
    let graph = definition(vec![file_op(None, vec![mkfile("/hello", "world")])]);
    let begun = peer.begin(SolveRequest {
        r#ref: "r".into(),
        session: "s".into(),
        definition: Some(graph.clone()),
        exporters: vec![exporter("tar", &[])],
        ..SolveRequest::default()
    });
    let (solved, events) = begun.end().await;
    solved.unwrap();
    assert_eq!(paths(&session.got.lock().unwrap()), ["hello"]);
    let digest = slipway_spec::Digest::of(&graph.def[0]).to_string();
    let told = vertices(&events);
    assert!(told.values().any(|v| v.digest == digest && v.completed.is_some()), "{told:#?}");
    assert!(told["exporting to client tarball"].completed.is_some());

    // Who comes after the end is told the same.
    let late = peer.follow("r").await.unwrap().unwrap();
    assert_eq!(vertices(&late), vertices(&events));
}

#[tokio::test]
async fn a_mistake_in_a_dockerfile_is_shown_where_it_is() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let folder = Folder::of(&["Dockerfile=FROM scratch\nCOPYY a /\n", "a=1"]);
    let built = peer.buildx("syntax", &folder, OCI).await;
    for status in [built.result.unwrap_err(), built.response.unwrap_err()] {
        assert!(status.message().contains("COPYY"), "{}", status.message());
        let details = details(&status);
        let source = details.iter().find(|any| any.type_url.ends_with("errdefs.Source+json"));
        let place: Value = serde_json::from_slice(&source.expect("a place").value).unwrap();
        assert_eq!(place["info"]["filename"], "Dockerfile");
        assert_eq!(place["ranges"][0]["start"]["line"], 2);
        assert!(place["info"]["definition"]["def"].is_array(), "{place}");
    }

    let folder = Folder::of(&["Dockerfile=FROM scratch\nCOPY nothing /\n", "a=1"]);
    let built = peer.buildx("missing", &folder, OCI).await;
    built.result.unwrap();
    let status = built.response.unwrap_err();
    let details = details(&status);
    let kinds: Vec<&str> = details.iter().map(|any| any.type_url.as_str()).collect();
    assert_eq!(
        kinds,
        [
            "github.com/moby/buildkit/errdefs.Vertex+json",
            "github.com/moby/buildkit/errdefs.Source+json",
        ]
    );
    let vertex: Value = serde_json::from_slice(&details[0].value).unwrap();
    let told = vertices(&built.events);
    let failed = told.values().find(|vertex| !vertex.error.is_empty()).unwrap();
    assert_eq!(vertex["digest"], failed.digest);
    let place: Value = serde_json::from_slice(&details[1].value).unwrap();
    assert_eq!(place["ranges"][0]["start"]["line"], 2);
    assert!(place["info"]["definition"]["def"].is_array(), "{place}");
}

#[tokio::test]
async fn what_is_not_there_is_refused_by_name() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let solve = |request: SolveRequest| {
        let mut control = peer.control();
        async move { control.solve(request).await.unwrap_err().message().to_owned() }
    };
    let definition = Some(definition(vec![file_op(None, vec![mkfile("/a", "")])]));
    let base = SolveRequest { definition, ..SolveRequest::default() };
    let mistake = SolveRequest {
        r#ref: "a".into(),
        exporters: vec![exporter("floppy", &[])],
        ..base.clone()
    };
    assert_eq!(solve(mistake).await, "exporter \"floppy\" could not be found");
    let mistake =
        SolveRequest { r#ref: "b".into(), entitlements: vec!["root".into()], ..base.clone() };
    assert_eq!(solve(mistake).await, "unknown entitlement root");
    let mistake = SolveRequest {
        r#ref: "c".into(),
        entitlements: vec!["network.host".into()],
        ..base.clone()
    };
    assert_eq!(
        solve(mistake).await,
        "granting entitlement network.host is not allowed by build daemon configuration"
    );
    for (at, entitlement, says) in [
        (
            "c1",
            "device",
            "granting entitlement device is not allowed by build daemon configuration",
        ),
        (
            "c2",
            "device=v.com/c",
            "granting entitlement device is not allowed by build daemon configuration",
        ),
        ("c3", "device=v.com/c,name=x", "unknown device config key \"name\""),
        ("c4", "network.host=1", "unknown entitlement network.host=1"),
    ] {
        let entitlements = vec![entitlement.into()];
        let mistake = SolveRequest { r#ref: at.into(), entitlements, ..base.clone() };
        assert_eq!(solve(mistake).await, says);
    }
    let mistake =
        SolveRequest { r#ref: "d".into(), frontend: "make.v0".into(), definition: None, ..base };
    assert_eq!(solve(mistake).await, "invalid frontend: make.v0");

    let begun = peer.begin(SolveRequest { r#ref: "e".into(), ..SolveRequest::default() });
    peer.gateway().ping(tagged("e", PingRequest {})).await.unwrap();
    let twin = SolveRequest { r#ref: "e".into(), ..SolveRequest::default() };
    assert_eq!(solve(twin).await, "job ID e exists");
    peer.give("e", Ok(result_of(""))).await.unwrap();
    begun.end().await.0.unwrap();

    let started = Instant::now();
    let gone = peer.follow("nobody").await.unwrap().unwrap_err();
    assert_eq!((gone.code(), gone.message()), (Code::NotFound, "no such job nobody"));
    assert!(started.elapsed().as_secs() >= 5);
}

#[tokio::test]
async fn a_client_that_vanishes_takes_its_build_along() {
    let rig = Rig::new();
    let watcher = rig.connect().await;
    let killed = rig.connect().await;
    let session = killed.session("s", &[]).await;
    let begun = killed.begin(SolveRequest {
        r#ref: "r".into(),
        session: "s".into(),
        ..SolveRequest::default()
    });
    killed.gateway().ping(tagged("r", PingRequest {})).await.unwrap();
    let seen = watcher.follow("r");
    let started = Instant::now();
    drop(session);
    drop(killed);
    assert_eq!(begun.solve.await.unwrap().unwrap_err().code(), Code::Unavailable);
    seen.await.unwrap().unwrap();
    let over = watcher.gateway().ping(tagged("r", PingRequest {})).await.unwrap_err();
    assert_eq!(over.code(), Code::NotFound);
    assert!(started.elapsed().as_secs() < 10);
    // Its name is free.
    let again = watcher.begin(SolveRequest { r#ref: "r".into(), ..SolveRequest::default() });
    watcher.gateway().ping(tagged("r", PingRequest {})).await.unwrap();
    watcher.give("r", Ok(result_of(""))).await.unwrap();
    again.end().await.0.unwrap();
}

#[tokio::test]
async fn a_session_that_ends_takes_its_build_along() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let mut session = peer.session("s", &[]).await;
    let begun = peer.begin(SolveRequest {
        r#ref: "r".into(),
        session: "s".into(),
        ..SolveRequest::default()
    });
    peer.gateway().ping(tagged("r", PingRequest {})).await.unwrap();
    session.connection.half_close();
    let (solved, _) = begun.end().await;
    let status = solved.unwrap_err();
    assert_eq!(status.code(), Code::Cancelled);
    assert_eq!(status.message(), "session lost: the client has disconnected");
}

#[tokio::test]
async fn a_build_that_runs_when_the_daemon_is_to_stop_goes_on_to_its_end() {
    let rig = Rig::new();
    let (connections, incoming) = futures::channel::mpsc::unbounded();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let daemon = rig.daemon.clone();
    let serving = tokio::spawn(async move {
        daemon.serve(incoming, async { stopped.await.unwrap() }).await.unwrap();
    });
    let connect = async || {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        connections.unbounded_send(Ok(theirs)).unwrap();
        Peer::over(ours).await
    };
    let first = connect().await;
    let begun = first.begin(SolveRequest { r#ref: "r".into(), ..SolveRequest::default() });
    first.gateway().ping(tagged("r", PingRequest {})).await.unwrap();
    stop.send(()).unwrap();
    // Nobody else gets a build from now on, though everybody is heard.
    let refused = async {
        for id in 0.. {
            let request = SolveRequest {
                r#ref: format!("later-{id}"),
                frontend: "none".into(),
                ..SolveRequest::default()
            };
            let status = connect().await.control().solve(request).await.unwrap_err();
            if status.code() == Code::Unavailable {
                return status;
            }
        }
        unreachable!()
    };
    let refused = tokio::time::timeout(SOON, refused).await.unwrap();
    assert!(refused.message().contains("about to stop"), "{refused:?}");
    // Clients may come with another connection in the middle of a build.
    connect().await.give("r", Ok(result_of(""))).await.unwrap();
    begun.end().await.0.unwrap();
    tokio::time::timeout(SOON, serving).await.unwrap().unwrap();
}

#[tokio::test]
async fn many_clients_build_the_same_at_the_same_time() {
    let rig = Rig::new();
    // Without a time of their own, those that make the same step at the same time differ in it.
    let wish = Wish { attrs: &[("build-arg:SOURCE_DATE_EPOCH", "1600000000")], ..OCI };
    let mut builds = vec![];
    for number in 0..8 {
        let peer = rig.connect().await;
        builds.push(async move {
            let built = peer.buildx(&format!("r{number}"), &app(), wish).await;
            let told = vertices(&built.events);
            assert!(
                told.values().all(|v| v.completed.is_some() && v.error.is_empty()),
                "{told:#?}"
            );
            built.response.unwrap().exporter_response["containerimage.digest"].clone()
        });
    }
    let digests = futures::future::join_all(builds).await;
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
}

#[tokio::test]
async fn a_frontend_of_the_daemon_may_be_asked_for_directly() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let folders = [("context", app()), ("dockerfile", app())];
    let session = peer.session("s", &folders).await;
    let begun = peer.begin(SolveRequest {
        r#ref: "r".into(),
        session: "s".into(),
        frontend: "dockerfile.v0".into(),
        exporters: vec![exporter("tar", &[])],
        ..SolveRequest::default()
    });
    let (solved, _) = begun.end().await;
    solved.unwrap();
    assert_eq!(paths(&session.got.lock().unwrap()), ["x/", "x/a", "x/c"]);
    // No frontend of a client may speak for it.
    let request = gateway::SolveRequest::default();
    let status = peer.bridge_solve("r", request).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}
