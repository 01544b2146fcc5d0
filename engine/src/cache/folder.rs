//! Caches in folders: OCI image layouts that caches are written to and read from.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use slipway_solver::client::ByteStream;
use slipway_spec::manifest::{Document, MAX_MANIFEST_BYTES, to_bytes};
use slipway_spec::{Descriptor, Digest, Index, MediaType};
use slipway_store::image::ANNOTATION_REF;
use slipway_store::{Error, ErrorKind, OCI_LAYOUT, blocking};

/// Folders of the client that caches are in.
#[async_trait]
pub trait CacheFolders: Debug + Send + Sync {
    /// Finds a cache by what it is called; `None` when there is none of that name.
    async fn find(&self, folder: &str, tag: &str) -> Result<Option<Digest>, Error>;

    /// Opens content; `None` when it is not there. Whoever reads it checks the digest.
    async fn open(&self, folder: &str, digest: &Digest) -> Result<Option<ByteStream>, Error>;

    /// Returns the size of content; `None` when it is not there.
    async fn size(&self, folder: &str, digest: &Digest) -> Result<Option<u64>, Error>;

    /// Writes content that is in a file of this machine.
    async fn write(&self, folder: &str, content: &Descriptor, file: &Path) -> Result<(), Error>;

    /// Has a cache called something, once all of its content is there. With `reset`, content that nothing needs is removed.
    async fn name(
        &self,
        folder: &str,
        tag: &str,
        manifest: &Descriptor,
        reset: bool,
    ) -> Result<(), Error>;
}

/// Folders of this machine, by their path.
#[derive(Clone, Copy, Debug, Default)]
pub struct LocalCaches;

/// Documents may refer to documents this deep.
const MAX_DEPTH: usize = 4;

fn failed(what: &str, path: &Path, error: io::Error) -> Error {
    Error::io(format!("cannot {what} {}", path.display()), error)
}

fn blob_path(folder: &Path, digest: &Digest) -> PathBuf {
    folder.join("blobs").join(digest.algorithm().as_str()).join(digest.hex())
}

fn size_of(path: &Path) -> Result<Option<u64>, Error> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(metadata.is_file().then_some(metadata.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path, error)),
    }
}

/// Writes a file whole or not at all.
fn replace(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), Error> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}-{number}", std::process::id()));
    let written = write(&temporary).and_then(|()| fs::rename(&temporary, path));
    written.map_err(|error| {
        // What is half written is of use to nobody; that it cannot be removed is the smaller problem.
        drop(fs::remove_file(&temporary));
        failed("write", path, error)
    })
}

/// Keeps others from changing the index of a folder.
struct IndexLock {
    path: PathBuf,
    _file: File,
}

impl IndexLock {
    fn take(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("index.json.lock");
        loop {
            let taken = || -> io::Result<(File, bool)> {
                let file = File::options().create(true).append(true).open(&path)?;
                file.lock()?;
                let own = file.metadata()?.ino();
                // Whoever had it before has removed it.
                let same = fs::metadata(&path).is_ok_and(|there| there.ino() == own);
                Ok((file, same))
            };
            let (file, same) = taken().map_err(|error| failed("lock", &path, error))?;
            if same {
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for IndexLock {
    fn drop(&mut self) {
        // A lock file that stays behind is no obstacle.
        drop(fs::remove_file(&self.path));
    }
}

fn read_index(folder: &Path) -> Result<Option<Index>, Error> {
    let path = folder.join("index.json");
    let Some(size) = size_of(&path)? else { return Ok(None) };
    let damaged = |why: String| {
        Error::new(ErrorKind::Corrupt, format!("cannot use {}: {why}", path.display()))
    };
    if size > MAX_MANIFEST_BYTES {
        return Err(damaged(format!("it has {size} bytes")));
    }
    let bytes = fs::read(&path).map_err(|error| failed("read", &path, error))?;
    if bytes.is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(&bytes).map(Some).map_err(|error| damaged(error.to_string()))
}

fn tag_of(entry: &Descriptor) -> Option<&str> {
    entry.annotations.get(ANNOTATION_REF).map(String::as_str)
}

fn name(folder: &Path, tag: &str, manifest: &Descriptor, reset: bool) -> Result<(), Error> {
    let _lock = IndexLock::take(folder)?;
    replace(&folder.join("oci-layout"), |path| fs::write(path, OCI_LAYOUT))?;
    let mut index = read_index(folder)?.unwrap_or(Index {
        schema_version: 2,
        media_type: Some(MediaType::OCI_INDEX),
        manifests: vec![],
        annotations: BTreeMap::new(),
    });
    index.manifests.retain(|entry| tag_of(entry) != Some(tag));
    let mut entry = manifest.clone();
    entry.annotations.insert(ANNOTATION_REF.into(), tag.into());
    index.manifests.push(entry);
    let bytes = to_bytes(&index);
    replace(&folder.join("index.json"), |path| fs::write(path, &bytes))?;
    if reset { remove_unused(folder, &index) } else { Ok(()) }
}

/// Removes content that nothing in the index leads to.
fn remove_unused(folder: &Path, index: &Index) -> Result<(), Error> {
    let mut used: HashSet<Digest> = HashSet::new();
    let mut todo: Vec<(Descriptor, usize)> =
        index.manifests.iter().map(|entry| (entry.clone(), 0)).collect();
    while let Some((entry, depth)) = todo.pop() {
        let document = entry.media_type.is_index() || entry.media_type.is_manifest();
        if !used.insert(entry.digest.clone()) || !document || depth > MAX_DEPTH {
            continue;
        }
        let path = blob_path(folder, &entry.digest);
        if size_of(&path)?.is_none_or(|size| size > MAX_MANIFEST_BYTES) {
            continue;
        }
        let bytes = fs::read(&path).map_err(|error| failed("read", &path, error))?;
        // What cannot be read needs nothing.
        let needed = match Document::parse(&bytes) {
            Ok(Document::Index(index)) => index.manifests,
            Ok(Document::Manifest(manifest)) => {
                manifest.layers.into_iter().chain([manifest.config]).collect()
            }
            Err(_) => vec![],
        };
        todo.extend(needed.into_iter().map(|entry| (entry, depth + 1)));
    }
    for algorithm in ["sha256", "sha512"] {
        let blobs = folder.join("blobs").join(algorithm);
        let entries = match fs::read_dir(&blobs) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed("read", &blobs, error)),
        };
        for entry in entries {
            let entry = entry.map_err(|error| failed("read", &blobs, error))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Other files are none of ours.
            let Ok(digest) = format!("{algorithm}:{name}").parse::<Digest>() else { continue };
            if !used.contains(&digest) {
                fs::remove_file(entry.path())
                    .map_err(|error| failed("remove", &entry.path(), error))?;
            }
        }
    }
    Ok(())
}

#[async_trait]
impl CacheFolders for LocalCaches {
    async fn find(&self, folder: &str, tag: &str) -> Result<Option<Digest>, Error> {
        let (folder, tag) = (PathBuf::from(folder), tag.to_owned());
        blocking::run(move || {
            let index = read_index(&folder)?;
            let found = index.iter().flat_map(|index| &index.manifests);
            let found = found.into_iter().find(|entry| tag_of(entry) == Some(&tag));
            Ok(found.map(|entry| entry.digest.clone()))
        })
        .await
    }

    async fn open(&self, folder: &str, digest: &Digest) -> Result<Option<ByteStream>, Error> {
        let path = blob_path(Path::new(folder), digest);
        match tokio::fs::File::open(&path).await {
            Ok(file) => Ok(Some(Box::new(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path, error)),
        }
    }

    async fn size(&self, folder: &str, digest: &Digest) -> Result<Option<u64>, Error> {
        let path = blob_path(Path::new(folder), digest);
        blocking::run(move || size_of(&path)).await
    }

    async fn write(&self, folder: &str, content: &Descriptor, file: &Path) -> Result<(), Error> {
        let (path, file) = (blob_path(Path::new(folder), &content.digest), file.to_path_buf());
        let size = content.size;
        blocking::run(move || {
            if size_of(&path)? == Some(size) {
                return Ok(());
            }
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).map_err(|error| failed("create", parent, error))?;
            }
            replace(&path, |temporary| fs::copy(&file, temporary).map(drop))
        })
        .await
    }

    async fn name(
        &self,
        folder: &str,
        tag: &str,
        manifest: &Descriptor,
        reset: bool,
    ) -> Result<(), Error> {
        let (folder, tag, manifest) = (PathBuf::from(folder), tag.to_owned(), manifest.clone());
        blocking::run(move || name(&folder, &tag, &manifest, reset)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn put(folder: &str, bytes: &[u8]) -> Descriptor {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        let blob = Descriptor::new(MediaType::OCI_MANIFEST, Digest::of(bytes), bytes.len() as u64);
        LocalCaches.write(folder, &blob, file.path()).await.unwrap();
        blob
    }

    #[tokio::test]
    async fn caches_have_names_and_what_nothing_needs_goes() {
        let room = tempfile::tempdir().unwrap();
        let folder = room.path().join("a/b").to_str().unwrap().to_owned();
        assert_eq!(LocalCaches.find(&folder, "latest").await.unwrap(), None);
        let layer = put(&folder, b"layer").await;
        let manifest = |layer: &Descriptor| {
            let layer = serde_json::to_string(layer).unwrap();
            format!(r#"{{"schemaVersion":2,"config":{layer},"layers":[{layer}]}}"#)
        };
        let one = put(&folder, manifest(&layer).as_bytes()).await;
        LocalCaches.name(&folder, "latest", &one, false).await.unwrap();
        LocalCaches.name(&folder, "other", &one, false).await.unwrap();
        let found = LocalCaches.find(&folder, "other").await.unwrap();
        assert_eq!(found.as_ref(), Some(&one.digest));
        assert_eq!(LocalCaches.find(&folder, "third").await.unwrap(), None);

        let newer = put(&folder, b"newer").await;
        let two = put(&folder, manifest(&newer).as_bytes()).await;
        LocalCaches.name(&folder, "latest", &two, true).await.unwrap();
        for blob in [&layer, &one, &newer, &two] {
            let size = LocalCaches.size(&folder, &blob.digest).await.unwrap();
            assert_eq!(size, Some(blob.size), "all of it is needed");
        }
        LocalCaches.name(&folder, "other", &two, true).await.unwrap();
        assert_eq!(LocalCaches.size(&folder, &layer.digest).await.unwrap(), None);
        assert!(LocalCaches.open(&folder, &one.digest).await.unwrap().is_none());
        assert_eq!(LocalCaches.size(&folder, &newer.digest).await.unwrap(), Some(5));
        let mut left: Vec<_> = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["blobs", "index.json", "oci-layout"]);
    }

    #[tokio::test]
    async fn an_index_that_makes_no_sense_is_an_error_and_stays() {
        let room = tempfile::tempdir().unwrap();
        let folder = room.path().to_str().unwrap();
        fs::write(room.path().join("index.json"), "{").unwrap();
        let error = LocalCaches.find(folder, "latest").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let blob = put(folder, b"x").await;
        LocalCaches.name(folder, "latest", &blob, true).await.unwrap_err();
        assert_eq!(fs::read_to_string(room.path().join("index.json")).unwrap(), "{");
        assert_eq!(LocalCaches.size(folder, &blob.digest).await.unwrap(), Some(1));
    }
}
