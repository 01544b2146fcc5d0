//! Prints what a frontend answered to `--call`.

use std::collections::BTreeMap;

use slipway_engine::frontend::dockerfile::LintResults;

use super::BuildPlan;
use super::inputs::DockerfilePlace;
use crate::args::call::Call;
use crate::command::Context;
use crate::failure::Failure;

/// Prints an answer and returns the exit code that it asks for.
///
/// # Errors
/// When the answer is that the Dockerfile cannot be built, or cannot be read.
pub(crate) fn print(
    call: &Call,
    plan: &BuildPlan,
    answer: &BTreeMap<String, String>,
    context: &Context,
) -> Result<u8, Failure> {
    let get = |key: &str| answer.get(key).map(String::as_str).unwrap_or_default();
    if call.json {
        context.printer.line(get("result.json"));
    }
    if call.name == "lint" {
        let results: LintResults = serde_json::from_str(get("result.json"))
            .map_err(|error| Failure::new(format!("cannot read the frontend's answer: {error}")))?;
        let file = file_name(plan);
        if !call.json {
            context.printer.text(&lint_text(&results, &file));
        }
        if let Some(problem) = &results.build_error {
            let excerpt = results.excerpt(&problem.location, Some(&file));
            return Err(Failure::new(&problem.message).with_excerpt(excerpt));
        }
    } else if !call.json {
        match answer.get("result.txt") {
            Some(text) => context.printer.text(text),
            // Some answers are not for people.
            None => context.printer.line(get("result.json")),
        }
    }
    let status = get("result.statuscode").parse().unwrap_or(0);
    Ok(if call.ignore_status { 0 } else { status })
}

fn lint_text(results: &LintResults, file: &str) -> String {
    let mut text = match results.warnings.len() {
        0 if results.build_error.is_some() => return String::new(),
        0 => return "Check complete, no warnings found.\n".into(),
        1 => "Check complete, 1 warning has been found!\n".to_owned(),
        count => format!("Check complete, {count} warnings have been found!\n"),
    };
    text.push_str(&results.to_text(Some(file)));
    if results.build_error.is_some() {
        text.push('\n');
    }
    text
}

/// What the user calls the Dockerfile.
fn file_name(plan: &BuildPlan) -> String {
    match &plan.inputs.dockerfile {
        DockerfilePlace::Path(path) => {
            let path = path.display().to_string();
            path.trim_start_matches("./").to_owned()
        }
        DockerfilePlace::Stdin => "stdin".into(),
        DockerfilePlace::Url(url) => url.clone(),
        DockerfilePlace::Context(name) => name.clone().unwrap_or_else(|| "Dockerfile".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command;
    use crate::command::testing;

    /// Prints an answer as the command line with these flags would.
    fn printed(flags: &[&str], answer: &[(&str, &str)]) -> (Result<u8, Failure>, String) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("Dockerfile"), "FROM scratch\n").unwrap();
        let (context, stdout, _) = testing::context(&[]);
        let path = folder.path().to_str().unwrap();
        let words: Vec<&str> = ["build"].iter().chain(flags).copied().chain([path]).collect();
        let Command::Build(args) = testing::command(&words) else { panic!("{words:?}") };
        let plan = super::super::plan(&args, &context).unwrap();
        let answer = answer.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let code = print(plan.call.as_ref().unwrap(), &plan, &answer, &context);
        (code, stdout.take().replace(path, "DIR"))
    }

    const WARNING: &str = r#"{"warnings":[{"ruleName":"R","url":"https://example.com/r","detail":"wrong","location":{"ranges":[
        {"start":{"line":1},"end":{"line":1}}]}}],"sources":[{"filename":"Dockerfile","data":"RlJPTSBhCg==","language":"Dockerfile"}]}"#;

    #[test]
    fn findings_are_shown_and_fail() {
        let answer = [("result.json", WARNING), ("result.statuscode", "1")];
        let (code, text) = printed(&["--check"], &answer);
        assert_eq!(code, Ok(1));
        assert_eq!(
            text,
            "Check complete, 1 warning has been found!\n\nWARNING: R - https://example.com/r\nwrong\n\
             DIR/Dockerfile:1\n--------------------\n   1 | >>> FROM a\n   2 |     \n--------------------\n"
        );
        let (code, text) = printed(&["--call=check,format=json,ignorestatus=true"], &answer);
        assert_eq!((code, text), (Ok(0), format!("{WARNING}\n")));
        let nothing = r#"{"warnings":null,"sources":[]}"#;
        let (code, text) =
            printed(&["--check"], &[("result.json", nothing), ("result.statuscode", "0")]);
        assert_eq!((code, text.as_str()), (Ok(0), "Check complete, no warnings found.\n"));
    }

    #[test]
    fn what_cannot_be_built_is_a_failure() {
        let json = r#"{"warnings":null,"sources":[{"filename":"Dockerfile","data":"RlJPTSBhCg=="}],
            "buildError":{"message":"no such thing","location":{"ranges":[{"start":{"line":1},"end":{"line":1}}]}}}"#;
        let (code, text) = printed(&["--check"], &[("result.json", json)]);
        let failure = code.unwrap_err();
        assert_eq!(
            (failure.message.as_str(), failure.exit_code, text.as_str()),
            ("no such thing", 1, "")
        );
        assert!(failure.excerpt.unwrap().contains("   1 | >>> FROM a\n"));
        assert!(printed(&["--check"], &[]).0.unwrap_err().message.contains("answer"));
    }

    #[test]
    fn other_answers_are_printed_as_they_are() {
        let answer = [("result.json", "{}"), ("result.txt", "TARGET\n")];
        assert_eq!(printed(&["--call=targets"], &answer), (Ok(0), "TARGET\n".into()));
        assert_eq!(printed(&["--call", "outline,format=json"], &answer), (Ok(0), "{}\n".into()));
        assert_eq!(printed(&["--call=convertllb"], &answer[..1]), (Ok(0), "{}\n".into()));
    }
}
