//! BuildKit's gRPC on connections that exist already, for whichever side of them one is on.
//!
//! - [`channel`] calls services at the other end of a connection, [`router`] serves them on one;
//! - [`tunnel`] makes a connection of two streams of messages, which is what a session is;
//! - [`packet`] are the messages of a file transfer, with file modes as the Go language numbers them.
//! - [`health`] says that this side is there;
//! - [`files`] sends a tree (feature `files`).
//!
//! A connection is anything that reads and writes: a socket, a tunnel, the standard streams of a process.

pub mod channel;
#[cfg(feature = "files")]
pub mod files;
pub mod health;
pub mod packet;
pub mod router;
pub mod tunnel;
