//! Support for tests of the whole system: the real binary against real registries, emulators and image tools.
//!
//! A test starts with a [`Sandbox`]: a store, a scratch directory and a configuration of its own, in which it runs
//! `slipway`. When a test fails, every command that it ran is printed with its output. When a test ends, no mount and
//! no process may be left behind; each test checks that without asking for it.
//!
//! - [`Registry`] is Debian's `docker-registry` on a free port of the loopback interface.
//! - [`Server`] stands between `slipway` and a registry to watch or to spoil what they say; alone it counts how often
//!   a `RUN` was executed, since builds see the network of the machine.
//! - [`Daemon`] builds for other runs of `slipway`; what it holds can be compared from one moment to another.
//! - [`Tree`] is what is in a directory, so that two directories can be compared in every respect that an image keeps.
//! - [`Layout`] reads OCI image layouts without any code of slipway.
//!
//! A missing tool or binary fails the test that needs it: nothing is skipped.

mod context;
mod daemon;
mod layout;
mod registry;
mod sandbox;
mod server;
mod tools;
mod tree;

pub use context::Context;
pub use daemon::{Daemon, Holdings};
pub use layout::{Image, Layout};
pub use registry::Registry;
pub use sandbox::{Ran, Running, Sandbox, Slipway};
pub use server::{Reply, Request, Server};
pub use tools::{base_archive, foreign_platform, frontend_binary, host_platform, noise, tool};
pub use tree::{Entry, Tree};

/// A base image with a shell and the usual commands, for linux/amd64 and linux/arm64.
pub const BASE: &str = "slipway.local/debian:base";
/// [`BASE`] and a C compiler, as one more layer.
pub const DEV: &str = "slipway.local/debian:dev";
