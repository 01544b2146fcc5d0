//! Content stores of the client: image layouts, folders of cache, the folder that an image is written to.

use std::collections::BTreeMap;
use std::pin::pin;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::channel::mpsc;
use futures::{SinkExt as _, Stream, StreamExt as _, stream};
use slipway_engine::solver::client::{ByteStream, LayoutStore};
use slipway_engine::store::Error;
use slipway_spec::wire::MESSAGE_BYTES;
use slipway_spec::wire::content::content_client::ContentClient;
use slipway_spec::wire::content::{
    Info, InfoRequest, ListContentRequest, ReadContentRequest, WriteAction, WriteContentRequest,
    WriteContentResponse,
};
use slipway_spec::{Descriptor, Digest};
use tokio::fs::File;
use tokio::io::AsyncReadExt as _;
use tonic::metadata::MetadataValue;
use tonic::{Code, Request, Status};

use super::channel::Channel;
use super::tunnel::Inbound;
use super::{Session, SessionError, SessionGroup, absent};

/// The header that says which store is meant.
const STORE_ID: &str = "buildkit-attachable-store-id";

/// The most that is written in one message; clients take 4 MiB.
const CHUNK: usize = 1024 * 1024;

/// Messages that are sent before the client has answered the first of them.
const AHEAD: usize = 4;

/// A content store of the client.
///
/// Its id is `oci:<name>` for an image layout, `local:<folder>` for a folder of cache, and `export` for the folder that an
/// image goes to.
#[derive(Clone, Debug)]
pub struct SessionContent {
    session: Session,
    store: String,
}

/// What is written; see [`SessionContent::write`].
#[derive(Clone, Debug)]
pub struct ContentWrite {
    /// What the client calls the write while it goes on; two with the same name do not go on at the same time.
    pub name: String,
    /// What the content must hash to.
    pub digest: Digest,
    /// How long it is.
    pub size: u64,
    /// What the client keeps with it.
    pub labels: BTreeMap<String, String>,
}

impl Session {
    /// Returns a content store of the client, which may or may not exist.
    pub fn content(&self, store: impl Into<String>) -> SessionContent {
        SessionContent { session: self.clone(), store: store.into() }
    }
}

impl SessionContent {
    fn client(&self) -> ContentClient<Channel> {
        ContentClient::new(self.session.channel()).max_decoding_message_size(MESSAGE_BYTES)
    }

    /// Makes a call to this store of the client.
    fn request<T>(&self, message: T) -> Result<Request<T>, Status> {
        // Clients compare bytes, and a folder may be named by any.
        let store = MetadataValue::try_from(self.store.as_bytes())
            .map_err(|_| Status::not_found("its name cannot be sent"))?;
        let mut request = Request::new(message);
        request.metadata_mut().insert(STORE_ID, store);
        Ok(request)
    }

    fn failed(&self, tried: &str, status: Status) -> SessionError {
        SessionError::from_status(
            format!("cannot {tried} store {} of the client", self.store),
            status,
        )
    }

    /// Tells what the client knows about content.
    ///
    /// # Errors
    /// When the store does not have it, or there is no such store.
    pub async fn info(&self, digest: &Digest) -> Result<Info, SessionError> {
        let asked = async {
            let request = self.request(InfoRequest { digest: digest.to_string() })?;
            let answer = self.client().info(request).await?.into_inner();
            answer.info.ok_or_else(|| Status::internal("the answer is empty"))
        };
        asked.await.map_err(|status| self.failed(&format!("look for {digest} in"), status))
    }

    /// Lists what the store has.
    ///
    /// # Errors
    /// When there is no such store or the client does not answer.
    pub async fn list(&self) -> Result<Vec<Info>, SessionError> {
        let asked = async {
            let request = self.request(ListContentRequest { filters: vec![] })?;
            let mut answer = self.client().list(request).await?.into_inner();
            let mut all = vec![];
            while let Some(some) = answer.message().await? {
                all.extend(some.info);
            }
            Ok(all)
        };
        asked.await.map_err(|status| self.failed("list", status))
    }

    /// Reads content from an offset to its end. Nothing checks its digest.
    ///
    /// # Errors
    /// When the store does not have it, or there is no such store. A failure on the way is one of reading.
    pub async fn read(&self, digest: &Digest, offset: u64) -> Result<Inbound, SessionError> {
        let failed = |status| self.failed(&format!("read {digest} from"), status);
        let offset = i64::try_from(offset)
            .map_err(|_| failed(Status::out_of_range("no content is so long")))?;
        let message = ReadContentRequest { digest: digest.to_string(), offset, size: 0 };
        let request = self.request(message).map_err(failed)?;
        let mut answer = self.client().read(request).await.map_err(failed)?.into_inner();
        // A refusal comes in place of the first message.
        let first = answer.message().await.map_err(failed)?;
        let mut next = offset;
        let all = stream::iter(first.map(Ok::<_, Status>)).chain(answer).map(move |message| {
            let message = message?;
            if message.offset != next {
                let (at, next) = (message.offset, next);
                return Err(Status::data_loss(format!("the client sent byte {at} for {next}")));
            }
            next += message.data.len() as i64;
            Ok(message.data)
        });
        Ok(Inbound::new(all))
    }

    /// Writes content. That the store has it already is as good.
    ///
    /// # Errors
    /// When `content` fails or is not what was promised, or the client refuses.
    pub async fn write(
        &self,
        write: &ContentWrite,
        content: impl Stream<Item = std::io::Result<Bytes>> + Send,
    ) -> Result<(), SessionError> {
        match self.try_write(write, content).await {
            Ok(()) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) => Err(self.failed(&format!("write {} to", write.digest), status)),
        }
    }

    /// Writes content that is in a file of this machine, as [`write`](Self::write) does. `name` is what the client calls the
    /// write while it goes on.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn write_file(
        &self,
        name: String,
        content: &Descriptor,
        file: File,
    ) -> Result<(), SessionError> {
        let bytes = stream::try_unfold(file, |mut file| async move {
            let mut chunk = BytesMut::with_capacity(CHUNK);
            let read = file.read_buf(&mut chunk).await?;
            Ok::<_, std::io::Error>((read > 0).then(|| (chunk.freeze(), file)))
        });
        let (digest, size) = (content.digest.clone(), content.size);
        let write = ContentWrite { name, digest, size, labels: BTreeMap::new() };
        self.write(&write, bytes).await
    }

    async fn try_write(
        &self,
        write: &ContentWrite,
        content: impl Stream<Item = std::io::Result<Bytes>> + Send,
    ) -> Result<(), Status> {
        let size =
            i64::try_from(write.size).map_err(|_| Status::out_of_range("no content is so long"))?;
        let expected = write.digest.to_string();
        let (mut sender, messages) = mpsc::channel(AHEAD);
        // What is left of an earlier write under this name is written over: the first write is at the beginning.
        let begin = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: write.name.clone(),
            total: size,
            expected: expected.clone(),
            ..Default::default()
        };
        let begun = sender.send(begin).await;
        begun.map_err(|_| Status::internal("the messages were not taken"))?;
        let mut answers = self.client().write(self.request(messages)?).await?.into_inner();
        next(&mut answers).await?;
        let send = async {
            let mut content = pin!(content);
            let mut offset = 0;
            while let Some(bytes) = content.next().await {
                let mut bytes = bytes
                    .map_err(|error| Status::data_loss(format!("cannot read it here: {error}")))?;
                while !bytes.is_empty() {
                    let data = bytes.split_to(bytes.len().min(CHUNK));
                    let length = data.len() as i64;
                    let action = WriteAction::Write.into();
                    let message =
                        WriteContentRequest { action, offset, data, ..Default::default() };
                    // The client's answer says why it takes no more.
                    if sender.send(message).await.is_err() {
                        return Ok(());
                    }
                    offset += length;
                }
            }
            if offset != size {
                return Err(Status::data_loss(format!("it has {offset} bytes here, not {size}")));
            }
            let commit = WriteContentRequest {
                action: WriteAction::Commit.into(),
                total: size,
                offset,
                expected: expected.clone(),
                labels: write.labels.clone(),
                ..Default::default()
            };
            if sender.send(commit).await.is_ok() {
                sender.close_channel();
            }
            Ok(())
        };
        let receive = async {
            loop {
                let answer = next(&mut answers).await?;
                if answer.action() == WriteAction::Commit {
                    break if answer.digest == expected {
                        Ok(())
                    } else {
                        Err(Status::data_loss(format!("it became {}", answer.digest)))
                    };
                }
            }
        };
        futures::future::try_join(send, receive).await.map(|_| ())
    }
}

async fn next(
    answers: &mut tonic::Streaming<WriteContentResponse>,
) -> Result<WriteContentResponse, Status> {
    let answer = answers.message().await?;
    answer.ok_or_else(|| Status::aborted("the client stopped before it had everything"))
}

#[async_trait]
impl LayoutStore for SessionGroup {
    async fn open(&self, store: &str, digest: &Digest) -> Result<Option<ByteStream>, Error> {
        let subject = format!("cannot read layout {store} of the client");
        self.open_content(&format!("oci:{store}"), &subject, digest).await
    }
}

impl SessionGroup {
    /// Opens content of a store; `None` when no client has such. `subject` is for errors.
    pub(crate) async fn open_content(
        &self,
        store: &str,
        subject: &str,
        digest: &Digest,
    ) -> Result<Option<ByteStream>, Error> {
        let ask = move |session: Session| async move {
            session.content(store).read(digest, 0).await.map(Some).or_else(absent)
        };
        let found = self.find(subject, ask).await?;
        Ok(found.map(|inbound| Box::new(inbound) as ByteStream))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::{Arc, Mutex};

    use futures::stream::BoxStream;
    use slipway_spec::wire::content::content_server::{Content, ContentServer};
    use slipway_spec::wire::content::{
        AbortRequest, DeleteContentRequest, InfoResponse, ListContentResponse, ListStatusesRequest,
        ListStatusesResponse, ReadContentResponse, StatusRequest, StatusResponse, UpdateRequest,
        UpdateResponse,
    };
    use tonic::{Response, Streaming};

    use super::*;
    use crate::fake_client::{FakeClient, FakeConnection};
    use crate::session::{SessionManager, WAIT};

    /// Stores by their ids, strict about offsets, sizes and digests.
    #[derive(Clone, Default)]
    pub(crate) struct Stores(pub(crate) Arc<Mutex<BTreeMap<String, BTreeMap<String, Bytes>>>>);

    type Answer<T> = Result<Response<T>, Status>;

    fn unused<T>() -> Answer<T> {
        Err(Status::unimplemented("not used"))
    }

    impl Stores {
        fn chosen<T>(&self, request: &Request<T>) -> Result<String, Status> {
            let id = request.metadata().get(STORE_ID);
            let id = id.ok_or_else(|| Status::invalid_argument("request lacks metadata"))?;
            let id = String::from_utf8(id.as_bytes().to_vec()).unwrap();
            if !self.0.lock().unwrap().contains_key(&id) {
                return Err(Status::not_found(format!("unknown store {id}")));
            }
            Ok(id)
        }

        fn put(&self, store: &str, content: &'static [u8]) -> Digest {
            let digest = Digest::of(content);
            let mut stores = self.0.lock().unwrap();
            stores.entry(store.into()).or_default().insert(digest.to_string(), content.into());
            digest
        }

        fn get(&self, store: &str, digest: &str) -> Result<Bytes, Status> {
            let found = self.0.lock().unwrap()[store].get(digest).cloned();
            found.ok_or_else(|| Status::not_found(format!("content {digest}: not found")))
        }
    }

    #[async_trait]
    impl Content for Stores {
        type ListStream = BoxStream<'static, Result<ListContentResponse, Status>>;
        type ReadStream = BoxStream<'static, Result<ReadContentResponse, Status>>;
        type WriteStream = BoxStream<'static, Result<WriteContentResponse, Status>>;

        async fn info(&self, request: Request<InfoRequest>) -> Answer<InfoResponse> {
            let store = self.chosen(&request)?;
            let digest = request.into_inner().digest;
            let size = self.get(&store, &digest)?.len() as i64;
            let info = Info { digest, size, ..Default::default() };
            Ok(Response::new(InfoResponse { info: Some(info) }))
        }

        async fn list(&self, request: Request<ListContentRequest>) -> Answer<Self::ListStream> {
            let store = self.chosen(&request)?;
            let digests: Vec<_> = self.0.lock().unwrap()[&store].keys().cloned().collect();
            let pages = digests.into_iter().map(|digest| {
                Ok(ListContentResponse { info: vec![Info { digest, ..Default::default() }] })
            });
            Ok(Response::new(stream::iter(pages).boxed()))
        }

        async fn read(&self, request: Request<ReadContentRequest>) -> Answer<Self::ReadStream> {
            let store = self.chosen(&request)?;
            let wanted = request.into_inner();
            let content = match self.get(&store, &wanted.digest) {
                Ok(content) => content.slice(wanted.offset as usize..),
                // Servers begin to answer before they look.
                Err(status) => return Ok(Response::new(stream::iter([Err(status)]).boxed())),
            };
            let mut offset = wanted.offset;
            let pieces: Vec<_> = content.chunks(3).map(|piece| content.slice_ref(piece)).collect();
            let pieces = pieces.into_iter().map(move |data| {
                let message = ReadContentResponse { offset, data };
                offset += message.data.len() as i64;
                // A client that lies about where it is.
                let lied = message.data.starts_with(b"lie");
                Ok(ReadContentResponse { offset: message.offset + i64::from(lied), ..message })
            });
            Ok(Response::new(stream::iter(pieces).boxed()))
        }

        async fn write(
            &self,
            request: Request<Streaming<WriteContentRequest>>,
        ) -> Answer<Self::WriteStream> {
            let store = self.chosen(&request)?;
            let (stores, requests) = (self.clone(), request.into_inner());
            let state = (stores, store, requests, Vec::new(), String::new());
            let answers = stream::try_unfold(
                state,
                |(stores, store, mut requests, mut content, mut name)| async move {
                    let Some(message) = requests.message().await? else { return Ok(None) };
                    if name.is_empty() {
                        name.clone_from(&message.r#ref);
                        if name.is_empty() {
                            return Err(Status::invalid_argument(
                                "first message must have a reference",
                            ));
                        }
                    }
                    if name == "refused" && message.offset > 0 {
                        return Err(Status::resource_exhausted("no space left"));
                    }
                    if stores.get(&store, &message.expected).is_ok() {
                        return Err(Status::already_exists("it exists"));
                    }
                    if message.action() != WriteAction::Stat
                        && message.offset != content.len() as i64
                    {
                        return Err(Status::out_of_range("write must occur at current offset"));
                    }
                    assert!(message.data.len() <= CHUNK);
                    content.extend_from_slice(&message.data);
                    let digest = Digest::of(&content).to_string();
                    if message.action() == WriteAction::Commit {
                        if message.total != content.len() as i64 || message.expected != digest {
                            return Err(Status::failed_precondition("unexpected commit"));
                        }
                        let label = message.labels.get("containerd.io/gc.ref.content.0");
                        assert!(store == "export" || label.is_some_and(|label| label == "x"));
                        let mut all = stores.0.lock().unwrap();
                        all.get_mut(&store).unwrap().insert(digest.clone(), content.clone().into());
                    }
                    let answer = WriteContentResponse {
                        action: message.action,
                        offset: content.len() as i64,
                        digest,
                        ..Default::default()
                    };
                    Ok(Some((answer, (stores, store, requests, content, name))))
                },
            );
            Ok(Response::new(answers.boxed()))
        }

        async fn update(&self, _: Request<UpdateRequest>) -> Answer<UpdateResponse> {
            unused()
        }

        async fn delete(&self, _: Request<DeleteContentRequest>) -> Answer<()> {
            unused()
        }

        async fn status(&self, _: Request<StatusRequest>) -> Answer<StatusResponse> {
            unused()
        }

        async fn list_statuses(
            &self,
            _: Request<ListStatusesRequest>,
        ) -> Answer<ListStatusesResponse> {
            unused()
        }

        async fn abort(&self, _: Request<AbortRequest>) -> Answer<()> {
            unused()
        }
    }

    async fn serving(stores: &Stores) -> (FakeConnection, SessionGroup, Session) {
        let manager = SessionManager::new();
        let client = FakeClient::new("a").with(ContentServer::new(stores.clone()), &[]);
        let client = client.connect(&manager).await;
        let session = manager.get("a", WAIT).await.unwrap();
        (client, manager.group(["a".to_owned()]), session)
    }

    async fn all(mut inbound: impl tokio::io::AsyncRead + Unpin) -> std::io::Result<Vec<u8>> {
        let mut all = vec![];
        inbound.read_to_end(&mut all).await.map(|_| all)
    }

    #[tokio::test]
    async fn layouts_are_read() {
        let stores = Stores::default();
        let digest = stores.put("oci:base", b"0123456789");
        let empty = stores.put("oci:base", b"");
        let (_client, group, session) = serving(&stores).await;
        let opened = group.open("base", &digest).await.unwrap().unwrap();
        assert_eq!(all(opened).await.unwrap(), b"0123456789");
        let opened = group.open("base", &empty).await.unwrap().unwrap();
        assert_eq!(all(opened).await.unwrap(), b"");
        assert!(group.open("other", &digest).await.unwrap().is_none());
        assert!(group.open("base", &Digest::of(b"none")).await.unwrap().is_none());

        let content = session.content("oci:base");
        assert_eq!(all(content.read(&digest, 4).await.unwrap()).await.unwrap(), b"456789");
        assert_eq!(content.info(&digest).await.unwrap().size, 10);
        assert_eq!(content.list().await.unwrap().len(), 2);
        let error = session.content("oci:none").info(&digest).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "cannot look for {digest} in store oci:none of the client: unknown store oci:none"
            )
        );
    }

    #[tokio::test]
    async fn bytes_in_the_wrong_place_are_not_taken() {
        let stores = Stores::default();
        let digest = stores.put("oci:base", b"lie");
        let (_client, group, _) = serving(&stores).await;
        let opened = group.open("base", &digest).await.unwrap().unwrap();
        let error = all(opened).await.unwrap_err();
        assert!(error.to_string().contains("the client sent byte 1 for 0"), "{error}");
    }

    fn to_write(name: &str, content: &[u8]) -> ContentWrite {
        ContentWrite {
            name: name.into(),
            digest: Digest::of(content),
            size: content.len() as u64,
            labels: BTreeMap::from([("containerd.io/gc.ref.content.0".into(), "x".into())]),
        }
    }

    #[tokio::test]
    async fn content_is_written_in_pieces() {
        let stores = Stores::default();
        stores.put("local:/tmp/caché dir", b"");
        let (_client, _, session) = serving(&stores).await;
        let content = session.content("local:/tmp/caché dir");
        let long: Bytes = (0..5_000_000_u32).map(|at| at as u8).collect();
        for bytes in [long.clone(), Bytes::from_static(b"short")] {
            let write = to_write("w", &bytes);
            // The second time it exists.
            for _ in 0..2 {
                let pieces =
                    stream::iter([Ok(bytes.slice(..2)), Ok(Bytes::new()), Ok(bytes.slice(2..))]);
                content.write(&write, pieces).await.unwrap();
            }
            let found = content.read(&write.digest, 0).await.unwrap();
            assert!(all(found).await.unwrap() == bytes);
        }
    }

    #[tokio::test]
    async fn a_write_that_fails_says_why() {
        let stores = Stores::default();
        stores.put("export", b"");
        let (_client, _, session) = serving(&stores).await;
        let content = session.content("export");
        let long = Bytes::from(vec![7; 20 << 20]);
        let outcome = async |name: &str, pieces: Vec<std::io::Result<Bytes>>| {
            let write = to_write(name, &long);
            let error = content.write(&write, stream::iter(pieces)).await.unwrap_err();
            error.message().to_owned()
        };
        assert_eq!(outcome("refused", vec![Ok(long.clone())]).await, "no space left");
        assert_eq!(
            outcome("short", vec![Ok(long.slice(1..))]).await,
            "it has 20971519 bytes here, not 20971520"
        );
        let other = Bytes::from(vec![8; 20 << 20]);
        assert_eq!(outcome("other", vec![Ok(other)]).await, "unexpected commit");
        let broken = std::io::Error::other("disk");
        assert_eq!(outcome("broken", vec![Err(broken)]).await, "cannot read it here: disk");
        let none = session.content("none");
        let error = none.write(&to_write("w", b""), stream::empty()).await.unwrap_err();
        assert_eq!(error.kind(), crate::session::SessionErrorKind::NotFound);
    }
}
