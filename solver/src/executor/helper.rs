//! The helper process: one thread, one socket, a child per step.
//!
//! It lives as long as the socket's other end. When that closes, however its owner died, the helper kills all steps
//! and exits. Its parent-death signal is deliberately not used: that is tied to the *thread* that started a process,
//! and a thread pool may end that thread long before the program.

use std::ffi::{CString, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use rustix::process::{Signal, WaitId, WaitIdOptions};

use super::protocol::{self, Failure, Registration, Report, Request, StepId};
use super::root::Host;
use super::step::{Place, become_step};
use super::sys::{self, Forked};

/// The name that this program goes by when it is the helper.
pub(super) const NAME: &str = "slipway-sandbox";
/// Said to a helper that runs from a copy which no step can write to.
const SEALED: &str = "sealed";

/// Returns whether this process was started as the sandbox helper. `main` asks this first, before any thread starts,
/// and calls [`helper_main`] if so.
pub fn is_helper(args: impl IntoIterator<Item = OsString>) -> bool {
    args.into_iter().next().is_some_and(|name| name == NAME)
}

/// Serves as the sandbox helper; the control socket is standard input. Never returns.
pub fn helper_main() -> ! {
    let sealed = std::env::args_os().nth(1).is_some_and(|arg| arg == SEALED);
    let result = if sealed { serve() } else { seal() };
    if let Err((action, error)) = result {
        // The reason waits in the socket for whoever wonders why the helper is gone.
        let text = format!("{action}: {error}");
        let _sent = rustix::net::send(rustix::stdio::stdin(), text.as_bytes(), SendFlags::NOSIGNAL);
        sys::exit_now(1);
    }
    sys::exit_now(0)
}

type Doing<T> = Result<T, (&'static str, io::Error)>;

/// Makes the helper's own mount namespace and starts over from a view of the program that can't be written to.
///
/// A step can execute `/proc/self/exe` while that still is this program, and then hold it open for writing.
fn seal() -> Doing<()> {
    // Its own session: a terminal's Ctrl-C is for the parent to decide about. Fails only if it has one already.
    let _session = rustix::process::setsid();
    let program = readonly_view();
    sys::unshare_mounts().map_err(|error| ("leave the mount namespace (are you root?)", error))?;
    let flags = MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM;
    rustix::mount::mount_change("/", flags)
        .map_err(|errno| ("keep mounts private", errno.into()))?;
    let program = match program {
        Ok(view) => view,
        Err(_) => sealed_copy().map_err(|error| ("copy the program", error))?,
    };
    let args = [NAME, SEALED].map(|arg| CString::new(arg).unwrap_or_default());
    Err(("start over", sys::execve_fd(program.as_fd(), &args)))
}

fn readonly_view() -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let view = rustix::mount::open_tree(CWD, "/proc/self/exe", flags)?;
    sys::restrict_mount(view.as_fd(), libc::MOUNT_ATTR_RDONLY, false)?;
    Ok(view)
}

fn sealed_copy() -> io::Result<OwnedFd> {
    let copy = rustix::fs::memfd_create(NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    io::copy(
        &mut std::fs::File::open("/proc/self/exe")?,
        &mut std::fs::File::from(copy.try_clone()?),
    )?;
    rustix::fs::fcntl_add_seals(
        &copy,
        SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )?;
    Ok(copy)
}

/// A step that runs.
struct Step {
    id: StepId,
    process: OwnedFd,
    socket: UnixStream,
    cancelled: bool,
}

/// Where the emulators are registered.
struct Emulators {
    /// `None` when that is the helper's own user namespace.
    user_namespace: Option<OwnedFd>,
    /// Entries live as long as their file system is mounted somewhere, if only here.
    _table: OwnedFd,
}

fn serve() -> Doing<()> {
    // Whatever the parent left open is not for steps.
    sys::close_all_but(-1).map_err(|error| ("close descriptors", error))?;
    let host = Host::examine();
    let control = rustix::stdio::stdin();
    let mut steps: Vec<Step> = vec![];
    let mut emulators: Option<Emulators> = None;
    loop {
        let ready = wait(control, &steps).map_err(|error| ("wait", error))?;
        // Last to first, so that removing one leaves the places of those still to come.
        for index in (0..steps.len()).rev() {
            if ready.ended[index] {
                finish(steps.swap_remove(index));
            } else if ready.cancelled[index] {
                kill(&mut steps[index]);
            }
        }
        if !ready.control {
            continue;
        }
        match protocol::receive_request(control) {
            Ok(Some((request, fds))) => {
                let mut fds = fds.into_iter();
                let socket = fds.next().map(UnixStream::from);
                let stdio: Vec<OwnedFd> = fds.collect();
                match (request, socket) {
                    (Request::Run { id, private_network, emulated }, Some(socket)) => {
                        let started = user_namespace(emulated, emulators.as_ref())
                            .and_then(|user| start(&socket, &stdio, private_network, user, &host));
                        add(&mut steps, id, socket, started);
                    }
                    (Request::Join { id, step, emulated }, Some(socket)) => {
                        let step = steps.iter().find(|known| known.id == step);
                        let started = user_namespace(emulated, emulators.as_ref())
                            .and_then(|user| join(&socket, &stdio, step, user, &host));
                        add(&mut steps, id, socket, started);
                    }
                    (Request::Register, Some(socket)) => {
                        let report = match register(&socket, &host) {
                            Ok(registered) => {
                                emulators = Some(registered);
                                Report::Registered
                            }
                            Err(error) => Report::Failed(Failure::setup(
                                "register the emulators",
                                None,
                                error,
                            )),
                        };
                        answer(&socket, &report);
                    }
                    (Request::Signal { id, signal }, _) => {
                        steps.iter().filter(|step| step.id == id).for_each(|s| tell(s, signal));
                    }
                    (_, None) => {}
                }
            }
            Ok(None) => break,
            Err(error) => return Err(("receive a request", error)),
        }
    }
    for step in &mut steps {
        kill(step);
    }
    for step in steps {
        finish(step);
    }
    Ok(())
}

struct Ready {
    control: bool,
    ended: Vec<bool>,
    cancelled: Vec<bool>,
}

fn wait(control: BorrowedFd<'_>, steps: &[Step]) -> io::Result<Ready> {
    let mut fds = vec![PollFd::from_borrowed_fd(control, PollFlags::IN)];
    for step in steps {
        fds.push(PollFd::from_borrowed_fd(step.process.as_fd(), PollFlags::IN));
        if step.cancelled {
            // Its socket would stay ready for ever; this keeps its place in the list.
            fds.push(PollFd::from_borrowed_fd(step.process.as_fd(), PollFlags::empty()));
        } else {
            fds.push(PollFd::from_borrowed_fd(step.socket.as_fd(), PollFlags::RDHUP));
        }
    }
    loop {
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    Ok(Ready {
        control: !fds[0].revents().is_empty(),
        ended: fds[1..].chunks(2).map(|pair| pair[0].revents().contains(PollFlags::IN)).collect(),
        cancelled: fds[1..].chunks(2).map(|pair| pair[1].revents().intersects(gone)).collect(),
    })
}

fn add(steps: &mut Vec<Step>, id: StepId, socket: UnixStream, started: Result<OwnedFd, Failure>) {
    match started {
        Ok(process) => steps.push(Step { id, process, socket, cancelled: false }),
        Err(failure) => answer(&socket, &Report::Failed(failure)),
    }
}

/// Returns the user namespace that a process is to move to, if any.
fn user_namespace(
    emulated: bool,
    emulators: Option<&Emulators>,
) -> Result<Option<BorrowedFd<'_>>, Failure> {
    match emulators {
        _ if !emulated => Ok(None),
        Some(emulators) => Ok(emulators.user_namespace.as_ref().map(AsFd::as_fd)),
        None => Err(Failure::setup("find the registered emulators", None, Errno::NOENT)),
    }
}

fn start(
    socket: &UnixStream,
    stdio: &[OwnedFd],
    private_network: bool,
    user_namespace: Option<BorrowedFd<'_>>,
    host: &Host,
) -> Result<OwnedFd, Failure> {
    let mut flags =
        libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    if private_network {
        flags |= libc::CLONE_NEWNET;
    }
    if host.unified_cgroups {
        flags |= libc::CLONE_NEWCGROUP;
    }
    match sys::fork_into(flags.unsigned_abs().into()) {
        Ok(Forked::Child) => become_step(socket, stdio, user_namespace, host, Place::New),
        Ok(Forked::Parent(_, process)) => Ok(process),
        Err(error) => Err(Failure::setup("start a process in new namespaces", None, error)),
    }
}

/// Starts one more process where a step is.
fn join(
    socket: &UnixStream,
    stdio: &[OwnedFd],
    step: Option<&Step>,
    user_namespace: Option<BorrowedFd<'_>>,
    host: &Host,
) -> Result<OwnedFd, Failure> {
    let fail = |errno: Errno| Failure::setup("join a step that has ended", None, errno);
    let step = step.ok_or_else(|| fail(Errno::SRCH))?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let own = rustix::fs::open("/proc/self/ns/pid", flags, Mode::empty()).map_err(fail)?;
    // Of this namespace only children become members, so that the helper itself stays where it is; and it must be the
    // helper who forks, since only parents learn how a process ended.
    sys::enter(step.process.as_fd(), libc::CLONE_NEWPID)
        .map_err(|error| Failure::setup("enter the step's processes", None, error))?;
    let forked = sys::fork_into(0);
    if let Ok(Forked::Child) = forked {
        become_step(socket, stdio, user_namespace, host, Place::Of(step.process.as_fd()));
    }
    let back = sys::enter(own.as_fd(), libc::CLONE_NEWPID);
    match forked {
        // Every step from now on would be born among the processes of this one: better none at all.
        _ if back.is_err() => sys::exit_now(1),
        Ok(Forked::Parent(_, process)) => Ok(process),
        Ok(Forked::Child) => sys::exit_now(1),
        Err(error) => Err(Failure::setup("start a process", None, error)),
    }
}

fn kill(step: &mut Step) {
    step.cancelled = true;
    // It is the first process of its namespace: the kernel ends all others with it. Gone already is as good.
    let _killed = rustix::process::pidfd_send_signal(&step.process, Signal::KILL);
}

/// Sends a signal on behalf of whoever started the step.
fn tell(step: &Step, signal: i32) {
    if let Some(signal) = Signal::from_named_raw(signal) {
        let _sent = rustix::process::pidfd_send_signal(&step.process, signal);
    }
}

/// Reaps a step and says how it ended.
fn finish(step: Step) {
    let status = rustix::io::retry_on_intr(|| {
        rustix::process::waitid(WaitId::PidFd(step.process.as_fd()), WaitIdOptions::EXITED)
    });
    let (code, signal) = match status {
        Ok(Some(status)) => (status.exit_status(), status.terminating_signal()),
        _ => (None, None),
    };
    answer(&step.socket, &Report::Exited { code, signal });
}

/// Answers without ever waiting for a reader: a small message always fits unless the reader is gone.
fn answer(socket: &UnixStream, report: &Report) {
    if let Ok(frame) = protocol::encode_frame(report) {
        let _sent = rustix::net::send(socket, &frame, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
    }
}

/// Registers emulators in a `binfmt_misc` that only steps for foreign platforms see.
fn register(socket: &UnixStream, host: &Host) -> io::Result<Emulators> {
    let registrations: Vec<Registration> = protocol::read_frame(socket)?;
    if host.in_user_namespace {
        // The kernel asks the user namespace that this process is in anyway.
        return Ok(Emulators { user_namespace: None, _table: register_here(&registrations)? });
    }
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    match sys::fork_into((libc::CLONE_NEWUSER | libc::CLONE_NEWNS).unsigned_abs().into())? {
        Forked::Child => {
            drop(ours);
            let result = wait_for_maps(theirs.as_fd()).and_then(|()| {
                let table = register_here(&registrations)?;
                protocol::send_request(theirs.as_fd(), Request::Register, &[table.as_fd()])
            });
            sys::exit_now(result.err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO)))
        }
        Forked::Parent(number, process) => {
            drop(theirs);
            let adopted = adopt(number, ours.as_fd());
            drop(ours);
            let status = rustix::io::retry_on_intr(|| {
                rustix::process::waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED)
            })?;
            match status.and_then(|status| status.exit_status()) {
                Some(0) => adopted,
                Some(errno) => Err(io::Error::from_raw_os_error(errno)),
                None => adopted.and(Err(Errno::IO.into())),
            }
        }
    }
}

/// Gives the child's user namespace every identity of this one, and takes what it registered.
fn adopt(child: i32, socket: BorrowedFd<'_>) -> io::Result<Emulators> {
    for map in ["uid_map", "gid_map"] {
        std::fs::write(format!("/proc/{child}/{map}"), "0 0 4294967295")?;
    }
    let user_namespace = rustix::fs::open(
        format!("/proc/{child}/ns/user"),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    rustix::net::send(socket, b"mapped", SendFlags::NOSIGNAL)?;
    let received = protocol::receive_request(socket)?;
    let table = received.and_then(|(_, fds)| fds.into_iter().next()).ok_or(Errno::IO)?;
    Ok(Emulators { user_namespace: Some(user_namespace), _table: table })
}

fn wait_for_maps(socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut word = [0_u8; 8];
    let count = rustix::io::retry_on_intr(|| rustix::io::read(socket, &mut word))?;
    if count == 0 { Err(Errno::PERM.into()) } else { Ok(()) }
}

fn register_here(registrations: &[Registration]) -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("binfmt_misc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    let table =
        rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let mut first_error = None;
    let mut registered = 0;
    for registration in registrations {
        match register_one(table.as_fd(), registration) {
            Ok(()) => registered += 1,
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    match first_error {
        Some(error) if registered == 0 => Err(error),
        // One broken emulator does not spoil the others; what it would have run reports its own format error.
        _ => Ok(table),
    }
}

fn register_one(table: BorrowedFd<'_>, registration: &Registration) -> io::Result<()> {
    // A step can reach its running emulator as /proc/<pid>/exe; through a read-only mount it can't write to it.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let view = rustix::mount::open_tree(CWD, registration.interpreter.as_str(), flags)?;
    sys::restrict_mount(view.as_fd(), libc::MOUNT_ATTR_RDONLY, false)?;
    rustix::mount::move_mount(
        &view,
        c"",
        CWD,
        registration.interpreter.as_str(),
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS,
    )?;
    let file =
        rustix::fs::openat(table, "register", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, &registration.line)?;
    Ok(())
}
