//! Any Dockerfile becomes a graph or an error that can be shown.
#![no_main]

use std::collections::BTreeMap;

use async_trait::async_trait;
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use slipway_frontend::{
    Bridge, BridgeError, BridgeRef, Diagnostic, FrontendRequest, ResolveMode, ResolvedImage,
    dockerfile,
};
use slipway_spec::llb::Definition;
use slipway_spec::{Digest, ImageReference, Platform};

/// Has one file, and knows every image.
struct OneFile(Bytes);

#[async_trait]
impl Bridge for OneFile {
    async fn resolve_image(
        &self,
        image: &ImageReference,
        platform: &Platform,
        _: ResolveMode,
    ) -> Result<ResolvedImage, BridgeError> {
        let config = format!(
            r#"{{"architecture":"{}","os":"{}","config":{{"Env":["PATH=/bin","A=b"],"OnBuild":["RUN x"]}},
                "rootfs":{{"type":"layers","diff_ids":[]}}}}"#,
            platform.architecture, platform.os
        );
        Ok(ResolvedImage { reference: None, digest: Digest::of(image.to_string().as_bytes()), config: config.into() })
    }

    async fn solve(&self, _: Definition) -> Result<BridgeRef, BridgeError> {
        Ok(BridgeRef(0))
    }

    async fn read_file(&self, _: &BridgeRef, path: &str) -> Result<Option<Bytes>, BridgeError> {
        Ok((path == "Dockerfile").then(|| self.0.clone()))
    }

    fn warn(&self, warning: Diagnostic) {
        drop(warning.excerpt());
    }
}

fuzz_target!(|data: &[u8]| {
    let bridge = OneFile(Bytes::copy_from_slice(data));
    let attrs = BTreeMap::from([
        ("platform".to_owned(), "linux/amd64,linux/arm64".to_owned()),
        ("build-arg:A".to_owned(), "$B\"'".to_owned()),
    ]);
    let build_platform = "linux/amd64".parse::<Platform>().expect("a platform");
    let request = FrontendRequest { attrs, build_platform };
    if let Err(error) = futures::executor::block_on(dockerfile::build(&request, &bridge)) {
        for diagnostic in &error.diagnostics {
            drop((diagnostic.to_string(), diagnostic.excerpt()));
        }
    }
});
