//! Times as people and documents write them. All are UTC.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

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

struct Parts {
    year: i64,
    month: u64,
    day: u64,
    seconds: u64,
    nanos: u32,
}

/// Splits a time into its calendar parts (Gregorian, proleptic).
fn parts(time: SystemTime) -> Parts {
    let (seconds, nanos) = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => (i64::try_from(after.as_secs()).unwrap_or(i64::MAX / 2), after.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            let borrow = i64::from(before.subsec_nanos() > 0);
            let seconds = i64::try_from(before.as_secs()).unwrap_or(i64::MAX / 2);
            (-seconds - borrow, (1_000_000_000 - before.subsec_nanos()) % 1_000_000_000)
        }
    };
    let days = seconds.div_euclid(DAY.cast_signed());
    // Years are counted from March, so that the leap day is the last of its year; eras are 400 years.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    Parts {
        year: year_of_era + era * 400 + i64::from(month <= 2),
        month: month.unsigned_abs(),
        day: day.unsigned_abs(),
        seconds: seconds.rem_euclid(DAY.cast_signed()).unsigned_abs(),
        nanos,
    }
}

/// Returns a time as RFC 3339 with as many decimals as it has: `2026-08-20T12:00:00.5Z`.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    let Parts { year, month, day, seconds, nanos } = parts(time);
    let (hour, minute, second) = (seconds / HOUR, seconds % HOUR / MINUTE, seconds % MINUTE);
    let fraction = match nanos {
        0 => String::new(),
        _ => format!(".{nanos:09}").trim_end_matches('0').to_owned(),
    };
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// Returns a time as docker's lists print it: `2026-08-20 12:00:00 +0000 UTC`.
pub(crate) fn listed(time: SystemTime) -> String {
    let Parts { year, month, day, seconds, .. } = parts(time);
    let (hour, minute, second) = (seconds / HOUR, seconds % HOUR / MINUTE, seconds % MINUTE);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} +0000 UTC")
}

/// Parses RFC 3339, as image configs write times.
pub(crate) fn parse_rfc3339(text: &str) -> Option<SystemTime> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| -> Option<u64> {
        let digits = bytes.get(from..to)?;
        digits
            .iter()
            .all(u8::is_ascii_digit)
            .then(|| std::str::from_utf8(digits).ok()?.parse().ok())
            .flatten()
    };
    let mark = |at: usize, allowed: &[u8]| bytes.get(at).is_some_and(|byte| allowed.contains(byte));
    if !(mark(4, b"-") && mark(7, b"-") && mark(10, b"Tt ") && mark(13, b":") && mark(16, b":")) {
        return None;
    }
    let (year, month, day) = (number(0, 4)?.cast_signed(), number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    if !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
        || hour > 23
        || minute > 59
        || second > 60
    {
        return None;
    }
    let rest = text.get(19..)?;
    let (nanos, zone) = match rest.strip_prefix('.') {
        Some(fraction) => {
            let length = fraction.bytes().take_while(u8::is_ascii_digit).count();
            let digits: String =
                fraction.get(..length)?.chars().chain("000000000".chars()).take(9).collect();
            (digits.parse::<u32>().ok().filter(|_| length > 0)?, fraction.get(length..)?)
        }
        None => (0, rest),
    };
    let offset = zone_offset(zone)?;
    let (shifted_year, month) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let era = shifted_year.div_euclid(400);
    let year_of_era = shifted_year.rem_euclid(400);
    let day_of_year = (153 * month + 2).cast_signed() / 5 + day.cast_signed() - 1;
    let days = era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100
        + day_of_year
        - 719_468;
    let seconds =
        days * DAY.cast_signed() + (hour * HOUR + minute * MINUTE + second).cast_signed() - offset;
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let time =
        if seconds >= 0 { UNIX_EPOCH.checked_add(whole) } else { UNIX_EPOCH.checked_sub(whole) };
    time?.checked_add(Duration::from_nanos(nanos.into()))
}

fn zone_offset(zone: &str) -> Option<i64> {
    if zone.eq_ignore_ascii_case("z") {
        return Some(0);
    }
    let (sign, rest) = match zone.as_bytes().first()? {
        b'+' => (1, zone.get(1..)?),
        b'-' => (-1, zone.get(1..)?),
        _ => return None,
    };
    let (hours, minutes) = rest.split_once(':')?;
    if hours.len() != 2 || minutes.len() != 2 {
        return None;
    }
    Some(
        sign * (i64::from(hours.parse::<u8>().ok()?) * 3600
            + i64::from(minutes.parse::<u8>().ok()?) * 60),
    )
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
    fn rfc3339_both_ways() {
        for (text, seconds, nanos) in [
            ("1970-01-01T00:00:00Z", 0, 0),
            ("2000-02-29T23:59:59Z", 951_868_799, 0),
            ("2026-08-20T12:00:00.5Z", 1_787_227_200, 500_000_000),
            ("2100-03-01T00:00:00.000000001Z", 4_107_542_400, 1),
        ] {
            let time = UNIX_EPOCH + Duration::new(seconds, nanos);
            assert_eq!(rfc3339(time), text);
            assert_eq!(parse_rfc3339(text), Some(time), "{text}");
        }
        let before = parse_rfc3339("0001-01-01T00:00:00Z").unwrap();
        assert_eq!(rfc3339(before), "0001-01-01T00:00:00Z");
        let fraction = parse_rfc3339("1969-12-31T23:59:59.25Z").unwrap();
        assert_eq!(rfc3339(fraction), "1969-12-31T23:59:59.25Z");
        assert_eq!(
            parse_rfc3339("2026-08-20T14:00:00+02:00"),
            parse_rfc3339("2026-08-20T12:00:00Z")
        );
        assert_eq!(listed(UNIX_EPOCH), "1970-01-01 00:00:00 +0000 UTC");
        for bad in [
            "",
            "2026",
            "2026-13-01T00:00:00Z",
            "2026-01-01T00:00:00",
            "2026-01-01T00:00:00.Z",
            "2026-01-01T00:00:00é",
        ] {
            assert_eq!(parse_rfc3339(bad), None, "{bad}");
        }
    }
}
