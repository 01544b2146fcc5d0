//! The Dockerfile frontend: a file is parsed, typed, resolved against the bridge and lowered, once for each platform.

mod archive;
mod ast;
mod context;
mod directive;
mod document;
mod epoch;
mod expand;
mod files;
mod flags;
mod forward;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod git;
mod go_format;
mod heredoc;
mod instruction;
mod lint;
mod lower;
mod mount;
mod outline;
mod parse;
mod problem;
mod remote;
mod resolve;
mod settings;
mod source;
mod stage;
mod subrequest;
mod suggest;
mod url;

use std::sync::Arc;

use futures::future::try_join_all;
use slipway_spec::Platform;
use slipway_spec::llb::{SourceFile, State, marshal};

pub use archive::is_archive;
pub use remote::{RemoteContext, git_address, remote_context};
pub use source::{FrontendSource, frontend_source};
pub use subrequest::{
    BuildProblem, LintResults, LintWarning, Location, Position, Range, SourceText,
};

use crate::scan::FoundScanner;
use crate::{Bridge, Feature, FrontendError, FrontendRequest, FrontendResult, PlatformImage};

use document::Document;
use files::Files;
use lint::{LintOptions, Linter};
use lower::{Lowered, SCANNED_CONTEXT, Used};
use problem::{FileText, Problem};
use settings::Settings;
use stage::Plan;

/// The version of the language that is read here, as `docker/dockerfile` counts.
pub const LANGUAGE_VERSION: &str = "1.26.0";

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
    let unlocated = |problem: Problem| FileText::default().error(problem);
    let mut settings = Settings::read(request).map_err(unlocated)?;
    settings.session = bridge.session_id().map(str::to_owned);
    settings.merge = bridge.supports(Feature::Merge);
    let mut files = files::read(&settings, bridge).await?;
    let text: Arc<str> = String::from_utf8_lossy(&files.dockerfile).into();
    let file = FileText { name: files.filename.clone(), text, origin: files.origin.clone() };
    if let Some(frontend) = forward::frontend(&request.attrs, &file) {
        return frontend.run(request, &file, bridge).await;
    }
    settings::check_forwarded(&request.attrs).map_err(unlocated)?;
    files.read_ignored(&settings, bridge).await?;
    let input = Input { settings: &settings, files: &files, file: &file, bridge };
    if let Some(id) = &settings.request_id {
        return subrequest::answer(id, &input).await;
    }
    let lint = input.linter()?;
    let outcome = build_all(&input, &lint).await;
    // What is worth mending often explains what is wrong.
    input.warn(&lint);
    outcome
}

/// What conversions start from.
struct Input<'a> {
    settings: &'a Settings,
    files: &'a Files,
    file: &'a FileText,
    bridge: &'a dyn Bridge,
}

impl Input<'_> {
    /// Returns a linter with the caller's options, or else the file's.
    fn linter(&self) -> Result<Linter, FrontendError> {
        let options = match &self.settings.lint {
            Some(options) => Ok(options.clone()),
            None => directive::detect_check(&self.file.text)
                .map_or_else(|| Ok(LintOptions::default()), |text| lint::parse_options(&text)),
        };
        let options =
            options.map_err(|p| self.file.error(p.prefixed("failed to parse check options")))?;
        Ok(Linter::new(options).ignoring(&self.files.ignored))
    }

    /// Tells the user what a linter found.
    fn warn(&self, lint: &Linter) {
        for finding in lint.findings() {
            self.bridge.warn(self.file.warning(&finding));
        }
    }

    /// Parses and types the file.
    fn parse(&self, lint: &Linter) -> Result<Document, FrontendError> {
        read(self.file, lint).map_err(|problems| {
            let errors = problems.into_iter().map(|problem| self.file.error(problem));
            FrontendError::new(errors.collect())
        })
    }
}

async fn build_all(input: &Input<'_>, lint: &Linter) -> Result<FrontendResult, FrontendError> {
    let document = input.parse(lint)?;
    let settings = input.settings;
    let scanner = find_scanner(input).await?;
    // Other platforms would only say the same again.
    let silent = Linter::silent();
    let lints = std::iter::once(lint).chain(std::iter::repeat(&silent));
    let each = settings.platforms.iter().zip(lints);
    let each =
        each.map(|(platform, lint)| build_one(input, &document, platform, lint, scanner.as_ref()));
    let images = try_join_all(each).await?;
    Ok(FrontendResult {
        images,
        multi_platform: settings.multi_platform,
        cache_imports: settings.cache_imports.clone(),
        ..FrontendResult::default()
    })
}

/// Finds the program that scans results, if they are to be scanned.
async fn find_scanner(input: &Input<'_>) -> Result<Option<FoundScanner>, FrontendError> {
    let Input { settings, bridge, .. } = *input;
    let Some(scanner) = &settings.scanner else { return Ok(None) };
    if !bridge.supports(Feature::Sbom) {
        let what = format!("a bill of materials, made by generator={}, here", scanner.image);
        return Err(FileText::default().error(Problem::unsupported(&what)).into());
    }
    scanner.find(bridge, &settings.build_platform, settings.resolve_mode).await.map(Some)
}

fn read(file: &FileText, lint: &Linter) -> Result<Document, Vec<Problem>> {
    if file.text.is_empty() {
        return Err(vec![Problem::new("the Dockerfile cannot be empty")]);
    }
    let ast = parse::parse(&file.text).map_err(|problem| vec![problem])?;
    Document::new(&ast, lint)
}

/// Plans and lowers, for the first time: the build context is not known yet.
async fn convert<'a>(
    input: &Input<'a>,
    document: &Document,
    platform: &Platform,
    lint: &Linter,
    all_stages: bool,
) -> Result<(Plan<'a>, Lowered), FrontendError> {
    let located = |problem: Problem| FrontendError::from(input.file.error(problem));
    let mut plan = Plan::new(input.settings, document, platform, lint).map_err(located)?;
    plan.all_stages = all_stages;
    epoch::resolve(&mut plan, document, input.files, input.file, input.bridge).await?;
    plan.add_stages(document, lint).map_err(located)?;
    resolve::resolve(&mut plan, input.file, input.bridge, lint).await?;
    let lowered =
        lower::lower(&plan, &State::scratch(), &Used::default(), lint).map_err(located)?;
    lint.verdict().map_err(located)?;
    Ok((plan, lowered))
}

async fn build_one(
    input: &Input<'_>,
    document: &Document,
    platform: &Platform,
    lint: &Linter,
    scanner: Option<&FoundScanner>,
) -> Result<PlatformImage, FrontendError> {
    let Input { settings, files, file, .. } = *input;
    let located = |problem: Problem| FrontendError::from(file.error(problem));
    // Which files are used is known only after lowering, and lowering needs the vertex that sends them: so once to
    // find out, and once more for good.
    let (plan, mut lowered) = convert(input, document, platform, lint, false).await?;
    let scanned = scanner.is_some() && lowered.scan_also.contains_key(SCANNED_CONTEXT);
    if scanned || lowered.used.matters(&plan) {
        let context = files.context(settings, &lowered.used.context);
        lowered =
            lower::lower(&plan, &context, &lowered.used, &Linter::silent()).map_err(located)?;
    }
    let source = SourceFile {
        filename: file.name.clone(),
        language: "Dockerfile".into(),
        data: files.dockerfile.to_vec(),
        origin: file.origin.clone(),
    };
    let platform = if settings.implicit_platform {
        lowered.config.platform().normalized()
    } else {
        platform.clone()
    };
    let attestations = scanner.map(|scanner| {
        let name = platform.full_name();
        let said =
            scanner.scan(&name, &lowered.state, &lowered.scan_also, lowered.scan_without_cache);
        let definition = marshal(&said.from, Some(&source));
        said.at(definition)
    });
    Ok(PlatformImage {
        platform,
        definition: marshal(&lowered.state, Some(&source)),
        config: lowered.config,
        base_history_len: lowered.base_history_len,
        base_config: lowered.base_config,
        epoch: plan.epoch.map(|nanoseconds| nanoseconds / 1_000_000_000),
        attestations: attestations.into_iter().collect(),
    })
}
