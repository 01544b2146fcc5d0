//! Blobs and manifests on their way to a registry.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, LOCATION};
use http::{Method, StatusCode};
use slipway_spec::{Descriptor, Digest, ImageReference, MediaType};

use super::blob::blob_url;
use super::error::{RegistryError, RegistryErrorKind};
use super::exchange::{Answer, Ask, Endpoint};
use super::manifest::DOCKER_CONTENT_DIGEST;
use super::retry::Retries;
use super::scope::Scopes;
use super::transport::Payload;
use super::url::{Scheme, Url};
use super::{Inner, Progress};

/// Repositories that are tried as the source of a mount; each costs a request.
const MOUNT_ATTEMPTS: usize = 3;

/// How a blob came to be in the registry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pushed {
    /// It was there.
    Existed,
    /// The registry took it from another of its repositories.
    Mounted,
    /// It was sent.
    Uploaded,
}

/// The name that a manifest is stored under.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ManifestName {
    /// A tag, which moves to the manifest.
    Tag(String),
    /// Its digest.
    Digest(Digest),
}

impl std::fmt::Display for ManifestName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// Uploads under way, so that whoever wants to send the same blob waits and then finds it there.
#[derive(Default)]
pub(crate) struct Uploads(Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>);

impl Uploads {
    fn turn(&self, key: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut uploads = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(turn) = uploads.get(key).and_then(Weak::upgrade) {
            return turn;
        }
        uploads.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::default();
        uploads.insert(key.into(), Arc::downgrade(&turn));
        turn
    }
}

/// A blob to be sent.
struct Upload<'a> {
    endpoint: &'a Endpoint,
    digest: &'a Digest,
    size: u64,
    file: &'a Path,
    mount_from: &'a [String],
    progress: Progress<'a>,
    scopes: Scopes,
}

impl Inner {
    pub(crate) async fn push_blob(
        &self,
        reference: &ImageReference,
        descriptor: &Descriptor,
        file: &Path,
        mount_from: &[String],
        progress: Progress<'_>,
    ) -> Result<Pushed, RegistryError> {
        let subject = || format!("blob {} for {}", descriptor.digest, reference.repository());
        let push = async {
            let endpoint = self.endpoint(&self.origin(reference)).await?;
            let key = format!("{} {}", reference.repository(), descriptor.digest);
            let turn = self.uploads.turn(&key);
            let _turn = turn.lock().await;
            let _permit = endpoint.host.transfer().await;
            let upload = Upload {
                scopes: Scopes::push(&endpoint.repository),
                endpoint: &endpoint,
                digest: &descriptor.digest,
                size: descriptor.size,
                file,
                mount_from,
                progress,
            };
            let mut retries = Retries::new(self.timing);
            loop {
                match self.push_once(&upload).await {
                    Ok(pushed) => return Ok(pushed),
                    // From the start: the upload may have got through although its answer did not.
                    Err(failure) => retries.wait(failure, &endpoint.host).await?,
                }
            }
        };
        push.await.map_err(|error: RegistryError| error.about(subject()))
    }

    async fn push_once(&self, upload: &Upload<'_>) -> Result<Pushed, RegistryError> {
        let endpoint = upload.endpoint;
        let head = Ask::new(Method::HEAD, blob_url(endpoint, upload.digest), upload.scopes.clone());
        let answer = self.ask_once(endpoint, &head).await?;
        match answer.status() {
            status if status.is_success() => return Ok(Pushed::Existed),
            // A HEAD has no body; the POST below gets the registry's reason.
            _ => drop(answer),
        }
        let mut session = None;
        for from in upload
            .mount_from
            .iter()
            .filter(|from| **from != endpoint.repository)
            .take(MOUNT_ATTEMPTS)
        {
            match self.mount(upload, from).await {
                Mount::Mounted => {
                    self.cancel(upload, session).await;
                    return Ok(Pushed::Mounted);
                }
                // That repository does not have it, so the registry has opened a session to send it.
                Mount::Session(location) => {
                    let earlier = session.replace(location);
                    self.cancel(upload, earlier).await;
                }
                Mount::Refused => {}
            }
        }
        let location = match session {
            Some(location) => location,
            None => self.start_upload(upload).await?,
        };
        self.send_blob(upload, location).await?;
        Ok(Pushed::Uploaded)
    }

    /// A mount is a shortcut: whatever goes wrong, the blob can still be sent.
    async fn mount(&self, upload: &Upload<'_>, from: &str) -> Mount {
        let url = uploads_url(upload.endpoint)
            .with_query("mount", &upload.digest.to_string())
            .with_query("from", from);
        let ask = Ask::new(Method::POST, url.clone(), upload.scopes.clone().with_pull(from));
        match self.ask_once(upload.endpoint, &ask).await {
            Ok(answer) if answer.status() == StatusCode::CREATED => Mount::Mounted,
            Ok(answer) if answer.status() == StatusCode::ACCEPTED => {
                session_location(upload.endpoint, &answer).map_or(Mount::Refused, Mount::Session)
            }
            Ok(answer) => {
                tracing::debug!(from, status = answer.status().as_u16(), "not mounted");
                Mount::Refused
            }
            Err(error) => {
                tracing::debug!(from, %error, "not mounted");
                Mount::Refused
            }
        }
    }

    /// Gives up a session that is not needed; one that stays behind only costs the registry some room.
    async fn cancel(&self, upload: &Upload<'_>, session: Option<Url>) {
        let Some(location) = session else { return };
        let ask = Ask::new(Method::DELETE, location, upload.scopes.clone());
        if let Err(error) = self.ask_once(upload.endpoint, &ask).await {
            tracing::debug!(%error, "could not give up an upload");
        }
    }

    async fn start_upload(&self, upload: &Upload<'_>) -> Result<Url, RegistryError> {
        let ask = Ask::new(Method::POST, uploads_url(upload.endpoint), upload.scopes.clone());
        let answer = self.ask_once(upload.endpoint, &ask).await?;
        if answer.status() != StatusCode::ACCEPTED {
            return Err(unexpected(answer).await);
        }
        session_location(upload.endpoint, &answer).ok_or_else(|| {
            let host = answer.url.authority();
            let message = format!("{host} accepted an upload without saying where to send it");
            RegistryError::new(RegistryErrorKind::Protocol, "", message)
        })
    }

    async fn send_blob(&self, upload: &Upload<'_>, location: Url) -> Result<(), RegistryError> {
        check_length(upload).await?;
        let url = location.with_query("digest", &upload.digest.to_string());
        let payload = match upload.size {
            0 => Payload::Empty,
            size => Payload::File { path: upload.file, size, progress: upload.progress },
        };
        let ask = Ask::new(Method::PUT, url, upload.scopes.clone())
            .header(CONTENT_TYPE, "application/octet-stream")
            .payload(payload);
        let answer = self.ask_once(upload.endpoint, &ask).await?;
        match answer.status() {
            StatusCode::CREATED | StatusCode::OK | StatusCode::NO_CONTENT => {
                check_echo(&answer, upload.digest)
            }
            // The session is gone, which a new one cures.
            StatusCode::NOT_FOUND | StatusCode::CONFLICT | StatusCode::RANGE_NOT_SATISFIABLE => {
                Err(answer.into_error().await.transient())
            }
            _ => Err(unexpected(answer).await),
        }
    }

    pub(crate) async fn push_manifest(
        &self,
        reference: &ImageReference,
        name: &ManifestName,
        media_type: &MediaType,
        bytes: Bytes,
    ) -> Result<(), RegistryError> {
        let subject = || match name {
            ManifestName::Tag(tag) => format!("{}:{tag}", reference.repository()),
            ManifestName::Digest(digest) => format!("{}@{digest}", reference.repository()),
        };
        let push = async {
            let endpoint = self.endpoint(&self.origin(reference)).await?;
            let digest = match name {
                ManifestName::Digest(digest) => digest.clone(),
                ManifestName::Tag(_) => Digest::of(&bytes),
            };
            let ask = Ask::new(
                Method::PUT,
                endpoint.url(&format!("manifests/{name}")),
                Scopes::push(&endpoint.repository),
            )
            .header(CONTENT_TYPE, media_type.as_str())
            .payload(Payload::Bytes(bytes));
            let answer = self.ask(&endpoint, &ask).await?;
            match answer.status() {
                StatusCode::CREATED
                | StatusCode::OK
                | StatusCode::ACCEPTED
                | StatusCode::NO_CONTENT => check_echo(&answer, &digest),
                _ => Err(unexpected(answer).await),
            }
        };
        push.await.map_err(|error: RegistryError| error.about(subject()))
    }
}

enum Mount {
    Mounted,
    Session(Url),
    Refused,
}

fn uploads_url(endpoint: &Endpoint) -> Url {
    endpoint.url("blobs/uploads/")
}

/// Returns where to send a blob. Each answer names the place anew, and the last one counts.
fn session_location(endpoint: &Endpoint, answer: &Answer) -> Option<Url> {
    let location = answer.url.join(answer.header(LOCATION)?)?;
    // A registry behind a proxy that ends TLS often does not know that it is spoken to with it.
    let forgot_tls = endpoint.scheme == Scheme::Https
        && location.scheme() == Scheme::Http
        && location.authority() == endpoint.host.authority();
    Some(if forgot_tls { location.with_scheme(Scheme::Https) } else { location })
}

/// A file of another length would make a request that never ends, or a blob that is refused at its end.
async fn check_length(upload: &Upload<'_>) -> Result<(), RegistryError> {
    let fail = |message: String| RegistryError::new(RegistryErrorKind::Local, "", message);
    let path = upload.file.display();
    let metadata = tokio::fs::metadata(upload.file).await.map_err(|error| {
        fail(format!("cannot read {path} to send it: {error}")).with_source(error)
    })?;
    if metadata.len() != upload.size {
        return Err(fail(format!(
            "{path} has {} bytes instead of {}",
            metadata.len(),
            upload.size
        )));
    }
    Ok(())
}

/// A registry that names another digest than was sent has stored something else.
fn check_echo(answer: &Answer, sent: &Digest) -> Result<(), RegistryError> {
    let echoed = answer.header(DOCKER_CONTENT_DIGEST).and_then(|text| text.parse::<Digest>().ok());
    match echoed {
        Some(echoed) if echoed.algorithm() == sent.algorithm() && echoed != *sent => {
            let message =
                format!("{} stored it as {echoed} instead of {sent}", answer.url.authority());
            Err(RegistryError::new(RegistryErrorKind::Digest, "", message))
        }
        _ => Ok(()),
    }
}

/// Describes an answer that is an error, or a success that makes no sense here.
async fn unexpected(answer: Answer) -> RegistryError {
    if answer.status().is_success() {
        let message = format!(
            "{} answered {} where that is not allowed",
            answer.url.authority(),
            answer.status()
        );
        return RegistryError::new(RegistryErrorKind::Protocol, "", message);
    }
    answer.into_error().await
}
