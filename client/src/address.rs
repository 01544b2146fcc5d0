//! Where a daemon listens, as `BUILDKIT_HOST` and `--builder` say it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{ClientError, ClientErrorKind};

/// Where a daemon listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `unix://PATH`: a socket of this machine.
    Unix(PathBuf),
    /// `tcp://HOST:PORT`, with TLS where the options say so.
    Tcp {
        /// The name or address of the host.
        host: String,
        /// The port.
        port: u16,
    },
    /// A program whose standard streams lead to the daemon: `ssh://[USER@]HOST[:PORT][/SOCKET]`,
    /// `docker-container://NAME` or `podman-container://NAME`.
    Program {
        /// The address as it was given.
        shown: String,
        /// The program and its arguments.
        words: Vec<String>,
    },
}

/// TLS of a connection to a daemon, as PEM files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsOptions {
    /// The name that the daemon's certificate must have; the host's without one.
    pub server_name: Option<String>,
    /// Who must have signed the daemon's certificate; the system's authorities without one.
    pub ca: Option<PathBuf>,
    /// The certificate to show.
    pub cert: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
}

impl TlsOptions {
    /// Whether anything was said at all, which is what switches TLS on.
    pub fn is_set(&self) -> bool {
        *self != Self::default()
    }
}

fn bad(text: &str, why: &str) -> ClientError {
    let what = format!("cannot use the builder {text:?}: {why}");
    ClientError::new(ClientErrorKind::Address, what)
}

impl FromStr for Address {
    type Err = ClientError;

    fn from_str(text: &str) -> Result<Self, ClientError> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(bad(
                text,
                "it is no address; use unix://SOCKET, tcp://HOST:PORT, ssh://USER@HOST or docker-container://NAME",
            ));
        };
        match scheme {
            "unix" if rest.starts_with('/') => Ok(Self::Unix(rest.into())),
            "unix" => Err(bad(text, "the path of the socket must be absolute")),
            "tcp" => tcp(text, rest),
            "ssh" => ssh(text, rest),
            "docker-container" | "podman-container" => {
                let program = scheme.trim_end_matches("-container");
                container(text, rest, program)
            }
            "kube-pod" | "nerdctl-container" | "npipe" => Err(bad(
                text,
                &format!(
                    "{scheme}:// is not supported yet; forward the daemon's socket, and name it with unix://"
                ),
            )),
            other => Err(bad(text, &format!("unknown kind of address {other:?}"))),
        }
    }
}

fn tcp(text: &str, rest: &str) -> Result<Address, ClientError> {
    let rest = rest.trim_end_matches('/');
    let Some((host, port)) = rest.rsplit_once(':') else {
        return Err(bad(text, "the port is missing"));
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if host.is_empty() {
        return Err(bad(text, "the host is missing"));
    }
    let port = port.parse().map_err(|_| bad(text, "the port is not a number"))?;
    Ok(Address::Tcp { host: host.to_owned(), port })
}

/// A word that a program would take for a flag of its own.
fn is_flag(word: &str) -> bool {
    word.starts_with('-')
}

fn ssh(text: &str, rest: &str) -> Result<Address, ClientError> {
    if rest.contains(['?', '#']) {
        return Err(bad(text, "nothing may follow the path of the socket"));
    }
    let (place, socket) = rest.split_once('/').map_or((rest, ""), |(place, path)| (place, path));
    let (user, host) =
        place.rsplit_once('@').map_or((None, place), |(user, host)| (Some(user), host));
    let (host, port) = match host.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && !port.contains(']') => (host, Some(port)),
        _ => (host, None),
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    if user.is_some_and(|user| user.contains(':')) {
        return Err(bad(text, "a password cannot be part of it; use a key"));
    }
    if host.is_empty() || is_flag(host) || user.is_some_and(is_flag) {
        return Err(bad(text, "the host or the user is not usable"));
    }
    let mut words = vec!["ssh".to_owned()];
    if let Some(user) = user.filter(|user| !user.is_empty()) {
        words.extend(["-l".to_owned(), user.to_owned()]);
    }
    if let Some(port) = port {
        let port: u16 = port.parse().map_err(|_| bad(text, "the port is not a number"))?;
        words.extend(["-p".to_owned(), port.to_string()]);
    }
    words.extend(["--".to_owned(), host.to_owned(), "buildctl".to_owned()]);
    if !socket.is_empty() {
        // The words go through a shell at the other end.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+@".contains(&byte);
        if !socket.bytes().all(plain) {
            return Err(bad(
                text,
                "the path of the socket has characters that a shell would change",
            ));
        }
        words.extend(["--addr".to_owned(), format!("unix:///{socket}")]);
    }
    words.push("dial-stdio".to_owned());
    Ok(Address::Program { shown: text.to_owned(), words })
}

fn container(text: &str, rest: &str, program: &str) -> Result<Address, ClientError> {
    let (name, query) =
        rest.split_once('?').map_or((rest, None), |(name, query)| (name, Some(query)));
    if name.is_empty() || is_flag(name) {
        return Err(bad(text, "the name of the container is missing"));
    }
    let mut words = vec![program.to_owned()];
    match query.map(|query| query.split_once('=')) {
        None => {}
        Some(Some(("context", context))) if program == "docker" => {
            words.push(format!("--context={context}"));
        }
        Some(_) => return Err(bad(text, "only ?context=NAME may follow, and only with docker")),
    }
    words.extend(["exec", "-i", name, "buildctl", "dial-stdio"].map(str::to_owned));
    Ok(Address::Program { shown: text.to_owned(), words })
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Program { shown, .. } => f.write_str(shown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown() {
        for text in ["unix:///run/b.sock", "tcp://h:1234", "tcp://[::1]:1", "tcp://127.0.0.1:80"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        let words = |text: &str| match text.parse::<Address>().unwrap() {
            Address::Program { words, shown } => {
                assert_eq!(shown, text);
                words.join(" ")
            }
            other => panic!("{other:?}"),
        };
        for (text, expected) in [
            ("ssh://h", "ssh -- h buildctl dial-stdio"),
            (
                "ssh://me@h:22/run/b.sock",
                "ssh -l me -p 22 -- h buildctl --addr unix:///run/b.sock dial-stdio",
            ),
            ("ssh://[::1]", "ssh -- ::1 buildctl dial-stdio"),
            ("docker-container://b", "docker exec -i b buildctl dial-stdio"),
            ("docker-container://b?context=c", "docker --context=c exec -i b buildctl dial-stdio"),
            ("podman-container://b", "podman exec -i b buildctl dial-stdio"),
        ] {
            assert_eq!(words(text), expected);
        }
    }

    #[test]
    fn what_is_no_address_is_refused_by_name() {
        for (text, why) in [
            ("default", "it is no address"),
            ("unix://rel", "must be absolute"),
            ("tcp://h", "port is missing"),
            ("tcp://:1", "host is missing"),
            ("tcp://h:x", "not a number"),
            ("ssh://", "not usable"),
            ("ssh://-oProxyCommand=x", "not usable"),
            ("ssh://-x@h", "not usable"),
            ("ssh://a:b@h", "password"),
            ("ssh://h/a b", "a shell would change"),
            ("ssh://h/$(x)", "a shell would change"),
            ("ssh://h/a?b", "nothing may follow"),
            ("docker-container://", "missing"),
            ("docker-container://-v", "missing"),
            ("podman-container://a?context=b", "only ?context"),
            ("kube-pod://p", "not supported yet"),
            ("http://h", "unknown kind"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains(text), "{text}: {error}");
        }
    }
}
