//! What clients are told of the machine that builds.

use std::collections::BTreeMap;
use std::path::Path;

use slipway_engine::config::GcRule;
use slipway_engine::frontend::dockerfile::LANGUAGE_VERSION;
use slipway_engine::solver::device::{DeviceInfo, Inventory};
use slipway_engine::solver::emulation::Emulation;
use slipway_spec::llb::pb;
use slipway_spec::wire::worker::{BuildkitVersion, CdiDevice, GcPolicy, WorkerRecord};

/// The prefix of labels.
const LABEL: &str = "org.mobyproject.buildkit.worker.";

/// The one worker of a daemon.
#[derive(Clone, Debug)]
pub struct WorkerInfo {
    id: String,
    labels: BTreeMap<String, String>,
    policies: Vec<GcPolicy>,
}

/// Returns which interface this daemon speaks, and its own version.
pub fn version() -> BuildkitVersion {
    BuildkitVersion {
        package: "slipway".into(),
        version: concat!("v", env!("CARGO_PKG_VERSION")).into(),
        revision: String::new(),
        dockerfile_version: LANGUAGE_VERSION.into(),
    }
}

impl WorkerInfo {
    /// Reads the worker's id from a state folder, or makes one.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn open(root: &Path, labels: BTreeMap<String, String>) -> std::io::Result<Self> {
        let path = root.join("workerid");
        let id = match std::fs::read_to_string(&path) {
            Ok(id) if !id.trim().is_empty() => id.trim().to_owned(),
            _ => {
                let id = slipway_engine::id::new_id();
                std::fs::write(&path, &id)?;
                id
            }
        };
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let mut all: BTreeMap<String, String> = [
            ("executor", "oci"),
            ("snapshotter", "overlayfs"),
            ("hostname", host.as_str()),
            ("network", "host"),
            ("oci.process-mode", "sandbox"),
            ("selinux.enabled", "false"),
        ]
        .into_iter()
        .map(|(key, value)| (format!("{LABEL}{key}"), value.to_owned()))
        .collect();
        all.extend(labels);
        Ok(Self { id, labels: all, policies: vec![] })
    }

    /// Tells clients by which rules the cache is cleaned up.
    #[must_use]
    pub fn with_rules(mut self, rules: &[GcRule]) -> Self {
        let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let policy = |rule: &GcRule| GcPolicy {
            all: rule.all,
            keep_duration: i64::try_from(rule.keep_duration.as_nanos()).unwrap_or(i64::MAX),
            filters: rule.filters.clone(),
            reserved_space: bytes(rule.reserved_bytes),
            max_used_space: bytes(rule.max_used_bytes),
            min_free_space: bytes(rule.min_free_bytes),
        };
        self.policies = rules.iter().map(policy).collect();
        self
    }

    /// Describes the worker, with the platforms that it can build for now.
    pub fn record(&self, emulation: &Emulation) -> WorkerRecord {
        let platforms: Vec<pb::Platform> =
            emulation.platforms().iter().map(pb::Platform::from).collect();
        WorkerRecord {
            id: self.id.clone(),
            labels: self.labels.clone(),
            platforms,
            gc_policy: self.policies.clone(),
            buildkit_version: Some(version()),
            // Only who asks for the workers of a daemon is told of them.
            cdi_devices: vec![],
        }
    }
}

/// Describes the devices that steps may ask for.
pub fn devices(inventory: &Inventory) -> Vec<CdiDevice> {
    let device = |info: &DeviceInfo| CdiDevice {
        name: info.name.clone(),
        auto_allow: info.auto_allow,
        annotations: info.annotations.clone().into_iter().collect(),
        on_demand: false,
    };
    inventory.devices().map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_engine::solver::device::{DeviceOptions, Devices};

    #[test]
    fn devices_are_shown_with_what_is_said_of_them() {
        let folder = tempfile::tempdir().unwrap();
        let spec = "cdiVersion: 0.6.0\nkind: v.com/c\nannotations: {a: b}\ndevices:\n\
                    - name: x\n  containerEdits: {env: [A=1]}\n";
        std::fs::write(folder.path().join("v.yaml"), spec).unwrap();
        let folders = vec![folder.path().into()];
        let options = DeviceOptions { folders, auto_allowed: vec!["v.com/c".into()] };
        let expected = CdiDevice {
            name: "v.com/c=x".into(),
            auto_allow: true,
            annotations: [("a".into(), "b".into())].into(),
            on_demand: false,
        };
        assert_eq!(devices(&Devices::new(options).read()), [expected]);
        assert_eq!(devices(&Devices::none().read()), []);
    }
}
