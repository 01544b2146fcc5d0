//! Writes `src/wire/*.rs` from `proto/*.proto`; run by `make codegen`.
//!
//! The result is checked in, so that nothing of this is compiled in a normal build.

use std::error::Error;
use std::path::Path;

/// The packages and types that others refer to, and where they are in Rust. The build graph is written by hand.
const REFERRED: &[(&str, &str)] = &[
    (".fsutil.types", "crate::wire::fsutil"),
    (".google.rpc", "crate::wire::rpc"),
    (".moby.buildkit.v1.apicaps", "crate::wire::caps"),
    (".moby.buildkit.v1.frontend", "crate::wire::gateway"),
    (".moby.buildkit.v1.sourcepolicy.Policy", "crate::wire::sourcepolicy::Policy"),
    (".moby.buildkit.v1.sourcepolicy.PolicyAction", "crate::wire::sourcepolicy::PolicyAction"),
    (".moby.buildkit.v1.types", "crate::wire::worker"),
    (".pb", "crate::llb::pb"),
];

/// The messages with passwords in them, whose `Debug` must not show them.
const SECRETIVE: &[&str] = &[
    ".moby.filesync.v1.CredentialsResponse",
    ".moby.filesync.v1.FetchTokenResponse",
    ".moby.buildkit.secrets.v1.GetSecretResponse",
];

/// The modules: each is made from the file of its name.
const MODULES: &[&str] = &[
    "auth",
    "caps",
    "content",
    "control",
    "exporter",
    "filesync",
    "fsutil",
    "gateway",
    "health",
    "policysession",
    "rpc",
    "secrets",
    "sourcepolicy",
    "sshforward",
    "trace",
    "upload",
    "worker",
];

fn main() -> Result<(), Box<dyn Error>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let scratch = std::env::temp_dir().join(format!("slipway-codegen-{}", std::process::id()));
    std::fs::create_dir_all(&scratch)?;
    let made = MODULES.iter().try_for_each(|module| generate(here, &scratch, module));
    std::fs::remove_dir_all(&scratch)?;
    made
}

/// Writes one module. Each is compiled by itself: a module is then named as we like, not after its package.
fn generate(here: &Path, scratch: &Path, module: &str) -> Result<(), Box<dyn Error>> {
    let name = format!("{module}.proto");
    let mut files = protox::compile([&name], [here.join("proto")])?;
    for file in &mut files.file {
        if file.name() != name {
            file.service.clear();
        }
    }
    let package = files
        .file
        .iter()
        .find(|file| file.name() == name)
        .map(|file| file.package().to_owned())
        .ok_or_else(|| format!("{name} was not compiled"))?;
    let mut builder = tonic_prost_build::configure()
        .build_transport(false)
        .bytes(".")
        .btree_map(".")
        .skip_debug(SECRETIVE)
        .emit_rerun_if_changed(false)
        .out_dir(scratch);
    // A type of this very package must not be taken for one from elsewhere.
    for (other, path) in REFERRED.iter().filter(|(other, _)| !is_of(other, &package)) {
        builder = builder.extern_path(*other, *path);
    }
    builder.compile_fds(files)?;
    let text = std::fs::read_to_string(scratch.join(format!("{package}.rs")))?;
    std::fs::write(here.join("src/wire").join(format!("{module}.rs")), text)?;
    Ok(())
}

/// Tells whether a package is that package, or a type is in it. The names of types begin with a capital letter.
fn is_of(name: &str, package: &str) -> bool {
    let name = &name[1..];
    let parent = name.rsplit_once('.').filter(|(_, last)| last.starts_with(char::is_uppercase));
    parent.map_or(name, |(parent, _)| parent) == package
}
