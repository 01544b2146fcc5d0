//! Hashes and writes what arrives, on a thread of its own.
//!
//! The receiver and the writer are joined by a channel with a budget of bytes: when the disk is slower than the client, the
//! client waits. When the receiver goes away before it is done, the writer keeps what arrived whole.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use slipway_engine::store::tree::Content;
use slipway_engine::store::{Error, ErrorKind, blocking};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

use super::contents::Transfer;
use super::index::{Kept, Place, Stamp};
use super::listing::walk_order;

/// Bytes on their way from the network to the disk.
pub(crate) const BUDGET: u32 = 4 << 20;
/// No more is put into a pack that has this many bytes.
const PACK: u64 = 32 << 20;
/// Bytes of a pack that are written at once.
const AT_ONCE: usize = 256 << 10;
/// Jobs on their way; the budget is what binds, unless they are tiny.
const JOBS: usize = 256;
/// Small files go to the thread when there are so many bytes of them, or so many files: waking it for each would cost more
/// than its work.
const BATCH: (usize, usize) = (128 << 10, 64);

/// A file that arrived.
#[derive(Debug)]
pub(crate) struct Arrived {
    /// Its place in the listing.
    pub(crate) id: u32,
    /// What to keep it as; `None` when the client sent something else than it had announced.
    pub(crate) keep: Option<(Box<[u8]>, Stamp)>,
}

/// A file that was written.
#[derive(Debug)]
pub(crate) struct Written {
    /// Its place in the listing.
    pub(crate) id: u32,
    /// Where its bytes are.
    pub(crate) content: Content,
    /// How many bytes it has.
    pub(crate) size: u64,
}

#[derive(Debug)]
enum Job {
    /// All of some small files.
    Whole { files: Vec<Whole>, hold: Option<OwnedSemaphorePermit> },
    /// A piece of a large file.
    Piece { id: u32, bytes: Bytes, hold: Option<OwnedSemaphorePermit> },
    /// The end of a large file.
    End { file: Arrived },
    /// Everything arrived, and these files were there before, in the order of a walk.
    Finish { unchanged: Vec<Kept> },
}

/// A small file and its pieces.
type Whole = (Arrived, Vec<Bytes>);

/// The way to the thread that writes.
#[derive(Debug)]
pub(crate) struct Writer {
    queue: Queue,
    budget: Arc<Semaphore>,
    thread: JoinHandle<Result<Vec<Written>, Error>>,
}

impl Writer {
    /// Starts writing for a transfer that selected `scope`.
    pub(crate) fn start(transfer: Transfer, scope: u64) -> Self {
        let (jobs, queue) = mpsc::channel(JOBS);
        let work = move || {
            let (parts, written, kept) = (HashMap::new(), vec![], vec![]);
            Work { transfer, scope, pack: None, parts, written, kept }.run(queue)
        };
        Self {
            queue: Queue { jobs, batch: vec![], bytes: 0 },
            budget: Arc::new(Semaphore::new(BUDGET as usize)),
            thread: tokio::spawn(blocking::run(work)),
        }
    }

    /// Writes a small file, together with others. Fails when the writer has ended, see [`stop`](Self::stop).
    pub(crate) async fn whole(&mut self, file: Arrived, bytes: Vec<Bytes>) -> Result<(), Gone> {
        self.queue.bytes += bytes.iter().map(Bytes::len).sum::<usize>();
        self.queue.batch.push((file, bytes));
        if self.queue.bytes < BATCH.0 && self.queue.batch.len() < BATCH.1 {
            return Ok(());
        }
        let hold = self.hold(self.queue.bytes).await;
        let job = self.queue.take(hold);
        self.send(job).await
    }

    /// Writes the next piece of a large file.
    pub(crate) async fn piece(&self, id: u32, bytes: Bytes) -> Result<(), Gone> {
        let hold = self.hold(bytes.len()).await;
        self.send(Job::Piece { id, bytes, hold }).await
    }

    /// Ends a large file.
    pub(crate) async fn end(&self, file: Arrived) -> Result<(), Gone> {
        self.send(Job::End { file }).await
    }

    /// Ends a transfer in which everything arrived.
    pub(crate) async fn finish(mut self, unchanged: Vec<Kept>) -> Result<Vec<Written>, Error> {
        self.send_rest().await;
        // Should the writer have ended, then with the error that comes below.
        let _: Result<(), Gone> = self.send(Job::Finish { unchanged }).await;
        self.join().await
    }

    /// Ends a transfer that failed, and returns when what arrived whole is kept. Fails when the writer had failed.
    pub(crate) async fn stop(mut self) -> Result<(), Error> {
        self.send_rest().await;
        self.join().await.map(drop)
    }

    async fn send_rest(&mut self) {
        let hold = self.hold(self.queue.bytes).await;
        let job = self.queue.take(hold);
        // What has ended the writer is told when it is joined.
        let _: Result<(), Gone> = self.send(job).await;
    }

    async fn join(self) -> Result<Vec<Written>, Error> {
        drop(self.queue);
        self.thread.await.unwrap_or_else(|stopped| {
            Err(Error::new(ErrorKind::Io, "the program is ending").because(stopped))
        })
    }

    async fn hold(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let bytes = u32::try_from(bytes).unwrap_or(BUDGET).min(BUDGET);
        // The budget is never closed.
        self.budget.clone().acquire_many_owned(bytes).await.ok()
    }

    async fn send(&self, job: Job) -> Result<(), Gone> {
        self.queue.jobs.send(job).await.map_err(|_| Gone)
    }
}

/// What is sent to the thread, and what is to be sent.
#[derive(Debug)]
struct Queue {
    jobs: mpsc::Sender<Job>,
    batch: Vec<Whole>,
    /// How many bytes the batch has.
    bytes: usize,
}

impl Queue {
    fn take(&mut self, hold: Option<OwnedSemaphorePermit>) -> Job {
        self.bytes = 0;
        Job::Whole { files: std::mem::take(&mut self.batch), hold }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        if !self.batch.is_empty() {
            let job = self.take(None);
            // Where the disk is that far behind, these files have to come again the next time.
            self.jobs.try_send(job).ok();
        }
    }
}

/// The writer has ended, because it failed.
#[derive(Debug)]
pub(crate) struct Gone;

struct Part {
    object: u64,
    file: File,
    path: PathBuf,
    hash: Sha256,
    size: u64,
    whole: bool,
}

/// A file that small ones are put into.
struct Pack {
    object: u64,
    file: File,
    path: PathBuf,
    /// The bytes that it has, or will have.
    size: u64,
    /// What is not written yet.
    buffer: Vec<u8>,
    /// Whether something could not be written.
    broken: bool,
}

impl Pack {
    /// Writes what is not written yet.
    fn flush(&mut self) -> Result<(), Error> {
        let written = self.file.write_all(&self.buffer);
        self.buffer.clear();
        self.broken |= written.is_err();
        written.map_err(|error| Error::io(format!("cannot write {}", self.path.display()), error))
    }
}

struct Work {
    transfer: Transfer,
    scope: u64,
    // What small files go into now.
    pack: Option<Pack>,
    // Large files of which some has come.
    parts: HashMap<u32, Part>,
    written: Vec<Written>,
    kept: Vec<Kept>,
}

impl Work {
    fn run(mut self, mut queue: mpsc::Receiver<Job>) -> Result<Vec<Written>, Error> {
        let mut ended = self.take_all(&mut queue);
        self.parts.clear();
        if let Err(error) = self.end_pack() {
            ended = ended.and(Err(error));
        }
        let mut seen = std::mem::take(&mut self.kept);
        let complete = matches!(ended, Ok(Some(_)));
        if let Ok(Some(unchanged)) = &ended {
            seen.extend_from_slice(unchanged);
        }
        seen.sort_unstable_by(|a, b| walk_order(&a.path, &b.path));
        if complete || !seen.is_empty() {
            self.transfer.commit(self.scope, &seen, complete);
        }
        ended.map(|_| self.written)
    }

    fn take_all(&mut self, queue: &mut mpsc::Receiver<Job>) -> Result<Option<Vec<Kept>>, Error> {
        while let Some(job) = queue.blocking_recv() {
            match job {
                Job::Whole { files, hold } => {
                    for (file, bytes) in files {
                        self.pack(file, &bytes)?;
                    }
                    drop(hold);
                }
                Job::Piece { id, bytes, hold } => {
                    let part = match self.parts.remove(&id) {
                        Some(part) => part,
                        None => self.create()?,
                    };
                    self.parts.entry(id).insert_entry(part).get_mut().write(&bytes)?;
                    drop(hold);
                }
                Job::End { file } => {
                    let part = match self.parts.remove(&file.id) {
                        Some(part) => part,
                        None => self.create()?,
                    };
                    self.complete(file, part);
                }
                Job::Finish { unchanged } => return Ok(Some(unchanged)),
            }
        }
        Ok(None)
    }

    /// Puts a small file together with others.
    fn pack(&mut self, file: Arrived, bytes: &[Bytes]) -> Result<(), Error> {
        if self.pack.as_ref().is_some_and(|pack| pack.size >= PACK) {
            self.end_pack()?;
        }
        let pack = match &mut self.pack {
            Some(pack) => pack,
            none => {
                let (object, file, path) = self.transfer.create_pack()?;
                none.insert(Pack { object, file, path, size: 0, buffer: vec![], broken: false })
            }
        };
        let place = Place { object: pack.object, offset: Some(pack.size) };
        let mut hash = Sha256::new();
        let mut size = 0;
        for bytes in bytes {
            hash.update(bytes);
            pack.buffer.extend_from_slice(bytes);
            size += bytes.len() as u64;
        }
        pack.size += size;
        if pack.buffer.len() >= AT_ONCE {
            pack.flush()?;
        }
        self.arrived(file, place, hash.finalize().into(), size);
        Ok(())
    }

    /// Ends the file that small ones are put into. Those that cannot be written are forgotten.
    fn end_pack(&mut self) -> Result<(), Error> {
        let Some(mut pack) = self.pack.take() else { return Ok(()) };
        let flushed = pack.flush();
        if pack.broken {
            self.kept.retain(|kept| kept.place.object != pack.object);
        }
        flushed
    }

    fn create(&self) -> Result<Part, Error> {
        let (object, file, path) = self.transfer.create()?;
        Ok(Part { object, file, path, hash: Sha256::new(), size: 0, whole: false })
    }

    fn complete(&mut self, file: Arrived, mut part: Part) {
        part.whole = true;
        let digest: [u8; 32] = std::mem::take(&mut part.hash).finalize().into();
        if file.keep.is_none() {
            self.transfer.discard(part.object);
        }
        let place = Place { object: part.object, offset: None };
        self.arrived(file, place, digest, part.size);
    }

    fn arrived(&mut self, file: Arrived, place: Place, digest: [u8; 32], size: u64) {
        let content = self.transfer.lender().lend(place, digest);
        if let Some((path, stamp)) = file.keep {
            self.kept.push(Kept { path, stamp, digest, place });
        }
        self.written.push(Written { id: file.id, content, size });
    }
}

impl Part {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        self.file
            .write_all(bytes)
            .map_err(|error| Error::io(format!("cannot write {}", self.path.display()), error))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.whole
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "half a file stays behind");
        }
    }
}
