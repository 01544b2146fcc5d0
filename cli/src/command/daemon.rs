//! `daemon`: flags, file and environment become one set of options; what cannot be kept is refused here.

pub(crate) mod lock;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use slipway_daemon::control::Allowed;
use slipway_daemon::listen::{Address, ListenOptions, TlsFiles};
use slipway_engine::config::{
    CdiConfig, DaemonConfig, DiskSpace, LogFormat, LogLevel, NetworkMode, TlsConfig,
};
use slipway_engine::solver::device::{DeviceOptions, Devices};
use slipway_engine::store::registry::HostOptions;

use crate::args::daemon::DaemonArgs;
use crate::args::value::with_empty;
use crate::client::certificates;
use crate::command::Context;
use crate::failure::Failure;
use crate::settings::Environment;

/// What a daemon is started with.
#[derive(Clone, Debug)]
pub(crate) struct DaemonOptions {
    /// The state folder.
    pub(crate) root: PathBuf,
    /// Where to listen.
    pub(crate) addresses: Vec<Address>,
    /// How to listen.
    pub(crate) listen: ListenOptions,
    /// What builds may ask for.
    pub(crate) allowed: Allowed,
    /// The devices of steps.
    pub(crate) devices: Devices,
    /// Labels of the worker.
    pub(crate) labels: BTreeMap<String, String>,
    /// How registries are reached.
    pub(crate) registries: BTreeMap<String, HostOptions>,
    /// The form of the log.
    pub(crate) log_format: LogFormat,
    /// How much is logged.
    pub(crate) log_level: LogLevel,
    /// The file with the flags on top; what is not among the fields above is for the daemon to look at.
    pub(crate) config: DaemonConfig,
    /// What is passed over.
    pub(crate) warnings: Vec<String>,
}

/// Who starts the daemon, as far as it matters for where its files are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum User {
    /// The machine's.
    Root,
    /// Anybody else, who may be root in a namespace.
    Other,
}

impl User {
    /// Asks the system. A user who is root in a namespace of their own keeps files where they would without.
    pub(crate) fn of_process(environment: &Environment) -> Self {
        if !rustix::process::geteuid().is_root() {
            return Self::Other;
        }
        // Outside of namespaces every id is itself.
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        let is_mapped = !map.split_whitespace().eq(["0", "0", "4294967295"]) && !map.is_empty();
        let name = environment.text("USER").unwrap_or_default();
        if is_mapped && !name.is_empty() && name != "root" { Self::Other } else { Self::Root }
    }
}

/// Turns what was typed, the file and the environment into options.
///
/// # Errors
/// When they make no sense, or ask for protection that is not there.
pub(crate) fn plan(
    args: &DaemonArgs,
    root: Option<&Path>,
    user: User,
    context: &Context,
) -> Result<DaemonOptions, Failure> {
    let environment = &context.environment;
    let places = Places {
        program: if args.is_buildkitd { "buildkit" } else { "slipway" },
        user,
        environment,
    };
    let (mut config, mut warnings) = read_config(args, &places)?;
    apply(args, &mut config)?;
    refuse(&config)?;
    let worker = &config.worker;
    let mut ignored = |given: bool, what: &str| {
        if given {
            warnings.push(format!("{what} has no effect yet"));
        }
    };
    ignored(config.containerd.enabled == Some(true), "a worker of containerd");
    ignored(config.dns.is_some(), "[dns]");
    ignored(worker.default_cgroup_parent.is_some(), "defaultCgroupParent");
    ignored(worker.max_parallelism.is_some(), "max-parallelism");
    ignored(!worker.platforms.is_empty(), "a list of platforms");
    ignored(
        !matches!(worker.snapshotter.as_deref(), None | Some("auto" | "overlayfs")),
        "a snapshotter other than overlayfs",
    );
    ignored(!config.frontends.dockerfile, "frontend.\"dockerfile.v0\".enabled=false");
    let tls = tls(&config.grpc.tls)?;
    let addresses = addresses(&config, &places)?;
    let root = root
        .or_else(|| environment.text("SLIPWAY_ROOT").filter(|root| !root.is_empty()).map(Path::new))
        .or(config.root.as_deref());
    let root = match root {
        Some(root) => root.to_path_buf(),
        // The same as that of the other commands, which then see what the daemon built.
        None if !args.is_buildkitd => context.settings.root.clone(),
        None => places.state()?,
    };
    let root = std::path::absolute(&root)
        .map_err(|error| Failure::new(format!("cannot use {}: {error}", root.display())))?;
    let mut registries = certificates::hosts(&context.settings.certs_dir)?;
    for (host, options) in config.registry_options().map_err(|error| Failure::of(&error))? {
        let found = registries.entry(host).or_default();
        let mut ca_files = std::mem::take(&mut found.ca_files);
        ca_files.extend(options.ca_files);
        let client_cert = options.client_cert.or_else(|| found.client_cert.take());
        *found = HostOptions { ca_files, client_cert, ..options };
    }
    Ok(DaemonOptions {
        root,
        addresses,
        listen: ListenOptions { tls, owner: config.grpc.uid, group: config.grpc.gid },
        allowed: allowed(&config)?,
        devices: devices(&config.cdi),
        labels: worker.labels.clone(),
        registries,
        log_format: config.log.format.unwrap_or(LogFormat::Text),
        log_level: log_level(args, &config, context)?,
        config,
        warnings,
    })
}

/// Where files are when nobody says.
struct Places<'e> {
    /// The name of folders and sockets.
    program: &'static str,
    user: User,
    environment: &'e Environment,
}

impl Places<'_> {
    /// Returns a folder that a variable names, or one below the home folder. XDG's paths must be absolute.
    fn of_user(&self, variable: &str, below_home: &str) -> Option<PathBuf> {
        let text =
            |name| self.environment.text(name).map(Path::new).filter(|path| path.is_absolute());
        text(variable).map(Path::to_path_buf).or_else(|| Some(text("HOME")?.join(below_home)))
    }

    fn config(&self) -> Option<PathBuf> {
        let (folder, file) = match self.program {
            "buildkit" => ("buildkit", "buildkitd.toml"),
            program => (program, "slipway.toml"),
        };
        match self.user {
            User::Root => Some(Path::new("/etc").join(folder).join(file)),
            User::Other => {
                Some(self.of_user("XDG_CONFIG_HOME", ".config")?.join(folder).join(file))
            }
        }
    }

    fn state(&self) -> Result<PathBuf, Failure> {
        match self.user {
            User::Root => Ok(Path::new("/var/lib").join(self.program)),
            User::Other => self
                .of_user("XDG_DATA_HOME", ".local/share")
                .map(|folder| folder.join(self.program))
                .ok_or_else(|| {
                    Failure::new("cannot tell where to keep images: HOME is not set")
                        .hint("say where with --root DIR")
                }),
        }
    }

    fn socket(&self) -> Result<PathBuf, Failure> {
        let file = match self.program {
            "buildkit" => "buildkitd.sock",
            _ => "slipway.sock",
        };
        let run = match self.user {
            User::Root => Path::new("/run"),
            User::Other => self
                .environment
                .text("XDG_RUNTIME_DIR")
                .map(Path::new)
                .filter(|folder| folder.is_absolute())
                .ok_or_else(|| {
                    Failure::new("cannot tell where to listen: XDG_RUNTIME_DIR is not set")
                        .hint("say where with --addr unix:///PATH")
                })?,
        };
        Ok(run.join(self.program).join(file))
    }
}

/// Reads the file that was named, or the usual one if there is one.
fn read_config(
    args: &DaemonArgs,
    places: &Places<'_>,
) -> Result<(DaemonConfig, Vec<String>), Failure> {
    let Some(path) = args.config.clone().or_else(|| places.config()) else {
        return Ok((DaemonConfig::default(), vec![]));
    };
    let missing = |warnings| Ok((DaemonConfig::default(), warnings));
    match DaemonConfig::load(&path) {
        Ok((config, warnings)) => {
            let file = path.display();
            Ok((config, warnings.iter().map(|warning| format!("{file}: {warning}")).collect()))
        }
        Err(error) if error.is_missing() && args.config.is_none() => missing(vec![]),
        // As upstream, where the usual path is often given although there is nothing.
        Err(error) if error.is_missing() && args.is_buildkitd => missing(vec![error.to_string()]),
        Err(error) => Err(Failure::of(&error)),
    }
}

/// Lays the flags over the file.
fn apply(args: &DaemonArgs, config: &mut DaemonConfig) -> Result<(), Failure> {
    let other = &args.other;
    if !args.addresses.is_empty() {
        config.grpc.addresses.clone_from(&args.addresses);
    }
    if let Some(group) = args.group.as_deref().filter(|group| !group.is_empty()) {
        config.grpc.gid = Some(group_id(group)?);
    }
    for (flag, file) in [
        (&args.tlscert, &mut config.grpc.tls.cert),
        (&args.tlskey, &mut config.grpc.tls.key),
        (&args.tlscacert, &mut config.grpc.tls.ca),
    ] {
        if let Some(path) = flag.as_ref().filter(|path| !path.as_os_str().is_empty()) {
            *file = Some(path.clone());
        }
    }
    if !args.entitlements.is_empty() {
        config.insecure_entitlements.clone_from(&args.entitlements);
    }
    if let Some(format) = &args.log_format {
        config.log.format = Some(LogFormat::parse(format).ok_or_else(|| {
            Failure::new(format!("--log-format is text or json, not {format:?}"))
        })?);
    }
    let worker = &mut config.worker;
    worker.labels.extend(with_empty(&args.labels));
    if let Some(enabled) = other.value("oci-worker") {
        worker.enabled = true_false_auto("oci-worker", enabled)?;
    }
    if let Some(enabled) = other.value("containerd-worker") {
        config.containerd.enabled = true_false_auto("containerd-worker", enabled)?;
    }
    if let Some(snapshotter) = other.value("oci-worker-snapshotter") {
        worker.snapshotter = Some(snapshotter.to_owned());
    }
    if !other.values("oci-worker-platform").is_empty() {
        worker.platforms = other.values("oci-worker-platform").to_vec();
    }
    if let Some(mode) = other.value("oci-worker-net") {
        worker.network_mode = NetworkMode::parse(mode).ok_or_else(|| {
            Failure::new(format!("--oci-worker-net is auto, host, bridge or cni, not {mode:?}"))
        })?;
    }
    if let Some(profile) = other.value("oci-worker-apparmor-profile") {
        worker.apparmor_profile = Some(profile.to_owned()).filter(|profile| !profile.is_empty());
    }
    if let Some(selinux) = other.switch("oci-worker-selinux") {
        worker.selinux = selinux;
    }
    if let Some(gc) = other.switch("oci-worker-gc") {
        worker.gc.enabled = Some(gc);
    }
    if let Some(text) = other.value("oci-worker-gc-keepstorage") {
        let [reserved, free, max] = keep_storage(text)?;
        worker.gc.reserved_space = reserved;
        worker.gc.min_free_space = free;
        worker.gc.max_used_space = max;
    }
    if let Some(text) = other.value("oci-max-parallelism") {
        let steps: usize = text.parse().map_err(|_| {
            Failure::new(format!("--oci-max-parallelism is a number, not {text:?}"))
        })?;
        worker.max_parallelism = Some(steps).filter(|steps| *steps > 0);
    }
    if let Some(proxy) = other.switch("proxy-network") {
        config.proxy_network = proxy;
    }
    if let Some(disabled) = other.switch("cdi-disabled") {
        config.cdi.disabled = Some(disabled);
    }
    if !other.values("cdi-spec-dir").is_empty() {
        config.cdi.spec_dirs = other.values("cdi-spec-dir").iter().map(PathBuf::from).collect();
    }
    if let Some(address) = other.value("debugaddr") {
        config.grpc.debug_address = Some(address.to_owned());
    }
    if let Some(path) = other.value("otel-socket-path") {
        config.otel_socket_path = Some(path.into());
    }
    Ok(())
}

/// Refuses what would leave builds less confined than was asked for.
fn refuse(config: &DaemonConfig) -> Result<(), Failure> {
    let worker = &config.worker;
    let missing = |what: &str, hint: &str| {
        Err(Failure::new(format!("cannot start: {what} is not supported")).hint(hint))
    };
    if worker.enabled == Some(false) {
        return missing("a daemon without its own worker", "leave --oci-worker=false out");
    }
    if let Some(profile) = &worker.apparmor_profile {
        let what = format!("confining steps with the AppArmor profile {profile:?}");
        return missing(&what, "leave the profile out; steps then run without one");
    }
    if worker.selinux {
        let hint = "leave selinux out; steps then run without labels";
        return missing("giving steps labels of SELinux", hint);
    }
    if matches!(worker.network_mode, NetworkMode::Bridge | NetworkMode::Cni) {
        let what = format!("network mode {}", worker.network_mode.as_str());
        return missing(&what, "use auto or host; steps then share the machine's network");
    }
    if config.proxy_network {
        let hint = "leave it out; steps then share the machine's network";
        return missing("sending the network of steps through a proxy", hint);
    }
    Ok(())
}

fn tls(config: &TlsConfig) -> Result<Option<TlsFiles>, Failure> {
    match (config.cert.clone(), config.key.clone(), config.ca.clone()) {
        (Some(cert), Some(key), ca) => Ok(Some(TlsFiles { cert, key, ca })),
        (None, None, None) => Ok(None),
        (None, None, Some(_)) => Err(Failure::new(
            "cannot check certificates of clients without a certificate of the daemon's own",
        )
        .hint("give --tlscert and --tlskey as well")),
        (Some(_), None, _) => {
            Err(Failure::new("a certificate needs its key").hint("give --tlskey as well"))
        }
        (None, Some(_), _) => {
            Err(Failure::new("a key needs its certificate").hint("give --tlscert as well"))
        }
    }
}

fn addresses(config: &DaemonConfig, places: &Places<'_>) -> Result<Vec<Address>, Failure> {
    if config.grpc.addresses.is_empty() {
        return Ok(vec![Address::Unix(places.socket()?)]);
    }
    let parse = |address: &String| address.parse().map_err(|error| Failure::of(&error));
    config.grpc.addresses.iter().map(parse).collect()
}

fn allowed(config: &DaemonConfig) -> Result<Allowed, Failure> {
    // Devices are there for builds to ask for, unless there are none.
    let devices = config.cdi.disabled != Some(true);
    let mut allowed = Allowed { devices, ..Allowed::default() };
    for name in &config.insecure_entitlements {
        match name.as_str() {
            "network.host" => allowed.network_host = true,
            "security.insecure" => allowed.security_insecure = true,
            "device" => allowed.devices = true,
            _ => {
                return Err(Failure::new(format!("invalid entitlement: {name}"))
                    .hint("use network.host, security.insecure or device"));
            }
        }
    }
    Ok(allowed)
}

fn devices(config: &CdiConfig) -> Devices {
    if config.disabled == Some(true) {
        return Devices::none();
    }
    let mut options = DeviceOptions::default();
    if !config.spec_dirs.is_empty() {
        options.folders.clone_from(&config.spec_dirs);
    }
    options.auto_allowed.clone_from(&config.auto_allowed);
    Devices::new(options)
}

fn log_level(
    args: &DaemonArgs,
    config: &DaemonConfig,
    context: &Context,
) -> Result<LogLevel, Failure> {
    if args.trace == Some(true) {
        return Ok(LogLevel::Trace);
    }
    let read = |name: &str, text: &str| {
        LogLevel::parse(text).ok_or_else(|| {
            Failure::new(format!("{name} is error, warn, info, debug or trace, not {text:?}"))
        })
    };
    if let Some(text) = &args.log_level {
        return read("--log-level", text);
    }
    if context.settings.debug {
        return Ok(LogLevel::Debug);
    }
    match context.environment.text("BUILDKITD_LOG_LEVEL").filter(|text| !text.is_empty()) {
        Some(text) => read("BUILDKITD_LOG_LEVEL", text),
        None => Ok(config.log.level.unwrap_or(LogLevel::Info)),
    }
}

/// Reads `true`, `false` or `auto`.
fn true_false_auto(flag: &str, text: &str) -> Result<Option<bool>, Failure> {
    if text.is_empty() || text.eq_ignore_ascii_case("auto") {
        return Ok(None);
    }
    crate::args::value::boolean(text)
        .map(Some)
        .map_err(|_| Failure::new(format!("--{flag} is true, false or auto, not {text:?}")))
}

/// Reads `RESERVED[,FREE[,MAX]]` in megabytes.
fn keep_storage(text: &str) -> Result<[Option<DiskSpace>; 3], Failure> {
    let mut amounts = [None; 3];
    let bad = || {
        Failure::new(format!(
            "--oci-worker-gc-keepstorage is RESERVED[,FREE[,MAX]] in megabytes, not {text:?}"
        ))
    };
    for (index, part) in text.split(',').enumerate() {
        let amount = amounts.get_mut(index).ok_or_else(bad)?;
        if !part.trim().is_empty() {
            let megabytes: u64 = part.trim().parse().map_err(|_| bad())?;
            *amount = Some(DiskSpace::Bytes(megabytes.saturating_mul(1_000_000)));
        }
    }
    Ok(amounts)
}

/// Returns the number of a group that is given by name or number.
fn group_id(group: &str) -> Result<u32, Failure> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let failed = |why: String| {
        Failure::new(format!("cannot use the group {group}: {why}"))
            .hint("name a group of this machine, or give its number")
    };
    match nix::unistd::Group::from_name(group) {
        Ok(Some(found)) => Ok(found.gid.as_raw()),
        Ok(None) => Err(failed("there is no such group".into())),
        Err(error) => Err(failed(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, parse};
    use crate::command::testing::context;

    struct Case {
        folder: tempfile::TempDir,
    }

    impl Case {
        /// A folder with this `daemon.toml`.
        fn new(config: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("daemon.toml"), config).unwrap();
            Self { folder }
        }

        fn plan(
            &self,
            program: &str,
            words: &[&str],
            user: User,
            variables: &[(&str, &str)],
        ) -> Result<DaemonOptions, Failure> {
            let config = format!("--config={}/daemon.toml", self.folder.path().display());
            let verb: &[&str] = if program == "slipway" { &["daemon"] } else { &[] };
            let line = [program].into_iter().chain(verb.iter().copied());
            let line = line.chain([config.as_str()]).chain(words.iter().copied());
            let cli = parse(line.map(Into::into)).unwrap();
            let Command::Daemon(args) = cli.command else { panic!("not a daemon") };
            let (mut context, _, _) = context(variables);
            context.settings.debug = cli.global.debug;
            plan(&args, cli.global.root.as_deref(), user, &context)
        }
    }

    fn options(config: &str, words: &[&str]) -> Result<DaemonOptions, Failure> {
        Case::new(config).plan("slipway", words, User::Root, &[])
    }

    fn texts(addresses: &[Address]) -> Vec<String> {
        addresses.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_command_line_of_a_test_suite_becomes_options() {
        let case = Case::new(
            "\n\ninsecure-entitlements = [\"security.insecure\"]\n[registry.\"docker.io\"]\nmirrors=[\"localhost:5000\"]\n[otel]\nsocketPath=\"/tmp/otel.sock\"\n[cdi]\nspecDirs=[\"/tmp/cdi\"]\n",
        );
        let words = [
            "--oci-worker=true",
            "--containerd-worker=false",
            "--oci-worker-gc=false",
            "--oci-worker-labels=org.mobyproject.buildkit.worker.sandbox=true",
            "--root",
            "/tmp/x",
            "--addr",
            "unix:///tmp/x/buildkitd.sock",
            "--debug",
        ];
        let variables = [("BUILDKITD_DEBUGADDR", "unix:///tmp/x/debug.sock")];
        let options = case.plan("buildkitd", &words, User::Root, &variables).unwrap();
        assert_eq!(options.root, Path::new("/tmp/x"));
        assert_eq!(texts(&options.addresses), ["unix:///tmp/x/buildkitd.sock"]);
        assert!(options.allowed.security_insecure && !options.allowed.network_host);
        assert_eq!(options.labels["org.mobyproject.buildkit.worker.sandbox"], "true");
        assert_eq!(options.registries["docker.io"].mirrors, ["localhost:5000"]);
        assert_eq!(options.config.worker.gc.enabled, Some(false));
        assert_eq!(options.log_level, LogLevel::Debug);
        assert!(options.warnings.is_empty(), "{:?}", options.warnings);
    }

    #[test]
    fn each_name_and_user_has_its_places() {
        let variables =
            [("HOME", "/home/u"), ("XDG_RUNTIME_DIR", "/run/user/7"), ("XDG_DATA_HOME", "/data")];
        for (program, user, root, address) in [
            // The context of tests has /r as its store.
            ("slipway", User::Root, "/r", "unix:///run/slipway/slipway.sock"),
            ("slipway", User::Other, "/r", "unix:///run/user/7/slipway/slipway.sock"),
            ("buildkitd", User::Root, "/var/lib/buildkit", "unix:///run/buildkit/buildkitd.sock"),
            (
                "buildkitd",
                User::Other,
                "/data/buildkit",
                "unix:///run/user/7/buildkit/buildkitd.sock",
            ),
        ] {
            let options = Case::new("").plan(program, &[], user, &variables).unwrap();
            assert_eq!(options.root, Path::new(root), "{program} {user:?}");
            assert_eq!(texts(&options.addresses), [address], "{program} {user:?}");
        }
        let environment = Environment::of(&[("HOME", "/home/u")]);
        let config =
            |program, user| Places { program, user, environment: &environment }.config().unwrap();
        assert_eq!(config("slipway", User::Root), Path::new("/etc/slipway/slipway.toml"));
        assert_eq!(config("buildkit", User::Root), Path::new("/etc/buildkit/buildkitd.toml"));
        let other = Path::new("/home/u/.config/buildkit/buildkitd.toml");
        assert_eq!(config("buildkit", User::Other), other);
        let nowhere = Case::new("").plan("slipway", &[], User::Other, &[]).unwrap_err();
        assert!(nowhere.message.contains("XDG_RUNTIME_DIR"), "{nowhere}");
    }

    #[test]
    fn flags_override_the_file() {
        let file = "root = '/file'\ninsecure-entitlements = ['network.host']\n[log]\nlevel = 'warn'\nformat = 'json'\n[grpc]\naddress = ['unix:///file.sock', 'tcp://127.0.0.1:1']\nuid = 7\ngid = 8\n[worker.oci]\nlabels = { a = 'file', b = 'file' }\n";
        let from_file = options(file, &[]).unwrap();
        assert_eq!(from_file.root, Path::new("/file"));
        assert_eq!(texts(&from_file.addresses), ["unix:///file.sock", "tcp://127.0.0.1:1"]);
        assert_eq!((from_file.listen.owner, from_file.listen.group), (Some(7), Some(8)));
        assert_eq!((from_file.log_level, from_file.log_format), (LogLevel::Warn, LogFormat::Json));
        assert!(from_file.allowed.network_host);
        let words = [
            "--root=/flag",
            "--addr=fd://",
            "--group=9",
            "--log-format=text",
            "--log-level=error",
            "--allow-insecure-entitlement=security.insecure",
            "--oci-worker-labels=b=flag",
        ];
        let from_flags = options(file, &words).unwrap();
        assert_eq!(from_flags.root, Path::new("/flag"));
        assert_eq!(texts(&from_flags.addresses), ["fd://"]);
        assert_eq!((from_flags.listen.owner, from_flags.listen.group), (Some(7), Some(9)));
        assert_eq!(
            (from_flags.log_level, from_flags.log_format),
            (LogLevel::Error, LogFormat::Text)
        );
        assert!(!from_flags.allowed.network_host && from_flags.allowed.security_insecure);
        let labels: Vec<_> = from_flags.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(labels, ["a=file", "b=flag"]);
        let variable = [("SLIPWAY_ROOT", "/variable"), ("BUILDKITD_LOG_LEVEL", "debug")];
        let from_environment = Case::new(file).plan("slipway", &[], User::Root, &variable).unwrap();
        assert_eq!(from_environment.root, Path::new("/variable"));
        assert_eq!(from_environment.log_level, LogLevel::Debug);
    }

    #[test]
    fn devices_are_described_where_file_or_flags_say() {
        let folder = tempfile::tempdir().unwrap();
        let spec = "cdiVersion: 0.6.0\nkind: v.com/c\ndevices: [{name: a, containerEdits: {env: [A=1]}}]\n";
        std::fs::write(folder.path().join("v.yaml"), spec).unwrap();
        let path = folder.path().display();
        let file = format!("[cdi]\nspecDirs = ['{path}']\nautoAllowed = ['v.com/c']\n");
        let found = |file: &str, words: &[&str]| {
            let options = options(file, words).unwrap();
            let inventory = options.devices.read();
            let infos: Vec<_> =
                inventory.devices().map(|info| (info.name.clone(), info.auto_allow)).collect();
            (infos, options.allowed.devices)
        };
        let name = || "v.com/c=a".to_owned();
        assert_eq!(found(&file, &[]), (vec![(name(), true)], true));
        let flag = format!("--cdi-spec-dir={path}");
        assert_eq!(found("", &["--cdi-spec-dir=/absent", &flag]), (vec![(name(), false)], true));
        assert_eq!(found(&file, &["--cdi-spec-dir=/absent"]), (vec![], true));
        assert_eq!(found(&file, &["--cdi-disabled"]), (vec![], false));
        assert_eq!(found(&format!("{file}disabled = true"), &[]), (vec![], false));
    }

    #[test]
    fn storage_to_keep_is_read_in_megabytes() {
        let gc = |text: &str| {
            let flag = format!("--oci-worker-gc-keepstorage={text}");
            options("", &[&flag]).map(|options| options.config.worker.gc)
        };
        let megabytes = |number: u64| Some(DiskSpace::Bytes(number * 1_000_000));
        let all = gc("1,2,3").unwrap();
        assert_eq!(
            (all.reserved_space, all.min_free_space, all.max_used_space),
            (megabytes(1), megabytes(2), megabytes(3))
        );
        let one = gc("500").unwrap();
        assert_eq!((one.reserved_space, one.min_free_space), (megabytes(500), None));
        for bad in ["x", "1,2,3,4", "-1"] {
            assert!(gc(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_would_confine_builds_less_is_refused() {
        for (file, words, named) in [
            ("", &["--oci-worker=false"][..], "worker"),
            ("", &["--oci-worker-apparmor-profile=strict"], "AppArmor profile \"strict\""),
            ("[worker.oci]\napparmor-profile = 'strict'", &[], "AppArmor"),
            ("", &["--oci-worker-selinux"], "SELinux"),
            ("[worker.oci]\nselinux = true", &[], "SELinux"),
            ("", &["--oci-worker-net=cni"], "network mode cni"),
            ("[worker.oci]\nnetworkMode = 'bridge'", &[], "network mode bridge"),
            ("proxyNetwork = true", &[], "proxy"),
            ("", &["--proxy-network"], "proxy"),
            ("", &["--tlscacert=/ca"], "certificates of clients"),
            ("", &["--tlscert=/cert"], "needs its key"),
            ("[grpc.tls]\nkey = '/key'", &[], "needs its certificate"),
            ("", &["--allow-insecure-entitlement=all"], "invalid entitlement: all"),
            ("", &["--addr=/run/x.sock"], "did you mean unix:///run/x.sock?"),
            ("", &["--group=no-such-group-here"], "no such group"),
            ("", &["--log-format=xml"], "--log-format"),
            ("", &["--log-level=loud"], "--log-level"),
            ("", &["--oci-worker=perhaps"], "--oci-worker is true, false or auto"),
            ("", &["--oci-worker-net=mesh"], "--oci-worker-net"),
            ("", &["--oci-max-parallelism=many"], "--oci-max-parallelism"),
            ("root = 1", &[], "daemon.toml:1:8: root must be text"),
        ] {
            let failure = options(file, words).unwrap_err();
            assert!(failure.message.contains(named), "{file:?} {words:?}: {failure}");
        }
        // Off is off.
        let off = ["--oci-worker-selinux=false", "--proxy-network=false", "--oci-worker-net=host"];
        assert!(options("", &off).unwrap().warnings.is_empty());
    }

    #[test]
    fn what_has_no_effect_is_said() {
        let file =
            "colour = 1\n[dns]\nnameservers = ['1.1.1.1']\n[worker.oci]\nsnapshotter = 'native'\n";
        let options =
            options(file, &["--oci-max-parallelism=2", "--containerd-worker=true"]).unwrap();
        let warnings: Vec<_> =
            options.warnings.iter().map(|warning| warning.rsplit('/').next().unwrap()).collect();
        assert_eq!(
            warnings,
            [
                "daemon.toml: line 1: unknown key colour is ignored",
                "a worker of containerd has no effect yet",
                "[dns] has no effect yet",
                "max-parallelism has no effect yet",
                "a snapshotter other than overlayfs has no effect yet",
            ]
        );
    }

    #[test]
    fn a_file_that_was_named_must_exist() {
        let case = Case::new("");
        let named = "--config=/nonexistent/daemon.toml";
        // The last one counts.
        let failure = case.plan("slipway", &[named], User::Root, &[]).unwrap_err();
        assert!(
            failure.message.starts_with("/nonexistent/daemon.toml cannot be read"),
            "{failure}"
        );
        let options = case.plan("buildkitd", &[named], User::Root, &[]).unwrap();
        assert!(options.warnings[0].starts_with("/nonexistent/daemon.toml"), "{options:?}");
    }

    #[test]
    fn certificates_of_docker_and_of_the_file_are_joined() {
        let case = Case::new("[registry.'a.test']\nhttp = false\nca = ['/file-ca.pem']\n");
        let certs = case.folder.path().join("certs");
        std::fs::create_dir_all(certs.join("a.test")).unwrap();
        for name in ["ca.crt", "me.cert", "me.key"] {
            std::fs::write(certs.join("a.test").join(name), "").unwrap();
        }
        let variables = [("SLIPWAY_CERTS_DIR", certs.to_str().unwrap())];
        let options = case.plan("slipway", &[], User::Root, &variables).unwrap();
        let host = &options.registries["a.test"];
        assert_eq!(host.plain_http, Some(false));
        assert_eq!(host.ca_files, [certs.join("a.test/ca.crt"), "/file-ca.pem".into()]);
        let own = (certs.join("a.test/me.cert"), certs.join("a.test/me.key"));
        assert_eq!(host.client_cert, Some(own));
    }
}
