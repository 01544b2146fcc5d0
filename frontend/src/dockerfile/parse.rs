//! From a file's text to its [`Ast`].

use slipway_spec::llb::Lines;

use super::ast::{Args, Ast, Node, Pair};
use super::directive::DirectiveParser;
use super::heredoc;
use super::problem::{Problem, Result};

/// Physical lines of this size are refused, as upstream's reader does.
const MAX_LINE: usize = 64 * 1024;

/// Parses a Dockerfile.
pub(crate) fn parse(text: &str) -> Result<Ast> {
    Parser { lines: text.strip_prefix('\u{feff}').unwrap_or(text), number: 0, escape: '\\' }.file()
}

struct Parser<'a> {
    /// What is left of the file.
    lines: &'a str,
    /// How many lines were read.
    number: u32,
    escape: char,
}

impl<'a> Parser<'a> {
    /// Takes a line with its end.
    fn next_line(&mut self) -> Result<Option<&'a str>> {
        if self.lines.is_empty() {
            return Ok(None);
        }
        let end = self.lines.find('\n').map_or(self.lines.len(), |at| at + 1);
        let (line, rest) = self.lines.split_at(end);
        self.lines = rest;
        self.number += 1;
        if line.trim_end_matches('\n').len() >= MAX_LINE {
            let message =
                format!("dockerfile line greater than max allowed size of {}", MAX_LINE - 1);
            return Err(Problem::new(message).at(self.here()));
        }
        Ok(Some(line))
    }

    fn here(&self) -> Lines {
        Lines { first: self.number, last: self.number }
    }

    fn file(mut self) -> Result<Ast> {
        let mut nodes = vec![];
        let mut empty_continuations = vec![];
        let mut directives = DirectiveParser::default();
        let mut comments = vec![];
        while let Some(line) = self.next_line()? {
            let first = self.number;
            let written = trim_end(line);
            let line = written.trim_start();
            let directive =
                directives.line(line, "#").map_err(|problem| problem.at(self.here()))?;
            let is_directive = directive.is_some();
            if let Some(directive) = directive.filter(|directive| directive.key == "escape") {
                self.escape = match directive.value.as_str() {
                    "\\" => '\\',
                    "`" => '`',
                    other => {
                        let message =
                            format!("invalid escape token '{other}' does not match ` or \\");
                        return Err(Problem::new(message).at(self.here()));
                    }
                };
            }
            if line.starts_with('#') {
                // As upstream does it, one character is cut off even if that is a blank before the mark.
                let mut text = written.chars();
                text.next();
                match text.as_str().trim() {
                    _ if is_directive => {}
                    "" => comments.clear(),
                    comment => comments.push(comment.to_owned()),
                }
                continue;
            }
            let (line, mut continues) = self.continuation(line);
            if line.is_empty() && !continues {
                continue;
            }
            let mut logical = String::from(line);
            let mut blank = false;
            while continues {
                let Some(line) = self.next_line()? else { break };
                let line = trim_end(line);
                if line.trim_start().starts_with('#') {
                    continue;
                }
                if line.trim_start().is_empty() {
                    blank = true;
                    continue;
                }
                let (line, more) = self.continuation(line);
                logical.push_str(line);
                continues = more;
            }
            if blank {
                empty_continuations.push(self.here());
            }
            let head = Lines { first, last: self.number };
            let mut node = self.node(&logical, 0).map_err(|problem| problem.at(head))?;
            if node.takes_heredocs() && logical.contains("<<") {
                for mut doc in heredoc::find_marks(&logical) {
                    self.body(&mut doc, head)?;
                    node.heredocs.push(doc);
                }
            }
            node.lines = Lines { first, last: self.number };
            node.comments = std::mem::take(&mut comments);
            nodes.push(node);
        }
        if nodes.is_empty() {
            let problem = Problem::new("file with no instructions");
            return Err(if self.number > 0 { problem.at(self.here()) } else { problem });
        }
        Ok(Ast { nodes, escape: self.escape, empty_continuations })
    }

    /// Returns the line without its continuation mark, and whether there was one.
    fn continuation<'l>(&self, line: &'l str) -> (&'l str, bool) {
        let Some(rest) = line.trim_end_matches([' ', '\t']).strip_suffix(self.escape) else {
            return (line, false);
        };
        // Doubled, it stands for itself.
        if rest.ends_with(self.escape) { (line, false) } else { (rest, true) }
    }

    fn body(&mut self, doc: &mut super::ast::Heredoc, head: Lines) -> Result<()> {
        while let Some(line) = self.next_line()? {
            let mut candidate = trim_end(line);
            if doc.chomp {
                candidate = candidate.trim_start_matches('\t');
            }
            if candidate == doc.name {
                return Ok(());
            }
            doc.content.push_str(line);
        }
        Err(Problem::new("unterminated heredoc").at(Lines { first: head.first, last: self.number }))
    }

    fn node(&self, logical: &str, depth: usize) -> Result<Node> {
        let line = logical.trim();
        let (keyword, rest) = match line.find(is_blank) {
            Some(at) => (&line[..at], line[at..].trim_start_matches(is_blank)),
            None => (line, ""),
        };
        let (flags, rest) = self.flags(rest);
        let args = self.args(&keyword.to_ascii_lowercase(), rest.trim(), depth)?;
        Ok(Node {
            keyword: keyword.into(),
            original: logical.into(),
            flags,
            args,
            heredocs: vec![],
            comments: vec![],
            lines: Lines { first: 0, last: 0 },
        })
    }

    /// Takes leading `--flags`, removing quotes and escapes.
    fn flags<'l>(&self, rest: &'l str) -> (Vec<String>, &'l str) {
        let mut flags = vec![];
        let mut rest = rest.trim_start();
        while rest.starts_with("--") {
            let mut word = String::new();
            let mut quote = None;
            let mut chars = rest.char_indices();
            let mut end = rest.len();
            while let Some((at, c)) = chars.next() {
                match (c, quote) {
                    (c, None) if c.is_whitespace() => {
                        end = at;
                        break;
                    }
                    (c, Some(open)) if c == open => quote = None,
                    ('\'' | '"', None) => quote = Some(c),
                    (c, _) if c == self.escape => {
                        word.extend(chars.next().map(|(_, escaped)| escaped));
                    }
                    (c, _) => word.push(c),
                }
            }
            rest = rest[end..].trim_start();
            if word == "--" {
                break;
            }
            flags.push(word);
        }
        (flags, rest)
    }

    fn args(&self, keyword: &str, rest: &str, depth: usize) -> Result<Args> {
        let one = || {
            Args::Words(
                Some(rest).filter(|rest| !rest.is_empty()).map(Into::into).into_iter().collect(),
            )
        };
        Ok(match keyword {
            "add" | "copy" | "volume" => match json(rest)? {
                Some(list) => Args::Json(list),
                None => Args::Words(split_blanks(rest)),
            },
            "expose" | "from" => Args::Words(split_blanks(rest)),
            "cmd" | "entrypoint" | "run" | "shell" => match json(rest)? {
                Some(list) => Args::Json(list),
                None => one(),
            },
            "arg" => Args::Words(self.words(rest)),
            "env" => Args::Pairs(self.pairs(rest, "ENV")?),
            "label" => Args::Pairs(self.pairs(rest, "LABEL")?),
            "maintainer" | "stopsignal" | "user" | "workdir" => one(),
            "healthcheck" => {
                let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
                let (kind, command) = (&rest[..end], rest[end..].trim_start());
                let head = Some(kind.to_owned()).filter(|kind| !kind.is_empty());
                match json(command)? {
                    Some(list) => Args::Json(head.into_iter().chain(list).collect()),
                    None => {
                        let command =
                            Some(command.to_owned()).filter(|command| !command.is_empty());
                        Args::Words(head.into_iter().chain(command).collect())
                    }
                }
            }
            // Nested triggers are refused later; there is no need to look into them.
            "onbuild" if !rest.is_empty() && depth == 0 => {
                Args::Instruction(Box::new(self.node(rest, depth + 1)?))
            }
            _ => Args::Words(vec![]),
        })
    }

    /// Splits at blanks outside quotes; quotes and escapes stay.
    fn words(&self, rest: &str) -> Vec<String> {
        let mut words = vec![];
        let mut word = String::new();
        let mut started = false;
        let mut quote = None;
        let mut chars = rest.chars().peekable();
        while let Some(c) = chars.next() {
            if quote.is_none() && c.is_whitespace() {
                if started {
                    words.push(std::mem::take(&mut word));
                    started = false;
                }
                continue;
            }
            if c == self.escape && quote != Some('\'') {
                // At the very end it escapes nothing.
                if let Some(next) = chars.next() {
                    word.push(c);
                    word.push(next);
                    started = true;
                }
                continue;
            }
            match quote {
                Some(open) if open == c => quote = None,
                None if matches!(c, '\'' | '"') => quote = Some(c),
                _ => {}
            }
            word.push(c);
            started = true;
        }
        if started {
            words.push(word);
        }
        words
    }

    fn pairs(&self, rest: &str, instruction: &str) -> Result<Vec<Pair>> {
        let words = self.words(rest);
        let Some(first) = words.first() else { return Ok(vec![]) };
        if !first.contains('=') {
            // The old form: a name, then everything else is the value.
            let at = rest.find(is_blank);
            let (key, value) = at
                .map(|at| rest.split_at(at))
                .ok_or_else(|| Problem::new(format!("{instruction} must have two arguments")))?;
            return Ok(vec![Pair {
                key: key.into(),
                value: value.trim_start_matches(is_blank).into(),
                legacy: true,
            }]);
        }
        words
            .iter()
            .map(|word| match word.split_once('=') {
                Some((key, value)) => {
                    Ok(Pair { key: key.into(), value: value.into(), legacy: false })
                }
                None => Err(Problem::new(format!(
                    "Syntax error - can't find = in {word:?}. Must be of the form: name=value"
                ))),
            })
            .collect()
    }
}

impl Node {
    fn takes_heredocs(&self) -> bool {
        match &self.args {
            Args::Json(_) => false,
            Args::Instruction(inner) => inner.takes_heredocs(),
            _ => matches!(self.keyword.to_ascii_lowercase().as_str(), "add" | "copy" | "run"),
        }
    }
}

/// The blanks that separate words, which are fewer than Unicode's.
fn is_blank(c: char) -> bool {
    matches!(c, '\t' | '\u{b}' | '\u{c}' | '\r' | ' ')
}

fn trim_end(line: &str) -> &str {
    line.trim_end_matches(['\r', '\n'])
}

fn split_blanks(rest: &str) -> Vec<String> {
    rest.split(is_blank).filter(|word| !word.is_empty()).map(Into::into).collect()
}

/// Reads a JSON array of strings. What is not JSON at all is left to other readings.
fn json(rest: &str) -> Result<Option<Vec<String>>> {
    let rest = rest.trim_start();
    if !rest.starts_with('[') {
        return Ok(None);
    }
    let Ok(values) = serde_json::from_str::<Vec<serde_json::Value>>(rest) else { return Ok(None) };
    let strings = values.into_iter().map(|value| match value {
        serde_json::Value::String(text) => Some(text),
        _ => None,
    });
    let strings: Option<Vec<String>> = strings.collect();
    strings.map(Some).ok_or_else(|| {
        Problem::new("only arrays of strings are allowed: arrays must be comprised of strings only")
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{ProptestConfig, prop_assert, proptest};

    use super::*;

    fn one(text: &str) -> Node {
        let mut ast = parse(text).unwrap();
        assert_eq!(ast.nodes.len(), 1, "{text:?}");
        ast.nodes.remove(0)
    }

    fn words(text: &str) -> Vec<String> {
        match one(text).args {
            Args::Words(words) => words,
            other => panic!("{text:?}: {other:?}"),
        }
    }

    fn message(text: &str) -> String {
        parse(text).unwrap_err().message
    }

    #[test]
    fn continuation_joins_lines_with_nothing_between() {
        for (text, expected) in [
            ("RUN a\\\nb", "ab"),
            ("RUN a \\  \t\n  b", "a   b"),
            ("RUN a \\\n# comment\n  # another \\\n b", "a  b"),
            ("RUN a \\\n\n\n b", "a  b"),
            ("RUN a \\", "a"),
            ("\\\nRUN a", "a"),
            ("RUN a \\\r\n b\r\n", "a  b"),
            ("RUN a \\\n\\\nb", "a b"),
            ("# escape=`\nRUN a `\nb\\", "a b\\"),
        ] {
            assert_eq!(words(text), [expected], "{text:?}");
        }
    }

    #[test]
    fn doubled_escape_does_not_continue() {
        for (text, expected) in [("RUN a\\\\\nRUN b", "a\\\\"), ("RUN a\\\\\\\nRUN b", "a\\\\\\")] {
            let ast = parse(text).unwrap();
            assert_eq!(ast.nodes.len(), 2);
            assert_eq!(ast.nodes[0].args, Args::Words(vec![expected.into()]));
        }
    }

    #[test]
    fn blank_line_in_a_continuation_is_told_at_the_last_line() {
        let ast = parse("FROM x\nRUN a \\\n\n b \\\n c\n").unwrap();
        assert_eq!(ast.empty_continuations, [Lines { first: 5, last: 5 }]);
        assert_eq!(ast.nodes[1].lines, Lines { first: 2, last: 5 });
    }

    #[test]
    fn comment_that_ends_in_the_escape_does_not_continue() {
        let ast = parse("# a \\\nRUN b\n  # c\nRUN d # e\n").unwrap();
        assert_eq!(ast.nodes.len(), 2);
        assert_eq!(ast.nodes[1].args, Args::Words(vec!["d # e".into()]));
    }

    #[test]
    fn directive_window_closes_at_the_first_other_line() {
        for (text, escape) in [
            ("# escape=`\nFROM x", '`'),
            (" # escape = `\nFROM x", '`'),
            ("\u{feff}# escape=`\nFROM x", '`'),
            ("# syntax=a\n# check=skip=all\n#escape=`\nFROM x", '`'),
            ("\n# escape=`\nFROM x", '\\'),
            ("# comment\n# escape=`\nFROM x", '\\'),
            ("# other=x\n# escape=`\nFROM x", '\\'),
            ("#!/bin/x\n# escape=`\nFROM x", '\\'),
            ("FROM x\n# escape=`", '\\'),
        ] {
            assert_eq!(parse(text).unwrap().escape, escape, "{text:?}");
        }
        assert_eq!(
            message("# escape=x\nFROM x"),
            "invalid escape token 'x' does not match ` or \\"
        );
        assert_eq!(
            message("# escape=`\n# escape=`\nFROM x"),
            "only one escape parser directive can be used"
        );
    }

    #[test]
    fn json_form_falls_back_when_it_is_not_json() {
        let json = |list: &[&str]| Args::Json(list.iter().map(|s| (*s).into()).collect());
        for (text, expected) in [
            ("CMD [\"a\", \"b c\"]", json(&["a", "b c"])),
            ("CMD  [ ]", json(&[])),
            ("CMD ['a']", Args::Words(vec!["['a']".into()])),
            ("CMD [\"a\"] x", Args::Words(vec!["[\"a\"] x".into()])),
            ("CMD [\"a\"", Args::Words(vec!["[\"a\"".into()])),
            ("VOLUME [\"a\"]", json(&["a"])),
            ("VOLUME a  b", Args::Words(vec!["a".into(), "b".into()])),
            ("COPY [\"a b\", \"/c\"]", json(&["a b", "/c"])),
            ("HEALTHCHECK CMD [\"a\"]", json(&["CMD", "a"])),
            ("HEALTHCHECK --interval=1s CMD a  b", Args::Words(vec!["CMD".into(), "a  b".into()])),
            ("RUN", Args::Words(vec![])),
            ("WORKDIR /a b ", Args::Words(vec!["/a b".into()])),
            ("MAINTAINER a <b>", Args::Words(vec!["a <b>".into()])),
            ("NONSENSE a b", Args::Words(vec![])),
        ] {
            assert_eq!(one(text).args, expected, "{text:?}");
        }
        for text in ["CMD [1]", "CMD [null]", "CMD [[\"a\"]]", "ONBUILD CMD [{}]"] {
            assert!(
                message(text).ends_with("arrays must be comprised of strings only"),
                "{text:?}"
            );
        }
    }

    #[test]
    fn flags_come_first_and_lose_quotes() {
        for (text, flags, rest) in [
            ("RUN --a --b=c d --e", &["--a", "--b=c"][..], "d --e"),
            ("RUN --a='b c' d", &["--a=b c"], "d"),
            ("RUN --a=\"b\\\"c\"x d", &["--a=b\"cx"], "d"),
            ("RUN --a=b\\ c d", &["--a=b c"], "d"),
            ("RUN --a -- --b", &["--a"], "--b"),
            ("RUN -- x", &[], "x"),
            ("RUN -a", &[], "-a"),
        ] {
            let node = one(text);
            assert_eq!(node.flags, flags, "{text:?}");
            assert_eq!(node.args, Args::Words(vec![rest.into()]), "{text:?}");
        }
    }

    #[test]
    fn names_and_values() {
        let pairs = |text| match one(text).args {
            Args::Pairs(pairs) => pairs.into_iter().map(|p| (p.key, p.value)).collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        };
        let own = |list: &[(&str, &str)]| {
            list.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect::<Vec<_>>()
        };
        assert_eq!(
            pairs("ENV a=b c=\"d e\" f='g'"),
            own(&[("a", "b"), ("c", "\"d e\""), ("f", "'g'")])
        );
        assert_eq!(pairs("ENV a=b\\ c d="), own(&[("a", "b\\ c"), ("d", "")]));
        assert_eq!(pairs("ENV a  b c=d "), own(&[("a", "b c=d")]));
        assert_eq!(pairs("ENV \"a b\"=c"), own(&[("\"a b\"", "c")]));
        assert_eq!(pairs("LABEL"), own(&[]));
        assert_eq!(message("ENV a"), "ENV must have two arguments");
        assert_eq!(
            message("ENV a=b c"),
            "Syntax error - can't find = in \"c\". Must be of the form: name=value"
        );
        assert_eq!(words("ARG a b=\"c d\" e=''"), ["a", "b=\"c d\"", "e=''"]);
        assert_eq!(words("ARG a\\"), ["a"]);
    }

    #[test]
    fn here_documents_are_read() {
        let text = "COPY <<a <<-'b' /x\n# not a comment \\\n\na\n\t$x\n\t\tb\nRUN c\n";
        let ast = parse(text).unwrap();
        assert_eq!(ast.nodes.len(), 2);
        let docs = &ast.nodes[0].heredocs;
        assert_eq!(
            (docs[0].name.as_str(), docs[0].content.as_str(), docs[0].expand),
            ("a", "# not a comment \\\n\n", true)
        );
        assert_eq!((docs[1].body().as_str(), docs[1].expand), ("$x\n", false));
        assert_eq!(ast.nodes[0].lines, Lines { first: 1, last: 6 });
        let crlf = one("RUN <<EOF\r\na\r\nEOF\r\n");
        assert_eq!(crlf.heredocs[0].content, "a\r\n");
        assert_eq!(message("RUN <<EOF\na\n"), "unterminated heredoc");
    }

    #[test]
    fn here_documents_belong_to_few_instructions() {
        for text in
            ["CMD <<EOF", "ENV a=<<EOF", "RUN [\"<<EOF\"]", "RUN echo ' <<EOF", "ONBUILD CMD <<EOF"]
        {
            assert!(one(text).heredocs.is_empty(), "{text:?}");
        }
        assert_eq!(one("ONBUILD COPY <<EOF /x\na\nEOF").heredocs[0].content, "a\n");
    }

    #[test]
    fn files_without_instructions_are_refused() {
        for text in ["", "# a\n", "\n\n"] {
            assert_eq!(message(text), "file with no instructions", "{text:?}");
        }
        let long = format!("RUN {}", "x".repeat(MAX_LINE));
        assert_eq!(message(&long), "dockerfile line greater than max allowed size of 65535");
        assert!(parse(&long[..MAX_LINE - 1]).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn any_text_is_parsed_or_refused_and_spans_lie_inside(
            text in "([ -~\t\n\r]|\n|\\\\\n|(RUN|COPY|ENV|ARG|FROM|ONBUILD|CMD|HEALTHCHECK|#) |<<|EOF|\"|\\[|--|ä|\u{feff}){0,60}"
        ) {
            let lines = u32::try_from(text.split_inclusive('\n').count()).unwrap();
            match parse(&text) {
                Ok(ast) => {
                    let mut last = 0;
                    for node in ast.nodes {
                        prop_assert!(node.lines.first > last && node.lines.first <= node.lines.last);
                        last = node.lines.last;
                    }
                    prop_assert!(last <= lines);
                }
                Err(problem) => {
                    for span in problem.lines {
                        prop_assert!(span.first >= 1 && span.first <= span.last && span.last <= lines);
                    }
                }
            }
        }
    }
}
