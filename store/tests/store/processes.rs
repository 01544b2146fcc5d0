//! Several processes on one root. The children are this test binary, started again for one role.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use slipway_spec::{Digest, MediaType};
use slipway_store::gc::PruneOptions;
use slipway_store::result::{ResultKey, StepResult};
use slipway_store::snapshot::{LayerId, Snapshot};
use slipway_store::{ErrorKind, Store};

use crate::harness;

const ROLE: &str = "SLIPWAY_STORE_TEST_ROLE";
const ROOT: &str = "SLIPWAY_STORE_TEST_ROOT";
const NUMBER: &str = "SLIPWAY_STORE_TEST_NUMBER";

fn child(role: &str, root: &Path, number: usize) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "processes::role_of_a_child", "--nocapture"])
        .env(ROLE, role)
        .env(ROOT, root)
        .env(NUMBER, number.to_string())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn all_succeed(children: Vec<Child>) {
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
}

fn wait_for(path: &Path) {
    let began = Instant::now();
    while !path.exists() {
        assert!(began.elapsed() < Duration::from_secs(60), "{} never came", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a child does; without a role it is no child and there is nothing to do.
#[test]
fn role_of_a_child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let root = PathBuf::from(std::env::var_os(ROOT).unwrap());
    let number = std::env::var(NUMBER).unwrap();
    let signals = root.parent().unwrap().to_path_buf();
    let store = Store::open(&root).unwrap();
    match role.as_str() {
        "name" => {
            for round in 0..10 {
                let name = format!("docker.io/library/image{number}:{round}");
                let target = store
                    .put(MediaType::OCI_MANIFEST, format!("{{\"n\":{number}}}").as_bytes())
                    .unwrap();
                store.name_image(&[name], &target).unwrap();
            }
        }
        "unpack" => {
            wait_for(&signals.join("go"));
            let folder = store.ensure_folder(LayerId(1), &[]).unwrap();
            // Holding a file of it as a mount would: it must stay what it is, whatever the others do.
            let inode = fs::metadata(folder.join("f0")).unwrap().ino();
            fs::write(signals.join(format!("done{number}")), inode.to_string()).unwrap();
            wait_for(&signals.join("stop"));
            assert_eq!(fs::metadata(folder.join("f0")).unwrap().ino(), inode);
        }
        "build" => {
            for round in 0..60 {
                let text = format!("shared {}", round % 5);
                let shared = store.put(MediaType::OCI_CONFIG, text.as_bytes()).unwrap();
                let layer = harness::layer(&store, &[("f", &text)]);
                let key = ResultKey(
                    Digest::of(format!("{number}-{round}").as_bytes()).hex().as_bytes()[..32]
                        .try_into()
                        .unwrap(),
                );
                let result = StepResult { snapshot: Snapshot { layers: vec![layer] }, created: 0 };
                store.remember(&key, &result, "step").unwrap();
                assert_eq!(
                    store.read_blob(&shared.digest, 100).unwrap(),
                    text.as_bytes(),
                    "round {round}"
                );
                assert_eq!(store.result(&key).unwrap().unwrap(), result);
                assert!(store.obtainable(layer).unwrap());
                assert_eq!(
                    fs::read(store.ensure_folder(layer, &[]).unwrap().join("f")).unwrap(),
                    text.as_bytes()
                );
            }
        }
        "hang" => {
            let kept = store.put(MediaType::OCI_CONFIG, b"kept while I live").unwrap();
            let _unfinished = store.write_blob().unwrap();
            fs::create_dir_all(store.temporary("layer").join("fs/deep")).unwrap();
            fs::write(signals.join("ready"), kept.digest.to_string()).unwrap();
            wait_for(&signals.join("never"));
        }
        other => panic!("no such role: {other}"),
    }
}

#[test]
fn many_processes_may_create_a_root_at_once() {
    for _ in 0..3 {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        all_succeed((0..6).map(|number| child("name", &root, number)).collect());
        let store = Store::open(&root).unwrap();
        assert_eq!(store.images().unwrap().len(), 60);
        let index: slipway_spec::Index =
            serde_json::from_slice(&fs::read(root.join("content/index.json")).unwrap()).unwrap();
        assert_eq!(index.manifests.len(), 60);
        assert_eq!(harness::names(&root.join("content")), ["blobs", "index.json", "oci-layout"]);
    }
}

#[test]
fn handles_of_one_process_may_create_a_root_at_once() {
    for _ in 0..20 {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| drop(Store::open(&root).unwrap()));
            }
        });
    }
}

#[test]
fn a_layer_that_is_in_use_is_not_replaced_by_one_who_unpacked_it_too() {
    let (folder, store) = harness::store();
    let files: Vec<(String, Vec<u8>)> =
        (0..400).map(|n| (format!("f{n}"), vec![b'x'; 4000])).collect();
    let files: Vec<(&str, &[u8])> =
        files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let tar = harness::tar(&files);
    assert_eq!(harness::pulled(&store, &harness::gzip(&tar), &Digest::of(&tar)), LayerId(1));
    let children: Vec<Child> = (0..4).map(|number| child("unpack", store.root(), number)).collect();
    std::thread::sleep(Duration::from_millis(300));
    fs::write(folder.path().join("go"), "").unwrap();
    let inodes: Vec<String> = (0..4)
        .map(|number| {
            let path = folder.path().join(format!("done{number}"));
            wait_for(&path);
            std::thread::sleep(Duration::from_millis(20));
            fs::read_to_string(path).unwrap()
        })
        .collect();
    fs::write(folder.path().join("stop"), "").unwrap();
    all_succeed(children);
    assert!(inodes.iter().all(|inode| *inode == inodes[0]), "{inodes:?}");
    assert_eq!(harness::unfinished(&store), Vec::<PathBuf>::new());
}

#[test]
fn builds_lose_nothing_to_a_collector_that_never_rests() {
    let (_folder, store) = harness::store();
    let mut children: Vec<Child> =
        (0..3).map(|number| child("build", store.root(), number)).collect();
    let options = PruneOptions { all: true, older_than: None, working_since: None };
    let mut rounds = 0;
    while children.iter_mut().any(|child| child.try_wait().unwrap().is_none()) {
        store.prune(&options).unwrap();
        rounds += 1;
    }
    assert!(rounds > 5, "the collector must have run while they built");
    all_succeed(children);
    store.prune(&options).unwrap();
    assert_eq!(harness::names(&store.root().join("layers")), Vec::<String>::new());
    assert_eq!(harness::names(&store.root().join("content/blobs/sha256")), Vec::<String>::new());
}

#[test]
fn what_a_living_process_used_stays_and_what_a_killed_one_left_goes() {
    let (folder, store) = harness::store();
    let mut hanging = child("hang", store.root(), 0);
    wait_for(&folder.path().join("ready"));
    std::thread::sleep(Duration::from_millis(50));
    let digest: Digest = fs::read_to_string(folder.path().join("ready")).unwrap().parse().unwrap();
    let options = PruneOptions { all: true, older_than: None, working_since: None };
    store.prune(&options).unwrap();
    assert!(store.blob_path(&digest).exists());
    assert_eq!(harness::unfinished(&store).len(), 2);

    // SIGKILL: nothing of the child runs any more.
    hanging.kill().unwrap();
    hanging.wait().unwrap();
    let pruned = store.prune(&options).unwrap();
    assert_eq!(pruned.blobs, 1);
    assert!(!store.blob_path(&digest).exists());
    assert_eq!(harness::unfinished(&store), Vec::<PathBuf>::new());
    assert_eq!(harness::names(&store.root().join("tmp")).len(), 1);
    assert_eq!(store.read_blob(&digest, 100).unwrap_err().kind(), ErrorKind::NotFound);
}
