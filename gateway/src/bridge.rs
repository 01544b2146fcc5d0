//! The frontend's questions, put to whoever started it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use slipway_frontend::{
    Bridge, BridgeError, BridgeErrorKind, BridgeRef, CacheImport, Diagnostic, Feature,
    FrontendImage, FrontendResult, LayoutImage, ResolveMode, ResolvedImage, SourceMetadata,
};
use slipway_spec::llb::{Definition, pb};
use slipway_spec::wire::gateway::{
    CacheOptionsEntry, FileRange, InputsRequest, PingRequest, ReadFileRequest,
    ResolveImageConfigRequest, ResolveSourceGitRequest, ResolveSourceImageRequest,
    ResolveSourceMetaRequest, ResolveSourceMetaResponse, Result as WireResult, ReturnRequest,
    SolveRequest, WarnRequest, result,
};
use slipway_spec::wire::rpc;
use slipway_spec::{Digest, ImageReference, Platform};
use tonic::{Code, Status};

use crate::environment::Environment;
use crate::{Client, answer};

/// Asks whoever started this frontend.
#[derive(Debug)]
pub struct RemoteBridge {
    client: Client,
    session: Option<String>,
    /// What may be asked, by name.
    can: BTreeSet<String>,
    /// What graphs may have in them.
    llb: BTreeSet<String>,
    /// Results by their place: what the other side calls them.
    refs: Mutex<Vec<String>>,
    warnings: Mutex<Vec<WarnRequest>>,
}

impl RemoteBridge {
    /// Begins: finds out what may be asked.
    ///
    /// # Errors
    /// When nobody answers.
    pub async fn open(client: Client, environment: &Environment) -> Result<Self, Status> {
        let pong = client.clone().ping(PingRequest {}).await?.into_inner();
        let names = |caps: Vec<slipway_spec::wire::caps::ApiCap>| {
            caps.into_iter().filter(|cap| cap.enabled).map(|cap| cap.id).collect()
        };
        Ok(Self {
            client,
            session: environment.session.clone(),
            can: names(pong.frontend_api_caps),
            llb: names(pong.llb_caps),
            refs: Mutex::default(),
            warnings: Mutex::default(),
        })
    }

    /// Returns whether results may be given in the newer of two forms.
    pub(crate) fn takes_refs(&self) -> bool {
        self.can.contains("proto.refarray")
    }

    /// Hands over a graph that is part of the result, and returns what it is called.
    ///
    /// # Errors
    /// When the graph is refused.
    pub(crate) async fn put(
        &self,
        definition: &Definition,
        caches: &[CacheImport],
    ) -> Result<String, Status> {
        let definition = definition.to_pb();
        for name in definition.metadata.values().flat_map(|metadata| metadata.caps.keys()) {
            if !self.llb.is_empty() && !self.llb.contains(name) {
                return Err(Status::unimplemented(format!(
                    "the daemon that runs this frontend does not support {name}; use a newer one"
                )));
            }
        }
        let entry = |cache: &CacheImport| CacheOptionsEntry {
            r#type: cache.kind.clone(),
            attrs: cache.attrs.clone(),
        };
        let request = SolveRequest {
            definition: Some(definition),
            allow_result_return: true,
            allow_result_array_ref: true,
            cache_imports: caches.iter().map(entry).collect(),
            ..SolveRequest::default()
        };
        let response = self.client.clone().solve(request).await?.into_inner();
        Ok(match response.result.and_then(|result| result.result) {
            Some(result::Result::Ref(reference)) => reference.id,
            Some(result::Result::RefDeprecated(id)) => id,
            _ => response.r#ref,
        })
    }

    /// Says what the result is, or what is wrong.
    ///
    /// # Errors
    /// When the other side does not take it.
    pub async fn give(&self, said: Result<WireResult, rpc::Status>) -> Result<(), Status> {
        let request = match said {
            Ok(result) => ReturnRequest { result: Some(result), error: None },
            Err(error) => ReturnRequest { result: None, error: Some(error) },
        };
        self.client.clone().r#return(request).await.map(drop)
    }

    /// Sends the warnings there were.
    ///
    /// # Errors
    /// When nobody listens any more.
    pub async fn send_warnings(&self) -> Result<(), Status> {
        let warnings = {
            let mut warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *warnings)
        };
        if !self.can.contains("gateway.warnings") {
            return Ok(());
        }
        for warning in warnings {
            self.client.clone().warn(warning).await?;
        }
        Ok(())
    }

    fn name(&self, from: &BridgeRef) -> Result<String, BridgeError> {
        let refs = self.refs.lock().unwrap_or_else(PoisonError::into_inner);
        let name = usize::try_from(from.0).ok().and_then(|at| refs.get(at).cloned());
        name.ok_or_else(|| BridgeError::new(BridgeErrorKind::NotFound, "no such result"))
    }

    async fn read(
        &self,
        from: &BridgeRef,
        path: &str,
        range: Option<FileRange>,
    ) -> Result<Option<Bytes>, BridgeError> {
        let file_path = path.to_owned();
        let request = ReadFileRequest { r#ref: self.name(from)?, file_path, range, mount_index: 0 };
        match self.client.clone().read_file(request).await {
            Ok(read) => Ok(Some(read.into_inner().data)),
            Err(status) if is_missing(&status) => Ok(None),
            Err(status) => Err(bridge_error(status)),
        }
    }

    async fn metadata(
        &self,
        request: ResolveSourceMetaRequest,
    ) -> Result<ResolveSourceMetaResponse, BridgeError> {
        if !self.can.contains("source.metaresolver") {
            let source = request.source.map(|source| source.identifier).unwrap_or_default();
            return Err(BridgeError::unsupported(format!("asking this daemon about {source}")));
        }
        let found = self.client.clone().resolve_source_meta(request).await;
        found.map(tonic::Response::into_inner).map_err(bridge_error)
    }
}

#[async_trait]
impl Bridge for RemoteBridge {
    async fn resolve_image(
        &self,
        image: &ImageReference,
        platform: &Platform,
        mode: ResolveMode,
    ) -> Result<ResolvedImage, BridgeError> {
        let log_name = format!("[internal] load metadata for {image}");
        let resolve_mode = match mode {
            ResolveMode::Default => "default",
            ResolveMode::Pull => "pull",
            ResolveMode::Local => "local",
        }
        .to_owned();
        let platform = Some(pb::Platform::from(platform));
        let asked = image.to_string();
        let (called, digest, config) = if self.can.contains("source.metaresolver") {
            let identifier = format!("docker-image://{asked}");
            let source = Some(pb::SourceOp { identifier, ..pb::SourceOp::default() });
            let found = self.metadata(ResolveSourceMetaRequest {
                source,
                platform,
                log_name,
                resolve_mode,
                image: Some(ResolveSourceImageRequest::default()),
                ..ResolveSourceMetaRequest::default()
            });
            let found = found.await?;
            let identifier = found.source.map(|source| source.identifier).unwrap_or_default();
            let called = match identifier.strip_prefix("docker-image://") {
                None if !identifier.is_empty() => {
                    let asked = format!("docker-image://{asked}");
                    return Err(BridgeError::not_an_image(asked, identifier));
                }
                called => called.unwrap_or_default().to_owned(),
            };
            let image = found.image.ok_or_else(|| {
                BridgeError::new(BridgeErrorKind::Other, format!("{identifier} is no image"))
            })?;
            (called, image.digest, image.config)
        } else {
            let request = ResolveImageConfigRequest {
                r#ref: asked.clone(),
                platform,
                resolve_mode,
                log_name,
                ..ResolveImageConfigRequest::default()
            };
            let found = self.client.clone().resolve_image_config(request).await;
            let found = found.map_err(bridge_error)?.into_inner();
            (found.r#ref, found.digest, found.config)
        };
        // The same name in another form is the same name.
        let reference = match called.parse::<ImageReference>() {
            _ if called.is_empty() => None,
            Ok(other) => Some(other).filter(|other| !same(other, image)),
            Err(error) => {
                return Err(BridgeError::new(BridgeErrorKind::Other, format!("{called}: {error}")));
            }
        };
        Ok(ResolvedImage { reference, digest: parse_digest(&digest)?, config })
    }

    async fn resolve_layout(
        &self,
        image: &LayoutImage,
        platform: &Platform,
    ) -> Result<ResolvedImage, BridgeError> {
        let found = self.metadata(ResolveSourceMetaRequest {
            source: Some(image.source()),
            platform: Some(pb::Platform::from(platform)),
            log_name: format!("[internal] load metadata for {}", image.reference),
            ..ResolveSourceMetaRequest::default()
        });
        let found = found.await?.image.ok_or_else(|| {
            let message = format!("{} is no image", image.reference);
            BridgeError::new(BridgeErrorKind::Other, message)
        })?;
        let digest = parse_digest(&found.digest)?;
        Ok(ResolvedImage { reference: None, digest, config: found.config })
    }

    async fn resolve_source(
        &self,
        source: &pb::SourceOp,
        shown_as: &str,
    ) -> Result<SourceMetadata, BridgeError> {
        let found = self.metadata(ResolveSourceMetaRequest {
            source: Some(source.clone()),
            log_name: shown_as.to_owned(),
            git: Some(ResolveSourceGitRequest { return_object: true }),
            ..ResolveSourceMetaRequest::default()
        });
        let found = found.await?;
        Ok(SourceMetadata {
            commit: found.git.map(|git| git.commit_object).filter(|object| !object.is_empty()),
            last_modified: found.http.and_then(|http| Some(http.last_modified?.seconds)),
        })
    }

    async fn solve(&self, definition: Definition) -> Result<BridgeRef, BridgeError> {
        let name = self.put(&definition, &[]).await.map_err(bridge_error)?;
        let mut refs = self.refs.lock().unwrap_or_else(PoisonError::into_inner);
        refs.push(name);
        Ok(BridgeRef(refs.len() as u64 - 1))
    }

    async fn read_file(&self, from: &BridgeRef, path: &str) -> Result<Option<Bytes>, BridgeError> {
        self.read(from, path, None).await
    }

    async fn read_start(
        &self,
        from: &BridgeRef,
        path: &str,
        length: usize,
    ) -> Result<Option<Bytes>, BridgeError> {
        let length = i64::try_from(length).unwrap_or(i64::MAX);
        self.read(from, path, Some(FileRange { offset: 0, length })).await
    }

    async fn inputs(&self) -> Result<BTreeMap<String, Definition>, BridgeError> {
        if !self.can.contains("frontend.inputs") {
            return Ok(BTreeMap::new());
        }
        let found = self.client.clone().inputs(InputsRequest {}).await.map_err(bridge_error)?;
        let mut inputs = BTreeMap::new();
        for (name, definition) in found.into_inner().definitions {
            let definition = Definition::from_pb(definition).map_err(|error| {
                BridgeError::new(BridgeErrorKind::Other, format!("the input {name:?}: {error}"))
            })?;
            inputs.insert(name, definition);
        }
        Ok(inputs)
    }

    async fn run_frontend(&self, image: FrontendImage) -> Result<FrontendResult, BridgeError> {
        let inputs = image.inputs.iter();
        let request = SolveRequest {
            frontend: "gateway.v0".into(),
            frontend_opt: image.attrs,
            frontend_inputs: inputs.map(|(name, graph)| (name.clone(), graph.to_pb())).collect(),
            allow_result_return: true,
            allow_result_array_ref: true,
            ..SolveRequest::default()
        };
        let response = self.client.clone().solve(request).await.map_err(bridge_error)?;
        let result = response.into_inner().result.unwrap_or_default();
        answer::read(result).map_err(bridge_error)
    }

    fn session_id(&self) -> Option<&str> {
        self.session.as_deref()
    }

    fn supports(&self, feature: Feature) -> bool {
        match feature {
            Feature::Merge => self.llb.contains("mergeop"),
            Feature::Sbom => self.can.contains("reference.attestations"),
        }
    }

    fn warn(&self, warning: Diagnostic) {
        let warning = warning.to_warning();
        let bytes = |text: String| Bytes::from(text.into_bytes());
        let request = WarnRequest {
            digest: warning.vertex.map(|vertex| vertex.to_string()).unwrap_or_default(),
            level: warning.level.into(),
            short: bytes(warning.short),
            detail: warning.detail.into_iter().map(bytes).collect(),
            url: warning.url,
            info: warning.source,
            ranges: warning.ranges,
        };
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(request);
    }
}

/// Whether two names mean the same image, pinned or not.
fn same(one: &ImageReference, other: &ImageReference) -> bool {
    let name = |reference: &ImageReference| {
        let text = reference.to_string();
        text.split('@').next().unwrap_or_default().to_owned()
    };
    name(one) == name(other)
}

fn parse_digest(text: &str) -> Result<Digest, BridgeError> {
    text.parse::<Digest>().map_err(|error| {
        BridgeError::new(BridgeErrorKind::Other, format!("the digest {text:?}: {error}"))
    })
}

/// Daemons do not say in their code that a file is missing.
fn is_missing(status: &Status) -> bool {
    let message = status.message();
    status.code() == Code::NotFound
        || message.ends_with("no such file or directory")
        || message.ends_with("file does not exist")
}

fn bridge_error(status: Status) -> BridgeError {
    let kind = match status.code() {
        Code::NotFound => BridgeErrorKind::NotFound,
        Code::PermissionDenied | Code::Unauthenticated => BridgeErrorKind::Unauthorized,
        Code::Cancelled => BridgeErrorKind::Canceled,
        Code::Unimplemented => BridgeErrorKind::Unsupported,
        _ => BridgeErrorKind::Other,
    };
    BridgeError::new(kind, status.message()).with_source(status)
}
