//! What takes space, as clients list it and have it removed.

use prost_types::Timestamp;
use slipway_engine::store::gc::{PruneOptions, UsageItem};
use slipway_engine::store::{Store, blocking, now_nanos};
use slipway_spec::wire::control::{PruneRequest, UsageRecord};
use slipway_spec::wire::worker::WorkerRecord;
use tonic::Status;

fn failed(error: slipway_engine::store::Error) -> Status {
    Status::unknown(error.to_string())
}

fn time(nanos: i64) -> Timestamp {
    Timestamp {
        seconds: nanos.div_euclid(1_000_000_000),
        nanos: i32::try_from(nanos.rem_euclid(1_000_000_000)).unwrap_or(0),
    }
}

fn record(item: UsageItem) -> UsageRecord {
    UsageRecord {
        id: item.id,
        mutable: false,
        in_use: !item.reclaimable,
        size: i64::try_from(item.bytes).unwrap_or(i64::MAX),
        created_at: Some(time(item.used)),
        last_used_at: Some(time(item.used)),
        description: item.description,
        record_type: "regular".into(),
        ..UsageRecord::default()
    }
}

/// A condition on a record: `field==value`, `field!=value`, or a field alone for one that is a flag.
struct Condition<'a> {
    field: fn(&UsageRecord) -> String,
    value: Option<&'a str>,
    equal: bool,
}

/// Filters of which one must hold; in each, all conditions between commas must.
struct Filters<'a>(Vec<Vec<Condition<'a>>>);

impl<'a> Filters<'a> {
    /// Reads filters, so that one that is wrong is refused even if there is nothing to filter.
    fn parse(filters: &'a [String]) -> Result<Self, Status> {
        let one = |filter: &'a String| {
            let conditions = filter.split(',').filter(|condition| !condition.is_empty());
            conditions.map(Condition::parse).collect()
        };
        filters.iter().map(one).collect::<Result<_, _>>().map(Self)
    }

    fn hold(&self, record: &UsageRecord) -> bool {
        let all = |conditions: &Vec<Condition<'_>>| conditions.iter().all(|c| c.holds(record));
        self.0.is_empty() || self.0.iter().any(all)
    }
}

impl<'a> Condition<'a> {
    fn parse(condition: &'a str) -> Result<Self, Status> {
        let (field, value, equal) = if let Some((field, value)) = condition.split_once("!=") {
            (field, Some(value), false)
        } else if let Some((field, value)) = condition.split_once("==") {
            (field, Some(value), true)
        } else if let Some((field, value)) = condition.split_once("~=") {
            return Err(Status::invalid_argument(format!(
                "the filter {field}~={value}: patterns are not supported yet"
            )));
        } else {
            (condition, None, true)
        };
        let field: fn(&UsageRecord) -> String = match field {
            "id" => |record| record.id.clone(),
            "description" => |record| record.description.clone(),
            "type" => |record| record.record_type.clone(),
            "inuse" => |record| record.in_use.to_string(),
            "mutable" => |record| record.mutable.to_string(),
            "immutable" => |record| (!record.mutable).to_string(),
            "shared" => |record| record.shared.to_string(),
            "private" => |record| (!record.shared).to_string(),
            "parents" => |_| String::new(),
            _ => {
                return Err(Status::invalid_argument(format!(
                    "the filter {condition:?} has no field that is known"
                )));
            }
        };
        let value = value.map(|value| unquote(condition, value)).transpose()?;
        Ok(Self { field, value, equal })
    }

    fn holds(&self, record: &UsageRecord) -> bool {
        let found = (self.field)(record);
        match self.value {
            Some(value) => (found == value) == self.equal,
            None => found == "true",
        }
    }
}

/// Removes the quotes around a value, which are there in pairs.
fn unquote<'a>(filter: &str, value: &'a str) -> Result<&'a str, Status> {
    let Some(rest) = value.strip_prefix('"') else { return Ok(value) };
    rest.strip_suffix('"').ok_or_else(|| {
        Status::invalid_argument(format!("the filter {filter:?} has a quote that is not closed"))
    })
}

async fn all(store: &Store) -> Result<Vec<UsageRecord>, Status> {
    let store = store.clone();
    let usage = blocking::run(move || store.usage()).await.map_err(failed)?;
    Ok(usage.items.into_iter().map(record).collect())
}

/// Lists what takes space; `age` is how long ago it was last used at least, in nanoseconds.
pub(super) async fn usage(
    store: &Store,
    filters: &[String],
    age: i64,
) -> Result<Vec<UsageRecord>, Status> {
    let limit = now_nanos().saturating_sub(age);
    let old = |record: &UsageRecord| {
        age <= 0 || record.last_used_at.is_none_or(|used| used.seconds <= limit / 1_000_000_000)
    };
    let filters = Filters::parse(filters)?;
    let found = all(store).await?.into_iter();
    Ok(found.filter(|record| old(record) && filters.hold(record)).collect())
}

/// Frees space, and returns what went. What builds have used that began at `working_since`, in nanoseconds since 1970, or
/// later stays.
pub(super) async fn prune(
    store: &Store,
    request: &PruneRequest,
    working_since: Option<i64>,
) -> Result<Vec<UsageRecord>, Status> {
    // Refused if it is wrong, whatever it would select.
    Filters::parse(&request.filter)?;
    // Some clients send an empty filter where they have none.
    if request.filter.iter().any(|filter| !filter.is_empty()) {
        return Err(crate::failure::not_yet("pruning by a filter"));
    }
    if request.reserved_space > 0 || request.max_used_space > 0 || request.min_free_space > 0 {
        return Err(crate::failure::not_yet("pruning down to a size"));
    }
    let before = all(store).await?;
    let options = PruneOptions {
        all: true,
        older_than: (request.keep_duration > 0).then_some(request.keep_duration),
        working_since,
    };
    let pruned = store.clone();
    blocking::run(move || pruned.prune(&options)).await.map_err(failed)?;
    let left: std::collections::HashSet<String> =
        all(store).await?.into_iter().map(|record| record.id).collect();
    Ok(before.into_iter().filter(|record| !left.contains(&record.id)).collect())
}

/// Whether a worker is one that a client looks for.
pub(super) fn matches_worker(filters: &[String], worker: &WorkerRecord) -> Result<bool, Status> {
    let one = |filter: &String| -> Result<bool, Status> {
        let (field, value) = filter.split_once("==").ok_or_else(|| {
            Status::invalid_argument(format!("the filter {filter:?} is not field==value"))
        })?;
        let value = value.trim_matches('"');
        let label = field.strip_prefix("labels.").map(|name| name.trim_matches('"'));
        Ok(match label {
            Some(name) => worker.labels.get(name).is_some_and(|found| found == value),
            None => field == "id" && worker.id == value,
        })
    };
    if filters.is_empty() {
        return Ok(true);
    }
    filters.iter().map(one).try_fold(false, |any, found| Ok(any | found?))
}
