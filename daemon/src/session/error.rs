//! What goes wrong between the daemon and the services of a client.

use slipway_engine::store;
use tonic::{Code, Status};

/// What kind of failure it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionErrorKind {
    /// No client is connected under that name.
    NoSession,
    /// The client has gone.
    Closed,
    /// The client does not offer this service.
    Unsupported,
    /// The client offers the service, but does not have the thing.
    NotFound,
    /// The client took too long.
    Timeout,
    /// The client broke the protocol.
    Protocol,
    /// The client refused or failed.
    Failed,
}

/// A failed call to a client: what was wanted, and why it failed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{subject}: {message}")]
pub struct SessionError {
    kind: SessionErrorKind,
    subject: String,
    message: String,
    status: Option<Box<Status>>,
}

impl SessionError {
    /// Describes a failure: `subject` is what could not be done.
    pub fn new(
        kind: SessionErrorKind,
        subject: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self { kind, subject: subject.into(), message: message.into(), status: None }
    }

    /// Describes an answer that was not a success.
    pub fn from_status(subject: impl Into<String>, status: Status) -> Self {
        let kind = match status.code() {
            Code::NotFound => SessionErrorKind::NotFound,
            Code::Unimplemented => SessionErrorKind::Unsupported,
            Code::Unavailable => SessionErrorKind::Closed,
            Code::DeadlineExceeded => SessionErrorKind::Timeout,
            _ => SessionErrorKind::Failed,
        };
        let message = match (kind, status.message()) {
            (SessionErrorKind::Unsupported, _) => "the client does not offer this".into(),
            (_, "") => status.code().description().to_owned(),
            (_, message) => plain(message).to_owned(),
        };
        Self { kind, subject: subject.into(), message, status: Some(Box::new(status)) }
    }

    /// Returns the kind of failure.
    pub fn kind(&self) -> SessionErrorKind {
        self.kind
    }

    /// Returns what could not be done.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// Returns the reason, without the subject.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Returns what the client answered, with its details.
    pub fn status(&self) -> Option<&Status> {
        self.status.as_deref()
    }
}

/// Takes off what clients written in Go put before the message of a status that they pass on.
fn plain(message: &str) -> &str {
    let after =
        message.strip_prefix("rpc error: code = ").and_then(|rest| rest.split_once(" desc = "));
    after.map_or(message, |(_, message)| message)
}

impl From<SessionError> for store::Error {
    fn from(error: SessionError) -> Self {
        let kind = match error.kind {
            SessionErrorKind::NotFound => store::ErrorKind::NotFound,
            SessionErrorKind::Protocol => store::ErrorKind::Corrupt,
            _ => store::ErrorKind::Io,
        };
        Self::new(kind, error.subject).because(error.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_becomes_a_kind_and_keeps_its_text() {
        for (status, kind, text) in [
            (Status::not_found("no x"), SessionErrorKind::NotFound, "cannot do it: no x"),
            (
                Status::unimplemented("unknown service a.B"),
                SessionErrorKind::Unsupported,
                "cannot do it: the client does not offer this",
            ),
            (Status::unavailable("gone"), SessionErrorKind::Closed, "cannot do it: gone"),
            (
                Status::deadline_exceeded(""),
                SessionErrorKind::Timeout,
                "cannot do it: Deadline expired before operation could complete",
            ),
            (
                Status::not_found("rpc error: code = NotFound desc = no x: not found"),
                SessionErrorKind::NotFound,
                "cannot do it: no x: not found",
            ),
            (Status::permission_denied("no"), SessionErrorKind::Failed, "cannot do it: no"),
        ] {
            let error = SessionError::from_status("cannot do it", status.clone());
            assert_eq!((error.kind(), error.to_string().as_str()), (kind, text));
            assert_eq!(error.status().map(Status::code), Some(status.code()));
        }
    }

    #[test]
    fn it_reads_the_same_as_an_error_of_the_store() {
        let error = SessionError::new(SessionErrorKind::NotFound, "cannot do it", "no x");
        let store = store::Error::from(error.clone());
        assert_eq!(
            (store.kind(), store.to_string()),
            (store::ErrorKind::NotFound, error.to_string())
        );
    }
}
