//! `slipway prune`.

use std::time::Duration;

use slipway_engine::config::{DiskSpace, parse_duration};

use super::Context;
use crate::args::store::PruneArgs;
use crate::failure::Failure;
use crate::printer::size::human;

/// What is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PruneScope {
    /// Which results of build steps go.
    pub(crate) cache: PruneCache,
    /// Which images go.
    pub(crate) images: PruneImages,
}

/// Which results of build steps go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PruneCache {
    /// Those that neither an image nor a recent build refers to.
    Unreferenced,
    /// All that are not in use.
    All,
}

/// Which images go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PruneImages {
    /// None.
    None,
    /// Those without a name.
    Untagged,
    /// All.
    All,
}

/// Which of the cache goes, and how much of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Selection {
    /// One filter of all conditions, or none.
    pub(crate) filter: Vec<String>,
    /// Only what was not used for this long.
    pub(crate) keep: Duration,
    /// What stays at least.
    pub(crate) reserved: Option<DiskSpace>,
    /// What may stay at most.
    pub(crate) max_used: Option<DiskSpace>,
    /// What is to be free.
    pub(crate) min_free: Option<DiskSpace>,
}

/// Joins conditions to one filter as BuildKit writes it, and takes `until=` out, which is a time.
///
/// # Errors
/// When a time is none, or is given to a command that has none.
pub(crate) fn filter(conditions: &[String]) -> Result<(Vec<String>, Option<Duration>), Failure> {
    let (mut all, mut until) = (vec![], None);
    for condition in conditions {
        let written = ["==", "!=", "~="].iter().any(|operator| condition.contains(operator));
        match condition.split_once('=') {
            Some(("until" | "unused-for", time)) => {
                let time = parse_duration(time).ok_or_else(|| {
                    Failure::new(format!("--filter {condition}: {time:?} is no duration"))
                        .hint("use something like until=48h")
                })?;
                until = until.max(Some(time));
            }
            // As Docker's clients have it.
            Some(("id", value)) if !written => all.push(format!("id~={value}")),
            Some((field, value)) if !written => all.push(format!("{field}=={value}")),
            _ => all.push(condition.clone()),
        }
    }
    let filter = (!all.is_empty()).then(|| all.join(","));
    Ok((filter.into_iter().collect(), until))
}

/// Returns which of the cache goes where not all of it does; nothing when no flag says so.
///
/// # Errors
/// When flags make no sense.
pub(crate) fn selection(args: &PruneArgs) -> Result<Option<Selection>, Failure> {
    let (filter, until) = filter(&args.filters)?;
    let selection = Selection {
        filter,
        keep: args.keep_duration.max(until).unwrap_or_default(),
        reserved: args.reserved_space,
        max_used: args.max_used_space,
        min_free: args.min_free_space,
    };
    let says = selection != Selection::default();
    if says && args.images {
        return Err(Failure::new(
            "--images cannot be combined with limits and filters of the cache",
        ));
    }
    Ok(says.then_some(selection))
}

/// Returns what to remove.
pub(crate) fn scope(args: &PruneArgs) -> PruneScope {
    PruneScope {
        cache: if args.all { PruneCache::All } else { PruneCache::Unreferenced },
        images: match (args.images, args.all) {
            (false, _) => PruneImages::None,
            (true, false) => PruneImages::Untagged,
            (true, true) => PruneImages::All,
        },
    }
}

/// Asks whether to go on, unless told not to ask.
///
/// # Errors
/// When the answer cannot be read.
pub(crate) fn confirm(args: &PruneArgs, context: &Context) -> Result<bool, Failure> {
    if args.force {
        return Ok(true);
    }
    let text = match selection(args)? {
        None => warning(scope(args)),
        Some(_) if args.all => {
            "WARNING! This will remove cache, as far as the flags say, also what images share."
                .into()
        }
        Some(_) => "WARNING! This will remove cache, as far as the flags say.".into(),
    };
    context.printer.note(&text);
    context.printer.confirm("Are you sure you want to continue?")
}

fn warning(scope: PruneScope) -> String {
    let cache = match scope.cache {
        PruneCache::Unreferenced => "cache that is not referred to",
        PruneCache::All => "all cache that is not in use",
    };
    let images = match scope.images {
        PruneImages::None => "",
        PruneImages::Untagged => ", and all images without a name",
        PruneImages::All => ", and all images",
    };
    format!("WARNING! This will remove {cache}{images}.")
}

/// Tells how much space became free.
pub(crate) fn report(freed_bytes: u64, context: &Context) {
    context.printer.line(&format!("Total reclaimed space: {}", human(freed_bytes)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command;
    use crate::command::testing;

    #[test]
    fn says_what_goes() {
        for (words, expected) in [
            (&["prune"][..], "WARNING! This will remove cache that is not referred to."),
            (&["prune", "-a"], "WARNING! This will remove all cache that is not in use."),
            (
                &["prune", "--images"],
                "WARNING! This will remove cache that is not referred to, and all images without a name.",
            ),
            (
                &["prune", "-a", "--images"],
                "WARNING! This will remove all cache that is not in use, and all images.",
            ),
        ] {
            let Command::Prune(args) = testing::command(words) else { panic!("not prune") };
            assert_eq!(warning(scope(&args)), expected);
        }
    }

    #[test]
    fn flags_select_of_the_cache() {
        let selected = |words: &[&str]| {
            let words = [&["prune"], words].concat();
            let Command::Prune(args) = testing::command(&words) else { panic!("not prune") };
            selection(&args)
        };
        assert_eq!(selected(&["-a"]), Ok(None));
        let words = [
            "--filter=type=regular",
            "--filter=id=abc",
            "--filter=description~=\"a, b\"",
            "--filter=inuse",
            "--filter=until=90m",
            "--keep-duration=1h",
            "--keep-storage=10GB",
            "--max-used-space=50%",
            "--min-free-space=7",
        ];
        let expected = Selection {
            filter: vec!["type==regular,id~=abc,description~=\"a, b\",inuse".into()],
            keep: Duration::from_secs(5400),
            reserved: Some(DiskSpace::Bytes(10 << 30)),
            max_used: Some(DiskSpace::Percent(50)),
            min_free: Some(DiskSpace::Bytes(7)),
        };
        assert_eq!(selected(&words), Ok(Some(expected)));
        assert!(selected(&["--filter=until=soon"]).is_err());
        assert!(selected(&["--images", "--filter=type=regular"]).is_err());
    }

    #[test]
    fn force_asks_nothing() {
        let (context, stdout, stderr) = testing::context(&[]);
        let Command::Prune(args) = testing::command(&["prune", "-af"]) else { panic!("not prune") };
        assert_eq!(confirm(&args, &context), Ok(true));
        report(1_500_000, &context);
        assert_eq!(
            (stdout.take(), stderr.take()),
            ("Total reclaimed space: 1.5MB\n".into(), String::new())
        );
    }
}
