//! What a step is given with its devices, as the sandbox takes it.

use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::spec::{Edits, Mount, Node};
use crate::executor::{DeviceKind, DeviceNode, ExecMount, ExecMountKind, ExecSpec, Hook};

/// The mode of a device file that has none anywhere.
const MODE: u32 = 0o666;

/// What a step is given with its devices.
#[derive(Debug, Default)]
#[cfg_attr(test, derive(PartialEq))]
pub(crate) struct Given {
    /// Variables, as `NAME=value`; of one name the last counts.
    pub(crate) env: Vec<String>,
    /// Device files.
    pub(crate) nodes: Vec<DeviceNode>,
    /// What is mounted, in place of what else would be there.
    pub(crate) mounts: Vec<ExecMount>,
    /// Groups beside those of the step's user.
    pub(crate) groups: Vec<u32>,
    /// Programs that prepare the root.
    pub(crate) hooks: Vec<Hook>,
}

impl Given {
    /// Adds what a description says, with what it leaves to the host to say.
    pub(super) fn add(&mut self, edits: &Edits) -> Result<(), String> {
        if let Some(other) = edits.others.first() {
            return Err(format!(
                "it has {other}, which this builder does not know how to give to a step; describe it without"
            ));
        }
        self.env.extend(edits.env.iter().cloned());
        for node in &edits.nodes {
            let node = device_node(node)?;
            // What comes later replaces what was there.
            self.nodes.retain(|known| known.dest != node.dest);
            self.nodes.push(node);
        }
        for mount in &edits.mounts {
            let mount = host_mount(mount)?;
            self.mounts.retain(|known| !same_place(&known.dest, &mount.dest));
            self.mounts.push(mount);
        }
        for hook in &edits.hooks {
            if hook.name != "createContainer" {
                return Err(format!(
                    "it has a hook {}, and this builder knows createContainer only; describe it without",
                    hook.name
                ));
            }
            if !hook.path.is_absolute() {
                return Err(format!("its hook {} is not an absolute path", hook.path.display()));
            }
            let (path, args, env) = (hook.path.clone(), hook.args.clone(), hook.env.clone());
            self.hooks.push(Hook { path, args, env, timeout: hook.timeout });
        }
        // Root's group is no privilege that a device could need.
        self.groups.extend(edits.groups.iter().copied().filter(|group| *group != 0));
        Ok(())
    }

    /// Puts it on top of what a step has anyway.
    pub(crate) fn apply(self, spec: &mut ExecSpec) {
        for variable in self.env {
            let name = variable.split_once('=').map_or(variable.as_str(), |(name, _)| name);
            let is_same =
                |known: &String| known.strip_prefix(name).is_some_and(|rest| rest.starts_with('='));
            match spec.env.iter_mut().find(|known| is_same(known)) {
                Some(known) => *known = variable,
                None => spec.env.push(variable),
            }
        }
        for mount in self.mounts {
            spec.mounts.retain(|known| !same_place(&known.dest, &mount.dest));
            spec.mounts.push(mount);
        }
        spec.devices.extend(self.nodes);
        spec.groups.extend(self.groups);
        spec.hooks.extend(self.hooks);
    }
}

fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty() && *part != ".")
}

fn same_place(one: &str, other: &str) -> bool {
    parts(one).eq(parts(other))
}

/// Completes a device file with what the host has.
fn device_node(node: &Node) -> Result<DeviceNode, String> {
    let Node { path, host_path, kind, major, minor, mode, permissions, uid, gid } = node;
    // Nothing here could hold a step to it: what it can open it can read and write. The right to make device files is of
    // no use in a step in any case, as the files cannot be opened.
    let both = permissions.contains('r') && permissions.contains('w');
    if !permissions.is_empty() && !both {
        return Err(format!(
            "it gives {path} with the permissions {permissions:?} only, which cannot be enforced here; allow rw or leave it out"
        ));
    }
    let source = host_path.clone().unwrap_or_else(|| path.into());
    let said = match kind.as_str() {
        "b" => Some(DeviceKind::Block),
        "c" | "u" => Some(DeviceKind::Char),
        "p" => Some(DeviceKind::Fifo),
        _ => None,
    };
    let is_complete = said == Some(DeviceKind::Fifo) || (said.is_some() && *major != 0);
    let failed = |reason: &dyn std::fmt::Display| {
        format!("cannot use the host's {}: {reason}", source.display())
    };
    let (kind, numbers, mode) = match (look_at(&source), said) {
        (Ok(found), Some(said)) if is_complete => {
            (said, (*major, *minor), mode.or(Some(found.mode)))
        }
        (Err(_), Some(said)) if is_complete => (said, (*major, *minor), *mode),
        (Err(reason), _) => return Err(failed(&reason)),
        (Ok(found), said) => {
            if said.is_some_and(|said| said != found.kind) {
                return Err(failed(&"it is a device file of another type"));
            }
            (found.kind, found.numbers, mode.or(Some(found.mode)))
        }
    };
    let mode = mode.unwrap_or(MODE) & 0o777;
    let (major, minor) = numbers;
    Ok(DeviceNode { dest: path.clone(), source, kind, major, minor, mode, uid: *uid, gid: *gid })
}

/// A device file of the host.
struct Found {
    kind: DeviceKind,
    numbers: (u32, u32),
    mode: u32,
}

fn look_at(path: &Path) -> Result<Found, String> {
    let metadata = std::fs::symlink_metadata(path).map_err(|error| error.to_string())?;
    let file_type = metadata.file_type();
    let kind = if file_type.is_block_device() {
        DeviceKind::Block
    } else if file_type.is_char_device() {
        DeviceKind::Char
    } else if file_type.is_fifo() {
        DeviceKind::Fifo
    } else {
        return Err("it is not a device file".into());
    };
    let number = metadata.rdev();
    let numbers = (rustix::fs::major(number), rustix::fs::minor(number));
    Ok(Found { kind, numbers, mode: metadata.mode() & 0o777 })
}

/// Reads the options of a mount, as programs that run containers do.
fn host_mount(mount: &Mount) -> Result<ExecMount, String> {
    let Mount { host_path, path, options, kind } = mount;
    if parts(path).next().is_none() {
        return Err(format!("it mounts on {path:?}, the root of the step"));
    }
    let (mut readonly, mut nosuid, mut noexec, mut recursive) = (false, false, false, false);
    let mut size = None;
    for option in options {
        match option.as_str() {
            "ro" | "rro" => readonly = true,
            "rw" | "rrw" => readonly = false,
            "nosuid" | "rnosuid" => nosuid = true,
            "suid" => nosuid = false,
            "noexec" | "rnoexec" => noexec = true,
            "exec" => noexec = false,
            "bind" => {}
            "rbind" => recursive = true,
            // A step sees no device files in mounts in any case, and its mounts are nobody else's.
            "defaults" | "nodev" | "rnodev" | "dev" | "private" | "rprivate" | "slave"
            | "rslave" | "shared" | "rshared" | "unbindable" | "runbindable" => {}
            // When something was read is nobody's business.
            "atime" | "noatime" | "diratime" | "nodiratime" | "relatime" | "norelatime"
            | "strictatime" | "nostrictatime" | "sync" | "async" => {}
            other => {
                let bytes = other.strip_prefix("size=").filter(|_| kind == "tmpfs").and_then(bytes);
                match bytes {
                    Some(bytes) => size = Some(bytes),
                    None => {
                        return Err(format!(
                            "the option {other:?} of the mount on {path} is not known"
                        ));
                    }
                }
            }
        }
    }
    let kind = match kind.as_str() {
        "" | "bind" | "none" => ExecMountKind::Host {
            source: PathBuf::from(host_path),
            readonly,
            nosuid,
            noexec,
            recursive,
        },
        "tmpfs" => ExecMountKind::Tmpfs { size },
        other => return Err(format!("the type {other:?} of the mount on {path} is not known")),
    };
    Ok(ExecMount { dest: path.clone(), kind })
}

/// Reads a size as the kernel does.
fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()?.to_ascii_lowercase() {
        b'k' => (&text[..text.len() - 1], 10),
        b'm' => (&text[..text.len() - 1], 20),
        b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(path: &str) -> Node {
        Node { path: path.into(), ..Node::default() }
    }

    #[test]
    fn the_host_completes_device_files() {
        let null = |dest: &str| DeviceNode {
            dest: dest.into(),
            source: "/dev/null".into(),
            kind: DeviceKind::Char,
            major: 1,
            minor: 3,
            mode: 0o666,
            uid: None,
            gid: None,
        };
        assert_eq!(device_node(&node("/dev/null")).unwrap(), null("/dev/null"));
        let other = Node {
            host_path: Some("/dev/null".into()),
            kind: "u".into(),
            mode: Some(0o640),
            uid: Some(7),
            permissions: "mrw".into(),
            ..node("/dev/other")
        };
        let expected = DeviceNode { mode: 0o640, uid: Some(7), ..null("/dev/other") };
        assert_eq!(device_node(&other).unwrap(), expected);
        // What is complete needs no host.
        let block = Node { kind: "b".into(), major: 7, minor: 9, ..node("/dev/absent") };
        let expected = DeviceNode {
            source: "/dev/absent".into(),
            kind: DeviceKind::Block,
            major: 7,
            minor: 9,
            ..null("/dev/absent")
        };
        assert_eq!(device_node(&block).unwrap(), expected);
        for (bad, says) in [
            (node("/dev/absent"), "cannot use the host's /dev/absent: No such file"),
            (node("/etc/passwd"), "cannot use the host's /etc/passwd: it is not a device file"),
            (Node { kind: "b".into(), ..node("/dev/null") }, "it is a device file of another type"),
            (
                Node { permissions: "r".into(), ..node("/dev/null") },
                "which cannot be enforced here",
            ),
            (
                Node { permissions: "m".into(), ..node("/dev/null") },
                "which cannot be enforced here",
            ),
        ] {
            let error = device_node(&bad).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    fn mount(kind: &str, options: &[&str]) -> Result<ExecMountKind, String> {
        let options = options.iter().map(|option| (*option).into()).collect();
        let mount = Mount { host_path: "/a".into(), path: "/b".into(), options, kind: kind.into() };
        host_mount(&mount).map(|mount| mount.kind)
    }

    #[test]
    fn mounts_have_the_options_of_containers() {
        let host = |readonly, nosuid, noexec, recursive| ExecMountKind::Host {
            source: "/a".into(),
            readonly,
            nosuid,
            noexec,
            recursive,
        };
        for kind in ["", "bind", "none"] {
            assert_eq!(mount(kind, &[]).unwrap(), host(false, false, false, false));
        }
        let usual = ["ro", "nosuid", "nodev", "rbind", "rprivate"];
        assert_eq!(mount("", &usual).unwrap(), host(true, true, false, true));
        assert_eq!(
            mount("", &["ro", "noexec", "rw", "bind"]).unwrap(),
            host(false, false, true, false)
        );
        assert_eq!(
            mount("tmpfs", &["size=2m"]).unwrap(),
            ExecMountKind::Tmpfs { size: Some(2 << 20) }
        );
        for (kind, options, says) in [
            ("", ["size=1"], "the option \"size=1\" of the mount on /b is not known"),
            ("tmpfs", ["size=x"], "the option \"size=x\" of the mount on /b is not known"),
            ("nfs", ["ro"], "the type \"nfs\" of the mount on /b is not known"),
        ] {
            assert_eq!(mount(kind, &options).unwrap_err(), says);
        }
        let root = Mount { host_path: "/a".into(), path: "//.".into(), ..Mount::default() };
        assert!(host_mount(&root).unwrap_err().contains("the root of the step"));
    }

    #[test]
    fn what_a_device_gives_replaces_what_was_there() {
        let mount =
            |dest: &str| ExecMount { dest: dest.into(), kind: ExecMountKind::Tmpfs { size: None } };
        let hook = Hook { path: "/h".into(), args: vec![], env: vec![], timeout: None };
        let given = Given {
            env: vec!["A=2".into(), "B=1".into(), "A=3".into()],
            mounts: vec![mount("/a//b")],
            groups: vec![7],
            hooks: vec![hook.clone()],
            ..Given::default()
        };
        let mut spec = ExecSpec {
            env: vec!["AA=0".into(), "A=1".into()],
            mounts: vec![
                ExecMount { dest: "a/b/".into(), kind: ExecMountKind::Tmpfs { size: Some(1) } },
                mount("/a"),
            ],
            ..ExecSpec::default()
        };
        given.apply(&mut spec);
        assert_eq!(spec.env, ["AA=0", "A=3", "B=1"]);
        assert_eq!(spec.mounts, [mount("/a"), mount("/a//b")]);
        assert_eq!((spec.devices, spec.groups, spec.hooks), (vec![], vec![7], vec![hook]));
    }
}
