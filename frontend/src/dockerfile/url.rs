//! URLs, split and written as Go's `net/url` does: what becomes of them is part of vertex digests.

/// A URL in parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Url {
    /// Lower case; empty when there is none.
    pub(crate) scheme: String,
    /// Decoded, with the password if one is given.
    user: Option<(String, Option<String>)>,
    /// With the port.
    pub(crate) host: String,
    /// Decoded.
    pub(crate) path: String,
    raw_path: String,
    pub(crate) query: Vec<(String, String)>,
    /// Decoded.
    pub(crate) fragment: String,
}

impl Url {
    /// Returns `None` for what Go refuses to parse.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        if text.bytes().any(|b| b < 0x20 || b == 0x7f) {
            return None;
        }
        let (rest, fragment) = text.split_once('#').unwrap_or((text, ""));
        let mut url = Self { fragment: unescape(fragment, false)?, ..Self::default() };
        let (scheme, rest) = split_scheme(rest)?;
        url.scheme = scheme.to_ascii_lowercase();
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        url.query = parse_query(query).0;
        let mut path = rest;
        if !rest.starts_with('/') {
            if !scheme.is_empty() {
                // `https:x` has no host and no path.
                return Some(url);
            }
            if rest.split('/').next().is_some_and(|first| first.contains(':')) {
                return None;
            }
        } else if let Some(rest) = rest.strip_prefix("//")
            && (!scheme.is_empty() || !rest.starts_with('/'))
        {
            let (authority, tail) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            path = tail;
            url.set_authority(authority)?;
        }
        url.path = unescape(path, false)?;
        url.raw_path = path.into();
        Some(url)
    }

    fn set_authority(&mut self, authority: &str) -> Option<()> {
        let host = match authority.rsplit_once('@') {
            Some((user, host)) => {
                let good = |b: u8| b.is_ascii_alphanumeric() || b"-._:~!$&'()*+,;=%@".contains(&b);
                if !user.bytes().all(good) {
                    return None;
                }
                self.user = Some(match user.split_once(':') {
                    Some((user, password)) => {
                        (unescape(user, false)?, Some(unescape(password, false)?))
                    }
                    None => (unescape(user, false)?, None),
                });
                host
            }
            None => authority,
        };
        let port = match host.rfind(']') {
            Some(end) if host.starts_with('[') => &host[end + 1..],
            _ if host.starts_with('[') => return None,
            _ => host.rfind(':').map_or("", |colon| &host[colon..]),
        };
        let digits = port.strip_prefix(':').unwrap_or("");
        if !(port.is_empty() || port.starts_with(':') && digits.bytes().all(|b| b.is_ascii_digit()))
        {
            return None;
        }
        let good = |b: u8| {
            b >= 0x80 || b.is_ascii_alphanumeric() || b"-_.~!$&'()*+,;=:[]<>\"".contains(&b)
        };
        if !host.bytes().all(good) {
            return None;
        }
        self.host = host.into();
        Some(())
    }

    /// Writes the URL without query and fragment.
    pub(crate) fn without_options(&self) -> String {
        let mut text = String::new();
        if !self.scheme.is_empty() {
            text.push_str(&self.scheme);
            text.push(':');
        }
        if !self.host.is_empty() || !self.path.is_empty() || self.user.is_some() {
            text.push_str("//");
        }
        if let Some((user, password)) = &self.user {
            text.push_str(&escape(user, b"$&+,;="));
            if let Some(password) = password {
                text.push(':');
                text.push_str(&escape(password, b"$&+,;="));
            }
            text.push('@');
        }
        text.push_str(&self.host);
        let allowed = b"$&+,/:;=@";
        let valid = self
            .raw_path
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.~!$&'()*+,;=:@[]%/".contains(&b));
        // A path that was written in a valid way stays as it was written.
        let path = if valid { self.raw_path.clone() } else { escape(&self.path, allowed) };
        if !path.is_empty() && !path.starts_with('/') && !self.host.is_empty() {
            text.push('/');
        }
        text.push_str(&path);
        text
    }
}

/// Reads a query; the flag says whether every part of it could be read.
pub(crate) fn parse_query(text: &str) -> (Vec<(String, String)>, bool) {
    let mut pairs = vec![];
    let mut all = true;
    for part in text.split('&').filter(|part| !part.is_empty()) {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        match (unescape(key, true), unescape(value, true)) {
            (Some(key), Some(value)) if !part.contains(';') => pairs.push((key, value)),
            _ => all = false,
        }
    }
    (pairs, all)
}

/// Splits `scheme:`; a text that cannot begin a URL is refused.
fn split_scheme(text: &str) -> Option<(&str, &str)> {
    for (at, c) in text.char_indices() {
        match c {
            'a'..='z' | 'A'..='Z' => {}
            '0'..='9' | '+' | '-' | '.' if at > 0 => {}
            ':' if at == 0 => return None,
            ':' => return Some((&text[..at], &text[at + 1..])),
            _ => break,
        }
    }
    Some(("", text))
}

fn unescape(text: &str, plus_is_blank: bool) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(b) = rest.next() {
        bytes.push(match b {
            b'%' => {
                let high = char::from(rest.next()?).to_digit(16)?;
                let low = char::from(rest.next()?).to_digit(16)?;
                u8::try_from(high * 16 + low).ok()?
            }
            b'+' if plus_is_blank => b' ',
            b => b,
        });
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn escape(text: &str, allowed: &[u8]) -> String {
    let mut escaped = String::new();
    for b in text.bytes() {
        if b.is_ascii_alphanumeric() || b"-_.~".contains(&b) || allowed.contains(&b) {
            escaped.push(char::from(b));
        } else {
            escaped.push_str(&format!("%{b:02X}"));
        }
    }
    escaped
}

/// Returns the last part of a URL's path, which its file is called by.
pub(crate) fn file_name(url: &str) -> String {
    let path = Url::parse(url).map(|url| url.path).unwrap_or_default();
    match path.trim_end_matches('/').rsplit('/').next() {
        None | Some("" | ".") => "__unnamed__".into(),
        Some(name) => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_written_as_they_were_meant() {
        for (text, expected) in [
            ("https://x/y.git", "https://x/y.git"),
            ("HTTPS://X/y.git#a:b", "https://X/y.git"),
            ("https://u:p%40@x:80/a%20b/c?q=1", "https://u:p%40@x:80/a%20b/c"),
            ("https://x/a b", "https://x/a%20b"),
            ("https://x/a%2fb", "https://x/a%2fb"),
            ("https://x", "https://x"),
            ("git://x/(y)", "git://x/(y)"),
        ] {
            assert_eq!(Url::parse(text).unwrap().without_options(), expected, "{text}");
        }
        for bad in
            ["https://x:y/", "https://x y/", "https://x/%zz", "https://[x/", ":a", "a:b\u{1}"]
        {
            assert_eq!(Url::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn files_are_called_by_the_path() {
        for (url, expected) in [
            ("https://x/a/b.tar.gz?c=d/e#f/g", "b.tar.gz"),
            ("https://x/a%20b", "a b"),
            ("https://x/a/", "a"),
            ("https://x/", "__unnamed__"),
            ("https://x", "__unnamed__"),
            ("https://x/%zz", "__unnamed__"),
            ("https://x/..", ".."),
        ] {
            assert_eq!(file_name(url), expected, "{url}");
        }
    }

    #[test]
    fn queries_are_decoded() {
        let query = |text: &str| parse_query(text);
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(
            query("a=1&b&c=%2F+d"),
            (vec![pair("a", "1"), pair("b", ""), pair("c", "/ d")], true)
        );
        assert_eq!(query("a=%z&b=1;c"), (vec![], false));
    }
}
