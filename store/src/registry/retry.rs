//! When to ask again, and how long to wait before.

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use http::header::RETRY_AFTER;

use super::error::{RegistryError, RegistryErrorKind};
use super::host::Host;

/// Every duration and count that bounds a conversation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    /// To open a connection, TLS included.
    pub(crate) connect: Duration,
    /// To find out whether a loopback port speaks TLS at all; a plain server may just stay silent.
    pub(crate) probe: Duration,
    /// From the last byte of a request to the head of its answer.
    pub(crate) answer: Duration,
    /// The same after an upload: registries hash what they were sent before they answer, which
    /// takes a while for a large layer.
    pub(crate) commit: Duration,
    /// For [`STALL_BYTES`] to arrive or leave; slower is as good as dead.
    pub(crate) stall: Duration,
    /// Before the second attempt; doubles from there.
    pub(crate) backoff: Duration,
    /// The longest wait a registry may ask for.
    pub(crate) longest_wait: Duration,
    /// Attempts in all.
    pub(crate) attempts: u32,
}

/// See [`Timing::stall`].
pub(crate) const STALL_BYTES: u64 = 8 * 1024;

impl Default for Timing {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(30),
            probe: Duration::from_secs(5),
            answer: Duration::from_secs(60),
            commit: Duration::from_secs(300),
            stall: Duration::from_secs(30),
            backoff: Duration::from_millis(500),
            longest_wait: Duration::from_secs(90),
            attempts: 5,
        }
    }
}

impl Timing {
    /// Returns how long to wait before the next attempt, `failures` having gone before.
    pub(crate) fn delay(&self, failures: u32) -> Duration {
        let full = self.backoff.saturating_mul(1 << failures.saturating_sub(1).min(6));
        // Between half and all of it, so that many workers do not come back at the same moment.
        full / 2 + (full / 2).mul_f64(fraction())
    }
}

/// Counts the failures of one request and waits between its attempts.
#[derive(Debug)]
pub(crate) struct Retries {
    timing: Timing,
    failures: u32,
}

impl Retries {
    pub(crate) fn new(timing: Timing) -> Self {
        Self { timing, failures: 0 }
    }

    /// Starts counting anew, after real progress.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Waits until the request may be made again.
    ///
    /// # Errors
    /// Gives the failure back when trying again makes no sense.
    pub(crate) async fn wait(
        &mut self,
        failure: RegistryError,
        host: &Host,
    ) -> Result<(), RegistryError> {
        self.failures += 1;
        if !failure.is_transient() || self.failures >= self.timing.attempts {
            return Err(failure);
        }
        let delay = match failure.wait() {
            Some(asked) if asked > self.timing.longest_wait => {
                return Err(
                    failure.with_note(&format!("the registry asks to wait {} s", asked.as_secs()))
                );
            }
            Some(asked) => asked.max(self.timing.delay(self.failures)),
            None => self.timing.delay(self.failures),
        };
        tracing::debug!(host = host.authority(), %failure, ?delay, "asking the registry again");
        if failure.kind() == RegistryErrorKind::RateLimited {
            // All workers talk to the same limit.
            host.pause(delay);
        }
        tokio::time::sleep(delay).await;
        Ok(())
    }
}

/// A number in 0..1, different each time; nothing depends on its quality.
fn fraction() -> f64 {
    let random = RandomState::new().hash_one(0);
    f64::from(u32::try_from(random >> 32).unwrap_or_default()) / f64::from(u32::MAX)
}

/// Reads `Retry-After`: seconds, or a date.
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let at = httpdate::parse_http_date(text).ok()?;
    Some(at.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_takes_seconds_and_dates() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            // 1994-11-06 08:49:37 UTC, the RFC's own example.
            retry_after(&headers, SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777))
        };
        assert_eq!(read("7"), Some(Duration::from_secs(7)));
        assert_eq!(read("Sun, 06 Nov 1994 08:49:47 GMT"), Some(Duration::from_secs(10)));
        assert_eq!(read("Sun, 06 Nov 1994 08:49:27 GMT"), Some(Duration::ZERO));
        assert_eq!((read("soon"), read("-1")), (None, None));
    }

    #[test]
    fn waits_grow_and_stay_bounded() {
        let timing = Timing::default();
        for failures in 1..100 {
            let delay = timing.delay(failures);
            let full = timing.backoff * (1 << (failures - 1).min(6));
            assert!(delay >= full / 2 && delay <= full, "{failures}: {delay:?}");
        }
    }
}
