//! A view must show what the kernel shows of the same layers. These tests mount overlayfs, so they need root.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;
use slipway_store::snapshot::LayerId;
use slipway_store::tree::{Content, Entry, Kind, Tree};
use slipway_store::{Store, view::View};

use crate::harness;

/// What can be compared of an entry.
type Seen = BTreeMap<String, (String, u32)>;

fn seen_by_view(view: &View) -> Seen {
    let mut seen = Seen::new();
    let mut todo = vec![vec![]];
    while let Some(folder) = todo.pop() {
        for (name, entry) in view.children(&folder).unwrap() {
            let path = slipway_store::tree::join(&folder, &name);
            assert_eq!(view.get(&path).unwrap().as_ref(), Some(&entry), "{path:?}");
            let text = match &entry.kind {
                Kind::Directory { .. } => "directory".to_owned(),
                Kind::Symlink { target } => format!("link {}", String::from_utf8_lossy(target)),
                Kind::File { content: Content::Inline(bytes), .. } => {
                    format!("file {}", String::from_utf8_lossy(bytes))
                }
                Kind::File { content: Content::Host { path, .. }, .. } => {
                    format!("file {}", fs::read_to_string(path).unwrap())
                }
                other => format!("{other:?}"),
            };
            seen.insert(String::from_utf8(path.clone()).unwrap(), (text, entry.mode));
            if entry.is_directory() {
                todo.push(path);
            }
        }
    }
    seen
}

fn seen_by_kernel(root: &Path) -> Seen {
    let mut seen = Seen::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let text = if metadata.is_dir() {
                todo.push(path.clone());
                "directory".to_owned()
            } else if metadata.is_symlink() {
                format!(
                    "link {}",
                    String::from_utf8_lossy(fs::read_link(&path).unwrap().as_os_str().as_bytes())
                )
            } else {
                format!("file {}", fs::read_to_string(&path).unwrap())
            };
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            seen.insert(name, (text, metadata.mode() & 0o7777));
        }
    }
    seen
}

struct Mount(tempfile::TempDir);

impl Mount {
    /// Mounts layers, base first; changes go to the returned step's folder.
    fn new(store: &Store, layers: &[LayerId]) -> (Self, PathBuf) {
        let mut lower: Vec<String> =
            store.folders(layers).unwrap().iter().map(|f| f.display().to_string()).collect();
        lower.reverse();
        // An overlay needs some lower folder.
        let empty = tempfile::tempdir_in(store.root()).unwrap().keep();
        lower.push(empty.display().to_string());
        let home = store.temporary("step");
        fs::create_dir_all(home.join("fs")).unwrap();
        fs::set_permissions(home.join("fs"), fs::Permissions::from_mode(0o755)).unwrap();
        let work = store.temporary("work");
        fs::create_dir(&work).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let options = format!(
            "lowerdir={},upperdir={}/fs,workdir={}",
            lower.join(":"),
            home.display(),
            work.display()
        );
        let status = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(folder.path())
            .status();
        assert!(status.unwrap().success(), "this test needs to mount overlayfs");
        (Self(folder), home)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(self.0.path()).status());
    }
}

#[derive(Clone, Debug)]
enum Change {
    File(String, u32),
    Directory(String, u32),
    Link(String, String),
    Remove(String),
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec("[abc]", 1..4).prop_map(|parts| parts.join("/"))
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => (path(), 0o600u32..0o777).prop_map(|(path, mode)| Change::File(path, mode)),
        3 => (path(), 0o700u32..0o777).prop_map(|(path, mode)| Change::Directory(path, mode)),
        1 => (path(), path()).prop_map(|(path, target)| Change::Link(path, target)),
        3 => path().prop_map(Change::Remove),
    ]
}

/// Whether all parents of a path are directories, not links.
fn reachable(view: &View, path: &str) -> bool {
    let mut at = slipway_store::tree::split(path.as_bytes()).0;
    while !at.is_empty() {
        if !view.get(at).unwrap().is_some_and(|entry| entry.is_directory()) {
            return false;
        }
        at = slipway_store::tree::split(at).0;
    }
    true
}

fn change_view(view: &mut View, change: &Change) {
    let put = |view: &mut View, path: &str, entry: Entry| view.put(path.as_bytes(), entry).unwrap();
    match change {
        Change::File(path, mode) => {
            let content = Content::Inline(format!("{path} {mode}").into_bytes().into());
            let size = (path.len() + 1 + mode.to_string().len()) as u64;
            put(
                view,
                path,
                Entry { kind: Kind::File { content, size }, ..Entry::directory(*mode, 0) },
            );
        }
        Change::Directory(path, mode) => put(view, path, Entry::directory(*mode, 0)),
        Change::Link(path, target) => {
            let kind = Kind::Symlink { target: target.clone().into_bytes() };
            put(view, path, Entry { kind, ..Entry::directory(0o777, 0) });
        }
        Change::Remove(path) => view.remove(path.as_bytes()).unwrap(),
    }
}

fn change_mount(root: &Path, change: &Change) {
    let clear = |path: &Path| match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    };
    let mode = |path: &Path, mode: u32| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    match change {
        Change::File(path, bits) => {
            clear(&root.join(path));
            fs::write(root.join(path), format!("{path} {bits}")).unwrap();
            mode(&root.join(path), *bits);
        }
        Change::Directory(path, bits) => {
            let path = root.join(path);
            if !fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir()) {
                clear(&path);
                fs::create_dir(&path).unwrap();
            }
            mode(&path, *bits);
        }
        Change::Link(path, target) => {
            clear(&root.join(path));
            std::os::unix::fs::symlink(target, root.join(path)).unwrap();
        }
        Change::Remove(path) => clear(&root.join(path)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// The same changes are made to a view and to an overlay mount, layer after layer; both layers go on, so that every view
    /// also reads what the kernel has written, and the kernel what a view has.
    #[test]
    fn a_view_shows_what_the_kernel_shows(steps in prop::collection::vec(prop::collection::vec(change(), 1..8), 1..5)) {
        let (_folder, store) = harness::store();
        let (mut of_trees, mut of_folders, mut written): (Vec<LayerId>, Vec<LayerId>, Vec<LayerId>) = Default::default();
        for changes in steps {
            let mut by_trees = store.view(&of_trees).unwrap();
            let mut by_folders = store.view(&of_folders).unwrap();
            let (mount, home) = Mount::new(&store, &of_folders);
            for change in changes {
                let path = match &change {
                    Change::File(path, _) | Change::Directory(path, _) | Change::Link(path, _) | Change::Remove(path) => path,
                };
                if reachable(&by_folders, path) {
                    change_view(&mut by_trees, &change);
                    change_view(&mut by_folders, &change);
                    change_mount(mount.0.path(), &change);
                }
            }
            let kernel = seen_by_kernel(mount.0.path());
            prop_assert_eq!(&seen_by_view(&by_folders), &kernel);
            prop_assert_eq!(&seen_by_view(&by_trees), &kernel);
            let flat: Tree = by_trees.flatten().unwrap();
            prop_assert_eq!(&seen_by_view(&View::of_tree(flat.into())), &kernel);
            drop(mount);
            let below = store.folders(&of_folders).unwrap();
            of_folders.push(store.adopt_folder(&home, &below, "by the kernel").unwrap());
            written.push(store.adopt_tree(by_folders.into_changes(), "written down").unwrap());
            of_trees.push(store.adopt_tree(by_trees.into_changes(), "a tree").unwrap());
            // What views have written down must look the same to the kernel.
            let (mount, _) = Mount::new(&store, &written);
            prop_assert_eq!(&seen_by_kernel(mount.0.path()), &kernel);
            // As folders, layers of trees show the same too.
            prop_assert_eq!(&seen_by_view(&store.view(&of_folders).unwrap()), &kernel);
        }
    }
}
