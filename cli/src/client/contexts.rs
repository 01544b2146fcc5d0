//! What this client offers a build to read: folders, files in memory, image layouts, and its standard input.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;
use slipway_engine::BuildRequest;
use slipway_engine::frontend::dockerfile::{RemoteContext, is_archive, remote_context};
use slipway_engine::solver::client::{ByteStream, LayoutFolders, Uploads};
use slipway_engine::store::registry::web::Web;
use slipway_engine::store::{Error, now_nanos};
use slipway_spec::Digest;
use tokio::io::AsyncReadExt;

use crate::command::build::inputs::{BuildInputs, ContextPlace, DockerfilePlace, NamedPlace};
use crate::failure::Failure;

/// A Dockerfile may have this many bytes.
const MAX_DOCKERFILE: u64 = 32 << 20;

/// Archives are known by this many bytes.
const START: u64 = 1024;

const CONTEXT: &str = "context";
const DOCKERFILE: &str = "dockerfile";

/// Adds what a build reads to a request. Standard input is read where something is on it.
///
/// # Errors
/// When standard input or a URL cannot be read, or is not what the flags say.
pub(crate) async fn offer(inputs: &BuildInputs, request: &mut BuildRequest) -> Result<(), Failure> {
    let mut dockerfile = inputs.dockerfile.clone();
    match &inputs.context {
        ContextPlace::Folder(folder) => {
            request.folders.insert(CONTEXT.into(), absolute(folder)?);
        }
        ContextPlace::Remote(url) => {
            request.attrs.insert(CONTEXT.into(), url.clone());
        }
        ContextPlace::Stdin => match read_stdin().await? {
            Input::Archive(upload) => {
                request.attrs.insert(CONTEXT.into(), upload.url());
                request.services.uploads = Arc::new(upload);
            }
            Input::Dockerfile(text) => {
                if !matches!(dockerfile, DockerfilePlace::Context(None)) {
                    return Err(Failure::new(
                        "ambiguous Dockerfile source: both stdin and flag correspond to Dockerfiles",
                    )
                    .hint("what is on standard input is no archive; name a folder as the context"));
                }
                memory(request, DOCKERFILE).insert("Dockerfile".into(), text);
                // There is nothing to copy from.
                memory(request, CONTEXT);
                request.attrs.insert("filename".into(), "Dockerfile".into());
                dockerfile = DockerfilePlace::Stdin;
            }
        },
    }
    let in_memory = match &dockerfile {
        DockerfilePlace::Path(path) => {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            request.folders.insert(DOCKERFILE.into(), absolute(folder.unwrap_or(Path::new(".")))?);
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            request.attrs.insert("filename".into(), name);
            None
        }
        DockerfilePlace::Context(name) => {
            request.attrs.extend(name.clone().map(|name| ("filename".to_owned(), name)));
            None
        }
        DockerfilePlace::Stdin if request.files.contains_key(DOCKERFILE) => None,
        DockerfilePlace::Stdin => Some(stdin_dockerfile().await?),
        DockerfilePlace::Url(url) => Some(fetch(url, &request.services.web).await?),
    };
    if let Some(text) = in_memory {
        memory(request, DOCKERFILE).insert("Dockerfile".into(), text);
        request.attrs.insert("filename".into(), "Dockerfile".into());
    }
    // A Dockerfile of the client is meant, although the context is elsewhere.
    if request.attrs.contains_key(CONTEXT) && !matches!(dockerfile, DockerfilePlace::Context(_)) {
        request.attrs.insert("dockerfilekey".into(), DOCKERFILE.into());
    }
    named(inputs, request)?;
    Ok(())
}

fn memory<'a>(request: &'a mut BuildRequest, name: &str) -> &'a mut BTreeMap<String, Bytes> {
    request.files.entry(name.to_owned()).or_default()
}

fn absolute(path: &Path) -> Result<std::path::PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|error| Failure::new(format!("cannot use {}: {error}", path.display())))
}

/// Adds contexts by name, and what a frontend must know to use them.
fn named(inputs: &BuildInputs, request: &mut BuildRequest) -> Result<(), Failure> {
    let mut layouts = BTreeMap::new();
    let mut capabilities = vec![];
    let has_query =
        |url: &str| matches!(remote_context(url), Some(RemoteContext::Git { query: true, .. }));
    if matches!(&inputs.context, ContextPlace::Remote(url) if has_query(url)) {
        capabilities.push("moby.buildkit.frontend.gitquerystring");
    }
    for (name, place) in &inputs.contexts {
        let value = match place {
            NamedPlace::Builder(value) => {
                if has_query(value) {
                    capabilities.push("moby.buildkit.frontend.gitquerystring+forward");
                }
                value.clone()
            }
            NamedPlace::Folder(folder) => {
                let folder = absolute(folder)?;
                // Folders of these names are there already.
                let local = match name.as_str() {
                    CONTEXT | DOCKERFILE => format!("_{name}"),
                    name => name.to_owned(),
                };
                let shared = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
                request.attrs.insert(format!("sharedkey:localdir:{name}"), shared);
                request.folders.insert(local.clone(), folder);
                format!("local:{local}")
            }
            NamedPlace::Layout { folder, tag, digest } => {
                let store = format!("layout-{}", layouts.len());
                layouts.insert(store.clone(), absolute(folder)?);
                let tag = tag.as_ref().map(|tag| format!(":{tag}")).unwrap_or_default();
                format!("oci-layout://{store}{tag}@{digest}")
            }
        };
        request.attrs.insert(format!("context:{name}"), value);
    }
    if !inputs.contexts.is_empty() {
        capabilities.push("moby.buildkit.frontend.contexts+forward");
    }
    if !layouts.is_empty() {
        request.services.layouts = Arc::new(LayoutFolders(layouts));
    }
    capabilities.sort_unstable();
    capabilities.dedup();
    if !capabilities.is_empty() {
        request.attrs.insert("frontend.caps".into(), capabilities.join(","));
    }
    Ok(())
}

/// What is on standard input.
#[derive(Debug)]
enum Input {
    Archive(StdinUpload),
    Dockerfile(Bytes),
}

fn stdin_failed(error: std::io::Error) -> Failure {
    Failure::new(format!("cannot read standard input: {error}"))
}

/// Opens standard input without a buffer of its own, so that nothing of it is lost.
fn stdin() -> Result<File, Failure> {
    let fd = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3);
    Ok(File::from(fd.map_err(|errno| stdin_failed(errno.into()))?))
}

/// Reads from standard input on a thread that may wait.
async fn read_to(limit: u64) -> Result<(Vec<u8>, File), Failure> {
    let mut file = stdin()?;
    let read = tokio::task::spawn_blocking(move || {
        let mut bytes = vec![];
        (&mut file).take(limit).read_to_end(&mut bytes).map(|_| (bytes, file))
    });
    match read.await {
        Ok(read) => read.map_err(stdin_failed),
        Err(error) => Err(Failure::new(format!("cannot read standard input: {error}"))),
    }
}

async fn read_stdin() -> Result<Input, Failure> {
    let (start, rest) = read_to(START).await?;
    if start.is_empty() {
        return Err(Failure::new("standard input is empty")
            .hint("with - as the context, it is an archive of the context or a Dockerfile"));
    }
    if is_archive(&start) {
        return Ok(Input::Archive(StdinUpload::new(start, rest)));
    }
    let (more, _) = read_to(MAX_DOCKERFILE).await?;
    whole([start, more].concat()).map(Input::Dockerfile)
}

async fn stdin_dockerfile() -> Result<Bytes, Failure> {
    let (text, _) = read_to(MAX_DOCKERFILE).await?;
    whole(text)
}

fn whole(text: Vec<u8>) -> Result<Bytes, Failure> {
    if text.len() as u64 >= MAX_DOCKERFILE {
        let limit = MAX_DOCKERFILE >> 20;
        return Err(Failure::new(format!("the Dockerfile is larger than {limit} MiB")));
    }
    Ok(text.into())
}

/// Fetches a Dockerfile.
async fn fetch(url: &str, web: &Web) -> Result<Bytes, Failure> {
    let failed = |error: &dyn std::error::Error| {
        Failure::new(format!("failed to read dockerfile: {error}"))
            .hint("see that the URL of -f leads to the text of a Dockerfile")
    };
    let mut answer = web.get(url, &[]).await.map_err(|error| failed(&error))?;
    let mut text = vec![];
    while let Some(chunk) = answer.chunk().await.map_err(|error| failed(&error))? {
        text.extend_from_slice(&chunk);
        if text.len() as u64 >= MAX_DOCKERFILE {
            break;
        }
    }
    whole(text)
}

/// An archive on standard input, which can be sent once.
#[derive(Debug)]
struct StdinUpload {
    id: String,
    stream: Mutex<Option<(Vec<u8>, File)>>,
}

impl StdinUpload {
    fn new(start: Vec<u8>, rest: File) -> Self {
        // The name must be another one for each build that a daemon could take for the same.
        let digest = Digest::of(format!("{} {}", std::process::id(), now_nanos()).as_bytes());
        Self { id: digest.hex()[..25].to_owned(), stream: Mutex::new(Some((start, rest))) }
    }

    fn url(&self) -> String {
        format!("http://buildkit-session/{}", self.id)
    }
}

#[async_trait]
impl Uploads for StdinUpload {
    async fn open(&self, path: &str) -> Result<Option<ByteStream>, Error> {
        if path.trim_start_matches('/') != self.id {
            return Ok(None);
        }
        let taken = self.stream.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        Ok(taken.map(|(start, rest)| {
            let start = std::io::Cursor::new(start);
            Box::new(AsyncReadExt::chain(start, tokio::fs::File::from_std(rest))) as ByteStream
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(context: ContextPlace, dockerfile: DockerfilePlace) -> BuildInputs {
        let dockerfile_name = "Dockerfile".into();
        BuildInputs { context, dockerfile, dockerfile_name, contexts: BTreeMap::new() }
    }

    async fn offered(inputs: &BuildInputs) -> BuildRequest {
        let mut request = BuildRequest::default();
        offer(inputs, &mut request).await.unwrap();
        request
    }

    #[tokio::test]
    async fn a_remote_context_has_its_own_dockerfile_unless_one_of_here_is_meant() {
        let url = "https://h/a.git?branch=b";
        let remote = || ContextPlace::Remote(url.into());
        let own = offered(&inputs(remote(), DockerfilePlace::Context(Some("sub/D".into())))).await;
        assert_eq!((own.attrs["context"].as_str(), own.attrs["filename"].as_str()), (url, "sub/D"));
        assert_eq!(own.attrs["frontend.caps"], "moby.buildkit.frontend.gitquerystring");
        assert!(!own.attrs.contains_key("dockerfilekey") && own.folders.is_empty());
        let here = offered(&inputs(remote(), DockerfilePlace::Path("/d/D".into()))).await;
        assert_eq!(here.attrs["dockerfilekey"], "dockerfile");
        assert_eq!(here.folders["dockerfile"], Path::new("/d"));
        assert_eq!(here.attrs["filename"], "D");
        let usual = offered(&inputs(remote(), DockerfilePlace::Context(None))).await;
        assert!(!usual.attrs.contains_key("filename"));
    }

    #[tokio::test]
    async fn named_contexts_get_a_place_of_their_own() {
        let digest = Digest::of(b"x");
        let mut inputs =
            inputs(ContextPlace::Folder("/c".into()), DockerfilePlace::Path("/c/D".into()));
        let layout = NamedPlace::Layout {
            folder: "/l".into(),
            tag: Some("t".into()),
            digest: digest.clone(),
        };
        inputs.contexts = BTreeMap::from([
            ("context".into(), NamedPlace::Folder("/other".into())),
            ("base".into(), NamedPlace::Builder("docker-image://alpine".into())),
            ("img".into(), layout),
        ]);
        let request = offered(&inputs).await;
        let attrs = &request.attrs;
        assert_eq!(attrs["context:context"], "local:_context");
        assert_eq!(attrs["sharedkey:localdir:context"], "other");
        assert_eq!(request.folders["_context"], Path::new("/other"));
        assert_eq!(request.folders["context"], Path::new("/c"));
        assert_eq!(attrs["context:base"], "docker-image://alpine");
        assert_eq!(attrs["context:img"], format!("oci-layout://layout-0:t@{digest}"));
        assert_eq!(attrs["frontend.caps"], "moby.buildkit.frontend.contexts+forward");
        assert!(!attrs.contains_key("dockerfilekey"));
    }

    #[tokio::test]
    async fn standard_input_is_sent_once_and_under_its_name_alone() {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, b"rest").unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let upload = StdinUpload::new(b"start ".to_vec(), file);
        let path = upload.url().replace("http://buildkit-session", "");
        assert!(upload.open("/other").await.unwrap().is_none());
        let mut text = String::new();
        let mut stream = upload.open(&path).await.unwrap().unwrap();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "start rest");
        assert!(upload.open(&path).await.unwrap().is_none());
    }
}
