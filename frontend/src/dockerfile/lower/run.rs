//! `RUN`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use slipway_spec::llb::{Exec, ExecMount, FileActions, MountOptions, State, pb};

use super::super::expand::Lexer;
use super::super::files::internal;
use super::super::heredoc::parse_mark;
use super::super::instruction::{CommandLine, Run};
use super::super::problem::{Problem, Result};
use super::super::stage::Step;
use super::{Builder, name};

/// Where a here-document with a `#!` is put.
const SCRIPTS: &str = "/dev/pipes/";

/// Tells programs where the SSH agent is.
const SSH_SOCKET: &str = "SSH_AUTH_SOCK";

impl Builder<'_> {
    pub(super) fn run(&mut self, run: &Run, step: &Step) -> Result<()> {
        let command = &step.command;
        // A process may read anything.
        self.used.stages[self.root].insert("/".into());
        let mut scripts = vec![];
        let mut code = command.code.clone();
        let line = self.command_line(run, &mut scripts, &mut code)?;
        let added = self.mounts(run, step)?;
        let mut mounts = scripts;
        mounts.extend(added.list);
        let words = self.with_shell(&line);
        if words.is_empty() {
            return Err(Problem::new("RUN requires at least one argument"));
        }
        let settings = self.plan.settings;
        if settings.shm_size > 0 {
            mounts.push(ExecMount {
                dest: "/dev/shm".into(),
                options: MountOptions::Tmpfs(pb::TmpfsOpt { size: settings.shm_size }),
                ..ExecMount::default()
            });
        }
        let network = match run.network.as_str() {
            "none" => pb::NetMode::None,
            "host" => pb::NetMode::Host,
            _ => settings.network,
        };
        let mut env = self.out.env.clone();
        if let Some(socket) = &added.ssh_socket
            && env.get(SSH_SOCKET).is_none()
        {
            env.set(SSH_SOCKET, socket);
        }
        let meta = pb::Meta {
            args: words.clone(),
            env: env.to_vec(),
            cwd: self.out.cwd.clone(),
            user: self.out.user.clone(),
            proxy_env: settings.proxy.clone(),
            extra_hosts: settings.extra_hosts.clone(),
            hostname: settings.hostname.clone(),
            ulimit: settings.ulimits.clone(),
            cgroup_parent: settings.cgroup_parent.clone(),
            remove_mount_stubs_recursive: true,
            valid_exit_codes: vec![],
        };
        let lexer = Lexer { raw_quotes: true, keep_unset: true, ..Lexer::new(self.plan.escape) };
        let mut shown_env = self.out.env.clone();
        for name in &added.masked {
            shown_env.set(name, "****");
        }
        let text = name::instruction(&code, lexer, &shown_env);
        let mut options = self.vertex(&text, command.lines, true, &self.out.platform.normalized());
        options.description.insert("com.docker.dockerfile.v1.command".into(), command.code.clone());
        options.linux_resources.clone_from(&settings.resources);
        let security =
            if run.insecure { pb::SecurityMode::Insecure } else { pb::SecurityMode::Sandbox };
        let exec = Exec {
            meta,
            network,
            security,
            secret_env: added.secret_env,
            devices: run.devices.clone(),
            mounts,
        };
        self.out.state = self.out.state.exec(exec, options);
        let shown = self.shown_args().into_iter().chain(words).collect::<Vec<_>>().join(" ");
        self.history(format!("RUN {shown} # buildkit"), true);
        Ok(())
    }

    /// Puts here-documents where the process finds them.
    fn command_line(
        &self,
        run: &Run,
        mounts: &mut Vec<ExecMount>,
        code: &mut String,
    ) -> Result<CommandLine> {
        let mut line = run.command.clone();
        let Some(first) = run.heredocs.first() else { return Ok(line) };
        let ([text], true) = (line.words.as_mut_slice(), line.shell) else {
            return Err(Problem::new("parsing produced an invalid run command"));
        };
        if parse_mark(text).is_some() {
            let body = first.body();
            let mut rows = first.content.trim().lines();
            let summary = rows.next().unwrap_or_default();
            let more = if rows.next().is_some() { "..." } else { "" };
            code.push_str(&format!(" ({summary}{more})"));
            if body.starts_with("#!") && self.out.config.os != super::WINDOWS {
                let actions = FileActions::new().mkfile(
                    &super::join("/", &first.name),
                    0o755,
                    body.into_bytes(),
                    None,
                    None,
                );
                mounts.push(ExecMount {
                    dest: SCRIPTS.into(),
                    source: State::scratch().file(actions, internal("preparing inline document")),
                    selector: "/".into(),
                    readonly: true,
                    ..ExecMount::default()
                });
                *text = super::join(SCRIPTS, &first.name);
            } else {
                *text = body;
            }
        } else {
            // The shell reads the bodies itself.
            for doc in &run.heredocs {
                text.push('\n');
                text.push_str(&doc.content);
                text.push_str(&doc.name);
            }
        }
        Ok(line)
    }

    /// The arguments a step was run with, as history shows them: `|2 a=1 b=2`.
    fn shown_args(&self) -> Vec<String> {
        let env: HashMap<&str, &str> = self.out.env.iter().collect();
        let mut list: Vec<(&str, String)> = vec![];
        let mut places: HashMap<&str, usize> = HashMap::new();
        for (key, declared) in &self.out.args {
            let value = env.get(key.as_str()).map(|value| (*value).to_owned());
            let value = value.or_else(|| declared.clone()).unwrap_or_default();
            match places.entry(key) {
                Entry::Occupied(known) => list[*known.get()].1 = value,
                Entry::Vacant(place) => {
                    place.insert(list.len());
                    list.push((key, value));
                }
            }
        }
        if list.is_empty() {
            return vec![];
        }
        let count = format!("|{}", list.len());
        std::iter::once(count)
            .chain(list.into_iter().map(|(key, value)| format!("{key}={value}")))
            .collect()
    }
}
