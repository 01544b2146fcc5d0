//! Tells the service manager how far the daemon is (`sd_notify(3)`).

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// What there is to tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Clients are served.
    Ready,
    /// The end has begun.
    Stopping,
}

/// The service manager, if one wants to know.
#[derive(Clone, Debug, Default)]
pub struct Notifier {
    socket: Option<OsString>,
}

impl Notifier {
    /// Reads `NOTIFY_SOCKET`.
    pub fn of_process() -> Self {
        Self::to(std::env::var_os("NOTIFY_SOCKET").as_deref())
    }

    /// Tells whoever listens at a path, or a name that begins with `@`.
    pub fn to(socket: Option<&OsStr>) -> Self {
        Self { socket: socket.filter(|socket| !socket.is_empty()).map(OsStr::to_os_string) }
    }

    /// Tells. That nobody listens harms nobody, so it is only logged.
    pub fn tell(&self, notice: Notice) {
        let Some(socket) = &self.socket else { return };
        let message = match notice {
            Notice::Ready => "READY=1",
            Notice::Stopping => "STOPPING=1",
        };
        match send(socket, message.as_bytes()) {
            Ok(()) => tracing::debug!(message, "told the service manager"),
            Err(error) => tracing::debug!(message, %error, "cannot tell the service manager"),
        }
    }
}

fn send(socket: &OsStr, message: &[u8]) -> io::Result<()> {
    let address = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    let datagram = UnixDatagram::unbound()?;
    // A manager that does not read must not stop the daemon.
    datagram.set_nonblocking(true)?;
    datagram.send_to_addr(message, &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manager_is_told_at_a_path_and_at_a_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify.sock");
        let name = format!("@slipway-test-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name[1..]).unwrap();
        for (manager, socket) in [
            (UnixDatagram::bind(&path).unwrap(), path.as_os_str()),
            (UnixDatagram::bind_addr(&abstract_address).unwrap(), OsStr::new(&name)),
        ] {
            manager.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
            let notifier = Notifier::to(Some(socket));
            for (notice, expected) in
                [(Notice::Ready, &b"READY=1"[..]), (Notice::Stopping, b"STOPPING=1")]
            {
                notifier.tell(notice);
                let mut buffer = [0; 32];
                let length = manager.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], expected);
            }
        }
    }

    #[test]
    fn nobody_need_listen() {
        Notifier::to(None).tell(Notice::Ready);
        Notifier::to(Some(OsStr::new(""))).tell(Notice::Ready);
        Notifier::to(Some(OsStr::new("/nonexistent/notify.sock"))).tell(Notice::Ready);
    }
}
