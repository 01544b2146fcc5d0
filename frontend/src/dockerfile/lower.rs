//! From stages to the build graph and the image config. Pure: everything unknown was asked for before.

mod config;
mod copy;
mod expose;
mod name;
mod run;
mod signal;

use std::collections::BTreeSet;

use slipway_spec::llb::{Lines, Owner, State, VertexOptions, WhoIs};
use slipway_spec::pattern::clean_path;
use slipway_spec::{History, ImageConfig, Platform};

use super::expand::{Env, Lexer};
use super::instruction::Instruction;
use super::problem::{Problem, Result};
use super::stage::{Base, Plan, Stage, Step};

/// What history entries are marked with.
const COMMENT: &str = "buildkit.dockerfile.v0";

/// The `PATH` of images that set none.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The target's outcome.
#[derive(Debug)]
pub(crate) struct Lowered {
    pub(crate) state: State,
    pub(crate) config: ImageConfig,
    pub(crate) base_history_len: usize,
    /// Paths of the context that some stage copies, `/` for all of it; empty when none does.
    pub(crate) context_paths: BTreeSet<String>,
}

/// What a stage leaves to those that build on it.
#[derive(Clone, Debug)]
struct Outcome {
    state: State,
    config: ImageConfig,
    platform: Platform,
    /// What instructions and processes see: the image's environment and build arguments.
    env: Env,
    cwd: String,
    user: String,
    /// Arguments declared so far, with what they were declared as.
    args: Vec<(String, Option<String>)>,
    base_history_len: usize,
}

/// Lowers every stage the target needs. `context` stands for the files to build from.
pub(crate) fn lower(plan: &Plan<'_>, context: &State) -> Result<Lowered> {
    let reachable = plan.reachable();
    let mut outcomes: Vec<Option<Outcome>> = vec![None; plan.stages.len()];
    // Images that are copied from need nothing of other stages, and others may need them.
    let images = plan.stages.iter().enumerate().filter(|(_, stage)| stage.copied_image);
    for (index, stage) in images {
        if reachable[index] {
            outcomes[index] = Some(start(plan, stage, &outcomes)?);
        }
    }
    let mut context_paths = BTreeSet::new();
    for (index, stage) in plan.stages.iter().enumerate() {
        if !reachable[index] || stage.copied_image {
            continue;
        }
        let begun = start(plan, stage, &outcomes)?;
        // An image without layers has no step, though progress counts one.
        let counter = usize::from(stage.image.as_ref().is_some_and(|image| !image.empty));
        let mut builder = Builder {
            plan,
            stage,
            outcomes: &outcomes,
            context,
            context_paths: &mut context_paths,
            out: begun,
            counter,
            in_trigger: false,
            cmd_set: false,
        };
        builder.prepare();
        for step in &stage.steps {
            builder.step(step).map_err(|problem| problem.at(step.command.lines))?;
        }
        outcomes[index] = Some(builder.out);
    }
    let Some(out) = outcomes.swap_remove(plan.target) else {
        return Err(Problem::new("the target stage was not built"));
    };
    Ok(Lowered {
        state: out.state,
        config: finish(plan, out.config),
        base_history_len: out.base_history_len,
        context_paths,
    })
}

/// Gives a stage its base.
fn start(plan: &Plan<'_>, stage: &Stage, outcomes: &[Option<Outcome>]) -> Result<Outcome> {
    let out = |state: State, config: ImageConfig, platform: Platform| Outcome {
        state,
        base_history_len: config.history.len(),
        config,
        platform,
        env: Env::default(),
        cwd: "/".into(),
        user: String::new(),
        args: vec![],
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
    if begun.platform.os == "windows" {
        return Err(Problem::unsupported("building for Windows").at(stage.lines));
    }
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
    config.config.env = vec![format!("PATH={DEFAULT_PATH}")];
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
    config.os = platform.os;
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
    context_paths: &'a mut BTreeSet<String>,
    out: Outcome,
    /// Steps named so far.
    counter: usize,
    in_trigger: bool,
    /// Whether this stage has its own `CMD`.
    cmd_set: bool,
}

impl Builder<'_> {
    /// Applies the base's config to what instructions see.
    fn prepare(&mut self) {
        let config = &mut self.out.config.config;
        if !config.env.iter().any(|entry| entry.split('=').next() == Some("PATH")) {
            config.env.push(format!("PATH={DEFAULT_PATH}"));
        }
        for entry in &config.env {
            let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
            self.out.env.set(key, value);
        }
        if !config.working_dir.is_empty() {
            config.working_dir = change_dir("/", &config.working_dir);
            self.out.cwd.clone_from(&config.working_dir);
        }
        if !config.user.is_empty() {
            self.out.user.clone_from(&config.user);
        }
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        self.in_trigger = step.trigger;
        let command = &step.command;
        match &command.instruction {
            Instruction::Arg(declarations) => self.arg(declarations),
            Instruction::Cmd(line) => {
                self.cmd(line);
                Ok(())
            }
            Instruction::Copy(copy) => self.copy(copy, step),
            Instruction::Entrypoint(line) => {
                self.entrypoint(line);
                Ok(())
            }
            Instruction::Env(pairs) => self.env(pairs),
            Instruction::Expose(ports) => self.expose(ports),
            Instruction::From(_) => Err(Problem::new("FROM cannot stand inside a stage")),
            Instruction::Healthcheck(check) => {
                self.healthcheck(check);
                Ok(())
            }
            Instruction::Label(pairs) => self.label(pairs),
            Instruction::Maintainer(name) => {
                self.out.config.author = Some(name.clone());
                self.history(format!("MAINTAINER {name}"), false);
                Ok(())
            }
            Instruction::Onbuild(trigger) => {
                self.out.config.config.on_build.push(trigger.clone());
                Ok(())
            }
            Instruction::Run(run) => self.run(run, command),
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
        let expansion = Lexer::new(self.plan.escape).word(text, &self.out.env);
        expansion.map(|expansion| expansion.text).map_err(Problem::new)
    }

    fn expand_all(&self, texts: &[String]) -> Result<Vec<String>> {
        texts.iter().map(|text| self.expand(text)).collect()
    }

    fn history(&mut self, created_by: String, layer: bool) {
        self.out.config.history.push(History {
            created: self.plan.created(),
            created_by: Some(created_by),
            comment: Some(COMMENT.into()),
            empty_layer: !layer,
            ..History::default()
        });
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
