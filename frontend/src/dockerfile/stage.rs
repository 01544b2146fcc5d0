//! Stages and what they need of each other.

use std::collections::HashMap;

use slipway_spec::llb::Lines;
use slipway_spec::{ImageConfig, ImageReference, Platform, timestamp};

use super::document::{Document, ParsedStage};
use super::expand::{Env, Lexer};
use super::instruction::{Command, Instruction, type_node};
use super::parse;
use super::problem::{Problem, Result};
use super::settings::Settings;
use super::suggest::{suggest, with_suggestion};

/// The graph of stages for one target platform.
#[derive(Clone, Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) platform: Platform,
    pub(crate) escape: char,
    pub(crate) globals: Env,
    /// Build arguments, the epoch resolved to a number.
    pub(crate) build_args: std::collections::BTreeMap<String, String>,
    /// Nanoseconds since 1970 that new things are dated with.
    pub(crate) epoch: Option<i64>,
    /// In file order; images named by `COPY --from` follow.
    pub(crate) stages: Vec<Stage>,
    names: HashMap<String, usize>,
    pub(crate) target: usize,
}

/// A stage, or an image that is copied from.
#[derive(Clone, Debug)]
pub(crate) struct Stage {
    /// What progress calls it; may be empty.
    pub(crate) label: String,
    /// Expanded.
    pub(crate) base_name: String,
    pub(crate) base: Base,
    /// What `--platform` says.
    pub(crate) platform: Option<Platform>,
    pub(crate) code: String,
    pub(crate) lines: Lines,
    pub(crate) steps: Vec<Step>,
    /// How many steps progress counts.
    pub(crate) total: usize,
    pub(crate) ignore_cache: bool,
    /// Whether this is an image named by `COPY --from`.
    pub(crate) copied_image: bool,
    /// Filled in by `resolve`, for images.
    pub(crate) image: Option<BaseImage>,
    pub(crate) triggers_added: bool,
}

/// What a stage starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Base {
    Scratch,
    Stage(usize),
    Image,
}

/// A base image as the bridge found it.
#[derive(Clone, Debug)]
pub(crate) struct BaseImage {
    pub(crate) reference: ImageReference,
    pub(crate) config: ImageConfig,
    /// Whether it has no layers.
    pub(crate) empty: bool,
}

/// An instruction of a stage.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) command: Command,
    /// The stage that `COPY --from` names.
    pub(crate) source: Option<usize>,
    /// Whether it is a trigger of the base.
    pub(crate) trigger: bool,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(
        settings: &'a Settings,
        document: &Document,
        platform: &Platform,
    ) -> Result<Self> {
        let last_name = document.stages.last().and_then(|stage| stage.from.name.clone());
        let target_name = settings.target.clone().or(last_name);
        let mut globals = predefined(settings, platform, target_name.as_deref());
        let lexer = Lexer::new(document.escape);
        for command in &document.globals {
            let Instruction::Arg(declarations) = &command.instruction else { continue };
            for declaration in declarations {
                let value = match (settings.build_args.get(&declaration.key), &declaration.default)
                {
                    (Some(value), _) => value.clone(),
                    (None, Some(default)) => {
                        let expanded = lexer.word(default, &globals);
                        expanded.map_err(|reason| Problem::new(reason).at(command.lines))?.text
                    }
                    (None, None) => continue,
                };
                globals.set(&declaration.key, &value);
            }
        }
        let mut plan = Self {
            settings,
            platform: platform.clone(),
            escape: document.escape,
            globals,
            build_args: settings.build_args.clone(),
            epoch: None,
            stages: vec![],
            names: HashMap::new(),
            target: 0,
        };
        plan.resolve_epoch(document)?;
        for (index, stage) in document.stages.iter().enumerate() {
            plan.add_stage(index, stage)?;
        }
        plan.target = plan.find_target()?;
        for index in 0..document.stages.len() {
            let commands = document.stages[index].commands.iter().cloned();
            let steps: Result<Vec<Step>> =
                commands.map(|command| plan.step(command, false)).collect();
            plan.stages[index].steps = steps?;
        }
        plan.refuse_cycles()?;
        if let [only] = plan.stages.as_mut_slice() {
            only.label.clear();
        }
        Ok(plan)
    }

    fn resolve_epoch(&mut self, document: &Document) -> Result<()> {
        const KEY: &str = "SOURCE_DATE_EPOCH";
        let global = self.globals.get(KEY).filter(|value| !value.is_empty()).map(str::to_owned);
        let Some(value) = self.build_args.get(KEY).cloned().or(global) else { return Ok(()) };
        let seconds = match value.as_str() {
            // A context that the client sends has no time of its own.
            "" | "context" => None,
            number => match number.parse::<i64>() {
                Ok(seconds) => Some(seconds),
                Err(_)
                    if document
                        .stages
                        .iter()
                        .any(|s| s.from.name.as_deref() == Some(&value.to_lowercase())) =>
                {
                    return Err(Problem::unsupported(&format!(
                        "a stage as SOURCE_DATE_EPOCH ({value:?})"
                    )));
                }
                Err(_) => {
                    let hint = "it is a number of seconds since 1970";
                    return Err(
                        Problem::new(format!("invalid SOURCE_DATE_EPOCH: {value}")).hint(hint)
                    );
                }
            },
        };
        self.epoch = match seconds {
            Some(seconds) => Some(seconds.checked_mul(1_000_000_000).ok_or_else(|| {
                Problem::new(format!(
                    "invalid SOURCE_DATE_EPOCH: {value}: the time is too far away"
                ))
            })?),
            None => None,
        };
        let text = seconds.map(|seconds| seconds.to_string());
        if self.build_args.contains_key(KEY) {
            match &text {
                Some(text) => self.build_args.insert(KEY.into(), text.clone()),
                None => self.build_args.remove(KEY),
            };
        }
        if self.globals.get(KEY).is_some() {
            match &text {
                Some(text) => self.globals.set(KEY, text),
                None => self.globals.remove(KEY),
            }
        }
        Ok(())
    }

    /// Returns the time for history entries.
    pub(crate) fn created(&self) -> Option<String> {
        self.epoch.map(timestamp::format)
    }

    fn add_stage(&mut self, index: usize, stage: &ParsedStage) -> Result<()> {
        let lexer = Lexer::new(self.escape);
        let located = |problem: Problem| problem.at(stage.lines);
        let expanded = lexer.word(&stage.from.base, &self.globals);
        let base_name = expanded.map_err(|reason| located(Problem::new(reason)))?.text;
        if base_name.is_empty() {
            let message = format!("base name ({}) should not be blank", stage.from.base);
            let hint =
                "an ARG used in FROM must be declared before the first FROM and have a value";
            return Err(located(Problem::new(message).hint(hint)));
        }
        let platform = match stage.from.platform.as_str() {
            "" => None,
            text => {
                let expansion = lexer.word(text, &self.globals);
                let expansion = expansion.map_err(|reason| {
                    located(Problem::new(format!(
                        "failed to process arguments for platform {text}: {reason}"
                    )))
                })?;
                let suggestion = expansion
                    .unmatched
                    .iter()
                    .find_map(|name| suggest(name, self.globals.names(), true));
                if expansion.text.is_empty() {
                    let message = format!("empty platform value from expression {text}");
                    return Err(located(Problem::new(with_suggestion(message, suggestion))));
                }
                Some(Platform::parse_raw(&expansion.text).map_err(|error| {
                    let message = format!("failed to parse platform {text}: {error}");
                    located(Problem::new(with_suggestion(message, suggestion)))
                })?)
            }
        };
        // Stage names are lower case here and the reference is not: `FROM Build` is an image.
        let base = match self.names.get(&base_name) {
            Some(base) => Base::Stage(*base),
            None if base_name == "scratch" => Base::Scratch,
            None => Base::Image,
        };
        let counted = stage
            .commands
            .iter()
            .filter(|command| matches!(command.name, "ADD" | "COPY" | "RUN" | "WORKDIR"));
        let total = counted.count() + usize::from(base == Base::Image);
        self.stages.push(Stage {
            label: stage.from.name.clone().unwrap_or_else(|| format!("stage-{index}")),
            base_name,
            base,
            platform,
            code: stage.code.clone(),
            lines: stage.lines,
            steps: vec![],
            total,
            ignore_cache: self.settings.no_cache.applies_to(stage.from.name.as_deref()),
            copied_image: false,
            image: None,
            triggers_added: false,
        });
        if let Some(name) = &stage.from.name {
            self.names.insert(name.clone(), index);
        }
        Ok(())
    }

    fn find_target(&self) -> Result<usize> {
        let Some(target) = &self.settings.target else { return Ok(self.stages.len() - 1) };
        self.names.get(&target.to_lowercase()).copied().ok_or_else(|| {
            let suggestion = suggest(target, self.names(), false);
            Problem::new(with_suggestion(
                format!("target stage {target:?} could not be found"),
                suggestion,
            ))
        })
    }

    /// Returns what stages are called.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.stages.iter().filter(|stage| !stage.copied_image).map(|stage| stage.label.as_str())
    }

    /// Finds the source of a command; an image that is copied from becomes a stage.
    fn step(&mut self, command: Command, trigger: bool) -> Result<Step> {
        let from = match &command.instruction {
            Instruction::Copy(copy) if !copy.from.is_empty() => copy.from.clone(),
            _ => return Ok(Step { command, source: None, trigger }),
        };
        let lines = command.lines;
        let located = |problem: Problem| problem.at(lines);
        let expanded = Lexer::new(self.escape).word(&from, &Env::default());
        if expanded.map_err(|reason| located(Problem::new(reason)))?.text != from {
            let message = "variable expansion is not supported for --from, define a new stage with FROM using ARG from \
                           global scope as a workaround";
            return Err(located(Problem::new(message)));
        }
        let source = if let Ok(index) = from.parse::<i64>() {
            let files = self.stages.iter().filter(|stage| !stage.copied_image).count();
            let found = usize::try_from(index).ok().filter(|index| *index < files);
            found.ok_or_else(|| located(Problem::new(format!("invalid stage index {index}"))))?
        } else if let Some(index) = self.names.get(&from.to_lowercase()) {
            *index
        } else {
            self.stages.push(Stage {
                label: String::new(),
                base: if from == "scratch" { Base::Scratch } else { Base::Image },
                base_name: from,
                platform: None,
                code: String::new(),
                lines,
                steps: vec![],
                total: 0,
                ignore_cache: false,
                copied_image: true,
                image: None,
                triggers_added: true,
            });
            self.stages.len() - 1
        };
        Ok(Step { command, source: Some(source), trigger })
    }

    /// Puts the base's triggers before a stage's own instructions.
    pub(crate) fn add_triggers(&mut self, index: usize) -> Result<()> {
        let stage = &mut self.stages[index];
        if std::mem::replace(&mut stage.triggers_added, true) {
            return Ok(());
        }
        let lines = stage.lines;
        let (owner, triggers): (String, Vec<String>) = match stage.base {
            Base::Scratch => return Ok(()),
            Base::Image => {
                let image = stage
                    .image
                    .as_mut()
                    .map(|image| std::mem::take(&mut image.config.config.on_build));
                (format!("image {}", stage.base_name), image.unwrap_or_default())
            }
            Base::Stage(base) => {
                let owner = format!("stage {}", self.stages[base].label);
                let triggers = self.stages[base].steps.iter().filter_map(|step| {
                    match &step.command.instruction {
                        Instruction::Onbuild(text) => Some(text.clone()),
                        _ => None,
                    }
                });
                (owner, triggers.collect())
            }
        };
        let mut steps = vec![];
        for trigger in triggers {
            let problem = |problem: Problem| {
                problem.prefixed(&format!("ONBUILD trigger {trigger:?} of {owner}")).moved_to(lines)
            };
            let ast = parse::parse(&trigger).map_err(problem)?;
            let [node] = ast.nodes.as_slice() else {
                return Err(problem(Problem::new("onbuild trigger should be a single expression")));
            };
            let mut command = type_node(node).map_err(problem)?;
            if matches!(
                command.instruction,
                Instruction::From(_) | Instruction::Onbuild(_) | Instruction::Maintainer(_)
            ) {
                return Err(problem(Problem::new(format!(
                    "{} isn't allowed as an ONBUILD trigger",
                    command.name
                ))));
            }
            command.lines = lines;
            steps.push(self.step(command, true).map_err(problem)?);
        }
        let stage = &mut self.stages[index];
        stage.total += steps.len();
        steps.append(&mut stage.steps);
        stage.steps = steps;
        self.refuse_cycles()
    }

    fn needs(&self, index: usize) -> impl Iterator<Item = usize> {
        let stage = &self.stages[index];
        let base = match stage.base {
            Base::Stage(base) => Some(base),
            Base::Scratch | Base::Image => None,
        };
        base.into_iter().chain(stage.steps.iter().filter_map(|step| step.source))
    }

    /// Returns for each stage whether the target needs it.
    pub(crate) fn reachable(&self) -> Vec<bool> {
        let mut seen = vec![false; self.stages.len()];
        let mut stack = vec![self.target];
        while let Some(index) = stack.pop() {
            if !std::mem::replace(&mut seen[index], true) {
                stack.extend(self.needs(index));
            }
        }
        seen
    }

    fn refuse_cycles(&self) -> Result<()> {
        #[derive(Clone, Copy, PartialEq)]
        enum Mark {
            New,
            Open,
            Done,
        }
        let mut marks = vec![Mark::New; self.stages.len()];
        for start in 0..self.stages.len() {
            if marks[start] != Mark::New {
                continue;
            }
            marks[start] = Mark::Open;
            let mut stack = vec![(start, self.needs(start).collect::<Vec<_>>())];
            while let Some((index, rest)) = stack.last_mut() {
                let Some(next) = rest.pop() else {
                    marks[*index] = Mark::Done;
                    stack.pop();
                    continue;
                };
                match marks[next] {
                    Mark::Done => {}
                    Mark::New => {
                        marks[next] = Mark::Open;
                        stack.push((next, self.needs(next).collect()));
                    }
                    Mark::Open => {
                        let user = &self.stages[*index];
                        let step = user.steps.iter().find(|step| step.source == Some(next));
                        let message = format!(
                            "circular dependency detected on stage: {}",
                            self.stages[next].label
                        );
                        return Err(Problem::new(message)
                            .at(step.map_or(user.lines, |step| step.command.lines)));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Writes a platform with the version and features of its system.
pub(crate) fn format_all(platform: &Platform) -> String {
    let mut system = platform.os_version.clone().unwrap_or_default();
    for feature in &platform.os_features {
        system.push('+');
        system.push_str(feature);
    }
    let plain = platform.to_string();
    match plain.strip_prefix(platform.os.as_str()) {
        Some(rest) if !system.is_empty() => format!("{}({system}){rest}", platform.os),
        _ => plain,
    }
}

/// The arguments that exist without being declared, in global scope.
fn predefined(settings: &Settings, target: &Platform, target_stage: Option<&str>) -> Env {
    let build = &settings.build_platform;
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let mut env = Env::default();
    for (name, value) in [
        ("BUILDPLATFORM", build.to_string()),
        ("BUILDOS", build.os.clone()),
        ("BUILDOSVERSION", text(&build.os_version)),
        ("BUILDARCH", build.architecture.clone()),
        ("BUILDVARIANT", text(&build.variant)),
        ("TARGETPLATFORM", format_all(target)),
        ("TARGETOS", target.os.clone()),
        ("TARGETOSVERSION", text(&target.os_version)),
        ("TARGETARCH", target.architecture.clone()),
        ("TARGETVARIANT", text(&target.variant)),
        ("TARGETSTAGE", target_stage.unwrap_or("default").to_owned()),
    ] {
        env.set(name, settings.build_args.get(name).unwrap_or(&value));
    }
    env
}
