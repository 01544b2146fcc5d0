//! Times as people and documents write them. All are UTC.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use slipway_spec::timestamp;

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;

/// Returns how long ago a time was, in docker's words; a time to come is now.
pub(crate) fn ago(now: SystemTime, then: SystemTime) -> String {
    format!("{} ago", duration(now.duration_since(then).unwrap_or_default()))
}

/// Returns a duration in docker's words: one unit, the largest that fits.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    // Docker rounds hours to the nearest.
    let hours = (seconds + HOUR / 2) / HOUR;
    match seconds {
        0 => "Less than a second".into(),
        1 => "1 second".into(),
        _ if seconds < MINUTE => format!("{seconds} seconds"),
        _ if seconds < 2 * MINUTE => "About a minute".into(),
        _ if seconds < HOUR => format!("{} minutes", seconds / MINUTE),
        _ if hours == 1 => "About an hour".into(),
        _ if hours < 48 => format!("{hours} hours"),
        _ if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        _ if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        _ if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        _ => format!("{} years", hours / 24 / 365),
    }
}

/// Returns a time as RFC 3339 with as many decimals as it has: `2026-08-20T12:00:00.5Z`.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    timestamp::format(nanos(time))
}

/// Returns a time as docker's lists print it: `2026-08-20 12:00:00 +0000 UTC`.
pub(crate) fn listed(time: SystemTime) -> String {
    let whole = nanos(time).div_euclid(1_000_000_000) * 1_000_000_000;
    timestamp::format(whole).replace('T', " ").replace('Z', " +0000 UTC")
}

/// Nanoseconds since 1970; times beyond what fits are the last that does.
fn nanos(time: SystemTime) -> i64 {
    let convert = |duration: Duration| i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => convert(after),
        Err(before) => -convert(before.duration()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_times_are_dockers() {
        let now = UNIX_EPOCH + Duration::from_secs(2_000_000_000);
        for (seconds, text) in [
            (0, "Less than a second ago"),
            (1, "1 second ago"),
            (59, "59 seconds ago"),
            (60, "About a minute ago"),
            (120, "2 minutes ago"),
            (59 * 60 + 59, "59 minutes ago"),
            (3600, "About an hour ago"),
            (2 * 3600, "2 hours ago"),
            (47 * 3600, "47 hours ago"),
            (48 * 3600, "2 days ago"),
            (14 * 86400, "2 weeks ago"),
            (60 * 86400, "2 months ago"),
            (730 * 86400, "2 years ago"),
        ] {
            assert_eq!(ago(now, now - Duration::from_secs(seconds)), text);
        }
        assert_eq!(ago(now, now + Duration::from_secs(60)), "Less than a second ago");
    }

    #[test]
    fn times_are_written_for_documents_and_for_lists() {
        let time = UNIX_EPOCH + Duration::new(1_787_227_200, 500_000_000);
        assert_eq!(rfc3339(time), "2026-08-20T12:00:00.5Z");
        assert_eq!(listed(time), "2026-08-20 12:00:00 +0000 UTC");
        assert_eq!(rfc3339(UNIX_EPOCH - Duration::from_millis(250)), "1969-12-31T23:59:59.75Z");
    }
}
