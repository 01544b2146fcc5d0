//! What a daemon keeps on its disk.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::TryStreamExt as _;
use prost_types::Timestamp;
use slipway_spec::wire::control::{DiskUsageRequest, PruneRequest, UsageRecord};

use crate::connection::Connection;
use crate::error::ClientError;

/// Something that a daemon keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRecord {
    /// What it is called.
    pub id: String,
    /// What kind of thing it is: `regular`, `source.local`, `exec.cachemount` and so on.
    pub kind: String,
    /// How large it is.
    pub size_bytes: u64,
    /// Whether something uses it now.
    pub in_use: bool,
    /// Whether it can be written to.
    pub mutable: bool,
    /// Whether other records share it.
    pub shared: bool,
    /// What it is, for people.
    pub description: String,
    /// When it was made.
    pub created: Option<SystemTime>,
    /// When it was used last.
    pub last_used: Option<SystemTime>,
    /// How often it was used.
    pub usage_count: u64,
}

fn time(stamp: Option<Timestamp>) -> Option<SystemTime> {
    let stamp = stamp?;
    let since = Duration::new(u64::try_from(stamp.seconds).ok()?, u32::try_from(stamp.nanos).ok()?);
    UNIX_EPOCH.checked_add(since)
}

fn record(record: UsageRecord) -> DiskRecord {
    DiskRecord {
        id: record.id,
        kind: record.record_type,
        size_bytes: u64::try_from(record.size).unwrap_or(0),
        in_use: record.in_use,
        mutable: record.mutable,
        shared: record.shared,
        description: record.description,
        created: time(record.created_at),
        last_used: time(record.last_used_at),
        usage_count: u64::try_from(record.usage_count).unwrap_or(0),
    }
}

/// Lists what a daemon keeps: what one of the filters selects, or everything without one.
///
/// # Errors
/// When it does not say.
pub async fn usage(
    connection: &Connection,
    filter: Vec<String>,
) -> Result<Vec<DiskRecord>, ClientError> {
    let request = DiskUsageRequest { filter, ..DiskUsageRequest::default() };
    let answer = connection.control().disk_usage(request).await;
    let answer = answer
        .map_err(|status| ClientError::call("cannot list what the builder keeps", &status))?;
    Ok(answer.into_inner().record.into_iter().map(record).collect())
}

/// What a daemon is to remove. Amounts are bytes, and 0 is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PruneWish {
    /// Also what it would rather keep.
    pub all: bool,
    /// Only what one of these selects.
    pub filter: Vec<String>,
    /// Only what was not used for this long.
    pub keep: Duration,
    /// What stays at least.
    pub reserved: u64,
    /// What may stay at most.
    pub max_used: u64,
    /// What is to be free on its disk afterwards.
    pub min_free: u64,
}

/// Has a daemon remove what it does not need. Returns what was removed.
///
/// # Errors
/// When it fails.
pub async fn prune(
    connection: &Connection,
    wish: PruneWish,
) -> Result<Vec<DiskRecord>, ClientError> {
    let failed = |status: tonic::Status| ClientError::call("cannot prune the builder", &status);
    let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    let request = PruneRequest {
        all: wish.all,
        filter: wish.filter,
        keep_duration: i64::try_from(wish.keep.as_nanos()).unwrap_or(i64::MAX),
        reserved_space: bytes(wish.reserved),
        max_used_space: bytes(wish.max_used),
        min_free_space: bytes(wish.min_free),
    };
    let answer = connection.control().prune(request).await.map_err(failed)?;
    answer.into_inner().map_ok(record).try_collect().await.map_err(failed)
}
