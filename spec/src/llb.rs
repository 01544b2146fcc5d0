//! LLB, the build graph: what frontends write and the solver reads.
//!
//! A [`Definition`] is a list of marshalled [`pb::Op`]s. Each is a *vertex*, named by the digest of its bytes, whose
//! inputs are outputs of vertices listed before it; the last op only selects the result. Frontends do not write
//! definitions by hand: they build a [`State`] and [`marshal`] it.

mod definition;
pub mod json;
mod marshal;
pub mod pb;
mod state;

pub use definition::{Definition, DefinitionError};
pub use marshal::{SourceFile, marshal};
pub use state::{
    Copy, Exec, ExecMount, FileActions, Lines, MountOptions, Owner, State, VertexOptions, WhoIs,
};
