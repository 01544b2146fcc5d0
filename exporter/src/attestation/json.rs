//! JSON as Go writes it, so that equal statements have equal digests whoever writes them.

/// Takes out blanks between tokens, and escapes what would mean something in HTML. The order of keys and the spelling of
/// numbers stay. The text must be JSON.
pub(super) fn compact(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let (mut inside, mut escaped) = (false, false);
    for character in json.chars() {
        if !inside {
            inside = character == '"';
            if !character.is_ascii_whitespace() {
                out.push(character);
            }
            continue;
        }
        match character {
            '<' => out.push_str("\\u003c"),
            '>' => out.push_str("\\u003e"),
            '&' => out.push_str("\\u0026"),
            '\u{2028}' => out.push_str("\\u2028"),
            '\u{2029}' => out.push_str("\\u2029"),
            _ => out.push(character),
        }
        inside = escaped || character != '"';
        escaped = !escaped && character == '\\';
    }
    out
}

/// Spreads compact JSON over lines, indented by two spaces.
pub(super) fn indent(json: &str) -> String {
    let mut out = String::with_capacity(json.len() * 2);
    let (mut inside, mut escaped) = (false, false);
    let mut depth = 0_usize;
    let line = |out: &mut String, depth: usize| {
        out.push('\n');
        out.extend(std::iter::repeat_n("  ", depth));
    };
    let mut characters = json.chars().peekable();
    while let Some(character) = characters.next() {
        if inside {
            out.push(character);
            inside = escaped || character != '"';
            escaped = !escaped && character == '\\';
            continue;
        }
        match character {
            '{' | '[' => {
                out.push(character);
                if characters.next_if(|next| matches!(next, '}' | ']')).is_some() {
                    out.push(if character == '{' { '}' } else { ']' });
                } else {
                    depth += 1;
                    line(&mut out, depth);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                line(&mut out, depth);
                out.push(character);
            }
            ',' => {
                out.push(',');
                line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            _ => {
                inside = character == '"';
                out.push(character);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_go_and_strings_stay() {
        let spread = "{ \"b\" : [ 1.0 , 2e5,\n\t{ } ], \"a \\\" b\": \" \\\\\", \"c\" : null }";
        assert_eq!(compact(spread), r#"{"b":[1.0,2e5,{}],"a \" b":" \\","c":null}"#);
        assert_eq!(
            compact("\"<a & b>\u{2028}\u{2029}ü\""),
            "\"\\u003ca \\u0026 b\\u003e\\u2028\\u2029ü\""
        );
    }

    #[test]
    fn lines_are_indented_and_what_is_empty_stays_on_one() {
        let text = indent(r#"{"a":[],"b":{"c":"{,:}\"","d":[1,{}]}}"#);
        let expected = "{\n  \"a\": [],\n  \"b\": {\n    \"c\": \"{,:}\\\"\",\n    \"d\": [\n      1,\n      {}\n    ]\n  }\n}";
        assert_eq!(text, expected);
        assert_eq!(compact(&text), r#"{"a":[],"b":{"c":"{,:}\"","d":[1,{}]}}"#);
    }
}
