//! The one database: names, blobs, layers, results and what they are made of.
//!
//! Rows are the truth: a file without a row is litter, and a row is written only after its file is in place. Several
//! processes share the database; SQLite's write-ahead log serialises writers and lets readers go on.
//!
//! | table | key | says |
//! |---|---|---|
//! | `blob` | digest | this content is in `content/blobs` |
//! | `image` | name | which descriptor a name points at |
//! | `layer` | id | a layer known here: its diff id, and whether its folder exists |
//! | `layer_blob` | layer, digest | the same layer as a blob, compressed in some way |
//! | `result` | key | the stack of layers that a build step gave |
//! | `alias` | key | another key under which a result is found |
//!
//! `used` columns hold nanoseconds since 1970. Whoever relies on a row sets `used` in the same statement that finds it;
//! the collector deletes only rows last used before the oldest living process began.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};

use crate::error::{Error, ErrorKind, Result};

/// The version of the tables below; raised with every change.
const SCHEMA_VERSION: i64 = 1;

const SCHEMA: &str = "
CREATE TABLE blob (
    digest TEXT PRIMARY KEY, size INTEGER NOT NULL, created INTEGER NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE image (
    name TEXT PRIMARY KEY, descriptor TEXT NOT NULL, created INTEGER NOT NULL, updated INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE layer (
    id INTEGER PRIMARY KEY AUTOINCREMENT, diff_id TEXT, folder INTEGER NOT NULL DEFAULT 0, boot TEXT,
    size INTEGER NOT NULL DEFAULT 0, created INTEGER NOT NULL, used INTEGER NOT NULL, description TEXT NOT NULL DEFAULT ''
);
CREATE INDEX layer_by_diff_id ON layer (diff_id) WHERE diff_id IS NOT NULL;
CREATE TABLE layer_blob (
    layer INTEGER NOT NULL, digest TEXT NOT NULL, media_type TEXT NOT NULL, compression TEXT NOT NULL,
    level INTEGER, size INTEGER NOT NULL, PRIMARY KEY (layer, digest)
) WITHOUT ROWID;
CREATE TABLE result (
    key BLOB PRIMARY KEY, layers TEXT NOT NULL, created INTEGER NOT NULL, used INTEGER NOT NULL,
    description TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE alias (key BLOB PRIMARY KEY, target BLOB NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID;
";

/// The open database.
#[derive(Debug)]
pub(crate) struct Metadata {
    connection: Mutex<Connection>,
}

impl Metadata {
    /// Opens or creates the database.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let describe = |error: rusqlite::Error| {
            let error = Error::from(error);
            Error::new(error.kind(), format!("cannot open the database {}", path.display())).because(error)
        };
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(path, flags).map_err(describe)?;
        connection.busy_timeout(Duration::from_secs(60)).map_err(describe)?;
        connection.set_prepared_statement_cache_capacity(64);
        let version = |c: &Connection| c.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0));
        if version(&connection).map_err(describe)? == 0 {
            connection.pragma_update(None, "journal_mode", "WAL").map_err(describe)?;
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate).map_err(describe)?;
            // Another process may have been first.
            if version(&transaction).map_err(describe)? == 0 {
                transaction.execute_batch(SCHEMA).map_err(describe)?;
                transaction.pragma_update(None, "user_version", SCHEMA_VERSION).map_err(describe)?;
            }
            transaction.commit().map_err(describe)?;
        }
        let found = version(&connection).map_err(describe)?;
        if found > SCHEMA_VERSION {
            return Err(Error::new(
                ErrorKind::TooNew,
                format!(
                    "{} was written by a newer slipway (format {found}, this one knows {SCHEMA_VERSION}); \
                     use that version or another --root",
                    path.display()
                ),
            ));
        }
        // In WAL mode NORMAL keeps the database consistent after a power cut; only the newest transactions may be lost,
        // and what they named is then found again by doing it again. Image names are made durable by `sync`.
        connection.pragma_update(None, "synchronous", "NORMAL").map_err(describe)?;
        Ok(Self { connection: Mutex::new(connection) })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic while the lock was held left at most an open transaction, which was rolled back.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs single statements.
    pub(crate) fn with<T>(&self, work: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
        work(&self.lock())
    }

    /// Runs statements that take effect together or not at all.
    pub(crate) fn write<T>(&self, work: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        let mut connection = self.lock();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let value = work(&transaction)?;
        transaction.commit()?;
        Ok(value)
    }

    /// Makes everything written so far survive a power cut.
    pub(crate) fn sync(&self) -> Result<()> {
        let connection = self.lock();
        connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_format_is_refused_untouched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.db");
        drop(Metadata::open(&path).unwrap());
        let raw = Connection::open(&path).unwrap();
        raw.pragma_update(None, "user_version", SCHEMA_VERSION + 1).unwrap();
        drop(raw);
        assert_eq!(Metadata::open(&path).unwrap_err().kind(), ErrorKind::TooNew);
    }

    #[test]
    fn garbage_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.db");
        std::fs::write(&path, vec![7u8; 8192]).unwrap();
        let error = Metadata::open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("metadata.db"));
    }

    #[test]
    fn two_processes_may_open_it_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.db");
        std::thread::scope(|scope| {
            for n in 0..4 {
                let path = &path;
                scope.spawn(move || {
                    let database = Metadata::open(path).unwrap();
                    for i in 0..20 {
                        database
                            .write(|t| {
                                t.execute(
                                    "INSERT INTO alias VALUES (?1, x'00', 0)",
                                    [format!("{n}-{i}").into_bytes()],
                                )?;
                                Ok(())
                            })
                            .unwrap();
                    }
                });
            }
        });
        let database = Metadata::open(&path).unwrap();
        let count: i64 =
            database.with(|c| Ok(c.query_row("SELECT count(*) FROM alias", [], |r| r.get(0))?)).unwrap();
        assert_eq!(count, 80);
    }
}
