//! Build caches that come from elsewhere (`--cache-from`) and go elsewhere (`--cache-to`).
//!
//! A cache in a registry or a folder is a document that names results of steps and their layers, and the layers' blobs. An
//! inline cache is such a document in the config of an image, for the image's own layers. What is in the documents is
//! explained in [`slipway_solver::cache`].

mod export;
mod folder;
mod import;
mod options;
mod place;

pub use folder::{CacheFolders, LocalCaches};
pub use options::{CacheEntry, CacheExport, CachePlace, parse_exports};
