//! The sending side of a file transfer: clients send folders that builds read, daemons send results.

mod entries;
mod send;

pub use entries::{Announced, file_type, list};
pub use send::{SendOptions, send};
