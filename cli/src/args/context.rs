//! `--build-context`: a name, and what it stands for.

use slipway_spec::ImageReference;

/// `NAME=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedContext {
    /// The name as stages and images know it: `alpine`, without `:latest`.
    pub(crate) name: String,
    /// A folder, a URL, or what begins with `docker-image://` or `oci-layout://`.
    pub(crate) value: String,
}

/// Parses `NAME=VALUE`.
pub(crate) fn named_context(text: &str) -> Result<NamedContext, String> {
    let Some((name, value)) = text.split_once('=') else {
        return Err(format!("invalid context value: {text}, expected key=value"));
    };
    let reference: ImageReference =
        name.parse().map_err(|error: slipway_spec::ReferenceError| {
            format!("invalid context name {name}: {}", error.reason)
        })?;
    if value.is_empty() {
        return Err(format!(
            "the context {name} is empty: expected a folder, a URL, docker-image://… or oci-layout://…"
        ));
    }
    let familiar = reference.familiar();
    let name = familiar.strip_suffix(":latest").unwrap_or(&familiar).to_owned();
    Ok(NamedContext { name, value: value.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_images() {
        for (text, name, value) in [
            ("base=./dir", "base", "./dir"),
            ("docker.io/library/alpine:latest=docker-image://x", "alpine", "docker-image://x"),
            ("alpine:3=a=b", "alpine:3", "a=b"),
            ("h.example/x=.", "h.example/x", "."),
        ] {
            let parsed = named_context(text).unwrap();
            assert_eq!((parsed.name.as_str(), parsed.value.as_str()), (name, value), "{text}");
        }
        for text in ["base", "=x", "UPPER=x", "base=", ""] {
            assert!(named_context(text).is_err(), "{text}");
        }
    }
}
