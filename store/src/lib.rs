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
//!   stub/                     empty mount points for sandboxes
//!   tmp/<pid>-<n>-<start>/    unfinished work of one process, with a lock that lives as long as the process
//!   metadata.db               everything else, see `metadata`
//! ```
//!
//! A root may be shared by processes that run at the same time. [`Store`] is cheap to clone; its methods block and are
//! called through [`blocking::run`] from async code.

pub mod archive;
pub mod blocking;
pub mod content;
pub mod error;
pub mod gc;
pub mod image;
pub mod layer;
pub mod layout;
mod lease;
mod metadata;

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
    pending: Mutex<HashMap<snapshot::LayerId, Arc<tree::Tree>>>,
    /// One entry per layer that is being unpacked or packed in this process.
    busy: snapshot::Busy,
}

/// The marker of an OCI image layout.
const OCI_LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

impl Store {
    /// Opens the store under `root`, creating it where there is none.
    ///
    /// # Errors
    /// When the folder cannot be made or written, or belongs to a newer version.
    pub fn open(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).at("resolve", root)?;
        let content = root.join("content");
        // The last file that creation writes tells that the rest is there.
        let marker = content.join("oci-layout");
        if !marker.exists() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&root).at("create the state folder", &root)?;
            // Layers hold other users' set-uid programs: nobody else may reach them.
            fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).at("set the mode of", &root)?;
            for folder in ["content/blobs/sha256", "layers", "digests", "tmp", "stub"] {
                let path = root.join(folder);
                fs::create_dir_all(&path).at("create", &path)?;
            }
            let index = content.join("index.json");
            if !index.exists() {
                replace_file(&index, image::EMPTY_INDEX)?;
            }
            replace_file(&marker, OCI_LAYOUT)?;
        }
        let lease = ProcessLease::acquire(&root.join("tmp"))?;
        let metadata = Metadata::open(&root.join("metadata.db"))?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").map_or_else(
            // Without a boot id nothing unsynced is ever trusted again.
            |_| format!("unknown-{}", lease::now_nanos()),
            |id| id.trim().to_owned(),
        );
        Ok(Self(Arc::new(Inner {
            metadata,
            lease,
            boot,
            overlay: overlay_here(),
            pending: Mutex::default(),
            busy: snapshot::Busy::default(),
            root,
        })))
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

/// Only root of the initial user namespace may set `trusted` attributes.
fn overlay_here() -> Overlay {
    let whole = fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_ascii_whitespace().eq(["0", "0", "4294967295"]));
    if whole { Overlay::Trusted } else { Overlay::User }
}

/// Writes a file in one step: readers see the old or the new content.
fn replace_file(target: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write as _;
    let mut name = std::ffi::OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(format!(".{}", std::process::id()));
    let path = target.with_file_name(name);
    let mut file = fs::File::create(&path).at("create", &path)?;
    file.write_all(bytes).at("write", &path)?;
    file.sync_all().at("write", &path)?;
    fs::rename(&path, target).at("create", target)?;
    target.parent().map_or(Ok(()), content::sync_folder)
}
