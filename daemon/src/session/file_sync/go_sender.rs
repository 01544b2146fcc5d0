//! A client that lists and sends a folder as the Go implementation does: a walk, four files at a time, 128 waiting.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use sha2::{Digest as _, Sha256};
use slipway_spec::wire::fsutil::packet::PacketType;
use slipway_spec::wire::fsutil::{Packet, Stat};
use tokio::sync::mpsc;
use tonic::Status;

use slipway_transport::packet::{self, FileType};

/// Bytes that the Go implementation reads at a time.
const CHUNK: usize = 32 * 1024;

/// A folder of a client, by path; the key makes the order of bytes the order of a walk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Folder(BTreeMap<Vec<u8>, (Stat, Bytes)>);

impl Folder {
    pub(crate) fn add(&mut self, stat: Stat, content: Bytes) {
        let key = stat.path.iter().map(|byte| if *byte == b'/' { 0 } else { *byte }).collect();
        self.0.insert(key, (stat, content));
    }

    pub(crate) fn remove(&mut self, path: &str) {
        self.0.remove(path.replace('/', "\0").as_bytes());
    }

    pub(crate) fn entries(&self) -> Vec<(Stat, Bytes)> {
        self.0.values().cloned().collect()
    }

    /// Makes a folder from text: `dir/`, `name=content`, `link->target`, `name==first name`, which must be there.
    pub(crate) fn of(entries: &[&str]) -> Self {
        let mut folder = Self::default();
        for entry in entries {
            if let Some(path) = entry.strip_suffix('/') {
                folder.add(stat(path, FileType::Directory, 0o755), Bytes::new());
            } else if let Some((path, target)) = entry.split_once("->") {
                let linkname = Bytes::copy_from_slice(target.as_bytes());
                let stat = Stat { linkname, ..stat(path, FileType::Symlink, 0o777) };
                folder.add(stat, Bytes::new());
            } else if let Some((path, first)) = entry.split_once("==") {
                let key = first.replace('/', "\0").into_bytes();
                let stat = Stat {
                    path: Bytes::copy_from_slice(path.as_bytes()),
                    linkname: Bytes::copy_from_slice(first.as_bytes()),
                    size: 0,
                    ..folder.0[&key].0.clone()
                };
                folder.add(stat, Bytes::new());
            } else if let Some((path, content)) = entry.split_once('=') {
                folder.file(path, content.as_bytes().to_vec());
            }
        }
        folder
    }

    /// Adds a file whose time tells its content from others.
    pub(crate) fn file(&mut self, path: &str, content: impl Into<Bytes>) {
        let content = content.into();
        let stat = Stat {
            size: content.len() as i64,
            mod_time: Sha256::digest(&content)
                .iter()
                .take(7)
                .fold(0, |time, byte| time << 8 | i64::from(*byte)),
            ..stat(path, FileType::Regular, 0o644)
        };
        self.add(stat, content);
    }
}

pub(crate) fn stat(path: &str, file_type: FileType, permissions: u32) -> Stat {
    Stat {
        path: Bytes::copy_from_slice(path.as_bytes()),
        mode: file_type.mode(permissions),
        mod_time: 1_600_000_000_000_000_000,
        ..Stat::default()
    }
}

/// Sends a folder. Returns what was asked for, in order.
///
/// # Errors
/// When the receiver breaks a rule or gives up.
pub(crate) async fn send(
    folder: &Folder,
    mut requests: impl Stream<Item = Result<Packet, Status>> + Unpin,
    answers: mpsc::Sender<Result<Packet, Status>>,
) -> Result<Vec<String>, String> {
    let mut files: HashMap<u32, (String, Bytes)> = HashMap::new();
    let mut stats = vec![];
    for (id, (stat, content)) in folder.entries().into_iter().enumerate() {
        if FileType::of(stat.mode) == Some(FileType::Regular) {
            let path = String::from_utf8_lossy(&stat.path).into_owned();
            files.insert(id as u32, (path, content));
        }
        stats.push(stat);
    }
    let walk = answers.clone();
    tokio::spawn(async move {
        for stat in stats.into_iter().map(Some).chain([None]) {
            if walk.send(Ok(packet::stat(stat))).await.is_err() {
                break;
            }
        }
    });
    let (pipeline, queue) = mpsc::channel::<(u32, Bytes)>(128);
    let queue = Arc::new(tokio::sync::Mutex::new(queue));
    for _ in 0..4 {
        let (queue, answers) = (queue.clone(), answers.clone());
        tokio::spawn(async move {
            loop {
                let next = queue.lock().await.recv().await;
                let Some((id, content)) = next else { break };
                for chunk in content.chunks(CHUNK) {
                    let packet = packet::data(id, Bytes::copy_from_slice(chunk));
                    if answers.send(Ok(packet)).await.is_err() {
                        return;
                    }
                }
                answers.send(Ok(packet::data(id, Bytes::new()))).await.ok();
            }
        });
    }
    let asked = Mutex::new(vec![]);
    while let Some(packet) = requests.next().await {
        let packet = packet.map_err(|status| status.message().to_owned())?;
        match PacketType::try_from(packet.r#type) {
            Ok(PacketType::PacketReq) => {
                let Some((path, content)) = files.remove(&packet.id) else {
                    return Err(format!("invalid file id {}", packet.id));
                };
                asked.lock().unwrap().push(path);
                pipeline.send((packet.id, content)).await.map_err(|error| error.to_string())?;
            }
            Ok(PacketType::PacketFin) => {
                answers.send(Ok(packet::finish())).await.map_err(|error| error.to_string())?;
                return Ok(asked.into_inner().unwrap());
            }
            Ok(PacketType::PacketErr) => {
                return Err(format!("error from receiver: {}", packet::reason(&packet.data)));
            }
            other => return Err(format!("unexpected packet {other:?}")),
        }
    }
    Err("EOF".into())
}
