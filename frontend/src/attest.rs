//! What callers ask to be said of results beside the results themselves.

use std::collections::BTreeMap;

use crate::{Scanner, csv};

/// The kind of attestations that say what a result is made of.
const SBOM: &str = "sbom";

/// The kind of attestations that say how a result was made.
const PROVENANCE: &str = "provenance";

/// The program that lists what a file system is made of, where the caller names none.
const DEFAULT_SCANNER: &str = "docker/buildkit-syft-scanner:stable-1";

/// The version of provenance, where the caller names none.
const DEFAULT_VERSION: &str = "v1";

/// Which attestations a caller asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requested {
    /// How results are to be scanned.
    pub sbom: Option<Scanner>,
    /// How it is to be said how results were made, by BuildKit's names; there is always a `version`.
    pub provenance: Option<BTreeMap<String, String>>,
}

/// Reads which attestations the frontend attributes ask for: `attest:<kind>`, or `build-arg:BUILDKIT_ATTEST_<KIND>`.
///
/// # Errors
/// In words for people, when something else is asked for, or it makes no sense.
pub fn requested(attrs: &BTreeMap<String, String>) -> Result<Requested, String> {
    let mut requested = Requested::default();
    for (key, value) in attrs {
        let kind =
            key.strip_prefix("attest:").or_else(|| key.strip_prefix("build-arg:BUILDKIT_ATTEST_"));
        let Some(kind) = kind.map(str::to_lowercase) else { continue };
        let default = match kind.as_str() {
            SBOM => ("generator", DEFAULT_SCANNER),
            PROVENANCE => ("version", DEFAULT_VERSION),
            _ => return Err(format!("unknown attestation type {kind:?}")),
        };
        let fields = if value.is_empty() { Ok(vec![]) } else { csv::fields(value) };
        let fields = fields.map_err(|reason| format!("failed to parse {kind}: {reason}"))?;
        let mut parameters = BTreeMap::from([(default.0.to_owned(), default.1.to_owned())]);
        for field in fields {
            let (key, value) = field.split_once('=').unwrap_or((&field, ""));
            parameters.insert(key.to_owned(), value.to_owned());
        }
        if kind == PROVENANCE {
            requested.provenance = Some(parameters);
            continue;
        }
        let image = parameters.remove("generator").unwrap_or_default();
        if image.is_empty() {
            return Err("sbom generator cannot be empty".into());
        }
        let image = image
            .parse()
            .map_err(|error| format!("failed to parse sbom generator {image}: {error}"))?;
        requested.sbom = Some(Scanner { image, parameters });
    }
    Ok(requested)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(attrs: &[(&str, &str)]) -> Result<Requested, String> {
        requested(&attrs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect())
    }

    fn pairs(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }

    #[test]
    fn nothing_is_asked_for_by_default() {
        assert_eq!(read(&[("build-arg:A", "attest:sbom")]), Ok(Requested::default()));
    }

    #[test]
    fn attributes_and_build_arguments_ask_for_attestations() {
        let found = read(&[("attest:sbom", ""), ("attest:provenance", "")]).unwrap();
        let scanner = found.sbom.unwrap();
        assert_eq!(scanner.image.to_string(), "docker.io/docker/buildkit-syft-scanner:stable-1");
        assert_eq!(scanner.parameters, pairs(&[]));
        assert_eq!(found.provenance, Some(pairs(&[("version", "v1")])));

        let found = read(&[
            ("build-arg:BUILDKIT_ATTEST_SBOM", "\"generator=me/scan\",\"a=b,c\",d"),
            ("build-arg:BUILDKIT_ATTEST_PROVENANCE", "mode=max,version=v0.2"),
        ])
        .unwrap();
        let scanner = found.sbom.unwrap();
        assert_eq!(scanner.image.to_string(), "docker.io/me/scan:latest");
        assert_eq!(scanner.parameters, pairs(&[("a", "b,c"), ("d", "")]));
        assert_eq!(found.provenance, Some(pairs(&[("mode", "max"), ("version", "v0.2")])));
    }

    #[test]
    fn mistakes_are_told() {
        for (key, value, message) in [
            ("attest:foo", "", "unknown attestation type \"foo\""),
            ("build-arg:BUILDKIT_ATTEST_FOO", "", "unknown attestation type \"foo\""),
            ("attest:sbom", "generator=", "sbom generator cannot be empty"),
            ("attest:sbom", "generator=A//b", "failed to parse sbom generator A//b: "),
            ("attest:provenance", "\"mode", "failed to parse provenance: "),
        ] {
            let error = read(&[(key, value)]).unwrap_err();
            assert!(error.starts_with(message), "{key}={value}: {error}");
        }
    }
}
