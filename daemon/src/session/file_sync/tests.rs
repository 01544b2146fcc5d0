use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::pin::Pin;
use std::sync::Mutex;

use futures::{Stream, StreamExt as _};
use slipway_engine::store::tree::{Content, Entry, Kind};
use slipway_spec::wire::filesync::file_sync_server::{FileSync, FileSyncServer};
use slipway_spec::wire::fsutil::Stat;
use slipway_spec::wire::fsutil::packet::PacketType;
use tonic::{Response, Status, Streaming};

use super::go_sender::{self, Folder, stat};
use super::writer::{Arrived, BUDGET, Writer};
use super::*;
use crate::fake_client::FakeClient;
use crate::session::SessionManager;
use slipway_transport::packet::{self, FileType};

type Messages = Pin<Box<dyn Stream<Item = Result<Packet, Status>> + Send>>;

/// Runs a transfer against a client; channels are as narrow as can be, so that whoever waits for the wrong thing hangs.
async fn transfer<F, T>(
    cache: &FileCache,
    scope: u64,
    client: impl FnOnce(Messages, mpsc::Sender<Result<Packet, Status>>) -> F,
) -> (Result<Tree, Error>, T)
where
    F: Future<Output = T>,
{
    transfer_of(cache, scope, false, client).await
}

async fn transfer_of<F, T>(
    cache: &FileCache,
    scope: u64,
    fresh: bool,
    client: impl FnOnce(Messages, mpsc::Sender<Result<Packet, Status>>) -> F,
) -> (Result<Tree, Error>, T)
where
    F: Future<Output = T>,
{
    let (outgoing, mut requests) = mpsc::channel(1);
    let (answers, mut incoming) = mpsc::channel(1);
    let requests = futures::stream::poll_fn(move |context| requests.poll_recv(context)).map(Ok);
    let incoming = futures::stream::poll_fn(move |context| incoming.poll_recv(context));
    let opened = cache.clone();
    let begun = blocking::run(move || Ok(opened.contents("key")?.begin())).await.unwrap();
    let mut progress = |_| ();
    let options = ReceiveOptions {
        name: "context",
        scope,
        fresh,
        limits: Limits { entries: 20_000, text: 10 << 20 },
        progress: &mut progress,
    };
    let both = futures::future::join(
        receive(incoming, outgoing, begun, options),
        client(Box::pin(requests), answers),
    );
    tokio::time::timeout(Duration::from_secs(60), both).await.expect("the transfer hangs")
}

/// Transfers a folder from a client of the Go kind. Returns the tree and what was asked for, sorted.
async fn sync(cache: &FileCache, folder: &Folder) -> (Tree, Vec<String>) {
    let (tree, asked) = transfer(cache, 1, async |requests, answers| {
        go_sender::send(folder, requests, answers).await
    })
    .await;
    let mut asked = asked.unwrap();
    asked.sort();
    (tree.unwrap(), asked)
}

fn bytes(entry: &Entry) -> Option<Vec<u8>> {
    match &entry.kind {
        Kind::File { content: Content::Inline(bytes), .. } => Some(bytes.to_vec()),
        Kind::File { content: Content::Part { file, offset, digest }, size } => {
            let mut bytes = vec![0; usize::try_from(*size).unwrap()];
            file.read(*offset, &mut bytes).unwrap();
            assert_eq!(*digest, <[u8; 32]>::from(Sha256::digest(&bytes)));
            Some(bytes)
        }
        Kind::File { content: Content::Host { path, digest }, size } => {
            let bytes = fs::read(path).unwrap();
            assert_eq!(bytes.len() as u64, *size);
            assert_eq!(*digest, Some(Sha256::digest(&bytes).into()));
            Some(bytes)
        }
        _ => None,
    }
}

fn texts(tree: &Tree) -> Vec<(String, String)> {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    tree.iter().filter_map(|(path, entry)| Some((text(path), text(bytes(entry)?)))).collect()
}

/// Checks that a tree is what a folder says.
fn assert_same(tree: &Tree, folder: &Folder) {
    let entries = folder.entries();
    assert_eq!(tree.len(), entries.len());
    for (stat, content) in entries {
        let entry = tree.get(&stat.path).unwrap();
        if let Some(bytes) = bytes(entry)
            && stat.linkname.is_empty()
        {
            assert_eq!(bytes, content, "{stat:?}");
        }
        assert_eq!((entry.uid, entry.gid, entry.mtime), (stat.uid, stat.gid, stat.mod_time));
        assert_eq!(entry.mode, packet::permissions(stat.mode), "{stat:?}");
    }
}

/// Lists the files that have bytes of a client.
fn objects(root: &Path) -> usize {
    let folders = |path: &Path| -> Vec<_> {
        fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let keys = folders(root);
    let groups = keys.iter().flat_map(|key| folders(key)).filter(|path| path.is_dir());
    groups.map(|group| folders(&group).len()).sum()
}

fn odd_folder() -> Folder {
    let mut folder = Folder::of(&[
        "-dash=1",
        "a b=2",
        "a\nb=3",
        "a\\b=4",
        "dir/",
        "dir/empty=",
        "dir/sub/",
        "dir/sub/x=5",
        "dir-x=6",
        "dir.x=7",
        "hard==dir/sub/x",
        "link->../../outside",
        "ünï=8",
    ]);
    let name = Bytes::from_static(b"not \xff utf-8");
    folder.add(Stat { path: name, size: 1, ..stat("", FileType::Regular, 0o4755) }, "9".into());
    folder.add(stat("fifo", FileType::Fifo, 0o600), Bytes::new());
    let device = Stat { devmajor: 1, devminor: 3, ..stat("null", FileType::CharDevice, 0o666) };
    folder.add(device, Bytes::new());
    let attributes =
        [("user.note", "kept"), ("security.capability", "kept too"), ("security.selinux", "not")];
    let xattrs = attributes.map(|(name, value)| (name.to_owned(), value.into())).into();
    folder.add(
        Stat { xattrs, uid: 7, gid: 8, ..stat("xattrs", FileType::Directory, 0o1777) },
        Bytes::new(),
    );
    folder
}

#[tokio::test]
async fn a_folder_comes_as_it_is() {
    let root = tempfile::tempdir().unwrap();
    let folder = odd_folder();
    let (tree, asked) = sync(&FileCache::new(root.path()), &folder).await;
    // Neither what is empty nor a further name of a file is asked for.
    assert_eq!(asked.len(), 9, "{asked:?}");
    assert_same(&tree, &folder);
    let first = tree.get(b"dir/sub/x").unwrap();
    assert!(first.inode.is_some());
    assert_eq!(tree.get(b"hard"), Some(first));
    assert_eq!(tree.get(b"link").unwrap().kind, Kind::Symlink { target: b"../../outside".into() });
    assert_eq!(tree.get(b"null").unwrap().kind, Kind::CharDevice { major: 1, minor: 3 });
    let names: Vec<_> = tree.get(b"xattrs").unwrap().xattrs.keys().cloned().collect();
    assert_eq!(names, [b"security.capability".to_vec(), b"user.note".to_vec()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_files_come_once() {
    let root = tempfile::tempdir().unwrap();
    let mut folder = Folder::default();
    for directory in 0..100 {
        folder.add(stat(&format!("d{directory}"), FileType::Directory, 0o755), Bytes::new());
        for file in 0..100 {
            folder.file(&format!("d{directory}/f{file}"), format!("{directory} {file}"));
        }
    }
    let cache = FileCache::new(root.path());
    let (tree, asked) = sync(&cache, &folder).await;
    assert_eq!(asked.len(), 10_000);
    assert_same(&tree, &folder);
    let (again, asked) = sync(&cache, &folder).await;
    assert_eq!(asked, [""; 0]);
    assert_eq!(again, tree);
    assert_eq!(objects(root.path()), 1, "small files are put together");
}

#[tokio::test]
async fn only_what_changed_is_asked_for() {
    let root = tempfile::tempdir().unwrap();
    let cache = FileCache::new(root.path());
    let mut folder = Folder::of(&["content=a", "gone=b", "mode=c", "same=d", "time=e", "to-dir=f"]);
    let (before, asked) = sync(&cache, &folder).await;
    assert_eq!(asked.len(), 6);

    folder.file("content", "longer");
    folder.remove("gone");
    folder.add(Stat { mode: 0o755, ..folder.entries()[1].0.clone() }, "c".into());
    folder.file("new", "g");
    let time = folder.entries().iter().find(|(stat, _)| stat.path == "time").unwrap().0.clone();
    folder.add(Stat { mod_time: 1, ..time }, "e".into());
    folder.remove("to-dir");
    folder.add(stat("to-dir", FileType::Directory, 0o755), Bytes::new());
    let (after, asked) = sync(&cache, &folder).await;
    assert_eq!(asked, ["content", "mode", "new", "time"]);
    assert_same(&after, &folder);
    // An earlier build still reads what it was given.
    assert_eq!(
        texts(&before),
        [
            ("content", "a"),
            ("gone", "b"),
            ("mode", "c"),
            ("same", "d"),
            ("time", "e"),
            ("to-dir", "f")
        ]
        .map(|(path, text)| (path.to_owned(), text.to_owned()))
    );
    drop(before);
    // Too little of what came first is still wanted to keep it for that.
    assert_eq!(sync(&cache, &folder).await.1, ["same"]);
    assert_eq!(objects(root.path()), 3);
    drop(after);
    let (after, asked) = sync(&cache, &folder).await;
    assert_eq!(asked, [""; 0]);
    assert_eq!(objects(root.path()), 2);

    // The same after a restart of the daemon.
    drop((after, cache));
    let (after, asked) = sync(&FileCache::new(root.path()), &folder).await;
    assert_eq!(asked, [""; 0]);
    assert_same(&after, &folder);
}

#[tokio::test]
async fn what_is_to_be_fresh_is_sent_whatever_it_looks_like() {
    let root = tempfile::tempdir().unwrap();
    let cache = FileCache::new(root.path());
    let folder = |content: &'static str| {
        let mut folder = Folder::of(&["b=same"]);
        let stat = Stat { size: 3, ..go_sender::stat("a", FileType::Regular, 0o644) };
        folder.add(stat, content.as_bytes().into());
        folder
    };
    let (old, new) = (folder("old"), folder("new"));
    let sync_fresh = async |folder: &Folder, fresh| {
        let (tree, asked) = transfer_of(&cache, 1, fresh, async |requests, answers| {
            go_sender::send(folder, requests, answers).await
        })
        .await;
        (texts(&tree.unwrap())[0].1.clone(), asked.unwrap().len())
    };
    assert_eq!(sync_fresh(&old, false).await, ("old".to_owned(), 2));
    // Size and time are the same.
    assert_eq!(sync_fresh(&new, false).await, ("old".to_owned(), 0));
    assert_eq!(sync_fresh(&new, true).await, ("new".to_owned(), 2));
    assert_eq!(sync_fresh(&new, false).await, ("new".to_owned(), 0));
    assert_eq!(objects(root.path()), 1);
}

#[tokio::test]
async fn other_selections_keep_their_files() {
    let root = tempfile::tempdir().unwrap();
    let cache = FileCache::new(root.path());
    for (scope, files, expected) in [
        (1, &["a=1", "b=2"][..], &["a", "b"][..]),
        (2, &["b=2", "c=3"], &["c"]),
        (1, &["a=1", "b=2"], &[]),
        (2, &["b=2", "c=3"], &[]),
        (1, &["b=2"], &[]),
        (1, &["a=1", "b=2"], &["a"]),
    ] {
        let (tree, asked) = transfer(&cache, scope, async |requests, answers| {
            go_sender::send(&Folder::of(files), requests, answers).await
        })
        .await;
        assert_eq!(texts(&tree.unwrap()).len(), files.len());
        let mut asked = asked.unwrap();
        asked.sort();
        assert_eq!(asked, expected, "{scope} {files:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn transfers_at_the_same_time_do_not_mix() {
    let root = tempfile::tempdir().unwrap();
    let cache = FileCache::new(root.path());
    let tasks: Vec<_> = (0..8u8)
        .map(|client| {
            let cache = cache.clone();
            tokio::spawn(async move {
                for round in 0..5u8 {
                    let mut folder = Folder::of(&["d/", "d/same=text"]);
                    for file in 0..50 {
                        let text = format!("{file} of {client} in {}", round / 2);
                        folder.file(&format!("d/{file:02}"), text);
                    }
                    let (tree, _) = sync(&cache, &folder).await;
                    assert_same(&tree, &folder);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    sync(&cache, &Folder::of(&["one=1"])).await;
    assert_eq!(objects(root.path()), 1);
}

#[tokio::test]
async fn large_files_go_through_in_pieces() {
    let root = tempfile::tempdir().unwrap();
    let cache = FileCache::new(root.path());
    let large: Vec<u8> = (0..20u32 << 18).flat_map(u32::to_le_bytes).collect();
    let mut folder = Folder::of(&["small=1"]);
    for name in ["a", "b"] {
        folder.file(name, large.clone());
    }
    let (tree, _) = sync(&cache, &folder).await;
    assert_same(&tree, &folder);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_disk_makes_the_client_wait() {
    let root = tempfile::tempdir().unwrap();
    let contents = FileCache::new(root.path()).contents("key").unwrap();
    let writer = Writer::start(contents.begin(), 1);
    // Whoever holds the state keeps the writer from ending its first file.
    let (let_go, held) = std::sync::mpsc::channel::<()>();
    let (has, got) = std::sync::mpsc::channel();
    let held_contents = contents.clone();
    let holder = std::thread::spawn(move || {
        held_contents.hold(|| {
            has.send(()).unwrap();
            held.recv().unwrap();
        });
    });
    got.recv().unwrap();
    writer.piece(0, Bytes::from_static(b"x")).await.unwrap();
    writer.end(Arrived { id: 0, keep: None }).await.unwrap();
    let piece = Bytes::from(vec![0; 256 * 1024]);
    let mut accepted = 0;
    while tokio::time::timeout(Duration::from_millis(200), writer.piece(1, piece.clone()))
        .await
        .is_ok()
    {
        accepted += piece.len();
        assert!(accepted <= BUDGET as usize);
    }
    assert!(accepted > 0);
    let_go.send(()).unwrap();
    holder.join().unwrap();
    writer.end(Arrived { id: 1, keep: None }).await.unwrap();
    let written = writer.finish(vec![]).await.unwrap();
    assert_eq!(written.iter().map(|file| file.size).collect::<Vec<_>>(), [1, accepted as u64]);
}

/// What a client does that keeps no rules.
enum Step {
    Give(Packet),
    /// Waits until content is asked for.
    Asked(u32),
    /// Waits for the end of what is asked for.
    Finished,
}

use Step::{Asked, Finished, Give};

fn list(entries: &[&str]) -> Vec<Step> {
    let stats = Folder::of(entries).entries().into_iter().map(|(stat, _)| Some(stat));
    stats.chain([None]).map(|stat| Give(packet::stat(stat))).collect()
}

fn data(id: u32, text: &str) -> Step {
    Give(packet::data(id, Bytes::copy_from_slice(text.as_bytes())))
}

/// Follows a script. Returns the reason that the daemon gave for giving up.
async fn follow(
    script: Vec<Step>,
    mut requests: Messages,
    answers: mpsc::Sender<Result<Packet, Status>>,
) -> Option<String> {
    let mut asked = vec![];
    let kind = |packet: &Packet| PacketType::try_from(packet.r#type).unwrap();
    for step in script {
        match step {
            Give(packet) => answers.send(Ok(packet)).await.ok()?,
            Asked(id) => {
                while !asked.contains(&id) {
                    asked.push(requests.next().await?.unwrap().id);
                }
            }
            Finished => while kind(&requests.next().await?.unwrap()) != PacketType::PacketFin {},
        }
    }
    // The stream ends only when the daemon was told everything.
    let mut answers = Some(answers);
    loop {
        tokio::select! {
            packet = requests.next() => {
                let packet = packet?.unwrap();
                if kind(&packet) == PacketType::PacketErr {
                    return Some(packet::reason(&packet.data));
                }
            }
            () = tokio::time::sleep(Duration::from_millis(50)), if answers.is_some() => answers = None,
        }
    }
}

#[tokio::test]
async fn clients_that_break_rules_are_refused() {
    let stat_of = |entry: &str| packet::stat(Some(Folder::of(&[entry]).entries()[0].0.clone()));
    let joined = |mut script: Vec<Step>, more: Vec<Step>| {
        script.extend(more);
        script
    };
    let strange = Packet { r#type: 9, ..Packet::default() };
    for (script, expected) in [
        (
            vec![Give(stat_of("../evil=1"))],
            r#"the client sent "../evil", which leads out of the folder"#,
        ),
        (
            vec![Give(stat_of("/tmp/evil=1"))],
            r#"the client sent "/tmp/evil", which is an absolute path"#,
        ),
        (
            vec![Give(stat_of("link->/tmp")), Give(stat_of("link/evil=1"))],
            r#"the client sent "link/evil", which comes without or not next to the folder that it is in"#,
        ),
        (
            joined(list(&["a=1"]), vec![data(1, "x")]),
            "the client sent data for an entry that it did not list (1), which is not being asked for",
        ),
        (
            joined(list(&["a/"]), vec![data(0, "x")]),
            r#"the client sent data for "a" (0), which is not being asked for"#,
        ),
        (
            joined(list(&["a=1"]), vec![Asked(0), data(0, "1"), data(0, ""), data(0, "2")]),
            r#"the client sent data for "a" (0), which is not being asked for"#,
        ),
        (
            joined(list(&["a=1"]), vec![Asked(0), data(0, "12")]),
            r#"the client sent "a", which has more than the 1 bytes it was listed with; did it change while it was read?"#,
        ),
        (
            joined(list(&["a=1"]), vec![Give(stat_of("b=1"))]),
            r#"the client sent "b", which comes after the end of the list"#,
        ),
        (joined(list(&["a=1"]), vec![Give(packet::stat(None))]), "the client ended its list twice"),
        (
            joined(list(&["a=1"]), vec![Give(packet::finish())]),
            "the client said that it was done before it had sent everything",
        ),
        (
            joined(list(&["a/"]), vec![Finished, Give(packet::finish()), Give(packet::finish())]),
            "the client sent more after it had said that it was done",
        ),
        (vec![Give(packet::request(3))], "the client asked for entry 3, but it is the one to send"),
        (vec![Give(strange)], "the client sent a packet of unknown type 9"),
    ] {
        let root = tempfile::tempdir().unwrap();
        let cache = FileCache::new(root.path().join("cache"));
        let (tree, told) =
            transfer(&cache, 1, |requests, answers| follow(script, requests, answers)).await;
        let error = tree.unwrap_err();
        assert_eq!((error.to_string().as_str(), error.kind()), (expected, ErrorKind::Invalid));
        assert_eq!(told.as_deref(), Some(expected));
        // Nothing is anywhere but where it belongs, and nothing half.
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        assert!(objects(&root.path().join("cache")) <= 1);
    }
}

#[tokio::test]
async fn a_list_without_end_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let (tree, _) = transfer(&FileCache::new(root.path()), 1, async |requests, answers| {
        let _requests: Messages = requests;
        for at in 0..u32::MAX {
            let stat = stat(&format!("{at:010}"), FileType::Directory, 0o755);
            if answers.send(Ok(packet::stat(Some(stat)))).await.is_err() {
                return;
            }
        }
    })
    .await;
    let text = tree.unwrap_err().to_string();
    assert!(
        text.starts_with("the client sent \"0000020000\", which is more than can be"),
        "{text}"
    );
}

#[tokio::test]
async fn a_client_that_gives_up_or_vanishes_fails_the_transfer() {
    let joined = |mut script: Vec<Step>, more: Vec<Step>| {
        script.extend(more);
        script
    };
    for (script, expected) in [
        (vec![Give(packet::failure("no such folder"))], "error from sender: no such folder"),
        (vec![], "the client ended the transfer early after 0 files were listed"),
        (
            joined(
                list(&["a=1", "b=22"]),
                vec![Asked(0), data(0, "1"), data(0, ""), Asked(1), data(1, "2")],
            ),
            r#"the client ended the transfer early while "b" was on its way"#,
        ),
        (joined(list(&["a/"]), vec![Finished]), "the client ended the transfer early"),
    ] {
        let root = tempfile::tempdir().unwrap();
        let (tree, _) = transfer(&FileCache::new(root.path()), 1, |requests, answers| {
            follow(script, requests, answers)
        })
        .await;
        assert_eq!(tree.unwrap_err().to_string(), expected);
    }
}

#[tokio::test]
async fn what_came_whole_before_the_client_vanished_is_not_asked_for_again() {
    let root = tempfile::tempdir().unwrap();
    let cache = FileCache::new(root.path());
    let mut folder = Folder::of(&["a=1", "b=2"]);
    let large = vec![7; 1 << 20];
    folder.file("c", large.clone());
    let mut script: Vec<Step> =
        folder.entries().into_iter().map(|(stat, _)| Give(packet::stat(Some(stat)))).collect();
    script.extend([Asked(0), Asked(1), Asked(2), data(0, "1"), data(0, "")]);
    script.push(Give(packet::data(2, Bytes::from(large[..1000].to_vec()))));
    let (tree, _) =
        transfer(&cache, 1, |requests, answers| follow(script, requests, answers)).await;
    tree.unwrap_err();
    // What came of the large file is gone.
    assert_eq!(objects(root.path()), 1);
    let (tree, asked) = sync(&cache, &folder).await;
    assert_eq!(asked, ["b", "c"]);
    assert_same(&tree, &folder);
}

#[tokio::test]
async fn a_transfer_that_is_given_up_leaves_everything_usable() {
    let root = tempfile::tempdir().unwrap();
    let cache = FileCache::new(root.path());
    let mut folder = Folder::default();
    for file in 0..1000 {
        folder.file(&format!("{file:04}"), format!("{file}"));
    }
    let given_up = transfer(&cache, 1, async |requests, answers| {
        go_sender::send(&folder, requests, answers).await
    });
    tokio::time::timeout(Duration::from_millis(20), given_up).await.ok();
    let (tree, _) = sync(&cache, &folder).await;
    assert_same(&tree, &folder);
    assert_eq!(sync(&cache, &folder).await.1, [""; 0]);
}

#[tokio::test]
async fn a_file_that_came_short_is_used_once_and_asked_for_again() {
    let root = tempfile::tempdir().unwrap();
    let cache = FileCache::new(root.path());
    let whole = Folder::of(&["a=12345", "b=6"]);
    let mut short = whole.clone();
    // The Go implementation sends nothing for a file that it cannot open any more.
    short.add(whole.entries()[0].0.clone(), Bytes::new());
    let (tree, _) = sync(&cache, &short).await;
    assert_eq!(texts(&tree)[0], ("a".into(), String::new()));
    drop(tree);
    let (tree, asked) = sync(&cache, &whole).await;
    assert_eq!(asked, ["a"]);
    assert_same(&tree, &whole);
}

#[tokio::test]
async fn damage_on_disk_is_healed_by_transferring_again() {
    let root = tempfile::tempdir().unwrap();
    let folder = Folder::of(&["a=1", "b=2", "c=3"]);
    let (tree, _) = sync(&FileCache::new(root.path()), &folder).await;
    let host = |path: &[u8]| match &tree.get(path).unwrap().kind {
        Kind::File { content: Content::Host { path, .. }, .. } => path.to_path_buf(),
        Kind::File { content: Content::Part { file, .. }, .. } => file.path().to_path_buf(),
        _ => unreachable!("it is a file with content"),
    };
    // What was lost is noticed at the next start.
    fs::remove_file(host(b"a")).unwrap();
    assert_eq!(sync(&FileCache::new(root.path()), &folder).await.1, ["a", "b", "c"]);
    // A list that was cut short lists nothing.
    let index = fs::read_dir(root.path()).unwrap().next().unwrap().unwrap().path().join("index");
    let good = fs::read(&index).unwrap();
    fs::write(&index, &good[..good.len() - 1]).unwrap();
    assert_eq!(sync(&FileCache::new(root.path()), &folder).await.1.len(), 3);
    // After the machine was restarted, bytes are checked: not all may have reached the disk.
    let mut list = index::Index::from_bytes(&fs::read(&index).unwrap()).unwrap();
    list.boot ^= 1;
    fs::write(&index, list.to_bytes()).unwrap();
    let (tree, _) = sync(&FileCache::new(root.path().join("other")), &folder).await;
    drop(tree);
    let first = list.iter().next().unwrap().place.object;
    fs::write(index.parent().unwrap().join(format!("0/{first:x}")), "x23").unwrap();
    let (tree, asked) = sync(&FileCache::new(root.path()), &folder).await;
    assert_eq!(asked, ["a"]);
    assert_same(&tree, &folder);
}

#[tokio::test]
async fn two_processes_use_folders_of_their_own() {
    let root = tempfile::tempdir().unwrap();
    let folder = Folder::of(&["a=1"]);
    let (one, two) = (FileCache::new(root.path()), FileCache::new(root.path()));
    let (tree, _) = sync(&one, &folder).await;
    assert_eq!(sync(&two, &folder).await.1, ["a"]);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
    assert_same(&tree, &folder);
}

#[tokio::test]
async fn what_nobody_uses_is_closed_and_opened_again() {
    let root = tempfile::tempdir().unwrap();
    let cache = FileCache::new(root.path());
    let folder = Folder::of(&["a=1"]);
    let (tree, _) = sync(&cache, &folder).await;
    assert_eq!(cache.close_unused(), 0, "a tree refers to it");
    assert_same(&tree, &folder);
    drop(tree);
    let opened = cache.clone();
    let begun = blocking::run(move || Ok(opened.contents("key")?.begin())).await.unwrap();
    assert_eq!(cache.close_unused(), 0, "a transfer runs");
    drop(begun);
    assert_eq!(cache.close_unused(), 1);
    // It is nobody's now, and has what it had.
    let (tree, asked) = sync(&FileCache::new(root.path()), &folder).await;
    assert_eq!(asked, [""; 0]);
    assert_same(&tree, &folder);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn what_is_kept_can_be_listed_and_removed() {
    let root = tempfile::tempdir().unwrap();
    let cache = FileCache::new(root.path());
    assert_eq!(cache.folders().unwrap(), []);
    let folder = Folder::of(&["a=123", "b=4"]);
    let (tree, _) = sync(&cache, &folder).await;
    let listed = cache.folders().unwrap();
    assert_eq!((listed.len(), listed[0].files, listed[0].bytes), (1, 2, 4));
    assert!(!cache.remove("../..").unwrap() && !cache.remove("other").unwrap());
    // From another process it cannot be removed, and from this one not what a tree refers to.
    assert!(!FileCache::new(root.path()).remove(&listed[0].id).unwrap());
    assert!(cache.remove(&listed[0].id).unwrap());
    assert_eq!(cache.folders().unwrap(), []);
    assert_same(&tree, &folder);
    drop((tree, cache));
    assert!(FileCache::new(root.path()).remove(&listed[0].id).unwrap());
    assert_eq!(objects(root.path()), 0);
}

type Headers = Vec<(String, String)>;

/// A client that serves folders by name and remembers how it was called.
struct Folders {
    folders: BTreeMap<String, Folder>,
    calls: Arc<Mutex<Vec<Headers>>>,
}

#[async_trait]
impl FileSync for Folders {
    type DiffCopyStream = Messages;
    type TarStreamStream = Messages;

    async fn diff_copy(
        &self,
        request: Request<Streaming<Packet>>,
    ) -> Result<Response<Messages>, Status> {
        let known = ["dir-name", "include-patterns", "exclude-patterns", "followpaths"];
        let headers = request.metadata().clone().into_headers();
        let mut call: Headers = headers
            .iter()
            .filter(|(key, _)| known.iter().any(|known| key.as_str().starts_with(known)))
            .map(|(key, value)| (key.to_string(), value.to_str().unwrap().to_owned()))
            .collect();
        call.sort();
        self.calls.lock().unwrap().push(call);
        let name = headers.get("dir-name").unwrap().to_str().unwrap();
        let Some(folder) = self.folders.get(name).cloned() else {
            return Err(Status::not_found(format!("no access allowed to dir {name:?}")));
        };
        let (answers, mut queue) = mpsc::channel(1);
        tokio::spawn(async move {
            if let Err(text) = go_sender::send(&folder, request.into_inner(), answers.clone()).await
            {
                answers.send(Err(Status::unknown(text))).await.ok();
            }
        });
        Ok(Response::new(Box::pin(futures::stream::poll_fn(move |context| {
            queue.poll_recv(context)
        }))))
    }

    async fn tar_stream(
        &self,
        _request: Request<Streaming<Packet>>,
    ) -> Result<Response<Messages>, Status> {
        Err(Status::unimplemented("nobody does"))
    }
}

#[tokio::test]
async fn folders_and_files_are_read_over_sessions() {
    let root = tempfile::tempdir().unwrap();
    let manager = SessionManager::new();
    let calls = Arc::new(Mutex::new(vec![]));
    let mut connections = vec![FakeClient::new("without").connect(&manager).await];
    for (id, name) in [("one", "dockerfile"), ("two", "context")] {
        let text = &format!("Dockerfile=FROM {id}");
        let folder = Folder::of(&[text, "ä->sub/x", "sub/", "sub/x=hello"]);
        let folders = Folders { folders: [(name.into(), folder)].into(), calls: calls.clone() };
        let client = FakeClient::new(id)
            .with_shared_key("project")
            .with(FileSyncServer::new(folders), &["/moby.filesync.v1.FileSync/DiffCopy"]);
        connections.push(client.connect(&manager).await);
    }
    let told = Arc::new(Mutex::new(vec![]));
    let teller = told.clone();
    let group = manager.group(["without", "one", "two"].map(String::from));
    let files = SessionFiles::new(group, FileCache::new(root.path())).with_progress(Arc::new(
        move |status: TransferStatus<'_>| {
            teller.lock().unwrap().push((status.id.to_owned(), status.done));
        },
    ));

    assert_eq!(files.read("dockerfile", "./Dockerfile").await.unwrap().unwrap(), "FROM one");
    assert_eq!(files.read("context", "ä").await.unwrap().unwrap(), "hello");
    assert_eq!(files.read("context", "nothing").await.unwrap(), None);
    assert_eq!(
        files.read("context", "sub").await.unwrap_err().to_string(),
        "sub in \"context\" is not a file"
    );
    let missing = files.read("elsewhere", "a").await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    assert_eq!(
        missing.to_string(),
        "cannot read \"elsewhere\" of the client: no access allowed to dir \"elsewhere\""
    );
    let request = LocalRequest {
        name: "context".into(),
        follow_paths: None,
        include: vec!["a b".into(), "ö".into()],
        exclude: vec!["*.o".into(), "!x.o".into()],
        fresh: false,
    };
    let tree = files.tree(&request).await.unwrap();
    assert_eq!(tree.len(), 4);
    let nothing = LocalRequest { follow_paths: Some(vec![]), ..request };
    assert!(files.tree(&nothing).await.unwrap().is_empty());

    let calls = calls.lock().unwrap();
    let pair = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
    assert_eq!(calls[0], [("dir-name", "dockerfile"), ("followpaths", "Dockerfile")].map(pair));
    assert_eq!(
        calls[2],
        [("dir-name", "context"), ("followpaths", "%C3%A4"), ("followpaths-encoded", "1")]
            .map(pair)
    );
    assert_eq!(
        *calls.last().unwrap(),
        [
            ("dir-name", "context"),
            ("exclude-patterns", "!x.o"),
            ("exclude-patterns", "*.o"),
            ("include-patterns", "%C3%B6"),
            ("include-patterns", "a+b"),
            ("include-patterns-encoded", "1"),
        ]
        .map(pair)
    );
    let told = told.lock().unwrap();
    assert_eq!(told[0], ("transferring dockerfile:".to_owned(), false));
    assert_eq!(told[1], ("transferring dockerfile:".to_owned(), true));
}

#[tokio::test]
async fn a_client_that_is_killed_fails_the_transfer() {
    /// Lists one file and then hangs.
    struct Hanging;

    #[async_trait]
    impl FileSync for Hanging {
        type DiffCopyStream = Messages;
        type TarStreamStream = Messages;

        async fn diff_copy(
            &self,
            _request: Request<Streaming<Packet>>,
        ) -> Result<Response<Messages>, Status> {
            let stat = Folder::of(&["a=1"]).entries()[0].0.clone();
            let packets = [Ok(packet::stat(Some(stat))), Ok(packet::stat(None))];
            let packets = futures::stream::iter(packets).chain(futures::stream::pending());
            Ok(Response::new(Box::pin(packets)))
        }

        async fn tar_stream(
            &self,
            _request: Request<Streaming<Packet>>,
        ) -> Result<Response<Messages>, Status> {
            Err(Status::unimplemented("nobody does"))
        }
    }

    let root = tempfile::tempdir().unwrap();
    let manager = SessionManager::new();
    let client = FakeClient::new("s")
        .with(FileSyncServer::new(Hanging), &["/moby.filesync.v1.FileSync/DiffCopy"]);
    let connection = client.connect(&manager).await;
    let files = SessionFiles::new(manager.group(["s".to_owned()]), FileCache::new(root.path()));
    let request = LocalRequest { name: "context".into(), ..LocalRequest::default() };
    let reading = tokio::spawn(async move { files.tree(&request).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!reading.is_finished());
    connection.vanish();
    let ended = tokio::time::timeout(Duration::from_secs(10), reading).await.unwrap().unwrap();
    let text = ended.unwrap_err().to_string();
    assert!(text.starts_with("cannot read \"context\" of the client: "), "{text}");
}
