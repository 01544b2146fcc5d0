//! What a frontend, or a client's policy, asks about sources.

use bytes::Bytes;
use slipway_engine::solver::source::image::Lookup;
use slipway_engine::solver::source::metadata::{
    ChecksumAlgorithm, ChecksumRequest, MetadataRequest, SourceMetadata,
};
use slipway_spec::llb::pb;
use slipway_spec::wire::gateway::checksum_request::ChecksumAlgo;
use slipway_spec::wire::gateway::{
    ChecksumResponse, ResolveImageConfigRequest, ResolveImageConfigResponse,
    ResolveSourceGitResponse, ResolveSourceHttpResponse, ResolveSourceImageResponse,
    ResolveSourceMetaRequest, ResolveSourceMetaResponse,
};
use slipway_spec::{ImageReference, Platform};
use tonic::Status;

use super::Gateway;
use crate::failure::{not_yet, solve_status};
use crate::policy;

/// How the resolver of an OCI layout is numbered.
const OCI_LAYOUT: i32 = 1;

impl Gateway {
    pub(super) async fn image_config(
        &self,
        request: ResolveImageConfigRequest,
    ) -> Result<ResolveImageConfigResponse, Status> {
        let policies = policy::read(&request.source_policies)?;
        let image: ImageReference =
            request.r#ref.parse().map_err(|error: slipway_spec::ReferenceError| {
                Status::invalid_argument(format!(
                    "could not parse reference {:?}: {error}",
                    request.r#ref
                ))
            })?;
        let mut source =
            pb::SourceOp { identifier: format!("docker-image://{image}"), ..Default::default() };
        if request.resolver_type == OCI_LAYOUT {
            source.identifier = format!("oci-layout://{image}");
            for (name, value) in
                [("oci.store", &request.store_id), ("oci.session", &request.session_id)]
            {
                if !value.is_empty() {
                    source.attrs.insert(name.into(), value.clone());
                }
            }
        }
        let mut asked = MetadataRequest::new(source);
        asked.shown_as = shown_as(&request.log_name, &asked.source);
        asked.platform = request.platform.as_ref().map(|p| Platform::from(p).normalized());
        asked.lookup = lookup(&request.resolve_mode);
        let found = self.build.source_metadata(&mut asked, &policies).await;
        let found = found.map_err(|error| solve_status(&error))?;
        self.scope.add_metadata(&asked, &found);
        let identifier = asked.source.identifier.as_str();
        let found = found.image.ok_or_else(|| {
            Status::unknown(format!(
                "ref mutated by policy to non-image: docker-image://{image} -> {identifier}"
            ))
        })?;
        let name = identifier.split_once("://").map_or(identifier, |(_, name)| name);
        Ok(ResolveImageConfigResponse {
            digest: found.digest.to_string(),
            config: found.config,
            r#ref: name.to_owned(),
        })
    }

    pub(super) async fn source_metadata(
        &self,
        request: ResolveSourceMetaRequest,
    ) -> Result<ResolveSourceMetaResponse, Status> {
        let policies = policy::read(&request.source_policies)?;
        let no_config = request.image.as_ref().is_some_and(|image| image.no_config);
        let mut asked = self::request(request)?;
        asked.shown_as = shown_as(&asked.shown_as, &asked.source);
        let found = self.build.source_metadata(&mut asked, &policies).await;
        let found = found.map_err(|error| solve_status(&error))?;
        self.scope.add_metadata(&asked, &found);
        let mut answer = response(asked.source, &found);
        if let Some(image) = answer.image.as_mut().filter(|_| no_config) {
            image.config = Bytes::new();
        }
        Ok(answer)
    }
}

fn shown_as(name: &str, source: &pb::SourceOp) -> String {
    match name {
        "" => format!("resolve image config for {}", source.identifier),
        name => name.to_owned(),
    }
}

fn lookup(mode: &str) -> Lookup {
    match mode {
        "pull" => Lookup::Registry,
        _ => Lookup::StoreFirst,
    }
}

/// Reads a question about a source.
///
/// # Errors
/// When it names no source, or asks for what cannot be found out here.
pub(crate) fn request(request: ResolveSourceMetaRequest) -> Result<MetadataRequest, Status> {
    let source = request
        .source
        .ok_or_else(|| Status::invalid_argument("source is required in the request"))?;
    let mut asked = MetadataRequest::new(source);
    asked.shown_as = request.log_name;
    asked.platform = request.platform.as_ref().map(|p| Platform::from(p).normalized());
    asked.lookup = lookup(&request.resolve_mode);
    if request.image.is_some_and(|image| image.attestation_chain) {
        return Err(not_yet("the attestation chain of an image"));
    }
    asked.git_objects = request.git.is_some_and(|git| git.return_object);
    if let Some(checksum) = request.http.and_then(|http| http.checksum_request) {
        let algorithm = match ChecksumAlgo::try_from(checksum.algo) {
            Ok(ChecksumAlgo::Sha256) => ChecksumAlgorithm::Sha256,
            Ok(ChecksumAlgo::Sha384) => ChecksumAlgorithm::Sha384,
            Ok(ChecksumAlgo::Sha512) => ChecksumAlgorithm::Sha512,
            Err(_) => {
                return Err(Status::invalid_argument(format!(
                    "unsupported checksum algorithm {}",
                    checksum.algo
                )));
            }
        };
        asked.checksum = Some(ChecksumRequest { algorithm, suffix: checksum.suffix });
    }
    Ok(asked)
}

/// Says what was found out about a source.
pub(crate) fn response(source: pb::SourceOp, found: &SourceMetadata) -> ResolveSourceMetaResponse {
    let image = found.image.as_ref().map(|image| ResolveSourceImageResponse {
        digest: image.digest.to_string(),
        config: image.config.clone(),
        attestation_chain: None,
    });
    let git = found.git.as_ref().map(|git| ResolveSourceGitResponse {
        checksum: git.checksum.clone(),
        r#ref: git.reference.clone(),
        commit_checksum: git.commit_checksum.clone().unwrap_or_default(),
        commit_object: git.commit_object.clone().unwrap_or_default(),
        tag_object: git.tag_object.clone().unwrap_or_default(),
    });
    let http = found.http.as_ref().map(|http| ResolveSourceHttpResponse {
        checksum: http.digest.to_string(),
        filename: http.filename.clone(),
        last_modified: http
            .last_modified
            .map(|seconds| prost_types::Timestamp { seconds, nanos: 0 }),
        checksum_response: http.checksum.as_ref().map(|checksum| ChecksumResponse {
            digest: checksum.digest.clone(),
            suffix: checksum.suffix.clone(),
        }),
    });
    ResolveSourceMetaResponse { source: Some(source), image, git, http }
}
