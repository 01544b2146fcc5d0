//! Who decides about sources: rules, and a verifier that is asked about each.

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use slipway_spec::llb::pb;
use slipway_store::Error;

use crate::policy::Policy;
use crate::source::metadata::{MetadataRequest, SourceMetadata};

/// What decides about the sources of a build. Without anything all of them pass.
#[derive(Clone, Debug, Default)]
pub struct SourcePolicies {
    /// Rules, in order.
    pub rules: Vec<Policy>,
    /// Who is asked about what the rules let pass.
    pub verifier: Option<Arc<dyn PolicyVerifier>>,
}

/// What a verifier is asked.
#[derive(Clone, Debug)]
pub struct PolicyQuestion<'a> {
    /// The platform of the step that the source is.
    pub platform: Option<&'a pb::Platform>,
    /// The source.
    pub source: &'a pb::SourceOp,
    /// What the verifier asked to know of it before.
    pub known: &'a SourceMetadata,
}

/// What a verifier says.
#[derive(Clone, Debug)]
pub enum PolicyAnswer {
    /// The source may be used.
    Allow,
    /// It may not; the messages say why.
    Deny(Vec<String>),
    /// Another one is to be used in its place.
    Convert(pb::SourceOp),
    /// More must be known of it.
    Ask(Box<MetadataRequest>),
}

/// Decides about one source after the other.
#[async_trait]
pub trait PolicyVerifier: Debug + Send + Sync {
    /// Decides about a source, or asks for more: then it is asked again, with that.
    async fn check(&self, question: PolicyQuestion<'_>) -> Result<PolicyAnswer, Error>;
}
