//! What is sent of a build's results.

use std::collections::HashMap;

use slipway_engine::exporter::attestation::beside::{Naming, beside, wanted};
use slipway_engine::exporter::files::{statement_entry, statement_time};
use slipway_engine::exporter::{ExportError, PlatformResult};
use slipway_engine::store::Store;
use slipway_engine::store::tree::{Entry, Tree, join};

/// What of a build's results goes into a folder.
#[derive(Clone, Debug, Default)]
pub struct ExportTree {
    /// Whether each platform gets a folder of its own.
    pub split: bool,
    /// The time that everything gets, in seconds since 1970, where it is not to keep its own.
    pub epoch: Option<i64>,
    /// Whether the names of statements tell the platform.
    pub platform_names: bool,
    /// What the names of statements begin with.
    pub attestation_prefix: String,
}

/// Joins the file systems of results in one tree, with what is said of them beside their files. Blocks.
///
/// # Errors
/// When two platforms have a file of the same name and no folders of their own, a layer cannot be read, or what is said of
/// a result.
pub fn export_tree(
    store: &Store,
    results: &[PlatformResult],
    options: &ExportTree,
) -> Result<Tree, ExportError> {
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
        let mut tree = store.view(&result.snapshot.layers)?.flatten()?;
        if wanted(result) {
            let naming =
                Naming { prefix: &options.attestation_prefix, platform: options.platform_names };
            let time = statement_time(options.epoch.or(result.epoch));
            for file in beside(store, result, &tree, naming)? {
                tree.remove(file.name.as_bytes());
                tree.insert(file.name.as_bytes(), statement_entry(file.content, time));
            }
        }
        for (path, entry) in tree.iter().filter(|(path, _)| !path.is_empty()) {
            let path = join(&folder, &path);
            if !options.split
                && results.len() > 1
                && !entry.is_directory()
                && let Some(other) = owners.insert(path.clone(), platform.clone())
            {
                return Err(ExportError::Invalid(format!(
                    "cannot overwrite {} from {other} with {platform} when split option is disabled",
                    path.escape_ascii()
                )));
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
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use slipway_engine::exporter::attestation::{Attestation, Content as Said, MakePredicate};
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
            attestations: vec![],
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

        let split = ExportTree { split: true, epoch: Some(5), ..ExportTree::default() };
        let tree = export_tree(&store, &both, &split).unwrap();
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

        let error = export_tree(&store, &both, &ExportTree::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot overwrite d/same from linux/amd64 with linux/arm/v7 when split option is disabled"
        );
        let other = result(&store, "linux/arm/v7", &[("three", "5")]);
        let tree = export_tree(&store, &[amd64, other], &ExportTree::default()).unwrap();
        assert_eq!(paths(&tree), ["d", "d/same", "one", "three"]);
        assert_eq!(tree.get(b"one").unwrap().mtime, 7);
    }

    #[derive(Debug)]
    struct Says;

    impl MakePredicate for Says {
        fn make(&self, _store: &Store) -> Result<Vec<u8>, ExportError> {
            Ok(b"{\"said\":1}".into())
        }
    }

    #[test]
    fn what_is_said_lies_beside_the_files() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        let mut amd64 = result(&store, "linux/amd64", &[("a", "1"), ("x-p.json", "old")]);
        amd64.attestations = vec![Attestation {
            content: Said::Made(Arc::new(Says)),
            predicate_type: "https://example.com/type".into(),
            subjects: vec![],
            path: "/d/p.json".into(),
            metadata: BTreeMap::new(),
        }];
        let mut arm = result(&store, "linux/arm/v7", &[("b", "2")]);
        arm.attestations = amd64.attestations.clone();
        let both = [amd64, arm];

        let options = ExportTree {
            split: true,
            epoch: Some(5),
            attestation_prefix: "x-".into(),
            ..ExportTree::default()
        };
        let tree = export_tree(&store, &both, &options).unwrap();
        let entry = tree.get(b"linux_amd64/x-p.json").unwrap();
        assert_eq!((entry.mode, entry.mtime), (0o600, 5_000_000_000));
        let Kind::File { content: Content::Inline(bytes), size } = &entry.kind else {
            panic!("{entry:?}")
        };
        assert_eq!(*size, bytes.len() as u64);
        let statement: serde_json::Value = serde_json::from_slice(bytes).unwrap();
        assert_eq!(statement["predicate"], serde_json::json!({ "said": 1 }));
        let names: Vec<_> =
            statement["subject"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
        assert_eq!(names, ["a", "x-p.json"]);
        assert!(tree.get(b"linux_arm_v7/x-p.json").is_some());

        let shared = ExportTree { platform_names: true, ..ExportTree::default() };
        let tree = export_tree(&store, &both, &shared).unwrap();
        let found = paths(&tree);
        assert_eq!(found, ["a", "b", "d", "p.linux_amd64.json", "p.linux_arm_v7.json", "x-p.json"]);
        let error = export_tree(&store, &both, &ExportTree::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot overwrite p.json from linux/amd64 with linux/arm/v7 when split option is disabled"
        );
    }
}
