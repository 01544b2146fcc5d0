//! The one door from async code to blocking file work.

use crate::error::{Error, ErrorKind, Result};

/// Runs `work` on the blocking pool and returns its result.
///
/// # Errors
/// What `work` returns; or an error when the pool is gone because the program is ending.
pub async fn run<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(stopped) if stopped.is_panic() => std::panic::resume_unwind(stopped.into_panic()),
        Err(stopped) => Err(Error::new(ErrorKind::Io, "the program is ending").because(stopped)),
    }
}
