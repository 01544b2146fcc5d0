//! The client against a scripted server: what it sends, and how it takes what goes wrong.

mod blobs;
mod faults;
mod manifests;
mod pulls;
mod pushes;
mod redirects;
mod tokens;

use std::time::Duration;

use super::scripted::{Received, Reply, Scripted};
use super::*;

const QUICK: Timing = Timing {
    connect: Duration::from_secs(2),
    probe: Duration::from_secs(1),
    answer: Duration::from_secs(2),
    commit: Duration::from_secs(2),
    stall: Duration::from_millis(300),
    backoff: Duration::from_millis(4),
    longest_wait: Duration::from_secs(3),
    attempts: 4,
};

/// One credential for everybody who asks, and a list of who did.
#[derive(Debug)]
struct Keyring(Option<Credential>, Mutex<Vec<String>>);

#[async_trait::async_trait]
impl Credentials for Keyring {
    async fn credential(&self, host: &str) -> Result<Option<Credential>, RegistryError> {
        self.1.lock().unwrap().push(host.into());
        Ok(self.0.clone())
    }
}

fn client() -> Registry {
    client_with(RegistryOptions::default(), None)
}

fn client_with(options: RegistryOptions, credential: Option<Credential>) -> Registry {
    Registry::with_timing(options, Arc::new(Keyring(credential, Mutex::default())), QUICK).unwrap()
}

fn password() -> Option<Credential> {
    Some(Credential::Basic { username: "me".into(), password: Secret::new("pw") })
}

/// base64 of "me:pw"
const PASSWORD_HEADER: &str = "Basic bWU6cHc=";

fn image(server: &Scripted) -> ImageReference {
    format!("{}/team/app:v1", server.authority()).parse().unwrap()
}

const MANIFEST: &str = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[]}"#;

fn manifest_reply() -> Reply {
    Reply::ok(MANIFEST)
        .header("content-type", "application/vnd.oci.image.manifest.v1+json; charset=utf-8")
        .header("docker-content-digest", Digest::of(MANIFEST.as_bytes()).to_string())
}

fn not_found(code: &str) -> Reply {
    Reply::new(404).body(format!(r#"{{"errors":[{{"code":"{code}","message":"not here"}}]}}"#))
}

fn blob_of(bytes: &[u8]) -> Descriptor {
    Descriptor::new(MediaType::OCI_LAYER, Digest::of(bytes), bytes.len() as u64)
}

/// Bytes that differ everywhere, so that a piece at the wrong place is noticed.
fn content(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + at / 251) as u8).collect()
}

async fn read_all(reader: &mut BlobReader) -> Result<Vec<u8>, RegistryError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = reader.chunk().await? {
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

async fn pull(
    registry: &Registry,
    server: &Scripted,
    descriptor: &Descriptor,
) -> Result<Vec<u8>, RegistryError> {
    let mut reader = registry.blob(&image(server), descriptor, 0).await?;
    read_all(&mut reader).await
}

fn file_of(bytes: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

/// Answers with a range where one was asked for.
fn ranged(request: &Received, bytes: &[u8]) -> Reply {
    let range = request
        .header("range")
        .and_then(|text| text.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    match range {
        None => Reply::ok(bytes),
        Some(start) => {
            let start: usize = start;
            Reply::new(206)
                .header(
                    "content-range",
                    format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len()),
                )
                .body(&bytes[start..])
        }
    }
}
