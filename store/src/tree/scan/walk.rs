//! Which paths a scan takes, and what the kernel says of them.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::kept::{Known, KnownDirectory, Listed};
use super::{Filter, Scanned, Stamp, Verdict};
use crate::error::{ErrorKind, IoContext as _, Result};

/// A path that is part of the scan, as its directory lists it.
pub(super) struct Seen {
    pub(super) path: Vec<u8>,
    pub(super) host: PathBuf,
    pub(super) parent: usize,
    pub(super) listed: Option<usize>,
}

/// A path that is part of the scan.
pub(super) enum Step {
    /// Its attributes have yet to be read.
    New(Seen),
    /// An earlier scan knows it, and nothing has changed.
    Known(Box<Scanned>),
}

/// A directory whose entries are being visited.
struct Level {
    host: PathBuf,
    path: Vec<u8>,
    listed: usize,
    names: std::vec::IntoIter<Name>,
}

/// What is in a directory.
enum Name {
    /// Something to be decided on, and whether it is a directory.
    Listed(OsString, bool),
    /// A file that an earlier scan took, with the same filter.
    Known(Box<Scanned>),
}

/// Visits everything below `root`, in the order of a walk. Not by recursion: contexts may be deeper than the stack.
/// Directories that are as they were `known` to be are not listed again.
pub(super) fn walk(
    root: &Path,
    filter: &mut dyn Filter,
    listed: &mut Vec<Listed>,
    known: &Known<'_>,
) -> Result<Vec<Step>> {
    let mut found = vec![];
    // Directories on the way to the current one that are taken only if something below them is.
    let mut waiting: Vec<(Vec<u8>, Step)> = vec![];
    let names = match known.directory(b"") {
        Some(directory) => recall(root, directory, 0),
        None => list(root)?,
    };
    let names = names.into_iter();
    let mut levels = vec![Level { host: root.to_path_buf(), path: vec![], listed: 0, names }];
    while let Some(level) = levels.last_mut() {
        let (name, directory) = match level.names.next() {
            Some(Name::Listed(name, directory)) => (name, directory),
            Some(Name::Known(scanned)) => {
                found.extend(waiting.drain(..).map(|(_, step)| step));
                found.push(Step::Known(scanned));
                continue;
            }
            None => {
                // Still waiting means that nothing below was taken.
                if waiting.last().is_some_and(|(last, _)| *last == level.path) {
                    waiting.pop();
                }
                levels.pop();
                continue;
            }
        };
        let path = crate::tree::join(&level.path, name.as_bytes());
        let host = level.host.join(&name);
        let verdict = filter.verdict(&path, directory);
        if verdict == Verdict::Skip || (verdict == Verdict::Look && !directory) {
            continue;
        }
        let parent = level.listed;
        let seen = |listed| Seen { path: path.clone(), host: host.clone(), parent, listed };
        let (step, names) = if !directory {
            (Step::New(seen(None)), None)
        } else if let Some(directory) = known.directory(&path) {
            let place = listed.len();
            listed.push(Listed { path: path.clone(), stamp: directory.stamp() });
            let step = match directory.scanned(seen(Some(place))) {
                Ok(scanned) => Step::Known(Box::new(scanned)),
                // Nothing below it was taken then, so nothing more was asked of it.
                Err(seen) => Step::New(seen),
            };
            (step, Some((recall(&host, directory, place), place)))
        } else {
            // Its attributes first: a change after that shows in them.
            let stamp = match fs::symlink_metadata(&host) {
                Err(error) if is_gone(&error) => continue,
                other => Stamp::of(&other.at("read", &host)?),
            };
            let names = match list(&host) {
                // Gone, or replaced by something else, since it was seen.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                other => other?,
            };
            let place = listed.len();
            listed.push(Listed { path: path.clone(), stamp });
            (Step::New(seen(Some(place))), Some((names, place)))
        };
        if verdict == Verdict::Take {
            found.extend(waiting.drain(..).map(|(_, step)| step));
            found.push(step);
        } else {
            waiting.push((path.clone(), step));
        }
        levels.extend(names.map(|(names, listed)| Level {
            host,
            path,
            listed,
            names: names.into_iter(),
        }));
    }
    Ok(found)
}

/// Returns what an earlier scan found in a directory, in byte order.
fn recall(host: &Path, directory: &KnownDirectory<'_>, place: usize) -> Vec<Name> {
    let files = directory.files(host, place).map(|scanned| Name::Known(Box::new(scanned)));
    let below = directory.below().iter().map(|name| {
        let name = OsStr::from_bytes(name);
        Name::Listed(name.to_owned(), true)
    });
    let mut names: Vec<Name> = files.chain(below).collect();
    names.sort_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
    names
}

impl Name {
    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Listed(name, _) => name.as_bytes(),
            Self::Known(scanned) => crate::tree::split(&scanned.path).1,
        }
    }
}

/// Lists a directory in byte order, and which of its entries are directories.
fn list(folder: &Path) -> Result<Vec<Name>> {
    let entries = fs::read_dir(folder).map_err(|error| match error.kind() {
        io::ErrorKind::NotADirectory => io::Error::from(io::ErrorKind::NotFound),
        _ => error,
    });
    let mut names = vec![];
    for entry in entries.at("read", folder)? {
        let entry = entry.at("read", folder)?;
        match entry.file_type() {
            Ok(kind) => names.push(Name::Listed(entry.file_name(), kind.is_dir())),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error).at("read", &entry.path()),
        }
    }
    names.sort_unstable_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
    Ok(names)
}

/// Reads the attributes of what was seen, on all cores. What went away meanwhile is as if it had never been there.
pub(super) fn examine(steps: Vec<Step>) -> Result<Vec<Scanned>> {
    let one = |step: Step| -> Result<Option<Scanned>> {
        let seen = match step {
            Step::Known(scanned) => return Ok(Some(*scanned)),
            Step::New(seen) => seen,
        };
        let metadata = match fs::symlink_metadata(&seen.host) {
            Err(error) if is_gone(&error) => return Ok(None),
            other => other.at("read", &seen.host)?,
        };
        let link = if metadata.is_symlink() {
            match fs::read_link(&seen.host) {
                Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::InvalidInput => {
                    return Ok(None);
                }
                other => Some(other.at("read", &seen.host)?.into_os_string().into_vec()),
            }
        } else {
            None
        };
        // A directory that has become something else was not listed as what it is now.
        if seen.listed.is_some() != metadata.is_dir() {
            return Ok(None);
        }
        Ok(Some(scanned(seen, &metadata, link)))
    };
    let all = |part: Vec<Step>| {
        part.into_iter().filter_map(|step| one(step).transpose()).collect::<Result<Vec<_>>>()
    };
    let new = steps.iter().filter(|step| matches!(step, Step::New(_))).count();
    // A thread costs as much as the attributes of about this many files.
    let threads =
        std::thread::available_parallelism().map_or(1, usize::from).min(new.div_ceil(1024));
    if threads <= 1 {
        return all(steps);
    }
    let mut rest = steps;
    let size = rest.len().div_ceil(threads);
    let mut parts = vec![];
    while rest.len() > size {
        parts.push(rest.split_off(rest.len() - size));
    }
    parts.push(rest);
    std::thread::scope(|scope| {
        // The last part was cut off first.
        let workers: Vec<_> =
            parts.into_iter().rev().map(|part| scope.spawn(|| all(part))).collect();
        let mut found = vec![];
        for worker in workers {
            found.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(found)
    })
}

pub(super) fn scanned(seen: Seen, metadata: &fs::Metadata, link: Option<Vec<u8>>) -> Scanned {
    let Seen { path, host, parent, listed } = seen;
    Scanned {
        path,
        host,
        parent,
        listed,
        stamp: Stamp::of(metadata),
        mode: metadata.mode(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        links: metadata.nlink(),
        device: metadata.rdev(),
        xattrs: BTreeMap::new(),
        link,
        digest: None,
    }
}

/// Whether a path that was there a moment ago is not any more.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
