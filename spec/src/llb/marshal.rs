//! From a [`State`] to a [`Definition`].

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use prost::Message as _;

use super::state::{Lines, Vertex};
use super::{Definition, State, pb};

/// The file that vertices were written in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SourceFile {
    /// Its name as the user knows it.
    pub filename: String,
    /// Its language, such as `Dockerfile`.
    pub language: String,
    /// Its bytes.
    pub data: Vec<u8>,
    /// The graph that it was read from.
    pub origin: Option<Arc<Definition>>,
}

/// Gathers everything a state needs, inputs first, each vertex once.
///
/// Returns `None` for scratch, which no definition can express.
pub fn marshal(state: &State, source: Option<&SourceFile>) -> Option<Definition> {
    let output = state.output.as_ref()?;
    let mut definition = Definition::default();
    let mut locations = BTreeMap::new();
    let mut written = HashSet::new();
    for vertex in in_order(&output.vertex) {
        let digest = &vertex.digest;
        let metadata = definition.metadata.entry(digest.clone()).or_default();
        metadata.ignore_cache |= vertex.metadata.ignore_cache;
        let description = vertex.metadata.description.iter();
        metadata.description.extend(description.map(|(key, value)| (key.clone(), value.clone())));
        if vertex.metadata.progress_group.is_some() {
            metadata.progress_group.clone_from(&vertex.metadata.progress_group);
        }
        if vertex.metadata.linux_resources.is_some() {
            metadata.linux_resources.clone_from(&vertex.metadata.linux_resources);
        }
        if vertex.metadata.export_cache.is_some() {
            metadata.export_cache.clone_from(&vertex.metadata.export_cache);
        }
        metadata.caps.extend(vertex.metadata.caps.iter().map(|(cap, on)| (cap.clone(), *on)));
        if source.is_some() && !vertex.lines.is_empty() {
            let entry: &mut pb::Locations = locations.entry(digest.to_string()).or_default();
            entry.locations.push(location(&vertex.lines));
        }
        if written.insert(digest.clone()) {
            definition.ops.push(vertex.bytes.clone());
        }
    }
    let head = pb::Input { digest: output.vertex.digest.to_string(), index: output.index };
    let last = pb::Op { inputs: vec![head], ..Default::default() };
    definition.ops.push(last.encode_to_vec());
    definition.source = source.map(|file| pb::Source {
        locations,
        infos: vec![pb::SourceInfo {
            filename: file.filename.clone(),
            data: file.data.clone(),
            definition: file.origin.as_ref().map(|origin| origin.to_pb()),
            language: file.language.clone(),
        }],
    });
    Some(definition)
}

/// Returns the vertices below and including `head`, inputs before users.
fn in_order(head: &Arc<Vertex>) -> Vec<&Arc<Vertex>> {
    let mut order = vec![];
    let mut seen = HashSet::new();
    let mut stack = vec![(head, 0)];
    while let Some((vertex, next)) = stack.pop() {
        if next == 0 && !seen.insert(Arc::as_ptr(vertex)) {
            continue;
        }
        if let Some(input) = vertex.inputs.get(next) {
            stack.push((vertex, next + 1));
            stack.push((input, 0));
        } else {
            order.push(vertex);
        }
    }
    order
}

fn location(lines: &[Lines]) -> pb::Location {
    let at = |line: u32| {
        Some(pb::Position { line: i32::try_from(line).unwrap_or(i32::MAX), character: 0 })
    };
    // One range for each physical line, as upstream's frontend writes them.
    let ranges = lines.iter().flat_map(|run| run.first..=run.last);
    pb::Location {
        source_index: 0,
        ranges: ranges.map(|line| pb::Range { start: at(line), end: at(line) }).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Platform;
    use crate::llb::{Copy, Exec, ExecMount, FileActions, MountOptions, VertexOptions};

    fn named(name: &str) -> VertexOptions {
        VertexOptions { name: name.into(), ..Default::default() }
    }

    fn local() -> State {
        State::local("context", BTreeMap::new(), named("context"))
    }

    #[test]
    fn scratch_has_no_definition() {
        assert_eq!(marshal(&State::scratch(), None), None);
    }

    #[test]
    fn inputs_come_first_and_each_once() {
        let context = local();
        let left = State::scratch()
            .file(FileActions::new().copy(&context, Copy::default()), named("left"));
        let right = left.file(FileActions::new().copy(&context, Copy::default()), named("right"));
        let all = State::merge(&[left, State::scratch(), right], named("all"));
        let definition = marshal(&all, None).unwrap();
        assert_eq!(definition.ops.len(), 5);
        assert_eq!(Definition::from_pb(definition.to_pb()).unwrap(), definition);
        assert_eq!(definition.head().unwrap().0, *all.digest().unwrap());
        assert_eq!(marshal(&all, None).unwrap(), definition);
    }

    #[test]
    fn equal_vertices_are_one_and_keep_both_remarks() {
        let lines = |first| VertexOptions {
            lines: vec![Lines { first, last: first + 1 }],
            ..Default::default()
        };
        let one = State::local("context", BTreeMap::new(), lines(1));
        let two = State::local(
            "context",
            BTreeMap::new(),
            VertexOptions { ignore_cache: true, ..lines(5) },
        );
        let actions = FileActions::new().copy(&one, Copy::default()).copy(&two, Copy::default());
        let both = State::merge(&[one.clone(), two.clone()], VertexOptions::default());
        let origin = Arc::new(marshal(&one, None).unwrap());
        let source =
            SourceFile { filename: "F".into(), origin: Some(origin.clone()), ..Default::default() };
        let definition = marshal(&both, Some(&source)).unwrap();
        let infos = &definition.source.as_ref().unwrap().infos;
        assert_eq!(infos[0].definition, Some(origin.to_pb()));
        // A merge lists an input as often as it was given; the vertex itself stands there once.
        assert_eq!(definition.vertices().unwrap()[1].1.inputs.len(), 2);
        assert_eq!(definition.ops.len(), 3);
        let one = State::scratch()
            .file(FileActions::new().copy(&one, Copy::default()), VertexOptions::default());
        let definition =
            marshal(&one.file(actions, VertexOptions::default()), Some(&source)).unwrap();
        let digest = two.digest().unwrap();
        assert_eq!(definition.ops.len(), 4);
        assert!(definition.metadata[digest].ignore_cache);
        let locations = &definition.source.unwrap().locations[&digest.to_string()].locations;
        let first_lines: Vec<_> =
            locations.iter().map(|l| l.ranges[0].start.as_ref().unwrap().line).collect();
        assert_eq!((first_lines, locations[0].ranges.len()), (vec![1, 5], 2));
    }

    #[test]
    fn actions_of_one_op_chain_on_each_other() {
        let context = local();
        let base = State::local("base", BTreeMap::new(), VertexOptions::default());
        let actions = FileActions::new()
            .copy(&context, Copy::default())
            .mkdir("/a", 0o755, None, None)
            .copy(&context, Copy::default());
        let definition = marshal(&base.file(actions, VertexOptions::default()), None).unwrap();
        let (_, op) = definition.vertices().unwrap().pop().unwrap();
        let Some(pb::op::Op::File(file)) = op.op else { panic!("not a file op") };
        let indexes: Vec<_> =
            file.actions.iter().map(|a| (a.input, a.secondary_input, a.output)).collect();
        assert_eq!(indexes, [(0, 1, -1), (2, -1, -1), (3, 1, 0)]);
        assert_eq!(op.platform, None);
    }

    #[test]
    fn exec_on_scratch_has_a_root_without_input() {
        let options = VertexOptions {
            platform: Some(Platform::new("linux", "arm64", None)),
            ..Default::default()
        };
        let state = State::scratch().exec(Exec::default(), options);
        let definition = marshal(&state, None).unwrap();
        let (_, op) = definition.vertices().unwrap().pop().unwrap();
        assert_eq!(op.platform.unwrap().architecture, "arm64");
        let Some(pb::op::Op::Exec(exec)) = op.op else { panic!("not an exec op") };
        assert_eq!(
            (exec.mounts[0].input, exec.mounts[0].output, exec.mounts[0].dest.as_str()),
            (-1, 0, "/")
        );
    }

    #[test]
    fn mounts_come_in_the_order_of_the_protocol() {
        let secret =
            |id: &str| MountOptions::Secret(pb::SecretOpt { id: id.into(), ..Default::default() });
        let mount =
            |dest: &str, options| ExecMount { dest: dest.into(), options, ..Default::default() };
        let exec = Exec {
            mounts: vec![
                mount("/ssh", MountOptions::Ssh(pb::SshOpt::default())),
                mount("/b", MountOptions::Tmpfs(pb::TmpfsOpt::default())),
                mount("/z", secret("z")),
                mount("/a", MountOptions::Cache(pb::CacheOpt::default())),
                mount("/c", secret("c")),
            ],
            devices: vec![pb::CdiDevice { name: "d".into(), optional: true }],
            ..Default::default()
        };
        let definition = marshal(&local().exec(exec, VertexOptions::default()), None).unwrap();
        let (_, op) = definition.vertices().unwrap().pop().unwrap();
        let Some(pb::op::Op::Exec(exec)) = op.op else { panic!("not an exec op") };
        let seen: Vec<_> =
            exec.mounts.iter().map(|m| (m.dest.as_str(), m.input, m.output)).collect();
        assert_eq!(
            seen,
            [
                ("/", 0, 0),
                ("/a", -1, -1),
                ("/b", -1, -1),
                ("/z", -1, 0),
                ("/c", -1, 0),
                ("/ssh", -1, 0)
            ]
        );
        assert_eq!(exec.cdi_devices.len(), 1);
    }

    #[test]
    fn graphs_made_elsewhere_can_be_built_on() {
        let context = local();
        let made = State::scratch()
            .file(FileActions::new().copy(&context, Copy::default()), named("made elsewhere"));
        let definition = marshal(&made, None).unwrap();
        let taken = State::from_definition(&definition).unwrap();
        assert_eq!(taken.digest(), made.digest());
        assert_eq!(marshal(&taken, None).unwrap(), definition);
        let merged = State::merge(&[taken, local()], VertexOptions::default());
        assert_eq!(marshal(&merged, None).unwrap().ops.len(), 4);
        assert!(State::from_definition(&Definition::default()).is_err());
        assert_eq!(context.source_op().unwrap().identifier, "local://context");
        assert_eq!(made.source_op(), None);
    }

    #[test]
    fn long_chains_do_not_exhaust_the_stack() {
        let mut state = local();
        for _ in 0..100_000 {
            state = state.exec(Exec::default(), VertexOptions::default());
        }
        assert_eq!(marshal(&state, None).unwrap().ops.len(), 100_002);
    }
}
