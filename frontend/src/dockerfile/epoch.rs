//! `SOURCE_DATE_EPOCH`: the time that new things are dated with, given as a number or taken from a source.

use slipway_spec::llb::{State, VertexOptions, marshal, pb};

use super::context::LoadError;
use super::document::{Document, ParsedStage};
use super::expand::{Env, Lexer};
use super::files::{self, Files};
use super::git;
use super::instruction::{Copy, Instruction};
use super::lower::http_source;
use super::problem::{FileText, Problem, Result};
use super::stage::Plan;
use crate::{Bridge, Diagnostic, FrontendError};

/// Finds the time and gives it to the plan.
pub(crate) async fn resolve(
    plan: &mut Plan<'_>,
    document: &Document,
    files: &Files,
    file: &FileText,
    bridge: &dyn Bridge,
) -> std::result::Result<(), FrontendError> {
    let located = |problem: Problem| FrontendError::from(file.error(problem));
    let Some(text) = plan.epoch_text() else { return Ok(()) };
    let time = match text.parse::<i64>() {
        Ok(seconds) => Some((seconds, 0)),
        Err(_) if text.is_empty() => None,
        Err(_) => match find(plan, &text, document, files, file, bridge).await? {
            Some((state, shown_as)) => time_of(&state, &shown_as, bridge).await?,
            None => None,
        },
    };
    let east = time.map_or(0, |(_, east)| east);
    plan.set_epoch(time.map(|(seconds, _)| seconds), east).map_err(located)
}

/// Finds what is dated, and what progress calls the search.
async fn find(
    plan: &Plan<'_>,
    text: &str,
    document: &Document,
    files: &Files,
    file: &FileText,
    bridge: &dyn Bridge,
) -> std::result::Result<Option<(State, String)>, FrontendError> {
    let located = |problem: Problem| FrontendError::from(file.error(problem));
    if text == "context" {
        // What the client sends has no time of its own.
        let shown_as = "[internal] resolve main build context metadata";
        return Ok(files.remote.clone().map(|state| (state, shown_as.to_owned())));
    }
    let platform = &plan.settings.build_platform;
    if let Some(named) = plan.settings.context_named(text, platform).map_err(located)? {
        let loaded = named.load(plan.settings, platform, bridge).await;
        let loaded = loaded.map_err(|error| match error {
            LoadError::Problem(problem) => located(problem),
            LoadError::Bridge(what, error) => {
                FrontendError::from_bridge(file.error(Problem::new(what)), error)
            }
        })?;
        if loaded.is_local() {
            return Ok(None);
        }
        let state = loaded.state(plan.settings, &[].into());
        let shown_as = format!("[internal] resolve SOURCE_DATE_EPOCH named context {text}");
        return Ok(Some((state, shown_as)));
    }
    let lower = text.to_lowercase();
    let stage = document.stages.iter().find(|stage| stage.from.name.as_ref() == Some(&lower));
    let Some(stage) = stage else {
        let hint = "it is a number of seconds since 1970, context, a named context, or a stage";
        return Err(located(Problem::new(format!("invalid SOURCE_DATE_EPOCH: {text}")).hint(hint)));
    };
    let state = source_of(plan, stage).map_err(|problem| located(problem.at(stage.lines)))?;
    let shown_as = format!("[internal] resolve SOURCE_DATE_EPOCH source stage {lower}");
    Ok(Some((state, shown_as)))
}

/// Returns the one source of a stage that only fetches something.
fn source_of(plan: &Plan<'_>, stage: &ParsedStage) -> Result<State> {
    const ONE: &str = "SOURCE_DATE_EPOCH stage must contain exactly one remote ADD";
    let lexer = Lexer::new(plan.escape);
    let word = |text: &str, env: &Env| lexer.word(text, env).map(|e| e.text).map_err(Problem::new);
    let mut env = plan.globals.clone();
    env.remove("SOURCE_DATE_EPOCH");
    if word(&stage.from.base, &env)? != "scratch" {
        return Err(Problem::new("SOURCE_DATE_EPOCH stage must use FROM scratch"));
    }
    let mut source = None;
    for command in &stage.commands {
        match &command.instruction {
            Instruction::Arg(declarations) => {
                for declaration in declarations {
                    let given = plan.build_args.get(&declaration.key);
                    match (given, &declaration.default) {
                        (Some(value), _) => env.set(&declaration.key, value),
                        (None, Some(default)) => {
                            let value = word(default, &env)?;
                            env.set(&declaration.key, &value);
                        }
                        (None, None) => {}
                    }
                }
            }
            Instruction::Copy(add) if add.add && source.is_none() => {
                source = Some(remote_source(add, |text| word(text, &env))?);
            }
            Instruction::Copy(add) if add.add => return Err(Problem::new(ONE)),
            _ => {
                return Err(Problem::new(format!(
                    "SOURCE_DATE_EPOCH stage does not meet source-only requirements: unsupported {} instruction",
                    command.keyword
                )));
            }
        }
    }
    source.ok_or_else(|| Problem::new(ONE))
}

fn remote_source(add: &Copy, word: impl Fn(&str) -> Result<String>) -> Result<State> {
    let ([source], []) = (add.sources.as_slice(), add.inline.as_slice()) else {
        return Err(Problem::new(
            "SOURCE_DATE_EPOCH stage must contain exactly one remote ADD source",
        ));
    };
    let source = word(source)?;
    let checksum = word(&add.checksum)?;
    match git::parse(&source) {
        git::Found::Wrong(reason) => Err(Problem::new(reason)),
        git::Found::Git(git) if !git.like_a_path => {
            let keep = add.keep_git_dir == Some(true) || git.keep_git_dir == Some(true);
            let checksum = if checksum.is_empty() { git.checksum.clone() } else { checksum };
            let git = git::GitRef { fetch_by_commit: false, ..*git };
            Ok(git.to_state(keep, &checksum, "", VertexOptions::default()))
        }
        _ if git::is_http(&source) => http_source(&source, &checksum, VertexOptions::default()),
        _ => {
            Err(Problem::new("SOURCE_DATE_EPOCH stage source must be a single HTTP(S) or Git ADD"))
        }
    }
}

/// Asks when a source was made, in seconds since 1970, and how many seconds the clocks are ahead there.
async fn time_of(
    state: &State,
    shown_as: &str,
    bridge: &dyn Bridge,
) -> std::result::Result<Option<(i64, i64)>, FrontendError> {
    let Some(source) = only_source(state) else { return Ok(None) };
    let is_http =
        ["http://", "https://"].iter().any(|scheme| source.identifier.starts_with(scheme));
    if !is_http && !source.identifier.starts_with("git://") {
        return Ok(None);
    }
    let asking = format!("find the time of {}", source.identifier);
    let metadata =
        bridge.resolve_source(&source, shown_as).await.map_err(files::trying(&asking))?;
    if let Some(commit) = &metadata.commit {
        let time = committer_time(commit).ok_or_else(|| {
            let message = format!("cannot {asking}: the commit has no date");
            FrontendError::from(Diagnostic { message, ..Diagnostic::default() })
        })?;
        return Ok(Some(time));
    }
    let name = source.attrs.get("http.filename").filter(|_| is_http);
    let (None, Some(name)) = (metadata.last_modified, name) else {
        return Ok(metadata.last_modified.map(|seconds| (seconds, 0)));
    };
    let attrs = source.attrs.clone();
    let file = State::source(&source.identifier, attrs, VertexOptions::default());
    let (_, result) = files::solve(bridge, &file).await.map_err(files::trying(&asking))?;
    let youngest = bridge.youngest_file(&result, name).await.map_err(files::trying(&asking))?;
    Ok(youngest.map(|seconds| (seconds, 0)))
}

/// Returns the source of a graph that has only one.
fn only_source(state: &State) -> Option<pb::SourceOp> {
    let vertices = marshal(state, None)?.vertices().ok()?;
    let mut sources = vertices.into_iter().filter_map(|(_, op)| match op.op {
        Some(pb::op::Op::Source(source)) => Some(source),
        _ => None,
    });
    let first = sources.next()?;
    sources.next().is_none().then_some(first)
}

/// Reads `committer name <address> seconds zone` of a commit object.
fn committer_time(commit: &[u8]) -> Option<(i64, i64)> {
    let text = String::from_utf8_lossy(commit);
    let headers = text.split("\n\n").next()?;
    let line = headers.lines().find_map(|line| line.strip_prefix("committer "))?;
    let (seconds, zone) = line.rsplit_once("> ")?.1.split_once(' ')?;
    let zone: i64 = zone.parse().ok()?;
    Some((seconds.parse().ok()?, (zone / 100 * 60 + zone % 100) * 60))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commits_are_dated_by_their_committer() {
        let commit = b"tree 1\nparent 2\nauthor A <a@x> 5 +0000\ncommitter B > <b@x> 1700000000 +0200\n\ncommitter C <c> 7";
        assert_eq!(committer_time(commit), Some((1_700_000_000, 7200)));
        assert_eq!(committer_time(b"tree 1\n\ncommitter C <c> 7 +0000"), None);
        assert_eq!(committer_time(b""), None);
    }
}
