//! Plans meet the engine: each verb is carried out here and told to the printer.

mod daemon;

use std::fs::File;
use std::future::Future;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use slipway_daemon::builds::Builds;
use slipway_daemon::collector::{Collector, disk};
use slipway_daemon::session::file_sync::FileCache;
use slipway_engine::config::DiskSpace;
use slipway_engine::container::{RunError, RunRequest};
use slipway_engine::exporter::{FileOptions, ImageOptions};
use slipway_engine::id::new_id;
use slipway_engine::inventory::{self, ImageSummary};
use slipway_engine::solver::executor::Stdio;
use slipway_engine::solver::source::image::Lookup;
use slipway_engine::store::filter::Filter;
use slipway_engine::store::gc::record::FIELDS;
use slipway_engine::store::gc::{CacheRecord, PruneOptions, Rule};
use slipway_engine::store::image::Image;
use slipway_engine::store::layout::ArchiveImage;
use slipway_engine::store::transfer::{self, Outcome, Platforms};
use slipway_engine::store::{ErrorKind, Store};
use slipway_engine::{BuildError, BuildRequest, Engine, Export, look_ahead};
use slipway_spec::progress::{ProgressEvent, ProgressSink};
use slipway_spec::{Descriptor, Digest, ImageReference, Platform};
use tokio::signal::unix::{SignalKind, signal};

use crate::args::build::{BuildArgs, ProgressMode};
use crate::args::image::{
    ImagesArgs, InspectArgs, LoadArgs, PullArgs, PushArgs, RmiArgs, SaveArgs, TagArgs,
};
use crate::args::run::{PullPolicy, RunArgs, RunNetwork};
use crate::args::step::Allow;
use crate::args::store::{DuArgs, PruneArgs};
use crate::args::value::join_platforms;
use crate::args::{Cli, Command};
use crate::client::output::{FileOutput, StdoutOutput};
use crate::client::secrets::Secrets;
use crate::client::ssh::Agents;
use crate::client::{contexts, open_builder, open_engine};
use crate::command::build::{BuildNetwork, BuildPlan, NoCache};
use crate::command::images::{ImageRow, PlatformRow};
use crate::command::inspect::InspectedImage;
use crate::command::prune::{PruneCache, PruneImages};
use crate::command::pull::PullPlatforms;
use crate::command::rmi::Removal;
use crate::command::run::NotStarted;
use crate::command::{self, Context};
use crate::failure::Failure;
use crate::failure::excerpt::source_excerpt;
use crate::metadata_file::BuildMetadata;
use crate::output::{Dest, OutputKind, OutputSpec};
use crate::progress::{Display, Ended};
use crate::remote::{self, Builder};
use crate::terminal::Terminal;

/// How long work on the disk may go on after an interruption.
const PATIENCE: Duration = Duration::from_secs(3);

/// Carries a command out and returns the exit code.
pub(crate) fn dispatch(cli: Cli, context: &Context) -> Result<u8, Failure> {
    match cli.command {
        Command::Build(args) => match Builder::find(&args.builder, context)? {
            Some(builder) => remote::build(*args, &builder, context),
            None => build(&args, context),
        },
        Command::Images(args) => images(&args, context).map(|()| 0),
        Command::Pull(args) => pull(&args, context).map(|()| 0),
        Command::Push(args) => push(&args, context).map(|()| 0),
        Command::Save(args) => save(&args, context).map(|()| 0),
        Command::Load(args) => load(&args, context).map(|()| 0),
        Command::Tag(args) => tag(&args, context).map(|()| 0),
        Command::Rmi(args) => rmi(&args, context).map(|()| 0),
        Command::Inspect(args) => inspect(&args, context).map(|()| 0),
        Command::Run(args) => run(&args, context),
        Command::Daemon(args) => {
            daemon::daemon(&args, cli.global.root.as_deref(), context).map(|()| 0)
        }
        Command::Prune(args) => match Builder::of_flags(&args.builder)? {
            Some(builder) => remote::prune(&args, &builder, context).map(|()| 0),
            None => prune(&args, context).map(|()| 0),
        },
        Command::Du(args) => match Builder::of_flags(&args.builder)? {
            Some(builder) => remote::usage(&args, &builder, context).map(|()| 0),
            None => usage(&args, context).map(|()| 0),
        },
    }
}

/// Runs async work until it is done or the user interrupts.
pub(crate) fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("cannot start: {error}")))?;
    let outcome = runtime.block_on(async {
        let failed = |error| Failure::new(format!("cannot wait for signals: {error}"));
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        tokio::select! {
            outcome = work => outcome,
            _ = interrupt.recv() => Err(Failure::canceled()),
            _ = terminate.recv() => Err(Failure::canceled()),
        }
    });
    runtime.shutdown_timeout(PATIENCE);
    outcome
}

/// Runs work that shows progress, and ends the display before anything else is printed.
pub(crate) fn with_display<T>(
    display: Display,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let outcome = block_on(work);
    display.finish(if outcome.is_ok() { Ended::Success } else { Ended::Failure });
    outcome
}

fn failure(error: impl std::error::Error + 'static) -> Failure {
    Failure::new(error.to_string())
}

fn build(args: &BuildArgs, context: &Context) -> Result<u8, Failure> {
    let plan = command::build::plan(args, context)?;
    let mut request = request(&plan, context)?;
    request.ahead = plan
        .inputs
        .folder()
        .and_then(|folder| look_ahead(&context.settings.root, &std::path::absolute(folder).ok()?));
    command::build::prepare(&plan)?;
    let engine = open_builder(&plan.steps.device_folders, context)?;
    let display = context.display(plan.progress, "Building");
    let sink = display.sink();
    let result = with_display(display, async {
        contexts::offer(&plan.inputs, &mut request).await?;
        engine.build(request, sink).await.map_err(build_failure)
    })?;
    let cache = result.cache.and_then(|cache| serde_json::to_string(&cache).ok());
    let metadata = BuildMetadata {
        descriptor: result.image,
        config_digest: result.config.map(|config| config.digest),
        image_names: result.names,
        answer: result
            .answer
            .into_iter()
            .map(|(key, value)| (key, String::from_utf8_lossy(&value).into_owned()))
            .chain(cache.map(|cache| ("cache.manifest".to_owned(), cache)))
            .collect(),
    };
    command::build::report(&plan, &metadata, context)?;
    match &plan.call {
        Some(call) => command::build::call::print(call, &plan, &metadata.answer, context),
        None => Ok(0),
    }
}

fn build_failure(error: BuildError) -> Failure {
    let mut failure = match error.diagnostics().as_slice() {
        [] => Failure::new(error.to_string()),
        diagnostics => {
            let messages: Vec<String> =
                diagnostics.iter().map(|diagnostic| diagnostic.to_string()).collect();
            let mut failure = Failure::new(format!("failed to solve: {}", messages.join("\n")));
            for hint in diagnostics.iter().filter_map(|diagnostic| diagnostic.hint.as_ref()) {
                failure = failure.hint(hint.clone());
            }
            failure
                .with_excerpt(diagnostics.iter().map(|diagnostic| diagnostic.excerpt()).collect())
        }
    };
    if let Some(excerpt) = error.excerpt() {
        failure = failure.with_excerpt(source_excerpt(
            &excerpt.file,
            &excerpt.text,
            excerpt.first..=excerpt.last,
        ));
    }
    failure
}

/// Returns what a build is asked for apart from where its result goes, whoever builds.
pub(crate) fn inputs(plan: &BuildPlan, context: &Context) -> Result<BuildRequest, Failure> {
    let mut request = BuildRequest { id: new_id(), ..BuildRequest::default() };
    let attrs = &mut request.attrs;
    for (name, value) in &plan.build_args {
        attrs.insert(format!("build-arg:{name}"), value.clone());
    }
    for (name, value) in &plan.labels {
        attrs.insert(format!("label:{name}"), value.clone());
    }
    if let Some(call) = &plan.call {
        attrs.insert("requestid".into(), call.request());
    }
    if let Some(target) = &plan.target {
        attrs.insert("target".into(), target.clone());
    }
    if !plan.platforms.is_empty() {
        let platforms: Vec<String> = plan.platforms.iter().map(ToString::to_string).collect();
        attrs.insert("platform".into(), platforms.join(","));
    }
    match &plan.no_cache {
        NoCache::Never => {}
        NoCache::Stages(stages) => {
            attrs.insert("no-cache".into(), stages.join(","));
        }
        NoCache::All => {
            attrs.insert("no-cache".into(), String::new());
        }
    }
    if plan.pull {
        attrs.insert("image-resolve-mode".into(), "pull".into());
    }
    match plan.network {
        BuildNetwork::Default => {}
        BuildNetwork::Host => {
            attrs.insert("force-network-mode".into(), "host".into());
        }
        BuildNetwork::None => {
            attrs.insert("force-network-mode".into(), "none".into());
        }
    }
    attrs.extend(plan.attestations.clone());
    attrs.extend(plan.steps.attrs.iter().map(|(name, value)| (name.clone(), value.clone())));
    request.services.secrets = Arc::new(Secrets::new(&plan.steps.secrets, &context.environment)?);
    request.services.ssh = Arc::new(Agents::new(&plan.steps.ssh, &context.environment)?);
    let entitlements = &mut request.services.entitlements;
    for allow in &plan.steps.allow {
        match allow {
            // Steps have it anyway.
            Allow::NetworkHost => {}
            Allow::SecurityInsecure => entitlements.security_insecure = true,
            Allow::Device(device) => {
                entitlements.devices.add(device).map_err(Failure::new)?;
            }
        }
    }
    request.services.policies.rules.extend(plan.source_policy.clone());
    Ok(request)
}

fn request(plan: &BuildPlan, context: &Context) -> Result<BuildRequest, Failure> {
    let mut request = inputs(plan, context)?;
    for output in &plan.outputs {
        request.exports.extend(export(output, context)?);
    }
    if !plan.cache_imports.is_empty() {
        let entries = plan.cache_imports.iter();
        let entries = entries.map(|e| serde_json::json!({ "Type": e.kind, "Attrs": e.attrs }));
        let list = serde_json::Value::Array(entries.collect());
        request.attrs.insert("cache-imports".into(), list.to_string());
    }
    request.cache_exports.clone_from(&plan.cache_exports);
    Ok(request)
}

fn export(output: &OutputSpec, context: &Context) -> Result<Option<Export>, Failure> {
    let image = || ImageOptions::parse(&output.attrs).map_err(failure);
    Ok(Some(match output.kind {
        OutputKind::CacheOnly => return Ok(None),
        OutputKind::Image | OutputKind::Registry => Export::Image(image()?),
        OutputKind::Oci | OutputKind::Docker if output.is_folder() => {
            return Err(Failure::new(format!(
                "not supported yet: type={},tar=false",
                output.kind.as_str()
            )));
        }
        OutputKind::Oci | OutputKind::Docker => Export::Archive {
            options: image()?,
            docker: output.kind == OutputKind::Docker,
            sink: sink(output.dest.as_ref(), context)?,
        },
        OutputKind::Local => {
            let Some(Dest::Path(folder)) = &output.dest else {
                return Err(Failure::new("a type=local output needs dest=FOLDER"));
            };
            Export::Local { folder: folder.clone(), options: file_options(output)? }
        }
        OutputKind::Tar => Export::Tar {
            options: file_options(output)?,
            sink: sink(output.dest.as_ref(), context)?,
        },
    }))
}

/// Reads the attributes of plain files.
fn file_options(output: &OutputSpec) -> Result<FileOptions, Failure> {
    let mut options = FileOptions::default();
    for (key, value) in &output.attrs {
        match (key.as_str(), value.as_str()) {
            ("platform-split", "true" | "1") => options.split = Some(true),
            ("platform-split", "false" | "0") => options.split = Some(false),
            ("attestation-prefix", prefix) => options.attestation_prefix = prefix.into(),
            ("mode", "copy") | ("name", _) => {}
            _ => {
                return Err(Failure::new(format!(
                    "not supported yet: type={},{key}={value}",
                    output.kind.as_str()
                )));
            }
        }
    }
    Ok(options)
}

pub(crate) fn sink(
    dest: Option<&Dest>,
    context: &Context,
) -> Result<Box<dyn slipway_engine::exporter::OutputSink>, Failure> {
    Ok(match dest {
        Some(Dest::Path(path)) => Box::new(FileOutput::new(path)),
        Some(Dest::Stdout) | None => Box::new(StdoutOutput(context.printer.stdout_file()?)),
    })
}

fn time(nanos: i64) -> Option<SystemTime> {
    u64::try_from(nanos)
        .ok()
        .filter(|nanos| *nanos > 0)
        .map(|nanos| UNIX_EPOCH + Duration::from_nanos(nanos))
}

fn platform_rows(summary: &ImageSummary) -> Vec<PlatformRow> {
    summary
        .platforms
        .iter()
        .map(|platform| PlatformRow {
            platform: platform.platform.clone(),
            digest: platform.digest.clone(),
            size_bytes: platform.size_bytes,
            is_present: platform.present,
        })
        .collect()
}

fn images(args: &ImagesArgs, context: &Context) -> Result<(), Failure> {
    let engine = open_engine(context)?;
    let store = engine.store();
    let mut rows = vec![];
    for image in store.images().map_err(failure)? {
        let summary = inventory::summarize(store, image, None).map_err(failure)?;
        rows.push(ImageRow {
            name: summary.image.name.parse().ok(),
            digest: summary.image.target.digest.clone(),
            created: summary.created.and_then(time),
            size_bytes: summary.size_bytes,
            platforms: platform_rows(&summary),
        });
    }
    command::images::print(args, &rows, SystemTime::now(), context);
    Ok(())
}

/// Shows one transfer as one step.
struct Transfer {
    sink: Arc<dyn ProgressSink>,
    vertex: Digest,
}

impl Transfer {
    fn start(sink: Arc<dyn ProgressSink>, name: &str) -> Self {
        let vertex = Digest::of(name.as_bytes());
        sink.send(ProgressEvent::Started { vertex: vertex.clone(), name: name.into() });
        Self { sink, vertex }
    }

    fn report(&self, descriptor: &Descriptor, current: u64, outcome: Outcome) {
        let id = match outcome {
            Outcome::Existed => format!("{} already exists", descriptor.digest),
            Outcome::Mounted => format!("{} mounted", descriptor.digest),
            Outcome::Moving | Outcome::Done => descriptor.digest.to_string(),
        };
        self.sink.send(ProgressEvent::Status {
            vertex: self.vertex.clone(),
            id: id.into(),
            current,
            total: descriptor.size,
            done: outcome != Outcome::Moving,
        });
    }

    fn end<T>(&self, result: Result<T, slipway_engine::store::Error>) -> Result<T, Failure> {
        let vertex = self.vertex.clone();
        self.sink.send(match &result {
            Ok(_) => ProgressEvent::Done { vertex },
            Err(error) => ProgressEvent::Failed { vertex, error: error.to_string().into() },
        });
        result.map_err(failure)
    }
}

fn quiet(quiet: bool) -> ProgressMode {
    if quiet { ProgressMode::Quiet } else { ProgressMode::Auto }
}

fn pull(args: &PullArgs, context: &Context) -> Result<(), Failure> {
    let engine = open_engine(context)?;
    let platforms = match command::pull::platforms(args, context) {
        PullPlatforms::Host => Platforms::Only(vec![Platform::host()]),
        PullPlatforms::Listed(listed) => Platforms::Only(listed),
        PullPlatforms::All => Platforms::All,
    };
    let before = engine.store().image(&args.name.to_string()).map_err(failure)?;
    let display = context.display(quiet(args.quiet), "Pulling");
    let transfer = Transfer::start(display.sink(), &format!("pulling {}", args.name));
    let target = with_display(display, async {
        let report = |descriptor: &Descriptor, current, outcome| {
            transfer.report(descriptor, current, outcome);
        };
        let pulled =
            transfer::pull(engine.store(), engine.registry(), &args.name, &platforms, &report)
                .await;
        transfer.end(pulled)
    })?;
    let is_new = before.is_none_or(|before| before.target.digest != target.digest);
    command::pull::report(args, &target.digest, is_new, context);
    Ok(())
}

fn find(engine: &Engine, name: &str) -> Result<Image, Failure> {
    engine.store().find_image(name).map_err(failure)
}

/// Narrows an image down to one platform.
fn narrow(
    engine: &Engine,
    target: &Descriptor,
    platform: Option<&Platform>,
) -> Result<Descriptor, Failure> {
    let Some(platform) = platform else { return Ok(target.clone()) };
    let chosen = engine.store().select(target, platform).map_err(failure)?;
    let chosen =
        chosen.ok_or_else(|| Failure::new(format!("the image has nothing for {platform} here")))?;
    Ok(Descriptor::new(
        chosen.descriptor.media_type,
        chosen.descriptor.digest,
        chosen.descriptor.size,
    ))
}

fn push(args: &PushArgs, context: &Context) -> Result<(), Failure> {
    let engine = open_engine(context)?;
    let image = find(&engine, &args.name.to_string())?;
    let target = narrow(&engine, &image.target, args.platform.as_ref())?;
    let display = context.display(quiet(args.quiet), "Pushing");
    let transfer = Transfer::start(display.sink(), &format!("pushing {}", args.name));
    with_display(display, async {
        let report = |descriptor: &Descriptor, current, outcome| {
            transfer.report(descriptor, current, outcome);
        };
        transfer.end(
            transfer::push(engine.store(), engine.registry(), &args.name, &target, &report).await,
        )
    })?;
    command::push::report(args, &target, context);
    Ok(())
}

fn save(args: &SaveArgs, context: &Context) -> Result<(), Failure> {
    let destination = command::save::destination(args, context)?;
    let engine = open_engine(context)?;
    let platforms = join_platforms(&args.platforms);
    let platform = match platforms.as_slice() {
        [] => None,
        [platform] => Some(platform),
        _ => {
            return Err(Failure::new(
                "not supported yet: save with several platforms; leave --platform out for all",
            ));
        }
    };
    let mut images: Vec<ArchiveImage> = vec![];
    for name in &args.names {
        let image = find(&engine, name)?;
        let target = narrow(&engine, &image.target, platform)?;
        // What was asked for by digest or id has no name to be saved under.
        let named =
            name.parse::<ImageReference>().is_ok_and(|reference| reference.digest().is_none());
        let names = if named && image.name.parse::<ImageReference>().is_ok() {
            vec![image.name]
        } else {
            vec![]
        };
        match images.iter_mut().find(|image| image.target.digest == target.digest) {
            Some(same) => same.names.extend(names),
            None => images.push(ArchiveImage { names, target }),
        }
    }
    let sink = sink(Some(&destination), context)?;
    block_on(async {
        slipway_engine::exporter::files::archive(engine.store(), images, &Platform::host(), sink)
            .await
            .map_err(failure)
    })
}

fn load(args: &LoadArgs, context: &Context) -> Result<(), Failure> {
    if !args.platforms.is_empty() {
        return Err(Failure::new("not supported yet: load --platform"));
    }
    let (archive, name): (Box<dyn Read + Send>, String) =
        match command::load::source(args, context)? {
            command::load::LoadSource::Path(path) => {
                let file = File::open(&path).map_err(|error| {
                    Failure::new(format!("cannot open {}: {error}", path.display()))
                })?;
                (Box::new(file), path.display().to_string())
            }
            command::load::LoadSource::Stdin => {
                (Box::new(std::io::stdin()), "standard input".into())
            }
        };
    let engine = open_engine(context)?;
    let store = engine.store().clone();
    let loaded = block_on(async move {
        slipway_engine::store::blocking::run(move || store.load(archive))
            .await
            .map_err(|error| Failure::new(format!("cannot load {name}: {error}")))
    })?;
    if !args.quiet {
        for image in loaded {
            if image.names.is_empty() {
                command::load::report(None, &image.target.digest, context);
            }
            for name in image.names.iter().filter_map(|name| name.parse().ok()) {
                command::load::report(Some(&name), &image.target.digest, context);
            }
        }
    }
    Ok(())
}

fn tag(args: &TagArgs, context: &Context) -> Result<(), Failure> {
    let target = command::tag::target(args)?;
    let engine = open_engine(context)?;
    let image = find(&engine, &args.source)?;
    engine.store().name_image(&[target.to_string()], &image.target).map_err(failure)
}

fn rmi(args: &RmiArgs, context: &Context) -> Result<(), Failure> {
    let engine = open_engine(context)?;
    let store = engine.store();
    let mut names = vec![];
    for name in &args.names {
        let image = match store.find_image(name) {
            Ok(image) => image,
            Err(error) if args.force && error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(failure(error)),
        };
        // A name removes itself, an id the image with all its names.
        let is_name = name
            .parse::<ImageReference>()
            .is_ok_and(|reference| reference.to_string() == image.name);
        let doomed: Vec<String> = if is_name {
            vec![image.name]
        } else {
            let all = store.images().map_err(failure)?;
            all.into_iter()
                .filter(|other| other.target.digest == image.target.digest)
                .map(|other| other.name)
                .collect()
        };
        if doomed.len() > 1 && !args.force {
            return Err(Failure::new(format!(
                "image {name} has {} names: {}",
                doomed.len(),
                doomed.join(", ")
            ))
            .hint("remove them one by one, or all with --force"));
        }
        for name in doomed {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    let targets = store.remove_images(&names).map_err(failure)?;
    let remaining = store.images().map_err(failure)?;
    let mut removals = vec![];
    for (name, target) in names.iter().zip(targets) {
        removals.extend(name.parse().ok().map(Removal::Untagged));
        if !remaining.iter().any(|image| image.target.digest == target.digest) {
            removals.push(Removal::Deleted(target.digest));
        }
    }
    command::rmi::report(&removals, context);
    Ok(())
}

fn inspect(args: &InspectArgs, context: &Context) -> Result<(), Failure> {
    let engine = open_engine(context)?;
    let store = engine.store();
    let all = store.images().map_err(failure)?;
    let mut inspected = vec![];
    for name in &args.names {
        let image = find(&engine, name)?;
        let target = image.target.clone();
        let summary =
            inventory::summarize(store, image, args.platform.as_ref()).map_err(failure)?;
        let platforms = platform_rows(&summary);
        let Some(config) = summary.config else {
            return Err(Failure::new(match &args.platform {
                Some(platform) => format!("image {name} has nothing for {platform} here"),
                None => format!("image {name} has no config here"),
            }));
        };
        let names = all.iter().filter(|other| other.target.digest == target.digest);
        inspected.push(InspectedImage {
            names: names.filter_map(|image| image.name.parse().ok()).collect(),
            descriptor: target,
            config,
            size_bytes: summary.size_bytes,
            platforms,
        });
    }
    command::inspect::print(&inspected, context);
    Ok(())
}

fn run(args: &RunArgs, context: &Context) -> Result<u8, Failure> {
    let plan = command::run::plan(args, context)?;
    let refuse = |failure: Failure| command::run::not_started(failure, NotStarted::Other);
    let engine = open_engine(context).map_err(refuse)?;
    let image = match plan.image.parse::<ImageReference>() {
        Ok(reference) => reference,
        // An id: the name of any image that has it.
        Err(_) => {
            let image = find(&engine, &plan.image).map_err(refuse)?;
            let name = image.name.parse().unwrap_or_else(|_| unnamed());
            ImageReference::with_digest(&name, image.target.digest)
        }
    };
    let request = RunRequest {
        image,
        lookup: match plan.pull {
            PullPolicy::Missing => Lookup::StoreFirst,
            PullPolicy::Always => Lookup::Registry,
            PullPolicy::Never => Lookup::StoreOnly,
        },
        platform: plan.platform.clone().unwrap_or_else(Platform::host),
        entrypoint: plan.entrypoint.clone(),
        command: plan.command.clone(),
        env: plan.env.clone(),
        workdir: plan.workdir.clone(),
        user: plan.user.clone(),
        network: plan.network == RunNetwork::Host,
        tty: plan.tty,
    };
    let broken = |error: std::io::Error| {
        refuse(Failure::new(format!("cannot prepare the terminal: {error}")))
    };
    let terminal = plan.tty.then(Terminal::open).transpose().map_err(broken)?;
    let stdio = match &terminal {
        Some(terminal) => {
            let [stdin, stdout, stderr] = terminal.streams().map_err(broken)?;
            Stdio::Files { stdin, stdout, stderr }
        }
        None => stdio(plan.interactive).map_err(refuse)?,
    };
    let display = context.display(ProgressMode::Auto, "Pulling");
    let sink = display.sink();
    let code = block_on(async {
        let (started, mut starts) = tokio::sync::oneshot::channel::<()>();
        let command = engine.run(request, stdio, sink, move || {
            // The terminal is the command's from the moment it starts.
            display.finish(Ended::Success);
            let _waiting = started.send(());
        });
        let outcome = match terminal {
            None => command.await,
            Some(terminal) => {
                tokio::pin!(command);
                let early = tokio::select! {
                    outcome = &mut command => Some(outcome),
                    _ = &mut starts => None,
                };
                match early {
                    Some(outcome) => outcome,
                    None => {
                        let joined = terminal.join(plan.interactive).map_err(broken)?;
                        let outcome = tokio::select! {
                            outcome = &mut command => outcome,
                            () = joined.follow_size() => unreachable!("following never ends"),
                        };
                        joined.finish();
                        outcome
                    }
                }
            }
        };
        outcome.map_err(|error| {
            let why = match &error {
                RunError::Exec(error) => match error.exit_code() {
                    Some(127) => NotStarted::NotFound,
                    Some(_) => NotStarted::NotExecutable,
                    None => NotStarted::Other,
                },
                _ => NotStarted::Other,
            };
            command::run::not_started(failure(error), why)
        })
    })?;
    Ok(u8::try_from(code).unwrap_or(1))
}

/// Stands in for the name of an image that has none; only the digest beside it is looked at.
fn unnamed() -> ImageReference {
    "unnamed".parse().expect("a plain word is a name")
}

fn stdio(interactive: bool) -> Result<Stdio, Failure> {
    if interactive {
        return Ok(Stdio::Inherit);
    }
    let failed =
        |error: std::io::Error| Failure::new(format!("cannot prepare standard streams: {error}"));
    let duplicate =
        |descriptor: std::os::fd::BorrowedFd<'_>| descriptor.try_clone_to_owned().map_err(failed);
    Ok(Stdio::Files {
        stdin: File::open("/dev/null").map_err(failed)?.into(),
        stdout: duplicate(rustix::stdio::stdout())?,
        stderr: duplicate(rustix::stdio::stderr())?,
    })
}

fn prune(args: &PruneArgs, context: &Context) -> Result<(), Failure> {
    let scope = command::prune::scope(args);
    if !command::prune::confirm(args, context)? {
        return Ok(());
    }
    let engine = open_engine(context)?;
    let store = engine.store();
    let collector = collector(store);
    let bytes_of = |gone: Vec<CacheRecord>| gone.iter().map(|record| record.bytes).sum::<u64>();
    if let Some(selection) = command::prune::selection(args)? {
        let (size, _) = disk(store).unwrap_or_default();
        let bytes = |space: Option<DiskSpace>| space.map_or(0, |space| space.bytes_of(size));
        let rule = Rule {
            all: args.all,
            filter: Filter::parse(&selection.filter, FIELDS).map_err(|e| Failure::of(&e))?,
            keep: i64::try_from(selection.keep.as_nanos()).unwrap_or(i64::MAX),
            reserved: bytes(selection.reserved),
            max_used: bytes(selection.max_used),
            min_free: bytes(selection.min_free),
        };
        let gone = block_on(async { collector.collect(vec![rule], true).await.map_err(failure) })?;
        command::prune::report(bytes_of(gone), context);
        return Ok(());
    }
    let doomed: Vec<String> = store
        .images()
        .map_err(failure)?
        .into_iter()
        .map(|image| image.name)
        .filter(|name| match scope.images {
            PruneImages::None => false,
            PruneImages::Untagged => name.parse::<ImageReference>().is_err(),
            PruneImages::All => true,
        })
        .collect();
    store.remove_images(&doomed).map_err(failure)?;
    let options =
        PruneOptions { all: scope.cache == PruneCache::All, older_than: None, working_since: None };
    let pruned = store.prune(&options).map_err(failure)?;
    let mut bytes = pruned.bytes;
    if scope.cache == PruneCache::All {
        // What a daemon keeps of its clients' files.
        let filter = Filter::parse(&["type==source.local"], FIELDS);
        let rule = Rule { filter: filter.map_err(|e| Failure::of(&e))?, ..Rule::default() };
        let gone = block_on(async { collector.collect(vec![rule], true).await.map_err(failure) })?;
        bytes += bytes_of(gone);
    }
    command::prune::report(bytes, context);
    Ok(())
}

/// Looks after the same things as a daemon over this store.
fn collector(store: &Store) -> Collector {
    let files = FileCache::new(store.root().join("local"));
    Collector::new(store.clone(), files, Builds::default(), vec![])
}

fn usage(args: &DuArgs, context: &Context) -> Result<(), Failure> {
    let engine = open_engine(context)?;
    let (filter, until) = command::prune::filter(&args.filters)?;
    let filter = Filter::parse(&filter, FIELDS).map_err(|error| Failure::of(&error))?;
    let now = SystemTime::now();
    let old = until.map(|until| now.checked_sub(until).unwrap_or(UNIX_EPOCH));
    let mut found = engine.store().usage().map_err(failure)?.records;
    let cache = collector(engine.store());
    found.extend(block_on(async { cache.file_records().await.map_err(failure) })?);
    let records: Vec<command::disk_usage::UsageRecord> = found
        .into_iter()
        .filter(|record| filter.holds(|path| record.field(path)))
        .filter(|record| old.is_none_or(|old| time(record.used).is_none_or(|used| used <= old)))
        .map(|record| command::disk_usage::UsageRecord {
            id: record.id,
            kind: record.kind.as_str().to_owned(),
            size_bytes: record.bytes,
            is_reclaimable: !record.in_use,
            is_shared: record.shared,
            is_mutable: record.mutable,
            created: time(record.created),
            last_used: time(record.used),
            usage_count: 0,
            description: record.description,
        })
        .collect();
    command::disk_usage::print(args, &records, now, context);
    Ok(())
}
