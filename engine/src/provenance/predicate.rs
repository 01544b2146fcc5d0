//! SLSA provenance (predicate types `https://slsa.dev/provenance/v1` and `/v0.2`), with BuildKit's extensions.

use serde_json::{Map, Value, json};
use slipway_frontend::dockerfile::LANGUAGE_VERSION;
use slipway_solver::materials::{ImageMaterial, Materials};
use slipway_spec::purl::{PurlKind, image_purl, with_qualifier};
use slipway_spec::{ImageReference, Platform};

use super::options::{ProvenanceOptions, Slsa};
use super::request::{DigestSet, Local, Parameters, Request, Use, commit_digest, digest_set};

const BUILD_TYPE_1: &str =
    "https://github.com/moby/buildkit/blob/master/docs/attestations/slsa-definitions.md";
const BUILD_TYPE_02: &str = "https://mobyproject.org/buildkit@v1";
const METADATA_02: &str = "https://mobyproject.org/buildkit@v1#metadata";
const HERMETIC_02: &str = "https://mobyproject.org/buildkit@v1#hermetic";

/// The rules by which images are written, as BuildKit numbers them.
const COMPATIBILITY_VERSION: u32 = 30;

/// Arguments that tell of the repository that the context is from.
const VCS: &str = "vcs:";

/// What is told of one result.
#[derive(Debug)]
pub(crate) struct Facts<'a> {
    pub(crate) materials: &'a Materials,
    /// What was asked; nothing where the client sent a graph.
    pub(crate) request: Option<&'a Request>,
    /// The id of the build.
    pub(crate) invocation: &'a str,
    /// When it was begun and ended, as text.
    pub(crate) times: (String, String),
    /// The steps, with `llbDefinition` and `digestMapping`, if they are to be told.
    pub(crate) build_config: Option<Map<String, Value>>,
    /// Where the steps were written.
    pub(crate) source: Option<Value>,
    /// The blobs that steps gave, by step and output.
    pub(crate) layers: Map<String, Value>,
    /// What the administrator adds.
    pub(crate) environment: &'a Map<String, Value>,
}

/// Whether all that went into a result is told.
pub(crate) fn is_complete(materials: &Materials) -> bool {
    !materials.incomplete && materials.locals.is_empty()
}

/// Writes the predicate.
pub(crate) fn predicate(facts: Facts<'_>, options: &ProvenanceOptions) -> Value {
    let Facts { materials, times, environment, .. } = facts;
    let mut request = facts.request.cloned().unwrap_or_default();
    let was_asked = !request.request.frontend.is_empty();
    let vcs = take_vcs(&mut request.request);
    add_uses(&mut request.request, materials);
    let mut complete_request = was_asked;
    if !options.full && request.request.minimize() {
        complete_request = false;
    }
    let dependencies = dependencies(materials);
    let complete = is_complete(materials);

    let mut metadata = Map::new();
    if !vcs.is_empty() {
        metadata.insert("vcs".into(), vcs.into());
    }
    if let Some(source) = facts.source {
        metadata.insert("source".into(), source);
    }
    if !facts.layers.is_empty() {
        metadata.insert("layers".into(), facts.layers.into());
    }

    let mut internal = Map::new();
    if let Some(steps) = facts.build_config {
        internal.insert("buildConfig".into(), steps.into());
    }
    let platform = Platform::host().to_string();
    let told = |name: &str, told: &mut Map<String, Value>| {
        told.insert(name.into(), platform.clone().into());
        if request.request.frontend == "dockerfile.v0" {
            told.insert("dockerfileVersion".into(), LANGUAGE_VERSION.into());
        }
        // What is built in is not the administrator's to change.
        for (name, value) in environment {
            told.entry(name.clone()).or_insert_with(|| value.clone());
        }
    };
    let (began, ended) = times;
    let hermetic = complete && !materials.network;
    match options.version {
        Slsa::V1 => {
            told("builderPlatform", &mut internal);
            let mut definition = Map::new();
            definition.insert("buildType".into(), BUILD_TYPE_1.into());
            definition.insert("externalParameters".into(), json!(request));
            definition.insert("internalParameters".into(), internal.into());
            if !dependencies.is_empty() {
                definition.insert("resolvedDependencies".into(), dependencies.into());
            }
            let mut run = Map::new();
            run.insert("invocationId".into(), facts.invocation.into());
            run.insert("startedOn".into(), began.into());
            run.insert("finishedOn".into(), ended.into());
            run.insert("buildkit_metadata".into(), metadata.into());
            if hermetic {
                run.insert("buildkit_hermetic".into(), true.into());
            }
            let completeness =
                json!({ "request": complete_request, "resolvedDependencies": complete });
            run.insert("buildkit_completeness".into(), completeness);
            if options.reproducible {
                run.insert("buildkit_reproducible".into(), true.into());
            }
            json!({
                "buildDefinition": definition,
                "runDetails": { "builder": { "id": options.builder_id }, "metadata": run },
            })
        }
        Slsa::V02 => {
            let mut surroundings = Map::new();
            told("platform", &mut surroundings);
            let Request { config_source: source, request: parameters } = request;
            let mut config = Map::new();
            if !source.uri.is_empty() {
                config.insert("uri".into(), source.uri.into());
            }
            if !source.digest.is_empty() {
                config.insert("digest".into(), json!(source.digest));
            }
            if !source.path.is_empty() {
                config.insert("entryPoint".into(), source.path.into());
            }
            let mut run = Map::new();
            run.insert("buildInvocationID".into(), facts.invocation.into());
            run.insert("buildStartedOn".into(), began.into());
            run.insert("buildFinishedOn".into(), ended.into());
            run.insert(
                "completeness".into(),
                json!({
                    "parameters": complete_request, "environment": true, "materials": complete
                }),
            );
            run.insert("reproducible".into(), options.reproducible.into());
            run.insert(METADATA_02.into(), metadata.into());
            if hermetic {
                run.insert(HERMETIC_02.into(), true.into());
            }
            let mut told = Map::new();
            told.insert("builder".into(), json!({ "id": options.builder_id }));
            told.insert("buildType".into(), BUILD_TYPE_02.into());
            if !dependencies.is_empty() {
                told.insert("materials".into(), dependencies.into());
            }
            let invocation = json!({
                "configSource": config, "parameters": parameters, "environment": surroundings
            });
            told.insert("invocation".into(), invocation);
            if let Some(steps) = internal.remove("buildConfig") {
                told.insert("buildConfig".into(), steps);
            }
            told.insert("metadata".into(), run.into());
            told.into()
        }
    }
}

/// Takes from the arguments what they say of the repository.
fn take_vcs(parameters: &mut Parameters) -> Map<String, Value> {
    let (vcs, rest) = std::mem::take(&mut parameters.args)
        .into_iter()
        .partition::<Vec<_>, _>(|(key, _)| key.starts_with(VCS));
    parameters.args = rest.into_iter().collect();
    let told = vcs.into_iter().filter(|(_, value)| !value.is_empty());
    told.map(|(key, value)| (key[VCS.len()..].to_owned(), value.into())).collect()
}

/// Adds what steps used of the client.
fn add_uses(parameters: &mut Parameters, materials: &Materials) {
    let uses = |all: &[slipway_solver::materials::Use]| {
        all.iter().map(|used| Use { id: used.id.clone(), optional: used.optional }).collect()
    };
    parameters.secrets = uses(&materials.secrets);
    parameters.ssh = uses(&materials.ssh);
    parameters.locals = materials.locals.iter().map(|name| Local { name: name.clone() }).collect();
    parameters.compatibility_version = COMPATIBILITY_VERSION;
}

/// Lists what went into a result, as far as it has digests.
fn dependencies(materials: &Materials) -> Vec<Value> {
    let one = |uri: String, digest: DigestSet| json!({ "uri": uri, "digest": digest });
    let images = unrepeated(&materials.images).into_iter().map(|image| {
        let kind = if image.local { PurlKind::Oci } else { PurlKind::Docker };
        one(purl(kind, &image.reference, image.platform.as_ref()), digest_set(&image.digest))
    });
    let blobs = materials.blobs.iter().map(|blob| {
        let kind = if blob.local { PurlKind::Oci } else { PurlKind::Docker };
        let uri = with_qualifier(&purl(kind, &blob.reference, None), "ref_type", "blob");
        one(uri, digest_set(&blob.digest))
    });
    let git = materials.git.iter().map(|git| one(git.url.clone(), commit_digest(&git.commit)));
    let http = materials.http.iter().map(|http| one(http.url.clone(), digest_set(&http.digest)));
    images.chain(blobs).chain(git).chain(http).collect()
}

fn purl(kind: PurlKind, reference: &str, platform: Option<&Platform>) -> String {
    match reference.parse::<ImageReference>() {
        Ok(reference) => image_purl(kind, &reference, platform),
        // What was found by this name has one; nothing else comes here.
        Err(_) => reference.to_owned(),
    }
}

/// Leaves out images by digest that are there by a tag as well.
fn unrepeated(images: &[ImageMaterial]) -> Vec<&ImageMaterial> {
    let name = |image: &ImageMaterial| {
        let reference: ImageReference = image.reference.parse().ok()?;
        let tag = reference.tag().unwrap_or("latest").to_owned();
        Some((reference.digest().is_some(), format!("{}:{tag}", reference.repository())))
    };
    let tagged: Vec<String> = images
        .iter()
        .filter_map(name)
        .filter_map(|(is_pinned, name)| (!is_pinned).then_some(name))
        .collect();
    let repeated = |image: &&ImageMaterial| {
        name(image).is_some_and(|(is_pinned, name)| is_pinned && tagged.contains(&name))
    };
    images.iter().filter(|image| !repeated(image)).collect()
}

#[cfg(test)]
mod tests {
    use slipway_solver::materials::{GitMaterial, HttpMaterial};
    use slipway_spec::Digest;

    use super::*;

    fn materials() -> Materials {
        let digest = Digest::of(b"image");
        let image = |reference: String| ImageMaterial {
            reference,
            platform: Some("linux/amd64".parse().unwrap()),
            digest: digest.clone(),
            local: false,
        };
        let secret = slipway_solver::materials::Use { id: "token".into(), optional: true };
        Materials {
            images: vec![
                image("docker.io/library/alpine:latest".into()),
                image(format!("docker.io/library/alpine@{digest}")),
            ],
            git: vec![GitMaterial { url: "https://h/x.git#main".into(), commit: "c".repeat(40) }],
            http: vec![HttpMaterial { url: "https://h/f".into(), digest: Digest::of(b"f") }],
            secrets: vec![secret],
            ..Materials::default()
        }
    }

    fn request() -> Request {
        let mut request = Request::default();
        request.request.frontend = "dockerfile.v0".into();
        let args =
            [("build-arg:A", "b"), ("target", "t"), ("vcs:revision", "r"), ("vcs:source", "")];
        request.request.args =
            args.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        request.config_source.uri = "https://h/x.git#main".into();
        request.config_source.path = "Dockerfile".into();
        request
    }

    fn told(materials: &Materials, options: &ProvenanceOptions) -> Value {
        let environment = Map::from_iter([
            ("runner".to_owned(), json!("ci")),
            ("builderPlatform".to_owned(), json!("mine")),
        ]);
        let request = request();
        let facts = Facts {
            materials,
            request: Some(&request),
            invocation: "id",
            times: ("began".into(), "ended".into()),
            build_config: options.full.then(Map::new),
            source: None,
            layers: Map::new(),
            environment: &environment,
        };
        predicate(facts, options)
    }

    #[test]
    fn the_first_version_tells_all() {
        let told = told(&materials(), &ProvenanceOptions::default());
        let hex = |bytes: &[u8]| Digest::of(bytes).to_string().replace("sha256:", "");
        assert_eq!(
            told,
            json!({
                "buildDefinition": {
                    "buildType": BUILD_TYPE_1,
                    "externalParameters": {
                        "configSource": { "uri": "https://h/x.git#main", "path": "Dockerfile" },
                        "request": {
                            "frontend": "dockerfile.v0",
                            "args": { "build-arg:A": "b", "target": "t" },
                            "secrets": [{ "id": "token", "optional": true }],
                            "compatibilityVersion": 30,
                        },
                    },
                    "internalParameters": {
                        "buildConfig": {},
                        "builderPlatform": Platform::host().to_string(),
                        "dockerfileVersion": LANGUAGE_VERSION,
                        "runner": "ci",
                    },
                    "resolvedDependencies": [
                        {
                            "uri": "pkg:docker/alpine@latest?platform=linux%2Famd64",
                            "digest": { "sha256": hex(b"image") },
                        },
                        { "uri": "https://h/x.git#main", "digest": { "sha1": "c".repeat(40) } },
                        { "uri": "https://h/f", "digest": { "sha256": hex(b"f") } },
                    ],
                },
                "runDetails": {
                    "builder": { "id": "" },
                    "metadata": {
                        "invocationId": "id",
                        "startedOn": "began",
                        "finishedOn": "ended",
                        "buildkit_metadata": { "vcs": { "revision": "r" } },
                        "buildkit_hermetic": true,
                        "buildkit_completeness": { "request": true, "resolvedDependencies": true },
                    },
                },
            })
        );
    }

    #[test]
    fn the_least_says_so_in_either_version() {
        let min = ProvenanceOptions { full: false, ..ProvenanceOptions::default() };
        let folder = Materials { locals: vec!["context".into()], network: true, ..materials() };
        let first = told(&folder, &min);
        let request = &first["buildDefinition"]["externalParameters"]["request"];
        assert_eq!(request["args"], json!({ "target": "t" }));
        assert_eq!(request["locals"], json!([{ "name": "context" }]));
        assert_eq!(request.get("secrets"), None);
        let run = &first["runDetails"]["metadata"];
        assert_eq!(
            run["buildkit_completeness"],
            json!({ "request": false, "resolvedDependencies": false })
        );
        assert_eq!(run.get("buildkit_hermetic"), None);

        let old = ProvenanceOptions { version: Slsa::V02, builder_id: "b".into(), ..min };
        let old = told(&folder, &old);
        assert_eq!(old["builder"], json!({ "id": "b" }));
        assert_eq!(
            old["invocation"]["configSource"],
            json!({ "uri": "https://h/x.git#main", "entryPoint": "Dockerfile" })
        );
        assert_eq!(old["invocation"]["parameters"], *request);
        assert_eq!(old["invocation"]["environment"]["platform"], Platform::host().to_string());
        assert_eq!(
            old["metadata"]["completeness"],
            json!({ "parameters": false, "environment": true, "materials": false })
        );
        assert_eq!(old["metadata"]["buildInvocationID"], "id");
        assert_eq!(old["metadata"][METADATA_02], json!({ "vcs": { "revision": "r" } }));
    }
}
