use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use super::super::{ApplyOptions, EntryKind, LayerErrorKind, LayerStack, Overlay};
use super::{
    DAY, archive, directory, entry, file, hard_link, look, stack, symlink, unpack, unpack_over,
};

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 256];
    let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).ok()?;
    value.truncate(length);
    Some(value)
}

fn is_whiteout(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == 0)
}

#[test]
fn attributes_arrive_on_disk() {
    let capability =
        b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
            .to_vec();
    let mut tool = file("bin/tool", "#!");
    (tool.0.mode, tool.0.uid, tool.0.gid) = (0o4755, 1000, 3_000_000);
    tool.0.xattrs.insert(b"security.capability".to_vec(), capability.clone());
    tool.0.xattrs.insert(b"user.note".to_vec(), b"hi".to_vec());
    tool.0.xattrs.insert(b"trusted.overlay.metacopy".to_vec(), b"".to_vec());
    let mut locked = directory("locked");
    locked.0.mode = 0o1000;
    locked.0.xattrs.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
    locked.0.xattrs.insert(b"user.overlay.opaque".to_vec(), b"y".to_vec());
    locked.0.xattrs.insert(b"user.kept".to_vec(), b"1".to_vec());
    let mut old = file("old", "x");
    old.0.mtime_seconds = -5;
    let bytes = archive(&[
        directory("bin"),
        tool,
        hard_link("bin/again", "bin/tool"),
        symlink("bin/link", "/nowhere"),
        locked,
        file("locked/inside", "y"),
        entry("null", EntryKind::CharDevice { major: 1, minor: 3 }, 0o666),
        entry("loop", EntryKind::BlockDevice { major: 7, minor: 300 }, 0o660),
        entry("pipe", EntryKind::Fifo, 0o600),
        old,
    ]);
    let folder = tempfile::tempdir().unwrap();
    let stats = unpack(&bytes, folder.path()).unwrap();
    assert_eq!((stats.entries, stats.content_bytes, stats.implied_directories), (10, 4, 0));

    let at = |name: &str| folder.path().join(name);
    let tool = fs::symlink_metadata(at("bin/tool")).unwrap();
    assert_eq!(
        (tool.mode(), tool.uid(), tool.gid(), tool.nlink()),
        (0o104_755, 1000, 3_000_000, 2)
    );
    assert_eq!((tool.mtime(), tool.mtime_nsec()), (DAY, 0));
    assert_eq!(tool.ino(), fs::symlink_metadata(at("bin/again")).unwrap().ino());
    assert_eq!(xattr(&at("bin/tool"), "security.capability"), Some(capability));
    assert_eq!(xattr(&at("bin/tool"), "user.note"), Some(b"hi".to_vec()));
    assert_eq!(xattr(&at("bin/tool"), "trusted.overlay.metacopy"), None);
    assert_eq!(xattr(&at("locked"), "trusted.overlay.opaque"), None);
    assert_eq!(xattr(&at("locked"), "user.overlay.opaque"), None);
    assert_eq!(xattr(&at("locked"), "user.kept"), Some(b"1".to_vec()));
    let seen = look(folder.path());
    assert_eq!(seen["\"locked\""], format!("41000 0:0 0 {DAY} "));
    assert_eq!(seen["\"bin/link\""], format!("120777 0:0 0 {DAY} -> /nowhere"));
    assert_eq!(seen["\"null\""], format!("20666 0:0 103 {DAY} "));
    assert_eq!(seen["\"loop\""], format!("60660 0:0 {:x} {DAY} ", rustix::fs::makedev(7, 300)));
    assert_eq!(seen["\"pipe\""], format!("10600 0:0 0 {DAY} "));
    assert_eq!(seen["\"old\""], "100644 0:0 0 0 \"x\"");
    assert_eq!(
        fs::metadata(at("bin")).unwrap().mtime(),
        DAY,
        "set after the entries inside were made"
    );
}

#[test]
fn whiteouts_take_overlay_form() {
    for (overlay, key) in
        [(Overlay::Trusted, "trusted.overlay.opaque"), (Overlay::User, "user.overlay.opaque")]
    {
        let bytes = archive(&[
            directory("etc"),
            file("etc/.wh.gone", ""),
            file("etc/kept", "k"),
            file("etc/.wh.kept", ""),
            directory("etc/made"),
            file("etc/made/x", ""),
            file("etc/.wh.made", ""),
            directory("var"),
            file("var/new", "n"),
            // After its siblings, which it must not remove.
            file("var/.wh..wh..opq", ""),
            file(".wh.early", ""),
            directory("early"),
            file(".wh.file", ""),
            file("file", "f"),
            file(".wh..wh.plnk", ""),
            file(".wh..wh.orph/x", ""),
        ]);
        let folder = tempfile::tempdir().unwrap();
        let options = ApplyOptions { overlay, ..ApplyOptions::default() };
        super::super::apply(&mut bytes.as_slice(), folder.path(), &options).unwrap();
        let at = |name: &str| folder.path().join(name);
        assert!(is_whiteout(&at("etc/gone")));
        assert_eq!(fs::read(at("etc/kept")).unwrap(), b"k");
        let opaque: Vec<&str> = ["etc", "etc/made", "var", "early"]
            .into_iter()
            .filter(|name| xattr(&at(name), key).as_deref() == Some(b"y"))
            .collect();
        assert_eq!(opaque, ["etc/made", "var", "early"]);
        assert!(at("etc/made/x").exists() && at("var/new").exists());
        assert_eq!(fs::read(at("file")).unwrap(), b"f");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4, "aufs files are left out");
    }
}

#[test]
fn a_device_like_a_whiteout_is_left_out() {
    let bytes = archive(&[entry("w", EntryKind::CharDevice { major: 0, minor: 0 }, 0o644)]);
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(unpack(&bytes, folder.path()).unwrap().skipped_devices, 1);
    assert!(look(folder.path()).len() == 1);
}

#[test]
fn unprivileged_unpacking_skips_devices() {
    let bytes = archive(&[
        entry("null", EntryKind::CharDevice { major: 1, minor: 3 }, 0o666),
        file("f", "x"),
        file(".wh.gone", ""),
    ]);
    let folder = tempfile::tempdir().unwrap();
    let options = ApplyOptions { privileged: false, ..ApplyOptions::default() };
    let stats = super::super::apply(&mut bytes.as_slice(), folder.path(), &options).unwrap();
    assert_eq!(stats.skipped_devices, 1);
    assert!(!folder.path().join("null").exists() && is_whiteout(&folder.path().join("gone")));
}

#[test]
fn root_entry_sets_the_folder_itself() {
    let mut root = directory("x");
    root.0.path = b".".to_vec();
    (root.0.mode, root.0.uid) = (0o1711, 7);
    let folder = tempfile::tempdir().unwrap();
    unpack(&archive(&[root, file("./a", "1"), file("././b//c", "2")]), folder.path()).unwrap();
    let metadata = fs::metadata(folder.path()).unwrap();
    assert_eq!((metadata.mode(), metadata.uid(), metadata.mtime()), (0o41_711, 7, DAY));
    assert!(folder.path().join("b/c").exists());
}

#[test]
fn later_entries_replace_earlier_ones() {
    let mut again = directory("d");
    again.0.mode = 0o700;
    let folder = tempfile::tempdir().unwrap();
    let bytes = archive(&[
        file("a", "one"),
        file("a", "two"),
        symlink("a", "x"),
        file("a", "three"),
        directory("d"),
        file("d/kept", ""),
        again,
        directory("deep"),
        directory("deep/er"),
        file("deep/er/x", ""),
        file("deep", "now a file"),
        directory("deep"),
        file("deep/y", ""),
    ]);
    unpack(&bytes, folder.path()).unwrap();
    let seen = look(folder.path());
    assert_eq!(seen["\"a\""], format!("100644 0:0 0 {DAY} \"three\""));
    assert_eq!(seen["\"d\""], format!("40700 0:0 0 {DAY} "));
    assert_eq!(seen.len(), 6, "{seen:?}");
    // The file hid what lower layers have in "deep".
    assert_eq!(
        xattr(&folder.path().join("deep"), "trusted.overlay.opaque").as_deref(),
        Some(&b"y"[..])
    );
}

#[test]
fn layers_that_build_on_lower_ones_say_so() {
    let base = tempfile::tempdir().unwrap();
    let mut opt = directory("opt");
    (opt.0.mode, opt.0.uid) = (0o750, 12);
    opt.0.xattrs.insert(b"user.k".to_vec(), b"v".to_vec());
    let mut tool = file("opt/tool", "tool");
    tool.0.mode = 0o6755;
    unpack(
        &archive(&[opt, tool, directory("usr"), directory("usr/bin"), symlink("bin", "usr/bin")]),
        base.path(),
    )
    .unwrap();
    let lower = stack(&[base.path()]);

    for bytes in [
        archive(&[hard_link("tool", "opt/tool")]),
        archive(&[file("opt/x", "")]),
        archive(&[file("bin/x", "")]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let error =
            super::super::apply(&mut bytes.as_slice(), folder.path(), &ApplyOptions::default())
                .unwrap_err();
        assert_eq!(error.kind(), LayerErrorKind::NeedsLower);
    }

    let folder = tempfile::tempdir().unwrap();
    let bytes =
        archive(&[hard_link("tool", "opt/tool"), file("bin/x", "b"), hard_link("self", "bin/x")]);
    let stats = unpack_over(&bytes, folder.path(), &lower).unwrap();
    assert_eq!((stats.links_to_lower, stats.implied_directories), (1, 3));
    let seen = look(folder.path());
    assert_eq!(seen["\"opt\""], format!("40750 12:0 0 {DAY} "));
    assert_eq!(xattr(&folder.path().join("opt"), "user.k"), Some(b"v".to_vec()));
    assert_eq!(seen["\"opt/tool\""], format!("106755 0:0 0 {DAY} \"tool\""));
    assert_eq!(seen["\"tool\""], seen["\"opt/tool\""]);
    assert!(seen.contains_key("\"usr/bin/x\"") && !seen.contains_key("\"bin\""), "{seen:?}");

    // Below an opaque mark the lower layer cannot be seen.
    let folder = tempfile::tempdir().unwrap();
    let bytes =
        archive(&[directory("opt"), file("opt/.wh..wh..opq", ""), hard_link("tool", "opt/tool")]);
    assert_eq!(
        unpack_over(&bytes, folder.path(), &lower).unwrap_err().kind(),
        LayerErrorKind::InvalidArchive
    );
}

#[test]
fn long_and_odd_names_survive() {
    let long = "n".repeat(255);
    let deep: Vec<String> = (1..=300).map(|depth| vec!["directory"; depth].join("/")).collect();
    let mut entries = vec![
        file(&long, "long"),
        file(&"x/".repeat(60).trim_end_matches('/').replace('x', "d"), ""),
    ];
    entries.pop();
    entries.extend(deep.iter().map(|path| directory(path)));
    let last = format!("{}/{long}", deep.last().unwrap());
    entries.push(file(&last, "deepest"));
    let mut odd = file("placeholder", "odd");
    odd.0.path = b"\xff\xfe\x01 name\n".to_vec();
    entries.push(odd);
    let folder = tempfile::tempdir().unwrap();
    unpack(&archive(&entries), folder.path()).unwrap();
    assert_eq!(fs::read(folder.path().join(&last)).unwrap(), b"deepest");
    assert_eq!(fs::read(folder.path().join(&long)).unwrap(), b"long");
    let odd = folder.path().join(std::ffi::OsStr::from_bytes(b"\xff\xfe\x01 name\n"));
    assert_eq!(fs::read(odd).unwrap(), b"odd");
}

#[test]
fn paths_beyond_the_kernel_limit_are_unpacked_and_removed() {
    let deep: Vec<String> = (1..=600).map(|depth| vec!["directory"; depth].join("/")).collect();
    assert!(deep.last().unwrap().len() > 5000);
    let mut entries: Vec<_> = deep.iter().map(|path| directory(path)).collect();
    let folder = tempfile::tempdir().unwrap();
    unpack(&archive(&entries), folder.path()).unwrap();
    assert_eq!(super::diff(folder.path(), &LayerStack::empty()).len(), archive(&entries).len());
    entries.push(file("directory", "replaces all"));
    let other = tempfile::tempdir().unwrap();
    unpack(&archive(&entries), other.path()).unwrap();
    assert_eq!(fs::read(other.path().join("directory")).unwrap(), b"replaces all");
}

/// Archives by GNU tar in its formats, with what only it writes: sparse maps, long names, large numbers.
#[test]
fn archives_of_gnu_tar_are_read() {
    let source = tempfile::tempdir().unwrap();
    let at = |name: &str| source.path().join(name);
    fs::create_dir(at("d")).unwrap();
    fs::write(at("d").join("n".repeat(200)), "long").unwrap();
    std::os::unix::fs::symlink("t".repeat(300), at("link")).unwrap();
    fs::write(at("plain"), "plain").unwrap();
    fs::hard_link(at("plain"), at("plain2")).unwrap();
    std::os::unix::fs::lchown(at("plain"), Some(4_000_000), Some(3_000_000_000)).unwrap();
    // Enough fragments for extension blocks, ending in a hole.
    let sparse = fs::File::create(at("sparse")).unwrap();
    for index in 0..40_u64 {
        std::os::unix::fs::FileExt::write_at(
            &sparse,
            format!("fragment {index}").as_bytes(),
            index * 1_000_000,
        )
        .unwrap();
    }
    sparse.set_len(50_000_000).unwrap();
    fs::set_permissions(at("sparse"), fs::Permissions::from_mode(0o600)).unwrap();
    for name in ["sparse", "plain", "d", "."] {
        let status =
            Command::new("touch").args(["-d", "@1234567890"]).arg(at(name)).status().unwrap();
        assert!(status.success());
    }

    for format in [
        &["--format=gnu"][..],
        &["--format=gnu", "--sparse"],
        &["--format=pax"],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=1.0"],
    ] {
        let output = Command::new("tar")
            .arg("-C")
            .arg(source.path())
            .args(format)
            .args(["--numeric-owner", "-cf", "-", "."])
            .output();
        let output = output.unwrap_or_else(|error| panic!("this test needs GNU tar: {error}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let folder = tempfile::tempdir().unwrap();
        unpack(&output.stdout, folder.path()).unwrap_or_else(|error| panic!("{format:?}: {error}"));
        let (mut expected, mut found) = (look(source.path()), look(folder.path()));
        for seen in [&mut expected, &mut found] {
            assert!(seen.contains_key("\"sparse\""));
        }
        assert!(expected == found, "{format:?}");
        if format.contains(&"--sparse") {
            let blocks = fs::metadata(folder.path().join("sparse")).unwrap().blocks();
            assert!(blocks < 10_000, "holes stay holes: {blocks}");
        }
    }
}
