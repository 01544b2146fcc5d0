//! The gRPC interfaces between a build daemon and its clients: messages, clients and servers.
//!
//! All of it is generated from the files in `proto/` by `make codegen`, one module for each file. Names, packages and
//! numbers are BuildKit's, and so are paths of calls. Bytes are [`bytes::Bytes`], maps are ordered, times are
//! [`prost_types::Timestamp`]. The messages of the build graph (package `pb`) are those of [`crate::llb::pb`].
//!
//! Served by the daemon:
//! - [`control`], the main interface, `moby.buildkit.v1.Control`;
//! - [`gateway`], what a frontend builds with, `moby.buildkit.v1.frontend.LLBBridge`;
//! - [`trace`], takes spans, `opentelemetry.proto.collector.trace.v1.TraceService`.
//!
//! Served by clients, and called through their session:
//! - [`filesync`] has `moby.filesync.v1.FileSync` and `FileSend`;
//! - [`auth`] has `moby.filesync.v1.Auth`;
//! - [`secrets`] has `moby.buildkit.secrets.v1.Secrets`;
//! - [`sshforward`] has `moby.sshforward.v1.SSH`;
//! - [`upload`] has `moby.upload.v1.Upload`;
//! - [`exporter`] has `moby.exporter.v1.Exporter`;
//! - [`policysession`] has `moby.buildkit.v1.sourcepolicy.policysession.PolicyVerifier`.
//!
//! Served by both:
//! - [`content`], blobs by digest, `containerd.services.content.v1.Content`;
//! - [`health`] has `grpc.health.v1.Health`.
//!
//! Only messages:
//! - [`worker`] has `moby.buildkit.v1.types`;
//! - [`caps`] has `moby.buildkit.v1.apicaps`;
//! - [`sourcepolicy`] has `moby.buildkit.v1.sourcepolicy`;
//! - [`fsutil`] has `fsutil.types`, the messages of a file transfer;
//! - [`rpc`] has `google.rpc.Status`.
//!
//! No clients over a transport are made: a client is `XClient::new(service)` over any service that takes HTTP requests.

#![expect(
    missing_docs,
    clippy::allow_attributes,
    clippy::large_enum_variant,
    reason = "the modules below are generated; what is not said in the protocol files cannot be said here"
)]

use std::fmt;

use prost::Message as _;

#[rustfmt::skip]
pub mod auth;
#[rustfmt::skip]
pub mod caps;
#[rustfmt::skip]
pub mod content;
#[rustfmt::skip]
pub mod control;
#[rustfmt::skip]
pub mod exporter;
#[rustfmt::skip]
pub mod filesync;
#[rustfmt::skip]
pub mod fsutil;
#[rustfmt::skip]
pub mod gateway;
#[rustfmt::skip]
pub mod health;
#[rustfmt::skip]
pub mod policysession;
#[rustfmt::skip]
pub mod rpc;
#[rustfmt::skip]
pub mod secrets;
#[rustfmt::skip]
pub mod sourcepolicy;
#[rustfmt::skip]
pub mod sshforward;
#[rustfmt::skip]
pub mod trace;
#[rustfmt::skip]
pub mod upload;
#[rustfmt::skip]
pub mod worker;

/// The largest message that either side sends or takes.
pub const MESSAGE_BYTES: usize = 16 * 1024 * 1024;

/// A status as a message, with its details as they are; details that cannot be read are left out.
impl From<&tonic::Status> for rpc::Status {
    fn from(status: &tonic::Status) -> Self {
        Self {
            code: status.code().into(),
            message: status.message().to_owned(),
            details: Self::decode(status.details()).unwrap_or_default().details,
        }
    }
}

// Messages with passwords in them do not show them.

impl fmt::Debug for auth::CredentialsResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialsResponse")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for auth::FetchTokenResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("FetchTokenResponse");
        shown.field("expires_in", &self.expires_in).field("issued_at", &self.issued_at);
        shown.finish_non_exhaustive()
    }
}

impl fmt::Debug for secrets::GetSecretResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GetSecretResponse").field("bytes", &self.data.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn paths_of_calls_are_those_of_the_protocol() {
        for (actual, expected) in [
            (control::control_server::SERVICE_NAME, "moby.buildkit.v1.Control"),
            (gateway::llb_bridge_server::SERVICE_NAME, "moby.buildkit.v1.frontend.LLBBridge"),
            (auth::auth_server::SERVICE_NAME, "moby.filesync.v1.Auth"),
            (filesync::file_sync_server::SERVICE_NAME, "moby.filesync.v1.FileSync"),
            (filesync::file_send_server::SERVICE_NAME, "moby.filesync.v1.FileSend"),
            (secrets::secrets_server::SERVICE_NAME, "moby.buildkit.secrets.v1.Secrets"),
            (sshforward::ssh_server::SERVICE_NAME, "moby.sshforward.v1.SSH"),
            (upload::upload_server::SERVICE_NAME, "moby.upload.v1.Upload"),
            (content::content_server::SERVICE_NAME, "containerd.services.content.v1.Content"),
            (health::health_server::SERVICE_NAME, "grpc.health.v1.Health"),
            (exporter::exporter_server::SERVICE_NAME, "moby.exporter.v1.Exporter"),
            (
                policysession::policy_verifier_server::SERVICE_NAME,
                "moby.buildkit.v1.sourcepolicy.policysession.PolicyVerifier",
            ),
            (
                trace::trace_service_server::SERVICE_NAME,
                "opentelemetry.proto.collector.trace.v1.TraceService",
            ),
        ] {
            assert_eq!(actual, expected);
        }
    }

    #[test]
    fn the_order_of_map_entries_does_not_change_the_bytes() {
        let attributes = |names: [&str; 3]| control::Exporter {
            r#type: "image".into(),
            attrs: names.iter().map(|name| ((*name).into(), "1".into())).collect(),
        };
        let one = attributes(["a", "b", "c"]).encode_to_vec();
        assert_eq!(one, attributes(["c", "a", "b"]).encode_to_vec());
    }

    #[test]
    fn a_name_that_is_no_text_survives() {
        let stat =
            fsutil::Stat { path: b"dir/\xff".as_slice().into(), mode: 0o644, ..Default::default() };
        let read = fsutil::Stat::decode(stat.encode_to_vec().as_slice()).unwrap();
        assert_eq!(read, stat);
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = [
            format!(
                "{:?}",
                auth::CredentialsResponse { username: "me".into(), secret: "hush".into() }
            ),
            format!(
                "{:?}",
                auth::FetchTokenResponse { token: "hush".into(), ..Default::default() }
            ),
            format!("{:?}", secrets::GetSecretResponse { data: "hush".into() }),
        ];
        assert!(shown[0].contains("me"));
        for text in shown {
            assert!(!text.contains("hush"), "{text}");
        }
    }
}
