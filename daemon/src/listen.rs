//! Where clients reach the daemon: sockets in the file system, of the network with and without TLS, and those that
//! systemd opened.
//!
//! [`Listeners::bind`] takes all addresses or none; [`Listeners::incoming`] is the stream of connections that
//! [`Daemon::serve`](crate::Daemon::serve) wants.

mod address;
mod connection;
mod error;
mod systemd;
mod tcp;
#[cfg(test)]
mod tests;
mod tls;
mod unix;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::AddressFamily;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use self::systemd::Passed;
use self::unix::SocketFile;

pub use self::address::Address;
pub use self::connection::Connection;
pub use self::error::{ListenError, ListenErrorKind};
pub use self::tls::TlsFiles;

/// How long a client may take to agree on TLS.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// Clients that may be agreeing on TLS at the same time.
const HANDSHAKES: usize = 256;

/// How long to wait when the system has no descriptors left for a connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// How to listen.
#[derive(Clone, Debug, Default)]
pub struct ListenOptions {
    /// TLS on sockets of the network.
    pub tls: Option<TlsFiles>,
    /// Who owns sockets in the file system; `None` is the process's user.
    pub owner: Option<u32>,
    /// Whose group may connect to them too; `None` is the process's group.
    pub group: Option<u32>,
}

/// Sockets that are listened at. Dropping them removes those in the file system.
#[derive(Debug)]
pub struct Listeners {
    listeners: Vec<Listener>,
    files: Vec<SocketFile>,
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
    Tls(TcpListener, TlsAcceptor),
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.local())
    }
}

impl Listener {
    /// Returns the address as the system knows it, which has the port when any was asked for.
    fn local(&self) -> String {
        match self {
            Self::Unix(listener) => {
                let address = listener.local_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname());
                format!("unix://{}", path.unwrap_or(std::path::Path::new("")).display())
            }
            Self::Tcp(listener) | Self::Tls(listener, _) => listener
                .local_addr()
                .map_or_else(|_| "tcp://".into(), |address| format!("tcp://{address}")),
        }
    }
}

impl Listeners {
    /// Listens at each address.
    ///
    /// # Errors
    /// When there is none, or one cannot be had; then nothing is listened at.
    pub async fn bind(addresses: &[Address], options: &ListenOptions) -> Result<Self, ListenError> {
        if addresses.is_empty() {
            let message = "is where to listen: name an address";
            return Err(ListenError::new(ListenErrorKind::Address, "", message));
        }
        let tls = match &options.tls {
            Some(files) => Some(TlsAcceptor::from(Arc::new(files.load()?))),
            None => None,
        };
        let passed = Passed::of_process();
        let mut taken: BTreeSet<RawFd> = BTreeSet::new();
        let mut all = Self { listeners: vec![], files: vec![] };
        for address in addresses {
            match address {
                Address::Unix(path) => {
                    let (listener, file) = unix::bind(path, options.owner, options.group).await?;
                    all.listeners.push(Listener::Unix(listener));
                    all.files.push(file);
                }
                Address::Tcp { host, port } => {
                    let listener = tcp::bind(host, *port).await.map_err(|error| {
                        ListenError::system(address, "cannot be listened at", error)
                    })?;
                    all.listeners.push(network(listener, tls.as_ref()));
                }
                Address::Systemd(which) => {
                    for fd in passed.choose(which)? {
                        if taken.insert(fd) {
                            let fd = systemd::take(fd, address)?;
                            all.listeners.push(adopt(fd, address, tls.as_ref())?);
                        }
                    }
                }
            }
        }
        Ok(all)
    }

    /// Returns the addresses as the system knows them.
    pub fn addresses(&self) -> Vec<String> {
        self.listeners.iter().map(Listener::local).collect()
    }

    /// Begins to accept connections. Those that do not come about are logged; one bad client is no reason to end.
    pub fn incoming(self) -> Incoming {
        let (sender, receiver) = mpsc::channel(16);
        let mut tasks = JoinSet::new();
        for listener in self.listeners {
            tasks.spawn(accept_all(listener, sender.clone()));
        }
        Incoming { receiver, tasks, _files: self.files }
    }
}

/// Says what a socket of the network is protected by.
fn network(listener: TcpListener, tls: Option<&TlsAcceptor>) -> Listener {
    match tls {
        Some(tls) => Listener::Tls(listener, tls.clone()),
        None => {
            let listener = Listener::Tcp(listener);
            tracing::warn!(
                address = listener.local(),
                "there is no TLS here: whoever can connect can run anything as this user; give certificates with --tlscert, --tlskey and --tlscacert"
            );
            listener
        }
    }
}

/// Takes a socket of systemd's over.
fn adopt(
    fd: OwnedFd,
    address: &Address,
    tls: Option<&TlsAcceptor>,
) -> Result<Listener, ListenError> {
    let failed = |error: rustix::io::Errno| {
        ListenError::system(address, "was passed on something that is no socket", error)
    };
    if !rustix::net::sockopt::socket_acceptconn(&fd).map_err(failed)? {
        let message = "does not listen; the socket unit must not say Accept=yes";
        return Err(ListenError::new(ListenErrorKind::Address, address, message));
    }
    let unusable = |error: io::Error| ListenError::system(address, "cannot be waited for", error);
    rustix::io::ioctl_fionbio(&fd, true).map_err(|error| unusable(error.into()))?;
    let family = rustix::net::getsockname(&fd).map_err(failed)?.address_family();
    if family == AddressFamily::UNIX {
        UnixListener::from_std(fd.into()).map(Listener::Unix).map_err(unusable)
    } else if family == AddressFamily::INET || family == AddressFamily::INET6 {
        let listener = TcpListener::from_std(fd.into()).map_err(unusable)?;
        Ok(network(listener, tls))
    } else {
        let message = "is a socket of a kind that is not known here";
        Err(ListenError::new(ListenErrorKind::Address, address, message))
    }
}

/// Connections as they come. Dropping it ends the listening.
#[derive(Debug)]
pub struct Incoming {
    receiver: mpsc::Receiver<Connection>,
    /// Held for their end.
    #[expect(dead_code, reason = "ends the accepting when dropped")]
    tasks: JoinSet<()>,
    _files: Vec<SocketFile>,
}

impl futures::Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(context).map(|connection| connection.map(Ok))
    }
}

/// Accepts connections until nobody wants them.
async fn accept_all(listener: Listener, sender: mpsc::Sender<Connection>) {
    let places = Arc::new(Semaphore::new(HANDSHAKES));
    let mut handshakes = JoinSet::new();
    loop {
        let accepted = match &listener {
            Listener::Unix(listener) => {
                listener.accept().await.map(|(stream, _)| Connection::from(stream))
            }
            Listener::Tcp(listener) => accept_tcp(listener).await.map(Connection::from),
            Listener::Tls(listener, acceptor) => match accept_tcp(listener).await {
                Ok(stream) => {
                    // Never closed, so there always is a permit in the end.
                    let place = Arc::clone(&places).acquire_owned().await;
                    let (acceptor, sender) = (acceptor.clone(), sender.clone());
                    // A client that says nothing must not keep others waiting.
                    handshakes.spawn(async move {
                        let agreed = handshake(stream, &acceptor).await;
                        drop(place);
                        if let Some(connection) = agreed {
                            // Nobody wants it when the listening has ended.
                            let _unwanted = sender.send(connection).await;
                        }
                    });
                    while handshakes.try_join_next().is_some() {}
                    continue;
                }
                Err(error) => Err(error),
            },
        };
        match accepted {
            Ok(connection) => {
                if sender.send(connection).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(address = listener.local(), %error, "cannot accept a connection");
                tokio::time::sleep(EXHAUSTED_PAUSE).await;
            }
        }
    }
}

async fn accept_tcp(listener: &TcpListener) -> io::Result<TcpStream> {
    let (stream, _) = listener.accept().await?;
    // Small messages go back and forth.
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn handshake(stream: TcpStream, acceptor: &TlsAcceptor) -> Option<Connection> {
    let peer = connection::peer(&stream);
    let agreed = tokio::time::timeout(HANDSHAKE_TIME, acceptor.accept(stream)).await;
    match agreed.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(stream) => Some(stream.into()),
        Err(error) => {
            tracing::warn!(peer, %error, "a client was refused");
            None
        }
    }
}
