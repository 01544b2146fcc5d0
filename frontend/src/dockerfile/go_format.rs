//! Texts that must look as Go's `fmt`, `encoding/json` and `time` write them, because they end up in image configs and
//! vertex digests.

/// Writes a list as `%q` does: `["a" "b"]`.
pub(crate) fn quoted_list(list: &[String]) -> String {
    let quoted: Vec<String> = list.iter().map(|text| quoted(text)).collect();
    format!("[{}]", quoted.join(" "))
}

/// Writes a list as `%v` does: `[a b]`.
pub(crate) fn plain_list(list: &[String]) -> String {
    format!("[{}]", list.join(" "))
}

/// Writes text in quotes as `%q` does.
pub(crate) fn quoted(text: &str) -> String {
    let mut result = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => result.extend(['\\', c]),
            '\u{7}' => result.push_str("\\a"),
            '\u{8}' => result.push_str("\\b"),
            '\u{c}' => result.push_str("\\f"),
            '\n' => result.push_str("\\n"),
            '\r' => result.push_str("\\r"),
            '\t' => result.push_str("\\t"),
            '\u{b}' => result.push_str("\\v"),
            c if c.is_ascii_control() => result.push_str(&format!("\\x{:02x}", u32::from(c))),
            // Blanks other than the usual one do not count as printable.
            c if c.is_control() || (c.is_whitespace() && c != ' ') || c == '\u{feff}' => {
                result.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            c => result.push(c),
        }
    }
    result.push('"');
    result
}

/// Writes a JSON array of strings as `json.Marshal` does, which also escapes `<`, `>` and `&`.
pub(crate) fn json_list(list: &[String]) -> String {
    let json = serde_json::Value::from(list).to_string();
    json.replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

const UNITS: [(&str, u64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Reads a duration such as `1m30s` or `1.5h`, in nanoseconds.
pub(crate) fn parse_duration(text: &str) -> Result<i64, String> {
    let invalid = || format!("invalid duration {text:?}");
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Ok(0);
    }
    if rest.is_empty() {
        return Err(invalid());
    }
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, tail) = rest.split_at(number_end);
        let unit_end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        if unit.is_empty() {
            return Err(format!("missing unit in duration {text:?}"));
        }
        let scale = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, scale)| *scale);
        let scale = scale.ok_or_else(|| format!("unknown unit {unit:?} in duration {text:?}"))?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
            return Err(invalid());
        }
        let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| invalid())? };
        // More than 18 digits cannot change a number of nanoseconds.
        let digits = &fraction[..fraction.len().min(18)];
        let numerator: u128 =
            if digits.is_empty() { 0 } else { digits.parse().map_err(|_| invalid())? };
        let part =
            numerator * u128::from(scale) / 10u128.pow(u32::try_from(digits.len()).unwrap_or(0));
        let nanos = whole.checked_mul(scale).and_then(|n| n.checked_add(u64::try_from(part).ok()?));
        total = nanos.and_then(|nanos| total.checked_add(nanos)).ok_or_else(invalid)?;
        rest = tail;
    }
    let total = i64::try_from(total).map_err(|_| invalid())?;
    Ok(if negative { -total } else { total })
}

/// Writes nanoseconds as `time.Duration` does: `1m30s`, `1.5s`, `100ms`, `0s`.
pub(crate) fn duration(nanos: i64) -> String {
    let sign = if nanos < 0 { "-" } else { "" };
    let nanos = nanos.unsigned_abs();
    let fraction = |value: u64, scale: u64| {
        let rest = value % scale;
        if rest == 0 {
            return (value / scale).to_string();
        }
        let width = scale.ilog10() as usize;
        format!("{}.{}", value / scale, format!("{rest:0width$}").trim_end_matches('0'))
    };
    let text = match nanos {
        0 => "0s".into(),
        1..1_000 => format!("{nanos}ns"),
        1_000..1_000_000 => format!("{}µs", fraction(nanos, 1_000)),
        1_000_000..1_000_000_000 => format!("{}ms", fraction(nanos, 1_000_000)),
        _ => {
            let minutes = nanos / 60_000_000_000;
            let seconds = format!("{}s", fraction(nanos % 60_000_000_000, 1_000_000_000));
            match (minutes / 60, minutes % 60) {
                (0, 0) => seconds,
                (0, minutes) => format!("{minutes}m{seconds}"),
                (hours, minutes) => format!("{hours}h{minutes}m{seconds}"),
            }
        }
    };
    format!("{sign}{text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, nanos, shown) in [
            ("0", 0, "0s"),
            ("0s", 0, "0s"),
            ("1ns", 1, "1ns"),
            ("1.5us", 1_500, "1.5µs"),
            ("100ms", 100_000_000, "100ms"),
            ("1s", 1_000_000_000, "1s"),
            ("1.5s", 1_500_000_000, "1.5s"),
            (".5m", 30_000_000_000, "30s"),
            ("90s", 90_000_000_000, "1m30s"),
            ("1h", 3_600_000_000_000, "1h0m0s"),
            ("1h1m1.001s", 3_661_001_000_000, "1h1m1.001s"),
            ("-1s", -1_000_000_000, "-1s"),
            ("+1s", 1_000_000_000, "1s"),
        ] {
            assert_eq!(parse_duration(text), Ok(nanos), "{text}");
            assert_eq!(duration(nanos), shown, "{text}");
        }
        for bad in ["", "1", "s", "1x", "1.2.3s", ".s", "--1s", "99999999999h", "1 s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn lists() {
        let list: Vec<String> = ["a", "b \"c\"\\", "\n\t\u{1}ä\u{a0}"].map(Into::into).into();
        assert_eq!(quoted_list(&list), r#"["a" "b \"c\"\\" "\n\t\x01ä\u00a0"]"#);
        assert_eq!(plain_list(&list[..1]), "[a]");
        assert_eq!(json_list(&["a<b>&".into(), "\"".into()]), r#"["a\u003cb\u003e\u0026","\""]"#);
        assert_eq!(quoted_list(&[]), "[]");
    }
}
