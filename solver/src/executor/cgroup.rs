//! Control groups for single steps, in the one hierarchy of version 2 or the several of version 1.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::limits::Limits;

/// The folder, below the parent that was asked for, in which every step has a group of its own.
const FOLDER: &str = "slipway";

/// What a step may use; absent is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupLimits {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// Bytes of memory and swap together; `-1` is unlimited swap.
    pub memory_swap: Option<i64>,
    /// The share of the processors where there is competition, as version 1 counts it: 1024 is usual.
    pub cpu_shares: Option<u64>,
    /// The period of the quota, in microseconds.
    pub cpu_period: Option<u64>,
    /// Processor time within a period, in microseconds.
    pub cpu_quota: Option<i64>,
    /// Which processors, as `0-3,5`.
    pub cpuset_cpus: Option<String>,
    /// Which memory nodes.
    pub cpuset_mems: Option<String>,
}

impl GroupLimits {
    /// Whether there is no limit at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Why there is no group with these limits.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The kernel or the machine's set-up lacks what a limit needs.
    #[error(
        "cannot limit {what}: the control group controller {controller:?} is not available here; mount or enable it, or \
         build without this limit"
    )]
    Missing {
        /// What was to be limited.
        what: &'static str,
        /// The controller that would.
        controller: &'static str,
    },
    /// There is no hierarchy at all.
    #[error(
        "control groups are not mounted here, so neither a parent group nor a limit can be used"
    )]
    NotMounted,
    /// The parent's name.
    #[error("the control group parent {0:?} must be a path without \"..\"")]
    Parent(String),
    /// A value that the kernel does not take.
    #[error("control group: cannot set {file} to {value:?}: {source}")]
    Value {
        /// The file.
        file: String,
        /// What was written.
        value: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A folder of a hierarchy.
    #[error("control group {path:?}: cannot {verb} it: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What was tried.
        verb: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Where hierarchies are mounted, and with which controllers.
#[derive(Clone, Debug, Default)]
pub struct Hierarchies {
    /// Version 1: mount point and controllers.
    old: Vec<(PathBuf, Vec<String>)>,
    /// Version 2: mount point.
    unified: Option<PathBuf>,
}

impl Hierarchies {
    /// Looks at what is mounted.
    ///
    /// # Errors
    /// When there is no hierarchy.
    pub fn find() -> Result<Self, CgroupError> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let found = Self::parse(&table);
        if found.old.is_empty() && found.unified.is_none() {
            return Err(CgroupError::NotMounted);
        }
        Ok(found)
    }

    fn parse(table: &str) -> Self {
        let mut found = Self::default();
        for line in table.lines() {
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let Some(place) = left.split(' ').nth(4) else { continue };
            let mut right = right.split(' ');
            let (kind, options) = (right.next(), right.nth(1).unwrap_or_default());
            match kind {
                Some("cgroup2") => {
                    found.unified.get_or_insert_with(|| place.into());
                }
                Some("cgroup") => {
                    let controllers = options
                        .split(',')
                        .filter(|option| !matches!(*option, "rw" | "ro"))
                        .map(Into::into)
                        .collect();
                    found.old.push((place.into(), controllers));
                }
                _ => {}
            }
        }
        found
    }
}

/// The groups of one step. Dropping it removes them; the step has ended by then.
#[derive(Debug, Default)]
pub struct ControlGroups {
    folders: Vec<PathBuf>,
}

impl ControlGroups {
    /// Makes groups below `parent`, with limits.
    ///
    /// # Errors
    /// When a controller is missing or the kernel refuses a value; nothing is left behind then.
    pub fn create(
        hierarchies: &Hierarchies,
        parent: &str,
        limits: &GroupLimits,
    ) -> Result<Self, CgroupError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        if parent.split('/').any(|part| part == "..") || parent.contains('\0') {
            return Err(CgroupError::Parent(parent.into()));
        }
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = Path::new(parent.trim_start_matches('/'))
            .join(FOLDER)
            .join(format!("{}-{number}", std::process::id()));
        let mut groups = Self::default();
        let mut settings = settings(limits);
        for (place, controllers) in &hierarchies.old {
            let folder = groups.make(place, &name)?;
            if controllers.iter().any(|controller| controller == "cpuset") {
                inherit_cpuset(place, &name)?;
            }
            let (here, elsewhere): (Vec<_>, Vec<_>) = settings
                .into_iter()
                .partition(|setting| controllers.iter().any(|name| name == setting.controller));
            settings = elsewhere;
            for setting in here {
                set(&folder, setting.old)?;
            }
        }
        if let Some(place) = &hierarchies.unified {
            let wanted: Vec<&str> = settings.iter().map(|setting| setting.controller).collect();
            let offered = words(&place.join("cgroup.controllers"));
            if let Some(missing) = settings.iter().find(|s| !offered.contains(s.controller)) {
                return Err(CgroupError::Missing {
                    what: missing.what,
                    controller: missing.controller,
                });
            }
            let folder = groups.make(place, &name)?;
            delegate(place, &name, &wanted)?;
            for setting in std::mem::take(&mut settings) {
                set(&folder, setting.new)?;
            }
        }
        if let Some(left) = settings.first() {
            return Err(CgroupError::Missing { what: left.what, controller: left.controller });
        }
        Ok(groups)
    }

    /// Returns what the step needs to join the groups.
    pub fn limits(&self) -> Limits {
        Limits { resources: vec![], cgroups: self.folders.clone() }
    }

    fn make(&mut self, place: &Path, name: &Path) -> Result<PathBuf, CgroupError> {
        let folder = place.join(name);
        fs::create_dir_all(&folder).map_err(|source| CgroupError::Folder {
            path: folder.clone(),
            verb: "create",
            source,
        })?;
        self.folders.push(folder.clone());
        Ok(folder)
    }
}

impl Drop for ControlGroups {
    fn drop(&mut self) {
        for folder in &self.folders {
            // The last process is gone for the kernel a moment after it is for us.
            for _ in 0..20 {
                match fs::remove_dir(folder) {
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    _ => break,
                }
            }
        }
    }
}

/// One limit, as files of both versions.
struct Setting {
    what: &'static str,
    controller: &'static str,
    old: Vec<(&'static str, String)>,
    new: Vec<(&'static str, String)>,
}

fn settings(limits: &GroupLimits) -> Vec<Setting> {
    let mut settings = vec![];
    if let Some(memory) = limits.memory {
        settings.push(Setting {
            what: "memory",
            controller: "memory",
            old: vec![("memory.limit_in_bytes", memory.to_string())],
            new: vec![("memory.max", memory.to_string())],
        });
    }
    if let Some(swap) = limits.memory_swap {
        let memory = limits.memory.unwrap_or(0);
        // Version 1 counts memory and swap together, version 2 swap alone.
        let alone = u64::try_from(swap)
            .map_or_else(|_| "max".into(), |both| both.saturating_sub(memory).to_string());
        settings.push(Setting {
            what: "swap",
            controller: "memory",
            old: vec![("memory.memsw.limit_in_bytes", swap.to_string())],
            new: vec![("memory.swap.max", alone)],
        });
    }
    if let Some(shares) = limits.cpu_shares {
        // From 2..262144 to 1..10000, as container runtimes agree on.
        let weight = 1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142;
        settings.push(Setting {
            what: "the share of the processors",
            controller: "cpu",
            old: vec![("cpu.shares", shares.to_string())],
            new: vec![("cpu.weight", weight.to_string())],
        });
    }
    if limits.cpu_period.is_some() || limits.cpu_quota.is_some() {
        let mut old = vec![];
        if let Some(period) = limits.cpu_period {
            old.push(("cpu.cfs_period_us", period.to_string()));
        }
        if let Some(quota) = limits.cpu_quota {
            old.push(("cpu.cfs_quota_us", quota.to_string()));
        }
        let quota = limits.cpu_quota.filter(|quota| *quota > 0);
        let quota = quota.map_or_else(|| "max".into(), |quota| quota.to_string());
        let period = limits.cpu_period.unwrap_or(100_000);
        settings.push(Setting {
            what: "processor time",
            controller: "cpu",
            old,
            new: vec![("cpu.max", format!("{quota} {period}"))],
        });
    }
    for (what, file, value) in [
        ("the processors", "cpuset.cpus", &limits.cpuset_cpus),
        ("the memory nodes", "cpuset.mems", &limits.cpuset_mems),
    ] {
        if let Some(value) = value {
            let files = vec![(file, value.clone())];
            settings.push(Setting { what, controller: "cpuset", old: files.clone(), new: files });
        }
    }
    settings
}

fn set(folder: &Path, files: Vec<(&'static str, String)>) -> Result<(), CgroupError> {
    for (file, value) in files {
        write(&folder.join(file), &value)?;
    }
    Ok(())
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    // Never creates: a file that is not there means a controller that is not.
    let written = fs::File::options()
        .write(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
    written.map_err(|source| CgroupError::Value {
        file: path.to_string_lossy().into_owned(),
        value: value.into(),
        source,
    })
}

fn words(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The folders from the one below `place` to `place/name`, outermost first.
fn steps(place: &Path, name: &Path) -> Vec<PathBuf> {
    let mut at = place.to_path_buf();
    name.components()
        .map(|part| {
            at.push(part);
            at.clone()
        })
        .collect()
}

/// A new group of version 1 has no processors and no memory, and so takes no process.
fn inherit_cpuset(place: &Path, name: &Path) -> Result<(), CgroupError> {
    let mut parent = place.to_path_buf();
    for folder in steps(place, name) {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            if words(&folder.join(file)).trim().is_empty() {
                write(&folder.join(file), words(&parent.join(file)).trim())?;
            }
        }
        parent = folder;
    }
    Ok(())
}

/// A group of version 2 has the controllers that its parent hands down.
fn delegate(place: &Path, name: &Path, controllers: &[&str]) -> Result<(), CgroupError> {
    if controllers.is_empty() {
        return Ok(());
    }
    let mut wanted: Vec<String> = controllers.iter().map(|name| format!("+{name}")).collect();
    wanted.dedup();
    let mut parent = place.to_path_buf();
    for folder in steps(place, name) {
        write(&parent.join("cgroup.subtree_control"), &wanted.join(" "))?;
        parent = folder;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_read_from_the_mount_table() {
        let found = Hierarchies::parse(
            "30 23 0:26 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
             31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
             32 23 0:28 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n\
             33 23 0:29 / /tmp rw - tmpfs tmpfs rw\n",
        );
        assert_eq!(found.unified.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
        assert_eq!(found.old[1].1, ["cpu", "cpuacct"]);
    }

    /// A folder that looks like a hierarchy of version 2 once its files are there.
    fn unified(controllers: &str, files: &[&str]) -> (tempfile::TempDir, Hierarchies) {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path();
        fs::write(place.join("cgroup.controllers"), controllers).unwrap();
        let leaf = format!("p/{FOLDER}");
        fs::create_dir_all(place.join(&leaf)).unwrap();
        for level in ["", "p", leaf.as_str()] {
            fs::write(place.join(level).join("cgroup.subtree_control"), "").unwrap();
        }
        // The kernel makes these; here they must be there before the group is.
        for number in 0..8 {
            let group = place.join(&leaf).join(format!("{}-{number}", std::process::id()));
            fs::create_dir(&group).unwrap();
            for file in files {
                fs::write(group.join(file), "").unwrap();
            }
        }
        let hierarchies = Hierarchies { old: vec![], unified: Some(place.into()) };
        (folder, hierarchies)
    }

    #[test]
    fn version_2_gets_its_own_files_and_delegation() {
        let files = ["memory.max", "memory.swap.max", "cpu.weight", "cpu.max"];
        let (folder, hierarchies) = unified("cpu memory", &files);
        let limits = GroupLimits {
            memory: Some(1000),
            memory_swap: Some(1500),
            cpu_shares: Some(1024),
            cpu_quota: Some(50_000),
            ..GroupLimits::default()
        };
        let groups = ControlGroups::create(&hierarchies, "/p", &limits).unwrap();
        let read = |file: &str| fs::read_to_string(groups.folders[0].join(file)).unwrap();
        assert_eq!(files.map(read), ["1000", "500", "39", "50000 100000"].map(String::from));
        let handed = fs::read_to_string(folder.path().join("p/cgroup.subtree_control")).unwrap();
        assert_eq!(handed, "+memory +cpu");
    }

    #[test]
    fn a_missing_controller_is_named() {
        let (_folder, hierarchies) = unified("memory", &[]);
        let limits = GroupLimits { cpuset_cpus: Some("0".into()), ..GroupLimits::default() };
        let error = ControlGroups::create(&hierarchies, "p", &limits).unwrap_err();
        assert!(error.to_string().contains("\"cpuset\""), "{error}");
        let none = Hierarchies { old: vec![], unified: None };
        assert!(ControlGroups::create(&none, "", &limits).is_err());
        let escape = ControlGroups::create(&hierarchies, "../x", &limits).unwrap_err();
        assert!(matches!(escape, CgroupError::Parent(_)));
    }
}
