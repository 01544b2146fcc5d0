//! Asks a client every few seconds whether it is alive.

use std::time::Duration;

use slipway_spec::wire::health::HealthCheckRequest;
use slipway_spec::wire::health::health_client::HealthClient;
use tokio::time::{Instant, sleep, timeout};
use tonic::metadata::MetadataMap;

use super::channel::Channel;

/// The header by which tests of clients make checks stricter, in milliseconds.
const CUSTOM_TIMEOUT: &str = "x-buildkit-session-health-custom-timeout";

/// When a client counts as gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HealthOptions {
    /// From the end of a check to the next.
    interval: Duration,
    /// What a check may take, or half as much again as the last one took. A client that sends a large context over a slow
    /// line answers late.
    timeout: Duration,
    /// Checks that may fail in a row, and one more.
    failures: u32,
}

impl Default for HealthOptions {
    fn default() -> Self {
        Self { interval: Duration::from_secs(5), timeout: Duration::from_secs(15), failures: 2 }
    }
}

impl HealthOptions {
    /// Reads what the client asked for.
    pub(super) fn from_metadata(metadata: &MetadataMap) -> Self {
        let asked = metadata.get(CUSTOM_TIMEOUT).and_then(|value| value.to_str().ok());
        match asked.and_then(|text| text.parse().ok()) {
            Some(milliseconds) if milliseconds > 0 => {
                let timeout = Duration::from_millis(milliseconds).max(Duration::from_secs(1));
                Self { interval: timeout, timeout, failures: 1 }
            }
            _ => Self::default(),
        }
    }
}

/// Resolves when the client counts as gone, and says why.
pub(super) async fn watch(channel: Channel, options: HealthOptions) -> String {
    let mut client = HealthClient::new(channel);
    let mut failures = 0;
    let mut last = Duration::ZERO;
    loop {
        sleep(options.interval).await;
        let started = Instant::now();
        let limit = options.timeout.max(last.mul_f64(1.5));
        let why = match timeout(limit, client.check(HealthCheckRequest::default())).await {
            Ok(Ok(_)) => None,
            Ok(Err(status)) => Some(status.message().to_owned()),
            Err(_) => Some(format!("no answer in {} s", limit.as_secs())),
        };
        last = started.elapsed();
        let Some(why) = why else {
            failures = 0;
            continue;
        };
        failures += 1;
        tracing::debug!(why, failures, "a health check of a client failed");
        if failures >= options.failures {
            return format!("the client does not answer health checks: {why}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stricter_checks_are_not_stricter_than_a_second() {
        for (text, expected) in
            [("2500", Some(2500)), ("1", Some(1000)), ("0", None), ("-3", None), ("soon", None)]
        {
            let mut metadata = MetadataMap::new();
            metadata.insert(CUSTOM_TIMEOUT, text.parse().unwrap());
            let expected = expected.map(Duration::from_millis).map_or_else(
                HealthOptions::default,
                |timeout| HealthOptions { interval: timeout, timeout, failures: 1 },
            );
            assert_eq!(HealthOptions::from_metadata(&metadata), expected, "{text}");
        }
    }
}
