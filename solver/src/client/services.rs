//! Everything a build may use of its client beside folders, and what it was allowed.

use std::collections::BTreeMap;
use std::sync::Arc;

use slipway_store::registry::web::{Web, WebOptions};

use super::content::{LayoutStore, NoLayouts, NoUploads, Uploads};
use super::policy::SourcePolicies;
use super::secret::{NoSecrets, SecretProvider};
use super::ssh::{NoAgents, SshAgents};
use crate::error::Cause;
use crate::source::git::GitOptions;

/// What downloads of a build are asked for as: servers that let BuildKit in by its name mean this program, too. The version is
/// that whose sources it follows.
const USER_AGENT: &str =
    concat!("slipway/", env!("CARGO_PKG_VERSION"), " (compatible; buildkit/v0.32)");

/// What the user allowed a build beyond the usual.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entitlements {
    /// Steps that ask for the host's network by name.
    pub network_host: bool,
    /// Steps without a sandbox.
    pub security_insecure: bool,
    /// Devices.
    pub devices: DeviceGrants,
}

/// The devices that the user allowed a build, beside those that need no leave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceGrants {
    /// All there are.
    pub all: bool,
    /// Single ones, kinds and classes, by the names that steps call them; and what each stands for, where that is not
    /// what the name says.
    pub named: BTreeMap<String, Option<String>>,
}

impl DeviceGrants {
    /// Adds what was allowed: nothing is all, else a name as steps have it, or `NAME,alias=ANOTHER`.
    ///
    /// # Errors
    /// When there is more in it.
    pub fn add(&mut self, text: &str) -> Result<(), String> {
        let mut fields = text.split(',');
        let name = fields.next().unwrap_or_default();
        if text.is_empty() {
            self.all = true;
            return Ok(());
        }
        let mut alias = None;
        for field in fields {
            match field.split_once('=') {
                Some(("alias", value)) => alias = Some(value).filter(|alias| !alias.is_empty()),
                Some((key, _)) => return Err(format!("unknown device config key {key:?}")),
                None => return Err(format!("invalid device config {field:?}")),
            }
        }
        match alias {
            Some(alias) => self.named.insert(alias.into(), Some(name.into())),
            None => self.named.insert(name.into(), None),
        };
        Ok(())
    }
}

impl Entitlements {
    /// Refuses what the user did not allow.
    pub(crate) fn check(&self, insecure: bool, host_network: bool) -> Result<(), Cause> {
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
        Self { network_host: true, security_insecure: false, devices: DeviceGrants::default() }
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
            web: Web::new(WebOptions { user_agent: USER_AGENT.into(), ..WebOptions::default() }),
            git: GitOptions::default(),
        }
    }
}
