//! From nodes to typed instructions: names, flags and counts of arguments are checked, values are not yet expanded.

use slipway_spec::Healthcheck;
use slipway_spec::llb::{Lines, pb};

use super::ast::{Args, Heredoc, Node, Pair};
use super::flags::{Flags, Kind};
use super::go_format::parse_duration;
use super::heredoc::parse_mark;
use super::mount;
use super::problem::{Problem, Result};
use super::suggest::{suggest, with_suggestion};

/// An instruction and where it stands.
#[derive(Clone, Debug)]
pub(crate) struct Command {
    /// The keyword in capitals.
    pub(crate) name: &'static str,
    /// The keyword as written.
    pub(crate) keyword: String,
    /// As written, on one line.
    pub(crate) code: String,
    /// Comments above.
    pub(crate) comments: Vec<String>,
    pub(crate) lines: Lines,
    pub(crate) instruction: Instruction,
}

/// What each instruction says.
#[derive(Clone, Debug)]
pub(crate) enum Instruction {
    Arg(Vec<ArgDeclaration>),
    Cmd(CommandLine),
    Copy(Copy),
    Entrypoint(CommandLine),
    Env(Vec<Pair>),
    Expose(Vec<String>),
    From(From),
    Healthcheck(Healthcheck),
    Label(Vec<Pair>),
    Maintainer(String),
    Onbuild(String),
    Run(Run),
    Shell(Vec<String>),
    Stopsignal(String),
    User(String),
    Volume(Vec<String>),
    Workdir(String),
}

#[derive(Clone, Debug)]
pub(crate) struct From {
    pub(crate) base: String,
    /// Lower case.
    pub(crate) name: Option<String>,
    /// Empty when the flag is not given.
    pub(crate) platform: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ArgDeclaration {
    pub(crate) key: String,
    pub(crate) default: Option<String>,
}

#[derive(Clone, Debug)]
pub(crate) struct CommandLine {
    pub(crate) words: Vec<String>,
    /// Whether the words are one string for the shell.
    pub(crate) shell: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) command: CommandLine,
    pub(crate) heredocs: Vec<Heredoc>,
    pub(crate) network: String,
    /// Whether the process is to have all privileges.
    pub(crate) insecure: bool,
    pub(crate) mounts: Vec<MountFlag>,
    pub(crate) devices: Vec<pb::CdiDevice>,
}

/// A `--mount` before its variables are expanded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountFlag {
    /// The stage, context or image that it names; may be empty.
    pub(crate) from: String,
    pub(crate) value: String,
}

/// `COPY` and `ADD`.
#[derive(Clone, Debug)]
pub(crate) struct Copy {
    pub(crate) add: bool,
    pub(crate) sources: Vec<String>,
    /// Sources that are here-documents.
    pub(crate) inline: Vec<Heredoc>,
    pub(crate) dest: String,
    pub(crate) from: String,
    pub(crate) chown: String,
    pub(crate) chmod: String,
    pub(crate) exclude: Vec<String>,
    pub(crate) link: bool,
    pub(crate) parents: bool,
    pub(crate) keep_git_dir: Option<bool>,
    pub(crate) checksum: String,
    pub(crate) unpack: Option<bool>,
}

const NAMES: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

/// Gives a node its meaning.
pub(crate) fn type_node(node: &Node) -> Result<Command> {
    let parsed = (|| {
        let upper = node.keyword.to_uppercase();
        let Some(name) = NAMES.into_iter().find(|name| *name == upper) else {
            let suggestion = suggest(&node.keyword, NAMES, false);
            let message = format!("unknown instruction: {}", node.keyword);
            return Err(Problem::new(with_suggestion(message, suggestion)));
        };
        Ok(Command {
            name,
            keyword: node.keyword.clone(),
            code: node.original.trim().to_owned(),
            comments: node.comments.clone(),
            lines: node.lines,
            instruction: instruction(name, node)?,
        })
    })();
    parsed.map_err(|problem| {
        problem
            .prefixed(&format!("dockerfile parse error on line {}", node.lines.first))
            .at(node.lines)
    })
}

fn instruction(name: &'static str, node: &Node) -> Result<Instruction> {
    // ARG and STOPSIGNAL swallow flags, and so does HEALTHCHECK NONE.
    let no_flags = || Flags::parse(&node.flags, &[]);
    Ok(match name {
        "ADD" | "COPY" => Instruction::Copy(copy(name, node)?),
        "ARG" => Instruction::Arg(arg(node)?),
        "CMD" => {
            no_flags()?;
            Instruction::Cmd(command_line(node))
        }
        "ENTRYPOINT" => {
            no_flags()?;
            Instruction::Entrypoint(command_line(node))
        }
        "ENV" => {
            no_flags()?;
            Instruction::Env(pairs(name, node)?)
        }
        "LABEL" => {
            no_flags()?;
            Instruction::Label(pairs(name, node)?)
        }
        "EXPOSE" => {
            let mut ports = at_least_one(name, node)?;
            no_flags()?;
            ports.sort();
            Instruction::Expose(ports)
        }
        "FROM" => Instruction::From(from(node)?),
        "HEALTHCHECK" => Instruction::Healthcheck(healthcheck(node)?),
        "MAINTAINER" => {
            let maintainer = exactly_one(name, node)?;
            no_flags()?;
            Instruction::Maintainer(maintainer)
        }
        "ONBUILD" => Instruction::Onbuild(onbuild(node)?),
        "RUN" => Instruction::Run(run(node)?),
        "SHELL" => {
            no_flags()?;
            match &node.args {
                Args::Json(words) if !words.is_empty() => Instruction::Shell(words.clone()),
                Args::Words(words) if !words.is_empty() => {
                    let message = format!(
                        "SHELL requires the arguments to be in JSON form: {}",
                        node.original.trim()
                    );
                    return Err(
                        Problem::new(message).hint("write SHELL [\"executable\", \"argument\"]")
                    );
                }
                _ => return Err(Problem::new("SHELL requires at least one argument")),
            }
        }
        "STOPSIGNAL" => Instruction::Stopsignal(exactly_one(name, node)?),
        "USER" => {
            let user = exactly_one(name, node)?;
            no_flags()?;
            Instruction::User(user)
        }
        "VOLUME" => {
            let volumes = at_least_one(name, node)?;
            no_flags()?;
            let volumes: Vec<String> =
                volumes.iter().map(|volume| volume.trim().to_owned()).collect();
            if volumes.iter().any(String::is_empty) {
                return Err(Problem::new("VOLUME specified can not be an empty string"));
            }
            Instruction::Volume(volumes)
        }
        _ => {
            let path = exactly_one(name, node)?;
            no_flags()?;
            Instruction::Workdir(path)
        }
    })
}

fn words(node: &Node) -> Vec<String> {
    match &node.args {
        Args::Words(words) | Args::Json(words) => words.clone(),
        Args::Pairs(_) | Args::Instruction(_) => vec![],
    }
}

fn at_least_one(name: &str, node: &Node) -> Result<Vec<String>> {
    let words = words(node);
    if words.is_empty() {
        return Err(Problem::new(format!("{name} requires at least one argument")));
    }
    Ok(words)
}

fn exactly_one(name: &str, node: &Node) -> Result<String> {
    match words(node).as_slice() {
        [word] => Ok(word.clone()),
        _ => Err(Problem::new(format!("{name} requires exactly one argument"))),
    }
}

fn command_line(node: &Node) -> CommandLine {
    let words = words(node);
    match node.args {
        Args::Json(_) => CommandLine { words, shell: false },
        _ => CommandLine { words: vec![words.join(" ")], shell: true },
    }
}

fn pairs(name: &str, node: &Node) -> Result<Vec<Pair>> {
    let Args::Pairs(pairs) = &node.args else { return Ok(vec![]) };
    if pairs.is_empty() {
        return Err(Problem::new(format!("{name} requires at least one argument")));
    }
    if pairs.iter().any(|pair| pair.key.is_empty()) {
        return Err(Problem::new(format!("{name} names can not be blank")));
    }
    Ok(pairs.clone())
}

fn arg(node: &Node) -> Result<Vec<ArgDeclaration>> {
    let declare = |word: &String| match word.split_once('=') {
        Some(("", _)) => Err(Problem::new("ARG names can not be blank")),
        Some((key, default)) => {
            Ok(ArgDeclaration { key: key.into(), default: Some(default.into()) })
        }
        None => Ok(ArgDeclaration { key: word.clone(), default: None }),
    };
    at_least_one("ARG", node)?.iter().map(declare).collect()
}

fn from(node: &Node) -> Result<From> {
    let (base, name) = match words(node).as_slice() {
        [base] => (base.clone(), None),
        [base, keyword, name] if keyword.eq_ignore_ascii_case("as") => {
            let lower = name.to_lowercase();
            let first = lower.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
            let good = |b: u8| {
                b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.')
            };
            if !first || !lower.bytes().all(good) {
                return Err(Problem::new(format!(
                    "invalid name for build stage: {name:?}, name can't start with a number or contain symbols"
                )));
            }
            (base.clone(), Some(lower))
        }
        _ => return Err(Problem::new("FROM requires either one or three arguments")),
    };
    let flags = Flags::parse(&node.flags, &[("platform", Kind::Text)])?;
    Ok(From { base, name, platform: flags.text("platform") })
}

fn onbuild(node: &Node) -> Result<String> {
    let Args::Instruction(trigger) = &node.args else {
        return Err(Problem::new("ONBUILD requires at least one argument"));
    };
    Flags::parse(&node.flags, &[])?;
    match trigger.keyword.to_uppercase().as_str() {
        "ONBUILD" => {
            return Err(Problem::new("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed"));
        }
        name @ ("MAINTAINER" | "FROM") => {
            return Err(Problem::new(format!("{name} isn't allowed as an ONBUILD trigger")));
        }
        _ => {}
    }
    let line = node.original.trim_start();
    let mut expression = line.get(node.keyword.len()..).unwrap_or_default().trim_start().to_owned();
    for heredoc in &node.heredocs {
        expression.push('\n');
        expression.push_str(&heredoc.content);
        expression.push_str(&heredoc.name);
    }
    Ok(expression)
}

fn run(node: &Node) -> Result<Run> {
    let known = [
        ("mount", Kind::List),
        ("network", Kind::Text),
        ("security", Kind::Text),
        ("device", Kind::List),
    ];
    let flags = Flags::parse(&node.flags, &known)?;
    let network = flags.text("network");
    if flags.is_given("network") && !matches!(network.as_str(), "default" | "none" | "host") {
        return Err(Problem::new(format!("invalid network mode: {network:?}")));
    }
    let security = flags.text("security");
    if flags.is_given("security") && !matches!(security.as_str(), "sandbox" | "insecure") {
        return Err(Problem::new(format!("security {security:?} is not valid")));
    }
    let mounts = flags
        .list("mount")
        .into_iter()
        .map(|value| Ok(MountFlag { from: mount::from(&value)?, value }))
        .collect::<Result<_>>()?;
    let devices = flags.list("device");
    Ok(Run {
        command: command_line(node),
        heredocs: node.heredocs.clone(),
        network,
        insecure: security == "insecure",
        mounts,
        devices: devices.iter().map(|value| mount::parse_device(value)).collect::<Result<_>>()?,
    })
}

fn copy(name: &'static str, node: &Node) -> Result<Copy> {
    let words = words(node);
    let [sources @ .., dest] = words.as_slice() else {
        return Err(no_destination(name));
    };
    if sources.is_empty() {
        return Err(no_destination(name));
    }
    let add = name == "ADD";
    let known: &[(&str, Kind)] = if add {
        &[
            ("chown", Kind::Text),
            ("chmod", Kind::Text),
            ("link", Kind::Bool),
            ("keep-git-dir", Kind::Bool),
            ("checksum", Kind::Text),
            ("unpack", Kind::Bool),
            ("exclude", Kind::List),
        ]
    } else {
        &[
            ("chown", Kind::Text),
            ("from", Kind::Text),
            ("chmod", Kind::Text),
            ("link", Kind::Bool),
            ("parents", Kind::Bool),
            ("exclude", Kind::List),
        ]
    };
    let flags = Flags::parse(&node.flags, known)?;
    if parse_mark(dest).is_some() {
        return Err(Problem::new(format!("{name} cannot accept a heredoc as a destination")));
    }
    let mut paths = vec![];
    let mut inline = vec![];
    for source in sources {
        match parse_mark(source) {
            Some(mark) => {
                // Of several with one name the last body counts.
                let found = node.heredocs.iter().rev().find(|heredoc| heredoc.name == mark.name);
                let content = found.map(|heredoc| heredoc.content.clone()).unwrap_or_default();
                inline.push(Heredoc { content, ..mark });
            }
            None => paths.push(source.clone()),
        }
    }
    let given = |flag: &str| flags.is_given(flag).then(|| flags.is_true(flag));
    Ok(Copy {
        add,
        sources: paths,
        inline,
        dest: dest.clone(),
        from: flags.text("from"),
        chown: flags.text("chown"),
        chmod: flags.text("chmod"),
        exclude: flags.list("exclude"),
        link: flags.is_true("link"),
        parents: flags.is_true("parents"),
        keep_git_dir: given("keep-git-dir"),
        checksum: flags.text("checksum"),
        unpack: given("unpack"),
    })
}

fn no_destination(name: &str) -> Problem {
    Problem::new(format!(
        "{name} requires at least two arguments, but only one was provided. Destination could not be determined"
    ))
}

fn healthcheck(node: &Node) -> Result<Healthcheck> {
    let words = at_least_one("HEALTHCHECK", node)?;
    let (kind, rest) = (words[0].to_uppercase(), &words[1..]);
    if kind == "NONE" {
        if !rest.is_empty() {
            return Err(Problem::new("HEALTHCHECK NONE takes no arguments"));
        }
        return Ok(Healthcheck { test: vec![kind], ..Healthcheck::default() });
    }
    let known = ["interval", "timeout", "start-period", "start-interval", "retries"]
        .map(|name| (name, Kind::Text));
    let flags = Flags::parse(&node.flags, &known)?;
    if kind != "CMD" {
        return Err(Problem::new(format!("Unknown type {kind:?} in HEALTHCHECK (try CMD)")));
    }
    if rest.is_empty() {
        return Err(Problem::new("Missing command after HEALTHCHECK CMD"));
    }
    let kind = if matches!(node.args, Args::Json(_)) { "CMD" } else { "CMD-SHELL" };
    let interval = |name: &str| -> Result<i64> {
        let text = flags.text(name);
        if text.is_empty() {
            return Ok(0);
        }
        match parse_duration(&text).map_err(Problem::new)? {
            nanos if nanos != 0 && nanos < 1_000_000 => {
                Err(Problem::new(format!("Interval {name:?} cannot be less than 1ms")))
            }
            nanos => Ok(nanos),
        }
    };
    let retries = match flags.text("retries") {
        text if text.is_empty() => 0,
        text => text
            .parse::<i32>()
            .map_err(|_| Problem::new(format!("--retries must be a number, not {text:?}")))?,
    };
    if retries < 0 {
        return Err(Problem::new(format!("--retries cannot be negative ({retries})")));
    }
    Ok(Healthcheck {
        test: std::iter::once(kind.to_owned()).chain(rest.iter().cloned()).collect(),
        interval: interval("interval")?,
        timeout: interval("timeout")?,
        start_period: interval("start-period")?,
        start_interval: interval("start-interval")?,
        retries: i64::from(retries),
    })
}

#[cfg(test)]
mod tests {
    use super::super::parse::parse;
    use super::*;

    fn typed(text: &str) -> Result<Command> {
        type_node(&parse(text)?.nodes[0])
    }

    #[test]
    fn mistakes_are_told() {
        for (text, message) in [
            ("RUNN x", "unknown instruction: RUNN (did you mean RUN?)"),
            ("copi a b", "unknown instruction: copi (did you mean copy?)"),
            ("NONSENSE", "unknown instruction: NONSENSE"),
            ("FROM", "FROM requires either one or three arguments"),
            ("FROM a b", "FROM requires either one or three arguments"),
            ("FROM a is b", "FROM requires either one or three arguments"),
            (
                "FROM a AS 1b",
                "invalid name for build stage: \"1b\", name can't start with a number or contain symbols",
            ),
            ("FROM --plat=x a", "unknown flag: --plat"),
            ("ARG", "ARG requires at least one argument"),
            ("ARG =x", "ARG names can not be blank"),
            ("ENV", "ENV requires at least one argument"),
            ("ENV =x", "ENV names can not be blank"),
            ("ENV --x a=b", "unknown flag: --x"),
            ("LABEL", "LABEL requires at least one argument"),
            (
                "COPY a",
                "COPY requires at least two arguments, but only one was provided. Destination could not be determined",
            ),
            ("COPY a <<EOF\nEOF", "COPY cannot accept a heredoc as a destination"),
            ("ADD --from=x a b", "unknown flag: --from"),
            ("COPY --form=x a b", "unknown flag: --form (did you mean from?)"),
            ("WORKDIR", "WORKDIR requires exactly one argument"),
            ("USER", "USER requires exactly one argument"),
            ("EXPOSE", "EXPOSE requires at least one argument"),
            ("VOLUME", "VOLUME requires at least one argument"),
            ("VOLUME [\" \"]", "VOLUME specified can not be an empty string"),
            ("STOPSIGNAL", "STOPSIGNAL requires exactly one argument"),
            ("SHELL bash -c", "SHELL requires the arguments to be in JSON form: SHELL bash -c"),
            ("SHELL []", "SHELL requires at least one argument"),
            ("RUN --network=x a", "invalid network mode: \"x\""),
            ("RUN --security=x a", "security \"x\" is not valid"),
            (
                "RUN --mount=type=bind,from=a$b a",
                "'from' doesn't support variable expansion, define alias stage instead",
            ),
            ("ONBUILD", "ONBUILD requires at least one argument"),
            ("ONBUILD ONBUILD RUN x", "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed"),
            ("ONBUILD from x", "FROM isn't allowed as an ONBUILD trigger"),
            ("HEALTHCHECK", "HEALTHCHECK requires at least one argument"),
            ("HEALTHCHECK NONE x", "HEALTHCHECK NONE takes no arguments"),
            ("HEALTHCHECK CMD", "Missing command after HEALTHCHECK CMD"),
            ("HEALTHCHECK FOO x", "Unknown type \"FOO\" in HEALTHCHECK (try CMD)"),
            ("HEALTHCHECK --interval=1us CMD x", "Interval \"interval\" cannot be less than 1ms"),
            ("HEALTHCHECK --interval=-1s CMD x", "Interval \"interval\" cannot be less than 1ms"),
            ("HEALTHCHECK --retries=-1 CMD x", "--retries cannot be negative (-1)"),
            ("HEALTHCHECK --nope=1 CMD x", "unknown flag: --nope"),
        ] {
            let expected = format!("dockerfile parse error on line 1: {message}");
            assert_eq!(typed(text).unwrap_err().message, expected, "{text}");
        }
    }

    #[test]
    fn some_instructions_swallow_flags() {
        for text in ["ARG --x=y a", "STOPSIGNAL --x=y 9", "HEALTHCHECK --x=y NONE"] {
            assert!(typed(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn healthcheck_is_read() {
        let text = "healthcheck --interval=1s --timeout=1m --start-period=0 --retries=3 cmd a  b";
        let Instruction::Healthcheck(health) = typed(text).unwrap().instruction else {
            panic!("not a check")
        };
        let expected = Healthcheck {
            test: vec!["CMD-SHELL".into(), "a  b".into()],
            interval: 1_000_000_000,
            timeout: 60_000_000_000,
            retries: 3,
            ..Healthcheck::default()
        };
        assert_eq!(health, expected);
    }

    #[test]
    fn trigger_keeps_bodies() {
        let Instruction::Onbuild(text) = typed("onbuild  RUN <<EOF\na\nEOF\n").unwrap().instruction
        else {
            panic!("not a trigger")
        };
        assert_eq!(text, "RUN <<EOF\na\nEOF");
    }

    #[test]
    fn last_body_of_a_name_counts() {
        let Instruction::Copy(copy) =
            typed("COPY <<a <<a b /c/\n1\na\n2\na\n").unwrap().instruction
        else {
            panic!("not a copy")
        };
        let bodies: Vec<_> = copy.inline.iter().map(|doc| doc.content.as_str()).collect();
        assert_eq!((bodies, copy.sources), (vec!["2\n", "2\n"], vec!["b".into()]));
    }

    #[test]
    fn ports_are_sorted_before_anything_else() {
        let Instruction::Expose(ports) = typed("EXPOSE 90 $A 80").unwrap().instruction else {
            panic!("no ports")
        };
        assert_eq!(ports, ["$A", "80", "90"]);
    }
}
