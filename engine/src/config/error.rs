//! What is wrong with a configuration file, and where.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A place in a text. Lines and columns begin at 1; columns count characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The line.
    pub line: usize,
    /// The column.
    pub column: usize,
}

/// Something that is passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigWarning {
    /// Where it stands.
    pub position: Position,
    /// What it is.
    pub message: String,
}

impl fmt::Display for ConfigWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.position.line, self.message)
    }
}

/// What kind of trouble it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigErrorKind {
    /// The file, or one that it names, cannot be read.
    Read,
    /// The text is not TOML.
    Syntax,
    /// A setting has a value that makes no sense.
    Value,
}

/// Why a configuration cannot be used.
#[derive(Debug)]
pub struct ConfigError {
    kind: ConfigErrorKind,
    file: Option<PathBuf>,
    position: Option<Position>,
    message: String,
    source: Option<io::Error>,
}

impl ConfigError {
    pub(super) fn syntax(position: Position, message: &str) -> Self {
        // The parser's words may fill several lines.
        let message = message.lines().collect::<Vec<_>>().join(", ");
        Self { position: Some(position), ..Self::new(ConfigErrorKind::Syntax, message) }
    }

    pub(super) fn value(position: Position, message: String) -> Self {
        Self { position: Some(position), ..Self::new(ConfigErrorKind::Value, message) }
    }

    pub(super) fn read(path: &Path, source: io::Error) -> Self {
        let new = Self::new(ConfigErrorKind::Read, format!("cannot be read: {source}"));
        Self { source: Some(source), ..new.in_file(path) }
    }

    fn new(kind: ConfigErrorKind, message: String) -> Self {
        Self { kind, file: None, position: None, message, source: None }
    }

    /// Names the file that the text came from.
    #[must_use]
    pub fn in_file(mut self, file: &Path) -> Self {
        self.file = Some(file.to_path_buf());
        self
    }

    /// Returns what kind of trouble it is.
    pub fn kind(&self) -> ConfigErrorKind {
        self.kind
    }

    /// Returns the place in the text.
    pub fn position(&self) -> Option<Position> {
        self.position
    }

    /// Whether the file does not exist.
    pub fn is_missing(&self) -> bool {
        self.source.as_ref().is_some_and(|error| error.kind() == io::ErrorKind::NotFound)
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, self.position) {
            (Some(file), Some(at)) => write!(f, "{}:{}:{}: ", file.display(), at.line, at.column)?,
            (Some(file), None) => write!(f, "{} ", file.display())?,
            (None, Some(at)) => write!(f, "line {}, column {}: ", at.line, at.column)?,
            (None, None) => {}
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|error| error as _)
    }
}
