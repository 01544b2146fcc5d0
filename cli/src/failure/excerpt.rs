//! The lines of a Dockerfile around an error.

use std::fmt::Write as _;
use std::ops::RangeInclusive;

use slipway_spec::llb::pb;

use crate::printer::text::clean;

const RULE: &str = "--------------------";

/// Shows the lines `marked`, counted from 1, of a source, with a few lines around them.
///
/// Two lines of context surround a single line and one surrounds a longer instruction; at the edges of the file the
/// other side gets more.
pub(crate) fn source_excerpt(file: &str, source: &str, marked: RangeInclusive<usize>) -> String {
    let first = (*marked.start()).max(1);
    let lines = first..=(*marked.end()).max(first);
    excerpt(file, source, marked, |line| lines.contains(&line))
}

/// Shows the lines of these ranges as [`source_excerpt`] does; nothing when there are none, or not in this file.
pub(crate) fn ranges_excerpt(file: &str, source: &str, ranges: &[pb::Range]) -> String {
    let line = |position: &Option<pb::Position>| {
        position.as_ref().and_then(|position| usize::try_from(position.line).ok()).unwrap_or(0)
    };
    let lines: Vec<_> = ranges
        .iter()
        .map(|range| (line(&range.start), line(&range.end).max(line(&range.start))))
        .collect();
    let first = lines.iter().map(|(first, _)| *first).min().unwrap_or(0);
    let last = lines.iter().map(|(_, last)| *last).max().unwrap_or(0);
    if first == 0 || first > source.lines().count() {
        return String::new();
    }
    let marked = |number| lines.iter().any(|(first, last)| (*first..=*last).contains(&number));
    excerpt(file, source, first..=last, marked)
}

fn excerpt(
    file: &str,
    source: &str,
    marked: RangeInclusive<usize>,
    is_marked: impl Fn(usize) -> bool,
) -> String {
    let lines: Vec<&str> = source.lines().collect();
    let first = (*marked.start()).max(1);
    let last = (*marked.end()).max(first);
    let (mut from, mut to) = (first, last.min(lines.len()));
    let wanted = if first == last { 4 } else { 2 };
    let mut shown = 0;
    while shown < wanted && from <= to && (from > 1 || to < lines.len()) {
        if from > 1 {
            from -= 1;
            shown += 1;
        }
        if to < lines.len() {
            to += 1;
            shown += 1;
        }
    }
    let mut text = format!("{}:{first}\n{RULE}\n", clean(file));
    for number in from..=to {
        let mark = if is_marked(number) { ">>>" } else { "   " };
        let line = lines.get(number - 1).map_or_else(String::new, |line| clean(line));
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}", format!(" {number:>3} | {mark} {line}").trim_end());
    }
    text.push_str(RULE);
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_context_and_marks() {
        let source = "FROM a\nRUN one\nRUN two\nRUN three\nRUN four\nRUN five\n";
        assert_eq!(
            source_excerpt("Dockerfile", source, 3..=3),
            "Dockerfile:3\n--------------------\n   1 |     FROM a\n   2 |     RUN one\n   3 | >>> RUN two\n   \
             4 |     RUN three\n   5 |     RUN four\n--------------------\n"
        );
        assert_eq!(
            source_excerpt("D", source, 3..=4),
            "D:3\n--------------------\n   2 |     RUN one\n   3 | >>> RUN two\n   4 | >>> RUN three\n   \
             5 |     RUN four\n--------------------\n"
        );
        assert_eq!(
            source_excerpt("D", "FROM a\nRUN false", 2..=2),
            "D:2\n--------------------\n   1 |     FROM a\n   2 | >>> RUN false\n--------------------\n"
        );
    }

    #[test]
    fn survives_ranges_outside_of_the_file() {
        assert_eq!(
            source_excerpt("D", "", 1..=1),
            "D:1\n--------------------\n--------------------\n"
        );
        assert_eq!(
            source_excerpt("D", "a", 7..=9),
            "D:7\n--------------------\n--------------------\n"
        );
        assert!(source_excerpt("D", "a\nb", 0..=0).contains(">>> a"));
        #[expect(clippy::reversed_empty_ranges, reason = "a reversed range must not panic either")]
        let text = source_excerpt("D", "a\nb", 2..=1);
        assert!(text.contains(">>> b"));
    }
}
