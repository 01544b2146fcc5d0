//! The frontend attributes, read once and checked.

use slipway_spec::flag;
use std::collections::BTreeMap;

use slipway_spec::Platform;
use slipway_spec::llb::pb;

use super::lint::{LintOptions, parse_options};
use super::problem::{Problem, Result};
use super::suggest::{suggest, with_suggestion};
use crate::{CacheImport, FrontendRequest, ResolveMode, Scanner, attest, csv};

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
    /// What is asked instead of a build.
    pub(crate) request_id: Option<String>,
    /// Which rules count, whatever the file says.
    pub(crate) lint: Option<LintOptions>,
    /// Bytes; 0 for the default.
    pub(crate) shm_size: i64,
    pub(crate) resources: Option<pb::LinuxResources>,
    /// What separates the cache mounts of this build from those of others; may be empty.
    pub(crate) cache_namespace: String,
    /// Whether the Dockerfile is sent by the client even if the context is not.
    pub(crate) force_local_dockerfile: bool,
    /// What the context's attribute says: where it is fetched from, or nothing of meaning.
    pub(crate) remote_context: String,
    /// The folder of a fetched context that counts.
    pub(crate) context_subdir: Option<String>,
    /// What `BUILDKIT_CONTEXT_KEEP_GIT_DIR` says.
    pub(crate) keep_git_dir: Option<bool>,
    /// Named contexts as given, by name and perhaps platform.
    pub(crate) contexts: BTreeMap<String, String>,
    /// What is known of frontend inputs, by name.
    pub(crate) input_metadata: BTreeMap<String, String>,
    /// Hints for what to send anew of named folders, by context.
    pub(crate) shared_keys: BTreeMap<String, String>,
    /// Sessions of local folders that come from another client.
    pub(crate) local_sessions: BTreeMap<String, String>,
    /// The client's session.
    pub(crate) session: Option<String>,
    /// Whether graphs may have merge ops.
    pub(crate) merge: bool,
    pub(crate) cache_imports: Vec<CacheImport>,
    pub(crate) scanner: Option<Scanner>,
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

impl Settings {
    pub(crate) fn read(request: &FrontendRequest) -> Result<Self> {
        let attrs = &request.attrs;
        refuse_unsupported(attrs)?;
        let known_caps = check_capabilities(attrs.get("frontend.caps").map_or("", String::as_str));
        known_caps?;
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
            Some(text) => flag::parse(text).ok_or_else(|| {
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
            request_id: get("requestid").map(Into::into),
            lint: arg("BUILDKIT_DOCKERFILE_CHECK")
                .map(parse_options)
                .transpose()
                .map_err(|p| p.prefixed("failed to parse build-arg:BUILDKIT_DOCKERFILE_CHECK"))?,
            resources: resources(attrs)?,
            cache_namespace: arg("BUILDKIT_CACHE_MOUNT_NS").unwrap_or_default().into(),
            force_local_dockerfile: attrs.contains_key("dockerfilekey"),
            remote_context: attrs
                .get(get("contextkey").unwrap_or("context"))
                .cloned()
                .unwrap_or_default(),
            context_subdir: attrs.get("contextsubdir").cloned(),
            keep_git_dir: arg("BUILDKIT_CONTEXT_KEEP_GIT_DIR").and_then(flag::parse),
            contexts: prefixed("context:"),
            input_metadata: prefixed("input-metadata:"),
            shared_keys: prefixed("sharedkey:localdir:"),
            local_sessions: prefixed("local-sessionid:"),
            session: None,
            merge: false,
            cache_imports: cache_imports(attrs)?,
            scanner: attest::requested(attrs).map_err(Problem::new)?.sbom,
            build_args,
        })
    }
}

fn refuse_unsupported(attrs: &BTreeMap<String, String>) -> Result<()> {
    if attrs.get("override-copy-image").is_some_and(|image| !image.is_empty()) {
        return Err(Problem::new(
            "support for \"override-copy-image\" was removed in BuildKit 0.11",
        ));
    }
    if attrs.get("build-arg:BUILDKIT_DISABLE_FILEOP").and_then(|value| flag::parse(value))
        == Some(true)
    {
        return Err(Problem::new(
            "support for \"BUILDKIT_DISABLE_FILEOP\" build-arg was removed in BuildKit 0.11",
        ));
    }
    Ok(())
}

/// What this frontend can do that a caller may insist on.
const CAPABILITIES: [&str; 4] = [
    "moby.buildkit.frontend.inputs",
    "moby.buildkit.frontend.subrequests",
    "moby.buildkit.frontend.contexts",
    "moby.buildkit.frontend.gitquerystring",
];

/// Refuses what the caller insists on and is not known; `+forward` leaves it to a frontend that is an image.
fn check_capabilities(list: &str) -> Result<()> {
    for wanted in list.split(',').filter(|wanted| !wanted.is_empty()) {
        let name = wanted.split('+').next().unwrap_or_default();
        if !CAPABILITIES.contains(&name) && !wanted.contains("+forward") {
            return Err(Problem::new(format!("unsupported frontend capability {name}")));
        }
    }
    Ok(())
}

/// Refuses what was left to a frontend that is an image, when none is used.
pub(crate) fn check_forwarded(attrs: &BTreeMap<String, String>) -> Result<()> {
    let list = attrs.get("frontend.caps").map_or("", String::as_str);
    check_capabilities(&list.replace("+forward", ""))
}

fn resources(attrs: &BTreeMap<String, String>) -> Result<Option<pb::LinuxResources>> {
    let get = |key: &str| attrs.get(key).map(String::as_str).filter(|value| !value.is_empty());
    let invalid = |key: &str, value: &str, why: &str| {
        Problem::new(format!("invalid {key} value: {value}: {why}"))
    };
    let signed = |key: &str, unlimited: bool| -> Result<i64> {
        let Some(text) = get(key) else { return Ok(0) };
        match text.parse::<i64>() {
            Ok(number) if number > 0 || (unlimited && number == -1) => Ok(number),
            Ok(_) if unlimited => Err(invalid(key, text, "must be -1 (unlimited) or > 0")),
            Ok(_) => Err(invalid(key, text, "must be > 0")),
            Err(_) => Err(invalid(key, text, "must be a whole number")),
        }
    };
    let unsigned = |key: &str| -> Result<u64> {
        let Some(text) = get(key) else { return Ok(0) };
        match text.parse::<u64>() {
            Ok(0) => Err(invalid(key, text, "must be > 0")),
            Ok(number) => Ok(number),
            Err(_) => Err(invalid(key, text, "must be a whole number")),
        }
    };
    let set = |key: &str| -> Result<String> {
        let text = get(key).unwrap_or_default();
        match text.split(',').find(|part| !is_cpu_range(part.trim())) {
            Some(part) => Err(invalid(key, text, &format!("{part:?} is no number or range"))),
            None => Ok(text.into()),
        }
    };
    let resources = pb::LinuxResources {
        memory: signed("memory", false)?,
        memory_swap: signed("memswap", true)?,
        cpu_shares: unsigned("cpushares")?,
        cpu_period: unsigned("cpuperiod")?,
        cpu_quota: signed("cpuquota", false)?,
        cpuset_cpus: set("cpusetcpus")?,
        cpuset_mems: set("cpusetmems")?,
    };
    Ok(Some(resources).filter(|resources| *resources != pb::LinuxResources::default()))
}

/// Returns whether a text is empty, a number, or a range of numbers, as sets of processors are written.
fn is_cpu_range(text: &str) -> bool {
    // More than any machine has.
    let number = |text: &str| text.trim().parse::<u32>().ok().filter(|number| *number <= 8192);
    match text.split_once('-') {
        None => text.is_empty() || number(text).is_some(),
        Some((low, high)) => number(low).zip(number(high)).is_some_and(|(low, high)| low <= high),
    }
}

fn cache_imports(attrs: &BTreeMap<String, String>) -> Result<Vec<CacheImport>> {
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(default, alias = "type")]
        #[serde(rename = "Type")]
        kind: String,
        #[serde(default, alias = "attrs")]
        #[serde(rename = "Attrs")]
        attrs: Option<BTreeMap<String, String>>,
    }
    let get = |key: &str| attrs.get(key).map(String::as_str).filter(|value| !value.is_empty());
    let mut imports = vec![];
    if let Some(text) = get("cache-imports") {
        let entries: Vec<Entry> = serde_json::from_str(text).map_err(|error| {
            Problem::new(format!("failed to read cache-imports ({text:?}): {error}"))
        })?;
        imports.extend(
            entries.into_iter().map(|entry| CacheImport {
                kind: entry.kind,
                attrs: entry.attrs.unwrap_or_default(),
            }),
        );
    }
    for reference in get("cache-from").into_iter().flat_map(|list| list.split(',')) {
        let attrs = BTreeMap::from([("ref".to_owned(), reference.to_owned())]);
        imports.push(CacheImport { kind: "registry".into(), attrs });
    }
    Ok(imports)
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

fn list(text: &str, what: &str) -> Result<Vec<String>> {
    if text.is_empty() {
        return Ok(vec![]);
    }
    csv::fields(text).map_err(|reason| Problem::new(format!("failed to parse {what}: {reason}")))
}

fn extra_hosts(text: &str) -> Result<Vec<pb::HostIp>> {
    let host = |field: &String| {
        let invalid =
            || Problem::new(format!("invalid value {field:?} in add-hosts: expected host=address"));
        let field = field.to_lowercase();
        let (host, ip) = field.split_once('=').ok_or_else(invalid)?;
        let ip: std::net::IpAddr = ip.parse().map_err(|_| invalid())?;
        Ok(pb::HostIp { host: host.into(), ip: ip.to_canonical().to_string() })
    };
    list(text, "additional hosts")?.iter().map(host).collect()
}

const LIMITS: [&str; 15] = [
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

fn ulimits(text: &str) -> Result<Vec<pb::Ulimit>> {
    let limit = |field: &String| {
        let invalid =
            || Problem::new(format!("invalid ulimit {field:?}: expected name=soft[:hard]"));
        let (name, values) = field.split_once('=').ok_or_else(invalid)?;
        if !LIMITS.contains(&name) {
            let suggestion = suggest(name, LIMITS, true);
            let message = format!("invalid ulimit type: {name}");
            return Err(Problem::new(with_suggestion(message, suggestion)));
        }
        let (soft, hard) = values.split_once(':').unwrap_or((values, values));
        let number = |text: &str| text.parse::<i64>().map_err(|_| invalid());
        let (soft, hard) = (number(soft)?, number(hard)?);
        if hard != -1 && (soft == -1 || soft > hard) {
            return Err(Problem::new(format!(
                "ulimit soft limit must be less than or equal to hard limit: {field}"
            )));
        }
        Ok(pb::Ulimit { name: name.into(), soft, hard })
    };
    list(text, "ulimit")?.iter().map(limit).collect()
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
                "build-arg:BUILDKIT_DOCKERFILE_CHECK",
                "nope",
                "failed to parse build-arg:BUILDKIT_DOCKERFILE_CHECK: invalid check option \"nope\"",
            ),
            (
                "override-copy-image",
                "x",
                "support for \"override-copy-image\" was removed in BuildKit 0.11",
            ),
            (
                "build-arg:BUILDKIT_DISABLE_FILEOP",
                "1",
                "support for \"BUILDKIT_DISABLE_FILEOP\" build-arg was removed in BuildKit 0.11",
            ),
            (
                "frontend.caps",
                "moby.buildkit.frontend.inputs,new",
                "unsupported frontend capability new",
            ),
            ("attest:foo", "", "unknown attestation type \"foo\""),
            ("attest:sbom", "generator=", "sbom generator cannot be empty"),
            ("ulimit", "nofil=1", "invalid ulimit type: nofil (did you mean nofile?)"),
            (
                "ulimit",
                "core=2:1",
                "ulimit soft limit must be less than or equal to hard limit: core=2:1",
            ),
            ("memory", "0", "invalid memory value: 0: must be > 0"),
            ("memswap", "-2", "invalid memswap value: -2: must be -1 (unlimited) or > 0"),
            ("cpushares", "x", "invalid cpushares value: x: must be a whole number"),
            ("cpusetcpus", "0-", "invalid cpusetcpus value: 0-: \"0-\" is no number or range"),
            ("cpusetmems", "3-1", "invalid cpusetmems value: 3-1: \"3-1\" is no number or range"),
            ("shm-size", "1m", "invalid shm-size: \"1m\""),
            ("image-resolve-mode", "x", "invalid image-resolve-mode: x"),
            ("multi-platform", "x", "invalid boolean value for multi-platform: \"x\""),
            ("force-network-mode", "x", "invalid netmode: x"),
        ] {
            assert_eq!(read(&[(key, value)]).unwrap_err().message, message);
        }
        let conflict =
            read(&[("platform", "linux/amd64,linux/arm64"), ("multi-platform", "false")]);
        assert!(conflict.unwrap_err().message.starts_with("conflicting config"));
    }

    #[test]
    fn limits_caches_and_scanners_are_read() {
        let settings = read(&[
            ("memory", "1024"),
            ("memswap", "-1"),
            ("cpushares", "512"),
            ("cpuperiod", "100000"),
            ("cpuquota", "50000"),
            ("cpusetcpus", "0-3,5"),
            ("cpusetmems", "0"),
            ("cache-imports", "[{\"Type\":\"local\",\"Attrs\":{\"src\":\"x\"}}]"),
            ("cache-from", "a,b"),
            ("build-arg:BUILDKIT_ATTEST_SBOM", "\"generator=me/scan:1\",fast=yes"),
            ("frontend.caps", "moby.buildkit.frontend.contexts,new+forward"),
        ])
        .unwrap();
        let resources = settings.resources.unwrap();
        assert_eq!(
            (resources.memory, resources.memory_swap, resources.cpu_quota),
            (1024, -1, 50_000)
        );
        assert_eq!(
            (resources.cpuset_cpus.as_str(), resources.cpuset_mems.as_str()),
            ("0-3,5", "0")
        );
        let kinds: Vec<_> =
            settings.cache_imports.iter().map(|import| import.kind.as_str()).collect();
        assert_eq!(kinds, ["local", "registry", "registry"]);
        assert_eq!(settings.cache_imports[2].attrs["ref"], "b");
        let scanner = settings.scanner.unwrap();
        assert_eq!(scanner.image.to_string(), "docker.io/me/scan:1");
        assert_eq!(scanner.parameters["fast"], "yes");
        assert_eq!(read(&[]).unwrap().resources, None);
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
}
