//! As much of the ELF format as it takes to know whether a program is statically linked.

/// How many bytes of a program are enough to find its program headers.
pub(super) const HEAD: u64 = 4096;
/// The program header that names a dynamic linker.
const PT_INTERP: u32 = 3;

/// Returns whether this is the beginning of a 64- or 32-bit little-endian program without a dynamic linker.
pub(super) fn is_static(head: &[u8]) -> bool {
    headers(head).is_some_and(|kinds| !kinds.contains(&PT_INTERP))
}

fn headers(head: &[u8]) -> Option<Vec<u32>> {
    let half =
        |at: usize| head.get(at..at + 2).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])));
    let word = |at: usize| {
        head.get(at..at.checked_add(4)?).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    };
    if head.get(..4)? != b"\x7fELF" || *head.get(5)? != 1 {
        return None;
    }
    let (start, size, count) = match head.get(4)? {
        1 => (word(28)? as usize, half(42)?, half(44)?),
        2 if word(36)? == 0 => (word(32)? as usize, half(54)?, half(56)?),
        _ => return None,
    };
    (0..count).map(|index| word(start.checked_add(index.checked_mul(size)?)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(kinds: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = u8::try_from(kinds.len()).unwrap();
        for kind in kinds {
            let mut header = vec![0; 56];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            bytes.extend(header);
        }
        bytes
    }

    #[test]
    fn a_dynamic_linker_makes_a_program_dynamic() {
        assert!(is_static(&program(&[1, 1, 2])));
        assert!(!is_static(&program(&[6, 3, 1])));
    }

    #[test]
    fn damaged_headers_are_no_static_program() {
        assert!(!is_static(b""));
        assert!(!is_static(b"#!/bin/sh\n"));
        let whole = program(&[1, 2]);
        assert!(!is_static(&whole[..whole.len() - 60]));
        let mut far = program(&[1]);
        far[32..36].copy_from_slice(&[0xff; 4]);
        assert!(!is_static(&far));
    }
}
