//! Credentials as Docker, Podman and their helpers keep them (`config.json`, `auth.json`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::auth::{Credential, Credentials, Secret};
use super::error::{RegistryError, RegistryErrorKind, one_line};

/// What a credential helper may take; some ask the user to unlock something.
const HELPER_TIME: Duration = Duration::from_secs(60);

/// What a helper says when it simply has none.
const NOT_FOUND: &str = "credentials not found in native keychain";

/// A credentials file, read once.
#[derive(Clone, Debug, Default)]
pub struct DockerConfig {
    path: PathBuf,
    file: ConfigFile,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ConfigFile {
    #[serde(default)]
    auths: BTreeMap<String, AuthEntry>,
    #[serde(default)]
    creds_store: Option<String>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct AuthEntry {
    auth: Option<Secret>,
    username: Option<String>,
    password: Option<Secret>,
    identitytoken: Option<Secret>,
    registrytoken: Option<Secret>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperReply {
    #[serde(default)]
    username: String,
    secret: Secret,
}

impl DockerConfig {
    /// Reads a credentials file; one that does not exist has no credentials.
    ///
    /// # Errors
    /// When it cannot be read or is not JSON of the known form.
    pub fn load(path: &Path) -> Result<Self, RegistryError> {
        match std::fs::read(path) {
            Ok(bytes) => Self::parse(path, &bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self { path: path.into(), file: ConfigFile::default() })
            }
            Err(error) => Err(bad(path, format!("cannot be read: {error}")).with_source(error)),
        }
    }

    /// Reads the text of a credentials file; `path` is only for messages.
    ///
    /// # Errors
    /// When it is not JSON of the known form.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, RegistryError> {
        // Docker leaves an empty file behind when the disk is full.
        let text = if bytes.trim_ascii().is_empty() { b"{}" } else { bytes };
        let file = serde_json::from_slice(text).map_err(|error| {
            // The parser's own message could quote a password.
            let place = format!("line {}, column {}", error.line(), error.column());
            bad(
                path,
                format!("is not a valid credentials file ({place}); correct it or log in again"),
            )
        })?;
        Ok(Self { path: path.into(), file })
    }

    /// Returns the helper that is in charge of a registry.
    fn helper(&self, host: &str) -> Option<&str> {
        let wanted = host_of_key(host);
        let own =
            self.file.cred_helpers.iter().find(|(key, _)| same_registry(host_of_key(key), wanted));
        let name = own.map(|(_, helper)| helper.as_str()).or(self.file.creds_store.as_deref());
        name.filter(|name| !name.is_empty())
    }

    /// Returns what the file itself holds for a registry.
    fn entry(&self, host: &str) -> Option<&AuthEntry> {
        if let Some(entry) = self.file.auths.get(host) {
            return Some(entry);
        }
        let wanted = host_of_key(host);
        // Keys for a single repository or a group of them are Podman's; those for a whole host win.
        let found =
            self.file.auths.iter().filter(|(key, _)| same_registry(host_of_key(key), wanted));
        found.min_by_key(|(key, _)| path_of_key(key).len()).map(|(_, entry)| entry)
    }

    fn stored(&self, host: &str) -> Result<Option<Credential>, RegistryError> {
        let Some(entry) = self.entry(host) else { return Ok(None) };
        let present =
            |secret: &Option<Secret>| secret.clone().filter(|secret| !secret.expose().is_empty());
        if let Some(token) = present(&entry.registrytoken) {
            return Ok(Some(Credential::RegistryToken(token)));
        }
        if let Some(token) = present(&entry.identitytoken) {
            return Ok(Some(Credential::IdentityToken(token)));
        }
        if let Some(auth) = present(&entry.auth) {
            let damaged =
                || bad(&self.path, format!("holds a damaged entry for {host}; log in again"));
            let text = auth.expose().trim();
            let decoded = STANDARD
                .decode(text)
                .or_else(|_| STANDARD_NO_PAD.decode(text))
                .map_err(|_| damaged())?;
            let decoded = String::from_utf8(decoded).map_err(|_| damaged())?;
            let (username, password) = decoded.split_once(':').ok_or_else(damaged)?;
            // Docker pads some with zero bytes.
            let password = password.trim_matches('\0');
            return Ok(Some(Credential::Basic {
                username: username.into(),
                password: Secret::new(password),
            }));
        }
        match (&entry.username, &entry.password) {
            (Some(username), Some(password)) if !username.is_empty() => {
                Ok(Some(Credential::Basic {
                    username: username.clone(),
                    password: password.clone(),
                }))
            }
            _ => Ok(None),
        }
    }

    async fn ask_helper(
        &self,
        helper: &str,
        host: &str,
    ) -> Result<Option<Credential>, RegistryError> {
        let program = format!("docker-credential-{helper}");
        let result = if helper.contains('/') {
            Err("is not a plain program name".into())
        } else {
            run_helper(Path::new(&program), host).await
        };
        result.map_err(|what| {
            bad(&self.path, format!("names the credential helper {program}, which {what}"))
        })
    }
}

/// Asks a helper program; an error ends the sentence "the helper, which …".
async fn run_helper(program: &Path, host: &str) -> Result<Option<Credential>, String> {
    let run = async {
        let mut child = Command::new(program)
            .arg("get")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // A helper that ends before it reads says why on its output.
            let _unread = stdin.write_all(host.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = match tokio::time::timeout(HELPER_TIME, run).await {
        Ok(output) => output.map_err(|error| format!("cannot be run: {error}"))?,
        Err(_) => return Err(format!("took longer than {} s", HELPER_TIME.as_secs())),
    };
    if !output.status.success() {
        // Helpers put their message on either.
        let text = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
        let text = one_line(&String::from_utf8_lossy(&text));
        return if text.contains(NOT_FOUND) { Ok(None) } else { Err(format!("failed: {text}")) };
    }
    let reply: HelperReply = serde_json::from_slice(&output.stdout)
        .map_err(|_| "gave an answer that is not understood".to_owned())?;
    Ok(match reply.username.as_str() {
        _ if reply.secret.expose().is_empty() => None,
        "<token>" => Some(Credential::IdentityToken(reply.secret)),
        _ => Some(Credential::Basic { username: reply.username, password: reply.secret }),
    })
}

#[async_trait]
impl Credentials for DockerConfig {
    async fn credential(&self, host: &str) -> Result<Option<Credential>, RegistryError> {
        if let Some(helper) = self.helper(host)
            && let Some(credential) = self.ask_helper(helper, host).await?
        {
            return Ok(Some(credential));
        }
        self.stored(host)
    }
}

/// Returns the host of `host`, `https://host` or `https://host/v1/`.
fn host_of_key(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    key.split('/').next().unwrap_or_default()
}

/// Returns the repository part of a key, which is empty for keys of a whole registry.
fn path_of_key(key: &str) -> &str {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let path = key.split_once('/').map(|(_, path)| path.trim_end_matches('/')).unwrap_or_default();
    if matches!(path, "v1" | "v2") { "" } else { path }
}

/// Compares hosts; Docker Hub has several names.
fn same_registry(a: &str, b: &str) -> bool {
    let hub = |host: &str| matches!(host, "docker.io" | "index.docker.io" | "registry-1.docker.io");
    a.eq_ignore_ascii_case(b) || (hub(a) && hub(b))
}

fn bad(path: &Path, message: String) -> RegistryError {
    RegistryError::new(RegistryErrorKind::Local, path.display().to_string(), message)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::super::auth::DOCKER_HUB_KEY;
    use super::*;

    fn config(text: &str) -> DockerConfig {
        DockerConfig::parse(Path::new("config.json"), text.as_bytes()).unwrap()
    }

    fn basic(username: &str, password: &str) -> Option<Credential> {
        Some(Credential::Basic { username: username.into(), password: Secret::new(password) })
    }

    #[test]
    fn keys_come_in_several_forms() {
        // base64 of "me:pw"
        for key in [
            "r.example:5000",
            "https://r.example:5000",
            "https://r.example:5000/v1/",
            "http://R.example:5000/v2/",
        ] {
            let config = config(&format!(r#"{{"auths":{{"{key}":{{"auth":"bWU6cHc="}}}}}}"#));
            assert_eq!(config.stored("r.example:5000").unwrap(), basic("me", "pw"), "{key}");
            assert_eq!(config.stored("r.example").unwrap(), None, "{key}");
        }
        for key in ["https://index.docker.io/v1/", "docker.io", "index.docker.io"] {
            let config = config(&format!(r#"{{"auths":{{"{key}":{{"auth":"bWU6cHc="}}}}}}"#));
            assert_eq!(config.stored(DOCKER_HUB_KEY).unwrap(), basic("me", "pw"), "{key}");
        }
    }

    #[test]
    fn entries_come_in_several_forms() {
        for (entry, expected) in [
            (r#"{"auth":"bWU6cHc6eA"}"#, basic("me", "pw:x")),
            (r#"{"username":"me","password":"pw"}"#, basic("me", "pw")),
            (
                r#"{"auth":"PHRva2VuPjo=","identitytoken":"t"}"#,
                Some(Credential::IdentityToken(Secret::new("t"))),
            ),
            (r#"{"registrytoken":"t"}"#, Some(Credential::RegistryToken(Secret::new("t")))),
            ("{}", None),
            (r#"{"auth":""}"#, None),
        ] {
            assert_eq!(
                config(&format!(r#"{{"auths":{{"h":{entry}}}}}"#)).stored("h").unwrap(),
                expected,
                "{entry}"
            );
        }
        for entry in [r#"{"auth":"!"}"#, r#"{"auth":"bWU="}"#] {
            let error = config(&format!(r#"{{"auths":{{"h":{entry}}}}}"#)).stored("h").unwrap_err();
            assert_eq!(error.kind(), RegistryErrorKind::Local);
        }
    }

    #[test]
    fn damaged_files_are_named_without_quoting_them() {
        let error =
            DockerConfig::parse(Path::new("/x/config.json"), br#"{"auths":{"h":{"auth":7,"#)
                .unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("/x/config.json: is not a valid credentials file (line 1"),
            "{error}"
        );
        assert!(config("").stored("h").unwrap().is_none());
        assert!(
            DockerConfig::load(Path::new("/nonexistent/config.json"))
                .unwrap()
                .stored("h")
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn the_host_wins_over_a_repository() {
        let text = r#"{"auths":{"h/a/b":{"auth":"YTph"},"h":{"auth":"bWU6cHc="}}}"#;
        assert_eq!(config(text).stored("h").unwrap(), basic("me", "pw"));
    }

    #[test]
    fn helpers_are_chosen_by_host() {
        let config = config(r#"{"credsStore":"all","credHelpers":{"h":"one","docker.io":"hub"}}"#);
        assert_eq!(config.helper("h"), Some("one"));
        assert_eq!(config.helper("other"), Some("all"));
        assert_eq!(config.helper(DOCKER_HUB_KEY), Some("hub"));
    }

    #[tokio::test]
    async fn helpers_speak_json() {
        let folder = tempfile::tempdir().unwrap();
        for (script, expected) in [
            (
                r#"read host; [ "$host" = h ] && echo '{"Username":"me","Secret":"pw"}'"#,
                Ok(basic("me", "pw")),
            ),
            (
                r#"echo '{"Username":"<token>","Secret":"t"}'"#,
                Ok(Some(Credential::IdentityToken(Secret::new("t")))),
            ),
            ("echo credentials not found in native keychain; exit 1", Ok(None)),
            ("echo locked >&2; exit 1", Err("failed: locked")),
            ("echo nonsense", Err("not understood")),
        ] {
            let program = folder.path().join("helper");
            std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
            let result = run_helper(&program, "h").await;
            match (result, expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{script}"),
                (Err(error), Err(text)) => assert!(error.contains(text), "{error}"),
                (result, _) => panic!("{script}: {result:?}"),
            }
        }
        assert!(
            run_helper(Path::new("/nonexistent/helper"), "h")
                .await
                .unwrap_err()
                .contains("cannot be run")
        );
    }
}
