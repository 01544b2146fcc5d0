//! Behaviours that are most likely to be got wrong, a test each.

use super::built;

/// What a file becomes: the graph and config, or the error.
async fn of(dockerfile: &str) -> String {
    built(dockerfile, "").await
}

#[track_caller]
fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is missing in\n{text}");
    }
}

#[track_caller]
fn lacks(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(!text.contains(part), "{part:?} should not be in\n{text}");
    }
}

#[tokio::test]
async fn trap_01_comments_and_blank_lines_do_not_end_an_instruction() {
    let text = of("FROM base\nRUN a \\\n# comment\n\n  b\n").await;
    has(&text, &["\"a   b\"", "warning: Dockerfile:5: NoEmptyContinuation"]);
}

#[tokio::test]
async fn trap_02_two_escapes_at_the_end_continue_nothing() {
    has(&of("FROM base\nRUN a \\\\\nUSER x").await, &["\"a \\\\\\\\\"", "USER x"]);
    has(&of("FROM base\nRUN a \\ \t\n  b").await, &["\"a   b\""]);
}

#[tokio::test]
async fn trap_03_directives_end_at_the_first_other_line() {
    has(&of("# note\n# escape=`\nFROM base\nRUN a \\\n b").await, &["\"a  b\""]);
    has(&of(" # escape=`\nFROM base\nRUN a `\n b").await, &["\"a  b\""]);
    has(
        &of("# escape=`\n# escape=`\nFROM base").await,
        &["only one escape parser directive can be used"],
    );
}

#[tokio::test]
async fn trap_04_other_formats_name_a_frontend_too() {
    for text in ["// syntax=x/y\n", "{\"syntax\": \"x/y\"}", "#!/bin/z\n# syntax=x/y\n"] {
        has(&of(text).await, &["forwarded to x/y"]);
    }
    has(&of("#!/bin/z\n# escape=`\nFROM base\nRUN a \\\n b").await, &["\"a  b\""]);
}

#[tokio::test]
async fn trap_05_broken_json_is_a_command_line() {
    has(&of("FROM base\nRUN ['a']").await, &["\"[\\'a\\']\"".replace("\\'", "'").as_str()]);
    has(&of("FROM base\nRUN [1]").await, &["strings"]);
}

#[tokio::test]
async fn trap_06_here_documents_belong_to_few_instructions() {
    has(&of("FROM base\nLABEL a=<<EOF\n").await, &["LABEL a=<<EOF"]);
    has(&of("FROM base\nRUN [\"a\", \"<<EOF\"]\nUSER x").await, &["USER x"]);
    has(&of("FROM base\nRUN echo \"<<EOF\nUSER x").await, &["USER x"]);
}

#[tokio::test]
async fn trap_07_scripts_are_run_and_never_expanded() {
    has(&of("FROM base\nRUN <<EOF\n$FROM_BASE\nEOF").await, &["\"$FROM_BASE\\n\""]);
    has(&of("FROM base\nRUN <<EOF\n#!/x\nEOF").await, &["/dev/pipes/EOF", "mkfile /EOF 755"]);
    has(&of("FROM base\nRUN <<EOF cat\n$A\nEOF").await, &["\"<<EOF cat\\n$A\\nEOF\""]);
}

#[tokio::test]
async fn trap_08_inline_files_are_expanded_and_come_last() {
    let text = of("# escape=`\nFROM base\nCOPY <<F a /d/\n'$FROM_BASE' \\$X\nF").await;
    has(&text, &["\"'1' $X\\n\""]);
    assert!(text.find("copy /a /d/").unwrap() < text.find("copy /F /d/").unwrap(), "{text}");
}

#[tokio::test]
async fn trap_09_only_tabs_are_cut() {
    has(&of("FROM base\nCOPY <<-F /d\n\t\ta\n \tb\n\tF").await, &["\"a\\n \\tb\\n\""]);
}

#[tokio::test]
async fn trap_10_flags_lose_quotes_and_some_instructions_swallow_them() {
    has(&of("FROM base\nCOPY --chown='1' a b").await, &["owner 1:"]);
    has(&of("FROM base\nARG --x A=1\nSTOPSIGNAL --y 9\nRUN -- --z").await, &["\"--z\"", "ARG A=1"]);
}

#[tokio::test]
async fn trap_11_old_form_is_chosen_by_the_first_word() {
    has(&of("FROM base\nENV A b=c d").await, &["ENV A=b=c d"]);
    has(&of("FROM base\nENV A=b c").await, &["can't find = in \"c\""]);
}

#[tokio::test]
async fn trap_12_pairs_see_what_was_before() {
    has(&of("FROM base\nENV A=1\nENV A=2 B=$A").await, &["ENV A=2 B=1"]);
}

#[tokio::test]
async fn trap_13_a_default_hides_the_global_value() {
    has(&of("ARG X=g\nFROM base\nARG X=d\nRUN $X").await, &["|1 X=d"]);
    has(&of("ARG X=g\nFROM base\nARG X\nRUN $X").await, &["|1 X=g"]);
    has(&built("FROM base\nARG X=d\nRUN a", "build-arg:X=$FROM_BASE").await, &["|1 X=$FROM_BASE"]);
}

#[tokio::test]
async fn trap_14_an_argument_wins_until_the_next_stage() {
    let text = of("FROM base AS a\nENV X=e\nARG X=a\nLABEL l=$X\nFROM a\nLABEL m=$X\nRUN r").await;
    has(&text, &["LABEL l=a", "LABEL m=e", "|1 X=e"]);
}

#[tokio::test]
async fn trap_15_platform_arguments_must_be_declared() {
    let text = of("FROM base\nLABEL a=$TARGETARCH\nARG TARGETARCH TARGETVARIANT TARGETSTAGE\nLABEL b=$TARGETARCH").await;
    has(
        &text,
        &["LABEL a= ", "LABEL b=amd64", "TARGETVARIANT= TARGETSTAGE=default"].map(str::trim),
    );
    has(&built("FROM base\nARG TARGETOS\nRUN a", "build-arg:TARGETOS=x").await, &["|1 TARGETOS=x"]);
}

#[tokio::test]
async fn trap_16_proxies_are_no_part_of_environment_or_history() {
    let text = built("FROM base\nRUN a", "build-arg:HTTP_PROXY=U\nbuild-arg:http_proxy=L").await;
    has(&text, &["http_proxy: \"L\"", "\"RUN /bin/sh -c a # buildkit\""]);
    lacks(&text, &["=U", "|1"]);
}

#[tokio::test]
async fn trap_17_a_base_is_found_by_case_and_other_names_are_not() {
    has(&of("FROM base AS Build\nFROM Build").await, &["failed to parse stage name \"Build\""]);
    has(&of("FROM base AS Build\nFROM scratch\nCOPY --from=BUILD a b").await, &["copy /a /b"]);
    has(&of("FROM base AS B\nFROM base\nRUN --mount=from=b,target=/x y").await, &["mount 0 at /x"]);
}

#[tokio::test]
async fn trap_18_only_copy_takes_a_number() {
    has(&of("FROM base\nFROM scratch\nCOPY --from=0 a b").await, &["copy /a /b"]);
    has(&of("FROM base\nFROM base\nRUN --mount=from=0,target=/x y").await, &["library/0:latest"]);
    has(&built("FROM base", "target=0").await, &["target stage \"0\" could not be found"]);
}

#[tokio::test]
async fn trap_19_some_values_are_never_expanded() {
    has(
        &of("FROM base\nCOPY --from=$FROM_BASE a b").await,
        &["variable expansion is not supported"],
    );
    has(&of("FROM base\nCOPY --exclude=$FROM_BASE a b").await, &["exclude [\"$FROM_BASE\"]"]);
    has(&of("FROM base\nRUN --network=$A x").await, &["invalid network mode: \"$A\""]);
    has(&of("FROM base\nSHELL [\"$A\"]\nCMD $B").await, &["CMD [\\\"$A\\\" \\\"$B\\\"]"]);
}

#[tokio::test]
async fn trap_20_unused_stages_are_only_parsed() {
    let text =
        of("FROM nosuch AS a\nCOPY ${X:?no} /\nEXPOSE x\nRUN --mount=type=nope y\nFROM base").await;
    has(&text, &["result 0:0"]);
    lacks(&text, &["nosuch"]);
    has(&of("FROM base AS a\nRUNN x\nFROM base").await, &["unknown instruction: RUNN"]);
}

#[tokio::test]
async fn trap_21_a_context_replaces_a_stage_or_an_image() {
    let contexts = "context:a=docker-image://tool\ncontext:base=docker-image://nopath";
    let text = built(
        "FROM nosuch AS a\nRUN x\nFROM docker.io/library/base:latest\nCOPY --from=a b c",
        contexts,
    )
    .await;
    has(&text, &["library/tool:latest", "library/nopath:latest"]);
    lacks(&text, &["nosuch", "exec"]);
    let both = "context:base=docker-image://tool\ncontext:base::linux/amd64=docker-image://nopath";
    has(&built("FROM base", both).await, &["library/nopath:latest"]);
}

#[tokio::test]
async fn a_policy_may_make_the_image_of_a_context_something_else() {
    let dockerfile = "FROM scratch AS a\nFROM base\nCOPY --from=a /f /";
    let attrs = "context:a=docker-image://tool\nplatform=linux/amd64";
    for (becomes, source) in [
        ("local://test", "local://test"),
        ("https://x/file", "https://x/file"),
        ("https://x/y.git#main", "git://x/y.git#main"),
        ("git://x/y.git#main", "git://x/y.git#main"),
        ("docker-image://nopath", "library/tool:latest"),
    ] {
        let attrs = format!("{attrs}\ntest-policy:tool:latest={becomes}");
        has(&built(dockerfile, &attrs).await, &[source]);
    }
    let digest = slipway_spec::Digest::of(b"x");
    let layout = format!("{attrs}\ntest-policy:tool:latest=oci-layout://store/base@{digest}");
    has(&built(dockerfile, &layout).await, &["in the layout store/base"]);
    let refused =
        "ref mutated by policy to non-image: docker-image://docker.io/library/tool:latest -> ";
    for (attrs, message) in [
        (format!("{attrs}\ntest-policy:tool:latest=git://x/y"), refused),
        ("test-policy:base:latest=local://test".into(), "-> local://test"),
    ] {
        has(&built(dockerfile, &attrs).await, &[message]);
    }
}

#[tokio::test]
async fn trap_22_fetched_contexts_have_no_ignore_file() {
    // `own_ignore_file_replaces_that_of_the_context` is about the other half.
    let text = built("FROM base\nCOPY . /", "context=https://x/y.git").await;
    has(&text, &["git://x/y.git"]);
    lacks(&text, &["local://context", "excludepatterns"]);
}

#[tokio::test]
async fn trap_23_ignore_patterns_are_rooted_and_the_last_match_wins() {
    let patterns = slipway_spec::pattern::parse_ignore_file(b"a\n#b\n #c\n!a/keep\n/d/\n").unwrap();
    assert_eq!(patterns, ["a", "#c", "!a/keep", "d"]);
    let matcher = slipway_spec::pattern::PatternMatcher::new(&patterns).unwrap();
    for (path, ignored) in
        [("a", true), ("a/x", true), ("a/keep", false), ("x/a", false), ("d/e", true)]
    {
        assert_eq!(matcher.matches(path), ignored, "{path}");
    }
}

#[tokio::test]
async fn trap_24_a_folder_is_copied_by_its_content() {
    has(&of("FROM base\nCOPY d /e").await, &["copy /d /e follow contents create wildcard"]);
}

#[tokio::test]
async fn trap_25_a_copy_from_a_stage_keeps_owners() {
    lacks(&of("FROM base\nCOPY --from=base a b").await, &["owner"]);
}

#[tokio::test]
async fn trap_26_a_number_is_user_and_group_and_a_name_is_looked_up() {
    has(&of("FROM base\nCOPY --chown=5 a b").await, &["owner 5: "]);
    has(&of("FROM base\nCOPY --chown=app a b").await, &["owner app@0: "]);
    has(&of("FROM base\nCOPY --link --chown=app a b").await, &["owner app@-1: "]);
    has(&of("FROM base\nCOPY --chown=root:x a b").await, &["owner 0:x@0"]);
}

#[tokio::test]
async fn trap_27_a_mode_makes_link_an_ordinary_copy() {
    lacks(&of("FROM base\nCOPY --link --chmod=755 a b").await, &["merge", "LINK"]);
    has(&of("FROM base\nCOPY --link a b").await, &["merge [0, 1]", "LINK COPY --link a b"]);
}

#[tokio::test]
async fn trap_28_patterns_may_match_nothing() {
    has(
        &of("FROM base\nCOPY *.x lit /d/").await,
        &["copy /*.x /d/ follow contents create wildcard none-is-fine"],
    );
}

#[tokio::test]
async fn trap_29_several_sources_need_no_slash() {
    has(&of("FROM base\nCOPY a b /d").await, &["copy /a /d", "copy /b /d"]);
}

#[tokio::test]
async fn trap_30_parents_have_a_pivot_and_literals_must_exist() {
    let text = of("FROM base\nCOPY --parents a/./b c/*.d /e/").await;
    has(
        &text,
        &[
            "copy /a /e/ follow contents create wildcard none-is-fine include [\"b\"] require [\"/a/b\"]",
            "copy / /e/ follow contents create wildcard none-is-fine include [\"c/*.d\"]\n",
        ],
    );
}

#[tokio::test]
async fn trap_31_downloads_are_not_unpacked_and_may_have_no_name() {
    let text = of("FROM base\nADD a.tar https://x/b.tar /c/\nADD https://x/ /d/").await;
    has(
        &text,
        &[
            "copy /a.tar /c/ follow contents unpack",
            "copy /b.tar /c/ create\n",
            "http.filename=__unnamed__",
        ],
    );
}

#[tokio::test]
async fn trap_32_repositories_end_in_git() {
    let text = of("FROM base\nADD https://x/y.git /a\nADD https://x/z /b\nADD github.com/x/y /c\nADD https://x/w.git?mtime=commit /d").await;
    has(&text, &["git://x/y.git", "https://x/z\n", "copy /github.com/x/y /c"]);
    lacks(&text, &["git.mtime"]);
    has(&built("FROM base\nCOPY a b", "context=github.com/x/y").await, &["git://github.com/x/y"]);
}

#[tokio::test]
async fn trap_33_workdir_makes_a_folder_of_the_user() {
    let text = of("FROM base\nUSER u\nWORKDIR w\nWORKDIR /").await;
    has(&text, &["mkdir /base/w 755 owner u@0", "\"WORKDIR /base/w\"", "\"WORKDIR /\""]);
    lacks(&text, &["mkdir / "]);
}

#[tokio::test]
async fn trap_34_entrypoint_drops_an_inherited_command() {
    let text = of("FROM base\nENTRYPOINT [\"e\"]").await;
    lacks(&text, &["\"Cmd\""]);
    let text = of("FROM base\nCMD [\"c\"]\nENTRYPOINT []").await;
    has(&text, &["\"Cmd\"", "\"ArgsEscaped\": true"]);
    lacks(&text, &["\"Entrypoint\""]);
}

#[tokio::test]
async fn trap_35_ports_are_sorted_then_expanded_then_split() {
    let text = of("FROM base\nENV P=\"80 70\"\nEXPOSE 90 $P 127.0.0.1:1:2/UDP").await;
    has(&text, &["EXPOSE [", "70/tcp", "80/tcp", "90/tcp", "2/udp"]);
    lacks(&text, &["127.0.0.1\"", "\"1/udp"]);
}

#[tokio::test]
async fn trap_36_history_is_written_as_go_writes_it() {
    let text = of(
        "FROM base\nCMD [\"a\", \"b\"]\nVOLUME /a /b\nONBUILD RUN x\nCOPY --link --from=base a b",
    )
    .await;
    has(&text, &["CMD [\\\"a\\\" \\\"b\\\"]", "VOLUME [/a /b]", "\"COPY a b # buildkit\""]);
    lacks(&text, &["\"created_by\": \"ONBUILD", "\"created_by\": \"FROM"]);
}

#[tokio::test]
async fn trap_37_a_base_gets_a_path_and_loses_its_time() {
    let text = of("FROM nopath").await;
    has(&text, &["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
    lacks(&text, &["\n  \"created\"", "\n  \"unknown\""]);
    lacks(&of("FROM onbuild").await, &["\"OnBuild\""]);
}

#[tokio::test]
async fn trap_38_triggers_run_once_and_before() {
    let text =
        of("FROM base AS a\nONBUILD RUN first\nFROM a AS b\nRUN second\nFROM b\nRUN third").await;
    assert_eq!(text.matches("ONBUILD RUN first").count(), 1, "{text}");
    assert!(text.find("first").unwrap() < text.find("second").unwrap());
    has(&of("FROM onbuild").await, &["asked for docker.io/library/tool:latest"]);
}

#[tokio::test]
async fn trap_39_mounts_are_read_from_left_to_right() {
    has(
        &of("FROM base\nRUN --mount=size=1,type=tmpfs,target=/x y").await,
        &["unexpected key 'size'"],
    );
    has(&of("FROM base\nRUN --mount=type=cache y").await, &["at /base -> -1 Cache /. Shared"]);
    has(
        &of("FROM base\nRUN --mount=type=cache,target=c/../d y").await,
        &["at /base/d -> -1 Cache /d Shared"],
    );
    has(&of("FROM base\nRUN --mount=target=/x,rw y").await, &["mount 1 at /x -> -1 Bind"]);
    let text = of("FROM base\nRUN --mount=type=secret,id=s,env=E y").await;
    has(&text, &["secret s as E optional"]);
    lacks(&text, &["/run/secrets"]);
}

#[tokio::test]
async fn trap_40_each_platform_is_converted_by_itself() {
    let text = built(
        "FROM base\nARG TARGETARCH\nRUN $TARGETARCH\nFROM scratch\nCOPY --from=0 a b",
        "platform=linux/amd64,linux/arm64/v8",
    )
    .await;
    has(&text, &["== linux/amd64 of an index", "== linux/arm64 of an index", "TARGETARCH=arm64"]);
    // `scratch_ignores_platform_and_children_inherit_it` is about the rest.
}
