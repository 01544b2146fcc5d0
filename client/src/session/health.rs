//! Says that the client is there.

use async_trait::async_trait;
use futures::stream;
use slipway_spec::wire::health::health_check_response::ServingStatus;
use slipway_spec::wire::health::health_server::Health;
use slipway_spec::wire::health::{HealthCheckRequest, HealthCheckResponse};
use tonic::{Request, Response, Status};

pub(super) struct Alive;

#[async_trait]
impl Health for Alive {
    type WatchStream = stream::Pending<Result<HealthCheckResponse, Status>>;

    async fn check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(HealthCheckResponse { status: ServingStatus::Serving.into() }))
    }

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(stream::pending()))
    }
}
