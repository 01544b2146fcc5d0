//! Tests over the whole of the layer module; they make devices and owners, so they need root.

mod apply;
mod compression;
mod folder;
mod hostile;
mod random;
mod stack;
mod tar;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use super::{
    ApplyOptions, ApplyStats, Entry, EntryKind, LayerError, LayerStack, Overlay, TarWriter,
};

/// A date well in the past, so that nothing made by a test has it by accident.
const DAY: i64 = 1_600_000_000;

fn file(path: &str, body: &str) -> (Entry, Vec<u8>) {
    let mut entry = Entry::new(path, EntryKind::File { size: body.len() as u64 }, 0o644);
    entry.mtime_seconds = DAY;
    (entry, body.into())
}

fn entry(path: &str, kind: EntryKind, mode: u32) -> (Entry, Vec<u8>) {
    let mut entry = Entry::new(path, kind, mode);
    entry.mtime_seconds = DAY;
    (entry, Vec::new())
}

fn directory(path: &str) -> (Entry, Vec<u8>) {
    entry(path, EntryKind::Directory, 0o755)
}

fn symlink(path: &str, target: &str) -> (Entry, Vec<u8>) {
    entry(path, EntryKind::Symlink { target: target.into() }, 0o777)
}

fn hard_link(path: &str, target: &str) -> (Entry, Vec<u8>) {
    entry(path, EntryKind::HardLink { target: target.into() }, 0o644)
}

fn archive(entries: &[(Entry, Vec<u8>)]) -> Vec<u8> {
    let mut tar = TarWriter::new(Vec::new());
    for (entry, body) in entries {
        tar.append(entry, &mut body.as_slice()).unwrap();
    }
    tar.finish().unwrap()
}

fn unpack(bytes: &[u8], folder: &Path) -> Result<ApplyStats, LayerError> {
    unpack_over(bytes, folder, &LayerStack::empty())
}

fn unpack_over(
    mut bytes: &[u8],
    folder: &Path,
    lower: &LayerStack,
) -> Result<ApplyStats, LayerError> {
    let result = super::apply(
        &mut bytes,
        folder,
        &ApplyOptions { lower: Some(lower), ..ApplyOptions::default() },
    );
    if result.is_ok() {
        assert!(bytes.is_empty(), "the whole archive is read");
    }
    result
}

fn stack<P: AsRef<Path>>(folders: &[P]) -> LayerStack {
    LayerStack::open_folders(folders, Overlay::Trusted).unwrap()
}

/// The archive of what a folder changes in the layers below. The folder stays as it is.
fn diff(folder: &Path, lower: &LayerStack) -> Vec<u8> {
    if lower.is_empty() {
        return pack(folder);
    }
    let copy = reduced(folder, lower).unwrap();
    pack(&copy.path().join("copy"))
}

/// A copy of a folder, `copy`, with nothing but what it changes in the layers below.
fn reduced(folder: &Path, lower: &LayerStack) -> Result<tempfile::TempDir, LayerError> {
    let home = tempfile::tempdir().unwrap();
    let copy = home.path().join("copy");
    let status = Command::new("cp").arg("-a").args([folder, &copy]).status();
    assert!(status.unwrap().success());
    super::reduce(&copy, lower, Overlay::Trusted).map(|()| home)
}

fn pack(folder: &Path) -> Vec<u8> {
    let mut tar = TarWriter::new(Vec::new());
    super::write_folder(folder, Overlay::Trusted, &mut tar).unwrap();
    tar.finish().unwrap()
}

/// The entries of an archive, with content.
fn list(bytes: &[u8]) -> Vec<(Entry, Vec<u8>)> {
    let mut reader = super::reader::TarReader::new(bytes);
    let mut entries = Vec::new();
    while let Some(mut entry) = reader.next_entry().unwrap() {
        if entry.kind == EntryKind::Directory {
            entry.path.pop();
        }
        let mut body = Vec::new();
        reader.read_to_end(&mut body).unwrap();
        entries.push((entry, body));
    }
    entries
}

fn paths(bytes: &[u8]) -> Vec<String> {
    list(bytes).into_iter().map(|(entry, _)| String::from_utf8(entry.path).unwrap()).collect()
}

/// All there is to see of a folder on disk, by path: mode with type, owner, device, time, and content or link target.
fn look(folder: &Path) -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    let mut todo = vec![folder.to_path_buf()];
    while let Some(path) = todo.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let body = if metadata.is_symlink() {
            format!("-> {}", fs::read_link(&path).unwrap().display())
        } else if metadata.is_file() {
            format!("{:?}", fs::read(&path).unwrap().escape_ascii().to_string())
        } else {
            String::new()
        };
        if metadata.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|child| child.unwrap().path()));
        }
        let line = format!(
            "{:o} {}:{} {:x} {} {body}",
            metadata.permissions().mode(),
            metadata.uid(),
            metadata.gid(),
            metadata.rdev(),
            metadata.mtime()
        );
        seen.insert(format!("{:?}", path.strip_prefix(folder).unwrap()), line);
    }
    seen
}
