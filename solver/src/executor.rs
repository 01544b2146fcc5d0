//! Runs one step of a build: a command in a root file system, cut off from the host.
//!
//! An [`ExecSpec`] says what to run and what it may see, [`Stdio`] where its output goes, and an [`Executor`] runs it.
//! The real one is [`SandboxExecutor`]: this process never enters a namespace itself. It starts its own program once
//! more as a single-threaded helper ([`is_helper`], [`helper_main`]), and each step is a child of that helper with its
//! own mount, process, IPC and host-name namespaces. Every mount lives in the step's own mount namespace, so
//! whatever is killed, the kernel takes the mounts with it and nothing is left to clean up.

mod capability;
pub mod cgroup;
mod confidential;
mod helper;
mod hook;
pub mod limits;
mod mount;
mod mountpoint;
mod protocol;
mod root;
mod sandbox;
mod seccomp;
mod stdio;
mod step;
mod sys;
mod user;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use slipway_spec::platform::Platform;
use tokio::sync::mpsc;

pub use self::confidential::Confidential;
pub use self::helper::{helper_main, is_helper};
use self::limits::Limits;
pub use self::mountpoint::{MountStub, prepare_stub, remove_stubs};
pub use self::sandbox::{HelperCommand, Process, ProcessHandle, SandboxExecutor, SandboxOptions};
pub use self::stdio::{Opened, StreamReader, StreamWriter, Terminal, pipes, terminal};

/// The host name that a step sees when its definition names none.
pub const DEFAULT_HOSTNAME: &str = "buildkitsandbox";

/// What to run, in which root file system, and with what rights.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExecSpec {
    /// The folders below the writable one, the base of the image first. Repeated folders are fine.
    pub lower: Vec<PathBuf>,
    /// A folder made by [`prepare_stub`], on the file system of `upper`; any number of steps may share it.
    pub stub: PathBuf,
    /// Takes what the step writes. Its owner, mode and times become those of `/`.
    pub upper: PathBuf,
    /// An empty folder beside `upper` for the kernel's own use.
    pub work: PathBuf,
    /// Makes `/` read-only once the mounts are in place.
    pub readonly_root: bool,
    /// What else is mounted; applied in the order of their destinations.
    pub mounts: Vec<ExecMount>,
    /// The command and its arguments. A name without a slash is looked up in the `PATH` of `env`.
    pub args: Vec<String>,
    /// The environment, as `NAME=value`. Nothing is inherited.
    pub env: Vec<String>,
    /// The working directory; it must exist. Empty means `/`.
    pub cwd: String,
    /// `name|uid[:group|gid]`, looked up in the root's own files. Empty means root.
    pub user: String,
    /// The host name; empty means [`DEFAULT_HOSTNAME`].
    pub hostname: String,
    /// What the step can reach.
    pub network: Network,
    /// Gives all capabilities, no system call filter and no masked paths.
    pub insecure: bool,
    /// Additional lines for `/etc/hosts`: name, address.
    pub extra_hosts: Vec<(String, String)>,
    /// The contents of `/etc/resolv.conf`; the host's when absent, empty without a network.
    pub resolv_conf: Option<String>,
    /// What the command was built for.
    pub platform: Platform,
    /// Standard input is a terminal that becomes the step's own.
    pub tty: bool,
    /// Variables whose values are nobody's business.
    pub secret_env: Vec<(String, Confidential)>,
    /// What it may use of the machine.
    pub limits: Limits,
    /// Device files beside those that every step has.
    pub devices: Vec<DeviceNode>,
    /// Groups that it is in beside those of its user.
    pub groups: Vec<u32>,
    /// Programs of the host that prepare its root, with all rights.
    pub hooks: Vec<Hook>,
}

impl Default for ExecSpec {
    /// Nothing at all, for the host's platform.
    fn default() -> Self {
        Self {
            lower: vec![],
            stub: PathBuf::new(),
            upper: PathBuf::new(),
            work: PathBuf::new(),
            readonly_root: false,
            mounts: vec![],
            args: vec![],
            env: vec![],
            cwd: String::new(),
            user: String::new(),
            hostname: String::new(),
            network: Network::None,
            insecure: false,
            extra_hosts: vec![],
            resolv_conf: None,
            platform: Platform::host(),
            tty: false,
            secret_env: vec![],
            limits: Limits::default(),
            devices: vec![],
            groups: vec![],
            hooks: vec![],
        }
    }
}

/// A program of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// Where the host has it.
    pub path: PathBuf,
    /// Its arguments, its own name first.
    pub args: Vec<String>,
    /// Its variables, as `NAME=value`.
    pub env: Vec<String>,
    /// How many seconds it may take; `None` is as many as it likes.
    pub timeout: Option<u32>,
}

/// A device file in the root of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// Where it goes, relative to the root. Links on the way stay inside the root.
    pub dest: String,
    /// The host's own, which is lent where none can be made.
    pub source: PathBuf,
    /// What it is.
    pub kind: DeviceKind,
    /// The device's major number.
    pub major: u32,
    /// The device's minor number.
    pub minor: u32,
    /// Its mode.
    pub mode: u32,
    /// Its owner; that of the process when absent.
    pub uid: Option<u32>,
    /// Its group; that of the process when absent.
    pub gid: Option<u32>,
}

/// What a device file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// A device that is read in blocks.
    Block,
    /// A device that is read byte by byte.
    Char,
    /// A named pipe.
    Fifo,
}

/// What a step can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// The host's network.
    Host,
    /// Nothing but a loopback device of its own.
    None,
}

/// One mount besides the root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecMount {
    /// Where it goes, relative to the root. Links on the way stay inside the root.
    pub dest: String,
    /// What it is.
    pub kind: ExecMountKind,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecMountKind {
    /// A file or folder of the host.
    Bind {
        /// The host's path.
        source: PathBuf,
        /// A path below `source`, resolved without leaving it.
        subpath: Option<String>,
        /// Whether writing is refused.
        readonly: bool,
    },
    /// A file or folder of the host that whoever runs the host gives to steps.
    Host {
        /// The host's path.
        source: PathBuf,
        /// Whether writing is refused.
        readonly: bool,
        /// Whether programs there start with the rights of whoever starts them only.
        nosuid: bool,
        /// Whether no programs can be started from there.
        noexec: bool,
        /// Whether what is mounted below the folder is there as well.
        recursive: bool,
    },
    /// Layers of another snapshot.
    Overlay {
        /// The folders below, base first.
        lower: Vec<PathBuf>,
        /// Takes what is written; without it the mount is read-only.
        writable: Option<Writable>,
        /// A path below the mount's root, resolved without leaving it.
        subpath: Option<String>,
        /// Whether writing is refused.
        readonly: bool,
    },
    /// An empty folder in memory.
    Tmpfs {
        /// Its limit in bytes.
        size: Option<u64>,
    },
    /// A file in memory, such as a secret: it touches no disk.
    File {
        /// What it holds.
        content: Confidential,
        /// Its mode.
        mode: u32,
        /// Its owner.
        uid: u32,
        /// Its group.
        gid: u32,
    },
}

/// Where an overlay keeps what is written to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Writable {
    /// Takes what is written.
    pub upper: PathBuf,
    /// An empty folder beside `upper` for the kernel's own use.
    pub work: PathBuf,
}

/// Which of a step's outputs a chunk came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Where a step reads from and writes to.
#[derive(Debug)]
pub enum Stdio {
    /// Chunks as they come; a full channel holds the step back, a closed one discards. Standard input is empty.
    Piped(mpsc::Sender<(Stream, Bytes)>),
    /// This process's own standard streams.
    Inherit,
    /// The given files.
    Files {
        /// Standard input.
        stdin: OwnedFd,
        /// Standard output.
        stdout: OwnedFd,
        /// Standard error.
        stderr: OwnedFd,
    },
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The exit code; 128 + the signal's number when a signal ended it.
    pub code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Mount points that had to be made in `upper`; hand them to [`remove_stubs`] before `upper` is read.
    pub created_stubs: Vec<MountStub>,
}

/// Why a command could not be run at all.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The command is not in the root.
    #[error("exec: {command:?}: executable file not found in {searched}")]
    CommandNotFound {
        /// The command as given.
        command: String,
        /// Where it was searched: a path, or `$PATH`.
        searched: String,
    },
    /// The command is there but what it names to run it is not: a script's `#!` line or a dynamic linker.
    #[error(
        "exec: {command:?}: found, but the interpreter it names is not in this root file system (check its `#!` line or C library)"
    )]
    InterpreterMissing {
        /// The command's path.
        command: String,
    },
    /// The command may not be executed.
    #[error("exec: {command:?}: {source}")]
    NotExecutable {
        /// The command's path.
        command: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kernel does not know the command's format.
    #[error("exec: {command:?}: exec format error: {hint}")]
    ExecFormat {
        /// The command's path.
        command: String,
        /// What may be wrong.
        hint: String,
    },
    /// `USER` names nobody.
    #[error("user {user:?}: {reason}")]
    User {
        /// The user as given.
        user: String,
        /// What is wrong.
        reason: String,
    },
    /// The working directory can't be entered.
    #[error("working directory {path:?}: {source}")]
    WorkingDirectory {
        /// The directory as given.
        path: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// No way was found to run this platform's programs here.
    #[error("cannot run {platform} programs here: {reason}")]
    Emulation {
        /// The platform.
        platform: String,
        /// What was searched, and what to install.
        reason: String,
    },
    /// The sandbox could not be set up.
    #[error("sandbox: {stage}{}: {source}", .path.as_ref().map(|p| format!(" {p:?}")).unwrap_or_default())]
    Setup {
        /// What was being done.
        stage: String,
        /// To what.
        path: Option<String>,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A program that prepares the root for a device failed.
    #[error("sandbox: the hook {path} of a device failed: {reason}")]
    Hook {
        /// The program.
        path: String,
        /// How it ended, and what it said.
        reason: String,
    },
    /// The specification makes no sense.
    #[error("sandbox: {reason}")]
    Invalid {
        /// What is wrong with it.
        reason: String,
    },
    /// The helper process could not be started, or died.
    #[error("sandbox helper: {action}: {source}")]
    Helper {
        /// What was being done.
        action: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

impl ExecError {
    /// Returns the exit code that a shell would report for this error, if it is the command's own fault.
    pub fn exit_code(&self) -> Option<i32> {
        match self {
            Self::CommandNotFound { .. } | Self::InterpreterMissing { .. } => Some(127),
            Self::NotExecutable { .. } | Self::ExecFormat { .. } => Some(126),
            _ => None,
        }
    }
}

/// Runs steps.
///
/// `run` returns when the command and everything it started are gone. Dropping its future kills them all: when the
/// drop returns, no process of the step writes to its folders any more.
#[async_trait]
pub trait Executor: Send + Sync {
    /// Runs one command to its end. An exit code other than 0 is not an error here.
    ///
    /// # Errors
    /// When the command could not be started.
    async fn run(&self, spec: ExecSpec, stdio: Stdio) -> Result<Exit, ExecError>;
}
