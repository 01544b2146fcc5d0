//! What this daemon can do, by BuildKit's names. Clients and frontends ask for nothing that is not listed.

use slipway_engine::solver::capability;
use slipway_spec::wire::caps::ApiCap;

/// What a frontend may ask of its bridge.
const FRONTEND: &[&str] = &[
    "frontend.caps",
    "frontend.inputs",
    "gateway.evaluate",
    "gateway.exec",
    "gateway.exec.extrahosts",
    "gateway.exec.filesystem",
    "gateway.exec.secretenv",
    "gateway.exec.signals",
    "gateway.solve.evaluate",
    "gateway.solve.metadata",
    "gateway.warnings",
    "importcaches",
    "proto.refarray",
    "readdir",
    "readfile",
    "reference.attestations",
    "reference.output",
    "resolveimage",
    "resolveimage.resolvemode",
    "return",
    "returnmap",
    "solve.base",
    "source.metaresolver",
    "statfile",
];

/// What outputs and the interface itself can do beside what is in a graph.
const DAEMON: &[&str] = &[
    "exporter.image.annotations",
    "exporter.image.attestations",
    "exporter.multiple",
    "exporter.sourcedateepoch",
    "gc.freespacefilter",
    "history.filter",
    "source.policy",
    "source.policy.session",
];

fn list<'a>(ids: impl IntoIterator<Item = &'a str>) -> Vec<ApiCap> {
    let mut ids: Vec<&str> = ids.into_iter().collect();
    ids.sort_unstable();
    ids.dedup();
    ids.into_iter().map(|id| ApiCap { id: id.into(), enabled: true, ..ApiCap::default() }).collect()
}

/// Returns what a frontend may ask of its bridge, by name.
pub fn frontend() -> Vec<ApiCap> {
    list(FRONTEND.iter().copied())
}

/// Returns what may be in a graph, by name.
pub fn llb() -> Vec<ApiCap> {
    list(capability::LLB.iter().copied().chain(DAEMON.iter().copied()))
}
