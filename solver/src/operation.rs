//! What each kind of vertex does.

pub(crate) mod diff;
pub(crate) mod exec;
pub(crate) mod file;
pub(crate) mod left;
mod mode;

use std::sync::Arc;

use slipway_spec::llb::pb;
use slipway_store::Store;
use slipway_store::snapshot::Snapshot;
use slipway_store::view::View;

use self::left::{Base, FailedPart, Left};
use crate::error::{Cause, Result, SolveError};

/// A file operation that is to be run.
pub(crate) struct FileStep<'a> {
    pub(crate) store: &'a Store,
    pub(crate) op: &'a pb::FileOp,
    pub(crate) inputs: &'a [Snapshot],
    /// Inputs that are read where they are, and are no layers.
    pub(crate) locals: &'a [Option<Arc<View>>],
    /// The step's name.
    pub(crate) name: &'a str,
    /// The time of what is made, in nanoseconds since 1970.
    pub(crate) now: i64,
    /// Whether what a failed action leaves is kept for those who want to look into it.
    pub(crate) keep_failed: bool,
}

/// Runs all actions of a file operation; each output becomes a layer on top of the file system it began with.
///
/// # Errors
/// When an action fails.
pub(crate) fn apply_file_op(step: &FileStep<'_>) -> Result<Vec<Snapshot>> {
    let FileStep { store, op, inputs, name, now, .. } = *step;
    let count = inputs.len();
    let views = step
        .locals
        .iter()
        .zip(inputs)
        .map(|(local, snapshot)| match local {
            Some(view) => Ok(Some(view.clone())),
            None => Ok(Some(Arc::new(store.view(&snapshot.layers)?))),
        })
        .collect::<Result<Vec<_>>>()?;
    let context = file::FileContext { store, now, inputs: &views };
    // How often the outcome of each action is used; the last use may take it.
    let mut uses: Vec<usize> = vec![0; op.actions.len()];
    let earlier = |index: i64| usize::try_from(index).ok().and_then(|at| at.checked_sub(count));
    for action in &op.actions {
        for at in [action.input, action.secondary_input].into_iter().filter_map(earlier) {
            *uses.get_mut(at).ok_or_else(no_such_action)? += 1;
        }
    }
    // What each action made: on top of which file system, and that with the changes.
    let mut made: Vec<Option<(Snapshot, View)>> = vec![];
    let mut outputs: Vec<Option<Snapshot>> = vec![];
    for (position, action) in op.actions.iter().enumerate() {
        // What an earlier action of this operation made, and is read now.
        let mut between = None;
        let source = match usize::try_from(action.secondary_input) {
            Err(_) => None,
            Ok(at) if at < count => views[at].clone(),
            Ok(at) => {
                let (base, view) = take(store, &mut made, &mut uses, at - count)?;
                let view = Arc::new(view);
                between = Some((at - count, base, view.clone()));
                Some(view)
            }
        };
        let (base, mut target) = match usize::try_from(action.input) {
            Err(_) => (Snapshot::default(), View::default()),
            Ok(at) if at < count => (inputs[at].clone(), store.view(&inputs[at].layers)?),
            Ok(at) => take(store, &mut made, &mut uses, at - count)?,
        };
        let kind = action
            .action
            .as_ref()
            .ok_or_else(|| Cause::Invalid("an action without a kind".into()))?;
        if let Err(error) = file::apply(kind, &mut target, source.as_deref(), &context) {
            return Err(if step.keep_failed {
                let written = [Some((position, base, Arc::new(target))), between];
                step.left_by(error, position, written.into_iter().flatten())
            } else {
                error
            });
        }
        let Ok(output) = usize::try_from(action.output) else {
            made.push(Some((base, target)));
            continue;
        };
        if outputs.len() <= output {
            // Loading has checked that there are no more outputs than actions.
            outputs.resize(output + 1, None);
        }
        let (changes, again) = if uses[position] > 0 {
            (target.changes().clone(), Some((base.clone(), target)))
        } else {
            (target.into_changes(), None)
        };
        outputs[output] = Some(base.with(store.adopt_tree(changes, name)?));
        made.push(again);
    }
    outputs
        .into_iter()
        .collect::<Option<Vec<_>>>()
        .filter(|outputs| !outputs.is_empty())
        .ok_or_else(|| Cause::Invalid("a file operation leaves an output undefined".into()).into())
}

impl FileStep<'_> {
    /// Keeps what an action has left that failed. Should that fail as well, then there is nothing to look into.
    fn left_by(
        &self,
        error: SolveError,
        position: usize,
        written: impl Iterator<Item = (usize, Snapshot, Arc<View>)>,
    ) -> SolveError {
        let adopt = |base: &Snapshot, changes| {
            let layer = self.store.adopt_tree(changes, self.name)?;
            Ok(Some(Base::Snapshot(base.with(layer))))
        };
        let keep = || -> Result<Left> {
            let inputs = self.inputs.iter().zip(self.locals).map(|(input, local)| match local {
                Some(view) => adopt(input, view.flatten()?),
                None => Ok(Some(Base::Snapshot(input.clone()))),
            });
            let inputs = inputs.collect::<Result<_>>()?;
            let mut mounts = vec![None; self.op.actions.len()];
            for (at, base, view) in written {
                mounts[at] = adopt(&base, view.changes().clone())?;
            }
            let op = pb::op::Op::File(self.op.clone());
            Ok(Left { op, part: Some(FailedPart::Action(position)), inputs, mounts })
        };
        match keep() {
            Ok(left) => error.leaving(left),
            Err(reason) => {
                tracing::debug!(error = %reason, "what a failed step left cannot be looked into");
                error
            }
        }
    }
}

fn no_such_action() -> Cause {
    Cause::Invalid("an action names another that does not come before it".into())
}

/// Returns what an earlier action made; all but the last use get a copy.
fn take(
    store: &Store,
    made: &mut [Option<(Snapshot, View)>],
    uses: &mut [usize],
    at: usize,
) -> Result<(Snapshot, View)> {
    let slot = made.get_mut(at).ok_or_else(no_such_action)?;
    uses[at] = uses[at].saturating_sub(1);
    if uses[at] == 0 {
        return Ok(slot.take().ok_or_else(no_such_action)?);
    }
    let (base, view) = slot.as_ref().ok_or_else(no_such_action)?;
    let copy = store.view(&base.layers)?.with_changes(view.changes().clone());
    Ok((base.clone(), copy))
}
