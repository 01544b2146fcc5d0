//! The base images: the only part of a build that waits for answers.

use futures::future::try_join_all;
use slipway_spec::{ImageConfig, ImageReference};

use super::problem::{FileText, Problem};
use super::stage::{Base, BaseImage, Plan, Stage, format_all};
use super::suggest::{suggest, with_suggestion};
use crate::{Bridge, FrontendError};

const COMMON_IMAGES: [&str; 7] =
    ["alpine", "busybox", "centos", "debian", "golang", "ubuntu", "fedora"];

/// Asks for every image that the target needs, until triggers of base images add no further ones.
pub(crate) async fn resolve(
    plan: &mut Plan<'_>,
    file: &FileText,
    bridge: &dyn Bridge,
) -> Result<(), FrontendError> {
    loop {
        // Names are checked in stages that nobody needs, too.
        for stage in plan.stages.iter().filter(|stage| stage.base == Base::Image) {
            parse_name(stage, file)?;
        }
        let reachable: Vec<usize> = plan
            .reachable()
            .into_iter()
            .enumerate()
            .filter(|(_, yes)| *yes)
            .map(|(index, _)| index)
            .collect();
        let open = |index: &usize| {
            plan.stages[*index].base == Base::Image && plan.stages[*index].image.is_none()
        };
        let missing: Vec<usize> = reachable.iter().copied().filter(open).collect();
        let found =
            try_join_all(missing.iter().map(|index| resolve_one(plan, *index, file, bridge)))
                .await?;
        for (index, image) in missing.iter().zip(found) {
            plan.stages[*index].image = Some(image);
        }
        let new: Vec<usize> =
            reachable.into_iter().filter(|index| !plan.stages[*index].triggers_added).collect();
        if new.is_empty() && missing.is_empty() {
            return Ok(());
        }
        for index in new {
            plan.add_triggers(index).map_err(|problem| file.error(problem))?;
        }
    }
}

fn parse_name(stage: &Stage, file: &FileText) -> Result<ImageReference, FrontendError> {
    let name = &stage.base_name;
    name.parse().map_err(|error| {
        let message = format!("failed to parse stage name {name:?}: {error}");
        file.error(Problem::new(message).at(stage.lines)).into()
    })
}

async fn resolve_one(
    plan: &Plan<'_>,
    index: usize,
    file: &FileText,
    bridge: &dyn Bridge,
) -> Result<BaseImage, FrontendError> {
    let stage = &plan.stages[index];
    let name = &stage.base_name;
    let problem = |message: String| file.error(Problem::new(message).at(stage.lines));
    let reference: ImageReference = name
        .parse()
        .map_err(|error| problem(format!("failed to parse stage name {name:?}: {error}")))?;
    let platform = stage.platform.as_ref().unwrap_or(&plan.platform);
    let resolved = bridge
        .resolve_image(&reference, platform, plan.settings.resolve_mode)
        .await
        .map_err(|error| {
            let suggestion = suggest(name, plan.names().chain(COMMON_IMAGES), false);
            FrontendError::from_bridge(problem(with_suggestion(name.clone(), suggestion)), error)
        })?;
    let mut config: ImageConfig = serde_json::from_slice(&resolved.config)
        .map_err(|error| problem(format!("failed to parse the config of image {name}: {error}")))?;
    let empty =
        config.rootfs.diff_ids.is_empty() && config.history.iter().all(|entry| entry.empty_layer);
    config.created = None;
    config.rootfs.diff_ids.clear();
    let offered = config.platform().normalized();
    let expected = platform.normalized();
    if !config.os.is_empty()
        && (offered.os != expected.os || offered.architecture != expected.architecture)
    {
        bridge.warn(file.warning(
            Problem::new(format!(
                "InvalidBaseImagePlatform: Base image {name} was pulled with platform \"{}\", expected \"{}\" for \
                 current build",
                format_all(&offered),
                format_all(&expected)
            ))
            .at(stage.lines),
        ));
    }
    Ok(BaseImage { reference: reference.with_digest(resolved.digest), config, empty })
}
