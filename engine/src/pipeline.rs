//! The build told as one function: Dockerfile to graph, graph to snapshots, snapshots to whatever was asked for.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::try_join_all;
use slipway_exporter::files::{self, Files};
use slipway_exporter::image::response;
use slipway_exporter::{Assembled, ImageOptions, PlatformResult, assemble};
use slipway_frontend::{FrontendResult, PlatformImage};
use slipway_solver::LocalFolders;
use slipway_solver::graph::Edge;
use slipway_spec::progress::ProgressSink;
use slipway_spec::{Descriptor, Platform};
use slipway_store::blocking;
use slipway_store::layout::ArchiveImage;
use slipway_store::snapshot::Snapshot;
use slipway_store::transfer::{self, Outcome};

use crate::build::{Build, BuildClient};
use crate::cache::{CachePlace, LocalCaches};
use crate::error::BuildError;
use crate::provenance::{self, Asked, Origin, ProvenanceOptions, Scope};
use crate::request::{BuildRequest, BuildResult, Export, memory};
use crate::task::Task;
use crate::{Engine, attest};

impl Engine {
    /// Builds. Dropping the future stops everything the build does.
    ///
    /// # Errors
    /// The first thing that failed; what was finished before stays in the cache.
    pub async fn build(
        &self,
        request: BuildRequest,
        progress: Arc<dyn ProgressSink>,
    ) -> Result<BuildResult, BuildError> {
        let memory = memory(self.store().root());
        let files = LocalFolders::new(request.folders, Some(memory))
            .with_files(request.files)
            .with_ahead(request.ahead);
        let client = BuildClient {
            files: Arc::new(files),
            services: request.services,
            credentials: None,
            // Where it is no number, the frontend finds out what is meant.
            epoch: request.attrs.get("build-arg:SOURCE_DATE_EPOCH").and_then(|t| t.parse().ok()),
            frontends: None,
            caches: Arc::new(LocalCaches),
            asked: Asked::new("dockerfile.v0", &request.attrs, &BTreeMap::new()),
            id: request.id,
        };
        let wanted = attest::parse(&request.attrs)?;
        let provenance = wanted.provenance.as_ref().map(ProvenanceOptions::parse).transpose()?;
        let build = self.begin(client, progress)?;
        let found = build.dockerfile(request.attrs, BTreeMap::new(), 0, build.scope()).await?;
        let (mut graphs, scope) = found;
        if graphs.images.is_empty() && !graphs.metadata.is_empty() {
            return Ok(BuildResult { answer: graphs.metadata, ..BuildResult::default() });
        }
        if let Some(sbom) = &wanted.sbom {
            build.scan_unscanned(sbom, &mut graphs).await?;
        }
        let used = !request.exports.is_empty();
        let (mut results, edges) = solve(&build, &graphs, used, &scope).await?;
        if let Some(options) = &provenance {
            let origin = |(image, edge): (&PlatformImage, &Option<Edge>)| Origin {
                platform: image.platform.clone(),
                edge: edge.clone(),
                definition: image.definition.clone(),
            };
            let origins: Vec<_> = graphs.images.iter().zip(&edges).map(origin).collect();
            let found = build.provenance(&origins, graphs.multi_platform).await?;
            provenance::attest(&found, options, &mut results)?;
        }
        if request.cache_exports.iter().any(|export| export.place == CachePlace::Inline) {
            build.add_inline_caches(&mut results, &edges).await?;
        }

        // Folders reach the disk while outputs are made of them.
        let outputs = async {
            let mut result = BuildResult::default();
            for export in request.exports {
                build.export(&results, graphs.multi_platform, export, &mut result).await?;
            }
            let edges: Vec<Edge> = edges.into_iter().flatten().collect();
            for export in &request.cache_exports {
                result.cache = build.export_cache(&edges, export).await?.or(result.cache);
            }
            Ok::<_, BuildError>(result)
        };
        let (durable, outputs) = futures::join!(build.settle(), outputs);
        let outputs = outputs?;
        durable?;
        Ok(outputs)
    }
}

impl Build {
    /// Makes one output of results, and adds to what is known of them.
    ///
    /// # Errors
    /// When the output cannot be made.
    pub async fn export(
        &self,
        results: &[PlatformResult],
        multi_platform: bool,
        export: Export,
        result: &mut BuildResult,
    ) -> Result<(), BuildError> {
        // Base layers that no step needed are fetched only now.
        self.provide(results).await?;
        let (store, progress, epoch) = (self.engine().store(), self.progress(), self.epoch());
        match export {
            Export::Image(options) => {
                let vertex = Task::start(progress, "exporting to image");
                let exported = self.export_image(results, multi_platform, &options, &vertex).await;
                let assembled = vertex.end(exported)?;
                result.note(&assembled, &options);
                if options.push || options.push_by_digest {
                    self.push(&assembled, &options).await?;
                }
            }
            Export::Archive { mut options, docker, mut sink } => {
                if docker && results.len() > 1 {
                    return Err(BuildError::Invalid(
                        "docker exporter does not support exporting manifest lists; \
                         build one platform, or use type=oci"
                            .into(),
                    ));
                }
                // What belongs into images alone is no reason for an index here.
                options.attestation_inline.get_or_insert(false);
                let form = if docker { "docker" } else { "oci" };
                let vertex = Task::start(progress, &format!("exporting to {form} image format"));
                let written = async {
                    let index = multi_platform && !docker;
                    let assembled = assemble(store, results, index, &options, epoch).await?;
                    tell(&vertex, &assembled);
                    let names: Vec<String> =
                        options.names.iter().map(ToString::to_string).collect();
                    sink.describe(&response(&assembled, &names));
                    let image = ArchiveImage { names, target: assembled.target.clone() };
                    files::archive(store, vec![image], &Platform::host(), sink).await?;
                    vertex.status("sending tarball");
                    Ok(assembled)
                };
                let written = written.await;
                let assembled = vertex.end(written)?;
                result.note(&assembled, &options);
            }
            Export::Local { folder, options } => {
                let vertex = Task::start(progress, "exporting to client directory");
                let files = Files { results, multi_platform, options: &options, epoch };
                let written = files::local(store, files, &folder).await;
                vertex.end(written.map_err(BuildError::from))?;
            }
            Export::Tar { options, sink } => {
                let vertex = Task::start(progress, "exporting to client tarball");
                let files = Files { results, multi_platform, options: &options, epoch };
                let written = files::tar(store, files, sink).await;
                if written.is_ok() {
                    vertex.status("sending tarball");
                }
                vertex.end(written.map_err(BuildError::from))?;
            }
        }
        Ok(())
    }

    async fn export_image(
        &self,
        results: &[PlatformResult],
        multi_platform: bool,
        options: &ImageOptions,
        vertex: &Task,
    ) -> Result<Assembled, BuildError> {
        let store = self.engine().store();
        let assembled = assemble(store, results, multi_platform, options, self.epoch()).await?;
        tell(vertex, &assembled);
        if options.keep == Some(false) {
            return Ok(assembled);
        }
        let names = match options.names.as_slice() {
            [] => vec![files::nameless(&assembled.target.digest)],
            names => names.iter().map(ToString::to_string).collect(),
        };
        for name in &names {
            vertex.status(&format!("naming to {name}"));
        }
        let (store, target) = (store.clone(), assembled.target.clone());
        blocking::run(move || store.name_image(&names, &target)).await?;
        Ok(assembled)
    }

    async fn push(&self, assembled: &Assembled, options: &ImageOptions) -> Result<(), BuildError> {
        let engine = self.engine();
        let registry = if options.insecure {
            engine.insecure_registry(&options.names)?
        } else {
            engine.registry().clone()
        };
        for name in &options.names {
            let vertex = Task::start(self.progress(), &format!("pushing {name}"));
            let reference = if options.push_by_digest {
                name.with_digest(assembled.target.digest.clone())
            } else {
                name.clone()
            };
            let report = |descriptor: &Descriptor, current: u64, outcome: Outcome| {
                vertex.moved(
                    &descriptor.digest.to_string(),
                    current,
                    descriptor.size,
                    outcome != Outcome::Moving,
                );
            };
            let pushed =
                transfer::push(engine.store(), &registry, &reference, &assembled.target, &report)
                    .await;
            if pushed.is_ok() {
                vertex.status(&format!("pushing manifest for {name}@{}", assembled.target.digest));
            }
            vertex.end(pushed.map_err(BuildError::from))?;
        }
        Ok(())
    }
}

/// Solves all platforms at once; what they share is solved once. What something is to be made of is fetched where a cache
/// has it elsewhere. Returns also what each result came out of.
async fn solve(
    build: &Build,
    graphs: &FrontendResult,
    used: bool,
    scope: &Scope,
) -> Result<(Vec<PlatformResult>, Vec<Option<Edge>>), BuildError> {
    let one = |image: &slipway_frontend::PlatformImage| {
        let image = image.clone();
        async move {
            let edge = match &image.definition {
                Some(definition) => Some(build.load(definition).await?),
                None => None,
            };
            edge.iter().for_each(|edge| scope.add_result(edge));
            let snapshot = async {
                Ok::<_, BuildError>(match &edge {
                    Some(edge) if used => build.obtain(edge).await?,
                    Some(edge) => build.solve(edge).await?,
                    None => Snapshot::default(),
                })
            };
            let (snapshot, attestations) =
                futures::try_join!(snapshot, build.attested(image.attestations))?;
            let result = PlatformResult {
                platform: image.platform,
                snapshot,
                config: image.config,
                base_history: image.base_history_len,
                epoch: image.epoch,
                inline_cache: None,
                attestations,
            };
            Ok::<_, BuildError>((result, edge))
        }
    };
    Ok(try_join_all(graphs.images.iter().map(one)).await?.into_iter().unzip())
}

/// Tells what an image consists of.
pub fn tell(task: &Task, assembled: &Assembled) {
    task.status("exporting layers");
    for (kind, digest) in &assembled.written {
        task.status(&format!("exporting {kind} {digest}"));
    }
}

/// Reads `SOURCE_DATE_EPOCH`, seconds since 1970; no text is the same as none.
///
/// # Errors
/// [`BuildError::Invalid`] when it is no number.
pub fn source_date_epoch(text: Option<&String>) -> Result<Option<i64>, BuildError> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| {
        BuildError::Invalid(format!(
            "invalid SOURCE_DATE_EPOCH {text:?}: expected seconds since 1970"
        ))
    })
}
