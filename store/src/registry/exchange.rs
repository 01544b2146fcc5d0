//! Requests as the rest of the client makes them: authorised, redirected, bounded, tried again.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, LOCATION};
use http::response::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use super::Inner;
use super::auth::{Authorization, Reaction};
use super::challenge::challenges;
use super::error::{RegistryError, RegistryErrorKind};
use super::host::Host;
use super::retry::Retries;
use super::scope::Scopes;
use super::transport::{Payload, chain_text};
use super::url::{Scheme, Url};

/// Redirects followed in a row.
const REDIRECTS: usize = 10;

/// The part of an error page that is read.
const ERROR_BODY_BYTES: u64 = 64 * 1024;

/// How long an error page may take.
const ERROR_BODY_TIME: Duration = Duration::from_secs(10);

/// One registry that can serve a repository: the origin, or a mirror of it.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    pub(crate) host: Arc<Host>,
    pub(crate) scheme: Scheme,
    /// The repository's path there.
    pub(crate) repository: String,
    /// The origin's name, which mirrors want to be told.
    pub(crate) namespace: Option<String>,
    /// The name that credentials are looked up by.
    pub(crate) credentials_key: String,
}

impl Endpoint {
    /// Returns the URL of something in the repository.
    pub(crate) fn url(&self, tail: &str) -> Url {
        let path = format!("/v2/{}/{tail}", self.repository);
        let url = Url::new(self.scheme, self.host.authority(), &path);
        match &self.namespace {
            Some(namespace) => url.with_query("ns", namespace),
            None => url,
        }
    }
}

/// A request.
#[derive(Clone)]
pub(crate) struct Ask<'a> {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: HeaderMap,
    pub(crate) payload: Payload<'a>,
    /// What a token for it must allow.
    pub(crate) scopes: Scopes,
    /// The body is a credential, so it may not go to another origin.
    pub(crate) confidential: bool,
}

impl<'a> Ask<'a> {
    pub(crate) fn new(method: Method, url: Url, scopes: Scopes) -> Self {
        Self {
            method,
            url,
            headers: HeaderMap::new(),
            payload: Payload::Empty,
            scopes,
            confidential: false,
        }
    }

    #[must_use]
    pub(crate) fn header(mut self, name: HeaderName, value: &str) -> Self {
        // A value that is no header text is left out; the registry then says what it misses.
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.append(name, value);
        }
        self
    }

    #[must_use]
    pub(crate) fn payload(self, payload: Payload<'a>) -> Self {
        Self { payload, ..self }
    }
}

/// An answer whose body has not been read.
pub(crate) struct Answer {
    pub(crate) parts: Parts,
    pub(crate) body: Incoming,
    /// Where it came from in the end.
    pub(crate) url: Url,
    /// It came from somewhere else than asked, such as a signed URL.
    pub(crate) elsewhere: bool,
    /// What else is to be said if it is an error.
    note: Option<String>,
}

impl Answer {
    pub(crate) fn status(&self) -> StatusCode {
        self.parts.status
    }

    pub(crate) fn header(&self, name: impl http::header::AsHeaderName) -> Option<&str> {
        self.parts.headers.get(name)?.to_str().ok()
    }

    /// Turns an unwanted answer into an error with the registry's own words.
    pub(crate) async fn into_error(self) -> RegistryError {
        let read = read_body(self.body, ERROR_BODY_BYTES, Overflow::Cut);
        let body = tokio::time::timeout(ERROR_BODY_TIME, read).await;
        let body = body.map_or_else(|_| Bytes::new(), |read| read.unwrap_or_default());
        let subject = self.url.to_string();
        let error = RegistryError::from_answer(
            &subject,
            self.url.authority(),
            self.parts.status,
            &self.parts.headers,
            &body,
        );
        // A signed URL that has run out is renewed by asking the registry again.
        let expired = self.elsewhere && matches!(self.parts.status.as_u16(), 400 | 401 | 403);
        let error = if expired { error.transient() } else { error };
        match self.note {
            Some(note) => error.with_note(&note),
            None => error,
        }
    }
}

/// What to do with more bytes than fit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Overflow {
    Cut,
    Refuse,
}

async fn read_body(mut body: Incoming, limit: u64, overflow: Overflow) -> Result<Bytes, BodyError> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|error| BodyError::Broken(chain_text(&error)))?.into_data()
        else {
            continue;
        };
        if (bytes.len() + data.len()) as u64 > limit {
            if overflow == Overflow::Refuse {
                return Err(BodyError::TooLarge);
            }
            let room = usize::try_from(limit).unwrap_or(usize::MAX) - bytes.len();
            bytes.extend_from_slice(&data[..room]);
            break;
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.freeze())
}

enum BodyError {
    TooLarge,
    Broken(String),
}

impl Inner {
    /// Makes a request, again where that may help; the answer is one that trying again would not change.
    pub(crate) async fn ask(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
    ) -> Result<Answer, RegistryError> {
        let mut retries = Retries::new(self.timing);
        loop {
            match self.ask_once(endpoint, ask).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => retries.wait(failure, &endpoint.host).await?,
            }
        }
    }

    /// Makes a request for a document of at most `limit` bytes and reads it whole.
    pub(crate) async fn ask_document(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
        limit: u64,
    ) -> Result<(Parts, Bytes), RegistryError> {
        let mut retries = Retries::new(self.timing);
        loop {
            let failure = match self.document_once(endpoint, ask, limit).await {
                Ok(document) => return Ok(document),
                Err(failure) => failure,
            };
            retries.wait(failure, &endpoint.host).await?;
        }
    }

    async fn document_once(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
        limit: u64,
    ) -> Result<(Parts, Bytes), RegistryError> {
        let answer = self.ask_once(endpoint, ask).await?;
        if !answer.status().is_success() {
            return Err(answer.into_error().await);
        }
        self.read_document(answer, limit).await
    }

    /// Reads the body of an answer, but never more than `limit` bytes of it.
    pub(crate) async fn read_document(
        &self,
        answer: Answer,
        limit: u64,
    ) -> Result<(Parts, Bytes), RegistryError> {
        let subject = answer.url.to_string();
        let too_large = || {
            let message = format!(
                "the document is larger than {limit} bytes, which no registry should serve"
            );
            RegistryError::new(RegistryErrorKind::TooLarge, subject.clone(), message)
        };
        let announced = answer.header(CONTENT_LENGTH).and_then(|text| text.parse::<u64>().ok());
        if announced.is_some_and(|announced| announced > limit) {
            return Err(too_large());
        }
        let broken = |reason: &str| {
            let message = format!("the answer of {} broke off: {reason}", answer.url.authority());
            RegistryError::new(RegistryErrorKind::Unreachable, subject.clone(), message).transient()
        };
        // Documents are small; whatever takes longer than this is stuck.
        let read = tokio::time::timeout(
            self.timing.stall * 2,
            read_body(answer.body, limit, Overflow::Refuse),
        );
        match read.await {
            Ok(Ok(bytes)) => Ok((answer.parts, bytes)),
            Ok(Err(BodyError::TooLarge)) => Err(too_large()),
            Ok(Err(BodyError::Broken(reason))) => Err(broken(&reason)),
            Err(_) => Err(broken("it came too slowly")),
        }
    }

    /// Makes one attempt; answers that may be different next time come back as transient errors.
    pub(crate) async fn ask_once(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
    ) -> Result<Answer, RegistryError> {
        if !ask.url.same_origin(&endpoint.url("")) {
            // Such as the place for an upload: it has no business with this registry's credentials.
            check_move(self, &endpoint.url(""), &ask.url)?;
            let mut answer = self.follow(ask, None).await?;
            answer.elsewhere = true;
            return self.settle(answer).await;
        }
        let authorization = self.current_authorization(endpoint, &ask.scopes).await?;
        let answer = self.follow(ask, authorization.as_ref()).await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                if error.kind() == RegistryErrorKind::Unreachable {
                    endpoint.host.forget_scheme().await;
                }
                return Err(error);
            }
        };
        if answer.status() != StatusCode::UNAUTHORIZED || answer.elsewhere {
            return self.settle(answer).await;
        }
        let wanted = challenges(&answer.parts.headers);
        match self.authorize(endpoint, &ask.scopes, &wanted, authorization).await? {
            // The one and only second try with fresh credentials.
            Reaction::Send(fresh) => self.settle(self.follow(ask, Some(&fresh)).await?).await,
            Reaction::GiveUp(note) => Ok(Answer { note, ..answer }),
        }
    }

    async fn settle(&self, answer: Answer) -> Result<Answer, RegistryError> {
        let again = super::error::is_transient_status(answer.status());
        let expired = answer.elsewhere && matches!(answer.status().as_u16(), 400 | 401 | 403);
        if again || expired { Err(answer.into_error().await) } else { Ok(answer) }
    }

    /// Sends a request and follows where it is sent, leaving credentials behind at the first other origin.
    pub(crate) async fn follow(
        &self,
        ask: &Ask<'_>,
        authorization: Option<&Authorization>,
    ) -> Result<Answer, RegistryError> {
        let mut url = ask.url.clone();
        let mut elsewhere = false;
        for _ in 0..=REDIRECTS {
            let host = self.host(url.authority())?;
            host.ready().await;
            let mut headers = ask.headers.clone();
            if let Some(authorization) = authorization.filter(|_| !elsewhere) {
                headers.insert(AUTHORIZATION, authorization.header());
            }
            let response = host.transport().send(&ask.method, &url, &headers, &ask.payload).await?;
            let (parts, body) = response.into_parts();
            if !matches!(parts.status.as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(Answer { parts, body, url, elsewhere, note: None });
            }
            let next = parts
                .headers
                .get(LOCATION)
                .and_then(|text| text.to_str().ok())
                .and_then(|text| url.join(text));
            let Some(next) = next else {
                return Err(refused(&url, "redirects without a usable Location"));
            };
            let keeps_method = matches!(parts.status.as_u16(), 307 | 308);
            if !keeps_method && ask.method != Method::GET && ask.method != Method::HEAD {
                return Err(refused(
                    &url,
                    &format!("redirects {} with {}", ask.method, parts.status.as_u16()),
                ));
            }
            check_move(self, &ask.url, &next)?;
            if ask.confidential && !ask.url.same_origin(&next) {
                return Err(refused(&url, &format!("redirects credentials to {next}")));
            }
            elsewhere |= !ask.url.same_origin(&next);
            url = next;
        }
        Err(refused(&ask.url, &format!("redirects more than {REDIRECTS} times")))
    }
}

/// Whether one may be sent from one place to another at all.
fn check_move(inner: &Inner, from: &Url, to: &Url) -> Result<(), RegistryError> {
    if to.is_link_local() {
        return Err(refused(
            from,
            &format!("redirects to the link-local address {}", to.authority()),
        ));
    }
    let downgrade = from.scheme() == Scheme::Https && to.scheme() == Scheme::Http;
    if downgrade && !inner.host(from.authority())?.allows_plain() {
        return Err(refused(from, &format!("redirects from https to {to}")));
    }
    Ok(())
}

fn refused(url: &Url, what: &str) -> RegistryError {
    let message = format!("{} {what}, which is not followed", url.authority());
    RegistryError::new(RegistryErrorKind::Protocol, url.to_string(), message)
}
