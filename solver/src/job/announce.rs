//! What a build tells of its vertices: each begins and ends once, in one way.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use slipway_spec::Digest;
use slipway_spec::progress::{ProgressEvent, ProgressSink};

use super::Job;
use crate::error::{Result, SolveError};
use crate::graph::Vertex;

/// Says that a vertex was given up, unless it ended in another way.
pub(super) struct Announced<'a> {
    progress: &'a dyn ProgressSink,
    vertex: &'a Digest,
    ended: bool,
}

impl<'a> Announced<'a> {
    pub(super) fn new(progress: &'a dyn ProgressSink, vertex: &'a Digest) -> Self {
        Self { progress, vertex, ended: false }
    }

    /// Says that a vertex begins.
    pub(super) fn begin(
        progress: &'a dyn ProgressSink,
        vertex: &'a Digest,
        name: Arc<str>,
    ) -> Self {
        progress.send(ProgressEvent::Started { vertex: vertex.clone(), name });
        Self::new(progress, vertex)
    }

    /// Says how it ended.
    pub(super) fn finish<T, E: Display>(self, outcome: &std::result::Result<T, E>) {
        let vertex = self.vertex.clone();
        self.end(match outcome {
            Ok(_) => ProgressEvent::Done { vertex },
            Err(error) => ProgressEvent::Failed { vertex, error: error.to_string().into() },
        });
    }

    pub(super) fn end(mut self, event: ProgressEvent) {
        self.ended = true;
        self.progress.send(event);
    }
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.progress.send(ProgressEvent::Canceled { vertex: self.vertex.clone() });
        }
    }
}

impl Job {
    pub(super) fn start<'a>(&'a self, vertex: &'a Vertex) -> Announced<'a> {
        vertex.announced.store(true, Ordering::Relaxed);
        Announced::begin(&*self.0.progress, &vertex.digest, vertex.name.clone())
    }

    #[expect(clippy::unused_self, reason = "the counterpart of start")]
    pub(super) fn end<T>(
        &self,
        vertex: &Vertex,
        announced: Announced<'_>,
        result: Result<T>,
    ) -> Result<T> {
        announced.finish(&result);
        result.map_err(|error| error.at(|| vertex.failed()))
    }

    /// A result from before stands for everything that led to it.
    pub(super) fn announce_cached(&self, vertex: &Arc<Vertex>) {
        let mut todo = vec![vertex.clone()];
        let mut order = vec![];
        while let Some(vertex) = todo.pop() {
            if !vertex.announced.swap(true, Ordering::Relaxed) {
                todo.extend(vertex.inputs.iter().map(|edge| edge.vertex.clone()));
                order.push(vertex);
            }
        }
        for vertex in order.into_iter().rev() {
            self.0.progress.send(ProgressEvent::Cached {
                vertex: vertex.digest.clone(),
                name: vertex.name.clone(),
            });
        }
    }

    /// Says that an error is this vertex's own unless one below is to blame, and shows it where nothing was shown yet.
    pub(super) fn blame(&self, vertex: &Vertex, error: SolveError) -> SolveError {
        // Where nobody wrote what failed, the step that needs it is where to look.
        let error = error.at(|| vertex.failed()).or_place(|| vertex.failed());
        let own = error.vertex.as_ref().is_some_and(|failed| failed.digest == vertex.digest);
        if own && !vertex.announced.swap(true, Ordering::Relaxed) {
            let (digest, name) = (vertex.digest.clone(), vertex.name.clone());
            self.0.progress.send(ProgressEvent::Started { vertex: digest.clone(), name });
            self.0
                .progress
                .send(ProgressEvent::Failed { vertex: digest, error: error.to_string().into() });
        }
        error
    }
}
