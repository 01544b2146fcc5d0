//! Arguments of `slipway build`, named as `docker buildx build` names them.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use slipway_spec::ImageReference;

use super::annotation::{Annotation, annotation};
use super::attest::AttestArgs;
use super::builder::BuilderArgs;
use super::cache::{CacheList, cache_list};
use super::call::{Call, call};
use super::context::{NamedContext, named_context};
use super::step::StepArgs;
use super::unsupported::UnsupportedArgs;
use super::value::{KeyValue, PlatformList, boolean, key_value, platform_list, reference};
use crate::output::{OutputSpec, parse_output};

/// Arguments of `build`.
#[derive(Args, Debug)]
pub(crate) struct BuildArgs {
    /// Name or URL of the Dockerfile, or - for standard input [default: CONTEXT/Dockerfile]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Option<String>,
    /// Name the image; may be given several times
    #[arg(short, long = "tag", value_name = "NAME", value_parser = reference)]
    pub(crate) tags: Vec<ImageReference>,
    /// Build for these platforms, separated by commas [default: $DOCKER_DEFAULT_PLATFORM, else the host's]
    #[arg(long = "platform", value_name = "PLATFORM", value_parser = platform_list)]
    pub(crate) platforms: Vec<PlatformList>,
    /// Set a build argument; a bare KEY takes its value from the environment
    #[arg(long = "build-arg", value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) build_args: Vec<KeyValue>,
    /// Use a folder, a URL, docker-image://NAME or oci-layout://FOLDER in place of a stage or image, as NAME=VALUE
    #[arg(long = "build-context", value_name = "NAME=VALUE", value_parser = named_context)]
    pub(crate) contexts: Vec<NamedContext>,
    /// Stop at this stage [default: the last one]
    #[arg(long, value_name = "STAGE")]
    pub(crate) target: Option<String>,
    /// Add a label to the image
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) labels: Vec<KeyValue>,
    /// Add an annotation to the image, as [KIND:]KEY=VALUE
    #[arg(long = "annotation", value_name = "ANNOTATION", value_parser = annotation)]
    pub(crate) annotations: Vec<Annotation>,
    /// Run every step again
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
        hide_default_value = true, value_name = "BOOL", value_parser = boolean, conflicts_with = "no_cache_filter")]
    pub(crate) no_cache: bool,
    /// Run the steps of these stages again, separated by commas
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    pub(crate) no_cache_filter: Vec<String>,
    /// Ask the registry for newer base images
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
        hide_default_value = true, value_name = "BOOL", value_parser = boolean)]
    pub(crate) pull: bool,
    /// Where the result goes: type=image|registry|oci|docker|local|tar|cacheonly[,dest=PATH][,KEY=VALUE…]
    ///
    /// A lone PATH stands for type=local,dest=PATH, and - for type=tar,dest=-. May be given several times.
    #[arg(short, long = "output", value_name = "OUTPUT", value_parser = parse_output)]
    pub(crate) outputs: Vec<OutputSpec>,
    /// Look for results in a cache: NAME[,NAME…] in a registry, or type=registry|local[,KEY=VALUE…]
    #[arg(long = "cache-from", value_name = "CACHE", value_parser = cache_list)]
    pub(crate) cache_from: Vec<CacheList>,
    /// Write a cache of results: type=inline|registry|local[,KEY=VALUE…]
    ///
    /// mode=max has the results of all steps, mode=min (the default) those whose layers are in the image.
    #[arg(long = "cache-to", value_name = "CACHE", value_parser = cache_list)]
    pub(crate) cache_to: Vec<CacheList>,
    /// Push the image to its registry
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
        hide_default_value = true, value_name = "BOOL", value_parser = boolean)]
    pub(crate) push: bool,
    /// Keep the image in the store, also when other outputs are given
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
        hide_default_value = true, value_name = "BOOL", value_parser = boolean)]
    pub(crate) load: bool,
    /// How to show progress
    #[arg(long, value_enum, default_value_t = ProgressMode::Auto, value_name = "MODE")]
    pub(crate) progress: ProgressMode,
    /// Show no progress; print the image's id
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
        default_value = "false", hide_default_value = true, value_name = "BOOL", value_parser = boolean)]
    pub(crate) quiet: bool,
    /// Write the image's id to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) iidfile: Option<PathBuf>,
    /// Write what is known about the result to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) metadata_file: Option<PathBuf>,
    /// Ask about the Dockerfile instead of building it: check, outline, targets, convertllb
    ///
    /// With format=json the answer is JSON; with ignorestatus=true findings are no failure.
    #[arg(long, alias = "print", value_name = "METHOD", value_parser = call)]
    pub(crate) call: Option<Call>,
    /// Look for what could be better in the Dockerfile; the same as --call=check
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false",
        hide_default_value = true, value_name = "BOOL", value_parser = boolean)]
    pub(crate) check: bool,
    /// Network of RUN: default, host or none
    #[arg(long, value_name = "MODE", default_value = "default", hide_default_value = true)]
    pub(crate) network: String,
    /// What is to be said of the result.
    #[command(flatten)]
    pub(crate) attest: AttestArgs,
    /// What the processes of RUN are given and may use.
    #[command(flatten)]
    pub(crate) steps: StepArgs,
    /// Which daemon builds, if one does.
    #[command(flatten)]
    pub(crate) builder: BuilderArgs,
    /// Flags that other builders know.
    #[command(flatten)]
    pub(crate) unsupported: UnsupportedArgs,
    /// What COPY and ADD read from: a folder, a git repository, the URL of an archive or Dockerfile, or - for standard
    /// input
    #[arg(value_name = "CONTEXT")]
    pub(crate) context: String,
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressMode {
    /// `tty` where standard error is a terminal, `plain` otherwise
    Auto,
    /// Nothing at all
    None,
    /// Lines, in order
    Plain,
    /// Nothing but the log of a failed step
    Quiet,
    /// One JSON object for each update
    #[value(name = "rawjson")]
    RawJson,
    /// A display that is redrawn in place
    Tty,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, parse};

    fn build(words: &[&str]) -> BuildArgs {
        match parse(["slipway", "b"].iter().chain(words).map(Into::into)).unwrap().command {
            Command::Build(args) => *args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_may_repeat_and_mix_with_the_context() {
        let args = build(&[
            "-t",
            "a",
            "--tag=b:1",
            ".",
            "--platform",
            "linux/amd64,linux/arm64",
            "--build-arg=K=V",
            "--label",
            "L",
            "-fD",
            "--no-cache-filter",
            "x,y",
            "--progress=rawjson",
            "--push",
            "-o",
            "out",
            "--output=type=oci,dest=f",
        ]);
        assert_eq!(
            args.tags.iter().map(ImageReference::familiar).collect::<Vec<_>>(),
            ["a:latest", "b:1"]
        );
        assert_eq!(args.platforms[0].0.len(), 2);
        assert_eq!(args.build_args[0].value.as_deref(), Some("V"));
        assert_eq!(args.labels[0].value, None);
        assert_eq!(args.file.as_deref(), Some("D"));
        assert_eq!(args.no_cache_filter, ["x", "y"]);
        assert_eq!(args.progress, ProgressMode::RawJson);
        assert_eq!(args.outputs.len(), 2);
        assert_eq!(
            (args.context.as_str(), args.push, args.load, args.quiet),
            (".", true, false, false)
        );
    }

    #[test]
    fn switches_take_an_optional_value_and_the_last_one_wins() {
        assert!(build(&["--pull=true", "."]).pull);
        assert!(!build(&["--pull", "--pull=false", "."]).pull);
        assert!(!build(&["--no-cache=0", "."]).no_cache);
        let args = build(&["-q", "--target", "a", "--target", "b", "-"]);
        assert!(args.quiet);
        assert_eq!((args.target.as_deref(), args.context.as_str()), (Some("b"), "-"));
        assert_eq!(args.progress, ProgressMode::Auto);
    }
}
