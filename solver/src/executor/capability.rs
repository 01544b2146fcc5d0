//! The rights of root that a step keeps.

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

/// The set that image builders agree on.
pub(super) fn default_set() -> CapabilitySet {
    CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FSETID
        | CapabilitySet::FOWNER
        | CapabilitySet::MKNOD
        | CapabilitySet::NET_RAW
        | CapabilitySet::SETGID
        | CapabilitySet::SETUID
        | CapabilitySet::SETFCAP
        | CapabilitySet::SETPCAP
        | CapabilitySet::NET_BIND_SERVICE
        | CapabilitySet::SYS_CHROOT
        | CapabilitySet::KILL
        | CapabilitySet::AUDIT_WRITE
}

/// Gives up for good, for this process and all it starts, every capability not in `keep`.
pub(super) fn bound(keep: CapabilitySet) -> Result<(), Errno> {
    for bit in 0..64 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if keep.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // The first number that the kernel does not know.
            Err(Errno::INVAL) => break,
            result => result?,
        }
    }
    Ok(())
}

/// Keeps of the present rights those in `keep`; nothing is inheritable, so nothing returns through a program's
/// own inheritable set.
pub(super) fn restrict(keep: CapabilitySet) -> Result<(), Errno> {
    let now = rustix::thread::capabilities(None)?;
    let kept = now.permitted & keep;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: now.effective & kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fourteen_capabilities_are_kept() {
        // The mask that /proc/self/status shows in a step.
        assert_eq!(default_set().bits(), 0xa804_25fb);
    }
}
