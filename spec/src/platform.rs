//! Platforms: `os/architecture[/variant]` in Go's names, as containerd normalises and matches them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What an image runs on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Platform {
    /// CPU architecture, in Go's names.
    pub architecture: String,
    /// Operating system, in Go's names.
    pub os: String,
    /// Version of the operating system, for Windows.
    #[serde(rename = "os.version", default, skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// Features of the operating system that must be there.
    #[serde(rename = "os.features", default, skip_serializing_if = "Vec::is_empty")]
    pub os_features: Vec<String>,
    /// CPU variant, such as `v7`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

/// Why a text is not a platform.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid platform {text:?}: {reason}")]
pub struct PlatformError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

const KNOWN_OS: &[&str] = &[
    "aix",
    "android",
    "darwin",
    "dragonfly",
    "freebsd",
    "hurd",
    "illumos",
    "ios",
    "js",
    "linux",
    "nacl",
    "netbsd",
    "openbsd",
    "plan9",
    "solaris",
    "wasip1",
    "windows",
    "zos",
];
const KNOWN_ARCH: &[&str] = &[
    "386",
    "amd64",
    "amd64p32",
    "arm",
    "armbe",
    "arm64",
    "arm64be",
    "loong64",
    "mips",
    "mipsle",
    "mips64",
    "mips64le",
    "mips64p32",
    "mips64p32le",
    "ppc",
    "ppc64",
    "ppc64le",
    "riscv",
    "riscv64",
    "s390",
    "s390x",
    "sparc",
    "sparc64",
    "wasm",
];

impl Platform {
    /// Makes a normalised platform.
    pub fn new(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        Self {
            os: os.into(),
            architecture: architecture.into(),
            variant: variant.map(Into::into),
            os_version: None,
            os_features: vec![],
        }
        .normalized()
    }

    /// Returns the platform that this program was built for.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "loongarch64" => "loong64",
            "mips64" if cfg!(target_endian = "little") => "mips64le",
            other => other,
        };
        Self::new("linux", architecture, None)
    }

    /// Parses without normalising the variant, as `FROM --platform` does: `arm64/v8` keeps its `v8`.
    ///
    /// # Errors
    /// When there are too many parts, or a single part is neither a known system nor architecture.
    pub fn parse_raw(text: &str) -> Result<Self, PlatformError> {
        let fail = |reason| PlatformError { text: text.into(), reason };
        if text.contains('*') {
            return Err(fail("wildcards are not allowed"));
        }
        let parts: Vec<&str> = text.split('/').collect();
        let mut os_version = None;
        let mut os_features = vec![];
        let mut system = parts[0];
        if let Some((name, rest)) = system.split_once('(') {
            let inner =
                rest.strip_suffix(')').ok_or_else(|| fail("a parenthesis is not closed"))?;
            let mut pieces = inner.split('+');
            os_version = pieces.next().filter(|v| !v.is_empty()).map(Into::into);
            os_features = pieces.map(Into::into).collect();
            system = name;
        }
        let word = |s: &str| {
            !s.is_empty()
                && s.bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-' || b == b'.')
        };
        if !word(system) || !parts[1..].iter().all(|p| word(p)) {
            return Err(fail("expected os/architecture[/variant]"));
        }
        let build = |os: &str, arch: &str, variant: &str| {
            let (architecture, fixed) = normalize_arch(arch, variant);
            Self {
                os: normalize_os(os),
                architecture,
                variant: Some(fixed).filter(|v| !v.is_empty()),
                os_version: os_version.clone(),
                os_features: os_features.clone(),
            }
        };
        match parts.as_slice() {
            [_] => {
                let lower = normalize_os(system);
                let host = Self::host();
                if KNOWN_OS.contains(&lower.as_str()) {
                    return Ok(Self {
                        os: lower,
                        os_version: os_version.clone(),
                        os_features: os_features.clone(),
                        ..host
                    });
                }
                let mut platform = build(&host.os, system, "");
                if platform.architecture == "arm" && platform.variant.as_deref() == Some("v7") {
                    platform.variant = None;
                }
                if KNOWN_ARCH.contains(&platform.architecture.as_str()) {
                    return Ok(platform);
                }
                Err(fail("unknown operating system or architecture"))
            }
            [_, arch] => {
                let mut platform = build(system, arch, "");
                if platform.architecture == "arm" && platform.variant.as_deref() == Some("v7") {
                    platform.variant = None;
                }
                Ok(platform)
            }
            [_, arch, variant] => {
                let mut platform = build(system, arch, variant);
                if platform.architecture == "arm64" && platform.variant.is_none() {
                    platform.variant = Some("v8".into());
                }
                Ok(platform)
            }
            _ => Err(fail("expected os/architecture[/variant]")),
        }
    }

    /// Returns the canonical form: aliases resolved, `arm` as `arm/v7`, `arm64/v8` as `arm64`.
    #[must_use]
    pub fn normalized(&self) -> Self {
        let (architecture, variant) =
            normalize_arch(&self.architecture, self.variant.as_deref().unwrap_or_default());
        Self {
            os: normalize_os(&self.os),
            architecture,
            variant: Some(variant).filter(|v| !v.is_empty()),
            ..self.clone()
        }
    }

    /// Returns how well an image of platform `offered` serves this platform: 0 is exact, larger is worse,
    /// `None` is not at all. Compatible older variants are accepted, as containerd's matcher does.
    pub fn rank(&self, offered: &Self) -> Option<usize> {
        let (want, have) = (self.normalized(), offered.normalized());
        if want.os != have.os || (want.os_version.is_some() && want.os_version != have.os_version) {
            return None;
        }
        if !have
            .os_features
            .iter()
            .all(|feature| want.os_features.is_empty() || want.os_features.contains(feature))
        {
            return None;
        }
        let chain = compatible(&want.architecture, want.variant.as_deref());
        chain
            .iter()
            .position(|(arch, variant)| *arch == have.architecture && *variant == have.variant)
    }

    /// Returns the name with the version and features of the operating system: `windows(10.0.20348)/amd64`. It is read
    /// as the same platform again.
    pub fn full_name(&self) -> String {
        let mut system = self.os_version.clone().unwrap_or_default();
        for feature in &self.os_features {
            system.push('+');
            system.push_str(feature);
        }
        let plain = self.to_string();
        match plain.strip_prefix(self.os.as_str()) {
            Some(rest) if !system.is_empty() => format!("{}({system}){rest}", self.os),
            _ => plain,
        }
    }

    /// Returns a name usable as a folder: `linux_arm64`, `linux_arm_v7`.
    pub fn folder_name(&self) -> String {
        self.full_name().replace('/', "_")
    }
}

fn normalize_os(os: &str) -> String {
    let os = os.to_ascii_lowercase();
    if os == "macos" { "darwin".into() } else { os }
}

fn normalize_arch(arch: &str, variant: &str) -> (String, String) {
    let arch = arch.to_ascii_lowercase();
    let variant = variant.to_ascii_lowercase();
    let (arch, variant) = match (arch.as_str(), variant.as_str()) {
        ("i386" | "i486" | "i586" | "i686", _) => ("386", ""),
        ("x86_64" | "x86-64" | "amd64", "v1" | "") => ("amd64", ""),
        ("x86_64" | "x86-64" | "amd64", v) => ("amd64", v),
        ("aarch64" | "arm64", "8" | "v8" | "v8.0" | "") => ("arm64", ""),
        ("aarch64" | "arm64", "9" | "v9.0") => ("arm64", "v9"),
        ("aarch64" | "arm64", v) => ("arm64", v),
        ("armhf", _) | ("arm", "" | "7") => ("arm", "v7"),
        ("armel", _) | ("arm", "6") => ("arm", "v6"),
        ("arm", "5") => ("arm", "v5"),
        ("arm", "8") => ("arm", "v8"),
        (a, v) => (a, v),
    };
    (arch.into(), variant.into())
}

/// Returns which architectures and variants serve one, best first. One that nobody knows serves itself.
fn compatible<'a>(arch: &'a str, variant: Option<&str>) -> Vec<(&'a str, Option<String>)> {
    let version = |prefix: &str| {
        variant.and_then(|v| v.strip_prefix(prefix)).and_then(|v| v.parse::<u32>().ok())
    };
    match arch {
        "amd64" => {
            let level = version("v").unwrap_or(1).min(4);
            (1..=level).rev().map(|l| ("amd64", (l > 1).then(|| format!("v{l}")))).collect()
        }
        "arm" => {
            let level = version("v").unwrap_or(7).min(8);
            (5..=level.max(5)).rev().map(|l| ("arm", Some(format!("v{l}")))).collect()
        }
        "arm64" => {
            let mut chain = vec![];
            if let Some(v) = variant {
                chain.push(("arm64", Some(v.to_owned())));
            }
            chain.push(("arm64", None));
            chain.extend((5..=8).rev().map(|l| ("arm", Some(format!("v{l}")))));
            chain
        }
        other => vec![(other, variant.map(Into::into))],
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        if text == "local" {
            return Ok(Self::host());
        }
        Ok(Self::parse_raw(text)?.normalized())
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalises_as_containerd() {
        for (text, expected) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64", "linux/amd64"),
            ("linux/amd64/v1", "linux/amd64"),
            ("linux/amd64/v2", "linux/amd64/v2"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("linux/arm/7", "linux/arm/v7"),
            ("linux/i386", "linux/386"),
            ("macos/arm64", "darwin/arm64"),
            ("riscv64", "linux/riscv64"),
            ("Linux/ARM64", "linux/arm64"),
        ] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), expected, "{text}");
        }
        for bad in
            ["", "linux/", "linux/arm/v7/x", "linux/*", "nonsense", "linux/a b", "linux(1/amd64"]
        {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }

    #[test]
    fn versions_of_a_system_make_folders_of_their_own() {
        let old: Platform = "windows(10.0.17763)/amd64".parse().unwrap();
        assert_eq!(old.to_string(), "windows/amd64");
        assert_eq!(old.full_name().parse::<Platform>().unwrap(), old);
        assert_eq!(old.folder_name(), "windows(10.0.17763)_amd64");
        let plain: Platform = "linux/arm/v7".parse().unwrap();
        assert_eq!(
            (plain.full_name(), plain.folder_name()),
            ("linux/arm/v7".into(), "linux_arm_v7".into())
        );
    }

    #[test]
    fn raw_parsing_keeps_what_from_shows() {
        assert_eq!(Platform::parse_raw("linux/arm").unwrap().variant, None);
        assert_eq!(Platform::parse_raw("linux/arm64/v8").unwrap().variant.as_deref(), Some("v8"));
    }

    #[test]
    fn older_variants_serve_newer_ones() {
        let p = |text: &str| text.parse::<Platform>().unwrap();
        assert_eq!(p("linux/arm/v7").rank(&p("linux/arm/v7")), Some(0));
        assert_eq!(p("linux/arm/v7").rank(&p("linux/arm/v6")), Some(1));
        assert_eq!(p("linux/arm/v6").rank(&p("linux/arm/v7")), None);
        assert_eq!(p("linux/amd64/v3").rank(&p("linux/amd64")), Some(2));
        assert_eq!(p("linux/amd64").rank(&p("linux/amd64/v2")), None);
        assert!(p("linux/arm64").rank(&p("linux/arm/v7")).is_some());
        assert_eq!(p("linux/arm64").rank(&p("linux/amd64")), None);
        assert_eq!(p("linux/s390x").rank(&p("linux/s390x")), Some(0));
    }

    #[test]
    fn an_architecture_that_nobody_knows_serves_itself() {
        let p = |text: &str| text.parse::<Platform>().unwrap();
        let wanted = p("windows(1.2.3)/bar");
        assert_eq!(wanted.rank(&p("windows(1.2.3)/bar")), Some(0));
        for other in
            ["windows(1.1.0)/bar", "windows(1.2.3)/baz", "windows(1.2.3)/bar/v1", "linux/bar"]
        {
            assert_eq!(wanted.rank(&p(other)), None, "{other}");
        }
    }
}
