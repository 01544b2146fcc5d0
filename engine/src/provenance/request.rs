//! What a frontend was asked, as provenance tells it.

use std::collections::BTreeMap;

use serde::Serialize;
use slipway_frontend::dockerfile::git_address;
use slipway_solver::materials::Materials;
use slipway_spec::Digest;
use slipway_spec::credentials::redact;
use slipway_spec::llb::Definition;

use super::producers::Producers;

/// Attributes that say something of the machine, or of where it looks, and nothing of the result.
const HOST_SPECIFIC: [&str; 4] =
    ["cgroup-parent", "image-resolve-mode", "platform", "cache-imports"];

/// What a frontend is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The frontend; empty where the client runs it itself.
    pub frontend: String,
    /// Its attributes.
    pub attrs: BTreeMap<String, String>,
    /// What the graphs that it was given end in, by name.
    pub inputs: BTreeMap<String, Digest>,
}

/// The parameters of a build that its caller sets (SLSA provenance, `externalParameters`), by BuildKit's names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Parameters {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) frontend: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) args: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) secrets: Vec<Use>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) ssh: Vec<Use>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) locals: Vec<Local>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) inputs: BTreeMap<String, Request>,
    /// What the whole build was asked, where that is something else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) root: Option<Box<Request>>,
    #[serde(skip_serializing_if = "is_zero")]
    pub(crate) compatibility_version: u32,
}

/// Something of the client that a step may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Use {
    pub(crate) id: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) optional: bool,
}

/// A folder of the client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Local {
    pub(crate) name: String,
}

/// One request for a result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Request {
    pub(crate) config_source: ConfigSource,
    pub(crate) request: Parameters,
}

/// Where the description of the build is from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct ConfigSource {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) uri: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) digest: DigestSet,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) path: String,
}

/// Digests by their algorithm, in hexadecimal digits.
pub(crate) type DigestSet = BTreeMap<String, String>;

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Asked {
    /// Notes what a frontend is asked and given.
    pub fn new(
        frontend: &str,
        attrs: &BTreeMap<String, String>,
        inputs: &BTreeMap<String, Definition>,
    ) -> Self {
        // The graph of nothing comes from nowhere.
        let head =
            |(name, graph): (&String, &Definition)| Some((name.clone(), graph.head().ok()?.0));
        let inputs = inputs.iter().filter_map(head).collect();
        Self { frontend: frontend.to_owned(), attrs: attrs.clone(), inputs }
    }

    /// Whether nothing was asked that is worth telling.
    pub(crate) fn is_empty(&self) -> bool {
        self.frontend.is_empty() && self.attrs.is_empty() && self.inputs.is_empty()
    }

    /// Describes it; `materials` tell what the context was.
    pub(crate) fn describe(&self, materials: &Materials, producers: &Producers) -> Request {
        let mut args = self.told();
        let config_source = config_source(&mut args, materials);
        let request = Parameters {
            frontend: self.frontend.clone(),
            args,
            inputs: producers.requests(&self.inputs),
            ..Parameters::default()
        };
        Request { config_source, request }
    }

    /// Returns the attributes that may be told.
    fn told(&self) -> BTreeMap<String, String> {
        let context = self.attrs.get("contextkey").filter(|key| !key.is_empty());
        let context = context.map_or("context", String::as_str);
        let told = self.attrs.iter().filter(|(key, _)| {
            !HOST_SPECIFIC.contains(&key.as_str()) && !key.starts_with("attest:")
        });
        let redacted = |(key, value): (&String, &String)| {
            let names_source = key == context || key.starts_with("context:") || key == "vcs:source";
            (key.clone(), if names_source { redact(value) } else { value.clone() })
        };
        told.map(redacted).collect()
    }
}

/// Takes from the attributes where the description of the build is.
fn config_source(args: &mut BTreeMap<String, String>, materials: &Materials) -> ConfigSource {
    let given = |key: &str| args.get(key).filter(|value| !value.is_empty());
    let key = match given("contextkey") {
        Some(key) => key.clone(),
        None if given("input:context").is_some() => "input:context".into(),
        None => "context".into(),
    };
    let mut source = ConfigSource::default();
    if given(&key).is_some()
        && let Some(context) = args.remove(&key)
    {
        (source.uri, source.digest) =
            material(&context, materials).unwrap_or_else(|| (context, DigestSet::new()));
        source.uri = redact(&source.uri);
    }
    if args.get("filename").is_some_and(|name| !name.is_empty()) {
        source.path = args.remove("filename").unwrap_or_default();
    }
    source
}

/// Finds what a context turned out to be.
fn material(context: &str, materials: &Materials) -> Option<(String, DigestSet)> {
    let address = git_address(context, false).unwrap_or_else(|| context.to_owned());
    let address = redact(&address);
    if let Some(git) = materials.git.iter().find(|git| git.url == address) {
        let shown = git_address(context, true).unwrap_or_else(|| context.to_owned());
        return Some((shown, commit_digest(&git.commit)));
    }
    let http = materials.http.iter().find(|http| http.url == address)?;
    Some((http.url.clone(), digest_set(&http.digest)))
}

/// Writes a digest by its algorithm.
pub(crate) fn digest_set(digest: &Digest) -> DigestSet {
    let text = digest.to_string();
    let (algorithm, hex) = text.split_once(':').unwrap_or(("sha256", &text));
    [(algorithm.to_owned(), hex.to_owned())].into()
}

/// Writes the name of a git object by its algorithm.
pub(crate) fn commit_digest(commit: &str) -> DigestSet {
    let algorithm = if commit.len() == 64 { "sha256" } else { "sha1" };
    [(algorithm.to_owned(), commit.to_owned())].into()
}

impl Parameters {
    /// Leaves out what callers may not want others to know: arguments, labels, and the names of secrets. Returns whether
    /// anything that matters to the result was among it.
    pub(crate) fn minimize(&mut self) -> bool {
        let before = self.args.len();
        self.args.retain(|key, _| !key.starts_with("build-arg:") && !key.starts_with("label:"));
        let mut incomplete = self.args.len() != before;
        self.secrets.clear();
        self.ssh.clear();
        for input in self.inputs.values_mut() {
            incomplete |= input.request.minimize();
        }
        if let Some(root) = &mut self.root {
            incomplete |= root.request.minimize();
        }
        incomplete
    }
}

#[cfg(test)]
mod tests {
    use slipway_solver::materials::{GitMaterial, HttpMaterial};

    use super::*;

    fn asked(attrs: &[(&str, &str)]) -> Asked {
        let attrs = attrs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        Asked { frontend: "dockerfile.v0".into(), attrs, ..Asked::default() }
    }

    fn describe(attrs: &[(&str, &str)], materials: &Materials) -> serde_json::Value {
        let request = asked(attrs).describe(materials, &Producers::default());
        serde_json::to_value(request).unwrap()
    }

    #[test]
    fn the_context_and_the_file_are_the_source() {
        let commit = "a".repeat(40);
        let git = GitMaterial { url: "https://xxxxx@h/x.git#main".into(), commit: commit.clone() };
        let digest = Digest::of(b"x");
        let http = HttpMaterial { url: "https://h/x.tar".into(), digest: digest.clone() };
        let materials = Materials { git: vec![git], http: vec![http], ..Materials::default() };
        assert_eq!(
            describe(
                &[("context", "https://token@h/x.git#main:sub"), ("filename", "f")],
                &materials
            ),
            serde_json::json!({
                "configSource": {
                    "uri": "https://xxxxx@h/x.git#main:sub", "digest": { "sha1": commit }, "path": "f"
                },
                "request": { "frontend": "dockerfile.v0" },
            })
        );
        let hex = digest.to_string().replace("sha256:", "");
        assert_eq!(
            describe(&[("context", "https://h/x.tar"), ("platform", "linux/arm64")], &materials),
            serde_json::json!({
                "configSource": { "uri": "https://h/x.tar", "digest": { "sha256": hex } },
                "request": { "frontend": "dockerfile.v0" },
            })
        );
    }

    #[test]
    fn secrets_in_addresses_are_not_told() {
        let attrs = [
            ("context:base", "https://u:p@h/b.git"),
            ("vcs:source", "https://u:p@h/c.git"),
            ("attest:provenance", "mode=max"),
            ("build-arg:A", "b"),
        ];
        assert_eq!(
            describe(&attrs, &Materials::default())["request"]["args"],
            serde_json::json!({
                "context:base": "https://xxxxx:xxxxx@h/b.git",
                "vcs:source": "https://xxxxx:xxxxx@h/c.git",
                "build-arg:A": "b",
            })
        );
    }

    #[test]
    fn the_least_has_no_arguments_and_no_secrets() {
        let materials = Materials::default();
        let mut request = asked(&[("build-arg:A", "b"), ("label:c", "d"), ("target", "t")])
            .describe(&materials, &Producers::default())
            .request;
        request.secrets.push(Use { id: "s".into(), optional: false });
        let input = asked(&[("build-arg:X", "y")]).describe(&materials, &Producers::default());
        request.inputs.insert("i".into(), input);
        assert!(request.minimize());
        assert_eq!(
            serde_json::to_value(&request).unwrap(),
            serde_json::json!({
                "frontend": "dockerfile.v0",
                "args": { "target": "t" },
                "inputs": { "i": { "configSource": {}, "request": { "frontend": "dockerfile.v0" } } },
            })
        );
        assert!(!request.minimize());
    }
}
