//! Wildcards in one path component, as Go's `path.Match` reads them: `*`, `?`, `[a-z]`, `[^a-z]` and `\` before any of
//! them. A malformed pattern matches nothing.

/// Whether a name matches a pattern; neither contains a slash.
pub fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let mut at = Cursor { pattern, name };
    // Where to go on when the text after the last star does not match: the star takes one character more.
    let mut star: Option<Cursor<'_>> = None;
    loop {
        match at.pattern.split_first() {
            Some((b'*', rest)) => {
                at.pattern = rest;
                star = Some(at);
                continue;
            }
            None if at.name.is_empty() => return true,
            Some(_) if !at.name.is_empty() => {
                if let Some(next) = at.step() {
                    at = next;
                    continue;
                }
            }
            _ => {}
        }
        let Some(last) = &mut star else { return false };
        let Some((_, rest)) = take_character(last.name) else { return false };
        last.name = rest;
        at = *last;
    }
}

/// Whether a component has a wildcard. An escape alone makes no pattern: a name with backslashes is taken as it is.
pub(crate) fn is_pattern(component: &[u8]) -> bool {
    let mut rest = component.iter();
    while let Some(byte) = rest.next() {
        match byte {
            b'\\' => {
                rest.next();
            }
            b'*' | b'?' | b'[' => return true,
            _ => {}
        }
    }
    false
}

#[derive(Clone, Copy)]
struct Cursor<'a> {
    pattern: &'a [u8],
    name: &'a [u8],
}

impl Cursor<'_> {
    /// Matches one character of the name against one element of the pattern that is not a star.
    fn step(self) -> Option<Self> {
        let (character, name) = take_character(self.name)?;
        let pattern = match self.pattern {
            [b'?', rest @ ..] => rest,
            [b'[', rest @ ..] => class(rest, character)?,
            [b'\\', escaped, rest @ ..] => (character == u32::from(*escaped)).then_some(rest)?,
            [b'\\'] => return None,
            _ => {
                let (wanted, rest) = take_character(self.pattern)?;
                (character == wanted).then_some(rest)?
            }
        };
        Some(Self { pattern, name })
    }
}

/// Takes one UTF-8 character, or one byte where there is none.
fn take_character(text: &[u8]) -> Option<(u32, &[u8])> {
    let first = *text.first()?;
    let length = match first {
        0xc0..=0xdf => 2,
        0xe0..=0xef => 3,
        0xf0..=0xf7 => 4,
        _ => 1,
    };
    if let Some(bytes) = text.get(..length)
        && let Ok(valid) = std::str::from_utf8(bytes)
        && let Some(character) = valid.chars().next()
    {
        return Some((character.into(), &text[length..]));
    }
    Some((first.into(), &text[1..]))
}

/// Reads a class after its bracket and returns what follows it if the character is in it.
fn class(mut rest: &[u8], character: u32) -> Option<&[u8]> {
    let negated = rest.first() == Some(&b'^');
    if negated {
        rest = &rest[1..];
    }
    let mut found = false;
    let mut first = true;
    loop {
        if !first && rest.first() == Some(&b']') {
            return (found != negated).then_some(&rest[1..]);
        }
        first = false;
        let (low, after) = class_character(rest)?;
        let (high, after) =
            if after.first() == Some(&b'-') { class_character(&after[1..])? } else { (low, after) };
        found |= (low..=high).contains(&character);
        rest = after;
    }
}

fn class_character(text: &[u8]) -> Option<(u32, &[u8])> {
    match text {
        [] | [b'-' | b']', ..] => None,
        [b'\\', rest @ ..] => take_character(rest),
        _ => take_character(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_patterns_as_go_does() {
        for (pattern, name, expected) in [
            ("abc", "abc", true),
            ("*", "abc", true),
            ("*", "", true),
            ("*c", "abc", true),
            ("a*", "abc", true),
            ("a*b*c*d*e*", "axbxcxdxexxx", true),
            ("a*b?c*x", "abxbbxdbxebxczzx", true),
            ("a*b?c*x", "abxbbxdbxebxczzy", false),
            ("ab[c]", "abc", true),
            ("ab[b-d]", "abc", true),
            ("ab[e-g]", "abc", false),
            ("ab[^e-g]", "abc", true),
            ("ab[^c]", "abc", false),
            ("a\\*b", "a*b", true),
            ("a\\*b", "ab", false),
            ("a?b", "a☺b", true),
            ("a[^a]b", "a☺b", true),
            ("a???b", "a☺b", false),
            ("[a-ζ]*", "α", true),
            ("*[a-ζ]", "A", false),
            ("[\\]a]", "]", true),
            ("[x\\-]", "-", true),
            ("[-]", "-", false),
            ("[", "a", false),
            ("[a-]", "a", false),
            ("a[", "a", false),
            ("\\", "\\", false),
            ("?", "", false),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }
}
