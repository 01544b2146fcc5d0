//! Token scopes: `repository:<name>:pull,push`, sorted and merged so that equal wishes are equal keys.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What a token must allow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Scopes(BTreeMap<String, BTreeSet<String>>);

impl Scopes {
    pub(crate) fn pull(path: &str) -> Self {
        Self::default().with(path, &["pull"])
    }

    pub(crate) fn push(path: &str) -> Self {
        Self::default().with(path, &["pull", "push"])
    }

    /// Adds the right to read a repository that a blob may be mounted from.
    #[must_use]
    pub(crate) fn with_pull(self, path: &str) -> Self {
        self.with(path, &["pull"])
    }

    fn with(mut self, path: &str, actions: &[&str]) -> Self {
        let entry = self.0.entry(format!("repository:{path}")).or_default();
        entry.extend(actions.iter().map(|action| (*action).to_owned()));
        self
    }

    /// Reads the space-separated list of a challenge.
    pub(crate) fn parse(text: &str) -> Self {
        let mut scopes = Self::default();
        for scope in text.split_ascii_whitespace() {
            // The name may hold a port, so the actions are what follows the last colon.
            let (resource, actions) = scope.rsplit_once(':').unwrap_or((scope, ""));
            let entry = scopes.0.entry(resource.to_owned()).or_default();
            entry.extend(actions.split(',').filter(|action| !action.is_empty()).map(str::to_owned));
        }
        scopes
    }

    /// Returns what allows both.
    #[must_use]
    pub(crate) fn union(&self, other: &Self) -> Self {
        let mut all = self.clone();
        for (resource, actions) in &other.0 {
            all.0.entry(resource.clone()).or_default().extend(actions.iter().cloned());
        }
        all
    }

    /// Returns one text for each resource.
    pub(crate) fn iter(&self) -> impl Iterator<Item = String> + '_ {
        self.0.iter().map(|(resource, actions)| {
            let actions: Vec<&str> = actions.iter().map(String::as_str).collect();
            if actions.is_empty() {
                resource.clone()
            } else {
                format!("{resource}:{}", actions.join(","))
            }
        })
    }
}

impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.iter().collect::<Vec<_>>().join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_wishes_are_equal() {
        let a = Scopes::parse("repository:b:push,pull repository:a:pull");
        let b = Scopes::push("b").with_pull("a");
        assert_eq!(a, b);
        assert_eq!(a.to_string(), "repository:a:pull repository:b:pull,push");
        assert_eq!(Scopes::pull("b").union(&a), a);
    }

    #[test]
    fn odd_scopes_survive() {
        for text in ["registry:catalog:*", "repository(plugin):h:5000/a:pull", "aws"] {
            assert_eq!(Scopes::parse(text).to_string(), text);
        }
        assert_eq!(Scopes::parse("").to_string(), "");
    }
}
