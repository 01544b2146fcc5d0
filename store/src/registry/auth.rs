//! Credentials and tokens (distribution specification, "Token Authentication" and "OAuth2").

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, StatusCode};
use serde::Deserialize;
use tokio::time::Instant;

use super::Inner;
use super::challenge::Challenge;
use super::error::{RegistryError, RegistryErrorKind};
use super::exchange::{Answer, Ask, Endpoint};
use super::retry::Retries;
use super::scope::Scopes;
use super::transport::Payload;
use super::url::{Scheme, Url, encode_component};

/// The largest reply of a token server.
const TOKEN_BYTES: u64 = 1024 * 1024;

/// What a token lives when its server does not say (distribution specification).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// A token is renewed this long before it runs out, so that it does not run out on its way.
const SKEW: Duration = Duration::from_secs(10);

/// No token is kept for longer, whatever is said of it.
const LONGEST_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Remembered tokens; past this, those that ran out are dropped.
const REMEMBERED_TOKENS: usize = 512;

/// The user name that goes with an identity token.
const TOKEN_USER: &str = "<token>";

/// A text that is never shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Returns the secret, to send it and for nothing else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// What proves who is asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// A name and a password.
    Basic {
        /// The name.
        username: String,
        /// The password.
        password: Secret,
    },
    /// A refresh token, which the token server turns into tokens.
    IdentityToken(Secret),
    /// A token that the registry itself takes.
    RegistryToken(Secret),
}

/// A token that somebody else got from the token server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The token.
    pub secret: Secret,
    /// How long it is good for from now on; one that has run out is still tried once.
    pub lifetime: Duration,
}

/// Knows credentials: a configuration file, or the client at the other end of a session.
///
/// When a registry wants a token, [`Self::token`] is asked for it first, so that whoever keeps the password may keep it
/// to itself. Only if that gives nothing is [`Self::credential`] asked for what to show to the token server. A registry
/// that wants a name and a password needs a credential in any case.
#[async_trait]
pub trait Credentials: Send + Sync + fmt::Debug {
    /// Returns the credential for a registry, or nothing to stay anonymous.
    ///
    /// `host` is the registry's `host[:port]`; for Docker Hub it is [`DOCKER_HUB_KEY`].
    ///
    /// # Errors
    /// When there may be a credential, but it cannot be read. The request then goes on without,
    /// and the reason is told if it is refused.
    async fn credential(&self, host: &str) -> Result<Option<Credential>, RegistryError>;

    /// Fetches a token for a registry, or nothing to have it fetched with [`Self::credential`], which is the default.
    ///
    /// `host` is as for [`Self::credential`], `realm` the whole URL of the token server, `service` what the registry
    /// calls itself there, and `scopes` has a text such as `repository:team/app:pull` for each resource.
    ///
    /// # Errors
    /// When there may be a token, but it cannot be had. No credential is asked for then. After
    /// [`RegistryErrorKind::Local`] the request goes on without any, and the reason is told if it is refused; all
    /// other kinds end it.
    #[expect(unused_variables, reason = "the names are part of the documentation")]
    async fn token(
        &self,
        host: &str,
        realm: &str,
        service: Option<&str>,
        scopes: &[String],
    ) -> Result<Option<Token>, RegistryError> {
        Ok(None)
    }
}

/// The name that credentials for Docker Hub are kept under, for historical reasons.
pub const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// Never has any credential.
#[derive(Clone, Copy, Debug, Default)]
pub struct Anonymous;

#[async_trait]
impl Credentials for Anonymous {
    async fn credential(&self, _: &str) -> Result<Option<Credential>, RegistryError> {
        Ok(None)
    }
}

/// An `Authorization` header.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Authorization(HeaderValue);

impl Authorization {
    fn basic(username: &str, password: &Secret) -> Option<Self> {
        Self::from_text(format!(
            "Basic {}",
            STANDARD.encode(format!("{username}:{}", password.expose()))
        ))
    }

    fn bearer(token: &Secret) -> Option<Self> {
        Self::from_text(format!("Bearer {}", token.expose()))
    }

    fn from_text(text: String) -> Option<Self> {
        let mut value = HeaderValue::try_from(text).ok()?;
        value.set_sensitive(true);
        Some(Self(value))
    }

    pub(crate) fn header(&self) -> HeaderValue {
        self.0.clone()
    }
}

/// What to do about a refusal.
pub(crate) enum Reaction {
    /// Ask once more with this.
    Send(Authorization),
    /// There is nothing better to send than what was refused; and why, where that is known.
    GiveUp(Option<String>),
}

/// What a registry asked for when it was first met, so that later requests need no refusal first.
#[derive(Clone)]
enum Known {
    Bearer { realm: String, service: Option<String> },
    Basic(Authorization),
}

struct HeldToken {
    authorization: Authorization,
    /// `None` is a token that the user gave, which lasts until it is refused.
    expires: Option<Instant>,
}

impl HeldToken {
    fn new(
        token: &Secret,
        since: Instant,
        lifetime: Duration,
        realm: &Url,
    ) -> Result<Self, RegistryError> {
        let token = Some(token).filter(|token| !token.expose().is_empty());
        let authorization = token.and_then(Authorization::bearer).ok_or_else(|| unusable(realm))?;
        // Its issuer's clock may be wrong, so life is counted here; a token is good for one
        // request however short it lives.
        let life = lifetime.saturating_sub(SKEW).min(LONGEST_LIFETIME);
        Ok(Self { authorization, expires: Some(since + life) })
    }

    fn is_fresh(&self) -> bool {
        self.expires.is_none_or(|expires| expires > Instant::now())
    }
}

/// The lock is held while a token is fetched, so that many requests fetch it once.
type Slot = Arc<tokio::sync::Mutex<Option<HeldToken>>>;

/// Everything learnt about who may do what where.
#[derive(Default)]
pub(crate) struct TokenCache {
    known: Mutex<HashMap<String, Known>>,
    slots: Mutex<HashMap<(String, Scopes), Slot>>,
}

impl TokenCache {
    fn known(&self, key: &str) -> Option<Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    fn learn(&self, key: &str, known: Known) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(key.into(), known);
    }

    fn slot(&self, key: &str, scopes: &Scopes) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= REMEMBERED_TOKENS {
            slots.retain(|_, slot| {
                // One that is locked is being used.
                slot.try_lock()
                    .map_or(true, |token| token.as_ref().is_some_and(HeldToken::is_fresh))
            });
        }
        Arc::clone(slots.entry((key.into(), scopes.clone())).or_default())
    }
}

/// Tokens and findings belong to an origin: the same host without TLS must not get them.
fn cache_key(endpoint: &Endpoint) -> String {
    format!("{}://{}", endpoint.scheme.as_str(), endpoint.host.authority())
}

impl Inner {
    /// Returns what to send with a request before being asked for it.
    pub(crate) async fn current_authorization(
        &self,
        endpoint: &Endpoint,
        scopes: &Scopes,
    ) -> Result<Option<Authorization>, RegistryError> {
        let key = cache_key(endpoint);
        match self.tokens.known(&key) {
            None => Ok(None),
            Some(Known::Basic(authorization)) => Ok(Some(authorization)),
            Some(Known::Bearer { realm, service }) => {
                let slot = self.tokens.slot(&key, scopes);
                let mut token = slot.lock().await;
                if let Some(token) = token.as_ref().filter(|token| token.is_fresh()) {
                    return Ok(Some(token.authorization.clone()));
                }
                let fresh = self.fetch_token(endpoint, &realm, service.as_deref(), scopes).await?;
                let authorization = fresh.authorization.clone();
                *token = Some(fresh);
                Ok(Some(authorization))
            }
        }
    }

    /// Answers a refusal.
    pub(crate) async fn authorize(
        &self,
        endpoint: &Endpoint,
        scopes: &Scopes,
        wanted: &[Challenge],
        rejected: Option<Authorization>,
    ) -> Result<Reaction, RegistryError> {
        let key = cache_key(endpoint);
        let mut why = None;
        for challenge in wanted {
            match challenge {
                Challenge::Bearer { realm, service, scope, error } => {
                    tracing::debug!(
                        host = endpoint.host.authority(),
                        realm,
                        error,
                        "the registry wants a token"
                    );
                    let slot = self.tokens.slot(&key, scopes);
                    let mut token = slot.lock().await;
                    if let Some(token) = token.as_ref().filter(|token| token.is_fresh())
                        && Some(&token.authorization) != rejected.as_ref()
                    {
                        return Ok(Reaction::Send(token.authorization.clone()));
                    }
                    let all = scope
                        .as_deref()
                        .map_or_else(|| scopes.clone(), |text| scopes.union(&Scopes::parse(text)));
                    let fresh = self.fetch_token(endpoint, realm, service.as_deref(), &all).await?;
                    self.tokens.learn(
                        &key,
                        Known::Bearer { realm: realm.clone(), service: service.clone() },
                    );
                    let authorization = fresh.authorization.clone();
                    let same = Some(&authorization) == rejected.as_ref();
                    *token = Some(fresh);
                    return Ok(if same {
                        Reaction::GiveUp(None)
                    } else {
                        Reaction::Send(authorization)
                    });
                }
                Challenge::Basic => {
                    let (credential, note) = self.credential(endpoint).await;
                    why = why.or(note);
                    let Some(Credential::Basic { username, password }) = credential else {
                        continue;
                    };
                    let Some(authorization) = Authorization::basic(&username, &password) else {
                        continue;
                    };
                    if Some(&authorization) == rejected.as_ref() {
                        continue;
                    }
                    self.tokens.learn(&key, Known::Basic(authorization.clone()));
                    return Ok(Reaction::Send(authorization));
                }
            }
        }
        Ok(Reaction::GiveUp(why))
    }

    /// Returns the credential, or why there is none to be had.
    async fn credential(&self, endpoint: &Endpoint) -> (Option<Credential>, Option<String>) {
        match self.credentials.credential(&endpoint.credentials_key).await {
            Ok(credential) => (credential, None),
            Err(error) => (None, Some(unreadable(endpoint, &error))),
        }
    }

    async fn fetch_token(
        &self,
        endpoint: &Endpoint,
        realm: &str,
        service: Option<&str>,
        scopes: &Scopes,
    ) -> Result<HeldToken, RegistryError> {
        let realm = self.check_realm(endpoint, realm)?;
        let asked_at = Instant::now();
        let fresh = self.fresh_token(endpoint, &realm, service, scopes).await?;
        match fresh.lifetime {
            Some(lifetime) => HeldToken::new(&fresh.secret, asked_at, lifetime, &realm),
            None => {
                let authorization = Authorization::bearer(&fresh.secret);
                let authorization = authorization.ok_or_else(|| unusable(&realm))?;
                Ok(HeldToken { authorization, expires: None })
            }
        }
    }

    /// Fetches a token for whoever speaks to the registry in place of this client, and may have no password of its own.
    ///
    /// `host` is as for [`Credentials::credential`].
    pub(crate) async fn token_for(
        &self,
        host: &str,
        realm: &str,
        service: Option<&str>,
        scopes: &[String],
    ) -> Result<Token, RegistryError> {
        let bad = || {
            let message = format!("{realm:?} is not the URL of a token server");
            RegistryError::new(RegistryErrorKind::Protocol, host, message)
        };
        let realm = Url::parse(realm).ok_or_else(bad)?;
        let endpoint = Endpoint {
            host: self.host(realm.authority())?,
            scheme: realm.scheme(),
            repository: String::new(),
            namespace: None,
            credentials_key: host.into(),
        };
        let scopes = Scopes::parse(&scopes.join(" "));
        let fresh = self.fresh_token(&endpoint, &realm, service, &scopes).await?;
        if fresh.secret.expose().is_empty() {
            return Err(unusable(&realm));
        }
        Ok(Token { secret: fresh.secret, lifetime: fresh.lifetime.unwrap_or(LONGEST_LIFETIME) })
    }

    async fn fresh_token(
        &self,
        endpoint: &Endpoint,
        realm: &Url,
        service: Option<&str>,
        scopes: &Scopes,
    ) -> Result<FreshToken, RegistryError> {
        let wanted: Vec<String> = scopes.iter().collect();
        let url = realm.to_uri()?.to_string();
        let ready = self.credentials.token(&endpoint.credentials_key, &url, service, &wanted).await;
        let (credential, note) = match ready {
            Ok(Some(token)) => {
                return Ok(FreshToken { secret: token.secret, lifetime: Some(token.lifetime) });
            }
            Ok(None) => self.credential(endpoint).await,
            Err(error) if error.kind() == RegistryErrorKind::Local => {
                (None, Some(unreadable(endpoint, &error)))
            }
            Err(error) => return Err(error),
        };
        if let Some(Credential::RegistryToken(token)) = credential {
            return Ok(FreshToken { secret: token, lifetime: None });
        }
        let request = TokenRequest { endpoint, realm, service, scopes };
        let answer = match &credential {
            None | Some(Credential::RegistryToken(_)) => self.token_by_get(&request, None).await?,
            Some(Credential::Basic { username, password }) => {
                let authorization = Authorization::basic(username, password);
                let answer = self.token_by_get(&request, authorization.as_ref()).await?;
                if answer.status() == StatusCode::METHOD_NOT_ALLOWED {
                    let grant = [
                        ("grant_type", "password"),
                        ("username", username),
                        ("password", password.expose()),
                    ];
                    self.token_by_post(&request, &grant).await?
                } else {
                    answer
                }
            }
            Some(Credential::IdentityToken(token)) => {
                let grant = [("grant_type", "refresh_token"), ("refresh_token", token.expose())];
                let answer = self.token_by_post(&request, &grant).await?;
                // Servers without the OAuth2 form answer it in one of these ways; some take the
                // same token as a password instead.
                if matches!(answer.status().as_u16(), 400 | 401 | 404 | 405) {
                    let authorization = Authorization::basic(TOKEN_USER, token);
                    let second = self.token_by_get(&request, authorization.as_ref()).await?;
                    if second.status().is_success() { second } else { answer }
                } else {
                    answer
                }
            }
        };
        if !answer.status().is_success() {
            let error = answer.into_error().await;
            return Err(match note {
                Some(note) => error.with_note(&note),
                None => error,
            });
        }
        let (_, body) = self.read_document(answer, TOKEN_BYTES).await?;
        let reply: TokenReply = serde_json::from_slice(&body).map_err(|_| unusable(realm))?;
        let secret = reply.token.or(reply.access_token).ok_or_else(|| unusable(realm))?;
        let lifetime = reply
            .expires_in
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            .unwrap_or(DEFAULT_LIFETIME);
        Ok(FreshToken { secret, lifetime: Some(lifetime) })
    }

    /// A registry says where its token server is, and so could send passwords anywhere.
    fn check_realm(&self, endpoint: &Endpoint, realm: &str) -> Result<Url, RegistryError> {
        let fail = |reason: String| {
            let message = format!("{} {reason}", endpoint.host.authority());
            RegistryError::new(RegistryErrorKind::Protocol, endpoint.host.authority(), message)
        };
        let base = Url::new(endpoint.scheme, endpoint.host.authority(), "/");
        let url = base
            .join(realm)
            .ok_or_else(|| fail("names a token server that is not an http URL".into()))?;
        if url.is_link_local() {
            return Err(fail(format!(
                "names the link-local address {} as its token server",
                url.authority()
            )));
        }
        let plain_from_tls = url.scheme() == Scheme::Http && endpoint.scheme == Scheme::Https;
        if plain_from_tls && !self.host(url.authority())?.allows_plain() {
            return Err(fail(format!(
                "names the token server {url}, which would get credentials without TLS"
            )));
        }
        Ok(url)
    }

    async fn token_by_get(
        &self,
        request: &TokenRequest<'_>,
        authorization: Option<&Authorization>,
    ) -> Result<Answer, RegistryError> {
        let mut url = request.realm.clone();
        if let Some(service) = request.service {
            url = url.with_query("service", service);
        }
        for scope in request.scopes.iter() {
            url = url.with_query("scope", &scope);
        }
        self.token_answer(
            request.endpoint,
            &Ask::new(Method::GET, url, Scopes::default()),
            authorization,
        )
        .await
    }

    async fn token_by_post(
        &self,
        request: &TokenRequest<'_>,
        grant: &[(&str, &str)],
    ) -> Result<Answer, RegistryError> {
        let scope = request.scopes.to_string();
        let common =
            [("client_id", "slipway"), ("access_type", "offline"), ("scope", scope.as_str())];
        let service = request.service.map(|service| ("service", service));
        let pairs = common.iter().copied().chain(service).chain(grant.iter().copied());
        let form: Vec<String> =
            pairs.map(|(name, value)| format!("{name}={}", encode_component(value))).collect();
        let mut ask = Ask::new(Method::POST, request.realm.clone(), Scopes::default())
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .payload(Payload::Bytes(Bytes::from(form.join("&"))));
        ask.confidential = true;
        self.token_answer(request.endpoint, &ask, None).await
    }

    async fn token_answer(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
        authorization: Option<&Authorization>,
    ) -> Result<Answer, RegistryError> {
        let mut retries = Retries::new(self.timing);
        loop {
            let failure = match self.follow(ask, authorization).await {
                Ok(answer) if super::error::is_transient_status(answer.status()) => {
                    answer.into_error().await
                }
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            retries.wait(failure, &endpoint.host).await.map_err(RegistryError::last)?;
        }
    }
}

/// A token as it came; one without a lifetime is the user's own.
struct FreshToken {
    secret: Secret,
    lifetime: Option<Duration>,
}

struct TokenRequest<'a> {
    endpoint: &'a Endpoint,
    realm: &'a Url,
    service: Option<&'a str>,
    scopes: &'a Scopes,
}

#[derive(Deserialize)]
struct TokenReply {
    token: Option<Secret>,
    access_token: Option<Secret>,
    // A whole number by the specification, but not everywhere.
    expires_in: Option<f64>,
}

/// Says why a request goes on without credentials.
fn unreadable(endpoint: &Endpoint, error: &RegistryError) -> String {
    tracing::warn!(host = endpoint.credentials_key, %error, "going on without credentials");
    format!("credentials could not be read: {error}")
}

fn unusable(realm: &Url) -> RegistryError {
    let message = format!("{} did not give a usable token", realm.authority());
    RegistryError::new(RegistryErrorKind::Protocol, realm.to_string(), message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        let basic = Credential::Basic { username: "me".into(), password: Secret::new("hunter2") };
        let identity = Credential::IdentityToken(Secret::new("hunter2"));
        let token = Token { secret: Secret::new("hunter2"), lifetime: Duration::ZERO };
        let shown = format!("{basic:?} {identity:?} {token:?}");
        assert!(shown.contains("me") && !shown.contains("hunter2"), "{shown}");
        let header = Authorization::basic("me", &Secret::new("hunter2")).unwrap().header();
        assert_eq!(header.to_str().unwrap(), "Basic bWU6aHVudGVyMg==");
        assert!(header.is_sensitive());
    }
}
