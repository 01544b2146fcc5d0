//! `slipway build`.

pub(crate) mod call;
pub(crate) mod inputs;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use slipway_engine::BuildError;
use slipway_engine::cache::{CacheEntry, CacheExport, parse_exports};
use slipway_engine::solver::policy::Policy;
use slipway_spec::{ImageReference, Platform};

use self::inputs::BuildInputs;
use super::Context;
use crate::args::build::{BuildArgs, ProgressMode};
use crate::args::cache::CacheList;
use crate::args::call::Call;
use crate::args::step::{SshSpec, StepPlan};
use crate::args::value::{boolean, join_platforms, with_empty, with_environment};
use crate::failure::Failure;
use crate::metadata_file::{BuildMetadata, clear_iidfile, write_iidfile, write_metadata};
use crate::output::{OutputFlags, OutputKind, OutputSpec, resolve_outputs};

/// Which steps run although their results are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NoCache {
    /// None.
    Never,
    /// Those of these stages.
    Stages(Vec<String>),
    /// All.
    All,
}

/// The network of `RUN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BuildNetwork {
    /// What the builder gives.
    Default,
    /// The host's.
    Host,
    /// Nothing but loopback.
    None,
}

/// A build, ready to be asked of the engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BuildPlan {
    /// What is read.
    pub(crate) inputs: BuildInputs,
    /// What is allowed to be read from outside.
    pub(crate) source_policy: Option<Policy>,
    /// The image's names.
    pub(crate) tags: Vec<ImageReference>,
    /// What to build for; empty for the host alone.
    pub(crate) platforms: Vec<Platform>,
    /// Build arguments.
    pub(crate) build_args: BTreeMap<String, String>,
    /// Labels of the image.
    pub(crate) labels: BTreeMap<String, String>,
    /// The stage to build.
    pub(crate) target: Option<String>,
    /// Which steps run again.
    pub(crate) no_cache: NoCache,
    /// Whether to ask for newer base images.
    pub(crate) pull: bool,
    /// The network of `RUN`.
    pub(crate) network: BuildNetwork,
    /// What is asked instead of a build.
    pub(crate) call: Option<Call>,
    /// The attributes that ask for what is to be said of the result.
    pub(crate) attestations: BTreeMap<String, String>,
    /// What the processes of `RUN` are given and may use.
    pub(crate) steps: StepPlan,
    /// Where the result goes; empty only when nothing is built.
    pub(crate) outputs: Vec<OutputSpec>,
    /// Caches to look into.
    pub(crate) cache_imports: Vec<CacheEntry>,
    /// Caches to write.
    pub(crate) cache_exports: Vec<CacheExport>,
    /// How progress is shown.
    pub(crate) progress: ProgressMode,
    /// Whether the id is printed.
    pub(crate) print_id: bool,
    /// Where the id goes.
    pub(crate) iidfile: Option<PathBuf>,
    /// Where the metadata goes.
    pub(crate) metadata_file: Option<PathBuf>,
}

/// Turns arguments into a plan. The files of the plan were seen, nothing was written.
///
/// # Errors
/// When flags contradict each other or ask for what is not supported, or a file or folder is missing.
pub(crate) fn plan(args: &BuildArgs, context: &Context) -> Result<BuildPlan, Failure> {
    if let Some(flag) = args.unsupported.refused.first() {
        return Err(Failure::new(format!("not supported yet: {flag}")));
    }
    for flag in &args.unsupported.ignored {
        context.printer.note(&format!("WARNING: {flag} has no effect"));
    }
    let inputs = BuildInputs::find(&args.context, args.file.as_deref(), &args.contexts)?;
    let mut steps = args.steps.plan()?;
    if steps.ssh.is_empty() && inputs.wants_ssh() {
        steps.ssh.push(SshSpec { id: "default".into(), paths: vec![] });
    }
    let call = if args.check { Some(Call::check()) } else { args.call.clone() };
    let call = call.filter(|call| call.name != "build");
    let outputs = match &call {
        Some(_) => vec![],
        None => resolve_outputs(
            &args.outputs,
            OutputFlags {
                push: args.push,
                load: args.load,
                tags: &args.tags,
                annotations: &args.annotations,
                stdout_is_terminal: context.printer.terminals.stdout,
            },
        )?,
    };
    if args.iidfile.is_some()
        && let Some(files) =
            outputs.iter().find(|o| matches!(o.kind, OutputKind::Local | OutputKind::Tar))
    {
        let kind = files.kind.as_str();
        return Err(Failure::new(format!(
            "--iidfile needs an image, but a type={kind} output has no id"
        )));
    }
    let mut build_args = with_environment(&args.build_args, &context.environment);
    // The reproducible date of the caller is that of the build, unless one was given.
    if let Some(epoch) =
        context.environment.text("SOURCE_DATE_EPOCH").filter(|text| !text.is_empty())
    {
        build_args.entry("SOURCE_DATE_EPOCH".into()).or_insert_with(|| epoch.into());
    }
    let wanted = |error: BuildError| Failure::new(error.to_string());
    let cache_imports = cache_entries(&args.cache_from);
    cache_imports.iter().try_for_each(CacheEntry::check_import).map_err(wanted)?;
    let mut cache_exports = cache_entries(&args.cache_to);
    // As with buildx, a build argument that no Dockerfile declares.
    if build_args.get("BUILDKIT_INLINE_CACHE").is_some_and(|text| boolean(text) == Ok(true)) {
        cache_exports.push(CacheEntry { kind: "inline".into(), ..CacheEntry::default() });
    }
    let cache_exports = parse_exports(&cache_exports).map_err(wanted)?;
    Ok(BuildPlan {
        inputs,
        source_policy: source_policy(context)?,
        tags: args.tags.clone(),
        platforms: context.settings.platforms(join_platforms(&args.platforms)),
        build_args,
        labels: with_empty(&args.labels),
        target: args.target.clone().filter(|target| !target.is_empty()),
        no_cache: match (args.no_cache, args.no_cache_filter.is_empty()) {
            (true, _) => NoCache::All,
            (false, false) => NoCache::Stages(args.no_cache_filter.clone()),
            (false, true) => NoCache::Never,
        },
        pull: args.pull,
        network: network(&args.network)?,
        attestations: args.attest.attrs(),
        steps,
        progress: progress(args.progress, args.quiet)?,
        call,
        print_id: args.quiet && !outputs.iter().any(OutputSpec::uses_stdout),
        outputs,
        cache_imports,
        cache_exports,
        iidfile: args.iidfile.clone(),
        metadata_file: args.metadata_file.clone(),
    })
}

fn cache_entries(lists: &[CacheList]) -> Vec<CacheEntry> {
    lists.iter().flat_map(|CacheList(entries)| entries).cloned().collect()
}

/// Does what must come before the build.
///
/// # Errors
/// When an old id file cannot be removed.
pub(crate) fn prepare(plan: &BuildPlan) -> Result<(), Failure> {
    plan.iidfile.as_deref().map_or(Ok(()), clear_iidfile)
}

/// Tells what was built, in the ways that the plan asks for.
///
/// # Errors
/// When a file cannot be written.
pub(crate) fn report(
    plan: &BuildPlan,
    metadata: &BuildMetadata,
    context: &Context,
) -> Result<(), Failure> {
    if let Some(path) = &plan.metadata_file {
        write_metadata(path, metadata)?;
    }
    let Some(id) = metadata.image_id() else { return Ok(()) };
    if let Some(path) = &plan.iidfile {
        write_iidfile(path, id)?;
    }
    if plan.print_id {
        context.printer.line(&id.to_string());
    }
    Ok(())
}

/// The variable that names the file of a source policy, as BuildKit's clients have it.
const SOURCE_POLICY: &str = "EXPERIMENTAL_BUILDKIT_SOURCE_POLICY";

fn source_policy(context: &Context) -> Result<Option<Policy>, Failure> {
    let path = context.environment.get(SOURCE_POLICY).filter(|path| !path.is_empty());
    let Some(path) = path.map(Path::new) else { return Ok(None) };
    let hint = format!("the file is named by {SOURCE_POLICY}");
    let text = std::fs::read(path).map_err(|error| {
        Failure::new(format!("failed to read policy file {}: {error}", path.display()))
            .hint(hint.clone())
    })?;
    let policy = Policy::from_json(&text).map_err(|error| {
        Failure::new(format!("failed to parse source policy {}: {error}", path.display()))
            .hint(hint)
    })?;
    Ok(Some(policy))
}

fn network(text: &str) -> Result<BuildNetwork, Failure> {
    match text {
        "" | "default" => Ok(BuildNetwork::Default),
        "host" => Ok(BuildNetwork::Host),
        "none" => Ok(BuildNetwork::None),
        other => Err(Failure::new(format!("not supported yet: --network {other}"))
            .hint("use default, host or none")),
    }
}

fn progress(mode: ProgressMode, quiet: bool) -> Result<ProgressMode, Failure> {
    match (mode, quiet) {
        (mode, false) => Ok(mode),
        (ProgressMode::Auto | ProgressMode::Quiet, true) => Ok(ProgressMode::Quiet),
        (
            ProgressMode::None | ProgressMode::Plain | ProgressMode::RawJson | ProgressMode::Tty,
            true,
        ) => Err(Failure::new("--quiet and --progress contradict each other")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use slipway_spec::{Descriptor, Digest, MediaType};

    use super::inputs::DockerfilePlace;
    use super::*;
    use crate::args::Command;
    use crate::command::testing;
    use crate::printer::capture::Buffer;

    struct Case {
        folder: tempfile::TempDir,
        context: Context,
        stdout: Buffer,
        stderr: Buffer,
    }

    impl Case {
        fn new(variables: &[(&str, &str)]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            fs::write(folder.path().join("Dockerfile"), "FROM scratch\n").unwrap();
            let (context, stdout, stderr) = testing::context(variables);
            Self { folder, context, stdout, stderr }
        }

        fn path(&self, name: &str) -> String {
            self.folder.path().join(name).to_str().unwrap().into()
        }

        fn plan(&self, words: &[&str]) -> Result<BuildPlan, Failure> {
            let folder = self.path("");
            let words: Vec<_> =
                ["build"].iter().chain(words).copied().chain([folder.as_str()]).collect();
            match testing::command(&words) {
                Command::Build(args) => plan(&args, &self.context),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn flags_and_environment_become_a_plan() {
        let case = Case::new(&[
            ("FROM_ENV", "e"),
            ("SOURCE_DATE_EPOCH", "7"),
            ("DOCKER_DEFAULT_PLATFORM", "linux/arm64"),
        ]);
        let plan = case
            .plan(&[
                "-t",
                "a",
                "--build-arg",
                "FROM_ENV",
                "--build-arg=X=1",
                "--label",
                "l",
                "--no-cache",
                "--target",
                "",
            ])
            .unwrap();
        assert_eq!(plan.platforms, ["linux/arm64".parse().unwrap()]);
        let pairs: Vec<_> = plan.build_args.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(pairs, ["FROM_ENV=e", "SOURCE_DATE_EPOCH=7", "X=1"]);
        assert_eq!(
            (plan.labels["l"].as_str(), &plan.target, &plan.no_cache),
            ("", &None, &NoCache::All)
        );
        assert_eq!(
            (plan.inputs.dockerfile_name.as_str(), plan.network),
            ("Dockerfile", BuildNetwork::Default)
        );
        assert_eq!(plan.outputs[0].attrs["name"], "docker.io/library/a:latest");
        let plan = case
            .plan(&["--build-arg=SOURCE_DATE_EPOCH=9", "--platform=linux/amd64", "--network=none"])
            .unwrap();
        assert_eq!(
            (plan.build_args["SOURCE_DATE_EPOCH"].as_str(), plan.network),
            ("9", BuildNetwork::None)
        );
        assert_eq!(plan.platforms, ["linux/amd64".parse().unwrap()]);
        let filtered = case.plan(&["--no-cache-filter=a,b"]).unwrap().no_cache;
        assert_eq!(filtered, NoCache::Stages(vec!["a".into(), "b".into()]));
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        let case = Case::new(&[]);
        for (words, message) in [
            (&["--policy", "x"][..], "not supported yet: --policy"),
            (&["--network", "mine"], "not supported yet: --network mine"),
            (&["-q", "--progress", "plain"], "contradict"),
            (&["--iidfile", "x", "-o", "out"], "type=local"),
            (&["-o", "-", "--output=type=oci"], "only one output"),
            (&["--push"], "name is needed"),
            (&["-f", "/no/such/file"], "/no/such/file"),
            (&["-f", "/"], "is a folder"),
        ] {
            let failure = case.plan(words).unwrap_err();
            assert!(failure.message.contains(message), "{words:?}: {failure}");
            assert_eq!(failure.exit_code, 1);
        }
        assert_eq!(case.stderr.take(), "");
        case.plan(&["--squash", "--rm", "--provenance=false"]).unwrap();
        assert_eq!(case.stderr.take(), "WARNING: --squash has no effect\n");
    }

    #[test]
    fn the_dockerfile_is_found() {
        let case = Case::new(&[]);
        fs::rename(case.path("Dockerfile"), case.path("dockerfile")).unwrap();
        assert_eq!(case.plan(&[]).unwrap().inputs.dockerfile_name, "dockerfile");
        fs::rename(case.path("dockerfile"), case.path("other")).unwrap();
        let failure = case.plan(&[]).unwrap_err();
        assert!(failure.message.contains("/Dockerfile: No such file"), "{failure}");
        assert_eq!(failure.hints.len(), 1);
        let other = case.path("other");
        assert_eq!(
            case.plan(&["-f", &other]).unwrap().inputs.dockerfile,
            DockerfilePlace::Path(other.into())
        );
        assert_eq!(case.plan(&["-f", "-"]).unwrap().inputs.dockerfile, DockerfilePlace::Stdin);
    }

    #[test]
    fn a_source_policy_is_read_from_the_file_that_the_environment_names() {
        let policy = tempfile::NamedTempFile::new().unwrap();
        let path = policy.path().to_str().unwrap();
        let case = Case::new(&[(SOURCE_POLICY, path)]);
        let rule = r#"{"rules": [{"action": "DENY", "selector": {"identifier": "https://*"}}]}"#;
        fs::write(path, rule).unwrap();
        assert_eq!(case.plan(&[]).unwrap().source_policy.unwrap().rules.len(), 1);
        fs::write(path, r#"{"rules": [{"actoin": "DENY"}]}"#).unwrap();
        let failure = case.plan(&[]).unwrap_err();
        assert!(failure.message.contains("failed to parse source policy"), "{failure}");
        let case = Case::new(&[(SOURCE_POLICY, "/no/such/policy.json")]);
        let failure = case.plan(&[]).unwrap_err();
        assert!(failure.message.contains("/no/such/policy.json"), "{failure}");
        assert_eq!(Case::new(&[]).plan(&[]).unwrap().source_policy, None);
    }

    #[test]
    fn a_repository_over_ssh_gets_the_agent() {
        let case = Case::new(&[]);
        let Command::Build(args) = testing::command(&["build", "git@h.example:a/b"]) else {
            panic!("build")
        };
        assert_eq!(plan(&args, &case.context).unwrap().steps.ssh[0].id, "default");
        assert!(case.plan(&[]).unwrap().steps.ssh.is_empty());
    }

    #[test]
    fn results_are_told_as_asked() {
        let case = Case::new(&[]);
        let (iid, json) = (case.path("iid"), case.path("meta.json"));
        fs::write(&iid, "old").unwrap();
        let plan = case.plan(&["-q", "--iidfile", &iid, "--metadata-file", &json]).unwrap();
        prepare(&plan).unwrap();
        assert!(!Path::new(&iid).exists());
        let metadata = BuildMetadata {
            descriptor: Some(Descriptor::new(MediaType::OCI_INDEX, Digest::of(b"i"), 1)),
            ..BuildMetadata::default()
        };
        report(&plan, &metadata, &case.context).unwrap();
        let id = Digest::of(b"i").to_string();
        assert_eq!(
            (fs::read_to_string(&iid).unwrap(), case.stdout.take()),
            (id.clone(), format!("{id}\n"))
        );
        assert!(fs::read_to_string(&json).unwrap().contains("containerimage.digest"));
        // An archive on standard output is not followed by an id.
        let plan = case.plan(&["-q", "-o", "type=oci"]).unwrap();
        report(&plan, &metadata, &case.context).unwrap();
        assert_eq!(case.stdout.take(), "");
    }
}
