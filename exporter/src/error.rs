//! What can go wrong with an output.

/// A failed output.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The options contradict each other or the result.
    #[error("{0}")]
    Invalid(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] slipway_store::Error),
    /// The place where the output goes failed.
    #[error("cannot write {destination}: {source}")]
    Output {
        /// Where it goes.
        destination: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// The result of exporting.
pub type Result<T> = std::result::Result<T, ExportError>;
