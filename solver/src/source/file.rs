//! Sources of one file, and blobs as such.

use slipway_spec::llb::pb;
use slipway_spec::{Digest, ImageReference};
use slipway_store::result::ResultKey;
use slipway_store::snapshot::Snapshot;
use slipway_store::tree::{Content, Entry, Kind};
use slipway_store::view::View;
use slipway_store::{Error, Store};

use super::number;
use crate::error::{Cause, Result};
use crate::job::tagged;

/// A file that is, or will be, content of the store.
#[derive(Clone, Debug)]
pub(crate) struct SingleFile {
    pub(crate) digest: Digest,
    pub(crate) name: String,
    pub(crate) looks: Looks,
    /// When it was changed, in nanoseconds since 1970.
    pub(crate) mtime: i64,
}

/// How a file is to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Looks {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

impl Looks {
    pub(crate) fn read(source: &pb::SourceOp) -> Result<Self> {
        Ok(Self {
            mode: number(source, "http.perm")?.filter(|mode| *mode != 0).unwrap_or(0o600) & 0o7777,
            uid: number(source, "http.uid")?.unwrap_or(0),
            gid: number(source, "http.gid")?.unwrap_or(0),
        })
    }
}

impl SingleFile {
    /// Returns what identifies the file as a result. Its time counts, because it is part of what a copy gives.
    pub(crate) fn key(&self) -> ResultKey {
        let mut hash = tagged(b"file source");
        let digest = self.digest.to_string();
        for text in [digest.as_str(), self.name.as_str()] {
            sha2::Digest::update(&mut hash, (text.len() as u64).to_le_bytes());
            sha2::Digest::update(&mut hash, text);
        }
        for number in [self.looks.mode, self.looks.uid, self.looks.gid] {
            sha2::Digest::update(&mut hash, number.to_le_bytes());
        }
        sha2::Digest::update(&mut hash, self.mtime.to_le_bytes());
        ResultKey(sha2::Digest::finalize(hash).into())
    }

    /// Makes a file system of it; the content is in the store.
    pub(crate) fn snapshot(&self, store: &Store, name: &str) -> slipway_store::Result<Snapshot> {
        let size = store.blob_size(&self.digest)?.ok_or_else(|| {
            Error::new(
                slipway_store::ErrorKind::NotFound,
                format!("content {} is not in the store", self.digest),
            )
        })?;
        let content = Content::Host {
            path: store.blob_path(&self.digest).into(),
            digest: self.digest.to_sha256(),
        };
        let mut view = View::default();
        let base = Entry::directory(self.looks.mode, self.mtime);
        let entry = Entry {
            kind: Kind::File { content, size },
            uid: self.looks.uid,
            gid: self.looks.gid,
            ..base
        };
        view.put(self.name.as_bytes(), entry)?;
        Ok(Snapshot { layers: vec![store.adopt_tree(view.into_changes(), name)?] })
    }
}

/// Returns a name that is one component of a path; `fallback` where there is none.
pub(crate) fn safe_name(name: &str, fallback: &str) -> String {
    let last = name.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    match last {
        "" | "." | ".." => fallback.to_owned(),
        last => last.replace('\0', ""),
    }
}

/// A blob of a registry or of a client's layout.
#[derive(Clone, Debug)]
pub(crate) struct BlobSource {
    pub(crate) file: SingleFile,
    pub(crate) place: BlobPlace,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BlobPlace {
    Registry(ImageReference),
    Layout(String),
}

impl BlobSource {
    pub(crate) fn read(source: &pb::SourceOp) -> Result<Self> {
        let fail = |what: &str| Cause::Invalid(format!("the source {}: {what}", source.identifier));
        let (scheme, name) = source.identifier.split_once("://").unwrap_or_default();
        let digest: Digest = name
            .rsplit_once('@')
            .and_then(|(_, digest)| digest.parse().ok())
            .ok_or_else(|| fail("it names no digest"))?;
        let place =
            if scheme == "oci-layout+blob" {
                let store = source.attrs.get("oci.store").filter(|store| !store.is_empty());
                BlobPlace::Layout(store.ok_or_else(|| fail("it names no store"))?.clone())
            } else {
                BlobPlace::Registry(name.parse().map_err(
                    |error: slipway_spec::ReferenceError| Cause::Invalid(error.to_string()),
                )?)
            };
        let filename = source.attrs.get("http.filename").map(String::as_str).unwrap_or_default();
        let fallback = digest.to_string().replace(':', "-");
        let file = SingleFile {
            name: safe_name(filename, &fallback),
            digest,
            looks: Looks::read(source)?,
            mtime: 0,
        };
        Ok(Self { file, place })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_single_components() {
        for (name, safe) in [
            ("a", "a"),
            ("../../etc/passwd", "passwd"),
            ("..", "f"),
            ("", "f"),
            ("a/", "a"),
            ("/", "f"),
        ] {
            assert_eq!(safe_name(name, "f"), safe, "{name}");
        }
    }

    #[test]
    fn a_file_that_looks_different_has_another_key() {
        let file = SingleFile {
            digest: Digest::of(b"x"),
            name: "a".into(),
            looks: Looks { mode: 0o600, uid: 0, gid: 0 },
            mtime: 0,
        };
        let others = [
            SingleFile { digest: Digest::of(b"y"), ..file.clone() },
            SingleFile { name: "b".into(), ..file.clone() },
            SingleFile { looks: Looks { mode: 0o644, ..file.looks }, ..file.clone() },
            SingleFile { looks: Looks { gid: 1, ..file.looks }, ..file.clone() },
            SingleFile { mtime: 1, ..file.clone() },
        ];
        assert!(others.iter().all(|other| other.key() != file.key()));
        assert_eq!(file.digest.to_sha256().unwrap().len(), 32);
    }

    #[test]
    fn blobs_need_a_digest_and_a_place() {
        let read = |identifier: &str, store: &str| {
            let mut source = pb::SourceOp { identifier: identifier.into(), ..Default::default() };
            source.attrs.insert("oci.store".into(), store.into());
            source.attrs.insert("http.filename".into(), "../x".into());
            BlobSource::read(&source)
        };
        let digest = Digest::of(b"x");
        let blob = read(&format!("oci-layout+blob://a@{digest}"), "s").unwrap();
        assert_eq!((blob.place, blob.file.name.as_str()), (BlobPlace::Layout("s".into()), "x"));
        assert!(read(&format!("oci-layout+blob://a@{digest}"), "").is_err());
        assert!(read("docker-image+blob://a:1", "").is_err());
        assert!(read(&format!("docker-image+blob://h/a@{digest}"), "").is_ok());
    }
}
