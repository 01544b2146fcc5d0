//! Source policies, as daemons are told of them.

use slipway_solver::policy::{Action, Condition, MatchType, Policy, Rule};
use slipway_spec::wire::sourcepolicy::{self as wire, PolicyAction};

/// Returns the message that says the same as a policy.
pub fn message(policy: &Policy) -> wire::Policy {
    wire::Policy { version: policy.version, rules: policy.rules.iter().map(rule).collect() }
}

fn rule(rule: &Rule) -> wire::Rule {
    let action = match rule.action {
        Action::Allow => PolicyAction::Allow,
        Action::Deny => PolicyAction::Deny,
        Action::Convert => PolicyAction::Convert,
    };
    let match_type = match rule.selector.match_type {
        MatchType::Wildcard => wire::MatchType::Wildcard,
        MatchType::Exact => wire::MatchType::Exact,
        MatchType::Regex => wire::MatchType::Regex,
    };
    let constraints = rule.selector.constraints.iter().map(|constraint| {
        let condition = match constraint.condition {
            Condition::Equal => wire::AttrMatch::Equal,
            Condition::NotEqual => wire::AttrMatch::Notequal,
            Condition::Matches => wire::AttrMatch::Matches,
        };
        wire::AttrConstraint {
            key: constraint.key.clone(),
            value: constraint.value.clone(),
            condition: condition.into(),
        }
    });
    wire::Rule {
        action: action.into(),
        selector: Some(wire::Selector {
            identifier: rule.selector.identifier.clone(),
            match_type: match_type.into(),
            constraints: constraints.collect(),
        }),
        updates: rule.updates.as_ref().map(|update| wire::Update {
            identifier: update.identifier.clone(),
            attrs: update.attrs.clone(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_reads_the_policy_that_was_meant() {
        let text = r#"{"version": 1, "rules": [
            {"action": "DENY", "selector": {"identifier": "docker-image://*", "constraints": [
                {"key": "a", "value": "1"},
                {"key": "b", "value": "2", "condition": "NOTEQUAL"},
                {"key": "c", "value": "3", "condition": "MATCHES"}]}},
            {"action": "ALLOW", "selector": {"identifier": "i", "matchType": "EXACT"}},
            {"action": "CONVERT", "selector": {"identifier": "(.*)", "matchType": "REGEX"},
             "updates": {"identifier": "to/${1}", "attrs": {"http.checksum": "sha256:0"}}}]}"#;
        let policy: Policy = serde_json::from_str(text).unwrap();
        assert_eq!(slipway_daemon::policy::read(&[message(&policy)]).unwrap(), [policy]);
    }
}
