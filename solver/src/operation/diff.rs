//! What leads from one file system to another that was not made on top of it.

use slipway_store::snapshot::Snapshot;
use slipway_store::tree::{Content, Entry, Kind};
use slipway_store::{Result, Store};

/// Makes a layer that turns `lower` into `upper`.
///
/// # Errors
/// When the disk fails.
pub(crate) fn between(
    store: &Store,
    lower: &Snapshot,
    upper: &Snapshot,
    name: &str,
) -> Result<Snapshot> {
    let before = store.view(&lower.layers)?.flatten()?;
    let after = store.view(&upper.layers)?.flatten()?;
    let mut changes = store.view(&lower.layers)?;
    let mut buffer = vec![];
    let mut gone: Option<Vec<u8>> = None;
    for (path, _) in before.iter() {
        let below_gone = gone.as_ref().is_some_and(|gone| {
            path.strip_prefix(gone.as_slice()).is_some_and(|rest| rest.starts_with(b"/"))
        });
        // What is below something that goes, goes with it.
        if path.is_empty() || below_gone || after.get(&path).is_some() {
            continue;
        }
        // A parent that is no folder any more takes it along when it is put.
        if has_file_above(&after, &path) {
            continue;
        }
        changes.remove(&path)?;
        gone = Some(path);
    }
    for (path, entry) in after.iter() {
        if path.is_empty() {
            continue;
        }
        if let Some(known) = before.get(&path)
            && !has_file_above(&before, &path)
            && is_same(known, entry, &mut buffer)?
        {
            continue;
        }
        changes.put(&path, entry.clone())?;
    }
    let layer = store.adopt_tree(changes.into_changes(), name)?;
    Ok(Snapshot { layers: vec![layer] })
}

fn has_file_above(tree: &slipway_store::tree::Tree, path: &[u8]) -> bool {
    let (mut at, _) = slipway_store::tree::split(path);
    while !at.is_empty() {
        if tree.get(at).is_some_and(|entry| !entry.is_directory()) {
            return true;
        }
        at = slipway_store::tree::split(at).0;
    }
    false
}

fn is_same(one: &Entry, other: &Entry, buffer: &mut Vec<u8>) -> Result<bool> {
    let looks = |entry: &Entry| (entry.mode, entry.uid, entry.gid, entry.mtime);
    if looks(one) != looks(other) || one.xattrs != other.xattrs {
        return Ok(false);
    }
    Ok(match (&one.kind, &other.kind) {
        (Kind::Directory { .. }, Kind::Directory { .. }) => true,
        (
            Kind::File { content: first, size: one_size },
            Kind::File { content: second, size: other_size },
        ) => one_size == other_size && is_same_content(first, second, buffer)?,
        (one, other) => one == other,
    })
}

fn is_same_content(one: &Content, other: &Content, buffer: &mut Vec<u8>) -> Result<bool> {
    if let (Content::Host { path: one, .. }, Content::Host { path: other, .. }) = (one, other)
        && one == other
    {
        return Ok(true);
    }
    Ok(one.digest(buffer)? == other.digest(buffer)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_store::snapshot::LayerId;
    use slipway_store::tree::Tree;

    fn file(text: &str) -> Entry {
        let kind = Kind::File {
            content: Content::Inline(text.as_bytes().into()),
            size: text.len() as u64,
        };
        Entry { kind, ..Entry::directory(0o644, 0) }
    }

    fn layer(store: &Store, entries: &[(&str, Entry)]) -> LayerId {
        let tree: Tree =
            entries.iter().map(|(path, entry)| (path.as_bytes().to_vec(), entry.clone())).collect();
        store.adopt_tree(tree, "test").unwrap()
    }

    #[test]
    fn unrelated_file_systems_are_compared_by_content() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let dir = || Entry::directory(0o755, 0);
        let lower = layer(
            &store,
            &[
                ("d", dir()),
                ("d/same", file("s")),
                ("d/changed", file("1")),
                ("gone", dir()),
                ("gone/x", file("x")),
                ("kind", dir()),
                ("kind/below", file("b")),
            ],
        );
        let upper = layer(
            &store,
            &[
                ("d", dir()),
                ("d/changed", file("2")),
                ("d/new", file("n")),
                ("d/same", file("s")),
                ("kind", file("now a file")),
            ],
        );
        let (lower, upper) = (Snapshot { layers: vec![lower] }, Snapshot { layers: vec![upper] });
        let made = between(&store, &lower, &upper, "diff").unwrap();
        let tree = store.pending_tree(made.layers[0]).unwrap();
        let paths: Vec<String> =
            tree.iter().map(|(path, _)| String::from_utf8(path).unwrap()).collect();
        assert_eq!(paths, ["d", "d/changed", "d/new", "gone", "kind"]);
        assert_eq!(tree.get(b"gone").unwrap().kind, Kind::Whiteout);
        // On the lower one it gives the upper one.
        let both = Snapshot { layers: [lower.layers, made.layers].concat() };
        let got = store.view(&both.layers).unwrap().flatten().unwrap();
        let want = store.view(&upper.layers).unwrap().flatten().unwrap();
        let list = |tree: &Tree| tree.iter().map(|(path, _)| path).collect::<Vec<_>>();
        assert_eq!(list(&got), list(&want));
        assert_eq!(got.get(b"kind"), want.get(b"kind"));
    }
}
