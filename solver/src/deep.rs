//! Futures that nest as deeply as a graph.
//!
//! A step waits for its inputs, which wait for theirs: one future inside another for every step of a chain. A long chain
//! would exhaust the stack of a thread, so polling and dropping go on in a new piece of stack where little is left.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::FutureExt as _;
use futures::future::BoxFuture;

/// No two nested polls, and nothing that the innermost one calls, use more stack than this many bytes.
const RESERVE: usize = 256 * 1024;
/// How many bytes a new piece of stack has.
const PIECE: usize = 2 * 1024 * 1024;

/// A future that may contain any number of its own kind, one inside the other.
pub(crate) struct Deep<'a, T>(Option<BoxFuture<'a, T>>);

impl<'a, T> Deep<'a, T> {
    pub(crate) fn new(future: impl Future<Output = T> + Send + 'a) -> Self {
        Self(Some(future.boxed()))
    }
}

impl<T> Future for Deep<'_, T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let future = self.0.as_mut().expect("only dropping takes the future");
        stacker::maybe_grow(RESERVE, PIECE, || future.as_mut().poll(context))
    }
}

impl<T> Drop for Deep<'_, T> {
    fn drop(&mut self) {
        stacker::maybe_grow(RESERVE, PIECE, || drop(self.0.take()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(depth: usize, end: &tokio::sync::Notify) -> Deep<'_, usize> {
        Deep::new(async move {
            if depth == 0 {
                end.notified().await;
                return 0;
            }
            nested(depth - 1, end).await + 1
        })
    }

    #[tokio::test]
    async fn depth_is_bounded_by_memory_and_not_by_the_stack() {
        let end = tokio::sync::Notify::new();
        let mut given_up = nested(50_000, &end);
        assert!(futures::poll!(&mut given_up).is_pending());
        drop(given_up);
        end.notify_one();
        assert_eq!(nested(50_000, &end).await, 50_000);
    }
}
