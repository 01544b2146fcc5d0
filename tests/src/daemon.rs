//! A daemon of a test, and what can be seen of it from outside.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::tools::base_archive;
use crate::{Context, Ran, Running, Sandbox};

/// Whatever a client leaves is gone after this time.
const TIDY: Duration = Duration::from_secs(10);
/// No daemon takes as long to listen.
const START: Duration = Duration::from_secs(30);

/// A daemon with a store of its own, which has [`crate::BASE`]. Dropping it ends it.
#[derive(Debug)]
pub struct Daemon<'a> {
    running: Option<Running<'a>>,
    address: String,
    socket: PathBuf,
    root: PathBuf,
}

/// What a daemon holds at some moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// What its open files are: paths, or kinds.
    pub files: Vec<String>,
    /// The processes below it, and those that see a file system of it.
    pub processes: Vec<String>,
    /// Mounts in its own namespace and in the machine's.
    pub mounts: Vec<String>,
    /// What is on its way, or was left behind.
    pub temporary: Vec<String>,
}

impl<'a> Daemon<'a> {
    /// Starts one on the folder `builder`, which may be there already.
    ///
    /// # Panics
    /// When it does not listen soon.
    pub fn start(sandbox: &'a Sandbox) -> Self {
        let (socket, root) = (sandbox.path("b.sock"), sandbox.path("builder"));
        let root_arg = sandbox.arg("builder");
        if !root.exists() {
            let base = base_archive().to_str().expect("the paths of the tests are UTF-8");
            sandbox.run(["--root", &root_arg, "load", "--input", base]);
        }
        let address = format!("unix://{}", socket.display());
        let running = sandbox.slipway(["--root", &root_arg, "daemon", "--addr", &address]).start();
        let began = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            assert!(began.elapsed() < START, "the daemon does not listen");
            thread::sleep(Duration::from_millis(10));
        }
        Self { running: Some(running), address, socket, root }
    }

    /// Returns where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns its state folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Returns the id of its process.
    ///
    /// # Panics
    /// Never: it runs until it is dropped.
    pub fn id(&self) -> u32 {
        self.running.as_ref().expect("it runs until it is dropped").id()
    }

    /// Returns the words of a build by it.
    pub fn words<'b>(&'b self, context: &'b Context, options: &[&'b str]) -> Vec<&'b str> {
        let mut words = vec!["build", "--progress=plain", "--builder", &self.address];
        words.extend(options);
        words.push(context.arg());
        words
    }

    /// Sends it a signal, and waits for its end.
    pub fn end(mut self, signal: Signal) -> Ran {
        self.ended(signal).expect("it runs until it is dropped")
    }

    fn ended(&mut self, signal: Signal) -> Option<Ran> {
        let running = self.running.take()?;
        running.signal(signal);
        Some(running.wait())
    }

    /// Makes a gRPC call with one message and returns the messages of the answer, one after the other, as they came.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn ask(&self, method: &str, message: &[u8]) -> Vec<u8> {
        let mut headers = vec![];
        for (name, value) in [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ] {
            headers.push(0);
            for text in [name, value] {
                headers.push(u8::try_from(text.len()).expect("headers are short"));
                headers.extend_from_slice(text.as_bytes());
            }
        }
        let mut body = vec![0];
        body.extend(u32::try_from(message.len()).expect("messages are short").to_be_bytes());
        body.extend_from_slice(message);
        let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        // Settings; headers, which end here; data, which end the stream.
        for (kind, flags, stream, content) in
            [(4u8, 0u8, 0u32, &[][..]), (1, 4, 1, &headers), (0, 1, 1, &body)]
        {
            sent.extend(
                &u32::try_from(content.len()).expect("frames are short").to_be_bytes()[1..],
            );
            sent.extend([kind, flags]);
            sent.extend(stream.to_be_bytes());
            sent.extend_from_slice(content);
        }
        let mut connection = UnixStream::connect(&self.socket).expect("the daemon listens");
        connection.set_read_timeout(Some(START)).expect("set a time limit");
        connection.write_all(&sent).expect("the daemon reads");
        let mut answer = vec![];
        loop {
            let mut head = [0; 9];
            connection.read_exact(&mut head).expect("the daemon answers");
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut content = vec![0; usize::try_from(length).expect("frames are short")];
            connection.read_exact(&mut content).expect("the daemon answers");
            let (kind, flags, is_ours) = (head[3], head[4], head[5..] == [0, 0, 0, 1]);
            if is_ours && kind == 0 {
                answer.extend_from_slice(&content);
            }
            assert!(kind != 7 && !(is_ours && kind == 3), "{method} was broken off");
            // The headers of an answer that ends the stream are its last ones.
            if is_ours && kind <= 1 && flags & 1 != 0 {
                return answer;
            }
        }
    }

    /// Returns the records of its history, as they came.
    pub fn history(&self) -> String {
        // Only what there is now: the field for that is the third, and true.
        let answer = self.ask("/moby.buildkit.v1.Control/ListenBuildHistory", &[0x18, 1]);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Returns what it holds.
    ///
    /// # Panics
    /// When it has ended.
    pub fn holdings(&self) -> Holdings {
        let own = PathBuf::from(format!("/proc/{}", self.id()));
        let place = self.root.display().to_string();
        let kept = format!("{place}/local/");
        let mut found = Holdings::default();
        for file in fs::read_dir(own.join("fd")).expect("the daemon runs").flatten() {
            let Ok(target) = fs::read_link(file.path()) else { continue };
            let target = target.display().to_string();
            // Files of a client stay open until the next builds can be expected no more; that is a cache like any other.
            if target.starts_with(&kept) {
                continue;
            }
            // Numbers of sockets and pipes differ from one to the next.
            found.files.push(target.split('[').next().unwrap_or_default().to_owned());
        }
        for namespace in [own.join("mountinfo"), "/proc/self/mountinfo".into()] {
            let mounts = fs::read_to_string(namespace).expect("read the mounts");
            let mounts = mounts.lines().filter(|mount| mount.contains(&place));
            found.mounts.extend(mounts.map(str::to_owned));
        }
        for process in fs::read_dir("/proc").expect("read the processes").flatten() {
            let path = process.path();
            if !process.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) || path == own
            {
                continue;
            }
            let mounts = fs::read_to_string(path.join("mountinfo")).unwrap_or_default();
            let root = fs::read_link(path.join("root")).is_ok_and(|root| root.starts_with(&place));
            let stat = fs::read_to_string(path.join("stat")).unwrap_or_default();
            let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1));
            if root || mounts.contains(&place) || parent == Some(&self.id().to_string()) {
                let command = fs::read(path.join("cmdline")).unwrap_or_default();
                found.processes.push(String::from_utf8_lossy(&command).replace('\0', " "));
            }
        }
        for process in fs::read_dir(self.root.join("tmp")).into_iter().flatten().flatten() {
            let entries = fs::read_dir(process.path()).into_iter().flatten().flatten();
            let left = entries.filter(|entry| entry.file_name() != "lock");
            found.temporary.extend(left.map(|entry| entry.path().display().to_string()));
        }
        for list in [&mut found.files, &mut found.processes, &mut found.mounts] {
            list.sort();
        }
        found
    }

    /// Waits until it holds no more than it did before.
    ///
    /// # Panics
    /// When it still does after 10 seconds.
    pub fn settles(&self, before: &Holdings, when: &str) {
        let began = Instant::now();
        loop {
            let now = self.holdings();
            let fits = now.files.len() <= before.files.len()
                && now.processes.len() <= before.processes.len()
                && now.mounts.len() <= before.mounts.len()
                && now.temporary.len() <= before.temporary.len();
            if fits {
                return;
            }
            let waited = began.elapsed();
            assert!(waited < TIDY, "{when}: before\n{before:#?}\nand after {waited:?}\n{now:#?}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        drop(self.ended(Signal::TERM));
    }
}
