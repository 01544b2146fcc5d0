//! Where bytes go on the side of whoever asked for the build.

use std::fmt::Debug;
use std::io::{self, Write};

/// One stream of output. Nothing is created before the build has succeeded, and nothing half written is left.
pub trait OutputSink: Debug + Send {
    /// Returns what the destination is called in messages.
    fn destination(&self) -> String;

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
