//! `slipway prune`.

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
    context.printer.note(&warning(scope(args)));
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
