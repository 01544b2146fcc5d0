//! Devices of this machine that steps may ask for, as the Container Device Interface describes them.
//!
//! Whoever runs the machine, or a program of the devices' vendor, puts [files](DEFAULT_FOLDERS) on it that say what a step
//! is given with each device: device files, mounts, variables, groups. The files are read whenever somebody asks, so that
//! a device that is plugged in is there for the next step.

mod given;
mod spec;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use slipway_spec::flag;
use slipway_spec::llb::pb;

pub(crate) use self::given::Given;
use self::spec::Spec;
use crate::client::services::DeviceGrants;
use crate::error::Cause;

/// Where descriptions are as a rule. What a later folder says of a device counts more.
pub const DEFAULT_FOLDERS: [&str; 3] = ["/etc/cdi", "/var/run/cdi", "/etc/buildkit/cdi"];

/// Names a group of devices that can be asked for by that name.
const CLASS: &str = "org.mobyproject.buildkit.device.class";
/// Whether a device is given to steps without their user's leave.
const AUTO_ALLOW: &str = "org.mobyproject.buildkit.device.autoallow";
/// Vendors' files have some hundred kilobytes.
const MAX_FILE: u64 = 16 << 20;

/// Which devices a machine has, and who may have them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Folders with descriptions. What a later one says of a device counts more.
    pub folders: Vec<PathBuf>,
    /// Devices, and kinds of devices, that steps are given without their user's leave.
    pub auto_allowed: Vec<String>,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self { folders: DEFAULT_FOLDERS.map(PathBuf::from).into(), auto_allowed: vec![] }
    }
}

/// The devices of a machine. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Devices(Option<Arc<DeviceOptions>>);

/// The devices that were there when somebody looked.
#[derive(Debug, Default)]
pub struct Inventory {
    /// Whether anybody looked for some.
    is_on: bool,
    devices: BTreeMap<String, Known>,
    problems: Vec<DeviceProblem>,
}

/// A device, for those who want to know which there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `vendor/class=name`.
    pub name: String,
    /// Whether steps are given it without their user's leave.
    pub auto_allow: bool,
    /// What its description says of it beside.
    pub annotations: BTreeMap<String, String>,
}

/// A file of descriptions that is of no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {reason}", .path.display())]
pub struct DeviceProblem {
    /// Which.
    pub path: PathBuf,
    /// Why.
    pub reason: String,
}

#[derive(Debug)]
struct Known {
    info: DeviceInfo,
    /// Where its description is among those of the file.
    at: usize,
    file: Arc<File>,
}

#[derive(Debug)]
struct File {
    path: PathBuf,
    /// The place of its folder among the folders.
    priority: usize,
    spec: Spec,
}

impl Devices {
    /// The devices that these folders describe.
    pub fn new(options: DeviceOptions) -> Self {
        Self(Some(Arc::new(options)))
    }

    /// No devices at all.
    pub fn none() -> Self {
        Self(None)
    }

    /// Reads all descriptions. A file that cannot be read is a [problem](Inventory::problems) of whoever needs it.
    pub fn read(&self) -> Inventory {
        let Some(options) = &self.0 else { return Inventory::default() };
        let mut inventory = Inventory { is_on: true, ..Inventory::default() };
        let mut twice = BTreeSet::new();
        for (priority, folder) in options.folders.iter().enumerate() {
            for path in inventory.files(folder) {
                match read_file(&path) {
                    Ok(spec) => {
                        let file = Arc::new(File { path, priority, spec });
                        inventory.add(&file, options, &mut twice);
                    }
                    Err(reason) => inventory.problems.push(DeviceProblem { path, reason }),
                }
            }
        }
        // Which of two was meant is not for us to guess.
        inventory.devices.retain(|name, _| !twice.contains(name));
        inventory
    }
}

/// Reads one file.
fn read_file(path: &Path) -> Result<Spec, String> {
    let open = || -> io::Result<Vec<u8>> {
        let mut bytes = vec![];
        fs::File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = open().map_err(|error| format!("cannot read it: {error}"))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("it is larger than {MAX_FILE} bytes"));
    }
    spec::parse(std::str::from_utf8(&bytes).map_err(|_| "it is not UTF-8")?)
}

impl Inventory {
    /// Returns all devices, by name.
    pub fn devices(&self) -> impl Iterator<Item = &DeviceInfo> {
        self.devices.values().map(|known| &known.info)
    }

    /// Returns what could not be read.
    pub fn problems(&self) -> &[DeviceProblem] {
        &self.problems
    }

    /// Lists the files of descriptions in a folder, in the order of their names.
    fn files(&mut self, folder: &Path) -> Vec<PathBuf> {
        let is_spec = |path: &PathBuf| {
            path.extension().is_some_and(|ending| ending == "json" || ending == "yaml")
                && !path.is_dir()
        };
        let entries = match fs::read_dir(folder) {
            Ok(entries) => entries,
            // There are no devices as a rule.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return vec![],
            Err(error) => {
                let reason = format!("cannot list it: {error}");
                self.problems.push(DeviceProblem { path: folder.into(), reason });
                return vec![];
            }
        };
        let mut paths: Vec<PathBuf> =
            entries.flatten().map(|entry| entry.path()).filter(is_spec).collect();
        paths.sort();
        paths
    }

    fn add(&mut self, file: &Arc<File>, options: &DeviceOptions, twice: &mut BTreeSet<String>) {
        let kind = &file.spec.kind;
        for (at, device) in file.spec.devices.iter().enumerate() {
            let name = format!("{kind}={}", device.name);
            match self.devices.get(&name) {
                Some(known) if known.file.priority == file.priority => {
                    let other = known.file.path.display();
                    let reason = format!("the device {name} is described in {other} as well");
                    self.problems.push(DeviceProblem { path: file.path.clone(), reason });
                    twice.insert(name);
                    continue;
                }
                _ => twice.remove(&name),
            };
            let mut annotations = file.spec.annotations.clone();
            annotations.extend(device.annotations.clone());
            let listed = |auto: &String| *auto == name || auto == kind;
            let auto_allow = options.auto_allowed.iter().any(listed)
                || annotations.get(AUTO_ALLOW).and_then(|value| flag::parse(value)) == Some(true);
            let info = DeviceInfo { name: name.clone(), auto_allow, annotations };
            self.devices.insert(name, Known { info, at, file: file.clone() });
        }
    }

    /// Finds the devices that a name stands for: one device, the first of a kind, all of a kind (`=*`), or all of a class.
    fn find(&self, name: &str) -> Vec<&str> {
        let (kind, device) = name.split_once('=').unwrap_or((name, ""));
        let is_kind = kind
            .split_once('/')
            .is_some_and(|(vendor, class)| !vendor.is_empty() && !class.is_empty());
        if is_kind {
            let of_kind = |known: &&String| {
                known.strip_prefix(kind).is_some_and(|rest| rest.starts_with('='))
            };
            let of_kind = self.devices.keys().filter(of_kind);
            let found: Vec<&str> = match device {
                "" => of_kind.take(1).map(String::as_str).collect(),
                "*" => of_kind.map(String::as_str).collect(),
                _ => {
                    self.devices.keys().filter(|known| *known == name).map(String::as_str).collect()
                }
            };
            if !found.is_empty() {
                return found;
            }
        }
        let of_class = |info: &&DeviceInfo| info.annotations.get(CLASS).is_some_and(|c| c == name);
        self.devices().filter(of_class).map(|info| info.name.as_str()).collect()
    }

    /// Finds all devices that a step asks for, each once, in the order in which it asks.
    fn find_all<'a>(
        &'a self,
        wanted: impl IntoIterator<Item = &'a pb::CdiDevice>,
    ) -> Result<Vec<&'a str>, Cause> {
        let mut all = vec![];
        for device in wanted {
            let found = self.find(&device.name);
            if found.is_empty() {
                if !device.optional {
                    return Err(self.missing(&device.name));
                }
                tracing::warn!(device = device.name, "an optional device is not registered");
            }
            for name in found {
                if !all.contains(&name) {
                    all.push(name);
                }
            }
        }
        Ok(all)
    }

    fn missing(&self, name: &str) -> Cause {
        let mut message = format!("required device {name:?} is not registered");
        if !self.is_on {
            message.push_str(": devices are turned off here");
        }
        // One of these may have been meant to describe it.
        for problem in &self.problems {
            message.push_str(&format!("; {problem}"));
        }
        Cause::Missing(message)
    }

    /// Decides which devices a step is given of those that it asks for; their names are part of what it is known by.
    ///
    /// # Errors
    /// When one is not there, or its user did not allow it.
    pub(crate) fn admit(
        &self,
        wanted: &[pb::CdiDevice],
        grants: &DeviceGrants,
    ) -> Result<Vec<pb::CdiDevice>, Cause> {
        if grants.all {
            return Ok(wanted.to_vec());
        }
        for problem in &self.problems {
            tracing::warn!(%problem, "a file that describes devices cannot be used");
        }
        let mut admitted = vec![];
        let mut rest = vec![];
        for device in wanted {
            match grants.named.get(&device.name) {
                // Whoever says what a name stands for allows that.
                Some(Some(real)) => {
                    admitted.push(pb::CdiDevice { name: real.clone(), ..device.clone() });
                }
                _ => rest.push(device),
            }
        }
        let found = self.find_all(rest)?;
        let granted: BTreeSet<&str> =
            grants.named.keys().flat_map(|name| self.find(name)).collect();
        let is_auto =
            |name: &str| self.devices.get(name).is_some_and(|known| known.info.auto_allow);
        let forbidden: Vec<&str> = found
            .iter()
            .copied()
            .filter(|name| !granted.contains(name) && !is_auto(name))
            .collect();
        match forbidden.as_slice() {
            [] => {}
            [one] => {
                return Err(Cause::Invalid(format!(
                    "device {one} is requested by the build but not allowed; allow it with --allow device={one}"
                )));
            }
            several => {
                return Err(Cause::Invalid(format!(
                    "devices {} are requested by the build but not allowed; allow each with --allow device=NAME, or all \
                     with --allow device",
                    several.join(", ")
                )));
            }
        }
        admitted.extend(
            found.into_iter().map(|name| pb::CdiDevice { name: name.into(), optional: false }),
        );
        Ok(admitted)
    }

    /// Returns what a step is given with its devices.
    ///
    /// # Errors
    /// When a device is not there, or cannot be given as its description says.
    pub(crate) fn give(&self, wanted: &[pb::CdiDevice]) -> Result<Given, Cause> {
        let mut given = Given::default();
        let mut begun: BTreeSet<&Path> = BTreeSet::new();
        for name in self.find_all(wanted)? {
            let Some(Known { at, file, .. }) = self.devices.get(name) else { continue };
            let failed = |reason: String| {
                Cause::Invalid(format!("device {name} ({}): {reason}", file.path.display()))
            };
            if begun.insert(&file.path) {
                given.add(&file.spec.edits).map_err(failed)?;
            }
            if let Some(device) = file.spec.devices.get(*at) {
                given.add(&device.edits).map_err(failed)?;
            }
        }
        Ok(given)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two kinds of devices, one of which has devices of classes.
    const ONE: &str = r#"
cdiVersion: "0.6.0"
kind: "v.com/one"
devices:
- name: foo
  containerEdits: {env: [FOO=1]}
"#;
    const MANY: &str = r#"
cdiVersion: "0.6.0"
kind: "v.com/many"
annotations:
  org.mobyproject.buildkit.device.autoallow: true
containerEdits: {env: [ALL=1]}
devices:
- name: foo
  annotations: {org.mobyproject.buildkit.device.class: c1}
  containerEdits: {env: [FOO=1]}
- name: bar
  annotations: {org.mobyproject.buildkit.device.class: c1}
  containerEdits: {env: [BAR=1]}
- name: baz
  annotations: {org.mobyproject.buildkit.device.autoallow: false}
  containerEdits: {env: [BAZ=1]}
"#;

    struct Folders(tempfile::TempDir, DeviceOptions);

    impl Folders {
        fn new(files: &[(&str, &str)]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            for (path, text) in files {
                let path = folder.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            let folders = ["low", "high", "absent"].map(|name| folder.path().join(name)).into();
            Self(folder, DeviceOptions { folders, auto_allowed: vec![] })
        }

        fn read(&self) -> Inventory {
            Devices::new(self.1.clone()).read()
        }
    }

    fn device(name: &str) -> pb::CdiDevice {
        pb::CdiDevice { name: name.into(), optional: false }
    }

    fn names(devices: &[pb::CdiDevice]) -> Vec<&str> {
        devices.iter().map(|device| device.name.as_str()).collect()
    }

    fn grants(texts: &[&str]) -> DeviceGrants {
        let mut grants = DeviceGrants::default();
        for text in texts {
            grants.add(text).unwrap();
        }
        grants
    }

    #[test]
    fn a_name_stands_for_a_device_a_kind_or_a_class() {
        let inventory = Folders::new(&[("low/1.yaml", ONE), ("low/2.yaml", MANY)]).read();
        for (name, found) in [
            ("v.com/one=foo", vec!["v.com/one=foo"]),
            ("v.com/many", vec!["v.com/many=bar"]),
            ("v.com/many=", vec!["v.com/many=bar"]),
            ("v.com/many=*", vec!["v.com/many=bar", "v.com/many=baz", "v.com/many=foo"]),
            ("c1", vec!["v.com/many=bar", "v.com/many=foo"]),
            ("v.com/man", vec![]),
            ("v.com/one=fo", vec![]),
            ("c", vec![]),
            ("", vec![]),
            ("v.com", vec![]),
        ] {
            assert_eq!(inventory.find(name), found, "{name}");
        }
    }

    #[test]
    fn later_folders_count_more_and_equals_cancel_out() {
        let other = |env: &str| ONE.replace("FOO=1", env);
        let folders = Folders::new(&[
            ("low/a.yaml", ONE),
            ("low/b.yaml", &other("FOO=2")),
            ("low/ignored.yml", &other("FOO=3")),
            ("low/folder.yaml/x.yaml", &other("FOO=3")),
            ("high/a.json", &other("FOO=4")),
            ("high/bad.yaml", "kind: ["),
            ("high/dup1.yaml", &ONE.replace("v.com/one", "v.com/dup")),
            ("high/dup2.yaml", &ONE.replace("v.com/one", "v.com/dup")),
        ]);
        let inventory = folders.read();
        assert_eq!(inventory.give(&[device("v.com/one")]).unwrap().env, ["FOO=4"]);
        let problems: Vec<String> = inventory
            .problems()
            .iter()
            .map(|problem| problem.path.file_name().unwrap().to_str().unwrap().to_owned())
            .collect();
        assert_eq!(problems, ["b.yaml", "bad.yaml", "dup2.yaml"]);
        let error = inventory.give(&[device("v.com/dup=foo")]).unwrap_err().to_string();
        assert!(
            error.starts_with("required device \"v.com/dup=foo\" is not registered; ")
                && error.contains("/high/bad.yaml: ")
                && error.contains("/high/dup2.yaml: the device v.com/dup=foo is described in"),
            "{error}"
        );
        let optional = pb::CdiDevice { optional: true, ..device("v.com/dup=foo") };
        assert_eq!(inventory.give(&[optional]).unwrap(), Given::default());
        let error = Devices::none().read().give(&[device("x")]).unwrap_err().to_string();
        assert_eq!(error, "required device \"x\" is not registered: devices are turned off here");
    }

    #[test]
    fn what_a_file_gives_with_all_its_devices_is_given_once() {
        let inventory = Folders::new(&[("low/1.yaml", ONE), ("low/2.yaml", MANY)]).read();
        let wanted = [device("v.com/many=baz"), device("v.com/one"), device("v.com/many=*")];
        let given = inventory.give(&wanted).unwrap();
        assert_eq!(given.env, ["ALL=1", "BAZ=1", "FOO=1", "BAR=1", "FOO=1"]);
    }

    #[test]
    fn devices_need_leave_unless_they_say_otherwise() {
        let mut folders = Folders::new(&[("low/1.yaml", ONE), ("low/2.yaml", MANY)]);
        let inventory = folders.read();
        let none = DeviceGrants::default();
        let admit = |wanted: &[&str], grants: &DeviceGrants| {
            let wanted: Vec<_> = wanted.iter().map(|name| device(name)).collect();
            let admitted = inventory.admit(&wanted, grants);
            admitted.map(|admitted| admitted.into_iter().map(|one| one.name).collect::<Vec<_>>())
        };
        assert_eq!(admit(&["c1"], &none).unwrap(), ["v.com/many=bar", "v.com/many=foo"]);
        let refused =
            |wanted: &[&str], grants: &DeviceGrants| admit(wanted, grants).unwrap_err().to_string();
        assert!(
            refused(&["v.com/one"], &none)
                .starts_with("device v.com/one=foo is requested by the build but not allowed; allow it with --allow device=v.com/one=foo")
        );
        assert!(refused(&["v.com/one", "v.com/many=*"], &none).starts_with(
            "devices v.com/one=foo, v.com/many=baz are requested by the build but not allowed"
        ));
        for granted in ["v.com/one", "v.com/one=foo", "v.com/one=*"] {
            assert_eq!(admit(&["v.com/one=foo"], &grants(&[granted])).unwrap(), ["v.com/one=foo"]);
        }
        assert!(admit(&["v.com/one"], &grants(&["v.com/many", "gone"])).is_err());
        // What an alias stands for is allowed as it is.
        let alias = grants(&["v.com/one=foo,alias=mine"]);
        assert_eq!(admit(&["mine"], &alias).unwrap(), ["v.com/one=foo"]);
        assert!(admit(&["v.com/one=foo"], &alias).is_err());
        // With leave for all, names stay as they are.
        assert_eq!(admit(&["v.com/one", "gone"], &grants(&[""])).unwrap(), ["v.com/one", "gone"]);
        assert!(refused(&["gone"], &none).contains("required device \"gone\" is not registered"));
        let optional = pb::CdiDevice { optional: true, ..device("gone") };
        assert_eq!(inventory.admit(&[optional], &none).unwrap(), []);
        for auto in ["v.com/one", "v.com/one=foo"] {
            folders.1.auto_allowed = vec![auto.into()];
            let admitted = folders.read().admit(&[device("v.com/one")], &none).unwrap();
            assert_eq!(names(&admitted), ["v.com/one=foo"]);
        }
        let infos: Vec<_> =
            inventory.devices().map(|info| (info.name.as_str(), info.auto_allow)).collect();
        assert_eq!(
            infos,
            [
                ("v.com/many=bar", true),
                ("v.com/many=baz", false),
                ("v.com/many=foo", true),
                ("v.com/one=foo", false)
            ]
        );
    }

    #[test]
    fn what_cannot_be_given_names_the_file() {
        let hooks = ONE.replace("{env: [FOO=1]}", "{hooks: [{hookName: poststop, path: /x}]}");
        let folders = Folders::new(&[("low/1.yaml", &hooks)]);
        let error = folders.read().give(&[device("v.com/one")]).unwrap_err().to_string();
        let file = folders.0.path().join("low/1.yaml");
        assert!(
            error.starts_with(&format!(
                "device v.com/one=foo ({}): it has a hook poststop",
                file.display()
            )),
            "{error}"
        );
    }
}
