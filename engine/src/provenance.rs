//! Where results come from: what they were made of, and who asked for it.
//!
//! A build notes in its [`Scope`] what it is asked and which results it gives. When it has ended, [`Build::provenance`] walks the
//! graphs of these results and finds out what their sources were; from that and a [`ProvenanceOptions`] comes a predicate of
//! SLSA.

pub mod environment;
mod options;
mod predicate;
mod producers;
mod request;
mod scope;
mod steps;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use slipway_exporter::attestation::{Attestation, Content, MakePredicate};
use slipway_exporter::{ExportError, PlatformResult, Result as ExportResult};
use slipway_solver::graph::Edge;
use slipway_solver::materials::{ImageMaterial, Materials};
use slipway_spec::attestation::{INLINE_ONLY, REASON};
use slipway_spec::llb::Definition;
use slipway_spec::{Digest, Platform, timestamp};
use slipway_store::pack::BlobOptions;
use slipway_store::snapshot::Snapshot;
use slipway_store::{Store, now_nanos};

pub use self::options::{ProvenanceOptions, Slsa};
pub(crate) use self::producers::Producers;
pub use self::request::Asked;
use self::request::Request;
pub use self::scope::Scope;
use self::steps::Steps;
use crate::Build;
use crate::error::BuildError;

/// A result, and the graph that it came out of.
#[derive(Clone, Debug)]
pub struct Origin {
    /// The platform.
    pub platform: Platform,
    /// The result; `None` is the empty file system.
    pub edge: Option<Edge>,
    /// The graph.
    pub definition: Option<Definition>,
}

/// What is known of where one result comes from.
#[derive(Debug)]
pub struct Provenance {
    materials: Materials,
    request: Option<Request>,
    definition: Option<Definition>,
    /// What steps gave, by vertex and output.
    results: Vec<(Digest, usize, Snapshot)>,
    build: Invocation,
}

/// One build.
#[derive(Clone, Debug)]
pub(crate) struct Invocation {
    pub(crate) id: String,
    /// When it was begun, in nanoseconds since 1970.
    pub(crate) began: i64,
    /// What the administrator adds to all provenance.
    pub(crate) environment: Arc<Map<String, Value>>,
}

impl Build {
    /// Finds out where results come from, which must be solved. The empty file system comes from nowhere.
    ///
    /// # Errors
    /// When a source cannot be found any more.
    pub async fn provenance(
        &self,
        results: &[Origin],
        multi_platform: bool,
    ) -> Result<Vec<Option<Arc<Provenance>>>, BuildError> {
        let edges: Vec<&Edge> = results.iter().filter_map(|result| result.edge.as_ref()).collect();
        let platforms: Vec<&Platform> = results.iter().map(|result| &result.platform).collect();
        let mut found = vec![];
        for result in results {
            let Some(edge) = &result.edge else {
                found.push(None);
                continue;
            };
            let platform = multi_platform.then_some(&result.platform);
            let scope = self.scope().find(edge);
            let scope = scope.as_ref().unwrap_or_else(|| self.scope());
            // A request for the source of a graph, such as a Dockerfile, gave no part of the result and yet decided it.
            let mut others = scope.results();
            others.retain(|other| {
                other.is_used() && !edges.iter().any(|edge| scope::same(edge, other))
            });
            let mut materials = self.job().materials(std::iter::once(edge).chain(&others)).await?;
            let images = scope.images();
            let images = match platform {
                Some(platform) => of_platform(images, platform, &platforms),
                None => images,
            };
            images.into_iter().for_each(|image| materials.add_image(image));
            materials.sort();
            found.push(Some(Arc::new(Provenance {
                request: scope.request(&materials),
                materials,
                definition: result.definition.clone(),
                results: self.job().known_results(edge),
                build: self.invocation().clone(),
            })));
        }
        Ok(found)
    }
}

/// Says of results where they come from, as [`Build::provenance`] found out in the same order.
///
/// # Errors
/// [`BuildError::Invalid`] when something went in that is not told, and that is not allowed.
pub fn attest(
    found: &[Option<Arc<Provenance>>],
    options: &ProvenanceOptions,
    results: &mut [PlatformResult],
) -> Result<(), BuildError> {
    for (found, result) in found.iter().zip(results) {
        let Some(found) = found else { continue };
        found.check(options)?;
        result.attestations.push(found.attestation(options));
    }
    Ok(())
}

/// Leaves out images of other platforms, where an image was asked for on all of them.
fn of_platform(
    images: Vec<ImageMaterial>,
    platform: &Platform,
    platforms: &[&Platform],
) -> Vec<ImageMaterial> {
    let on = |reference: &str, wanted: &Platform| {
        images.iter().any(|image| {
            let is_same = |own: &Platform| own.normalized() == wanted.normalized();
            image.reference == reference && image.platform.as_ref().is_some_and(is_same)
        })
    };
    let is_everywhere =
        |image: &ImageMaterial| platforms.iter().all(|platform| on(&image.reference, platform));
    let fits = |image: &ImageMaterial| match &image.platform {
        Some(own) if is_everywhere(image) => {
            (&own.os, &own.architecture) == (&platform.os, &platform.architecture)
        }
        _ => true,
    };
    images.iter().filter(|image| fits(image)).cloned().collect()
}

impl Provenance {
    /// Says that something went in that is not told, where that is not allowed.
    ///
    /// # Errors
    /// [`BuildError::Invalid`] with what is missing.
    pub fn check(&self, options: &ProvenanceOptions) -> Result<(), BuildError> {
        if !options.complete_materials || predicate::is_complete(&self.materials) {
            return Ok(());
        }
        let mut text = "provenance materials are incomplete\n\nThe build requested complete provenance materials, but not \
                        all dependencies could be captured."
            .to_owned();
        if !self.materials.locals.is_empty() {
            text.push_str("\n\nUncaptured local sources:");
            for name in &self.materials.locals {
                text.push_str(&format!("\n  - {name}\n    reason: local_source"));
            }
        }
        Err(BuildError::Invalid(text))
    }

    /// Writes what is known, as of now. Blocks.
    ///
    /// # Errors
    /// When the store fails, or the graph is not well formed.
    pub fn predicate(&self, store: &Store, options: &ProvenanceOptions) -> ExportResult<Vec<u8>> {
        let broken = |error: slipway_spec::llb::DefinitionError| {
            ExportError::Invalid(format!("the graph of a result cannot be told: {error}"))
        };
        let definition = self.definition.as_ref().filter(|_| options.full);
        let mut build_config = None;
        let (mut source, mut layers) = (None, Map::new());
        if let Some(definition) = definition {
            let steps = Steps::of(definition).map_err(broken)?;
            let mut told = Map::new();
            steps.tell(&mut told);
            build_config = Some(told);
            if let Some(written) = &definition.source {
                source = steps.source(written).map_err(broken)?;
            }
            layers = self.layers(store, &steps)?;
        }
        let facts = predicate::Facts {
            materials: &self.materials,
            request: self.request.as_ref(),
            invocation: &self.build.id,
            times: (timestamp::format(self.build.began), timestamp::format(now_nanos())),
            build_config,
            source,
            layers,
            environment: &self.build.environment,
        };
        let told = predicate::predicate(facts, options);
        serde_json::to_vec_pretty(&told).map_err(|error| ExportError::Invalid(error.to_string()))
    }

    /// Lists the blobs of what steps gave, as far as there are blobs.
    fn layers(&self, store: &Store, steps: &Steps) -> ExportResult<Map<String, Value>> {
        let mut told = Map::new();
        for (vertex, output, snapshot) in &self.results {
            let Some(step) = steps.name(vertex) else { continue };
            let mut blobs = vec![];
            for layer in &snapshot.layers {
                match store.blob_at_hand(*layer, &BlobOptions::default())? {
                    Some(blob) => blobs.push(blob.descriptor),
                    None => break,
                }
            }
            if !blobs.is_empty() && blobs.len() == snapshot.layers.len() {
                told.insert(format!("{step}:{output}"), json!([blobs]));
            }
        }
        Ok(told)
    }

    /// Returns it as something to be said of the result.
    pub fn attestation(self: &Arc<Self>, options: &ProvenanceOptions) -> Attestation {
        let inline_only: &[u8] = if options.inline_only { b"true" } else { b"false" };
        let metadata = BTreeMap::from([
            (REASON.to_owned(), "provenance".into()),
            (INLINE_ONLY.to_owned(), inline_only.to_vec().into()),
        ]);
        let made = Made { provenance: self.clone(), options: options.clone() };
        Attestation {
            content: Content::Made(Arc::new(made)),
            predicate_type: options.version.predicate_type().into(),
            subjects: vec![],
            path: options.filename.clone(),
            metadata,
        }
    }
}

/// Provenance that is written when it is asked for.
struct Made {
    provenance: Arc<Provenance>,
    options: ProvenanceOptions,
}

impl fmt::Debug for Made {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Made").field("options", &self.options).finish_non_exhaustive()
    }
}

impl MakePredicate for Made {
    fn make(&self, store: &Store) -> ExportResult<Vec<u8>> {
        self.provenance.predicate(store, &self.options)
    }
}
