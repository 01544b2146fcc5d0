//! gzip on all cores: blocks of input, each compressed as a gzip member of its own. A block ends where it has its full size
//! or where the caller says so; a member that the caller has from before can take the place of compressing a block.

mod deflate;
mod noise;

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use libdeflater::{CompressionLvl, Compressor};

use super::Member;

/// Input per member, at most. Fixed, because member borders show in the output; at 1 MiB the loss against one stream is about 0.1 %.
pub(super) const BLOCK: usize = 1 << 20;
/// The default level: measured on system files, within 1.2 % of the size of `gzip -6` at several times its speed; the
/// next levels save 2 % more and take half as long again.
const DEFAULT_LEVEL: i32 = 4;
/// At the default level, a block that would not lose at least this part of its size is stored as it is: whoever unpacks it
/// gains more time than the transfer of the rest takes.
const WORTH: usize = 8;
/// Smaller blocks are compressed whatever comes of it.
const MIN_STORED: usize = 64 << 10;
/// Blocks in flight per thread; two keep every thread busy while the oldest block is written.
const BLOCKS_PER_THREAD: usize = 2;

/// A block on its way: the input, and where to send the member.
struct Job {
    input: Vec<u8>,
    reply: SyncSender<Done>,
}

/// A compressed block; the input buffer comes back to be used again.
struct Done {
    input: Vec<u8>,
    member: io::Result<Vec<u8>>,
}

/// Compresses to gzip members, in order, on up to `threads` threads, started one by one as blocks queue up.
pub(super) struct Encoder<W: Write> {
    out: W,
    effort: Effort,
    threads: usize,
    block: Vec<u8>,
    spare: Vec<Vec<u8>>,
    pending: VecDeque<Receiver<Done>>,
    pool: Option<Pool>,
    /// Members begun, written or not.
    begun: usize,
    /// Members written.
    members: Vec<Member>,
    /// What is to be done with the output before a member, and how many come before that one.
    calls: VecDeque<(usize, Call<W>)>,
}

type Call<W> = Box<dyn FnOnce(&mut W) -> io::Result<()> + Send>;

struct Pool {
    jobs: Option<Sender<Job>>,
    queue: Arc<Mutex<Receiver<Job>>>,
    workers: Vec<JoinHandle<()>>,
}

impl<W: Write> Encoder<W> {
    pub(super) fn new(out: W, level: Option<i32>, threads: usize) -> io::Result<Self> {
        let chosen = level.is_some();
        let level = level.unwrap_or(DEFAULT_LEVEL).clamp(0, 12);
        let level =
            CompressionLvl::new(level).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let effort = Effort { level, store_poor: !chosen };
        Ok(Self {
            out,
            effort,
            threads: threads.max(1),
            block: Vec::new(),
            spare: Vec::new(),
            pending: VecDeque::new(),
            pool: None,
            begun: 0,
            members: Vec::new(),
            calls: VecDeque::new(),
        })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A full block is sent only when more input follows, so that a short stream is finished without threads.
        if self.block.len() == BLOCK {
            self.dispatch()?;
        }
        let count = bytes.len().min(BLOCK - self.block.len());
        self.block.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    /// Ends the block here and returns how many members there are before the next.
    pub(super) fn cut(&mut self) -> io::Result<usize> {
        if !self.block.is_empty() {
            self.dispatch()?;
        }
        Ok(self.begun)
    }

    /// Calls with the output once the members begun so far are written. The block must be empty.
    pub(super) fn output(&mut self, call: Call<W>) -> io::Result<()> {
        self.calls.push_back((self.begun, call));
        self.make_calls()
    }

    fn make_calls(&mut self) -> io::Result<()> {
        while let Some((_, call)) = self.calls.pop_front_if(|(at, _)| *at <= self.members.len()) {
            call(&mut self.out)?;
        }
        Ok(())
    }

    /// Takes a member into account that the caller writes.
    pub(super) fn pass(&mut self, member: Member) -> io::Result<()> {
        self.settle()?;
        self.begun += 1;
        self.members.push(member);
        Ok(())
    }

    /// Ends the block and writes all that is on its way.
    fn settle(&mut self) -> io::Result<()> {
        self.cut()?;
        while !self.pending.is_empty() {
            self.collect()?;
        }
        self.make_calls()
    }

    /// Writes a member that holds `size` bytes, as it would be if they were compressed now.
    pub(super) fn splice(&mut self, member: &[u8], size: usize) -> io::Result<()> {
        self.settle()?;
        self.begun += 1;
        self.put(member, size)
    }

    fn put(&mut self, member: &[u8], size: usize) -> io::Result<()> {
        self.make_calls()?;
        self.out.write_all(member)?;
        let sum = libdeflater::crc32(member);
        self.members.push(Member { length: member.len(), size, sum });
        Ok(())
    }

    pub(super) fn finish(mut self) -> io::Result<(W, Vec<Member>)> {
        if self.pool.is_some() {
            self.cut()?;
        }
        while !self.pending.is_empty() {
            self.collect()?;
        }
        if !self.block.is_empty() || self.members.is_empty() {
            let member = Deflater::new(self.effort).compress(&self.block)?;
            self.put(&member, self.block.len())?;
        }
        self.make_calls()?;
        self.out.flush()?;
        Ok((self.out, self.members))
    }

    /// Hands the block to the pool, first making room among the blocks in flight.
    fn dispatch(&mut self) -> io::Result<()> {
        while self.pending.len() >= self.threads * BLOCKS_PER_THREAD {
            self.collect()?;
        }
        let pool = self.pool.get_or_insert_with(Pool::new);
        if pool.workers.len() < self.threads && pool.workers.len() <= self.pending.len() {
            pool.start_worker(self.effort)?;
        }
        let input = std::mem::replace(&mut self.block, self.spare.pop().unwrap_or_default());
        let (reply, result) = mpsc::sync_channel(1);
        let jobs = pool.jobs.as_ref().ok_or_else(stopped)?;
        jobs.send(Job { input, reply }).map_err(|_| stopped())?;
        self.begun += 1;
        self.pending.push_back(result);
        Ok(())
    }

    /// Writes the oldest member.
    fn collect(&mut self) -> io::Result<()> {
        let Some(result) = self.pending.pop_front() else { return Ok(()) };
        let done = result.recv().map_err(|_| stopped())?;
        let mut input = done.input;
        self.put(&done.member?, input.len())?;
        input.clear();
        self.spare.push(input);
        Ok(())
    }
}

impl Pool {
    fn new() -> Self {
        let (jobs, queue) = mpsc::channel();
        Self { jobs: Some(jobs), queue: Arc::new(Mutex::new(queue)), workers: Vec::new() }
    }

    fn start_worker(&mut self, effort: Effort) -> io::Result<()> {
        let queue = Arc::clone(&self.queue);
        let work = move || {
            let mut deflater = Deflater::new(effort);
            loop {
                let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok(Job { input, reply }) = job else { return };
                let member = deflater.compress(&input);
                // Nobody waits for the answer when the encoder was dropped early.
                drop(reply.send(Done { input, member }));
            }
        };
        match std::thread::Builder::new().name("gzip".to_owned()).spawn(work) {
            Ok(worker) => self.workers.push(worker),
            // One worker is enough to make progress.
            Err(error) if self.workers.is_empty() => return Err(error),
            Err(_) => {}
        }
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        drop(self.jobs.take());
        for worker in self.workers.drain(..) {
            // A worker that panicked has already been reported as a lost block.
            drop(worker.join());
        }
    }
}

/// How hard to try.
#[derive(Clone, Copy)]
struct Effort {
    level: CompressionLvl,
    /// Whether what hardly loses size is stored.
    store_poor: bool,
}

struct Deflater {
    compressor: Compressor,
    /// Made when the first block is stored.
    storer: Option<Compressor>,
    effort: Effort,
}

impl Deflater {
    fn new(effort: Effort) -> Self {
        Self { compressor: Compressor::new(effort.level), storer: None, effort }
    }

    fn compress(&mut self, input: &[u8]) -> io::Result<Vec<u8>> {
        if !self.effort.store_poor || input.len() < MIN_STORED {
            return compress(&mut self.compressor, input);
        }
        if let Some(member) = noise::compress(input, &mut self.compressor) {
            return Ok(member);
        }
        let member = compress(&mut self.compressor, input)?;
        if member.len() <= input.len() - input.len() / WORTH {
            return Ok(member);
        }
        let storer = match &mut self.storer {
            Some(storer) => storer,
            None => {
                let level = CompressionLvl::new(0)
                    .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
                self.storer.insert(Compressor::new(level))
            }
        };
        compress(storer, input)
    }
}

fn compress(compressor: &mut Compressor, input: &[u8]) -> io::Result<Vec<u8>> {
    let mut member = vec![0; compressor.gzip_compress_bound(input.len())];
    let length = compressor
        .gzip_compress(input, &mut member)
        .map_err(|error| io::Error::other(format!("gzip compression failed: {error:?}")))?;
    member.truncate(length);
    Ok(member)
}

fn stopped() -> io::Error {
    io::Error::other("a gzip thread stopped early")
}
