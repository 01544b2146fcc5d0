//! DEFLATE (RFC 1951) where most of the data is stored as it is: blocks of stored bytes, and blocks with the fixed codes for
//! what lies between them. The codes of a block cost nothing to choose and nothing to write, so blocks may be short.

/// How far back a match may lie (RFC 1951, 2).
pub(super) const WINDOW: usize = 32 << 10;
/// What a stored block can hold (RFC 1951, 3.2.4).
const STORED: usize = u16::MAX as usize;
/// The shortest match that is looked for; the shortest there is saves nothing against short codes.
const SHORTEST: usize = 4;
/// The longest match there is.
const LONGEST: usize = 258;
/// Positions of long matches that are not remembered are hardly missed.
const REMEMBERED: usize = 32;
/// Slots for remembered positions.
const SLOTS: usize = 1 << 13;

const END_OF_BLOCK: u16 = 256;

/// Writes one DEFLATE stream of parts of one input.
pub(super) struct Deflate<'a> {
    input: &'a [u8],
    out: Vec<u8>,
    /// Bits that are not in `out` yet, the next one lowest.
    bits: u64,
    count: u32,
    /// For a hash of four bytes, one more than where they were last seen.
    seen: Vec<u32>,
}

impl<'a> Deflate<'a> {
    /// Starts a stream behind `out`.
    pub(super) fn new(input: &'a [u8], out: Vec<u8>) -> Self {
        Self { input, out, bits: 0, count: 0, seen: vec![0; SLOTS] }
    }

    /// Writes a part of the input as it is.
    pub(super) fn store(&mut self, from: usize, to: usize, last: bool) {
        let mut from = from;
        loop {
            let end = to.min(from + STORED);
            self.put(u64::from(last && end == to), 3);
            self.align();
            let length = (end - from) as u16;
            self.out.extend_from_slice(&length.to_le_bytes());
            self.out.extend_from_slice(&(!length).to_le_bytes());
            self.out.extend_from_slice(&self.input[from..end]);
            from = end;
            if from == to {
                return;
            }
        }
    }

    /// Writes a part of the input in codes.
    pub(super) fn code(&mut self, from: usize, to: usize, last: bool) {
        self.put(u64::from(last) | 0b01 << 1, 3);
        let mut at = from;
        while at < to {
            let Some((distance, length)) = self.find(at, to) else {
                self.literal(self.input[at].into());
                at += 1;
                continue;
            };
            self.length(length);
            self.distance(distance);
            for next in at + 1..at + length.min(REMEMBERED) {
                self.remember(next);
            }
            at += length;
        }
        self.literal(END_OF_BLOCK);
    }

    /// Ends the stream and returns it, behind what it was started with.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.align();
        self.out
    }

    /// Returns how far back the bytes from here to at most `to` are found again, and how many of them.
    fn find(&mut self, at: usize, to: usize) -> Option<(usize, usize)> {
        let before = self.remember(at)?;
        let most = LONGEST.min(to - at);
        let (old, new) = (&self.input[before..], &self.input[at..at + most]);
        let length = old.iter().zip(new).take_while(|(old, new)| old == new).count();
        (at - before <= WINDOW && length >= SHORTEST).then_some((at - before, length))
    }

    /// Remembers a position; returns the last one with the same hash.
    fn remember(&mut self, at: usize) -> Option<usize> {
        let four = self.input.get(at..)?.first_chunk::<4>()?;
        let hash = u32::from_le_bytes(*four).wrapping_mul(0x9e37_79b1) >> (32 - SLOTS.ilog2());
        let before = std::mem::replace(&mut self.seen[hash as usize], at as u32 + 1);
        before.checked_sub(1).map(|before| before as usize)
    }

    fn length(&mut self, length: usize) {
        let at = LENGTHS.partition_point(|base| usize::from(*base) <= length) - 1;
        self.literal(END_OF_BLOCK + 1 + at as u16);
        self.put((length - usize::from(LENGTHS[at])) as u64, length_bits(at));
    }

    fn distance(&mut self, distance: usize) {
        let at = DISTANCES.partition_point(|base| usize::from(*base) <= distance) - 1;
        self.put(u64::from((at as u8).reverse_bits() >> 3), 5);
        self.put((distance - usize::from(DISTANCES[at])) as u64, distance_bits(at));
    }

    /// Writes a code of the literal and length alphabet (RFC 1951, 3.2.6).
    fn literal(&mut self, symbol: u16) {
        let (code, bits) = match symbol {
            0..=143 => (0x30 + symbol, 8),
            144..=255 => (0x190 + symbol - 144, 9),
            256..=279 => (symbol - 256, 7),
            _ => (0xc0 + symbol - 280, 8),
        };
        // Codes are written from their highest bit on.
        self.put(u64::from(code.reverse_bits() >> (16 - bits)), bits);
    }

    fn put(&mut self, bits: u64, count: u32) {
        self.bits |= bits << self.count;
        self.count += count;
        if self.count >= 32 {
            self.out.extend_from_slice(&(self.bits as u32).to_le_bytes());
            self.bits >>= 32;
            self.count -= 32;
        }
    }

    fn align(&mut self) {
        let bytes = self.count.div_ceil(8) as usize;
        self.out.extend_from_slice(&self.bits.to_le_bytes()[..bytes]);
        (self.bits, self.count) = (0, 0);
    }
}

/// The shortest match of each length symbol (RFC 1951, 3.2.5); the last one stands for one length alone.
const LENGTHS: [u16; 29] = {
    let mut bases = [3; 29];
    let mut at = 1;
    while at < bases.len() {
        bases[at] = bases[at - 1] + (1 << length_bits(at - 1));
        at += 1;
    }
    bases[28] = LONGEST as u16;
    bases
};

/// The smallest of each distance symbol.
const DISTANCES: [u16; 30] = {
    let mut bases = [1; 30];
    let mut at = 1;
    while at < bases.len() {
        bases[at] = bases[at - 1] + (1 << distance_bits(at - 1));
        at += 1;
    }
    bases
};

/// How many bits follow a length symbol.
const fn length_bits(at: usize) -> u32 {
    if at < 8 || at == 28 { 0 } else { at as u32 / 4 - 1 }
}

/// How many bits follow a distance symbol.
const fn distance_bits(at: usize) -> u32 {
    if at < 4 { 0 } else { at as u32 / 2 - 1 }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    fn inflate(stream: &[u8]) -> Vec<u8> {
        let mut bytes = vec![];
        let mut decoder = flate2::bufread::DeflateDecoder::new(stream);
        decoder.read_to_end(&mut bytes).unwrap();
        assert_eq!(decoder.total_in(), stream.len() as u64);
        bytes
    }

    #[test]
    fn symbols_begin_where_the_standard_says() {
        assert_eq!(LENGTHS[..12], [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17]);
        assert_eq!(LENGTHS[24..], [131, 163, 195, 227, 258]);
        assert_eq!(DISTANCES[..8], [1, 2, 3, 4, 5, 7, 9, 13]);
        assert_eq!(DISTANCES[28..], [16385, 24577]);
    }

    #[test]
    fn every_length_and_distance_is_read_back() {
        let mut noise = vec![0; WINDOW + 2 * LONGEST];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let distances = DISTANCES.into_iter().map(usize::from);
        for distance in distances.chain([6, 700, WINDOW - 1, WINDOW, WINDOW + 1]) {
            for length in SHORTEST..=LONGEST + 2 {
                let mut input = noise[..distance].to_vec();
                (0..length).for_each(|at| input.push(input[at]));
                let mut deflate = Deflate::new(&input, vec![]);
                deflate.code(0, distance, false);
                deflate.code(distance, input.len(), true);
                assert!(inflate(&deflate.finish()) == input, "{distance} {length}");
            }
        }
    }

    #[test]
    fn parts_of_any_kind_follow_each_other() {
        let input: Vec<u8> = (0..200_000u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
        let cuts = [0, 1, 1, 2, 700, 701, 70_000, 140_000, 199_999, 200_000];
        for kinds in 0..1 << (cuts.len() - 1) {
            let mut deflate = Deflate::new(&input, b"before".to_vec());
            for (at, pair) in cuts.windows(2).enumerate() {
                let last = at + 2 == cuts.len();
                if kinds >> at & 1 == 0 {
                    deflate.code(pair[0], pair[1], last);
                } else {
                    deflate.store(pair[0], pair[1], last);
                }
            }
            let stream = deflate.finish();
            assert!(inflate(stream.strip_prefix(b"before").unwrap()) == input, "{kinds:b}");
        }
    }
}
