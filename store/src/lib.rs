//! Bytes at rest: content, layers and image names under one root folder, and the registries they come from.
//!
//! ```text
//! <root>/                     mode 0700
//!   content/                  a valid OCI image layout, readable in place by other tools
//!     oci-layout
//!     index.json              rewritten whenever a name changes
//!     blobs/sha256/<hex>      committed content, never changed
//!   layers/<id>/fs/           unpacked layers, one folder each, in overlayfs form
//!   digests/<hash>            remembered digests of build contexts
//!   kept/                     cache mounts, git repositories, what is known of downloads: see `kept`
//!   stub/                     empty mount points for sandboxes
//!   tmp/<pid>-<n>-<start>/    unfinished work of one process, with a lock that lives as long as the process
//!   sweep                     a lock: shared while a blob gets its name and row and while a process begins, exclusive while the collector removes
//!   reserve                   some space to give up when the disk is full, so that the collector can work
//!   metadata.db               everything else, see `metadata`
//! ```
//!
//! A root may be shared by processes that run at the same time. [`Store`] is cheap to clone; its methods block and are
//! called through [`blocking::run`] from async code.

pub mod archive;
pub mod blocking;
pub mod content;
pub mod download;
pub mod error;
pub mod filter;
mod folder;
pub mod gc;
pub mod image;
pub mod kept;
pub mod layer;
pub mod layout;
mod lease;
mod metadata;
pub mod pack;
pub mod registry;
pub mod result;
pub mod snapshot;
pub mod transfer;
pub mod tree;
pub mod view;

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

pub use error::{Error, ErrorKind, Result};
pub use lease::now_nanos;

use crate::error::IoContext as _;
use crate::layer::Overlay;
use crate::lease::ProcessLease;
use crate::metadata::Metadata;

/// An open store.
#[derive(Clone, Debug)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    metadata: Metadata,
    lease: ProcessLease,
    boot: String,
    overlay: Overlay,
    /// Layers that exist only as a list of what to copy, until somebody needs their bytes.
    pending: Mutex<HashMap<snapshot::LayerId, snapshot::Pending>>,
    /// One entry per layer that is being unpacked or packed in this process.
    busy: snapshot::Busy,
}

/// The file whose space is given up when the disk is full.
const RESERVE: &str = "reserve";
/// Enough for the database to record that thousands of things went.
const RESERVE_BYTES: u64 = 4 << 20;

/// The marker of an OCI image layout.
pub const OCI_LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

impl Store {
    /// Opens the store under `root`, creating it where there is none.
    ///
    /// # Errors
    /// When the folder cannot be made or written, or belongs to a newer version.
    pub fn open(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).at("resolve", root)?;
        match Self::open_at(&root) {
            // A full disk must not keep anybody from making room on it.
            Err(error)
                if matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::Io)
                    && fs::remove_file(root.join(RESERVE)).is_ok() =>
            {
                Self::open_at(&root)
            }
            Ok(store) => {
                store.keep_reserve();
                Ok(store)
            }
            Err(error) => Err(error),
        }
    }

    fn open_at(root: &Path) -> Result<Self> {
        let root = root.to_path_buf();
        let content = root.join("content");
        // The last file that creation writes tells that the rest is there.
        let marker = content.join("oci-layout");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&root)
            .at("create the state folder", &root)?;
        // A folder that was lost is made again: what was in it is found missing where it is needed.
        for folder in ["content/blobs/sha256", "layers", "digests", "kept", "tmp", "stub"] {
            let path = root.join(folder);
            if !path.is_dir() {
                fs::create_dir_all(&path).at("create", &path)?;
                // Layers hold other users' set-uid programs, so nobody else may reach them. The root itself may be
                // somebody's folder with a mode of its own.
                let top = root.join(folder.split('/').next().unwrap_or(folder));
                fs::set_permissions(&top, fs::Permissions::from_mode(0o700))
                    .at("set the mode of", &top)?;
            }
        }
        // A collector that has looked who lives must not be surprised by somebody new.
        let no_sweep = sweep_lock(&root, false)?;
        let lease = ProcessLease::acquire(&root.join("tmp"))?;
        drop(no_sweep);
        let metadata = Metadata::open(&root.join("metadata.db"))?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").map_or_else(
            // Without a boot id nothing unsynced is ever trusted again.
            |_| format!("unknown-{}", lease::now_nanos()),
            |id| id.trim().to_owned(),
        );
        let store = Self(Arc::new(Inner {
            metadata,
            lease,
            boot,
            overlay: overlay_here(),
            pending: Mutex::default(),
            busy: snapshot::Busy::default(),
            root,
        }));
        if !content.join("index.json").exists() {
            store.metadata().write(|t| store.write_index(t))?;
        }
        if !marker.exists() {
            store.replace_file(&marker, OCI_LAYOUT)?;
        }
        Ok(store)
    }

    /// Sets some space aside, where there is some.
    fn keep_reserve(&self) {
        let path = self.0.root.join(RESERVE);
        if path.exists() {
            return;
        }
        let kept = fs::File::create_new(&path).and_then(|file| {
            let flags = rustix::fs::FallocateFlags::empty();
            Ok(rustix::fs::fallocate(&file, flags, 0, RESERVE_BYTES)?)
        });
        if let Err(error) = kept {
            tracing::debug!(path = %path.display(), %error, "no space is set aside");
            // Half a reserve is none.
            if error.kind() != std::io::ErrorKind::AlreadyExists
                && let Err(error) = fs::remove_file(&path)
            {
                tracing::debug!(path = %path.display(), %error, "the reserve cannot be removed");
            }
        }
    }

    /// Gives up the space that was set aside.
    fn spend_reserve(&self) {
        let path = self.0.root.join(RESERVE);
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::debug!(path = %path.display(), %error, "the reserve cannot be removed");
        }
    }

    /// Keeps the collector away, or with `exclusive` everybody who commits content, until the file is dropped.
    fn sweep_lock(&self, exclusive: bool) -> Result<fs::File> {
        sweep_lock(&self.0.root, exclusive)
    }

    /// Writes a file in one step: readers see the old or the new content.
    fn replace_file(&self, target: &Path, bytes: &[u8]) -> Result<()> {
        use std::io::Write as _;
        let path = self.temporary("file");
        let mut file = fs::File::create_new(&path).at("create", &path)?;
        file.write_all(bytes).at("write", &path)?;
        file.sync_all().at("write", &path)?;
        fs::rename(&path, target).at("create", target)?;
        target.parent().map_or(Ok(()), content::sync_folder)
    }

    /// Returns the folder everything is under.
    pub fn root(&self) -> &Path {
        &self.0.root
    }

    /// Returns the OCI image layout.
    pub fn content_folder(&self) -> PathBuf {
        self.0.root.join("content")
    }

    /// Returns a folder for the mount points of sandboxes.
    pub fn stub_folder(&self) -> PathBuf {
        self.0.root.join("stub")
    }

    /// Returns which attributes mark opaque folders here.
    pub fn overlay(&self) -> Overlay {
        self.0.overlay
    }

    /// Returns a path for unfinished work of this process, removed when the process ends; nothing is created.
    pub fn temporary(&self, what: &str) -> PathBuf {
        self.0.lease.temporary(what)
    }

    fn metadata(&self) -> &Metadata {
        &self.0.metadata
    }
}

fn sweep_lock(root: &Path, exclusive: bool) -> Result<fs::File> {
    use rustix::fs::FlockOperation::{LockExclusive, LockShared};
    let path = root.join("sweep");
    let file = fs::File::options().create(true).append(true).open(&path).at("open", &path)?;
    let operation = if exclusive { LockExclusive } else { LockShared };
    rustix::io::retry_on_intr(|| rustix::fs::flock(&file, operation)).at("lock", &path)?;
    Ok(file)
}

/// Only root of the initial user namespace may set `trusted` attributes.
fn overlay_here() -> Overlay {
    let whole = fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_ascii_whitespace().eq(["0", "0", "4294967295"]));
    if whole { Overlay::Trusted } else { Overlay::User }
}
