//! Which platforms' programs run on this machine, and how.
//!
//! Programs for other processors run under QEMU's user emulators. They are found on the host by [`Emulation::detect`]
//! and registered by the sandbox in a `binfmt_misc` of its own (Linux 6.7 and later), so nothing on the host has to be
//! set up or is changed. Where the kernel can't do that, a registration of the host's serves as well.

mod binfmt;
mod elf;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use slipway_spec::platform::Platform;

use self::binfmt::{ARCHITECTURES, Architecture, HostEntry};

/// A sandboxed `binfmt_misc` came with this kernel.
const PRIVATE_TABLE_SINCE: (u32, u32) = (6, 7);
/// The first QEMU that understands the flag for keeping a program's own first argument.
const KEEPS_FIRST_ARGUMENT_SINCE: u32 = 6;
/// The kernel's limit on an interpreter's path.
const MAX_INTERPRETER: usize = 126;

/// Where to look.
#[derive(Clone, Debug)]
pub struct EmulationOptions {
    /// Folders that may hold emulators, the preferred first.
    pub search: Vec<PathBuf>,
    /// The host's `binfmt_misc`.
    pub host_table: PathBuf,
    /// Whether emulators may be registered privately. Without it only the host's registrations count.
    pub private: bool,
}

impl Default for EmulationOptions {
    fn default() -> Self {
        let search = [
            "/usr/local/bin",
            "/usr/bin",
            "/usr/local/libexec",
            "/usr/libexec",
            "/opt/qemu/bin",
            "/bin",
        ];
        Self {
            search: search.map(PathBuf::from).into(),
            host_table: "/proc/sys/fs/binfmt_misc".into(),
            private: true,
        }
    }
}

/// How a platform's programs run here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Support {
    /// On the processor itself.
    Native,
    /// Under this emulator, which the sandbox registers.
    Emulated {
        /// The emulator's path.
        interpreter: PathBuf,
    },
    /// Under an emulator that the host has registered.
    HostRegistration,
    /// Not at all.
    Missing {
        /// What was searched, and what to install.
        reason: String,
    },
}

/// What was found on this machine.
#[derive(Clone, Debug)]
pub struct Emulation {
    host: Platform,
    options: EmulationOptions,
    /// Emulators by architecture.
    emulators: BTreeMap<&'static str, PathBuf>,
    /// Emulators that were found but can't be used, and why.
    unusable: BTreeMap<&'static str, String>,
    /// What the host runs by its own registrations.
    registered: Vec<&'static str>,
    private: bool,
}

impl Emulation {
    /// Looks for emulators and registrations. Reads a few files; runs nothing.
    pub fn detect(options: &EmulationOptions) -> Self {
        let host = Platform::host();
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        let private = options.private
            && kernel_version(&release) >= PRIVATE_TABLE_SINCE
            && known.lines().any(|line| line.split_whitespace().next_back() == Some("binfmt_misc"));
        let (mut emulators, mut unusable) = (BTreeMap::new(), BTreeMap::new());
        for architecture in ARCHITECTURES {
            if runs_natively(&host, &Platform::new("linux", architecture.name, None)) {
                continue;
            }
            match find(architecture, &options.search) {
                Found::Usable(path) => drop(emulators.insert(architecture.name, path)),
                Found::Unusable(reason) => drop(unusable.insert(architecture.name, reason)),
                Found::Nothing => {}
            }
        }
        let entries = host_entries(&options.host_table);
        let registered = ARCHITECTURES
            .iter()
            .filter(|a| entries.iter().any(|entry| entry.runs(a)))
            .map(|a| a.name)
            .collect();
        Self { host, options: options.clone(), emulators, unusable, registered, private }
    }

    /// Returns how a platform's programs run here.
    pub fn runs(&self, platform: &Platform) -> Support {
        let platform = platform.normalized();
        if runs_natively(&self.host, &platform) {
            return Support::Native;
        }
        if platform.os != "linux" {
            return self.missing(format!("only linux programs run on {}", self.host));
        }
        if platform.architecture == self.host.architecture {
            return self.missing(format!("this processor lacks what {platform} programs need"));
        }
        // What the emulators imitate; the newest vector instructions are not among it.
        if platform.architecture == "amd64"
            && matches!(platform.variant.as_deref(), Some("v3" | "v4"))
        {
            return self.missing("the emulator offers no more than amd64/v2".into());
        }
        let name = platform.architecture.as_str();
        match self.emulators.get(name) {
            Some(interpreter) if self.private => Support::Emulated { interpreter: interpreter.clone() },
            _ if self.host_runs(&platform) => Support::HostRegistration,
            Some(interpreter) => self.missing(format!(
                "{} was found, but only Linux {}.{} and later let it be used without registering it; register it \
                 with the host: install the packages qemu-user-static and binfmt-support",
                interpreter.display(),
                PRIVATE_TABLE_SINCE.0,
                PRIVATE_TABLE_SINCE.1,
            )),
            None => self.missing(self.nothing_found(name)),
        }
    }

    /// Returns the platforms that run here, the machine's own first.
    pub fn platforms(&self) -> Vec<Platform> {
        let mut platforms = vec![self.host.clone()];
        let variants = ARCHITECTURES.iter().flat_map(|a| {
            let own: &[Option<&str>] = match a.name {
                "amd64" => &[None, Some("v2"), Some("v3"), Some("v4")],
                "arm" => &[Some("v7"), Some("v6")],
                _ => &[None],
            };
            own.iter().map(|variant| Platform::new("linux", a.name, *variant))
        });
        for platform in variants {
            if !platforms.contains(&platform)
                && !matches!(self.runs(&platform), Support::Missing { .. })
            {
                platforms.push(platform);
            }
        }
        platforms
    }

    /// Returns whether the host itself has registered an emulator that works inside a root file system.
    pub fn host_runs(&self, platform: &Platform) -> bool {
        platform.os == "linux" && self.registered.iter().any(|name| *name == platform.architecture)
    }

    /// Returns what to register: emulators' paths and lines for `binfmt_misc`. Runs emulators to learn their version.
    pub fn registrations(&self) -> Vec<(String, Vec<u8>)> {
        let mut versions: BTreeMap<PathBuf, bool> = BTreeMap::new();
        let mut list = vec![];
        for architecture in ARCHITECTURES {
            let Some(path) = self.emulators.get(architecture.name) else { continue };
            // Emulators side by side come from one package.
            let folder = path.parent().map(Path::to_path_buf).unwrap_or_default();
            let keeps = *versions
                .entry(folder)
                .or_insert_with(|| version(path) >= Some(KEEPS_FIRST_ARGUMENT_SINCE));
            if let Some(text) = path.to_str() {
                list.push((text.to_owned(), architecture.register_line(text, keeps)));
            }
        }
        list
    }

    /// Explains a program whose format the kernel refused although its platform should run.
    pub(crate) fn format_hint(&self, platform: &Platform) -> String {
        let others =
            self.platforms().iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        format!(
            "it is not a {platform} program, or a script without a `#!` line; this machine runs {others}. Is the base \
             image for another platform, or does qemu-user-static need installing?"
        )
    }

    fn missing(&self, reason: String) -> Support {
        Support::Missing { reason }
    }

    fn nothing_found(&self, name: &str) -> String {
        let folders: Vec<String> =
            self.options.search.iter().map(|folder| folder.display().to_string()).collect();
        let searched = match ARCHITECTURES.iter().find(|a| a.name == name) {
            None => return format!("no emulator is known for {name}"),
            Some(architecture) => architecture.programs().join(" or "),
        };
        let unusable =
            self.unusable.get(name).map(|reason| format!("; {reason}")).unwrap_or_default();
        format!(
            "no {searched} in {}, and {} has no entry for it with the flag F{unusable}. Install the package \
             qemu-user-static, or cross-compile with FROM --platform=$BUILDPLATFORM",
            folders.join(", "),
            self.options.host_table.display(),
        )
    }
}

enum Found {
    Usable(PathBuf),
    Unusable(String),
    Nothing,
}

fn find(architecture: &Architecture, folders: &[PathBuf]) -> Found {
    let mut unusable = None;
    for program in architecture.programs() {
        for folder in folders {
            let path = folder.join(&program);
            let Ok(mut file) = File::open(&path) else { continue };
            let mut head = vec![];
            let read = file.by_ref().take(elf::HEAD).read_to_end(&mut head);
            // A dynamic emulator would look for its libraries inside the image.
            if read.is_err() || !elf::is_static(&head) {
                unusable = Some(format!("{} is not statically linked", path.display()));
                continue;
            }
            // The path that the kernel opens, free of links.
            let path = std::fs::canonicalize(&path).unwrap_or(path);
            if path.as_os_str().len() > MAX_INTERPRETER {
                unusable = Some(format!("the path {} is too long for the kernel", path.display()));
                continue;
            }
            return Found::Usable(path);
        }
    }
    unusable.map_or(Found::Nothing, Found::Unusable)
}

fn host_entries(table: &Path) -> Vec<HostEntry> {
    let read = |name: &str| std::fs::read_to_string(table.join(name)).ok();
    if read("status").is_none_or(|status| status.trim() != "enabled") {
        return vec![];
    }
    let Ok(folder) = std::fs::read_dir(table) else { return vec![] };
    folder
        .flatten()
        .filter(|entry| entry.file_name() != "status" && entry.file_name() != "register")
        .filter_map(|entry| HostEntry::parse(&std::fs::read_to_string(entry.path()).ok()?))
        .collect()
}

/// Returns the first number of `qemu-… version 7.2.22 (…)`.
fn version(emulator: &Path) -> Option<u32> {
    let output = std::process::Command::new(emulator).arg("--version").env_clear().output().ok()?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
}

fn parse_version(text: &str) -> Option<u32> {
    let (_, rest) = text.split_once(" version ")?;
    rest.split('.').next()?.parse().ok()
}

fn kernel_version(release: &str) -> (u32, u32) {
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn runs_natively(host: &Platform, platform: &Platform) -> bool {
    if platform.os != host.os {
        return false;
    }
    let variant = platform.variant.as_deref();
    match (host.architecture.as_str(), platform.architecture.as_str()) {
        ("amd64", "amd64") => variant.is_none_or(|level| amd64_level() >= level_number(level)),
        ("amd64", "386") => true,
        ("arm64", "arm") => runs_32_bit_arm(),
        ("arm", "arm") => {
            host.variant.as_deref().map_or(7, level_number) >= variant.map_or(7, level_number)
        }
        (own, other) => own == other,
    }
}

/// `v3` is 3; what is no level is too high for anyone.
fn level_number(variant: &str) -> u32 {
    variant.strip_prefix('v').and_then(|level| level.parse().ok()).unwrap_or(u32::MAX)
}

/// Returns which of the x86-64 ABI's levels this processor reaches.
fn amd64_level() -> u32 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let v2 =
            has!("cmpxchg16b") && has!("popcnt") && has!("sse3") && has!("ssse3") && has!("sse4.2");
        let v3 = v2
            && has!("avx2")
            && has!("bmi1")
            && has!("bmi2")
            && has!("f16c")
            && has!("fma")
            && has!("lzcnt")
            && has!("movbe");
        let v4 = v3
            && has!("avx512f")
            && has!("avx512bw")
            && has!("avx512cd")
            && has!("avx512dq")
            && has!("avx512vl");
        1 + u32::from(v2) + u32::from(v3) + u32::from(v4)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        0
    }
}

/// Many arm64 servers can't run 32-bit programs at all; the kernel lists what those could use if it can.
fn runs_32_bit_arm() -> bool {
    cfg!(target_arch = "aarch64") && Path::new("/proc/sys/abi/cp15_barrier").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn amd64_host() -> Emulation {
        Emulation {
            host: Platform::new("linux", "amd64", None),
            options: EmulationOptions::default(),
            emulators: [("arm64", PathBuf::from("/usr/bin/qemu-aarch64-static"))].into(),
            unusable: BTreeMap::new(),
            registered: vec!["riscv64"],
            private: true,
        }
    }

    #[test]
    fn each_platform_runs_in_the_best_way_there_is() {
        let here = amd64_host();
        let runs = |text: &str| here.runs(&Platform::parse_raw(text).unwrap());
        let arm64 = Support::Emulated { interpreter: "/usr/bin/qemu-aarch64-static".into() };
        assert_eq!(runs("linux/amd64"), Support::Native);
        assert_eq!(runs("linux/386"), Support::Native);
        assert_eq!(runs("linux/arm64"), arm64);
        assert_eq!(runs("linux/arm64/v8"), arm64);
        assert_eq!(runs("linux/riscv64"), Support::HostRegistration);
        for text in ["linux/s390x", "windows/amd64", "linux/amd64/v9", "linux/mips"] {
            assert!(matches!(runs(text), Support::Missing { .. }), "{text}");
        }
    }

    #[test]
    fn what_is_missing_says_what_to_install() {
        let Support::Missing { reason } = amd64_host().runs(&Platform::new("linux", "s390x", None))
        else {
            panic!("it runs");
        };
        assert!(reason.contains("qemu-s390x-static") && reason.contains("/usr/bin"), "{reason}");
        assert!(reason.contains("Install the package qemu-user-static"), "{reason}");
    }

    #[test]
    fn an_old_kernel_needs_the_hosts_registration() {
        let here = Emulation { private: false, ..amd64_host() };
        let Support::Missing { reason } = here.runs(&Platform::new("linux", "arm64", None)) else {
            panic!("it runs");
        };
        assert!(reason.contains("6.7"), "{reason}");
        let here = Emulation { private: false, registered: vec!["arm64"], ..amd64_host() };
        assert_eq!(here.runs(&Platform::new("linux", "arm64", None)), Support::HostRegistration);
    }

    #[test]
    fn the_machines_own_platform_is_listed_first() {
        let platforms = amd64_host().platforms();
        assert_eq!(platforms[0], Platform::new("linux", "amd64", None));
        assert!(platforms.contains(&Platform::new("linux", "arm64", None)));
        assert!(!platforms.contains(&Platform::new("linux", "s390x", None)));
    }

    #[test]
    fn versions_are_read_from_what_programs_print() {
        assert_eq!(parse_version("qemu-aarch64 version 7.2.22 (Debian 1:7.2)\nCopyright"), Some(7));
        assert_eq!(parse_version("something else"), None);
        assert_eq!(kernel_version("6.18.44-fc\n"), (6, 18));
        assert_eq!(kernel_version(""), (0, 0));
    }
}
