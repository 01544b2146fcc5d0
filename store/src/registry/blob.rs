//! Blobs on their way here.

use std::collections::VecDeque;
use std::fmt;
use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, RANGE};
use http::{Method, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use slipway_spec::{Descriptor, Digest, ImageReference};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::error::{RegistryError, RegistryErrorKind};
use super::exchange::{Answer, Ask, Endpoint};
use super::retry::{Retries, STALL_BYTES};
use super::scope::Scopes;
use super::transport::chain_text;
use super::url::Url;
use super::{Candidate, Inner};

/// Progress after which earlier failures are forgiven; bounds the attempts for each piece of this size.
const FORGIVING_BYTES: u64 = 1024 * 1024;

/// Compressed bytes that are decoded at once, since few of them may become very many.
const DECODED_AT_ONCE: usize = 1024;

/// Reads one blob, continuing where a connection broke.
///
/// Yields at most as many bytes as the descriptor says; their digest is for the caller to verify.
pub struct BlobReader {
    inner: Arc<Inner>,
    subject: String,
    digest: Digest,
    size: u64,
    /// The bytes yielded so far, the starting offset included.
    position: u64,
    sources: VecDeque<Source>,
    current: Option<Transfer>,
    retries: Retries,
    forgiven_at: u64,
    /// The registry encodes what it sends, and a range of encoded bytes is of no use.
    encoded: bool,
    pace: Pace,
}

/// Where the blob may come from.
enum Source {
    Registry(Candidate),
    /// A place outside of registries that the descriptor names; gets no credentials.
    Elsewhere(Url),
}

/// A running answer.
struct Transfer {
    body: Incoming,
    /// Bytes to drop, where the other side would not start in the middle.
    skip: u64,
    decoder: Option<Decoder>,
    _permit: Option<OwnedSemaphorePermit>,
}

/// Tells a slow connection from a dead one; time that the caller takes does not count.
struct Pace {
    waited: Duration,
    received: u64,
}

impl fmt::Debug for BlobReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobReader")
            .field("subject", &self.subject)
            .field("position", &self.position)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl BlobReader {
    pub(crate) async fn open(
        inner: Arc<Inner>,
        reference: &ImageReference,
        descriptor: &Descriptor,
        offset: u64,
    ) -> Result<Self, RegistryError> {
        let subject = format!("blob {} of {}", descriptor.digest, reference.repository());
        if offset > descriptor.size {
            let message = format!("cannot start at {offset}, it has {} bytes", descriptor.size);
            return Err(RegistryError::new(RegistryErrorKind::Protocol, subject, message));
        }
        let registries = inner.candidates(reference).into_iter().map(Source::Registry);
        let elsewhere = descriptor
            .urls
            .iter()
            .filter_map(|url| Url::parse(url))
            .filter(|url| !url.is_link_local());
        let mut reader = Self {
            sources: registries.chain(elsewhere.map(Source::Elsewhere)).collect(),
            retries: Retries::new(inner.timing),
            inner,
            subject,
            digest: descriptor.digest.clone(),
            size: descriptor.size,
            position: offset,
            current: None,
            forgiven_at: offset,
            encoded: false,
            pace: Pace { waited: Duration::ZERO, received: 0 },
        };
        // Errors that can be known at once are told at once.
        if reader.position < reader.size {
            reader.reopen().await.map_err(|error| reader.described(error))?;
        }
        Ok(reader)
    }

    /// Returns the number of bytes yielded so far, the starting offset included.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Returns the next bytes, or nothing once the whole blob has been yielded.
    ///
    /// # Errors
    /// When the connection broke too often, or the other side sends something else than was asked for.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, RegistryError> {
        match self.next().await {
            Ok(chunk) => Ok(chunk),
            Err(error) => {
                self.current = None;
                Err(self.described(error))
            }
        }
    }

    fn described(&self, error: RegistryError) -> RegistryError {
        error.about(self.subject.clone())
    }

    async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        loop {
            if self.position >= self.size {
                return self.finish().await.map(|()| None);
            }
            let Some(transfer) = &mut self.current else {
                self.reopen().await?;
                continue;
            };
            let started = Instant::now();
            let patience = self.inner.timing.stall.saturating_sub(self.pace.waited);
            let frame = tokio::time::timeout(patience, transfer.body.frame()).await;
            self.pace.waited += started.elapsed();
            let data = match frame {
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => data,
                    Err(_trailers) => continue,
                },
                Ok(Some(Err(error))) => {
                    self.broke(&chain_text(&error)).await?;
                    continue;
                }
                Ok(None) => {
                    self.broke("it ended early").await?;
                    continue;
                }
                Err(_) => {
                    self.broke("no data arrived for too long").await?;
                    continue;
                }
            };
            self.pace.received += data.len() as u64;
            if self.pace.received >= STALL_BYTES {
                self.pace = Pace { waited: Duration::ZERO, received: 0 };
            }
            let left = self.size - self.position;
            let data = match &mut transfer.decoder {
                None => data,
                Some(decoder) => decoder
                    .decode(&data, transfer.skip + left)
                    .map_err(|error| bad_encoding(&error))?,
            };
            let skipped = transfer.skip.min(data.len() as u64);
            transfer.skip -= skipped;
            // In range: `skipped` is at most the length.
            let data = data.slice(usize::try_from(skipped).unwrap_or(usize::MAX)..);
            if data.len() as u64 > left {
                return Err(too_long(self.size));
            }
            if data.is_empty() {
                continue;
            }
            self.position += data.len() as u64;
            if self.position - self.forgiven_at >= FORGIVING_BYTES {
                self.forgiven_at = self.position;
                self.retries.reset();
            }
            return Ok(Some(data));
        }
    }

    /// Looks at the end of the answer, so that surplus bytes are noticed and the connection can be used again.
    async fn finish(&mut self) -> Result<(), RegistryError> {
        let Some(mut transfer) = self.current.take() else { return Ok(()) };
        let rest = tokio::time::timeout(Duration::from_secs(1), transfer.body.frame()).await;
        let surplus = match rest {
            Ok(Some(Ok(frame))) => frame.into_data().unwrap_or_default(),
            // All bytes are here, so how the connection ends does not matter.
            _ => return Ok(()),
        };
        // The end of an encoded answer is a checksum.
        if surplus.is_empty() || transfer.decoder.is_some() {
            Ok(())
        } else {
            Err(too_long(self.size))
        }
    }

    async fn broke(&mut self, reason: &str) -> Result<(), RegistryError> {
        let message = format!(
            "the connection broke after {} of {} bytes: {reason}",
            self.position, self.size
        );
        let failure = RegistryError::new(RegistryErrorKind::Unreachable, "", message).transient();
        self.failed(failure).await
    }

    /// Waits before another attempt, or goes on to the next source.
    async fn failed(&mut self, failure: RegistryError) -> Result<(), RegistryError> {
        self.current = None;
        self.pace = Pace { waited: Duration::ZERO, received: 0 };
        let host = match self.sources.front() {
            Some(Source::Registry(candidate)) => self.inner.host(&candidate.authority)?,
            Some(Source::Elsewhere(url)) => self.inner.host(url.authority())?,
            None => return Err(failure),
        };
        let Err(failure) = self.retries.wait(failure, &host).await else { return Ok(()) };
        if self.sources.len() <= 1 {
            return Err(failure);
        }
        tracing::debug!(blob = self.subject, error = %failure, "going on at the next place");
        self.sources.pop_front();
        self.retries.reset();
        self.encoded = false;
        Ok(())
    }

    async fn reopen(&mut self) -> Result<(), RegistryError> {
        while self.current.is_none() {
            match self.request().await {
                Ok(transfer) => self.current = transfer,
                Err(failure) => self.failed(failure).await?,
            }
        }
        Ok(())
    }

    /// Makes one attempt; `None` asks for another at once.
    async fn request(&mut self) -> Result<Option<Transfer>, RegistryError> {
        let offset = if self.encoded { 0 } else { self.position };
        let ask = |url: Url, scopes: Scopes| {
            let ask = Ask::new(Method::GET, url, scopes).header(ACCEPT_ENCODING, "identity");
            if offset > 0 { ask.header(RANGE, &format!("bytes={offset}-")) } else { ask }
        };
        let (answer, permit) = match self.sources.front() {
            None => {
                return Err(RegistryError::new(
                    RegistryErrorKind::NotFound,
                    "",
                    "there is nowhere to ask",
                ));
            }
            Some(Source::Registry(candidate)) => {
                let endpoint = self.inner.endpoint(candidate).await?;
                let permit = endpoint.host.transfer().await;
                let ask =
                    ask(blob_url(&endpoint, &self.digest), Scopes::pull(&endpoint.repository));
                (self.inner.ask_once(&endpoint, &ask).await?, permit)
            }
            Some(Source::Elsewhere(url)) => {
                let permit = self.inner.host(url.authority())?.transfer().await;
                (self.inner.follow(&ask(url.clone(), Scopes::default()), None).await?, permit)
            }
        };
        let skip = match answer.status() {
            StatusCode::OK => self.position,
            StatusCode::PARTIAL_CONTENT => match content_range(&answer) {
                Some((start, total))
                    if start == offset && total.is_none_or(|total| total == self.size) =>
                {
                    0
                }
                _ => return Err(wrong_range(&answer, offset)),
            },
            StatusCode::RANGE_NOT_SATISFIABLE => return Err(wrong_range(&answer, offset)),
            _ => return Err(answer.into_error().await),
        };
        let announced = answer.header(CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok());
        let expected =
            if answer.status() == StatusCode::OK { self.size } else { self.size - offset };
        // Some storage says "gzip" of a blob that is a gzip file; the length tells.
        let encoding = answer.header(CONTENT_ENCODING).filter(|_| announced != Some(expected));
        let decoder = encoding.map(Decoder::new).transpose()?.flatten();
        if decoder.is_none() && announced.is_some_and(|announced| announced != expected) {
            let announced = announced.unwrap_or_default();
            let host = answer.url.authority();
            let message =
                format!("{host} has {announced} bytes for it, but the manifest says {expected}");
            return Err(RegistryError::new(RegistryErrorKind::Protocol, "", message));
        }
        if decoder.is_some() {
            self.encoded = true;
            if answer.status() == StatusCode::PARTIAL_CONTENT {
                return Ok(None);
            }
        }
        Ok(Some(Transfer { body: answer.body, skip, decoder, _permit: permit }))
    }
}

impl Inner {
    pub(crate) async fn has_blob(
        &self,
        reference: &ImageReference,
        digest: &Digest,
    ) -> Result<bool, RegistryError> {
        let subject = || format!("blob {digest} of {}", reference.repository());
        let ask = async {
            let endpoint = self.endpoint(&self.origin(reference)).await?;
            let scopes = Scopes::pull(&endpoint.repository);
            let answer = self
                .ask(&endpoint, &Ask::new(Method::HEAD, blob_url(&endpoint, digest), scopes))
                .await?;
            match answer.status() {
                status if status.is_success() => Ok(true),
                StatusCode::NOT_FOUND => Ok(false),
                _ => Err(answer.into_error().await),
            }
        };
        ask.await.map_err(|error: RegistryError| error.about(subject()))
    }
}

/// Returns where a blob is.
pub(crate) fn blob_url(endpoint: &Endpoint, digest: &Digest) -> Url {
    endpoint.url(&format!("blobs/{digest}"))
}

/// Reads `bytes 5-9/10`: the start, and the whole length where it is told.
fn content_range(answer: &Answer) -> Option<(u64, Option<u64>)> {
    parse_content_range(answer.header(CONTENT_RANGE)?)
}

fn parse_content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
    let (start, _) = range.split_once('-')?;
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    Some((start.trim().parse().ok()?, total))
}

fn wrong_range(answer: &Answer, offset: u64) -> RegistryError {
    let host = answer.url.authority();
    let range = answer.header(CONTENT_RANGE).unwrap_or("nothing");
    let message =
        format!("{host} was asked for the bytes from {offset} on and answered with {range:?}");
    RegistryError::new(RegistryErrorKind::Protocol, "", message)
}

fn too_long(size: u64) -> RegistryError {
    let message = format!("more than the {size} bytes that the manifest says were sent");
    RegistryError::new(RegistryErrorKind::Protocol, "", message)
}

fn bad_encoding(error: &std::io::Error) -> RegistryError {
    RegistryError::new(
        RegistryErrorKind::Protocol,
        "",
        format!("the answer's content encoding is damaged: {error}"),
    )
}

/// Undoes a content encoding, which is the web server's business and not part of the blob.
enum Decoder {
    Gzip(Box<flate2::write::MultiGzDecoder<Vec<u8>>>),
    Deflate(Box<flate2::write::ZlibDecoder<Vec<u8>>>),
    Zstd(Box<zstd::stream::write::Decoder<'static, Vec<u8>>>),
}

impl Decoder {
    fn new(encoding: &str) -> Result<Option<Self>, RegistryError> {
        Ok(match encoding.trim().to_ascii_lowercase().as_str() {
            "" | "identity" => None,
            "gzip" | "x-gzip" => {
                Some(Self::Gzip(Box::new(flate2::write::MultiGzDecoder::new(Vec::new()))))
            }
            "deflate" => Some(Self::Deflate(Box::new(flate2::write::ZlibDecoder::new(Vec::new())))),
            "zstd" => {
                let decoder = zstd::stream::write::Decoder::new(Vec::new())
                    .map_err(|error| bad_encoding(&error))?;
                Some(Self::Zstd(Box::new(decoder)))
            }
            other => {
                let message = format!("the content encoding {other:?} is not supported");
                return Err(RegistryError::new(RegistryErrorKind::Unsupported, "", message));
            }
        })
    }

    /// Decodes, and gives up soon after more than `limit` bytes came out.
    fn decode(&mut self, bytes: &[u8], limit: u64) -> std::io::Result<Bytes> {
        let mut decoded = Vec::new();
        for piece in bytes.chunks(DECODED_AT_ONCE) {
            match self {
                Self::Gzip(decoder) => {
                    decoder.write_all(piece)?;
                    decoder.flush()?;
                    decoded.append(decoder.get_mut());
                }
                Self::Deflate(decoder) => {
                    decoder.write_all(piece)?;
                    decoder.flush()?;
                    decoded.append(decoder.get_mut());
                }
                Self::Zstd(decoder) => {
                    decoder.write_all(piece)?;
                    decoder.flush()?;
                    decoded.append(decoder.get_mut());
                }
            }
            if decoded.len() as u64 > limit {
                break;
            }
        }
        Ok(decoded.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(parse_content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(parse_content_range("bytes 0-0/*"), Some((0, None)));
        for bad in ["", "bytes", "bytes */10", "bytes 5-9", "5-9/10", "bytes x-9/10", "bytes 5-9/y"]
        {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }
}
