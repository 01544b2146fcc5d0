//! Secrets of the client: asked for when a step needs one, never kept.

use std::fmt::{self, Debug};

use async_trait::async_trait;
use bytes::Bytes;
use slipway_store::Error;

/// No secret has more bytes.
pub const MAX_SECRET: usize = 500 * 1024;

/// The bytes of a secret. `Debug` does not show them.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretBytes(Bytes);

impl SecretBytes {
    /// Wraps bytes.
    pub fn new(bytes: impl Into<Bytes>) -> Self {
        Self(bytes.into())
    }

    /// Returns the bytes, for the one place that needs them.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretBytes")
    }
}

/// Secrets by their ids.
#[async_trait]
pub trait SecretProvider: Debug + Send + Sync {
    /// Returns a secret; `None` when there is none of this id.
    async fn secret(&self, id: &str) -> Result<Option<SecretBytes>, Error>;
}

/// A client without secrets.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoSecrets;

#[async_trait]
impl SecretProvider for NoSecrets {
    async fn secret(&self, _: &str) -> Result<Option<SecretBytes>, Error> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_shown() {
        let secret = SecretBytes::new("hush");
        assert_eq!(format!("{secret:?}"), "SecretBytes");
        assert_eq!(secret.expose(), b"hush");
    }
}
