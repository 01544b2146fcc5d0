//! Where to listen, as it is written.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::error::{ListenError, ListenErrorKind};

/// An address to listen at.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// `unix:///run/slipway/slipway.sock`
    Unix(PathBuf),
    /// `tcp://127.0.0.1:1234`; the host may be empty for all of them.
    Tcp {
        /// The name or address, without brackets.
        host: String,
        /// The port; 0 is any.
        port: u16,
    },
    /// `fd://`, `fd://3`, `fd://name`, `fd://*`: sockets that systemd opened.
    Systemd(String),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Systemd(which) => write!(f, "fd://{which}"),
        }
    }
}

impl FromStr for Address {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = |message: String| ListenError::new(ListenErrorKind::Address, text, message);
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err(bad(format!("has no protocol; did you mean unix://{text}?")));
        };
        match scheme {
            "unix" if rest.is_empty() => Err(bad("names no socket; use unix:///path".into())),
            // There are no permissions that could keep anybody away from one.
            "unix" if rest.starts_with('@') => {
                Err(bad("is an abstract socket, which everybody may use; use a path".into()))
            }
            "unix" => Ok(Self::Unix(rest.into())),
            "tcp" => {
                let parts = rest.rsplit_once(':').filter(|(host, _)| {
                    !host.contains(':') || (host.starts_with('[') && host.ends_with(']'))
                });
                let Some((host, port)) = parts else {
                    return Err(bad("has no port; use tcp://host:port".into()));
                };
                let port = port.parse().map_err(|_| {
                    bad(format!("has no port: {port:?} is not a number up to 65535"))
                })?;
                let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
                Ok(Self::Tcp { host, port })
            }
            "fd" => Ok(Self::Systemd(rest.into())),
            _ => Err(bad("is of no kind that is known; use unix://, tcp:// or fd://".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let tcp = |host: &str, port| Address::Tcp { host: host.into(), port };
        for (text, expected) in [
            ("unix:///run/a b.sock", Address::Unix("/run/a b.sock".into())),
            ("unix://relative.sock", Address::Unix("relative.sock".into())),
            ("tcp://127.0.0.1:1234", tcp("127.0.0.1", 1234)),
            ("tcp://:0", tcp("", 0)),
            ("tcp://[::1]:80", tcp("::1", 80)),
            ("tcp://build.test:8080", tcp("build.test", 8080)),
            ("fd://", Address::Systemd(String::new())),
            ("fd://3", Address::Systemd("3".into())),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address, expected, "{text}");
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn bad_addresses_say_what_would_be_good() {
        for (text, message) in [
            ("/run/a.sock", "has no protocol; did you mean unix:///run/a.sock?"),
            ("unix://", "names no socket; use unix:///path"),
            ("unix://@abstract", "is an abstract socket, which everybody may use; use a path"),
            ("tcp://localhost", "has no port; use tcp://host:port"),
            ("tcp://::1", "has no port; use tcp://host:port"),
            ("tcp://a:", "has no port: \"\" is not a number up to 65535"),
            ("tcp://a:70000", "has no port: \"70000\" is not a number up to 65535"),
            ("npipe:////./pipe/x", "is of no kind that is known; use unix://, tcp:// or fd://"),
            ("", "has no protocol; did you mean unix://?"),
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert_eq!(error.kind(), ListenErrorKind::Address);
            assert_eq!(error.to_string(), format!("cannot listen: {text:?} {message}"));
        }
    }
}
