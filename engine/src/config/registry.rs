//! `[registry."host"]`: how registries are reached.

use std::path::{Path, PathBuf};

use slipway_store::registry::HostOptions;

use super::document::Section;
use super::error::ConfigError;

/// How one registry is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RegistryConfig {
    /// Hosts to pull from first, in order: `host[:port][/path]`.
    pub mirrors: Vec<String>,
    /// Whether to do without TLS.
    pub http: Option<bool>,
    /// Whether any certificate will do.
    pub insecure: bool,
    /// Authorities to trust besides the system's.
    pub ca: Vec<PathBuf>,
    /// The certificate to show.
    pub key_pair: Option<KeyPair>,
    /// Folders with `*.crt` of authorities, and `*.cert` with `*.key` to show.
    pub tls_config_dirs: Vec<PathBuf>,
}

/// A certificate and its key, as PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyPair {
    /// The certificate.
    pub cert: PathBuf,
    /// The key.
    pub key: PathBuf,
}

impl RegistryConfig {
    pub(super) fn read(mut section: Section<'_, '_>) -> Result<Self, ConfigError> {
        let mut key_pair = None;
        if let Some(pairs) = section.take("keypair") {
            let missing = pairs.error("needs both a key and a cert");
            let several = "has more than one pair; the first is used";
            let mut pairs = pairs.into_items()?.into_iter();
            if let Some(first) = pairs.next() {
                let mut section = first.into_section()?;
                let (Some(cert), Some(key)) = (section.path("cert")?, section.path("key")?) else {
                    return Err(missing);
                };
                section.finish();
                key_pair = Some(KeyPair { cert, key });
            }
            if let Some(second) = pairs.next() {
                second.warn(several);
            }
        }
        let config = Self {
            mirrors: section.texts("mirrors")?.unwrap_or_default(),
            http: section.boolean("http")?,
            insecure: section.boolean("insecure")?.unwrap_or_default(),
            ca: section.paths("ca")?,
            key_pair,
            tls_config_dirs: section.paths("tlsconfigdir")?,
        };
        section.finish();
        Ok(config)
    }

    /// Returns the options of the registry client for this host; looks into the folders of certificates.
    ///
    /// # Errors
    /// When a folder cannot be read.
    pub fn host_options(&self, host: &str) -> Result<HostOptions, ConfigError> {
        let mut options = HostOptions {
            plain_http: match self.http {
                // Both together mean TLS of any kind, or none.
                Some(true) if self.insecure => None,
                Some(http) => Some(http),
                // Any certificate will do, but there must be one.
                None if self.insecure && !is_this_machine(host) => Some(false),
                None => None,
            },
            insecure: self.insecure,
            ca_files: self.ca.clone(),
            client_cert: self.key_pair.clone().map(|pair| (pair.cert, pair.key)),
            mirrors: self.mirrors.clone(),
        };
        for folder in &self.tls_config_dirs {
            for file in files(folder)? {
                match file.extension().and_then(|extension| extension.to_str()) {
                    Some("crt") => options.ca_files.push(file),
                    Some("cert") if options.client_cert.is_none() => {
                        let key = file.with_extension("key");
                        options.client_cert = Some((file, key));
                    }
                    _ => {}
                }
            }
        }
        Ok(options)
    }
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let entries = std::fs::read_dir(folder).and_then(|entries| {
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()
    });
    let mut paths = entries.map_err(|error| ConfigError::read(folder, error))?;
    paths.sort();
    Ok(paths)
}

/// Whether a host is one that may go without TLS unasked.
fn is_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(address) => address.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name == "localhost"
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}
