//! Whether a download is an archive to unpack or a Dockerfile, by its first bytes.

/// What compressed files begin with: bzip2, gzip, xz, zstd. Upstream does not know the last here, though its `ADD` does.
const MAGIC: [&[u8]; 4] = [b"BZh", b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"];

const BLOCK: usize = 512;

/// Returns whether a file that starts like this is an archive to build from, by its first kilobyte.
pub fn is_archive(start: &[u8]) -> bool {
    MAGIC.iter().any(|magic| start.starts_with(magic)) || is_tar(start)
}

/// Returns whether the first entry of a tar can be read from this.
fn is_tar(start: &[u8]) -> bool {
    let Some(header) = start.get(..BLOCK) else { return false };
    let (sum, kind) = (&header[148..156], header[156]);
    let text = String::from_utf8_lossy(sum);
    let Ok(wanted) = i64::from_str_radix(text.trim_matches(['\0', ' ']), 8) else { return false };
    let bytes = header.iter().enumerate();
    // The sum was taken with blanks in its own place; some programs took the bytes as signed.
    let bytes = bytes.map(|(at, b)| if (148..156).contains(&at) { b' ' } else { *b });
    let unsigned: i64 = bytes.clone().map(i64::from).sum();
    let signed: i64 = bytes.map(|b| i64::from(b.cast_signed())).sum();
    if wanted != unsigned && wanted != signed {
        return false;
    }
    match kind {
        // Upstream wants an entry's own header among these bytes; the sum alone is proof enough.
        b'g' => start.len() > BLOCK,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u8) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        block[0] = b'a';
        block[156] = kind;
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum::<u32>() + 8 * 32;
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block.resize(2 * BLOCK, 0);
        block
    }

    #[test]
    fn archives_are_known_by_their_start() {
        for start in [
            &b"BZh9"[..],
            b"\x1f\x8b\x08\0",
            b"\xfd7zXZ\0\0",
            b"\x28\xb5\x2f\xfd\0",
            &header(b'0'),
            &header(b'g'),
            &header(b'x'),
        ] {
            assert!(is_archive(start));
        }
        let mut damaged = header(b'0');
        damaged[0] = b'b';
        for start in [&b"FROM scratch"[..], b"", b"\x28\xb5\x2f", &[0; 1024], &damaged] {
            assert!(!is_archive(start));
        }
    }
}
