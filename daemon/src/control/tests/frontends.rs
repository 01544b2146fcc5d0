//! What a frontend in a client may ask of its build.

use serde_json::json;
use slipway_spec::llb::pb;
use slipway_spec::wire::control::SolveRequest;
use slipway_spec::wire::gateway::{
    self, EvaluateRequest, FileRange, InputsRequest, PingRequest, ReadDirRequest, ReadFileRequest,
    RefMap, ResolveSourceMetaRequest, StatFileRequest, WarnRequest, result,
};
use tonic::{Code, Response, Status};

use super::peer::*;

/// A build whose frontend is the test.
async fn open(rig: &Rig, inputs: &[(&str, pb::Definition)]) -> (Peer, Begun) {
    let peer = rig.connect().await;
    let frontend_inputs =
        inputs.iter().map(|(name, graph)| ((*name).to_owned(), graph.clone())).collect();
    let request = SolveRequest { r#ref: "r".into(), frontend_inputs, ..SolveRequest::default() };
    let begun = peer.begin(request);
    peer.gateway().ping(tagged("r", PingRequest {})).await.unwrap();
    (peer, begun)
}

async fn load(peer: &Peer, ops: Vec<pb::Op>) -> String {
    let request = gateway::SolveRequest {
        definition: Some(definition(ops)),
        ..gateway::SolveRequest::default()
    };
    single(&peer.bridge_solve("r", request).await.unwrap()).id
}

async fn read(
    peer: &Peer,
    id: &str,
    path: &str,
    range: Option<(i64, i64)>,
) -> Result<String, Status> {
    let range = range.map(|(offset, length)| FileRange { offset, length });
    let request =
        ReadFileRequest { r#ref: id.into(), file_path: path.into(), range, mount_index: 0 };
    let answer = peer.gateway().read_file(tagged("r", request)).await?;
    Ok(String::from_utf8(answer.into_inner().data.to_vec()).unwrap())
}

async fn list(peer: &Peer, id: &str, path: &str, pattern: &str) -> Result<Vec<String>, Status> {
    let request = ReadDirRequest {
        r#ref: id.into(),
        dir_path: path.into(),
        include_pattern: pattern.into(),
        mount_index: 0,
    };
    let entries = peer.gateway().read_dir(tagged("r", request)).await?.into_inner().entries;
    Ok(entries.iter().map(|e| String::from_utf8_lossy(&e.path).into_owned()).collect())
}

async fn stat(peer: &Peer, id: &str, path: &str) -> Result<(String, u32, i64), Status> {
    let request = StatFileRequest { r#ref: id.into(), path: path.into(), mount_index: 0 };
    let stat = peer.gateway().stat_file(tagged("r", request)).await?.into_inner().stat.unwrap();
    Ok((String::from_utf8_lossy(&stat.path).into_owned(), stat.mode, stat.size))
}

#[tokio::test]
async fn files_of_a_result_are_read() {
    let rig = Rig::new();
    let (peer, begun) = open(&rig, &[]).await;
    let actions = vec![mkdir("/d/e"), mkfile("/d/f.txt", "0123456789"), symlink("f.txt", "/d/l")];
    let id = load(&peer, vec![file_op(None, actions)]).await;
    peer.gateway().evaluate(tagged("r", EvaluateRequest { r#ref: id.clone() })).await.unwrap();

    for (range, expected) in [
        (None, "0123456789"),
        (Some((0, 0)), "0123456789"),
        (Some((2, 3)), "234"),
        (Some((8, 100)), "89"),
        (Some((3, 0)), "3456789"),
        (Some((10, 1)), ""),
        (Some((i64::MAX, i64::MAX)), ""),
    ] {
        assert_eq!(read(&peer, &id, "/d/l", range).await.unwrap(), expected, "{range:?}");
    }
    for path in ["/d", "/none", "/d/f.txt/x", ""] {
        assert!(read(&peer, &id, path, None).await.is_err(), "{path}");
    }
    assert_eq!(list(&peer, &id, "/d", "").await.unwrap(), ["e", "f.txt", "l"]);
    assert_eq!(list(&peer, &id, "d", "*.txt").await.unwrap(), ["f.txt"]);
    assert_eq!(list(&peer, &id, "/", "").await.unwrap(), ["d"]);
    assert_eq!(list(&peer, &id, "/x", "").await.unwrap_err().code(), Code::NotFound);

    assert_eq!(stat(&peer, &id, "/d/f.txt").await.unwrap(), ("f.txt".into(), 0o644, 10));
    assert_eq!(stat(&peer, &id, "/d/l").await.unwrap().1, 1 << 27 | 0o777);
    assert_eq!(stat(&peer, &id, ".").await.unwrap().1, 1 << 31 | 0o755);
    assert_eq!(stat(&peer, &id, "d/").await.unwrap().0, "d");
    assert_eq!(stat(&peer, &id, "/x").await.unwrap_err().code(), Code::NotFound);

    // The empty file system has nothing in it.
    assert_eq!(read(&peer, "", "/a", None).await.unwrap_err().code(), Code::NotFound);
    assert!(list(&peer, "", "/", "").await.unwrap().is_empty());
    peer.give("r", Ok(result_of(&id))).await.unwrap();
    begun.end().await.0.unwrap();
}

#[tokio::test]
async fn no_path_leaves_the_result() {
    let rig = Rig::new();
    let (peer, _begun) = open(&rig, &[]).await;
    let outside = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(outside.path(), "secret").unwrap();
    let outside = outside.path().to_str().unwrap();
    let up = "../".repeat(20);
    let actions = vec![
        mkdir("/d"),
        mkfile("/etc-file", "inside"),
        symlink(&up, "/d/up"),
        symlink(outside, "/d/abs"),
        symlink("loop", "/d/loop"),
    ];
    let id = load(&peer, vec![file_op(None, actions)]).await;
    for path in [
        format!("{up}{outside}"),
        outside.to_owned(),
        format!("/d/up{outside}"),
        "/d/abs".to_owned(),
        "/d/loop".to_owned(),
        "a\0b".to_owned(),
    ] {
        assert!(read(&peer, &id, &path, None).await.is_err(), "{path}");
        assert!(list(&peer, &id, &path, "").await.is_err(), "{path}");
    }
    assert_eq!(read(&peer, &id, "/d/up/etc-file", None).await.unwrap(), "inside");
    assert_eq!(read(&peer, &id, "../../etc-file", None).await.unwrap(), "inside");
    assert_eq!(list(&peer, &id, "/d/../..", "").await.unwrap(), ["d", "etc-file"]);
    assert_eq!(stat(&peer, &id, "../../etc-file").await.unwrap().2, 6);
    assert!(stat(&peer, &id, &format!("{up}{outside}")).await.is_err());
}

#[tokio::test]
async fn sources_inputs_and_warnings() {
    let rig = Rig::new();
    let graph = definition(vec![file_op(None, vec![mkfile("/a", "x")])]);
    let (peer, begun) = open(&rig, &[("base", graph.clone())]).await;
    let inputs = peer.gateway().inputs(tagged("r", InputsRequest {})).await.unwrap().into_inner();
    assert_eq!(inputs.definitions["base"], graph);

    let source = pb::SourceOp { identifier: "local://context".into(), ..pb::SourceOp::default() };
    let request = ResolveSourceMetaRequest { source: Some(source.clone()), ..Default::default() };
    let answer = peer.gateway().resolve_source_meta(tagged("r", request)).await.unwrap();
    assert_eq!(answer.into_inner().source, Some(source));
    let request = tagged("r", ResolveSourceMetaRequest::default());
    let status = peer.gateway().resolve_source_meta(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);

    let id = load(&peer, vec![file_op(None, vec![mkfile("/a", "x")])]).await;
    let vertex = slipway_spec::Digest::of(&graph.def[0]).to_string();
    let request = WarnRequest {
        digest: vertex.clone(),
        level: 0,
        short: "careful".into(),
        ..WarnRequest::default()
    };
    peer.gateway().warn(tagged("r", request)).await.unwrap();
    peer.give("r", Ok(result_of(&id))).await.unwrap();
    let (solved, events) = begun.end().await;
    solved.unwrap();
    let warnings: Vec<_> = events.iter().flat_map(|event| &event.warnings).collect();
    assert_eq!(warnings.len(), 1);
    assert_eq!((warnings[0].vertex.as_str(), warnings[0].level), (vertex.as_str(), 1));
    assert!(vertices(&events).values().any(|known| known.digest == vertex));
}

#[tokio::test]
async fn each_frontend_has_its_own_inputs() {
    let rig = Rig::new();
    let (peer, begun) = open(&rig, &[]).await;
    let dockerfile = |text: &str| {
        let graph = definition(vec![file_op(None, vec![mkfile("/Dockerfile", text)])]);
        [("dockerfile".to_owned(), graph)]
    };
    let request = |inputs: [(String, pb::Definition); 1]| gateway::SolveRequest {
        frontend: "dockerfile.v0".into(),
        frontend_inputs: inputs.into(),
        ..gateway::SolveRequest::default()
    };
    for text in ["one", "two"] {
        let file = format!("FROM scratch\nCOPY <<END /f\n{text}\nEND\n");
        let solved = peer.bridge_solve("r", request(dockerfile(&file))).await.unwrap();
        let id = single(&solved).id;
        assert_eq!(read(&peer, &id, "/f", None).await.unwrap(), format!("{text}\n"));
    }
    let nothing = [("dockerfile".to_owned(), pb::Definition::default())];
    let status = peer.bridge_solve("r", request(nothing)).await.unwrap_err();
    assert_eq!(status.message(), "invalid nil input definition to definition op");
    peer.give("r", Ok(result_of(""))).await.unwrap();
    begun.end().await.0.unwrap();
}

#[tokio::test]
async fn a_call_needs_a_build() {
    let rig = Rig::new();
    let (peer, _begun) = open(&rig, &[]).await;
    let status = peer.gateway().ping(PingRequest {}).await.unwrap_err();
    assert_eq!(status.message(), "no buildid found in context");
    let mut twice = tagged("r", PingRequest {});
    twice.metadata_mut().append("buildkit-controlapi-buildid", "q".parse().unwrap());
    assert!(peer.gateway().ping(twice).await.is_err());
    let status = peer.gateway().ping(tagged("nobody", PingRequest {})).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "no such job nobody"));
}

#[tokio::test]
async fn a_result_is_set_once() {
    let rig = Rig::new();
    let (peer, begun) = open(&rig, &[]).await;
    let (one, two) =
        tokio::join!(peer.give("r", Ok(result_of(""))), peer.give("r", Ok(result_of(""))));
    let answers = [one, two];
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1);
    let status = answers.into_iter().find_map(Result::err).unwrap();
    // The build may have ended before the second call came.
    assert!(["gateway result is already set", "no such job r"].contains(&status.message()));
    begun.end().await.0.unwrap();
}

#[tokio::test]
async fn a_failure_of_the_frontend_is_passed_on_as_it_is() {
    let rig = Rig::new();
    let (peer, begun) = open(&rig, &[]).await;
    let detail = prost_types::Any {
        type_url: "github.com/moby/buildkit/errdefs.Frontend+json".into(),
        value: json!({ "name": "mine" }).to_string().into_bytes(),
    };
    let encoded = slipway_spec::wire::rpc::Status {
        code: Code::Aborted.into(),
        message: "no luck".into(),
        details: vec![detail.clone()],
    };
    let encoded = prost::Message::encode_to_vec(&encoded).into();
    peer.give("r", Err(Status::with_details(Code::Aborted, "no luck", encoded))).await.unwrap();
    let status = begun.end().await.0.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Aborted, "no luck"));
    assert_eq!(details(&status), [detail]);
}

#[tokio::test]
async fn a_result_that_makes_no_sense_is_refused() {
    let platforms = |ids: &[&str]| {
        let platform = json!({ "os": "linux", "architecture": "amd64" });
        let named: Vec<_> =
            ids.iter().map(|id| json!({ "ID": id, "Platform": platform })).collect();
        json!({ "Platforms": named }).to_string()
    };
    let refs = |ids: &[&str], platforms: Option<String>| {
        let refs = ids.iter().map(|id| ((*id).to_owned(), gateway::Ref::default())).collect();
        let metadata =
            platforms.map(|text| ("refs.platforms".to_owned(), text.into())).into_iter().collect();
        let result = Some(result::Result::Refs(RefMap { refs }));
        gateway::Result { result, metadata, ..gateway::Result::default() }
    };
    let mut config = result_of("");
    config.metadata.insert("containerimage.config".into(), "{".into());
    for (result, message) in [
        (result_of("nothing"), "no such ref: nothing"),
        (refs(&["a", "b"], None), "needs refs.platforms to name as many, not 0"),
        (refs(&["a", "b"], Some(platforms(&["a"]))), "needs refs.platforms to name as many"),
        (refs(&["a"], Some(platforms(&["b"]))), "the result has nothing for platform b"),
        (refs(&["a"], Some("{".into())), "refs.platforms of the result is invalid"),
        (config, "the image config in containerimage.config is invalid"),
        (refs(&["a", "b"], Some(platforms(&["a", "a"]))), "to name as many, not 1"),
    ] {
        let rig = Rig::new();
        let (peer, begun) = open(&rig, &[]).await;
        let refused = peer.give("r", Ok(result)).await.expect_err(message);
        assert!(refused.message().contains(message), "{message}: {}", refused.message());
        let status = begun.end().await.0.unwrap_err();
        assert!(status.message().contains(message), "{message}: {}", status.message());
    }
}

#[tokio::test]
async fn old_frontends_get_ids_alone() {
    let rig = Rig::new();
    let (peer, _begun) = open(&rig, &[]).await;
    let graph = definition(vec![file_op(None, vec![mkfile("/a", "x")])]);
    let request = gateway::SolveRequest {
        definition: Some(graph.clone()),
        ..gateway::SolveRequest::default()
    };
    let answer =
        peer.gateway().solve(tagged("r", request)).await.map(Response::into_inner).unwrap();
    let id = answer.r#ref;
    assert!(!id.is_empty());
    assert_eq!(answer.result.unwrap().result, Some(result::Result::RefDeprecated(id.clone())));
    assert_eq!(read(&peer, &id, "a", None).await.unwrap(), "x");

    let both = gateway::SolveRequest {
        definition: Some(graph),
        frontend: "dockerfile.v0".into(),
        ..gateway::SolveRequest::default()
    };
    assert!(peer.bridge_solve("r", both).await.is_err());
    let neither = peer.bridge_solve("r", gateway::SolveRequest::default()).await.unwrap();
    assert_eq!(neither, gateway::Result::default());
}
