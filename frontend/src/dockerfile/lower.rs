//! From stages to the build graph and the image config. Pure: everything unknown was asked for before.

mod config;
mod copy;
mod expose;
mod mount;
mod name;
mod run;
mod signal;
mod windows;

use slipway_spec::flag;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use slipway_spec::llb::{Lines, Owner, State, VertexOptions, WhoIs};
use slipway_spec::pattern::clean_path;
use slipway_spec::{History, ImageConfig, Platform};

use super::context::Loaded;
use super::expand::{Env, Lexer};
use super::instruction::{Command, Instruction};
use super::lint::{Linter, UsedOnce};
use super::outline::StageUses;
use super::problem::{Problem, Result};
use super::stage::{Base, Plan, Stage, Step};

pub(crate) use copy::http_source;

/// What history entries are marked with.
const COMMENT: &str = "buildkit.dockerfile.v0";

/// The `PATH` of images that set none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What scanners know the files to build from by.
pub(crate) const SCANNED_CONTEXT: &str = "context";

/// The system whose paths and defaults are different ones.
const WINDOWS: &str = "windows";

/// The target's outcome.
#[derive(Debug)]
pub(crate) struct Lowered {
    pub(crate) state: State,
    pub(crate) config: ImageConfig,
    pub(crate) base_history_len: usize,
    pub(crate) used: Used,
    /// The config of the image at the bottom of the target, as it was found.
    pub(crate) base_config: Option<ImageConfig>,
    /// What a scanner is to look at beside the target.
    pub(crate) scan_also: BTreeMap<String, State>,
    /// Whether it is to look even if it has looked at the same before.
    pub(crate) scan_without_cache: bool,
    /// What each stage uses of what the caller may give; empty for stages that were not lowered.
    pub(crate) uses: Vec<StageUses>,
}

/// Which paths are used of what the client sends; `/` is all of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Used {
    /// Of the build context; empty when nothing is.
    pub(crate) context: BTreeSet<String>,
    /// Of each stage that builds on no other; of use where a folder of the client is its base.
    pub(crate) stages: Vec<BTreeSet<String>>,
}

impl Used {
    /// Returns whether to lower once more, now that it is known what is used.
    pub(crate) fn matters(&self, plan: &Plan<'_>) -> bool {
        let local = |stage: &Stage| stage.context.as_ref().is_some_and(Loaded::is_local);
        !self.context.is_empty() || plan.stages.iter().any(local)
    }
}

/// What a stage leaves to those that build on it.
#[derive(Clone, Debug)]
struct Outcome {
    state: State,
    /// Without its history.
    config: ImageConfig,
    /// Stages that build on each other share most of it.
    history: Vec<Arc<History>>,
    platform: Platform,
    /// What instructions and processes see: the image's environment and build arguments.
    env: Env,
    cwd: String,
    user: String,
    /// Arguments declared so far, with what they were declared as.
    args: Vec<(String, Option<String>)>,
    base_history_len: usize,
    /// Whether a stage of the file has said where it works.
    workdir_set: bool,
}

/// Lowers every stage the target needs. `context` stands for the files to build from, and `known` says which paths are
/// used, as far as that is known.
pub(crate) fn lower(
    plan: &Plan<'_>,
    context: &State,
    known: &Used,
    lint: &Linter,
) -> Result<Lowered> {
    let reachable = plan.wanted();
    let mut outcomes: Vec<Option<Outcome>> = vec![None; plan.stages.len()];
    // Images that are copied from and named contexts need nothing of other stages, and others may need them.
    let ready = |stage: &Stage| stage.copied_image || stage.base == Base::Replaced;
    for (index, stage) in plan.stages.iter().enumerate() {
        if reachable[index] && ready(stage) {
            outcomes[index] = Some(start(plan, index, known, &outcomes)?);
        }
    }
    let mut used =
        Used { context: BTreeSet::new(), stages: vec![BTreeSet::new(); plan.stages.len()] };
    let mut scan_also = BTreeMap::new();
    let mut scan_without_cache = plan.stages[plan.target].ignore_cache;
    let mut uses = vec![StageUses::default(); plan.stages.len()];
    for (index, stage) in plan.stages.iter().enumerate() {
        if !reachable[index] || ready(stage) {
            continue;
        }
        let begun = start(plan, index, known, &outcomes)?;
        // An image without layers has no step, though progress counts one.
        let counter = usize::from(stage.image.as_ref().is_some_and(|image| !image.empty));
        let mut builder = Builder {
            plan,
            stage,
            outcomes: &outcomes,
            context,
            root: plan.root_of(index),
            used: &mut used,
            out: begun,
            counter,
            in_trigger: false,
            cmd_set: false,
            used_once: UsedOnce::default(),
            uses: &mut uses[index],
            lint: lint.clone(),
            lines: stage.lines,
        };
        builder.prepare().map_err(|problem| problem.at(stage.lines))?;
        for step in &stage.steps {
            builder.lint = lint.under(&step.command.comments);
            builder.lines = step.command.lines;
            builder.step(step).map_err(|problem| problem.at(step.command.lines))?;
        }
        if index != plan.target && builder.is_scanned("BUILDKIT_SBOM_SCAN_STAGE") {
            scan_also.insert(stage.label.clone(), builder.out.state.clone());
            scan_without_cache |= stage.ignore_cache;
        }
        if index == plan.target && builder.is_scanned("BUILDKIT_SBOM_SCAN_CONTEXT") {
            scan_also.insert(SCANNED_CONTEXT.into(), context.clone());
        }
        outcomes[index] = Some(builder.out);
    }
    // All of the target is wanted.
    used.stages[plan.root_of(plan.target)].insert("/".into());
    let Some(out) = outcomes.swap_remove(plan.target) else {
        return Err(Problem::new("the target stage was not built"));
    };
    let history = out.history.into_iter().map(Arc::unwrap_or_clone).collect();
    Ok(Lowered {
        state: out.state,
        config: finish(plan, ImageConfig { history, ..out.config }),
        base_history_len: out.base_history_len,
        used,
        base_config: base_config(plan, &plan.stages[plan.root_of(plan.target)]),
        scan_also,
        scan_without_cache,
        uses,
    })
}

fn base_config(plan: &Plan<'_>, root: &Stage) -> Option<ImageConfig> {
    match (&root.image, &root.context) {
        (Some(image), _) => Some(image.original.clone()),
        // A context in place of a whole stage has no base.
        (None, Some(context)) if root.base != Base::Replaced => {
            let platform = root.platform.as_ref().unwrap_or(&plan.platform);
            Some(context.original.clone().unwrap_or_else(|| empty_config(platform)))
        }
        (None, _) => None,
    }
}

/// Gives a stage its base.
fn start(
    plan: &Plan<'_>,
    index: usize,
    known: &Used,
    outcomes: &[Option<Outcome>],
) -> Result<Outcome> {
    let stage = &plan.stages[index];
    let context_state = |context: &Loaded| {
        let none = BTreeSet::new();
        context.state(plan.settings, known.stages.get(index).unwrap_or(&none))
    };
    let out = |state: State, mut config: ImageConfig, platform: Platform| Outcome {
        state,
        base_history_len: config.history.len(),
        history: std::mem::take(&mut config.history).into_iter().map(Arc::new).collect(),
        config,
        platform,
        env: Env::default(),
        cwd: "/".into(),
        user: String::new(),
        args: vec![],
        workdir_set: false,
    };
    let begun = match stage.base {
        // Whatever --platform says, nothing is for the target.
        Base::Scratch => out(State::scratch(), empty_config(&plan.platform), plan.platform.clone()),
        Base::Stage(base) => {
            let Some(mut out) = outcomes[base].clone() else {
                return Err(Problem::new(format!("stage {} was not built", stage.base_name))
                    .at(stage.lines));
            };
            out.config.config.on_build.clear();
            out
        }
        Base::Replaced => {
            let Some(context) = &stage.context else {
                return Err(Problem::new(format!("the context {} was not loaded", stage.label))
                    .at(stage.lines));
            };
            let config = context.config.clone().unwrap_or_default();
            let known = !config.os.is_empty() && !config.architecture.is_empty();
            let platform = if known { config.platform() } else { plan.platform.clone() };
            let mut begun = out(context_state(context), config, platform);
            // What an image says of processes counts at once; nothing else is done with the stage.
            for entry in &begun.config.config.env {
                let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
                begun.env.set(key, value);
            }
            begun.cwd = join("/", &begun.config.config.working_dir);
            begun
        }
        Base::Image if stage.context.is_some() => {
            let platform = stage.platform.clone().unwrap_or_else(|| plan.platform.clone());
            let context = stage.context.as_ref();
            let config = context.and_then(|context| context.config.clone());
            let config = config.unwrap_or_else(|| empty_config(&platform));
            let state = context.map(context_state).unwrap_or_default();
            out(state, config, platform)
        }
        Base::Image => {
            let Some(image) = &stage.image else {
                return Err(Problem::new(format!("image {} was not resolved", stage.base_name))
                    .at(stage.lines));
            };
            let platform = stage.platform.clone().unwrap_or_else(|| plan.platform.clone());
            let state = if image.empty {
                State::scratch()
            } else {
                image_state(plan, stage, image, &platform)
            };
            out(state, image.config.clone(), platform)
        }
    };
    Ok(begun)
}

fn image_state(
    plan: &Plan<'_>,
    stage: &Stage,
    image: &super::stage::BaseImage,
    platform: &Platform,
) -> State {
    let text = format!("FROM {}", image.reference);
    let name = if stage.total == 0 {
        text
    } else {
        name::prefix(plan, stage, 1, platform, None, false) + &text
    };
    let description = [("com.docker.dockerfile.v1.command".to_owned(), stage.code.clone())];
    let attrs = match plan.settings.resolve_mode {
        crate::ResolveMode::Default => None,
        crate::ResolveMode::Pull => Some("pull"),
        crate::ResolveMode::Local => Some("local"),
    };
    let attrs = attrs.map(|mode| ("image.resolvemode".to_owned(), mode.to_owned()));
    let options = VertexOptions {
        name,
        description: description.into(),
        lines: vec![stage.lines],
        platform: Some(platform.clone()),
        ..VertexOptions::default()
    };
    State::image(&image.reference, attrs.into_iter().collect(), options)
}

fn empty_config(platform: &Platform) -> ImageConfig {
    let mut config = ImageConfig {
        architecture: platform.architecture.clone(),
        os: platform.os.clone(),
        os_version: platform.os_version.clone(),
        os_features: platform.os_features.clone(),
        variant: platform.variant.clone(),
        ..ImageConfig::default()
    };
    config.config.working_dir = "/".into();
    // Windows has its own idea of it.
    if platform.os != WINDOWS {
        config.config.env = vec![format!("PATH={DEFAULT_PATH}")];
    }
    config
}

/// Makes the config say what was asked for.
fn finish(plan: &Plan<'_>, mut config: ImageConfig) -> ImageConfig {
    let labels = plan.settings.labels.iter().map(|(key, value)| (key.clone(), value.clone()));
    config.config.labels.extend(labels);
    if !plan.settings.implicit_platform {
        let target = &plan.platform;
        let same = config.os == target.os && config.architecture == target.architecture;
        config.os.clone_from(&target.os);
        config.architecture.clone_from(&target.architecture);
        if target.variant.is_some() || !same {
            config.variant.clone_from(&target.variant);
        }
        if target.os_version.is_some() || !same {
            config.os_version.clone_from(&target.os_version);
        }
        if !target.os_features.is_empty() {
            config.os_features.clone_from(&target.os_features);
        }
    }
    let platform = config.platform().normalized();
    // Files that are no image have no platform.
    config.os = if platform.os.is_empty() { "linux".into() } else { platform.os };
    config.architecture = platform.architecture;
    config.variant = platform.variant;
    config.created = None;
    config
}

/// A stage under construction.
struct Builder<'a> {
    plan: &'a Plan<'a>,
    stage: &'a Stage,
    outcomes: &'a [Option<Outcome>],
    context: &'a State,
    /// The stage at the bottom of this one.
    root: usize,
    used: &'a mut Used,
    out: Outcome,
    /// Steps named so far.
    counter: usize,
    in_trigger: bool,
    /// Whether this stage has its own `CMD`.
    cmd_set: bool,
    used_once: UsedOnce,
    uses: &'a mut StageUses,
    /// The linter for the instruction at hand, …
    lint: Linter,
    /// … and where it stands.
    lines: Lines,
}

impl Builder<'_> {
    /// Returns whether an argument names this stage, or all.
    fn is_scanned(&self, name: &str) -> bool {
        let declared =
            self.out.args.iter().rev().find(|(key, value)| key == name && value.is_some());
        let value = match declared {
            Some((_, value)) => value.as_deref(),
            None => self.plan.globals.get(name),
        };
        value.is_some_and(|value| match flag::parse(value) {
            Some(all) => all,
            None => value.split(',').any(|stage| stage == self.stage.label),
        })
    }

    /// Applies the base's config to what instructions see.
    fn prepare(&mut self) -> Result<()> {
        let windows = self.is_windows();
        let config = &mut self.out.config.config;
        if !windows && !config.env.iter().any(|entry| entry.split('=').next() == Some("PATH")) {
            config.env.push(format!("PATH={DEFAULT_PATH}"));
        }
        for entry in &config.env {
            let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
            self.out.env.set(key, value);
        }
        if !config.user.is_empty() {
            self.out.user.clone_from(&config.user);
        }
        if !config.working_dir.is_empty() {
            let path = config.working_dir.clone();
            self.enter("/", &path)?;
        }
        Ok(())
    }

    fn is_windows(&self) -> bool {
        self.out.platform.os == WINDOWS
    }

    /// Makes `path`, seen from `current`, the folder that later instructions work in.
    fn enter(&mut self, current: &str, path: &str) -> Result<()> {
        if self.is_windows() {
            let path =
                change_dir(&windows::without_drive(current)?, &windows::without_drive(path)?);
            let path = clean_path(&path);
            self.out.config.config.working_dir = windows::with_backslashes(&path);
            self.out.cwd = path;
        } else {
            let path = change_dir(current, path);
            self.out.config.config.working_dir.clone_from(&path);
            self.out.cwd = path;
        }
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        self.in_trigger = step.trigger;
        let command = &step.command;
        self.lint.used_once(command, &mut self.used_once);
        match &command.instruction {
            Instruction::Arg(declarations) => self.arg(declarations, command),
            Instruction::Cmd(line) => {
                self.lint_shell(line.shell, command);
                self.cmd(line);
                Ok(())
            }
            Instruction::Copy(copy) => self.copy(copy, step),
            Instruction::Entrypoint(line) => {
                self.lint_shell(line.shell, command);
                self.entrypoint(line);
                Ok(())
            }
            Instruction::Env(pairs) => self.env(pairs, command),
            Instruction::Expose(ports) => self.expose(ports),
            Instruction::From(_) => Err(Problem::new("FROM cannot stand inside a stage")),
            Instruction::Healthcheck(check) => {
                self.healthcheck(check);
                Ok(())
            }
            Instruction::Label(pairs) => self.label(pairs, command),
            Instruction::Maintainer(name) => {
                self.out.config.author = Some(name.clone());
                self.history(format!("MAINTAINER {name}"), false);
                Ok(())
            }
            Instruction::Onbuild(trigger) => {
                self.out.config.config.on_build.push(trigger.clone());
                Ok(())
            }
            Instruction::Run(run) => self.run(run, step),
            Instruction::Shell(words) => {
                self.out.config.config.shell.clone_from(words);
                self.history(format!("SHELL {}", super::go_format::plain_list(words)), false);
                Ok(())
            }
            Instruction::Stopsignal(signal) => self.stopsignal(signal),
            Instruction::User(user) => {
                let user = self.expand(user)?;
                self.history(format!("USER {user}"), false);
                self.out.config.config.user.clone_from(&user);
                self.out.user = user;
                Ok(())
            }
            Instruction::Volume(volumes) => self.volume(volumes),
            Instruction::Workdir(path) => self.workdir(path, step),
        }
    }

    /// Expands text to one word with what instructions see now.
    fn expand(&self, text: &str) -> Result<String> {
        self.expand_with(Lexer::new(self.plan.escape), text)
    }

    fn expand_with(&self, lexer: Lexer, text: &str) -> Result<String> {
        let (expansion, outcome) = lexer.look_up(text, &self.out.env);
        let declared = self.out.args.iter().map(|(key, _)| key.as_str());
        self.lint.undefined(&expansion.unmatched, &self.out.env, declared, self.lines);
        outcome.map(|()| expansion.text).map_err(Problem::new)
    }

    fn lint_shell(&self, shell_form: bool, command: &Command) {
        if shell_form && self.out.config.config.shell.is_empty() {
            self.lint.shell_form(command);
        }
    }

    fn expand_all(&self, texts: &[String]) -> Result<Vec<String>> {
        texts.iter().map(|text| self.expand(text)).collect()
    }

    fn history(&mut self, created_by: String, layer: bool) {
        self.out.history.push(Arc::new(History {
            created: self.plan.created(),
            created_by: Some(created_by),
            comment: Some(COMMENT.into()),
            empty_layer: !layer,
            ..History::default()
        }));
    }

    /// Names the next step that progress counts.
    ///
    /// `platform` is what it is for, as shown.
    fn vertex(
        &mut self,
        text: &str,
        lines: Lines,
        ignore_cache: bool,
        platform: &Platform,
    ) -> VertexOptions {
        self.counter += 1;
        let prefix = name::prefix(
            self.plan,
            self.stage,
            self.counter,
            platform,
            Some(&self.out.env),
            self.in_trigger,
        );
        VertexOptions {
            name: prefix + text,
            ignore_cache: ignore_cache && self.stage.ignore_cache,
            lines: vec![lines],
            platform: Some(platform.normalized()),
            ..VertexOptions::default()
        }
    }
}

/// Joins a path to a folder and cleans it; an absolute path stays where it is.
fn join(dir: &str, path: &str) -> String {
    if path.starts_with('/') { clean_path(path) } else { clean_path(&format!("/{dir}/{path}")) }
}

/// Returns the folder that `WORKDIR path` leads to. Upstream cleans only relative paths, and what it leaves is seen in
/// image configs and by processes.
fn change_dir(current: &str, path: &str) -> String {
    match path {
        "" => current.into(),
        path if path.starts_with('/') => path.into(),
        path => join(current, path),
    }
}

/// Reads `user[:group]`.
fn owner(text: &str) -> Option<Owner> {
    // Upstream reads a signed number and keeps its bits.
    let who = |text: &str| match (text, text.parse::<i32>()) {
        ("root" | "", _) => WhoIs::Id(0),
        (_, Ok(id)) => WhoIs::Id(id.cast_unsigned()),
        _ => WhoIs::Name(text.into()),
    };
    if text.is_empty() {
        return None;
    }
    let (user, group) =
        text.split_once(':').map_or((text, None), |(user, group)| (user, Some(group)));
    Some(Owner { user: Some(who(user)), group: group.map(who) })
}
