//! Messages to types of ours, and back.

use std::collections::BTreeSet;

use bytes::Bytes;
use serde::Deserialize;
use slipway_engine::store::tree::{Entry, Kind};
use slipway_spec::llb::pb;
use slipway_spec::wire::fsutil::Stat;
use slipway_spec::{ImageConfig, Platform};
use tonic::Status;

/// Go's bits of a file's mode that are not permissions.
mod bit {
    pub(super) const DIRECTORY: u32 = 1 << 31;
    pub(super) const SYMLINK: u32 = 1 << 27;
    pub(super) const DEVICE: u32 = 1 << 26;
    pub(super) const PIPE: u32 = 1 << 25;
    pub(super) const SET_UID: u32 = 1 << 23;
    pub(super) const SET_GID: u32 = 1 << 22;
    pub(super) const CHARACTER: u32 = 1 << 21;
    pub(super) const STICKY: u32 = 1 << 20;
}

/// Describes an entry as Go programs do.
pub(super) fn stat(name: &[u8], entry: &Entry) -> Stat {
    let mut bits = entry.mode & 0o777;
    for (unix, go) in [(0o4000, bit::SET_UID), (0o2000, bit::SET_GID), (0o1000, bit::STICKY)] {
        if entry.mode & unix != 0 {
            bits |= go;
        }
    }
    let mut found = Stat {
        path: Bytes::copy_from_slice(name),
        uid: entry.uid,
        gid: entry.gid,
        mod_time: entry.mtime,
        ..Stat::default()
    };
    match &entry.kind {
        Kind::Directory { .. } => bits |= bit::DIRECTORY,
        Kind::File { size, .. } => found.size = i64::try_from(*size).unwrap_or(i64::MAX),
        Kind::Symlink { target } => {
            bits |= bit::SYMLINK;
            found.linkname = Bytes::copy_from_slice(target);
        }
        Kind::CharDevice { major, minor } => {
            bits |= bit::DEVICE | bit::CHARACTER;
            (found.devmajor, found.devminor) = (i64::from(*major), i64::from(*minor));
        }
        Kind::BlockDevice { major, minor } => {
            bits |= bit::DEVICE;
            (found.devmajor, found.devminor) = (i64::from(*major), i64::from(*minor));
        }
        Kind::Fifo => bits |= bit::PIPE,
        Kind::Whiteout => {}
    }
    found.mode = bits;
    found
}

/// Returns a key of the metadata for a platform.
pub(super) fn config_key(name: &str, platform: Option<&str>) -> String {
    platform.map_or_else(|| name.to_owned(), |platform| format!("{name}/{platform}"))
}

/// Reads a platform.
pub(super) fn to_platform(platform: &pb::Platform) -> Platform {
    let text = |text: &String| (!text.is_empty()).then(|| text.clone());
    let platform = Platform {
        os: platform.os.clone(),
        architecture: platform.architecture.clone(),
        variant: text(&platform.variant),
        os_version: text(&platform.os_version),
        os_features: platform.os_features.clone(),
    };
    platform.normalized()
}

/// Writes a platform.
pub(crate) fn to_pb_platform(platform: &Platform) -> pb::Platform {
    pb::Platform {
        architecture: platform.architecture.clone(),
        os: platform.os.clone(),
        variant: platform.variant.clone().unwrap_or_default(),
        os_version: platform.os_version.clone().unwrap_or_default(),
        os_features: platform.os_features.clone(),
    }
}

#[derive(Deserialize)]
struct Platforms {
    #[serde(rename = "Platforms", default)]
    platforms: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Platform")]
    platform: Platform,
}

/// Reads `refs.platforms`.
pub(super) fn platforms(metadata: Option<&Bytes>) -> Result<Vec<(String, Platform)>, Status> {
    let Some(bytes) = metadata else { return Ok(vec![]) };
    let read: Platforms = serde_json::from_slice(bytes).map_err(|error| {
        Status::invalid_argument(format!("refs.platforms of the result is invalid: {error}"))
    })?;
    let mut seen = BTreeSet::new();
    if let Some(twice) = read.platforms.iter().find(|named| !seen.insert(named.id.as_str())) {
        return Err(Status::invalid_argument(format!(
            "refs.platforms of the result names platform {} twice",
            twice.id
        )));
    }
    Ok(read.platforms.into_iter().map(|named| (named.id, named.platform)).collect())
}

/// The config of a result that no frontend described.
pub(super) fn default_config(platform: &Platform) -> ImageConfig {
    let mut config = ImageConfig {
        architecture: platform.architecture.clone(),
        os: platform.os.clone(),
        variant: platform.variant.clone(),
        ..ImageConfig::default()
    };
    config.config.working_dir = "/".into();
    config.config.env =
        vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()];
    config
}
