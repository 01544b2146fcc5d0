//! `slipway du`.

use std::fmt::Write as _;
use std::time::SystemTime;

use super::Context;
use crate::args::store::DuArgs;
use crate::printer::size::human;
use crate::printer::table::Table;
use crate::printer::text::clean;
use crate::printer::time::{ago, listed};

/// Something that takes space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UsageRecord {
    /// Its id.
    pub(crate) id: String,
    /// What it is, such as `regular` or `source.local`.
    pub(crate) kind: String,
    /// Its size on disk.
    pub(crate) size_bytes: u64,
    /// Whether `prune --all` would remove it.
    pub(crate) is_reclaimable: bool,
    /// Whether others need it too.
    pub(crate) is_shared: bool,
    /// Whether it can still change.
    pub(crate) is_mutable: bool,
    /// When it was made.
    pub(crate) created: Option<SystemTime>,
    /// When it was last used.
    pub(crate) last_used: Option<SystemTime>,
    /// How often it was used.
    pub(crate) usage_count: u64,
    /// What made it, for people.
    pub(crate) description: String,
}

/// Prints the records and their sums.
pub(crate) fn print(args: &DuArgs, records: &[UsageRecord], now: SystemTime, context: &Context) {
    if args.verbose {
        context.printer.text(&blocks(records, now));
    } else if !records.is_empty() {
        context.printer.table(&table(records, now));
    }
    context.printer.text(&sums(records));
}

fn table(records: &[UsageRecord], now: SystemTime) -> Table {
    let mut table = Table::new(&["ID", "RECLAIMABLE", "SIZE", "LAST ACCESSED"]);
    for record in records {
        table.row([
            format!("{}{}", record.id, if record.is_mutable { "*" } else { "" }),
            record.is_reclaimable.to_string(),
            format!("{}{}", human(record.size_bytes), if record.is_shared { "*" } else { "" }),
            record.last_used.map_or_else(String::new, |time| ago(now, time)),
        ]);
    }
    table
}

fn blocks(records: &[UsageRecord], now: SystemTime) -> String {
    let mut text = String::new();
    for record in records {
        let mut field = |name: &str, value: &str| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{:<15}{}", format!("{name}:"), clean(value));
        };
        field("ID", &record.id);
        if let Some(created) = record.created {
            field("Created at", &listed(created));
        }
        field("Mutable", &record.is_mutable.to_string());
        field("Reclaimable", &record.is_reclaimable.to_string());
        field("Shared", &record.is_shared.to_string());
        field("Size", &human(record.size_bytes));
        if !record.description.is_empty() {
            field("Description", &record.description);
        }
        field("Usage count", &record.usage_count.to_string());
        if let Some(time) = record.last_used {
            field("Last used", &ago(now, time));
        }
        field("Type", &record.kind);
        text.push('\n');
    }
    text
}

fn sums(records: &[UsageRecord]) -> String {
    let sum = |choose: fn(&UsageRecord) -> bool| {
        human(records.iter().filter(|record| choose(record)).map(|record| record.size_bytes).sum())
    };
    let mut text = String::new();
    if records.iter().any(|record| record.is_shared) {
        let _ = writeln!(text, "{:<15}{}", "Shared:", sum(|record| record.is_shared));
        let _ = writeln!(text, "{:<15}{}", "Private:", sum(|record| !record.is_shared));
    }
    let _ = writeln!(text, "{:<15}{}", "Reclaimable:", sum(|record| record.is_reclaimable));
    let _ = writeln!(text, "{:<15}{}", "Total:", sum(|_| true));
    text
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::args::Command;
    use crate::command::testing;

    fn records() -> Vec<UsageRecord> {
        let record = |id: &str, size_bytes, is_shared: bool| UsageRecord {
            id: id.into(),
            kind: "regular".into(),
            size_bytes,
            is_reclaimable: !is_shared,
            is_shared,
            is_mutable: false,
            created: Some(UNIX_EPOCH),
            last_used: is_shared.then_some(UNIX_EPOCH),
            usage_count: 2,
            description: "RUN x\x1b[2J".into(),
        };
        vec![record("abc", 1500, true), record("def", 2_000_000, false)]
    }

    fn printed(verbose: bool, records: &[UsageRecord]) -> String {
        let (context, stdout, _) = testing::context(&[]);
        let words: &[&str] = if verbose { &["du", "-v"] } else { &["du"] };
        let Command::Du(args) = testing::command(words) else { panic!("not du") };
        print(&args, records, UNIX_EPOCH + Duration::from_secs(7200), &context);
        stdout.take()
    }

    #[test]
    fn a_table_and_sums() {
        assert_eq!(
            printed(false, &records()),
            "\
ID        RECLAIMABLE   SIZE      LAST ACCESSED
abc       false         1.5kB*    2 hours ago
def       true          2MB
Shared:        1.5kB
Private:       2MB
Reclaimable:   2MB
Total:         2MB
"
        );
        assert_eq!(printed(false, &[]), "Reclaimable:   0B\nTotal:         0B\n");
    }

    #[test]
    fn everything_about_each_record() {
        assert_eq!(
            printed(true, &records()[..1]),
            "\
ID:            abc
Created at:    1970-01-01 00:00:00 +0000 UTC
Mutable:       false
Reclaimable:   false
Shared:        true
Size:          1.5kB
Description:   RUN x
Usage count:   2
Last used:     2 hours ago
Type:          regular

Shared:        1.5kB
Private:       0B
Reclaimable:   0B
Total:         1.5kB
"
        );
    }
}
