//! The builds that ran: what each was asked for, how it ended, and what it told.
//!
//! ```text
//! begin ──► active ──► finish (or dropped: canceled) ──► complete ──► the trace is added, 3 s later or when asked
//! ```
//!
//! A thread of its own writes records down, one after the other, so that no build waits for the disk; whoever reads waits
//! until everything before is written. What is on disk is read a part at a time and never as a whole: see [`book`].
//! Records of a daemon that was killed are completed as failed by the next one.

pub(crate) mod book;
mod filter;
mod listen;
mod log;
mod recording;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::Stream;
use futures::stream::BoxStream;
use slipway_engine::config::HistoryConfig;
use slipway_engine::store::content::BlobInfo;
use slipway_engine::store::{Store, blocking, now_nanos};
use slipway_spec::Digest;
use slipway_spec::wire::control::{
    BuildHistoryEvent, BuildHistoryEventType, BuildHistoryRecord, Descriptor, StatusResponse,
};
use slipway_spec::wire::rpc;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use self::book::Book;
pub use self::book::HistoryError;
pub use self::recording::Recording;
use crate::trace::Traces;

/// How long after the end of a build spans of its client may come.
const TRACE_WAIT: Duration = Duration::from_secs(3);
/// How often records that are too old are looked for.
const EXPIRE_EVERY: Duration = Duration::from_secs(120);
/// When a daemon that began looks for what the one before left.
const CLEAR_AFTER: Duration = Duration::from_secs(30);
/// What the type of a trace is called.
const TRACE_TYPE: &str = "application/vnd.buildkit.otlp.json.v0";

/// The builds that ran. Cheap to clone.
#[derive(Clone, Debug)]
pub struct History {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Job>,
}

#[derive(Debug)]
struct Shared {
    book: Book,
    limits: HistoryConfig,
    store: Store,
    traces: Traces,
    state: Mutex<State>,
    stopping: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    /// Builds that run, as they began.
    active: BTreeMap<String, BuildHistoryRecord>,
    listeners: Vec<listen::Listener>,
    /// How many listen to one build.
    watched: HashMap<String, usize>,
    /// Records that go when nobody listens to them any more.
    condemned: HashSet<String>,
}

/// Work of the thread.
type Job = Box<dyn FnOnce(&Shared, &mut Later) + Send>;

/// What the thread will do by itself.
#[derive(Debug)]
struct Later {
    traces: HashMap<String, OpenTrace>,
    expire: Instant,
    clear: Option<Instant>,
}

/// A build whose trace is not written yet.
#[derive(Debug)]
struct OpenTrace {
    due: Instant,
    trace: [u8; 16],
    spans: Vec<String>,
}

fn status(error: &HistoryError) -> Status {
    match error {
        HistoryError::Missing(_) => Status::not_found(error.to_string()),
        HistoryError::Io { .. } | HistoryError::Database(_) | HistoryError::TooNew { .. } => {
            Status::internal(error.to_string())
        }
    }
}

fn event(kind: BuildHistoryEventType, record: BuildHistoryRecord) -> BuildHistoryEvent {
    BuildHistoryEvent { r#type: kind.into(), record: Some(record) }
}

fn descriptor(media_type: &str, (digest, size): (Digest, u64)) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest: digest.to_string(),
        size: i64::try_from(size).unwrap_or(i64::MAX),
        annotations: BTreeMap::new(),
    }
}

impl History {
    /// Opens the history under a folder of a store's root. Records are kept within `limits`.
    ///
    /// # Errors
    /// When the folder cannot be written, or a later version wrote it.
    pub fn open(
        folder: &Path,
        limits: HistoryConfig,
        store: Store,
        traces: Traces,
    ) -> Result<Self, HistoryError> {
        let shared = Arc::new(Shared {
            book: Book::open(folder)?,
            limits,
            store,
            traces,
            state: Mutex::default(),
            stopping: CancellationToken::new(),
        });
        let (queue, jobs) = mpsc::channel();
        let of_thread = shared.clone();
        std::thread::Builder::new()
            .name("history".into())
            .spawn(move || of_thread.work(&jobs))
            .map_err(|source| HistoryError::Io { tried: "start its thread".into(), source })?;
        Ok(Self { shared, queue })
    }

    fn queue(&self, job: impl FnOnce(&Shared, &mut Later) + Send + 'static) {
        // The thread lives as long as this sender.
        let _lives = self.queue.send(Box::new(job));
    }

    /// Has something done after everything that was asked for before.
    async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared, &mut Later) -> Result<T, HistoryError> + Send + 'static,
    ) -> Result<T, Status> {
        let (answer, answered) = oneshot::channel();
        self.queue(move |shared, later| {
            // Who asked may have gone.
            let _heard = answer.send(work(shared, later));
        });
        match answered.await {
            Ok(done) => done.map_err(|error| status(&error)),
            Err(_) => Err(Status::internal("the history of builds is not written any more")),
        }
    }

    /// Pins a record or lets it go.
    ///
    /// # Errors
    /// When there is none.
    pub async fn pin(&self, id: String, pinned: bool) -> Result<(), Status> {
        self.ask(move |shared, _| shared.update(&id, |record| record.pinned = pinned).map(|_| ()))
            .await
    }

    /// Deletes a record, or has it deleted when nobody listens to it any more.
    ///
    /// # Errors
    /// When there is none.
    pub async fn delete(&self, id: String) -> Result<(), Status> {
        self.ask(move |shared, later| {
            shared.add_trace(later, &id);
            if shared.lock().active.contains_key(&id) {
                return Err(HistoryError::Missing(format!("{id}: it still runs")));
            }
            shared.delete(&id)
        })
        .await
    }

    /// Waits until a record is as it will stay: with its trace.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn finalize(&self, id: String) -> Result<(), Status> {
        self.ask(move |shared, later| {
            shared.add_trace(later, &id);
            Ok(())
        })
        .await
    }

    /// Returns what a build that has ended told; nothing when there is no record of it.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn replay(
        &self,
        id: &str,
    ) -> Result<Option<BoxStream<'static, Result<StatusResponse, Status>>>, Status> {
        let id = id.to_owned();
        let found = self.ask(move |shared, _| {
            let Some(record) = shared.book.get(&id)? else { return Ok(None) };
            if record.completed_at.is_none() {
                return Ok(None);
            }
            let log = record.logs.and_then(|logs| logs.digest.parse().ok());
            let file = log.map(|digest| shared.book.open_blob(&digest)).transpose()?.flatten();
            Ok(Some(file.map(|(file, _)| file)))
        });
        Ok(found.await?.map(|file| Box::pin(messages(file)) as BoxStream<'static, _>))
    }

    /// Opens a blob of a record.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) async fn blob(&self, digest: Digest) -> Result<Option<(File, BlobInfo)>, Status> {
        self.ask(move |shared, _| shared.book.open_blob(&digest)).await
    }

    /// Lists some blobs of records, in the order of their digests.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) async fn blobs(&self, after: String, count: usize) -> Result<Vec<BlobInfo>, Status> {
        self.ask(move |shared, _| shared.book.blobs(&after, count)).await
    }

    /// Writes down what is still to be written, and ends what listens.
    pub async fn stop(&self) {
        self.shared.stopping.cancel();
        let all = self.ask(|shared, later| {
            let open: Vec<String> = later.traces.keys().cloned().collect();
            for id in open {
                shared.add_trace(later, &id);
            }
            Ok(())
        });
        if let Err(error) = all.await {
            tracing::debug!(%error, "the history of builds may not be complete");
        }
    }
}

/// Reads a log a message at a time, away from the threads that serve.
fn messages(
    file: Option<File>,
) -> impl Stream<Item = Result<StatusResponse, Status>> + Send + 'static {
    futures::stream::unfold(file.map(log::LogReader::new), |reader| async move {
        let mut reader = reader?;
        let damaged = |error: &dyn std::error::Error| {
            let text = format!("the log of the build cannot be read: {error}");
            Some((Err(Status::data_loss(text)), None))
        };
        let read = blocking::run(move || {
            let next = reader.next();
            Ok((next, reader))
        });
        match read.await {
            Ok((next, reader)) => match next? {
                Ok(message) => Some((Ok(message), Some(reader))),
                Err(error) => damaged(&error),
            },
            Err(error) => damaged(&error),
        }
    })
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works until nobody can ask for more.
    fn work(&self, jobs: &mpsc::Receiver<Job>) {
        self.complete_interrupted();
        let now = Instant::now();
        let mut later = Later {
            traces: HashMap::new(),
            expire: now + EXPIRE_EVERY,
            clear: Some(now + CLEAR_AFTER),
        };
        loop {
            let due = later.traces.values().map(|open| open.due).chain(later.clear);
            let wait = due.min().map(|due| due.saturating_duration_since(Instant::now()));
            // Nothing grows old between builds that is worth waking up for.
            let job = match wait {
                Some(wait) => jobs.recv_timeout(wait),
                None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match job {
                Ok(job) => job(self, &mut later),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.do_what_is_due(&mut later);
        }
        let open: Vec<String> = later.traces.keys().cloned().collect();
        for id in open {
            self.add_trace(&mut later, &id);
        }
    }

    fn do_what_is_due(&self, later: &mut Later) {
        let now = Instant::now();
        let due: Vec<String> = later
            .traces
            .iter()
            .filter(|(_, open)| open.due <= now)
            .map(|(id, _)| id.clone())
            .collect();
        for id in due {
            self.add_trace(later, &id);
        }
        if later.clear.is_some_and(|clear| clear <= now) {
            later.clear = None;
            self.report("cleared", self.book.clear_litter());
            self.report("kept within its limits", self.expire());
        }
        if later.expire <= now {
            later.expire = now + EXPIRE_EVERY;
            self.report("kept within its limits", self.expire());
        }
    }

    fn report(&self, what: &str, done: Result<(), HistoryError>) {
        if let Err(error) = done {
            tracing::warn!(%error, "the history of builds was not {what}");
        }
    }

    /// Completes the records of builds that ended with the daemon before this one.
    fn complete_interrupted(&self) {
        let completed = self.book.open_records().and_then(|open| {
            for id in open {
                let Some(mut record) = self.book.get(&id)? else {
                    // Damaged, and of no use to anybody.
                    self.book.delete(&id)?;
                    continue;
                };
                record.error = Some(rpc::Status {
                    code: Code::Aborted.into(),
                    message: "the daemon was stopped before the build ended".into(),
                    details: vec![],
                });
                // When it was stopped is not known.
                record.completed_at = record.created_at;
                record.generation = record.generation.saturating_add(1);
                self.book.put(&record, &[])?;
            }
            Ok(())
        });
        self.report("completed", completed);
    }

    /// Removes records that are both too many and too old.
    fn expire(&self) -> Result<(), HistoryError> {
        let age = i64::try_from(self.limits.max_age.as_nanos()).unwrap_or(i64::MAX);
        let before = now_nanos().saturating_sub(age);
        for id in self.book.expired(self.limits.max_entries, before)? {
            self.delete(&id)?;
        }
        Ok(())
    }

    fn delete(&self, id: &str) -> Result<(), HistoryError> {
        {
            let mut state = self.lock();
            if state.watched.contains_key(id) {
                state.condemned.insert(id.to_owned());
                return Ok(());
            }
            state.condemned.remove(id);
        }
        if !self.book.delete(id)? {
            return Err(HistoryError::Missing(id.to_owned()));
        }
        let record = BuildHistoryRecord { r#ref: id.to_owned(), ..BuildHistoryRecord::default() };
        self.tell(event(BuildHistoryEventType::Deleted, record));
        Ok(())
    }

    /// Changes a record that is complete, and tells everybody.
    fn update(
        &self,
        id: &str,
        change: impl FnOnce(&mut BuildHistoryRecord),
    ) -> Result<(), HistoryError> {
        let found = self.book.get(id)?.filter(|record| record.completed_at.is_some());
        let mut record = found.ok_or_else(|| HistoryError::Missing(id.to_owned()))?;
        change(&mut record);
        record.generation = record.generation.saturating_add(1);
        self.book.put(&record, &[])?;
        self.tell(event(BuildHistoryEventType::Complete, record));
        Ok(())
    }

    /// Writes the trace of a build down, if it is not yet.
    fn add_trace(&self, later: &mut Later, id: &str) {
        let Some(open) = later.traces.remove(id) else { return };
        let mut spans = open.spans;
        spans.extend(self.traces.end(open.trace));
        if spans.is_empty() {
            return;
        }
        let mut text = spans.join("\n");
        text.push('\n');
        let added = self.book.put_blob(text.as_bytes()).and_then(|blob| {
            let trace = descriptor(TRACE_TYPE, blob);
            self.update(id, |record| record.trace = Some(trace))
        });
        self.report("given a trace", added);
    }

    /// Tells listeners. One that does not keep up is told that, and no more.
    fn tell(&self, event: BuildHistoryEvent) {
        self.lock().listeners.retain(|listener| listener.tell(&event));
    }
}

#[cfg(test)]
mod tests;
