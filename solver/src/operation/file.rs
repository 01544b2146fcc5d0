//! File operations: copy, make and remove, decided against a [`View`] and written down only when somebody needs it.
//!
//! The rules are those of BuildKit's file-op backend: contents of a directory are copied, not the directory; new parents
//! belong to root (or to `--chown`) with mode 0755 (or `--chmod`); what exists is merged into or replaced.

use std::collections::HashMap;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use slipway_spec::llb::pb;
use slipway_spec::llb::pb::file_action::Action;
use slipway_spec::llb::pb::user_opt::User;
use slipway_spec::pattern::PatternMatcher;
use slipway_store::Store;
use slipway_store::archive::Unpacked;
use slipway_store::tree::scan::{Everything, Ownership, ScanOptions, scan};
use slipway_store::tree::{Content, Entry, Kind, clean, join, split};
use slipway_store::view::View;

use super::mode::{self, Mode};
use crate::error::{Cause, Result};
use crate::glob;

/// `/etc/passwd` and `/etc/group` of an image may have this many bytes.
const MAX_ACCOUNTS: u64 = 10 * 1024 * 1024;

/// What a copy found in its source.
#[derive(Debug)]
struct Match {
    /// Where it is, links resolved.
    path: Vec<u8>,
    /// The name it was found under.
    name: Vec<u8>,
    entry: Entry,
}

/// Returns a digest over everything that a copy reads from its source, such that equal digests mean equal results.
///
/// # Errors
/// When the source does not have what the copy asks for.
pub(crate) fn source_digest(copy: &pb::FileActionCopy, source: &View) -> Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let wildcard = is_wildcard(copy);
    let mut buffer = vec![];
    let selection = Selection::new(copy)?;
    for found in find(copy, source)? {
        hash.update(b"match");
        // Under a literal name the content may be called anything: the operation itself names the destination.
        if wildcard {
            hash_bytes(&mut hash, &found.name);
        }
        found.entry.hash_into(&mut hash, &mut buffer)?;
        if found.entry.is_directory() {
            walk_taken(source, &found.path, &selection, &mut |relative, entry| {
                hash.update(b"child");
                hash_bytes(&mut hash, relative);
                Ok(entry.hash_into(&mut hash, &mut buffer)?)
            })?;
        }
    }
    Ok(hash.finalize().into())
}

fn hash_bytes(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

/// Visits everything below a directory; the visitor tells whether to go into a directory.
fn walk(
    view: &View,
    directory: &[u8],
    visitor: &mut dyn FnMut(&[u8], &Entry) -> Result<bool>,
) -> Result<()> {
    let mut levels = vec![(vec![], view.children(directory)?.into_iter())];
    while let Some((relative, children)) = levels.last_mut() {
        let Some((name, entry)) = children.next() else {
            levels.pop();
            continue;
        };
        let relative = join(relative, &name);
        if visitor(&relative, &entry)? && entry.is_directory() {
            let children = view.children(&join(directory, &relative))?.into_iter();
            levels.push((relative, children));
        }
    }
    Ok(())
}

/// Visits what a copy takes from a directory, in the order of a walk.
fn walk_taken(
    view: &View,
    directory: &[u8],
    selection: &Selection,
    visitor: &mut dyn FnMut(&[u8], &Entry) -> Result<()>,
) -> Result<()> {
    // Directories on the way to the current path that are not taken: they are after all when something in them is.
    let mut waiting: Vec<(Vec<u8>, Entry)> = vec![];
    walk(view, directory, &mut |relative, entry| {
        waiting.retain(|(parent, _)| {
            relative.strip_prefix(parent.as_slice()).is_some_and(|rest| rest.starts_with(b"/"))
        });
        if !selection.takes(relative) {
            let look = entry.is_directory() && selection.may_hold(relative);
            if look {
                waiting.push((relative.to_vec(), entry.clone()));
            }
            return Ok(look);
        }
        for (parent, entry) in std::mem::take(&mut waiting) {
            visitor(&parent, &entry)?;
        }
        visitor(relative, entry)?;
        Ok(true)
    })
}

/// Which part of a directory a copy takes: what matches its include patterns, if it has any, and not its exclude
/// patterns. Paths are relative to the directory.
struct Selection {
    include: Option<PatternMatcher>,
    exclude: Option<PatternMatcher>,
}

impl Selection {
    fn new(copy: &pb::FileActionCopy) -> Result<Self> {
        let compile = |patterns: &[String], which: &str| -> Result<Option<PatternMatcher>> {
            if patterns.is_empty() {
                return Ok(None);
            }
            let matcher = PatternMatcher::new(patterns).map_err(|error| {
                Cause::Invalid(format!("cannot use the {which} patterns: {error}"))
            })?;
            Ok(Some(matcher))
        };
        Ok(Self {
            include: compile(&copy.include_patterns, "include")?,
            exclude: compile(&copy.exclude_patterns, "exclude")?,
        })
    }

    fn takes(&self, relative: &[u8]) -> bool {
        let path = String::from_utf8_lossy(relative);
        self.include.as_ref().is_none_or(|matcher| matcher.matches(&path))
            && !self.exclude.as_ref().is_some_and(|matcher| matcher.matches(&path))
    }

    /// Whether a directory that is not taken may hold something that is.
    fn may_hold(&self, relative: &[u8]) -> bool {
        let path = String::from_utf8_lossy(relative);
        let excluded = self.exclude.as_ref().filter(|matcher| matcher.matches(&path));
        excluded.is_none_or(|matcher| !matcher.may_skip_dir(&path))
    }
}

/// Checks that what must be there is among what a copy takes.
fn require(copy: &pb::FileActionCopy, source: &View, found: &[Match]) -> Result<()> {
    if copy.required_paths.is_empty() {
        return Ok(());
    }
    let mut missing: Vec<Vec<u8>> =
        copy.required_paths.iter().map(|path| clean(path.as_bytes())).collect();
    let mut seen = |path: &[u8]| {
        missing.retain(|wanted| {
            let below = path.strip_prefix(wanted.as_slice());
            !below.is_some_and(|rest| wanted.is_empty() || rest.is_empty() || rest[0] == b'/')
        });
    };
    let selection = Selection::new(copy)?;
    for found in found {
        if found.entry.is_directory() {
            walk_taken(source, &found.path, &selection, &mut |relative, _| {
                seen(&join(&found.path, relative));
                Ok(())
            })?;
        } else {
            seen(&found.path);
        }
    }
    match missing.first() {
        None => Ok(()),
        Some(path) => {
            Err(Cause::Missing(format!("{:?}: not found", format!("/{}", path.escape_ascii())))
                .into())
        }
    }
}

fn is_wildcard(copy: &pb::FileActionCopy) -> bool {
    copy.allow_wildcard && clean(copy.src.as_bytes()).split(|b| *b == b'/').any(glob::is_pattern)
}

/// Finds what a copy reads.
fn find(copy: &pb::FileActionCopy, source: &View) -> Result<Vec<Match>> {
    let found = find_matches(copy, source)?;
    require(copy, source, &found)?;
    Ok(found)
}

fn find_matches(copy: &pb::FileActionCopy, source: &View) -> Result<Vec<Match>> {
    let src = clean(copy.src.as_bytes());
    let missing = || Cause::Missing(format!("{:?}: not found", format!("/{}", src.escape_ascii())));
    if !is_wildcard(copy) {
        let resolved = source.resolve(&src, copy.follow_symlink || src.is_empty())?;
        let Some(entry) = resolved.entry else { return Err(missing().into()) };
        return Ok(vec![Match { path: resolved.path, name: split(&src).1.to_vec(), entry }]);
    }
    let mut found: Vec<Vec<u8>> = vec![vec![]];
    let mut matching = false;
    for part in src.split(|b| *b == b'/') {
        // Links are followed up to the first wildcard; from there on directories are walked, and a walk follows none.
        let follow = !matching;
        matching |= glob::is_pattern(part);
        let mut next = vec![];
        for at in found {
            let directory = source.resolve(&at, follow)?;
            if !directory.entry.as_ref().is_some_and(Entry::is_directory) {
                continue;
            }
            if !matching {
                let path = join(&at, part);
                if source.resolve(&path, false)?.entry.is_some() {
                    next.push(path);
                }
                continue;
            }
            let children = source.children(&directory.path)?;
            next.extend(
                children
                    .into_iter()
                    .filter(|(name, _)| glob::matches(part, name))
                    .map(|(n, _)| join(&at, &n)),
            );
        }
        found = next;
    }
    if found.is_empty() && !copy.allow_empty_wildcard {
        return Err(missing().into());
    }
    let mut matches = vec![];
    for path in found {
        let name = split(&path).1.to_vec();
        let resolved = source.resolve(&path, copy.follow_symlink)?;
        let entry = resolved.entry.ok_or_else(missing)?;
        matches.push(Match { path: resolved.path, name, entry });
    }
    Ok(matches)
}

/// What an operation needs beside its inputs.
#[derive(Debug)]
pub(crate) struct FileContext<'a> {
    /// For unpacking archives.
    pub(crate) store: &'a Store,
    /// The time of what is made, in nanoseconds since 1970.
    pub(crate) now: i64,
    /// The operation's inputs, to look users up in.
    pub(crate) inputs: &'a [Option<Arc<View>>],
}

/// Applies one action to `target`; `source` is what a copy reads, without which that is empty.
///
/// # Errors
/// When the action cannot be done; `target` is then to be thrown away.
pub(crate) fn apply(
    action: &Action,
    target: &mut View,
    source: Option<&View>,
    context: &FileContext<'_>,
) -> Result<()> {
    match action {
        Action::Copy(copy) => {
            // Nothing at all can be copied from, too.
            let scratch = View::default();
            Copier::new(copy, target, source.unwrap_or(&scratch), context)?.run()
        }
        Action::Mkfile(file) => {
            let path = resolve_for_write(target, &file.path)?;
            require_parent(target, &path)?;
            let existing = target.get(&path)?;
            if existing.as_ref().is_some_and(Entry::is_directory) {
                return Err(
                    Cause::Invalid(format!("/{} is a directory", path.escape_ascii())).into()
                );
            }
            let (uid, gid) = owner(file.owner.as_ref(), context)?.unwrap_or((0, 0));
            let kind = Kind::File {
                content: Content::Inline(file.data.as_slice().into()),
                size: file.data.len() as u64,
            };
            // A file that is written again keeps its mode.
            let mode = existing.map_or(mode_bits(file.mode), |existing| existing.mode);
            let base = Entry::directory(mode, time(file.timestamp, context.now));
            Ok(target.put(&path, Entry { kind, uid, gid, ..base })?)
        }
        Action::Mkdir(directory) => make_directory(directory, target, context),
        Action::Symlink(link) => {
            let path = resolve_for_write(target, &link.newpath)?;
            require_parent(target, &path)?;
            if target.get(&path)?.is_some() {
                return Err(
                    Cause::Invalid(format!("/{} exists already", path.escape_ascii())).into()
                );
            }
            let (uid, gid) = owner(link.owner.as_ref(), context)?.unwrap_or((0, 0));
            let kind = Kind::Symlink { target: link.oldpath.as_bytes().to_vec() };
            let base = Entry::directory(0o777, time(link.timestamp, context.now));
            Ok(target.put(&path, Entry { kind, uid, gid, ..base })?)
        }
        Action::Rm(remove) => {
            // A wildcard may match nothing; a name without one must be there.
            let copy = pb::FileActionCopy {
                src: remove.path.clone(),
                allow_wildcard: remove.allow_wildcard,
                allow_empty_wildcard: true,
                ..Default::default()
            };
            let found = match find(&copy, target) {
                Ok(found) => found,
                Err(error)
                    if remove.allow_not_found && matches!(*error.cause, Cause::Missing(_)) =>
                {
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            for found in found {
                if found.path.is_empty() {
                    return Err(
                        Cause::Invalid("the root directory cannot be removed".into()).into()
                    );
                }
                target.remove(&found.path)?;
            }
            Ok(())
        }
    }
}

fn time(timestamp: i64, now: i64) -> i64 {
    if timestamp == -1 { now } else { timestamp }
}

fn mode_bits(mode: i32) -> u32 {
    // LLB carries Go's idea of a mode in 32 bits; only permission, set-id and sticky bits mean something here.
    (mode as u32) & 0o7777
}

/// Follows links in all components of a path, the last included.
fn resolve_for_write(target: &View, path: &str) -> Result<Vec<u8>> {
    Ok(target.resolve(&clean(path.as_bytes()), true)?.path)
}

fn require_parent(target: &View, path: &[u8]) -> Result<()> {
    let parent = split(path).0;
    match target.get(parent)? {
        Some(entry) if entry.is_directory() => Ok(()),
        Some(_) => {
            Err(Cause::Invalid(format!("/{} is not a directory", parent.escape_ascii())).into())
        }
        None => {
            Err(Cause::Missing(format!("{:?}: not found", format!("/{}", parent.escape_ascii())))
                .into())
        }
    }
}

fn make_directory(
    action: &pb::FileActionMkDir,
    target: &mut View,
    context: &FileContext<'_>,
) -> Result<()> {
    let (uid, gid) = owner(action.owner.as_ref(), context)?.unwrap_or((0, 0));
    let path = resolve_for_write(target, &action.path)?;
    let new = Entry {
        uid,
        gid,
        ..Entry::directory(mode_bits(action.mode), time(action.timestamp, context.now))
    };
    if action.make_parents {
        return make_parents(target, &path, &new);
    }
    // Whatever has the name already is left alone, even if it is no directory, as upstream does.
    if target.get(&path)?.is_some() {
        return Ok(());
    }
    require_parent(target, &path)?;
    Ok(target.put(&path, new)?)
}

/// Makes a directory and those on the way to it, where they are missing.
fn make_parents(target: &mut View, path: &[u8], new: &Entry) -> Result<()> {
    let mut missing = vec![];
    let mut at = path;
    loop {
        match target.get(at)? {
            Some(entry) if entry.is_directory() => break,
            Some(_) => {
                let shown = at.escape_ascii();
                return Err(Cause::Invalid(format!(
                    "cannot create /{}: /{shown} is not a directory",
                    path.escape_ascii()
                ))
                .into());
            }
            None => missing.push(at),
        }
        at = split(at).0;
    }
    for directory in missing.into_iter().rev() {
        target.put(directory, new.clone())?;
    }
    Ok(())
}

/// Returns the inputs in which an action looks up users and groups.
pub(crate) fn accounts(action: &pb::FileAction) -> Vec<i64> {
    let owner = match &action.action {
        Some(Action::Copy(copy)) => copy.owner.as_ref(),
        Some(Action::Mkfile(file)) => file.owner.as_ref(),
        Some(Action::Mkdir(directory)) => directory.owner.as_ref(),
        Some(Action::Symlink(link)) => link.owner.as_ref(),
        Some(Action::Rm(_)) | None => None,
    };
    let Some(owner) = owner else { return vec![] };
    let named = |who: &Option<pb::UserOpt>| match who.as_ref().and_then(|who| who.user.as_ref()) {
        Some(User::ByName(named)) => Some(named.input),
        _ => None,
    };
    named(&owner.user).into_iter().chain(named(&owner.group)).collect()
}

/// Resolves an owner against the accounts of the image.
fn owner(chown: Option<&pb::ChownOpt>, context: &FileContext<'_>) -> Result<Option<(u32, u32)>> {
    let Some(chown) = chown else { return Ok(None) };
    let (mut uid, mut gid) = (0, 0);
    match chown.user.as_ref().and_then(|user| user.user.as_ref()) {
        Some(User::ById(id)) => (uid, gid) = (*id, *id),
        Some(User::ByName(named)) => {
            // An unknown name silently means root, as it does upstream.
            (uid, gid) = account(named, "/etc/passwd", context)?.unwrap_or((0, 0));
        }
        None => {}
    }
    match chown.group.as_ref().and_then(|group| group.user.as_ref()) {
        Some(User::ById(id)) => gid = *id,
        Some(User::ByName(named)) => {
            gid = account(named, "/etc/group", context)?.map_or(0, |(gid, _)| gid);
        }
        None => {}
    }
    Ok(Some((uid, gid)))
}

/// Returns the third and fourth field of an account's line.
fn account(
    named: &pb::NamedUserOpt,
    file: &str,
    context: &FileContext<'_>,
) -> Result<Option<(u32, u32)>> {
    let view = usize::try_from(named.input)
        .ok()
        .and_then(|at| context.inputs.get(at))
        .and_then(Option::as_ref);
    let Some(view) = view else {
        return Err(Cause::Invalid(format!(
            "cannot look up {:?}: there is no file system with {file} to find it in; use a number",
            named.name
        ))
        .into());
    };
    let Some(text) = view.read(file.as_bytes(), MAX_ACCOUNTS)? else { return Ok(None) };
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == named.name).then_some(())?;
        let third = fields.nth(1)?.trim().parse().ok()?;
        let fourth = fields.next().and_then(|field| field.trim().parse().ok()).unwrap_or(0);
        Some((third, fourth))
    }))
}

/// One copy on its way.
struct Copier<'a> {
    copy: &'a pb::FileActionCopy,
    target: &'a mut View,
    source: &'a View,
    context: &'a FileContext<'a>,
    owner: Option<(u32, u32)>,
    mode: Mode,
}

impl<'a> Copier<'a> {
    fn new(
        copy: &'a pb::FileActionCopy,
        target: &'a mut View,
        source: &'a View,
        context: &'a FileContext<'a>,
    ) -> Result<Self> {
        let mode = match (copy.mode_str.as_str(), copy.mode) {
            ("", -1) => Mode::Keep,
            ("", mode) => Mode::Fixed(mode_bits(mode)),
            (text, _) => mode::parse(text).ok_or_else(|| {
                Cause::Invalid(format!("{text:?} is not a mode that chmod takes"))
            })?,
        };
        Ok(Self {
            owner: owner(copy.owner.as_ref(), context)?,
            mode,
            copy,
            target,
            source,
            context,
        })
    }

    fn run(mut self) -> Result<()> {
        for found in find(self.copy, self.source)? {
            self.copy_match(found)?;
        }
        Ok(())
    }

    /// A directory that the copy makes on its way.
    fn new_directory(&self) -> Entry {
        let (uid, gid) = self.owner.unwrap_or((0, 0));
        let time = time(self.copy.timestamp, self.context.now);
        Entry { uid, gid, ..Entry::directory(self.mode.apply(0o755, true), time) }
    }

    fn copy_match(&mut self, found: Match) -> Result<()> {
        let dest = self.copy.dest.as_bytes();
        let is_folder = dest.ends_with(b"/") || dest.ends_with(b"/.") || clean(dest).is_empty();
        let resolved = self.target.resolve(&clean(dest), true)?;
        if self.copy.attempt_unpack_docker_compatibility
            && let Some(unpacked) = self.unpack(&found)?
        {
            return self.merge_unpacked(&unpacked, &resolved.path);
        }
        if found.entry.is_directory() && self.copy.dir_copy_contents {
            return self.copy_contents(&found.path, &resolved.path);
        }
        let exists = resolved.entry.as_ref().is_some_and(Entry::is_directory);
        let path =
            if is_folder || exists { join(&resolved.path, &found.name) } else { resolved.path };
        self.make_way(&path)?;
        if found.entry.is_directory() {
            self.place(&path, &found.entry)?;
            return self.copy_children(&found.path, &path).map(drop);
        }
        self.place(&path, &found.entry)
    }

    /// Makes the parents of a path.
    fn make_way(&mut self, path: &[u8]) -> Result<()> {
        let parent = split(path).0;
        if !self.copy.create_dest_path {
            return require_parent(self.target, path);
        }
        make_parents(self.target, parent, &self.new_directory())
    }

    fn copy_contents(&mut self, source: &[u8], dest: &[u8]) -> Result<()> {
        let new = match self.target.get(dest)? {
            Some(entry) if entry.is_directory() => false,
            Some(_) => {
                let shown = dest.escape_ascii();
                return Err(
                    Cause::Invalid(format!("cannot copy to non-directory: /{shown}")).into()
                );
            }
            None => {
                self.make_way(dest)?;
                self.target.put(dest, self.new_directory())?;
                true
            }
        };
        let filled = self.copy_children(source, dest)?;
        // Another time alone is no change of a directory.
        if new || filled { self.date(source, dest) } else { Ok(()) }
    }

    /// Gives a directory that got the contents of another one the time of that, which is all it takes of it.
    fn date(&mut self, source: &[u8], dest: &[u8]) -> Result<()> {
        let time = match self.copy.timestamp {
            // A root folder has no time that means anything, but has changed when something in it did.
            -1 if source.is_empty() => {
                let inside = self.source.children(source)?;
                inside.into_iter().map(|(_, entry)| entry.mtime).max()
            }
            -1 => self.source.get(source)?.map(|entry| entry.mtime),
            time => Some(time),
        };
        match (time, self.target.get(dest)?) {
            (Some(mtime), Some(entry)) if !dest.is_empty() => {
                Ok(self.target.put(dest, Entry { mtime, ..entry })?)
            }
            _ => Ok(()),
        }
    }

    /// Copies what is in a directory; returns whether that was anything.
    fn copy_children(&mut self, from: &[u8], dest: &[u8]) -> Result<bool> {
        let selection = Selection::new(self.copy)?;
        let mut any = false;
        walk_taken(self.source, from, &selection, &mut |relative, entry| {
            any = true;
            self.place(&join(dest, relative), entry)
        })?;
        Ok(any)
    }

    /// Puts one entry where it belongs, with the owner, mode and time the copy asks for.
    fn place(&mut self, path: &[u8], entry: &Entry) -> Result<()> {
        let existing = self.target.get(path)?;
        let existing_directory = existing.as_ref().is_some_and(Entry::is_directory);
        if existing.is_some()
            && existing_directory != entry.is_directory()
            && !self.copy.always_replace_existing_dest_paths
        {
            let shown = path.escape_ascii();
            return Err(Cause::Invalid(if existing_directory {
                format!("cannot replace to directory /{shown} with file")
            } else {
                format!("cannot copy to non-directory: /{shown}")
            })
            .into());
        }
        let mut entry = entry.clone();
        if let Some((uid, gid)) = self.owner {
            (entry.uid, entry.gid) = (uid, gid);
        }
        if !matches!(entry.kind, Kind::Symlink { .. }) {
            entry.mode = self.mode.apply(entry.mode, entry.is_directory());
        }
        if self.copy.timestamp != -1 {
            entry.mtime = self.copy.timestamp;
        }
        Ok(self.target.put(path, entry)?)
    }

    /// Unpacks a local archive into a folder of its own; `None` when the match is not an archive.
    fn unpack(&self, found: &Match) -> Result<Option<Unpacked>> {
        match &found.entry.kind {
            Kind::File { content: Content::Host { path, .. }, .. } => {
                Ok(slipway_store::archive::unpack(self.context.store, path)?)
            }
            Kind::File { .. } => {
                let Some(mut bytes) = self.source.open(&found.path)? else { return Ok(None) };
                let path = self.context.store.temporary("inline");
                let copied = std::fs::File::create_new(&path)
                    .and_then(|mut file| std::io::copy(&mut bytes, &mut file));
                copied.map_err(|error| {
                    slipway_store::Error::io(format!("cannot write {}", path.display()), error)
                })?;
                let unpacked = slipway_store::archive::unpack(self.context.store, &path);
                if let Err(error) = std::fs::remove_file(&path) {
                    tracing::debug!(path = %path.display(), %error, "a copy stays behind");
                }
                Ok(unpacked?)
            }
            _ => Ok(None),
        }
    }

    fn merge_unpacked(&mut self, unpacked: &Unpacked, dest: &[u8]) -> Result<()> {
        let options = ScanOptions { ownership: Ownership::Keep, memory: None };
        let tree = scan(&unpacked.folder, &mut Everything, &options)?;
        match self.target.get(dest)? {
            Some(entry) if entry.is_directory() => {}
            Some(_) => {
                let shown = dest.escape_ascii();
                return Err(
                    Cause::Invalid(format!("cannot unpack into non-directory: /{shown}")).into()
                );
            }
            None => {
                make_parents(self.target, dest, &Entry { mode: 0o755, ..self.new_directory() })?;
            }
        }
        // Where directories of the archive are that are not below `dest` by their names: links led there.
        let mut places: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
        for (relative, entry) in tree.iter() {
            let (parent, name) = split(&relative);
            let parent = places.get(parent).map_or_else(|| join(dest, parent), Clone::clone);
            let mut path = join(&parent, name);
            let is_directory = entry.is_directory();
            let mut entry = entry.clone();
            if let Some((uid, gid)) = self.owner {
                (entry.uid, entry.gid) = (uid, gid);
            }
            if unpacked.implied.contains(&relative) {
                path = self.implied_directory(&path, dest, entry)?;
            } else {
                // What is no directory is replaced by one of the archive's, a link to a directory included.
                self.target.put(&path, entry)?;
            }
            if is_directory && path != join(dest, &relative) {
                places.insert(relative, path);
            }
        }
        Ok(())
    }

    /// Finds or makes a directory that an archive does not list, and returns its real path. Links stay what they are; as for a
    /// process whose root is `dest`, none leads out of that.
    fn implied_directory(&mut self, path: &[u8], dest: &[u8], new: Entry) -> Result<Vec<u8>> {
        let below = path.strip_prefix(dest).unwrap_or(path);
        let resolved = self.target.resolve_below(dest, below, true)?;
        match resolved.entry {
            Some(entry) if entry.is_directory() => {}
            Some(_) => {
                let shown = path.escape_ascii();
                return Err(Cause::Invalid(format!(
                    "cannot unpack into /{shown}: it is not a directory"
                ))
                .into());
            }
            None => make_parents(self.target, &resolved.path, &new)?,
        }
        Ok(resolved.path)
    }
}

#[cfg(test)]
mod tests;
