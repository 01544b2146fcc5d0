//! Progress on a terminal, redrawn in place.

use std::io::{self, Write};
use std::time::Duration;

use slipway_spec::progress::ProgressEvent;

use super::trace::{Outcome, Step, Trace};
use super::{DisplayOptions, Ended, Pace, Renderer, list_warnings, repeat_failed};
use crate::printer::text::{fit, width};

/// The least time between two drawings.
const INTERVAL: Duration = Duration::from_millis(100);
/// The size of a screen that does not tell.
const DEFAULT_SCREEN: Screen = Screen { columns: 80, rows: 10 };
/// A line with fewer columns than this for its text is left out.
const MIN_COLUMNS: usize = 12;

/// The size of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Screen {
    pub(super) columns: usize,
    pub(super) rows: usize,
}

/// Returns the size of the terminal that standard error is.
pub(super) fn screen_of_stderr() -> Screen {
    match rustix::termios::tcgetwinsize(std::io::stderr()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
            Screen { columns: size.ws_col.into(), rows: size.ws_row.into() }
        }
        _ => DEFAULT_SCREEN,
    }
}

/// Draws progress.
pub(super) struct Tty {
    out: Box<dyn Write + Send>,
    screen: fn() -> Screen,
    phase: &'static str,
    label: String,
    color: bool,
    /// Whether warnings are told with everything that is known of them.
    expand: bool,
    log_rows: usize,
    trace: Trace,
    /// Rows of the drawing that stands on the screen.
    drawn: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Normal,
    Faint,
    Blue,
    Yellow,
    Red,
}

impl Style {
    fn code(self) -> Option<&'static str> {
        match self {
            Self::Normal => None,
            Self::Faint => Some("\x1b[2m"),
            Self::Blue => Some("\x1b[34m"),
            Self::Yellow => Some("\x1b[33m"),
            Self::Red => Some("\x1b[31m"),
        }
    }
}

#[derive(Debug)]
struct Row {
    text: String,
    style: Style,
}

impl Tty {
    pub(super) fn new(
        out: Box<dyn Write + Send>,
        options: &DisplayOptions,
        screen: fn() -> Screen,
    ) -> Self {
        Self {
            out,
            screen,
            phase: options.phase,
            label: options.label.clone(),
            color: options.color,
            expand: options.expand_warnings,
            log_rows: options.log_rows,
            trace: Trace::default(),
            drawn: 0,
        }
    }

    fn draw(&mut self, now: Duration, last: bool) -> io::Result<()> {
        if self.trace.steps().is_empty() {
            return Ok(());
        }
        let screen = (self.screen)();
        let rows = if last { self.all_rows(now, screen) } else { self.rows_that_fit(now, screen) };
        // One write, so that a half-drawn frame is never seen; the cursor is hidden only within it, so that it is
        // there again however the program ends.
        let mut frame = String::from("\x1b[?25l");
        // Rows that scrolled off, as when the window shrank, cannot be drawn again.
        let up = self.drawn.min(screen.rows.saturating_sub(1));
        if up > 0 {
            frame.push_str(&format!("\x1b[{up}A"));
        }
        frame.push('\r');
        for row in &rows {
            frame.push_str("\x1b[2K");
            match row.style.code().filter(|_| self.color) {
                Some(code) => {
                    frame.push_str(code);
                    frame.push_str(&row.text);
                    frame.push_str("\x1b[0m");
                }
                None => frame.push_str(&row.text),
            }
            frame.push_str("\r\n");
        }
        frame.push_str("\x1b[J\x1b[?25h");
        self.drawn = rows.len();
        self.out.write_all(frame.as_bytes())?;
        self.out.flush()
    }

    fn header(&self, now: Duration, screen: Screen) -> Row {
        let steps = self.trace.steps();
        let total = steps.len();
        let done = steps.iter().filter(|step| !step.is_running()).count();
        let finished = if done == total { " FINISHED" } else { "" };
        let left =
            format!("[+] {} {:.1}s ({done}/{total}){finished}", self.phase, now.as_secs_f64());
        let gap = screen.columns.saturating_sub(width(&left) + width(&self.label));
        let text = if gap > 0 {
            left + &" ".repeat(gap) + &self.label
        } else {
            fit(&left, screen.columns)
        };
        Row { text: text.trim_end().into(), style: Style::Normal }
    }

    /// Returns the rows of a step without its log.
    fn step_rows(step: &Step, now: Duration, screen: Screen) -> Vec<Row> {
        let (word, style) = match step.ended.as_ref().map(|(_, outcome)| outcome) {
            None => ("", Style::Normal),
            Some(Outcome::Done) => ("", Style::Blue),
            Some(Outcome::Cached) => ("CACHED ", Style::Blue),
            Some(Outcome::Failed(_)) => ("ERROR ", Style::Red),
            Some(Outcome::Canceled) => ("CANCELED ", Style::Yellow),
        };
        let mut rows: Vec<_> =
            timed_row(&format!(" => {word}{}", step.title()), step.elapsed(now), screen, style)
                .into_iter()
                .collect();
        rows.extend(step.parts.iter().filter_map(|part| {
            let style = if part.ended.is_some() || !step.is_running() {
                style_of_part(style)
            } else {
                Style::Normal
            };
            // A part that nobody ended ended with its step.
            let until = step.ended.as_ref().map_or(now, |(end, _)| *end);
            timed_row(&format!(" => => {}", part.text()), part.elapsed(until), screen, style)
        }));
        rows.extend(step.warnings.iter().map(|warning| Row {
            text: fit(&format!(" => => WARN: {warning}"), screen.columns),
            style: Style::Yellow,
        }));
        rows
    }

    fn all_rows(&self, now: Duration, screen: Screen) -> Vec<Row> {
        let mut rows = vec![self.header(now, screen)];
        rows.extend(self.trace.steps().iter().flat_map(|step| Self::step_rows(step, now, screen)));
        rows
    }

    /// Returns as many rows as the screen holds. Running steps come first, then the output of those that wrote last,
    /// then the steps that ended last; all stand in their order.
    fn rows_that_fit(&self, now: Duration, screen: Screen) -> Vec<Row> {
        // The cursor stands in the row below the drawing.
        let room = screen.rows.saturating_sub(1);
        let steps = self.trace.steps();
        let mut blocks: Vec<Vec<Row>> =
            steps.iter().map(|step| Self::step_rows(step, now, screen)).collect();
        let mut free = room.saturating_sub(1);
        for (_, rows) in steps.iter().zip(&mut blocks).filter(|(step, _)| step.is_running()) {
            rows.truncate(free);
            free -= rows.len();
        }
        let mut talking: Vec<usize> = (0..steps.len()).filter(|n| steps[*n].is_running()).collect();
        talking.sort_by_key(|n| std::cmp::Reverse(steps[*n].log.last_at));
        for n in talking {
            let lines = steps[n].log.live(self.log_rows.min(free));
            free -= lines.len();
            blocks[n].extend(lines.iter().map(|line| Row {
                text: fit(&format!(" => => # {line}"), screen.columns),
                style: Style::Faint,
            }));
        }
        let mut ended: Vec<(usize, Duration)> = steps
            .iter()
            .enumerate()
            .filter_map(|(n, step)| Some((n, step.ended.as_ref()?.0)))
            .collect();
        ended.sort_by_key(|(n, at)| std::cmp::Reverse((*at, *n)));
        for (n, _) in ended {
            // Once one is left out, so are all that ended before it.
            if blocks[n].len() > free {
                free = 0;
                blocks[n].clear();
            }
            free -= blocks[n].len();
        }
        std::iter::once(self.header(now, screen))
            .chain(blocks.into_iter().flatten())
            .take(room)
            .collect()
    }
}

fn style_of_part(style: Style) -> Style {
    if style == Style::Normal { Style::Blue } else { style }
}

/// Makes a row of a text, cut if need be, and a time at the right edge.
fn timed_row(text: &str, time: Duration, screen: Screen, style: Style) -> Option<Row> {
    let time = format!("{:.1}s", time.as_secs_f64());
    let columns = screen.columns.saturating_sub(time.len() + 1);
    if columns < MIN_COLUMNS {
        return None;
    }
    let shown = fit(text, columns);
    let gap = columns - width(&shown) + 1;
    Some(Row { text: shown + &" ".repeat(gap) + &time, style })
}

impl Renderer for Tty {
    fn event(&mut self, at: Duration, event: &ProgressEvent) {
        self.trace.apply(at, event);
    }

    fn tick(&mut self, now: Duration) {
        // Progress that cannot be written is no failure of the work.
        drop(self.draw(now, false));
    }

    fn finish(&mut self, now: Duration, ended: Ended) {
        self.trace.close(now, ended == Ended::Failure);
        let written = self
            .draw(now, true)
            .and_then(|()| repeat_failed(&mut self.out, &self.trace, usize::MAX))
            .and_then(|()| {
                list_warnings(&mut self.out, self.trace.warnings(), self.expand, self.color)
            })
            .and_then(|()| self.out.flush());
        drop(written);
    }

    fn pace(&self) -> Pace {
        Pace::Steady(INTERVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::super::script::*;
    use super::*;
    use crate::args::build::ProgressMode;
    use crate::printer::capture::Buffer;

    /// A display on a terminal that is played by another implementation.
    struct Stage {
        tty: Tty,
        buffer: Buffer,
        terminal: vt100::Parser,
    }

    impl Stage {
        fn new(columns: u16, rows: u16, screen: fn() -> Screen, color: bool) -> Self {
            let buffer = Buffer::default();
            let options = DisplayOptions {
                mode: ProgressMode::Tty,
                phase: "Building",
                label: "slipway".into(),
                color,
                expand_warnings: false,
                log_rows: 6,
            };
            let tty = Tty::new(Box::new(buffer.clone()), &options, screen);
            let mut terminal = vt100::Parser::new(rows, columns, 100);
            terminal.process(b"$ slipway build .\r\n");
            Self { tty, buffer, terminal }
        }

        fn play(&mut self, events: &[(u64, ProgressEvent)]) {
            for (at, event) in events {
                self.tty.event(ms(*at), event);
                self.tty.tick(ms(*at));
                self.look();
            }
        }

        fn look(&mut self) -> String {
            // The kernel's terminal turns line feeds of the plain blocks into line ends.
            let text = self.buffer.take().replace("\r\n", "\n").replace('\n', "\r\n");
            self.terminal.process(text.as_bytes());
            assert!(!self.terminal.screen().hide_cursor());
            self.terminal.screen().contents()
        }

        fn finish(&mut self, at: u64, ended: Ended) -> String {
            self.tty.finish(ms(at), ended);
            self.look()
        }
    }

    fn small() -> Screen {
        Screen { columns: 40, rows: 12 }
    }

    #[test]
    fn the_drawing_is_replaced_in_place() {
        let mut stage = Stage::new(40, 12, small, true);
        stage.play(&[
            (0, started("[internal] load")),
            (40, done("[internal] load")),
            (50, cached("[1/2] FROM scratch")),
            (100, started("[2/2] RUN a command that is far too long for the screen")),
            (1200, log("[2/2] RUN a command that is far too long for the screen", b"first\nsec")),
            (
                1300,
                status(
                    "[2/2] RUN a command that is far too long for the screen",
                    "blob",
                    1500,
                    3000,
                    false,
                ),
            ),
        ]);
        assert_eq!(
            stage.look(),
            "\
$ slipway build .
[+] Building 1.3s (2/3)          slipway
 => [internal] load                 0.0s
 => CACHED [1/2] FROM scratch       0.0s
 => [2/2] RUN a command that is far 1.2s
 => => blob 1.50kB / 3.00kB         0.0s
 => => # first
 => => # sec"
        );
        stage.play(&[(2000, done("[2/2] RUN a command that is far too long for the screen"))]);
        assert_eq!(
            stage.finish(2100, Ended::Success),
            "\
$ slipway build .
[+] Building 2.1s (3/3) FINISHED slipway
 => [internal] load                 0.0s
 => CACHED [1/2] FROM scratch       0.0s
 => [2/2] RUN a command that is far 1.9s
 => => blob 1.50kB / 3.00kB         0.7s"
        );
        assert_eq!(stage.terminal.screen().cursor_position(), (6, 0));
    }

    #[test]
    fn a_failed_step_is_told_again_below() {
        let mut stage = Stage::new(40, 12, small, false);
        stage.play(&[
            (0, started("bad")),
            (0, started("other")),
            (300, log("bad", b"oh\n\x1b[2Jno\n")),
            (400, failed("bad", "x")),
        ]);
        assert_eq!(
            stage.finish(500, Ended::Failure),
            "\
$ slipway build .
[+] Building 0.5s (2/2) FINISHED slipway
 => ERROR bad                       0.4s
 => CANCELED other                  0.5s
------
 > bad:
0.300 oh
0.300 no
------"
        );
    }

    #[test]
    fn what_does_not_fit_scrolls_off_and_is_there_in_the_end() {
        let mut stage = Stage::new(40, 12, small, true);
        stage.play(&[(0, started("running from the start"))]);
        for n in 0..30 {
            let name = format!("step {n}");
            stage.play(&[(n, started(&name)), (n, log(&name, b"1\n2\n3\n4\n5\n6\n7\n8\n"))]);
            let screen = stage.look();
            assert!(n > 1 || screen.starts_with("$ slipway build ."), "{screen}");
            assert_eq!(screen.matches("[+] Building").count(), 1, "{screen}");
            assert!(screen.contains("=> running from the start"), "{screen}");
            assert!(screen.contains(&format!("=> {name} ")), "{screen}");
            assert!(screen.contains(" => => # 8") && !screen.contains(" => => # 2"), "{screen}");
            assert!(screen.lines().count() <= 12);
            stage.play(&[(n, done(&name))]);
        }
        let screen = stage.look();
        assert!(screen.contains(" => step 29 ") && !screen.contains(" => step 0 "), "{screen}");
        stage.finish(100, Ended::Success);
        stage.terminal.screen_mut().set_scrollback(100);
        let top = stage.terminal.screen().contents();
        assert!(top.starts_with("$ slipway build .\n[+] Building 0.1s (30/31)"), "{top}");
        assert!(top.contains(" => step 0 "), "{top}");
        stage.terminal.screen_mut().set_scrollback(0);
        assert!(stage.terminal.screen().contents().contains(" => step 29 "));
    }

    #[test]
    fn colours_follow_the_outcome_and_can_be_switched_off() {
        for color in [true, false] {
            let mut stage = Stage::new(40, 12, small, color);
            stage.play(&[
                (0, started("run")),
                (0, started("good")),
                (1, done("good")),
                (1, failed("bad", "x")),
                (1, canceled("gone")),
            ]);
            let screen = stage.terminal.screen();
            let colors: Vec<_> = (2..6).map(|row| screen.cell(row, 4).unwrap().fgcolor()).collect();
            let index = |n| if color { vt100::Color::Idx(n) } else { vt100::Color::Default };
            assert_eq!(colors, [vt100::Color::Default, index(4), index(1), index(3)]);
        }
    }

    #[test]
    fn lines_are_never_wider_than_the_screen() {
        for screen in [
            (|| Screen { columns: 1, rows: 1 }) as fn() -> Screen,
            || Screen { columns: 15, rows: 2 },
            || Screen { columns: 21, rows: 3 },
        ] {
            // A wide terminal shows what a narrow one would have wrapped.
            let mut stage = Stage::new(100, 30, screen, true);
            stage.play(&[
                (0, started("日本語日本語日本語")),
                (1, log("日本語日本語日本語", "漢字\t漢字漢字漢字\n".as_bytes())),
                (2, started("b")),
            ]);
            let drawn = stage.look();
            assert!(drawn.lines().skip(1).all(|line| width(line) <= screen().columns), "{drawn}");
            assert!(drawn.lines().skip(1).count() < screen().rows, "{drawn}");
            stage.finish(3, Ended::Success);
        }
    }

    #[test]
    fn an_empty_build_draws_nothing() {
        let mut stage = Stage::new(40, 12, small, true);
        assert_eq!(stage.finish(10, Ended::Success), "$ slipway build .");
    }
}
