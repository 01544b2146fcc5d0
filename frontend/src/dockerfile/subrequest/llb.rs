//! The graph that a Dockerfile becomes, for people and programs to look at: protobuf's JSON for steps and places, and Go's
//! for what is said about steps.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use slipway_spec::llb::json::Form;
use slipway_spec::llb::{Definition, DefinitionError};

/// Describes a graph; `None` is the empty one.
///
/// # Errors
/// When it is not well formed.
pub(super) fn describe(definition: Option<&Definition>) -> Result<Value, DefinitionError> {
    let Some(definition) = definition else {
        return Ok(json!({ "def": {}, "metadata": null, "source": {} }));
    };
    let ops = definition.vertices()?.into_iter().chain([definition.last()?]);
    let steps: BTreeMap<String, Value> =
        ops.map(|(digest, op)| (digest.to_string(), Form::Protobuf.step(&op))).collect();
    let metadata: BTreeMap<String, Value> = definition
        .metadata
        .iter()
        .map(|(digest, metadata)| (digest.to_string(), Form::Go.metadata(metadata)))
        .collect();
    let source =
        definition.source.as_ref().map_or_else(|| json!({}), |it| Form::Protobuf.source(it));
    Ok(json!({ "def": steps, "metadata": metadata, "source": source }))
}
