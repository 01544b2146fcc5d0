//! gzip members of data most of which is noise to a compressor: archives, pictures, keys, what is compressed already. It is
//! stored as it is, and only what lies between is compressed, such as the headers of a tar. That takes a tenth of the time
//! of looking for what is not there, and the result is as small.

use libdeflater::{Compressor, crc32};

use super::deflate::{Deflate, WINDOW};

/// What is looked at at once: tar is made of such blocks.
const SECTOR: usize = 512;
/// How many bytes of a sector are counted.
const COUNTED: usize = SECTOR / 2;
/// Bytes are counted in groups of this size, every other one, so that no part of a sector is left out.
const GROUP: usize = 8;
/// A sector is noise whose sum of squares of the counts of each byte is less: it is 511 where all are as frequent, within 30,
/// 640 where a byte tells 7.5 of its 8 bits, and more than 1,200 where text or numbers are written.
const NOISE: u32 = 640;
/// At least this part of the input must be noise.
const SHARE: (usize, usize) = (3, 4);
/// Noise that loses this part of its size when it is compressed repeats itself, and is none.
const LOSS: usize = 8;
/// How much of it is compressed to see that: what repeats itself within a window does so in half of this.
const SAMPLE: usize = 2 * WINDOW;

/// The header of a member without a name and a time, made on no particular system (RFC 1952, 2.3).
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];

/// Returns a gzip member if the input is mostly noise, some of which is given to the compressor to make sure.
pub(super) fn compress(input: &[u8], compressor: &mut Compressor) -> Option<Vec<u8>> {
    let parts = parts(input);
    let noise: usize = parts.iter().filter(|part| part.noise).map(|part| part.to - part.from).sum();
    if noise == 0 || noise < input.len() * SHARE.0 / SHARE.1 || repeats(input, &parts, compressor) {
        return None;
    }
    let mut member = Vec::with_capacity(input.len() + input.len() / 64);
    member.extend_from_slice(&HEADER);
    let mut deflate = Deflate::new(input, member);
    for (at, part) in parts.iter().enumerate() {
        let last = at + 1 == parts.len();
        if part.noise {
            deflate.store(part.from, part.to, last);
        } else {
            deflate.code(part.from, part.to, last);
        }
    }
    let mut member = deflate.finish();
    member.extend_from_slice(&crc32(input).to_le_bytes());
    member.extend_from_slice(&(input.len() as u32).to_le_bytes());
    Some(member)
}

/// Neighbouring sectors that are noise, or that are not.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    from: usize,
    to: usize,
    noise: bool,
}

fn parts(input: &[u8]) -> Vec<Part> {
    let mut parts: Vec<Part> = vec![];
    let mut from = 0;
    for sector in input.chunks(SECTOR) {
        let (noise, to) = (is_noise(sector), from + sector.len());
        match parts.last_mut() {
            Some(part) if part.noise == noise => part.to = to,
            _ => parts.push(Part { from, to, noise }),
        }
        from = to;
    }
    parts
}

fn is_noise(sector: &[u8]) -> bool {
    if sector.len() < SECTOR {
        return false;
    }
    // A byte that is there more often than can be counted is none of noise.
    let mut counts = [0u8; 256];
    let mut squares = 0;
    for group in sector.chunks_exact(GROUP).step_by(SECTOR / COUNTED) {
        for byte in group {
            let count = &mut counts[usize::from(*byte)];
            squares += 2 * u32::from(*count) + 1;
            *count = count.saturating_add(1);
        }
    }
    squares < NOISE
}

/// Whether what looks like noise was there shortly before, judged by a sample from the middle of it.
fn repeats(input: &[u8], parts: &[Part], compressor: &mut Compressor) -> bool {
    let middle = parts.iter().position(|part| part.to > input.len() / 2).unwrap_or_default();
    let mut sample = Vec::with_capacity(SAMPLE);
    for part in parts[middle..].iter().chain(&parts[..middle]).filter(|part| part.noise) {
        let bytes = &input[part.from..part.to];
        sample.extend_from_slice(&bytes[..bytes.len().min(SAMPLE - sample.len())]);
    }
    let mut out = vec![0; sample.len() - sample.len() / LOSS];
    // What does not fit in here is noise.
    compressor.deflate_compress(&sample, &mut out).is_ok()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;
    use libdeflater::CompressionLvl;

    fn noise(size: usize, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; size];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    fn tried(input: &[u8]) -> Option<Vec<u8>> {
        let member = compress(input, &mut Compressor::new(CompressionLvl::default()))?;
        let mut bytes = vec![];
        flate2::bufread::GzDecoder::new(&member[..]).read_to_end(&mut bytes).unwrap();
        assert!(bytes == input);
        let mut bytes = vec![0; input.len()];
        let mut other = libdeflater::Decompressor::new();
        assert_eq!(other.gzip_decompress(&member, &mut bytes), Ok(input.len()));
        assert!(bytes == input);
        Some(member)
    }

    /// A tar of files of noise, as another program writes it.
    fn archive(sizes: impl Iterator<Item = usize>) -> Vec<u8> {
        let mut tar = tar::Builder::new(vec![]);
        for (number, size) in sizes.enumerate() {
            let mut header = tar::Header::new_ustar();
            header.set_size(size as u64);
            header.set_mode(0o644);
            let bytes = noise(size, number as u64);
            tar.append_data(&mut header, format!("some/folder/{number}"), &bytes[..]).unwrap();
        }
        tar.into_inner().unwrap()
    }

    #[test]
    fn noise_is_stored_and_the_headers_between_are_small() {
        let sizes = (0..200).map(|number| 2000 + number * 37);
        let content: usize = sizes.clone().sum();
        let input = archive(sizes);
        let member = tried(&input).unwrap();
        assert!(member.len() < content + 200 * 120, "{} of {content}", member.len());
        let whole = noise(1 << 20, 1);
        assert!(tried(&whole).unwrap().len() < whole.len() + 200);
    }

    #[test]
    fn any_length_is_read_back() {
        let input = archive((0..40).map(|number| number * 500));
        for length in (input.len() - 2000..input.len()).chain([65_535, 65_536, 70_000]) {
            assert!(tried(&input[..length]).is_some(), "{length}");
        }
    }

    #[test]
    fn what_can_be_compressed_is_left_to_the_compressor() {
        let text = "many lines that are somewhat alike\n".repeat(30_000);
        assert!(compress_fails(text.as_bytes()));
        assert!(compress_fails(&[]));
        assert!(compress_fails(&noise(300, 1)));
        // Half of it.
        assert!(compress_fails(&[&noise(500_000, 1)[..], &text.as_bytes()[..500_000]].concat()));
        // Digits of noise.
        let digits: String = noise(300_000, 1).iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(compress_fails(digits.as_bytes()));
        // Noise that repeats itself, at any distance that can be told.
        for period in [600, 5000, 30_000] {
            assert!(compress_fails(&noise(period, 1).repeat(1_000_000 / period)), "{period}");
        }
    }

    fn compress_fails(input: &[u8]) -> bool {
        tried(input).is_none()
    }
}
