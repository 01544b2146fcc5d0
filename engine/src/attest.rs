//! What is to be said of results beside the results themselves: asked for in the frontend attributes, found out by
//! frontends or afterwards, and handed to outputs.

use std::collections::BTreeMap;

use futures::future::try_join_all;
use slipway_exporter::attestation::{self as exported, Content};
use slipway_frontend::attest::requested;
use slipway_frontend::{FrontendResult, ResolveMode, Scanner};
use slipway_spec::Platform;
use slipway_spec::attestation::{Attestation, AttestationKind};
use slipway_spec::llb::{Definition, State, marshal};
use slipway_store::snapshot::Snapshot;

use crate::Build;
use crate::error::BuildError;

/// What a caller wants to be said of results.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attest {
    /// What they are made of.
    pub sbom: Option<Sbom>,
    /// How they were made, by BuildKit's names; there is always a `version`.
    pub provenance: Option<BTreeMap<String, String>>,
}

/// How it is found out what results are made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sbom {
    /// What scans them.
    pub scanner: Scanner,
    /// Whether what it found once is still true.
    pub use_cache: bool,
    /// Where its name is looked up.
    pub mode: ResolveMode,
}

/// Reads what the frontend attributes ask to be said of results.
///
/// # Errors
/// [`BuildError::Invalid`] when it is something unknown, or makes no sense.
pub fn parse(attrs: &BTreeMap<String, String>) -> Result<Attest, BuildError> {
    let requested = requested(attrs).map_err(BuildError::Invalid)?;
    let sbom = requested.sbom.map(|scanner| {
        let mode = match attrs.get("image-resolve-mode").map(String::as_str) {
            None | Some("" | "default") => ResolveMode::Default,
            Some("pull") => ResolveMode::Pull,
            Some("local") => ResolveMode::Local,
            Some(other) => {
                return Err(BuildError::Invalid(format!("invalid image-resolve-mode: {other}")));
            }
        };
        // Other values name stages, and the scanner is none.
        let use_cache = attrs.get("no-cache").is_none_or(|stages| !stages.is_empty());
        Ok(Sbom { scanner, use_cache, mode })
    });
    Ok(Attest { sbom: sbom.transpose()?, provenance: requested.provenance })
}

/// Hands what is said of a result to outputs, together with the file system that it was found in.
pub fn to_export<F>(said: Attestation<F>, snapshot: Snapshot) -> exported::Attestation {
    let content = match said.kind {
        AttestationKind::Predicate => Content::File(snapshot),
        AttestationKind::Bundle => Content::Bundle(snapshot),
    };
    exported::Attestation {
        content,
        predicate_type: said.predicate_type,
        subjects: said.subjects,
        path: said.path,
        metadata: said.metadata.into_iter().map(|(key, value)| (key, value.into())).collect(),
    }
}

impl Build {
    /// Has results scanned, each under the name that people know it by. What comes back are graphs, in the same order;
    /// solving them runs the scanner.
    ///
    /// # Errors
    /// When there is no such scanner.
    pub async fn scan(
        &self,
        sbom: &Sbom,
        results: &[(String, Definition)],
    ) -> Result<Vec<Attestation<Option<Definition>>>, BuildError> {
        if results.is_empty() {
            return Ok(vec![]);
        }
        let scanner = sbom.scanner.find(self.bridge(), &Platform::host(), sbom.mode).await?;
        let one = |(name, definition): &(String, Definition)| {
            let core = State::from_definition(definition).map_err(|error| {
                BuildError::Invalid(format!("the graph of {name} cannot be scanned: {error}"))
            })?;
            let said = scanner.scan(name, &core, &BTreeMap::new(), !sbom.use_cache);
            let definition = marshal(&said.from, None);
            Ok(said.at(definition))
        };
        results.iter().map(one).collect()
    }

    /// Has the results of a frontend scanned, if it did not see to that itself.
    pub(crate) async fn scan_unscanned(
        &self,
        sbom: &Sbom,
        graphs: &mut FrontendResult,
    ) -> Result<(), BuildError> {
        let mut said = graphs.images.iter().flat_map(|image| &image.attestations);
        if said.any(Attestation::is_sbom) {
            return Ok(());
        }
        let results: Vec<_> = graphs
            .images
            .iter()
            .filter_map(|image| Some((image.platform.full_name(), image.definition.clone()?)))
            .collect();
        let scans = self.scan(sbom, &results).await?;
        let solid = graphs.images.iter_mut().filter(|image| image.definition.is_some());
        for (image, scan) in solid.zip(scans) {
            image.attestations.push(scan);
        }
        Ok(())
    }

    /// Has what is said of results, wherever that must be found out, and hands it to outputs.
    ///
    /// # Errors
    /// The first failure of a step.
    pub(crate) async fn attested(
        &self,
        said: Vec<Attestation<Option<Definition>>>,
    ) -> Result<Vec<exported::Attestation>, BuildError> {
        let one = |said: Attestation<Option<Definition>>| async move {
            let snapshot = match &said.from {
                Some(definition) => {
                    let edge = self.load(definition).await?;
                    self.obtain(&edge).await?
                }
                None => Snapshot::default(),
            };
            Ok::<_, BuildError>(to_export(said, snapshot))
        };
        try_join_all(said.into_iter().map(one)).await
    }
}

#[cfg(test)]
mod tests {
    use slipway_spec::attestation::Subject;

    use super::*;

    fn read(attrs: &[(&str, &str)]) -> Result<Attest, BuildError> {
        parse(&attrs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect())
    }

    #[test]
    fn attributes_say_how_to_scan() {
        assert_eq!(read(&[("image-resolve-mode", "odd")]).unwrap(), Attest::default());
        let sbom = |attrs: &[(&str, &str)]| {
            let all: Vec<_> = attrs.iter().copied().chain([("attest:sbom", "")]).collect();
            read(&all).map(|attest| attest.sbom.unwrap())
        };
        let found = sbom(&[]).unwrap();
        assert!(found.use_cache);
        assert_eq!(found.mode, ResolveMode::Default);
        assert!(sbom(&[("no-cache", "stage")]).unwrap().use_cache);
        assert!(!sbom(&[("no-cache", "")]).unwrap().use_cache);
        assert_eq!(sbom(&[("image-resolve-mode", "pull")]).unwrap().mode, ResolveMode::Pull);
        let error = sbom(&[("image-resolve-mode", "odd")]).unwrap_err();
        assert_eq!(error.to_string(), "invalid image-resolve-mode: odd");
        let error = read(&[("attest:other", "")]).unwrap_err();
        assert_eq!(error.to_string(), "unknown attestation type \"other\"");
    }

    #[test]
    fn outputs_are_told_everything_that_frontends_say() {
        let said = Attestation {
            kind: AttestationKind::Predicate,
            from: (),
            path: "/a.json".into(),
            predicate_type: "p".into(),
            subjects: vec![
                Subject::Own { name: "n".into() },
                Subject::Other { name: "o".into(), digests: vec![slipway_spec::Digest::of(b"x")] },
            ],
            metadata: [("reason".to_owned(), b"r".to_vec())].into(),
        };
        let told = to_export(said, Snapshot::default());
        assert!(matches!(told.content, Content::File(_)));
        assert_eq!((told.path.as_str(), told.predicate_type.as_str()), ("/a.json", "p"));
        assert_eq!(
            told.subjects,
            [
                Subject::Own { name: "n".into() },
                Subject::Other { name: "o".into(), digests: vec![slipway_spec::Digest::of(b"x")] }
            ]
        );
        assert_eq!(told.metadata["reason"], "r");
    }
}
