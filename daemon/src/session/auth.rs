//! Registry credentials of the client, and tokens that it fetches so that its passwords stay with it.

use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use slipway_engine::store::registry::{
    Credential, Credentials, DOCKER_HUB_KEY, RegistryError, RegistryErrorKind, Secret, Token,
};
use slipway_spec::wire::auth::auth_client::AuthClient;
use slipway_spec::wire::auth::{
    CredentialsRequest, FetchTokenRequest, FetchTokenResponse, GetTokenAuthorityRequest,
};
use tokio::time::timeout;
use tonic::{Code, Response, Status};

use super::{Session, SessionError, SessionErrorKind, SessionGroup, absent};

/// What the client may take: it may have to ask its user to unlock a keychain.
const PATIENCE: Duration = Duration::from_secs(60);

/// The name that clients know Docker Hub by; they turn it into the one that credentials are kept under.
const DOCKER_HUB_API: &str = "registry-1.docker.io";

/// What clients tell token servers that asks: the name that they know from BuildKit.
const CLIENT_ID: &str = "buildkit-client";

/// The size of the key that stands for a client's credentials: Ed25519.
const KEY_BYTES: usize = 32;

/// What a token lives when the client does not say.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

impl Session {
    /// Asks for the credential of a registry, by `host[:port]`; `None` is to stay anonymous.
    ///
    /// # Errors
    /// When the client has no credentials to give, cannot read them, or does not answer.
    pub async fn credential(&self, host: &str) -> Result<Option<Credential>, SessionError> {
        let host = client_name(host);
        let request = CredentialsRequest { host: host.to_owned() };
        let mut client = AuthClient::new(self.channel());
        let answer = patiently(client.credentials(request)).await;
        let answer = answer.map_err(|status| SessionError::from_status(subject(host), status))?;
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

    /// Tells whether the client fetches the tokens of a registry itself. Then it must not be asked for its password.
    ///
    /// # Errors
    /// When the client cannot read its credentials, does not answer, or answers with something that is no key.
    pub async fn fetches_tokens(&self, host: &str) -> Result<bool, SessionError> {
        let host = client_name(host);
        let request =
            GetTokenAuthorityRequest { host: host.to_owned(), salt: salt().to_vec().into() };
        let mut client = AuthClient::new(self.channel());
        match patiently(client.get_token_authority(request)).await {
            Ok(answer) if answer.public_key.len() == KEY_BYTES => Ok(true),
            Ok(answer) => Err(SessionError::new(
                SessionErrorKind::Protocol,
                token_subject(host),
                format!("its key has {} bytes instead of {KEY_BYTES}", answer.public_key.len()),
            )),
            // The second is what clients answer that were told not to.
            Err(status) if matches!(status.code(), Code::Unimplemented | Code::Unavailable) => {
                Ok(false)
            }
            Err(status) => Err(SessionError::from_status(token_subject(host), status)),
        }
    }

    /// Has the client fetch a token of a registry, by `host[:port]`.
    ///
    /// # Errors
    /// When the token server refuses the client, or the client does not answer.
    pub async fn fetch_token(
        &self,
        host: &str,
        realm: &str,
        service: Option<&str>,
        scopes: &[String],
    ) -> Result<Token, SessionError> {
        let host = client_name(host);
        let request = FetchTokenRequest {
            client_id: CLIENT_ID.to_owned(),
            host: host.to_owned(),
            realm: realm.to_owned(),
            service: service.unwrap_or_default().to_owned(),
            scopes: scopes.to_vec(),
        };
        let mut client = AuthClient::new(self.channel());
        let answer = patiently(client.fetch_token(request)).await;
        let answer =
            answer.map_err(|status| SessionError::from_status(token_subject(host), status))?;
        let lifetime = lifetime(&answer, SystemTime::now());
        Ok(Token { secret: Secret::new(answer.token), lifetime })
    }
}

/// Returns the name that clients know a registry by.
fn client_name(host: &str) -> &str {
    if host == DOCKER_HUB_KEY { DOCKER_HUB_API } else { host }
}

async fn patiently<T>(
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Status> {
    let answer = timeout(PATIENCE, call).await.unwrap_or_else(|_| {
        Err(Status::deadline_exceeded(format!("no answer in {} s", PATIENCE.as_secs())))
    });
    answer.map(Response::into_inner)
}

/// Returns what clients mix into their keys, so that a key means nothing to another daemon.
fn salt() -> &'static [u8; 32] {
    static SALT: OnceLock<[u8; 32]> = OnceLock::new();
    SALT.get_or_init(slipway_engine::id::random)
}

/// Returns how long a token is still good for. The client may have had it for a while; a clock that runs ahead of this
/// one's does not make it younger than new.
fn lifetime(answer: &FetchTokenResponse, now: SystemTime) -> Duration {
    let seconds =
        |number| u64::try_from(number).ok().filter(|number| *number > 0).map(Duration::from_secs);
    let whole = seconds(answer.expires_in).unwrap_or(DEFAULT_LIFETIME);
    let issued = seconds(answer.issued_at).and_then(|at| SystemTime::UNIX_EPOCH.checked_add(at));
    let age = issued.and_then(|issued| now.duration_since(issued).ok()).unwrap_or_default();
    whole.saturating_sub(age)
}

fn subject(host: &str) -> String {
    format!("cannot get credentials for {host} from the client")
}

fn token_subject(host: &str) -> String {
    format!("cannot get a token for {host} from the client")
}

/// Describes why it is not known whether the client fetches tokens.
fn unreadable(error: &SessionError) -> RegistryError {
    let kind = match error.kind() {
        SessionErrorKind::Protocol => RegistryErrorKind::Protocol,
        // As for credentials that cannot be read: they may not be needed.
        _ => RegistryErrorKind::Local,
    };
    RegistryError::new(kind, error.subject(), error.message())
}

/// Describes why a client that fetches tokens has not fetched one.
fn refused(error: &SessionError) -> RegistryError {
    let kind = match (error.kind(), error.status().map(Status::code)) {
        (_, Some(Code::PermissionDenied)) => RegistryErrorKind::Denied,
        (SessionErrorKind::Closed | SessionErrorKind::Timeout, _) => RegistryErrorKind::Unreachable,
        (SessionErrorKind::Unsupported, _) => RegistryErrorKind::Protocol,
        // Clients pass on what the token server said, without a code of its own.
        _ => RegistryErrorKind::Unauthorized,
    };
    RegistryError::new(kind, error.subject(), error.message())
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
        let found = self.find(&subject(client_name(host)), ask).await;
        found.map_err(|error| {
            RegistryError::new(RegistryErrorKind::Local, error.subject(), error.message())
        })
    }

    async fn token(
        &self,
        host: &str,
        realm: &str,
        service: Option<&str>,
        scopes: &[String],
    ) -> Result<Option<Token>, RegistryError> {
        if self.ids().is_empty() {
            return Ok(None);
        }
        // Kept apart, as another client's having none would hide it, and all would be asked for their passwords.
        let failure = OnceLock::new();
        let failed = &failure;
        let ask = move |session: Session| async move {
            let token = match session.fetches_tokens(host).await {
                Ok(false) => return Ok(None),
                Ok(true) => {
                    let token = session.fetch_token(host, realm, service, scopes).await;
                    token.map_err(|error| refused(&error))
                }
                Err(error) => Err(unreadable(&error)),
            };
            Ok(token.map_err(|error| drop(failed.set(error))).ok())
        };
        let found = self.find(&token_subject(client_name(host)), ask).await;
        match (found, failure.into_inner()) {
            (Ok(Some(token)), _) => Ok(Some(token)),
            (_, Some(failure)) => Err(failure),
            (Ok(None), None) => Ok(None),
            (Err(error), None) => Err(unreadable(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use slipway_engine::store::registry::{HostOptions, Registry, RegistryOptions};
    use slipway_spec::wire::auth::auth_server::{Auth, AuthServer};
    use slipway_spec::wire::auth::{
        CredentialsResponse, GetTokenAuthorityResponse, VerifyTokenAuthorityRequest,
        VerifyTokenAuthorityResponse,
    };
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tonic::Request;

    use super::*;
    use crate::fake_client::{FakeClient, FakeConnection};
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

    /// Fetches tokens; what happens is up to the host's name before its dot.
    #[derive(Clone, Default)]
    struct Authority {
        calls: Arc<Mutex<Vec<String>>>,
        salts: Arc<Mutex<Vec<Vec<u8>>>>,
    }

    impl Authority {
        fn note(&self, call: String) {
            self.calls.lock().unwrap().push(call);
        }

        fn calls(&self) -> Vec<String> {
            std::mem::take(&mut *self.calls.lock().unwrap())
        }

        async fn connect(&self, id: &str, manager: &SessionManager) -> FakeConnection {
            FakeClient::new(id).with(AuthServer::new(self.clone()), &[]).connect(manager).await
        }
    }

    #[async_trait]
    impl Auth for Authority {
        async fn credentials(
            &self,
            request: Request<CredentialsRequest>,
        ) -> Result<Response<CredentialsResponse>, Status> {
            self.note(format!("password of {}", request.into_inner().host));
            let (username, secret) = ("me".to_owned(), "hunter2".to_owned());
            Ok(Response::new(CredentialsResponse { username, secret }))
        }

        async fn fetch_token(
            &self,
            request: Request<FetchTokenRequest>,
        ) -> Result<Response<FetchTokenResponse>, Status> {
            let FetchTokenRequest { client_id, host, realm, service, scopes } =
                request.into_inner();
            self.note(format!("token {client_id} {host} {realm} {service} {scopes:?}"));
            match host.split('.').next() {
                Some("refused") => Err(Status::unknown("401 Unauthorized")),
                Some("denied") => Err(Status::permission_denied("not yours")),
                Some("half") => Err(Status::unimplemented("")),
                Some("lost") => Err(Status::unavailable("no route")),
                Some("silent") => std::future::pending().await,
                _ => {
                    let token = "t1".to_owned();
                    Ok(Response::new(FetchTokenResponse { token, expires_in: 300, issued_at: 0 }))
                }
            }
        }

        async fn get_token_authority(
            &self,
            request: Request<GetTokenAuthorityRequest>,
        ) -> Result<Response<GetTokenAuthorityResponse>, Status> {
            let GetTokenAuthorityRequest { host, salt } = request.into_inner();
            self.note(format!("authority {host}"));
            self.salts.lock().unwrap().push(salt.to_vec());
            let key = match host.split('.').next() {
                Some("off") => return Err(Status::unavailable("client side tokens disabled")),
                Some("locked") => return Err(Status::unknown("the keychain is locked")),
                Some("asleep") => std::future::pending().await,
                Some("short") => vec![1; 31],
                _ => vec![1; 32],
            };
            Ok(Response::new(GetTokenAuthorityResponse { public_key: key.into() }))
        }

        async fn verify_token_authority(
            &self,
            _: Request<VerifyTokenAuthorityRequest>,
        ) -> Result<Response<VerifyTokenAuthorityResponse>, Status> {
            Err(Status::unimplemented(""))
        }
    }

    const REALM: &str = "https://auth.example/token";

    async fn token(group: &SessionGroup, host: &str) -> Result<Option<Token>, RegistryError> {
        let scopes = ["repository:a/b:pull".to_owned(), "repository:c:pull,push".to_owned()];
        group.token(host, REALM, Some("reg"), &scopes).await
    }

    #[tokio::test]
    async fn tokens_are_fetched_by_the_client() {
        let manager = SessionManager::new();
        let authority = Authority::default();
        let _client = authority.connect("a", &manager).await;
        let group = manager.group(["a".to_owned()]);
        let expected = Token { secret: Secret::new("t1"), lifetime: Duration::from_secs(300) };
        assert_eq!(token(&group, DOCKER_HUB_KEY).await.unwrap(), Some(expected));
        assert_eq!(
            authority.calls(),
            [
                "authority registry-1.docker.io",
                "token buildkit-client registry-1.docker.io https://auth.example/token reg \
                 [\"repository:a/b:pull\", \"repository:c:pull,push\"]",
            ]
        );
        group.token("r.example", REALM, None, &[]).await.unwrap().unwrap();
        let last = "token buildkit-client r.example https://auth.example/token  []";
        assert_eq!(authority.calls(), ["authority r.example", last]);

        // One salt for as long as this process lives, and not an empty one.
        let salts = authority.salts.lock().unwrap();
        assert_eq!((salts.len(), salts[0].len()), (2, 32));
        assert_eq!(salts[0], salts[1]);
        assert_ne!(salts[0], [0; 32]);
    }

    #[tokio::test]
    async fn clients_that_fetch_no_tokens_are_asked_for_credentials() {
        let manager = SessionManager::new();
        let authority = Authority::default();
        let _disabled = authority.connect("disabled", &manager).await;
        let _old =
            FakeClient::new("old").with(AuthServer::new(Keychain), &[]).connect(&manager).await;
        let _without = FakeClient::new("without").connect(&manager).await;
        for (session, host) in [("disabled", "off.example"), ("old", "r"), ("without", "r")] {
            let group = manager.group([session.to_owned()]);
            assert_eq!(token(&group, host).await.unwrap(), None, "{session}");
        }
        assert_eq!(token(&manager.group([]), "r").await.unwrap(), None);
        assert_eq!(authority.calls(), ["authority off.example"]);
    }

    #[tokio::test]
    async fn a_token_that_cannot_be_fetched_is_an_error() {
        let manager = SessionManager::new();
        let authority = Authority::default();
        let _client = authority.connect("a", &manager).await;
        let group = manager.group(["a".to_owned()]);
        for (host, kind, reason) in [
            ("refused.example", RegistryErrorKind::Unauthorized, "401 Unauthorized"),
            ("denied.example", RegistryErrorKind::Denied, "not yours"),
            ("half.example", RegistryErrorKind::Protocol, "the client does not offer this"),
            ("lost.example", RegistryErrorKind::Unreachable, "no route"),
            ("locked.example", RegistryErrorKind::Local, "the keychain is locked"),
            ("short.example", RegistryErrorKind::Protocol, "its key has 31 bytes instead of 32"),
        ] {
            let error = token(&group, host).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{host}");
            assert_eq!(
                error.to_string(),
                format!("cannot get a token for {host} from the client: {reason}")
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_says_nothing_is_not_waited_for_forever() {
        let manager = SessionManager::new();
        let authority = Authority::default();
        let _client = authority.connect("a", &manager).await;
        let group = manager.group(["a".to_owned()]);
        for (host, kind) in [
            ("asleep.example", RegistryErrorKind::Local),
            ("silent.example", RegistryErrorKind::Unreachable),
        ] {
            let start = tokio::time::Instant::now();
            let error = token(&group, host).await.unwrap_err();
            assert_eq!((error.kind(), error.message()), (kind, "no answer in 60 s"), "{host}");
            assert_eq!(start.elapsed().as_secs(), 60);
        }
    }

    #[tokio::test]
    async fn another_client_without_tokens_does_not_hide_the_failure_of_one_with_them() {
        let manager = SessionManager::new();
        let authority = Authority::default();
        let _fetches = authority.connect("fetches", &manager).await;
        let _old =
            FakeClient::new("old").with(AuthServer::new(Keychain), &[]).connect(&manager).await;
        for ids in [["fetches", "old"], ["old", "fetches"]] {
            let group = manager.group(ids.map(str::to_owned));
            let error = token(&group, "refused.example").await.unwrap_err();
            assert_eq!(error.kind(), RegistryErrorKind::Unauthorized);
            assert!(token(&group, "r.example").await.unwrap().is_some());
        }
    }

    #[test]
    fn a_token_lives_for_what_is_left_of_it() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (expires_in, issued_at, left) in [
            (300, 0, 300),
            (0, 0, 60),
            (-5, 0, 60),
            (300, 999_900, 200),
            (0, 999_990, 50),
            (300, 1_000_000, 300),
            // Clocks differ, and some are broken.
            (300, 1_000_100, 300),
            (300, 999_000, 0),
            (300, -1, 300),
            (300, i64::MAX, 300),
            (300, i64::MIN, 300),
            (i64::MAX, 1, u64::try_from(i64::MAX).unwrap() - 999_999),
        ] {
            let answer = FetchTokenResponse { token: String::new(), expires_in, issued_at };
            let found = lifetime(&answer, now);
            assert_eq!(found, Duration::from_secs(left), "{expires_in} {issued_at}");
        }
    }

    /// A registry that shows an image to whoever has the token `t1` or, when it takes `basic`, a name and a password.
    async fn registry(basic: bool) -> (String, Arc<Mutex<Vec<String>>>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, own) = (Arc::clone(&seen), host.clone());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap();
                let sent = head.lines().find_map(|line| line.strip_prefix("authorization: "));
                log.lock().unwrap().push(sent.unwrap_or("nothing").to_owned());
                let challenge = match (sent, basic) {
                    (Some("Bearer t1"), false) | (Some("Basic bWU6aHVudGVyMg=="), true) => None,
                    (_, true) => Some("Basic realm=\"x\"".to_owned()),
                    (_, false) => {
                        Some(format!("Bearer realm=\"http://{own}/token\",service=\"s\""))
                    }
                };
                let fields = challenge.map_or_else(
                    || {
                        let digest = "0123456789abcdef".repeat(4);
                        format!(
                            "200 OK\r\ncontent-type: application/vnd.oci.image.manifest.v1+json\r\n\
                             docker-content-digest: sha256:{digest}\r\ncontent-length: 300"
                        )
                    },
                    |challenge| {
                        format!(
                            "401 Unauthorized\r\nwww-authenticate: {challenge}\r\n\
                             content-length: 0"
                        )
                    },
                );
                let answer = format!("HTTP/1.1 {fields}\r\nconnection: close\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        (host, seen)
    }

    fn registry_client(host: &str, group: SessionGroup) -> Registry {
        let plain = HostOptions { plain_http: Some(true), ..HostOptions::default() };
        let hosts = [(host.to_owned(), plain)].into();
        let options = RegistryOptions { hosts, ..RegistryOptions::default() };
        Registry::new(options, Arc::new(group)).unwrap()
    }

    #[tokio::test]
    async fn a_registry_is_used_without_seeing_the_password() {
        let (host, seen) = registry(false).await;
        let manager = SessionManager::new();
        let authority = Authority::default();
        let _client = authority.connect("a", &manager).await;
        let client = registry_client(&host, manager.group(["a".to_owned()]));
        let image = format!("{host}/team/app:v1").parse().unwrap();
        client.resolve(&image).await.unwrap();
        client.resolve(&image).await.unwrap();
        assert_eq!(*seen.lock().unwrap(), ["nothing", "Bearer t1", "Bearer t1"]);
        let token = format!(
            "token buildkit-client {host} http://{host}/token s [\"repository:team/app:pull\"]"
        );
        assert_eq!(authority.calls(), [format!("authority {host}"), token]);

        // Tokens are those of one session.
        let _other = authority.connect("b", &manager).await;
        let client = registry_client(&host, manager.group(["b".to_owned()]));
        client.resolve(&image).await.unwrap();
        assert_eq!(authority.calls().len(), 2);
    }

    #[tokio::test]
    async fn a_registry_that_wants_the_password_itself_gets_it() {
        let (host, seen) = registry(true).await;
        let manager = SessionManager::new();
        let authority = Authority::default();
        let _client = authority.connect("a", &manager).await;
        let client = registry_client(&host, manager.group(["a".to_owned()]));
        client.resolve(&format!("{host}/team/app:v1").parse().unwrap()).await.unwrap();
        assert_eq!(*seen.lock().unwrap(), ["nothing", "Basic bWU6aHVudGVyMg=="]);
        assert_eq!(authority.calls(), [format!("password of {host}")]);
    }
}
