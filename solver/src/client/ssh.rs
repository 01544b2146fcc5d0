//! SSH agents of the client, and the sockets through which processes of this machine reach them.

use std::fmt::Debug;
use std::fs;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use slipway_store::{Error, Store};
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::UnixListener;
use tokio::task::JoinSet;

/// The id of the agent that nobody named.
pub const DEFAULT_AGENT: &str = "default";

/// A connection to an agent.
pub trait AgentStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> AgentStream for T {}

/// Agents by their ids.
#[async_trait]
pub trait SshAgents: Debug + Send + Sync {
    /// Whether there is an agent of this id.
    async fn check(&self, id: &str) -> Result<bool, Error>;

    /// Opens a connection to it.
    async fn connect(&self, id: &str) -> Result<Box<dyn AgentStream>, Error>;
}

/// A client without agents.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoAgents;

#[async_trait]
impl SshAgents for NoAgents {
    async fn check(&self, _: &str) -> Result<bool, Error> {
        Ok(false)
    }

    async fn connect(&self, id: &str) -> Result<Box<dyn AgentStream>, Error> {
        Err(Error::new(
            slipway_store::ErrorKind::NotFound,
            format!("the client forwards no SSH agent {id:?}"),
        ))
    }
}

/// Who may use a socket.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SocketOwner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mode: u32,
}

/// A socket on this machine that leads to an agent of the client. Dropping it ends all connections.
#[derive(Debug)]
pub(crate) struct AgentSocket {
    folder: PathBuf,
    open: fs::File,
    _connections: JoinSet<()>,
}

impl AgentSocket {
    /// Makes the socket; each connection to it is one to the agent.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub(crate) fn open(
        store: &Store,
        agents: Arc<dyn SshAgents>,
        id: &str,
        owner: SocketOwner,
    ) -> Result<Self, Error> {
        let folder = store.temporary("agent");
        let (listener, handle) = listen(&folder, owner).map_err(|error| {
            Error::io(
                format!("cannot make a socket for an SSH agent in {}", folder.display()),
                error,
            )
        })?;
        let id = id.to_owned();
        let mut connections = JoinSet::new();
        connections.spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((mut socket, _)) = listener.accept().await {
                while open.try_join_next().is_some() {}
                let (agents, id) = (agents.clone(), id.clone());
                open.spawn(async move {
                    let carried = async {
                        let mut agent = agents.connect(&id).await?;
                        // The end of either direction is passed on.
                        copy_bidirectional(&mut socket, &mut agent)
                            .await
                            .map_err(|error| Error::io("a connection to an SSH agent broke", error))
                    };
                    if let Err(error) = carried.await {
                        tracing::debug!(%error, agent = id, "an SSH agent was not reached");
                    }
                });
            }
        });
        Ok(Self { folder, open: handle, _connections: connections })
    }

    /// Returns where the socket is.
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.join(NAME)
    }

    /// Returns a path that fits the address of a socket, for processes of this machine's own view.
    pub(crate) fn short_path(&self) -> PathBuf {
        let (process, number) = (std::process::id(), self.open.as_raw_fd());
        PathBuf::from(format!("/proc/{process}/fd/{number}/{NAME}"))
    }
}

impl Drop for AgentSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            tracing::debug!(folder = %self.folder.display(), %error, "a socket stays behind until this process ends");
        }
    }
}

const NAME: &str = "agent";

fn listen(folder: &Path, owner: SocketOwner) -> std::io::Result<(UnixListener, fs::File)> {
    fs::DirBuilder::new().mode(0o700).create(folder)?;
    let open = fs::File::options()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(folder)?;
    // The name of a socket has room for a hundred bytes, which the path of a store may exceed.
    let short = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd())).join(NAME);
    let listener = UnixListener::bind(&short)?;
    std::os::unix::fs::chown(&short, Some(owner.uid), Some(owner.gid))?;
    fs::set_permissions(&short, fs::Permissions::from_mode(owner.mode & 0o777))?;
    Ok((listener, open))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    /// Answers everything with itself, reversed, once the other side has ended.
    #[derive(Debug)]
    pub(crate) struct Reversing;

    #[async_trait]
    impl SshAgents for Reversing {
        async fn check(&self, id: &str) -> Result<bool, Error> {
            Ok(id == "default")
        }

        async fn connect(&self, _: &str) -> Result<Box<dyn AgentStream>, Error> {
            let (ours, mut theirs) = tokio::io::duplex(1024);
            tokio::spawn(async move {
                let mut all = vec![];
                theirs.read_to_end(&mut all).await.unwrap();
                all.reverse();
                theirs.write_all(&all).await.unwrap();
            });
            Ok(Box::new(ours))
        }
    }

    #[tokio::test]
    async fn the_end_of_a_direction_is_passed_on() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("a".repeat(150))).unwrap();
        let owner = SocketOwner { uid: 0, gid: 0, mode: 0o600 };
        let socket = AgentSocket::open(&store, Arc::new(Reversing), "default", owner).unwrap();
        let mut client = tokio::net::UnixStream::connect(socket.short_path()).await.unwrap();
        client.write_all(b"abc").await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "cba");
        let path = socket.path();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }
}
