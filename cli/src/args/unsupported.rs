//! Flags of `buildx build` that are known but not implemented, so that they fail by name instead of as a typing error.

use clap::{Arg, ArgAction, ArgMatches};

/// What a known flag does today.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// Fails.
    Refuse,
    /// Was without effect in BuildKit too.
    Ignore,
    /// As `Ignore`, but BuildKit says so.
    Warn,
}

struct Known {
    name: &'static str,
    short: Option<char>,
    takes_value: bool,
    answer: Answer,
}

const fn refuse(name: &'static str) -> Known {
    Known { name, short: None, takes_value: true, answer: Answer::Refuse }
}

const KNOWN: &[Known] = &[
    Known { name: "compress", short: None, takes_value: false, answer: Answer::Ignore },
    Known { name: "force-rm", short: None, takes_value: false, answer: Answer::Ignore },
    Known { name: "isolation", short: None, takes_value: true, answer: Answer::Warn },
    refuse("policy"),
    Known { name: "rm", short: None, takes_value: false, answer: Answer::Ignore },
    Known { name: "security-opt", short: None, takes_value: true, answer: Answer::Warn },
    Known { name: "squash", short: None, takes_value: false, answer: Answer::Warn },
];

/// The known flags that were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct UnsupportedArgs {
    /// Flags that the build cannot honour, with their dashes.
    pub(crate) refused: Vec<String>,
    /// Flags that are passed over with a warning.
    pub(crate) ignored: Vec<String>,
}

impl clap::Args for UnsupportedArgs {
    fn augment_args(mut command: clap::Command) -> clap::Command {
        for known in KNOWN {
            let mut arg =
                Arg::new(known.name).long(known.name).hide(true).action(ArgAction::Append);
            if let Some(short) = known.short {
                arg = arg.short(short);
            }
            arg = if known.takes_value {
                arg.num_args(1).allow_hyphen_values(true)
            } else {
                // `--rm=true` is as common in scripts as `--rm`.
                arg.num_args(0..=1).require_equals(true).default_missing_value("true")
            };
            command = command.arg(arg);
        }
        command
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for UnsupportedArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut found = Self::default();
        for known in KNOWN {
            let Some(values) = matches.get_many::<String>(known.name) else { continue };
            let values: Vec<&str> = values.map(String::as_str).collect();
            let off = values.iter().all(|value| super::value::boolean(value) == Ok(false));
            match known.answer {
                Answer::Refuse if !known.takes_value && off => {}
                Answer::Refuse => found.refused.push(format!("--{}", known.name)),
                Answer::Ignore => {}
                Answer::Warn if !known.takes_value && off => {}
                Answer::Warn => found.ignored.push(format!("--{}", known.name)),
            }
        }
        Ok(found)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::args::{Command, parse};

    fn unsupported(words: &[&str]) -> super::UnsupportedArgs {
        let words = ["slipway", "build"].iter().chain(words).chain(&["."]).map(Into::into);
        match parse(words).unwrap().command {
            Command::Build(args) => args.unsupported,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn known_flags_are_recognised_with_their_values() {
        for (words, refused) in [
            (&["--policy", "id=a,src=b"][..], &["--policy"][..]),
            (&["--policy=default", "--policy", "-x"], &["--policy"]),
            (&["--rm", "--force-rm=true", "--compress"], &[]),
        ] {
            assert_eq!(unsupported(words).refused, refused, "{words:?}");
        }
        assert_eq!(
            unsupported(&["--squash", "--isolation", "x"]).ignored,
            ["--isolation", "--squash"]
        );
    }
}
