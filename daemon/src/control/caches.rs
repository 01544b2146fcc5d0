//! Build caches: which ones a client asks for, and the folders of the client that they are in.

use std::collections::BTreeMap;
use std::path::Path;

use async_trait::async_trait;
use slipway_engine::Build;
use slipway_engine::cache::{CacheEntry, CacheExport, CacheFolders, CachePlace, parse_exports};
use slipway_engine::solver::client::ByteStream;
use slipway_engine::solver::graph::Edge;
use slipway_engine::store::{Error, ErrorKind};
use slipway_spec::wire::control::{CacheOptionsEntry, SolveRequest};
use slipway_spec::{Descriptor, Digest};
use tonic::Status;

use crate::failure::build_status;
use crate::session::{SessionErrorKind, SessionGroup};

/// The caches that a build looks into and writes.
#[derive(Clone, Debug)]
pub(super) struct Caches {
    pub(super) imports: Vec<CacheEntry>,
    exports: Vec<CacheExport>,
}

fn entry(entry: &CacheOptionsEntry) -> CacheEntry {
    CacheEntry { kind: entry.r#type.clone(), attrs: entry.attrs.clone() }
}

impl Caches {
    /// Reads what a client asks for, also as old clients do.
    ///
    /// # Errors
    /// When a cache cannot be written because of how it is asked for.
    pub(super) fn read(request: &SolveRequest) -> Result<Self, Status> {
        let cache = request.cache.clone().unwrap_or_default();
        let named = |name: &str, attrs: &BTreeMap<String, String>| {
            let mut attrs = attrs.clone();
            attrs.insert("ref".into(), name.into());
            CacheEntry { kind: "registry".into(), attrs }
        };
        let mut imports: Vec<CacheEntry> = cache.imports.iter().map(entry).collect();
        imports
            .extend(cache.import_refs_deprecated.iter().map(|name| named(name, &BTreeMap::new())));
        let mut exports: Vec<CacheEntry> = cache.exports.iter().map(entry).collect();
        if !cache.export_ref_deprecated.is_empty() {
            exports.push(named(&cache.export_ref_deprecated, &cache.export_attrs_deprecated));
        }
        let exports =
            parse_exports(&exports).map_err(|error| Status::unknown(error.to_string()))?;
        Ok(Self { imports, exports })
    }

    /// Whether images are to say what their layers came out of.
    pub(super) fn inline(&self) -> bool {
        self.exports.iter().any(|export| export.place == CachePlace::Inline)
    }

    /// Writes the caches; returns what the client is told of them.
    ///
    /// # Errors
    /// When one cannot be written.
    pub(super) async fn export(
        &self,
        build: &Build,
        edges: &[Edge],
    ) -> Result<BTreeMap<String, String>, Status> {
        let mut response = BTreeMap::new();
        for export in &self.exports {
            let written = build.export_cache(edges, export).await;
            if let Some(manifest) = written.map_err(|error| build_status(&error))? {
                // The client names it in its folder by that.
                let json = serde_json::to_string(&manifest);
                let json = json.map_err(|error| Status::internal(error.to_string()))?;
                response.insert("cache.manifest".into(), json);
            }
        }
        Ok(response)
    }
}

fn store_of(folder: &str) -> String {
    format!("local:{folder}")
}

/// Folders of a client. What its caches are called is the client's own business: it finds them, and names them once it is
/// told that they are complete.
#[async_trait]
impl CacheFolders for SessionGroup {
    async fn find(&self, _: &str, _: &str) -> Result<Option<Digest>, Error> {
        Err(Error::new(ErrorKind::Invalid, "local cache importer requires explicit digest"))
    }

    async fn open(&self, folder: &str, digest: &Digest) -> Result<Option<ByteStream>, Error> {
        let subject = format!("cannot read {folder} of the client");
        self.open_content(&store_of(folder), &subject, digest).await
    }

    async fn size(&self, folder: &str, digest: &Digest) -> Result<Option<u64>, Error> {
        let session = self.first().await?;
        match session.content(store_of(folder)).info(digest).await {
            Ok(info) => Ok(u64::try_from(info.size).ok()),
            Err(error) if error.kind() == SessionErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn write(&self, folder: &str, content: &Descriptor, file: &Path) -> Result<(), Error> {
        let session = self.first().await?;
        let opened = tokio::fs::File::open(file).await;
        let opened =
            opened.map_err(|error| Error::io(format!("cannot read {}", file.display()), error))?;
        let name = content.digest.to_string();
        Ok(session.content(store_of(folder)).write_file(name, content, opened).await?)
    }

    async fn name(&self, _: &str, _: &str, _: &Descriptor, _: bool) -> Result<(), Error> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_spec::wire::control::CacheOptions;

    fn options(kind: &str, attrs: &[(&str, &str)]) -> CacheOptionsEntry {
        let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        CacheOptionsEntry { r#type: kind.into(), attrs }
    }

    #[test]
    fn old_clients_name_registries_alone() {
        let cache = CacheOptions {
            export_ref_deprecated: "r/e".into(),
            export_attrs_deprecated: [("mode".to_owned(), "max".to_owned())].into(),
            import_refs_deprecated: vec!["r/i".into()],
            imports: vec![options("local", &[("src", "d"), ("digest", "x")])],
            exports: vec![options("inline", &[])],
        };
        let request = SolveRequest { cache: Some(cache), ..SolveRequest::default() };
        let caches = Caches::read(&request).unwrap();
        assert!(caches.inline());
        assert_eq!(caches.exports.len(), 2);
        assert!(caches.exports[1].all);
        let kinds: Vec<_> = caches.imports.iter().map(|entry| entry.kind.as_str()).collect();
        assert_eq!(kinds, ["local", "registry"]);
        assert_eq!(caches.imports[1].attrs["ref"], "r/i");
        assert!(!Caches::read(&SolveRequest::default()).unwrap().inline());
    }

    #[test]
    fn what_cannot_be_written_is_said_before_the_build() {
        for (kind, message) in [
            ("gha", "unknown cache exporter: \"gha\""),
            ("s3", "unknown cache exporter: \"s3\""),
            ("azblob", "unknown cache exporter: \"azblob\""),
            ("", "unknown cache exporter: \"\""),
            ("local", "dest= is missing"),
        ] {
            let cache = CacheOptions { exports: vec![options(kind, &[])], ..Default::default() };
            let request = SolveRequest { cache: Some(cache), ..SolveRequest::default() };
            let status = Caches::read(&request).unwrap_err();
            assert!(status.message().contains(message), "{kind}: {status:?}");
        }
    }
}
