//! Digests remembered for one folder, so that a file which has not changed is not read again.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest as _, Sha256};

use super::{Scanned, Stamp};

/// The file of remembered digests of one folder: entries in the order of a walk, then the sha256 of all that.
#[derive(Default)]
pub(super) struct Memory {
    bytes: Vec<u8>,
    pub(super) count: usize,
}

const MAGIC: &[u8; 8] = b"slipdig1";
const FIXED: usize = 5 * 8 + 32;

impl Memory {
    pub(super) fn load(path: &Path) -> Self {
        // Without memory, or with a damaged one, every file is simply read again.
        let Ok(mut bytes) = fs::read(path) else { return Self::default() };
        if bytes.len() < MAGIC.len() + 8 + 32 || !bytes.starts_with(MAGIC) {
            return Self::default();
        }
        let sum = bytes.split_off(bytes.len() - 32);
        if Sha256::digest(&bytes)[..] != sum[..] {
            return Self::default();
        }
        let count = u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes")) as usize;
        bytes.drain(..16);
        Self { bytes, count }
    }

    pub(super) fn iter(&self) -> MemoryIter<'_> {
        MemoryIter(&self.bytes)
    }

    pub(super) fn save(path: &Path, found: &[Scanned], began: i64) {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&[0; 8]);
        let mut count = 0u64;
        for scanned in found {
            let (Some(digest), Ok(length)) = (scanned.digest, u16::try_from(scanned.path.len()))
            else {
                continue;
            };
            let stamp = scanned.stamp;
            // The few files with attributes are read every time, so that the many need not be asked for theirs.
            if !stamp.is_settled(began) || !scanned.xattrs.is_empty() {
                continue;
            }
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes.extend_from_slice(&scanned.path);
            for number in
                [stamp.device, stamp.inode, stamp.size, stamp.mtime as u64, stamp.ctime as u64]
            {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
            bytes.extend_from_slice(&digest);
            count += 1;
        }
        bytes[8..16].copy_from_slice(&count.to_le_bytes());
        let sum = Sha256::digest(&bytes);
        bytes.extend_from_slice(&sum);
        replace(path, &bytes);
    }
}

pub(super) struct MemoryIter<'a>(&'a [u8]);

impl<'a> Iterator for MemoryIter<'a> {
    type Item = (&'a [u8], Stamp, [u8; 32]);

    fn next(&mut self) -> Option<Self::Item> {
        let (length, rest) = self.0.split_first_chunk::<2>()?;
        let length = usize::from(u16::from_le_bytes(*length));
        let path = rest.get(..length)?;
        let fixed = rest.get(length..length + FIXED)?;
        self.0 = &rest[length + FIXED..];
        let number =
            |n: usize| u64::from_le_bytes(fixed[n * 8..n * 8 + 8].try_into().expect("eight bytes"));
        let stamp = Stamp {
            device: number(0),
            inode: number(1),
            size: number(2),
            mtime: number(3) as i64,
            ctime: number(4) as i64,
        };
        Some((path, stamp, fixed[40..].try_into().expect("thirty-two bytes")))
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Memory({} digests)", self.count)
    }
}

/// Writes an aid to speed: a full disk must not fail the build here.
pub(super) fn replace(path: &Path, bytes: &[u8]) {
    let mut temporary = path.as_os_str().to_owned();
    // Several folders, or several selections of one, may be scanned at once.
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    temporary.push(format!(".{}-{number}.new", std::process::id()));
    let temporary = PathBuf::from(temporary);
    if let Err(error) = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, path)) {
        tracing::debug!(path = %path.display(), %error, "digests are not remembered");
        if let Err(error) = fs::remove_file(&temporary) {
            tracing::debug!(path = %temporary.display(), %error, "temporary file stays behind");
        }
    }
}
