//! Streams that the client sends when asked, such as a context on its standard input.

use async_trait::async_trait;
use futures::{StreamExt as _, stream};
use slipway_engine::solver::client::{ByteStream, Uploads};
use slipway_engine::store::Error;
use slipway_spec::wire::MESSAGE_BYTES;
use slipway_spec::wire::upload::upload_client::UploadClient;
use tonic::{Request, Status};

use super::tunnel::Inbound;
use super::{Session, SessionError, SessionErrorKind, SessionGroup, absent};

/// The host of URLs that mean such a stream.
pub const UPLOAD_HOST: &str = "buildkit-session";

impl Session {
    /// Asks for the stream of a path: `/` and the name the client gave it. A client gives each of them once.
    ///
    /// # Errors
    /// When the client has no such stream or does not answer. A failure on the way is one of reading.
    pub async fn pull(&self, path: &str) -> Result<Inbound, SessionError> {
        let failed = |status| SessionError::from_status(subject(path), status);
        let mut client = UploadClient::new(self.channel()).max_decoding_message_size(MESSAGE_BYTES);
        // Nothing is sent, but the end of it would tell the client that nobody listens any more.
        let mut request = Request::new(stream::pending());
        let unusual = |_| {
            let message = "its path must be printable ASCII";
            SessionError::new(SessionErrorKind::NotFound, subject(path), message)
        };
        request.metadata_mut().insert("urlpath", path.parse().map_err(unusual)?);
        request.metadata_mut().insert("urlhost", UPLOAD_HOST.parse().map_err(unusual)?);
        let mut received = client.pull(request).await.map_err(failed)?.into_inner();
        // A refusal comes in place of the first message.
        let first = received.message().await.map_err(failed)?;
        let all = stream::iter(first.map(Ok::<_, Status>)).chain(received);
        Ok(Inbound::new(all.map(|message| Ok(message?.data))))
    }
}

fn subject(path: &str) -> String {
    format!("cannot get upload {path} from the client")
}

#[async_trait]
impl Uploads for SessionGroup {
    async fn open(&self, path: &str) -> Result<Option<ByteStream>, Error> {
        let ask = move |session: Session| async move {
            session.pull(path).await.map(Some).or_else(absent)
        };
        let found = self.find(&subject(path), ask).await?;
        Ok(found.map(|inbound| Box::new(inbound) as ByteStream))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use bytes::Bytes;
    use futures::stream::BoxStream;
    use slipway_spec::wire::upload::BytesMessage;
    use slipway_spec::wire::upload::upload_server::{Upload, UploadServer};
    use tokio::io::AsyncReadExt as _;
    use tonic::{Response, Streaming};

    use super::*;
    use crate::fake_client::{FakeClient, FakeConnection};
    use crate::session::SessionManager;

    const MIB: usize = 1024 * 1024;

    /// Sends 256 MiB, and counts what was taken.
    #[derive(Clone, Default)]
    struct Context {
        taken: Arc<AtomicUsize>,
    }

    #[async_trait]
    impl Upload for Context {
        type PullStream = BoxStream<'static, Result<BytesMessage, Status>>;

        async fn pull(
            &self,
            request: Request<Streaming<BytesMessage>>,
        ) -> Result<Response<Self::PullStream>, Status> {
            let path = request.metadata().get("urlpath").unwrap().to_str().unwrap();
            assert_eq!(request.metadata().get("urlhost").unwrap(), UPLOAD_HOST);
            let taken = self.taken.clone();
            let pieces = stream::iter(0..256_usize).map(move |at| {
                taken.fetch_add(MIB, Ordering::SeqCst);
                Ok(BytesMessage { data: Bytes::from(vec![at as u8; MIB]) })
            });
            match path {
                "/context" => Ok(Response::new(pieces.boxed())),
                "/empty" => Ok(Response::new(stream::empty().boxed())),
                "/torn" => {
                    let torn = stream::iter([Err(Status::data_loss("disk"))]);
                    Ok(Response::new(pieces.take(2).chain(torn).boxed()))
                }
                _ => Err(Status::unknown(format!("no http response from session for {path}"))),
            }
        }
    }

    async fn serving(context: Context) -> (FakeConnection, SessionGroup) {
        let manager = SessionManager::new();
        let client = FakeClient::new("a").with(UploadServer::new(context), &[]);
        (client.connect(&manager).await, manager.group(["a".to_owned()]))
    }

    #[tokio::test]
    async fn a_client_waits_for_a_slow_reader() {
        let context = Context::default();
        let (_client, group) = serving(context.clone()).await;
        let mut stream = group.open("/context").await.unwrap().unwrap();
        let mut before = 0;
        // It stops once every buffer on the way is full.
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let taken = context.taken.load(Ordering::SeqCst);
            if taken == before {
                break;
            }
            before = taken;
        }
        assert!(before < 16 * MIB, "{before} bytes were taken before anything was read");
        let (mut buffer, mut read) = (vec![0; MIB], 0);
        while read < 256 * MIB {
            stream.read_exact(&mut buffer).await.unwrap();
            assert!(buffer.iter().all(|byte| *byte == (read / MIB) as u8));
            read += buffer.len();
        }
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn an_empty_upload_is_one() {
        let (_client, group) = serving(Context::default()).await;
        let mut stream = group.open("/empty").await.unwrap().unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn failures_are_told_at_once_or_on_the_way() {
        let (_client, group) = serving(Context::default()).await;
        let error = group.open("/nothing").await.err().unwrap();
        assert_eq!(
            error.to_string(),
            "cannot get upload /nothing from the client: no http response from session for /nothing"
        );
        let mut stream = group.open("/torn").await.unwrap().unwrap();
        let mut all = vec![];
        let error = stream.read_to_end(&mut all).await.unwrap_err();
        assert!(error.to_string().contains("disk"), "{error}");
        assert_eq!(all.len(), 2 * MIB);
    }

    #[tokio::test]
    async fn a_client_that_vanishes_ends_the_stream_with_an_error() {
        let (client, group) = serving(Context::default()).await;
        let mut stream = group.open("/context").await.unwrap().unwrap();
        client.vanish();
        let mut all = vec![];
        stream.read_to_end(&mut all).await.unwrap_err();
    }

    #[tokio::test]
    async fn a_client_without_uploads_has_none() {
        let manager = SessionManager::new();
        let _client = FakeClient::new("a").connect(&manager).await;
        assert!(manager.group(["a".to_owned()]).open("/x").await.unwrap().is_none());
    }
}
