//! Results of build steps: which stack of layers a key gave.
//!
//! A key is the identity of a result, computed by the solver from what the step does and what it reads. Another key may
//! be an alias of it: the solver links the definition of a step to the content it turned out to have.

use crate::Store;
use crate::error::{Error, ErrorKind, Result};
use crate::lease::now_nanos;
use crate::snapshot::{LayerId, Snapshot};

/// The identity of a result: a hash made by the solver.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ResultKey(pub [u8; 32]);

impl std::fmt::Debug for ResultKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&slipway_spec::digest::to_hex(&self.0))
    }
}

/// A remembered result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepResult {
    /// The layers, base first.
    pub snapshot: Snapshot,
    /// When the step ran, in nanoseconds since 1970.
    pub created: i64,
}

impl Store {
    /// Returns a remembered result. Its layers may have been lost since: see [`Store::obtainable`].
    ///
    /// # Errors
    /// When the database fails.
    pub fn result(&self, key: &ResultKey) -> Result<Option<StepResult>> {
        let row = self.metadata().find(
            key.0,
            "SELECT layers, created, used FROM result WHERE key = ?1",
            "UPDATE result SET used = ?2 WHERE key = ?1",
            |row| Ok((row.get::<_, String>(0)?, row.get(1)?)),
        )?;
        let Some((layers, created)) = row else { return Ok(None) };
        let layers = layers
            .split_ascii_whitespace()
            .map(|id| id.parse().map(LayerId))
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(|error| {
                Error::new(ErrorKind::Corrupt, format!("result {key:?} in the database"))
                    .because(error)
            })?;
        Ok(Some(StepResult { snapshot: Snapshot { layers }, created }))
    }

    /// Remembers a result, replacing what the key gave before.
    ///
    /// # Errors
    /// When the database fails.
    pub fn remember(&self, key: &ResultKey, result: &StepResult, description: &str) -> Result<()> {
        let layers: Vec<String> =
            result.snapshot.layers.iter().map(|id| id.0.to_string()).collect();
        self.metadata().with(|c| {
            c.prepare_cached("INSERT OR REPLACE INTO result VALUES (?1, ?2, ?3, ?4, ?5)")?
                .execute((key.0, layers.join(" "), result.created, now_nanos(), description))?;
            Ok(())
        })
    }

    /// Returns the key that `key` is another name of.
    ///
    /// # Errors
    /// When the database fails.
    pub fn alias(&self, key: &ResultKey) -> Result<Option<ResultKey>> {
        let target = self.metadata().find(
            key.0,
            "SELECT target, used FROM alias WHERE key = ?1",
            "UPDATE alias SET used = ?2 WHERE key = ?1",
            |row| row.get::<_, [u8; 32]>(0),
        )?;
        Ok(target.map(ResultKey))
    }

    /// Makes `key` another name of `target`.
    ///
    /// # Errors
    /// When the database fails.
    pub fn remember_alias(&self, key: &ResultKey, target: &ResultKey) -> Result<()> {
        self.metadata().with(|c| {
            c.prepare_cached("INSERT OR REPLACE INTO alias VALUES (?1, ?2, ?3)")?.execute((
                key.0,
                target.0,
                now_nanos(),
            ))?;
            Ok(())
        })
    }
}
