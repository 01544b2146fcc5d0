//! A graph as provenance tells it: steps in the order of what they need, and where they were written.

use std::collections::{BTreeMap, HashMap};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};
use slipway_spec::Digest;
use slipway_spec::llb::json::Form;
use slipway_spec::llb::{Definition, DefinitionError, pb};

/// Attributes of sources that say something of one session alone.
const OF_A_SESSION: [&str; 2] = ["local.session", "local.unique"];

/// The steps of a graph.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    /// The steps as JSON, in order.
    told: Vec<Value>,
    /// The place of each vertex among them.
    places: BTreeMap<Digest, usize>,
}

impl Steps {
    /// Puts the vertices of a graph in order. The last one does nothing but name the result.
    pub(crate) fn of(definition: &Definition) -> Result<Self, DefinitionError> {
        if definition.ops.is_empty() {
            return Ok(Self::default());
        }
        let last = definition.last()?;
        let last_name = last.0.to_string();
        let ops: HashMap<String, (Digest, pb::Op)> = definition
            .vertices()?
            .into_iter()
            .chain([last])
            .map(|(digest, op)| (digest.to_string(), (digest, op)))
            .collect();

        let mut order: Vec<&str> = vec![];
        let mut places: BTreeMap<Digest, usize> = BTreeMap::new();
        // Depth first, what a step needs before the step; without recursion, as graphs may be deep.
        let mut todo = vec![(last_name.as_str(), false)];
        let mut seen = std::collections::HashSet::new();
        while let Some((digest, is_done)) = todo.pop() {
            let Some((key, op)) = ops.get(digest) else { continue };
            if is_done {
                places.insert(key.clone(), order.len());
                order.push(digest);
                continue;
            }
            if !seen.insert(digest) {
                continue;
            }
            todo.push((digest, true));
            todo.extend(op.inputs.iter().rev().map(|input| (input.digest.as_str(), false)));
        }
        let told = order.iter().enumerate().map(|(at, digest)| step(at, &ops[*digest].1, &places));
        Ok(Self { told: told.collect(), places })
    }

    /// Returns how a vertex is called here.
    pub(crate) fn name(&self, vertex: &Digest) -> Option<String> {
        self.places.get(vertex).map(|at| format!("step{at}"))
    }

    /// Adds the steps to a description.
    pub(crate) fn tell(&self, into: &mut Map<String, Value>) {
        if !self.told.is_empty() {
            into.insert("llbDefinition".into(), self.told.clone().into());
        }
        let names: Map<String, Value> = self
            .places
            .iter()
            .map(|(digest, at)| (digest.to_string(), format!("step{at}").into()))
            .collect();
        if !names.is_empty() {
            into.insert("digestMapping".into(), names.into());
        }
    }

    /// Describes where the steps of a graph were written.
    pub(crate) fn source(&self, source: &pb::Source) -> Result<Option<Value>, DefinitionError> {
        if source.infos.is_empty() {
            return Ok(None);
        }
        let locations: Map<String, Value> = source
            .locations
            .iter()
            .filter_map(|(digest, places)| {
                let name = self.name(&digest.parse().ok()?)?;
                let places: Vec<Value> =
                    places.locations.iter().map(|at| Form::Go.location(at)).collect();
                Some((name, json!({ "locations": places })))
            })
            .collect();
        let infos = source.infos.iter().map(info).collect::<Result<Vec<_>, _>>()?;
        let mut told = Map::new();
        if !locations.is_empty() {
            told.insert("locations".into(), locations.into());
        }
        told.insert("infos".into(), infos.into());
        Ok(Some(told.into()))
    }
}

fn step(at: usize, op: &pb::Op, places: &BTreeMap<Digest, usize>) -> Value {
    let mut op = op.clone();
    let inputs: Vec<String> = std::mem::take(&mut op.inputs)
        .iter()
        .map(|input| {
            let place = input.digest.parse().ok().and_then(|digest: Digest| places.get(&digest));
            format!("step{}:{}", place.copied().unwrap_or_default(), input.index)
        })
        .collect();
    if let Some(pb::op::Op::Source(source)) = &mut op.op {
        source.attrs.retain(|name, _| !OF_A_SESSION.contains(&name.as_str()));
    }
    let mut told = Map::new();
    told.insert("id".into(), format!("step{at}").into());
    told.insert("op".into(), Form::Go.step(&op));
    if !inputs.is_empty() {
        told.insert("inputs".into(), inputs.into());
    }
    told.into()
}

/// Describes a file that steps were written in, and what it was itself made from.
fn info(info: &pb::SourceInfo) -> Result<Value, DefinitionError> {
    let mut told = Map::new();
    for (name, value) in [("filename", &info.filename), ("language", &info.language)] {
        if !value.is_empty() {
            told.insert(name.into(), value.clone().into());
        }
    }
    if !info.data.is_empty() {
        told.insert("data".into(), STANDARD.encode(&info.data).into());
    }
    if let Some(definition) = info.definition.as_ref().filter(|graph| !graph.def.is_empty()) {
        Steps::of(&Definition::from_pb(definition.clone())?)?.tell(&mut told);
    }
    Ok(told.into())
}

#[cfg(test)]
mod tests {
    use slipway_spec::llb::{FileActions, State, VertexOptions, marshal};

    use super::*;

    #[test]
    fn steps_come_after_what_they_need_and_name_no_session() {
        let attrs = [
            ("local.session".to_owned(), "s".to_owned()),
            ("local.sharedkeyhint".to_owned(), "h".to_owned()),
        ];
        let local = State::local("context", attrs.into(), VertexOptions::default());
        let actions = FileActions::new().mkdir("/d", 0o755, None, None);
        let made = local.file(actions, VertexOptions::default());
        let definition = marshal(&made, None).unwrap();
        let steps = Steps::of(&definition).unwrap();
        let mut told = Map::new();
        steps.tell(&mut told);
        let shown = &told["llbDefinition"];
        assert_eq!(shown[0]["op"]["Op"]["source"]["attrs"], json!({ "local.sharedkeyhint": "h" }));
        assert_eq!(shown[1]["inputs"], json!(["step0:0"]));
        assert_eq!(shown[2], json!({ "id": "step2", "op": { "Op": {} }, "inputs": ["step1:0"] }));
        let head = definition.head().unwrap().0;
        assert_eq!(told["digestMapping"][head.to_string()], "step1");
        assert_eq!(steps.name(&head).as_deref(), Some("step1"));
    }
}
