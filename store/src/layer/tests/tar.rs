use std::collections::BTreeMap;
use std::io::{self, Write};
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

use super::super::{Entry, EntryKind, TarWriter};

/// Digests printed by `golden.go`, which writes the same entries with Go's `archive/tar` (Go 1.27).
const GOLDEN: &[(&str, &str)] = &[
    ("kinds", "e792f2be035df75b8121bcd3b499256bb8ed34f3090d1e5e6de92d90d792aec3"),
    ("files 1048576", "231dc8356935b46066e2441b7f9a2111cf42c63c706116d315c59bf75149758e"),
    ("dirs 1048576", "00346e30e4a3679f276b561d9e138dd80ce17672b7f967f70201829790ae4acc"),
    ("links 1048576", "cd096d10b2858fb6e80e161c073664aacb423b3b7afa045d21b3b6a5359343f2"),
    ("hard 1048576", "5edeba3ad9fca9aeb26e425e0b05e3335398dcb4db5ff04fb4b1e69ad5393cee"),
    ("capable 1048576", "71c74bb3c44882cef1dd8b81426f064a74a00811d4196d20bb43dfe0d830f7f1"),
    ("files 7", "93781b7c8f85e3209441b988181abc641a4edafafc24c41929a1dad309de6f0d"),
    ("dirs 7", "ca10cc12530adfa10bf1e63e14c04cc7dedda476b821997c02736b0fe9f708cc"),
    ("links 7", "10a6a07c24dc28896d69cfae44038c84b940a1cb9384c353d60e17491d29c4a6"),
    ("hard 7", "967a8e4c9ac1fd218a4824cd272c5193b49ff79ee56ed796a7d6a0e8428e5570"),
    ("capable 7", "4eb12cde973d1b40e80899c5ffb050b0f6d93e1479e3f02d020269bcf4ef6655"),
    ("files 50", "b2eb2b66b779195d36b43ac8df63d59f9f598ed6140969cf258afbe648c7263b"),
    ("dirs 50", "ad9e938334fa109931460e12687d58cff82113d100e56140b7d593ff81daa4e1"),
    ("links 50", "8d65f7eb4f7a188763563c9ce8fe5150bc9868a633a6aaf366a566fa4c9aa184"),
    ("hard 50", "2dc945eb507c0ae8e07474428178dd8c147419668edf57c07bbb8e24a9bce0b2"),
    ("capable 50", "d477629158d833182ce62ed3af50e6ce3315b55f3eac748f429151ae65519ed5"),
    ("files 101", "921529455754016976b55fe6c1b0dc0bf48802124214859ad6f7a34294095ac6"),
    ("dirs 101", "ecda70099cbf6c90b9a899dcb1bcc84a97cfb4424944528aaf8b9e577b3572ef"),
    ("links 101", "457b9b878a1e4d0fcba5dfb91b8bc14109922b553c12eb35a2f1dfc6494316a9"),
    ("hard 101", "40eb5094e85ea40de605b8f32bd57b86d0f089cfadf1f89c52e40e9d20853f5c"),
    ("capable 101", "42366c8f56ea1869fbc083581cfcca727ba40fe93cf4bbeaa494fbe083a5acaf"),
    ("odd names", "7236fa35a30a6b210618ca0c0d932bfa5f02c00a222bc716624763e523b3ff42"),
    ("numbers", "a2d132cd00ca35f618bde8eed879b0995aa9895ae94ead37f6596713c5d57550"),
    ("size limit", "94755b1ad2ed5c6829bf66120b9ef6d6d6483cce459eae6e8ebf9994c9d39d81"),
    ("over size limit", "7e951718aac628a5ccc10cc04abe86b7c0fd2f8e5b98ec289fb9caeca1d46068"),
    ("xattrs", "a82d89d2dc7a8d57bb6e998e739f70393aa905558cce4470ece0cc9481d7aa6f"),
    ("whiteouts", "1b03defb109a06885f4d0768a907f4c234dbc0f62fdcca268ff50da94225f8fb"),
];

const DAY: i64 = 1_700_000_000;
const CAPABILITY: &[u8] =
    b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";

type Item = (Entry, Vec<u8>);

fn item(path: impl Into<Vec<u8>>, kind: EntryKind, mode: u32, mtime_seconds: i64) -> Item {
    let mut entry = Entry::new(path, kind, mode);
    entry.mtime_seconds = mtime_seconds;
    (entry, Vec::new())
}

fn file(path: impl Into<Vec<u8>>, mode: u32, mtime_seconds: i64, body: &str) -> Item {
    let mut item = item(path, EntryKind::File { size: body.len() as u64 }, mode, mtime_seconds);
    item.1 = body.into();
    item
}

fn owned(mut item: Item, uid: u32, gid: u32) -> Item {
    (item.0.uid, item.0.gid) = (uid, gid);
    item
}

/// A name of `length` bytes with a slash after every `step` bytes.
fn name(length: usize, step: usize) -> Vec<u8> {
    (1..=length).map(|at| if at % step == 0 && at != length { b'/' } else { b'a' }).collect()
}

fn families() -> Vec<(String, Vec<Item>)> {
    let link = |target: &[u8]| EntryKind::Symlink { target: target.to_vec() };
    let hard = |target: &[u8]| EntryKind::HardLink { target: target.to_vec() };
    let mut families = vec![(
        "kinds".to_owned(),
        vec![
            item("dir", EntryKind::Directory, 0o755, DAY),
            owned(file("dir/file", 0o644, DAY, "hello\n"), 1000, 100),
            file("dir/empty", 0o4755, 0, ""),
            file("dir/block", 0o600, 1, &"x".repeat(512)),
            owned(item("dir/hard", hard(b"dir/file"), 0o644, DAY), 1000, 100),
            item("dir/link", link(b"../file"), 0o777, DAY),
            item("dir/null", EntryKind::CharDevice { major: 1, minor: 3 }, 0o666, DAY),
            owned(
                item(
                    "dir/disk",
                    EntryKind::BlockDevice { major: 259, minor: 1_048_575 },
                    0o660,
                    DAY,
                ),
                0,
                6,
            ),
            item("dir/pipe", EntryKind::Fifo, 0o1777, DAY),
        ],
    )];
    for step in [1 << 20, 7, 50, 101] {
        let names = || (1..=1100).map(|length| name(length, step));
        families
            .push((format!("files {step}"), names().map(|n| file(n, 0o644, DAY, ".")).collect()));
        families.push((
            format!("dirs {step}"),
            names().map(|n| item(n, EntryKind::Directory, 0o755, DAY)).collect(),
        ));
        families.push((
            format!("links {step}"),
            names().map(|n| item("l", link(&n), 0o777, DAY)).collect(),
        ));
        families.push((
            format!("hard {step}"),
            names().map(|n| item(n.clone(), hard(&n), 0o644, DAY)).collect(),
        ));
        let capable = |n: Vec<u8>| {
            let mut item = file(n, 0o755, DAY, ".");
            item.0.xattrs.insert(b"security.capability".to_vec(), CAPABILITY.to_vec());
            item
        };
        families.push((format!("capable {step}"), names().map(capable).collect()));
    }
    let mut odd = Vec::new();
    let long = [b"x/".repeat(49), "é".into(), b"y".repeat(30)].concat();
    for name in [
        "é".into(),
        "dir/é/x".into(),
        b"\xff\xfe".to_vec(),
        "é".repeat(60).into(),
        b"a b\nc=d".to_vec(),
        long,
    ] {
        odd.push(file(name.clone(), 0o644, DAY, "."));
        odd.push(item(name.clone(), EntryKind::Directory, 0o755, DAY));
        odd.push(item("s", link(&name), 0o777, DAY));
    }
    families.push(("odd names".to_owned(), odd));
    let mut numbers = Vec::new();
    for id in [0, 65534, 2_097_151, 2_097_152, 4_294_967_294] {
        for mtime in [0, DAY, 8_589_934_591, 8_589_934_592, -1, -62_135_596_800 + 1] {
            numbers.push(owned(file("n", 0o7777, mtime, ""), id, id));
        }
    }
    families.push(("numbers".to_owned(), numbers));
    let mut xattrs = owned(file("f", 0o644, DAY, ""), 2_097_152, 0);
    xattrs.0.xattrs = BTreeMap::from([
        (b"user.a".to_vec(), Vec::new()),
        (b"user.b".to_vec(), b"x\n=\x00y".to_vec()),
        ("user.ä".into(), b"z".to_vec()),
        (b"trusted.t".to_vec(), b"v".repeat(960)),
    ]);
    families.push(("xattrs".to_owned(), vec![xattrs]));
    families
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn bytes_equal_those_of_go() {
    let golden: BTreeMap<&str, &str> = GOLDEN.iter().copied().collect();
    let mut checked = 0;
    for (name, items) in families() {
        let found = digest(&super::archive(&items));
        assert_eq!(golden.get(name.as_str()), Some(&found.as_str()), "family {name}");
        checked += 1;
    }
    let mut tar = TarWriter::new(Vec::new());
    tar.whiteout(b"a/b").unwrap();
    tar.whiteout(b"top").unwrap();
    tar.opaque(b"a").unwrap();
    assert_eq!(golden["whiteouts"], digest(&tar.finish().unwrap()));

    // Headers of huge files, cut off before their content.
    for (name, size) in [("size limit", 8_589_934_591), ("over size limit", 8_589_934_592)] {
        let mut tar = TarWriter::new(Vec::new());
        let (entry, _) = item("big", EntryKind::File { size }, 0o644, DAY);
        let error = tar.append(&entry, &mut io::empty()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(golden[name], digest(tar.get_ref()), "{name}");
    }
    assert_eq!(checked + 3, GOLDEN.len(), "every golden digest is checked");
}

#[test]
fn content_of_another_length_than_announced_is_an_error() {
    for (size, kind) in [(4, io::ErrorKind::UnexpectedEof), (2, io::ErrorKind::InvalidData)] {
        let mut tar = TarWriter::new(Vec::new());
        let (entry, _) = item("f", EntryKind::File { size }, 0o644, DAY);
        assert_eq!(tar.append(&entry, &mut b"abc".as_slice()).unwrap_err().kind(), kind);
    }
}

#[test]
fn what_tar_cannot_say_is_refused() {
    let mut bad_xattr = file("f", 0o644, DAY, "");
    bad_xattr.0.xattrs.insert(b"user.a=b".to_vec(), Vec::new());
    for (entry, _) in [
        item("", EntryKind::Directory, 0o755, DAY),
        item(b"a\0b".to_vec(), EntryKind::Directory, 0o755, DAY),
        item("d", EntryKind::CharDevice { major: 1 << 21, minor: 0 }, 0o600, DAY),
        bad_xattr,
        item("l", EntryKind::Symlink { target: vec![b'x'; 2 << 20] }, 0o777, DAY),
    ] {
        let mut tar = TarWriter::new(Vec::new());
        assert_eq!(
            tar.append(&entry, &mut io::empty()).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        assert!(tar.get_ref().is_empty(), "nothing was written");
    }
}

/// Runs another reader on an archive and returns what it prints.
fn read_with(program: &str, arguments: &[&str], bytes: &[u8]) -> String {
    let mut child = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .env("TZ", "UTC")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!("this test needs {program} as an independent reader: {error}")
        });
    let mut input = child.stdin.take().unwrap();
    let bytes = bytes.to_vec();
    let feed = std::thread::spawn(move || input.write_all(&bytes));
    let output = child.wait_with_output().unwrap();
    feed.join().unwrap().unwrap();
    assert!(output.status.success(), "{program} refuses the archive");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn other_programs_read_the_same_entries() {
    let all: Vec<Item> = families().into_iter().flat_map(|(_, items)| items).collect();
    let bytes = super::archive(&all);

    let listing =
        read_with("tar", &["-tvf", "-", "--numeric-owner", "--quoting-style=escape"], &bytes);
    let names: Vec<&str> = listing.lines().collect();
    assert_eq!(names.len(), all.len());
    assert_eq!(names[1], "-rw-r--r-- 1000/100          6 2023-11-14 22:13 dir/file");
    assert_eq!(
        names[4],
        "hrw-r--r-- 1000/100          0 2023-11-14 22:13 dir/hard link to dir/file"
    );
    assert_eq!(names[6], "crw-rw-rw- 0/0             1,3 2023-11-14 22:13 dir/null");
    for (line, (entry, _)) in names.iter().zip(&all) {
        if entry.path.is_ascii()
            && !entry.path.contains(&b'\n')
            && !matches!(entry.kind, EntryKind::HardLink { .. })
        {
            let name = String::from_utf8(entry.path.clone()).unwrap();
            assert!(line.contains(&name), "{line} names {name}");
        }
    }

    let script = "import sys,tarfile\nfor m in tarfile.open(fileobj=sys.stdin.buffer,mode='r|'): print(ascii(m.name),m.size,oct(m.mode),m.uid,int(m.mtime))";
    let listing = read_with("python3", &["-c", script], &bytes);
    assert_eq!(listing.lines().count(), all.len());
    for (line, (entry, body)) in listing.lines().zip(&all) {
        let rest =
            format!(" {} 0o{:o} {} {}", body.len(), entry.mode, entry.uid, entry.mtime_seconds);
        assert!(line.ends_with(&rest), "{line} ends in {rest}");
    }
}

#[test]
fn our_reader_reads_what_our_writer_writes() {
    for (name, items) in families() {
        let read = super::list(&super::archive(&items));
        assert!(read == items, "family {name}");
    }
}
