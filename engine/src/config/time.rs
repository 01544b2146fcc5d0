//! Durations, as they are written in configuration files.

use std::time::Duration;

/// Reads a number of seconds, or Go's notation: `48h`, `1h30m`, `1.5s`. Negative ones make no sense here.
pub fn parse_duration(text: &str) -> Option<Duration> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().ok().map(Duration::from_secs);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest.is_empty() {
        return None;
    }
    let mut sum = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let unit = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit);
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let part = number.parse::<f64>().ok()? * seconds;
        sum = sum.checked_add(Duration::try_from_secs_f64(part).ok()?)?;
        rest = tail;
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_and_units_are_read() {
        for (text, expected) in [
            ("172800", Duration::from_secs(172_800)),
            ("0", Duration::ZERO),
            ("48h", Duration::from_secs(172_800)),
            ("1h30m", Duration::from_secs(5400)),
            ("1.5s", Duration::from_millis(1500)),
            ("+20ms", Duration::from_millis(20)),
            ("3µs", Duration::from_micros(3)),
        ] {
            assert_eq!(parse_duration(text), Some(expected), "{text}");
        }
        for text in ["", "+", "h", "1", "-1", "-1s", "1d", "1h30", "1.2.3s", "soon", "1e9h", "+5"] {
            let expected = (text == "1").then(|| Duration::from_secs(1));
            assert_eq!(parse_duration(text), expected, "{text}");
        }
    }
}
