//! Questions about a Dockerfile that are not to build it: what may be given to it, what it can build, what could be
//! better. Answers have the names and shapes that BuildKit's clients know.

mod describe;
mod json;
mod lint;
mod llb;
mod table;

use serde::Serialize;

use super::lint::Linter;
use super::outline::{Outline, OutlineGrant, doc_comment};
use super::problem::Problem;
use super::settings::Settings;
use super::{Input, build_one, convert};
use crate::{Diagnostic, FrontendError, FrontendResult};

use json::pretty;
pub use json::{Location, Position, Range, SourceText};
pub use lint::{BuildProblem, LintResults, LintWarning};
use table::Table;

const DESCRIBE: &str = "frontend.subrequests.describe";
const OUTLINE: &str = "frontend.outline";
const TARGETS: &str = "frontend.targets";
const LINT: &str = "frontend.lint";
const GRAPH: &str = "frontend.convertllb";

/// The version of all answers but one.
const VERSION: &str = "1.0.0";
/// The version of the answer that is a graph.
const GRAPH_VERSION: &str = "0.1.0";

/// Answers a request.
///
/// # Errors
/// When the request is not known, or the file is wrong; `frontend.lint` tells of a wrong file in its answer.
pub(super) async fn answer(id: &str, input: &Input<'_>) -> Result<FrontendResult, FrontendError> {
    let (json, text, status) = match id {
        DESCRIBE => {
            let (json, text) = describe::requests();
            (json, text, None)
        }
        OUTLINE => {
            let outline = outline(input).await?;
            (pretty(&outline), outline.to_text(), None)
        }
        TARGETS => {
            let list = targets(input)?;
            (pretty(&list), list.to_text(), None)
        }
        LINT => {
            let results = lint_results(input).await;
            let clean = results.warnings.is_empty() && results.build_error.is_none();
            (pretty(&results), results.to_text(None), Some(if clean { "0" } else { "1" }))
        }
        GRAPH => {
            return Ok(result(&[
                ("result.json", &graph(input).await?),
                ("version", GRAPH_VERSION),
            ]));
        }
        _ => return Err(FrontendError::unsupported_request(id)),
    };
    let mut values =
        vec![("result.json", json.as_str()), ("result.txt", &text), ("version", VERSION)];
    values.extend(status.map(|status| ("result.statuscode", status)));
    Ok(result(&values))
}

fn result(values: &[(&str, &str)]) -> FrontendResult {
    let value = |(key, value): &(&str, &str)| ((*key).to_owned(), value.as_bytes().to_vec());
    FrontendResult { metadata: values.iter().map(value).collect(), ..FrontendResult::default() }
}

/// Returns the graph that a build would solve.
async fn graph(input: &Input<'_>) -> Result<String, FrontendError> {
    let settings = question(input.settings);
    let input = Input { settings: &settings, ..*input };
    let lint = input.linter()?;
    let outcome = async {
        let document = input.parse(&lint)?;
        build_one(&input, &document, &settings.build_platform, &lint, None).await
    };
    let outcome = outcome.await;
    input.warn(&lint);
    let graph = llb::describe(outcome?.definition.as_ref());
    let graph = graph.map_err(|error| input.file.error(Problem::new(error.to_string())))?;
    Ok(pretty(&graph))
}

/// The settings of a question, which is about the platform of the builder whatever is asked to be built.
fn question(settings: &Settings) -> Settings {
    Settings {
        platforms: vec![settings.build_platform.clone()],
        implicit_platform: true,
        ..settings.clone()
    }
}

async fn lint_results(input: &Input<'_>) -> LintResults {
    let settings = question(input.settings);
    let input = Input { settings: &settings, ..*input };
    let mut results =
        LintResults { sources: vec![SourceText::of(&input)], ..LintResults::default() };
    let mut fail = |error: &FrontendError| {
        results.build_error = error.diagnostics.first().map(BuildProblem::of);
    };
    let lint = match input.linter() {
        Ok(lint) => lint,
        Err(error) => {
            fail(&error);
            return results;
        }
    };
    // Without a target every stage is looked at.
    let all_stages = settings.target.is_none();
    let outcome = match input.parse(&lint) {
        Ok(document) => {
            let platform = &settings.build_platform;
            convert(&input, &document, platform, &lint, all_stages).await.map(|_| ())
        }
        Err(error) => Err(error),
    };
    if let Err(error) = &outcome {
        fail(error);
    }
    results.warnings = lint.findings().iter().map(LintWarning::of).collect();
    results
}

/// What may be given to a target, as clients read it.
#[derive(Debug, Serialize)]
struct OutlineAnswer {
    #[serde(skip_serializing_if = "String::is_empty")]
    name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    description: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    args: Vec<OutlineArgAnswer>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    secrets: Vec<GrantAnswer>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ssh: Vec<GrantAnswer>,
    sources: Vec<String>,
}

#[derive(Debug, Serialize)]
struct OutlineArgAnswer {
    name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    description: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    value: String,
    location: Location,
}

#[derive(Debug, Serialize)]
struct GrantAnswer {
    name: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    required: bool,
    location: Location,
}

impl GrantAnswer {
    fn of(grant: OutlineGrant) -> Self {
        let OutlineGrant { name, required, lines } = grant;
        Self { name, required, location: Location::of(lines) }
    }
}

async fn outline(input: &Input<'_>) -> Result<OutlineAnswer, FrontendError> {
    let settings = question(input.settings);
    let input = Input { settings: &settings, ..*input };
    let lint = input.linter()?;
    let outcome = async {
        let document = input.parse(&lint)?;
        let (plan, lowered) =
            convert(&input, &document, &settings.build_platform, &lint, false).await?;
        let Outline { args, secrets, ssh } = Outline::new(&plan, &lowered.uses);
        let args = args.into_iter().map(|arg| OutlineArgAnswer {
            name: arg.name,
            description: arg.description,
            value: arg.value,
            location: Location::of(arg.lines),
        });
        let target = document.stages.get(plan.target);
        let name = target.and_then(|stage| stage.from.name.clone()).unwrap_or_default();
        let comments = target.map(|stage| stage.comments.as_slice()).unwrap_or_default();
        Ok(OutlineAnswer {
            description: doc_comment(comments, &name),
            name,
            args: args.collect(),
            secrets: secrets.into_iter().map(GrantAnswer::of).collect(),
            ssh: ssh.into_iter().map(GrantAnswer::of).collect(),
            sources: vec![json::base64(&input.files.dockerfile)],
        })
    };
    let outcome = outcome.await;
    input.warn(&lint);
    outcome
}

impl OutlineAnswer {
    fn to_text(&self) -> String {
        let mut text = String::new();
        let mut add = |table: Table| {
            text.push_str(&table.to_string());
            text.push('\n');
        };
        if !self.name.is_empty() || !self.description.is_empty() {
            let mut table = Table::new(1);
            let name = if self.name.is_empty() { "(default)" } else { &self.name };
            table.row(&["TARGET:", name]);
            if !self.description.is_empty() {
                table.row(&["DESCRIPTION:", &self.description]);
            }
            add(table);
        }
        if !self.args.is_empty() {
            let mut table = Table::new(3);
            table.row(&["BUILD ARG", "VALUE", "DESCRIPTION"]);
            for arg in &self.args {
                table.row(&[&arg.name, &arg.value, &arg.description]);
            }
            add(table);
        }
        for (title, grants) in [("SECRET", &self.secrets), ("SSH", &self.ssh)] {
            if grants.is_empty() {
                continue;
            }
            let mut table = Table::new(3);
            table.row(&[title, "REQUIRED"]);
            for grant in grants {
                table.row(&[&grant.name, if grant.required { "true" } else { "" }]);
            }
            add(table);
        }
        text
    }
}

/// What can be built, as clients read it.
#[derive(Debug, Serialize)]
struct TargetList {
    targets: Vec<Target>,
    sources: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Target {
    #[serde(skip_serializing_if = "String::is_empty")]
    name: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    default: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    description: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    base: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    platform: String,
    location: Location,
}

fn targets(input: &Input<'_>) -> Result<TargetList, FrontendError> {
    let document = input.parse(&Linter::silent())?;
    let count = document.stages.len();
    let targets = document.stages.iter().enumerate().map(|(index, stage)| {
        let name = stage.from.name.clone().unwrap_or_default();
        Target {
            description: doc_comment(&stage.comments, &name),
            name,
            default: index + 1 == count,
            base: stage.from.base.clone(),
            platform: stage.from.platform.clone(),
            location: Location::of(stage.lines),
        }
    });
    let sources = vec![json::base64(&input.files.dockerfile)];
    Ok(TargetList { targets: targets.collect(), sources })
}

impl TargetList {
    fn to_text(&self) -> String {
        let mut table = Table::new(1);
        table.row(&["TARGET", "DESCRIPTION"]);
        for target in &self.targets {
            let name = match (target.name.as_str(), target.default) {
                ("", true) => "(default)".to_owned(),
                (name, true) => format!("{name} (default)"),
                (name, false) => name.to_owned(),
            };
            table.row(&[&name, &target.description]);
        }
        table.to_string()
    }
}

impl SourceText {
    fn of(input: &Input<'_>) -> Self {
        Self::new(&input.file.name, &input.files.dockerfile, input.files.origin.as_deref())
    }
}

impl BuildProblem {
    fn of(diagnostic: &Diagnostic) -> Self {
        let spans = diagnostic.spans.iter();
        Self {
            message: diagnostic.message.clone(),
            location: Location::of_lines(spans.flat_map(|span| span.lines.first..=span.lines.last)),
        }
    }
}
