//! How large a blob is, asked of its registry.

use http::header::CONTENT_LENGTH;
use http::{Method, StatusCode};
use slipway_spec::{Digest, ImageReference};

use super::blob::blob_url;
use super::error::RegistryError;
use super::exchange::Ask;
use super::scope::Scopes;
use super::{Registry, RegistryErrorKind};

impl Registry {
    /// Returns the size of a blob at the registry that an image's name stands for.
    ///
    /// # Errors
    /// When there is no such blob, or the registry cannot be asked.
    pub async fn blob_size(
        &self,
        reference: &ImageReference,
        digest: &Digest,
    ) -> Result<u64, RegistryError> {
        let subject = || format!("blob {digest} of {}", reference.repository());
        let ask = async {
            let endpoint = self.inner.endpoint(&self.inner.origin(reference)).await?;
            let scopes = Scopes::pull(&endpoint.repository);
            let ask = Ask::new(Method::HEAD, blob_url(&endpoint, digest), scopes);
            let answer = self.inner.ask(&endpoint, &ask).await?;
            match answer.status() {
                status if status.is_success() => answer
                    .header(CONTENT_LENGTH)
                    .and_then(|text| text.parse().ok())
                    .ok_or_else(|| {
                        let message = "the registry does not tell its size";
                        RegistryError::new(RegistryErrorKind::Protocol, "", message)
                    }),
                StatusCode::NOT_FOUND => {
                    Err(RegistryError::new(RegistryErrorKind::NotFound, "", "not found"))
                }
                _ => Err(answer.into_error().await),
            }
        };
        ask.await.map_err(|error: RegistryError| error.about(subject()))
    }
}
