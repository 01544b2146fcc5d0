//! Who looks on while a step runs: every build that waits for it, each under its own name of the step.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slipway_spec::Digest;
use slipway_spec::progress::{ProgressEvent, ProgressSink};

use crate::graph::Vertex;

/// What is kept of a step's output for builds that come to wait for it, in bytes.
const KEPT_OUTPUT: usize = 2 << 20;

/// The builds that look on.
#[derive(Default)]
pub(crate) struct Audience(Mutex<State>);

#[derive(Default)]
struct State {
    /// Whether work has begun.
    begun: bool,
    /// What was told since then, for those who come later.
    told: Vec<ProgressEvent>,
    kept: usize,
    next: u64,
    lookers: Vec<Looker>,
}

struct Looker {
    id: u64,
    progress: Arc<dyn ProgressSink>,
    vertex: Arc<Vertex>,
    started: bool,
}

/// A build that looks on. Dropping it says that its vertex was given up, if anything was said of it.
pub(super) struct Looking<'a> {
    audience: &'a Audience,
    id: u64,
}

impl Audience {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a build, and tells it what was told so far.
    pub(super) fn join(
        &self,
        progress: &Arc<dyn ProgressSink>,
        vertex: &Arc<Vertex>,
    ) -> Looking<'_> {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        let mut looker =
            Looker { id, progress: progress.clone(), vertex: vertex.clone(), started: false };
        if state.begun {
            looker.start();
            state.told.iter().for_each(|event| looker.tell(event));
        }
        state.lookers.push(looker);
        Looking { audience: self, id }
    }

    /// Says that work begins. Who comes from now on is not told what an earlier attempt told.
    pub(super) fn begin(&self) {
        let mut state = self.state();
        state.begun = true;
        state.told.clear();
        state.kept = 0;
        state.lookers.iter_mut().for_each(Looker::start);
    }
}

impl ProgressSink for Audience {
    fn send(&self, event: ProgressEvent) {
        let mut state = self.state();
        state.lookers.iter().for_each(|looker| looker.tell(&event));
        match &event {
            ProgressEvent::Log { data, .. } if state.kept < KEPT_OUTPUT => {
                state.kept += data.len();
                state.told.push(event);
            }
            ProgressEvent::Status { id, .. } => {
                let same = |told: &ProgressEvent| matches!(told, ProgressEvent::Status { id: known, .. } if known == id);
                match state.told.iter().position(same) {
                    Some(at) => state.told[at] = event,
                    None => state.told.push(event),
                }
            }
            _ => {}
        }
    }
}

impl Looker {
    fn start(&mut self) {
        if self.started {
            return;
        }
        self.started = true;
        self.vertex.announced.store(true, Ordering::Relaxed);
        self.progress.send(ProgressEvent::Started {
            vertex: self.vertex.digest.clone(),
            name: self.vertex.name.clone(),
        });
    }

    fn tell(&self, event: &ProgressEvent) {
        let mut event = event.clone();
        match &mut event {
            ProgressEvent::Log { vertex, .. } | ProgressEvent::Status { vertex, .. } => {
                *vertex = Digest::clone(&self.vertex.digest);
            }
            // Beginning and end are each build's own.
            _ => return,
        }
        self.progress.send(event);
    }
}

impl Looking<'_> {
    fn leave(&self) -> Option<Looker> {
        let mut state = self.audience.state();
        let at = state.lookers.iter().position(|looker| looker.id == self.id)?;
        Some(state.lookers.swap_remove(at))
    }

    /// Ends looking, and returns whether the build was told that work began: then it has to be told how it ended.
    pub(super) fn end(self) -> bool {
        self.leave().is_some_and(|looker| looker.started)
    }
}

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        if let Some(looker) = self.leave().filter(|looker| looker.started) {
            let vertex = looker.vertex.digest.clone();
            looker.progress.send(ProgressEvent::Canceled { vertex });
        }
    }
}
