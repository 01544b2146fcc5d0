//! The `git` program in an environment of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::{Pid, Signal};
use slipway_store::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;

use super::{GitOptions, protocol, redact};
use crate::client::ssh::AgentSocket;
use crate::error::{Cause, Result};

/// What a command may print: names of refs and commits.
const MAX_OUTPUT: u64 = 64 << 20;
/// What of its complaints is kept.
const MAX_COMPLAINT: u64 = 64 << 10;
/// What git takes from the environment of this process.
const INHERITED: &[&str] = &[
    "PATH",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];
/// Whatever a repository or this machine says, these hold.
const SETTINGS: &[(&str, &str)] = &[
    ("core.hooksPath", "/dev/null"),
    ("core.fsmonitor", "false"),
    ("core.protectNTFS", "false"),
    ("core.autocrlf", "false"),
    ("gc.auto", "0"),
    ("maintenance.auto", "false"),
    ("init.defaultBranch", "master"),
    ("advice.detachedHead", "false"),
    // Clones belong to whoever ran slipway first.
    ("safe.directory", "*"),
    ("submodule.recurse", "false"),
    ("fetch.recurseSubmodules", "false"),
    // Slower is as good as dead.
    ("http.lowSpeedLimit", "100"),
    ("http.lowSpeedTime", "60"),
];

/// The program, ready to reach one remote.
#[derive(Debug)]
pub(super) struct Git {
    program: PathBuf,
    protocols: String,
    remote: String,
    settings: Vec<(String, Hidden)>,
    agent: Option<AgentSocket>,
    ssh: String,
    home: PathBuf,
}

/// A setting that may be a credential.
#[derive(Clone)]
struct Hidden(String);

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hidden")
    }
}

/// Which protocols one command may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// Those that the options allow.
    Remote,
    /// Files of this machine: the clone that was fetched.
    Clone,
}

/// Kills a command with everything that it started.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // It may have ended by itself.
            let _gone = rustix::process::kill_process_group(pid, Signal::KILL);
        }
    }
}

impl Git {
    /// Checks that the remote may be reached; `home` is a place for files that the program needs.
    pub(super) fn new(options: &GitOptions, remote: &str, home: PathBuf) -> Result<Self> {
        let wanted = protocol(remote).unwrap_or_default();
        if !options.protocols.iter().any(|allowed| allowed == wanted) {
            return Err(Cause::Invalid(format!(
                "{}: git may not be used over {wanted:?}; allowed are {}",
                redact(remote),
                options.protocols.join(", ")
            ))
            .into());
        }
        fs::create_dir(&home)
            .map_err(|error| Error::io(format!("cannot create {}", home.display()), error))?;
        Ok(Self {
            program: options.program.clone(),
            protocols: options.protocols.join(":"),
            remote: remote.into(),
            settings: vec![],
            agent: None,
            ssh: String::new(),
            home,
        })
    }

    pub(super) fn set_header(&mut self, scope: &str, value: &str) {
        let value = Hidden(format!("Authorization: {value}"));
        self.settings.push((format!("http.{scope}.extraheader"), value));
    }

    pub(super) fn set_agent(&mut self, agent: AgentSocket) {
        self.agent = Some(agent);
    }

    /// Decides which hosts SSH trusts: those that are listed, or without a list all, as there is nobody to ask.
    pub(super) fn set_known_hosts(&mut self, known: Option<&str>) -> Result<()> {
        let trust = match known {
            None => "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null".to_owned(),
            Some(known) => {
                let path = self.home.join("known_hosts");
                fs::write(&path, known).map_err(|error| {
                    Error::io(format!("cannot write {}", path.display()), error)
                })?;
                let path = path.to_string_lossy().replace('\'', "'\\''");
                format!("-o StrictHostKeyChecking=yes -o 'UserKnownHostsFile=\"{path}\"'")
            }
        };
        self.ssh = format!("ssh -F /dev/null -o BatchMode=yes {trust}");
        Ok(())
    }

    /// Runs a command in a repository, or in none.
    pub(super) async fn run(&self, folder: Option<&Repository>, args: &[&str]) -> Result<Vec<u8>> {
        self.run_reaching(Reach::Remote, folder, args).await
    }

    pub(super) async fn run_reaching(
        &self,
        reach: Reach,
        folder: Option<&Repository>,
        args: &[&str],
    ) -> Result<Vec<u8>> {
        let failed = |error: std::io::Error| {
            let program = self.program.display();
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            let hint = if missing { "; install git" } else { "" };
            Cause::Invalid(format!("cannot run {program}: {error}{hint}"))
        };
        let mut command = self.command(reach, folder);
        command.args(args);
        let mut child = command.spawn().map_err(failed)?;
        let group = Group(child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)));
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (stdout, stderr, status) =
            tokio::join!(read(stdout, MAX_OUTPUT), read(stderr, MAX_COMPLAINT), child.wait());
        let status = status.map_err(failed)?;
        drop(group);
        if status.success() {
            return Ok(stdout);
        }
        let said = String::from_utf8_lossy(&stderr).replace(&self.remote, &redact(&self.remote));
        let verb = args.iter().find(|arg| !arg.starts_with('-')).copied().unwrap_or_default();
        Err(Cause::Invalid(format!(
            "{}: git {verb} failed: {}{}",
            redact(&self.remote),
            said.trim()
                .lines()
                .rev()
                .take(20)
                .collect::<Vec<_>>()
                .into_iter()
                .rev()
                .collect::<Vec<_>>()
                .join("\n"),
            advice(&said)
        ))
        .into())
    }

    fn command(&self, reach: Reach, folder: Option<&Repository>) -> Command {
        let mut command = Command::new(&self.program);
        command
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .current_dir(&self.home);
        for name in INHERITED {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        for (name, value) in [
            ("HOME", "/dev/null"),
            ("LC_ALL", "C"),
            ("GIT_CONFIG_NOSYSTEM", "1"),
            ("GIT_CONFIG_GLOBAL", "/dev/null"),
            ("GIT_CONFIG_SYSTEM", "/dev/null"),
            ("GIT_ATTR_NOSYSTEM", "1"),
            ("GIT_TERMINAL_PROMPT", "0"),
            ("GIT_PROTOCOL_FROM_USER", "0"),
            ("GIT_SSH_COMMAND", &self.ssh),
        ] {
            command.env(name, value);
        }
        command.env(
            "GIT_ALLOW_PROTOCOL",
            match reach {
                Reach::Remote => self.protocols.as_str(),
                Reach::Clone => "file",
            },
        );
        if let Some(agent) = &self.agent {
            command.env("SSH_AUTH_SOCK", agent.short_path());
        }
        // By the environment rather than by arguments, which everybody on this machine can read.
        let fixed = SETTINGS.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let own = self.settings.iter().map(|(name, value)| (name.clone(), value.0.clone()));
        let all: Vec<_> = fixed.chain(own.filter(|_| reach == Reach::Remote)).collect();
        command.env("GIT_CONFIG_COUNT", all.len().to_string());
        for (at, (name, value)) in all.into_iter().enumerate() {
            command.env(format!("GIT_CONFIG_KEY_{at}"), name);
            command.env(format!("GIT_CONFIG_VALUE_{at}"), value);
        }
        if let Some(repository) = folder {
            command.env("GIT_DIR", &repository.git);
            if let Some(files) = &repository.files {
                command.env("GIT_WORK_TREE", files).current_dir(files);
            }
        }
        command
    }
}

impl Drop for Git {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.home) {
            tracing::debug!(%error, "a temporary folder stays behind until this process ends");
        }
    }
}

/// Returns what to do about a complaint, as far as that is known.
fn advice(said: &str) -> &'static str {
    let says = |texts: &[&str]| texts.iter().any(|text| said.contains(text));
    if says(&["Permission denied (publickey", "Host key verification failed"]) {
        "; forward an agent that has a key for it with --ssh default"
    } else if says(&[
        "could not read Username",
        "Authentication failed",
        "terminal prompts disabled",
    ]) {
        "; if it is private, give a token as the secret GIT_AUTH_TOKEN"
    } else {
        ""
    }
}

/// Where a command works.
#[derive(Clone, Debug)]
pub(super) struct Repository {
    pub(super) git: PathBuf,
    pub(super) files: Option<PathBuf>,
}

impl Repository {
    pub(super) fn bare(git: &Path) -> Self {
        Self { git: git.into(), files: None }
    }
}

/// Reads to the end and keeps the first bytes.
async fn read(from: Option<impl AsyncRead + Unpin>, limit: u64) -> Vec<u8> {
    let mut kept = vec![];
    let Some(mut from) = from else { return kept };
    // What cannot be read is not there; the exit code tells the rest.
    let _read = (&mut from).take(limit).read_to_end(&mut kept).await;
    let _rest = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
    kept
}
