//! The files that tell a calling script what was built: `--metadata-file` and `--iidfile`.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use slipway_spec::{Descriptor, Digest};

use crate::failure::Failure;

/// What is known about the result of a build. Results that are no images have nothing but empty fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BuildMetadata {
    /// The image: a manifest, or an index of several.
    pub(crate) descriptor: Option<Descriptor>,
    /// The config of a single image.
    pub(crate) config_digest: Option<Digest>,
    /// Its names, in full.
    pub(crate) image_names: Vec<String>,
    /// What was answered instead of a build.
    pub(crate) answer: BTreeMap<String, String>,
}

impl BuildMetadata {
    /// Returns the id that `--quiet` and `--iidfile` tell: what the image is called in the store, as Docker does with
    /// its containerd image store.
    pub(crate) fn image_id(&self) -> Option<&Digest> {
        self.descriptor.as_ref().map(|descriptor| &descriptor.digest)
    }

    /// Returns the document of the metadata file.
    pub(crate) fn to_json(&self) -> Value {
        // The keys are in alphabetical order.
        let mut document = Map::new();
        if let Some(config) = &self.config_digest {
            document.insert("containerimage.config.digest".into(), config.to_string().into());
        }
        if let Some(descriptor) = &self.descriptor {
            let value = serde_json::to_value(descriptor).unwrap_or_default();
            document.insert("containerimage.descriptor".into(), value);
            document.insert("containerimage.digest".into(), descriptor.digest.to_string().into());
        }
        if !self.image_names.is_empty() {
            document.insert("image.name".into(), self.image_names.join(",").into());
        }
        for (key, text) in &self.answer {
            // As with buildx, documents are taken in whole.
            let parsed = serde_json::from_str(text).ok().filter(Value::is_object);
            document.insert(key.clone(), parsed.unwrap_or_else(|| text.as_str().into()));
        }
        Value::Object(document)
    }
}

/// Writes the metadata file. Readers see the old content or the new one, never a part.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write_metadata(path: &Path, metadata: &BuildMetadata) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(&metadata.to_json()).unwrap_or_default();
    replace(path, text.as_bytes()).map_err(|error| cannot("write the metadata file", path, &error))
}

/// Writes the id of the image, without a line end.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write_iidfile(path: &Path, id: &Digest) -> Result<(), Failure> {
    replace(path, id.to_string().as_bytes())
        .map_err(|error| cannot("write the id file", path, &error))
}

/// Removes the id file of an earlier build, so that it cannot be taken for that of a build that fails.
///
/// # Errors
/// When the file is there and cannot be removed.
pub(crate) fn clear_iidfile(path: &Path) -> Result<(), Failure> {
    match fs::symlink_metadata(path) {
        // A pipe or a device holds no earlier id.
        Ok(metadata) if !metadata.is_file() && !metadata.is_symlink() => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Ok(_) if is_special(path) => Ok(()),
        Ok(_) => {
            fs::remove_file(path).map_err(|error| cannot("remove the old id file", path, &error))
        }
        Err(error) => Err(cannot("remove the old id file", path, &error)),
    }
}

fn cannot(what: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("cannot {what} {}: {error}", path.display()))
}

/// Whether the path leads to something that is not a regular file, such as `/dev/stdout`.
fn is_special(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| !metadata.is_file())
}

/// Gives a file new content in one step, mode 0644.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    if is_special(path) {
        return OpenOptions::new().write(true).open(path)?.write_all(content);
    }
    // A link is followed, so that what it points to gets the content and the link stays.
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    let temporary = beside(&target)?;
    let write = || {
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o644).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, &target)
    };
    write().inspect_err(|_| drop(fs::remove_file(&temporary)))
}

fn beside(target: &Path) -> io::Result<PathBuf> {
    let name = target
        .file_name()
        .ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "not the name of a file"))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.tmp", std::process::id()));
    Ok(target.with_file_name(temporary))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use slipway_spec::MediaType;

    use super::*;

    fn metadata() -> BuildMetadata {
        BuildMetadata {
            descriptor: Some(Descriptor::new(MediaType::OCI_MANIFEST, Digest::of(b"m"), 7)),
            config_digest: Some(Digest::of(b"c")),
            image_names: vec!["docker.io/library/a:latest".into(), "docker.io/library/b:1".into()],
            answer: BTreeMap::new(),
        }
    }

    #[test]
    fn the_document_has_buildx_keys() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.json");
        fs::write(&path, "old").unwrap();
        write_metadata(&path, &metadata()).unwrap();
        let (m, c) = (Digest::of(b"m"), Digest::of(b"c"));
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            format!(
                r#"{{
  "containerimage.config.digest": "{c}",
  "containerimage.descriptor": {{
    "mediaType": "application/vnd.oci.image.manifest.v1+json",
    "digest": "{m}",
    "size": 7
  }},
  "containerimage.digest": "{m}",
  "image.name": "docker.io/library/a:latest,docker.io/library/b:1"
}}"#
            )
        );
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        write_metadata(&path, &BuildMetadata::default()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{}");
    }

    #[test]
    fn the_id_is_what_the_store_calls_the_image() {
        assert_eq!(metadata().image_id(), Some(&Digest::of(b"m")));
        assert_eq!(BuildMetadata::default().image_id(), None);
    }

    #[test]
    fn id_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("iid");
        clear_iidfile(&path).unwrap();
        write_iidfile(&path, &Digest::of(b"c")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), Digest::of(b"c").to_string());
        clear_iidfile(&path).unwrap();
        assert!(!path.exists());
        let lost = folder.path().join("no/such/folder/iid");
        assert!(
            write_iidfile(&lost, &Digest::of(b"c")).unwrap_err().message.contains("no/such/folder")
        );
        assert!(write_iidfile(Path::new("/"), &Digest::of(b"c")).is_err());
    }

    #[test]
    fn links_and_devices_stay_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        let (target, link) = (folder.path().join("target"), folder.path().join("link"));
        fs::write(&target, "old").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        write_iidfile(&link, &Digest::of(b"c")).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&target).unwrap(), Digest::of(b"c").to_string());

        let device = folder.path().join("device");
        std::os::unix::fs::symlink("/dev/null", &device).unwrap();
        clear_iidfile(&device).unwrap();
        write_iidfile(&device, &Digest::of(b"c")).unwrap();
        assert_eq!(fs::read_link(&device).unwrap(), Path::new("/dev/null"));
    }
}
