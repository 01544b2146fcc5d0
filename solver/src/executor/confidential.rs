//! Bytes that no log may show.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes that `Debug` does not show.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Confidential(Vec<u8>);

impl Confidential {
    /// Returns the bytes, for the one place that needs them.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Confidential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Confidential")
    }
}

impl<B: AsRef<[u8]>> From<B> for Confidential {
    fn from(bytes: B) -> Self {
        Self(bytes.as_ref().to_vec())
    }
}
