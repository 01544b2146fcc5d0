//! Calls to a client in which both sides send packets.

use bytes::Bytes;
use futures::Stream;
use http::uri::PathAndQuery;
use slipway_engine::store::{Error, ErrorKind};
use tokio::sync::mpsc;
use tonic::body::Body;
use tonic::client::{Grpc, GrpcService};
use tonic::codegen::{Body as HttpBody, StdError};
use tonic::metadata::{AsciiMetadataValue, MetadataKey, MetadataMap};
use tonic::{CancellationHandle, Request, Status, Streaming};
use tonic_prost::ProstCodec;

/// No message of a client is larger, in bytes; theirs are a hundredth of that.
const MAX_MESSAGE: usize = 4 << 20;

/// Starts a call. The messages of `outgoing` are sent while the answer is waited for.
pub(crate) async fn call<S, M>(
    channel: S,
    method: &'static str,
    request: Request<impl Stream<Item = M> + Send + 'static>,
) -> Result<Streaming<M>, Status>
where
    S: GrpcService<Body>,
    S::Error: Into<StdError>,
    S::ResponseBody: HttpBody<Data = Bytes> + Send + 'static,
    <S::ResponseBody as HttpBody>::Error: Into<StdError> + Send,
    M: prost::Message + Default + 'static,
{
    let mut grpc = Grpc::new(channel).max_decoding_message_size(MAX_MESSAGE);
    grpc.ready()
        .await
        .map_err(|error| Status::unavailable(format!("the client is gone: {}", error.into())))?;
    let path = PathAndQuery::from_static(method);
    let response = grpc.streaming(request, path, ProstCodec::<M, M>::default()).await?;
    Ok(response.into_inner())
}

/// Makes the outgoing side of a call from a channel.
pub(crate) fn stream<M: Send>(mut queue: mpsc::Receiver<M>) -> impl Stream<Item = M> + Send {
    futures::stream::poll_fn(move |context| queue.poll_recv(context))
}

/// Breaks a call off when it is dropped: a client that does not listen would hold on to it otherwise.
pub(crate) struct CancelOnDrop(Option<CancellationHandle>);

impl CancelOnDrop {
    pub(crate) fn new<T>(request: &mut Request<T>) -> Self {
        Self(Some(request.cancellation_handle()))
    }

    /// Lets the call end by itself.
    pub(crate) fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(handle) = self.0.take() {
            handle.cancel();
        }
    }
}

/// Adds all values of a key to the metadata of a call; none at all is as if the key were absent. Values that a header cannot
/// carry make all of that key be sent escaped, and a second key says so.
pub(crate) fn add_values<'a>(
    metadata: &mut MetadataMap,
    key: &'static str,
    values: impl IntoIterator<Item = &'a String> + Clone,
) -> Result<(), Error> {
    let plain = |value: &String| value.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    let encoded = !values.clone().into_iter().all(plain);
    for value in values {
        let value = if encoded { query_escape(value) } else { value.clone() };
        append(metadata, key, &value)?;
    }
    if encoded {
        append(metadata, &format!("{key}-encoded"), "1")?;
    }
    Ok(())
}

/// Adds one value to the metadata of a call.
pub(crate) fn append(metadata: &mut MetadataMap, key: &str, value: &str) -> Result<(), Error> {
    let invalid = |error: StdError| {
        Error::new(ErrorKind::Invalid, format!("cannot tell the client {key}={value:?}"))
            .because(error)
    };
    let name = MetadataKey::from_bytes(key.as_bytes()).map_err(|error| invalid(error.into()))?;
    let value: AsciiMetadataValue = value.parse().map_err(|error| invalid(Box::new(error)))?;
    metadata.append(name, value);
    Ok(())
}

/// Escapes text as the query of a URL.
fn query_escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' ' => escaped.push('+'),
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                escaped.push(char::from(byte));
            }
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(values: &[&str]) -> Vec<(String, String)> {
        let mut metadata = MetadataMap::new();
        let values: Vec<String> = values.iter().map(|value| (*value).to_owned()).collect();
        add_values(&mut metadata, "include-patterns", &values).unwrap();
        let headers = metadata.into_headers();
        headers
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_str().unwrap().to_owned()))
            .collect()
    }

    #[test]
    fn plain_values_are_sent_as_they_are() {
        let pair = |value: &str| ("include-patterns".to_owned(), value.to_owned());
        assert_eq!(headers(&["a b", "100%+", "!x"]), [pair("a b"), pair("100%+"), pair("!x")]);
        assert_eq!(headers(&[]), []);
    }

    #[test]
    fn one_value_that_needs_escaping_has_all_escaped() {
        assert_eq!(
            headers(&["a b/c", "ü~"]),
            [
                ("include-patterns".to_owned(), "a+b%2Fc".to_owned()),
                ("include-patterns".to_owned(), "%C3%BC~".to_owned()),
                ("include-patterns-encoded".to_owned(), "1".to_owned()),
            ]
        );
        assert_eq!(headers(&["a\nb"])[0].1, "a%0Ab");
    }
}
