//! Files that ask for another frontend: `# syntax=` and the build argument `BUILDKIT_SYNTAX`.

use std::collections::BTreeMap;

use slipway_spec::llb::Lines;

use super::directive;
use super::problem::{FileText, Problem};
use super::settings::is_builtin_syntax;
use crate::{Bridge, FrontendError, FrontendImage, FrontendRequest, FrontendResult};

/// A frontend that is not built in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frontend {
    image: String,
    /// The whole of what names it, which may have arguments for it.
    cmdline: String,
    /// Where the file names it; `None` when the caller does.
    line: Option<u32>,
}

/// Returns the frontend that should read the file, unless that is this one.
pub(crate) fn frontend(attrs: &BTreeMap<String, String>, file: &FileText) -> Option<Frontend> {
    // Somebody has forwarded to this frontend already.
    if attrs.contains_key("cmdline") {
        return None;
    }
    let found = match attrs.get("build-arg:BUILDKIT_SYNTAX") {
        Some(cmdline) => {
            let image = cmdline.trim().split(' ').next().unwrap_or_default();
            Frontend { image: image.into(), cmdline: cmdline.clone(), line: None }
        }
        None => {
            let (cmdline, line) = directive::detect_syntax(&file.text)?;
            let image = cmdline.split(' ').next().unwrap_or_default();
            Frontend { image: image.into(), line: Some(line), cmdline }
        }
    };
    (!is_builtin_syntax(&found.image)).then_some(found)
}

impl Frontend {
    /// Has it read the file.
    pub(crate) async fn run(
        self,
        request: &FrontendRequest,
        file: &FileText,
        bridge: &dyn Bridge,
    ) -> Result<FrontendResult, FrontendError> {
        let message = match self.line {
            Some(_) => format!("failed with the frontend {} of the syntax directive", self.image),
            None => format!("failed with build-arg:BUILDKIT_SYNTAX = {}", self.cmdline),
        };
        let mut problem = Problem::new(message).hint("docker/dockerfile is built in");
        if let Some(line) = self.line {
            problem = problem.at(Lines { first: line, last: line });
        }
        let failed = |error| FrontendError::from_bridge(file.error(problem.clone()), error);
        let mut attrs = request.attrs.clone();
        attrs.insert("cmdline".into(), self.cmdline);
        attrs.insert("source".into(), self.image.clone());
        let inputs = bridge.inputs().await.map_err(failed)?;
        let image = FrontendImage { source: self.image, attrs, inputs };
        bridge.run_frontend(image).await.map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str, attrs: &[(&str, &str)]) -> Option<(String, String, Option<u32>)> {
        let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let file = FileText { text: text.into(), ..FileText::default() };
        frontend(&attrs, &file).map(|found| (found.image, found.cmdline, found.line))
    }

    #[test]
    fn other_frontends_are_found() {
        let found = |image: &str, cmdline: &str, line| Some((image.into(), cmdline.into(), line));
        assert_eq!(
            find("# syntax=me/x:1 a b\nFROM x", &[]),
            found("me/x:1", "me/x:1 a b", Some(1))
        );
        assert_eq!(
            find("FROM x", &[("build-arg:BUILDKIT_SYNTAX", "me/y z")]),
            found("me/y", "me/y z", None)
        );
        assert_eq!(find("# syntax=docker/dockerfile:1\nFROM x", &[]), None);
        assert_eq!(find("# syntax=me/x", &[("build-arg:BUILDKIT_SYNTAX", "dockerfile.v0")]), None);
        assert_eq!(find("# syntax=me/x", &[("cmdline", "me/x")]), None);
        assert_eq!(find("FROM x", &[]), None);
    }
}
