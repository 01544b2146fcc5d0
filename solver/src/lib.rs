//! A build graph goes in, snapshots come out.
//!
//! A [`Job`] is one build. It loads marshalled definitions into a graph of vertices, shared by everything that the build
//! asks for, and solves only what is asked: first the *key* of a vertex, which identifies its result without having it,
//! then the result, from the store where the key is known there and by executing the vertex otherwise.
//!
//! Key and result of a vertex are each computed once, whoever asks; a step that several platforms share runs once, and so
//! does one that several builds of a [`Worker`] want at the same time.

pub mod cache;
pub mod capability;
pub mod client;
mod deep;
pub mod device;
pub mod emulation;
pub mod error;
pub mod executor;
mod flight;
mod glob;
pub mod graph;
pub mod job;
pub mod materials;
mod operation;
pub mod policy;
mod scratch;
pub mod source;

pub use client::{DeviceGrants, Entitlements, LocalFiles, LocalFolders, LocalRequest, Services};
pub use error::{Cause, FailedVertex, SolveError};
pub use glob::matches as glob_matches;
pub use job::{Job, Shared, Worker};
pub use operation::exec::StepFolders;
pub use operation::exec::container::{
    Container, ContainerMount, ContainerProcess, ContainerRequest,
};
pub use operation::left::{Base, FailedPart, Left, LeftFolders};

/// Makes the folders of a process on top of layers, outside any build.
///
/// # Errors
/// When a layer cannot be had or the disk fails.
pub fn scratch(
    store: &slipway_store::Store,
    layers: &[slipway_store::snapshot::LayerId],
) -> slipway_store::Result<StepFolders> {
    StepFolders::prepare(store, layers)
}
