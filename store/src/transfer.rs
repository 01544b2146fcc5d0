//! Between the store and registries: blobs on demand, images as a whole.

use std::collections::{BTreeSet, HashSet};
use std::io::Write as _;
use std::sync::Mutex;

use futures::StreamExt as _;
use futures::stream;
use slipway_spec::manifest::{Document, MAX_MANIFEST_BYTES};
use slipway_spec::{Descriptor, Digest, ImageReference, Index, Manifest, MediaType, Platform};
use tokio::sync::mpsc;

use crate::registry::{ManifestName, Pushed, Registry, RegistryError};
use crate::{Error, ErrorKind, Result, Store, blocking};

/// Chunks on their way from the network to the disk.
const CHUNKS: usize = 16;

/// Blobs of one image under way at once; the client bounds connections per host besides.
const BLOBS: usize = 6;

/// Indexes may be nested this deep.
const MAX_DEPTH: usize = 4;

/// What a transfer reports: `current` of `total` bytes of a blob, and whether that was all.
pub type Report<'a> = &'a (dyn Fn(&Descriptor, u64, Outcome) + Send + Sync);

/// How far a blob is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// On its way.
    Moving,
    /// There now.
    Done,
    /// It was there before.
    Existed,
    /// The registry took it from another repository.
    Mounted,
}

impl From<RegistryError> for Error {
    fn from(error: RegistryError) -> Self {
        Self::new(ErrorKind::Registry, error.to_string())
    }
}

/// Fetches a blob unless it is here. `progress` is told the number of bytes received.
///
/// # Errors
/// When the registry fails or sends something else than asked for; nothing is stored then.
pub async fn fetch_blob(
    store: &Store,
    registry: &Registry,
    reference: &ImageReference,
    descriptor: &Descriptor,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<bool> {
    let (here, digest) = (store.clone(), descriptor.digest.clone());
    if blocking::run(move || here.has_blob(&digest)).await? {
        return Ok(false);
    }
    let mut reader = registry.blob(reference, descriptor, 0).await?;
    let (sender, mut receiver) = mpsc::channel::<bytes::Bytes>(CHUNKS);
    let (disk, expected) = (store.clone(), descriptor.clone());
    // The disk side ends by itself when the network side is dropped: the channel closes too early and nothing is kept.
    let written = blocking::run(move || {
        let mut writer = disk.write_expected(&expected.digest)?;
        while let Some(chunk) = receiver.blocking_recv() {
            writer.write_all(&chunk).map_err(|error| {
                Error::io(format!("cannot write content {}", expected.digest), error)
            })?;
        }
        if writer.size() < expected.size {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("content {} ended too early", expected.digest),
            ));
        }
        writer.commit(Some(&expected)).map(drop)
    });
    let received = async {
        let mut current = 0;
        while let Some(chunk) = reader.chunk().await? {
            current += chunk.len() as u64;
            progress(current);
            if sender.send(chunk).await.is_err() {
                // The disk failed; its own error is the one to show.
                break;
            }
        }
        drop(sender);
        Ok::<_, RegistryError>(())
    };
    let (written, received) = futures::join!(written, received);
    received.map_err(Error::from)?;
    written?;
    Ok(true)
}

async fn fetch_document(
    store: &Store,
    registry: &Registry,
    reference: &ImageReference,
    digest: &Digest,
) -> Result<(Descriptor, Document)> {
    let (disk, wanted) = (store.clone(), digest.clone());
    let here = blocking::run(move || {
        if disk.has_blob(&wanted)? {
            disk.read_blob(&wanted, MAX_MANIFEST_BYTES).map(Some)
        } else {
            Ok(None)
        }
    })
    .await?;
    let bytes = match here {
        Some(bytes) => bytes,
        None => {
            let (descriptor, bytes) = registry.manifest(reference, Some(digest)).await?;
            let (disk, kept) = (store.clone(), bytes.clone());
            blocking::run(move || disk.put(descriptor.media_type, &kept)).await?;
            bytes.to_vec()
        }
    };
    let document = Document::parse(&bytes).map_err(|error| {
        Error::new(ErrorKind::Corrupt, format!("image {reference}")).because(error)
    })?;
    Ok((Descriptor::new(media_type(&document), digest.clone(), bytes.len() as u64), document))
}

/// Returns what a document calls itself.
pub fn media_type(document: &Document) -> MediaType {
    match document {
        Document::Manifest(Manifest { media_type, .. }) => {
            media_type.clone().unwrap_or(MediaType::OCI_MANIFEST)
        }
        Document::Index(Index { media_type, .. }) => {
            media_type.clone().unwrap_or(MediaType::OCI_INDEX)
        }
    }
}

/// Which parts of an image are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Platforms {
    /// Everything it is offered for, attestations included.
    All,
    /// The best match for each of these, and attestations where these are all that there is.
    Only(Vec<Platform>),
}

/// Fetches an image with its layers and names it. Returns what the name points at.
///
/// # Errors
/// When the registry fails or the image has nothing for a platform; the name does not move then.
pub async fn pull(
    store: &Store,
    registry: &Registry,
    reference: &ImageReference,
    platforms: &Platforms,
    report: Report<'_>,
) -> Result<Descriptor> {
    let digest = match reference.digest() {
        Some(digest) => digest.clone(),
        None => registry.resolve(reference).await?.digest,
    };
    let (target, document) = fetch_document(store, registry, reference, &digest).await?;
    let manifests = choose(store, registry, reference, document, platforms).await?;
    let mut wanted = vec![];
    for Chosen { manifest, besides } in &manifests {
        let layers = manifest.layers.iter().filter(|layer| layer.urls.is_empty());
        wanted.extend(layers.chain([&manifest.config]).map(|blob| (blob.clone(), *besides)));
    }
    // What an image needs must be there, even if something that is besides has it as well.
    wanted.sort_by_key(|(_, besides)| *besides);
    let mut seen = HashSet::new();
    wanted.retain(|(descriptor, _)| seen.insert(descriptor.digest.clone()));
    let fetched: Vec<Result<()>> = stream::iter(wanted)
        .map(|(descriptor, besides)| async move {
            report(&descriptor, 0, Outcome::Moving);
            let fetched = fetch_blob(store, registry, reference, &descriptor, &|current| {
                report(&descriptor, current, Outcome::Moving);
            })
            .await;
            let fetched = match fetched {
                Err(error) if besides => {
                    tracing::debug!(%reference, digest = %descriptor.digest, %error, "left out");
                    false
                }
                other => other?,
            };
            report(
                &descriptor,
                descriptor.size,
                if fetched { Outcome::Done } else { Outcome::Existed },
            );
            Ok(())
        })
        .buffer_unordered(BLOBS)
        .collect()
        .await;
    fetched.into_iter().collect::<Result<Vec<()>>>()?;
    let (disk, name, kept) = (store.clone(), reference.to_string(), target.clone());
    blocking::run(move || {
        for Chosen { manifest, .. } in manifests.iter().filter(|chosen| !chosen.besides) {
            disk.know_layers(manifest)?;
        }
        disk.name_image(&[name], &kept)
    })
    .await?;
    Ok(target)
}

/// A manifest that is wanted.
struct Chosen {
    manifest: Manifest,
    /// Whether it says something of an image, which is complete without it. Registries are tidied by people who do not
    /// know of it.
    besides: bool,
}

/// Fetches the manifests that are wanted. Where these are all images of an index, what is said of them comes along, so
/// that the index can be sent elsewhere.
async fn choose(
    store: &Store,
    registry: &Registry,
    reference: &ImageReference,
    document: Document,
    platforms: &Platforms,
) -> Result<Vec<Chosen>> {
    let mut todo = vec![(document, 0, false)];
    let mut manifests = vec![];
    let mut seen = HashSet::new();
    while let Some((document, depth, besides)) = todo.pop() {
        let index = match document {
            Document::Manifest(manifest) => {
                manifests.push(Chosen { manifest, besides });
                continue;
            }
            Document::Index(index) => index,
        };
        if depth == MAX_DEPTH {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("image {reference}: indexes are nested too deeply"),
            ));
        }
        let chosen: Vec<&Descriptor> = match platforms {
            Platforms::All => index.manifests.iter().collect(),
            Platforms::Only(wanted) => {
                let mut chosen = BTreeSet::new();
                for platform in wanted {
                    let best = index
                        .manifests
                        .iter()
                        .enumerate()
                        .filter(|(_, entry)| !entry.is_attestation())
                        .filter_map(|(at, entry)| {
                            Some((platform.rank(entry.platform.as_ref()?)?, at))
                        })
                        .min();
                    let Some((_, at)) = best else {
                        let offered: Vec<String> = index
                            .manifests
                            .iter()
                            .filter(|entry| !entry.is_attestation())
                            .filter_map(|e| e.platform.as_ref().map(ToString::to_string))
                            .collect();
                        return Err(Error::new(
                            ErrorKind::NotFound,
                            format!(
                                "image {reference} has nothing for {platform}; it is offered for {}",
                                offered.join(", ")
                            ),
                        ));
                    };
                    chosen.insert(at);
                }
                let said = |at: &usize| index.manifests[*at].is_attestation();
                if (0..index.manifests.len()).all(|at| said(&at) || chosen.contains(&at)) {
                    chosen.extend((0..index.manifests.len()).filter(said));
                }
                chosen.into_iter().map(|at| &index.manifests[at]).collect()
            }
        };
        for entry in chosen {
            // An index can name the same one a thousand times, at every depth.
            if !seen.insert(entry.digest.clone()) {
                continue;
            }
            let besides = besides || (entry.is_attestation() && *platforms != Platforms::All);
            match fetch_document(store, registry, reference, &entry.digest).await {
                Err(error) if besides => {
                    tracing::debug!(%reference, digest = %entry.digest, %error, "left out");
                }
                other => todo.push((other?.1, depth + 1, besides)),
            }
        }
    }
    Ok(manifests)
}

impl Store {
    /// Remembers which blobs hold which layers, so that a layer that is here is never fetched or unpacked again.
    ///
    /// # Errors
    /// When the config is missing or the database fails.
    pub fn know_layers(&self, manifest: &Manifest) -> Result<()> {
        if !manifest.config.media_type.is_config()
            || !manifest.layers.iter().all(|l| l.media_type.is_layer())
        {
            return Ok(());
        }
        let config = self.image_config(&manifest.config)?;
        if config.rootfs.diff_ids.len() != manifest.layers.len() {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!(
                    "config {} names another number of layers than its manifest",
                    manifest.config.digest
                ),
            ));
        }
        for (descriptor, diff_id) in manifest.layers.iter().zip(&config.rootfs.diff_ids) {
            let layer = self.layer_by_diff_id(diff_id, 0, "pulled layer")?;
            self.record_layer_blob(layer, descriptor, None)?;
        }
        Ok(())
    }

    /// Lists everything a manifest or index needs, leaves first, and what of it is not here.
    ///
    /// # Errors
    /// When a document is damaged.
    pub fn closure(&self, target: &Descriptor) -> Result<Closure> {
        let mut closure = Closure::default();
        self.collect(target, 0, &mut closure)?;
        Ok(closure)
    }

    fn collect(&self, target: &Descriptor, depth: usize, closure: &mut Closure) -> Result<()> {
        if closure.seen.contains(&target.digest) {
            return Ok(());
        }
        if depth > MAX_DEPTH {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{}: indexes are nested too deeply", target.digest),
            ));
        }
        closure.seen.insert(target.digest.clone());
        if !self.has_blob(&target.digest)? {
            closure.missing.push(target.clone());
            return Ok(());
        }
        match self.document(target)? {
            Document::Index(index) => {
                for entry in &index.manifests {
                    if entry.media_type.is_index() || entry.media_type.is_manifest() {
                        self.collect(entry, depth + 1, closure)?;
                    } else {
                        self.collect_blob(entry, closure)?;
                    }
                }
            }
            Document::Manifest(manifest) => {
                for blob in manifest.layers.iter().chain([&manifest.config]) {
                    self.collect_blob(blob, closure)?;
                }
            }
        }
        closure.documents.push(target.clone());
        Ok(())
    }

    fn collect_blob(&self, blob: &Descriptor, closure: &mut Closure) -> Result<()> {
        if closure.seen.insert(blob.digest.clone()) {
            if self.has_blob(&blob.digest)? {
                closure.blobs.push(blob.clone());
            } else {
                closure.missing.push(blob.clone());
            }
        }
        Ok(())
    }
}

/// What an image is made of.
#[derive(Debug, Default)]
pub struct Closure {
    /// Configs and layers that are here.
    pub blobs: Vec<Descriptor>,
    /// Manifests and indexes that are here, each after what it needs.
    pub documents: Vec<Descriptor>,
    /// What is needed and not here.
    pub missing: Vec<Descriptor>,
    seen: HashSet<Digest>,
}

/// Sends an image: blobs at once, then manifests from the leaves to the root, then the tag.
///
/// # Errors
/// When content is missing here or the registry fails; the tag does not move then.
pub async fn push(
    store: &Store,
    registry: &Registry,
    reference: &ImageReference,
    target: &Descriptor,
    report: Report<'_>,
) -> Result<()> {
    let (disk, root) = (store.clone(), target.clone());
    let closure = blocking::run(move || disk.closure(&root)).await?;
    if let Some(missing) = closure.missing.first() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "cannot push {reference}: {} of what it is made of are not in the store (the first is {} {}); \
                 pull the image for all its platforms first, or push a single one with --platform",
                closure.missing.len(),
                missing.media_type,
                missing.digest
            ),
        ));
    }
    // A digest that occurs in two manifests is sent once.
    let sent: Vec<Result<()>> = stream::iter(closure.blobs)
        .map(|descriptor| async move {
            report(&descriptor, 0, Outcome::Moving);
            let last = Mutex::new(0);
            let path = store.blob_path(&descriptor.digest);
            let pushed = registry
                .push_blob(reference, &descriptor, &path, &[], &|current| {
                    let mut last = last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    if current != *last {
                        *last = current;
                        report(&descriptor, current, Outcome::Moving);
                    }
                })
                .await?;
            report(
                &descriptor,
                descriptor.size,
                match pushed {
                    Pushed::Existed => Outcome::Existed,
                    Pushed::Mounted => Outcome::Mounted,
                    Pushed::Uploaded => Outcome::Done,
                },
            );
            Ok(())
        })
        .buffer_unordered(BLOBS)
        .collect()
        .await;
    sent.into_iter().collect::<Result<Vec<()>>>()?;
    for document in &closure.documents {
        let (disk, digest) = (store.clone(), document.digest.clone());
        let bytes = blocking::run(move || disk.read_blob(&digest, MAX_MANIFEST_BYTES)).await?;
        let parsed = Document::parse(&bytes).map_err(|error| {
            Error::new(ErrorKind::Corrupt, document.digest.to_string()).because(error)
        })?;
        let root = document.digest == target.digest;
        let name = match reference.tag() {
            Some(tag) if root && reference.digest().is_none() => ManifestName::Tag(tag.to_owned()),
            _ => ManifestName::Digest(document.digest.clone()),
        };
        registry.push_manifest(reference, &name, &media_type(&parsed), bytes.into()).await?;
    }
    Ok(())
}
