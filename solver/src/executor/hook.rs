//! Programs of the host that prepare a step's root for its devices, before the step sees it.
//!
//! They are called as a container runtime calls its `createContainer` hooks: in the namespaces of the step, with the
//! host's root still in place, and told where the step's own root is by a bundle, as `config.json` in it has it.

use std::io::{Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::Mode;
use rustix::mount::{MountAttrFlags, UnmountFlags};
use serde_json::json;

use super::mount::{attach, new_mount};
use super::protocol::{During, Failure, Stage};
use super::{ExecSpec, Hook};

/// The version of the runtime specification whose words are used.
const VERSION: &str = "1.2.0";
/// Where hooks find programs unless their description says.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How much is kept of what a hook says.
const MAX_OUTPUT: usize = 4096;
/// How often it is looked whether a hook has ended that has passed its output on to somebody.
const TICK: Duration = Duration::from_millis(50);

/// Calls all hooks of a step, whose root is mounted at `root`, one after the other.
pub(super) fn call_all(spec: &ExecSpec, root: &Path) -> Result<(), Failure> {
    if spec.hooks.is_empty() {
        return Ok(());
    }
    // What a hook makes has the usual modes; our own files are made with those that we say.
    let before = rustix::process::umask(Mode::from_raw_mode(0o022));
    // Only this mount namespace sees it.
    let bundle = spec.stub.join("empty");
    let shown = bundle.to_string_lossy();
    let place = std::fs::File::open(&bundle).during_at("open", &shown)?;
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let memory = new_mount("tmpfs", &[("mode", "755")], flags).during_at("mount", &shown)?;
    attach(memory.as_fd(), place.as_fd()).during_at("mount", &shown)?;
    let config = json!({
        "ociVersion": VERSION,
        "root": { "path": root, "readonly": spec.readonly_root },
        "process": { "args": spec.args, "env": spec.env, "cwd": spec.cwd },
        "hostname": spec.hostname,
    });
    std::fs::write(bundle.join("config.json"), config.to_string())
        .during_at("describe the step in", &shown)?;
    let state = json!({
        "ociVersion": VERSION,
        "id": format!("slipway-{}", std::process::id()),
        "status": "creating",
        "pid": std::process::id(),
        "bundle": bundle,
    });
    for hook in &spec.hooks {
        call(hook, root, &state.to_string()).map_err(|reason| Failure {
            stage: Stage::Hook(reason),
            path: Some(hook.path.to_string_lossy().into_owned()),
            errno: libc::ECANCELED,
        })?;
    }
    rustix::process::umask(before);
    rustix::mount::unmount(&bundle, UnmountFlags::DETACH).during_at("unmount", &shown)
}

fn call(hook: &Hook, root: &Path, state: &str) -> Result<(), String> {
    let mut command = Command::new(&hook.path);
    let mut args = hook.args.iter();
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    command.args(args).env_clear().env("PATH", PATH).current_dir(root);
    command.envs(hook.env.iter().filter_map(|variable| variable.split_once('=')));
    let failed = |error: std::io::Error| format!("cannot start it: {error}");
    let (mut output, theirs) = std::io::pipe().map_err(failed)?;
    let errors = theirs.try_clone().map_err(failed)?;
    command.stdin(Stdio::piped()).stdout(theirs).stderr(errors);
    let mut child = command.spawn().map_err(failed)?;
    // It holds the other end of the pipe now; ours would keep the output from ending.
    drop(command);
    if let Some(mut stdin) = child.stdin.take() {
        // Less than a pipe holds; a hook that does not care closes it.
        let _told = stdin.write_all(state.as_bytes());
    }
    let deadline = hook.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds.into()));
    let mut said = vec![];
    let status = wait(&mut child, &mut output, deadline, &mut said);
    let status = match status {
        Ok(Some(status)) => status,
        Ok(None) => {
            let _killed = child.kill();
            let _reaped = child.wait();
            return Err(format!("it took more than {} s", hook.timeout.unwrap_or_default()));
        }
        Err(error) => return Err(format!("cannot wait for it: {error}")),
    };
    if status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said);
    let said = said.trim();
    Err(if said.is_empty() { status.to_string() } else { format!("{status}: {said}") })
}

/// Waits for the end of a hook, and gathers what it says; `None` when it took too long.
fn wait(
    child: &mut Child,
    output: &mut std::io::PipeReader,
    deadline: Option<Instant>,
    said: &mut Vec<u8>,
) -> std::io::Result<Option<ExitStatus>> {
    let mut open = true;
    loop {
        let ended = child.try_wait()?;
        if ended.is_none() && deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(None);
        }
        // Once it has ended only what is there already counts.
        let pause = if ended.is_some() { Duration::ZERO } else { TICK };
        let pause = Timespec { tv_sec: 0, tv_nsec: pause.subsec_nanos().into() };
        let mut ready = false;
        if open {
            let mut fds = [PollFd::new(output, PollFlags::IN)];
            ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&pause)))? > 0;
        } else if ended.is_none() {
            std::thread::sleep(TICK);
        }
        if ready {
            let mut chunk = [0; MAX_OUTPUT];
            let count = output.read(&mut chunk)?;
            open = count > 0;
            let room = MAX_OUTPUT.saturating_sub(said.len()).min(count);
            said.extend_from_slice(&chunk[..room]);
        } else if ended.is_some() {
            return Ok(ended);
        }
        if !open && ended.is_some() {
            return Ok(ended);
        }
    }
}
