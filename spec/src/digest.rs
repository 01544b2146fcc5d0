//! Content digests, as in the OCI image specification, section "Digests".

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::digest::common::hazmat::SerializableState as _;
use sha2::{Digest as _, Sha256, Sha512};

/// A hash function that may name content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Algorithm {
    /// The canonical algorithm; everything slipway writes is named by it.
    Sha256,
    /// Accepted when others use it.
    Sha512,
}

impl Algorithm {
    /// Returns the name used before the colon.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    fn hex_len(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha512 => 128,
        }
    }
}

/// A checked digest, `algorithm:hex`.
///
/// Construction proves that the text is a known algorithm and lower-case hex of the right length,
/// so a digest may be used in a path or a URL.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest {
    algorithm: Algorithm,
    hex: Box<str>,
}

/// Why a text is not a digest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// There is no `algorithm:` part.
    #[error("invalid digest {0:?}: expected algorithm:hex")]
    Malformed(String),
    /// The algorithm is not one that can be verified here.
    #[error("invalid digest {0:?}: only sha256 and sha512 are supported")]
    UnknownAlgorithm(String),
    /// The hex part has the wrong length or characters.
    #[error(
        "invalid digest {0:?}: the part after the colon must be {1} lower-case hexadecimal digits"
    )]
    BadHex(String, usize),
}

impl Digest {
    /// Returns the sha256 digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_sha256(Sha256::digest(bytes).into())
    }

    /// Wraps a finished sha256.
    pub fn from_sha256(bytes: [u8; 32]) -> Self {
        Self { algorithm: Algorithm::Sha256, hex: to_hex(&bytes).into() }
    }

    /// Returns the bytes of a sha256; `None` for other digests.
    pub fn to_sha256(&self) -> Option<[u8; 32]> {
        let mut bytes = [0; 32];
        if self.hex.len() != 2 * bytes.len() {
            return None;
        }
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(self.hex.get(2 * at..2 * at + 2)?, 16).ok()?;
        }
        Some(bytes)
    }

    /// Returns the algorithm.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Returns the part after the colon.
    pub fn hex(&self) -> &str {
        &self.hex
    }

    /// Returns the first 12 hex digits, for people.
    pub fn short(&self) -> &str {
        &self.hex[..12]
    }

    /// Starts a hasher of the same algorithm, to verify content against this digest.
    pub fn verifier(&self) -> Hasher {
        match self.algorithm {
            Algorithm::Sha256 => Hasher::sha256(),
            Algorithm::Sha512 => Hasher(HasherInner::Sha512(Box::default())),
        }
    }
}

/// Lower-case hex of bytes.
pub fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut hex = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        hex.push(DIGITS[usize::from(byte >> 4)] as char);
        hex.push(DIGITS[usize::from(byte & 15)] as char);
    }
    hex
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.as_str(), self.hex)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let (name, hex) =
            text.split_once(':').ok_or_else(|| DigestError::Malformed(text.into()))?;
        let algorithm = match name {
            "sha256" => Algorithm::Sha256,
            "sha512" => Algorithm::Sha512,
            _ => return Err(DigestError::UnknownAlgorithm(text.into())),
        };
        let good = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if hex.len() != algorithm.hex_len() || !hex.bytes().all(good) {
            return Err(DigestError::BadHex(text.into(), algorithm.hex_len()));
        }
        Ok(Self { algorithm, hex: hex.into() })
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// Hashes a stream.
#[derive(Clone, Debug)]
pub struct Hasher(HasherInner);

#[derive(Clone, Debug)]
enum HasherInner {
    Sha256(Sha256),
    Sha512(Box<Sha512>),
}

impl Hasher {
    /// Starts the canonical hash.
    pub fn sha256() -> Self {
        Self(HasherInner::Sha256(Sha256::new()))
    }

    /// Adds bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            HasherInner::Sha256(hash) => hash.update(bytes),
            HasherInner::Sha512(hash) => hash.update(bytes),
        }
    }

    /// Returns how far a canonical hash has come, to go on from there later; `None` for other hashes.
    pub fn state(&self) -> Option<Vec<u8>> {
        match &self.0 {
            HasherInner::Sha256(hash) => Some(hash.serialize().to_vec()),
            HasherInner::Sha512(_) => None,
        }
    }

    /// Goes on from where a canonical hash was; `None` when that is no state of one.
    pub fn resume(state: &[u8]) -> Option<Self> {
        let state = state.try_into().ok()?;
        Sha256::deserialize(state).ok().map(|hash| Self(HasherInner::Sha256(hash)))
    }

    /// Returns the digest of everything added.
    pub fn finish(self) -> Digest {
        match self.0 {
            HasherInner::Sha256(hash) => Digest::from_sha256(hash.finalize().into()),
            HasherInner::Sha512(hash) => {
                let bytes: [u8; 64] = hash.finalize().into();
                Digest { algorithm: Algorithm::Sha512, hex: to_hex(&bytes).into() }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_goes_on_from_a_state() {
        for length in [0, 1, 63, 64, 65, 1000] {
            let mut hasher = Hasher::sha256();
            hasher.update(&vec![7; length]);
            let state = hasher.state().unwrap();
            let mut resumed = Hasher::resume(&state).unwrap();
            resumed.update(b"rest");
            assert_eq!(resumed.finish(), Digest::of(&[&vec![7; length][..], b"rest"].concat()));
            assert!(Hasher::resume(&state[1..]).is_none());
        }
    }

    #[test]
    fn accepts_only_checked_text() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), empty);
        assert_eq!(empty.parse::<Digest>().unwrap(), Digest::of(b""));
        for bad in [
            "",
            "sha256",
            "sha256:",
            "sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855",
            "sha256:../../../../../../../../../../../../../../../../../../../../../x",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sha512_is_verified_with_its_own_algorithm() {
        let mut hasher = Hasher(HasherInner::Sha512(Box::default()));
        hasher.update(b"abc");
        let digest = hasher.finish();
        let mut again = digest.verifier();
        again.update(b"abc");
        assert_eq!(again.finish(), digest);
    }
}
