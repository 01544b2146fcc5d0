//! Build contexts.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A directory that a test fills and builds from.
#[derive(Debug)]
pub struct Context {
    path: PathBuf,
}

impl Context {
    pub(crate) fn create(path: PathBuf) -> Self {
        fs::create_dir_all(&path).expect("create the build context");
        Self { path }
    }

    /// Returns where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns it as a command line argument.
    pub fn arg(&self) -> &str {
        self.path.to_str().expect("the paths of the tests are UTF-8")
    }

    /// Writes the Dockerfile.
    pub fn dockerfile(&self, text: &str) -> &Self {
        self.file("Dockerfile", text)
    }

    /// Writes a file with mode 0644, and the directories above it.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> &Self {
        let path = self.path.join(name);
        fs::create_dir_all(path.parent().expect("a file is in a directory"))
            .expect("create a directory");
        fs::write(&path, content).expect("write a file of the context");
        self.mode(name, 0o644)
    }

    /// Sets the mode of a file.
    pub fn mode(&self, name: &str, mode: u32) -> &Self {
        fs::set_permissions(self.path.join(name), fs::Permissions::from_mode(mode))
            .expect("set a mode");
        self
    }

    /// Makes a symbolic link.
    pub fn symlink(&self, name: &str, target: &str) -> &Self {
        let path = self.path.join(name);
        fs::create_dir_all(path.parent().expect("a link is in a directory"))
            .expect("create a directory");
        std::os::unix::fs::symlink(target, path).expect("make a symbolic link");
        self
    }

    /// Sets the modification time of a file, and changes nothing else.
    pub fn touch(&self, name: &str, seconds_since_epoch: u64) -> &Self {
        let file = fs::File::options().write(true).open(self.path.join(name)).expect("open a file");
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds_since_epoch))
            .expect("set a time");
        self
    }
}
