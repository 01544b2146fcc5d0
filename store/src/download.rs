//! What servers said of files that were downloaded, so that asking again may be enough.

use std::fs;
use std::io::{self, Write as _};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use slipway_spec::{Descriptor, Digest, MediaType};
use tokio::sync::mpsc;

use crate::error::{Error, ErrorKind, IoContext as _, Result};
use crate::tree::scan::mtime;
use crate::{Store, blocking};

/// Chunks on their way from the network to the disk.
const CHUNKS: usize = 16;

/// Writes a stream of bytes as content and returns its digest and size. Nothing is kept unless all of it arrived, is
/// not larger than `limit`, and has the digest that was expected.
///
/// # Errors
/// When the stream or the disk fails, or the content is not what was expected.
pub async fn receive(
    store: &Store,
    what: &str,
    mut stream: impl Stream<Item = Result<Bytes>> + Unpin,
    limit: u64,
    expected: Option<&Digest>,
    progress: &(dyn Fn(u64) + Send + Sync),
) -> Result<(Digest, u64)> {
    let (sender, mut receiver) = mpsc::channel::<Option<Bytes>>(CHUNKS);
    let (disk, subject, wanted) = (store.clone(), what.to_owned(), expected.cloned());
    let written = blocking::run(move || {
        let mut writer = match &wanted {
            Some(digest) => disk.write_expected(digest)?,
            None => disk.write_blob()?,
        };
        loop {
            match receiver.blocking_recv() {
                Some(Some(chunk)) => {
                    writer.write_all(&chunk).context(|| format!("cannot write {subject}"))?;
                }
                Some(None) => break,
                // The network side failed or was dropped; its own error is the one to show.
                None => {
                    return Err(Error::new(ErrorKind::Io, format!("{subject} ended too early")));
                }
            }
        }
        let Some(digest) = wanted else { return writer.commit(None) };
        let media_type = MediaType::from("application/octet-stream");
        let expected = Descriptor::new(media_type, digest, writer.size());
        writer.commit(Some(&expected)).map_err(|error| match error.kind() {
            ErrorKind::Corrupt => {
                Error::new(ErrorKind::Corrupt, format!("digest mismatch for {subject}"))
                    .because(error)
            }
            _ => error,
        })
    });
    let received = async {
        let mut size = 0;
        while let Some(chunk) = stream.next().await {
            let chunk = chunk?;
            size += chunk.len() as u64;
            if size > limit {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("{what} is larger than the {limit} bytes that are allowed"),
                ));
            }
            progress(size);
            if sender.send(Some(chunk)).await.is_err() {
                break;
            }
        }
        // Only the end of the stream makes it whole.
        let _told = sender.send(None).await;
        drop(sender);
        Ok(())
    };
    let (written, received) = futures::join!(written, received);
    received?;
    written
}

/// What is known of a download.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Download {
    /// The digest of its content, which may be in the store.
    pub digest: Option<Digest>,
    /// How the server calls this version.
    pub etag: Option<String>,
    /// When it was changed, as the server wrote it.
    pub last_modified: Option<String>,
    /// The name that the server gave it.
    pub filename: Option<String>,
}

impl Store {
    /// Returns what is remembered of a download; `key` is its URL with all that may change the answer.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn download(&self, key: &[u8]) -> Result<Option<Download>> {
        let path = self.download_path(key);
        match fs::read(&path) {
            // A damaged memory is none.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).at("read", &path),
        }
    }

    /// Remembers a download.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn remember_download(&self, key: &[u8], download: &Download) -> Result<()> {
        let path = self.download_path(key);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).at("create", folder)?;
        }
        self.replace_file(&path, &serde_json::to_vec(download).unwrap_or_default())
    }

    /// Forgets downloads that were last made before `cutoff`, in nanoseconds since 1970.
    ///
    /// # Errors
    /// When the disk fails.
    pub(crate) fn forget_downloads(&self, cutoff: i64) -> Result<()> {
        let folder = self.root().join("kept/downloads");
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.at("read", &folder)?,
        };
        for entry in entries {
            let path = entry.at("read", &folder)?.path();
            let made = fs::metadata(&path).map(|metadata| mtime(&metadata));
            match made {
                Ok(made) if made >= cutoff => {}
                _ => match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        return Err(error).at("remove", &path);
                    }
                    _ => {}
                },
            }
        }
        Ok(())
    }

    fn download_path(&self, key: &[u8]) -> std::path::PathBuf {
        let hex: String = Sha256::digest(key).iter().map(|byte| format!("{byte:02x}")).collect();
        self.root().join("kept/downloads").join(hex)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        assert_eq!(store.download(b"u").unwrap(), None);
        let download = Download {
            digest: Some(Digest::of(b"x")),
            etag: Some("\"1\"".into()),
            ..Download::default()
        };
        store.remember_download(b"u", &download).unwrap();
        assert_eq!(store.download(b"u").unwrap(), Some(download.clone()));
        store.forget_downloads(1).unwrap();
        assert_eq!(store.download(b"u").unwrap(), Some(download.clone()), "it is not that old");
        store.forget_downloads(i64::MAX).unwrap();
        assert_eq!(store.download(b"u").unwrap(), None);
        store.remember_download(b"u", &download).unwrap();
        fs::write(store.download_path(b"u"), "{").unwrap();
        assert_eq!(store.download(b"u").unwrap(), None);
    }
}
