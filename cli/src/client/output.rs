//! Streams that a build or `save` writes to: a file that appears whole, or standard output.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use slipway_engine::exporter::OutputSink;

/// A file that has its name only once it is complete.
#[derive(Debug)]
pub(crate) struct FileOutput {
    path: PathBuf,
    temporary: PathBuf,
    file: Option<File>,
}

impl FileOutput {
    /// Names the file; nothing is created yet.
    pub(crate) fn new(path: &Path) -> Self {
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{}.part", std::process::id()));
        Self { temporary: path.with_file_name(name), path: path.to_path_buf(), file: None }
    }

    /// A pipe or device cannot be replaced and is written to directly.
    fn is_special(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir())
    }
}

impl OutputSink for FileOutput {
    fn destination(&self) -> String {
        self.path.display().to_string()
    }

    fn open(&mut self) -> io::Result<&mut dyn Write> {
        let file = if self.is_special() {
            File::options().write(true).open(&self.path)?
        } else {
            if self.path.is_dir() {
                return Err(io::Error::from(io::ErrorKind::IsADirectory));
            }
            File::create(&self.temporary)?
        };
        Ok(self.file.insert(file))
    }

    fn finish(mut self: Box<Self>) -> io::Result<()> {
        let Some(file) = self.file.take() else { return Ok(()) };
        if self.is_special() {
            return Ok(());
        }
        file.sync_all()?;
        fs::rename(&self.temporary, &self.path)
    }
}

impl Drop for FileOutput {
    fn drop(&mut self) {
        if self.file.is_some() {
            // Only what was half written; there is nobody left to tell if even that fails.
            let _removed = fs::remove_file(&self.temporary);
        }
    }
}

/// Standard output.
#[derive(Debug)]
pub(crate) struct StdoutOutput(pub(crate) File);

impl OutputSink for StdoutOutput {
    fn destination(&self) -> String {
        "standard output".into()
    }

    fn open(&mut self) -> io::Result<&mut dyn Write> {
        Ok(&mut self.0)
    }

    fn finish(mut self: Box<Self>) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_appears_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.tar");
        fs::write(&path, "old").unwrap();
        let mut output = Box::new(FileOutput::new(&path));
        output.open().unwrap().write_all(b"half").unwrap();
        drop(output);
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        let mut output = Box::new(FileOutput::new(&path));
        output.open().unwrap().write_all(b"new").unwrap();
        output.finish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
