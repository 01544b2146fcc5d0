//! A marshalled graph with its digests checked.

use std::collections::{BTreeMap, HashSet};

use prost::Message as _;

use super::pb;
use crate::{Digest, DigestError};

/// A marshalled graph: ops in dependency order, the last one selecting the result.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Definition {
    /// Serialised [`pb::Op`]s. The digest of a vertex is that of these exact bytes.
    pub ops: Vec<Vec<u8>>,
    /// What is said about a vertex, by its digest.
    pub metadata: BTreeMap<Digest, pb::OpMetadata>,
    /// Where vertices come from in what the user wrote.
    pub source: Option<pb::Source>,
}

/// Why bytes are not a definition.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DefinitionError {
    /// There is no op, or only the one that selects the result.
    #[error("invalid definition: it has {0} ops, and at least 2 are needed")]
    TooShort(usize),
    /// Bytes that are no protobuf message of the expected kind.
    #[error("invalid definition: {what} cannot be decoded: {reason}")]
    Undecodable {
        /// Which part.
        what: String,
        /// The decoder's message.
        reason: String,
    },
    /// The last op selects nothing.
    #[error("invalid definition: the last op has no input")]
    NoHead,
    /// An input names a vertex that does not come before it.
    #[error("invalid definition: op {op} needs {input}, which is not among the ops before it")]
    MissingInput {
        /// Position of the op.
        op: usize,
        /// The digest it asks for.
        input: String,
    },
    /// An input has a negative output index.
    #[error("invalid definition: op {op} asks for output {index} of an input")]
    NegativeIndex {
        /// Position of the op.
        op: usize,
        /// The index.
        index: i64,
    },
    /// A key of the metadata or an input is not a digest.
    #[error("invalid definition: {0}")]
    Digest(#[from] DigestError),
}

impl Definition {
    /// Takes the message apart and checks digests, order and inputs.
    pub fn from_pb(message: pb::Definition) -> Result<Self, DefinitionError> {
        let mut metadata = BTreeMap::new();
        for (digest, op_metadata) in message.metadata {
            metadata.insert(digest.parse()?, op_metadata);
        }
        let definition = Self { ops: message.def, metadata, source: message.source };
        definition.check()?;
        Ok(definition)
    }

    /// Returns the message.
    pub fn to_pb(&self) -> pb::Definition {
        pb::Definition {
            def: self.ops.clone(),
            metadata: self
                .metadata
                .iter()
                .map(|(digest, m)| (digest.to_string(), m.clone()))
                .collect(),
            source: self.source.clone(),
        }
    }

    /// Decodes a serialised [`pb::Definition`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DefinitionError> {
        let message = pb::Definition::decode(bytes).map_err(|e| undecodable("the message", &e))?;
        Self::from_pb(message)
    }

    /// Serialises as a [`pb::Definition`].
    pub fn to_bytes(&self) -> Vec<u8> {
        self.to_pb().encode_to_vec()
    }

    /// Returns the vertices in order, without the last op, each decoded and with its digest.
    pub fn vertices(&self) -> Result<Vec<(Digest, pb::Op)>, DefinitionError> {
        let count = self.ops.len().saturating_sub(1);
        let decode = |(position, bytes): (usize, &Vec<u8>)| {
            let op = pb::Op::decode(bytes.as_slice())
                .map_err(|e| undecodable(&format!("op {position}"), &e))?;
            Ok((Digest::of(bytes), op))
        };
        self.ops[..count].iter().enumerate().map(decode).collect()
    }

    /// Decodes the last op, which does nothing but name the result. Its digest is that of its bytes.
    pub fn last(&self) -> Result<(Digest, pb::Op), DefinitionError> {
        let (bytes, op) = self.decode_last()?;
        Ok((Digest::of(bytes), op))
    }

    fn decode_last(&self) -> Result<(&[u8], pb::Op), DefinitionError> {
        let [_, .., last] = self.ops.as_slice() else {
            return Err(DefinitionError::TooShort(self.ops.len()));
        };
        let position = self.ops.len() - 1;
        let op = pb::Op::decode(last.as_slice())
            .map_err(|e| undecodable(&format!("op {position}"), &e))?;
        Ok((last, op))
    }

    /// Returns the vertex and output that the definition stands for.
    pub fn head(&self) -> Result<(Digest, usize), DefinitionError> {
        let position = self.ops.len().saturating_sub(1);
        let (_, op) = self.decode_last()?;
        let input = op.inputs.first().ok_or(DefinitionError::NoHead)?;
        let index = usize::try_from(input.index)
            .map_err(|_| DefinitionError::NegativeIndex { op: position, index: input.index })?;
        Ok((input.digest.parse()?, index))
    }

    fn check(&self) -> Result<(), DefinitionError> {
        let (head, _) = self.head()?;
        let mut seen = HashSet::new();
        for (position, (digest, op)) in self.vertices()?.into_iter().enumerate() {
            for input in op.inputs {
                if input.index < 0 {
                    return Err(DefinitionError::NegativeIndex {
                        op: position,
                        index: input.index,
                    });
                }
                if !seen.contains(&input.digest) {
                    return Err(DefinitionError::MissingInput {
                        op: position,
                        input: input.digest,
                    });
                }
            }
            seen.insert(digest.to_string());
        }
        if !seen.contains(&head.to_string()) {
            return Err(DefinitionError::MissingInput {
                op: self.ops.len() - 1,
                input: head.to_string(),
            });
        }
        Ok(())
    }
}

fn undecodable(what: &str, error: &prost::DecodeError) -> DefinitionError {
    DefinitionError::Undecodable { what: what.into(), reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(identifier: &str) -> Vec<u8> {
        let source = pb::SourceOp { identifier: identifier.into(), attrs: BTreeMap::new() };
        pb::Op { op: Some(pb::op::Op::Source(source)), ..Default::default() }.encode_to_vec()
    }

    fn select(digest: &str, index: i64) -> Vec<u8> {
        pb::Op { inputs: vec![pb::Input { digest: digest.into(), index }], ..Default::default() }
            .encode_to_vec()
    }

    fn load(ops: Vec<Vec<u8>>) -> Result<Definition, DefinitionError> {
        Definition::from_pb(pb::Definition { def: ops, ..Default::default() })
    }

    #[test]
    fn vertex_digest_is_that_of_the_exact_bytes() {
        let op = source("local://context");
        let digest = Digest::of(&op);
        let definition = load(vec![op, select(&digest.to_string(), 3)]).unwrap();
        assert_eq!(definition.head().unwrap(), (digest.clone(), 3));
        assert_eq!(definition.vertices().unwrap()[0].0, digest);
        assert_eq!(Definition::from_bytes(&definition.to_bytes()).unwrap(), definition);
    }

    #[test]
    fn refuses_damaged_definitions() {
        let op = source("local://context");
        let digest = Digest::of(&op).to_string();
        let other = Digest::of(b"other").to_string();
        assert_eq!(load(vec![]), Err(DefinitionError::TooShort(0)));
        assert_eq!(load(vec![op.clone()]), Err(DefinitionError::TooShort(1)));
        let empty = pb::Op::default().encode_to_vec();
        assert_eq!(load(vec![op.clone(), empty]), Err(DefinitionError::NoHead));
        let missing = DefinitionError::MissingInput { op: 1, input: other.clone() };
        assert_eq!(load(vec![op.clone(), select(&other, 0)]), Err(missing));
        let negative = DefinitionError::NegativeIndex { op: 1, index: -1 };
        assert_eq!(load(vec![op.clone(), select(&digest, -1)]), Err(negative));
        assert!(matches!(
            load(vec![vec![0xff], select(&digest, 0)]),
            Err(DefinitionError::Undecodable { .. })
        ));
        assert!(matches!(load(vec![op, select("nonsense", 0)]), Err(DefinitionError::Digest(_))));
    }

    #[test]
    fn wire_bytes_are_those_of_the_protocol() {
        // Field 3 (source), length 6: field 1 (identifier) "x://"; field 11 (constraints), empty.
        let op = pb::Op {
            op: Some(pb::op::Op::Source(pb::SourceOp {
                identifier: "x://".into(),
                attrs: BTreeMap::new(),
            })),
            constraints: Some(pb::WorkerConstraints::default()),
            ..Default::default()
        };
        assert_eq!(op.encode_to_vec(), b"\x1a\x06\x0a\x04x://\x5a\x00");
    }
}
