//! Deciding which records go, without touching anything.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::record::{CacheRecord, RecordKind};
use crate::filter::Filter;

/// Which records may go, and how many. Amounts are bytes, and 0 is no limit; without limits all that may go goes.
#[derive(Clone, Debug, Default)]
pub struct Rule {
    /// Whether internal records, those of frontends and those that images share may go too.
    pub all: bool,
    /// Which records may go.
    pub filter: Filter,
    /// Only what was not used for this many nanoseconds.
    pub keep: i64,
    /// What stays at least.
    pub reserved: u64,
    /// What may stay at most.
    pub max_used: u64,
    /// What is to be free on the disk afterwards.
    pub min_free: u64,
}

impl Rule {
    /// Whether the rule stops when enough space is free.
    pub fn is_limited(&self) -> bool {
        self.reserved != 0 || self.max_used != 0 || self.min_free != 0
    }

    /// Returns what may stay in all; nothing when there is no limit.
    fn kept_bytes(&self, total: u64, free: u64) -> Option<u64> {
        if !self.is_limited() {
            return None;
        }
        let excess = self.min_free.saturating_sub(free);
        let mut kept = self.max_used;
        if excess > 0 {
            let rest = total.saturating_sub(excess);
            kept = if kept == 0 { rest } else { kept.min(rest) };
        } else if self.min_free != 0 && kept == 0 {
            // There is room, and no other limit.
            kept = total;
        }
        Some(kept.max(self.reserved))
    }

    fn allows(&self, record: &CacheRecord, now: i64) -> bool {
        let special = record.shared
            || matches!(
                record.kind,
                RecordKind::Internal | RecordKind::Frontend | RecordKind::Image
            );
        !record.in_use
            && record.kind != RecordKind::Image
            && (self.all || !special)
            && (self.keep <= 0 || record.used <= now.saturating_sub(self.keep))
            && self.filter.holds(|path| record.field(path))
    }

    /// Returns the indexes of the records that go, in the order in which they go: what was not used for longest first, and
    /// nothing before what stands on it. `free` is what is free on the disk, in bytes.
    pub fn plan(&self, records: &[CacheRecord], now: i64, free: u64) -> Vec<usize> {
        let total: u64 =
            records.iter().filter(|record| !record.shared).map(|record| record.bytes).sum();
        let kept = self.kept_bytes(total, free);
        let index: HashMap<&str, usize> =
            records.iter().enumerate().map(|(at, record)| (record.id.as_str(), at)).collect();
        let parents = |at: usize| {
            let record: &CacheRecord = &records[at];
            record.parents.iter().filter_map(|parent| index.get(parent.as_str()).copied())
        };
        let mut children = vec![0usize; records.len()];
        for at in 0..records.len() {
            for parent in parents(at) {
                children[parent] += 1;
            }
        }
        let candidate = |at: usize| {
            let record: &CacheRecord = &records[at];
            // Of what was used at the same time, the later one is made of the earlier one.
            self.allows(record, now).then_some(Reverse((record.used, Reverse(at))))
        };
        let mut queue: BinaryHeap<_> =
            (0..records.len()).filter(|at| children[*at] == 0).filter_map(candidate).collect();
        let (mut left, mut planned) = (total, vec![]);
        while kept.is_none_or(|kept| left > kept)
            && let Some(Reverse((_, Reverse(at)))) = queue.pop()
        {
            if !records[at].shared {
                left -= records[at].bytes;
            }
            planned.push(at);
            for parent in parents(at) {
                children[parent] -= 1;
                if children[parent] == 0 {
                    queue.extend(candidate(parent));
                }
            }
        }
        planned
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gc::record::FIELDS;

    fn record(id: &str, bytes: u64, used: i64, parents: &[&str]) -> CacheRecord {
        CacheRecord {
            id: id.into(),
            kind: RecordKind::Regular,
            bytes,
            parents: parents.iter().map(|parent| (*parent).to_owned()).collect(),
            created: 0,
            used,
            description: format!("RUN {id}"),
            mutable: false,
            in_use: false,
            shared: false,
        }
    }

    fn chain() -> Vec<CacheRecord> {
        vec![
            record("base", 100, 50, &[]),
            record("left", 10, 50, &["base"]),
            record("right", 20, 10, &["base"]),
            record("top", 5, 40, &["left"]),
            CacheRecord { mutable: true, kind: RecordKind::CacheMount, ..record("go", 7, 30, &[]) },
        ]
    }

    fn planned(records: &[CacheRecord], rule: &Rule) -> Vec<String> {
        rule.plan(records, 100, 1000).into_iter().map(|at| records[at].id.clone()).collect()
    }

    #[test]
    fn what_stands_on_others_goes_first_and_what_is_old_before_what_is_young() {
        let all = ["right", "go", "top", "left", "base"];
        assert_eq!(planned(&chain(), &Rule::default()), all);
        let mut busy = chain();
        busy[3].in_use = true;
        assert_eq!(planned(&busy, &Rule::default()), ["right", "go"]);
    }

    #[test]
    fn age_and_filters_select() {
        let aged = Rule { keep: 65, ..Rule::default() };
        assert_eq!(planned(&chain(), &aged), ["right", "go"]);
        let filter = |text: &str| Filter::parse(&[text], FIELDS).unwrap();
        let only = Rule { filter: filter("type==exec.cachemount"), ..Rule::default() };
        assert_eq!(planned(&chain(), &only), ["go"]);
        // What others stand on stays with them.
        let base = Rule { filter: filter("id==base"), ..Rule::default() };
        assert_eq!(planned(&chain(), &base), [""; 0]);
        let text = Rule { filter: filter("description~=(right|top)"), ..Rule::default() };
        assert_eq!(planned(&chain(), &text), ["right", "top"]);
    }

    #[test]
    fn special_records_go_only_with_all() {
        let mut records = chain();
        records[1].shared = true;
        records[4].kind = RecordKind::Frontend;
        assert_eq!(planned(&records, &Rule::default()), ["right", "top"]);
        let all = Rule { all: true, ..Rule::default() };
        assert_eq!(planned(&records, &all).len(), 5);
        records[0].kind = RecordKind::Image;
        assert_eq!(planned(&records, &all).len(), 4);
    }

    #[test]
    fn limits_stop_when_enough_is_free() {
        // 142 bytes in all, 1000 free.
        let with = |max_used, min_free, reserved| {
            planned(&chain(), &Rule { max_used, min_free, reserved, ..Rule::default() })
        };
        assert_eq!(with(142, 0, 0), [""; 0]);
        assert_eq!(with(141, 0, 0), ["right"]);
        assert_eq!(with(120, 0, 0), ["right", "go"]);
        assert_eq!(with(1, 0, 120), ["right", "go"]);
        assert_eq!(with(0, 0, 142), [""; 0]);
        assert_eq!(with(0, 0, 130), ["right"]);
        // Enough is free.
        assert_eq!(with(0, 1000, 0), [""; 0]);
        assert_eq!(with(0, 1010, 0), ["right"]);
        assert_eq!(with(0, 1_000_000, 0).len(), 5);
        assert_eq!(with(200, 1025, 0), ["right", "go"]);
        assert_eq!(with(200, 1025, 122), ["right"]);
    }

    #[test]
    fn shared_bytes_count_for_no_limit() {
        let mut records = chain();
        records[0].shared = true;
        let limited = Rule { all: true, max_used: 42, ..Rule::default() };
        assert_eq!(planned(&records, &limited), [""; 0]);
    }
}
