//! What is said of a result beside the result itself, as frontends and builders tell each other: BuildKit's `Attestation`.

use std::collections::BTreeMap;

use crate::Digest;

/// What is to be said of a result, and where that is found: in the file system of a graph, or of what stands for one.
#[derive(Clone, Debug, PartialEq)]
pub struct Attestation<F> {
    /// What the file or folder holds.
    pub kind: AttestationKind,
    /// The file system that it is in.
    pub from: F,
    /// The file, or the folder, in that file system; an empty one is all of it.
    pub path: String,
    /// The type of what is said, a URI. Of a bundle: the only type that its statements may have; empty is any.
    pub predicate_type: String,
    /// What it is said of; nothing is the result itself.
    pub subjects: Vec<Subject>,
    /// What else is known of it, by BuildKit's names, such as `reason`.
    pub metadata: BTreeMap<String, Vec<u8>>,
}

/// What an attestation is in a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttestationKind {
    /// A file with the predicate, in JSON.
    Predicate,
    /// A folder of whole in-toto statements, in JSON.
    Bundle,
}

/// What something is said of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The result, under a further name if that is not empty.
    Own {
        /// The further name.
        name: String,
    },
    /// Something else.
    Other {
        /// Its name.
        name: String,
        /// Its digests.
        digests: Vec<Digest>,
    },
}

/// In [`Attestation::metadata`]: why it was made, `sbom` or `provenance`.
pub const REASON: &str = "reason";

/// In [`Attestation::metadata`]: `true` where it belongs into images alone.
pub const INLINE_ONLY: &str = "inline-only";

/// In [`Attestation::metadata`]: the name, without its ending, of the file that says what the result itself is made of.
pub const SBOM_CORE: &str = "sbom-core";

/// The predicate type of a bill of materials in SPDX.
pub const SPDX: &str = "https://spdx.dev/Document";

impl<F> Attestation<F> {
    /// Takes it apart into where it is and what it is.
    pub fn split(self) -> (F, Attestation<()>) {
        let Self { kind, from, path, predicate_type, subjects, metadata } = self;
        (from, Attestation { kind, from: (), path, predicate_type, subjects, metadata })
    }

    /// Says the same, found elsewhere.
    pub fn at<G>(self, from: G) -> Attestation<G> {
        let Self { kind, from: _, path, predicate_type, subjects, metadata } = self;
        Attestation { kind, from, path, predicate_type, subjects, metadata }
    }

    /// Returns whether it is a bill of materials.
    pub fn is_sbom(&self) -> bool {
        self.predicate_type == SPDX
    }
}

#[cfg(feature = "grpc")]
mod message {
    //! As messages of the gateway interface.

    use bytes::Bytes;

    use super::{Attestation, AttestationKind, Subject};
    use crate::DigestError;
    use crate::wire::gateway::{
        Attestation as Message, AttestationKind as MessageKind, InTotoSubject,
        InTotoSubjectKind as SubjectKind, Ref,
    };

    /// Why a message is no attestation.
    #[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
    pub enum AttestationError {
        /// Of another kind than there are.
        #[error("unknown attestation kind {0}")]
        Kind(i32),
        /// About another kind of thing than there are.
        #[error("unknown attestation subject kind {0}")]
        Subject(i32),
        /// About something whose digest is none.
        #[error("attestation subject {name:?}: {source}")]
        Digest {
            /// The name of what it is about.
            name: String,
            /// Why it is no digest.
            source: DigestError,
        },
    }

    impl TryFrom<Message> for Attestation<Ref> {
        type Error = AttestationError;

        fn try_from(message: Message) -> Result<Self, AttestationError> {
            let kind = match MessageKind::try_from(message.kind) {
                Ok(MessageKind::InToto) => AttestationKind::Predicate,
                Ok(MessageKind::Bundle) => AttestationKind::Bundle,
                Err(_) => return Err(AttestationError::Kind(message.kind)),
            };
            let subjects = message.in_toto_subjects.into_iter().map(subject);
            let metadata = message.metadata.into_iter();
            Ok(Self {
                kind,
                // Without an id it is the empty file system.
                from: message.r#ref.unwrap_or_default(),
                path: message.path,
                predicate_type: message.in_toto_predicate_type,
                subjects: subjects.collect::<Result<_, _>>()?,
                metadata: metadata.map(|(key, value)| (key, value.into())).collect(),
            })
        }
    }

    fn subject(message: InTotoSubject) -> Result<Subject, AttestationError> {
        let InTotoSubject { kind, digest, name } = message;
        match SubjectKind::try_from(kind) {
            Ok(SubjectKind::Self_) => Ok(Subject::Own { name }),
            Ok(SubjectKind::Raw) => {
                let digests = digest.iter().map(|text| text.parse()).collect::<Result<_, _>>();
                match digests {
                    Ok(digests) => Ok(Subject::Other { name, digests }),
                    Err(source) => Err(AttestationError::Digest { name, source }),
                }
            }
            Err(_) => Err(AttestationError::Subject(kind)),
        }
    }

    impl From<Attestation<Ref>> for Message {
        fn from(said: Attestation<Ref>) -> Self {
            let kind = match said.kind {
                AttestationKind::Predicate => MessageKind::InToto,
                AttestationKind::Bundle => MessageKind::Bundle,
            };
            let subject = |subject| match subject {
                Subject::Own { name } => {
                    InTotoSubject { kind: SubjectKind::Self_.into(), digest: vec![], name }
                }
                Subject::Other { name, digests } => InTotoSubject {
                    kind: SubjectKind::Raw.into(),
                    digest: digests.iter().map(ToString::to_string).collect(),
                    name,
                },
            };
            let metadata = said.metadata.into_iter();
            Self {
                kind: kind.into(),
                metadata: metadata.map(|(key, value)| (key, Bytes::from(value))).collect(),
                // Clients look into it without asking whether it is there.
                r#ref: Some(said.from),
                path: said.path,
                in_toto_predicate_type: said.predicate_type,
                in_toto_subjects: said.subjects.into_iter().map(subject).collect(),
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::Digest;

        #[test]
        fn messages_say_the_same() {
            let said = Attestation {
                kind: AttestationKind::Bundle,
                from: Ref { id: "r".into(), def: None },
                path: "/p".into(),
                predicate_type: "t".into(),
                subjects: vec![
                    Subject::Own { name: "own".into() },
                    Subject::Other { name: "other".into(), digests: vec![Digest::of(b"x")] },
                ],
                metadata: [("reason".to_owned(), b"r".to_vec())].into(),
            };
            let message = Message::from(said.clone());
            assert_eq!(message.kind, 1);
            assert_eq!(message.in_toto_subjects[1].kind, 1);
            assert_eq!(Attestation::try_from(message), Ok(said));
        }

        #[test]
        fn what_makes_no_sense_is_refused() {
            let subject = |kind, digest: &str| Message {
                in_toto_subjects: vec![InTotoSubject {
                    kind,
                    digest: vec![digest.into()],
                    name: "n".into(),
                }],
                ..Message::default()
            };
            for (message, expected) in [
                (Message { kind: 2, ..Message::default() }, "unknown attestation kind 2"),
                (subject(5, ""), "unknown attestation subject kind 5"),
                (subject(1, "md5"), "attestation subject \"n\": "),
            ] {
                let error = Attestation::try_from(message).unwrap_err().to_string();
                assert!(error.starts_with(expected), "{error}");
            }
            // Digests of the result itself are known better here.
            let own = Attestation::try_from(subject(0, "md5")).unwrap();
            assert_eq!(own.subjects, [Subject::Own { name: "n".into() }]);
            assert_eq!((own.kind, own.from), (AttestationKind::Predicate, Ref::default()));
        }
    }
}

#[cfg(feature = "grpc")]
pub use message::AttestationError;
