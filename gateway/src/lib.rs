//! The Dockerfile frontend as a program of its own, to be packed in an image: whoever builds starts it, gives it the request
//! in its environment, and answers its questions on its standard streams, which are one gRPC connection.
//!
//! - [`environment`] reads what it was started with;
//! - [`bridge`] asks whoever started it, on behalf of [`slipway_frontend`];
//! - [`answer`] says what the result is.
//!
//! It works with any daemon that speaks BuildKit's gateway interface.

pub mod answer;
pub mod bridge;
pub mod environment;

use slipway_frontend::{FrontendRequest, dockerfile};
use slipway_spec::wire::MESSAGE_BYTES;
use slipway_spec::wire::gateway::llb_bridge_client::LlbBridgeClient;
use slipway_transport::channel::Channel;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::bridge::RemoteBridge;
use crate::environment::Environment;

/// What calls are made with.
pub(crate) type Client = LlbBridgeClient<Channel>;

/// Why nothing could be said.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The connection.
    #[error("cannot speak with whoever started this frontend: {0}")]
    Connection(String),
    /// A call.
    #[error("{}: {}", .0.code(), .0.message())]
    Call(Status),
}

/// Reads what is to be built, and says what the result is, or what is wrong.
///
/// # Errors
/// When there is nobody to say it to. What is wrong with a Dockerfile is said, and no error here.
pub async fn run<I>(environment: Environment, io: I) -> Result<(), RunError>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let end = CancellationToken::new();
    let (channel, connection) = Channel::open(io, end.clone())
        .await
        .map_err(|error| RunError::Connection(error.to_string()))?;
    let answered = async {
        let client = LlbBridgeClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES)
            .max_encoding_message_size(MESSAGE_BYTES);
        build(environment, client).await
    };
    let answered = tokio::select! {
        answered = answered => answered,
        () = connection => Err(RunError::Connection("it has hung up".into())),
    };
    end.cancel();
    answered
}

async fn build(environment: Environment, client: Client) -> Result<(), RunError> {
    let bridge = RemoteBridge::open(client, &environment).await.map_err(RunError::Call)?;
    let request =
        FrontendRequest { attrs: environment.attrs, build_platform: environment.platform };
    let found = dockerfile::build(&request, &bridge).await;
    bridge.send_warnings().await.map_err(RunError::Call)?;
    let said = match found {
        Ok(found) => answer::result(&bridge, found).await.map_err(|status| (&status).into()),
        Err(error) => Err(answer::failure(&error)),
    };
    bridge.give(said).await.map_err(RunError::Call)
}
