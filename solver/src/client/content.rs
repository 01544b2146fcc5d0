//! Content that the client has: image layouts by name, and files that it sends when asked.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::PathBuf;

use async_trait::async_trait;
use slipway_spec::Digest;
use slipway_store::Error;
use tokio::io::AsyncRead;

/// Bytes as they come.
pub type ByteStream = Box<dyn AsyncRead + Send + Unpin>;

/// Content stores of the client, by name.
#[async_trait]
pub trait LayoutStore: Debug + Send + Sync {
    /// Opens content; `None` when the store of this name has none of this digest. Whoever reads it checks the digest.
    async fn open(&self, store: &str, digest: &Digest) -> Result<Option<ByteStream>, Error>;
}

/// A client without layouts.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoLayouts;

#[async_trait]
impl LayoutStore for NoLayouts {
    async fn open(&self, _: &str, _: &Digest) -> Result<Option<ByteStream>, Error> {
        Ok(None)
    }
}

/// OCI image layouts in folders of this machine, by name.
#[derive(Clone, Debug, Default)]
pub struct LayoutFolders(pub BTreeMap<String, PathBuf>);

#[async_trait]
impl LayoutStore for LayoutFolders {
    async fn open(&self, store: &str, digest: &Digest) -> Result<Option<ByteStream>, Error> {
        let Some(folder) = self.0.get(store) else { return Ok(None) };
        let text = digest.to_string();
        let Some((algorithm, hex)) = text.split_once(':') else { return Ok(None) };
        let path = folder.join("blobs").join(algorithm).join(hex);
        match tokio::fs::File::open(&path).await {
            Ok(file) => Ok(Some(Box::new(file))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("cannot read {}", path.display()), error)),
        }
    }
}

/// Files that the client sends under a URL of the host `buildkit-session`.
#[async_trait]
pub trait Uploads: Debug + Send + Sync {
    /// Opens what the path of the URL stands for; `None` when there is nothing.
    async fn open(&self, path: &str) -> Result<Option<ByteStream>, Error>;
}

/// A client that sends nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoUploads;

#[async_trait]
impl Uploads for NoUploads {
    async fn open(&self, _: &str) -> Result<Option<ByteStream>, Error> {
        Ok(None)
    }
}
