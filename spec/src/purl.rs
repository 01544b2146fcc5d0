//! Package URLs of images (Package URL specification), in the spelling of BuildKit.

use std::fmt::Write as _;

use crate::{ImageReference, Platform};

/// Where an image comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PurlKind {
    /// A registry.
    Docker,
    /// An OCI image layout.
    Oci,
}

impl PurlKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Oci => "oci",
        }
    }
}

/// Returns the package URL of an image: `pkg:docker/alpine@3.20?platform=linux%2Famd64`. A digest of the reference is a
/// qualifier; the platform is normalised, and neither the version nor the features of its system are named.
pub fn image_purl(
    kind: PurlKind,
    reference: &ImageReference,
    platform: Option<&Platform>,
) -> String {
    let parts: Vec<String> = reference.familiar_repository().split('/').map(escape_part).collect();
    let mut purl = format!("pkg:{}/{}", kind.as_str(), parts.join("/"));
    if let Some(tag) = reference.tag() {
        purl.push('@');
        purl.push_str(&escape_value(tag));
    }
    if let Some(digest) = reference.digest() {
        purl = with_qualifier(&purl, "digest", &digest.to_string());
    }
    if let Some(platform) = platform {
        purl = with_qualifier(&purl, "platform", &platform.normalized().to_string());
    }
    purl
}

/// Returns a package URL with a qualifier at the end; one of the same name gets the new value in its place.
#[must_use]
pub fn with_qualifier(purl: &str, name: &str, value: &str) -> String {
    let ours = format!("{name}={}", escape_value(value));
    let Some((base, qualifiers)) = purl.rsplit_once('?') else { return format!("{purl}?{ours}") };
    let mut all: Vec<&str> = qualifiers.split('&').collect();
    let same = |one: &&mut &str| one.split_once('=').map_or(**one, |(key, _)| key) == name;
    match all.iter_mut().find(same) {
        Some(place) => *place = &ours,
        None => all.push(&ours),
    }
    format!("{base}?{}", all.join("&"))
}

/// Names and namespaces, where everything that could separate parts is escaped.
fn escape_part(text: &str) -> String {
    escape(text, b"")
}

/// Versions and values of qualifiers.
fn escape_value(text: &str) -> String {
    escape(text, b"$&+:=@")
}

fn escape(text: &str, kept: &[u8]) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        let plain = byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
        if plain || kept.contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            write!(escaped, "%{byte:02X}").expect("texts grow as needed");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Digest;

    fn purl(reference: &str, platform: Option<&str>) -> String {
        let platform = platform.map(|text| text.parse().unwrap());
        image_purl(PurlKind::Docker, &reference.parse().unwrap(), platform.as_ref())
    }

    #[test]
    fn images_are_named_in_their_short_form() {
        let digest = Digest::of(b"test");
        for (reference, expected) in [
            ("alpine", "pkg:docker/alpine@latest".to_owned()),
            ("library/alpine:3.15", "pkg:docker/alpine@3.15".into()),
            ("docker.io/library/alpine:latest", "pkg:docker/alpine@latest".into()),
            (&format!("alpine:1@{digest}"), format!("pkg:docker/alpine@1?digest={digest}")),
            (&format!("alpine@{digest}"), format!("pkg:docker/alpine?digest={digest}")),
            ("user/test:v2", "pkg:docker/user/test@v2".into()),
            ("ghcr.io/foo/bar:v2", "pkg:docker/ghcr.io/foo/bar@v2".into()),
            ("localhost:5000/a/b", "pkg:docker/localhost%3A5000/a/b@latest".into()),
            ("[::1]:5000/x:1", "pkg:docker/%5B%3A%3A1%5D%3A5000/x@1".into()),
        ] {
            assert_eq!(purl(reference, None), expected, "{reference}");
        }
        let layout = image_purl(PurlKind::Oci, &"not-real:5000/a:b".parse().unwrap(), None);
        assert_eq!(layout, "pkg:oci/not-real%3A5000/a@b");
    }

    #[test]
    fn platforms_are_normalised_and_escaped() {
        assert_eq!(
            purl("busybox", Some("linux/arm64/v8")),
            "pkg:docker/busybox@latest?platform=linux%2Farm64"
        );
        let windows = "windows(10.0.1+win32k)/amd64";
        assert_eq!(purl("a", Some(windows)), "pkg:docker/a@latest?platform=windows%2Famd64");
        let digest = Digest::of(b"test");
        assert_eq!(
            purl(&format!("busybox@{digest}"), Some("linux/arm/v7")),
            format!("pkg:docker/busybox?digest={digest}&platform=linux%2Farm%2Fv7")
        );
    }

    #[test]
    fn qualifiers_are_added_or_replaced() {
        let plain = "pkg:docker/a@latest";
        let one = with_qualifier(plain, "ref_type", "blob");
        assert_eq!(one, "pkg:docker/a@latest?ref_type=blob");
        let url = with_qualifier(&one, "vcs_url", "https://x.org/a+b@c?d=e;f,g h");
        assert_eq!(
            url,
            "pkg:docker/a@latest?ref_type=blob&vcs_url=https:%2F%2Fx.org%2Fa+b@c%3Fd=e%3Bf%2Cg%20h"
        );
        let again = with_qualifier(&url, "ref_type", "bundle");
        assert!(again.starts_with("pkg:docker/a@latest?ref_type=bundle&vcs_url=https:"), "{again}");
    }

    #[test]
    fn names_and_values_escape_different_characters() {
        assert_eq!(escape_part("a+b:c/d@e~f"), "a%2Bb%3Ac%2Fd%40e~f");
        assert_eq!(escape_value("a+b:c/d@e~f"), "a+b:c%2Fd@e~f");
        assert_eq!(escape_value("ü%"), "%C3%BC%25");
    }
}
