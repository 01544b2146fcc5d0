//! Digests of the files that a scan found, remembered or read.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::FileType;
use sha2::{Digest as _, Sha256};

use super::memory::Memory;
use super::{ScanOptions, Scanned, kept};
use crate::error::{Error, ErrorKind, IoContext as _, Result};
use crate::lease::now_nanos;

pub(super) fn digest_all(
    root: &Path,
    found: &mut Vec<Scanned>,
    options: &ScanOptions<'_>,
) -> Result<()> {
    let memory = options.memory.map(|folder| folder.join(kept::folder(root)));
    let remembered = memory.as_deref().map(Memory::load).unwrap_or_default();
    let mut cursor = remembered.iter();
    let mut next = cursor.next();
    let mut to_read = vec![];
    let mut unchanged = 0;
    for (at, scanned) in found.iter_mut().enumerate() {
        if scanned.file_type() != FileType::RegularFile {
            continue;
        }
        if scanned.digest.is_some() {
            unchanged += 1;
            continue;
        }
        // Both lists are in the order of a walk.
        while next.as_ref().is_some_and(|(path, ..)| walk_order(path, &scanned.path).is_lt()) {
            next = cursor.next();
        }
        match &next {
            Some((path, stamp, digest)) if *path == scanned.path && *stamp == scanned.stamp => {
                scanned.digest = Some(*digest);
                unchanged += 1;
            }
            _ => to_read.push(at),
        }
    }
    let began = now_nanos();
    let gone = read_all(found, &to_read)?;
    // What changed a moment ago is not remembered anyway.
    let news = to_read.iter().any(|at| found[*at].stamp.is_settled(began));
    if let Some(path) = memory
        && (news || unchanged != remembered.count)
    {
        Memory::save(&path, found, began);
    }
    let mut at = 0;
    found.retain(|_| {
        at += 1;
        !gone.contains(&(at - 1))
    });
    Ok(())
}

fn walk_order(a: &[u8], b: &[u8]) -> std::cmp::Ordering {
    let key = |byte: &u8| if *byte == b'/' { 0 } else { *byte };
    a.iter().map(key).cmp(b.iter().map(key))
}

/// What reading a file gives: the digest of its bytes, and its attributes.
type Read = ([u8; 32], BTreeMap<Vec<u8>, Vec<u8>>);

/// Digests the files at `to_read` on all cores. Returns which of them went away meanwhile.
fn read_all(found: &mut [Scanned], to_read: &[usize]) -> Result<HashSet<usize>> {
    let threads =
        std::thread::available_parallelism().map_or(1, usize::from).min(to_read.len().div_ceil(64));
    let cursor = AtomicUsize::new(0);
    let files: &[Scanned] = found;
    let work = || -> Result<Vec<(usize, Option<Read>)>> {
        let mut digests = vec![];
        let mut buffer = vec![0; 128 * 1024];
        while let Some(at) = to_read.get(cursor.fetch_add(1, Ordering::Relaxed)) {
            let host = &files[*at].host;
            match digest_file(host, &mut buffer).and_then(|digest| Ok((digest, capability(host)?)))
            {
                Err(error) if error.kind() == ErrorKind::NotFound => digests.push((*at, None)),
                other => digests.push((*at, Some(other?))),
            }
        }
        Ok(digests)
    };
    let parts = if threads <= 1 {
        vec![work()]
    } else {
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .map(|worker| {
                    worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect()
        })
    };
    let mut gone = HashSet::new();
    for part in parts {
        for (at, digest) in part? {
            match digest {
                Some((digest, xattrs)) => {
                    found[at].digest = Some(digest);
                    found[at].xattrs = xattrs;
                }
                None => {
                    gone.insert(at);
                }
            }
        }
    }
    Ok(gone)
}

/// Returns the sha256 of a file's bytes.
///
/// # Errors
/// When it cannot be read.
pub fn digest_file(path: &Path, buffer: &mut [u8]) -> Result<[u8; 32]> {
    let mut file = open_regular(path)?;
    let mut hash = Sha256::new();
    loop {
        match file.read(buffer) {
            Ok(0) => return Ok(hash.finalize().into()),
            Ok(read) => hash.update(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).at("read", path),
        }
    }
}

/// Opens a file for reading that must still be a regular file.
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    open_sized(path).map(|(file, _)| file)
}

/// As [`open_regular`], and tells the size of the file in bytes.
pub(crate) fn open_sized(path: &Path) -> Result<(File, u64)> {
    use rustix::fs::{Mode, OFlags};
    // A file replaced by a link or a pipe must neither lead elsewhere nor block.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).at("open", path)?);
    let metadata = file.metadata().at("read", path)?;
    if !metadata.is_file() {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("{} is no regular file any more", path.display()),
        ));
    }
    Ok((file, metadata.len()))
}

/// Reads the one extended attribute that layers carry.
pub(crate) fn capability(path: &Path) -> Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    const NAME: &str = "security.capability";
    let mut buffer = [0u8; 64];
    let mut xattrs = BTreeMap::new();
    match rustix::fs::lgetxattr(path, NAME, &mut buffer) {
        Ok(length) => {
            xattrs.insert(NAME.as_bytes().to_vec(), buffer[..length].to_vec());
        }
        Err(
            rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOENT,
        ) => {}
        Err(error) => return Err(error).at("read the capabilities of", path),
    }
    Ok(xattrs)
}
