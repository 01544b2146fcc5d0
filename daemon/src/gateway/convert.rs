//! Messages to types of ours, and back.

use std::fmt::Display;

use bytes::Bytes;
use serde::Deserialize;
use slipway_engine::store::tree::{Entry, Kind};
use slipway_spec::wire::fsutil::Stat;
use slipway_spec::{ImageConfig, Platform};
use slipway_transport::files;
use tonic::Status;

/// Describes an entry as Go programs do.
pub(super) fn stat(name: &[u8], entry: &Entry) -> Stat {
    let mut found = Stat {
        path: Bytes::copy_from_slice(name),
        // A view shows no whiteouts.
        mode: files::file_type(&entry.kind).map_or(0, |kind| kind.mode(entry.mode)),
        uid: entry.uid,
        gid: entry.gid,
        mod_time: entry.mtime,
        ..Stat::default()
    };
    match &entry.kind {
        Kind::File { size, .. } => found.size = i64::try_from(*size).unwrap_or(i64::MAX),
        Kind::Symlink { target } => found.linkname = Bytes::copy_from_slice(target),
        Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
            (found.devmajor, found.devminor) = (i64::from(*major), i64::from(*minor));
        }
        Kind::Directory { .. } | Kind::Fifo | Kind::Whiteout => {}
    }
    found
}

/// Returns a key of the metadata for a platform.
pub(super) fn config_key(name: &str, platform: Option<&str>) -> String {
    platform.map_or_else(|| name.to_owned(), |platform| format!("{name}/{platform}"))
}

#[derive(Deserialize)]
struct Platforms {
    #[serde(rename = "Platforms", default)]
    platforms: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Platform")]
    platform: Platform,
}

/// Reads `refs.platforms`.
pub(super) fn platforms(metadata: Option<&Bytes>) -> Result<Vec<(String, Platform)>, Status> {
    let Some(bytes) = metadata else { return Ok(vec![]) };
    let invalid = |why: &dyn Display| invalid("refs.platforms of the result", why);
    let read: Platforms = serde_json::from_slice(bytes).map_err(|error| invalid(&error))?;
    if read.platforms.is_empty() {
        return Err(invalid(&"it names no platform"));
    }
    let mut platforms: Vec<(String, Platform)> = vec![];
    for Named { id, platform } in read.platforms {
        if id.is_empty() {
            return Err(invalid(&"a platform has no ID"));
        }
        if platform.os.is_empty() || platform.architecture.is_empty() {
            return Err(invalid(&format!("platform {id} has no os or no architecture")));
        }
        match platforms.iter().find(|(known, _)| *known == id) {
            None => platforms.push((id, platform)),
            // Clients may ask for a platform twice.
            Some((_, known)) if *known == platform => {}
            Some(_) => {
                return Err(Status::invalid_argument(format!(
                    "refs.platforms of the result has two platforms of the name {id}"
                )));
            }
        }
    }
    Ok(platforms)
}

/// Reads the config of an image.
pub(super) fn config(key: &str, bytes: &[u8]) -> Result<ImageConfig, Status> {
    let invalid = |why: &dyn Display| invalid(&format!("the image config in {key}"), why);
    // A list would be read as the fields in order, of which none is required.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return Err(invalid(&"it is not an object"));
    }
    let config: ImageConfig = serde_json::from_slice(bytes).map_err(|error| invalid(&error))?;
    if config.os.is_empty() != config.architecture.is_empty() {
        return Err(invalid(&"os and architecture must be given together"));
    }
    Ok(config)
}

fn invalid(what: &str, why: &dyn Display) -> Status {
    Status::invalid_argument(format!("{what} is invalid: {why}"))
}

/// The config of a result that no frontend described.
pub(super) fn default_config(platform: &Platform) -> ImageConfig {
    let mut config = ImageConfig {
        architecture: platform.architecture.clone(),
        os: platform.os.clone(),
        variant: platform.variant.clone(),
        ..ImageConfig::default()
    };
    config.config.working_dir = "/".into();
    config.config.env =
        vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()];
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_platform_may_be_named_twice_but_a_name_has_one_platform() {
        let list = |other: &str| {
            let text = format!(
                r#"{{"Platforms":[{{"ID":"a","Platform":{{"os":"linux","architecture":"amd64"}}}},
                   {{"ID":"a","Platform":{{"os":"linux","architecture":"{other}"}}}}]}}"#
            );
            platforms(Some(&text.into()))
        };
        let found = list("amd64").unwrap();
        assert_eq!((found.len(), found[0].0.as_str()), (1, "a"));
        let error = list("arm64").unwrap_err();
        assert!(error.message().ends_with("two platforms of the name a"), "{error}");
        assert!(platforms(None).unwrap().is_empty());
    }

    #[test]
    fn platforms_are_named_whole() {
        for (text, why) in [
            ("{}", "it names no platform"),
            (r#"{"Platforms":[]}"#, "it names no platform"),
            (
                r#"{"Platforms":[{"ID":"","Platform":{"os":"","architecture":""}}]}"#,
                "a platform has no ID",
            ),
            (
                r#"{"Platforms":[{"ID":"a","Platform":{"os":"linux","architecture":""}}]}"#,
                "has no os or no architecture",
            ),
        ] {
            let error = platforms(Some(&text.into())).unwrap_err();
            assert!(error.message().ends_with(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_config_is_an_object() {
        let whole = b" {\"os\":\"linux\",\"architecture\":\"arm\"}";
        assert_eq!(config("k", whole).unwrap().os, "linux");
        assert_eq!(config("k", b"{}").unwrap().os, "");
        for bad in [&b"[]"[..], b"null", b"", b"{", b"[[]]", b"{\"os\":1}", b"{\"os\":\"linux\"}"] {
            let error = config("containerimage.config", bad).unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
            assert!(error.message().starts_with("the image config in containerimage.config is"));
        }
    }
}
