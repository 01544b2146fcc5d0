//! What a step that failed leaves behind, for those who want to look into it.

use std::path::PathBuf;
use std::sync::Arc;

use slipway_spec::llb::pb;
use slipway_store::snapshot::Snapshot;

use super::exec::StepFolders;
use super::exec::mounts::Mounts;

/// What a step that failed was given, and what it made of it. It is thrown away when nobody knows of it any more.
///
/// The file systems of a process are those of its mounts; `None` stands for a mount that has none, such as a secret's.
/// For other operations they are those of its inputs, and those that its actions wrote to.
#[derive(Debug)]
pub struct Left {
    /// What was executed.
    pub op: pb::op::Op,
    /// What of it failed, where that is not all of it.
    pub part: Option<FailedPart>,
    /// The file systems before.
    pub inputs: Vec<Option<Base>>,
    /// The file systems after.
    pub mounts: Vec<Option<Base>>,
}

/// A part of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailedPart {
    /// The action of a file operation with this place among them.
    Action(usize),
    /// What the operation reads of its input with this place among them, to know whether it was done before. That input
    /// is the only one that is told.
    Input(usize),
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
    pub(crate) fn lower(&self) -> Vec<PathBuf> {
        self.0.lower.iter().cloned().chain([self.0.upper()]).collect()
    }
}

impl Left {
    /// Takes what a process leaves.
    pub(super) fn of_process(op: &pb::ExecOp, inputs: &[Snapshot], mounts: Mounts) -> Self {
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
        Self { op: pb::op::Op::Exec(op.clone()), part: None, inputs, mounts: after }
    }
}
