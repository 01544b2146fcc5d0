//! Where bytes go on the side of whoever asked for the build.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io::{self, Write};

/// One stream of output. Nothing is created before the build has succeeded, and nothing half written is left.
pub trait OutputSink: Debug + Send {
    /// Returns what the destination is called in messages.
    fn destination(&self) -> String;

    /// Says what is going to be written, under the names that clients know from metadata files. Called before the
    /// destination is opened, where anything is known.
    fn describe(&mut self, _known: &BTreeMap<String, serde_json::Value>) {}

    /// Opens the destination.
    ///
    /// # Errors
    /// When it cannot be written.
    fn open(&mut self) -> io::Result<&mut dyn Write>;

    /// Makes what was written visible under its name.
    ///
    /// # Errors
    /// When that fails; the destination is then as it was before.
    fn finish(self: Box<Self>) -> io::Result<()>;
}
