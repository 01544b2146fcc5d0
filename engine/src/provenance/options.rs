//! What is to be said of where a result comes from, as the attribute `attest:provenance` asks.

use std::collections::BTreeMap;

use slipway_spec::flag;

use crate::error::BuildError;

/// What provenance is to say, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProvenanceOptions {
    /// The form of the predicate.
    pub version: Slsa,
    /// Whether it tells all, or leaves out arguments, secrets and the graph.
    pub full: bool,
    /// Who builds, a URI.
    pub builder_id: String,
    /// Whether the client says that the same comes of the same.
    pub reproducible: bool,
    /// Whether it belongs into images alone.
    pub inline_only: bool,
    /// Whether a result whose materials are not all known is an error.
    pub complete_materials: bool,
    /// What it is called beside exported files.
    pub filename: String,
}

/// Versions of SLSA's provenance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slsa {
    /// `https://slsa.dev/provenance/v0.2`.
    V02,
    /// `https://slsa.dev/provenance/v1`.
    V1,
}

impl Slsa {
    /// Returns the type of the predicate.
    pub fn predicate_type(self) -> &'static str {
        match self {
            Self::V02 => "https://slsa.dev/provenance/v0.2",
            Self::V1 => "https://slsa.dev/provenance/v1",
        }
    }
}

impl Default for ProvenanceOptions {
    fn default() -> Self {
        Self {
            version: Slsa::V1,
            full: true,
            builder_id: String::new(),
            reproducible: false,
            inline_only: false,
            complete_materials: false,
            filename: "provenance.json".into(),
        }
    }
}

impl ProvenanceOptions {
    /// Reads the fields of the attribute.
    ///
    /// # Errors
    /// [`BuildError::Invalid`] when one makes no sense.
    pub fn parse(fields: &BTreeMap<String, String>) -> Result<Self, BuildError> {
        let mut options = Self::default();
        for (name, value) in fields {
            let truth = || {
                flag::parse(value).ok_or_else(|| {
                    BuildError::Invalid(format!("failed to parse {name} flag {value:?}"))
                })
            };
            match name.as_str() {
                "version" => {
                    options.version = match value.as_str() {
                        "v1" => Slsa::V1,
                        "v0.2" => Slsa::V02,
                        "" => {
                            let text = "provenance SLSA version cannot be empty";
                            return Err(BuildError::Invalid(text.into()));
                        }
                        _ => {
                            let text = format!("invalid provenance SLSA version: {value}");
                            return Err(BuildError::Invalid(text));
                        }
                    }
                }
                "mode" => {
                    options.full = match value.as_str() {
                        "max" | "full" => true,
                        "min" => false,
                        _ => return Err(BuildError::Invalid(format!("invalid mode {value:?}"))),
                    }
                }
                "builder-id" => options.builder_id.clone_from(value),
                "reproducible" => options.reproducible = truth()?,
                "complete-materials" => options.complete_materials = truth()?,
                // What is no truth is not true, as upstream has it.
                "inline-only" => options.inline_only = flag::parse(value).unwrap_or(false),
                "filename" => options.filename.clone_from(value),
                // How much of the machine steps used is not measured; others are for clients.
                _ => {}
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(fields: &[(&str, &str)]) -> Result<ProvenanceOptions, String> {
        let fields = fields.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        ProvenanceOptions::parse(&fields).map_err(|error| error.to_string())
    }

    #[test]
    fn fields_are_read_with_their_defaults() {
        assert_eq!(parse(&[]), Ok(ProvenanceOptions::default()));
        let options = parse(&[
            ("version", "v0.2"),
            ("mode", "min"),
            ("builder-id", "https://b"),
            ("reproducible", "true"),
            ("inline-only", "true"),
            ("filename", "p.json"),
            ("capture-usage", "true"),
        ]);
        let expected = ProvenanceOptions {
            version: Slsa::V02,
            full: false,
            builder_id: "https://b".into(),
            reproducible: true,
            inline_only: true,
            complete_materials: false,
            filename: "p.json".into(),
        };
        assert_eq!(options, Ok(expected));
        assert!(parse(&[("mode", "full")]).unwrap().full);
        assert!(!parse(&[("inline-only", "odd")]).unwrap().inline_only);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (name, value, expected) in [
            ("version", "v2", "invalid provenance SLSA version: v2"),
            ("version", "", "provenance SLSA version cannot be empty"),
            ("mode", "some", "invalid mode \"some\""),
            ("reproducible", "odd", "failed to parse reproducible flag \"odd\""),
        ] {
            assert_eq!(parse(&[(name, value)]), Err(expected.to_owned()));
        }
    }
}
