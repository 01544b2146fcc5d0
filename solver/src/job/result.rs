//! From key to result: taken from before, or made.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::future::{join_all, try_join_all};
use slipway_spec::llb::pb;
use slipway_spec::progress::ProgressSink;
use slipway_store::blocking;
use slipway_store::result::{ResultKey, StepResult};
use slipway_store::snapshot::Snapshot;
use slipway_store::tree::Tree;
use slipway_store::view::View;

use super::file_key::FileReads;
use super::key::output_key;
use super::local::is_local;
use super::{Job, now};
use crate::deep::Deep;
use crate::error::{Cause, Result};
use crate::graph::Vertex;
use crate::operation::{FileStep, apply_file_op, diff, exec};
use crate::source::is_layered;

/// What executing a step needs.
struct Ready {
    inputs: Vec<Snapshot>,
    /// What identifies the inputs of a process.
    keys: Vec<ResultKey>,
    /// The inputs of a file operation that are folders of the client.
    locals: Vec<Option<Arc<View>>>,
}

impl Job {
    pub(super) fn results<'a>(
        &'a self,
        vertex: &'a Arc<Vertex>,
    ) -> Deep<'a, Result<Vec<Snapshot>>> {
        let compute = || async {
            self.compute_results(vertex).await.map_err(|error| self.blame(vertex, error))
        };
        Deep::new(async move {
            let mut results = vertex.results.get_or_init(&compute).await.clone()?;
            // What a cache promised and did not have is made here after all.
            let mut attempts = 0;
            while self.is_lost(vertex, &results)? {
                self.show_again(vertex);
                let attempt = vertex.cache.attempt(attempts);
                results = attempt.get_or_init(&compute).await.clone()?;
                attempts += 1;
            }
            Ok(results)
        })
    }

    async fn compute_results(&self, vertex: &Arc<Vertex>) -> Result<Vec<Snapshot>> {
        match &vertex.op {
            pb::op::Op::Source(source) if source.identifier.starts_with("local://") => {
                let scan = self.local(vertex).await?;
                let (store, name) = (self.store().clone(), vertex.name.clone());
                let adopt = move || store.adopt_tree(Tree::clone(&*scan.tree()?), &name);
                let layer = blocking::run(adopt).await?;
                return Ok(vec![Snapshot { layers: vec![layer] }]);
            }
            pb::op::Op::Source(source) if !is_layered(source) => {
                return self.outside_results(vertex, source).await;
            }
            pb::op::Op::Source(source) => {
                let announced = self.start(vertex);
                let image = match self.image(vertex, source).await {
                    Ok(image) => {
                        self.provide_layout(vertex, source).await.map(|()| vec![image.snapshot])
                    }
                    Err(error) => Err(error),
                };
                return self.end(vertex, announced, image);
            }
            pb::op::Op::Build(op) => return self.build_results(vertex, op).await,
            pb::op::Op::Passthrough(op) => return self.passthrough(vertex, op).await,
            pb::op::Op::Merge(op) => {
                let parts = self.input_results(vertex).await?;
                let announced = self.start(vertex);
                return self.end(vertex, announced, merge(op, &parts));
            }
            pb::op::Op::Diff(op) => {
                let parts = self.input_results(vertex).await?;
                if let Some(snapshot) = tail(op, &parts) {
                    let announced = self.start(vertex);
                    return self.end(vertex, announced, Ok(vec![snapshot]));
                }
            }
            _ => {}
        }
        let key = self.key(vertex).await?;
        if !vertex.fresh
            && let Some(results) = self.recall(vertex, &key, output_count(&vertex.op))?
        {
            self.announce_cached(vertex);
            return Ok(results);
        }
        let inputs = self.obtain_inputs(vertex).await?;
        let keyed = !vertex.inputs.iter().any(|edge| edge.vertex.unkept.load(Ordering::Relaxed));
        let keep = keyed && self.is_as_keyed(vertex, &key).await?;
        vertex.unkept.store(!keep, Ordering::Relaxed);
        let ready = self.ready(vertex, inputs).await?;
        if !keep {
            // It is this build's alone: another one may have read something else.
            let _place = self.place(vertex).await;
            let announced = self.start(vertex);
            let done = self.execute(vertex, &ready, &self.0.progress).await;
            return self.end(vertex, announced, done);
        }
        let execute = |progress: Arc<dyn ProgressSink>| async move {
            let results = self.execute(vertex, &ready, &progress).await?;
            self.remember(vertex, &key, &results)?;
            Ok(results)
        };
        self.execute_together(vertex, key, execute).await
    }

    /// Has all that executing a step needs.
    async fn ready(&self, vertex: &Arc<Vertex>, inputs: Vec<Snapshot>) -> Result<Ready> {
        let keys = match &vertex.op {
            pb::op::Op::Exec(_) => self.exec_bases(vertex).await?,
            _ => vec![],
        };
        let locals = match &vertex.op {
            pb::op::Op::File(_) => join_all(vertex.inputs.iter().map(|edge| async move {
                if is_local(&edge.vertex.op) {
                    self.local_view(&edge.vertex).await.map(Some)
                } else {
                    Ok(None)
                }
            }))
            .await
            .into_iter()
            .collect::<Result<Vec<_>>>()?,
            _ => vec![],
        };
        Ok(Ready { inputs, keys, locals })
    }

    /// Returns the file systems of all inputs; for a local source that is a layer nobody may need, so file operations
    /// read it as a view instead, unless they change it.
    pub(super) async fn input_results(&self, vertex: &Arc<Vertex>) -> Result<Vec<Snapshot>> {
        let bases = match &vertex.op {
            pb::op::Op::File(op) => Some(FileReads::of(vertex, op).bases),
            _ => None,
        };
        let bases = bases.as_ref();
        try_join_all(vertex.inputs.iter().enumerate().map(|(at, edge)| async move {
            let read_only = bases.is_some_and(|bases| !bases.contains(&at));
            if read_only && is_local(&edge.vertex.op) {
                Ok(Snapshot::default())
            } else {
                self.solve(edge).await
            }
        }))
        .await
    }

    async fn execute(
        &self,
        vertex: &Arc<Vertex>,
        ready: &Ready,
        progress: &Arc<dyn ProgressSink>,
    ) -> Result<Vec<Snapshot>> {
        let Ready { inputs, keys, locals } = ready;
        match &vertex.op {
            pb::op::Op::Exec(op) => {
                self.reset_caches(vertex, op).await?;
                let services = &self.0.services;
                let worker = &self.0.worker;
                let step = exec::Step { worker, services, progress, vertex, inputs, keys };
                exec::run(&step, op).await
            }
            pb::op::Op::Diff(op) => {
                let (lower, upper) = sides(op, inputs);
                let (store, name) = (self.store().clone(), vertex.name.clone());
                let made = blocking::run(move || diff::between(&store, &lower, &upper, &name));
                Ok(vec![made.await?])
            }
            pb::op::Op::File(op) => {
                let (store, op, name) = (self.store().clone(), op.clone(), vertex.name.clone());
                let (inputs, locals) = (inputs.clone(), locals.clone());
                let now = self.0.time.unwrap_or_else(now);
                let keep_failed = self.0.services.keep_failed;
                blocking::run(move || {
                    Ok(apply_file_op(&FileStep {
                        store: &store,
                        op: &op,
                        inputs: &inputs,
                        locals: &locals,
                        name: &name,
                        now,
                        keep_failed,
                    }))
                })
                .await?
            }
            _ => Err(Cause::Unsupported("this kind of build step".into()).into()),
        }
    }

    /// Finds results from before that any build of the process can use. A few look-ups in the database take less time
    /// than having another thread make them.
    pub(super) fn recall_here(
        &self,
        key: &ResultKey,
        outputs: usize,
    ) -> Result<Option<Vec<Snapshot>>> {
        let store = self.store();
        let mut found = vec![];
        for output in 0..outputs {
            let Some(StepResult { snapshot, .. }) = store.result(&output_key(key, output))? else {
                return Ok(None);
            };
            for layer in &snapshot.layers {
                if !self.is_at_hand(*layer)? {
                    return Ok(None);
                }
            }
            found.push(snapshot);
        }
        Ok(Some(found))
    }

    pub(super) fn remember(
        &self,
        vertex: &Vertex,
        key: &ResultKey,
        results: &[Snapshot],
    ) -> Result<()> {
        for (output, snapshot) in results.iter().enumerate() {
            let result = StepResult { snapshot: snapshot.clone(), created: now() };
            self.store().remember(&output_key(key, output), &result, &vertex.name)?;
        }
        Ok(())
    }
}

/// A merge may stack this many layers. More is not a file system but an attempt to exhaust memory: merging a merge with
/// itself doubles the layers each time.
const MAX_LAYERS: usize = 10_000;

/// Lays file systems over each other.
fn merge(op: &pb::MergeOp, parts: &[Snapshot]) -> Result<Vec<Snapshot>> {
    let mut layers = vec![];
    for part in op.inputs.iter().filter_map(|input| parts.get(usize::try_from(input.input).ok()?)) {
        if layers.len() + part.layers.len() > MAX_LAYERS {
            return Err(Cause::Invalid(format!("a merge of more than {MAX_LAYERS} layers")).into());
        }
        layers.extend_from_slice(&part.layers);
    }
    Ok(vec![Snapshot { layers }])
}

/// Returns the two file systems that a difference is between.
fn sides(op: &pb::DiffOp, parts: &[Snapshot]) -> (Snapshot, Snapshot) {
    let side = |input: Option<i64>| -> Snapshot {
        input
            .and_then(|i| usize::try_from(i).ok())
            .and_then(|i| parts.get(i).cloned())
            .unwrap_or_default()
    };
    (side(op.lower.as_ref().map(|side| side.input)), side(op.upper.as_ref().map(|side| side.input)))
}

/// Takes what one file system has on top of another, where it was made on top of it.
fn tail(op: &pb::DiffOp, parts: &[Snapshot]) -> Option<Snapshot> {
    let (lower, upper) = sides(op, parts);
    let rest = upper.layers.strip_prefix(lower.layers.as_slice())?;
    Some(Snapshot { layers: rest.to_vec() })
}

pub(super) fn output_count(op: &pb::op::Op) -> usize {
    let highest = match op {
        pb::op::Op::Exec(exec) => exec.mounts.iter().map(|mount| mount.output).max(),
        pb::op::Op::File(file) => file.actions.iter().map(|action| action.output).max(),
        _ => None,
    };
    highest.and_then(|output| usize::try_from(output.saturating_add(1)).ok()).unwrap_or(0).max(1)
}
