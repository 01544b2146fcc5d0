//! A file that describes devices, as the specification of the Container Device Interface has it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::text::{self, Value};

/// A version as it is compared.
type Version = (u32, u32, u32);

/// The versions there are. The first two are older than what anybody can rely on, and are read all the same.
const VERSIONS: &[Version] = &[
    (0, 1, 0),
    (0, 2, 0),
    (0, 3, 0),
    (0, 4, 0),
    (0, 5, 0),
    (0, 6, 0),
    (0, 7, 0),
    (0, 8, 0),
    (1, 0, 0),
    (1, 1, 0),
];
/// What every file may use, whatever its version.
const OLDEST: Version = (0, 3, 0);

/// What one file describes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spec {
    /// `vendor/class`.
    pub(super) kind: String,
    /// What whoever wrote it says of all its devices.
    pub(super) annotations: BTreeMap<String, String>,
    /// Its devices.
    pub(super) devices: Vec<Device>,
    /// What a step is given that has any of its devices.
    pub(super) edits: Edits,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) name: String,
    pub(super) annotations: BTreeMap<String, String>,
    pub(super) edits: Edits,
}

/// What a step is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Edits {
    /// Variables, as `NAME=value`.
    pub(super) env: Vec<String>,
    pub(super) nodes: Vec<Node>,
    pub(super) mounts: Vec<Mount>,
    /// Groups that its user is in.
    pub(super) groups: Vec<u32>,
    /// Programs that are called on the way.
    pub(super) hooks: Vec<Hook>,
    /// What else there is that cannot be done here.
    pub(super) others: Vec<&'static str>,
}

/// A device file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) path: String,
    /// Where the host has it, unless that is at the same path.
    pub(super) host_path: Option<PathBuf>,
    /// `b`, `c`, `u` or `p`; empty is what the host has.
    pub(super) kind: String,
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) mode: Option<u32>,
    /// Of `rwm`; empty is all.
    pub(super) permissions: String,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

/// A program of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Hook {
    /// When it is called.
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// Its arguments, its own name first.
    pub(super) args: Vec<String>,
    /// Its variables, as `NAME=value`.
    pub(super) env: Vec<String>,
    /// How many seconds it may take.
    pub(super) timeout: Option<u32>,
}

/// Something of the host's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Mount {
    pub(super) host_path: String,
    pub(super) path: String,
    pub(super) options: Vec<String>,
    pub(super) kind: String,
}

/// Reads a file.
///
/// # Errors
/// When it does not follow the specification.
pub(super) fn parse(text: &str) -> Result<Spec, String> {
    let value = text::parse(text)?.filter(|value| !value.is_null()).ok_or("the file is empty")?;
    let mut needs = Needs(OLDEST);
    let mut all = Fields::of("", value)?;
    let version = all.text("cdiVersion")?;
    let kind = all.text("kind")?;
    let annotations = all.annotations(&mut needs)?;
    let edits = all.edits(&mut needs)?;
    let mut devices: Vec<Device> = vec![];
    for (at, value) in all.list("devices")?.into_iter().enumerate() {
        let device = device(at, value, &mut needs)?;
        if devices.iter().any(|known| known.name == device.name) {
            return Err(format!("there are two devices {:?}", device.name));
        }
        devices.push(device);
    }
    all.end()?;
    let known = read_version(&version).filter(|version| VERSIONS.contains(version));
    let known = known.ok_or_else(|| format!("the version {version:?} is not known"))?;
    let (vendor, class) = kind
        .split_once('/')
        .ok_or_else(|| format!("the kind {kind:?} is not of the form VENDOR/CLASS"))?;
    check_name("vendor", vendor)?;
    check_name("class", class)?;
    if class.contains('.') {
        needs.at_least((0, 6, 0));
    }
    if devices.is_empty() {
        return Err("there are no devices".into());
    }
    let Needs(needed) = needs;
    if known < needed {
        let (major, minor, patch) = needed;
        return Err(format!(
            "what it uses needs cdiVersion {major}.{minor}.{patch}, and it says {version}"
        ));
    }
    Ok(Spec { kind, annotations, devices, edits })
}

fn device(at: usize, value: Value, needs: &mut Needs) -> Result<Device, String> {
    let mut fields = Fields::of(&format!("devices[{at}]"), value)?;
    let name = fields.text("name")?;
    check_device(&name)?;
    if name.starts_with(|first: char| first.is_ascii_digit()) {
        needs.at_least((0, 5, 0));
    }
    let annotations = fields.annotations(needs)?;
    let edits = fields.edits(needs)?;
    fields.end()?;
    if edits == Edits::default() {
        return Err(format!("the device {name:?} gives a step nothing"));
    }
    Ok(Device { name, annotations, edits })
}

/// The oldest version that has what is used.
struct Needs(Version);

impl Needs {
    fn at_least(&mut self, version: Version) {
        self.0 = self.0.max(version);
    }
}

fn read_version(text: &str) -> Option<Version> {
    let mut parts = text.strip_prefix('v').unwrap_or(text).split('.').map(str::parse);
    let version = (parts.next()?.ok()?, parts.next()?.ok()?, parts.next()?.ok()?);
    parts.next().is_none().then_some(version)
}

fn check_name(what: &str, name: &str) -> Result<(), String> {
    let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    let good = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.ends_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(inside);
    if good { Ok(()) } else { Err(format!("{name:?} cannot be the name of a {what}")) }
}

fn check_device(name: &str) -> Result<(), String> {
    let inside = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':');
    let end = |c: char| c.is_ascii_alphanumeric();
    let good = name.starts_with(end) && name.ends_with(end) && name.chars().all(inside);
    if good { Ok(()) } else { Err(format!("{name:?} cannot be the name of a device")) }
}

/// The fields of a map, taken one by one; what is left in the end is an error.
struct Fields {
    /// Where the map is; empty for the file itself.
    at: String,
    map: BTreeMap<String, Value>,
}

impl Fields {
    fn of(at: &str, value: Value) -> Result<Self, String> {
        let map = match value {
            Value::Map(map) => map,
            value if value.is_null() => BTreeMap::new(),
            _ if at.is_empty() => return Err("it is not a map of fields".into()),
            _ => return Err(format!("{at} is not a map of fields")),
        };
        Ok(Self { at: at.into(), map })
    }

    fn path(&self, name: &str) -> String {
        if self.at.is_empty() { name.into() } else { format!("{}.{name}", self.at) }
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    fn text(&mut self, name: &str) -> Result<String, String> {
        let path = self.path(name);
        self.take(name).map_or_else(|| Ok(String::new()), |value| as_text(&path, value))
    }

    fn list(&mut self, name: &str) -> Result<Vec<Value>, String> {
        match self.take(name) {
            None => Ok(vec![]),
            Some(Value::List(values)) => Ok(values),
            Some(_) => Err(format!("{} is not a list", self.path(name))),
        }
    }

    fn texts(&mut self, name: &str) -> Result<Vec<String>, String> {
        let path = self.path(name);
        self.list(name)?.into_iter().map(|value| as_text(&path, value)).collect()
    }

    fn number(&mut self, name: &str) -> Result<Option<u32>, String> {
        let path = self.path(name);
        self.take(name).map(|value| as_number(&path, &value)).transpose()
    }

    fn annotations(&mut self, needs: &mut Needs) -> Result<BTreeMap<String, String>, String> {
        let Some(value) = self.take("annotations") else { return Ok(BTreeMap::new()) };
        let path = self.path("annotations");
        let fields = Self::of(&path, value)?;
        if !fields.map.is_empty() {
            needs.at_least((0, 6, 0));
        }
        let read = |(name, value): (String, Value)| {
            let path = format!("{path}.{name}");
            Ok((name, as_text(&path, value)?))
        };
        fields.map.into_iter().map(read).collect()
    }

    fn edits(&mut self, needs: &mut Needs) -> Result<Edits, String> {
        let Some(value) = self.take("containerEdits") else { return Ok(Edits::default()) };
        let mut fields = Self::of(&self.path("containerEdits"), value)?;
        let env = fields.env()?;
        let nodes = fields.each("deviceNodes", |fields| fields.node(needs))?;
        let mounts = fields.each("mounts", |fields| fields.mount(needs))?;
        let mut groups = vec![];
        let path = fields.path("additionalGids");
        for value in fields.list("additionalGids")? {
            needs.at_least((0, 7, 0));
            groups.push(as_number(&path, &value)?);
        }
        let mut others = vec![];
        let hooks = fields.each("hooks", Self::hook)?;
        if !fields.each("netDevices", Self::interface)?.is_empty() {
            needs.at_least((1, 1, 0));
            others.push("network devices");
        }
        if let Some(value) = fields.take("intelRdt") {
            needs.at_least((0, 7, 0));
            let rdt = Self::of(&fields.path("intelRdt"), value)?;
            if ["schemata", "enableMonitoring"].iter().any(|name| rdt.map.contains_key(*name)) {
                needs.at_least((1, 1, 0));
            }
            others.push("classes of service of the processor's caches (intelRdt)");
        }
        fields.end()?;
        Ok(Edits { env, nodes, mounts, groups, hooks, others })
    }

    fn env(&mut self) -> Result<Vec<String>, String> {
        let env = self.texts("env")?;
        match env.iter().find(|variable| variable.find('=').unwrap_or(0) == 0) {
            Some(bad) => Err(format!("{} has {bad:?}, which is not NAME=VALUE", self.path("env"))),
            None => Ok(env),
        }
    }

    /// Reads a list of maps.
    fn each<T>(
        &mut self,
        name: &str,
        mut read: impl FnMut(&mut Self) -> Result<T, String>,
    ) -> Result<Vec<T>, String> {
        let path = self.path(name);
        let mut all = vec![];
        for (at, value) in self.list(name)?.into_iter().enumerate() {
            let mut fields = Self::of(&format!("{path}[{at}]"), value)?;
            all.push(read(&mut fields)?);
            fields.end()?;
        }
        Ok(all)
    }

    fn node(&mut self, needs: &mut Needs) -> Result<Node, String> {
        let path = self.required("path")?;
        let host_path = Some(self.text("hostPath")?).filter(|path| !path.is_empty());
        if host_path.is_some() {
            needs.at_least((0, 5, 0));
        }
        let kind = self.text("type")?;
        if !matches!(kind.as_str(), "" | "b" | "c" | "u" | "p") {
            return Err(format!("{} is b, c, u or p, not {kind:?}", self.path("type")));
        }
        let permissions = self.text("permissions")?;
        if !permissions.chars().all(|c| matches!(c, 'r' | 'w' | 'm')) {
            let at = self.path("permissions");
            return Err(format!("{at} consists of r, w and m, and is {permissions:?}"));
        }
        Ok(Node {
            path,
            host_path: host_path.map(PathBuf::from),
            kind,
            major: self.number("major")?.unwrap_or_default(),
            minor: self.number("minor")?.unwrap_or_default(),
            mode: self.number("fileMode")?,
            permissions,
            uid: self.number("uid")?,
            gid: self.number("gid")?,
        })
    }

    fn mount(&mut self, needs: &mut Needs) -> Result<Mount, String> {
        let mount = Mount {
            host_path: self.required("hostPath")?,
            path: self.required("containerPath")?,
            options: self.texts("options")?,
            kind: self.text("type")?,
        };
        if !mount.kind.is_empty() {
            needs.at_least((0, 4, 0));
        }
        Ok(mount)
    }

    fn hook(&mut self) -> Result<Hook, String> {
        let name = self.required("hookName")?;
        let known = [
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        ];
        if !known.contains(&name.as_str()) {
            return Err(format!("{} {name:?} is not known", self.path("hookName")));
        }
        Ok(Hook {
            name,
            path: self.required("path")?.into(),
            args: self.texts("args")?,
            env: self.env()?,
            timeout: self.number("timeout")?,
        })
    }

    fn interface(&mut self) -> Result<(), String> {
        self.required("hostInterfaceName")?;
        self.required("name").map(drop)
    }

    fn required(&mut self, name: &str) -> Result<String, String> {
        let text = self.text(name)?;
        if text.is_empty() {
            return Err(format!("{} is missing", self.path(name)));
        }
        Ok(text)
    }

    fn end(self) -> Result<(), String> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(name) => Err(format!("the field {} is not known", self.path(name))),
        }
    }
}

/// Text may be written without quotes even where it looks like something else.
fn as_text(path: &str, value: Value) -> Result<String, String> {
    let Value::Scalar { text, quoted } = value else {
        return Err(format!("{path} is not text"));
    };
    if quoted {
        return Ok(text);
    }
    // The words that YAML had for these before version 1.2, which most programs that read such files still know.
    Ok(match text.as_str() {
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => "true".into(),
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => "false".into(),
        "~" | "null" | "Null" | "NULL" => String::new(),
        _ => text,
    })
}

/// Numbers begin with 0x, 0b, 0o or 0 as they do in Go.
fn as_number(path: &str, value: &Value) -> Result<u32, String> {
    let wrong = || format!("{path} is not a number from 0 to {}", u32::MAX);
    let Value::Scalar { text, quoted: false } = value else { return Err(wrong()) };
    let text = text.replace('_', "").to_ascii_lowercase();
    let (digits, radix) = match text.as_bytes() {
        [b'0', b'x', ..] => (&text[2..], 16),
        [b'0', b'o', ..] => (&text[2..], 8),
        [b'0', b'b', ..] => (&text[2..], 2),
        [b'0', _, ..] => (&text[1..], 8),
        _ => (text.as_str(), 10),
    };
    // A sign is no digit here.
    if !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(wrong());
    }
    u32::from_str_radix(digits, radix).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the specification has as its own first example, in short.
    const JSON: &str = r#"{
        "cdiVersion": "0.8.0", "kind": "vendor.com/device",
        "annotations": {"a": "1"},
        "devices": [{
            "name": "myDevice",
            "annotations": {"whatever": "false"},
            "containerEdits": {
                "env": ["A=b=c"],
                "deviceNodes": [
                    {"hostPath": "/vendor/dev/card1", "path": "/dev/card1", "type": "c", "major": 25, "minor": 25,
                     "fileMode": 384, "permissions": "rw", "uid": 1000, "gid": 1000},
                    {"path": "/dev/card-render1", "type": "c"}
                ],
                "additionalGids": [5, 0]
            }
        }],
        "containerEdits": {
            "mounts": [{"hostPath": "/bin/v", "containerPath": "/usr/bin/v", "options": ["ro", "bind"], "type": "bind"}],
            "hooks": [{"hookName": "createContainer", "path": "/bin/vendor-hook", "args": ["a"], "timeout": 3}]
        }
    }"#;

    #[test]
    fn all_that_the_specification_has_is_read() {
        let card = Node {
            path: "/dev/card1".into(),
            host_path: Some("/vendor/dev/card1".into()),
            kind: "c".into(),
            major: 25,
            minor: 25,
            mode: Some(0o600),
            permissions: "rw".into(),
            uid: Some(1000),
            gid: Some(1000),
        };
        let render = Node { path: "/dev/card-render1".into(), kind: "c".into(), ..Node::default() };
        let mount = Mount {
            host_path: "/bin/v".into(),
            path: "/usr/bin/v".into(),
            options: vec!["ro".into(), "bind".into()],
            kind: "bind".into(),
        };
        let hook = Hook {
            name: "createContainer".into(),
            path: "/bin/vendor-hook".into(),
            args: vec!["a".into()],
            env: vec![],
            timeout: Some(3),
        };
        let text = |name: &str, value: &str| BTreeMap::from([(name.into(), value.into())]);
        assert_eq!(
            parse(JSON).unwrap(),
            Spec {
                kind: "vendor.com/device".into(),
                annotations: text("a", "1"),
                devices: vec![Device {
                    name: "myDevice".into(),
                    annotations: text("whatever", "false"),
                    edits: Edits {
                        env: vec!["A=b=c".into()],
                        nodes: vec![card, render],
                        groups: vec![5, 0],
                        ..Edits::default()
                    },
                }],
                edits: Edits { mounts: vec![mount], hooks: vec![hook], ..Edits::default() },
            }
        );
    }

    #[test]
    fn yaml_is_read_with_what_is_not_quoted() {
        let spec = parse(
            "cdiVersion: 0.6.0\nkind: v.com/c\nannotations:\n  org.mobyproject.buildkit.device.autoallow: true\n\
             devices:\n- name: 0\n  annotations:\n    n: 12\n    off: no\n  containerEdits:\n    env:\n    - A=1\n    deviceNodes:\n    \
             - path: /dev/x\n      fileMode: 0640\n      major: 0x10\n      minor: 1_0\n",
        )
        .unwrap();
        assert_eq!(spec.annotations["org.mobyproject.buildkit.device.autoallow"], "true");
        let device = &spec.devices[0];
        assert_eq!((device.name.as_str(), device.annotations["n"].as_str()), ("0", "12"));
        assert_eq!(device.annotations["off"], "false");
        let node = &device.edits.nodes[0];
        assert_eq!((node.mode, node.major, node.minor), (Some(0o640), 16, 10));
    }

    /// A file with `text` in place of a part of one that is good.
    fn changed(from: &str, to: &str) -> Result<Spec, String> {
        assert!(JSON.contains(from), "{from}");
        parse(&JSON.replacen(from, to, 1))
    }

    #[test]
    fn malformed_files_say_where() {
        for (from, to, says) in [
            ("0.8.0", "0.9.0", "the version \"0.9.0\" is not known"),
            ("0.8.0", "0.8", "the version \"0.8\" is not known"),
            ("0.8.0", "0.6.0", "what it uses needs cdiVersion 0.7.0, and it says 0.6.0"),
            ("vendor.com/device", "device", "the kind \"device\" is not of the form VENDOR/CLASS"),
            ("vendor.com/", "1/", "\"1\" cannot be the name of a vendor"),
            ("com/device", "com/a/b", "\"a/b\" cannot be the name of a class"),
            ("myDevice", "-x", "\"-x\" cannot be the name of a device"),
            ("A=b=c", "=b", "devices[0].containerEdits.env has \"=b\", which is not NAME=VALUE"),
            (
                "\"c\", \"major\"",
                "\"x\", \"major\"",
                "devices[0].containerEdits.deviceNodes[0].type is b, c, u or p",
            ),
            ("\"rw\"", "\"rx\"", "deviceNodes[0].permissions consists of r, w and m"),
            ("25,", "-1,", "deviceNodes[0].major is not a number from 0"),
            ("25,", "4294967296,", "deviceNodes[0].major is not a number from 0"),
            ("25,", "\"25\",", "deviceNodes[0].major is not a number from 0"),
            ("[5, 0]", "5", "devices[0].containerEdits.additionalGids is not a list"),
            ("/usr/bin/v", "", "containerEdits.mounts[0].containerPath is missing"),
            (
                "createContainer",
                "someday",
                "containerEdits.hooks[0].hookName \"someday\" is not known",
            ),
            ("\"hooks\"", "\"hook\"", "the field containerEdits.hook is not known"),
            ("{\"a\": \"1\"}", "{\"a\": [1]}", "annotations.a is not text"),
            ("{\"a\": \"1\"}", "7", "annotations is not a map of fields"),
        ] {
            let error = changed(from, to).unwrap_err();
            assert!(error.contains(says), "{to}: {error}");
        }
        for (text, says) in [
            ("", "the file is empty"),
            ("~", "the file is empty"),
            ("[]", "it is not a map of fields"),
            ("cdiVersion: 1.0.0\nkind: v/c\n", "there are no devices"),
            (
                "cdiVersion: 1.0.0\nkind: v/c\ndevices: [{name: a, containerEdits: {}}]",
                "the device \"a\" gives a step nothing",
            ),
            (
                "cdiVersion: 1.0.0\nkind: v/c\ndevices: [{name: a, containerEdits: {env: [A=1]}}, {name: a, containerEdits: {env: [A=1]}}]",
                "there are two devices \"a\"",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err(), says);
        }
    }

    #[test]
    fn what_a_file_uses_must_be_in_its_version() {
        let with = |version: &str, name: &str, edits: &str| {
            parse(&format!(
                "cdiVersion: {version}\nkind: v/c\ndevices: [{{name: {name}, containerEdits: {edits}}}]"
            ))
        };
        for (name, edits, first) in [
            ("a", "{env: [A=1]}", "0.3.0"),
            ("a", "{mounts: [{hostPath: /a, containerPath: /a, type: bind}]}", "0.4.0"),
            ("a", "{deviceNodes: [{path: /a, hostPath: /a}]}", "0.5.0"),
            ("1", "{env: [A=1]}", "0.5.0"),
            ("a", "{additionalGids: [1]}", "0.7.0"),
            ("a", "{intelRdt: {closID: x}}", "0.7.0"),
            ("a", "{netDevices: [{hostInterfaceName: a, name: b}]}", "1.1.0"),
        ] {
            let number = read_version(first).unwrap();
            for version in VERSIONS.iter().skip(2) {
                let (major, minor, patch) = *version;
                let read = with(&format!("v{major}.{minor}.{patch}"), name, edits);
                assert_eq!(read.is_ok(), *version >= number, "{edits} {version:?} {read:?}");
            }
        }
    }
}
