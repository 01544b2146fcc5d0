//! Secrets in files and in the environment of this process.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;

use async_trait::async_trait;
use slipway_engine::solver::client::secret::{MAX_SECRET, SecretBytes, SecretProvider};
use slipway_engine::store::{Error, ErrorKind, blocking};

use crate::args::step::{SecretPlace, SecretSpec};
use crate::failure::Failure;
use crate::settings::Environment;

/// The secrets that the user named.
#[derive(Debug)]
pub(crate) struct Secrets(BTreeMap<String, Place>);

#[derive(Debug)]
enum Place {
    File(std::path::PathBuf),
    Value(SecretBytes),
}

impl Secrets {
    /// Finds the secrets; files are read when a step asks for them.
    ///
    /// # Errors
    /// When one is not there.
    pub(crate) fn new(specs: &[SecretSpec], environment: &Environment) -> Result<Self, Failure> {
        let mut secrets = BTreeMap::new();
        for SecretSpec { id, from } in specs {
            let value = |name: &str| {
                let found = environment.get(name)?;
                Some(Place::Value(SecretBytes::new(found.as_bytes().to_vec())))
            };
            let place = match from {
                SecretPlace::File(path) => Place::File(path.clone()),
                // As with docker, a variable that is not set is an empty secret.
                SecretPlace::Variable(name) => {
                    value(name).unwrap_or_else(|| Place::Value(SecretBytes::new(vec![])))
                }
                SecretPlace::Named => value(id).unwrap_or_else(|| Place::File(id.into())),
            };
            if let Place::File(path) = &place {
                let failed = |why: String| {
                    Failure::new(format!("cannot use the secret {id:?}: {}: {why}", path.display()))
                };
                let metadata =
                    std::fs::metadata(path).map_err(|error| failed(error.to_string()))?;
                if metadata.is_dir() {
                    return Err(failed("it is a folder".into()));
                }
                if metadata.len() > MAX_SECRET as u64 {
                    return Err(failed(format!("it is larger than {} KiB", MAX_SECRET / 1024)));
                }
            }
            secrets.insert(id.clone(), place);
        }
        Ok(Self(secrets))
    }
}

#[async_trait]
impl SecretProvider for Secrets {
    async fn secret(&self, id: &str) -> Result<Option<SecretBytes>, Error> {
        let path = match self.0.get(id) {
            None => return Ok(None),
            Some(Place::Value(value)) => return Ok(Some(value.clone())),
            Some(Place::File(path)) => path.clone(),
        };
        blocking::run(move || {
            let failed =
                |error| Error::io(format!("cannot read the secret {}", path.display()), error);
            let file = std::fs::File::open(&path).map_err(failed)?;
            let mut bytes = vec![];
            // A pipe has no size to look at before.
            file.take(MAX_SECRET as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
            if bytes.len() > MAX_SECRET {
                let what = format!(
                    "the secret {} is larger than {} KiB",
                    path.display(),
                    MAX_SECRET / 1024
                );
                return Err(Error::new(ErrorKind::Invalid, what));
            }
            Ok(Some(SecretBytes::new(bytes)))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(id: &str, from: SecretPlace) -> SecretSpec {
        SecretSpec { id: id.into(), from }
    }

    #[tokio::test]
    async fn secrets_come_from_files_and_variables() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        std::fs::write(&path, "from file").unwrap();
        let environment = Environment::of(&[("V", "from variable"), ("named", "n")]);
        let specs = [
            spec("f", SecretPlace::File(path.clone())),
            spec("v", SecretPlace::Variable("V".into())),
            spec("unset", SecretPlace::Variable("U".into())),
            spec("named", SecretPlace::Named),
            spec("twice", SecretPlace::Variable("V".into())),
            spec("twice", SecretPlace::Variable("named".into())),
        ];
        let secrets = Secrets::new(&specs, &environment).unwrap();
        for (id, text) in [
            ("f", "from file"),
            ("v", "from variable"),
            ("unset", ""),
            ("named", "n"),
            ("twice", "n"),
        ] {
            let secret = secrets.secret(id).await.unwrap().unwrap();
            assert_eq!(secret.expose(), text.as_bytes(), "{id}");
        }
        assert!(secrets.secret("other").await.unwrap().is_none());
        assert!(!format!("{secrets:?}").contains("from variable"));
        let missing = [spec("m", SecretPlace::File("/no/such/file".into()))];
        assert!(
            Secrets::new(&missing, &environment).unwrap_err().message.contains("/no/such/file")
        );
        std::fs::write(&path, vec![0; MAX_SECRET + 1]).unwrap();
        assert!(Secrets::new(&specs, &environment).is_err());
        assert!(secrets.secret("f").await.is_err());
    }
}
