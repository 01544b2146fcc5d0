//! What each kind of vertex does.

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
    // What each action made, until the next one or an output takes it.
    let mut made: Vec<Option<(Snapshot, View)>> = vec![];
    let mut outputs: Vec<Option<Snapshot>> = vec![];
    for action in &op.actions {
        let (base, mut target) = match usize::try_from(action.input) {
            Err(_) => (Snapshot::default(), View::default()),
            Ok(at) if at < count => (inputs[at].clone(), store.view(&inputs[at].layers)?),
            Ok(at) => made.get_mut(at - count).and_then(Option::take).ok_or_else(|| {
                Cause::Unsupported("a file operation whose actions branch".into())
            })?,
        };
        let source = match usize::try_from(action.secondary_input) {
            Err(_) => None,
            Ok(at) if at < count => views[at].as_deref(),
            Ok(_) => {
                return Err(Cause::Unsupported(
                    "a copy from another action of the same operation".into(),
                )
                .into());
            }
        };
        let kind = action
            .action
            .as_ref()
            .ok_or_else(|| Cause::Invalid("an action without a kind".into()))?;
        file::apply(kind, &mut target, source, &context)?;
        let Ok(output) = usize::try_from(action.output) else {
            made.push(Some((base, target)));
            continue;
        };
        let layer = store.adopt_tree(target.into_changes(), name)?;
        if outputs.len() <= output {
            // Loading has checked that there are no more outputs than actions.
            outputs.resize(output + 1, None);
        }
        outputs[output] = Some(base.with(layer));
        made.push(None);
    }
    outputs
        .into_iter()
        .collect::<Option<Vec<_>>>()
        .filter(|outputs| !outputs.is_empty())
        .ok_or_else(|| Cause::Invalid("a file operation leaves an output undefined".into()).into())
}
