//! Sources from outside: the web, repositories, blobs, and the client's image layouts.

use std::sync::Arc;

use slipway_spec::Platform;
use slipway_spec::llb::pb;
use slipway_spec::progress::ProgressEvent;
use slipway_store::result::ResultKey;
use slipway_store::snapshot::Snapshot;
use slipway_store::{blocking, transfer};

use super::Job;
use crate::error::{Cause, Result};
use crate::graph::Vertex;
use crate::source::file::{BlobPlace, BlobSource, SingleFile};
use crate::source::layout::{self, LayoutImage};
use crate::source::{Found, Outside, outside};

impl Job {
    /// Returns what identifies a source; that may take asking, and downloading where nothing else tells.
    pub(super) async fn outside_key(
        &self,
        vertex: &Arc<Vertex>,
        source: &pb::SourceOp,
    ) -> Result<ResultKey> {
        let asked = outside(source)?;
        Ok(match (&*self.found(vertex, &asked).await?, &asked) {
            (Found::File(file), _) => file.key(),
            (Found::Git(commit), Outside::Git(git)) => git.key(commit),
            (Found::Git(_), _) => {
                return Err(Cause::Invalid("a commit of something else".into()).into());
            }
        })
    }

    pub(super) async fn found(&self, vertex: &Arc<Vertex>, asked: &Outside) -> Result<Arc<Found>> {
        let find = || async {
            let services = &self.0.services;
            let found = match asked {
                Outside::Blob(blob) => Found::File(blob.file.clone()),
                Outside::Http(http) => match http.pinned() {
                    Some(file) => Found::File(file),
                    None => {
                        let announced = self.start(vertex);
                        let progress = self.transfer_progress(vertex, "downloading");
                        let file = http.fetch(self.store(), services, &*progress).await;
                        Found::File(self.end(vertex, announced, file)?)
                    }
                },
                Outside::Git(git) => Found::Git(git.resolve(self.store(), services).await?),
            };
            Ok(Arc::new(found))
        };
        vertex.found.get_or_init(|| self.find_together(vertex, find())).await.clone()
    }

    /// Returns the file system of a source, from before where it is known.
    pub(super) async fn outside_results(
        &self,
        vertex: &Arc<Vertex>,
        source: &pb::SourceOp,
    ) -> Result<Vec<Snapshot>> {
        let key = self.key(vertex).await?;
        if !vertex.fresh
            && let Some(results) = self.recall(vertex, &key, 1)?
        {
            self.announce_cached(vertex);
            return Ok(results);
        }
        let make = |_| async move {
            let asked = outside(source)?;
            let found = self.found(vertex, &asked).await?;
            let results = vec![self.make_outside(vertex, &asked, &found).await?];
            self.remember(vertex, &key, &results)?;
            Ok(results)
        };
        self.execute_together(vertex, key, make).await
    }

    async fn make_outside(
        &self,
        vertex: &Arc<Vertex>,
        asked: &Outside,
        found: &Found,
    ) -> Result<Snapshot> {
        let services = &self.0.services;
        let file = match (found, asked) {
            (Found::Git(commit), Outside::Git(git)) => {
                return git.snapshot(commit, self.store(), services, &vertex.name).await;
            }
            (Found::File(file), Outside::Http(http)) => {
                let (store, digest) = (self.store().clone(), file.digest.clone());
                let here = blocking::run(move || store.has_blob(&digest)).await?;
                if here && http.pinned().is_none() {
                    file.clone()
                } else {
                    let progress = self.transfer_progress(vertex, "downloading");
                    http.fetch(self.store(), services, &*progress).await?
                }
            }
            (Found::File(file), Outside::Blob(blob)) => {
                self.fetch_source_blob(vertex, blob).await?;
                file.clone()
            }
            _ => return Err(Cause::Invalid("a source that is something else".into()).into()),
        };
        let (store, name) = (self.store().clone(), vertex.name.clone());
        Ok(blocking::run(move || SingleFile::snapshot(&file, &store, &name)).await?)
    }

    async fn fetch_source_blob(&self, vertex: &Arc<Vertex>, blob: &BlobSource) -> Result<()> {
        let digest = &blob.file.digest;
        let (store, wanted) = (self.store().clone(), digest.clone());
        if blocking::run(move || store.has_blob(&wanted)).await? {
            return Ok(());
        }
        let progress = self.transfer_progress(vertex, "downloading");
        match &blob.place {
            BlobPlace::Layout(from) => {
                let layouts = &*self.0.services.layouts;
                layout::save(self.store(), layouts, from, digest, &*progress).await
            }
            BlobPlace::Registry(reference) => {
                let registry = self.0.worker.images.registry();
                let size = registry.blob_size(reference, digest).await?;
                let descriptor = layout::anonymous(digest, size);
                let report = |current: u64| progress(current, size);
                transfer::fetch_blob(self.store(), registry, reference, &descriptor, &report)
                    .await?;
                Ok(())
            }
        }
    }

    /// Finds an image in a layout of the client.
    pub(super) async fn layout(
        &self,
        vertex: &Arc<Vertex>,
        source: &pb::SourceOp,
    ) -> Result<Arc<LayoutImage>> {
        let find = || async {
            let platform = vertex.platform.clone().unwrap_or_else(Platform::host);
            let layouts = &*self.0.services.layouts;
            layout::find(self.store(), layouts, source, &platform).await.map(Arc::new)
        };
        vertex.layout.get_or_init(find).await.clone()
    }

    /// Fetches the layers of such an image that are not here; later steps expect to find them.
    pub(super) async fn provide_layout(
        &self,
        vertex: &Arc<Vertex>,
        source: &pb::SourceOp,
    ) -> Result<()> {
        if !source.identifier.starts_with("oci-layout://") {
            return Ok(());
        }
        let image = self.layout(vertex, source).await?;
        let report = |descriptor: &slipway_spec::Descriptor, current: u64| {
            self.0.progress.send(ProgressEvent::Status {
                vertex: vertex.digest.clone(),
                id: descriptor.digest.to_string().into(),
                current,
                total: descriptor.size,
                done: current >= descriptor.size,
            });
        };
        layout::provide(self.store(), &*self.0.services.layouts, &image, &report).await
    }

    fn transfer_progress(&self, vertex: &Vertex, id: &str) -> Box<dyn Fn(u64, u64) + Send + Sync> {
        let (progress, vertex, id) =
            (self.0.progress.clone(), vertex.digest.clone(), Arc::<str>::from(id));
        Box::new(move |current, total| {
            progress.send(ProgressEvent::Status {
                vertex: vertex.clone(),
                id: id.clone(),
                current,
                total,
                done: total != 0 && current >= total,
            });
        })
    }
}
