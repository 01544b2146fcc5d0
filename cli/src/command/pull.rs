//! `slipway pull`.

use slipway_spec::{Digest, ImageReference, Platform};

use super::Context;
use crate::args::image::PullArgs;
use crate::args::value::join_platforms;

/// Which platforms of an image are fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PullPlatforms {
    /// The host's.
    Host,
    /// These.
    Listed(Vec<Platform>),
    /// Every one the image has.
    All,
}

/// Returns which platforms to fetch.
pub(crate) fn platforms(args: &PullArgs, context: &Context) -> PullPlatforms {
    if args.all_platforms {
        return PullPlatforms::All;
    }
    match context.settings.platforms(join_platforms(&args.platforms)) {
        listed if listed.is_empty() => PullPlatforms::Host,
        listed => PullPlatforms::Listed(listed),
    }
}

/// Tells what was fetched: the digest of the name, and whether anything was new.
pub(crate) fn report(args: &PullArgs, digest: &Digest, is_new: bool, context: &Context) {
    let printer = &context.printer;
    if !args.quiet {
        let name = args.name.familiar();
        printer.line(&format!("Digest: {digest}"));
        printer.line(&match is_new {
            true => format!("Status: Downloaded newer image for {name}"),
            false => format!("Status: Image is up to date for {name}"),
        });
    }
    printer.line(&ImageReference::to_string(&args.name));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command;
    use crate::command::testing;

    fn pull(words: &[&str]) -> PullArgs {
        match testing::command(&[&["pull"], words].concat()) {
            Command::Pull(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn platforms_come_from_flags_then_environment() {
        let listed = |text: &str| PullPlatforms::Listed(vec![text.parse().unwrap()]);
        let (bare, ..) = testing::context(&[]);
        let (set, ..) = testing::context(&[("DOCKER_DEFAULT_PLATFORM", "linux/arm64")]);
        assert_eq!(platforms(&pull(&["a"]), &bare), PullPlatforms::Host);
        assert_eq!(platforms(&pull(&["a"]), &set), listed("linux/arm64"));
        assert_eq!(platforms(&pull(&["--platform=linux/386", "a"]), &set), listed("linux/386"));
        assert_eq!(platforms(&pull(&["--all-platforms", "a"]), &set), PullPlatforms::All);
    }

    #[test]
    fn reports_as_docker() {
        let (context, stdout, _) = testing::context(&[]);
        let digest = Digest::of(b"x");
        report(&pull(&["a"]), &digest, true, &context);
        assert_eq!(
            stdout.take(),
            format!(
                "Digest: {digest}\nStatus: Downloaded newer image for a:latest\ndocker.io/library/a:latest\n"
            )
        );
        report(&pull(&["-q", "a"]), &digest, false, &context);
        assert_eq!(stdout.take(), "docker.io/library/a:latest\n");
    }
}
