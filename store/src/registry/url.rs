//! URLs as registries use them: absolute, http or https, never with user information.

use std::fmt;
use std::net::IpAddr;

use http::Uri;

use super::error::{RegistryError, RegistryErrorKind};

/// How a URL is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Scheme {
    Http,
    Https,
}

impl Scheme {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    pub(crate) fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// A checked absolute URL.
///
/// Both `Display` and `Debug` leave out the query, which in a signed URL is a credential.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Url {
    scheme: Scheme,
    authority: String,
    path: String,
    query: Option<String>,
}

impl Url {
    /// Joins an already checked host, with or without a port, and a path.
    pub(crate) fn new(scheme: Scheme, authority: &str, path: &str) -> Self {
        Self { scheme, authority: authority.to_ascii_lowercase(), path: path.into(), query: None }
    }

    /// Reads an absolute URL.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            _ => return None,
        };
        let rest = escape(rest.split('#').next().unwrap_or_default());
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, tail) = rest.split_at(end);
        if authority.is_empty() || authority.contains(['@', '%', '\\']) {
            return None;
        }
        let (path, query) = split_query(tail);
        let url = Self {
            scheme,
            authority: authority.to_ascii_lowercase(),
            path: if path.is_empty() { "/".into() } else { path.into() },
            query,
        };
        // The HTTP library has the last word, so that later conversion cannot fail.
        url.to_string_with_query().parse::<Uri>().ok()?.host()?;
        Some(url)
    }

    /// Resolves what a `Location` header says, relative or absolute (RFC 3986, section 5.2).
    pub(crate) fn join(&self, location: &str) -> Option<Self> {
        let location = location.trim();
        let scheme_end = location.find(':').filter(|end| {
            location[..*end]
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'))
                && *end > 0
        });
        if scheme_end.is_some() {
            return Self::parse(location);
        }
        if location.starts_with("//") {
            return Self::parse(&format!("{}:{location}", self.scheme.as_str()));
        }
        let escaped = escape(location.split('#').next().unwrap_or_default());
        let (path, query) = split_query(&escaped);
        let path = match path {
            "" => self.path.clone(),
            path if path.starts_with('/') => remove_dots(path),
            path => {
                let directory = &self.path[..=self.path.rfind('/').unwrap_or(0)];
                remove_dots(&format!("{directory}{path}"))
            }
        };
        let query = if location.is_empty() { self.query.clone() } else { query };
        Some(Self { path, query, ..self.clone() })
    }

    /// Appends a parameter; an existing query keeps its bytes, since it may be signed.
    #[must_use]
    pub(crate) fn with_query(mut self, name: &str, value: &str) -> Self {
        let pair = format!("{name}={}", encode_component(value));
        self.query = Some(match self.query.take() {
            Some(query) if !query.is_empty() => format!("{query}&{pair}"),
            _ => pair,
        });
        self
    }

    #[must_use]
    pub(crate) fn with_scheme(self, scheme: Scheme) -> Self {
        Self { scheme, ..self }
    }

    pub(crate) fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Returns the host with its port, as written.
    pub(crate) fn authority(&self) -> &str {
        &self.authority
    }

    /// Returns the path, which starts with a slash.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Whether credentials for one may be sent to the other: same scheme, host and port.
    pub(crate) fn same_origin(&self, other: &Self) -> bool {
        self.scheme == other.scheme
            && host_of(&self.authority) == host_of(&other.authority)
            && self.port() == other.port()
    }

    fn port(&self) -> u16 {
        port_of(&self.authority).unwrap_or(self.scheme.default_port())
    }

    /// Whether this names an address that only serves the machine it is asked from: cloud
    /// metadata services live there, and no registry does.
    pub(crate) fn is_link_local(&self) -> bool {
        match host_of(&self.authority).parse::<IpAddr>() {
            Ok(IpAddr::V4(ip)) => ip.is_link_local(),
            Ok(IpAddr::V6(ip)) => {
                ip.is_unicast_link_local()
                    || ip.to_ipv4_mapped().is_some_and(|v4| v4.is_link_local())
            }
            Err(_) => false,
        }
    }

    pub(crate) fn to_uri(&self) -> Result<Uri, RegistryError> {
        self.to_string_with_query().parse().map_err(|error: http::uri::InvalidUri| {
            RegistryError::new(RegistryErrorKind::Protocol, self.to_string(), "not a usable URL")
                .with_source(error)
        })
    }

    fn to_string_with_query(&self) -> String {
        let query = self.query.as_ref().map(|query| format!("?{query}")).unwrap_or_default();
        format!("{self}{query}")
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme.as_str(), self.authority, self.path)
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Returns the host of `host[:port]`, IPv6 without its brackets.
pub(crate) fn host_of(authority: &str) -> &str {
    if let Some(rest) = authority.strip_prefix('[') {
        return rest.split(']').next().unwrap_or_default();
    }
    authority.split(':').next().unwrap_or_default()
}

/// Returns the port of `host[:port]`.
pub(crate) fn port_of(authority: &str) -> Option<u16> {
    let tail = match authority.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?.1,
        None => authority,
    };
    tail.rsplit_once(':')?.1.parse().ok()
}

/// Whether this host is the machine itself.
pub(crate) fn is_loopback(authority: &str) -> bool {
    let host = host_of(authority);
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Percent-encodes everything that may not stand in a query value.
pub(crate) fn encode_component(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        // These may stand in a query, and digests and scopes are more readable with them.
        if byte.is_ascii_alphanumeric() || b"-._~:/,".contains(&byte) {
            encoded.push(byte as char);
        } else {
            push_escape(&mut encoded, byte);
        }
    }
    encoded
}

fn push_escape(text: &mut String, byte: u8) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    text.push('%');
    text.push(DIGITS[usize::from(byte >> 4)] as char);
    text.push(DIGITS[usize::from(byte & 15)] as char);
}

/// Encodes what may not stand anywhere in a URL, and leaves the rest alone.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_graphic() && !b"\"<>`{}|^".contains(&byte) {
            escaped.push(byte as char);
        } else {
            push_escape(&mut escaped, byte);
        }
    }
    escaped
}

fn split_query(text: &str) -> (&str, Option<String>) {
    match text.split_once('?') {
        Some((path, query)) => (path, Some(query.into())),
        None => (text, None),
    }
}

fn remove_dots(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." if last => kept.push(""),
            "." => {}
            ".." => {
                kept.pop();
                if last {
                    kept.push("");
                }
            }
            segment => kept.push(segment),
        }
    }
    format!("/{}", kept.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_resolved_like_links() {
        let base = Url::parse("https://r.example:5000/v2/app/blobs/uploads/?mount=x").unwrap();
        for (location, expected) in [
            (
                "/v2/app/blobs/uploads/1?state=a%2Fb",
                "https://r.example:5000/v2/app/blobs/uploads/1?state=a%2Fb",
            ),
            ("1?s=2", "https://r.example:5000/v2/app/blobs/uploads/1?s=2"),
            ("../x", "https://r.example:5000/v2/app/blobs/x"),
            ("?s=2", "https://r.example:5000/v2/app/blobs/uploads/?s=2"),
            ("//cdn.example/x", "https://cdn.example/x"),
            ("https://Other.example", "https://other.example/"),
            ("http://other.example/a b?q=\"x\"#frag", "http://other.example/a%20b?q=%22x%22"),
            ("/../../x/./y", "https://r.example:5000/x/y"),
        ] {
            let url = base.join(location).unwrap_or_else(|| panic!("{location}"));
            assert_eq!(url.to_string_with_query(), expected, "{location}");
        }
        for bad in [
            "ftp://x/y",
            "https://",
            "https://user:pw@host/",
            "javascript:alert(1)",
            "http://a%2fb/",
        ] {
            assert!(base.join(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn parameters_are_appended_with_the_right_separator() {
        let digest = "sha256:00";
        let with = |text: &str| {
            Url::parse(text).unwrap().with_query("digest", digest).to_string_with_query()
        };
        assert_eq!(with("https://h/u"), "https://h/u?digest=sha256:00");
        assert_eq!(with("https://h/u?"), "https://h/u?digest=sha256:00");
        assert_eq!(with("https://h/u?b=2&a=%2f"), "https://h/u?b=2&a=%2f&digest=sha256:00");
        assert_eq!(encode_component("a b&c"), "a%20b%26c");
    }

    #[test]
    fn shown_urls_hide_the_query() {
        let url = Url::parse("https://cdn.example/blob?X-Amz-Signature=secret").unwrap();
        assert_eq!(format!("{url} {url:?}"), "https://cdn.example/blob https://cdn.example/blob");
    }

    #[test]
    fn origins_compare_scheme_host_and_port() {
        let same = |a: &str, b: &str| Url::parse(a).unwrap().same_origin(&Url::parse(b).unwrap());
        assert!(same("https://h/a", "https://H:443/b"));
        assert!(!same("https://h/a", "http://h/a"));
        assert!(!same("https://h/a", "https://h:444/a"));
        assert!(!same("https://h/a", "https://h.evil/a"));
    }

    #[test]
    fn knows_this_machine_and_its_neighbours() {
        for yes in
            ["localhost", "localhost:5000", "127.0.0.1:1", "127.8.8.8", "[::1]:5000", "[::1]"]
        {
            assert!(is_loopback(yes), "{yes}");
        }
        for no in ["localhost.example", "128.0.0.1", "[::2]:5000", "r.example:5000"] {
            assert!(!is_loopback(no), "{no}");
        }
        assert!(Url::parse("http://169.254.169.254/latest").unwrap().is_link_local());
        assert!(Url::parse("http://[fe80::1]/").unwrap().is_link_local());
        assert!(!Url::parse("http://10.0.0.1/").unwrap().is_link_local());
        assert_eq!((port_of("[::1]:50"), port_of("h"), port_of("h:7")), (Some(50), None, Some(7)));
    }
}
