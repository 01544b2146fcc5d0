//! Registry credentials of the client.

use std::time::Duration;

use async_trait::async_trait;
use slipway_engine::store::registry::{
    Credential, Credentials, DOCKER_HUB_KEY, RegistryError, RegistryErrorKind, Secret,
};
use slipway_spec::wire::auth::CredentialsRequest;
use slipway_spec::wire::auth::auth_client::AuthClient;
use tokio::time::timeout;
use tonic::Status;

use super::{Session, SessionError, SessionGroup, absent};

/// What the client may take: it may have to ask its user to unlock a keychain.
const PATIENCE: Duration = Duration::from_secs(60);

/// The name that clients know Docker Hub by; they turn it into the one that credentials are kept under.
const DOCKER_HUB_API: &str = "registry-1.docker.io";

impl Session {
    /// Asks for the credential of a registry, by `host[:port]`; `None` is to stay anonymous.
    ///
    /// # Errors
    /// When the client has no credentials to give, cannot read them, or does not answer.
    pub async fn credential(&self, host: &str) -> Result<Option<Credential>, SessionError> {
        let host = if host == DOCKER_HUB_KEY { DOCKER_HUB_API } else { host };
        let request = CredentialsRequest { host: host.to_owned() };
        let mut client = AuthClient::new(self.channel());
        let answer = timeout(PATIENCE, client.credentials(request)).await.unwrap_or_else(|_| {
            Err(Status::deadline_exceeded(format!("no answer in {} s", PATIENCE.as_secs())))
        });
        let answer = answer.map_err(|status| SessionError::from_status(subject(host), status))?;
        let answer = answer.into_inner();
        Ok(match (answer.username, answer.secret) {
            (_, secret) if secret.is_empty() => None,
            (username, token) if username.is_empty() => {
                Some(Credential::IdentityToken(Secret::new(token)))
            }
            (username, password) => {
                Some(Credential::Basic { username, password: Secret::new(password) })
            }
        })
    }
}

fn subject(host: &str) -> String {
    format!("cannot get credentials for {host} from the client")
}

#[async_trait]
impl Credentials for SessionGroup {
    async fn credential(&self, host: &str) -> Result<Option<Credential>, RegistryError> {
        // Whoever builds without a session is anonymous.
        if self.ids().is_empty() {
            return Ok(None);
        }
        let ask =
            move |session: Session| async move { session.credential(host).await.or_else(absent) };
        self.find(&subject(host), ask).await.map_err(|error| {
            RegistryError::new(RegistryErrorKind::Local, error.subject(), error.message())
        })
    }
}

#[cfg(test)]
mod tests {
    use slipway_spec::wire::auth::auth_server::{Auth, AuthServer};
    use slipway_spec::wire::auth::{
        CredentialsResponse, FetchTokenRequest, FetchTokenResponse, GetTokenAuthorityRequest,
        GetTokenAuthorityResponse, VerifyTokenAuthorityRequest, VerifyTokenAuthorityResponse,
    };
    use tonic::{Request, Response};

    use super::*;
    use crate::fake_client::FakeClient;
    use crate::session::SessionManager;

    /// Knows a password, an identity token, nothing, and a keychain that fails.
    struct Keychain;

    #[async_trait]
    impl Auth for Keychain {
        async fn credentials(
            &self,
            request: Request<CredentialsRequest>,
        ) -> Result<Response<CredentialsResponse>, Status> {
            let (username, secret) = match request.into_inner().host.as_str() {
                "registry-1.docker.io" => ("me", "hub"),
                "localhost:5000" => ("", "identity"),
                "locked" => return Err(Status::unknown("the keychain is locked")),
                _ => ("", ""),
            };
            Ok(Response::new(CredentialsResponse {
                username: username.into(),
                secret: secret.into(),
            }))
        }

        async fn fetch_token(
            &self,
            _: Request<FetchTokenRequest>,
        ) -> Result<Response<FetchTokenResponse>, Status> {
            Err(Status::unimplemented(""))
        }

        async fn get_token_authority(
            &self,
            _: Request<GetTokenAuthorityRequest>,
        ) -> Result<Response<GetTokenAuthorityResponse>, Status> {
            Err(Status::unimplemented(""))
        }

        async fn verify_token_authority(
            &self,
            _: Request<VerifyTokenAuthorityRequest>,
        ) -> Result<Response<VerifyTokenAuthorityResponse>, Status> {
            Err(Status::unimplemented(""))
        }
    }

    #[tokio::test]
    async fn credentials_come_from_the_client() {
        let manager = SessionManager::new();
        let _client =
            FakeClient::new("a").with(AuthServer::new(Keychain), &[]).connect(&manager).await;
        let group = manager.group(["a".to_owned()]);
        let asked = async |host: &str| Credentials::credential(&group, host).await;
        assert_eq!(
            asked(DOCKER_HUB_KEY).await.unwrap(),
            Some(Credential::Basic { username: "me".into(), password: Secret::new("hub") })
        );
        assert_eq!(
            asked("localhost:5000").await.unwrap(),
            Some(Credential::IdentityToken(Secret::new("identity")))
        );
        assert_eq!(asked("quay.io").await.unwrap(), None);
        let error = asked("locked").await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot get credentials for locked from the client: the keychain is locked"
        );
    }

    #[tokio::test]
    async fn without_session_or_service_one_is_anonymous() {
        let manager = SessionManager::new();
        let nobody = manager.group([String::new()]);
        assert_eq!(Credentials::credential(&nobody, "quay.io").await.unwrap(), None);
        let _client = FakeClient::new("a").connect(&manager).await;
        let group = manager.group(["a".to_owned()]);
        assert_eq!(Credentials::credential(&group, "quay.io").await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_second_client_is_asked_when_the_first_one_has_none() {
        let manager = SessionManager::new();
        let _none = FakeClient::new("a").connect(&manager).await;
        let _some =
            FakeClient::new("b").with(AuthServer::new(Keychain), &[]).connect(&manager).await;
        let group = manager.group(["a".to_owned(), "b".to_owned()]);
        assert!(Credentials::credential(&group, DOCKER_HUB_KEY).await.unwrap().is_some());
    }
}
