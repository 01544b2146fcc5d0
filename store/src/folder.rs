//! Folder trees of any depth: measured and removed without paths, which have a longest length, and without recursion,
//! which has a deepest level.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Returns the space a tree of files takes, in bytes. What vanishes meanwhile does not count.
pub(crate) fn disk_usage(path: &Path) -> io::Result<u64> {
    let mut total = 0;
    let mut linked = HashSet::new();
    let mut count = |directory: &OwnedFd, name: &CStr| -> io::Result<()> {
        match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => {
                let folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
                if stat.st_nlink == 1 || folder || linked.insert((stat.st_dev, stat.st_ino)) {
                    total += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
                }
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    };
    let root = match open(CWD, path) {
        Err(Errno::NOENT) => return Ok(0),
        other => other?,
    };
    count(&root, c".")?;
    walk(root, &mut |directory, name, step| match step {
        Step::File | Step::Enter => count(directory, name),
        Step::Leave => Ok(()),
    })?;
    Ok(total)
}

/// Removes a folder and everything in it, whatever modes the folders have. It stops at mounts.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    let root = match open(CWD, path) {
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ACCESS) => {
            rustix::fs::chmod(path, Mode::RWXU)?;
            open(CWD, path)?
        }
        other => other?,
    };
    open_up(&root)?;
    const ALL: Access = Access::READ_OK.union(Access::WRITE_OK).union(Access::EXEC_OK);
    let remove = |directory: &OwnedFd, name: &CStr, flags| match rustix::fs::unlinkat(
        directory, name, flags,
    ) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(io::Error::from(error)),
    };
    walk(root, &mut |directory, name, step| match step {
        Step::Enter => match rustix::fs::accessat(directory, name, ALL, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(_) => Ok(rustix::fs::chmodat(directory, name, Mode::RWXU, AtFlags::empty())?),
        },
        Step::File => remove(directory, name, AtFlags::empty()),
        Step::Leave => remove(directory, name, AtFlags::REMOVEDIR),
    })?;
    match std::fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// A folder of ours may have lost the modes that changing it needs.
fn open_up(folder: &OwnedFd) -> io::Result<()> {
    let mode = Mode::from_raw_mode(rustix::fs::fstat(folder)?.st_mode);
    if mode.contains(Mode::RWXU) { Ok(()) } else { Ok(rustix::fs::fchmod(folder, Mode::RWXU)?) }
}

#[derive(Clone, Copy)]
enum Step {
    /// Something that is not a folder.
    File,
    /// A folder, before what is in it.
    Enter,
    /// A folder, after what was in it.
    Leave,
}

type Visit<'a> = &'a mut dyn FnMut(&OwnedFd, &CStr, Step) -> io::Result<()>;

fn open(
    at: impl std::os::fd::AsFd,
    path: impl rustix::path::Arg + Copy,
) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty())
}

/// Opens a folder in a folder, but not what is mounted on it.
fn open_below(at: &OwnedFd, name: &CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat2(at, name, flags, Mode::empty(), ResolveFlags::NO_XDEV) {
        // Kernels before 5.6, and sandboxes that do not know the call.
        Err(Errno::NOSYS | Errno::PERM) => open(at, name),
        other => other,
    }
}

/// Visits everything below a folder. Only one folder is open at a time: the way up is by "..".
fn walk(root: OwnedFd, visit: Visit<'_>) -> io::Result<()> {
    let mut at = root;
    let mut levels: Vec<(CString, Vec<CString>)> = vec![(CString::default(), list(&at, visit)?)];
    while let Some((_, folders)) = levels.last_mut() {
        if let Some(name) = folders.pop() {
            visit(&at, &name, Step::Enter)?;
            match open_below(&at, &name) {
                Ok(folder) => at = folder,
                Err(Errno::NOENT) => continue,
                Err(Errno::XDEV) => {
                    return Err(io::Error::new(
                        io::ErrorKind::ResourceBusy,
                        "something is mounted in it",
                    ));
                }
                Err(error) => return Err(error.into()),
            }
            let folders = list(&at, visit)?;
            levels.push((name, folders));
        } else if let Some((name, _)) = levels.pop()
            && !levels.is_empty()
        {
            at = open(&at, c"..")?;
            visit(&at, &name, Step::Leave)?;
        }
    }
    Ok(())
}

/// Visits the files of one folder and returns the names of the folders in it.
fn list(at: &OwnedFd, visit: Visit<'_>) -> io::Result<Vec<CString>> {
    let mut names = vec![];
    for entry in Dir::read_from(at)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push((name.to_owned(), entry.file_type()));
        }
    }
    let mut folders = vec![];
    for (name, mut kind) in names {
        if kind == FileType::Unknown {
            kind = match rustix::fs::statat(at, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error.into()),
            };
        }
        match kind {
            FileType::Directory => folders.push(name),
            _ => visit(at, &name, Step::File)?,
        }
    }
    Ok(folders)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn trees_deeper_than_any_path_are_measured_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path().join("top");
        fs::create_dir(&top).unwrap();
        let mut at = open(CWD, top.as_path()).unwrap();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "a-directory", Mode::RWXU).unwrap();
            at = open(&at, "a-directory").unwrap();
        }
        let bottom =
            rustix::fs::openat(&at, "f", OFlags::CREATE | OFlags::WRONLY, Mode::RWXU).unwrap();
        rustix::io::write(&bottom, &[1; 10_000]).unwrap();
        drop(bottom);
        assert!(disk_usage(&top).unwrap() >= 10_000);
        remove_tree(&top).unwrap();
        assert!(!top.exists());
        assert_eq!(disk_usage(&top).unwrap(), 0);
        remove_tree(&top).unwrap();
    }

    #[test]
    fn links_are_removed_but_not_followed() {
        let (folder, precious) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(precious.path().join("f"), "x").unwrap();
        let top = folder.path().join("top");
        fs::create_dir_all(top.join("d")).unwrap();
        std::os::unix::fs::symlink(precious.path(), top.join("d/link")).unwrap();
        remove_tree(&top).unwrap();
        assert!(!top.exists());
        assert!(precious.path().join("f").exists());
    }

    #[test]
    fn hard_links_take_space_once() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), vec![1; 100_000]).unwrap();
        let one = disk_usage(folder.path()).unwrap();
        fs::hard_link(folder.path().join("a"), folder.path().join("b")).unwrap();
        assert_eq!(disk_usage(folder.path()).unwrap(), one);
    }
}
