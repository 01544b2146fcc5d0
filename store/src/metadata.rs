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
//! | `segment` | key | which part of which blob holds some entries of a layer |
//!
//! `used` columns hold nanoseconds since 1970, true to [`USED_PRECISION`]: whoever relies on a row sets `used`, unless it
//! was set a moment ago, so that a build in which nothing changed writes nothing. The collector deletes only rows last used
//! longer than that before the oldest living process began.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::config::DbConfig;
use rusqlite::{
    Connection, OpenFlags, OptionalExtension as _, Row, ToSql, Transaction, TransactionBehavior,
};

use crate::error::{Error, ErrorKind, Result};
use crate::lease::now_nanos;

/// The version of the tables below; raised with every change.
const SCHEMA_VERSION: i64 = 4;

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
    level INTEGER, size INTEGER NOT NULL, checked INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (layer, digest)
) WITHOUT ROWID;
CREATE TABLE result (
    key BLOB PRIMARY KEY, layers TEXT NOT NULL, created INTEGER NOT NULL, used INTEGER NOT NULL,
    description TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE alias (key BLOB PRIMARY KEY, target BLOB NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID;
";

/// What version 4 has more: what a layer is to those who look after disk space, and how far the hashes of a blob have come
/// after a segment.
const FROM_3: &str = "
ALTER TABLE layer ADD COLUMN kind TEXT NOT NULL DEFAULT '';
ALTER TABLE segment ADD COLUMN after BLOB;
";

/// What version 3 has more: where segments of layers are.
const FROM_2: &str = "
CREATE TABLE segment (
    key BLOB PRIMARY KEY, blob TEXT NOT NULL, offset INTEGER NOT NULL, members BLOB NOT NULL
) WITHOUT ROWID;
";

/// What version 2 has more: whether a blob was seen to hold its layer.
const FROM_1: &str = "ALTER TABLE layer_blob ADD COLUMN checked INTEGER NOT NULL DEFAULT 0";

/// How long one process waits for another's transaction; each takes milliseconds.
const BUSY_TIMEOUT: Duration = Duration::from_secs(60);

/// How far behind a `used` column may be, in nanoseconds.
pub(crate) const USED_PRECISION: i64 = 600 * 1_000_000_000;

/// A log of this many bytes takes noticeable time to read, which every process that opens the database alone must do.
const LONG_LOG: u64 = 24 * 4096;

/// The open database.
#[derive(Debug)]
pub(crate) struct Metadata {
    connection: Mutex<Connection>,
    log: PathBuf,
}

impl Drop for Metadata {
    /// A log that has grown is folded in, so that the next process need not read it. Nobody waits for others to let go of
    /// it: the last of them will do it.
    fn drop(&mut self) {
        if std::fs::metadata(&self.log).map_or(0, |log| log.len()) < LONG_LOG {
            return;
        }
        let connection = self.lock();
        let folded = connection
            .busy_timeout(Duration::ZERO)
            .and_then(|()| connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())));
        if let Err(error) = folded {
            tracing::debug!(%error, "the log of the database stays long");
        }
    }
}

impl Metadata {
    /// Opens or creates the database.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let describe = |error: rusqlite::Error| {
            let error = Error::from(error);
            Error::new(error.kind(), format!("cannot open the database {}", path.display()))
                .because(error)
        };
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(path, flags).map_err(describe)?;
        connection.busy_timeout(BUSY_TIMEOUT).map_err(describe)?;
        connection.set_prepared_statement_cache_capacity(64);
        // The log is folded in when it has grown, not whenever the last process ends: that would cost each command a few
        // writes that wait for the disk.
        connection
            .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
            .map_err(describe)?;
        let version =
            |c: &Connection| c.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0));
        if version(&connection).map_err(describe)? < SCHEMA_VERSION {
            use_log(&connection).map_err(describe)?;
            let transaction = connection
                .transaction_with_behavior(TransactionBehavior::Immediate)
                .map_err(describe)?;
            // Another process may have been first.
            let before = version(&transaction).map_err(describe)?;
            if before < SCHEMA_VERSION {
                let steps: &[&str] = match before {
                    0 => &[SCHEMA, FROM_2, FROM_3],
                    1 => &[FROM_1, FROM_2, FROM_3],
                    2 => &[FROM_2, FROM_3],
                    _ => &[FROM_3],
                };
                for step in steps {
                    transaction.execute_batch(step).map_err(describe)?;
                }
                transaction
                    .pragma_update(None, "user_version", SCHEMA_VERSION)
                    .map_err(describe)?;
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
        // and what they named is then found again by doing it again. Image names are written durably.
        connection.pragma_update(None, "synchronous", "NORMAL").map_err(describe)?;
        let mut log = path.as_os_str().to_owned();
        log.push("-wal");
        Ok(Self { connection: Mutex::new(connection), log: log.into() })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic while the lock was held left at most an open transaction, which was rolled back.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a statement that finds a row, whose last column is `used`, and says that it is relied on. `mark` does so, with
    /// the time as its second parameter; a row that goes away between the two was not found.
    pub(crate) fn find<K, T>(
        &self,
        key: K,
        select: &str,
        mark: &str,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>>
    where
        K: ToSql,
    {
        let connection = self.lock();
        let found = connection
            .prepare_cached(select)?
            .query_row([&key], |row| {
                Ok((row.get::<_, i64>(row.as_ref().column_count() - 1)?, read(row)?))
            })
            .optional()?;
        let Some((used, found)) = found else { return Ok(None) };
        let now = now_nanos();
        if (0..USED_PRECISION).contains(&now.saturating_sub(used)) {
            return Ok(Some(found));
        }
        let marked = connection.prepare_cached(mark)?.execute((&key, now))?;
        Ok((marked > 0).then_some(found))
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

    /// As [`write`](Self::write), and makes it and everything written before survive a power cut.
    pub(crate) fn write_durably<T>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T>,
    ) -> Result<T> {
        let mut connection = self.lock();
        connection.pragma_update(None, "synchronous", "FULL")?;
        let written = (|| {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let value = work(&transaction)?;
            transaction.commit()?;
            Ok(value)
        })();
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        written
    }
}

/// Switches to the write-ahead log. For this one change SQLite does not wait when another process has the database open,
/// as several may that find a new root at once, so the waiting is done here.
fn use_log(connection: &Connection) -> rusqlite::Result<()> {
    let patience = Instant::now() + BUSY_TIMEOUT;
    loop {
        match connection.pragma_update(None, "journal_mode", "WAL") {
            Err(error)
                if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DatabaseBusy)
                    && Instant::now() < patience =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
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
    fn version_1_is_brought_up_to_date() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metadata.db");
        let raw = Connection::open(&path).unwrap();
        raw.execute_batch(&SCHEMA.replace(" checked INTEGER NOT NULL DEFAULT 0,", "")).unwrap();
        raw.execute("INSERT INTO layer_blob VALUES (1, 'sha256:00', 'm', 'gzip', NULL, 7)", [])
            .unwrap();
        raw.pragma_update(None, "user_version", 1).unwrap();
        drop(raw);
        drop(Metadata::open(&path).unwrap());
        let database = Metadata::open(&path).unwrap();
        let row = database.with(|c| {
            Ok(c.query_row("SELECT size, checked FROM layer_blob", [], |r| {
                Ok((r.get::<_, i64>(0)?, r.get::<_, bool>(1)?))
            })?)
        });
        assert_eq!(row.unwrap(), (7, false));
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
        let count: i64 = database
            .with(|c| Ok(c.query_row("SELECT count(*) FROM alias", [], |r| r.get(0))?))
            .unwrap();
        assert_eq!(count, 80);
    }
}
