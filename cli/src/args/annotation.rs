//! `--annotation [KIND[,KIND…]:]KEY=VALUE`, where a kind is `index`, `manifest`, … with an optional `[platform]`.

use slipway_spec::Platform;

/// What an annotation is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AnnotationKind {
    /// The manifest of each platform.
    Manifest,
    /// The index.
    Index,
    /// The index's entry for a manifest.
    ManifestDescriptor,
    /// The entry for the index in an image layout.
    IndexDescriptor,
}

impl AnnotationKind {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "manifest" => Some(Self::Manifest),
            "index" => Some(Self::Index),
            "manifest-descriptor" => Some(Self::ManifestDescriptor),
            "index-descriptor" => Some(Self::IndexDescriptor),
            _ => None,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Index => "index",
            Self::ManifestDescriptor => "manifest-descriptor",
            Self::IndexDescriptor => "index-descriptor",
        }
    }
}

/// One annotation and everything it is written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Annotation {
    targets: Vec<(AnnotationKind, Option<Platform>)>,
    key: String,
    value: String,
}

impl Annotation {
    /// Returns the annotation as output attributes, one for each target: `annotation-index.KEY`.
    pub(crate) fn attributes(&self) -> impl Iterator<Item = (String, String)> + '_ {
        self.targets.iter().map(|(kind, platform)| {
            let kind = match kind {
                AnnotationKind::Manifest => String::new(),
                other => format!("-{}", other.as_str()),
            };
            let platform =
                platform.as_ref().map_or_else(String::new, |platform| format!("[{platform}]"));
            (format!("annotation{kind}{platform}.{}", self.key), self.value.clone())
        })
    }
}

/// Parses the value of `--annotation`.
pub(crate) fn annotation(text: &str) -> Result<Annotation, String> {
    let (head, value) = text.split_once('=').ok_or("expected [KIND:]KEY=VALUE")?;
    // The key itself may hold a colon, so a prefix counts only when it reads as kinds.
    let (targets, key) = match head.split_once(':') {
        Some((kinds, key)) if starts_as_kind(kinds) => (targets(kinds)?, key),
        _ => (vec![(AnnotationKind::Manifest, None)], head),
    };
    if key.is_empty() {
        return Err("the key of the annotation is empty".into());
    }
    Ok(Annotation { targets, key: key.into(), value: value.into() })
}

fn starts_as_kind(text: &str) -> bool {
    let first = text.split([',', '[']).next().unwrap_or_default();
    AnnotationKind::parse(first).is_some()
}

fn targets(kinds: &str) -> Result<Vec<(AnnotationKind, Option<Platform>)>, String> {
    kinds
        .split(',')
        .map(|target| {
            let (kind, platform) = match target.split_once('[') {
                Some((kind, rest)) => {
                    let inner = rest.strip_suffix(']').ok_or_else(|| format!("{target:?} lacks its closing bracket"))?;
                    (kind, Some(inner.parse::<Platform>().map_err(|error| error.to_string())?))
                }
                None => (target, None),
            };
            let kind = AnnotationKind::parse(kind).ok_or_else(|| {
                format!("unknown kind {kind:?}: use manifest, index, manifest-descriptor or index-descriptor")
            })?;
            if platform.is_some() && matches!(kind, AnnotationKind::Index | AnnotationKind::IndexDescriptor) {
                return Err(format!("{} annotations cannot be limited to a platform", kind.as_str()));
            }
            Ok((kind, platform))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn becomes_output_attributes() {
        for (text, expected) in [
            ("a=b", vec![("annotation.a", "b")]),
            ("a.b/c=d=e", vec![("annotation.a.b/c", "d=e")]),
            ("index:Key=v", vec![("annotation-index.Key", "v")]),
            ("manifest[linux/arm64]:k=", vec![("annotation[linux/arm64].k", "")]),
            (
                "index,manifest-descriptor[linux/amd64]:k=v",
                vec![
                    ("annotation-index.k", "v"),
                    ("annotation-manifest-descriptor[linux/amd64].k", "v"),
                ],
            ),
            ("urn:x=y", vec![("annotation.urn:x", "y")]),
        ] {
            let pairs: Vec<_> = annotation(text).unwrap().attributes().collect();
            let expected: Vec<_> =
                expected.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            assert_eq!(pairs, expected, "{text}");
        }
        for bad in [
            "a",
            "=b",
            "index:=b",
            "index,nope:a=b",
            "manifest[linux/arm64:a=b",
            "index[linux/amd64]:a=b",
        ] {
            assert!(annotation(bad).is_err(), "{bad}");
        }
    }
}
