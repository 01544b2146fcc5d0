//! Whole Dockerfiles, from their bytes to the graph and config, compared with what `testdata` says.
//!
//! Each folder of `testdata` has a `Dockerfile`, the outcome in `expected.txt`, and perhaps `attrs` (one `key=value` a
//! line). Its other files are the build context. The digests of vertices and the configs were compared with those that
//! BuildKit's own frontend (commit 73ed682) makes of the same files; only the context lacks what a client adds to it. `UPDATE_GOLDEN=1` writes the outcomes anew, to be read in the diff.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

#[path = "golden/memory.rs"]
mod memory;
#[path = "golden/traps.rs"]
mod traps;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use slipway_frontend::dockerfile;
use slipway_spec::llb::{Definition, pb};

use memory::{Memory, request};

async fn run(files: BTreeMap<String, Bytes>, attrs: &str) -> String {
    let bridge = Memory::new(files, attrs);
    let outcome = dockerfile::build(&request(attrs), &bridge).await;
    let mut text = String::new();
    for warning in bridge.warnings.lock().unwrap().iter() {
        writeln!(text, "warning: {warning}").unwrap();
    }
    for line in bridge.resolved.lock().unwrap().iter() {
        writeln!(text, "asked for {line}").unwrap();
    }
    match outcome {
        Err(error) => text.push_str(&error.render()),
        Ok(result) => {
            for image in bridge.forwarded.lock().unwrap().iter() {
                let inputs: Vec<_> = image.inputs.keys().collect();
                writeln!(text, "forwarded to {} with {inputs:?}\n{:#?}", image.source, image.attrs)
                    .unwrap();
            }
            for import in &result.cache_imports {
                writeln!(text, "imports {} {:?}", import.kind, import.attrs).unwrap();
            }
            for image in result.images {
                let kind = if result.multi_platform { " of an index" } else { "" };
                writeln!(text, "\n== {}{kind}", image.platform).unwrap();
                match &image.definition {
                    Some(definition) => describe(definition, &mut text),
                    None => text.push_str("empty\n"),
                }
                writeln!(
                    text,
                    "-- config, {} entries of history from the base",
                    image.base_history_len
                )
                .unwrap();
                writeln!(text, "{}", serde_json::to_string_pretty(&image.config).unwrap()).unwrap();
                if let Some(epoch) = image.epoch {
                    writeln!(text, "-- dated {epoch}").unwrap();
                }
                for said in &image.attestations {
                    writeln!(
                        text,
                        "-- {:?} of {} at {:?}, about {:?}",
                        said.kind, said.predicate_type, said.path, said.subjects
                    )
                    .unwrap();
                    for (key, value) in &said.metadata {
                        writeln!(text, "   {key}={}", String::from_utf8_lossy(value)).unwrap();
                    }
                    match &said.from {
                        Some(definition) => describe(definition, &mut text),
                        None => text.push_str("empty\n"),
                    }
                }
            }
        }
    }
    text
}

/// Writes a graph for people: vertices by number, as compact as the meaning allows.
fn describe(definition: &Definition, text: &mut String) {
    let checked = Definition::from_pb(definition.to_pb()).unwrap();
    let vertices = checked.vertices().unwrap();
    let number =
        |digest: &str| vertices.iter().position(|(known, _)| known.to_string() == digest).unwrap();
    for (position, (digest, op)) in vertices.iter().enumerate() {
        let metadata = &definition.metadata[digest];
        let name = metadata.description.get("llb.customname").map_or("", String::as_str);
        let cache = if metadata.ignore_cache { " (no cache)" } else { "" };
        writeln!(text, "{position} {}: {name}{cache}", digest.short()).unwrap();
        let locations =
            definition.source.as_ref().and_then(|source| source.locations.get(&digest.to_string()));
        for location in locations.iter().flat_map(|locations| &locations.locations) {
            let lines: Vec<_> = location
                .ranges
                .iter()
                .map(|r| r.start.as_ref().unwrap().line.to_string())
                .collect();
            writeln!(text, "   lines {}", lines.join(" ")).unwrap();
        }
        if let Some(p) = &op.platform {
            let variant =
                if p.variant.is_empty() { String::new() } else { format!("/{}", p.variant) };
            writeln!(text, "   platform {}/{}{variant}", p.os, p.architecture).unwrap();
        }
        let inputs: Vec<_> =
            op.inputs.iter().map(|input| number(&input.digest).to_string()).collect();
        if !inputs.is_empty() {
            writeln!(text, "   inputs {}", inputs.join(" ")).unwrap();
        }
        match op.op.as_ref().unwrap() {
            pb::op::Op::Source(source) => {
                writeln!(text, "   {}", source.identifier).unwrap();
                for (key, value) in &source.attrs {
                    writeln!(text, "     {key}={value}").unwrap();
                }
            }
            pb::op::Op::Exec(exec) => {
                let meta = exec.meta.as_ref().unwrap();
                writeln!(text, "   exec {:?}\n     in {} as {:?}", meta.args, meta.cwd, meta.user)
                    .unwrap();
                writeln!(text, "     env {:?}", meta.env).unwrap();
                if exec.security != 0 {
                    writeln!(text, "     security {:?}", exec.security()).unwrap();
                }
                for secret in &exec.secretenv {
                    let optional = if secret.optional { " optional" } else { "" };
                    writeln!(text, "     secret {} as {}{optional}", secret.id, secret.name)
                        .unwrap();
                }
                for device in &exec.cdi_devices {
                    let optional = if device.optional { " optional" } else { "" };
                    writeln!(text, "     device {}{optional}", device.name).unwrap();
                }
                for host in &meta.extra_hosts {
                    writeln!(text, "     host {}={}", host.host, host.ip).unwrap();
                }
                for limit in &meta.ulimit {
                    writeln!(text, "     ulimit {}={}:{}", limit.name, limit.soft, limit.hard)
                        .unwrap();
                }
                for (what, value) in [("hostname", &meta.hostname), ("cgroup", &meta.cgroup_parent)]
                {
                    if !value.is_empty() {
                        writeln!(text, "     {what} {value}").unwrap();
                    }
                }
                if let Some(resources) = &metadata.linux_resources {
                    writeln!(text, "     {resources:?}").unwrap();
                }
                if exec.network != 0 {
                    writeln!(text, "     network {:?}", exec.network()).unwrap();
                }
                if let Some(proxy) = &meta.proxy_env {
                    writeln!(text, "     {proxy:?}").unwrap();
                }
                for mount in &exec.mounts {
                    let readonly = if mount.readonly { " readonly" } else { "" };
                    let kind = mount.mount_type();
                    writeln!(
                        text,
                        "     mount {} at {} -> {}{readonly} {kind:?}{}",
                        mount.input,
                        mount.dest,
                        mount.output,
                        mount_options(mount)
                    )
                    .unwrap();
                }
            }
            pb::op::Op::File(file) => {
                for action in &file.actions {
                    let indexes =
                        format!("({},{})->{}", action.input, action.secondary_input, action.output);
                    writeln!(
                        text,
                        "   {indexes} {}",
                        describe_action(action.action.as_ref().unwrap())
                    )
                    .unwrap();
                }
            }
            pb::op::Op::Merge(merge) => {
                let inputs: Vec<_> = merge.inputs.iter().map(|input| input.input).collect();
                writeln!(text, "   merge {inputs:?}").unwrap();
            }
            other => writeln!(text, "   {other:?}").unwrap(),
        }
        if let Some(group) = &metadata.progress_group {
            let weak = if group.weak { " weakly" } else { "" };
            writeln!(text, "   shown{weak} with {}", group.name).unwrap();
        }
    }
    let (head, index) = definition.head().unwrap();
    writeln!(text, "result {}:{index}", number(&head.to_string())).unwrap();
}

fn mount_options(mount: &pb::Mount) -> String {
    let mut text = String::new();
    if !mount.selector.is_empty() {
        text.push_str(&format!(" of {}", mount.selector));
    }
    if let Some(cache) = &mount.cache_opt {
        text.push_str(&format!(" {} {:?}", cache.id, cache.sharing()));
    }
    if let Some(tmpfs) = &mount.tmpfs_opt
        && tmpfs.size > 0
    {
        text.push_str(&format!(" {} bytes", tmpfs.size));
    }
    let secret = mount.secret_opt.as_ref().map(|s| (&s.id, s.uid, s.gid, s.mode, s.optional));
    let ssh = mount.ssh_opt.as_ref().map(|s| (&s.id, s.uid, s.gid, s.mode, s.optional));
    if let Some((id, uid, gid, mode, optional)) = secret.or(ssh) {
        let optional = if optional { " optional" } else { "" };
        text.push_str(&format!(" {id} {uid}:{gid} {mode:o}{optional}"));
    }
    text
}

fn describe_action(action: &pb::file_action::Action) -> String {
    let who = |user: &Option<pb::UserOpt>| match user.as_ref().and_then(|user| user.user.as_ref()) {
        None => String::new(),
        Some(pb::user_opt::User::ById(id)) => id.to_string(),
        Some(pb::user_opt::User::ByName(name)) => format!("{}@{}", name.name, name.input),
    };
    let owner = |owner: &Option<pb::ChownOpt>| {
        owner
            .as_ref()
            .map(|owner| format!(" owner {}:{}", who(&owner.user), who(&owner.group)))
            .unwrap_or_default()
    };
    match action {
        pb::file_action::Action::Copy(copy) => {
            let mut text = format!("copy {} {}{}", copy.src, copy.dest, owner(&copy.owner));
            if copy.mode != -1 {
                text.push_str(&format!(" mode {:o}{}", copy.mode, copy.mode_str));
            }
            for (on, word) in [
                (copy.follow_symlink, " follow"),
                (copy.dir_copy_contents, " contents"),
                (copy.attempt_unpack_docker_compatibility, " unpack"),
                (copy.create_dest_path, " create"),
                (copy.allow_wildcard, " wildcard"),
                (copy.allow_empty_wildcard, " none-is-fine"),
            ] {
                if on {
                    text.push_str(word);
                }
            }
            if !copy.exclude_patterns.is_empty() {
                text.push_str(&format!(" exclude {:?}", copy.exclude_patterns));
            }
            if !copy.include_patterns.is_empty() {
                text.push_str(&format!(" include {:?}", copy.include_patterns));
            }
            if !copy.required_paths.is_empty() {
                text.push_str(&format!(" require {:?}", copy.required_paths));
            }
            text
        }
        pb::file_action::Action::Mkfile(file) => {
            format!(
                "mkfile {} {:o}{} {:?}",
                file.path,
                file.mode,
                owner(&file.owner),
                String::from_utf8_lossy(&file.data)
            )
        }
        pb::file_action::Action::Mkdir(dir) => {
            let time =
                if dir.timestamp == -1 { String::new() } else { format!(" at {}", dir.timestamp) };
            format!(
                "mkdir {} {:o}{}{time}{}",
                dir.path,
                dir.mode,
                owner(&dir.owner),
                if dir.make_parents { " -p" } else { "" }
            )
        }
        other => format!("{other:?}"),
    }
}

fn testdata() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata")
}

fn read_case(dir: &Path) -> BTreeMap<String, Bytes> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name != "expected.txt" && name != "attrs" {
            files.insert(name, std::fs::read(entry.path()).unwrap().into());
        }
    }
    files
}

#[tokio::test]
async fn testdata_is_as_expected() {
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut cases: Vec<_> =
        std::fs::read_dir(testdata()).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    assert!(cases.len() >= 10, "testdata is missing");
    let mut different = vec![];
    for case in cases {
        let attrs = std::fs::read_to_string(case.join("attrs")).unwrap_or_default();
        let text = run(read_case(&case), &attrs).await;
        let expected = case.join("expected.txt");
        if update {
            std::fs::write(&expected, &text).unwrap();
        } else if std::fs::read_to_string(&expected).unwrap_or_default() != text {
            println!("==== {}\n{text}", case.display());
            different.push(case);
        }
    }
    assert!(different.is_empty(), "{different:?} differ; look at the text above");
}

async fn built(dockerfile: &str, attrs: &str) -> String {
    run(BTreeMap::from([("Dockerfile".to_owned(), Bytes::from(dockerfile.to_owned()))]), attrs)
        .await
}

#[tokio::test]
async fn mistakes_are_told_with_their_place() {
    for (dockerfile, attrs, line, message) in [
        ("RUN x", "", 1, "no build stage in current context"),
        ("ARG A=${B:?must}\nFROM scratch", "", 1, "failed to process \"${B:?must}\": B: must"),
        ("FROM $NONE", "", 1, "base name ($NONE) should not be blank"),
        ("FROM --platform=$X scratch", "", 1, "empty platform value from expression $X"),
        (
            "FROM --platform=$BUILDPLATFROM scratch",
            "",
            1,
            "empty platform value from expression $BUILDPLATFROM (did you mean BUILDPLATFORM?)",
        ),
        (
            "FROM --platform=a/b/c/d scratch",
            "",
            1,
            "failed to parse platform a/b/c/d: invalid platform \"a/b/c/d\": expected os/architecture[/variant]",
        ),
        ("FROM Bad//Name", "", 1, "failed to parse stage name \"Bad//Name\""),
        (
            "FROM alpin",
            "",
            1,
            "alpin (did you mean alpine?): docker.io/library/alpin:latest: not found",
        ),
        (
            "FROM scratch AS build\nFROM biuld",
            "",
            2,
            "biuld (did you mean build?): docker.io/library/biuld:latest: not found",
        ),
        ("FROM scratch\nCOPY --from=3 a b", "", 2, "invalid stage index 3"),
        (
            "FROM scratch\nCOPY --from=$x a b",
            "",
            2,
            "variable expansion is not supported for --from",
        ),
        (
            "FROM scratch AS a\nCOPY --from=b x y\nFROM a AS b\nCOPY --from=a x y",
            "",
            4,
            "circular dependency detected on stage: a",
        ),
        ("FROM scratch AS a\nCOPY --from=a x y", "", 2, "circular dependency detected on stage: a"),
        (
            "FROM scratch AS a\nCOPY --from=b x y\nFROM scratch AS b\nFROM a",
            "",
            2,
            "cannot copy from stage \"b\", it needs to be defined before current stage \"a\"",
        ),
        (
            "FROM base\nRUN --mount=type=cach,target=/x y",
            "",
            2,
            "unsupported mount type \"cach\" (did you mean cache?)",
        ),
        ("FROM base\nRUN --mount=target=/ y", "", 2, "invalid mount target \"/\""),
        (
            "FROM base\nRUN --mount=from=$x y",
            "",
            2,
            "dockerfile parse error on line 2: 'from' doesn't support variable expansion, define alias stage instead",
        ),
        ("FROM base\nRUN --mount=type=ssh,source=x y", "", 2, "ssh does not support source"),
        (
            "FROM base AS a\nRUN --mount=from=b,target=/x y\nFROM base AS b\nFROM a",
            "",
            2,
            "cannot mount from stage \"b\" to \"/x\", stage needs to be defined before current command",
        ),
        (
            "FROM base\nRUN --mount=from=nosuch,target=/x y",
            "",
            2,
            "docker.io/library/nosuch:latest: not found",
        ),
        ("FROM base\nRUN []", "", 2, "RUN requires at least one argument"),
        (
            "FROM base\nRUN --device=a,name=b y",
            "",
            2,
            "dockerfile parse error on line 2: device name already set to a",
        ),
        (
            "FROM base\nADD --checksum=sha256:x a b",
            "",
            2,
            "checksum requires HTTP(S) or Git sources",
        ),
        (
            "FROM base\nADD --checksum=sha256:x https://x/a https://x/b /c/",
            "",
            2,
            "checksum can't be specified for multiple sources",
        ),
        (
            "FROM base\nADD --checksum=sha256:x https://x/a /",
            "",
            2,
            "invalid checksum \"sha256:x\": the digits are wrong",
        ),
        ("FROM base\nADD https://x/y.git?ref=a#b /", "", 2, "ref conflicts"),
        (
            "FROM base\nADD --keep-git-dir=false https://x/y.git?keep-git-dir=1 /",
            "",
            2,
            "inconsistent keep-git-dir configuration",
        ),
        (
            "FROM base\nADD --checksum=a https://x/y.git?checksum=b /",
            "",
            2,
            "checksum mismatch \"a\" != \"b\"",
        ),
        ("FROM base AS a-\nRUN x", "", 1, "invalid context name a-"),
        ("FROM base AS a", "context:a=ssh://x/y", 1, "unsupported context source ssh for a"),
        ("FROM base AS a", "context:a=nocolon", 1, "invalid context specifier nocolon for a"),
        (
            "FROM base AS a",
            "context:a=oci-layout://x",
            1,
            "oci-layout reference \"x\" has no digest",
        ),
        ("FROM base AS a", "context:a=input:x", 1, "invalid input x for a"),
        (
            "FROM scratch AS a\nRUN x\nFROM base",
            "build-arg:SOURCE_DATE_EPOCH=a",
            1,
            "SOURCE_DATE_EPOCH stage does not meet source-only requirements: unsupported RUN instruction",
        ),
        (
            "FROM scratch",
            "attest:sbom=",
            0,
            "cannot scan with generator=docker.io/docker/buildkit-syft-scanner:stable-1: docker.io/docker/buildkit-syft-scanner:stable-1: not found",
        ),
        (
            "FROM scratch",
            "attest:sbom=generator=nocommand",
            0,
            "scanner docker.io/library/nocommand:latest does not have cmd",
        ),
        (
            "FROM scratch",
            "attest:sbom=\ntest-no-sbom=1",
            0,
            "a bill of materials, made by generator=docker.io/docker/buildkit-syft-scanner:stable-1, here is not supported yet",
        ),
        ("FROM scratch", "frontend.caps=x+forward", 0, "unsupported frontend capability x"),
        (
            "FROM scratch",
            "context=https://x/y.git?nope=1",
            0,
            "the build context https://x/y.git?nope=1 cannot be read: unexpected query \"nope\"",
        ),
        ("FROM base\nCOPY https://x/y b", "", 2, "source can't be a URL for COPY"),
        ("FROM base\nCOPY git@x:y b", "", 2, "source can't be a git ref for COPY"),
        (
            "FROM base\nCOPY --chmod=9 a b",
            "",
            2,
            "invalid chmod parameter: '9'. it should be octal string and between 0 and 07777",
        ),
        ("FROM base\nSTOPSIGNAL nope", "", 2, "invalid signal: nope"),
        ("FROM base\nEXPOSE x", "", 2, "invalid containerPort: x"),
        ("FROM base\nVOLUME $NONE", "", 2, "VOLUME specified can not be an empty string"),
        ("FROM base\nWORKDIR ${X:?y}", "", 2, "failed to process \"${X:?y}\": X: y"),
        (
            "FROM badtrigger",
            "",
            1,
            "ONBUILD trigger \"RUNN x\" of image badtrigger: dockerfile parse error on line 1: unknown instruction: RUNN (did you mean RUN?)",
        ),
        ("FROM base\nRUN <<EOF\n", "", 2, "unterminated heredoc"),
        (
            "FROM scratch AS build",
            "target=biuld",
            0,
            "target stage \"biuld\" could not be found (did you mean build?)",
        ),
        ("ARG X", "", 0, "dockerfile contains no stages to build"),
        ("", "", 0, "the Dockerfile cannot be empty"),
        ("FROM scratch", "build-arg:SOURCE_DATE_EPOCH=soon", 0, "invalid SOURCE_DATE_EPOCH: soon"),
    ] {
        let files = BTreeMap::from([("Dockerfile".to_owned(), Bytes::from(dockerfile.to_owned()))]);
        let bridge = Memory::new(files, attrs);
        let error = dockerfile::build(&request(attrs), &bridge).await.unwrap_err();
        let found = &error.diagnostics[0];
        assert!(found.message.starts_with(message), "{dockerfile:?}: {}", found.message);
        assert_eq!(found.spans.first().map_or(0, |span| span.lines.first), line, "{dockerfile:?}");
    }
}

#[tokio::test]
async fn all_mistakes_of_a_file_are_told_at_once() {
    let text = Bytes::from("FROM scratch\nRUNN x\nUSER\n");
    let bridge = Memory::new(BTreeMap::from([("Dockerfile".to_owned(), text)]), "");
    let error = dockerfile::build(&request(""), &bridge).await.unwrap_err();
    let lines: Vec<_> = error.diagnostics.iter().map(|found| found.spans[0].lines.first).collect();
    assert_eq!(lines, [2, 3]);
}

#[tokio::test]
async fn missing_dockerfile_says_which() {
    let text = run(BTreeMap::new(), "filename=sub/Dockerfile").await;
    assert!(text.contains("failed to read dockerfile: sub/Dockerfile: no such file"), "{text}");
}

#[tokio::test]
async fn lower_case_name_is_found_too() {
    let text =
        run(BTreeMap::from([("dockerfile".to_owned(), Bytes::from("FROM scratch"))]), "").await;
    assert!(text.contains("== linux/amd64\nempty"), "{text}");
}

#[tokio::test]
async fn unused_stages_are_only_parsed() {
    let dockerfile = "FROM missing AS a\nCOPY ${X:?bad} /\nRUN --mount=type=cache,target=/x y\nEXPOSE nope\nFROM scratch";
    let text = built(dockerfile, "").await;
    assert!(text.contains("empty") && !text.contains("asked for"), "{text}");
}

#[tokio::test]
async fn stage_reference_in_from_is_case_sensitive_and_in_copy_is_not() {
    let text = built("FROM scratch AS Build\nFROM Build", "").await;
    assert!(text.contains("failed to parse stage name \"Build\""), "{text}");
    let text = built("FROM base AS Build\nFROM scratch\nCOPY --from=BUILD /a /b", "").await;
    assert!(text.contains("copy /a /b"), "{text}");
    let text = built("FROM base AS Build\nFROM scratch", "target=BUILD").await;
    assert!(text.contains("docker-image://docker.io/library/base"), "{text}");
}

#[tokio::test]
async fn own_ignore_file_replaces_that_of_the_context() {
    let files = |own: bool| {
        let mut files = BTreeMap::from([
            ("Dockerfile".to_owned(), Bytes::from("FROM scratch\nCOPY . /\n")),
            (".dockerignore".to_owned(), Bytes::from("a\n!b\n")),
        ]);
        if own {
            files.insert("Dockerfile.dockerignore".into(), Bytes::from("# none\n"));
        }
        files
    };
    let text = run(files(false), "").await;
    assert!(text.contains("local.excludepatterns=[\"a\",\"!b\"]"), "{text}");
    let text = run(files(true), "").await;
    assert!(!text.contains("excludepatterns"), "{text}");
}

#[tokio::test]
async fn bad_ignore_file_is_refused() {
    for bad in ["!", "[a"] {
        let files = BTreeMap::from([
            ("Dockerfile".to_owned(), Bytes::from("FROM scratch\n")),
            (".dockerignore".to_owned(), Bytes::from(bad)),
        ]);
        let text = run(files, "").await;
        assert!(text.contains("failed parsing .dockerignore: "), "{text}");
    }
}

#[tokio::test]
async fn scratch_ignores_platform_and_children_inherit_it() {
    let text =
        built("FROM --platform=linux/arm64 base AS a\nFROM --platform=linux/s390x a\nRUN x", "")
            .await;
    assert_eq!(text.matches("   platform linux/arm64\n").count(), 2, "{text}");
    let text = built("FROM --platform=linux/arm64 scratch\nRUN [\"x\"]", "").await;
    assert!(text.contains("   platform linux/amd64\n"), "{text}");
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(400))]

    /// Whatever stands in the file, the answer is a graph that loads or a place inside the file.
    #[test]
    fn any_file_is_built_or_refused(lines in proptest::collection::vec(line(), 0..12)) {
        let text = lines.concat();
        let files = BTreeMap::from([("Dockerfile".to_owned(), Bytes::from(text.clone()))]);
        let bridge = Memory::new(files, "");
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let count = u32::try_from(text.lines().count()).unwrap();
        match runtime.block_on(dockerfile::build(&request("platform=linux/amd64,linux/arm64"), &bridge)) {
            Ok(result) => {
                for definition in result.images.into_iter().filter_map(|image| image.definition) {
                    Definition::from_pb(definition.to_pb()).unwrap();
                }
            }
            Err(error) => {
                proptest::prop_assert!(!error.diagnostics.is_empty());
                proptest::prop_assert!(!error.render().is_empty());
                for span in error.diagnostics.iter().flat_map(|found| &found.spans) {
                    proptest::prop_assert!(span.lines.first >= 1 && span.lines.last <= count);
                }
            }
        }
    }
}

/// A line as people write them, right or wrong.
fn line() -> impl proptest::strategy::Strategy<Value = String> {
    use proptest::strategy::Strategy as _;
    let keywords = [
        "FROM base",
        "FROM scratch AS a",
        "FROM a",
        "FROM onbuild",
        "ARG",
        "ENV",
        "LABEL",
        "RUN",
        "COPY",
        "ADD",
        "COPY --from=a",
        "COPY --from=0",
        "COPY --from=tool",
        "COPY --link",
        "COPY --parents",
        "ADD https://x/y.git",
        "RUN --mount=type=cache,target=/x",
        "RUN --mount=",
        "WORKDIR",
        "USER",
        "EXPOSE",
        "VOLUME",
        "CMD",
        "ENTRYPOINT",
        "STOPSIGNAL",
        "HEALTHCHECK CMD",
        "SHELL",
        "ONBUILD RUN",
        "ONBUILD COPY --from=a",
        "MAINTAINER",
        "# escape=",
        "#",
        "",
        "RUNN",
    ];
    let rest = "( |[a-z$=/{}:+'\"\\\\*?.<-]|[0-9]|<<EOF|\\\\\n|\n|EOF\n|\\[\"a\"\\]|\\$\\{A[:/%#-]|--chown=|--chmod=){0,12}\n";
    (proptest::sample::select(keywords.to_vec()), rest)
        .prop_map(|(keyword, rest)| format!("{keyword} {rest}"))
}
