//! Arguments of `slipway run`.

use clap::{Args, ValueEnum};
use slipway_spec::Platform;

use super::value::{KeyValue, key_value};

/// Arguments of `run`.
#[derive(Args, Debug)]
#[command(override_usage = "slipway run [OPTIONS] IMAGE [COMMAND] [ARG]...")]
pub(crate) struct RunArgs {
    /// Run the image of this platform, under emulation if need be [default: $DOCKER_DEFAULT_PLATFORM, else the host's]
    #[arg(long, value_name = "PLATFORM", value_parser = |text: &str| text.parse::<Platform>())]
    pub(crate) platform: Option<Platform>,
    /// Remove what the command wrote; this is always done
    #[arg(long)]
    pub(crate) rm: bool,
    /// Pass standard input on
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Set an environment variable; a bare KEY takes its value from the environment
    #[arg(short, long = "env", value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) env: Vec<KeyValue>,
    /// Start in this folder of the image
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Run as this user, as USER[:GROUP]
    #[arg(short, long, value_name = "USER")]
    pub(crate) user: Option<String>,
    /// Run this program instead of the image's entry point
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// The network the command sees
    #[arg(long, value_enum, value_name = "MODE", default_value_t = RunNetwork::Host)]
    pub(crate) network: RunNetwork,
    /// When to fetch the image
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = PullPolicy::Missing)]
    pub(crate) pull: PullPolicy,
    /// The image, followed by the command to run in place of the image's own
    // One list, so that nothing behind the image is taken for a flag of ours.
    #[arg(required = true, trailing_var_arg = true, value_name = "IMAGE")]
    pub(crate) image_and_command: Vec<String>,
}

impl RunArgs {
    /// Returns the image's name as typed.
    pub(crate) fn image(&self) -> &str {
        self.image_and_command.first().map_or("", String::as_str)
    }

    /// Returns the command and its arguments; empty for the image's own.
    pub(crate) fn command(&self) -> &[String] {
        self.image_and_command.get(1..).unwrap_or_default()
    }
}

/// The network a command sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RunNetwork {
    /// The host's
    Host,
    /// Nothing but loopback
    None,
}

/// When an image is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum PullPolicy {
    /// When the store lacks it
    Missing,
    /// When the registry has a newer one
    Always,
    /// Not at all
    Never,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, parse};

    fn run(words: &[&str]) -> RunArgs {
        match parse(["slipway", "run"].iter().chain(words).map(Into::into)).unwrap().command {
            Command::Run(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn nothing_behind_the_image_is_ours() {
        let args = run(&[
            "-it",
            "--rm",
            "-e",
            "A=b",
            "-eC",
            "--platform=linux/arm64",
            "alpine",
            "--rm",
            "-c",
            "--",
            "x",
        ]);
        assert!(args.interactive && args.tty && args.rm);
        assert_eq!(args.env.len(), 2);
        assert_eq!((args.image(), args.command().join(" ")), ("alpine", "--rm -c -- x".into()));
        assert_eq!((args.network, args.pull), (RunNetwork::Host, PullPolicy::Missing));

        let args = run(&[
            "--network",
            "none",
            "--pull=never",
            "-w",
            "/x",
            "-u0:0",
            "--entrypoint",
            "",
            "img",
        ]);
        assert_eq!((args.image(), args.command().len()), ("img", 0));
        assert_eq!((args.network, args.pull), (RunNetwork::None, PullPolicy::Never));
        assert_eq!(args.entrypoint.as_deref(), Some(""));
        assert!(parse(["slipway", "run", "--bogus", "img"].map(Into::into)).is_err());
    }
}
