//! One record of comma-separated values, as flags and attributes hold them.

/// Splits a record into its fields. Quotes around a field protect commas, and two of them are one.
pub(crate) fn fields(record: &str) -> Result<Vec<String>, String> {
    let record = record.strip_suffix('\n').map_or(record, |r| r.strip_suffix('\r').unwrap_or(r));
    if record.is_empty() {
        return Err("the list is empty".into());
    }
    let mut fields = vec![];
    let mut rest = record;
    loop {
        let Some(mut quoted) = rest.strip_prefix('"') else {
            let (field, tail) = match rest.split_once(',') {
                Some((field, tail)) => (field, Some(tail)),
                None => (rest, None),
            };
            if field.contains('"') {
                return Err(format!("a quote stands inside the unquoted field {field:?}"));
            }
            fields.push(field.to_owned());
            match tail {
                Some(tail) => rest = tail,
                None => return Ok(fields),
            }
            continue;
        };
        let mut field = String::new();
        let tail = loop {
            let Some((part, tail)) = quoted.split_once('"') else {
                return Err(format!("the quoted field \"{quoted} has no end"));
            };
            field.push_str(part);
            match tail.strip_prefix('"') {
                Some(more) => {
                    field.push('"');
                    quoted = more;
                }
                None => break tail,
            }
        };
        fields.push(field);
        if tail.is_empty() {
            return Ok(fields);
        }
        rest = tail
            .strip_prefix(',')
            .ok_or_else(|| format!("{tail:?} stands after the end of a quoted field"))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_split() {
        for (record, expected) in [
            ("a", &["a"][..]),
            ("a,b=c", &["a", "b=c"]),
            ("a,", &["a", ""]),
            ("\"a,b\",c", &["a,b", "c"]),
            ("\"a\"\"b\"", &["a\"b"]),
            ("a\r\n", &["a"]),
            ("\"\"", &[""]),
        ] {
            assert_eq!(fields(record).unwrap(), expected, "{record:?}");
        }
        for record in ["", "a\"b", "\"a", "\"a\"b,c", "\n"] {
            assert!(fields(record).is_err(), "{record:?}");
        }
    }
}
