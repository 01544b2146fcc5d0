//! Process execution: a root file system, a command, and the layer that it leaves.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use slipway_spec::Platform;
use slipway_spec::llb::pb;
use slipway_spec::progress::{ProgressEvent, ProgressSink, Stream};
use slipway_store::snapshot::Snapshot;
use slipway_store::{Error, Store, blocking};
use tokio::sync::mpsc;

use crate::error::{Cause, Result};
use crate::executor::{
    self, ExecError, ExecMount, ExecMountKind, ExecSpec, Exit, Network, Stdio, Writable,
};
use crate::graph::Vertex;
use crate::job::Worker;

/// Output that may wait for whoever shows it, in chunks; a step that writes faster is held back.
const OUTPUT_CHUNKS: usize = 64;

/// Runs the command of a vertex on its inputs.
///
/// # Errors
/// When it cannot be started, or ends with a code that is not a success.
pub(crate) async fn run(
    worker: &Worker,
    progress: &Arc<dyn ProgressSink>,
    vertex: &Vertex,
    op: &pb::ExecOp,
    inputs: &[Snapshot],
) -> Result<Vec<Snapshot>> {
    let platform = vertex.platform.clone().unwrap_or_else(Platform::host);
    let (meta, base, output, others) = read(op, inputs)?;
    let (store, layers) = (worker.store.clone(), base.layers.clone());
    let (folders, mounts) = blocking::run(move || {
        let folders = StepFolders::prepare(&store, &layers)?;
        let mounts = others
            .into_iter()
            .map(|mount| mount.prepare(&store))
            .collect::<slipway_store::Result<Vec<_>>>()?;
        Ok((folders, mounts))
    })
    .await?;
    let command = meta.args.join(" ");
    let spec = ExecSpec {
        lower: folders.lower.clone(),
        stub: worker.store.stub_folder(),
        upper: folders.upper(),
        work: folders.work(),
        readonly_root: false,
        mounts,
        args: meta.args.clone(),
        env: environment(meta),
        cwd: meta.cwd.clone(),
        user: meta.user.clone(),
        hostname: meta.hostname.clone(),
        // A network of its own is not built yet: a step is given the host's, as its documentation says.
        network: if op.network == pb::NetMode::None as i32 { Network::None } else { Network::Host },
        insecure: false,
        extra_hosts: meta
            .extra_hosts
            .iter()
            .map(|host| (host.host.clone(), host.ip.clone()))
            .collect(),
        resolv_conf: None,
        platform,
        tty: false,
    };
    let done = execute(worker, progress, vertex, spec).await;
    let cause = match done {
        Ok(exit) if is_success(meta, exit.code) => {
            let (store, name) = (worker.store.clone(), vertex.name.clone());
            let layer = blocking::run(move || folders.finish(&store, &exit, &name)).await?;
            let mut outputs = vec![Snapshot::default(); output + 1];
            outputs[output] = base.with(layer);
            return Ok(outputs);
        }
        Ok(exit) => Cause::Exit { command, code: exit.code, hint: hint(&exit) },
        Err(error) => Cause::Start { command, error },
    };
    // What a failed step wrote helps nobody; a process that lives long would gather it.
    if let Err(error) = blocking::run(move || folders.discard()).await {
        tracing::debug!(%error, "what a failed step wrote stays behind until this process ends");
    }
    Err(cause.into())
}

fn is_success(meta: &pb::Meta, code: i32) -> bool {
    if meta.valid_exit_codes.is_empty() { code == 0 } else { meta.valid_exit_codes.contains(&code) }
}
/// Takes an operation apart, refusing what is not built yet.
fn read<'a>(
    op: &'a pb::ExecOp,
    inputs: &[Snapshot],
) -> Result<(&'a pb::Meta, Snapshot, usize, Vec<OtherMount>)> {
    let unsupported = |what: &str| Err(Cause::Unsupported(what.to_owned()).into());
    let meta =
        op.meta.as_ref().ok_or_else(|| Cause::Invalid("a process without parameters".into()))?;
    if op.security != pb::SecurityMode::Sandbox as i32 {
        return unsupported("insecure execution");
    }
    if !op.secretenv.is_empty() || !op.cdi_devices.is_empty() {
        return unsupported("a secret or device for a process");
    }
    if !meta.ulimit.is_empty() || !meta.cgroup_parent.is_empty() {
        return unsupported("a resource limit for a process");
    }
    let (roots, others): (Vec<_>, Vec<_>) = op.mounts.iter().partition(|mount| mount.dest == "/");
    let [root] = roots.as_slice() else {
        return unsupported("a process with two root file systems");
    };
    if root.mount_type != pb::MountType::Bind as i32
        || root.readonly
        || !matches!(root.selector.as_str(), "" | "/")
    {
        return unsupported("a root file system that is read-only or part of a larger one");
    }
    let output = usize::try_from(root.output)
        .map_err(|_| Cause::Unsupported("a process whose changes are thrown away".into()))?;
    let base =
        usize::try_from(root.input).ok().and_then(|at| inputs.get(at)).cloned().unwrap_or_default();
    let others =
        others.into_iter().map(|mount| OtherMount::read(mount, inputs)).collect::<Result<_>>()?;
    Ok((meta, base, output, others))
}

/// A mount besides the root.
#[derive(Debug)]
struct OtherMount {
    dest: String,
    kind: OtherKind,
}

#[derive(Debug)]
enum OtherKind {
    Layers { snapshot: Snapshot, subpath: Option<String>, readonly: bool },
    Tmpfs { size: Option<u64> },
}

impl OtherMount {
    fn read(mount: &pb::Mount, inputs: &[Snapshot]) -> Result<Self> {
        let unsupported = |what: &str| Err(Cause::Unsupported(what.to_owned()).into());
        let kind = match pb::MountType::try_from(mount.mount_type) {
            Ok(pb::MountType::Bind) if mount.output >= 0 => {
                return unsupported("a mount whose changes become a result of their own");
            }
            Ok(pb::MountType::Bind) => {
                let input =
                    usize::try_from(mount.input).ok().and_then(|at| inputs.get(at)).cloned();
                OtherKind::Layers {
                    snapshot: input.unwrap_or_default(),
                    subpath: Some(mount.selector.clone())
                        .filter(|path| !matches!(path.as_str(), "" | "/")),
                    readonly: mount.readonly,
                }
            }
            Ok(pb::MountType::Tmpfs) => {
                let size = mount.tmpfs_opt.as_ref().and_then(|opt| u64::try_from(opt.size).ok());
                OtherKind::Tmpfs { size: size.filter(|size| *size > 0) }
            }
            Ok(pb::MountType::Cache) => return unsupported("a cache mount"),
            Ok(pb::MountType::Secret) => return unsupported("a secret mount"),
            Ok(pb::MountType::Ssh) => return unsupported("an SSH agent mount"),
            Err(_) => return unsupported("a mount of an unknown kind"),
        };
        Ok(Self { dest: mount.dest.clone(), kind })
    }

    fn prepare(self, store: &Store) -> slipway_store::Result<ExecMount> {
        let kind = match self.kind {
            OtherKind::Tmpfs { size } => ExecMountKind::Tmpfs { size },
            OtherKind::Layers { snapshot, subpath, readonly: true } => ExecMountKind::Overlay {
                lower: store.folders(&snapshot.layers)?,
                writable: None,
                subpath,
                readonly: true,
            },
            OtherKind::Layers { snapshot, subpath, readonly: false } => {
                // What is written is thrown away with this process's unfinished work.
                let folders = StepFolders::prepare(store, &snapshot.layers)?;
                let writable = Some(Writable { upper: folders.upper(), work: folders.work() });
                ExecMountKind::Overlay { lower: folders.lower, writable, subpath, readonly: false }
            }
        };
        Ok(ExecMount { dest: self.dest, kind })
    }
}

fn environment(meta: &pb::Meta) -> Vec<String> {
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
    home: PathBuf,
}

impl StepFolders {
    /// Returns the folder that takes what is written.
    pub fn upper(&self) -> PathBuf {
        self.home.join("fs")
    }

    /// Returns the folder for the kernel's own use.
    pub fn work(&self) -> PathBuf {
        self.home.join("work")
    }

    /// Throws away what was written.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn discard(self) -> slipway_store::Result<()> {
        fs::remove_dir_all(&self.home)
            .map_err(|error| Error::io(format!("cannot remove {}", self.home.display()), error))
    }

    /// Unpacks layers and makes the folders of a process on top of them.
    ///
    /// # Errors
    /// When a layer cannot be had or the disk fails.
    pub(crate) fn prepare(
        store: &Store,
        layers: &[slipway_store::snapshot::LayerId],
    ) -> slipway_store::Result<Self> {
        let lower = store.folders(layers)?;
        let home = store.temporary("step");
        let upper = home.join("fs");
        let work = home.join("work");
        for folder in [&home, &upper, &work] {
            fs::create_dir(folder)
                .map_err(|error| Error::io(format!("cannot create {}", folder.display()), error))?;
        }
        match lower.last() {
            // The root directory of a mount has the attributes of the topmost folder.
            Some(below) => copy_attributes(below, &upper)?,
            None => set_mode(&upper, 0o755)?,
        }
        Ok(Self { lower, home })
    }

    fn finish(
        self,
        store: &Store,
        exit: &Exit,
        name: &str,
    ) -> slipway_store::Result<slipway_store::snapshot::LayerId> {
        let upper = self.upper();
        let failed = |what: &Path, error: std::io::Error| {
            Error::io(format!("cannot clean up {}", what.display()), error)
        };
        executor::remove_stubs(&upper, &exit.created_stubs)
            .map_err(|error| failed(&upper, error))?;
        let work = self.work();
        fs::remove_dir_all(&work).map_err(|error| failed(&work, error))?;
        store.adopt_folder(&self.home, name)
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
