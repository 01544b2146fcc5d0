//! What identifies the result of a vertex, as a rule without executing anything.

use std::sync::Arc;

use futures::future::try_join_all;
use sha2::{Digest as _, Sha256};
use slipway_spec::Platform;
use slipway_spec::llb::pb;
use slipway_store::result::ResultKey;

use super::Job;
use crate::deep::Deep;
use crate::error::Result;
use crate::graph::{Vertex, encode};
use crate::operation::exec;
use crate::source::is_layered;

impl Job {
    pub(super) fn key<'a>(&'a self, vertex: &'a Arc<Vertex>) -> Deep<'a, Result<ResultKey>> {
        let compute =
            || async { self.compute_key(vertex).await.map_err(|error| self.blame(vertex, error)) };
        Deep::new(async move { vertex.key.get_or_init(compute).await.clone() })
    }

    pub(super) fn quick_key<'a>(
        &'a self,
        vertex: &'a Arc<Vertex>,
    ) -> Deep<'a, Result<Option<ResultKey>>> {
        let compute = || async {
            self.compute_quick_key(vertex).await.map_err(|error| self.blame(vertex, error))
        };
        Deep::new(async move { vertex.quick_key.get_or_init(compute).await.clone() })
    }

    /// Finds the key without executing anything: `None` when a step below must run first, because its content is part
    /// of the key and was never seen.
    async fn compute_quick_key(&self, vertex: &Arc<Vertex>) -> Result<Option<ResultKey>> {
        let key = match &vertex.op {
            pb::op::Op::Source(source) if source.identifier.starts_with("local://") => {
                let mut hash = tagged(b"local");
                hash.update(self.local(vertex).await?.digest());
                ResultKey(hash.finalize().into())
            }
            pb::op::Op::Source(source) if !is_layered(source) => {
                self.outside_key(vertex, source).await?
            }
            pb::op::Op::Source(source) => {
                let diff_ids = self.image(vertex, source).await?.diff_ids;
                let mut hash = tagged(b"layers");
                for diff_id in diff_ids {
                    hash.update(diff_id.to_string());
                }
                ResultKey(hash.finalize().into())
            }
            pb::op::Op::File(op) => return self.quick_file_key(vertex, op).await,
            // Only the definition tells, which the step below has yet to give.
            pb::op::Op::Build(_) => return Ok(None),
            pb::op::Op::Exec(op) => return self.quick_exec_key(vertex, op).await,
            pb::op::Op::Merge(_) | pb::op::Op::Diff(_) | pb::op::Op::Passthrough(_) => {
                let inputs =
                    try_join_all(vertex.inputs.iter().map(|edge| self.quick_key(&edge.vertex)))
                        .await?;
                match inputs.into_iter().collect::<Option<Vec<_>>>() {
                    Some(inputs) => definition_key(vertex, &inputs),
                    None => return Ok(None),
                }
            }
        };
        Ok(Some(key))
    }

    async fn compute_key(&self, vertex: &Arc<Vertex>) -> Result<ResultKey> {
        if let Some(key) = self.quick_key(vertex).await? {
            return Ok(key);
        }
        match &vertex.op {
            pb::op::Op::File(op) => self.file_key(vertex, op).await,
            pb::op::Op::Build(op) => self.build_key(vertex, op).await,
            pb::op::Op::Exec(op) => self.exec_key(vertex, op).await,
            _ => {
                let inputs =
                    try_join_all(vertex.inputs.iter().map(|edge| self.key(&edge.vertex))).await?;
                Ok(definition_key(vertex, &inputs))
            }
        }
    }
}

/// Keys of different kinds of steps never meet; the number is raised when what a kind of step does changes.
pub(crate) fn tagged(kind: &[u8]) -> Sha256 {
    let mut hash = Sha256::new();
    hash.update(b"slipway 1 ");
    hash.update(kind);
    hash.update([0]);
    hash
}

/// The key of a step that is identified by what it does and the keys of its inputs.
pub(super) fn definition_key(vertex: &Vertex, inputs: &[ResultKey]) -> ResultKey {
    let (tag, op): (&[u8], Vec<u8>) = match &vertex.op {
        pb::op::Op::Exec(op) => {
            let op = exec::keyed(op);
            let platform = vertex.platform.clone().unwrap_or_else(Platform::host).to_string();
            (b"exec", [platform.as_bytes(), &[0], &encode(&op)].concat())
        }
        pb::op::Op::Merge(op) => (b"merge", encode(op)),
        pb::op::Op::Diff(op) => (b"diff", encode(op)),
        pb::op::Op::File(op) => (b"file", encode(op)),
        pb::op::Op::Source(op) => (b"source", encode(op)),
        pb::op::Op::Build(op) => (b"build", encode(op)),
        pb::op::Op::Passthrough(op) => (b"passthrough", encode(op)),
    };
    let mut hash = tagged(tag);
    hash.update((op.len() as u64).to_le_bytes());
    hash.update(op);
    for (key, edge) in inputs.iter().zip(&vertex.inputs) {
        hash.update(output_key(key, edge.index).0);
    }
    ResultKey(hash.finalize().into())
}

pub(super) fn output_key(key: &ResultKey, output: usize) -> ResultKey {
    let mut hash = tagged(b"output");
    hash.update(key.0);
    hash.update((output as u64).to_le_bytes());
    ResultKey(hash.finalize().into())
}
