//! A Dockerfile frontend for images: its standard streams are a connection to whoever started it.

use std::io::Write as _;
use std::process::ExitCode;

use slipway_gateway::environment::Environment;

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start: {error}")),
    };
    let environment =
        Environment::read(std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        }));
    let io = tokio::io::join(tokio::io::stdin(), tokio::io::stdout());
    let done = runtime.block_on(slipway_gateway::run(environment, io));
    // Standard input is read by a thread that would wait for more.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string()),
    }
}

fn fail(message: &str) -> ExitCode {
    // Standard output is not for people here. Nobody is left to tell if this fails.
    let _told = writeln!(std::io::stderr(), "slipway-gateway: {message}");
    ExitCode::FAILURE
}
