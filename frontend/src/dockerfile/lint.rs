//! Rules about Dockerfiles that can be built and should be mended.
//!
//! A [`Linter`] goes with a conversion: the steps of the conversion tell it what they see, it decides whether a rule
//! is broken, and remembers what it found. [`rules`] is the table of all rules; each of the other modules has the
//! conditions of those that look at the same thing.

mod context;
mod document;
mod instruction;
mod options;
mod platform;
pub(crate) mod rules;
mod secrets;
mod variables;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use slipway_spec::llb::Lines;

use super::directive::DirectiveParser;
use super::problem::Problem;
use context::Ignored;
pub(crate) use instruction::UsedOnce;
pub(crate) use options::{LintOptions, parse_options};
use rules::Rule;

/// A broken rule.
#[derive(Clone, Debug)]
pub(crate) struct Finding {
    pub(crate) rule: &'static Rule,
    pub(crate) message: String,
    pub(crate) lines: Lines,
}

/// Decides which rules count, and remembers which were broken. Clones remember in the same place.
#[derive(Clone, Debug)]
pub(crate) struct Linter {
    options: Arc<LintOptions>,
    /// What is no part of the build context.
    ignored: Option<Arc<Ignored>>,
    /// `None` is a linter that looks away.
    found: Option<Arc<Mutex<Vec<Finding>>>>,
}

impl Linter {
    pub(crate) fn new(options: LintOptions) -> Self {
        Self { options: Arc::new(options), ignored: None, found: Some(Arc::default()) }
    }

    /// Makes a linter that never finds anything, for what was looked at before.
    pub(crate) fn silent() -> Self {
        Self { options: Arc::default(), ignored: None, found: None }
    }

    /// Tells which files are no part of the build context. Patterns that cannot be read are left to who uses them.
    #[must_use]
    pub(crate) fn ignoring(mut self, patterns: &[String]) -> Self {
        self.ignored = Ignored::new(patterns).map(Arc::new);
        self
    }

    /// Returns the linter for one instruction, which comments above it may tell to look away: `# check=skip=Rule`.
    pub(crate) fn under(&self, comments: &[String]) -> Self {
        // Blanks before the key are passed over, and only the first such comment counts.
        let check = |comment: &String| {
            let directive = DirectiveParser::default().line(comment, "").ok().flatten()?;
            (directive.key == "check").then_some(directive.value)
        };
        let Some(value) = comments.iter().find_map(check) else { return self.clone() };
        let value = value.split(' ').next().unwrap_or_default();
        match parse_options(value) {
            Ok(options) => {
                Self { options: Arc::new(self.options.merged(&options)), ..self.clone() }
            }
            Err(_) => self.clone(),
        }
    }

    /// Remembers a broken rule, if the rule counts.
    fn report(&self, rule: &'static Rule, lines: Lines, message: String) {
        if let Some(found) = &self.found
            && self.options.counts(rule)
        {
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            found.push(Finding { rule, message, lines });
        }
    }

    /// Returns what was found, in order.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        let Some(found) = &self.found else { return vec![] };
        found.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Refuses to go on if something was found and the options say that this is an error.
    pub(crate) fn verdict(&self) -> Result<(), Problem> {
        if !self.options.error {
            return Ok(());
        }
        let rules: BTreeSet<&str> =
            self.findings().iter().map(|finding| finding.rule.name).collect();
        if rules.is_empty() {
            return Ok(());
        }
        let rules = rules.into_iter().collect::<Vec<_>>().join(", ");
        Err(Problem::new(format!("lint violation found for rules: {rules}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: Lines = Lines { first: 2, last: 3 };

    fn found(linter: &Linter) -> Vec<&'static str> {
        linter.findings().iter().map(|finding| finding.rule.name).collect()
    }

    #[test]
    fn comments_speak_for_one_instruction() {
        let linter = Linter::new(LintOptions::default());
        let report = |comments: &[&str]| {
            let comments: Vec<String> = comments.iter().map(|c| (*c).to_owned()).collect();
            linter.under(&comments).report(&rules::MAINTAINER_DEPRECATED, LINES, String::new());
        };
        report(&["check=skip=MaintainerDeprecated"]);
        report(&["about this", "Check = skip=StageNameCasing,MaintainerDeprecated and why"]);
        report(&["check=skip=all", "check=error=true"]);
        assert!(found(&linter).is_empty());
        report(&["check=skip=StageNameCasing", "check=skip=MaintainerDeprecated"]);
        report(&["check=nonsense"]);
        report(&["please check=skip=all"]);
        assert_eq!(found(&linter), ["MaintainerDeprecated"; 3]);
    }

    #[test]
    fn errors_are_asked_for() {
        for (options, expected) in [
            ("", None),
            ("error=true", Some("lint violation found for rules: FromAsCasing, StageNameCasing")),
            (
                "error=true;skip=StageNameCasing",
                Some("lint violation found for rules: FromAsCasing"),
            ),
            ("error=true;skip=all", None),
        ] {
            let linter = Linter::new(parse_options(options).unwrap());
            for rule in
                [&rules::STAGE_NAME_CASING, &rules::FROM_AS_CASING, &rules::STAGE_NAME_CASING]
            {
                linter.report(rule, LINES, String::new());
            }
            assert_eq!(linter.verdict().err().map(|p| p.message).as_deref(), expected, "{options}");
        }
        let silent = Linter::silent();
        silent.report(&rules::STAGE_NAME_CASING, LINES, String::new());
        assert!(silent.findings().is_empty());
    }
}
