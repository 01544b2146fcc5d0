//! Archives in a build context: recognised by content, unpacked into a temporary folder.

use std::fs;
use std::io::{BufReader, Read as _};
use std::path::{Path, PathBuf};

use crate::Store;
use crate::error::{Error, ErrorKind, IoContext as _, Result};
use crate::layer::{self, ApplyOptions, compression};
use crate::tree::scan::open_regular;

/// The size of a tar header.
const HEADER: usize = 512;

/// Unpacks a file that is a tar, plain or compressed; `None` when it is something else. The folder lives until this
/// process ends.
///
/// # Errors
/// When it is an archive but a damaged one, or the disk fails.
pub fn unpack(store: &Store, path: &Path) -> Result<Option<PathBuf>> {
    if !is_archive(path)? {
        return Ok(None);
    }
    let failed = || format!("cannot unpack {}", path.display());
    let folder = store.temporary("archive");
    fs::create_dir(&folder).at("create", &folder)?;
    let file = BufReader::with_capacity(256 * 1024, open_regular(path)?);
    let mut reader = compression::decoder(Box::new(file)).context(failed)?;
    let options = ApplyOptions { overlay: store.overlay(), ..ApplyOptions::default() };
    layer::apply(&mut reader, &folder, &options)
        .map_err(|error| Error::new(ErrorKind::Invalid, failed()).because(error))?;
    Ok(Some(folder))
}

fn is_archive(path: &Path) -> Result<bool> {
    let file = BufReader::new(open_regular(path)?);
    let mut head = [0; HEADER];
    let Ok(mut reader) = compression::decoder(Box::new(file)) else { return Ok(false) };
    // A file that merely begins like a compressed one is an ordinary file.
    if reader.read_exact(&mut head).is_err() {
        return Ok(false);
    }
    Ok(head.iter().any(|b| *b != 0) && has_good_checksum(&head))
}

/// Whether a tar header carries its own sum (POSIX ustar, `chksum`), summed as unsigned or as signed bytes.
fn has_good_checksum(head: &[u8; HEADER]) -> bool {
    let field = &head[148..156];
    let text: String = field.iter().map(|b| *b as char).collect();
    let Ok(expected) = i64::from_str_radix(text.trim_matches(|c| c == ' ' || c == '\0'), 8) else { return false };
    let sum = |signed: bool| -> i64 {
        head.iter()
            .enumerate()
            .map(|(at, byte)| match (148..156).contains(&at) {
                true => i64::from(b' '),
                false if signed => i64::from(byte.cast_signed()),
                false => i64::from(*byte),
            })
            .sum()
    };
    expected == sum(false) || expected == sum(true)
}
