//! `buildkitd.toml` and `slipway.toml`, which have the same keys.
//!
//! Everything is read and nothing decided: a value that is missing stays missing, so that flags and defaults can be
//! told from it. Keys nobody knows are warnings, since files are written for other versions too.
//!
//! ```
//! use slipway_engine::config::DaemonConfig;
//!
//! let text = "root = '/data'\n[registry.'docker.io']\nmirrors = ['localhost:5000']\n";
//! let (config, warnings) = DaemonConfig::parse(text)?;
//! assert_eq!(config.root.unwrap(), std::path::Path::new("/data"));
//! assert!(warnings.is_empty());
//! # Ok::<(), slipway_engine::config::ConfigError>(())
//! ```

mod document;
mod error;
mod registry;
mod size;
#[cfg(test)]
mod tests;
mod time;
mod worker;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use slipway_store::registry::HostOptions;

use self::document::{Document, Section};

pub use self::error::{ConfigError, ConfigErrorKind, ConfigWarning, Position};
pub use self::registry::{KeyPair, RegistryConfig};
pub use self::size::{DiskSpace, DiskSpaceError};
pub use self::time::parse_duration;
pub use self::worker::{ContainerdConfig, GcConfig, GcPolicy, GcRule, NetworkMode, WorkerConfig};

/// What a daemon is configured with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DaemonConfig {
    /// The state folder.
    pub root: Option<PathBuf>,
    /// What builds may ask for beyond the usual: `network.host`, `security.insecure`, `device`.
    pub insecure_entitlements: Vec<String>,
    /// Whether the network of steps goes through a proxy of the daemon.
    pub proxy_network: bool,
    /// The folder of files that are added to provenance.
    pub provenance_env_dir: Option<PathBuf>,
    /// What is written to the log.
    pub log: LogConfig,
    /// Where to listen.
    pub grpc: GrpcConfig,
    /// The socket for traces of clients.
    pub otel_socket_path: Option<PathBuf>,
    /// Devices.
    pub cdi: CdiConfig,
    /// Name servers of steps, in place of the machine's.
    pub dns: Option<DnsConfig>,
    /// How long finished builds are remembered.
    pub history: HistoryConfig,
    /// The worker.
    pub worker: WorkerConfig,
    /// A worker that is not there.
    pub containerd: ContainerdConfig,
    /// Registries, by the host as it stands in references.
    pub registries: BTreeMap<String, RegistryConfig>,
    /// Frontends.
    pub frontends: FrontendConfig,
    /// What else there is.
    pub system: SystemConfig,
}

/// What is written to the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogConfig {
    /// In which form.
    pub format: Option<LogFormat>,
    /// How much: `error`, `warn`, `info`, `debug`, `trace`.
    pub level: Option<LogLevel>,
}

/// The form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// An object to a line.
    Json,
}

impl LogFormat {
    /// Reads a form as it is written.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "text" => Some(Self::Text),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

/// How much is written to the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Only what failed.
    Error,
    /// Also what went differently.
    Warn,
    /// Also one line to a build.
    Info,
    /// Also why.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// Reads a level as it is written.
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text.to_ascii_lowercase().as_str() {
            "panic" | "fatal" | "error" => Self::Error,
            "warn" | "warning" => Self::Warn,
            "info" => Self::Info,
            "debug" => Self::Debug,
            "trace" => Self::Trace,
            _ => return None,
        })
    }

    /// Returns the level as filters of traces have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// Where to listen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GrpcConfig {
    /// Addresses: `unix://`, `tcp://`, `fd://`.
    pub addresses: Vec<String>,
    /// Where a debugger may ask.
    pub debug_address: Option<String>,
    /// The owner of sockets.
    pub uid: Option<u32>,
    /// The group of sockets.
    pub gid: Option<u32>,
    /// TLS on `tcp://` and `fd://`.
    pub tls: TlsConfig,
}

/// TLS, as PEM files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsConfig {
    /// The certificate to show.
    pub cert: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
    /// Who must have signed the certificates of clients; without it they need none.
    pub ca: Option<PathBuf>,
}

/// Devices of the container device interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CdiConfig {
    /// Whether there are none.
    pub disabled: Option<bool>,
    /// Folders with descriptions of devices.
    pub spec_dirs: Vec<PathBuf>,
    /// Devices that need no entitlement.
    pub auto_allowed: Vec<String>,
}

/// Name servers of steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DnsConfig {
    /// Addresses.
    pub nameservers: Vec<String>,
    /// Options of the resolver.
    pub options: Vec<String>,
    /// Domains to look names up in.
    pub search_domains: Vec<String>,
}

/// How long finished builds are remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistoryConfig {
    /// For how long at most.
    pub max_age: Duration,
    /// How many at most.
    pub max_entries: u64,
}

impl Default for HistoryConfig {
    /// Two days, fifty builds.
    fn default() -> Self {
        Self { max_age: Duration::from_secs(48 * 60 * 60), max_entries: 50 }
    }
}

/// Which frontends there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrontendConfig {
    /// Whether Dockerfiles can be built without an image.
    pub dockerfile: bool,
    /// Whether images may be frontends.
    pub gateway: bool,
    /// Repositories such images may come from; empty is any.
    pub allowed_repositories: Vec<String>,
}

impl Default for FrontendConfig {
    fn default() -> Self {
        Self { dockerfile: true, gateway: true, allowed_repositories: vec![] }
    }
}

/// What else there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SystemConfig {
    /// How long it is believed which platforms run here.
    pub platforms_cache_max_age: Option<Duration>,
    /// Connections to one registry at the same time.
    pub max_registry_concurrency: Option<usize>,
}

impl DaemonConfig {
    /// Reads a text, and says what in it is passed over.
    ///
    /// # Errors
    /// When it is not TOML or a value makes no sense.
    pub fn parse(text: &str) -> Result<(Self, Vec<ConfigWarning>), ConfigError> {
        let document = Document::new(text);
        let config = Self::read(document.root()?)?;
        Ok((config, document.finish()))
    }

    /// Reads a file; see [`DaemonConfig::parse`].
    ///
    /// # Errors
    /// When the file cannot be read, or as `parse` fails; the error names the file.
    pub fn load(path: &Path) -> Result<(Self, Vec<ConfigWarning>), ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::read(path, error))?;
        Self::parse(&text).map_err(|error| error.in_file(path))
    }

    /// Returns the options of the registry client.
    ///
    /// # Errors
    /// When a folder of certificates cannot be read.
    pub fn registry_options(&self) -> Result<BTreeMap<String, HostOptions>, ConfigError> {
        self.registries
            .iter()
            .map(|(host, config)| Ok((host.clone(), config.host_options(host)?)))
            .collect()
    }

    fn read(mut top: Section<'_, '_>) -> Result<Self, ConfigError> {
        let mut config = Self {
            root: top.path("root")?,
            insecure_entitlements: top.texts("insecure-entitlements")?.unwrap_or_default(),
            proxy_network: top.boolean("proxyNetwork")?.unwrap_or_default(),
            provenance_env_dir: top.path("provenanceEnvDir")?,
            ..Self::default()
        };
        // The older way to say how much is logged.
        let debug = top.boolean("debug")?.unwrap_or_default();
        let trace = top.boolean("trace")?.unwrap_or_default();
        if let Some(section) = top.section("log")? {
            config.log = LogConfig::read(section)?;
        }
        if trace {
            config.log.level = Some(LogLevel::Trace);
        } else if debug && config.log.level.is_none() {
            config.log.level = Some(LogLevel::Debug);
        }
        if let Some(section) = top.section("grpc")? {
            config.grpc = GrpcConfig::read(section)?;
        }
        if let Some(mut section) = top.section("otel")? {
            config.otel_socket_path = section.path("socketPath")?;
            section.finish();
        }
        if let Some(mut section) = top.section("cdi")? {
            config.cdi = CdiConfig {
                disabled: section.boolean("disabled")?,
                spec_dirs: section.paths("specDirs")?,
                auto_allowed: section.texts("autoAllowed")?.unwrap_or_default(),
            };
            section.finish();
        }
        if let Some(mut section) = top.section("dns")? {
            config.dns = Some(DnsConfig {
                nameservers: section.texts("nameservers")?.unwrap_or_default(),
                options: section.texts("options")?.unwrap_or_default(),
                search_domains: section.texts("searchDomains")?.unwrap_or_default(),
            });
            section.finish();
        }
        if let Some(mut section) = top.section("history")? {
            // Zero is how upstream writes the default.
            let max_age = section.duration("maxAge")?.filter(|age| !age.is_zero());
            let max_entries = section.number("maxEntries")?.filter(|entries| *entries > 0);
            let default = HistoryConfig::default();
            config.history = HistoryConfig {
                max_age: max_age.unwrap_or(default.max_age),
                max_entries: max_entries.unwrap_or(default.max_entries),
            };
            section.finish();
        }
        if let Some(mut section) = top.section("worker")? {
            if let Some(section) = section.section("oci")? {
                config.worker = WorkerConfig::read(section)?;
            }
            if let Some(section) = section.section("containerd")? {
                config.containerd = ContainerdConfig::read(section)?;
            }
            section.finish();
        }
        if let Some(section) = top.section("registry")? {
            for (host, value) in section.into_entries() {
                config.registries.insert(host, RegistryConfig::read(value.into_section()?)?);
            }
        }
        if let Some(section) = top.section("frontend")? {
            config.frontends = FrontendConfig::read(section)?;
        }
        if let Some(mut section) = top.section("system")? {
            config.system = SystemConfig {
                platforms_cache_max_age: section.duration("platformsCacheMaxAge")?,
                max_registry_concurrency: section
                    .number::<usize>("maxRegistryConcurrency")?
                    .filter(|connections| *connections > 0),
            };
            section.finish();
        }
        top.ignore(&["cache"]);
        top.finish();
        Ok(config)
    }
}

impl LogConfig {
    fn read(mut section: Section<'_, '_>) -> Result<Self, ConfigError> {
        let mut log = Self::default();
        if let Some(value) = section.take("format") {
            let error = value.error("must be text or json");
            let text = value.into_text()?;
            if !text.is_empty() {
                log.format = Some(LogFormat::parse(&text).ok_or(error)?);
            }
        }
        if let Some(value) = section.take("level") {
            let error = value.error("must be error, warn, info, debug or trace");
            let text = value.into_text()?;
            if !text.is_empty() {
                log.level = Some(LogLevel::parse(&text).ok_or(error)?);
            }
        }
        section.finish();
        Ok(log)
    }
}

impl GrpcConfig {
    fn read(mut section: Section<'_, '_>) -> Result<Self, ConfigError> {
        let mut grpc = Self {
            addresses: section.texts("address")?.unwrap_or_default(),
            debug_address: section.text("debugAddress")?,
            uid: section.number("uid")?,
            gid: section.number("gid")?,
            tls: TlsConfig::default(),
        };
        if let Some(mut section) = section.section("tls")? {
            grpc.tls = TlsConfig {
                cert: section.path("cert")?,
                key: section.path("key")?,
                ca: section.path("ca")?,
            };
            section.finish();
        }
        // For named pipes of Windows.
        section.ignore(&["securityDescriptor"]);
        section.finish();
        Ok(grpc)
    }
}

impl FrontendConfig {
    fn read(mut section: Section<'_, '_>) -> Result<Self, ConfigError> {
        let mut frontends = Self::default();
        if let Some(mut section) = section.section("dockerfile.v0")? {
            frontends.dockerfile = section.boolean("enabled")?.unwrap_or(true);
            section.finish();
        }
        if let Some(mut section) = section.section("gateway.v0")? {
            frontends.gateway = section.boolean("enabled")?.unwrap_or(true);
            frontends.allowed_repositories =
                section.texts("allowedRepositories")?.unwrap_or_default();
            section.finish();
        }
        section.finish();
        Ok(frontends)
    }
}
