//! What can go wrong with a build, as its caller sees it.

use slipway_exporter::ExportError;
use slipway_frontend::{Diagnostic, FrontendError};
use slipway_solver::SolveError;
use slipway_store::registry::RegistryError;

/// An engine that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The state folder.
    #[error(transparent)]
    Store(#[from] slipway_store::Error),
    /// The registry client.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// What is to be added to provenance.
    #[error("cannot use what is to be added to provenance: {0}")]
    Provenance(String),
}

/// A build that failed.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The Dockerfile is wrong, or asks for what is not built yet.
    #[error("failed to solve: {0}")]
    Frontend(#[from] FrontendError),
    /// A step failed.
    #[error("failed to solve: {0}")]
    Solve(#[from] SolveError),
    /// An output failed.
    #[error("failed to export: {0}")]
    Export(#[from] ExportError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] slipway_store::Error),
    /// A registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
}

impl BuildError {
    /// Returns where the user wrote what failed, to be shown as an excerpt: file, text, first and last line.
    pub fn excerpt(&self) -> Option<Excerpt> {
        match self {
            Self::Solve(error) => {
                let vertex = error.vertex.as_ref()?;
                let source = vertex.source.as_ref()?;
                let lines = vertex.ranges.iter().filter_map(|range| {
                    let start = range.start.as_ref()?.line;
                    Some((start, range.end.as_ref().map_or(start, |end| end.line)))
                });
                let (first, last) = lines.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))?;
                let text = String::from_utf8_lossy(&source.data).into_owned();
                // A definition from elsewhere may name lines that its file does not have.
                let count = text.lines().count().max(1);
                let first = usize::try_from(first).ok()?.clamp(1, count);
                let last = usize::try_from(last).ok()?.clamp(first, count);
                Some(Excerpt { file: source.filename.clone(), text, first, last })
            }
            _ => None,
        }
    }

    /// Returns what the frontend has to say, each with its own excerpt.
    pub fn diagnostics(&self) -> Vec<&Diagnostic> {
        match self {
            Self::Frontend(error) => error.diagnostics.iter().collect(),
            _ => vec![],
        }
    }
}

/// Lines of a user's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excerpt {
    /// The file's name.
    pub file: String,
    /// The whole text.
    pub text: String,
    /// The first line that matters, from 1.
    pub first: usize,
    /// The last line that matters.
    pub last: usize,
}
