//! Arguments of `build` about the processes of `RUN`: what they are given, and what they may use.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args;
use slipway_engine::solver::DeviceGrants;

use crate::failure::Failure;
use crate::output::csv;

/// What processes are given and may use.
#[derive(Args, Debug, Default)]
pub(crate) struct StepArgs {
    /// Give a secret to steps that mount it: id=ID[,src=FILE|,env=NAME]
    ///
    /// Without a file or a name, it is the environment variable of that name, else the file of that name.
    #[arg(long = "secret", value_name = "SECRET", value_parser = secret)]
    pub(crate) secrets: Vec<SecretSpec>,
    /// Forward an SSH agent to steps that mount it: default, or ID[=SOCKET|KEY[,KEY…]]
    #[arg(long = "ssh", value_name = "AGENT", value_parser = ssh)]
    pub(crate) ssh: Vec<SshSpec>,
    /// Add a line to the /etc/hosts of steps: HOST:IP
    #[arg(long = "add-host", value_name = "HOST:IP", value_parser = host)]
    pub(crate) add_hosts: Vec<HostSpec>,
    /// Allow what steps may not do by themselves: network.host, security.insecure, device[=NAME[,alias=ALIAS]]
    #[arg(long, value_name = "ENTITLEMENT", value_parser = allow)]
    pub(crate) allow: Vec<Allow>,
    /// Look for the devices of RUN --device in this folder; can be repeated [default: /etc/cdi, /var/run/cdi and
    /// /etc/buildkit/cdi]
    #[arg(long = "cdi-spec-dir", value_name = "FOLDER")]
    pub(crate) device_folders: Vec<PathBuf>,
    /// Limit a resource of steps' processes: TYPE=SOFT[:HARD]
    #[arg(long = "ulimit", value_name = "LIMIT", value_parser = ulimit)]
    pub(crate) ulimits: Vec<String>,
    /// Size of /dev/shm in steps, such as 64m
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) shm_size: Option<u64>,
    /// Control group below which steps run
    #[arg(long, value_name = "GROUP")]
    pub(crate) cgroup_parent: Option<String>,
    /// Limit what each step may use: memory=, memory-swap=, cpu-shares=, cpu-period=, cpu-quota=, cpuset-cpus=,
    /// cpuset-mems=
    #[arg(long = "resource", value_name = "KEY=VALUE", value_parser = resource)]
    pub(crate) resources: Vec<(String, String)>,
    #[arg(short = 'm', long, hide = true)]
    memory: Option<String>,
    #[arg(long, hide = true, allow_hyphen_values = true)]
    memory_swap: Option<String>,
    #[arg(short = 'c', long, hide = true)]
    cpu_shares: Option<String>,
    #[arg(long, hide = true)]
    cpu_period: Option<String>,
    #[arg(long, hide = true)]
    cpu_quota: Option<String>,
    #[arg(long, hide = true)]
    cpuset_cpus: Option<String>,
    #[arg(long, hide = true)]
    cpuset_mems: Option<String>,
}

/// A secret and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SecretSpec {
    /// What steps call it.
    pub(crate) id: String,
    /// Where it is.
    pub(crate) from: SecretPlace,
}

/// Where a secret is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SecretPlace {
    /// In a file.
    File(PathBuf),
    /// In the environment.
    Variable(String),
    /// In the variable named like the secret if it is set, else in the file named so.
    Named,
}

/// An SSH agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SshSpec {
    /// What steps call it.
    pub(crate) id: String,
    /// Its socket, or private keys; none is the agent of the environment.
    pub(crate) paths: Vec<PathBuf>,
}

/// A host with its addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostSpec(Vec<String>);

/// What may be allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Allow {
    /// The host's network by name.
    NetworkHost,
    /// No sandbox.
    SecurityInsecure,
    /// Devices: which, or nothing for all.
    Device(String),
}

/// What the arguments come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct StepPlan {
    /// Attributes for the frontend.
    pub(crate) attrs: BTreeMap<String, String>,
    /// Secrets; of one id the last counts.
    pub(crate) secrets: Vec<SecretSpec>,
    /// Agents.
    pub(crate) ssh: Vec<SshSpec>,
    /// What is allowed.
    pub(crate) allow: Vec<Allow>,
    /// Where devices are described; empty for the usual folders.
    pub(crate) device_folders: Vec<PathBuf>,
}

impl StepArgs {
    /// Puts the arguments together.
    ///
    /// # Errors
    /// When a size is none.
    pub(crate) fn plan(&self) -> Result<StepPlan, Failure> {
        let mut attrs = BTreeMap::new();
        let mut put = |name: &str, value: String| {
            if !value.is_empty() {
                attrs.insert(name.to_owned(), value);
            }
        };
        let hosts: Vec<&str> =
            self.add_hosts.iter().flat_map(|host| &host.0).map(String::as_str).collect();
        put("add-hosts", hosts.join(","));
        put("ulimit", self.ulimits.join(","));
        put("shm-size", self.shm_size.map(|size| size.to_string()).unwrap_or_default());
        put("cgroup-parent", self.cgroup_parent.clone().unwrap_or_default());
        let own = [
            ("memory", &self.memory),
            ("memory-swap", &self.memory_swap),
            ("cpu-shares", &self.cpu_shares),
            ("cpu-period", &self.cpu_period),
            ("cpu-quota", &self.cpu_quota),
            ("cpuset-cpus", &self.cpuset_cpus),
            ("cpuset-mems", &self.cpuset_mems),
        ];
        let given = own.into_iter().filter_map(|(name, value)| {
            value.as_ref().map(|value| (name.to_owned(), value.clone()))
        });
        for (name, value) in self.resources.iter().cloned().chain(given) {
            let value = match name.as_str() {
                "memory" | "memory-swap" if value != "-1" => bytes(&value)
                    .map_err(|error| Failure::new(format!("--{name} {value:?}: {error}")))?
                    .to_string(),
                _ => value,
            };
            let attr = match name.as_str() {
                "memory-swap" => "memswap".to_owned(),
                other => other.replace('-', ""),
            };
            put(&attr, value);
        }
        Ok(StepPlan {
            attrs,
            secrets: self.secrets.clone(),
            ssh: self.ssh.clone(),
            allow: self.allow.clone(),
            device_folders: self.device_folders.clone(),
        })
    }
}

fn secret(text: &str) -> Result<SecretSpec, String> {
    let (mut id, mut file, mut variable, mut kind) = (None, None, None, None);
    for field in csv::fields(text)? {
        let (key, value) =
            field.split_once('=').ok_or_else(|| format!("expected KEY=VALUE, not {field:?}"))?;
        match key.to_ascii_lowercase().as_str() {
            "id" => id = Some(value.to_owned()),
            "src" | "source" => file = Some(value.to_owned()),
            "env" => variable = Some(value.to_owned()),
            "type" if matches!(value, "file" | "env") => kind = Some(value.to_owned()),
            "type" => return Err(format!("the type {value:?} is neither file nor env")),
            _ => return Err(format!("unknown key {key:?}; there are id, src, env and type")),
        }
    }
    let id = id.filter(|id| !id.is_empty()).ok_or("the id is missing")?;
    let from = match (file, variable, kind.as_deref()) {
        (Some(name), None, Some("env")) | (None, Some(name), _) => SecretPlace::Variable(name),
        (Some(path), None, _) => SecretPlace::File(path.into()),
        (Some(_), Some(_), _) => return Err("src and env contradict each other".into()),
        (None, None, Some("env")) => SecretPlace::Variable(id.clone()),
        (None, None, Some(_)) => SecretPlace::File(id.clone().into()),
        (None, None, None) => SecretPlace::Named,
    };
    Ok(SecretSpec { id, from })
}

fn ssh(text: &str) -> Result<SshSpec, String> {
    let (id, paths) = text.split_once('=').unwrap_or((text, ""));
    if id.is_empty() {
        return Err("the id is missing; name it default".into());
    }
    let paths = paths.split(',').filter(|path| !path.is_empty()).map(Into::into).collect();
    Ok(SshSpec { id: id.into(), paths })
}

fn host(text: &str) -> Result<HostSpec, String> {
    let (name, addresses) = text
        .split_once('=')
        .or_else(|| text.split_once(':'))
        .filter(|(name, _)| !name.is_empty())
        .ok_or("expected HOST:IP")?;
    let lines = addresses.split(',').map(|address| {
        let bare = address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address);
        if bare == "host-gateway" {
            return Err("host-gateway is not known here; give the address".to_owned());
        }
        let ip: IpAddr = bare.parse().map_err(|_| format!("{address:?} is no address"))?;
        Ok(format!("{name}={ip}"))
    });
    Ok(HostSpec(lines.collect::<Result<_, _>>()?))
}

fn allow(text: &str) -> Result<Allow, String> {
    match text {
        "network.host" => Ok(Allow::NetworkHost),
        "security.insecure" => Ok(Allow::SecurityInsecure),
        "device" => Ok(Allow::Device(String::new())),
        _ => match text.strip_prefix("device=") {
            // Only whether it can be read is of interest here.
            Some(device) => {
                DeviceGrants::default().add(device).map(|()| Allow::Device(device.into()))
            }
            None => Err("there are network.host, security.insecure and device".into()),
        },
    }
}

fn ulimit(text: &str) -> Result<String, String> {
    let usage = "expected TYPE=SOFT[:HARD]";
    let (name, values) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or(usage)?;
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let number = |text: &str| text.parse::<i64>().map_err(|_| usage.to_owned());
    Ok(format!("{name}={}:{}", number(soft)?, number(hard)?))
}

fn resource(text: &str) -> Result<(String, String), String> {
    let known = [
        "memory",
        "memory-swap",
        "cpu-shares",
        "cpu-period",
        "cpu-quota",
        "cpuset-cpus",
        "cpuset-mems",
    ];
    let (name, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    if !known.contains(&name) {
        return Err(format!("unknown resource {name:?}; there are {}", known.join(", ")));
    }
    Ok((name.into(), value.into()))
}

/// Reads a size in bytes with a unit of 1024s, as docker does.
fn bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let power = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 1,
        "m" | "mb" | "mib" => 2,
        "g" | "gb" | "gib" => 3,
        "t" | "tb" | "tib" => 4,
        _ => return Err(format!("unknown unit {unit:?}")),
    };
    let factor = 1_u64 << (10 * power);
    if let Ok(number) = digits.parse::<u64>() {
        return number.checked_mul(factor).ok_or_else(|| "too large".into());
    }
    match digits.parse::<f64>() {
        // Sizes with a fraction are small enough for a float.
        Ok(number) if number.is_finite() && number < 1e6 => Ok((number * factor as f64) as u64),
        _ => Err("expected a number of bytes, such as 64m".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, parse};

    fn plan(words: &[&str]) -> Result<StepPlan, String> {
        let words = ["slipway", "build"].iter().chain(words).chain(&["."]).map(Into::into);
        match parse(words).map_err(|error| error.to_string())?.command {
            Command::Build(args) => args.steps.plan().map_err(|error| error.message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_become_attributes() {
        let plan = plan(&[
            "--add-host",
            "a:10.0.0.1",
            "--add-host=b=[::1],10.0.0.2",
            "--ulimit",
            "nofile=1:2",
            "--ulimit=core=0",
            "--shm-size=1.5m",
            "--cgroup-parent",
            "p",
            "-m",
            "1g",
            "--memory-swap",
            "-1",
            "--resource",
            "cpu-shares=7",
            "--cpuset-cpus=0-1",
            "--cpu-quota",
            "5",
        ])
        .unwrap();
        let text: Vec<String> = plan.attrs.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(
            text,
            [
                "add-hosts=a=10.0.0.1,b=::1,b=10.0.0.2",
                "cgroup-parent=p",
                "cpuquota=5",
                "cpusetcpus=0-1",
                "cpushares=7",
                "memory=1073741824",
                "memswap=-1",
                "shm-size=1572864",
                "ulimit=nofile=1:2,core=0:0",
            ]
        );
    }

    #[test]
    fn secrets_and_agents_are_told_apart() {
        let plan = plan(&[
            "--secret",
            "id=a,src=f",
            "--secret=id=b,env=B",
            "--secret",
            "id=c",
            "--secret",
            "type=env,id=d,src=D",
            "--ssh",
            "default",
            "--ssh=k=/x,/y",
            "--allow",
            "security.insecure",
            "--allow=device",
            "--allow",
            "device=v.com/c=a,alias=b",
            "--cdi-spec-dir=/a",
        ])
        .unwrap();
        let places: Vec<_> = plan.secrets.into_iter().map(|secret| secret.from).collect();
        assert_eq!(
            places,
            [
                SecretPlace::File("f".into()),
                SecretPlace::Variable("B".into()),
                SecretPlace::Named,
                SecretPlace::Variable("D".into()),
            ]
        );
        assert_eq!((plan.ssh[1].id.as_str(), plan.ssh[1].paths.len()), ("k", 2));
        let devices = ["", "v.com/c=a,alias=b"].map(|text| Allow::Device(text.into()));
        assert_eq!(plan.allow[1..], devices);
        assert_eq!(plan.allow[0], Allow::SecurityInsecure);
        assert_eq!(plan.device_folders, [PathBuf::from("/a")]);
    }

    #[test]
    fn bad_values_are_refused() {
        for words in [
            ["--secret", "src=f"],
            ["--secret", "id=a,src=f,env=B"],
            ["--secret", "id=a,type=x"],
            ["--ssh", "=x"],
            ["--add-host", "a"],
            ["--add-host", "a:b"],
            ["--add-host", "a:host-gateway"],
            ["--allow", "everything"],
            ["--allow", "device=a,b=c"],
            ["--allow", "device=a,b"],
            ["--ulimit", "nofile"],
            ["--shm-size", "1q"],
            ["--resource", "disk=1"],
            ["-m", "much"],
        ] {
            assert!(plan(&words).is_err(), "{words:?}");
        }
    }
}
