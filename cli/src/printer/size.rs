//! Sizes as people read them, in powers of 1000 as docker prints them.

const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];

/// Returns a size with three significant digits and no idle zeros: `0B`, `999B`, `1.5kB`, `12.3MB`, `123GB`.
pub(crate) fn human(bytes: u64) -> String {
    scaled(bytes, |value| {
        let digits = if value < 10.0 {
            2
        } else if value < 100.0 {
            1
        } else {
            0
        };
        let text = format!("{value:.digits$}");
        if digits == 0 { text } else { text.trim_end_matches('0').trim_end_matches('.').to_owned() }
    })
}

/// Returns a size with two decimals, so that it does not jump about while it grows: `212B`, `1.20MB`.
pub(crate) fn steady(bytes: u64) -> String {
    scaled(bytes, |value| format!("{value:.2}"))
}

fn scaled(bytes: u64, format: impl Fn(f64) -> String) -> String {
    if bytes < 1000 {
        return format!("{bytes}B");
    }
    // A size beyond 2^53 loses digits that are not shown anyway.
    let mut value = bytes as f64;
    let mut text = String::new();
    let mut unit = "";
    for next in UNITS {
        value /= 1000.0;
        unit = next;
        text = format(value);
        // 999.96 kB rounds to 1000 and so is 1 MB.
        if text.parse::<f64>().is_ok_and(|shown| shown < 1000.0) {
            break;
        }
    }
    text + unit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (bytes, short, long) in [
            (0, "0B", "0B"),
            (999, "999B", "999B"),
            (1000, "1kB", "1.00kB"),
            (1500, "1.5kB", "1.50kB"),
            (12_345, "12.3kB", "12.35kB"),
            (100_000, "100kB", "100.00kB"),
            (123_456_789, "123MB", "123.46MB"),
            (999_499, "999kB", "999.50kB"),
            (999_600, "1MB", "999.60kB"),
            (999_999, "1MB", "1.00MB"),
            (9_999, "10kB", "10.00kB"),
            (5_000_000_000, "5GB", "5.00GB"),
            (u64::MAX, "18.4EB", "18.45EB"),
        ] {
            assert_eq!((human(bytes).as_str(), steady(bytes).as_str()), (short, long), "{bytes}");
        }
    }
}
