//! Sessions: a client opens a stream to the daemon, and through it the daemon calls services of the client.
//!
//! The stream carries HTTP/2 with the roles turned around: the daemon is the client of it. [`SessionManager::open`] takes
//! the stream of a `Control.Session` call and gives back the one to answer with; [`SessionManager::get`] finds a session
//! by the id that a build names. A [`SessionGroup`] is what a build knows: the sessions of all clients that wait for it. It
//! is each of the engine's traits for what a client has: secrets, agents, credentials, layouts, uploads.
//!
//! ```text
//! Control.Session ── messages ── Tunnel ── HTTP/2 ── Channel ── auth | secrets | ssh | upload | content | files
//! ```

pub mod auth;
pub mod content;
pub mod error;
pub mod file_send;
pub mod file_sync;
mod health;
pub mod secrets;
pub mod ssh;
pub mod upload;

pub use slipway_transport::{channel, tunnel};

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use slipway_spec::wire::control::BytesMessage;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::metadata::MetadataMap;

use self::channel::Channel;
pub use self::error::{SessionError, SessionErrorKind};
use self::health::HealthOptions;
use self::tunnel::{Inbound, Tunnel, messages};

/// The header with the id of a session.
pub const SESSION_ID: &str = "x-docker-expose-session-uuid";

/// The header with the key under which folders of the client are remembered between sessions.
pub const SHARED_KEY: &str = "x-docker-expose-session-sharedkey";

/// The header with one path of a call that the client answers.
pub const METHOD: &str = "x-docker-expose-session-grpc-method";

/// How long to wait for a session that a build names: builds and sessions are opened at the same time.
pub const WAIT: Duration = Duration::from_secs(5);

/// The sessions that are open. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SessionManager {
    sessions: watch::Sender<HashMap<String, Session>>,
}

impl Default for SessionManager {
    fn default() -> Self {
        Self::new()
    }
}

impl SessionManager {
    /// A manager without sessions.
    pub fn new() -> Self {
        Self { sessions: watch::Sender::new(HashMap::new()) }
    }

    /// Opens a session over the stream of a `Control.Session` call; what is returned is the answer to the call, which
    /// ends when the session does. A session of the same id is not found any more, but goes on until its own end.
    ///
    /// # Errors
    /// When the metadata name no session.
    pub async fn open<S>(
        &self,
        metadata: &MetadataMap,
        inbound: S,
    ) -> Result<impl Stream<Item = Result<BytesMessage, Status>> + Send + Unpin + use<S>, Status>
    where
        S: Stream<Item = Result<BytesMessage, Status>> + Send + 'static,
    {
        let (outbound, sent) = messages();
        let inbound = Inbound::new(inbound.map(|message| message.map(|message| message.data)));
        self.open_io(metadata, Tunnel::new(inbound, outbound)).await?;
        Ok(sent.map(|data: Bytes| Ok(BytesMessage { data })))
    }

    /// Opens a session over a connection, as [`Self::open`] does.
    ///
    /// # Errors
    /// When the metadata name no session, or the connection is broken.
    pub async fn open_io<I>(&self, metadata: &MetadataMap, io: I) -> Result<Session, Status>
    where
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let text = |name| metadata.get(name).and_then(|value| value.to_str().ok()).unwrap_or("");
        let id = text(SESSION_ID).to_owned();
        if id.is_empty() {
            return Err(Status::invalid_argument(format!("a session needs an id in {SESSION_ID}")));
        }
        let methods = metadata.get_all(METHOD).iter();
        let methods = methods.filter_map(|value| value.to_str().ok()).map(str::to_ascii_lowercase);
        let end = CancellationToken::new();
        let (channel, connection) = Channel::open(io, end.clone()).await.map_err(|error| {
            Status::unavailable(format!("the stream of session {id} broke: {error}"))
        })?;
        let session = Session(Arc::new(Inner {
            methods: methods.collect(),
            shared_key: text(SHARED_KEY).to_owned(),
            id,
            channel,
            end,
            why: OnceLock::new(),
        }));
        self.sessions.send_modify(|sessions| {
            sessions.insert(session.id().to_owned(), session.clone());
        });
        let (manager, guarded) = (self.clone(), session.clone());
        let health = HealthOptions::from_metadata(metadata);
        tokio::spawn(async move {
            let why = tokio::select! {
                () = connection => "the client has disconnected".to_owned(),
                why = health::watch(guarded.channel(), health) => why,
                () = guarded.closed() => String::new(),
            };
            guarded.close(&why);
            manager.forget(&guarded);
            tracing::debug!(session = guarded.id(), why = guarded.why(), "a session has ended");
        });
        Ok(session)
    }

    /// Finds a session, and waits for it to be opened. `prefix:id` stands for `id`.
    ///
    /// # Errors
    /// When there is no such session after that time.
    pub async fn get(&self, id: &str, wait: Duration) -> Result<Session, SessionError> {
        let id = match id.split_once(':') {
            Some((_, id)) if !id.is_empty() => id,
            _ => id,
        };
        let open = |sessions: &HashMap<String, Session>| {
            sessions.get(id).filter(|session| !session.is_closed()).cloned()
        };
        let mut sessions = self.sessions.subscribe();
        let found = tokio::time::timeout(wait, sessions.wait_for(|all| open(all).is_some())).await;
        let found = found.ok().and_then(Result::ok).and_then(|all| open(&all));
        found.ok_or_else(|| {
            SessionError::new(
                SessionErrorKind::NoSession,
                format!("no active session for {id}"),
                "the client has not connected, or has gone",
            )
        })
    }

    /// Names the sessions that a build may use, the first one first.
    pub fn group(&self, ids: impl IntoIterator<Item = String>) -> SessionGroup {
        let ids = ids.into_iter().filter(|id| !id.is_empty()).collect();
        SessionGroup { manager: self.clone(), ids }
    }

    /// Removes a session, but not one that took its place.
    fn forget(&self, session: &Session) {
        self.sessions.send_if_modified(|sessions| {
            let known = sessions.get(session.id()).is_some_and(|known| known == session);
            if known {
                sessions.remove(session.id());
            }
            known
        });
    }
}

/// A client that is connected. Cheap to clone; two are equal when they are the same connection.
#[derive(Clone)]
pub struct Session(Arc<Inner>);

struct Inner {
    id: String,
    shared_key: String,
    /// In lower case.
    methods: HashSet<String>,
    channel: Channel,
    end: CancellationToken,
    why: OnceLock<String>,
}

impl PartialEq for Session {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Session {}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Session");
        shown.field("id", &self.0.id).field("closed", &self.0.why.get());
        shown.finish_non_exhaustive()
    }
}

impl Session {
    /// Returns the id, which the client chose.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// Returns the key under which folders of the client are remembered between sessions; it may be empty.
    pub fn shared_key(&self) -> &str {
        &self.0.shared_key
    }

    /// Tells whether the client said that it answers a call: `/moby.filesync.v1.FileSync/DiffCopy`.
    pub fn supports(&self, method: &str) -> bool {
        self.0.methods.contains(&method.to_ascii_lowercase())
    }

    /// Fails unless the client said that it answers a call.
    ///
    /// # Errors
    /// When it did not.
    pub fn require(&self, method: &str) -> Result<(), SessionError> {
        if self.supports(method) {
            return Ok(());
        }
        Err(SessionError::new(
            SessionErrorKind::Unsupported,
            format!("cannot call {method}"),
            "the client does not offer this",
        ))
    }

    /// Returns what clients of services are made of. Raise their limits to
    /// [`MESSAGE_BYTES`](slipway_spec::wire::MESSAGE_BYTES) where messages may be large.
    pub fn channel(&self) -> Channel {
        self.0.channel.clone()
    }

    /// Tells whether the client has gone.
    pub fn is_closed(&self) -> bool {
        self.0.end.is_cancelled()
    }

    /// Resolves when the client has gone.
    pub async fn closed(&self) {
        self.0.end.cancelled().await;
    }

    /// Returns why the session ended, once it did.
    pub fn why(&self) -> Option<&str> {
        self.0.why.get().map(String::as_str)
    }

    /// Ends the session: calls that run fail, and the client is told. The first reason given is kept.
    pub fn close(&self, why: &str) {
        self.0.why.get_or_init(|| why.to_owned());
        self.0.end.cancel();
    }
}

/// The clients that one build, or a step shared by several builds, may ask. Cheap to clone.
#[derive(Clone, Debug)]
pub struct SessionGroup {
    manager: SessionManager,
    ids: Arc<[String]>,
}

impl SessionGroup {
    /// Returns the ids, the first one to ask first.
    pub fn ids(&self) -> &[String] {
        &self.ids
    }

    /// Returns the first session of the group that is open.
    ///
    /// # Errors
    /// When there is none.
    pub async fn first(&self) -> Result<Session, SessionError> {
        let found = self.find("cannot reach the client", async |session| Ok(Some(session))).await?;
        found.ok_or_else(|| none("cannot reach the client"))
    }

    /// Asks one session after the other until one has the thing. `None` is the answer if one of them said it does not
    /// have it; otherwise the last error is.
    ///
    /// # Errors
    /// When no session is open, or all fail.
    pub async fn find<T, F>(
        &self,
        subject: &str,
        ask: impl Fn(Session) -> F,
    ) -> Result<Option<T>, SessionError>
    where
        F: Future<Output = Result<Option<T>, SessionError>>,
    {
        let mut outcome = Err(none(subject));
        for id in self.ids.iter() {
            let asked = match self.manager.get(id, WAIT).await {
                Ok(session) => ask(session).await,
                Err(error) => Err(error),
            };
            match asked {
                Ok(Some(thing)) => return Ok(Some(thing)),
                Ok(None) => outcome = Ok(None),
                Err(error) if outcome.is_err() => outcome = Err(error),
                Err(_) => {}
            }
        }
        outcome
    }
}

fn none(subject: &str) -> SessionError {
    SessionError::new(SessionErrorKind::NoSession, subject, "no active sessions")
}

/// Says that a service has no such thing, where that is not a failure.
fn absent<T>(error: SessionError) -> Result<Option<T>, SessionError> {
    match error.kind() {
        SessionErrorKind::NotFound | SessionErrorKind::Unsupported => Ok(None),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests;
