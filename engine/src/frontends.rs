//! Frontends that are images: found, and started in a sandbox. What they say on their standard streams is for a
//! [`FrontendRunner`] to understand.

use slipway_spec::flag;
use std::collections::BTreeMap;
use std::fmt;

use async_trait::async_trait;
use slipway_frontend::dockerfile::{FrontendSource, frontend_source};
use slipway_frontend::{
    BridgeError, BridgeErrorKind, FrontendError, FrontendImage, FrontendRequest, FrontendResult,
};
use slipway_solver::executor::{
    ExecError, ExecMount, ExecMountKind, Process, StreamReader, StreamWriter, pipes,
};
use slipway_solver::{Container, ContainerMount, ContainerProcess, ContainerRequest, SolveError};
use slipway_spec::Platform;
use slipway_spec::llb::{Definition, pb};

use crate::Build;
use crate::provenance::Scope;

/// Frontends may have others do their work, and those others again; no deeper than this.
pub const MAX_DEPTH: usize = 8;

/// Where a frontend finds the graph that it was itself made by.
const METADATA: &str = "/run/config/buildkit/metadata/frontend.bin";

/// What a frontend image runs that names no command.
const DEFAULT_COMMAND: &str = "/run";

/// Runs frontends that are images.
#[async_trait]
pub trait FrontendRunner: fmt::Debug + Send + Sync {
    /// Has a frontend read what a build is given. `depth` is how many frontends wait for it, and `within` what was asked by
    /// who asks; what the frontend is asked is noted there, with its results.
    ///
    /// # Errors
    /// What the frontend says went wrong, or why it said nothing.
    async fn run(
        &self,
        build: &Build,
        frontend: FrontendImage,
        depth: usize,
        within: &Scope,
    ) -> Result<FrontendResult, BridgeError>;
}

/// A frontend under way. Dropping it kills it.
#[derive(Debug)]
pub struct FrontendProcess {
    process: Option<Process>,
    /// What it reads from.
    pub stdin: Option<StreamWriter>,
    /// What it writes to.
    pub stdout: Option<StreamReader>,
    /// What it says to people.
    pub stderr: Option<StreamReader>,
    container: Option<Container>,
}

/// Why a frontend was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// What it runs on.
    #[error(transparent)]
    Solve(#[from] SolveError),
    /// The process.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// The streams between us.
    #[error("cannot make pipes: {0}")]
    Pipes(#[from] std::io::Error),
}

impl FrontendProcess {
    /// Waits for its end, and returns its exit code.
    ///
    /// # Errors
    /// When it could not be executed after all.
    pub async fn wait(&mut self) -> Result<i32, ExecError> {
        match &mut self.process {
            Some(process) => process.wait().await.map(|exit| exit.code),
            None => std::future::pending().await,
        }
    }

    /// Kills it if it still runs, and throws away what it wrote.
    pub async fn discard(mut self) {
        drop(self.process.take());
        if let Some(container) = self.container.take() {
            container.discard().await;
        }
    }
}

impl Drop for FrontendProcess {
    fn drop(&mut self) {
        // What it runs on can go only after it.
        drop(self.process.take());
        let Some(container) = self.container.take() else { return };
        // Without a runtime the program is ending, and the next one clears up.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            drop(runtime.spawn(container.discard()));
        }
    }
}

impl Build {
    /// Finds the file system of a frontend.
    ///
    /// # Errors
    /// When there is none.
    pub async fn frontend_source(
        &self,
        name: &str,
        attrs: BTreeMap<String, String>,
    ) -> Result<FrontendSource, FrontendError> {
        let request = FrontendRequest { attrs, build_platform: Platform::host() };
        frontend_source(&request, name, self.bridge()).await
    }

    /// Starts a frontend with variables beside those of its image. It has no more rights than a step.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start_frontend(
        &self,
        source: &FrontendSource,
        env: Vec<String>,
    ) -> Result<FrontendProcess, StartError> {
        let job = self.job();
        let edge = self.load(&source.definition).await?;
        let (base, key) = job.base(&edge).await?;
        let config = source.config.config.clone();
        let alone = config.labels.get("moby.buildkit.frontend.network.none");
        let alone = alone.is_some_and(|value| flag::parse(value) == Some(true));
        let root = pb::Mount { dest: "/".into(), ..pb::Mount::default() };
        let container = job.container(ContainerRequest {
            mounts: vec![ContainerMount { mount: root, base: Some(base), key: Some(key) }],
            network: if alone { pb::NetMode::None } else { pb::NetMode::Unset },
            ..ContainerRequest::default()
        });
        let container = container.await?;
        let command = config.entrypoint.filter(|command| !command.is_empty());
        let meta = pb::Meta {
            args: command.unwrap_or_else(|| vec![DEFAULT_COMMAND.into()]),
            env: config.env.into_iter().chain(env).collect(),
            cwd: if config.working_dir.is_empty() { "/".into() } else { config.working_dir },
            user: config.user,
            ..pb::Meta::default()
        };
        let started = self.start_in(&container, meta, &source.definition).await;
        match started {
            Ok((process, io)) => Ok(FrontendProcess {
                process: Some(process),
                stdin: io.0,
                stdout: io.1,
                stderr: io.2,
                container: Some(container),
            }),
            Err(error) => {
                container.discard().await;
                Err(error)
            }
        }
    }

    async fn start_in(
        &self,
        container: &Container,
        meta: pb::Meta,
        definition: &Definition,
    ) -> Result<(Process, Streams), StartError> {
        let mut spec =
            container.spec(&ContainerProcess { meta, ..ContainerProcess::default() }).await?;
        spec.mounts.push(ExecMount {
            dest: METADATA.into(),
            kind: ExecMountKind::File {
                content: definition.to_bytes().as_slice().into(),
                mode: 0o444,
                uid: 0,
                gid: 0,
            },
        });
        let io = pipes([true; 3])?;
        let process = self.engine().executor().start(spec, io.files).await?;
        Ok((process, (io.stdin, io.stdout, io.stderr)))
    }
}

type Streams = (Option<StreamWriter>, Option<StreamReader>, Option<StreamReader>);

/// Says that a frontend is one too many.
pub(crate) fn too_deep() -> BridgeError {
    let message = format!("more than {MAX_DEPTH} frontends wait for each other");
    BridgeError::new(BridgeErrorKind::Other, message)
}
