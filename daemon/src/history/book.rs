//! Records and their blobs on disk.
//!
//! ```text
//! <root>/history/
//!   records.db               one row for each build, and which blobs it holds
//!   blobs/<digest>           logs, errors, traces, documents of results
//! ```
//!
//! Everything but the keys to look records up by is inside the messages that clients get, so that nothing is decoded but what
//! is asked for. A file is in place before a row names it. Nothing waits for the disk: after a power cut the last records may
//! be missing, and a blob that was cut short is not there.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message as _;
use rusqlite::{Connection, OptionalExtension as _, TransactionBehavior, params};
use slipway_engine::store::content::BlobInfo;
use slipway_spec::wire::control::{BuildHistoryRecord, BuildResultInfo, Descriptor};
use slipway_spec::{Digest, Hasher};

/// The version of the tables below; raised with every change.
const VERSION: i64 = 1;

const SCHEMA: &str = "
CREATE TABLE record (
    ref TEXT PRIMARY KEY, created INTEGER NOT NULL, completed INTEGER, pinned INTEGER NOT NULL DEFAULT 0,
    data BLOB NOT NULL
);
CREATE INDEX record_by_created ON record (created, ref);
CREATE INDEX record_by_completed ON record (completed) WHERE pinned = 0;
CREATE INDEX record_open ON record (ref) WHERE completed IS NULL;
CREATE TABLE blob (digest TEXT PRIMARY KEY, size INTEGER NOT NULL, created INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE held (record TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (record, digest)) WITHOUT ROWID;
CREATE INDEX held_by_digest ON held (digest);
";

/// Nobody else uses the database but a person who looks into it.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// What SQLite may keep in memory, in KiB: a daemon that is idle is to be small.
const CACHE_KIB: i64 = 256;

/// Why a record cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// There is no such record.
    #[error("there is no record of the build {0}")]
    Missing(String),
    /// The disk failed.
    #[error("the history of builds: cannot {tried}: {source}")]
    Io {
        /// What was tried.
        tried: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The database failed.
    #[error("the history of builds: {0}")]
    Database(#[from] rusqlite::Error),
    /// The database was written by a later version.
    #[error(
        "{path} was written by a newer slipway (format {found}, this one knows {VERSION}); move it away or use that version"
    )]
    TooNew {
        /// The database.
        path: String,
        /// Its version.
        found: i64,
    },
}

pub(super) type Result<T> = std::result::Result<T, HistoryError>;

fn failed(verb: &str, path: &Path) -> impl FnOnce(io::Error) -> HistoryError {
    let tried = format!("{verb} {}", path.display());
    move |source| HistoryError::Io { tried, source }
}

/// Where a listing goes on: the time and the name of the record before.
pub(super) type Place = (i64, String);

/// One part of a listing.
#[derive(Debug, Default)]
pub(super) struct Page {
    pub(super) records: Vec<BuildHistoryRecord>,
    /// Where the next part begins; nothing at the end.
    pub(super) next: Option<Place>,
}

/// Records and blobs on disk. All calls block.
#[derive(Debug)]
pub(super) struct Book {
    connection: Mutex<Connection>,
    blobs: PathBuf,
}

impl Book {
    /// Opens what is under a folder, or begins. A database that is damaged is moved aside.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let blobs = folder.join("blobs");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&blobs)
            .map_err(failed("create", &blobs))?;
        let path = folder.join("records.db");
        let connection = match connect(&path) {
            Err(HistoryError::Database(error)) if is_damaged(&error) => {
                tracing::warn!(path = %path.display(), %error, "the history of builds is damaged and begins anew");
                set_aside(&path)?;
                connect(&path)?
            }
            other => other?,
        };
        Ok(Self { connection: Mutex::new(connection), blobs })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write<T>(
        &self,
        work: impl FnOnce(&rusqlite::Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T> {
        let mut connection = self.lock();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let value = work(&transaction)?;
        transaction.commit()?;
        Ok(value)
    }

    /// Writes a record, and what it holds besides the blobs that it names.
    pub(super) fn put(&self, record: &BuildHistoryRecord, more: &[Digest]) -> Result<()> {
        let id = &record.r#ref;
        let dropped = self.write(|t| {
            let mut dropped = vec![];
            // A build that begins takes the place of an earlier one of the same name.
            if record.generation == 0 {
                dropped = held(t, id)?;
                t.prepare_cached("DELETE FROM held WHERE record = ?1")?.execute([id])?;
            }
            t.prepare_cached("INSERT OR REPLACE INTO record VALUES (?1, ?2, ?3, ?4, ?5)")?
                .execute(params![
                    id,
                    nanos(record.created_at.as_ref()).unwrap_or(0),
                    nanos(record.completed_at.as_ref()),
                    record.pinned,
                    record.encode_to_vec(),
                ])?;
            let mut insert = t.prepare_cached("INSERT OR IGNORE INTO held VALUES (?1, ?2)")?;
            for descriptor in descriptors(record) {
                insert.execute((id, &descriptor.digest))?;
            }
            for digest in more {
                insert.execute((id, digest.to_string()))?;
            }
            Ok(dropped)
        })?;
        for digest in dropped {
            self.drop_unheld(&digest)?;
        }
        Ok(())
    }

    /// Reads a record.
    pub(super) fn get(&self, id: &str) -> Result<Option<BuildHistoryRecord>> {
        let connection = self.lock();
        let mut statement = connection.prepare_cached("SELECT data FROM record WHERE ref = ?1")?;
        // What is not even bytes is as damaged as what cannot be decoded.
        let bytes = |row: &rusqlite::Row<'_>| {
            Ok(row.get_ref(0)?.as_blob().map(<[u8]>::to_vec).unwrap_or_default())
        };
        let data = statement.query_row([id], bytes).optional()?;
        Ok(data.and_then(|data| decode(id, &data)))
    }

    /// Lists records that are complete, a part at a time. What is damaged is passed over.
    pub(super) fn page(
        &self,
        after: Option<&Place>,
        newest_first: bool,
        count: usize,
    ) -> Result<Page> {
        let connection = self.lock();
        let (statement, start) = if newest_first {
            (
                "SELECT created, ref, data FROM record WHERE completed IS NOT NULL AND (created, ref) < (?1, ?2)
                 ORDER BY created DESC, ref DESC LIMIT ?3",
                // Above all names.
                (i64::MAX, "\u{10ffff}".to_owned()),
            )
        } else {
            (
                "SELECT created, ref, data FROM record WHERE completed IS NOT NULL AND (created, ref) > (?1, ?2)
                 ORDER BY created, ref LIMIT ?3",
                (i64::MIN, String::new()),
            )
        };
        let (created, id) = after.unwrap_or(&start);
        let mut statement = connection.prepare_cached(statement)?;
        let mut rows =
            statement.query(params![created, id, i64::try_from(count).unwrap_or(i64::MAX)])?;
        let (mut page, mut seen) = (Page::default(), 0);
        while let Some(row) = rows.next()? {
            let place = (row.get(0)?, row.get::<_, String>(1)?);
            if let Ok(data) = row.get_ref(2)?.as_blob() {
                page.records.extend(decode(&place.1, data));
            }
            page.next = Some(place);
            seen += 1;
        }
        if seen < count {
            page.next = None;
        }
        Ok(page)
    }

    /// Lists the builds that had begun and never came to an end.
    pub(super) fn open_records(&self) -> Result<Vec<String>> {
        let connection = self.lock();
        let mut statement = connection.prepare("SELECT ref FROM record WHERE completed IS NULL")?;
        let found = statement.query_map([], |row| row.get(0))?;
        Ok(found.collect::<rusqlite::Result<_>>()?)
    }

    /// Lists the records that may go: not pinned, not among the `entries` newest, and completed before a time.
    pub(super) fn expired(&self, entries: u64, before: i64) -> Result<Vec<String>> {
        let connection = self.lock();
        let mut statement = connection.prepare_cached(
            "SELECT ref, completed FROM record WHERE pinned = 0 AND completed IS NOT NULL
             ORDER BY completed DESC LIMIT -1 OFFSET ?1",
        )?;
        let rows = statement.query_map([i64::try_from(entries).unwrap_or(i64::MAX)], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?))
        })?;
        let mut found = vec![];
        for row in rows {
            let (id, completed) = row?;
            if completed < before {
                found.push(id);
            }
        }
        Ok(found)
    }

    /// Deletes a record and the blobs that no other record holds. Returns whether there was one.
    pub(super) fn delete(&self, id: &str) -> Result<bool> {
        let (found, held) = self.write(|t| {
            let held = held(t, id)?;
            t.execute("DELETE FROM held WHERE record = ?1", [id])?;
            Ok((t.execute("DELETE FROM record WHERE ref = ?1", [id])? > 0, held))
        })?;
        for digest in held {
            self.drop_unheld(&digest)?;
        }
        Ok(found)
    }

    fn drop_unheld(&self, digest: &str) -> Result<()> {
        let gone = self.write(|t| {
            t.prepare_cached(
                "DELETE FROM blob WHERE digest = ?1 AND NOT EXISTS (SELECT 1 FROM held WHERE digest = ?1)",
            )?
            .execute([digest])
        })?;
        if gone > 0
            && let Ok(parsed) = digest.parse()
        {
            remove(&self.blob_path(&parsed))?;
        }
        Ok(())
    }

    /// Returns where a blob is or would be.
    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(format!("{}-{}", digest.algorithm().as_str(), digest.hex()))
    }

    /// Begins a blob.
    pub(super) fn write_blob(&self) -> Result<BlobWriter<'_>> {
        let path = self.blobs.join(format!("new-{}", slipway_engine::id::new_id()));
        let file = File::create_new(&path).map_err(failed("create", &path))?;
        let file = io::BufWriter::with_capacity(64 << 10, file);
        Ok(BlobWriter { book: self, file, path, hasher: Hasher::sha256(), size: 0 })
    }

    /// Writes a whole blob.
    pub(super) fn put_blob(&self, bytes: &[u8]) -> Result<(Digest, u64)> {
        let mut writer = self.write_blob()?;
        writer.write(bytes)?;
        writer.commit()
    }

    /// Describes a blob; nothing when it is not here or was cut short.
    pub(super) fn blob(&self, digest: &Digest) -> Result<Option<BlobInfo>> {
        let row = self
            .lock()
            .prepare_cached("SELECT size, created FROM blob WHERE digest = ?1")?
            .query_row([digest.to_string()], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?)))
            .optional()?;
        let Some((size, created)) = row else { return Ok(None) };
        let size = u64::try_from(size).unwrap_or(0);
        let there = fs::metadata(self.blob_path(digest)).is_ok_and(|found| found.len() == size);
        Ok(there.then(|| BlobInfo { digest: digest.clone(), size, created }))
    }

    /// Opens a blob.
    pub(super) fn open_blob(&self, digest: &Digest) -> Result<Option<(File, BlobInfo)>> {
        let Some(info) = self.blob(digest)? else { return Ok(None) };
        let path = self.blob_path(digest);
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(|file| Some((file, info))).map_err(failed("open", &path)),
        }
    }

    /// Lists blobs in the order of their digests, some after another.
    pub(super) fn blobs(&self, after: &str, count: usize) -> Result<Vec<BlobInfo>> {
        let connection = self.lock();
        let mut statement = connection.prepare_cached(
            "SELECT digest, size, created FROM blob WHERE digest > ?1 ORDER BY digest LIMIT ?2",
        )?;
        let rows = statement
            .query_map(params![after, i64::try_from(count).unwrap_or(i64::MAX)], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?, row.get(2)?))
            })?;
        let mut found = vec![];
        for row in rows {
            let (digest, size, created) = row?;
            // A damaged row names nothing.
            if let Ok(digest) = digest.parse() {
                found.push(BlobInfo { digest, size: u64::try_from(size).unwrap_or(0), created });
            }
        }
        Ok(found)
    }

    /// Removes what a daemon left that was killed between a file and its row, or a row and what holds it.
    pub(super) fn clear_litter(&self) -> Result<()> {
        let loose: Vec<String> = {
            let connection = self.lock();
            let mut statement = connection
                .prepare("SELECT digest FROM blob WHERE digest NOT IN (SELECT digest FROM held)")?;
            let rows = statement.query_map([], |row| row.get(0))?;
            rows.collect::<rusqlite::Result<_>>()?
        };
        for digest in loose {
            self.drop_unheld(&digest)?;
        }
        for entry in fs::read_dir(&self.blobs).map_err(failed("read", &self.blobs))? {
            let path = entry.map_err(failed("read", &self.blobs))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let known = match name.split_once('-').map(|(kind, hex)| format!("{kind}:{hex}")) {
                Some(digest) if !name.starts_with("new-") => self
                    .lock()
                    .prepare_cached("SELECT 1 FROM blob WHERE digest = ?1")?
                    .exists([digest])?,
                _ => false,
            };
            if !known {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

/// A blob that has no name yet. Dropping it discards it.
pub(super) struct BlobWriter<'a> {
    book: &'a Book,
    file: io::BufWriter<File>,
    path: PathBuf,
    hasher: Hasher,
    size: u64,
}

impl BlobWriter<'_> {
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(failed("write", &self.path))?;
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        Ok(())
    }

    /// Names the blob by its digest. It is kept as long as a record holds it.
    pub(super) fn commit(mut self) -> Result<(Digest, u64)> {
        self.file.flush().map_err(failed("write", &self.path))?;
        let digest = std::mem::replace(&mut self.hasher, Hasher::sha256()).finish();
        let target = self.book.blob_path(&digest);
        fs::rename(&self.path, &target).map_err(failed("create", &target))?;
        let size = i64::try_from(self.size).unwrap_or(i64::MAX);
        let now = slipway_engine::store::now_nanos();
        self.book.write(|t| {
            t.prepare_cached("INSERT OR REPLACE INTO blob VALUES (?1, ?2, ?3)")?.execute((
                digest.to_string(),
                size,
                now,
            ))
        })?;
        Ok((digest, self.size))
    }
}

impl Drop for BlobWriter<'_> {
    fn drop(&mut self) {
        // It is there no more once it has a name.
        if let Err(error) = remove(&self.path) {
            tracing::debug!(%error, "an unfinished blob stays behind");
        }
    }
}

fn connect(path: &Path) -> Result<Connection> {
    let mut connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
    let version = |c: &Connection| c.query_row("PRAGMA user_version", [], |row| row.get(0));
    let found: i64 = version(&connection)?;
    if found > VERSION {
        return Err(HistoryError::TooNew { path: path.display().to_string(), found });
    }
    if found < VERSION {
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        transaction.execute_batch(SCHEMA)?;
        transaction.pragma_update(None, "user_version", VERSION)?;
        transaction.commit()?;
    }
    // A file that was cut short opens well and fails later.
    connection.query_row("SELECT count(*) FROM record WHERE completed IS NULL", [], |_| Ok(()))?;
    Ok(connection)
}

fn is_damaged(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
        // A database of somebody else, without our tables or with others of the same name.
        || matches!(error, rusqlite::Error::SqliteFailure(_, Some(message)) if message.contains("no such table") || message.contains("already exists"))
}

/// Moves a database away under the first name that is free.
fn set_aside(path: &Path) -> Result<()> {
    for number in 0u32.. {
        let aside = path.with_extension(format!("db.damaged-{number}"));
        if aside.exists() {
            continue;
        }
        fs::rename(path, &aside).map_err(failed("set aside", path))?;
        break;
    }
    for suffix in ["-wal", "-shm"] {
        let mut log = path.as_os_str().to_owned();
        log.push(suffix);
        remove(Path::new(&log))?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

fn held(connection: &Connection, id: &str) -> rusqlite::Result<Vec<String>> {
    let mut statement = connection.prepare_cached("SELECT digest FROM held WHERE record = ?1")?;
    let rows = statement.query_map([id], |row| row.get(0))?;
    rows.collect()
}

fn decode(id: &str, data: &[u8]) -> Option<BuildHistoryRecord> {
    match BuildHistoryRecord::decode(data) {
        Ok(record) if record.r#ref == id => Some(record),
        Ok(_) => {
            tracing::warn!(build = id, "the record of a build is that of another");
            None
        }
        Err(error) => {
            tracing::warn!(build = id, %error, "the record of a build is damaged");
            None
        }
    }
}

/// Returns a time in nanoseconds since 1970.
pub(super) fn nanos(time: Option<&prost_types::Timestamp>) -> Option<i64> {
    let time = time?;
    Some(time.seconds.saturating_mul(1_000_000_000).saturating_add(time.nanos.into()))
}

/// Returns all that a record names of blobs.
fn descriptors(record: &BuildHistoryRecord) -> impl Iterator<Item = &Descriptor> {
    fn of_result(result: &BuildResultInfo) -> impl Iterator<Item = &Descriptor> {
        let one = result.result_deprecated.iter().chain(&result.attestations);
        one.chain(result.results.values())
    }
    let own = record.logs.iter().chain(&record.trace).chain(&record.external_error);
    own.chain(record.result.iter().chain(record.results.values()).flat_map(of_result))
}
