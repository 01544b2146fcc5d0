//! Which records a client wants to see: `status==error,startedAt>24h`.
//!
//! A filter is a list of conditions between commas, all of which must hold; of several filters one is enough. `startedAt`,
//! `completedAt` and `duration` are compared with `>=`, `<=`, `>` and `<`; times are points in time or how long ago they
//! were. All else is as in [`Filter`].

use std::collections::BTreeMap;
use std::time::Duration;

use slipway_engine::config::parse_duration;
use slipway_engine::store::filter::Filter;
use slipway_spec::timestamp;
use slipway_spec::wire::control::BuildHistoryRecord;
use tonic::Status;

use super::book::nanos;

/// The fields of records that filters may name, beside those of time.
const FIELDS: &[&str] = &["ref", "status", "repository"];
const SECOND: i64 = 1_000_000_000;

/// Filters of which one must hold.
#[derive(Debug, Default)]
pub(super) struct RecordFilter(Vec<All>);

#[derive(Debug)]
struct All {
    times: Vec<Comparison>,
    rest: Filter,
}

#[derive(Clone, Copy, Debug)]
enum Quantity {
    Started,
    Completed,
    Duration,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    AtLeast,
    AtMost,
    More,
    Less,
}

#[derive(Clone, Copy, Debug)]
struct Comparison {
    quantity: Quantity,
    order: Order,
    /// Seconds since 1970, or nanoseconds of a duration.
    value: i64,
}

impl RecordFilter {
    /// Reads filters; `now` is in nanoseconds since 1970.
    pub(super) fn parse(filters: &[String], now: i64) -> Result<Self, Status> {
        let refuse = |message: String| Status::invalid_argument(message);
        let mut found = vec![];
        for filter in filters {
            let (mut times, mut rest) = (vec![], vec![]);
            for field in fields(filter) {
                match Comparison::parse(&field, now).map_err(refuse)? {
                    Some(comparison) => times.push(comparison),
                    None => rest.push(field),
                }
            }
            let rest = Filter::parse(&[rest.join(",")], FIELDS)
                .map_err(|error| refuse(format!("parse error: {error}")))?;
            found.push(All { times, rest });
        }
        Ok(Self(found))
    }

    pub(super) fn holds(&self, record: &BuildHistoryRecord) -> bool {
        let holds = |all: &All| {
            all.times.iter().all(|comparison| comparison.holds(record))
                && all.rest.holds(|path| match path {
                    [name] => field(record, name),
                    _ => None,
                })
        };
        self.0.is_empty() || self.0.iter().any(holds)
    }
}

/// Splits at commas that are not between double quotes. A field that is in quotes as a whole loses them, as in a line of
/// CSV.
fn fields(filter: &str) -> Vec<String> {
    let (mut fields, mut field, mut quoted) = (vec![], String::new(), false);
    let mut escaped = false;
    for c in filter.chars() {
        match c {
            ',' if !quoted => fields.push(std::mem::take(&mut field)),
            _ => {
                if c == '"' && !escaped {
                    quoted = !quoted;
                }
                field.push(c);
            }
        }
        escaped = c == '\\' && !escaped;
    }
    fields.push(field);
    let whole = |field: String| {
        let inner = field.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
        inner.map(|inner| inner.replace("\"\"", "\"")).unwrap_or(field)
    };
    fields.into_iter().map(whole).collect()
}

impl Comparison {
    fn parse(text: &str, now: i64) -> Result<Option<Self>, String> {
        let orders =
            [(">=", Order::AtLeast), ("<=", Order::AtMost), (">", Order::More), ("<", Order::Less)];
        let split = orders.iter().find_map(|(sign, order)| {
            text.split_once(sign).map(|(name, value)| (name.trim(), *order, value.trim()))
        });
        let Some((name, order, value)) = split else { return Ok(None) };
        let quantity = match name {
            "startedAt" => Quantity::Started,
            "completedAt" => Quantity::Completed,
            "duration" => Quantity::Duration,
            _ => return Ok(None),
        };
        let span = duration(value);
        let value = match quantity {
            Quantity::Duration => {
                span.ok_or_else(|| format!("invalid duration {value}; use something like \"5m\""))?
            }
            Quantity::Started | Quantity::Completed => match span {
                Some(ago) => now.saturating_sub(ago).div_euclid(SECOND),
                None => timestamp::parse(value)
                    .ok_or_else(|| {
                        format!("invalid time {value}; use something like \"24h\" or \"2026-08-20T08:00:00Z\"")
                    })?
                    .div_euclid(SECOND),
            },
        };
        Ok(Some(Self { quantity, order, value }))
    }

    fn holds(&self, record: &BuildHistoryRecord) -> bool {
        let started = nanos(record.created_at.as_ref()).unwrap_or(0);
        let completed = nanos(record.completed_at.as_ref());
        let found = match self.quantity {
            Quantity::Started => started.div_euclid(SECOND),
            // What runs has not completed and took no time yet.
            Quantity::Completed => completed.map_or(0, |completed| completed.div_euclid(SECOND)),
            Quantity::Duration => {
                completed.map_or(0, |completed| completed.saturating_sub(started))
            }
        };
        match self.order {
            Order::AtLeast => found >= self.value,
            Order::AtMost => found <= self.value,
            Order::More => found > self.value,
            Order::Less => found < self.value,
        }
    }
}

/// Reads a duration in Go's notation, in nanoseconds.
fn duration(text: &str) -> Option<i64> {
    let (sign, text) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text),
    };
    // A number without a unit is none, but for zero.
    if text.bytes().all(|byte| byte.is_ascii_digit()) && text != "0" {
        return None;
    }
    let span: Duration = parse_duration(text)?;
    Some(sign * i64::try_from(span.as_nanos()).ok()?)
}

fn field(record: &BuildHistoryRecord, name: &str) -> Option<String> {
    match name {
        "ref" => Some(record.r#ref.clone()).filter(|id| !id.is_empty()),
        "status" => Some(status(record).to_owned()),
        "repository" => repository(&record.frontend_attrs),
        _ => None,
    }
}

fn status(record: &BuildHistoryRecord) -> &'static str {
    match (&record.completed_at, &record.error) {
        (None, _) => "running",
        (Some(_), None) => "completed",
        (Some(_), Some(error)) if error.message.contains("context canceled") => "canceled",
        (Some(_), Some(_)) => "error",
    }
}

/// Returns where a build's source is: as its client says, or as a remote context does.
fn repository(attrs: &BTreeMap<String, String>) -> Option<String> {
    if let Some(source) = attrs.get("vcs:source") {
        return Some(source.clone());
    }
    let context = attrs.get("context")?;
    let remote = context.split(['#', '?']).next().unwrap_or_default();
    let known = ["https://", "http://", "ssh://", "git://", "git@"];
    known.iter().any(|prefix| remote.starts_with(prefix)).then(|| remote.to_owned())
}

#[cfg(test)]
mod tests {
    use prost_types::Timestamp;
    use slipway_spec::wire::rpc;

    use super::*;

    const HOUR: i64 = 3600;
    /// Some day, in seconds since 1970.
    const NOW: i64 = 1_800_000_000;

    fn record(id: &str, started: i64, seconds: Option<i64>) -> BuildHistoryRecord {
        let time = |seconds| Some(Timestamp { seconds, nanos: 0 });
        BuildHistoryRecord {
            r#ref: id.into(),
            created_at: time(started),
            completed_at: seconds.and_then(|seconds| time(started + seconds)),
            ..BuildHistoryRecord::default()
        }
    }

    fn records() -> Vec<BuildHistoryRecord> {
        let epoch = NOW - 24 * HOUR;
        let mut records = vec![
            record("foo123", epoch, Some(60)),
            record("bar456", epoch + HOUR, None),
            record("foo789", epoch + 2 * HOUR, Some(600)),
        ];
        let attr = |record: &mut BuildHistoryRecord, key: &str, value: &str| {
            record.frontend_attrs.insert(key.into(), value.into());
        };
        attr(&mut records[1], "context", "https://github.com/user/repo.git#abcdef123");
        attr(&mut records[2], "vcs:source", "testrepo");
        records
    }

    #[test]
    fn records_are_found_as_upstream_finds_them() {
        for (filters, expected) in [
            (&["ref==foo"][..], &[][..]),
            (&["ref~=foo"], &["foo123", "foo789"]),
            (&["repository!=testrepo"], &["foo123", "bar456"]),
            (&["repository==https://github.com/user/repo.git"], &["bar456"]),
            (&["repository!=testrepo,ref~=foo"], &["foo123"]),
            (&["completedAt>23h"], &["foo789"]),
            (&["startedAt<23h"], &["foo123"]),
            (&["startedAt<=23h"], &["foo123", "bar456"]),
            (&["duration>5m"], &["foo789"]),
            (&["startedAt>24h,completedAt>22h"], &["foo789"]),
            (&["startedAt>=23h", "completedAt>22h"], &["bar456", "foo789"]),
            (&["startedAt>24h,ref~=foo"], &["foo789"]),
            (&["startedAt>=2027-01-15T07:30:00Z"], &[]),
            (&["startedAt<2027-01-15T07:30:00Z"], &["foo123", "bar456", "foo789"]),
            (&["status==running"], &["bar456"]),
            (&["status==completed"], &["foo123", "foo789"]),
            (&[], &["foo123", "bar456", "foo789"]),
            (&[""], &["foo123", "bar456", "foo789"]),
            (&["\"ref==bar456\""], &["bar456"]),
            (&["ref==\"foo123\""], &["foo123"]),
        ] {
            let filters: Vec<String> = filters.iter().map(|text| (*text).to_owned()).collect();
            let filter = RecordFilter::parse(&filters, NOW * SECOND).unwrap();
            let all = records();
            let found: Vec<&str> =
                all.iter().filter(|r| filter.holds(r)).map(|r| r.r#ref.as_str()).collect();
            assert_eq!(found, expected, "{filters:?}");
        }
    }

    #[test]
    fn errors_tell_failed_from_canceled() {
        let mut record = record("a", 0, Some(1));
        record.error = Some(rpc::Status { message: "it broke".into(), ..rpc::Status::default() });
        assert_eq!(status(&record), "error");
        record.error = Some(rpc::Status {
            message: "failed to solve: context canceled".into(),
            ..rpc::Status::default()
        });
        assert_eq!(status(&record), "canceled");
    }

    #[test]
    fn what_is_no_filter_is_refused() {
        for filter in [
            "ref+foo",
            "startedAt>soon",
            "duration>5",
            "duration>",
            "completedAt<=1e9",
            "colour==red",
            "ref~=(",
            "status",
            ",",
            "ref==\"",
        ] {
            let parsed = RecordFilter::parse(&[filter.to_owned()], NOW * SECOND);
            assert_eq!(parsed.is_err(), filter != "status", "{filter}");
        }
        let error = RecordFilter::parse(&["ref+foo".into()], 0).unwrap_err();
        assert!(error.message().contains("parse error"), "{error}");
    }
}
