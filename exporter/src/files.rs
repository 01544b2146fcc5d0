//! Results as plain files: a folder (`type=local`) or a tar (`type=tar`), and images as archives (`type=oci`, `docker`).

use std::fs;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use slipway_spec::{Digest, Platform};
use slipway_store::layer::{
    CopyOptions, Entry, EntryKind, LayerError, TarWriter, copy_tree, write_tree_below,
};
use slipway_store::layout::ArchiveImage;
use slipway_store::{ErrorKind, Store, blocking};

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

/// Writes results into a folder, which is made if it is not there; what is in it stays unless it is overwritten.
/// Several platforms get a folder each.
///
/// # Errors
/// When the folder cannot be written.
pub async fn local(
    store: &Store,
    results: &[PlatformResult],
    split: bool,
    folder: &Path,
) -> Result<()> {
    let (store, results, folder) = (store.clone(), results.to_vec(), folder.to_path_buf());
    in_background(move || {
        let failed = |folder: &Path, source| ExportError::Output {
            destination: folder.display().to_string(),
            source,
        };
        for result in results {
            let target =
                if split { folder.join(result.platform.folder_name()) } else { folder.clone() };
            fs::create_dir_all(&target).map_err(|error| failed(&target, error))?;
            let stack = store.stack(&result.snapshot.layers)?;
            copy_tree(&stack, &target, &CopyOptions::default())
                .map_err(|error| layer_error(&target.display().to_string(), error))?;
        }
        Ok(())
    })
    .await
}

/// Writes results as one tar; several platforms get a folder each.
///
/// # Errors
/// When the sink fails; nothing is left at the destination then.
pub async fn tar(
    store: &Store,
    results: &[PlatformResult],
    split: bool,
    mut sink: Box<dyn OutputSink>,
) -> Result<()> {
    let (store, results) = (store.clone(), results.to_vec());
    in_background(move || {
        let destination = sink.destination();
        let failed = |source| ExportError::Output { destination: destination.clone(), source };
        let mut tar =
            TarWriter::new(BufWriter::with_capacity(BUFFER, sink.open().map_err(failed)?));
        for result in results {
            let mut folder = vec![];
            if split {
                folder = result.platform.folder_name().into_bytes();
                let entry = Entry::new(folder.as_slice(), EntryKind::Directory, 0o755);
                tar.append(&entry, &mut std::io::empty()).map_err(failed)?;
            }
            let stack = store.stack(&result.snapshot.layers)?;
            write_tree_below(&stack, &folder, &mut tar)
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
