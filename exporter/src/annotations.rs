//! Annotations that an output is asked for, by what they are attached to.

use std::collections::BTreeMap;

use slipway_spec::Platform;

use crate::error::{ExportError, Result};
use crate::image::PlatformResult;

type Pairs = BTreeMap<String, String>;

/// Annotations of an image (OCI image specification, "Annotations").
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Annotations {
    /// Of the index.
    pub index: Pairs,
    /// Of whatever points at the index.
    pub index_descriptor: Pairs,
    /// Of manifests: all of them, or those of one platform.
    manifest: BTreeMap<Option<String>, Pairs>,
    /// Of what points at manifests, in the same way.
    manifest_descriptor: BTreeMap<Option<String>, Pairs>,
}

impl Annotations {
    /// Reads an output option: `annotation.KEY`, `annotation-KIND.KEY` or `annotation-KIND[PLATFORM].KEY`. Returns whether it
    /// is one.
    ///
    /// # Errors
    /// When there is no such kind or platform, or the kind has no platforms.
    pub(crate) fn read(&mut self, option: &str, value: &str) -> Result<bool> {
        let Some((head, key)) =
            option.strip_prefix("annotation").and_then(|rest| rest.split_once('.'))
        else {
            return Ok(false);
        };
        if key.is_empty() || !(head.is_empty() || head.starts_with(['-', '['])) {
            return Ok(false);
        }
        let invalid =
            |why: &str| ExportError::Invalid(format!("output option {option}={value}: {why}"));
        let (kind, platform) = match head.split_once('[') {
            None => (head, None),
            Some((kind, rest)) => {
                let text = rest.strip_suffix(']');
                let text = text.ok_or_else(|| invalid("the platform has no closing bracket"))?;
                let platform: Platform = text
                    .parse()
                    .map_err(|error: slipway_spec::PlatformError| invalid(&error.to_string()))?;
                (kind, Some(platform.normalized().full_name()))
            }
        };
        let pairs = match (kind, &platform) {
            ("" | "-manifest", _) => self.manifest.entry(platform).or_default(),
            ("-manifest-descriptor", _) => self.manifest_descriptor.entry(platform).or_default(),
            ("-index" | "-index-descriptor", Some(_)) => {
                return Err(invalid("an index has no platform"));
            }
            ("-index", None) => &mut self.index,
            ("-index-descriptor", None) => &mut self.index_descriptor,
            _ => return Err(invalid("there is no such kind of annotation")),
        };
        pairs.insert(key.into(), value.into());
        Ok(true)
    }

    /// Whether there are any.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns those of the manifest of a platform.
    pub(crate) fn manifest(&self, platform: &Platform) -> Pairs {
        of(&self.manifest, platform)
    }

    /// Returns those of what points at the manifest of a platform.
    pub(crate) fn manifest_descriptor(&self, platform: &Platform) -> Pairs {
        of(&self.manifest_descriptor, platform)
    }

    /// Checks that there is something for all of them.
    ///
    /// # Errors
    /// When a platform is not among the results, or there is no index.
    pub(crate) fn check(&self, results: &[PlatformResult], is_index: bool) -> Result<()> {
        let known: Vec<String> =
            results.iter().map(|result| result.platform.normalized().full_name()).collect();
        let named = self.manifest.keys().chain(self.manifest_descriptor.keys()).flatten();
        if let Some(missing) = named.into_iter().find(|name| !known.contains(name)) {
            let text = format!("invalid annotation: no platform {missing} found in source");
            return Err(ExportError::Invalid(text));
        }
        let of_index = self.index.len() + self.index_descriptor.len();
        if !is_index && of_index > 0 {
            let text = "index annotations not supported for single platform export";
            return Err(ExportError::Invalid(text.into()));
        }
        Ok(())
    }
}

/// What is said of one platform goes before what is said of all.
fn of(all: &BTreeMap<Option<String>, Pairs>, platform: &Platform) -> Pairs {
    let name = Some(platform.normalized().full_name());
    [None, name]
        .iter()
        .filter_map(|name| all.get(name))
        .flatten()
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(options: &[&str]) -> std::result::Result<Annotations, String> {
        let mut annotations = Annotations::default();
        for option in options {
            let is_one = annotations.read(option, "v").map_err(|error| error.to_string())?;
            assert!(is_one, "{option}");
        }
        Ok(annotations)
    }

    fn keys(pairs: &Pairs) -> Vec<&str> {
        pairs.keys().map(String::as_str).collect()
    }

    #[test]
    fn each_is_attached_to_what_it_names() {
        let annotations = read(&[
            "annotation.all",
            "annotation-manifest.org.x/y",
            "annotation[linux/arm64].arm",
            "annotation-manifest-descriptor[linux/arm64/v8].entry",
            "annotation-index.index",
            "annotation-index-descriptor.target",
        ])
        .unwrap();
        let [arm, amd] = ["linux/arm64", "linux/amd64"].map(|text| text.parse().unwrap());
        assert_eq!(keys(&annotations.manifest(&arm)), ["all", "arm", "org.x/y"]);
        assert_eq!(keys(&annotations.manifest(&amd)), ["all", "org.x/y"]);
        assert_eq!(keys(&annotations.manifest_descriptor(&arm)), ["entry"]);
        assert_eq!(keys(&annotations.manifest_descriptor(&amd)), [""; 0]);
        assert_eq!(keys(&annotations.index), ["index"]);
        assert_eq!(keys(&annotations.index_descriptor), ["target"]);
    }

    #[test]
    fn what_is_none_is_left_to_others_and_what_is_wrong_is_refused() {
        for other in ["annotations.x", "annotation", "annotation.", "name", "annotationx.y"] {
            assert!(!Annotations::default().read(other, "v").unwrap(), "{other}");
        }
        for (option, why) in [
            ("annotation-layer.x", "there is no such kind of annotation"),
            ("annotation-index[linux/amd64].x", "an index has no platform"),
            ("annotation[linux/amd64.x", "the platform has no closing bracket"),
            ("annotation[a/b/c/d].x", "a/b/c/d"),
        ] {
            let error = read(&[option]).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
