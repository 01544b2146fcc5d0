//! Whatever a context, an archive or an image holds, nothing outside the result is read or written.

use std::fs;
use std::process::Command;

use slipway_tests::{BASE, Sandbox, Tree, tool};

/// Makes an archive of entries that `python3` describes, beyond what `tar` would agree to pack.
fn archive(sandbox: &Sandbox, name: &str, entries: &str) -> std::path::PathBuf {
    let path = sandbox.path(name);
    let script = format!(
        "import io, sys, tarfile\n\
         out = tarfile.open(sys.argv[1], 'w', format=tarfile.PAX_FORMAT)\n\
         def add(name, kind=tarfile.REGTYPE, link='', text='evil\\n'):\n\
         \x20   info = tarfile.TarInfo(name)\n\
         \x20   info.type, info.linkname, info.mode = kind, link, 0o644 if kind == tarfile.REGTYPE else 0o755\n\
         \x20   info.size = len(text) if kind == tarfile.REGTYPE else 0\n\
         \x20   out.addfile(info, io.BytesIO(text.encode()))\n\
         {entries}\nout.close()\n"
    );
    tool(Command::new("python3").args(["-c", &script]).arg(&path));
    path
}

#[test]
fn an_archive_cannot_write_outside_the_place_where_it_is_unpacked() {
    let sandbox = Sandbox::with_base();
    let outside = sandbox.path("outside");
    fs::create_dir(&outside).unwrap();
    let place = outside.display();
    for (name, entries) in [
        ("dots", "add('../../../../../../../../../../evil-dots')".to_owned()),
        ("absolute", format!("add('{place}/evil')")),
        ("link", format!("add('out', tarfile.SYMTYPE, '{place}')\nadd('out/evil')")),
        ("dots-link", "add('up', tarfile.SYMTYPE, '../../../../..')\nadd('up/evil-up')".to_owned()),
        (
            "hard-link",
            "add('shadow', tarfile.LNKTYPE, '../../../../../../../../../etc/shadow')".to_owned(),
        ),
        (
            "link-replaced",
            format!(
                "add('d', tarfile.DIRTYPE)\nadd('d', tarfile.SYMTYPE, '{place}')\nadd('d/evil')"
            ),
        ),
    ] {
        let context = sandbox.context(name);
        fs::copy(archive(&sandbox, &format!("{name}.tar"), &entries), context.path().join("a.tar"))
            .unwrap();
        context.dockerfile(&format!("FROM {BASE}\nADD a.tar /in/\n"));
        // Refused or kept inside: both are safe.
        let ran = sandbox.slipway(["build", "--progress=plain", "-t", "x:1", context.arg()]).ran();
        if !ran.status.success() {
            assert!(
                ran.error().contains("a.tar") || ran.stderr.contains("a.tar"),
                "{}",
                ran.stderr
            );
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{name} wrote outside");
        for path in ["/evil-dots", "/evil-up"] {
            assert!(!std::path::Path::new(path).exists(), "{name} wrote {path}");
        }
        for file in sandbox_files(&sandbox, "evil") {
            assert!(file.contains("/snapshots/") || file.contains("/tree"), "{name} wrote {file}");
        }
        sandbox.assert_nothing_left();
        if ran.status.success() && name == "hard-link" {
            let tree = Tree::read(&sandbox.build_tree(&context, []));
            assert!(!tree.has("in/shadow"), "a file of the machine came into the image");
        }
    }
}

/// Finds what has a word in its name, wherever it lies in the sandbox.
fn sandbox_files(sandbox: &Sandbox, word: &str) -> Vec<String> {
    let found =
        tool(Command::new("find").arg(sandbox.path("")).args(["-name", &format!("*{word}*")]));
    found.lines().map(str::to_owned).collect()
}

#[test]
fn a_context_gives_nothing_that_lies_outside_of_it() {
    let sandbox = Sandbox::new();
    fs::write(sandbox.path("secret"), "secret\n").unwrap();
    let context = sandbox.context("context");
    context
        .file("f", "")
        .symlink("absolute", &sandbox.arg("secret"))
        .symlink("relative", "../secret");
    context.symlink("up", "..");

    // A link in a copied directory stays a link.
    context.dockerfile("FROM scratch\nCOPY . /all/\n");
    let tree = Tree::read(&sandbox.build_tree(&context, []));
    assert_eq!(tree.entry("all/relative").content, "../secret");
    assert_eq!(tree.entry("all/up").kind, "link");

    for source in ["absolute", "relative", "up/secret", "../secret", "/../secret", "f/../../secret"]
    {
        context.dockerfile(&format!("FROM scratch\nCOPY {source} /it\n"));
        let output = sandbox.arg("out");
        let arguments = ["build", "--progress=plain", "-o", &output, context.arg()];
        let ran = sandbox.slipway(arguments).ran();
        let copied = fs::read_to_string(sandbox.path("out/it")).unwrap_or_default();
        assert!(!copied.contains("secret"), "{source} was read");
        assert!(!ran.status.success(), "{source} names nothing in the context: {}", ran.stderr);
        assert!(ran.stderr.contains("Dockerfile:2"), "{}", ran.stderr);
    }
}

#[test]
fn links_in_an_image_are_followed_inside_of_it() {
    let sandbox = Sandbox::with_base();
    let outside = sandbox.path("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret\n").unwrap();
    let context = sandbox.context("context");
    context.file("f", "f\n").dockerfile(&format!(
        "FROM {BASE} AS first\nRUN ln -s {0} /absolute && ln -s ../../../../../../../..{0} /relative\n\
         COPY f /absolute/one\nCOPY f /relative/two\nWORKDIR /absolute/three\n\
         FROM scratch\nCOPY --from=first {0} /seen/\n",
        outside.display()
    ));
    let tree = Tree::read(&sandbox.build_tree(&context, []));
    assert_eq!(tree.paths(), ["seen", "seen/one", "seen/three", "seen/two"]);
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "nothing was written there");

    context.dockerfile(&format!(
        "FROM {BASE} AS first\nRUN ln -s {0}/secret /secret\nFROM scratch\nCOPY --from=first /secret /\n",
        outside.display()
    ));
    let ran = sandbox.slipway(["build", "-o", &sandbox.arg("out"), context.arg()]).ran();
    let copied = fs::read_to_string(sandbox.path("out/secret")).unwrap_or_default();
    assert!(!copied.contains("secret\n"), "a file of the machine was read");
    assert!(!ran.status.success(), "{}", ran.stderr);
}

#[test]
fn a_local_export_does_not_follow_links_of_the_image() {
    let sandbox = Sandbox::with_base();
    let outside = sandbox.path("outside");
    fs::create_dir(&outside).unwrap();
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM {BASE} AS made\nRUN mkdir /d && echo evil > /d/evil\nFROM scratch\nCOPY --from=made /d /d\n"));
    // The folder has a link where the image has a directory.
    fs::create_dir(sandbox.path("out")).unwrap();
    std::os::unix::fs::symlink(&outside, sandbox.path("out/d")).unwrap();
    let ran = sandbox.slipway(["build", "-o", &sandbox.arg("out"), context.arg()]).ran();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{}", ran.stderr);
}
