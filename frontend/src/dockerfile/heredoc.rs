//! Marks of here-documents: `<<EOF`, `<<-"EOF"`, `3<<EOF`.

use super::ast::Heredoc;
use super::expand::{Env, Lexer};

/// Reads one word; `None` when it is not the mark of a here-document.
pub(crate) fn parse_mark(word: &str) -> Option<Heredoc> {
    let rest = word.trim_start_matches(|c: char| c.is_ascii_digit()).strip_prefix("<<")?;
    let (chomp, rest) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let rest = rest.trim_start();
    if rest.is_empty() || rest.contains('<') {
        return None;
    }
    let lexer = Lexer { keep_unset: true, ..Lexer::new('\\') };
    let plain = lexer.words(rest, &Env::default()).ok()?;
    let raw = Lexer { raw_quotes: true, ..lexer }.words(rest, &Env::default()).ok()?;
    let ([name], [raw]) = (plain.as_slice(), raw.as_slice()) else { return None };
    let quotes = |text: &str| text.matches(['\'', '"']).count();
    Some(Heredoc {
        name: name.clone(),
        expand: quotes(name) == quotes(raw),
        chomp,
        content: String::new(),
    })
}

/// Finds the marks in an instruction. A line with unbalanced quotes has none.
pub(crate) fn find_marks(line: &str) -> Vec<Heredoc> {
    let lexer = Lexer { raw_quotes: true, raw_escapes: true, keep_unset: true, ..Lexer::new('\\') };
    let words = lexer.words(line, &Env::default()).unwrap_or_default();
    words.iter().filter_map(|word| parse_mark(word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read() {
        for (word, expected) in [
            ("<<EOF", Some(("EOF", true, false))),
            ("<<-EOF", Some(("EOF", true, true))),
            ("3<<EOF", Some(("EOF", true, false))),
            ("<<'EOF'", Some(("EOF", false, false))),
            ("<<\"EOF\"", Some(("EOF", false, false))),
            ("<<EO\"F\"", Some(("EOF", false, false))),
            ("<<-'E F'", Some(("E F", false, true))),
            ("<< EOF", Some(("EOF", true, false))),
            ("<< -EOF", Some(("-EOF", true, false))),
            ("<<$EOF", Some(("$EOF", true, false))),
            ("<<", None),
            ("<<-", None),
            ("<<<EOF", None),
            ("<EOF", None),
            ("x<<EOF", None),
            ("\"<<EOF\"", None),
            ("<<E F", None),
            ("<<'E", None),
        ] {
            let found = parse_mark(word).map(|h| (h.name, h.expand, h.chomp));
            assert_eq!(
                found,
                expected.map(|(name, expand, chomp)| (name.into(), expand, chomp)),
                "{word}"
            );
        }
    }

    #[test]
    fn marks_are_found_in_a_line() {
        let names = |line| find_marks(line).into_iter().map(|h| h.name).collect::<Vec<_>>();
        assert_eq!(names("COPY <<a <<-b /x"), ["a", "b"]);
        assert_eq!(names("RUN cat <<< x"), Vec::<String>::new());
        assert_eq!(names("RUN cat '<<EOF'"), Vec::<String>::new());
        assert_eq!(names("RUN echo ' <<EOF"), Vec::<String>::new());
        assert_eq!(names("RUN cat << EOF"), ["EOF"]);
        assert_eq!(names("RUN cat <<EOF>x"), ["EOF>x"]);
    }
}
