//! Arguments of `daemon`, which are those of `buildkitd`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::LazyLock;

use clap::{Arg, ArgAction, ArgMatches, Args, Parser};

use super::value::{KeyValue, boolean, key_value};
use super::{Cli, Command, GlobalArgs};

/// The name that makes this program act as BuildKit's daemon.
const BUILDKITD: &str = "buildkitd";

/// Arguments of `daemon`.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct DaemonArgs {
    /// Listen at this address: unix:///PATH, tcp://HOST:PORT or fd:// for a socket of systemd; can be repeated
    #[arg(long = "addr", value_name = "ADDRESS")]
    pub(crate) addresses: Vec<String>,
    /// Read this file instead of /etc/slipway/slipway.toml
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Let this group use sockets in the file system, by name or number
    #[arg(long)]
    pub(crate) group: Option<String>,
    /// Show this certificate to clients that connect by network
    #[arg(long, value_name = "FILE")]
    pub(crate) tlscert: Option<PathBuf>,
    /// The key of the certificate
    #[arg(long, value_name = "FILE")]
    pub(crate) tlskey: Option<PathBuf>,
    /// Let only clients in whose certificates this authority signed
    #[arg(long, value_name = "FILE")]
    pub(crate) tlscacert: Option<PathBuf>,
    /// Let builds ask for network.host or security.insecure; can be repeated, and replaces what the file says
    #[arg(long = "allow-insecure-entitlement", value_name = "NAME")]
    pub(crate) entitlements: Vec<String>,
    /// How the log is written: text or json
    #[arg(long, value_name = "FORMAT")]
    pub(crate) log_format: Option<String>,
    /// How much is logged: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL")]
    pub(crate) log_level: Option<String>,
    /// Log everything
    #[arg(long, num_args(0..=1), require_equals(true), default_missing_value("true"), value_parser = boolean)]
    pub(crate) trace: Option<bool>,
    /// Show clients this label of the worker, as KEY=VALUE; can be repeated
    #[arg(long = "oci-worker-labels", value_name = "LABEL", value_parser = key_value)]
    pub(crate) labels: Vec<KeyValue>,
    /// Whether this program was started as `buildkitd`.
    #[arg(skip)]
    pub(crate) is_buildkitd: bool,
    /// What else `buildkitd` can be told.
    #[command(flatten)]
    pub(crate) other: OtherArgs,
}

/// What a flag of `buildkitd` has after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Takes {
    Text,
    /// Nothing, or `=true`.
    Switch,
}

/// Flags that say something about the worker or the sandbox; see [`OtherArgs`].
const OTHER: &[(&str, Takes)] = &[
    ("cdi-disabled", Takes::Switch),
    ("cdi-spec-dir", Takes::Text),
    ("containerd-cni-binary-dir", Takes::Text),
    ("containerd-cni-config-path", Takes::Text),
    ("containerd-cni-pool-size", Takes::Text),
    ("containerd-max-parallelism", Takes::Text),
    ("containerd-worker", Takes::Text),
    ("containerd-worker-addr", Takes::Text),
    ("containerd-worker-apparmor-profile", Takes::Text),
    ("containerd-worker-gc", Takes::Switch),
    ("containerd-worker-gc-keepstorage", Takes::Text),
    ("containerd-worker-labels", Takes::Text),
    ("containerd-worker-namespace", Takes::Text),
    ("containerd-worker-net", Takes::Text),
    ("containerd-worker-platform", Takes::Text),
    ("containerd-worker-rootless", Takes::Switch),
    ("containerd-worker-runtime", Takes::Text),
    ("containerd-worker-selinux", Takes::Switch),
    ("containerd-worker-snapshotter", Takes::Text),
    ("debugaddr", Takes::Text),
    ("oci-cni-binary-dir", Takes::Text),
    ("oci-cni-config-path", Takes::Text),
    ("oci-cni-pool-size", Takes::Text),
    ("oci-max-parallelism", Takes::Text),
    ("oci-worker", Takes::Text),
    ("oci-worker-apparmor-profile", Takes::Text),
    ("oci-worker-binary", Takes::Text),
    ("oci-worker-gc", Takes::Switch),
    ("oci-worker-gc-keepstorage", Takes::Text),
    ("oci-worker-net", Takes::Text),
    ("oci-worker-no-process-sandbox", Takes::Switch),
    ("oci-worker-platform", Takes::Text),
    ("oci-worker-proxy-snapshotter-path", Takes::Text),
    ("oci-worker-rootless", Takes::Switch),
    ("oci-worker-selinux", Takes::Switch),
    ("oci-worker-snapshotter", Takes::Text),
    ("otel-socket-path", Takes::Text),
    ("proxy-network", Takes::Switch),
    ("rootless", Takes::Switch),
    ("save-cache-debug", Takes::Switch),
];

/// Flags of `buildkitd` that are not shown in the help: given by name, with their values in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct OtherArgs(Vec<(&'static str, Vec<String>)>);

impl OtherArgs {
    /// Returns the values of a flag; the last one counts where there can be one only.
    pub(crate) fn values(&self, name: &str) -> &[String] {
        debug_assert!(OTHER.iter().any(|(known, _)| *known == name), "{name}");
        self.0.iter().find(|(given, _)| *given == name).map_or(&[], |(_, values)| values)
    }

    /// Returns the last value of a flag.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.values(name).last().map(String::as_str)
    }

    /// Returns the last value of a flag that is on or off.
    pub(crate) fn switch(&self, name: &str) -> Option<bool> {
        // Checked when it was parsed.
        boolean(self.value(name)?).ok()
    }

    /// Returns the names of all that were given.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.0.iter().map(|(name, _)| *name)
    }
}

impl Args for OtherArgs {
    fn augment_args(mut command: clap::Command) -> clap::Command {
        for (name, takes) in OTHER {
            let arg = Arg::new(*name).long(*name).hide(true).action(ArgAction::Append);
            command = command.arg(match takes {
                Takes::Text => arg.num_args(1),
                Takes::Switch => arg
                    .num_args(0..=1)
                    .require_equals(true)
                    .default_missing_value("true")
                    .value_parser(|text: &str| boolean(text).map(|_| text.to_owned())),
            });
        }
        command
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for OtherArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = OTHER.iter().filter_map(|(name, _)| {
            Some((*name, matches.get_many::<String>(name)?.cloned().collect()))
        });
        Ok(Self(given.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The command line of `buildkitd`.
#[derive(Debug, Parser)]
#[command(name = "buildkitd", about = "Builds images for docker buildx and buildctl")]
#[command(version = version(), disable_version_flag = true, args_override_self = true, max_term_width = 100)]
struct Buildkitd {
    /// Print what this is
    #[arg(short = 'v', long, action = ArgAction::Version)]
    version: Option<bool>,
    #[command(flatten)]
    global: GlobalArgs,
    #[command(flatten)]
    daemon: DaemonArgs,
}

/// Returns what `buildkitd --version` says after the name: package, version, revision.
fn version() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let ours = slipway_daemon::worker::version();
        format!("{} {} {}", ours.package, ours.version, ours.revision).trim_end().to_owned()
    });
    &TEXT
}

/// Whether the program was started under the name of BuildKit's daemon.
pub(super) fn is_buildkitd(program: Option<&OsString>) -> bool {
    program
        .and_then(|program| std::path::Path::new(program).file_name())
        .is_some_and(|name| name == BUILDKITD)
}

/// Parses a command line of `buildkitd`.
pub(super) fn parse(arguments: Vec<OsString>) -> Result<Cli, clap::Error> {
    let Buildkitd { global, mut daemon, .. } =
        Buildkitd::try_parse_from(arguments.into_iter().filter_map(as_here))?;
    daemon.is_buildkitd = true;
    Ok(Cli { global, command: Command::Daemon(Box::new(daemon)) })
}

/// Writes a word in the way of this program: Go's flags may have one dash, and `--debug` a value.
fn as_here(word: OsString) -> Option<OsString> {
    let Some(text) = word.to_str() else { return Some(word) };
    let flag = match text.strip_prefix('-') {
        Some(rest) if rest.len() > 1 && !rest.starts_with('-') => format!("-{text}"),
        _ => text.to_owned(),
    };
    match flag.strip_prefix("--debug=").map(boolean) {
        Some(Ok(true)) => Some("--debug".into()),
        Some(Ok(false)) => None,
        _ => Some(flag.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args;

    fn daemon(words: &[&str]) -> Result<(GlobalArgs, DaemonArgs), clap::Error> {
        let cli = args::parse(words.iter().map(OsString::from))?;
        match cli.command {
            Command::Daemon(daemon) => Ok((cli.global, *daemon)),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_of_a_test_suite_is_understood() {
        let (global, daemon) = daemon(&[
            "/usr/local/bin/buildkitd",
            "--oci-worker=true",
            "--containerd-worker=false",
            "--oci-worker-gc=false",
            "--oci-worker-labels=org.mobyproject.buildkit.worker.sandbox=true",
            "--oci-worker-snapshotter=overlayfs",
            "--config=/tmp/x/buildkitd.toml",
            "--root",
            "/tmp/x",
            "--addr",
            "unix:///tmp/x/buildkitd.sock",
            "--debug",
        ])
        .unwrap();
        assert!(global.debug && daemon.is_buildkitd);
        assert_eq!(global.root.unwrap(), std::path::Path::new("/tmp/x"));
        assert_eq!(daemon.addresses, ["unix:///tmp/x/buildkitd.sock"]);
        assert_eq!(daemon.config.unwrap(), std::path::Path::new("/tmp/x/buildkitd.toml"));
        let labels: Vec<_> =
            daemon.labels.iter().map(|pair| (pair.key.as_str(), pair.value.as_deref())).collect();
        assert_eq!(labels, [("org.mobyproject.buildkit.worker.sandbox", Some("true"))]);
        assert_eq!(daemon.other.value("oci-worker"), Some("true"));
        assert_eq!(daemon.other.value("containerd-worker"), Some("false"));
        assert_eq!(daemon.other.switch("oci-worker-gc"), Some(false));
        assert_eq!(daemon.other.value("oci-worker-snapshotter"), Some("overlayfs"));
        assert_eq!(daemon.other.switch("rootless"), None);
    }

    #[test]
    fn every_flag_of_buildkitd_is_known() {
        for (name, takes) in OTHER {
            let flag = format!("--{name}");
            let words = match takes {
                Takes::Text => vec!["buildkitd", &flag, "1"],
                Takes::Switch => vec!["buildkitd", &flag],
            };
            let (_, daemon) = daemon(&words).unwrap();
            let expected = if *takes == Takes::Text { "1" } else { "true" };
            assert_eq!(daemon.other.value(name), Some(expected));
            assert_eq!(daemon.other.names().collect::<Vec<_>>(), [*name]);
        }
        for flag in [
            "--addr=x",
            "--allow-insecure-entitlement=x",
            "--config=x",
            "--debug",
            "--group=x",
            "--log-format=x",
            "--log-level=x",
            "--oci-worker-labels=x=y",
            "--root=x",
            "--tlscacert=x",
            "--tlscert=x",
            "--tlskey=x",
            "--trace",
            "--trace=false",
        ] {
            daemon(&["buildkitd", flag]).unwrap();
        }
    }

    #[test]
    fn flags_may_be_written_as_go_programs_have_them() {
        let (global, daemon) =
            daemon(&["buildkitd", "-addr", "tcp://:1", "-debug=true", "-oci-worker=auto"]).unwrap();
        assert!(global.debug);
        assert_eq!(daemon.addresses, ["tcp://:1"]);
        assert_eq!(daemon.other.value("oci-worker"), Some("auto"));
        assert!(!super::tests::daemon(&["buildkitd", "--debug=false"]).unwrap().0.debug);
    }

    #[test]
    fn the_version_is_printed_as_buildkitd_prints_it() {
        for flag in ["--version", "-v", "-version"] {
            let error = daemon(&["buildkitd", flag]).unwrap_err();
            assert_eq!(error.exit_code(), 0);
            let expected = concat!("buildkitd slipway v", env!("CARGO_PKG_VERSION"), "\n");
            assert_eq!(error.to_string(), expected);
        }
        assert_eq!(daemon(&["buildkitd", "--help"]).unwrap_err().exit_code(), 0);
    }

    #[test]
    fn the_verb_has_the_same_flags() {
        let (_, daemon) = daemon(&[
            "slipway",
            "daemon",
            "--addr",
            "unix:///a",
            "--addr=fd://",
            "--allow-insecure-entitlement=network.host",
            "--oci-worker-net=host",
        ])
        .unwrap();
        assert!(!daemon.is_buildkitd);
        assert_eq!(daemon.addresses, ["unix:///a", "fd://"]);
        assert_eq!(daemon.entitlements, ["network.host"]);
        assert_eq!(daemon.other.value("oci-worker-net"), Some("host"));
    }

    #[test]
    fn wrong_flags_are_refused() {
        for words in [
            &["buildkitd", "--nonsense"][..],
            &["buildkitd", "build"],
            &["buildkitd", "--oci-worker-gc=perhaps"],
            &["buildkitd", "--trace=perhaps"],
            &["buildkitd", "--addr"],
            &["slipway", "daemon", "extra"],
        ] {
            assert_ne!(daemon(words).unwrap_err().exit_code(), 0, "{words:?}");
        }
    }
}
