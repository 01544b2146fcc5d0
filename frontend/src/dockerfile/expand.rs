//! Variables, quotes and escapes in instructions.
//!
//! The language is that of a POSIX shell's words, cut down: no globbing, no command substitution, no arithmetic.

mod pattern;

use std::collections::BTreeSet;
use std::sync::Arc;

/// Variables in the order in which they were last set. Copies share what they have in common: there is one for each stage and
/// each step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Env {
    list: Arc<Vec<Variable>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Variable {
    name: Arc<str>,
    value: Arc<str>,
}

impl Env {
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.list.iter().rev().find(|known| *known.name == *name).map(|known| &*known.value)
    }

    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.remove(name);
        let variable = Variable { name: name.into(), value: value.into() };
        Arc::make_mut(&mut self.list).push(variable);
    }

    pub(crate) fn remove(&mut self, name: &str) {
        if self.get(name).is_some() {
            Arc::make_mut(&mut self.list).retain(|known| *known.name != *name);
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.list.iter().map(|known| (&*known.name, &*known.value))
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.iter().map(|(name, _)| name)
    }

    /// Returns `KEY=value` for each.
    pub(crate) fn to_vec(&self) -> Vec<String> {
        self.iter().map(|(name, value)| format!("{name}={value}")).collect()
    }
}

/// How words are read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lexer {
    /// `\`, or what the `escape` directive says.
    pub(crate) escape: char,
    /// Keep quotes in the result.
    pub(crate) raw_quotes: bool,
    /// Keep escape characters in the result.
    pub(crate) raw_escapes: bool,
    /// Quotes are ordinary characters.
    pub(crate) ignore_quotes: bool,
    /// Leave references to unset variables as they are.
    pub(crate) keep_unset: bool,
}

/// An expanded word.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Expansion {
    pub(crate) text: String,
    /// Names that were asked for and are set.
    pub(crate) matched: BTreeSet<String>,
    /// Names that were asked for and not set.
    pub(crate) unmatched: BTreeSet<String>,
}

/// Substitutions may nest; past this depth the stack would be at risk.
const MAX_DEPTH: usize = 100;

impl Lexer {
    pub(crate) fn new(escape: char) -> Self {
        Self {
            escape,
            raw_quotes: false,
            raw_escapes: false,
            ignore_quotes: false,
            keep_unset: false,
        }
    }

    /// Expands text to one word; blanks are kept.
    pub(crate) fn word(&self, text: &str, env: &Env) -> Result<Expansion, String> {
        let (expansion, outcome) = self.look_up(text, env);
        outcome.map(|()| expansion)
    }

    /// As [`word`](Self::word), but tells which names were asked for also when the text is wrong further on.
    pub(crate) fn look_up(&self, text: &str, env: &Env) -> (Expansion, Result<(), String>) {
        let (outcome, matched, unmatched) = self.process(text, env);
        let (text, outcome) = match outcome {
            Ok((text, _)) => (text, Ok(())),
            Err(reason) => (String::new(), Err(reason)),
        };
        (Expansion { text, matched, unmatched }, outcome)
    }

    /// Expands text and splits it at blanks outside quotes, those that come from variables included.
    pub(crate) fn words(&self, text: &str, env: &Env) -> Result<Vec<String>, String> {
        self.process(text, env).0.map(|(_, words)| words)
    }

    fn process(&self, text: &str, env: &Env) -> Processed {
        let chars: Vec<char> = text.chars().collect();
        let mut scan = Scan {
            lexer: *self,
            chars: &chars,
            at: 0,
            env,
            matched: BTreeSet::new(),
            unmatched: BTreeSet::new(),
            depth: 0,
        };
        let outcome = scan
            .until(None, self.raw_escapes)
            .map_err(|reason| format!("failed to process {text:?}: {reason}"));
        (outcome, scan.matched, scan.unmatched)
    }
}

/// The text and its words, then the names that are set and those that are not.
type Processed = (Result<(String, Vec<String>), String>, BTreeSet<String>, BTreeSet<String>);

#[derive(Default)]
struct Words {
    done: Vec<String>,
    current: String,
}

impl Words {
    fn push(&mut self, c: char) {
        if !c.is_whitespace() {
            self.current.push(c);
        } else if !self.current.is_empty() {
            self.done.push(std::mem::take(&mut self.current));
        }
    }

    fn finish(mut self) -> Vec<String> {
        if !self.current.is_empty() {
            self.done.push(self.current);
        }
        self.done
    }
}

struct Scan<'a> {
    lexer: Lexer,
    chars: &'a [char],
    at: usize,
    env: &'a Env,
    matched: BTreeSet<String>,
    unmatched: BTreeSet<String>,
    depth: usize,
}

impl Scan<'_> {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += 1;
        Some(c)
    }

    /// Reads up to and including the stop character, or to the end.
    fn until(
        &mut self,
        stop: Option<char>,
        raw_escapes: bool,
    ) -> Result<(String, Vec<String>), String> {
        if self.depth > MAX_DEPTH {
            return Err(format!("substitutions are nested more than {MAX_DEPTH} deep"));
        }
        self.depth += 1;
        let result = self.until_inner(stop, raw_escapes);
        self.depth -= 1;
        result
    }

    fn until_inner(
        &mut self,
        stop: Option<char>,
        raw_escapes: bool,
    ) -> Result<(String, Vec<String>), String> {
        let mut result = String::new();
        let mut words = Words::default();
        while let Some(c) = self.peek() {
            if Some(c) == stop {
                self.at += 1;
                return Ok((result, words.finish()));
            }
            match c {
                '$' => {
                    let value = self.dollar()?;
                    value.chars().for_each(|c| words.push(c));
                    result.push_str(&value);
                }
                '\'' | '"' if !self.lexer.ignore_quotes => {
                    let value = if c == '"' {
                        self.double_quoted(raw_escapes)?
                    } else {
                        self.single_quoted()?
                    };
                    words.current.push_str(&value);
                    result.push_str(&value);
                }
                '<' => {
                    let value = self.angle();
                    words.current.push_str(&value);
                    result.push_str(&value);
                }
                c if c == self.lexer.escape => {
                    self.at += 1;
                    if raw_escapes {
                        words.current.push(c);
                        result.push(c);
                    }
                    // An escape at the very end escapes nothing.
                    let Some(escaped) = self.next() else { break };
                    words.current.push(escaped);
                    result.push(escaped);
                }
                c => {
                    self.at += 1;
                    words.push(c);
                    result.push(c);
                }
            }
        }
        match stop {
            Some(stop) => {
                Err(format!("unexpected end of statement while looking for matching {stop}"))
            }
            None => Ok((result, words.finish())),
        }
    }

    fn single_quoted(&mut self) -> Result<String, String> {
        let mut result = String::new();
        self.quote(&mut result);
        loop {
            match self.peek() {
                None => {
                    return Err(
                        "unexpected end of statement while looking for matching single-quote"
                            .into(),
                    );
                }
                Some('\'') => {
                    self.quote(&mut result);
                    return Ok(result);
                }
                Some(c) => {
                    self.at += 1;
                    result.push(c);
                }
            }
        }
    }

    fn quote(&mut self, result: &mut String) {
        let c = self.next();
        if self.lexer.raw_quotes {
            result.extend(c);
        }
    }

    fn double_quoted(&mut self, raw_escapes: bool) -> Result<String, String> {
        let mut result = String::new();
        self.quote(&mut result);
        loop {
            match self.peek() {
                None => {
                    return Err(
                        "unexpected end of statement while looking for matching double-quote"
                            .into(),
                    );
                }
                Some('"') => {
                    self.quote(&mut result);
                    return Ok(result);
                }
                Some('$') => result.push_str(&self.dollar()?),
                Some(c) if c == self.lexer.escape => {
                    self.at += 1;
                    if raw_escapes {
                        result.push(c);
                    }
                    match self.peek() {
                        None => {}
                        Some(next) if next == '"' || next == '$' || next == c => {
                            self.at += 1;
                            result.push(next);
                        }
                        Some(_) => result.push(c),
                    }
                }
                Some(c) => {
                    self.at += 1;
                    result.push(c);
                }
            }
        }
    }

    /// `<<` and blanks after it stay in one word, so that a here-document's mark is whole.
    fn angle(&mut self) -> String {
        self.at += 1;
        if self.peek() != Some('<') {
            return "<".into();
        }
        self.at += 1;
        let mut result = String::from("<<");
        while let Some(c @ ('\t' | '\r' | ' ')) = self.peek() {
            self.at += 1;
            result.push(c);
        }
        result
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        match self.peek() {
            Some(c) if c.is_numeric() => {
                while let Some(c) = self.peek().filter(|c| c.is_numeric()) {
                    self.at += 1;
                    name.push(c);
                }
            }
            Some(c @ ('@' | '*' | '#' | '?' | '-' | '$' | '!')) => {
                self.at += 1;
                name.push(c);
            }
            _ => {
                while let Some(c) = self.peek().filter(|c| c.is_alphanumeric() || *c == '_') {
                    self.at += 1;
                    name.push(c);
                }
            }
        }
        name
    }

    fn lookup(&mut self, name: &str) -> Option<String> {
        let value = self.env.get(name).map(Into::into);
        let names = if value.is_some() { &mut self.matched } else { &mut self.unmatched };
        names.insert(name.into());
        value
    }

    fn dollar(&mut self) -> Result<String, String> {
        self.at += 1;
        if self.peek() != Some('{') {
            let name = self.name();
            if name.is_empty() {
                return Ok("$".into());
            }
            return Ok(match self.lookup(&name) {
                None if self.lexer.keep_unset => format!("${name}"),
                value => value.unwrap_or_default(),
            });
        }
        self.at += 1;
        match self.peek() {
            None => return Err("syntax error: missing '}'".into()),
            Some('{' | '}' | ':') => return Err("syntax error: bad substitution".into()),
            Some(_) => {}
        }
        let name = self.name();
        match self.next() {
            Some('}') => match self.lookup(&name) {
                None if self.lexer.keep_unset => Ok(format!("${{{name}}}")),
                value => Ok(value.unwrap_or_default()),
            },
            Some('/') => {
                let all = self.peek() == Some('/');
                if all {
                    self.at += 1;
                }
                let pattern = self.operand('/', true, "missing '/' in ${}")?;
                let replacement = self.operand('}', true, "missing '}'")?;
                let value = self.lookup(&name);
                if self.lexer.keep_unset && value.is_none() {
                    return Ok(format!("${{{name}/{pattern}/{replacement}}}"));
                }
                pattern::replace(&value.unwrap_or_default(), &pattern, &replacement, all)
            }
            Some(first) => {
                let colon = first == ':';
                let modifier = if colon { self.next() } else { Some(first) };
                let shown = if colon {
                    format!(":{}", modifier.unwrap_or('\u{fffd}'))
                } else {
                    first.to_string()
                };
                let unsupported = || format!("unsupported modifier ({shown}) in substitution");
                let cuts = matches!(modifier, Some('#' | '%'));
                if !matches!(modifier, Some('+' | '-' | '?' | '#' | '%')) && !colon
                    || (colon && cuts)
                {
                    return Err(unsupported());
                }
                let word = self.operand('}', cuts, "missing '}'")?;
                let value = self.lookup(&name);
                if self.lexer.keep_unset && value.is_none() {
                    return Ok(format!("${{{name}{shown}{word}}}"));
                }
                let absent = value.as_ref().is_none_or(|value| colon && value.is_empty());
                match modifier {
                    Some('-') => Ok(if absent { word } else { value.unwrap_or_default() }),
                    Some('+') => Ok(if absent { String::new() } else { word }),
                    Some('?') if absent => {
                        let state = if value.is_none() { "unset" } else { "empty" };
                        let default = format!("is not allowed to be {state}");
                        Err(format!("{name}: {}", if word.is_empty() { default } else { word }))
                    }
                    Some('?') => Ok(value.unwrap_or_default()),
                    Some(end @ ('#' | '%')) => {
                        let greedy = word.starts_with(end);
                        let pattern = if greedy { &word[1..] } else { &word };
                        let value = value.unwrap_or_default();
                        match end {
                            '#' => pattern::trim_prefix(&value, pattern, greedy),
                            _ => pattern::trim_suffix(&value, pattern, greedy),
                        }
                    }
                    _ => Err(unsupported()),
                }
            }
            None => Err("syntax error: missing '}'".into()),
        }
    }

    /// Reads the rest of a substitution up to a mark.
    fn operand(&mut self, stop: char, raw_escapes: bool, missing: &str) -> Result<String, String> {
        match self.until(Some(stop), raw_escapes) {
            Ok((word, _)) => Ok(word),
            Err(_) if self.peek().is_none() => Err(format!("syntax error: {missing}")),
            Err(reason) => Err(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::proptest;

    use super::*;

    fn env() -> Env {
        let mut env = Env::default();
        for (name, value) in [
            ("USER", "docker"),
            ("EMPTY", ""),
            ("PATH", "/usr/bin:/bin"),
            ("V", "a/b/c.tar.gz"),
            ("STAR", "x*y?z\\"),
            ("PORTS", "80 90  100"),
            ("NL", "a\nb"),
            ("ÜBER", "u"),
        ] {
            env.set(name, value);
        }
        env
    }

    fn word(text: &str) -> Result<String, String> {
        Lexer::new('\\').word(text, &env()).map(|e| e.text)
    }

    #[test]
    fn words_are_expanded() {
        for (text, expected) in [
            ("", ""),
            ("hello", "hello"),
            ("he'll'o", "hello"),
            ("he\\'llo", "he'llo"),
            ("'a\\b'", "a\\b"),
            ("\"a\\b\"", "a\\b"),
            ("\"a\\\\b\\\"\\$c\"", "a\\b\"$c"),
            ("a\\", "a"),
            ("a\\bc", "abc"),
            ("\\$USER", "$USER"),
            ("$USER", "docker"),
            ("${USER}", "docker"),
            ("'$USER'", "$USER"),
            ("\"$USER\"", "docker"),
            ("$USERx", ""),
            ("$USER.x", "docker.x"),
            ("$", "$"),
            ("$.", "$."),
            ("a$", "a$"),
            ("$1x", "x"),
            ("$12x", "x"),
            ("$$", ""),
            ("$@x", "x"),
            ("${ÜBER}", "u"),
            ("${NONE:-w}", "w"),
            ("${NONE-w}", "w"),
            ("${EMPTY:-w}", "w"),
            ("${EMPTY-w}", ""),
            ("${USER:+w}", "w"),
            ("${USER+w}", "w"),
            ("${EMPTY:+w}", ""),
            ("${EMPTY+w}", "w"),
            ("${NONE+w}", ""),
            ("${NONE:-${USER}x}", "dockerx"),
            ("${NONE:-${NONE:-${NONE:-deep}}}", "deep"),
            ("${NONE:-{a}", "{a"),
            ("${NONE:-'}'}", "}"),
            ("${NONE:-\\}}", "}"),
            ("${USER?must}", "docker"),
            ("${EMPTY?must}", ""),
            ("${V#*/}", "b/c.tar.gz"),
            ("${V##*/}", "c.tar.gz"),
            ("${V%.*}", "a/b/c.tar"),
            ("${V%%.*}", "a/b/c"),
            ("${V%/*}", "a/b"),
            ("${V%%/*}", "a"),
            ("${V#x}", "a/b/c.tar.gz"),
            ("${V/\\//-}", "a-b/c.tar.gz"),
            ("${V//\\//-}", "a-b-c.tar.gz"),
            ("${V/?/x}", "x/b/c.tar.gz"),
            ("${V/./x}", "a/b/cxtar.gz"),
            ("${V//[a]/x}", "a/b/c.tar.gz"),
            ("${V/*/x}", "x"),
            ("${V///}", "a/b/c.tar.gz"),
            ("${STAR/\\*/-}", "x-y?z\\"),
            ("${STAR#*\\*}", "y?z\\"),
            ("${STAR%\\\\}", "x*y?z"),
            ("${NL#*}", "a\nb"),
            ("${NL##*}", "\nb"),
            ("${V#$NONE}", "a/b/c.tar.gz"),
            ("${USER/$USER/x}", "x"),
            ("<<", "<<"),
            ("<< EOF", "<< EOF"),
            ("a<b", "a<b"),
        ] {
            assert_eq!(word(text).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn malformed_words_are_refused() {
        for (text, expected) in [
            ("'a", "unexpected end of statement while looking for matching single-quote"),
            ("\"a", "unexpected end of statement while looking for matching double-quote"),
            ("${", "syntax error: missing '}'"),
            ("${}", "syntax error: bad substitution"),
            ("${:}", "syntax error: bad substitution"),
            ("${:-x}", "syntax error: bad substitution"),
            ("${{x}", "syntax error: bad substitution"),
            ("${USER", "syntax error: missing '}'"),
            ("${USER:-x", "syntax error: missing '}'"),
            ("${USER/a}", "syntax error: missing '/' in ${}"),
            ("${USER/a/b", "syntax error: missing '}'"),
            ("${USER=x}", "unsupported modifier (=) in substitution"),
            ("${USER:=x}", "unsupported modifier (:=) in substitution"),
            ("${USER:#x}", "unsupported modifier (:#) in substitution"),
            ("${USER:abc}", "unsupported modifier (:a) in substitution"),
            ("${USER,x}", "unsupported modifier (,) in substitution"),
            ("${NONE?}", "NONE: is not allowed to be unset"),
            ("${EMPTY:?}", "EMPTY: is not allowed to be empty"),
            ("${NONE:?say $USER}", "NONE: say docker"),
            ("${V#\\a}", "invalid pattern (\\a) in substitution: invalid escape '\\a'"),
        ] {
            let message = word(text).unwrap_err();
            let (_, reason) = message.split_once(": ").unwrap();
            assert_eq!(reason, expected, "{text}");
        }
    }

    #[test]
    fn escape_directive_moves_the_escape() {
        let lexer = Lexer::new('`');
        let word = |text| lexer.word(text, &env()).unwrap().text;
        assert_eq!(word("c:\\a`$USER"), "c:\\a$USER");
        assert_eq!(word("\"`\"\\\""), "\"\\");
    }

    #[test]
    fn here_document_bodies_keep_quotes() {
        let lexer = Lexer { ignore_quotes: true, ..Lexer::new('\\') };
        let word = |text| lexer.word(text, &env()).unwrap().text;
        assert_eq!(word("'$USER' \"x\" \\$y \\\\ \\n"), "'docker' \"x\" $y \\ n");
    }

    #[test]
    fn names_for_people_keep_what_is_not_known() {
        let lexer = Lexer { raw_quotes: true, keep_unset: true, ..Lexer::new('\\') };
        let word = |text| lexer.word(text, &env()).unwrap().text;
        assert_eq!(
            word("echo '$X' \"$USER\" $X ${X} ${X:-y} ${X/a/b}"),
            "echo '$X' \"docker\" $X ${X} ${X:-y} ${X/a/b}"
        );
    }

    #[test]
    fn words_are_split_after_expansion() {
        let words = |text| Lexer::new('\\').words(text, &env()).unwrap();
        assert_eq!(words("$PORTS"), ["80", "90", "100"]);
        assert_eq!(words("x${PORTS}y z"), ["x80", "90", "100y", "z"]);
        assert_eq!(words("\"$PORTS\""), ["80 90  100"]);
        assert_eq!(words("a\\ b"), ["a b"]);
        assert_eq!(words("  a  "), ["a"]);
        assert!(words("$NONE").is_empty());
    }

    #[test]
    fn unset_names_are_told() {
        let expansion = Lexer::new('\\').word("$A ${B:-x} $USER", &env()).unwrap();
        assert_eq!(expansion.unmatched.into_iter().collect::<Vec<_>>(), ["A", "B"]);
    }

    #[test]
    fn last_set_is_last_listed() {
        let mut env = Env::default();
        env.set("A", "1");
        env.set("B", "2");
        env.set("A", "3");
        assert_eq!(env.to_vec(), ["B=2", "A=3"]);
    }

    #[test]
    fn deep_nesting_is_refused_and_does_not_overflow() {
        let text = format!("{}{}", "${X:-".repeat(100_000), "}".repeat(100_000));
        assert!(word(&text).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_expanded_or_refused(text in "[$\\{}'\":#%/*?a<A \\-+`]{0,30}") {
            drop(word(&text));
            drop(Lexer::new('\\').words(&text, &env()));
        }
    }
}
