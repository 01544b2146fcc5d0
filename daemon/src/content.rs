//! `Content`: blobs of the store and of the history of builds, for clients to read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};

use futures::stream::{self, BoxStream};
use slipway_engine::store::content::BlobInfo;
use slipway_engine::store::filter::Filter;
use slipway_engine::store::{Store, blocking};
use slipway_spec::Digest;
use slipway_spec::wire::content::content_server::Content;
use slipway_spec::wire::content::{
    AbortRequest, DeleteContentRequest, Info, InfoRequest, InfoResponse, ListContentRequest,
    ListContentResponse, ListStatusesRequest, ListStatusesResponse, ReadContentRequest,
    ReadContentResponse, StatusRequest, StatusResponse, UpdateRequest, UpdateResponse,
    WriteContentRequest, WriteContentResponse,
};
use tonic::{Request, Response, Status, Streaming};

use crate::history::History;
use crate::timestamp;

/// Bytes in one message.
const CHUNK: usize = 256 << 10;
/// Blobs in one message of a listing.
const PAGE: usize = 100;
/// The fields of blobs that filters may name.
const FIELDS: &[&str] = &["digest", "size", "labels."];

/// Blobs for clients. Nothing can be written.
#[derive(Clone, Debug)]
pub struct ContentService {
    store: Store,
    history: History,
}

type Answer<T> = Result<Response<T>, Status>;

fn failed(error: slipway_engine::store::Error) -> Status {
    Status::internal(error.to_string())
}

fn read_only<T>() -> Answer<T> {
    Err(Status::unknown("read-only content store"))
}

fn parse(digest: &str) -> Result<Digest, Status> {
    digest.parse().map_err(|error| Status::invalid_argument(format!("{digest:?}: {error}")))
}

fn missing(digest: &Digest) -> Status {
    Status::not_found(format!("content {digest}: not found"))
}

fn to_wire(blob: &BlobInfo) -> Info {
    let time = timestamp(blob.created);
    Info {
        digest: blob.digest.to_string(),
        size: i64::try_from(blob.size).unwrap_or(i64::MAX),
        created_at: Some(time),
        updated_at: Some(time),
        labels: BTreeMap::new(),
    }
}

impl ContentService {
    /// Offers what a store and a history have.
    pub fn new(store: Store, history: History) -> Self {
        Self { store, history }
    }

    async fn open(&self, digest: Digest) -> Result<(File, BlobInfo), Status> {
        let (store, wanted) = (self.store.clone(), digest.clone());
        let found = blocking::run(move || {
            let Some(info) = store.blob_info(&wanted)? else { return Ok(None) };
            let file = store.open_blob(&wanted)?;
            Ok(Some((file, info)))
        });
        if let Some(found) = found.await.map_err(failed)? {
            return Ok(found);
        }
        self.history.blob(digest.clone()).await?.ok_or_else(|| missing(&digest))
    }

    /// Lists blobs from one after the last, first those of the store.
    async fn page(&self, of_history: bool, after: String) -> Result<Vec<BlobInfo>, Status> {
        if of_history {
            return self.history.blobs(after, PAGE).await;
        }
        let store = self.store.clone();
        blocking::run(move || store.blob_page(&after, PAGE)).await.map_err(failed)
    }
}

/// How far a listing is.
struct Listing {
    service: ContentService,
    filter: Filter,
    of_history: bool,
    after: String,
}

impl Listing {
    async fn next(&mut self) -> Result<Option<ListContentResponse>, Status> {
        loop {
            let found = self.service.page(self.of_history, self.after.clone()).await?;
            match found.last() {
                Some(last) => self.after = last.digest.to_string(),
                None if self.of_history => return Ok(None),
                None => {
                    self.of_history = true;
                    self.after.clear();
                    continue;
                }
            }
            let wanted = |blob: &&BlobInfo| {
                self.filter.holds(|path| match path {
                    [name] if name == "digest" => Some(blob.digest.to_string()),
                    [name] if name == "size" => Some(blob.size.to_string()),
                    _ => None,
                })
            };
            let info: Vec<Info> = found.iter().filter(wanted).map(to_wire).collect();
            if !info.is_empty() {
                return Ok(Some(ListContentResponse { info }));
            }
        }
    }
}

/// A blob that is read.
struct Reading {
    file: File,
    offset: u64,
    end: u64,
}

impl Reading {
    fn next(mut self) -> (Result<ReadContentResponse, Status>, Option<Self>) {
        let size = usize::try_from(self.end - self.offset).unwrap_or(usize::MAX).min(CHUNK);
        let mut data = vec![0; size];
        if let Err(error) = self.file.read_exact(&mut data) {
            return (Err(Status::data_loss(format!("cannot read the blob: {error}"))), None);
        }
        let offset = i64::try_from(self.offset).unwrap_or(i64::MAX);
        self.offset += size as u64;
        let more = (self.offset < self.end).then_some(self);
        (Ok(ReadContentResponse { offset, data: data.into() }), more)
    }
}

#[tonic::async_trait]
impl Content for ContentService {
    type ListStream = BoxStream<'static, Result<ListContentResponse, Status>>;
    type ReadStream = BoxStream<'static, Result<ReadContentResponse, Status>>;
    type WriteStream = BoxStream<'static, Result<WriteContentResponse, Status>>;

    async fn info(&self, request: Request<InfoRequest>) -> Answer<InfoResponse> {
        let digest = parse(&request.into_inner().digest)?;
        let (_file, blob) = self.open(digest).await?;
        Ok(Response::new(InfoResponse { info: Some(to_wire(&blob)) }))
    }

    async fn list(&self, request: Request<ListContentRequest>) -> Answer<Self::ListStream> {
        let filter = Filter::parse(&request.into_inner().filters, FIELDS)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let service = self.clone();
        let listing = Listing { service, filter, of_history: false, after: String::new() };
        let messages = stream::unfold(Some(listing), |listing| async move {
            let mut listing = listing?;
            match listing.next().await {
                Ok(next) => Some((Ok(next?), Some(listing))),
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(Response::new(Box::pin(messages)))
    }

    async fn read(&self, request: Request<ReadContentRequest>) -> Answer<Self::ReadStream> {
        let ReadContentRequest { digest, offset, size } = request.into_inner();
        let digest = parse(&digest)?;
        let (mut file, blob) = self.open(digest).await?;
        let outside = || {
            let text = format!("{size} bytes from {offset} of a blob of {} bytes", blob.size);
            Status::out_of_range(text)
        };
        let offset = u64::try_from(offset).map_err(|_| outside())?;
        let wanted = u64::try_from(size).map_err(|_| outside())?;
        if offset > blob.size {
            return Err(outside());
        }
        let rest = blob.size - offset;
        // Without a size all that is left is meant.
        let length = if wanted == 0 { rest } else { wanted };
        if length > rest {
            return Err(outside());
        }
        file.seek(SeekFrom::Start(offset))
            .map_err(|error| Status::internal(format!("cannot read {}: {error}", blob.digest)))?;
        let reading = (length > 0).then_some(Reading { file, offset, end: offset + length });
        let messages = stream::unfold(reading, |reading| async move {
            let reading = reading?;
            let read = blocking::run(move || Ok(reading.next())).await;
            Some(read.unwrap_or_else(|error| (Err(failed(error)), None)))
        });
        Ok(Response::new(Box::pin(messages)))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Answer<StatusResponse> {
        // Nothing is ever being written here.
        Err(Status::not_found(format!("{}: not found", request.into_inner().r#ref)))
    }

    async fn list_statuses(&self, _: Request<ListStatusesRequest>) -> Answer<ListStatusesResponse> {
        Ok(Response::new(ListStatusesResponse::default()))
    }

    async fn update(&self, _: Request<UpdateRequest>) -> Answer<UpdateResponse> {
        read_only()
    }

    async fn delete(&self, _: Request<DeleteContentRequest>) -> Answer<()> {
        read_only()
    }

    async fn write(&self, _: Request<Streaming<WriteContentRequest>>) -> Answer<Self::WriteStream> {
        read_only()
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Answer<()> {
        read_only()
    }
}
