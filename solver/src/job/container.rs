//! Containers on results of a build.

use super::Job;
use super::key::output_key;
use crate::error::Result;
use crate::graph::Edge;
use crate::operation::exec::container::{Container, ContainerRequest};
use crate::operation::left::Base;

use slipway_store::result::ResultKey;

impl Job {
    /// Has a file system ready to start processes on, and what identifies it.
    ///
    /// # Errors
    /// When a step that it needs fails.
    pub async fn base(&self, edge: &Edge) -> Result<(Base, ResultKey)> {
        let snapshot = self.obtain(edge).await?;
        let key = output_key(&self.key(&edge.vertex).await?, edge.index);
        Ok((Base::Snapshot(snapshot), key))
    }

    /// Prepares a container.
    ///
    /// # Errors
    /// When a mount makes no sense, or the client lacks what it needs.
    pub async fn container(&self, request: ContainerRequest) -> Result<Container> {
        Container::prepare(request, self.store(), &self.0.services).await
    }
}
