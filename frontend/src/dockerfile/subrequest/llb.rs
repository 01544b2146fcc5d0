//! The graph that a Dockerfile becomes, for people and programs to look at: protobuf's JSON for steps and places, and Go's
//! for what is said about steps.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use slipway_spec::Digest;
use slipway_spec::llb::{Definition, DefinitionError, pb};

use super::json::base64;

/// Describes a graph; `None` is the empty one.
///
/// # Errors
/// When it is not well formed.
pub(super) fn describe(definition: Option<&Definition>) -> Result<Value, DefinitionError> {
    let Some(definition) = definition else {
        return Ok(json!({ "def": {}, "metadata": null, "source": {} }));
    };
    let mut steps: BTreeMap<String, Value> =
        definition.vertices()?.iter().map(|(digest, op)| (digest.to_string(), step(op))).collect();
    // What comes last does nothing but name the result.
    if let Some(last) = definition.ops.last() {
        let (digest, index) = definition.head()?;
        let index = i64::try_from(index).unwrap_or(i64::MAX);
        let head = pb::Input { digest: digest.to_string(), index };
        let op = pb::Op { inputs: vec![head], ..pb::Op::default() };
        steps.insert(Digest::of(last).to_string(), step(&op));
    }
    let metadata: BTreeMap<String, Value> = definition
        .metadata
        .iter()
        .map(|(digest, metadata)| (digest.to_string(), said(metadata)))
        .collect();
    let source = definition.source.as_ref().map_or_else(|| json!({}), source);
    Ok(json!({ "def": steps, "metadata": metadata, "source": source }))
}

/// The fields of a message. As in protobuf's JSON, what has its usual value is left out and large numbers are text.
#[derive(Default)]
struct Message(Map<String, Value>);

impl Message {
    fn put(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.insert(name.into(), value.into());
        self
    }

    fn text(self, name: &str, text: &str) -> Self {
        if text.is_empty() { self } else { self.put(name, text) }
    }

    fn long(self, name: &str, number: i64) -> Self {
        if number == 0 { self } else { self.put(name, number.to_string()) }
    }

    fn number(self, name: &str, number: i64) -> Self {
        if number == 0 { self } else { self.put(name, number) }
    }

    fn flag(self, name: &str, is_on: bool) -> Self {
        if is_on { self.put(name, true) } else { self }
    }

    fn bytes(self, name: &str, bytes: &[u8]) -> Self {
        if bytes.is_empty() { self } else { self.put(name, base64(bytes)) }
    }

    /// One of a list of names; a number without a name stands for itself.
    fn one_of(self, name: &str, number: i32, names: &[&str]) -> Self {
        match usize::try_from(number).ok().and_then(|at| names.get(at)) {
            _ if number == 0 => self,
            Some(text) => self.put(name, *text),
            None => self.put(name, number),
        }
    }

    fn list<T>(self, name: &str, values: &[T], one: impl Fn(&T) -> Value) -> Self {
        if values.is_empty() {
            self
        } else {
            self.put(name, values.iter().map(one).collect::<Vec<_>>())
        }
    }

    fn texts(self, name: &str, values: &[String]) -> Self {
        self.list(name, values, |text| text.clone().into())
    }

    fn map<T>(self, name: &str, values: &BTreeMap<String, T>, one: impl Fn(&T) -> Value) -> Self {
        if values.is_empty() {
            return self;
        }
        let map: Map<String, Value> =
            values.iter().map(|(name, value)| (name.clone(), one(value))).collect();
        self.put(name, map)
    }

    fn message<T>(self, name: &str, message: &Option<T>, one: impl Fn(&T) -> Value) -> Self {
        match message {
            Some(message) => self.put(name, one(message)),
            None => self,
        }
    }

    fn end(self) -> Value {
        Value::Object(self.0)
    }
}

fn of() -> Message {
    Message::default()
}

fn step(op: &pb::Op) -> Value {
    let input =
        |input: &pb::Input| of().text("digest", &input.digest).long("index", input.index).end();
    let message = of().list("inputs", &op.inputs, input);
    let message = match &op.op {
        None => message,
        Some(pb::op::Op::Exec(op)) => message.put("exec", exec(op)),
        Some(pb::op::Op::Source(op)) => {
            let source = of().text("identifier", &op.identifier);
            message.put("source", source.map("attrs", &op.attrs, |text| text.clone().into()).end())
        }
        Some(pb::op::Op::File(op)) => {
            message.put("file", of().list("actions", &op.actions, action).end())
        }
        Some(pb::op::Op::Build(op)) => message.put("build", build(op)),
        Some(pb::op::Op::Merge(op)) => {
            let input = |input: &pb::MergeInput| of().long("input", input.input).end();
            message.put("merge", of().list("inputs", &op.inputs, input).end())
        }
        Some(pb::op::Op::Diff(op)) => {
            let lower = |side: &pb::LowerDiffInput| of().long("input", side.input).end();
            let upper = |side: &pb::UpperDiffInput| of().long("input", side.input).end();
            let diff = of().message("lower", &op.lower, lower).message("upper", &op.upper, upper);
            message.put("diff", diff.end())
        }
        Some(pb::op::Op::Passthrough(op)) => {
            let outputs = |output: &i64| output.to_string().into();
            let op = of().text("id", &op.id).list("outputs", &op.outputs, outputs);
            message.put("passthrough", op.end())
        }
    };
    message
        .message("platform", &op.platform, platform)
        .message("constraints", &op.constraints, |constraints| {
            of().texts("filter", &constraints.filter).end()
        })
        .end()
}

fn platform(platform: &pb::Platform) -> Value {
    of().text("Architecture", &platform.architecture)
        .text("OS", &platform.os)
        .text("Variant", &platform.variant)
        .text("OSVersion", &platform.os_version)
        .texts("OSFeatures", &platform.os_features)
        .end()
}

fn exec(op: &pb::ExecOp) -> Value {
    let secret = |secret: &pb::SecretEnv| {
        let message = of().text("ID", &secret.id).text("name", &secret.name);
        message.flag("optional", secret.optional).end()
    };
    let device = |device: &pb::CdiDevice| {
        of().text("name", &device.name).flag("optional", device.optional).end()
    };
    of().message("meta", &op.meta, meta)
        .list("mounts", &op.mounts, mount)
        .one_of("network", op.network, &["UNSET", "HOST", "NONE"])
        .one_of("security", op.security, &["SANDBOX", "INSECURE"])
        .list("secretenv", &op.secretenv, secret)
        .list("cdiDevices", &op.cdi_devices, device)
        .end()
}

fn meta(meta: &pb::Meta) -> Value {
    let proxy = |proxy: &pb::ProxyEnv| {
        of().text("httpProxy", &proxy.http_proxy)
            .text("httpsProxy", &proxy.https_proxy)
            .text("ftpProxy", &proxy.ftp_proxy)
            .text("noProxy", &proxy.no_proxy)
            .text("allProxy", &proxy.all_proxy)
            .end()
    };
    let host = |host: &pb::HostIp| of().text("Host", &host.host).text("IP", &host.ip).end();
    let limit = |limit: &pb::Ulimit| {
        of().text("Name", &limit.name).long("Soft", limit.soft).long("Hard", limit.hard).end()
    };
    of().texts("args", &meta.args)
        .texts("env", &meta.env)
        .text("cwd", &meta.cwd)
        .text("user", &meta.user)
        .message("proxyEnv", &meta.proxy_env, proxy)
        .list("extraHosts", &meta.extra_hosts, host)
        .text("hostname", &meta.hostname)
        .list("ulimit", &meta.ulimit, limit)
        .text("cgroupParent", &meta.cgroup_parent)
        .flag("removeMountStubsRecursive", meta.remove_mount_stubs_recursive)
        .list("validExitCodes", &meta.valid_exit_codes, |code| (*code).into())
        .end()
}

fn mount(mount: &pb::Mount) -> Value {
    let tmpfs = |options: &pb::TmpfsOpt| of().long("size", options.size).end();
    let cache = |options: &pb::CacheOpt| {
        let sharing = ["SHARED", "PRIVATE", "LOCKED"];
        of().text("ID", &options.id).one_of("sharing", options.sharing, &sharing).end()
    };
    let file = |id: &str, (uid, gid, mode): (u32, u32, u32), optional: bool| {
        of().text("ID", id)
            .number("uid", uid.into())
            .number("gid", gid.into())
            .number("mode", mode.into())
            .flag("optional", optional)
            .end()
    };
    of().long("input", mount.input)
        .text("selector", &mount.selector)
        .text("dest", &mount.dest)
        .long("output", mount.output)
        .flag("readonly", mount.readonly)
        .one_of("mountType", mount.mount_type, &["BIND", "SECRET", "SSH", "CACHE", "TMPFS"])
        .message("TmpfsOpt", &mount.tmpfs_opt, tmpfs)
        .message("cacheOpt", &mount.cache_opt, cache)
        .message("secretOpt", &mount.secret_opt, |secret| {
            file(&secret.id, (secret.uid, secret.gid, secret.mode), secret.optional)
        })
        .message("SSHOpt", &mount.ssh_opt, |ssh| {
            file(&ssh.id, (ssh.uid, ssh.gid, ssh.mode), ssh.optional)
        })
        .text("resultID", &mount.result_id)
        .one_of("contentCache", mount.content_cache, &["DEFAULT", "ON", "OFF"])
        .end()
}

fn build(op: &pb::BuildOp) -> Value {
    of().long("builder", op.builder)
        .map("inputs", &op.inputs, |input| of().long("input", input.input).end())
        .message("def", &op.def, definition)
        .map("attrs", &op.attrs, |text| text.clone().into())
        .end()
}

fn definition(definition: &pb::Definition) -> Value {
    of().list("def", &definition.def, |bytes| base64(bytes).into())
        .map("metadata", &definition.metadata, metadata)
        .message("Source", &definition.source, source)
        .end()
}

fn metadata(metadata: &pb::OpMetadata) -> Value {
    let cache = |cache: &pb::ExportCache| of().flag("Value", cache.value).end();
    let resources = |resources: &pb::LinuxResources| {
        let unsigned = |message: Message, name: &str, number: u64| {
            if number == 0 { message } else { message.put(name, number.to_string()) }
        };
        let message =
            of().long("memory", resources.memory).long("memorySwap", resources.memory_swap);
        let message = unsigned(message, "cpuShares", resources.cpu_shares);
        unsigned(message, "cpuPeriod", resources.cpu_period)
            .long("cpuQuota", resources.cpu_quota)
            .text("cpusetCpus", &resources.cpuset_cpus)
            .text("cpusetMems", &resources.cpuset_mems)
            .end()
    };
    of().flag("ignoreCache", metadata.ignore_cache)
        .map("description", &metadata.description, |text| text.clone().into())
        .message("exportCache", &metadata.export_cache, cache)
        .map("caps", &metadata.caps, |is_on| (*is_on).into())
        .message("progressGroup", &metadata.progress_group, progress_group)
        .message("linuxResources", &metadata.linux_resources, resources)
        .end()
}

fn progress_group(group: &pb::ProgressGroup) -> Value {
    of().text("id", &group.id).text("name", &group.name).flag("weak", group.weak).end()
}

/// What is said about a step, which upstream writes as Go writes any value: numbers are numbers.
fn said(metadata: &pb::OpMetadata) -> Value {
    let cache = |cache: &pb::ExportCache| of().flag("Value", cache.value).end();
    let resources = |resources: &pb::LinuxResources| {
        let unsigned = |message: Message, name: &str, number: u64| {
            if number == 0 { message } else { message.put(name, number) }
        };
        let message =
            of().number("memory", resources.memory).number("memorySwap", resources.memory_swap);
        let message = unsigned(message, "cpuShares", resources.cpu_shares);
        unsigned(message, "cpuPeriod", resources.cpu_period)
            .number("cpuQuota", resources.cpu_quota)
            .text("cpusetCpus", &resources.cpuset_cpus)
            .text("cpusetMems", &resources.cpuset_mems)
            .end()
    };
    of().flag("ignore_cache", metadata.ignore_cache)
        .map("description", &metadata.description, |text| text.clone().into())
        .message("export_cache", &metadata.export_cache, cache)
        .map("caps", &metadata.caps, |is_on| (*is_on).into())
        .message("progress_group", &metadata.progress_group, progress_group)
        .message("linux_resources", &metadata.linux_resources, resources)
        .end()
}

fn source(source: &pb::Source) -> Value {
    let info = |info: &pb::SourceInfo| {
        of().text("filename", &info.filename)
            .bytes("data", &info.data)
            .message("definition", &info.definition, definition)
            .text("language", &info.language)
            .end()
    };
    of().map("locations", &source.locations, |at| {
        of().list("locations", &at.locations, location).end()
    })
    .list("infos", &source.infos, info)
    .end()
}

fn location(location: &pb::Location) -> Value {
    let position = |position: &pb::Position| {
        let line = of().number("line", position.line.into());
        line.number("character", position.character.into()).end()
    };
    let range = |range: &pb::Range| {
        of().message("start", &range.start, position).message("end", &range.end, position).end()
    };
    of().number("sourceIndex", location.source_index.into())
        .list("ranges", &location.ranges, range)
        .end()
}

fn action(action: &pb::FileAction) -> Value {
    use pb::file_action::Action;
    let message = of()
        .long("input", action.input)
        .long("secondaryInput", action.secondary_input)
        .long("output", action.output);
    let message = match &action.action {
        None => message,
        Some(Action::Copy(action)) => message.put("copy", copy(action)),
        Some(Action::Mkfile(file)) => message.put(
            "mkfile",
            of().text("path", &file.path)
                .number("mode", file.mode.into())
                .bytes("data", &file.data)
                .message("owner", &file.owner, owner)
                .long("timestamp", file.timestamp)
                .end(),
        ),
        Some(Action::Mkdir(folder)) => message.put(
            "mkdir",
            of().text("path", &folder.path)
                .number("mode", folder.mode.into())
                .flag("makeParents", folder.make_parents)
                .message("owner", &folder.owner, owner)
                .long("timestamp", folder.timestamp)
                .end(),
        ),
        Some(Action::Rm(removal)) => message.put(
            "rm",
            of().text("path", &removal.path)
                .flag("allowNotFound", removal.allow_not_found)
                .flag("allowWildcard", removal.allow_wildcard)
                .end(),
        ),
        Some(Action::Symlink(link)) => message.put(
            "symlink",
            of().text("oldpath", &link.oldpath)
                .text("newpath", &link.newpath)
                .message("owner", &link.owner, owner)
                .long("timestamp", link.timestamp)
                .end(),
        ),
    };
    message.end()
}

fn copy(copy: &pb::FileActionCopy) -> Value {
    of().text("src", &copy.src)
        .text("dest", &copy.dest)
        .message("owner", &copy.owner, owner)
        .number("mode", copy.mode.into())
        .flag("followSymlink", copy.follow_symlink)
        .flag("dirCopyContents", copy.dir_copy_contents)
        .flag("attemptUnpackDockerCompatibility", copy.attempt_unpack_docker_compatibility)
        .flag("createDestPath", copy.create_dest_path)
        .flag("allowWildcard", copy.allow_wildcard)
        .flag("allowEmptyWildcard", copy.allow_empty_wildcard)
        .long("timestamp", copy.timestamp)
        .texts("includePatterns", &copy.include_patterns)
        .texts("excludePatterns", &copy.exclude_patterns)
        .flag("alwaysReplaceExistingDestPaths", copy.always_replace_existing_dest_paths)
        .text("modeStr", &copy.mode_str)
        .texts("requiredPaths", &copy.required_paths)
        .end()
}

fn owner(owner: &pb::ChownOpt) -> Value {
    let one = |who: &pb::UserOpt| match &who.user {
        None => of().end(),
        // As one of several, a number is there even where it is 0.
        Some(pb::user_opt::User::ById(id)) => of().put("byID", *id).end(),
        Some(pb::user_opt::User::ByName(name)) => {
            let name = of().text("name", &name.name).long("input", name.input);
            of().put("byName", name.end()).end()
        }
    };
    of().message("user", &owner.user, one).message("group", &owner.group, one).end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_values_are_left_out_and_large_numbers_are_text() {
        let mount = pb::Mount {
            input: -1,
            dest: "/r".into(),
            mount_type: pb::MountType::Cache as i32,
            cache_opt: Some(pb::CacheOpt { id: "c".into(), sharing: 1 }),
            content_cache: 9,
            ..pb::Mount::default()
        };
        let meta = pb::Meta {
            args: vec!["a".into()],
            proxy_env: Some(pb::ProxyEnv { http_proxy: "p".into(), ..Default::default() }),
            ulimit: vec![pb::Ulimit { name: "core".into(), soft: 0, hard: -1 }],
            valid_exit_codes: vec![0, 3],
            ..pb::Meta::default()
        };
        let exec = pb::ExecOp {
            meta: Some(meta),
            mounts: vec![mount],
            network: 2,
            cdi_devices: vec![pb::CdiDevice { name: "v/c".into(), optional: true }],
            ..pb::ExecOp::default()
        };
        let op = pb::Op {
            inputs: vec![pb::Input { digest: "sha256:x".into(), index: 1 }],
            op: Some(pb::op::Op::Exec(exec)),
            platform: Some(pb::Platform { os: "linux".into(), ..Default::default() }),
            constraints: Some(pb::WorkerConstraints::default()),
        };
        assert_eq!(
            step(&op).to_string(),
            r#"{"inputs":[{"digest":"sha256:x","index":"1"}],"exec":{"meta":{"args":["a"],"proxyEnv":{"httpProxy":"p"},"ulimit":[{"Name":"core","Hard":"-1"}],"validExitCodes":[0,3]},"mounts":[{"input":"-1","dest":"/r","mountType":"CACHE","cacheOpt":{"ID":"c","sharing":"PRIVATE"},"contentCache":9}],"network":"NONE","cdiDevices":[{"name":"v/c","optional":true}]},"platform":{"OS":"linux"},"constraints":{}}"#
        );
        let root = pb::UserOpt { user: Some(pb::user_opt::User::ById(0)) };
        let file = pb::FileAction {
            secondary_input: -1,
            action: Some(pb::file_action::Action::Mkfile(pb::FileActionMkFile {
                path: "/f".into(),
                mode: 420,
                data: b"x".to_vec(),
                owner: Some(pb::ChownOpt { user: Some(root), group: None }),
                timestamp: -1,
            })),
            ..pb::FileAction::default()
        };
        assert_eq!(
            action(&file).to_string(),
            r#"{"secondaryInput":"-1","mkfile":{"path":"/f","mode":420,"data":"eA==","owner":{"user":{"byID":0}},"timestamp":"-1"}}"#
        );
        let resources = pb::LinuxResources { memory: 7, cpu_shares: 8, ..Default::default() };
        let about = pb::OpMetadata { linux_resources: Some(resources), ..Default::default() };
        assert_eq!(said(&about).to_string(), r#"{"linux_resources":{"memory":7,"cpuShares":8}}"#);
        assert_eq!(
            metadata(&about).to_string(),
            r#"{"linuxResources":{"memory":"7","cpuShares":"8"}}"#
        );
    }
}
