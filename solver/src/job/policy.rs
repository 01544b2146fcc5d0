//! Loading definitions, after the sources in them were decided about.

use std::collections::HashMap;

use futures::future::try_join_all;
use slipway_spec::Digest;
use slipway_spec::llb::{Definition, pb};
use slipway_store::blocking;

use super::{Job, lock};
use crate::client::policy::{PolicyAnswer, PolicyQuestion};
use crate::device::Inventory;
use crate::error::{Cause, Result, SolveError};
use crate::graph::{self, Edge, Leave, encode};
use crate::policy::{self, Policy, PolicyError};
use crate::source::metadata::SourceMetadata;

/// How often a verifier is asked about one source.
const MAX_QUESTIONS: usize = 10;

impl Job {
    /// Loads a definition without solving it. Sources that a policy replaces are replaced first.
    ///
    /// # Errors
    /// When the definition is not well formed, or a policy denies a source.
    pub async fn load(&self, definition: &Definition) -> Result<Edge> {
        self.load_under(definition, &[]).await
    }

    /// As [`load`](Self::load), under further policies.
    ///
    /// # Errors
    /// As there.
    pub async fn load_under(&self, definition: &Definition, policies: &[Policy]) -> Result<Edge> {
        self.load_at(definition, policies, 0).await
    }

    /// Loads a definition that came out of others.
    pub(super) async fn load_at(
        &self,
        definition: &Definition,
        policies: &[Policy],
        depth: u32,
    ) -> Result<Edge> {
        let admitted = self.admit(definition, policies).await?;
        let definition = admitted.as_ref().unwrap_or(definition);
        let ops = definition.vertices()?;
        let devices = self.devices_for(&ops).await?;
        let leave = Leave { entitlements: &self.0.services.entitlements, devices: &devices };
        graph::load(definition, ops, &mut lock(&self.0.vertices), &leave, depth)
    }

    /// Looks which devices there are, if an operation asks for some.
    async fn devices_for(&self, ops: &[(Digest, pb::Op)]) -> Result<Inventory> {
        let asks = |op: &pb::Op| matches!(&op.op, Some(pb::op::Op::Exec(exec)) if !exec.cdi_devices.is_empty());
        if !ops.iter().any(|(_, op)| asks(op)) {
            return Ok(Inventory::default());
        }
        let devices = self.0.worker.devices.clone();
        Ok(blocking::run(move || Ok(devices.read())).await?)
    }

    /// Whether anything decides about sources.
    fn is_policed(&self, policies: &[Policy]) -> bool {
        let own = &self.0.services.policies;
        !policies.is_empty() || !own.rules.is_empty() || own.verifier.is_some()
    }

    /// Has policies decide about all sources of a definition; returns what they made of it, if anything.
    async fn admit(
        &self,
        definition: &Definition,
        policies: &[Policy],
    ) -> Result<Option<Definition>> {
        if !self.is_policed(policies) {
            return Ok(None);
        }
        let vertices = definition.vertices()?;
        let decided = try_join_all(vertices.iter().map(|(digest, op)| async move {
            let Some(pb::op::Op::Source(source)) = &op.op else { return Ok(None) };
            let mut source = source.clone();
            let changed = self.decide(&mut source, op.platform.as_ref(), policies).await;
            let changed = changed.map_err(|error| {
                prefixed("error evaluating the source policy", error)
                    .at(|| graph::blamed(definition, digest))
            })?;
            Ok::<_, SolveError>(changed.then_some(source))
        }))
        .await?;
        if decided.iter().all(Option::is_none) {
            return Ok(None);
        }
        rewrite(definition, vertices, decided).map(Some)
    }

    /// Has policies decide about a source that something is to be known of; returns whether it became another one.
    ///
    /// # Errors
    /// When a policy denies it, or a verifier cannot be asked.
    pub async fn admit_source(
        &self,
        source: &mut pb::SourceOp,
        platform: Option<&pb::Platform>,
        policies: &[Policy],
    ) -> Result<bool> {
        if !self.is_policed(policies) {
            return Ok(false);
        }
        let decided = self.decide(source, platform, policies).await;
        decided.map_err(|error| prefixed("could not resolve image due to policy", error))
    }

    async fn decide(
        &self,
        source: &mut pb::SourceOp,
        platform: Option<&pb::Platform>,
        policies: &[Policy],
    ) -> Result<bool> {
        let own = &self.0.services.policies;
        let mut changed = false;
        let mut questions = 0;
        loop {
            let rules = own.rules.iter().chain(policies);
            changed |= policy::evaluate(rules, source).map_err(refusal)?;
            let Some(verifier) = &own.verifier else { return Ok(changed) };
            let mut known = SourceMetadata::default();
            *source = loop {
                questions += 1;
                if questions > MAX_QUESTIONS {
                    return Err(Cause::Invalid("too many policy requests".into()).into());
                }
                let question = PolicyQuestion { platform, source, known: &known };
                match verifier.check(question).await? {
                    PolicyAnswer::Allow => return Ok(changed),
                    PolicyAnswer::Deny(reasons) => {
                        let message = format!(
                            "source {:?} not allowed by policy: action DENY",
                            source.identifier
                        );
                        return Err(Cause::Denied { message, reasons }.into());
                    }
                    PolicyAnswer::Convert(other) => break other,
                    PolicyAnswer::Ask(request) => {
                        if request.source != *source {
                            return Err(Cause::Invalid(format!(
                                "policy requested different source: {:?} != {:?}",
                                request.source.identifier, source.identifier
                            ))
                            .into());
                        }
                        let what = "error resolving source metadata from policy request";
                        known =
                            self.metadata(&request).await.map_err(|error| prefixed(what, error))?;
                    }
                }
            };
            changed = true;
        }
    }
}

fn refusal(error: PolicyError) -> SolveError {
    let message = error.to_string();
    match error {
        PolicyError::Denied(_) => Cause::Denied { message, reasons: vec![] }.into(),
        PolicyError::TooMany | PolicyError::Invalid(_) => Cause::Invalid(message).into(),
    }
}

/// Says what was tried; why a source was denied stays as it was said.
fn prefixed(what: &str, error: SolveError) -> SolveError {
    let message = format!("{what}: {error}");
    let cause = match &*error.cause {
        Cause::Denied { reasons, .. } => Cause::Denied { message, reasons: reasons.clone() },
        _ => Cause::Invalid(message),
    };
    SolveError { cause: cause.into(), ..error }
}

/// Puts sources in the place of others. Everything that depends on them gets another digest.
fn rewrite(
    definition: &Definition,
    vertices: Vec<(Digest, pb::Op)>,
    decided: Vec<Option<pb::SourceOp>>,
) -> Result<Definition> {
    let mut renamed: HashMap<String, Digest> = HashMap::new();
    let mut rewritten =
        Definition { ops: vec![], metadata: definition.metadata.clone(), source: None };
    let rename = |op: &mut pb::Op, renamed: &HashMap<String, Digest>| {
        let mut any = false;
        for input in &mut op.inputs {
            if let Some(digest) = renamed.get(&input.digest) {
                input.digest = digest.to_string();
                any = true;
            }
        }
        any
    };
    for (((digest, mut op), source), bytes) in
        vertices.into_iter().zip(decided).zip(&definition.ops)
    {
        let mut any = rename(&mut op, &renamed);
        if let Some(source) = source {
            op.op = Some(pb::op::Op::Source(source));
            any = true;
        }
        if !any {
            rewritten.ops.push(bytes.clone());
            continue;
        }
        let bytes = encode(&op);
        let new = Digest::of(&bytes);
        if let Some(metadata) = rewritten.metadata.remove(&digest) {
            rewritten.metadata.insert(new.clone(), metadata);
        }
        renamed.insert(digest.to_string(), new);
        rewritten.ops.push(bytes);
    }
    let (head, index) = definition.head()?;
    let head = renamed.get(&head.to_string()).unwrap_or(&head).to_string();
    let index = i64::try_from(index).unwrap_or(i64::MAX);
    let last = pb::Op { inputs: vec![pb::Input { digest: head, index }], ..pb::Op::default() };
    rewritten.ops.push(encode(&last));
    rewritten.source = definition.source.clone().map(|mut source| {
        source.locations = source
            .locations
            .into_iter()
            .map(|(digest, locations)| {
                let digest = renamed.get(&digest).map_or(digest, ToString::to_string);
                (digest, locations)
            })
            .collect();
        source
    });
    Ok(rewritten)
}
