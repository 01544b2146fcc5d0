//! `--attest`, `--sbom` and `--provenance`, written as buildx has them.

use std::collections::BTreeMap;

use clap::Args;

use super::value::boolean;
use crate::output::csv_fields;

/// What is to be said of the result beside the result itself.
#[derive(Args, Debug, Default)]
pub(crate) struct AttestArgs {
    /// Attach an attestation: type=sbom|provenance[,KEY=VALUE…][,disabled=BOOL]
    ///
    /// The last one of a type counts. By itself, a build asks for none.
    #[arg(long = "attest", value_name = "ATTESTATION", value_parser = attestation)]
    attest: Vec<Attestation>,
    /// Attach a list of what the image is made of; the same as --attest type=sbom: true, false, or KEY=VALUE…
    ///
    /// generator=IMAGE names the scanner [default: docker/buildkit-syft-scanner:stable-1]
    #[arg(long, value_name = "VALUE", value_parser = sbom)]
    sbom: Option<Attestation>,
    /// Attach how the image was made; the same as --attest type=provenance: true, false, or KEY=VALUE…
    #[arg(long, value_name = "VALUE", value_parser = provenance)]
    provenance: Option<Attestation>,
}

/// One attestation, as a frontend attribute has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Attestation {
    kind: String,
    /// `None` is that there is none.
    value: Option<String>,
}

impl AttestArgs {
    /// Returns the frontend attributes that ask for what the flags ask for.
    pub(crate) fn attrs(&self) -> BTreeMap<String, String> {
        let mut wanted = BTreeMap::new();
        // The short forms come last, wherever they stand.
        for attestation in self.attest.iter().chain(&self.provenance).chain(&self.sbom) {
            wanted.insert(&attestation.kind, &attestation.value);
        }
        let attr = |(kind, value): (&String, &Option<String>)| {
            Some((format!("attest:{kind}"), value.clone()?))
        };
        wanted.into_iter().filter_map(attr).collect()
    }
}

fn sbom(text: &str) -> Result<Attestation, String> {
    short("sbom", text)
}

fn provenance(text: &str) -> Result<Attestation, String> {
    short("provenance", text)
}

/// Reads the value of a flag that names the type; an empty one asks for nothing, and forbids nothing.
fn short(kind: &str, text: &str) -> Result<Attestation, String> {
    if text.is_empty() {
        return Ok(Attestation { kind: String::new(), value: None });
    }
    match boolean(text) {
        Ok(wanted) => attestation(&format!("type={kind},disabled={}", !wanted)),
        Err(_) => attestation(&format!("type={kind},{text}")),
    }
}

/// Reads `type=KIND,KEY=VALUE…`.
fn attestation(text: &str) -> Result<Attestation, String> {
    let fields = csv_fields(text).map_err(|reason| format!("{text:?}: {reason}"))?;
    let (mut kind, mut disabled) = (String::new(), false);
    let mut rest = BTreeMap::new();
    for field in fields {
        let Some((key, value)) = field.split_once('=') else {
            return Err(format!("{field:?} is not of the form key=value"));
        };
        match key.trim().to_ascii_lowercase().as_str() {
            "type" => kind = value.to_owned(),
            "disabled" => disabled = boolean(value).map_err(|why| format!("{field}: {why}"))?,
            _ => drop(rest.insert(key.to_owned(), value.to_owned())),
        }
    }
    match kind.as_str() {
        "sbom" | "provenance" => {}
        "" => return Err("type= is missing: sbom or provenance".into()),
        other => {
            return Err(format!("unknown attestation type {other:?}: it is sbom or provenance"));
        }
    }
    let pairs = std::iter::once(("type", kind.as_str()))
        .chain(rest.iter().map(|(key, value)| (key.as_str(), value.as_str())));
    let value = pairs.map(|(key, value)| quoted(&format!("{key}={value}"))).collect::<Vec<_>>();
    Ok(Attestation { value: (!disabled).then(|| value.join(",")), kind })
}

/// Writes a field of a record.
fn quoted(field: &str) -> String {
    if field.contains([',', '"']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use crate::args::{Command, parse};

    fn attrs(words: &[&str]) -> Result<String, String> {
        let words = ["slipway", "build"].iter().chain(words).chain(&["."]).map(Into::into);
        match parse(words).map_err(|error| error.to_string())?.command {
            Command::Build(args) => {
                let attrs = args.attest.attrs();
                let attrs: Vec<_> =
                    attrs.iter().map(|(key, value)| format!("{key} {value}")).collect();
                Ok(attrs.join("; "))
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_become_attributes() {
        for (words, expected) in [
            (&[][..], ""),
            (&["--sbom=true"], "attest:sbom type=sbom"),
            (
                &["--sbom", "1", "--provenance=t"],
                "attest:provenance type=provenance; attest:sbom type=sbom",
            ),
            (&["--sbom=false", "--provenance", "0"], ""),
            (&["--sbom=generator=me/scan"], "attest:sbom type=sbom,generator=me/scan"),
            (
                &["--provenance=mode=max,version=v1"],
                "attest:provenance type=provenance,mode=max,version=v1",
            ),
            (&["--attest", "type=sbom"], "attest:sbom type=sbom"),
            (&["--attest=Type=sbom,disabled=true"], ""),
            (
                &["--attest=type=sbom,b=2,\"a=x,\"\"y\"\"\",disabled=0"],
                "attest:sbom type=sbom,\"a=x,\"\"y\"\"\",b=2",
            ),
            // The last one of a type counts.
            (
                &["--attest=type=sbom", "--attest=type=sbom,generator=a"],
                "attest:sbom type=sbom,generator=a",
            ),
            (&["--attest=type=sbom,generator=a", "--sbom=false"], ""),
            (&["--attest=type=sbom", "--sbom="], "attest:sbom type=sbom"),
            (&["--sbom=false", "--sbom=true"], "attest:sbom type=sbom"),
        ] {
            assert_eq!(attrs(words).as_deref(), Ok(expected), "{words:?}");
        }
    }

    #[test]
    fn mistakes_are_told() {
        for (words, message) in [
            (&["--attest=generator=x"][..], "type= is missing"),
            (&["--attest=type=other"], "unknown attestation type \"other\""),
            (&["--attest=type=sbom,x"], "\"x\" is not of the form key=value"),
            (&["--attest=type=sbom,disabled=maybe"], "disabled=maybe"),
            (&["--sbom=yes"], "\"yes\" is not of the form key=value"),
            (&["--provenance=\"mode"], "a quote"),
        ] {
            let error = attrs(words).unwrap_err();
            assert!(error.contains(message), "{words:?}: {error}");
        }
    }
}
