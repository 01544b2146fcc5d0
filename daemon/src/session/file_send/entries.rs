//! What is sent of a build's results.

use std::collections::HashMap;

use slipway_engine::exporter::PlatformResult;
use slipway_engine::store::tree::{Entry, Tree, join};
use slipway_engine::store::{Error, ErrorKind, Store};

/// What of a build's results goes into a folder.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExportTree {
    /// Whether each platform gets a folder of its own.
    pub split: bool,
    /// The time that everything gets, in seconds since 1970, where it is not to keep its own.
    pub epoch: Option<i64>,
}

/// Joins the file systems of results in one tree. Blocks.
///
/// # Errors
/// When two platforms have a file of the same name and no folders of their own, or a layer cannot be read.
pub fn export_tree(
    store: &Store,
    results: &[PlatformResult],
    options: ExportTree,
) -> Result<Tree, Error> {
    let epoch = options.epoch.map(|seconds| seconds.saturating_mul(1_000_000_000));
    let mut all = Tree::default();
    let mut owners: HashMap<Vec<u8>, String> = HashMap::new();
    for result in results {
        let platform = result.platform.to_string();
        let mut folder = vec![];
        if options.split {
            folder = result.platform.folder_name().into_bytes();
            all.insert(&folder, Entry::directory(0o755, epoch.unwrap_or(0)));
        }
        let tree = store.view(&result.snapshot.layers)?.flatten()?;
        for (path, entry) in tree.iter().filter(|(path, _)| !path.is_empty()) {
            let path = join(&folder, &path);
            if !options.split
                && results.len() > 1
                && !entry.is_directory()
                && let Some(other) = owners.insert(path.clone(), platform.clone())
            {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!(
                        "cannot overwrite {} from {other} with {platform} when split option is disabled",
                        path.escape_ascii()
                    ),
                ));
            }
            let mut entry = entry.clone();
            entry.mtime = epoch.unwrap_or(entry.mtime);
            all.insert(&path, entry);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use slipway_engine::store::snapshot::Snapshot;
    use slipway_engine::store::tree::{Content, Kind};
    use slipway_spec::{ImageConfig, Platform};

    use super::*;

    fn result(store: &Store, platform: &str, files: &[(&str, &str)]) -> PlatformResult {
        let entry = |text: &str| {
            let content = Content::Inline(text.as_bytes().into());
            Entry {
                kind: Kind::File { content, size: text.len() as u64 },
                ..Entry::directory(0o644, 7)
            }
        };
        let mut tree: Tree =
            files.iter().map(|(path, text)| (path.as_bytes().to_vec(), entry(text))).collect();
        tree.insert(b"d", Entry::directory(0o700, 7));
        let layer = store.adopt_tree(tree, "test").unwrap();
        PlatformResult {
            platform: platform.parse::<Platform>().unwrap(),
            snapshot: Snapshot { layers: vec![layer] },
            config: ImageConfig::default(),
            base_history: 0,
            inline_cache: None,
            epoch: None,
        }
    }

    fn paths(tree: &Tree) -> Vec<String> {
        tree.iter().map(|(path, _)| String::from_utf8(path).unwrap()).collect()
    }

    #[test]
    fn platforms_get_folders_or_share_one_without_overwriting() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let amd64 = result(&store, "linux/amd64", &[("d/same", "1"), ("one", "2")]);
        let arm = result(&store, "linux/arm/v7", &[("d/same", "3"), ("two", "4")]);
        let both = [amd64.clone(), arm];

        let split = ExportTree { split: true, epoch: Some(5) };
        let tree = export_tree(&store, &both, split).unwrap();
        assert_eq!(
            paths(&tree),
            [
                "linux_amd64",
                "linux_amd64/d",
                "linux_amd64/d/same",
                "linux_amd64/one",
                "linux_arm_v7",
                "linux_arm_v7/d",
                "linux_arm_v7/d/same",
                "linux_arm_v7/two"
            ]
        );
        assert!(tree.iter().all(|(_, entry)| entry.mtime == 5_000_000_000));

        let error = export_tree(&store, &both, ExportTree::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot overwrite d/same from linux/amd64 with linux/arm/v7 when split option is disabled"
        );
        let other = result(&store, "linux/arm/v7", &[("three", "5")]);
        let tree = export_tree(&store, &[amd64, other], ExportTree::default()).unwrap();
        assert_eq!(paths(&tree), ["d", "d/same", "one", "three"]);
        assert_eq!(tree.get(b"one").unwrap().mtime, 7);
    }
}
