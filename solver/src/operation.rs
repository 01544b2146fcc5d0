//! What each kind of vertex does.

pub(crate) mod diff;
pub(crate) mod exec;
pub(crate) mod file;
mod mode;

use std::sync::Arc;

use slipway_spec::llb::pb;
use slipway_store::Store;
use slipway_store::snapshot::Snapshot;
use slipway_store::view::View;

use crate::error::{Cause, Result};

/// Runs all actions of a file operation; each output becomes a layer on top of the file system it began with.
///
/// # Errors
/// When an action fails; nothing is kept then.
pub(crate) fn apply_file_op(
    store: &Store,
    op: &pb::FileOp,
    inputs: &[Snapshot],
    locals: Vec<Option<Arc<View>>>,
    name: &str,
    now: i64,
) -> Result<Vec<Snapshot>> {
    let count = inputs.len();
    let views = locals
        .into_iter()
        .zip(inputs)
        .map(|(local, snapshot)| match local {
            Some(view) => Ok(Some(view)),
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
        let source = match usize::try_from(action.secondary_input) {
            Err(_) => None,
            Ok(at) if at < count => views[at].clone(),
            Ok(at) => Some(Arc::new(take(store, &mut made, &mut uses, at - count)?.1)),
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
        file::apply(kind, &mut target, source.as_deref(), &context)?;
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
