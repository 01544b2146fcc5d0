//! Stages and what they need of each other.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use slipway_spec::llb::Lines;
use slipway_spec::{ImageConfig, ImageReference, Platform, timestamp};

use super::context::{Loaded, NamedContext};
use super::document::{Document, ParsedStage};
use super::expand::{Env, Lexer};
use super::instruction::{Command, Instruction, type_node};
use super::lint::Linter;
use super::outline::{ArgInfo, doc_comment};
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
    /// What is declared before the first stage.
    pub(crate) global_args: BTreeMap<String, ArgInfo>,
    /// Build arguments, the epoch resolved to a number.
    pub(crate) build_args: std::collections::BTreeMap<String, String>,
    /// Nanoseconds since 1970 that new things are dated with.
    pub(crate) epoch: Option<i64>,
    /// How many seconds the clocks are ahead where that time comes from.
    epoch_zone: i64,
    /// In file order; images named by `COPY --from` follow.
    pub(crate) stages: Vec<Stage>,
    names: HashMap<String, usize>,
    pub(crate) target: usize,
    /// Whether stages that the target does not need are of interest, too.
    pub(crate) all_stages: bool,
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
    /// Whether no `FROM` made this: an instruction names its base.
    pub(crate) copied_image: bool,
    /// The named context that stands for this stage.
    pub(crate) replaced_by: Option<NamedContext>,
    /// Filled in by `resolve`, for images.
    pub(crate) image: Option<BaseImage>,
    /// Filled in by `resolve`, where a named context is the base or stands for the stage.
    pub(crate) context: Option<Loaded>,
    pub(crate) triggers_added: bool,
    /// Arguments that `FROM` uses.
    pub(crate) used_args: BTreeSet<String>,
}

/// What a stage starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Base {
    Scratch,
    Stage(usize),
    /// An image, or a named context of that name.
    Image,
    /// Nothing: a named context stands for the whole stage.
    Replaced,
}

/// A base image as the bridge found it.
#[derive(Clone, Debug)]
pub(crate) struct BaseImage {
    pub(crate) reference: ImageReference,
    pub(crate) config: ImageConfig,
    /// The config as it was found.
    pub(crate) original: ImageConfig,
    /// Whether it has no layers.
    pub(crate) empty: bool,
}

/// An instruction of a stage.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) command: Command,
    /// The stages that `--from` of a copy or of each mount names.
    pub(crate) sources: Vec<usize>,
    /// Whether it is a trigger of the base.
    pub(crate) trigger: bool,
}

const EPOCH: &str = "SOURCE_DATE_EPOCH";

impl<'a> Plan<'a> {
    pub(crate) fn new(
        settings: &'a Settings,
        document: &Document,
        platform: &Platform,
        lint: &Linter,
    ) -> Result<Self> {
        let last_name = document.stages.last().and_then(|stage| stage.from.name.clone());
        let target_name = settings.target.clone().or(last_name);
        let mut globals = predefined(settings, platform, target_name.as_deref());
        let lexer = Lexer::new(document.escape);
        lint.default_bases(document, &globals);
        let mut global_args: BTreeMap<String, ArgInfo> = BTreeMap::new();
        for command in &document.globals {
            let Instruction::Arg(declarations) = &command.instruction else { continue };
            for declaration in declarations {
                let key = &declaration.key;
                let mut info = ArgInfo {
                    description: doc_comment(&command.comments, key),
                    ..ArgInfo::at(command.lines)
                };
                let value = match (settings.build_args.get(key), &declaration.default) {
                    (Some(value), _) => Some(value.clone()),
                    (None, Some(default)) => {
                        let expanded = lexer.word(default, &globals);
                        let expanded =
                            expanded.map_err(|reason| Problem::new(reason).at(command.lines))?;
                        info.set_needs(key, expanded.matched, global_args.get(key));
                        Some(expanded.text)
                    }
                    (None, None) => None,
                };
                if let Some(value) = value {
                    globals.set(key, &value);
                    info.value = value;
                }
                global_args.insert(key.clone(), info);
            }
        }
        let plan = Self {
            settings,
            platform: platform.clone(),
            escape: document.escape,
            globals,
            global_args,
            build_args: settings.build_args.clone(),
            epoch: None,
            epoch_zone: 0,
            stages: vec![],
            names: HashMap::new(),
            target: 0,
            all_stages: false,
        };
        Ok(plan)
    }

    /// Adds the stages of the file, after the epoch was set.
    pub(crate) fn add_stages(&mut self, document: &Document, lint: &Linter) -> Result<()> {
        let plan = self;
        for (index, stage) in document.stages.iter().enumerate() {
            plan.add_stage(index, stage, lint)?;
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
        Ok(())
    }

    /// Returns what `SOURCE_DATE_EPOCH` says: a number, or the name of something that has a time.
    pub(crate) fn epoch_text(&self) -> Option<String> {
        let global = self.globals.get(EPOCH).filter(|value| !value.is_empty()).map(str::to_owned);
        self.build_args.get(EPOCH).cloned().or(global)
    }

    /// Sets the time for new things, in seconds since 1970, also where instructions see it.
    ///
    /// History writes it in the zone of the commit that it comes from, which is `east` seconds ahead.
    pub(crate) fn set_epoch(&mut self, seconds: Option<i64>, east: i64) -> Result<()> {
        self.epoch_zone = east;
        self.epoch = match seconds {
            Some(seconds) => Some(seconds.checked_mul(1_000_000_000).ok_or_else(|| {
                Problem::new(format!(
                    "invalid SOURCE_DATE_EPOCH: {seconds}: the time is too far away"
                ))
            })?),
            None => None,
        };
        let text = seconds.map(|seconds| seconds.to_string());
        if self.build_args.contains_key(EPOCH) {
            match &text {
                Some(text) => self.build_args.insert(EPOCH.into(), text.clone()),
                None => self.build_args.remove(EPOCH),
            };
        }
        if self.globals.get(EPOCH).is_some() {
            match &text {
                Some(text) => self.globals.set(EPOCH, text),
                None => self.globals.remove(EPOCH),
            }
        }
        Ok(())
    }

    /// Returns the time for history entries.
    pub(crate) fn created(&self) -> Option<String> {
        let (east, epoch) = (self.epoch_zone, self.epoch?);
        if east == 0 {
            return Some(timestamp::format(epoch));
        }
        let local = timestamp::format(epoch.saturating_add(east.saturating_mul(1_000_000_000)));
        let (sign, minutes) = (if east < 0 { '-' } else { '+' }, east.abs() / 60);
        let zone = format!("{sign}{:02}:{:02}", minutes / 60, minutes % 60);
        Some(local.replace('Z', &zone))
    }

    fn add_stage(&mut self, index: usize, stage: &ParsedStage, lint: &Linter) -> Result<()> {
        let lexer = Lexer::new(self.escape);
        let located = |problem: Problem| problem.at(stage.lines);
        let lint = lint.under(&stage.comments);
        let declared: BTreeSet<String> = self.global_args.keys().cloned().collect();
        let (base, outcome) = lexer.look_up(&stage.from.base, &self.globals);
        lint.undefined_in_from(&base.unmatched, &self.globals, &declared, stage.lines);
        outcome.map_err(|reason| located(Problem::new(reason)))?;
        let base_name = base.text;
        let mut used_args = base.matched;
        if base_name.is_empty() {
            let message = format!("base name ({}) should not be blank", stage.from.base);
            let hint =
                "an ARG used in FROM must be declared before the first FROM and have a value";
            return Err(located(Problem::new(message).hint(hint)));
        }
        let platform = match stage.from.platform.as_str() {
            "" => None,
            text => {
                let (expansion, outcome) = lexer.look_up(text, &self.globals);
                let name = stage.from.name.as_deref().unwrap_or_default();
                let unmatched = &expansion.unmatched;
                lint.undefined_in_from(unmatched, &self.globals, &declared, stage.lines);
                lint.platform_flag(text, &expansion, &self.globals, name, stage.lines);
                outcome.map_err(|reason| {
                    located(Problem::new(format!(
                        "failed to process arguments for platform {text}: {reason}"
                    )))
                })?;
                used_args.extend(expansion.matched.iter().cloned());
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
        let replaced_by = match &stage.from.name {
            Some(name) => {
                let platform = platform.as_ref().unwrap_or(&self.platform);
                self.settings.context_for(name, platform).map_err(located)?
            }
            None => None,
        };
        // Stage names are lower case here and the reference is not: `FROM Build` is an image.
        let base = match self.names.get(&base_name) {
            _ if replaced_by.is_some() => Base::Replaced,
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
            replaced_by,
            image: None,
            context: None,
            triggers_added: false,
            used_args,
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

    /// Finds the sources of a command; what is no stage becomes one.
    fn step(&mut self, command: Command, trigger: bool) -> Result<Step> {
        let lines = command.lines;
        let sources = match &command.instruction {
            Instruction::Copy(copy) if !copy.from.is_empty() => {
                vec![self.copied_stage(&copy.from, lines).map_err(|problem| problem.at(lines))?]
            }
            // A mount that names nothing has a stage, too: as upstream does it, an empty one.
            Instruction::Run(run) => run
                .mounts
                .iter()
                .map(|mount| match mount.from.as_str() {
                    "" => self.named_stage("scratch", lines),
                    from => self.named_stage(from, lines),
                })
                .collect(),
            _ => vec![],
        };
        Ok(Step { command, sources, trigger })
    }

    fn copied_stage(&mut self, from: &str, lines: Lines) -> Result<usize> {
        let expanded = Lexer::new(self.escape).word(from, &Env::default());
        if expanded.map_err(Problem::new)?.text != from {
            return Err(Problem::new(
                "variable expansion is not supported for --from, define a new stage with FROM using ARG from \
                 global scope as a workaround",
            ));
        }
        match from.parse::<i64>() {
            Ok(index) => {
                let index = usize::try_from(index).ok().filter(|at| *at < self.stages.len());
                let index =
                    index.ok_or_else(|| Problem::new(format!("invalid stage index {from}")))?;
                // What no `FROM` made is counted again, each time it is named. As upstream does it.
                if self.stages[index].copied_image {
                    let again = Stage { image: None, context: None, ..self.stages[index].clone() };
                    self.stages.push(again);
                }
                Ok(index)
            }
            Err(_) => Ok(self.named_stage(from, lines)),
        }
    }

    fn named_stage(&mut self, name: &str, lines: Lines) -> usize {
        if let Some(index) = self.names.get(&name.to_lowercase()) {
            return *index;
        }
        self.stages.push(Stage {
            label: String::new(),
            base: if name == "scratch" { Base::Scratch } else { Base::Image },
            base_name: name.to_owned(),
            platform: None,
            code: String::new(),
            lines,
            steps: vec![],
            total: 0,
            ignore_cache: false,
            copied_image: true,
            replaced_by: None,
            image: None,
            context: None,
            triggers_added: true,
            used_args: BTreeSet::new(),
        });
        self.stages.len() - 1
    }

    /// Returns the stage at the bottom of those that a stage builds on.
    pub(crate) fn root_of(&self, mut index: usize) -> usize {
        while let Base::Stage(base) = self.stages[index].base {
            index = base;
        }
        index
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
            Base::Image | Base::Replaced => {
                let image = stage.image.as_mut().map(|image| &mut image.config);
                let context = stage.context.as_mut().and_then(|context| context.config.as_mut());
                let triggers =
                    image.or(context).map(|config| std::mem::take(&mut config.config.on_build));
                (format!("image {}", stage.base_name), triggers.unwrap_or_default())
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

    /// Returns the stages that a stage is made of, its base first.
    pub(crate) fn needs(&self, index: usize) -> impl Iterator<Item = usize> {
        let stage = &self.stages[index];
        let base = match stage.base {
            Base::Stage(base) => Some(base),
            Base::Scratch | Base::Image | Base::Replaced => None,
        };
        let sources = stage.steps.iter().flat_map(|step| step.sources.iter().copied());
        base.into_iter().chain(sources)
    }

    /// Returns for each stage whether it is of interest.
    pub(crate) fn wanted(&self) -> Vec<bool> {
        if self.all_stages { vec![true; self.stages.len()] } else { self.reachable() }
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

    /// Refuses stages that name each other. A base is always above, and so is not looked at.
    fn refuse_cycles(&self) -> Result<()> {
        #[derive(Clone, Copy, PartialEq)]
        enum Mark {
            New,
            Open,
            Done,
        }
        let named = |index: usize| -> Vec<usize> {
            self.stages[index].steps.iter().flat_map(|step| step.sources.iter().copied()).collect()
        };
        let mut marks = vec![Mark::New; self.stages.len()];
        for start in 0..self.stages.len() {
            if marks[start] != Mark::New {
                continue;
            }
            marks[start] = Mark::Open;
            let mut stack = vec![(start, named(start))];
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
                        stack.push((next, named(next)));
                    }
                    Mark::Open => {
                        let user = &self.stages[*index];
                        let step = user.steps.iter().find(|step| step.sources.contains(&next));
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
    platform.full_name()
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
