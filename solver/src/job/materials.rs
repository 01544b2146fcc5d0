//! Telling what a result is made from.

use std::collections::HashSet;
use std::sync::Arc;

use slipway_spec::Digest;
use slipway_spec::llb::pb::SourceOp;
use slipway_spec::llb::pb::op::Op;
use slipway_store::snapshot::Snapshot;

use super::Job;
use crate::error::{Cause, Result};
use crate::graph::{Edge, Vertex};
use crate::materials::{BlobMaterial, GitMaterial, HttpMaterial, ImageMaterial, Materials};
use crate::source::file::BlobPlace;
use crate::source::{Found, Outside, outside};

impl Job {
    /// Tells what results are made from, taken together. Sources that nobody has needed yet are asked for what they are.
    ///
    /// # Errors
    /// When a source cannot be found.
    pub async fn materials(&self, edges: impl IntoIterator<Item = &Edge>) -> Result<Materials> {
        let mut materials = Materials::default();
        for vertex in vertices(edges) {
            match &vertex.op {
                Op::Source(source) => self.add_source(&mut materials, &vertex, source).await?,
                Op::Exec(exec) => materials.add_exec(exec),
                // What the graph in it was made from is not told.
                Op::Build(_) => materials.incomplete = true,
                _ => {}
            }
        }
        Ok(materials)
    }

    /// Returns what steps of a result gave, as far as solving it has come across that, by vertex and output.
    pub fn known_results(&self, edge: &Edge) -> Vec<(Digest, usize, Snapshot)> {
        let mut known = vec![];
        for vertex in vertices([edge]) {
            if let Some(Ok(results)) = vertex.results.get() {
                let results = results.iter().enumerate().filter(|(_, it)| !it.layers.is_empty());
                known.extend(results.map(|(at, it)| (vertex.digest.clone(), at, it.clone())));
            }
        }
        known
    }

    async fn add_source(
        &self,
        materials: &mut Materials,
        vertex: &Arc<Vertex>,
        source: &SourceOp,
    ) -> Result<()> {
        let identifier = source.identifier.as_str();
        let (scheme, name) = identifier.split_once("://").unwrap_or(("", identifier));
        match scheme {
            "local" => materials.add_folder(identifier),
            "docker-image" | "oci-layout" => {
                let image = self.image(vertex, source).await?;
                materials.add_image(ImageMaterial {
                    reference: name.to_owned(),
                    platform: vertex.platform.clone(),
                    digest: image.digest,
                    local: scheme == "oci-layout",
                });
            }
            _ => {
                let asked = outside(source)?;
                match (&*self.found(vertex, &asked).await?, &asked) {
                    (Found::Git(commit), Outside::Git(git)) => {
                        let (url, commit) = (git.address(), commit.object().to_owned());
                        materials.add_git(GitMaterial { url, commit });
                        git.secrets().for_each(|id| materials.add_secret(id, true));
                        git.agent().into_iter().for_each(|id| materials.add_ssh(id, true));
                    }
                    (Found::File(file), Outside::Blob(blob)) => materials.add_blob(BlobMaterial {
                        reference: name.to_owned(),
                        digest: file.digest.clone(),
                        local: matches!(blob.place, BlobPlace::Layout(_)),
                    }),
                    (Found::File(file), Outside::Http(_)) => materials.add_http(HttpMaterial {
                        url: identifier.to_owned(),
                        digest: file.digest.clone(),
                    }),
                    _ => {
                        return Err(Cause::Invalid("a source that is something else".into()).into());
                    }
                }
            }
        }
        Ok(())
    }
}

/// Lists all that results need, each once: first what the first one needs.
fn vertices<'a>(edges: impl IntoIterator<Item = &'a Edge>) -> Vec<Arc<Vertex>> {
    let mut all: Vec<Arc<Vertex>> = vec![];
    let mut seen = HashSet::new();
    for edge in edges {
        let mut todo = vec![edge.vertex.clone()];
        while let Some(vertex) = todo.pop() {
            if seen.insert(Arc::as_ptr(&vertex)) {
                todo.extend(vertex.inputs().map(|edge| edge.vertex.clone()));
                all.push(vertex);
            }
        }
    }
    all
}
