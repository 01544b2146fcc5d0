//! Disk space as clients list it and have it freed.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::TryStreamExt as _;
use slipway_engine::config::{DiskSpace, GcConfig, GcPolicy};
use slipway_spec::wire::control::{
    DiskUsageRequest, ListWorkersRequest, PruneRequest, SolveRequest, UsageRecord,
};
use tonic::{Code, Status};

use super::go_sender::Folder;
use super::peer::*;
use crate::DaemonOptions;

const OCI: Wish<'_> = Wish { attrs: &[], outputs: &[("oci", &[("tar", "true")])] };

fn app(text: &str) -> Folder {
    let file = format!("a={text}");
    Folder::of(&["Dockerfile=FROM scratch\nCOPY a /x/\nCOPY a /y/\n", &file])
}

async fn usage(peer: &Peer, filter: &[&str]) -> Result<Vec<UsageRecord>, Status> {
    let filter = filter.iter().map(|text| (*text).to_owned()).collect();
    let request = DiskUsageRequest { filter, age_limit: 0 };
    Ok(peer.control().disk_usage(request).await?.into_inner().record)
}

async fn prune(peer: &Peer, request: PruneRequest) -> Result<Vec<UsageRecord>, Status> {
    peer.control().prune(request).await?.into_inner().try_collect().await
}

fn ids(records: &[UsageRecord]) -> BTreeSet<&str> {
    records.iter().map(|record| record.id.as_str()).collect()
}

#[tokio::test]
async fn what_builds_left_is_listed_as_what_it_is() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    assert_eq!(usage(&peer, &[]).await.unwrap(), []);
    peer.buildx("r", &app("1"), OCI).await.response.unwrap();
    let all = usage(&peer, &[]).await.unwrap();
    let local = usage(&peer, &["type==source.local"]).await.unwrap();
    assert!(!local.is_empty());
    assert!(local.iter().all(|record| record.mutable && record.size > 0 && !record.in_use));
    let layers = usage(&peer, &["description~=COPY"]).await.unwrap();
    assert_eq!(layers.len(), 2, "{all:#?}");
    assert_eq!(layers[1].parents, [layers[0].id.clone()]);
    assert_eq!(layers[1].parent, layers[0].id);
    assert!(layers.iter().all(|layer| layer.record_type == "regular" && !layer.shared));
    assert!(all.iter().all(|record| record.created_at.is_some() && record.last_used_at.is_some()));
    for (filter, expected) in [
        (&["mutable"][..], local.len()),
        (&["immutable"], all.len() - local.len()),
        (&["inuse"], 0),
        (&["shared"], 0),
        (&["private"], all.len()),
        (&["parents"], 1),
        (&[&format!("parents=={}", layers[0].id)], 1),
        (&["type==source.local", "type==regular"], all.len()),
        (&["type==source.local,immutable"], 0),
        (&["type!=source.local"], all.len() - local.len()),
        (&["id==\"nothing\""], 0),
    ] {
        assert_eq!(usage(&peer, filter).await.unwrap().len(), expected, "{filter:?}");
    }
    let old = DiskUsageRequest { filter: vec![], age_limit: 3_600_000_000_000 };
    assert_eq!(peer.control().disk_usage(old).await.unwrap().into_inner().record, []);
}

#[tokio::test]
async fn pruning_takes_what_a_filter_selects_and_no_more() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    peer.buildx("r", &app("1"), OCI).await.response.unwrap();
    let before = usage(&peer, &[]).await.unwrap();
    let old = PruneRequest { keep_duration: 3_600_000_000_000, ..PruneRequest::default() };
    assert_eq!(prune(&peer, old).await.unwrap(), []);
    let local = PruneRequest { filter: vec!["type==source.local".into()], ..Default::default() };
    let gone = prune(&peer, local).await.unwrap();
    assert!(!gone.is_empty() && gone.iter().all(|record| record.record_type == "source.local"));
    let left = usage(&peer, &[]).await.unwrap();
    assert_eq!(ids(&before), ids(&left).union(&ids(&gone)).copied().collect());
    for filter in ["tipe==regular", "type=regular", "id~=(", "description==\"x"] {
        let request = PruneRequest { filter: vec![filter.into()], ..Default::default() };
        let status = prune(&peer, request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{filter}: {status:?}");
    }
    assert_eq!(ids(&usage(&peer, &[]).await.unwrap()), ids(&left));
    let gone = prune(&peer, PruneRequest { all: true, ..Default::default() }).await.unwrap();
    assert_eq!(ids(&gone), ids(&left));
    assert_eq!(usage(&peer, &[]).await.unwrap(), []);
    // And what is gone is made again.
    let again = peer.buildx("again", &app("1"), OCI).await;
    assert!(vertices(&again.events).values().all(|vertex| !vertex.cached));
    again.response.unwrap();
}

#[tokio::test]
async fn pruning_to_a_size_takes_the_oldest_first() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    for (id, text) in [("r1", "1"), ("r2", "2")] {
        peer.buildx(id, &app(text), OCI).await.response.unwrap();
    }
    let before = usage(&peer, &[]).await.unwrap();
    let total: i64 = before.iter().map(|record| record.size).sum();
    for request in [
        PruneRequest { max_used_space: total, ..Default::default() },
        PruneRequest { reserved_space: total, ..Default::default() },
        PruneRequest { min_free_space: 1, ..Default::default() },
    ] {
        assert_eq!(prune(&peer, request).await.unwrap(), []);
    }
    let request = PruneRequest { max_used_space: total - 1, ..Default::default() };
    let gone = prune(&peer, request).await.unwrap();
    assert_eq!(gone.len(), 1);
    let used = |record: &UsageRecord| {
        let used = record.last_used_at.unwrap();
        (used.seconds, used.nanos)
    };
    let candidates = before
        .iter()
        .filter(|record| before.iter().all(|other| !other.parents.contains(&record.id)));
    assert_eq!(candidates.map(used).min(), Some(used(&gone[0])));
}

#[tokio::test]
async fn what_a_build_uses_stays() {
    let rig = Rig::new();
    let peer = rig.connect().await;
    let begun = peer.begin(SolveRequest { r#ref: "r".into(), ..SolveRequest::default() });
    let graph = definition(vec![file_op(None, vec![mkfile("/f", "x")])]);
    let request = slipway_spec::wire::gateway::SolveRequest {
        definition: Some(graph),
        evaluate: true,
        ..Default::default()
    };
    let made = peer.bridge_solve("r", request).await.unwrap();
    assert_eq!(prune(&peer, PruneRequest { all: true, ..Default::default() }).await.unwrap(), []);
    let used = usage(&peer, &["type!=source.local"]).await.unwrap();
    assert!(used.iter().all(|record| record.in_use), "{used:?}");
    let id = single(&made).id;
    let read = slipway_spec::wire::gateway::ReadFileRequest {
        r#ref: id.clone(),
        file_path: "/f".into(),
        ..Default::default()
    };
    let read = peer.gateway().read_file(tagged("r", read)).await.unwrap().into_inner();
    assert_eq!(&read.data[..], b"x");
    peer.give("r", Ok(result_of(&id))).await.unwrap();
    begun.end().await.0.unwrap();
}

#[tokio::test]
async fn workers_tell_their_rules_and_collect_by_them() {
    let policy = GcPolicy {
        filters: vec!["type==source.local".into()],
        max_used_space: Some(DiskSpace::Bytes(1)),
        keep_duration: Some(Duration::ZERO),
        ..GcPolicy::default()
    };
    let gc = GcConfig { policies: vec![policy], ..GcConfig::default() };
    let rig = Rig::over(
        std::sync::Arc::new(tempfile::tempdir().unwrap()),
        DaemonOptions { gc, ..DaemonOptions::default() },
    );
    let peer = rig.connect().await;
    let workers = |filter: &str| {
        let request = ListWorkersRequest { filter: vec![filter.to_owned()] };
        let mut control = peer.control();
        async move { control.list_workers(request).await.map(|r| r.into_inner().record) }
    };
    let worker = workers("labels.\"org.mobyproject.buildkit.worker.executor\"==oci").await.unwrap();
    assert_eq!(worker[0].gc_policy.len(), 1);
    assert_eq!(worker[0].gc_policy[0].filters, ["type==source.local"]);
    assert_eq!(worker[0].gc_policy[0].max_used_space, 1);
    assert_eq!(workers(&format!("id!={}", worker[0].id)).await.unwrap(), []);
    assert!(workers("name==x").await.is_err());

    peer.buildx("r", &app("1"), OCI).await.response.unwrap();
    let before = usage(&peer, &[]).await.unwrap();
    let collector = rig.daemon.collector.clone();
    let gone = collector.collect_by_rules().await.unwrap();
    assert!(!gone.is_empty());
    let left = usage(&peer, &[]).await.unwrap();
    assert_eq!(left.len() + gone.len(), before.len());
    assert!(left.iter().all(|record| record.record_type == "regular"));
    assert!(collector.collect_by_rules().await.unwrap().is_empty());
}

#[tokio::test]
async fn usual_rules_are_told_and_none_when_there_are_to_be_none() {
    for (enabled, expected) in [(None, 4), (Some(true), 4), (Some(false), 0)] {
        let gc = GcConfig { enabled, ..GcConfig::default() };
        let rig = Rig::over(
            std::sync::Arc::new(tempfile::tempdir().unwrap()),
            DaemonOptions { gc, ..DaemonOptions::default() },
        );
        let peer = rig.connect().await;
        let workers = peer.control().list_workers(ListWorkersRequest::default()).await.unwrap();
        assert_eq!(workers.into_inner().record[0].gc_policy.len(), expected);
    }
}
