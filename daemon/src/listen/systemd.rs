//! Sockets that systemd opened before it started this process (`sd_listen_fds(3)`).

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use super::address::Address;
use super::error::{ListenError, ListenErrorKind};

/// The first descriptor that systemd passes on.
const FIRST: RawFd = 3;

/// More than this is no number of sockets.
const MAX: usize = 1024;

/// The names of the sockets that were passed on, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Passed {
    names: Vec<String>,
}

impl Passed {
    /// Reads the variables that are meant for this process.
    pub(super) fn of_process() -> Self {
        Self::read(std::process::id(), |name| std::env::var(name).ok())
    }

    fn read(pid: u32, variable: impl Fn(&str) -> Option<String>) -> Self {
        // A child of the process that they are for has the same variables.
        if variable("LISTEN_PID").and_then(|text| text.parse().ok()) != Some(pid) {
            return Self::default();
        }
        let count: usize =
            variable("LISTEN_FDS").and_then(|text| text.parse().ok()).unwrap_or_default();
        let names = variable("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        let names = (0..count.min(MAX)).map(|_| names.next().unwrap_or_default().to_owned());
        Self { names: names.collect() }
    }

    /// Chooses by the words of an address: nothing is the first, a number one, a name all of that name, `*` all.
    pub(super) fn choose(&self, which: &str) -> Result<Vec<RawFd>, ListenError> {
        let address = Address::Systemd(which.to_owned());
        let none = |message: String| ListenError::new(ListenErrorKind::Address, &address, message);
        let all = (FIRST..).zip(&self.names);
        let chosen: Vec<RawFd> = match which {
            "" => all.take(1).map(|(fd, _)| fd).collect(),
            "*" => all.map(|(fd, _)| fd).collect(),
            _ => all
                .filter(|(fd, name)| which == *name || which.parse() == Ok(*fd))
                .map(|(fd, _)| fd)
                .collect(),
        };
        if !chosen.is_empty() {
            return Ok(chosen);
        }
        if self.names.is_empty() {
            return Err(none(
                "was not passed on; make sure that a socket unit of systemd started the service"
                    .into(),
            ));
        }
        let known: Vec<_> =
            (FIRST..).zip(&self.names).map(|(fd, name)| format!("{fd} {name:?}")).collect();
        Err(none(format!("is not among the sockets that were passed on: {}", known.join(", "))))
    }
}

/// Returns a descriptor of our own for a socket that was passed on.
///
/// The one that was passed on stays open, as it does in systemd: should the variables lie, it is somebody else's.
#[expect(unsafe_code, reason = "descriptors are passed on by number")]
pub(super) fn take(fd: RawFd, address: &Address) -> Result<OwnedFd, ListenError> {
    // The number may name nothing; the folder tells without touching it.
    if !std::path::Path::new(&format!("/proc/self/fd/{fd}")).exists() {
        let message = format!("was to be descriptor {fd}, which is not open");
        return Err(ListenError::new(ListenErrorKind::System, address, message));
    }
    // SAFETY: it is open, and is borrowed only to be duplicated and marked; neither harms whose it might be.
    let passed = unsafe { BorrowedFd::borrow_raw(fd) };
    // Steps must not inherit it.
    rustix::io::fcntl_setfd(passed, rustix::io::FdFlags::CLOEXEC)
        .map_err(|error| ListenError::system(address, "cannot be kept from children", error))?;
    passed
        .try_clone_to_owned()
        .map_err(|error| ListenError::system(address, "cannot be taken over", error))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    fn passed(variables: &[(&str, &str)]) -> Passed {
        Passed::read(7, |name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn variables_count_for_the_process_they_name() {
        let names =
            |names: &[&str]| Passed { names: names.iter().map(ToString::to_string).collect() };
        for (variables, expected) in [
            (&[][..], names(&[])),
            (&[("LISTEN_PID", "8"), ("LISTEN_FDS", "1")], names(&[])),
            (&[("LISTEN_PID", "7")], names(&[])),
            (&[("LISTEN_PID", "7"), ("LISTEN_FDS", "x")], names(&[])),
            (&[("LISTEN_PID", "7"), ("LISTEN_FDS", "2")], names(&["", ""])),
            (
                &[("LISTEN_PID", "7"), ("LISTEN_FDS", "3"), ("LISTEN_FDNAMES", "a:b")],
                names(&["a", "b", ""]),
            ),
        ] {
            assert_eq!(passed(variables), expected, "{variables:?}");
        }
    }

    #[test]
    fn descriptors_that_are_not_what_they_should_be_stay_whole() {
        let file = tempfile::tempfile().unwrap();
        let address = Address::Systemd(String::new());
        drop(take(file.as_raw_fd(), &address).unwrap());
        file.metadata().unwrap();
        let error = take(RawFd::MAX, &address).unwrap_err();
        assert_eq!(error.kind(), ListenErrorKind::System);
    }

    #[test]
    fn sockets_are_chosen_by_number_and_name() {
        let passed =
            passed(&[("LISTEN_PID", "7"), ("LISTEN_FDS", "3"), ("LISTEN_FDNAMES", "a:b:a")]);
        for (which, expected) in
            [("", &[3][..]), ("*", &[3, 4, 5]), ("4", &[4]), ("a", &[3, 5]), ("b", &[4])]
        {
            assert_eq!(passed.choose(which).unwrap(), expected, "{which}");
        }
        assert_eq!(
            passed.choose("c").unwrap_err().to_string(),
            "cannot listen: \"fd://c\" is not among the sockets that were passed on: 3 \"a\", 4 \"b\", 5 \"a\""
        );
        assert_eq!(
            Passed::default().choose("").unwrap_err().to_string(),
            "cannot listen: \"fd://\" was not passed on; make sure that a socket unit of systemd started the service"
        );
    }
}
