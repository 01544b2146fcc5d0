//! Operations of a graph as JSON.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::pb;

/// How messages become JSON. Either way, what has its usual value is left out, and bytes are text in base64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As protobuf defines it: numbers of 64 bits are text, enumerations have names.
    Protobuf,
    /// As Go writes any value: numbers are numbers, and one of several kinds is in a field of its own.
    Go,
}

/// The fields of a message.
struct Message(Form, Map<String, Value>);

impl Message {
    fn put(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.1.insert(name.into(), value.into());
        self
    }

    fn text(self, name: &str, text: &str) -> Self {
        if text.is_empty() { self } else { self.put(name, text) }
    }

    /// A number of 64 bits.
    fn long(self, name: &str, number: i64) -> Self {
        match self.0 {
            _ if number == 0 => self,
            Form::Protobuf => self.put(name, number.to_string()),
            Form::Go => self.put(name, number),
        }
    }

    /// As [`long`](Self::long).
    fn unsigned(self, name: &str, number: u64) -> Self {
        match self.0 {
            _ if number == 0 => self,
            Form::Protobuf => self.put(name, number.to_string()),
            Form::Go => self.put(name, number),
        }
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
    fn choice(self, name: &str, number: i32, names: &[&str]) -> Self {
        match usize::try_from(number).ok().and_then(|at| names.get(at)) {
            _ if number == 0 => self,
            Some(text) if self.0 == Form::Protobuf => self.put(name, *text),
            _ => self.put(name, number),
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
        Value::Object(self.1)
    }
}

impl Form {
    fn of(self) -> Message {
        Message(self, Map::new())
    }

    /// Returns an operation.
    pub fn step(self, op: &pb::Op) -> Value {
        let input = |input: &pb::Input| {
            self.of().text("digest", &input.digest).long("index", input.index).end()
        };
        let kind = match &op.op {
            None => None,
            Some(pb::op::Op::Exec(op)) => Some(("exec", self.exec(op))),
            Some(pb::op::Op::Source(op)) => {
                let source = self.of().text("identifier", &op.identifier);
                let source = source.map("attrs", &op.attrs, |text| text.clone().into());
                Some(("source", source.end()))
            }
            Some(pb::op::Op::File(op)) => {
                let file = self.of().list("actions", &op.actions, |it| self.action(it));
                Some(("file", file.end()))
            }
            Some(pb::op::Op::Build(op)) => Some(("build", self.build(op))),
            Some(pb::op::Op::Merge(op)) => {
                let input = |input: &pb::MergeInput| self.of().long("input", input.input).end();
                Some(("merge", self.of().list("inputs", &op.inputs, input).end()))
            }
            Some(pb::op::Op::Diff(op)) => {
                let lower = |side: &pb::LowerDiffInput| self.of().long("input", side.input).end();
                let upper = |side: &pb::UpperDiffInput| self.of().long("input", side.input).end();
                let diff = self.of().message("lower", &op.lower, lower);
                Some(("diff", diff.message("upper", &op.upper, upper).end()))
            }
            Some(pb::op::Op::Passthrough(op)) => {
                let outputs = |output: &i64| self.always(*output);
                let op = self.of().text("id", &op.id).list("outputs", &op.outputs, outputs);
                Some(("passthrough", op.end()))
            }
        };
        let message = self.of().list("inputs", &op.inputs, input);
        self.one_of(message, "Op", kind)
            .message("platform", &op.platform, |it| self.platform(it))
            .message("constraints", &op.constraints, |constraints| {
                self.of().texts("filter", &constraints.filter).end()
            })
            .end()
    }

    /// Adds one of several kinds, which Go has in a field of its own.
    fn one_of(self, message: Message, field: &str, kind: Option<(&str, Value)>) -> Message {
        let add = |message: Message| match kind {
            Some((name, value)) => message.put(name, value),
            None => message,
        };
        match self {
            Self::Protobuf => add(message),
            Self::Go => message.put(field, add(self.of()).end()),
        }
    }

    /// A number of 64 bits that is there even where it is 0.
    fn always(self, number: i64) -> Value {
        match self {
            Self::Protobuf => number.to_string().into(),
            Self::Go => number.into(),
        }
    }

    fn platform(self, platform: &pb::Platform) -> Value {
        self.of()
            .text("Architecture", &platform.architecture)
            .text("OS", &platform.os)
            .text("Variant", &platform.variant)
            .text("OSVersion", &platform.os_version)
            .texts("OSFeatures", &platform.os_features)
            .end()
    }

    fn exec(self, op: &pb::ExecOp) -> Value {
        let secret = |secret: &pb::SecretEnv| {
            let message = self.of().text("ID", &secret.id).text("name", &secret.name);
            message.flag("optional", secret.optional).end()
        };
        let device = |device: &pb::CdiDevice| {
            self.of().text("name", &device.name).flag("optional", device.optional).end()
        };
        self.of()
            .message("meta", &op.meta, |it| self.meta(it))
            .list("mounts", &op.mounts, |it| self.mount(it))
            .choice("network", op.network, &["UNSET", "HOST", "NONE"])
            .choice("security", op.security, &["SANDBOX", "INSECURE"])
            .list("secretenv", &op.secretenv, secret)
            .list("cdiDevices", &op.cdi_devices, device)
            .end()
    }

    fn meta(self, meta: &pb::Meta) -> Value {
        let proxy = |proxy: &pb::ProxyEnv| {
            self.of()
                .text("httpProxy", &proxy.http_proxy)
                .text("httpsProxy", &proxy.https_proxy)
                .text("ftpProxy", &proxy.ftp_proxy)
                .text("noProxy", &proxy.no_proxy)
                .text("allProxy", &proxy.all_proxy)
                .end()
        };
        let host =
            |host: &pb::HostIp| self.of().text("Host", &host.host).text("IP", &host.ip).end();
        let limit = |limit: &pb::Ulimit| {
            self.of()
                .text("Name", &limit.name)
                .long("Soft", limit.soft)
                .long("Hard", limit.hard)
                .end()
        };
        self.of()
            .texts("args", &meta.args)
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

    fn mount(self, mount: &pb::Mount) -> Value {
        let tmpfs = |options: &pb::TmpfsOpt| self.of().long("size", options.size).end();
        let cache = |options: &pb::CacheOpt| {
            let sharing = ["SHARED", "PRIVATE", "LOCKED"];
            self.of().text("ID", &options.id).choice("sharing", options.sharing, &sharing).end()
        };
        let file = |id: &str, (uid, gid, mode): (u32, u32, u32), optional: bool| {
            self.of()
                .text("ID", id)
                .number("uid", uid.into())
                .number("gid", gid.into())
                .number("mode", mode.into())
                .flag("optional", optional)
                .end()
        };
        self.of()
            .long("input", mount.input)
            .text("selector", &mount.selector)
            .text("dest", &mount.dest)
            .long("output", mount.output)
            .flag("readonly", mount.readonly)
            .choice("mountType", mount.mount_type, &["BIND", "SECRET", "SSH", "CACHE", "TMPFS"])
            .message("TmpfsOpt", &mount.tmpfs_opt, tmpfs)
            .message("cacheOpt", &mount.cache_opt, cache)
            .message("secretOpt", &mount.secret_opt, |secret| {
                file(&secret.id, (secret.uid, secret.gid, secret.mode), secret.optional)
            })
            .message("SSHOpt", &mount.ssh_opt, |ssh| {
                file(&ssh.id, (ssh.uid, ssh.gid, ssh.mode), ssh.optional)
            })
            .text("resultID", &mount.result_id)
            .choice("contentCache", mount.content_cache, &["DEFAULT", "ON", "OFF"])
            .end()
    }

    fn build(self, op: &pb::BuildOp) -> Value {
        self.of()
            .long("builder", op.builder)
            .map("inputs", &op.inputs, |input| self.of().long("input", input.input).end())
            .message("def", &op.def, |it| self.definition(it))
            .map("attrs", &op.attrs, |text| text.clone().into())
            .end()
    }

    fn definition(self, definition: &pb::Definition) -> Value {
        self.of()
            .list("def", &definition.def, |bytes| base64(bytes).into())
            .map("metadata", &definition.metadata, |it| self.metadata(it))
            .message("Source", &definition.source, |it| self.source(it))
            .end()
    }

    /// Returns what is said about a step.
    pub fn metadata(self, metadata: &pb::OpMetadata) -> Value {
        let cache = |cache: &pb::ExportCache| self.of().flag("Value", cache.value).end();
        let resources = |resources: &pb::LinuxResources| {
            self.of()
                .long("memory", resources.memory)
                .long("memorySwap", resources.memory_swap)
                .unsigned("cpuShares", resources.cpu_shares)
                .unsigned("cpuPeriod", resources.cpu_period)
                .long("cpuQuota", resources.cpu_quota)
                .text("cpusetCpus", &resources.cpuset_cpus)
                .text("cpusetMems", &resources.cpuset_mems)
                .end()
        };
        let name = |protobuf: &'static str, go: &'static str| match self {
            Self::Protobuf => protobuf,
            Self::Go => go,
        };
        self.of()
            .flag(name("ignoreCache", "ignore_cache"), metadata.ignore_cache)
            .map("description", &metadata.description, |text| text.clone().into())
            .message(name("exportCache", "export_cache"), &metadata.export_cache, cache)
            .map("caps", &metadata.caps, |is_on| (*is_on).into())
            .message(name("progressGroup", "progress_group"), &metadata.progress_group, |it| {
                self.progress_group(it)
            })
            .message(
                name("linuxResources", "linux_resources"),
                &metadata.linux_resources,
                resources,
            )
            .end()
    }

    fn progress_group(self, group: &pb::ProgressGroup) -> Value {
        self.of().text("id", &group.id).text("name", &group.name).flag("weak", group.weak).end()
    }

    /// Returns where steps were written.
    pub fn source(self, source: &pb::Source) -> Value {
        let info = |info: &pb::SourceInfo| {
            self.of()
                .text("filename", &info.filename)
                .bytes("data", &info.data)
                .message("definition", &info.definition, |it| self.definition(it))
                .text("language", &info.language)
                .end()
        };
        self.of()
            .map("locations", &source.locations, |at| {
                self.of().list("locations", &at.locations, |it| self.location(it)).end()
            })
            .list("infos", &source.infos, info)
            .end()
    }

    /// Returns one place.
    pub fn location(self, location: &pb::Location) -> Value {
        let position = |position: &pb::Position| {
            let line = self.of().number("line", position.line.into());
            line.number("character", position.character.into()).end()
        };
        let range = |range: &pb::Range| {
            self.of()
                .message("start", &range.start, position)
                .message("end", &range.end, position)
                .end()
        };
        self.of()
            .number("sourceIndex", location.source_index.into())
            .list("ranges", &location.ranges, range)
            .end()
    }

    fn action(self, action: &pb::FileAction) -> Value {
        use pb::file_action::Action;
        let message = match self {
            Self::Protobuf => self
                .of()
                .long("input", action.input)
                .long("secondaryInput", action.secondary_input)
                .long("output", action.output),
            Self::Go => self
                .of()
                .put("input", action.input)
                .put("secondaryInput", action.secondary_input)
                .put("output", action.output),
        };
        let kind = match &action.action {
            None => None,
            Some(Action::Copy(action)) => Some(("copy", self.copy(action))),
            Some(Action::Mkfile(file)) => {
                let message = self
                    .of()
                    .text("path", &file.path)
                    .number("mode", file.mode.into())
                    .bytes("data", &file.data)
                    .message("owner", &file.owner, |it| self.owner(it))
                    .long("timestamp", file.timestamp);
                Some(("mkfile", message.end()))
            }
            Some(Action::Mkdir(folder)) => {
                let message = self
                    .of()
                    .text("path", &folder.path)
                    .number("mode", folder.mode.into())
                    .flag("makeParents", folder.make_parents)
                    .message("owner", &folder.owner, |it| self.owner(it))
                    .long("timestamp", folder.timestamp);
                Some(("mkdir", message.end()))
            }
            Some(Action::Rm(removal)) => {
                let message = self
                    .of()
                    .text("path", &removal.path)
                    .flag("allowNotFound", removal.allow_not_found)
                    .flag("allowWildcard", removal.allow_wildcard);
                Some(("rm", message.end()))
            }
            Some(Action::Symlink(link)) => {
                let message = self
                    .of()
                    .text("oldpath", &link.oldpath)
                    .text("newpath", &link.newpath)
                    .message("owner", &link.owner, |it| self.owner(it))
                    .long("timestamp", link.timestamp);
                Some(("symlink", message.end()))
            }
        };
        self.one_of(message, "Action", kind).end()
    }

    fn copy(self, copy: &pb::FileActionCopy) -> Value {
        self.of()
            .text("src", &copy.src)
            .text("dest", &copy.dest)
            .message("owner", &copy.owner, |it| self.owner(it))
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

    fn owner(self, owner: &pb::ChownOpt) -> Value {
        let one = |who: &pb::UserOpt| {
            let kind = match &who.user {
                None => None,
                // As one of several, a number is there even where it is 0; Go leaves it out nevertheless.
                Some(pb::user_opt::User::ById(id)) => match self {
                    Self::Protobuf => Some(("byID", Value::from(*id))),
                    Self::Go => (*id != 0).then(|| ("byId", Value::from(*id))),
                },
                Some(pb::user_opt::User::ByName(name)) => {
                    let name = self.of().text("name", &name.name).long("input", name.input);
                    Some(("byName", name.end()))
                }
            };
            self.one_of(self.of(), "User", kind).end()
        };
        self.of().message("user", &owner.user, one).message("group", &owner.group, one).end()
    }
}

fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
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
            Form::Protobuf.step(&op).to_string(),
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
            Form::Protobuf.action(&file).to_string(),
            r#"{"secondaryInput":"-1","mkfile":{"path":"/f","mode":420,"data":"eA==","owner":{"user":{"byID":0}},"timestamp":"-1"}}"#
        );
        let resources = pb::LinuxResources { memory: 7, cpu_shares: 8, ..Default::default() };
        let about = pb::OpMetadata { linux_resources: Some(resources), ..Default::default() };
        assert_eq!(
            Form::Go.metadata(&about).to_string(),
            r#"{"linux_resources":{"memory":7,"cpuShares":8}}"#
        );
        assert_eq!(
            Form::Protobuf.metadata(&about).to_string(),
            r#"{"linuxResources":{"memory":"7","cpuShares":"8"}}"#
        );
        assert_eq!(
            Form::Go.step(&op).to_string(),
            r#"{"inputs":[{"digest":"sha256:x","index":1}],"Op":{"exec":{"meta":{"args":["a"],"proxyEnv":{"httpProxy":"p"},"ulimit":[{"Name":"core","Hard":-1}],"validExitCodes":[0,3]},"mounts":[{"input":-1,"dest":"/r","mountType":3,"cacheOpt":{"ID":"c","sharing":1},"contentCache":9}],"network":2,"cdiDevices":[{"name":"v/c","optional":true}]}},"platform":{"OS":"linux"},"constraints":{}}"#
        );
        assert_eq!(
            Form::Go.action(&file).to_string(),
            r#"{"input":0,"secondaryInput":-1,"output":0,"Action":{"mkfile":{"path":"/f","mode":420,"data":"eA==","owner":{"user":{"User":{}}},"timestamp":-1}}}"#
        );
    }
}
