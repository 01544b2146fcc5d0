//! The default system call filter.
//!
//! It lists what is refused, so that programs newer than this file keep working: what could undo the sandbox or reach
//! parts of the kernel that no build needs. Calls newer than the list answer `ENOSYS`, which every C library takes as
//! "use the older way"; refused ones answer `EPERM`.

use libc::sock_filter;

/// Stands for a call that an architecture does not have.
const NONE: u32 = u32::MAX;
/// The newest call that was judged when the table was written; numbers are shared by all architectures up here.
const NEWEST: u32 = 466;
/// Every flag of `clone` that makes a namespace.
const NEW_NAMESPACES: u32 = 0x7e02_0000;
/// Address families that reach the hypervisor or the kernel's own crypto code.
const REFUSED_FAMILIES: [u32; 2] = [38, 40];
/// The personalities that only change what `uname` says.
const PERSONALITIES: [u32; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// A system call interface that the kernel may offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Interface {
    Amd64,
    I386,
    /// The numbers that arm64, riscv64 and loong64 share.
    Generic(u32),
    Arm,
}

impl Interface {
    fn audit_arch(self) -> u32 {
        match self {
            Self::Amd64 => 0xc000_003e,
            Self::I386 => 0x4000_0003,
            Self::Generic(arch) => arch,
            Self::Arm => 0x4000_0028,
        }
    }

    fn column(self) -> usize {
        match self {
            Self::Amd64 => 0,
            Self::I386 => 1,
            Self::Generic(_) => 2,
            Self::Arm => 3,
        }
    }
}

/// clone, clone3, socket, personality, by interface.
const CHECKED: [[u32; 4]; 4] =
    [[56, 435, 41, 135], [120, 435, 359, 136], [220, 435, 198, 92], [120, 435, 281, 136]];
/// The old i386 call that hides which socket call it is.
const I386_SOCKETCALL: u32 = 102;

/// Calls that are refused, with their numbers on amd64, i386, arm64 and arm.
#[rustfmt::skip]
const REFUSED: &[(&str, [u32; 4])] = &[
    ("acct", [163, 51, 89, 51]),
    ("add_key", [248, 286, 217, 309]),
    ("bpf", [321, 357, 280, 386]),
    ("clock_settime", [227, 264, 112, 262]),
    ("clock_settime64", [NONE, 404, 404, 404]),
    ("create_module", [174, 127, NONE, NONE]),
    ("delete_module", [176, 129, 106, 129]),
    ("fanotify_init", [300, 338, 262, 367]),
    ("finit_module", [313, 350, 273, 379]),
    ("fsconfig", [431, 431, 431, 431]),
    ("fsmount", [432, 432, 432, 432]),
    ("fsopen", [430, 430, 430, 430]),
    ("fspick", [433, 433, 433, 433]),
    ("get_kernel_syms", [177, 130, NONE, NONE]),
    ("get_mempolicy", [239, 275, 236, 320]),
    ("init_module", [175, 128, 105, 128]),
    ("io_uring_enter", [426, 426, 426, 426]),
    ("io_uring_register", [427, 427, 427, 427]),
    ("io_uring_setup", [425, 425, 425, 425]),
    ("ioperm", [173, 101, NONE, NONE]),
    ("iopl", [172, 110, NONE, NONE]),
    ("kcmp", [312, 349, 272, 378]),
    ("kexec_file_load", [320, NONE, 294, 401]),
    ("kexec_load", [246, 283, 104, 347]),
    ("keyctl", [250, 288, 219, 311]),
    ("lookup_dcookie", [212, 253, 18, 249]),
    ("mbind", [237, 274, 235, 319]),
    ("migrate_pages", [256, 294, 238, 400]),
    ("mount", [165, 21, 40, 21]),
    ("mount_setattr", [442, 442, 442, 442]),
    ("move_mount", [429, 429, 429, 429]),
    ("move_pages", [279, 317, 239, 344]),
    ("nfsservctl", [180, 169, 42, 169]),
    ("open_by_handle_at", [304, 342, 265, 371]),
    ("open_tree", [428, 428, 428, 428]),
    ("perf_event_open", [298, 336, 241, 364]),
    ("pidfd_getfd", [438, 438, 438, 438]),
    ("pivot_root", [155, 217, 41, 218]),
    ("process_madvise", [440, 440, 440, 440]),
    ("query_module", [178, 167, NONE, NONE]),
    ("quotactl", [179, 131, 60, 131]),
    ("quotactl_fd", [443, 443, 443, 443]),
    ("reboot", [169, 88, 142, 88]),
    ("request_key", [249, 287, 218, 310]),
    ("set_mempolicy", [238, 276, 237, 321]),
    ("set_mempolicy_home_node", [450, 450, 450, 450]),
    ("setdomainname", [171, 121, 162, 121]),
    ("sethostname", [170, 74, 161, 74]),
    ("setns", [308, 346, 268, 375]),
    ("settimeofday", [164, 79, 170, 79]),
    ("stime", [NONE, 25, NONE, NONE]),
    ("swapoff", [168, 115, 225, 115]),
    ("swapon", [167, 87, 224, 87]),
    ("_sysctl", [156, 149, NONE, 149]),
    ("sysfs", [139, 135, NONE, 135]),
    ("syslog", [103, 103, 116, 103]),
    ("umount", [NONE, 22, NONE, NONE]),
    ("umount2", [166, 52, 39, 52]),
    ("unshare", [272, 310, 97, 337]),
    ("uselib", [134, 86, NONE, 86]),
    ("userfaultfd", [323, 374, 282, 388]),
    ("ustat", [136, 62, NONE, 62]),
    ("vhangup", [153, 111, 58, 111]),
    ("vm86", [NONE, 166, NONE, NONE]),
    ("vm86old", [NONE, 113, NONE, NONE]),
    ("vserver", [236, 273, NONE, 313]),
];

/// The interfaces of this machine's kernel.
fn interfaces() -> &'static [Interface] {
    match std::env::consts::ARCH {
        "x86_64" => &[Interface::Amd64, Interface::I386],
        "aarch64" => &[Interface::Generic(0xc000_00b7), Interface::Arm],
        "riscv64" => &[Interface::Generic(0xc000_00f3)],
        "loongarch64" => &[Interface::Generic(0xc000_0102)],
        _ => &[],
    }
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const GREATER: u16 = (libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K) as u16;
const ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Offsets in what the kernel shows to a filter.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
/// The low half of the first argument, on a little-endian machine.
const FIRST_ARGUMENT: u32 = 16;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const UNKNOWN: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

fn op(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

/// Skips the next instruction unless the comparison holds.
fn when(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 1, k }
}

fn block(interface: Interface, old_socket_calls: bool) -> Vec<sock_filter> {
    let [clone, clone3, socket, personality] = CHECKED[interface.column()];
    let mut code = vec![op(LOAD, NUMBER)];
    let answer = |code: &mut Vec<sock_filter>, compare: u16, k: u32, answer: u32| {
        code.push(when(compare, k));
        code.push(op(RETURN, answer));
    };
    // This also refuses the x32 interface, whose numbers start far above.
    answer(&mut code, GREATER, NEWEST, UNKNOWN);
    // Its flags are behind a pointer, where a filter cannot look; C libraries fall back to clone.
    answer(&mut code, EQUAL, clone3, UNKNOWN);
    if interface == Interface::I386 && !old_socket_calls {
        answer(&mut code, EQUAL, I386_SOCKETCALL, UNKNOWN);
    }
    let argument =
        |code: &mut Vec<sock_filter>, number: u32, checks: &[(u16, u32, u32)], otherwise: u32| {
            let length = 2 + 2 * checks.len();
            code.push(sock_filter {
                code: EQUAL,
                jt: 0,
                jf: u8::try_from(length).unwrap_or(u8::MAX),
                k: number,
            });
            code.push(op(LOAD, FIRST_ARGUMENT));
            for (compare, k, result) in checks {
                answer(code, *compare, *k, *result);
            }
            code.push(op(RETURN, otherwise));
        };
    argument(&mut code, clone, &[(ANY_BIT, NEW_NAMESPACES, REFUSE)], ALLOW);
    argument(&mut code, socket, &REFUSED_FAMILIES.map(|family| (EQUAL, family, REFUSE)), ALLOW);
    argument(&mut code, personality, &PERSONALITIES.map(|value| (EQUAL, value, ALLOW)), REFUSE);
    let refused: Vec<u32> = REFUSED
        .iter()
        .map(|(_, numbers)| numbers[interface.column()])
        .filter(|number| *number != NONE)
        .collect();
    for (index, number) in refused.iter().enumerate() {
        // Each hit jumps over the remaining comparisons and the final "allow".
        let distance = refused.len() - index;
        code.push(sock_filter {
            code: EQUAL,
            jt: u8::try_from(distance).unwrap_or(u8::MAX),
            jf: 0,
            k: *number,
        });
    }
    code.push(op(RETURN, ALLOW));
    code.push(op(RETURN, REFUSE));
    code
}

/// Builds the filter for this machine; `None` when its architecture has no table.
///
/// `old_socket_calls` lets 32-bit x86 programs make sockets the old way, which hides the address family.
pub(super) fn default_filter(old_socket_calls: bool) -> Option<Vec<sock_filter>> {
    program(interfaces(), old_socket_calls)
}

fn program(interfaces: &[Interface], old_socket_calls: bool) -> Option<Vec<sock_filter>> {
    if interfaces.is_empty() {
        return None;
    }
    let mut code = vec![op(LOAD, ARCH)];
    for interface in interfaces {
        let block = block(*interface, old_socket_calls);
        let jf = u8::try_from(block.len()).ok()?;
        code.push(sock_filter { code: EQUAL, jt: 0, jf, k: interface.audit_arch() });
        code.extend(block);
    }
    code.push(op(RETURN, libc::SECCOMP_RET_KILL_PROCESS));
    Some(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers from here on belong to the x32 interface of amd64.
    const X32_BIT: u32 = 0x4000_0000;
    const BOTH: &[Interface] = &[Interface::Amd64, Interface::I386];

    /// Runs a filter as the kernel would.
    fn run(program: &[sock_filter], arch: u32, number: u32, argument: u32) -> u32 {
        let (mut at, mut value) = (0, 0);
        loop {
            let step = program[at];
            at += 1;
            let jump = |hit: bool| usize::from(if hit { step.jt } else { step.jf });
            match step.code {
                LOAD => {
                    value = match step.k {
                        NUMBER => number,
                        ARCH => arch,
                        FIRST_ARGUMENT => argument,
                        other => panic!("load from {other}"),
                    }
                }
                EQUAL => at += jump(value == step.k),
                GREATER => at += jump(value > step.k),
                ANY_BIT => at += jump(value & step.k != 0),
                RETURN => return step.k,
                other => panic!("instruction {other}"),
            }
        }
    }

    #[test]
    fn every_refused_call_is_refused_on_every_interface() {
        let all =
            [Interface::Amd64, Interface::I386, Interface::Generic(0xc000_00b7), Interface::Arm];
        for interface in all {
            let program = program(&[interface], true).unwrap();
            for (name, numbers) in REFUSED {
                let number = numbers[interface.column()];
                if number != NONE {
                    assert_eq!(
                        run(&program, interface.audit_arch(), number, 0),
                        REFUSE,
                        "{name} {interface:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn ordinary_calls_are_allowed() {
        let program = program(BOTH, true).unwrap();
        let amd64 = Interface::Amd64.audit_arch();
        // read, write, execve, ptrace, chroot, openat2, faccessat2, statmount
        for number in [0, 1, 59, 101, 161, 437, 439, 457] {
            assert_eq!(run(&program, amd64, number, 0), ALLOW, "{number}");
        }
        assert_eq!(run(&program, Interface::I386.audit_arch(), 1, 0), ALLOW);
    }

    #[test]
    fn arguments_decide_where_a_call_has_two_uses() {
        let program = program(BOTH, false).unwrap();
        for (interface, clone, socket, personality) in
            [(Interface::Amd64, 56, 41, 135), (Interface::I386, 120, 359, 136)]
        {
            let run = |number, argument| run(&program, interface.audit_arch(), number, argument);
            assert_eq!(run(clone, 0x11), ALLOW);
            assert_eq!(run(clone, 0x1000_0011), REFUSE);
            assert_eq!(run(clone, 0x0002_0000), REFUSE);
            assert_eq!([run(socket, 1), run(socket, 38), run(socket, 40)], [ALLOW, REFUSE, REFUSE]);
            assert_eq!([run(personality, 8), run(personality, 0x0040_0000)], [ALLOW, REFUSE]);
            assert_eq!(run(435, 0), UNKNOWN);
        }
        assert_eq!(run(&program, Interface::I386.audit_arch(), I386_SOCKETCALL, 1), UNKNOWN);
    }

    #[test]
    fn unknown_calls_look_unimplemented_and_unknown_interfaces_end_the_process() {
        let program = program(BOTH, true).unwrap();
        let amd64 = Interface::Amd64.audit_arch();
        for number in [467, 600, X32_BIT, X32_BIT + 59, u32::MAX] {
            assert_eq!(run(&program, amd64, number, 0), UNKNOWN, "{number}");
        }
        assert_eq!(run(&program, 0x4000_0028, 1, 0), libc::SECCOMP_RET_KILL_PROCESS);
    }
}
