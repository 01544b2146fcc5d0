//! Why the program ends without success, in the order and words people and scripts expect.

pub(crate) mod excerpt;

use std::fmt;

use crate::printer::Printer;
use crate::printer::text::clean;

/// Any failure that has no code of its own.
pub(crate) const EXIT_FAILURE: u8 = 1;
/// Cancelled, by Ctrl-C or by the builder.
pub(crate) const EXIT_CANCELED: u8 = 130;
/// `run` failed before the command began, as docker reports it.
pub(crate) const EXIT_RUN_FAILED: u8 = 125;
/// The command of `run` is not executable.
pub(crate) const EXIT_NOT_EXECUTABLE: u8 = 126;
/// The command of `run` does not exist.
pub(crate) const EXIT_NOT_FOUND: u8 = 127;

/// A failure as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// What failed and why, on one line.
    pub(crate) message: String,
    /// The source lines that the failure is about; see [`excerpt::source_excerpt`].
    pub(crate) excerpt: Option<String>,
    /// What to do next.
    pub(crate) hints: Vec<String>,
    /// The process's exit code.
    pub(crate) exit_code: u8,
}

impl Failure {
    /// Makes a failure with exit code 1.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), excerpt: None, hints: vec![], exit_code: EXIT_FAILURE }
    }

    /// Makes the failure of an interrupted command.
    pub(crate) fn canceled() -> Self {
        Self::new("canceled").code(EXIT_CANCELED)
    }

    /// Makes a failure of an error and everything that caused it.
    pub(crate) fn of(error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(chain(error))
    }

    /// Adds a hint.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// Adds source lines.
    #[must_use]
    pub(crate) fn with_excerpt(mut self, excerpt: String) -> Self {
        self.excerpt = Some(excerpt);
        self
    }

    /// Sets the exit code.
    #[must_use]
    pub(crate) fn code(mut self, exit_code: u8) -> Self {
        self.exit_code = exit_code;
        self
    }

    /// Prints the failure: the source lines, the hints, and the error as the last line.
    pub(crate) fn print(&self, printer: &Printer) {
        printer.error_text(&self.to_string());
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(excerpt) = &self.excerpt {
            writeln!(f, "{}", excerpt.trim_end_matches('\n'))?;
        }
        for hint in &self.hints {
            writeln!(f, "hint: {}", clean(hint))?;
        }
        // Scripts look at the last line, so the message must stay on it.
        let message = self.message.trim_end().lines().map(clean).collect::<Vec<_>>().join("; ");
        writeln!(f, "ERROR: {message}")
    }
}

/// Joins an error and its sources, leaving out a source that its parent quotes already.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_the_last_line() {
        let failure = Failure::new("failed to solve: exit code: 1")
            .hint("run it again")
            .with_excerpt("Dockerfile:2\n--\n   2 | >>> RUN false\n--\n".into());
        assert_eq!(
            failure.to_string(),
            "Dockerfile:2\n--\n   2 | >>> RUN false\n--\nhint: run it again\nERROR: failed to solve: exit code: 1\n"
        );
        assert_eq!(Failure::new("a\nb\x1b[31m\n").to_string(), "ERROR: a; b\n");
        assert_eq!((Failure::new("x").exit_code, Failure::canceled().exit_code), (1, 130));
    }

    #[test]
    fn causes_are_told_once() {
        #[derive(Debug)]
        struct Outer(&'static str, std::io::Error);
        impl fmt::Display for Outer {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.0)
            }
        }
        impl std::error::Error for Outer {
            fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
                Some(&self.1)
            }
        }
        let inner = || std::io::Error::other("disk on fire");
        assert_eq!(chain(&Outer("cannot read", inner())), "cannot read: disk on fire");
        assert_eq!(
            chain(&Outer("cannot read: disk on fire", inner())),
            "cannot read: disk on fire"
        );
    }
}
