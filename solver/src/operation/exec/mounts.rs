//! The mounts of a process: taken from the operation, prepared from what the build and its client have, and turned into
//! results when the process has ended.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use slipway_spec::llb::pb;
use slipway_store::kept::{KeptFolder, KeptKind, Sharing};
use slipway_store::result::ResultKey;
use slipway_store::snapshot::Snapshot;
use slipway_store::{Store, blocking};

use super::StepFolders;
use crate::client::secret::MAX_SECRET;
use crate::client::ssh::{AgentSocket, DEFAULT_AGENT, SocketOwner};
use crate::client::{SecretBytes, Services};
use crate::error::{Cause, Result};
use crate::executor::{Confidential, ExecMount, ExecMountKind, Exit, MountStub, Writable};
use crate::operation::left::LeftFolders;

/// How often a folder is asked for that another process has locked: at first, and in the end.
const WAIT: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// What mounts are prepared from.
pub(super) struct Sources<'a> {
    pub(super) store: &'a Store,
    pub(super) services: &'a Services,
    /// The file systems of the operation's inputs.
    pub(super) inputs: &'a [Snapshot],
    /// What identifies them.
    pub(super) keys: &'a [ResultKey],
    /// Inputs that are what a failed process has left, in place of those above.
    pub(super) left: &'a [Option<Arc<LeftFolders>>],
    pub(super) cwd: &'a str,
}

/// All mounts of a process under way, with what must be there as long as it runs.
#[derive(Debug)]
pub(crate) struct Mounts {
    pub(super) root: StepFolders,
    pub(super) readonly_root: bool,
    pub(super) mounts: Vec<ExecMount>,
    /// Which of the operation's mounts the root is.
    root_at: usize,
    root_output: Option<(usize, Snapshot)>,
    outputs: Vec<Output>,
    /// What is written there is thrown away; by the place of the mount.
    scratch: Vec<(usize, StepFolders)>,
    /// Folders that a mount shows, base first, and which part of them; by the place of the mount.
    shown: BTreeMap<usize, (Vec<PathBuf>, String)>,
    _kept: Vec<Arc<KeptFolder>>,
    _sockets: Vec<AgentSocket>,
}

/// One output beside the root's.
#[derive(Debug)]
struct Output {
    index: usize,
    base: Snapshot,
    /// Absent where nothing could be written.
    written: Option<Written>,
}

#[derive(Debug)]
struct Written {
    /// Which of the operation's mounts it is.
    at: usize,
    folders: StepFolders,
    dest: String,
    selector: String,
}

impl Mounts {
    /// Prepares all mounts of an operation.
    ///
    /// # Errors
    /// When the operation makes no sense, the client lacks what it needs, or the disk fails.
    pub(super) async fn prepare(op: &pb::ExecOp, sources: &Sources<'_>) -> Result<Self> {
        let (roots, others): (Vec<_>, Vec<_>) =
            op.mounts.iter().enumerate().partition(|(_, mount)| mount.dest == "/");
        let [(root_at, root)] = roots.as_slice() else {
            return Err(Cause::Invalid("a process with two root file systems".into()).into());
        };
        if root.mount_type != pb::MountType::Bind as i32 {
            return Err(Cause::Invalid("the root of a process must be a file system".into()).into());
        }
        if !matches!(root.selector.as_str(), "" | "/") {
            let what = "a root file system that is part of a larger one";
            return Err(Cause::Unsupported(what.into()).into());
        }
        let base = sources.input(root.input);
        let folders = sources.folders(root.input).await?;
        let mut all = Self {
            root_at: *root_at,
            root: folders,
            readonly_root: root.readonly,
            mounts: vec![],
            root_output: usize::try_from(root.output).ok().map(|index| (index, base)),
            outputs: vec![],
            scratch: vec![],
            shown: BTreeMap::new(),
            _kept: vec![],
            _sockets: vec![],
        };
        match all.prepare_others(&others, sources).await {
            Ok(()) => Ok(all),
            Err(error) => {
                all.discard().await;
                Err(error)
            }
        }
    }

    async fn prepare_others(
        &mut self,
        others: &[(usize, &pb::Mount)],
        sources: &Sources<'_>,
    ) -> Result<()> {
        let mut caches = self.caches(others, sources).await?.into_iter();
        for (at, mount) in others {
            let dest = join(sources.cwd, &mount.dest);
            let kind = match pb::MountType::try_from(mount.mount_type) {
                Ok(pb::MountType::Bind) => Some(self.bind(*at, mount, &dest, sources).await?),
                Ok(pb::MountType::Tmpfs) => {
                    let size =
                        mount.tmpfs_opt.as_ref().and_then(|opt| u64::try_from(opt.size).ok());
                    Some(ExecMountKind::Tmpfs { size: size.filter(|size| *size > 0) })
                }
                Ok(pb::MountType::Cache) => {
                    if let Ok(index) = usize::try_from(mount.output) {
                        let base = sources.input(mount.input);
                        self.outputs.push(Output { index, base, written: None });
                    }
                    caches.next().map(|kept| ExecMountKind::Bind {
                        source: kept.folder(),
                        subpath: selector(mount),
                        readonly: mount.readonly,
                    })
                }
                Ok(pb::MountType::Secret) => secret_file(mount, sources).await?,
                Ok(pb::MountType::Ssh) => self.agent(mount, sources).await?,
                Err(_) => {
                    return Err(Cause::Unsupported("a mount of an unknown kind".into()).into());
                }
            };
            if let Some(folders) = kind.as_ref().and_then(shown) {
                self.shown.insert(*at, (folders, mount.selector.clone()));
            }
            self.mounts.extend(kind.map(|kind| ExecMount { dest, kind }));
        }
        Ok(())
    }

    async fn bind(
        &mut self,
        at: usize,
        mount: &pb::Mount,
        dest: &str,
        sources: &Sources<'_>,
    ) -> Result<ExecMountKind> {
        let base = sources.input(mount.input);
        let output = usize::try_from(mount.output).ok();
        let subpath = selector(mount);
        if mount.readonly {
            let lower = sources.lower(mount.input).await?;
            self.outputs.extend(output.map(|index| Output { index, base, written: None }));
            return Ok(ExecMountKind::Overlay { lower, writable: None, subpath, readonly: true });
        }
        let folders = sources.folders(mount.input).await?;
        let writable = Some(Writable { upper: folders.upper(), work: folders.work() });
        let lower = folders.lower.clone();
        match output {
            None => self.scratch.push((at, folders)),
            Some(index) => {
                let selector = mount.selector.clone();
                let written = Written { at, folders, dest: dest.into(), selector };
                self.outputs.push(Output { index, base, written: Some(written) });
            }
        }
        Ok(ExecMountKind::Overlay { lower, writable, subpath, readonly: false })
    }

    /// Takes the folders of all cache mounts, in the mounts' order.
    ///
    /// Folders are locked in the order of their names, whatever the order of the mounts, so that two steps never wait
    /// for each other. Mounts of one step that name the same folder share it.
    async fn caches(
        &mut self,
        others: &[(usize, &pb::Mount)],
        sources: &Sources<'_>,
    ) -> Result<Vec<Arc<KeptFolder>>> {
        let mut names = vec![];
        let mut wanted: BTreeMap<(String, Vec<u8>), (Sharing, Snapshot)> = BTreeMap::new();
        for (_, mount) in others {
            if mount.mount_type != pb::MountType::Cache as i32 {
                continue;
            }
            let (id, sharing) = cache_name(mount)?;
            let base = sources.input(mount.input);
            let key = sources.key(mount.input);
            let strictest = |one: Sharing, other: Sharing| match (one, other) {
                (Sharing::Locked, _) | (_, Sharing::Locked) => Sharing::Locked,
                (Sharing::Private, _) | (_, Sharing::Private) => Sharing::Private,
                _ => Sharing::Shared,
            };
            let name = (id, key);
            wanted
                .entry(name.clone())
                .and_modify(|(known, _)| *known = strictest(*known, sharing))
                .or_insert((sharing, base));
            names.push(name);
        }
        let mut taken: BTreeMap<(String, Vec<u8>), Arc<KeptFolder>> = BTreeMap::new();
        for (name, (sharing, base)) in wanted {
            let mut pause = WAIT.0;
            let folder = loop {
                let (store, id, key) = (sources.store.clone(), name.0.clone(), name.1.clone());
                let base = base.clone();
                let found = blocking::run(move || {
                    store.try_keep(KeptKind::Cache, &id, &key, sharing, |folder| {
                        if base.layers.is_empty() {
                            return Ok(());
                        }
                        store.view(&base.layers)?.flatten()?.write_folder(folder, store.overlay())
                    })
                });
                if let Some(folder) = found.await? {
                    break folder;
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(WAIT.1);
            };
            let folder = Arc::new(folder);
            self._kept.push(folder.clone());
            taken.insert(name, folder);
        }
        Ok(names.iter().filter_map(|name| taken.get(name).cloned()).collect())
    }

    async fn agent(
        &mut self,
        mount: &pb::Mount,
        sources: &Sources<'_>,
    ) -> Result<Option<ExecMountKind>> {
        let options = mount.ssh_opt.clone().unwrap_or_default();
        let id = if options.id.is_empty() { DEFAULT_AGENT } else { &options.id };
        if !sources.services.ssh.check(id).await? {
            if options.optional {
                return Ok(None);
            }
            return Err(
                Cause::Missing(format!("no SSH key {id:?} forwarded from the client")).into()
            );
        }
        let owner = SocketOwner { uid: options.uid, gid: options.gid, mode: options.mode };
        let agents = sources.services.ssh.clone();
        let socket = AgentSocket::open(sources.store, agents, id, owner)?;
        let source = socket.path();
        self._sockets.push(socket);
        Ok(Some(ExecMountKind::Bind { source, subpath: None, readonly: false }))
    }

    /// Makes results of what was written, and throws the rest away.
    ///
    /// # Errors
    /// When the disk fails.
    pub(super) async fn finish(
        self,
        store: &Store,
        exit: &Exit,
        recursive: bool,
        name: &str,
    ) -> Result<Vec<Snapshot>> {
        let Self { root, readonly_root, root_at, root_output, outputs, mut scratch, .. } = self;
        let (store, name) = (store.clone(), name.to_owned());
        let stubs = removable(&exit.created_stubs, recursive);
        Ok(blocking::run(move || {
            let mut results: Vec<Snapshot> = vec![];
            let mut put = |index: usize, snapshot: Snapshot| {
                if results.len() <= index {
                    results.resize(index + 1, Snapshot::default());
                }
                results[index] = snapshot;
            };
            for Output { index, base, written } in outputs {
                let snapshot = match written {
                    None => base,
                    Some(written) => {
                        let inside = below(&stubs, &written.dest, &written.selector);
                        base.with(written.folders.finish(&store, &inside, &name)?)
                    }
                };
                put(index, snapshot);
            }
            match root_output {
                Some((index, base)) if !readonly_root => {
                    put(index, base.with(root.finish(&store, &stubs, &name)?));
                }
                Some((index, base)) => {
                    put(index, base);
                    scratch.push((root_at, root));
                }
                None => scratch.push((root_at, root)),
            }
            scratch.into_iter().for_each(|(_, folders)| throw_away(folders));
            Ok(results)
        })
        .await?)
    }

    /// Throws everything away: what a failed step wrote helps nobody, and a process that lives long would gather it.
    pub(super) async fn discard(self) {
        let all = self.leave();
        let done = blocking::run(move || {
            all.into_iter().for_each(|(_, folders)| throw_away(folders));
            Ok(())
        });
        if let Err(error) = done.await {
            tracing::debug!(%error, "what a step wrote stays behind until this process ends");
        }
    }

    /// Returns the folders that a mount of the operation shows, base first, and which part of them; `None` when it shows
    /// none, such as a secret.
    pub(super) fn folders(&self, at: usize) -> Option<(Vec<PathBuf>, String)> {
        if at == self.root_at {
            let all = self.root.lower.iter().cloned().chain([self.root.upper()]).collect();
            return Some((all, String::new()));
        }
        self.shown.get(&at).cloned()
    }

    /// Gives away what was written, by the places of the operation's mounts.
    pub(crate) fn leave(self) -> Vec<(usize, StepFolders)> {
        let Self { root, root_at, outputs, scratch, .. } = self;
        let written = outputs.into_iter().filter_map(|output| output.written);
        std::iter::once((root_at, root))
            .chain(written.map(|written| (written.at, written.folders)))
            .chain(scratch)
            .collect()
    }
}

impl Sources<'_> {
    fn input(&self, index: i64) -> Snapshot {
        usize::try_from(index).ok().and_then(|at| self.inputs.get(at)).cloned().unwrap_or_default()
    }

    /// Returns an input's folders, base first, unpacking what is not.
    async fn lower(&self, index: i64) -> Result<Vec<PathBuf>> {
        let left = usize::try_from(index).ok().and_then(|at| self.left.get(at)).cloned().flatten();
        if let Some(left) = left {
            return Ok(left.lower());
        }
        let (store, layers) = (self.store.clone(), self.input(index).layers);
        Ok(blocking::run(move || store.folders(&layers)).await?)
    }

    /// Makes folders to write to, on top of an input's.
    async fn folders(&self, index: i64) -> Result<StepFolders> {
        let (store, lower) = (self.store.clone(), self.lower(index).await?);
        Ok(blocking::run(move || StepFolders::on(&store, lower)).await?)
    }

    fn key(&self, index: i64) -> Vec<u8> {
        let key = usize::try_from(index).ok().and_then(|at| self.keys.get(at));
        key.map(|key| key.0.to_vec()).unwrap_or_default()
    }
}

fn shown(kind: &ExecMountKind) -> Option<Vec<PathBuf>> {
    match kind {
        ExecMountKind::Overlay { lower, writable, .. } => {
            let upper = writable.iter().map(|writable| writable.upper.clone());
            Some(lower.iter().cloned().chain(upper).collect())
        }
        ExecMountKind::Bind { source, .. } if source.is_dir() => Some(vec![source.clone()]),
        _ => None,
    }
}

fn throw_away(folders: StepFolders) {
    if let Err(error) = folders.discard() {
        tracing::debug!(%error, "what a step wrote stays behind until this process ends");
    }
}

/// Returns the id of a cache mount and how it is shared.
pub(crate) fn cache_name(mount: &pb::Mount) -> Result<(String, Sharing)> {
    let options = mount.cache_opt.clone().unwrap_or_default();
    let id = if options.id.is_empty() { mount.dest.clone() } else { options.id };
    let sharing = match pb::CacheSharingOpt::try_from(options.sharing) {
        Ok(pb::CacheSharingOpt::Shared) => Sharing::Shared,
        Ok(pb::CacheSharingOpt::Private) => Sharing::Private,
        Ok(pb::CacheSharingOpt::Locked) => Sharing::Locked,
        Err(_) => {
            return Err(Cause::Invalid(format!("cache mount {id:?}: unknown sharing")).into());
        }
    };
    Ok((id, sharing))
}

async fn secret_file(mount: &pb::Mount, sources: &Sources<'_>) -> Result<Option<ExecMountKind>> {
    let options = mount.secret_opt.clone().unwrap_or_default();
    if options.id.is_empty() {
        return Err(Cause::Invalid(format!("the secret for {} has no id", mount.dest)).into());
    }
    let found = secret(sources.services, &options.id, options.optional).await?;
    Ok(found.map(|secret| ExecMountKind::File {
        content: secret.expose().into(),
        mode: options.mode & 0o777,
        uid: options.uid,
        gid: options.gid,
    }))
}

/// Asks the client for the secrets that stand in a process's environment.
pub(super) async fn secret_env(
    services: &Services,
    variables: &[pb::SecretEnv],
) -> Result<Vec<(String, Confidential)>> {
    let mut found = vec![];
    for variable in variables {
        let secret = secret(services, &variable.id, variable.optional).await?;
        found.extend(secret.map(|secret| (variable.name.clone(), secret.expose().into())));
    }
    Ok(found)
}

/// Asks the client for a secret; one that may be absent is `None` then.
async fn secret(services: &Services, id: &str, optional: bool) -> Result<Option<SecretBytes>> {
    match services.secrets.secret(id).await? {
        Some(secret) if secret.expose().len() > MAX_SECRET => Err(Cause::Invalid(format!(
            "secret {id}: it has {} bytes, and at most {MAX_SECRET} are allowed",
            secret.expose().len()
        ))
        .into()),
        None if !optional => Err(Cause::Missing(format!(
            "secret {id}: not found; give it to the build, for example with --secret id={id},src=FILE"
        ))
        .into()),
        found => Ok(found),
    }
}

fn selector(mount: &pb::Mount) -> Option<String> {
    Some(mount.selector.clone()).filter(|path| !path.trim_matches('/').is_empty())
}

/// A relative destination is below the working directory.
fn join(cwd: &str, dest: &str) -> String {
    if dest.starts_with('/') { dest.into() } else { format!("/{}/{dest}", cwd.trim_matches('/')) }
}

/// Which of the mount points that were made are removed again: all, or without folders that only lead to others.
fn removable(stubs: &[MountStub], recursive: bool) -> Vec<MountStub> {
    let leads = |stub: &MountStub| {
        stubs.iter().any(|other| {
            other.path.strip_prefix(&stub.path).is_some_and(|rest| rest.starts_with('/'))
        })
    };
    stubs.iter().filter(|stub| recursive || !leads(stub)).cloned().collect()
}

/// Those of the mount points that were made inside another mount, as they are called there.
fn below(stubs: &[MountStub], dest: &str, selector: &str) -> Vec<MountStub> {
    let clean = |path: &str| -> Vec<String> {
        path.split('/')
            .filter(|part| !part.is_empty() && *part != ".")
            .map(ToOwned::to_owned)
            .collect()
    };
    let (dest, selector) = (clean(dest), clean(selector));
    stubs
        .iter()
        .filter_map(|stub| {
            let path = clean(&stub.path);
            let rest = path.strip_prefix(dest.as_slice()).filter(|rest| !rest.is_empty())?;
            let path = [selector.as_slice(), rest].concat().join("/");
            Some(MountStub { path, directory: stub.directory })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stubs(paths: &[&str]) -> Vec<MountStub> {
        paths.iter().map(|path| MountStub { path: (*path).into(), directory: true }).collect()
    }

    fn paths(stubs: &[MountStub]) -> Vec<&str> {
        stubs.iter().map(|stub| stub.path.as_str()).collect()
    }

    #[test]
    fn destinations_are_below_the_working_directory() {
        assert_eq!(join("/src", "a/b"), "/src/a/b");
        assert_eq!(join("", "a"), "//a");
        assert_eq!(join("/src", "/a"), "/a");
    }

    #[test]
    fn mount_points_go_with_their_parents_or_alone() {
        let made = stubs(&["a", "a/b", "a/b/c", "ab"]);
        assert_eq!(paths(&removable(&made, true)).len(), 4);
        assert_eq!(paths(&removable(&made, false)), ["a/b/c", "ab"]);
        assert_eq!(paths(&below(&made, "/a", "/sub")), ["sub/b", "sub/b/c"]);
    }
}
