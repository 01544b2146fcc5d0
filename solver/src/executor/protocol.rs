//! What this process, the helper and a starting step say to each other.
//!
//! The control socket carries one small message per request with descriptors attached. The first descriptor is the
//! request's own socket: its sender writes the request there, answers come back there, and closing it cancels.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::mountpoint::MountStub;

/// More than any real request; a larger length means that the two ends disagree about the protocol.
pub(super) const MAX_FRAME: usize = 64 << 20;
/// A request socket, then standard input, output and error.
const MAX_FDS: usize = 4;

/// Which step is meant; numbers are given out by this process and never twice to one helper.
pub(super) type StepId = u64;

/// A request on the wire: what it is, flags, the step, and one more number.
const REQUEST_BYTES: usize = 18;

/// What is asked of the helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Run the step whose specification is on the request's socket.
    Run {
        /// What it is to be called.
        id: StepId,
        /// Give it a network namespace of its own.
        private_network: bool,
        /// Run it where the emulators are registered.
        emulated: bool,
    },
    /// Register the emulators listed on the request's socket.
    Register,
    /// Run one more process where a step is; its specification is on the request's socket.
    Join {
        /// What it is to be called.
        id: StepId,
        /// The step that it joins.
        step: StepId,
        /// Run it where the emulators are registered.
        emulated: bool,
    },
    /// Send a signal to a step. There is no socket and no answer: it may have ended by now.
    Signal {
        /// Which step.
        id: StepId,
        /// The signal's number.
        signal: i32,
    },
}

impl Request {
    fn encode(self) -> [u8; REQUEST_BYTES] {
        let (kind, flags, id, more) = match self {
            Self::Run { id, private_network, emulated } => {
                (1, u8::from(private_network) | (u8::from(emulated) << 1), id, 0)
            }
            Self::Register => (2, 0, 0, 0),
            Self::Join { id, step, emulated } => (3, u8::from(emulated) << 1, id, step),
            Self::Signal { id, signal } => (4, 0, id, u64::from(signal.unsigned_abs())),
        };
        let mut bytes = [0; REQUEST_BYTES];
        (bytes[0], bytes[1]) = (kind, flags);
        bytes[2..10].copy_from_slice(&id.to_le_bytes());
        bytes[10..].copy_from_slice(&more.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, numbers) = bytes.split_first_chunk::<2>()?;
        let (id, more) = numbers.split_first_chunk::<8>()?;
        let (id, more) = (u64::from_le_bytes(*id), u64::from_le_bytes(more.try_into().ok()?));
        let [kind, flags] = *head;
        let emulated = flags & 2 != 0;
        match kind {
            1 => Some(Self::Run { id, private_network: flags & 1 != 0, emulated }),
            2 => Some(Self::Register),
            3 => Some(Self::Join { id, step: more, emulated }),
            4 => Some(Self::Signal { id, signal: i32::try_from(more).ok()? }),
            _ => None,
        }
    }
}

/// One emulator to register.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Registration {
    /// The emulator's path on the host.
    pub(super) interpreter: String,
    /// The line for `binfmt_misc`'s `register` file.
    pub(super) line: Vec<u8>,
}

/// What comes back on a request's socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Report {
    /// Mount points that were made in the upper folder.
    Stubs(Vec<MountStub>),
    /// The step is in its root and about to execute its command: others may join it.
    Ready,
    /// The command could not be started; an exit follows all the same.
    Failed(Failure),
    /// The command ended.
    Exited {
        /// Its exit code, unless a signal ended it.
        code: Option<i32>,
        /// The signal.
        signal: Option<i32>,
    },
    /// The emulators are registered.
    Registered,
}

/// A failed step of setting up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    /// What was being done.
    pub(super) stage: Stage,
    /// To what.
    pub(super) path: Option<String>,
    /// What the kernel said.
    pub(super) errno: i32,
}

/// What was being done when setting up failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Stage {
    /// Anything that is neither the image's nor the user's fault.
    Setup(String),
    /// Preparing the root for a device; what was wrong.
    Hook(String),
    /// Looking up the user.
    User(String),
    /// Entering the working directory.
    WorkingDirectory,
    /// No such command.
    NotFound,
    /// The command is there but its interpreter is not.
    Interpreter,
    /// Executing the command.
    Exec,
}

impl Failure {
    pub(super) fn setup(stage: &str, path: Option<&str>, errno: impl Into<io::Error>) -> Self {
        let source: io::Error = errno.into();
        Self {
            stage: Stage::Setup(stage.into()),
            path: path.map(Into::into),
            errno: source.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// Adds to an error what was being done.
pub(super) trait During<T> {
    /// Names the stage.
    fn during(self, stage: &str) -> Result<T, Failure>;
    /// Names the stage and the thing.
    fn during_at(self, stage: &str, path: &str) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, stage: &str) -> Result<T, Failure> {
        self.map_err(|errno| Failure::setup(stage, None, errno))
    }

    fn during_at(self, stage: &str, path: &str) -> Result<T, Failure> {
        self.map_err(|errno| Failure::setup(stage, Some(path), errno))
    }
}

/// Sends a request with its descriptors.
pub(super) fn send_request(
    control: BorrowedFd<'_>,
    request: Request,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    let bytes = request.encode();
    rustix::net::sendmsg(control, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives a request; `None` when the other end is gone.
pub(super) fn receive_request(
    control: BorrowedFd<'_>,
) -> io::Result<Option<(Request, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0_u8; REQUEST_BYTES];
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(
            control,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut fds = vec![];
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let request = Request::decode(&bytes[..received.bytes])
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EPROTO))?;
    Ok(Some((request, fds)))
}

/// Turns a value into a frame: four bytes of length, then JSON.
pub(super) fn encode_frame<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, value)?;
    let length = u32::try_from(frame.len() - 4).ok().filter(|n| *n as usize <= MAX_FRAME);
    let Some(length) = length else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the request is too large"));
    };
    frame[..4].copy_from_slice(&length.to_le_bytes());
    Ok(frame)
}

/// Writes a frame, blocking.
pub(super) fn write_frame<T: Serialize>(fd: impl AsFd, value: &T) -> io::Result<()> {
    let frame = encode_frame(value)?;
    let mut rest = frame.as_slice();
    while !rest.is_empty() {
        // A vanished reader must be an error here, not a signal.
        let sent =
            rustix::io::retry_on_intr(|| rustix::net::send(fd.as_fd(), rest, SendFlags::NOSIGNAL))?;
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(())
}

/// Reads a frame, blocking.
pub(super) fn read_frame<T: DeserializeOwned>(mut reader: impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    reader.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::from_raw_os_error(libc::EPROTO));
    }
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Writes all bytes, blocking.
pub(super) fn write_all(fd: impl AsFd, bytes: &[u8]) -> io::Result<()> {
    struct Fd<'a>(BorrowedFd<'a>);
    impl Write for Fd<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(rustix::io::write(self.0, bytes)?)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    Fd(fd.as_fd()).write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_wire() {
        for request in [
            Request::Run { id: 1, private_network: false, emulated: false },
            Request::Run { id: u64::MAX, private_network: true, emulated: false },
            Request::Run { id: 2, private_network: false, emulated: true },
            Request::Register,
            Request::Join { id: 7, step: 1 << 40, emulated: true },
            Request::Join { id: 7, step: 3, emulated: false },
            Request::Signal { id: 9, signal: 15 },
        ] {
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
        assert_eq!(Request::decode(&[9; REQUEST_BYTES]), None);
        assert_eq!(Request::decode(&[1, 0]), None);
        assert_eq!(Request::decode(&[]), None);
    }

    #[test]
    fn a_frame_with_an_absurd_length_is_refused() {
        let bytes = [0xff; 8];
        assert_eq!(
            read_frame::<Report>(&bytes[..]).unwrap_err().raw_os_error(),
            Some(libc::EPROTO)
        );
    }

    #[test]
    fn descriptors_travel_with_a_request() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (left, right) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        send_request(left.as_fd(), Request::Register, &[theirs.as_fd()]).unwrap();
        let (request, fds) = receive_request(right.as_fd()).unwrap().unwrap();
        assert_eq!(request, Request::Register);
        assert_eq!(fds.len(), 1);
        write_frame(&fds[0], &Report::Registered).unwrap();
        assert!(matches!(read_frame(&ours).unwrap(), Report::Registered));
        drop(left);
        assert!(receive_request(right.as_fd()).unwrap().is_none());
    }
}
