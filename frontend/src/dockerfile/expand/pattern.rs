//! Patterns in substitutions: `${name#pattern}`, `${name/pattern/text}` and their kin.

use regex::Regex;

fn reverse(text: &str) -> String {
    text.chars().rev().collect()
}

/// Reverses a pattern, escapes staying before what they escape.
fn reverse_pattern(pattern: &str) -> String {
    let mut units: Vec<String> = vec![];
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        let mut unit = String::from(c);
        if c == '\\' {
            unit.extend(chars.next());
        }
        units.push(unit);
    }
    units.into_iter().rev().collect()
}

/// Translates a pattern of `*`, `?` and escapes.
fn compile(pattern: &str, greedy: bool, anchored: bool) -> Result<Regex, String> {
    let fail = |reason: String| format!("invalid pattern ({pattern}) in substitution: {reason}");
    let mut regex = String::from(if anchored { "^" } else { "" });
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '*' => regex.push_str(if greedy { ".*" } else { ".*?" }),
            '?' => regex.push('.'),
            '\\' => match chars.peek() {
                // These had to be escaped for the substitution's sake, not the pattern's.
                Some('}' | '/') => {}
                Some(next @ ('*' | '?' | '\\')) => {
                    regex.push('\\');
                    regex.push(*next);
                    chars.next();
                }
                Some(other) => return Err(fail(format!("invalid escape '\\{other}'"))),
                None => return Err(fail("the escape at its end escapes nothing".into())),
            },
            c => regex.push_str(&regex::escape(c.encode_utf8(&mut [0; 4]))),
        }
    }
    Regex::new(&regex).map_err(|_| fail("it is too complex".into()))
}

/// Drops the shortest or longest start that a pattern matches.
pub(super) fn trim_prefix(value: &str, pattern: &str, greedy: bool) -> Result<String, String> {
    let regex = compile(pattern, greedy, true)?;
    Ok(regex.find(value).map_or(value, |found| &value[found.end()..]).into())
}

/// Drops the shortest or longest end that a pattern matches.
pub(super) fn trim_suffix(value: &str, pattern: &str, greedy: bool) -> Result<String, String> {
    // Found from the front in mirrored texts, because an expression prefers the leftmost match, not the shortest.
    let reversed = trim_prefix(&reverse(value), &reverse_pattern(pattern), greedy)?;
    Ok(reverse(&reversed))
}

/// Replaces the first match of a pattern, or all of them.
pub(super) fn replace(
    value: &str,
    pattern: &str,
    replacement: &str,
    all: bool,
) -> Result<String, String> {
    let regex = compile(pattern, true, false)?;
    if all {
        // The replacement is a template here: `$1` means something. Upstream does it so.
        return Ok(regex.replace_all(value, replacement).into_owned());
    }
    Ok(regex.replacen(value, 1, regex::NoExpand(replacement)).into_owned())
}
