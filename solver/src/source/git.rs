//! Git repositories: a ref becomes a commit, a commit becomes a file system.
//!
//! Everything is done by the `git` program, which sees nothing of this machine's configuration, runs no hooks, and speaks
//! only the protocols of [`GitOptions`]. Clones are kept in the store, one for each remote; a checkout borrows their
//! objects.

mod checkout;
mod command;

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use slipway_spec::llb::pb;
use slipway_store::kept::{KeptFolder, KeptKind, Sharing};
use slipway_store::result::ResultKey;
use slipway_store::snapshot::Snapshot;
use slipway_store::{Store, blocking};

use self::command::Git;
use crate::client::Services;
use crate::client::ssh::{AgentSocket, SocketOwner};
use crate::error::{Cause, Result};
use crate::job::tagged;
use crate::source::metadata::GitMetadata;

/// How repositories are fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GitOptions {
    /// The `git` program.
    pub program: PathBuf,
    /// What remotes and submodules may be reached by: `https`, `http`, `ssh`, `git`, `file`.
    pub protocols: Vec<String>,
}

impl Default for GitOptions {
    fn default() -> Self {
        Self {
            program: "git".into(),
            protocols: ["https", "http", "ssh", "git"].map(Into::into).into(),
        }
    }
}

/// Times of what is checked out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Times {
    Checkout,
    Commit,
}

/// A repository as a definition names it.
#[derive(Clone, Debug)]
pub(crate) struct GitSource {
    remote: String,
    reference: String,
    subdir: String,
    keep_git_dir: bool,
    checksum: String,
    fetch_by_commit: bool,
    submodules: bool,
    times: Times,
    token_secret: Option<String>,
    header_secret: Option<String>,
    known_hosts: Option<String>,
    agent: Option<String>,
}

/// What a ref stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Commit {
    /// The object that the ref names: a commit, or the tag that names one.
    object: String,
    /// The commit of a tag.
    peeled: Option<String>,
    /// The full name of the ref, or the commit itself.
    name: String,
}

impl Commit {
    /// Returns the object that the ref names.
    pub(crate) fn object(&self) -> &str {
        &self.object
    }
}

impl GitSource {
    pub(crate) fn read(source: &pb::SourceOp) -> Result<Self> {
        let fail = |what: &str| Cause::Invalid(format!("the source {}: {what}", source.identifier));
        for (name, value) in &source.attrs {
            let refused = name.starts_with("git.sig.")
                || name == "git.bundle" && !value.is_empty()
                || name == "git.checkoutbundle" && value == "true";
            if refused {
                return Err(
                    Cause::Unsupported(format!("the attribute {name} of a git source")).into()
                );
            }
        }
        let text = |name: &str| source.attrs.get(name).filter(|text| !text.is_empty()).cloned();
        let yes = |name: &str| source.attrs.get(name).is_some_and(|value| value == "true");
        let name = source.identifier.trim_start_matches("git://");
        let (place, fragment) = name.split_once('#').unwrap_or((name, ""));
        let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
        let remote = text("git.fullurl").unwrap_or_else(|| place.to_owned());
        let remote = match remote.split_once('#') {
            Some((remote, _)) => remote.to_owned(),
            None => remote,
        };
        let remote = if is_transport(&remote) { remote } else { format!("https://{remote}") };
        check_remote(&remote).map_err(|what| fail(&what))?;
        check_reference(reference).map_err(|what| fail(&what))?;
        let checksum = text("git.checksum").unwrap_or_default();
        if !checksum.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(fail("git.checksum must be the hexadecimal digits of a commit").into());
        }
        let subdir =
            String::from_utf8_lossy(&slipway_store::tree::clean(subdir.as_bytes())).into_owned();
        let times = match source.attrs.get("git.mtime").map_or("", String::as_str) {
            "" | "checkout" => Times::Checkout,
            "commit" => Times::Commit,
            _ => return Err(fail("git.mtime must be checkout or commit").into()),
        };
        Ok(Self {
            remote,
            reference: reference.into(),
            // A part of a repository has no folder of git.
            keep_git_dir: yes("git.keepgitdir") && subdir.is_empty(),
            subdir,
            checksum: checksum.to_ascii_lowercase(),
            fetch_by_commit: yes("git.fetchbycommit"),
            submodules: !yes("git.skipsubmodules"),
            times,
            token_secret: text("git.authtokensecret"),
            header_secret: text("git.authheadersecret"),
            known_hosts: text("git.knownsshhosts"),
            agent: text("git.mountsshsock"),
        })
    }

    /// Returns the remote and, behind `#`, the ref if there is one.
    pub(crate) fn address(&self) -> String {
        let mut address = self.remote.clone();
        if !self.reference.is_empty() {
            address.push('#');
            address.push_str(&self.reference);
        }
        address
    }

    /// Returns the secrets that the remote may be shown.
    pub(crate) fn secrets(&self) -> impl Iterator<Item = &str> {
        self.token_secret.iter().chain(&self.header_secret).map(String::as_str)
    }

    /// Returns the SSH agent that the remote may be spoken to with.
    pub(crate) fn agent(&self) -> Option<&str> {
        self.agent.as_deref()
    }

    /// Returns the remote without what may be a credential.
    fn shown(&self) -> String {
        redact(&self.remote)
    }

    /// Returns the commit if it is known without asking the remote.
    ///
    /// # Errors
    /// When the definition contradicts itself.
    pub(crate) fn pinned(&self) -> Result<Option<Commit>> {
        let mismatch = |found: &str| {
            Cause::Invalid(format!(
                "{}: expected checksum to match {}, got {found}",
                self.shown(),
                self.checksum
            ))
        };
        if is_commit(&self.reference) {
            let object = self.reference.to_ascii_lowercase();
            if !object.starts_with(&self.checksum) {
                return Err(mismatch(&object).into());
            }
            return Ok(Some(Commit { name: object.clone(), object, peeled: None }));
        }
        if !self.fetch_by_commit {
            return Ok(None);
        }
        if !is_commit(&self.checksum) {
            return Err(Cause::Invalid(format!(
                "{}: fetching by commit needs the whole commit as checksum",
                self.shown()
            ))
            .into());
        }
        let name = match self.reference.as_str() {
            "" => self.checksum.clone(),
            name if name.starts_with("refs/") => name.into(),
            name => format!("refs/heads/{name}"),
        };
        Ok(Some(Commit { object: self.checksum.clone(), peeled: None, name }))
    }

    /// Finds out what the ref stands for.
    ///
    /// # Errors
    /// When the remote cannot be asked, or has no such ref.
    pub(crate) async fn resolve(&self, store: &Store, services: &Services) -> Result<Commit> {
        if let Some(commit) = self.pinned()? {
            return Ok(commit);
        }
        let git = self.open(store, services).await?;
        let name = if self.reference.is_empty() { "HEAD" } else { &self.reference };
        let peeled = format!("{name}^{{}}");
        let listed =
            git.run(None, &["ls-remote", "--symref", "--", &self.remote, name, &peeled]).await?;
        let listed = String::from_utf8_lossy(&listed).into_owned();
        let commit = self.choose(&listed).ok_or_else(|| {
            Cause::Missing(format!(
                "{}: repository does not contain ref {name}; name a branch, a tag or a commit that it has",
                self.shown()
            ))
        })?;
        let ids = [Some(&commit.object), commit.peeled.as_ref()];
        if !ids.iter().flatten().any(|id| id.starts_with(&self.checksum)) {
            let found: Vec<&str> = ids.iter().flatten().map(|id| id.as_str()).collect();
            return Err(Cause::Invalid(format!(
                "{}: expected checksum to match {}, got {}",
                self.shown(),
                self.checksum,
                found.join(" or ")
            ))
            .into());
        }
        Ok(commit)
    }

    /// Picks from what a remote lists: what is named in full, then a branch, then a tag.
    fn choose(&self, listed: &str) -> Option<Commit> {
        let find = |name: &str| {
            listed.lines().find_map(|line| {
                let (id, listed) = line.split_once('\t')?;
                (listed == name && is_commit(id)).then(|| id.to_owned())
            })
        };
        if self.reference.is_empty() {
            let object = find("HEAD")?;
            let name = listed.lines().find_map(|line| {
                line.strip_prefix("ref: ")?.strip_suffix("\tHEAD").map(ToOwned::to_owned)
            });
            let name = name.filter(|name| check_reference(name).is_ok());
            return Some(Commit {
                name: name.unwrap_or_else(|| object.clone()),
                object,
                peeled: None,
            });
        }
        let reference = self.reference.as_str();
        let full = format!("refs/{}", reference.trim_start_matches("refs/"));
        let head = format!("refs/heads/{}", reference.trim_start_matches("refs/heads/"));
        let tag = format!("refs/tags/{}", reference.trim_start_matches("refs/tags/"));
        for name in [full, head, tag] {
            if let Some(object) = find(&name) {
                let peeled = find(&format!("{name}^{{}}")).filter(|peeled| *peeled != object);
                return Some(Commit { object, peeled, name });
            }
        }
        None
    }

    /// Returns what identifies the checkout of a commit.
    pub(crate) fn key(&self, commit: &Commit) -> ResultKey {
        let mut hash = tagged(b"git");
        let mut put = |text: &str| {
            sha2::Digest::update(&mut hash, (text.len() as u64).to_le_bytes());
            sha2::Digest::update(&mut hash, text);
        };
        if self.keep_git_dir {
            // The folder of git holds the ref's name and the remote.
            put(&commit.object);
            put(&commit.name);
            put(&self.shown());
        } else {
            put(commit.peeled.as_ref().unwrap_or(&commit.object));
        }
        put(&self.subdir);
        put(if self.submodules { "submodules" } else { "" });
        put(if self.times == Times::Commit { "commit" } else { "" });
        ResultKey(sha2::Digest::finalize(hash).into())
    }

    /// Checks a commit out as a layer.
    ///
    /// # Errors
    /// When the commit cannot be fetched, or does not have what was asked for.
    pub(crate) async fn snapshot(
        &self,
        commit: &Commit,
        store: &Store,
        services: &Services,
        name: &str,
    ) -> Result<Snapshot> {
        let git = self.open(store, services).await?;
        let clone = self.clone_folder(store, commit).await?;
        checkout::Checkout { source: self, git: &git, clone: &clone.folder(), commit }
            .make(store, name)
            .await
    }

    /// Returns what is known of a commit without fetching it.
    pub(crate) fn metadata(&self, commit: &Commit) -> GitMetadata {
        GitMetadata {
            checksum: commit.object.clone(),
            reference: commit.name.clone(),
            // Where the folder of git is kept, the tag is what is checked out.
            commit_checksum: commit.peeled.clone().filter(|_| !self.keep_git_dir),
            ..GitMetadata::default()
        }
    }

    /// Adds the objects of a commit, as git stores them.
    ///
    /// # Errors
    /// When the commit cannot be fetched.
    pub(crate) async fn add_objects(
        &self,
        commit: &Commit,
        store: &Store,
        services: &Services,
        metadata: &mut GitMetadata,
    ) -> Result<()> {
        let git = self.open(store, services).await?;
        let clone = self.clone_folder(store, commit).await?;
        checkout::Checkout { source: self, git: &git, clone: &clone.folder(), commit }
            .objects(metadata)
            .await
    }

    /// Takes the clone of the remote, waiting for whoever uses it.
    async fn clone_folder(&self, store: &Store, commit: &Commit) -> Result<KeptFolder> {
        // A repository has one kind of object names, and the remote may change its mind.
        let key = format!("{} {}", self.remote, commit.object.len());
        let mut pause = Duration::from_millis(20);
        loop {
            let (store, shown, key) = (store.clone(), self.shown(), key.clone());
            let taken = blocking::run(move || {
                store.try_keep(KeptKind::Git, &shown, key.as_bytes(), Sharing::Locked, |_| Ok(()))
            });
            if let Some(folder) = taken.await? {
                return Ok(folder);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    /// Prepares the program with what it needs to reach the remote.
    async fn open(&self, store: &Store, services: &Services) -> Result<Git> {
        let mut git = Git::new(&services.git, &self.remote, store.temporary("git-home"))?;
        if let Some(header) = self.authorization(services).await? {
            git.set_header(&token_scope(&self.remote), &header);
        }
        if let Some(id) = &self.agent {
            if !services.ssh.check(id).await? {
                return Err(
                    Cause::Missing(format!("no SSH key {id:?} forwarded from the client")).into()
                );
            }
            let owner = SocketOwner {
                uid: rustix::process::geteuid().as_raw(),
                gid: rustix::process::getegid().as_raw(),
                mode: 0o700,
            };
            git.set_agent(AgentSocket::open(store, services.ssh.clone(), id, owner)?);
        }
        git.set_known_hosts(self.known_hosts.as_deref())?;
        Ok(git)
    }

    async fn authorization(&self, services: &Services) -> Result<Option<String>> {
        let host = host(&self.remote).unwrap_or_default();
        let with_host = |id: &String| format!("{id}.{host}");
        let candidates = [
            (self.header_secret.as_ref().map(with_host), false),
            (self.token_secret.as_ref().map(with_host), true),
            (self.header_secret.clone(), false),
            (self.token_secret.clone(), true),
        ];
        for (id, is_token) in candidates {
            let Some(id) = id else { continue };
            let Some(secret) = services.secrets.secret(&id).await? else { continue };
            let text = String::from_utf8_lossy(secret.expose()).trim().to_owned();
            if text.contains(['\n', '\r', '\0']) {
                return Err(Cause::Invalid(format!("secret {id}: it must be one line")).into());
            }
            return Ok(Some(if is_token {
                let pair = format!("x-access-token:{text}");
                format!("basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
            } else {
                text
            }));
        }
        Ok(None)
    }
}

/// Where a credential may be sent: to the remote alone, or to its whole site where that is what tokens are made for.
fn token_scope(remote: &str) -> String {
    const SITE: &str = "https://github.com/";
    if remote.starts_with(SITE) { SITE.into() } else { remote.into() }
}

fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn is_transport(remote: &str) -> bool {
    remote.contains("://") || is_scp(remote)
}

/// `user@host:path`, which stands for SSH.
fn is_scp(remote: &str) -> bool {
    let Some((left, path)) = remote.split_once(':') else { return false };
    !path.starts_with("//") && left.contains('@') && !left.contains('/')
}

/// Returns what a remote is reached by.
fn protocol(remote: &str) -> Option<&str> {
    match remote.split_once("://") {
        Some((scheme, _)) => Some(scheme),
        None => is_scp(remote).then_some("ssh"),
    }
}

fn host(remote: &str) -> Option<&str> {
    let rest = match remote.split_once("://") {
        Some((_, rest)) => rest.split(['/', '?', '#']).next()?,
        None => remote.split_once(':')?.0,
    };
    let host = rest.rsplit('@').next()?;
    // As upstream has it, the port is part of the name under which secrets are looked up.
    Some(host)
}

fn redact(remote: &str) -> String {
    let Some((scheme, rest)) = remote.split_once("://") else { return remote.into() };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    match rest[..end].rsplit_once('@') {
        Some((user, host)) if user.contains(':') => {
            let user = user.split(':').next().unwrap_or_default();
            format!("{scheme}://{user}:xxxxx@{host}{}", &rest[end..])
        }
        _ => remote.into(),
    }
}

/// What is no remote could be an option or a command to git.
fn check_remote(remote: &str) -> std::result::Result<(), String> {
    if remote.bytes().any(|b| b.is_ascii_control()) {
        return Err("the remote has a control character".into());
    }
    let Some(protocol) = protocol(remote) else {
        return Err("the remote is no URL".into());
    };
    // `ext::` and its like run commands.
    if !protocol.bytes().all(|b| b.is_ascii_alphanumeric()) {
        return Err(format!("the remote's protocol {protocol:?} is not one"));
    }
    if protocol != "file"
        && host(remote).is_none_or(|host| host.is_empty() || host.starts_with('-'))
    {
        return Err("the remote has no host".into());
    }
    if remote.starts_with('-') {
        return Err("the remote looks like an option".into());
    }
    Ok(())
}

/// The rules of `git check-ref-format`, roughly: nothing that could be an option, a pattern or two refs.
fn check_reference(reference: &str) -> std::result::Result<(), String> {
    let bad = reference.starts_with(['-', '/'])
        || reference.ends_with(['/', '.'])
        || reference.contains("..")
        || reference.contains("//")
        || reference.contains("@{")
        || reference.split('/').any(|part| part.starts_with('.') || part.ends_with(".lock"))
        || reference.bytes().any(|b| {
            b.is_ascii_control()
                || matches!(b, b' ' | b'~' | b'^' | b':' | b'?' | b'*' | b'[' | b'\\')
        });
    if bad { Err(format!("{reference:?} cannot be the name of a ref")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(identifier: &str, attrs: &[(&str, &str)]) -> Result<GitSource> {
        let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        GitSource::read(&pb::SourceOp { identifier: identifier.into(), attrs })
    }

    #[test]
    fn identifiers_are_taken_apart() {
        let source = read("git://h/p.git#v1:a/../sub/", &[]).unwrap();
        assert_eq!(
            (source.remote.as_str(), source.reference.as_str(), source.subdir.as_str()),
            ("https://h/p.git", "v1", "sub")
        );
        let source = read(
            "git://h/p.git",
            &[("git.fullurl", "git@h:p.git"), ("git.keepgitdir", "true"), ("git.mtime", "commit")],
        )
        .unwrap();
        assert_eq!(
            (source.remote.as_str(), protocol(&source.remote)),
            ("git@h:p.git", Some("ssh"))
        );
        assert!(source.keep_git_dir && source.times == Times::Commit && source.submodules);
        assert!(!read("git://h/p.git#:x", &[("git.keepgitdir", "true")]).unwrap().keep_git_dir);
    }

    #[test]
    fn hostile_names_are_refused() {
        for reference in [
            "--upload-pack=touch /tmp/x",
            "-x",
            "a..b",
            "a b",
            "a^{}",
            "x\n",
            "a:b:c*",
            ".a",
            "a.lock",
            "@{1}",
        ] {
            assert!(check_reference(reference).is_err(), "{reference}");
        }
        for reference in ["", "main", "refs/heads/a/b", "v1.0-rc", "feature/x_y"] {
            assert!(check_reference(reference).is_ok(), "{reference}");
        }
        for remote in [
            "ext::sh -c touch% /tmp/x",
            "--upload-pack=x",
            "ssh://-oProxyCommand=x/y",
            "https://",
            "fd::17/foo",
            "-u@h:p",
            "https://h/\nx",
            "/etc",
            "ext::x://y",
        ] {
            let attrs = [("git.fullurl", remote)];
            let refused = read("git://h/p", &attrs);
            // What has no protocol is taken for a host's name.
            assert!(
                refused.as_ref().is_err()
                    || refused.as_ref().unwrap().remote.starts_with("https://"),
                "{remote}"
            );
        }
        assert!(read("git://h/p", &[("git.fullurl", "ext::sh://x")]).is_err());
        assert!(read("git://h/p", &[("git.checksum", "xyz")]).is_err());
        assert!(read("git://h/p", &[("git.sig.pubkey", "x")]).is_err());
        assert!(read("git://h/p", &[("git.bundle", "x")]).is_err());
    }

    #[test]
    fn commits_are_pinned_by_name_or_checksum() {
        let id = "a".repeat(40);
        let pinned = |reference: &str, attrs: &[(&str, &str)]| {
            read(&format!("git://h/p#{reference}"), attrs).unwrap().pinned()
        };
        assert_eq!(pinned(&id, &[]).unwrap().unwrap().object, id);
        assert!(pinned(&id, &[("git.checksum", "bb")]).is_err());
        assert!(pinned("main", &[]).unwrap().is_none());
        let both = [("git.fetchbycommit", "true"), ("git.checksum", id.as_str())];
        assert_eq!(pinned("main", &both).unwrap().unwrap().name, "refs/heads/main");
        assert!(pinned("main", &[("git.fetchbycommit", "true"), ("git.checksum", "aa")]).is_err());
    }

    #[test]
    fn branches_win_over_tags_and_tags_are_peeled() {
        let (one, two, three) = ("1".repeat(40), "2".repeat(40), "3".repeat(40));
        let listed = format!(
            "{one}\trefs/tags/x\n{two}\trefs/tags/x^{{}}\n{three}\trefs/heads/x\nbad\trefs/heads/y\n"
        );
        let choose =
            |reference: &str| read(&format!("git://h/p#{reference}"), &[]).unwrap().choose(&listed);
        assert_eq!(choose("x").unwrap().object, three);
        let tag = choose("refs/tags/x").unwrap();
        assert_eq!((tag.object, tag.peeled), (one, Some(two)));
        assert_eq!(choose("y"), None);
        let head = format!("ref: refs/heads/main\tHEAD\n{three}\tHEAD\n");
        let source = read("git://h/p", &[]).unwrap();
        assert_eq!(source.choose(&head).unwrap().name, "refs/heads/main");
    }

    #[test]
    fn what_changes_the_files_changes_the_key() {
        let commit =
            Commit { object: "1".repeat(40), peeled: Some("2".repeat(40)), name: "t".into() };
        let key = |identifier: &str, attrs: &[(&str, &str)]| {
            read(identifier, attrs).unwrap().key(&commit)
        };
        let plain = key("git://h/p#t", &[]);
        assert_eq!(plain, key("git://other/p", &[]), "the same commit is the same files");
        for attrs in [
            [("git.keepgitdir", "true")],
            [("git.skipsubmodules", "true")],
            [("git.mtime", "commit")],
        ] {
            assert_ne!(plain, key("git://h/p#t", &attrs), "{attrs:?}");
        }
        assert_ne!(plain, key("git://h/p#t:sub", &[]));
    }

    #[test]
    fn credentials_are_not_shown() {
        assert_eq!(redact("https://u:p@h/x"), "https://u:xxxxx@h/x");
        assert_eq!(redact("git@h:x"), "git@h:x");
        assert_eq!(token_scope("https://github.com/a/b"), "https://github.com/");
        assert_eq!(token_scope("https://h/a/b"), "https://h/a/b");
    }
}
