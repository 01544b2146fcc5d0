//! A place of its own for each test, and the commands that run there.

use std::cell::RefCell;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::tools::{base_archive, repository, slipway_binary};
use crate::{Context, Registry};

/// No command of a test takes nearly as long; a longer one hangs.
const TIME_LIMIT: Duration = Duration::from_secs(180);

/// A store, a scratch directory and a configuration that no other test sees.
#[derive(Debug)]
pub struct Sandbox {
    directory: Option<TempDir>,
    commands: RefCell<Vec<String>>,
}

impl Sandbox {
    /// Makes an empty one.
    pub fn new() -> Self {
        // On the file system of the work tree, and not on /tmp: that may be in memory, or an overlay itself.
        let parent = repository().join(".work/e2e");
        fs::create_dir_all(&parent).expect("create the directory of the tests");
        let directory =
            tempfile::Builder::new().prefix("t").tempdir_in(parent).expect("create a directory");
        for name in ["home", "docker", "certs", "tmp"] {
            fs::create_dir(directory.path().join(name)).expect("create a directory");
        }
        Self { directory: Some(directory), commands: RefCell::default() }
    }

    /// Makes one whose store has [`crate::BASE`] and [`crate::DEV`].
    pub fn with_base() -> Self {
        let sandbox = Self::new();
        sandbox.run([
            "load",
            "--input",
            base_archive().to_str().expect("the paths of the tests are UTF-8"),
        ]);
        sandbox
    }

    /// Returns a path in the scratch directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory
            .as_ref()
            .expect("the directory lives as long as the sandbox")
            .path()
            .join(name)
    }

    /// Returns a path in the scratch directory, as text.
    pub fn arg(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().expect("the paths of the tests are UTF-8")
    }

    /// Returns the root of the store.
    pub fn root(&self) -> PathBuf {
        self.path("root")
    }

    /// Makes a build context.
    pub fn context(&self, name: &str) -> Context {
        Context::create(self.path(name))
    }

    /// Writes the credentials for a registry where Docker keeps them.
    pub fn log_in(&self, registry: &Registry) {
        let auths =
            serde_json::json!({ "auths": { registry.host(): { "auth": registry.basic_auth() } } });
        fs::write(self.path("docker/config.json"), auths.to_string())
            .expect("write the credentials");
    }

    /// Trusts the certificate authority of a registry, as files below `certs.d` do.
    pub fn trust(&self, registry: &Registry) {
        self.trust_authority_of(registry, registry);
    }

    /// Lets the certificate authority of one registry vouch for another.
    pub fn trust_authority_of(&self, authority: &Registry, registry: &Registry) {
        let directory = self.path("certs").join(registry.host());
        fs::create_dir_all(&directory).expect("create a directory");
        fs::copy(authority.authority(), directory.join("ca.crt")).expect("copy the certificate");
    }

    /// Starts to describe a run of `slipway`.
    pub fn slipway<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Slipway<'_> {
        let mut command = Command::new(slipway_binary());
        command.args(arguments).current_dir(self.path("tmp")).stdin(Stdio::null());
        for name in [
            "SOURCE_DATE_EPOCH",
            "DOCKER_DEFAULT_PLATFORM",
            "BUILDKIT_PROGRESS",
            "BUILDKIT_HOST",
            "DOCKER_AUTH_CONFIG",
            "http_proxy",
            "https_proxy",
            "all_proxy",
            "HTTP_PROXY",
            "HTTPS_PROXY",
            "ALL_PROXY",
        ] {
            command.env_remove(name);
        }
        command
            .env("SLIPWAY_ROOT", self.root())
            .env("SLIPWAY_CERTS_DIR", self.path("certs"))
            .env("DOCKER_CONFIG", self.path("docker"))
            .env("HOME", self.path("home"))
            .env("TMPDIR", self.path("tmp"));
        Slipway { sandbox: self, command, stdin: None }
    }

    /// Runs `slipway`, which must succeed.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Ran {
        self.slipway(arguments).succeeds()
    }

    /// Runs `slipway`, which must exit with 1 and an `ERROR:` line, and leave nothing behind.
    pub fn fail<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Ran {
        let ran = self.slipway(arguments).fails(1);
        ran.error();
        self.assert_nothing_left();
        ran
    }

    /// Runs `slipway build` with plain progress on a context, which must succeed.
    pub fn build<'a>(
        &self,
        context: &'a Context,
        options: impl IntoIterator<Item = &'a str>,
    ) -> Ran {
        self.run(build_arguments(context, options))
    }

    /// Runs `slipway build` with plain progress on a context, which must fail.
    pub fn build_fails<'a>(
        &self,
        context: &'a Context,
        options: impl IntoIterator<Item = &'a str>,
    ) -> Ran {
        self.fail(build_arguments(context, options))
    }

    /// Builds a context and returns the result as the files of `type=local`.
    pub fn build_tree<'a>(
        &self,
        context: &'a Context,
        options: impl IntoIterator<Item = &'a str>,
    ) -> PathBuf {
        let name = tempfile::Builder::new()
            .prefix("out")
            .tempdir_in(self.path(""))
            .expect("create a directory")
            .keep();
        let output = format!("type=local,dest={}", name.display());
        let mut all: Vec<&str> = options.into_iter().collect();
        all.extend(["--output", &output]);
        self.run(build_arguments(context, all));
        name
    }

    /// Returns what `slipway inspect` says of an image.
    pub fn inspect(&self, image: &str, platform: Option<&str>) -> Value {
        let mut arguments = vec!["inspect"];
        if let Some(platform) = platform {
            arguments.extend(["--platform", platform]);
        }
        arguments.push(image);
        let printed = self.run(arguments).stdout;
        let Ok(Value::Array(mut all)) = serde_json::from_str::<Value>(&printed) else {
            panic!("inspect prints no array: {printed}");
        };
        assert_eq!(all.len(), 1, "one image was asked for: {printed}");
        all.remove(0)
    }

    /// Checks that no mount, no process and no half-written blob of this sandbox is left.
    ///
    /// # Panics
    /// When something is left.
    pub fn assert_nothing_left(&self) {
        // The kernel may take a moment to tear a namespace down.
        let deadline = Instant::now() + Duration::from_secs(3);
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "left behind:\n{}", left.join("\n"));
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn left(&self) -> Vec<String> {
        let place = self.arg("");
        let mut left = vec![];
        for process in fs::read_dir("/proc").expect("read /proc").flatten() {
            let (name, path) = (process.file_name(), process.path());
            if !name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
                continue;
            }
            let mine = name.to_str() == Some(&std::process::id().to_string());
            let mounts = fs::read_to_string(path.join("mountinfo")).unwrap_or_default();
            let root = fs::read_link(path.join("root")).is_ok_and(|root| root.starts_with(&place));
            if root || mounts.lines().any(|line| line.contains(&place)) {
                let command = fs::read(path.join("cmdline")).unwrap_or_default();
                let command = String::from_utf8_lossy(&command).replace('\0', " ");
                // A mount that this test sees is a leak of the machine, not of one process.
                left.push(if mine {
                    "a mount".into()
                } else {
                    format!("process {}: {command}", name.display())
                });
            }
        }
        for name in ["ingest", "tmp"] {
            let entries = fs::read_dir(self.root().join(name)).into_iter().flatten().flatten();
            left.extend(entries.map(|entry| format!("file {}", entry.path().display())));
        }
        left
    }

    fn record(&self, entry: String) {
        self.commands.borrow_mut().push(entry);
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let directory = self.directory.take().expect("the directory lives as long as the sandbox");
        if thread::panicking() {
            let path = directory.path().display().to_string();
            let mut report = format!("--- what ran in {path}\n");
            for command in self.commands.borrow().iter() {
                report.push_str(command);
            }
            // What is still mounted below it would be deleted with it.
            let mounted = fs::read_to_string("/proc/self/mountinfo")
                .is_ok_and(|mounts| mounts.contains(&path));
            if mounted || std::env::var_os("SLIPWAY_E2E_KEEP").is_some() {
                let _kept = directory.keep();
            }
            drop(std::io::stderr().write_all(report.as_bytes()));
            return;
        }
        self.directory = Some(directory);
        self.assert_nothing_left();
        self.directory = None;
    }
}

fn build_arguments<'a>(
    context: &'a Context,
    options: impl IntoIterator<Item = &'a str>,
) -> Vec<&'a str> {
    let mut arguments = vec!["build", "--progress=plain"];
    arguments.extend(options);
    arguments.push(context.arg());
    arguments
}

/// A run of `slipway` that has not started.
#[derive(Debug)]
pub struct Slipway<'a> {
    sandbox: &'a Sandbox,
    command: Command,
    stdin: Option<Vec<u8>>,
}

impl<'a> Slipway<'a> {
    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Takes a variable out of its environment.
    pub fn without(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Gives it bytes on standard input.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self.command.stdin(Stdio::piped());
        self
    }

    /// Starts it in another directory than the scratch one.
    pub fn current_dir(mut self, path: impl AsRef<Path>) -> Self {
        self.command.current_dir(path);
        self
    }

    /// Lets another program start it, as `unshare` does.
    pub fn under<S: AsRef<OsStr>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        let mut words = words.into_iter();
        let mut outer = Command::new(words.next().expect("the outer program"));
        outer.args(words).arg(self.command.get_program()).args(self.command.get_args());
        outer.stdin(if self.stdin.is_some() { Stdio::piped() } else { Stdio::null() });
        for (name, value) in self.command.get_envs() {
            match value {
                Some(value) => outer.env(name, value),
                None => outer.env_remove(name),
            };
        }
        if let Some(directory) = self.command.get_current_dir() {
            outer.current_dir(directory);
        }
        self.command = outer;
        self
    }

    /// Starts it.
    pub fn start(mut self) -> Running<'a> {
        let words: Vec<OsString> = std::iter::once(self.command.get_program())
            .chain(self.command.get_args())
            .map(Into::into)
            .collect();
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        let mut child = self
            .command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {words:?}: {error}"));
        if let (Some(bytes), Some(mut stdin)) = (self.stdin, child.stdin.take()) {
            // A program that does not read its input to the end is judged by its answer.
            thread::spawn(move || drop(stdin.write_all(&bytes)));
        }
        let stdout = gather(child.stdout.take().expect("stdout is a pipe"));
        let stderr = gather(child.stderr.take().expect("stderr is a pipe"));
        Running {
            sandbox: self.sandbox,
            words: words.join(" "),
            child,
            stdout,
            stderr,
            began: Instant::now(),
        }
    }

    /// Runs it to its end.
    pub fn ran(self) -> Ran {
        self.start().wait()
    }

    /// Runs it; it must succeed.
    pub fn succeeds(self) -> Ran {
        self.exits(0)
    }

    /// Runs it; it must exit with this code.
    pub fn fails(self, code: i32) -> Ran {
        self.exits(code)
    }

    fn exits(self, code: i32) -> Ran {
        let ran = self.ran();
        assert_eq!(
            ran.status.code(),
            Some(code),
            "{} ended with {}\n{}",
            ran.words,
            ran.status,
            ran.stderr
        );
        ran
    }
}

fn gather(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = vec![];
        pipe.read_to_end(&mut bytes).expect("read what a command prints");
        bytes
    })
}

/// A run of `slipway` that has started.
#[derive(Debug)]
pub struct Running<'a> {
    sandbox: &'a Sandbox,
    words: String,
    child: Child,
    stdout: JoinHandle<Vec<u8>>,
    stderr: JoinHandle<Vec<u8>>,
    began: Instant,
}

impl Running<'_> {
    /// Returns the id of its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to it, and to nothing that it started.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let id = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(id, signal).expect("send a signal");
    }

    /// Waits for its end.
    pub fn wait(mut self) -> Ran {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait for a command") {
                break status;
            }
            if self.began.elapsed() > TIME_LIMIT {
                self.child.kill().expect("end a command");
                self.child.wait().expect("wait for a command");
                let shown =
                    String::from_utf8_lossy(&self.stderr.join().expect("the reading thread"))
                        .into_owned();
                panic!("{} did not end within {TIME_LIMIT:?}\n{shown}", self.words);
            }
            thread::sleep(Duration::from_millis(2));
        };
        let took = self.began.elapsed();
        let bytes = self.stdout.join().expect("the reading thread");
        let stdout = String::from_utf8_lossy(&bytes).into_owned();
        let stderr =
            String::from_utf8_lossy(&self.stderr.join().expect("the reading thread")).into_owned();
        let shown =
            if bytes.contains(&0) { format!("({} bytes)", bytes.len()) } else { stdout.clone() };
        self.sandbox.record(format!("$ {}\n[{status}, {took:.2?}]\n{shown}{stderr}\n", self.words));
        Ran { words: self.words, status, bytes, stdout, stderr, took }
    }
}

/// A run of `slipway` that has ended.
#[derive(Debug)]
pub struct Ran {
    words: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output, as it came.
    pub bytes: Vec<u8>,
    /// Standard output, as text.
    pub stdout: String,
    /// Standard error: progress and errors.
    pub stderr: String,
    /// How long it took.
    pub took: Duration,
}

impl Ran {
    /// Returns the one `ERROR:` line.
    ///
    /// # Panics
    /// When there is none, or more than one.
    pub fn error(&self) -> &str {
        let errors: Vec<_> =
            self.stderr.lines().filter(|line| line.starts_with("ERROR: ")).collect();
        assert_eq!(errors.len(), 1, "{} should print one ERROR line:\n{}", self.words, self.stderr);
        errors[0]
    }

    /// Tells whether the step with this text in its name came from the cache.
    ///
    /// # Panics
    /// When no step has that name.
    pub fn is_cached(&self, name: &str) -> bool {
        // "#7 [stage 2/3] RUN make" announces the step, "#7 CACHED" tells its fate.
        let step = self
            .stderr
            .lines()
            .find(|line| line.starts_with('#') && line.contains(" [") && line.contains(name))
            .and_then(|line| line.split(' ').next());
        let Some(step) = step else { panic!("no step {name:?} in:\n{}", self.stderr) };
        self.stderr.lines().any(|line| line == format!("{step} CACHED"))
    }
}
