//! Text from elsewhere, made safe to show on a terminal.

use std::borrow::Cow;
use std::str::Chars;

use unicode_width::UnicodeWidthChar as _;

/// The furthest that a control sequence may move the cursor, so that a few bytes cannot become a long line.
const MAX_MOVE: usize = 512;

/// Returns a line without control characters and escape sequences, as a terminal would show it in the end.
///
/// Carriage returns and backspaces overwrite what stands there, and "erase in line" erases, so that a progress bar
/// leaves its last state. Colours and all other sequences vanish, and so do the controls that turn text around.
pub(crate) fn clean(line: &str) -> String {
    if !line.chars().any(is_special) {
        return line.into();
    }
    let mut cells: Vec<char> = vec![];
    let mut cursor = 0;
    let mut chars = line.chars();
    while let Some(next) = chars.next() {
        match next {
            '\r' => cursor = 0,
            '\u{8}' => cursor = usize::saturating_sub(cursor, 1),
            '\u{1b}' => escape(&mut chars, &mut cells, &mut cursor),
            '\u{9b}' => control_sequence(&mut chars, &mut cells, &mut cursor),
            '\t' => put(&mut cells, &mut cursor, '\t'),
            hidden if is_special(hidden) => {}
            shown => put(&mut cells, &mut cursor, shown),
        }
    }
    cells.into_iter().collect()
}

/// As [`clean`], for bytes that may not be UTF-8: what is not becomes U+FFFD.
pub(crate) fn clean_bytes(line: &[u8]) -> String {
    match String::from_utf8_lossy(line) {
        Cow::Borrowed(text) => clean(text),
        Cow::Owned(text) => clean(&text),
    }
}

fn is_special(c: char) -> bool {
    // The ranges are the embedding, override and isolate controls of bidirectional text.
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn put(cells: &mut Vec<char>, cursor: &mut usize, c: char) {
    if *cursor > cells.len() {
        cells.resize(*cursor, ' ');
    }
    match cells.get_mut(*cursor) {
        Some(cell) => *cell = c,
        None => cells.push(c),
    }
    *cursor += 1;
}

/// Reads the rest of a sequence that began with ESC.
fn escape(chars: &mut Chars<'_>, cells: &mut Vec<char>, cursor: &mut usize) {
    match chars.next() {
        Some('[') => control_sequence(chars, cells, cursor),
        // Operating system commands and other strings end with BEL or ESC \.
        Some(']' | 'P' | 'X' | '^' | '_') => {
            while let Some(c) = chars.next() {
                if c == '\u{7}' || c == '\u{9c}' || (c == '\u{1b}' && chars.next() == Some('\\')) {
                    return;
                }
            }
        }
        // Intermediate bytes are followed by a final one, as in the choice of a character set.
        Some(' '..='/') => while chars.next().is_some_and(|c| (' '..='/').contains(&c)) {},
        _ => {}
    }
}

/// Reads the rest of a control sequence and does what it says within the line.
fn control_sequence(chars: &mut Chars<'_>, cells: &mut Vec<char>, cursor: &mut usize) {
    let mut parameters = String::new();
    let last = loop {
        match chars.next() {
            Some(c @ ' '..='?') => parameters.push(c),
            Some(c @ '@'..='~') => break c,
            _ => return,
        }
    };
    let count = parameters.parse::<usize>().unwrap_or(0);
    match last {
        'K' => match count {
            0 => cells.truncate(*cursor),
            1 => cells.iter_mut().take(cursor.saturating_add(1)).for_each(|cell| *cell = ' '),
            _ => cells.clear(),
        },
        'C' => *cursor = (*cursor + count.clamp(1, MAX_MOVE)).min(cells.len() + MAX_MOVE),
        'D' => *cursor = cursor.saturating_sub(count.max(1)),
        'G' => *cursor = count.saturating_sub(1).min(cells.len() + MAX_MOVE),
        _ => {}
    }
}

/// Returns the columns that a cleaned text takes on the screen; tabs count as in [`fit`].
pub(crate) fn width(text: &str) -> usize {
    text.chars().fold(0, |column, c| column + columns(c, column))
}

fn columns(c: char, column: usize) -> usize {
    if c == '\t' { 8 - column % 8 } else { c.width().unwrap_or(0) }
}

/// Returns as much of a cleaned text as fits into a number of columns, tabs turned into blanks.
pub(crate) fn fit(text: &str, max_columns: usize) -> String {
    let mut shown = String::new();
    let mut column = 0;
    for c in text.chars() {
        let needed = columns(c, column);
        if column + needed > max_columns {
            break;
        }
        if c == '\t' {
            shown.extend(std::iter::repeat_n(' ', needed));
        } else {
            shown.push(c);
        }
        column += needed;
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_look_as_a_terminal_would_leave_them() {
        for (raw, shown) in [
            ("plain", "plain"),
            ("tab\tkept", "tab\tkept"),
            ("\x1b[31mred\x1b[0m", "red"),
            ("10%\r20%\r100%", "100%"),
            ("abc\rX", "Xbc"),
            ("abc\r\x1b[KX", "X"),
            ("abc\x1b[2K\rX", "X"),
            ("ab\x08c", "ac"),
            ("crlf\r", "crlf"),
            ("a\x1b[3Cb", "a   b"),
            ("abcd\x1b[2Dx", "abxd"),
            ("abc\x1b[1Gx", "xbc"),
            ("\x1b]0;title\x07after", "after"),
            ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
            ("\x1b(Bset", "set"),
            ("\x1b7saved\x1b8", "saved"),
            ("\u{9b}31mred", "red"),
            ("bell\x07 nul\0", "bell nul"),
            ("turned \u{202e}around", "turned around"),
            ("cut \x1b[3", "cut "),
            ("cut \x1b", "cut "),
            ("é日本", "é日本"),
        ] {
            assert_eq!(clean(raw), shown, "{raw:?}");
        }
        assert_eq!(clean_bytes(b"a\xffb\xc3"), "a\u{fffd}b\u{fffd}");
    }

    #[test]
    fn a_short_sequence_cannot_make_a_long_line() {
        assert!(clean("\x1b[999999999Cx\x1b[999999999Gy").len() < 3 * MAX_MOVE);
        assert_eq!(clean("\x1b[99999999999999999999Cx").len(), 2);
    }

    #[test]
    fn text_is_cut_by_columns() {
        for (text, max, cut) in [
            ("abc", 5, "abc"),
            ("abc", 2, "ab"),
            ("日本語", 5, "日本"),
            ("a\tb", 9, "a       b"),
            ("a\tb", 5, "a"),
            ("x", 0, ""),
        ] {
            assert_eq!(fit(text, max), cut, "{text} {max}");
        }
        assert_eq!((width("日本"), width("a\tb"), width("e\u{301}")), (4, 9, 1));
    }
}
