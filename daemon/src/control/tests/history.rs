//! The history of builds as clients see it.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use prost::Message as _;
use slipway_spec::wire::content::ReadContentRequest;
use slipway_spec::wire::content::content_client::ContentClient;
use slipway_spec::wire::control::{
    BuildHistoryEvent, BuildHistoryEventType as EventType, BuildHistoryRecord, BuildHistoryRequest,
    Descriptor, SolveRequest, StatusRequest, StatusResponse, UpdateBuildHistoryRequest,
};
use slipway_spec::wire::rpc;
use slipway_spec::wire::trace::ExportTraceServiceRequest;
use slipway_spec::wire::trace::trace_service_client::TraceServiceClient;
use tonic::{Code, Request, Status, Streaming};

use super::go_sender::Folder;
use super::peer::*;
use crate::DaemonOptions;

const OCI: Wish<'_> =
    Wish { attrs: &[("vcs:source", "repo")], outputs: &[("oci", &[("tar", "true")])] };

fn app() -> Folder {
    Folder::of(&["Dockerfile=FROM scratch\nCOPY a /x/\n", "a=1"])
}

fn request() -> BuildHistoryRequest {
    BuildHistoryRequest { early_exit: true, ..BuildHistoryRequest::default() }
}

async fn events(
    peer: &Peer,
    request: BuildHistoryRequest,
) -> Result<Vec<BuildHistoryEvent>, Status> {
    let stream = peer.control().listen_build_history(request).await?;
    assert!(stream.metadata().contains_key("buildkit-current-timestamp"));
    tokio::time::timeout(SOON, stream.into_inner().try_collect()).await.unwrap()
}

async fn records(peer: &Peer) -> Vec<BuildHistoryRecord> {
    let events = events(peer, request()).await.unwrap();
    events.into_iter().map(|event| event.record.unwrap()).collect()
}

async fn update(peer: &Peer, request: UpdateBuildHistoryRequest) -> Result<(), Status> {
    peer.control().update_build_history(request).await.map(drop)
}

fn about(id: &str) -> UpdateBuildHistoryRequest {
    UpdateBuildHistoryRequest { r#ref: id.into(), ..UpdateBuildHistoryRequest::default() }
}

async fn read(peer: &Peer, blob: &Descriptor) -> Vec<u8> {
    let request =
        ReadContentRequest { digest: blob.digest.clone(), ..ReadContentRequest::default() };
    let stream = ContentClient::new(peer.channel()).read(request).await.unwrap();
    let parts: Vec<_> = stream.into_inner().try_collect().await.unwrap();
    let bytes: Vec<u8> = parts.into_iter().flat_map(|part| part.data).collect();
    assert_eq!(i64::try_from(bytes.len()), Ok(blob.size));
    bytes
}

async fn next(events: &mut Streaming<BuildHistoryEvent>) -> (EventType, BuildHistoryRecord) {
    let event = tokio::time::timeout(SOON, events.next()).await.unwrap().unwrap().unwrap();
    (event.r#type(), event.record.unwrap())
}

#[tokio::test]
async fn a_build_is_remembered_with_all_that_came_of_it() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let built = peer.buildx("r1", &app(), OCI).await;
    let response = built.response.unwrap().exporter_response;
    let record = records(&peer).await.remove(0);
    assert_eq!(record.r#ref, "r1");
    assert_eq!(record.frontend_attrs, BTreeMap::from([("vcs:source".into(), "repo".into())]));
    assert_eq!(record.exporters[0].r#type, "oci");
    assert_eq!(record.error, None);
    assert!(record.completed_at.unwrap().seconds >= record.created_at.unwrap().seconds);
    assert_eq!(
        record.exporter_response.get("containerimage.digest"),
        response.get("containerimage.digest")
    );
    assert!(record.exporter_response.contains_key("containerimage.config"));
    assert!(record.num_total_steps >= 2, "{record:?}");
    assert_eq!((record.num_cached_steps, record.num_completed_steps), (0, record.num_total_steps));
    // Where the result is from is told whether the client wanted to know or not.
    let provenance = &record.result.as_ref().unwrap().attestations[0];
    assert_eq!(provenance.media_type, "application/vnd.in-toto+json");
    let kind = &provenance.annotations["in-toto.io/predicate-type"];
    assert_eq!(kind, "https://slsa.dev/provenance/v1");
    let told: serde_json::Value = serde_json::from_slice(&read(&peer, provenance).await).unwrap();
    let parameters = &told["buildDefinition"]["externalParameters"]["request"];
    assert_eq!(parameters["locals"][0]["name"], "context");
    let vcs = &told["runDetails"]["metadata"]["buildkit_metadata"]["vcs"];
    assert_eq!(*vcs, serde_json::json!({ "source": "repo" }));

    let result = record.result.unwrap();
    assert_eq!(result.results[&0].digest, response["containerimage.digest"]);
    assert_eq!(result.result_deprecated.as_ref(), result.results.get(&0));
    let manifest: serde_json::Value =
        serde_json::from_slice(&read(&peer, &result.results[&0]).await).unwrap();
    assert_eq!(manifest["schemaVersion"], 2);

    let logs = record.logs.unwrap();
    assert_eq!(logs.media_type, "application/vnd.buildkit.status.v0");
    let bytes = read(&peer, &logs).await;
    let length = usize::try_from(u32::from_le_bytes(bytes[..4].try_into().unwrap())).unwrap();
    let message = StatusResponse::decode(&bytes[4..4 + length]).unwrap();
    assert!(message.vertexes.iter().any(|vertex| vertex.name.contains("COPY a /x/")));
}

#[tokio::test]
async fn a_build_that_failed_tells_why() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let folder = Folder::of(&["Dockerfile=FROM scratch\nCOPY notexist /x\n", "a=1"]);
    let failed = peer.buildx("r", &folder, Wish::default()).await.response.unwrap_err();
    let event =
        events(&peer, BuildHistoryRequest { r#ref: "r".into(), ..request() }).await.unwrap();
    assert_eq!(event.len(), 1);
    assert_eq!(event[0].r#type(), EventType::Complete);
    let record = event[0].record.clone().unwrap();
    let error = record.error.unwrap();
    assert_eq!((error.code, error.message.as_str()), (failed.code().into(), failed.message()));
    assert!(error.message.contains("/notexist") && error.details.is_empty(), "{error:?}");
    let whole = record.external_error.unwrap();
    assert_eq!(whole.media_type, "application/vnd.googeapis.google.rpc.status+proto");
    let status = rpc::Status::decode(&read(&peer, &whole).await[..]).unwrap();
    assert_eq!((status.code, &status.message), (error.code, &error.message));
    let kinds: Vec<&str> = status.details.iter().map(|any| any.type_url.as_str()).collect();
    for kind in ["errdefs.Vertex+json", "errdefs.Source+json", "stack.Stack+json"] {
        assert!(kinds.iter().any(|found| found.ends_with(kind)), "{kinds:?}");
    }
}

#[tokio::test]
async fn what_is_internal_is_not_remembered() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let begun =
        peer.begin(SolveRequest { r#ref: "r".into(), internal: true, ..SolveRequest::default() });
    peer.give("r", Ok(result_of(""))).await.unwrap();
    begun.end().await.0.unwrap();
    assert_eq!(records(&peer).await, []);
}

#[tokio::test]
async fn several_listeners_hear_what_happens_while_it_happens() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let listen = |request| {
        let mut control = peer.control();
        async move { control.listen_build_history(request).await.unwrap().into_inner() }
    };
    let mut all = listen(BuildHistoryRequest::default()).await;
    let mut one = listen(BuildHistoryRequest { r#ref: "b".into(), ..Default::default() }).await;
    for id in ["a", "b"] {
        let begun = peer.begin(SolveRequest { r#ref: id.into(), ..SolveRequest::default() });
        let (kind, record) = next(&mut all).await;
        assert_eq!((kind, record.r#ref.as_str()), (EventType::Started, id));
        assert_eq!(record.completed_at, None);
        // Who comes now is told that it runs.
        let active = BuildHistoryRequest { active_only: true, ..request() };
        let running = events(&peer, active).await.unwrap();
        assert_eq!((running.len(), running[0].r#type()), (1, EventType::Started));
        peer.give(id, Ok(result_of(""))).await.unwrap();
        begun.end().await.0.unwrap();
        let (kind, record) = next(&mut all).await;
        assert_eq!((kind, record.r#ref.as_str()), (EventType::Complete, id));
        update(&peer, UpdateBuildHistoryRequest { finalize: true, ..about(id) }).await.unwrap();
        let (kind, record) = next(&mut all).await;
        assert_eq!((kind, record.generation), (EventType::Complete, 1));
        assert!(record.trace.is_some());
    }
    assert_eq!(next(&mut one).await.0, EventType::Started);
    assert_eq!(next(&mut one).await.1.r#ref, "b");
    let active = BuildHistoryRequest { active_only: true, ..request() };
    assert_eq!(events(&peer, active).await.unwrap(), []);
    drop(one);
    update(&peer, UpdateBuildHistoryRequest { delete: true, ..about("a") }).await.unwrap();
    let (kind, record) = next(&mut all).await;
    assert_eq!((kind, record.r#ref.as_str()), (EventType::Deleted, "a"));
    let left: Vec<String> = records(&peer).await.into_iter().map(|record| record.r#ref).collect();
    assert_eq!(left, ["b"]);
    // The end of the daemon is the end of the listening.
    rig.daemon
        .serve(futures::stream::empty::<std::io::Result<tokio::io::DuplexStream>>(), async {})
        .await
        .unwrap();
    assert!(tokio::time::timeout(SOON, all.next()).await.unwrap().is_none());
}

async fn some_build(peer: &Peer, id: &str) {
    let begun = peer.begin(SolveRequest { r#ref: id.into(), ..SolveRequest::default() });
    peer.give(id, Ok(result_of(""))).await.unwrap();
    begun.end().await.0.unwrap();
}

#[tokio::test]
async fn records_are_pinned_found_and_limited() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    for id in ["c", "a", "b"] {
        some_build(&peer, id).await;
    }
    update(&peer, UpdateBuildHistoryRequest { pinned: true, ..about("a") }).await.unwrap();
    let found =
        events(&peer, BuildHistoryRequest { r#ref: "a".into(), ..request() }).await.unwrap();
    let record = found[0].record.clone().unwrap();
    assert!(record.pinned && record.generation == 1);
    let ids = |filter: &[&str], limit: i32| {
        let filter = filter.iter().map(|text| (*text).to_owned()).collect();
        let request = BuildHistoryRequest { filter, limit, ..request() };
        let peer = &peer;
        async move {
            let found = events(peer, request).await?;
            Ok::<_, Status>(found.into_iter().map(|e| e.record.unwrap().r#ref).collect::<Vec<_>>())
        }
    };
    assert_eq!(ids(&[], 0).await.unwrap(), ["c", "a", "b"]);
    assert_eq!(ids(&[], 2).await.unwrap(), ["b", "a"]);
    assert_eq!(ids(&["ref~=[ac]"], 1).await.unwrap(), ["a"]);
    assert_eq!(ids(&["status==completed,startedAt>=1h"], 5).await.unwrap(), ["b", "a", "c"]);
    assert_eq!(ids(&["status==error"], 0).await.unwrap(), [""; 0]);
    for bad in ["ref+a", "colour==red", "duration>soon", "ref~=(", "\u{0}"] {
        assert_eq!(ids(&[bad], 0).await.unwrap_err().code(), Code::InvalidArgument, "{bad}");
    }
    assert_eq!(ids(&[], -1).await.unwrap_err().code(), Code::InvalidArgument);
    for request in [
        about("x"),
        UpdateBuildHistoryRequest { delete: true, ..about("x") },
        UpdateBuildHistoryRequest { delete: true, ..about("../../etc") },
    ] {
        assert_eq!(update(&peer, request).await.unwrap_err().code(), Code::NotFound);
    }
    update(&peer, UpdateBuildHistoryRequest { finalize: true, ..about("x") }).await.unwrap();
}

#[tokio::test]
async fn a_record_that_somebody_listens_to_is_deleted_later() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    some_build(&peer, "a").await;
    let request_a = BuildHistoryRequest { r#ref: "a".into(), ..BuildHistoryRequest::default() };
    let listening = peer.control().listen_build_history(request_a.clone()).await.unwrap();
    let mut listening = listening.into_inner();
    next(&mut listening).await;
    update(&peer, UpdateBuildHistoryRequest { delete: true, ..about("a") }).await.unwrap();
    assert_eq!(records(&peer).await, []);
    assert_eq!(events(&peer, request_a).await.unwrap_err().code(), Code::NotFound);
    drop(listening);
    let gone = async {
        while update(&peer, about("a")).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(SOON, gone).await.unwrap();
}

#[tokio::test]
async fn records_survive_a_restart_and_builds_that_were_cut_off_have_failed() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let built = peer.buildx("done", &app(), OCI).await;
    let told = vertices(&built.events);
    let cut = peer.begin(SolveRequest { r#ref: "cut".into(), ..SolveRequest::default() });
    while records(&peer).await.len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The first daemon is still there, as a killed one would have left things.
    let again = Rig::over(rig.root.clone(), DaemonOptions::default());
    let after = again.connect().await;
    let found: BTreeMap<String, BuildHistoryRecord> =
        records(&after).await.into_iter().map(|record| (record.r#ref.clone(), record)).collect();
    assert_eq!(found["done"].error, None);
    let error = found["cut"].error.clone().unwrap();
    assert_eq!(error.message, "the daemon was stopped before the build ended");
    assert!(found["cut"].completed_at.is_some());

    let request = StatusRequest { r#ref: "done".into() };
    let again: Vec<StatusResponse> =
        after.control().status(request).await.unwrap().into_inner().try_collect().await.unwrap();
    assert_eq!(vertices(&again), told);
    let request = StatusRequest { r#ref: "cut".into() };
    let nothing: Vec<StatusResponse> =
        after.control().status(request).await.unwrap().into_inner().try_collect().await.unwrap();
    assert_eq!(nothing, []);
    cut.solve.abort();
}

#[tokio::test]
async fn a_build_whose_client_goes_away_was_canceled() {
    let rig = Rig::new();
    let (peer, other) = (rig.connect().await, rig.connect().await);
    let begun = peer.begin(SolveRequest { r#ref: "r".into(), ..SolveRequest::default() });
    while records(&other).await.is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop((begun, peer));
    let record = loop {
        let record = records(&other).await.remove(0);
        if record.completed_at.is_some() {
            break record;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let error = record.error.unwrap();
    assert_eq!((error.code, error.message.as_str()), (Code::Cancelled.into(), "context canceled"));
    let canceled = BuildHistoryRequest { filter: vec!["status==canceled".into()], ..request() };
    assert_eq!(events(&other, canceled).await.unwrap().len(), 1);
}

#[tokio::test]
async fn the_trace_of_a_build_has_its_steps_and_the_spans_of_its_client() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let mut request = Request::new(SolveRequest { r#ref: "r".into(), ..SolveRequest::default() });
    let traceparent = format!("00-{}-{}-01", "0a".repeat(16), "0b".repeat(8));
    request.metadata_mut().insert("traceparent", traceparent.parse().unwrap());
    let mut control = peer.control();
    let solve = tokio::spawn(async move { control.solve(request).await });
    let definition = definition(vec![file_op(None, vec![mkfile("/f", "x")])]);
    let solved = slipway_spec::wire::gateway::SolveRequest {
        definition: Some(definition),
        ..Default::default()
    };
    let made = peer.bridge_solve("r", solved).await.unwrap();
    // A span whose only field is its trace, in a resource without attributes.
    let span = [&[0x0a, 16][..], &[10; 16]].concat();
    let scope = [&[0x12, 18][..], &span].concat();
    let resource = [&[0x12, 20][..], &scope].concat();
    let spans = ExportTraceServiceRequest { resource_spans: vec![resource.into()] };
    TraceServiceClient::new(peer.channel()).export(spans).await.unwrap();
    peer.give("r", Ok(result_of(&single(&made).id))).await.unwrap();
    solve.await.unwrap().unwrap();
    update(&peer, UpdateBuildHistoryRequest { finalize: true, ..about("r") }).await.unwrap();
    let trace = records(&peer).await.remove(0).trace.unwrap();
    assert_eq!(trace.media_type, "application/vnd.buildkit.otlp.json.v0");
    let text = String::from_utf8(read(&peer, &trace).await).unwrap();
    let spans: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<&str> = spans.iter().map(|span| span["Name"].as_str().unwrap()).collect();
    assert_eq!(names.first(), Some(&"moby.buildkit.v1.Control/Solve"));
    assert_eq!(names.last(), Some(&""), "the client's");
    assert!(names.len() > 2, "{names:?}");
    assert_eq!(spans[0]["Parent"]["SpanID"], "0b".repeat(8));
    assert_eq!(spans[1]["Parent"]["SpanID"], spans[0]["SpanContext"]["SpanID"]);
    assert!(spans.iter().all(|span| span["SpanContext"]["TraceID"] == "0a".repeat(16)));
}
