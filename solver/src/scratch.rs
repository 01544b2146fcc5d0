//! Folders for unfinished work.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A folder that is removed, with all that is in it, when nobody has it any more: whoever works in it may be dropped at any
/// moment, in a process that goes on.
#[derive(Debug)]
pub(crate) struct Scratch(Option<PathBuf>);

impl Scratch {
    /// Takes a path; nothing is created.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(Some(path))
    }

    /// Returns where it is.
    pub(crate) fn path(&self) -> &Path {
        // It is taken out by those only who take all of it.
        self.0.as_deref().unwrap_or(Path::new(""))
    }

    /// Leaves the folder to somebody else, unless that fails.
    ///
    /// # Errors
    /// What `give` returns; the folder is removed then.
    pub(crate) fn give<T, E>(mut self, give: impl FnOnce(&Path) -> Result<T, E>) -> Result<T, E> {
        let given = give(self.path())?;
        self.0 = None;
        Ok(given)
    }

    /// Removes it. Blocks.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(crate) fn remove(mut self) -> io::Result<()> {
        self.0.take().map_or(Ok(()), |path| remove(&path))
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        // It was never made.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let Some(path) = self.0.take() else { return };
        let remove = move || {
            if let Err(error) = remove(&path) {
                tracing::debug!(path = %path.display(), %error, "unfinished work stays behind until this process ends");
            }
        };
        // Removing may take long; what is not removed now is when the store is opened again.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(remove)),
            Err(_) => remove(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_goes_unless_it_is_given_away() {
        let place = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let scratch = Scratch::new(place.path().join(name));
            fs::create_dir_all(scratch.path().join("inside")).unwrap();
            scratch
        };
        let list = || fs::read_dir(place.path()).unwrap().count();
        drop(make("a"));
        assert_eq!(list(), 0);
        make("b").remove().unwrap();
        assert_eq!(list(), 0);
        make("c").give(|_| Err::<(), _>("no")).unwrap_err();
        assert_eq!(list(), 0);
        make("d").give(|_| Ok::<_, io::Error>(())).unwrap();
        assert_eq!(list(), 1);
        drop(Scratch::new(place.path().join("never made")));
    }

    #[tokio::test]
    async fn async_code_need_not_wait_for_it() {
        let place = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(place.path().join("a"));
        fs::create_dir(scratch.path()).unwrap();
        drop(scratch);
        while place.path().join("a").exists() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }
}
