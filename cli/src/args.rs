//! The command line as typed.
//!
//! Nothing below this module sees a flag: a command turns its arguments and the [`Settings`](crate::settings::Settings)
//! into a plan first, and works from that.

pub(crate) mod annotation;
pub(crate) mod attest;
pub(crate) mod build;
pub(crate) mod builder;
pub(crate) mod cache;
pub(crate) mod call;
pub(crate) mod context;
pub(crate) mod daemon;
pub(crate) mod image;
pub(crate) mod run;
pub(crate) mod step;
pub(crate) mod store;
pub(crate) mod unsupported;
pub(crate) mod value;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Builds, stores and ships multi-platform container images.
#[derive(Debug, Parser)]
#[command(name = "slipway", version, propagate_version = false, args_override_self = true)]
#[command(disable_help_subcommand = true, max_term_width = 100)]
pub(crate) struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags of every command.
#[derive(Args, Debug)]
#[command(next_help_heading = "Global options")]
pub(crate) struct GlobalArgs {
    /// Keep images and caches in this folder
    ///
    /// Without it: $SLIPWAY_ROOT, else /var/lib/slipway for root and $XDG_DATA_HOME/slipway or ~/.local/share/slipway
    /// for other users. Several processes may use one folder at the same time.
    #[arg(long, global = true, value_name = "DIR")]
    pub(crate) root: Option<PathBuf>,
    /// Write what happens inside to standard error
    #[arg(short = 'D', long, global = true)]
    pub(crate) debug: bool,
}

/// One verb and its arguments.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Build an image from a Dockerfile
    #[command(visible_alias = "b")]
    Build(Box<build::BuildArgs>),
    /// List images
    Images(image::ImagesArgs),
    /// Fetch an image from a registry
    Pull(image::PullArgs),
    /// Send an image to a registry
    Push(image::PushArgs),
    /// Write images to a tar archive
    Save(image::SaveArgs),
    /// Read images from a tar archive
    Load(image::LoadArgs),
    /// Give an image another name
    Tag(image::TagArgs),
    /// Remove image names, and what nothing else needs
    Rmi(image::RmiArgs),
    /// Show what is known about images, as JSON
    Inspect(image::InspectArgs),
    /// Run a command in an image
    Run(run::RunArgs),
    /// Serve builds to docker buildx and buildctl
    Daemon(Box<daemon::DaemonArgs>),
    /// Free disk space
    Prune(store::PruneArgs),
    /// Show disk use
    Du(store::DuArgs),
}

/// Returns the verb of a command line that need not be valid: the first word that is no flag of every command.
pub(crate) fn verb(arguments: &[OsString]) -> Option<&OsStr> {
    let mut words = arguments.iter().skip(1);
    loop {
        let word = words.next()?;
        if word == "--root" {
            words.next()?;
        } else if !word.as_encoded_bytes().starts_with(b"-") {
            return Some(word);
        }
    }
}

/// Parses the process's arguments.
///
/// # Errors
/// Also when help or the version was asked for: clap reports these as errors with exit code 0.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if daemon::is_buildkitd(arguments.first()) {
        return daemon::parse(arguments);
    }
    Cli::try_parse_from(arguments)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    pub(crate) fn parse_words(words: &[&str]) -> Result<Cli, clap::Error> {
        parse(std::iter::once("slipway").chain(words.iter().copied()).map(OsString::from))
    }

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_and_command_has_help() {
        for command in Cli::command().get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
                assert!(arg.get_help().is_some(), "{} {}", command.get_name(), arg.get_id());
            }
        }
    }

    #[test]
    fn global_flags_stand_before_or_after_the_verb() {
        for words in [["--root", "/r", "-D", "images"], ["images", "--root", "/r", "-D"]] {
            let cli = parse_words(&words).unwrap();
            assert_eq!(cli.global.root.as_deref(), Some(std::path::Path::new("/r")));
            assert!(cli.global.debug);
        }
    }

    #[test]
    fn the_verb_is_found_in_bad_command_lines_too() {
        for (words, expected) in [
            (&["run", "--bogus"][..], Some("run")),
            (&["-D", "--root", "run", "images"], Some("images")),
            (&["--root=x", "run"], Some("run")),
            (&["--bogus"], None),
            (&["--root"], None),
        ] {
            let words: Vec<OsString> =
                std::iter::once(&"slipway").chain(words).map(Into::into).collect();
            assert_eq!(verb(&words), expected.map(OsStr::new), "{words:?}");
        }
    }

    #[test]
    fn version_and_help_are_not_failures() {
        for words in [&["--version"][..], &["--help"], &["build", "--help"], &["run", "--help"]] {
            assert_eq!(parse_words(words).unwrap_err().exit_code(), 0, "{words:?}");
        }
        assert!(parse_words(&["images", "--version"]).is_err_and(|e| e.exit_code() != 0));
    }

    #[test]
    fn wrong_command_lines_are_refused() {
        for words in [
            &[][..],
            &["nonsense"],
            &["build"],
            &["build", "a", "b"],
            &["build", "--nonsense", "."],
            &["build", "--platform", "linux/nope/a/b", "."],
            &["build", "--platform", "nonsense", "."],
            &["build", "--build-arg", "=x", "."],
            &["build", "--label", "", "."],
            &["build", "--progress", "fancy", "."],
            &["build", "-t", "UPPER", "."],
            &["build", "-o", "type=nope", "."],
            &["build", "--push=perhaps", "."],
            &["build", "--no-cache", "--no-cache-filter", "a", "."],
            &["pull"],
            &["pull", "a", "b"],
            &["save"],
            &["tag", "a"],
            &["tag", "a", "b", "c"],
            &["rmi"],
            &["inspect"],
            &["inspect", "--format", "yaml", "x"],
            &["run"],
            &["run", "--pull", "sometimes", "x"],
            &["images", "--tree", "-q"],
            &["images", "a", "b"],
            &["du", "x"],
        ] {
            assert!(parse_words(words).is_err(), "{words:?}");
        }
    }
}
