//! Content by digest: image layouts that builds read, and those that caches and images are written into.

mod folder;
mod ingest;

use std::collections::BTreeMap;

use async_trait::async_trait;
use futures::stream::{self, BoxStream};
use futures::{StreamExt as _, TryStreamExt as _};
use slipway_spec::Digest;
use slipway_spec::wire::content::content_server::Content;
use slipway_spec::wire::content::{
    AbortRequest, DeleteContentRequest, Info, InfoRequest, InfoResponse, ListContentRequest,
    ListContentResponse, ListStatusesRequest, ListStatusesResponse, ReadContentRequest,
    ReadContentResponse, StatusRequest, StatusResponse, UpdateRequest, UpdateResponse, WriteAction,
    WriteContentRequest, WriteContentResponse,
};
use slipway_store::{Error, ErrorKind, blocking};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

pub use folder::{ContentFolder, LayoutName};
use ingest::Ingest;

use super::pieces;

/// The header that says which store is meant.
const STORE_ID: &str = "buildkit-attachable-store-id";

/// Bytes in one message.
const PIECE: usize = 512 * 1024;

/// Entries in one message of a list.
const ENTRIES: usize = 256;

pub(super) struct Contents(BTreeMap<String, ContentFolder>);

impl Contents {
    pub(super) fn new(stores: BTreeMap<String, ContentFolder>) -> Self {
        Self(stores)
    }

    fn store(&self, metadata: &MetadataMap) -> Result<&ContentFolder, Status> {
        // A folder may be named by any text, and daemons send its bytes.
        let id = metadata.get(STORE_ID).map(|id| String::from_utf8_lossy(id.as_encoded_bytes()));
        let id = id.ok_or_else(|| {
            Status::invalid_argument(format!("request lacks metadata {STORE_ID:?}"))
        })?;
        self.0.get(&*id).ok_or_else(|| Status::not_found(format!("unknown store {id}")))
    }
}

fn digest(text: &str) -> Result<Digest, Status> {
    text.parse().map_err(|error| Status::invalid_argument(format!("{error}")))
}

fn status(error: &Error) -> Status {
    match error.kind() {
        ErrorKind::NotFound => Status::not_found(error.to_string()),
        ErrorKind::Invalid => Status::failed_precondition(error.to_string()),
        ErrorKind::NoSpace => Status::resource_exhausted(error.to_string()),
        _ => Status::unknown(error.to_string()),
    }
}

fn missing(digest: &Digest) -> Status {
    Status::not_found(format!("content {digest}: not found"))
}

#[async_trait]
impl Content for Contents {
    type ListStream = BoxStream<'static, Result<ListContentResponse, Status>>;
    type ReadStream = BoxStream<'static, Result<ReadContentResponse, Status>>;
    type WriteStream = BoxStream<'static, Result<WriteContentResponse, Status>>;

    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let store = self.store(request.metadata())?.clone();
        let digest = digest(&request.get_ref().digest)?;
        let wanted = digest.clone();
        let found = blocking::run(move || store.info(&wanted)).await.map_err(|e| status(&e))?;
        let info = found.ok_or_else(|| missing(&digest))?;
        Ok(Response::new(InfoResponse { info: Some(info) }))
    }

    async fn update(&self, _: Request<UpdateRequest>) -> Result<Response<UpdateResponse>, Status> {
        Err(Status::failed_precondition("content has no labels here"))
    }

    async fn list(
        &self,
        request: Request<ListContentRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        if !request.get_ref().filters.is_empty() {
            return Err(Status::unimplemented("content cannot be filtered here"));
        }
        let store = self.store(request.metadata())?.clone();
        let found = blocking::run(move || store.list()).await.map_err(|e| status(&e))?;
        let pieces: Vec<Vec<Info>> = found.chunks(ENTRIES).map(<[Info]>::to_vec).collect();
        let answer = stream::iter(pieces).map(|info| Ok(ListContentResponse { info }));
        Ok(Response::new(answer.boxed()))
    }

    async fn delete(&self, request: Request<DeleteContentRequest>) -> Result<Response<()>, Status> {
        self.store(request.metadata())?;
        Err(Status::permission_denied("content of the client cannot be deleted"))
    }

    async fn read(
        &self,
        request: Request<ReadContentRequest>,
    ) -> Result<Response<Self::ReadStream>, Status> {
        let store = self.store(request.metadata())?;
        let ReadContentRequest { digest: text, offset, size } = request.get_ref();
        let digest = digest(text)?;
        let unknown = |error: std::io::Error| Status::unknown(format!("{digest}: {error}"));
        let mut file = match tokio::fs::File::open(store.blob(&digest)).await {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(missing(&digest));
            }
            Err(error) => return Err(unknown(error)),
        };
        let length = file.metadata().await.map_err(unknown)?.len();
        let bad = || Status::out_of_range(format!("{digest} has {length} bytes"));
        let offset = u64::try_from(*offset).map_err(|_| bad())?;
        let size = u64::try_from(*size).map_err(|_| bad())?;
        let rest = length.checked_sub(offset).ok_or_else(bad)?;
        // None at all means everything.
        let size = if size == 0 { rest } else { size };
        if size > rest {
            return Err(bad());
        }
        file.seek(std::io::SeekFrom::Start(offset)).await.map_err(unknown)?;
        let mut next = offset;
        let answer = pieces(file.take(size), PIECE).map_ok(move |data| {
            let offset = i64::try_from(next).unwrap_or(0);
            next += data.len() as u64;
            ReadContentResponse { offset, data }
        });
        Ok(Response::new(answer.boxed()))
    }

    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        self.store(request.metadata())?;
        // What is being written is known to its writer alone, and does not outlive it.
        let name = &request.get_ref().r#ref;
        Err(Status::not_found(format!("nothing is being written as {name:?}")))
    }

    async fn list_statuses(
        &self,
        request: Request<ListStatusesRequest>,
    ) -> Result<Response<ListStatusesResponse>, Status> {
        self.store(request.metadata())?;
        Ok(Response::new(ListStatusesResponse::default()))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let store = self.store(request.metadata())?.clone();
        if !store.is_writable() {
            return Err(Status::permission_denied("this store is only read from"));
        }
        let answer = stream::try_unfold(
            (request.into_inner(), None::<Ingest>, store),
            |(mut messages, ingest, store)| async move {
                let Some(message) = messages.try_next().await? else { return Ok(None) };
                let (answer, ingest) = write(message, ingest, store.clone()).await?;
                Ok(Some((answer, (messages, ingest, store))))
            },
        );
        Ok(Response::new(answer.boxed()))
    }

    async fn abort(&self, request: Request<AbortRequest>) -> Result<Response<()>, Status> {
        self.store(request.metadata())?;
        // What was not committed is gone with its writer.
        Ok(Response::new(()))
    }
}

/// Does what one message of a writer says.
async fn write(
    message: WriteContentRequest,
    ingest: Option<Ingest>,
    store: ContentFolder,
) -> Result<(WriteContentResponse, Option<Ingest>), Status> {
    let action = WriteAction::try_from(message.action)
        .map_err(|_| Status::invalid_argument(format!("unknown action {}", message.action)))?;
    let expected = Some(message.expected.as_str()).filter(|text| !text.is_empty());
    let expected = expected.map(digest).transpose()?;
    let number = |number: i64| {
        u64::try_from(number)
            .map_err(|_| Status::out_of_range("offsets and sizes are not negative"))
    };
    let (offset, total) = (number(message.offset)?, number(message.total)?);
    let step = move || -> Result<(Result<WriteContentResponse, Status>, Option<Ingest>), Error> {
        let mut ingest = match ingest {
            Some(ingest) => ingest,
            None if message.r#ref.is_empty() => {
                return Ok((
                    Err(Status::invalid_argument("first message must have a reference")),
                    None,
                ));
            }
            None => {
                if let Some(expected) = &expected
                    && store.info(expected)?.is_some()
                {
                    return Ok((Err(Status::already_exists(format!("content {expected}"))), None));
                }
                store.ingest()?
            }
        };
        let mut answer = WriteContentResponse {
            action: message.action,
            total: message.total,
            ..WriteContentResponse::default()
        };
        if action != WriteAction::Stat {
            if offset > 0 && offset != ingest.offset() {
                let at = ingest.offset();
                let what = format!("write @{offset} must occur at current offset {at}");
                return Ok((Err(Status::out_of_range(what)), Some(ingest)));
            }
            if offset == 0 && ingest.offset() > 0 {
                ingest.truncate()?;
            }
            ingest.write(&message.data)?;
        }
        answer.offset = i64::try_from(ingest.offset()).unwrap_or(i64::MAX);
        answer.digest = ingest.digest().to_string();
        if action != WriteAction::Commit {
            return Ok((Ok(answer), Some(ingest)));
        }
        let total = (total > 0).then_some(total);
        match ingest.commit(total, expected.as_ref())? {
            true => Ok((Ok(answer), None)),
            false => Ok((Err(Status::already_exists(format!("content {}", answer.digest))), None)),
        }
    };
    let (answer, ingest) = blocking::run(step).await.map_err(|error| status(&error))?;
    Ok((answer?, ingest))
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt as _;

    use super::*;

    async fn step(
        store: &ContentFolder,
        ingest: Option<Ingest>,
        message: WriteContentRequest,
    ) -> Result<(WriteContentResponse, Option<Ingest>), Status> {
        write(message, ingest, store.clone()).await
    }

    fn message(action: WriteAction, offset: i64, data: &'static [u8]) -> WriteContentRequest {
        WriteContentRequest {
            action: action.into(),
            r#ref: "r".into(),
            offset,
            data: data.into(),
            ..WriteContentRequest::default()
        }
    }

    fn contents(folder: ContentFolder) -> Contents {
        Contents::new([("s".to_owned(), folder)].into())
    }

    fn of_store<T>(message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(STORE_ID, "s".parse().unwrap());
        request
    }

    #[tokio::test]
    async fn what_is_written_can_be_read() {
        let place = tempfile::tempdir().unwrap();
        let store = ContentFolder::writable(place.path()).unwrap();
        let (answer, ingest) =
            step(&store, None, message(WriteAction::Stat, 0, b"")).await.unwrap();
        assert_eq!(answer.offset, 0);
        let (answer, ingest) =
            step(&store, ingest, message(WriteAction::Write, 0, b"hello ")).await.unwrap();
        assert_eq!(answer.offset, 6);
        let expected = Digest::of(b"hello world");
        let commit = WriteContentRequest {
            total: 11,
            expected: expected.to_string(),
            ..message(WriteAction::Commit, 6, b"world")
        };
        let (answer, ingest) = step(&store, ingest, commit).await.unwrap();
        assert_eq!((answer.digest, ingest.is_none()), (expected.to_string(), true));
        // Nothing but the blob is left.
        assert_eq!(std::fs::read_dir(place.path().join("ingest")).unwrap().count(), 0);

        let contents = contents(ContentFolder::read_only(place.path()));
        let request = InfoRequest { digest: expected.to_string() };
        let info = contents.info(of_store(request)).await.unwrap().into_inner().info.unwrap();
        assert_eq!(info.size, 11);
        let read = async |offset, size| {
            let request = ReadContentRequest { digest: expected.to_string(), offset, size };
            let pieces = contents.read(of_store(request)).await?.into_inner();
            let pieces: Vec<_> = pieces.try_collect().await?;
            Ok::<_, Status>(
                pieces.iter().flat_map(|piece| piece.data.to_vec()).collect::<Vec<u8>>(),
            )
        };
        assert_eq!(read(0, 0).await.unwrap(), b"hello world");
        assert_eq!(read(6, 3).await.unwrap(), b"wor");
        for (offset, size) in [(12, 0), (0, 12), (-1, 1), (1, -1), (i64::MAX, i64::MAX)] {
            let status = read(offset, size).await.unwrap_err();
            assert_eq!(status.code(), tonic::Code::OutOfRange);
        }
        let listed = contents.list(of_store(ListContentRequest::default())).await.unwrap();
        let listed: Vec<_> = listed.into_inner().try_collect().await.unwrap();
        assert_eq!(listed[0].info[0].digest, expected.to_string());

        let again = WriteContentRequest {
            expected: expected.to_string(),
            ..message(WriteAction::Stat, 0, b"")
        };
        let status = step(&store, None, again).await.map(drop).unwrap_err();
        assert_eq!(status.code(), tonic::Code::AlreadyExists);
    }

    #[tokio::test]
    async fn what_is_not_what_it_should_be_is_refused_and_gone() {
        let place = tempfile::tempdir().unwrap();
        let store = ContentFolder::writable(place.path()).unwrap();
        let other = Digest::of(b"other").to_string();
        for commit in [
            WriteContentRequest { expected: other, ..message(WriteAction::Commit, 0, b"x") },
            WriteContentRequest { total: 7, ..message(WriteAction::Commit, 0, b"x") },
        ] {
            let status = step(&store, None, commit).await.map(drop).unwrap_err();
            assert_eq!(status.code(), tonic::Code::FailedPrecondition);
        }
        let (_, ingest) = step(&store, None, message(WriteAction::Write, 0, b"ab")).await.unwrap();
        let status = step(&store, ingest, message(WriteAction::Write, 1, b"c")).await.map(drop);
        assert_eq!(status.unwrap_err().code(), tonic::Code::OutOfRange);
        for bad in [
            WriteContentRequest { r#ref: String::new(), ..message(WriteAction::Write, 0, b"") },
            WriteContentRequest { expected: "../x".into(), ..message(WriteAction::Write, 0, b"") },
            WriteContentRequest { action: 9, ..message(WriteAction::Write, 0, b"") },
        ] {
            let status = step(&store, None, bad).await.map(drop).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
        }
        assert_eq!(std::fs::read_dir(place.path().join("ingest")).unwrap().count(), 0);
        assert_eq!(store.list().unwrap(), []);
    }

    #[tokio::test]
    async fn a_store_that_was_not_offered_is_not_there() {
        let place = tempfile::tempdir().unwrap();
        let contents = contents(ContentFolder::read_only(place.path()));
        let digest = Digest::of(b"x").to_string();
        let code = async |request| contents.info(request).await.unwrap_err().code();
        let request = InfoRequest { digest };
        assert_eq!(code(Request::new(request.clone())).await, tonic::Code::InvalidArgument);
        let mut other = Request::new(request.clone());
        other.metadata_mut().insert(STORE_ID, "t".parse().unwrap());
        assert_eq!(code(other).await, tonic::Code::NotFound);
        assert_eq!(code(of_store(request)).await, tonic::Code::NotFound);
        let request = InfoRequest { digest: "sha256:../../etc/passwd".into() };
        assert_eq!(code(of_store(request)).await, tonic::Code::InvalidArgument);
    }
}
