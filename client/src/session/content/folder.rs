//! An OCI image layout in a folder.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;
use serde_json::Value;
use slipway_spec::wire::content::Info;
use slipway_spec::{Descriptor, Digest, ImageReference, Index, MediaType};
use slipway_store::image::{ANNOTATION_NAME, ANNOTATION_REF};
use slipway_store::{Error, ErrorKind, OCI_LAYOUT};

use super::ingest::Ingest;

/// An index that is larger is none.
const MAX_INDEX: u64 = 16 << 20;

/// An OCI image layout in a folder. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentFolder {
    path: PathBuf,
    writable: bool,
}

fn failed(verb: &str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let what = format!("cannot {verb} {}", path.display());
    move |error| Error::io(what, error)
}

fn time(time: io::Result<SystemTime>) -> Option<Timestamp> {
    let since = time.ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(Timestamp {
        seconds: i64::try_from(since.as_secs()).ok()?,
        nanos: i32::try_from(since.subsec_nanos()).ok()?,
    })
}

impl ContentFolder {
    /// Offers a layout for reading; it need not be there yet.
    pub fn read_only(path: &Path) -> Self {
        Self { path: path.to_path_buf(), writable: false }
    }

    /// Offers a layout for reading and writing; what is missing of it is made.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn writable(path: &Path) -> Result<Self, Error> {
        for part in ["blobs/sha256", "ingest"] {
            let part = path.join(part);
            fs::create_dir_all(&part).map_err(failed("create", &part))?;
        }
        Ok(Self { path: path.to_path_buf(), writable: true })
    }

    pub(super) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Returns the place of a blob. A digest is letters and digits only.
    pub(super) fn blob(&self, digest: &Digest) -> PathBuf {
        self.path.join("blobs").join(digest.algorithm().as_str()).join(digest.hex())
    }

    pub(super) fn ingest(&self) -> Result<Ingest, Error> {
        Ingest::new(&self.path)
    }

    pub(super) fn info(&self, digest: &Digest) -> Result<Option<Info>, Error> {
        let path = self.blob(digest);
        let metadata = match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => metadata,
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        Ok(Some(Info {
            digest: digest.to_string(),
            size: i64::try_from(metadata.len()).unwrap_or(i64::MAX),
            created_at: time(metadata.modified()),
            updated_at: time(metadata.modified()),
            labels: BTreeMap::new(),
        }))
    }

    /// Lists all blobs, in order.
    pub(super) fn list(&self) -> Result<Vec<Info>, Error> {
        let folder = self.path.join("blobs/sha256");
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(error) => return Err(failed("list", &folder)(error)),
        };
        let mut found = vec![];
        for entry in entries {
            let entry = entry.map_err(failed("list", &folder))?;
            let name = format!("sha256:{}", entry.file_name().to_string_lossy());
            if let Ok(digest) = name.parse() {
                found.extend(self.info(&digest)?);
            }
        }
        found.sort_by(|a, b| a.digest.cmp(&b.digest));
        Ok(found)
    }

    fn index(&self) -> Result<Option<Value>, Error> {
        let path = self.path.join("index.json");
        let text = match fs::metadata(&path) {
            Ok(metadata) if metadata.len() > MAX_INDEX => {
                let what = format!("{} is too large for an index", path.display());
                return Err(Error::new(ErrorKind::Invalid, what));
            }
            Ok(_) => fs::read(&path).map_err(failed("read", &path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        let parsed = serde_json::from_slice(&text).map_err(|error| {
            let what = format!("{} is no index", path.display());
            Error::new(ErrorKind::Invalid, what).because(error)
        })?;
        Ok(Some(parsed))
    }

    /// Finds what a tag of the layout points at; `None` when it has no such tag, or is no layout at all.
    ///
    /// # Errors
    /// When its index cannot be read.
    pub fn resolve(&self, tag: &str) -> Result<Option<Descriptor>, Error> {
        let Some(index) = self.index()? else { return Ok(None) };
        let index: Index = serde_json::from_value(index).map_err(|error| {
            let what = format!("the index of {} is malformed", self.path.display());
            Error::new(ErrorKind::Invalid, what).because(error)
        })?;
        let named = |descriptor: &&Descriptor| {
            let annotations = &descriptor.annotations;
            let reference = annotations.get(ANNOTATION_REF).map(String::as_str);
            let name = annotations.get(ANNOTATION_NAME).map(String::as_str);
            reference == Some(tag) || name == Some(tag)
        };
        Ok(index.manifests.iter().find(named).cloned())
    }

    /// Puts an image into the index under each of these names, in place of what had them.
    ///
    /// # Errors
    /// When the index cannot be read or written.
    pub fn name(&self, target: &Descriptor, names: &[LayoutName]) -> Result<(), Error> {
        let parsed = self.index()?.map(serde_json::from_value::<Index>).transpose();
        let mut index = parsed.ok().flatten().unwrap_or(Index {
            schema_version: 2,
            media_type: Some(MediaType::OCI_INDEX),
            manifests: vec![],
            annotations: BTreeMap::new(),
        });
        for name in names {
            let (full, tag) = match name {
                LayoutName::Tag(tag) => (None, Some(tag.clone())),
                LayoutName::Name(name) => {
                    let reference = name.parse::<ImageReference>().ok();
                    let tag = reference.and_then(|name| name.tag().map(str::to_owned));
                    (Some(name.clone()), tag)
                }
            };
            let mut entry = target.clone();
            entry.annotations.extend(full.clone().map(|full| (ANNOTATION_NAME.into(), full)));
            entry.annotations.extend(tag.clone().map(|tag| (ANNOTATION_REF.into(), tag)));
            index.manifests.retain(|other| {
                let annotations = &other.annotations;
                let same_name = annotations.get(ANNOTATION_NAME) == full.as_ref();
                !(same_name && annotations.get(ANNOTATION_REF) == tag.as_ref())
            });
            index.manifests.push(entry);
        }
        let text = serde_json::to_vec(&index).map_err(|error| {
            Error::new(ErrorKind::Invalid, "cannot write the index").because(error)
        })?;
        self.replace("oci-layout", OCI_LAYOUT)?;
        self.replace("index.json", &text)
    }

    /// Gives a file new content in one step.
    fn replace(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        let path = self.path.join(name);
        let temporary = self.path.join(format!(".{name}.{}.tmp", std::process::id()));
        let write = || {
            let mut file = fs::File::create(&temporary)?;
            file.write_all(content)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|error| {
            // Only what was half written; the error above it is the one to tell.
            let _gone = fs::remove_file(&temporary);
            failed("write", &path)(error)
        })
    }
}

/// What an image is called in a layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayoutName {
    /// A tag alone.
    Tag(String),
    /// The full name of an image.
    Name(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_take_the_place_of_what_had_them() {
        let place = tempfile::tempdir().unwrap();
        let folder = ContentFolder::writable(place.path()).unwrap();
        let target = |text: &[u8]| Descriptor::new(MediaType::OCI_MANIFEST, Digest::of(text), 1);
        assert_eq!(folder.resolve("latest").unwrap(), None);
        let latest = [LayoutName::Tag("latest".into())];
        folder.name(&target(b"1"), &latest).unwrap();
        folder.name(&target(b"2"), &latest).unwrap();
        let name = "docker.io/library/a:v1";
        folder.name(&target(b"3"), &[LayoutName::Name(name.into())]).unwrap();
        assert_eq!(folder.resolve("latest").unwrap().unwrap().digest, Digest::of(b"2"));
        assert_eq!(folder.resolve("v1").unwrap().unwrap().digest, Digest::of(b"3"));
        assert_eq!(folder.resolve(name).unwrap().unwrap().digest, Digest::of(b"3"));
        assert_eq!(folder.resolve("v2").unwrap(), None);
        let text = fs::read_to_string(place.path().join("index.json")).unwrap();
        assert_eq!(serde_json::from_str::<Index>(&text).unwrap().manifests.len(), 2);
        assert!(place.path().join("oci-layout").exists());
        fs::write(place.path().join("index.json"), "{").unwrap();
        assert!(folder.resolve("latest").is_err());
    }
}
