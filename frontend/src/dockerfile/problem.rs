//! A finding before it is bound to the file's name and text.

use std::sync::Arc;

use slipway_spec::llb::{Definition, Lines};

use super::lint::Finding;
use crate::{Diagnostic, Severity};

/// What is wrong, and the lines if they are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
    pub(crate) lines: Vec<Lines>,
}

pub(crate) type Result<T> = std::result::Result<T, Problem>;

impl Problem {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, lines: vec![] }
    }

    /// Something that BuildKit can do and this program cannot do yet.
    pub(crate) fn unsupported(what: &str) -> Self {
        Self::new(format!("{what} is not supported yet"))
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Says where, unless that was said already.
    pub(crate) fn at(mut self, lines: Lines) -> Self {
        if self.lines.is_empty() {
            self.lines.push(lines);
        }
        self
    }

    /// Says where, whatever was said before.
    pub(crate) fn moved_to(mut self, lines: Lines) -> Self {
        self.lines = vec![lines];
        self
    }

    pub(crate) fn prefixed(mut self, prefix: &str) -> Self {
        self.message = format!("{prefix}: {}", self.message);
        self
    }
}

/// The name and text of the file that findings are about.
#[derive(Clone, Debug, Default)]
pub(crate) struct FileText {
    pub(crate) name: String,
    pub(crate) text: Arc<str>,
    /// The graph that it was read from.
    pub(crate) origin: Option<Arc<Definition>>,
}

impl FileText {
    pub(crate) fn error(&self, problem: Problem) -> Diagnostic {
        Diagnostic {
            severity: Severity::Error,
            file: self.name.clone(),
            source: Arc::clone(&self.text),
            spans: problem.lines.into_iter().map(Into::into).collect(),
            message: problem.message,
            hint: problem.hint,
            origin: self.origin.clone(),
            ..Diagnostic::default()
        }
    }

    /// Says which rule is broken, and where.
    pub(crate) fn warning(&self, finding: &Finding) -> Diagnostic {
        let Finding { rule, message, lines } = finding;
        let message = format!("{}: {message} (line {})", rule.name, lines.first);
        Diagnostic {
            severity: Severity::Warning,
            detail: vec![rule.description.into()],
            url: rule.url.into(),
            ..self.error(Problem::new(message).at(*lines))
        }
    }
}
