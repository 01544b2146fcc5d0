//! No progress: nothing but the log of a failed step, or nothing at all.

use std::io::Write;
use std::time::Duration;

use slipway_spec::progress::ProgressEvent;

use super::trace::Trace;
use super::{Ended, Pace, Renderer, repeat_failed};

/// Lines of a failed step's log.
const LINES: usize = 10;

/// Shows the log of a failed step at the end.
pub(super) struct Quiet {
    out: Box<dyn Write + Send>,
    trace: Trace,
}

impl Quiet {
    pub(super) fn new(out: Box<dyn Write + Send>) -> Self {
        Self { out, trace: Trace::default() }
    }
}

impl Renderer for Quiet {
    fn event(&mut self, at: Duration, event: &ProgressEvent) {
        self.trace.apply(at, event);
    }

    fn tick(&mut self, _now: Duration) {}

    fn finish(&mut self, _now: Duration, _ended: Ended) {
        // Progress that cannot be written is no failure of the work.
        drop(repeat_failed(&mut self.out, &self.trace, LINES).and_then(|()| self.out.flush()));
    }

    fn pace(&self) -> Pace {
        Pace::Idle
    }
}

/// Shows nothing.
pub(super) struct Silent;

impl Renderer for Silent {
    fn event(&mut self, _at: Duration, _event: &ProgressEvent) {}

    fn tick(&mut self, _now: Duration) {}

    fn finish(&mut self, _now: Duration, _ended: Ended) {}

    fn pace(&self) -> Pace {
        Pace::Idle
    }
}
