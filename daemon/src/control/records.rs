//! What takes space, as clients list it and have it removed.

use std::time::UNIX_EPOCH;

use slipway_engine::store::filter::{Filter, FilterError};
use slipway_engine::store::gc::record::FIELDS;
use slipway_engine::store::gc::{CacheRecord, RecordKind, Rule};
use slipway_engine::store::now_nanos;
use slipway_spec::wire::control::{PruneRequest, UsageRecord};
use slipway_spec::wire::worker::WorkerRecord;
use tonic::Status;

use crate::collector::Collector;
use crate::session::file_sync::CachedFolder;
use crate::timestamp;

/// The prefix of ids of kept folders of clients.
pub(crate) const LOCAL: &str = "local/";

fn failed(error: slipway_engine::store::Error) -> Status {
    Status::unknown(error.to_string())
}

fn refused(error: FilterError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// Returns what is kept of a client's folder as a record.
pub(crate) fn of_folder(folder: &CachedFolder) -> CacheRecord {
    let since = folder.used.duration_since(UNIX_EPOCH).unwrap_or_default();
    let used = i64::try_from(since.as_nanos()).unwrap_or(i64::MAX);
    CacheRecord {
        id: format!("{LOCAL}{}", folder.id),
        kind: RecordKind::LocalSource,
        bytes: folder.bytes,
        parents: vec![],
        // Each transfer makes it anew.
        created: used,
        used,
        description: format!("{} files of a client", folder.files),
        mutable: true,
        in_use: false,
        shared: false,
    }
}

fn to_wire(record: CacheRecord) -> UsageRecord {
    UsageRecord {
        id: record.id,
        mutable: record.mutable,
        in_use: record.in_use,
        size: i64::try_from(record.bytes).unwrap_or(i64::MAX),
        // For clients that know of one only.
        parent: record.parents.first().cloned().unwrap_or_default(),
        parents: record.parents,
        created_at: Some(timestamp(record.created)),
        last_used_at: Some(timestamp(record.used)),
        description: record.description,
        record_type: record.kind.as_str().into(),
        shared: record.shared,
        ..UsageRecord::default()
    }
}

/// Lists what takes space; `age` is how long ago it was last used at least, in nanoseconds.
pub(super) async fn usage(
    collector: &Collector,
    filters: &[String],
    age: i64,
) -> Result<Vec<UsageRecord>, Status> {
    let filter = Filter::parse(filters, FIELDS).map_err(refused)?;
    let records = collector.records().await.map_err(failed)?;
    let limit = now_nanos().saturating_sub(age);
    let wanted = |record: &CacheRecord| {
        (age <= 0 || record.used <= limit) && filter.holds(|path| record.field(path))
    };
    Ok(records.into_iter().filter(wanted).map(to_wire).collect())
}

/// Frees space, and returns what went. What builds that run have used stays.
pub(super) async fn prune(
    collector: &Collector,
    request: &PruneRequest,
) -> Result<Vec<UsageRecord>, Status> {
    let bytes = |limit: i64| u64::try_from(limit).unwrap_or(0);
    let rule = Rule {
        all: request.all,
        filter: Filter::parse(&request.filter, FIELDS).map_err(refused)?,
        keep: request.keep_duration.max(0),
        reserved: bytes(request.reserved_space),
        max_used: bytes(request.max_used_space),
        min_free: bytes(request.min_free_space),
    };
    let gone = collector.collect(vec![rule], true).await.map_err(failed)?;
    Ok(gone.into_iter().map(to_wire).collect())
}

/// Whether a worker is one that a client looks for.
pub(super) fn matches_worker(filters: &[String], worker: &WorkerRecord) -> Result<bool, Status> {
    let filter = Filter::parse(filters, &["id", "labels."]).map_err(refused)?;
    Ok(filter.holds(|path| match path {
        [id] if id == "id" => Some(worker.id.clone()),
        [labels, name @ ..] if labels == "labels" => worker.labels.get(&name.join(".")).cloned(),
        _ => None,
    }))
}
