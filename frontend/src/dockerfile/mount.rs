//! Values of `RUN --mount` and `RUN --device`.

use super::problem::{Problem, Result};
use super::suggest::{suggest, with_suggestion};
use crate::csv;
use slipway_spec::flag;

/// What is mounted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Kind {
    #[default]
    Bind,
    Cache,
    Tmpfs,
    Secret,
    Ssh,
}

const KINDS: [(&str, Kind); 5] = [
    ("bind", Kind::Bind),
    ("cache", Kind::Cache),
    ("tmpfs", Kind::Tmpfs),
    ("secret", Kind::Secret),
    ("ssh", Kind::Ssh),
];

impl Kind {
    fn name(self) -> &'static str {
        KINDS.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }
}

/// How a cache is shared by processes that run at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    Shared,
    Private,
    Locked,
}

const SHARINGS: [(&str, Sharing); 3] =
    [("shared", Sharing::Shared), ("private", Sharing::Private), ("locked", Sharing::Locked)];

const KEYS: [&str; 19] = [
    "type",
    "from",
    "source",
    "target",
    "readonly",
    "id",
    "sharing",
    "required",
    "size",
    "mode",
    "uid",
    "gid",
    "src",
    "dst",
    "destination",
    "ro",
    "rw",
    "readwrite",
    "env",
];

/// A mount, its values expanded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) kind: Kind,
    pub(crate) from: String,
    pub(crate) source: String,
    pub(crate) target: String,
    pub(crate) readonly: bool,
    /// Bytes; 0 for no limit.
    pub(crate) size: i64,
    pub(crate) id: String,
    pub(crate) sharing: Option<Sharing>,
    pub(crate) required: bool,
    pub(crate) env: Option<String>,
    pub(crate) mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
}

impl Mount {
    /// Returns whether it says whose the files are.
    pub(crate) fn has_owner(&self) -> bool {
        self.uid.is_some() || self.gid.is_some() || self.mode.is_some()
    }
}

/// Finds the stage, context or image that a mount names, before anything else of it is read: it must be known which
/// stages need each other. Empty when it names none.
pub(crate) fn from(value: &str) -> Result<String> {
    let mut from = String::new();
    for field in split(value)? {
        if let Some((key, value)) = field.split_once('=')
            && key.eq_ignore_ascii_case("from")
        {
            // A `$` at the very end is no variable.
            if value.find('$').is_some_and(|at| at + 1 < value.len()) {
                let message = format!(
                    "'{}' doesn't support variable expansion, define alias stage instead",
                    key.to_lowercase()
                );
                return Err(Problem::new(message));
            }
            value.clone_into(&mut from);
        }
    }
    Ok(from)
}

fn split(value: &str) -> Result<Vec<String>> {
    csv::fields(value)
        .map_err(|reason| Problem::new(format!("failed to parse csv mounts: {reason}")))
}

/// Reads a mount; `expand` puts values in place of variables.
pub(crate) fn parse(value: &str, expand: impl Fn(&str) -> Result<String>) -> Result<Mount> {
    let mut mount = Mount::default();
    let mut readonly = None;
    for field in split(value)? {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key.to_lowercase(), Some(expand(value)?)),
            None => (field.to_lowercase(), None),
        };
        match (key.as_str(), value) {
            ("readonly" | "ro", value) => readonly = Some(switch(&key, value)?),
            ("readwrite" | "rw", value) => readonly = Some(!switch(&key, value)?),
            ("required", value) => {
                if !matches!(mount.kind, Kind::Secret | Kind::Ssh) {
                    return Err(unexpected_for(&key, mount.kind));
                }
                mount.required = switch(&key, value)?;
            }
            (_, None) => {
                return Err(Problem::new(format!(
                    "invalid field '{field}' must be a key=value pair"
                )));
            }
            ("type", Some(value)) => {
                mount.kind = choose(&KINDS, &value, "mount type")?;
            }
            ("from", Some(value)) => mount.from = value,
            ("source" | "src", Some(value)) => mount.source = value,
            ("target" | "dst" | "destination", Some(value)) => mount.target = value,
            ("size", Some(value)) => {
                if mount.kind != Kind::Tmpfs {
                    return Err(unexpected_for(&key, mount.kind));
                }
                mount.size = size(&value).ok_or_else(|| invalid(&key, &value))?;
            }
            ("id", Some(value)) => mount.id = value,
            ("sharing", Some(value)) => {
                mount.sharing = Some(choose(&SHARINGS, &value, "sharing value")?);
            }
            ("mode", Some(value)) => mount.mode = Some(number(&key, &value, 8)?),
            ("uid", Some(value)) => mount.uid = Some(number(&key, &value, 10)?),
            ("gid", Some(value)) => mount.gid = Some(number(&key, &value, 10)?),
            ("env", Some(value)) => mount.env = Some(value),
            (_, Some(_)) => {
                let message = format!("unexpected key '{key}' in '{field}'");
                return Err(Problem::new(with_suggestion(message, suggest(&key, KEYS, true))));
            }
        }
    }
    mount.readonly = readonly.unwrap_or(!matches!(mount.kind, Kind::Cache | Kind::Tmpfs));
    mount.check()?;
    Ok(mount)
}

impl Mount {
    fn check(&self) -> Result<()> {
        let kind = self.kind.name();
        if matches!(self.kind, Kind::Bind | Kind::Tmpfs) {
            let given = [("mode", self.mode), ("uid", self.uid), ("gid", self.gid)];
            if let Some((key, _)) = given.into_iter().find(|(_, value)| value.is_some()) {
                return Err(Problem::new(format!("{key} not allowed for {kind:?} type mounts")));
            }
        }
        let problem = match self.kind {
            Kind::Secret if !self.from.is_empty() => "secret mount should not have a from",
            Kind::Secret if self.sharing.is_some() => "secret mount should not define sharing",
            Kind::Secret
                if self.source.is_empty() && self.target.is_empty() && self.id.is_empty() =>
            {
                "invalid secret mount. one of source, target required"
            }
            Kind::Secret if !self.source.is_empty() && !self.id.is_empty() => {
                "both source and id can't be set"
            }
            Kind::Cache => return Ok(()),
            _ if self.sharing.is_some() => {
                return Err(Problem::new(format!("invalid cache sharing set for {kind} mount")));
            }
            _ => return Ok(()),
        };
        Err(Problem::new(problem))
    }
}

fn unexpected_for(key: &str, kind: Kind) -> Problem {
    let message = format!("unexpected key '{key}' for mount type '{}'", kind.name());
    // Options are read from left to right, and what is allowed depends on the type seen so far.
    Problem::new(message).hint("type= must come before the options of that type")
}

fn invalid(key: &str, value: &str) -> Problem {
    Problem::new(format!("invalid value for {key}: {value}"))
}

fn switch(key: &str, value: Option<String>) -> Result<bool> {
    match value {
        None => Ok(true),
        Some(value) => flag::parse(&value).ok_or_else(|| invalid(key, &value)),
    }
}

fn choose<T: Copy>(options: &[(&str, T)], value: &str, what: &str) -> Result<T> {
    let lower = value.to_lowercase();
    let found = options.iter().find(|(name, _)| *name == lower);
    found.map(|(_, option)| *option).ok_or_else(|| {
        let suggestion = suggest(value, options.iter().map(|(name, _)| *name), true);
        Problem::new(with_suggestion(format!("unsupported {what} {value:?}"), suggestion))
    })
}

fn number(key: &str, value: &str, radix: u32) -> Result<u32> {
    // A sign would be accepted otherwise.
    let plain = value.bytes().all(|b| b.is_ascii_digit());
    u32::from_str_radix(value, radix)
        .ok()
        .filter(|_| plain)
        .ok_or_else(|| Problem::new(format!("invalid value {value} for {key}")))
}

/// Reads a size such as `64m` or `1.5GiB`, in bytes; units are powers of 1024.
pub(crate) fn size(text: &str) -> Option<i64> {
    let end = text.rfind(|c: char| c.is_ascii_digit() || c == '.' || c == ' ')?;
    let blank = text[end..].starts_with(' ');
    let (number, unit) = (&text[..if blank { end } else { end + 1 }], &text[end + 1..]);
    let number: f64 = number.parse().ok().filter(|number| *number >= 0.0)?;
    let unit = unit.to_lowercase();
    let power = match unit.chars().next() {
        None => 0,
        Some('b') if unit.len() == 1 => 0,
        Some(first) => {
            let power = "kmgtp".find(first)? + 1;
            if !matches!(&unit[1..], "" | "b" | "ib") {
                return None;
            }
            i32::try_from(power).ok()?
        }
    };
    #[expect(clippy::cast_possible_truncation, reason = "a size that is too large is the largest")]
    let bytes = (number * 1024f64.powi(power)) as i64;
    Some(bytes)
}

/// Reads a device.
pub(crate) fn parse_device(value: &str) -> Result<slipway_spec::llb::pb::CdiDevice> {
    let fields = csv::fields(value)
        .map_err(|reason| Problem::new(format!("failed to parse csv devices: {reason}")))?;
    let mut name = String::new();
    let mut required = false;
    for field in fields {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key.to_lowercase(), Some(value)),
            None => (field.to_lowercase(), None),
        };
        match (key.as_str(), value) {
            ("required", value) => required = switch(&key, value.map(str::to_owned))?,
            ("name", Some(_)) if !name.is_empty() => {
                return Err(Problem::new(format!("device name already set to {name}")));
            }
            ("name", Some(value)) => value.clone_into(&mut name),
            // A device may be called `vendor/class=name`.
            _ if name.is_empty() => name = field,
            (_, None) => {
                return Err(Problem::new(format!(
                    "invalid field '{field}' must be a key=value pair"
                )));
            }
            (_, Some(_)) => {
                let message = format!("unexpected key '{key}' in '{field}'");
                let suggestion = suggest(&key, ["name", "required"], true);
                return Err(Problem::new(with_suggestion(message, suggestion)));
            }
        }
    }
    Ok(slipway_spec::llb::pb::CdiDevice { name, optional: !required })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &str) -> Result<Mount> {
        parse(value, |text| Ok(text.replace("$V", "v")))
    }

    #[test]
    fn options_are_read() {
        let mount = read(
            "TYPE=Cache,id=a-$V,dst=/x,\"source=a,b\",sharing=LOCKED,uid=1,gid=2,mode=0700,ro",
        )
        .unwrap();
        let expected = Mount {
            kind: Kind::Cache,
            id: "a-v".into(),
            target: "/x".into(),
            source: "a,b".into(),
            sharing: Some(Sharing::Locked),
            uid: Some(1),
            gid: Some(2),
            mode: Some(0o700),
            readonly: true,
            ..Mount::default()
        };
        assert_eq!(mount, expected);
        assert_eq!(read("type=secret,id=x,required,env=$V").unwrap().env.as_deref(), Some("v"));
        assert_eq!(read("type=tmpfs,target=/t,size=1.5g").unwrap().size, 1_610_612_736);
    }

    #[test]
    fn binds_are_read_only_and_caches_are_not() {
        for (value, readonly) in [
            ("target=/x", true),
            ("target=/x,rw", false),
            ("target=/x,readwrite=false", true),
            ("target=/x,ro=0", false),
            ("type=cache,target=/x", false),
            ("type=cache,target=/x,readonly", true),
            ("type=tmpfs,target=/x", false),
            ("type=secret,id=x", true),
        ] {
            assert_eq!(read(value).unwrap().readonly, readonly, "{value}");
        }
    }

    #[test]
    fn mistakes_are_told() {
        for (value, message) in [
            ("", "failed to parse csv mounts: the list is empty"),
            ("type=foo", "unsupported mount type \"foo\""),
            ("type=cach", "unsupported mount type \"cach\" (did you mean cache?)"),
            ("target", "invalid field 'target' must be a key=value pair"),
            ("taget=/x", "unexpected key 'taget' in 'taget=/x' (did you mean target?)"),
            (
                "type=cache,sharing=lock",
                "unsupported sharing value \"lock\" (did you mean locked?)",
            ),
            ("size=1,type=tmpfs", "unexpected key 'size' for mount type 'bind'"),
            ("required,type=ssh", "unexpected key 'required' for mount type 'bind'"),
            ("type=tmpfs,size=x", "invalid value for size: x"),
            ("ro=x", "invalid value for ro: x"),
            ("uid=1", "uid not allowed for \"bind\" type mounts"),
            ("type=tmpfs,mode=1", "mode not allowed for \"tmpfs\" type mounts"),
            ("type=cache,mode=9", "invalid value 9 for mode"),
            ("type=cache,uid=-1", "invalid value -1 for uid"),
            ("type=secret,from=x,id=y", "secret mount should not have a from"),
            ("type=secret,sharing=shared,id=y", "secret mount should not define sharing"),
            ("type=secret", "invalid secret mount. one of source, target required"),
            ("type=secret,source=a,id=b", "both source and id can't be set"),
            ("type=ssh,sharing=shared", "invalid cache sharing set for ssh mount"),
            ("sharing=shared", "invalid cache sharing set for bind mount"),
        ] {
            assert_eq!(read(value).unwrap_err().message, message, "{value}");
        }
    }

    #[test]
    fn from_is_known_before_variables_are() {
        assert_eq!(from("type=bind,FROM=a,target=$X").unwrap(), "a");
        assert_eq!(from("from=a$").unwrap(), "a$");
        assert_eq!(from("type=$T").unwrap(), "");
        assert_eq!(
            from("from=$X").unwrap_err().message,
            "'from' doesn't support variable expansion, define alias stage instead"
        );
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, expected) in [
            ("0", Some(0)),
            ("10", Some(10)),
            ("10b", Some(10)),
            ("1k", Some(1024)),
            ("1 KiB", Some(1024)),
            ("2MB", Some(2 << 20)),
            (".5g", Some(1 << 29)),
            ("1e", None),
            ("", None),
            ("x", None),
            ("-1", None),
            ("1kk", None),
            ("1kibi", None),
        ] {
            assert_eq!(size(text), expected, "{text:?}");
        }
    }

    #[test]
    fn devices_are_read() {
        let read = |text| parse_device(text).map(|device| (device.name, device.optional));
        assert_eq!(read("vendor/class=dev,required").unwrap(), ("vendor/class=dev".into(), false));
        assert_eq!(read("name=a,required=false").unwrap(), ("a".into(), true));
        assert_eq!(read("a,name=b").unwrap_err().message, "device name already set to a");
        assert_eq!(
            read("a,requird=1").unwrap_err().message,
            "unexpected key 'requird' in 'requird=1' (did you mean required?)"
        );
        assert!(read("a,b").unwrap_err().message.starts_with("invalid field 'b'"));
    }
}
