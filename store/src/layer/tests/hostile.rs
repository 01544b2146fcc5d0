//! Archives that try to leave the folder, or to be read differently by different readers.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::super::{Entry, EntryKind, LayerErrorKind};
use super::{archive, directory, entry, file, hard_link, look, symlink, unpack};

/// Unpacks beside a canary folder that must not change.
fn attack(name: &str, bytes: &[u8]) -> (Result<(), LayerErrorKind>, usize) {
    let outside = tempfile::tempdir().unwrap();
    let canary = outside.path().join("canary");
    fs::create_dir(&canary).unwrap();
    fs::write(canary.join("file"), "canary").unwrap();
    fs::set_permissions(canary.join("file"), fs::Permissions::from_mode(0o600)).unwrap();
    let folder = outside.path().join("layer");
    fs::create_dir(&folder).unwrap();
    let before = look(&canary);
    let result = unpack(bytes, &folder).map(drop).map_err(|error| error.kind());
    assert!(look(&canary) == before, "{name} changed something outside");
    let mut names: Vec<_> =
        fs::read_dir(outside.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["canary", "layer"], "{name} made something outside");
    (result, count(&folder))
}

fn count(folder: &Path) -> usize {
    look(folder).len() - 1
}

fn absolute(path: &str) -> (Entry, Vec<u8>) {
    file(path, "evil")
}

#[test]
fn nothing_is_written_outside_the_folder() {
    let invalid = Err(LayerErrorKind::InvalidArchive);
    for (name, entries, expected) in [
        ("dot dot", vec![file("../canary/file", "evil")], invalid),
        ("dot dot inside", vec![file("a/../../canary/file", "evil")], invalid),
        ("harmless dot dot", vec![file("a/../b", "fine")], Ok(())),
        ("absolute", vec![absolute("/canary/file")], Ok(())),
        ("symlink then write", vec![symlink("l", "../canary"), file("l/file", "evil")], Ok(())),
        (
            "absolute symlink then write",
            vec![symlink("l", "/../../canary"), file("l/file", "evil")],
            Ok(()),
        ),
        (
            "symlink chain",
            vec![symlink("a", "b"), symlink("b", "../../canary"), file("a/file", "evil")],
            Ok(()),
        ),
        (
            "symlink as last component",
            vec![symlink("f", "../canary/file"), file("f", "evil")],
            Ok(()),
        ),
        (
            "symlink replaced by directory",
            vec![symlink("d", "../canary"), directory("d"), file("d/file", "evil")],
            Ok(()),
        ),
        ("symlink loop", vec![symlink("a", "b"), symlink("b", "a"), file("a/x", "evil")], invalid),
        ("proc", vec![symlink("p", "/proc/self/root/tmp"), file("p/x", "evil")], Ok(())),
        ("hard link out", vec![hard_link("h", "../canary/file")], invalid),
        ("hard link absolute", vec![hard_link("h", "/canary/file")], invalid),
        (
            "hard link through symlink",
            vec![symlink("l", "../canary"), hard_link("h", "l/file")],
            invalid,
        ),
        (
            "hard link to symlink",
            vec![symlink("l", "../canary/file"), hard_link("h", "l"), file("h", "evil")],
            Ok(()),
        ),
        ("hard link to itself", vec![file("f", ""), hard_link("f", "f")], Ok(())),
        ("hard link to directory", vec![directory("d"), hard_link("h", "d")], invalid),
        ("hard link to root", vec![hard_link("h", "/")], invalid),
        ("hard link to whiteout", vec![file(".wh.w", ""), hard_link("h", "w")], invalid),
        ("hard link to whiteout name", vec![file("f", ""), hard_link("h", ".wh.f")], invalid),
        (
            "directory through symlink",
            vec![symlink("l", "../canary"), entry("l/.", EntryKind::Directory, 0o777)],
            Ok(()),
        ),
        ("whiteout of nothing", vec![file(".wh.", "")], invalid),
        ("whiteout of the folder", vec![file(".wh..", "")], invalid),
        ("whiteout of the parent", vec![file("a/.wh...", "")], invalid),
        (
            "whiteout through symlink",
            vec![symlink("l", "../canary"), file("l/.wh.file", "")],
            Ok(()),
        ),
        (
            "opaque through symlink",
            vec![symlink("l", "../canary"), file("l/.wh..wh..opq", "")],
            Ok(()),
        ),
        ("inside a whiteout", vec![file(".wh.a/b", "evil")], invalid),
        ("root as symlink", vec![symlink(".", "../canary"), file("file", "evil")], invalid),
        ("root as file", vec![file("./", "evil")], invalid),
        ("file as directory", vec![file("f", ""), file("f/x", "")], invalid),
        ("empty symlink", vec![symlink("l", "")], invalid),
        ("fifo as parent", vec![entry("p", EntryKind::Fifo, 0o644), file("p/x", "")], invalid),
    ] {
        let (found, _) = attack(name, &archive(&entries));
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn links_lead_to_the_same_place_inside() {
    let folder = tempfile::tempdir().unwrap();
    unpack(
        &archive(&[
            symlink("l", "/../../etc"),
            file("l/passwd", "image"),
            symlink("m", "../l/sub"),
            file("m/x", "y"),
        ]),
        folder.path(),
    )
    .unwrap();
    assert_eq!(fs::read(folder.path().join("etc/passwd")).unwrap(), b"image");
    assert_eq!(fs::read(folder.path().join("etc/sub/x")).unwrap(), b"y");
}

/// A header block made by hand.
fn header(name: &[u8], flag: u8, size: &[u8]) -> [u8; 512] {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name);
    block[100..107].copy_from_slice(b"0000644");
    block[108..115].copy_from_slice(b"0000000");
    block[116..123].copy_from_slice(b"0000000");
    block[124..124 + size.len()].copy_from_slice(size);
    block[136..147].copy_from_slice(b"00000000000");
    block[156] = flag;
    block[257..265].copy_from_slice(b"ustar\x0000");
    seal(block)
}

fn seal(mut block: [u8; 512]) -> [u8; 512] {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block
}

fn content(bytes: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    out.resize(bytes.len().div_ceil(512) * 512, 0);
    out
}

fn pax(records: &[u8]) -> Vec<u8> {
    [header(b"pax", b'x', format!("{:011o}", records.len()).as_bytes()).to_vec(), content(records)]
        .concat()
}

const END: [u8; 1024] = [0; 1024];

#[test]
fn the_pax_size_counts_for_reading_and_skipping() {
    // The ustar size is 0: a reader that skips by it would take the content for a header.
    let inner = [header(b"smuggled", b'0', b"00000000000"), [0; 512]].concat();
    let bytes = [
        pax(b"13 size=1024\n"),
        header(b"outer", b'0', b"00000000000").to_vec(),
        inner.clone(),
        END.to_vec(),
    ]
    .concat();
    assert_eq!(super::paths(&bytes), ["outer"]);
    assert_eq!(super::list(&bytes)[0].1, inner);
    let (result, files) = attack("size desync", &bytes);
    assert_eq!((result, files), (Ok(()), 1));

    // Types without content have none, whatever their size says.
    let bytes = [
        header(b"d", b'5', b"00000001000").to_vec(),
        header(b"next", b'0', b"00000000000").to_vec(),
        END.to_vec(),
    ];
    assert_eq!(super::paths(&bytes.concat()).len(), 2);
}

#[test]
fn malformed_archives_are_errors() {
    let plain = header(b"f", b'0', b"00000000001").to_vec();
    let good = [plain.clone(), content(b"x"), END.to_vec()].concat();
    assert!(attack("good", &good).0.is_ok());
    let mut checksum = good.clone();
    checksum[0] = b'g';
    let with_pax = |records: &[u8]| [pax(records), good.clone()].concat();
    let mut device = header(b"dev", b'3', b"00000000000");
    device[329..337].copy_from_slice(b"77777777");
    let mut negative = header(b"n", b'0', b"");
    negative[124..136].fill(0xff);
    let mut uid = header(b"u", b'0', b"00000000000");
    uid[108..116].copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    for (name, bytes) in [
        ("checksum", checksum),
        ("cut in header", good[..300].to_vec()),
        ("cut in content", good[..600].to_vec()),
        ("cut in padding", [header(b"f", b'0', b"00000001000").to_vec(), vec![1; 100]].concat()),
        ("cut after extended header", pax(b"12 path=abc\n")),
        ("single zero block", [vec![0; 512], good.clone()].concat()),
        ("bad octal", [header(b"f", b'0', b"00000000009").to_vec(), END.to_vec()].concat()),
        ("negative size", [seal(negative).to_vec(), END.to_vec()].concat()),
        ("uid -1", [seal(uid).to_vec(), END.to_vec()].concat()),
        ("device number", [seal(device).to_vec(), END.to_vec()].concat()),
        ("unknown type", [header(b"f", b'Z', b"00000000000").to_vec(), END.to_vec()].concat()),
        (
            "huge extended header",
            [header(b"p", b'x', b"77777777777").to_vec(), END.to_vec()].concat(),
        ),
        ("pax length too large", with_pax(b"99 path=abc\n")),
        ("pax length too small", with_pax(b"3 path=abc\n")),
        ("pax length not a number", with_pax(b"+2 path=abc\n")),
        ("pax without equals", with_pax(b"9 pathab\n")),
        ("pax without newline", with_pax(b"12 path=abcd")),
        ("pax zero byte in path", with_pax(b"13 path=a\0cd\n")),
        ("pax size", with_pax(b"10 size=-1\n")),
        ("pax uid", with_pax(b"14 uid=123456x\n")),
        ("pax mtime", with_pax(b"12 mtime=1e\n")),
        (
            "zero byte in long name",
            [
                header(b"L", b'L', b"00000000000").to_vec(),
                header(b"", b'0', b"00000000000").to_vec(),
                END.to_vec(),
            ]
            .concat(),
        ),
        (
            "sparse beyond size",
            [
                pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.realsize=5\n"),
                header(b"s", b'0', b"00000002000").to_vec(),
                content(b"1\n4\n512\n"),
                vec![1; 512],
                END.to_vec(),
            ]
            .concat(),
        ),
        (
            "sparse overlap",
            [
                pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n28 GNU.sparse.realsize=2000\n"),
                header(b"s", b'0', b"00000002000").to_vec(),
                content(b"2\n0\n256\n100\n256\n"),
                vec![1; 512],
                END.to_vec(),
            ]
            .concat(),
        ),
        (
            "sparse map without end",
            [
                pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n28 GNU.sparse.realsize=2000\n"),
                header(b"s", b'0', b"00000001000").to_vec(),
                vec![b'1'; 512],
                END.to_vec(),
            ]
            .concat(),
        ),
        (
            "sparse count",
            [
                pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n28 GNU.sparse.realsize=2000\n"),
                header(b"s", b'0', b"00000001000").to_vec(),
                content(b"99999999999999\n"),
                END.to_vec(),
            ]
            .concat(),
        ),
    ] {
        let (result, _) = attack(name, &bytes);
        assert_eq!(result, Err(LayerErrorKind::InvalidArchive), "{name}");
    }
}

#[test]
fn tolerated_oddities() {
    let plain = [header(b"f", b'0', b"00000000001").to_vec(), content(b"x")].concat();
    let global = [header(b"g", b'g', b"00000000014").to_vec(), content(b"12 path=evl\n")].concat();
    for (name, bytes) in [
        ("no end mark", plain.clone()),
        ("one zero block", [plain.clone(), vec![0; 512]].concat()),
        ("bytes after the end", [plain.clone(), END.to_vec(), b"trailing".to_vec()].concat()),
        ("global header", [global, plain.clone(), END.to_vec()].concat()),
        ("empty pax value", [pax(b"8 path=\n"), plain.clone(), END.to_vec()].concat()),
        (
            "contiguous file",
            [header(b"f", b'7', b"00000000001").to_vec(), content(b"x"), END.to_vec()].concat(),
        ),
        (
            "old file",
            [header(b"f", 0, b"00000000001").to_vec(), content(b"x"), END.to_vec()].concat(),
        ),
    ] {
        assert_eq!(attack(name, &bytes), (Ok(()), 1), "{name}");
    }
    // Before POSIX, a trailing slash made a directory.
    let folder = tempfile::tempdir().unwrap();
    unpack(&[header(b"d/", 0, b"00000000000").to_vec(), END.to_vec()].concat(), folder.path())
        .unwrap();
    assert!(folder.path().join("d").is_dir());
}

#[test]
fn random_damage_never_escapes_or_panics() {
    let base = archive(&[
        directory("d"),
        file("d/f", "content"),
        symlink("l", "../canary"),
        file("l/x", "1"),
        hard_link("h", "d/f"),
        file(&"long/".repeat(30), ""),
        file(".wh.gone", ""),
        file("d/.wh..wh..opq", ""),
    ]);
    let mut state = 7_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    for round in 0..400 {
        let mut bytes = base.clone();
        for _ in 0..1 + next() % 4 {
            let at = next() % bytes.len();
            bytes[at] = [b'.', b'/', 0, 0xff, b'1', b'x', b'9'][next() % 7];
        }
        // Most damage must get past the checksum to be of interest.
        for block in bytes.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
            let sealed = seal(block.try_into().unwrap());
            block.copy_from_slice(&sealed);
        }
        let (_, files) = attack(&format!("round {round}"), &bytes);
        assert!(files < 60, "round {round}");
    }
}
