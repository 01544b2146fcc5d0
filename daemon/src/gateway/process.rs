//! `ExecProcess`: one stream of messages in each direction, about any number of processes, each by a name that the frontend
//! chose.
//!
//! A process is started by `Init`; of it are told `Started`, what it writes as `File`, `Exit`, and last of all `Done`.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use slipway_engine::container::RunError;
use slipway_engine::solver::ContainerProcess;
use slipway_engine::solver::executor::{
    ExecError, Process, ProcessHandle, StreamReader, StreamWriter, Terminal, pipes, terminal,
};
use slipway_spec::llb::pb;
use slipway_spec::wire::gateway::exec_message::Input;
use slipway_spec::wire::gateway::{
    DoneMessage, ExecMessage, ExitMessage, FdMessage, InitMessage, StartedMessage,
};
use slipway_spec::wire::rpc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::{Code, Status};

use super::Gateway;
use super::container::Running;
use crate::failure::{exit_detail, from_wire, solve_status};

/// Messages that wait to be sent, or to be read by a process.
const WAITING: usize = 16;

/// What is read of a process at once, in bytes.
const CHUNK: usize = 32 << 10;

/// The exit code of what never ran, or of what nobody knows how it ended.
const UNKNOWN_EXIT: u32 = 255;

/// The code of a process that was killed: 128 and the number of the signal.
const KILLED: i32 = 128 + 9;

/// Said of a process whose container was released, in the words that clients know.
const RELEASED: &str = ": context canceled";

type Outgoing = mpsc::Sender<Result<ExecMessage, Status>>;

/// Runs what a stream of messages asks for. Dropping the answer kills all of it.
pub(super) fn talk(
    gateway: Arc<Gateway>,
    inbound: impl Stream<Item = Result<ExecMessage, Status>> + Send + Unpin + 'static,
) -> impl Stream<Item = Result<ExecMessage, Status>> + Send + 'static {
    let (sender, receiver) = mpsc::channel(WAITING);
    let mut listening = JoinSet::new();
    listening.spawn(async move {
        if let Err(status) = listen(&gateway, inbound, &sender).await {
            // Nobody to tell if this fails.
            let _sent = sender.send(Err(status)).await;
        }
    });
    stream::unfold((receiver, listening), |(mut receiver, listening)| async move {
        receiver.recv().await.map(|message| (message, (receiver, listening)))
    })
}

/// Our ends of a process.
struct Ends {
    handle: Option<ProcessHandle>,
    terminal: Option<Terminal>,
    /// What it reads; `None` when it reads nothing, or nothing more.
    stdin: Option<mpsc::Sender<Bytes>>,
    /// Resolves with its end.
    ended: watch::Receiver<bool>,
}

async fn listen(
    gateway: &Arc<Gateway>,
    mut inbound: impl Stream<Item = Result<ExecMessage, Status>> + Unpin,
    outgoing: &Outgoing,
) -> Result<(), Status> {
    let mut known: HashMap<String, Ends> = HashMap::new();
    let mut running = JoinSet::new();
    while let Some(message) = inbound.next().await {
        // What has ended is forgotten at once.
        while running.try_join_next().is_some() {}
        let ExecMessage { process_id: id, input } = message?;
        if id.is_empty() {
            return Err(Status::invalid_argument("ProcessID required"));
        }
        let unknown = || Status::not_found(format!("IO for process {id:?} not found"));
        match input {
            Some(Input::Init(init)) => {
                if known.contains_key(&id) {
                    return Err(Status::already_exists(format!("Process {id} already exists")));
                }
                let ends = start(gateway, &id, init, outgoing, &mut running).await?;
                known.insert(id, ends);
            }
            Some(Input::File(data)) => {
                known.get_mut(&id).ok_or_else(unknown)?.write(data).await?;
            }
            Some(Input::Resize(size)) => {
                let ends = known.get(&id).ok_or_else(unknown)?;
                let side = |side: u32| u16::try_from(side).unwrap_or(u16::MAX);
                if let Some(terminal) = &ends.terminal {
                    // A process that has ended needs no size.
                    let _sized = terminal.resize(side(size.rows), side(size.cols));
                }
            }
            Some(Input::Signal(signal)) => {
                let ends = known.get(&id).ok_or_else(unknown)?;
                let number = signal_number(&signal.name).ok_or_else(|| {
                    Status::invalid_argument(format!("Unknown signal {}", signal.name))
                })?;
                if let Some(handle) = ends.handle.as_ref().filter(|_| !*ends.ended.borrow()) {
                    handle.signal(number).map_err(|error| Status::unknown(error.to_string()))?;
                }
            }
            Some(Input::Started(_) | Input::Exit(_) | Input::Done(_)) | None => {
                return Err(Status::invalid_argument("a message that only the daemon sends"));
            }
        }
    }
    // The frontend sends no more, but may wait for what runs.
    known.clear();
    while running.join_next().await.is_some() {}
    Ok(())
}

impl Ends {
    async fn write(&mut self, data: FdMessage) -> Result<(), Status> {
        let FdMessage { fd, eof, data } = data;
        let Some(stdin) = self.stdin.as_ref().filter(|_| fd == 0) else {
            return Err(Status::out_of_range(format!("fd {fd} unavailable to write")));
        };
        if !data.is_empty() {
            let mut ended = self.ended.clone();
            tokio::select! {
                // What comes too late is lost, as it would be in a pipe.
                () = over(&mut ended) => {}
                _ = stdin.send(data) => {}
            }
        }
        if eof {
            self.stdin = None;
        }
        Ok(())
    }
}

async fn start(
    gateway: &Arc<Gateway>,
    id: &str,
    init: InitMessage,
    outgoing: &Outgoing,
    running: &mut JoinSet<()>,
) -> Result<Ends, Status> {
    let container_id = &init.container_id;
    let container = gateway.container(container_id).ok_or_else(|| {
        Status::not_found(format!("container {container_id:?} previously released or not created"))
    })?;
    let wanted = |fd: u32| init.fds.contains(&fd);
    let opened = if init.tty { terminal() } else { pipes([wanted(0), wanted(1), wanted(2)]) };
    let opened = opened.map_err(|error| {
        Status::resource_exhausted(format!("cannot open streams for a process: {error}"))
    })?;
    let security = pb::SecurityMode::try_from(init.security);
    let meta = init.meta.unwrap_or_default();
    let process = ContainerProcess {
        meta: pb::Meta {
            args: meta.args,
            env: meta.env,
            cwd: if meta.cwd.is_empty() { "/".into() } else { meta.cwd },
            user: meta.user,
            ..pb::Meta::default()
        },
        insecure: security == Ok(pb::SecurityMode::Insecure),
        tty: init.tty,
        secret_env: init.secretenv,
    };
    // Clients wait for ever where the call fails before they are told of a start, or where they are told of it behind what
    // another process has written for this one.
    let teller = Teller { id: id.to_owned(), outgoing: outgoing.clone() };
    teller.tell(Input::Started(StartedMessage {})).await;
    let started = match security {
        Ok(_) => container.start(gateway, &process, opened.files).await,
        Err(_) => {
            let reason = format!("invalid security mode {}", init.security);
            Err(ExecError::Invalid { reason }.into())
        }
    };
    let (ending, ended) = watch::channel(false);
    let (stdin, input) = mpsc::channel(WAITING);
    let ends = Ends {
        handle: started.as_ref().ok().map(|process| process.handle().clone()),
        terminal: opened.terminal,
        stdin: wanted(0).then_some(stdin),
        ended,
    };
    let task = Task {
        teller,
        ending,
        outputs: [(1, opened.stdout), (2, opened.stderr)]
            .into_iter()
            .filter(|(fd, _)| wanted(*fd))
            .collect(),
        input: opened.stdin.map(|writer| (input, writer)),
    };
    // Whoever releases the container waits for the process, and not for those who are told of it.
    let counted = container.processes().token();
    running.spawn(task.run(started, container, counted));
    Ok(ends)
}

/// What carries a process's streams and tells of its end.
struct Task {
    teller: Teller,
    ending: watch::Sender<bool>,
    outputs: Vec<(u32, Option<StreamReader>)>,
    input: Option<(mpsc::Receiver<Bytes>, StreamWriter)>,
}

/// Tells a frontend of one process.
#[derive(Clone)]
struct Teller {
    id: String,
    outgoing: Outgoing,
}

impl Teller {
    async fn tell(&self, input: Input) {
        let message = ExecMessage { process_id: self.id.clone(), input: Some(input) };
        // A frontend that has gone ends all of this soon.
        let _sent = self.outgoing.send(Ok(message)).await;
    }

    async fn output(&self, fd: u32, data: Bytes) {
        self.tell(Input::File(FdMessage { fd, eof: false, data })).await;
    }
}

impl Task {
    async fn run(
        self,
        started: Result<Process, RunError>,
        container: Arc<Running>,
        counted: TaskTrackerToken,
    ) {
        let Self { teller, ending, outputs, input } = self;
        let mut reading = JoinSet::new();
        for (fd, reader) in outputs {
            let (teller, ended) = (teller.clone(), ending.subscribe());
            reading.spawn(async move {
                if let Some(reader) = reader {
                    carry(reader, ended, fd, &teller).await;
                }
                teller.tell(Input::File(FdMessage { fd, eof: true, data: Bytes::new() })).await;
            });
        }
        if let Some((input, writer)) = input {
            reading.spawn(feed(input, writer, ending.subscribe()));
        }
        let exit = match started {
            Err(error) => Err(error),
            Ok(mut process) => tokio::select! {
                exit = process.wait() => exit.map(|exit| exit.code).map_err(RunError::from),
                // Killed by being dropped.
                () = container.ended() => Ok(KILLED),
            },
        };
        // Whether the process or the container is seen to end first is a matter of chance.
        let released = if container.is_ending() { RELEASED } else { "" };
        let exit = match exit {
            Ok(KILLED) => exit_message(KILLED, released),
            Ok(code) => exit_message(code, ""),
            Err(error) => failure_message(&error, released),
        };
        if let Some(error) = &exit.error {
            container.failed(from_wire(error));
        }
        // Not a part of the container any more.
        drop(container);
        drop(counted);
        ending.send_replace(true);
        while reading.join_next().await.is_some() {}
        teller.tell(Input::Exit(exit)).await;
        teller.tell(Input::Done(DoneMessage {})).await;
    }
}

/// Writes what comes until there is no more, or nobody reads it.
async fn feed(
    mut input: mpsc::Receiver<Bytes>,
    mut writer: StreamWriter,
    mut ended: watch::Receiver<bool>,
) {
    let feeding = async {
        while let Some(data) = input.recv().await {
            if writer.write_all(&data).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = feeding => {}
        () = over(&mut ended) => {}
    }
}

/// Reads until the end, or, once the process has ended, until nothing is left: others may hold its streams for ever.
async fn carry(
    mut reader: StreamReader,
    mut ended: watch::Receiver<bool>,
    fd: u32,
    teller: &Teller,
) {
    let mut buffer = vec![0; CHUNK];
    loop {
        tokio::select! {
            read = reader.read(&mut buffer) => match read {
                Ok(count @ 1..) => teller.output(fd, Bytes::copy_from_slice(&buffer[..count])).await,
                _ => return,
            },
            () = over(&mut ended) => break,
        }
    }
    while let Ok(Some(count @ 1..)) = reader.try_read(&mut buffer) {
        teller.output(fd, Bytes::copy_from_slice(&buffer[..count])).await;
    }
}

/// Resolves when a process has ended.
async fn over(ended: &mut watch::Receiver<bool>) {
    // Whoever would tell is gone: that is an end as well.
    drop(ended.wait_for(|ended| *ended).await);
}

/// Says how a process ended, and what else there is to say about that.
fn exit_message(code: i32, more: &str) -> ExitMessage {
    if code == 0 {
        return ExitMessage::default();
    }
    let number = u32::try_from(code).unwrap_or(UNKNOWN_EXIT);
    let error = rpc::Status {
        code: Code::Unknown as i32,
        message: format!("exit code: {number}{more}"),
        details: vec![exit_detail(code)],
    };
    ExitMessage { code: number, error: Some(error) }
}

/// Says why there was no process, or why nobody knows how it ended, and what else there is to say about that.
fn failure_message(error: &RunError, more: &str) -> ExitMessage {
    let mut status = match error {
        RunError::Image(error) => rpc::Status::from(&solve_status(error)),
        error => rpc::Status::from(&Status::unknown(error.to_string())),
    };
    status.message.push_str(more);
    ExitMessage { code: UNKNOWN_EXIT, error: Some(status) }
}

/// The number of a signal by its name, without the `SIG`, as clients write it.
fn signal_number(name: &str) -> Option<i32> {
    use rustix::process::Signal;
    let signal = match name {
        "ABRT" | "IOT" => Signal::ABORT,
        "ALRM" => Signal::ALARM,
        "BUS" => Signal::BUS,
        "CHLD" | "CLD" => Signal::CHILD,
        "CONT" => Signal::CONT,
        "FPE" => Signal::FPE,
        "HUP" => Signal::HUP,
        "ILL" => Signal::ILL,
        "INT" => Signal::INT,
        "IO" | "POLL" => Signal::IO,
        "KILL" => Signal::KILL,
        "PIPE" => Signal::PIPE,
        "PROF" => Signal::PROF,
        "PWR" => Signal::POWER,
        "QUIT" => Signal::QUIT,
        "SEGV" => Signal::SEGV,
        "STOP" => Signal::STOP,
        "SYS" => Signal::SYS,
        "TERM" => Signal::TERM,
        "TRAP" => Signal::TRAP,
        "TSTP" => Signal::TSTP,
        "TTIN" => Signal::TTIN,
        "TTOU" => Signal::TTOU,
        "URG" => Signal::URG,
        "USR1" => Signal::USR1,
        "USR2" => Signal::USR2,
        "VTALRM" => Signal::VTALARM,
        "WINCH" => Signal::WINCH,
        "XCPU" => Signal::XCPU,
        "XFSZ" => Signal::XFSZ,
        _ => return None,
    };
    Some(signal.as_raw())
}
