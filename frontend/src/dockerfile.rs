//! The Dockerfile frontend: a file is parsed, typed, resolved against the bridge and lowered, once for each platform.

mod ast;
mod directive;
mod document;
mod expand;
mod files;
mod flags;
mod go_format;
mod heredoc;
mod instruction;
mod lower;
mod parse;
mod problem;
mod resolve;
mod settings;
mod stage;
mod suggest;

use std::sync::Arc;

use futures::future::try_join_all;
use slipway_spec::Platform;
use slipway_spec::llb::{Lines, SourceFile, State, marshal};

use crate::{Bridge, Diagnostic, FrontendError, FrontendRequest, FrontendResult, PlatformImage};

use document::Document;
use files::Files;
use problem::{FileText, Problem};
use settings::Settings;
use stage::Plan;

/// Reads a Dockerfile and makes the graphs it asks for.
///
/// The Dockerfile and its ignore file come from local sources named `dockerfile` and `context`; base images are asked
/// for through the bridge. Everything that can be known without the bridge is checked before it is asked.
///
/// # Errors
/// With diagnostics that point at what is wrong.
pub async fn build(
    request: &FrontendRequest,
    bridge: &dyn Bridge,
) -> Result<FrontendResult, FrontendError> {
    let settings = Settings::read(request).map_err(|problem| unlocated(problem.message))?;
    let files = files::read(&settings, bridge).await?;
    let text: Arc<str> = String::from_utf8_lossy(&files.dockerfile).into();
    let file = FileText { name: settings.filename.clone(), text };
    let document = read(&file, &settings).map_err(|problems| {
        FrontendError::new(problems.into_iter().map(|problem| file.error(problem)).collect())
    })?;
    for lines in &document.1 {
        let message = "NoEmptyContinuation: Empty continuation line";
        bridge.warn(file.warning(Problem::new(message).at(*lines)));
    }
    let each = settings
        .platforms
        .iter()
        .map(|platform| build_one(&settings, &files, &file, &document.0, platform, bridge));
    let images = try_join_all(each).await?;
    Ok(FrontendResult { images, multi_platform: settings.multi_platform })
}

/// Parses and types the file. Returns also the lines with blank lines inside.
fn read(file: &FileText, settings: &Settings) -> Result<(Document, Vec<Lines>), Vec<Problem>> {
    if file.text.is_empty() {
        return Err(vec![Problem::new("the Dockerfile cannot be empty")]);
    }
    if !settings.build_args.contains_key("BUILDKIT_SYNTAX")
        && let Some((image, line)) = directive::detect_syntax(&file.text)
        && !settings::is_builtin_syntax(&image)
    {
        let problem =
            Problem::unsupported(&format!("the frontend image {image:?} of the syntax directive"));
        let problem = problem.hint("docker/dockerfile is built in");
        return Err(vec![problem.at(Lines { first: line, last: line })]);
    }
    let ast = parse::parse(&file.text).map_err(|problem| vec![problem])?;
    Ok((Document::new(&ast)?, ast.empty_continuations))
}

async fn build_one(
    settings: &Settings,
    files: &Files,
    file: &FileText,
    document: &Document,
    platform: &Platform,
    bridge: &dyn Bridge,
) -> Result<PlatformImage, FrontendError> {
    let located = |problem: Problem| FrontendError::from(file.error(problem));
    let mut plan = Plan::new(settings, document, platform).map_err(located)?;
    resolve::resolve(&mut plan, file, bridge).await?;
    // Which files are used is known only after lowering, and lowering needs the vertex that sends them: so once to
    // find out, and once more for good.
    let mut lowered = lower::lower(&plan, &State::scratch()).map_err(located)?;
    if !lowered.context_paths.is_empty() {
        let all = lowered.context_paths.contains("/");
        let used = lowered.context_paths.iter().map(|path| path.trim_start_matches('/').to_owned());
        let used: Vec<String> = used.filter(|_| !all).collect();
        let context = files::context(&used, &files.ignored);
        lowered = lower::lower(&plan, &context).map_err(located)?;
    }
    let source = SourceFile {
        filename: file.name.clone(),
        language: "Dockerfile".into(),
        data: files.dockerfile.to_vec(),
    };
    let platform = if settings.implicit_platform {
        lowered.config.platform().normalized()
    } else {
        platform.clone()
    };
    Ok(PlatformImage {
        platform,
        definition: marshal(&lowered.state, Some(&source)),
        config: lowered.config,
        base_history_len: lowered.base_history_len,
    })
}

fn unlocated(message: String) -> FrontendError {
    Diagnostic { message, ..Diagnostic::default() }.into()
}
