//! One build: vertices on their way to results.

mod announce;
mod audience;
mod cached;
mod container;
mod exec_key;
mod file_key;
mod image;
mod key;
mod local;
mod materials;
mod metadata;
mod nested;
mod outside;
mod policy;
mod result;
mod shared;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use slipway_spec::progress::ProgressSink;
use slipway_store::snapshot::{LayerId, Snapshot};
use slipway_store::tree::scan::Scan;
use slipway_store::{Store, blocking};
use tokio::sync::Semaphore;

pub(crate) use self::cached::VertexCache;
pub(crate) use self::key::tagged;
use self::local::local_request;
pub use self::shared::Shared;
use crate::client::{LocalFiles, LocalRequest, Services};
use crate::device::Devices;
use crate::error::{Cause, Result, SolveError};
use crate::executor::Executor;
use crate::graph::{Edge, Vertices};
use crate::source::image::{Images, RemoteLayer};

/// What all builds of a process share.
#[derive(Clone)]
pub struct Worker {
    /// Where results are.
    pub store: Store,
    /// Where images come from.
    pub images: Images,
    /// What runs processes.
    pub executor: Arc<dyn Executor>,
    /// How many processes may run at once.
    pub parallel: Arc<Semaphore>,
    /// What builds do together.
    pub shared: Shared,
    /// Which devices steps may ask for.
    pub devices: Devices,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("store", &self.store).finish_non_exhaustive()
    }
}

/// One build. Cheap to clone; dropping the futures it returned stops the work they did.
#[derive(Clone, Debug)]
pub struct Job(Arc<Inner>);

/// Which session a folder is asked of, where the definition says so, and what of it is wanted.
type LocalKey = (Option<String>, LocalRequest);

struct Inner {
    worker: Worker,
    client: Arc<dyn LocalFiles>,
    services: Services,
    progress: Arc<dyn ProgressSink>,
    vertices: Mutex<Vertices>,
    /// Cache mounts that were emptied in this build.
    reset: Mutex<BTreeSet<String>>,
    /// Where to fetch layers that are not in the store.
    remote: Mutex<HashMap<LayerId, RemoteLayer>>,
    /// Caches from elsewhere.
    imports: cached::Imports,
    /// Folders of the client, scanned once per way they are asked for.
    locals: tokio::sync::Mutex<HashMap<LocalKey, Arc<Scan>>>,
    /// The time of what the build makes, in nanoseconds since 1970, where it is not to be the present.
    time: Option<i64>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("client", &self.client).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Job {
    /// Starts a build.
    pub fn new(
        worker: Worker,
        client: Arc<dyn LocalFiles>,
        progress: Arc<dyn ProgressSink>,
    ) -> Self {
        Self::at(worker, client, progress, None)
    }

    /// Starts a build that dates the folders it makes at `time`, in nanoseconds since 1970.
    pub fn at(
        worker: Worker,
        client: Arc<dyn LocalFiles>,
        progress: Arc<dyn ProgressSink>,
        time: Option<i64>,
    ) -> Self {
        Self::with(worker, client, progress, time, Services::default())
    }

    /// Starts a build that may use more of its client than folders.
    pub fn with(
        worker: Worker,
        client: Arc<dyn LocalFiles>,
        progress: Arc<dyn ProgressSink>,
        time: Option<i64>,
        services: Services,
    ) -> Self {
        Self(Arc::new(Inner {
            worker,
            client,
            services,
            progress,
            vertices: Mutex::default(),
            reset: Mutex::default(),
            remote: Mutex::default(),
            imports: cached::Imports::default(),
            locals: tokio::sync::Mutex::default(),
            time,
        }))
    }

    /// Returns what this build shares with others.
    pub fn worker(&self) -> &Worker {
        &self.0.worker
    }

    /// Returns the file system that an edge stands for, executing what must be.
    ///
    /// # Errors
    /// The first failure of a step it needs.
    pub async fn solve(&self, edge: &Edge) -> Result<Snapshot> {
        edge.vertex.cache.mark_used(edge.index);
        let results = self.results(&edge.vertex).await?;
        results.get(edge.index).cloned().ok_or_else(|| {
            Cause::Invalid(format!("{} has no output {}", edge.vertex.name, edge.index)).into()
        })
    }

    /// Reads a small file of a result; `None` when there is none.
    ///
    /// # Errors
    /// When the result cannot be had or the file is larger than `limit` bytes.
    pub async fn read_file(&self, edge: &Edge, path: &str, limit: u64) -> Result<Option<Bytes>> {
        if let Some(request) = local_request(&edge.vertex.op)? {
            // Several files are read of one folder, which is one step to whoever looks on.
            let first = !edge.vertex.announced.load(Ordering::Relaxed);
            let announced = first.then(|| self.start(&edge.vertex));
            let read = self.folders(&edge.vertex).read(&request.name, path).await;
            let read = read.map_err(SolveError::from);
            return match announced {
                Some(announced) => self.end(&edge.vertex, announced, read),
                None => read,
            };
        }
        let snapshot = self.obtain(edge).await?;
        let (store, path) = (self.store().clone(), path.to_owned());
        Ok(blocking::run(move || store.view(&snapshot.layers)?.read(path.as_bytes(), limit))
            .await?
            .map(Bytes::from))
    }

    fn store(&self) -> &Store {
        &self.0.worker.store
    }
}

/// Nanoseconds since 1970 now.
pub(crate) fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}
