//! Source policies: rules that allow, refuse or replace what a build reads from outside.
//!
//! A policy is a list of rules. Each rule selects sources by identifier and attributes; the last rule that fits and
//! allows or denies wins, and one that converts has all policies looked at again with what it made of the source.

use std::collections::BTreeMap;

use regex::Regex;
use serde::{Deserialize, Deserializer};
use slipway_spec::ImageReference;
use slipway_spec::llb::pb;

/// Conversions of one source. More are taken for a circle.
const MAX_CONVERSIONS: usize = 20;

/// Rules, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// The version of the format; only one is known so far.
    #[serde(default)]
    pub version: i64,
    /// The rules.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

/// What is to be done with some sources.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// What is to be done.
    #[serde(default, deserialize_with = "action")]
    pub action: Action,
    /// With which sources.
    pub selector: Selector,
    /// What a source is converted to.
    #[serde(default, alias = "update")]
    pub updates: Option<Update>,
}

/// What a rule does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// Lets the source pass, whatever rules before said.
    #[default]
    Allow,
    /// Refuses it.
    Deny,
    /// Makes it another one.
    Convert,
}

/// Selects sources.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selector {
    /// The identifier, or a pattern of it.
    pub identifier: String,
    /// How the identifier is read.
    #[serde(default, alias = "matchType", deserialize_with = "match_type")]
    pub match_type: MatchType,
    /// What attributes must be; all of it.
    #[serde(default)]
    pub constraints: Vec<Constraint>,
}

/// How the identifier of a selector is read. One that is equal always fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MatchType {
    /// `*` stands for anything.
    #[default]
    Wildcard,
    /// As it is.
    Exact,
    /// A regular expression, which may fit anywhere.
    Regex,
}

/// What an attribute of a source must be.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constraint {
    /// The attribute's name; one that a source does not have is empty.
    #[serde(default)]
    pub key: String,
    /// What it is compared with.
    #[serde(default)]
    pub value: String,
    /// How.
    #[serde(default, deserialize_with = "condition")]
    pub condition: Condition,
}

/// How an attribute is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Condition {
    /// It must be equal.
    #[default]
    Equal,
    /// It must not be equal.
    NotEqual,
    /// It must fit a regular expression.
    Matches,
}

/// What a source becomes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Update {
    /// The identifier, in which `${1}` stands for what the first wildcard or group fitted; empty is the selector's.
    #[serde(default)]
    pub identifier: String,
    /// Attributes that are set.
    #[serde(default)]
    pub attrs: BTreeMap<String, String>,
}

/// Why a source does not pass.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A rule says so.
    #[error("source {0:?} denied by policy: source denied by policy")]
    Denied(String),
    /// Conversions go round in circles.
    #[error("too many mutations on a single source: too many operations")]
    TooMany,
    /// A rule makes no sense.
    #[error("{0}")]
    Invalid(String),
}

/// Reads an enumeration by name or number.
fn named<'de, D: Deserializer<'de>, T: Copy>(
    deserializer: D,
    what: &str,
    known: &[(&str, T)],
) -> Result<T, D::Error> {
    use serde::de::Error as _;
    let value = serde_json::Value::deserialize(deserializer)?;
    let found = match &value {
        serde_json::Value::String(name) => known.iter().find(|(known, _)| known == name),
        serde_json::Value::Number(number) => {
            number.as_u64().and_then(|at| known.get(usize::try_from(at).ok()?))
        }
        _ => None,
    };
    found.map(|(_, found)| *found).ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        D::Error::custom(format!("{value} is no {what}: it is one of {}", names.join(", ")))
    })
}

const ACTIONS: [(&str, Action); 3] =
    [("ALLOW", Action::Allow), ("DENY", Action::Deny), ("CONVERT", Action::Convert)];

fn action<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Action, D::Error> {
    named(deserializer, "action", &ACTIONS)
}

fn match_type<'de, D: Deserializer<'de>>(deserializer: D) -> Result<MatchType, D::Error> {
    let known = [
        ("WILDCARD", MatchType::Wildcard),
        ("EXACT", MatchType::Exact),
        ("REGEX", MatchType::Regex),
    ];
    named(deserializer, "match type", &known)
}

fn condition<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Condition, D::Error> {
    let known = [
        ("EQUAL", Condition::Equal),
        ("NOTEQUAL", Condition::NotEqual),
        ("MATCHES", Condition::Matches),
    ];
    named(deserializer, "condition", &known)
}

impl Policy {
    /// Reads a policy as its users write it, in JSON.
    ///
    /// # Errors
    /// When it is no policy, or a rule of it could never be used.
    pub fn from_json(text: &[u8]) -> Result<Self, PolicyError> {
        let invalid = |error: serde_json::Error| PolicyError::Invalid(error.to_string());
        // A list would be taken for the fields in order.
        let object: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(text).map_err(invalid)?;
        let policy = Self::deserialize(serde_json::Value::Object(object)).map_err(invalid)?;
        policy.check()?;
        Ok(policy)
    }

    /// Checks that every rule can be used.
    ///
    /// # Errors
    /// When a pattern is none, or a conversion says nothing of what a source becomes.
    pub fn check(&self) -> Result<(), PolicyError> {
        for rule in &self.rules {
            rule.selector.pattern()?;
            for constraint in &rule.selector.constraints {
                if constraint.condition == Condition::Matches {
                    expression(&constraint.value)?;
                }
            }
            if rule.action == Action::Convert && rule.updates.is_none() {
                return Err(PolicyError::Invalid(no_destination()));
            }
        }
        Ok(())
    }

    /// Looks at a source once; returns whether it was converted.
    fn pass(&self, source: &mut pb::SourceOp) -> Result<bool, PolicyError> {
        let mut denied = false;
        for rule in &self.rules {
            if !rule.selector.fits(source)? {
                continue;
            }
            match rule.action {
                Action::Allow => denied = false,
                Action::Deny => denied = true,
                Action::Convert => {
                    if rule.convert(source)? {
                        return Ok(true);
                    }
                }
            }
        }
        if denied { Err(PolicyError::Denied(source.identifier.clone())) } else { Ok(false) }
    }
}

fn no_destination() -> String {
    "error mutating source policy: missing destination for convert rule".into()
}

fn expression(text: &str) -> Result<Regex, PolicyError> {
    Regex::new(text).map_err(|error| {
        // The library draws the place over several lines.
        let reason = error.to_string();
        let reason = reason.lines().last().unwrap_or_default().trim().trim_start_matches("error: ");
        PolicyError::Invalid(format!(
            "error matching source policy: invalid regex {text:?}: {reason}"
        ))
    })
}

impl Selector {
    /// Returns the identifier as an expression; none is needed where it is compared as it is.
    fn pattern(&self) -> Result<Option<Regex>, PolicyError> {
        Ok(match self.match_type {
            MatchType::Exact => None,
            MatchType::Regex => Some(expression(&self.identifier)?),
            MatchType::Wildcard if self.identifier.contains("**") => {
                return Err(PolicyError::Invalid(format!(
                    "error matching source policy: invalid wildcard: \"**\" in {:?}",
                    self.identifier
                )));
            }
            MatchType::Wildcard => {
                let parts: Vec<String> = self.identifier.split('*').map(regex::escape).collect();
                Some(expression(&format!("^{}$", parts.join("(.*)")))?)
            }
        })
    }

    fn fits(&self, source: &pb::SourceOp) -> Result<bool, PolicyError> {
        for constraint in &self.constraints {
            let value = source.attrs.get(&constraint.key).map_or("", String::as_str);
            let holds = match constraint.condition {
                Condition::Equal => value == constraint.value,
                Condition::NotEqual => value != constraint.value,
                Condition::Matches => expression(&constraint.value)?.is_match(value),
            };
            if !holds {
                return Ok(false);
            }
        }
        if self.identifier == source.identifier {
            return Ok(true);
        }
        Ok(self.pattern()?.is_some_and(|pattern| pattern.is_match(&source.identifier)))
    }

    /// Fills what the identifier's pattern fitted into a text.
    fn fill(&self, identifier: &str, text: &str) -> Result<String, PolicyError> {
        let Some(pattern) = self.pattern()? else { return Ok(text.to_owned()) };
        Ok(match self.match_type {
            MatchType::Regex => pattern.replace_all(identifier, text).into_owned(),
            _ => match pattern.captures(identifier) {
                None => identifier.to_owned(),
                Some(found) => {
                    let mut filled = String::new();
                    found.expand(text, &mut filled);
                    filled
                }
            },
        })
    }
}

impl Rule {
    /// Makes a source another one; returns whether anything changed.
    fn convert(&self, source: &mut pb::SourceOp) -> Result<bool, PolicyError> {
        let update = self.updates.as_ref().ok_or_else(|| PolicyError::Invalid(no_destination()))?;
        let wanted = match update.identifier.as_str() {
            "" => &self.selector.identifier,
            identifier => identifier,
        };
        let identifier = self.selector.fill(&source.identifier, wanted)?;
        let mut changed = false;
        if !identifier.is_empty() && identifier != source.identifier {
            source.identifier = identifier;
            changed = true;
        }
        for (key, value) in &update.attrs {
            if source.attrs.get(key).map_or("", String::as_str) != value {
                source.attrs.insert(key.clone(), value.clone());
                changed = true;
            }
        }
        Ok(changed)
    }
}

/// Has policies decide about a source, and returns whether they made it another one.
///
/// # Errors
/// When a policy denies the source, or cannot be used.
pub fn evaluate<'a>(
    policies: impl IntoIterator<Item = &'a Policy> + Clone,
    source: &mut pb::SourceOp,
) -> Result<bool, PolicyError> {
    normalize(source);
    let mut converted = false;
    for _ in 0..=MAX_CONVERSIONS {
        let mut again = false;
        for policy in policies.clone() {
            if policy.pass(source)? {
                again = true;
                break;
            }
        }
        if !again {
            return Ok(converted);
        }
        converted = true;
    }
    Err(PolicyError::TooMany)
}

/// Writes an identifier as policies know it: images in full, repositories without what they are reached by.
pub(crate) fn normalize(source: &mut pb::SourceOp) {
    let Some((scheme, rest)) = source.identifier.split_once("://") else { return };
    let normal = match scheme {
        "docker-image" => rest.parse::<ImageReference>().ok().map(|image| image.to_string()),
        "git" => rest.split_once("://").map(|(_, rest)| {
            let end = rest.find('/').unwrap_or(rest.len());
            let host = rest[..end].rsplit('@').next().unwrap_or_default();
            format!("{host}{}", &rest[end..])
        }),
        _ => None,
    };
    if let Some(normal) = normal {
        source.identifier = format!("{scheme}://{normal}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(identifier: &str, attrs: &[(&str, &str)]) -> pb::SourceOp {
        let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        pb::SourceOp { identifier: identifier.into(), attrs }
    }

    /// Evaluates rules written in JSON.
    fn decide(rules: &str, identifier: &str) -> Result<pb::SourceOp, PolicyError> {
        let policy = Policy::from_json(format!("{{\"rules\": [{rules}]}}").as_bytes())?;
        let mut source = source(identifier, &[("http.checksum", "sha256:1")]);
        evaluate([&policy], &mut source).map(|_| source)
    }

    const ALPINE: &str = "docker-image://docker.io/library/alpine:latest";

    #[test]
    fn the_last_rule_that_fits_wins() {
        let allow = format!(r#"{{"action": "ALLOW", "selector": {{"identifier": "{ALPINE}"}}}}"#);
        let deny = r#"{"action": "DENY", "selector": {"identifier": "docker-image://*"}}"#;
        let denied = PolicyError::Denied(ALPINE.into());
        assert_eq!(decide(&format!("{allow}, {deny}"), ALPINE), Err(denied.clone()));
        assert!(decide(&format!("{deny}, {allow}"), ALPINE).is_ok());
        assert!(decide(deny, "https://example.com/x").is_ok());
        // A short name is the same image.
        assert_eq!(decide(deny, "docker-image://alpine"), Err(denied.clone()));
        assert_eq!(
            denied.to_string(),
            format!("source \"{ALPINE}\" denied by policy: source denied by policy")
        );
        // Numbers stand for names; 1 denies.
        let number = r#"{"action": 1, "selector": {"identifier": "https://*"}}"#;
        assert!(decide(number, "https://example.com/x").is_err());
    }

    #[test]
    fn identifiers_are_read_as_the_selector_says() {
        let deny = |kind: &str, identifier: &str| {
            format!(
                r#"{{"action": "DENY", "selector": {{"identifier": "{identifier}", "match_type": "{kind}"}}}}"#
            )
        };
        for (kind, pattern, identifier, fits) in [
            ("EXACT", "https://h/*", "https://h/x", false),
            ("EXACT", "https://h/x", "https://h/x", true),
            ("WILDCARD", "https://h/*.tar", "https://h/a/b.tar", true),
            ("WILDCARD", "https://h/.", "https://h/x", false),
            ("REGEX", "h/[xy]$", "https://h/x", true),
            ("REGEX", "^h/", "https://h/x", false),
        ] {
            let denied = decide(&deny(kind, pattern), identifier).is_err();
            assert_eq!(denied, fits, "{kind} {pattern} {identifier}");
        }
        for (kind, pattern) in [("REGEX", "("), ("WILDCARD", "a**")] {
            let error = decide(&deny(kind, pattern), "https://h/x").unwrap_err();
            assert!(error.to_string().starts_with("error matching source policy: "), "{error}");
        }
    }

    #[test]
    fn constraints_must_all_hold() {
        let deny = |key: &str, value: &str, condition: &str| {
            format!(
                r#"{{"action": "DENY", "selector": {{"identifier": "https://*", "constraints":
                [{{"key": "{key}", "value": "{value}", "condition": "{condition}"}}]}}}}"#
            )
        };
        for (key, value, condition, denied) in [
            ("http.checksum", "sha256:1", "EQUAL", true),
            ("http.checksum", "sha256:1", "NOTEQUAL", false),
            ("http.checksum", "^sha256:", "MATCHES", true),
            ("http.checksum", "^sha512:", "MATCHES", false),
            ("http.perm", "", "EQUAL", true),
        ] {
            let outcome = decide(&deny(key, value, condition), "https://h/x");
            assert_eq!(outcome.is_err(), denied, "{key} {condition} {value}");
        }
    }

    #[test]
    fn conversions_fill_in_what_fitted() {
        let convert = |selector: &str, update: &str| {
            format!(r#"{{"action": "CONVERT", "selector": {selector}, "updates": {update}}}"#)
        };
        let wildcard = convert(
            r#"{"identifier": "docker-image://docker.io/library/golang:*"}"#,
            r#"{"identifier": "docker-image://docker.io/library/golang:${1}-alpine"}"#,
        );
        // Each result fits again.
        let circle = decide(&wildcard, "docker-image://golang:1");
        assert_eq!(circle, Err(PolicyError::TooMany));
        let regex = convert(
            r#"{"identifier": "^https://(.*)/v([0-9])$", "match_type": "REGEX"}"#,
            r#"{"identifier": "https://mirror/${2}/${1}", "attrs": {"http.checksum": "sha256:2"}}"#,
        );
        let made = decide(&regex, "https://h/v7").unwrap();
        assert_eq!(made, source("https://mirror/7/h", &[("http.checksum", "sha256:2")]));
        // Without an identifier only the attributes change.
        let pin = convert(
            &format!(r#"{{"identifier": "{ALPINE}", "match_type": "EXACT"}}"#),
            r#"{"attrs": {"image.checksum": "sha256:3"}}"#,
        );
        let made = decide(&pin, ALPINE).unwrap();
        assert_eq!(
            (made.identifier.as_str(), made.attrs["image.checksum"].as_str()),
            (ALPINE, "sha256:3")
        );
        // What a conversion leads to may be denied by an earlier rule.
        let deny = r#"{"action": "DENY", "selector": {"identifier": "https://mirror/*"}}"#;
        assert!(decide(&format!("{deny}, {regex}"), "https://h/v7").is_err());
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            (r#"{"rules": [{"actoin": "DENY", "selector": {"identifier": "x"}}]}"#, "actoin"),
            (r#"{"rules": [{"action": "FORBID", "selector": {"identifier": "x"}}]}"#, "FORBID"),
            (r#"{"rules": [{"action": "DENY"}]}"#, "selector"),
            (
                r#"{"rules": [{"action": "CONVERT", "selector": {"identifier": "x"}}]}"#,
                "destination",
            ),
            ("[]", "expected"),
        ] {
            let error = Policy::from_json(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert_eq!(Policy::from_json(b"{}").unwrap(), Policy::default());
    }

    #[test]
    fn repositories_are_known_without_their_protocol() {
        for (given, normal) in [
            ("git://https://github.com/a/b.git#main", "git://github.com/a/b.git#main"),
            ("git://github.com/a/b", "git://github.com/a/b"),
            ("git://ssh://git@h/a", "git://h/a"),
            ("local://context", "local://context"),
        ] {
            let mut source = source(given, &[]);
            normalize(&mut source);
            assert_eq!(source.identifier, normal);
        }
    }
}
