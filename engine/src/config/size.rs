//! Amounts of disk space, as they are written in configuration files.

use std::fmt;
use std::str::FromStr;

/// An amount of disk space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskSpace {
    /// Bytes.
    Bytes(u64),
    /// A part of the file system, at most 100.
    Percent(u8),
}

impl DiskSpace {
    /// Returns the bytes on a file system of this size.
    pub fn bytes_of(self, disk_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => {
                // Without the detour a large disk times a hundred would overflow.
                let bytes = u128::from(disk_bytes) * u128::from(percent) / 100;
                u64::try_from(bytes).unwrap_or(u64::MAX)
            }
        }
    }
}

impl fmt::Display for DiskSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{bytes}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// Text that is no amount of disk space.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no amount of disk space; use bytes, something like \"20GB\", or \"10%\"")]
pub struct DiskSpaceError(String);

impl FromStr for DiskSpace {
    type Err = DiskSpaceError;

    /// Reads `1024`, `512MB`, `1.5 GiB` or `10%`. Units are powers of 1024 with and without the `i`, as upstream has it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || DiskSpaceError(text.to_owned());
        if let Some(percent) = text.strip_suffix('%') {
            let percent: u64 = percent.parse().map_err(|_| bad())?;
            // More than everything is everything.
            return Ok(Self::Percent(u8::try_from(percent.min(100)).map_err(|_| bad())?));
        }
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = unit.strip_prefix(' ').unwrap_or(unit).to_ascii_lowercase();
        let power = match unit.as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 1,
            "m" | "mb" | "mib" => 2,
            "g" | "gb" | "gib" => 3,
            "t" | "tb" | "tib" => 4,
            "p" | "pb" | "pib" => 5,
            _ => return Err(bad()),
        };
        let factor = 1_u64 << (10 * power);
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(factor).map(Self::Bytes).ok_or_else(bad);
        }
        let fraction: f64 = number.parse().map_err(|_| bad())?;
        // The cast stops at the largest number.
        let bytes = (fraction * factor as f64) as u64;
        Ok(Self::Bytes(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_upstream_reads_them() {
        for (text, expected) in [
            ("0", DiskSpace::Bytes(0)),
            ("1024", DiskSpace::Bytes(1024)),
            ("512MB", DiskSpace::Bytes(512 << 20)),
            ("20GB", DiskSpace::Bytes(20 << 30)),
            ("20 gib", DiskSpace::Bytes(20 << 30)),
            ("1.5k", DiskSpace::Bytes(1536)),
            ("2T", DiskSpace::Bytes(2 << 40)),
            ("7b", DiskSpace::Bytes(7)),
            ("10%", DiskSpace::Percent(10)),
            ("0%", DiskSpace::Percent(0)),
            ("250%", DiskSpace::Percent(100)),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in
            ["", "GB", "-1", "1XB", "1  GB", "1.2.3", "10 %", "-3%", "1.5%", "%", "99999999999P"]
        {
            assert_eq!(text.parse::<DiskSpace>(), Err(DiskSpaceError(text.into())), "{text}");
        }
    }

    #[test]
    fn percentages_are_of_the_disk() {
        assert_eq!(DiskSpace::Percent(10).bytes_of(1000), 100);
        assert_eq!(DiskSpace::Percent(100).bytes_of(u64::MAX), u64::MAX);
        assert_eq!(DiskSpace::Bytes(5).bytes_of(1), 5);
    }
}
