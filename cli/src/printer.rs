//! The only writer to standard output and standard error.
//!
//! Standard output carries what was asked for: tables, ids, documents, archives. Everything else goes to standard
//! error. A reader that leaves early, as `head` does, is no failure; any other trouble with standard output is, and
//! [`Printer::finish`] tells.

pub(crate) mod size;
pub(crate) mod table;
pub(crate) mod text;
pub(crate) mod time;

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead as _, ErrorKind, IsTerminal as _, Write};
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::table::Table;
use crate::failure::Failure;

/// Which of the standard streams are terminals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Terminals {
    /// Standard input.
    pub(crate) stdin: bool,
    /// Standard output.
    pub(crate) stdout: bool,
    /// Standard error.
    pub(crate) stderr: bool,
}

impl Terminals {
    /// Asks the process's streams.
    pub(crate) fn of_process() -> Self {
        Self {
            stdin: io::stdin().is_terminal(),
            stdout: io::stdout().is_terminal(),
            stderr: io::stderr().is_terminal(),
        }
    }
}

/// One stream, and what became of it.
struct Output {
    writer: Box<dyn Write + Send>,
    /// Nobody reads any more, or writing failed; further text is dropped.
    closed: bool,
    failure: Option<io::Error>,
}

impl Output {
    fn shared(writer: Box<dyn Write + Send>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { writer, closed: false, failure: None }))
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.closed {
            return;
        }
        if let Err(error) = self.writer.write_all(bytes).and_then(|()| self.writer.flush()) {
            self.closed = true;
            self.failure = Some(error).filter(|error| error.kind() != ErrorKind::BrokenPipe);
        }
    }
}

fn lock(output: &Mutex<Output>) -> MutexGuard<'_, Output> {
    output.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes to the standard streams. Clones write to the same streams.
#[derive(Clone)]
pub(crate) struct Printer {
    stdout: Arc<Mutex<Output>>,
    stderr: Arc<Mutex<Output>>,
    /// Which streams are terminals.
    pub(crate) terminals: Terminals,
}

impl fmt::Debug for Printer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Printer").field("terminals", &self.terminals).finish_non_exhaustive()
    }
}

impl Printer {
    /// Opens the process's streams.
    pub(crate) fn of_process() -> Self {
        Self {
            stdout: Output::shared(Box::new(io::stdout())),
            stderr: Output::shared(Box::new(io::stderr())),
            terminals: Terminals::of_process(),
        }
    }

    /// Writes a line to standard output.
    pub(crate) fn line(&self, line: &str) {
        lock(&self.stdout).write(format!("{line}\n").as_bytes());
    }

    /// Writes text as it is to standard output.
    pub(crate) fn text(&self, text: &str) {
        lock(&self.stdout).write(text.as_bytes());
    }

    /// Writes a table to standard output.
    pub(crate) fn table(&self, table: &Table) {
        self.text(&table.to_string());
    }

    /// Writes a line to standard error.
    pub(crate) fn note(&self, line: &str) {
        self.error_text(&format!("{line}\n"));
    }

    /// Writes text as it is to standard error.
    pub(crate) fn error_text(&self, text: &str) {
        lock(&self.stderr).write(text.as_bytes());
    }

    /// Returns a writer to standard error, for progress. It never fails: progress that nobody sees harms nobody.
    pub(crate) fn error_stream(&self) -> ErrorStream {
        ErrorStream(Arc::clone(&self.stderr))
    }

    /// Returns standard output as a file, for archives.
    ///
    /// # Errors
    /// When the process has no standard output, or no more descriptors.
    pub(crate) fn stdout_file(&self) -> Result<File, Failure> {
        let fd = io::stdout().as_fd().try_clone_to_owned();
        fd.map(File::from)
            .map_err(|error| Failure::new(format!("cannot use standard output: {error}")))
    }

    /// Asks a question on standard error that is answered with `y` or `n`; no answer is a no.
    ///
    /// # Errors
    /// When standard input cannot be read.
    pub(crate) fn confirm(&self, question: &str) -> Result<bool, Failure> {
        self.error_text(&format!("{question} [y/N] "));
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer).map_err(|error| {
            Failure::new(format!("cannot read the answer from standard input: {error}"))
        })?;
        Ok(is_yes(&answer))
    }

    /// Tells whether everything meant for standard output got there.
    ///
    /// # Errors
    /// When a write failed for another reason than a reader that left.
    pub(crate) fn finish(&self) -> Result<(), Failure> {
        match lock(&self.stdout).failure.take() {
            Some(error) => Err(Failure::new(format!("cannot write to standard output: {error}"))),
            None => Ok(()),
        }
    }
}

fn is_yes(answer: &str) -> bool {
    matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

/// A writer to standard error that never fails.
pub(crate) struct ErrorStream(Arc<Mutex<Output>>);

impl Write for ErrorStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod capture {
    use super::*;

    /// A writer that keeps what is written.
    #[derive(Clone, Default)]
    pub(crate) struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Buffer {
        /// Takes what was written.
        pub(crate) fn take(&self) -> String {
            String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
        }
    }

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Makes a printer, and buffers of what it writes to standard output and standard error.
    pub(crate) fn printer() -> (Printer, Buffer, Buffer) {
        let (stdout, stderr) = (Buffer::default(), Buffer::default());
        let printer = Printer {
            stdout: Output::shared(Box::new(stdout.clone())),
            stderr: Output::shared(Box::new(stderr.clone())),
            terminals: Terminals::default(),
        };
        (printer, stdout, stderr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Broken(ErrorKind);

    impl Write for Broken {
        fn write(&mut self, _bytes: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_left_is_no_failure_but_a_full_disk_is() {
        for (kind, fine) in [(ErrorKind::BrokenPipe, true), (ErrorKind::StorageFull, false)] {
            let (mut printer, _, stderr) = capture::printer();
            printer.stdout = Output::shared(Box::new(Broken(kind)));
            printer.line("lost");
            printer.line("lost too");
            printer.note("kept");
            assert_eq!(printer.finish().is_ok(), fine, "{kind}");
            assert_eq!(stderr.take(), "kept\n");
        }
    }

    #[test]
    fn only_a_clear_yes_is_one() {
        for (answer, yes) in
            [("y\n", true), (" YES \n", true), ("", false), ("n\n", false), ("yep\n", false)]
        {
            assert_eq!(is_yes(answer), yes, "{answer:?}");
        }
    }
}
