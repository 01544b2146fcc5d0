//! The client of container registries (OCI distribution specification).
//!
//! A [`Registry`] resolves names, pulls manifests and blobs, and pushes them. It fetches tokens, goes through mirrors,
//! follows redirects without taking credentials along, waits when it is asked to, tries again what may pass the second
//! time, and continues a blob where its connection broke. Nothing it returns as a manifest is unverified; the bytes of
//! blobs are verified by whoever writes them.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//! use slipway_store::registry::{Anonymous, Registry, RegistryOptions};
//!
//! let registry = Registry::new(RegistryOptions::default(), Arc::new(Anonymous))?;
//! let debian = "debian:12".parse()?;
//! let (descriptor, bytes) = registry.manifest(&debian, None).await?;
//! # Ok(()) }
//! ```

mod auth;
mod blob;
mod challenge;
pub mod docker_config;
mod error;
mod exchange;
mod host;
mod manifest;
mod push;
mod retry;
mod scope;
mod size;
mod tls;
mod transport;
mod url;
pub mod web;

#[cfg(test)]
mod scripted;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use http::HeaderValue;
use hyper_util::client::proxy::matcher::Matcher;
use rustls::ClientConfig;
use slipway_spec::{Descriptor, Digest, ImageReference, MediaType};

use self::auth::TokenCache;
use self::exchange::Endpoint;
use self::host::Host;
use self::push::Uploads;
use self::retry::Timing;
use self::url::{Scheme, Url, is_loopback};

pub use self::auth::{Anonymous, Credential, Credentials, DOCKER_HUB_KEY, Secret, Token};
pub use self::blob::BlobReader;
pub use self::error::{RegistryError, RegistryErrorKind};
pub use self::push::{ManifestName, Pushed};

/// Is told how many bytes of a blob have left; the number goes back when an upload starts anew.
pub(crate) type Progress<'a> = &'a (dyn Fn(u64) + Send + Sync);

/// The host that Docker Hub's interface is at.
const DOCKER_HUB_API: &str = "registry-1.docker.io";

/// How to reach registries.
#[derive(Clone, Debug)]
pub struct RegistryOptions {
    /// What the client calls itself.
    pub user_agent: String,
    /// Settings of single registries, by the host as it stands in references, such as `docker.io` or `localhost:5000`.
    pub hosts: BTreeMap<String, HostOptions>,
    /// Blobs that are transferred at the same time from or to one host.
    pub max_connections_per_host: usize,
    /// Proxies to go through.
    pub proxy: ProxyOptions,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            user_agent: concat!("slipway/", env!("CARGO_PKG_VERSION")).into(),
            hosts: BTreeMap::new(),
            // As BuildKit does; more is no faster and trips the limits of public registries.
            max_connections_per_host: 4,
            proxy: ProxyOptions::default(),
        }
    }
}

/// How to reach one registry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostOptions {
    /// `true` never uses TLS, `false` always does; without a value only loopback and insecure hosts may go without.
    pub plain_http: Option<bool>,
    /// Accepts any certificate, and plain HTTP where there is no TLS.
    pub insecure: bool,
    /// Authorities to trust besides the system's, as PEM files.
    pub ca_files: Vec<PathBuf>,
    /// A certificate and its key to show to the registry, as PEM files.
    pub client_cert: Option<(PathBuf, PathBuf)>,
    /// Hosts to pull from first, in order: `host`, `host/path` or a URL.
    pub mirrors: Vec<String>,
}

/// Proxies, in the words of the usual environment variables.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ProxyOptions {
    /// For plain HTTP.
    pub http: Option<String>,
    /// For HTTPS.
    pub https: Option<String>,
    /// Hosts to reach directly, separated by commas; this machine always is.
    pub no_proxy: Option<String>,
}

impl fmt::Debug for ProxyOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A proxy's URL may hold a password.
        f.debug_struct("ProxyOptions").field("no_proxy", &self.no_proxy).finish_non_exhaustive()
    }
}

/// A client of registries; clones share connections, tokens and limits.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

/// What all clones share.
pub(crate) struct Inner {
    options: Arc<RegistryOptions>,
    user_agent: HeaderValue,
    proxy: Option<Arc<Matcher>>,
    timing: Timing,
    common_tls: Arc<OnceLock<Arc<ClientConfig>>>,
    hosts: Arc<Mutex<HashMap<String, Arc<Host>>>>,
    uploads: Arc<Uploads>,
    credentials: Arc<dyn Credentials>,
    // Tokens are only for those who have the credentials.
    tokens: TokenCache,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("options", &self.inner.options).finish_non_exhaustive()
    }
}

impl Registry {
    /// Prepares a client; connects to nothing yet.
    ///
    /// # Errors
    /// When an option makes no sense.
    pub fn new(
        options: RegistryOptions,
        credentials: Arc<dyn Credentials>,
    ) -> Result<Self, RegistryError> {
        Self::with_timing(options, credentials, Timing::default())
    }

    pub(crate) fn with_timing(
        options: RegistryOptions,
        credentials: Arc<dyn Credentials>,
        timing: Timing,
    ) -> Result<Self, RegistryError> {
        let bad = |subject: &str, message: &str| {
            RegistryError::new(RegistryErrorKind::Local, subject, message)
        };
        let user_agent = HeaderValue::from_str(&options.user_agent)
            .map_err(|_| bad("user agent", "must be printable text on one line"))?;
        for (host, settings) in &options.hosts {
            for mirror in &settings.mirrors {
                Mirror::parse(mirror).ok_or_else(|| {
                    bad(
                        host,
                        &format!("the mirror {mirror:?} is not of the form host[:port][/path]"),
                    )
                })?;
            }
        }
        let proxy = &options.proxy;
        let proxied = proxy.http.is_some() || proxy.https.is_some();
        let proxy = proxied.then(|| {
            let text = |value: &Option<String>| value.clone().unwrap_or_default();
            let matcher = Matcher::builder().http(text(&proxy.http)).https(text(&proxy.https));
            Arc::new(matcher.no(text(&proxy.no_proxy)).build())
        });
        Ok(Self {
            inner: Arc::new(Inner {
                user_agent,
                proxy,
                credentials,
                timing,
                common_tls: Arc::default(),
                hosts: Arc::default(),
                tokens: TokenCache::default(),
                uploads: Arc::default(),
                options: Arc::new(options),
            }),
        })
    }

    /// Returns a client for somebody else: it shares connections and limits with this one, but no credentials and
    /// no tokens.
    #[must_use]
    pub fn with_credentials(&self, credentials: Arc<dyn Credentials>) -> Self {
        let inner = &self.inner;
        Self {
            inner: Arc::new(Inner {
                options: Arc::clone(&inner.options),
                user_agent: inner.user_agent.clone(),
                proxy: inner.proxy.clone(),
                timing: inner.timing,
                common_tls: Arc::clone(&inner.common_tls),
                hosts: Arc::clone(&inner.hosts),
                uploads: Arc::clone(&inner.uploads),
                credentials,
                tokens: TokenCache::default(),
            }),
        }
    }

    /// Fetches a token for whoever speaks to a registry in place of this client. `host` is what credentials are kept
    /// under, `realm` the URL of the token server.
    ///
    /// # Errors
    /// When the token server refuses, or cannot be reached.
    pub async fn token(
        &self,
        host: &str,
        realm: &str,
        service: Option<&str>,
        scopes: &[String],
    ) -> Result<Token, RegistryError> {
        self.inner.token_for(host, realm, service, scopes).await
    }

    /// Returns what a name points at, without fetching it where the registry allows.
    ///
    /// # Errors
    /// When no mirror and not the registry itself knows the name or answers.
    pub async fn resolve(&self, reference: &ImageReference) -> Result<Descriptor, RegistryError> {
        self.inner.resolve(reference).await
    }

    /// Returns a manifest or index: what the reference names, or what `digest` names in its repository.
    ///
    /// The bytes have been compared with the digest that was asked for, or with the one that the registry claims.
    ///
    /// # Errors
    /// When it is not there, over [`slipway_spec::manifest::MAX_MANIFEST_BYTES`], or not what it should be.
    pub async fn manifest(
        &self,
        reference: &ImageReference,
        digest: Option<&Digest>,
    ) -> Result<(Descriptor, Bytes), RegistryError> {
        self.inner.manifest(reference, digest).await
    }

    /// Starts to read a blob at an offset.
    ///
    /// The reader holds one of the host's places for transfers until it is dropped, so whoever keeps several readers
    /// at once must read them all.
    ///
    /// # Errors
    /// When the blob is not there, or its length is not the descriptor's.
    pub async fn blob(
        &self,
        reference: &ImageReference,
        descriptor: &Descriptor,
        offset: u64,
    ) -> Result<BlobReader, RegistryError> {
        BlobReader::open(Arc::clone(&self.inner), reference, descriptor, offset).await
    }

    /// Whether the registry, not its mirrors, has a blob.
    ///
    /// # Errors
    /// When it does not say.
    pub async fn has_blob(
        &self,
        reference: &ImageReference,
        digest: &Digest,
    ) -> Result<bool, RegistryError> {
        self.inner.has_blob(reference, digest).await
    }

    /// Makes sure that the registry has a blob whose bytes are in `file`.
    ///
    /// `mount_from` are paths of repositories at the same registry that may already hold it, the likeliest first.
    /// The same blob is never sent twice at once. `progress` is told how many bytes have left, and is told a smaller
    /// number when the upload had to start anew.
    ///
    /// # Errors
    /// When the registry does not take it, or the file cannot be read or has another length.
    pub async fn push_blob(
        &self,
        reference: &ImageReference,
        descriptor: &Descriptor,
        file: &Path,
        mount_from: &[String],
        progress: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Pushed, RegistryError> {
        self.inner.push_blob(reference, descriptor, file, mount_from, progress).await
    }

    /// Stores a manifest or index under a tag or its digest; everything it points at must be there already.
    ///
    /// # Errors
    /// When the registry does not take it. [`RegistryErrorKind::NotFound`] means that it misses something the
    /// manifest points at.
    pub async fn push_manifest(
        &self,
        reference: &ImageReference,
        name: &ManifestName,
        media_type: &MediaType,
        bytes: Bytes,
    ) -> Result<(), RegistryError> {
        self.inner.push_manifest(reference, name, media_type, bytes).await
    }
}

/// Where a repository may be found, before anybody was asked how to speak to it.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    authority: String,
    scheme: Option<Scheme>,
    repository: String,
    namespace: Option<String>,
    credentials_key: String,
}

/// A mirror as it stands in a configuration.
#[derive(Debug, PartialEq, Eq)]
struct Mirror {
    scheme: Option<Scheme>,
    authority: String,
    /// Stands before the repository's path; ends with a slash unless it is empty.
    prefix: String,
}

impl Mirror {
    fn parse(text: &str) -> Option<Self> {
        let (url, scheme) = if text.contains("://") {
            let url = Url::parse(text)?;
            let scheme = url.scheme();
            (url, Some(scheme))
        } else {
            (Url::parse(&format!("https://{text}"))?, None)
        };
        let path = url.path().trim_matches('/');
        let path = path
            .strip_prefix("v2")
            .filter(|rest| rest.is_empty() || rest.starts_with('/'))
            .unwrap_or(path);
        let path = path.trim_matches('/');
        let prefix = if path.is_empty() { String::new() } else { format!("{path}/") };
        Some(Self { scheme, authority: url.authority().into(), prefix })
    }
}

impl Inner {
    /// Returns the registry itself.
    pub(crate) fn origin(&self, reference: &ImageReference) -> Candidate {
        let hub = reference.host() == slipway_spec::reference::DEFAULT_HOST;
        let authority = if hub { DOCKER_HUB_API } else { reference.host() };
        Candidate {
            authority: authority.into(),
            scheme: None,
            repository: reference.path().into(),
            namespace: None,
            credentials_key: if hub { DOCKER_HUB_KEY.into() } else { authority.into() },
        }
    }

    /// Returns where to pull from, in order; the registry itself is last.
    pub(crate) fn candidates(&self, reference: &ImageReference) -> Vec<Candidate> {
        let mirrors = self
            .options
            .hosts
            .get(reference.host())
            .map(|host| host.mirrors.as_slice())
            .unwrap_or_default();
        let mirrors =
            mirrors.iter().filter_map(|text| Mirror::parse(text)).map(|mirror| Candidate {
                credentials_key: mirror.authority.clone(),
                authority: mirror.authority,
                scheme: mirror.scheme,
                repository: format!("{}{}", mirror.prefix, reference.path()),
                namespace: Some(reference.host().into()),
            });
        mirrors.chain([self.origin(reference)]).collect()
    }

    /// Finds out how to speak to a candidate.
    pub(crate) async fn endpoint(&self, candidate: &Candidate) -> Result<Endpoint, RegistryError> {
        let host = self.host(&candidate.authority)?;
        let scheme = match candidate.scheme {
            Some(scheme) => scheme,
            None => host.scheme().await?,
        };
        Ok(Endpoint {
            host,
            scheme,
            repository: candidate.repository.clone(),
            namespace: candidate.namespace.clone(),
            credentials_key: candidate.credentials_key.clone(),
        })
    }

    /// Returns what is shared by all requests to a host.
    pub(crate) fn host(&self, authority: &str) -> Result<Arc<Host>, RegistryError> {
        let authority = authority.to_ascii_lowercase();
        if let Some(host) = self.lock_hosts().get(&authority) {
            return Ok(Arc::clone(host));
        }
        let unset = HostOptions::default();
        let configured = self.options.hosts.iter().find(|(name, _)| {
            name.eq_ignore_ascii_case(&authority)
                || (*name == "docker.io" && authority == DOCKER_HUB_API)
        });
        let options = configured.map_or(&unset, |(_, options)| options);
        let insecure = Host::is_insecure(&authority, options);
        let common = !insecure && options.ca_files.is_empty() && options.client_cert.is_none();
        let tls = if common {
            // Reading the system's certificates takes a while, and most hosts need the same ones.
            match self.common_tls.get() {
                Some(tls) => Arc::clone(tls),
                None => Arc::clone(self.common_tls.get_or_init({
                    let tls = tls::tls_config(&unset, false)?;
                    move || tls
                })),
            }
        } else {
            tls::tls_config(options, insecure)?
        };
        let host = Host::new(
            &authority,
            options,
            self.options.max_connections_per_host,
            self.proxy.clone().filter(|_| !is_loopback(&authority)),
            self.user_agent.clone(),
            self.timing,
            tls,
        );
        Ok(Arc::clone(self.lock_hosts().entry(authority).or_insert_with(|| Arc::new(host))))
    }

    fn lock_hosts(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Host>>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
