//! Values of flags that need more than a string.

use slipway_spec::flag;
use std::collections::BTreeMap;

use slipway_spec::{ImageReference, Platform};

use crate::settings::Environment;

/// `KEY=value`, or a bare `KEY`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeyValue {
    /// The part before the first `=`; never empty.
    pub(crate) key: String,
    /// The part after it; `None` for a bare key.
    pub(crate) value: Option<String>,
}

/// Parses `KEY=value` or `KEY`.
pub(crate) fn key_value(text: &str) -> Result<KeyValue, String> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, Some(value.to_owned())),
        None => (text, None),
    };
    if key.is_empty() {
        return Err("expected KEY=value, but the key is empty".into());
    }
    Ok(KeyValue { key: key.into(), value })
}

/// Returns the pairs as a map, where a bare key takes its value from the environment and is left out if that has none.
pub(crate) fn with_environment(
    pairs: &[KeyValue],
    environment: &Environment,
) -> BTreeMap<String, String> {
    let mut map = BTreeMap::new();
    for KeyValue { key, value } in pairs {
        match value.clone().or_else(|| environment.text(key).map(Into::into)) {
            Some(value) => drop(map.insert(key.clone(), value)),
            // A later bare key that has no value takes an earlier value away, as the last word on the key.
            None => drop(map.remove(key)),
        }
    }
    map
}

/// Returns the pairs as a map, where a bare key has the empty value.
pub(crate) fn with_empty(pairs: &[KeyValue]) -> BTreeMap<String, String> {
    pairs.iter().map(|pair| (pair.key.clone(), pair.value.clone().unwrap_or_default())).collect()
}

/// One comma-separated list of platforms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PlatformList(pub(crate) Vec<Platform>);

/// Parses `linux/amd64,linux/arm64`. An empty list stands for no choice, so that an unset shell variable is harmless.
pub(crate) fn platform_list(text: &str) -> Result<PlatformList, String> {
    text.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(|part| part.parse::<Platform>().map_err(|error| error.to_string()))
        .collect::<Result<_, _>>()
        .map(PlatformList)
}

/// Joins the lists in order, each platform once.
pub(crate) fn join_platforms(lists: &[PlatformList]) -> Vec<Platform> {
    let mut all: Vec<Platform> = vec![];
    for platform in lists.iter().flat_map(|list| &list.0) {
        if !all.contains(platform) {
            all.push(platform.clone());
        }
    }
    all
}

/// Parses an image name.
pub(crate) fn reference(text: &str) -> Result<ImageReference, String> {
    text.parse::<ImageReference>().map_err(|error| error.reason)
}

/// Parses a truth value in the spellings that docker's flags accept.
pub(crate) fn boolean(text: &str) -> Result<bool, String> {
    flag::parse(text).ok_or_else(|| "expected true or false".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_values() {
        for (text, key, value) in [
            ("A=b", "A", Some("b")),
            ("A=", "A", Some("")),
            ("A", "A", None),
            ("A=b=c,d", "A", Some("b=c,d")),
        ] {
            assert_eq!(
                key_value(text),
                Ok(KeyValue { key: key.into(), value: value.map(Into::into) }),
                "{text}"
            );
        }
        assert!(key_value("=x").is_err());
        assert!(key_value("").is_err());
    }

    #[test]
    fn bare_keys_come_from_the_environment_or_vanish() {
        let environment = Environment::of(&[("SET", "here"), ("EMPTY", "")]);
        let pairs: Vec<_> =
            ["A=1", "SET", "EMPTY", "UNSET", "A=2"].iter().map(|t| key_value(t).unwrap()).collect();
        let map = with_environment(&pairs, &environment);
        let expected = [("A", "2"), ("EMPTY", ""), ("SET", "here")];
        assert_eq!(map, expected.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect());
        assert_eq!(with_empty(&[key_value("L").unwrap()])["L"], "");
    }

    #[test]
    fn platforms_are_normalised_and_listed_once() {
        let lists = ["linux/amd64, linux/aarch64", "", "linux/arm64,linux/arm"]
            .map(|text| platform_list(text).unwrap());
        let names: Vec<_> = join_platforms(&lists).iter().map(ToString::to_string).collect();
        assert_eq!(names, ["linux/amd64", "linux/arm64", "linux/arm/v7"]);
        assert!(platform_list("linux/amd64,bogus").is_err());
    }
}
