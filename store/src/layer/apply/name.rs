//! Names in archives: their canonical form, and what they mean in a layer.

use super::super::tar::{OPAQUE_MARKER, WHITEOUT_PREFIX};
use super::super::{LayerError, split};

/// What an archive name asks for.
pub(super) enum Target<'a> {
    Root,
    Path(&'a [u8]),
    Whiteout {
        parent: &'a [u8],
        name: &'a [u8],
    },
    Opaque(&'a [u8]),
    /// Bookkeeping of aufs, which is not part of an image.
    Ignored,
}

/// Brings a name from an archive into canonical form: relative, without `.`, `..` and doubled slashes.
pub(super) fn clean(name: &[u8]) -> Result<Vec<u8>, LayerError> {
    if name.contains(&0) {
        return Err(LayerError::invalid(name, "a name contains a zero byte"));
    }
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in name.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                if parts.pop().is_none() {
                    return Err(LayerError::invalid(name, "a name leads out of the layer"));
                }
            }
            part => parts.push(part),
        }
    }
    Ok(parts.join(&b'/'))
}

/// Tells what a canonical name means in a layer (OCI image specification, "Whiteouts").
pub(super) fn classify(path: &[u8]) -> Result<Target<'_>, LayerError> {
    if path.is_empty() {
        return Ok(Target::Root);
    }
    let (parent, name) = split(path);
    // aufs kept its bookkeeping in files and folders with a doubled prefix.
    let is_aufs = |part: &[u8]| part.starts_with(b".wh..wh.");
    if parent.split(|&b| b == b'/').any(is_aufs) {
        return Ok(Target::Ignored);
    }
    if parent.split(|&b| b == b'/').any(|part| part.starts_with(WHITEOUT_PREFIX)) {
        return Err(LayerError::invalid(path, "it lies inside a whiteout"));
    }
    if name == OPAQUE_MARKER {
        return Ok(Target::Opaque(parent));
    }
    if is_aufs(name) {
        return Ok(Target::Ignored);
    }
    match name.strip_prefix(WHITEOUT_PREFIX) {
        None => Ok(Target::Path(path)),
        Some(b"" | b"." | b"..") => Err(LayerError::invalid(path, "its whiteout names no file")),
        Some(name) => Ok(Target::Whiteout { parent, name }),
    }
}
