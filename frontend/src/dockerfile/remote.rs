//! What a text means as the name of a build context, for those who choose what to offer a frontend.

use super::git;

/// A context that is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoteContext {
    /// A git repository.
    Git {
        /// Whether it is reached over SSH.
        ssh: bool,
        /// Whether options stand behind a question mark.
        query: bool,
    },
    /// A file of the web: an archive, or a Dockerfile.
    Web,
}

/// Reads a text as the name of something to fetch; `None` when it can only be a path.
pub fn remote_context(text: &str) -> Option<RemoteContext> {
    let web = text.starts_with("http://") || text.starts_with("https://");
    match git::parse(text) {
        // Whatever is wrong with it is told when it is used.
        git::Found::Git(_) | git::Found::Wrong(_) => {
            let ssh = text.starts_with("ssh://") || !text.contains("://") && text.contains('@');
            let query = text.split('#').next().unwrap_or_default().contains('?');
            Some(RemoteContext::Git { ssh, query })
        }
        git::Found::Other => web.then_some(RemoteContext::Web),
    }
}

/// Writes the name of a git repository without options: the remote and, behind `#`, the ref and, if that is wanted, the
/// folder. `None` when the text names no repository.
pub fn git_address(text: &str, with_subdir: bool) -> Option<String> {
    let git::Found::Git(git) = git::parse(text) else { return None };
    let mut address = git.remote;
    let subdir = if with_subdir { git.subdir.trim_matches('/') } else { "" };
    if !git.reference.is_empty() || !subdir.is_empty() {
        address.push('#');
        address.push_str(&git.reference);
    }
    if !subdir.is_empty() {
        address.push(':');
        address.push_str(subdir);
    }
    Some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_repositories_have_no_options() {
        for (text, with_subdir, expected) in [
            ("https://h/a.git?branch=main&subdir=s", true, "https://h/a.git#refs/heads/main:s"),
            ("https://h/a.git#main:s", false, "https://h/a.git#main"),
            ("https://h/a.git#:s", true, "https://h/a.git#:s"),
            ("https://h/a.git#:s", false, "https://h/a.git"),
        ] {
            assert_eq!(git_address(text, with_subdir).as_deref(), Some(expected), "{text}");
        }
        assert_eq!(git_address("https://h/a.tar", true), None);
    }

    #[test]
    fn paths_are_told_from_what_is_fetched() {
        let git = |ssh, query| Some(RemoteContext::Git { ssh, query });
        for (text, expected) in [
            ("https://h/a/b.git#main:sub", git(false, false)),
            ("https://h/a/b.git?branch=main", git(false, true)),
            ("https://h/a/b.git#what?ever", git(false, false)),
            ("git@h:a/b", git(true, false)),
            ("ssh://git@h/a", git(true, false)),
            ("github.com/a/b", git(false, false)),
            ("https://h/a/b.git?nonsense=1", git(false, true)),
            ("https://h/a.tar.gz", Some(RemoteContext::Web)),
            (".", None),
            ("./github.com/a", None),
            ("docker-image://alpine", None),
            ("", None),
        ] {
            assert_eq!(remote_context(text), expected, "{text}");
        }
    }
}
