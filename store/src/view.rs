//! A stack of layers read and changed as one tree, without mounting it.
//!
//! The lower part is layer folders, the upper part layers that are still [`Tree`]s, and on top lies the tree that is being
//! made. File operations are decided here, against what the stack holds, and only the top is written down.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, IoContext as _, Result};
use crate::layer::stack::FileKind;
use crate::layer::{Follow, LayerError, LayerStack, Located};
use crate::tree::scan::{host_content, open_regular};
use crate::tree::{Content, Entry, Kind, Tree, join, split};
use crate::{Store, snapshot::LayerId};

/// The most symbolic links one look-up follows, as in the kernel.
const MAX_LINKS: usize = 40;

/// A tree made of layers, with room for changes.
#[derive(Debug, Default)]
pub struct View {
    stack: LayerStack,
    trees: Vec<Arc<Tree>>,
    top: Tree,
    /// A directory that no lower layer has: what is in it is in the top alone.
    fresh: Option<Vec<u8>>,
}

/// A path with its symbolic links resolved inside the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    /// Where it leads; components that do not exist are kept as they were written.
    pub path: Vec<u8>,
    /// What is there.
    pub entry: Option<Entry>,
}

impl Store {
    /// Opens a stack of layers as a view. Layers that are only trees stay trees as far as possible.
    ///
    /// # Errors
    /// As [`ensure_folder`](Store::ensure_folder).
    pub fn view(&self, layers: &[LayerId]) -> Result<View> {
        // Trees at the top of the stack need no folder; one below a folder does.
        let trees: Vec<Arc<Tree>> =
            layers.iter().rev().map_while(|layer| self.pending_tree(*layer)).collect();
        let folders = &layers[..layers.len() - trees.len()];
        let stack = if folders.is_empty() { LayerStack::empty() } else { self.stack(folders)? };
        Ok(View { stack, trees: trees.into_iter().rev().collect(), ..View::default() })
    }
}

impl View {
    /// Makes a view of folders.
    pub fn of_stack(stack: LayerStack) -> Self {
        Self { stack, ..Self::default() }
    }

    /// Makes a view of one tree.
    pub fn of_tree(tree: Arc<Tree>) -> Self {
        Self { trees: vec![tree], ..Self::default() }
    }

    /// Continues with changes that were made before to the same layers.
    #[must_use]
    pub fn with_changes(self, changes: Tree) -> Self {
        Self { top: changes, ..self }
    }

    /// Returns what was changed, as a layer.
    pub fn into_changes(self) -> Tree {
        self.top
    }

    /// Returns everything that can be seen, as one tree.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn flatten(&self) -> Result<Tree> {
        if let ([only], true, true) =
            (self.trees.as_slice(), self.top.is_empty(), self.stack.is_empty())
            // What hides something lower cannot itself be seen.
            && !only.iter().any(|(_, entry)| entry.kind == Kind::Whiteout)
        {
            return Ok(Tree::clone(only));
        }
        let mut all = Tree::default();
        let mut todo = vec![vec![]];
        while let Some(directory) = todo.pop() {
            for (name, mut entry) in self.children(&directory)? {
                let path = join(&directory, &name);
                if let Kind::Directory { opaque } = &mut entry.kind {
                    // Nothing is left below that could be hidden.
                    *opaque = false;
                    todo.push(path.clone());
                }
                all.insert(&path, entry);
            }
        }
        Ok(all)
    }

    /// Returns what was changed so far.
    pub fn changes(&self) -> &Tree {
        &self.top
    }

    /// Returns what is at a path of which no parent is a symbolic link; the last component is not followed.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn get(&self, path: &[u8]) -> Result<Option<Entry>> {
        if self.is_fresh(path) {
            let entry = self.top.get(path).filter(|entry| entry.kind != Kind::Whiteout);
            return Ok(entry.cloned());
        }
        for tree in self.topmost_first() {
            if let Some(entry) = tree.get(path) {
                return Ok((entry.kind != Kind::Whiteout).then(|| entry.clone()));
            }
            if hides(tree, path) {
                return Ok(None);
            }
        }
        if path.is_empty() && self.stack.is_empty() {
            return Ok(Some(Entry::directory(0o755, 0)));
        }
        let Some(located) = self.stack.lookup(path, Follow::None).map_err(damaged)? else {
            return Ok(None);
        };
        self.entry(&located)
    }

    fn is_fresh(&self, path: &[u8]) -> bool {
        let inside = |fresh: &Vec<u8>| path.strip_prefix(fresh.as_slice())?.first().copied();
        self.fresh.as_ref().and_then(inside) == Some(b'/')
    }

    fn topmost_first(&self) -> impl Iterator<Item = &Tree> {
        std::iter::once(&self.top).chain(self.trees.iter().rev().map(AsRef::as_ref))
    }

    fn entry(&self, located: &Located) -> Result<Option<Entry>> {
        let metadata = &located.metadata;
        let (major, minor) = metadata.device;
        let kind = match metadata.kind {
            FileKind::File => {
                Kind::File { content: host_content(located.host_path.clone()), size: metadata.size }
            }
            FileKind::Directory => Kind::Directory { opaque: false },
            FileKind::Symlink => {
                Kind::Symlink { target: self.stack.read_link(located).map_err(damaged)? }
            }
            FileKind::CharDevice => Kind::CharDevice { major, minor },
            FileKind::BlockDevice => Kind::BlockDevice { major, minor },
            FileKind::Fifo => Kind::Fifo,
            FileKind::Socket => return Ok(None),
        };
        let mut xattrs = self.stack.xattrs(located).map_err(damaged)?;
        xattrs.retain(|name, _| name.starts_with(b"user.") || name == b"security.capability");
        Ok(Some(Entry {
            kind,
            mode: metadata.mode,
            uid: metadata.uid,
            gid: metadata.gid,
            mtime: metadata
                .mtime_seconds
                .saturating_mul(1_000_000_000)
                .saturating_add(i64::from(metadata.mtime_nanoseconds)),
            xattrs,
            inode: (metadata.links > 1 && metadata.kind != FileKind::Directory)
                .then_some((metadata.file_system, metadata.inode)),
        }))
    }

    /// Follows symbolic links inside the tree: in all parents, and in the last component too if `last`.
    ///
    /// # Errors
    /// When links go round in circles, or the disk fails.
    pub fn resolve(&self, path: &[u8], last: bool) -> Result<Resolved> {
        self.resolve_below(b"", path, last)
    }

    /// Like [`resolve`](Self::resolve), for a path relative to a directory that no link leads out of. The directory's own path is
    /// taken literally.
    ///
    /// # Errors
    /// When links go round in circles, or the disk fails.
    pub fn resolve_below(&self, root: &[u8], path: &[u8], last: bool) -> Result<Resolved> {
        let mut links = 0;
        let mut todo: Vec<Vec<u8>> = components(path).rev().collect();
        let mut at: Vec<u8> = root.to_vec();
        while let Some(component) = todo.pop() {
            match component.as_slice() {
                b"." => continue,
                b".." if at.len() > root.len() => {
                    at = split(&at).0.to_vec();
                    continue;
                }
                b".." => continue,
                _ => {}
            }
            let next = join(&at, &component);
            if todo.is_empty() && !last {
                let entry = self.get(&next)?;
                return Ok(Resolved { path: next, entry });
            }
            match self.get(&next)?.map(|entry| entry.kind) {
                Some(Kind::Symlink { target }) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Error::new(
                            ErrorKind::Invalid,
                            format!(
                                "too many levels of symbolic links in /{}",
                                path.escape_ascii()
                            ),
                        ));
                    }
                    if target.starts_with(b"/") {
                        root.clone_into(&mut at);
                    }
                    todo.extend(components(&target).rev());
                }
                _ => at = next,
            }
        }
        let entry = self.get(&at)?;
        Ok(Resolved { path: at, entry })
    }

    /// Lists a directory, sorted by name; the path is taken literally as in [`get`](Self::get).
    ///
    /// # Errors
    /// When the disk fails.
    pub fn children(&self, path: &[u8]) -> Result<Vec<(Vec<u8>, Entry)>> {
        if let ([only], true, true) =
            (self.trees.as_slice(), self.top.is_empty(), self.stack.is_empty())
        {
            let seen = only.children(path).filter(|(_, entry)| entry.kind != Kind::Whiteout);
            return Ok(seen.map(|(name, entry)| (name, entry.clone())).collect());
        }
        let mut names: BTreeMap<Vec<u8>, Entry> = BTreeMap::new();
        let mut hidden = false;
        for tree in self.topmost_first() {
            for (name, entry) in tree.children(path) {
                names.entry(name).or_insert_with(|| entry.clone());
            }
            // What is not a directory has nothing in it, whatever lower layers have there.
            if hides(tree, path)
                || tree.get(path).is_some_and(|entry| cuts(entry) || !entry.is_directory())
            {
                hidden = true;
                break;
            }
        }
        if !hidden
            && let Some(located) = self.stack.lookup(path, Follow::None).map_err(damaged)?
            && located.metadata.is_directory()
        {
            for child in self.stack.read_dir(&located.path).map_err(damaged)? {
                let name = child.name().to_vec();
                if !names.contains_key(&name)
                    && let Some(entry) = self.entry(&child)?
                {
                    names.insert(name, entry);
                }
            }
        }
        names.retain(|_, entry| entry.kind != Kind::Whiteout);
        Ok(names.into_iter().collect())
    }

    /// Reads a small regular file, links followed; `None` when there is none.
    ///
    /// # Errors
    /// When it is larger than `limit` bytes, or the disk fails.
    pub fn read(&self, path: &[u8], limit: u64) -> Result<Option<Vec<u8>>> {
        let Some(Entry { kind: Kind::File { content, size }, .. }) =
            self.resolve(path, true)?.entry
        else {
            return Ok(None);
        };
        if size > limit {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "/{} has {size} bytes, more than the {limit} allowed here",
                    path.escape_ascii()
                ),
            ));
        }
        read_content(content, size, limit).map(Some)
    }

    /// Reads the first bytes of a regular file, at most `length`, links followed; `None` when there is none.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn read_start(&self, path: &[u8], length: u64) -> Result<Option<Vec<u8>>> {
        match self.resolve(path, true)?.entry {
            Some(Entry { kind: Kind::File { content, size }, .. }) => {
                read_content(content, size, length).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Opens a regular file, links followed; `None` when there is none.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn open(&self, path: &[u8]) -> Result<Option<Box<dyn Read + Send>>> {
        Ok(match self.resolve(path, true)?.entry {
            Some(Entry { kind: Kind::File { content, size }, .. }) => Some(match content {
                Content::Part { file, offset, .. } => Box::new(file.reader(offset, size)?),
                Content::Inline(bytes) => Box::new(std::io::Cursor::new(bytes)),
                Content::Host { path, .. } => Box::new(open_regular(&path)?),
            }),
            _ => None,
        })
    }

    /// Puts an entry at a path, which is taken literally; parents must be there. What was there is replaced whole, except
    /// that a directory put on a directory keeps what is in it.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn put(&mut self, path: &[u8], mut entry: Entry) -> Result<()> {
        let before = self.get(path)?;
        let merge = entry.is_directory() && before.as_ref().is_some_and(Entry::is_directory);
        self.record_parents(path)?;
        if merge {
            if let Kind::Directory { opaque } = &mut entry.kind {
                // Whether the entry hides something where it comes from says nothing here.
                *opaque = self.top.get(path).is_some_and(cuts);
            }
        } else {
            if before.is_some() || !self.is_fresh(path) {
                self.top.remove(path);
            }
            if let Kind::Directory { opaque } = &mut entry.kind {
                // A new directory must not show what a lower one of the same name had before it was replaced.
                *opaque = self.below_has(path)?;
                if !*opaque && !self.is_fresh(path) {
                    self.fresh = Some(path.to_vec());
                }
            }
        }
        self.top.insert(path, entry);
        Ok(())
    }

    /// Removes a path and everything below it.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn remove(&mut self, path: &[u8]) -> Result<()> {
        self.record_parents(path)?;
        self.top.remove(path);
        if self.below_has(path)? {
            let whiteout = Entry { kind: Kind::Whiteout, mode: 0, ..Entry::directory(0, 0) };
            self.top.insert(path, whiteout);
        }
        Ok(())
    }

    /// Whether anything is at a path below the top.
    fn below_has(&self, path: &[u8]) -> Result<bool> {
        if self.is_fresh(path) || hides(&self.top, path) {
            return Ok(false);
        }
        for tree in self.trees.iter().rev() {
            if let Some(entry) = tree.get(path) {
                return Ok(entry.kind != Kind::Whiteout);
            }
            if hides(tree, path) {
                return Ok(false);
            }
        }
        Ok(self.stack.lookup(path, Follow::None).map_err(damaged)?.is_some())
    }

    /// A layer names the parents of what it changes, with the attributes they have.
    fn record_parents(&mut self, path: &[u8]) -> Result<()> {
        let mut missing = vec![];
        let mut at = split(path).0;
        while !at.is_empty() && self.top.get(at).is_none() {
            missing.push(at);
            at = split(at).0;
        }
        for parent in missing.into_iter().rev() {
            if let Some(mut entry) = self.get(parent)? {
                if let Kind::Directory { opaque } = &mut entry.kind {
                    // What a lower layer hides stays hidden; what it shows must go on to show.
                    *opaque = false;
                }
                self.top.insert(parent, entry);
            }
        }
        Ok(())
    }
}

fn read_content(content: Content, size: u64, limit: u64) -> Result<Vec<u8>> {
    match content {
        Content::Part { file, offset, .. } => {
            let mut bytes = vec![0; usize::try_from(size.min(limit)).unwrap_or(usize::MAX)];
            file.read(offset, &mut bytes)?;
            Ok(bytes)
        }
        Content::Inline(bytes) => {
            let length = usize::try_from(limit).unwrap_or(usize::MAX).min(bytes.len());
            Ok(bytes[..length].to_vec())
        }
        Content::Host { path, .. } => {
            let mut bytes = vec![];
            open_regular(&path)?.take(limit).read_to_end(&mut bytes).at("read", &path)?;
            Ok(bytes)
        }
    }
}

/// Whether a tree hides what is below it at a path that it does not name.
fn hides(tree: &Tree, path: &[u8]) -> bool {
    let mut at = path;
    while !at.is_empty() {
        at = split(at).0;
        if tree.get(at).is_some_and(|entry| cuts(entry) || !entry.is_directory()) {
            return true;
        }
    }
    false
}

fn cuts(entry: &Entry) -> bool {
    entry.kind == Kind::Directory { opaque: true }
}

fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> {
    path.split(|b| *b == b'/').filter(|part| !part.is_empty()).map(<[u8]>::to_vec)
}

fn damaged(error: LayerError) -> Error {
    Error::new(ErrorKind::Io, "cannot read the layers").because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Entry {
        let content = Content::Inline(text.as_bytes().into());
        Entry {
            kind: Kind::File { content, size: text.len() as u64 },
            ..Entry::directory(0o644, 0)
        }
    }

    fn link(target: &str) -> Entry {
        Entry { kind: Kind::Symlink { target: target.into() }, ..Entry::directory(0o777, 0) }
    }

    fn base() -> View {
        let mut tree = Tree::default();
        for (path, entry) in [
            ("usr", Entry::directory(0o755, 0)),
            ("usr/lib", Entry::directory(0o751, 0)),
            ("usr/lib/x", file("x")),
            ("lib", link("usr/lib")),
            ("up", link("../../usr")),
            ("loop", link("loop")),
        ] {
            tree.insert(path.as_bytes(), entry);
        }
        View::of_tree(Arc::new(tree))
    }

    #[test]
    fn links_are_followed_inside_the_tree() {
        let view = base();
        assert_eq!(view.resolve(b"/lib/x", true).unwrap().path, b"usr/lib/x");
        assert_eq!(view.resolve(b"/up/lib/x", true).unwrap().path, b"usr/lib/x");
        assert_eq!(view.resolve(b"lib", false).unwrap().path, b"lib");
        assert_eq!(
            view.resolve(b"lib/new/deep", true).unwrap(),
            Resolved { path: b"usr/lib/new/deep".into(), entry: None }
        );
        assert_eq!(view.resolve(b"loop/a", true).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(view.read(b"lib/x", 10).unwrap().unwrap(), b"x");
    }

    #[test]
    fn changes_name_their_parents_with_their_attributes() {
        let mut view = base();
        view.put(b"usr/lib/y", file("y")).unwrap();
        let paths: Vec<_> = view.changes().iter().map(|(path, entry)| (path, entry.mode)).collect();
        assert_eq!(
            paths,
            [
                (b"usr".to_vec(), 0o755),
                (b"usr/lib".to_vec(), 0o751),
                (b"usr/lib/y".to_vec(), 0o644)
            ]
        );
        let names: Vec<_> =
            view.children(b"usr/lib").unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, [b"x", b"y"]);
    }

    #[test]
    fn a_change_beside_what_a_layer_shows_hides_nothing_of_it() {
        let mut tree = Tree::default();
        tree.insert(
            b"d",
            Entry { kind: Kind::Directory { opaque: true }, ..Entry::directory(0o755, 0) },
        );
        tree.insert(b"d/shown", file("x"));
        let mut view = View::of_tree(Arc::new(tree));
        view.remove(b"d/no-such").unwrap();
        view.put(
            b"d",
            Entry { kind: Kind::Directory { opaque: true }, ..Entry::directory(0o700, 0) },
        )
        .unwrap();
        assert_eq!(view.read(b"d/shown", 10).unwrap().unwrap(), b"x");
    }

    #[test]
    fn removed_and_replaced_directories_do_not_shine_through() {
        let mut view = base();
        view.remove(b"usr/lib").unwrap();
        assert_eq!(view.get(b"usr/lib/x").unwrap(), None);
        assert_eq!(view.changes().get(b"usr/lib").unwrap().kind, Kind::Whiteout);
        view.put(b"usr/lib", Entry::directory(0o700, 0)).unwrap();
        assert_eq!(view.get(b"usr/lib/x").unwrap(), None);
        assert!(view.children(b"usr/lib").unwrap().is_empty());
        assert_eq!(view.changes().get(b"usr/lib").unwrap().kind, Kind::Directory { opaque: true });
        view.put(b"usr", file("now a file")).unwrap();
        assert_eq!(view.changes().len(), 1);
    }
}
