//! Sessions from their opening to their end, whatever the client does.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures::future::join_all;
use slipway_spec::wire::health::health_client::HealthClient;
use slipway_spec::wire::health::health_server::{Health, HealthServer};
use slipway_spec::wire::health::{HealthCheckRequest, HealthCheckResponse};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{Instant, timeout};
use tonic::{Request, Response};

use super::*;
use crate::fake_client::FakeClient;

const SOON: Duration = Duration::from_secs(10);

/// Answers as told, after so many good answers.
#[derive(Clone)]
struct Ill {
    good: Arc<AtomicUsize>,
    silent: bool,
}

impl Ill {
    fn server(good: usize, silent: bool) -> HealthServer<Self> {
        HealthServer::new(Self { good: Arc::new(AtomicUsize::new(good)), silent })
    }
}

#[async_trait]
impl Health for Ill {
    type WatchStream = futures::stream::Pending<Result<HealthCheckResponse, Status>>;

    async fn check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let good = self.good.try_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        match good {
            Ok(_) => Ok(Response::new(HealthCheckResponse::default())),
            Err(_) if self.silent => std::future::pending().await,
            Err(_) => Err(Status::internal("ill")),
        }
    }

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(futures::stream::pending()))
    }
}

async fn check(session: &Session) -> Result<(), Status> {
    let mut client = HealthClient::new(session.channel());
    client.check(HealthCheckRequest::default()).await.map(|_| ())
}

#[tokio::test]
async fn a_session_is_what_its_headers_say() {
    let manager = SessionManager::new();
    let client = FakeClient::new("a").with_shared_key("app:node");
    let client = client.with(Ill::server(9, true), &["/grpc.health.v1.Health/Check", "/a.B/C"]);
    let _client = client.connect(&manager).await;
    let session = manager.get("a", WAIT).await.unwrap();
    assert_eq!((session.id(), session.shared_key()), ("a", "app:node"));
    assert!(session.supports("/A.b/c") && session.supports("/grpc.health.v1.Health/check"));
    assert!(!session.supports("/a.B"));
    let error = session.require("/x.Y/Z").unwrap_err();
    assert_eq!(error.kind(), SessionErrorKind::Unsupported);
    check(&session).await.unwrap();
}

#[tokio::test]
async fn a_session_needs_an_id() {
    let manager = SessionManager::new();
    let inbound = futures::stream::pending();
    let status = manager.open(&MetadataMap::new(), inbound).await.err().unwrap();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn a_build_may_come_before_its_session() {
    let manager = SessionManager::new();
    let waiting = tokio::spawn({
        let manager = manager.clone();
        async move { manager.get("vertex:a", WAIT).await }
    });
    tokio::time::sleep(Duration::from_secs(4)).await;
    let _client = FakeClient::new("a").connect(&manager).await;
    assert_eq!(waiting.await.unwrap().unwrap().id(), "a");

    let started = Instant::now();
    let error = manager.get("b", WAIT).await.unwrap_err();
    assert_eq!(started.elapsed().as_secs(), 5);
    assert_eq!(error.kind(), SessionErrorKind::NoSession);
    assert_eq!(
        error.to_string(),
        "no active session for b: the client has not connected, or has gone"
    );
}

#[tokio::test]
async fn the_call_ends_when_the_client_has_said_all() {
    let manager = SessionManager::new();
    let client = FakeClient::new("a").with(Ill::server(0, true), &[]);
    let mut client = client.connect(&manager).await;
    let session = manager.get("a", WAIT).await.unwrap();
    let running = tokio::spawn({
        let session = session.clone();
        async move { check(&session).await }
    });
    tokio::task::yield_now().await;
    client.half_close();
    timeout(SOON, client.ended()).await.unwrap();
    timeout(SOON, session.closed()).await.unwrap();
    assert_eq!(session.why(), Some("the client has disconnected"));
    let status = timeout(SOON, running).await.unwrap().unwrap().unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert!(manager.get("a", Duration::ZERO).await.is_err());
    assert_eq!(check(&session).await.unwrap_err().code(), tonic::Code::Unavailable);
}

#[tokio::test]
async fn a_client_that_is_killed_is_gone() {
    let manager = SessionManager::new();
    let killed = FakeClient::new("a").connect(&manager).await;
    let dropped = FakeClient::new("b").connect(&manager).await;
    let sessions = [manager.get("a", WAIT).await.unwrap(), manager.get("b", WAIT).await.unwrap()];
    killed.vanish();
    drop(dropped);
    for session in sessions {
        timeout(SOON, session.closed()).await.unwrap();
    }
    tokio::task::yield_now().await;
    assert!(manager.sessions.borrow().is_empty());
}

#[tokio::test]
async fn a_client_that_does_not_speak_http_is_gone() {
    for garbage in
        ["HTTP/1.1 400 Bad Request\r\n\r\n", "\0\0\0\x04\0\0\0\0\0 and then nothing at all"]
    {
        let manager = SessionManager::new();
        let client = FakeClient::new("a").connect_with(&manager, |mut io| async move {
            io.write_all(garbage.as_bytes()).await.unwrap();
            let mut heard = vec![];
            io.read_to_end(&mut heard).await.unwrap_err();
            assert!(heard.starts_with(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"));
        });
        let mut client = client.await;
        timeout(SOON, client.ended()).await.unwrap();
        assert!(manager.get("a", Duration::ZERO).await.is_err());
    }
}

#[tokio::test(start_paused = true)]
async fn two_failed_checks_in_a_row_end_a_session() {
    let manager = SessionManager::new();
    let started = Instant::now();
    let client = FakeClient::new("a").with(Ill::server(1, false), &[]);
    let mut client = client.connect(&manager).await;
    let session = manager.get("a", WAIT).await.unwrap();
    session.closed().await;
    assert_eq!(started.elapsed().as_secs(), 15);
    assert_eq!(session.why(), Some("the client does not answer health checks: ill"));
    client.ended().await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_is_given_more_time() {
    let manager = SessionManager::new();
    let started = Instant::now();
    let _client = FakeClient::new("a").with(Ill::server(0, true), &[]).connect(&manager).await;
    let session = manager.get("a", WAIT).await.unwrap();
    session.closed().await;
    // A check after 5 s that takes 15 s, and another one that takes half as much again.
    assert_eq!(started.elapsed().as_millis().div_ceil(1000), 48);
}

#[tokio::test(start_paused = true)]
async fn a_client_may_ask_for_stricter_checks() {
    let manager = SessionManager::new();
    let started = Instant::now();
    let client = FakeClient::new("a").with(Ill::server(0, true), &[]);
    let client = client.with_header("x-buildkit-session-health-custom-timeout", "2000");
    let _client = client.connect(&manager).await;
    manager.get("a", WAIT).await.unwrap().closed().await;
    assert_eq!(started.elapsed().as_secs(), 4);
}

#[tokio::test]
async fn a_second_session_of_the_same_id_takes_the_place_of_the_first() {
    let manager = SessionManager::new();
    let mut old = FakeClient::new("a").with_shared_key("old").connect(&manager).await;
    let first = manager.get("a", WAIT).await.unwrap();
    let mut new = FakeClient::new("a").with_shared_key("new").connect(&manager).await;
    let second = manager.get("a", WAIT).await.unwrap();
    assert_eq!((first.shared_key(), second.shared_key()), ("old", "new"));
    // What runs on the first one goes on, and its end does not take the second one away.
    check(&first).await.unwrap();
    old.half_close();
    timeout(SOON, old.ended()).await.unwrap();
    timeout(SOON, first.closed()).await.unwrap();
    tokio::task::yield_now().await;
    assert_eq!(manager.get("a", Duration::ZERO).await.unwrap(), second);
    check(&second).await.unwrap();
    new.half_close();
    timeout(SOON, new.ended()).await.unwrap();
}

#[tokio::test]
async fn the_daemon_can_end_a_session() {
    let manager = SessionManager::new();
    let mut client = FakeClient::new("a").connect(&manager).await;
    let session = manager.get("a", WAIT).await.unwrap();
    session.close("the daemon stops");
    timeout(SOON, client.ended()).await.unwrap();
    assert_eq!(session.why(), Some("the daemon stops"));
}

#[tokio::test]
async fn many_calls_go_at_the_same_time() {
    let manager = SessionManager::new();
    let _client = FakeClient::new("a").with(Ill::server(1000, true), &[]).connect(&manager).await;
    let session = manager.get("a", WAIT).await.unwrap();
    let answers = join_all((0..1000).map(|_| check(&session)));
    let answers = timeout(SOON, answers).await.unwrap();
    assert!(answers.iter().all(Result::is_ok));
}

#[tokio::test(start_paused = true)]
async fn a_group_asks_whoever_is_there() {
    let manager = SessionManager::new();
    let nobody = manager.group([]);
    let error = nobody.first().await.unwrap_err();
    assert_eq!(error.to_string(), "cannot reach the client: no active sessions");
    let _b = FakeClient::new("b").connect(&manager).await;
    let group = manager.group(["a".to_owned(), String::new(), "b".to_owned()]);
    assert_eq!(group.first().await.unwrap().id(), "b");
    // The last error is the answer, unless somebody said no.
    let refused = |session: Session| async move {
        Err::<Option<()>, _>(SessionError::new(SessionErrorKind::Failed, session.id(), "no"))
    };
    assert_eq!(group.find("x", refused).await.unwrap_err().to_string(), "b: no");
    let without = |_| async { Ok(None::<()>) };
    assert_eq!(group.find("x", without).await.unwrap(), None);
}
