//! What this client offers the engine: the places it keeps credentials and certificates, and where output goes.

pub(crate) mod certificates;
pub(crate) mod contexts;
pub(crate) mod output;
pub(crate) mod secrets;
pub(crate) mod ssh;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use slipway_daemon::gateway::frontends::FrontendImages;
use slipway_daemon::worker::WorkerInfo;
use slipway_engine::solver::device::{DeviceOptions, Devices};
use slipway_engine::store::registry::docker_config::DockerConfig;
use slipway_engine::store::registry::{Anonymous, Credentials};
use slipway_engine::{Engine, EngineOptions};

use crate::command::Context;
use crate::failure::Failure;

/// Opens the engine over the state folder.
///
/// # Errors
/// When the folder cannot be used or a configuration file is malformed.
pub(crate) fn open_engine(context: &Context) -> Result<Engine, Failure> {
    open(Devices::none(), context)
}

fn open(devices: Devices, context: &Context) -> Result<Engine, Failure> {
    let settings = &context.settings;
    let mut options = EngineOptions::new(&settings.root);
    options.registries = certificates::hosts(&settings.certs_dir)?;
    options.credentials = credentials(settings.docker_config_dir.as_deref())?;
    options.devices = devices;
    Engine::open(options).map_err(|error| {
        Failure::of(&error).hint("choose another state folder with --root DIR or SLIPWAY_ROOT")
    })
}

/// Opens the engine for building, where a Dockerfile may ask for a frontend that is an image, and for devices that
/// files in these folders describe, or in the usual ones if there are none.
///
/// # Errors
/// As [`open_engine`].
pub(crate) fn open_builder(
    device_folders: &[PathBuf],
    context: &Context,
) -> Result<Engine, Failure> {
    let mut devices = DeviceOptions::default();
    if !device_folders.is_empty() {
        devices.folders = device_folders.to_vec();
    }
    let engine = open(Devices::new(devices), context)?;
    let worker = WorkerInfo::open(engine.store().root(), BTreeMap::new())
        .map_err(|error| Failure::new(format!("cannot write the state folder: {error}")))?;
    Ok(engine.with_frontends(Arc::new(FrontendImages::new(worker))))
}

/// Reads docker's credentials; a folder without any has none.
///
/// # Errors
/// When the file is malformed.
pub(crate) fn credentials(folder: Option<&Path>) -> Result<Arc<dyn Credentials>, Failure> {
    let Some(path) = folder.map(|folder| folder.join("config.json")).filter(|path| path.exists())
    else {
        return Ok(Arc::new(Anonymous));
    };
    Ok(Arc::new(DockerConfig::load(&path).map_err(|error| Failure::of(&error))?))
}
