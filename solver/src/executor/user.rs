//! Who a step runs as: looked up in the image's own files, as plain text.

use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::mountpoint::open_in_root;

/// Larger user files are refused: an image could otherwise fill our memory.
const MAX_FILE: u64 = 10 << 20;

/// The numbers behind a user's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub(super) home: String,
}

/// Looks a user up inside `root`.
pub(super) fn look_up(root: BorrowedFd<'_>, user: &str) -> Result<Identity, String> {
    let (passwd, group) = (read(root, "etc/passwd"), read(root, "etc/group"));
    let numeric = |part: &str| parse_id(part).is_ok_and(|id| id.is_some());
    if user.is_empty()
        || user.split_once(':').is_some_and(|(uid, gid)| numeric(uid) && numeric(gid))
    {
        // Nothing has to be looked up but the home folder, so files that can't be read don't matter.
        return identify(user, &passwd.unwrap_or_default(), "");
    }
    identify(user, &passwd?, &group?)
}

/// A file that is missing names nobody; one that is no plain file, or too large, is an error.
fn read(root: BorrowedFd<'_>, path: &str) -> Result<String, String> {
    // Not blocking: the image may have put a pipe there.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match open_in_root(root, path.as_bytes(), flags) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(String::new()),
        Err(errno) => return Err(format!("cannot open /{path}: {errno}")),
    };
    let stat =
        rustix::fs::fstat(&file).map_err(|errno| format!("cannot examine /{path}: {errno}"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(format!("/{path} is not a regular file"));
    }
    let mut bytes = vec![];
    let mut limited = std::io::Read::take(std::fs::File::from(file), MAX_FILE + 1);
    std::io::Read::read_to_end(&mut limited, &mut bytes)
        .map_err(|error| format!("cannot read /{path}: {error}"))?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(format!("/{path} is larger than {MAX_FILE} bytes"));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A number is an id only up to 2^31 - 1: larger ones wrap to something else in other programs.
fn parse_id(text: &str) -> Result<Option<u32>, String> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse::<u32>() {
        Ok(id) if i32::try_from(id).is_ok() => Ok(Some(id)),
        _ => Err(format!("the id {text} is not between 0 and {}", i32::MAX)),
    }
}

fn identify(user: &str, passwd: &str, group: &str) -> Result<Identity, String> {
    let (name, group_name) = match user.split_once(':') {
        Some((name, group)) => (name, Some(group).filter(|g| !g.is_empty())),
        None => (user, None),
    };
    // Nothing said is root with no further groups, as BuildKit has it.
    let numeric = if name.is_empty() { Some(0) } else { parse_id(name)? };
    let entry = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| {
        let id = fields.get(2).and_then(|id| parse_id(id).ok().flatten());
        let named = !name.is_empty() && fields.first() == Some(&name);
        fields.len() >= 4 && id.is_some() && (named || (numeric.is_some() && id == numeric))
    });
    let (uid, mut gid, entry_name, home) = match (&entry, numeric) {
        (Some(fields), _) => (
            parse_id(fields[2])?.unwrap_or_default(),
            parse_id(fields[3])?.unwrap_or_default(),
            Some(fields[0]),
            fields.get(5).filter(|home| !home.is_empty()).map_or("/", |home| home),
        ),
        (None, Some(uid)) => (uid, 0, None, "/"),
        (None, None) => return Err("no matching entry in /etc/passwd".into()),
    };
    let mut groups = vec![];
    if let Some(group_name) = group_name {
        let wanted = parse_id(group_name)?;
        let found = group.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let id = fields.get(2).and_then(|id| parse_id(id).ok().flatten())?;
            (fields[0] == group_name || wanted == Some(id)).then_some(id)
        });
        gid = found
            .or(wanted)
            .ok_or_else(|| format!("no matching entry for group {group_name:?} in /etc/group"))?;
    } else if let Some(entry_name) = entry_name.filter(|_| !name.is_empty()) {
        for line in group.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            let (Some(id), Some(members)) = (fields.get(2), fields.get(3)) else { continue };
            if members.split(',').any(|member| member == entry_name)
                && let Ok(Some(id)) = parse_id(id)
                && !groups.contains(&id)
            {
                groups.push(id);
            }
        }
    }
    Ok(Identity { uid, gid, groups, home: home.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n# comment\nbroken\napp:x:1000:1001::/srv/app:/bin/sh\n\
                          big:x:4294967296:0::/:/bin/sh\n";
    const GROUP: &str = "root:x:0:root\nstaff:x:50:app,other\nwheel:x:10:root,app\napp:x:1001:\n";

    fn found(user: &str) -> Identity {
        identify(user, PASSWD, GROUP).unwrap()
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let app = Identity { uid: 1000, gid: 1001, groups: vec![50, 10], home: "/srv/app".into() };
        assert_eq!(found("app"), app);
        assert_eq!(found("1000"), app);
        assert_eq!(found(""), Identity { uid: 0, gid: 0, groups: vec![], home: "/root".into() });
        assert_eq!(
            found("root"),
            Identity { uid: 0, gid: 0, groups: vec![0, 10], home: "/root".into() }
        );
        assert_eq!(found("77"), Identity { uid: 77, gid: 0, groups: vec![], home: "/".into() });
    }

    #[test]
    fn a_group_replaces_the_users_groups() {
        assert_eq!(
            found("app:staff"),
            Identity { uid: 1000, gid: 50, groups: vec![], home: "/srv/app".into() }
        );
        assert_eq!(found("77:88"), Identity { uid: 77, gid: 88, groups: vec![], home: "/".into() });
        assert_eq!(found(":50").gid, 50);
    }

    #[test]
    fn ids_that_would_wrap_to_root_are_errors() {
        for user in ["4294967296", "-1", "2147483648:0", "0:4294967296", "99999999999999999999"] {
            assert!(identify(user, PASSWD, GROUP).is_err(), "{user}");
        }
    }

    #[test]
    fn unknown_names_are_errors() {
        assert!(identify("nobody", PASSWD, GROUP).is_err());
        assert!(identify("app:nogroup", PASSWD, GROUP).is_err());
        assert!(identify("big", PASSWD, GROUP).is_err());
    }
}
