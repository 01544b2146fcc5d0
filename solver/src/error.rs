//! What can go wrong while solving: which step, where the user wrote it, and why.

use std::sync::Arc;

use slipway_spec::Digest;
use slipway_spec::llb::{DefinitionError, pb};
use slipway_store::registry::RegistryError;

use crate::executor::ExecError;
use crate::operation::left::Left;

/// A failed step. Cheap to clone: everyone who waited for the step gets the same error.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{cause}")]
pub struct SolveError {
    /// The step, where one is to blame.
    pub vertex: Option<FailedVertex>,
    /// Why.
    pub cause: Arc<Cause>,
    /// What the step left behind, where somebody may want to look into it.
    pub left: Option<Arc<Left>>,
}

/// The step that failed.
#[derive(Clone, Debug)]
pub struct FailedVertex {
    /// Its digest.
    pub digest: Digest,
    /// Its name for people.
    pub name: Arc<str>,
    /// Where the user wrote it, as ranges into [`source`](Self::source).
    pub ranges: Vec<pb::Range>,
    /// The file the user wrote.
    pub source: Option<Arc<pb::SourceInfo>>,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// A process ended with a code that is not a success.
    #[error("process {command:?} did not complete successfully: exit code: {code}{hint}")]
    Exit {
        /// The command line.
        command: String,
        /// The code; 128 and the signal's number when a signal ended it.
        code: i32,
        /// What may help, or nothing.
        hint: String,
    },
    /// A process could not be started.
    #[error("cannot run {command:?}: {error}")]
    Start {
        /// The command line.
        command: String,
        /// Why.
        error: ExecError,
    },
    /// A path that a step reads is not there.
    #[error("{0}")]
    Missing(String),
    /// What a step copies is not there.
    #[error("{what}")]
    MissingSource {
        /// The step that it is looked for in.
        vertex: Digest,
        /// What is not there.
        what: String,
    },
    /// A policy denies a source.
    #[error("{message}")]
    Denied {
        /// Which source, and what was tried.
        message: String,
        /// Why, as the policy says it.
        reasons: Vec<String>,
    },
    /// The definition asks for something impossible.
    #[error("{0}")]
    Invalid(String),
    /// The definition asks for something that is not built yet.
    #[error("{0} is not supported yet")]
    Unsupported(String),
    /// The graph is not well formed.
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] slipway_store::Error),
    /// A registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl<C: Into<Cause>> From<C> for SolveError {
    fn from(cause: C) -> Self {
        Self { vertex: None, cause: Arc::new(cause.into()), left: None }
    }
}

impl SolveError {
    /// Says which step is to blame, unless a step below it was named already.
    #[must_use]
    pub(crate) fn at(mut self, vertex: impl FnOnce() -> FailedVertex) -> Self {
        self.vertex.get_or_insert_with(vertex);
        self
    }

    /// Says what the step left behind.
    #[must_use]
    pub(crate) fn leaving(self, left: Left) -> Self {
        Self { left: Some(Arc::new(left)), ..self }
    }

    /// Gives the step that is to blame a place in what the user wrote, unless it has one.
    #[must_use]
    pub(crate) fn or_place(mut self, user: impl FnOnce() -> FailedVertex) -> Self {
        if let Some(failed) = self.vertex.as_mut().filter(|failed| failed.source.is_none()) {
            let FailedVertex { ranges, source, .. } = user();
            (failed.ranges, failed.source) = (ranges, source);
        }
        self
    }
}

/// The result of solving.
pub type Result<T> = std::result::Result<T, SolveError>;
