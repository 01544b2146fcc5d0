//! In-toto statements (in-toto Attestation Framework, "Statement").

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::value::RawValue;
use slipway_spec::Digest;

use super::json;
use super::reading::{Of, Said};

const STATEMENT: &str = "https://in-toto.io/Statement/v1";

/// The name of what has none.
const NAMELESS: &str = "_";

/// Something that a statement is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Named {
    name: String,
    digest: BTreeMap<String, String>,
}

impl Named {
    pub(super) fn new(name: String, digest: &Digest) -> Self {
        let digest = (digest.algorithm().as_str().to_owned(), digest.hex().to_owned());
        Self { name, digest: [digest].into() }
    }
}

#[derive(Serialize)]
struct Statement<'a> {
    #[serde(rename = "_type")]
    kind: &'static str,
    #[serde(rename = "predicateType")]
    predicate_type: &'a str,
    subject: &'a [Named],
    predicate: &'a RawValue,
}

/// Returns a statement in one line; `own` is what the result is called.
pub(super) fn statement(said: &Said, own: &[Named]) -> String {
    let mut subject = vec![];
    if said.subjects.is_empty() {
        subject.extend_from_slice(own);
    }
    for of in &said.subjects {
        match of {
            Of::Own { name } => {
                for one in own {
                    subject.push(one.clone());
                    if !name.is_empty() {
                        subject.push(Named { name: name.clone(), digest: one.digest.clone() });
                    }
                }
            }
            Of::Other { name, digests } => {
                let name = if name.is_empty() { NAMELESS } else { name };
                subject.push(Named { name: name.into(), digest: digests.clone() });
            }
        }
    }
    let statement = Statement {
        kind: STATEMENT,
        predicate_type: &said.predicate_type,
        subject: &subject,
        predicate: &said.predicate,
    };
    json::compact(&serde_json::to_string(&statement).expect("statements have string keys only"))
}
