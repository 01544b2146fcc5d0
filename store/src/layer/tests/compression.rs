use std::io::{Read, Write};

use super::super::compression::{Compression, Encoder, Kind, decoder, sniff};

/// Text that compresses like source code: neither constant nor random.
fn sample(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut bytes = Vec::with_capacity(length + 16);
    while bytes.len() < length {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.extend_from_slice(
            ["let ", "mut ", "fn ", "self.", "\n    ", "value"][(state as usize >> 16) % 6]
                .as_bytes(),
        );
        bytes.push((state >> 24) as u8 & 0x3f);
    }
    bytes.truncate(length);
    bytes
}

fn encode(
    input: &[u8],
    compression: Compression,
    level: Option<i32>,
    threads: usize,
    chunk: usize,
) -> Vec<u8> {
    let mut encoder = Encoder::with_threads(Vec::new(), compression, level, threads).unwrap();
    for part in input.chunks(chunk) {
        encoder.write_all(part).unwrap();
    }
    encoder.finish().unwrap()
}

fn decode(bytes: Vec<u8>) -> std::io::Result<Vec<u8>> {
    let mut out = Vec::new();
    decoder(Box::new(std::io::Cursor::new(bytes)))?.read_to_end(&mut out)?;
    Ok(out)
}

#[test]
fn output_depends_on_neither_threads_nor_write_sizes() {
    let input = sample(11 << 20);
    for compression in [Compression::Gzip, Compression::Zstd] {
        for length in [0, 1, 1 << 20, (1 << 20) + 1, input.len()] {
            let input = &input[..length];
            let expected = encode(input, compression, None, 1, 64 << 10);
            for (threads, chunk) in
                [(1, 1 << 22), (2, 64 << 10), (4, 7919), (4, 1 << 22), (9, 100_003)]
            {
                let found = encode(input, compression, None, threads, chunk);
                assert!(
                    found == expected,
                    "{compression:?} of {length} bytes on {threads} threads in {chunk}s"
                );
            }
            assert!(decode(expected).unwrap() == input, "{compression:?} of {length} bytes");
        }
    }
}

#[test]
fn gzip_header_carries_no_name_time_or_system() {
    let bytes = encode(b"hello", Compression::Gzip, None, 1, 10);
    assert_eq!(bytes[..10], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255]);
}

#[test]
fn every_level_is_accepted() {
    let input = sample(100_000);
    for compression in [Compression::Uncompressed, Compression::Gzip, Compression::Zstd] {
        for level in [i32::MIN, -1, 0, 1, 9, 12, 22, i32::MAX] {
            assert!(
                decode(encode(&input, compression, Some(level), 2, 4096)).unwrap() == input,
                "{compression:?} {level}"
            );
        }
    }
}

#[test]
fn kinds_are_recognised() {
    let input = sample(10_000);
    let bz = {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        encoder.write_all(&input).unwrap();
        encoder.finish().unwrap()
    };
    let xz = {
        let mut encoder = xz2::write::XzEncoder::new(Vec::new(), 1);
        encoder.write_all(&input).unwrap();
        encoder.finish().unwrap()
    };
    for (bytes, kind) in [
        (encode(&input, Compression::Gzip, None, 1, 4096), Kind::Gzip),
        (encode(&input, Compression::Zstd, None, 1, 4096), Kind::Zstd),
        (bz, Kind::Bzip2),
        (xz, Kind::Xz),
        (input.clone(), Kind::Plain),
    ] {
        assert_eq!(sniff(&bytes), kind);
        assert!(decode(bytes).unwrap() == input, "{kind:?}");
    }
    assert_eq!(sniff(b""), Kind::Plain);
    assert_eq!(decode(Vec::new()).unwrap(), b"");
}

#[test]
fn members_and_frames_are_joined_and_trailing_bytes_dropped() {
    let skippable = [&[0x51, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    for compression in [Compression::Gzip, Compression::Zstd] {
        let part = encode(b"first ", compression, None, 1, 10);
        let other = encode(b"second", compression, None, 1, 10);
        let empty = encode(b"", compression, None, 1, 10);
        let joined = [part.clone(), empty, other].concat();
        assert_eq!(decode(joined.clone()).unwrap(), b"first second");
        for tail in [&b"\0"[..], &[0; 1000], b"garbage that is no member"] {
            assert_eq!(
                decode([&joined, tail].concat()).unwrap(),
                b"first second",
                "{compression:?}"
            );
        }
        if compression == Compression::Zstd {
            assert_eq!(
                decode([skippable.clone(), joined, skippable.clone()].concat()).unwrap(),
                b"first second"
            );
        }
    }
}

#[test]
fn all_compressed_bytes_are_consumed() {
    struct Counting<R>(R, std::sync::Arc<std::sync::atomic::AtomicUsize>);
    impl<R: Read> Read for Counting<R> {
        fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
            // Small steps put member borders at odd places of the buffers.
            let length = out.len().min(3);
            let count = self.0.read(&mut out[..length])?;
            self.1.fetch_add(count, std::sync::atomic::Ordering::Relaxed);
            Ok(count)
        }
    }
    for compression in [Compression::Uncompressed, Compression::Gzip, Compression::Zstd] {
        let one = encode(&sample(5000), compression, None, 1, 4096);
        let bytes = [one.clone(), one, vec![0; 777]].concat();
        let length = bytes.len();
        let count = std::sync::Arc::default();
        let input = Counting(std::io::Cursor::new(bytes), std::sync::Arc::clone(&count));
        std::io::copy(&mut decoder(Box::new(input)).unwrap(), &mut std::io::sink()).unwrap();
        assert_eq!(count.load(std::sync::atomic::Ordering::Relaxed), length, "{compression:?}");
    }
}

#[test]
fn damage_is_an_error() {
    let input = sample(300_000);
    for compression in [Compression::Gzip, Compression::Zstd] {
        let good = encode(&input, compression, None, 1, 4096);
        assert!(decode(good[..good.len() - 1].to_vec()).is_err(), "{compression:?} cut short");
        assert!(
            decode(good[..good.len() / 2].to_vec()).is_err(),
            "{compression:?} cut in the middle"
        );
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 0x10;
        assert!(decode(flipped).map_or(true, |out| out != input), "{compression:?} flipped");
    }
}

#[test]
fn a_failing_output_fails_the_encoder() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let input = sample(9 << 20);
    for compression in [Compression::Gzip, Compression::Zstd] {
        let mut encoder = Encoder::with_threads(Full, compression, None, 2).unwrap();
        let result = encoder.write_all(&input).and_then(|()| encoder.finish().map(drop));
        assert_eq!(result.unwrap_err().kind(), std::io::ErrorKind::StorageFull, "{compression:?}");
    }
}
