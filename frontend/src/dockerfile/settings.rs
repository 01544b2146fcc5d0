//! The frontend attributes, read once and checked.

use std::collections::BTreeMap;

use slipway_spec::Platform;
use slipway_spec::llb::pb;

use super::problem::{Problem, Result};
use crate::{FrontendRequest, ResolveMode};

/// What the request asks for.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// The Dockerfile's path in its source.
    pub(crate) filename: String,
    /// The name of the local source that has the Dockerfile.
    pub(crate) dockerfile_source: String,
    pub(crate) target: Option<String>,
    /// At least one.
    pub(crate) platforms: Vec<Platform>,
    /// Whether nobody asked for a platform.
    pub(crate) implicit_platform: bool,
    pub(crate) multi_platform: bool,
    pub(crate) build_platform: Platform,
    pub(crate) build_args: BTreeMap<String, String>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) no_cache: NoCache,
    pub(crate) resolve_mode: ResolveMode,
    pub(crate) proxy: Option<pb::ProxyEnv>,
    pub(crate) network: pb::NetMode,
    pub(crate) hostname: String,
    pub(crate) extra_hosts: Vec<pb::HostIp>,
    pub(crate) ulimits: Vec<pb::Ulimit>,
    pub(crate) cgroup_parent: String,
    /// Bytes; 0 for the default.
    pub(crate) shm_size: i64,
}

/// Which stages run even if their results are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NoCache {
    Never,
    Always,
    Stages(Vec<String>),
}

impl NoCache {
    pub(crate) fn applies_to(&self, stage: Option<&str>) -> bool {
        match self {
            Self::Never => false,
            Self::Always => true,
            Self::Stages(names) => {
                stage.is_some_and(|stage| names.iter().any(|name| name.eq_ignore_ascii_case(stage)))
            }
        }
    }
}

const RESOURCES: [&str; 7] =
    ["memory", "memswap", "cpushares", "cpuperiod", "cpuquota", "cpusetcpus", "cpusetmems"];

impl Settings {
    pub(crate) fn read(request: &FrontendRequest) -> Result<Self> {
        let attrs = &request.attrs;
        refuse_unsupported(attrs)?;
        let get = |key: &str| attrs.get(key).map(String::as_str).filter(|value| !value.is_empty());
        let prefixed = |prefix: &str| -> BTreeMap<String, String> {
            attrs
                .iter()
                .filter_map(|(key, value)| Some((key.strip_prefix(prefix)?.into(), value.clone())))
                .collect()
        };
        let build_args = prefixed("build-arg:");
        let arg = |name: &str| build_args.get(name).map(String::as_str);
        let mut platforms: Vec<Platform> = vec![];
        for text in get("platform").into_iter().flat_map(|list| list.split(',')) {
            let platform = text
                .trim()
                .parse()
                .map_err(|e| Problem::new(format!("failed to parse target platform: {e}")))?;
            if !platforms.contains(&platform) {
                platforms.push(platform);
            }
        }
        let implicit_platform = platforms.is_empty();
        if implicit_platform {
            platforms.push(request.build_platform.normalized());
        }
        let multi_platform = match arg("BUILDKIT_MULTI_PLATFORM")
            .or(get("multi-platform"))
            .filter(|v| !v.is_empty())
        {
            Some(text) => go_bool(text).ok_or_else(|| {
                Problem::new(format!("invalid boolean value for multi-platform: {text:?}"))
            })?,
            None => platforms.len() > 1,
        };
        if !multi_platform && platforms.len() > 1 {
            return Err(Problem::new(
                "conflicting config: returning multiple target platforms is not allowed",
            ));
        }
        let resolve_mode = match get("image-resolve-mode") {
            None | Some("default") => ResolveMode::Default,
            Some("pull") => ResolveMode::Pull,
            Some("local") => ResolveMode::Local,
            Some(other) => {
                return Err(Problem::new(format!("invalid image-resolve-mode: {other}")));
            }
        };
        let no_cache = match attrs.get("no-cache").map(String::as_str) {
            None => NoCache::Never,
            Some("") => NoCache::Always,
            Some(list) => {
                NoCache::Stages(list.split(',').map(|name| name.trim().to_owned()).collect())
            }
        };
        let network = match get("force-network-mode") {
            None | Some("sandbox") => pb::NetMode::Unset,
            Some("none") => pb::NetMode::None,
            Some("host") => pb::NetMode::Host,
            Some(other) => return Err(Problem::new(format!("invalid netmode: {other}"))),
        };
        let shm_size = match get("shm-size") {
            Some(text) => text
                .parse()
                .ok()
                .filter(|size| *size >= 0)
                .ok_or_else(|| Problem::new(format!("invalid shm-size: {text:?}")))?,
            None => 0,
        };
        Ok(Self {
            filename: get("filename").unwrap_or("Dockerfile").into(),
            dockerfile_source: get("dockerfilekey").unwrap_or("dockerfile").into(),
            target: get("target").map(Into::into),
            platforms,
            implicit_platform,
            multi_platform,
            build_platform: request.build_platform.normalized(),
            labels: prefixed("label:"),
            no_cache,
            resolve_mode,
            proxy: proxy(&build_args),
            network,
            hostname: arg("BUILDKIT_SANDBOX_HOSTNAME")
                .or(get("hostname"))
                .unwrap_or_default()
                .into(),
            extra_hosts: extra_hosts(get("add-hosts").unwrap_or_default())?,
            ulimits: ulimits(get("ulimit").unwrap_or_default())?,
            cgroup_parent: get("cgroup-parent").unwrap_or_default().into(),
            shm_size,
            build_args,
        })
    }
}

fn refuse_unsupported(attrs: &BTreeMap<String, String>) -> Result<()> {
    let refuse = |what: String| Err(Problem::unsupported(&what));
    for (key, value) in attrs {
        if let Some(name) = key.strip_prefix("context:") {
            return refuse(format!("the named context {name:?}"));
        }
        match key.as_str() {
            "requestid" if !value.is_empty() => {
                return refuse(format!("the frontend request {value:?}"));
            }
            "contextkey" | "contextsubdir" if !value.is_empty() => {
                return refuse(format!("the frontend attribute {key:?}"));
            }
            "context" if is_remote(value) => {
                return refuse(format!("the remote build context {value:?}"));
            }
            "attest:sbom" => return refuse("an SBOM attestation".into()),
            "override-copy-image" => {
                return Err(Problem::new(
                    "support for \"override-copy-image\" was removed in BuildKit 0.11",
                ));
            }
            key if RESOURCES.contains(&key) && !value.is_empty() => {
                return refuse(format!("the resource limit {key:?}"));
            }
            _ => {}
        }
    }
    if attrs.get("build-arg:BUILDKIT_DISABLE_FILEOP").and_then(|value| go_bool(value)) == Some(true)
    {
        return Err(Problem::new(
            "support for \"BUILDKIT_DISABLE_FILEOP\" build-arg was removed in BuildKit 0.11",
        ));
    }
    if let Some(image) =
        attrs.get("build-arg:BUILDKIT_SYNTAX").filter(|image| !is_builtin_syntax(image))
    {
        return refuse(format!("the frontend image {image:?} of BUILDKIT_SYNTAX"));
    }
    Ok(())
}

/// Returns whether this program reads what that frontend image reads.
pub(crate) fn is_builtin_syntax(image: &str) -> bool {
    let name = image.split(' ').next().unwrap_or_default();
    if matches!(name, "" | "dockerfile.v0") {
        return true;
    }
    let name = name.split_once('@').map_or(name, |(name, _)| name);
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    let repository = name.split_once(':').map_or(name, |(repository, _)| repository);
    matches!(repository, "docker/dockerfile" | "docker/dockerfile-upstream")
}

/// Returns whether a context is fetched rather than sent.
fn is_remote(value: &str) -> bool {
    ["git://", "ssh://", "http://", "https://", "github.com/", "git@"]
        .iter()
        .any(|prefix| value.starts_with(prefix))
        || is_git(value)
}

/// Returns whether a source of `ADD` names a git repository.
pub(crate) fn is_git(source: &str) -> bool {
    if source.starts_with("git://") || source.starts_with("ssh://") {
        return true;
    }
    if source.starts_with("http://") || source.starts_with("https://") {
        let path = source.split(['?', '#']).next().unwrap_or_default();
        return path.ends_with(".git");
    }
    if source.starts_with("./") || source.starts_with("../") {
        return false;
    }
    // user@host:path
    let Some((user, rest)) = source.split_once('@') else { return false };
    let Some((host, path)) = rest.split_once(':') else { return false };
    let word = |text: &str, extra: &[char]| {
        !text.is_empty()
            && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || extra.contains(&c))
    };
    word(user, &['_']) && word(host, &['.']) && !path.is_empty()
}

/// Reads a boolean as Go's `strconv.ParseBool` does.
pub(crate) fn go_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

fn proxy(build_args: &BTreeMap<String, String>) -> Option<pb::ProxyEnv> {
    let mut proxy = pb::ProxyEnv::default();
    let mut any = false;
    // Lower case sorts after upper case, and so wins.
    for (key, value) in build_args {
        let field = match key.to_ascii_lowercase().as_str() {
            "http_proxy" => &mut proxy.http_proxy,
            "https_proxy" => &mut proxy.https_proxy,
            "ftp_proxy" => &mut proxy.ftp_proxy,
            "no_proxy" => &mut proxy.no_proxy,
            "all_proxy" => &mut proxy.all_proxy,
            _ => continue,
        };
        field.clone_from(value);
        any = true;
    }
    any.then_some(proxy)
}

/// Splits a line of comma-separated values, where quotes protect commas.
fn csv(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match (c, fields.last_mut()) {
            ('"', _) => quoted = !quoted,
            (',', _) if !quoted => fields.push(String::new()),
            (c, Some(field)) => field.push(c),
            (_, None) => {}
        }
    }
    fields.retain(|field| !field.is_empty());
    fields
}

fn extra_hosts(text: &str) -> Result<Vec<pb::HostIp>> {
    let host = |field: &String| {
        let invalid =
            || Problem::new(format!("invalid value {field:?} in add-hosts: expected host=address"));
        let field = field.to_lowercase();
        let (host, ip) = field.split_once('=').ok_or_else(invalid)?;
        let ip: std::net::IpAddr = ip.parse().map_err(|_| invalid())?;
        Ok(pb::HostIp { host: host.into(), ip: ip.to_string() })
    };
    csv(text).iter().map(host).collect()
}

fn ulimits(text: &str) -> Result<Vec<pb::Ulimit>> {
    let limit = |field: &String| {
        let invalid =
            || Problem::new(format!("invalid ulimit {field:?}: expected name=soft[:hard]"));
        let (name, values) = field.split_once('=').ok_or_else(invalid)?;
        let (soft, hard) = values.split_once(':').unwrap_or((values, values));
        let number = |text: &str| text.parse::<i64>().map_err(|_| invalid());
        Ok(pb::Ulimit { name: name.into(), soft: number(soft)?, hard: number(hard)? })
    };
    csv(text).iter().map(limit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(attrs: &[(&str, &str)]) -> Result<Settings> {
        let attrs = attrs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        Settings::read(&FrontendRequest {
            attrs,
            build_platform: Platform::new("linux", "amd64", None),
        })
    }

    #[test]
    fn defaults() {
        let settings = read(&[]).unwrap();
        assert_eq!((settings.filename.as_str(), settings.platforms.len()), ("Dockerfile", 1));
        assert!(settings.implicit_platform && !settings.multi_platform);
        assert_eq!(settings.no_cache, NoCache::Never);
    }

    #[test]
    fn values_are_read() {
        let settings = read(&[
            ("platform", "linux/amd64,linux/arm64/v8,linux/arm64"),
            ("no-cache", "A,b"),
            ("build-arg:HTTP_PROXY", "upper"),
            ("build-arg:http_proxy", "lower"),
            ("add-hosts", "\"Host=::1\",b=10.0.0.1"),
            ("ulimit", "nofile=1:2,core=0"),
        ])
        .unwrap();
        assert!(settings.multi_platform && settings.platforms.len() == 2);
        assert!(settings.no_cache.applies_to(Some("a")) && !settings.no_cache.applies_to(None));
        assert_eq!(settings.proxy.unwrap().http_proxy, "lower");
        assert_eq!(settings.extra_hosts[0], pb::HostIp { host: "host".into(), ip: "::1".into() });
        assert_eq!(settings.ulimits[1], pb::Ulimit { name: "core".into(), soft: 0, hard: 0 });
    }

    #[test]
    fn mistakes_and_gaps_are_told() {
        for (key, value, message) in [
            (
                "requestid",
                "frontend.outline",
                "the frontend request \"frontend.outline\" is not supported yet",
            ),
            ("context:x", "docker-image://y", "the named context \"x\" is not supported yet"),
            (
                "context",
                "https://x/y.git",
                "the remote build context \"https://x/y.git\" is not supported yet",
            ),
            (
                "build-arg:BUILDKIT_SYNTAX",
                "me/x",
                "the frontend image \"me/x\" of BUILDKIT_SYNTAX is not supported yet",
            ),
            ("image-resolve-mode", "x", "invalid image-resolve-mode: x"),
            ("multi-platform", "x", "invalid boolean value for multi-platform: \"x\""),
            ("force-network-mode", "x", "invalid netmode: x"),
            ("memory", "1", "the resource limit \"memory\" is not supported yet"),
        ] {
            assert_eq!(read(&[(key, value)]).unwrap_err().message, message);
        }
        let conflict =
            read(&[("platform", "linux/amd64,linux/arm64"), ("multi-platform", "false")]);
        assert!(conflict.unwrap_err().message.starts_with("conflicting config"));
    }

    #[test]
    fn syntax_images_that_are_built_in() {
        for image in [
            "docker/dockerfile:1",
            "docker.io/docker/dockerfile:1.7-labs",
            "docker/dockerfile",
            "dockerfile.v0",
        ] {
            assert!(is_builtin_syntax(image), "{image}");
        }
        for image in ["me/dockerfile", "localhost:5000/docker/dockerfile", "docker/dockerfile2"] {
            assert!(!is_builtin_syntax(image), "{image}");
        }
    }

    #[test]
    fn git_sources() {
        for source in [
            "git://x/y",
            "https://x/y.git",
            "https://x/y.git#main:sub",
            "git@host.org:a/b",
            "ssh://x",
        ] {
            assert!(is_git(source), "{source}");
        }
        for source in
            ["https://x/y", "github.com/x/y", "./a@b:c", "a/b@c", "https://x/y.git/", "a@b"]
        {
            assert!(!is_git(source), "{source}");
        }
    }
}
