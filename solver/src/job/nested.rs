//! Definitions that are the result of a step, and steps that only hand their inputs on.

use std::sync::Arc;

use slipway_spec::llb::{Definition, pb};
use slipway_store::result::ResultKey;
use slipway_store::snapshot::Snapshot;

use super::Job;
use super::key::{output_key, tagged};
use crate::error::{Cause, Result};
use crate::graph::{BUILD_INPUT, Edge, Vertex};

/// A definition may have this many bytes.
const MAX_DEFINITION: u64 = 64 << 20;

impl Job {
    /// Reads the definition that a step asks to build; its inputs are solved for that.
    async fn nested(&self, vertex: &Arc<Vertex>, op: &pb::BuildOp) -> Result<Edge> {
        let read = || async {
            let from = op
                .inputs
                .get(BUILD_INPUT)
                .and_then(|input| usize::try_from(input.input).ok())
                .and_then(|at| vertex.inputs.get(at))
                .ok_or_else(|| Cause::Invalid("a build without a definition".into()))?;
            let name = op.attrs.get("llbbuild.filename").filter(|name| !name.is_empty());
            let name = name.map_or(BUILD_INPUT, String::as_str);
            let bytes = self.read_file(from, name, MAX_DEFINITION).await?;
            let bytes = bytes
                .ok_or_else(|| Cause::Missing(format!("the definition {name:?}: not found")))?;
            let definition = Definition::from_bytes(&bytes).map_err(Cause::from)?;
            self.load_at(&definition, &[], vertex.depth + 1).await
        };
        vertex.nested.get_or_init(read).await.clone()
    }

    /// A build is what its definition stands for.
    pub(super) async fn build_key(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::BuildOp,
    ) -> Result<ResultKey> {
        let edge = self.nested(vertex, op).await?;
        let key = self.key(&edge.vertex).await?;
        let mut hash = tagged(b"build");
        sha2::Digest::update(&mut hash, output_key(&key, edge.index).0);
        Ok(ResultKey(sha2::Digest::finalize(hash).into()))
    }

    pub(super) async fn build_results(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::BuildOp,
    ) -> Result<Vec<Snapshot>> {
        let edge = self.nested(vertex, op).await?;
        let announced = self.start(vertex);
        let solved = self.solve(&edge).await;
        self.end(vertex, announced, solved.map(|snapshot| vec![snapshot]))
    }

    pub(super) async fn passthrough(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::PassthroughOp,
    ) -> Result<Vec<Snapshot>> {
        // All inputs, also those that are not handed on: what comes after may count on them.
        let parts = self.input_results(vertex).await?;
        let announced = self.start(vertex);
        let outputs = op.outputs.iter().filter_map(|at| parts.get(usize::try_from(*at).ok()?));
        self.end(vertex, announced, Ok(outputs.cloned().collect()))
    }
}
