//! A terminal for `run -t`: a pseudo-terminal of the command's own, joined to ours.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::thread::JoinHandle;

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Termios};
use tokio::signal::unix::{SignalKind, signal};

/// Bytes that cross in one go.
const CHUNK: usize = 4096;

/// A pseudo-terminal whose other side a command is given.
#[derive(Debug)]
pub(crate) struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    /// Makes a pseudo-terminal of the size that ours has.
    ///
    /// # Errors
    /// When the system has none left.
    pub(crate) fn open() -> io::Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, vec![])?;
        let slave =
            rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
        let terminal = Self { master, slave };
        copy_size(&terminal.master);
        Ok(terminal)
    }

    /// Returns the command's side, once for each standard stream.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn streams(&self) -> io::Result<[OwnedFd; 3]> {
        Ok([self.slave.try_clone()?, self.slave.try_clone()?, self.slave.try_clone()?])
    }

    /// Begins to carry bytes between the two terminals; keys are passed on if `input`.
    ///
    /// # Errors
    /// When our terminal cannot be set up.
    pub(crate) fn join(self, input: bool) -> io::Result<Joined> {
        let Self { master, slave } = self;
        // Only the command holds the other side from now on, so that its end is seen.
        drop(slave);
        let raw = if input { Some(RawMode::enter()?) } else { None };
        if input {
            let mut to = File::from(master.try_clone()?);
            // Ends with the program: a read from a terminal cannot be given up.
            std::thread::spawn(move || {
                let mut buffer = [0; CHUNK];
                while let Ok(read @ 1..) = io::stdin().lock().read(&mut buffer) {
                    if to.write_all(&buffer[..read]).is_err() {
                        break;
                    }
                }
            });
        }
        let mut from = File::from(master.try_clone()?);
        let output = std::thread::spawn(move || {
            let mut buffer = [0; CHUNK];
            let mut out = File::from(rustix::stdio::stdout().try_clone_to_owned()?);
            loop {
                match from.read(&mut buffer) {
                    // The kernel's way to say that nobody holds the other side any more.
                    Err(error)
                        if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) =>
                    {
                        return Ok(());
                    }
                    Ok(0) => return Ok(()),
                    Ok(read) => out.write_all(&buffer[..read])?,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        });
        Ok(Joined { master, raw, output: Some(output) })
    }
}

/// Two terminals joined. Ours is as it was when this is dropped.
#[derive(Debug)]
pub(crate) struct Joined {
    master: OwnedFd,
    raw: Option<RawMode>,
    output: Option<JoinHandle<io::Result<()>>>,
}

impl Joined {
    /// Keeps the size of the command's terminal that of ours; never returns.
    pub(crate) async fn follow_size(&self) {
        if let Ok(mut changes) = signal(SignalKind::window_change()) {
            while changes.recv().await.is_some() {
                copy_size(&self.master);
            }
        }
        std::future::pending::<()>().await;
    }

    /// Waits until everything the command wrote has been shown.
    pub(crate) fn finish(mut self) {
        if let Some(output) = self.output.take() {
            // What cannot be shown any more has no reader to be told.
            let _shown = output.join();
        }
        drop(self.raw.take());
    }
}

fn copy_size(to: &OwnedFd) {
    if let Ok(size) = rustix::termios::tcgetwinsize(rustix::stdio::stdin()) {
        // A terminal without a size is still a terminal.
        let _set = rustix::termios::tcsetwinsize(to, size);
    }
}

/// Our terminal hands every key through as it is.
#[derive(Debug)]
struct RawMode(Termios);

impl RawMode {
    fn enter() -> io::Result<Self> {
        let stdin = rustix::stdio::stdin();
        let before = rustix::termios::tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // There is nobody left to tell.
        let _restored =
            rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &self.0);
    }
}
