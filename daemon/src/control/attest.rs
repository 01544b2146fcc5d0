//! What is said of results that their frontend does not say.

use std::collections::BTreeMap;

use slipway_engine::Build;
use slipway_engine::attest::{Sbom, parse};
use slipway_engine::exporter::PlatformResult;
use slipway_engine::provenance::{self, ProvenanceOptions};
use tonic::Status;

use crate::failure::build_status;
use crate::gateway::{Gateway, Outcome};
use crate::history::Recording;

/// What a client wants to be said of results.
#[derive(Debug)]
pub(super) struct Wanted {
    sbom: Option<Sbom>,
    provenance: Option<ProvenanceOptions>,
}

/// Reads what a client wants to be said of results.
///
/// # Errors
/// When that makes no sense, or cannot be said.
pub(super) fn wanted(attrs: &BTreeMap<String, String>) -> Result<Wanted, Status> {
    let attest = parse(attrs).map_err(|error| build_status(&error))?;
    let options = attest.provenance.as_ref().map(ProvenanceOptions::parse).transpose();
    let provenance = options.map_err(|error| build_status(&error))?;
    Ok(Wanted { sbom: attest.sbom, provenance })
}

/// Adds to results what a client wants to be said of them, after they were solved. `results` are in the order of `outcome`.
///
/// # Errors
/// When a scanner cannot be found, or fails.
pub(super) async fn attest(
    gateway: &Gateway,
    outcome: &Outcome,
    results: &mut [PlatformResult],
    wanted: &Wanted,
) -> Result<(), Status> {
    if let Some(sbom) = &wanted.sbom {
        let scans = gateway.scan(outcome, sbom).await?;
        for (result, scan) in results.iter_mut().zip(scans) {
            result.attestations.extend(scan);
        }
    }
    Ok(())
}

/// Says of results where they come from: to whoever wants to know, and in the record of the build.
///
/// # Errors
/// When a source cannot be found any more, or not all is known that the client wants to be known.
pub(super) async fn provenance(
    build: &Build,
    outcome: &Outcome,
    results: &mut [PlatformResult],
    wanted: &Wanted,
    recording: Option<&Recording>,
) -> Result<(), Status> {
    if wanted.provenance.is_none() && recording.is_none() {
        return Ok(());
    }
    let origins = Gateway::origins(outcome)?;
    let found = match build.provenance(&origins, outcome.multi_platform).await {
        Ok(found) => found,
        // The record of a build is no reason to fail it.
        Err(error) if wanted.provenance.is_none() => {
            tracing::warn!(%error, "the record of a build has no provenance");
            return Ok(());
        }
        Err(error) => return Err(build_status(&error)),
    };
    if let Some(options) = &wanted.provenance {
        let attested = provenance::attest(&found, options, results);
        attested.map_err(|error| build_status(&error))?;
    }
    if let Some(recording) = recording {
        let builder = wanted.provenance.as_ref().map(|options| options.builder_id.clone());
        let ids = outcome.images.iter().map(|image| image.id.clone());
        let of = |id| outcome.multi_platform.then_some(id);
        recording.made_from(ids.map(of).zip(found), builder.unwrap_or_default());
    }
    Ok(())
}
