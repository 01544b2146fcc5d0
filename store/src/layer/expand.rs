//! gzip members decompressed on all cores, in order.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;

use super::compression;

/// A member with what it holds.
#[derive(Debug)]
pub(crate) struct Expanded {
    pub(crate) member: Bytes,
    pub(crate) bytes: Vec<u8>,
}

#[derive(Debug)]
struct Job {
    member: Bytes,
    size: usize,
    reply: SyncSender<io::Result<Expanded>>,
}

/// Members on their way. They come out in the order they went in.
#[derive(Debug, Default)]
pub(crate) struct Expander {
    pending: VecDeque<Receiver<io::Result<Expanded>>>,
    threads: Option<Threads>,
}

#[derive(Debug)]
struct Threads {
    jobs: Sender<Job>,
    workers: Vec<JoinHandle<()>>,
}

impl Expander {
    /// Starts on a member that holds `size` bytes.
    pub(crate) fn put(&mut self, member: Bytes, size: usize) -> io::Result<()> {
        let threads = match &mut self.threads {
            Some(threads) => threads,
            None => self.threads.insert(Threads::start()?),
        };
        let (reply, result) = mpsc::sync_channel(1);
        threads.jobs.send(Job { member, size, reply }).map_err(|_| stopped())?;
        self.pending.push_back(result);
        Ok(())
    }

    /// Whether another member should be taken out before one more is put in.
    pub(crate) fn is_full(&self) -> bool {
        self.pending.len() >= self.threads.as_ref().map_or(1, |threads| 2 * threads.workers.len())
    }

    /// Returns how many members are on their way.
    pub(crate) fn len(&self) -> usize {
        self.pending.len()
    }

    /// Returns the oldest member; `None` when there is none.
    pub(crate) fn take(&mut self) -> io::Result<Option<Expanded>> {
        let Some(result) = self.pending.pop_front() else { return Ok(None) };
        result.recv().map_err(|_| stopped())?.map(Some)
    }
}

impl Threads {
    fn start() -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut workers = vec![];
        for _ in 0..cores {
            let queue = queue.clone();
            let work = move || {
                loop {
                    let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(Job { member, size, reply }) = job else { return };
                    let expanded = compression::expand(&member, size);
                    // Nobody waits for the answer when the work was given up.
                    drop(reply.send(expanded.map(|bytes| Expanded { member, bytes })));
                }
            };
            match std::thread::Builder::new().name("gunzip".to_owned()).spawn(work) {
                Ok(worker) => workers.push(worker),
                // One is enough to make progress.
                Err(error) if workers.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        Ok(Self { jobs, workers })
    }
}

fn stopped() -> io::Error {
    io::Error::other("a gzip thread stopped early")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_come_out_in_order_and_damage_is_an_error() {
        let mut expander = Expander::default();
        let texts: Vec<Vec<u8>> = (0..20u8).map(|n| vec![n; 100_000 - usize::from(n)]).collect();
        let mut out = vec![];
        for text in &texts {
            let mut encoder = libdeflater::Compressor::new(libdeflater::CompressionLvl::fastest());
            let mut member = vec![0; encoder.gzip_compress_bound(text.len())];
            let length = encoder.gzip_compress(text, &mut member).unwrap();
            member.truncate(length);
            while expander.is_full() {
                out.push(expander.take().unwrap().unwrap().bytes);
            }
            expander.put(member.into(), text.len()).unwrap();
        }
        while let Some(expanded) = expander.take().unwrap() {
            out.push(expanded.bytes);
        }
        assert!(out == texts);
        expander.put(Bytes::from_static(b"no gzip at all"), 10).unwrap();
        assert_eq!(expander.take().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
