//! Files that are sent when the daemon fetches a URL of the host `buildkit-session`.

use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use slipway_solver::client::Uploads;
use slipway_spec::wire::upload::BytesMessage;
use slipway_spec::wire::upload::upload_server::Upload;
use tonic::{Request, Response, Status, Streaming};

use super::pieces;

/// Bytes in one message.
const PIECE: usize = 256 * 1024;

pub(super) struct UploadService(pub(super) Arc<dyn Uploads>);

#[async_trait]
impl Upload for UploadService {
    type PullStream = BoxStream<'static, Result<BytesMessage, Status>>;

    async fn pull(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let path = request.metadata().get("urlpath").and_then(|path| path.to_str().ok());
        let path = path.ok_or_else(|| Status::invalid_argument("no path was given"))?.to_owned();
        let opened = self.0.open(&path).await;
        let opened = opened.map_err(|error| Status::unknown(error.to_string()))?;
        let Some(file) = opened else {
            return Err(Status::not_found(format!("nothing is sent under {path:?}")));
        };
        let pieces = pieces(file, PIECE).map_ok(|data| BytesMessage { data });
        Ok(Response::new(pieces.boxed()))
    }
}
