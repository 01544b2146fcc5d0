//! Path patterns as `.dockerignore`, `--exclude` and local sources use them.
//!
//! Patterns are anchored at the root. `*` and `?` stop at a slash, `**` crosses any number of directories, a leading
//! `!` takes paths back out, and the last pattern that matches a path decides. A pattern that matches a directory
//! matches everything below it. The meaning is that of moby's pattern matcher, not of `.gitignore`.

use regex::Regex;

/// Why patterns cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// A `!` with nothing after it.
    #[error("illegal exclusion pattern: \"!\"")]
    LoneNegation,
    /// A bracket or escape that is not finished, or a range that runs backwards.
    #[error("syntax error in pattern {0:?}: a bracket or backslash is not completed")]
    Syntax(String),
    /// The pattern is too large to be compiled.
    #[error("pattern {0:?} is too complex")]
    TooComplex(String),
    /// A line of the file is longer than the format allows.
    #[error("line {0} is longer than the {max} bytes allowed", max = MAX_LINE - 1)]
    LineTooLong(usize),
}

/// Lines of this size are refused, as the readers of upstream do.
const MAX_LINE: usize = 64 * 1024;

/// A list of patterns, ready to match.
#[derive(Clone, Debug)]
pub struct PatternMatcher {
    patterns: Vec<Pattern>,
    exclusions: bool,
}

/// Which patterns matched a directory; what its entries inherit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MatchInfo(Vec<bool>);

#[derive(Clone, Debug)]
struct Pattern {
    negated: bool,
    text: String,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Exact,
    /// Everything that starts with this.
    Prefix(String),
    /// Everything that ends with this; a leading slash may also be the start of the path.
    Suffix(String),
    Regex(Regex),
}

impl PatternMatcher {
    /// Compiles patterns. Blank ones are left out.
    ///
    /// # Errors
    /// For a lone `!` and for patterns that are not well formed.
    pub fn new<S: AsRef<str>>(patterns: &[S]) -> Result<Self, PatternError> {
        let mut compiled = vec![];
        for pattern in patterns {
            let pattern = pattern.as_ref().trim();
            if pattern.is_empty() {
                continue;
            }
            let cleaned = clean_path(pattern);
            let (negated, text) = match cleaned.strip_prefix('!') {
                Some("") => return Err(PatternError::LoneNegation),
                Some(rest) => (true, rest),
                None => (false, cleaned.as_str()),
            };
            compiled.push(Pattern { negated, text: text.into(), kind: compile(text)? });
        }
        let exclusions = compiled.iter().any(|pattern| pattern.negated);
        Ok(Self { patterns: compiled, exclusions })
    }

    /// Returns whether there are no patterns, so that nothing ever matches.
    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Returns whether some pattern takes paths back out. Without one, nothing below a matched directory needs a look.
    pub fn has_exclusions(&self) -> bool {
        self.exclusions
    }

    /// Returns whether a path, relative to the root and without a slash at its ends, or one of its parents is matched.
    pub fn matches(&self, path: &str) -> bool {
        let mut matched = false;
        for pattern in &self.patterns {
            if pattern.negated == matched && pattern.matches_with_parents(path) {
                matched = !pattern.negated;
            }
        }
        matched
    }

    /// Matches one entry of a walk, given what matching its directory returned; for entries of the root that is
    /// `MatchInfo::default()`. Returns whether the entry is matched, and what to pass on to its own entries.
    ///
    /// Each path costs one look at each pattern, however deep it lies.
    pub fn match_dir_entry(&self, path: &str, parent: &MatchInfo) -> (bool, MatchInfo) {
        let mut matched = false;
        let mut info = vec![false; self.patterns.len()];
        for (position, pattern) in self.patterns.iter().enumerate() {
            let mut hit = parent.0.get(position).copied().unwrap_or(false);
            if !hit {
                // A pattern that cannot change the outcome is not looked at. Upstream then also remembers it as
                // not matching, which entries of this directory can observe; so do we.
                if pattern.negated != matched {
                    continue;
                }
                hit = pattern.matches(path);
            }
            info[position] = hit;
            if hit {
                matched = !pattern.negated;
            }
        }
        (matched, MatchInfo(info))
    }

    /// Returns whether a matched directory can be skipped whole, because no negated pattern can match inside it.
    pub fn may_skip_dir(&self, dir: &str) -> bool {
        !self.patterns.iter().any(|pattern| pattern.negated && pattern.may_match_below(dir))
    }
}

impl Pattern {
    fn matches(&self, path: &str) -> bool {
        match &self.kind {
            Kind::Exact => path == self.text,
            Kind::Prefix(prefix) => path.starts_with(prefix.as_str()),
            Kind::Suffix(suffix) => {
                path.ends_with(suffix.as_str()) || suffix.strip_prefix('/') == Some(path)
            }
            Kind::Regex(regex) => regex.is_match(path),
        }
    }

    fn matches_with_parents(&self, path: &str) -> bool {
        self.matches(path) || path.match_indices('/').any(|(slash, _)| self.matches(&path[..slash]))
    }

    fn may_match_below(&self, dir: &str) -> bool {
        let mut wanted = self.text.split('/');
        for have in dir.split('/') {
            match wanted.next() {
                // The pattern names this directory or one above it.
                None => return false,
                // These may match across slashes.
                Some(part) if part.contains("**") || part.contains('[') => return true,
                Some(part) if part.contains(['*', '?', '\\']) => {}
                Some(part) if part == have => {}
                Some(_) => return false,
            }
        }
        wanted.next().is_some()
    }
}

fn compile(pattern: &str) -> Result<Kind, PatternError> {
    let syntax = || PatternError::Syntax(pattern.into());
    let mut exact = true;
    let mut suffix_only = false;
    let mut regex = String::from("^");
    let mut chars = pattern.chars().peekable();
    let mut first = true;
    let literal =
        |regex: &mut String, c: char| regex.push_str(&regex::escape(c.encode_utf8(&mut [0; 4])));
    while let Some(c) = chars.next() {
        let at_start = std::mem::replace(&mut first, false);
        match c {
            '*' if chars.peek() == Some(&'*') => {
                chars.next();
                if chars.peek() == Some(&'/') {
                    chars.next();
                }
                let at_end = chars.peek().is_none();
                if at_start {
                    if at_end {
                        return Ok(Kind::Suffix(String::new()));
                    }
                    suffix_only = true;
                } else if at_end && exact {
                    return Ok(Kind::Prefix(pattern[..pattern.len() - 2].into()));
                } else {
                    suffix_only = false;
                }
                exact = false;
                regex.push_str(if at_end { ".*" } else { "(.*/)?" });
                continue;
            }
            '*' => regex.push_str("[^/]*"),
            '?' => regex.push_str("[^/]"),
            '[' => push_class(&mut regex, &mut chars).ok_or_else(syntax)?,
            '\\' => literal(&mut regex, chars.next().ok_or_else(syntax)?),
            c => {
                literal(&mut regex, c);
                continue;
            }
        }
        exact = false;
        suffix_only = false;
    }
    if exact {
        return Ok(Kind::Exact);
    }
    if suffix_only {
        return Ok(Kind::Suffix(pattern[2..].into()));
    }
    regex.push('$');
    match Regex::new(&regex) {
        Ok(regex) => Ok(Kind::Regex(regex)),
        Err(regex::Error::CompiledTooBig(_)) => Err(PatternError::TooComplex(pattern.into())),
        Err(_) => Err(syntax()),
    }
}

/// Translates a bracket expression whose opening bracket was read.
fn push_class(
    regex: &mut String,
    chars: &mut std::iter::Peekable<std::str::Chars<'_>>,
) -> Option<()> {
    fn member(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Option<String> {
        let c = match chars.next()? {
            '-' | ']' => return None,
            '\\' => chars.next()?,
            c => c,
        };
        // Hexadecimal, because a bracket expression has its own special characters.
        Some(format!("\\x{{{:x}}}", u32::from(c)))
    }
    regex.push('[');
    if chars.peek() == Some(&'^') {
        chars.next();
        regex.push('^');
    }
    let mut members = 0;
    loop {
        if members > 0 && chars.peek() == Some(&']') {
            chars.next();
            regex.push(']');
            return Some(());
        }
        regex.push_str(&member(chars)?);
        if chars.peek() == Some(&'-') {
            chars.next();
            regex.push('-');
            regex.push_str(&member(chars)?);
        }
        members += 1;
    }
}

/// Reads an ignore file: one pattern a line, `#` at the start of a line is a comment.
///
/// # Errors
/// When a line is longer than the format allows. Patterns themselves are checked by [`PatternMatcher::new`].
pub fn parse_ignore_file(bytes: &[u8]) -> Result<Vec<String>, PatternError> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut patterns = vec![];
    for (number, line) in bytes.split(|b| *b == b'\n').enumerate() {
        if line.len() >= MAX_LINE {
            return Err(PatternError::LineTooLong(number + 1));
        }
        let line = String::from_utf8_lossy(line);
        let pattern = line.trim();
        if line.starts_with('#') || pattern.is_empty() {
            continue;
        }
        let (mark, pattern) = match pattern.strip_prefix('!') {
            Some(rest) => ("!", rest.trim()),
            None => ("", pattern),
        };
        let cleaned = if pattern.is_empty() { String::new() } else { clean_path(pattern) };
        let relative =
            cleaned.strip_prefix('/').filter(|rest| !rest.is_empty()).unwrap_or(&cleaned);
        patterns.push(format!("{mark}{relative}"));
    }
    Ok(patterns)
}

/// Returns the shortest path with the same meaning, found by the text alone: no empty or `.` parts, `..` resolved
/// where there is something to remove, no slash at the end. The empty path becomes `.`.
pub fn clean_path(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = vec![];
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    let joined = parts.join("/");
    match (rooted, joined.is_empty()) {
        (true, _) => format!("/{joined}"),
        (false, true) => ".".into(),
        (false, false) => joined,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};

    use super::*;

    fn matcher(patterns: &[&str]) -> PatternMatcher {
        PatternMatcher::new(patterns).unwrap()
    }

    /// Walks down to a path as a directory walk does.
    fn walked(matcher: &PatternMatcher, path: &str) -> bool {
        let mut info = MatchInfo::default();
        for (slash, _) in path.match_indices('/') {
            info = matcher.match_dir_entry(&path[..slash], &info).1;
        }
        matcher.match_dir_entry(path, &info).0
    }

    #[test]
    fn single_patterns() {
        for (pattern, path, expected) in [
            ("**", "file", true),
            ("**", "a/b", true),
            ("**/", "file", true),
            ("**/**", "a/b", true),
            ("dir/**", "dir/file", true),
            ("dir/**", "dir/a/b", true),
            ("dir/**", "dir", false),
            ("**/dir", "dir", true),
            ("**/dir", "a/dir", true),
            ("**/dir", "a/dir/file", true),
            ("**/dir", "adir", false),
            ("**file", "a/xfile", true),
            ("**/dir/**", "a/dir/file", true),
            ("**/dir/**", "dir/file", true),
            ("**/dir2/*", "a/dir2/file", true),
            ("**/dir2/**", "dir/dir2/dir2/file", true),
            ("**/*.txt", "a/b.txt", true),
            ("**/*.txt", "b.txt", true),
            ("a**/*.txt", "abc/x.txt", true),
            ("a**/*.txt", "a/b/x.txt", true),
            ("a/*/b", "a/x/b", true),
            ("a/*/b", "a/x/y/b", false),
            ("*", "a", true),
            ("*", "a/b", true),
            ("*/b", "a/b", true),
            ("*/b", "b", false),
            ("*.go", "x.go", true),
            ("*.go", "a/x.go", false),
            ("?", "a", true),
            ("?", "ab", false),
            ("a?", "a/", false),
            ("file", "dir/file", false),
            ("dir", "dir/file", true),
            ("dir/", "dir/a/b", true),
            ("./dir", "dir/a", true),
            ("a/../b", "b", true),
            ("[a-c]x", "bx", true),
            ("[a-c]x", "dx", false),
            ("[^a]x", "bx", true),
            ("[^a]x", "ax", false),
            ("[*]", "*", true),
            ("[*]", "a", false),
            ("[\\]]", "]", true),
            ("a]b", "a]b", true),
            ("a\\*b", "a*b", true),
            ("a\\*b", "axb", false),
            ("a.b", "axb", false),
            ("a.?", "axb", false),
            ("(a)*", "(a)b", true),
            ("a+{2}|$?", "a+{2}|$x", true),
            ("x^", "x^", true),
            ("ä?", "äö", true),
            (" file ", "file", true),
        ] {
            let matcher = matcher(&[pattern]);
            assert_eq!(matcher.matches(path), expected, "{pattern} {path}");
            assert_eq!(walked(&matcher, path), expected, "walked {pattern} {path}");
        }
    }

    #[test]
    fn last_match_decides() {
        for (patterns, path, expected) in [
            (&["*", "!a"][..], "a", false),
            (&["*", "!a"], "b", true),
            (&["!a", "*"], "a", true),
            (&["dir", "!dir/keep"], "dir/keep", false),
            (&["dir", "!dir/keep"], "dir/keep/x", false),
            (&["dir", "!dir/keep"], "dir/drop", true),
            (&["dir", "!dir/keep", "dir/keep/not"], "dir/keep/not", true),
            (&["**", "!dir", "dir/x"], "dir/y", false),
            (&["**", "!dir", "dir/x"], "dir/x", true),
            (&["**/*.md", "!README.md"], "README.md", false),
            (&["**/*.md", "!README.md"], "x/README.md", true),
            (&[" ", ""], "a", false),
        ] {
            let matcher = matcher(patterns);
            assert_eq!(matcher.matches(path), expected, "{patterns:?} {path}");
            assert_eq!(walked(&matcher, path), expected, "walked {patterns:?} {path}");
        }
    }

    #[test]
    fn walk_remembers_only_patterns_that_changed_something() {
        // What upstream's clients send is decided by their walk, so the walk's answer is the one that counts.
        let matcher = matcher(&["a/b/c", "!a"]);
        assert!(!matcher.matches("a/b/c"));
        assert!(walked(&matcher, "a/b/c"));
    }

    #[test]
    fn refuses_what_is_not_a_pattern() {
        assert_eq!(PatternMatcher::new(&["!"]).unwrap_err(), PatternError::LoneNegation);
        for bad in ["[", "[]", "[]a]", "[-x]", "[a-]", "[a", "a\\", "[z-a]", "[^]"] {
            assert_eq!(
                PatternMatcher::new(&[bad]).unwrap_err(),
                PatternError::Syntax(bad.into()),
                "{bad}"
            );
        }
    }

    #[test]
    fn excluded_directories_are_entered_only_for_a_reason() {
        for (patterns, dir, skip) in [
            (&["a"][..], "a", true),
            (&["a", "!a/b"], "a", false),
            (&["a", "!b/c"], "a", true),
            (&["*", "!*/c"], "a", false),
            (&["*", "!*/c"], "a/b", true),
            (&["*", "!**/c"], "a/b", false),
            (&["*", "!a/?/c"], "a/b", false),
            (&["*", "!a/b/c"], "a/x", true),
            (&["*", "!a"], "a/b", true),
        ] {
            assert_eq!(matcher(patterns).may_skip_dir(dir), skip, "{patterns:?} {dir}");
        }
        assert!(!matcher(&["a"]).has_exclusions());
        assert!(matcher(&["a", "!b"]).has_exclusions());
    }

    #[test]
    fn ignore_file_lines() {
        let file = b"\xef\xbb\xbf# comment\n #kept\r\n\n  a/./b/ \n!  /c\n/d\n/\n! \na/../../x\n";
        let patterns = parse_ignore_file(file).unwrap();
        assert_eq!(patterns, ["#kept", "a/b", "!c", "d", "/", "!", "../x"]);
        let long = vec![b'a'; MAX_LINE];
        assert_eq!(parse_ignore_file(&long), Err(PatternError::LineTooLong(1)));
        assert!(parse_ignore_file(&long[1..]).is_ok());
    }

    #[test]
    fn paths_are_cleaned_by_their_text() {
        for (path, cleaned) in [
            ("", "."),
            (".", "."),
            ("/", "/"),
            ("//a//b/", "/a/b"),
            ("a/./b/../c", "a/c"),
            ("../a", "../a"),
            ("../../a/..", "../.."),
            ("/..", "/"),
            ("/../a", "/a"),
        ] {
            assert_eq!(clean_path(path), cleaned, "{path}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn any_pattern_is_compiled_or_refused(pattern in "[ab/*?!\\[\\]^\\\\.-]{0,12}", path in "[ab/]{1,8}") {
            if let Ok(matcher) = PatternMatcher::new(&[&pattern]) {
                let _ = matcher.matches(&path);
            }
        }

        #[test]
        fn walking_agrees_without_negation(patterns in proptest::collection::vec("[ab/*]{1,6}", 1..4), path in "[ab](/[ab]){0,4}") {
            let matcher = PatternMatcher::new(&patterns).unwrap();
            prop_assert_eq!(matcher.matches(&path), walked(&matcher, &path));
        }

        #[test]
        fn skipped_directories_hold_nothing_wanted(patterns in proptest::collection::vec("!?[ab*]{1,2}(/[ab*]{1,2}){0,2}", 1..4), path in "[ab](/[ab]){1,4}") {
            let matcher = PatternMatcher::new(&patterns).unwrap();
            let mut info = MatchInfo::default();
            for (slash, _) in path.match_indices('/') {
                let (matched, next) = matcher.match_dir_entry(&path[..slash], &info);
                if matched && matcher.may_skip_dir(&path[..slash]) {
                    prop_assert_eq!(walked(&matcher, &path), true);
                    break;
                }
                info = next;
            }
        }
    }
}
