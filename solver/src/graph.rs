//! A definition loaded as a graph of vertices.

mod name;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use slipway_spec::llb::{Definition, pb};
use slipway_spec::{Digest, Platform};
use slipway_store::result::ResultKey;
use slipway_store::snapshot::Snapshot;
use tokio::sync::OnceCell;

use self::name::describe;
use crate::capability;
use crate::client::Entitlements;
use crate::device::Inventory;
use crate::error::{Cause, FailedVertex, Result, SolveError};
use crate::job::VertexCache;
use crate::source::layout::LayoutImage;
use crate::source::{Found, FoundImage};

/// One step, with what is known of it so far.
#[derive(Debug)]
pub struct Vertex {
    /// The digest of the marshalled op.
    pub digest: Digest,
    /// Its name for people.
    pub name: Arc<str>,
    /// What is to be done.
    pub(crate) op: pb::op::Op,
    /// Where it is to run.
    pub(crate) platform: Option<Platform>,
    pub(crate) inputs: Vec<Edge>,
    /// Whether results from before must not be used, because the user said so of this step or of one below it.
    pub(crate) fresh: bool,
    /// Whether the user said so of this very step.
    pub(crate) ignore_cache: bool,
    /// What its process may use of the machine.
    pub(crate) resources: Option<pb::LinuxResources>,
    /// How many definitions this one came out of.
    pub(crate) depth: u32,
    ranges: Vec<pb::Range>,
    source: Option<Arc<pb::SourceInfo>>,
    /// The key if it is known without executing anything.
    pub(crate) quick_key: OnceCell<Result<Option<ResultKey>>>,
    pub(crate) key: OnceCell<Result<ResultKey>>,
    pub(crate) results: OnceCell<Result<Vec<Snapshot>>>,
    /// What a source image turned out to be: key and result speak of the same one.
    pub(crate) image: OnceCell<Result<FoundImage>>,
    /// What a source other than an image or a folder turned out to be.
    pub(crate) found: OnceCell<Result<Arc<Found>>>,
    /// What an image of a layout turned out to be.
    pub(crate) layout: OnceCell<Result<Arc<LayoutImage>>>,
    /// What a definition that is the result of a step stands for.
    pub(crate) nested: OnceCell<Result<Edge>>,
    pub(crate) announced: AtomicBool,
    /// Whether the result is not what the key says, because something ran again and gave something else; it serves this
    /// build and is not remembered.
    pub(crate) unkept: AtomicBool,
    /// What caches from elsewhere have to do with it.
    pub(crate) cache: VertexCache,
}

impl Drop for Vertex {
    fn drop(&mut self) {
        // The default would recurse once per vertex, and a long chain could exhaust the stack.
        let mut rest = std::mem::take(&mut self.inputs);
        rest.extend(self.nested.take().and_then(Result::ok));
        while let Some(edge) = rest.pop() {
            if let Some(mut last) = Arc::into_inner(edge.vertex) {
                rest.append(&mut last.inputs);
                rest.extend(last.nested.take().and_then(Result::ok));
            }
        }
    }
}

/// One output of a vertex.
#[derive(Clone, Debug)]
pub struct Edge {
    /// The vertex.
    pub vertex: Arc<Vertex>,
    /// Which of its outputs.
    pub index: usize,
}

impl Edge {
    /// Whether somebody has wanted to know what it is.
    pub fn is_used(&self) -> bool {
        self.vertex.results.initialized() || self.vertex.announced.load(Ordering::Relaxed)
    }
}

impl Vertex {
    /// Returns what the step needs.
    pub fn inputs(&self) -> impl Iterator<Item = &Edge> {
        self.inputs.iter()
    }

    pub(crate) fn failed(&self) -> FailedVertex {
        FailedVertex {
            digest: self.digest.clone(),
            name: self.name.clone(),
            ranges: self.ranges.clone(),
            source: self.source.clone(),
        }
    }
}

/// The vertices of a job by digest, freshness and depth; definitions that are loaded later find the earlier ones'
/// vertices. A nested definition never finds a vertex that waits for it.
pub(crate) type Vertices = HashMap<(Digest, bool, u32), Arc<Vertex>>;

/// Definitions may come out of each other this many times.
const MAX_DEPTH: u32 = 16;

/// What steps may have.
pub(crate) struct Leave<'a> {
    /// What the user allowed.
    pub(crate) entitlements: &'a Entitlements,
    /// The devices there are.
    pub(crate) devices: &'a Inventory,
}

/// Loads a definition and returns the edge it stands for. `ops` are its [vertices](Definition::vertices), and `depth` is how
/// many definitions it came out of.
pub(crate) fn load(
    definition: &Definition,
    ops: Vec<(Digest, pb::Op)>,
    known: &mut Vertices,
    leave: &Leave<'_>,
    depth: u32,
) -> Result<Edge> {
    if depth > MAX_DEPTH {
        return Err(Cause::Invalid(format!(
            "definitions come out of each other more than {MAX_DEPTH} times"
        ))
        .into());
    }
    if let Some((_, metadata)) = definition
        .metadata
        .iter()
        .find(|(_, metadata)| metadata.caps.keys().any(|cap| !capability::is_known(cap)))
    {
        let unknown = metadata.caps.keys().find(|cap| !capability::is_known(cap));
        return Err(Cause::Unsupported(format!(
            "the capability {:?}",
            unknown.map(String::as_str).unwrap_or_default()
        ))
        .into());
    }
    let sources: Vec<Arc<pb::SourceInfo>> = definition
        .source
        .iter()
        .flat_map(|source| source.infos.iter().cloned().map(Arc::new))
        .collect();
    // Within one definition a digest names one vertex, whatever its freshness.
    let mut loaded: HashMap<Digest, Arc<Vertex>> = HashMap::new();
    for (digest, op) in ops {
        let metadata = definition.metadata.get(&digest);
        let inputs = op
            .inputs
            .iter()
            .map(|input| {
                let vertex = input
                    .digest
                    .parse()
                    .ok()
                    .and_then(|digest: Digest| loaded.get(&digest).cloned());
                let missing = || {
                    Cause::Invalid(format!(
                        "vertex {digest} has an input {} that is not there",
                        input.digest
                    ))
                };
                edge(vertex.ok_or_else(missing)?, usize::try_from(input.index).ok())
            })
            .collect::<std::result::Result<Vec<_>, Cause>>()?;
        let fresh =
            metadata.is_some_and(|m| m.ignore_cache) || inputs.iter().any(|edge| edge.vertex.fresh);
        let locations =
            definition.source.as_ref().and_then(|source| source.locations.get(&digest.to_string()));
        let location = locations.and_then(|locations| locations.locations.first());
        let name = metadata
            .and_then(|metadata| metadata.description.get("llb.customname"))
            .filter(|name| !name.is_empty())
            .map_or_else(
                || describe(&op, |at| inputs.get(at).map(name_of).unwrap_or_default()),
                Clone::clone,
            );
        let platform = op.platform.as_ref().map(|platform| Platform::from(platform).normalized());
        let Some(mut kind) = op.op else {
            return Err(Cause::Invalid(format!("vertex {digest} has no operation")).into());
        };
        check(&digest, &kind, inputs.len())?;
        let allowed = allow(&mut kind, leave);
        let vertex = known.entry((digest.clone(), fresh, depth)).or_insert_with(|| {
            Arc::new(Vertex {
                digest: digest.clone(),
                name: name.into(),
                op: kind,
                platform,
                inputs,
                fresh,
                ignore_cache: metadata.is_some_and(|metadata| metadata.ignore_cache),
                resources: metadata.and_then(|metadata| metadata.linux_resources.clone()),
                depth,
                ranges: location.map(|location| location.ranges.clone()).unwrap_or_default(),
                source: location
                    .and_then(|location| usize::try_from(location.source_index).ok())
                    .and_then(|at| sources.get(at).cloned()),
                quick_key: OnceCell::new(),
                key: OnceCell::new(),
                results: OnceCell::new(),
                image: OnceCell::new(),
                found: OnceCell::new(),
                layout: OnceCell::new(),
                nested: OnceCell::new(),
                announced: false.into(),
                unkept: false.into(),
                cache: VertexCache::default(),
            })
        });
        loaded.insert(digest, vertex.clone());
        allowed.map_err(|cause| SolveError::from(cause).at(|| vertex.failed()))?;
    }
    let (head, index) = definition.head()?;
    let vertex = loaded
        .remove(&head)
        .ok_or_else(|| Cause::Invalid(format!("vertex {head} is not there")))?;
    Ok(edge(vertex, Some(index))?)
}

/// Returns where the user wrote a vertex that was not loaded; what has no place of its own has that of a step that
/// needs it.
pub(crate) fn blamed(definition: &Definition, digest: &Digest) -> FailedVertex {
    let vertices = definition.vertices().unwrap_or_default();
    let source = definition.source.as_ref();
    let mut wanted: BTreeSet<String> = [digest.to_string()].into();
    let mut failed = FailedVertex {
        digest: digest.clone(),
        name: digest.to_string().into(),
        ranges: vec![],
        source: None,
    };
    for (at, op) in &vertices {
        if at == digest {
            let name =
                definition.metadata.get(at).and_then(|m| m.description.get("llb.customname"));
            let input = |at: usize| op.inputs.get(at).map(|i| i.digest.clone()).unwrap_or_default();
            failed.name = name.map_or_else(|| describe(op, input), Clone::clone).into();
        }
        let needs = op.inputs.iter().any(|input| wanted.contains(&input.digest));
        if at != digest && !needs {
            continue;
        }
        wanted.insert(at.to_string());
        let location = source
            .and_then(|source| source.locations.get(&at.to_string()))
            .and_then(|locations| locations.locations.first());
        if let (Some(location), Some(source)) = (location, source) {
            let info = usize::try_from(location.source_index).ok();
            failed.ranges = location.ranges.clone();
            failed.source = info.and_then(|at| source.infos.get(at).cloned().map(Arc::new));
            break;
        }
    }
    failed
}

fn name_of(edge: &Edge) -> String {
    edge.vertex.name.to_string()
}

/// Takes an output of a vertex, if it has that.
fn edge(vertex: Arc<Vertex>, index: Option<usize>) -> std::result::Result<Edge, Cause> {
    let count = outputs(&vertex.op);
    match index.filter(|index| *index < count) {
        Some(index) => {
            vertex.cache.mark_used(index);
            Ok(Edge { vertex, index })
        }
        None => Err(Cause::Invalid(format!(
            "vertex {} ({}) has {count} outputs, and another one is asked for",
            vertex.digest, vertex.name
        ))),
    }
}

/// How many outputs an operation has; they are counted without gaps.
fn outputs(op: &pb::op::Op) -> usize {
    let highest = match op {
        pb::op::Op::Exec(exec) => {
            let kept = exec.mounts.iter().filter(|mount| {
                [pb::MountType::Bind, pb::MountType::Cache]
                    .iter()
                    .any(|kind| mount.mount_type == *kind as i32)
            });
            kept.map(|mount| mount.output).max().unwrap_or(-1)
        }
        pb::op::Op::File(file) => {
            file.actions.iter().map(|action| action.output).max().unwrap_or(-1)
        }
        pb::op::Op::Passthrough(passthrough) => return passthrough.outputs.len(),
        _ => 0,
    };
    usize::try_from(highest.saturating_add(1)).unwrap_or(0)
}

/// Refuses what the user did not allow. Devices are from here on what their names stand for, as that is what a process
/// is known by.
fn allow(op: &mut pb::op::Op, leave: &Leave<'_>) -> std::result::Result<(), Cause> {
    let pb::op::Op::Exec(exec) = op else { return Ok(()) };
    let insecure = exec.security == pb::SecurityMode::Insecure as i32;
    let host_network = exec.network == pb::NetMode::Host as i32;
    leave.entitlements.check(insecure, host_network)?;
    if !exec.cdi_devices.is_empty() {
        exec.cdi_devices = leave.devices.admit(&exec.cdi_devices, &leave.entitlements.devices)?;
    }
    Ok(())
}

/// Checks what later code relies on: every index an op names exists.
fn check(digest: &Digest, op: &pb::op::Op, inputs: usize) -> Result<()> {
    let fail = |what: &str| Err(Cause::Invalid(format!("vertex {digest}: {what}")).into());
    let input =
        |index: i64| index == -1 || usize::try_from(index).is_ok_and(|index| index < inputs);
    match op {
        pb::op::Op::Exec(exec) => {
            let Some(meta) = &exec.meta else { return fail("a process needs its parameters") };
            if meta.args.is_empty() {
                return fail("a process needs at least one argument");
            }
            if !exec.mounts.iter().any(|mount| mount.dest == "/") {
                return fail("a process needs a root file system");
            }
            // What is not known must not pass for the usual.
            if pb::SecurityMode::try_from(exec.security).is_err() {
                return fail("invalid security mode");
            }
            if pb::NetMode::try_from(exec.network).is_err() {
                return fail("invalid network mode");
            }
            if !exec.mounts.iter().all(|mount| input(mount.input)) {
                return fail("a mount names an input that is not there");
            }
            let on = pb::MountContentCache::On as i32;
            if exec.mounts.iter().any(|mount| {
                let kept = mount.output >= 0 && !mount.readonly;
                mount.content_cache == on && kept && !matches!(mount.selector.as_str(), "" | "/")
            }) {
                return fail("a mount that is changed cannot count by its content");
            }
            if !dense(exec.mounts.iter().map(|mount| mount.output)) {
                return fail("the outputs of a process must be counted from 0 without gaps");
            }
        }
        pb::op::Op::File(file) => {
            if file.actions.is_empty() {
                return fail("a file operation needs an action");
            }
            let outputs = || file.actions.iter().map(|action| action.output);
            if !dense(outputs()) || !outputs().any(|output| output == 0) {
                return fail("the outputs of a file operation must be counted from 0 without gaps");
            }
            for (at, action) in file.actions.iter().enumerate() {
                let earlier = |index: i64| {
                    index >= -1 && index < i64::try_from(inputs + at).unwrap_or(i64::MAX)
                };
                if !earlier(action.input) || !earlier(action.secondary_input) {
                    return fail("an action names an input that is not there");
                }
                if action.action.is_none() {
                    return fail("an action does nothing that is known here");
                }
            }
        }
        pb::op::Op::Merge(merge)
            if !merge.inputs.iter().all(|i| i.input >= 0 && input(i.input)) =>
        {
            return fail("a merge names an input that is not there");
        }
        pb::op::Op::Diff(diff) => {
            let lower = diff.lower.as_ref().map(|side| side.input);
            let upper = diff.upper.as_ref().map(|side| side.input);
            if ![lower, upper].iter().all(|side| side.is_some_and(input)) {
                return fail("a diff needs two inputs");
            }
        }
        pb::op::Op::Build(build) => {
            if build.builder != -1 {
                return fail("a definition can only be built by this builder");
            }
            let source = build.inputs.get(BUILD_INPUT).map(|source| source.input);
            if !source.is_some_and(|index| index >= 0 && input(index)) {
                return fail("a build needs the input that holds its definition");
            }
        }
        pb::op::Op::Passthrough(passthrough) => {
            if passthrough.id.is_empty() || passthrough.outputs.is_empty() {
                return fail("a passthrough needs an id and an output");
            }
            if !passthrough.outputs.iter().all(|index| *index >= 0 && input(*index)) {
                return fail("a passthrough names an input that is not there");
            }
        }
        _ => {}
    }
    Ok(())
}

/// The name of the input with the definition of a build.
pub(crate) const BUILD_INPUT: &str = "buildkit.llb.definition";

/// Whether indexes are counted from 0 without gaps; -1 is none.
fn dense(outputs: impl Iterator<Item = i64>) -> bool {
    let indexes: BTreeSet<i64> = outputs.filter(|index| *index != -1).collect();
    indexes.into_iter().zip(0..).all(|(index, expected)| index == expected)
}

/// Encodes a message: equal messages give equal bytes.
pub(crate) fn encode(message: &impl prost::Message) -> Vec<u8> {
    message.encode_to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;
    use std::collections::BTreeMap;

    fn definition(ops: Vec<pb::Op>) -> Definition {
        let message = pb::Definition {
            def: ops.iter().map(pb::Op::encode_to_vec).collect(),
            metadata: BTreeMap::new(),
            source: None,
        };
        Definition::from_pb(message).unwrap()
    }

    fn input(op: &pb::Op) -> pb::Input {
        pb::Input { digest: Digest::of(&op.encode_to_vec()).to_string(), index: 0 }
    }

    fn load_plain(definition: &Definition, known: &mut Vertices) -> Result<Edge> {
        load_with(definition, known, &Entitlements::default(), 0)
    }

    fn load_with(
        definition: &Definition,
        known: &mut Vertices,
        entitlements: &Entitlements,
        depth: u32,
    ) -> Result<Edge> {
        let leave = Leave { entitlements, devices: &Inventory::default() };
        load(definition, definition.vertices()?, known, &leave, depth)
    }

    fn op(kind: pb::op::Op, inputs: Vec<pb::Input>) -> pb::Op {
        pb::Op { inputs, op: Some(kind), platform: None, constraints: None }
    }

    #[test]
    fn hostile_operations_are_refused() {
        let source = op(
            pb::op::Op::Source(pb::SourceOp {
                identifier: "local://x".into(),
                attrs: BTreeMap::new(),
            }),
            vec![],
        );
        let mount = |input| pb::Mount { input, dest: "/".into(), ..Default::default() };
        let meta = || Some(pb::Meta { args: vec!["x".into()], ..Default::default() });
        let bad = [
            pb::op::Op::Exec(pb::ExecOp::default()),
            pb::op::Op::Exec(pb::ExecOp { meta: meta(), ..Default::default() }),
            pb::op::Op::Exec(pb::ExecOp {
                meta: meta(),
                mounts: vec![mount(7)],
                ..Default::default()
            }),
            pb::op::Op::File(pb::FileOp::default()),
            pb::op::Op::File(pb::FileOp {
                actions: vec![pb::FileAction {
                    input: 9,
                    secondary_input: -1,
                    output: 0,
                    action: None,
                }],
            }),
            pb::op::Op::Merge(pb::MergeOp { inputs: vec![pb::MergeInput { input: -3 }] }),
            pb::op::Op::Diff(pb::DiffOp::default()),
            pb::op::Op::Build(pb::BuildOp { builder: 0, ..Default::default() }),
            pb::op::Op::Build(pb::BuildOp { builder: -1, ..Default::default() }),
            pb::op::Op::Passthrough(pb::PassthroughOp { id: "x".into(), outputs: vec![] }),
            pb::op::Op::Passthrough(pb::PassthroughOp { id: "x".into(), outputs: vec![7] }),
            pb::op::Op::Passthrough(pb::PassthroughOp { id: "".into(), outputs: vec![0] }),
        ];
        for kind in bad {
            let middle = op(kind.clone(), vec![input(&source)]);
            let last = pb::Op { inputs: vec![input(&middle)], ..Default::default() };
            let definition = definition(vec![source.clone(), middle, last]);
            assert!(load_plain(&definition, &mut Vertices::new()).is_err(), "{kind:?}");
        }
    }

    #[test]
    fn what_was_not_allowed_or_is_not_known_is_refused_by_name() {
        let root = pb::Mount { input: -1, dest: "/".into(), ..Default::default() };
        let exec = |network, security| pb::ExecOp {
            meta: Some(pb::Meta { args: vec!["x".into()], ..Default::default() }),
            mounts: vec![root.clone()],
            network: network as i32,
            security: security as i32,
            ..Default::default()
        };
        let closed = Entitlements { network_host: false, ..Entitlements::default() };
        let open = Entitlements { security_insecure: true, ..Entitlements::default() };
        for (network, security, name) in [
            (pb::NetMode::Unset, pb::SecurityMode::Insecure, "security.insecure"),
            (pb::NetMode::Host, pb::SecurityMode::Sandbox, "network.host"),
        ] {
            let step = op(pb::op::Op::Exec(exec(network, security)), vec![]);
            let last = pb::Op { inputs: vec![input(&step)], ..Default::default() };
            let definition = definition(vec![step, last]);
            let error = load_with(&definition, &mut Vertices::new(), &closed, 0).unwrap_err();
            assert!(error.to_string().contains(&format!("{name} is not allowed")), "{error}");
            assert!(load_with(&definition, &mut Vertices::new(), &open, 0).is_ok());
        }
        let usual = exec(pb::NetMode::Unset, pb::SecurityMode::Sandbox);
        for (wrong, name) in [
            (pb::ExecOp { security: 2, ..usual.clone() }, "invalid security mode"),
            (pb::ExecOp { network: 9, ..usual.clone() }, "invalid network mode"),
        ] {
            let step = op(pb::op::Op::Exec(wrong), vec![]);
            let last = pb::Op { inputs: vec![input(&step)], ..Default::default() };
            let definition = definition(vec![step, last]);
            let error = load_with(&definition, &mut Vertices::new(), &open, 0).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
        let step = op(pb::op::Op::Exec(usual), vec![]);
        let last = pb::Op { inputs: vec![input(&step)], ..Default::default() };
        let mut definition = definition(vec![step.clone(), last]);
        let metadata = definition.metadata.entry(Digest::of(&step.encode_to_vec())).or_default();
        metadata.caps.insert("exec.meta.base".into(), true);
        assert!(load_plain(&definition, &mut Vertices::new()).is_ok());
        let metadata = definition.metadata.values_mut().next().unwrap();
        metadata.caps.insert("exec.teleport".into(), true);
        let error = load_plain(&definition, &mut Vertices::new()).unwrap_err();
        assert!(error.to_string().contains("\"exec.teleport\""), "{error}");
        assert!(load_with(&definition, &mut Vertices::new(), &open, 99).is_err());
    }

    #[test]
    fn the_same_vertex_of_two_definitions_is_one() {
        let source = op(
            pb::op::Op::Source(pb::SourceOp {
                identifier: "local://x".into(),
                attrs: BTreeMap::new(),
            }),
            vec![],
        );
        let last = pb::Op { inputs: vec![input(&source)], ..Default::default() };
        let definition = definition(vec![source, last]);
        let mut known = Vertices::new();
        let first = load_plain(&definition, &mut known).unwrap();
        let second = load_plain(&definition, &mut known).unwrap();
        assert!(Arc::ptr_eq(&first.vertex, &second.vertex));
    }
}
