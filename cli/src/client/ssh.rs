//! SSH agents: those that run, and those that are started for private keys.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use slipway_engine::solver::client::ssh::{AgentStream, SshAgents};
use slipway_engine::store::{Error, ErrorKind};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::OnceCell;

use crate::args::step::SshSpec;
use crate::failure::Failure;
use crate::settings::Environment;

/// How long an agent may take to start.
const START: Duration = Duration::from_secs(5);

/// The agents that the user named.
#[derive(Debug)]
pub(crate) struct Agents(BTreeMap<String, Agent>);

#[derive(Debug)]
enum Agent {
    /// One that runs.
    Socket(PathBuf),
    /// One that is started when it is needed.
    Keys { keys: Vec<PathBuf>, started: Box<OnceCell<Started>> },
}

/// An agent of this process. Dropping it ends it.
#[derive(Debug)]
struct Started {
    _process: Child,
    folder: PathBuf,
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.folder) {
            tracing::debug!(%error, "an agent's socket stays behind");
        }
    }
}

impl Agents {
    /// Finds the agents.
    ///
    /// # Errors
    /// When a socket or a key is not there.
    pub(crate) fn new(specs: &[SshSpec], environment: &Environment) -> Result<Self, Failure> {
        let mut agents = BTreeMap::new();
        for SshSpec { id, paths } in specs {
            let failed =
                |what: String| Failure::new(format!("cannot forward the SSH agent {id:?}: {what}"));
            let paths = match (paths.as_slice(), environment.get("SSH_AUTH_SOCK")) {
                ([], Some(socket)) if !socket.is_empty() => vec![PathBuf::from(socket)],
                ([], _) => {
                    return Err(failed("SSH_AUTH_SOCK is not set".into())
                        .hint("start an agent, or name its socket or a private key"));
                }
                (paths, _) => paths.to_vec(),
            };
            let mut sockets = 0;
            for path in &paths {
                let metadata = std::fs::metadata(path)
                    .map_err(|error| failed(format!("{}: {error}", path.display())))?;
                sockets += usize::from(metadata.file_type().is_socket());
            }
            let agent = match paths.as_slice() {
                [socket] if sockets == 1 => Agent::Socket(socket.clone()),
                _ if sockets > 0 => return Err(failed("a socket goes with nothing else".into())),
                _ => Agent::Keys { keys: paths, started: Box::default() },
            };
            agents.insert(id.clone(), agent);
        }
        Ok(Self(agents))
    }
}

#[async_trait]
impl SshAgents for Agents {
    async fn check(&self, id: &str) -> Result<bool, Error> {
        Ok(self.0.contains_key(id))
    }

    async fn connect(&self, id: &str) -> Result<Box<dyn AgentStream>, Error> {
        let path = match self.0.get(id) {
            None => {
                let what = format!("there is no SSH agent {id:?}");
                return Err(Error::new(ErrorKind::NotFound, what));
            }
            Some(Agent::Socket(path)) => path.clone(),
            Some(Agent::Keys { keys, started }) => {
                started.get_or_try_init(|| start(keys)).await?.folder.join("agent")
            }
        };
        let stream = UnixStream::connect(&path).await.map_err(|error| {
            Error::io(format!("cannot reach the agent at {}", path.display()), error)
        })?;
        Ok(Box::new(stream))
    }
}

/// Starts an agent and gives it the keys.
async fn start(keys: &[PathBuf]) -> Result<Started, Error> {
    use std::os::unix::fs::DirBuilderExt as _;
    let io = |what: &str, error| Error::io(format!("cannot {what} an SSH agent"), error);
    let name = format!("slipway-agent-{}-{:p}", std::process::id(), keys);
    let folder = std::env::temp_dir().join(name);
    // A folder that somebody else has put there is refused.
    std::fs::DirBuilder::new().mode(0o700).create(&folder).map_err(|error| io("start", error))?;
    let socket = folder.join("agent");
    let process = Command::new("ssh-agent")
        .arg("-D")
        .arg("-a")
        .arg(&socket)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| io("start", error))?;
    let started = Started { _process: process, folder };
    let ready = async {
        while UnixStream::connect(&socket).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(START, ready)
        .await
        .map_err(|late| io("start", std::io::Error::new(std::io::ErrorKind::TimedOut, late)))?;
    for key in keys {
        add(&socket, key).await?;
    }
    Ok(started)
}

async fn add(socket: &Path, key: &Path) -> Result<(), Error> {
    let output = Command::new("ssh-add")
        .arg("-q")
        .arg("--")
        .arg(key)
        .env("SSH_AUTH_SOCK", socket)
        // Nobody is there to type a passphrase.
        .env("SSH_ASKPASS_REQUIRE", "never")
        .stdin(Stdio::null())
        .output()
        .await
        .map_err(|error| Error::io("cannot run ssh-add", error))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::new(ErrorKind::Invalid, format!("cannot use the key {}: {said}", key.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    fn spec(id: &str, paths: &[&Path]) -> SshSpec {
        SshSpec { id: id.into(), paths: paths.iter().map(|path| path.to_path_buf()).collect() }
    }

    #[tokio::test]
    async fn sockets_are_connected_to() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let environment = Environment::of(&[("SSH_AUTH_SOCK", socket.to_str().unwrap())]);
        let agents = Agents::new(&[spec("default", &[])], &environment).unwrap();
        assert!(agents.check("default").await.unwrap() && !agents.check("x").await.unwrap());
        let mut stream = agents.connect("default").await.unwrap();
        stream.write_all(b"hi").await.unwrap();
        let (mut served, _) = listener.accept().await.unwrap();
        let mut two = [0; 2];
        served.read_exact(&mut two).await.unwrap();
        assert_eq!(&two, b"hi");
        assert!(agents.connect("x").await.is_err());
    }

    #[test]
    fn what_is_not_there_is_an_error_at_once() {
        let none = Environment::of(&[]);
        assert!(Agents::new(&[spec("default", &[])], &none).is_err());
        assert!(Agents::new(&[spec("k", &[Path::new("/no/such/key")])], &none).is_err());
    }

    #[tokio::test]
    async fn keys_get_an_agent_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let key = folder.path().join("id");
        let made = std::process::Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(&key)
            .status()
            .unwrap();
        assert!(made.success());
        let agents = Agents::new(&[spec("k", &[&key])], &Environment::of(&[])).unwrap();
        let mut stream = agents.connect("k").await.unwrap();
        // SSH_AGENTC_REQUEST_IDENTITIES is answered with the number of keys.
        stream.write_all(&[0, 0, 0, 1, 11]).await.unwrap();
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        assert_eq!((head[4], &head[5..]), (12, &[0, 0, 0, 1][..]));
    }
}
