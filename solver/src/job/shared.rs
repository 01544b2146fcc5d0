//! What builds of one process do together. A step that several want is executed by one of them, and the others look on; an
//! image that several ask for is asked for once.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use slipway_spec::llb::pb;
use slipway_spec::progress::ProgressSink;
use slipway_spec::{Digest, ImageReference, Platform};
use slipway_store::result::ResultKey;
use slipway_store::snapshot::Snapshot;

use super::announce::Announced;
use super::audience::{Audience, Looking};
use super::result::output_count;
use super::{Job, lock};
use crate::error::{Cause, Result, SolveError};
use crate::flight::Flights;
use crate::graph::Vertex;
use crate::source::Found;
use crate::source::image::{Lookup, ResolvedImage};

/// Work that builds of a process share while it is under way. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Shared(Arc<Tables>);

#[derive(Debug, Default)]
struct Tables {
    /// Steps, by their key and whether results from before count.
    steps: Flights<(ResultKey, bool), Landed, Arc<Audience>>,
    /// Questions for images.
    images: Flights<(String, Platform, Lookup), Arc<ResolvedImage>>,
    /// Sources that are looked for outside, by the digest of what they are.
    sources: Flights<Digest, Arc<Found>>,
    /// One lock per image that is being fetched.
    pulls: Mutex<HashMap<String, Turn>>,
}

type Turn = std::sync::Weak<tokio::sync::Mutex<()>>;

/// How a step ended.
#[derive(Clone)]
enum Landed {
    /// Another build had finished it just before.
    Known(Vec<Snapshot>),
    Made(Vec<Snapshot>),
    /// Whoever would run it would see it fail.
    Failed(SolveError),
}

impl Shared {
    /// Returns the lock of an image that is to be fetched.
    pub(super) fn pull(&self, reference: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut pulls = lock(&self.0.pulls);
        if let Some(turn) = pulls.get(reference).and_then(Turn::upgrade) {
            return turn;
        }
        pulls.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::default();
        pulls.insert(reference.to_owned(), Arc::downgrade(&turn));
        turn
    }
}

impl Job {
    /// Finds an image and its config for a platform; layers are not fetched. Builds that ask at the same time ask once;
    /// whoever is refused is refused alone.
    ///
    /// # Errors
    /// When there is no such image, or not for that platform.
    pub async fn resolve_image(
        &self,
        reference: &ImageReference,
        platform: &Platform,
        lookup: Lookup,
    ) -> Result<Arc<ResolvedImage>> {
        let worker = &self.0.worker;
        let seat = worker.shared.0.images.enter((reference.to_string(), platform.clone(), lookup));
        let ask = async { worker.images.resolve(reference, platform, lookup).await.map(Arc::new) };
        seat.outcome(ask).await
    }

    /// Finds out about a source outside, unless another build is doing so.
    pub(super) async fn find_together(
        &self,
        vertex: &Vertex,
        find: impl Future<Output = Result<Arc<Found>>>,
    ) -> Result<Arc<Found>> {
        self.0.worker.shared.0.sources.enter(vertex.digest.clone()).outcome(find).await
    }

    /// Has a step executed: by this build, or by another one that is at it. The secrets and agents of whoever executes it
    /// are used. Everything that the step needs is there, so that executing it waits for no other step.
    pub(super) async fn execute_together<F>(
        &self,
        vertex: &Arc<Vertex>,
        key: ResultKey,
        execute: impl FnOnce(Arc<dyn ProgressSink>) -> F,
    ) -> Result<Vec<Snapshot>>
    where
        F: Future<Output = Result<Vec<Snapshot>>>,
    {
        let steps = &self.0.worker.shared.0.steps;
        // Who wants a step to run again shares a run with who wants the same, and others may have its result too.
        let running = if vertex.fresh { None } else { steps.join((key, true)) };
        let seat = running.unwrap_or_else(|| steps.enter((key, vertex.fresh)));
        let audience = seat.extra();
        // What was shown already, such as a download that the key took, is not shown again.
        let shown = vertex.announced.load(Ordering::Relaxed);
        let looking = (!shown).then(|| audience.join(&self.0.progress, vertex));
        let work = async {
            // Another build may have finished it since the store was asked.
            if !vertex.fresh
                && let Some(results) = self.recall_here(&key, output_count(&vertex.op))?
            {
                return Ok(Landed::Known(results));
            }
            let _place = self.place(vertex).await;
            audience.begin();
            match execute(audience.clone()).await {
                Ok(results) => Ok(Landed::Made(results)),
                Err(error) if is_everyones(vertex, &error) => Ok(Landed::Failed(error)),
                Err(error) => Err(error),
            }
        };
        let landed = seat.outcome(work).await;
        let announced = match (&landed, looking.map(Looking::end)) {
            (_, None) => None,
            (Ok(Landed::Known(_)), Some(false)) => {
                self.announce_cached(vertex);
                None
            }
            (_, Some(true)) => Some(Announced::new(&*self.0.progress, &vertex.digest)),
            (_, Some(false)) => Some(self.start(vertex)),
        };
        let results = landed.and_then(|landed| match landed {
            Landed::Known(results) | Landed::Made(results) => Ok(results),
            Landed::Failed(error) => Err(SolveError { vertex: None, ..error }),
        });
        match announced {
            Some(announced) => self.end(vertex, announced, results),
            None => results.map_err(|error| error.at(|| vertex.failed())),
        }
    }

    /// Waits until one more process may run. Waiting is not yet work on the step.
    pub(super) async fn place(&self, vertex: &Vertex) -> Option<tokio::sync::SemaphorePermit<'_>> {
        match &vertex.op {
            pb::op::Op::Exec(_) => self.0.worker.parallel.acquire().await.ok(),
            _ => None,
        }
    }
}

/// Whether a failure is one of the step, and not of the client whose build executed it.
fn is_everyones(vertex: &Vertex, error: &SolveError) -> bool {
    let asks_client = match &vertex.op {
        pb::op::Op::Exec(op) => {
            let kinds = [pb::MountType::Secret as i32, pb::MountType::Ssh as i32];
            !op.secretenv.is_empty()
                || op.mounts.iter().any(|mount| kinds.contains(&mount.mount_type))
        }
        // Where a file is missing, its client may have left.
        pb::op::Op::File(_) => {
            vertex.inputs.iter().any(|edge| super::local::is_local(&edge.vertex.op))
        }
        pb::op::Op::Diff(_) => false,
        _ => true,
    };
    !asks_client || matches!(*error.cause, Cause::Exit { .. } | Cause::Start { .. })
}
