//! What identifies a process: what it does, and what it reads.

use std::sync::Arc;

use futures::future::try_join_all;
use sha2::{Digest as _, Sha256};
use slipway_spec::llb::pb;
use slipway_store::blocking;
use slipway_store::result::ResultKey;
use slipway_store::tree::clean;
use slipway_store::view::View;

use super::Job;
use super::key::{definition_key, output_key, tagged};
use super::local::is_local;
use crate::error::{Cause, Result, SolveError};
use crate::graph::Vertex;
use crate::operation::exec::mounts::cache_name;
use crate::operation::file;

impl Job {
    /// Finds a process's key without executing anything; `None` when a step below must run first.
    ///
    /// Parts of other steps' results that are mounted and not kept count by their content, which is known once the step
    /// has run; what was found then is kept as another name of the key that says which steps those are.
    pub(super) async fn quick_exec_key(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::ExecOp,
    ) -> Result<Option<ResultKey>> {
        let inputs = try_join_all((0..vertex.inputs.len()).map(|at| async move {
            match self.content_input_key(vertex, op, at).await? {
                Some(key) => Ok::<_, SolveError>(Some(key)),
                None => self.quick_key(&vertex.inputs[at].vertex).await,
            }
        }))
        .await?;
        let Some(inputs) = inputs.into_iter().collect::<Option<Vec<_>>>() else { return Ok(None) };
        let key = definition_key(vertex, &inputs);
        if !has_late_inputs(vertex, op) {
            return Ok(Some(key));
        }
        if vertex.fresh {
            return Ok(None);
        }
        Ok(self.store().alias(&alias_of(&key))?)
    }

    /// Finds the key by executing what is mounted.
    pub(super) async fn exec_key(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::ExecOp,
    ) -> Result<ResultKey> {
        let inputs = try_join_all((0..vertex.inputs.len()).map(|at| async move {
            let edge = &vertex.inputs[at];
            if let Some(key) = self.content_input_key(vertex, op, at).await? {
                return Ok::<_, SolveError>((key, key));
            }
            let own = self.key(&edge.vertex).await?;
            let Some(selectors) = late_selectors(vertex, op, at) else {
                return Ok((own, own));
            };
            let view = self.view(edge).await?;
            Ok((own, selected_key(selectors, view).await?))
        }))
        .await?;
        let (own, content): (Vec<_>, Vec<_>) = inputs.into_iter().unzip();
        let key = definition_key(vertex, &content);
        if has_late_inputs(vertex, op) {
            self.store().remember_alias(&alias_of(&definition_key(vertex, &own)), &key)?;
        }
        Ok(key)
    }

    /// Whether what a process is about to read is what its key says; see [`Job::is_as_keyed`].
    pub(super) async fn is_exec_as_keyed(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::ExecOp,
        key: &ResultKey,
    ) -> Result<bool> {
        if !has_late_inputs(vertex, op) || !matches!(vertex.quick_key.get(), Some(Ok(Some(_)))) {
            return Ok(true);
        }
        Ok(self.exec_key(vertex, op).await? == *key)
    }

    /// Returns the key of what a process reads of one of its inputs, if it counts by its content: that is so for parts of
    /// the build context that are mounted and not changed. Such a step stays known while other files change.
    pub(super) async fn content_input_key(
        &self,
        vertex: &Arc<Vertex>,
        op: &pb::ExecOp,
        at: usize,
    ) -> Result<Option<ResultKey>> {
        let edge = &vertex.inputs[at];
        let Some(selectors) = content_selectors(op, at).filter(|_| is_local(&edge.vertex.op))
        else {
            return Ok(None);
        };
        let view = self.local_view(&edge.vertex).await?;
        selected_key(selectors, view).await.map(Some)
    }

    /// What identifies the file systems that a process is given; the folder of a cache mount is known by it.
    pub(super) async fn exec_bases(&self, vertex: &Arc<Vertex>) -> Result<Vec<ResultKey>> {
        let keys = vertex
            .inputs
            .iter()
            .map(|edge| async move { Ok(output_key(&self.key(&edge.vertex).await?, edge.index)) });
        futures::future::try_join_all(keys).await
    }

    /// A process that is to run whatever is known begins with empty caches. Once in a build is enough.
    pub(super) async fn reset_caches(&self, vertex: &Vertex, op: &pb::ExecOp) -> Result<()> {
        if !vertex.ignore_cache {
            return Ok(());
        }
        for mount in &op.mounts {
            if mount.mount_type != pb::MountType::Cache as i32 {
                continue;
            }
            let (id, _) = cache_name(mount)?;
            if !super::lock(&self.0.reset).insert(id.clone()) {
                continue;
            }
            let store = self.store().clone();
            blocking::run(move || store.forget_kept(slipway_store::kept::KeptKind::Cache, &id))
                .await?;
        }
        Ok(())
    }
}

/// The name under which the key of a process is kept that reads parts of other steps' results.
fn alias_of(definition: &ResultKey) -> ResultKey {
    let mut hash = tagged(b"exec definition");
    hash.update(definition.0);
    ResultKey(hash.finalize().into())
}

/// Returns which parts a process sees of an input whose content is known only once the step that makes it has run.
/// What a source has is known by its key, and all of a file system would take long to read.
fn late_selectors(vertex: &Vertex, op: &pb::ExecOp, at: usize) -> Option<Vec<String>> {
    if matches!(vertex.inputs[at].vertex.op, pb::op::Op::Source(_)) {
        return None;
    }
    let selectors = content_selectors(op, at)?;
    let parts = selectors.iter().all(|selector| !clean(selector.as_bytes()).is_empty());
    Some(selectors).filter(|_| parts)
}

fn has_late_inputs(vertex: &Vertex, op: &pb::ExecOp) -> bool {
    (0..vertex.inputs.len()).any(|at| late_selectors(vertex, op, at).is_some())
}

/// Returns which parts of an input a process sees, unless the input counts as a whole.
fn content_selectors(op: &pb::ExecOp, at: usize) -> Option<Vec<String>> {
    let mut selectors = vec![];
    for mount in &op.mounts {
        if usize::try_from(mount.input).ok() != Some(at) {
            continue;
        }
        let kept = mount.output >= 0 && !mount.readonly;
        if mount.dest == "/"
            || kept
            || mount.mount_type != pb::MountType::Bind as i32
            || mount.content_cache == pb::MountContentCache::Off as i32
        {
            return None;
        }
        selectors.push(mount.selector.clone());
    }
    Some(selectors).filter(|selectors| !selectors.is_empty())
}

/// Returns the key of the parts of a file system that a process sees.
async fn selected_key(selectors: Vec<String>, view: Arc<View>) -> Result<ResultKey> {
    let digest = blocking::run(move || Ok(selected_digest(&selectors, &view))).await??;
    let mut hash = tagged(b"selected");
    hash.update(digest);
    Ok(ResultKey(hash.finalize().into()))
}

fn selected_digest(selectors: &[String], view: &View) -> Result<[u8; 32]> {
    let mut hash = Sha256::new();
    for selector in selectors {
        let copy = pb::FileActionCopy {
            src: if selector.is_empty() { "/".into() } else { selector.clone() },
            follow_symlink: true,
            ..Default::default()
        };
        match file::source_digest(&copy, view) {
            Ok(digest) => hash.update(digest),
            // The process will fail, or is there to find out; either way that is what it reads.
            Err(error) if matches!(*error.cause, Cause::Missing(_)) => hash.update(b"missing"),
            Err(error) => return Err(error),
        }
    }
    Ok(hash.finalize().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_cannot_change_counts_by_content() {
        let mount = |dest: &str, output, readonly| pb::Mount {
            input: 0,
            dest: dest.into(),
            selector: "/s".into(),
            output,
            readonly,
            ..Default::default()
        };
        let select = |mounts: Vec<pb::Mount>| {
            content_selectors(&pb::ExecOp { mounts, ..Default::default() }, 0)
        };
        assert_eq!(select(vec![mount("/a", -1, false)]).unwrap(), ["/s"]);
        assert_eq!(select(vec![mount("/a", 0, true), mount("/b", -1, true)]).unwrap().len(), 2);
        assert_eq!(select(vec![mount("/a", 0, false)]), None);
        assert_eq!(select(vec![mount("/", -1, true)]), None);
        assert_eq!(select(vec![mount("/a", -1, true), mount("/", 0, false)]), None);
        assert_eq!(select(vec![]), None);
        let off = pb::MountContentCache::Off as i32;
        assert_eq!(select(vec![pb::Mount { content_cache: off, ..mount("/a", -1, true) }]), None);
    }
}
