//! What is known of a source without having its files.

use bytes::Bytes;
use sha2::{Sha256, Sha384, Sha512};
use slipway_spec::digest::to_hex;
use slipway_spec::llb::pb;
use slipway_spec::{Digest, Platform};
use slipway_store::Store;

use super::image::Lookup;
use crate::error::Result;

/// What is asked about a source.
#[derive(Clone, Debug)]
pub struct MetadataRequest {
    /// The source.
    pub source: pb::SourceOp,
    /// What progress calls the question; empty to show nothing.
    pub shown_as: String,
    /// The platform of an image; `None` is the host's.
    pub platform: Option<Platform>,
    /// Where an image is looked up.
    pub lookup: Lookup,
    /// Whether the commit of a git source is wanted as git stores it.
    pub git_objects: bool,
    /// A digest of an HTTP source with some bytes after it.
    pub checksum: Option<ChecksumRequest>,
}

/// Which digest is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChecksumRequest {
    /// How it is computed.
    pub algorithm: ChecksumAlgorithm,
    /// What comes after the content.
    pub suffix: Bytes,
}

/// How a digest is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChecksumAlgorithm {
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

/// What was found out. What is `None` was not asked, or the source is of another kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceMetadata {
    /// An image, of a registry or of a layout.
    pub image: Option<ImageMetadata>,
    /// A git repository.
    pub git: Option<GitMetadata>,
    /// A file of the web.
    pub http: Option<HttpMetadata>,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageMetadata {
    /// What the name points at.
    pub digest: Digest,
    /// The config for the platform.
    pub config: Bytes,
}

/// A ref of a repository.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GitMetadata {
    /// The object that the ref names.
    pub checksum: String,
    /// The ref's full name, or the commit.
    pub reference: String,
    /// The commit, where the ref names a tag object.
    pub commit_checksum: Option<String>,
    /// The commit as git stores it, where that was asked.
    pub commit_object: Option<Bytes>,
    /// The tag as git stores it, where there is one and that was asked.
    pub tag_object: Option<Bytes>,
}

/// A file of the web.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpMetadata {
    /// The digest of the content.
    pub digest: Digest,
    /// Its name.
    pub filename: String,
    /// When it was changed, in seconds since 1970, where the server says that.
    pub last_modified: Option<i64>,
    /// The digest that was asked for.
    pub checksum: Option<Checksum>,
}

/// The digest of a content with some bytes after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// The algorithm and the digest.
    pub digest: String,
    /// What comes after the content.
    pub suffix: Bytes,
}

impl MetadataRequest {
    /// Asks for what is known of a source anyway.
    pub fn new(source: pb::SourceOp) -> Self {
        Self {
            source,
            shown_as: String::new(),
            platform: None,
            lookup: Lookup::StoreFirst,
            git_objects: false,
            checksum: None,
        }
    }
}

impl ChecksumRequest {
    /// Computes the digest of a content that is in the store.
    pub(crate) fn compute(&self, store: &Store, digest: &Digest) -> Result<Checksum> {
        fn hash<D: sha2::Digest>(
            name: &str,
            mut file: std::fs::File,
            suffix: &[u8],
        ) -> std::io::Result<String> {
            use std::io::Read as _;
            let mut hash = D::new();
            let mut buffer = vec![0; 128 * 1024];
            loop {
                match file.read(&mut buffer)? {
                    0 => break,
                    length => hash.update(&buffer[..length]),
                }
            }
            hash.update(suffix);
            Ok(format!("{name}:{}", to_hex(&hash.finalize())))
        }
        let path = store.blob_path(digest);
        let failed =
            |error| slipway_store::Error::io(format!("cannot read {}", path.display()), error);
        let file = std::fs::File::open(&path).map_err(failed)?;
        let computed = match self.algorithm {
            ChecksumAlgorithm::Sha256 => hash::<Sha256>("sha256", file, &self.suffix),
            ChecksumAlgorithm::Sha384 => hash::<Sha384>("sha384", file, &self.suffix),
            ChecksumAlgorithm::Sha512 => hash::<Sha512>("sha512", file, &self.suffix),
        };
        Ok(Checksum { digest: computed.map_err(failed)?, suffix: self.suffix.clone() })
    }
}
