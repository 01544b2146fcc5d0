//! The messages of a file transfer, and file modes as the Go language numbers them.

use bytes::Bytes;
use slipway_spec::wire::fsutil::packet::PacketType;
use slipway_spec::wire::fsutil::{Packet, Stat};

const DIRECTORY: u32 = 1 << 31;
const SYMLINK: u32 = 1 << 27;
const DEVICE: u32 = 1 << 26;
const FIFO: u32 = 1 << 25;
const SOCKET: u32 = 1 << 24;
const SETUID: u32 = 1 << 23;
const SETGID: u32 = 1 << 22;
const CHARACTER: u32 = 1 << 21;
const STICKY: u32 = 1 << 20;
const IRREGULAR: u32 = 1 << 19;
const TYPES: u32 = DIRECTORY | SYMLINK | DEVICE | FIFO | SOCKET | CHARACTER | IRREGULAR;

/// No text of the other side is shown at greater length, in bytes.
const MAX_TEXT: usize = 4096;

/// What kind of entry a mode says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
}

impl FileType {
    /// Reads the type of a mode; `None` for a socket and what has several types.
    pub fn of(mode: u32) -> Option<Self> {
        Some(match mode & TYPES {
            0 => Self::Regular,
            DIRECTORY => Self::Directory,
            SYMLINK => Self::Symlink,
            DEVICE => Self::BlockDevice,
            FIFO => Self::Fifo,
            bits if bits == DEVICE | CHARACTER => Self::CharDevice,
            _ => return None,
        })
    }

    /// Makes a mode of this type and permission, set-id and sticky bits.
    pub fn mode(self, permissions: u32) -> u32 {
        let kind = match self {
            Self::Regular => 0,
            Self::Directory => DIRECTORY,
            Self::Symlink => SYMLINK,
            Self::CharDevice => DEVICE | CHARACTER,
            Self::BlockDevice => DEVICE,
            Self::Fifo => FIFO,
        };
        let special: u32 = [(0o4000, SETUID), (0o2000, SETGID), (0o1000, STICKY)]
            .into_iter()
            .filter(|(bit, _)| permissions & bit != 0)
            .map(|(_, bit)| bit)
            .sum();
        kind | special | (permissions & 0o777)
    }
}

/// Returns the permission, set-id and sticky bits of a mode as the kernel numbers them.
pub fn permissions(mode: u32) -> u32 {
    let special: u32 = [(SETUID, 0o4000), (SETGID, 0o2000), (STICKY, 0o1000)]
        .into_iter()
        .filter(|(bit, _)| mode & bit != 0)
        .map(|(_, bit)| bit)
        .sum();
    special | (mode & 0o777)
}

/// Announces an entry; `None` ends the list.
pub fn stat(stat: Option<Stat>) -> Packet {
    Packet { r#type: PacketType::PacketStat.into(), stat, ..Packet::default() }
}

/// Asks for the content of an entry.
pub fn request(id: u32) -> Packet {
    Packet { r#type: PacketType::PacketReq.into(), id, ..Packet::default() }
}

/// Carries a piece of an entry's content; an empty one ends it.
pub fn data(id: u32, data: Bytes) -> Packet {
    Packet { r#type: PacketType::PacketData.into(), id, data, ..Packet::default() }
}

/// Says that this side has all it wants.
pub fn finish() -> Packet {
    Packet { r#type: PacketType::PacketFin.into(), ..Packet::default() }
}

/// Tells the other side why this one gives up.
pub fn failure(text: &str) -> Packet {
    let data = Bytes::copy_from_slice(text.as_bytes());
    Packet { r#type: PacketType::PacketErr.into(), data, ..Packet::default() }
}

/// Reads the reason in a packet by which the other side gives up.
pub fn reason(data: &[u8]) -> String {
    String::from_utf8_lossy(&data[..data.len().min(MAX_TEXT)]).into_owned()
}

/// Shows a path in a message, whatever bytes are in it.
pub fn show(path: &[u8]) -> String {
    format!("\"{}\"", path[..path.len().min(MAX_TEXT)].escape_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_keep_their_meaning() {
        for (kind, permissions_here, go) in [
            (FileType::Regular, 0o644, 0o644),
            (FileType::Regular, 0o4755, (1 << 23) | 0o755),
            (FileType::Directory, 0o1777, (1 << 31) | (1 << 20) | 0o777),
            (FileType::Directory, 0o2755, (1 << 31) | (1 << 22) | 0o755),
            (FileType::Symlink, 0o777, (1 << 27) | 0o777),
            (FileType::CharDevice, 0o600, (1 << 26) | (1 << 21) | 0o600),
            (FileType::BlockDevice, 0o600, (1 << 26) | 0o600),
            (FileType::Fifo, 0o600, (1 << 25) | 0o600),
        ] {
            assert_eq!(kind.mode(permissions_here), go, "{kind:?}");
            assert_eq!(FileType::of(go), Some(kind));
            assert_eq!(permissions(go), permissions_here);
        }
    }

    #[test]
    fn what_is_of_no_one_kind_is_of_none() {
        for mode in [SOCKET, IRREGULAR, DIRECTORY | SYMLINK, CHARACTER, SYMLINK | DEVICE] {
            assert_eq!(FileType::of(mode), None, "{mode:x}");
        }
    }
}
