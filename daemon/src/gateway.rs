//! What a frontend builds with: `LLBBridge`, for one build.
//!
//! A frontend that runs in the client reaches it over the daemon's socket; the calls of a build carry its id (see
//! [`service`]).

mod container;
mod convert;
pub mod frontends;
mod process;
pub mod service;
pub(crate) mod sources;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use prost::Message as _;
use serde_json::json;
use slipway_engine::attest::{self, Sbom};
use slipway_engine::cache::CacheEntry;
use slipway_engine::frontend::FrontendResult;
use slipway_engine::provenance::{Origin, Scope};
use slipway_engine::solver::graph::Edge;
use slipway_engine::solver::policy::Policy;
use slipway_engine::store::blocking;
use slipway_engine::store::snapshot::Snapshot;
use slipway_engine::store::tree::Entry;
use slipway_engine::store::view::View;
use slipway_engine::{Build, exporter};
use slipway_spec::attestation::Attestation;
use slipway_spec::llb::{Definition, pb};
use slipway_spec::wire::fsutil::Stat;
use slipway_spec::wire::gateway::{
    Attestation as WireAttestation, Attestations, FileRange, Ref, RefMap, Result as WireResult,
    SolveRequest, SolveResponse, result,
};
use slipway_spec::{Digest, ImageConfig, Platform};
use tokio::sync::watch;
use tonic::Status;

use crate::failure::{build_status, solve_status};
use crate::record::{Announced, Record};
use container::Containers;
use convert::{config_key, stat};
use frontends::FrontendImages;

/// No more than this of a file is read at once, in bytes.
const MAX_FILE: u64 = 16 << 20;

/// What a frontend returned, or why it did not.
type Returned = Option<Result<Outcome, Status>>;

/// One build as its frontend sees it.
#[derive(Debug)]
pub struct Gateway {
    build: Build,
    record: Arc<Record>,
    inputs: BTreeMap<String, pb::Definition>,
    refs: Mutex<HashMap<String, Reference>>,
    returned: watch::Sender<Returned>,
    /// Runs frontends that are images, to do this one's work.
    frontends: FrontendImages,
    /// How many frontends wait for this one.
    depth: usize,
    /// What was asked for, and what came of it.
    scope: Arc<Scope>,
    containers: Containers,
}

/// A result that a frontend may speak of; without an edge it is the empty file system.
#[derive(Clone, Debug, Default)]
pub struct Reference {
    pub(crate) edge: Option<Edge>,
    /// The graph that it was made of.
    definition: Option<pb::Definition>,
}

impl Reference {
    /// Returns the graph that it was made of.
    ///
    /// # Errors
    /// When the graph makes no sense.
    pub(crate) fn definition(&self) -> Result<Option<Definition>, Status> {
        let graph = self.edge.as_ref().and(self.definition.clone());
        let graph = graph.map(Definition::from_pb).transpose();
        graph.map_err(|error| Status::invalid_argument(error.to_string()))
    }
}

/// What is to be exported.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The results in order.
    pub images: Vec<OutcomeImage>,
    /// Whether the result is to be an index even if it has one image.
    pub multi_platform: bool,
    /// What the frontend says of the result.
    pub metadata: BTreeMap<String, Bytes>,
}

/// One platform's result.
#[derive(Clone, Debug)]
pub struct OutcomeImage {
    /// What the frontend knows it by: its platform, as a rule.
    pub id: String,
    /// The platform.
    pub platform: Platform,
    /// The file system.
    pub made: Reference,
    /// The config, without layers.
    pub config: ImageConfig,
    /// How many entries of its history are the base image's.
    pub base_history: usize,
    /// The time of what was made, in seconds since 1970, where the frontend sets it.
    pub epoch: Option<i64>,
    /// What is to be said of it.
    pub attestations: Vec<Attestation<Reference>>,
}

impl Gateway {
    /// Offers a build to a frontend; `depth` is how many frontends wait for it, and `scope` what it was asked.
    pub fn new(
        build: Build,
        record: Arc<Record>,
        inputs: BTreeMap<String, pb::Definition>,
        frontends: FrontendImages,
        depth: usize,
        scope: Arc<Scope>,
    ) -> Self {
        let returned = watch::Sender::new(None);
        Self {
            build,
            record,
            inputs,
            refs: Mutex::default(),
            returned,
            frontends,
            depth,
            scope,
            containers: Containers::default(),
        }
    }

    /// Returns what the frontend has said of the result so far.
    fn said(&self) -> Returned {
        self.returned.borrow().clone()
    }

    /// Waits until it has said something.
    async fn wait_for_word(&self) {
        drop(self.returned.subscribe().wait_for(Option::is_some).await);
    }

    /// Finds an operation in the graphs that results were made of.
    fn operation(&self, digest: &Digest) -> Option<pb::Op> {
        let refs = self.refs.lock().unwrap_or_else(PoisonError::into_inner);
        let mut known = refs.values().filter_map(|reference| reference.definition.as_ref());
        let bytes =
            known.find_map(|graph| graph.def.iter().find(|op| Digest::of(op) == *digest))?;
        pb::Op::decode(bytes.as_slice()).ok()
    }

    /// Waits until the frontend has said what the result is.
    ///
    /// # Errors
    /// What the frontend says went wrong.
    pub async fn returned(&self) -> Result<Outcome, Status> {
        let mut returned = self.returned.subscribe();
        let outcome = returned.wait_for(Option::is_some).await;
        match outcome.ok().and_then(|outcome| outcome.clone()) {
            Some(outcome) => outcome,
            None => Err(Status::internal("the frontend is gone")),
        }
    }

    fn put(&self, reference: Reference) -> String {
        let id = slipway_engine::id::new_id();
        let mut refs = self.refs.lock().unwrap_or_else(PoisonError::into_inner);
        refs.insert(id.clone(), reference);
        id
    }

    fn get(&self, id: &str) -> Result<Reference, Status> {
        if id.is_empty() {
            return Ok(Reference::default());
        }
        let refs = self.refs.lock().unwrap_or_else(PoisonError::into_inner);
        refs.get(id).cloned().ok_or_else(|| Status::not_found(format!("no such ref: {id}")))
    }

    /// Loads a graph; a graph without operations is the empty file system.
    async fn load(
        &self,
        message: pb::Definition,
        policies: &[Policy],
        scope: &Scope,
    ) -> Result<Option<Edge>, Status> {
        if message.def.is_empty() {
            return Ok(None);
        }
        let definition = Definition::from_pb(message)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let edge = self.build.load_under(&definition, policies).await;
        let edge = edge.map_err(|error| solve_status(&error))?;
        scope.add_result(&edge);
        self.announce(&edge);
        Ok(Some(edge))
    }

    /// Tells clients of all that a result needs.
    fn announce(&self, edge: &Edge) {
        let mut todo = vec![edge.vertex.clone()];
        let mut seen = std::collections::HashSet::new();
        let mut found = vec![];
        while let Some(vertex) = todo.pop() {
            if !seen.insert(vertex.digest.clone()) {
                continue;
            }
            found.push(Announced {
                digest: vertex.digest.clone(),
                name: vertex.name.clone(),
                inputs: vertex.inputs().map(|edge| edge.vertex.digest.clone()).collect(),
            });
            todo.extend(vertex.inputs().map(|edge| edge.vertex.clone()));
        }
        // What is needed first is shown first.
        found.reverse();
        self.record.announce(found);
    }

    /// Answers `Solve`.
    ///
    /// # Errors
    /// When the graph or the frontend fails.
    pub async fn solve(&self, request: SolveRequest) -> Result<SolveResponse, Status> {
        let arrays = request.allow_result_array_ref;
        let policies = crate::policy::read(&request.source_policies)?;
        let caches = request.cache_imports.into_iter();
        let caches = caches.map(|entry| CacheEntry { kind: entry.r#type, attrs: entry.attrs });
        self.build.import_caches(caches).await;
        let (result, edges) = match (request.definition, request.frontend.as_str()) {
            (Some(_), frontend) if !frontend.is_empty() => {
                return Err(Status::invalid_argument(
                    "cannot solve with both Definition and Frontend specified",
                ));
            }
            (Some(definition), _) => {
                let edge = self.load(definition.clone(), &policies, &self.scope).await?;
                let made = Reference { edge: edge.clone(), definition: Some(definition) };
                let reference = self.reference(made, arrays);
                let result = WireResult { result: Some(reference), ..WireResult::default() };
                (result, edge.into_iter().collect())
            }
            (None, "") => (WireResult::default(), vec![]),
            (None, "dockerfile.v0") => {
                let found = self.dockerfile(request.frontend_opt, &request.frontend_inputs);
                let (found, scope) = found.await?;
                self.publish(found, arrays, &scope).await?
            }
            (None, "gateway.v0") => {
                let found = self.run_image(request.frontend_opt, &request.frontend_inputs);
                let (found, scope) = found.await?;
                self.publish(found, arrays, &scope).await?
            }
            (None, other) => {
                return Err(Status::unimplemented(format!("invalid frontend: {other}")));
            }
        };
        if request.evaluate {
            for edge in &edges {
                self.build.solve(edge).await.map_err(|error| self.failed(&error))?;
            }
        }
        edges.iter().for_each(|edge| self.scope.publish(edge));
        let single = match &result.result {
            Some(result::Result::Ref(reference)) => reference.id.clone(),
            Some(result::Result::RefDeprecated(id)) => id.clone(),
            _ => String::new(),
        };
        let reference = if request.allow_result_return { String::new() } else { single };
        Ok(SolveResponse { r#ref: reference, result: Some(result) })
    }

    /// Runs the frontend that is built in. Returns also where its results belong.
    ///
    /// # Errors
    /// When something is wrong with the Dockerfile.
    pub async fn dockerfile(
        &self,
        attrs: BTreeMap<String, String>,
        inputs: &BTreeMap<String, pb::Definition>,
    ) -> Result<(FrontendResult, Arc<Scope>), Status> {
        let read = |(name, graph): (&String, &pb::Definition)| {
            if graph.def.is_empty() {
                return Err(Status::unknown("invalid nil input definition to definition op"));
            }
            let graph = Definition::from_pb(graph.clone()).map_err(|error| {
                Status::invalid_argument(format!("the input {name:?}: {error}"))
            })?;
            Ok((name.clone(), graph))
        };
        let inputs = inputs.iter().map(read).collect::<Result<_, _>>()?;
        let found = self.build.dockerfile(attrs, inputs, self.depth, &self.scope).await;
        found.map_err(|error| build_status(&error))
    }

    /// Makes what the built-in frontend found out into a result that clients can speak of.
    async fn publish(
        &self,
        found: FrontendResult,
        arrays: bool,
        scope: &Scope,
    ) -> Result<(WireResult, Vec<Edge>), Status> {
        let mut metadata: BTreeMap<String, Bytes> =
            found.metadata.into_iter().map(|(key, value)| (key, value.into())).collect();
        let mut refs = BTreeMap::new();
        let mut attestations = BTreeMap::new();
        let mut platforms = vec![];
        let mut edges = vec![];
        let multi_platform = found.multi_platform || found.images.len() > 1;
        for image in found.images {
            let made = self.load_graph(image.definition.as_ref(), scope).await?;
            let id = image.platform.full_name();
            for said in image.attestations {
                let (graph, said) = said.split();
                let reference = self.stored(self.load_graph(graph.as_ref(), scope).await?);
                let all: &mut Attestations = attestations.entry(id.clone()).or_default();
                all.attestation.push(said.at(reference).into());
            }
            let suffix = multi_platform.then_some(id.as_str());
            metadata
                .insert(config_key("containerimage.config", suffix), json_bytes(&image.config)?);
            if let Some(base) = &image.base_config {
                let key = config_key("containerimage.base.config", suffix);
                metadata.insert(key, json_bytes(base)?);
            }
            if let Some(epoch) = image.epoch {
                let key = config_key("source.date.epoch", suffix);
                metadata.insert(key, epoch.to_string().into_bytes().into());
            }
            platforms.push(json!({ "ID": id, "Platform": image.platform }));
            edges.extend(made.edge.clone());
            refs.insert(id, self.stored(made));
        }
        if !platforms.is_empty() {
            metadata
                .insert("refs.platforms".into(), json_bytes(&json!({ "Platforms": platforms }))?);
        }
        let result = match (refs.len(), multi_platform) {
            (0, _) => None,
            (1, false) => refs.into_values().next().map(|reference| {
                if arrays {
                    result::Result::Ref(reference)
                } else {
                    result::Result::RefDeprecated(reference.id)
                }
            }),
            _ if arrays => Some(result::Result::Refs(RefMap { refs })),
            _ => {
                let refs = refs.into_iter().map(|(id, reference)| (id, reference.id)).collect();
                let refs = slipway_spec::wire::gateway::RefMapDeprecated { refs };
                Some(result::Result::RefsDeprecated(refs))
            }
        };
        Ok((WireResult { result, metadata, attestations }, edges))
    }

    /// Loads a graph that a frontend made; none is the empty file system.
    async fn load_graph(
        &self,
        definition: Option<&Definition>,
        scope: &Scope,
    ) -> Result<Reference, Status> {
        let definition = definition.map(Definition::to_pb);
        let edge = match definition.clone() {
            Some(definition) => self.load(definition, &[], scope).await?,
            None => None,
        };
        Ok(Reference { edge, definition })
    }

    fn stored(&self, made: Reference) -> Ref {
        // Without an id it is the empty file system.
        let def = made.definition.clone();
        let id = if made.edge.is_some() { self.put(made) } else { String::new() };
        Ref { id, def }
    }

    fn reference(&self, made: Reference, arrays: bool) -> result::Result {
        let reference = self.stored(made);
        if arrays {
            result::Result::Ref(reference)
        } else {
            result::Result::RefDeprecated(reference.id)
        }
    }

    /// Takes what the frontend says the result is.
    fn take(&self, outcome: Result<WireResult, Status>) -> Result<(), Status> {
        // What makes no sense ends the build, and is the caller's mistake as well.
        let (outcome, refused) = match outcome.map(|result| self.outcome(result)) {
            Ok(Ok(outcome)) => (Ok(outcome), None),
            Ok(Err(mistake)) => (Err(mistake.clone()), Some(mistake)),
            Err(failure) => (Err(failure), None),
        };
        let first = self.returned.send_if_modified(|returned| {
            let first = returned.is_none();
            if first {
                *returned = Some(outcome);
            }
            first
        });
        match refused {
            _ if !first => Err(Status::already_exists("gateway result is already set")),
            Some(mistake) => Err(mistake),
            None => Ok(()),
        }
    }

    /// Reads a result that refers to what is known here.
    ///
    /// # Errors
    /// When it refers to something else, or its metadata make no sense.
    pub fn outcome(&self, result: WireResult) -> Result<Outcome, Status> {
        let metadata = result.metadata;
        let (ids, multi_platform): (BTreeMap<String, String>, bool) = match result.result {
            None => return Ok(Outcome { metadata, ..Outcome::default() }),
            Some(result::Result::Ref(reference)) => (single(reference.id), false),
            Some(result::Result::RefDeprecated(id)) => (single(id), false),
            Some(result::Result::Refs(refs)) => {
                (refs.refs.into_iter().map(|(key, reference)| (key, reference.id)).collect(), true)
            }
            Some(result::Result::RefsDeprecated(refs)) => (refs.refs, true),
        };
        let platforms = convert::platforms(metadata.get("refs.platforms"))?;
        let mut attestations = self.said_of(result.attestations)?;
        if !multi_platform {
            let made = self.get(ids.values().next().map_or("", String::as_str))?;
            let (id, platform) = platforms.into_iter().next().unzip();
            let mut image = OutcomeImage::new(platform, made, &metadata, None)?;
            if let Some(id) = id {
                image.id = id;
            }
            image.attestations = attestations.remove(&image.id).unwrap_or_default();
            return Ok(Outcome { images: vec![image], multi_platform, metadata });
        }
        let mut images = vec![];
        if platforms.len() != ids.len() {
            return Err(Status::invalid_argument(format!(
                "a result for {} platforms needs refs.platforms to name as many, not {}",
                ids.len(),
                platforms.len()
            )));
        }
        for (id, platform) in platforms {
            let reference = ids.get(&id).ok_or_else(|| {
                Status::invalid_argument(format!("the result has nothing for platform {id}"))
            })?;
            let made = self.get(reference)?;
            let mut image = OutcomeImage::new(Some(platform), made, &metadata, Some(&id))?;
            image.attestations = attestations.remove(&id).unwrap_or_default();
            images.push(image);
        }
        Ok(Outcome { images, multi_platform, metadata })
    }

    /// Reads what is to be said of results, by what the frontend knows them by.
    fn said_of(
        &self,
        messages: BTreeMap<String, Attestations>,
    ) -> Result<BTreeMap<String, Vec<Attestation<Reference>>>, Status> {
        let read = |message: WireAttestation| {
            let said = Attestation::try_from(message)
                .map_err(|error| Status::invalid_argument(error.to_string()))?;
            let (reference, said) = said.split();
            Ok(said.at(self.get(&reference.id)?))
        };
        let mut all = BTreeMap::new();
        for (id, messages) in messages {
            let said: Result<Vec<_>, Status> = messages.attestation.into_iter().map(read).collect();
            all.insert(id, said?);
        }
        Ok(all)
    }

    /// Makes what the built-in frontend found out into a result, which belongs into `scope`.
    ///
    /// # Errors
    /// When one of its graphs is not well formed.
    pub async fn outcome_of(
        &self,
        found: FrontendResult,
        scope: &Scope,
    ) -> Result<Outcome, Status> {
        let multi_platform = found.multi_platform || found.images.len() > 1;
        let mut images = vec![];
        for image in found.images {
            let mut attestations = vec![];
            for said in image.attestations {
                let (graph, said) = said.split();
                attestations.push(said.at(self.load_graph(graph.as_ref(), scope).await?));
            }
            images.push(OutcomeImage {
                id: image.platform.full_name(),
                platform: image.platform,
                made: self.load_graph(image.definition.as_ref(), scope).await?,
                config: image.config,
                base_history: image.base_history_len,
                epoch: image.epoch,
                attestations,
            });
        }
        let metadata = found.metadata.into_iter().map(|(key, value)| (key, value.into())).collect();
        Ok(Outcome { images, multi_platform, metadata })
    }

    /// Makes a graph that a client sent into a result without a config.
    ///
    /// # Errors
    /// When the graph is not well formed.
    pub async fn outcome_of_graph(&self, definition: pb::Definition) -> Result<Outcome, Status> {
        let edge = self.load(definition.clone(), &[], &self.scope).await?;
        let made = Reference { edge, definition: Some(definition) };
        let image = OutcomeImage::new(None, made, &BTreeMap::new(), None)?;
        Ok(Outcome { images: vec![image], ..Outcome::default() })
    }

    /// Solves what is to be exported, all platforms at once.
    ///
    /// # Errors
    /// The first step that fails.
    pub async fn solve_outcome(
        &self,
        outcome: &Outcome,
        used: bool,
    ) -> Result<Vec<exporter::PlatformResult>, Status> {
        let one = |image: &OutcomeImage| {
            let image = image.clone();
            async move {
                let snapshot = async {
                    let solved = match &image.made.edge {
                        Some(edge) if used => self.build.obtain(edge).await,
                        Some(edge) => self.build.solve(edge).await,
                        None => Ok(Snapshot::default()),
                    };
                    solved.map_err(|error| solve_status(&error))
                };
                let said = image.attestations.into_iter().map(|said| self.attested(said));
                let (snapshot, attestations) =
                    futures::try_join!(snapshot, futures::future::try_join_all(said))?;
                Ok::<_, Status>(exporter::PlatformResult {
                    platform: image.platform,
                    snapshot,
                    config: image.config,
                    base_history: image.base_history,
                    epoch: image.epoch,
                    inline_cache: None,
                    attestations,
                })
            }
        };
        futures::future::try_join_all(outcome.images.iter().map(one)).await
    }

    /// Has the file system that something is said in, and hands it to outputs.
    async fn attested(
        &self,
        said: Attestation<Reference>,
    ) -> Result<exporter::Attestation, Status> {
        let snapshot = match &said.from.edge {
            Some(edge) => self.build.obtain(edge).await.map_err(|error| solve_status(&error))?,
            None => Snapshot::default(),
        };
        Ok(attest::to_export(said, snapshot))
    }

    /// Has results scanned that nobody says of what they are made of, and returns what is said of each of them.
    ///
    /// # Errors
    /// When there is no such scanner, or it fails.
    pub(crate) async fn scan(
        &self,
        outcome: &Outcome,
        sbom: &Sbom,
    ) -> Result<Vec<Option<exporter::Attestation>>, Status> {
        let mut said = outcome.images.iter().flat_map(|image| &image.attestations);
        let none = vec![None; outcome.images.len()];
        if said.any(Attestation::is_sbom) {
            return Ok(none);
        }
        let mut graphs = vec![];
        let mut places = vec![];
        for (place, image) in outcome.images.iter().enumerate() {
            // Of nothing there is nothing to say.
            if let Some(definition) = image.made.definition()? {
                graphs.push((image.id.clone(), definition));
                places.push(place);
            }
        }
        let scans = self.build.scan(sbom, &graphs).await.map_err(|error| build_status(&error))?;
        let run = scans.into_iter().map(|scan| async move {
            let (graph, said) = scan.split();
            self.attested(said.at(self.load_graph(graph.as_ref(), &self.scope).await?)).await
        });
        let scanned = futures::future::try_join_all(run).await?;
        let mut found = none;
        for (place, attestation) in places.into_iter().zip(scanned) {
            found[place] = Some(attestation);
        }
        Ok(found)
    }

    /// Returns the results with the graphs that they came out of.
    pub(crate) fn origins(outcome: &Outcome) -> Result<Vec<Origin>, Status> {
        let one = |image: &OutcomeImage| {
            let (platform, edge) = (image.platform.clone(), image.made.edge.clone());
            Ok(Origin { platform, edge, definition: image.made.definition()? })
        };
        outcome.images.iter().map(one).collect()
    }

    async fn evaluate(&self, id: &str) -> Result<(), Status> {
        if let Some(edge) = self.get(id)?.edge {
            self.build.solve(&edge).await.map_err(|error| self.failed(&error))?;
        }
        Ok(())
    }

    async fn read_file(
        &self,
        id: &str,
        path: &str,
        range: Option<FileRange>,
    ) -> Result<Bytes, Status> {
        let missing = || Status::not_found(format!("open {path}: no such file or directory"));
        let edge = self.get(id)?.edge.ok_or_else(missing)?;
        let read = self.build.read_file(&edge, path, MAX_FILE).await;
        let bytes = read.map_err(|error| self.failed(&error))?.ok_or_else(missing)?;
        Ok(read_range(bytes, range))
    }

    async fn view(&self, id: &str) -> Result<View, Status> {
        match self.get(id)?.edge {
            Some(edge) => self.build.view(&edge).await.map_err(|error| self.failed(&error)),
            None => Ok(View::default()),
        }
    }

    async fn stat_file(&self, id: &str, path: &str) -> Result<Stat, Status> {
        stat_view(self.view(id).await?, path).await
    }

    async fn read_dir(&self, id: &str, path: &str, pattern: &str) -> Result<Vec<Stat>, Status> {
        list_view(self.view(id).await?, path, pattern).await
    }
}

/// Takes part of a file.
fn read_range(bytes: Bytes, range: Option<FileRange>) -> Bytes {
    let Some(FileRange { offset, length }) = range else { return bytes };
    let start = usize::try_from(offset).unwrap_or(0).min(bytes.len());
    let length = usize::try_from(length).ok().filter(|length| *length > 0);
    let end = length.map_or(bytes.len(), |length| start.saturating_add(length));
    bytes.slice(start..end.min(bytes.len()))
}

async fn stat_view(view: View, path: &str) -> Result<Stat, Status> {
    let wanted = path.to_owned();
    let found = blocking::run(move || view.resolve(wanted.as_bytes(), false)).await;
    let found = found.map_err(|error| Status::unknown(error.to_string()))?;
    let missing = || Status::not_found(format!("lstat {path}: no such file or directory"));
    let entry = found.entry.ok_or_else(missing)?;
    let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or(path);
    Ok(stat(name.as_bytes(), &entry))
}

async fn list_view(view: View, path: &str, pattern: &str) -> Result<Vec<Stat>, Status> {
    let (wanted, pattern) = (path.to_owned(), pattern.to_owned());
    let listed = blocking::run(move || {
        let found = view.resolve(wanted.as_bytes(), true)?;
        if !found.entry.as_ref().is_some_and(Entry::is_directory) {
            return Ok(None);
        }
        view.children(&found.path).map(Some)
    });
    let listed = listed.await.map_err(|error| Status::unknown(error.to_string()))?;
    let missing = || Status::not_found(format!("open {path}: no such file or directory"));
    let wanted = |name: &[u8]| {
        pattern.is_empty() || slipway_engine::solver::glob_matches(pattern.as_bytes(), name)
    };
    let listed = listed.ok_or_else(missing)?.into_iter();
    Ok(listed.filter(|(name, _)| wanted(name)).map(|(name, entry)| stat(&name, &entry)).collect())
}

fn single(id: String) -> BTreeMap<String, String> {
    BTreeMap::from([(String::new(), id)])
}

fn json_bytes(value: &impl serde::Serialize) -> Result<Bytes, Status> {
    let encoded = serde_json::to_vec(value);
    encoded.map(Bytes::from).map_err(|error| Status::internal(error.to_string()))
}

impl OutcomeImage {
    /// Describes a result. What platform it is for is said by its config where nothing else says so.
    fn new(
        platform: Option<Platform>,
        made: Reference,
        metadata: &BTreeMap<String, Bytes>,
        id: Option<&str>,
    ) -> Result<Self, Status> {
        let key = config_key("containerimage.config", id);
        let given = metadata.get(&key).map(|bytes| convert::config(&key, bytes)).transpose()?;
        let own = given.as_ref().filter(|config| !config.os.is_empty());
        let own = own.map(|config| config.platform().normalized());
        let platform = platform.or_else(|| own.clone()).unwrap_or_else(Platform::host);
        let config = given.unwrap_or_else(|| convert::default_config(&platform));
        // What the base image's config says was made already has its time.
        let base_history =
            config.history.iter().take_while(|entry| entry.created.is_some()).count();
        let epoch = metadata.get(&config_key("source.date.epoch", id)).map(|bytes| {
            let text = String::from_utf8_lossy(bytes);
            text.parse().map_err(|_| {
                Status::invalid_argument(format!(
                    "invalid SOURCE_DATE_EPOCH from frontend: {text:?}"
                ))
            })
        });
        let id = match id {
            Some(id) => id.to_owned(),
            None => own.as_ref().unwrap_or(&platform).full_name(),
        };
        let (epoch, attestations) = (epoch.transpose()?, vec![]);
        Ok(Self { id, platform, made, config, base_history, epoch, attestations })
    }
}
