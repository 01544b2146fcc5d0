//! `slipway run`.

use slipway_spec::{ImageReference, Platform};

use super::Context;
use crate::args::run::{PullPolicy, RunArgs, RunNetwork};
use crate::args::value::with_environment;
use crate::failure::{EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, EXIT_RUN_FAILED, Failure};

/// A command to run in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunPlan {
    /// The image as typed: a name, or the id of one in the store.
    pub(crate) image: String,
    /// What it runs on; `None` for the host's platform.
    pub(crate) platform: Option<Platform>,
    /// When to fetch it.
    pub(crate) pull: PullPolicy,
    /// Replaces the image's `ENTRYPOINT`, and its `CMD` too; an empty list removes it.
    pub(crate) entrypoint: Option<Vec<String>>,
    /// Replaces the image's `CMD` unless it is empty.
    pub(crate) command: Vec<String>,
    /// Variables besides the image's, as `KEY=value`.
    pub(crate) env: Vec<String>,
    /// Replaces the image's `WORKDIR`.
    pub(crate) workdir: Option<String>,
    /// Replaces the image's `USER`.
    pub(crate) user: Option<String>,
    /// The network the command sees.
    pub(crate) network: RunNetwork,
    /// Whether standard input is passed on.
    pub(crate) interactive: bool,
    /// Whether the command has a terminal.
    pub(crate) tty: bool,
}

/// Turns arguments into a plan.
///
/// # Errors
/// When the image's name is malformed, several platforms are the default, or a terminal is asked for where there is
/// none. All have docker's exit code for a command that did not start.
pub(crate) fn plan(args: &RunArgs, context: &Context) -> Result<RunPlan, Failure> {
    let refuse = |message: String| Err(Failure::new(message).code(EXIT_RUN_FAILED));
    if !is_image_id(args.image())
        && let Err(error) = args.image().parse::<ImageReference>()
    {
        return refuse(error.to_string());
    }
    if args.tty && args.interactive && !context.printer.terminals.stdin {
        return refuse(
            "cannot give the command a terminal: standard input is not one; leave out -t".into(),
        );
    }
    if let Some(workdir) = args.workdir.as_ref().filter(|dir| !dir.starts_with('/')) {
        return refuse(format!("the working directory {workdir:?} is not an absolute path"));
    }
    let platform = match (&args.platform, context.settings.default_platforms.as_slice()) {
        (Some(platform), _) => Some(platform.clone()),
        (None, []) => None,
        (None, [platform]) => Some(platform.clone()),
        (None, _) => {
            return refuse(
                "DOCKER_DEFAULT_PLATFORM names several platforms: choose one with --platform"
                    .into(),
            );
        }
    };
    Ok(RunPlan {
        image: args.image().into(),
        platform,
        pull: args.pull,
        entrypoint: args.entrypoint.as_ref().map(|program| match program.as_str() {
            "" => vec![],
            program => vec![program.into()],
        }),
        command: args.command().to_vec(),
        env: with_environment(&args.env, &context.environment)
            .into_iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect(),
        workdir: args.workdir.clone(),
        user: args.user.clone(),
        network: args.network,
        interactive: args.interactive,
        tty: args.tty,
    })
}

/// Whether a text may be the id of an image, whole or its beginning.
fn is_image_id(text: &str) -> bool {
    let hex = text.strip_prefix("sha256:").unwrap_or(text);
    (4..=64).contains(&hex.len())
        && hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Why a command did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotStarted {
    /// The image has no such program.
    NotFound,
    /// The program cannot be executed.
    NotExecutable,
    /// Anything else.
    Other,
}

/// Gives a failure docker's exit code for a command that did not start.
pub(crate) fn not_started(failure: Failure, why: NotStarted) -> Failure {
    failure.code(match why {
        NotStarted::NotFound => EXIT_NOT_FOUND,
        NotStarted::NotExecutable => EXIT_NOT_EXECUTABLE,
        NotStarted::Other => EXIT_RUN_FAILED,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command;
    use crate::command::testing;

    fn planned(
        words: &[&str],
        variables: &[(&str, &str)],
        terminal: bool,
    ) -> Result<RunPlan, Failure> {
        let (mut context, ..) = testing::context(variables);
        context.printer.terminals.stdin = terminal;
        let Command::Run(args) = testing::command(&[&["run"], words].concat()) else {
            panic!("not run")
        };
        plan(&args, &context)
    }

    #[test]
    fn arguments_become_a_plan() {
        let plan = planned(
            &[
                "-it",
                "-e",
                "A=1",
                "-e",
                "HOMELESS",
                "-eSET",
                "--entrypoint=",
                "-w/x",
                "img",
                "sh",
                "-c",
                "x",
            ],
            &[("SET", "s"), ("DOCKER_DEFAULT_PLATFORM", "linux/arm64")],
            true,
        )
        .unwrap();
        assert_eq!(
            (plan.env.join(" "), plan.command.join(" ")),
            ("A=1 SET=s".into(), "sh -c x".into())
        );
        assert_eq!(
            (plan.entrypoint, plan.platform),
            (Some(vec![]), Some("linux/arm64".parse().unwrap()))
        );
        assert_eq!((plan.interactive, plan.tty, plan.workdir.as_deref()), (true, true, Some("/x")));
        assert_eq!(planned(&["e3b0c44298fc"], &[], false).unwrap().image, "e3b0c44298fc");
    }

    #[test]
    fn refusals_have_the_code_of_a_command_that_did_not_start() {
        for (words, variables) in [
            (&["BAD"][..], &[][..]),
            (&["-it", "img"], &[]),
            (&["-w", "rel", "img"], &[]),
            (&["img"], &[("DOCKER_DEFAULT_PLATFORM", "linux/arm64,linux/amd64")]),
        ] {
            assert_eq!(planned(words, variables, false).unwrap_err().exit_code, 125, "{words:?}");
        }
        for (why, code) in [
            (NotStarted::NotFound, 127),
            (NotStarted::NotExecutable, 126),
            (NotStarted::Other, 125),
        ] {
            assert_eq!(not_started(Failure::new("x"), why).exit_code, code);
        }
    }
}
