//! What can go wrong between this machine and a registry.

use std::fmt;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, StatusCode};
use serde::Deserialize;

use super::retry::retry_after;

/// An error of any kind, as lower layers give it.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What kind of failure it was; callers branch on this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RegistryErrorKind {
    /// The registry does not have it.
    NotFound,
    /// The registry wants a login, or refused the one it got.
    Unauthorized,
    /// The login is good, but may not do this.
    Denied,
    /// The registry asked to slow down for longer than is sensible to wait.
    RateLimited,
    /// No working connection: name, network, certificate, or bytes that stopped flowing.
    Unreachable,
    /// The answer breaks the distribution specification.
    Protocol,
    /// The content is not what its digest says.
    Digest,
    /// A document is over its size limit.
    TooLarge,
    /// The registry failed, several times.
    Server,
    /// The registry or the document uses something that is not supported.
    Unsupported,
    /// Something on this machine: a file to push, a certificate, a credential helper.
    Local,
}

/// A failed conversation with a registry: what was wanted, why it failed, what to do next.
///
/// Neither the subject nor the message ever holds credentials or the query of a signed URL.
#[derive(Debug)]
pub struct RegistryError {
    kind: RegistryErrorKind,
    subject: String,
    message: String,
    source: Option<BoxError>,
    transient: bool,
    wait: Option<Duration>,
}

impl RegistryError {
    /// Describes a failure.
    pub fn new(
        kind: RegistryErrorKind,
        subject: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            subject: subject.into(),
            message: message.into(),
            source: None,
            transient: false,
            wait: None,
        }
    }

    /// Adds the error underneath.
    #[must_use]
    pub fn with_source(self, source: impl Into<BoxError>) -> Self {
        Self { source: Some(source.into()), ..self }
    }

    /// Marks a failure that may well pass when the request is made again.
    #[must_use]
    pub(crate) fn transient(self) -> Self {
        Self { transient: true, ..self }
    }

    /// Marks a failure that has been tried often enough.
    #[must_use]
    pub(crate) fn last(self) -> Self {
        Self { transient: false, ..self }
    }

    /// Says what this was about, where the place of failure could not know.
    #[must_use]
    pub(crate) fn about(self, subject: impl Into<String>) -> Self {
        Self { subject: subject.into(), ..self }
    }

    /// Returns the kind of failure.
    pub fn kind(&self) -> RegistryErrorKind {
        self.kind
    }

    /// Returns the reference, blob or host this is about.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// Returns the reason and the next step, without the subject.
    pub fn message(&self) -> &str {
        &self.message
    }

    pub(crate) fn is_transient(&self) -> bool {
        self.transient
    }

    /// Returns how long the registry asked to wait.
    pub(crate) fn wait(&self) -> Option<Duration> {
        self.wait
    }

    /// Adds a sentence to the message.
    #[must_use]
    pub(crate) fn with_note(mut self, note: &str) -> Self {
        self.message.push_str("; ");
        self.message.push_str(note);
        self
    }

    /// Describes an answer that was not a success.
    pub(crate) fn from_answer(
        subject: &str,
        host: &str,
        status: StatusCode,
        headers: &HeaderMap,
        body: &[u8],
    ) -> Self {
        let kind = kind_of(status, body);
        let told = registry_text(body);
        let mut message = match status {
            // 4xx and 5xx alike: the number helps whoever runs the registry.
            _ if told.is_empty() => format!("{host} answered {status}"),
            _ => format!("{host} answered {}: {told}", status.as_u16()),
        };
        let next = if codes(body).any(|code| code == "MANIFEST_BLOB_UNKNOWN") {
            Some("push what the manifest points at first")
        } else {
            next_step(kind)
        };
        if let Some(next) = next {
            message.push_str("; ");
            message.push_str(next);
        }
        // A spent pull quota lasts for hours, and asking again may count against it.
        let quota = told.to_ascii_lowercase().contains("pull rate limit");
        let wait = retry_after(headers, SystemTime::now());
        let transient = is_transient_status(status) && !quota;
        Self { kind, subject: subject.into(), message, source: None, transient, wait }
    }
}

impl fmt::Display for RegistryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.message)
    }
}

impl std::error::Error for RegistryError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// Whether asking again may help.
pub(crate) fn is_transient_status(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
}

fn kind_of(status: StatusCode, body: &[u8]) -> RegistryErrorKind {
    match status.as_u16() {
        404 | 410 => RegistryErrorKind::NotFound,
        401 | 407 => RegistryErrorKind::Unauthorized,
        // Several registries answer 403 for "please log in".
        403 if codes(body).any(|code| code == "UNAUTHORIZED") => RegistryErrorKind::Unauthorized,
        403 => RegistryErrorKind::Denied,
        413 => RegistryErrorKind::TooLarge,
        429 => RegistryErrorKind::RateLimited,
        // A manifest that names a missing blob is answered with 400 by some and 404 by others.
        400 if codes(body).any(|code| code.ends_with("_UNKNOWN")) => RegistryErrorKind::NotFound,
        400 if codes(body).any(|code| code == "DIGEST_INVALID") => RegistryErrorKind::Digest,
        405 | 415 | 501 => RegistryErrorKind::Unsupported,
        408 | 500.. => RegistryErrorKind::Server,
        _ => RegistryErrorKind::Protocol,
    }
}

fn next_step(kind: RegistryErrorKind) -> Option<&'static str> {
    match kind {
        RegistryErrorKind::NotFound => Some("not found: check the name and the tag"),
        RegistryErrorKind::Unauthorized => {
            Some("log in to this registry, or check that the repository exists")
        }
        RegistryErrorKind::Denied => Some("check that this login may use the repository"),
        RegistryErrorKind::RateLimited => {
            Some("wait, log in for a higher limit, or configure a mirror")
        }
        RegistryErrorKind::Server => Some("try again later, or ask whoever runs the registry"),
        RegistryErrorKind::TooLarge => {
            Some("the registry's limit must be raised for documents of this size")
        }
        RegistryErrorKind::Digest => {
            Some("something between here and the registry changes the data; try again")
        }
        RegistryErrorKind::Unreachable
        | RegistryErrorKind::Protocol
        | RegistryErrorKind::Unsupported
        | RegistryErrorKind::Local => None,
    }
}

#[derive(Deserialize)]
struct ErrorBody {
    #[serde(default)]
    errors: Vec<ErrorItem>,
    // Token servers speak these.
    error: Option<serde_json::Value>,
    error_description: Option<String>,
    details: Option<String>,
    message: Option<String>,
}

#[derive(Deserialize)]
struct ErrorItem {
    #[serde(default)]
    code: serde_json::Value,
    #[serde(default)]
    message: Option<String>,
}

fn codes(body: &[u8]) -> impl Iterator<Item = String> {
    let parsed =
        serde_json::from_slice::<ErrorBody>(body).map(|body| body.errors).unwrap_or_default();
    parsed.into_iter().filter_map(|item| item.code.as_str().map(str::to_owned))
}

/// Returns the registry's own words, made fit for one line of a terminal.
pub(crate) fn registry_text(body: &[u8]) -> String {
    let text = match serde_json::from_slice::<ErrorBody>(body) {
        Ok(body) if !body.errors.is_empty() => {
            let items = body.errors.iter().map(|item| {
                match (item.code.as_str(), item.message.as_deref()) {
                    (Some(code), Some(message)) if !message.is_empty() => {
                        format!("{code}: {message}")
                    }
                    (Some(code), _) => code.to_owned(),
                    (None, message) => message.unwrap_or_default().to_owned(),
                }
            });
            items.collect::<Vec<_>>().join(", ")
        }
        Ok(body) => {
            let error = body.error.as_ref().and_then(serde_json::Value::as_str).map(str::to_owned);
            error
                .into_iter()
                .chain(body.error_description)
                .chain(body.details)
                .chain(body.message)
                .collect::<Vec<_>>()
                .join(": ")
        }
        // An HTML page from a proxy helps nobody.
        Err(_) if body.trim_ascii_start().starts_with(b"<") => String::new(),
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    one_line(&text)
}

/// Replaces control characters, so that a registry cannot draw on the terminal, and shortens.
pub(crate) fn one_line(text: &str) -> String {
    const LIMIT: usize = 300;
    let mut line: String =
        text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).take(LIMIT).collect();
    if text.trim().chars().count() > LIMIT {
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_the_registry_said() {
        for (body, expected) in [
            (
                r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown","detail":{"x":1}}]}"#,
                "MANIFEST_UNKNOWN: manifest unknown",
            ),
            (r#"{"errors":[{"code":"A"},{"message":"b"}]}"#, "A, b"),
            (
                r#"{"error":"invalid_grant","error_description":"bad token"}"#,
                "invalid_grant: bad token",
            ),
            (r#"{"details":"incorrect username or password"}"#, "incorrect username or password"),
            ("<html>502</html>", ""),
            ("too many\x1b[31m requests\n", "too many [31m requests"),
            ("", ""),
        ] {
            assert_eq!(registry_text(body.as_bytes()), expected);
        }
        assert_eq!(registry_text("x".repeat(9000).as_bytes()).chars().count(), 301);
    }

    #[test]
    fn statuses_become_kinds() {
        let kind = |status: u16, body: &str| {
            let status = StatusCode::from_u16(status).unwrap();
            RegistryError::from_answer("x", "h", status, &HeaderMap::new(), body.as_bytes()).kind()
        };
        assert_eq!(kind(404, ""), RegistryErrorKind::NotFound);
        assert_eq!(kind(403, ""), RegistryErrorKind::Denied);
        assert_eq!(
            kind(403, r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#),
            RegistryErrorKind::Unauthorized
        );
        assert_eq!(
            kind(400, r#"{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN"}]}"#),
            RegistryErrorKind::NotFound
        );
        assert_eq!(
            kind(400, r#"{"errors":[{"code":"DIGEST_INVALID"}]}"#),
            RegistryErrorKind::Digest
        );
        assert_eq!(kind(400, "what"), RegistryErrorKind::Protocol);
        assert_eq!(kind(502, ""), RegistryErrorKind::Server);
    }
}
