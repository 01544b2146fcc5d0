//! The executor proper: starts the helper, hands it steps, and carries their output.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{OnceCell, mpsc, watch};

use super::helper::NAME;
use super::mountpoint::MountStub;
use super::protocol::{self, Failure, MAX_FRAME, Registration, Report, Request, Stage, StepId};
use super::{ExecError, ExecSpec, Executor, Exit, Network, Stdio, Stream};
use crate::emulation::{Emulation, EmulationOptions, Support};

/// How much output is read at once: a pipe's usual size.
const CHUNK: usize = 64 << 10;
/// How long a dropped step may take to die before the drop stops waiting for it.
const KILL_WAIT: Duration = Duration::from_secs(2);

/// Which program serves as helper.
#[derive(Clone, Debug)]
pub struct HelperCommand {
    /// Its path. It is started with the name that [`super::is_helper`] recognises.
    pub program: PathBuf,
}

impl Default for HelperCommand {
    /// This program itself.
    fn default() -> Self {
        Self { program: "/proc/self/exe".into() }
    }
}

/// How a [`SandboxExecutor`] works.
#[derive(Clone, Debug, Default)]
pub struct SandboxOptions {
    /// The helper.
    pub helper: HelperCommand,
    /// Where emulators are looked for.
    pub emulation: EmulationOptions,
}

/// Runs steps in sandboxes of this machine's kernel.
///
/// Cheap to make: the helper starts with the first step and ends when the executor is dropped, or its process dies.
#[derive(Debug)]
pub struct SandboxExecutor {
    options: SandboxOptions,
    emulation: OnceLock<Arc<Emulation>>,
    helper: Mutex<Option<Arc<Helper>>>,
}

impl SandboxExecutor {
    /// Makes an executor. Emulators are looked for when somebody first asks for them.
    pub fn new(options: SandboxOptions) -> Self {
        Self { options, emulation: OnceLock::new(), helper: Mutex::new(None) }
    }

    /// Returns what can run here.
    pub fn emulation(&self) -> &Arc<Emulation> {
        self.emulation.get_or_init(|| Arc::new(Emulation::detect(&self.options.emulation)))
    }

    /// Returns the helper, starting it if there is none or it has died.
    fn helper(&self) -> Result<Arc<Helper>, ExecError> {
        let mut slot = self.helper.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(helper) = slot.as_ref().filter(|helper| helper.is_alive()) {
            return Ok(Arc::clone(helper));
        }
        let helper = Helper::start(&self.options.helper)
            .map(Arc::new)
            .map_err(|source| ExecError::Helper { action: "start", source })?;
        *slot = Some(Arc::clone(&helper));
        Ok(helper)
    }

    /// Decides how a platform's programs run, and prepares it. Returns whether the private table is needed.
    async fn prepare(&self, helper: &Helper, spec: &ExecSpec) -> Result<bool, ExecError> {
        let fail =
            |reason: String| ExecError::Emulation { platform: spec.platform.to_string(), reason };
        match self.emulation().runs(&spec.platform) {
            Support::Native | Support::HostRegistration => Ok(false),
            Support::Missing { reason } => Err(fail(reason)),
            Support::Emulated { interpreter } => {
                let outcome =
                    helper.registered.get_or_init(|| helper.register(self.emulation())).await;
                match outcome {
                    Ok(()) => Ok(true),
                    Err(reason) if self.emulation().host_runs(&spec.platform) => {
                        tracing::warn!(%reason, "emulators can't be registered privately; using the host's");
                        Ok(false)
                    }
                    Err(reason) => Err(fail(format!(
                        "{} was found, but {reason}. Register it with the host instead: install the packages \
                         qemu-user-static and binfmt-support",
                        interpreter.display()
                    ))),
                }
            }
        }
    }
}

#[async_trait]
impl Executor for SandboxExecutor {
    async fn run(&self, spec: ExecSpec, stdio: Stdio) -> Result<Exit, ExecError> {
        let helper = self.helper()?;
        let emulated = self.prepare(&helper, &spec).await?;
        let id = helper.next_id();
        let request = Request::Run { id, private_network: spec.network == Network::None, emulated };
        let (files, output) = open_streams(stdio)
            .map_err(|source| ExecError::Helper { action: "open streams", source })?;
        let mut step = Running::start(&helper, request, &files)?;
        // The step holds them now; ours would keep its output from ending.
        drop(files);
        step.send(&spec).await?;
        let (ended, end) = watch::channel(false);
        let outcome = match output {
            None => step.outcome(&helper).await,
            Some((stdout, stderr, sink)) => {
                let outcome = async {
                    let outcome = step.outcome(&helper).await;
                    let _waiting = ended.send(true);
                    outcome
                };
                let (outcome, (), ()) = tokio::join!(
                    outcome,
                    carry(stdout, Stream::Stdout, sink.clone(), end.clone()),
                    carry(stderr, Stream::Stderr, sink, end),
                );
                outcome
            }
        };
        explained(self.emulation(), outcome?, &spec)
    }
}

impl SandboxExecutor {
    /// Starts a process of its own, with namespaces and a root as [`Executor::run`] makes them, and returns once it is
    /// there: then others can [join](Self::join) it. Whoever drops it kills it, and all that joined it.
    ///
    /// # Errors
    /// When it could not be started.
    pub async fn start(&self, spec: ExecSpec, files: [OwnedFd; 3]) -> Result<Process, ExecError> {
        let helper = self.helper()?;
        let emulated = self.prepare(&helper, &spec).await?;
        let id = helper.next_id();
        let request = Request::Run { id, private_network: spec.network == Network::None, emulated };
        self.begin(helper, id, request, spec, files).await
    }

    /// Starts a process where another one is, among its processes and in its root. Of the specification only what is
    /// about the process itself counts.
    ///
    /// # Errors
    /// When it could not be started, such as when the other one has ended.
    pub async fn join(
        &self,
        other: &ProcessHandle,
        spec: ExecSpec,
        files: [OwnedFd; 3],
    ) -> Result<Process, ExecError> {
        let helper = Arc::clone(&other.helper);
        let emulated = self.prepare(&helper, &spec).await?;
        let id = helper.next_id();
        let request = Request::Join { id, step: other.id, emulated };
        self.begin(helper, id, request, spec, files).await
    }

    async fn begin(
        &self,
        helper: Arc<Helper>,
        id: StepId,
        request: Request,
        spec: ExecSpec,
        files: [OwnedFd; 3],
    ) -> Result<Process, ExecError> {
        let mut step = Running::start(&helper, request, &files)?;
        // The step holds them now; ours would keep its output from ending.
        drop(files);
        step.send(&spec).await?;
        let mut outcome = Outcome::default();
        let ready = step.advance(&helper, &mut outcome, true).await?;
        let handle = ProcessHandle { helper, id };
        if ready {
            return Ok(Process {
                step,
                outcome,
                handle,
                spec,
                emulation: self.emulation().clone(),
            });
        }
        match explained(self.emulation(), outcome, &spec) {
            Err(error) => Err(error),
            Ok(exit) => Err(ExecError::Invalid {
                reason: format!("the process ended before it began, with code {}", exit.code),
            }),
        }
    }
}

/// A process under way, started by [`SandboxExecutor::start`] or [`SandboxExecutor::join`]. Dropping it kills it.
pub struct Process {
    // Dropped first: it takes the helper to see the end of it.
    step: Running,
    outcome: Outcome,
    handle: ProcessHandle,
    spec: ExecSpec,
    emulation: Arc<Emulation>,
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Process").field("args", &self.spec.args).finish_non_exhaustive()
    }
}

/// Names a process to those who signal or join it. Cheap to clone; it may have ended by now.
#[derive(Clone, Debug)]
pub struct ProcessHandle {
    helper: Arc<Helper>,
    id: StepId,
}

impl ProcessHandle {
    /// Sends a signal; one that is sent to a process that has ended is lost.
    ///
    /// # Errors
    /// When the sandbox is gone.
    pub fn signal(&self, signal: i32) -> Result<(), ExecError> {
        self.helper.request(Request::Signal { id: self.id, signal }, &[])
    }
}

impl Process {
    /// Returns what others name it by.
    pub fn handle(&self) -> &ProcessHandle {
        &self.handle
    }

    /// Waits for its end. May be dropped and called again.
    ///
    /// # Errors
    /// When the command could not be executed after all, or the sandbox is gone.
    pub async fn wait(&mut self) -> Result<Exit, ExecError> {
        self.step.advance(&self.handle.helper, &mut self.outcome, false).await?;
        explained(&self.emulation, std::mem::take(&mut self.outcome), &self.spec)
    }
}

/// Returns how a step ended, or why it never began.
fn explained(emulation: &Emulation, outcome: Outcome, spec: &ExecSpec) -> Result<Exit, ExecError> {
    let Outcome { code, signal, stubs, failure } = outcome;
    if let Some(failure) = failure {
        return Err(explain(emulation, failure, spec));
    }
    Ok(Exit {
        code: code.unwrap_or_else(|| 128 + signal.unwrap_or(libc::SIGKILL)),
        signal,
        created_stubs: stubs,
    })
}

fn explain(emulation: &Emulation, failure: Failure, spec: &ExecSpec) -> ExecError {
    let Failure { stage, path, errno } = failure;
    let source = io::Error::from_raw_os_error(errno);
    let command = path.clone().unwrap_or_default();
    match stage {
        Stage::Setup(stage) => ExecError::Setup { stage, path, source },
        Stage::Hook(reason) => ExecError::Hook { path: command, reason },
        Stage::User(reason) => ExecError::User { user: command, reason },
        Stage::WorkingDirectory => ExecError::WorkingDirectory { path: command, source },
        Stage::NotFound => {
            let searched = if command.contains('/') { "the root file system" } else { "$PATH" };
            ExecError::CommandNotFound { command, searched: searched.into() }
        }
        Stage::Interpreter => ExecError::InterpreterMissing { command },
        Stage::Exec if errno == libc::ENOEXEC => {
            ExecError::ExecFormat { command, hint: emulation.format_hint(&spec.platform) }
        }
        Stage::Exec => ExecError::NotExecutable { command, source },
    }
}

type Output = (pipe::Receiver, pipe::Receiver, mpsc::Sender<(Stream, Bytes)>);

/// Returns the step's input, output and error, and what of it is read here.
fn open_streams(stdio: Stdio) -> io::Result<([OwnedFd; 3], Option<Output>)> {
    match stdio {
        Stdio::Files { stdin, stdout, stderr } => Ok(([stdin, stdout, stderr], None)),
        Stdio::Inherit => {
            let own = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
            let [stdin, stdout, stderr] = own.map(|fd| fd.try_clone_to_owned());
            Ok(([stdin?, stdout?, stderr?], None))
        }
        Stdio::Piped(sink) => {
            let stdin = File::open("/dev/null")?.into();
            let (read_stdout, stdout) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            let (read_stderr, stderr) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            // Non-blocking on our side only: the two ends are separate descriptions.
            let read_stdout = pipe::Receiver::from_owned_fd(read_stdout)?;
            let read_stderr = pipe::Receiver::from_owned_fd(read_stderr)?;
            Ok(([stdin, stdout, stderr], Some((read_stdout, read_stderr, sink))))
        }
    }
}

/// Carries output until its end, or, once the step has ended, until the pipe is empty: someone outside the step may
/// have been passed the other end and hold it for ever.
async fn carry(
    pipe: pipe::Receiver,
    stream: Stream,
    sink: mpsc::Sender<(Stream, Bytes)>,
    mut end: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let ended = *end.borrow_and_update();
        // In the end the kernel itself is asked: the runtime may not have heard yet that there is something to read, as
        // it hears of the step's end and of its last output in any order.
        let read = match ended {
            true => rustix::io::read(&pipe, buffer.as_mut_slice()).map_err(io::Error::from),
            false => pipe.try_read(&mut buffer),
        };
        match read {
            Ok(0) => return,
            Ok(count) => {
                // A closed channel discards; the step must not block on a full pipe because of it.
                let _kept = sink.send((stream, Bytes::copy_from_slice(&buffer[..count]))).await;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if ended {
                    return;
                }
                tokio::select! {
                    ready = pipe.readable() => if ready.is_err() { return },
                    changed = end.changed() => if changed.is_err() { return },
                }
            }
            Err(_) => return,
        }
    }
}

/// A running helper. When the last user drops it, its control socket closes, and it ends with all its steps.
#[derive(Debug)]
struct Helper {
    control: Option<OwnedFd>,
    process: Mutex<Child>,
    /// The number of the next step.
    next: AtomicU64,
    registered: OnceCell<Result<(), String>>,
}

impl Helper {
    fn start(command: &HelperCommand) -> io::Result<Self> {
        // A program that does not know it is the helper would start helpers without end.
        if super::is_helper(std::env::args_os()) {
            return Err(io::Error::other(
                "this program was started as the helper and must call helper_main before anything else",
            ));
        }
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let process = Command::new(&command.program)
            .arg0(NAME)
            .env_clear()
            .current_dir("/")
            .stdin(theirs)
            .stdout(std::process::Stdio::null())
            .spawn()?;
        Ok(Self {
            control: Some(ours),
            process: Mutex::new(process),
            next: AtomicU64::new(1),
            registered: OnceCell::new(),
        })
    }

    fn next_id(&self) -> StepId {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn is_alive(&self) -> bool {
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        matches!(process.try_wait(), Ok(None))
    }

    fn request(
        &self,
        request: Request,
        fds: &[std::os::fd::BorrowedFd<'_>],
    ) -> Result<(), ExecError> {
        let control = self.control.as_ref().ok_or(rustix::io::Errno::PIPE);
        control
            .map_err(io::Error::from)
            .and_then(|control| protocol::send_request(control.as_fd(), request, fds))
            .map_err(|source| ExecError::Helper {
                action: "send a request",
                source: self.last_words(source),
            })
    }

    /// Replaces a bare "it is gone" by the reason that the helper left behind.
    fn last_words(&self, source: io::Error) -> io::Error {
        let mut text = vec![0; 1024];
        let Some(control) = &self.control else { return source };
        match rustix::net::recv(control, text.as_mut_slice(), RecvFlags::DONTWAIT) {
            Ok((count, _)) if count > 0 => io::Error::new(
                source.kind(),
                String::from_utf8_lossy(&text[..count.min(1024)]).into_owned(),
            ),
            _ => source,
        }
    }

    /// Registers all emulators; the error says what went wrong.
    async fn register(&self, emulation: &Arc<Emulation>) -> Result<(), String> {
        let found = Arc::clone(emulation);
        let registrations = tokio::task::spawn_blocking(move || {
            let list = found.registrations().into_iter();
            list.map(|(interpreter, line)| Registration { interpreter, line }).collect::<Vec<_>>()
        })
        .await
        .map_err(|error| error.to_string())?;
        let text = |error: ExecError| error.to_string();
        let mut step = Running::start_bare(self, Request::Register).map_err(text)?;
        step.send(&registrations).await.map_err(text)?;
        match step.report().await {
            Ok(Report::Registered) => {
                step.finished = true;
                Ok(())
            }
            Ok(Report::Failed(failure)) => Err(format!(
                "the kernel refused a private binfmt_misc: {}",
                io::Error::from_raw_os_error(failure.errno)
            )),
            Ok(_) => Err("the helper gave an unexpected answer".into()),
            Err(error) => Err(format!("the helper gave no answer: {}", self.last_words(error))),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.control = None;
        let process = self.process.get_mut().unwrap_or_else(PoisonError::into_inner);
        // It ends within milliseconds, unless a step is stuck in the kernel; then init inherits it.
        for _ in 0..200 {
            if !matches!(process.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// What became of a step.
#[derive(Default)]
struct Outcome {
    code: Option<i32>,
    signal: Option<i32>,
    stubs: Vec<MountStub>,
    failure: Option<Failure>,
}

/// A request under way. Dropped before its end, it kills the step and waits for it to be gone.
struct Running {
    socket: Option<UnixStream>,
    finished: bool,
}

impl Running {
    fn start_bare(helper: &Helper, request: Request) -> Result<Self, ExecError> {
        Self::start_with(helper, request, &[])
    }

    fn start(helper: &Helper, request: Request, files: &[OwnedFd; 3]) -> Result<Self, ExecError> {
        Self::start_with(helper, request, files)
    }

    fn start_with(helper: &Helper, request: Request, files: &[OwnedFd]) -> Result<Self, ExecError> {
        let fail = |source| ExecError::Helper { action: "open a socket", source };
        let (ours, theirs) = StdUnixStream::pair().map_err(fail)?;
        ours.set_nonblocking(true).map_err(fail)?;
        let socket = UnixStream::from_std(ours).map_err(fail)?;
        let mut fds = vec![theirs.as_fd()];
        fds.extend(files.iter().map(AsFd::as_fd));
        helper.request(request, &fds)?;
        Ok(Self { socket: Some(socket), finished: false })
    }

    fn socket(&mut self) -> io::Result<&mut UnixStream> {
        self.socket.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    async fn send<T: serde::Serialize + Sync>(&mut self, value: &T) -> Result<(), ExecError> {
        let fail = |source| ExecError::Helper { action: "send the specification", source };
        let frame = protocol::encode_frame(value).map_err(fail)?;
        match self.socket().map_err(fail)?.write_all(&frame).await {
            // It failed before it read this; the report to come says why.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                Ok(())
            }
            result => result.map_err(fail),
        }
    }

    async fn report(&mut self) -> io::Result<Report> {
        let socket = self.socket()?;
        let length = socket.read_u32_le().await? as usize;
        if length > MAX_FRAME {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        let mut bytes = vec![0; length];
        socket.read_exact(&mut bytes).await?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    async fn outcome(&mut self, helper: &Helper) -> Result<Outcome, ExecError> {
        let mut outcome = Outcome::default();
        self.advance(helper, &mut outcome, false).await?;
        Ok(outcome)
    }

    /// Notes what is reported, until the step's end, or with `until_ready` until it executes its command; returns
    /// whether it has got that far and no further.
    async fn advance(
        &mut self,
        helper: &Helper,
        outcome: &mut Outcome,
        until_ready: bool,
    ) -> Result<bool, ExecError> {
        loop {
            match self.report().await {
                Ok(Report::Stubs(stubs)) => outcome.stubs.extend(stubs),
                Ok(Report::Ready) if until_ready => return Ok(true),
                Ok(Report::Failed(failure)) => outcome.failure = Some(failure),
                Ok(Report::Exited { code, signal }) => {
                    (outcome.code, outcome.signal) = (code, signal);
                    break;
                }
                Ok(Report::Registered | Report::Ready) => {}
                // The helper could not even start it: there is no exit to come.
                Err(_) if outcome.failure.is_some() => break,
                Err(source) => {
                    let source = helper.last_words(source);
                    return Err(ExecError::Helper { action: "wait for the step", source });
                }
            }
        }
        self.finished = true;
        Ok(false)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(socket) = self.socket.take().filter(|_| !self.finished) else { return };
        // The helper sees the end of what we send and kills; it lets go of its end once the step is gone.
        let Ok(socket) = socket.into_std() else { return };
        if socket.shutdown(std::net::Shutdown::Write).is_err()
            || socket.set_nonblocking(false).is_err()
            || socket.set_read_timeout(Some(KILL_WAIT)).is_err()
        {
            return;
        }
        let mut rest = [0; 256];
        while matches!(io::Read::read(&mut &socket, &mut rest), Ok(count) if count > 0) {}
    }
}
