//! Clients that break the rules.

use prost::Message as _;
use slipway_spec::Digest;
use slipway_spec::llb::pb;
use slipway_spec::wire::control::{DiskUsageRequest, InfoRequest, PruneRequest, SolveRequest};
use slipway_spec::wire::gateway::{self, EvaluateRequest, PingRequest};
use tonic::{Code, Status};

use super::peer::*;

/// Has a graph built both ways; returns what went wrong.
async fn refused(peer: &Peer, number: usize, graph: pb::Definition) -> [Status; 2] {
    let direct = SolveRequest {
        r#ref: format!("direct-{number}"),
        definition: Some(graph.clone()),
        ..SolveRequest::default()
    };
    let mut control = peer.control();
    let direct = tokio::time::timeout(SOON, control.solve(direct)).await.unwrap().unwrap_err();
    let id = format!("bridge-{number}");
    let begun = peer.begin(SolveRequest { r#ref: id.clone(), ..SolveRequest::default() });
    peer.gateway().ping(tagged(&id, PingRequest {})).await.unwrap();
    let request = gateway::SolveRequest {
        definition: Some(graph),
        evaluate: true,
        ..gateway::SolveRequest::default()
    };
    let bridge = peer.bridge_solve(&id, request).await.unwrap_err();
    // The build itself goes on, until its frontend says otherwise.
    peer.give(&id, Ok(result_of(""))).await.unwrap();
    begun.end().await.0.unwrap();
    [direct, bridge]
}

fn head(of: &[u8], index: i64) -> Vec<u8> {
    let inputs = vec![pb::Input { digest: Digest::of(of).to_string(), index }];
    pb::Op { inputs, ..pb::Op::default() }.encode_to_vec()
}

#[tokio::test]
async fn graphs_that_are_none_are_refused() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let good = definition(vec![file_op(None, vec![mkfile("/a", "x")])]);
    let of = |def: Vec<Vec<u8>>| pb::Definition { def, ..pb::Definition::default() };
    let mut truncated = good.clone();
    truncated.def[0].truncate(7);
    truncated.def[1] = head(&truncated.def[0], 0);
    let empty = pb::Op::default().encode_to_vec();
    // An operation cannot name itself, since its name is its digest; it can name what comes after it.
    let over = |digest: String| {
        let mut op = file_op(Some(0), vec![mkfile("/b", "x")]);
        op.inputs[0].digest = digest;
        op.encode_to_vec()
    };
    let forward = over(Digest::of(&good.def[0]).to_string());
    let unknown = over(Digest::of(b"nothing").to_string());
    let garbage = over("sha256:../../etc/passwd".into());
    let dangling = |input: i64, secondary: i64, output: i64| {
        let mut op = file_op(None, vec![mkfile("/a", "x")]);
        if let Some(pb::op::Op::File(file)) = &mut op.op {
            file.actions[0].input = input;
            file.actions[0].secondary_input = secondary;
            file.actions[0].output = output;
        }
        definition(vec![op])
    };
    let source = |identifier: &str| {
        let source = pb::SourceOp { identifier: identifier.into(), ..pb::SourceOp::default() };
        definition(vec![pb::Op { op: Some(pb::op::Op::Source(source)), ..pb::Op::default() }])
    };
    let mut keys = good.clone();
    keys.metadata.insert("no digest".into(), pb::OpMetadata::default());
    let graphs = vec![
        truncated,
        of(vec![good.def[0].clone()]),
        of(vec![vec![0xff; 64], good.def[1].clone()]),
        of(vec![good.def[0].clone(), vec![]]),
        of(vec![good.def[0].clone(), head(b"nothing", 0)]),
        of(vec![good.def[0].clone(), head(&good.def[0], 7)]),
        of(vec![good.def[0].clone(), head(&good.def[0], -1)]),
        of(vec![good.def[0].clone(), head(&good.def[0], i64::MAX)]),
        of(vec![empty.clone(), head(&empty, 0)]),
        of(vec![forward.clone(), good.def[0].clone(), head(&forward, 0)]),
        of(vec![unknown.clone(), head(&unknown, 0)]),
        of(vec![garbage.clone(), head(&garbage, 0)]),
        dangling(5, -1, 0),
        dangling(i64::MIN, -1, 0),
        dangling(-1, -1, i64::MAX),
        dangling(0, -1, 0),
        source(""),
        source("nonsense"),
        source("nonsense://a"),
        source("local://"),
        keys,
    ];
    for (number, graph) in graphs.into_iter().enumerate() {
        for status in refused(&peer, number, graph).await {
            assert!(!status.message().is_empty(), "{number}");
            assert!(
                !matches!(status.code(), Code::Internal | Code::Unavailable | Code::Cancelled),
                "{number}: {status:?}"
            );
        }
    }
    peer.control().info(InfoRequest {}).await.unwrap();
}

#[tokio::test]
async fn a_long_chain_does_not_exhaust_the_stack() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let ops: Vec<pb::Op> = (0..1000_usize)
        .map(|at| file_op(at.checked_sub(1), vec![mkfile("/a", &at.to_string())]))
        .collect();
    let begun = peer.begin(SolveRequest { r#ref: "r".into(), ..SolveRequest::default() });
    peer.gateway().ping(tagged("r", PingRequest {})).await.unwrap();
    let request = gateway::SolveRequest { definition: Some(definition(ops)), ..Default::default() };
    let id = single(&peer.bridge_solve("r", request).await.unwrap()).id;
    let evaluate = EvaluateRequest { r#ref: id.clone() };
    peer.gateway().evaluate(tagged("r", evaluate)).await.unwrap();
    peer.give("r", Ok(result_of(&id))).await.unwrap();
    begun.end().await.0.unwrap();
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let request = SolveRequest {
        r#ref: "r".into(),
        definition: Some(pb::Definition {
            def: vec![vec![0; 100 << 20]],
            ..pb::Definition::default()
        }),
        ..SolveRequest::default()
    };
    let status = tokio::time::timeout(SOON, peer.control().solve(request)).await.unwrap();
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    peer.control().info(InfoRequest {}).await.unwrap();
}

#[tokio::test]
async fn filters_that_are_none_are_refused() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    for filter in ["===", "id==\"", "\u{0}", "id~=("] {
        let filter = vec![filter.to_owned()];
        let request = DiskUsageRequest { filter: filter.clone(), age_limit: i64::MIN };
        assert!(peer.control().disk_usage(request).await.is_err(), "{filter:?}");
        let request = PruneRequest { filter: filter.clone(), ..PruneRequest::default() };
        assert!(peer.control().prune(request).await.is_err(), "{filter:?}");
    }
    let request = PruneRequest {
        // What buildx sends when it has no filter.
        filter: vec![String::new()],
        keep_duration: i64::MIN,
        reserved_space: i64::MIN,
        max_used_space: i64::MIN,
        min_free_space: i64::MIN,
        ..PruneRequest::default()
    };
    peer.control().prune(request).await.unwrap();
}
