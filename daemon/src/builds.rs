//! The builds that run, by the id that their client gave them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use slipway_engine::store::now_nanos;
use tokio::sync::watch;
use tonic::Status;

use crate::gateway::Gateway;
use crate::record::Record;

/// How long a build that has ended can still be asked about.
const KEPT: Duration = Duration::from_secs(10);

/// The builds that run. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Builds {
    table: watch::Sender<HashMap<String, Entry>>,
    /// Whether no build may begin any more. Changed and read only while the table is held.
    closed: Arc<AtomicBool>,
}

#[derive(Clone, Debug)]
struct Entry {
    record: Arc<Record>,
    gateway: Option<Arc<Gateway>>,
    /// Tells apart builds that had the same id one after the other.
    ended: bool,
    /// When it was started, in nanoseconds since 1970.
    began: i64,
}

impl Default for Builds {
    fn default() -> Self {
        Self { table: watch::Sender::new(HashMap::new()), closed: Arc::default() }
    }
}

/// A build's place in the table; dropping it ends the build for those who look on.
#[derive(Debug)]
pub struct Running {
    builds: Builds,
    id: String,
    record: Arc<Record>,
}

impl Builds {
    /// Adds a build.
    ///
    /// # Errors
    /// When one of this id runs, or no build may begin any more.
    pub fn start(&self, id: &str) -> Result<Running, Status> {
        let record = Arc::new(Record::default());
        let mut closed = false;
        let added = self.table.send_if_modified(|table| {
            closed = self.closed.load(Ordering::Relaxed);
            if closed || table.get(id).is_some_and(|entry| !entry.ended) {
                return false;
            }
            let (record, began) = (record.clone(), now_nanos());
            let entry = Entry { record, gateway: None, ended: false, began };
            table.insert(id.to_owned(), entry);
            true
        });
        if closed {
            return Err(Status::unavailable("the daemon is about to stop; build again later"));
        }
        if !added {
            return Err(Status::already_exists(format!("job ID {id} exists")));
        }
        Ok(Running { builds: self.clone(), id: id.to_owned(), record })
    }

    /// Finds a build's progress, and waits for the build to be started.
    ///
    /// # Errors
    /// When there is no such build after that time.
    pub async fn record(&self, id: &str, wait: Duration) -> Result<Arc<Record>, Status> {
        self.find(id, wait, |entry| Some(entry.record.clone())).await
    }

    /// Finds what a build's frontend talks to, and waits for it.
    ///
    /// # Errors
    /// When there is no such build after that time.
    pub async fn gateway(&self, id: &str, wait: Duration) -> Result<Arc<Gateway>, Status> {
        self.find(id, wait, |entry| entry.gateway.clone()).await
    }

    /// Returns when the oldest build that runs was started, in nanoseconds since 1970.
    pub fn working_since(&self) -> Option<i64> {
        let table = self.table.borrow();
        table.values().filter(|entry| !entry.ended).map(|entry| entry.began).min()
    }

    /// Lets no more builds begin. Those that run go on.
    pub fn close(&self) {
        self.table.send_modify(|_| self.closed.store(true, Ordering::Relaxed));
    }

    /// Waits until no build runs.
    pub async fn idle(&self) {
        let mut table = self.table.subscribe();
        // The table lives as long as this does.
        drop(table.wait_for(|table| table.values().all(|entry| entry.ended)).await);
    }

    /// Waits until a build runs.
    pub async fn busy(&self) {
        let mut table = self.table.subscribe();
        drop(table.wait_for(|table| table.values().any(|entry| !entry.ended)).await);
    }

    async fn find<T>(
        &self,
        id: &str,
        wait: Duration,
        take: impl Fn(&Entry) -> Option<T>,
    ) -> Result<T, Status> {
        let mut table = self.table.subscribe();
        let look = |table: &HashMap<String, Entry>| table.get(id).and_then(&take);
        let found = tokio::time::timeout(wait, table.wait_for(|table| look(table).is_some())).await;
        let found = found.ok().and_then(Result::ok).and_then(|table| look(&table));
        found.ok_or_else(|| Status::not_found(format!("no such job {id}")))
    }
}

impl Running {
    /// Returns the build's progress.
    pub fn record(&self) -> &Arc<Record> {
        &self.record
    }

    /// Lets a frontend of the client talk to the build.
    pub fn offer(&self, gateway: Arc<Gateway>) {
        self.builds.table.send_modify(|table| {
            if let Some(entry) = table.get_mut(&self.id) {
                entry.gateway = Some(gateway);
            }
        });
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.record.end();
        self.builds.table.send_modify(|table| {
            if let Some(entry) = table.get_mut(&self.id) {
                entry.gateway = None;
                entry.ended = true;
            }
        });
        let (builds, id, record) = (self.builds.clone(), self.id.clone(), self.record.clone());
        let forget = async move {
            tokio::time::sleep(KEPT).await;
            builds.table.send_modify(|table| {
                // Not one that took its place.
                if table.get(&id).is_some_and(|entry| Arc::ptr_eq(&entry.record, &record)) {
                    table.remove(&id);
                }
            });
        };
        // Without a runtime the program is ending anyway.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            drop(runtime.spawn(forget));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_begins_once_the_end_has_begun() {
        let builds = Builds::default();
        let running = builds.start("a").unwrap();
        builds.close();
        assert_eq!(builds.start("b").unwrap_err().code(), tonic::Code::Unavailable);
        builds.record("a", Duration::ZERO).await.unwrap();
        drop(running);
        builds.idle().await;
        assert_eq!(builds.start("a").unwrap_err().code(), tonic::Code::Unavailable);
    }

    #[tokio::test(start_paused = true)]
    async fn a_build_can_be_asked_about_before_and_shortly_after_it_runs() {
        let builds = Builds::default();
        let early = tokio::spawn({
            let builds = builds.clone();
            async move { builds.record("a", Duration::from_secs(6)).await.map(drop) }
        });
        tokio::time::sleep(Duration::from_secs(5)).await;
        let running = builds.start("a").unwrap();
        early.await.unwrap().unwrap();
        assert_eq!(builds.start("a").unwrap_err().message(), "job ID a exists");
        assert!(tokio::time::timeout(Duration::from_secs(1), builds.idle()).await.is_err());
        assert!(builds.working_since().is_some());
        drop(running);
        assert_eq!(builds.working_since(), None);
        builds.idle().await;
        builds.record("a", Duration::ZERO).await.unwrap();
        tokio::time::sleep(KEPT + Duration::from_secs(1)).await;
        let gone = builds.record("a", Duration::ZERO).await.unwrap_err();
        assert_eq!((gone.code(), gone.message()), (tonic::Code::NotFound, "no such job a"));
    }
}
