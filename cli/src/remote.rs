//! The other door: the same commands, carried out by a daemon.

mod load;
mod outputs;

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use slipway_client::session::auth::RegistryLogin;
use slipway_client::session::content::ContentFolder;
use slipway_client::session::file_sync::Folder;
use slipway_client::{
    Address, BuildRequest, BuildResult, ClientError, ClientErrorKind, Connection, SessionServices,
    TlsOptions, Typed, build as build_by, disk,
};
use slipway_engine::BuildRequest as LocalRequest;
use slipway_engine::cache::CacheEntry;
use slipway_engine::config::DiskSpace;
use slipway_engine::store::registry::{Registry, RegistryOptions};
use slipway_spec::{Digest, Hasher};

use self::outputs::Outputs;
use crate::args::build::BuildArgs;
use crate::args::builder::BuilderArgs;
use crate::args::cache::CacheList;
use crate::args::step::Allow;
use crate::args::store::{DuArgs, PruneArgs};
use crate::client::{certificates, contexts, credentials};
use crate::command::build::BuildPlan;
use crate::command::build::inputs::{BuildInputs, NamedPlace};
use crate::command::disk_usage::UsageRecord;
use crate::command::{self, Context};
use crate::execute;
use crate::failure::Failure;
use crate::failure::excerpt::ranges_excerpt;
use crate::metadata_file::BuildMetadata;

/// The variable that names a daemon, as BuildKit's own client has it.
const BUILDKIT_HOST: &str = "BUILDKIT_HOST";

/// The variable by which passwords are given to daemons rather than tokens, as BuildKit's own client has it.
const NO_CLIENT_TOKEN: &str = "BUILDKIT_NO_CLIENT_TOKEN";

/// A daemon.
#[derive(Clone, Debug)]
pub(crate) struct Builder {
    address: Address,
    tls: TlsOptions,
}

impl Builder {
    /// Returns the daemon that the flags name, if they do.
    ///
    /// # Errors
    /// When the address is none.
    pub(crate) fn of_flags(args: &BuilderArgs) -> Result<Option<Self>, Failure> {
        Self::of(args, args.builder.as_deref(), "")
    }

    /// Returns the daemon that the flags or the environment name, if they do.
    ///
    /// # Errors
    /// When the address is none.
    pub(crate) fn find(args: &BuilderArgs, context: &Context) -> Result<Option<Self>, Failure> {
        match &args.builder {
            Some(flag) => Self::of(args, Some(flag), ""),
            None => {
                let hint = format!("the address is that of {BUILDKIT_HOST}");
                Self::of(args, context.environment.text(BUILDKIT_HOST), &hint)
            }
        }
    }

    fn of(args: &BuilderArgs, address: Option<&str>, hint: &str) -> Result<Option<Self>, Failure> {
        let tls = TlsOptions {
            server_name: args.tlsservername.clone(),
            ca: args.tlscacert.clone(),
            cert: args.tlscert.clone(),
            key: args.tlskey.clone(),
        };
        let Some(address) = address.filter(|address| !address.is_empty()) else {
            if tls.is_set() {
                return Err(Failure::new("the --tls flags need a builder to connect to")
                    .hint("name it with --builder tcp://HOST:PORT"));
            }
            return Ok(None);
        };
        let address = address.parse::<Address>().map_err(|error| {
            let failure = Failure::new(error.to_string());
            if hint.is_empty() { failure } else { failure.hint(hint) }
        })?;
        Ok(Some(Self { address, tls }))
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        let connection = Connection::open(&self.address, &self.tls).await.map_err(failure)?;
        let workers = connection.workers().await.map_err(failure)?;
        if workers.is_empty() {
            return Err(Failure::new(format!("the builder {} has no workers", self.address)));
        }
        Ok(connection)
    }
}

/// Builds, and returns the exit code.
///
/// # Errors
/// When flags make no sense, or the build fails.
pub(crate) fn build(
    mut args: BuildArgs,
    builder: &Builder,
    context: &Context,
) -> Result<u8, Failure> {
    // Which caches there are is for the daemon to say.
    let imports = entries(std::mem::take(&mut args.cache_from));
    let exports = entries(std::mem::take(&mut args.cache_to));
    let plan = command::build::plan(&args, context)?;
    if !plan.steps.device_folders.is_empty() {
        return Err(Failure::new("--cdi-spec-dir has no effect where a daemon builds")
            .hint("give it to the daemon"));
    }
    let outputs = if plan.call.is_some() { Outputs::default() } else { Outputs::resolve(&args)? };
    let mut inputs = execute::inputs(&plan, context)?;
    execute::block_on(contexts::offer(&plan.inputs, &mut inputs))?;
    command::build::prepare(&plan)?;
    let mut request = BuildRequest {
        attrs: inputs.attrs.clone(),
        entitlements: plan.steps.allow.iter().map(entitlement).collect(),
        source_policy: plan.source_policy.clone(),
        shared_key: shared_key(&inputs),
        ..BuildRequest::default()
    };
    if matches!(plan.network, command::build::BuildNetwork::Host) {
        request.entitlements.push("network.host".into());
    }
    let mut services = services(&plan, inputs, context)?;
    add_caches(&mut request, &mut services, imports, exports, context)?;
    if outputs.keeps_nothing && request.cache_exports.is_empty() {
        context.printer.note(
            "WARNING: No output specified. The result will only remain in the cache of the builder. \
             To push it to a registry use --push, or to load it here use --load",
        );
    }
    let loaded = outputs.offer(&mut request, &mut services, context)?;
    let display = context.display(plan.progress, "Building");
    let sink = display.sink();
    let result = execute::with_display(display, async {
        let connection = builder.connect().await?;
        build_by(&connection, request, services, sink).await.map_err(failure)
    })?;
    drop(loaded);
    let metadata = metadata(&plan, result)?;
    command::build::report(&plan, &metadata, context)?;
    match &plan.call {
        Some(call) => command::build::call::print(call, &plan, &metadata.answer, context),
        None => Ok(0),
    }
}

fn entries(lists: Vec<CacheList>) -> Vec<CacheEntry> {
    lists.into_iter().flat_map(|list| list.0).collect()
}

fn entitlement(allow: &Allow) -> String {
    match allow {
        Allow::NetworkHost => "network.host".into(),
        Allow::SecurityInsecure => "security.insecure".into(),
        Allow::Device(device) if device.is_empty() => "device".into(),
        Allow::Device(device) => format!("device={device}"),
    }
}

/// Names the folder that is sent, so that the daemon finds what it has of it already.
fn shared_key(inputs: &LocalRequest) -> String {
    let mut hash = Hasher::sha256();
    let host = rustix::system::uname();
    hash.update(host.nodename().to_bytes());
    for (name, folder) in &inputs.folders {
        hash.update(&[0]);
        hash.update(name.as_bytes());
        hash.update(&[0]);
        hash.update(folder.as_os_str().as_encoded_bytes());
    }
    hash.finish().hex().to_owned()
}

/// Gathers what the daemon may ask of this machine.
fn services(
    plan: &BuildPlan,
    inputs: LocalRequest,
    context: &Context,
) -> Result<SessionServices, Failure> {
    let mut services = SessionServices {
        secrets: Some(inputs.services.secrets.clone()),
        uploads: Some(inputs.services.uploads.clone()),
        ssh: (!plan.steps.ssh.is_empty()).then(|| inputs.services.ssh.clone()),
        login: Some(login(context)?),
        ..SessionServices::default()
    };
    for (store, folder) in layouts(&plan.inputs, &inputs) {
        services.stores.insert(format!("oci:{store}"), ContentFolder::read_only(folder));
    }
    for (name, folder) in inputs.folders {
        services.folders.insert(name, Folder::Path(folder));
    }
    for (name, files) in inputs.files {
        services.folders.insert(name, Folder::Files(files));
    }
    Ok(services)
}

/// Lists the image layouts that contexts name, by what the daemon is told that they are called.
fn layouts<'a>(
    places: &'a BuildInputs,
    inputs: &'a LocalRequest,
) -> impl Iterator<Item = (&'a str, &'a Path)> {
    places.contexts.iter().filter_map(|(name, place)| {
        let NamedPlace::Layout { folder, .. } = place else { return None };
        let value = inputs.attrs.get(&format!("context:{name}"))?;
        let store = value.strip_prefix("oci-layout://")?.split([':', '@']).next()?;
        Some((store, folder.as_path()))
    })
}

fn login(context: &Context) -> Result<RegistryLogin, Failure> {
    let settings = &context.settings;
    let credentials = credentials(settings.docker_config_dir.as_deref())?;
    let given_away = context.environment.text(NO_CLIENT_TOKEN);
    let given_away = given_away.is_some_and(|text| crate::args::value::boolean(text) == Ok(true));
    let options = RegistryOptions {
        hosts: certificates::hosts(&settings.certs_dir)?,
        ..RegistryOptions::default()
    };
    let registry = Registry::new(options, Arc::clone(&credentials));
    let registry = registry.map_err(|error| Failure::of(&error))?;
    Ok(RegistryLogin { credentials, registry: (!given_away).then_some(registry) })
}

/// Adds caches; those in folders of this machine are offered to the daemon.
fn add_caches(
    request: &mut BuildRequest,
    services: &mut SessionServices,
    imports: Vec<CacheEntry>,
    exports: Vec<CacheEntry>,
    context: &Context,
) -> Result<(), Failure> {
    let typed = |entry: &CacheEntry| Typed { kind: entry.kind.clone(), attrs: entry.attrs.clone() };
    for entry in &exports {
        if entry.kind == "local" {
            let folder = named_folder(entry, "dest")?;
            let store = ContentFolder::writable(Path::new(folder))
                .map_err(|error| Failure::new(format!("cannot use the cache: {error}")))?;
            services.stores.insert(format!("local:{folder}"), store.clone());
            let tag = entry.attrs.get("tag").cloned().unwrap_or_else(|| "latest".into());
            request.cache_layouts.push((store, tag));
        }
        request.cache_exports.push(typed(entry));
    }
    for entry in &imports {
        let mut typed = typed(entry);
        if entry.kind == "local" {
            let folder = named_folder(entry, "src")?.to_owned();
            let store = ContentFolder::read_only(Path::new(&folder));
            if !typed.attrs.contains_key("digest") {
                let tag = entry.attrs.get("tag").map_or("latest", String::as_str);
                // A cache that is not there yet is the usual case of a first build.
                let found = store.resolve(tag).unwrap_or_else(|error| {
                    context.printer.note(&format!("WARNING: the cache is not used: {error}"));
                    None
                });
                let Some(target) = found else {
                    context.printer.note(&format!("WARNING: there is no cache in {folder}"));
                    continue;
                };
                typed.attrs.insert("digest".into(), target.digest.to_string());
            }
            services.stores.entry(format!("local:{folder}")).or_insert(store);
        }
        request.cache_imports.push(typed);
    }
    Ok(())
}

fn named_folder<'a>(entry: &'a CacheEntry, key: &str) -> Result<&'a str, Failure> {
    let folder = entry.attrs.get(key).filter(|folder| !folder.is_empty());
    folder.map(String::as_str).ok_or_else(|| {
        Failure::new(format!("a type=local cache needs {key}=, the folder that it is in"))
    })
}

fn metadata(plan: &BuildPlan, result: BuildResult) -> Result<BuildMetadata, Failure> {
    let descriptor = result.descriptor();
    let digest = |key: &str| {
        let text = result.response.get(key)?;
        Some(text.parse::<Digest>().map_err(|error| {
            Failure::new(format!("the builder sent {key}={text:?}, which is no digest: {error}"))
        }))
    };
    let image_names = result.names().map(Into::into).collect();
    let answer = result.metadata.into_iter().filter(|_| plan.call.is_some());
    Ok(BuildMetadata {
        config_digest: digest("containerimage.config.digest").transpose()?,
        descriptor,
        image_names,
        answer: answer
            .map(|(key, value)| (key, String::from_utf8_lossy(&value).into_owned()))
            .collect(),
    })
}

fn failure(error: ClientError) -> Failure {
    let Some(remote) = error.failure() else {
        let text = error.to_string();
        // A daemon that misses a certificate says so to its own log, and hangs up.
        let hint = if text.contains("tcp://") {
            "see that the builder runs, that its address is right, and which certificates it wants: \
             --tlscacert, --tlscert, --tlskey"
        } else {
            "see that the builder runs, and that its address is right"
        };
        let shown = Failure::new(text);
        return match error.kind() {
            ClientErrorKind::Connect => shown.hint(hint),
            _ => shown,
        };
    };
    if remote.is_canceled() {
        return Failure::canceled();
    }
    let shown = Failure::new(format!("failed to solve: {}", remote.message));
    let excerpts: Vec<String> = remote
        .places
        .iter()
        .map(|place| {
            let text = String::from_utf8_lossy(&place.source.data);
            ranges_excerpt(&place.source.filename, &text, &place.ranges)
        })
        .filter(|excerpt| !excerpt.is_empty())
        .collect();
    if excerpts.is_empty() { shown } else { shown.with_excerpt(excerpts.concat()) }
}

/// Shows what a daemon keeps.
///
/// # Errors
/// When it cannot be reached.
pub(crate) fn usage(args: &DuArgs, builder: &Builder, context: &Context) -> Result<(), Failure> {
    let (filter, until) = command::prune::filter(&args.filters)?;
    let found = execute::block_on(async {
        let connection = builder.connect().await?;
        disk::usage(&connection, filter).await.map_err(failure)
    })?;
    let now = SystemTime::now();
    let old = until.map(|until| now.checked_sub(until).unwrap_or(SystemTime::UNIX_EPOCH));
    let records: Vec<UsageRecord> = found
        .into_iter()
        .filter(|record| old.is_none_or(|old| record.last_used.is_none_or(|used| used <= old)))
        .map(|record| UsageRecord {
            id: record.id,
            kind: record.kind,
            size_bytes: record.size_bytes,
            is_reclaimable: !record.in_use,
            is_shared: record.shared,
            is_mutable: record.mutable,
            created: record.created,
            last_used: record.last_used,
            usage_count: record.usage_count,
            description: record.description,
        })
        .collect();
    command::disk_usage::print(args, &records, now, context);
    Ok(())
}

/// Frees disk space of a daemon.
///
/// # Errors
/// When flags make no sense, or it cannot be reached.
pub(crate) fn prune(args: &PruneArgs, builder: &Builder, context: &Context) -> Result<(), Failure> {
    if args.images {
        return Err(Failure::new(
            "--images is about images of this machine, and a builder keeps none",
        ));
    }
    if !command::prune::confirm(args, context)? {
        return Ok(());
    }
    let selection = command::prune::selection(args)?.unwrap_or_default();
    let bytes = |space: Option<DiskSpace>| match space {
        None => Ok(0),
        Some(DiskSpace::Bytes(bytes)) => Ok(bytes),
        Some(DiskSpace::Percent(_)) => Err(Failure::new(
            "a percentage is of the disk of this machine, and a builder may have another",
        )
        .hint("give an amount, such as 10GB")),
    };
    let wish = disk::PruneWish {
        all: args.all,
        filter: selection.filter,
        keep: selection.keep,
        reserved: bytes(selection.reserved)?,
        max_used: bytes(selection.max_used)?,
        min_free: bytes(selection.min_free)?,
    };
    let removed = execute::block_on(async {
        let connection = builder.connect().await?;
        disk::prune(&connection, wish).await.map_err(failure)
    })?;
    let bytes = removed.iter().map(|record| record.size_bytes).sum();
    command::prune::report(bytes, context);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::testing;

    fn flags(address: Option<&str>) -> BuilderArgs {
        BuilderArgs { builder: address.map(Into::into), ..BuilderArgs::default() }
    }

    #[test]
    fn the_flag_goes_before_the_environment() {
        let (context, ..) = testing::context(&[("BUILDKIT_HOST", "unix:///env")]);
        let found = |flag| Builder::find(&flags(flag), &context).unwrap();
        let address = |flag| found(flag).map(|builder| builder.address.to_string());
        assert_eq!(address(None).as_deref(), Some("unix:///env"));
        assert_eq!(address(Some("tcp://h:1")).as_deref(), Some("tcp://h:1"));
        assert_eq!(address(Some("")), None);
        assert!(Builder::of_flags(&flags(None)).unwrap().is_none());
        let (context, ..) = testing::context(&[("BUILDKIT_HOST", "nowhere")]);
        let failure = Builder::find(&flags(None), &context).unwrap_err();
        assert!(failure.hints[0].contains("BUILDKIT_HOST"), "{failure}");
        let (context, ..) = testing::context(&[("BUILDKIT_HOST", "")]);
        assert!(Builder::find(&flags(None), &context).unwrap().is_none());
        let tls = BuilderArgs { tlscacert: Some("ca.pem".into()), ..BuilderArgs::default() };
        assert!(Builder::find(&tls, &context).unwrap_err().message.contains("--tls"));
    }

    #[test]
    fn a_failed_build_shows_its_lines() {
        let failure = failure(ClientError::new(ClientErrorKind::Connect, "no daemon"));
        assert_eq!((failure.message.as_str(), failure.hints.len()), ("no daemon", 1));
    }
}
