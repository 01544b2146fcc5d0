use std::collections::BTreeMap;

use super::*;
use slipway_store::tree::Tree;

/// When everything made by an action itself was made.
const NOW: i64 = 7_000_000_000;

/// Builds a tree of lines: `path/` is a directory, `path=text` a file, `path>target` a link; the mode may follow after a
/// space, and then the owner as `uid:gid`.
fn tree(lines: &[&str]) -> Tree {
    let mut tree = Tree::default();
    for (at, line) in lines.iter().enumerate() {
        let mut words = line.split(' ');
        let what = words.next().unwrap();
        let mode = words.next().map(|mode| u32::from_str_radix(mode, 8).unwrap());
        let (uid, gid) = words.next().and_then(|owner| owner.split_once(':')).unwrap_or(("0", "0"));
        let (path, kind, usual) = if let Some((path, text)) = what.split_once('=') {
            let content = Content::Inline(text.as_bytes().into());
            (path, Kind::File { content, size: text.len() as u64 }, 0o644)
        } else if let Some((path, target)) = what.split_once('>') {
            (path, Kind::Symlink { target: target.into() }, 0o777)
        } else {
            (what.trim_end_matches('/'), Kind::Directory { opaque: false }, 0o755)
        };
        let base = Entry::directory(mode.unwrap_or(usual), at as i64);
        let (uid, gid) = (uid.parse().unwrap(), gid.parse().unwrap());
        tree.insert(path.as_bytes(), Entry { kind, uid, gid, ..base });
    }
    tree
}

fn view(lines: &[&str]) -> View {
    View::of_tree(Arc::new(tree(lines)))
}

/// The inverse of [`tree`], with modes and owners only where they are not the usual ones.
fn lines(tree: &Tree) -> Vec<String> {
    let line = |(path, entry): (Vec<u8>, &Entry)| {
        let path = String::from_utf8(path).unwrap();
        let (text, usual) = match &entry.kind {
            Kind::Directory { opaque: false } => (format!("{path}/"), 0o755),
            Kind::Directory { opaque: true } => (format!("{path}/!"), 0o755),
            Kind::File { content: Content::Part { .. }, .. } => {
                unreachable!("nothing here is kept in packs")
            }
            Kind::File { content: Content::Inline(bytes), .. } => {
                (format!("{path}={}", String::from_utf8_lossy(bytes)), 0o644)
            }
            Kind::File { content: Content::Host { path: host, .. }, .. } => {
                (format!("{path}={}", std::fs::read_to_string(host).unwrap()), 0o644)
            }
            Kind::Symlink { target } => {
                (format!("{path}>{}", String::from_utf8_lossy(target)), 0o777)
            }
            Kind::CharDevice { major, minor } => (format!("{path}:c{major},{minor}"), 0o644),
            Kind::BlockDevice { major, minor } => (format!("{path}:b{major},{minor}"), 0o644),
            Kind::Fifo => (format!("{path}:p"), 0o644),
            Kind::Whiteout => (format!("{path}:gone"), 0),
        };
        let owner = (entry.uid, entry.gid);
        match (entry.mode == usual, owner == (0, 0)) {
            (true, true) => text,
            (false, true) => format!("{text} {:o}", entry.mode),
            (_, false) => format!("{text} {:o} {}:{}", entry.mode, owner.0, owner.1),
        }
    };
    tree.iter().map(line).collect()
}

/// A copy as the Dockerfile frontend asks for it.
fn copy(src: &str, dest: &str) -> pb::FileActionCopy {
    pb::FileActionCopy {
        src: src.into(),
        dest: dest.into(),
        mode: -1,
        timestamp: -1,
        follow_symlink: true,
        dir_copy_contents: true,
        create_dest_path: true,
        allow_wildcard: true,
        allow_empty_wildcard: true,
        ..Default::default()
    }
}

struct Room {
    folder: tempfile::TempDir,
    store: Store,
}

impl Room {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        Self { folder, store }
    }

    /// Applies actions to a base, with the base as the only input that accounts can be looked up in.
    fn apply(
        &self,
        base: &[&str],
        source: &View,
        actions: Vec<Action>,
    ) -> std::result::Result<Tree, String> {
        let inputs = [Some(Arc::new(view(base)))];
        let context = FileContext { store: &self.store, now: NOW, inputs: &inputs };
        let mut target = view(base);
        for action in actions {
            apply(&action, &mut target, Some(source), &context)
                .map_err(|error| error.to_string())?;
        }
        Ok(target.into_changes())
    }

    fn copied(&self, base: &[&str], source: &[&str], copy: pb::FileActionCopy) -> Vec<String> {
        match self.apply(base, &view(source), vec![Action::Copy(copy)]) {
            Ok(changes) => lines(&changes),
            Err(error) => vec![format!("error: {error}")],
        }
    }
}

#[test]
fn sources_are_found_as_upstream_finds_them() {
    let source = [
        "a=A 600",
        "b.txt=B",
        "c.txt=C",
        "d/",
        "d/inner=D",
        "d/sub/",
        "d/sub/deep.txt=deep",
        "dangling>nowhere",
        "e\\f=E",
        "flat>d/inner",
        "linkd>d",
        "link>a",
        "round>round",
        "up>../../../a",
        "x*y=star",
    ];
    let room = Room::new();
    for (src, dest, expected) in [
        // Literal names, cleaned so that nothing escapes.
        ("/a", "/x", &["x=A 600"][..]),
        ("../../a", "/x", &["x=A 600"]),
        ("a/", "/x", &["x=A 600"]),
        ("./d/../a", "/x", &["x=A 600"]),
        ("/missing", "/x", &["error: \"/missing\": not found"]),
        ("/a/below", "/x", &["error: \"/a/below\": not found"]),
        // Links in the source path are followed, the last one too; the name stays the link's.
        ("/link", "/x/", &["x/", "x/link=A 600"]),
        ("/up", "/x", &["x=A 600"]),
        ("/linkd/inner", "/x", &["x=D"]),
        ("/linkd", "/x/", &["x/", "x/inner=D", "x/sub/", "x/sub/deep.txt=deep"]),
        ("/dangling", "/x", &["error: \"/dangling\": not found"]),
        // Wildcards.
        ("/*.txt", "/x/", &["x/", "x/b.txt=B", "x/c.txt=C"]),
        ("/[bc].txt", "/x/", &["x/", "x/b.txt=B", "x/c.txt=C"]),
        ("/[^b].txt", "/x/", &["x/", "x/c.txt=C"]),
        ("/?", "/x/", &["x/", "x/a=A 600", "x/inner=D", "x/sub/", "x/sub/deep.txt=deep"]),
        ("/fl*t", "/x/", &["x/", "x/flat=D"]),
        ("/link?", "/x/", &["x/", "x/inner=D", "x/sub/", "x/sub/deep.txt=deep"]),
        ("/*/inner", "/x/", &["x/", "x/inner=D"]),
        ("/linkd/i*", "/x/", &["x/", "x/inner=D"]),
        ("/*/*/deep.txt", "/x/", &["x/", "x/deep.txt=deep"]),
        // Two stars are two stars: no slash is crossed.
        ("/**/deep.txt", "/x/", &[]),
        ("/**.txt", "/x/", &["x/", "x/b.txt=B", "x/c.txt=C"]),
        // No match is no error, and nothing is made.
        ("/*.none", "/x/y/", &[]),
        ("/[", "/x/", &[]),
        // An escape counts inside a pattern; without a wildcard a backslash is part of the name.
        ("/x\\*[y]", "/x/", &["x/", "x/x*y=star"]),
        ("/e\\f", "/x", &["x=E"]),
        ("/x\\*y", "/x", &["error: \"/x\\\\\\\\*y\": not found"]),
    ] {
        assert_eq!(room.copied(&[], &source, copy(src, dest)), expected, "{src} {dest}");
    }
    let round = room.copied(&[], &source, copy("/round", "/x"));
    assert!(round[0].contains("too many levels of symbolic links"), "{round:?}");
    let strict = pb::FileActionCopy { allow_empty_wildcard: false, ..copy("/*.none", "/x/") };
    assert_eq!(room.copied(&[], &source, strict), ["error: \"/*.none\": not found"]);
    let literal = pb::FileActionCopy { allow_wildcard: false, ..copy("/x*y", "/x") };
    assert_eq!(room.copied(&[], &source, literal), ["x=star"]);
    let kept = pb::FileActionCopy { follow_symlink: false, ..copy("/link", "/x") };
    assert_eq!(room.copied(&[], &source, kept), ["x>a"]);
}

#[test]
fn destinations_are_chosen_as_upstream_chooses_them() {
    let base = [
        "app/ 700 5:6",
        "app/old=old",
        "bin>usr/bin",
        "dangle>new/place",
        "file=F",
        "loop>loop",
        "rel/",
        "rel/out>../../app",
        "usr/",
        "usr/bin/ 711",
    ];
    let source = [
        "f=f",
        "d/ 750 3:4",
        "d/one=1",
        "d/two/ 701 8:9",
        "d/two/three=3",
        "empty/",
        "old/",
        "old/x=x",
    ];
    let room = Room::new();
    for (src, dest, expected) in [
        ("/f", "/app", &["app/ 700 5:6", "app/f=f"][..]),
        ("/f", "/app/", &["app/ 700 5:6", "app/f=f"]),
        ("/f", "/app/.", &["app/ 700 5:6", "app/f=f"]),
        ("/f", "/", &["f=f"]),
        ("/f", "", &["f=f"]),
        ("/f", "/new", &["new=f"]),
        ("/f", "/new/", &["new/", "new/f=f"]),
        ("/f", "/n1/n2/n3", &["n1/", "n1/n2/", "n1/n2/n3=f"]),
        ("/f", "/file", &["file=f"]),
        ("/f", "/app/old", &["app/ 700 5:6", "app/old=f"]),
        // Links of the base are followed inside of it.
        ("/f", "/bin", &["usr/", "usr/bin/ 711", "usr/bin/f=f"]),
        ("/f", "/bin/g", &["usr/", "usr/bin/ 711", "usr/bin/g=f"]),
        ("/f", "/rel/out/g", &["app/ 700 5:6", "app/g=f"]),
        ("/f", "/dangle", &["new/", "new/place=f"]),
        ("/f", "/../../../g", &["g=f"]),
        // Contents of a directory are merged; what is there keeps its attributes only at the top.
        ("/d", "/app", &["app/ 700 5:6", "app/one=1", "app/two/ 701 8:9", "app/two/three=3"]),
        ("/d", "/new", &["new/", "new/one=1", "new/two/ 701 8:9", "new/two/three=3"]),
        (
            "/d",
            "/n1/n2/",
            &["n1/", "n1/n2/", "n1/n2/one=1", "n1/n2/two/ 701 8:9", "n1/n2/two/three=3"],
        ),
        ("/empty", "/new", &["new/"]),
        ("/empty", "/app", &[]),
        (
            "/",
            "/app/x",
            &[
                "app/ 700 5:6",
                "app/x/",
                "app/x/d/ 750 3:4",
                "app/x/d/one=1",
                "app/x/d/two/ 701 8:9",
                "app/x/d/two/three=3",
                "app/x/empty/",
                "app/x/f=f",
                "app/x/old/",
                "app/x/old/x=x",
            ],
        ),
        // What cannot be.
        ("/d", "/file", &["error: cannot copy to non-directory: /file"]),
        ("/f", "/file/", &["error: cannot create /file: /file is not a directory"]),
        ("/f", "/file/x/y", &["error: cannot create /file/x: /file is not a directory"]),
    ] {
        assert_eq!(room.copied(&base, &source, copy(src, dest)), expected, "{src} {dest}");
    }
    assert!(room.copied(&base, &source, copy("/f", "/loop/x"))[0].contains("too many levels"));
    let shallow = pb::FileActionCopy { create_dest_path: false, ..copy("/f", "/no/where") };
    assert_eq!(room.copied(&base, &source, shallow), ["error: \"/no\": not found"]);
    // Kinds that do not fit, further down.
    assert_eq!(
        room.copied(&["x/", "x/one/"], &source, copy("/d", "/x")),
        ["error: cannot replace to directory /x/one with file"]
    );
    assert_eq!(
        room.copied(&["x/", "x/two=2"], &source, copy("/d", "/x")),
        ["error: cannot copy to non-directory: /x/two"]
    );
    let replacing =
        pb::FileActionCopy { always_replace_existing_dest_paths: true, ..copy("/d", "/x") };
    assert_eq!(
        room.copied(&["x/", "x/two=2", "x/one/", "x/one/gone=1"], &source, replacing),
        ["x/", "x/one=1", "x/two/! 701 8:9", "x/two/three=3"]
    );
    // A file replaces a link by itself, and not what the link leads to.
    assert_eq!(
        room.copied(&["x/", "x/one>../keep", "keep=K"], &source, copy("/d/one", "/x/")),
        ["x/", "x/one=1"]
    );
    // The directory itself, for those who ask for that.
    let whole =
        |dest: &str| pb::FileActionCopy { dir_copy_contents: false, ..copy("/d/two", dest) };
    assert_eq!(
        room.copied(&base, &source, whole("/app")),
        ["app/ 700 5:6", "app/two/ 701 8:9", "app/two/three=3"]
    );
    assert_eq!(room.copied(&base, &source, whole("/new")), ["new/ 701 8:9", "new/three=3"]);
}

#[test]
fn nested_directories_take_the_attributes_of_the_source() {
    let room = Room::new();
    let base = ["x/ 700", "x/d/ 700 1:1", "x/d/kept=k"];
    let source = ["older=", "s/", "s/d/ 751 2:3", "s/d/new=n"];
    let changes = room.apply(&base, &view(&source), vec![Action::Copy(copy("/s", "/x"))]).unwrap();
    assert_eq!(lines(&changes), ["x/ 700", "x/d/ 751 2:3", "x/d/new=n"]);
    let source_time = view(&source).get(b"s").unwrap().unwrap().mtime;
    assert_ne!(source_time, 0);
    assert_eq!(changes.get(b"x").unwrap().mtime, source_time, "all it takes of the source");
    assert_eq!(changes.get(b"x/d").unwrap().mtime, 2, "as in the source");
    let stamped = pb::FileActionCopy { timestamp: 42, ..copy("/s", "/x/made/") };
    let changes = room.apply(&base, &view(&source), vec![Action::Copy(stamped)]).unwrap();
    let times: Vec<_> = ["x/made", "x/made/d", "x/made/d/new"]
        .map(|path| changes.get(path.as_bytes()).unwrap().mtime)
        .into();
    assert_eq!(times, [42, 42, 42]);
    let changes =
        room.apply(&base, &view(&source), vec![Action::Copy(copy("/s", "/x/made/"))]).unwrap();
    assert_eq!(changes.get(b"x/made").unwrap().mtime, source_time);
    let changes =
        room.apply(&base, &view(&source), vec![Action::Copy(copy("/", "/a/made/"))]).unwrap();
    let times = ["a", "a/made"].map(|path| changes.get(path.as_bytes()).unwrap().mtime);
    assert_eq!(times, [NOW, source_time], "a root is as old as what is in it");
}

fn by_name(name: &str) -> Option<pb::UserOpt> {
    Some(pb::UserOpt { user: Some(User::ByName(pb::NamedUserOpt { name: name.into(), input: 0 })) })
}

fn by_id(id: u32) -> Option<pb::UserOpt> {
    Some(pb::UserOpt { user: Some(User::ById(id)) })
}

#[test]
fn owners_and_modes_apply_to_everything_that_is_made() {
    let base = [
        "etc/",
        "etc/passwd=root:x:0:0::/:/bin/sh\nbroken\napp:x:100:101:A:/:/bin/sh\nodd:x:many:1\nshort:x:7\n",
        "etc/group=root:x:0:\nstaff:x:50:app\n",
    ];
    let source = ["d/ 700 1:2", "d/f=f 4755 1:2", "d/l>f", "d/s/ 700 1:2"];
    let room = Room::new();
    for (user, group, expected) in [
        (by_id(5), None, "5:5"),
        (by_id(5), by_id(6), "5:6"),
        (by_name("app"), None, "100:101"),
        (by_name("app"), by_name("staff"), "100:50"),
        (by_name("app"), by_id(9), "100:9"),
        (None, by_name("staff"), "0:50"),
        (by_id(8), by_name("nobody-knows"), "8:0"),
        (by_name("short"), None, "7:0"),
    ] {
        let owned = pb::FileActionCopy {
            owner: Some(pb::ChownOpt { user, group }),
            ..copy("/d", "/new/x")
        };
        let expected = [
            format!("new/ 755 {expected}"),
            format!("new/x/ 755 {expected}"),
            format!("new/x/f=f 4755 {expected}"),
            format!("new/x/l>f 777 {expected}"),
            format!("new/x/s/ 700 {expected}"),
        ];
        assert_eq!(room.copied(&base, &source, owned), expected);
    }
    // Unknown names, and names where nobody is listed at all, mean root.
    for (base, name) in
        [(&base[..], "nobody-knows"), (&base, "odd"), (&base, "broken"), (&[], "app")]
    {
        let owner = Some(pb::ChownOpt { user: by_name(name), group: None });
        let owned = pb::FileActionCopy { owner, ..copy("/d/f", "/x") };
        assert_eq!(room.copied(base, &source, owned), ["x=f 4755"], "{name}");
    }
    let nowhere = Some(pb::UserOpt {
        user: Some(User::ByName(pb::NamedUserOpt { name: "app".into(), input: -1 })),
    });
    let owned = pb::FileActionCopy {
        owner: Some(pb::ChownOpt { user: nowhere, group: None }),
        ..copy("/d/f", "/x")
    };
    assert!(room.copied(&base, &source, owned)[0].starts_with("error: cannot look up \"app\""));
    // Without an owner the source's stays, but new parents are root's.
    assert_eq!(room.copied(&[], &source, copy("/d/f", "/new/x")), ["new/", "new/x=f 4755 1:2"]);
    // A mode is that of files, directories and new parents, not of links.
    let moded = pb::FileActionCopy { mode: 0o640, ..copy("/d", "/new/x") };
    assert_eq!(
        room.copied(&["new/ 711"], &source, moded.clone()),
        ["new/ 711", "new/x/ 640", "new/x/f=f 640 1:2", "new/x/l>f", "new/x/s/ 640 1:2"]
    );
    assert_eq!(room.copied(&[], &source, moded)[..2], ["new/ 640", "new/x/ 640"]);
}

#[test]
fn excluded_paths_are_relative_to_the_copied_directory() {
    let source = [
        "a.txt=a",
        "b.txt=b",
        "d/",
        "d/a.txt=a",
        "d/sub/ 700",
        "d/sub/a.txt=a",
        "d/sub/keep=k",
        "d/z=z",
    ];
    let room = Room::new();
    for (src, exclude, expected) in [
        ("/a.txt", &["a.txt"][..], &["x/", "x/a.txt=a"][..]),
        ("/*.txt", &["a.txt"], &["x/", "x/a.txt=a", "x/b.txt=b"]),
        ("/d", &["a.txt"], &["x/", "x/sub/ 700", "x/sub/a.txt=a", "x/sub/keep=k", "x/z=z"]),
        (
            "/d",
            &["d/a.txt"],
            &["x/", "x/a.txt=a", "x/sub/ 700", "x/sub/a.txt=a", "x/sub/keep=k", "x/z=z"],
        ),
        ("/d", &["**/a.txt"], &["x/", "x/sub/ 700", "x/sub/keep=k", "x/z=z"]),
        ("/d", &["sub"], &["x/", "x/a.txt=a", "x/z=z"]),
        ("/d", &["sub", "!sub/keep"], &["x/", "x/a.txt=a", "x/sub/ 700", "x/sub/keep=k", "x/z=z"]),
        ("/d", &["*", "!sub/keep"], &["x/", "x/sub/ 700", "x/sub/keep=k"]),
        ("/d", &["*", "!sub/none"], &["x/"]),
        ("/d", &["*"], &["x/"]),
    ] {
        let exclude_patterns = exclude.iter().map(|pattern| (*pattern).to_owned()).collect();
        let copy = pb::FileActionCopy { exclude_patterns, ..copy(src, "/x/") };
        assert_eq!(room.copied(&[], &source, copy), expected, "{src} {exclude:?}");
    }
    let bad = pb::FileActionCopy { exclude_patterns: vec!["[".into()], ..copy("/d", "/x/") };
    assert!(
        room.copied(&[], &source, bad)[0].starts_with("error: cannot use the exclude patterns")
    );
}

#[test]
fn special_files_and_hard_links_are_kept() {
    let mut source = tree(&["d/", "d/a=same", "d/b=same"]);
    for name in ["d/a", "d/b"] {
        source.get_mut(name.as_bytes()).unwrap().inode = Some((1, 2));
    }
    for (name, kind) in [
        ("d/c", Kind::CharDevice { major: 1, minor: 3 }),
        ("d/k", Kind::BlockDevice { major: 7, minor: 0 }),
        ("d/p", Kind::Fifo),
    ] {
        source.insert(name.as_bytes(), Entry { kind, ..Entry::directory(0o644, 0) });
    }
    let room = Room::new();
    let source = View::of_tree(Arc::new(source));
    let changes = room.apply(&[], &source, vec![Action::Copy(copy("/d", "/x"))]).unwrap();
    assert_eq!(lines(&changes), ["x/", "x/a=same", "x/b=same", "x/c:c1,3", "x/k:b7,0", "x/p:p"]);
    // Written down, the two names are one file.
    let folder = room.folder.path().join("out");
    std::fs::create_dir(&folder).unwrap();
    let mut files = changes;
    for name in ["x/c", "x/k"] {
        files.remove(name.as_bytes());
    }
    files.write_folder(&folder, room.store.overlay()).unwrap();
    use std::os::unix::fs::MetadataExt as _;
    let inode = |name: &str| std::fs::metadata(folder.join(name)).unwrap().ino();
    assert_eq!(inode("x/a"), inode("x/b"));
}

#[test]
fn archives_are_unpacked_by_content() {
    let room = Room::new();
    let folder = room.folder.path().join("context");
    std::fs::create_dir(&folder).unwrap();
    let mut archive = tar::Builder::new(vec![]);
    let mut add = |path: &str, kind: tar::EntryType, mode: u32, text: &str, link: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(11);
        header.set_gid(12);
        header.set_mtime(99);
        header.set_size(text.len() as u64);
        if !link.is_empty() {
            header.set_link_name(link).unwrap();
        }
        archive.append_data(&mut header, path, text.as_bytes()).unwrap();
    };
    add("bin/", tar::EntryType::Directory, 0o755, "", "");
    add("bin/sh", tar::EntryType::Regular, 0o755, "sh", "");
    add("etc/", tar::EntryType::Directory, 0o750, "", "");
    add("etc/conf", tar::EntryType::Regular, 0o600, "conf", "");
    add("etc/link", tar::EntryType::Symlink, 0o777, "", "conf");
    let bytes = archive.into_inner().unwrap();
    let mut gzip = std::process::Command::new("gzip")
        .stdin(std::process::Stdio::piped())
        .stdout(std::fs::File::create(folder.join("packed")).unwrap())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut gzip.stdin.take().unwrap(), &bytes).unwrap();
    assert!(gzip.wait().unwrap().success());
    std::fs::write(folder.join("plain.tar"), &bytes).unwrap();
    std::fs::write(folder.join("text.tar"), "no archive").unwrap();
    std::fs::write(folder.join("cut.gz"), &std::fs::read(folder.join("packed")).unwrap()[..30])
        .unwrap();
    std::os::unix::fs::symlink("plain.tar", folder.join("link")).unwrap();
    let options = ScanOptions { ownership: Ownership::Root, memory: None };
    let source = View::of_tree(Arc::new(scan(&folder, &mut Everything, &options).unwrap()));
    let base = [
        "bin>usr/bin",
        "etc/ 700 1:1",
        "etc/conf=old",
        "etc/other=o",
        "file=F",
        "usr/",
        "usr/bin/",
    ];
    let run = |copy: pb::FileActionCopy| {
        let copy = pb::FileActionCopy { attempt_unpack_docker_compatibility: true, ..copy };
        room.apply(&base, &source, vec![Action::Copy(copy)])
    };
    let unpacked = [
        "x/",
        "x/bin/ 755 11:12",
        "x/bin/sh=sh 755 11:12",
        "x/etc/ 750 11:12",
        "x/etc/conf=conf 600 11:12",
        "x/etc/link>conf 777 11:12",
    ];
    for (src, dest) in [("/plain.tar", "/x"), ("/packed", "/x/"), ("/link", "/x/")] {
        assert_eq!(lines(&run(copy(src, dest)).unwrap()), unpacked, "{src}");
    }
    // Directories are merged; a link in the place of an archive's directory is replaced, as upstream does.
    assert_eq!(
        lines(&run(copy("/plain.tar", "/")).unwrap()),
        [
            "bin/! 755 11:12",
            "bin/sh=sh 755 11:12",
            "etc/ 750 11:12",
            "etc/conf=conf 600 11:12",
            "etc/link>conf 777 11:12",
        ]
    );
    let owner = Some(pb::ChownOpt { user: by_id(5), group: None });
    let owned =
        lines(&run(pb::FileActionCopy { owner, mode: 0o700, ..copy("/packed", "/x") }).unwrap());
    assert_eq!(
        owned,
        [
            "x/ 755 5:5",
            "x/bin/ 755 5:5",
            "x/bin/sh=sh 755 5:5",
            "x/etc/ 750 5:5",
            "x/etc/conf=conf 600 5:5",
            "x/etc/link>conf 777 5:5",
        ]
    );
    assert_eq!(lines(&run(copy("/text.tar", "/x")).unwrap()), ["x=no archive"]);
    assert_eq!(
        run(copy("/cut.gz", "/x")).unwrap().len(),
        1,
        "what only begins like an archive is a file"
    );
    assert_eq!(
        run(copy("/plain.tar", "/file")).unwrap_err(),
        "cannot unpack into non-directory: /file"
    );
}

#[test]
fn directories_that_an_archive_does_not_list_are_what_they_were() {
    let room = Room::new();
    let folder = room.folder.path().join("context");
    std::fs::create_dir(&folder).unwrap();
    let mut archive = tar::Builder::new(vec![]);
    let mut add = |path: &str, kind: tar::EntryType, link: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_mtime(99);
        header.set_size(0);
        if !link.is_empty() {
            header.set_link_name(link).unwrap();
        }
        archive.append_data(&mut header, path, std::io::empty()).unwrap();
    };
    add("var/run/listed/", tar::EntryType::Directory, "");
    add("var/run/listed/file", tar::EntryType::Regular, "");
    add("var/run/listed/link", tar::EntryType::Link, "var/run/listed/file");
    add("var/run/new/file", tar::EntryType::Regular, "");
    std::fs::write(folder.join("a.tar"), archive.into_inner().unwrap()).unwrap();
    let options = ScanOptions { ownership: Ownership::Root, memory: None };
    let source = View::of_tree(Arc::new(scan(&folder, &mut Everything, &options).unwrap()));
    let run = |base: &[&str], dest: &str| {
        let copy = pb::FileActionCopy {
            attempt_unpack_docker_compatibility: true,
            ..copy("/a.tar", dest)
        };
        room.apply(base, &source, vec![Action::Copy(copy)]).map(|changes| lines(&changes))
    };
    // A layer names the folders above what it changes, as they are.
    let below = |above: &[&str], at: &str| {
        let lines = ["listed/", "listed/file= 755", "listed/link= 755", "new/", "new/file= 755"];
        let above = above.iter().map(|line| (*line).to_owned());
        above.chain(lines.map(|line| format!("{at}/{line}"))).collect::<Vec<_>>()
    };
    // A link to a folder is followed, whatever it is called by; neither it nor the folder changes.
    for link in ["/run", "../run"] {
        let base = ["run/ 700 5:5", "var/ 700 5:5", &format!("var/run>{link}")];
        assert_eq!(run(&base, "/").unwrap(), below(&["run/ 700 5:5"], "run"), "{link}");
    }
    // A link that leads to nothing gets what it leads to.
    let found = run(&["var/", "var/run>/run"], "/").unwrap();
    assert_eq!(found, below(&["run/"], "run"));
    // Where the archive is unpacked is the root that links begin at, and that none leads out of.
    for link in ["/run", "../../../run"] {
        let base = ["run/", "sub/", "sub/run/", "sub/var/", &format!("sub/var/run>{link}")];
        let found = run(&base, "/sub").unwrap();
        assert_eq!(found, below(&["sub/", "sub/run/"], "sub/run"), "{link}");
    }
    assert_eq!(
        run(&["var=file"], "/").unwrap_err(),
        "cannot unpack into /var: it is not a directory"
    );
}

#[test]
fn nothing_at_all_can_be_copied_from() {
    let room = Room::new();
    let context = FileContext { store: &room.store, now: NOW, inputs: &[] };
    let run = |src: &str| {
        let mut target = view(&["a=1"]);
        apply(&Action::Copy(copy(src, "/x")), &mut target, None, &context)
            .map(|()| lines(&target.into_changes()))
            .map_err(|error| error.to_string())
    };
    assert_eq!(run("/").unwrap(), ["x/"]);
    assert_eq!(run("/foo").unwrap_err(), "\"/foo\": not found");
}

fn mkdir(path: &str, make_parents: bool) -> Action {
    let (mode, timestamp, owner) = (0o711, -1, None);
    Action::Mkdir(pb::FileActionMkDir { path: path.into(), mode, make_parents, owner, timestamp })
}

fn mkfile(path: &str) -> Action {
    let (mode, timestamp, owner) = (0o600, 5, None);
    Action::Mkfile(pb::FileActionMkFile {
        path: path.into(),
        mode,
        data: b"new".to_vec(),
        owner,
        timestamp,
    })
}

fn symlink(oldpath: &str, newpath: &str) -> Action {
    let (timestamp, owner) = (-1, Some(pb::ChownOpt { user: by_id(3), group: None }));
    Action::Symlink(pb::FileActionSymlink {
        oldpath: oldpath.into(),
        newpath: newpath.into(),
        owner,
        timestamp,
    })
}

fn rm(path: &str, allow_not_found: bool, allow_wildcard: bool) -> Action {
    Action::Rm(pb::FileActionRm { path: path.into(), allow_not_found, allow_wildcard })
}

#[test]
fn other_actions() {
    let base = [
        "d/ 700",
        "d/f=f 640",
        "d/sub/",
        "d/sub/x=x",
        "file=F",
        "link>d",
        "target>d/f",
        "void>d/none",
    ];
    let room = Room::new();
    let run = |actions: Vec<Action>| match room.apply(&base, &View::default(), actions) {
        Ok(changes) => lines(&changes),
        Err(error) => vec![format!("error: {error}")],
    };
    for (actions, expected) in [
        (vec![mkdir("/n", false)], &["n/ 711"][..]),
        (vec![mkdir("/n/m", false)], &["error: \"/n\": not found"]),
        (vec![mkdir("/n/m", true)], &["n/ 711", "n/m/ 711"]),
        (vec![mkdir("/d/n", true)], &["d/ 700", "d/n/ 711"]),
        (vec![mkdir("/link/n/../m", true)], &["d/ 700", "d/m/ 711"]),
        (vec![mkdir("/d", true)], &[]),
        (vec![mkdir("/d", false)], &[]),
        (vec![mkdir("/", true)], &[]),
        (vec![mkdir("/file/x", true)], &["error: cannot create /file/x: /file is not a directory"]),
        (vec![mkdir("/file/x", false)], &["error: /file is not a directory"]),
        (vec![mkdir("/void", true)], &["d/ 700", "d/none/ 711"]),
        (vec![mkfile("/n")], &["n=new 600"]),
        (vec![mkfile("/target")], &["d/ 700", "d/f=new 640"]),
        (vec![mkfile("/n/m")], &["error: \"/n\": not found"]),
        (vec![mkfile("/d")], &["error: /d is a directory"]),
        (vec![mkfile("/")], &["error: / is a directory"]),
        (vec![mkdir("/n", false), mkfile("/n/f")], &["n/ 711", "n/f=new 600"]),
        (vec![symlink("../any", "/n")], &["n>../any 777 3:3"]),
        (vec![symlink("x", "/d")], &["error: /d exists already"]),
        (vec![symlink("x", "/void")], &["d/ 700", "d/none>x 777 3:3"]),
        (vec![rm("/file", false, false)], &["file:gone"]),
        (vec![rm("/link", false, false)], &["link:gone"]),
        (vec![rm("/link/f", false, false)], &["d/ 700", "d/f:gone"]),
        (vec![rm("/none", false, false)], &["error: \"/none\": not found"]),
        (vec![rm("/none", true, false)], &[]),
        (vec![rm("/none/deep", true, false)], &[]),
        (vec![rm("/*ne", false, true)], &[]),
        (vec![rm("/d/*", false, true)], &["d/ 700", "d/f:gone", "d/sub:gone"]),
        (vec![rm("/d/*", false, false)], &["error: \"/d/*\": not found"]),
        (vec![rm("/", false, false)], &["error: the root directory cannot be removed"]),
        (vec![rm("/../..", false, true)], &["error: the root directory cannot be removed"]),
        (vec![mkfile("/n"), rm("/n", false, false)], &[]),
        (
            vec![rm("/d", false, false), mkdir("/d", false), mkfile("/d/g")],
            &["d/! 711", "d/g=new 600"],
        ),
        (vec![rm("/d", false, false), rm("/d/f", false, false)], &["error: \"/d/f\": not found"]),
    ] {
        assert_eq!(run(actions.clone()), expected, "{actions:?}");
    }
}

#[test]
fn digests_say_what_a_copy_reads() {
    let base = ["d/ 700", "d/f=f", "d/s/", "d/s/g=g", "other=o"];
    let digest =
        |lines: &[&str], copy: &pb::FileActionCopy| source_digest(copy, &view(lines)).unwrap();
    let literal = copy("/d", "/x");
    let before = digest(&base, &literal);
    // The order of lines decides about times, which do not count; nor does what is not read, nor the literal's name.
    assert_eq!(digest(&["other=changed", "d/s/", "d/s/g=g", "d/f=f", "d/ 700"], &literal), before);
    assert_eq!(digest(&["e/ 700", "e/f=f", "e/s/", "e/s/g=g"], &copy("/e", "/x")), before);
    for changed in [
        ["d/ 700", "d/f=F", "d/s/", "d/s/g=g"],
        ["d/ 700", "d/f=f 600", "d/s/", "d/s/g=g"],
        ["d/ 700", "d/f=f 644 1:0", "d/s/", "d/s/g=g"],
        ["d/ 700", "d/f>f", "d/s/", "d/s/g=g"],
        ["d/ 700", "d/h=f", "d/s/", "d/s/g=g"],
        ["d/ 700", "d/f=f", "d/s/", "d/g=g"],
        ["d/ 700", "d/f=f", "d/s/", "d/s/g/"],
    ] {
        assert_ne!(digest(&changed, &literal), before, "{changed:?}");
    }
    // What one match has in it is not what lies beside it.
    let wildcard = copy("/?", "/x/");
    assert_ne!(digest(&["d/", "d/x=1"], &wildcard), digest(&["d/", "x=1"], &wildcard));
    // Under a wildcard names matter.
    assert_ne!(digest(&["a=1"], &wildcard), digest(&["b=1"], &wildcard));
    // Excluded paths do not count, except directories that are made for what is in them.
    let exclude_patterns = vec!["s".to_owned(), "!s/g".into()];
    let excluding = pb::FileActionCopy { exclude_patterns, ..literal };
    let before = digest(&["d/", "d/s/", "d/s/g=g", "d/s/h=h"], &excluding);
    assert_eq!(digest(&["d/", "d/s/", "d/s/g=g", "d/s/h=changed"], &excluding), before);
    assert_ne!(digest(&["d/", "d/s/ 700", "d/s/g=g", "d/s/h=h"], &excluding), before);
    let attributes = |xattrs: BTreeMap<Vec<u8>, Vec<u8>>| {
        let mut tree = tree(&["f=f"]);
        tree.get_mut(b"f").unwrap().xattrs = xattrs;
        source_digest(&copy("/f", "/x"), &View::of_tree(Arc::new(tree))).unwrap()
    };
    let capability = BTreeMap::from([(b"security.capability".to_vec(), vec![1])]);
    assert_ne!(attributes(BTreeMap::new()), attributes(capability));
}
