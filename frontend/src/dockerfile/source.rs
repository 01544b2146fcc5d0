//! The image that a frontend is, or what the caller has put in its place.

use std::collections::{BTreeMap, BTreeSet};

use slipway_spec::llb::{Definition, State, VertexOptions, marshal};
use slipway_spec::{ImageConfig, ImageReference};

use super::context::LoadError;
use super::files::trying;
use super::problem::{FileText, Problem};
use super::settings::Settings;
use crate::{Bridge, BridgeError, BridgeErrorKind, FrontendError, FrontendRequest, ResolveMode};

/// What a frontend that is an image is made of.
#[derive(Clone, Debug)]
pub struct FrontendSource {
    /// Its file system.
    pub definition: Definition,
    /// Says how it is started.
    pub config: ImageConfig,
}

/// Finds the file system of a frontend: that of a named context of the request if there is one of the frontend's name, or
/// else that of an image, for the platform that builds run on.
///
/// # Errors
/// When it cannot be found.
pub async fn frontend_source(
    request: &FrontendRequest,
    name: &str,
    bridge: &dyn Bridge,
) -> Result<FrontendSource, FrontendError> {
    let unlocated = |problem: Problem| FileText::default().error(problem);
    let platform = &request.build_platform;
    let reference: ImageReference = name.parse().map_err(|error| {
        unlocated(Problem::new(format!("the frontend {name:?} is no image name: {error}")))
    })?;
    if request.attrs.keys().any(|key| key.starts_with("context:")) {
        let mut settings = Settings::read(request).map_err(unlocated)?;
        settings.session = bridge.session_id().map(str::to_owned);
        let context = settings.context_for(name, platform).map_err(unlocated)?;
        if let Some(context) = context {
            let loaded = context.load(&settings, platform, bridge).await;
            let loaded = loaded.map_err(|error| match error {
                LoadError::Problem(problem) => unlocated(problem).into(),
                LoadError::Bridge(what, error) => {
                    FrontendError::from_bridge(unlocated(Problem::new(what)), error)
                }
            })?;
            let state = loaded.state(&settings, &BTreeSet::from(["/".to_owned()]));
            let definition = marshal(&state, None).ok_or_else(|| {
                unlocated(Problem::new(format!("the context for the frontend {name} is empty")))
            })?;
            return Ok(FrontendSource { definition, config: loaded.config.unwrap_or_default() });
        }
    }
    let finding = format!("find the frontend {name}");
    let found = bridge.resolve_image(&reference, platform, ResolveMode::Default).await;
    let found = found.map_err(trying(&finding))?;
    let invalid = |error: serde_json::Error| {
        BridgeError::new(BridgeErrorKind::Other, format!("the config of {name}: {error}"))
    };
    let config =
        serde_json::from_slice(&found.config).map_err(invalid).map_err(trying(&finding))?;
    // A policy may have made another image of it.
    let reference = found.reference.unwrap_or(reference).with_digest(found.digest);
    let attrs = BTreeMap::from([("image.recordtype".to_owned(), "frontend".to_owned())]);
    let options = VertexOptions {
        name: format!("docker-image://{reference}"),
        platform: Some(platform.clone()),
        ..VertexOptions::default()
    };
    let definition = marshal(&State::image(&reference, attrs, options), None)
        .ok_or_else(|| unlocated(Problem::new(format!("the frontend {name} is empty"))))?;
    Ok(FrontendSource { definition, config })
}
