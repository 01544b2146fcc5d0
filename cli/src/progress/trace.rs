//! What is known of the steps of a build, from the events so far.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use slipway_spec::Digest;
use slipway_spec::progress::{ProgressEvent, Stream, Warning};

use crate::printer::size::steady;
use crate::printer::text::{clean, clean_bytes};

/// Lines of a step's log that are kept for the moment it fails.
const KEPT_LINES: usize = 200;
/// An unfinished line longer than this is shown in pieces.
const MAX_LINE_BYTES: usize = 16 << 10;

/// How a step ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was done.
    Done,
    /// Its result was there already.
    Cached,
    /// It failed, for this reason.
    Failed(String),
    /// It was given up.
    Canceled,
}

/// One vertex.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) digest: Digest,
    /// Its name, once announced.
    pub(super) name: Option<String>,
    pub(super) started: Option<Duration>,
    pub(super) ended: Option<(Duration, Outcome)>,
    pub(super) parts: Vec<Part>,
    pub(super) log: Log,
    /// What is worth mending in it, one line each.
    pub(super) warnings: Vec<String>,
}

impl Step {
    /// Returns the name, or the digest of a step that was never announced.
    pub(super) fn title(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.digest.to_string())
    }

    /// Returns how long the step took, or takes until now.
    pub(super) fn elapsed(&self, now: Duration) -> Duration {
        let end = self.ended.as_ref().map_or(now, |(end, _)| *end);
        self.started.map_or(Duration::ZERO, |start| end.saturating_sub(start))
    }

    /// Whether the step has begun and not ended.
    pub(super) fn is_running(&self) -> bool {
        self.ended.is_none()
    }
}

/// A part of a step with a line of its own, such as a blob on its way.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) id: String,
    pub(super) current: u64,
    pub(super) total: u64,
    pub(super) started: Duration,
    pub(super) ended: Option<Duration>,
}

impl Part {
    /// Returns name and sizes: `sha256:… 1.20MB / 3.40MB`.
    pub(super) fn text(&self) -> String {
        match (self.current, self.total) {
            (0, 0) => self.id.clone(),
            (current, 0) => format!("{} {}", self.id, steady(current)),
            (current, total) => format!("{} {} / {}", self.id, steady(current), steady(total)),
        }
    }

    /// Returns how long the part took, or takes until now.
    pub(super) fn elapsed(&self, now: Duration) -> Duration {
        self.ended.unwrap_or(now).saturating_sub(self.started)
    }
}

/// A line that a step wrote, and when, counted from the step's start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LogLine {
    pub(super) at: Duration,
    pub(super) text: String,
}

/// The end of what a step wrote.
#[derive(Debug, Default)]
pub(super) struct Log {
    lines: VecDeque<LogLine>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// When something was last written.
    pub(super) last_at: Duration,
}

impl Log {
    /// Whether nothing was written, or nothing is kept.
    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Returns the last lines.
    pub(super) fn last(&self, count: usize) -> impl Iterator<Item = &LogLine> {
        self.lines.iter().skip(self.lines.len().saturating_sub(count))
    }

    /// Returns the last rows as they stand now, unfinished lines included.
    pub(super) fn live(&self, count: usize) -> Vec<String> {
        let mut rows: Vec<String> = self.last(count).map(|line| line.text.clone()).collect();
        rows.extend(
            [&self.stdout, &self.stderr]
                .into_iter()
                .filter(|part| !part.is_empty())
                .map(|part| clean_bytes(part)),
        );
        rows.drain(..rows.len().saturating_sub(count));
        rows
    }

    /// Adds bytes, and returns the lines that they complete.
    fn push(&mut self, stream: Stream, data: &[u8], at: Duration) -> Vec<LogLine> {
        let mut complete = vec![];
        let partial = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            partial.extend_from_slice(piece);
            if partial.pop_if(|byte| *byte == b'\n').is_some() {
                complete.push(LogLine { at, text: clean_bytes(partial) });
                partial.clear();
            } else if partial.len() > MAX_LINE_BYTES {
                shorten(partial, |text| complete.push(LogLine { at, text }));
            }
        }
        self.keep(&complete);
        complete
    }

    /// Ends the unfinished lines, and returns them.
    fn close(&mut self, at: Duration) -> Vec<LogLine> {
        let parts = [std::mem::take(&mut self.stdout), std::mem::take(&mut self.stderr)];
        let lines: Vec<_> = parts
            .iter()
            .filter(|part| !part.is_empty())
            .map(|part| LogLine { at, text: clean_bytes(part) })
            .collect();
        self.keep(&lines);
        lines
    }

    fn keep(&mut self, lines: &[LogLine]) {
        self.lines.extend(lines.iter().cloned());
        self.lines.drain(..self.lines.len().saturating_sub(KEPT_LINES));
    }
}

/// Makes an unfinished line shorter: what a carriage return will overwrite goes, or else a first piece is shown.
fn shorten(partial: &mut Vec<u8>, mut show: impl FnMut(String)) {
    if let Some(last_return) = partial.iter().rposition(|byte| *byte == b'\r')
        && last_return > 0
    {
        partial.drain(..last_return);
        if partial.len() <= MAX_LINE_BYTES {
            return;
        }
    }
    // The piece ends before a character that may go on in the next bytes.
    let end = match std::str::from_utf8(partial) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        _ => partial.len(),
    };
    show(clean_bytes(&partial[..end]));
    partial.drain(..end);
}

/// What an event changed.
#[derive(Debug)]
pub(super) struct Change {
    /// Which step.
    pub(super) step: usize,
    /// Lines that its log gained.
    pub(super) lines: Vec<LogLine>,
}

/// All steps, in the order in which they were first heard of.
#[derive(Debug, Default)]
pub(super) struct Trace {
    steps: Vec<Step>,
    by_digest: HashMap<Digest, usize>,
    warnings: Vec<Arc<Warning>>,
}

impl Trace {
    /// Returns the steps.
    pub(super) fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Returns the warnings, each once: several platforms often warn of the same line.
    pub(super) fn warnings(&self) -> &[Arc<Warning>] {
        &self.warnings
    }

    /// Takes an event. Returns `None` if it concerns no step.
    pub(super) fn apply(&mut self, at: Duration, event: &ProgressEvent) -> Option<Change> {
        let digest = match event {
            ProgressEvent::Warning { warning } => return self.warn(warning),
            ProgressEvent::Started { vertex, .. }
            | ProgressEvent::Cached { vertex, .. }
            | ProgressEvent::Status { vertex, .. }
            | ProgressEvent::Log { vertex, .. }
            | ProgressEvent::Done { vertex }
            | ProgressEvent::Failed { vertex, .. }
            | ProgressEvent::Canceled { vertex } => vertex,
        };
        let index = self.index(digest);
        let step = &mut self.steps[index];
        // An event of a step tells that it has begun, also when its announcement comes late.
        let started = *step.started.get_or_insert(at);
        let since_start = at.saturating_sub(started);
        let lines = match event {
            ProgressEvent::Started { name, .. } => {
                step.name.get_or_insert_with(|| clean(name));
                vec![]
            }
            ProgressEvent::Cached { name, .. } => {
                step.name.get_or_insert_with(|| clean(name));
                step.end(at, Outcome::Cached)
            }
            ProgressEvent::Status { id, current, total, done, .. } => {
                step.part(at, id, (*current, *total), *done);
                vec![]
            }
            ProgressEvent::Log { stream, data, .. } => {
                step.log.last_at = at;
                step.log.push(*stream, data, since_start)
            }
            ProgressEvent::Done { .. } => step.end(at, Outcome::Done),
            ProgressEvent::Failed { error, .. } => step
                .end(at, Outcome::Failed(error.lines().map(clean).collect::<Vec<_>>().join("; "))),
            ProgressEvent::Canceled { .. } => step.end(at, Outcome::Canceled),
            ProgressEvent::Warning { .. } => vec![],
        };
        Some(Change { step: index, lines })
    }

    /// Keeps a warning, unless the same was told before. Returns the step that it belongs to.
    fn warn(&mut self, warning: &Arc<Warning>) -> Option<Change> {
        let same = |known: &Arc<Warning>| {
            known.short == warning.short
                && known.ranges == warning.ranges
                && known.url == warning.url
        };
        if self.warnings.iter().any(same) {
            return None;
        }
        self.warnings.push(Arc::clone(warning));
        let step = *self.by_digest.get(warning.vertex.as_ref()?)?;
        self.steps[step].warnings.push(clean(&warning.short));
        Some(Change { step, lines: vec![] })
    }

    /// Ends what is unfinished: lines, and the steps that nobody will end any more.
    pub(super) fn close(&mut self, at: Duration, cancel: bool) -> Vec<Change> {
        let mut changes = vec![];
        for (index, step) in self.steps.iter_mut().enumerate() {
            let lines = if step.is_running() && cancel {
                step.end(at, Outcome::Canceled)
            } else {
                let since_start = step.started.map_or(at, |start| at.saturating_sub(start));
                step.log.close(since_start)
            };
            changes.push(Change { step: index, lines });
        }
        changes
    }

    fn index(&mut self, digest: &Digest) -> usize {
        if let Some(index) = self.by_digest.get(digest) {
            return *index;
        }
        let index = self.steps.len();
        self.steps.push(Step {
            digest: digest.clone(),
            name: None,
            started: None,
            ended: None,
            parts: vec![],
            log: Log::default(),
            warnings: vec![],
        });
        self.by_digest.insert(digest.clone(), index);
        index
    }
}

impl Step {
    /// Ends the step, once. Returns the lines that were unfinished.
    fn end(&mut self, at: Duration, outcome: Outcome) -> Vec<LogLine> {
        if self.ended.is_some() {
            return vec![];
        }
        let lines = self.log.close(self.elapsed(at));
        if !matches!(outcome, Outcome::Failed(_)) {
            // Only a failed step's log is shown again.
            self.log.lines = VecDeque::new();
        }
        self.ended = Some((at, outcome));
        lines
    }

    fn part(&mut self, at: Duration, id: &str, (current, total): (u64, u64), done: bool) {
        let id = clean(id);
        let place = self.parts.iter().position(|part| part.id == id).unwrap_or_else(|| {
            self.parts.push(Part { id, current, total, started: at, ended: None });
            self.parts.len() - 1
        });
        let part = &mut self.parts[place];
        (part.current, part.total) = (current, total);
        if done {
            part.ended.get_or_insert(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::script::*;
    use super::*;

    fn texts(lines: &[LogLine]) -> Vec<&str> {
        lines.iter().map(|line| line.text.as_str()).collect()
    }

    #[test]
    fn lines_and_characters_may_be_cut_anywhere() {
        let text = "première\nzweite — Zeile\n三\n".as_bytes();
        for size in 1..text.len() {
            let mut trace = Trace::default();
            trace.apply(ms(0), &started("a"));
            let lines: Vec<_> = text
                .chunks(size)
                .flat_map(|data| trace.apply(ms(5), &log("a", data)).unwrap().lines)
                .collect();
            assert_eq!(texts(&lines), ["première", "zweite — Zeile", "三"], "{size}");
        }
    }

    #[test]
    fn streams_do_not_cut_into_each_other_and_the_end_ends_their_lines() {
        let mut trace = Trace::default();
        trace.apply(ms(0), &started("a"));
        let stderr = |data: &[u8]| ProgressEvent::Log {
            vertex: vertex("a"),
            stream: Stream::Stderr,
            data: data.into(),
        };
        assert_eq!(texts(&trace.apply(ms(1), &log("a", b"out")).unwrap().lines), [""; 0]);
        assert_eq!(texts(&trace.apply(ms(2), &stderr(b"err\nmore")).unwrap().lines), ["err"]);
        assert_eq!(trace.steps()[0].log.live(6), ["err", "out", "more"]);
        assert_eq!(texts(&trace.apply(ms(3), &log("a", b"put\n")).unwrap().lines), ["output"]);
        assert_eq!(texts(&trace.apply(ms(4), &failed("a", "x\ny")).unwrap().lines), ["more"]);
        assert_eq!(trace.steps()[0].ended, Some((ms(4), Outcome::Failed("x; y".into()))));
        assert_eq!(trace.steps()[0].log.last(2).count(), 2);
        assert!(trace.apply(ms(5), &done("a")).unwrap().lines.is_empty());
        assert!(matches!(trace.steps()[0].ended, Some((_, Outcome::Failed(_)))));
    }

    #[test]
    fn endless_lines_cost_bounded_memory() {
        let mut trace = Trace::default();
        let lines: Vec<_> = (0..100)
            .flat_map(|_| trace.apply(ms(1), &log("a", "é".repeat(1001).as_bytes())).unwrap().lines)
            .collect();
        let shown: usize = lines.iter().map(|line| line.text.len()).sum();
        assert!(shown > 100 * 2002 - 2 * MAX_LINE_BYTES);
        assert!(lines.iter().all(|line| !line.text.contains('\u{fffd}')));

        let mut trace = Trace::default();
        for percent in 0..100_000 {
            let lines = trace
                .apply(ms(1), &log("a", format!("\r{percent} of it").as_bytes()))
                .unwrap()
                .lines;
            assert!(lines.is_empty());
        }
        assert_eq!(texts(&trace.apply(ms(2), &log("a", b"\n")).unwrap().lines), ["99999 of it"]);
    }

    #[test]
    fn only_the_end_of_a_log_is_kept() {
        let mut trace = Trace::default();
        (0..1000).for_each(|n| drop(trace.apply(ms(1), &log("a", format!("{n}\n").as_bytes()))));
        assert_eq!(trace.steps()[0].log.last(usize::MAX).count(), KEPT_LINES);
        assert_eq!(trace.steps()[0].log.last(1).next().unwrap().text, "999");
        trace.apply(ms(2), &done("a"));
        assert!(trace.steps()[0].log.is_empty());
    }

    #[test]
    fn announcements_may_come_late_or_not_at_all() {
        let mut trace = Trace::default();
        trace.apply(ms(1), &status("a", "part", 1, 2, false));
        assert_eq!(trace.steps()[0].title(), vertex("a").to_string());
        trace.apply(ms(2), &started("a"));
        assert_eq!((trace.steps()[0].title(), trace.steps()[0].started), ("a".into(), Some(ms(1))));
        trace.apply(ms(3), &cached("b"));
        assert_eq!(trace.steps()[1].ended, Some((ms(3), Outcome::Cached)));
        trace.apply(ms(4), &warning("same"));
        trace.apply(ms(4), &warning("same"));
        assert_eq!(trace.warnings().len(), 1);
        assert_eq!(trace.warnings()[0].short, "same");
        trace.close(ms(9), true);
        assert_eq!(trace.steps()[0].ended, Some((ms(9), Outcome::Canceled)));
    }
}
