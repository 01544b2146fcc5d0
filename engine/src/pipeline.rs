//! The build told as one function: Dockerfile to graph, graph to snapshots, snapshots to whatever was asked for.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use futures::future::try_join_all;
use slipway_exporter::{Assembled, ImageOptions, PlatformResult, assemble, files};
use slipway_frontend::{FrontendRequest, FrontendResult, dockerfile};
use slipway_solver::{Job, LocalFolders};
use slipway_spec::progress::{ProgressEvent, ProgressSink};
use slipway_spec::{Digest, Platform};
use slipway_store::blocking;
use slipway_store::layout::ArchiveImage;
use slipway_store::snapshot::Snapshot;
use slipway_store::transfer::{self, Outcome};

use crate::Engine;
use crate::bridge::JobBridge;
use crate::error::BuildError;
use crate::request::{BuildRequest, BuildResult, Export};

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
        let memory = self.store().root().join("digests");
        let client =
            Arc::new(LocalFolders::new(request.folders, Some(memory)).with_files(request.files));
        let epoch = source_date_epoch(&request.attrs)?;
        let time = epoch.map(|seconds| seconds.saturating_mul(1_000_000_000));
        let job = Job::with(self.worker.clone(), client, progress.clone(), time, request.services);

        let frontend_request =
            FrontendRequest { attrs: request.attrs, build_platform: Platform::host() };
        let bridge = JobBridge::new(job.clone(), progress.clone());
        let graphs = dockerfile::build(&frontend_request, &bridge).await?;
        if !graphs.metadata.is_empty() {
            return Ok(BuildResult { answer: graphs.metadata, ..BuildResult::default() });
        }
        let results = solve(&job, &graphs).await?;

        // Folders reach the disk while outputs are made of them.
        let store = self.store().clone();
        let durable = blocking::run(move || store.sync_layers());
        let outputs = async {
            let mut result = BuildResult::default();
            for export in request.exports {
                self.export(
                    &job,
                    &results,
                    graphs.multi_platform,
                    epoch,
                    export,
                    &progress,
                    &mut result,
                )
                .await?;
            }
            Ok::<_, BuildError>(result)
        };
        let (durable, outputs) = futures::join!(durable, outputs);
        let outputs = outputs?;
        durable?;
        Ok(outputs)
    }

    #[expect(clippy::too_many_arguments, reason = "one call, one place")]
    pub(crate) async fn export(
        &self,
        job: &Job,
        results: &[PlatformResult],
        multi_platform: bool,
        epoch: Option<i64>,
        export: Export,
        progress: &Arc<dyn ProgressSink>,
        result: &mut BuildResult,
    ) -> Result<(), BuildError> {
        // Base layers that no step needed are fetched only now.
        try_join_all(results.iter().map(|result| job.provide(&result.snapshot))).await?;
        let split = |wanted: Option<bool>| wanted.unwrap_or(multi_platform);
        match export {
            Export::Image(options) => {
                let vertex = Vertex::start(progress, "exporting to image");
                let exported =
                    self.export_image(results, multi_platform, epoch, &options, &vertex).await;
                let assembled = vertex.end(exported)?;
                note(result, &assembled, &options);
                if options.push || options.push_by_digest {
                    self.push(&assembled, &options, progress).await?;
                }
            }
            Export::Archive { options, docker, sink } => {
                if docker && results.len() > 1 {
                    return Err(BuildError::Invalid(
                        "docker exporter does not support exporting manifest lists; \
                         build one platform, or use type=oci"
                            .into(),
                    ));
                }
                let form = if docker { "docker" } else { "oci" };
                let vertex = Vertex::start(progress, &format!("exporting to {form} image format"));
                let written = async {
                    let index = multi_platform && !docker;
                    let assembled = assemble(self.store(), results, index, &options, epoch).await?;
                    vertex.status(&format!("exporting manifest {}", assembled.target.digest));
                    let names = options.names.iter().map(ToString::to_string).collect();
                    let image = ArchiveImage { names, target: assembled.target.clone() };
                    files::archive(self.store(), vec![image], &Platform::host(), sink).await?;
                    vertex.status("sending tarball");
                    Ok(assembled)
                };
                let written = written.await;
                let assembled = vertex.end(written)?;
                note(result, &assembled, &options);
            }
            Export::Local { folder, split: wanted } => {
                let vertex = Vertex::start(progress, "exporting to client directory");
                let written = files::local(self.store(), results, split(wanted), &folder).await;
                vertex.end(written.map_err(BuildError::from))?;
            }
            Export::Tar { split: wanted, sink } => {
                let vertex = Vertex::start(progress, "exporting to client tarball");
                let written = files::tar(self.store(), results, split(wanted), sink).await;
                vertex.end(written.map_err(BuildError::from))?;
            }
        }
        Ok(())
    }

    async fn export_image(
        &self,
        results: &[PlatformResult],
        multi_platform: bool,
        epoch: Option<i64>,
        options: &ImageOptions,
        vertex: &Vertex,
    ) -> Result<Assembled, BuildError> {
        let assembled = assemble(self.store(), results, multi_platform, options, epoch).await?;
        vertex.status("exporting layers");
        let kind =
            if assembled.target.media_type.is_index() { "manifest list" } else { "manifest" };
        vertex.status(&format!("exporting {kind} {}", assembled.target.digest));
        if let Some(config) = &assembled.config {
            vertex.status(&format!("exporting config {}", config.digest));
        }
        let names = match options.names.as_slice() {
            [] => vec![files::nameless(&assembled.target.digest)],
            names => names.iter().map(ToString::to_string).collect(),
        };
        for name in &names {
            vertex.status(&format!("naming to {name}"));
        }
        let (store, target) = (self.store().clone(), assembled.target.clone());
        blocking::run(move || store.name_image(&names, &target)).await?;
        Ok(assembled)
    }

    async fn push(
        &self,
        assembled: &Assembled,
        options: &ImageOptions,
        progress: &Arc<dyn ProgressSink>,
    ) -> Result<(), BuildError> {
        let registry = if options.insecure {
            self.insecure_registry(&options.names)?
        } else {
            self.registry().clone()
        };
        for name in &options.names {
            let vertex = Vertex::start(progress, &format!("pushing {name}"));
            let reference = if options.push_by_digest {
                name.with_digest(assembled.target.digest.clone())
            } else {
                name.clone()
            };
            let report = |descriptor: &slipway_spec::Descriptor, current: u64, outcome: Outcome| {
                vertex.moved(
                    &descriptor.digest.to_string(),
                    current,
                    descriptor.size,
                    outcome != Outcome::Moving,
                );
            };
            let pushed =
                transfer::push(self.store(), &registry, &reference, &assembled.target, &report)
                    .await;
            if pushed.is_ok() {
                vertex.status(&format!("pushing manifest for {name}@{}", assembled.target.digest));
            }
            vertex.end(pushed.map_err(BuildError::from))?;
        }
        Ok(())
    }
}

/// Solves all platforms at once; what they share is solved once.
async fn solve(job: &Job, graphs: &FrontendResult) -> Result<Vec<PlatformResult>, BuildError> {
    let one = |image: &slipway_frontend::PlatformImage| {
        let image = image.clone();
        async move {
            let snapshot = match &image.definition {
                Some(definition) => job.solve(&job.load(definition)?).await?,
                None => Snapshot::default(),
            };
            Ok::<_, BuildError>(PlatformResult {
                platform: image.platform,
                snapshot,
                config: image.config,
                base_history: image.base_history_len,
            })
        }
    };
    try_join_all(graphs.images.iter().map(one)).await
}

fn note(result: &mut BuildResult, assembled: &Assembled, options: &ImageOptions) {
    result.image = Some(assembled.target.clone());
    result.config = assembled.config.clone();
    result.names = options.names.iter().map(ToString::to_string).collect();
}

fn source_date_epoch(
    attrs: &std::collections::BTreeMap<String, String>,
) -> Result<Option<i64>, BuildError> {
    let Some(text) = attrs.get("build-arg:SOURCE_DATE_EPOCH").filter(|text| !text.is_empty())
    else {
        return Ok(None);
    };
    text.parse().map(Some).map_err(|_| {
        BuildError::Invalid(format!(
            "invalid SOURCE_DATE_EPOCH {text:?}: expected seconds since 1970"
        ))
    })
}

/// Work that is not part of the graph, shown like a step.
struct Vertex {
    progress: Arc<dyn ProgressSink>,
    digest: Digest,
    ended: std::sync::atomic::AtomicBool,
}

impl Vertex {
    fn start(progress: &Arc<dyn ProgressSink>, name: &str) -> Self {
        // Two outputs may have the same name; they are different work.
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let digest = Digest::of(format!("{name} {number}").as_bytes());
        progress.send(ProgressEvent::Started { vertex: digest.clone(), name: name.into() });
        Self { progress: progress.clone(), digest, ended: false.into() }
    }

    fn status(&self, id: &str) {
        self.moved(id, 0, 0, true);
    }

    fn moved(&self, id: &str, current: u64, total: u64, done: bool) {
        self.progress.send(ProgressEvent::Status {
            vertex: self.digest.clone(),
            id: id.into(),
            current,
            total,
            done,
        });
    }

    fn end<T>(&self, result: Result<T, BuildError>) -> Result<T, BuildError> {
        self.ended.store(true, std::sync::atomic::Ordering::Relaxed);
        self.progress.send(match &result {
            Ok(_) => ProgressEvent::Done { vertex: self.digest.clone() },
            Err(error) => ProgressEvent::Failed {
                vertex: self.digest.clone(),
                error: error.to_string().into(),
            },
        });
        result
    }
}

impl Drop for Vertex {
    fn drop(&mut self) {
        if !self.ended.load(std::sync::atomic::Ordering::Relaxed) {
            self.progress.send(ProgressEvent::Canceled { vertex: self.digest.clone() });
        }
    }
}
