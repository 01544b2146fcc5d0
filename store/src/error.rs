//! What can go wrong with bytes at rest: a kind for callers, a subject for people.

use std::fmt;
use std::path::Path;

use slipway_spec::Digest;

/// An error of the store.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    subject: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// What callers may branch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The thing asked for is not there.
    NotFound,
    /// Content does not hash to its digest, or a document contradicts itself.
    Corrupt,
    /// The disk is full or a quota is reached.
    NoSpace,
    /// The state folder was written by a newer version.
    TooNew,
    /// What was asked makes no sense.
    Invalid,
    /// A registry refused or failed.
    Registry,
    /// A system call or the database failed.
    Io,
}

/// The result of store operations.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Makes an error whose subject is the whole message.
    pub fn new(kind: ErrorKind, subject: impl Into<String>) -> Self {
        Self { kind, subject: subject.into(), source: None }
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Returns what callers may branch on.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Wraps a failed system call with what was tried.
    pub fn io(tried: impl fmt::Display, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                ErrorKind::NoSpace
            }
            _ => ErrorKind::Io,
        };
        Self::new(kind, tried.to_string()).because(source)
    }

    pub(crate) fn missing_blob(digest: &Digest) -> Self {
        Self::new(ErrorKind::NotFound, format!("content {digest} is not in the store"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.subject)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        if self.kind == ErrorKind::NoSpace {
            f.write_str("; free some space, for example with \"slipway prune -a\"")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<rusqlite::Error> for Error {
    fn from(source: rusqlite::Error) -> Self {
        let kind = match source.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => ErrorKind::NoSpace,
            Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
                ErrorKind::Corrupt
            }
            _ => ErrorKind::Io,
        };
        Self::new(kind, "metadata database").because(source)
    }
}

/// Adds what was tried to a failed system call.
pub(crate) trait IoContext<T> {
    fn context(self, tried: impl FnOnce() -> String) -> Result<T>;
    fn at(self, verb: &str, path: &Path) -> Result<T>;
}

impl<T, E: Into<std::io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn context(self, tried: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::io(tried(), source.into()))
    }

    fn at(self, verb: &str, path: &Path) -> Result<T> {
        self.context(|| format!("cannot {verb} {}", path.display()))
    }
}
