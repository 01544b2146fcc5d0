//! Archives in a build context: recognised by content, unpacked into a temporary folder.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use crate::Store;
use crate::error::{Error, ErrorKind, IoContext as _, Result};
use crate::layer::{self, ApplyOptions, LayerStack, compression};
use crate::snapshot::layer_error;
use crate::tree::scan::open_regular;

/// The size of a tar header.
const HEADER: usize = 512;

/// An archive that was unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpacked {
    /// What was in it. The folder lives until this process ends.
    pub folder: PathBuf,
    /// Directories that the archive does not list, which are there for what is in them.
    pub implied: BTreeSet<Vec<u8>>,
}

/// Unpacks a file that is a tar, plain or compressed; `None` when it is something else.
///
/// # Errors
/// When it is an archive but a damaged one, or the disk fails.
pub fn unpack(store: &Store, path: &Path) -> Result<Option<Unpacked>> {
    if !is_archive(path)? {
        return Ok(None);
    }
    let failed = || format!("cannot unpack {}", path.display());
    let folder = store.temporary("archive");
    fs::create_dir(&folder).at("create", &folder)?;
    // The mode of a root that the archive does not name; the umask must not decide.
    rustix::fs::chmod(&folder, rustix::fs::Mode::from_raw_mode(0o755))
        .at("set the mode of", &folder)?;
    let file = BufReader::with_capacity(256 * 1024, open_regular(path)?);
    let mut reader = compression::decoder(Box::new(file)).context(failed)?;
    // Nothing lies below: folders that the archive does not list are made.
    let lower = LayerStack::empty();
    let options =
        ApplyOptions { overlay: store.overlay(), lower: Some(&lower), ..ApplyOptions::default() };
    let applied = layer::apply_noting_implied(&mut reader, &folder, &options);
    match applied.map_err(|error| layer_error(failed(), error)) {
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Io) => {
            Err(Error::new(ErrorKind::Invalid, "the archive is damaged, or not one").because(error))
        }
        Err(error) => Err(error),
        Ok((_, implied)) => Ok(Some(Unpacked { folder, implied })),
    }
}

/// Returns when the youngest regular file of a tar, plain or compressed, was changed, in seconds since 1970; `None` when
/// there is no such file, or the stream is something else.
pub fn youngest_file(stream: Box<dyn Read + Send>) -> Option<i64> {
    let reader = compression::decoder(stream).ok()?;
    let mut archive = tar::Archive::new(reader);
    let mut youngest = None;
    for entry in archive.entries().ok()? {
        let mut entry = entry.ok()?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let extended = entry.pax_extensions().ok().flatten().and_then(|mut extensions| {
            extensions.find_map(|extension| {
                let extension = extension.ok().filter(|e| e.key() == Ok("mtime"))?;
                extension.value().ok()?.split('.').next()?.parse::<i64>().ok()
            })
        });
        let plain = entry.header().mtime().ok().and_then(|time| i64::try_from(time).ok());
        youngest = youngest.max(extended.or(plain));
    }
    youngest
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
    let Ok(expected) = i64::from_str_radix(text.trim_matches(|c| c == ' ' || c == '\0'), 8) else {
        return false;
    };
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn tar(name: &str) -> Vec<u8> {
        let mut builder = tar::Builder::new(vec![]);
        let mut header = tar::Header::new_ustar();
        header.set_size(4);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, &b"text"[..]).unwrap();
        builder.into_inner().unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn unpacked(bytes: &[u8]) -> Result<Option<String>> {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("root")).unwrap();
        let path = folder.path().join("file");
        fs::write(&path, bytes).unwrap();
        let unpacked = unpack(&store, &path)?;
        Ok(unpacked.map(|unpacked| fs::read_to_string(unpacked.folder.join("f")).unwrap()))
    }

    #[test]
    fn tars_are_unpacked_whatever_they_are_compressed_by() {
        let plain = tar("f");
        let mut bzip2 = bzip2::write::BzEncoder::new(vec![], bzip2::Compression::fast());
        bzip2.write_all(&plain).unwrap();
        let mut xz = xz2::write::XzEncoder::new(vec![], 1);
        xz.write_all(&plain).unwrap();
        let forms = [
            gzip(&plain),
            zstd::encode_all(&plain[..], 1).unwrap(),
            bzip2.finish().unwrap(),
            xz.finish().unwrap(),
            plain.clone(),
        ];
        for form in forms {
            assert_eq!(unpacked(&form).unwrap().as_deref(), Some("text"));
        }
    }

    #[test]
    fn the_youngest_file_dates_an_archive() {
        let mut builder = tar::Builder::new(vec![]);
        let mut add = |name: &str, kind: tar::EntryType, time: u64| {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(kind);
            header.set_mode(0o644);
            header.set_size(0);
            header.set_mtime(time);
            builder.append_data(&mut header, name, std::io::empty()).unwrap();
        };
        add("old", tar::EntryType::Regular, 1000);
        add("young", tar::EntryType::Regular, 2000);
        add("folder", tar::EntryType::Directory, 3000);
        let plain = builder.into_inner().unwrap();
        for form in [gzip(&plain), plain] {
            assert_eq!(youngest_file(Box::new(std::io::Cursor::new(form))), Some(2000));
        }
        let text = b"text".repeat(1000);
        assert_eq!(youngest_file(Box::new(std::io::Cursor::new(text))), None);
    }

    #[test]
    fn files_that_are_no_tars_stay_files() {
        let plain = tar("f");
        let mut bad_sum = plain.clone();
        bad_sum[0] ^= 1;
        let cases: [(&str, Vec<u8>); 9] = [
            ("empty", vec![]),
            ("text", b"text".repeat(1000)),
            ("short", plain[..511].to_vec()),
            ("zeros", vec![0; 4096]),
            ("wrong sum", bad_sum),
            ("gzip of text", gzip(&b"text".repeat(1000))),
            ("begins like gzip", [&[0x1f, 0x8b, 8, 0][..], &[0xff; 1000]].concat()),
            ("begins like xz", [&[0xfd][..], b"7zXZ\0", &[0xff; 1000]].concat()),
            ("begins like zstd", [&[0x28, 0xb5, 0x2f, 0xfd][..], &[0xff; 1000]].concat()),
        ];
        for (case, bytes) in cases {
            assert_eq!(unpacked(&bytes).unwrap(), None, "{case}");
        }
    }

    #[test]
    fn a_tar_that_is_cut_short_is_an_error() {
        assert_eq!(unpacked(&tar("f")[..600]).unwrap_err().kind(), ErrorKind::Invalid);
        let packed = gzip(&[tar("f"), vec![1; 100_000]].concat());
        assert_eq!(unpacked(&packed[..packed.len() - 20]).unwrap_err().kind(), ErrorKind::Invalid);
    }

    #[test]
    fn directories_that_are_listed_are_told_from_those_that_are_implied() {
        let mut builder = tar::Builder::new(vec![]);
        let mut add = |name: &str, kind: tar::EntryType, link: &str| {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(kind);
            header.set_mode(0o755);
            header.set_size(0);
            if !link.is_empty() {
                header.set_link_name(link).unwrap();
            }
            builder.append_data(&mut header, name, std::io::empty()).unwrap();
        };
        add("listed/", tar::EntryType::Directory, "");
        add("listed/implied/file", tar::EntryType::Regular, "");
        add("late/file", tar::EntryType::Regular, "");
        add("late/", tar::EntryType::Directory, "");
        add("link", tar::EntryType::Symlink, "behind");
        add("link/file", tar::EntryType::Regular, "");
        add("gone/below/file", tar::EntryType::Regular, "");
        add("gone", tar::EntryType::Regular, "");
        let bytes = builder.into_inner().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("root")).unwrap();
        let path = folder.path().join("file");
        fs::write(&path, bytes).unwrap();
        let implied = unpack(&store, &path).unwrap().unwrap().implied;
        assert_eq!(implied, [b"behind".to_vec(), b"listed/implied".to_vec()].into());
    }

    #[test]
    fn no_name_leads_out_of_the_folder() {
        for name in ["../../escaped", "/escaped"] {
            let folder = tempfile::tempdir().unwrap();
            let store = Store::open(&folder.path().join("root")).unwrap();
            let path = folder.path().join("file");
            let mut bytes = tar("f");
            bytes[..name.len()].copy_from_slice(name.as_bytes());
            let mut header = tar::Header::new_ustar();
            header.as_mut_bytes().copy_from_slice(&bytes[..512]);
            header.set_cksum();
            bytes[..512].copy_from_slice(header.as_bytes());
            fs::write(&path, bytes).unwrap();
            drop(unpack(&store, &path));
            assert!(!folder.path().join("escaped").exists() && !Path::new("/escaped").exists());
        }
    }
}
