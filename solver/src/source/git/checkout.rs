//! Fetching a commit and laying its files out.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Timespec, Timestamps};
use slipway_store::gc::RecordKind;
use slipway_store::snapshot::Snapshot;
use slipway_store::{Error, Store, blocking};

use super::command::{Git, Reach, Repository};
use super::{Commit, GitSource, Times, is_commit};
use crate::error::{Cause, Result};
use crate::scratch::Scratch;
use crate::source::metadata::GitMetadata;

/// One commit on its way from a remote to a layer.
pub(super) struct Checkout<'a> {
    pub(super) source: &'a GitSource,
    pub(super) git: &'a Git,
    /// The clone, which nobody else uses meanwhile.
    pub(super) clone: &'a Path,
    pub(super) commit: &'a Commit,
}

impl Checkout<'_> {
    pub(super) async fn make(&self, store: &Store, name: &str) -> Result<Snapshot> {
        self.fetch().await?;
        let home = Scratch::new(store.temporary("checkout"));
        self.lay_out(home.path()).await?;
        let (store, name) = (store.clone(), name.to_owned());
        let adopted = blocking::run(move || {
            let layer = home.give(|home| store.adopt_folder(home, &[], &name))?;
            store.set_layer_kind(layer, RecordKind::GitCheckout)?;
            Ok(layer)
        })
        .await?;
        Ok(Snapshot { layers: vec![adopted] })
    }

    /// Reads the commit, and the tag that names it.
    pub(super) async fn objects(&self, metadata: &mut GitMetadata) -> Result<()> {
        self.fetch().await?;
        let clone = Repository::bare(self.clone);
        let object = self.commit.object.as_str();
        let read = async |args: &[&str]| self.git.run(Some(&clone), args).await;
        // A commit that is asked for by its name may turn out to be a tag.
        let kind = read(&["cat-file", "-t", object]).await?;
        let mut commit = object.to_owned();
        metadata.commit_checksum = None;
        if kind.trim_ascii() == b"tag" {
            let peeled = format!("{object}^{{commit}}");
            let printed = read(&["rev-parse", &peeled]).await?;
            commit = String::from_utf8_lossy(printed.trim_ascii()).into_owned();
            metadata.commit_checksum = Some(commit.clone());
            metadata.tag_object = Some(read(&["cat-file", "tag", object]).await?.into());
        }
        metadata.commit_object = Some(read(&["cat-file", "commit", &commit]).await?.into());
        Ok(())
    }

    /// Makes sure that the clone has the commit.
    async fn fetch(&self) -> Result<()> {
        let clone = Repository::bare(self.clone);
        if !self.clone.join("HEAD").exists() {
            let format = if self.commit.object.len() == 64 { "sha256" } else { "sha1" };
            let format = format!("--object-format={format}");
            self.git.run(Some(&clone), &["init", "--bare", "--quiet", &format]).await?;
        }
        // What a killed process left would be in the way of every later one.
        for lock in ["shallow.lock", "index.lock", "HEAD.lock", "packed-refs.lock", "config.lock"] {
            let _absent = fs::remove_file(self.clone.join(lock));
        }
        if self.has_commit(&clone).await {
            return Ok(());
        }
        let remote = self.source.remote.as_str();
        if !is_commit(&self.commit.name) && !self.source.fetch_by_commit {
            let kept = format!("+{}:refs/slipway/{}", self.commit.name, self.commit.object);
            let args = ["fetch", "--depth=1", "--no-tags", "--quiet", "--", remote, &kept];
            self.run_shallow(&clone, &args).await?;
            if self.has_commit(&clone).await {
                return Ok(());
            }
            // The ref has moved since it was resolved.
        }
        let kept = format!("+{0}:refs/slipway/{0}", self.commit.object);
        let args = ["fetch", "--depth=1", "--no-tags", "--quiet", "--", remote, &kept];
        let first = self.run_shallow(&clone, &args).await;
        if first.is_ok() && self.has_commit(&clone).await {
            return Ok(());
        }
        // A server need not hand out commits by name; then everything that has a name is fetched.
        let mut args = vec!["fetch", "--tags", "--force", "--quiet"];
        if self.clone.join("shallow").exists() {
            args.push("--unshallow");
        }
        args.extend(["--", remote, "+refs/heads/*:refs/remotes/origin/*"]);
        let second = self.git.run(Some(&clone), &args).await;
        if self.has_commit(&clone).await {
            return Ok(());
        }
        second?;
        first?;
        Err(Cause::Missing(format!(
            "{}: commit {} is not in the repository",
            self.source.shown(),
            self.commit.object
        ))
        .into())
    }

    /// Fetches; a server that cannot send part of the history is asked for all of it.
    async fn run_shallow(&self, clone: &Repository, args: &[&str]) -> Result<()> {
        match self.git.run(Some(clone), args).await {
            Err(error)
                if ["--depth", "shallow"].iter().any(|word| error.to_string().contains(word)) =>
            {
                let whole: Vec<&str> =
                    args.iter().copied().filter(|arg| *arg != "--depth=1").collect();
                self.git.run(Some(clone), &whole).await.map(drop)
            }
            other => other.map(drop),
        }
    }

    async fn has_commit(&self, clone: &Repository) -> bool {
        let name = format!("{}^{{commit}}", self.commit.object);
        self.git.run(Some(clone), &["cat-file", "-e", &name]).await.is_ok()
    }

    async fn lay_out(&self, home: &Path) -> Result<()> {
        let files = home.join("fs");
        fs::create_dir_all(&files)
            .map_err(|error| Error::io(format!("cannot create {}", files.display()), error))?;
        let repository = if self.source.keep_git_dir {
            self.with_git_dir(&files).await?
        } else {
            self.files_only(home, &files).await?
        };
        if self.source.submodules && files.join(".gitmodules").exists() {
            let args = ["submodule", "--quiet", "update", "--init", "--recursive", "--depth=1"];
            self.run_shallow(&repository, &args).await?;
        }
        let times = match self.source.times {
            Times::Checkout => None,
            Times::Commit => Some(self.commit_time(&repository).await?),
        };
        let (home, subdir, keep) =
            (home.to_path_buf(), self.source.subdir.clone(), self.source.keep_git_dir);
        let shown = self.source.shown();
        Ok(blocking::run(move || tidy(&home, &subdir, keep, times, &shown)).await?)
    }

    /// Lays the files out with a folder of git beside them that borrows the clone's objects.
    async fn files_only(&self, home: &Path, files: &Path) -> Result<Repository> {
        let repository = Repository { git: home.join("git"), files: Some(files.into()) };
        let format = if self.commit.object.len() == 64 { "sha256" } else { "sha1" };
        let format = format!("--object-format={format}");
        self.git.run(Some(&repository), &["init", "--quiet", &format]).await?;
        let failed = |error| Error::io("cannot borrow the objects of a clone", error);
        let alternates = repository.git.join("objects/info/alternates");
        let objects = self.clone.join("objects");
        fs::write(&alternates, format!("{}\n", objects.display())).map_err(failed)?;
        if self.clone.join("shallow").exists() {
            fs::copy(self.clone.join("shallow"), repository.git.join("shallow")).map_err(failed)?;
        }
        // Submodules may be named relative to the remote.
        let remote = self.source.remote.as_str();
        self.git.run(Some(&repository), &["config", "remote.origin.url", remote]).await?;
        let tree = format!("{}^{{commit}}", self.commit.object);
        self.git.run(Some(&repository), &["read-tree", "--reset", "-u", &tree]).await?;
        Ok(repository)
    }

    /// Makes a repository of the files, with the commit and the ref that it was reached by.
    async fn with_git_dir(&self, files: &Path) -> Result<Repository> {
        let repository = Repository { git: files.join(".git"), files: Some(files.into()) };
        let clone = Repository::bare(self.clone);
        let object = self.commit.object.as_str();
        let format = if object.len() == 64 { "sha256" } else { "sha1" };
        let format = format!("--object-format={format}");
        self.git.run(Some(&repository), &["init", "--quiet", "--template=", &format]).await?;
        let kept = format!("refs/slipway/{object}");
        self.git.run(Some(&clone), &["update-ref", &kept, object]).await?;
        // Over the protocol rather than by path: nothing but objects comes along.
        let from = format!("file://{}", self.clone.to_string_lossy().replace('%', "%25"));
        let what = if is_commit(&self.commit.name) {
            kept
        } else {
            format!("{kept}:{}", self.commit.name)
        };
        let args = ["fetch", "-u", "--quiet", "--depth=1", "--no-tags", "--", &from, &what];
        self.git.run_reaching(Reach::Clone, Some(&repository), &args).await?;
        let args = ["checkout", "--quiet", "--force", "--detach", "FETCH_HEAD"];
        self.git.run(Some(&repository), &args).await?;
        let shown = self.source.shown();
        self.git.run(Some(&repository), &["config", "remote.origin.url", &shown]).await?;
        let all = "+refs/heads/*:refs/remotes/origin/*";
        self.git.run(Some(&repository), &["config", "remote.origin.fetch", all]).await?;
        let args = ["reflog", "expire", "--all", "--expire=now"];
        self.git.run(Some(&repository), &args).await?;
        let _absent = fs::remove_file(repository.git.join("FETCH_HEAD"));
        Ok(repository)
    }

    /// Returns when the commit was made, in nanoseconds since 1970.
    async fn commit_time(&self, repository: &Repository) -> Result<i64> {
        let name = format!("{}^{{commit}}", self.commit.object);
        let printed = self.git.run(Some(repository), &["log", "-1", "--format=%ct", &name]).await?;
        let text = String::from_utf8_lossy(&printed).trim().to_owned();
        let seconds: i64 = text.parse().map_err(|_| {
            Cause::Invalid(format!("{}: the commit's time is {text:?}", self.source.shown()))
        })?;
        Ok(seconds.saturating_mul(1_000_000_000))
    }
}

/// Leaves nothing but the files that were asked for, with modes that do not depend on this process.
fn tidy(
    home: &Path,
    subdir: &str,
    keep_git_dir: bool,
    times: Option<i64>,
    shown: &str,
) -> slipway_store::Result<()> {
    let files = home.join("fs");
    let failed = |path: &Path, error: std::io::Error| {
        Error::io(format!("cannot change {}", path.display()), error)
    };
    match fs::remove_dir_all(home.join("git")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(failed(home, error));
        }
        _ => {}
    }
    if !subdir.is_empty() {
        // Folders only: a link could lead out of the repository.
        let root = rustix::fs::open(&files, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
            .map_err(|errno| failed(&files, errno.into()))?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        rustix::fs::openat2(&root, subdir, flags, Mode::empty(), resolve).map_err(|errno| {
            let error = std::io::Error::from(errno);
            Error::new(
                slipway_store::ErrorKind::NotFound,
                format!("{shown}: the folder {subdir:?} is not in the repository"),
            )
            .because(error)
        })?;
        let whole = home.join("whole");
        fs::rename(&files, &whole).map_err(|error| failed(&files, error))?;
        let part = whole.join(subdir);
        fs::rename(&part, &files).map_err(|error| failed(&part, error))?;
        fs::remove_dir_all(&whole).map_err(|error| failed(&whole, error))?;
    }
    let mut folders: Vec<PathBuf> = vec![];
    let mut todo = vec![files.clone()];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(&folder).map_err(|error| failed(&folder, error))? {
            let entry = entry.map_err(|error| failed(&folder, error))?;
            let (path, kind) = (entry.path(), entry.file_type());
            let kind = kind.map_err(|error| failed(&path, error))?;
            if !keep_git_dir && entry.file_name() == ".git" && kind.is_file() {
                // A submodule's way to a folder that is gone.
                fs::remove_file(&path).map_err(|error| failed(&path, error))?;
                continue;
            }
            if kind.is_dir() {
                todo.push(path);
                continue;
            }
            if kind.is_file() {
                let mode =
                    entry.metadata().map_err(|error| failed(&path, error))?.permissions().mode();
                let mode = if mode & 0o111 == 0 { 0o644 } else { 0o755 };
                fs::set_permissions(&path, fs::Permissions::from_mode(mode))
                    .map_err(|error| failed(&path, error))?;
            }
            if let Some(time) = times {
                set_time(&path, time).map_err(|error| failed(&path, error))?;
            }
        }
        folders.push(folder);
    }
    // Innermost first: what changes in a folder changes its time.
    for folder in folders.iter().rev() {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
            .map_err(|error| failed(folder, error))?;
        if let Some(time) = times {
            set_time(folder, time).map_err(|error| failed(folder, error))?;
        }
    }
    Ok(())
}

fn set_time(path: &Path, nanoseconds: i64) -> std::io::Result<()> {
    let time = Timespec {
        tv_sec: nanoseconds.div_euclid(1_000_000_000),
        tv_nsec: nanoseconds.rem_euclid(1_000_000_000) as _,
    };
    let times = Timestamps { last_access: time, last_modification: time };
    Ok(rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}
