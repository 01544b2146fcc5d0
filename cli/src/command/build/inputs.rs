//! What a build reads, as flags and arguments name it: the context, the Dockerfile, and further contexts by name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use slipway_engine::frontend::dockerfile::{RemoteContext, remote_context};
use slipway_engine::store::image::{ANNOTATION_NAME, ANNOTATION_REF};
use slipway_spec::Digest;

use crate::args::context::NamedContext;
use crate::failure::Failure;

/// Where the Dockerfile is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DockerfilePlace {
    /// In a file of this machine; it need not be in the context.
    Path(PathBuf),
    /// On standard input.
    Stdin,
    /// At a URL.
    Url(String),
    /// In the context, which is fetched, or comes from standard input; `None` is where it usually is.
    Context(Option<String>),
}

/// What `COPY` and `ADD` read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ContextPlace {
    /// A folder of this machine.
    Folder(PathBuf),
    /// A repository, an archive or a Dockerfile, which the builder fetches.
    Remote(String),
    /// An archive on standard input; or a Dockerfile, and no files.
    Stdin,
}

/// What a context of a name is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NamedPlace {
    /// A folder of this machine.
    Folder(PathBuf),
    /// An image of a layout in a folder of this machine.
    Layout {
        /// The folder.
        folder: PathBuf,
        /// What the image is tagged there.
        tag: Option<String>,
        /// The image.
        digest: Digest,
    },
    /// What the builder finds by itself, as it is given to it.
    Builder(String),
}

/// All that a build reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BuildInputs {
    /// What `COPY` and `ADD` read from.
    pub(crate) context: ContextPlace,
    /// The Dockerfile.
    pub(crate) dockerfile: DockerfilePlace,
    /// The Dockerfile's name as people know it, for messages.
    pub(crate) dockerfile_name: String,
    /// Contexts by name.
    pub(crate) contexts: BTreeMap<String, NamedPlace>,
}

impl BuildInputs {
    /// Returns the folder that is the context, if it is one.
    pub(crate) fn folder(&self) -> Option<&Path> {
        match &self.context {
            ContextPlace::Folder(folder) => Some(folder),
            _ => None,
        }
    }

    /// Finds what flags and arguments name. Files of this machine are looked for; nothing is read from standard input.
    ///
    /// # Errors
    /// When something is not there, or flags contradict each other.
    pub(crate) fn find(
        context: &str,
        file: Option<&str>,
        contexts: &[NamedContext],
    ) -> Result<Self, Failure> {
        let file = file.filter(|file| !file.is_empty());
        let context = context_place(context)?;
        let (dockerfile, dockerfile_name) = dockerfile(file, &context)?;
        let contexts = contexts
            .iter()
            .map(|given| Ok((given.name.clone(), named_place(given)?)))
            .collect::<Result<_, Failure>>()?;
        Ok(Self { context, dockerfile, dockerfile_name, contexts })
    }

    /// Whether the context is a repository that is reached over SSH.
    pub(crate) fn wants_ssh(&self) -> bool {
        let ContextPlace::Remote(url) = &self.context else { return false };
        matches!(remote_context(url), Some(RemoteContext::Git { ssh: true, .. }))
    }
}

fn context_place(text: &str) -> Result<ContextPlace, Failure> {
    match text {
        "" => {
            return Err(Failure::new(
                "please specify build context (e.g. \".\" for the current directory)",
            ));
        }
        "-" => return Ok(ContextPlace::Stdin),
        _ => {}
    }
    // As with docker, what exists as a folder is one, whatever it looks like.
    match std::fs::metadata(text) {
        Ok(metadata) if metadata.is_dir() => Ok(ContextPlace::Folder(text.into())),
        _ if remote_context(text).is_some() => Ok(ContextPlace::Remote(text.to_owned())),
        Ok(_) => Err(Failure::new(format!(
            "unable to prepare context: path {text:?} is not a folder"
        ))
        .hint("name the folder, and the Dockerfile with -f; an archive is read from standard input: - < ARCHIVE")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Failure::new(format!("unable to prepare context: path {text:?} not found"))
                .hint("a context is a folder, a git repository, a URL, or - for standard input"))
        }
        Err(error) => {
            Err(Failure::new(format!("unable to prepare context: path {text:?}: {error}")))
        }
    }
}

fn is_url(text: &str) -> bool {
    text.starts_with("http://") || text.starts_with("https://")
}

fn dockerfile(
    flag: Option<&str>,
    context: &ContextPlace,
) -> Result<(DockerfilePlace, String), Failure> {
    let usual = || "Dockerfile".to_owned();
    match (flag, context) {
        (Some("-"), ContextPlace::Stdin) => Err(Failure::new(
            "invalid argument: can't use stdin for both build context and dockerfile",
        )),
        (Some("-"), _) => Ok((DockerfilePlace::Stdin, usual())),
        (Some(url), _) if is_url(url) => Ok((DockerfilePlace::Url(url.to_owned()), url.to_owned())),
        (Some(path), ContextPlace::Remote(_)) if Path::new(path).is_absolute() => {
            local(flag, path.into())
        }
        (flag, ContextPlace::Remote(_) | ContextPlace::Stdin) => {
            let name = flag.map_or_else(usual, ToOwned::to_owned);
            Ok((DockerfilePlace::Context(flag.map(ToOwned::to_owned)), name))
        }
        (Some(path), ContextPlace::Folder(_)) => local(flag, path.into()),
        (None, ContextPlace::Folder(folder)) => {
            let found = ["Dockerfile", "dockerfile"]
                .iter()
                .map(|name| folder.join(name))
                .find(|path| path.exists())
                .unwrap_or_else(|| folder.join("Dockerfile"));
            local(None, found)
        }
    }
}

/// Looks at a Dockerfile of this machine.
fn local(flag: Option<&str>, path: PathBuf) -> Result<(DockerfilePlace, String), Failure> {
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => Err(Failure::new(format!(
            "cannot read the Dockerfile {}: it is a folder",
            path.display()
        ))),
        Ok(_) => {
            let name = flag.map_or_else(
                || path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                |text| text.trim_start_matches("./").to_owned(),
            );
            Ok((DockerfilePlace::Path(path), name))
        }
        Err(error) => {
            let failure =
                Failure::new(format!("cannot read the Dockerfile {}: {error}", path.display()));
            Err(match flag {
                None => failure.hint("name another file with -f FILE"),
                Some(flag) if Path::new(flag).is_relative() => {
                    failure.hint("-f is relative to the current folder, not to the build context")
                }
                Some(_) => failure,
            })
        }
    }
}

fn named_place(given: &NamedContext) -> Result<NamedPlace, Failure> {
    let NamedContext { name, value } = given;
    let failed =
        |why: String| Failure::new(format!("failed to get build context {name}: {value}: {why}"));
    if let Some(target) = value.strip_prefix("target:") {
        return Err(failed(format!("there is no target {target:?}"))
            .hint("target: names a target of a bake file"));
    }
    if let Some(layout) = value.strip_prefix("oci-layout://") {
        return self::layout(layout).map_err(failed);
    }
    if value.starts_with("docker-image://") {
        return Ok(NamedPlace::Builder(value.clone()));
    }
    if remote_context(value).is_some() {
        return Ok(NamedPlace::Builder(value.clone()));
    }
    match std::fs::metadata(value) {
        Ok(metadata) if metadata.is_dir() => Ok(NamedPlace::Folder(value.into())),
        Ok(_) => Err(failed("it is not a folder".into())),
        Err(error) => Err(failed(error.to_string())
            .hint("it is a folder, a URL, docker-image://NAME or oci-layout://FOLDER")),
    }
}

/// Finds an image in a layout: `FOLDER[:TAG][@DIGEST]`.
fn layout(text: &str) -> Result<NamedPlace, String> {
    let (rest, digest) = match text.rsplit_once('@') {
        Some((rest, digest)) if digest.starts_with("sha256:") || digest.starts_with("sha512:") => {
            let digest: Digest = digest.parse().map_err(|error| format!("{digest}: {error}"))?;
            (rest, Some(digest))
        }
        _ => (text, None),
    };
    let is_tag = |tag: &str| {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        tag.len() <= 128
            && tag.bytes().next().is_some_and(word)
            && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'))
    };
    let (folder, tag) = match rest.rsplit_once(':') {
        Some((folder, tag)) if is_tag(tag) => (folder, Some(tag.to_owned())),
        _ => (rest, None),
    };
    let folder = PathBuf::from(folder);
    let index = folder.join("index.json");
    let unreadable = |error: &dyn std::fmt::Display| {
        format!("it is no OCI image layout: {}: {error}", index.display())
    };
    let bytes = std::fs::read(&index).map_err(|error| unreadable(&error))?;
    let digest = match digest {
        Some(digest) => digest,
        None => {
            let index: serde_json::Value =
                serde_json::from_slice(&bytes).map_err(|error| unreadable(&error))?;
            in_index(&index, tag.as_deref().unwrap_or("latest"))?
        }
    };
    Ok(NamedPlace::Layout { folder, tag, digest })
}

/// Finds the image that has a tag; without one, the only image there is.
fn in_index(index: &serde_json::Value, tag: &str) -> Result<Digest, String> {
    const NAMES: [&str; 2] = [ANNOTATION_NAME, ANNOTATION_REF];
    let manifests = index["manifests"].as_array().map_or(&[][..], Vec::as_slice);
    let found = NAMES
        .iter()
        .find_map(|key| manifests.iter().find(|entry| entry["annotations"][key] == tag))
        .or(match manifests {
            [only] => Some(only),
            _ => None,
        });
    let Some(entry) = found else {
        let names: Vec<&str> = manifests
            .iter()
            .filter_map(|entry| NAMES.iter().find_map(|key| entry["annotations"][key].as_str()))
            .collect();
        return Err(format!(
            "it has {} images, and none of them is {tag:?}; there is {}",
            manifests.len(),
            if names.is_empty() { "none with a name".to_owned() } else { names.join(", ") }
        ));
    };
    let digest = entry["digest"].as_str().unwrap_or_default();
    digest.parse().map_err(|error| format!("its index names the image {digest:?}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn named(name: &str, value: &str) -> Result<NamedPlace, Failure> {
        named_place(&NamedContext { name: name.into(), value: value.into() })
    }

    #[test]
    fn contexts_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let file = folder.path().join("f");
        fs::write(&file, "").unwrap();
        assert_eq!(context_place(path).unwrap(), ContextPlace::Folder(path.into()));
        assert_eq!(context_place("-").unwrap(), ContextPlace::Stdin);
        for url in [
            "https://github.com/a/b.git#main",
            "git@github.com:a/b",
            "https://h/a.tar.gz",
            "github.com/a/b",
        ] {
            assert_eq!(context_place(url).unwrap(), ContextPlace::Remote(url.into()), "{url}");
        }
        for (text, message) in [
            ("", "please specify build context"),
            (file.to_str().unwrap(), "is not a folder"),
            ("/no/such/folder", "unable to prepare context: path \"/no/such/folder\" not found"),
            ("relative/nowhere", "path \"relative/nowhere\" not found"),
        ] {
            let failure = context_place(text).unwrap_err();
            assert!(failure.message.contains(message), "{text}: {failure}");
        }
    }

    #[test]
    fn the_dockerfile_is_where_the_flag_and_the_context_say() {
        let remote = ContextPlace::Remote("https://h/a.git".into());
        let place =
            |flag, context: &ContextPlace| dockerfile(flag, context).map(|(place, _)| place);
        let inside = |name: Option<&str>| DockerfilePlace::Context(name.map(ToOwned::to_owned));
        assert_eq!(place(None, &remote), Ok(inside(None)));
        assert_eq!(place(Some("sub/D"), &remote), Ok(inside(Some("sub/D"))));
        assert_eq!(place(Some("D"), &ContextPlace::Stdin), Ok(inside(Some("D"))));
        assert_eq!(place(Some("-"), &remote), Ok(DockerfilePlace::Stdin));
        let url = "https://h/Dockerfile";
        for context in [&remote, &ContextPlace::Stdin, &ContextPlace::Folder("/".into())] {
            assert_eq!(place(Some(url), context), Ok(DockerfilePlace::Url(url.into())));
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("D");
        fs::write(&file, "").unwrap();
        assert_eq!(
            place(Some(file.to_str().unwrap()), &remote),
            Ok(DockerfilePlace::Path(file.clone()))
        );
        let both = place(Some("-"), &ContextPlace::Stdin).unwrap_err();
        assert!(both.message.contains("both build context and dockerfile"), "{both}");
    }

    #[test]
    fn named_contexts_are_what_they_begin_with() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        assert_eq!(named("a", path).unwrap(), NamedPlace::Folder(path.into()));
        for value in ["docker-image://alpine", "https://h/x.git", "https://h/file", "git@h:x"] {
            assert_eq!(named("a", value).unwrap(), NamedPlace::Builder(value.into()));
        }
        for (value, message) in [
            ("/no/such", "failed to get build context a: /no/such: No such file"),
            ("target:b", "there is no target \"b\""),
            ("oci-layout:///no/such", "no OCI image layout: /no/such/index.json"),
        ] {
            let failure = named("a", value).unwrap_err();
            assert!(failure.message.contains(message), "{value}: {failure}");
        }
    }

    #[test]
    fn images_of_layouts_are_found_by_tag_digest_or_as_the_only_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        let write = |manifests: &str| {
            fs::write(
                folder.path().join("index.json"),
                format!("{{\"manifests\": [{manifests}]}}"),
            )
            .unwrap();
        };
        let entry = |digest: &Digest, tag: &str| {
            format!(
                r#"{{"digest": "{digest}", "annotations": {{"org.opencontainers.image.ref.name": "{tag}"}}}}"#
            )
        };
        let find = |suffix: &str| match layout(&format!("{path}{suffix}"))? {
            NamedPlace::Layout { digest, .. } => Ok(digest),
            other => Err(format!("{other:?}")),
        };
        write(&entry(&one, "a"));
        assert_eq!(find(""), Ok(one.clone()));
        assert_eq!(find(":nonsense"), Ok(one.clone()));
        write(&[entry(&one, "a"), entry(&two, "latest")].join(","));
        assert_eq!(find(""), Ok(two.clone()));
        assert_eq!(find(":a"), Ok(one.clone()));
        let missing = find(":b").unwrap_err();
        assert!(missing.contains("2 images") && missing.contains("a, latest"), "{missing}");
        let other = Digest::of(b"3");
        assert_eq!(find(&format!(":a@{other}")), Ok(other.clone()));
        assert_eq!(find(&format!("@{other}")), Ok(other));
        assert!(find("@sha256:zz").is_err());
    }
}
