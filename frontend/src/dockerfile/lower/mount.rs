//! Mounts of `RUN`.

use slipway_spec::llb::{ExecMount, FileActions, MountOptions, Owner, State, WhoIs, pb};
use slipway_spec::pattern::clean_path;

use super::super::files::internal;
use super::super::instruction::{MountFlag, Run};
use super::super::mount::{self, Kind, Mount, Sharing};
use super::super::problem::{Problem, Result};
use super::super::stage::Step;
use super::{Builder, join};

/// What mounts add to a process.
#[derive(Debug, Default)]
pub(super) struct Mounts {
    pub(super) list: Vec<ExecMount>,
    pub(super) secret_env: Vec<pb::SecretEnv>,
    /// Where the first SSH agent is found.
    pub(super) ssh_socket: Option<String>,
    /// Variables that hold secrets.
    pub(super) masked: Vec<String>,
}

/// Where the folder of a cache is made when it is to have an owner.
const CACHE: &str = "/cache";

impl Builder<'_> {
    pub(super) fn mounts(&mut self, run: &Run, step: &Step) -> Result<Mounts> {
        let mut mounts = Mounts::default();
        let mut sockets = 0;
        for (position, flag) in run.mounts.iter().enumerate() {
            let mount = self.read_mount(flag)?;
            match mount.kind {
                Kind::Secret => self.secret(&mount, &mut mounts),
                Kind::Ssh => {
                    self.ssh(&mount, sockets, &mut mounts)?;
                    sockets += 1;
                }
                Kind::Bind | Kind::Cache | Kind::Tmpfs => {
                    let source = step.sources.get(position).copied();
                    mounts.list.push(self.plain_mount(mount, source)?);
                }
            }
        }
        Ok(mounts)
    }

    fn read_mount(&self, flag: &MountFlag) -> Result<Mount> {
        mount::parse(&flag.value, |text| self.expand(text))
    }

    fn secret(&mut self, mount: &Mount, mounts: &mut Mounts) {
        let named = if mount.source.is_empty() { &mount.id } else { &mount.source };
        let id = if named.is_empty() { base_name(&mount.target) } else { named };
        self.uses.secret(id, mount.required, self.lines);
        let optional = !mount.required;
        if let Some(name) = &mount.env {
            mounts.masked.push(name.clone());
            mounts.secret_env.push(pb::SecretEnv { id: id.into(), name: name.clone(), optional });
        }
        let dest = match (mount.target.as_str(), &mount.env) {
            // A variable is enough unless a file is asked for.
            ("", Some(_)) => return,
            ("", None) => format!("/run/secrets/{}", base_name(id)),
            (target, _) => target.to_owned(),
        };
        let options = MountOptions::Secret(pb::SecretOpt {
            id: id.into(),
            uid: mount.uid.unwrap_or(0),
            gid: mount.gid.unwrap_or(0),
            mode: mount.mode.unwrap_or(0o400),
            optional,
        });
        mounts.list.push(ExecMount { dest, options, ..ExecMount::default() });
    }

    fn ssh(&mut self, mount: &Mount, number: usize, mounts: &mut Mounts) -> Result<()> {
        if !mount.source.is_empty() {
            return Err(Problem::new("ssh does not support source").hint("name the agent with id="));
        }
        let id = if mount.id.is_empty() { "default" } else { &mount.id };
        self.uses.ssh(id, mount.required, self.lines);
        let dest = match mount.target.as_str() {
            "" => format!("/run/buildkit/ssh_agent.{number}"),
            target => target.to_owned(),
        };
        let options = MountOptions::Ssh(pb::SshOpt {
            id: mount.id.clone(),
            uid: mount.uid.unwrap_or(0),
            gid: mount.gid.unwrap_or(0),
            mode: mount.mode.unwrap_or(0o600),
            optional: !mount.required,
        });
        mounts.ssh_socket.get_or_insert_with(|| dest.clone());
        mounts.list.push(ExecMount { dest, options, ..ExecMount::default() });
        Ok(())
    }

    fn plain_mount(&mut self, mount: Mount, source: Option<usize>) -> Result<ExecMount> {
        // A cache that names nothing starts empty.
        let source = source.filter(|_| !mount.from.is_empty() || mount.kind == Kind::Cache);
        let mut state = match source {
            None => self.context.clone(),
            Some(index) => match &self.outcomes[index] {
                Some(outcome) => outcome.state.clone(),
                None => {
                    return Err(Problem::new(format!(
                        "cannot mount from stage {:?} to {:?}, stage needs to be defined before current command",
                        mount.from, mount.target
                    )));
                }
            },
        };
        let options = match mount.kind {
            Kind::Tmpfs => {
                state = State::scratch();
                MountOptions::Tmpfs(pb::TmpfsOpt { size: mount.size })
            }
            Kind::Cache => {
                let id = match mount.id.as_str() {
                    "" => clean_path(&mount.target),
                    id => id.to_owned(),
                };
                let mut cache = pb::CacheOpt {
                    id: format!("{}/{id}", self.plan.settings.cache_namespace),
                    ..pb::CacheOpt::default()
                };
                cache.set_sharing(match mount.sharing {
                    None | Some(Sharing::Shared) => pb::CacheSharingOpt::Shared,
                    Some(Sharing::Private) => pb::CacheSharingOpt::Private,
                    Some(Sharing::Locked) => pb::CacheSharingOpt::Locked,
                });
                MountOptions::Cache(cache)
            }
            Kind::Bind | Kind::Secret | Kind::Ssh => MountOptions::Bind,
        };
        let dest = if mount.target.starts_with('/') {
            mount.target.clone()
        } else {
            join(&self.out.cwd, &mount.target)
        };
        if dest == "/" {
            return Err(Problem::new(format!("invalid mount target {dest:?}")));
        }
        let path = clean_path(&format!("/{}", mount.source));
        let selector = if path != "/" {
            path.clone()
        } else if mount.has_owner() {
            state = owned_cache(&mount, &state);
            CACHE.into()
        } else {
            String::new()
        };
        match source {
            None => self.used.context.insert(path),
            Some(index) => self.used.stages[self.plan.root_of(index)].insert(path),
        };
        Ok(ExecMount { dest, source: state, selector, readonly: mount.readonly, options })
    }
}

/// Makes the folder that a cache starts with, so that it can have an owner.
fn owned_cache(mount: &Mount, state: &State) -> State {
    let id = |id: Option<u32>| Some(WhoIs::Id(id.unwrap_or(0)));
    let owner = Owner { user: id(mount.uid), group: id(mount.gid) };
    let mode = mount.mode.unwrap_or(0o755);
    let actions = FileActions::new().mkdir_in(CACHE, mode, Some(owner));
    state.file(actions, internal("setting cache mount permissions"))
}

/// Returns the last part of a path, as Go's `path.Base` does.
fn base_name(path: &str) -> &str {
    match path.trim_end_matches('/') {
        "" if path.is_empty() => ".",
        "" => "/",
        path => path.rsplit('/').next().unwrap_or(path),
    }
}
