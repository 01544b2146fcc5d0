//! Who asked for which result: a build's client, or a frontend on its behalf.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use slipway_solver::graph::Edge;
use slipway_solver::materials::{ImageMaterial, Materials};
use slipway_solver::source::metadata::{MetadataRequest, SourceMetadata};

use super::producers::{Produced, Producers};
use super::request::{Asked, Request};

/// What was done for one frontend, or for the client where none is asked.
#[derive(Debug)]
pub struct Scope {
    /// What the frontend was asked; nothing where the client decides by itself what to solve.
    asked: Option<Asked>,
    /// What the whole build was asked.
    root: Option<Arc<Asked>>,
    producers: Producers,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Images that were asked for, whether something came of them or not.
    images: Vec<ImageMaterial>,
    results: Vec<Edge>,
    /// What other frontends were asked on the way.
    inner: Vec<Arc<Scope>>,
    produced: Vec<Produced>,
}

impl Scope {
    /// Makes that of a whole build, and says what it was asked.
    pub(crate) fn of_build(asked: Asked, producers: Producers) -> Arc<Self> {
        let root = (!asked.is_empty()).then(|| Arc::new(asked));
        Arc::new(Self { asked: None, root, producers, state: Mutex::default() })
    }

    /// Makes that of a frontend which is asked on the way.
    #[must_use]
    pub fn within(&self, asked: Asked) -> Arc<Self> {
        let own = || self.asked.clone().filter(|own| !own.is_empty()).map(Arc::new);
        let scope = Arc::new(Self {
            asked: Some(asked),
            root: self.root.clone().or_else(own),
            producers: self.producers.clone(),
            state: Mutex::default(),
        });
        self.lock().inner.push(scope.clone());
        scope
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a result.
    pub fn add_result(&self, edge: &Edge) {
        self.lock().results.push(edge.clone());
    }

    /// Notes what was found out about a source.
    pub fn add_metadata(&self, request: &MetadataRequest, found: &SourceMetadata) {
        let Some(image) = &found.image else { return };
        let identifier = request.source.identifier.as_str();
        let (scheme, reference) = identifier.split_once("://").unwrap_or(("", identifier));
        let image = ImageMaterial {
            reference: reference.to_owned(),
            platform: request.platform.clone(),
            digest: image.digest.clone(),
            local: scheme != "docker-image",
        };
        self.lock().images.push(image);
    }

    /// Lets other builds know, while this one runs, what a graph that clients are given came from.
    pub fn publish(&self, edge: &Edge) {
        let inner = self.find(edge);
        let scope = inner.as_deref().unwrap_or(self);
        let Some(request) = scope.request(&Materials::default()) else { return };
        let produced = self.producers.add(edge.vertex.digest.clone(), request);
        self.lock().produced.push(produced);
    }

    /// Finds what a result was made for, the innermost first.
    pub(crate) fn find(&self, edge: &Edge) -> Option<Arc<Self>> {
        self.lock().inner.iter().find_map(|scope| {
            let here = || scope.has(edge).then(|| scope.clone());
            scope.find(edge).or_else(here)
        })
    }

    fn has(&self, edge: &Edge) -> bool {
        self.lock().results.iter().any(|known| same(known, edge))
    }

    /// Returns all results that were made here and on the way.
    pub(crate) fn results(&self) -> Vec<Edge> {
        let state = self.lock();
        let inner = state.inner.iter().flat_map(|scope| scope.results());
        state.results.iter().cloned().chain(inner).collect()
    }

    /// Returns all images that were asked for, here and on the way.
    pub(crate) fn images(&self) -> Vec<ImageMaterial> {
        let state = self.lock();
        let inner = state.inner.iter().flat_map(|scope| scope.images());
        state.images.iter().cloned().chain(inner).collect()
    }

    /// Describes what was asked for a result that is made from `materials`; `None` where nobody was asked.
    pub(crate) fn request(&self, materials: &Materials) -> Option<Request> {
        let mut request = self.asked.as_ref()?.describe(materials, &self.producers);
        let root = self.root.as_ref().map(|root| root.describe(materials, &self.producers));
        let told = |root: &Request| {
            let asked = &root.request;
            !asked.frontend.is_empty() || !asked.args.is_empty() || !asked.inputs.is_empty()
        };
        request.request.root = root.filter(|root| told(root) && *root != request).map(Box::new);
        Some(request)
    }
}

/// Whether two edges are one result.
pub(crate) fn same(a: &Edge, b: &Edge) -> bool {
    a.index == b.index && a.vertex.digest == b.vertex.digest
}
