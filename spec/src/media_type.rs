//! Media types of image documents and layers (OCI image specification, "Media Types").

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

/// A media type; unknown ones are carried unchanged.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MediaType(Cow<'static, str>);

/// How a layer blob is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Compression {
    /// A plain tar.
    Uncompressed,
    /// RFC 1952; possibly several members.
    Gzip,
    /// RFC 8878; possibly several frames.
    Zstd,
}

impl Compression {
    /// Returns the name used in options.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Uncompressed => "uncompressed",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }
}

macro_rules! media_types {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        impl MediaType {
            $($(#[$doc])* pub const $name: Self = Self(Cow::Borrowed($text));)*
        }
    };
}

media_types! {
    /// OCI image index.
    OCI_INDEX = "application/vnd.oci.image.index.v1+json";
    /// OCI image manifest.
    OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json";
    /// OCI image config.
    OCI_CONFIG = "application/vnd.oci.image.config.v1+json";
    /// Uncompressed OCI layer.
    OCI_LAYER = "application/vnd.oci.image.layer.v1.tar";
    /// Gzip OCI layer.
    OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip";
    /// Zstandard OCI layer.
    OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd";
    /// The two-byte empty JSON document.
    OCI_EMPTY = "application/vnd.oci.empty.v1+json";
    /// Docker manifest list.
    DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// Docker manifest, schema 2.
    DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker image config.
    DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json";
    /// Uncompressed Docker layer.
    DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar";
    /// Gzip Docker layer.
    DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    /// Zstandard Docker layer (not in Docker's specification, but met).
    DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd";
}

impl MediaType {
    /// Wraps any text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(Cow::Owned(text.into()))
    }

    /// Returns the text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this names an index or manifest list.
    pub fn is_index(&self) -> bool {
        *self == Self::OCI_INDEX || *self == Self::DOCKER_INDEX
    }

    /// Whether this names an image manifest.
    pub fn is_manifest(&self) -> bool {
        *self == Self::OCI_MANIFEST || *self == Self::DOCKER_MANIFEST
    }

    /// Whether this names an image config.
    pub fn is_config(&self) -> bool {
        *self == Self::OCI_CONFIG || *self == Self::DOCKER_CONFIG
    }

    /// Whether this names a file-system layer of a known kind.
    pub fn is_layer(&self) -> bool {
        self.compression().is_some()
    }

    /// Whether this is one of Docker's own types rather than OCI's.
    pub fn is_docker(&self) -> bool {
        self.0.starts_with("application/vnd.docker.")
    }

    /// Returns the compression that a layer type claims; Docker's plain type may hold gzip in truth,
    /// so readers look at the bytes.
    pub fn compression(&self) -> Option<Compression> {
        let base = self.0.as_ref();
        let layer = base.starts_with("application/vnd.oci.image.layer.")
            || base.starts_with("application/vnd.docker.image.rootfs.");
        if !layer || base.ends_with("+encrypted") {
            return None;
        }
        Some(match () {
            () if base.ends_with("+gzip") || base.ends_with(".gzip") => Compression::Gzip,
            () if base.ends_with("+zstd") || base.ends_with(".zstd") => Compression::Zstd,
            () => Compression::Uncompressed,
        })
    }

    /// Returns the layer type for a compression, in OCI's or Docker's vocabulary.
    pub fn layer(compression: Compression, docker: bool) -> Self {
        match (compression, docker) {
            (Compression::Uncompressed, false) => Self::OCI_LAYER,
            (Compression::Gzip, false) => Self::OCI_LAYER_GZIP,
            (Compression::Zstd, false) => Self::OCI_LAYER_ZSTD,
            (Compression::Uncompressed, true) => Self::DOCKER_LAYER,
            (Compression::Gzip, true) => Self::DOCKER_LAYER_GZIP,
            (Compression::Zstd, true) => Self::DOCKER_LAYER_ZSTD,
        }
    }
}

impl fmt::Display for MediaType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for MediaType {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_types_know_their_compression() {
        for docker in [false, true] {
            for compression in [Compression::Uncompressed, Compression::Gzip, Compression::Zstd] {
                assert_eq!(MediaType::layer(compression, docker).compression(), Some(compression));
            }
        }
        assert_eq!(MediaType::OCI_CONFIG.compression(), None);
        assert_eq!(
            MediaType::new("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")
                .compression(),
            Some(Compression::Gzip)
        );
    }
}
