//! Progress as lines, for logs: each step has a number, and its lines stand together for as long as that is kind.

use std::collections::HashMap;
use std::io::{self, Write};
use std::time::Duration;

use slipway_spec::progress::ProgressEvent;

use super::trace::{Outcome, Part, Step, Trace};
use super::{Ended, Pace, Renderer, list_warnings, repeat_failed, seconds};
use crate::printer::text::clean;

/// A running step keeps the stage for this long after it got it or last said something.
const STAY: Duration = Duration::from_secs(5);
/// A running step that has something to say waits no longer than this.
const PATIENCE: Duration = Duration::from_secs(10);
/// A step with this many lines waits no longer either.
const MAX_WAITING_LINES: usize = 2000;
/// A status line is written again after this share of its total, in percent, …
const STATUS_PERCENT: u64 = 5;
/// … or after this time.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);
/// Times shorter than this are not worth writing.
const SHORT: Duration = Duration::from_millis(10);
/// Lines of a failed step's log that are written again at the end.
const REPEATED_LINES: usize = 10;

/// Writes progress as lines.
pub(super) struct Plain {
    out: Box<dyn Write + Send>,
    color: bool,
    /// Whether warnings are told with everything that is known of them.
    expand: bool,
    trace: Trace,
    shown: Vec<Shown>,
    /// The step that wrote last.
    stage: Option<Stage>,
    /// Steps that have ended and are not written to their end, in order.
    ended: Vec<usize>,
    /// How many steps have a number.
    numbered: usize,
}

struct Stage {
    step: usize,
    since: Duration,
}

/// What of a step was written.
#[derive(Default)]
struct Shown {
    number: Option<usize>,
    lines: Vec<String>,
    parts: HashMap<usize, ShownPart>,
    /// Since when something waits to be written.
    waiting_since: Option<Duration>,
    end_written: bool,
}

struct ShownPart {
    at: Duration,
    current: u64,
    ended: bool,
}

impl Plain {
    pub(super) fn new(out: Box<dyn Write + Send>, color: bool, expand: bool) -> Self {
        let trace = Trace::default();
        Self { out, color, expand, trace, shown: vec![], stage: None, ended: vec![], numbered: 0 }
    }

    fn flush(&mut self, now: Duration) -> io::Result<()> {
        // What has ended is written at once and whole; the step on stage goes first.
        let mut ended = std::mem::take(&mut self.ended);
        if let Some(place) =
            self.stage.as_ref().and_then(|stage| ended.iter().position(|step| *step == stage.step))
        {
            let step = ended.remove(place);
            ended.insert(0, step);
        }
        for step in ended {
            self.write(step, now)?;
        }
        let on_stage = self
            .stage
            .as_ref()
            .map(|stage| stage.step)
            .filter(|step| self.trace.steps()[*step].is_running());
        if let Some(step) = on_stage
            && self.has_news(step, now)
        {
            self.write(step, now)?;
        }
        if let Some(step) = self.next(on_stage, now) {
            self.write(step, now)?;
        }
        Ok(())
    }

    /// Returns the running step that gets the stage now: the one that waits longest.
    fn next(&self, on_stage: Option<usize>, now: Duration) -> Option<usize> {
        let (step, since) = (0..self.shown.len())
            .filter(|step| Some(*step) != on_stage && self.trace.steps()[*step].is_running())
            .filter(|step| self.trace.steps()[*step].name.is_some())
            .filter_map(|step| Some((step, self.shown[step].waiting_since?)))
            .min_by_key(|(step, since)| (*since, *step))?;
        let Some(stage) = self.stage.as_ref().filter(|_| on_stage.is_some()) else {
            return Some(step);
        };
        let waited = now.saturating_sub(since);
        let quiet_since = stage.since.max(self.trace.steps()[stage.step].log.last_at);
        let may_leave = now.saturating_sub(quiet_since) >= STAY;
        let must_leave = waited >= PATIENCE || self.shown[step].lines.len() >= MAX_WAITING_LINES;
        (may_leave || must_leave).then_some(step)
    }

    fn has_news(&self, step: usize, now: Duration) -> bool {
        let shown = &self.shown[step];
        !shown.lines.is_empty()
            || shown.number.is_none()
            || self.trace.steps()[step]
                .parts
                .iter()
                .enumerate()
                .any(|(n, part)| shown.part_is_due(n, part, now))
    }

    /// Brings a step up to date.
    fn write(&mut self, index: usize, now: Duration) -> io::Result<()> {
        let step = &self.trace.steps()[index];
        let shown = &mut self.shown[index];
        if shown.end_written && shown.lines.is_empty() {
            return Ok(());
        }
        let number = *shown.number.get_or_insert_with(|| {
            self.numbered += 1;
            self.numbered
        });
        let out = &mut self.out;
        if self.stage.as_ref().is_none_or(|stage| stage.step != index) {
            if let Some(before) = &self.stage {
                if let (true, Some(number)) =
                    (!self.shown[before.step].end_written, self.shown[before.step].number)
                {
                    writeln!(out, "#{number} ...")?;
                }
                writeln!(out)?;
            }
            writeln!(out, "#{number} {}", step.title())?;
            self.stage = Some(Stage { step: index, since: now });
        }
        let shown = &mut self.shown[index];
        shown.waiting_since = None;
        for (n, part) in step.parts.iter().enumerate() {
            if shown.part_is_due(n, part, now) {
                let ended = part.ended.is_some();
                shown.parts.insert(n, ShownPart { at: now, current: part.current, ended });
                let time = part.elapsed(now);
                let time = if time > SHORT {
                    format!(" {:.1}s", time.as_secs_f64())
                } else {
                    String::new()
                };
                writeln!(
                    out,
                    "#{number} {}{time}{}",
                    part.text(),
                    if ended { " done" } else { "" }
                )?;
            }
        }
        for line in shown.lines.drain(..) {
            writeln!(out, "#{number} {line}")?;
        }
        if !shown.end_written
            && let Some(end) = end_line(step, now)
        {
            shown.end_written = true;
            writeln!(out, "#{number} {end}")?;
        }
        Ok(())
    }

    fn note(&mut self, index: usize, at: Duration, lines: impl Iterator<Item = String>) {
        self.shown.resize_with(self.trace.steps().len(), Shown::default);
        let shown = &mut self.shown[index];
        shown.lines.extend(lines);
        shown.waiting_since.get_or_insert(at);
        if !self.trace.steps()[index].is_running() && !self.ended.contains(&index) {
            self.ended.push(index);
        }
    }

    fn write_rest(&mut self, now: Duration, ended: Ended) -> io::Result<()> {
        for change in self.trace.close(now, ended == Ended::Failure) {
            self.note(change.step, now, change.lines.into_iter().map(|line| log_text(&line)));
        }
        self.flush(now)?;
        for step in 0..self.shown.len() {
            if self.has_news(step, now) {
                self.write(step, now)?;
            }
        }
        repeat_failed(&mut self.out, &self.trace, REPEATED_LINES)?;
        list_warnings(&mut self.out, self.trace.warnings(), self.expand, self.color)
    }
}

impl Shown {
    /// Whether a part's line says enough that is new.
    fn part_is_due(&self, n: usize, part: &Part, now: Duration) -> bool {
        let Some(before) = self.parts.get(&n) else { return true };
        if before.ended {
            return false;
        }
        let grown = part.current.saturating_sub(before.current);
        let enough = part.total > 0
            && grown > 0
            && grown.saturating_mul(100) >= part.total.saturating_mul(STATUS_PERCENT);
        part.ended.is_some()
            || enough
            || (grown > 0 && now.saturating_sub(before.at) >= STATUS_INTERVAL)
    }
}

fn end_line(step: &Step, now: Duration) -> Option<String> {
    Some(match &step.ended.as_ref()?.1 {
        Outcome::Done => format!("DONE {:.1}s", step.elapsed(now).as_secs_f64()),
        Outcome::Cached => "CACHED".into(),
        Outcome::Failed(error) => format!("ERROR: {error}"),
        Outcome::Canceled => "CANCELED".into(),
    })
}

fn log_text(line: &super::trace::LogLine) -> String {
    format!("{} {}", seconds(line.at), line.text).trim_end().to_owned()
}

impl Renderer for Plain {
    fn event(&mut self, at: Duration, event: &ProgressEvent) {
        if let Some(change) = self.trace.apply(at, event) {
            let warning = match event {
                ProgressEvent::Warning { warning } => {
                    Some(format!("WARN: {}", clean(&warning.short)))
                }
                _ => None,
            };
            let lines = change.lines.into_iter().map(|line| log_text(&line));
            self.note(change.step, at, warning.into_iter().chain(lines));
        }
    }

    fn tick(&mut self, now: Duration) {
        // Progress that cannot be written is no failure of the work.
        drop(self.flush(now).and_then(|()| self.out.flush()));
    }

    fn finish(&mut self, now: Duration, ended: Ended) {
        drop(self.write_rest(now, ended).and_then(|()| self.out.flush()));
    }

    fn pace(&self) -> Pace {
        Pace::Eager(Duration::from_secs(1))
    }
}

#[cfg(test)]
mod tests {
    use super::super::script::*;
    use super::*;
    use crate::printer::capture::Buffer;

    /// Plays events at their times, in milliseconds, and returns what was written.
    fn play(events: &[(u64, ProgressEvent)], end: u64, ended: Ended) -> String {
        let buffer = Buffer::default();
        let mut plain = Plain::new(Box::new(buffer.clone()), false, false);
        for (at, event) in events {
            plain.event(ms(*at), event);
            plain.tick(ms(*at));
        }
        plain.finish(ms(end), ended);
        buffer.take()
    }

    #[test]
    fn a_failing_build() {
        let load = "[internal] load build definition from Dockerfile";
        let run = "[linux/arm64 2/2] RUN false";
        let error = "process \"/bin/sh -c false\" did not complete successfully: exit code: 1";
        let events = [
            (0, started(load)),
            (3, status(load, "transferring dockerfile:", 212, 0, true)),
            (4, done(load)),
            (5, cached("[linux/arm64 1/2] FROM alpine")),
            (10, started(run)),
            (123, log(run, b"some output\n")),
            (200, failed(run, error)),
            (201, started("other")),
        ];
        assert_eq!(
            play(&events, 300, Ended::Failure),
            "\
#1 [internal] load build definition from Dockerfile
#1 transferring dockerfile: 212B done
#1 DONE 0.0s

#2 [linux/arm64 1/2] FROM alpine
#2 CACHED

#3 [linux/arm64 2/2] RUN false
#3 0.113 some output
#3 ERROR: process \"/bin/sh -c false\" did not complete successfully: exit code: 1

#4 other
#4 CANCELED
------
 > [linux/arm64 2/2] RUN false:
0.113 some output
------
"
        );
    }

    #[test]
    fn the_stage_changes_seldom() {
        let mut events = vec![(0, started("a")), (10, started("b"))];
        events.extend((1..=8).map(|n| (n * 1000, log("a", format!("a{n}\n").as_bytes()))));
        events.push((500, log("b", b"b1\n")));
        events.extend((9..=12).map(|n| (n * 1000, log("a", format!("a{n}\n").as_bytes()))));
        events.push((12_500, done("a")));
        events.push((13_000, log("b", b"b2\n")));
        events.push((14_000, done("b")));
        events.sort_by_key(|(at, _)| *at);
        assert_eq!(
            play(&events, 14_000, Ended::Success),
            "\
#1 a
#1 1.00 a1
#1 2.00 a2
#1 3.00 a3
#1 4.00 a4
#1 5.00 a5
#1 6.00 a6
#1 7.00 a7
#1 8.00 a8
#1 9.00 a9
#1 10.0 a10
#1 11.0 a11
#1 ...

#2 b
#2 0.490 b1
#2 ...

#1 a
#1 12.0 a12
#1 DONE 12.5s

#2 b
#2 13.0 b2
#2 DONE 14.0s
"
        );
    }

    #[test]
    fn a_quiet_step_leaves_the_stage_after_a_while() {
        let events = [
            (0, started("a")),
            (1000, started("b")),
            (2000, log("b", b"x\n")),
            (5100, warning("w")),
        ];
        let written = play(&events, 6000, Ended::Success);
        assert_eq!(
            written,
            "#1 a\n#1 ...\n\n#2 b\n#2 1.00 x\n\n 1 warning found (use slipway --debug to expand):\n - w\n"
        );
    }

    #[test]
    fn warnings_stand_with_their_step_and_at_the_end() {
        let warning = slipway_spec::progress::Warning {
            vertex: Some(vertex("a")),
            short: "mend this".into(),
            ..Default::default()
        };
        let event = ProgressEvent::Warning { warning: warning.into() };
        // Told twice, as by two platforms, it is shown once.
        let events = [(0, started("a")), (100, event.clone()), (100, event), (200, done("a"))];
        let written = play(&events, 300, Ended::Success);
        assert_eq!(
            written,
            "#1 a\n#1 WARN: mend this\n#1 DONE 0.2s\n\n 1 warning found (use slipway --debug to expand):\n - mend this\n"
        );
    }

    #[test]
    fn status_lines_are_rare() {
        let mut events = vec![(0, started("a"))];
        events.extend((0..=100).map(|n| (n, status("a", "blob", n * 10_000, 1_000_000, n == 100))));
        events.push((200, status("a", "slow", 0, 1_000_000, false)));
        events.push((300, status("a", "slow", 1, 1_000_000, false)));
        events.push((5300, status("a", "slow", 2, 1_000_000, false)));
        events.push((5400, done("a")));
        let written = play(&events, 5400, Ended::Success);
        assert_eq!(written.matches("blob").count(), 21);
        assert!(written.contains("\n#1 blob 1.00MB / 1.00MB 0.1s done\n"));
        assert!(
            written.ends_with("#1 slow 0B / 1.00MB\n#1 slow 2B / 1.00MB 5.1s\n#1 DONE 5.4s\n"),
            "{written}"
        );
    }

    #[test]
    fn unfinished_lines_and_late_names_are_shown_in_the_end() {
        let events = [
            (0, log("a", b"no newline")),
            (5, started("a")),
            (1000, status("b", "part", 0, 0, false)),
        ];
        let written = play(&events, 2000, Ended::Success);
        assert_eq!(
            written,
            format!("#1 a\n#1 2.00 no newline\n#1 ...\n\n#2 {}\n#2 part 1.0s\n", vertex("b"))
        );
    }

    #[test]
    fn control_sequences_do_not_reach_the_log() {
        let events = [
            (0, started("\x1b[2Jname")),
            (1, log("\x1b[2Jname", b"\x1b[31mred\x1b[0m \x1b]0;t\x07x\r\n10%\r20%\n")),
            (2, failed("\x1b[2Jname", "\x1b[1mbad\nworse")),
        ];
        let written = play(&events, 3, Ended::Failure);
        assert_eq!(
            written,
            "#1 name\n#1 0.001 red x\n#1 0.001 20%\n#1 ERROR: bad; worse\n------\n > name:\n0.001 red x\n0.001 20%\n------\n"
        );
    }

    #[test]
    fn many_steps_at_once_all_come_to_an_end() {
        let names: Vec<String> = (0..300).map(|n| format!("step {n}")).collect();
        let mut events: Vec<_> = names.iter().map(|name| (0, started(name))).collect();
        events.extend(names.iter().rev().map(|name| (1, log(name, b"line\n"))));
        events.extend(names.iter().rev().map(|name| (2, done(name))));
        let written = play(&events, 3, Ended::Success);
        assert_eq!(written.matches(" DONE 0.0s\n").count(), 300);
        assert_eq!(written.matches(" line\n").count(), 300);
    }
}
