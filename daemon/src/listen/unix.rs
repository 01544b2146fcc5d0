//! Sockets in the file system.

use std::fs::{DirBuilder, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Gid, Mode, Uid};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::net::{UnixListener, UnixStream};

use super::address::Address;
use super::error::{ListenError, ListenErrorKind};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;

/// How long a daemon that is there may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(1);

/// The file of a socket; removed when dropped, if it still is ours.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (self.device, self.inode));
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

/// Makes a socket that its owner and group may connect to.
pub(super) async fn bind(
    path: &Path,
    owner: Option<u32>,
    group: Option<u32>,
) -> Result<(UnixListener, SocketFile), ListenError> {
    let address = Address::Unix(path.to_path_buf());
    let failed = |action: &'static str| {
        let address = address.clone();
        move |error: rustix::io::Errno| ListenError::system(address, action, error)
    };
    let owner = owner.map(Uid::from_raw);
    let group = group.map(Gid::from_raw);
    let name = SocketAddrUnix::new(path).map_err(|_| {
        let message = "is longer than the system allows for sockets (107 bytes)";
        ListenError::new(ListenErrorKind::Address, &address, message)
    })?;
    make_folder(path, owner, group)
        .map_err(|error| ListenError::system(&address, "cannot make its folder", error))?;
    make_room(path, &address).await?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(failed("cannot make a socket"))?;
    // The file takes the socket's mode, so that nobody slips in before it has its owner.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)
        .map_err(failed("cannot restrict the socket"))?;
    rustix::net::bind(&socket, &name).map_err(failed("cannot be bound"))?;
    let found = std::fs::symlink_metadata(path)
        .map_err(|error| ListenError::system(&address, "cannot be found again", error))?;
    let file = SocketFile { path: path.to_path_buf(), device: found.dev(), inode: found.ino() };
    if owner.is_some() || group.is_some() {
        rustix::fs::chown(path, owner, group).map_err(failed("cannot be given its owner"))?;
    }
    rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP)
        .map_err(failed("cannot be given its mode"))?;
    rustix::net::listen(&socket, BACKLOG).map_err(failed("cannot listen"))?;
    let listener = UnixListener::from_std(socket.into())
        .map_err(|error| ListenError::system(&address, "cannot be waited for", error))?;
    Ok((listener, file))
}

/// Makes the folder of a socket, which its group may then enter.
fn make_folder(path: &Path, owner: Option<Uid>, group: Option<Gid>) -> io::Result<()> {
    let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) else {
        return Ok(());
    };
    if folder.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o770).create(folder)?;
    if owner.is_some() || group.is_some() {
        rustix::fs::chown(folder, owner, group)?;
    }
    Ok(())
}

/// Removes the socket of a daemon that is gone.
async fn make_room(path: &Path, address: &Address) -> Result<(), ListenError> {
    let in_use = |message: &str| ListenError::new(ListenErrorKind::InUse, address, message);
    let found: Metadata = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(ListenError::system(address, "cannot be looked at", error)),
    };
    if !found.file_type().is_socket() {
        return Err(in_use("exists and is no socket; remove it or choose another address"));
    }
    match tokio::time::timeout(ANSWER_TIME, UnixStream::connect(path)).await {
        Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => {}
        Ok(Err(error)) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Ok(Err(error)) if error.kind() == ErrorKind::PermissionDenied => {
            return Err(ListenError::system(address, "belongs to somebody else", error));
        }
        // A queue that is full and one that nobody empties belong to somebody who is there.
        Ok(_) | Err(_) => return Err(in_use("is in use: a daemon answers there")),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(ListenError::system(address, "is left over and cannot be removed", error))
        }
        _ => Ok(()),
    }
}
