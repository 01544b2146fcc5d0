//! The builder that frontends write graphs with.
//!
//! A [`State`] is an output of a vertex, or nothing (scratch). Every method that adds a vertex returns a new state;
//! the old one stays usable, so graphs branch freely. A vertex is serialised when it is made, which is possible because
//! its inputs exist already; [`super::marshal`] only gathers.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use prost::Message as _;

use super::{Definition, DefinitionError, pb};
use crate::{Digest, ImageReference, Platform};

/// The file system that a vertex makes, or nothing.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub(super) output: Option<Output>,
}

#[derive(Clone, Debug)]
pub(super) struct Output {
    pub(super) vertex: Arc<Vertex>,
    pub(super) index: i64,
}

#[derive(Debug)]
pub(super) struct Vertex {
    pub(super) bytes: Vec<u8>,
    pub(super) digest: Digest,
    pub(super) metadata: pb::OpMetadata,
    pub(super) lines: Vec<Lines>,
    pub(super) inputs: Vec<Arc<Self>>,
}

impl Drop for Vertex {
    fn drop(&mut self) {
        // The default would recurse once per vertex, and a long file could exhaust the stack.
        let mut rest = std::mem::take(&mut self.inputs);
        while let Some(vertex) = rest.pop() {
            if let Some(mut last) = Arc::into_inner(vertex) {
                rest.append(&mut last.inputs);
            }
        }
    }
}

/// A run of lines of the file the user wrote, counted from 1, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lines {
    /// The first line.
    pub first: u32,
    /// The last line.
    pub last: u32,
}

/// What is said about a vertex beside what it does. Only `platform` is part of its identity.
#[derive(Clone, Debug, Default)]
pub struct VertexOptions {
    /// Its name for people; empty leaves naming to the reader.
    pub name: String,
    /// Further descriptions.
    pub description: BTreeMap<String, String>,
    /// Whether to run it even if its result is known.
    pub ignore_cache: bool,
    /// Where the user asked for it.
    pub lines: Vec<Lines>,
    /// What a process or image is for; other vertices have no platform.
    pub platform: Option<Platform>,
    /// Vertices to show as one.
    pub progress_group: Option<pb::ProgressGroup>,
    /// What a process may use; no part of the vertex, so that a limit does not spoil the cache.
    pub linux_resources: Option<pb::LinuxResources>,
}

/// A process to run.
#[derive(Clone, Debug, Default)]
pub struct Exec {
    /// Arguments, environment, folder, user and so on.
    pub meta: pb::Meta,
    /// Which network it sees.
    pub network: pb::NetMode,
    /// Which privileges it has.
    pub security: pb::SecurityMode,
    /// Secrets in its environment.
    pub secret_env: Vec<pb::SecretEnv>,
    /// Devices it sees.
    pub devices: Vec<pb::CdiDevice>,
    /// Mounts beside the root.
    pub mounts: Vec<ExecMount>,
}

/// A mount of an [`Exec`].
#[derive(Clone, Debug, Default)]
pub struct ExecMount {
    /// Where.
    pub dest: String,
    /// What.
    pub source: State,
    /// Which part of the source; empty for all.
    pub selector: String,
    /// Whether the process may not write to it.
    pub readonly: bool,
    /// The kind and its options; for a bind all options are absent and writes are thrown away.
    pub options: MountOptions,
}

/// The kinds of mounts.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum MountOptions {
    /// A file system from the graph.
    #[default]
    Bind,
    /// A folder that outlives the build.
    Cache(pb::CacheOpt),
    /// Memory, with a size in bytes or 0.
    Tmpfs(pb::TmpfsOpt),
    /// A secret as a file.
    Secret(pb::SecretOpt),
    /// A socket of an SSH agent.
    Ssh(pb::SshOpt),
}

/// A user or group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WhoIs {
    /// By number.
    Id(u32),
    /// By name, looked up in the files of the state that is changed.
    Name(String),
}

/// Who owns what a file action makes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// The user; `None` leaves it.
    pub user: Option<WhoIs>,
    /// The group; `None` leaves it.
    pub group: Option<WhoIs>,
}

/// A copy; see [`pb::FileActionCopy`] for the meaning of the switches.
#[derive(Clone, Debug, Default)]
pub struct Copy {
    /// Path or pattern in the source.
    pub src: String,
    /// Where to; a slash at the end means a directory.
    pub dest: String,
    /// Who owns the copies; `None` keeps the source's owner.
    pub owner: Option<Owner>,
    /// Permission bits; `None` keeps the source's.
    pub mode: Option<u32>,
    /// A symbolic mode, such as `u+x`; wins over `mode`.
    pub mode_text: String,
    /// Follow symbolic links in the source path.
    pub follow_symlink: bool,
    /// Copy what is in a directory instead of the directory.
    pub dir_copy_contents: bool,
    /// Unpack archives.
    pub attempt_unpack: bool,
    /// Make missing parents of the destination.
    pub create_dest_path: bool,
    /// Take `src` as a pattern.
    pub allow_wildcard: bool,
    /// Accept that the pattern matches nothing.
    pub allow_empty_wildcard: bool,
    /// Copy only these.
    pub include_patterns: Vec<String>,
    /// Do not copy these.
    pub exclude_patterns: Vec<String>,
    /// Fail when one of these does not exist.
    pub required_paths: Vec<String>,
    /// Nanoseconds since 1970 for everything made; `None` keeps the source's times.
    pub timestamp: Option<i64>,
}

/// A chain of file actions, each on the outcome of the one before.
#[derive(Clone, Debug, Default)]
pub struct FileActions {
    steps: Vec<Step>,
}

#[derive(Clone, Debug)]
struct Step {
    secondary: Option<State>,
    action: pb::file_action::Action,
    owner: Option<Owner>,
}

impl FileActions {
    /// Starts an empty chain.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns whether the chain has no action.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Adds a copy from a state.
    #[must_use]
    pub fn copy(mut self, from: &State, copy: Copy) -> Self {
        let action = pb::FileActionCopy {
            src: copy.src,
            dest: copy.dest,
            owner: None,
            mode: match copy.mode {
                // Upstream leaves the number at 0 beside a symbolic mode.
                _ if !copy.mode_text.is_empty() => 0,
                Some(mode) => i32::try_from(mode).unwrap_or(-1),
                None => -1,
            },
            mode_str: copy.mode_text,
            follow_symlink: copy.follow_symlink,
            dir_copy_contents: copy.dir_copy_contents,
            attempt_unpack_docker_compatibility: copy.attempt_unpack,
            create_dest_path: copy.create_dest_path,
            allow_wildcard: copy.allow_wildcard,
            allow_empty_wildcard: copy.allow_empty_wildcard,
            timestamp: copy.timestamp.unwrap_or(-1),
            include_patterns: copy.include_patterns,
            exclude_patterns: copy.exclude_patterns,
            required_paths: copy.required_paths,
            always_replace_existing_dest_paths: false,
        };
        self.steps.push(Step {
            secondary: Some(from.clone()),
            action: pb::file_action::Action::Copy(action),
            owner: copy.owner,
        });
        self
    }

    /// Adds a file.
    #[must_use]
    pub fn mkfile(
        mut self,
        path: &str,
        mode: u32,
        data: Vec<u8>,
        owner: Option<Owner>,
        timestamp: Option<i64>,
    ) -> Self {
        let action = pb::FileActionMkFile {
            path: path.into(),
            mode: i32::try_from(mode).unwrap_or(0o644),
            data,
            owner: None,
            timestamp: timestamp.unwrap_or(-1),
        };
        self.steps.push(Step {
            secondary: None,
            action: pb::file_action::Action::Mkfile(action),
            owner,
        });
        self
    }

    /// Adds a directory with its parents.
    #[must_use]
    pub fn mkdir(
        mut self,
        path: &str,
        mode: u32,
        owner: Option<Owner>,
        timestamp: Option<i64>,
    ) -> Self {
        let action = pb::FileActionMkDir {
            path: path.into(),
            mode: i32::try_from(mode).unwrap_or(0o755),
            make_parents: true,
            owner: None,
            timestamp: timestamp.unwrap_or(-1),
        };
        self.steps.push(Step {
            secondary: None,
            action: pb::file_action::Action::Mkdir(action),
            owner,
        });
        self
    }

    /// Adds a directory whose parent must exist.
    #[must_use]
    pub fn mkdir_in(mut self, path: &str, mode: u32, owner: Option<Owner>) -> Self {
        let action = pb::FileActionMkDir {
            path: path.into(),
            mode: i32::try_from(mode & 0o777).unwrap_or(0o755),
            make_parents: false,
            owner: None,
            timestamp: -1,
        };
        self.steps.push(Step {
            secondary: None,
            action: pb::file_action::Action::Mkdir(action),
            owner,
        });
        self
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn symlink(
        mut self,
        old: &str,
        new: &str,
        owner: Option<Owner>,
        timestamp: Option<i64>,
    ) -> Self {
        let action = pb::FileActionSymlink {
            oldpath: old.into(),
            newpath: new.into(),
            owner: None,
            timestamp: timestamp.unwrap_or(-1),
        };
        self.steps.push(Step {
            secondary: None,
            action: pb::file_action::Action::Symlink(action),
            owner,
        });
        self
    }

    /// Adds a removal.
    #[must_use]
    pub fn rm(mut self, path: &str, allow_not_found: bool, allow_wildcard: bool) -> Self {
        let action = pb::FileActionRm { path: path.into(), allow_not_found, allow_wildcard };
        self.steps.push(Step {
            secondary: None,
            action: pb::file_action::Action::Rm(action),
            owner: None,
        });
        self
    }
}

/// The inputs of an op under construction, each listed once.
#[derive(Default)]
struct Inputs {
    messages: Vec<pb::Input>,
    vertices: Vec<Arc<Vertex>>,
}

impl Inputs {
    /// Returns the position of a state among the inputs, or -1 for scratch.
    fn add(&mut self, state: &State) -> i64 {
        self.find_or_push(state, true)
    }

    /// Lists a state once more, even if it is among the inputs; -1 for scratch.
    fn push(&mut self, state: &State) -> i64 {
        self.find_or_push(state, false)
    }

    fn find_or_push(&mut self, state: &State, share: bool) -> i64 {
        let Some(output) = &state.output else { return -1 };
        let message = pb::Input { digest: output.vertex.digest.to_string(), index: output.index };
        // Two vertices may be the same step asked for at two places; both are kept, for what is said about them.
        if !self.vertices.iter().any(|known| Arc::ptr_eq(known, &output.vertex)) {
            self.vertices.push(Arc::clone(&output.vertex));
        }
        let position = self.messages.iter().position(|known| share && *known == message);
        let position = position.unwrap_or_else(|| {
            self.messages.push(message);
            self.messages.len() - 1
        });
        to_index(position)
    }
}

fn to_index(position: usize) -> i64 {
    i64::try_from(position).unwrap_or(i64::MAX)
}

impl State {
    /// Returns the empty file system.
    pub fn scratch() -> Self {
        Self::default()
    }

    /// Returns whether this is the empty file system.
    pub fn is_scratch(&self) -> bool {
        self.output.is_none()
    }

    /// Returns the digest of the vertex, unless this is scratch.
    pub fn digest(&self) -> Option<&Digest> {
        self.output.as_ref().map(|output| &output.vertex.digest)
    }

    /// Adds a source of any scheme.
    pub fn source(
        identifier: &str,
        attrs: BTreeMap<String, String>,
        options: VertexOptions,
    ) -> Self {
        // Only images differ by platform.
        let specific =
            identifier.starts_with("docker-image://") || identifier.starts_with("oci-layout://");
        let op = pb::op::Op::Source(pb::SourceOp { identifier: identifier.into(), attrs });
        Self::vertex(op, Inputs::default(), specific, options)
    }

    /// Adds an image; `options.platform` chooses within an index.
    pub fn image(
        reference: &ImageReference,
        attrs: BTreeMap<String, String>,
        options: VertexOptions,
    ) -> Self {
        Self::source(&format!("docker-image://{reference}"), attrs, options)
    }

    /// Adds files of the client, such as the build context.
    pub fn local(name: &str, attrs: BTreeMap<String, String>, options: VertexOptions) -> Self {
        Self::source(&format!("local://{name}"), attrs, options)
    }

    /// Adds a file fetched over HTTP; `url` is the identifier as it stands.
    pub fn http(url: &str, attrs: BTreeMap<String, String>, options: VertexOptions) -> Self {
        Self::source(url, attrs, options)
    }

    /// Adds an image of the client's OCI layout.
    pub fn oci_layout(
        reference: &ImageReference,
        attrs: BTreeMap<String, String>,
        options: VertexOptions,
    ) -> Self {
        Self::source(&format!("oci-layout://{reference}"), attrs, options)
    }

    /// Takes up a graph that was marshalled elsewhere, so that more can be built on it.
    ///
    /// Its vertices keep their bytes, and so their digests; what it says of its own source files is left out.
    ///
    /// # Errors
    /// When the definition is not well formed.
    pub fn from_definition(definition: &Definition) -> Result<Self, DefinitionError> {
        let (head, index) = definition.head()?;
        let mut known: HashMap<String, Arc<Vertex>> = HashMap::new();
        for (position, (digest, op)) in definition.vertices()?.into_iter().enumerate() {
            let find = |input: &pb::Input| {
                let missing =
                    || DefinitionError::MissingInput { op: position, input: input.digest.clone() };
                known.get(&input.digest).cloned().ok_or_else(missing)
            };
            let vertex = Vertex {
                inputs: op.inputs.iter().map(find).collect::<Result<_, _>>()?,
                bytes: definition.ops[position].clone(),
                metadata: definition.metadata.get(&digest).cloned().unwrap_or_default(),
                lines: vec![],
                digest: digest.clone(),
            };
            known.insert(digest.to_string(), Arc::new(vertex));
        }
        let vertex = known.remove(&head.to_string()).ok_or(DefinitionError::MissingInput {
            op: definition.ops.len().saturating_sub(1),
            input: head.to_string(),
        })?;
        Ok(Self { output: Some(Output { vertex, index: to_index(index) }) })
    }

    /// Returns the source op that this state is, if it is one and nothing was built on it.
    pub fn source_op(&self) -> Option<pb::SourceOp> {
        let output = self.output.as_ref()?;
        match pb::Op::decode(output.vertex.bytes.as_slice()).ok()?.op? {
            pb::op::Op::Source(source) => Some(source),
            _ => None,
        }
    }

    /// Adds a process whose root is this state, and returns its root afterwards.
    #[must_use]
    pub fn exec(&self, exec: Exec, options: VertexOptions) -> Self {
        self.exec_keeping(exec, None, options)
    }

    /// Adds a process as [`exec`](Self::exec) does, and returns what its mount at `dest` holds afterwards: one of its bind
    /// mounts that may be written to.
    #[must_use]
    pub fn exec_into(&self, exec: Exec, dest: &str, options: VertexOptions) -> Self {
        self.exec_keeping(exec, Some(dest), options)
    }

    fn exec_keeping(&self, exec: Exec, kept: Option<&str>, options: VertexOptions) -> Self {
        let root = ExecMount { dest: "/".into(), source: self.clone(), ..Default::default() };
        let mut mounts: Vec<(bool, ExecMount)> = vec![(true, root)];
        mounts.extend(exec.mounts.into_iter().map(|mount| (false, mount)));
        // Plain mounts are ordered by destination; secrets follow in the order given, then sockets.
        let rank = |mount: &ExecMount| match mount.options {
            MountOptions::Bind | MountOptions::Cache(_) | MountOptions::Tmpfs(_) => 0,
            MountOptions::Secret(_) => 1,
            MountOptions::Ssh(_) => 2,
        };
        mounts.sort_by(|(_, a), (_, b)| match (rank(a), rank(b)) {
            (0, 0) => a.dest.cmp(&b.dest),
            (first, second) => first.cmp(&second),
        });
        let mut inputs = Inputs::default();
        let mounts = mounts.into_iter().map(|(is_root, mount)| {
            let late = rank(&mount) > 0;
            let output = match kept {
                _ if is_root || late => 0,
                // The root is always the first.
                Some(dest) if mount.dest == dest => 1,
                _ => -1,
            };
            let mut message = pb::Mount {
                input: if late { -1 } else { inputs.add(&mount.source) },
                selector: mount.selector,
                dest: mount.dest,
                output,
                readonly: mount.readonly,
                ..Default::default()
            };
            match mount.options {
                MountOptions::Bind => {}
                MountOptions::Cache(cache) => {
                    message.set_mount_type(pb::MountType::Cache);
                    message.cache_opt = Some(cache);
                }
                MountOptions::Tmpfs(tmpfs) => {
                    message.set_mount_type(pb::MountType::Tmpfs);
                    message.tmpfs_opt = Some(tmpfs);
                }
                MountOptions::Secret(secret) => {
                    message.set_mount_type(pb::MountType::Secret);
                    message.secret_opt = Some(secret);
                }
                MountOptions::Ssh(ssh) => {
                    message.set_mount_type(pb::MountType::Ssh);
                    message.ssh_opt = Some(ssh);
                }
            }
            message
        });
        let message = pb::ExecOp {
            mounts: mounts.collect(),
            meta: Some(exec.meta),
            network: exec.network.into(),
            security: exec.security.into(),
            secretenv: exec.secret_env,
            cdi_devices: exec.devices,
        };
        let mut state = Self::vertex(pb::op::Op::Exec(message), inputs, true, options);
        if let (Some(output), Some(_)) = (&mut state.output, kept) {
            output.index = 1;
        }
        state
    }

    /// Adds one file op with these actions, or nothing when there are none.
    #[must_use]
    pub fn file(&self, actions: FileActions, options: VertexOptions) -> Self {
        if actions.is_empty() {
            return self.clone();
        }
        let mut inputs = Inputs::default();
        let base = inputs.add(self);
        let secondary: Vec<i64> = actions
            .steps
            .iter()
            .map(|step| step.secondary.as_ref().map_or(-1, |state| inputs.add(state)))
            .collect();
        let first_output = inputs.messages.len();
        let last = actions.steps.len() - 1;
        let messages = actions.steps.into_iter().zip(secondary).enumerate().map(
            |(position, (step, secondary_input))| {
                let mut action = step.action;
                let owner = step.owner.map(|owner| owner.to_pb(base));
                match &mut action {
                    pb::file_action::Action::Copy(copy) => copy.owner = owner,
                    pb::file_action::Action::Mkfile(mkfile) => mkfile.owner = owner,
                    pb::file_action::Action::Mkdir(mkdir) => mkdir.owner = owner,
                    pb::file_action::Action::Symlink(symlink) => symlink.owner = owner,
                    pb::file_action::Action::Rm(_) => {}
                }
                pb::FileAction {
                    input: if position == 0 { base } else { to_index(first_output + position - 1) },
                    secondary_input,
                    output: if position == last { 0 } else { -1 },
                    action: Some(action),
                }
            },
        );
        let message = pb::FileOp { actions: messages.collect() };
        Self::vertex(pb::op::Op::File(message), inputs, false, options)
    }

    /// Lays states over each other; later ones win. Scratch is left out.
    pub fn merge(states: &[Self], options: VertexOptions) -> Self {
        let solid: Vec<&Self> = states.iter().filter(|state| !state.is_scratch()).collect();
        match solid.as_slice() {
            [] => Self::scratch(),
            [only] => (*only).clone(),
            several => {
                let mut inputs = Inputs::default();
                let messages = several
                    .iter()
                    .map(|state| pb::MergeInput { input: inputs.push(state) })
                    .collect();
                Self::vertex(
                    pb::op::Op::Merge(pb::MergeOp { inputs: messages }),
                    inputs,
                    false,
                    options,
                )
            }
        }
    }

    /// Returns the changes from one state to another.
    pub fn diff(lower: &Self, upper: &Self, options: VertexOptions) -> Self {
        if lower.is_scratch() {
            return upper.clone();
        }
        let mut inputs = Inputs::default();
        let message = pb::DiffOp {
            lower: Some(pb::LowerDiffInput { input: inputs.push(lower) }),
            upper: Some(pb::UpperDiffInput { input: inputs.push(upper) }),
        };
        Self::vertex(pb::op::Op::Diff(message), inputs, false, options)
    }

    fn vertex(
        op: pb::op::Op,
        inputs: Inputs,
        platform_specific: bool,
        options: VertexOptions,
    ) -> Self {
        let platform = options
            .platform
            .filter(|_| platform_specific)
            .map(|platform| pb::Platform::from(&platform));
        let head = pb::Op {
            inputs: inputs.messages,
            platform,
            // Upstream's client always writes the field, and so its bytes are part of the digest.
            constraints: Some(pb::WorkerConstraints::default()),
            op: None,
        };
        // Go writes the fields of a oneof after all others, whatever their numbers. Messages may be written in parts.
        let mut bytes = head.encode_to_vec();
        bytes.extend(pb::Op { op: Some(op), ..pb::Op::default() }.encode_to_vec());
        let mut description = options.description;
        if !options.name.is_empty() {
            description.insert("llb.customname".into(), options.name);
        }
        let metadata = pb::OpMetadata {
            ignore_cache: options.ignore_cache,
            description,
            progress_group: options.progress_group,
            linux_resources: options.linux_resources,
            ..Default::default()
        };
        let digest = Digest::of(&bytes);
        let vertex =
            Vertex { bytes, digest, metadata, lines: options.lines, inputs: inputs.vertices };
        Self { output: Some(Output { vertex: Arc::new(vertex), index: 0 }) }
    }
}

impl Owner {
    fn to_pb(&self, base: i64) -> pb::ChownOpt {
        let one = |who: &Option<WhoIs>| {
            who.as_ref().map(|who| {
                let user = match who {
                    WhoIs::Id(id) => pb::user_opt::User::ById(*id),
                    WhoIs::Name(name) => pb::user_opt::User::ByName(pb::NamedUserOpt {
                        name: name.clone(),
                        input: base,
                    }),
                };
                pb::UserOpt { user: Some(user) }
            })
        };
        pb::ChownOpt { user: one(&self.user), group: one(&self.group) }
    }
}

impl From<&Platform> for pb::Platform {
    fn from(platform: &Platform) -> Self {
        Self {
            architecture: platform.architecture.clone(),
            os: platform.os.clone(),
            variant: platform.variant.clone().unwrap_or_default(),
            os_version: platform.os_version.clone().unwrap_or_default(),
            os_features: platform.os_features.clone(),
        }
    }
}

impl From<&pb::Platform> for Platform {
    fn from(message: &pb::Platform) -> Self {
        let some = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
        Self {
            architecture: message.architecture.clone(),
            os: message.os.clone(),
            variant: some(&message.variant),
            os_version: some(&message.os_version),
            os_features: message.os_features.clone(),
        }
    }
}
