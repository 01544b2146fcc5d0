//! Sources from outside and the operations that put file systems together, against servers of this process and real
//! repositories. Needs git.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use prost::Message as _;
use slipway_solver::client::{ByteStream, LayoutFolders, SecretBytes, SecretProvider, Uploads};
use slipway_solver::executor::{ExecError, ExecSpec, Executor, Exit, Stdio};
use slipway_solver::source::image::Images;
use slipway_solver::{Job, LocalFolders, Services, SolveError, Worker};
use slipway_spec::Digest;
use slipway_spec::llb::{Definition, pb};
use slipway_spec::progress::NoProgress;
use slipway_store::registry::{Anonymous, Registry, RegistryOptions};
use slipway_store::snapshot::Snapshot;
use slipway_store::tree::{Entry, Kind};
use slipway_store::{Error, Store};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Writes `path text` pairs.
#[derive(Debug, Default)]
struct Writing(Mutex<usize>);

#[async_trait]
impl Executor for Writing {
    async fn run(&self, spec: ExecSpec, _: Stdio) -> Result<Exit, ExecError> {
        *self.0.lock().unwrap() += 1;
        for pair in spec.args.chunks(2) {
            let path = spec.upper.join(&pair[0]);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, &pair[1]).unwrap();
        }
        Ok(Exit { code: 0, signal: None, created_stubs: vec![] })
    }
}

#[derive(Clone, Default)]
struct Graph {
    ops: Vec<pb::Op>,
}

#[derive(Clone)]
struct Node(String);

impl Graph {
    fn add(&mut self, kind: pb::op::Op, inputs: &[&Node]) -> Node {
        let inputs =
            inputs.iter().map(|node| pb::Input { digest: node.0.clone(), index: 0 }).collect();
        let op = pb::Op { inputs, op: Some(kind), ..Default::default() };
        let node = Node(Digest::of(&op.encode_to_vec()).to_string());
        if !self.ops.contains(&op) {
            self.ops.push(op);
        }
        node
    }

    fn source(&mut self, identifier: &str, attrs: &[(&str, &str)]) -> Node {
        let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        self.add(pb::op::Op::Source(pb::SourceOp { identifier: identifier.into(), attrs }), &[])
    }

    fn run(&mut self, base: Option<&Node>, pairs: &[&str]) -> Node {
        let input = if base.is_some() { 0 } else { -1 };
        let root = pb::Mount { input, dest: "/".into(), output: 0, ..Default::default() };
        let args = pairs.iter().map(|part| (*part).to_owned()).collect();
        let meta = pb::Meta { args, cwd: "/".into(), ..Default::default() };
        let op = pb::ExecOp { meta: Some(meta), mounts: vec![root], ..Default::default() };
        self.add(pb::op::Op::Exec(op), &base.into_iter().collect::<Vec<_>>())
    }

    fn file(&mut self, inputs: &[&Node], actions: Vec<pb::FileAction>) -> Node {
        self.add(pb::op::Op::File(pb::FileOp { actions }), inputs)
    }

    fn definition(&self, node: &Node, index: i64) -> Definition {
        let last = pb::Op {
            inputs: vec![pb::Input { digest: node.0.clone(), index }],
            ..Default::default()
        };
        let def = self.ops.iter().chain([&last]).map(pb::Op::encode_to_vec).collect();
        Definition::from_pb(pb::Definition { def, ..Default::default() }).unwrap()
    }
}

struct Room {
    folder: tempfile::TempDir,
}

struct Built {
    store: Store,
    snapshot: Snapshot,
    runs: usize,
}

impl Room {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn worker(&self) -> Worker {
        let store = Store::open(&self.path("store")).unwrap();
        let registry = Registry::new(RegistryOptions::default(), Arc::new(Anonymous)).unwrap();
        Worker {
            images: Images::new(store.clone(), registry),
            store,
            executor: Arc::new(Writing::default()),
            parallel: Arc::new(tokio::sync::Semaphore::new(4)),
            shared: slipway_solver::Shared::default(),
            devices: slipway_solver::device::Devices::none(),
        }
    }

    async fn build_with(
        &self,
        graph: &Graph,
        node: &Node,
        index: i64,
        services: Services,
    ) -> Result<Built, SolveError> {
        let executor = Arc::new(Writing::default());
        let worker = Worker { executor: executor.clone(), ..self.worker() };
        let store = worker.store.clone();
        let client =
            LocalFolders::new(BTreeMap::from([("context".into(), self.path("context"))]), None);
        let job = Job::with(worker, Arc::new(client), Arc::new(NoProgress), None, services);
        let snapshot = job.solve(&job.load(&graph.definition(node, index)).await?).await?;
        // Written down, as an export would.
        let (rows, layers) = (store.clone(), snapshot.layers.clone());
        tokio::task::spawn_blocking(move || rows.folders(&layers).unwrap()).await.unwrap();
        let runs = *executor.0.lock().unwrap();
        Ok(Built { store, snapshot, runs })
    }

    async fn build(
        &self,
        graph: &Graph,
        node: &Node,
        services: Services,
    ) -> Result<Built, SolveError> {
        self.build_with(graph, node, 0, services).await
    }

    async fn source(
        &self,
        identifier: &str,
        attrs: &[(&str, &str)],
        services: Services,
    ) -> Result<Built, SolveError> {
        let mut graph = Graph::default();
        let node = graph.source(identifier, attrs);
        self.build(&graph, &node, services).await
    }
}

impl Built {
    fn entry(&self, path: &str) -> Option<Entry> {
        self.store.view(&self.snapshot.layers).unwrap().get(path.as_bytes()).unwrap()
    }

    fn read(&self, path: &str) -> Option<String> {
        let view = self.store.view(&self.snapshot.layers).unwrap();
        let bytes = view.read(path.as_bytes(), 10_000_000).unwrap();
        bytes.map(|bytes| String::from_utf8(bytes).unwrap())
    }

    fn paths(&self) -> Vec<String> {
        let tree = self.store.view(&self.snapshot.layers).unwrap().flatten().unwrap();
        let paths = tree.iter().map(|(path, _)| String::from_utf8(path).unwrap());
        paths.filter(|path| !path.is_empty()).collect()
    }
}

// ---- the web ----------------------------------------------------------------------------------

#[derive(Clone, Debug)]
struct Asked {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
}

type Answer = Arc<dyn Fn(&Asked) -> Vec<u8> + Send + Sync>;

/// A server that closes after each answer.
struct Server {
    address: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start(answer: impl Fn(&Asked) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (log, answer): (_, Answer) = (asked.clone(), Arc::new(answer));
        let task = tokio::spawn(async move {
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let (log, answer) = (log.clone(), answer.clone());
                tokio::spawn(async move {
                    let mut head = vec![];
                    while !head.ends_with(b"\r\n\r\n") {
                        match socket.read_u8().await {
                            Ok(byte) => head.push(byte),
                            Err(_) => return,
                        }
                    }
                    let text = String::from_utf8(head).unwrap();
                    let mut lines = text.lines();
                    let mut words = lines.next().unwrap().split(' ').map(str::to_owned);
                    let (method, path) = (words.next().unwrap(), words.next().unwrap());
                    let headers = lines
                        .filter_map(|line| line.split_once(": "))
                        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
                        .collect();
                    let asked = Asked { method, path, headers };
                    let mut bytes = answer(&asked);
                    if asked.method == "HEAD" {
                        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
                        bytes.truncate(end + 4);
                    }
                    log.lock().unwrap().push(asked);
                    let _gone = socket.write_all(&bytes).await;
                    let _gone = socket.shutdown().await;
                });
            }
        });
        Self { address, asked, task }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn count(&self) -> usize {
        self.asked.lock().unwrap().len()
    }
}

fn ok(headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n{body}"
    )
    .into()
}

fn status(line: &str, headers: &str) -> Vec<u8> {
    format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\nConnection: close\r\n{headers}\r\n").into()
}

#[derive(Debug)]
struct Secrets(BTreeMap<&'static str, &'static str>);

#[async_trait]
impl SecretProvider for Secrets {
    async fn secret(&self, id: &str) -> Result<Option<SecretBytes>, Error> {
        Ok(self.0.get(id).map(|text| SecretBytes::new(*text)))
    }
}

fn with_secrets(secrets: &[(&'static str, &'static str)]) -> Services {
    let secrets = Arc::new(Secrets(secrets.iter().copied().collect()));
    Services { secrets, ..Services::default() }
}

#[tokio::test]
async fn a_file_is_asked_for_again_and_not_sent_again() {
    let version: Arc<Mutex<&str>> = Arc::new(Mutex::new("one"));
    let current = version.clone();
    let server = Server::start(move |asked| {
        let version = *current.lock().unwrap();
        let tag = format!("\"{version}\"");
        if asked.headers.get("if-none-match") == Some(&tag) {
            return status("304 Not Modified", "");
        }
        ok(&format!("ETag: {tag}\r\nLast-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\n"), version)
    })
    .await;
    let room = Room::new();
    let url = server.url("/d/file.txt?x=1");
    let attrs = [("http.perm", "0640"), ("http.uid", "5"), ("http.gid", "6")];
    let first = room.source(&url, &attrs, Services::default()).await.unwrap();
    assert_eq!(first.read("file.txt").as_deref(), Some("one"));
    let entry = first.entry("file.txt").unwrap();
    assert_eq!((entry.mode, entry.uid, entry.gid), (0o640, 5, 6));
    assert_eq!(entry.mtime, 784_111_777_000_000_000);
    let layer = first.snapshot.layers.clone();
    drop(first);
    let second = room.source(&url, &attrs, Services::default()).await.unwrap();
    assert_eq!((second.snapshot.layers.clone(), server.count()), (layer, 2));
    assert_eq!(second.read("file.txt").as_deref(), Some("one"));
    drop(second);
    *version.lock().unwrap() = "two";
    let third = room.source(&url, &attrs, Services::default()).await.unwrap();
    assert_eq!(third.read("file.txt").as_deref(), Some("two"));
}

#[tokio::test]
async fn a_server_that_sends_everything_whatever_it_is_told_of_sends_it_once() {
    let tag = Arc::new(Mutex::new("\"1\""));
    let current = tag.clone();
    let server = Server::start(move |asked| match asked.path.as_str() {
        "/no-head" if asked.method == "HEAD" => status("405 Method Not Allowed", ""),
        _ => ok(&format!("ETag: {}\r\n", current.lock().unwrap()), "body"),
    })
    .await;
    let room = Room::new();
    let methods = || {
        let mut asked = server.asked.lock().unwrap();
        asked.drain(..).map(|asked| asked.method).collect::<Vec<_>>()
    };
    let ask = |path: &str| {
        let (room, url) = (&room, server.url(path));
        async move { drop(room.source(&url, &[], Services::default()).await.unwrap()) }
    };
    ask("/f").await;
    let agent = server.asked.lock().unwrap()[0].headers["user-agent"].clone();
    let own = concat!("slipway/", env!("CARGO_PKG_VERSION"), " ");
    assert!(agent.starts_with(own) && agent.contains("buildkit/v"), "{agent}");
    ask("/f").await;
    // The same content, compared as it is kept.
    *tag.lock().unwrap() = "W/\"1\"";
    ask("/f").await;
    assert_eq!(methods(), ["GET", "HEAD", "HEAD"]);
    *tag.lock().unwrap() = "\"2\"";
    ask("/f").await;
    assert_eq!(methods(), ["HEAD", "GET"]);
    ask("/no-head").await;
    ask("/no-head").await;
    assert_eq!(methods(), ["GET", "HEAD", "GET"]);
}

#[tokio::test]
async fn what_is_pinned_is_checked_once() {
    let server =
        Server::start(|_| ok("Content-Disposition: attachment; filename=\"../given\"\r\n", "data"))
            .await;
    let room = Room::new();
    let digest = Digest::of(b"data").to_string();
    let attrs = [("http.checksum", digest.as_str())];
    let url = server.url("/named");
    let first = room.source(&url, &attrs, Services::default()).await.unwrap();
    assert!(first.read("given").is_some() || first.read("named").is_some());
    drop(first);
    room.source(&url, &attrs, Services::default()).await.unwrap();
    assert_eq!(server.count(), 1, "the second time nobody is asked");
    let wrong = Digest::of(b"other").to_string();
    let attrs = [("http.checksum", wrong.as_str())];
    let error = room.source(&url, &attrs, Services::default()).await.err().unwrap().to_string();
    assert!(error.contains("digest mismatch") && error.contains(&wrong), "{error}");
    // Without a checksum the server may name the file, but not where it goes.
    let named = room.source(&server.url("/other"), &[], Services::default()).await.unwrap();
    assert_eq!(named.paths(), ["given"]);
}

#[tokio::test]
async fn credentials_go_to_one_place_only() {
    let elsewhere = Server::start(|asked| {
        ok("", if asked.headers.contains_key("authorization") { "leaked" } else { "clean" })
    })
    .await;
    let target = elsewhere.url("/f");
    let server = Server::start(move |asked| {
        if asked.headers.get("authorization").map(String::as_str) != Some("Bearer t0p") {
            return status("401 Unauthorized", "");
        }
        if asked.path == "/moved" {
            return status("302 Found", &format!("Location: {target}\r\n"));
        }
        ok("", asked.headers.get("accept").map_or("", String::as_str))
    })
    .await;
    let room = Room::new();
    let attrs = [("http.authheadersecret", "auth"), ("http.header.accept", "text/x")];
    let services = || with_secrets(&[("auth", "Bearer t0p\n")]);
    let direct = room.source(&server.url("/f"), &attrs, services()).await.unwrap();
    assert_eq!(direct.read("f").as_deref(), Some("text/x"));
    let moved = room.source(&server.url("/moved"), &attrs, services()).await.unwrap();
    assert_eq!(moved.read("moved").as_deref(), Some("clean"));
    let missing = room.source(&server.url("/f"), &attrs, Services::default()).await;
    assert!(missing.err().unwrap().to_string().contains("secret auth: not found"));
    let by_host = with_secrets(&[("HTTP_AUTH_TOKEN_127.0.0.1", "t0p")]);
    room.source(&server.url("/h"), &[], by_host).await.unwrap();
    let refused = room.source(&server.url("/h2"), &[], Services::default()).await;
    assert!(refused.err().unwrap().to_string().contains("401"));
}

#[tokio::test]
async fn hostile_servers_are_errors() {
    let server = Server::start(|asked| match asked.path.as_str() {
        "/loop" => status("302 Found", "Location: /loop\r\n"),
        "/nowhere" => status("302 Found", ""),
        "/inward" => status("302 Found", "Location: http://169.254.169.254/latest\r\n"),
        "/short" => b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf".to_vec(),
        "/chunk" => b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n".to_vec(),
        "/huge" => format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", 1_u64 << 60).into(),
        "/unasked" => status("304 Not Modified", ""),
        "/garbage" => b"\x00\x01\x02\r\n\r\n".to_vec(),
        _ => status("404 Not Found", ""),
    })
    .await;
    let room = Room::new();
    for (path, word) in [
        ("/loop", "redirects more than"),
        ("/nowhere", "nowhere"),
        ("/inward", "address"),
        ("/short", "broke"),
        ("/chunk", "broke"),
        ("/huge", "allowed"),
        ("/unasked", "not asked"),
        ("/garbage", ""),
        ("/gone", "404"),
    ] {
        let error = room.source(&server.url(path), &[], Services::default()).await;
        let error = error.err().unwrap_or_else(|| panic!("{path}")).to_string();
        assert!(error.contains(word), "{path}: {error}");
    }
    assert!(room.source("http://", &[], Services::default()).await.is_err());
    assert!(room.source("https://-/", &[], Services::default()).await.is_err());
}

#[derive(Debug)]
struct OneUpload;

#[async_trait]
impl Uploads for OneUpload {
    async fn open(&self, path: &str) -> Result<Option<ByteStream>, Error> {
        Ok((path == "/abc").then(|| Box::new(&b"sent"[..]) as ByteStream))
    }
}

#[tokio::test]
async fn clients_send_files_of_their_own() {
    let room = Room::new();
    let services = || Services { uploads: Arc::new(OneUpload), ..Services::default() };
    let attrs = [("http.filename", "context")];
    let built = room.source("http://buildkit-session/abc", &attrs, services()).await.unwrap();
    assert_eq!(built.read("context").as_deref(), Some("sent"));
    assert!(room.source("http://buildkit-session/x", &attrs, services()).await.is_err());
}

// ---- git --------------------------------------------------------------------------------------

fn git(folder: &Path, args: &[&str]) -> String {
    let output = Command::new("git")
        .args(["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"])
        .args(["-c", "protocol.file.allow=always", "-c", "tag.gpgSign=false"])
        .args(args)
        .current_dir(folder)
        .env("GIT_COMMITTER_DATE", "2001-02-03T04:05:06Z")
        .env("GIT_AUTHOR_DATE", "2001-02-03T04:05:06Z")
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn local_git() -> Services {
    let mut services = Services::default();
    services.git.protocols = vec!["file".into()];
    services
}

struct Repository {
    folder: PathBuf,
    first: String,
    second: String,
}

impl Repository {
    fn new(room: &Room, name: &str) -> Self {
        let folder = room.path(name);
        fs::create_dir_all(folder.join("sub/deep")).unwrap();
        git(&folder, &["init", "-q"]);
        fs::write(folder.join("f"), "one").unwrap();
        fs::write(folder.join("sub/deep/x"), "x").unwrap();
        std::os::unix::fs::symlink("/etc", folder.join("out")).unwrap();
        git(&folder, &["add", "."]);
        git(&folder, &["commit", "-qm", "1"]);
        let first = git(&folder, &["rev-parse", "HEAD"]);
        git(&folder, &["tag", "-am", "tag", "v1"]);
        fs::write(folder.join("f"), "two").unwrap();
        git(&folder, &["commit", "-qam", "2"]);
        let second = git(&folder, &["rev-parse", "HEAD"]);
        Self { folder, first, second }
    }

    fn url(&self) -> String {
        format!("file://{}", self.folder.display())
    }
}

#[tokio::test]
async fn refs_become_files() {
    let room = Room::new();
    let repository = Repository::new(&room, "repo");
    let url = repository.url();
    let at = |reference: &str| format!("git://h/repo#{reference}");
    let attrs = [("git.fullurl", url.as_str())];
    for (reference, content) in [
        ("", "two"),
        ("main", "two"),
        ("refs/heads/main", "two"),
        ("v1", "one"),
        (repository.first.as_str(), "one"),
        (repository.second.as_str(), "two"),
    ] {
        let built = room.source(&at(reference), &attrs, local_git()).await.unwrap();
        assert_eq!(built.read("f").as_deref(), Some(content), "{reference}");
        assert!(built.entry(".git").is_none());
        let entry = built.entry("f").unwrap();
        assert_eq!((entry.mode, entry.uid), (0o644, 0));
    }
    let part = room.source(&at("main:sub"), &attrs, local_git()).await.unwrap();
    assert_eq!(part.paths(), ["deep", "deep/x"]);
    for missing in ["nope", "main:nope", "main:out", "main:f", &"0".repeat(40)] {
        let error = room.source(&at(missing), &attrs, local_git()).await.err();
        assert!(error.is_some(), "{missing}");
    }
    let timed = [attrs[0], ("git.mtime", "commit")];
    let built = room.source(&at("main"), &timed, local_git()).await.unwrap();
    assert_eq!(built.entry("f").unwrap().mtime, 981_173_106_000_000_000);
    // A branch that moves is noticed, and what is known is not checked out again.
    let same = room.source(&at("main"), &attrs, local_git()).await.unwrap();
    fs::write(repository.folder.join("f"), "three").unwrap();
    git(&repository.folder, &["commit", "-q", "--amend", "-am", "3"]);
    let moved = room.source(&at("main"), &attrs, local_git()).await.unwrap();
    assert_eq!(moved.read("f").as_deref(), Some("three"));
    assert_ne!(moved.snapshot, same.snapshot);
    let pinned = [attrs[0], ("git.checksum", &repository.first[..9])];
    room.source(&at("v1"), &pinned, local_git()).await.unwrap();
    let error = room.source(&at("main"), &pinned, local_git()).await.err().unwrap().to_string();
    assert!(error.contains("expected checksum to match"), "{error}");
    let by_commit =
        [attrs[0], ("git.fetchbycommit", "true"), ("git.checksum", repository.first.as_str())];
    let other = Room::new();
    git(&repository.folder, &["config", "uploadpack.allowAnySHA1InWant", "true"]);
    let built = other.source(&at("main"), &by_commit, local_git()).await.unwrap();
    assert_eq!(built.read("f").as_deref(), Some("one"));
}

#[tokio::test]
async fn the_folder_of_git_is_kept_when_asked() {
    let room = Room::new();
    let repository = Repository::new(&room, "repo");
    let url = repository.url();
    let attrs = [("git.fullurl", url.as_str()), ("git.keepgitdir", "true")];
    for reference in ["v1", "main", repository.first.as_str()] {
        let built =
            room.source(&format!("git://h/r#{reference}"), &attrs, local_git()).await.unwrap();
        let folder = built.store.layer_folder(built.snapshot.layers[0]);
        let head = git(&folder, &["-c", "safe.directory=*", "rev-parse", "HEAD"]);
        assert_eq!(head == repository.first, reference != "main");
        assert_eq!(git(&folder, &["-c", "safe.directory=*", "status", "--porcelain"]), "");
        assert_eq!(git(&folder, &["config", "remote.origin.url"]), url);
        if reference == "v1" {
            assert_eq!(git(&folder, &["-c", "safe.directory=*", "describe"]), "v1");
        }
    }
}

#[tokio::test]
async fn submodules_come_along() {
    let room = Room::new();
    let inner = Repository::new(&room, "inner");
    let outer = Repository::new(&room, "outer");
    git(&outer.folder, &["submodule", "--quiet", "add", "../inner", "m"]);
    git(&outer.folder, &["commit", "-qam", "with"]);
    let url = outer.url();
    let attrs = [("git.fullurl", url.as_str())];
    let built = room.source("git://h/o#main", &attrs, local_git()).await.unwrap();
    assert_eq!(built.read("m/f").as_deref(), Some("two"));
    assert!(built.entry("m/.git").is_none());
    let skipped = [attrs[0], ("git.skipsubmodules", "true")];
    let built = room.source("git://h/o#main", &skipped, local_git()).await.unwrap();
    assert!(built.read("m/f").is_none());
    let kept = [attrs[0], ("git.keepgitdir", "true")];
    let built = room.source("git://h/o#main", &kept, local_git()).await.unwrap();
    assert_eq!(built.read("m/f").as_deref(), Some("two"));
    // A submodule that would run a command, or read what is not to be read, is refused by git.
    let marker = room.path("marker");
    let evil = format!("ext::sh -c touch% {}", marker.display());
    git(&outer.folder, &["config", "-f", ".gitmodules", "submodule.m.url", &evil]);
    git(&outer.folder, &["commit", "-qam", "evil"]);
    assert!(room.source("git://h/o#main", &attrs, local_git()).await.is_err());
    assert!(!marker.exists());
    drop(inner);
}

#[tokio::test]
async fn repositories_run_nothing_here() {
    let room = Room::new();
    let repository = Repository::new(&room, "repo");
    let marker = room.path("marker");
    let hostile = [
        ("git://h/r#--upload-pack=touch x", repository.url()),
        ("git://h/r", format!("ext::sh -c touch% {}", marker.display())),
        ("git://h/r", format!("ext::sh://-c touch {}", marker.display())),
        ("git://h/r", format!("ssh://-oProxyCommand=touch%20{}/x", marker.display())),
        ("git://h/r", format!("--upload-pack=touch {}", marker.display())),
        ("git://h/r#a:b\n", repository.url()),
    ];
    for (identifier, url) in hostile {
        let mut services = local_git();
        services.git.protocols.extend(["ssh".into(), "https".into()]);
        let attrs = [("git.fullurl", url.as_str())];
        let built = room.source(identifier, &attrs, services).await;
        assert!(built.is_err() || identifier.ends_with('\n'), "{identifier} {url}");
        assert!(!marker.exists(), "{url}");
    }
    // By default files of this machine are no remotes.
    let url = repository.url();
    let error =
        room.source("git://h/r", &[("git.fullurl", url.as_str())], Services::default()).await;
    let error = error.err().unwrap().to_string();
    assert!(error.contains("git may not be used over \"file\""), "{error}");
    // Filters and hooks need settings that a repository cannot bring along.
    fs::write(repository.folder.join(".gitattributes"), "* filter=evil\n").unwrap();
    git(&repository.folder, &["add", "."]);
    git(&repository.folder, &["commit", "-qm", "filter"]);
    git(
        &repository.folder,
        &["config", "filter.evil.smudge", &format!("touch {}", marker.display())],
    );
    room.source("git://h/r", &[("git.fullurl", url.as_str())], local_git()).await.unwrap();
    assert!(!marker.exists());
    let mut services = local_git();
    services.git.program = "/no/such/git".into();
    let error = Room::new().source("git://h/r", &[("git.fullurl", url.as_str())], services).await;
    assert!(error.err().unwrap().to_string().contains("install git"));
}

#[tokio::test]
async fn tokens_are_sent_to_smart_servers() {
    let room = Room::new();
    let repository = Repository::new(&room, "srv/repo");
    fs::write(repository.folder.join(".git/git-daemon-export-ok"), "").unwrap();
    let root = room.path("srv");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let root = root.clone();
            tokio::spawn(async move { serve_git(socket, &root).await });
        }
    });
    let url = format!("http://{address}/repo/.git");
    let attrs = [
        ("git.fullurl", url.as_str()),
        ("git.authtokensecret", "GIT_AUTH_TOKEN"),
        ("git.authheadersecret", "GIT_AUTH_HEADER"),
    ];
    let host = address.clone();
    let built = room
        .source("git://h/repo#v1", &attrs, with_secrets(&[("GIT_AUTH_TOKEN", "t0p\n")]))
        .await
        .unwrap();
    assert_eq!(built.read("f").as_deref(), Some("one"));
    let name: &'static str = Box::leak(format!("GIT_AUTH_HEADER.{host}").into_boxed_str());
    let header = "basic eC1hY2Nlc3MtdG9rZW46dDBw";
    room.source("git://h/repo#main", &attrs, with_secrets(&[(name, header)])).await.unwrap();
    let error = Room::new().source("git://h/repo#main", &attrs, Services::default()).await;
    let error = error.err().unwrap().to_string();
    assert!(error.contains("ls-remote failed"), "{error}");
    let error = Room::new()
        .source("git://h/repo#main", &attrs, with_secrets(&[("GIT_AUTH_TOKEN", "wr0ng")]))
        .await;
    assert!(!error.err().unwrap().to_string().contains("wr0ng"));
    server.abort();
}

/// One exchange with `git http-backend`, for those who have the token.
async fn serve_git(mut socket: tokio::net::TcpStream, root: &Path) {
    let mut head = vec![];
    while !head.ends_with(b"\r\n\r\n") {
        match socket.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let text = String::from_utf8(head).unwrap();
    let mut lines = text.lines();
    let mut first = lines.next().unwrap().split(' ');
    let (method, target) = (first.next().unwrap(), first.next().unwrap());
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let header = |name: &str| headers.get(name).cloned().unwrap_or_default();
    if header("authorization") != "basic eC1hY2Nlc3MtdG9rZW46dDBw" {
        let refusal = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=x\r\n\
                       Content-Length: 0\r\nConnection: close\r\n\r\n";
        let _gone = socket.write_all(refusal.as_bytes()).await;
        return;
    }
    let mut body = vec![];
    if header("transfer-encoding") == "chunked" {
        loop {
            let mut line = vec![];
            while !line.ends_with(b"\r\n") {
                line.push(socket.read_u8().await.unwrap());
            }
            let size = usize::from_str_radix(String::from_utf8(line).unwrap().trim(), 16).unwrap();
            let mut chunk = vec![0; size + 2];
            socket.read_exact(&mut chunk).await.unwrap();
            body.extend_from_slice(&chunk[..size]);
            if size == 0 {
                break;
            }
        }
    } else {
        body = vec![0; header("content-length").parse().unwrap_or(0)];
        socket.read_exact(&mut body).await.unwrap();
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut command = tokio::process::Command::new("git");
    command
        .args(["-c", "safe.directory=*", "http-backend"])
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_CONFIG_COUNT", "1")
        .env("GIT_CONFIG_KEY_0", "safe.directory")
        .env("GIT_CONFIG_VALUE_0", "*")
        .env("PATH_INFO", path)
        .env("QUERY_STRING", query)
        .env("REQUEST_METHOD", method)
        .env("CONTENT_TYPE", header("content-type"))
        .env("CONTENT_LENGTH", body.len().to_string())
        .env("GIT_PROTOCOL", header("git-protocol"))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped());
    if header("content-encoding") == "gzip" {
        command.env("HTTP_CONTENT_ENCODING", "gzip");
    }
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let feed = async move {
        let _gone = stdin.write_all(&body).await;
        drop(stdin);
    };
    let (output, ()) = tokio::join!(child.wait_with_output(), feed);
    let output = output.unwrap().stdout;
    let _gone = socket.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n").await;
    let _gone = socket.write_all(&output).await;
    let _gone = socket.shutdown().await;
}

// ---- layouts ----------------------------------------------------------------------------------

/// Writes a layout with one image of two layers, and returns the manifest's digest and the digest of the first layer.
fn layout(folder: &Path) -> (Digest, Digest) {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        let text = digest.to_string();
        fs::write(blobs.join(text.trim_start_matches("sha256:")), bytes).unwrap();
        (digest, bytes.len())
    };
    let layer = |name: &str| {
        let mut tar = tar::Builder::new(vec![]);
        let mut header = tar::Header::new_ustar();
        header.set_size(name.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, name.as_bytes()).unwrap();
        put(&tar.into_inner().unwrap())
    };
    let layers = [layer("a"), layer("b")];
    let ids =
        layers.iter().map(|(digest, _)| format!("\"{digest}\"")).collect::<Vec<_>>().join(",");
    let config = format!(
        "{{\"architecture\":\"{}\",\"os\":\"linux\",\"rootfs\":{{\"type\":\"layers\",\"diff_ids\":[{ids}]}}}}",
        slipway_spec::Platform::host().architecture
    );
    let config = put(config.as_bytes());
    let list = layers.iter().map(|(digest, size)| {
        format!("{{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar\",\"digest\":\"{digest}\",\"size\":{size}}}")
    });
    let manifest = format!(
        "{{\"schemaVersion\":2,\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"config\":{{\"mediaType\":\
         \"application/vnd.oci.image.config.v1+json\",\"digest\":\"{}\",\"size\":{}}},\"layers\":[{}]}}",
        config.0,
        config.1,
        list.collect::<Vec<_>>().join(",")
    );
    (put(manifest.as_bytes()).0, layers[0].0.clone())
}

#[tokio::test]
async fn layouts_of_the_client_are_images() {
    let room = Room::new();
    let (manifest, layer) = layout(&room.path("layout"));
    let services = || Services {
        layouts: Arc::new(LayoutFolders(BTreeMap::from([("mine".into(), room.path("layout"))]))),
        ..Services::default()
    };
    let identifier = format!("oci-layout://any@{manifest}");
    let attrs = [("oci.store", "mine")];
    let built = room.source(&identifier, &attrs, services()).await.unwrap();
    assert_eq!(built.paths(), ["a", "b"]);
    let limited = [attrs[0], ("oci.layerlimit", "1")];
    assert_eq!(room.source(&identifier, &limited, services()).await.unwrap().paths(), ["a"]);
    assert!(room.source("oci-layout://any:1", &attrs, services()).await.is_err());
    let error = Room::new().source(&identifier, &[("oci.store", "x")], services()).await;
    assert!(error.err().unwrap().to_string().contains("not found"));
    let blob = format!("oci-layout+blob://any@{layer}");
    let named = [attrs[0], ("http.filename", "l.tar"), ("http.perm", "0444")];
    let built = room.source(&blob, &named, services()).await.unwrap();
    assert_eq!((built.paths(), built.entry("l.tar").unwrap().mode), (vec!["l.tar".into()], 0o444));
    // Content that is not what its name says is not taken.
    let digest = layer.to_string();
    let path = room.path("layout/blobs/sha256").join(digest.trim_start_matches("sha256:"));
    fs::write(path, "tampered").unwrap();
    let error = Room::new().source(&blob, &named, services()).await.err().unwrap().to_string();
    assert!(error.contains("digest mismatch"), "{error}");
}

// ---- operations -------------------------------------------------------------------------------

fn mkfile(path: &str, text: &str) -> pb::file_action::Action {
    pb::file_action::Action::Mkfile(pb::FileActionMkFile {
        path: path.into(),
        mode: 0o644,
        data: text.as_bytes().to_vec(),
        owner: None,
        timestamp: 7,
    })
}

fn rm(path: &str) -> pb::file_action::Action {
    pb::file_action::Action::Rm(pb::FileActionRm { path: path.into(), ..Default::default() })
}

fn copy(src: &str, dest: &str) -> pb::FileActionCopy {
    pb::FileActionCopy {
        src: src.into(),
        dest: dest.into(),
        mode: -1,
        timestamp: -1,
        create_dest_path: true,
        dir_copy_contents: true,
        ..Default::default()
    }
}

fn action(
    input: i64,
    secondary_input: i64,
    output: i64,
    action: pb::file_action::Action,
) -> pb::FileAction {
    pb::FileAction { input, secondary_input, output, action: Some(action) }
}

#[tokio::test]
async fn merging_lays_layers_over_each_other() {
    let room = Room::new();
    let mut graph = Graph::default();
    let left = graph.run(None, &["l", "1", "both", "left", "gone", "x"]);
    let base = graph.run(None, &["r", "1", "gone", "y"]);
    let right = graph.file(&[&base], vec![action(0, -1, 0, rm("/gone"))]);
    let over = graph.run(Some(&right), &["both", "right"]);
    let inputs = (0..2).map(|input| pb::MergeInput { input }).collect();
    let merged = graph.add(pb::op::Op::Merge(pb::MergeOp { inputs }), &[&left, &over]);
    let built = room.build(&graph, &merged, Services::default()).await.unwrap();
    assert_eq!(built.read("both").as_deref(), Some("right"));
    assert!(built.read("l").is_some() && built.read("r").is_some());
    assert_eq!(built.read("gone"), None, "what one part removed is removed below it, too");
    assert_eq!(built.snapshot.layers.len(), 4);
    let again = room.build(&graph, &merged, Services::default()).await.unwrap();
    assert_eq!((again.snapshot, again.runs), (built.snapshot, 0));
}

#[tokio::test]
async fn differences_are_layers_or_computed() {
    let room = Room::new();
    let mut graph = Graph::default();
    let base = graph.run(None, &["a", "1", "b", "1"]);
    let top = graph.run(Some(&base), &["b", "2"]);
    let other = graph.run(None, &["b", "3", "c", "3"]);
    let diff = |graph: &mut Graph, lower: &Node, upper: &Node| {
        let op = pb::DiffOp {
            lower: Some(pb::LowerDiffInput { input: 0 }),
            upper: Some(pb::UpperDiffInput { input: 1 }),
        };
        graph.add(pb::op::Op::Diff(op), &[lower, upper])
    };
    let tail = diff(&mut graph, &base, &top);
    let built = room.build(&graph, &tail, Services::default()).await.unwrap();
    assert_eq!((built.paths(), built.snapshot.layers.len()), (vec!["b".into()], 1));
    let computed = diff(&mut graph, &top, &other);
    let built = room.build(&graph, &computed, Services::default()).await.unwrap();
    assert_eq!(built.paths(), ["b", "c"]);
    let inputs = (0..2).map(|input| pb::MergeInput { input }).collect();
    let merged = graph.add(pb::op::Op::Merge(pb::MergeOp { inputs }), &[&top, &computed]);
    let both = room.build(&graph, &merged, Services::default()).await.unwrap();
    assert_eq!((both.read("b").as_deref(), both.read("a")), (Some("3"), None));
    let again = room.build(&graph, &computed, Services::default()).await.unwrap();
    assert_eq!((again.snapshot, again.runs), (built.snapshot, 0));
    let nothing = diff(&mut graph, &top, &top);
    assert!(room.build(&graph, &nothing, Services::default()).await.unwrap().paths().is_empty());
}

#[tokio::test]
async fn definitions_are_built_from_results() {
    let room = Room::new();
    let mut inner = Graph::default();
    let step = inner.run(None, &["made", "inside"]);
    let bytes = inner.definition(&step, 0).to_bytes();
    let build = |graph: &mut Graph, data: &[u8], name: &str| {
        let file = pb::file_action::Action::Mkfile(pb::FileActionMkFile {
            path: "/d".into(),
            mode: 0o644,
            data: data.to_vec(),
            owner: None,
            timestamp: 0,
        });
        let definition = graph.file(&[], vec![action(-1, -1, 0, file)]);
        let inputs =
            BTreeMap::from([("buildkit.llb.definition".into(), pb::BuildInput { input: 0 })]);
        let attrs = BTreeMap::from([("llbbuild.filename".into(), name.into())]);
        let op = pb::BuildOp { builder: -1, inputs, def: None, attrs };
        graph.add(pb::op::Op::Build(op), &[&definition])
    };
    let mut graph = Graph::default();
    let outer = build(&mut graph, &bytes, "/d");
    let after = graph.run(Some(&outer), &["more", "1"]);
    let built = room.build(&graph, &after, Services::default()).await.unwrap();
    assert_eq!((built.read("made").as_deref(), built.runs), (Some("inside"), 2));
    assert_eq!(room.build(&graph, &after, Services::default()).await.unwrap().runs, 0);
    let missing = build(&mut graph, &bytes, "/other");
    assert!(room.build(&graph, &missing, Services::default()).await.is_err());
    let garbage = build(&mut graph, b"\xff\xff\xff", "/d");
    assert!(room.build(&graph, &garbage, Services::default()).await.is_err());
    // Definitions in definitions end somewhere.
    let mut data = bytes;
    for _ in 0..20 {
        let mut graph = Graph::default();
        let node = build(&mut graph, &data, "/d");
        data = graph.definition(&node, 0).to_bytes();
    }
    let mut graph = Graph::default();
    let deep = build(&mut graph, &data, "/d");
    let error = room.build(&graph, &deep, Services::default()).await.err().unwrap().to_string();
    assert!(error.contains("come out of each other"), "{error}");
}

#[tokio::test]
async fn inputs_are_handed_on() {
    let room = Room::new();
    let mut graph = Graph::default();
    let (one, two) = (graph.run(None, &["one", "1"]), graph.run(None, &["two", "2"]));
    let op = pb::PassthroughOp { id: "x".into(), outputs: vec![1, 0] };
    let through = graph.add(pb::op::Op::Passthrough(op), &[&one, &two]);
    for (index, path) in [(0, "two"), (1, "one")] {
        let built = room.build_with(&graph, &through, index, Services::default()).await.unwrap();
        assert_eq!(built.paths(), [path]);
    }
    let after = graph.run(Some(&through), &["more", "1"]);
    assert_eq!(
        room.build(&graph, &after, Services::default()).await.unwrap().paths(),
        ["more", "two"]
    );
}

#[tokio::test]
async fn actions_branch_and_copy_from_each_other() {
    let room = Room::new();
    let mut graph = Graph::default();
    let base = graph.run(None, &["base", "1"]);
    // One input, so that the outcomes of actions count from 1.
    let node = graph.file(
        &[&base],
        vec![
            action(0, -1, -1, mkfile("/x", "x")),
            action(1, -1, 0, mkfile("/left", "l")),
            action(1, -1, 1, mkfile("/right", "r")),
            action(-1, 1, 2, pb::file_action::Action::Copy(copy("/x", "/copied"))),
            action(2, -1, 3, mkfile("/further", "f")),
        ],
    );
    for (index, paths) in [
        (0, &["base", "left", "x"][..]),
        (1, &["base", "right", "x"]),
        (2, &["copied"]),
        (3, &["base", "further", "left", "x"]),
    ] {
        let built = room.build_with(&graph, &node, index, Services::default()).await.unwrap();
        assert_eq!(built.paths(), paths, "{index}");
    }
}

#[tokio::test]
async fn copies_take_what_matches() {
    let room = Room::new();
    let mut graph = Graph::default();
    let base = graph.run(
        None,
        &[
            "src/a/1.go",
            "1",
            "src/a/1.md",
            "2",
            "src/b/2.go",
            "3",
            "src/c/d/3.go",
            "4",
            "src/e/x",
            "5",
        ],
    );
    let take = |graph: &mut Graph, change: &dyn Fn(&mut pb::FileActionCopy)| {
        let mut copy = copy("/src", "/out");
        change(&mut copy);
        graph.file(&[&base], vec![action(-1, 0, 0, pb::file_action::Action::Copy(copy))])
    };
    let node = take(&mut graph, &|copy| {
        copy.include_patterns = vec!["**/*.go".into()];
        copy.exclude_patterns = vec!["b".into()];
    });
    let built = room.build(&graph, &node, Services::default()).await.unwrap();
    assert_eq!(built.paths(), ["out", "out/a", "out/a/1.go", "out/c", "out/c/d", "out/c/d/3.go"]);
    let node = take(&mut graph, &|copy| copy.include_patterns = vec!["c".into()]);
    let built = room.build(&graph, &node, Services::default()).await.unwrap();
    assert_eq!(built.paths(), ["out", "out/c", "out/c/d", "out/c/d/3.go"]);
    let node =
        take(&mut graph, &|copy| copy.required_paths = vec!["/src/a/1.go".into(), "/src/c".into()]);
    room.build(&graph, &node, Services::default()).await.unwrap();
    let node = take(&mut graph, &|copy| {
        copy.include_patterns = vec!["a".into()];
        copy.required_paths = vec!["/src/b".into()];
    });
    let error = room.build(&graph, &node, Services::default()).await.err().unwrap().to_string();
    assert!(error.contains("\"/src/b\": not found"), "{error}");
    // What a pattern leaves out does not count.
    let node = take(&mut graph, &|copy| copy.include_patterns = vec!["**/*.md".into()]);
    let first = room.build(&graph, &node, Services::default()).await.unwrap();
    assert_eq!(first.paths(), ["out", "out/a", "out/a/1.md"]);
    assert!(matches!(first.entry("out/a/1.md").unwrap().kind, Kind::File { .. }));
}

#[tokio::test]
async fn archives_made_by_actions_are_unpacked() {
    let room = Room::new();
    let mut tar = tar::Builder::new(vec![]);
    let mut header = tar::Header::new_ustar();
    header.set_size(2);
    header.set_mode(0o600);
    tar.append_data(&mut header, "in/side", &b"hi"[..]).unwrap();
    let archive = pb::file_action::Action::Mkfile(pb::FileActionMkFile {
        path: "/a.tar".into(),
        mode: 0o644,
        data: tar.into_inner().unwrap(),
        owner: None,
        timestamp: 0,
    });
    let unpack =
        pb::FileActionCopy { attempt_unpack_docker_compatibility: true, ..copy("/a.tar", "/out/") };
    let mut graph = Graph::default();
    let node = graph.file(
        &[],
        vec![action(-1, -1, -1, archive), action(-1, 0, 0, pb::file_action::Action::Copy(unpack))],
    );
    let built = room.build(&graph, &node, Services::default()).await.unwrap();
    assert_eq!(built.read("out/in/side").as_deref(), Some("hi"));
}

#[tokio::test]
async fn builds_that_want_the_same_file_download_it_once() {
    let room = Room::new();
    let server = Server::start(|_| ok("ETag: \"1\"\r\n", "body")).await;
    let mut graph = Graph::default();
    let node = graph.source(&server.url("/f"), &[]);
    let worker = room.worker();
    let build = |_| async {
        let client = Arc::new(LocalFolders::new(BTreeMap::new(), None));
        let job = Job::new(worker.clone(), client, Arc::new(NoProgress));
        job.solve(&job.load(&graph.definition(&node, 0)).await.unwrap()).await.unwrap()
    };
    let made = futures::future::join_all((0..32).map(build)).await;
    assert_eq!(server.count(), 1);
    assert!(made.iter().all(|snapshot| *snapshot == made[0]));
}

// ---- what is known of sources, and who decides about them --------------------------------------

use slipway_solver::client::{PolicyAnswer, PolicyQuestion, PolicyVerifier, SourcePolicies};
use slipway_solver::policy::Policy;
use slipway_solver::source::metadata::{
    ChecksumAlgorithm, ChecksumRequest, MetadataRequest, SourceMetadata,
};
use slipway_spec::Platform;

impl Room {
    fn job(&self, services: Services) -> Job {
        let client = Arc::new(LocalFolders::new(BTreeMap::new(), None));
        Job::with(self.worker(), client, Arc::new(NoProgress), None, services)
    }
}

fn asking(identifier: &str, attrs: &[(&str, &str)]) -> MetadataRequest {
    let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    MetadataRequest::new(pb::SourceOp { identifier: identifier.into(), attrs })
}

#[tokio::test]
async fn files_of_the_web_are_known_by_what_the_server_says() {
    let server = Server::start(|asked| match asked.path.as_str() {
        "/dated" => ok("Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\n", "body"),
        _ => ok("Content-Disposition: attachment; filename=\"named\"\r\n", "body"),
    })
    .await;
    let room = Room::new();
    let job = room.job(Services::default());
    let dated = job.metadata(&asking(&server.url("/dated"), &[])).await.unwrap().http.unwrap();
    assert_eq!((dated.filename.as_str(), dated.last_modified), ("dated", Some(784_111_777)));
    assert_eq!(dated.digest, Digest::of(b"body"));
    let mut wanted = asking(&server.url("/x"), &[]);
    let suffix = bytes::Bytes::from_static(b" and more");
    wanted.checksum =
        Some(ChecksumRequest { algorithm: ChecksumAlgorithm::Sha256, suffix: suffix.clone() });
    let named = job.metadata(&wanted).await.unwrap().http.unwrap();
    assert_eq!((named.filename.as_str(), named.last_modified), ("named", None));
    let checksum = named.checksum.unwrap();
    assert_eq!(checksum.digest, Digest::of(b"body and more").to_string());
    assert_eq!(checksum.suffix, suffix);
    // What is pinned is not asked for.
    let (count, digest) = (server.count(), Digest::of(b"other"));
    let pinned = [("http.checksum", digest.to_string())];
    let pinned = [(pinned[0].0, pinned[0].1.as_str())];
    let pinned = job.metadata(&asking(&server.url("/p"), &pinned)).await.unwrap().http.unwrap();
    assert_eq!((pinned.digest, server.count()), (digest, count));
}

#[tokio::test]
async fn refs_are_known_with_their_objects() {
    let room = Room::new();
    let origin = room.path("origin");
    fs::create_dir(&origin).unwrap();
    git(&origin, &["init", "-q", "-b", "main"]);
    fs::write(origin.join("f"), "1").unwrap();
    git(&origin, &["add", "."]);
    git(&origin, &["commit", "-q", "-m", "first"]);
    git(&origin, &["tag", "-a", "-m", "a tag", "v1"]);
    let commit = git(&origin, &["rev-parse", "HEAD"]);
    let tag = git(&origin, &["rev-parse", "v1"]);
    let url = format!("file://{}", origin.display());
    let job = room.job(local_git());
    let ask = async |reference: &str, objects: bool| {
        let mut asked =
            asking(&format!("git://h/p.git{reference}"), &[("git.fullurl", url.as_str())]);
        asked.git_objects = objects;
        job.metadata(&asked).await.unwrap().git.unwrap()
    };
    let head = ask("", false).await;
    assert_eq!((head.checksum.as_str(), head.reference.as_str()), (&*commit, "refs/heads/main"));
    assert_eq!((head.commit_checksum, head.commit_object), (None, None));
    let tagged = ask("#v1", true).await;
    assert_eq!((tagged.checksum.as_str(), tagged.reference.as_str()), (&*tag, "refs/tags/v1"));
    assert_eq!(tagged.commit_checksum.as_deref(), Some(&*commit));
    let text = |bytes: Option<bytes::Bytes>| String::from_utf8(bytes.unwrap().to_vec()).unwrap();
    assert!(text(tagged.tag_object).contains("tag v1\n"));
    assert!(text(tagged.commit_object).contains("committer "));
    let head = ask("", true).await;
    assert!(text(head.commit_object).ends_with("\n\nfirst\n"));
    assert_eq!(head.tag_object, None);
}

#[tokio::test]
async fn images_of_layouts_are_known_by_their_config() {
    let room = Room::new();
    let (index, _) = layout(&room.path("layout"));
    let layouts = LayoutFolders(BTreeMap::from([("mine".into(), room.path("layout"))]));
    let job = room.job(Services { layouts: Arc::new(layouts), ..Services::default() });
    let mut asked = asking(&format!("oci-layout://h/a@{index}"), &[("oci.store", "mine")]);
    asked.platform = Some(Platform::host());
    let image = job.metadata(&asked).await.unwrap().image.unwrap();
    assert_eq!(image.digest, index);
    let config: serde_json::Value = serde_json::from_slice(&image.config).unwrap();
    assert!(config["rootfs"]["diff_ids"].is_array(), "{config}");
}

fn rules(text: &str) -> Policy {
    Policy::from_json(format!("{{\"rules\": [{text}]}}").as_bytes()).unwrap()
}

fn policed(rules: Vec<Policy>, verifier: Option<Arc<dyn PolicyVerifier>>) -> Services {
    Services { policies: SourcePolicies { rules, verifier }, ..Services::default() }
}

#[tokio::test]
async fn what_a_policy_denies_is_not_asked_for() {
    let server = Server::start(|_| ok("", "body")).await;
    let room = Room::new();
    let url = server.url("/f");
    let deny = rules(r#"{"action": "DENY", "selector": {"identifier": "http://*"}}"#);
    let error = room.source(&url, &[], policed(vec![deny], None)).await.err().unwrap();
    assert_eq!(
        error.to_string(),
        format!(
            "error evaluating the source policy: source {url:?} denied by policy: source denied by policy"
        )
    );
    assert_eq!(server.count(), 0);
    assert!(error.vertex.is_some());
    // A policy of a single definition counts as well.
    let job = room.job(Services::default());
    let mut graph = Graph::default();
    let node = graph.source(&url, &[]);
    let deny = [rules(r#"{"action": "DENY", "selector": {"identifier": "http://*"}}"#)];
    assert!(job.load_under(&graph.definition(&node, 0), &deny).await.is_err());
    assert!(job.load(&graph.definition(&node, 0)).await.is_ok());
}

#[tokio::test]
async fn what_a_policy_converts_is_taken_from_elsewhere_by_all_that_need_it() {
    let server = Server::start(|asked| ok("", asked.path.trim_start_matches('/'))).await;
    let room = Room::new();
    let convert = rules(&format!(
        r#"{{"action": "CONVERT", "selector": {{"identifier": "http://{0}/old/*"}},
            "updates": {{"identifier": "http://{0}/new-${{1}}", "attrs": {{"http.perm": "0640"}}}}}}"#,
        server.address
    ));
    let mut graph = Graph::default();
    let old = graph.source(&server.url("/old/f"), &[("http.filename", "f")]);
    let taken = graph
        .file(&[&old], vec![action(-1, 0, 0, pb::file_action::Action::Copy(copy("/f", "/out")))]);
    let built = room.build(&graph, &taken, policed(vec![convert], None)).await.unwrap();
    assert_eq!(built.read("out").as_deref(), Some("new-f"));
    assert_eq!(built.entry("out").unwrap().mode, 0o640);
    let asked: Vec<String> =
        server.asked.lock().unwrap().iter().map(|asked| asked.path.clone()).collect();
    assert_eq!(asked, ["/new-f"]);
    drop(built);
    let built = room.build(&graph, &taken, Services::default()).await.unwrap();
    assert_eq!(built.read("out").as_deref(), Some("old/f"), "another build is not concerned");
}

/// Wants to know the digest of each file, and lets one of them pass.
#[derive(Debug)]
struct Knowing {
    digest: Digest,
    asked: Mutex<Vec<SourceMetadata>>,
}

#[async_trait]
impl PolicyVerifier for Knowing {
    async fn check(&self, question: PolicyQuestion<'_>) -> Result<PolicyAnswer, Error> {
        self.asked.lock().unwrap().push(question.known.clone());
        Ok(match &question.known.http {
            _ if question.source.identifier.ends_with("/moved") => {
                let identifier = question.source.identifier.replace("/moved", "/good");
                PolicyAnswer::Convert(pb::SourceOp { identifier, ..question.source.clone() })
            }
            _ if question.source.identifier.ends_with("/curious") => {
                PolicyAnswer::Ask(Box::new(MetadataRequest::new(question.source.clone())))
            }
            None => PolicyAnswer::Ask(Box::new(MetadataRequest::new(question.source.clone()))),
            Some(http) if http.digest == self.digest => PolicyAnswer::Allow,
            Some(_) => PolicyAnswer::Deny(vec!["unknown content".into()]),
        })
    }
}

#[tokio::test]
async fn a_verifier_is_told_what_it_asks_for() {
    let server = Server::start(|asked| match asked.path.as_str() {
        "/good" => ok("", "good"),
        _ => ok("", "bad"),
    })
    .await;
    let room = Room::new();
    let knowing = || Arc::new(Knowing { digest: Digest::of(b"good"), asked: Mutex::default() });
    let verifier = knowing();
    let services = policed(vec![], Some(verifier.clone()));
    let built = room.source(&server.url("/good"), &[], services).await.unwrap();
    assert_eq!(built.read("good").as_deref(), Some("good"));
    drop(built);
    let asked = verifier.asked.lock().unwrap().len();
    assert_eq!(asked, 2);
    let services = policed(vec![], Some(knowing()));
    let error = room.source(&server.url("/bad"), &[], services).await.err().unwrap();
    assert!(error.to_string().ends_with("not allowed by policy: action DENY"), "{error}");
    let slipway_solver::Cause::Denied { reasons, .. } = &*error.cause else { panic!("{error:?}") };
    assert_eq!(reasons, &["unknown content"]);
    let services = policed(vec![], Some(knowing()));
    let moved = room.source(&server.url("/moved"), &[], services).await.unwrap();
    assert_eq!(moved.read("good").as_deref(), Some("good"));
    drop(moved);
    let services = policed(vec![], Some(knowing()));
    let error = room.source(&server.url("/curious"), &[], services).await.err().unwrap();
    assert!(error.to_string().ends_with("too many policy requests"), "{error}");
}

#[tokio::test]
async fn a_source_that_nobody_wrote_fails_where_it_is_used() {
    let server = Server::start(|_| status("404 Not Found", "")).await;
    let room = Room::new();
    let mut graph = Graph::default();
    let missing = graph.source(&server.url("/f"), &[]);
    let taken = graph.file(
        &[&missing],
        vec![action(-1, 0, 0, pb::file_action::Action::Copy(copy("/f", "/out")))],
    );
    let position = |line| Some(pb::Position { line, character: 0 });
    let location = pb::Location {
        source_index: 0,
        ranges: vec![pb::Range { start: position(3), end: position(3) }],
    };
    let info = pb::SourceInfo { filename: "Dockerfile".into(), ..pb::SourceInfo::default() };
    let mut definition = graph.definition(&taken, 0);
    let places = |node: &Node| {
        BTreeMap::from([(node.0.clone(), pb::Locations { locations: vec![location.clone()] })])
    };
    definition.source = Some(pb::Source { locations: places(&taken), infos: vec![info] });
    let job = room.job(Services::default());
    let error = job.solve(&job.load(&definition).await.unwrap()).await.unwrap_err();
    let failed = error.vertex.as_ref().unwrap();
    assert_eq!(failed.digest.to_string(), missing.0);
    assert_eq!(failed.ranges[0].start.as_ref().unwrap().line, 3);
    assert_eq!(failed.source.as_ref().unwrap().filename, "Dockerfile");
    // So does one that a policy denies.
    let deny = rules(r#"{"action": "DENY", "selector": {"identifier": "http://*"}}"#);
    let job = room.job(policed(vec![deny], None));
    let error = job.load(&definition).await.unwrap_err();
    assert_eq!(error.vertex.unwrap().source.unwrap().filename, "Dockerfile");
}
