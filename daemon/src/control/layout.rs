//! An image that the client keeps as loose content in a folder, not as an archive (`tar=false`).

use futures::{StreamExt as _, TryStreamExt as _, stream};
use slipway_engine::exporter::{self, Assembled, ImageOptions, PlatformResult};
use slipway_engine::pipeline::tell;
use slipway_engine::store::{Store, blocking};
use slipway_engine::{BuildError, BuildResult, Task};
use slipway_spec::Descriptor;
use tonic::Status;

use super::outputs::{Target, no_session};
use crate::failure::build_status;
use crate::session::Session;

/// The client's store for what is exported.
const STORE: &str = "export";
/// Content that is on its way at once.
const AT_ONCE: usize = 4;

/// Makes an image and gives the client what it consists of. The client names it when the build has ended.
pub(super) async fn export(
    target: &Target<'_>,
    results: &[PlatformResult],
    multi_platform: bool,
    (options, docker): (&ImageOptions, bool),
    result: &mut BuildResult,
) -> Result<(), Status> {
    if docker && results.len() > 1 {
        return Err(Status::invalid_argument(
            "docker exporter does not support exporting manifest lists; build one platform, or use type=oci",
        ));
    }
    let session = target.sessions.first().await.map_err(no_session)?;
    target.build.provide(results).await.map_err(|error| build_status(&error))?;
    let form = if docker { "docker" } else { "oci" };
    let task = Task::start(target.build.progress(), &format!("exporting to {form} image format"));
    let made = make(target, &session, results, multi_platform && !docker, options, &task).await;
    let made = task.end(made).map_err(|error| build_status(&error))?;
    result.note(&made, options);
    Ok(())
}

async fn make(
    target: &Target<'_>,
    session: &Session,
    results: &[PlatformResult],
    index: bool,
    options: &ImageOptions,
    task: &Task,
) -> Result<Assembled, BuildError> {
    let (store, epoch) = (target.build.engine().store(), target.build.epoch());
    let assembled = exporter::assemble(store, results, index, options, epoch).await?;
    tell(task, &assembled);
    let (of, all) = (assembled.target.clone(), store.clone());
    let closure = blocking::run(move || all.closure(&of)).await?;
    // What is borrowed for all lifetimes cannot go between threads.
    let blobs = closure.blobs.into_iter().map(|blob| {
        let (session, store) = (session.clone(), store.clone());
        async move { send(&session, &store, &blob).await }
    });
    let blobs = stream::iter(blobs);
    blobs.buffer_unordered(AT_ONCE).try_collect::<()>().await?;
    // Each after what it needs.
    for document in &closure.documents {
        send(session, store, document).await?;
    }
    task.status("copying to the client's layout");
    Ok(assembled)
}

async fn send(session: &Session, store: &Store, blob: &Descriptor) -> Result<(), BuildError> {
    let content = session.content(STORE);
    let (digest, from) = (blob.digest.clone(), store.clone());
    let file = blocking::run(move || from.open_blob(&digest)).await?;
    let name = format!("slipway-{}-{}", slipway_engine::id::new_id(), blob.digest.hex());
    let written = content.write_file(name, blob, file.into()).await;
    written.map_err(|error| {
        let text = format!("cannot give the client {}", blob.digest);
        slipway_engine::store::Error::new(slipway_engine::store::ErrorKind::Io, text)
            .because(error)
            .into()
    })
}
