//! Names of git repositories: what is one, and the source it becomes.

use slipway_spec::flag;
use std::collections::BTreeMap;

use slipway_spec::llb::{State, VertexOptions};
use slipway_spec::pattern::clean_path;

use super::url::{Url, parse_query};

/// A repository, and what of it is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GitRef {
    /// What git is told to fetch from.
    pub(crate) remote: String,
    /// A branch, tag or commit; empty for the default branch.
    pub(crate) reference: String,
    /// The commit that must be found; empty for any.
    pub(crate) checksum: String,
    /// A folder of the repository; empty for all.
    pub(crate) subdir: String,
    /// Whether the text could as well be a path: `github.com/x/y`. Only a build context is read so.
    pub(crate) like_a_path: bool,
    pub(crate) keep_git_dir: Option<bool>,
    pub(crate) submodules: Option<bool>,
    /// `checkout` or `commit`; empty for the default.
    pub(crate) mtime: String,
    pub(crate) fetch_by_commit: bool,
}

/// What [`parse`] finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// No name of a repository.
    Other,
    /// A repository, but its options are wrong.
    Wrong(String),
    /// A repository.
    Git(Box<GitRef>),
}

const SCHEMES: [&str; 4] = ["http", "https", "ssh", "git"];

/// A remote before its options are understood.
#[derive(Debug)]
struct Remote {
    scheme: String,
    host: String,
    path: String,
    query: Vec<(String, String)>,
    fragment: String,
    remote: String,
}

impl Remote {
    /// Reads a URL or `user@host:path`; `None` for anything else.
    fn parse(text: &str) -> Option<Self> {
        if let Some((scheme, _)) = text.split_once("://")
            && !scheme.is_empty()
            && scheme.bytes().all(|b| b.is_ascii_alphanumeric())
        {
            let known = SCHEMES.contains(&scheme.to_ascii_lowercase().as_str());
            return if known { Some(Self::from_url(Url::parse(text)?)) } else { None };
        }
        Self::parse_scp(text)
    }

    fn from_url(url: Url) -> Self {
        Self {
            remote: url.without_options(),
            scheme: url.scheme,
            host: url.host,
            path: url.path,
            query: url.query,
            fragment: url.fragment,
        }
    }

    fn parse_scp(text: &str) -> Option<Self> {
        let (user, rest) = text.split_once('@')?;
        let (host, rest) = rest.split_once(':')?;
        let word = |text: &str, extra: char| {
            !text.is_empty()
                && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == extra)
        };
        if !word(user, '_') || !word(host, '.') || rest.contains('\n') {
            return None;
        }
        let (rest, fragment) = rest.split_once('#').unwrap_or((rest, ""));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (query, all) = parse_query(query);
        all.then(|| Self {
            scheme: "ssh".into(),
            host: host.into(),
            path: path.into(),
            query,
            fragment: fragment.into(),
            remote: format!("{user}@{host}:{path}"),
        })
    }
}

/// Reads a text as the name of a repository.
pub(crate) fn parse(text: &str) -> Found {
    if text.starts_with("./") || text.starts_with("../") {
        return Found::Other;
    }
    let like_a_path = text.starts_with("github.com/");
    let remote = if like_a_path {
        Url::parse(text).map(|mut url| {
            url.scheme = "https".into();
            Remote::from_url(url)
        })
    } else {
        Remote::parse(text).filter(|remote| {
            !matches!(remote.scheme.as_str(), "http" | "https") || remote.path.ends_with(".git")
        })
    };
    let Some(remote) = remote else { return Found::Other };
    let mut git = GitRef { like_a_path, ..GitRef::default() };
    git.remote = match remote.remote.split_once("://") {
        Some((_, rest)) if like_a_path => rest.into(),
        _ => remote.remote,
    };
    if !remote.fragment.is_empty() {
        let (reference, subdir) = remote.fragment.split_once(':').unwrap_or((&remote.fragment, ""));
        git.reference = reference.into();
        git.subdir = clean_path(&format!("/{subdir}")).trim_start_matches('/').into();
    }
    match git.read_query(&remote.query) {
        Ok(()) => Found::Git(Box::new(git)),
        Err(reason) => Found::Wrong(reason),
    }
}

/// Returns whether a source of `ADD` is a repository, as far as checks before its use are concerned.
pub(crate) fn is_git(text: &str) -> bool {
    matches!(parse(text), Found::Git(_))
}

/// Returns whether a source of `ADD` is a file to download.
pub(crate) fn is_http(text: &str) -> bool {
    (text.starts_with("http://") || text.starts_with("https://")) && !is_git(text)
}

impl GitRef {
    fn read_query(&mut self, query: &[(String, String)]) -> Result<(), String> {
        let mut tag = String::new();
        let mut branch = String::new();
        for (position, (key, value)) in query.iter().enumerate() {
            if query[..position].iter().any(|(known, _)| known == key) {
                return Err(format!("query {key:?} has multiple values"));
            }
            let switch = || match value.as_str() {
                "" => Ok(true),
                text => flag::parse(text).ok_or_else(|| format!("invalid {key} value: {text:?}")),
            };
            let switches = ["submodules", "keep-git-dir", "fetch-by-commit"];
            if value.is_empty() && !switches.contains(&key.as_str()) {
                return Err(format!("query {key:?} has no value"));
            }
            match key.as_str() {
                "ref" => set(&mut self.reference, "ref", value)?,
                "tag" => tag.clone_from(value),
                "branch" => branch.clone_from(value),
                "subdir" => set(&mut self.subdir, "subdir", value)?,
                "checksum" | "commit" => self.checksum.clone_from(value),
                "keep-git-dir" => self.keep_git_dir = Some(switch()?),
                "submodules" => self.submodules = Some(switch()?),
                "fetch-by-commit" => self.fetch_by_commit = switch()?,
                "mtime" if matches!(value.as_str(), "checkout" | "commit") => {
                    self.mtime.clone_from(value);
                }
                "mtime" => {
                    return Err(format!(
                        "invalid mtime value: {value:?} (must be \"checkout\" or \"commit\")"
                    ));
                }
                _ => return Err(format!("unexpected query {key:?}")),
            }
        }
        if !tag.is_empty() {
            set(&mut self.reference, "ref", &qualified("refs/tags/", &tag))?;
        }
        if !branch.is_empty() {
            if !tag.is_empty() {
                return Err("branch conflicts with tag".into());
            }
            set(&mut self.reference, "ref", &qualified("refs/heads/", &branch))?;
        }
        Ok(())
    }

    /// Makes the source. `keep_git_dir` and `checksum` are what is to hold after flags were looked at.
    pub(crate) fn to_state(
        &self,
        keep_git_dir: bool,
        checksum: &str,
        mtime: &str,
        options: VertexOptions,
    ) -> State {
        let parsed = Remote::parse(&self.remote);
        let (url, parsed) = match parsed {
            Some(parsed) => (parsed.remote.clone(), Some(parsed)),
            None if self.remote.contains("://") => (self.remote.clone(), None),
            None => {
                let url = format!("https://{}", self.remote);
                match Remote::parse(&url) {
                    Some(parsed) => (parsed.remote.clone(), Some(parsed)),
                    None => (url, None),
                }
            }
        };
        // The same repository has the same identifier however it is reached.
        let mut id = match &parsed {
            None => url.clone(),
            Some(remote) => {
                let mut id = remote.host.clone();
                id.push_str(&clean_path(&format!("/{}", remote.path)));
                if !self.reference.is_empty() || !self.subdir.is_empty() {
                    id.push('#');
                    id.push_str(&self.reference);
                    if !self.subdir.is_empty() {
                        id.push(':');
                        id.push_str(&self.subdir);
                    }
                }
                id
            }
        };
        id.insert_str(0, "git://");
        let mut attrs = BTreeMap::from([
            ("git.authtokensecret", "GIT_AUTH_TOKEN"),
            ("git.authheadersecret", "GIT_AUTH_HEADER"),
        ]);
        if !url.is_empty() {
            attrs.insert("git.fullurl", &url);
        }
        if keep_git_dir {
            attrs.insert("git.keepgitdir", "true");
        }
        if parsed.is_some_and(|remote| remote.scheme == "ssh") {
            attrs.insert("git.mountsshsock", "default");
        }
        if !checksum.is_empty() {
            attrs.insert("git.checksum", checksum);
        }
        if self.submodules == Some(false) {
            attrs.insert("git.skipsubmodules", "true");
        }
        if !mtime.is_empty() {
            attrs.insert("git.mtime", mtime);
        }
        if self.fetch_by_commit {
            attrs.insert("git.fetchbycommit", "true");
        }
        let attrs = attrs.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
        State::source(&id, attrs.collect(), options)
    }
}

fn set(field: &mut String, what: &str, value: &str) -> Result<(), String> {
    if !field.is_empty() && field != value {
        return Err(format!("{what} conflicts: {field:?} vs {value:?}"));
    }
    value.clone_into(field);
    Ok(())
}

fn qualified(prefix: &str, name: &str) -> String {
    if name.starts_with(prefix) { name.into() } else { format!("{prefix}{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn git(text: &str) -> GitRef {
        match parse(text) {
            Found::Git(git) => *git,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn repositories_are_told_from_files() {
        for text in [
            "git://x/y",
            "https://x/y.git",
            "http://x/y.git?ref=a",
            "https://x/y.git#main:sub",
            "git@host.org:a/b",
            "ssh://git@x/y",
            "ssh://x",
            "github.com/x/y",
        ] {
            assert!(is_git(text), "{text}");
            assert!(!is_http(text), "{text}");
        }
        for text in [
            "https://x/y",
            "./a@b:c",
            "../a@b:c",
            "a/b@c",
            "https://x/y.git/",
            "https://x/y.git.bar",
            "a@b",
            "ftp://x/y.git",
            "file:///x.git",
            "git://x:bad/y",
            "",
        ] {
            assert_eq!(parse(text), Found::Other, "{text}");
        }
    }

    #[test]
    fn options_stand_in_fragment_or_query() {
        let found = git("https://x/y.git#a/b:../c/./d");
        assert_eq!((found.reference.as_str(), found.subdir.as_str()), ("a/b", "c/d"));
        assert_eq!(git("https://x/y.git#:d").subdir, "d");
        assert_eq!(git("https://x/y.git?tag=v1").reference, "refs/tags/v1");
        assert_eq!(git("https://x/y.git?branch=refs/heads/b").reference, "refs/heads/b");
        assert_eq!(git("git@x:y.git?ref=a&subdir=/s#a").subdir, "/s");
        let found = git(
            "https://x/y.git?commit=abc&keep-git-dir&submodules=0&mtime=commit&fetch-by-commit=true",
        );
        assert_eq!((found.keep_git_dir, found.submodules), (Some(true), Some(false)));
        assert_eq!((found.checksum.as_str(), found.mtime.as_str()), ("abc", "commit"));
        assert!(found.fetch_by_commit);
        assert_eq!(git("github.com/x/y#b").remote, "github.com/x/y");
        assert_eq!(git("https://u:p@x:80/y.git#b").remote, "https://u:p@x:80/y.git");
    }

    #[test]
    fn wrong_options_are_told() {
        for (query, message) in [
            ("ref=a&ref=b", "query \"ref\" has multiple values"),
            ("ref=", "query \"ref\" has no value"),
            ("nope=1", "unexpected query \"nope\""),
            ("ref=a#b", "ref conflicts: \"b\" vs \"a\""),
            ("subdir=a#:b", "subdir conflicts: \"b\" vs \"a\""),
            ("tag=a&branch=b", "branch conflicts with tag"),
            ("ref=a&tag=b", "ref conflicts: \"a\" vs \"refs/tags/b\""),
            ("submodules=x", "invalid submodules value: \"x\""),
            ("mtime=x", "invalid mtime value: \"x\" (must be \"checkout\" or \"commit\")"),
        ] {
            assert_eq!(parse(&format!("https://x/y.git?{query}")), Found::Wrong(message.into()));
        }
    }

    #[test]
    fn sources_are_named_by_host_and_path() {
        for (text, id, url) in [
            ("https://x/y.git#a:b", "git://x/y.git#a:b", "https://x/y.git"),
            ("git@x:a/b.git", "git://x/a/b.git", "git@x:a/b.git"),
            ("github.com/x/y#b", "git://github.com/x/y#b", "https://github.com/x/y"),
            ("https://u@x:80/y.git?subdir=s", "git://x:80/y.git#:s", "https://u@x:80/y.git"),
        ] {
            let source =
                git(text).to_state(false, "", "", VertexOptions::default()).source_op().unwrap();
            assert_eq!(
                (source.identifier.as_str(), source.attrs["git.fullurl"].as_str()),
                (id, url)
            );
        }
        let source = git("ssh://git@x/y").to_state(true, "abc", "commit", VertexOptions::default());
        let attrs = source.source_op().unwrap().attrs;
        let attrs: Vec<_> = attrs.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(
            attrs,
            [
                "git.authheadersecret=GIT_AUTH_HEADER",
                "git.authtokensecret=GIT_AUTH_TOKEN",
                "git.checksum=abc",
                "git.fullurl=ssh://git@x/y",
                "git.keepgitdir=true",
                "git.mountsshsock=default",
                "git.mtime=commit",
            ]
        );
    }
}
