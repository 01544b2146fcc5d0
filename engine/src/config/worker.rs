//! `[worker.oci]`: what runs steps, and how much disk its cache may take.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::document::Section;
use super::error::ConfigError;
use super::size::DiskSpace;

/// Settings of the worker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerConfig {
    /// Whether there is to be one; `None` leaves it to the program.
    pub enabled: Option<bool>,
    /// Labels that clients see.
    pub labels: BTreeMap<String, String>,
    /// Platforms to offer; empty means those that can run here.
    pub platforms: Vec<String>,
    /// The kind of snapshots; `None` and `auto` leave it to the program.
    pub snapshotter: Option<String>,
    /// Whether users other than root are to be served.
    pub rootless: bool,
    /// Whether steps see the processes of the machine.
    pub no_process_sandbox: bool,
    /// The network of steps.
    pub network_mode: NetworkMode,
    /// The cgroup that steps go below.
    pub default_cgroup_parent: Option<String>,
    /// The profile of AppArmor that steps run under.
    pub apparmor_profile: Option<String>,
    /// Whether steps are given labels of SELinux.
    pub selinux: bool,
    /// Steps that may run at the same time; `None` is no limit.
    pub max_parallelism: Option<usize>,
    /// When the cache is cleaned up.
    pub gc: GcConfig,
}

/// The network of steps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NetworkMode {
    /// What the program thinks best.
    #[default]
    Auto,
    /// The machine's.
    Host,
    /// One of its own on a bridge.
    Bridge,
    /// One that plug-ins set up.
    Cni,
}

impl NetworkMode {
    /// Reads a mode as it is written.
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "" | "auto" => Self::Auto,
            "host" => Self::Host,
            "bridge" => Self::Bridge,
            "cni" => Self::Cni,
            _ => return None,
        })
    }

    /// Returns the mode as it is written.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Host => "host",
            Self::Bridge => "bridge",
            Self::Cni => "cni",
        }
    }
}

/// When the cache is cleaned up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GcConfig {
    /// Whether it is at all; `None` is yes.
    pub enabled: Option<bool>,
    /// What a clean-up leaves at least.
    pub reserved_space: Option<DiskSpace>,
    /// What the cache may take at most.
    pub max_used_space: Option<DiskSpace>,
    /// What is to stay free on the file system.
    pub min_free_space: Option<DiskSpace>,
    /// Rules to apply in order, instead of the usual ones.
    pub policies: Vec<GcPolicy>,
}

/// One rule of a clean-up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GcPolicy {
    /// Whether internal records may go too.
    pub all: bool,
    /// Which records may go; any of these.
    pub filters: Vec<String>,
    /// Only records that were not used for this long.
    pub keep_duration: Option<Duration>,
    /// What the rule leaves at least.
    pub reserved_space: Option<DiskSpace>,
    /// What may stay at most.
    pub max_used_space: Option<DiskSpace>,
    /// What is to be free afterwards.
    pub min_free_space: Option<DiskSpace>,
}

/// A rule with its amounts in bytes; 0 is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GcRule {
    /// Whether internal records may go too.
    pub all: bool,
    /// Which records may go; any of these.
    pub filters: Vec<String>,
    /// Only records that were not used for this long.
    pub keep_duration: Duration,
    /// What the rule leaves at least.
    pub reserved_bytes: u64,
    /// What may stay at most.
    pub max_used_bytes: u64,
    /// What is to be free afterwards.
    pub min_free_bytes: u64,
}

/// What the first of the usual rules is about, any of it: what is easily had again.
const EASY_TYPES: [&str; 3] =
    ["type==source.local", "type==exec.cachemount", "type==source.git.checkout"];
const GIGABYTE: u64 = 1_000_000_000;

impl GcConfig {
    /// Returns the rules on a file system of this size, in the order they apply; none when there is no clean-up.
    pub fn rules(&self, disk_bytes: u64) -> Vec<GcRule> {
        if self.enabled == Some(false) {
            return vec![];
        }
        let bytes = |space: Option<DiskSpace>| space.map_or(0, |space| space.bytes_of(disk_bytes));
        if !self.policies.is_empty() {
            let rule = |policy: &GcPolicy| GcRule {
                all: policy.all,
                filters: policy.filters.clone(),
                keep_duration: policy.keep_duration.unwrap_or_default(),
                reserved_bytes: bytes(policy.reserved_space),
                max_used_bytes: bytes(policy.max_used_space),
                min_free_bytes: bytes(policy.min_free_space),
            };
            return self.policies.iter().map(rule).collect();
        }
        let is_unset = self.reserved_space.is_none()
            && self.max_used_space.is_none()
            && self.min_free_space.is_none();
        let part = |percent| DiskSpace::Percent(percent).bytes_of(disk_bytes);
        let cap = if is_unset {
            GcRule {
                reserved_bytes: part(10).min(10 * GIGABYTE),
                max_used_bytes: part(80).min(100 * GIGABYTE),
                min_free_bytes: part(20),
                ..GcRule::default()
            }
        } else {
            GcRule {
                reserved_bytes: bytes(self.reserved_space),
                max_used_bytes: bytes(self.max_used_space),
                min_free_bytes: bytes(self.min_free_space),
                ..GcRule::default()
            }
        };
        let day = Duration::from_secs(24 * 60 * 60);
        vec![
            GcRule {
                filters: EASY_TYPES.map(str::to_owned).into(),
                keep_duration: 2 * day,
                max_used_bytes: 512_000_000,
                ..GcRule::default()
            },
            GcRule { keep_duration: 60 * day, ..cap.clone() },
            cap.clone(),
            GcRule { all: true, ..cap },
        ]
    }
}

impl WorkerConfig {
    pub(super) fn read(mut section: Section<'_, '_>) -> Result<Self, ConfigError> {
        let mut labels = BTreeMap::new();
        if let Some(section) = section.section("labels")? {
            for (key, value) in section.into_entries() {
                labels.insert(key, value.into_text()?);
            }
        }
        let network_mode = match section.take("networkMode") {
            None => NetworkMode::Auto,
            Some(value) => {
                let error = value.error("must be auto, host, bridge or cni");
                NetworkMode::parse(&value.into_text()?).ok_or(error)?
            }
        };
        let worker = Self {
            enabled: section.boolean("enabled")?,
            labels,
            platforms: section.texts("platforms")?.unwrap_or_default(),
            snapshotter: section.text("snapshotter")?,
            rootless: section.boolean("rootless")?.unwrap_or_default(),
            no_process_sandbox: section.boolean("noProcessSandbox")?.unwrap_or_default(),
            network_mode,
            default_cgroup_parent: section.text("defaultCgroupParent")?,
            apparmor_profile: section.text("apparmor-profile")?,
            selinux: section.boolean("selinux")?.unwrap_or_default(),
            max_parallelism: section
                .number::<usize>("max-parallelism")?
                .filter(|parallelism| *parallelism > 0),
            gc: GcConfig::read(&mut section)?,
        };
        section.ignore(&[
            "cniConfigPath",
            "cniBinaryPath",
            "cniPoolSize",
            "bridgeName",
            "bridgeSubnet",
            "binary",
            "proxySnapshotterPath",
            "isolateCgroups",
            "stargzSnapshotter",
        ]);
        section.finish();
        Ok(worker)
    }
}

impl GcConfig {
    fn read(section: &mut Section<'_, '_>) -> Result<Self, ConfigError> {
        let enabled = section.boolean("gc")?;
        // The older name of the one amount there was.
        let kept = section.disk_space("gckeepstorage")?;
        let mut gc = Self {
            enabled,
            reserved_space: section.disk_space("reservedSpace")?,
            max_used_space: section.disk_space("maxUsedSpace")?,
            min_free_space: section.disk_space("minFreeSpace")?,
            policies: vec![],
        };
        if gc.reserved_space.is_none() && gc.max_used_space.is_none() && gc.min_free_space.is_none()
        {
            gc.reserved_space = kept;
        }
        for mut section in section.sections("gcpolicy")? {
            let kept = section.disk_space("keepBytes")?;
            let mut policy = GcPolicy {
                all: section.boolean("all")?.unwrap_or_default(),
                filters: section.texts("filters")?.unwrap_or_default(),
                keep_duration: section.duration("keepDuration")?,
                reserved_space: section.disk_space("reservedSpace")?,
                max_used_space: section.disk_space("maxUsedSpace")?,
                min_free_space: section.disk_space("minFreeSpace")?,
            };
            if policy.reserved_space.is_none()
                && policy.max_used_space.is_none()
                && policy.min_free_space.is_none()
            {
                policy.reserved_space = kept;
            }
            section.finish();
            gc.policies.push(policy);
        }
        Ok(gc)
    }
}

/// `[worker.containerd]`: there is no such worker; it can only be asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerdConfig {
    /// Whether it was asked for.
    pub enabled: Option<bool>,
    /// Where containerd would listen.
    pub address: Option<PathBuf>,
}

impl ContainerdConfig {
    pub(super) fn read(mut section: Section<'_, '_>) -> Result<Self, ConfigError> {
        // What else stands here is for somebody else.
        Ok(Self { enabled: section.boolean("enabled")?, address: section.path("address")? })
    }
}
