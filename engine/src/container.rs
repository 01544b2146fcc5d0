//! Runs a command in an image, on a file system that is thrown away afterwards; or several, in a container that somebody
//! has put together from results of a build.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use slipway_solver::executor::{
    ExecError, ExecSpec, Executor as _, Network, Process, ProcessHandle, Stdio,
};
use slipway_solver::graph::Edge;
use slipway_solver::source::image::Lookup;
use slipway_solver::{
    Base, Container, ContainerProcess, ContainerRequest, Job, LocalFolders, SolveError,
};
use slipway_spec::progress::ProgressSink;
use slipway_spec::{ImageReference, Platform};
use slipway_store::result::ResultKey;
use slipway_store::{Error, blocking};

use crate::{Build, Engine};

/// What to run.
#[derive(Clone, Debug)]
pub struct RunRequest {
    /// The image.
    pub image: ImageReference,
    /// Where the image is looked up.
    pub lookup: Lookup,
    /// For which platform.
    pub platform: Platform,
    /// Replaces the image's entrypoint; the empty list removes it.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command.
    pub command: Vec<String>,
    /// Added to the image's environment.
    pub env: Vec<String>,
    /// Replaces the image's working directory.
    pub workdir: Option<String>,
    /// Replaces the image's user.
    pub user: Option<String>,
    /// Whether the host's network is there.
    pub network: bool,
    /// Whether standard input is a terminal of the command's own.
    pub tty: bool,
}

/// Why nothing ran.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The image.
    #[error(transparent)]
    Image(#[from] SolveError),
    /// The store.
    #[error(transparent)]
    Store(#[from] Error),
    /// The command.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// There is nothing to run.
    #[error("image {0} names no command; give one")]
    NoCommand(ImageReference),
}

impl Engine {
    /// Runs a command and returns its exit code. The image is pulled where it is not here. `stdio` is handed to the
    /// command once the progress of pulling has been shown: `ready` is called in between.
    ///
    /// # Errors
    /// When nothing could be run.
    pub async fn run(
        &self,
        request: RunRequest,
        stdio: Stdio,
        progress: Arc<dyn ProgressSink>,
        ready: impl FnOnce() + Send,
    ) -> Result<i32, RunError> {
        let client = Arc::new(LocalFolders::new(Default::default(), None));
        let job = Job::new(self.worker.clone(), client, progress);
        let (image, snapshot) =
            job.image_snapshot(&request.image, &request.platform, request.lookup).await?;
        job.provide(&snapshot).await?;
        let config = image.parsed.config.clone();
        let mut args = match &request.entrypoint {
            Some(entrypoint) => entrypoint.clone(),
            None => config.entrypoint.clone().unwrap_or_default(),
        };
        if !request.command.is_empty() {
            args.extend(request.command.iter().cloned());
        } else if request.entrypoint.is_none() {
            args.extend(config.cmd.clone().unwrap_or_default());
        }
        if args.is_empty() {
            return Err(RunError::NoCommand(request.image));
        }
        let store = self.store().clone();
        let scratch =
            blocking::run(move || slipway_solver::scratch(&store, &snapshot.layers)).await?;
        let spec = ExecSpec {
            lower: scratch.lower.clone(),
            stub: self.store().stub_folder(),
            upper: scratch.upper(),
            work: scratch.work(),
            args,
            env: environment(config.env, request.env, request.tty),
            cwd: request.workdir.unwrap_or(config.working_dir),
            user: request.user.unwrap_or(config.user),
            network: if request.network { Network::Host } else { Network::None },
            platform: request.platform,
            tty: request.tty,
            ..ExecSpec::default()
        };
        ready();
        let exit = self.executor.run(spec, stdio).await?;
        blocking::run(move || scratch.discard()).await?;
        Ok(exit.code)
    }
}

impl Build {
    /// Has a result ready to start processes on, and what identifies it.
    ///
    /// # Errors
    /// When a step that it needs fails.
    pub async fn base(&self, edge: &Edge) -> Result<(Base, ResultKey), SolveError> {
        self.job().base(edge).await
    }

    /// Prepares a container.
    ///
    /// # Errors
    /// When a mount makes no sense, or the client lacks what it needs.
    pub async fn container(&self, request: ContainerRequest) -> Result<Container, SolveError> {
        self.job().container(request).await
    }

    /// Starts a process in a container: among those of `first` if there is one, or else as the first one.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn start_in_container(
        &self,
        container: &Container,
        first: Option<&ProcessHandle>,
        process: &ContainerProcess,
        files: [OwnedFd; 3],
    ) -> Result<Process, RunError> {
        let spec = container.spec(process).await?;
        let executor = self.engine().executor();
        Ok(match first {
            Some(first) => executor.join(first, spec, files).await?,
            None => executor.start(spec, files).await?,
        })
    }
}

/// Later variables replace earlier ones of the same name.
fn environment(image: Vec<String>, added: Vec<String>, tty: bool) -> Vec<String> {
    let mut env: Vec<String> = image;
    if tty {
        env.push("TERM=xterm".into());
    }
    for variable in added {
        let name = variable.split_once('=').map_or(variable.as_str(), |(name, _)| name);
        env.retain(|known| known.split_once('=').is_none_or(|(known, _)| known != name));
        env.push(variable);
    }
    if !env.iter().any(|variable| variable.starts_with("PATH=")) {
        env.push("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn added_variables_replace() {
        let env = environment(vec!["PATH=/x".into(), "A=1".into()], vec!["A=2".into()], false);
        assert_eq!(env, ["PATH=/x", "A=2"]);
    }
}
