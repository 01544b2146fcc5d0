//! One build, from request to result; the same behind the command line and the daemon.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//! use slipway_engine::{BuildRequest, Engine, EngineOptions};
//! use slipway_spec::progress::NoProgress;
//!
//! let engine = Engine::open(EngineOptions::new("/var/lib/slipway"))?;
//! let mut request = BuildRequest::default();
//! request.folders.insert("context".into(), ".".into());
//! request.folders.insert("dockerfile".into(), ".".into());
//! let result = engine.build(request, Arc::new(NoProgress)).await?;
//! println!("{:?}", result.image);
//! # Ok(()) }
//! ```

pub mod attest;
mod bridge;
pub mod build;
pub mod cache;
pub mod config;
pub mod container;
pub mod error;
pub mod frontends;
pub mod id;
pub mod inventory;
pub mod pipeline;
pub mod provenance;
pub mod request;
pub mod task;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Map, Value};
use slipway_solver::device::{DeviceOptions, Devices};
use slipway_solver::executor::{SandboxExecutor, SandboxOptions, prepare_stub};
use slipway_solver::source::image::Images;
use slipway_solver::{Shared, Worker};
use slipway_spec::ImageReference;
use slipway_store::registry::{
    Anonymous, Credentials, HostOptions, Registry, RegistryError, RegistryOptions,
};
use slipway_store::{Error, Store};
use tokio::sync::Semaphore;

pub use build::{Build, BuildClient};
pub use error::{BuildError, EngineError};
pub use frontends::FrontendRunner;
pub use pipeline::source_date_epoch;
use provenance::Producers;
pub use request::{BuildRequest, BuildResult, Export, look_ahead};
pub use slipway_exporter as exporter;
pub use slipway_frontend as frontend;
pub use slipway_solver as solver;
pub use slipway_store as store;
pub use task::Task;

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// The state folder.
    pub root: PathBuf,
    /// Settings of single registries, by host.
    pub registries: BTreeMap<String, HostOptions>,
    /// Credentials for registries.
    pub credentials: Arc<dyn Credentials>,
    /// The sandbox.
    pub sandbox: SandboxOptions,
    /// Devices that steps may ask for.
    pub devices: Devices,
    /// What the administrator adds to the provenance of all results: fields of the builder's own parameters.
    pub provenance: Map<String, Value>,
}

impl EngineOptions {
    /// Defaults over a state folder.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            registries: BTreeMap::new(),
            credentials: Arc::new(Anonymous),
            sandbox: SandboxOptions::default(),
            devices: Devices::new(DeviceOptions::default()),
            provenance: Map::new(),
        }
    }
}

/// Processes per core that may run at once: most of them wait for the network or a disk some of the time.
const STEPS_PER_CORE: usize = 4;

/// The parts joined over one store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Engine {
    worker: Worker,
    executor: Arc<SandboxExecutor>,
    registry: Registry,
    settings: RegistryOptions,
    credentials: Arc<dyn Credentials>,
    frontends: Option<Arc<dyn FrontendRunner>>,
    producers: Producers,
    provenance_environment: Arc<Map<String, Value>>,
}

impl Engine {
    /// Opens the store and makes the parts ready. Nothing runs yet.
    ///
    /// # Errors
    /// When the state folder cannot be used.
    pub fn open(options: EngineOptions) -> Result<Self, EngineError> {
        let store = Store::open(&options.root)?;
        let stub = store.stub_folder();
        prepare_stub(&stub)
            .map_err(|error| Error::io(format!("cannot prepare {}", stub.display()), error))?;
        let settings = RegistryOptions {
            user_agent: concat!("slipway/", env!("CARGO_PKG_VERSION")).into(),
            hosts: options.registries,
            ..RegistryOptions::default()
        };
        let registry = Registry::new(settings.clone(), options.credentials.clone())?;
        let executor = Arc::new(SandboxExecutor::new(options.sandbox));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let worker = Worker {
            images: Images::new(store.clone(), registry.clone()),
            store,
            executor: executor.clone(),
            parallel: Arc::new(Semaphore::new(cores * STEPS_PER_CORE)),
            shared: Shared::default(),
            devices: options.devices,
        };
        Ok(Self {
            worker,
            executor,
            registry,
            settings,
            credentials: options.credentials,
            frontends: None,
            producers: Producers::default(),
            provenance_environment: Arc::new(options.provenance),
        })
    }

    /// Lets builds use frontends that are images.
    #[must_use]
    pub fn with_frontends(mut self, runner: Arc<dyn FrontendRunner>) -> Self {
        self.frontends = Some(runner);
        self
    }

    /// Returns the store.
    pub fn store(&self) -> &Store {
        &self.worker.store
    }

    /// Returns the registry client.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Returns a client that takes the registries of these names on trust.
    pub(crate) fn insecure_registry(
        &self,
        names: &[ImageReference],
    ) -> Result<Registry, RegistryError> {
        let mut settings = self.settings.clone();
        for name in names {
            settings.hosts.entry(name.host().to_owned()).or_default().insecure = true;
        }
        Registry::new(settings, self.credentials.clone())
    }

    /// Returns what runs processes.
    pub fn executor(&self) -> &Arc<SandboxExecutor> {
        &self.executor
    }

    /// Returns what builds share.
    pub fn worker(&self) -> &Worker {
        &self.worker
    }
}
