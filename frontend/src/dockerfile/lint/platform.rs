//! Rules about platforms.

use slipway_spec::Platform;
use slipway_spec::llb::Lines;

use super::{Linter, rules};
use crate::dockerfile::expand::{Env, Expansion};
use crate::dockerfile::go_format::quoted;
use crate::dockerfile::stage::format_all;

/// The argument that has the platform that is built for.
const TARGET: &str = "TARGETPLATFORM";

impl Linter {
    /// Looks at `FROM --platform`: as written, expanded, in a stage of this name.
    pub(crate) fn platform_flag(
        &self,
        written: &str,
        expansion: &Expansion,
        globals: &Env,
        stage: &str,
        lines: Lines,
    ) {
        let names = expansion.matched.len() + expansion.unmatched.len();
        if names == 1
            && expansion.matched.contains(TARGET)
            && globals.get(TARGET) == Some(expansion.text.as_str())
        {
            let message = format!(
                "Setting platform to predefined {written} in FROM is redundant as this is the default behavior"
            );
            self.report(&rules::REDUNDANT_TARGET_PLATFORM, lines, message);
        }
        // A stage that is called after its platform is meant for that platform.
        if names == 0
            && let Ok(platform) = Platform::parse_raw(&expansion.text)
            && !stage.contains(&platform.os)
            && !stage.contains(&platform.architecture)
        {
            let message = format!(
                "FROM --platform flag should not use constant value {}",
                quoted(&expansion.text)
            );
            self.report(&rules::FROM_PLATFORM_FLAG_CONST_DISALLOWED, lines, message);
        }
    }

    /// Looks at the platform of a base image.
    pub(crate) fn base_image(
        &self,
        name: &str,
        actual: &Platform,
        expected: &Platform,
        lines: Lines,
    ) {
        if actual.os == expected.os && actual.architecture == expected.architecture {
            return;
        }
        let shown = |platform: &Platform| match platform.os.as_str() {
            "" => quoted("unknown"),
            _ => quoted(&format_all(&platform.normalized())),
        };
        let message = format!(
            "Base image {name} was pulled with platform {}, expected {} for current build",
            shown(actual),
            shown(expected)
        );
        self.report(&rules::INVALID_BASE_IMAGE_PLATFORM, lines, message);
    }
}
