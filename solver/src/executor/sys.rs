//! The few system calls that no dependency offers in a safe form.
#![expect(unsafe_code, reason = "raw system calls; each block says why it is sound")]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// What a fork returned.
pub(super) enum Forked {
    /// This is the child.
    Child,
    /// This is the parent: the child's number, and a descriptor that stands for it.
    Parent(i32, OwnedFd),
}

#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
}

/// Forks a child into the new namespaces named by `flags` (`CLONE_NEW*`).
///
/// Only for a process with a single thread: the child goes on to allocate and lock.
pub(super) fn fork_into(flags: u64) -> io::Result<Forked> {
    let mut pidfd: RawFd = -1;
    let flags = flags | libc::CLONE_PIDFD as u64;
    let args = CloneArgs {
        flags,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    // SAFETY: neither CLONE_VM nor a new stack is asked for, so this is a fork: the child gets a copy of all memory.
    // `args` and `pidfd` outlive the call. The caller has a single thread.
    let mut pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    if pid < 0
        && matches!(io::Error::last_os_error().raw_os_error(), Some(libc::ENOSYS | libc::EPERM))
    {
        // An outer sandbox may refuse clone3, whose flags it cannot inspect. All flags used here fit the old call.
        // SAFETY: as above; the third argument is where the old call stores the pidfd.
        pid = unsafe {
            libc::syscall(
                libc::SYS_clone,
                flags | libc::SIGCHLD as u64,
                0_usize,
                &raw mut pidfd,
                0_usize,
                0_usize,
            )
        };
    }
    match pid {
        0 => Ok(Forked::Child),
        pid if pid > 0 => {
            let number =
                i32::try_from(pid).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
            // SAFETY: the kernel stored a fresh descriptor that nothing else owns.
            Ok(Forked::Parent(number, unsafe { OwnedFd::from_raw_fd(pidfd) }))
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ends this process at once: no destructor, no exit handler.
pub(super) fn exit_now(code: i32) -> ! {
    // SAFETY: always sound.
    unsafe { libc::_exit(code) }
}

/// Adds `MOUNT_ATTR_*` restrictions to a mount, and with `recursive` to all below it.
pub(super) fn restrict_mount(
    mount: BorrowedFd<'_>,
    attributes: u64,
    recursive: bool,
) -> io::Result<()> {
    let attr = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `attr` and the empty path outlive the call, and the size given is that of `attr`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes `MOUNT_ATTR_*` restrictions off a mount.
pub(super) fn relax_mount(mount: BorrowedFd<'_>, attributes: u64) -> io::Result<()> {
    let attr = libc::mount_attr { attr_set: 0, attr_clr: attributes, propagation: 0, userns_fd: 0 };
    // SAFETY: `attr` and the empty path outlive the call, and the size given is that of `attr`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes the control groups that this process is in the root of those it sees.
pub(super) fn unshare_cgroups() -> io::Result<()> {
    // SAFETY: affects only what this process sees; no memory is shared or unshared.
    if unsafe { libc::unshare(libc::CLONE_NEWCGROUP) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Marks every descriptor from `first` on to be closed by `execve`.
pub(super) fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    // SAFETY: changes only descriptor flags.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Closes every descriptor above 2 but `keep`.
///
/// Only just before `execve` in a process that will not drop any descriptor again.
pub(super) fn close_all_but(keep: RawFd) -> io::Result<()> {
    let close = |first: RawFd, last: libc::c_uint| {
        if i64::from(first) > i64::from(last) {
            return Ok(());
        }
        // SAFETY: the caller vouches that the descriptors' owners never run again.
        let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    if keep > 3 {
        close(3, keep.unsigned_abs() - 1)?;
    }
    close(keep.max(2) + 1, libc::c_uint::MAX)
}

/// Undoes what a Rust program changes about signals, so that a command starts as under a shell.
pub(super) fn reset_signals() {
    // SAFETY: SIG_DFL is a valid disposition, and the mask is initialised by sigemptyset.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut mask = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut mask);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut());
    }
}

/// Replaces this process. Returns only on failure.
pub(super) fn execve(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    let list = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (args, env) = (list(args), list(env));
    // SAFETY: both arrays end in null and point to strings that outlive the call.
    unsafe { libc::execve(path.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Replaces this process by the program that `program` is open on. Returns only on failure.
pub(super) fn execve_fd(program: BorrowedFd<'_>, args: &[CString]) -> io::Error {
    let args: Vec<*const libc::c_char> =
        args.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect();
    let env = [std::ptr::null::<libc::c_char>()];
    // SAFETY: both arrays end in null and point to strings that outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            args.as_ptr(),
            env.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    io::Error::last_os_error()
}

/// Leaves the mount namespace that this process shares with its parent.
pub(super) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: affects only what this process sees; no memory is shared or unshared.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Moves this process to namespaces (`CLONE_NEW*`): those of the process that `target` stands for, or the one that it is
/// open on. Of process namespaces only children become members.
pub(super) fn enter(target: BorrowedFd<'_>, namespaces: libc::c_int) -> io::Result<()> {
    // SAFETY: affects only what this process sees; no memory is shared or unshared.
    if unsafe { libc::setns(target.as_raw_fd(), namespaces) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Sets a system call filter for this process and all it starts.
pub(super) fn set_seccomp_filter(program: &[libc::sock_filter]) -> io::Result<()> {
    let length =
        u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel copies the program, which outlives the call, and checks it.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Brings the loopback device of this network namespace up.
pub(super) fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket_with(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: an all-zero ifreq is valid.
    let mut request = unsafe { std::mem::zeroed::<libc::ifreq>() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = libc::c_char::try_from(*from).unwrap_or_default();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is an ifreq with a name and flags, as this ioctl wants.
    let result =
        unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
