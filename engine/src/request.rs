//! What a build is asked for and what it gives.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use slipway_exporter::{Assembled, FileOptions, ImageOptions, OutputSink};
use slipway_solver::Services;
use slipway_spec::Descriptor;
use slipway_store::tree::scan::Ahead;

use crate::cache::CacheExport;

/// One build.
#[derive(Debug, Default)]
pub struct BuildRequest {
    /// What the build is called where it is told of.
    pub id: String,
    /// The frontend's attributes, under BuildKit's names.
    pub attrs: BTreeMap<String, String>,
    /// Folders of this machine that the build may read, by name: `context`, `dockerfile`.
    pub folders: BTreeMap<String, PathBuf>,
    /// A comparison of the context with what it was, if that has begun: see [`look_ahead`].
    pub ahead: Option<Ahead>,
    /// Files that are only in memory, by the name of their folder and their path in it.
    pub files: BTreeMap<String, BTreeMap<String, Bytes>>,
    /// What the build may use beside: secrets, SSH agents, image layouts, and what it was allowed.
    pub services: Services,
    /// Where the result goes; without any it stays in the cache.
    pub exports: Vec<Export>,
    /// Caches to write; those to look into are among the attributes.
    pub cache_exports: Vec<CacheExport>,
}

/// Where it is remembered what folders held, below the state folder.
pub(crate) fn memory(root: &Path) -> PathBuf {
    root.join("digests")
}

/// Begins to compare a build context with what it was at the last build over this state folder, so that little is left to be
/// done of that when the build begins.
pub fn look_ahead(root: &Path, context: &Path) -> Option<Ahead> {
    Ahead::start(&memory(root), context)
}

/// One destination.
#[derive(Debug)]
pub enum Export {
    /// An image in the store, pushed where the options say so.
    Image(ImageOptions),
    /// An image archive; Docker's form has one platform only.
    Archive {
        /// How the image is written.
        options: ImageOptions,
        /// Whether Docker must be able to load it.
        docker: bool,
        /// Where it goes.
        sink: Box<dyn OutputSink>,
    },
    /// Files in a folder.
    Local {
        /// The folder.
        folder: PathBuf,
        /// How they are written.
        options: FileOptions,
    },
    /// Files in a tar.
    Tar {
        /// How they are written.
        options: FileOptions,
        /// Where it goes.
        sink: Box<dyn OutputSink>,
    },
}

impl BuildResult {
    /// Adds an image that was made.
    pub fn note(&mut self, assembled: &Assembled, options: &ImageOptions) {
        self.image = Some(assembled.target.clone());
        self.config = assembled.config.clone();
        self.names = options.names.iter().map(ToString::to_string).collect();
    }
}

/// What a build gave.
#[derive(Clone, Debug, Default)]
pub struct BuildResult {
    /// The manifest or index, if an image was asked for.
    pub image: Option<Descriptor>,
    /// The config of a single manifest.
    pub config: Option<Descriptor>,
    /// The full names the image got.
    pub names: Vec<String>,
    /// The manifest of the last cache that was written.
    pub cache: Option<Descriptor>,
    /// What the frontend answered to a `requestid`, by BuildKit's names; nothing was built then.
    pub answer: BTreeMap<String, Vec<u8>>,
}
