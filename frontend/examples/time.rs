//! Times how long a Dockerfile takes to become graphs for six platforms: `time DOCKERFILE [ROUNDS]`.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a tool for developers")]

use std::collections::BTreeMap;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use slipway_frontend::{
    Bridge, BridgeError, BridgeErrorKind, BridgeRef, Diagnostic, FrontendRequest, ResolveMode,
    ResolvedImage, dockerfile,
};
use slipway_spec::llb::Definition;
use slipway_spec::{ImageReference, Platform};

const PLATFORMS: &str =
    "linux/amd64,linux/arm64,linux/arm/v7,linux/riscv64,linux/s390x,linux/ppc64le";

/// Has the Dockerfile and no image.
struct OneFile(Bytes);

#[async_trait]
impl Bridge for OneFile {
    async fn resolve_image(
        &self,
        image: &ImageReference,
        _: &Platform,
        _: ResolveMode,
    ) -> Result<ResolvedImage, BridgeError> {
        Err(BridgeError::new(
            BridgeErrorKind::NotFound,
            format!("{image}: there are no images here"),
        ))
    }

    async fn solve(&self, _: Definition) -> Result<BridgeRef, BridgeError> {
        Ok(BridgeRef(0))
    }

    async fn read_file(&self, _: &BridgeRef, path: &str) -> Result<Option<Bytes>, BridgeError> {
        Ok((path == "Dockerfile").then(|| self.0.clone()))
    }

    fn supports(&self, _: slipway_frontend::Feature) -> bool {
        true
    }

    fn warn(&self, _: Diagnostic) {}
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().expect("usage: time DOCKERFILE [ROUNDS]");
    let rounds = arguments.next().map_or(5, |rounds| rounds.parse().unwrap());
    let bridge = OneFile(std::fs::read(path).unwrap().into());
    let attrs = BTreeMap::from([("platform".to_owned(), PLATFORMS.to_owned())]);
    let request = FrontendRequest { attrs, build_platform: "linux/amd64".parse().unwrap() };
    for _ in 0..rounds {
        let begun = Instant::now();
        let result = dockerfile::build(&request, &bridge).await.unwrap_or_else(|e| panic!("{e}"));
        let elapsed = begun.elapsed();
        let size = |image: &slipway_frontend::PlatformImage| {
            image.definition.as_ref().map_or(0, |graph| graph.ops.iter().map(Vec::len).sum())
        };
        let bytes: usize = result.images.iter().map(size).sum();
        println!("{:.1} ms, {bytes} bytes", elapsed.as_secs_f64() * 1e3);
    }
}
