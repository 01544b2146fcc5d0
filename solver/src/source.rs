//! Where file systems come from.

pub(crate) mod file;
pub mod git;
pub(crate) mod http;
pub mod image;
pub(crate) mod layout;
pub mod metadata;

use std::sync::Arc;

use slipway_spec::Digest;
use slipway_spec::llb::pb;
use slipway_store::snapshot::Snapshot;

use crate::error::{Cause, Result};

/// What a source other than an image or a local folder turned out to be.
#[derive(Debug)]
pub(crate) enum Found {
    /// A single file.
    File(file::SingleFile),
    /// A commit.
    Git(git::Commit),
}

/// What an image or a part of one turned out to be.
#[derive(Clone, Debug)]
pub(crate) struct FoundImage {
    /// The index or manifest that its name stands for.
    pub(crate) digest: Digest,
    pub(crate) snapshot: Snapshot,
    /// The layers of the snapshot.
    pub(crate) diff_ids: Vec<Digest>,
}

/// A source as its identifier and attributes describe it.
#[derive(Debug)]
pub(crate) enum Outside {
    Http(http::HttpSource),
    Blob(file::BlobSource),
    Git(Arc<git::GitSource>),
}

/// Reads a source that is neither an image nor a local folder.
pub(crate) fn outside(source: &pb::SourceOp) -> Result<Outside> {
    let (scheme, _) = source.identifier.split_once("://").ok_or_else(|| {
        Cause::Invalid(format!("the source {:?} names no kind", source.identifier))
    })?;
    Ok(match scheme {
        "http" | "https" => Outside::Http(http::HttpSource::read(source)?),
        "git" => Outside::Git(Arc::new(git::GitSource::read(source)?)),
        "docker-image+blob" | "oci-layout+blob" => Outside::Blob(file::BlobSource::read(source)?),
        _ => return Err(Cause::Unsupported(format!("the source {}", source.identifier)).into()),
    })
}

/// Whether a source is one file system out of an image's layers, or a local folder.
pub(crate) fn is_layered(source: &pb::SourceOp) -> bool {
    ["docker-image://", "oci-layout://", "local://"]
        .iter()
        .any(|scheme| source.identifier.starts_with(scheme))
}

/// Reads a number as Go does, with the base in a prefix.
pub(crate) fn number(source: &pb::SourceOp, name: &str) -> Result<Option<u32>> {
    let Some(text) = source.attrs.get(name).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let (digits, base) = match text.as_bytes() {
        [b'0', b'x' | b'X', ..] => (&text[2..], 16),
        [b'0', b'o' | b'O', ..] => (&text[2..], 8),
        [b'0', b'b' | b'B', ..] => (&text[2..], 2),
        [b'0', _, ..] => (&text[1..], 8),
        _ => (text.as_str(), 10),
    };
    let value = u32::from_str_radix(digits, base).map_err(|_| {
        Cause::Invalid(format!("source {}: {name}: {text:?} is not a number", source.identifier))
    })?;
    Ok(Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_with_their_base() {
        let read = |text: &str| {
            let mut source = pb::SourceOp::default();
            source.attrs.insert("n".into(), text.into());
            number(&source, "n")
        };
        for (text, value) in [("420", 420), ("0644", 420), ("0o644", 420), ("0x1a4", 420), ("0", 0)]
        {
            assert_eq!(read(text).unwrap(), Some(value), "{text}");
        }
        assert_eq!(read("").unwrap(), None);
        assert!(read("rw").is_err() && read("-1").is_err());
    }

    #[test]
    fn unknown_sources_are_refused() {
        for identifier in ["ftp://x", "x", "://", ""] {
            let source = pb::SourceOp { identifier: identifier.into(), ..Default::default() };
            assert!(outside(&source).is_err(), "{identifier}");
        }
    }
}
