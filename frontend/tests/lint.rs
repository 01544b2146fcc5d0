//! The rules of the linter, and the answers to questions about Dockerfiles.
//!
//! What the rules find in the table below, and the answers in the folders of `requests`, is what BuildKit's own frontend
//! (commit 73ed682) says of the same files; only the graph that a source was read from is left out.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;
use slipway_frontend::dockerfile::{self, LintResults};
use slipway_frontend::{
    Bridge, BridgeError, BridgeErrorKind, BridgeRef, Diagnostic, FrontendError, FrontendRequest,
    FrontendResult, ResolveMode, ResolvedImage, Severity, Span,
};
use slipway_spec::llb::Definition;
use slipway_spec::{Digest, ImageReference, Platform};

/// Files and images in memory.
#[derive(Default)]
struct Memory {
    files: BTreeMap<String, String>,
    warnings: Mutex<Vec<Diagnostic>>,
}

#[async_trait]
impl Bridge for Memory {
    async fn resolve_image(
        &self,
        image: &ImageReference,
        platform: &Platform,
        _mode: ResolveMode,
    ) -> Result<ResolvedImage, BridgeError> {
        let architecture = match image.path() {
            "library/base" => platform.architecture.as_str(),
            "library/otherarch" => "riscv64",
            _ => {
                return Err(BridgeError::new(
                    BridgeErrorKind::NotFound,
                    format!("{image}: not found"),
                ));
            }
        };
        let config = serde_json::json!({
            "architecture": architecture, "os": platform.os,
            "rootfs": {"type": "layers", "diff_ids": [Digest::of(b"layer")]},
            "config": {"Env": ["PATH=/bin", "FROM_BASE=1"]},
        });
        Ok(ResolvedImage {
            reference: None,
            digest: Digest::of(image.path().as_bytes()),
            config: config.to_string().into(),
        })
    }

    async fn solve(&self, definition: Definition) -> Result<BridgeRef, BridgeError> {
        definition.vertices().unwrap();
        Ok(BridgeRef(0))
    }

    async fn read_file(&self, _from: &BridgeRef, path: &str) -> Result<Option<Bytes>, BridgeError> {
        Ok(self.files.get(path).map(|text| text.clone().into()))
    }

    fn warn(&self, warning: Diagnostic) {
        self.warnings.lock().unwrap().push(warning);
    }
}

fn memory(dockerfile: &str, ignore: &str) -> Memory {
    let mut files = BTreeMap::from([("Dockerfile".to_owned(), dockerfile.to_owned())]);
    if !ignore.is_empty() {
        files.insert(".dockerignore".into(), ignore.into());
    }
    Memory { files, ..Memory::default() }
}

/// Builds with attributes, one `key=value` a line.
async fn build(bridge: &Memory, attrs: &str) -> Result<FrontendResult, FrontendError> {
    let attrs = attrs.lines().filter_map(|line| line.split_once('='));
    let attrs = attrs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let build_platform = Platform::new("linux", "amd64", None);
    dockerfile::build(&FrontendRequest { attrs, build_platform }, bridge).await
}

/// Returns a text of the answer to a request.
async fn ask(
    bridge: &Memory,
    attrs: &str,
    id: &str,
) -> Result<BTreeMap<String, String>, FrontendError> {
    let result = build(bridge, &format!("requestid={id}\n{attrs}")).await?;
    assert!(result.images.is_empty());
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ok(result.metadata.into_iter().map(|(key, value)| (key, text(value))).collect())
}

async fn lint(dockerfile: &str, ignore: &str, attrs: &str) -> LintResults {
    let answer = ask(&memory(dockerfile, ignore), attrs, "frontend.lint").await.unwrap();
    let results: LintResults = serde_json::from_str(&answer["result.json"]).unwrap();
    let clean = results.warnings.is_empty() && results.build_error.is_none();
    assert_eq!(answer["result.statuscode"], if clean { "0" } else { "1" });
    results
}

struct Case {
    rule: &'static str,
    ignore: &'static str,
    attrs: &'static str,
    /// Breaks the rule.
    fires: &'static str,
    /// First line, last line, and what is said.
    finds: &'static [(i32, i32, &'static str)],
    /// Comes close, and does not break it.
    quiet: &'static str,
}

#[tokio::test]
async fn every_rule_finds_what_it_should_and_no_more() {
    for Case { rule, ignore, attrs, fires, finds, quiet } in CASES {
        let results = lint(fires, ignore, attrs).await;
        assert_eq!(results.build_error, None, "{rule}");
        let mine = results.warnings.iter().filter(|warning| warning.rule_name == *rule);
        let found: Vec<_> = mine
            .map(|warning| {
                let ranges = &warning.location.ranges;
                let lines = (ranges[0].start.line, ranges[ranges.len() - 1].end.line);
                assert!(warning.url.is_empty() == (*rule == "InvalidBaseImagePlatform"));
                (lines.0, lines.1, warning.detail.as_str())
            })
            .collect();
        assert_eq!(found, *finds, "{rule}");

        let results = lint(quiet, ignore, attrs).await;
        assert_eq!(results.build_error, None, "{rule}");
        let wrong = results.warnings.iter().find(|warning| warning.rule_name == *rule);
        assert_eq!(wrong, None, "{rule}");

        // A rule that is skipped is silent; the experimental one is skipped unless asked for.
        let skip = format!("build-arg:BUILDKIT_DOCKERFILE_CHECK=skip={rule}\n{attrs}");
        let skipped = lint(fires, ignore, &skip).await;
        assert!(skipped.warnings.iter().all(|warning| warning.rule_name != *rule), "{rule}");
    }
    assert_eq!(CASES.len(), 22);
}

#[tokio::test]
async fn answers_are_those_of_buildkit() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/requests");
    let mut compared = 0;
    for folder in fs::read_dir(root).unwrap() {
        let folder = folder.unwrap().path();
        let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
        let bridge =
            memory(&read("Dockerfile").unwrap(), &read(".dockerignore").unwrap_or_default());
        for id in ["lint", "outline", "targets"] {
            // BuildKit's list of targets fails for a file with a comment that is for the linter.
            let Some(expected) = read(&format!("{id}.txt")) else { continue };
            let json_name = format!("{id}.json");
            let shown = format!("{} {id}", folder.display());
            let (attrs, id) = (read("attrs").unwrap_or_default(), format!("frontend.{id}"));
            let answer = match ask(&bridge, &attrs, &id).await {
                Ok(answer) => answer,
                Err(error) => {
                    assert_eq!(
                        format!("error: {}\n", error.diagnostics[0].message),
                        expected,
                        "{shown}"
                    );
                    compared += 1;
                    continue;
                }
            };
            assert_eq!(answer["result.txt"], expected, "{shown}");
            assert_eq!(answer["version"], "1.0.0");
            let mut json = answer["result.json"].clone();
            if id == "frontend.lint" {
                json = without_definitions(&json);
            }
            assert_eq!(format!("{json}\n"), read(&json_name).unwrap(), "{shown}");
            compared += 1;
        }
    }
    assert_eq!(compared, 29);
}

fn without_definitions(json: &str) -> String {
    let mut value: serde_json::Value = serde_json::from_str(json).unwrap();
    for source in value["sources"].as_array_mut().unwrap() {
        let definition = source.as_object_mut().unwrap().shift_remove("definition").unwrap();
        assert!(definition["def"].as_array().unwrap().len() >= 2);
    }
    let text = serde_json::to_string_pretty(&value).unwrap();
    text.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
}

#[tokio::test]
async fn requests_are_described_and_unknown_ones_refused() {
    let bridge = memory("FROM scratch\n", "");
    let answer = ask(&bridge, "", "frontend.subrequests.describe").await.unwrap();
    assert_eq!(
        answer["result.txt"],
        "NAME                 VERSION DESCRIPTION\n\
         outline              1.0.0   List all parameters current build target supports\n\
         targets              1.0.0   List all targets current build supports\n\
         subrequests.describe 1.0.0   List available subrequest types\n"
    );
    let json: serde_json::Value = serde_json::from_str(&answer["result.json"]).unwrap();
    assert_eq!(json[0]["opts"][0]["name"], "target");
    assert_eq!(
        (&json[0]["inputs"], json[2]["type"].as_str()),
        (&serde_json::Value::Null, Some("rpc"))
    );

    let error = ask(&bridge, "", "frontend.nope").await.unwrap_err();
    assert_eq!(error.unsupported_request.as_deref(), Some("frontend.nope"));
    assert_eq!(error.to_string(), "unsupported request frontend.nope");
}

#[tokio::test]
async fn builds_warn_with_places_and_pages() {
    let text = "FROM scratch AS Build\nENV A \\\n  b\n";
    let bridge = memory(text, "");
    build(&bridge, "platform=linux/amd64,linux/arm64").await.unwrap();
    let warnings = bridge.warnings.into_inner().unwrap();
    // Each is told once, whatever the number of platforms.
    let shorts: Vec<_> = warnings.iter().map(|warning| warning.message.as_str()).collect();
    let legacy = "LegacyKeyValueFormat: \"ENV key=value\" should be used instead of legacy \"ENV key value\" format (line 2)";
    assert_eq!(
        shorts,
        ["StageNameCasing: Stage name 'Build' should be lowercase (line 1)", legacy]
    );
    assert_eq!(
        (warnings[1].severity, warnings[1].spans.as_slice()),
        (Severity::Warning, &[Span::lines(2, 3)][..])
    );

    let warning = warnings[1].to_warning();
    assert_eq!((warning.level, warning.short.as_str()), (1, legacy));
    assert_eq!(
        warning.detail,
        ["Legacy key/value format with whitespace separator should not be used"]
    );
    assert_eq!(warning.url, "https://docs.docker.com/go/dockerfile/rule/legacy-key-value-format/");
    let lines: Vec<i32> =
        warning.ranges.iter().map(|range| range.start.as_ref().unwrap().line).collect();
    assert_eq!(lines, [2, 3]);
    let source = warning.source.unwrap();
    assert_eq!((source.filename.as_str(), source.data.as_slice()), ("Dockerfile", text.as_bytes()));
    let origin = Definition::from_pb(source.definition.unwrap()).unwrap();
    assert_eq!(warning.vertex, Some(origin.head().unwrap().0));
}

#[tokio::test]
async fn findings_fail_a_build_that_asks_for_it() {
    let bridge = memory("# check=error=true\nFROM scratch AS A\n", "");
    let error = build(&bridge, "").await.unwrap_err();
    assert_eq!(error.to_string(), "lint violation found for rules: StageNameCasing");
    assert_eq!(bridge.warnings.lock().unwrap().len(), 1);
    // What the caller says replaces what the file says.
    build(&bridge, "build-arg:BUILDKIT_DOCKERFILE_CHECK=skip=none").await.unwrap();
    let error = build(&bridge, "build-arg:BUILDKIT_DOCKERFILE_CHECK=errors=1").await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "failed to parse build-arg:BUILDKIT_DOCKERFILE_CHECK: invalid check option \"errors\""
    );
    let error = build(&memory("# check=nope\nFROM scratch\n", ""), "").await.unwrap_err();
    assert_eq!(
        error.diagnostics[0].message,
        "failed to parse check options: invalid check option \"nope\""
    );
}

#[tokio::test]
async fn mistakes_are_told_after_what_was_found_before_them() {
    let bridge = memory("FROM scratch AS A\nMAINTAINER me\nRUNN x\nMAINTAINER you\n", "");
    assert!(build(&bridge, "").await.is_err());
    let warnings = bridge.warnings.into_inner().unwrap();
    let lines: Vec<u32> = warnings.iter().map(|warning| warning.spans[0].lines.first).collect();
    assert_eq!(lines, [1, 2]);
}

static CASES: &[Case] = &[
    Case {
        rule: "StageNameCasing",
        ignore: "",
        attrs: "",
        fires: "FROM scratch AS Build\n",
        finds: &[(1, 1, "Stage name 'Build' should be lowercase")],
        quiet: "FROM scratch AS build\n",
    },
    Case {
        rule: "FromAsCasing",
        ignore: "",
        attrs: "",
        fires: "FROM scratch as a\nfrom a AS b\n",
        finds: &[
            (1, 1, "'as' and 'FROM' keywords' casing do not match"),
            (2, 2, "'AS' and 'from' keywords' casing do not match"),
        ],
        quiet: "FROM scratch AS a\nfrom a as b\nFrom b As c\n",
    },
    Case {
        rule: "NoEmptyContinuation",
        ignore: "",
        attrs: "",
        fires: "FROM scratch\nLABEL a=b \\\n\n  c=d \\\n  e=f\n",
        finds: &[(5, 5, "Empty continuation line")],
        quiet: "FROM scratch\nLABEL a=b \\\n# comment\n  c=d\n",
    },
    Case {
        rule: "ConsistentInstructionCasing",
        ignore: "",
        attrs: "",
        fires: "FROM scratch\nenv A=1\nUser x\nLABEL a=b\n",
        finds: &[
            (2, 2, "Command 'env' should match the case of the command majority (uppercase)"),
            (3, 3, "Command 'User' should match the case of the command majority (uppercase)"),
        ],
        quiet: "from scratch\nenv A=1\nlabel a=b\n",
    },
    Case {
        rule: "DuplicateStageName",
        ignore: "",
        attrs: "",
        fires: "FROM scratch AS b\nFROM scratch AS b\n",
        finds: &[(2, 2, "Duplicate stage name \"b\", stage names should be unique")],
        quiet: "FROM scratch AS a\nFROM scratch AS b\n",
    },
    Case {
        rule: "ReservedStageName",
        ignore: "",
        attrs: "",
        fires: "FROM scratch AS scratch\nFROM base AS context\n",
        finds: &[
            (1, 1, "Stage name should not use the same name as reserved stage \"scratch\""),
            (2, 2, "Stage name should not use the same name as reserved stage \"context\""),
        ],
        quiet: "FROM scratch AS contexts\n",
    },
    Case {
        rule: "JSONArgsRecommended",
        ignore: "",
        attrs: "",
        fires: "FROM scratch\nCMD a b\nENTRYPOINT c\n",
        finds: &[
            (
                2,
                2,
                "JSON arguments recommended for CMD to prevent unintended behavior related to OS signals",
            ),
            (
                3,
                3,
                "JSON arguments recommended for ENTRYPOINT to prevent unintended behavior related to OS signals",
            ),
        ],
        quiet: "FROM scratch\nCMD [\"a\"]\nFROM scratch\nSHELL [\"/bin/bash\", \"-c\"]\nENTRYPOINT c\n",
    },
    Case {
        rule: "MaintainerDeprecated",
        ignore: "",
        attrs: "",
        fires: "FROM scratch\nMAINTAINER me\n",
        finds: &[(2, 2, "Maintainer instruction is deprecated in favor of using label")],
        quiet: "FROM scratch\nLABEL org.opencontainers.image.authors=me\n",
    },
    Case {
        rule: "UndefinedArgInFrom",
        ignore: "",
        attrs: "",
        fires: "ARG VERSION=1\nFROM base:${VERSON:-2}\nFROM --platform=${BUILDPLATFROM:-linux/amd64} base\n",
        finds: &[
            (2, 2, "FROM argument 'VERSON' is not declared (did you mean VERSION?)"),
            (3, 3, "FROM argument 'BUILDPLATFROM' is not declared (did you mean BUILDPLATFORM?)"),
        ],
        quiet: "ARG VERSION\nFROM base:${VERSION:-2}\nFROM --platform=$BUILDPLATFORM base\n",
    },
    Case {
        rule: "WorkdirRelativePath",
        ignore: "",
        attrs: "",
        fires: "FROM base\nWORKDIR src\nWORKDIR more\n",
        finds: &[(
            2,
            2,
            "Relative workdir \"src\" can have unexpected results if the base image changes",
        )],
        quiet: "FROM base AS a\nWORKDIR /src\nFROM a\nWORKDIR more\n",
    },
    Case {
        rule: "UndefinedVar",
        ignore: "",
        attrs: "",
        fires: "FROM scratch AS a\nENV PATHS=1\nCOPY $PATHZ /$OTHERS\nCOPY <<EOF /x\n$NOBODY\nEOF\n",
        finds: &[
            (3, 3, "Usage of undefined variable '$PATHZ' (did you mean $PATH?)"),
            (3, 3, "Usage of undefined variable '$OTHERS'"),
            (4, 6, "Usage of undefined variable '$NOBODY'"),
        ],
        quiet: "FROM base\nARG UNSET\nENV A=$UNSET$FROM_BASE B=\\$C\nRUN echo $D\nEXPOSE 8$E\n",
    },
    Case {
        rule: "MultipleInstructionsDisallowed",
        ignore: "",
        attrs: "",
        fires: "FROM scratch\nCMD [\"a\"]\nCMD [\"b\"]\nHEALTHCHECK NONE\nHEALTHCHECK CMD [\"x\"]\n",
        finds: &[
            (
                2,
                2,
                "Multiple CMD instructions should not be used in the same stage because only the last one will be used",
            ),
            (
                4,
                4,
                "Multiple HEALTHCHECK instructions should not be used in the same stage because only the last one will be used",
            ),
        ],
        quiet: "FROM scratch AS a\nCMD [\"a\"]\nENTRYPOINT [\"b\"]\nFROM a\nCMD [\"b\"]\n",
    },
    Case {
        rule: "LegacyKeyValueFormat",
        ignore: "",
        attrs: "",
        fires: "FROM scratch\nENV A b c\nLABEL d e\n",
        finds: &[
            (2, 2, "\"ENV key=value\" should be used instead of legacy \"ENV key value\" format"),
            (
                3,
                3,
                "\"LABEL key=value\" should be used instead of legacy \"LABEL key value\" format",
            ),
        ],
        quiet: "FROM scratch\nENV A=\"b c\"\nLABEL d=e\n",
    },
    Case {
        rule: "InvalidBaseImagePlatform",
        ignore: "",
        attrs: "",
        fires: "FROM otherarch\n",
        finds: &[(
            1,
            1,
            "Base image otherarch was pulled with platform \"linux/riscv64\", expected \"linux/amd64\" for current build",
        )],
        quiet: "FROM base\n",
    },
    Case {
        rule: "RedundantTargetPlatform",
        ignore: "",
        attrs: "",
        fires: "FROM --platform=$TARGETPLATFORM base\nFROM --platform=${TARGETPLATFORM} base\n",
        finds: &[
            (
                1,
                1,
                "Setting platform to predefined $TARGETPLATFORM in FROM is redundant as this is the default behavior",
            ),
            (
                2,
                2,
                "Setting platform to predefined ${TARGETPLATFORM} in FROM is redundant as this is the default behavior",
            ),
        ],
        quiet: "FROM --platform=$BUILDPLATFORM base\nFROM --platform=${TARGETPLATFORM:-$BUILDPLATFORM} base\n",
    },
    Case {
        rule: "SecretsUsedInArgOrEnv",
        ignore: "",
        attrs: "",
        fires: "FROM scratch\nARG API_KEY\nENV password=x MONKEY=y\n",
        finds: &[
            (2, 2, "Do not use ARG or ENV instructions for sensitive data (ARG \"API_KEY\")"),
            (3, 3, "Do not use ARG or ENV instructions for sensitive data (ENV \"password\")"),
        ],
        quiet: "ARG API_KEY\nFROM scratch\nARG PUBLIC_KEY\nENV TOKEN_FILE=x KEYBOARD=y\n",
    },
    Case {
        rule: "InvalidDefaultArgInFrom",
        ignore: "",
        attrs: "build-arg:V=2\n",
        fires: "ARG V\nFROM base:$V\n",
        finds: &[(
            2,
            2,
            "Default value for ARG base:$V results in empty or invalid base image name",
        )],
        quiet: "ARG V=1\nFROM base:$V\n",
    },
    Case {
        rule: "FromPlatformFlagConstDisallowed",
        ignore: "",
        attrs: "",
        fires: "FROM --platform=linux/amd64 base AS stage\n",
        finds: &[(1, 1, "FROM --platform flag should not use constant value \"linux/amd64\"")],
        quiet: "FROM --platform=linux/amd64 base AS build-amd64\n",
    },
    Case {
        rule: "CopyIgnoredFile",
        ignore: "*.log\ndir\n",
        attrs: "",
        fires: "FROM scratch\nCOPY a.log dir/x /\nADD ./b.log /\n",
        finds: &[
            (2, 2, "Attempting to Copy file \"a.log\" that is excluded by .dockerignore"),
            (2, 2, "Attempting to Copy file \"dir/x\" that is excluded by .dockerignore"),
            (3, 3, "Attempting to Add file \"b.log\" that is excluded by .dockerignore"),
        ],
        quiet: "FROM base AS b\nCOPY a.txt . /\nFROM scratch\nCOPY --from=b /a.log /\nADD https://example.com/a.log /\n",
    },
    Case {
        rule: "InvalidDefinitionDescription",
        ignore: "",
        attrs: "",
        fires: "# check=experimental=all\n# wrong\nARG A=1\n# b first\nFROM scratch AS a\n# other\nARG C D\n",
        finds: &[
            (3, 3, "Comment for ARG should follow the format: `# A <description>`"),
            (5, 5, "Comment for FROM should follow the format: `# a <description>`"),
            (7, 7, "Comment for ARG should follow the format: `# <arg_key> <description>`"),
        ],
        quiet: "# check=experimental=InvalidDefinitionDescription\n# A is described\nARG A=1\n# a comment that is parted\n#\nFROM scratch AS a\n# D of two\nARG C D\n# any\nENV x=y\n",
    },
    Case {
        rule: "ExposeProtoCasing",
        ignore: "",
        attrs: "",
        fires: "FROM scratch\nEXPOSE 80/TCP 90/udp\n",
        finds: &[(2, 2, "Defined protocol '80/TCP' in EXPOSE instruction should be lowercase")],
        quiet: "FROM scratch\nEXPOSE 80/tcp 90\n",
    },
    Case {
        rule: "ExposeInvalidFormat",
        ignore: "",
        attrs: "",
        fires: "FROM scratch\nEXPOSE 8080:80 127.0.0.1:1:2\n",
        finds: &[
            (
                2,
                2,
                "EXPOSE instruction should not define an IP address or host-port mapping, found '127.0.0.1:1:2'",
            ),
            (
                2,
                2,
                "EXPOSE instruction should not define an IP address or host-port mapping, found '8080:80'",
            ),
        ],
        quiet: "FROM scratch\nEXPOSE 80 90-92/udp\n",
    },
];
