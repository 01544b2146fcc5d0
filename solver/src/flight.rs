//! Work that several builds of the process want at the same time: one does it, the others wait for it.
//!
//! A [`Flight`] is one piece of such work. Whoever wants it takes a [`Seat`]; the first to ask for the outcome works for it.
//! Dropping that future at any point hands the work to the next one who waits, so a client that leaves takes nothing away
//! from others. A flight is forgotten once it has an outcome, or nobody sits in it any more.
//!
//! Whoever works for an outcome waits for nothing that needs another seat: then no two flights can wait for each other.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OnceCell;

/// The flights of one kind, by what they are for. `E` is what belongs to a flight from its beginning.
pub(crate) struct Flights<K, T, E = ()> {
    table: Mutex<HashMap<K, Entry<T, E>>>,
}

struct Entry<T, E> {
    flight: Arc<Flight<T, E>>,
    seats: usize,
}

/// One piece of work.
struct Flight<T, E> {
    outcome: OnceCell<T>,
    extra: E,
}

/// A place in a flight.
pub(crate) struct Seat<'a, K: Eq + Hash + Clone, T, E = ()> {
    flights: &'a Flights<K, T, E>,
    key: K,
    flight: Arc<Flight<T, E>>,
}

impl<K, T, E> Default for Flights<K, T, E> {
    fn default() -> Self {
        Self { table: Mutex::default() }
    }
}

impl<K, T, E> fmt::Debug for Flights<K, T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flights").field("under_way", &self.table().len()).finish()
    }
}

impl<K, T, E> Flights<K, T, E> {
    fn table(&self) -> MutexGuard<'_, HashMap<K, Entry<T, E>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash + Clone, T, E> Flights<K, T, E> {
    /// Takes a seat in a flight, which begins with the first one.
    pub(crate) fn enter(&self, key: K) -> Seat<'_, K, T, E>
    where
        E: Default,
    {
        let mut table = self.table();
        let entry = table.entry(key.clone()).or_insert_with(|| Entry {
            flight: Arc::new(Flight { outcome: OnceCell::new(), extra: E::default() }),
            seats: 0,
        });
        entry.seats += 1;
        Seat { flights: self, key, flight: entry.flight.clone() }
    }

    /// Takes a seat in a flight that there is.
    pub(crate) fn join(&self, key: K) -> Option<Seat<'_, K, T, E>> {
        let mut table = self.table();
        let entry = table.get_mut(&key)?;
        entry.seats += 1;
        let flight = entry.flight.clone();
        Some(Seat { flights: self, key, flight })
    }
}

impl<K: Eq + Hash + Clone, T: Clone, E> Seat<'_, K, T, E> {
    /// Returns what belongs to the flight.
    pub(crate) fn extra(&self) -> &E {
        &self.flight.extra
    }

    /// Returns the outcome, working for it unless somebody else does. An error is the worker's own: the next one who waits
    /// works then.
    pub(crate) async fn outcome<X>(
        &self,
        work: impl Future<Output = Result<T, X>>,
    ) -> Result<T, X> {
        self.flight.outcome.get_or_try_init(|| work).await.cloned()
    }
}

impl<K: Eq + Hash + Clone, T, E> Drop for Seat<'_, K, T, E> {
    fn drop(&mut self) {
        let mut table = self.flights.table();
        let Some(entry) = table.get_mut(&self.key) else { return };
        // Another flight may have begun since this one was forgotten.
        if !Arc::ptr_eq(&entry.flight, &self.flight) {
            return;
        }
        entry.seats -= 1;
        if entry.seats == 0 || self.flight.outcome.initialized() {
            table.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::future::join_all;

    use super::*;

    type Numbers = Flights<&'static str, usize>;

    #[tokio::test]
    async fn one_works_and_all_have_the_outcome() {
        let flights = Numbers::default();
        let runs = AtomicUsize::new(0);
        let build = || async {
            let seat = flights.enter("a");
            let work = async {
                let run = runs.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
                Ok::<_, ()>(run)
            };
            seat.outcome(work).await
        };
        assert_eq!(join_all((0..32).map(|_| build())).await, vec![Ok(0); 32]);
        assert!(flights.table().is_empty());
        assert_eq!(build().await, Ok(1), "what comes later is work of its own");
    }

    #[tokio::test]
    async fn whoever_waits_takes_over_wherever_the_worker_leaves() {
        const STEPS: usize = 5;
        let flights = Numbers::default();
        let runs = AtomicUsize::new(0);
        let work = || async {
            for _ in 0..STEPS {
                tokio::task::yield_now().await;
            }
            Ok::<_, ()>(runs.fetch_add(1, Ordering::Relaxed))
        };
        let build = || async {
            let seat = flights.enter("a");
            seat.outcome(work()).await
        };
        for polls in 0..=STEPS + 1 {
            let mut first = Box::pin(build());
            let mut second = Box::pin(build());
            let mut done = None;
            for _ in 0..polls {
                if done.is_none()
                    && let std::task::Poll::Ready(outcome) = futures::poll!(&mut first)
                {
                    done = Some(outcome);
                }
                assert!(done.is_some() || futures::poll!(&mut second).is_pending());
            }
            let before = runs.load(Ordering::Relaxed);
            drop(first);
            let outcome = second.await.unwrap();
            match done {
                Some(first) => assert_eq!(first, Ok(outcome)),
                None => assert_eq!(outcome, before),
            }
            assert!(flights.table().is_empty());
        }
    }

    #[tokio::test]
    async fn an_error_is_the_workers_own() {
        let flights = Numbers::default();
        let build = |result: Result<usize, &'static str>| {
            let seat = flights.enter("a");
            async move {
                let work = async {
                    tokio::task::yield_now().await;
                    result
                };
                seat.outcome(work).await
            }
        };
        let all = join_all([build(Err("mine")), build(Ok(7)), build(Err("never asked"))]).await;
        assert_eq!(all, [Err("mine"), Ok(7), Ok(7)]);
        assert!(flights.join("a").is_none());
    }
}
