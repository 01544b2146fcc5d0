//! Writes a [`Tree`] as a layer: as a folder in overlayfs form, or as a tar.

use std::collections::HashMap;
use std::collections::hash_map::Entry as Slot;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{AtFlags, CWD, Dev, FileType, Gid, Mode, Timespec, Timestamps, Uid};

use super::scan::{mtime, open_regular, open_sized};
use super::{Content, Entry, Kind, Tree};
use crate::error::{IoContext as _, Result};
use crate::layer::tar::{Segment, SegmentRule};
use crate::layer::{self, Overlay, TarWriter};

/// Files read whole into memory, so that their header tells the size they really have; larger ones are streamed.
const SMALL: u64 = 1 << 20;

impl Tree {
    /// Writes the tree as a layer tar, in the order of a walk. Hard links are kept within the tree.
    ///
    /// # Errors
    /// When content cannot be read, has become shorter meanwhile, or the output fails.
    pub fn write_tar<W: Write>(&self, tar: &mut TarWriter<W>) -> Result<()> {
        let mut linked: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
        let mut buffer = vec![];
        let mut rule = SegmentRule::default();
        let mut segment: Vec<Part<'_>> = vec![];
        for (path, entry) in self.iter().filter(|(path, _)| !path.is_empty()) {
            let part = Part::new(path, entry, &mut linked);
            if tar.has_segments() && rule.next(&part.header.path, part.size()) {
                write_segment(&segment, &mut buffer, tar)?;
                segment.clear();
            }
            segment.push(part);
        }
        write_segment(&segment, &mut buffer, tar)
    }

    /// Writes the tree into an existing empty folder, on all cores where there is much to copy.
    ///
    /// # Errors
    /// When content cannot be read or the folder not be written.
    pub fn write_folder(&self, folder: &Path, overlay: Overlay) -> Result<()> {
        let mut linked: HashMap<(u64, u64), PathBuf> = HashMap::new();
        let mut links: Vec<(PathBuf, PathBuf)> = vec![];
        let mut files: Vec<(PathBuf, &Entry)> = vec![];
        let mut directories: Vec<(PathBuf, &Entry)> = vec![];
        for (path, entry) in self.iter() {
            let host = if path.is_empty() {
                folder.to_path_buf()
            } else {
                folder.join(OsStr::from_bytes(&path))
            };
            if let Some(inode) = entry.inode {
                if let Some(first) = linked.get(&inode) {
                    links.push((first.clone(), host));
                    continue;
                }
                linked.insert(inode, host.clone());
            }
            match &entry.kind {
                Kind::Directory { opaque } => {
                    if !path.is_empty() {
                        // Closed for the time being; the real mode comes with the rest of the attributes.
                        rustix::fs::mkdir(&host, Mode::RWXU).at("create", &host)?;
                    }
                    if *opaque {
                        let flags = rustix::fs::XattrFlags::empty();
                        rustix::fs::lsetxattr(&host, overlay.opaque(), b"y", flags)
                            .at("mark as opaque", &host)?;
                    }
                    directories.push((host, entry));
                }
                Kind::File { .. } => files.push((host, entry)),
                Kind::Symlink { target } => {
                    rustix::fs::symlink(target.as_slice(), &host).at("create", &host)?;
                    finish(&host, entry)?;
                }
                Kind::Whiteout => node(&host, FileType::CharacterDevice, 0, 0)?,
                Kind::CharDevice { major, minor } => {
                    node(&host, FileType::CharacterDevice, *major, *minor)?;
                    finish(&host, entry)?;
                }
                Kind::BlockDevice { major, minor } => {
                    node(&host, FileType::BlockDevice, *major, *minor)?;
                    finish(&host, entry)?;
                }
                Kind::Fifo => {
                    node(&host, FileType::Fifo, 0, 0)?;
                    finish(&host, entry)?;
                }
            }
        }
        write_files(&files)?;
        for (first, host) in links {
            fs::hard_link(&first, &host).at("create", &host)?;
        }
        // Children change their directory's time, so directories are finished last and deepest first.
        directories.iter().rev().try_for_each(|(host, entry)| finish(host, entry))
    }
}

/// One entry on its way into a tar.
struct Part<'a> {
    header: layer::Entry,
    entry: &'a Entry,
}

impl<'a> Part<'a> {
    fn new(path: Vec<u8>, entry: &'a Entry, linked: &mut HashMap<(u64, u64), Vec<u8>>) -> Self {
        let kind = match &entry.kind {
            Kind::Directory { .. } => layer::EntryKind::Directory,
            Kind::File { size, .. } => layer::EntryKind::File { size: *size },
            Kind::Symlink { target } => layer::EntryKind::Symlink { target: target.clone() },
            Kind::CharDevice { major, minor } => {
                layer::EntryKind::CharDevice { major: *major, minor: *minor }
            }
            Kind::BlockDevice { major, minor } => {
                layer::EntryKind::BlockDevice { major: *major, minor: *minor }
            }
            Kind::Fifo | Kind::Whiteout => layer::EntryKind::Fifo,
        };
        let mut header = layer::Entry {
            path,
            kind,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime_seconds: entry.mtime.div_euclid(1_000_000_000),
            xattrs: entry.xattrs.clone(),
        };
        if let Some(inode) = entry.inode {
            match linked.entry(inode) {
                Slot::Occupied(first) => {
                    header.kind = layer::EntryKind::HardLink { target: first.get().clone() };
                }
                Slot::Vacant(slot) => {
                    slot.insert(header.path.clone());
                }
            }
        }
        Self { header, entry }
    }

    fn size(&self) -> u64 {
        match self.header.kind {
            layer::EntryKind::File { size } => size,
            _ => 0,
        }
    }

    fn content(&self) -> Option<&'a Content> {
        match (&self.header.kind, &self.entry.kind) {
            (layer::EntryKind::File { .. }, Kind::File { content, .. }) => Some(content),
            _ => None,
        }
    }

    /// Adds all that shows in the tar to a hash; `None` when the content is not known.
    fn hash_into(&self, hash: &mut blake3::Hasher) -> Option<()> {
        let layer::Entry { path, kind, mode, uid, gid, mtime_seconds, xattrs } = &self.header;
        let mut sized = |bytes: &[u8]| {
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        sized(path);
        for (name, value) in xattrs {
            sized(name);
            sized(value);
        }
        let (tag, link, numbers) = match kind {
            layer::EntryKind::Directory => (0u8, None, [0, 0]),
            layer::EntryKind::File { size } => (1, None, [*size, 0]),
            layer::EntryKind::Symlink { target } => (2, Some(target), [0, 0]),
            layer::EntryKind::HardLink { target } => (3, Some(target), [0, 0]),
            layer::EntryKind::CharDevice { major, minor } => {
                (4, None, [u64::from(*major), u64::from(*minor)])
            }
            layer::EntryKind::BlockDevice { major, minor } => {
                (5, None, [u64::from(*major), u64::from(*minor)])
            }
            layer::EntryKind::Fifo => (6, None, [0, 0]),
        };
        sized(link.map_or(&[], Vec::as_slice));
        let state = match self.entry.kind {
            Kind::Directory { opaque: true } => 1,
            Kind::Whiteout => 2,
            _ => 0u8,
        };
        hash.update(&[tag, state, u8::try_from(xattrs.len()).ok()?]);
        for number in [u64::from(*mode), u64::from(*uid), u64::from(*gid), numbers[0], numbers[1]] {
            hash.update(&number.to_le_bytes());
        }
        hash.update(&mtime_seconds.to_le_bytes());
        match self.content() {
            Some(Content::Host { digest, .. }) => hash.update(digest.as_ref()?),
            Some(Content::Part { digest, .. }) => hash.update(digest),
            Some(Content::Inline(bytes)) => hash.update(blake3::hash(bytes).as_bytes()),
            None => hash,
        };
        Some(())
    }

    /// Returns whether the content is what it was when its digest was taken.
    fn write<W: Write>(&self, buffer: &mut Vec<u8>, tar: &mut TarWriter<W>) -> Result<bool> {
        let path = &self.header.path;
        let mut same = true;
        let written = match (&self.entry.kind, self.content()) {
            (_, Some(Content::Host { path, .. })) => {
                let (written, after) = append_file(self.header.clone(), path, buffer, tar)?;
                same = after == (self.entry.mtime, self.size());
                written
            }
            (_, Some(Content::Part { file, offset, .. })) if self.size() <= SMALL => {
                buffer.resize(usize::try_from(self.size()).unwrap_or(0), 0);
                file.read(*offset, buffer)?;
                tar.append(&self.header, &mut buffer.as_slice())
            }
            (_, Some(Content::Part { file, offset, .. })) => {
                tar.append(&self.header, &mut file.reader(*offset, self.size())?)
            }
            (_, Some(Content::Inline(bytes))) => tar.append(&self.header, &mut &bytes[..]),
            (Kind::Whiteout, _) => tar.whiteout(path),
            (Kind::Directory { opaque: true }, _) => {
                tar.append(&self.header, &mut io::empty()).and_then(|()| tar.opaque(path))
            }
            _ => tar.append(&self.header, &mut io::empty()),
        };
        written.context(|| format!("cannot write {} into the layer", path.escape_ascii()))?;
        Ok(same)
    }
}

fn write_segment<W: Write>(
    parts: &[Part<'_>],
    buffer: &mut Vec<u8>,
    tar: &mut TarWriter<W>,
) -> Result<()> {
    let mut hash = blake3::Hasher::new();
    let known = parts.iter().all(|part| part.hash_into(&mut hash).is_some());
    let key = known.then(|| hash.finalize().into());
    let failed = || "cannot write a layer".to_owned();
    let segment = key.as_ref().map_or(Segment::Unknown, Segment::Known);
    if tar.segment(segment).context(failed)? {
        return Ok(());
    }
    let mut same = true;
    for part in parts {
        same &= part.write(buffer, tar)?;
    }
    if !same {
        // What was changed meanwhile must not stand for what it was.
        tar.segment(Segment::Spoiled).context(failed)?;
    }
    Ok(())
}

/// Writes a file of this machine, with the size it has now. Returns its modification time and size after that.
fn append_file<W: Write>(
    mut header: layer::Entry,
    path: &Path,
    buffer: &mut Vec<u8>,
    tar: &mut TarWriter<W>,
) -> Result<(io::Result<()>, (i64, u64))> {
    let (mut file, size) = open_sized(path)?;
    let written = if size <= SMALL {
        // One byte more than there should be: one call is then enough to see that there is no more.
        let all = usize::try_from(size).unwrap_or(0);
        buffer.resize(all + 1, 0);
        let read = rustix::io::retry_on_intr(|| rustix::io::read(&file, buffer.as_mut_slice()))
            .at("read", path)?;
        buffer.truncate(read);
        if read != all {
            (&file).take(SMALL).read_to_end(buffer).at("read", path)?;
        }
        header.kind = layer::EntryKind::File { size: buffer.len() as u64 };
        tar.append(&header, &mut buffer.as_slice())
    } else {
        header.kind = layer::EntryKind::File { size };
        tar.append(&header, &mut file)
    };
    let after = file.metadata().at("read", path)?;
    Ok((written, (mtime(&after), after.len())))
}

fn write_files(files: &[(PathBuf, &Entry)]) -> Result<()> {
    let threads =
        std::thread::available_parallelism().map_or(1, usize::from).min(files.len().div_ceil(64));
    let cursor = AtomicUsize::new(0);
    let work = || -> Result<()> {
        while let Some((host, entry)) = files.get(cursor.fetch_add(1, Ordering::Relaxed)) {
            write_file(host, entry)?;
        }
        Ok(())
    };
    if threads <= 1 {
        return work();
    }
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect::<Result<Vec<()>>>()
            .map(drop)
    })
}

fn write_file(host: &Path, entry: &Entry) -> Result<()> {
    let mut file = File::create_new(host).at("create", host)?;
    match &entry.kind {
        Kind::File { content: Content::Inline(bytes), .. } => {
            file.write_all(bytes).at("write", host)?;
        }
        Kind::File { content: Content::Part { file: source, offset, .. }, size } => {
            io::copy(&mut source.reader(*offset, *size)?, &mut file).at("write", host)?;
        }
        Kind::File { content: Content::Host { path, .. }, .. } => {
            let mut source = open_regular(path)?;
            // Shares extents where the file system can, and copies inside the kernel otherwise.
            if rustix::fs::ioctl_ficlone(&file, &source).is_err() {
                io::copy(&mut source, &mut file).at("write", host)?;
            }
        }
        _ => {}
    }
    // Through the open file, which saves the kernel a look-up for each attribute.
    rustix::fs::fchown(&file, Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
        .at("set the owner of", host)?;
    for (name, value) in &entry.xattrs {
        rustix::fs::fsetxattr(&file, name.as_slice(), value, rustix::fs::XattrFlags::empty())
            .at("set an attribute of", host)?;
    }
    // Changing the owner clears set-id bits, so the mode comes after it.
    rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode)).at("set the mode of", host)?;
    rustix::fs::futimens(&file, &times(entry.mtime)).at("set the time of", host)
}

fn node(host: &Path, kind: FileType, major: u32, minor: u32) -> Result<()> {
    let device: Dev = rustix::fs::makedev(major, minor);
    rustix::fs::mknodat(CWD, host, kind, Mode::RUSR | Mode::WUSR, device).at("create", host)
}

fn finish(host: &Path, entry: &Entry) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    rustix::fs::chownat(CWD, host, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .at("set the owner of", host)?;
    for (name, value) in &entry.xattrs {
        rustix::fs::lsetxattr(host, name.as_slice(), value, rustix::fs::XattrFlags::empty())
            .at("set an attribute of", host)?;
    }
    if !matches!(entry.kind, Kind::Symlink { .. }) {
        rustix::fs::chmod(host, Mode::from_raw_mode(entry.mode)).at("set the mode of", host)?;
    }
    rustix::fs::utimensat(CWD, host, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
        .at("set the time of", host)
}

fn times(mtime: i64) -> Timestamps {
    let time = Timespec {
        tv_sec: mtime.div_euclid(1_000_000_000),
        tv_nsec: mtime.rem_euclid(1_000_000_000),
    };
    Timestamps { last_access: time, last_modification: time }
}

#[cfg(test)]
mod tests {
    use super::super::scan::{Everything, Ownership, ScanOptions, scan};
    use super::*;

    fn file(text: &str, mode: u32) -> Entry {
        let content = Content::Inline(text.as_bytes().into());
        Entry {
            kind: Kind::File { content, size: text.len() as u64 },
            ..Entry::directory(mode, 1_600_000_000_000_000_000)
        }
    }

    #[test]
    fn folder_and_tar_hold_the_same() {
        let source = tempfile::tempdir().unwrap();
        fs::create_dir(source.path().join("d")).unwrap();
        fs::write(source.path().join("d/one"), "1").unwrap();
        fs::hard_link(source.path().join("d/one"), source.path().join("d/two")).unwrap();
        fs::write(source.path().join("d/big"), vec![b'x'; 3 << 20]).unwrap();
        std::os::unix::fs::symlink("one", source.path().join("d/link")).unwrap();
        let options = ScanOptions { ownership: Ownership::Keep, memory: None };
        let mut tree = scan(source.path(), &mut Everything, &options).unwrap();
        tree.insert(b"e", Entry::directory(0o1777, 5_000_000_000));
        tree.insert(b"e/suid", file("hello", 0o4755));

        let (from_tree, from_tar) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        tree.write_folder(from_tree.path(), Overlay::Trusted).unwrap();
        let mut tar = TarWriter::new(vec![]);
        tree.write_tar(&mut tar).unwrap();
        let tar = tar.finish().unwrap();
        fs::write(from_tar.path().join("t.tar"), &tar).unwrap();
        let unpacked = from_tar.path().join("fs");
        fs::create_dir(&unpacked).unwrap();
        let done = std::process::Command::new("tar")
            .args(["-xpf", "../t.tar"])
            .current_dir(&unpacked)
            .status()
            .expect("this test needs GNU tar (Debian package tar)");
        assert!(done.success());
        let strip = |tree: Tree| -> Vec<_> {
            tree.iter()
                .map(|(path, entry)| {
                    let kind = match &entry.kind {
                        Kind::File { content: Content::Host { digest, .. }, size } => {
                            format!("file {size} {digest:?}")
                        }
                        other => format!("{other:?}"),
                    };
                    (
                        path,
                        kind,
                        entry.mode,
                        entry.uid,
                        entry.mtime / 1_000_000_000,
                        entry.inode.is_some(),
                    )
                })
                .collect()
        };
        let a = strip(scan(from_tree.path(), &mut Everything, &options).unwrap());
        let b = strip(scan(&unpacked, &mut Everything, &options).unwrap());
        assert_eq!(a, b);
        assert_eq!(a.len(), tree.len());
    }
}
