//! Folders of a client, read over its session.
//!
//! The client walks its folder and lists what is in it; the daemon asks for the content of those files that it does not have
//! from an earlier build. See [`slipway_spec::wire::filesync`] for the calls.

pub(crate) mod call;
mod contents;
mod index;
mod listing;
mod receive;
mod writer;

#[cfg(test)]
mod go_sender;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use slipway_engine::solver::{LocalFiles, LocalRequest};
use slipway_engine::store::tree::{Tree, clean};
use slipway_engine::store::view::View;
use slipway_engine::store::{Error, ErrorKind, blocking};
use slipway_spec::Digest;
use slipway_spec::wire::fsutil::Packet;
use tokio::sync::mpsc;
use tonic::Request;

pub use contents::{CachedFolder, FileCache};

use super::{Session, SessionGroup, WAIT};
use listing::Limits;
use receive::{ReceiveOptions, receive};

/// The method that transfers a folder.
const METHOD: &str = "/moby.filesync.v1.FileSync/DiffCopy";
/// Packets for the client that wait to be sent.
const OUTGOING: usize = 64;
/// No Dockerfile or ignore file is larger than this, in bytes.
const MAX_READ: u64 = 32 << 20;
/// Progress is told this often.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// How far a transfer is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransferStatus<'a> {
    /// The step it belongs to.
    pub vertex: Option<&'a Digest>,
    /// What it is called: `transferring context:`.
    pub id: &'a str,
    /// Bytes that came so far.
    pub bytes: u64,
    /// Whether it has ended, well or not.
    pub done: bool,
}

/// Told how far transfers are, at the start, at most ten times a second, and at the end. It must not block.
pub type TransferProgress = Arc<dyn Fn(TransferStatus<'_>) + Send + Sync>;

/// The folders that clients offer over their sessions.
#[derive(Clone)]
pub struct SessionFiles {
    sessions: SessionGroup,
    cache: FileCache,
    progress: TransferProgress,
    /// The step that reads.
    vertex: Option<Digest>,
    /// The session to ask first.
    preferred: Option<String>,
}

impl fmt::Debug for SessionFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SessionFiles").field("sessions", &self.sessions).finish_non_exhaustive()
    }
}

impl SessionFiles {
    /// Reads folders from the first session that has them.
    pub fn new(sessions: SessionGroup, cache: FileCache) -> Self {
        Self { sessions, cache, progress: Arc::new(|_| ()), vertex: None, preferred: None }
    }

    /// Tells how far transfers are.
    #[must_use]
    pub fn with_progress(mut self, progress: TransferProgress) -> Self {
        self.progress = progress;
        self
    }

    async fn transfer(&self, session: &Session, request: &LocalRequest) -> Result<Tree, Error> {
        if !session.supports(METHOD) {
            return Err(Error::new(ErrorKind::NotFound, "no local sources enabled"));
        }
        let shared_key = format!("{}::{}", request.name, session.shared_key());
        let (outgoing, queue) = mpsc::channel::<Packet>(OUTGOING);
        let mut call = Request::new(call::stream(queue));
        let cancel = call::CancelOnDrop::new(&mut call);
        let metadata = call.metadata_mut();
        call::add_values(metadata, "dir-name", [&request.name])?;
        call::add_values(metadata, "include-patterns", &request.include)?;
        call::add_values(metadata, "exclude-patterns", &request.exclude)?;
        call::add_values(metadata, "followpaths", request.follow_paths.iter().flatten())?;
        let incoming = call::call(session.channel(), METHOD, call)
            .await
            .map_err(|status| receive::broken(&request.name, &status))?;
        let cache = self.cache.clone();
        let transfer = blocking::run(move || Ok(cache.contents(&shared_key)?.begin())).await?;
        let mut announced = Announced::new(&self.progress, self.vertex.as_ref(), &request.name);
        let options = ReceiveOptions {
            name: &request.name,
            scope: scope(request),
            fresh: request.fresh,
            limits: Limits::default(),
            progress: &mut |bytes| announced.tell(bytes),
        };
        let tree = receive(incoming, outgoing, transfer, options).await?;
        cancel.disarm();
        Ok(tree)
    }
}

#[async_trait]
impl LocalFiles for SessionFiles {
    async fn tree(&self, request: &LocalRequest) -> Result<Tree, Error> {
        // A header cannot say "nothing": without values it is absent, and the client would send everything.
        if request.follow_paths.as_ref().is_some_and(Vec::is_empty) {
            return Ok(Tree::default());
        }
        let mut failure = Error::new(ErrorKind::NotFound, "no active sessions");
        let others = self.sessions.ids().iter().filter(|id| Some(*id) != self.preferred.as_ref());
        for id in self.preferred.iter().chain(others) {
            let session = match self.sessions.manager.get(id, WAIT).await {
                Ok(session) => session,
                Err(error) => {
                    let text = format!("cannot read {:?} of the client", request.name);
                    failure = Error::new(ErrorKind::NotFound, text).because(error);
                    continue;
                }
            };
            match self.transfer(&session, request).await {
                // Another session may have the folder, or still be there.
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Io) => {
                    failure = error;
                }
                other => return other,
            }
        }
        Err(failure)
    }

    async fn read(&self, name: &str, path: &str) -> Result<Option<Bytes>, Error> {
        let path = clean(path.as_bytes());
        let text = String::from_utf8_lossy(&path).into_owned();
        let request = LocalRequest {
            name: name.to_owned(),
            follow_paths: Some(vec![text]),
            ..LocalRequest::default()
        };
        let tree = self.tree(&request).await?;
        let name = name.to_owned();
        blocking::run(move || {
            let view = View::of_tree(Arc::new(tree));
            if let Some(bytes) = view.read(&path, MAX_READ)? {
                return Ok(Some(bytes.into()));
            }
            match view.resolve(&path, true)?.entry {
                None => Ok(None),
                Some(_) => Err(Error::new(
                    ErrorKind::Invalid,
                    format!("{} in {name:?} is not a file", path.escape_ascii()),
                )),
            }
        })
        .await
    }

    fn for_step(&self, vertex: &Digest, session: Option<&str>) -> Option<Arc<dyn LocalFiles>> {
        let preferred = session.map(str::to_owned);
        Some(Arc::new(Self { vertex: Some(vertex.clone()), preferred, ..self.clone() }))
    }
}

/// Tells what a request selects from what others do, under one shared key.
fn scope(request: &LocalRequest) -> u64 {
    let mut hash = Sha256::new();
    for list in [
        request.follow_paths.as_deref(),
        Some(request.include.as_slice()),
        Some(request.exclude.as_slice()),
    ] {
        hash.update([u8::from(list.is_some())]);
        for text in list.unwrap_or_default() {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
    }
    hash.finalize().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Tells the start of a transfer, and its end however it ends.
struct Announced<'a> {
    progress: &'a TransferProgress,
    vertex: Option<&'a Digest>,
    id: String,
    bytes: u64,
    told: Instant,
}

impl<'a> Announced<'a> {
    fn new(progress: &'a TransferProgress, vertex: Option<&'a Digest>, name: &str) -> Self {
        let id = format!("transferring {name}:");
        progress(TransferStatus { vertex, id: &id, bytes: 0, done: false });
        Self { progress, vertex, id, bytes: 0, told: Instant::now() }
    }

    fn report(&self, done: bool) {
        let (vertex, id, bytes) = (self.vertex, &self.id, self.bytes);
        (self.progress)(TransferStatus { vertex, id, bytes, done });
    }

    fn tell(&mut self, bytes: u64) {
        self.bytes = bytes;
        if self.told.elapsed() >= TELL_EVERY {
            self.told = Instant::now();
            self.report(false);
        }
    }
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        self.report(true);
    }
}
