//! What was said of a result is read: predicates from files, whole statements from bundles.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::value::RawValue;
use slipway_store::Store;
use slipway_store::tree::{Entry, Kind, clean, join};
use slipway_store::view::{Resolved, View};

use super::{Attestation, Content, SBOM_CORE, Subject};
use crate::error::{ExportError, Result};

/// One statement may have this many bytes.
const MAX_STATEMENT: u64 = 40 << 20;

/// Only the builder itself says how something was built.
const PROVENANCE: &str = "https://slsa.dev/provenance/";

/// One thing that is said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(super) predicate_type: String,
    pub(super) subjects: Vec<Of>,
    /// The file it came from, or is to be.
    pub(super) path: String,
    pub(super) predicate: Box<RawValue>,
    /// Whether it says what the result itself is made of.
    pub(super) core: bool,
}

/// What it is said of.
#[derive(Debug)]
pub(super) enum Of {
    /// The result, under a further name if that is not empty.
    Own { name: String },
    /// Something else; the digests by algorithm, which need not be one that is known here.
    Other { name: String, digests: BTreeMap<String, String> },
}

impl Said {
    /// Returns the last part of the path.
    pub(super) fn file_name(&self) -> &str {
        last(&self.path)
    }
}

/// Reads all of them, bundles taken apart. What the result itself is made of comes first. Blocks.
///
/// # Errors
/// When something is not there, is not JSON, or may not be said by who said it.
pub(crate) fn read(store: &Store, attestations: &[Attestation]) -> Result<Vec<Said>> {
    let mut all = vec![];
    for attestation in attestations {
        match &attestation.content {
            Content::Bundle(snapshot) => {
                unbundle(&store.view(&snapshot.layers)?, attestation, &mut all)?;
            }
            Content::File(snapshot) => {
                check_path(&attestation.path)?;
                if attestation.predicate_type.starts_with(PROVENANCE) {
                    return Err(refused("frontend may not set provenance attestations"));
                }
                let view = store.view(&snapshot.layers)?;
                let found = view.resolve(attestation.path.as_bytes(), true)?;
                let bytes = regular(&view, &found, &attestation.path)?;
                all.push(said(attestation, &bytes)?);
            }
            Content::Made(maker) => {
                check_path(&attestation.path)?;
                all.push(said(attestation, &maker.make(store)?)?);
            }
        }
    }
    // A stable sort: nothing else changes places.
    all.sort_by_key(|said| !said.core);
    Ok(all)
}

fn refused(why: &str) -> ExportError {
    ExportError::Invalid(why.into())
}

fn check_path(path: &str) -> Result<()> {
    if path.is_empty() {
        return Err(refused("attestation does not have set path"));
    }
    Ok(())
}

fn said(attestation: &Attestation, predicate: &[u8]) -> Result<Said> {
    let subjects = attestation.subjects.iter().map(|subject| match subject {
        Subject::Own { name } => Of::Own { name: name.clone() },
        Subject::Other { name, digests } => Of::Other {
            name: name.clone(),
            digests: digests
                .iter()
                .map(|digest| (digest.algorithm().as_str().into(), digest.hex().into()))
                .collect(),
        },
    });
    Ok(Said {
        predicate_type: attestation.predicate_type.clone(),
        subjects: subjects.collect(),
        core: is_core(attestation, &attestation.path),
        path: attestation.path.clone(),
        predicate: json(predicate, &attestation.path)?,
    })
}

/// Whether a file is the one that says what the result itself is made of: it has that name, whatever its ending.
fn is_core(attestation: &Attestation, path: &str) -> bool {
    let stem = last(path).split('.').next().unwrap_or_default();
    attestation.metadata.get(SBOM_CORE).is_some_and(|name| name.as_ref() == stem.as_bytes())
}

fn last(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

/// Nothing at all is `null`.
fn json(bytes: &[u8], path: &str) -> Result<Box<RawValue>> {
    let bytes = if bytes.is_empty() { b"null" } else { bytes };
    serde_json::from_slice(bytes)
        .map_err(|error| ExportError::Invalid(format!("attestation {path} is not JSON: {error}")))
}

fn regular(view: &View, found: &Resolved, shown: &str) -> Result<Vec<u8>> {
    let cannot = |why: &str| {
        ExportError::Invalid(format!("cannot read in-toto attestation: {shown}: {why}"))
    };
    match &found.entry {
        None => Err(cannot("no such file")),
        Some(Entry { kind: Kind::File { size, .. }, .. }) if *size > MAX_STATEMENT => {
            Err(cannot(&format!("it exceeds {MAX_STATEMENT} bytes")))
        }
        Some(Entry { kind: Kind::File { .. }, .. }) => {
            view.read(&found.path, MAX_STATEMENT)?.ok_or_else(|| cannot("no such file"))
        }
        Some(_) => Err(cannot("it is not a regular file")),
    }
}

/// A statement in a bundle.
#[derive(Deserialize)]
struct Bundled<'a> {
    #[serde(rename = "predicateType", default)]
    predicate_type: String,
    #[serde(default)]
    subject: Option<Vec<BundledSubject>>,
    #[serde(borrow, default)]
    predicate: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct BundledSubject {
    #[serde(default)]
    name: String,
    #[serde(default)]
    digest: Option<BTreeMap<String, String>>,
}

/// Reads all statements of a folder. Links are followed where they stay in it.
fn unbundle(view: &View, bundle: &Attestation, all: &mut Vec<Said>) -> Result<()> {
    let folder = view.resolve(bundle.path.as_bytes(), true)?;
    if !folder.entry.as_ref().is_some_and(Entry::is_directory) {
        let text = format!("the attestation bundle {:?} is not a folder", bundle.path);
        return Err(ExportError::Invalid(text));
    }
    for (name, _) in view.children(&folder.path)? {
        let path = join(&clean(bundle.path.as_bytes()), &name);
        let path = String::from_utf8_lossy(&path).into_owned();
        let found = view.resolve_below(&folder.path, &name, true)?;
        let bytes = regular(view, &found, &path)?;
        let wrong = |why: &dyn std::fmt::Display| {
            ExportError::Invalid(format!("cannot decode in-toto statement: {path}: {why}"))
        };
        if bytes.trim_ascii_start().first() != Some(&b'{') {
            return Err(wrong(&"it is not a JSON object"));
        }
        let statement: Bundled<'_> =
            serde_json::from_slice(&bytes).map_err(|error| wrong(&error))?;
        if !bundle.predicate_type.is_empty() && statement.predicate_type != bundle.predicate_type {
            return Err(ExportError::Invalid(format!(
                "bundle entry {} does not match required predicate type {}",
                statement.predicate_type, bundle.predicate_type
            )));
        }
        if statement.predicate_type.starts_with(PROVENANCE) {
            return Err(refused("frontend may not bundle provenance attestations"));
        }
        let subjects = statement.subject.unwrap_or_default().into_iter();
        let predicate = statement.predicate.map_or("", RawValue::get).as_bytes();
        all.push(Said {
            predicate: json(predicate, &path)?,
            predicate_type: statement.predicate_type,
            subjects: subjects
                .map(|subject| Of::Other {
                    name: subject.name,
                    digests: subject.digest.unwrap_or_default(),
                })
                .collect(),
            core: is_core(bundle, &path),
            path,
        });
    }
    Ok(())
}
