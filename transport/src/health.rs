//! Tells that somebody is there.

use futures::stream::BoxStream;
use futures::{StreamExt as _, stream};
use slipway_spec::wire::health::health_check_response::ServingStatus;
use slipway_spec::wire::health::health_server::Health;
use slipway_spec::wire::health::{HealthCheckRequest, HealthCheckResponse};
use tonic::{Request, Response, Status};

/// Answers as long as it is served.
#[derive(Clone, Copy, Debug, Default)]
pub struct Alive;

fn serving() -> HealthCheckResponse {
    HealthCheckResponse { status: ServingStatus::Serving.into() }
}

#[tonic::async_trait]
impl Health for Alive {
    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    async fn check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(serving()))
    }

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        // It changes only with the end of the connection, which ends the stream.
        let stream = stream::once(async { Ok(serving()) }).chain(stream::pending());
        Ok(Response::new(stream.boxed()))
    }
}
