//! Containers that a frontend puts together from results, to run processes in and to look into.

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use slipway_engine::container::RunError;
use slipway_engine::solver::executor::{Process, ProcessHandle};
use slipway_engine::solver::{
    Base, Container, ContainerMount, ContainerProcess, ContainerRequest, Left, SolveError,
};
use slipway_engine::store::blocking;
use slipway_engine::store::tree;
use slipway_engine::store::view::View;
use slipway_spec::Platform;
use slipway_spec::llb::pb;
use slipway_spec::wire::fsutil::Stat;
use slipway_spec::wire::gateway::{
    NewContainerRequest, ReadDirRequest, ReadFileRequest, StatFileRequest,
};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

use super::{Gateway, MAX_FILE, Reference, list_view, read_range, stat_view};
use crate::failure::{Failed, failed_status, solve_status};

/// The containers of one frontend, by the names that it gave them.
#[derive(Debug, Default)]
pub(super) struct Containers {
    running: Mutex<HashMap<String, Arc<Running>>>,
    /// What failed steps left, by the names that errors gave it.
    left: Mutex<HashMap<String, Base>>,
}

impl Drop for Containers {
    fn drop(&mut self) {
        let running = self.running.get_mut().unwrap_or_else(PoisonError::into_inner);
        running.values().for_each(|container| container.end.cancel());
    }
}

/// A container that processes may be started in.
#[derive(Debug)]
pub(super) struct Running {
    container: Option<Container>,
    /// The first process, whose namespaces all others join.
    first: tokio::sync::Mutex<Option<ProcessHandle>>,
    /// Ends all processes.
    end: CancellationToken,
    /// Those who have a process under way.
    processes: TaskTracker,
    /// How the first process ended that did not end well.
    failure: OnceLock<Status>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(container) = self.container.take() else { return };
        // Without a runtime the program is ending, and the next one clears up.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            drop(runtime.spawn(container.discard()));
        }
    }
}

impl Running {
    /// Starts a process: the first one has the container's namespaces made, and others join them.
    pub(super) async fn start(
        &self,
        gateway: &Gateway,
        process: &ContainerProcess,
        files: [OwnedFd; 3],
    ) -> Result<Process, RunError> {
        let Some(container) = &self.container else {
            return Err(RunError::Exec(slipway_engine::solver::executor::ExecError::Invalid {
                reason: "the container was released".into(),
            }));
        };
        let mut first = self.first.lock().await;
        let started =
            gateway.build.start_in_container(container, first.as_ref(), process, files).await?;
        first.get_or_insert_with(|| started.handle().clone());
        Ok(started)
    }

    /// Whether all processes are to end.
    pub(super) fn is_ending(&self) -> bool {
        self.end.is_cancelled()
    }

    /// Resolves when all processes are to end.
    pub(super) async fn ended(&self) {
        self.end.cancelled().await;
    }

    /// Takes note of a process that did not end well.
    pub(super) fn failed(&self, failure: Status) {
        // Only the first one is told.
        self.failure.set(failure).ok();
    }

    /// Counts those who have a process under way.
    pub(super) fn processes(&self) -> &TaskTracker {
        &self.processes
    }
}

impl Gateway {
    /// Puts a container together.
    pub(super) async fn new_container(&self, request: NewContainerRequest) -> Result<(), Status> {
        let NewContainerRequest { container_id: id, mounts, network, platform, .. } = &request;
        if self.containers.get(id).is_some() {
            return Err(taken(id));
        }
        let mut extra_hosts = vec![];
        for pb::HostIp { host, ip } in &request.extra_hosts {
            if ip.parse::<IpAddr>().is_err() {
                return Err(Status::invalid_argument(format!("failed to parse IP {ip}")));
            }
            extra_hosts.push((host.clone(), ip.clone()));
        }
        let mut prepared = vec![];
        for mount in mounts {
            let (base, key) = match self.base(mount).await? {
                None => (None, None),
                Some((base, key)) => (Some(base), key),
            };
            prepared.push(ContainerMount { mount: mount.clone(), base, key });
        }
        let container = ContainerRequest {
            mounts: prepared,
            network: pb::NetMode::try_from(*network)
                .map_err(|_| Status::invalid_argument(format!("unknown network {network}")))?,
            hostname: request.hostname.clone(),
            extra_hosts,
            platform: platform.as_ref().map(platform_of),
        };
        let container = self.build.container(container).await;
        let running = Arc::new(Running {
            container: Some(container.map_err(|error| solve_status(&error))?),
            first: tokio::sync::Mutex::default(),
            end: CancellationToken::new(),
            processes: TaskTracker::new(),
            failure: OnceLock::new(),
        });
        let mut all = self.containers.running.lock().unwrap_or_else(PoisonError::into_inner);
        if all.contains_key(id) {
            return Err(taken(id));
        }
        all.insert(id.clone(), running);
        Ok(())
    }

    /// Finds what a mount shows, and what identifies it.
    async fn base(
        &self,
        mount: &pb::Mount,
    ) -> Result<Option<(Base, Option<slipway_engine::store::result::ResultKey>)>, Status> {
        let id = mount.result_id.as_str();
        if let Some(base) = self.containers.left(id) {
            return Ok(Some((base, None)));
        }
        let Reference { edge, .. } = self.get(id).map_err(|_| {
            Status::not_found(format!("failed to find ref {id} for {:?} mount", mount.dest))
        })?;
        let Some(edge) = edge else { return Ok(None) };
        let (base, key) = match self.build.base(&edge).await {
            Ok(found) => found,
            Err(error) => return Err(self.failed(&error)),
        };
        Ok(Some((base, Some(key))))
    }

    pub(super) fn container(&self, id: &str) -> Option<Arc<Running>> {
        self.containers.get(id)
    }

    /// Ends all processes of a container, and throws away what they wrote. Fails as the first of them did, then or before, if
    /// one did: clients know it from BuildKit.
    pub(super) async fn release_container(&self, id: &str) -> Result<(), Status> {
        let found = {
            let mut all = self.containers.running.lock().unwrap_or_else(PoisonError::into_inner);
            all.remove(id)
        };
        let missing = || Status::not_found(format!("container details for {id} not found"));
        release(found.ok_or_else(missing)?).await
    }

    /// Releases all containers.
    pub(super) async fn release_containers(&self) {
        let all = {
            let mut all = self.containers.running.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *all)
        };
        for container in all.into_values() {
            // Nobody asked.
            let _ended: Result<(), Status> = release(container).await;
        }
    }

    async fn container_view(&self, id: &str, mount: i32) -> Result<(View, String), Status> {
        let missing = || Status::not_found(format!("container details for {id}@{mount} not found"));
        let running = self.containers.get(id).ok_or_else(missing)?;
        let container = running.container.as_ref().ok_or_else(missing)?;
        let at = usize::try_from(mount).ok();
        let view = match at {
            Some(at) => container.view(at).await.map_err(|error| solve_status(&error))?,
            None => None,
        };
        view.ok_or_else(|| Status::invalid_argument(format!("mount {mount} of {id} has no files")))
    }

    pub(super) async fn read_file_container(
        &self,
        request: ReadFileRequest,
    ) -> Result<Bytes, Status> {
        let (view, part) = self.container_view(&request.r#ref, request.mount_index).await?;
        let path = join(&part, &request.file_path)?;
        let wanted = path.clone();
        let read = blocking::run(move || view.read(wanted.as_bytes(), MAX_FILE)).await;
        let bytes = read.map_err(|error| Status::unknown(error.to_string()))?;
        let bytes = bytes.ok_or_else(|| {
            Status::not_found(format!("open {}: no such file or directory", request.file_path))
        })?;
        Ok(read_range(bytes.into(), request.range))
    }

    pub(super) async fn read_dir_container(
        &self,
        request: ReadDirRequest,
    ) -> Result<Vec<Stat>, Status> {
        let (view, part) = self.container_view(&request.r#ref, request.mount_index).await?;
        let path = join(&part, &request.dir_path)?;
        list_view(view, &path, &request.include_pattern).await
    }

    pub(super) async fn stat_file_container(
        &self,
        request: StatFileRequest,
    ) -> Result<Stat, Status> {
        let (view, part) = self.container_view(&request.r#ref, request.mount_index).await?;
        stat_view(view, &join(&part, &request.path)?).await
    }

    /// Returns a failed step as a status. What the step left can be mounted in containers by the names in it.
    pub(super) fn failed(&self, error: &SolveError) -> Status {
        let Some(left) = error.left.as_deref() else { return solve_status(error) };
        let Left { op, part, inputs, mounts } = left;
        let (inputs, mounts) = (self.name_all(inputs), self.name_all(mounts));
        let digest = error.vertex.as_ref().map(|vertex| &vertex.digest);
        // What the solver had of it may have been changed by then.
        let op = digest
            .and_then(|digest| self.operation(digest))
            .unwrap_or_else(|| pb::Op { op: Some(op.clone()), ..pb::Op::default() });
        failed_status(error, &Failed { op: &op, part: *part, inputs, mounts })
    }

    fn name_all(&self, bases: &[Option<Base>]) -> Vec<String> {
        let mut left = self.containers.left.lock().unwrap_or_else(PoisonError::into_inner);
        let name = |base: &Option<Base>| match base {
            None => String::new(),
            Some(base) => {
                let id = slipway_engine::id::new_id();
                left.insert(id.clone(), base.clone());
                id
            }
        };
        bases.iter().map(name).collect()
    }
}

impl Containers {
    fn left(&self, id: &str) -> Option<Base> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    fn get(&self, id: &str) -> Option<Arc<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }
}

fn taken(id: &str) -> Status {
    Status::already_exists(format!("Container {id} already exists"))
}

/// Returns when all processes are gone. What they wrote goes with the last one who knows of the container.
async fn release(container: Arc<Running>) -> Result<(), Status> {
    container.end.cancel();
    container.processes.close();
    container.processes.wait().await;
    container.failure.get().cloned().map_or(Ok(()), Err)
}

/// Joins a path to the part of a file system that a mount shows; no part of the path leads out of it.
fn join(part: &str, path: &str) -> Result<String, Status> {
    if !path.starts_with('/') {
        return Err(Status::invalid_argument(format!("can't make {path} relative to /")));
    }
    let inside = tree::clean(path.as_bytes());
    Ok(format!("/{}/{}", part.trim_matches('/'), String::from_utf8_lossy(&inside)))
}

/// Returns the platform of a container. Callers that only mean the system leave the rest out.
fn platform_of(platform: &pb::Platform) -> Platform {
    let host = Platform::host();
    match Platform::from(platform) {
        named if !named.architecture.is_empty() => named,
        named => Platform { architecture: host.architecture, variant: host.variant, ..named },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_alone_is_a_platform() {
        let named = |os: &str, architecture: &str| {
            let (os, architecture) = (os.into(), architecture.into());
            platform_of(&pb::Platform { os, architecture, ..Default::default() })
        };
        assert_eq!(named("linux", ""), Platform::host());
        assert_eq!(named("linux", "s390x"), Platform::new("linux", "s390x", None));
    }

    #[test]
    fn paths_stay_in_their_part() {
        assert_eq!(join("", "/a/b").unwrap(), "//a/b");
        assert_eq!(join("/s/", "/../../a/./b/..").unwrap(), "/s/a");
        assert!(join("", "a").is_err());
    }
}
