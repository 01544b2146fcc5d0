//! Random trees: unpacking what was packed gives the same tree.

use proptest::prelude::{Strategy, any, prop, prop_oneof};
use proptest::test_runner::{Config, TestRunner};

use super::super::{Entry, EntryKind, LayerStack};
use super::{archive, diff, look, stack, unpack};

/// A change to a small tree; paths are drawn from few names so that changes meet.
fn change() -> impl Strategy<Value = (Entry, Vec<u8>)> {
    let name = prop_oneof![
        4 => "[a-c]".prop_map(String::into_bytes),
        1 => prop::collection::vec(any::<u8>().prop_filter("legal", |b| *b != b'/' && *b != 0), 1..120)
            .prop_filter("legal", |name| name != b"." && name != b".." && !name.starts_with(b".wh.")),
    ];
    let path = prop::collection::vec(name, 1..4);
    let target = prop_oneof!["[a-c]", "/[a-c]/[a-c]", "\\.\\./[a-c]", "[x-z]{90,120}"]
        .prop_map(String::into_bytes);
    let kind = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..700).prop_map(|body| (EntryKind::File { size: body.len() as u64 }, body)),
        4 => any::<()>().prop_map(|()| (EntryKind::Directory, Vec::new())),
        2 => target.prop_map(|target| (EntryKind::Symlink { target }, Vec::new())),
        1 => (0..4095_u32, 1..1_048_575_u32).prop_map(|(major, minor)| (EntryKind::CharDevice { major, minor }, Vec::new())),
        1 => any::<()>().prop_map(|()| (EntryKind::Fifo, Vec::new())),
    ];
    let ids = prop_oneof![0..3_u32, 0..u32::MAX];
    (path, kind, 0..0o10000_u32, ids, 0..20_000_000_000_i64, any::<bool>()).prop_map(
        |(path, (kind, body), mode, uid, mtime_seconds, is_whiteout)| {
            let mut path = path;
            // ext4 keeps times up to the year 2446.
            let mut entry = Entry::new(Vec::new(), kind, mode);
            entry.uid = uid;
            entry.mtime_seconds = mtime_seconds % 15_000_000_000;
            let mut body = body;
            if is_whiteout && path.len() > 1 && path[path.len() - 1].len() < 200 {
                let last = path.pop().unwrap_or_default();
                path.push([b".wh.", last.as_slice()].concat());
                (entry.kind, body) = (EntryKind::File { size: 0 }, Vec::new());
            }
            entry.path = path.join(&b'/');
            (entry, body)
        },
    )
}

#[test]
fn packing_and_unpacking_are_inverse() {
    let changes = || prop::collection::vec(change(), 0..14);
    let applied = std::cell::Cell::new(0_u32);
    TestRunner::new(Config { cases: 300, failure_persistence: None, ..Config::default() })
        .run(&(changes(), changes()), |(base, layer)| {
            let folders = [(); 3].map(|()| tempfile::tempdir().unwrap());
            let [lower, upper, again] = folders.each_ref().map(tempfile::TempDir::path);
            // Entries below files and the like are refused; such trees are of no interest here.
            if unpack(&archive(&base), lower).is_err() {
                return Ok(());
            }
            let below = stack(&[lower]);
            if super::unpack_over(&archive(&layer), upper, &below).is_err() {
                return Ok(());
            }
            applied.set(applied.get() + 1);

            // A base layer is recovered exactly.
            let bytes = diff(lower, &LayerStack::empty());
            let copy = tempfile::tempdir().unwrap();
            unpack(&bytes, copy.path()).unwrap();
            assert!(
                diff(copy.path(), &LayerStack::empty()) == bytes,
                "the same tree gives the same archive"
            );

            // A layer over it gives the same merged tree, though not the same folder.
            let bytes = diff(upper, &below);
            super::unpack_over(&bytes, again, &below).unwrap();
            let merged = |top: &std::path::Path| {
                let copy = tempfile::tempdir().unwrap();
                super::super::copy_tree(
                    &stack(&[lower, top]),
                    copy.path(),
                    &super::super::CopyOptions::default(),
                )
                .unwrap();
                let mut seen = look(copy.path());
                seen.remove("\"\"");
                seen
            };
            assert_eq!(merged(upper), merged(again));
            Ok(())
        })
        .unwrap();
    assert!(applied.get() > 60, "only {} cases were of interest", applied.get());
}
