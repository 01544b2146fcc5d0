//! One record of comma-separated values, quoted as RFC 4180 says.

/// Splits a record into its fields.
///
/// A field that begins with a quote ends with one, and holds two for each that is meant.
pub(crate) fn fields(record: &str) -> Result<Vec<String>, &'static str> {
    let mut fields = vec![];
    let mut rest = record;
    loop {
        let (field, tail) = match rest.strip_prefix('"') {
            Some(quoted) => quoted_field(quoted)?,
            None => plain_field(rest)?,
        };
        fields.push(field);
        match tail {
            Some(tail) => rest = tail,
            None => return Ok(fields),
        }
    }
}

/// Returns the field and what follows its comma, if there is one.
fn plain_field(text: &str) -> Result<(String, Option<&str>), &'static str> {
    let (field, tail) = match text.split_once(',') {
        Some((field, tail)) => (field, Some(tail)),
        None => (text, None),
    };
    if field.contains('"') {
        return Err("a quote stands inside a field that does not begin with one");
    }
    Ok((field.into(), tail))
}

fn quoted_field(text: &str) -> Result<(String, Option<&str>), &'static str> {
    let mut field = String::new();
    let mut rest = text;
    loop {
        let (part, tail) = rest.split_once('"').ok_or("a quote is not closed")?;
        field.push_str(part);
        if let Some(tail) = tail.strip_prefix('"') {
            field.push('"');
            rest = tail;
        } else if tail.is_empty() {
            return Ok((field, None));
        } else {
            let tail =
                tail.strip_prefix(',').ok_or("a closing quote is not followed by a comma")?;
            return Ok((field, Some(tail)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fields;

    #[test]
    fn quoting() {
        for (record, expected) in [
            ("", vec![""]),
            ("a", vec!["a"]),
            ("a,b,", vec!["a", "b", ""]),
            ("\"a,b\",c", vec!["a,b", "c"]),
            ("\"a\"\"b\"", vec!["a\"b"]),
            ("\"\"", vec![""]),
            ("\"\",\"\"", vec!["", ""]),
            ("a, b", vec!["a", " b"]),
        ] {
            assert_eq!(fields(record).unwrap(), expected, "{record}");
        }
        for bad in ["\"", "\"a", "a\"b", "\"a\"b", "a,\"b\"c", "\"a\"\""] {
            assert!(fields(bad).is_err(), "{bad}");
        }
    }
}
