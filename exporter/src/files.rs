//! Results as plain files: a folder (`type=local`) or a tar (`type=tar`), and images as archives (`type=oci`, `docker`).

use std::fs;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use slipway_spec::{Digest, Platform};
use slipway_store::layer::{
    CopyOptions, Entry, EntryKind, LayerError, LayerStack, TarWriter, copy_tree, write_tree_below,
};
use slipway_store::layout::ArchiveImage;
use slipway_store::tree::{self, Tree};
use slipway_store::{ErrorKind, Store, blocking, now_nanos};

use crate::attestation::beside::{self, Naming};
use crate::error::{ExportError, Result};
use crate::image::PlatformResult;
use crate::sink::OutputSink;

/// Bytes gathered before a sink is written to.
const BUFFER: usize = 256 * 1024;

fn layer_error(destination: &str, error: LayerError) -> ExportError {
    slipway_store::Error::new(ErrorKind::Io, format!("cannot write {destination}"))
        .because(error)
        .into()
}

/// How results become plain files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// Whether each platform has a folder of its own; `None` is when there are several.
    pub split: Option<bool>,
    /// What the names of statements begin with.
    pub attestation_prefix: String,
}

/// What results are as plain files.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// The results.
    pub results: &'a [PlatformResult],
    /// Whether they are of a build for several platforms, even if there is but one.
    pub multi_platform: bool,
    /// How they are written.
    pub options: &'a FileOptions,
    /// The time of everything, in seconds since 1970. Without it, files keep theirs and statements have the present.
    pub epoch: Option<i64>,
}

impl Files<'_> {
    fn is_split(&self) -> bool {
        self.options.split.unwrap_or(self.multi_platform)
    }

    fn to_plan(self) -> Plan {
        Plan {
            results: self.results.to_vec(),
            split: self.is_split(),
            prefix: self.options.attestation_prefix.clone(),
            platform: self.multi_platform && !self.is_split(),
            epoch: self.epoch,
        }
    }
}

/// The same for work in the background.
struct Plan {
    results: Vec<PlatformResult>,
    split: bool,
    prefix: String,
    platform: bool,
    epoch: Option<i64>,
}

impl Plan {
    /// Opens the file system of a result, with the statements about it on top.
    fn stack(&self, store: &Store, result: &PlatformResult) -> Result<Covered> {
        let mut folders = store.folders(&result.snapshot.layers)?;
        let mut statements = None;
        if beside::wanted(result) {
            let below = store.view(&result.snapshot.layers)?.flatten()?;
            let naming = Naming { prefix: &self.prefix, platform: self.platform };
            let mut tree = Tree::default();
            let time = statement_time(self.epoch.or(result.epoch));
            for file in beside::beside(store, result, &below, naming)? {
                tree.insert(file.name.as_bytes(), statement_entry(file.content, time));
            }
            let folder = store.temporary("statements");
            fs::create_dir(&folder).map_err(|source| ExportError::Output {
                destination: folder.display().to_string(),
                source,
            })?;
            folders.push(folder.clone());
            let folder = statements.insert(Statements(folder));
            tree.write_folder(&folder.0, store.overlay())?;
        }
        Ok(Covered { stack: store.stack_folders(&folders)?, _statements: statements })
    }
}

/// A file system with statements on top of it.
struct Covered {
    stack: LayerStack,
    _statements: Option<Statements>,
}

/// A folder of statements, which goes when they have been written where they belong.
struct Statements(PathBuf);

impl Drop for Statements {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::debug!(folder = %self.0.display(), %error, "statements stay until the end");
        }
    }
}

/// Returns the time of statements in nanoseconds since 1970: the present in whole seconds, unless it is set.
pub fn statement_time(epoch: Option<i64>) -> i64 {
    let seconds = epoch.unwrap_or_else(|| now_nanos() / 1_000_000_000);
    seconds.saturating_mul(1_000_000_000)
}

/// Returns the file that a statement is.
pub fn statement_entry(content: Vec<u8>, time: i64) -> tree::Entry {
    let size = content.len() as u64;
    let kind = tree::Kind::File { content: tree::Content::Inline(content.into()), size };
    tree::Entry { kind, ..tree::Entry::directory(0o600, time) }
}

/// Writes results into a folder, which is made if it is not there; what is in it stays unless it is overwritten.
/// Several platforms get a folder each. What is said of a result lies beside its files.
///
/// # Errors
/// When the folder cannot be written, or what is said of a result cannot be read.
pub async fn local(store: &Store, files: Files<'_>, folder: &Path) -> Result<()> {
    let (store, plan, folder) = (store.clone(), files.to_plan(), folder.to_path_buf());
    in_background(move || {
        let failed = |folder: &Path, source| ExportError::Output {
            destination: folder.display().to_string(),
            source,
        };
        for result in &plan.results {
            let target = match plan.split {
                true => folder.join(result.platform.folder_name()),
                false => folder.clone(),
            };
            fs::create_dir_all(&target).map_err(|error| failed(&target, error))?;
            let options = CopyOptions { mtime: plan.epoch, ..CopyOptions::default() };
            copy_tree(&plan.stack(&store, result)?.stack, &target, &options)
                .map_err(|error| layer_error(&target.display().to_string(), error))?;
        }
        Ok(())
    })
    .await
}

/// Writes results as one tar; several platforms get a folder each. What is said of a result lies beside its files.
///
/// # Errors
/// When the sink fails, or what is said of a result cannot be read; nothing is left at the destination then.
pub async fn tar(store: &Store, files: Files<'_>, mut sink: Box<dyn OutputSink>) -> Result<()> {
    let (store, plan) = (store.clone(), files.to_plan());
    in_background(move || {
        let destination = sink.destination();
        let failed = |source| ExportError::Output { destination: destination.clone(), source };
        let mut tar =
            TarWriter::new(BufWriter::with_capacity(BUFFER, sink.open().map_err(failed)?));
        for result in &plan.results {
            let mut folder = vec![];
            if plan.split {
                folder = result.platform.folder_name().into_bytes();
                let mut entry = Entry::new(folder.as_slice(), EntryKind::Directory, 0o755);
                entry.mtime_seconds = plan.epoch.unwrap_or_default();
                tar.append(&entry, &mut std::io::empty()).map_err(failed)?;
            }
            let covered = plan.stack(&store, result)?;
            write_tree_below(&covered.stack, &folder, plan.epoch, &mut tar)
                .map_err(|error| layer_error(&destination, error))?;
        }
        tar.finish().and_then(|mut buffer| buffer.flush()).map_err(failed)?;
        sink.finish().map_err(failed)
    })
    .await
}

/// Writes an image of the store as an archive.
///
/// # Errors
/// When content is missing or the sink fails; nothing is left at the destination then.
pub async fn archive(
    store: &Store,
    images: Vec<ArchiveImage>,
    platform: &Platform,
    mut sink: Box<dyn OutputSink>,
) -> Result<()> {
    let (store, platform) = (store.clone(), platform.clone());
    in_background(move || {
        let destination = sink.destination();
        let failed = |source| ExportError::Output { destination: destination.clone(), source };
        let mut buffer = BufWriter::with_capacity(BUFFER, sink.open().map_err(failed)?);
        store.save(&images, &platform, &mut buffer)?;
        buffer.flush().map_err(failed)?;
        drop(buffer);
        sink.finish().map_err(failed)
    })
    .await
}

/// Names what an unnamed image is kept under.
pub fn nameless(digest: &Digest) -> String {
    format!("<none>@{digest}")
}

async fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    blocking::run(move || Ok(work())).await?
}
