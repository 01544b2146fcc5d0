//! File systems joined to a place where processes are started one after the other, for a client that says which.

use std::sync::Arc;

use slipway_spec::Platform;
use slipway_spec::llb::pb;
use slipway_store::result::ResultKey;
use slipway_store::snapshot::Snapshot;
use slipway_store::view::View;
use slipway_store::{Store, blocking};

use super::mounts::{Mounts, Sources, secret_env};
use crate::client::Services;
use crate::error::Result;
use crate::executor::{ExecSpec, Network};
use crate::operation::left::Base;

/// What a container is made of.
#[derive(Clone, Debug, Default)]
pub struct ContainerRequest {
    /// What is mounted; the root is the mount on `/`.
    pub mounts: Vec<ContainerMount>,
    /// Which network its processes have.
    pub network: pb::NetMode,
    /// Its name; may be empty.
    pub hostname: String,
    /// Names and addresses that it knows beside.
    pub extra_hosts: Vec<(String, String)>,
    /// What its programs are for.
    pub platform: Option<Platform>,
}

/// One mount of a container.
#[derive(Clone, Debug)]
pub struct ContainerMount {
    /// Where and how it is mounted. What it says about inputs and outputs means nothing.
    pub mount: pb::Mount,
    /// The file system below it; `None` is the empty one. What is written to it is thrown away with the container.
    pub base: Option<Base>,
    /// What identifies that file system, where somebody knows; caches on top of it are known by it.
    pub key: Option<ResultKey>,
}

/// A process to start in a container.
#[derive(Clone, Debug, Default)]
pub struct ContainerProcess {
    /// The command, and who runs it where.
    pub meta: pb::Meta,
    /// Whether it has all rights.
    pub insecure: bool,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Variables that nobody else may see.
    pub secret_env: Vec<pb::SecretEnv>,
}

/// A place to start processes in. [`discard`](Self::discard) it when all of them have ended.
#[derive(Debug)]
pub struct Container {
    request: ContainerRequest,
    store: Store,
    services: Services,
    mounts: Mounts,
}

impl Container {
    /// Prepares all that its processes will see.
    pub(crate) async fn prepare(
        request: ContainerRequest,
        store: &Store,
        services: &Services,
    ) -> Result<Self> {
        let mut op = pb::ExecOp::default();
        let (mut inputs, mut left, mut keys) = (vec![], vec![], vec![]);
        for ContainerMount { mount, base, key } in &request.mounts {
            let input = match base {
                None => -1,
                Some(base) => {
                    let (snapshot, folders) = match base {
                        Base::Snapshot(snapshot) => (snapshot.clone(), None),
                        Base::Left(folders) => (Snapshot::default(), Some(Arc::clone(folders))),
                    };
                    inputs.push(snapshot);
                    left.push(folders);
                    keys.push((*key).unwrap_or(ResultKey([0; 32])));
                    i64::try_from(inputs.len() - 1).unwrap_or(-1)
                }
            };
            op.mounts.push(pb::Mount { input, output: -1, ..mount.clone() });
        }
        let sources =
            Sources { store, services, inputs: &inputs, keys: &keys, left: &left, cwd: "/" };
        let mounts = Mounts::prepare(&op, &sources).await?;
        Ok(Self { request, store: store.clone(), services: services.clone(), mounts })
    }

    /// Says how a process is started in it.
    ///
    /// # Errors
    /// When it may not have what it asks for, or a secret is not to be had.
    pub async fn spec(&self, process: &ContainerProcess) -> Result<ExecSpec> {
        let host = self.request.network == pb::NetMode::Host;
        self.services.entitlements.check(process.insecure, host)?;
        let secret_env = secret_env(&self.services, &process.secret_env).await?;
        let meta = &process.meta;
        let mut env = super::environment(meta);
        if process.tty && !env.iter().any(|variable| variable.starts_with("TERM=")) {
            env.push("TERM=xterm".into());
        }
        let ContainerRequest { network, hostname, extra_hosts, platform, .. } = &self.request;
        let Mounts { root, readonly_root, mounts, .. } = &self.mounts;
        Ok(ExecSpec {
            lower: root.lower.clone(),
            stub: self.store.stub_folder(),
            upper: root.upper(),
            work: root.work(),
            readonly_root: *readonly_root,
            mounts: mounts.clone(),
            args: meta.args.clone(),
            env,
            cwd: meta.cwd.clone(),
            user: meta.user.clone(),
            hostname: hostname.clone(),
            network: if *network == pb::NetMode::None { Network::None } else { Network::Host },
            insecure: process.insecure,
            extra_hosts: extra_hosts.clone(),
            platform: platform.clone().unwrap_or_else(Platform::host),
            tty: process.tty,
            secret_env,
            ..ExecSpec::default()
        })
    }

    /// Opens what one of its mounts shows now, and says which part of that it is; `None` when it shows no files.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn view(&self, mount: usize) -> Result<Option<(View, String)>> {
        let Some((folders, part)) = self.mounts.folders(mount) else { return Ok(None) };
        let store = self.store.clone();
        let view = blocking::run(move || Ok(View::of_stack(store.stack_folders(&folders)?)));
        Ok(Some((view.await?, part)))
    }

    /// Throws away what was written.
    pub async fn discard(self) {
        self.mounts.discard().await;
    }
}
