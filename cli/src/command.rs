//! One verb per file: what was typed becomes a plan, and what the engine answers becomes text.

pub(crate) mod build;
pub(crate) mod daemon;
pub(crate) mod disk_usage;
pub(crate) mod images;
pub(crate) mod inspect;
pub(crate) mod load;
pub(crate) mod prune;
pub(crate) mod pull;
pub(crate) mod push;
pub(crate) mod rmi;
pub(crate) mod run;
pub(crate) mod save;
pub(crate) mod tag;

use crate::args::build::ProgressMode;
use crate::printer::Printer;
use crate::progress::{Display, DisplayOptions};
use crate::settings::{Environment, Settings};

/// What every command is given.
#[derive(Debug)]
pub(crate) struct Context {
    /// Flags and environment, resolved.
    pub(crate) settings: Settings,
    /// For the variables that a flag names.
    pub(crate) environment: Environment,
    /// Where text goes.
    pub(crate) printer: Printer,
}

impl Context {
    /// Begins to show progress of this kind of work.
    pub(crate) fn display(&self, mode: ProgressMode, phase: &'static str) -> Display {
        let options = DisplayOptions {
            mode: self.settings.progress(mode, self.printer.terminals.stderr),
            phase,
            label: String::new(),
            color: self.settings.color && self.printer.terminals.stderr,
            log_rows: self.settings.log_rows,
            expand_warnings: self.settings.debug,
        };
        Display::start(&options, &self.printer)
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::args::{Cli, Command, parse};
    use crate::printer::capture::{self, Buffer};

    /// Makes a context with these variables, and buffers of what it prints.
    pub(crate) fn context(variables: &[(&str, &str)]) -> (Context, Buffer, Buffer) {
        let environment = Environment::of(variables);
        let Cli { global, .. } =
            parse(["slipway", "--root", "/r", "images"].map(Into::into)).unwrap();
        let settings = Settings::resolve(&global, &environment, false).unwrap();
        let (printer, stdout, stderr) = capture::printer();
        (Context { settings, environment, printer }, stdout, stderr)
    }

    /// Parses a command line.
    pub(crate) fn command(words: &[&str]) -> Command {
        parse(std::iter::once(&"slipway").chain(words).map(Into::into)).unwrap().command
    }
}
