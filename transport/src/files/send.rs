//! Announces entries and sends the content of those that are asked for.

use std::fs::File;
use std::future::Future;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use slipway_spec::wire::fsutil::Packet;
use slipway_spec::wire::fsutil::packet::PacketType;
use slipway_store::tree::Content;
use slipway_store::{Error, ErrorKind, blocking};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tonic::Status;

use super::entries::Announced;
use crate::packet::{self, FileType, reason, show};

/// How long the other side has to take notice of a failure here.
const FAREWELL: Duration = Duration::from_secs(2);

/// How a transfer goes.
#[derive(Clone, Copy, Debug)]
pub struct SendOptions {
    /// Who is at the other end, for messages: `the client`.
    pub peer: &'static str,
    /// How many files are read at the same time.
    pub readers: usize,
    /// Bytes of a file in one packet: large enough that packets cost little, far from the 4 MiB that a message may have.
    pub piece: usize,
    /// Whether the other side's end is waited for, which comes with its result. Whoever answers a call must not: the other
    /// side waits for that answer.
    pub awaits_end: bool,
}

/// Sends entries, and the content of those that the other side asks for. Returns how many bytes went out.
///
/// # Errors
/// When the other side fails, vanishes or breaks a rule of the protocol, or content cannot be read here.
pub async fn send<S>(
    connect: impl Future<Output = Result<S, Error>>,
    outgoing: mpsc::Sender<Packet>,
    entries: Vec<Announced>,
    options: SendOptions,
    progress: &mut (dyn FnMut(u64) + Send),
) -> Result<u64, Error>
where
    S: Stream<Item = Result<Packet, Status>> + Unpin,
{
    let entries: Arc<[Announced]> = entries.into();
    // Each entry is asked for once, so that there are no more requests than entries. They must not wait in the connection:
    // one with many small messages that nobody reads is taken for an attack.
    let (requests, queue) = mpsc::unbounded_channel();
    let queue = Arc::new(Mutex::new(queue));
    let mut readers = JoinSet::new();
    for _ in 0..options.readers.max(1) {
        let (entries, queue, outgoing) = (entries.clone(), queue.clone(), outgoing.clone());
        let piece = options.piece.max(1);
        readers.spawn(blocking::run(move || answer(&entries, &queue, &outgoing, piece)));
    }
    let listed = Arc::new(AtomicBool::new(false));
    let mut lister = JoinSet::new();
    lister.spawn(announce(entries.clone(), outgoing.clone(), listed.clone()));
    let mut incoming = connect.await?;
    let peer = options.peer;
    let mut sender = Sender {
        peer,
        entries: &entries,
        asked: vec![false; entries.len()],
        listed,
        sent: 0,
        progress,
    };
    match sender.run(&mut incoming, &outgoing, requests, readers).await {
        Ok(()) => {
            drop(outgoing);
            let sent = sender.sent;
            if options.awaits_end {
                end(peer, &mut incoming).await?;
            }
            Ok(sent)
        }
        Err(Failure::Stream(error)) => Err(error),
        Err(Failure::Refused(error)) => {
            let farewell = async {
                if outgoing.send(packet::failure(&error.to_string())).await.is_ok() {
                    drop(outgoing);
                    while let Some(Ok(_)) = incoming.next().await {}
                }
            };
            // The other side may not listen; the error is the same then.
            tokio::time::timeout(FAREWELL, farewell).await.ok();
            Err(error)
        }
    }
}

/// Why sending stopped.
enum Failure {
    /// The other side is told.
    Refused(Error),
    /// There is nobody to tell.
    Stream(Error),
}

struct Sender<'a> {
    peer: &'static str,
    entries: &'a [Announced],
    asked: Vec<bool>,
    // Whether the end of the list is on its way.
    listed: Arc<AtomicBool>,
    sent: u64,
    progress: &'a mut (dyn FnMut(u64) + Send),
}

impl Sender<'_> {
    async fn run(
        &mut self,
        incoming: &mut (impl Stream<Item = Result<Packet, Status>> + Unpin),
        outgoing: &mpsc::Sender<Packet>,
        requests: mpsc::UnboundedSender<u32>,
        mut readers: JoinSet<Result<(), Error>>,
    ) -> Result<(), Failure> {
        let peer = self.peer;
        let invalid = |text: String| Failure::Refused(Error::new(ErrorKind::Invalid, text));
        loop {
            let packet = tokio::select! {
                biased;
                packet = incoming.next() => packet,
                Some(read) = readers.join_next() => {
                    return Err(reading_failed(peer, read, incoming).await);
                }
            };
            let packet = match packet {
                Some(Ok(packet)) => packet,
                Some(Err(status)) => return Err(Failure::Stream(broken(peer, &status))),
                None => return Err(Failure::Stream(cut_off(peer))),
            };
            match PacketType::try_from(packet.r#type) {
                Ok(PacketType::PacketReq) => {
                    let id = self.check(packet.id).map_err(Failure::Refused)?;
                    self.sent += self.size(id);
                    (self.progress)(self.sent);
                    if requests.send(id).is_err() {
                        let read = readers.join_next().await.unwrap_or(Ok(Ok(())));
                        return Err(reading_failed(peer, read, incoming).await);
                    }
                }
                Ok(PacketType::PacketErr) => {
                    return Err(Failure::Stream(from_receiver(&packet.data)));
                }
                Ok(PacketType::PacketFin) if self.listed.load(Ordering::Acquire) => break,
                Ok(PacketType::PacketFin) => {
                    return Err(invalid(format!(
                        "{peer} said that it was done before it had seen everything"
                    )));
                }
                Ok(other) => {
                    return Err(invalid(format!(
                        "{peer} sent {}, but it is the one to receive",
                        other.as_str_name()
                    )));
                }
                Err(_) => {
                    return Err(invalid(format!(
                        "{peer} sent a packet of unknown type {}",
                        packet.r#type
                    )));
                }
            }
        }
        // No more can be asked for; what was asked for before is sent before the end is confirmed.
        drop(requests);
        while let Some(read) = readers.join_next().await {
            match read {
                Ok(Ok(())) => {}
                other => return Err(reading_failed(peer, other, incoming).await),
            }
        }
        // The other side may have hung up already, with the result that comes below.
        outgoing.send(packet::finish()).await.ok();
        Ok(())
    }

    fn size(&self, id: u32) -> u64 {
        self.entries.get(id as usize).map_or(0, |entry| entry.stat.size.unsigned_abs())
    }

    fn check(&mut self, id: u32) -> Result<u32, Error> {
        let peer = self.peer;
        let invalid = |text: String| Error::new(ErrorKind::Invalid, text);
        let Some(entry) = self.entries.get(id as usize) else {
            return Err(invalid(format!("{peer} asked for entry {id}, which was not listed")));
        };
        let path = show(&entry.stat.path);
        if FileType::of(entry.stat.mode) != Some(FileType::Regular) {
            return Err(invalid(format!(
                "{peer} asked for the content of {path}, which is no file"
            )));
        }
        if std::mem::replace(&mut self.asked[id as usize], true) {
            return Err(invalid(format!("{peer} asked twice for {path}")));
        }
        Ok(id)
    }
}

/// Waits for the end of the other side, which comes with its result.
async fn end(
    peer: &str,
    incoming: &mut (impl Stream<Item = Result<Packet, Status>> + Unpin),
) -> Result<(), Error> {
    match incoming.next().await {
        None => Ok(()),
        Some(Err(status)) => Err(broken(peer, &status)),
        Some(Ok(_)) => Err(Error::new(
            ErrorKind::Invalid,
            format!("{peer} sent more after it had said that it was done"),
        )),
    }
}

/// Says what there is.
async fn announce(
    entries: Arc<[Announced]>,
    outgoing: mpsc::Sender<Packet>,
    listed: Arc<AtomicBool>,
) {
    for entry in entries.iter() {
        // When nobody takes packets any more, the receiving side of the stream tells why.
        if outgoing.send(packet::stat(Some(entry.stat.clone()))).await.is_err() {
            return;
        }
    }
    listed.store(true, Ordering::Release);
    outgoing.send(packet::stat(None)).await.ok();
}

/// Reads what is asked for, one file after the other.
fn answer(
    entries: &[Announced],
    requests: &Mutex<mpsc::UnboundedReceiver<u32>>,
    outgoing: &mpsc::Sender<Packet>,
    piece: usize,
) -> Result<(), Error> {
    loop {
        let next = requests.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let Some(id) = next else { break };
        let entry = entries.get(id as usize);
        let mut give = |data: Bytes| outgoing.blocking_send(packet::data(id, data)).is_ok();
        let more = match entry.and_then(|entry| entry.content.as_ref()) {
            Some(Content::Host { path, .. }) => give_file(path, piece, &mut give)?,
            Some(Content::Part { file, offset, .. }) => {
                let size = entry.map_or(0, |entry| entry.stat.size.unsigned_abs());
                give_all(&mut file.reader(*offset, size)?, size, piece, &mut give)
                    .map_err(|error| cannot_read(file.path(), error))?
            }
            Some(Content::Inline(bytes)) => {
                bytes.chunks(piece).all(|piece| give(Bytes::copy_from_slice(piece)))
            }
            None => true,
        };
        if !more || !give(Bytes::new()) {
            break;
        }
    }
    Ok(())
}

fn give_file(
    path: &Path,
    piece: usize,
    give: &mut dyn FnMut(Bytes) -> bool,
) -> Result<bool, Error> {
    use rustix::fs::{Mode, OFlags};
    let failed = |error| cannot_read(path, error);
    // A file replaced by a link or a pipe must neither lead elsewhere nor block.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = File::from(
        rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed(error.into()))?,
    );
    let size = file.metadata().map_err(failed)?.len();
    give_all(&mut file, size, piece, give).map_err(failed)
}

fn cannot_read(path: &Path, error: std::io::Error) -> Error {
    Error::io(format!("cannot read {}", path.display()), error)
}

/// Gives all of a file that has about `size` bytes.
fn give_all(
    file: &mut dyn Read,
    size: u64,
    piece: usize,
    give: &mut dyn FnMut(Bytes) -> bool,
) -> std::io::Result<bool> {
    loop {
        let room = usize::try_from(size).unwrap_or(piece).clamp(1, piece);
        let mut bytes = Vec::with_capacity(room);
        let read = (&mut *file).take(room as u64).read_to_end(&mut bytes)?;
        if read == 0 {
            return Ok(true);
        }
        if !give(bytes.into()) {
            return Ok(false);
        }
    }
}

/// Finds out why reading ended before it was asked to.
async fn reading_failed(
    peer: &str,
    ended: Result<Result<(), Error>, tokio::task::JoinError>,
    incoming: &mut (impl Stream<Item = Result<Packet, Status>> + Unpin),
) -> Failure {
    match ended {
        Ok(Err(error)) => return Failure::Refused(error),
        Ok(Ok(())) => {}
        Err(stopped) => {
            let error = Error::new(ErrorKind::Io, "the program is ending").because(stopped);
            return Failure::Stream(error);
        }
    }
    // It ends by itself only when nobody takes packets any more: the call has ended, and with what result comes now.
    let result = async {
        loop {
            match incoming.next().await {
                Some(Ok(packet)) if packet.r#type == PacketType::PacketErr as i32 => {
                    return from_receiver(&packet.data);
                }
                Some(Ok(_)) => {}
                Some(Err(status)) => return broken(peer, &status),
                None => return cut_off(peer),
            }
        }
    };
    Failure::Stream(tokio::time::timeout(FAREWELL, result).await.unwrap_or_else(|_| cut_off(peer)))
}

fn from_receiver(data: &[u8]) -> Error {
    Error::new(ErrorKind::Io, format!("error from receiver: {}", reason(data)))
}

fn cut_off(peer: &str) -> Error {
    Error::new(ErrorKind::Io, format!("{peer} ended the transfer early"))
}

/// An error about a call that the other side ended.
fn broken(peer: &str, status: &Status) -> Error {
    Error::new(ErrorKind::Io, format!("{peer} cannot take the files: {}", status.message()))
}
