//! What `--cache-to` and `--cache-from` say, read once into types.

use slipway_spec::flag;
use std::collections::{BTreeMap, BTreeSet};

use slipway_exporter::ImageOptions;
use slipway_frontend::CacheImport;
use slipway_spec::{Digest, ImageReference};
use slipway_store::pack::BlobOptions;

use crate::error::BuildError;

/// A cache as clients name it: a kind, such as `registry`, and options.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct CacheEntry {
    /// What stands behind `type=`.
    pub kind: String,
    /// Everything else.
    pub attrs: BTreeMap<String, String>,
}

impl From<CacheImport> for CacheEntry {
    fn from(import: CacheImport) -> Self {
        Self { kind: import.kind, attrs: import.attrs }
    }
}

/// A cache that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheExport {
    /// Where it goes.
    pub place: CachePlace,
    /// Whether it has the results of all steps (`mode=max`), or those alone whose layers are in the result.
    pub all: bool,
    /// Whether a failure to write it is none of the build.
    pub ignore_error: bool,
    /// How its layers are compressed.
    pub blobs: BlobOptions,
    /// Whether it is an image manifest, which every registry takes, or an index.
    pub image_manifest: bool,
}

/// Where a cache goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CachePlace {
    /// Into the config of the image.
    Inline,
    /// To a registry.
    Registry {
        /// Its name.
        reference: ImageReference,
        /// Whether the registry may be spoken to without verified TLS.
        insecure: bool,
    },
    /// Into a folder of the client.
    Folder {
        /// The folder, as the client calls it.
        folder: String,
        /// What the cache is called in it.
        tag: String,
        /// Whether content that nothing in the folder needs is removed.
        reset: bool,
    },
}

/// A cache that is to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ImportPlace {
    Registry { reference: ImageReference, insecure: bool },
    Folder { folder: String, tag: String, digest: Option<Digest> },
}

/// What a cache in a folder is called unless it is said.
const DEFAULT_TAG: &str = "latest";

impl CacheEntry {
    fn text(&self, name: &str) -> Option<&str> {
        self.attrs.get(name).map(String::as_str).filter(|text| !text.is_empty())
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, BuildError> {
        let Some(text) = self.attrs.get(name) else { return Ok(None) };
        let wrong = || self.invalid(&format!("{name}={text} is neither true nor false"));
        flag::parse(text).map(Some).ok_or_else(wrong)
    }

    fn invalid(&self, why: &str) -> BuildError {
        BuildError::Invalid(format!("cache of type={}: {why}", self.kind))
    }

    fn needed(&self, name: &str) -> Result<&str, BuildError> {
        self.text(name).ok_or_else(|| self.invalid(&format!("{name}= is missing")))
    }

    fn reference(&self) -> Result<ImageReference, BuildError> {
        let reference: ImageReference =
            self.needed("ref")?.parse().map_err(|error| self.invalid(&format!("{error}")))?;
        Ok(reference)
    }

    /// Returns what tells the cache from others.
    pub(super) fn identity(&self) -> Self {
        match self.text("ref") {
            Some(name) if self.kind == "registry" => {
                let attrs = BTreeMap::from([("ref".to_owned(), name.to_owned())]);
                Self { kind: self.kind.clone(), attrs }
            }
            _ => self.clone(),
        }
    }

    /// Returns what people call the cache.
    pub(super) fn name(&self) -> String {
        match (self.kind.as_str(), self.text("ref"), self.text("src")) {
            ("registry", Some(name), _) => name.to_owned(),
            (kind, _, Some(folder)) => format!("{kind}:{folder}"),
            (kind, ..) => kind.to_owned(),
        }
    }

    /// Checks that a cache can be looked into, as far as its name tells.
    ///
    /// # Errors
    /// When its kind is unknown, or an option is missing or makes no sense.
    pub fn check_import(&self) -> Result<(), BuildError> {
        self.import().map(drop)
    }

    pub(super) fn import(&self) -> Result<ImportPlace, BuildError> {
        match self.kind.as_str() {
            "registry" => Ok(ImportPlace::Registry {
                reference: self.reference()?,
                insecure: self.flag("registry.insecure")?.unwrap_or(false),
            }),
            "local" => Ok(ImportPlace::Folder {
                folder: self.needed("src")?.to_owned(),
                tag: self.text("tag").unwrap_or(DEFAULT_TAG).to_owned(),
                digest: self
                    .text("digest")
                    .map(str::parse)
                    .transpose()
                    .map_err(|error| self.invalid(&format!("{error}")))?,
            }),
            "inline" => {
                Err(self.invalid("an inline cache is read from its image: use type=registry"))
            }
            other => Err(BuildError::Invalid(format!(
                "unknown cache importer: {other:?} (known are registry and local)"
            ))),
        }
    }

    fn export(&self) -> Result<CacheExport, BuildError> {
        let docker = !self.flag("oci-mediatypes")?.unwrap_or(true);
        let place = match self.kind.as_str() {
            "inline" => CachePlace::Inline,
            "registry" => CachePlace::Registry {
                reference: self.reference()?,
                insecure: self.flag("registry.insecure")?.unwrap_or(false),
            },
            "local" => CachePlace::Folder {
                folder: self.needed("dest")?.to_owned(),
                tag: self.text("tag").unwrap_or(DEFAULT_TAG).to_owned(),
                reset: self.flag("reset")?.unwrap_or(false),
            },
            other => {
                return Err(BuildError::Invalid(format!(
                    "unknown cache exporter: {other:?} (known are inline, registry and local)"
                )));
            }
        };
        let compression = ["compression", "compression-level", "force-compression"];
        let compression: BTreeMap<String, String> = compression
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), self.attrs.get(*name)?.clone())))
            .collect();
        let blobs = ImageOptions::parse(&compression)
            .map_err(|error| self.invalid(&error.to_string()))?
            .blobs;
        let image_manifest = self.flag("image-manifest")?.unwrap_or(!docker);
        if image_manifest && docker {
            return Err(self.invalid(
                "image-manifest=true needs oci-mediatypes=true: Docker has no type for it",
            ));
        }
        Ok(CacheExport {
            all: self.text("mode") == Some("max") && place != CachePlace::Inline,
            place,
            // As in BuildKit, what makes no sense is no.
            ignore_error: self.flag("ignore-error").ok().flatten().unwrap_or(false),
            blobs: BlobOptions { docker, ..blobs },
            image_manifest,
        })
    }
}

/// Reads what is to be written.
///
/// # Errors
/// When a kind is unknown, an option is missing or makes no sense, or the same is asked for twice.
pub fn parse_exports(entries: &[CacheEntry]) -> Result<Vec<CacheExport>, BuildError> {
    let mut seen = BTreeSet::new();
    let mut exports: Vec<CacheExport> = vec![];
    for entry in entries {
        let export = entry.export()?;
        if export.place == CachePlace::Inline {
            if !exports.iter().any(|known| known.place == CachePlace::Inline) {
                exports.push(export);
            }
            continue;
        }
        if !seen.insert(entry.identity()) {
            let kind = &entry.kind;
            return Err(BuildError::Invalid(format!("duplicate cache exports [{kind}]")));
        }
        exports.push(export);
    }
    Ok(exports)
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_spec::media_type::Compression;

    fn entry(text: &str) -> CacheEntry {
        let mut attrs: BTreeMap<String, String> = text
            .split(',')
            .map(|pair| pair.split_once('=').unwrap())
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        CacheEntry { kind: attrs.remove("type").unwrap(), attrs }
    }

    fn exports(texts: &[&str]) -> Result<Vec<CacheExport>, String> {
        let entries: Vec<_> = texts.iter().map(|text| entry(text)).collect();
        parse_exports(&entries).map_err(|error| error.to_string())
    }

    #[test]
    fn reads_what_clients_send() {
        let all = exports(&[
            "type=inline",
            "type=inline,mode=max",
            "type=registry,ref=r.example/c:1,mode=max,compression=zstd,ignore-error=true",
            "type=local,dest=/d,oci-mediatypes=false,reset=true",
            "type=local,dest=/d,tag=other,mode=odd,image-manifest=false",
        ])
        .unwrap();
        assert_eq!(all.len(), 4, "{all:?}");
        assert_eq!((&all[0].place, all[0].all), (&CachePlace::Inline, false));
        let CachePlace::Registry { reference, insecure: false } = &all[1].place else {
            panic!("{all:?}");
        };
        assert_eq!(reference.to_string(), "r.example/c:1");
        assert!(all[1].all && all[1].ignore_error && all[1].image_manifest);
        assert_eq!(all[1].blobs.compression, Compression::Zstd);
        let folder =
            |tag: &str, reset| CachePlace::Folder { folder: "/d".into(), tag: tag.into(), reset };
        assert_eq!(all[2].place, folder("latest", true));
        assert!(!all[2].image_manifest && all[2].blobs.docker);
        assert_eq!(all[3].place, folder("other", false));
        assert!(!all[3].all && !all[3].image_manifest && !all[3].blobs.docker);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        for (texts, message) in [
            (&["type=gha"][..], "unknown cache exporter: \"gha\""),
            (&["type=s3,bucket=b"], "unknown cache exporter: \"s3\""),
            (&["type=azblob"], "unknown cache exporter: \"azblob\""),
            (&["type=registry"], "ref= is missing"),
            (&["type=registry,ref=UPPER"], "type=registry"),
            (&["type=local"], "dest= is missing"),
            (&["type=local,dest=a,compression=lzma"], "compression"),
            (&["type=local,dest=a,image-manifest=true,oci-mediatypes=false"], "oci-mediatypes"),
            (&["type=local,dest=a,reset=maybe"], "neither true nor false"),
            (&["type=local,dest=a", "type=local,dest=a"], "duplicate cache exports [local]"),
            (
                &["type=registry,ref=a,mode=max", "type=registry,ref=a"],
                "duplicate cache exports [registry]",
            ),
        ] {
            let error = exports(texts).unwrap_err();
            assert!(error.contains(message), "{texts:?}: {error}");
        }
        for (text, message) in [
            ("type=gha", "unknown cache importer: \"gha\""),
            ("type=inline", "use type=registry"),
            ("type=local", "src= is missing"),
            ("type=local,src=a,digest=x", "digest"),
        ] {
            let error = entry(text).import().unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn a_cache_is_known_by_what_leads_to_it() {
        let identity = |text: &str| entry(text).identity();
        assert_eq!(identity("type=registry,ref=a,mode=max"), identity("type=registry,ref=a"));
        assert_ne!(identity("type=local,src=a,tag=x"), identity("type=local,src=a"));
        assert_eq!(entry("type=registry,ref=r/a:1").name(), "r/a:1");
        assert_eq!(entry("type=local,src=/c,digest=x").name(), "local:/c");
    }
}
