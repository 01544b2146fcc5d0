//! Caches that other machines write and read: in a registry, in a folder, in an image.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use slipway_tests::{BASE, Context, Registry, Sandbox, Server};

/// A Dockerfile of two stages whose steps report to a server each time that they are executed, and write what no second
/// run would write.
fn counted(sandbox: &Sandbox, counter: &Server) -> Context {
    let context = sandbox.context("context");
    context.file("source", "source\n").file("last", "last\n").dockerfile(&format!(
        "FROM {BASE} AS build\nCOPY source /source\n\
         RUN wget -q -O /dev/null http://{0}/compile && cat /source /proc/sys/kernel/random/uuid > /program\n\
         FROM {BASE}\nRUN wget -q -O /dev/null http://{0}/prepare && cat /proc/sys/kernel/random/uuid > /id\n\
         COPY --from=build /program /program\nRUN wget -q -O /dev/null http://{0}/check && test -s /program\n\
         COPY last /last\n",
        counter.host()
    ));
    // Another machine's copy of the files is as old.
    context.touch("source", 1_000_000_000).touch("last", 1_000_000_000);
    context
}

fn executed(counter: &Server) -> Vec<String> {
    let mut executed: Vec<_> = counter.requests().into_iter().map(|r| r.path).collect();
    counter.forget();
    executed.sort();
    executed
}

const ALL: [&str; 3] = ["/check", "/compile", "/prepare"];

/// Two machines with the same context.
struct Machines {
    first: Sandbox,
    second: Sandbox,
    counter: Server,
}

impl Machines {
    fn new() -> Self {
        Self {
            first: Sandbox::with_base(),
            second: Sandbox::with_base(),
            counter: Server::counter(),
        }
    }

    /// Builds on the first machine with one set of options, on the second one with another; returns what the second one
    /// executed, whether both images are the same, and what the second one said.
    fn build(&self, first: &[&str], second: &[&str]) -> (Vec<String>, bool, String) {
        let id = |sandbox: &Sandbox, options: &[&str]| {
            let file = sandbox.arg("id");
            let context = counted(sandbox, &self.counter);
            // Times are part of digests, and the machines do not build at the same time.
            let all = options.iter().copied();
            let all =
                all.chain(["--iidfile", &file, "--build-arg", "SOURCE_DATE_EPOCH=1700000000"]);
            let ran = sandbox.build(&context, all);
            (fs::read_to_string(&file).expect("the id of the image is written"), ran.stderr)
        };
        let (one, _) = id(&self.first, first);
        assert_eq!(executed(&self.counter), ALL);
        let (two, said) = id(&self.second, second);
        (executed(&self.counter), one == two, said)
    }
}

#[test]
fn a_folder_carries_a_build_to_another_machine() {
    for mode in ["min", "max"] {
        let machines = Machines::new();
        let to = format!("type=local,dest={},mode={mode}", machines.first.arg("cache"));
        let from = format!("type=local,src={}", machines.first.arg("cache"));
        let (ran, same, said) = machines
            .build(&["-t", "app:1", "--cache-to", &to], &["-t", "app:1", "--cache-from", &from]);
        assert_eq!(ran, [""; 0], "{mode}: {said}");
        assert!(same, "{mode}: the image has another digest");
        assert!(said.contains("importing cache manifest from local:"), "{said}");
        assert!(said.contains("CACHED"), "{said}");
        machines.second.run(["run", "--rm", "app:1", "test", "-s", "/program"]);
        machines.second.assert_nothing_left();
    }
}

#[test]
fn a_registry_carries_a_build_to_another_machine() {
    let registry = Registry::start();
    for (name, options) in [
        ("min", ""),
        ("max", ",mode=max"),
        ("index", ",mode=max,image-manifest=false"),
        ("docker", ",mode=max,oci-mediatypes=false"),
        ("zstd", ",mode=max,compression=zstd,force-compression=true"),
    ] {
        let machines = Machines::new();
        let cache = registry.image(&format!("cache:{name}"));
        let to = format!("type=registry,ref={cache}{options}");
        let (ran, same, said) = machines
            .build(&["-t", "app:1", "--cache-to", &to], &["-t", "app:1", "--cache-from", &cache]);
        assert_eq!(ran, [""; 0], "{name}: {said}");
        assert!(same || name == "zstd", "{name}: the image has another digest");
        assert!(said.contains(&format!("importing cache manifest from {cache}")), "{said}");
        // Other tools take it for what it is.
        let raw = registry.skopeo(&["inspect", "--raw"], &format!("cache:{name}"));
        assert!(raw.contains("application/vnd.buildkit.cacheconfig.v0"), "{raw}");
        let index = raw.contains("\"manifests\"");
        assert_eq!(index, ["index", "docker"].contains(&name), "{raw}");
    }
}

#[test]
fn an_image_carries_the_steps_of_its_own_layers() {
    let registry = Registry::start();
    for arguments in
        [&["--cache-to", "type=inline"][..], &["--build-arg", "BUILDKIT_INLINE_CACHE=1"]]
    {
        let machines = Machines::new();
        let image = registry.image("app:inline");
        let first: Vec<&str> = ["-t", &image, "--push"].iter().chain(arguments).copied().collect();
        let (ran, _, said) = machines.build(&first, &["-t", "app:1", "--cache-from", &image]);
        assert_eq!(ran, [""; 0], "{said}");
    }
}

#[test]
fn a_change_runs_what_depends_on_it_and_nothing_else() {
    let machines = Machines::new();
    let to = format!("type=local,dest={},mode=max", machines.first.arg("cache"));
    let from = format!("type=local,src={}", machines.first.arg("cache"));
    let context = counted(&machines.first, &machines.counter);
    machines.first.build(&context, ["-t", "app:1", "--cache-to", &to]);
    assert_eq!(executed(&machines.counter), ALL);
    let context = counted(&machines.second, &machines.counter);
    context.file("source", "changed\n");
    machines.second.build(&context, ["-t", "app:1", "--cache-from", &from]);
    assert_eq!(executed(&machines.counter), ["/check", "/compile"]);
}

#[test]
fn platforms_share_one_cache() {
    let registry = Registry::start();
    let counter = Server::counter();
    let cache = registry.image("cache:both");
    let both = ["-t", "app:1", "--platform", "linux/amd64,linux/arm64"];
    let run = |options: &[&str]| {
        let sandbox = Sandbox::with_base();
        let context = sandbox.context("context");
        context.dockerfile(&format!(
            "FROM {BASE}\nARG TARGETARCH\n\
             RUN wget -q -O /dev/null http://{}/$TARGETARCH && cat /proc/sys/kernel/random/uuid > /id\n",
            counter.host()
        ));
        sandbox.build(&context, both.iter().chain(options).copied());
        executed(&counter)
    };
    let to = format!("type=registry,ref={cache},mode=max");
    assert_eq!(run(&["--cache-to", &to]), ["/amd64", "/arm64"]);
    assert_eq!(run(&["--cache-from", &cache]), [""; 0]);
}

#[test]
fn a_cache_that_is_damaged_or_not_there_costs_time_alone() {
    let machines = Machines::new();
    let folder = machines.first.path("cache");
    let to = format!("type=local,dest={},mode=max", folder.display());
    let from = format!("type=local,src={}", folder.display());
    let context = counted(&machines.first, &machines.counter);
    machines.first.build(&context, ["-t", "app:1", "--cache-to", &to]);
    executed(&machines.counter);
    for entry in fs::read_dir(folder.join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        if bytes.starts_with(b"{") {
            continue;
        }
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(&path, bytes).unwrap();
    }
    let context = counted(&machines.second, &machines.counter);
    let ran = machines.second.build(&context, ["-t", "app:1", "--cache-from", &from]);
    assert_eq!(executed(&machines.counter), ALL, "{}", ran.stderr);
    assert!(ran.stderr.contains("is not used any more"), "{}", ran.stderr);
    machines.second.run(["run", "--rm", "app:1", "test", "-s", "/program"]);
    machines.second.assert_nothing_left();

    let third = Sandbox::with_base();
    let context = counted(&third, &machines.counter);
    let nowhere = format!("type=local,src={}", third.arg("nowhere"));
    let no_registry = "127.0.0.1:1/no/cache:1";
    let ran = third
        .build(&context, ["-t", "app:1", "--cache-from", &nowhere, "--cache-from", no_registry]);
    assert_eq!(executed(&machines.counter), ALL);
    assert!(ran.stderr.contains("importing cache manifest from 127.0.0.1:1/no/cache:1"));
}

#[test]
fn a_cache_that_cannot_be_written_is_an_error_unless_that_was_allowed() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    context.dockerfile(&format!("FROM {BASE}\nRUN echo x > /x\n"));
    let to = "type=registry,ref=127.0.0.1:1/no/cache:1";
    let failed = sandbox.build_fails(&context, ["-t", "app:1", "--cache-to", to]);
    assert!(failed.stderr.contains("exporting cache to registry"), "{}", failed.stderr);
    sandbox.build(&context, ["-t", "app:1", "--cache-to", &format!("{to},ignore-error=true")]);
    for (flag, value, message) in [
        ("--cache-to", "type=gha", "unknown cache exporter: \"gha\""),
        ("--cache-from", "type=s3,bucket=b", "unknown cache importer: \"s3\""),
        ("--cache-to", "type=local", "dest= is missing"),
    ] {
        let failed = sandbox.build_fails(&context, [flag, value]);
        assert!(failed.stderr.contains(message), "{}", failed.stderr);
    }
}

#[test]
fn no_secret_is_in_a_cache() {
    let sandbox = Sandbox::with_base();
    let context = sandbox.context("context");
    fs::write(sandbox.path("token"), "the-secret-token").unwrap();
    context.dockerfile(&format!(
        "FROM {BASE}\nRUN --mount=type=secret,id=token --mount=type=cache,target=/kept \
         cp /run/secrets/token /kept/token && echo nothing-to-hide > /done\n"
    ));
    let folder = sandbox.path("cache");
    let to = format!(
        "type=local,dest={},mode=max,compression=uncompressed,force-compression=true",
        folder.display()
    );
    let secret = format!("id=token,src={}", sandbox.arg("token"));
    sandbox.build(&context, ["-t", "app:1", "--cache-to", &to, "--secret", &secret]);
    let mut found = 0;
    for entry in fs::read_dir(folder.join("blobs/sha256")).unwrap() {
        let bytes = fs::read(entry.unwrap().path()).unwrap();
        let has = |text: &str| bytes.windows(text.len()).any(|part| part == text.as_bytes());
        assert!(!has("the-secret-token"));
        found += usize::from(has("nothing-to-hide\n"));
    }
    assert_eq!(found, 1, "the layer itself is there, uncompressed");
}
