//! What can go wrong between a client and the daemon that builds for it.

use std::fmt;

use tonic::{Code, Status};

use crate::failure::RemoteFailure;

/// An error of a client.
#[derive(Debug)]
pub struct ClientError {
    kind: ClientErrorKind,
    subject: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// What callers may branch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientErrorKind {
    /// The address makes no sense, or is of a kind that is not known.
    Address,
    /// The daemon cannot be reached.
    Connect,
    /// The connection broke, or the daemon does not keep to the protocol.
    Protocol,
    /// The daemon cannot do what was asked.
    Unsupported,
    /// Something on this side.
    Local,
    /// The daemon says that a build failed: see [`ClientError::failure`].
    Build,
}

impl ClientError {
    /// Makes an error whose subject is the whole message.
    pub fn new(kind: ClientErrorKind, subject: impl Into<String>) -> Self {
        Self { kind, subject: subject.into(), source: None }
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Describes a call that the daemon refused; `tried` is what it was for.
    pub(crate) fn call(tried: &str, status: &Status) -> Self {
        let kind = match status.code() {
            Code::Unavailable => ClientErrorKind::Connect,
            Code::Unimplemented => ClientErrorKind::Unsupported,
            _ => ClientErrorKind::Protocol,
        };
        Self::new(kind, format!("{tried}: {}", status.message()))
    }

    /// Wraps what the daemon says of a failed build.
    pub(crate) fn build(failure: RemoteFailure) -> Self {
        Self::new(ClientErrorKind::Build, failure.message.clone()).because(failure)
    }

    /// Returns what callers may branch on.
    pub fn kind(&self) -> ClientErrorKind {
        self.kind
    }

    /// Returns what the daemon says of a build that failed.
    pub fn failure(&self) -> Option<&RemoteFailure> {
        self.source.as_deref()?.downcast_ref()
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.subject)?;
        match &self.source {
            Some(source) if self.kind != ClientErrorKind::Build => write!(f, ": {source}"),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for ClientError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<slipway_store::Error> for ClientError {
    fn from(error: slipway_store::Error) -> Self {
        Self::new(ClientErrorKind::Local, error.to_string())
    }
}
