//! What a build may ask of whoever asked for it.

pub mod content;
pub mod policy;
pub mod secret;
pub mod services;
pub mod ssh;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fmt::Debug;
use std::fs;
use std::io::Read as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use slipway_spec::Digest;
use slipway_spec::pattern::{MatchInfo, PatternMatcher};
use slipway_store::tree::scan::{Ahead, Filter, Ownership, Scan, ScanOptions, Verdict, scan_ahead};
use slipway_store::tree::{Tree, clean, join, split};
use slipway_store::{Error, ErrorKind, blocking};

pub use content::{ByteStream, LayoutFolders, LayoutStore, Uploads};
pub use policy::{PolicyAnswer, PolicyQuestion, PolicyVerifier, SourcePolicies};
pub use secret::{SecretBytes, SecretProvider};
pub use services::{DeviceGrants, Entitlements, Services};
pub use ssh::{AgentStream, SshAgents};

/// Which part of a local folder a build reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct LocalRequest {
    /// The name the client knows the folder by: `context`, `dockerfile`.
    pub name: String,
    /// Only these paths and what is below them; wildcards allowed, symbolic links followed. `None` is everything.
    pub follow_paths: Option<Vec<String>>,
    /// Only what matches.
    pub include: Vec<String>,
    /// Not what matches, with `.dockerignore`'s rules.
    pub exclude: Vec<String>,
    /// Whether files are read even if they look as they did when they were read before, by size and time.
    pub fresh: bool,
}

/// Folders of the client.
#[async_trait]
pub trait LocalFiles: Debug + Send + Sync {
    /// Lists part of a folder with digests of all files. The files stay readable until the build ends.
    async fn tree(&self, request: &LocalRequest) -> Result<Tree, Error>;

    /// As [`tree`](Self::tree), for those who as a rule need no more than its digest.
    async fn scan(&self, request: &LocalRequest) -> Result<Scan, Error> {
        let tree = self.tree(request).await?;
        blocking::run(move || Scan::of(tree)).await
    }

    /// Reads one file; `None` when there is none.
    async fn read(&self, name: &str, path: &str) -> Result<Option<Bytes>, Error>;

    /// Returns the same folders as a step of the build sees them: the step is where transfers are shown, and `session` is
    /// the client it wants to read from first. `None` where neither makes a difference.
    fn for_step(&self, vertex: &Digest, session: Option<&str>) -> Option<Arc<dyn LocalFiles>> {
        let _ = (vertex, session);
        None
    }
}

/// Folders of this machine, by name.
#[derive(Clone, Debug)]
pub struct LocalFolders {
    folders: BTreeMap<String, PathBuf>,
    memory: Option<PathBuf>,
    files: BTreeMap<String, BTreeMap<String, Bytes>>,
    ahead: Option<Arc<Ahead>>,
}

/// No Dockerfile or ignore file is larger than this, in bytes.
const MAX_READ: u64 = 32 * 1024 * 1024;

impl LocalFolders {
    /// Offers folders; `memory` is where digests are remembered between builds.
    pub fn new(folders: BTreeMap<String, PathBuf>, memory: Option<PathBuf>) -> Self {
        Self { folders, memory, files: BTreeMap::new(), ahead: None }
    }

    /// Offers files that are only in memory, by the name of their folder and their path in it. Such a folder need not
    /// exist otherwise.
    #[must_use]
    pub fn with_files(mut self, files: BTreeMap<String, BTreeMap<String, Bytes>>) -> Self {
        self.files = files;
        self
    }

    /// Offers a comparison of one of the folders that has begun already.
    #[must_use]
    pub fn with_ahead(mut self, ahead: Option<Ahead>) -> Self {
        self.ahead = ahead.map(Arc::new);
        self
    }

    fn folder(&self, name: &str) -> Result<&Path, Error> {
        self.folders.get(name).map(PathBuf::as_path).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("this build was given no folder {name:?}"))
        })
    }
}

#[async_trait]
impl LocalFiles for LocalFolders {
    async fn tree(&self, request: &LocalRequest) -> Result<Tree, Error> {
        let scan = self.scan(request).await?;
        blocking::run(move || Ok(Arc::unwrap_or_clone(scan.tree()?))).await
    }

    async fn scan(&self, request: &LocalRequest) -> Result<Scan, Error> {
        let in_memory = self.files.get(&request.name);
        if in_memory.is_some_and(BTreeMap::is_empty) && !self.folders.contains_key(&request.name) {
            // A folder without files.
            return Scan::of(Tree::default());
        }
        let folder = self.folder(&request.name)?.to_path_buf();
        let (request, memory) = (request.clone(), self.memory.clone());
        let ahead = self.ahead.clone();
        blocking::run(move || {
            let mut filter = Selection::new(&folder, &request)?;
            let options = ScanOptions { ownership: Ownership::Root, memory: memory.as_deref() };
            scan_ahead(&folder, &mut filter, &options, ahead.as_deref())
        })
        .await
    }

    async fn read(&self, name: &str, path: &str) -> Result<Option<Bytes>, Error> {
        if let Some(files) = self.files.get(name) {
            if let Some(bytes) = files.get(path) {
                return Ok(Some(bytes.clone()));
            }
            if !self.folders.contains_key(name) {
                return Ok(None);
            }
        }
        let path = self.folder(name)?.join(OsStr::from_bytes(&clean(path.as_bytes())));
        blocking::run(move || {
            let failed =
                |error: std::io::Error| Error::io(format!("cannot read {}", path.display()), error);
            // A pipe in the place of the file must not block.
            let opened =
                fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
            let file = match opened {
                Ok(file) => file,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Ok(None),
                Err(error) => return Err(failed(error)),
            };
            if !file.metadata().map_err(failed)?.is_file() {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("{} is not a file", path.display()),
                ));
            }
            let mut bytes = vec![];
            file.take(MAX_READ + 1).read_to_end(&mut bytes).map_err(failed)?;
            if bytes.len() as u64 > MAX_READ {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("{} is larger than 32 MiB", path.display()),
                ));
            }
            Ok(Some(bytes.into()))
        })
        .await
    }
}

/// Decides path by path what a request takes.
#[derive(Debug)]
pub struct Selection {
    identity: [u8; 32],
    followed: Option<BTreeSet<Vec<u8>>>,
    include: Option<Patterns>,
    exclude: Option<Patterns>,
}

#[derive(Debug)]
struct Patterns {
    matcher: PatternMatcher,
    // What matching found for the directories on the way to the current path.
    parents: Vec<(Vec<u8>, MatchInfo)>,
}

impl Patterns {
    fn new(patterns: &[String]) -> Result<Option<Self>, Error> {
        if patterns.is_empty() {
            return Ok(None);
        }
        let matcher = PatternMatcher::new(patterns).map_err(|error| {
            Error::new(ErrorKind::Invalid, "cannot use the patterns").because(error)
        })?;
        Ok(Some(Self { matcher, parents: vec![] }))
    }

    fn matches(&mut self, path: &[u8], directory: bool) -> bool {
        let parent = split(path).0;
        while self.parents.last().is_some_and(|(at, _)| at != parent) {
            self.parents.pop();
        }
        let none = MatchInfo::default();
        let info = self.parents.last().map_or(&none, |(_, info)| info);
        let (matched, info) = self.matcher.match_dir_entry(&String::from_utf8_lossy(path), info);
        if directory {
            self.parents.push((path.to_vec(), info));
        }
        matched
    }
}

impl Selection {
    /// Prepares a request; links that it follows are those of `folder`.
    ///
    /// # Errors
    /// When a pattern is malformed or the folder cannot be read.
    pub fn new(folder: &Path, request: &LocalRequest) -> Result<Self, Error> {
        let followed =
            request.follow_paths.as_ref().map(|paths| follow(folder, paths)).transpose()?;
        let mut hash = Sha256::new();
        let mut list = |items: &mut dyn Iterator<Item = &[u8]>| {
            for item in items {
                hash.update((item.len() as u64).to_le_bytes());
                hash.update(item);
            }
            hash.update(u64::MAX.to_le_bytes());
        };
        list(&mut request.include.iter().map(String::as_bytes));
        list(&mut request.exclude.iter().map(String::as_bytes));
        if let Some(followed) = &followed {
            list(&mut followed.iter().map(Vec::as_slice));
        }
        Ok(Self {
            identity: hash.finalize().into(),
            followed,
            include: Patterns::new(&request.include)?,
            exclude: Patterns::new(&request.exclude)?,
        })
    }
}

impl Filter for Selection {
    fn identity(&self) -> Option<[u8; 32]> {
        Some(self.identity)
    }

    fn verdict(&mut self, path: &[u8], directory: bool) -> Verdict {
        let mut verdict = Verdict::Take;
        if let Some(followed) = &self.followed {
            verdict = wanted(followed, path);
        }
        // As upstream does, what is followed is one more thing to include.
        if let Some(include) = &mut self.include {
            let included = include.matches(path, directory);
            verdict = match (verdict, &self.followed) {
                (_, _) if included => Verdict::Take,
                (Verdict::Take, Some(_)) => Verdict::Take,
                _ => Verdict::Look,
            };
        }
        if verdict != Verdict::Skip
            && let Some(exclude) = &mut self.exclude
            && exclude.matches(path, directory)
        {
            let skip = !directory || exclude.matcher.may_skip_dir(&String::from_utf8_lossy(path));
            verdict = if skip { Verdict::Skip } else { Verdict::Look };
        }
        verdict
    }
}

/// Compares a path with what was asked for: is it asked for, on the way to something asked for, or neither.
fn wanted(followed: &BTreeSet<Vec<u8>>, path: &[u8]) -> Verdict {
    if followed.contains(&b""[..]) {
        return Verdict::Take;
    }
    let mut at = path;
    while !at.is_empty() {
        if followed.contains(at) {
            return Verdict::Take;
        }
        at = split(at).0;
    }
    let below = [path, b"/"].concat();
    let first = followed.range(below.clone()..).next();
    if first.is_some_and(|found| found.starts_with(&below)) { Verdict::Look } else { Verdict::Skip }
}

/// Expands wildcards against the folder and adds what symbolic links lead to.
fn follow(folder: &Path, paths: &[String]) -> Result<BTreeSet<Vec<u8>>, Error> {
    let mut found = BTreeSet::new();
    let mut todo: Vec<(Vec<u8>, Vec<Vec<u8>>, usize)> =
        paths.iter().map(|path| (vec![], parts(&clean(path.as_bytes())), 0)).collect();
    while let Some((at, mut rest, links)) = todo.pop() {
        if rest.is_empty() {
            found.insert(at);
            continue;
        }
        let part = rest.remove(0);
        let escaped = part.contains(&b'\\');
        let mut names = if escaped || crate::glob::is_pattern(&part) {
            matching(&folder.join(OsStr::from_bytes(&at)), &part)?
        } else {
            vec![]
        };
        // Without a wildcard a backslash is part of the name, behind one it is an escape: both are brought.
        if !crate::glob::is_pattern(&part) && !names.contains(&part) {
            names.push(part);
        }
        for name in names {
            let here = join(&at, &name);
            // More links than the kernel follows cannot lead anywhere.
            if links < 40
                && let Ok(target) = fs::read_link(folder.join(OsStr::from_bytes(&here)))
            {
                let target = target.into_os_string().into_vec();
                let from = if target.starts_with(b"/") { vec![] } else { at.clone() };
                let mut parts = parts(&clean(&join(&from, &target)));
                parts.extend(rest.iter().cloned());
                todo.push((vec![], parts, links + 1));
                found.insert(here);
                continue;
            }
            todo.push((here, rest.clone(), links));
        }
    }
    Ok(found)
}

fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|b| *b == b'/').filter(|part| !part.is_empty()).map(<[u8]>::to_vec).collect()
}

fn matching(folder: &Path, pattern: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(vec![]);
        }
        Err(error) => return Err(Error::io(format!("cannot read {}", folder.display()), error)),
    };
    let mut names: Vec<OsString> = vec![];
    for entry in entries {
        names.push(
            entry
                .map_err(|error| Error::io(format!("cannot read {}", folder.display()), error))?
                .file_name(),
        );
    }
    let names = names.into_iter().map(OsString::into_vec);
    Ok(names.filter(|name| crate::glob::matches(pattern, name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(tree: &Tree) -> Vec<String> {
        tree.iter().map(|(path, _)| String::from_utf8(path).unwrap()).collect()
    }

    fn select(folder: &Path, request: LocalRequest) -> Vec<String> {
        let mut filter = Selection::new(folder, &request).unwrap();
        let options = ScanOptions { ownership: Ownership::Root, memory: None };
        paths(&scan_ahead(folder, &mut filter, &options, None).unwrap().tree().unwrap())
    }

    #[test]
    fn ignore_patterns_keep_exceptions_and_their_parents() {
        let folder = tempfile::tempdir().unwrap();
        for path in ["a/keep", "a/drop", "b/drop", "top"] {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let exclude = ["a", "b", "!a/keep"].map(Into::into).to_vec();
        let found = select(folder.path(), LocalRequest { exclude, ..Default::default() });
        assert_eq!(found, ["a", "a/keep", "top"]);
    }

    #[test]
    fn followed_paths_bring_what_links_lead_to() {
        let folder = tempfile::tempdir().unwrap();
        for path in ["real/deep/file", "other/file", "x1", "x2", "y"] {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        std::os::unix::fs::symlink("real/deep", folder.path().join("link")).unwrap();
        let follow = |list: &[&str]| LocalRequest {
            follow_paths: Some(list.iter().map(|s| (*s).to_owned()).collect()),
            ..Default::default()
        };
        assert_eq!(
            select(folder.path(), follow(&["/link/file"])),
            ["link", "real", "real/deep", "real/deep/file"]
        );
        assert_eq!(select(folder.path(), follow(&["x*", "nowhere"])), ["x1", "x2"]);
        assert_eq!(select(folder.path(), follow(&["./other/"])), ["other", "other/file"]);
        assert_eq!(select(folder.path(), follow(&["/"])).len(), 9);
    }
}
