//! The base images: the only part of a build that waits for answers.

use futures::future::try_join_all;
use slipway_spec::{ImageConfig, ImageReference};

use super::context::{LoadError, Loaded};
use super::lint::Linter;
use super::problem::{FileText, Problem};
use super::stage::{Base, BaseImage, Plan, Stage};
use super::suggest::{suggest, with_suggestion};
use crate::{Bridge, FrontendError};

const COMMON_IMAGES: [&str; 7] =
    ["alpine", "busybox", "centos", "debian", "golang", "ubuntu", "fedora"];

/// Asks for every image that the target needs, until triggers of base images add no further ones.
pub(crate) async fn resolve(
    plan: &mut Plan<'_>,
    file: &FileText,
    bridge: &dyn Bridge,
    lint: &Linter,
) -> Result<(), FrontendError> {
    loop {
        // Names are checked in stages that nobody needs, too.
        let named = |stage: &&Stage| matches!(stage.base, Base::Image | Base::Replaced);
        for stage in plan.stages.iter().filter(named) {
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
            let stage = &plan.stages[*index];
            matches!(stage.base, Base::Image | Base::Replaced)
                && stage.image.is_none()
                && stage.context.is_none()
        };
        let wanted = plan.wanted().into_iter().enumerate().filter(|(_, yes)| *yes);
        let missing: Vec<usize> = wanted.map(|(index, _)| index).filter(open).collect();
        let found =
            try_join_all(missing.iter().map(|index| resolve_one(plan, *index, file, bridge)))
                .await?;
        for (index, image) in missing.iter().zip(found) {
            let stage = &mut plan.stages[*index];
            let image = match image {
                Found::Image(image) => *image,
                Found::Context(context) => {
                    stage.context = Some(*context);
                    continue;
                }
            };
            if !image.empty {
                let expected = stage.platform.as_ref().unwrap_or(&plan.platform);
                let actual = image.config.platform();
                lint.base_image(&stage.base_name, &actual, expected, stage.lines);
            }
            stage.image = Some(image);
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

/// What stands behind a name.
enum Found {
    Image(Box<BaseImage>),
    Context(Box<Loaded>),
}

async fn resolve_one(
    plan: &Plan<'_>,
    index: usize,
    file: &FileText,
    bridge: &dyn Bridge,
) -> Result<Found, FrontendError> {
    let stage = &plan.stages[index];
    let name = &stage.base_name;
    let problem = |message: String| file.error(Problem::new(message).at(stage.lines));
    let reference: ImageReference = name
        .parse()
        .map_err(|error| problem(format!("failed to parse stage name {name:?}: {error}")))?;
    let platform = stage.platform.as_ref().unwrap_or(&plan.platform);
    let located = |problem: Problem| file.error(problem.at(stage.lines));
    let context = match &stage.replaced_by {
        Some(context) => Some(context.clone()),
        None => plan.settings.context_for(&reference.to_string(), platform).map_err(located)?,
    };
    if let Some(context) = context {
        let loaded = context.load(plan.settings, platform, bridge).await;
        return loaded.map(|loaded| Found::Context(Box::new(loaded))).map_err(
            |error| match error {
                LoadError::Problem(problem) => located(problem).into(),
                LoadError::Bridge(what, error) => FrontendError::from_bridge(problem(what), error),
            },
        );
    }
    let resolved = bridge
        .resolve_image(&reference, platform, plan.settings.resolve_mode)
        .await
        .map_err(|error| {
            let suggestion = suggest(name, plan.names().chain(COMMON_IMAGES), false);
            FrontendError::from_bridge(problem(with_suggestion(name.clone(), suggestion)), error)
        })?;
    let original: ImageConfig = serde_json::from_slice(&resolved.config)
        .map_err(|error| problem(format!("failed to parse the config of image {name}: {error}")))?;
    let mut config = original.clone();
    let empty =
        config.rootfs.diff_ids.is_empty() && config.history.iter().all(|entry| entry.empty_layer);
    config.created = None;
    config.rootfs.diff_ids.clear();
    let reference = resolved.reference.unwrap_or(reference).with_digest(resolved.digest);
    Ok(Found::Image(Box::new(BaseImage { reference, config, original, empty })))
}
