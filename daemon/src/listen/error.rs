//! Why an address cannot be listened at.

use std::io;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What kind of trouble it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListenErrorKind {
    /// The address makes no sense.
    Address,
    /// Somebody else is there.
    InUse,
    /// The system refused.
    System,
    /// The files for TLS cannot be used.
    Tls,
}

/// Why an address cannot be listened at.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen: {subject:?} {message}")]
pub struct ListenError {
    kind: ListenErrorKind,
    subject: String,
    message: String,
    #[source]
    source: Option<BoxError>,
}

impl ListenError {
    /// `subject` is the address or file that this is about.
    pub(super) fn new(
        kind: ListenErrorKind,
        subject: impl ToString,
        message: impl Into<String>,
    ) -> Self {
        Self { kind, subject: subject.to_string(), message: message.into(), source: None }
    }

    /// What the system said while it was to do something.
    pub(super) fn system(
        subject: impl ToString,
        action: &str,
        error: impl Into<io::Error>,
    ) -> Self {
        let error = error.into();
        let message = format!("{action}: {error}");
        let kind = match error.kind() {
            io::ErrorKind::AddrInUse => ListenErrorKind::InUse,
            _ => ListenErrorKind::System,
        };
        Self { source: Some(error.into()), ..Self::new(kind, subject, message) }
    }

    /// What is wrong with a file for TLS.
    pub(super) fn tls(subject: impl ToString, error: impl Into<BoxError>) -> Self {
        let error = error.into();
        let message = format!("cannot be used for TLS: {error}");
        Self { source: Some(error), ..Self::new(ListenErrorKind::Tls, subject, message) }
    }

    /// Returns what kind of trouble it is.
    pub fn kind(&self) -> ListenErrorKind {
        self.kind
    }
}
