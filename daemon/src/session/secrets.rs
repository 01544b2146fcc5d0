//! Secrets of the client.

use std::collections::BTreeMap;

use async_trait::async_trait;
use slipway_engine::solver::client::{SecretBytes, SecretProvider};
use slipway_engine::store::Error;
use slipway_spec::wire::MESSAGE_BYTES;
use slipway_spec::wire::secrets::GetSecretRequest;
use slipway_spec::wire::secrets::secrets_client::SecretsClient;

use super::{Session, SessionError, SessionGroup, absent};

impl Session {
    /// Asks for a secret. That the client has none, and that it offers no secrets at all, are errors of different kinds.
    ///
    /// # Errors
    /// When the client does not have the secret, or does not answer.
    pub async fn secret(&self, id: &str) -> Result<SecretBytes, SessionError> {
        let mut client =
            SecretsClient::new(self.channel()).max_decoding_message_size(MESSAGE_BYTES);
        let request = GetSecretRequest { id: id.to_owned(), annotations: BTreeMap::new() };
        match client.get_secret(request).await {
            Ok(response) => Ok(SecretBytes::new(response.into_inner().data)),
            Err(status) => Err(SessionError::from_status(subject(id), status)),
        }
    }
}

fn subject(id: &str) -> String {
    format!("cannot get secret {id} from the client")
}

#[async_trait]
impl SecretProvider for SessionGroup {
    async fn secret(&self, id: &str) -> Result<Option<SecretBytes>, Error> {
        let ask = move |session: Session| async move {
            session.secret(id).await.map(Some).or_else(absent)
        };
        Ok(self.find(&subject(id), ask).await?)
    }
}

#[cfg(test)]
mod tests {
    use slipway_spec::wire::secrets::GetSecretResponse;
    use slipway_spec::wire::secrets::secrets_server::{Secrets, SecretsServer};
    use tonic::{Request, Response, Status};

    use super::*;
    use crate::fake_client::FakeClient;
    use crate::session::{SessionErrorKind, SessionManager};

    struct Token;

    #[async_trait]
    impl Secrets for Token {
        async fn get_secret(
            &self,
            request: Request<GetSecretRequest>,
        ) -> Result<Response<GetSecretResponse>, Status> {
            match request.into_inner().id.as_str() {
                "token" => Ok(Response::new(GetSecretResponse { data: b"\0hush\xff"[..].into() })),
                "large" => Ok(Response::new(GetSecretResponse { data: vec![7; 8 << 20].into() })),
                "locked" => Err(Status::permission_denied("locked")),
                id => Err(Status::not_found(format!("secret {id} not found"))),
            }
        }
    }

    #[tokio::test]
    async fn secrets_come_from_the_client() {
        let manager = SessionManager::new();
        let _client =
            FakeClient::new("a").with(SecretsServer::new(Token), &[]).connect(&manager).await;
        let group = manager.group(["a".to_owned()]);
        let secret = SecretProvider::secret(&group, "token").await.unwrap().unwrap();
        assert_eq!(secret.expose(), b"\0hush\xff");
        let large = SecretProvider::secret(&group, "large").await.unwrap().unwrap();
        assert_eq!(large.expose().len(), 8 << 20);
        assert!(SecretProvider::secret(&group, "none").await.unwrap().is_none());
        let error = SecretProvider::secret(&group, "locked").await.unwrap_err();
        assert_eq!(error.to_string(), "cannot get secret locked from the client: locked");
    }

    #[tokio::test]
    async fn no_such_secret_is_not_the_same_as_no_secrets() {
        let manager = SessionManager::new();
        let _with =
            FakeClient::new("with").with(SecretsServer::new(Token), &[]).connect(&manager).await;
        let _without = FakeClient::new("without").connect(&manager).await;
        for (session, kind) in
            [("with", SessionErrorKind::NotFound), ("without", SessionErrorKind::Unsupported)]
        {
            let session = manager.get(session, super::super::WAIT).await.unwrap();
            assert_eq!(session.secret("none").await.unwrap_err().kind(), kind);
        }
        let group = manager.group(["without".to_owned(), "with".to_owned()]);
        assert!(SecretProvider::secret(&group, "none").await.unwrap().is_none());
        assert!(SecretProvider::secret(&group, "token").await.unwrap().is_some());
    }
}
