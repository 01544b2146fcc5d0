//! Files that are copied although they are no part of the build context.

use slipway_spec::llb::Lines;
use slipway_spec::pattern::{PatternMatcher, clean_path};

use super::{Linter, rules};
use crate::dockerfile::go_format::quoted;

/// The patterns of an ignore file.
#[derive(Clone, Debug)]
pub(super) struct Ignored {
    matcher: PatternMatcher,
    /// Whether one of the patterns leaves nothing.
    everything: bool,
}

impl Ignored {
    /// Returns `None` if nothing can be said: what one pattern drops, a later one may take back in part.
    pub(super) fn new(patterns: &[String]) -> Option<Self> {
        let matcher = PatternMatcher::new(patterns).ok()?;
        if matcher.is_empty() || matcher.has_exclusions() {
            return None;
        }
        let all =
            |pattern: &String| matches!(clean_path(pattern.trim()).as_str(), "*" | "**" | "**/*");
        Some(Self { matcher, everything: patterns.iter().any(all) })
    }

    fn contains(&self, path: &str) -> bool {
        // The context itself is no file that could be left out.
        let root = path == "." || path == "/";
        (!root || self.everything) && self.matcher.matches(path)
    }
}

impl Linter {
    /// Looks at a source of `COPY` or `ADD` in the build context.
    pub(crate) fn context_source(&self, add: bool, source: &str, lines: Lines) {
        let path = clean_path(source);
        if self.ignored.as_ref().is_some_and(|ignored| ignored.contains(&path)) {
            let verb = if add { "Add" } else { "Copy" };
            let message = format!(
                "Attempting to {verb} file {} that is excluded by .dockerignore",
                quoted(&path)
            );
            self.report(&rules::COPY_IGNORED_FILE, lines, message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_files_are_known() {
        for (patterns, path, expected) in [
            (&["*.log"][..], "a.log", true),
            (&["*.log"], "b/a.log", false),
            (&["dir"], "dir/file", true),
            (&["*.log", "!a.log"], "b.log", false),
            (&["*"], ".", true),
            (&["*"], "/", true),
            (&["**"], ".", true),
            (&["**/*"], ".", true),
            (&["?"], ".", false),
            (&[], "a", false),
        ] {
            let patterns: Vec<String> = patterns.iter().map(|p| (*p).to_owned()).collect();
            let ignored = Ignored::new(&patterns);
            let found = ignored.is_some_and(|ignored| ignored.contains(path));
            assert_eq!(found, expected, "{patterns:?} {path}");
        }
    }
}
