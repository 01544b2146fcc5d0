//! Daemons that send files, good ones and bad ones.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use bytes::Bytes;
use slipway_spec::wire::fsutil::packet::PacketType;
use slipway_spec::wire::fsutil::{Packet, Stat};
use slipway_store::Error;
use slipway_transport::packet::{self, FileType};
use tokio::sync::mpsc;
use tonic::Status;

use super::receive::{OPEN_FILES, receive};

const TIME: i64 = 1_500_000_000_123_456_789;

fn stat(path: &str, kind: FileType, mode: u32) -> Stat {
    Stat {
        path: Bytes::copy_from_slice(path.as_bytes()),
        mode: kind.mode(mode),
        uid: 7,
        gid: 7,
        mod_time: TIME,
        ..Stat::default()
    }
}

fn directory(path: &str) -> Packet {
    packet::stat(Some(stat(path, FileType::Directory, 0o755)))
}

fn file(path: &str, size: i64) -> Packet {
    packet::stat(Some(Stat { size, ..stat(path, FileType::Regular, 0o644) }))
}

fn link(path: &str, target: &str, kind: FileType) -> Packet {
    let linkname = Bytes::copy_from_slice(target.as_bytes());
    packet::stat(Some(Stat { linkname, ..stat(path, kind, 0o777) }))
}

fn data(id: u32, text: &'static str) -> Packet {
    packet::data(id, Bytes::from_static(text.as_bytes()))
}

fn end() -> Packet {
    packet::stat(None)
}

/// Lets a daemon say all of this, and returns what was made of it and what it was told.
fn run(folder: &Path, packets: Vec<Packet>) -> (Result<(), Error>, Vec<Packet>) {
    let (to_us, incoming) = mpsc::channel(packets.len() + 1);
    for packet in packets {
        to_us.try_send(Ok(packet)).unwrap();
    }
    drop(to_us);
    let (outgoing, mut told) = mpsc::channel(10_000);
    let received = receive(folder, incoming, &outgoing);
    drop(outgoing);
    let mut packets = vec![];
    while let Some(packet) = told.blocking_recv() {
        packets.push(packet);
    }
    (received, packets)
}

/// Lists everything below a folder, with contents.
fn listing(folder: &Path) -> Vec<String> {
    let mut found = vec![];
    let mut todo = vec![folder.to_path_buf()];
    while let Some(at) = todo.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(folder).unwrap().display().to_string();
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            found.push(if kind.is_dir() {
                todo.push(path);
                format!("{name}/")
            } else if kind.is_symlink() {
                format!("{name}->{}", fs::read_link(&path).unwrap().display())
            } else if kind.is_file() {
                format!("{name}={}", fs::read_to_string(&path).unwrap())
            } else {
                name
            });
        }
    }
    found.sort();
    found
}

#[test]
fn a_folder_comes_whole() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("new/out");
    let private = packet::stat(Some(stat("d", FileType::Directory, 0o500)));
    let program = Stat { size: 4, ..stat("d/b", FileType::Regular, 0o4755) };
    let (received, told) = run(
        &folder,
        vec![
            file("a", 5),
            private,
            packet::stat(Some(program)),
            link("d/c", "a", FileType::Regular),
            link("d/e", "../../../etc/passwd", FileType::Symlink),
            packet::stat(Some(stat("d/f", FileType::Fifo, 0o600))),
            // Pieces of several files come in any order.
            data(2, "bb"),
            data(0, "hel"),
            file("d/g", 0),
            data(2, "bb"),
            data(0, "lo"),
            data(0, ""),
            end(),
            data(6, ""),
            data(2, ""),
            packet::finish(),
        ],
    );
    received.unwrap();
    assert_eq!(
        listing(&folder),
        ["a=hello", "d/", "d/b=bbbb", "d/c=hello", "d/e->../../../etc/passwd", "d/f", "d/g="]
    );
    let asked: Vec<_> = told.iter().map(|packet| (packet.r#type, packet.id)).collect();
    let (ask, finish) = (PacketType::PacketReq as i32, PacketType::PacketFin as i32);
    assert_eq!(asked, [(ask, 0), (ask, 2), (ask, 6), (finish, 0)]);
    let metadata = |name: &str| fs::symlink_metadata(folder.join(name)).unwrap();
    assert_eq!(metadata("a").ino(), metadata("d/c").ino());
    assert_eq!(metadata("d").permissions().mode() & 0o7777, 0o500);
    assert_eq!(metadata("d/b").permissions().mode() & 0o7777, 0o4755);
    for name in ["a", "d", "d/b", "d/e", "d/f"] {
        let found = metadata(name);
        assert_eq!((found.mtime(), found.mtime_nsec()), (1_500_000_000, 123_456_789), "{name}");
        // What comes belongs to whoever builds.
        assert_eq!(found.uid(), rustix::process::geteuid().as_raw());
    }
}

#[test]
fn what_is_there_stays_unless_it_is_overwritten() {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("out");
    let outside = place.path().join("outside");
    fs::create_dir_all(folder.join("dir/below")).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(folder.join("kept"), "kept").unwrap();
    fs::write(folder.join("dir/below/gone"), "gone").unwrap();
    fs::write(outside.join("f"), "untouched").unwrap();
    symlink(&outside, folder.join("trap")).unwrap();
    symlink(outside.join("f"), folder.join("file-trap")).unwrap();
    fs::create_dir(folder.join("merged")).unwrap();
    fs::write(folder.join("merged/old"), "old").unwrap();
    let (received, _) = run(
        &folder,
        vec![
            link("dir", "x", FileType::Symlink),
            file("file-trap", 1),
            directory("merged"),
            file("merged/new", 1),
            directory("trap"),
            file("trap/f", 1),
            end(),
            data(1, "1"),
            data(1, ""),
            data(3, "2"),
            data(3, ""),
            data(5, "3"),
            data(5, ""),
            packet::finish(),
        ],
    );
    received.unwrap();
    assert_eq!(
        listing(&folder),
        [
            "dir->x",
            "file-trap=1",
            "kept=kept",
            "merged/",
            "merged/new=2",
            "merged/old=old",
            "trap/",
            "trap/f=3"
        ]
    );
    assert_eq!(fs::read_to_string(outside.join("f")).unwrap(), "untouched");
}

#[test]
fn nothing_leads_outside_of_the_folder() {
    let long = "x".repeat(256);
    let huge = vec!["d"; 3000].join("/");
    let mut cases: Vec<(Vec<Packet>, &str)> = vec![
        (vec![file("../evil", 0)], "not usable"),
        (vec![file("/evil", 0)], "not usable"),
        (vec![file("..", 0)], "not usable"),
        (vec![file(".", 0)], "not usable"),
        (vec![file("", 0)], "not usable"),
        (vec![directory("a"), file("a/../../evil", 0)], "not usable"),
        (vec![directory("a"), file("a//b", 0)], "not usable"),
        (vec![directory("a/")], "not usable"),
        (vec![file("a\0b", 0)], "not usable"),
        (vec![file(&long, 0)], "not usable"),
        (vec![file(&huge, 0)], "not usable"),
        // Below what is no directory, whatever it leads to.
        (vec![link("a", "..", FileType::Symlink), file("a/evil", 0)], "before its directory"),
        (vec![file("a", 0), file("a/evil", 0)], "before its directory"),
        (vec![file("a/evil", 0)], "before its directory"),
        (vec![directory("a"), directory("b"), file("b/c/d", 0)], "before its directory"),
        (vec![file("b", 0), file("a", 0)], "out of order"),
        (vec![file("a", 0), file("a", 0)], "out of order"),
        (vec![directory("a"), link("a", "..", FileType::Symlink)], "out of order"),
        (vec![directory("a"), file("a.b", 0), file("a/b", 0)], "out of order"),
        // Further names of files that were not sent.
        (vec![link("a", "../outside/f", FileType::Regular)], "which was not sent"),
        (vec![link("a", "kept", FileType::Regular)], "which was not sent"),
        (vec![directory("a"), link("b", "a", FileType::Regular)], "which was not sent"),
        (vec![link("a", "x\0y", FileType::Symlink)], "not usable"),
    ];
    let odd = Stat { mode: 1 << 24, ..stat("a", FileType::Regular, 0o644) };
    cases.push((vec![packet::stat(Some(odd))], "of no known kind"));
    for (packets, why) in cases {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("out");
        fs::create_dir_all(place.path().join("outside")).unwrap();
        fs::write(place.path().join("outside/f"), "f").unwrap();
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("kept"), "kept").unwrap();
        let shown = format!("{packets:?}");
        let error = run(&folder, packets).0.unwrap_err().to_string();
        assert!(error.contains(why), "{shown:.300}: {error}");
        let names: Vec<_> = fs::read_dir(place.path()).unwrap().collect();
        assert_eq!(names.len(), 2, "{shown:.300}");
        assert_eq!(fs::read_to_string(folder.join("kept")).unwrap(), "kept");
    }
}

#[test]
fn contents_are_what_was_announced_and_asked_for() {
    for (packets, why) in [
        (vec![file("a", 3), data(0, "four")], "more than the 3 bytes"),
        (vec![file("a", 3), data(0, "ab"), data(0, "")], "came with 2 bytes"),
        (vec![file("a", -1), data(0, "a")], "more than the -1 bytes"),
        (vec![file("a", 1), data(1, "a")], "not asked for"),
        (vec![directory("a"), data(0, "a")], "not asked for"),
        (vec![file("a", 1), data(0, "a"), data(0, ""), data(0, "a")], "not asked for"),
        (vec![end(), end()], "out of turn"),
        (vec![file("a", 1), end(), end()], "ended its list twice"),
        (vec![file("a", 1), end(), file("b", 1)], "ended its list twice"),
        (vec![packet::finish()], "out of turn"),
        (vec![packet::request(0)], "out of turn"),
        (vec![file("a", 1), end(), packet::finish()], "out of turn"),
        (vec![Packet { r#type: 9, ..Packet::default() }], "unknown type 9"),
        (vec![packet::failure("disk on fire")], "error from sender: disk on fire"),
        (vec![file("a", 9), data(0, "half")], "ended the transfer early"),
        (vec![file("a", 1)], "ended the transfer early"),
        (vec![end()], "ended the transfer early"),
    ] {
        let place = tempfile::tempdir().unwrap();
        let shown = format!("{packets:?}");
        let error = run(place.path(), packets).0.unwrap_err().to_string();
        assert!(error.contains(why), "{shown}: {error}");
        // Nothing half written has a name, nor is it left without one.
        let left = listing(place.path());
        assert!(left.iter().all(|name| !name.contains("part") && name != "a=half"), "{left:?}");
    }
}

#[test]
fn a_few_files_are_asked_for_at_a_time() {
    let place = tempfile::tempdir().unwrap();
    let count = u32::try_from(OPEN_FILES * 3).unwrap();
    let names: Vec<String> = (0..count).map(|number| format!("{number:04}")).collect();
    let mut packets: Vec<_> = names.iter().map(|name| file(name, 1)).collect();
    packets.push(end());
    for id in 0..count {
        packets.extend([data(id, "x"), data(id, "")]);
    }
    packets.push(packet::finish());
    let (received, told) = run(place.path(), packets);
    received.unwrap();
    assert_eq!(told.len(), names.len() + 1);
    assert_eq!(listing(place.path()).len(), names.len());
    // A daemon that sends what was not asked for yet is told so.
    let mut eager: Vec<_> = names.iter().map(|name| file(name, 1)).collect();
    eager.push(data(count - 1, "x"));
    let error = run(place.path(), eager).0.unwrap_err().to_string();
    assert!(error.contains("not asked for"), "{error}");
}

#[test]
fn a_call_that_breaks_is_an_error() {
    let place = tempfile::tempdir().unwrap();
    let (to_us, incoming) = mpsc::channel(2);
    to_us.try_send(Err(Status::cancelled("the builder was killed"))).unwrap();
    drop(to_us);
    let (outgoing, _told) = mpsc::channel(9);
    let error = receive(place.path(), incoming, &outgoing).unwrap_err().to_string();
    assert!(error.contains("the builder was killed"), "{error}");
}
