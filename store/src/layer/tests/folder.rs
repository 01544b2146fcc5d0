use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::{EntryKind, LayerErrorKind, LayerStack, Overlay, TarWriter, write_folder};
use super::{
    DAY, archive, diff, directory, file, hard_link, list, look, pack, paths, reduced, stack,
    symlink, unpack, unpack_over,
};

/// A base layer, and an overlay mount over it to change it as a build step would.
struct Step {
    scratch: tempfile::TempDir,
}

impl Step {
    fn new(base: &[(super::super::Entry, Vec<u8>)], options: &str) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        for name in ["base", "upper", "work", "merged"] {
            fs::DirBuilder::new().mode(0o755).create(scratch.path().join(name)).unwrap();
        }
        let step = Self { scratch };
        unpack(&archive(base), &step.at("base")).unwrap();
        let mount = format!(
            "lowerdir={},upperdir={},workdir={},index=off{options}",
            step.at("base").display(),
            step.at("upper").display(),
            step.at("work").display()
        );
        let status = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &mount])
            .arg(step.at("merged"))
            .status();
        assert!(status.unwrap().success(), "this test needs to mount overlayfs");
        step
    }

    fn at(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn run(&self, script: &str) {
        let status = Command::new("sh")
            .args(["-ec", script])
            .current_dir(self.at("merged"))
            .status()
            .unwrap();
        assert!(status.success());
    }

    fn lower(&self) -> LayerStack {
        stack(&[self.at("base")])
    }

    fn diff(&self) -> Vec<u8> {
        diff(&self.at("upper"), &self.lower())
    }

    /// Unpacks the diff over the base and compares the result with what the step saw.
    fn check_round_trip(&self) {
        let again = tempfile::tempdir().unwrap();
        unpack_over(&self.diff(), again.path(), &self.lower()).unwrap();
        let copy = tempfile::tempdir().unwrap();
        let merged = stack(&[self.at("base").as_path(), again.path()]);
        super::super::copy_tree(&merged, copy.path(), &super::super::CopyOptions::default())
            .unwrap();
        let (mut expected, mut found) = (look(&self.at("merged")), look(copy.path()));
        for seen in [&mut expected, &mut found] {
            seen.remove("\"\"");
        }
        assert_eq!(expected, found);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        // Lazily: a failed assertion must not leave the mount behind.
        drop(Command::new("umount").arg("-l").arg(self.at("merged")).status());
    }
}

fn base() -> Vec<(super::super::Entry, Vec<u8>)> {
    vec![
        directory("bin"),
        file("bin/sh", "shell"),
        directory("etc"),
        file("etc/a", "a"),
        file("etc/b", "b"),
        directory("etc/sub"),
        file("etc/sub/x", "x"),
        directory("lib"),
        file("lib/one", "1"),
        hard_link("lib/two", "lib/one"),
        symlink("link", "etc"),
        directory("var"),
        directory("var/cache"),
        file("var/cache/old", "old"),
        file("var/keep", "keep"),
    ]
}

#[test]
fn only_changes_are_written_in_order() {
    let step = Step::new(&base(), "");
    step.run("echo new > etc/a; rm etc/b; mkdir -p opt/x; echo y > opt/x/y; touch opt-z; ln -s x opt/l; rm -r var/cache; mknod null c 1 3; mkfifo pipe");
    let bytes = step.diff();
    assert_eq!(
        paths(&bytes),
        [
            "etc",
            "etc/a",
            "etc/.wh.b",
            "null",
            "opt",
            "opt/l",
            "opt/x",
            "opt/x/y",
            "opt-z",
            "pipe",
            "var",
            "var/.wh.cache"
        ]
    );
    let whiteout = &list(&bytes)[2].0;
    assert_eq!(
        (whiteout.mode, whiteout.mtime_seconds, &whiteout.kind),
        (0, 0, &EntryKind::File { size: 0 })
    );
    step.check_round_trip();
}

#[test]
fn replaced_directory_becomes_whiteouts() {
    let step = Step::new(&base(), "");
    step.run("rm -r etc; mkdir etc; echo new > etc/b; mkdir etc/other; touch etc/other/z; touch -d @1600000000 etc");
    assert_eq!(
        paths(&step.diff()),
        ["etc", "etc/.wh.a", "etc/b", "etc/other", "etc/other/z", "etc/.wh.sub"]
    );
    step.check_round_trip();
}

#[test]
fn file_and_directory_change_places() {
    let step = Step::new(&base(), "");
    step.run("rm etc/a; mkdir etc/a; touch etc/a/in; rm -r etc/sub; touch etc/sub; rm link; mkdir link; touch link/a");
    assert_eq!(paths(&step.diff()), ["etc", "etc/a", "etc/a/in", "etc/sub", "link", "link/a"]);
    step.check_round_trip();
}

#[test]
fn what_did_not_change_is_left_out() {
    let step = Step::new(&base(), "");
    step.run("mv etc/a etc/t; mv etc/t etc/a; chmod 600 bin/sh; chmod 644 bin/sh; touch -d @1600000000 etc bin; rm var/keep; echo -n keep > var/keep; touch -d @1600000000 var/keep; touch -d @1600000000 var");
    assert!(step.at("upper/etc/a").exists(), "the file was copied up");
    assert_eq!(paths(&step.diff()), [""; 0]);
    step.run("echo -n KEEP > var/keep; touch -d @1600000000 var/keep");
    assert_eq!(paths(&step.diff()), ["var", "var/keep"], "same size and time, other content");
}

#[test]
fn hard_links_stay_links() {
    let step = Step::new(&base(), "");
    step.run(
        "echo h > h1; ln h1 h0; mkdir d; ln h1 d/h2; ln -s x s; ln s s2; echo changed >> lib/one",
    );
    let entries = list(&step.diff());
    let kinds: Vec<_> = entries
        .iter()
        .map(|(e, _)| (String::from_utf8_lossy(&e.path).into_owned(), e.kind.clone()))
        .collect();
    let link = |target: &str| EntryKind::HardLink { target: target.into() };
    assert_eq!(
        kinds,
        [
            ("d".to_owned(), EntryKind::Directory),
            ("d/h2".to_owned(), EntryKind::File { size: 2 }),
            ("h0".to_owned(), link("d/h2")),
            ("h1".to_owned(), link("d/h2")),
            ("lib".to_owned(), EntryKind::Directory),
            ("lib/one".to_owned(), EntryKind::File { size: 9 }),
            ("s".to_owned(), EntryKind::Symlink { target: b"x".to_vec() }),
            ("s2".to_owned(), link("s")),
        ]
    );
}

#[test]
fn sockets_and_attributes_of_users_are_left_out() {
    let step = Step::new(&base(), "");
    let socket = UnixListener::bind(step.at("merged/socket")).unwrap();
    fs::write(step.at("merged/tool"), "t").unwrap();
    fs::set_permissions(step.at("merged/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
    let capability =
        b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
    let set = |name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(step.at("merged/tool"), name, value, rustix::fs::XattrFlags::empty())
            .unwrap();
    };
    set("security.capability", capability);
    set("user.note", b"n");
    let entries = list(&step.diff());
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].0.mode, 0o4755);
    let names: Vec<_> = entries[0].0.xattrs.keys().collect();
    assert_eq!(names, [b"security.capability"]);
    drop(socket);
}

#[test]
fn folders_of_unsuitable_mounts_are_refused() {
    for (options, script) in
        [(",redirect_dir=on", "mv etc moved"), (",metacopy=on,redirect_dir=on", "chmod 600 bin/sh")]
    {
        let step = Step::new(&base(), options);
        step.run(script);
        let error = reduced(&step.at("upper"), &step.lower())
            .and_then(|copy| {
                let mut tar = TarWriter::new(Vec::new());
                write_folder(&copy.path().join("copy"), Overlay::Trusted, &mut tar)
            })
            .unwrap_err();
        assert_eq!(error.kind(), LayerErrorKind::Unsupported, "{error}");
    }
}

#[test]
fn opaque_root_removes_what_is_below() {
    let lower = tempfile::tempdir().unwrap();
    unpack(&archive(&base()), lower.path()).unwrap();
    let layer =
        archive(&[file(".wh..wh..opq", ""), directory("etc"), file("etc/n", ""), file("zz", "")]);
    let folder = tempfile::tempdir().unwrap();
    assert!(unpack(&layer, folder.path()).unwrap().opaque_root);
    assert_eq!(paths(&pack(folder.path())), [".wh..wh..opq", "etc", "etc/n", "zz"]);
    let bytes = diff(folder.path(), &stack(&[lower.path()]));
    assert_eq!(
        paths(&bytes),
        [
            ".wh.bin",
            "etc/.wh.a",
            "etc/.wh.b",
            "etc/n",
            "etc/.wh.sub",
            ".wh.lib",
            ".wh.link",
            ".wh.var",
            "zz"
        ]
        .iter()
        .flat_map(|p| if *p == "etc/.wh.a" { vec!["etc", p] } else { vec![*p] })
        .collect::<Vec<_>>()
    );
}

#[test]
fn a_whiteout_over_nothing_is_left_out() {
    let folder = tempfile::tempdir().unwrap();
    unpack(&archive(&[directory("d"), file("d/.wh.x", ""), file(".wh.y", "")]), folder.path())
        .unwrap();
    assert_eq!(paths(&pack(folder.path())), ["d", "d/.wh.x", ".wh.y"]);
    let lower = tempfile::tempdir().unwrap();
    // Through a symbolic link of the lower layer, which the directory of this layer replaces.
    unpack(&archive(&[directory("e"), file("e/x", ""), symlink("d", "e")]), lower.path()).unwrap();
    assert_eq!(paths(&diff(folder.path(), &stack(&[lower.path()]))), ["d"]);
}

/// With `SLIPWAY_TEST_DIFFER` naming a program that writes `<upper> <lower>` as BuildKit does, compares with it.
fn check_against_reference(upper: &Path, lower: &Path) {
    let Some(differ) = std::env::var_os("SLIPWAY_TEST_DIFFER") else { return };
    let output = Command::new(differ).arg(upper).arg(lower).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let ours = diff(upper, &stack(&[lower]));
    let show = |bytes: &[u8]| list(bytes).into_iter().map(|(e, _)| e).collect::<Vec<_>>();
    assert_eq!(show(&ours), show(&output.stdout));
    assert!(ours == output.stdout, "the same entries in other bytes");
}

const STEPS: &[&str] = &[
    "echo new > etc/a; rm etc/b; mkdir -p opt/x; echo y > opt/x/y; touch opt-z; ln -s x opt/l; rm -r var/cache; mknod null c 1 3; mkfifo pipe",
    "rm -r etc; mkdir etc; echo new > etc/b; mkdir etc/other; touch etc/other/z",
    "rm -r lib; mkdir lib; echo -n 1 > lib/one; touch -d @1600000000 lib/one; ln lib/one lib/a; ln lib/one lib/two; echo x > lib/m; ln lib/m lib/n",
    "rm -r lib; mkdir lib; echo -n 1 > lib/one; touch -d @1600000000 lib/one; ln lib/one lib/two; ln lib/one lib/zz; mkdir lib/b; ln lib/one lib/b/deep",
    "rm etc/a; mkdir etc/a; touch etc/a/in; rm -r etc/sub; touch etc/sub; rm link; ln -s elsewhere link; chmod 700 etc; chown 5:6 bin",
    "rm -r *; mkdir -p etc/sub; echo z > etc/sub/x; mkdir var; chmod 1777 var",
    "mkdir -p $(printf 'a%.0s' $(seq 200))/$(printf 'b%.0s' $(seq 120)); touch $(printf 'c%.0s' $(seq 180)) 'ü' 'etc/sub/new file'; mv etc/b etc/c; mv bin/sh bin/bash",
    "mkdir etc.d; touch etc.d/x etc-1 etc/z; rm var/keep; rmdir var/cache 2>/dev/null || rm -r var/cache; mkdir var/cache; mkdir -p var/cache/old",
];

#[test]
fn steps_survive_the_round_trip() {
    for script in STEPS {
        let step = Step::new(&base(), "");
        step.run(script);
        step.check_round_trip();
        check_against_reference(&step.at("upper"), &step.at("base"));
    }
}

#[test]
fn the_time_of_a_folder_is_seen_and_not_packed() {
    let step = Step::new(&base(), "");
    step.run("touch -d @1500000000 bin var/cache; touch -d @1500000000 var");
    let copy = reduced(&step.at("upper"), &step.lower()).unwrap();
    let copy = copy.path().join("copy");
    assert_eq!(paths(&pack(&copy)), [""; 0]);
    for path in ["bin", "var", "var/cache"] {
        let seen = stack(&[step.at("base"), copy.clone()])
            .lookup(path.as_bytes(), super::super::Follow::None);
        assert_eq!(seen.unwrap().unwrap().metadata.mtime_seconds, 1_500_000_000, "{path}");
        let alone = stack(&[&copy]).lookup(path.as_bytes(), super::super::Follow::None);
        assert_eq!(alone.unwrap(), None, "{path}");
    }
}

#[test]
fn names_of_one_inode_stay_together_when_one_is_new() {
    let step = Step::new(&base(), "");
    step.run("ln etc/a etc/n; touch -d @1600000000 etc");
    let entries = list(&step.diff());
    let kinds: Vec<_> = entries.iter().map(|(entry, _)| entry.kind.clone()).collect();
    let link = EntryKind::HardLink { target: b"etc/a".to_vec() };
    assert_eq!(kinds, [EntryKind::Directory, EntryKind::File { size: 1 }, link]);
    step.check_round_trip();
    step.run("rm etc/n; touch -d @1600000000 etc");
    assert_eq!(paths(&step.diff()), [""; 0]);
    // All names of an inode are as they were, the folders around them too.
    step.run("rm -r var; mkdir -p var/cache; echo -n old > var/cache/old; echo -n keep > var/keep; touch -d @1600000000 var/cache/old var/keep");
    step.run("rm -r lib; mkdir lib; echo -n 1 > lib/one; ln lib/one lib/two; touch -d @1600000000 lib/one lib");
    assert_eq!(paths(&step.diff()), [""; 0]);
}

#[test]
fn what_was_reduced_means_the_same_elsewhere() {
    let step = Step::new(&base(), "");
    step.run("mv etc/a t; mv t etc/a; rm -r var; mkdir -p var/cache/new; chmod 700 var/cache; echo -n keep > var/keep; touch -d @1600000000 var/keep");
    step.run(
        "rm -r etc/sub; mkdir opt; mkdir opt/x; mv opt/x etc/sub; touch -d @1500000000 etc var",
    );
    let copy = reduced(&step.at("upper"), &step.lower()).unwrap();
    let copy = copy.path().join("copy");
    assert_eq!(
        paths(&pack(&copy)),
        [
            "etc",
            "etc/sub",
            "etc/sub/.wh.x",
            "opt",
            "var",
            "var/cache",
            "var/cache/new",
            "var/cache/.wh.old"
        ]
    );
    assert_eq!(fs::metadata(copy.join("var")).unwrap().mtime(), 1_500_000_000);
    // What others have there shows.
    let other = tempfile::tempdir().unwrap();
    let others = [
        directory("etc"),
        directory("etc/sub"),
        file("etc/sub/y", "y"),
        directory("var"),
        directory("var/cache"),
        file("var/cache/other", "o"),
        file("var/keep", "another"),
    ];
    unpack(&archive(&others), other.path()).unwrap();
    let merged = stack(&[other.path(), &copy]);
    let mut seen = vec![];
    merged
        .walk::<super::super::LayerError>(b"", |located| {
            seen.push(String::from_utf8(located.path.clone()).unwrap());
            Ok(super::super::stack::Walk::Continue)
        })
        .unwrap();
    assert_eq!(
        seen,
        [
            "etc",
            "etc/sub",
            "etc/sub/y",
            "opt",
            "var",
            "var/cache",
            "var/cache/new",
            "var/cache/other",
            "var/keep"
        ]
    );
}

#[test]
fn attributes_that_no_archive_has_are_changes() {
    let step = Step::new(&base(), "");
    for (path, name) in [("etc/a", "user.a"), ("bin", "user.b")] {
        let path = step.at("merged").join(path);
        rustix::fs::setxattr(&path, name, b"1", rustix::fs::XattrFlags::empty()).unwrap();
    }
    assert_eq!(paths(&step.diff()), ["bin", "etc", "etc/a"]);
}

#[test]
fn what_was_written_at_the_same_time_is_not_taken_for_the_same() {
    let folder = |content: &str, target: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("changed"), content).unwrap();
        std::fs::write(folder.path().join("same"), "same").unwrap();
        std::os::unix::fs::symlink(target, folder.path().join("link")).unwrap();
        std::os::unix::fs::symlink("same", folder.path().join("same-link")).unwrap();
        for name in ["changed", "same", "link", "same-link"] {
            rustix::fs::utimensat(
                rustix::fs::CWD,
                folder.path().join(name),
                &super::super::host::times(DAY, 123_456_789),
                rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
            )
            .unwrap();
        }
        folder
    };
    let (lower, upper) = (folder("one", "/1"), folder("two", "/2"));
    let bytes = diff(upper.path(), &stack(&[lower.path()]));
    assert_eq!(paths(&bytes), ["changed", "link"]);
}
