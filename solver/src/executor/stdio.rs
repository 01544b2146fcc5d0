//! Standard streams of a process that somebody talks with while it runs: pipes, or a terminal.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustix::fs::OFlags;
use rustix::pipe::PipeFlags;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::unix::pipe;

/// The streams of a process, and our ends of them.
#[derive(Debug)]
pub struct Opened {
    /// What the process is given: input, output, errors.
    pub files: [OwnedFd; 3],
    /// Writes what it reads. Dropping it is the end of its input; a terminal has none.
    pub stdin: Option<StreamWriter>,
    /// Reads what it writes to standard output.
    pub stdout: Option<StreamReader>,
    /// Reads what it writes to standard error.
    pub stderr: Option<StreamReader>,
    /// Its terminal, if it has one.
    pub terminal: Option<Terminal>,
}

/// Makes pipes for those streams that are wanted (input, output, errors); the others are empty, or forget what is
/// written to them.
///
/// # Errors
/// When there are too many open files.
pub fn pipes(wanted: [bool; 3]) -> io::Result<Opened> {
    let [stdin, stdout, stderr] = wanted;
    let null = || -> io::Result<OwnedFd> {
        Ok(File::options().read(true).write(true).open("/dev/null")?.into())
    };
    let output = |wanted: bool| -> io::Result<(OwnedFd, Option<StreamReader>)> {
        if !wanted {
            return Ok((null()?, None));
        }
        let (ours, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        // Non-blocking on our side only: the two ends are separate descriptions.
        Ok((theirs, Some(StreamReader(Source::Pipe(pipe::Receiver::from_owned_fd(ours)?)))))
    };
    let (their_stdin, stdin) = if stdin {
        let (theirs, ours) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        (theirs, Some(StreamWriter(Sink::Pipe(pipe::Sender::from_owned_fd(ours)?))))
    } else {
        (null()?, None)
    };
    let (their_stdout, stdout) = output(stdout)?;
    let (their_stderr, stderr) = output(stderr)?;
    let files = [their_stdin, their_stdout, their_stderr];
    Ok(Opened { files, stdin, stdout, stderr, terminal: None })
}

/// Makes a terminal: what the process writes to either stream comes from `stdout`.
///
/// # Errors
/// When there are too many terminals.
pub fn terminal() -> io::Result<Opened> {
    let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&ours)?;
    rustix::pty::unlockpt(&ours)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags)?;
    rustix::fs::fcntl_setfl(&ours, rustix::fs::fcntl_getfl(&ours)? | OFlags::NONBLOCK)?;
    let ours = Arc::new(register(ours)?);
    let files = [theirs.try_clone()?, theirs.try_clone()?, theirs];
    Ok(Opened {
        files,
        stdin: Some(StreamWriter(Sink::Terminal(ours.clone()))),
        stdout: Some(StreamReader(Source::Terminal(ours.clone()))),
        stderr: None,
        terminal: Some(Terminal(ours)),
    })
}

#[expect(unsafe_code, reason = "the runtime cannot know that a descriptor stays the same")]
fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor is the same one for as long as it lives, and stays open until then.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

/// The terminal of a process.
#[derive(Clone, Debug)]
pub struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl Terminal {
    /// Tells the process how large its terminal is.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(rustix::termios::tcsetwinsize(self.0.as_fd(), size)?)
    }
}

/// Reads what a process writes. A terminal that nobody has open any more has ended.
#[derive(Debug)]
pub struct StreamReader(Source);

#[derive(Debug)]
enum Source {
    Pipe(pipe::Receiver),
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

impl StreamReader {
    /// Takes what is there already; `None` when nothing is. For the time after the process has ended: others may hold
    /// its streams open for ever.
    ///
    /// # Errors
    /// When the stream is broken.
    pub fn try_read(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        // The kernel itself is asked, since the runtime may not have heard yet that there is something to read.
        let read = match &self.0 {
            Source::Pipe(pipe) => rustix::io::read(pipe, into).map_err(io::Error::from),
            Source::Terminal(terminal) => read_terminal(terminal.as_fd(), into),
        };
        match read {
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The last process to close its side makes reading an error, which is no more than an end.
fn read_terminal(terminal: impl AsFd, into: &mut [u8]) -> io::Result<usize> {
    match rustix::io::read(terminal, into) {
        Ok(count) => Ok(count),
        Err(rustix::io::Errno::IO) => Ok(0),
        Err(errno) => Err(errno.into()),
    }
}

impl AsyncRead for StreamReader {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Source::Pipe(pipe) => Pin::new(pipe).poll_read(context, into),
            Source::Terminal(terminal) => loop {
                let mut ready = ready!(terminal.poll_read_ready(context))?;
                let read =
                    ready.try_io(|fd| read_terminal(fd.get_ref(), into.initialize_unfilled()));
                // Not ready after all: then it is asked again.
                if let Ok(read) = read {
                    into.advance(read?);
                    return Poll::Ready(Ok(()));
                }
            },
        }
    }
}

/// Writes what a process reads.
#[derive(Debug)]
pub struct StreamWriter(Sink);

#[derive(Debug)]
enum Sink {
    Pipe(pipe::Sender),
    Terminal(Arc<AsyncFd<OwnedFd>>),
}

impl AsyncWrite for StreamWriter {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().0 {
            Sink::Pipe(pipe) => Pin::new(pipe).poll_write(context, bytes),
            Sink::Terminal(terminal) => loop {
                let mut ready = ready!(terminal.poll_write_ready(context))?;
                let written = ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?));
                if let Ok(written) = written {
                    return Poll::Ready(written);
                }
            },
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Dropping it is what ends a pipe.
        Poll::Ready(Ok(()))
    }
}
