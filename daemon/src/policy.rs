//! Source policies as clients send them, and the verifier that a client may be.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use slipway_engine::solver::client::{
    PolicyAnswer, PolicyQuestion, PolicyVerifier, SourcePolicies,
};
use slipway_engine::solver::policy::{
    Action, Condition, Constraint, MatchType, Policy, Rule, Selector, Update,
};
use slipway_engine::store::Error;
use slipway_spec::wire::MESSAGE_BYTES;
use slipway_spec::wire::control::SolveRequest;
use slipway_spec::wire::policysession::policy_verifier_client::PolicyVerifierClient;
use slipway_spec::wire::policysession::{CheckPolicyRequest, check_policy_response};
use slipway_spec::wire::sourcepolicy::{self as wire, PolicyAction};
use tonic::{Code, Status};

use crate::gateway::sources;
use crate::session::{SessionError, SessionErrorKind, SessionGroup, SessionManager};

/// Reads policies.
///
/// # Errors
/// When one of them could never be used.
pub fn read(policies: &[wire::Policy]) -> Result<Vec<Policy>, Status> {
    policies.iter().map(one).collect()
}

fn one(policy: &wire::Policy) -> Result<Policy, Status> {
    let invalid = |what: &str| Status::invalid_argument(format!("invalid source policy: {what}"));
    let rules = policy.rules.iter().map(|rule| {
        let action = match PolicyAction::try_from(rule.action) {
            Ok(PolicyAction::Allow) => Action::Allow,
            Ok(PolicyAction::Deny) => Action::Deny,
            Ok(PolicyAction::Convert) => Action::Convert,
            Err(_) => return Err(invalid("unknown action")),
        };
        let selector =
            rule.selector.as_ref().ok_or_else(|| invalid("a rule without a selector"))?;
        let match_type = match wire::MatchType::try_from(selector.match_type) {
            Ok(wire::MatchType::Wildcard) => MatchType::Wildcard,
            Ok(wire::MatchType::Exact) => MatchType::Exact,
            Ok(wire::MatchType::Regex) => MatchType::Regex,
            Err(_) => return Err(invalid("unknown match type")),
        };
        let constraints = selector.constraints.iter().map(|constraint| {
            let condition = match wire::AttrMatch::try_from(constraint.condition) {
                Ok(wire::AttrMatch::Equal) => Condition::Equal,
                Ok(wire::AttrMatch::Notequal) => Condition::NotEqual,
                Ok(wire::AttrMatch::Matches) => Condition::Matches,
                Err(_) => return Err(invalid("unknown attr condition")),
            };
            let (key, value) = (constraint.key.clone(), constraint.value.clone());
            Ok(Constraint { key, value, condition })
        });
        let constraints = constraints.collect::<Result<_, _>>()?;
        let identifier = selector.identifier.clone();
        Ok(Rule {
            action,
            selector: Selector { identifier, match_type, constraints },
            updates: rule.updates.as_ref().map(|update| Update {
                identifier: update.identifier.clone(),
                attrs: update.attrs.clone(),
            }),
        })
    });
    Ok(Policy { version: policy.version, rules: rules.collect::<Result<_, _>>()? })
}

/// Returns what decides about the sources of a build.
///
/// # Errors
/// When its policy could never be used.
pub fn of_build(
    request: &SolveRequest,
    sessions: &SessionManager,
) -> Result<SourcePolicies, Status> {
    let rules = request.source_policy.as_ref().map(one).transpose()?.into_iter().collect();
    let session = request.source_policy_session.clone();
    let verifier = (!session.is_empty()).then(|| {
        Arc::new(ClientVerifier { clients: sessions.group([session]) }) as Arc<dyn PolicyVerifier>
    });
    Ok(SourcePolicies { rules, verifier })
}

/// A client that decides about sources.
#[derive(Debug)]
struct ClientVerifier {
    clients: SessionGroup,
}

const SUBJECT: &str = "cannot ask the client's source policy";

#[async_trait]
impl PolicyVerifier for ClientVerifier {
    async fn check(&self, question: PolicyQuestion<'_>) -> Result<PolicyAnswer, Error> {
        let request = CheckPolicyRequest {
            platform: question.platform.cloned(),
            source: Some(sources::response(question.source.clone(), question.known)),
            caps: BTreeMap::new(),
        };
        let session = self.clients.first().await?;
        let mut client =
            PolicyVerifierClient::new(session.channel()).max_decoding_message_size(MESSAGE_BYTES);
        let answer = client.check_policy(request).await;
        let answer = answer.map_err(|status| SessionError::from_status(SUBJECT, status))?;
        let broken =
            |what: &str| Error::from(SessionError::new(SessionErrorKind::Protocol, SUBJECT, what));
        match answer.into_inner().result {
            Some(check_policy_response::Result::Request(request)) => {
                let request = sources::request(request).map_err(|status| match status.code() {
                    Code::Unimplemented => Error::from(SessionError::new(
                        SessionErrorKind::Unsupported,
                        SUBJECT,
                        status.message(),
                    )),
                    _ => broken(status.message()),
                })?;
                Ok(PolicyAnswer::Ask(Box::new(request)))
            }
            Some(check_policy_response::Result::Decision(decision)) => {
                match PolicyAction::try_from(decision.action) {
                    Ok(PolicyAction::Allow) => Ok(PolicyAnswer::Allow),
                    Ok(PolicyAction::Convert) => {
                        let update = decision.update;
                        let update = update
                            .ok_or_else(|| broken("convert action requires updated source"))?;
                        Ok(PolicyAnswer::Convert(update))
                    }
                    // What is not understood is not allowed.
                    Ok(PolicyAction::Deny) | Err(_) => {
                        let messages = decision.deny_messages.into_iter();
                        Ok(PolicyAnswer::Deny(messages.map(|deny| deny.message).collect()))
                    }
                }
            }
            None => Err(broken("no decision in policy response")),
        }
    }
}

#[cfg(test)]
mod tests {
    use slipway_engine::solver::source::metadata::SourceMetadata;
    use slipway_spec::llb::pb;
    use slipway_spec::wire::gateway::ResolveSourceMetaRequest;
    use slipway_spec::wire::policysession::policy_verifier_server::{
        PolicyVerifier as Service, PolicyVerifierServer,
    };
    use slipway_spec::wire::policysession::{CheckPolicyResponse, DecisionResponse, DenyMessage};
    use tonic::{Request, Response};

    use super::*;
    use crate::fake_client::FakeClient;

    /// Decides by identifier.
    struct Rules;

    #[async_trait]
    impl Service for Rules {
        async fn check_policy(
            &self,
            request: Request<CheckPolicyRequest>,
        ) -> Result<Response<CheckPolicyResponse>, Status> {
            let source = request.into_inner().source.unwrap().source.unwrap();
            let decision = |action: PolicyAction| DecisionResponse {
                action: action as i32,
                deny_messages: vec![DenyMessage { message: "not here".into() }],
                update: Some(pb::SourceOp {
                    identifier: "https://other/x".into(),
                    ..source.clone()
                }),
            };
            let result = match source.identifier.as_str() {
                "https://h/allow" => {
                    check_policy_response::Result::Decision(decision(PolicyAction::Allow))
                }
                "https://h/deny" => {
                    check_policy_response::Result::Decision(decision(PolicyAction::Deny))
                }
                "https://h/convert" => {
                    check_policy_response::Result::Decision(decision(PolicyAction::Convert))
                }
                _ => check_policy_response::Result::Request(ResolveSourceMetaRequest {
                    source: Some(source),
                    ..ResolveSourceMetaRequest::default()
                }),
            };
            Ok(Response::new(CheckPolicyResponse { result: Some(result) }))
        }
    }

    #[tokio::test]
    async fn a_client_decides() {
        let manager = SessionManager::new();
        let client = FakeClient::new("p").with(PolicyVerifierServer::new(Rules), &[]);
        let _connected = client.connect(&manager).await;
        let request = SolveRequest { source_policy_session: "p".into(), ..SolveRequest::default() };
        let verifier = of_build(&request, &manager).unwrap().verifier.unwrap();
        let ask = async |identifier: &str| {
            let source = pb::SourceOp { identifier: identifier.into(), ..pb::SourceOp::default() };
            let known = SourceMetadata::default();
            let question = PolicyQuestion { platform: None, source: &source, known: &known };
            verifier.check(question).await.unwrap()
        };
        assert!(matches!(ask("https://h/allow").await, PolicyAnswer::Allow));
        let PolicyAnswer::Deny(reasons) = ask("https://h/deny").await else { panic!("denied") };
        assert_eq!(reasons, ["not here"]);
        let PolicyAnswer::Convert(other) = ask("https://h/convert").await else {
            panic!("converted")
        };
        assert_eq!(other.identifier, "https://other/x");
        let PolicyAnswer::Ask(request) = ask("https://h/more").await else { panic!("asked") };
        assert_eq!(request.source.identifier, "https://h/more");
    }

    #[test]
    fn policies_are_read_whole() {
        let rule = wire::Rule {
            action: PolicyAction::Convert as i32,
            selector: Some(wire::Selector {
                identifier: "a".into(),
                match_type: wire::MatchType::Regex as i32,
                constraints: vec![wire::AttrConstraint {
                    key: "k".into(),
                    value: "v".into(),
                    condition: wire::AttrMatch::Notequal as i32,
                }],
            }),
            updates: Some(wire::Update { identifier: "b".into(), attrs: BTreeMap::new() }),
        };
        let policy = wire::Policy { version: 1, rules: vec![rule.clone()] };
        let read = read(&[policy]).unwrap();
        let expected = r#"{"version": 1, "rules": [{"action": "CONVERT", "selector": {"identifier": "a", "match_type": "REGEX",
            "constraints": [{"key": "k", "value": "v", "condition": "NOTEQUAL"}]}, "updates": {"identifier": "b"}}]}"#;
        assert_eq!(read, [Policy::from_json(expected.as_bytes()).unwrap()]);
        let odd = wire::Policy { version: 1, rules: vec![wire::Rule { selector: None, ..rule }] };
        assert!(super::read(&[odd]).is_err());
    }
}
