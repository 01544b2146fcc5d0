//! Image references: `[host/]path[:tag][@digest]`, with Docker's defaults.

use std::fmt;
use std::str::FromStr;

use crate::Digest;

/// A checked, fully qualified image name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageReference {
    host: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is not a reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid image reference {text:?}: {reason}")]
pub struct ReferenceError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}

/// The host that names without one belong to.
pub const DEFAULT_HOST: &str = "docker.io";

impl ImageReference {
    /// Returns the registry's host with its port, as written: `docker.io`, `localhost:5000`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Returns the repository's path at the host: `library/debian`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Returns host and path.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.host, self.path)
    }

    /// Returns the tag; a reference with neither tag nor digest got `latest` when it was parsed.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Returns the digest, which wins over the tag.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Returns the same name pinned to a digest, tag kept.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }

    /// Returns the same name without its digest.
    #[must_use]
    pub fn without_digest(&self) -> Self {
        Self {
            digest: None,
            tag: self.tag.clone().or_else(|| Some("latest".into())),
            ..self.clone()
        }
    }

    /// Returns the short form that people write: no `docker.io/`, no `library/`.
    pub fn familiar(&self) -> String {
        let mut name = self.familiar_repository();
        if let Some(tag) = &self.tag {
            name.push(':');
            name.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            name.push('@');
            name.push_str(&digest.to_string());
        }
        name
    }

    /// Returns the short form of the repository alone.
    pub fn familiar_repository(&self) -> String {
        if self.host != DEFAULT_HOST {
            return self.repository();
        }
        match self.path.strip_prefix("library/") {
            Some(rest) if !rest.contains('/') => rest.into(),
            _ => self.path.clone(),
        }
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        self.digest.as_ref().map_or(Ok(()), |digest| write!(f, "@{digest}"))
    }
}

fn valid_component(component: &str) -> bool {
    // Runs of lower-case letters and digits, joined by one '.', one or two '_', or any number of '-'.
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    if bytes.is_empty() || !alnum(bytes[0]) || !alnum(bytes[bytes.len() - 1]) {
        return false;
    }
    let mut rest = component;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        if rest.is_empty() {
            return true;
        }
        let separator: String = rest.chars().take_while(|c| matches!(c, '.' | '_' | '-')).collect();
        let good = matches!(separator.as_str(), "." | "_" | "__")
            || (!separator.is_empty() && separator.bytes().all(|b| b == b'-'));
        if !good {
            return false;
        }
        rest = &rest[separator.len()..];
    }
}

fn valid_host(host: &str) -> bool {
    let (name, port) = if let Some(rest) = host.strip_prefix('[') {
        match rest.split_once(']') {
            Some((v6, tail))
                if v6.bytes().all(|b| b.is_ascii_hexdigit() || b == b':' || b == b'.') =>
            {
                return tail.is_empty()
                    || tail
                        .strip_prefix(':')
                        .is_some_and(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()));
            }
            _ => return false,
        }
    } else {
        match host.rsplit_once(':') {
            Some((name, port)) => (name, Some(port)),
            None => (host, None),
        }
    };
    port.is_none_or(|p| !p.is_empty() && p.len() <= 5 && p.bytes().all(|b| b.is_ascii_digit()))
        && name.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
}

impl FromStr for ImageReference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let fail = |reason: &str| ReferenceError { text: text.into(), reason: reason.into() };
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => {
                let digest = digest
                    .parse::<Digest>()
                    .map_err(|e| ReferenceError { text: text.into(), reason: e.to_string() })?;
                (name, Some(digest))
            }
            None => (text, None),
        };
        if digest.is_none() && name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(fail("64 hexadecimal digits are an id, not a name"));
        }
        let (name, tag) = match name.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (name, None),
        };
        if let Some(tag) = tag {
            let first = tag.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
            let rest =
                tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
            if !first || !rest || tag.len() > 128 {
                return Err(fail("the tag must be 1 to 128 letters, digits, '_', '.' or '-'"));
            }
        }
        let (host, path) = match name.split_once('/') {
            Some((host, path))
                if host.contains(['.', ':'])
                    || host == "localhost"
                    || host.bytes().any(|b| b.is_ascii_uppercase()) =>
            {
                (host, path.to_owned())
            }
            Some(_) => (DEFAULT_HOST, name.to_owned()),
            None => (DEFAULT_HOST, format!("library/{name}")),
        };
        let host = if host == "index.docker.io" { DEFAULT_HOST } else { host };
        let path = if host == DEFAULT_HOST && !path.contains('/') {
            format!("library/{path}")
        } else {
            path
        };
        if name.is_empty() {
            return Err(fail("the name is empty"));
        }
        if !valid_host(host) {
            return Err(fail("the registry host is not a host name with an optional port"));
        }
        if let Some(bad) = path.split('/').find(|component| !valid_component(component)) {
            let reason = if bad.bytes().any(|b| b.is_ascii_uppercase()) {
                "repository names must be lower case".to_owned()
            } else {
                format!("{bad:?} is not a valid part of a repository name")
            };
            return Err(ReferenceError { text: text.into(), reason });
        }
        if host.len() + 1 + path.len() > 255 {
            return Err(fail("the name is longer than 255 characters"));
        }
        let tag = match (tag, &digest) {
            (Some(tag), _) => Some(tag.to_owned()),
            (None, None) => Some("latest".to_owned()),
            (None, Some(_)) => None,
        };
        Ok(Self { host: host.into(), path, tag, digest })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_in_dockers_defaults() {
        for (text, full, familiar) in [
            ("debian", "docker.io/library/debian:latest", "debian:latest"),
            ("debian:12", "docker.io/library/debian:12", "debian:12"),
            ("me/app", "docker.io/me/app:latest", "me/app:latest"),
            ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
            ("localhost:5000/a/b:c", "localhost:5000/a/b:c", "localhost:5000/a/b:c"),
            ("index.docker.io/debian", "docker.io/library/debian:latest", "debian:latest"),
            ("a.b/c__d/e-f.g", "a.b/c__d/e-f.g:latest", "a.b/c__d/e-f.g:latest"),
            ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
        ] {
            let reference: ImageReference = text.parse().unwrap();
            assert_eq!(reference.to_string(), full);
            assert_eq!(reference.familiar(), familiar);
            assert_eq!(full.parse::<ImageReference>().unwrap(), reference);
        }
    }

    #[test]
    fn digest_replaces_the_default_tag() {
        let digest = Digest::of(b"");
        let reference: ImageReference = format!("debian@{digest}").parse().unwrap();
        assert_eq!((reference.tag(), reference.digest()), (None, Some(&digest)));
        let both: ImageReference = format!("debian:12@{digest}").parse().unwrap();
        assert_eq!((both.tag(), both.digest()), (Some("12"), Some(&digest)));
        assert_eq!(both.without_digest().to_string(), "docker.io/library/debian:12");
    }

    #[test]
    fn refuses_what_is_not_a_name() {
        for bad in [
            "",
            "Debian",
            "a//b",
            "a/",
            "/a",
            "a:",
            "a:-x",
            "a___b",
            "a..b",
            "-a",
            "a b",
            "a@sha256:12",
            "x.y:p/z",
        ] {
            assert!(bad.parse::<ImageReference>().is_err(), "{bad}");
        }
        assert!("a".repeat(64).parse::<ImageReference>().is_err());
    }
}
