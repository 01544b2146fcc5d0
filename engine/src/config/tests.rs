//! Whole files.

use slipway_store::filter::Filter;

use super::*;

fn config(text: &str) -> DaemonConfig {
    let (config, warnings) = DaemonConfig::parse(text).unwrap();
    assert_eq!(warnings, []);
    config
}

fn failure(text: &str) -> (ConfigErrorKind, String) {
    let error = DaemonConfig::parse(text).unwrap_err();
    (error.kind(), error.to_string())
}

#[test]
fn an_empty_file_is_the_default() {
    assert_eq!(config(""), DaemonConfig::default());
    assert_eq!(config("\u{feff}\n\n# nothing\n"), DaemonConfig::default());
    let empty = "root = ''\n[grpc]\naddress = []\n[history]\nmaxAge = 0\nmaxEntries = 0\n";
    assert_eq!(config(empty), DaemonConfig::default());
}

#[test]
fn every_section_is_read() {
    let config = config(
        r#"
root = "/data"
insecure-entitlements = ["network.host", "security.insecure"]
proxyNetwork = true
provenanceEnvDir = "/etc/provenance"

[log]
  format = "json"
  level = "warning"

[grpc]
  address = ["unix:///run/a.sock", "tcp://0.0.0.0:1234"]
  debugAddress = "0.0.0.0:6060"
  uid = 0
  gid = 1_000
  securityDescriptor = ""
  [grpc.tls]
    cert = "/tls/cert.pem"
    key = "/tls/key.pem"
    ca = "/tls/ca.pem"

[otel]
  socketPath = "/run/otel.sock"

[cdi]
  disabled = true
  specDirs = ["/etc/cdi"]
  autoAllowed = ["vendor.test/device"]

[dns]
  nameservers = ["1.1.1.1"]
  options = ["edns0"]
  searchDomains = ["example.test"]

[history]
  maxAge = "36h"
  maxEntries = 7

[worker.oci]
  enabled = true
  platforms = ["linux/amd64", "linux/arm64"]
  snapshotter = "overlayfs"
  rootless = false
  noProcessSandbox = false
  gc = true
  reservedSpace = "10%"
  maxUsedSpace = "20GB"
  minFreeSpace = 1024
  networkMode = "host"
  cniConfigPath = "/etc/cni.json"
  cniPoolSize = 16
  binary = "/bin/runc"
  defaultCgroupParent = "builds"
  max-parallelism = 4
  [worker.oci.labels]
    "example.test/a" = "b"
  [worker.oci.stargzSnapshotter]
    noprefetch = true
  [[worker.oci.gcpolicy]]
    filters = ["type==source.local"]
    keepDuration = "48h"
    maxUsedSpace = "512MB"
  [[worker.oci.gcpolicy]]
    all = true
    keepDuration = 60
    keepBytes = "30%"

[worker.containerd]
  enabled = false
  namespace = "buildkit"
  [worker.containerd.runtime]
    name = "x"

[registry."docker.io"]
  mirrors = ["localhost:5000", "mirror.test/path"]
[registry."registry.test:5000"]
  http = true
  insecure = true
  ca = ["/ca.pem"]
  [[registry."registry.test:5000".keypair]]
    key = "/key.pem"
    cert = "/cert.pem"

[frontend."dockerfile.v0"]
  enabled = false
[frontend."gateway.v0"]
  enabled = true
  allowedRepositories = ["docker.io/docker/dockerfile"]

[system]
  platformsCacheMaxAge = "1h"
  maxRegistryConcurrency = 8

[cache.gha.sign]
  command = ["x"]
"#,
    );
    let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
    let paths = |texts: &[&str]| texts.iter().map(PathBuf::from).collect::<Vec<_>>();
    let path = |text: &str| Some(PathBuf::from(text));
    let hours = |hours: u64| Duration::from_secs(hours * 3600);
    let expected = DaemonConfig {
        root: path("/data"),
        insecure_entitlements: texts(&["network.host", "security.insecure"]),
        proxy_network: true,
        provenance_env_dir: path("/etc/provenance"),
        log: LogConfig { format: Some(LogFormat::Json), level: Some(LogLevel::Warn) },
        grpc: GrpcConfig {
            addresses: texts(&["unix:///run/a.sock", "tcp://0.0.0.0:1234"]),
            debug_address: Some("0.0.0.0:6060".into()),
            uid: Some(0),
            gid: Some(1000),
            tls: TlsConfig {
                cert: path("/tls/cert.pem"),
                key: path("/tls/key.pem"),
                ca: path("/tls/ca.pem"),
            },
        },
        otel_socket_path: path("/run/otel.sock"),
        cdi: CdiConfig {
            disabled: Some(true),
            spec_dirs: paths(&["/etc/cdi"]),
            auto_allowed: texts(&["vendor.test/device"]),
        },
        dns: Some(DnsConfig {
            nameservers: texts(&["1.1.1.1"]),
            options: texts(&["edns0"]),
            search_domains: texts(&["example.test"]),
        }),
        history: HistoryConfig { max_age: hours(36), max_entries: 7 },
        worker: WorkerConfig {
            enabled: Some(true),
            labels: [("example.test/a".into(), "b".into())].into(),
            platforms: texts(&["linux/amd64", "linux/arm64"]),
            snapshotter: Some("overlayfs".into()),
            rootless: false,
            no_process_sandbox: false,
            network_mode: NetworkMode::Host,
            default_cgroup_parent: Some("builds".into()),
            apparmor_profile: None,
            selinux: false,
            max_parallelism: Some(4),
            gc: GcConfig {
                enabled: Some(true),
                reserved_space: Some(DiskSpace::Percent(10)),
                max_used_space: Some(DiskSpace::Bytes(20 << 30)),
                min_free_space: Some(DiskSpace::Bytes(1024)),
                policies: vec![
                    GcPolicy {
                        filters: texts(&["type==source.local"]),
                        keep_duration: Some(hours(48)),
                        max_used_space: Some(DiskSpace::Bytes(512 << 20)),
                        ..GcPolicy::default()
                    },
                    GcPolicy {
                        all: true,
                        keep_duration: Some(Duration::from_secs(60)),
                        reserved_space: Some(DiskSpace::Percent(30)),
                        ..GcPolicy::default()
                    },
                ],
            },
        },
        containerd: ContainerdConfig { enabled: Some(false), address: None },
        registries: [
            (
                "docker.io".into(),
                RegistryConfig {
                    mirrors: texts(&["localhost:5000", "mirror.test/path"]),
                    ..RegistryConfig::default()
                },
            ),
            (
                "registry.test:5000".into(),
                RegistryConfig {
                    http: Some(true),
                    insecure: true,
                    ca: paths(&["/ca.pem"]),
                    key_pair: Some(KeyPair { cert: "/cert.pem".into(), key: "/key.pem".into() }),
                    ..RegistryConfig::default()
                },
            ),
        ]
        .into(),
        frontends: FrontendConfig {
            dockerfile: false,
            gateway: true,
            allowed_repositories: texts(&["docker.io/docker/dockerfile"]),
        },
        system: SystemConfig {
            platforms_cache_max_age: Some(hours(1)),
            max_registry_concurrency: Some(8),
        },
    };
    assert_eq!(config, expected);
}

#[test]
fn fragments_joined_by_a_test_suite_are_read() {
    let config = config(
        "\n\ninsecure-entitlements = [\"security.insecure\"]\n\n\n[registry.\"docker.io\"]\nmirrors=[\"localhost:41235\"]\n\n\n[otel]\nsocketPath=\"/tmp/x/otel-grpc.sock\"\n\n[cdi]\n  specDirs=[\"/tmp/x/cdi\"]\n",
    );
    assert_eq!(config.insecure_entitlements, ["security.insecure"]);
    assert_eq!(config.registries["docker.io"].mirrors, ["localhost:41235"]);
    assert_eq!(config.otel_socket_path.unwrap(), Path::new("/tmp/x/otel-grpc.sock"));
}

#[test]
fn older_ways_to_say_how_much_is_logged_count() {
    for (text, level) in [
        ("debug = true", Some(LogLevel::Debug)),
        ("trace = true\n[log]\nlevel = 'info'", Some(LogLevel::Trace)),
        ("debug = true\n[log]\nlevel = 'info'", Some(LogLevel::Info)),
        ("debug = false", None),
    ] {
        assert_eq!(config(text).log.level, level, "{text}");
    }
}

#[test]
fn unknown_keys_are_warnings_with_their_line() {
    let text = "colour = 1\nROOT = '/r'\n[worker.oci]\ngc = false\nfuture = { a = 1 }\n[worker.wasm]\nx = 1\n[registry.'a.test']\nmirror = ['b']\n[nonsense]\n";
    let (config, warnings) = DaemonConfig::parse(text).unwrap();
    assert_eq!(config.root.as_deref(), Some(Path::new("/r")));
    assert_eq!(config.worker.gc.enabled, Some(false));
    let warnings: Vec<_> = warnings.iter().map(ToString::to_string).collect();
    assert_eq!(
        warnings,
        [
            "line 1: unknown key colour is ignored",
            "line 5: unknown key worker.oci.future is ignored",
            "line 6: unknown key worker.wasm is ignored",
            "line 9: unknown key registry.\"a.test\".mirror is ignored",
            "line 10: unknown key nonsense is ignored",
        ]
    );
}

#[test]
fn values_that_make_no_sense_are_errors_with_their_place() {
    for (text, expected) in [
        ("root = 1", "line 1, column 8: root must be text, not a whole number"),
        ("\n[grpc]\naddress = 'x'", "line 3, column 11: grpc.address must be an array, not text"),
        (
            "[grpc]\naddress = ['x', 2]",
            "line 2, column 17: grpc.address must be text, not a whole number",
        ),
        ("[grpc]\nuid = -1", "line 2, column 7: grpc.uid -1 is out of range"),
        ("[grpc]\ngid = 4294967296", "line 2, column 7: grpc.gid 4294967296 is out of range"),
        ("[grpc]\nuid = '0'", "line 2, column 7: grpc.uid must be a whole number"),
        ("grpc = 1", "line 1, column 8: grpc must be a table, not a whole number"),
        ("debug = 'yes'", "line 1, column 9: debug must be true or false"),
        ("[log]\nformat = 'xml'", "line 2, column 10: log.format must be text or json"),
        (
            "[log]\nlevel = 'loud'",
            "line 2, column 9: log.level must be error, warn, info, debug or trace",
        ),
        (
            "[worker.oci]\nnetworkMode = 'mesh'",
            "line 2, column 15: worker.oci.networkMode must be auto, host, bridge or cni",
        ),
        (
            "[worker.oci]\nmaxUsedSpace = 'big'",
            "line 2, column 16: worker.oci.maxUsedSpace \"big\" is no amount of disk space; use bytes, something like \"20GB\", or \"10%\"",
        ),
        (
            "[worker.oci]\nminFreeSpace = 1.5",
            "line 2, column 16: worker.oci.minFreeSpace must be text or a whole number, not a fraction",
        ),
        (
            "[history]\nmaxAge = 'long'",
            "line 2, column 10: history.maxAge \"long\" is no duration; use seconds or something like \"48h\"",
        ),
        (
            "[worker.oci.labels]\na = 1",
            "line 2, column 5: worker.oci.labels.a must be text, not a whole number",
        ),
        (
            "[registry.'a.test']\nkeypair = [{ key = '/k' }]",
            "line 2, column 11: registry.\"a.test\".keypair needs both a key and a cert",
        ),
    ] {
        assert_eq!(failure(text), (ConfigErrorKind::Value, expected.into()), "{text}");
    }
}

#[test]
fn damaged_files_are_errors_with_file_line_and_column() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("buildkitd.toml");
    for (text, line, column) in [
        ("root = '/r'\n[grpc\n", 2, 6),
        ("a = 1\na = 2\n", 2, 1),
        ("[worker.oci]\nµ = 1\n", 2, 1),
        ("root =", 1, 7),
    ] {
        std::fs::write(&file, text).unwrap();
        let error = DaemonConfig::load(&file).unwrap_err();
        assert_eq!(error.kind(), ConfigErrorKind::Syntax, "{text:?}");
        let place = format!("{}:{line}:{column}: ", file.display());
        assert!(error.to_string().starts_with(&place), "{error}");
        assert!(!error.to_string().contains('\n'), "{error}");
    }
    std::fs::write(&file, b"root = '\xff'").unwrap();
    assert_eq!(DaemonConfig::load(&file).unwrap_err().kind(), ConfigErrorKind::Read);
    let missing = DaemonConfig::load(&folder.path().join("none")).unwrap_err();
    assert!(missing.is_missing());
    assert!(missing.to_string().contains("none cannot be read: "), "{missing}");
}

#[test]
fn registries_become_options_of_the_client() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a.crt", "b.cert", "b.key", "README"] {
        std::fs::write(folder.path().join(name), "").unwrap();
    }
    let text = format!(
        "[registry.'docker.io']\nmirrors = ['m.test/x']\n[registry.'plain.test']\nhttp = true\n[registry.'any.test']\ninsecure = true\n[registry.'both.test']\ninsecure = true\nhttp = true\n[registry.'localhost:5000']\ninsecure = true\n[registry.'[::1]:5000']\ninsecure = true\n[registry.'tls.test']\nca = ['/ca']\nkeypair = [{{ key = '/k', cert = '/c' }}]\n[registry.'dir.test']\ntlsconfigdir = [{:?}]\n",
        folder.path()
    );
    let options = config(&text).registry_options().unwrap();
    let default = HostOptions::default;
    let expected: BTreeMap<String, HostOptions> = [
        ("docker.io", HostOptions { mirrors: vec!["m.test/x".into()], ..default() }),
        ("plain.test", HostOptions { plain_http: Some(true), ..default() }),
        ("any.test", HostOptions { plain_http: Some(false), insecure: true, ..default() }),
        ("both.test", HostOptions { insecure: true, ..default() }),
        ("localhost:5000", HostOptions { insecure: true, ..default() }),
        ("[::1]:5000", HostOptions { insecure: true, ..default() }),
        (
            "tls.test",
            HostOptions {
                ca_files: vec!["/ca".into()],
                client_cert: Some(("/c".into(), "/k".into())),
                ..default()
            },
        ),
        (
            "dir.test",
            HostOptions {
                ca_files: vec![folder.path().join("a.crt")],
                client_cert: Some((folder.path().join("b.cert"), folder.path().join("b.key"))),
                ..default()
            },
        ),
    ]
    .into_iter()
    .map(|(host, options)| (host.to_owned(), options))
    .collect();
    assert_eq!(options, expected);
    let missing = "[registry.'a.test']\ntlsconfigdir = ['/nonexistent/certs']\n";
    assert!(config(missing).registry_options().unwrap_err().is_missing());
}

#[test]
fn a_second_key_pair_is_a_warning() {
    let text = "[registry.'a.test']\nkeypair = [{ key = '/k', cert = '/c' },\n  { key = '/l', cert = '/d' }]\n";
    let (config, warnings) = DaemonConfig::parse(text).unwrap();
    assert_eq!(config.registries["a.test"].key_pair.as_ref().unwrap().key, Path::new("/k"));
    assert_eq!(
        warnings.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["line 3: registry.\"a.test\".keypair has more than one pair; the first is used"]
    );
}

#[test]
fn the_usual_clean_up_depends_on_the_disk() {
    let gigabyte = 1_000_000_000;
    let rules = GcConfig::default().rules(50 * gigabyte);
    let amounts: Vec<_> = rules
        .iter()
        .map(|rule| (rule.all, rule.reserved_bytes, rule.max_used_bytes, rule.min_free_bytes))
        .collect();
    let cap = (5 * gigabyte, 40 * gigabyte, 10 * gigabyte);
    assert_eq!(
        amounts,
        [
            (false, 0, 512_000_000, 0),
            (false, cap.0, cap.1, cap.2),
            (false, cap.0, cap.1, cap.2),
            (true, cap.0, cap.1, cap.2)
        ]
    );
    let days: Vec<_> = rules.iter().map(|rule| rule.keep_duration.as_secs() / 86_400).collect();
    assert_eq!(days, [2, 60, 0, 0]);
    let large = GcConfig::default().rules(1000 * gigabyte);
    assert_eq!(
        (large[2].reserved_bytes, large[2].max_used_bytes, large[2].min_free_bytes),
        (10 * gigabyte, 100 * gigabyte, 200 * gigabyte)
    );
}

#[test]
fn the_first_of_the_usual_rules_is_about_what_is_easily_had_again() {
    let rules = GcConfig::default().rules(1 << 40);
    let filter = Filter::parse(&rules[0].filters, &["type"]).unwrap();
    let is_about = |kind: &str| filter.holds(|_| Some(kind.to_owned()));
    assert!(is_about("source.local") && is_about("exec.cachemount"));
    assert!(is_about("source.git.checkout") && !is_about("regular"));
}

#[test]
fn configured_amounts_and_rules_replace_the_usual_ones() {
    let gc = |text: &str| config(&format!("[worker.oci]\n{text}")).worker.gc;
    assert_eq!(gc("gc = false").rules(1000), []);
    let older = gc("gckeepstorage = 500").rules(1000);
    assert_eq!((older[3].reserved_bytes, older[3].max_used_bytes), (500, 0));
    let newer = gc("gckeepstorage = 500\nmaxUsedSpace = '50%'").rules(1000);
    assert_eq!((newer[3].reserved_bytes, newer[3].max_used_bytes), (0, 500));
    let own = gc("[[worker.oci.gcpolicy]]\nall = true\nkeepDuration = '1h'\nminFreeSpace = '5%'");
    assert_eq!(
        own.rules(1000),
        [GcRule {
            all: true,
            keep_duration: Duration::from_secs(3600),
            min_free_bytes: 50,
            ..GcRule::default()
        }]
    );
}
