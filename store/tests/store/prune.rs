//! What the collector takes and what it leaves.

use std::fs;

use slipway_spec::{Digest, MediaType};
use slipway_store::ErrorKind;
use slipway_store::filter::Filter;
use slipway_store::gc::collect::Collection;
use slipway_store::gc::{CacheRecord, PruneOptions, Pruned, RecordKind, Rule};
use slipway_store::image::ANNOTATION_NAME;
use slipway_store::kept::{KeptKind, Sharing};
use slipway_store::pack::BlobOptions;
use slipway_store::result::{ResultKey, StepResult};
use slipway_store::snapshot::{LayerId, Snapshot};

use crate::harness;

const ALL: PruneOptions = PruneOptions { all: true, older_than: None, working_since: None };
const SOME: PruneOptions = PruneOptions { all: false, older_than: None, working_since: None };

#[test]
fn images_and_what_they_need_stay() {
    let (_folder, store) = harness::store();
    let (layer, target) = harness::image(&store, "docker.io/library/a:latest", &[("f", "text")]);
    let platform = store.platforms(&target).unwrap().remove(0);
    for options in [SOME, ALL] {
        store.prune(&options).unwrap();
        let closure = store.closure(&target).unwrap();
        assert!(closure.missing.is_empty());
        assert_eq!((closure.blobs.len(), closure.documents.len()), (2, 1));
        assert_eq!(store.platforms(&target).unwrap()[0].manifest, platform.manifest);
    }
    // Its folder went, as it can be unpacked again.
    assert!(!store.layer_folder(layer).exists());
    assert_eq!(fs::read(store.ensure_folder(layer, &[]).unwrap().join("f")).unwrap(), b"text");
    assert_eq!(store.prune(&SOME).unwrap(), Pruned::default());

    store.remove_images(&["docker.io/library/a:latest".into()]).unwrap();
    let pruned = store.prune(&ALL).unwrap();
    assert_eq!((pruned.blobs, pruned.layers), (3, 1));
    assert_eq!(store.ensure_folder(layer, &[]).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.usage().unwrap(), slipway_store::gc::Usage::default());
}

#[test]
fn the_only_copy_of_an_image_layer_stays() {
    let (_folder, store) = harness::store();
    let (layer, target) = harness::image(&store, "docker.io/library/a:latest", &[("f", "text")]);
    let blob = store.platforms(&target).unwrap().remove(0).manifest.layers.remove(0);
    fs::remove_file(store.blob_path(&blob.digest)).unwrap();
    harness::database(&store)
        .execute("DELETE FROM blob WHERE digest = ?1", [blob.digest.to_string()])
        .unwrap();
    store.prune(&ALL).unwrap();
    assert!(store.layer_folder(layer).exists());
}

#[test]
fn layers_behind_results_stay_until_all_is_pruned() {
    let (_folder, store) = harness::store();
    let (kept, orphan) =
        (harness::layer(&store, &[("f", "kept")]), harness::layer(&store, &[("f", "orphan")]));
    let blob = store.ensure_blob(kept, &BlobOptions::default()).unwrap();
    let (key, alias) = (ResultKey([1; 32]), ResultKey([2; 32]));
    let result = StepResult { snapshot: Snapshot { layers: vec![kept] }, created: 7 };
    store.remember(&key, &result, "a step").unwrap();
    store.remember_alias(&alias, &key).unwrap();

    let pruned = store.prune(&SOME).unwrap();
    assert_eq!((pruned.results, pruned.layers, pruned.blobs), (0, 1, 0));
    assert!(!store.obtainable(orphan).unwrap());
    assert_eq!(store.result(&store.alias(&alias).unwrap().unwrap()).unwrap(), Some(result));
    assert!(store.obtainable(kept).unwrap());
    assert!(store.has_blob(&blob.descriptor.digest).unwrap());

    let pruned = store.prune(&ALL).unwrap();
    assert_eq!((pruned.results, pruned.layers, pruned.blobs), (1, 1, 1));
    assert!(pruned.bytes > blob.descriptor.size);
    assert_eq!((store.result(&key).unwrap(), store.alias(&alias).unwrap()), (None, None));
    assert!(!store.obtainable(kept).unwrap());
}

#[test]
fn young_things_stay_when_only_old_ones_may_go() {
    let (_folder, store) = harness::store();
    let hour = 3_600_000_000_000;
    let (old, young) = (
        store.put(MediaType::OCI_CONFIG, b"old").unwrap(),
        store.put(MediaType::OCI_CONFIG, b"young").unwrap(),
    );
    let set = |used: i64| {
        let statement = "UPDATE blob SET used = used - ?1 WHERE digest = ?2";
        harness::database(&store).execute(statement, (used, old.digest.to_string())).unwrap();
    };
    set(2 * hour);
    let pruned = store
        .prune(&PruneOptions { all: true, older_than: Some(hour), working_since: None })
        .unwrap();
    assert_eq!(pruned.blobs, 1);
    assert!(!store.has_blob(&old.digest).unwrap());
    assert!(store.has_blob(&young.digest).unwrap());
}

#[test]
fn another_handle_that_is_open_protects_what_was_used_since_it_was_opened() {
    let (folder, store) = harness::store();
    let before = store.put(MediaType::OCI_CONFIG, b"before").unwrap();
    let other = slipway_store::Store::open(&folder.path().join("root")).unwrap();
    let since = other.put(MediaType::OCI_CONFIG, b"since").unwrap();
    let (found, folder) = (
        other.put(MediaType::OCI_CONFIG, b"before").unwrap(),
        harness::layer(&other, &[("f", "")]),
    );
    assert_eq!(found, before);
    store.prune(&ALL).unwrap();
    assert!(store.has_blob(&before.digest).unwrap() && store.has_blob(&since.digest).unwrap());
    assert!(store.obtainable(folder).unwrap());
    drop(other);
    assert_eq!(store.prune(&ALL).unwrap().blobs, 2);
}

#[test]
fn what_a_crash_left_between_file_and_row_goes_and_nothing_else() {
    let (_folder, store) = harness::store();
    let (layer, target) = harness::image(&store, "docker.io/library/a:latest", &[("f", "text")]);
    let litter = store.blob_path(&Digest::of(b"litter"));
    fs::write(&litter, "litter").unwrap();
    let sha512 = store.content_folder().join("blobs/sha512").join("a".repeat(128));
    fs::create_dir_all(sha512.parent().unwrap()).unwrap();
    fs::write(&sha512, "litter").unwrap();
    let readme = store.content_folder().join("blobs/sha256/README");
    fs::write(&readme, "somebody's own").unwrap();
    let folder = store.root().join("layers/4711");
    fs::create_dir_all(folder.join("fs/deep")).unwrap();
    fs::write(store.content_folder().join("index.json"), "garbage").unwrap();

    let pruned = store.prune(&SOME).unwrap();
    assert!(pruned.bytes >= 12);
    assert!(!litter.exists() && !sha512.exists() && !folder.exists());
    assert!(readme.exists() && store.layer_folder(layer).exists());
    let index: slipway_spec::Index =
        serde_json::from_slice(&fs::read(store.content_folder().join("index.json")).unwrap())
            .unwrap();
    assert_eq!(index.manifests.len(), 1);
    assert_eq!(index.manifests[0].digest, target.digest);
    assert_eq!(index.manifests[0].annotations[ANNOTATION_NAME], "docker.io/library/a:latest");
}

#[test]
fn blobs_that_are_shared_go_with_their_last_image() {
    let (_folder, store) = harness::store();
    let (_, target) = harness::image(&store, "docker.io/library/a:latest", &[("f", "text")]);
    store.name_image(&["docker.io/library/b:latest".into()], &target).unwrap();
    store.remove_images(&["docker.io/library/a:latest".into()]).unwrap();
    store.prune(&ALL).unwrap();
    assert!(store.closure(&target).unwrap().missing.is_empty());
    store.remove_images(&["docker.io/library/b:latest".into()]).unwrap();
    assert_eq!(store.prune(&ALL).unwrap().blobs, 3);
}

#[test]
fn removing_an_unknown_name_changes_nothing() {
    let (_folder, store) = harness::store();
    harness::image(&store, "docker.io/library/a:latest", &[("f", "text")]);
    let names = ["docker.io/library/a:latest".to_owned(), "docker.io/library/b:latest".to_owned()];
    assert_eq!(store.remove_images(&names).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(store.images().unwrap().len(), 1);
    let index = fs::read_to_string(store.content_folder().join("index.json")).unwrap();
    assert!(index.contains("docker.io/library/a:latest"));
}

#[test]
fn layers_that_only_this_process_knows_stay() {
    let (_folder, store) = harness::store();
    let layer = store.adopt_tree(slipway_store::tree::Tree::default(), "a copy").unwrap();
    store.prune(&ALL).unwrap();
    store.ensure_folder(layer, &[]).unwrap();
}

#[test]
fn what_a_build_of_the_same_process_uses_stays() {
    let (_folder, store) = harness::store();
    let before = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map(|since| i64::try_from(since.as_nanos()).unwrap())
        .unwrap();
    let blob = store.put(MediaType::OCI_CONFIG, b"in use").unwrap();
    let working = PruneOptions { working_since: Some(before), ..ALL };
    assert_eq!(store.prune(&working).unwrap().blobs, 0);
    assert!(store.has_blob(&blob.digest).unwrap());
    assert_eq!(store.prune(&ALL).unwrap().blobs, 1);
}

/// Takes away all that a rule allows, and returns the ids of what went.
fn collect(store: &slipway_store::Store, rule: &Rule) -> Vec<String> {
    let records = store.cache_records(None).unwrap();
    let planned: Vec<CacheRecord> =
        rule.plan(&records, i64::MAX, u64::MAX).into_iter().map(|at| records[at].clone()).collect();
    let collection = Collection { records: &planned, ..Collection::default() };
    let collected = store.take_records(&collection).unwrap();
    let gone = store.finish_collection(collected).unwrap();
    gone.into_iter().map(|record| record.id).collect()
}

fn step(store: &slipway_store::Store, key: u8, layers: &[LayerId]) {
    let result = StepResult { snapshot: Snapshot { layers: layers.to_vec() }, created: 7 };
    store.remember(&ResultKey([key; 32]), &result, "a step").unwrap();
}

#[test]
fn records_tell_what_they_are_and_what_they_stand_on() {
    let (_folder, store) = harness::store();
    let base = harness::layer(&store, &[("f", "base")]);
    let top = harness::layer(&store, &[("g", "top")]);
    step(&store, 1, &[base]);
    step(&store, 2, &[base, top]);
    store.set_layer_kind(top, RecordKind::GitCheckout).unwrap();
    let loose = store.put(MediaType::OCI_CONFIG, b"loose").unwrap();
    let mount = store.try_keep(KeptKind::Cache, "go", b"", Sharing::Shared, |_| Ok(()));
    let mount = mount.unwrap().unwrap();
    let blob = store.ensure_blob(top, &BlobOptions::default()).unwrap();

    let records = store.cache_records(None).unwrap();
    let summary: Vec<_> = records
        .iter()
        .map(|r| (r.id.clone(), r.kind.as_str(), r.parents.clone(), r.mutable, r.in_use))
        .collect();
    let (base_id, top_id) = (base.0.to_string(), top.0.to_string());
    assert_eq!(
        summary,
        [
            (base_id.clone(), "regular", vec![], false, false),
            (top_id, "source.git.checkout", vec![base_id], false, false),
            (loose.digest.to_string(), "regular", vec![], false, false),
            (records[3].id.clone(), "exec.cachemount", vec![], true, true),
        ]
    );
    assert!(records.iter().all(|record| record.bytes > 0 && record.created > 0));
    assert!(records[1].bytes > blob.descriptor.size, "a folder and a blob");
    drop(mount);
    assert!(!store.cache_records(None).unwrap()[3].in_use);
    let began = records[0].used;
    assert!(store.cache_records(Some(began)).unwrap()[..3].iter().all(|record| record.in_use));
}

#[test]
fn a_collection_takes_children_first_and_forgets_their_results() {
    let (_folder, store) = harness::store();
    let base = harness::layer(&store, &[("f", "base")]);
    let (one, two) = (harness::layer(&store, &[("g", "1")]), harness::layer(&store, &[("g", "2")]));
    step(&store, 1, &[base]);
    step(&store, 2, &[base, one]);
    step(&store, 3, &[base, two]);
    let only = |text: &str| Rule {
        filter: Filter::parse(&[text], slipway_store::gc::record::FIELDS).unwrap(),
        ..Rule::default()
    };
    let by_id = |layer: LayerId| only(&format!("id=={}", layer.0));
    assert_eq!(collect(&store, &by_id(base)), [""; 0], "others stand on it");
    assert_eq!(collect(&store, &by_id(one)), [one.0.to_string()]);
    assert!(store.result(&ResultKey([2; 32])).unwrap().is_none());
    assert!(store.result(&ResultKey([1; 32])).unwrap().is_some());
    assert!(!store.layer_folder(one).exists() && store.layer_folder(two).exists());
    assert_eq!(
        collect(&store, &Rule::default()),
        [two.0.to_string(), base.0.to_string()],
        "the rest from the top"
    );
    assert!(store.cache_records(None).unwrap().is_empty());
    assert_eq!(fs::read_dir(store.root().join("layers")).unwrap().count(), 0);
}

#[test]
fn layers_that_lie_on_each_other_can_go() {
    let (_folder, store) = harness::store();
    let [one, two, three] = ["1", "2", "3"].map(|text| harness::layer(&store, &[("f", text)]));
    step(&store, 1, &[one, two]);
    step(&store, 2, &[two, one, three]);
    step(&store, 3, &[one, two, one]);
    let records = store.cache_records(None).unwrap();
    let parents = |layer: LayerId| {
        let found = records.iter().find(|record| record.id == layer.0.to_string());
        found.unwrap().parents.len()
    };
    assert_eq!((parents(one) + parents(two), parents(three)), (1, 1));
    assert_eq!(collect(&store, &Rule::default()).len(), 3);
    assert!(store.cache_records(None).unwrap().is_empty());
    for key in 1..4 {
        assert!(store.result(&ResultKey([key; 32])).unwrap().is_none());
    }
}

#[test]
fn what_was_used_since_it_was_listed_stays_with_all_below_it() {
    let (_folder, store) = harness::store();
    let base = harness::layer(&store, &[("f", "base")]);
    let top = harness::layer(&store, &[("g", "top")]);
    step(&store, 1, &[base, top]);
    let records: Vec<CacheRecord> = store.cache_records(None).unwrap().into_iter().rev().collect();
    harness::database(&store)
        .execute("UPDATE layer SET used = used + 1000000000000 WHERE id = ?1", [top.0])
        .unwrap();
    let collection = Collection { records: &records, ..Collection::default() };
    let collected = store.take_records(&collection).unwrap();
    assert_eq!(store.finish_collection(collected).unwrap(), []);
    assert!(store.obtainable(base).unwrap() && store.obtainable(top).unwrap());
    assert!(store.result(&ResultKey([1; 32])).unwrap().is_some());
}

#[test]
fn images_are_no_cache_but_what_they_share_with_it_is() {
    let (_folder, store) = harness::store();
    let (layer, target) = harness::image(&store, "docker.io/library/a:latest", &[("f", "text")]);
    let records = store.cache_records(None).unwrap();
    assert_eq!(records.len(), 1, "the folder can go: {records:?}");
    assert!(records[0].shared);
    step(&store, 1, &[layer]);
    assert_eq!(collect(&store, &Rule::default()), [""; 0], "shared records need a word more");
    let all = Rule { all: true, ..Rule::default() };
    assert_eq!(collect(&store, &all), [layer.0.to_string()]);
    assert!(store.cache_records(None).unwrap().is_empty());
    assert!(store.result(&ResultKey([1; 32])).unwrap().is_none());
    assert!(store.closure(&target).unwrap().missing.is_empty());
    assert_eq!(fs::read(store.ensure_folder(layer, &[]).unwrap().join("f")).unwrap(), b"text");
    let kinds: Vec<_> = store.usage().unwrap().records.iter().map(|r| r.kind.as_str()).collect();
    assert_eq!(kinds, ["regular", "image", "image", "image"]);
}

#[test]
fn cache_mounts_go_unless_they_are_used() {
    let (_folder, store) = harness::store();
    let take = |name: &str| {
        let kept = store.try_keep(KeptKind::Cache, name, b"", Sharing::Shared, |_| Ok(()));
        kept.unwrap().unwrap()
    };
    let busy = take("busy");
    fs::write(take("idle").folder().join("f"), vec![1; 100_000]).unwrap();
    let gone = collect(&store, &Rule::default());
    assert_eq!(gone.len(), 1, "{gone:?}");
    assert!(gone[0].starts_with("kept/cache/") && !store.root().join(&gone[0]).exists());
    assert!(busy.folder().exists());
    for path in ["kept/cache/..", "kept/cache/../../layers/1", "/etc/passwd", "kept/git/x/0", ""] {
        assert!(!store.remove_kept(path, i64::MAX).unwrap(), "{path}");
    }
}

#[test]
fn trees_that_nobody_asks_for_any_more_are_forgotten() {
    let (_folder, store) = harness::store();
    let adopt = || store.adopt_tree(slipway_store::tree::Tree::default(), "a copy").unwrap();
    let (old, young) = (adopt(), adopt());
    let now = slipway_store::now_nanos();
    assert!(store.pending_tree(young).is_some());
    assert_eq!(store.forget_trees(now), 1);
    assert!(!store.obtainable(old).unwrap() && store.obtainable(young).unwrap());
    // Its row goes with the next collection, as nothing refers to it.
    collect(&store, &Rule::default());
    assert_eq!(store.layer_origin(old).unwrap_err().kind(), ErrorKind::NotFound);
    store.ensure_folder(young, &[]).unwrap();
}
