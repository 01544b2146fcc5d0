//! A real registry.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::tools::tool;

const USER: &str = "ada";
const PASSWORD: &str = "correct horse";
/// `ada:correct horse` in base64.
const BASIC_AUTH: &str = "YWRhOmNvcnJlY3QgaG9yc2U=";

/// Debian's `docker-registry` on a free port; its data goes when it is dropped.
#[derive(Debug)]
pub struct Registry {
    process: Child,
    port: u16,
    secure: bool,
    directory: TempDir,
}

impl Registry {
    /// Starts one that speaks plain HTTP and lets everybody in.
    pub fn start() -> Self {
        Self::start_with(false)
    }

    /// Starts one that speaks TLS, with a certificate of an authority of its own, and asks for a password.
    pub fn start_secure() -> Self {
        Self::start_with(true)
    }

    fn start_with(secure: bool) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("slipway-registry")
            .tempdir()
            .expect("create a directory");
        let path = directory.path();
        if secure {
            make_certificates(path);
            let password = tool(Command::new("htpasswd").args(["-Bbn", USER, PASSWORD]));
            fs::write(path.join("htpasswd"), password).expect("write the password file");
        }
        // Between the choice of a free port and its use another process may take it: then choose again.
        for _ in 0..5 {
            let listener = TcpListener::bind("127.0.0.1:0").expect("listen on a free port");
            let port = listener.local_addr().expect("the port").port();
            drop(listener);
            fs::write(path.join("config.yml"), configuration(path, port, secure))
                .expect("write the configuration");
            let mut process = spawn(path);
            if comes_up(&mut process, port) {
                return Self { process, port, secure, directory };
            }
        }
        let log = fs::read_to_string(path.join("log")).unwrap_or_default();
        panic!("docker-registry does not start:\n{log}");
    }

    /// Returns `host:port`, the way image names begin.
    pub fn host(&self) -> String {
        // The certificate is for a name; Debian's resolver knows this one without a network.
        let name = if self.secure { "localhost" } else { "127.0.0.1" };
        format!("{name}:{}", self.port)
    }

    /// Returns the name of an image in it.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.host())
    }

    /// Returns the user and the password as Docker's configuration keeps them.
    pub fn basic_auth(&self) -> &'static str {
        BASIC_AUTH
    }

    /// Returns the certificate of the authority that vouches for a secure one.
    pub fn authority(&self) -> PathBuf {
        self.trust().join("ca.crt")
    }

    /// Returns a folder with that certificate alone, as tools want it: a key beside it would be taken for the client's.
    fn trust(&self) -> PathBuf {
        self.directory.path().join("trust")
    }

    /// Runs `skopeo` against it: `words`, then the image.
    pub fn skopeo(&self, words: &[&str], image: &str) -> String {
        let mut command = Command::new("skopeo");
        command.args(words);
        if self.secure {
            command
                .args(["--creds", &format!("{USER}:{PASSWORD}"), "--cert-dir"])
                .arg(self.trust());
        } else {
            command.arg("--tls-verify=false");
        }
        tool(command.arg(format!("docker://{}", self.image(image))))
    }

    /// Copies an image into an OCI layout by `skopeo`, all of its platforms.
    pub fn copy_to_layout(&self, image: &str, layout: &Path, tag: &str) {
        let mut command = Command::new("skopeo");
        command.args(["copy", "--quiet", "--all"]);
        if self.secure {
            command
                .args(["--src-creds", &format!("{USER}:{PASSWORD}"), "--src-cert-dir"])
                .arg(self.trust());
        } else {
            command.arg("--src-tls-verify=false");
        }
        command
            .arg(format!("docker://{}", self.image(image)))
            .arg(format!("oci:{}:{tag}", layout.display()));
        tool(&mut command);
    }

    /// Puts an OCI archive into it by `skopeo`, all platforms.
    pub fn seed(&self, archive: &Path, tag: &str, image: &str) {
        let mut command = Command::new("skopeo");
        command.args(["copy", "--quiet", "--all"]);
        if self.secure {
            command
                .args(["--dest-creds", &format!("{USER}:{PASSWORD}"), "--dest-cert-dir"])
                .arg(self.trust());
        } else {
            command.arg("--dest-tls-verify=false");
        }
        command
            .arg(format!("oci-archive:{}:{tag}", archive.display()))
            .arg(format!("docker://{}", self.image(image)));
        tool(&mut command);
    }

    /// Returns where it keeps the bytes of a blob.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").expect("a SHA-256 digest");
        self.directory
            .path()
            .join(format!("data/docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn configuration(path: &Path, port: u16, secure: bool) -> String {
    let path = path.display();
    let mut text = format!(
        "version: 0.1\n\
         log: {{ level: warn, accesslog: {{ disabled: true }} }}\n\
         storage: {{ filesystem: {{ rootdirectory: {path}/data }}, delete: {{ enabled: true }} }}\n\
         http:\n  addr: 127.0.0.1:{port}\n  secret: tests\n"
    );
    if secure {
        text.push_str(&format!(
            "  tls: {{ certificate: {path}/server.crt, key: {path}/server.key }}\n\
             auth: {{ htpasswd: {{ realm: tests, path: {path}/htpasswd }} }}\n"
        ));
    }
    text
}

fn spawn(path: &Path) -> Child {
    let log = fs::File::create(path.join("log")).expect("create the log");
    Command::new("docker-registry")
        .arg("serve")
        .arg(path.join("config.yml"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("the log"))
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| {
            panic!("cannot start docker-registry: {error}; run \"make e2e-tools\" as root")
        })
}

fn comes_up(process: &mut Child, port: u16) -> bool {
    let deadline = Instant::now() + Duration::from_secs(30);
    while process.try_wait().expect("ask for the registry").is_none() {
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return true;
        }
        if Instant::now() > deadline {
            drop(process.kill());
            drop(process.wait());
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
    false
}

/// Makes `trust/ca.crt` and, signed by it, `server.crt` for localhost.
fn make_certificates(path: &Path) {
    fs::create_dir(path.join("trust")).expect("create a directory");
    let openssl = |words: &str| {
        tool(Command::new("openssl").args(words.split(' ')).current_dir(path));
    };
    fs::write(
        path.join("names"),
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n",
    )
    .expect("write the names of the certificate");
    openssl(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=tests -keyout ca.key -out trust/ca.crt",
    );
    openssl(
        "req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -keyout server.key -out server.csr",
    );
    openssl(
        "x509 -req -days 2 -in server.csr -CA trust/ca.crt -CAkey ca.key -CAcreateserial -extfile names -out server.crt",
    );
}
