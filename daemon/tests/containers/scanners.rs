//! Results are scanned by a program in an image: by the frontend that is built in, or by the daemon where the frontend did
//! not see to it.

use slipway_spec::wire::gateway::{Attestation, Attestations, Ref};

use super::*;

const SCANNER: &str = "scan.test/scanner:1";

/// Says what it was asked for, and writes a statement for each file system.
const SCRIPT: &str = r#"
set -e
statement() {
    echo "{\"_type\": \"https://in-toto.io/Statement/v1\", \"predicateType\": \"https://spdx.dev/Document\"," \
        "\"predicate\": {\"name\": \"$1\", \"files\": \"$(echo $2/*)\", \"word\": \"$BUILDKIT_SCAN_WORD\"}}" \
        > $BUILDKIT_SCAN_DESTINATION/$1.spdx.json
}
if (echo > $BUILDKIT_SCAN_SOURCE/x) 2> /tmp/why; then exit 7; fi
statement sbom $BUILDKIT_SCAN_SOURCE
for extra in ${BUILDKIT_SCAN_SOURCE_EXTRAS:-/none}/*; do
    if busybox test -d $extra; then statement $(busybox basename $extra) $extra; fi
done
"#;

fn attrs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Asks the frontend that is built in.
async fn dockerfile(
    build: &Building<'_>,
    text: &str,
    wish: &[(&str, &str)],
) -> Result<gateway::Result, Status> {
    let file = definition(vec![file_op(None, vec![mkfile("/Dockerfile", text)])]);
    let request = gateway::SolveRequest {
        frontend: "dockerfile.v0".into(),
        frontend_opt: attrs(wish),
        frontend_inputs: [("dockerfile", file.clone()), ("context", file)]
            .map(|(name, graph)| (name.to_owned(), graph))
            .into(),
        allow_result_return: true,
        allow_result_array_ref: true,
        ..Default::default()
    };
    let answer = build.peer.gateway().solve(build.ask(request)).await?;
    Ok(answer.into_inner().result.unwrap())
}

async fn read(build: &Building<'_>, id: &str, path: &str) -> Result<String, Status> {
    let request =
        ReadFileRequest { r#ref: id.into(), file_path: path.into(), ..Default::default() };
    let read = build.peer.gateway().read_file(build.ask(request)).await?;
    Ok(String::from_utf8(read.into_inner().data.to_vec()).unwrap())
}

/// Returns the names of all steps that a build told of.
async fn steps(peer: &Peer, id: &str) -> Vec<String> {
    let mut control = ControlClient::new(peer.connection.channel.clone());
    let told = control.status(StatusRequest { r#ref: id.into() }).await.unwrap();
    let told: Vec<StatusResponse> =
        told.into_inner().filter_map(|told| async { told.ok() }).collect().await;
    let vertices = told.into_iter().flat_map(|told| told.vertexes);
    vertices.filter(|vertex| vertex.completed.is_some()).map(|vertex| vertex.name).collect()
}

fn host() -> String {
    slipway_spec::Platform::host().full_name()
}

pub(super) fn dockerfiles_are_scanned() {
    let rig = Rig::new();
    block_on(async {
        image(&rig, SCANNER, SCRIPT).await;
        let peer = rig.connect().await;
        let build = peer.begin("r", vec![]).await;
        let text = "FROM scratch AS tool\nARG BUILDKIT_SBOM_SCAN_STAGE=true\n\
            COPY Dockerfile /tool\nFROM scratch\nCOPY --from=tool /tool /one\n";
        let wish = [("attest:sbom", "generator=scan.test/scanner:1,WORD=given")];
        let result = dockerfile(&build, text, &wish).await.unwrap();
        let said = &result.attestations[&host()].attestation;
        let [said] = said.as_slice() else { panic!("{said:?}") };
        assert_eq!((said.kind, said.path.as_str()), (1, ""));
        assert_eq!(said.in_toto_predicate_type, "https://spdx.dev/Document");
        assert_eq!(said.metadata["reason"], "sbom");
        assert_eq!(said.metadata["sbom-core"], "sbom");
        let id = said.r#ref.clone().unwrap().id;
        for (name, files) in
            [("sbom", "/run/src/core/sbom/one"), ("sbom-tool", "/run/src/extras/sbom-tool/tool")]
        {
            let written = read(&build, &id, &format!("/{name}.spdx.json")).await.unwrap();
            let written: serde_json::Value = serde_json::from_str(&written).unwrap();
            let expected = serde_json::json!({ "name": name, "files": files, "word": "given" });
            assert_eq!(written["predicate"], expected);
        }
        // Not asked for, not scanned.
        assert!(dockerfile(&build, text, &[]).await.unwrap().attestations.is_empty());
        // Of nothing, too, there is something to say.
        let nothing = dockerfile(&build, "FROM scratch\nLABEL a=b\n", &wish).await.unwrap();
        let id = nothing.attestations[&host()].attestation[0].r#ref.clone().unwrap().id;
        assert!(read(&build, &id, "/sbom.spdx.json").await.unwrap().contains("core/sbom/*"));

        let missing = [("attest:sbom", "generator=scan.test/none:1")];
        let missing = dockerfile(&build, text, &missing).await.unwrap_err();
        let expected = "cannot scan with generator=scan.test/none:1: ";
        assert!(missing.message().contains(expected), "{}", missing.message());
        build.give(result).await;
        let steps = steps(&peer, "r").await;
        let name = format!("[{}] generating sbom using {SCANNER}", host());
        assert!(steps.contains(&name), "{steps:?}");
    });
}

pub(super) fn what_no_frontend_scanned_is_scanned_afterwards() {
    let rig = Rig::new();
    block_on(async {
        image(&rig, SCANNER, SCRIPT).await;
        let peer = rig.connect().await;
        let graph = || definition(vec![file_op(None, vec![mkfile("/a", "1")])]);
        let asking = |id: &str, wish: &[(&str, &str)]| SolveRequest {
            r#ref: id.into(),
            definition: Some(graph()),
            frontend_attrs: attrs(wish),
            ..Default::default()
        };
        let name = format!("[{}] generating sbom using {SCANNER}", host());
        let wish = [("attest:sbom", "generator=scan.test/scanner:1")];
        peer.solve(asking("raw", &wish)).await.unwrap().unwrap();
        assert!(steps(&peer, "raw").await.contains(&name));
        peer.solve(asking("silent", &[])).await.unwrap().unwrap();
        assert!(!steps(&peer, "silent").await.contains(&name));

        // Whoever says itself what its result is made of is believed.
        let told = |id: &str, path: &str| Attestations {
            attestation: vec![Attestation {
                r#ref: Some(Ref { id: id.into(), def: None }),
                path: path.into(),
                in_toto_predicate_type: "https://spdx.dev/Document".into(),
                ..Default::default()
            }],
        };
        let begin = |id: &'static str| {
            let frontend_attrs = attrs(&wish);
            let request = SolveRequest { r#ref: id.into(), frontend_attrs, ..Default::default() };
            let begun = peer.solve(request);
            Building { peer: &peer, id, begun }
        };
        for (id, says) in [("said", true), ("unsaid", false)] {
            let build = begin(id);
            peer.gateway().ping(tagged(id, PingRequest {})).await.unwrap();
            let made = build.load(vec![base()], false).await.unwrap();
            let mut result = result_of(&made);
            if says {
                result.attestations.insert(host(), told(&made, "/bin"));
            }
            build.give(result).await;
            assert_eq!(steps(&peer, id).await.contains(&name), !says, "{id}");
        }

        // What is said must be found somewhere.
        let build = begin("wrong");
        peer.gateway().ping(tagged("wrong", PingRequest {})).await.unwrap();
        let made = build.load(vec![base()], false).await.unwrap();
        let mut result = result_of(&made);
        result.attestations.insert(host(), told("none", "/x"));
        let request = build.ask(ReturnRequest { result: Some(result), error: None });
        let refused = peer.gateway().r#return(request).await.unwrap_err();
        assert_eq!((refused.code(), refused.message()), (Code::NotFound, "no such ref: none"));
        build.begun.await.unwrap().unwrap_err();

        for (wish, message) in [
            (("attest:sbom", "generator="), "sbom generator cannot be empty"),
            (("attest:other", ""), "unknown attestation type \"other\""),
            (
                ("attest:sbom", "generator=scan.test/none:1"),
                "cannot scan with generator=scan.test/none:1",
            ),
        ] {
            let refused = peer.solve(asking("mistake", &[wish])).await.unwrap().unwrap_err();
            assert!(refused.message().contains(message), "{}", refused.message());
        }
    });
}

pub(super) fn a_scanner_that_fails_fails_the_build() {
    let rig = Rig::new();
    block_on(async {
        image(&rig, SCANNER, "echo why >&2; exit 6").await;
        let peer = rig.connect().await;
        let graph = definition(vec![file_op(None, vec![mkfile("/a", "1")])]);
        let failed = peer.solve(SolveRequest {
            r#ref: "r".into(),
            definition: Some(graph),
            frontend_attrs: attrs(&[("attest:sbom", "generator=scan.test/scanner:1")]),
            ..Default::default()
        });
        let failed = failed.await.unwrap().unwrap_err();
        assert!(failed.message().contains("exit code: 6"), "{}", failed.message());
    });
}
