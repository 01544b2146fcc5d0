//! Secrets, for steps that ask for them.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use slipway_solver::client::SecretProvider;
use slipway_solver::client::secret::MAX_SECRET;
use slipway_spec::wire::secrets::secrets_server::Secrets;
use slipway_spec::wire::secrets::{GetSecretRequest, GetSecretResponse};
use tonic::{Request, Response, Status};

pub(super) struct SecretsService(pub(super) Arc<dyn SecretProvider>);

#[async_trait]
impl Secrets for SecretsService {
    async fn get_secret(
        &self,
        request: Request<GetSecretRequest>,
    ) -> Result<Response<GetSecretResponse>, Status> {
        let id = request.into_inner().id;
        match self.0.secret(&id).await {
            Ok(Some(secret)) if secret.expose().len() > MAX_SECRET => {
                Err(Status::invalid_argument(format!(
                    "secret {id} is larger than {} KiB",
                    MAX_SECRET / 1024
                )))
            }
            Ok(Some(secret)) => Ok(Response::new(GetSecretResponse {
                data: Bytes::copy_from_slice(secret.expose()),
            })),
            Ok(None) => Err(Status::not_found(format!("secret {id} not found"))),
            Err(error) => Err(Status::unknown(error.to_string())),
        }
    }
}
