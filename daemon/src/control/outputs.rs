//! What is made of a build's result, and how it reaches the client.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use slipway_engine::exporter::image::response;
use slipway_engine::exporter::{Assembled, ExportError, FileOptions, ImageOptions, PlatformResult};
use slipway_engine::store::blocking;
use slipway_engine::{Build, BuildError, BuildResult, Export, Task, source_date_epoch};
use slipway_spec::flag;
use slipway_spec::wire::control::{Exporter, SolveRequest};
use tonic::Status;

use super::layout;
use crate::failure::build_status;
use crate::history::Recording;
use crate::session::SessionGroup;
use crate::session::file_send::{
    ExportTree, FolderTarget, SessionSink, export_tree, send_tree, told,
};
use crate::session::file_sync::TransferProgress;

/// Where outputs come from and go to.
pub(super) struct Target<'a> {
    pub(super) build: &'a Build,
    pub(super) sessions: &'a SessionGroup,
    pub(super) recording: Option<&'a Recording>,
    /// What the frontend says of the result.
    pub(super) metadata: &'a BTreeMap<String, Bytes>,
}

/// Returns the time of what a build makes, in seconds since 1970, where the client sets it.
pub(super) fn epoch(request: &SolveRequest) -> Result<Option<i64>, Status> {
    // Where the argument is no number, the frontend finds out what is meant.
    let argument = request.frontend_attrs.get("build-arg:SOURCE_DATE_EPOCH");
    let argument = argument.filter(|text| text.parse::<i64>().is_ok());
    let attribute = request.exporters.iter().find_map(|e| e.attrs.get("source-date-epoch"));
    source_date_epoch(attribute.or(argument)).map_err(|error| {
        // What a client gave, not what a build met.
        Status::invalid_argument(error.to_string())
    })
}

/// Refuses outputs that nothing here makes, before anything is built for them.
pub(super) fn check(exporters: &[Exporter]) -> Result<(), Status> {
    let known = ["image", "oci", "docker", "tar", "local"];
    match exporters.iter().find(|exporter| !known.contains(&exporter.r#type.as_str())) {
        Some(Exporter { r#type: kind, .. }) => {
            Err(Status::unknown(format!("exporter {kind:?} could not be found")))
        }
        None => Ok(()),
    }
}

/// Makes all outputs; returns what the client is told of them.
pub(super) async fn export(
    target: &Target<'_>,
    results: &[PlatformResult],
    multi_platform: bool,
    exporters: &[Exporter],
) -> Result<BTreeMap<String, String>, Status> {
    let mut response = BTreeMap::new();
    for (at, exporter) in exporters.iter().enumerate() {
        let mut attrs = exporter.attrs.clone();
        // Clients keep these to themselves, or they were read already.
        for name in
            ["dest", "context", "source-date-epoch", "prefer-image-digest", "buildinfo-attrs"]
        {
            attrs.remove(name);
        }
        if ["image", "oci", "docker"].contains(&exporter.r#type.as_str()) {
            target.complete(&mut attrs);
        }
        let mut result = BuildResult::default();
        match exporter.r#type.as_str() {
            "image" => {
                let mut options = image_options(&attrs)?;
                // What was pushed, or has no name, no client will ask this daemon for; to keep it under a name would keep it
                // for ever.
                let pushed = options.push || options.push_by_digest;
                options.keep.get_or_insert(!pushed && !options.names.is_empty());
                let export = Export::Image(options);
                target.make(results, multi_platform, export, &mut result).await?;
            }
            kind @ ("oci" | "docker") => {
                let archive = flag(&attrs, "tar")?.unwrap_or(true);
                attrs.remove("tar");
                let mut options = image_options(&attrs)?;
                // An OCI archive has OCI media types, unless others are asked for.
                if !attrs.contains_key("oci-mediatypes") {
                    options.blobs.docker &= kind == "docker";
                }
                // What belongs into images alone is no reason for an index here.
                options.attestation_inline.get_or_insert(false);
                let docker = kind == "docker";
                if archive {
                    let sink = target.sink(at, &response).await?;
                    let export = Export::Archive { options, docker, sink };
                    target.make(results, multi_platform, export, &mut result).await?;
                } else {
                    let how = (&options, docker);
                    layout::export(target, results, multi_platform, how, &mut result).await?;
                }
            }
            "tar" => {
                let options = file_options(&attrs)?;
                let sink = target.sink(at, &response).await?;
                let export = Export::Tar { options, sink };
                target.make(results, multi_platform, export, &mut result).await?;
            }
            "local" => {
                let options = file_options(&attrs)?;
                let split = options.split.unwrap_or(multi_platform);
                let tree = ExportTree {
                    split,
                    platform_names: multi_platform && !split,
                    attestation_prefix: options.attestation_prefix,
                    epoch: target.build.epoch(),
                };
                let whole = attrs.get("mode").is_some_and(|mode| mode == "delete");
                target.folder(results, tree, whole, at).await?;
            }
            other => {
                return Err(Status::unknown(format!("exporter {other:?} could not be found")));
            }
        }
        if let (Some(recording), Some(made)) = (target.recording, &result.image) {
            recording.exported(at, made);
        }
        response.extend(describe(&result));
    }
    Ok(response)
}

impl Target<'_> {
    /// Adds what the frontend says of an image, where the client leaves that open.
    fn complete(&self, attrs: &mut BTreeMap<String, String>) {
        let text = |value: &Bytes| String::from_utf8_lossy(value).into_owned();
        if let Some(name) = self.metadata.get("image.name")
            && attrs.get("name").is_some_and(|asked| asked == "*")
        {
            attrs.insert("name".into(), text(name));
        }
        for (key, value) in self.metadata.iter().filter(|(key, _)| key.starts_with("annotation")) {
            attrs.entry(key.clone()).or_insert_with(|| text(value));
        }
    }

    async fn make(
        &self,
        results: &[PlatformResult],
        multi_platform: bool,
        export: Export,
        result: &mut BuildResult,
    ) -> Result<(), Status> {
        let made = self.build.export(results, multi_platform, export, result).await;
        made.map_err(|error| build_status(&error))
    }

    async fn sink(
        &self,
        exporter: usize,
        known: &BTreeMap<String, String>,
    ) -> Result<Box<SessionSink>, Status> {
        let session = self.sessions.first().await.map_err(no_session)?;
        Ok(Box::new(SessionSink::new(session, exporter, known.clone())))
    }

    async fn folder(
        &self,
        results: &[PlatformResult],
        options: ExportTree,
        whole: bool,
        exporter: usize,
    ) -> Result<(), Status> {
        let session = self.sessions.first().await.map_err(no_session)?;
        self.build.provide(results).await.map_err(|error| build_status(&error))?;
        let (store, all) = (self.build.engine().store().clone(), results.to_vec());
        let tree = blocking::run(move || Ok(export_tree(&store, &all, &options))).await;
        let tree = tree.map_err(BuildError::from).and_then(|tree| {
            tree.map_err(|error| match error {
                ExportError::Invalid(text) => BuildError::Invalid(text),
                ExportError::Store(error) => error.into(),
                other => other.into(),
            })
        });
        let tree = tree.map_err(|error| build_status(&error))?;

        let task = Arc::new(Task::start(self.build.progress(), "exporting to client directory"));
        let told = task.clone();
        let progress: TransferProgress =
            Arc::new(move |status| told.moved(status.id, status.bytes, 0, status.done));
        let target = FolderTarget { exporter, whole, label: "copying files".into() };
        let sent = send_tree(&session, &target, Arc::new(tree), &progress).await;
        task.end(sent.map_err(BuildError::from)).map_err(|error| build_status(&error))
    }
}

pub(super) fn no_session(error: crate::session::SessionError) -> Status {
    Status::unavailable(error.to_string())
}

fn image_options(attrs: &BTreeMap<String, String>) -> Result<ImageOptions, Status> {
    ImageOptions::parse(attrs).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn file_options(attrs: &BTreeMap<String, String>) -> Result<FileOptions, Status> {
    Ok(FileOptions {
        split: flag(attrs, "platform-split")?,
        attestation_prefix: attrs.get("attestation-prefix").cloned().unwrap_or_default(),
    })
}

fn flag(attrs: &BTreeMap<String, String>, name: &str) -> Result<Option<bool>, Status> {
    let Some(text) = attrs.get(name) else { return Ok(None) };
    if text.is_empty() {
        return Ok(Some(true));
    }
    let wrong = || Status::invalid_argument(format!("{name}: {text:?} is neither true nor false"));
    flag::parse(text).map(Some).ok_or_else(wrong)
}

/// What clients are told of an image, under BuildKit's names.
fn describe(result: &BuildResult) -> BTreeMap<String, String> {
    let Some(target) = result.image.clone() else { return BTreeMap::new() };
    let assembled = Assembled { target, config: result.config.clone(), written: vec![] };
    let known = response(&assembled, &result.names);
    known.iter().map(|(key, value)| (key.clone(), told(value))).collect()
}
