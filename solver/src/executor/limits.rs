//! What a step may use of the machine: resource limits of its processes, and the control groups it runs in.

use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};
use serde::{Deserialize, Serialize};

use super::protocol::{During, Failure};
use super::sys;

/// Limits that hold from before the command starts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Limits of each process.
    pub resources: Vec<ResourceLimit>,
    /// The folders of the control groups that the step joins, one for each hierarchy.
    pub cgroups: Vec<PathBuf>,
}

/// One limit, as `ulimit` and `setrlimit` know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceLimit {
    name: String,
    soft: Option<u64>,
    hard: Option<u64>,
}

impl ResourceLimit {
    /// Makes a limit by its name, such as `nofile`; `None` is no limit.
    ///
    /// # Errors
    /// When there is no such limit, or the soft one is above the hard one.
    pub fn new(name: &str, soft: Option<u64>, hard: Option<u64>) -> Result<Self, String> {
        if resource(name).is_none() {
            return Err(format!(
                "there is no resource limit {name:?}; there are {}",
                RESOURCES.map(|(name, _)| name).join(", ")
            ));
        }
        if soft.unwrap_or(u64::MAX) > hard.unwrap_or(u64::MAX) {
            return Err(format!("the resource limit {name}: the soft limit is above the hard one"));
        }
        Ok(Self { name: name.into(), soft, hard })
    }
}

const RESOURCES: [(&str, Resource); 16] = [
    ("as", Resource::As),
    ("core", Resource::Core),
    ("cpu", Resource::Cpu),
    ("data", Resource::Data),
    ("fsize", Resource::Fsize),
    ("locks", Resource::Locks),
    ("memlock", Resource::Memlock),
    ("msgqueue", Resource::Msgqueue),
    ("nice", Resource::Nice),
    ("nofile", Resource::Nofile),
    ("nproc", Resource::Nproc),
    ("rss", Resource::Rss),
    ("rtprio", Resource::Rtprio),
    ("rttime", Resource::Rttime),
    ("sigpending", Resource::Sigpending),
    ("stack", Resource::Stack),
];

fn resource(name: &str) -> Option<Resource> {
    RESOURCES.iter().find(|(known, _)| *known == name).map(|(_, resource)| *resource)
}

impl Limits {
    /// Moves this process into its control groups; what it starts from then on is in them, too. Only where the host's
    /// files can still be seen.
    pub(super) fn join_cgroups(&self, unified: bool) -> Result<(), Failure> {
        for folder in &self.cgroups {
            let path = folder.join("cgroup.procs");
            write(&path, b"0").during_at("join the control group", &folder.to_string_lossy())?;
        }
        if unified && !self.cgroups.is_empty() {
            // The namespace was made with the helper's group for its root.
            sys::unshare_cgroups().during("hide the host's control groups")?;
        }
        Ok(())
    }

    /// Sets the limits of this process, which its children inherit. Only while it may still raise them.
    pub(super) fn apply(&self) -> Result<(), Failure> {
        for limit in &self.resources {
            let resource = resource(&limit.name)
                .ok_or(Errno::INVAL)
                .during_at("set the resource limit", &limit.name)?;
            let values = Rlimit { current: limit.soft, maximum: limit.hard };
            rustix::process::setrlimit(resource, values)
                .during_at("set the resource limit", &limit.name)?;
        }
        Ok(())
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Errno> {
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, bytes).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_checked_before_anything_runs() {
        assert!(ResourceLimit::new("nofile", Some(10), None).is_ok());
        assert!(ResourceLimit::new("core", Some(0), Some(0)).is_ok());
        let unknown = ResourceLimit::new("files", Some(1), Some(1)).unwrap_err();
        assert!(unknown.contains("\"files\"") && unknown.contains("nofile"), "{unknown}");
        assert!(ResourceLimit::new("nofile", None, Some(7)).unwrap_err().contains("above"));
    }
}
