//! What the tests take from the machine: programs, the base image, the platform.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// Runs a program that is not under test and returns its standard output.
///
/// # Panics
/// When the program is missing or fails.
pub fn tool(command: &mut Command) -> String {
    let Output { status, stdout, stderr } =
        command.stdin(Stdio::null()).output().unwrap_or_else(|error| {
            panic!("cannot start {command:?}: {error}; run \"make e2e-tools\" as root")
        });
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?} failed with {status}\n{stdout}\n{stderr}");
    stdout.into_owned()
}

/// Returns the top of the work tree.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is a folder of the work tree")
}

/// Returns the binary under test: `SLIPWAY_BIN`, or the debug build beside the tests.
pub(crate) fn slipway_binary() -> PathBuf {
    binary("SLIPWAY_BIN", "slipway", "slipway-cli")
}

/// Returns the stand-alone frontend: `SLIPWAY_FRONTEND_BIN`, or the debug build beside the tests.
pub fn frontend_binary() -> PathBuf {
    binary("SLIPWAY_FRONTEND_BIN", "slipway-gateway", "slipway-gateway")
}

fn binary(variable: &str, name: &str, package: &str) -> PathBuf {
    let binary = std::env::var_os(variable).map_or_else(
        || {
            let tests = std::env::current_exe().expect("the path of the test program");
            // target/debug/deps/e2e-…
            tests.ancestors().nth(2).expect("test programs lie two folders deep").join(name)
        },
        PathBuf::from,
    );
    assert!(
        binary.is_file(),
        "no {name} at {}; run \"cargo build -p {package}\" first",
        binary.display()
    );
    binary
}

/// Returns the OCI archive with the base images, made from Debian packages when it is not there yet.
pub fn base_archive() -> &'static Path {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    ARCHIVE.get_or_init(|| {
        let script = repository().join("tests/base-image.sh");
        let printed = tool(Command::new("sh").arg(script).arg(repository().join(".work/base")));
        PathBuf::from(printed.trim_end())
    })
}

/// Returns bytes that do not compress, the same ones each time.
pub fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        // Marsaglia's xorshift.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(length).collect()
}

/// Returns the platform of this machine, one of those of the base images.
pub fn host_platform() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "linux/amd64",
        "aarch64" => "linux/arm64",
        other => panic!("the base images have no platform for {other}"),
    }
}

/// Returns the platform of the base images that this machine must emulate.
pub fn foreign_platform() -> &'static str {
    if host_platform() == "linux/amd64" { "linux/arm64" } else { "linux/amd64" }
}
