//! What a frontend is started with.

use std::collections::BTreeMap;

use serde_json::Value;
use slipway_spec::Platform;

/// The beginning of the variables that hold a frontend attribute each.
const ATTRIBUTE: &str = "BUILDKIT_FRONTEND_OPT_";

/// What a frontend is started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// The frontend attributes.
    pub attrs: BTreeMap<String, String>,
    /// The session of the client whose folders are meant.
    pub session: Option<String>,
    /// The platform that builds run on by default.
    pub platform: Platform,
}

impl Environment {
    /// Reads variables. What makes no sense is left out: an older or newer daemon may have put it there.
    pub fn read(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let (mut attrs, mut session, mut platform) = (BTreeMap::new(), None, None);
        for (name, value) in variables {
            match name.as_str() {
                "BUILDKIT_SESSION_ID" => session = Some(value).filter(|id| !id.is_empty()),
                "BUILDKIT_WORKERS" => platform = first_platform(&value),
                _ if name.starts_with(ATTRIBUTE) => {
                    let (key, value) = value.split_once('=').unwrap_or((value.as_str(), ""));
                    attrs.insert(key.to_owned(), value.to_owned());
                }
                _ => {}
            }
        }
        Self { attrs, session, platform: platform.unwrap_or_else(Platform::host) }
    }
}

/// Returns the first platform of the first worker; the names are written in either case.
fn first_platform(workers: &str) -> Option<Platform> {
    let workers: Value = serde_json::from_str(workers).ok()?;
    let worker = workers.get(0)?;
    let platform = worker.get("platforms").or_else(|| worker.get("Platforms"))?.get(0)?;
    let platform: Platform = serde_json::from_value(platform.clone()).ok()?;
    Some(platform.normalized())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_session_and_platform_are_read() {
        let workers =
            r#"[{"id":"x","platforms":[{"architecture":"arm64","os":"linux"},{"os":"a"}]}]"#;
        let read = |variables: &[(&str, &str)]| {
            let owned = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
            Environment::read(owned)
        };
        let found = read(&[
            ("PATH", "/bin"),
            ("BUILDKIT_FRONTEND_OPT_0", "filename=a=b"),
            ("BUILDKIT_FRONTEND_OPT_17", "no-cache="),
            ("BUILDKIT_FRONTEND_OPT_2", "bare"),
            ("BUILDKIT_SESSION_ID", "s"),
            ("BUILDKIT_WORKERS", workers),
        ]);
        let attrs = [("bare", ""), ("filename", "a=b"), ("no-cache", "")];
        assert_eq!(
            found.attrs.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect::<Vec<_>>(),
            attrs
        );
        assert_eq!(found.session.as_deref(), Some("s"));
        assert_eq!(found.platform.architecture, "arm64");
        for workers in ["", "null", "[]", "[{}]", "[{\"platforms\":[]}]", "{"] {
            assert_eq!(read(&[("BUILDKIT_WORKERS", workers)]).platform, Platform::host());
        }
    }
}
