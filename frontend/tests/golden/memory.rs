//! A bridge over files, images and inputs in memory.

use std::collections::BTreeMap;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;
use slipway_frontend::{
    Bridge, BridgeError, BridgeErrorKind, BridgeRef, Diagnostic, Feature, FrontendImage,
    FrontendRequest, FrontendResult, LayoutImage, ResolveMode, ResolvedImage, SourceMetadata,
};
use slipway_spec::llb::{Definition, State, VertexOptions, marshal, pb};
use slipway_spec::{Digest, ImageReference, Platform};

/// What a download is, whatever its URL.
pub(crate) const DOWNLOAD: &str = "download";

/// It is strict: of a client's folder only paths that were asked for can be read.
#[derive(Default)]
pub(crate) struct Memory {
    files: BTreeMap<String, Bytes>,
    /// Local folders that stand for inputs.
    inputs: BTreeMap<String, String>,
    /// What a policy makes of images.
    policy: BTreeMap<String, String>,
    lacks: Vec<Feature>,
    refs: Mutex<Vec<Definition>>,
    pub(crate) resolved: Mutex<Vec<String>>,
    pub(crate) warnings: Mutex<Vec<Diagnostic>>,
    pub(crate) forwarded: Mutex<Vec<FrontendImage>>,
}

impl Memory {
    /// Lines of `attrs` that begin with `test-` say what the bridge has.
    pub(crate) fn new(files: BTreeMap<String, Bytes>, attrs: &str) -> Self {
        let told = |prefix: &str| {
            let lines = attrs.lines().filter_map(|line| line.split_once('='));
            let lines = lines.filter_map(|(key, value)| Some((key.strip_prefix(prefix)?, value)));
            lines.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
        };
        Self {
            files,
            inputs: told("test-input:"),
            policy: told("test-policy:"),
            lacks: [("test-no-merge=1", Feature::Merge), ("test-no-sbom=1", Feature::Sbom)]
                .into_iter()
                .filter(|(told, _)| attrs.lines().any(|line| line == *told))
                .map(|(_, feature)| feature)
                .collect(),
            ..Self::default()
        }
    }

    fn answer(
        &self,
        asked: String,
        image: &ImageReference,
        platform: &Platform,
    ) -> Result<ResolvedImage, BridgeError> {
        self.resolved.lock().unwrap().push(asked);
        let Some(config) = image_config(image.path(), platform) else {
            return Err(BridgeError::new(BridgeErrorKind::NotFound, format!("{image}: not found")));
        };
        Ok(ResolvedImage {
            reference: None,
            digest: Digest::of(image.path().as_bytes()),
            config: config.to_string().into(),
        })
    }
}

/// Makes a request of `key=value` lines.
pub(crate) fn request(attrs: &str) -> FrontendRequest {
    let attrs = attrs
        .lines()
        .filter(|line| !line.starts_with("test-"))
        .filter_map(|line| line.split_once('='))
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect();
    FrontendRequest { attrs, build_platform: Platform::new("linux", "amd64", None) }
}

fn image_config(path: &str, platform: &Platform) -> Option<serde_json::Value> {
    let layer = serde_json::json!({"type": "layers", "diff_ids": [Digest::of(path.as_bytes())]});
    let history =
        serde_json::json!([{"created": "2020-01-01T00:00:00Z", "created_by": "made by hand"}]);
    let mut config = serde_json::json!({
        "architecture": platform.architecture, "os": platform.os, "created": "2020-01-01T00:00:00Z",
        "rootfs": layer, "history": history, "unknown": "dropped",
        "config": {"Env": ["PATH=/bin", "FROM_BASE=1"], "Cmd": ["sh"], "WorkingDir": "/base", "User": "app"},
    });
    match path {
        "library/base" => {}
        "library/nopath" => config["config"] = serde_json::json!({"Env": ["A=b"]}),
        "library/onbuild" => {
            config["config"]["OnBuild"] =
                serde_json::json!(["COPY --from=tool /t /t", "RUN echo $FROM_BASE", "ENV T=1"]);
        }
        "library/onmount" => {
            config["config"]["OnBuild"] = serde_json::json!([
                "RUN --mount=type=cache,target=/c --mount=from=tool,target=/t --mount=from=dep,target=/d x",
                "COPY --link --from=tool . /x"
            ]);
        }
        "library/badtrigger" => config["config"]["OnBuild"] = serde_json::json!(["RUNN x"]),
        "library/nolayers" => {
            config["rootfs"] = serde_json::json!({"type": "layers", "diff_ids": []});
            config["history"] = serde_json::json!([]);
        }
        "library/tool" => config["config"] = serde_json::Value::Null,
        "library/scanner" => {
            config["config"] = serde_json::json!({
                "Env": ["PATH=/bin", "BUILDKIT_SCAN_MODE=quick", "BARE"],
                "Entrypoint": ["/scan"], "Cmd": ["-v"], "WorkingDir": "work", "User": "nobody",
            });
        }
        "library/nocommand" => config["config"] = serde_json::json!({"Env": ["A=b"]}),
        "library/otherarch" => config["architecture"] = "riscv64".into(),
        _ => return None,
    }
    if let Some(variant) = &platform.variant {
        config["variant"] = variant.as_str().into();
    }
    Some(config)
}

#[async_trait]
impl Bridge for Memory {
    async fn resolve_image(
        &self,
        image: &ImageReference,
        platform: &Platform,
        mode: ResolveMode,
    ) -> Result<ResolvedImage, BridgeError> {
        let mut image = image.clone();
        while let Some(becomes) = self.policy.get(&image.familiar()) {
            let Some(name) = becomes.strip_prefix("docker-image://") else {
                return Err(BridgeError::not_an_image(format!("docker-image://{image}"), becomes));
            };
            image = name.parse().unwrap();
        }
        self.answer(format!("{image} {platform} {mode:?}"), &image, platform)
    }

    async fn resolve_layout(
        &self,
        image: &LayoutImage,
        platform: &Platform,
    ) -> Result<ResolvedImage, BridgeError> {
        let asked = format!("{} {platform} in the layout {}", image.reference, image.store);
        self.answer(asked, &image.reference, platform)
    }

    async fn solve(&self, definition: Definition) -> Result<BridgeRef, BridgeError> {
        let definition = Definition::from_pb(definition.to_pb()).unwrap();
        let mut refs = self.refs.lock().unwrap();
        refs.push(definition);
        Ok(BridgeRef(refs.len() as u64 - 1))
    }

    async fn read_file(&self, from: &BridgeRef, path: &str) -> Result<Option<Bytes>, BridgeError> {
        let definition = self.refs.lock().unwrap()[usize::try_from(from.0).unwrap()].clone();
        let (_, op) = definition.vertices().unwrap().pop().unwrap();
        let Some(pb::op::Op::Source(source)) = op.op else {
            return Ok(self.files.get(path).cloned());
        };
        let mut name = path.to_owned();
        if let Some(folder) = source.identifier.strip_prefix("local://") {
            if !self.inputs.values().any(|input| input == folder) {
                assert_eq!(source.attrs["local.differ"], "none");
                let paths: Vec<String> =
                    serde_json::from_str(&source.attrs["local.followpaths"]).unwrap();
                assert!(paths.iter().any(|asked| asked == path), "{path} was not asked for");
            }
            if folder != "dockerfile" && folder != "context" {
                name = format!("{folder}.{path}");
            }
        } else if source.identifier.starts_with("http") {
            // A download is one file.
            if source.attrs["http.filename"] != path {
                return Ok(None);
            }
            name = DOWNLOAD.into();
        }
        Ok(self.files.get(&name).cloned())
    }

    async fn resolve_source(
        &self,
        source: &pb::SourceOp,
        _shown_as: &str,
    ) -> Result<SourceMetadata, BridgeError> {
        let commit =
            b"tree 1\nauthor A <a@x> 1 +0000\ncommitter B <b@x> 1600000000 -0330\n\nmessage\n";
        let git = source.identifier.starts_with("git://");
        Ok(SourceMetadata {
            commit: git.then(|| Bytes::from_static(commit)),
            last_modified: source.identifier.contains("dated").then_some(1_500_000_000),
        })
    }

    async fn youngest_file(
        &self,
        _from: &BridgeRef,
        _archive: &str,
    ) -> Result<Option<i64>, BridgeError> {
        let download = self.files.get(DOWNLOAD);
        Ok(download.is_some_and(|file| file.starts_with(b"\x1f\x8b")).then_some(1_400_000_000))
    }

    async fn inputs(&self) -> Result<BTreeMap<String, Definition>, BridgeError> {
        let input = |folder: &String| {
            marshal(&State::local(folder, BTreeMap::new(), VertexOptions::default()), None).unwrap()
        };
        Ok(self.inputs.iter().map(|(name, folder)| (name.clone(), input(folder))).collect())
    }

    async fn run_frontend(&self, image: FrontendImage) -> Result<FrontendResult, BridgeError> {
        self.forwarded.lock().unwrap().push(image);
        Ok(FrontendResult::default())
    }

    fn supports(&self, feature: Feature) -> bool {
        !self.lacks.contains(&feature)
    }

    fn warn(&self, warning: Diagnostic) {
        self.warnings.lock().unwrap().push(warning);
    }
}
