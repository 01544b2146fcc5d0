//! Layers, as bytes and as folders.
//!
//! A layer is a set of changes to a tree. It exists in two forms, and this module turns one into the other:
//!
//! - as **bytes**: an (uncompressed) tar archive whose digest is the *diff id*, and its compressed form, the blob that
//!   registries hold ([`tar`], [`compression`]);
//! - as a **folder** in the form overlayfs wants for its lower and upper directories: a removed path is a character
//!   device 0:0, and a directory that hides the one below it carries the `overlay.opaque` attribute ([`apply`],
//!   [`folder`]); [`reduce`] takes out of it what is no change.
//!
//! A pile of folders, base first, can be read as one tree without mounting it ([`stack`], [`tree`]).
//!
//! All code here is synchronous and belongs on blocking threads. Names inside layers are bytes, never text, and no name from
//! a layer is ever used with a path of the host: every operation is relative to an open directory.

pub mod apply;
pub(crate) mod behind;
pub mod compression;
pub(crate) mod expand;
pub mod folder;
mod host;
pub mod reader;
pub mod reduce;
pub mod stack;
pub mod tar;
#[cfg(test)]
mod tests;
pub mod tree;

use std::fmt;
use std::io;

pub(crate) use apply::apply_noting_implied;
pub use apply::{ApplyOptions, ApplyStats, apply};
pub use compression::Compression;
pub use folder::write_folder;
pub use reduce::reduce;
pub use stack::{Follow, LayerStack, Located};
pub use tar::{Entry, EntryKind, TarWriter};
pub use tree::{CopyOptions, copy_tree, write_tree, write_tree_below};

/// Which extended attributes overlayfs uses for its own marks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Overlay {
    /// `trusted.overlay.*`: mounts made by root of the initial user namespace.
    #[default]
    Trusted,
    /// `user.overlay.*`: mounts made inside a user namespace, with the `userxattr` option.
    User,
}

impl Overlay {
    /// Returns the name of the attribute that makes a directory opaque.
    pub fn opaque(self) -> &'static str {
        match self {
            Self::Trusted => "trusted.overlay.opaque",
            Self::User => "user.overlay.opaque",
        }
    }

    /// Returns the name of our own attribute of a directory that has other times than below and no change in it: a mount
    /// shows it, and no archive has it. overlayfs hides all attributes that begin like its own from those who use the mount.
    pub(crate) fn unchanged(self) -> &'static str {
        match self {
            Self::Trusted => "trusted.overlay.slipway.unchanged",
            Self::User => "user.overlay.slipway.unchanged",
        }
    }

    /// Returns the name of the attribute of a renamed directory.
    pub(crate) fn redirect(self) -> &'static str {
        match self {
            Self::Trusted => "trusted.overlay.redirect",
            Self::User => "user.overlay.redirect",
        }
    }

    /// Returns the name of the attribute of a file whose content is still below.
    pub(crate) fn metacopy(self) -> &'static str {
        match self {
            Self::Trusted => "trusted.overlay.metacopy",
            Self::User => "user.overlay.metacopy",
        }
    }
}

/// Reads until the buffer is full or nothing is left, and returns how many bytes there were.
fn read_full(input: &mut (impl io::Read + ?Sized), buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match input.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

/// What kind of thing went wrong with a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerErrorKind {
    /// The archive breaks the rules of the tar format or of layers.
    InvalidArchive,
    /// A path that must exist does not.
    NotFound,
    /// The entry refers to a lower layer, which was not given.
    NeedsLower,
    /// The input is legal but cannot be represented here.
    Unsupported,
    /// The operating system refused an operation.
    Storage,
    /// The archive could not be read, or the output not be written.
    Stream,
}

/// A failure to read, write or convert a layer.
#[derive(Debug, thiserror::Error)]
#[error("{subject}: {detail}")]
pub struct LayerError {
    kind: LayerErrorKind,
    subject: String,
    detail: String,
    source: Option<io::Error>,
}

impl LayerError {
    /// Returns the kind of the failure, for callers that branch on it.
    pub fn kind(&self) -> LayerErrorKind {
        self.kind
    }

    /// Returns the thing that failed, mostly a path inside the layer.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    pub(crate) fn new(
        kind: LayerErrorKind,
        subject: impl fmt::Display,
        detail: impl Into<String>,
    ) -> Self {
        Self { kind, subject: subject.to_string(), detail: detail.into(), source: None }
    }

    pub(crate) fn invalid(path: &[u8], detail: impl Into<String>) -> Self {
        Self::new(
            LayerErrorKind::InvalidArchive,
            show(path),
            format!("invalid layer archive: {}", detail.into()),
        )
    }

    pub(crate) fn storage(path: &[u8], operation: &str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        Self {
            kind: LayerErrorKind::Storage,
            subject: show(path),
            detail: format!("cannot {operation}: {source}"),
            source: Some(source),
        }
    }

    pub(crate) fn stream(path: &[u8], operation: &str, source: io::Error) -> Self {
        Self {
            kind: LayerErrorKind::Stream,
            subject: show(path),
            detail: format!("cannot {operation}: {source}"),
            source: Some(source),
        }
    }
}

/// Shows a path of a layer to people.
pub(crate) fn show(path: &[u8]) -> String {
    if path.is_empty() {
        "layer".to_owned()
    } else {
        format!("layer entry \"{}\"", path.escape_ascii())
    }
}

/// Joins a folder (empty for the root) and a name.
pub(crate) fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() {
        return name.to_vec();
    }
    let mut path = Vec::with_capacity(parent.len() + 1 + name.len());
    path.extend_from_slice(parent);
    path.push(b'/');
    path.extend_from_slice(name);
    path
}

/// Splits a clean path into its parent (empty for the root) and its last name.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}
