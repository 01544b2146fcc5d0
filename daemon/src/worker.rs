//! What clients are told of the machine that builds.

use std::collections::BTreeMap;
use std::path::Path;

use slipway_engine::solver::emulation::Emulation;
use slipway_spec::llb::pb;
use slipway_spec::wire::worker::{BuildkitVersion, WorkerRecord};

/// The prefix of labels.
const LABEL: &str = "org.mobyproject.buildkit.worker.";

/// The one worker of a daemon.
#[derive(Clone, Debug)]
pub struct WorkerInfo {
    id: String,
    labels: BTreeMap<String, String>,
}

/// Returns which interface this daemon speaks, and its own version.
pub fn version() -> BuildkitVersion {
    BuildkitVersion {
        package: "slipway".into(),
        version: concat!("v", env!("CARGO_PKG_VERSION")).into(),
        revision: String::new(),
        dockerfile_version: String::new(),
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
                let id = crate::new_id();
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
        Ok(Self { id, labels: all })
    }

    /// Describes the worker, with the platforms that it can build for now.
    pub fn record(&self, emulation: &Emulation) -> WorkerRecord {
        let platforms: Vec<pb::Platform> =
            emulation.platforms().iter().map(pb::Platform::from).collect();
        WorkerRecord {
            id: self.id.clone(),
            labels: self.labels.clone(),
            platforms,
            gc_policy: vec![],
            buildkit_version: Some(version()),
            cdi_devices: vec![],
        }
    }
}
