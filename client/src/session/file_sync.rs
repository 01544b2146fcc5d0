//! Folders that builds read. The daemon says which part of one it wants; entries of that are announced, and files are
//! sent that it asks for.

use std::collections::BTreeMap;
use std::path::PathBuf;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{FutureExt as _, StreamExt as _};
use slipway_solver::client::{LocalRequest, Selection};
use slipway_spec::wire::filesync::file_sync_server::FileSync;
use slipway_spec::wire::fsutil::Packet;
use slipway_store::tree::scan::{Filter, Ownership, Verdict, survey};
use slipway_store::tree::{Content, Entry, Kind, Tree};
use slipway_store::{Error, ErrorKind, blocking};
use slipway_transport::files::{self, SendOptions};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

/// Packets for the daemon that wait to be sent.
const OUTGOING: usize = 64;

/// As other clients do: four files at the same time, in pieces of this many bytes.
const SEND: SendOptions =
    SendOptions { peer: "the builder", readers: 4, piece: 32 * 1024, awaits_end: false };

/// A folder that builds read.
#[derive(Clone, Debug)]
pub enum Folder {
    /// One of this machine.
    Path(PathBuf),
    /// Files that are in memory, by path.
    Files(BTreeMap<String, Bytes>),
}

impl Folder {
    /// Lists the part that is asked for. Blocks.
    fn tree(&self, request: &LocalRequest) -> Result<Tree, Error> {
        match self {
            Self::Path(path) => survey(path, &mut Selection::new(path, request)?, Ownership::Root),
            Self::Files(files) => {
                // There is no folder to follow links in.
                let nowhere = std::path::Path::new("/nonexistent");
                let mut selection = Selection::new(nowhere, request)?;
                let mut tree = Tree::default();
                for (path, bytes) in files {
                    if selection.verdict(path.as_bytes(), false) != Verdict::Take {
                        continue;
                    }
                    let content = Content::Inline(bytes[..].into());
                    let kind = Kind::File { content, size: bytes.len() as u64 };
                    tree.insert(path.as_bytes(), Entry { kind, ..Entry::directory(0o644, 0) });
                }
                Ok(tree)
            }
        }
    }
}

pub(super) struct Folders(BTreeMap<String, Folder>);

impl Folders {
    pub(super) fn new(folders: BTreeMap<String, Folder>) -> Self {
        Self(folders)
    }
}

#[async_trait]
impl FileSync for Folders {
    type DiffCopyStream = BoxStream<'static, Result<Packet, Status>>;
    type TarStreamStream = BoxStream<'static, Result<Packet, Status>>;

    async fn diff_copy(
        &self,
        request: Request<Streaming<Packet>>,
    ) -> Result<Response<Self::DiffCopyStream>, Status> {
        let wanted = wanted(request.metadata())?;
        let folder = self.0.get(&wanted.name).cloned().ok_or_else(|| {
            Status::not_found(format!("no access allowed to dir {:?}", wanted.name))
        })?;
        let incoming = request.into_inner();
        let (outgoing, queue) = mpsc::channel(OUTGOING);
        let sending = async move {
            let listed = blocking::run(move || Ok(files::list(&folder.tree(&wanted)?))).await;
            let entries = match listed {
                Ok(entries) => entries,
                Err(error) => {
                    // As a packet, as the daemon may pass on no other kind of error.
                    let told = slipway_transport::packet::failure(&error.to_string());
                    outgoing.send(told).await.ok();
                    return Err(error);
                }
            };
            let connect = std::future::ready(Ok(incoming));
            files::send(connect, outgoing, entries, SEND, &mut |_| ()).await.map(drop)
        };
        // It ends with the answer, when that is dropped.
        let sending = AbortOnDropHandle::new(tokio::spawn(sending));
        let packets = stream::unfold(queue, |mut queue| async move {
            queue.recv().await.map(|packet| (Ok(packet), queue))
        });
        let outcome = sending.map(|ended| match ended {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Err(status(&error))),
            Err(error) => Some(Err(Status::internal(error.to_string()))),
        });
        let outcome = stream::once(outcome).filter_map(std::future::ready);
        Ok(Response::new(packets.chain(outcome).boxed()))
    }

    async fn tar_stream(
        &self,
        _: Request<Streaming<Packet>>,
    ) -> Result<Response<Self::TarStreamStream>, Status> {
        Err(Status::unimplemented("folders are sent file by file only"))
    }
}

fn status(error: &Error) -> Status {
    match error.kind() {
        ErrorKind::NotFound => Status::not_found(error.to_string()),
        _ => Status::unknown(error.to_string()),
    }
}

/// Reads which part of which folder is wanted.
fn wanted(metadata: &MetadataMap) -> Result<LocalRequest, Status> {
    let list = |key: &str| -> Result<Option<Vec<String>>, Status> {
        let encoded = metadata.get(format!("{key}-encoded")).is_some_and(|value| value == "1");
        let mut values = vec![];
        for value in metadata.get_all(key) {
            let bad = || Status::invalid_argument(format!("the header {key} is no text"));
            let text = value.to_str().map_err(|_| bad())?;
            values.push(if encoded { unescape(text).ok_or_else(bad)? } else { text.to_owned() });
        }
        Ok((!values.is_empty()).then_some(values))
    };
    let name = list("dir-name")?.and_then(|names| names.into_iter().next()).unwrap_or_default();
    Ok(LocalRequest {
        name,
        follow_paths: list("followpaths")?,
        include: list("include-patterns")?.unwrap_or_default(),
        exclude: list("exclude-patterns")?.unwrap_or_default(),
        fresh: false,
    })
}

/// Undoes the escaping of a URL's query.
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                u8::try_from(digit()? << 4 | digit()?).ok()?
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> MetadataMap {
        let mut metadata = MetadataMap::new();
        for (key, value) in pairs {
            metadata.append(*key, value.parse().unwrap());
        }
        metadata
    }

    #[test]
    fn headers_say_what_is_wanted() {
        let request = wanted(&headers(&[
            ("dir-name", "context"),
            ("exclude-patterns", "100%+"),
            ("exclude-patterns", "!x"),
            ("followpaths", "a+b%2Fc"),
            ("followpaths", "%C3%BC"),
            ("followpaths-encoded", "1"),
        ]))
        .unwrap();
        assert_eq!(request.name, "context");
        assert_eq!(request.exclude, ["100%+", "!x"]);
        assert_eq!(request.follow_paths.unwrap(), ["a b/c", "ü"]);
        assert_eq!(request.include, [""; 0]);
        assert_eq!(wanted(&headers(&[])).unwrap(), LocalRequest::default());
        for value in ["%", "%2", "%zz", "%ff"] {
            let bad = headers(&[("followpaths", value), ("followpaths-encoded", "1")]);
            assert!(wanted(&bad).is_err(), "{value}");
        }
    }

    #[test]
    fn files_in_memory_are_a_folder() {
        let files = [("Dockerfile".to_owned(), Bytes::from_static(b"FROM scratch"))];
        let folder = Folder::Files(files.into());
        let list = |request: LocalRequest| folder.tree(&request).unwrap().len();
        assert_eq!(list(LocalRequest::default()), 1);
        let follow = |path: &str| LocalRequest {
            follow_paths: Some(vec![path.into(), "Dockerfile.dockerignore".into()]),
            ..LocalRequest::default()
        };
        assert_eq!(list(follow("Dockerfile")), 1);
        assert_eq!(list(follow("other")), 0);
    }
}
