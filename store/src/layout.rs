//! Images as archives: written as an OCI image layout that Docker reads too, read in both of their forms.
//!
//! An archive is a tar with `oci-layout`, `index.json`, `blobs/<algorithm>/<hex>` and, for Docker, `manifest.json` whose
//! paths point at the same blobs. Archives that are read may come in any order, compressed or not; nothing is trusted
//! that does not hash to its name, and no name in an archive is ever used as a path.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};
use slipway_spec::manifest::{self, Document};
use slipway_spec::media_type::Compression;
use slipway_spec::{
    Descriptor, Digest, Hasher, ImageConfig, ImageReference, Index, Manifest, MediaType, Platform,
};

use crate::error::{Error, ErrorKind, IoContext as _, Result};
use crate::image::{ANNOTATION_NAME, ANNOTATION_REF, MAX_CONFIG_BYTES};
use crate::layer::reader::TarReader;
use crate::layer::{self, EntryKind, TarWriter, compression};
use crate::tree::clean;
use crate::{OCI_LAYOUT, Store};

/// Documents beside the blobs may have this many bytes.
const MAX_JSON: u64 = 20 * 1024 * 1024;

/// An archive may name this many files.
const MAX_FILES: usize = 1_000_000;

/// Names in an archive may have this many bytes, as paths in Linux.
const MAX_NAME: usize = 4096;

/// An image to be written.
#[derive(Clone, Debug)]
pub struct ArchiveImage {
    /// Full names; may be empty.
    pub names: Vec<String>,
    /// What the names point at, with the annotations that the index of the archive is to have.
    pub target: Descriptor,
}

/// One image of Docker's `manifest.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default, deserialize_with = "nullable")]
    repo_tags: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    layers: Vec<String>,
}

fn nullable<'de, D, T>(deserializer: D) -> std::result::Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().as_str(), digest.hex())
}

impl Store {
    /// Writes images as an archive. The bytes depend on the images and names alone. Platforms of an index that are not
    /// in the store are left out of the archive, though the index still names them.
    ///
    /// # Errors
    /// When a manifest is missing, or the output fails.
    pub fn save(
        &self,
        images: &[ArchiveImage],
        platform: &Platform,
        out: &mut dyn Write,
    ) -> Result<()> {
        let mut index = Index {
            schema_version: 2,
            media_type: Some(MediaType::OCI_INDEX),
            manifests: vec![],
            annotations: BTreeMap::new(),
        };
        let mut docker: Vec<DockerImage> = vec![];
        let mut blobs: BTreeMap<String, Descriptor> = BTreeMap::new();
        for image in images {
            let closure = self.closure(&image.target)?;
            if closure.documents.is_empty() {
                return Err(Error::missing_blob(&image.target.digest));
            }
            for descriptor in closure.documents.iter().chain(&closure.blobs) {
                blobs.insert(blob_name(&descriptor.digest), descriptor.clone());
            }
            let names: Vec<Option<&String>> = if image.names.is_empty() {
                vec![None]
            } else {
                image.names.iter().map(Some).collect()
            };
            for name in &names {
                let mut entry = image.target.clone();
                if let Some(name) = name {
                    entry.annotations.insert(ANNOTATION_NAME.into(), (*name).clone());
                    let reference = name.parse::<ImageReference>().ok();
                    if let Some(tag) = reference.as_ref().and_then(ImageReference::tag) {
                        entry.annotations.insert(ANNOTATION_REF.into(), tag.into());
                    }
                }
                index.manifests.push(entry);
            }
            // Docker's list has one platform per image: this machine's, or else the first.
            let mut candidates = self.platforms(&image.target)?;
            candidates.retain(|c| {
                let parts = c.manifest.layers.iter().chain([&c.manifest.config]);
                parts.map(|part| blob_name(&part.digest)).all(|name| blobs.contains_key(&name))
            });
            candidates
                .sort_by_key(|candidate| platform.rank(&candidate.platform).unwrap_or(usize::MAX));
            if let Some(best) = candidates.first() {
                docker.push(DockerImage {
                    config: blob_name(&best.manifest.config.digest),
                    repo_tags: names
                        .iter()
                        .filter_map(|name| {
                            name.and_then(|name| name.parse::<ImageReference>().ok())
                        })
                        .filter(|reference| reference.tag().is_some())
                        .map(|reference| reference.without_digest().familiar())
                        .collect(),
                    layers: best
                        .manifest
                        .layers
                        .iter()
                        .map(|layer| blob_name(&layer.digest))
                        .collect(),
                });
            }
        }
        let failed = || "cannot write the archive".to_owned();
        let mut tar = TarWriter::new(out);
        let mut folders = std::collections::BTreeSet::from(["blobs".to_owned()]);
        folders.extend(
            blobs
                .keys()
                .filter_map(|name| name.rsplit_once('/').map(|(folder, _)| folder.to_owned())),
        );
        for folder in folders {
            tar.append(&layer::Entry::new(folder, EntryKind::Directory, 0o755), &mut io::empty())
                .context(failed)?;
        }
        for (name, descriptor) in &blobs {
            let digest = &descriptor.digest;
            let size = self.blob_size(digest)?.ok_or_else(|| Error::missing_blob(digest))?;
            if size != descriptor.size {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("{digest} has {size} bytes, where the image says {}", descriptor.size),
                ));
            }
            let mut file = Hashing { inner: self.open_blob(digest)?, hasher: digest.verifier() };
            let entry = layer::Entry::new(name.as_str(), EntryKind::File { size }, 0o444);
            tar.append(&entry, &mut file)
                .context(|| format!("cannot write {digest} into the archive"))?;
            if file.hasher.finish() != *digest {
                return Err(self.damaged(digest));
            }
        }
        let mut json = |name: &str, bytes: &[u8]| {
            let entry =
                layer::Entry::new(name, EntryKind::File { size: bytes.len() as u64 }, 0o444);
            tar.append(&entry, &mut &*bytes).context(failed)
        };
        json("index.json", &serde_json::to_vec(&index).expect("indexes have string keys only"))?;
        if !docker.is_empty() {
            json("manifest.json", &serde_json::to_vec(&docker).expect("plain data"))?;
        }
        json("oci-layout", OCI_LAYOUT)?;
        tar.finish().context(failed)?;
        Ok(())
    }

    /// Reads an archive and names what is in it. Returns the images.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when it is not an image archive or something in it is damaged or missing; no name has
    /// changed then.
    pub fn load(&self, archive: Box<dyn Read + Send>) -> Result<Vec<ArchiveImage>> {
        let invalid =
            |why: &str| Error::new(ErrorKind::Invalid, format!("not an image archive: {why}"));
        let reader = compression::decoder(archive)
            .map_err(|error| invalid("cannot be read").because(error))?;
        let found = self.spool(reader)?;
        let images = if let Some(bytes) = found.documents.get("index.json") {
            self.load_layout(bytes)?
        } else if let Some(bytes) = found.documents.get("manifest.json") {
            self.load_docker(bytes, &found)?
        } else {
            return Err(invalid("it has neither index.json nor manifest.json"));
        };
        for image in &images {
            for platform in self.platforms(&image.target)? {
                let blobs = platform.manifest.layers.iter().chain([&platform.manifest.config]);
                let here =
                    blobs.map(|blob| self.has_blob(&blob.digest)).collect::<Result<Vec<_>>>()?;
                if here.iter().all(|here| *here) {
                    self.know_layers(&platform.manifest)?;
                }
            }
            let names = match image.names.as_slice() {
                [] => vec![format!("<none>@{}", image.target.digest)],
                names => names.to_vec(),
            };
            self.name_image(&names, &image.target)?;
        }
        Ok(images)
    }

    fn spool(&self, reader: Box<dyn Read + Send>) -> Result<Spooled> {
        let damaged = |error: io::Error| {
            Error::new(ErrorKind::Invalid, "not an image archive, or a damaged one").because(error)
        };
        let mut found = Spooled::default();
        let mut archive = TarReader::new(reader);
        while let Some(entry) =
            archive.next_entry().map_err(|error| damaged(io::Error::other(error)))?
        {
            let name = String::from_utf8_lossy(&clean(&entry.path)).into_owned();
            let link = match &entry.kind {
                EntryKind::Symlink { target } => {
                    Some((name.rsplit_once('/').map_or("", |(folder, _)| folder), target))
                }
                EntryKind::HardLink { target } => Some(("", target)),
                EntryKind::File { .. } => None,
                _ => continue,
            };
            if found.files.len() + found.documents.len() + found.links.len() >= MAX_FILES
                || name.len() > MAX_NAME
            {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    "the archive has too many files, or too long names",
                ));
            }
            let twice = || {
                let why = format!("the archive holds {name:?} twice, with different content");
                Err(Error::new(ErrorKind::Invalid, why))
            };
            if let Some((folder, target)) = link {
                let target = clean(&[folder.as_bytes(), b"/", target].concat());
                found.links.insert(name, String::from_utf8_lossy(&target).into_owned());
                continue;
            }
            if matches!(
                name.as_str(),
                "index.json" | "manifest.json" | "oci-layout" | "repositories"
            ) {
                let mut bytes = vec![];
                (&mut archive).take(MAX_JSON + 1).read_to_end(&mut bytes).map_err(damaged)?;
                if bytes.len() as u64 > MAX_JSON {
                    return Err(Error::new(
                        ErrorKind::Invalid,
                        format!("{name} in the archive is larger than 20 MiB"),
                    ));
                }
                if found.documents.get(&name).is_some_and(|before| *before != bytes) {
                    return twice();
                }
                found.documents.insert(name, bytes);
                continue;
            }
            let expected = name
                .strip_prefix("blobs/")
                .and_then(|rest| rest.replacen('/', ":", 1).parse::<Digest>().ok());
            if let Some(digest) = &expected
                && self.has_blob(digest)?
            {
                // Its bytes need not be read a second time.
                found.files.insert(name, digest.clone());
                continue;
            }
            let mut writer = match &expected {
                Some(digest) => self.write_expected(digest)?,
                None => self.write_blob()?,
            };
            copy(&mut archive, &mut writer)?;
            let (digest, size) = match &expected {
                Some(digest) => {
                    let descriptor =
                        Descriptor::new(MediaType::OCI_LAYER, digest.clone(), writer.size());
                    writer.commit(Some(&descriptor)).map_err(|error| match error.kind() {
                        ErrorKind::Corrupt => {
                            Error::new(ErrorKind::Invalid, "the archive is damaged").because(error)
                        }
                        _ => error,
                    })?
                }
                None => writer.commit(None)?,
            };
            tracing::trace!(%digest, size, name, "read from the archive");
            if found.files.get(&name).is_some_and(|before| *before != digest) {
                return twice();
            }
            found.files.insert(name, digest);
        }
        Ok(found)
    }

    fn load_layout(&self, index: &[u8]) -> Result<Vec<ArchiveImage>> {
        let index: Index = serde_json::from_slice(index).map_err(|error| {
            Error::new(ErrorKind::Invalid, "index.json in the archive").because(error)
        })?;
        let mut images: Vec<ArchiveImage> = vec![];
        for entry in &index.manifests {
            if entry.annotations.contains_key("io.containerd.manifest.subject") {
                continue;
            }
            if !self.has_blob(&entry.digest)? {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("the archive names {} but does not hold it", entry.digest),
                ));
            }
            self.check_complete(entry)?;
            let name = entry.annotations.get(ANNOTATION_NAME).or_else(|| {
                // Only a text that cannot be a mere tag is taken for a name.
                entry.annotations.get(ANNOTATION_REF).filter(|text| text.contains(['/', ':']))
            });
            let name = name
                .and_then(|name| name.parse::<ImageReference>().ok())
                .map(|r| r.without_digest().to_string());
            let size = self.blob_size(&entry.digest)?.unwrap_or(entry.size);
            let target = Descriptor::new(entry.media_type.clone(), entry.digest.clone(), size);
            match images.iter_mut().find(|image| image.target.digest == target.digest) {
                Some(image) => image.names.extend(name),
                None => images.push(ArchiveImage { names: name.into_iter().collect(), target }),
            }
        }
        if images.is_empty() {
            return Err(Error::new(ErrorKind::Invalid, "the archive holds no image"));
        }
        Ok(images)
    }

    /// An image must be there for at least one platform, and what is there must be whole.
    fn check_complete(&self, target: &Descriptor) -> Result<()> {
        let closure = self.closure(target)?;
        let whole = match self.document(target)? {
            Document::Manifest(_) => closure.missing.is_empty(),
            Document::Index(index) => {
                let complete = |entry: &Descriptor| -> Result<bool> {
                    let document = entry.media_type.is_index() || entry.media_type.is_manifest();
                    // What is said of an image is not the image.
                    Ok(document
                        && !entry.is_attestation()
                        && self.has_blob(&entry.digest)?
                        && self.closure(entry)?.missing.is_empty())
                };
                index.manifests.is_empty()
                    || index
                        .manifests
                        .iter()
                        .map(complete)
                        .collect::<Result<Vec<_>>>()?
                        .into_iter()
                        .any(|c| c)
            }
        };
        match closure.missing.first() {
            Some(missing) if !whole => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "the archive is incomplete: {} {} is not in it",
                    missing.media_type, missing.digest
                ),
            )),
            _ => Ok(()),
        }
    }

    fn load_docker(&self, list: &[u8], found: &Spooled) -> Result<Vec<ArchiveImage>> {
        let list: Vec<DockerImage> = serde_json::from_slice(list).map_err(|error| {
            Error::new(ErrorKind::Invalid, "manifest.json in the archive").because(error)
        })?;
        list.iter().map(|image| self.load_docker_image(image, found)).collect()
    }

    fn load_docker_image(&self, image: &DockerImage, found: &Spooled) -> Result<ArchiveImage> {
        let missing = |name: &str| {
            Error::new(
                ErrorKind::Invalid,
                format!("the archive names {name:?} but does not hold it"),
            )
        };
        let digest = found.resolve(&image.config).ok_or_else(|| missing(&image.config))?;
        let config_bytes = self.read_blob(digest, MAX_CONFIG_BYTES)?;
        let config: ImageConfig = serde_json::from_slice(&config_bytes).map_err(|error| {
            Error::new(ErrorKind::Invalid, format!("{} in the archive", image.config))
                .because(error)
        })?;
        if config.rootfs.diff_ids.len() != image.layers.len() {
            return Err(Error::new(
                ErrorKind::Invalid,
                "the archive's config and its list name different layers",
            ));
        }
        let mut layers = vec![];
        for (name, diff_id) in image.layers.iter().zip(&config.rootfs.diff_ids) {
            let digest = found.resolve(name).ok_or_else(|| missing(name))?;
            let compression = self.check_layer(digest, diff_id)?;
            layers.push(self.describe_blob(digest, MediaType::layer(compression, false))?);
        }
        let document = Manifest {
            schema_version: 2,
            media_type: Some(MediaType::OCI_MANIFEST),
            artifact_type: None,
            config: Descriptor::new(
                MediaType::OCI_CONFIG,
                digest.clone(),
                config_bytes.len() as u64,
            ),
            layers,
            subject: None,
            annotations: BTreeMap::new(),
        };
        let target = self.put(MediaType::OCI_MANIFEST, &manifest::to_bytes(&document))?;
        let names = image
            .repo_tags
            .iter()
            .map(|tag| {
                let reference: ImageReference = tag.parse().map_err(|error| {
                    Error::new(ErrorKind::Invalid, "a name in the archive's manifest.json")
                        .because(error)
                })?;
                Ok(reference.to_string())
            })
            .collect::<Result<_>>()?;
        Ok(ArchiveImage { names, target })
    }

    /// Docker's archives do not name layers by digest, so each is compared with the diff id its config promises.
    fn check_layer(&self, digest: &Digest, diff_id: &Digest) -> Result<Compression> {
        let mut head = [0; compression::SNIFF_LEN];
        let mut file = self.open_blob(digest)?;
        let read = file.read(&mut head).context(|| format!("cannot read {digest}"))?;
        let compression = compression::sniff(&head[..read]).of_layer().ok_or_else(|| {
            Error::new(ErrorKind::Invalid, "a layer in the archive is compressed by bzip2 or xz")
        })?;
        if digest == diff_id && compression == Compression::Uncompressed {
            return Ok(compression);
        }
        let file = Box::new(self.open_blob(digest)?);
        let reader = compression::decoder(file).context(|| format!("cannot read {digest}"))?;
        let mut reader = Hashing { inner: reader, hasher: diff_id.verifier() };
        io::copy(&mut reader, &mut io::sink()).map_err(|error| {
            Error::new(ErrorKind::Invalid, "a layer in the archive is damaged").because(error)
        })?;
        if reader.hasher.finish() != *diff_id {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("a layer in the archive is not {diff_id}, which its config promises"),
            ));
        }
        Ok(compression)
    }
}

/// Hashes what is read.
struct Hashing<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// What an archive held.
#[derive(Debug, Default)]
struct Spooled {
    documents: HashMap<String, Vec<u8>>,
    files: HashMap<String, Digest>,
    links: HashMap<String, String>,
}

impl Spooled {
    /// Finds a file by its name in the archive, through links inside the archive.
    fn resolve(&self, name: &str) -> Option<&Digest> {
        let mut name = String::from_utf8(clean(name.as_bytes())).ok()?;
        for _ in 0..16 {
            match self.files.get(&name) {
                Some(digest) => return Some(digest),
                None => name = self.links.get(&name)?.clone(),
            }
        }
        None
    }
}

/// Copies an entry, telling a broken archive from a full disk.
fn copy(entry: &mut impl Read, writer: &mut impl Write) -> Result<()> {
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let read = match entry.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                return Err(Error::new(ErrorKind::Invalid, "the archive is damaged or cut short")
                    .because(error));
            }
        };
        writer
            .write_all(&buffer[..read])
            .context(|| "cannot store what the archive holds".to_owned())?;
    }
}
