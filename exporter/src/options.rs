//! Options of image outputs, read once into types.

use slipway_spec::flag;
use std::collections::BTreeMap;

use slipway_spec::media_type::Compression;
use slipway_spec::{ImageReference, ReferenceError};
use slipway_store::pack::BlobOptions;

use crate::annotations::Annotations;
use crate::error::{ExportError, Result};
use crate::image::PlatformResult;

/// How an image is written (`type=image`, `oci` and `docker`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageOptions {
    /// The names the image gets.
    pub names: Vec<ImageReference>,
    /// Whether it is sent to the registries its names point at.
    pub push: bool,
    /// Whether it is sent without moving a tag.
    pub push_by_digest: bool,
    /// Whether the store keeps the image under its names; `None` leaves that to whoever makes it.
    pub keep: Option<bool>,
    /// Whether the registry may be spoken to without verified TLS.
    pub insecure: bool,
    /// How layers are compressed.
    pub blobs: BlobOptions,
    /// Annotations.
    pub annotations: Annotations,
    /// Whether what belongs into images alone is reason enough for an index; `None` leaves that to the kind of output.
    pub attestation_inline: Option<bool>,
    /// Whether what is said of an image is an artifact rather than something like an image; `None` is where the media
    /// types are OCI's.
    pub oci_artifact: Option<bool>,
}

/// Reads a flag as Go's `ParseBool` does; no value at all is `true`.
fn flag(key: &str, value: &str) -> Result<bool> {
    if value.is_empty() {
        return Ok(true);
    }
    let wrong = || format!("output option {key}: {value:?} is neither true nor false");
    flag::parse(value).ok_or_else(|| ExportError::Invalid(wrong()))
}

impl ImageOptions {
    /// Whether something is said of a result that calls for an index.
    pub(crate) fn attests(&self, result: &PlatformResult) -> bool {
        let inline = self.attestation_inline.unwrap_or(true);
        result.attestations.iter().any(|attestation| inline || !attestation.is_inline_only())
    }

    /// Whether what is said of an image is an artifact.
    pub(crate) fn is_artifact(&self) -> bool {
        self.oci_artifact.unwrap_or(!self.blobs.docker)
    }

    /// Reads the attributes of an output.
    ///
    /// # Errors
    /// When an attribute is unknown, not built yet, or its value makes no sense.
    pub fn parse(attrs: &BTreeMap<String, String>) -> Result<Self> {
        let mut options = Self::default();
        for (key, value) in attrs {
            let invalid =
                |why: &str| ExportError::Invalid(format!("output option {key}={value}: {why}"));
            match key.as_str() {
                "name" => {
                    options.names = value
                        .split(',')
                        .filter(|name| !name.is_empty())
                        .map(str::parse)
                        .collect::<std::result::Result<_, ReferenceError>>()
                        .map_err(|error| ExportError::Invalid(error.to_string()))?;
                }
                "push" => options.push = flag(key, value)?,
                "push-by-digest" => options.push_by_digest = flag(key, value)?,
                "registry.insecure" => options.insecure = flag(key, value)?,
                "oci-mediatypes" => options.blobs.docker = !flag(key, value)?,
                "compression" => {
                    options.blobs.compression = match value.as_str() {
                        "gzip" => Compression::Gzip,
                        "zstd" => Compression::Zstd,
                        "uncompressed" => Compression::Uncompressed,
                        "estargz" => return Err(invalid("this compression is not supported yet")),
                        _ => return Err(invalid("expected uncompressed, gzip or zstd")),
                    };
                }
                "compression-level" => {
                    let level = value.parse().map_err(|_| invalid("expected a number"))?;
                    options.blobs.level = Some(level);
                }
                "force-compression" => options.blobs.force = flag(key, value)?,
                "store" => options.keep = Some(flag(key, value)?),
                // The store unpacks a layer when it is needed.
                "attestation-inline" => options.attestation_inline = Some(flag(key, value)?),
                "oci-artifact" => options.oci_artifact = Some(flag(key, value)?),
                "unpack" | "tar" | "name-canonical" => {
                    let wanted = flag(key, value)?;
                    if key == "tar" && !wanted {
                        return Err(invalid("an archive as a folder is not supported yet"));
                    }
                }
                // Ignored by BuildKit for years.
                "buildinfo-attrs" => {}
                other => {
                    if !options.annotations.read(other, value)? {
                        return Err(invalid("this option is not supported yet"));
                    }
                }
            }
        }
        let levels = match options.blobs.compression {
            Compression::Gzip => 0..=9,
            Compression::Zstd => 0..=22,
            Compression::Uncompressed => 0..=0,
        };
        if let Some(level) = options.blobs.level.filter(|level| !levels.contains(level)) {
            return Err(ExportError::Invalid(format!(
                "output option compression-level={level}: {} takes {} to {}",
                options.blobs.compression.as_str(),
                levels.start(),
                levels.end()
            )));
        }
        if (options.push || options.push_by_digest) && options.names.is_empty() {
            return Err(ExportError::Invalid(
                "an image without a name cannot be pushed: name it with --tag".into(),
            ));
        }
        if options.push_by_digest
            && options.names.iter().any(|name| name.tag().is_some_and(|tag| tag != "latest"))
        {
            return Err(ExportError::Invalid(
                "push-by-digest cannot be combined with a tag".into(),
            ));
        }
        if options.blobs.docker && options.oci_artifact == Some(true) {
            return Err(ExportError::Invalid(
                "exporter option \"oci-artifact=true\" conflicts with \"oci-mediatypes=false\""
                    .into(),
            ));
        }
        if options.blobs.docker && !options.annotations.is_empty() {
            return Err(ExportError::Invalid("annotations need oci-mediatypes=true".into()));
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(attrs: &[(&str, &str)]) -> Result<ImageOptions> {
        ImageOptions::parse(
            &attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        )
    }

    #[test]
    fn reads_what_buildx_sends() {
        let options = parse(&[
            ("name", "a:1,localhost:5000/b"),
            ("push", ""),
            ("compression", "zstd"),
            ("compression-level", "5"),
        ])
        .unwrap();
        assert_eq!(options.names.len(), 2);
        assert!(options.push);
        assert_eq!(options.blobs.compression, Compression::Zstd);
        assert_eq!(options.blobs.level, Some(5));
        assert_eq!((options.attestation_inline, options.is_artifact()), (None, true));
        let image = parse(&[("oci-artifact", "false"), ("attestation-inline", "1")]).unwrap();
        assert_eq!((image.attestation_inline, image.is_artifact()), (Some(true), false));
        assert!(!parse(&[("oci-mediatypes", "false")]).unwrap().is_artifact());
    }

    #[test]
    fn refuses_what_it_would_not_do() {
        for bad in [
            &[("push", "true")][..],
            &[("push", "maybe")],
            &[("compression", "lzma")],
            &[("compression-level", "10")],
            &[("compression", "uncompressed"), ("compression-level", "1")],
            &[("rewrite-timestamp", "true")],
            &[("name", "UPPER")],
            &[("tar", "false")],
            &[("annotation-layer.a", "b")],
            &[("annotation.a", "b"), ("oci-mediatypes", "false")],
            &[("store", "maybe")],
            &[("attestation-inline", "maybe")],
            &[("oci-artifact", "maybe")],
            &[("oci-mediatypes", "false"), ("oci-artifact", "true")],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
