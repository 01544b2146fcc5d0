//! `slipway`: builds, stores and ships multi-platform container images.
//!
//! This crate is words and pixels: [`args`] is what was typed, [`settings`] what the environment adds, [`command`] one
//! verb per file, [`progress`] what a build looks like, [`failure`] how the program ends without success.

mod args;
mod client;
mod command;
mod execute;
mod failure;
mod metadata_file;
mod output;
mod printer;
mod progress;
mod remote;
mod settings;
mod terminal;

use std::ffi::OsString;
use std::process::ExitCode;

use slipway_engine::solver::executor;

use args::{Cli, Command};
use command::Context;
use failure::{EXIT_FAILURE, EXIT_RUN_FAILED, Failure};
use printer::Printer;
use settings::{Environment, Settings};

fn main() -> ExitCode {
    // The sandbox starts this program once more as its helper, which must stay single-threaded.
    if executor::is_helper(std::env::args_os()) {
        executor::helper_main();
    }
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let printer = Printer::of_process();
    let outcome = run(arguments, &printer).and_then(|code| printer.finish().map(|()| code));
    ExitCode::from(outcome.unwrap_or_else(|failure| {
        failure.print(&printer);
        failure.exit_code
    }))
}

/// Runs one command line and returns the exit code.
fn run(arguments: Vec<OsString>, printer: &Printer) -> Result<u8, Failure> {
    let is_run = args::verb(&arguments).is_some_and(|verb| verb == "run");
    let cli = match args::parse(arguments) {
        Ok(cli) => cli,
        Err(error) if error.exit_code() == 0 => {
            printer.text(&error.render().to_string());
            return Ok(0);
        }
        Err(error) => {
            printer.error_text(&shown(&error.render().to_string()));
            return Ok(if is_run { EXIT_RUN_FAILED } else { EXIT_FAILURE });
        }
    };
    let context = context(&cli, printer)?;
    execute::dispatch(cli, &context)
}

fn context(cli: &Cli, printer: &Printer) -> Result<Context, Failure> {
    let global = &cli.global;
    // A daemon's log is always there, in the form that its file says.
    if global.debug && !matches!(cli.command, Command::Daemon(_)) {
        start_tracing(printer);
    }
    let environment = Environment::of_process();
    let settings = Settings::resolve(global, &environment, rustix::process::geteuid().is_root())?;
    Ok(Context { settings, environment, printer: printer.clone() })
}

/// Says it as every other error is said.
fn shown(error: &str) -> String {
    error.strip_prefix("error:").map_or_else(|| error.to_owned(), |rest| format!("ERROR:{rest}"))
}

/// Writes what happens inside to standard error.
fn start_tracing(printer: &Printer) {
    let printer = printer.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(
            "debug,h2=info,hyper=info,reqwest=info,rustls=info",
        ))
        .with_ansi(false)
        .with_writer(move || printer.error_stream())
        .finish();
    // Only a second subscriber can fail, and there is none.
    let _ = tracing::subscriber::set_global_default(subscriber);
}
