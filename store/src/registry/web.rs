//! Plain downloads from the web, over the same connections as registries: no tokens, no retries, bounded redirects.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use bytes::Bytes;
use http::header::{AUTHORIZATION, COOKIE, LOCATION};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper_util::client::proxy::matcher::Matcher;

use super::error::{RegistryError, RegistryErrorKind};
use super::retry::Timing;
use super::tls::tls_config;
use super::transport::{Payload, Transport, chain_text};
use super::url::Url;
use super::{HostOptions, ProxyOptions};

/// How downloads work.
#[derive(Clone, Debug)]
pub struct WebOptions {
    /// What the client calls itself where a request does not say.
    pub user_agent: String,
    /// Proxies.
    pub proxy: ProxyOptions,
    /// Files with certificate authorities to trust beside the system's.
    pub ca_files: Vec<PathBuf>,
    /// Redirects followed in a row.
    pub max_redirects: usize,
}

impl Default for WebOptions {
    fn default() -> Self {
        Self {
            user_agent: concat!("slipway/", env!("CARGO_PKG_VERSION")).into(),
            proxy: ProxyOptions::default(),
            ca_files: vec![],
            max_redirects: 10,
        }
    }
}

/// A client for plain downloads. Cheap to make and to clone.
#[derive(Clone)]
pub struct Web(Arc<Inner>);

struct Inner {
    options: WebOptions,
    timing: Timing,
    /// One for each name that the client goes by.
    transports: Mutex<HashMap<String, Arc<Transport>>>,
}

impl fmt::Debug for Web {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Web").field("options", &self.0.options).finish_non_exhaustive()
    }
}

/// The head of an answer, and its body to come.
pub struct WebAnswer {
    url: Url,
    status: StatusCode,
    headers: HeaderMap,
    body: Incoming,
    timing: Timing,
}

impl fmt::Debug for WebAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebAnswer").field("url", &self.url).field("status", &self.status).finish()
    }
}

impl Web {
    /// Makes a client; nothing is read or opened yet.
    pub fn new(options: WebOptions) -> Self {
        Self(Arc::new(Inner { options, timing: Timing::default(), transports: Mutex::default() }))
    }

    /// Asks for a URL and follows redirects. The answer is a success, or tells that nothing changed.
    ///
    /// Headers are names and values. Those that tell who asks do not follow a redirect to another place.
    ///
    /// # Errors
    /// When the URL is none, the server cannot be reached, or answers in any other way.
    pub async fn get(
        &self,
        url: &str,
        headers: &[(String, String)],
    ) -> Result<WebAnswer, RegistryError> {
        self.ask(&Method::GET, url, headers).await
    }

    /// Like [`get`](Self::get), for an answer without content.
    ///
    /// # Errors
    /// As for [`get`](Self::get). A server may know of no such question.
    pub async fn head(
        &self,
        url: &str,
        headers: &[(String, String)],
    ) -> Result<WebAnswer, RegistryError> {
        self.ask(&Method::HEAD, url, headers).await
    }

    async fn ask(
        &self,
        method: &Method,
        url: &str,
        headers: &[(String, String)],
    ) -> Result<WebAnswer, RegistryError> {
        let bad = |subject: &str, message: &str| {
            RegistryError::new(RegistryErrorKind::Protocol, subject, message)
        };
        let (user, plain) = split_user(url);
        let mut url = Url::parse(&plain).ok_or_else(|| bad(&plain, "not a usable URL"))?;
        let first = url.clone();
        let mut list = HeaderMap::new();
        let mut agent = self.0.options.user_agent.clone();
        for (name, value) in headers {
            let parsed =
                HeaderName::from_bytes(name.as_bytes()).ok().zip(HeaderValue::from_str(value).ok());
            // The value may be a secret.
            let Some((key, mut value)) = parsed else {
                return Err(bad(&plain, &format!("the header {name:?} cannot be sent")));
            };
            if key == http::header::USER_AGENT {
                value.to_str().unwrap_or_default().clone_into(&mut agent);
                continue;
            }
            value.set_sensitive(key == AUTHORIZATION);
            list.insert(key, value);
        }
        if let Some(user) = user
            && !list.contains_key(AUTHORIZATION)
        {
            let encoded = base64::engine::general_purpose::STANDARD.encode(user);
            if let Ok(mut value) = HeaderValue::from_str(&format!("Basic {encoded}")) {
                value.set_sensitive(true);
                list.insert(AUTHORIZATION, value);
            }
        }
        let transport = self.transport(&agent)?;
        for _ in 0..=self.0.options.max_redirects {
            let answer = transport.send(method, &url, &list, &Payload::Empty).await?;
            let (parts, body) = answer.into_parts();
            let moved = matches!(parts.status.as_u16(), 301 | 302 | 303 | 307 | 308);
            if !moved {
                let status = parts.status;
                if !status.is_success() && status != StatusCode::NOT_MODIFIED {
                    let kind = match status.as_u16() {
                        401 => RegistryErrorKind::Unauthorized,
                        403 => RegistryErrorKind::Denied,
                        404 | 410 => RegistryErrorKind::NotFound,
                        _ => RegistryErrorKind::Protocol,
                    };
                    let text = format!("invalid response status {status}");
                    return Err(RegistryError::new(kind, url.to_string(), text));
                }
                let timing = self.0.timing;
                return Ok(WebAnswer { url, status, headers: parts.headers, body, timing });
            }
            let next = parts
                .headers
                .get(LOCATION)
                .and_then(|location| location.to_str().ok())
                .and_then(|location| url.join(location))
                .ok_or_else(|| bad(&url.to_string(), "it redirects to nowhere"))?;
            if next.is_link_local() && !first.is_link_local() {
                return Err(bad(&url.to_string(), "it redirects to an address of this machine"));
            }
            if !next.same_origin(&url) {
                list.remove(AUTHORIZATION);
                list.remove(COOKIE);
            }
            url = next;
        }
        let limit = self.0.options.max_redirects;
        Err(bad(&first.to_string(), &format!("it redirects more than {limit} times")))
    }

    fn transport(&self, agent: &str) -> Result<Arc<Transport>, RegistryError> {
        let mut known = self.0.transports.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(transport) = known.get(agent) {
            return Ok(Arc::clone(transport));
        }
        let options = &self.0.options;
        let host = HostOptions { ca_files: options.ca_files.clone(), ..HostOptions::default() };
        let tls = tls_config(&host, false)?;
        let proxy = &options.proxy;
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let proxied = proxy.http.is_some() || proxy.https.is_some();
        let proxy = proxied.then(|| {
            let matcher = Matcher::builder().http(text(&proxy.http)).https(text(&proxy.https));
            Arc::new(matcher.no(text(&proxy.no_proxy)).build())
        });
        let value = HeaderValue::from_str(agent).map_err(|_| {
            let message = "must be printable text on one line";
            RegistryError::new(RegistryErrorKind::Local, "user agent", message)
        })?;
        let transport = Arc::new(Transport::new(tls, proxy, value, self.0.timing));
        // Names come from build definitions: not without end.
        if known.len() < 16 {
            known.insert(agent.into(), Arc::clone(&transport));
        }
        Ok(transport)
    }
}

impl WebAnswer {
    /// Whether the server says that what the client has is still right.
    pub fn is_unchanged(&self) -> bool {
        self.status == StatusCode::NOT_MODIFIED
    }

    /// Returns the path of the URL after all redirects.
    pub fn path(&self) -> &str {
        self.url.path()
    }

    /// Returns a header, where it is text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// Returns the size that the server announced.
    pub fn announced_size(&self) -> Option<u64> {
        self.header("content-length")?.parse().ok()
    }

    /// Returns the next bytes, or nothing at the end.
    ///
    /// # Errors
    /// When the connection breaks, stalls, or ends before the announced size.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, RegistryError> {
        let broke = |reason: &str| {
            let message = format!("the download broke: {reason}; try again");
            RegistryError::new(RegistryErrorKind::Unreachable, self.url.to_string(), message)
        };
        loop {
            return match tokio::time::timeout(self.timing.stall, self.body.frame()).await {
                Err(_) => Err(broke("no data arrived for too long")),
                Ok(None) => Ok(None),
                Ok(Some(Err(error))) => Err(broke(&chain_text(&error))),
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => Ok(Some(data)),
                    Err(_trailers) => continue,
                },
            };
        }
    }
}

/// Takes `user:password@` out of a URL.
fn split_user(url: &str) -> (Option<String>, String) {
    let Some((scheme, rest)) = url.split_once("://") else { return (None, url.into()) };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    match rest[..end].rsplit_once('@') {
        Some((user, host)) => (Some(unescape(user)), format!("{scheme}://{host}{}", &rest[end..])),
        None => (None, url.into()),
    }
}

/// Replaces `%` and two hexadecimal digits by the byte that they stand for; bytes that are no text are replaced as well.
pub fn unescape(text: &str) -> String {
    let mut bytes = vec![];
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = (*first == b'%').then(|| tail.get(..2)).flatten();
        let code = code.and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_taken_out_of_urls() {
        let split = |url| split_user(url);
        assert_eq!(split("http://h/a@b"), (None, "http://h/a@b".into()));
        assert_eq!(split("http://u:p%40@h:1/x"), (Some("u:p@".into()), "http://h:1/x".into()));
        assert_eq!(split("x"), (None, "x".into()));
    }
}
