//! Results sent to a client over its session: as one stream of bytes, or file by file into a folder of the client.

mod entries;
mod sink;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use slipway_engine::store::tree::Tree;
use slipway_engine::store::{Error, ErrorKind, blocking};
use slipway_spec::wire::fsutil::Packet;
use slipway_transport::files::{self, SendOptions};
use tokio::sync::mpsc;
use tonic::Request;
use tonic::metadata::MetadataMap;

pub use entries::{ExportTree, export_tree};
pub use sink::SessionSink;
pub(crate) use sink::told;

use super::Session;
use super::file_sync::{TransferProgress, TransferStatus, call};

/// The method that takes both kinds of results.
const METHOD: &str = "/moby.filesync.v1.FileSend/DiffCopy";
/// Packets for the client that wait to be sent; with pieces of a file this is some MiB.
const OUTGOING: usize = 16;
/// How folders are sent.
const SEND: SendOptions =
    SendOptions { peer: "the client", readers: 1, piece: 128 * 1024, awaits_end: true };

/// Where a client puts a folder.
#[derive(Clone, Debug, Default)]
pub struct FolderTarget {
    /// Which of the exports that the client asked for; its place in the list.
    pub exporter: usize,
    /// Whether everything comes at once, so that the client may remove what is not in it.
    pub whole: bool,
    /// What the transfer is called in messages: `copying files`.
    pub label: String,
}

/// Sends a folder's content to a client, which puts it where it asked for it.
///
/// # Errors
/// When the client takes no folders, fails or vanishes, or content cannot be read here.
pub async fn send_tree(
    session: &Session,
    target: &FolderTarget,
    tree: Arc<Tree>,
    progress: &TransferProgress,
) -> Result<(), Error> {
    check_supported(session)?;
    let (outgoing, queue) = mpsc::channel::<Packet>(OUTGOING);
    let mut request = Request::new(call::stream(queue));
    let cancel = call::CancelOnDrop::new(&mut request);
    add_exporter(request.metadata_mut(), target.exporter)?;
    if target.whole {
        call::append(request.metadata_mut(), "buildkit-exporter-multi-platform", "1")?;
    }
    let entries = blocking::run(move || Ok(files::list(&tree))).await?;
    let tell =
        |bytes, done| progress(TransferStatus { vertex: None, id: &target.label, bytes, done });
    tell(0, false);
    // A client may answer only once it has got something, so the list is on its way before the answer is waited for.
    let connect = async {
        call::call(session.channel(), METHOD, request).await.map_err(|status| {
            let what = format!("the client cannot take the files: {}", status.message());
            Error::new(ErrorKind::Io, what)
        })
    };
    let sent = files::send(connect, outgoing, entries, SEND, &mut |bytes| tell(bytes, false)).await;
    tell(*sent.as_ref().unwrap_or(&0), true);
    sent?;
    cancel.disarm();
    Ok(())
}

fn check_supported(session: &Session) -> Result<(), Error> {
    if session.supports(METHOD) {
        return Ok(());
    }
    // As clients look for it, in lower case.
    let text = "method /moby.filesync.v1.FileSend/diffcopy not supported by the client";
    Err(Error::new(ErrorKind::Invalid, text))
}

fn add_exporter(metadata: &mut MetadataMap, exporter: usize) -> Result<(), Error> {
    call::append(metadata, "buildkit-attachable-exporter-id", &exporter.to_string())
}
