use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::fs;
use std::pin::Pin;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{Stream, StreamExt as _};
use slipway_engine::exporter::OutputSink;
use slipway_engine::store::tree::{Content, Entry, Kind};
use slipway_spec::wire::filesync::BytesMessage;
use slipway_spec::wire::filesync::file_send_server::{FileSend, FileSendServer};
use slipway_spec::wire::fsutil::Stat;
use slipway_spec::wire::fsutil::packet::PacketType;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Code, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::*;
use crate::fake_client::{FakeClient, FakeConnection};
use crate::session::SessionManager;
use slipway_transport::packet::{self, FileType};

const ADVERTISED: &[&str] = &["/moby.filesync.v1.FileSend/DiffCopy"];

type Answers<M> = Pin<Box<dyn Stream<Item = Result<M, Status>> + Send>>;

async fn connect(client: FakeClient) -> (SessionManager, Session, FakeConnection) {
    let manager = SessionManager::new();
    let connection = client.connect(&manager).await;
    let session = manager.get("s", Duration::from_secs(5)).await.unwrap();
    (manager, session, connection)
}

// Streams of bytes.

/// What a client got in one call, and whether the call came to its end.
#[derive(Clone, Debug, Default, PartialEq)]
struct Got {
    bytes: Vec<u8>,
    longest: usize,
    headers: BTreeMap<String, String>,
    ended: Option<bool>,
}

/// A client that puts what it gets into a file.
#[derive(Clone)]
struct Files {
    got: Arc<Mutex<Got>>,
    /// What it answers instead of reading on, after so many messages.
    refusal: Option<(usize, Status)>,
}

#[async_trait]
impl FileSend for Files {
    type DiffCopyStream = Answers<BytesMessage>;

    async fn diff_copy(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::DiffCopyStream>, Status> {
        for (key, value) in request.metadata().clone().into_headers().iter() {
            let value = value.to_str().unwrap().to_owned();
            self.got.lock().unwrap().headers.insert(key.to_string(), value);
        }
        let mut messages = request.into_inner();
        let mut count = 0;
        loop {
            if let Some((after, status)) = &self.refusal
                && count == *after
            {
                return Err(status.clone());
            }
            count += 1;
            match messages.next().await {
                Some(Ok(message)) => {
                    let mut got = self.got.lock().unwrap();
                    got.longest = got.longest.max(message.data.len());
                    got.bytes.extend_from_slice(&message.data);
                }
                Some(Err(status)) => {
                    self.got.lock().unwrap().ended = Some(false);
                    return Err(status);
                }
                None => {
                    self.got.lock().unwrap().ended = Some(true);
                    return Ok(Response::new(Box::pin(futures::stream::empty())));
                }
            }
        }
    }
}

/// Lets `work` write to a sink, and returns what it gave and what the client got.
async fn stream(
    refusal: Option<(usize, Status)>,
    work: impl FnOnce(Box<SessionSink>) -> std::io::Result<()> + Send + 'static,
) -> (std::io::Result<()>, Got) {
    let got = Arc::new(Mutex::new(Got::default()));
    let service = FileSendServer::new(Files { got: got.clone(), refusal });
    let (_manager, session, _connection) =
        connect(FakeClient::new("s").with(service, ADVERTISED)).await;
    let metadata = [("containerimage.digest".to_owned(), "sha256:0".to_owned())].into();
    let sink = Box::new(SessionSink::new(session, 3, metadata));
    let done = tokio::task::spawn_blocking(move || work(sink)).await.unwrap();
    for _ in 0..100 {
        if got.lock().unwrap().ended.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let got = got.lock().unwrap().clone();
    (done, got)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_comes_whole_and_with_its_metadata() {
    let bytes: Vec<u8> = (0..2_000_000u32).flat_map(u32::to_le_bytes).collect();
    let sent = bytes.clone();
    let (done, got) = stream(None, move |mut sink| {
        let known = [
            ("containerimage.config.digest".to_owned(), "sha256:1".into()),
            ("containerimage.descriptor".to_owned(), serde_json::json!({ "size": 1 })),
        ];
        sink.describe(&known.into());
        let output = sink.open()?;
        output.write_all(&sent[..10])?;
        output.write_all(&sent[10..])?;
        sink.finish()
    })
    .await;
    done.unwrap();
    assert!(got.bytes == bytes);
    assert_eq!((got.ended, got.longest), (Some(true), 3 << 20));
    assert_eq!(got.headers["buildkit-attachable-exporter-id"], "3");
    assert_eq!(got.headers["exporter-md-containerimage.digest"], "sha256:0");
    assert_eq!(got.headers["exporter-md-containerimage.config.digest"], "sha256:1");
    assert_eq!(got.headers["exporter-md-containerimage.descriptor"], "eyJzaXplIjoxfQ==");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_stream_is_a_stream() {
    let (done, got) = stream(None, |sink| sink.finish()).await;
    done.unwrap();
    assert_eq!((got.ended, got.bytes.len()), (Some(true), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_stream_is_not_taken_for_a_whole_one() {
    let (done, got) = stream(None, |mut sink| {
        sink.open()?.write_all(b"half")?;
        // Enough time for it to arrive.
        std::thread::sleep(Duration::from_millis(100));
        drop(sink);
        Ok(())
    })
    .await;
    done.unwrap();
    assert_eq!((got.ended, got.bytes.as_slice()), (Some(false), &b"half"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_has_it_already_is_content() {
    for after in [0, 2] {
        let refusal = Some((after, Status::already_exists("target already exists")));
        let (done, _) = stream(refusal, |mut sink| {
            let output = sink.open()?;
            for _ in 0..100 {
                output.write_all(&[0; 100_000])?;
            }
            sink.finish()
        })
        .await;
        done.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_cannot_take_it_says_why() {
    for after in [0, 2] {
        let refusal = Some((after, Status::new(Code::Unknown, "no space left on device")));
        let (done, _) = stream(refusal, |mut sink| {
            let output = sink.open()?;
            for _ in 0..100 {
                output.write_all(&[0; 100_000])?;
            }
            sink.finish()
        })
        .await;
        assert_eq!(done.unwrap_err().to_string(), "no space left on device");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_nothing_is_named() {
    let (_manager, session, _connection) = connect(FakeClient::new("s")).await;
    let expected = "method /moby.filesync.v1.FileSend/diffcopy not supported by the client";
    let mut sink = SessionSink::new(session.clone(), 0, BTreeMap::new());
    let error = sink.open().map(drop).unwrap_err();
    assert_eq!(error.to_string(), expected);
    let quiet: TransferProgress = Arc::new(|_| ());
    let sent = send_tree(&session, &FolderTarget::default(), Arc::default(), &quiet).await;
    assert_eq!(sent.unwrap_err().to_string(), expected);
}

// Folders.

/// How a client takes a folder.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Manner {
    /// As the Go implementation: asks while the list comes.
    Good,
    /// Asks for an entry with this id when the list has ended.
    Asks(u32),
    /// Asks twice for the first file.
    AsksTwice,
    /// Gives up.
    GivesUp,
    /// Sends what only a sender may.
    Sends,
    /// Ends the call.
    HangsUp,
}

/// What a client made of a folder.
#[derive(Debug, Default)]
struct Taken {
    stats: Vec<Stat>,
    content: HashMap<u32, Vec<u8>>,
    finished: bool,
    told: Option<String>,
    headers: Vec<(String, String)>,
}

#[derive(Clone)]
struct FolderClient {
    manner: Manner,
    taken: Arc<Mutex<Taken>>,
}

impl NamedService for FolderClient {
    const NAME: &'static str = "moby.filesync.v1.FileSend";
}

impl tower_service::Service<http::Request<Body>> for FolderClient {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(
        &mut self,
        _context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let client = self.clone();
        Box::pin(async move {
            // On the wire these are packets, whatever the declaration says.
            let mut grpc = Grpc::new(ProstCodec::<Packet, Packet>::default());
            Ok(grpc.streaming(client, request).await)
        })
    }
}

impl StreamingService<Packet> for FolderClient {
    type Response = Packet;
    type ResponseStream = Answers<Packet>;
    type Future = BoxFuture<'static, Result<Response<Answers<Packet>>, Status>>;

    fn call(&mut self, request: Request<Streaming<Packet>>) -> Self::Future {
        let client = self.clone();
        Box::pin(async move {
            let headers = request.metadata().clone().into_headers();
            client.taken.lock().unwrap().headers = headers
                .iter()
                .map(|(key, value)| (key.to_string(), value.to_str().unwrap().to_owned()))
                .collect();
            let (answers, mut queue) = mpsc::channel(1);
            let answer = futures::stream::poll_fn(move |context| queue.poll_recv(context));
            if client.manner == Manner::Good {
                // The Go implementation answers nothing before its first message, not even headers.
                let mut incoming = request.into_inner();
                let first = incoming.next().await;
                let incoming = Box::pin(futures::stream::iter(first).chain(incoming));
                tokio::spawn(client.take(incoming, answers));
            } else {
                tokio::spawn(client.take(request.into_inner(), answers));
            }
            Ok(Response::new(Box::pin(answer) as Answers<Packet>))
        })
    }
}

impl FolderClient {
    async fn take(
        self,
        mut incoming: impl Stream<Item = Result<Packet, Status>> + Unpin + Send,
        answers: mpsc::Sender<Result<Packet, Status>>,
    ) {
        let (mut open, mut listed) = (0, false);
        let (asks, mut to_ask) = mpsc::unbounded_channel::<Packet>();
        let asking = answers.clone();
        tokio::spawn(async move {
            while let Some(packet) = to_ask.recv().await {
                asking.send(Ok(packet)).await.ok();
            }
        });
        while let Some(Ok(packet)) = incoming.next().await {
            match PacketType::try_from(packet.r#type).unwrap() {
                PacketType::PacketStat => match packet.stat {
                    Some(stat) => {
                        let id = self.taken.lock().unwrap().stats.len() as u32;
                        let regular = FileType::of(stat.mode) == Some(FileType::Regular);
                        let file = regular && stat.linkname.is_empty();
                        self.taken.lock().unwrap().stats.push(stat);
                        if file && self.manner == Manner::Good {
                            open += 1;
                            asks.send(packet::request(id)).unwrap();
                        }
                    }
                    None => {
                        listed = true;
                        let requests = match self.manner {
                            Manner::Asks(id) => vec![packet::request(id)],
                            Manner::AsksTwice => vec![packet::request(0), packet::request(0)],
                            Manner::GivesUp => vec![packet::failure("disk full")],
                            Manner::Sends => vec![packet::data(0, Bytes::new())],
                            _ => vec![],
                        };
                        for request in requests {
                            answers.send(Ok(request)).await.ok();
                        }
                        if matches!(self.manner, Manner::HangsUp | Manner::GivesUp) {
                            answers.send(Err(Status::unknown("no more"))).await.ok();
                            return;
                        }
                    }
                },
                PacketType::PacketData if packet.data.is_empty() => {
                    open -= 1;
                    self.taken.lock().unwrap().content.entry(packet.id).or_default();
                }
                PacketType::PacketData => {
                    assert!(packet.data.len() < 4 << 20);
                    let mut taken = self.taken.lock().unwrap();
                    taken.content.entry(packet.id).or_default().extend_from_slice(&packet.data);
                }
                PacketType::PacketFin => self.taken.lock().unwrap().finished = true,
                PacketType::PacketErr => {
                    self.taken.lock().unwrap().told = Some(packet::reason(&packet.data));
                    return;
                }
                PacketType::PacketReq => panic!("a sender asks for nothing"),
            }
            if listed && open == 0 && self.manner == Manner::Good {
                open = -1;
                answers.send(Ok(packet::finish())).await.ok();
            }
        }
    }
}

async fn send(manner: Manner, tree: Tree, target: &FolderTarget) -> (Result<(), Error>, Taken) {
    let taken = Arc::new(Mutex::new(Taken::default()));
    let client = FolderClient { manner, taken: taken.clone() };
    let (_manager, session, connection) =
        connect(FakeClient::new("s").with(client, ADVERTISED)).await;
    let told = Arc::new(Mutex::new(vec![]));
    let teller = told.clone();
    let progress: TransferProgress = Arc::new(move |status: TransferStatus<'_>| {
        teller.lock().unwrap().push((status.id.to_owned(), status.done));
    });
    let sending = send_tree(&session, target, Arc::new(tree), &progress);
    let sent = tokio::time::timeout(Duration::from_secs(60), sending).await.expect("sending hangs");
    let told = told.lock().unwrap();
    assert_eq!(told.first(), Some(&(target.label.clone(), false)));
    assert_eq!(told.last(), Some(&(target.label.clone(), true)));
    drop(connection);
    let taken = std::mem::take(&mut *taken.lock().unwrap());
    (sent, taken)
}

fn entry(kind: Kind, mode: u32) -> Entry {
    Entry { kind, uid: 1, gid: 2, ..Entry::directory(mode, 5_000_000_001) }
}

fn inline(text: &[u8]) -> Kind {
    Kind::File { content: Content::Inline(text.into()), size: text.len() as u64 }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_goes_out_as_it_is() {
    let scratch = tempfile::tempdir().unwrap();
    let large: Vec<u8> = (0..1u32 << 20).flat_map(u32::to_le_bytes).collect();
    let host = scratch.path().join("large");
    fs::write(&host, &large).unwrap();
    let content = Content::Host { path: host.into(), digest: None };
    let mut first = entry(inline(b"linked"), 0o4755);
    first.inode = Some((1, 2));
    first.xattrs.insert(b"user.note".to_vec(), b"x".to_vec());
    let tree: Tree = [
        ("", Entry::directory(0o755, 0)),
        ("a", entry(Kind::Directory { opaque: true }, 0o1777)),
        ("a/first", first.clone()),
        ("a-large", entry(Kind::File { content, size: large.len() as u64 }, 0o600)),
        ("b-empty", entry(inline(b""), 0o644)),
        ("c-second", first),
        ("d-link", entry(Kind::Symlink { target: b"../out".to_vec() }, 0o777)),
        ("e-null", entry(Kind::CharDevice { major: 1, minor: 3 }, 0o666)),
        ("f-disk", entry(Kind::BlockDevice { major: 8, minor: 1 }, 0o660)),
        ("g-pipe", entry(Kind::Fifo, 0o600)),
    ]
    .into_iter()
    .map(|(path, entry)| (path.as_bytes().to_vec(), entry))
    .collect();
    let target = FolderTarget { exporter: 2, whole: true, label: "copying files".into() };
    let (sent, taken) = send(Manner::Good, tree, &target).await;
    sent.unwrap();
    assert!(taken.finished);
    let shown: Vec<_> = taken
        .stats
        .iter()
        .map(|stat| {
            let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).unwrap();
            (
                text(&stat.path),
                stat.mode,
                stat.size,
                text(&stat.linkname),
                stat.devmajor,
                stat.devminor,
            )
        })
        .collect();
    let row = |path: &str, mode, size, link: &str, major, minor| {
        (path.to_owned(), mode, size, link.to_owned(), major, minor)
    };
    assert_eq!(
        shown,
        [
            row("a", (1 << 31) | (1 << 20) | 0o777, 0, "", 0, 0),
            row("a/first", (1 << 23) | 0o755, 6, "", 0, 0),
            row("a-large", 0o600, 4 << 20, "", 0, 0),
            row("b-empty", 0o644, 0, "", 0, 0),
            row("c-second", (1 << 23) | 0o755, 0, "a/first", 0, 0),
            row("d-link", (1 << 27) | 0o777, 6, "../out", 0, 0),
            row("e-null", (1 << 26) | (1 << 21) | 0o666, 0, "", 1, 3),
            row("f-disk", (1 << 26) | 0o660, 0, "", 8, 1),
            row("g-pipe", (1 << 25) | 0o600, 0, "", 0, 0),
        ]
    );
    let stat = &taken.stats[1];
    assert_eq!((stat.uid, stat.gid, stat.mod_time), (1, 2, 5_000_000_001));
    assert_eq!(stat.xattrs["user.note"], "x");
    assert_eq!(taken.content.len(), 3);
    assert!(taken.content[&2] == large);
    assert_eq!((&taken.content[&1][..], &taken.content[&3][..]), (&b"linked"[..], &b""[..]));
    for header in
        [("buildkit-attachable-exporter-id", "2"), ("buildkit-exporter-multi-platform", "1")]
    {
        let header = (header.0.to_owned(), header.1.to_owned());
        assert!(taken.headers.contains(&header), "{:?}", taken.headers);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_files_go_out() {
    let tree: Tree = (0..10_000)
        .map(|at| {
            (format!("{at:05}").into_bytes(), entry(inline(at.to_string().as_bytes()), 0o644))
        })
        .collect();
    let (sent, taken) = send(Manner::Good, tree, &FolderTarget::default()).await;
    sent.unwrap();
    assert_eq!(taken.content.len(), 10_000);
    assert_eq!(taken.content[&9_999], b"9999");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_folder_goes_out() {
    let (sent, taken) = send(Manner::Good, Tree::default(), &FolderTarget::default()).await;
    sent.unwrap();
    assert!(taken.finished && taken.stats.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn receivers_that_break_rules_or_give_up_fail_the_export() {
    for (manner, expected, told) in [
        (Manner::Asks(7), "the client asked for entry 7, which was not listed", true),
        (Manner::Asks(1), "the client asked for the content of \"b\", which is no file", true),
        (Manner::AsksTwice, "the client asked twice for \"a\"", true),
        (Manner::Sends, "the client sent PACKET_DATA, but it is the one to receive", true),
        (Manner::GivesUp, "error from receiver: disk full", false),
        (Manner::HangsUp, "the client cannot take the files: no more", false),
    ] {
        let tree: Tree = [
            (b"a".to_vec(), entry(inline(b"1"), 0o644)),
            (b"b".to_vec(), Entry::directory(0o755, 0)),
        ]
        .into_iter()
        .collect();
        let (sent, taken) = send(manner, tree, &FolderTarget::default()).await;
        assert_eq!(sent.unwrap_err().to_string(), expected);
        assert_eq!(taken.told, told.then(|| expected.to_owned()));
        assert!(!taken.finished);
    }
}

#[tokio::test]
async fn a_receiver_that_is_done_too_early_is_refused() {
    let tree: Tree = (0..9u8).map(|at| (vec![b'a' + at], Entry::directory(0o755, 0))).collect();
    let (outgoing, mut queue) = mpsc::channel(1);
    let answers = futures::stream::iter([Ok(packet::finish())]).chain(futures::stream::pending());
    let connect = async { Ok(Box::pin(answers)) };
    let mut progress = |_| ();
    let sending = files::send(connect, outgoing, files::list(&tree), SEND, &mut progress);
    let (sent, told) = futures::future::join(sending, async {
        // Nothing is taken until the end was said.
        tokio::time::sleep(Duration::from_millis(50)).await;
        loop {
            let packet = queue.recv().await.unwrap();
            if packet.r#type == PacketType::PacketErr as i32 {
                return packet::reason(&packet.data);
            }
        }
    })
    .await;
    let expected = "the client said that it was done before it had seen everything";
    assert_eq!((sent.unwrap_err().to_string().as_str(), told.as_str()), (expected, expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_is_lost_fails_the_export() {
    let content = Content::Host { path: std::path::Path::new("/nowhere/x").into(), digest: None };
    let tree: Tree =
        [(b"a".to_vec(), entry(Kind::File { content, size: 1 }, 0o644))].into_iter().collect();
    let (sent, taken) = send(Manner::Good, tree, &FolderTarget::default()).await;
    let text = sent.unwrap_err().to_string();
    assert!(text.starts_with("cannot read /nowhere/x: "), "{text}");
    assert_eq!(taken.told, Some(text));
}
