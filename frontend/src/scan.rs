//! Scanners: images with a program that lists what a file system is made of.
//!
//! The program is run as a step. It finds the file system, and perhaps further ones, in folders that it may only read,
//! and leaves a folder of in-toto statements behind. Which folders these are is BuildKit's convention, and told in the
//! environment: `BUILDKIT_SCAN_SOURCE`, `BUILDKIT_SCAN_SOURCE_EXTRAS` and `BUILDKIT_SCAN_DESTINATION`.

use std::collections::BTreeMap;

use slipway_spec::attestation::{Attestation, AttestationKind, REASON, SBOM_CORE, SPDX};
use slipway_spec::llb::{Exec, ExecMount, MountOptions, State, VertexOptions, pb};
use slipway_spec::pattern::clean_path;
use slipway_spec::{ImageConfig, ImageReference, Platform};

use crate::{Bridge, Diagnostic, FrontendError, ResolveMode};

/// The folder that holds what is scanned.
const CORE: &str = "/run/src/core";

/// The folder that holds what is scanned beside.
const EXTRAS: &str = "/run/src/extras";

/// The folder that statements are written to; the slash is part of what programs are told.
const OUT: &str = "/run/out/";

/// The folder in [`CORE`], the name of its statement without the ending, and the reason for it.
const SBOM: &str = "sbom";

/// A program that lists what a file system is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scanner {
    /// The image that has the program.
    pub image: ImageReference,
    /// What it is told.
    pub parameters: BTreeMap<String, String>,
}

/// A [`Scanner`] whose image was found.
#[derive(Clone, Debug)]
pub struct FoundScanner {
    image: ImageReference,
    platform: Platform,
    args: Vec<String>,
    env: Vec<String>,
    cwd: String,
    parameters: BTreeMap<String, String>,
}

impl Scanner {
    /// Finds the program, for the platform that it is to run on.
    ///
    /// # Errors
    /// When there is no such image, or no program in it.
    pub async fn find(
        &self,
        bridge: &dyn Bridge,
        platform: &Platform,
        mode: ResolveMode,
    ) -> Result<FoundScanner, FrontendError> {
        let problem = |message: String| Diagnostic {
            message,
            hint: Some(
                "a scanner is named with generator=IMAGE, as in --sbom generator=IMAGE".into(),
            ),
            ..Diagnostic::default()
        };
        let found = bridge.resolve_image(&self.image, platform, mode).await.map_err(|error| {
            let message = format!("cannot scan with generator={}", self.image);
            FrontendError::from_bridge(problem(message), error)
        })?;
        let image = found.reference.unwrap_or_else(|| self.image.clone());
        let config: ImageConfig = serde_json::from_slice(&found.config).map_err(|error| {
            problem(format!("failed to parse the config of the scanner {image}: {error}"))
        })?;
        let config = config.config;
        let words = config.entrypoint.into_iter().chain(config.cmd);
        let args: Vec<String> = words.flatten().collect();
        if args.is_empty() {
            return Err(problem(format!("scanner {image} does not have cmd")).into());
        }
        let cwd = match config.working_dir {
            cwd if cwd.starts_with('/') => cwd,
            cwd => clean_path(&format!("/{cwd}")),
        };
        let (platform, parameters) = (platform.clone(), self.parameters.clone());
        Ok(FoundScanner { image, platform, args, env: config.env, cwd, parameters })
    }
}

impl FoundScanner {
    /// Has a file system scanned, and others with it. `name` is what people know the result by: its platform.
    pub fn scan(
        &self,
        name: &str,
        core: &State,
        extras: &BTreeMap<String, State>,
        ignore_cache: bool,
    ) -> Attestation<State> {
        let source = format!("{CORE}/{SBOM}");
        let mut env: Vec<String> = vec![];
        // Who sets a variable again sets it last.
        let mut set = |entry: String| {
            let key = entry.split('=').next().unwrap_or_default();
            env.retain(|known| known.split('=').next() != Some(key));
            env.push(if entry.contains('=') { entry } else { entry + "=" });
        };
        self.env.iter().cloned().for_each(&mut set);
        set(format!("BUILDKIT_SCAN_DESTINATION={OUT}"));
        set(format!("BUILDKIT_SCAN_SOURCE={source}"));
        if !extras.is_empty() {
            set(format!("BUILDKIT_SCAN_SOURCE_EXTRAS={EXTRAS}"));
        }
        for (key, value) in &self.parameters {
            set(format!("BUILDKIT_SCAN_{key}={value}"));
        }
        let read = |dest: String, source: &State| ExecMount {
            dest,
            source: source.clone(),
            readonly: true,
            ..ExecMount::default()
        };
        let mut mounts = vec![
            ExecMount {
                dest: "/tmp".into(),
                options: MountOptions::Tmpfs(pb::TmpfsOpt::default()),
                ..ExecMount::default()
            },
            ExecMount { dest: OUT.into(), ..ExecMount::default() },
            read(source, core),
        ];
        let extras = extras.iter();
        mounts.extend(extras.map(|(name, state)| read(format!("{EXTRAS}/{SBOM}-{name}"), state)));
        let exec = Exec {
            meta: pb::Meta {
                args: self.args.clone(),
                env,
                cwd: self.cwd.clone(),
                remove_mount_stubs_recursive: true,
                ..pb::Meta::default()
            },
            mounts,
            ..Exec::default()
        };
        let platform = Some(self.platform.clone());
        let base = VertexOptions { platform: platform.clone(), ..VertexOptions::default() };
        let base = State::image(&self.image, BTreeMap::new(), base);
        let options = VertexOptions {
            name: format!("[{name}] generating sbom using {}", self.image),
            ignore_cache,
            platform,
            ..VertexOptions::default()
        };
        Attestation {
            kind: AttestationKind::Bundle,
            from: base.exec_into(exec, OUT, options),
            path: String::new(),
            predicate_type: SPDX.into(),
            subjects: vec![],
            metadata: [(REASON, SBOM), (SBOM_CORE, SBOM)]
                .map(|(key, value)| (key.to_owned(), value.into()))
                .into(),
        }
    }
}
