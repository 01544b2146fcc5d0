//! What a process that failed leaves behind, for those who want to look into it.

use std::path::PathBuf;
use std::sync::Arc;

use slipway_spec::llb::pb;
use slipway_store::snapshot::Snapshot;

use super::StepFolders;
use super::mounts::Mounts;

/// What a process that failed was given, and what it made of it, by the mounts of its operation. It is thrown away when
/// nobody knows of it any more.
#[derive(Debug)]
pub struct Left {
    /// What was executed.
    pub op: pb::ExecOp,
    /// The file systems before; `None` where a mount has none, such as a secret's.
    pub inputs: Vec<Option<Base>>,
    /// The file systems after.
    pub mounts: Vec<Option<Base>>,
}

/// A file system that processes may be started on.
#[derive(Clone, Debug)]
pub enum Base {
    /// The result of a step.
    Snapshot(Snapshot),
    /// What a failed process left.
    Left(Arc<LeftFolders>),
}

/// Folders that a failed process has written to.
#[derive(Debug)]
pub struct LeftFolders(StepFolders);

impl LeftFolders {
    /// Returns its folders, base first.
    pub(super) fn lower(&self) -> Vec<PathBuf> {
        self.0.lower.iter().cloned().chain([self.0.upper()]).collect()
    }
}

impl Left {
    /// Takes what a process leaves.
    pub(super) fn of(op: &pb::ExecOp, inputs: &[Snapshot], mounts: Mounts) -> Self {
        let input = |mount: &pb::Mount| {
            let at = usize::try_from(mount.input).ok()?;
            inputs.get(at).cloned().map(Base::Snapshot)
        };
        let inputs: Vec<Option<Base>> = op.mounts.iter().map(input).collect();
        let mut after = inputs.clone();
        for (at, folders) in mounts.leave() {
            if let Some(place) = after.get_mut(at) {
                *place = Some(Base::Left(Arc::new(LeftFolders(folders))));
            }
        }
        Self { op: op.clone(), inputs, mounts: after }
    }
}
