//! What the history does with damage, age and large numbers.

use std::fs;

use slipway_spec::wire::control::{Exporter, SolveRequest};
use slipway_spec::{self as spec, MediaType};

use super::*;
use crate::record::Record;
use crate::trace::TraceContext;

struct Case {
    folder: tempfile::TempDir,
    limits: HistoryConfig,
}

impl Case {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), limits: HistoryConfig::default() }
    }

    fn place(&self) -> std::path::PathBuf {
        self.folder.path().join("history")
    }

    fn open(&self) -> History {
        let store = Store::open(&self.folder.path().join("store")).unwrap();
        History::open(&self.place(), self.limits, store, Traces::default()).unwrap()
    }

    fn database(&self) -> rusqlite::Connection {
        rusqlite::Connection::open(self.place().join("records.db")).unwrap()
    }

    fn files(&self) -> usize {
        fs::read_dir(self.place().join("blobs")).unwrap().count()
    }
}

fn run(history: &History, id: &str) {
    let request = SolveRequest { r#ref: id.into(), ..SolveRequest::default() };
    let trace = TraceContext { trace: [1; 16], parent: [0; 8] };
    let exporter = Exporter { r#type: "image".into(), ..Exporter::default() };
    let recording = history.begin(&request, &[exporter], Arc::new(Record::default()), trace);
    recording.finish(&Ok::<_, Status>(()));
}

async fn ids(history: &History) -> Vec<String> {
    let found = history.ask(|shared, _| shared.book.page(None, false, 1000)).await.unwrap();
    found.records.into_iter().map(|record| record.r#ref).collect()
}

#[tokio::test]
async fn damaged_records_are_passed_over_and_the_rest_is_found() {
    let case = Case::new();
    let history = case.open();
    for id in ["a", "b", "c", "d"] {
        run(&history, id);
    }
    history.stop().await;
    let database = case.database();
    database.execute("UPDATE record SET data = x'ffff' WHERE ref = 'a'", []).unwrap();
    database.execute("UPDATE record SET data = '7' WHERE ref = 'b'", []).unwrap();
    let other =
        "UPDATE record SET data = (SELECT data FROM record WHERE ref = 'd') WHERE ref = 'c'";
    database.execute(other, []).unwrap();
    let history = case.open();
    assert_eq!(ids(&history).await, ["d"]);
    assert!(history.replay("a").await.unwrap().is_none());
    assert!(history.replay("b").await.unwrap().is_none());
    assert!(history.replay("d").await.unwrap().is_some());
    // What is damaged can be deleted, and written anew.
    history.delete("a".into()).await.unwrap();
    run(&history, "c");
    assert_eq!(ids(&history).await, ["d", "c"]);
}

#[tokio::test]
async fn what_is_said_of_a_result_is_kept_and_its_layers_are_not() {
    let case = Case::new();
    let history = case.open();
    let store = Store::open(&case.folder.path().join("store")).unwrap();
    let put = |kind: &str, text: &str| store.put(kind.into(), text.as_bytes()).unwrap();
    let manifest = |config: &spec::Descriptor, layer: &spec::Descriptor| {
        let document = serde_json::json!({
            "schemaVersion": 2, "mediaType": MediaType::OCI_MANIFEST.as_str(),
            "config": config, "layers": [layer],
        });
        put(MediaType::OCI_MANIFEST.as_str(), &document.to_string())
    };
    let layer = put(MediaType::OCI_LAYER.as_str(), "a layer");
    let config = put(MediaType::OCI_CONFIG.as_str(), "{}");
    // Longer than other documents may be.
    let statement = format!("{{\"_type\":\"{}\"}}", "x".repeat(5 << 20));
    let statement = put("application/vnd.in-toto+json", &statement);
    let empty = put(MediaType::OCI_EMPTY.as_str(), "{ }");
    let image = manifest(&config, &layer);
    let said = manifest(&empty, &statement);
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": MediaType::OCI_INDEX.as_str(), "manifests": [image, said],
    });
    let index = put(MediaType::OCI_INDEX.as_str(), &index.to_string());

    let request = SolveRequest { r#ref: "a".into(), ..SolveRequest::default() };
    let trace = TraceContext { trace: [1; 16], parent: [0; 8] };
    let exporter = Exporter { r#type: "image".into(), ..Exporter::default() };
    let recording = history.begin(&request, &[exporter], Arc::new(Record::default()), trace);
    recording.exported(0, &index);
    recording.finish(&Ok::<_, Status>(()));
    history.stop().await;
    let history = case.open();
    for (document, kept) in [
        (&index, true),
        (&image, true),
        (&config, true),
        (&said, true),
        (&empty, true),
        (&statement, true),
        (&layer, false),
    ] {
        let digest = document.digest.clone();
        let found = history.ask(move |shared, _| shared.book.blob(&digest)).await.unwrap();
        assert_eq!(found.is_some(), kept, "{}", document.media_type);
    }
}

/// Whether this process has a thread of a name.
fn has_thread(name: &str) -> bool {
    let named = |folder: fs::DirEntry| {
        fs::read_to_string(folder.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
    };
    fs::read_dir("/proc/self/task").unwrap().flatten().any(named)
}

#[tokio::test]
async fn a_damaged_database_is_set_aside() {
    let case = Case::new();
    for round in 0..2 {
        let history = case.open();
        assert_eq!(ids(&history).await, [""; 0]);
        run(&history, "a");
        assert_eq!(ids(&history).await, ["a"]);
        drop(history);
        // The thread closes the database when nobody can ask any more, and ends.
        while has_thread("history") {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let database = case.place().join("records.db");
        let garbage = fs::read(&database).unwrap().len().max(8192);
        for suffix in ["-wal", "-shm"] {
            fs::remove_file(case.place().join(format!("records.db{suffix}"))).ok();
        }
        fs::write(&database, vec![7; garbage]).unwrap();
        drop(case.open());
        assert!(case.place().join(format!("records.db.damaged-{round}")).exists());
    }
}

#[test]
fn the_history_of_a_later_version_is_left_alone() {
    let case = Case::new();
    drop(case.open());
    case.database().pragma_update(None, "user_version", 99).unwrap();
    let store = Store::open(&case.folder.path().join("store")).unwrap();
    let opened = History::open(&case.place(), case.limits, store, Traces::default());
    assert!(opened.unwrap_err().to_string().contains("newer slipway"));
}

#[tokio::test]
async fn records_go_when_they_are_both_too_many_and_too_old() {
    let mut case = Case::new();
    case.limits = HistoryConfig { max_age: Duration::from_secs(3600), max_entries: 2 };
    let history = case.open();
    for id in ["a", "b", "c", "d", "e"] {
        run(&history, id);
    }
    let expire = |history: &History| {
        let history = history.clone();
        async move {
            history.ask(|shared, _| shared.expire()).await.unwrap();
            ids(&history).await
        }
    };
    assert_eq!(expire(&history).await, ["a", "b", "c", "d", "e"], "none is old");
    history.pin("a".into(), true).await.unwrap();
    case.database()
        .execute("UPDATE record SET completed = completed - 7200000000000 WHERE ref <> 'c'", [])
        .unwrap();
    // The pinned one counts for nothing, and two of the others may stay.
    assert_eq!(expire(&history).await, ["a", "c", "e"]);
}

#[tokio::test]
async fn blobs_go_with_the_last_record_that_holds_them() {
    let case = Case::new();
    let history = case.open();
    run(&history, "a");
    run(&history, "b");
    // The same log, which is empty, and one trace each.
    history.finalize("a".into()).await.unwrap();
    history.finalize("b".into()).await.unwrap();
    assert_eq!(case.files(), 3);
    history.delete("a".into()).await.unwrap();
    assert_eq!(case.files(), 2);
    // A build of the same name takes the place of the one before.
    run(&history, "b");
    history.finalize("b".into()).await.unwrap();
    assert_eq!(case.files(), 2);
    history.delete("b".into()).await.unwrap();
    assert_eq!(case.files(), 0);
}

#[tokio::test]
async fn what_a_crash_left_is_cleared() {
    let case = Case::new();
    let history = case.open();
    run(&history, "a");
    history.finalize("a".into()).await.unwrap();
    let whole = case.files();
    let blobs = case.place().join("blobs");
    for name in ["new-x", "sha256-00", "strange"] {
        fs::write(blobs.join(name), "x").unwrap();
    }
    history.ask(|shared, _| shared.book.put_blob(b"held by nobody").map(drop)).await.unwrap();
    assert_eq!(case.files(), whole + 4);
    history.ask(|shared, _| shared.book.clear_litter()).await.unwrap();
    assert_eq!(case.files(), whole);
}

#[tokio::test]
async fn a_blob_that_was_cut_short_is_not_there() {
    let case = Case::new();
    let history = case.open();
    let (digest, _) = history.ask(|shared, _| shared.book.put_blob(b"whole")).await.unwrap();
    assert!(history.blob(digest.clone()).await.unwrap().is_some());
    let file = case.place().join(format!("blobs/sha256-{}", digest.hex()));
    fs::write(file, "who").unwrap();
    assert!(history.blob(digest).await.unwrap().is_none());
}

#[tokio::test]
async fn thousands_of_records_are_listed_a_part_at_a_time() {
    let case = Case::new();
    let history = case.open();
    for number in 0..200 {
        run(&history, &format!("{number:03}"));
    }
    let (mut next, mut seen) = (None, vec![]);
    loop {
        let page = history.ask(move |shared, _| shared.book.page(next.as_ref(), true, 32)).await;
        let page = page.unwrap();
        seen.extend(page.records.into_iter().map(|record| record.r#ref));
        next = page.next;
        if next.is_none() {
            break;
        }
    }
    let expected: Vec<String> = (0..200).rev().map(|number| format!("{number:03}")).collect();
    assert_eq!(seen, expected);
}
