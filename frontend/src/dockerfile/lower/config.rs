//! Instructions that change the image config and what later instructions see.

use slipway_spec::Healthcheck;
use slipway_spec::image_config::Empty;
use slipway_spec::llb::FileActions;

use super::super::ast::Pair;
use super::super::expand::Lexer;
use super::super::go_format::{duration, plain_list, quoted_list};
use super::super::instruction::{ArgDeclaration, Command, CommandLine};
use super::super::outline::{ArgInfo, doc_comment};
use super::super::problem::{Problem, Result};
use super::super::stage::Step;
use super::{Builder, WINDOWS, join, name, owner, signal, windows};

/// Arguments that steer the build and never reach a process.
const NOT_IN_ENV: [&str; 2] = ["BUILDKIT_SBOM_SCAN_CONTEXT", "BUILDKIT_SBOM_SCAN_STAGE"];

/// The shell of images that name none.
const DEFAULT_SHELL: [&str; 2] = ["/bin/sh", "-c"];

impl Builder<'_> {
    pub(super) fn arg(&mut self, declarations: &[ArgDeclaration], command: &Command) -> Result<()> {
        let mut shown = vec![];
        for declaration in declarations {
            let key = &declaration.key;
            self.lint.secret("ARG", key, command.lines);
            // What the caller says is taken as it is; a default here wins over the global value.
            let value = match (self.plan.build_args.get(key), &declaration.default) {
                (Some(value), _) => Some(value.clone()),
                (None, Some(default)) => Some(self.expand(default)?),
                (None, None) => self.plan.globals.get(key).map(Into::into),
            };
            if let Some(value) = &value
                && !NOT_IN_ENV.contains(&key.as_str())
            {
                self.out.env.set(key, value);
            }
            let given = self.plan.build_args.contains_key(key) || declaration.default.is_some();
            // One that takes its value from before the first stage is described there.
            if given || value.is_none() {
                let info = ArgInfo {
                    value: value.clone().unwrap_or_default(),
                    description: doc_comment(&command.comments, key),
                    ..ArgInfo::at(command.lines)
                };
                self.uses.declare(key, info);
            }
            self.uses.used.insert(key.clone());
            shown.push(match &value {
                Some(value) => format!("{key}={value}"),
                None => key.clone(),
            });
            self.out.args.push((key.clone(), value));
        }
        self.history(format!("ARG {}", shown.join(" ")), false);
        Ok(())
    }

    fn expand_pairs(&self, pairs: &[Pair]) -> Result<Vec<Pair>> {
        let expand = |pair: &Pair| {
            Ok(Pair {
                key: self.expand(&pair.key)?,
                value: self.expand(&pair.value)?,
                legacy: pair.legacy,
            })
        };
        pairs.iter().map(expand).collect()
    }

    pub(super) fn env(&mut self, pairs: &[Pair], command: &Command) -> Result<()> {
        // All pairs see the environment before the instruction.
        let pairs = self.expand_pairs(pairs)?;
        for pair in &pairs {
            self.lint.pair(command, pair);
            let Pair { key, value, .. } = pair;
            self.lint.secret("ENV", key, command.lines);
            self.out.env.set(key, value);
            let entry = format!("{key}={value}");
            let list = &mut self.out.config.config.env;
            match list.iter_mut().find(|known| known.split('=').next() == Some(key)) {
                Some(known) => *known = entry,
                None => list.push(entry),
            }
        }
        self.history(format!("ENV {}", shown(&pairs)), false);
        Ok(())
    }

    pub(super) fn label(&mut self, pairs: &[Pair], command: &Command) -> Result<()> {
        let pairs = self.expand_pairs(pairs)?;
        pairs.iter().for_each(|pair| self.lint.pair(command, pair));
        self.history(format!("LABEL {}", shown(&pairs)), false);
        self.out.config.config.labels.extend(pairs.into_iter().map(|pair| (pair.key, pair.value)));
        Ok(())
    }

    pub(super) fn with_shell(&self, line: &CommandLine) -> Vec<String> {
        if !line.shell {
            return line.words.clone();
        }
        let shell = &self.out.config.config.shell;
        let mut words = match (shell.is_empty(), self.out.config.os.as_str()) {
            (false, _) => shell.clone(),
            (true, WINDOWS) => windows::DEFAULT_SHELL.map(Into::into).to_vec(),
            (true, _) => DEFAULT_SHELL.map(Into::into).to_vec(),
        };
        words.push(line.words.join(" "));
        words
    }

    pub(super) fn cmd(&mut self, line: &CommandLine) {
        let words = self.with_shell(line);
        self.history(format!("CMD {}", quoted_list(&words)), false);
        // Written by Go, an empty list would not appear in the config.
        self.out.config.config.cmd = Some(words).filter(|words| !words.is_empty());
        self.out.config.config.args_escaped = true;
        self.cmd_set = true;
    }

    pub(super) fn entrypoint(&mut self, line: &CommandLine) {
        let words = self.with_shell(line);
        self.history(format!("ENTRYPOINT {}", quoted_list(&words)), false);
        self.out.config.config.entrypoint = Some(words).filter(|words| !words.is_empty());
        // A base's arguments make no sense for another program.
        if !self.cmd_set {
            self.out.config.config.cmd = None;
        }
    }

    pub(super) fn healthcheck(&mut self, check: &Healthcheck) {
        self.history(
            format!(
                "HEALTHCHECK {{Test:{} Interval:{} Timeout:{} StartPeriod:{} StartInterval:{} Retries:{}}}",
                plain_list(&check.test),
                duration(check.interval),
                duration(check.timeout),
                duration(check.start_period),
                duration(check.start_interval),
                check.retries
            ),
            false,
        );
        self.out.config.config.healthcheck = Some(check.clone());
    }

    pub(super) fn volume(&mut self, volumes: &[String]) -> Result<()> {
        let volumes = self.expand_all(volumes)?;
        if volumes.iter().any(String::is_empty) {
            return Err(Problem::new("VOLUME specified can not be an empty string"));
        }
        self.history(format!("VOLUME {}", plain_list(&volumes)), false);
        self.out.config.config.volumes.extend(volumes.into_iter().map(|volume| (volume, Empty {})));
        Ok(())
    }

    pub(super) fn stopsignal(&mut self, text: &str) -> Result<()> {
        let text = self.expand(text)?;
        if !signal::is_known(&text) {
            return Err(Problem::new(format!("invalid signal: {text}")));
        }
        self.history(format!("STOPSIGNAL {text}"), false);
        self.out.config.config.stop_signal = text;
        Ok(())
    }

    pub(super) fn workdir(&mut self, path: &str, step: &Step) -> Result<()> {
        let path = self.expand(path)?;
        if !std::mem::replace(&mut self.out.workdir_set, true) {
            self.lint.first_workdir(&self.local_path(&path)?, step.command.lines);
        }
        let current = if self.out.config.config.working_dir.is_empty() {
            "/".to_owned()
        } else {
            self.out.config.config.working_dir.clone()
        };
        self.enter(&current, &path)?;
        let path = self.out.cwd.clone();
        let layer = path != "/";
        if layer {
            let owner = owner(&self.out.config.config.user);
            let lexer = Lexer::new(self.plan.escape);
            let text = name::instruction(&step.command.code, lexer, &self.out.env);
            let options = self.vertex(&text, step.command.lines, false, &self.out.platform.clone());
            let actions =
                FileActions::new().mkdir(&join("/", &path), 0o755, owner, self.plan.epoch);
            self.out.state = self.out.state.file(actions, options);
        }
        self.history(format!("WORKDIR {path}"), layer);
        Ok(())
    }
}

fn shown(pairs: &[Pair]) -> String {
    pairs.iter().map(|pair| format!("{}={}", pair.key, pair.value)).collect::<Vec<_>>().join(" ")
}
