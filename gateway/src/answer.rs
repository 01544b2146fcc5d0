//! What a frontend says in the end, in the words of the gateway interface.

use std::collections::BTreeMap;

use base64::Engine as _;
use bytes::Bytes;
use prost_types::Any;
use serde::Deserialize;
use serde_json::{Value, json};
use slipway_frontend::{FrontendError, FrontendResult, PlatformImage};
use slipway_spec::attestation::Attestation;
use slipway_spec::llb::{Definition, pb};
use slipway_spec::wire::gateway::{
    Attestations, Ref, RefMap, RefMapDeprecated, Result as WireResult, result,
};
use slipway_spec::wire::rpc;
use slipway_spec::{ImageConfig, Platform};
use tonic::{Code, Status};

use crate::bridge::RemoteBridge;

const ERRDEFS: &str = "github.com/moby/buildkit/errdefs.";
const CONFIG: &str = "containerimage.config";
const BASE_CONFIG: &str = "containerimage.base.config";
const EPOCH: &str = "source.date.epoch";
const PLATFORMS: &str = "refs.platforms";

/// Hands over the graphs of a result, and says what it is.
///
/// # Errors
/// When a graph is refused.
pub(crate) async fn result(
    bridge: &RemoteBridge,
    found: FrontendResult,
) -> Result<WireResult, Status> {
    let metadata = found.metadata.iter();
    let mut metadata: BTreeMap<String, Bytes> =
        metadata.map(|(key, value)| (key.clone(), value.clone().into())).collect();
    let several = found.multi_platform || found.images.len() > 1;
    let mut refs = BTreeMap::new();
    let mut attestations = BTreeMap::new();
    let mut platforms = vec![];
    for image in &found.images {
        let id = image.platform.to_string();
        let key = |name: &str| if several { format!("{name}/{id}") } else { name.to_owned() };
        metadata.insert(key(CONFIG), encode(&image.config)?);
        if let Some(base) = &image.base_config {
            metadata.insert(key(BASE_CONFIG), encode(base)?);
        }
        if let Some(epoch) = image.epoch {
            metadata.insert(key(EPOCH), epoch.to_string().into_bytes().into());
        }
        platforms.push(json!({ "ID": id, "Platform": image.platform }));
        for said in &image.attestations {
            let (definition, said) = said.clone().split();
            let reference = put(bridge, definition.as_ref(), &found).await?;
            let all: &mut Attestations = attestations.entry(id.clone()).or_default();
            all.attestation.push(said.at(reference).into());
        }
        refs.insert(id, put(bridge, image.definition.as_ref(), &found).await?);
    }
    if !platforms.is_empty() {
        metadata.insert(PLATFORMS.into(), encode(&json!({ "Platforms": platforms }))?);
    }
    let new = bridge.takes_refs();
    let result = match (refs.len(), several) {
        (0, _) => None,
        (_, true) if new => Some(result::Result::Refs(RefMap { refs })),
        (_, true) => {
            let refs = refs.into_iter().map(|(id, reference)| (id, reference.id)).collect();
            Some(result::Result::RefsDeprecated(RefMapDeprecated { refs }))
        }
        (_, false) => refs.into_values().next().map(|reference| match new {
            true => result::Result::Ref(reference),
            false => result::Result::RefDeprecated(reference.id),
        }),
    };
    Ok(WireResult { result, metadata, attestations })
}

/// Hands over one graph of a result.
async fn put(
    bridge: &RemoteBridge,
    definition: Option<&Definition>,
    found: &FrontendResult,
) -> Result<Ref, Status> {
    // Without an id it is the empty file system.
    let Some(definition) = definition else { return Ok(Ref::default()) };
    let id = bridge.put(definition, &found.cache_imports).await?;
    Ok(Ref { id, def: Some(definition.to_pb()) })
}

fn encode(value: &impl serde::Serialize) -> Result<Bytes, Status> {
    let encoded = serde_json::to_vec(value);
    encoded.map(Bytes::from).map_err(|error| Status::internal(error.to_string()))
}

#[derive(Deserialize)]
struct Platforms {
    #[serde(rename = "Platforms", default)]
    platforms: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Platform")]
    platform: Platform,
}

/// Reads what another frontend has said.
///
/// # Errors
/// When it makes no sense.
pub(crate) fn read(said: WireResult) -> Result<FrontendResult, Status> {
    let (mut metadata, mut said_of) = (said.metadata, said.attestations);
    let mut refs = BTreeMap::new();
    let several = match said.result {
        Some(result::Result::Ref(reference)) => {
            refs.insert(String::new(), reference);
            false
        }
        Some(result::Result::Refs(map)) => {
            refs = map.refs;
            true
        }
        None => false,
        Some(result::Result::RefDeprecated(_) | result::Result::RefsDeprecated(_)) => {
            return Err(Status::unimplemented("a daemon that does not tell graphs of results"));
        }
    };
    let invalid = |key: &str, error: serde_json::Error| {
        Status::invalid_argument(format!("{key} of another frontend's result: {error}"))
    };
    let platforms = match metadata.remove(PLATFORMS) {
        Some(bytes) => {
            let read: Result<Platforms, _> = serde_json::from_slice(&bytes);
            read.map_err(|error| invalid(PLATFORMS, error))?.platforms
        }
        None => vec![Named { id: String::new(), platform: Platform::host() }],
    };
    let graph = |reference: Ref| {
        let definition = reference.def.filter(|definition| !definition.def.is_empty());
        let definition = definition.map(Definition::from_pb).transpose();
        definition.map_err(|error| Status::invalid_argument(error.to_string()))
    };
    let mut images = vec![];
    for Named { id, platform } in platforms.into_iter().take(refs.len()) {
        let reference = if several { refs.remove(&id) } else { refs.remove("") };
        let reference = reference.ok_or_else(|| {
            Status::invalid_argument(format!("another frontend's result has no {id}"))
        })?;
        let mut of = |name: &str| {
            metadata.remove(&if several { format!("{name}/{id}") } else { name.to_owned() })
        };
        let (config, base, epoch) = (of(CONFIG), of(BASE_CONFIG), of(EPOCH));
        let config: ImageConfig = match config {
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|e| invalid(CONFIG, e))?,
            None => ImageConfig {
                architecture: platform.architecture.clone(),
                os: platform.os.clone(),
                variant: platform.variant.clone(),
                ..ImageConfig::default()
            },
        };
        // A result for one platform may say of what it speaks without saying of which platform.
        let key = if id.is_empty() { platform.full_name() } else { id.clone() };
        let said =
            said_of.remove(&key).unwrap_or_default().attestation.into_iter().map(|message| {
                let said = Attestation::try_from(message)
                    .map_err(|error| Status::invalid_argument(error.to_string()))?;
                let (reference, said) = said.split();
                Ok::<_, Status>(said.at(graph(reference)?))
            });
        images.push(PlatformImage {
            attestations: said.collect::<Result<_, _>>()?,
            definition: graph(reference)?,
            base_history_len: config.history.iter().take_while(|at| at.created.is_some()).count(),
            base_config: base.and_then(|bytes| serde_json::from_slice(&bytes).ok()),
            epoch: epoch.and_then(|bytes| std::str::from_utf8(&bytes).ok()?.trim().parse().ok()),
            config,
            platform,
        });
    }
    let metadata = metadata.into_iter().map(|(key, value)| (key, value.to_vec())).collect();
    Ok(FrontendResult { images, multi_platform: several, metadata, ..FrontendResult::default() })
}

/// Says what is wrong with what the user wrote, and where.
pub(crate) fn failure(error: &FrontendError) -> rpc::Status {
    // What failed on the other side is told with its own details.
    let other = error.source.as_ref().and_then(|error| error.source.as_ref()?.downcast_ref());
    let (mut code, mut details) = match other {
        Some(status) => (Status::code(status), rpc::Status::from(status).details),
        None => (Code::Unknown, vec![]),
    };
    if let Some(name) = &error.unsupported_request {
        code = Code::Unimplemented;
        details.push(detail("Subrequest", &json!({ "name": name })));
    }
    if !details.iter().any(|any| any.type_url == format!("{ERRDEFS}Source+json")) {
        for diagnostic in &error.diagnostics {
            let place = diagnostic.to_warning();
            details
                .extend(place.source.as_ref().map(|source| source_detail(source, &place.ranges)));
        }
    }
    let messages: Vec<&str> = error.diagnostics.iter().map(|at| at.message.as_str()).collect();
    rpc::Status { code: code as i32, message: messages.join("\n"), details }
}

fn detail(name: &str, value: &Value) -> Any {
    Any { type_url: format!("{ERRDEFS}{name}+json"), value: value.to_string().into_bytes() }
}

fn source_detail(source: &pb::SourceInfo, ranges: &[pb::Range]) -> Any {
    let position = |at: &Option<pb::Position>| {
        let (line, character) = at.as_ref().map_or((0, 0), |at| (at.line, at.character));
        json!({ "line": line, "character": character })
    };
    let ranges = ranges
        .iter()
        .map(|range| json!({ "start": position(&range.start), "end": position(&range.end) }));
    let info = json!({
        "filename": source.filename,
        "data": base64::engine::general_purpose::STANDARD.encode(&source.data),
        "language": source.language,
    });
    detail("Source", &json!({ "info": info, "ranges": ranges.collect::<Vec<_>>() }))
}
