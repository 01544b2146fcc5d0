//! What a build reads: contexts of every kind, named ones, and the policy that decides what may be read from outside.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use slipway_tests::{BASE, Reply, Request, Sandbox, Server, Tree, tool};

/// Serves the files of a folder, as any web server does.
fn web(folder: &Path) -> Server {
    let folder = folder.to_owned();
    Server::start(None, move |request: &Request| {
        let path = request.path.split('?').next().unwrap_or_default().trim_start_matches('/');
        match fs::read(folder.join(path)) {
            Ok(bytes) => Reply::Answer(200, vec![], bytes),
            Err(_) => Reply::status(404, "no such file\n"),
        }
    })
}

fn git(folder: &Path, words: &[&str]) -> String {
    let mut command = Command::new("git");
    command
        .args(["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "tag.gpgSign=false"])
        .args(words)
        .current_dir(folder)
        .env("GIT_COMMITTER_DATE", "2001-02-03T04:05:06Z")
        .env("GIT_AUTHOR_DATE", "2001-02-03T04:05:06Z");
    tool(&mut command).trim().to_owned()
}

/// Makes a repository with a tag and two branches, and serves it; returns its URL as well.
fn repository(sandbox: &Sandbox) -> (Server, String) {
    let work = sandbox.context("work");
    work.dockerfile("FROM scratch\nCOPY f /\n")
        .file("f", "main")
        .file("sub/Dockerfile", "FROM scratch\nCOPY g /\n");
    work.file("sub/g", "sub").file("other.Dockerfile", "FROM scratch\nCOPY f /other\n");
    git(work.path(), &["init", "-q", "-b", "main"]);
    git(work.path(), &["add", "."]);
    git(work.path(), &["commit", "-q", "-m", "one"]);
    git(work.path(), &["tag", "-a", "-m", "tag", "v1"]);
    work.file("f", "branch");
    git(work.path(), &["checkout", "-q", "-b", "branch"]);
    git(work.path(), &["commit", "-q", "-a", "-m", "two"]);
    git(work.path(), &["checkout", "-q", "main"]);
    let served = sandbox.path("served");
    fs::create_dir(&served).expect("the sandbox can be written");
    let bare = served.join("repo.git");
    git(&served, &["clone", "-q", "--bare", work.arg(), bare.to_str().expect("the path is text")]);
    git(&bare, &["update-server-info"]);
    let server = web(&served);
    let url = format!("http://{}/repo.git", server.host());
    (server, url)
}

/// Builds with these words; returns the files of the result.
fn built(sandbox: &Sandbox, words: &[&str], stdin: Option<Vec<u8>>) -> Tree {
    let out = sandbox.path("built");
    if out.exists() {
        fs::remove_dir_all(&out).expect("the output can be removed");
    }
    let output = format!("type=local,dest={}", out.display());
    let run = sandbox.slipway(["build", "--progress=plain", "-o", &output]).args(words);
    match stdin {
        Some(bytes) => run.stdin(bytes).succeeds(),
        None => run.succeeds(),
    };
    Tree::read(&out)
}

fn text(sandbox: &Sandbox, path: &str) -> String {
    fs::read_to_string(sandbox.path("built").join(path)).expect("the file was built")
}

/// Fails to build with these words; returns what was printed.
fn failed(sandbox: &Sandbox, words: &[&str], stdin: Option<&str>) -> String {
    let run = sandbox.slipway(["build", "--progress=plain", "-o", "type=cacheonly"]).args(words);
    let ran = match stdin {
        Some(text) => run.stdin(text).fails(1),
        None => run.fails(1),
    };
    ran.error();
    ran.stderr
}

#[test]
fn an_archive_on_standard_input_is_a_context() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.dockerfile("FROM scratch\nCOPY f d /\n").file("f", "text").file("d/g", "");
    context
        .file("other", "FROM scratch\nCOPY f /renamed\n")
        .file("d/x", "")
        .file(".dockerignore", "d/x");
    for options in ["--create", "--gzip", "--bzip2", "--xz", "--zstd"] {
        let archive = sandbox.path("context.tar");
        let mut tar = Command::new("tar");
        tool(tar.args([options, "-cf"]).arg(&archive).args(["-C", context.arg(), "."]));
        let bytes = fs::read(&archive).unwrap();
        // Ignore files are for folders of the client.
        assert_eq!(
            built(&sandbox, &["-"], Some(bytes.clone())).paths(),
            ["f", "g", "x"],
            "{options}"
        );
        assert_eq!(built(&sandbox, &["-f", "other", "-"], Some(bytes)).paths(), ["renamed"]);
    }
    let archive = sandbox.path("pax.tar");
    let mut pax = Command::new("tar");
    pax.args(["--format=pax", "--pax-option=comment=x", "-cf"]).arg(&archive);
    tool(pax.args(["-C", context.arg(), "."]));
    assert_eq!(built(&sandbox, &["-"], Some(fs::read(&archive).unwrap())).paths(), ["f", "g", "x"]);
}

#[test]
fn a_dockerfile_on_standard_input_has_no_files() {
    let sandbox = Sandbox::new();
    let dockerfile = "FROM scratch\nCOPY <<end /f\nhere\nend\n";
    assert_eq!(built(&sandbox, &["-"], Some(dockerfile.into())).paths(), ["f"]);
    let said = failed(&sandbox, &["-"], Some("FROM scratch\nCOPY f /\n"));
    assert!(said.contains("COPY f /") && said.contains("\"/f\": not found"), "{said}");
    let said = failed(&sandbox, &["-f", "x", "-"], Some(dockerfile));
    assert!(said.contains("ambiguous Dockerfile source"), "{said}");
    let said = failed(&sandbox, &["-f", "-", "-"], Some(dockerfile));
    assert!(said.contains("can't use stdin for both build context and dockerfile"), "{said}");
    let said = failed(&sandbox, &["-"], Some(""));
    assert!(said.contains("standard input is empty"), "{said}");
    let said = failed(&sandbox, &["no/such/folder"], None);
    assert!(
        said.contains("unable to prepare context: path \"no/such/folder\" not found"),
        "{said}"
    );
}

#[test]
fn archives_and_dockerfiles_are_fetched() {
    let sandbox = Sandbox::new();
    let context = sandbox.context("context");
    context.dockerfile("FROM scratch\nCOPY f /\n").file("f", "text");
    context.file("elsewhere", "FROM scratch\nCOPY f /by-url\n");
    let served = sandbox.path("served");
    fs::create_dir(&served).unwrap();
    for (option, name) in [("--gzip", "a.tgz"), ("--zstd", "a.tar.zst")] {
        let mut tar = Command::new("tar");
        tool(tar.args([option, "-cf"]).arg(served.join(name)).args(["-C", context.arg(), "."]));
    }
    fs::write(served.join("Remote"), "FROM scratch\nCOPY context /self\n").unwrap();
    fs::copy(context.path().join("elsewhere"), served.join("elsewhere")).unwrap();
    let server = web(&served);
    let url = |path: &str| format!("http://{}/{path}", server.host());
    assert_eq!(built(&sandbox, &[&url("a.tgz")], None).paths(), ["f"]);
    assert_eq!(built(&sandbox, &[&url("a.tar.zst")], None).paths(), ["f"]);
    assert_eq!(built(&sandbox, &["-f", "elsewhere", &url("a.tgz")], None).paths(), ["by-url"]);
    // A file that is no archive is the Dockerfile, and the only file there is.
    assert_eq!(built(&sandbox, &[&url("Remote")], None).paths(), ["self"]);
    // The Dockerfile alone may be elsewhere.
    let elsewhere = url("elsewhere");
    for words in [vec!["-f", &elsewhere, context.arg()], vec!["-f", &elsewhere, &url("a.tgz")]] {
        assert_eq!(built(&sandbox, &words, None).paths(), ["by-url"], "{words:?}");
    }
    let dockerfile = "FROM scratch\nCOPY f /by-stdin\n";
    let words = ["-f", "-", &url("a.tgz")];
    assert_eq!(built(&sandbox, &words, Some(dockerfile.into())).paths(), ["by-stdin"]);
    let missing = url("missing");
    for words in [vec![missing.as_str()], vec!["-f", &missing, context.arg()]] {
        let said = failed(&sandbox, &words, None);
        assert!(said.contains(&missing) && said.contains("404"), "{words:?}: {said}");
    }
}

#[test]
fn repositories_are_contexts() {
    let sandbox = Sandbox::new();
    let (_server, url) = repository(&sandbox);
    let at = |rest: &str| format!("{url}{rest}");
    for (rest, path, content) in [
        ("", "f", "main"),
        ("#v1", "f", "main"),
        ("#branch", "f", "branch"),
        ("#main:sub", "g", "sub"),
        ("#:sub", "g", "sub"),
        ("?branch=branch", "f", "branch"),
        ("?tag=v1&subdir=sub", "g", "sub"),
    ] {
        assert_eq!(built(&sandbox, &[&at(rest)], None).paths(), [path], "{rest}");
        assert_eq!(text(&sandbox, path), content, "{rest}");
    }
    assert_eq!(built(&sandbox, &["-f", "other.Dockerfile", &url], None).paths(), ["other"]);
    // A Dockerfile of this machine, by its full path.
    let own = sandbox.path("Own");
    fs::write(&own, "FROM scratch\nCOPY f /own\n").unwrap();
    assert_eq!(built(&sandbox, &["-f", own.to_str().unwrap(), &url], None).paths(), ["own"]);
    let dockerfile = "FROM scratch\nCOPY f /by-stdin\n";
    assert_eq!(built(&sandbox, &["-f", "-", &url], Some(dockerfile.into())).paths(), ["by-stdin"]);
    let said = failed(&sandbox, &[&at("#nowhere")], None);
    assert!(said.contains("does not contain ref nowhere") && said.contains(&url), "{said}");
    let said = failed(&sandbox, &[&at("?nonsense=1")], None);
    assert!(said.contains("unexpected query \"nonsense\""), "{said}");
}

#[test]
fn the_time_of_a_commit_dates_the_image() {
    let sandbox = Sandbox::new();
    let (_server, url) = repository(&sandbox);
    sandbox.run(["build", "-q", "-t", "dated:1", "--build-arg", "SOURCE_DATE_EPOCH=context", &url]);
    assert_eq!(sandbox.inspect("dated:1", None)["Created"], "2001-02-03T04:05:06Z");
}

#[test]
fn named_contexts_take_the_place_of_stages_and_images() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(
        "FROM scratch AS stage\nCOPY <<end /own\nend\nFROM scratch\nCOPY --from=stage / /\n",
    );
    assert_eq!(built(&sandbox, &[context.arg()], None).paths(), ["own"]);
    let with = |value: &str| {
        let context_flag = format!("stage={value}");
        let tree = built(&sandbox, &["--build-context", &context_flag, context.arg()], None);
        tree.paths().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let other = sandbox.context("other");
    other.file("a", "").file("b", "").file(".dockerignore", "b\n.dockerignore\n");
    assert_eq!(with(other.arg()), ["a"]);
    let (server, url) = repository(&sandbox);
    assert_eq!(with(&format!("{url}#main:sub")), ["Dockerfile", "g"]);
    let file = format!("http://{}/repo.git/HEAD", server.host());
    assert_eq!(with(&file), ["context"]);
    assert!(with(&format!("docker-image://{BASE}")).contains(&"etc/passwd".to_owned()));
}

#[test]
fn images_of_layouts_are_bases() {
    let sandbox = Sandbox::new();
    let base = sandbox.context("base");
    base.file("f", "").dockerfile("FROM scratch\nENV FROM_LAYOUT=yes\nCOPY f /base\n");
    let (archive, layout) = (sandbox.arg("base.tar"), sandbox.path("layout"));
    let output = format!("type=oci,dest={archive}");
    sandbox.build(&base, ["-t", "example.com/base:tagged", "-o", &output]);
    fs::create_dir(&layout).unwrap();
    tool(Command::new("tar").args(["-xf", &archive, "-C"]).arg(&layout));
    let context = sandbox.context("context");
    context.file("f", "").dockerfile("FROM anything\nCOPY f /$FROM_LAYOUT\n");
    let index: Value =
        serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let digest = index["manifests"][0]["digest"].as_str().unwrap();
    let layout = layout.display();
    for value in [format!("{layout}"), format!("{layout}:tagged"), format!("{layout}@{digest}")] {
        let flag = format!("anything=oci-layout://{value}");
        let tree = built(&sandbox, &["--build-context", &flag, context.arg()], None);
        assert_eq!(tree.paths(), ["base", "yes"], "{value}");
    }
    for (value, part) in [
        ("anything=oci-layout:///no/such", "no OCI image layout: /no/such/index.json"),
        ("anything=/no/such", "failed to get build context anything: /no/such"),
        ("anything", "expected key=value"),
        ("anything=target:x", "no target \"x\""),
    ] {
        let ran = sandbox.slipway(["build", "--build-context", value, context.arg()]).ran();
        assert!(!ran.status.success() && ran.stderr.contains(part), "{value}: {}", ran.stderr);
    }
}

#[test]
fn sources_that_fail_show_where_they_are_used() {
    let sandbox = Sandbox::new();
    let (server, url) = repository(&sandbox);
    let context = sandbox.context("context");
    let file = format!("http://{}/repo.git/HEAD", server.host());
    let missing = format!("http://{}/missing", server.host());
    let wrong = format!("sha256:{}", "0".repeat(64));
    for (line, parts) in [
        (format!("ADD {missing} /x"), vec!["404", missing.as_str(), "check the URL"]),
        (format!("ADD --checksum={wrong} {file} /x"), vec!["digest mismatch", &file, &wrong]),
        (format!("ADD {url}#nowhere /x"), vec!["does not contain ref nowhere", &url]),
    ] {
        context.dockerfile(&format!("FROM scratch\n{line}\n"));
        let ran = sandbox.build_fails(&context, ["-o", "type=cacheonly"]);
        assert!(ran.stderr.contains(&format!("   2 | >>> {line}")), "{line}: {}", ran.stderr);
        for part in parts {
            assert!(ran.error().contains(part), "{line}: {}", ran.error());
        }
    }
}

#[test]
fn a_source_policy_decides_what_is_read() {
    let sandbox = Sandbox::with_base();
    let served = sandbox.path("served");
    fs::create_dir(&served).unwrap();
    fs::write(served.join("mirrored"), "mirror").unwrap();
    let server = web(&served);
    let host = server.host();
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM scratch\nADD http://{host}/original /f\n"));
    let policy = sandbox.path("policy.json");
    let run = |words: &[&str], rules: &str| {
        fs::write(&policy, format!("{{\"rules\": [{rules}]}}")).unwrap();
        let out = format!("type=local,dest={}", sandbox.arg("out"));
        sandbox
            .slipway(["build", "--progress=plain", "-o", &out])
            .args(words)
            .env("EXPERIMENTAL_BUILDKIT_SOURCE_POLICY", &policy)
            .ran()
    };
    let deny = r#"{"action": "DENY", "selector": {"identifier": "http://*"}}"#;
    let ran = run(&[context.arg()], deny);
    let denied = format!("source \"http://{host}/original\" denied by policy");
    assert!(ran.error().contains(&denied), "{}", ran.error());
    assert!(ran.stderr.contains("   2 | >>> ADD"), "{}", ran.stderr);
    assert_eq!(server.requests().len(), 0);
    let convert = format!(
        r#"{{"action": "CONVERT", "selector": {{"identifier": "http://{host}/original"}}, "updates": {{"identifier": "http://{host}/mirrored"}}}}"#
    );
    assert!(run(&[context.arg()], &convert).status.success());
    assert_eq!(fs::read_to_string(sandbox.path("out/f")).unwrap(), "mirror");

    // Images are decided about before anything is asked of a registry.
    context.dockerfile("FROM no.such.host.invalid/image\n");
    let deny = r#"{"action": "DENY", "selector": {"identifier": "docker-image://*"}}"#;
    let ran = run(&[context.arg()], deny);
    let denied = "source \"docker-image://no.such.host.invalid/image:latest\" denied by policy";
    assert!(ran.error().contains(denied), "{}", ran.error());
    let convert = format!(
        r#"{{"action": "CONVERT", "selector": {{"identifier": "docker-image://no.such.host.invalid/*"}}, "updates": {{"identifier": "docker-image://{BASE}"}}}}"#
    );
    let ran = run(&[context.arg()], &convert);
    assert!(ran.status.success(), "{}", ran.stderr);
    assert!(sandbox.path("out/bin/sh").exists());
    let ran = run(&[context.arg()], r#"{"action": "FORBID"}"#);
    assert!(ran.error().contains("failed to parse source policy"), "{}", ran.error());
}
