//! What is remembered about each host one talks to.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::HeaderValue;
use hyper_util::client::proxy::matcher::Matcher;
use rustls::ClientConfig;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::HostOptions;
use super::error::RegistryError;
use super::retry::Timing;
use super::transport::Transport;
use super::url::{Scheme, Url, is_loopback, port_of};

/// How long a finding about a host's scheme is believed. A registry that is set up anew with TLS
/// on the same port is then found without a restart.
const SCHEME_LIFETIME: Duration = Duration::from_secs(600);

/// One `host[:port]`: its connections, its limits, and whether it speaks TLS.
pub(crate) struct Host {
    authority: String,
    transport: Transport,
    plain: Plain,
    scheme: tokio::sync::Mutex<Option<(Scheme, Instant)>>,
    transfers: Arc<Semaphore>,
    paused_until: Mutex<Option<Instant>>,
}

/// Whether a host may be spoken to without TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plain {
    Never,
    Always,
    /// When its port does not answer to TLS.
    Fallback,
}

impl Host {
    pub(crate) fn new(
        authority: &str,
        options: &HostOptions,
        transfers: usize,
        proxy: Option<Arc<Matcher>>,
        user_agent: HeaderValue,
        timing: Timing,
        tls: Arc<ClientConfig>,
    ) -> Self {
        let loopback = is_loopback(authority);
        let plain = match options.plain_http {
            Some(true) => Plain::Always,
            Some(false) => Plain::Never,
            None if options.insecure || loopback => Plain::Fallback,
            None => Plain::Never,
        };
        let proxy = if loopback { None } else { proxy };
        Self {
            authority: authority.into(),
            transport: Transport::new(tls, proxy, user_agent, timing),
            plain,
            scheme: tokio::sync::Mutex::new(None),
            transfers: Arc::new(Semaphore::new(transfers.max(1))),
            paused_until: Mutex::new(None),
        }
    }

    /// Whether this host's certificate goes unchecked.
    pub(crate) fn is_insecure(authority: &str, options: &HostOptions) -> bool {
        // As Docker does: this machine's own registries are rarely given a certificate. A
        // configured authority says that this one is.
        options.insecure || (is_loopback(authority) && options.ca_files.is_empty())
    }

    pub(crate) fn authority(&self) -> &str {
        &self.authority
    }

    pub(crate) fn transport(&self) -> &Transport {
        &self.transport
    }

    /// Whether the user, or Docker's rule for loopback, accepts this host without TLS.
    pub(crate) fn allows_plain(&self) -> bool {
        self.plain != Plain::Never
    }

    /// Returns how to speak to this host, after asking it where that is open.
    pub(crate) async fn scheme(&self) -> Result<Scheme, RegistryError> {
        match self.plain {
            Plain::Always => return Ok(Scheme::Http),
            Plain::Never => return Ok(Scheme::Https),
            Plain::Fallback => {}
        }
        let mut known = self.scheme.lock().await;
        if let Some((scheme, at)) = *known
            && at.elapsed() < SCHEME_LIFETIME
        {
            return Ok(scheme);
        }
        let url = Url::new(Scheme::Https, &self.authority, "/");
        let found = match self.transport.speaks_tls(&url).await {
            Ok(true) => Scheme::Https,
            Ok(false) => Scheme::Http,
            // With a port, plain HTTP would knock at the same closed door; without, it is another door.
            Err(error) if port_of(&self.authority).is_some() => return Err(error),
            Err(_) => Scheme::Http,
        };
        tracing::debug!(
            host = self.authority,
            scheme = found.as_str(),
            "found out how to speak to the registry"
        );
        *known = Some((found, Instant::now()));
        Ok(found)
    }

    /// Forgets how to speak to this host, after it could not be reached that way.
    pub(crate) async fn forget_scheme(&self) {
        *self.scheme.lock().await = None;
    }

    /// Waits for one of this host's places for blob transfers.
    pub(crate) async fn transfer(&self) -> Option<OwnedSemaphorePermit> {
        // The semaphore is never closed, so there always is a permit.
        Arc::clone(&self.transfers).acquire_owned().await.ok()
    }

    /// Holds back every request to this host.
    pub(crate) fn pause(&self, delay: Duration) {
        let until = Instant::now() + delay;
        let mut paused = self.paused_until.lock().unwrap_or_else(PoisonError::into_inner);
        *paused = Some(paused.map_or(until, |before| before.max(until)));
    }

    /// Waits while requests are held back.
    pub(crate) async fn ready(&self) {
        loop {
            let until = *self.paused_until.lock().unwrap_or_else(PoisonError::into_inner);
            match until {
                Some(until) if until > Instant::now() => tokio::time::sleep_until(until).await,
                _ => return,
            }
        }
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host")
            .field("authority", &self.authority)
            .field("plain", &self.plain)
            .finish_non_exhaustive()
    }
}
