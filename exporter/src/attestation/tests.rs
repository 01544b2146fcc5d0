use std::sync::Arc;

use bytes::Bytes;
use slipway_spec::{Descriptor, Digest, ImageConfig, ImageReference, MediaType, Platform};
use slipway_store::Store;
use slipway_store::layer::Overlay;
use slipway_store::pack::LayerBlob;
use slipway_store::snapshot::{LayerId, Snapshot};
use slipway_store::tree::{Content as Bytewise, Entry, Kind, Tree};

use super::beside::{Naming, beside, wanted};
use super::manifest::Target;
use super::reading::{Said, read};
use super::sbom::{Layers, supplement};
use super::statement::{Named, statement};
use super::{
    Attestation, Content, INLINE_ONLY, MakePredicate, SBOM_CORE, SPDX, Subject, json, manifest,
};
use crate::error::{ExportError, Result};
use crate::image::PlatformResult;

struct Room {
    _folder: tempfile::TempDir,
    store: Store,
}

impl Room {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        Self { _folder: folder, store }
    }

    fn layer(&self, entries: &[(&str, Kind)]) -> LayerId {
        let tree: Tree = entries
            .iter()
            .map(|(path, kind)| {
                let entry = Entry { kind: kind.clone(), ..Entry::directory(0o755, 0) };
                (path.as_bytes().to_vec(), entry)
            })
            .collect();
        self.store.adopt_tree(tree, "test").unwrap()
    }

    fn snapshot(&self, entries: &[(&str, Kind)]) -> Snapshot {
        Snapshot { layers: vec![self.layer(entries)] }
    }

    fn read(&self, attestations: &[Attestation]) -> Result<Vec<Said>> {
        read(&self.store, attestations)
    }

    fn refused(&self, attestation: Attestation) -> String {
        self.read(&[attestation]).unwrap_err().to_string()
    }

    fn result(&self, files: &[(&str, Kind)], attestations: Vec<Attestation>) -> PlatformResult {
        PlatformResult {
            platform: "linux/arm/v7".parse().unwrap(),
            snapshot: self.snapshot(files),
            config: ImageConfig::default(),
            base_history: 0,
            inline_cache: None,
            epoch: None,
            attestations,
        }
    }
}

fn file(text: &str) -> Kind {
    Kind::File { content: Bytewise::Inline(text.as_bytes().into()), size: text.len() as u64 }
}

fn folder() -> Kind {
    Kind::Directory { opaque: false }
}

fn link(target: &str) -> Kind {
    Kind::Symlink { target: target.into() }
}

#[derive(Debug)]
struct Says(&'static str);

impl MakePredicate for Says {
    fn make(&self, _store: &Store) -> Result<Vec<u8>> {
        Ok(self.0.into())
    }
}

fn attestation(content: Content, predicate_type: &str, path: &str) -> Attestation {
    Attestation {
        content,
        predicate_type: predicate_type.into(),
        subjects: vec![],
        path: path.into(),
        metadata: Default::default(),
    }
}

fn made(predicate: &'static str, predicate_type: &str, path: &str) -> Attestation {
    attestation(Content::Made(Arc::new(Says(predicate))), predicate_type, path)
}

fn with(mut attestation: Attestation, key: &str, value: &'static str) -> Attestation {
    attestation.metadata.insert(key.into(), Bytes::from_static(value.as_bytes()));
    attestation
}

const TYPE: &str = "https://example.com/attestations/v1.0";
const PROVENANCE: &str = "https://slsa.dev/provenance/v1";

#[test]
fn predicates_keep_their_keys_in_order_and_go_says_html_in_codes() {
    let room = Room::new();
    let predicate = "{ \"z\": 1.0, \"a\": { \"<b>\": [ ] } }";
    let said = room.read(&[made(predicate, TYPE, "/p.json")]).unwrap();
    let own = [Named::new("pkg:docker/a@1?x=1&y=2".into(), &Digest::of(b"a"))];
    let text = statement(&said[0], &own);
    let hex = Digest::of(b"a").hex().to_owned();
    assert_eq!(
        text,
        format!(
            "{{\"_type\":\"https://in-toto.io/Statement/v1\",\
             \"predicateType\":\"https://example.com/attestations/v1.0\",\
             \"subject\":[{{\"name\":\"pkg:docker/a@1?x=1\\u0026y=2\",\
             \"digest\":{{\"sha256\":\"{hex}\"}}}}],\
             \"predicate\":{{\"z\":1.0,\"a\":{{\"\\u003cb\\u003e\":[]}}}}}}"
        )
    );
    let without = statement(&said[0], &[]);
    assert!(without.contains("\"subject\":[],"), "{without}");
}

#[test]
fn statements_are_about_the_result_or_about_what_is_said() {
    let room = Room::new();
    let mut one = made("{}", TYPE, "p.json");
    one.subjects = vec![
        Subject::Own { name: String::new() },
        Subject::Own { name: "further".into() },
        Subject::Other { name: String::new(), digests: vec![Digest::of(b"x")] },
        Subject::Other { name: "/file".into(), digests: vec![] },
    ];
    let said = room.read(&[one]).unwrap();
    let own = [Named::new("own".into(), &Digest::of(b"a"))];
    let value: serde_json::Value = serde_json::from_str(&statement(&said[0], &own)).unwrap();
    let (ours, other) = (Digest::of(b"a").hex().to_owned(), Digest::of(b"x").hex().to_owned());
    assert_eq!(
        value["subject"],
        serde_json::json!([
            { "name": "own", "digest": { "sha256": ours } },
            { "name": "own", "digest": { "sha256": ours } },
            { "name": "further", "digest": { "sha256": ours } },
            { "name": "_", "digest": { "sha256": other } },
            { "name": "/file", "digest": {} },
        ])
    );
}

#[test]
fn what_cannot_be_said_is_refused() {
    let room = Room::new();
    let big = Kind::File { content: Bytewise::Inline(b"{}"[..].into()), size: (40 << 20) + 1 };
    let files = [
        ("good.json", file("{}")),
        ("empty", file("")),
        ("big", big),
        ("bad", file("{\"a\":}")),
        ("two", file("{}{}")),
        ("d", folder()),
        ("link", link("/d/../good.json")),
        ("out", link("../../../../good.json")),
    ];
    let snapshot = room.snapshot(&files);
    let from =
        |path: &str| attestation(Content::File(snapshot.clone()), "https://x.org/type", path);
    for good in ["good.json", "/good.json", "/link", "/out", "../d/../good.json"] {
        let said = room.read(&[from(good)]).unwrap();
        assert_eq!(said[0].predicate.get(), "{}", "{good}");
    }
    assert_eq!(room.read(&[from("empty")]).unwrap()[0].predicate.get(), "null");
    for (path, expected) in [
        ("", "attestation does not have set path"),
        ("/none", "cannot read in-toto attestation: /none: no such file"),
        ("/d", "cannot read in-toto attestation: /d: it is not a regular file"),
        ("/big", "cannot read in-toto attestation: /big: it exceeds 41943040 bytes"),
    ] {
        assert_eq!(room.refused(from(path)), expected);
    }
    for path in ["bad", "two"] {
        let error = room.refused(from(path));
        assert!(error.starts_with(&format!("attestation {path} is not JSON: ")), "{error}");
    }
    assert_eq!(room.refused(made("{}", TYPE, "")), "attestation does not have set path");
    // Only the builder itself says how something was built.
    let forged = attestation(Content::File(snapshot), PROVENANCE, "/good.json");
    assert_eq!(room.refused(forged), "frontend may not set provenance attestations");
    assert_eq!(room.read(&[made("{}", PROVENANCE, "p")]).unwrap().len(), 1);
}

#[test]
fn bundles_are_taken_apart() {
    let room = Room::new();
    let first = r#"{"_type":"https://in-toto.io/Statement/v1","predicateType":"T","subject":null,
        "predicate": {"z":1,"a":2}}"#;
    let second = r#"{"predicateType":"T","subject":[{"name":"n","digest":{"sha1":"ab","x":"y"}}]}"#;
    let snapshot = room.snapshot(&[
        ("b", folder()),
        ("b/b.json", file(second)),
        ("b/a.json", file(first)),
        // Links stay in the bundle: this is the file of the same name there.
        ("b/c.json", link("/a.json")),
        ("a.json", file("not this one")),
    ]);
    let bundle =
        |path: &str, kind: &str| attestation(Content::Bundle(snapshot.clone()), kind, path);
    for kind in ["", "T"] {
        let all = room.read(&[bundle("/b", kind)]).unwrap();
        let seen: Vec<(&str, &str)> =
            all.iter().map(|said| (said.path.as_str(), said.predicate.get())).collect();
        let value = r#"{"z":1,"a":2}"#;
        assert_eq!(seen, [("b/a.json", value), ("b/b.json", "null"), ("b/c.json", value)]);
        let own = [Named::new("own".into(), &Digest::of(b"a"))];
        assert!(statement(&all[0], &own).contains(r#""subject":[{"name":"own","#));
        let other = r#""subject":[{"name":"n","digest":{"sha1":"ab","x":"y"}}],"predicate":null"#;
        assert!(statement(&all[1], &own).contains(other));
    }
    assert_eq!(
        room.refused(bundle("/b", "U")),
        "bundle entry T does not match required predicate type U"
    );
    assert_eq!(
        room.refused(bundle("/a.json", "")),
        "the attestation bundle \"/a.json\" is not a folder"
    );
    let with = |name: &str, kind: Kind| {
        let snapshot = room.snapshot(&[("d", folder()), (&format!("d/{name}"), kind)]);
        room.refused(attestation(Content::Bundle(snapshot), "", "d"))
    };
    assert_eq!(
        with("p", file(&format!("{{\"predicateType\":\"{PROVENANCE}\",\"predicate\":{{}}}}"))),
        "frontend may not bundle provenance attestations"
    );
    assert_eq!(
        with("sub", folder()),
        "cannot read in-toto attestation: d/sub: it is not a regular file"
    );
    assert_eq!(
        with("gone", link("/etc/passwd")),
        "cannot read in-toto attestation: d/gone: no such file"
    );
    for text in ["{} {}", "", "[]", "null", "{\"predicateType\":1}"] {
        let error = with("s", file(text));
        assert!(error.starts_with("cannot decode in-toto statement: d/s: "), "{error}");
    }
}

#[test]
fn what_the_result_is_made_of_comes_first() {
    let room = Room::new();
    let core = |path: &str| with(made("{}", SPDX, path), SBOM_CORE, "sbom");
    let all = [made("{}", TYPE, "a"), core("/d/sbom-base.json"), core("/d/sbom.spdx.json")];
    let paths: Vec<String> = room.read(&all).unwrap().into_iter().map(|said| said.path).collect();
    assert_eq!(paths, ["/d/sbom.spdx.json", "a", "/d/sbom-base.json"]);
}

/// An image and two statements about it, as a manifest.
fn golden(artifact: bool) -> (Descriptor, String, String) {
    let room = Room::new();
    let image = Descriptor::new(MediaType::OCI_MANIFEST, Digest::of(b"image"), 5);
    let all = room.read(&[made("{\"a\":1}", TYPE, "a"), made("{}", SPDX, "b")]).unwrap();
    let names: Vec<ImageReference> = vec!["localhost:5000/app:1".parse().unwrap()];
    let platform: Platform = "linux/amd64".parse().unwrap();
    let target = Target { manifest: &image, names: &names, platform: &platform };
    let entry = manifest::write(&room.store, &all, target, artifact).unwrap();
    let read = |digest: &Digest| {
        String::from_utf8(room.store.read_blob(digest, 1 << 20).unwrap()).unwrap()
    };
    let text = read(&entry.digest);
    let parsed: slipway_spec::Manifest = serde_json::from_str(&text).unwrap();
    let config = read(&parsed.config.digest);
    let first: serde_json::Value = serde_json::from_str(&read(&parsed.layers[0].digest)).unwrap();
    assert_eq!(
        first["subject"][0]["name"],
        "pkg:docker/localhost%3A5000/app@1?platform=linux%2Famd64"
    );
    assert_eq!(first["subject"][0]["digest"]["sha256"], image.digest.hex());
    (entry, text, config)
}

#[test]
fn an_attestation_manifest_is_an_artifact() {
    let (entry, text, config) = golden(true);
    assert_eq!(text, include_str!("tests/artifact.json").trim_end());
    assert_eq!(config, "{}");
    let entry = serde_json::to_string(&entry).unwrap();
    let expected = format!(
        "{{\"mediaType\":\"application/vnd.oci.image.manifest.v1+json\",\"digest\":\"{}\",\
         \"size\":{},\"annotations\":{{\"vnd.docker.reference.digest\":\"{}\",\
         \"vnd.docker.reference.type\":\"attestation-manifest\"}},\
         \"platform\":{{\"architecture\":\"unknown\",\"os\":\"unknown\"}}}}",
        Digest::of(text.as_bytes()),
        text.len(),
        Digest::of(b"image")
    );
    assert_eq!(entry, expected);
}

#[test]
fn an_attestation_manifest_looks_like_an_image_where_that_is_wanted() {
    let (_, text, config) = golden(false);
    assert_eq!(text, include_str!("tests/image.json").trim_end());
    assert_eq!(config, include_str!("tests/config.json").trim_end());
}

const DOCUMENT: &str = r#"{
    "spdxVersion": "SPDX-2.3", "zzz": {"own": [1, 2]}, "SPDXID": "DOCUMENT",
    "creationInfo": {"created": "2020", "creators": ["Tool: scanner"], "x": 1},
    "files": [
        {"fileName": "/top", "SPDXID": "a"},
        {"fileName": "low", "comment": ""},
        {"fileName": "/low", "comment": "mine"},
        {"fileName": "/d/both"},
        {"fileName": "/gone"},
        {"fileName": "/none"},
        {"SPDXID": "nameless"},
        null
    ],
    "packages": [{"name": "p", "files": [{"fileName": "./folder/f"}]}, {"name": "q"}]
}"#;

fn supplemented(document: &'static str) -> String {
    let room = Room::new();
    // The lowest layer is a folder, as one that was unpacked or that a step wrote.
    let home = room.store.temporary("home");
    std::fs::create_dir_all(home.join("fs")).unwrap();
    let low: Tree =
        [("d", folder()), ("d/both", file("1")), ("low", file("1")), ("gone", file("1"))]
            .into_iter()
            .map(|(path, kind)| {
                (path.as_bytes().to_vec(), Entry { kind, ..Entry::directory(0o755, 0) })
            })
            .collect();
    low.write_folder(&home.join("fs"), Overlay::User).unwrap();
    let layers = [
        room.store.adopt_folder(&home, &[], "low").unwrap(),
        room.layer(&[("folder", folder()), ("folder/f", file("2")), ("gone", Kind::Whiteout)]),
        room.layer(&[("d", folder()), ("d/both", file("3")), ("top", file("3"))]),
    ];
    let blobs: Vec<LayerBlob> = ["low", "middle", "top"]
        .map(|name| LayerBlob {
            descriptor: Descriptor::new(MediaType::OCI_LAYER, Digest::of(name.as_bytes()), 1),
            diff_id: Digest::of(b"diff"),
        })
        .into();
    let core = with(made(document, SPDX, "/sbom.spdx.json"), SBOM_CORE, "sbom");
    let mut all = room.read(&[core, made(document, SPDX, "/extra.json")]).unwrap();
    let mut holders = Layers::new(&room.store, &layers, &blobs);
    for said in &mut all {
        supplement(said, &mut holders).unwrap();
    }
    // What others say of something else is theirs.
    assert_eq!(all[1].predicate.get(), document);
    all[0].predicate.get().to_owned()
}

#[test]
fn a_bill_of_materials_learns_the_layers_of_its_files() {
    let (low, middle, top) = (Digest::of(b"low"), Digest::of(b"middle"), Digest::of(b"top"));
    let version = env!("CARGO_PKG_VERSION");
    let expected = format!(
        r#"{{"spdxVersion":"SPDX-2.3","zzz":{{"own":[1,2]}},"SPDXID":"DOCUMENT","creationInfo":{{"created":"2020","creators":["Tool: scanner","Tool: slipway-{version}"],"x":1}},"files":[{{"fileName":"/top","SPDXID":"a","comment":"layerID: {top}"}},{{"fileName":"low","comment":"layerID: {low}"}},{{"fileName":"/low","comment":"mine"}},{{"fileName":"/d/both","comment":"layerID: {top}"}},{{"fileName":"/gone","comment":"layerID: {low}"}},{{"fileName":"/none"}},{{"SPDXID":"nameless"}},null],"packages":[{{"name":"p","files":[{{"fileName":"./folder/f","comment":"layerID: {middle}"}}]}},{{"name":"q"}}]}}"#
    );
    assert_eq!(json::compact(&supplemented(DOCUMENT)), expected);
    let bare = supplemented(r#"{"spdxVersion":"SPDX-2.2"}"#);
    let creators = format!(r#"{{"creators":["Tool: slipway-{version}"]}}"#);
    assert_eq!(bare, format!(r#"{{"spdxVersion":"SPDX-2.2","creationInfo":{creators}}}"#));
}

#[test]
fn what_is_no_bill_of_materials_stays_as_it_is() {
    for document in [
        "[]",
        "\"text\"",
        r#"{"files":[{"fileName":"/top"}]}"#,
        r#"{"spdxVersion":"SPDX-3.0","files":[{"fileName":"/top"}]}"#,
        r#"{"spdxVersion":"SPDX-2.3","creationInfo":"me","files":[{"fileName":"/top"}]}"#,
        r#"{"spdxVersion":"SPDX-2.3","creationInfo":{"creators":"me"},"files":[{"fileName":"/top"}]}"#,
    ] {
        assert_eq!(supplemented(document), document);
    }
}

#[test]
fn statements_lie_beside_the_files_they_are_about() {
    let room = Room::new();
    let inline = with(made("{}", TYPE, "inline.json"), INLINE_ONLY, "true");
    let files = [
        ("b", folder()),
        ("b/c", file("2")),
        ("a", file("1")),
        ("l", link("a")),
        ("b-d", file("3")),
    ];
    let result = room.result(&files, vec![made("{\"x\":[]}", TYPE, "/d/p.json"), inline.clone()]);
    let tree = room.store.view(&result.snapshot.layers).unwrap().flatten().unwrap();
    let beside = |result: &PlatformResult, naming| beside(&room.store, result, &tree, naming);
    let one = beside(&result, Naming { prefix: "x.", platform: false }).unwrap();
    assert_eq!(one.len(), 1);
    assert_eq!(one[0].name, "x.p.json");
    let (a, c, d) = (Digest::of(b"1"), Digest::of(b"2"), Digest::of(b"3"));
    let subject = |name: &str, digest: &Digest| {
        format!(
            "    {{\n      \"name\": \"{name}\",\n      \"digest\": {{\n        \"sha256\": \"{}\"\n      }}\n    }}",
            digest.hex()
        )
    };
    let subjects = [subject("a", &a), subject("b/c", &c), subject("b-d", &d)].join(",\n");
    assert_eq!(
        String::from_utf8(one[0].content.clone()).unwrap(),
        format!(
            "{{\n  \"_type\": \"https://in-toto.io/Statement/v1\",\n  \"predicateType\": \"{TYPE}\",\n  \"subject\": [\n{subjects}\n  ],\n  \"predicate\": {{\n    \"x\": []\n  }}\n}}"
        )
    );
    let name = |path: &str, naming| {
        let result =
            PlatformResult { attestations: vec![made("{}", TYPE, path)], ..result.clone() };
        beside(&result, naming).map(|mut files| files.remove(0).name)
    };
    let with_platform = Naming { prefix: "", platform: true };
    assert_eq!(name("provenance.json", with_platform).unwrap(), "provenance.linux_arm_v7.json");
    assert_eq!(name("plain", with_platform).unwrap(), "plain.linux_arm_v7");
    for (path, prefix) in [("..", ""), ("a/..", ""), ("/", ""), ("p", "../"), ("p", "d/")] {
        let naming = Naming { prefix, platform: false };
        assert!(matches!(name(path, naming), Err(ExportError::Invalid(_))), "{path} {prefix}");
    }
    let twice = vec![made("{}", TYPE, "a/p.json"), made("{}", TYPE, "b/p.json")];
    let error =
        beside(&PlatformResult { attestations: twice, ..result.clone() }, Naming::default());
    assert_eq!(error.unwrap_err().to_string(), "duplicate attestation path name p.json");
    assert!(wanted(&result));
    let result = PlatformResult { attestations: vec![inline], ..result };
    assert!(!wanted(&result));
    assert_eq!(beside(&result, Naming::default()).unwrap(), []);
}
