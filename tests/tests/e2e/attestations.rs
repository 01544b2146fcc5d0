//! What is said of an image beside the image itself: where it is from, and lists of what it is made of, by a scanner that
//! the test makes.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use slipway_tests::{BASE, Context, Daemon, Layout, Registry, Sandbox};

use crate::frontends::pack;

/// Makes a scanner that lists the files of what it is given, and pushes it.
fn scanner(sandbox: &Sandbox, registry: &Registry) -> String {
    let image = registry.image("tools/scanner:1");
    let context = sandbox.context("scanner");
    context
        .file(
            "scan.sh",
            r#"set -e
statement() {
    files=$(cd "$2" && find . -type f | sort | tr '\n' ' ')
    printf '{"_type":"https://in-toto.io/Statement/v1","predicateType":"https://spdx.dev/Document","predicate":{"name":"%s","files":"%s","word":"%s"}}' \
        "$1" "$files" "$BUILDKIT_SCAN_WORD" > "$BUILDKIT_SCAN_DESTINATION/$1.spdx.json"
}
statement sbom "$BUILDKIT_SCAN_SOURCE"
if test -n "$BUILDKIT_SCAN_SOURCE_EXTRAS"; then
    for extra in "$BUILDKIT_SCAN_SOURCE_EXTRAS"/*; do statement "${extra##*/}" "$extra"; done
fi
"#,
        )
        .dockerfile(&format!("FROM {BASE}\nCOPY scan.sh /\nCMD [\"sh\", \"/scan.sh\"]\n"));
    sandbox.build(&context, ["--push", "-t", &image]);
    image
}

const DOCKERFILE: &str = "ARG BUILDKIT_SBOM_SCAN_CONTEXT=true\n\
    FROM scratch AS tool\nARG BUILDKIT_SBOM_SCAN_STAGE=true\nCOPY f /tool\n\
    FROM scratch\nCOPY --from=tool /tool /app\n";

fn context(sandbox: &Sandbox) -> Context {
    let context = sandbox.context("context");
    context.file("f", "content\n").dockerfile(DOCKERFILE);
    context
}

/// What the scanner says of [`DOCKERFILE`].
fn expected() -> [Value; 3] {
    [
        json!({ "name": "sbom", "files": "./app ", "word": "given" }),
        json!({ "name": "sbom-context", "files": "./f ", "word": "given" }),
        json!({ "name": "sbom-tool", "files": "./tool ", "word": "given" }),
    ]
}

const SPDX: &str = "https://spdx.dev/Document";

/// Returns what is said in an archive, by the platform of what it is said of: the predicates, by name. All must have one type.
fn said(archive: &Path, kind: &str) -> Vec<(String, Vec<Value>)> {
    let layout = Layout::unpack(archive);
    let index = layout.document(&layout.descriptors()[0]);
    let manifests = index["manifests"].as_array().expect("an index");
    let about = |entry: &Value| entry["annotations"]["vnd.docker.reference.type"].clone();
    let attested = manifests.iter().filter(|entry| about(entry) == "attestation-manifest");
    let mut all = vec![];
    for entry in attested {
        let of = &entry["annotations"]["vnd.docker.reference.digest"];
        let image = manifests.iter().find(|image| image["digest"] == *of).expect("it is there");
        let platform = &image["platform"];
        let platform = format!("{}/{}", platform["os"], platform["architecture"]).replace('"', "");
        let layers = layout.document(entry)["layers"].as_array().expect("layers").clone();
        let mut predicates = vec![];
        for layer in layers {
            assert_eq!(layer["annotations"]["in-toto.io/predicate-type"], kind);
            let statement = layout.document(&layer);
            assert_eq!(statement["predicateType"], kind);
            predicates.push(statement["predicate"].clone());
        }
        predicates.sort_by_key(|predicate| predicate["name"].to_string());
        all.push((platform, predicates));
    }
    all.sort_by_key(|(platform, _)| platform.clone());
    all
}

/// Returns a predicate with only what the scanner of this test says.
fn plain(predicate: &Value) -> Value {
    json!({ "name": predicate["name"], "files": predicate["files"], "word": predicate["word"] })
}

#[test]
fn images_come_with_what_they_are_made_of() {
    let sandbox = Sandbox::with_base();
    let registry = Registry::start();
    let scanner = scanner(&sandbox, &registry);
    let context = context(&sandbox);
    let (archive, sbom) =
        (sandbox.path("image.tar"), format!("--sbom=generator={scanner},WORD=given"));
    let output = format!("type=oci,dest={}", archive.display());
    let both = "--platform=linux/amd64,linux/arm64";
    let ran = sandbox.build(&context, [&sbom, both, "-o", &output]);
    let step = format!("generating sbom using {scanner}");
    assert!(ran.stderr.contains(&step), "{}", ran.stderr);
    let found = said(&archive, SPDX);
    let platforms: Vec<_> = found.iter().map(|(platform, _)| platform.as_str()).collect();
    assert_eq!(platforms, ["linux/amd64", "linux/arm64"]);
    for (platform, predicates) in &found {
        assert_eq!(predicates.iter().map(plain).collect::<Vec<_>>(), expected(), "{platform}");
    }

    // A scan is a step like any other.
    let again = sandbox.build(&context, [&sbom, both, "-o", "type=cacheonly"]);
    assert!(again.is_cached(&step), "{}", again.stderr);

    // A daemon does the same, and the scanner is told the same.
    let daemon = Daemon::start(&sandbox);
    let remote = sandbox.path("remote.tar");
    let output = format!("type=oci,dest={}", remote.display());
    let attest = format!("--attest=type=sbom,generator={scanner},WORD=given");
    sandbox.run(daemon.words(&context, &[&attest, "-o", &output]));
    let found = said(&remote, SPDX);
    let [(platform, predicates)] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!(platform, "linux/amd64");
    assert_eq!(predicates.iter().map(plain).collect::<Vec<_>>(), expected());
}

#[test]
fn a_frontend_that_is_an_image_has_its_results_scanned() {
    let sandbox = Sandbox::with_base();
    let registry = Registry::start();
    let scanner = scanner(&sandbox, &registry);
    let frontend = registry.image("team/frontend:1");
    pack(&sandbox, &frontend);
    let context = context(&sandbox);
    context.dockerfile(&format!("# syntax={frontend}\n{DOCKERFILE}"));
    let sbom = format!("--sbom=generator={scanner},WORD=given");
    for (name, platforms) in [("one", "linux/amd64"), ("two", "linux/amd64,linux/arm64")] {
        let archive = sandbox.path(&format!("{name}.tar"));
        let output = format!("type=oci,dest={}", archive.display());
        sandbox.build(&context, [&sbom, "--platform", platforms, "-o", &output]);
        let found = said(&archive, SPDX);
        assert_eq!(found.len(), platforms.split(',').count());
        for (platform, predicates) in found {
            assert!(platforms.contains(&platform), "{platform}");
            assert_eq!(predicates.iter().map(plain).collect::<Vec<_>>(), expected(), "{platform}");
        }
    }
}

#[test]
fn files_come_with_what_they_are_made_of() {
    let sandbox = Sandbox::with_base();
    let registry = Registry::start();
    let scanner = scanner(&sandbox, &registry);
    let context = context(&sandbox);
    let out = sandbox.path("out");
    let sbom = format!("--sbom=generator={scanner}");
    sandbox.build(&context, [&sbom, "-o", &out.display().to_string()]);
    let mut names: Vec<_> = fs::read_dir(&out)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = ["app", "sbom-context.spdx.json", "sbom-tool.spdx.json", "sbom.spdx.json"];
    assert_eq!(names, expected);
    let statement: Value =
        serde_json::from_slice(&fs::read(out.join("sbom.spdx.json")).unwrap()).unwrap();
    assert_eq!(statement["predicate"]["files"], "./app ");

    // What is switched off, or not asked for, is not there.
    let none = sandbox.path("none");
    let none_arg = none.display().to_string();
    sandbox.build(
        &context,
        [&format!("--attest=type=sbom,generator={scanner}"), "--sbom=false", "-o", &none_arg],
    );
    assert!(none.join("app").exists() && !none.join("sbom.spdx.json").exists());
}

#[test]
fn a_scanner_that_is_missing_is_named() {
    let sandbox = Sandbox::with_base();
    let registry = Registry::start();
    let context = context(&sandbox);
    let missing = registry.image("no/such:1");
    let failed = sandbox.build_fails(&context, [format!("--sbom=generator={missing}").as_str()]);
    let expected = format!("cannot scan with generator={missing}");
    assert!(failed.stderr.contains(&expected), "{}", failed.stderr);
    let failed = sandbox.build_fails(&context, ["--attest=type=other"]);
    assert!(failed.stderr.contains("unknown attestation type"), "{}", failed.stderr);
}

#[test]
fn images_come_with_where_they_are_from() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.file("f", "content\n").file("key", "hidden").dockerfile(&format!(
        "FROM {BASE}\nARG WORD\nCOPY f /f\nRUN --mount=type=secret,id=key,required=true cat /run/secrets/key > /dev/null\n"
    ));
    let secret = format!("--secret=id=key,src={}", context.path().join("key").display());
    let daemon = Daemon::start(&sandbox);
    for (name, remote) in [("local", false), ("remote", true)] {
        let build = |provenance: &str, kind: &str| {
            let version = kind.rsplit('/').next().unwrap_or_default();
            let archive = sandbox.path(&format!("{name}-{version}.tar"));
            let output = format!("type=oci,dest={}", archive.display());
            let flags = [provenance, "--build-arg=WORD=given", &secret, "-o", &output];
            if remote {
                sandbox.run(daemon.words(&context, &flags));
            } else {
                sandbox.build(&context, flags);
            }
            let found = said(&archive, kind);
            let [(platform, predicates)] = found.as_slice() else { panic!("{found:?}") };
            assert_eq!((platform.as_str(), predicates.len()), ("linux/amd64", 1));
            predicates[0].clone()
        };
        let all = build("--provenance=mode=max,builder-id=test", "https://slsa.dev/provenance/v1");
        let definition = &all["buildDefinition"];
        let request = &definition["externalParameters"]["request"];
        assert_eq!(request["frontend"], "dockerfile.v0", "{name}");
        assert_eq!(request["args"]["build-arg:WORD"], "given");
        assert_eq!(request["secrets"], json!([{ "id": "key" }]));
        assert_eq!(request["locals"], json!([{ "name": "context" }, { "name": "dockerfile" }]));
        let materials = definition["resolvedDependencies"].as_array().expect("the base image");
        let [base] = materials.as_slice() else { panic!("{materials:?}") };
        let uri = base["uri"].as_str().unwrap();
        assert!(uri.starts_with("pkg:docker/") && uri.contains("platform=linux%2Famd64"), "{uri}");
        assert_eq!(base["digest"]["sha256"].as_str().unwrap().len(), 64);
        let steps = &definition["internalParameters"]["buildConfig"]["llbDefinition"];
        let runs = |step: &&Value| step["op"]["Op"]["exec"].is_object();
        assert_eq!(steps.as_array().unwrap().iter().filter(runs).count(), 1);
        assert_eq!(all["runDetails"]["builder"]["id"], "test");
        let metadata = &all["runDetails"]["metadata"]["buildkit_metadata"];
        assert_eq!(metadata["source"]["infos"][0]["filename"], "Dockerfile");
        assert!(metadata["layers"].as_object().is_some_and(|layers| !layers.is_empty()));
        assert!(!all.to_string().contains("hidden"));

        let least = build(
            "--attest=type=provenance,mode=min,version=v0.2",
            "https://slsa.dev/provenance/v0.2",
        );
        assert!(!least.to_string().contains("given"), "{least}");
        assert_eq!(least["invocation"]["parameters"].get("secrets"), None);
        assert_eq!(least.get("buildConfig"), None);
        let complete = json!({ "parameters": false, "environment": true, "materials": false });
        assert_eq!(least["metadata"]["completeness"], complete);
    }
    let failed = sandbox.build_fails(&context, ["--provenance=mode=some", &secret]);
    assert!(failed.stderr.contains("invalid mode \"some\""), "{}", failed.stderr);
    let failed = sandbox.build_fails(&context, ["--provenance=complete-materials=true", &secret]);
    assert!(failed.stderr.contains("Uncaptured local sources"), "{}", failed.stderr);
}
