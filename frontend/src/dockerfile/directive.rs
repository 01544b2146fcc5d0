//! Directives in the first comments: `syntax`, `escape` and `check`.

use super::problem::{Problem, Result};

/// Reads directives line by line until the first line that is none.
#[derive(Debug, Default)]
pub(crate) struct DirectiveParser {
    seen: Vec<&'static str>,
    closed: bool,
}

/// A directive's key and value.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Directive {
    pub(crate) key: &'static str,
    pub(crate) value: String,
}

const KEYS: [&str; 3] = ["syntax", "escape", "check"];

impl DirectiveParser {
    /// Reads a line; `marker` starts comments.
    pub(crate) fn line(&mut self, line: &str, marker: &str) -> Result<Option<Directive>> {
        if self.closed {
            return Ok(None);
        }
        let Some(directive) = split(line, marker) else {
            self.closed = true;
            return Ok(None);
        };
        if self.seen.contains(&directive.key) {
            return Err(Problem::new(format!(
                "only one {} parser directive can be used",
                directive.key
            )));
        }
        self.seen.push(directive.key);
        Ok(Some(directive))
    }
}

fn split(line: &str, marker: &str) -> Option<Directive> {
    let blank = |c: char| c == ' ' || c == '\t';
    let rest = line.trim_end().strip_prefix(marker)?.trim_start_matches(blank);
    let (key, value) = rest.split_once('=')?;
    let key = key.trim_end_matches(blank).to_ascii_lowercase();
    let key = KEYS.into_iter().find(|known| *known == key)?;
    let value = value.trim_start_matches(blank);
    (!value.is_empty()).then(|| Directive { key, value: value.into() })
}

/// Finds the image that should read the file, and the line that names it.
///
/// Unlike the parser, this also reads files that are no Dockerfiles: with `//` comments, or JSON.
pub(crate) fn detect_syntax(text: &str) -> Option<(String, u32)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let (skipped, rest) = match text.strip_prefix("#!") {
        Some(shebang) => (1, shebang.split_once('\n').map_or("", |(_, rest)| rest)),
        None => (0, text),
    };
    for marker in ["#", "//"] {
        let mut parser = DirectiveParser::default();
        for (number, line) in (1 + skipped..).zip(rest.lines()) {
            // A second directive of the same kind is the parser's to complain about.
            match parser.line(line, marker) {
                Ok(Some(directive)) if directive.key == "syntax" => {
                    return Some((directive.value, number));
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
    }
    let json: serde_json::Map<String, serde_json::Value> = serde_json::from_str(rest).ok()?;
    Some((json.get("syntax")?.as_str()?.into(), 1 + skipped))
}

/// Finds what the `check` directive says, up to the first blank.
pub(crate) fn detect_check(text: &str) -> Option<String> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let rest = match text.strip_prefix("#!") {
        Some(shebang) => shebang.split_once('\n').map_or("", |(_, rest)| rest),
        None => text,
    };
    let mut parser = DirectiveParser::default();
    for line in rest.lines() {
        match parser.line(line, "#") {
            Ok(Some(directive)) if directive.key == "check" => {
                return directive.value.split(' ').next().map(Into::into);
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => break,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syntax_is_detected() {
        for (text, expected) in [
            ("# syntax=a", Some(("a", 1))),
            ("#syntax = a b \nFROM x", Some(("a b", 1))),
            ("\u{feff}# SYNTAX=a", Some(("a", 1))),
            ("#!/bin/x\n# syntax=a", Some(("a", 2))),
            ("# escape=`\n# syntax=a", Some(("a", 2))),
            ("# syntax=a\n# syntax=b", Some(("a", 1))),
            ("// syntax=a", Some(("a", 1))),
            ("{\"syntax\": \"a\"}", Some(("a", 1))),
            (" # syntax=a", None),
            ("\n# syntax=a", None),
            ("# comment\n# syntax=a", None),
            ("# key=value\n# syntax=a", None),
            ("# syntax=", None),
            ("FROM x\n# syntax=a", None),
            ("{\"syntax\": 1}", None),
            ("", None),
        ] {
            assert_eq!(
                detect_syntax(text),
                expected.map(|(value, line)| (value.into(), line)),
                "{text:?}"
            );
        }
    }
}
