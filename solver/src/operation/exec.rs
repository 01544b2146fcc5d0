//! Process execution: a root file system, a command, and the layer that it leaves.

pub(crate) mod container;
pub(crate) mod mounts;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use slipway_spec::Platform;
use slipway_spec::llb::pb;
use slipway_spec::progress::{ProgressEvent, ProgressSink, Stream};
use slipway_store::result::ResultKey;
use slipway_store::snapshot::Snapshot;
use slipway_store::{Error, Store, blocking};
use tokio::sync::mpsc;

use self::mounts::Mounts;
use crate::client::Services;
use crate::device::Given;
use crate::error::{Cause, Result, SolveError};
use crate::executor::cgroup::{ControlGroups, GroupLimits, Hierarchies};
use crate::executor::limits::{Limits, ResourceLimit};
use crate::executor::{self, ExecError, ExecSpec, Exit, MountStub, Network, Stdio};
use crate::graph::Vertex;
use crate::job::Worker;
use crate::operation::left::Left;
use crate::scratch::Scratch;

/// Output that may wait for whoever shows it, in chunks; a step that writes faster is held back.
const OUTPUT_CHUNKS: usize = 64;

/// What a process is run with.
pub(crate) struct Step<'a> {
    pub(crate) worker: &'a Worker,
    pub(crate) services: &'a Services,
    pub(crate) progress: &'a Arc<dyn ProgressSink>,
    pub(crate) vertex: &'a Vertex,
    pub(crate) inputs: &'a [Snapshot],
    /// What identifies the inputs.
    pub(crate) keys: &'a [ResultKey],
}

/// Runs the command of a vertex on its inputs.
///
/// # Errors
/// When it cannot be started, or ends with a code that is not a success.
pub(crate) async fn run(step: &Step<'_>, op: &pb::ExecOp) -> Result<Vec<Snapshot>> {
    let Step { worker, services, vertex, .. } = *step;
    let meta =
        op.meta.as_ref().ok_or_else(|| Cause::Invalid("a process without parameters".into()))?;
    let given = given_with_devices(worker, op).await?;
    let limits = resource_limits(meta)?;
    let groups = control_groups(meta, vertex.resources.as_ref()).await?;
    let secret_env = mounts::secret_env(services, &op.secretenv).await?;
    let sources = mounts::Sources {
        store: &worker.store,
        services,
        inputs: step.inputs,
        keys: step.keys,
        left: &[],
        cwd: &meta.cwd,
    };
    let mut mounts = Mounts::prepare(op, &sources).await?;
    let command = meta.args.join(" ");
    let mut spec = ExecSpec {
        lower: mounts.root.lower.clone(),
        stub: worker.store.stub_folder(),
        upper: mounts.root.upper(),
        work: mounts.root.work(),
        readonly_root: mounts.readonly_root,
        mounts: std::mem::take(&mut mounts.mounts),
        args: meta.args.clone(),
        env: environment(meta),
        cwd: meta.cwd.clone(),
        user: meta.user.clone(),
        hostname: meta.hostname.clone(),
        // A network of its own is not built yet: a step is given the host's, as its documentation says.
        network: if op.network == pb::NetMode::None as i32 { Network::None } else { Network::Host },
        insecure: op.security == pb::SecurityMode::Insecure as i32,
        extra_hosts: meta
            .extra_hosts
            .iter()
            .map(|host| (host.host.clone(), host.ip.clone()))
            .collect(),
        platform: vertex.platform.clone().unwrap_or_else(Platform::host),
        secret_env,
        limits: Limits { resources: limits, ..groups.limits() },
        ..ExecSpec::default()
    };
    given.apply(&mut spec);
    let done = execute(worker, step.progress, vertex, spec).await;
    drop_groups(groups).await;
    let failed = match done {
        Ok(exit) if is_success(meta, exit.code) => {
            let recursive = meta.remove_mount_stubs_recursive;
            return mounts.finish(&worker.store, &exit, recursive, &vertex.name).await;
        }
        failed => failed,
    };
    let error = SolveError::from(match failed {
        Ok(exit) => Cause::Exit { command, code: exit.code, hint: hint(&exit) },
        Err(error) => Cause::Start { command, error },
    });
    if services.keep_failed {
        return Err(error.leaving(Left::of_process(op, step.inputs, mounts)));
    }
    mounts.discard().await;
    Err(error)
}

/// Returns an operation as it counts for a key: without what changes how a process works but not what it gives.
pub(crate) fn keyed(op: &pb::ExecOp) -> pb::ExecOp {
    let mut op = op.clone();
    if let Some(meta) = &mut op.meta {
        // A proxy changes how bytes arrive, not which.
        meta.proxy_env = None;
        for host in &mut meta.extra_hosts {
            host.ip.clear();
        }
    }
    for mount in &mut op.mounts {
        // A cache is no part of what a step is, nor is its name, unless that is all there is to tell mounts apart.
        if let Some(cache) = &mut mount.cache_opt {
            let usual = cache.sharing == pb::CacheSharingOpt::Shared as i32
                && (cache.id == mount.dest || cache.id.ends_with(&format!("/{}", mount.dest)));
            if !usual {
                *cache = pb::CacheOpt::default();
            }
        }
    }
    op
}

fn resource_limits(meta: &pb::Meta) -> Result<Vec<ResourceLimit>> {
    let bound = |value: i64| u64::try_from(value).ok();
    meta.ulimit
        .iter()
        .map(|limit| {
            ResourceLimit::new(&limit.name, bound(limit.soft), bound(limit.hard))
                .map_err(|reason| Cause::Invalid(reason).into())
        })
        .collect()
}

/// Finds out what a process is given with the devices that it was admitted to.
async fn given_with_devices(worker: &Worker, op: &pb::ExecOp) -> Result<Given> {
    if op.cdi_devices.is_empty() {
        return Ok(Given::default());
    }
    let (devices, wanted) = (worker.devices.clone(), op.cdi_devices.clone());
    Ok(blocking::run(move || Ok(devices.read().give(&wanted))).await??)
}

/// Makes the groups that a process is to run in; none where nothing asks for one.
async fn control_groups(
    meta: &pb::Meta,
    resources: Option<&pb::LinuxResources>,
) -> Result<ControlGroups> {
    let limits = resources.map(group_limits).unwrap_or_default();
    if meta.cgroup_parent.is_empty() && limits.is_empty() {
        return Ok(ControlGroups::default());
    }
    let parent = meta.cgroup_parent.clone();
    let made = blocking::run(move || {
        Ok(Hierarchies::find()
            .and_then(|hierarchies| ControlGroups::create(&hierarchies, &parent, &limits)))
    });
    made.await?.map_err(|error| Cause::Invalid(error.to_string()).into())
}

fn group_limits(resources: &pb::LinuxResources) -> GroupLimits {
    let some = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
    let text = |value: &String| Some(value.clone()).filter(|value| !value.is_empty());
    GroupLimits {
        memory: some(resources.memory),
        memory_swap: Some(resources.memory_swap).filter(|value| *value != 0),
        cpu_shares: Some(resources.cpu_shares).filter(|value| *value > 0),
        cpu_period: Some(resources.cpu_period).filter(|value| *value > 0),
        cpu_quota: Some(resources.cpu_quota).filter(|value| *value != 0),
        cpuset_cpus: text(&resources.cpuset_cpus),
        cpuset_mems: text(&resources.cpuset_mems),
    }
}

/// Removing a group waits for the kernel.
async fn drop_groups(groups: ControlGroups) {
    let dropped = blocking::run(move || {
        drop(groups);
        Ok(())
    });
    if let Err(error) = dropped.await {
        tracing::debug!(%error, "a control group stays behind");
    }
}

fn is_success(meta: &pb::Meta, code: i32) -> bool {
    if meta.valid_exit_codes.is_empty() { code == 0 } else { meta.valid_exit_codes.contains(&code) }
}

pub(crate) fn environment(meta: &pb::Meta) -> Vec<String> {
    let mut env = meta.env.clone();
    if !env.iter().any(|variable| variable.starts_with("PATH=")) {
        env.push("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    }
    if let Some(proxy) = &meta.proxy_env {
        for (name, value) in [
            ("HTTP_PROXY", &proxy.http_proxy),
            ("HTTPS_PROXY", &proxy.https_proxy),
            ("FTP_PROXY", &proxy.ftp_proxy),
            ("NO_PROXY", &proxy.no_proxy),
            ("ALL_PROXY", &proxy.all_proxy),
        ] {
            if !value.is_empty() {
                env.push(format!("{name}={value}"));
                env.push(format!("{}={value}", name.to_ascii_lowercase()));
            }
        }
    }
    env
}

fn hint(exit: &Exit) -> String {
    match exit.signal {
        Some(9) => ": killed; the machine may have run out of memory".into(),
        Some(signal) => format!(": ended by signal {signal}"),
        None if exit.code == 127 => ": command not found".into(),
        None => String::new(),
    }
}

async fn execute(
    worker: &Worker,
    progress: &Arc<dyn ProgressSink>,
    vertex: &Vertex,
    spec: ExecSpec,
) -> std::result::Result<Exit, ExecError> {
    let (sender, mut receiver) = mpsc::channel::<(executor::Stream, bytes::Bytes)>(OUTPUT_CHUNKS);
    let output = async {
        while let Some((stream, data)) = receiver.recv().await {
            let stream = match stream {
                executor::Stream::Stdout => Stream::Stdout,
                executor::Stream::Stderr => Stream::Stderr,
            };
            progress.send(ProgressEvent::Log {
                vertex: vertex.digest.clone(),
                stream,
                data: (&*data).into(),
            });
        }
    };
    let (exit, ()) = tokio::join!(worker.executor.run(spec, Stdio::Piped(sender)), output);
    exit
}

/// The folders of a process under way.
#[derive(Debug)]
pub struct StepFolders {
    /// The layers below, base first.
    pub lower: Vec<PathBuf>,
    /// Holds `fs`, which takes what is written, and `work`, which the kernel uses.
    home: Scratch,
}

impl StepFolders {
    /// Returns the folder that takes what is written.
    pub fn upper(&self) -> PathBuf {
        self.home.path().join("fs")
    }

    /// Returns the folder for the kernel's own use.
    pub fn work(&self) -> PathBuf {
        self.home.path().join("work")
    }

    /// Throws away what was written.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn discard(self) -> slipway_store::Result<()> {
        let what = format!("cannot remove {}", self.home.path().display());
        self.home.remove().map_err(|error| Error::io(what, error))
    }

    /// Unpacks layers and makes the folders of a process on top of them.
    ///
    /// # Errors
    /// When a layer cannot be had or the disk fails.
    pub(crate) fn prepare(
        store: &Store,
        layers: &[slipway_store::snapshot::LayerId],
    ) -> slipway_store::Result<Self> {
        Self::on(store, store.folders(layers)?)
    }

    /// Makes the folders of a process on top of others, base first.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn on(store: &Store, lower: Vec<PathBuf>) -> slipway_store::Result<Self> {
        let made = Self { lower, home: Scratch::new(store.temporary("step")) };
        let (upper, work) = (made.upper(), made.work());
        for folder in [made.home.path(), &upper, &work] {
            fs::create_dir(folder)
                .map_err(|error| Error::io(format!("cannot create {}", folder.display()), error))?;
        }
        match made.lower.last() {
            // The root directory of a mount has the attributes of the topmost folder.
            Some(below) => copy_attributes(below, &upper)?,
            None => set_mode(&upper, 0o755)?,
        }
        Ok(made)
    }

    fn finish(
        self,
        store: &Store,
        stubs: &[MountStub],
        name: &str,
    ) -> slipway_store::Result<slipway_store::snapshot::LayerId> {
        let upper = self.upper();
        let failed = |what: &Path, error: std::io::Error| {
            Error::io(format!("cannot clean up {}", what.display()), error)
        };
        executor::remove_stubs(&upper, stubs).map_err(|error| failed(&upper, error))?;
        let work = self.work();
        fs::remove_dir_all(&work).map_err(|error| failed(&work, error))?;
        let below = self.lower;
        self.home.give(|home| store.adopt_folder(home, &below, name))
    }
}

fn set_mode(path: &Path, mode: u32) -> slipway_store::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|error| Error::io(format!("cannot set the mode of {}", path.display()), error))
}

fn copy_attributes(from: &Path, to: &Path) -> slipway_store::Result<()> {
    use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};
    let metadata = fs::metadata(from)
        .map_err(|error| Error::io(format!("cannot read {}", from.display()), error))?;
    let failed = |error: std::io::Error| {
        Error::io(format!("cannot set the attributes of {}", to.display()), error)
    };
    std::os::unix::fs::chown(to, Some(metadata.uid()), Some(metadata.gid())).map_err(failed)?;
    set_mode(to, metadata.mode() & 0o7777)?;
    let time = Timespec { tv_sec: metadata.mtime(), tv_nsec: metadata.mtime_nsec() as _ };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, to, &times, AtFlags::empty()).map_err(|error| failed(error.into()))
}
