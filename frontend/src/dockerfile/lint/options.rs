//! What the `check` directive and `BUILDKIT_DOCKERFILE_CHECK` say: `skip=A,B;error=true;experimental=all`.

use slipway_spec::flag;
use std::collections::BTreeSet;

use super::rules::Rule;
use crate::dockerfile::go_format::quoted;
use crate::dockerfile::problem::{Problem, Result};

/// Some rules, or all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Rules {
    All,
    Named(BTreeSet<String>),
}

impl Default for Rules {
    fn default() -> Self {
        Self::Named(BTreeSet::new())
    }
}

impl Rules {
    fn parse(value: &str) -> Self {
        match value.trim() {
            "all" => Self::All,
            list => Self::Named(list.split(',').map(|name| name.trim().to_owned()).collect()),
        }
    }

    fn contains(&self, rule: &Rule) -> bool {
        match self {
            Self::All => true,
            Self::Named(names) => names.contains(rule.name),
        }
    }

    fn merged(&self, other: &Self) -> Self {
        match (self, other) {
            (Self::Named(ours), Self::Named(theirs)) => Self::Named(ours | theirs),
            _ => Self::All,
        }
    }
}

/// Which rules count, and how much.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LintOptions {
    pub(crate) skip: Rules,
    /// Experimental rules that count; the others do not, whatever `skip` says.
    pub(crate) experimental: Rules,
    /// Whether a broken rule fails the build.
    pub(crate) error: bool,
}

impl LintOptions {
    /// Returns whether it matters that this rule is broken.
    pub(super) fn counts(&self, rule: &Rule) -> bool {
        if rule.experimental { self.experimental.contains(rule) } else { !self.skip.contains(rule) }
    }

    /// Adds what a single instruction says, which may not decide about errors.
    pub(super) fn merged(&self, other: &Self) -> Self {
        Self {
            skip: self.skip.merged(&other.skip),
            experimental: self.experimental.merged(&other.experimental),
            error: self.error,
        }
    }
}

/// Reads options. Names of rules are not checked: a file may be older or newer than this program.
pub(crate) fn parse_options(text: &str) -> Result<LintOptions> {
    let text = text.trim();
    let mut options = LintOptions::default();
    if text.is_empty() {
        return Ok(options);
    }
    for part in text.splitn(3, ';') {
        let invalid = |what: &str| Problem::new(format!("invalid check option {}", quoted(what)));
        let (key, value) = part.split_once('=').ok_or_else(|| invalid(part))?;
        match key.trim() {
            "skip" => options.skip = Rules::parse(value),
            "experimental" => options.experimental = Rules::parse(value),
            "error" => {
                options.error = flag::parse(value.trim()).ok_or_else(|| {
                    Problem::new(format!("failed to parse check option {}", quoted(part)))
                        .hint("error is true or false")
                })?;
            }
            other => return Err(invalid(other)),
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(names: &[&str]) -> Rules {
        Rules::Named(names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn options_are_read() {
        let options = |skip, experimental, error| LintOptions { skip, experimental, error };
        let none = || named(&[]);
        for (text, expected) in [
            ("", options(none(), none(), false)),
            ("  ", options(none(), none(), false)),
            ("skip=all", options(Rules::All, none(), false)),
            ("skip=A, B ;error=true", options(named(&["A", "B"]), none(), true)),
            ("experimental=all", options(none(), Rules::All, false)),
            (
                " skip = all ; experimental = X ; error = 1 ",
                options(Rules::All, named(&["X"]), true),
            ),
            ("skip=", options(named(&[""]), none(), false)),
        ] {
            assert_eq!(parse_options(text), Ok(expected), "{text}");
        }
        for (text, message) in [
            ("skip", "invalid check option \"skip\""),
            ("skip=A;", "invalid check option \"\""),
            ("nope=1", "invalid check option \"nope\""),
            ("error=maybe", "failed to parse check option \"error=maybe\""),
            ("skip=A;error=1;experimental=B;x=1", "x"),
        ] {
            match parse_options(text) {
                Err(problem) => assert_eq!(problem.message, message, "{text}"),
                // Of a fourth part only the third one hears.
                Ok(options) => assert_eq!(options.experimental, named(&["B;x=1"]), "{text}"),
            }
        }
    }
}
