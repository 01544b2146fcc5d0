//! Which crate may know of which: the picture in ARCHITECTURE.md, held to the manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use slipway_tests::tool;

/// Each crate and what it may depend on; anyone may use `spec`, and siblings never import each other.
const EDGES: &[(&str, &[&str])] = &[
    ("slipway-spec", &[]),
    ("slipway-frontend", &["slipway-spec"]),
    ("slipway-store", &["slipway-spec"]),
    ("slipway-solver", &["slipway-spec", "slipway-store"]),
    ("slipway-exporter", &["slipway-spec", "slipway-store"]),
    (
        "slipway-engine",
        &[
            "slipway-exporter",
            "slipway-frontend",
            "slipway-solver",
            "slipway-spec",
            "slipway-store",
        ],
    ),
    ("slipway-transport", &["slipway-spec", "slipway-store"]),
    ("slipway-daemon", &["slipway-engine", "slipway-spec", "slipway-transport"]),
    ("slipway-client", &["slipway-solver", "slipway-spec", "slipway-store", "slipway-transport"]),
    ("slipway-gateway", &["slipway-frontend", "slipway-spec", "slipway-transport"]),
    ("slipway-cli", &["slipway-client", "slipway-daemon", "slipway-engine", "slipway-spec"]),
    // The tests know the program from outside only.
    ("slipway-tests", &[]),
];

fn metadata() -> Value {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let printed = tool(
        Command::new(cargo)
            .args(["metadata", "--no-deps", "--offline", "--format-version=1", "--manifest-path"])
            .arg(manifest),
    );
    serde_json::from_str(&printed).expect("cargo metadata prints JSON")
}

#[test]
fn crates_depend_on_each_other_only_as_drawn() {
    let metadata = metadata();
    let mut actual = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        let dependencies: BTreeSet<_> = package["dependencies"]
            .as_array()
            .unwrap()
            .iter()
            // A crate's tests may let it meet its peer.
            .filter(|dependency| dependency["kind"] != "dev")
            .filter_map(|dependency| dependency["name"].as_str())
            .filter(|name| name.starts_with("slipway-"))
            .collect();
        actual.insert(package["name"].as_str().unwrap(), dependencies);
    }
    let drawn: BTreeMap<_, BTreeSet<_>> = EDGES
        .iter()
        .map(|(name, dependencies)| (*name, dependencies.iter().copied().collect()))
        .collect();
    assert_eq!(actual, drawn);
}

#[test]
fn the_vocabulary_brings_no_runtime() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    let of = |name: &str| {
        let package = packages.iter().find(|package| package["name"] == name).unwrap();
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        // Tests may use what the crate itself must not.
        let dependencies = dependencies.filter(|dependency| dependency["kind"].is_null());
        dependencies.filter_map(|dependency| dependency["name"].as_str()).collect::<BTreeSet<_>>()
    };
    for name in ["tokio", "rustix", "rusqlite", "reqwest"] {
        assert!(
            !of("slipway-spec").contains(name),
            "spec does no I/O, so it has no use for {name}"
        );
    }
    for name in ["rustix", "rusqlite", "reqwest", "tempfile"] {
        assert!(
            !of("slipway-frontend").contains(name),
            "frontend touches no file or socket, so it has no use for {name}"
        );
    }
}

#[test]
fn no_test_file_is_forgotten() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e");
    let main = std::fs::read_to_string(directory.join("main.rs")).unwrap();
    for entry in std::fs::read_dir(&directory).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let Some(module) = name.strip_suffix(".rs").filter(|module| *module != "main") else {
            continue;
        };
        assert!(
            main.contains(&format!("mod {module};")),
            "tests/e2e/{name} is not named in main.rs"
        );
    }
}
