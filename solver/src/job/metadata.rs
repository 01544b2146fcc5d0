//! What is known of sources, for those who decide what to build from them.

use bytes::Bytes;
use slipway_spec::{Digest, ImageReference, Platform};
use slipway_store::blocking;

use super::Job;
use super::announce::Announced;
use crate::error::{Cause, Result};
use crate::graph::Edge;
use crate::source::git::GitSource;
use crate::source::http::HttpSource;
use crate::source::layout;
use crate::source::metadata::{
    GitMetadata, HttpMetadata, ImageMetadata, MetadataRequest, SourceMetadata,
};

impl Job {
    /// Finds out about a source. Policies are not asked: see [`admit_source`](Self::admit_source).
    ///
    /// # Errors
    /// When the source cannot be reached, or there is none.
    pub async fn metadata(&self, request: &MetadataRequest) -> Result<SourceMetadata> {
        if request.shown_as.is_empty() {
            return self.find_metadata(request).await;
        }
        let platform = request.platform.as_ref().map(ToString::to_string).unwrap_or_default();
        let subject = format!("{} {} {platform}", request.shown_as, request.source.identifier);
        let vertex = Digest::of(subject.as_bytes());
        let name = request.shown_as.as_str().into();
        let announced = Announced::begin(&*self.0.progress, &vertex, name);
        let found = self.find_metadata(request).await;
        announced.finish(&found);
        found
    }

    /// Returns when the youngest file of an archive in a result was changed, in seconds since 1970; `None` when the file is
    /// no archive or holds no regular file.
    ///
    /// # Errors
    /// When the result cannot be had.
    pub async fn youngest_file(&self, edge: &Edge, archive: &str) -> Result<Option<i64>> {
        let view = self.view(edge).await?;
        let path = archive.to_owned();
        let found = blocking::run(move || {
            Ok(view.open(path.as_bytes())?.and_then(slipway_store::archive::youngest_file))
        });
        Ok(found.await?)
    }

    /// Reads the first bytes of a file of a result, at most `length`; `None` when there is no such file.
    ///
    /// # Errors
    /// When the result cannot be had.
    pub async fn read_start(&self, edge: &Edge, path: &str, length: u64) -> Result<Option<Bytes>> {
        let view = self.view(edge).await?;
        let path = path.to_owned();
        let read = blocking::run(move || view.read_start(path.as_bytes(), length));
        Ok(read.await?.map(Bytes::from))
    }

    async fn find_metadata(&self, request: &MetadataRequest) -> Result<SourceMetadata> {
        let source = &request.source;
        let (scheme, rest) = source.identifier.split_once("://").ok_or_else(|| {
            Cause::Invalid(format!("the source {:?} names no kind", source.identifier))
        })?;
        let platform = request.platform.clone().unwrap_or_else(Platform::host);
        let mut found = SourceMetadata::default();
        match scheme {
            "docker-image" => {
                let reference: ImageReference =
                    rest.parse().map_err(|error: slipway_spec::ReferenceError| {
                        Cause::Invalid(error.to_string())
                    })?;
                let image = self.resolve_image(&reference, &platform, request.lookup).await?;
                found.image = Some(ImageMetadata {
                    digest: image.target.digest.clone(),
                    config: image.config.clone(),
                });
            }
            "oci-layout" => {
                let layouts = &*self.0.services.layouts;
                let image = layout::resolve(self.store(), layouts, source, &platform).await?;
                found.image =
                    Some(ImageMetadata { digest: image.target, config: image.config.into() });
            }
            "git" => found.git = Some(self.git_metadata(request).await?),
            "http" | "https" => found.http = Some(self.http_metadata(request).await?),
            // Nothing is known of a folder of the client before it is read.
            _ => {}
        }
        Ok(found)
    }

    async fn git_metadata(&self, request: &MetadataRequest) -> Result<GitMetadata> {
        let git = GitSource::read(&request.source)?;
        let services = &self.0.services;
        let commit = git.resolve(self.store(), services).await?;
        let mut found = git.metadata(&commit);
        if request.git_objects {
            git.add_objects(&commit, self.store(), services, &mut found).await?;
        }
        Ok(found)
    }

    async fn http_metadata(&self, request: &MetadataRequest) -> Result<HttpMetadata> {
        let http = HttpSource::read(&request.source)?;
        let services = &self.0.services;
        let file = match http.pinned() {
            Some(file) if request.checksum.is_none() => file,
            _ => http.fetch(self.store(), services, &|_, _| {}).await?,
        };
        let checksum = match &request.checksum {
            None => None,
            Some(wanted) => {
                let (store, digest, wanted) =
                    (self.store().clone(), file.digest.clone(), wanted.clone());
                let computed = blocking::run(move || Ok(wanted.compute(&store, &digest)));
                Some(computed.await??)
            }
        };
        Ok(HttpMetadata {
            digest: file.digest,
            filename: file.name,
            last_modified: (file.mtime != 0).then(|| file.mtime.div_euclid(1_000_000_000)),
            checksum,
        })
    }
}
