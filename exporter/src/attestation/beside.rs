//! Statements as files beside the files that they are about.

use std::collections::BTreeSet;

use slipway_spec::Digest;
use slipway_store::Store;
use slipway_store::tree::{Kind, Tree};

use super::statement::{Named, statement};
use super::{Attestation, json, reading};
use crate::error::{ExportError, Result};
use crate::image::PlatformResult;

/// How statements are called.
#[derive(Clone, Copy, Debug, Default)]
pub struct Naming<'a> {
    /// What all names begin with.
    pub prefix: &'a str,
    /// Whether names tell the platform, because several share a folder.
    pub platform: bool,
}

/// A statement to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatementFile {
    /// The name in the folder of the platform.
    pub name: String,
    /// The statement, in lines.
    pub content: Vec<u8>,
}

/// Whether statements belong beside the files of a result.
pub fn wanted(result: &PlatformResult) -> bool {
    result.attestations.iter().any(|attestation| !attestation.is_inline_only())
}

/// Returns the statements that belong beside the files of a result, which `tree` has: they are about all that are regular.
/// Blocks.
///
/// # Errors
/// When two would have the same name, something cannot be read, or may not be said.
pub fn beside(
    store: &Store,
    result: &PlatformResult,
    tree: &Tree,
    naming: Naming<'_>,
) -> Result<Vec<StatementFile>> {
    let attestations: Vec<Attestation> =
        result.attestations.iter().filter(|one| !one.is_inline_only()).cloned().collect();
    let all = reading::read(store, &attestations)?;
    if all.is_empty() {
        return Ok(vec![]);
    }
    let own = files(tree)?;
    let mut names = BTreeSet::new();
    let mut written = vec![];
    for said in &all {
        let name = name(said.file_name(), result, naming)?;
        if !names.insert(name.clone()) {
            let text = format!("duplicate attestation path name {name}");
            return Err(ExportError::Invalid(text));
        }
        let content = json::indent(&statement(said, &own)).into_bytes();
        written.push(StatementFile { name, content });
    }
    Ok(written)
}

fn name(file: &str, result: &PlatformResult, naming: Naming<'_>) -> Result<String> {
    let mut name = format!("{}{file}", naming.prefix);
    if naming.platform {
        let platform = result.platform.folder_name();
        let at = name.rfind('.').unwrap_or(name.len());
        name = format!("{}.{platform}{}", &name[..at], &name[at..]);
    }
    if matches!(name.as_str(), "" | "." | "..") || name.contains(['/', '\0']) {
        return Err(ExportError::Invalid(format!(
            "{name:?} cannot be the name of an attestation's file; \
             attestation-prefix is the beginning of a name, not a folder"
        )));
    }
    Ok(name)
}

/// Lists the regular files of a tree, in the order of a walk.
fn files(tree: &Tree) -> Result<Vec<Named>> {
    let mut buffer = vec![];
    let mut files = vec![];
    for (path, entry) in tree.iter() {
        if let Kind::File { content, .. } = &entry.kind {
            let digest = Digest::from_sha256(content.digest(&mut buffer)?);
            files.push(Named::new(String::from_utf8_lossy(&path).into_owned(), &digest));
        }
    }
    Ok(files)
}
