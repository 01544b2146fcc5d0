//! What a running build looks like: on a terminal, as lines, as JSON, or not at all. Everything goes to standard error.
//!
//! A [`Display`] has a thread of its own. Its [`sink`](Display::sink) queues events and returns at once; the thread
//! takes them in batches and hands them to the renderer. Updates of one status line replace each other in the queue.
//! Log data is kept until it was shown, unless a reader that stands still makes the queue grow beyond all measure.

mod plain;
mod quiet;
mod rawjson;
mod trace;
mod tty;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::{BufWriter, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use slipway_spec::Digest;
use slipway_spec::progress::{ProgressEvent, ProgressSink, Stream, Warning};

use crate::args::build::ProgressMode;
use crate::failure::excerpt::ranges_excerpt;
use crate::printer::Printer;
use crate::printer::text::clean;

/// Log data that may wait to be shown. A terminal that is stopped for longer loses the rest, and says so.
const MAX_WAITING_LOG_BYTES: usize = 32 << 20;
/// Waiting log data at which a renderer is woken before its time.
const WAKE_LOG_BYTES: usize = 1 << 20;

/// How the work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Everything was done.
    Success,
    /// Something failed, or the work was given up.
    Failure,
}

/// What a display looks like.
#[derive(Clone, Debug)]
pub(crate) struct DisplayOptions {
    /// The kind of display; [`ProgressMode::Auto`] was resolved before and counts as plain.
    pub(crate) mode: ProgressMode,
    /// What is being done, such as `Building`.
    pub(crate) phase: &'static str,
    /// A word at the right of the first line, such as the name of a builder.
    pub(crate) label: String,
    /// Whether colours may be used.
    pub(crate) color: bool,
    /// Rows of live output under each running step.
    pub(crate) log_rows: usize,
    /// Whether warnings are told with everything that is known of them.
    pub(crate) expand_warnings: bool,
}

/// A way to show events. Times count from the start of the display.
trait Renderer: Send {
    /// Takes an event.
    fn event(&mut self, at: Duration, event: &ProgressEvent);
    /// Shows what is to be shown by now.
    fn tick(&mut self, now: Duration);
    /// Shows the rest.
    fn finish(&mut self, now: Duration, ended: Ended);
    /// Returns how often to tick.
    fn pace(&self) -> Pace;
}

/// How often a renderer wants to tick.
#[derive(Clone, Copy, Debug)]
enum Pace {
    /// Whenever there are events, and after this time at the latest.
    Eager(Duration),
    /// Every so often.
    Steady(Duration),
    /// Only to take events.
    Idle,
}

/// A display at work. It must be [finished](Display::finish), so that the last events are shown before what follows;
/// one that is dropped shows them as those of a failure.
pub(crate) struct Display {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Display {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Display").finish_non_exhaustive()
    }
}

impl Display {
    /// Begins to show events on standard error.
    pub(crate) fn start(options: &DisplayOptions, printer: &Printer) -> Self {
        // Renderers flush when they have said what they wanted, so that a batch costs one system call.
        let out: Box<dyn Write + Send> = Box::new(BufWriter::new(printer.error_stream()));
        Self::run(match options.mode {
            ProgressMode::Tty => Box::new(tty::Tty::new(out, options, tty::screen_of_stderr)),
            ProgressMode::RawJson => Box::new(rawjson::RawJson::new(out, SystemTime::now())),
            ProgressMode::Quiet => Box::new(quiet::Quiet::new(out)),
            ProgressMode::None => Box::new(quiet::Silent),
            ProgressMode::Auto | ProgressMode::Plain => {
                Box::new(plain::Plain::new(out, options.color, options.expand_warnings))
            }
        })
    }

    fn run(mut renderer: Box<dyn Renderer>) -> Self {
        let queue = Arc::new(Queue::new());
        let source = Arc::clone(&queue);
        let thread = std::thread::Builder::new().name("progress".into()).spawn(move || {
            loop {
                let batch = source.take(renderer.pace());
                for Stamped { at, event } in &batch.events {
                    renderer.event(*at, event);
                }
                let now = source.start.elapsed();
                match batch.ended {
                    Some(ended) => return renderer.finish(now, ended),
                    None => renderer.tick(now),
                }
            }
        });
        // Without a thread there is no progress to see, which is no reason to give up the work.
        Self { queue, thread: thread.ok() }
    }

    /// Returns where events go. Events after the end are forgotten.
    pub(crate) fn sink(&self) -> Arc<dyn ProgressSink> {
        Arc::clone(&self.queue) as Arc<dyn ProgressSink>
    }

    /// Shows everything that was sent, and returns when it is written.
    pub(crate) fn finish(mut self, ended: Ended) {
        self.end(ended);
    }

    fn end(&mut self, ended: Ended) {
        self.queue.close(ended);
        if let Some(thread) = self.thread.take() {
            // A panic of the renderer has been reported by the panic hook; the work itself is not concerned.
            drop(thread.join());
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.end(Ended::Failure);
    }
}

struct Stamped {
    at: Duration,
    event: ProgressEvent,
}

#[derive(Default)]
struct Waiting {
    events: Vec<Stamped>,
    /// Where in `events` the last word on a status line is.
    statuses: HashMap<(Digest, Arc<str>), usize>,
    log_bytes: usize,
    /// Log data that was given up, by vertex.
    lost: BTreeMap<Digest, u64>,
    ended: Option<Ended>,
}

struct Batch {
    events: Vec<Stamped>,
    ended: Option<Ended>,
}

struct Queue {
    start: Instant,
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

impl Queue {
    fn new() -> Self {
        Self { start: Instant::now(), waiting: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, ended: Ended) {
        self.lock().ended.get_or_insert(ended);
        self.changed.notify_all();
    }

    /// Waits as the pace says and takes everything.
    fn take(&self, pace: Pace) -> Batch {
        let deadline = match pace {
            Pace::Eager(limit) | Pace::Steady(limit) => Some(Instant::now() + limit),
            Pace::Idle => None,
        };
        let eager = !matches!(pace, Pace::Steady(_));
        let mut waiting = self.lock();
        loop {
            let ready =
                waiting.log_bytes >= WAKE_LOG_BYTES || (eager && !waiting.events.is_empty());
            if waiting.ended.is_some() || ready {
                break;
            }
            let Some(deadline) = deadline else {
                waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            waiting =
                self.changed.wait_timeout(waiting, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        let ended = waiting.ended;
        let mut taken = std::mem::replace(&mut *waiting, Waiting { ended, ..Waiting::default() });
        drop(waiting);
        for (vertex, bytes) in std::mem::take(&mut taken.lost) {
            let note = format!(
                "\n[{bytes} bytes of output are not shown: they came faster than they could be written]\n"
            );
            let event = ProgressEvent::Log {
                vertex,
                stream: Stream::Stderr,
                data: note.into_bytes().into(),
            };
            taken.events.push(Stamped { at: self.start.elapsed(), event });
        }
        Batch { events: taken.events, ended }
    }
}

impl ProgressSink for Queue {
    fn send(&self, event: ProgressEvent) {
        let at = self.start.elapsed();
        let mut waiting = self.lock();
        if waiting.ended.is_some() {
            return;
        }
        match &event {
            ProgressEvent::Status { vertex, id, .. } => {
                let key = (vertex.clone(), Arc::clone(id));
                if let Some(place) = waiting.statuses.get(&key).copied()
                    && let Some(stamped) = waiting.events.get_mut(place)
                {
                    // The time stays that of the first update, which is when the part began.
                    stamped.event = event;
                    return;
                }
                let place = waiting.events.len();
                waiting.statuses.insert(key, place);
            }
            ProgressEvent::Log { vertex, data, .. } => {
                if waiting.log_bytes + data.len() > MAX_WAITING_LOG_BYTES {
                    *waiting.lost.entry(vertex.clone()).or_default() += data.len() as u64;
                    return;
                }
                waiting.log_bytes += data.len();
            }
            _ => {}
        }
        waiting.events.push(Stamped { at, event });
        drop(waiting);
        self.changed.notify_one();
    }
}

/// Returns a step's time, coarser as it grows: `0.113`, `1.23`, `12.3`.
fn seconds(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let decimals = if seconds < 1.0 {
        3
    } else if seconds < 10.0 {
        2
    } else {
        1
    };
    format!("{seconds:.decimals$}")
}

/// Writes the log of each failed step again, the last `lines` lines of it, so that it is found above the error.
fn repeat_failed(out: &mut dyn Write, trace: &trace::Trace, lines: usize) -> std::io::Result<()> {
    for step in trace.steps() {
        if !matches!(step.ended, Some((_, trace::Outcome::Failed(_)))) || step.log.is_empty() {
            continue;
        }
        writeln!(out, "------\n > {}:", step.title())?;
        for line in step.log.last(lines) {
            writeln!(out, "{} {}", seconds(line.at), line.text)?;
        }
        writeln!(out, "------")?;
    }
    Ok(())
}

/// Writes what is worth mending; expanded, with the lines of the file and where to read more.
fn list_warnings(
    out: &mut dyn Write,
    warnings: &[Arc<Warning>],
    expand: bool,
    color: bool,
) -> std::io::Result<()> {
    if warnings.is_empty() {
        return Ok(());
    }
    let (on, off) = if color { ("\x1b[33m", "\x1b[0m") } else { ("", "") };
    let plural = if warnings.len() == 1 { "" } else { "s" };
    let hint = if expand { "" } else { " (use slipway --debug to expand)" };
    writeln!(out, "\n {on}{} warning{plural} found{hint}:{off}", warnings.len())?;
    for warning in warnings {
        writeln!(out, " - {}", clean(&warning.short))?;
        if !expand {
            continue;
        }
        for line in &warning.detail {
            writeln!(out, "{}", clean(line))?;
        }
        if !warning.url.is_empty() {
            writeln!(out, "More info: {}", clean(&warning.url))?;
        }
        if let Some(source) = &warning.source {
            let text = String::from_utf8_lossy(&source.data);
            out.write_all(ranges_excerpt(&source.filename, &text, &warning.ranges).as_bytes())?;
        }
        writeln!(out)?;
    }
    Ok(())
}

#[cfg(test)]
mod script {
    //! Events for the tests of the renderers.

    use super::*;

    pub(super) fn vertex(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    pub(super) fn started(name: &str) -> ProgressEvent {
        ProgressEvent::Started { vertex: vertex(name), name: name.into() }
    }

    pub(super) fn cached(name: &str) -> ProgressEvent {
        ProgressEvent::Cached { vertex: vertex(name), name: name.into() }
    }

    pub(super) fn done(name: &str) -> ProgressEvent {
        ProgressEvent::Done { vertex: vertex(name) }
    }

    pub(super) fn failed(name: &str, error: &str) -> ProgressEvent {
        ProgressEvent::Failed { vertex: vertex(name), error: error.into() }
    }

    pub(super) fn canceled(name: &str) -> ProgressEvent {
        ProgressEvent::Canceled { vertex: vertex(name) }
    }

    pub(super) fn log(name: &str, data: &[u8]) -> ProgressEvent {
        ProgressEvent::Log { vertex: vertex(name), stream: Stream::Stdout, data: data.into() }
    }

    pub(super) fn status(
        name: &str,
        id: &str,
        current: u64,
        total: u64,
        done: bool,
    ) -> ProgressEvent {
        ProgressEvent::Status { vertex: vertex(name), id: id.into(), current, total, done }
    }

    pub(super) fn warning(text: &str) -> ProgressEvent {
        ProgressEvent::Warning {
            warning: Arc::new(Warning { level: 1, short: text.into(), ..Warning::default() }),
        }
    }

    pub(super) fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }
}

#[cfg(test)]
mod tests {
    use super::script::*;
    use super::*;
    use crate::printer::capture;

    fn options(mode: ProgressMode) -> DisplayOptions {
        DisplayOptions {
            mode,
            phase: "Building",
            label: String::new(),
            color: false,
            log_rows: 6,
            expand_warnings: false,
        }
    }

    #[test]
    fn nothing_that_was_sent_before_the_end_is_lost() {
        for mode in [ProgressMode::Plain, ProgressMode::RawJson] {
            let (printer, stdout, stderr) = capture::printer();
            let display = Display::start(&options(mode), &printer);
            let sink = display.sink();
            sink.send(started("step"));
            let writers: Vec<_> = (0..4)
                .map(|writer| {
                    let sink = display.sink();
                    std::thread::spawn(move || {
                        for line in 0..500 {
                            sink.send(log("step", format!("line {writer}/{line}.\n").as_bytes()));
                        }
                    })
                })
                .collect();
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            sink.send(done("step"));
            display.finish(Ended::Success);
            sink.send(started("too late"));
            let text = stderr.take();
            if mode == ProgressMode::Plain {
                assert_eq!(text.matches("line ").count(), 2000);
                assert!(text.contains("line 3/499.\n"));
            } else {
                assert_eq!(text.matches("\"stream\":1").count(), 2000);
            }
            assert!(!text.contains("too late"));
            assert_eq!(stdout.take(), "");
        }
    }

    #[test]
    fn updates_of_a_status_line_replace_each_other_while_they_wait() {
        let queue = Queue::new();
        queue.send(started("a"));
        (0..1000).for_each(|n| queue.send(status("a", "layer", n, 1000, false)));
        queue.send(status("a", "other", 1, 2, false));
        queue.send(status("a", "layer", 1000, 1000, true));
        let batch = queue.take(Pace::Eager(ms(0)));
        assert_eq!(batch.events.len(), 3);
        assert!(matches!(
            batch.events[1].event,
            ProgressEvent::Status { current: 1000, done: true, .. }
        ));
        queue.send(status("a", "layer", 5, 1000, false));
        assert_eq!(queue.take(Pace::Eager(ms(0))).events.len(), 1);
    }

    #[test]
    fn a_reader_that_stands_still_costs_bounded_memory() {
        let queue = Queue::new();
        let chunk = vec![b'x'; 1 << 20];
        (0..40).for_each(|_| queue.send(log("a", &chunk)));
        queue.close(Ended::Success);
        let batch = queue.take(Pace::Idle);
        assert_eq!(batch.events.len(), 33);
        let ProgressEvent::Log { data, .. } = &batch.events[32].event else { panic!("no note") };
        assert!(String::from_utf8_lossy(data).contains("[8388608 bytes"));
    }

    #[test]
    fn quiet_shows_only_the_log_of_a_failed_step() {
        for (mode, expected) in [
            (ProgressMode::Quiet, "------\n > bad:\n0.000 last words\n------\n"),
            (ProgressMode::None, ""),
        ] {
            let (printer, _, stderr) = capture::printer();
            let display = Display::start(&options(mode), &printer);
            for event in [
                started("good"),
                done("good"),
                started("bad"),
                log("bad", b"last words"),
                failed("bad", "no"),
            ] {
                display.sink().send(event);
            }
            display.finish(Ended::Failure);
            let text = stderr.take();
            // The time is the only part that differs from run to run.
            assert_eq!(text.lines().count(), expected.lines().count());
            assert!(text.starts_with(expected.split("0.000").next().unwrap()), "{text}");
        }
    }

    #[test]
    fn times_grow_coarser() {
        for (milliseconds, text) in
            [(0, "0.000"), (113, "0.113"), (1234, "1.23"), (12_345, "12.3"), (123_456, "123.5")]
        {
            assert_eq!(seconds(ms(milliseconds)), text);
        }
    }
}
