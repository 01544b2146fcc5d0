//! Tests of tokens and passwords.

use super::*;

/// A registry that takes only the tokens `t1`, `t2`, … of its own token server, the newest `alive`.
async fn guarded(newest_only: bool) -> Scripted {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let realm = format!("http://{}/token", listener.local_addr().unwrap());
    let mut tokens = 0;
    Scripted::start_on(listener, move |request| {
        if request.path() == "/token" {
            tokens += 1;
            return Reply::json(&format!(r#"{{"token":"t{tokens}","expires_in":300}}"#));
        }
        let good = request
            .header("authorization")
            .and_then(|text| text.strip_prefix("Bearer t")?.parse().ok());
        if good.is_some_and(|number: usize| !newest_only || number == tokens) {
            return manifest_reply();
        }
        Reply::new(401).header(
            "www-authenticate",
            format!(r#"Bearer realm="{realm}",service="reg",scope="repository:team/app:pull""#),
        )
    })
}

#[tokio::test]
async fn tokens_are_fetched_once_and_kept() {
    let server = guarded(false).await;
    let registry = client_with(RegistryOptions::default(), password());
    registry.resolve(&image(&server)).await.unwrap();
    registry.resolve(&image(&server)).await.unwrap();
    assert_eq!(
        server.lines(),
        [
            "HEAD /v2/team/app/manifests/v1",
            "GET /token?service=reg&scope=repository:team/app:pull",
            "HEAD /v2/team/app/manifests/v1",
            "HEAD /v2/team/app/manifests/v1",
        ]
    );
    let sent: Vec<Option<String>> = server
        .received()
        .iter()
        .map(|request| request.header("authorization").map(str::to_owned))
        .collect();
    let own = |text: &str| Some(text.to_owned());
    assert_eq!(sent, [None, own(PASSWORD_HEADER), own("Bearer t1"), own("Bearer t1")]);
}

#[tokio::test]
async fn many_requests_share_one_token() {
    let server = guarded(false).await;
    let registry = client();
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let (registry, reference) = (registry.clone(), image(&server));
            tokio::spawn(async move { registry.resolve(&reference).await.map(drop) })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let tokens = server.received().iter().filter(|request| request.path() == "/token").count();
    assert_eq!(tokens, 1);
}

#[tokio::test]
async fn a_token_that_stops_working_is_replaced_once() {
    let server = guarded(true).await;
    let registry = client();
    registry.resolve(&image(&server)).await.unwrap();
    // Somebody else gets a token, which ends the first one's life early.
    let other = client();
    other.resolve(&image(&server)).await.unwrap();
    registry.resolve(&image(&server)).await.unwrap();
    assert_eq!(server.received().iter().filter(|request| request.path() == "/token").count(), 3);
}

#[tokio::test]
async fn tokens_are_not_shared_between_credentials() {
    let server = guarded(false).await;
    let registry = client_with(RegistryOptions::default(), password());
    registry.resolve(&image(&server)).await.unwrap();
    let other = registry.with_credentials(Arc::new(Anonymous));
    other.resolve(&image(&server)).await.unwrap();
    let asked: Vec<_> =
        server.received().into_iter().filter(|request| request.path() == "/token").collect();
    assert_eq!(asked.len(), 2);
    assert_eq!(asked[1].header("authorization"), None);
    // The finding that this port does not speak TLS is shared.
    assert_eq!(server.greetings(), 1);
}

#[derive(Debug)]
struct Unreadable;

#[async_trait::async_trait]
impl Credentials for Unreadable {
    async fn credential(&self, _: &str) -> Result<Option<Credential>, RegistryError> {
        Err(RegistryError::new(RegistryErrorKind::Local, "keyring", "is locked"))
    }
}

#[tokio::test]
async fn unreadable_credentials_matter_only_when_they_are_missed() {
    let open = guarded(false).await;
    client().with_credentials(Arc::new(Unreadable)).resolve(&image(&open)).await.unwrap();
    let closed = Scripted::start(|_| Reply::new(401).header("www-authenticate", "Basic")).await;
    let registry = client().with_credentials(Arc::new(Unreadable));
    let error = registry.resolve(&image(&closed)).await.unwrap_err();
    assert!(
        error.message().ends_with("credentials could not be read: keyring: is locked"),
        "{error}"
    );
}

#[tokio::test]
async fn endless_refusal_ends() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let realm = format!("http://{}/token", listener.local_addr().unwrap());
    let mut tokens = 0;
    let server = Scripted::start_on(listener, move |request| {
        if request.path() == "/token" {
            tokens += 1;
            return Reply::json(&format!(r#"{{"access_token":"t{tokens}"}}"#));
        }
        Reply::new(401)
            .header(
                "www-authenticate",
                format!(r#"Bearer realm="{realm}",error="insufficient_scope""#),
            )
            .body(r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#)
    });
    let error = client().manifest(&image(&server), None).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Unauthorized);
    assert!(error.message().contains("authentication required"), "{error}");
    assert_eq!(server.lines().len(), 3);
    let basic =
        Scripted::start(|_| Reply::new(401).header("www-authenticate", "Basic realm=\"x\"")).await;
    let registry = client_with(RegistryOptions::default(), password());
    let error = registry.manifest(&image(&basic), None).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Unauthorized);
    let sent: Vec<_> =
        basic.received().iter().map(|request| request.header("authorization").is_some()).collect();
    assert_eq!(sent, [false, true]);
}

#[tokio::test]
async fn identity_tokens_are_posted_and_fall_back() {
    for (post_status, expected) in [(200, "Bearer posted"), (404, "Bearer gotten")] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let realm = format!("http://{}/token", listener.local_addr().unwrap());
        let server = Scripted::start_on(listener, move |request| match request.line().as_str() {
            "POST /token" if post_status == 200 => Reply::json(r#"{"access_token":"posted"}"#),
            "POST /token" => Reply::new(post_status),
            line if line.starts_with("GET /token") => Reply::json(r#"{"token":"gotten"}"#),
            _ if request.header("authorization").is_some() => manifest_reply(),
            _ => Reply::new(401)
                .header("www-authenticate", format!(r#"Bearer realm="{realm}",service="a b""#)),
        });
        let identity = Some(Credential::IdentityToken(Secret::new("id&1")));
        client_with(RegistryOptions::default(), identity).resolve(&image(&server)).await.unwrap();
        let received = server.received();
        assert_eq!(received.last().unwrap().header("authorization"), Some(expected));
        let form = String::from_utf8(received[1].body.clone()).unwrap();
        assert_eq!(
            form,
            "client_id=slipway&access_type=offline&scope=repository:team/app:pull&service=a%20b\
             &grant_type=refresh_token&refresh_token=id%261"
        );
    }
}

#[tokio::test]
async fn an_identity_token_is_not_posted_to_another_origin() {
    let thief = Scripted::start(|_| Reply::json(r#"{"token":"t"}"#)).await;
    let location = thief.url("/token");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let realm = format!("http://{}/token", listener.local_addr().unwrap());
    let server = Scripted::start_on(listener, move |request| match request.path() {
        "/token" => Reply::new(307).header("location", location.clone()),
        _ => Reply::new(401).header("www-authenticate", format!(r#"Bearer realm="{realm}""#)),
    });
    let identity = Some(Credential::IdentityToken(Secret::new("id")));
    let registry = client_with(RegistryOptions::default(), identity);
    let error = registry.resolve(&image(&server)).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Protocol);
    assert!(thief.lines().is_empty());
}

#[tokio::test]
async fn a_refused_login_is_told() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let realm = format!("http://{}/token", listener.local_addr().unwrap());
    let server = Scripted::start_on(listener, move |request| match request.path() {
        "/token" => Reply::new(401).body(r#"{"details":"incorrect username or password"}"#),
        _ => Reply::new(401).header("www-authenticate", format!(r#"Bearer realm="{realm}""#)),
    });
    let registry = client_with(RegistryOptions::default(), password());
    let error = registry.resolve(&image(&server)).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Unauthorized);
    assert!(error.message().contains("incorrect username or password"), "{error}");
}

#[tokio::test]
async fn a_token_server_at_a_link_local_address_gets_nothing() {
    let server = Scripted::start(|_| {
        Reply::new(401)
            .header("www-authenticate", r#"Bearer realm="http://169.254.169.254/latest""#)
    })
    .await;
    let registry = client_with(RegistryOptions::default(), password());
    let error = registry.resolve(&image(&server)).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Protocol);
    assert!(error.message().contains("link-local"), "{error}");
}

/// Somebody who fetches tokens, and must never be asked for a password.
#[derive(Debug)]
struct Broker {
    asked: Mutex<Vec<String>>,
    lifetime: Duration,
    failure: Option<RegistryErrorKind>,
}

impl Broker {
    fn new(lifetime: Duration, failure: Option<RegistryErrorKind>) -> Arc<Self> {
        Arc::new(Self { asked: Mutex::default(), lifetime, failure })
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

#[async_trait::async_trait]
impl Credentials for Broker {
    async fn credential(&self, host: &str) -> Result<Option<Credential>, RegistryError> {
        self.asked.lock().unwrap().push(format!("credential of {host}"));
        Ok(password())
    }

    async fn token(
        &self,
        host: &str,
        realm: &str,
        service: Option<&str>,
        scopes: &[String],
    ) -> Result<Option<Token>, RegistryError> {
        let mut asked = self.asked.lock().unwrap();
        asked.push(format!("{host} {realm} {service:?} {scopes:?}"));
        match self.failure {
            Some(kind) => Err(RegistryError::new(kind, "broker", "is out")),
            None => {
                let secret = Secret::new(format!("t{}", asked.len()));
                Ok(Some(Token { secret, lifetime: self.lifetime }))
            }
        }
    }
}

#[tokio::test]
async fn a_token_that_is_fetched_elsewhere_is_kept_and_no_password_is_asked_for() {
    let server = guarded(false).await;
    let broker = Broker::new(Duration::from_secs(300), None);
    let registry = client().with_credentials(Arc::clone(&broker) as Arc<dyn Credentials>);
    registry.resolve(&image(&server)).await.unwrap();
    registry.resolve(&image(&server)).await.unwrap();
    let host = server.authority();
    let scopes = r#"["repository:team/app:pull"]"#;
    assert_eq!(broker.asked(), [format!(r#"{host} http://{host}/token Some("reg") {scopes}"#)]);
    assert_eq!(server.lines(), vec!["HEAD /v2/team/app/manifests/v1"; 3]);
    let sent = server.received();
    let sent: Vec<_> = sent.iter().map(|request| request.header("authorization")).collect();
    assert_eq!(sent, [None, Some("Bearer t1"), Some("Bearer t1")]);
}

#[tokio::test]
async fn a_token_that_is_fetched_elsewhere_is_fetched_again_when_it_runs_out() {
    let server = guarded(false).await;
    let broker = Broker::new(Duration::ZERO, None);
    let registry = client().with_credentials(Arc::clone(&broker) as Arc<dyn Credentials>);
    registry.resolve(&image(&server)).await.unwrap();
    registry.resolve(&image(&server)).await.unwrap();
    let sent = server.received();
    let sent: Vec<_> = sent.iter().map(|request| request.header("authorization")).collect();
    assert_eq!(sent, [None, Some("Bearer t1"), Some("Bearer t2")]);
    assert_eq!(broker.asked().len(), 2);
}

#[tokio::test]
async fn without_a_token_from_elsewhere_no_password_is_asked_for_either() {
    let server = guarded(false).await;
    let broker = Broker::new(Duration::ZERO, Some(RegistryErrorKind::Denied));
    let registry = client().with_credentials(Arc::clone(&broker) as Arc<dyn Credentials>);
    let error = registry.resolve(&image(&server)).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Denied);
    assert!(error.to_string().contains("is out"), "{error}");
    assert_eq!(server.lines(), ["HEAD /v2/team/app/manifests/v1"]);
    assert_eq!(broker.asked().len(), 1);

    // What only could not be read may not be needed.
    let broker = Broker::new(Duration::ZERO, Some(RegistryErrorKind::Local));
    let registry = client().with_credentials(Arc::clone(&broker) as Arc<dyn Credentials>);
    registry.resolve(&image(&server)).await.unwrap();
    assert_eq!(broker.asked().len(), 1);
    let tokens = server.received();
    let tokens: Vec<_> = tokens.iter().filter(|request| request.path() == "/token").collect();
    assert_eq!(tokens.len(), 1);
    assert_eq!(tokens[0].header("authorization"), None);
}

#[tokio::test]
async fn nobody_else_is_sent_to_a_token_server_that_is_refused() {
    let server = Scripted::start(|_| {
        Reply::new(401)
            .header("www-authenticate", r#"Bearer realm="http://169.254.169.254/latest""#)
    })
    .await;
    let broker = Broker::new(Duration::ZERO, None);
    let registry = client().with_credentials(Arc::clone(&broker) as Arc<dyn Credentials>);
    let error = registry.resolve(&image(&server)).await.unwrap_err();
    assert_eq!(error.kind(), RegistryErrorKind::Protocol);
    assert!(broker.asked().is_empty());
}

#[tokio::test]
async fn a_registry_that_wants_a_password_gets_one_from_whoever_fetches_tokens() {
    let server = Scripted::start(|request| match request.header("authorization") {
        Some(PASSWORD_HEADER) => manifest_reply(),
        _ => Reply::new(401).header("www-authenticate", "Basic realm=\"x\""),
    })
    .await;
    let broker = Broker::new(Duration::ZERO, None);
    let registry = client().with_credentials(Arc::clone(&broker) as Arc<dyn Credentials>);
    registry.resolve(&image(&server)).await.unwrap();
    assert_eq!(broker.asked(), [format!("credential of {}", server.authority())]);
}
