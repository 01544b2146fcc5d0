//! Image names: each points at a manifest or an index.
//!
//! Names are kept in the database and, for other tools, in the layout's `index.json`, which is rewritten in the same
//! transaction.

use std::collections::HashSet;

use rusqlite::{OptionalExtension as _, Transaction};
use serde::Serialize;
use slipway_spec::manifest::{Document, MAX_MANIFEST_BYTES, ManifestError};
use slipway_spec::{
    Descriptor, Digest, ImageConfig, ImageReference, Index, Manifest, MediaType, Platform,
};

use crate::Store;
use crate::error::{Error, ErrorKind, Result};
use crate::lease::now_nanos;

/// Upper bound on the size of an image config, in bytes.
pub const MAX_CONFIG_BYTES: u64 = 8 * 1024 * 1024;

/// The annotation with the full name, as containerd and BuildKit write it.
pub const ANNOTATION_NAME: &str = "io.containerd.image.name";
/// The annotation with the tag (OCI image specification, "Annotations").
pub const ANNOTATION_REF: &str = "org.opencontainers.image.ref.name";

/// A name and what it points at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Image {
    /// The full name: a reference, or `<none>@digest` of an image that lost its name.
    pub name: String,
    /// The manifest or index.
    pub target: Descriptor,
    /// When the name was made, in nanoseconds since 1970.
    pub created: i64,
    /// When the name last moved, in nanoseconds since 1970.
    pub updated: i64,
}

/// One platform's manifest of an image.
#[derive(Clone, Debug)]
pub struct PlatformManifest {
    /// Which platform it is for.
    pub platform: Platform,
    /// The manifest's descriptor.
    pub descriptor: Descriptor,
    /// The manifest.
    pub manifest: Manifest,
}

fn read_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<(String, String, i64, i64)> {
    Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
}

fn to_image((name, descriptor, created, updated): (String, String, i64, i64)) -> Result<Image> {
    let target = serde_json::from_str(&descriptor).map_err(|error| {
        Error::new(ErrorKind::Corrupt, format!("image {name} in the database")).because(error)
    })?;
    Ok(Image { name, target, created, updated })
}

impl Store {
    /// Points names at a manifest or index whose content is in the store. Everything is durable when this returns.
    ///
    /// # Errors
    /// When the target is missing or the disk fails; then no name has changed.
    pub fn name_image(&self, names: &[String], target: &Descriptor) -> Result<()> {
        if !self.has_blob(&target.digest)? {
            return Err(Error::missing_blob(&target.digest));
        }
        // Platform and annotations belong to the place that points here, not to the image.
        let target = Descriptor::new(target.media_type.clone(), target.digest.clone(), target.size);
        let text = serde_json::to_string(&target).expect("descriptors have string keys only");
        let now = now_nanos();
        let same = |name: &String| -> Result<bool> {
            Ok(self.image(name)?.is_some_and(|i| i.target == target))
        };
        if names.iter().map(same).collect::<Result<Vec<_>>>()?.iter().all(|same| *same) {
            return Ok(());
        }
        self.write_names(|t| {
            for name in names {
                t.prepare_cached(
                    "INSERT INTO image VALUES (?1, ?2, ?3, ?3)
                     ON CONFLICT (name) DO UPDATE SET descriptor = ?2, updated = ?3",
                )?
                .execute((name, &text, now))?;
            }
            Ok(())
        })
    }

    /// Changes names and what other tools see of them.
    fn write_names<T>(&self, work: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        let written = self.metadata().write_durably(|t| {
            let value = work(t)?;
            self.write_index(t)?;
            Ok(value)
        });
        // A transaction that failed at the very end leaves an index that is ahead of it.
        if written.is_err()
            && let Err(error) = self.metadata().write(|t| self.write_index(t))
        {
            tracing::debug!(%error, "index.json may differ from the names");
        }
        written
    }

    /// Forgets names; content goes when the collector runs. Returns what they pointed at.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when a name is unknown; then no name has changed.
    pub fn remove_images(&self, names: &[String]) -> Result<Vec<Descriptor>> {
        self.write_names(|t| {
            let mut removed = vec![];
            for name in names {
                let row = t
                    .prepare_cached("DELETE FROM image WHERE name = ?1 RETURNING name, descriptor, created, updated")?
                    .query_row([name], read_row)
                    .optional()?;
                let row = row.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no such image: {name}")))?;
                removed.push(to_image(row)?.target);
            }
            Ok(removed)
        })
    }

    pub(crate) fn write_index(&self, transaction: &Transaction<'_>) -> Result<()> {
        let mut rows = transaction
            .prepare_cached("SELECT name, descriptor, created, updated FROM image ORDER BY name")?;
        let mut index = Index {
            schema_version: 2,
            media_type: Some(MediaType::OCI_INDEX),
            manifests: vec![],
            annotations: Default::default(),
        };
        for row in rows.query_map([], read_row)? {
            let image = to_image(row?)?;
            let mut entry = image.target;
            entry.annotations.insert(ANNOTATION_NAME.into(), image.name.clone());
            // One layout holds many images here, so the annotation must tell them apart: a tag alone would not.
            if let Ok(reference) = image.name.parse::<ImageReference>() {
                entry.annotations.insert(ANNOTATION_REF.into(), reference.familiar());
            }
            index.manifests.push(entry);
        }
        let bytes = serde_json::to_vec(&index).expect("indexes have string keys only");
        self.replace_file(&self.content_folder().join("index.json"), &bytes)
    }

    /// Looks a full name up.
    ///
    /// # Errors
    /// When the database fails.
    pub fn image(&self, name: &str) -> Result<Option<Image>> {
        self.metadata()
            .with(|c| {
                Ok(c.prepare_cached(
                    "SELECT name, descriptor, created, updated FROM image WHERE name = ?1",
                )?
                .query_row([name], read_row)
                .optional()?)
            })?
            .map(to_image)
            .transpose()
    }

    /// Lists all names in order.
    ///
    /// # Errors
    /// When the database fails.
    pub fn images(&self) -> Result<Vec<Image>> {
        let rows = self.metadata().with(|c| {
            let mut statement = c.prepare_cached(
                "SELECT name, descriptor, created, updated FROM image ORDER BY name",
            )?;
            let rows = statement.query_map([], read_row)?.collect::<rusqlite::Result<Vec<_>>>()?;
            Ok(rows)
        })?;
        rows.into_iter().map(to_image).collect()
    }

    /// Finds an image by what people type: a reference, a digest or a digest's first hex digits.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when nothing matches, [`ErrorKind::Invalid`] when several things do.
    pub fn find_image(&self, text: &str) -> Result<Image> {
        if let Ok(reference) = text.parse::<ImageReference>() {
            if let Some(digest) = reference.digest() {
                let repository = reference.repository();
                let named = |i: &Image| {
                    i.target.digest == *digest
                        && i.name
                            .parse::<ImageReference>()
                            .is_ok_and(|r| r.repository() == repository)
                };
                if let Some(image) = self.images()?.into_iter().find(named) {
                    return Ok(image);
                }
            } else if let Some(image) = self.image(&reference.to_string())? {
                return Ok(image);
            }
        }
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        if hex.len() >= 4 && hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            let mut found = self.images()?;
            found.retain(|image| image.target.digest.hex().starts_with(hex));
            let mut digests: Vec<Digest> =
                found.iter().map(|image| image.target.digest.clone()).collect();
            digests.dedup();
            match digests.len() {
                0 => {}
                1 => return Ok(found.swap_remove(0)),
                _ => {
                    return Err(Error::new(
                        ErrorKind::Invalid,
                        format!(
                            "{text} is the beginning of several images' digests; give more digits"
                        ),
                    ));
                }
            }
        }
        Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "no such image: {text}; \"slipway images\" lists what is here, \"slipway pull\" fetches"
            ),
        ))
    }

    /// Reads a manifest or index.
    ///
    /// # Errors
    /// When it is not there or not one.
    pub fn document(&self, descriptor: &Descriptor) -> Result<Document> {
        let bytes = self.read_blob(&descriptor.digest, MAX_MANIFEST_BYTES)?;
        Document::parse(&bytes).map_err(|error: ManifestError| {
            Error::new(ErrorKind::Corrupt, format!("content {}", descriptor.digest)).because(error)
        })
    }

    /// Reads an image config.
    ///
    /// # Errors
    /// When it is not there or not one.
    pub fn image_config(&self, descriptor: &Descriptor) -> Result<ImageConfig> {
        let bytes = self.read_blob(&descriptor.digest, MAX_CONFIG_BYTES)?;
        serde_json::from_slice(&bytes).map_err(|error| {
            Error::new(ErrorKind::Corrupt, format!("image config {}", descriptor.digest))
                .because(error)
        })
    }

    /// Lists the images one can run behind a manifest or index, whose manifests are in the store. Attestations and
    /// platforms that were never fetched are left out.
    ///
    /// # Errors
    /// When a document is damaged.
    pub fn platforms(&self, target: &Descriptor) -> Result<Vec<PlatformManifest>> {
        let mut found = vec![];
        self.collect_platforms(target, 0, &mut HashSet::new(), &mut found)?;
        Ok(found)
    }

    fn collect_platforms(
        &self,
        target: &Descriptor,
        depth: usize,
        seen: &mut HashSet<(Digest, Option<Platform>)>,
        found: &mut Vec<PlatformManifest>,
    ) -> Result<()> {
        // Deeper nesting is not met in the wild, and a cycle cannot be made without breaking sha256. But an index can name
        // the same one a thousand times, at every depth.
        let whole = (target.digest.clone(), None);
        // An index may name anything, not only images.
        let other = depth > 0 && !target.media_type.is_index() && !target.media_type.is_manifest();
        if other
            || depth > 4
            || target.is_attestation()
            || seen.contains(&whole)
            || !seen.insert((target.digest.clone(), target.platform.clone()))
            || self.blob_size(&target.digest)?.is_none()
        {
            return Ok(());
        }
        match self.document(target)? {
            Document::Index(index) => {
                seen.insert(whole);
                index
                    .manifests
                    .iter()
                    .try_for_each(|entry| self.collect_platforms(entry, depth + 1, seen, found))
            }
            Document::Manifest(manifest) => {
                let platform = match &target.platform {
                    Some(platform) => platform.clone(),
                    None if manifest.config.media_type.is_config()
                        && self.blob_size(&manifest.config.digest)?.is_some() =>
                    {
                        self.image_config(&manifest.config)?.platform()
                    }
                    None => return Ok(()),
                };
                found.push(PlatformManifest { platform, descriptor: target.clone(), manifest });
                Ok(())
            }
        }
    }

    /// Chooses the manifest that serves a platform best.
    ///
    /// # Errors
    /// When a document is damaged.
    pub fn select(
        &self,
        target: &Descriptor,
        platform: &Platform,
    ) -> Result<Option<PlatformManifest>> {
        let candidates = self.platforms(target)?;
        Ok(candidates
            .into_iter()
            .filter_map(|candidate| Some((platform.rank(&candidate.platform)?, candidate)))
            .min_by_key(|(rank, _)| *rank)
            .map(|(_, candidate)| candidate))
    }
}
