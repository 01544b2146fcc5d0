//! Credentials for registries, and tokens that are fetched here so that passwords stay here.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use ring::hmac;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use slipway_spec::wire::auth::auth_server::Auth;
use slipway_spec::wire::auth::{
    CredentialsRequest, CredentialsResponse, FetchTokenRequest, FetchTokenResponse,
    GetTokenAuthorityRequest, GetTokenAuthorityResponse, VerifyTokenAuthorityRequest,
    VerifyTokenAuthorityResponse,
};
use slipway_store::registry::{
    Credential, Credentials, DOCKER_HUB_KEY, Registry, RegistryErrorKind,
};
use tonic::{Request, Response, Status};

/// The name that daemons know Docker Hub by.
const DOCKER_HUB_API: &str = "registry-1.docker.io";

/// A daemon proves that it speaks for the same client with this many bytes; many more are no proof but a request to
/// sign a document.
const MAX_PAYLOAD: usize = 1024;

/// What a client has to log in with.
#[derive(Clone)]
pub struct RegistryLogin {
    /// The credentials.
    pub credentials: Arc<dyn Credentials>,
    /// Fetches tokens with them; without it the daemon gets the passwords.
    pub registry: Option<Registry>,
}

impl fmt::Debug for RegistryLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryLogin")
            .field("fetches", &self.registry.is_some())
            .finish_non_exhaustive()
    }
}

pub(super) struct Keychain {
    login: RegistryLogin,
    /// Mixed into keys, so that a daemon that chooses the salt learns nothing of a password.
    seed: [u8; 32],
}

/// Returns the name that credentials are kept under.
fn kept_under(host: &str) -> &str {
    if host == DOCKER_HUB_API { DOCKER_HUB_KEY } else { host }
}

impl Keychain {
    pub(super) fn new(login: RegistryLogin) -> Self {
        let mut seed = [0; 32];
        // The kernel has randomness from the moment that it starts programs.
        let filled = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty());
        debug_assert_eq!(filled, Ok(seed.len()));
        Self { login, seed }
    }

    async fn credential(&self, host: &str) -> Result<Option<Credential>, Status> {
        let found = self.login.credentials.credential(kept_under(host)).await;
        found.map_err(|error| Status::unknown(error.to_string()))
    }

    /// Returns the key that stands for the credentials of a registry with one daemon. Whoever has none has the same key
    /// as everybody else.
    async fn key(&self, host: &str, salt: &[u8]) -> Result<Ed25519KeyPair, Status> {
        if self.login.registry.is_none() {
            return Err(Status::unavailable("client side tokens disabled"));
        }
        let mut mac = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, salt));
        if self.credential(host).await?.is_some() {
            mac.update(&self.seed);
            mac.update(host.as_bytes());
        }
        let key = Ed25519KeyPair::from_seed_unchecked(mac.sign().as_ref());
        key.map_err(|_| Status::internal("cannot make a key"))
    }
}

#[async_trait]
impl Auth for Keychain {
    async fn credentials(
        &self,
        request: Request<CredentialsRequest>,
    ) -> Result<Response<CredentialsResponse>, Status> {
        let (username, secret) = match self.credential(&request.get_ref().host).await? {
            Some(Credential::Basic { username, password }) => {
                (username, password.expose().to_owned())
            }
            Some(Credential::IdentityToken(token)) => (String::new(), token.expose().to_owned()),
            // It is no password, and is given out as a token only.
            Some(Credential::RegistryToken(_)) | None => (String::new(), String::new()),
        };
        Ok(Response::new(CredentialsResponse { username, secret }))
    }

    async fn fetch_token(
        &self,
        request: Request<FetchTokenRequest>,
    ) -> Result<Response<FetchTokenResponse>, Status> {
        let FetchTokenRequest { host, realm, service, scopes, .. } = request.into_inner();
        let Some(registry) = &self.login.registry else {
            return Err(Status::unavailable("client side tokens disabled"));
        };
        let service = Some(service.as_str()).filter(|service| !service.is_empty());
        let token = registry.token(kept_under(&host), &realm, service, &scopes).await;
        let token = token.map_err(|error| {
            let text = format!("failed to fetch oauth token: {error}");
            match error.kind() {
                RegistryErrorKind::Unauthorized => Status::unauthenticated(text),
                RegistryErrorKind::Denied => Status::permission_denied(text),
                _ => Status::unknown(text),
            }
        })?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Response::new(FetchTokenResponse {
            token: token.secret.expose().to_owned(),
            expires_in: i64::try_from(token.lifetime.as_secs()).unwrap_or(i64::MAX).max(1),
            issued_at: i64::try_from(now.as_secs()).unwrap_or(0),
        }))
    }

    async fn get_token_authority(
        &self,
        request: Request<GetTokenAuthorityRequest>,
    ) -> Result<Response<GetTokenAuthorityResponse>, Status> {
        let GetTokenAuthorityRequest { host, salt } = request.into_inner();
        let key = self.key(&host, &salt).await?;
        let public_key = key.public_key().as_ref().to_vec().into();
        Ok(Response::new(GetTokenAuthorityResponse { public_key }))
    }

    async fn verify_token_authority(
        &self,
        request: Request<VerifyTokenAuthorityRequest>,
    ) -> Result<Response<VerifyTokenAuthorityResponse>, Status> {
        let VerifyTokenAuthorityRequest { host, payload, salt } = request.into_inner();
        if payload.len() > MAX_PAYLOAD {
            return Err(Status::invalid_argument("too much to sign"));
        }
        let key = self.key(&host, &salt).await?;
        let signed = [key.sign(&payload).as_ref(), &payload].concat();
        Ok(Response::new(VerifyTokenAuthorityResponse { signed: signed.into() }))
    }
}

#[cfg(test)]
mod tests {
    use ring::signature::{ED25519, UnparsedPublicKey};
    use slipway_store::registry::{RegistryError, RegistryOptions, Secret};

    use super::*;

    #[derive(Debug)]
    struct Known;

    #[async_trait]
    impl Credentials for Known {
        async fn credential(&self, host: &str) -> Result<Option<Credential>, RegistryError> {
            let password = Secret::new("hush");
            Ok(match host {
                DOCKER_HUB_KEY => Some(Credential::Basic { username: "me".into(), password }),
                "identity" => Some(Credential::IdentityToken(password)),
                "token" => Some(Credential::RegistryToken(password)),
                "locked" => {
                    return Err(RegistryError::new(RegistryErrorKind::Local, "keychain", "locked"));
                }
                _ => None,
            })
        }
    }

    fn keychain() -> Keychain {
        let credentials: Arc<dyn Credentials> = Arc::new(Known);
        let registry = Registry::new(RegistryOptions::default(), credentials.clone()).unwrap();
        Keychain::new(RegistryLogin { credentials, registry: Some(registry) })
    }

    #[tokio::test]
    async fn credentials_are_found_under_the_name_of_the_daemon() {
        let keychain = keychain();
        let ask = async |host: &str| {
            let request = Request::new(CredentialsRequest { host: host.into() });
            let answer = keychain.credentials(request).await.map(Response::into_inner);
            answer.map(|answer| (answer.username, answer.secret))
        };
        let pair = |name: &str, secret: &str| (name.to_owned(), secret.to_owned());
        assert_eq!(ask(DOCKER_HUB_API).await.unwrap(), pair("me", "hush"));
        assert_eq!(ask("identity").await.unwrap(), pair("", "hush"));
        assert_eq!(ask("token").await.unwrap(), pair("", ""));
        assert_eq!(ask("nobody").await.unwrap(), pair("", ""));
        assert!(ask("locked").await.unwrap_err().message().contains("locked"));
    }

    #[tokio::test]
    async fn a_key_stands_for_credentials_and_daemon() {
        let keychain = keychain();
        let key = async |host: &str, salt: &[u8]| {
            let request =
                GetTokenAuthorityRequest { host: host.into(), salt: salt.to_vec().into() };
            let answer = keychain.get_token_authority(Request::new(request)).await;
            answer.unwrap().into_inner().public_key
        };
        let mine = key(DOCKER_HUB_API, b"s").await;
        assert_eq!(mine.len(), 32);
        assert_eq!(mine, key(DOCKER_HUB_API, b"s").await);
        assert_ne!(mine, key(DOCKER_HUB_API, b"t").await);
        assert_ne!(mine, key("identity", b"s").await);
        assert_eq!(key("nobody", b"s").await, key("nothing", b"s").await);
        let request = |payload: Vec<u8>| {
            Request::new(VerifyTokenAuthorityRequest {
                host: DOCKER_HUB_API.into(),
                payload: payload.into(),
                salt: b"s"[..].into(),
            })
        };
        let answer = keychain.verify_token_authority(request(vec![7; 32])).await.unwrap();
        let signed = answer.into_inner().signed;
        assert_eq!(signed[64..], [7; 32]);
        UnparsedPublicKey::new(&ED25519, &mine).verify(&[7; 32], &signed[..64]).unwrap();
        assert!(keychain.verify_token_authority(request(vec![7; 5000])).await.is_err());
    }

    #[tokio::test]
    async fn without_tokens_the_daemon_is_told_to_ask_for_the_password() {
        let login = RegistryLogin { credentials: Arc::new(Known), registry: None };
        let request = GetTokenAuthorityRequest { host: "h".into(), salt: b"s"[..].into() };
        let status = Keychain::new(login).get_token_authority(Request::new(request)).await;
        assert_eq!(status.unwrap_err().code(), tonic::Code::Unavailable);
    }
}
