//! Listening to the history: what there is, then what happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::stream::BoxStream;
use slipway_engine::store::now_nanos;
use slipway_spec::wire::control::{
    BuildHistoryEvent, BuildHistoryEventType, BuildHistoryRecord, BuildHistoryRequest,
};
use tokio::sync::mpsc;
use tonic::Status;

use super::filter::RecordFilter;
use super::{History, event};

/// Records that are read at once.
const PAGE: usize = 32;
/// Events on their way to a listener who does not take them.
const WAITING: usize = 1024;
/// Messages on their way to a client.
const OUTGOING: usize = 16;

/// Somebody who listens.
#[derive(Debug)]
pub(super) struct Listener {
    /// Only this build; empty is any.
    id: String,
    sender: mpsc::Sender<BuildHistoryEvent>,
    late: Arc<AtomicBool>,
}

impl Listener {
    /// Passes an event on. Returns whether there will be more.
    pub(super) fn tell(&self, event: &BuildHistoryEvent) -> bool {
        let about = event.record.as_ref().map_or("", |record| record.r#ref.as_str());
        if !self.id.is_empty() && self.id != about {
            return !self.sender.is_closed();
        }
        match self.sender.try_send(event.clone()) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => false,
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.late.store(true, Ordering::Relaxed);
                false
            }
        }
    }
}

/// Keeps a record from being deleted while somebody listens to it.
struct Watch {
    history: History,
    id: String,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut state = self.history.shared.lock();
        if let Some(count) = state.watched.get_mut(&self.id) {
            *count -= 1;
            if *count > 0 {
                return;
            }
        }
        state.watched.remove(&self.id);
        let condemned = state.condemned.contains(&self.id);
        drop(state);
        if condemned {
            let id = std::mem::take(&mut self.id);
            self.history.queue(move |shared, _| {
                shared.report("rid of a record", shared.delete(&id));
            });
        }
    }
}

type Events = BoxStream<'static, Result<BuildHistoryEvent, Status>>;
type Outgoing = mpsc::Sender<Result<BuildHistoryEvent, Status>>;

impl History {
    /// Tells what there is, and what happens from now on unless the client wants to leave early.
    ///
    /// # Errors
    /// When the request makes no sense, or asks for a record that is being deleted.
    pub async fn listen(&self, request: BuildHistoryRequest) -> Result<Events, Status> {
        let filter = RecordFilter::parse(&request.filter, now_nanos())?;
        let limit = usize::try_from(request.limit)
            .map_err(|_| Status::invalid_argument(format!("invalid limit {}", request.limit)))?;
        // What has ended is to be found complete.
        self.ask(|_, _| Ok(())).await?;
        let (sender, receiver) = mpsc::channel(WAITING);
        let late = Arc::new(AtomicBool::new(false));
        let (watch, active) = {
            let mut state = self.shared.lock();
            let id = &request.r#ref;
            let watch = (!id.is_empty()).then(|| Watch { history: self.clone(), id: id.clone() });
            if watch.is_some() {
                *state.watched.entry(id.clone()).or_default() += 1;
            }
            let gone = state.condemned.contains(id);
            let (id, late) = (id.clone(), late.clone());
            if !gone && !request.early_exit {
                state.listeners.push(Listener { id, sender, late });
            }
            let wanted = |record: &&BuildHistoryRecord| {
                request.r#ref.is_empty() || record.r#ref == request.r#ref
            };
            let active: Vec<BuildHistoryRecord> =
                state.active.values().filter(wanted).cloned().collect();
            drop(state);
            if gone {
                return Err(Status::not_found(format!("ref {} is deleted", request.r#ref)));
            }
            (watch, active)
        };
        let (outgoing, incoming) = mpsc::channel(OUTGOING);
        let history = self.clone();
        tokio::spawn(async move {
            let _watch = watch;
            let told = Telling { history, request, filter, limit, outgoing };
            // Either everything was told or nobody hears it.
            let _end = told.tell(active, receiver, &late).await;
        });
        Ok(Box::pin(futures::stream::unfold(incoming, |mut incoming| async move {
            incoming.recv().await.map(|event| (event, incoming))
        })))
    }
}

/// One listener being told.
struct Telling {
    history: History,
    request: BuildHistoryRequest,
    filter: RecordFilter,
    limit: usize,
    outgoing: Outgoing,
}

impl Telling {
    async fn send(&self, event: Result<BuildHistoryEvent, Status>) -> Option<()> {
        self.outgoing.send(event).await.ok()
    }

    async fn tell(
        &self,
        active: Vec<BuildHistoryRecord>,
        mut events: mpsc::Receiver<BuildHistoryEvent>,
        late: &AtomicBool,
    ) -> Option<()> {
        for record in active {
            self.send(Ok(event(BuildHistoryEventType::Started, record))).await?;
        }
        if !self.request.active_only
            && let Err(status) = self.tell_stored().await
        {
            return self.send(Err(status?)).await;
        }
        if self.request.early_exit {
            return Some(());
        }
        loop {
            let next = tokio::select! {
                next = events.recv() => next,
                () = self.outgoing.closed() => return None,
                () = self.history.shared.stopping.cancelled() => return Some(()),
            };
            match next {
                Some(event) => self.send(Ok(event)).await?,
                None if late.load(Ordering::Relaxed) => {
                    let text = "more happened than this listener has taken";
                    return self.send(Err(Status::resource_exhausted(text))).await;
                }
                None => return Some(()),
            }
        }
    }

    /// Tells of builds that have ended. An error without a status is that nobody hears it.
    async fn tell_stored(&self) -> Result<(), Option<Status>> {
        let complete = |record| Ok(event(BuildHistoryEventType::Complete, record));
        if !self.request.r#ref.is_empty() {
            let id = self.request.r#ref.clone();
            let found = self.history.ask(move |shared, _| shared.book.get(&id)).await?;
            let wanted =
                found.filter(|record| record.completed_at.is_some() && self.filter.holds(record));
            if let Some(record) = wanted {
                self.send(complete(record)).await.ok_or(None)?;
            }
            return Ok(());
        }
        let (mut next, mut told) = (None, 0);
        loop {
            let newest_first = self.limit > 0;
            let page = self
                .history
                .ask(move |shared, _| shared.book.page(next.as_ref(), newest_first, PAGE))
                .await?;
            for record in page.records {
                if self.history.shared.lock().condemned.contains(&record.r#ref)
                    || !self.filter.holds(&record)
                {
                    continue;
                }
                self.send(complete(record)).await.ok_or(None)?;
                told += 1;
                if told == self.limit {
                    return Ok(());
                }
            }
            next = page.next;
            if next.is_none() {
                return Ok(());
            }
        }
    }
}
