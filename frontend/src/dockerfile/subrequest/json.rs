//! The parts that answers have in common, in the field names and the form that Go gives them.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use slipway_spec::llb::{Definition, Lines};

/// Writes JSON as Go does: two blanks for each level, and no characters that mean something in HTML.
pub(super) fn pretty(value: &impl Serialize) -> String {
    // These have no keys that are not text, and so cannot fail.
    let json = serde_json::to_string_pretty(value).unwrap_or_default();
    json.replace('<', "\\u003c")
        .replace('>', "\\u003e")
        .replace('&', "\\u0026")
        .replace('\u{2028}', "\\u2028")
        .replace('\u{2029}', "\\u2029")
}

pub(super) fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// Where something stands in one of the sources.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Location {
    /// Which source.
    #[serde(rename = "sourceIndex", skip_serializing_if = "is_zero")]
    pub source_index: i32,
    /// One for each line.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<Range>,
}

/// From a position to a position.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Range {
    /// The first position.
    pub start: Position,
    /// The last position.
    pub end: Position,
}

/// A place in a text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Position {
    /// The line, counted from 1.
    #[serde(skip_serializing_if = "is_zero")]
    pub line: i32,
    /// The character in the line.
    #[serde(skip_serializing_if = "is_zero")]
    pub character: i32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(number: &i32) -> bool {
    *number == 0
}

impl Location {
    pub(super) fn of(lines: Lines) -> Self {
        Self::of_lines(lines.first..=lines.last)
    }

    pub(super) fn of_lines(lines: impl Iterator<Item = u32>) -> Self {
        let range = |line: u32| {
            let position = Position { line: i32::try_from(line).unwrap_or(i32::MAX), character: 0 };
            Range { start: position.clone(), end: position }
        };
        Self { source_index: 0, ranges: lines.map(range).collect() }
    }
}

/// A file that locations are in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SourceText {
    /// The file's name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub filename: String,
    /// Its bytes, in Base64.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub data: String,
    /// The graph that it was read from.
    #[serde(skip_serializing_if = "Option::is_none")]
    definition: Option<Origin>,
    /// What it is written in.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub language: String,
}

/// A graph, as far as it says where a file came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Origin {
    def: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, OriginMetadata>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct OriginMetadata {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    description: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    caps: BTreeMap<String, bool>,
}

impl SourceText {
    pub(super) fn new(filename: &str, bytes: &[u8], origin: Option<&Definition>) -> Self {
        let definition = origin.map(|origin| Origin {
            def: origin.ops.iter().map(|op| base64(op)).collect(),
            metadata: origin
                .metadata
                .iter()
                .map(|(digest, metadata)| {
                    let description = metadata.description.clone();
                    let caps = metadata.caps.clone();
                    (digest.to_string(), OriginMetadata { description, caps })
                })
                .collect(),
        });
        Self {
            filename: filename.into(),
            data: base64(bytes),
            definition,
            language: "Dockerfile".into(),
        }
    }

    /// Shows the lines of a location, marked, with lines around them; nothing when it is outside of the file.
    pub(super) fn excerpt(&self, ranges: &[Range], filename: &str) -> String {
        let text = STANDARD.decode(&self.data).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.split('\n').collect();
        let line = |number: i32| usize::try_from(number).unwrap_or(0);
        let spans: Vec<(usize, usize)> = ranges
            .iter()
            .map(|range| (line(range.start.line), line(range.end.line.max(range.start.line))))
            .collect();
        let first = spans.iter().map(|(first, _)| *first).min().unwrap_or(0);
        if first == 0 || first > lines.len() {
            return String::new();
        }
        let last = spans.iter().map(|(_, last)| *last).max().unwrap_or(0).min(lines.len());
        let (mut from, mut to) = (first, last);
        // A single line is shown with more around it.
        let wanted = if first == last { 4 } else { 2 };
        let mut shown = 0;
        while shown < wanted {
            if from > 1 {
                from -= 1;
                shown += 1;
            }
            if to < lines.len() {
                to += 1;
                shown += 1;
            }
            // At both edges of the file there is no more to show.
            shown += 1;
        }
        let rule = "--------------------\n";
        let mut excerpt = format!("{filename}:{first}\n{rule}");
        for (number, line) in (from..=to).filter_map(|n| Some((n, lines.get(n - 1)?))) {
            let marked = spans.iter().any(|(first, last)| (*first..=*last).contains(&number));
            let mark = if marked { ">>>" } else { "   " };
            excerpt.push_str(&format!(" {number:>3} | {mark} {line}\n"));
        }
        excerpt.push_str(rule);
        excerpt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_written_as_go_does() {
        assert_eq!(pretty(&["a<b>&\u{2028}"]), "[\n  \"a\\u003cb\\u003e\\u0026\\u2028\"\n]");
        let location = Location::of(Lines { first: 2, last: 3 });
        assert_eq!(
            serde_json::to_string(&location).unwrap(),
            "{\"ranges\":[{\"start\":{\"line\":2},\"end\":{\"line\":2}},{\"start\":{\"line\":3},\"end\":{\"line\":3}}]}"
        );
        assert_eq!(serde_json::from_str::<Location>("{}").unwrap(), Location::default());
    }

    #[test]
    fn excerpts_show_what_is_around() {
        let source = SourceText::new("D", b"a\nb\nc\nd\ne\n", None);
        let excerpt =
            |first, last| source.excerpt(&Location::of(Lines { first, last }).ranges, "x/D");
        let rule = "--------------------";
        assert_eq!(
            excerpt(3, 3),
            format!(
                "x/D:3\n{rule}\n   1 |     a\n   2 |     b\n   3 | >>> c\n   4 |     d\n   5 |     e\n{rule}\n"
            )
        );
        assert_eq!(
            excerpt(1, 2),
            format!("x/D:1\n{rule}\n   1 | >>> a\n   2 | >>> b\n   3 |     c\n{rule}\n")
        );
        assert_eq!((excerpt(9, 9), source.excerpt(&[], "D")), (String::new(), String::new()));
    }
}
