//! What is said about the user's file, and where in it.

use std::fmt;
use std::sync::Arc;

use slipway_spec::Digest;
use slipway_spec::llb::{Definition, Lines, pb};
use slipway_spec::progress::Warning;

use crate::{BridgeError, BridgeErrorKind};

/// How bad it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Severity {
    /// The build stops.
    #[default]
    Error,
    /// The build goes on.
    Warning,
}

/// A place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The lines, counted from 1.
    pub lines: Lines,
    /// Bytes of the first line, counted from 0, end excluded; `None` is all of it.
    pub columns: Option<(u32, u32)>,
}

impl Span {
    /// A run of whole lines.
    pub fn lines(first: u32, last: u32) -> Self {
        Self { lines: Lines { first, last }, columns: None }
    }
}

impl From<Lines> for Span {
    fn from(lines: Lines) -> Self {
        Self { lines, columns: None }
    }
}

/// One finding.
#[derive(Clone, Debug, Default)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// The name of the file.
    pub file: String,
    /// All of the file's text.
    pub source: Arc<str>,
    /// Where it is; empty when it belongs to no line.
    pub spans: Vec<Span>,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// More about the kind of finding, for those who ask for it.
    pub detail: Vec<String>,
    /// Where to read about the kind of finding; may be empty.
    pub url: String,
    /// The graph that the file was read from.
    pub origin: Option<Arc<Definition>>,
}

impl Diagnostic {
    /// Prints the message and an excerpt of the file, as BuildKit does.
    ///
    /// ```text
    /// Dockerfile:2
    /// --------------------
    ///    1 |     FROM scratch
    ///    2 | >>> RUNN echo
    ///    3 |
    /// --------------------
    /// ERROR: unknown instruction: RUNN (did you mean RUN?)
    /// ```
    pub fn render(&self) -> String {
        let mut text = self.excerpt();
        let word = match self.severity {
            Severity::Error => "ERROR",
            Severity::Warning => "WARNING",
        };
        text.push_str(&format!("{word}: {}\n", self.message));
        if let Some(hint) = &self.hint {
            text.push_str(&format!("hint: {hint}\n"));
        }
        text
    }

    /// Returns the finding as clients are told of it.
    pub fn to_warning(&self) -> Warning {
        let position = |line: u32| {
            Some(pb::Position { line: i32::try_from(line).unwrap_or(i32::MAX), character: 0 })
        };
        // As BuildKit does it, every line has a range of its own.
        let lines = self.spans.iter().flat_map(|span| span.lines.first..=span.lines.last);
        let ranges =
            lines.map(|line| pb::Range { start: position(line), end: position(line) }).collect();
        let head = self.origin.as_ref().and_then(|origin| origin.head().ok());
        let vertex: Option<Digest> = head.map(|(vertex, _)| vertex);
        let source = (!self.file.is_empty()).then(|| pb::SourceInfo {
            filename: self.file.clone(),
            data: self.source.as_bytes().to_vec(),
            definition: self.origin.as_ref().map(|origin| origin.to_pb()),
            language: "Dockerfile".into(),
        });
        Warning {
            vertex,
            level: 1,
            short: self.message.clone(),
            detail: self.detail.clone(),
            url: self.url.clone(),
            source,
            ranges,
        }
    }

    /// Returns the lines around the place, with the place marked; empty when there is no place.
    pub fn excerpt(&self) -> String {
        let lines: Vec<&str> = self.source.lines().collect();
        let Some(span) = self.spans.first() else { return String::new() };
        let first = usize::try_from(span.lines.first).unwrap_or(0).clamp(1, lines.len().max(1));
        let last =
            usize::try_from(span.lines.last).unwrap_or(0).clamp(first, lines.len().max(first));
        // A short place gets more context than a long one.
        let context = if last - first < 2 { 3 } else { 2 };
        let (from, to) = (first.saturating_sub(context).max(1), (last + context).min(lines.len()));
        let dashes = "-".repeat(20);
        let mut text = format!("{}:{}\n{dashes}\n", self.file, span.lines.first);
        for number in from..=to {
            let Some(line) = lines.get(number - 1) else { break };
            let marked = self.spans.iter().any(|span| {
                (span.lines.first..=span.lines.last)
                    .contains(&u32::try_from(number).unwrap_or(u32::MAX))
            });
            let mark = if marked { ">>>" } else { "   " };
            let row = format!(" {number:>3} | {mark} {line}");
            text.push_str(row.trim_end());
            text.push('\n');
        }
        text.push_str(&dashes);
        text.push('\n');
        text
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.spans.first() {
            Some(span) => write!(f, "{}:{}: {}", self.file, span.lines.first, self.message),
            None => f.write_str(&self.message),
        }
    }
}

/// Why there is no graph.
#[derive(Debug)]
pub struct FrontendError {
    /// At least one.
    pub diagnostics: Vec<Diagnostic>,
    /// The bridge's error, when that was the cause.
    pub source: Option<BridgeError>,
    /// What was asked of the frontend, when the frontend does not know how to answer.
    pub unsupported_request: Option<String>,
}

impl FrontendError {
    /// Wraps findings.
    pub fn new(diagnostics: Vec<Diagnostic>) -> Self {
        Self { diagnostics, source: None, unsupported_request: None }
    }

    /// Says that the frontend does not know a request.
    pub fn unsupported_request(id: &str) -> Self {
        let message = format!("unsupported request {id}");
        let diagnostic = Diagnostic { message, ..Diagnostic::default() };
        Self { unsupported_request: Some(id.into()), ..Self::new(vec![diagnostic]) }
    }

    /// Wraps an error of the bridge and says what was tried.
    pub fn from_bridge(mut diagnostic: Diagnostic, source: BridgeError) -> Self {
        // What the bridge says often begins with the same name already.
        diagnostic.message = if source.message.contains(&diagnostic.message) {
            source.message.clone()
        } else {
            format!("{}: {}", diagnostic.message, source.message)
        };
        Self { source: Some(source), ..Self::new(vec![diagnostic]) }
    }

    /// Returns whether the build was given up rather than failed.
    pub fn is_canceled(&self) -> bool {
        self.source.as_ref().is_some_and(|source| source.kind == BridgeErrorKind::Canceled)
    }

    /// Prints all findings with their places.
    pub fn render(&self) -> String {
        self.diagnostics.iter().map(Diagnostic::render).collect()
    }
}

impl From<Diagnostic> for FrontendError {
    fn from(diagnostic: Diagnostic) -> Self {
        Self::new(vec![diagnostic])
    }
}

impl fmt::Display for FrontendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, diagnostic) in self.diagnostics.iter().enumerate() {
            if position > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{diagnostic}")?;
        }
        Ok(())
    }
}

impl std::error::Error for FrontendError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        // The message already contains the bridge's; only what lies below it is new.
        self.source.as_ref().and_then(std::error::Error::source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excerpt_marks_the_lines() {
        let diagnostic = Diagnostic {
            file: "Dockerfile".into(),
            source: "FROM scratch\nRUNN echo \\\n  a\n\nUSER x\nUSER y\nUSER z\n".into(),
            spans: vec![Span::lines(2, 3)],
            message: "unknown instruction: RUNN".into(),
            hint: Some("did you mean RUN?".into()),
            ..Default::default()
        };
        let expected = "Dockerfile:2\n--------------------\n   1 |     FROM scratch\n   2 | >>> RUNN echo \\\n   \
                        3 | >>>   a\n   4 |\n   5 |     USER x\n   6 |     USER y\n--------------------\nERROR: unknown \
                        instruction: RUNN\nhint: did you mean RUN?\n";
        assert_eq!(diagnostic.render(), expected);
        assert_eq!(diagnostic.to_string(), "Dockerfile:2: unknown instruction: RUNN");
    }

    #[test]
    fn excerpt_survives_places_outside_the_file() {
        for span in [Span::lines(0, 0), Span::lines(9, 12), Span::lines(5, 1)] {
            let diagnostic =
                Diagnostic { source: "a\nb\n".into(), spans: vec![span], ..Default::default() };
            assert!(diagnostic.excerpt().contains('|'));
        }
        assert!(Diagnostic::default().render().starts_with("ERROR"));
        let empty = Diagnostic { spans: vec![Span::lines(1, 1)], ..Default::default() };
        assert!(empty.excerpt().ends_with("-\n"));
    }
}
