//! From listening to the end: connections are served while there is time.

use std::time::Duration;

use futures::StreamExt as _;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Listeners;
use crate::router::Router;

impl Listeners {
    /// Serves every connection until `stop` resolves. Then nobody new is let in, and calls that run may go on until
    /// they end, `drained` resolves or `patience` is over; what is left is cut off.
    ///
    /// Streams that a client holds open to be told news never end by themselves, so `drained` should resolve when
    /// nothing is being built.
    pub async fn serve(
        self,
        router: &Router,
        stop: impl Future<Output = ()>,
        drained: impl Future<Output = ()>,
        patience: Duration,
    ) {
        let mut incoming = self.incoming();
        let mut connections = JoinSet::new();
        let stopping = CancellationToken::new();
        tokio::pin!(stop);
        loop {
            let connection = tokio::select! {
                () = &mut stop => break,
                Some(ended) = connections.join_next(), if !connections.is_empty() => {
                    log_end(ended);
                    continue;
                }
                Some(connection) = incoming.next() => connection,
            };
            let connection = match connection {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::debug!(%error, "a connection did not come about");
                    continue;
                }
            };
            let router = router.clone();
            let stop = stopping.clone().cancelled_owned();
            connections.spawn(async move {
                let peer = connection.peer().to_owned();
                tracing::debug!(peer, "connected");
                match router.serve(connection, stop).await {
                    Ok(()) => tracing::debug!(peer, "disconnected"),
                    Err(error) => {
                        let error: &dyn std::error::Error = &error;
                        tracing::debug!(peer, error, "the connection broke");
                    }
                }
            });
        }
        drop(incoming);
        stopping.cancel();
        let all_ended = async {
            while let Some(ended) = connections.join_next().await {
                log_end(ended);
            }
        };
        tokio::select! {
            () = all_ended => {}
            () = drained => {}
            () = tokio::time::sleep(patience) => tracing::warn!("cutting off what still runs"),
        }
        connections.shutdown().await;
    }
}

fn log_end(ended: Result<(), tokio::task::JoinError>) {
    // A call that panicked must not take the daemon along.
    if let Err(error) = ended {
        tracing::error!(%error, "serving a connection failed");
    }
}
