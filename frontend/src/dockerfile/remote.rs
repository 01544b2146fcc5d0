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

#[cfg(test)]
mod tests {
    use super::*;

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
