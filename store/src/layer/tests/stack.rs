use std::fs;
use std::io::Read;

use super::super::stack::{FileKind, Walk};
use super::super::{CopyOptions, Follow, LayerError, LayerErrorKind, LayerStack, TarWriter};
use super::{
    archive, directory, entry, file, hard_link, list, look, paths, stack, symlink, unpack,
};

/// Three layers with every way to hide something.
fn layers() -> [tempfile::TempDir; 3] {
    let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let contents = [
        archive(&[
            directory("bin"),
            file("bin/tool", "0"),
            directory("etc"),
            file("etc/a", "0"),
            file("etc/b", "0"),
            directory("opaque"),
            file("opaque/x", "0"),
            directory("file-over-dir"),
            file("file-over-dir/x", "0"),
            file("dir-over-file", "0"),
            directory("gone"),
            file("gone/x", "0"),
            symlink("sbin", "bin"),
            symlink("absolute", "/etc/../etc/a"),
            symlink("escape", "../../../etc/a"),
            symlink("loop", "loop"),
            symlink("dangling", "nowhere"),
            directory("usr"),
            symlink("usr/up", "../sbin/tool"),
        ]),
        archive(&[
            directory("etc"),
            file("etc/.wh.a", ""),
            file("etc/c", "1"),
            directory("opaque"),
            file("opaque/.wh..wh..opq", ""),
            file("opaque/y", "1"),
            file("file-over-dir", "1"),
            file(".wh.gone", ""),
            directory("dir-over-file"),
        ]),
        archive(&[
            directory("etc"),
            file("etc/a", "2"),
            directory("gone"),
            file("gone/y", "2"),
            directory("opaque"),
            file("opaque/z", "2"),
            directory("file-over-dir"),
            file("file-over-dir/z", "2"),
        ]),
    ];
    for (folder, bytes) in folders.iter().zip(contents) {
        unpack(&bytes, folder.path()).unwrap();
    }
    folders
}

#[test]
fn layers_merge_as_overlayfs_merges_them() {
    let folders = layers();
    let stack = stack(&[folders[0].path(), folders[1].path(), folders[2].path()]);
    let mut seen = Vec::new();
    stack
        .walk(b"", |located| {
            seen.push(String::from_utf8(located.path.clone()).unwrap());
            Ok::<_, LayerError>(Walk::Continue)
        })
        .unwrap();

    // What the kernel makes of the same folders.
    let merged = tempfile::tempdir().unwrap();
    let option = format!(
        "lowerdir={}:{}:{}",
        folders[2].path().display(),
        folders[1].path().display(),
        folders[0].path().display()
    );
    let mut mount = std::process::Command::new("mount");
    let status = mount
        .args(["-t", "overlay", "overlay", "-o", &option])
        .arg(merged.path())
        .status()
        .unwrap();
    assert!(status.success(), "this test needs to mount overlayfs");
    let kernel = look(merged.path());
    let copy = tempfile::tempdir().unwrap();
    super::super::copy_tree(&stack, copy.path(), &CopyOptions::default()).unwrap();
    let mut ours = look(copy.path());
    assert!(std::process::Command::new("umount").arg(merged.path()).status().unwrap().success());
    ours.insert("\"\"".to_owned(), kernel["\"\""].clone());
    assert_eq!(ours, kernel);
    assert_eq!(seen.len() + 1, kernel.len());

    assert_eq!(
        seen,
        [
            "absolute",
            "bin",
            "bin/tool",
            "dangling",
            "dir-over-file",
            "escape",
            "etc",
            "etc/a",
            "etc/b",
            "etc/c",
            "file-over-dir",
            "file-over-dir/z",
            "gone",
            "gone/y",
            "loop",
            "opaque",
            "opaque/y",
            "opaque/z",
            "sbin",
            "usr",
            "usr/up"
        ]
    );
    let names: Vec<_> =
        stack.read_dir(b"/sbin/../etc/").unwrap().iter().map(|l| l.name().to_vec()).collect();
    assert_eq!(names, [b"a", b"b", b"c"]);
}

#[test]
fn lookups_follow_links_inside_the_tree() {
    let folders = layers();
    let stack = stack(&[folders[0].path(), folders[1].path(), folders[2].path()]);
    for (path, follow, expected) in [
        ("etc/a", Follow::All, Some(("etc/a", 2))),
        ("/etc//./b", Follow::All, Some(("etc/b", 0))),
        ("sbin/tool", Follow::All, Some(("bin/tool", 0))),
        ("sbin/tool", Follow::Parents, Some(("bin/tool", 0))),
        ("sbin/tool", Follow::None, None),
        ("sbin", Follow::All, Some(("bin", 0))),
        ("sbin", Follow::Parents, Some(("sbin", 0))),
        ("sbin/", Follow::None, Some(("sbin", 0))),
        ("absolute", Follow::All, Some(("etc/a", 2))),
        ("escape", Follow::All, Some(("etc/a", 2))),
        ("usr/up", Follow::All, Some(("bin/tool", 0))),
        ("usr/../../../etc/c", Follow::All, Some(("etc/c", 1))),
        ("dangling", Follow::All, None),
        ("dangling", Follow::Parents, Some(("dangling", 0))),
        ("etc/a/x", Follow::All, None),
        ("gone/x", Follow::All, None),
        ("gone/y", Follow::All, Some(("gone/y", 2))),
        ("opaque/x", Follow::All, None),
        ("file-over-dir/x", Follow::All, None),
        ("missing", Follow::All, None),
        ("", Follow::All, Some(("", 2))),
    ] {
        let found = stack.lookup(path.as_bytes(), follow).unwrap();
        let found = found.map(|located| (String::from_utf8(located.path).unwrap(), located.layer));
        assert_eq!(
            found,
            expected.map(|(path, layer)| (path.to_owned(), layer)),
            "{path} {follow:?}"
        );
    }
    assert_eq!(stack.lookup(b"loop", Follow::All).unwrap_err().kind(), LayerErrorKind::NotFound);
    assert_eq!(stack.read_dir(b"missing").unwrap_err().kind(), LayerErrorKind::NotFound);
    assert_eq!(stack.read_dir(b"etc/a").unwrap_err().kind(), LayerErrorKind::NotFound);

    let located = stack.lookup(b"sbin/tool", Follow::All).unwrap().unwrap();
    assert_eq!(located.metadata.kind, FileKind::File);
    assert_eq!(fs::read(&located.host_path).unwrap(), b"0");
    let mut text = String::new();
    stack.open(&located).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "0");
    let link = stack.lookup(b"sbin", Follow::Parents).unwrap().unwrap();
    assert_eq!(stack.read_link(&link).unwrap(), b"bin");
    assert!(stack.open(&link).is_err());
}

#[test]
fn opening_never_leaves_the_layer() {
    let folder = tempfile::tempdir().unwrap();
    unpack(&archive(&[directory("d"), file("d/f", "inside")]), folder.path()).unwrap();
    let stack = stack(&[folder.path()]);
    let located = stack.lookup(b"d/f", Follow::All).unwrap().unwrap();
    // The folder is swapped for a link between look-up and use.
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("f"), "outside").unwrap();
    fs::rename(folder.path().join("d"), folder.path().join("e")).unwrap();
    std::os::unix::fs::symlink(outside.path(), folder.path().join("d")).unwrap();
    assert!(stack.open(&located).is_err());
}

#[test]
fn an_empty_stack_is_an_empty_tree() {
    let stack = LayerStack::empty();
    assert_eq!(stack.lookup(b"", Follow::All).unwrap(), None);
    let mut tar = TarWriter::new(Vec::new());
    super::super::write_tree(&stack, &mut tar).unwrap();
    assert_eq!(tar.finish().unwrap(), [0; 1024]);
    let folder = tempfile::tempdir().unwrap();
    super::super::copy_tree(&stack, folder.path(), &CopyOptions::default()).unwrap();
}

#[test]
fn the_whole_tree_can_be_written_and_copied() {
    let mut tool = file("bin/tool", "0");
    (tool.0.mode, tool.0.uid) = (0o4755, 9);
    tool.0.xattrs.insert(b"user.k".to_vec(), b"v".to_vec());
    let lower = vec![
        directory("bin"),
        hard_link("bin/other", "bin/tool"),
        tool,
        entry("null", super::super::EntryKind::CharDevice { major: 1, minor: 3 }, 0o666),
        entry("pipe", super::super::EntryKind::Fifo, 0o600),
        symlink("sym", "bin"),
        directory("tmp"),
    ];
    let mut first = lower.clone();
    first.swap(1, 2);
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    unpack(&archive(&first), folders[0].path()).unwrap();
    unpack(&archive(&[file(".wh.tmp", ""), file("top", "1")]), folders[1].path()).unwrap();
    let stack = stack(&[folders[0].path(), folders[1].path()]);

    let mut tar = TarWriter::new(Vec::new());
    super::super::write_tree(&stack, &mut tar).unwrap();
    let bytes = tar.finish().unwrap();
    assert_eq!(paths(&bytes), ["bin", "bin/other", "bin/tool", "null", "pipe", "sym", "top"]);
    assert_eq!(list(&bytes)[1].0.xattrs.len(), 1);
    let again = tempfile::tempdir().unwrap();
    unpack(&bytes, again.path()).unwrap();

    let copy = tempfile::tempdir().unwrap();
    // What is in the way is replaced, and never written through.
    fs::write(copy.path().join("bin"), "in the way").unwrap();
    std::os::unix::fs::symlink("/dev/null", copy.path().join("top")).unwrap();
    fs::write(copy.path().join("stays"), "").unwrap();
    super::super::copy_tree(&stack, copy.path(), &CopyOptions::default()).unwrap();
    fs::remove_file(copy.path().join("stays")).unwrap();
    let (mut a, mut b) = (look(again.path()), look(copy.path()));
    a.remove("\"\"");
    b.remove("\"\"");
    assert_eq!(a, b);
}
