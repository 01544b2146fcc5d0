//! The services of a session, called by the daemon that they are for.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream;
use slipway_daemon::session::content::ContentWrite;
use slipway_daemon::session::file_send::{FolderTarget, SessionSink, send_tree};
use slipway_daemon::session::file_sync::{
    FileCache, SessionFiles, TransferProgress, TransferStatus,
};
use slipway_daemon::session::{Session, SessionGroup, SessionManager};
use slipway_engine::exporter::OutputSink as _;
use slipway_solver::client::{
    AgentStream, ByteStream, LayoutStore, LocalFiles as _, LocalRequest, SecretBytes,
    SecretProvider, SshAgents, Uploads,
};
use slipway_spec::Digest;
use slipway_store::Error;
use slipway_store::registry::{
    Credential, Credentials, DOCKER_HUB_KEY, Registry, RegistryError, RegistryOptions, Secret,
};
use slipway_store::tree::scan::{Everything, Ownership, survey};
use slipway_store::tree::{Content, Kind, Tree};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::metadata::MetadataMap;

use crate::session::auth::RegistryLogin;
use crate::session::content::ContentFolder;
use crate::session::file_send::{Destination, OutputStream};
use crate::session::file_sync::Folder;
use crate::session::{METHOD, SESSION_ID, SessionServices};

/// Opens a session of these services with a daemon.
async fn meet(services: SessionServices) -> (Session, SessionGroup) {
    let manager = SessionManager::new();
    let (router, methods) = services.serve();
    let mut metadata = MetadataMap::new();
    metadata.insert(SESSION_ID, "s".parse().unwrap());
    for method in methods {
        metadata.append(METHOD, method.parse().unwrap());
    }
    let (ours, theirs) = tokio::io::duplex(1 << 20);
    tokio::spawn(async move { router.serve(ours, std::future::pending()).await });
    let session = manager.open_io(&metadata, theirs).await.unwrap();
    (session, manager.group(["s".to_owned()]))
}

fn folder(path: &Path) -> SessionServices {
    let folders = [("context".to_owned(), Folder::Path(path.to_path_buf()))].into();
    SessionServices { folders, ..SessionServices::default() }
}

fn write(root: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    path
}

async fn received(files: &SessionFiles, request: LocalRequest) -> Vec<String> {
    let request = LocalRequest { name: "context".into(), ..request };
    let tree = files.tree(&request).await.unwrap();
    tree.iter().map(|(path, _)| String::from_utf8(path).unwrap()).collect()
}

fn content(tree: &Tree, path: &str) -> Vec<u8> {
    match &tree.get(path.as_bytes()).unwrap().kind {
        Kind::File { content: Content::Host { path, .. }, .. } => fs::read(path).unwrap(),
        Kind::File { content: Content::Part { file, offset, .. }, size } => {
            let mut bytes = vec![0; usize::try_from(*size).unwrap()];
            file.read(*offset, &mut bytes).unwrap();
            bytes
        }
        Kind::File { content: Content::Inline(bytes), .. } => bytes.to_vec(),
        other => panic!("{path} is {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_sent_with_all_that_is_known_of_it() {
    let (root, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let large: Vec<u8> = (0..3_000_000_u32).map(|at| at as u8).collect();
    write(root.path(), "large", &large);
    write(root.path(), "d/ü \u{1}", "odd name");
    let program = write(root.path(), "d/program", "#!");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4711)).unwrap();
    fs::hard_link(&program, root.path().join("d/second")).unwrap();
    std::os::unix::fs::symlink("d/program", root.path().join("link")).unwrap();
    fs::create_dir(root.path().join("empty")).unwrap();
    for number in 0..500 {
        write(root.path(), &format!("many/{number}"), number.to_string());
    }
    let (_session, group) = meet(folder(root.path())).await;
    let files = SessionFiles::new(group, FileCache::new(cache.path()));
    let request = LocalRequest { name: "context".into(), ..LocalRequest::default() };
    let tree = files.tree(&request).await.unwrap();
    let sent = survey(root.path(), &mut Everything, Ownership::Root).unwrap();
    let shape = |tree: &Tree| -> Vec<_> {
        let kind = |kind: &Kind| match kind {
            Kind::File { size, .. } => format!("file {size}"),
            other => format!("{other:?}"),
        };
        let one = |(path, entry): (Vec<u8>, &slipway_store::tree::Entry)| {
            (path, kind(&entry.kind), entry.mode, entry.mtime, entry.uid)
        };
        tree.iter().map(one).collect()
    };
    assert_eq!(shape(&tree), shape(&sent));
    assert!(content(&tree, "large") == large);
    assert_eq!(content(&tree, "d/second"), b"#!");
    assert_eq!(content(&tree, "many/499"), b"499");
    assert_eq!(tree.get(b"d/program").unwrap().inode, tree.get(b"d/second").unwrap().inode);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_asked_for_is_sent() {
    let (root, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for name in ["a/keep", "a/drop", "b/x.md", "b/ü.txt", "real/file"] {
        write(root.path(), name, name);
    }
    std::os::unix::fs::symlink("real", root.path().join("link")).unwrap();
    let (_session, group) = meet(folder(root.path())).await;
    let files = SessionFiles::new(group, FileCache::new(cache.path()));
    let list = |items: &[&str]| items.iter().map(|item| (*item).to_owned()).collect::<Vec<_>>();
    let request = LocalRequest {
        exclude: list(&["a", "!a/keep", "real", "link"]),
        ..LocalRequest::default()
    };
    assert_eq!(received(&files, request).await, ["a", "a/keep", "b", "b/x.md", "b/ü.txt"]);
    let request = LocalRequest { include: list(&["b/*.md", "ü"]), ..LocalRequest::default() };
    assert_eq!(received(&files, request).await, ["b", "b/x.md"]);
    let request =
        LocalRequest { follow_paths: Some(list(&["link/file"])), ..LocalRequest::default() };
    assert_eq!(received(&files, request).await, ["link", "real", "real/file"]);
    // What is followed comes beside what is included.
    let request = LocalRequest {
        follow_paths: Some(list(&["link/file"])),
        include: list(&["b/*.md"]),
        ..LocalRequest::default()
    };
    assert_eq!(received(&files, request).await, ["b", "b/x.md", "link", "real", "real/file"]);
    let other = LocalRequest { name: "other".into(), ..LocalRequest::default() };
    let error = files.tree(&other).await.unwrap_err().to_string();
    assert!(error.contains("no access allowed to dir \"other\""), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_in_memory_and_folders_that_are_gone() {
    let cache = tempfile::tempdir().unwrap();
    let text = Bytes::from_static(b"FROM scratch");
    let files = Folder::Files([("Dockerfile".to_owned(), text)].into());
    let gone = Folder::Path("/no/such/folder".into());
    let folders = [("dockerfile".to_owned(), files), ("gone".to_owned(), gone)].into();
    let (_session, group) = meet(SessionServices { folders, ..SessionServices::default() }).await;
    let files = SessionFiles::new(group, FileCache::new(cache.path()));
    let read = files.read("dockerfile", "Dockerfile").await.unwrap();
    assert_eq!(read.as_deref(), Some(&b"FROM scratch"[..]));
    let gone = LocalRequest { name: "gone".into(), ..LocalRequest::default() };
    let error = files.tree(&gone).await.unwrap_err().to_string();
    assert!(error.contains("/no/such/folder"), "{error}");
}

/// Output that is in memory once it is finished.
#[derive(Clone, Default)]
struct Memory {
    bytes: Vec<u8>,
    finished: Arc<Mutex<Option<Vec<u8>>>>,
}

impl OutputStream for Memory {
    fn open(&mut self) -> io::Result<&mut dyn Write> {
        Ok(&mut self.bytes)
    }

    fn finish(self: Box<Self>) -> io::Result<()> {
        *self.finished.lock().unwrap() = Some(self.bytes);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn results_go_where_they_were_asked_for() {
    let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for number in 0..300 {
        write(source.path(), &format!("d{}/f{number}", number % 7), number.to_string());
    }
    write(source.path(), "large", vec![7; 2_000_000]);
    let memory = Memory::default();
    let finished = memory.finished.clone();
    let outputs: BTreeMap<usize, Destination> = [
        (0, Destination::stream(Box::new(memory))),
        (2, Destination::Folder(out.path().join("new"))),
    ]
    .into();
    let (session, _group) = meet(SessionServices { outputs, ..SessionServices::default() }).await;

    let target = FolderTarget { exporter: 2, ..FolderTarget::default() };
    let quiet: TransferProgress = Arc::new(|_: TransferStatus<'_>| ());
    let tree = survey(source.path(), &mut Everything, Ownership::Root).unwrap();
    send_tree(&session, &target, Arc::new(tree.clone()), &quiet).await.unwrap();
    let made = survey(&out.path().join("new"), &mut Everything, Ownership::Root).unwrap();
    assert_eq!(made.len(), tree.len());
    assert_eq!(content(&made, "d3/f3"), b"3");
    let target = FolderTarget { exporter: 1, ..FolderTarget::default() };
    let error = send_tree(&session, &target, Arc::new(tree), &quiet).await;
    assert!(error.unwrap_err().to_string().contains("exporter 1 not found"));

    let mut sink = Box::new(SessionSink::new(session.clone(), 0, BTreeMap::new()));
    let sent: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let expected = sent.clone();
    tokio::task::spawn_blocking(move || {
        sink.open()?.write_all(&sent)?;
        sink.finish()
    })
    .await
    .unwrap()
    .unwrap();
    assert!(finished.lock().unwrap().as_ref() == Some(&expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn half_a_result_is_not_taken_for_a_whole_one() {
    let memory = Memory::default();
    let finished = memory.finished.clone();
    let outputs = [(0, Destination::stream(Box::new(memory)))].into();
    let (session, _group) = meet(SessionServices { outputs, ..SessionServices::default() }).await;
    let mut sink = Box::new(SessionSink::new(session.clone(), 0, BTreeMap::new()));
    tokio::task::spawn_blocking(move || sink.open().unwrap().write_all(b"half"))
        .await
        .unwrap()
        .unwrap();
    session.close("the daemon was killed");
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    assert_eq!(*finished.lock().unwrap(), None);
}

#[derive(Debug)]
struct Machine;

#[async_trait]
impl SecretProvider for Machine {
    async fn secret(&self, id: &str) -> Result<Option<SecretBytes>, Error> {
        Ok((id == "known").then(|| SecretBytes::new("hush")))
    }
}

#[async_trait]
impl SshAgents for Machine {
    async fn check(&self, id: &str) -> Result<bool, Error> {
        Ok(id == "default")
    }

    async fn connect(&self, _: &str) -> Result<Box<dyn AgentStream>, Error> {
        let (ours, theirs) = tokio::io::duplex(100);
        tokio::spawn(async move {
            let (mut read, mut write) = tokio::io::split(ours);
            // It hears the end, and still answers.
            let mut heard = vec![];
            read.read_to_end(&mut heard).await.unwrap();
            heard.reverse();
            write.write_all(&heard).await.unwrap();
            write.shutdown().await.unwrap();
        });
        Ok(Box::new(theirs))
    }
}

#[async_trait]
impl Uploads for Machine {
    async fn open(&self, path: &str) -> Result<Option<ByteStream>, Error> {
        let bytes = vec![5_u8; 1_000_000];
        Ok((path == "/here").then(|| Box::new(std::io::Cursor::new(bytes)) as ByteStream))
    }
}

#[async_trait]
impl Credentials for Machine {
    async fn credential(&self, host: &str) -> Result<Option<Credential>, RegistryError> {
        let password = Secret::new("hush");
        let known = host == DOCKER_HUB_KEY;
        Ok(known.then(|| Credential::Basic { username: "me".into(), password }))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_this_machine_has_is_found_by_the_daemon() {
    let registry = Registry::new(RegistryOptions::default(), Arc::new(Machine)).unwrap();
    let (session, group) = meet(SessionServices {
        secrets: Some(Arc::new(Machine)),
        ssh: Some(Arc::new(Machine)),
        uploads: Some(Arc::new(Machine)),
        login: Some(RegistryLogin { credentials: Arc::new(Machine), registry: Some(registry) }),
        ..SessionServices::default()
    })
    .await;
    let secret = SecretProvider::secret(&group, "known").await.unwrap().unwrap();
    assert_eq!(secret.expose(), b"hush");
    assert!(SecretProvider::secret(&group, "unknown").await.unwrap().is_none());

    assert!(group.check("").await.unwrap());
    assert!(!group.check("work").await.unwrap());
    let mut agent = group.connect("").await.unwrap();
    let sent: Vec<u8> = (0..200_000_u32).map(|at| at as u8).collect();
    let (mut read, mut write) = tokio::io::split(&mut agent);
    let writing = async {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut heard = vec![];
    let (_, ()) = tokio::join!(read.read_to_end(&mut heard), writing);
    assert!(heard.iter().rev().eq(sent.iter()));

    let mut uploaded = vec![];
    let mut upload = Uploads::open(&group, "/here").await.unwrap().unwrap();
    upload.read_to_end(&mut uploaded).await.unwrap();
    assert_eq!(uploaded, vec![5; 1_000_000]);

    let found = Credentials::credential(&group, DOCKER_HUB_KEY).await.unwrap();
    assert!(matches!(found, Some(Credential::Basic { username, .. }) if username == "me"));
    assert!(session.fetches_tokens("registry.example").await.unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn layouts_are_read_and_caches_written() {
    let place = tempfile::tempdir().unwrap();
    let store = ContentFolder::writable(place.path()).unwrap();
    let stores = [
        ("oci:base".to_owned(), ContentFolder::read_only(place.path())),
        ("local:/ü".to_owned(), store),
    ]
    .into();
    let (session, group) = meet(SessionServices { stores, ..SessionServices::default() }).await;
    let bytes: Vec<u8> = (0..5_000_000_u32).map(|at| at as u8).collect();
    let digest = Digest::of(&bytes);
    let write = ContentWrite {
        name: "layer".into(),
        digest: digest.clone(),
        size: bytes.len() as u64,
        labels: BTreeMap::new(),
    };
    let cache = session.content("local:/ü");
    let pieces =
        || stream::iter(bytes.chunks(1_000_000).map(|piece| Ok(Bytes::copy_from_slice(piece))));
    cache.write(&write, pieces()).await.unwrap();
    // What is there already is as good.
    cache.write(&write, pieces()).await.unwrap();
    assert_eq!(cache.info(&digest).await.unwrap().size, 5_000_000);
    assert_eq!(cache.list().await.unwrap().len(), 1);
    let wrong = ContentWrite { digest: Digest::of(b"other"), ..write.clone() };
    assert!(cache.write(&wrong, pieces()).await.is_err());
    assert_eq!(cache.list().await.unwrap().len(), 1);

    let mut read = vec![];
    let mut layer = LayoutStore::open(&group, "base", &digest).await.unwrap().unwrap();
    layer.read_to_end(&mut read).await.unwrap();
    assert!(read == bytes);
    assert!(LayoutStore::open(&group, "base", &Digest::of(b"none")).await.unwrap().is_none());
    assert!(session.content("oci:base").write(&wrong, pieces()).await.is_err());
}
