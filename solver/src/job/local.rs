//! Folders of the client.

use std::sync::Arc;

use slipway_spec::llb::pb;
use slipway_store::blocking;
use slipway_store::tree::scan::Scan;
use slipway_store::view::View;

use super::Job;
use crate::client::{LocalFiles, LocalRequest};
use crate::error::{Cause, Result, SolveError};
use crate::graph::Vertex;

impl Job {
    pub(super) async fn local_view(&self, vertex: &Arc<Vertex>) -> Result<Arc<View>> {
        let scan = self.local(vertex).await?;
        Ok(blocking::run(move || Ok(Arc::new(View::of_tree(scan.tree()?)))).await?)
    }

    pub(super) async fn local(&self, vertex: &Arc<Vertex>) -> Result<Arc<Scan>> {
        let request = local_request(&vertex.op)?.ok_or_else(|| {
            SolveError::from(Cause::Invalid(format!("{} is not a local source", vertex.name)))
        })?;
        let known = (wanted_session(vertex).map(str::to_owned), request);
        let mut locals = self.0.locals.lock().await;
        if let Some(scan) = locals.get(&known) {
            return Ok(scan.clone());
        }
        let announced = self.start(vertex);
        let scanned = self.folders(vertex).scan(&known.1).await;
        let scan = Arc::new(self.end(vertex, announced, scanned.map_err(SolveError::from))?);
        locals.insert(known, scan.clone());
        Ok(scan)
    }

    /// Returns the client's folders as a local source sees them.
    pub(super) fn folders(&self, vertex: &Vertex) -> Arc<dyn LocalFiles> {
        let own = self.0.client.for_step(&vertex.digest, wanted_session(vertex));
        own.unwrap_or_else(|| self.0.client.clone())
    }
}

/// Whose folder a local source asks for; without, it is that of whoever asked for the build.
fn wanted_session(vertex: &Vertex) -> Option<&str> {
    let pb::op::Op::Source(source) = &vertex.op else { return None };
    source.attrs.get("local.session").map(String::as_str).filter(|session| !session.is_empty())
}

pub(super) fn is_local(op: &pb::op::Op) -> bool {
    matches!(op, pb::op::Op::Source(source) if source.identifier.starts_with("local://"))
}

pub(super) fn local_request(op: &pb::op::Op) -> Result<Option<LocalRequest>> {
    let pb::op::Op::Source(source) = op else { return Ok(None) };
    let Some(name) = source.identifier.strip_prefix("local://") else { return Ok(None) };
    let list = |key: &str| -> Result<Option<Vec<String>>> {
        source
            .attrs
            .get(key)
            .map(|json| {
                serde_json::from_str(json).map_err(|error| {
                    Cause::Invalid(format!("local source {name:?}: {key}: {error}")).into()
                })
            })
            .transpose()
    };
    Ok(Some(LocalRequest {
        name: name.to_owned(),
        follow_paths: list("local.followpaths")?,
        include: list("local.includepattern")?.unwrap_or_default(),
        exclude: list("local.excludepatterns")?.unwrap_or_default(),
        fresh: source.attrs.get("local.differ").is_some_and(|differ| differ == "none"),
    }))
}
