//! What identifies a file operation: what it does, what it does it to, and the content it reads.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::future::try_join_all;
use sha2::{Digest as _, Sha256};
use slipway_spec::llb::pb;
use slipway_store::blocking;
use slipway_store::result::ResultKey;
use slipway_store::view::View;

use super::Job;
use super::key::{output_key, tagged};
use super::local::is_local;
use crate::error::{Cause, Result, SolveError};
use crate::graph::{Edge, Vertex, encode};
use crate::operation::file;
use crate::operation::left::{Base, FailedPart, Left};

impl Job {
    /// A file operation is identified by what it does, what it does it to, and the content it reads. The content of a
    /// step's result is known only once the step has run, so the step's key is kept as another name of it.
    pub(super) async fn quick_file_key(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::FileOp,
    ) -> Result<Option<ResultKey>> {
        let reads = FileReads::of(vertex, op);
        let bases =
            try_join_all(reads.bases.iter().map(|at| self.quick_key(&vertex.inputs[*at].vertex)))
                .await?;
        let Some(bases) = bases.into_iter().collect::<Option<Vec<_>>>() else { return Ok(None) };
        let Some(definition) = self.file_definition(vertex, op, &reads, &bases).await? else {
            return Ok(None);
        };
        if !reads.certain() && vertex.fresh {
            return Ok(None);
        }
        let known = if reads.certain() {
            self.store().alias(&definition)?
        } else {
            self.known_alias(vertex, &definition)?
        };
        if known.is_some() || !reads.certain() {
            return Ok(known);
        }
        let key = self.file_content(vertex, op, &reads, &bases).await?;
        self.store().remember_alias(&definition, &key)?;
        Ok(Some(key))
    }

    /// Finds the key by executing what is read; what is read and what it is copied onto are solved at the same time.
    pub(super) async fn file_key(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::FileOp,
    ) -> Result<ResultKey> {
        let reads = FileReads::of(vertex, op);
        let bases = try_join_all(reads.bases.iter().map(|at| self.key(&vertex.inputs[*at].vertex)));
        let sources =
            try_join_all(reads.copies.iter().map(|(_, at)| self.view(&vertex.inputs[*at])));
        let (bases, _) = futures::try_join!(bases, sources)?;
        let key = self.file_content(vertex, op, &reads, &bases).await?;
        if let Some(definition) = self.file_definition(vertex, op, &reads, &bases).await? {
            if reads.certain() {
                // Of this machine's folder as a whole, which is nothing for others.
                self.store().remember_alias(&definition, &key)?;
            } else {
                self.remember_alias(vertex, &definition, &key)?;
            }
        }
        Ok(key)
    }

    /// The name of a file operation by the keys of what it reads; `None` while one of them is not known.
    async fn file_definition(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::FileOp,
        reads: &FileReads<'_>,
        bases: &[ResultKey],
    ) -> Result<Option<ResultKey>> {
        let mut hash = reads.start(vertex, op, bases);
        hash.update(b"definition");
        for (_, at) in &reads.copies {
            let edge = &vertex.inputs[*at];
            if is_local(&edge.vertex.op) {
                // Where the client has it all as it was, what each copy reads of it need not be looked at.
                hash.update(self.local(&edge.vertex).await?.digest());
            } else {
                let known = match edge.vertex.key.get() {
                    Some(key) => Some(key.clone()?),
                    None => self.quick_key(&edge.vertex).await?,
                };
                let Some(key) = known else { return Ok(None) };
                hash.update(output_key(&key, edge.index).0);
            }
        }
        Ok(Some(ResultKey(hash.finalize().into())))
    }

    /// The name of a file operation by the content of what it reads.
    async fn file_content(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::FileOp,
        reads: &FileReads<'_>,
        bases: &[ResultKey],
    ) -> Result<ResultKey> {
        let mut hash = reads.start(vertex, op, bases);
        hash.update(b"content");
        for (copy, at) in &reads.copies {
            hash.update(self.read_digest(vertex, copy, *at).await?);
        }
        Ok(ResultKey(hash.finalize().into()))
    }

    async fn read_digest(
        &self,
        vertex: &Arc<Vertex>,
        copy: &pb::FileActionCopy,
        at: usize,
    ) -> Result<[u8; 32]> {
        let edge = &vertex.inputs[at];
        let view = self.view(edge).await?;
        let copy = copy.clone();
        let digest = blocking::run(move || Ok(file::source_digest(&copy, &view))).await?;
        let Err(error) = digest else { return digest };
        let mut error = match &*error.cause {
            Cause::Missing(what) => SolveError::from(Cause::MissingSource {
                vertex: edge.vertex.digest.clone(),
                what: what.clone(),
            }),
            _ => error,
        };
        if self.0.services.keep_failed {
            // Without it there is nothing to look into, and the error is the same.
            if let Ok(read) = self.solve(edge).await {
                error = error.leaving(Left {
                    op: vertex.op.clone(),
                    part: Some(FailedPart::Input(at)),
                    inputs: vec![Some(Base::Snapshot(read))],
                    mounts: vec![],
                });
            }
        }
        Err(error.at(|| vertex.failed()))
    }

    /// Opens an edge for reading, whatever it is.
    pub(super) async fn view(&self, edge: &Edge) -> Result<Arc<View>> {
        if is_local(&edge.vertex.op) {
            return self.local_view(&edge.vertex).await;
        }
        let snapshot = self.obtain(edge).await?;
        let store = self.store().clone();
        Ok(blocking::run(move || Ok(Arc::new(store.view(&snapshot.layers)?))).await?)
    }

    /// Whether what a file operation is about to read is what its key says. A key that was known before anything ran
    /// names the content of an earlier run; a step that had to run again may have given something else.
    pub(super) async fn is_as_keyed(&self, vertex: &Arc<Vertex>, key: &ResultKey) -> Result<bool> {
        let op = match &vertex.op {
            pb::op::Op::File(op) => op,
            pb::op::Op::Exec(op) => return self.is_exec_as_keyed(vertex, op, key).await,
            _ => return Ok(true),
        };
        let reads = FileReads::of(vertex, op);
        if reads.certain() || !matches!(vertex.quick_key.get(), Some(Ok(Some(_)))) {
            return Ok(true);
        }
        let bases =
            try_join_all(reads.bases.iter().map(|at| self.key(&vertex.inputs[*at].vertex))).await?;
        let content = self.file_content(vertex, op, &reads, &bases).await?;
        if content == *key {
            return Ok(true);
        }
        if let Some(definition) = self.file_definition(vertex, op, &reads, &bases).await? {
            self.remember_alias(vertex, &definition, &content)?;
        }
        Ok(false)
    }
}

/// Which inputs a file operation changes and which it only reads.
pub(super) struct FileReads<'a> {
    pub(super) bases: Vec<usize>,
    /// Copies with the input they read.
    copies: Vec<(&'a pb::FileActionCopy, usize)>,
    all_local: bool,
}

impl<'a> FileReads<'a> {
    pub(super) fn of(vertex: &Vertex, op: &'a pb::FileOp) -> Self {
        let count = vertex.inputs.len();
        let input = |index: i64| usize::try_from(index).ok().filter(|index| *index < count);
        // Owners are looked up in whatever the definition says; as a rule that is what is changed.
        let accounts = op.actions.iter().flat_map(file::accounts);
        let bases = op.actions.iter().map(|action| action.input).chain(accounts).filter_map(input);
        let bases: BTreeSet<usize> = bases.collect();
        let copies: Vec<_> = op
            .actions
            .iter()
            .filter_map(|action| {
                let Some(pb::file_action::Action::Copy(copy)) = &action.action else { return None };
                let at = input(action.secondary_input).filter(|at| !bases.contains(at))?;
                Some((copy, at))
            })
            .collect();
        let all_local = copies.iter().all(|(_, at)| is_local(&vertex.inputs[*at].vertex.op));
        Self { bases: bases.into_iter().collect(), copies, all_local }
    }

    /// Whether the content of everything that is read is known without executing anything.
    fn certain(&self) -> bool {
        self.all_local
    }

    fn start(&self, vertex: &Vertex, op: &pb::FileOp, bases: &[ResultKey]) -> Sha256 {
        let mut hash = tagged(b"file");
        let encoded = encode(op);
        hash.update((encoded.len() as u64).to_le_bytes());
        hash.update(&encoded);
        for (at, key) in self.bases.iter().zip(bases) {
            hash.update((*at as u64).to_le_bytes());
            hash.update(output_key(key, vertex.inputs[*at].index).0);
        }
        hash
    }
}
