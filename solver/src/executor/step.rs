//! The life of a step's process from its birth in new namespaces to `execve`.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::fs::{CWD, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Signal};
use rustix::thread::{CapabilitySet, LinkNameSpaceType};

use super::mountpoint::open_in_root;
use super::protocol::{self, During, Failure, Report, Stage};
use super::root::{self, Host};
use super::user::{self, Identity};
use super::{ExecSpec, Network, capability, seccomp, sys};

/// The exit code of a step that never reached its command; the failure says why.
const NOT_STARTED: i32 = 125;
/// Where commands are looked for when the step's environment does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where a process runs.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    /// In a root that it makes itself, in the new namespaces that it was born in.
    New,
    /// Where this process is, among whose processes it was born.
    Of(BorrowedFd<'a>),
}

/// Turns this freshly forked process into the step.
pub(super) fn become_step(
    socket: &UnixStream,
    stdio: &[OwnedFd],
    user_namespace: Option<BorrowedFd<'_>>,
    host: &Host,
    place: Place<'_>,
) -> ! {
    let failure = match run(socket, stdio, user_namespace, host, place) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    // Nobody to tell if this fails: the reader has gone, and the helper ends us.
    let _sent = protocol::write_frame(socket, &Report::Failed(failure));
    sys::exit_now(NOT_STARTED)
}

/// `execve` does not return.
enum Never {}

fn run(
    socket: &UnixStream,
    stdio: &[OwnedFd],
    user_namespace: Option<BorrowedFd<'_>>,
    host: &Host,
    place: Place<'_>,
) -> Result<Never, Failure> {
    if let Place::Of(_) = place {
        // The other processes there see this one already, which still holds what is the host's.
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
            .during("keep other processes out")?;
    }
    // Should the helper be killed, so is everything it started.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .during("tie to the helper")?;
    sys::reset_signals();
    rustix::process::setsid().during("start a session")?;
    let [stdin, stdout, stderr] = stdio else {
        return Err(Failure::setup("receive standard streams", None, Errno::BADF));
    };
    rustix::stdio::dup2_stdin(stdin).during("set standard input")?;
    rustix::stdio::dup2_stdout(stdout).during("set standard output")?;
    rustix::stdio::dup2_stderr(stderr).during("set standard error")?;
    let spec: ExecSpec = protocol::read_frame(socket).during("receive the specification")?;
    if spec.tty {
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin()).during("take the terminal")?;
    }
    match place {
        Place::New => make_place(socket, &spec, host)?,
        Place::Of(step) => {
            let mut all =
                libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWNET;
            if host.unified_cgroups {
                all |= libc::CLONE_NEWCGROUP;
            }
            sys::enter(step, all).during("join the step")?;
            rustix::process::chdir("/").during("enter the root")?;
        }
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));

    let identity = find_user(&spec.user)?;
    spec.limits.apply()?;
    if let Some(user_namespace) = user_namespace {
        // All mounts are made as the real root; only now move to where the emulators are registered.
        rustix::thread::move_into_link_name_space(user_namespace, Some(LinkNameSpaceType::User))
            .during("enter the emulators' user namespace")?;
    }
    // The working directory must not be reached through any descriptor of ours.
    sys::close_all_but(socket.as_raw_fd()).during("close descriptors")?;
    enter_working_directory(&spec.cwd)?;
    drop_rights(&spec, &identity)?;
    sys::close_on_exec_from(3).during("close descriptors")?;
    protocol::write_frame(socket, &Report::Ready).during("report that all is ready")?;
    Err(exec(&spec, &identity))
}

/// Makes the namespaces that this process was born in the step's own.
fn make_place(socket: &UnixStream, spec: &ExecSpec, host: &Host) -> Result<(), Failure> {
    spec.limits.join_cgroups(host.unified_cgroups)?;
    // Modes given from here on are meant as they are.
    rustix::process::umask(Mode::empty());

    if spec.network == Network::None {
        sys::loopback_up().during("bring up the loopback device")?;
    }
    let hostname = if spec.hostname.is_empty() { super::DEFAULT_HOSTNAME } else { &spec.hostname };
    rustix::system::sethostname(hostname.as_bytes()).during_at("set the host name", hostname)?;
    enter_root(socket, spec, host)
}

fn enter_root(socket: &UnixStream, spec: &ExecSpec, host: &Host) -> Result<(), Failure> {
    let (root, stubs) = root::build(spec, host)?;
    if !stubs.is_empty() {
        protocol::write_frame(socket, &Report::Stubs(stubs)).during("report mount points")?;
    }
    root::enter(root.as_fd())
}

fn find_user(user: &str) -> Result<Identity, Failure> {
    let root =
        rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .during("open the root")?;
    user::look_up(root.as_fd(), user).map_err(|reason| Failure {
        stage: Stage::User(reason),
        path: Some(user.into()),
        errno: libc::EINVAL,
    })
}

fn enter_working_directory(cwd: &str) -> Result<(), Failure> {
    let fail = |errno: Errno| Failure {
        stage: Stage::WorkingDirectory,
        path: Some(cwd.into()),
        errno: errno.raw_os_error(),
    };
    let root =
        rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(fail)?;
    let folder = open_in_root(root.as_fd(), cwd.as_bytes(), OFlags::PATH | OFlags::DIRECTORY)
        .map_err(fail)?;
    rustix::process::fchdir(&folder).map_err(fail)?;
    // A folder that only exists outside would show here as unreachable.
    let path = rustix::process::getcwd(vec![]).map_err(fail)?;
    if path.as_bytes().first() == Some(&b'/') { Ok(()) } else { Err(fail(Errno::NOENT)) }
}

fn drop_rights(spec: &ExecSpec, identity: &Identity) -> Result<(), Failure> {
    let keep = if spec.insecure { CapabilitySet::all() } else { capability::default_set() };
    if !spec.insecure {
        capability::bound(keep).during("bound the capabilities")?;
        // While we still may: a filter set without rights would also forbid set-user-id programs.
        let old_socket_calls = spec.platform.architecture == "386";
        let filter = seccomp::default_filter(old_socket_calls).ok_or_else(|| {
            let stage = "build the system call filter: this architecture has no table, so only insecure steps run";
            Failure::setup(stage, None, Errno::NOSYS)
        })?;
        sys::set_seccomp_filter(&filter).during("set the system call filter")?;
    }
    let groups = identity.groups.iter().chain(&spec.groups);
    let groups: Vec<Gid> = groups.copied().map(Gid::from_raw).collect();
    match rustix::thread::set_thread_groups(&groups) {
        // A user namespace with a single mapped group may not set any, and has none to drop.
        Err(Errno::PERM) if groups.is_empty() => {}
        result => result.during("set the groups")?,
    }
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid).during("set the group")?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).during("set the user")?;
    capability::restrict(keep).during("drop the capabilities")?;
    // Changing the user made the kernel forget it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).during("tie to the helper")
}

/// Executes the command; returns why it could not.
fn exec(spec: &ExecSpec, identity: &Identity) -> Failure {
    let fail =
        |stage: Stage, path: &str, errno: i32| Failure { stage, path: Some(path.into()), errno };
    let strings = |list: &[String]| {
        list.iter().map(|s| CString::new(s.as_str())).collect::<Result<Vec<_>, _>>()
    };
    let mut env = spec.env.clone();
    if !env.iter().any(|variable| variable.starts_with("HOME=")) {
        env.push(format!("HOME={}", identity.home));
    }
    let Some(command) = spec.args.first().filter(|command| !command.is_empty()) else {
        return fail(Stage::Setup("run an empty command".into()), "", libc::EINVAL);
    };
    let (Ok(args), Ok(mut env)) = (strings(&spec.args), strings(&env)) else {
        return fail(
            Stage::Setup("pass an argument or variable with a zero byte".into()),
            command,
            libc::EINVAL,
        );
    };
    for (name, value) in &spec.secret_env {
        let variable = [name.as_bytes(), b"=", value.expose()].concat();
        let Ok(variable) = CString::new(variable) else {
            let stage = Stage::Setup("pass a secret with a zero byte in the environment".into());
            return fail(stage, name, libc::EINVAL);
        };
        env.retain(|known| {
            known
                .as_bytes()
                .strip_prefix(name.as_bytes())
                .is_none_or(|rest| !rest.starts_with(b"="))
        });
        env.push(variable);
    }
    let path = spec.env.iter().rev().find_map(|v| v.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let candidates: Vec<String> = if command.contains('/') {
        vec![command.clone()]
    } else {
        path.split(':')
            .map(|folder| format!("{}/{command}", if folder.is_empty() { "." } else { folder }))
            .collect()
    };
    let mut denied = None;
    for candidate in &candidates {
        let Ok(program) = CString::new(candidate.as_str()) else { continue };
        let errno = sys::execve(&program, &args, &env).raw_os_error().unwrap_or(libc::EIO);
        let found = rustix::fs::statat(CWD, program.as_c_str(), rustix::fs::AtFlags::empty());
        match errno {
            libc::ENOENT if found.is_ok() => return fail(Stage::Interpreter, candidate, errno),
            libc::ENOENT | libc::ENOTDIR => {}
            // Another folder of the path may have one that is allowed.
            libc::EACCES => denied = denied.or(Some(candidate)),
            _ => return fail(Stage::Exec, candidate, errno),
        }
    }
    match denied {
        Some(candidate) => fail(Stage::Exec, candidate, libc::EACCES),
        None => fail(Stage::NotFound, command, libc::ENOENT),
    }
}
