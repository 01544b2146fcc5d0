//! Operations of a graph as JSON, in the form that messages have in JSON. Clients make the operation out of it again: to
//! execute it another time, and to find it in their own graph by the digest of its bytes. So nothing may be missing.

use serde_json::{Map, Value, json};
use slipway_spec::llb::pb;

/// Returns an operation that executes a process. Of others only what surrounds them is told.
pub(super) fn operation(op: &pb::Op) -> Value {
    let mut known = Map::new();
    let inputs = op.inputs.iter();
    let inputs: Vec<Value> =
        inputs.map(|at| json!({ "digest": at.digest, "index": number(at.index) })).collect();
    known.insert("inputs".into(), inputs.into());
    if let Some(pb::op::Op::Exec(op)) = &op.op {
        known.insert("exec".into(), exec(op));
    }
    if let Some(platform) = &op.platform {
        let value = json!({
            "Architecture": platform.architecture,
            "OS": platform.os,
            "Variant": platform.variant,
            "OSVersion": platform.os_version,
            "OSFeatures": platform.os_features,
        });
        known.insert("platform".into(), value);
    }
    if let Some(constraints) = &op.constraints {
        known.insert("constraints".into(), json!({ "filter": constraints.filter }));
    }
    known.into()
}

/// Numbers of 64 bits are text in this form of JSON.
fn number(value: i64) -> String {
    value.to_string()
}

fn exec(op: &pb::ExecOp) -> Value {
    let secrets = op.secretenv.iter().map(|variable| {
        json!({ "ID": variable.id, "name": variable.name, "optional": variable.optional })
    });
    let devices = op.cdi_devices.iter();
    let devices = devices.map(|at| json!({ "name": at.name, "optional": at.optional }));
    let mut known = json!({
        "mounts": op.mounts.iter().map(mount).collect::<Vec<_>>(),
        "network": op.network,
        "security": op.security,
        "secretenv": secrets.collect::<Vec<_>>(),
        "cdiDevices": devices.collect::<Vec<_>>(),
    });
    if let Some(of) = &op.meta {
        known["meta"] = meta(of);
    }
    known
}

fn meta(meta: &pb::Meta) -> Value {
    let hosts = meta.extra_hosts.iter().map(|at| json!({ "Host": at.host, "IP": at.ip }));
    let limits = meta.ulimit.iter();
    let limits = limits
        .map(|at| json!({ "Name": at.name, "Soft": number(at.soft), "Hard": number(at.hard) }));
    let mut known = json!({
        "args": meta.args,
        "env": meta.env,
        "cwd": meta.cwd,
        "user": meta.user,
        "extraHosts": hosts.collect::<Vec<_>>(),
        "hostname": meta.hostname,
        "ulimit": limits.collect::<Vec<_>>(),
        "cgroupParent": meta.cgroup_parent,
        "removeMountStubsRecursive": meta.remove_mount_stubs_recursive,
        "validExitCodes": meta.valid_exit_codes,
    });
    if let Some(proxy) = &meta.proxy_env {
        known["proxyEnv"] = json!({
            "httpProxy": proxy.http_proxy,
            "httpsProxy": proxy.https_proxy,
            "ftpProxy": proxy.ftp_proxy,
            "noProxy": proxy.no_proxy,
            "allProxy": proxy.all_proxy,
        });
    }
    known
}

fn mount(mount: &pb::Mount) -> Value {
    let mut known = json!({
        "input": number(mount.input),
        "selector": mount.selector,
        "dest": mount.dest,
        "output": number(mount.output),
        "readonly": mount.readonly,
        "mountType": mount.mount_type,
        "resultID": mount.result_id,
        "contentCache": mount.content_cache,
    });
    if let Some(tmpfs) = &mount.tmpfs_opt {
        known["TmpfsOpt"] = json!({ "size": number(tmpfs.size) });
    }
    if let Some(cache) = &mount.cache_opt {
        known["cacheOpt"] = json!({ "ID": cache.id, "sharing": cache.sharing });
    }
    if let Some(secret) = &mount.secret_opt {
        known["secretOpt"] = json!({
            "ID": secret.id,
            "uid": secret.uid,
            "gid": secret.gid,
            "mode": secret.mode,
            "optional": secret.optional,
        });
    }
    if let Some(ssh) = &mount.ssh_opt {
        known["SSHOpt"] = json!({
            "ID": ssh.id,
            "uid": ssh.uid,
            "gid": ssh.gid,
            "mode": ssh.mode,
            "optional": ssh.optional,
        });
    }
    known
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_makes_the_digest_of_an_operation_is_told() {
        let op = pb::Op {
            inputs: vec![pb::Input { digest: "sha256:1".into(), index: 2 }],
            op: Some(pb::op::Op::Exec(pb::ExecOp {
                meta: Some(pb::Meta {
                    args: vec!["a".into()],
                    env: vec!["E=1".into()],
                    cwd: "/w".into(),
                    user: "u".into(),
                    proxy_env: Some(pb::ProxyEnv {
                        http_proxy: "h".into(),
                        https_proxy: "s".into(),
                        ftp_proxy: "f".into(),
                        no_proxy: "n".into(),
                        all_proxy: "p".into(),
                    }),
                    extra_hosts: vec![pb::HostIp { host: "h".into(), ip: "1.2.3.4".into() }],
                    hostname: "hn".into(),
                    ulimit: vec![pb::Ulimit { name: "nofile".into(), soft: 1, hard: 2 }],
                    cgroup_parent: "c".into(),
                    remove_mount_stubs_recursive: true,
                    valid_exit_codes: vec![3],
                }),
                mounts: vec![pb::Mount {
                    input: -1,
                    selector: "s".into(),
                    dest: "/d".into(),
                    output: 1,
                    readonly: true,
                    mount_type: 3,
                    tmpfs_opt: Some(pb::TmpfsOpt { size: 5 }),
                    cache_opt: Some(pb::CacheOpt { id: "c".into(), sharing: 2 }),
                    secret_opt: None,
                    ssh_opt: None,
                    result_id: "r".into(),
                    content_cache: 2,
                }],
                network: 2,
                security: 1,
                secretenv: vec![],
                cdi_devices: vec![pb::CdiDevice { name: "v/c=d".into(), optional: true }],
            })),
            platform: Some(pb::Platform {
                architecture: "arm".into(),
                os: "linux".into(),
                variant: "v7".into(),
                os_version: "1".into(),
                os_features: vec!["x".into()],
            }),
            constraints: Some(pb::WorkerConstraints { filter: vec!["f".into()] }),
        };
        let wanted = json!({
            "inputs": [{ "digest": "sha256:1", "index": "2" }],
            "exec": {
                "meta": {
                    "args": ["a"], "env": ["E=1"], "cwd": "/w", "user": "u",
                    "proxyEnv": {
                        "httpProxy": "h", "httpsProxy": "s", "ftpProxy": "f",
                        "noProxy": "n", "allProxy": "p"
                    },
                    "extraHosts": [{ "Host": "h", "IP": "1.2.3.4" }],
                    "hostname": "hn",
                    "ulimit": [{ "Name": "nofile", "Soft": "1", "Hard": "2" }],
                    "cgroupParent": "c",
                    "removeMountStubsRecursive": true,
                    "validExitCodes": [3]
                },
                "mounts": [{
                    "input": "-1", "selector": "s", "dest": "/d", "output": "1",
                    "readonly": true, "mountType": 3,
                    "TmpfsOpt": { "size": "5" }, "cacheOpt": { "ID": "c", "sharing": 2 },
                    "resultID": "r", "contentCache": 2
                }],
                "network": 2, "security": 1, "secretenv": [],
                "cdiDevices": [{ "name": "v/c=d", "optional": true }]
            },
            "platform": {
                "Architecture": "arm", "OS": "linux", "Variant": "v7", "OSVersion": "1",
                "OSFeatures": ["x"]
            },
            "constraints": { "filter": ["f"] }
        });
        assert_eq!(operation(&op), wanted);
    }
}
