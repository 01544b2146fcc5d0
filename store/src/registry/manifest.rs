//! Names and the documents they point at.

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, Method, StatusCode};
use serde::Deserialize;
use serde::de::IgnoredAny;
use slipway_spec::manifest::MAX_MANIFEST_BYTES;
use slipway_spec::{Descriptor, Digest, ImageReference, MediaType};

use super::Inner;
use super::error::{RegistryError, RegistryErrorKind};
use super::exchange::{Ask, Endpoint};
use super::scope::Scopes;

/// What a registry says the digest of its answer is.
pub(crate) const DOCKER_CONTENT_DIGEST: &str = "docker-content-digest";

impl Inner {
    pub(crate) async fn resolve(
        &self,
        reference: &ImageReference,
    ) -> Result<Descriptor, RegistryError> {
        self.first_of(reference, |endpoint| self.resolve_at(endpoint, reference)).await
    }

    pub(crate) async fn manifest(
        &self,
        reference: &ImageReference,
        digest: Option<&Digest>,
    ) -> Result<(Descriptor, Bytes), RegistryError> {
        let expected = digest.or(reference.digest()).cloned();
        let subject = digest.map(|digest| reference.with_digest(digest.clone()));
        self.first_of(subject.as_ref().unwrap_or(reference), |endpoint| {
            self.manifest_at(endpoint, reference, expected.clone())
        })
        .await
    }

    /// Asks the mirrors and then the registry itself; the last one's failure is the one that counts.
    async fn first_of<T, F>(
        &self,
        reference: &ImageReference,
        mut ask: impl FnMut(Endpoint) -> F,
    ) -> Result<T, RegistryError>
    where
        F: Future<Output = Result<T, RegistryError>>,
    {
        let mut failure = None;
        for candidate in self.candidates(reference) {
            let result = match self.endpoint(&candidate).await {
                Ok(endpoint) => ask(endpoint).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(found) => return Ok(found),
                Err(error) => {
                    tracing::debug!(%reference, %error, "not from here");
                    failure = Some(error);
                }
            }
        }
        let failure = failure.unwrap_or_else(|| {
            RegistryError::new(RegistryErrorKind::NotFound, "", "there is no registry to ask")
        });
        Err(failure.about(reference.to_string()))
    }

    async fn resolve_at(
        &self,
        endpoint: Endpoint,
        reference: &ImageReference,
    ) -> Result<Descriptor, RegistryError> {
        let answer =
            self.ask(&endpoint, &manifest_ask(Method::HEAD, &endpoint, reference, None)).await?;
        match answer.status() {
            status if status.is_success() => {}
            // Some registries know HEAD for blobs only.
            StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::BAD_REQUEST
            | StatusCode::NOT_IMPLEMENTED => {
                return Ok(self
                    .manifest_at(endpoint, reference, reference.digest().cloned())
                    .await?
                    .0);
            }
            _ => return Err(answer.into_error().await),
        }
        let claimed = claimed_digest(&answer.parts.headers);
        let media_type = content_type(&answer.parts.headers).filter(is_document);
        let size = answer
            .header(CONTENT_LENGTH)
            .and_then(|text| text.parse::<u64>().ok())
            .filter(|size| *size > 0);
        if let (Some(claimed), Some(wanted)) = (&claimed, reference.digest())
            && claimed.algorithm() == wanted.algorithm()
            && claimed != wanted
        {
            return Err(wrong_digest(&endpoint, claimed, wanted));
        }
        match (reference.digest().cloned().or(claimed), media_type, size) {
            (Some(_), Some(_), Some(size)) if size > MAX_MANIFEST_BYTES => {
                let message = format!("the manifest is larger than {MAX_MANIFEST_BYTES} bytes");
                Err(RegistryError::new(RegistryErrorKind::TooLarge, "", message))
            }
            (Some(digest), Some(media_type), Some(size)) => {
                Ok(Descriptor::new(media_type, digest, size))
            }
            // What the head does not tell, the document does.
            _ => Ok(self.manifest_at(endpoint, reference, reference.digest().cloned()).await?.0),
        }
    }

    async fn manifest_at(
        &self,
        endpoint: Endpoint,
        reference: &ImageReference,
        expected: Option<Digest>,
    ) -> Result<(Descriptor, Bytes), RegistryError> {
        let ask = manifest_ask(Method::GET, &endpoint, reference, expected.as_ref());
        let (parts, bytes) = self.ask_document(&endpoint, &ask, MAX_MANIFEST_BYTES).await?;
        let wanted = expected.or_else(|| claimed_digest(&parts.headers));
        let digest = match wanted {
            None => Digest::of(&bytes),
            Some(wanted) => {
                let mut hasher = wanted.verifier();
                hasher.update(&bytes);
                let computed = hasher.finish();
                if computed != wanted {
                    return Err(wrong_digest(&endpoint, &computed, &wanted));
                }
                wanted
            }
        };
        let media_type = document_type(content_type(&parts.headers), &bytes)?;
        Ok((Descriptor::new(media_type, digest, bytes.len() as u64), bytes))
    }
}

fn manifest_ask(
    method: Method,
    endpoint: &Endpoint,
    reference: &ImageReference,
    digest: Option<&Digest>,
) -> Ask<'static> {
    let name = match digest.or(reference.digest()) {
        Some(digest) => digest.to_string(),
        None => reference.tag().unwrap_or("latest").to_owned(),
    };
    let mut ask = Ask::new(
        method,
        endpoint.url(&format!("manifests/{name}")),
        Scopes::pull(&endpoint.repository),
    );
    for accepted in [
        MediaType::OCI_INDEX,
        MediaType::OCI_MANIFEST,
        MediaType::DOCKER_INDEX,
        MediaType::DOCKER_MANIFEST,
    ] {
        ask = ask.header(ACCEPT, accepted.as_str());
    }
    ask.header(ACCEPT, "*/*;q=0.1")
}

/// Returns the `Content-Type` without its parameters.
fn content_type(headers: &HeaderMap) -> Option<MediaType> {
    let text = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    let text = text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    (!text.is_empty()).then(|| MediaType::new(text))
}

/// Whether a type is one that this client asked for, rather than what a web server says of any JSON.
fn is_document(media_type: &MediaType) -> bool {
    media_type.is_index() || media_type.is_manifest()
}

fn claimed_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get(DOCKER_CONTENT_DIGEST)?.to_str().ok()?.parse().ok()
}

/// The fields that tell documents apart.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    #[serde(default)]
    schema_version: u32,
    media_type: Option<MediaType>,
    manifests: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
    config: Option<IgnoredAny>,
}

/// Decides what a document is, from what the registry and the document itself say.
fn document_type(told: Option<MediaType>, bytes: &[u8]) -> Result<MediaType, RegistryError> {
    let protocol = |message: String| RegistryError::new(RegistryErrorKind::Protocol, "", message);
    let shape: Shape = serde_json::from_slice(bytes)
        .map_err(|error| protocol(format!("the manifest is not valid: {error}")))?;
    if shape.schema_version == 1 {
        let message = "Docker image manifest schema 1 is not supported; push the image again with a newer client";
        return Err(RegistryError::new(RegistryErrorKind::Unsupported, "", message));
    }
    let image = shape.layers.is_some() || shape.config.is_some();
    if image && shape.manifests.is_some() {
        // CVE-2021-41190.
        return Err(protocol("the manifest is ambiguous: it has both layers and manifests".into()));
    }
    let told =
        told.filter(|told| is_document(told) || told.as_str().starts_with("application/vnd."));
    match (shape.media_type, told) {
        (Some(inside), Some(told)) if inside != told => Err(protocol(format!(
            "the registry says the manifest is {told}, but it says itself it is {inside}"
        ))),
        (Some(kind), _) | (None, Some(kind)) => Ok(kind),
        (None, None) if shape.manifests.is_some() => Ok(MediaType::OCI_INDEX),
        (None, None) if image => Ok(MediaType::OCI_MANIFEST),
        (None, None) => Err(protocol("the answer is neither a manifest nor an index".into())),
    }
}

fn wrong_digest(endpoint: &Endpoint, found: &Digest, wanted: &Digest) -> RegistryError {
    let host = endpoint.host.authority();
    let message =
        format!("{host} sent a manifest with digest {found} instead of {wanted}; it was not used");
    RegistryError::new(RegistryErrorKind::Digest, "", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_what_both_sides_say() {
        let index = MediaType::OCI_INDEX;
        let read = |told: Option<&str>, body: &str| {
            document_type(told.map(MediaType::from), body.as_bytes()).map_err(|error| error.kind())
        };
        let typed = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#;
        assert_eq!(read(None, typed), Ok(index.clone()));
        assert_eq!(read(Some("application/json"), typed), Ok(index.clone()));
        assert_eq!(read(Some(index.as_str()), r#"{"manifests":[]}"#), Ok(index.clone()));
        assert_eq!(read(Some("text/plain"), r#"{"manifests":[]}"#), Ok(index));
        assert_eq!(read(None, r#"{"config":{},"layers":[]}"#), Ok(MediaType::OCI_MANIFEST));
        for (told, body, kind) in [
            (Some(MediaType::OCI_MANIFEST.as_str()), typed, RegistryErrorKind::Protocol),
            (None, r#"{"manifests":[],"layers":[]}"#, RegistryErrorKind::Protocol),
            (None, r#"{"manifests":[],"manifests":[]}"#, RegistryErrorKind::Protocol),
            (None, r#"{"schemaVersion":1}"#, RegistryErrorKind::Unsupported),
            (None, "{}", RegistryErrorKind::Protocol),
            (None, "<html>", RegistryErrorKind::Protocol),
        ] {
            assert_eq!(read(told, body), Err(kind), "{body}");
        }
    }
}
