//! Builds the file system that a step sees. Everything happens in the step's own mount namespace.
//!
//! Nothing below the image's root is ever reached by a path that the kernel resolves from the host's root: each mount
//! point is opened inside the root first, and mounted on through its descriptor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountFlags, UnmountFlags};

use super::hook;
use super::mount::{attach, attach_at, bind, bind_fd, mount_overlay, new_mount};
use super::mountpoint::{MountStub, Want, ensure, open_in_root};
use super::protocol::{During, Failure, Stage};
use super::sys;
use super::user;
use super::{DeviceKind, DeviceNode, ExecMount, ExecMountKind, ExecSpec, Network, Writable};

const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY;
const NO_DEVICES: u64 = libc::MOUNT_ATTR_NODEV;
const DATA_ONLY: u64 = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;

/// What a step may not see, because it tells of the host or changes it.
const MASKED: &[&str] = &[
    "proc/acpi",
    "proc/asound",
    "proc/interrupts",
    "proc/kcore",
    "proc/keys",
    "proc/latency_stats",
    "proc/sched_debug",
    "proc/scsi",
    "proc/timer_list",
    "proc/timer_stats",
    "sys/devices/virtual/powercap",
    "sys/firmware",
];
/// What a step may see but not change.
const READ_ONLY_PATHS: &[&str] =
    &["proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger"];
/// Where a file in memory has its name while it is being mounted.
const MEMORY_FILE: &str = "dev/.slipway";
/// What the names of device files begin with that have no place yet, in `/dev`; none of its usual names is like that.
const DEVICE_FILE: &str = ".slipway-device-";
/// Name, major, minor.
const DEVICES: &[(&str, u32, u32)] = &[
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
/// What an insecure step gets besides, where the host has it.
const HOST_DEVICES: &[&str] = &[
    "fuse",
    "kvm",
    "kmsg",
    "net/tun",
    "loop-control",
    "loop0",
    "loop1",
    "loop2",
    "loop3",
    "loop4",
    "loop5",
    "loop6",
    "loop7",
];
const DEV_LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// What the helper found out about the host once, for all steps.
#[derive(Clone, Debug)]
pub(super) struct Host {
    /// This process is root only inside a user namespace.
    pub(super) in_user_namespace: bool,
    /// The host has one cgroup hierarchy.
    pub(super) unified_cgroups: bool,
    /// Those of [`MASKED`] that exist, and the processors' heat counters.
    masked: Vec<String>,
    read_only: Vec<&'static str>,
}

impl Host {
    /// Looks at the host.
    pub(super) fn examine() -> Self {
        /// The inode number that the kernel gives the first user namespace.
        const INITIAL_USER_NAMESPACE: u64 = 0xefff_fffd;
        const CGROUP2: u64 = 0x6367_7270;
        let exists = |path: &str| rustix::fs::lstat(Path::new("/").join(path)).is_ok();
        let mut masked: Vec<String> =
            MASKED.iter().filter(|path| exists(path)).map(|path| (*path).to_owned()).collect();
        if let Ok(processors) = std::fs::read_dir("/sys/devices/system/cpu") {
            for processor in processors.flatten() {
                let name = processor.file_name();
                let Some(name) = name.to_str().filter(|name| name.starts_with("cpu")) else {
                    continue;
                };
                let path = format!("sys/devices/system/cpu/{name}/thermal_throttle");
                if exists(&path) {
                    masked.push(path);
                }
            }
        }
        Self {
            in_user_namespace: rustix::fs::stat("/proc/self/ns/user")
                .is_ok_and(|stat| stat.st_ino != INITIAL_USER_NAMESPACE),
            unified_cgroups: rustix::fs::statfs("/sys/fs/cgroup")
                .is_ok_and(|fs| fs.f_type as u64 == CGROUP2),
            masked,
            read_only: READ_ONLY_PATHS.iter().copied().filter(|path| exists(path)).collect(),
        }
    }
}

/// Mounts all that the specification asks for, and returns the root and the mount points made in the upper folder.
pub(super) fn build(spec: &ExecSpec, host: &Host) -> Result<(OwnedFd, Vec<MountStub>), Failure> {
    let stub_root = spec.stub.join("root");
    let mut lower = vec![stub_root.clone()];
    lower.extend(spec.lower.iter().cloned());
    let writable = Writable { upper: spec.upper.clone(), work: spec.work.clone() };
    let flags = if spec.insecure { MountFlags::empty() } else { MountFlags::NODEV };
    let fd = mount_overlay(&lower, Some(&writable), &stub_root, flags, host.in_user_namespace)?;
    let mut root = Root { fd, stubs: vec![], spec, host };
    root.mount_kernel_views()?;
    let devices = root.mount_devices()?;
    root.mount_requested()?;
    root.attach_devices(devices)?;
    root.mount_network_files()?;
    root.make_working_directory()?;
    hook::call_all(spec, &stub_root)?;
    if !spec.insecure {
        root.hide()?;
    }
    if spec.readonly_root {
        sys::restrict_mount(root.fd.as_fd(), READ_ONLY, false).during("make the root read-only")?;
    }
    Ok((root.fd, root.stubs))
}

/// Makes `root` the root of this mount namespace and drops everything else from it.
pub(super) fn enter(root: BorrowedFd<'_>) -> Result<(), Failure> {
    rustix::process::fchdir(root).during("enter the root")?;
    match rustix::process::pivot_root(".", ".") {
        // Stacked on the new root, the old one is what "." names for unmounting.
        Ok(()) => {
            rustix::mount::unmount(".", UnmountFlags::DETACH).during("unmount the host's root")?;
        }
        // The host's root is an initial RAM disk, which can't be moved: cover it.
        Err(Errno::INVAL) => {
            rustix::mount::mount_move(".", "/").during("move the root")?;
            rustix::process::chroot(".").during("change the root")?;
        }
        Err(errno) => return Err(Failure::setup("pivot the root", None, errno)),
    }
    rustix::process::chdir("/").during("enter the root")
}

struct Root<'a> {
    fd: OwnedFd,
    stubs: Vec<MountStub>,
    spec: &'a ExecSpec,
    host: &'a Host,
}

/// Device files that were asked for: mounts without a place yet.
struct Devices<'a> {
    /// The folder where they were made, under names that nobody is to see.
    folder: OwnedFd,
    made: Vec<(&'a DeviceNode, OwnedFd, String)>,
}

impl<'a> Root<'a> {
    fn ensure(&mut self, dest: &str, want: Want) -> Result<OwnedFd, Failure> {
        ensure(self.fd.as_fd(), dest, want, &mut self.stubs)
            .during_at("prepare the mount point", dest)
    }

    /// Opens one of the places that the sandbox itself relies on. Were it a link, the image would decide where our
    /// own mounts go.
    fn own_place(&mut self, name: &str) -> Result<OwnedFd, Failure> {
        let open = |root: &OwnedFd| {
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::openat2(root, name, flags, Mode::empty(), resolve)
        };
        match open(&self.fd) {
            Err(Errno::NOENT) => {
                self.ensure(name, Want::Folder)?;
                open(&self.fd)
            }
            other => other,
        }
        .during_at("mount on a folder of the image that must not be a link", name)
    }

    fn mount_kernel_views(&mut self) -> Result<(), Failure> {
        let flags = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let place = self.own_place("proc")?;
        let proc = new_mount("proc", &[], flags).during_at("mount", "/proc")?;
        attach(proc.as_fd(), place.as_fd()).during_at("mount", "/proc")?;

        let place = self.own_place("sys")?;
        let restricted =
            if self.spec.insecure { flags } else { flags | MountAttrFlags::MOUNT_ATTR_RDONLY };
        let sys = match new_mount("sysfs", &[], restricted) {
            // Not allowed where the network namespace belongs to another user namespace: show the host's view.
            Err(Errno::PERM) => {
                bind(CWD, "/sys", READ_ONLY | DATA_ONLY, true).during_at("bind", "/sys")?
            }
            other => other.during_at("mount", "/sys")?,
        };
        attach(sys.as_fd(), place.as_fd()).during_at("mount", "/sys")?;
        if self.host.unified_cgroups
            && let Ok(cgroup) = new_mount("cgroup2", &[], restricted)
            && let Ok(place) =
                open_in_root(self.fd.as_fd(), b"sys/fs/cgroup", OFlags::PATH | OFlags::DIRECTORY)
        {
            attach(cgroup.as_fd(), place.as_fd()).during_at("mount", "/sys/fs/cgroup")?;
        }
        Ok(())
    }

    /// A step may keep the right to make device nodes, which images need, but must not open the host's disk through
    /// one. So every mount of the step refuses devices, and the few nodes of `/dev` are mounts of their own.
    fn mount_devices(&mut self) -> Result<Devices<'a>, Failure> {
        const AT: &str = "/dev";
        let place = self.own_place("dev")?;
        let nosuid = MountAttrFlags::MOUNT_ATTR_NOSUID;
        let options = [("mode", "755"), ("size", "67108864")];
        let tmpfs = new_mount("tmpfs", &options, nosuid | MountAttrFlags::MOUNT_ATTR_NOEXEC)
            .during_at("mount", AT)?;
        attach(tmpfs.as_fd(), place.as_fd()).during_at("mount", AT)?;
        for (name, major, minor) in DEVICES {
            self.add_device(tmpfs.as_fd(), name, *major, *minor)
                .during_at("make the device", name)?;
        }
        for (target, name) in DEV_LINKS {
            rustix::fs::symlinkat(*target, &tmpfs, *name).during_at("link in /dev", name)?;
        }
        for (name, fs, options) in [
            (
                "pts",
                "devpts",
                [("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")]
                    .as_slice(),
            ),
            ("shm", "tmpfs", &[("mode", "1777"), ("size", "67108864")]),
            ("mqueue", "mqueue", &[]),
        ] {
            rustix::fs::mkdirat(&tmpfs, name, Mode::from_raw_mode(0o755))
                .during_at("make a folder in /dev", name)?;
            let mut flags = nosuid | MountAttrFlags::MOUNT_ATTR_NOEXEC;
            if name != "pts" {
                flags |= MountAttrFlags::MOUNT_ATTR_NODEV;
            }
            let mounted = match new_mount(fs, options, flags) {
                // The group of terminals has no number in a small user namespace.
                Err(Errno::INVAL) if name == "pts" => new_mount(fs, &options[..3], flags),
                other => other,
            };
            match mounted {
                // Kernels may be built without message queues.
                Err(Errno::NODEV) if name == "mqueue" => {}
                mounted => attach_at(
                    mounted.during_at("mount in /dev", name)?.as_fd(),
                    tmpfs.as_fd(),
                    name,
                )
                .during_at("mount in /dev", name)?,
            }
        }
        if self.spec.tty {
            self.add_console(tmpfs.as_fd());
        }
        // As the mount is now, so are those that are made of it.
        let made = self.make_devices(tmpfs.as_fd())?;
        if self.spec.insecure {
            for name in HOST_DEVICES {
                self.add_host_device(tmpfs.as_fd(), name);
            }
        } else {
            sys::restrict_mount(tmpfs.as_fd(), NO_DEVICES, false).during_at("restrict", AT)?;
        }
        Ok(Devices { folder: tmpfs, made })
    }

    /// Makes the working directory where the image has none; it is the user's, and stays.
    fn make_working_directory(&self) -> Result<(), Failure> {
        let (root, cwd) = (self.fd.as_fd(), self.spec.cwd.as_str());
        let folder = OFlags::PATH | OFlags::DIRECTORY;
        // Anything else that is wrong with it is an error when it is entered.
        if open_in_root(root, cwd.as_bytes(), folder).err() != Some(Errno::NOENT) {
            return Ok(());
        }
        // A user who is not there is an error later on.
        let Ok(identity) = user::look_up(root, &self.spec.user) else { return Ok(()) };
        let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
        let make = || -> Result<(), Errno> {
            let mut made = vec![];
            ensure(root, cwd, Want::Folder, &mut made)?;
            for MountStub { path, .. } in &made {
                let folder = open_in_root(root, path.as_bytes(), folder)?;
                rustix::fs::chownat(&folder, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
            }
            Ok(())
        };
        make().map_err(|errno| Failure {
            stage: Stage::WorkingDirectory,
            path: Some(cwd.into()),
            errno: errno.raw_os_error(),
        })
    }

    /// Makes the device files that were asked for.
    fn make_devices(
        &self,
        folder: BorrowedFd<'_>,
    ) -> Result<Vec<(&'a DeviceNode, OwnedFd, String)>, Failure> {
        let spec = self.spec;
        if spec.devices.is_empty() {
            return Ok(vec![]);
        }
        // A user who is not there is an error later on.
        let identity = user::look_up(self.fd.as_fd(), &spec.user).ok();
        let owner = identity.map_or((0, 0), |identity| (identity.uid, identity.gid));
        let mut made = vec![];
        for (at, device) in spec.devices.iter().enumerate() {
            let name = format!("{DEVICE_FILE}{at}");
            let mount = self.make_device(folder, &name, device, owner);
            let mount = mount.during_at("make the device", &device.dest)?;
            made.push((device, mount, name));
        }
        Ok(made)
    }

    fn make_device(
        &self,
        folder: BorrowedFd<'_>,
        name: &str,
        device: &DeviceNode,
        (uid, gid): (u32, u32),
    ) -> Result<OwnedFd, Errno> {
        let kind = match device.kind {
            DeviceKind::Block => FileType::BlockDevice,
            DeviceKind::Char => FileType::CharacterDevice,
            DeviceKind::Fifo => FileType::Fifo,
        };
        let number = rustix::fs::makedev(device.major, device.minor);
        if self.host.in_user_namespace && kind != FileType::Fifo {
            // As with those that every step has: the host's, if it is what it is said to be.
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let node = rustix::fs::open(&device.source, flags, Mode::empty())?;
            let stat = rustix::fs::fstat(&node)?;
            if FileType::from_raw_mode(stat.st_mode) != kind || stat.st_rdev != number {
                return Err(Errno::NODEV);
            }
            return bind_fd(node.as_fd(), 0, false);
        }
        let mode = Mode::from_raw_mode(device.mode & 0o777);
        rustix::fs::mknodat(folder, name, kind, mode, number)?;
        let owner = (device.uid.unwrap_or(uid), device.gid.unwrap_or(gid));
        if owner != (0, 0) {
            let (uid, gid) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
            rustix::fs::chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        bind(folder, name, 0, false)
    }

    /// Puts the device files that were asked for where they are to be, on top of what is mounted there.
    fn attach_devices(&mut self, devices: Devices<'_>) -> Result<(), Failure> {
        for (device, mount, name) in devices.made {
            let place = self.ensure(&device.dest, Want::File)?;
            attach(mount.as_fd(), place.as_fd()).during_at("mount the device", &device.dest)?;
            match rustix::fs::unlinkat(&devices.folder, &name, AtFlags::empty()) {
                // The host's own was never here.
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => {
                    return Err(Failure::setup("remove a device from /dev", None, errno));
                }
            }
        }
        Ok(())
    }

    fn add_device(
        &self,
        dev: BorrowedFd<'_>,
        name: &str,
        major: u32,
        minor: u32,
    ) -> Result<(), Errno> {
        let number = rustix::fs::makedev(major, minor);
        if !self.host.in_user_namespace {
            rustix::fs::mknodat(
                dev,
                name,
                FileType::CharacterDevice,
                Mode::from_raw_mode(0o666),
                number,
            )?;
            // Mounted on itself, it stays usable when the rest of /dev refuses devices.
            let node = bind(dev, name, 0, false)?;
            return attach_at(node.as_fd(), dev, name);
        }
        // Making nodes is not for a user namespace: borrow the host's, after making sure that it is what it says.
        let node = rustix::fs::open(
            format!("/dev/{name}"),
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let stat = rustix::fs::fstat(&node)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice
            || stat.st_rdev != number
        {
            return Err(Errno::NODEV);
        }
        empty_file(dev, name)?;
        attach_at(bind_fd(node.as_fd(), 0, false)?.as_fd(), dev, name)
    }

    /// Best effort: without it the terminal works but has no name.
    fn add_console(&self, dev: BorrowedFd<'_>) {
        let Ok(path) = rustix::fs::readlink("/proc/self/fd/0", vec![]) else { return };
        let Ok(terminal) = bind(CWD, path, 0, false) else { return };
        if empty_file(dev, "console").is_ok() {
            let _attached = attach_at(terminal.as_fd(), dev, "console");
        }
    }

    /// Best effort: what the host lacks, the step lacks.
    fn add_host_device(&self, dev: BorrowedFd<'_>, name: &str) {
        let Ok(node) = bind(CWD, format!("/dev/{name}"), 0, false) else { return };
        if let Some((folder, _)) = name.split_once('/') {
            let _made = rustix::fs::mkdirat(dev, folder, Mode::from_raw_mode(0o755));
        }
        if empty_file(dev, name).is_ok() {
            let _attached = attach_at(node.as_fd(), dev, name);
        }
    }

    fn mount_requested(&mut self) -> Result<(), Failure> {
        let spec = self.spec;
        let mut mounts: Vec<&ExecMount> = spec.mounts.iter().collect();
        // A mount below another must come after it.
        mounts.sort_by(|a, b| normal(&a.dest).cmp(&normal(&b.dest)));
        for mount in mounts {
            let made = self.make_requested(mount)?;
            let stat = rustix::fs::fstat(&made).during_at("examine the source of", &mount.dest)?;
            let folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            let place = self.ensure(&mount.dest, if folder { Want::Folder } else { Want::File })?;
            attach(made.as_fd(), place.as_fd()).during_at("mount", &mount.dest)?;
            if matches!(mount.kind, ExecMountKind::File { .. }) {
                self.forget_memory_file()?;
            }
        }
        Ok(())
    }

    fn make_requested(&self, mount: &ExecMount) -> Result<OwnedFd, Failure> {
        let devices = if self.spec.insecure { 0 } else { NO_DEVICES };
        let attributes = |readonly: bool| devices | if readonly { READ_ONLY } else { 0 };
        match &mount.kind {
            ExecMountKind::Bind { source, subpath, readonly } => {
                let path = source.to_string_lossy();
                let source =
                    rustix::fs::open(source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                        .during_at("open the mount's source", &path)?;
                let source = below(source, subpath.as_deref())?;
                bind_fd(source.as_fd(), attributes(*readonly), true).during_at("bind", &path)
            }
            ExecMountKind::Host { source: path, readonly, nosuid, noexec, recursive } => {
                let name = path.to_string_lossy();
                let source = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                    .during_at("open the mount's source", &name)?;
                let stat = rustix::fs::fstat(&source).during_at("examine", &name)?;
                let mut attributes = if *readonly { READ_ONLY } else { 0 };
                // Whoever gives a step a single device file means it to be used.
                attributes |= match FileType::from_raw_mode(stat.st_mode) {
                    FileType::CharacterDevice | FileType::BlockDevice => 0,
                    _ => devices,
                };
                for (is_on, attribute) in
                    [(nosuid, libc::MOUNT_ATTR_NOSUID), (noexec, libc::MOUNT_ATTR_NOEXEC)]
                {
                    attributes |= if *is_on { attribute } else { 0 };
                }
                bind_fd(source.as_fd(), attributes, *recursive).during_at("bind", &name)
            }
            ExecMountKind::Overlay { lower, writable, subpath, readonly } => {
                let empty = self.spec.stub.join("empty");
                let readonly = *readonly || writable.is_none();
                // The kernel stacks two folders or more.
                let only = match (lower.as_slice(), writable) {
                    ([], None) => Some(&empty),
                    ([only], None) => Some(only),
                    _ => None,
                };
                if let Some(only) = only {
                    let path = only.to_string_lossy();
                    let source =
                        rustix::fs::open(only, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                            .during_at("open the mount's source", &path)?;
                    let source = below(source, subpath.as_deref())?;
                    return bind_fd(source.as_fd(), attributes(readonly), false)
                        .during_at("bind", &path);
                }
                let mut all = vec![empty.clone()];
                all.extend(lower.iter().cloned());
                let whole = mount_overlay(
                    &all,
                    writable.as_ref(),
                    &empty,
                    MountFlags::empty(),
                    self.host.in_user_namespace,
                )?;
                let source = below(whole, subpath.as_deref())?;
                let made = bind_fd(source.as_fd(), attributes(readonly), false)
                    .during_at("bind", &mount.dest)?;
                // The part is a mount of its own now, so the place is free for the next overlay.
                rustix::mount::unmount(&empty, UnmountFlags::DETACH)
                    .during_at("release", &mount.dest)?;
                Ok(made)
            }
            ExecMountKind::Tmpfs { size } => {
                let size = size.map(|size| size.to_string());
                let mut options = vec![("mode", "1777")];
                options.extend(size.as_deref().map(|size| ("size", size)));
                let mut flags = MountAttrFlags::MOUNT_ATTR_NOSUID;
                if !self.spec.insecure {
                    flags |= MountAttrFlags::MOUNT_ATTR_NODEV;
                }
                new_mount("tmpfs", &options, flags).during_at("mount", &mount.dest)
            }
            ExecMountKind::File { content, mode, uid, gid } => self
                .memory_file(content.expose(), *mode, (*uid, *gid))
                .and_then(|file| {
                    sys::restrict_mount(file.as_fd(), READ_ONLY | DATA_ONLY, false)?;
                    if mode & 0o111 != 0 {
                        // A secret that is meant to be executed.
                        sys::relax_mount(file.as_fd(), libc::MOUNT_ATTR_NOEXEC)?;
                    }
                    Ok(file)
                })
                .during_at("make the file", &mount.dest),
        }
    }

    /// Makes a mount that is one file in memory. It lives in the file system of `/dev`.
    fn memory_file(
        &self,
        content: &[u8],
        mode: u32,
        owner: (u32, u32),
    ) -> std::io::Result<OwnedFd> {
        let flags =
            OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(&self.fd, MEMORY_FILE, flags, Mode::from_raw_mode(0o600))?;
        super::protocol::write_all(&file, content)?;
        if owner != (0, 0) {
            let (uid, gid) = (Uid::from_raw(owner.0), Gid::from_raw(owner.1));
            rustix::fs::fchown(&file, Some(uid), Some(gid))?;
        }
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o777))?;
        Ok(bind(self.fd.as_fd(), MEMORY_FILE, 0, false)?)
    }

    /// Takes away the name of the last file made so; its mount stays. Not before it is attached: the kernel mounts
    /// nothing that has no name.
    fn forget_memory_file(&self) -> Result<(), Failure> {
        rustix::fs::unlinkat(&self.fd, MEMORY_FILE, AtFlags::empty())
            .during("remove a file from /dev")
    }

    fn mount_network_files(&mut self) -> Result<(), Failure> {
        let spec = self.spec;
        let hostname =
            if spec.hostname.is_empty() { super::DEFAULT_HOSTNAME } else { &spec.hostname };
        let mut hosts =
            format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n");
        for (name, address) in &spec.extra_hosts {
            hosts.push_str(&format!("{address}\t{name}\n"));
        }
        let resolver = match (&spec.resolv_conf, spec.network) {
            (Some(text), _) => text.clone().into_bytes(),
            // A name looked up elsewhere would leave the sandbox after all.
            (None, Network::None) => vec![],
            (None, Network::Host) => std::fs::read("/etc/resolv.conf").unwrap_or_default(),
        };
        for (path, content) in [("etc/hosts", hosts.into_bytes()), ("etc/resolv.conf", resolver)] {
            if spec.mounts.iter().any(|mount| normal(&mount.dest) == normal(path)) {
                continue;
            }
            let file =
                self.memory_file(&content, 0o644, (0, 0)).during_at("make the file", path)?;
            sys::restrict_mount(file.as_fd(), READ_ONLY | DATA_ONLY, false)
                .during_at("restrict", path)?;
            let place = self.ensure(path, Want::File)?;
            attach(file.as_fd(), place.as_fd()).during_at("mount", path)?;
            self.forget_memory_file()?;
        }
        Ok(())
    }

    fn hide(&mut self) -> Result<(), Failure> {
        let root = self.fd.as_fd();
        // Empty folders and files are mounted once and then shared.
        let mut empty: Option<OwnedFd> = None;
        for path in &self.host.masked {
            let place = match open_in_root(root, path.as_bytes(), OFlags::PATH | OFlags::NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                other => other.during_at("hide", path)?,
            };
            let stat = rustix::fs::fstat(&place).during_at("hide", path)?;
            let cover = if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                bind(root, "dev/null", READ_ONLY, false)
            } else if let Some(first) = &empty {
                bind_fd(first.as_fd(), 0, false)
            } else {
                let flags = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
                new_mount("tmpfs", &[("size", "0"), ("mode", "0755")], flags)
            }
            .during_at("hide", path)?;
            attach(cover.as_fd(), place.as_fd()).during_at("hide", path)?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory && empty.is_none() {
                empty = Some(cover);
            }
        }
        for path in &self.host.read_only {
            let Ok(place) = open_in_root(root, path.as_bytes(), OFlags::PATH | OFlags::NOFOLLOW)
            else {
                continue;
            };
            let copy = bind_fd(place.as_fd(), READ_ONLY | DATA_ONLY, true)
                .during_at("make read-only", path)?;
            attach(copy.as_fd(), place.as_fd()).during_at("make read-only", path)?;
        }
        Ok(())
    }
}

/// Paths compared part by part, whatever their slashes.
fn normal(path: &str) -> Vec<&str> {
    path.split('/').filter(|part| !part.is_empty() && *part != ".").collect()
}

/// Opens a path below an open folder, staying inside it.
fn below(folder: OwnedFd, subpath: Option<&str>) -> Result<OwnedFd, Failure> {
    match subpath {
        None => Ok(folder),
        Some(path) => open_in_root(folder.as_fd(), path.as_bytes(), OFlags::PATH)
            .during_at("open in the source", path),
    }
}

fn empty_file(folder: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(folder, name, flags, Mode::from_raw_mode(0o644)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_compared_by_parts() {
        assert_eq!(normal("//a/./b/"), ["a", "b"]);
        assert!(normal("/a") < normal("/a/b"));
        assert!(normal("/a/b") < normal("/a-b"));
    }
}
