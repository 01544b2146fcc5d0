//! Doors to the inner parts for the fuzzer. Each panics when what it promises does not hold.

use super::expand::{Env, Lexer};
use super::parse;

/// Parses a file: all places that are named must lie inside it, in order.
///
/// # Panics
/// When they do not.
pub fn parse(text: &str) {
    let lines = u32::try_from(text.split_inclusive('\n').count()).unwrap_or(u32::MAX);
    match parse::parse(text) {
        Ok(ast) => {
            let mut last = 0;
            for node in ast.nodes {
                assert!(node.lines.first > last && node.lines.first <= node.lines.last);
                last = node.lines.last;
            }
            assert!(last <= lines);
        }
        Err(problem) => {
            for span in problem.lines {
                assert!(span.first >= 1 && span.first <= span.last && span.last <= lines);
            }
        }
    }
}

/// Expands words: the first line of the text holds variables, the rest is expanded in every way there is.
///
/// # Panics
/// When an expansion without variables does not leave a word without anything special as it is.
pub fn expand(text: &str) {
    let (variables, words) = text.split_once('\n').unwrap_or(("", text));
    let mut env = Env::default();
    for (name, value) in variables.split(' ').filter_map(|pair| pair.split_once('=')) {
        env.set(name, value);
    }
    for escape in ['\\', '`'] {
        for bits in 0..16 {
            let lexer = Lexer {
                escape,
                raw_quotes: bits & 1 > 0,
                raw_escapes: bits & 2 > 0,
                ignore_quotes: bits & 4 > 0,
                keep_unset: bits & 8 > 0,
            };
            let expanded = lexer.word(words, &env);
            if words.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
                assert_eq!(expanded.map(|expansion| expansion.text).as_deref(), Ok(words));
            }
            drop(lexer.words(words, &env));
        }
    }
}
