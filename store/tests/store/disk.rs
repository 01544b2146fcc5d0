//! A full disk. These tests mount a small tmpfs, so they need root.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use slipway_spec::{Digest, MediaType};
use slipway_store::gc::PruneOptions;
use slipway_store::{ErrorKind, Store};

use crate::harness;

struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(megabytes: u32) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={megabytes}m");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "none"])
            .arg(folder.path())
            .status();
        assert!(status.unwrap().success(), "this test needs to mount a tmpfs");
        Self(folder)
    }

    fn root(&self) -> PathBuf {
        self.0.path().join("root")
    }

    /// Takes all space there is.
    fn fill(&self) {
        for (at, step) in [1 << 20, 4096, 1].into_iter().enumerate() {
            let mut file = fs::File::create(self.0.path().join(format!("filler{at}"))).unwrap();
            let bytes = vec![1; step];
            while file.write_all(&bytes).is_ok() {}
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(self.0.path()).status());
    }
}

fn files(folder: &Path) -> usize {
    harness::names(folder).len()
}

#[test]
fn a_full_disk_is_said_to_be_full_and_nothing_is_half_written() {
    let disk = SmallDisk::new(24);
    let store = Store::open(&disk.root()).unwrap();
    let tar = harness::tar(&[("big", &vec![7; 6 << 20])]);
    let layer = harness::pulled(&store, &harness::gzip(&tar), &Digest::of(&tar));
    let loadable = harness::tar(&[("a", &vec![1; 3 << 20]), ("b", &vec![2; 3 << 20])]);
    disk.fill();

    let error = store.put(MediaType::OCI_LAYER, &[9; 100_000]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert!(error.to_string().contains("prune"), "{error}");
    let error = store.ensure_folder(layer, &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    let error = store.load(Box::new(std::io::Cursor::new(loadable))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert_eq!(files(&disk.root().join("layers")), 0);
    assert_eq!(files(&disk.root().join("content/blobs/sha256")), 1);
    assert_eq!(harness::unfinished(&store), Vec::<PathBuf>::new());
}

#[test]
fn a_full_disk_can_be_opened_and_pruned() {
    let disk = SmallDisk::new(24);
    let store = Store::open(&disk.root()).unwrap();
    for n in 0..200u8 {
        store.put(MediaType::OCI_LAYER, &[n; 4096]).unwrap();
        harness::layer(&store, &[("f", "x")]);
    }
    harness::image(&store, "docker.io/library/kept:latest", &[("kept", "yes")]);
    drop(store);
    disk.fill();
    let store = Store::open(&disk.root()).unwrap();
    let pruned =
        store.prune(&PruneOptions { all: true, older_than: None, working_since: None }).unwrap();
    assert_eq!(pruned.blobs, 200);
    assert!(pruned.layers >= 200, "{pruned:?}");
    assert_eq!(files(&disk.root().join("content/blobs/sha256")), 3);
    assert!(store.image("docker.io/library/kept:latest").unwrap().is_some());
    store.put(MediaType::OCI_LAYER, b"there is room again").unwrap();
}
