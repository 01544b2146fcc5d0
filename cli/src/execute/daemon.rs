//! `daemon`, carried out: from the lock on the state folder to the last connection.

use std::path::Path;
use std::time::Duration;

use slipway_daemon::listen::Listeners;
use slipway_daemon::notify::{Notice, Notifier};
use slipway_daemon::{Daemon, DaemonOptions as ServeOptions};
use slipway_engine::config::{LogFormat, LogLevel};
use slipway_engine::provenance::environment;
use slipway_engine::{Engine, EngineOptions};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::daemon::DaemonArgs;
use crate::command::Context;
use crate::command::daemon::lock::RootLock;
use crate::command::daemon::{DaemonOptions, User, plan};
use crate::failure::Failure;
use crate::printer::Printer;

/// How long work on the disk may go on after the end.
const PATIENCE: Duration = Duration::from_secs(3);

/// Serves until a signal comes.
pub(super) fn daemon(
    args: &DaemonArgs,
    root: Option<&Path>,
    context: &Context,
) -> Result<(), Failure> {
    let options = plan(args, root, User::of_process(&context.environment), context)?;
    start_log(&options, &context.printer);
    for warning in &options.warnings {
        tracing::warn!("{warning}");
    }
    let other: Vec<_> = args.other.names().collect();
    tracing::debug!(?other, config = ?options.config, "configured");
    let _lock = RootLock::take(&options.root)?;
    // Whose credentials count is for each client to say, so the daemon has none of its own.
    let mut engine = EngineOptions::new(&options.root);
    engine.registries.clone_from(&options.registries);
    engine.devices = options.devices.clone();
    let folder = options.config.provenance_env_dir.as_deref();
    let folder = folder.unwrap_or(Path::new(environment::DEFAULT_FOLDER));
    engine.provenance = environment::read(folder).map_err(|error| Failure::of(&error))?;
    let engine = Engine::open(engine)
        .map_err(|error| Failure::of(&error).hint("choose another state folder with --root DIR"))?;
    for problem in options.devices.read().problems() {
        tracing::warn!("cannot use a file that describes devices: {problem}");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("cannot start: {error}")))?;
    let outcome = runtime.block_on(serve(engine, options));
    runtime.shutdown_timeout(PATIENCE);
    outcome
}

async fn serve(engine: Engine, options: DaemonOptions) -> Result<(), Failure> {
    let failed = |error| Failure::new(format!("cannot wait for signals: {error}"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let root = options.root.display().to_string();
    let serving = ServeOptions {
        frontends: options.config.frontends,
        labels: options.labels,
        allowed: options.allowed,
        history: options.config.history,
        gc: options.config.worker.gc,
    };
    let daemon = Daemon::new(engine, serving)
        .map_err(|error| Failure::new(format!("cannot use {root}: {error}")))?;
    let listeners = Listeners::bind(&options.addresses, &options.listen)
        .await
        .map_err(|error| Failure::of(&error))?;
    for address in listeners.addresses() {
        tracing::info!(address, root, "serving");
    }
    let notifier = Notifier::of_process();
    let (stopping, is_stopping) = tokio::sync::oneshot::channel::<()>();
    let served = daemon.serve(listeners.incoming(), async {
        // An error means that nobody can say stop any more.
        let _told = is_stopping.await;
    });
    let signals = async {
        let mut stopping = Some(stopping);
        loop {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            match stopping.take() {
                Some(stopping) => {
                    tracing::info!("stopping");
                    notifier.tell(Notice::Stopping);
                    // Nobody listens when it has ended by itself.
                    let _told = stopping.send(());
                }
                None => return,
            }
        }
    };
    notifier.tell(Notice::Ready);
    tokio::select! {
        served = served => {
            served.map_err(|error| Failure::new(format!("cannot take connections: {error}")))
        }
        () = signals => Err(Failure::canceled().hint("the second signal cut off what still ran")),
    }
}

/// Writes the log to standard error.
fn start_log(options: &DaemonOptions, printer: &Printer) {
    let level = options.log_level.as_str();
    let filter = match options.log_level {
        // What libraries do is of little use to anybody.
        LogLevel::Debug | LogLevel::Trace => {
            format!("{level},h2=info,hyper=info,hyper_util=info,rustls=info")
        }
        LogLevel::Error | LogLevel::Warn | LogLevel::Info => level.to_owned(),
    };
    let printer = printer.clone();
    let log = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_ansi(false)
        .with_writer(move || printer.error_stream());
    // Only a second subscriber can fail, and there is none.
    let _ = match options.log_format {
        LogFormat::Text => tracing::subscriber::set_global_default(log.finish()),
        LogFormat::Json => tracing::subscriber::set_global_default(log.json().finish()),
    };
}
