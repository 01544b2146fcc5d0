//! Everything a build may use of its client beside folders, and what it was allowed.

use std::sync::Arc;

use slipway_store::registry::web::{Web, WebOptions};

use super::content::{LayoutStore, NoLayouts, NoUploads, Uploads};
use super::policy::SourcePolicies;
use super::secret::{NoSecrets, SecretProvider};
use super::ssh::{NoAgents, SshAgents};
use crate::error::Cause;
use crate::source::git::GitOptions;

/// What the user allowed a build beyond the usual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entitlements {
    /// Steps that ask for the host's network by name.
    pub network_host: bool,
    /// Steps without a sandbox.
    pub security_insecure: bool,
}

impl Entitlements {
    /// Refuses what the user did not allow.
    pub(crate) fn check(self, insecure: bool, host_network: bool) -> Result<(), Cause> {
        for (asked, allowed, name) in [
            (insecure, self.security_insecure, "security.insecure"),
            (host_network, self.network_host, "network.host"),
        ] {
            if asked && !allowed {
                let message = format!("{name} is not allowed; allow it with --allow {name}");
                return Err(Cause::Invalid(message));
            }
        }
        Ok(())
    }
}

impl Default for Entitlements {
    /// Steps have the host's network anyway, so asking for it by name is allowed; nothing else is.
    fn default() -> Self {
        Self { network_host: true, security_insecure: false }
    }
}

/// What a build may use beside its client's folders.
#[derive(Clone, Debug)]
pub struct Services {
    /// Secrets.
    pub secrets: Arc<dyn SecretProvider>,
    /// SSH agents.
    pub ssh: Arc<dyn SshAgents>,
    /// Image layouts.
    pub layouts: Arc<dyn LayoutStore>,
    /// Files that the client sends.
    pub uploads: Arc<dyn Uploads>,
    /// What was allowed.
    pub entitlements: Entitlements,
    /// Whether somebody may look into what a failed process leaves behind.
    pub keep_failed: bool,
    /// What decides about sources.
    pub policies: SourcePolicies,
    /// Fetches what sources with a URL name.
    pub web: Web,
    /// How repositories are fetched.
    pub git: GitOptions,
}

impl Default for Services {
    fn default() -> Self {
        Self {
            secrets: Arc::new(NoSecrets),
            ssh: Arc::new(NoAgents),
            layouts: Arc::new(NoLayouts),
            uploads: Arc::new(NoUploads),
            entitlements: Entitlements::default(),
            keep_failed: false,
            policies: SourcePolicies::default(),
            web: Web::new(WebOptions::default()),
            git: GitOptions::default(),
        }
    }
}
