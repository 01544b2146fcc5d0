//! Whether a result is what was asked for, as far as the platforms tell.

use std::collections::BTreeMap;
use std::sync::Arc;

use slipway_engine::{Build, Task};
use slipway_spec::Platform;
use slipway_spec::progress::{ProgressEvent, Warning};

use crate::gateway::Outcome;

/// Warns where the platforms of a result are others than a client asked for. That is no error: a frontend may know better.
pub(super) fn warn(build: &Build, attrs: &BTreeMap<String, String>, outcome: &Outcome) {
    let results: Vec<&Platform> = outcome.images.iter().map(|image| &image.platform).collect();
    let warnings =
        platforms(attrs.get("platform").map(String::as_str), &results, outcome.multi_platform);
    // The answer to a question has neither files nor platforms.
    let is_answer = !outcome.metadata.contains_key("refs.platforms")
        && outcome.images.iter().all(|image| image.made.edge.is_none());
    if warnings.is_empty() || is_answer {
        return;
    }
    let task = Task::start(build.progress(), "Verifying build result");
    for short in warnings {
        let vertex = Some(task.digest().clone());
        let warning = Warning { vertex, level: 1, short, ..Warning::default() };
        build.progress().send(ProgressEvent::Warning { warning: Arc::new(warning) });
    }
    // Nothing can have gone wrong with it.
    drop(task.end(Ok(())));
}

/// Compares what was asked for with what came of it.
fn platforms(requested: Option<&str>, results: &[&Platform], is_map: bool) -> Vec<String> {
    // An answer to a question has no platform.
    if results.is_empty() {
        return vec![];
    }
    let host = Platform::host().to_string();
    let requested = requested.unwrap_or(&host);
    let mut wanted: Vec<String> = vec![];
    let mut warnings = vec![];
    for text in requested.split(',') {
        let name = match text.parse::<Platform>() {
            Ok(platform) => platform.normalized().full_name(),
            Err(error) => {
                warnings.push(format!("Invalid platform result requested {text:?}: {error}"));
                continue;
            }
        };
        if wanted.contains(&name) {
            warnings.push(format!("Duplicate platform result requested {text:?}"));
        } else {
            wanted.push(name);
        }
    }
    if !warnings.is_empty() {
        return warnings;
    }
    let mut given: Vec<String> =
        results.iter().map(|platform| platform.normalized().full_name()).collect();
    if let ([one], [result], [platform]) = (wanted.as_slice(), given.as_slice(), results) {
        // Who asks for a system seldom asks for a version of it.
        let versionless = Platform { os_version: None, ..platform.normalized() }.full_name();
        if one == result || *one == versionless {
            return vec![];
        }
        return vec![format!(
            "Requested platform {requested:?} does not match result platform {result:?}"
        )];
    }
    if !is_map && wanted.len() > 1 {
        return vec!["Multiple platforms requested but result is not multi-platform".into()];
    }
    wanted.sort();
    given.sort();
    if wanted == given {
        return vec![];
    }
    let (wanted, given) = (wanted.join(","), given.join(","));
    vec![format!("Requested platforms {wanted} do not match result platforms {given}")]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(requested: Option<&str>, results: &[&str], is_map: bool) -> Vec<String> {
        let results: Vec<Platform> = results.iter().map(|text| text.parse().unwrap()).collect();
        let results: Vec<&Platform> = results.iter().collect();
        platforms(requested, &results, is_map)
    }

    #[test]
    fn what_was_asked_for_is_no_reason_to_warn() {
        let host = Platform::host().to_string();
        for (requested, results, is_map) in [
            (None, &[host.as_str()][..], false),
            (None, &[], false),
            (Some("linux/arm64"), &["linux/arm64"], true),
            (Some("linux/arm64/v8"), &["linux/arm64"], false),
            (Some("windows/amd64"), &["windows(10.0.1)/amd64"], false),
            (Some("linux/amd64,linux/arm64"), &["linux/arm64", "linux/amd64"], true),
        ] {
            assert_eq!(check(requested, results, is_map), [""; 0], "{requested:?}");
        }
    }

    #[test]
    fn what_is_something_else_is_told() {
        for (requested, results, is_map, expected) in [
            (
                "linux/amd64,linux/arm64",
                &["linux/amd64"][..],
                false,
                "Multiple platforms requested but result is not multi-platform",
            ),
            (
                "linux/arm/v7",
                &["linux/amd64"],
                false,
                "Requested platform \"linux/arm/v7\" does not match result platform \"linux/amd64\"",
            ),
            (
                "linux/arm64",
                &["linux/arm64", "linux/amd64"],
                true,
                "Requested platforms linux/arm64 do not match result platforms linux/amd64,linux/arm64",
            ),
            (
                "linux/amd64,linux/amd64",
                &["linux/amd64"],
                true,
                "Duplicate platform result requested \"linux/amd64\"",
            ),
        ] {
            assert_eq!(check(Some(requested), results, is_map), [expected]);
        }
        let wrong = check(Some("a/b/c/d"), &["linux/amd64"], false);
        assert!(
            wrong[0].starts_with("Invalid platform result requested \"a/b/c/d\": "),
            "{wrong:?}"
        );
    }
}
