//! Arguments of the commands that list and move images, named as docker names them.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use slipway_spec::{ImageReference, Platform};

use super::value::{PlatformList, platform_list, reference};

/// How a list or a document is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ListFormat {
    /// Aligned columns
    Table,
    /// One JSON object per line
    Json,
}

/// How a document is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DocumentFormat {
    /// A JSON array
    Json,
}

fn platform(text: &str) -> Result<Platform, String> {
    text.parse::<Platform>().map_err(|error| error.to_string())
}

/// Arguments of `images`.
#[derive(Args, Debug)]
pub(crate) struct ImagesArgs {
    /// Show untagged images too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Print ids only
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Show the platforms of each image, a row for each
    #[arg(long, conflicts_with_all = ["quiet", "no_trunc", "digests", "format"])]
    pub(crate) tree: bool,
    /// Show digests
    #[arg(long)]
    pub(crate) digests: bool,
    /// Do not shorten ids
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// How to print the list
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub(crate) format: Option<ListFormat>,
    /// Show only this repository, or this repository and tag
    pub(crate) name: Option<String>,
}

/// Arguments of `pull`.
#[derive(Args, Debug)]
pub(crate) struct PullArgs {
    /// Fetch these platforms, separated by commas [default: $DOCKER_DEFAULT_PLATFORM, else the host's]
    #[arg(long = "platform", value_name = "PLATFORM", value_parser = platform_list)]
    pub(crate) platforms: Vec<PlatformList>,
    /// Fetch every platform the image has
    #[arg(long, conflicts_with = "platforms")]
    pub(crate) all_platforms: bool,
    /// Print only the image's full name
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image
    #[arg(value_parser = reference)]
    pub(crate) name: ImageReference,
}

/// Arguments of `push`.
#[derive(Args, Debug)]
pub(crate) struct PushArgs {
    /// Send the image of one platform instead of the index
    #[arg(long, value_name = "PLATFORM", value_parser = platform)]
    pub(crate) platform: Option<Platform>,
    /// Print nothing but the image's full name
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image
    #[arg(value_parser = reference)]
    pub(crate) name: ImageReference,
}

/// Arguments of `save`.
#[derive(Args, Debug)]
pub(crate) struct SaveArgs {
    /// Write to this file [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Save only these platforms, separated by commas
    #[arg(long = "platform", value_name = "PLATFORM", value_parser = platform_list)]
    pub(crate) platforms: Vec<PlatformList>,
    /// The images
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

/// Arguments of `load`.
#[derive(Args, Debug)]
pub(crate) struct LoadArgs {
    /// Read from this file [default: standard input]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) input: Option<PathBuf>,
    /// Load only these platforms, separated by commas
    #[arg(long = "platform", value_name = "PLATFORM", value_parser = platform_list)]
    pub(crate) platforms: Vec<PlatformList>,
    /// Show no progress
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// Arguments of `tag`.
#[derive(Args, Debug)]
pub(crate) struct TagArgs {
    /// A name or id of the image
    pub(crate) source: String,
    /// Its new name
    #[arg(value_parser = reference)]
    pub(crate) target: ImageReference,
}

/// Arguments of `rmi`.
#[derive(Args, Debug)]
pub(crate) struct RmiArgs {
    /// Remove an id that has several names; do not fail on names that are not there
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Names or ids of the images
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

/// Arguments of `inspect`.
#[derive(Args, Debug)]
pub(crate) struct InspectArgs {
    /// Show the image of this platform
    #[arg(long, value_name = "PLATFORM", value_parser = platform)]
    pub(crate) platform: Option<Platform>,
    /// How to print
    #[arg(short, long, value_enum, value_name = "FORMAT", default_value_t = DocumentFormat::Json)]
    pub(crate) format: DocumentFormat,
    /// Names or ids of the images
    #[arg(required = true, value_name = "NAME")]
    pub(crate) names: Vec<String>,
}

#[cfg(test)]
mod tests {
    use crate::args::{Command, parse};

    #[test]
    fn transfers() {
        let command = |words: &[&str]| {
            parse(["slipway"].iter().chain(words).map(Into::into)).unwrap().command
        };
        match command(&["pull", "--platform", "linux/amd64,linux/arm64", "-q", "debian:12"]) {
            Command::Pull(args) => {
                assert_eq!(
                    (args.platforms[0].0.len(), args.quiet, args.all_platforms),
                    (2, true, false)
                );
                assert_eq!(args.name.familiar(), "debian:12");
            }
            other => panic!("{other:?}"),
        }
        match command(&["save", "-o", "f", "a", "b"]) {
            Command::Save(args) => assert_eq!(
                (args.output, args.names),
                (Some("f".into()), vec!["a".into(), "b".into()])
            ),
            other => panic!("{other:?}"),
        }
        match command(&["inspect", "--platform", "arm64", "x"]) {
            Command::Inspect(args) => assert_eq!(args.platform.unwrap().to_string(), "linux/arm64"),
            other => panic!("{other:?}"),
        }
        match command(&["images", "-aq", "--no-trunc", "debian"]) {
            Command::Images(args) => {
                assert!(args.all && args.quiet && args.no_trunc && args.name.is_some());
            }
            other => panic!("{other:?}"),
        }
    }
}
