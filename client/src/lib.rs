//! A client of a build daemon: slipway's own, or a `buildkitd`.
//!
//! - [`address`] says where a daemon is, [`connection`] connects to it;
//! - [`build`] has it build, and [`disk`] asks for what it keeps;
//! - [`session`] is what it may ask of this side meanwhile: folders, secrets, agents, credentials, content, and where
//!   results go;
//! - [`status`] turns what it tells of its progress into events, [`failure`] reads why a build failed.
//!
//! ```text
//! Connection ── Control.Solve, Status, LLBBridge ──▶ daemon
//!      └─ Control.Session ── messages ── HTTP/2, turned around ◀── FileSync | FileSend | Auth | Secrets | SSH | Content
//! ```

pub mod address;
pub mod build;
pub mod connection;
pub mod disk;
pub mod error;
pub mod failure;
pub mod policy;
pub mod session;
pub mod status;

#[cfg(test)]
mod tests;

pub use address::{Address, TlsOptions};
pub use build::{BuildRequest, BuildResult, Typed, build};
pub use connection::Connection;
pub use error::{ClientError, ClientErrorKind};
pub use failure::RemoteFailure;
pub use session::SessionServices;
