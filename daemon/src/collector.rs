//! Looks after disk space: on request, and by the rules of the configuration when builds have ended.

use std::sync::Arc;
use std::time::Duration;

use slipway_engine::config::GcRule;
use slipway_engine::store::filter::Filter;
use slipway_engine::store::gc::collect::Collection;
use slipway_engine::store::gc::record::FIELDS;
use slipway_engine::store::gc::{CacheRecord, RecordKind, Rule};
use slipway_engine::store::{Error, Result, Store, blocking, now_nanos};
use tokio::sync::{Mutex, Notify, RwLock, RwLockReadGuard};

use crate::builds::Builds;
use crate::control::records::{LOCAL, of_folder};
use crate::memory;
use crate::session::file_sync::FileCache;

/// How long after the end of a build the rules are applied: builds often come in groups.
const AFTER_BUILD: Duration = Duration::from_secs(60);
/// How often the rules are applied when nothing is built: what is kept grows old by itself.
const AT_IDLE: Duration = Duration::from_secs(6 * 60 * 60);
/// How long trees that no build needs are kept in memory, for the next build of the same: ten minutes, in nanoseconds.
const KEEP_TREES: i64 = 600 * 1_000_000_000;

/// Looks after disk space. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Collector(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    files: FileCache,
    builds: Builds,
    rules: Vec<GcRule>,
    /// Held alone while the collector relies on it that no build begins.
    starting: RwLock<()>,
    /// One collection at a time: what two plan together is more than either was to take.
    collecting: Mutex<()>,
    ended: Notify,
}

/// Returns the size of the file system of a store, and what is free on it for ordinary users, in bytes.
pub fn disk(store: &Store) -> Option<(u64, u64)> {
    let stat = rustix::fs::statvfs(store.root()).ok()?;
    Some((stat.f_blocks.saturating_mul(stat.f_frsize), stat.f_bavail.saturating_mul(stat.f_frsize)))
}

fn nanos(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

fn rule(rule: &GcRule) -> Option<Rule> {
    let filter = match Filter::parse(&rule.filters, FIELDS) {
        Ok(filter) => filter,
        Err(error) => {
            tracing::warn!(%error, "a rule for collecting garbage is passed over");
            return None;
        }
    };
    Some(Rule {
        all: rule.all,
        filter,
        keep: nanos(rule.keep_duration),
        reserved: rule.reserved_bytes,
        max_used: rule.max_used_bytes,
        min_free: rule.min_free_bytes,
    })
}

impl Collector {
    /// Looks after a store and the files of clients. Nothing happens yet.
    pub fn new(store: Store, files: FileCache, builds: Builds, rules: Vec<GcRule>) -> Self {
        Self(Arc::new(Inner {
            store,
            files,
            builds,
            rules,
            starting: RwLock::default(),
            collecting: Mutex::default(),
            ended: Notify::new(),
        }))
    }

    /// Returns the files of clients.
    pub fn files(&self) -> &FileCache {
        &self.0.files
    }

    /// Returns the rules that are applied by themselves.
    pub fn rules(&self) -> &[GcRule] {
        &self.0.rules
    }

    /// Is held while a build puts itself on the list of those that run.
    pub async fn starting(&self) -> RwLockReadGuard<'_, ()> {
        self.0.starting.read().await
    }

    /// Says that a build has ended.
    pub fn build_ended(&self) {
        self.0.ended.notify_one();
    }

    /// Lists what takes space.
    ///
    /// # Errors
    /// When the disk or the database fails.
    pub async fn records(&self) -> Result<Vec<CacheRecord>> {
        let inner = self.0.clone();
        blocking::run(move || inner.records()).await
    }

    /// Lists the kept files of clients, which are part of what takes space.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn file_records(&self) -> Result<Vec<CacheRecord>> {
        let inner = self.0.clone();
        blocking::run(move || inner.file_records()).await
    }

    /// Takes away what rules allow, one after the other, and returns what went. `asked` is whether somebody waits for it: then
    /// a rule without limits also takes what costs next to nothing.
    ///
    /// # Errors
    /// When the disk or the database fails; what was freed until then stays freed.
    pub async fn collect(&self, rules: Vec<Rule>, asked: bool) -> Result<Vec<CacheRecord>> {
        let _one = self.0.collecting.lock().await;
        let mut gone = vec![];
        // What the rules before have left, as long as they took nothing.
        let mut listed = None;
        for rule in rules {
            gone.extend(self.apply(rule, asked, &mut listed).await?);
        }
        Ok(gone)
    }

    async fn apply(
        &self,
        rule: Rule,
        asked: bool,
        listed: &mut Option<Vec<CacheRecord>>,
    ) -> Result<Vec<CacheRecord>> {
        let everything =
            asked && !rule.is_limited() && rule.keep <= 0 && rule.filter.is_everything();
        if asked {
            self.forget_trees(0);
        }
        let (inner, known) = (self.0.clone(), listed.take());
        let (records, planned) = blocking::run(move || {
            let records = known.map_or_else(|| inner.records(), Ok)?;
            let free = disk(&inner.store).map_or(u64::MAX, |(_, free)| free);
            let plan = rule.plan(&records, now_nanos(), free);
            let planned: Vec<_> = plan.into_iter().map(|at| records[at].clone()).collect();
            Ok::<_, Error>((records, planned))
        })
        .await?;
        if planned.is_empty() && !everything {
            *listed = Some(records);
            return Ok(vec![]);
        }
        let quiet = self.0.starting.write().await;
        let working_since = self.0.builds.working_since();
        let inner = self.0.clone();
        let collected = blocking::run(move || {
            let records = &planned;
            let collected =
                inner.store.take_records(&Collection { records, working_since, everything })?;
            Ok::<_, Error>((collected, planned))
        })
        .await;
        drop(quiet);
        let (collected, planned) = collected?;
        let inner = self.0.clone();
        blocking::run(move || {
            let mut gone = inner.store.finish_collection(collected)?;
            for record in planned {
                if let Some(id) = record.id.strip_prefix(LOCAL)
                    && record.kind == RecordKind::LocalSource
                    && inner.files.remove(id)?
                {
                    gone.push(record);
                }
            }
            Ok(gone)
        })
        .await
    }

    /// Takes away what the rules of the configuration say.
    ///
    /// # Errors
    /// When the disk or the database fails.
    pub async fn collect_by_rules(&self) -> Result<Vec<CacheRecord>> {
        self.forget_trees(KEEP_TREES);
        self.collect(self.0.rules.iter().filter_map(rule).collect(), false).await
    }

    /// Forgets trees that no build needs and nobody has asked for within a time, in nanoseconds.
    fn forget_trees(&self, unused: i64) -> usize {
        // Before the look at who works: a build that begins after that look asks after this moment.
        let now = now_nanos();
        let working = self.0.builds.working_since().unwrap_or(i64::MAX);
        self.0.store.forget_trees(now.saturating_sub(unused).min(working))
    }

    /// Applies the rules once it has begun, when builds have ended, and now and then, for as long as it is polled.
    pub async fn run(self) {
        self.build_ended();
        loop {
            // Either is a reason.
            let _ended = tokio::time::timeout(AT_IDLE, self.0.ended.notified()).await;
            tokio::time::sleep(AFTER_BUILD).await;
            match self.collect_by_rules().await {
                Ok(gone) if gone.is_empty() => {}
                Ok(gone) => {
                    let bytes: u64 = gone.iter().map(|record| record.bytes).sum();
                    tracing::info!(records = gone.len(), bytes, "garbage is collected");
                }
                Err(error) => tracing::warn!(%error, "garbage cannot be collected"),
            }
            // Until nobody can be expected to want them any more.
            let inner = Arc::downgrade(&self.0);
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_nanos(KEEP_TREES.unsigned_abs())).await;
                if let Some(inner) = inner.upgrade() {
                    let collector = Self(inner);
                    let forgotten = collector.forget_trees(KEEP_TREES);
                    tracing::debug!(forgotten, "trees that no build needs are forgotten");
                    // They may have been the last to refer to files of clients.
                    memory::close_files(collector.files()).await;
                }
            });
        }
    }
}

impl Inner {
    fn records(&self) -> Result<Vec<CacheRecord>> {
        let mut records = self.store.cache_records(self.builds.working_since())?;
        records.extend(self.file_records()?);
        Ok(records)
    }

    fn file_records(&self) -> Result<Vec<CacheRecord>> {
        Ok(self.files.folders()?.iter().map(of_folder).collect())
    }
}
