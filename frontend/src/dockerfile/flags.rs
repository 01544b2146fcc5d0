//! `--flags` of instructions.

use super::problem::{Problem, Result};
use super::suggest::{suggest, with_suggestion};

/// What values a flag takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `--f`, `--f=true`, `--f=false`.
    Bool,
    /// `--f=value`, once.
    Text,
    /// `--f=value`, any number of times.
    List,
}

/// The flags an instruction was given, checked against those it knows.
#[derive(Debug, Default)]
pub(crate) struct Flags {
    given: Vec<(&'static str, String)>,
}

impl Flags {
    pub(crate) fn parse(words: &[String], known: &[(&'static str, Kind)]) -> Result<Self> {
        let mut given: Vec<(&'static str, String)> = vec![];
        for word in words {
            let (flag, value) = match word.split_once('=') {
                Some((flag, value)) => (flag, Some(value)),
                None => (word.as_str(), None),
            };
            let name = flag.trim_start_matches("--");
            let Some((name, kind)) =
                known.iter().find(|(known, _)| flag.strip_prefix("--") == Some(known))
            else {
                let suggestion = suggest(name, known.iter().map(|(known, _)| *known), true);
                return Err(Problem::new(with_suggestion(
                    format!("unknown flag: {flag}"),
                    suggestion,
                )));
            };
            if *kind != Kind::List && given.iter().any(|(known, _)| known == name) {
                return Err(Problem::new(format!("duplicate flag specified: {flag}")));
            }
            let value = match (kind, value) {
                (Kind::Bool, None) => "true".to_owned(),
                (Kind::Bool, Some("")) | (Kind::Text | Kind::List, None) => {
                    return Err(Problem::new(format!("missing a value on flag: {flag}")));
                }
                (Kind::Bool, Some(value)) => match value.to_lowercase().as_str() {
                    boolean @ ("true" | "false") => boolean.to_owned(),
                    _ => {
                        let message =
                            format!("expecting boolean value for flag {flag}, not: {value}");
                        return Err(Problem::new(message));
                    }
                },
                (_, Some(value)) => value.to_owned(),
            };
            given.push((name, value));
        }
        Ok(Self { given })
    }

    /// Returns the value of a flag, empty when it was not given.
    pub(crate) fn text(&self, name: &str) -> String {
        self.list(name).pop().unwrap_or_default()
    }

    pub(crate) fn list(&self, name: &str) -> Vec<String> {
        self.given
            .iter()
            .filter(|(known, _)| *known == name)
            .map(|(_, value)| value.clone())
            .collect()
    }

    pub(crate) fn is_true(&self, name: &str) -> bool {
        self.text(name) == "true"
    }

    pub(crate) fn is_given(&self, name: &str) -> bool {
        self.given.iter().any(|(known, _)| *known == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: &[(&str, Kind)] =
        &[("link", Kind::Bool), ("chown", Kind::Text), ("exclude", Kind::List)];

    fn parse(words: &[&str]) -> Result<Flags> {
        Flags::parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>(), KNOWN)
    }

    #[test]
    fn values_are_taken() {
        let flags = parse(&["--link", "--chown=", "--exclude=a", "--exclude=b=c"]).unwrap();
        assert!(flags.is_true("link"));
        assert!(flags.is_given("chown"));
        assert_eq!(
            (flags.text("chown"), flags.list("exclude")),
            (String::new(), vec!["a".into(), "b=c".into()])
        );
        assert!(!parse(&["--link=False"]).unwrap().is_true("link"));
    }

    #[test]
    fn mistakes_are_told() {
        for (words, message) in [
            (&["--lnik"][..], "unknown flag: --lnik (did you mean link?)"),
            (&["--Link"], "unknown flag: --Link (did you mean link?)"),
            (&["--nonsense=1"], "unknown flag: --nonsense"),
            (&["--link", "--link"], "duplicate flag specified: --link"),
            (&["--link="], "missing a value on flag: --link"),
            (&["--link=1"], "expecting boolean value for flag --link, not: 1"),
            (&["--chown"], "missing a value on flag: --chown"),
            (&["--exclude"], "missing a value on flag: --exclude"),
        ] {
            assert_eq!(parse(words).unwrap_err().message, message);
        }
    }
}
