//! The receiving side of a file transfer.
//!
//! The other side lists what it has; of that, what is not kept from earlier is asked for while the list still comes. Files
//! are asked for a few hundred at a time, so that a slow disk here makes the other side wait and nothing piles up.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use prost::Message as _;
use slipway_engine::store::tree::Tree;
use slipway_engine::store::{Error, ErrorKind};
use slipway_spec::wire::fsutil::packet::PacketType;
use slipway_spec::wire::fsutil::{Packet, Stat};
use tokio::sync::mpsc;
use tonic::Status;

use super::contents::{Lender, Transfer};
use super::index::{Cursor, Kept, Stamp};
use super::listing::{Limits, Listing, refused};
use super::writer::{Arrived, Gone, Writer};
use slipway_transport::packet::{self, FileType, reason, show};

/// Files asked for and not yet complete. The other side works on four and queues 128, so this never leaves it idle.
const WINDOW: usize = 256;
/// Files are asked for again when only this many have not come. Many requests then travel together; each by itself would wake
/// both sides once more for each file.
const LOW: usize = WINDOW / 2;
/// Files up to this size, in bytes, are written in one go, and together with others.
const SMALL: u64 = 256 * 1024;
/// Bytes of small files held back until they are complete, all together.
const MAX_HELD: usize = 2 << 20;
/// How long the other side has to take notice of a failure here.
const FAREWELL: Duration = Duration::from_secs(2);

/// How a transfer is received.
pub(crate) struct ReceiveOptions<'a> {
    /// What the client calls the folder.
    pub(crate) name: &'a str,
    /// Tells this selection of files from others under the same shared key.
    pub(crate) scope: u64,
    /// Whether the content of files is asked for even if they look like those that are here.
    pub(crate) fresh: bool,
    /// How much the other side may list.
    pub(crate) limits: Limits,
    /// Told the number of bytes that came, now and then.
    pub(crate) progress: &'a mut (dyn FnMut(u64) + Send),
}

/// Receives a folder. When that fails or the future is dropped, what came whole is kept for the next time.
///
/// # Errors
/// When the other side fails, vanishes or breaks a rule of the protocol, or the disk fails here.
pub(crate) async fn receive(
    mut incoming: impl Stream<Item = Result<Packet, Status>> + Unpin + Send,
    outgoing: mpsc::Sender<Packet>,
    transfer: Transfer,
    options: ReceiveOptions<'_>,
) -> Result<Tree, Error> {
    let mut receiver = Receiver {
        name: options.name,
        known: (!options.fresh).then(|| transfer.index().cursor()),
        lender: transfer.lender(),
        writer: Writer::start(transfer, options.scope),
        listing: Listing::new(options.limits),
        unchanged: vec![],
        listed: false,
        wanted: VecDeque::new(),
        asked: HashMap::new(),
        asking: true,
        held: 0,
        phase: Phase::Open,
        received: 0,
        progress: options.progress,
    };
    let failure = match receiver.run(&mut incoming, &outgoing).await {
        Ok(()) => {
            drop(outgoing);
            return receiver.finish().await;
        }
        Err(failure) => failure,
    };
    let stopped = receiver.writer.stop().await;
    let failure = match (failure, stopped) {
        (Failure::Refused(error), _) | (Failure::Writer, Err(error)) => error,
        (Failure::Writer, Ok(())) => Error::new(ErrorKind::Io, "the transfer ended early"),
        (Failure::Stream(error), _) => return Err(error),
    };
    let farewell = async {
        let text = failure.to_string();
        if outgoing.send(packet::failure(&text)).await.is_ok() {
            drop(outgoing);
            while let Some(Ok(_)) = incoming.next().await {}
        }
    };
    // The other side may not listen; the error is the same then.
    tokio::time::timeout(FAREWELL, farewell).await.ok();
    Err(failure)
}

/// Why receiving stopped.
enum Failure {
    /// The other side broke a rule and is told so.
    Refused(Error),
    /// The writer failed, and knows why.
    Writer,
    /// There is nobody to tell.
    Stream(Error),
}

impl From<Gone> for Failure {
    fn from(_: Gone) -> Self {
        Self::Writer
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

/// How far the two sides have agreed that they are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Entries and content come.
    Open,
    /// This side said that it has everything.
    Finished,
    /// The other side has confirmed that.
    Confirmed,
}

/// A file whose content is on its way.
struct Incoming {
    stamp: Stamp,
    received: u64,
    /// What came of a small file; `None` once pieces go to the writer.
    held: Option<Vec<Bytes>>,
}

struct Receiver<'a> {
    name: &'a str,
    known: Option<Cursor>,
    lender: Lender,
    writer: Writer,
    listing: Listing,
    unchanged: Vec<Kept>,
    listed: bool,
    // Files to ask for, and those asked for.
    wanted: VecDeque<(u32, Stamp)>,
    asked: HashMap<u32, Incoming>,
    /// Whether more is to be asked for.
    asking: bool,
    held: usize,
    phase: Phase,
    received: u64,
    progress: &'a mut (dyn FnMut(u64) + Send),
}

impl Receiver<'_> {
    async fn run(
        &mut self,
        incoming: &mut (impl Stream<Item = Result<Packet, Status>> + Unpin),
        outgoing: &mpsc::Sender<Packet>,
    ) -> Result<(), Failure> {
        loop {
            let done = self.listed && self.wanted.is_empty() && self.asked.is_empty();
            let finish = done && self.phase == Phase::Open;
            self.asking |= self.asked.len() <= LOW;
            self.asking &= self.asked.len() < WINDOW;
            let ask = self.asking && !self.wanted.is_empty();
            tokio::select! {
                biased;
                // When nobody takes packets any more, the stream below tells why.
                Ok(permit) = outgoing.reserve(), if finish || ask => {
                    if finish {
                        permit.send(packet::finish());
                        self.phase = Phase::Finished;
                    } else if let Some((id, stamp)) = self.wanted.pop_front() {
                        permit.send(packet::request(id));
                        let held = (stamp.size <= SMALL).then(Vec::new);
                        self.asked.insert(id, Incoming { stamp, received: 0, held });
                    }
                }
                packet = incoming.next() => match packet {
                    Some(Ok(packet)) => {
                        self.received += packet.encoded_len() as u64;
                        (self.progress)(self.received);
                        self.take(packet).await?;
                    }
                    Some(Err(status)) => return Err(Failure::Stream(broken(self.name, &status))),
                    None if self.phase == Phase::Confirmed => return Ok(()),
                    None => return Err(Failure::Stream(self.cut_off())),
                },
            }
        }
    }

    fn cut_off(&self) -> Error {
        let what = match self.asked.keys().min().and_then(|id| self.listing.path(*id)) {
            Some(path) => format!(" while {} was on its way", show(path)),
            None if !self.listed => format!(" after {} files were listed", self.listing.len()),
            None => String::new(),
        };
        Error::new(ErrorKind::Io, format!("the client ended the transfer early{what}"))
    }

    async fn take(&mut self, packet: Packet) -> Result<(), Failure> {
        let invalid = |text: String| Err(Failure::Refused(Error::new(ErrorKind::Invalid, text)));
        if self.phase == Phase::Confirmed {
            return invalid("the client sent more after it had said that it was done".into());
        }
        match PacketType::try_from(packet.r#type) {
            Ok(PacketType::PacketErr) => {
                let text = format!("error from sender: {}", reason(&packet.data));
                Err(Failure::Stream(Error::new(ErrorKind::Io, text)))
            }
            Ok(PacketType::PacketStat) if self.listed => match packet.stat {
                Some(stat) => Err(refused(&stat.path, "comes after the end of the list").into()),
                None => invalid("the client ended its list twice".into()),
            },
            Ok(PacketType::PacketStat) => {
                match packet.stat {
                    Some(stat) => self.list(&stat)?,
                    None => self.listed = true,
                }
                Ok(())
            }
            Ok(PacketType::PacketData) => self.data(packet.id, packet.data).await,
            Ok(PacketType::PacketFin) if self.phase == Phase::Finished => {
                self.phase = Phase::Confirmed;
                Ok(())
            }
            Ok(PacketType::PacketFin) => {
                invalid("the client said that it was done before it had sent everything".into())
            }
            Ok(PacketType::PacketReq) => invalid(format!(
                "the client asked for entry {}, but it is the one to send",
                packet.id
            )),
            Err(_) => {
                invalid(format!("the client sent a packet of unknown type {}", packet.r#type))
            }
        }
    }

    fn list(&mut self, stat: &Stat) -> Result<(), Error> {
        let id = self.listing.add(stat)?;
        let path = &stat.path[..];
        let link = !stat.linkname.is_empty() && stat.linkname != stat.path;
        if FileType::of(stat.mode) != Some(FileType::Regular) || link || stat.size == 0 {
            return Ok(());
        }
        let stamp = Stamp {
            size: stat.size.unsigned_abs(),
            mtime: stat.mod_time,
            mode: stat.mode,
            uid: stat.uid,
            gid: stat.gid,
        };
        match self.known.as_mut().and_then(|known| known.find(path)) {
            Some(kept) if kept.stamp == stamp => {
                let content = self.lender.lend(kept.place, kept.digest);
                self.listing.set_content(id, content, stamp.size);
                self.unchanged.push(Kept {
                    path: kept.path.into(),
                    stamp,
                    digest: kept.digest,
                    place: kept.place,
                });
            }
            _ => self.wanted.push_back((id, stamp)),
        }
        Ok(())
    }

    async fn data(&mut self, id: u32, data: Bytes) -> Result<(), Failure> {
        let Some(file) = self.asked.get_mut(&id) else {
            let what =
                self.listing.path(id).map_or_else(|| "an entry that it did not list".into(), show);
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("the client sent data for {what} ({id}), which is not being asked for"),
            )
            .into());
        };
        if data.is_empty() {
            return self.complete(id).await;
        }
        file.received += data.len() as u64;
        if file.received > file.stamp.size {
            let path = self.listing.path(id).unwrap_or_default();
            let why = format!(
                "has more than the {} bytes it was listed with; did it change while it was read?",
                file.stamp.size
            );
            return Err(refused(path, &why).into());
        }
        let Some(held) = &mut file.held else {
            return Ok(self.writer.piece(id, data).await?);
        };
        if self.held + data.len() <= MAX_HELD {
            self.held += data.len();
            held.push(data);
            return Ok(());
        }
        // Many begun at once: this one goes to disk in pieces.
        for piece in file.held.take().into_iter().flatten() {
            self.held -= piece.len();
            self.writer.piece(id, piece).await?;
        }
        Ok(self.writer.piece(id, data).await?)
    }

    async fn complete(&mut self, id: u32) -> Result<(), Failure> {
        let Some(file) = self.asked.remove(&id) else { return Ok(()) };
        let path = self.listing.path(id).unwrap_or_default();
        let keep = if file.received == file.stamp.size {
            Some((path.into(), file.stamp))
        } else {
            // The client's file became shorter or unreadable after it was listed.
            tracing::warn!(
                path = %path.escape_ascii(), listed = file.stamp.size, received = file.received,
                "a file came with less than it was listed with"
            );
            None
        };
        let arrived = Arrived { id, keep };
        match file.held {
            Some(pieces) => {
                self.held -= pieces.iter().map(Bytes::len).sum::<usize>();
                self.writer.whole(arrived, pieces).await?;
            }
            None => self.writer.end(arrived).await?,
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<Tree, Error> {
        for written in self.writer.finish(self.unchanged).await? {
            self.listing.set_content(written.id, written.content, written.size);
        }
        Ok(self.listing.into_tree())
    }
}

/// An error about a call that the client ended.
pub(crate) fn broken(name: &str, status: &Status) -> Error {
    let kind = match status.code() {
        tonic::Code::NotFound => ErrorKind::NotFound,
        _ => ErrorKind::Io,
    };
    // The code says nothing to people that the message does not.
    Error::new(kind, format!("cannot read {name:?} of the client: {}", status.message()))
}
