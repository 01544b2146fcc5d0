//! A small HTTP server that tests script.

use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What a client asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `PUT` and so on.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Request {
    /// Returns a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// What the server does about a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Passes it on, and the answer back.
    Forward,
    /// Passes it on, and answers with one byte of the body changed.
    Corrupt,
    /// Passes it on, and breaks the connection after this many bytes of the body.
    Truncate(usize),
    /// Answers without asking anyone.
    Answer(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// Breaks the connection.
    Close,
}

impl Reply {
    /// Answers with a status and a text.
    pub fn status(code: u16, text: &str) -> Self {
        Self::Answer(code, vec![("Content-Type", "text/plain".into())], text.into())
    }
}

type Rule = dyn Fn(&Request) -> Reply + Send + Sync;

#[derive(Default)]
struct Seen {
    requests: Mutex<Vec<Request>>,
    changed: Condvar,
}

/// An HTTP server on a free port of the loopback interface; it remembers each request.
pub struct Server {
    address: SocketAddr,
    seen: Arc<Seen>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Server {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Server").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Server {
    /// Starts one that decides by a rule; requests to forward go to `upstream`, as `host:port`.
    pub fn start(
        upstream: Option<&str>,
        rule: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen on a free port");
        let address = listener.local_addr().expect("the port");
        let (seen, stop) = (Arc::new(Seen::default()), Arc::new(AtomicBool::new(false)));
        let rule: Arc<Rule> = Arc::new(rule);
        let upstream = upstream.map(str::to_owned);
        let thread = thread::spawn({
            let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
            move || {
                for client in listener.incoming() {
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                    let Ok(client) = client else { continue };
                    let (seen, rule, upstream) =
                        (Arc::clone(&seen), Arc::clone(&rule), upstream.clone());
                    // A client that goes away in the middle is no error of the test.
                    thread::spawn(move || drop(serve(client, upstream.as_deref(), &seen, &*rule)));
                }
            }
        });
        Self { address, seen, stop, thread: Some(thread) }
    }

    /// Starts one that says yes to everything: `RUN wget` from a build counts its executions here.
    pub fn counter() -> Self {
        Self::start(None, |_| Reply::status(200, "ok\n"))
    }

    /// Starts one that only listens in on a registry.
    pub fn watching(upstream: &str) -> Self {
        Self::start(Some(upstream), |_| Reply::Forward)
    }

    /// Returns `host:port`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// Returns all requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.seen.requests.lock().expect("no thread panics with the lock").clone()
    }

    /// Returns how many requests were for this path.
    pub fn count(&self, path: &str) -> usize {
        self.requests().iter().filter(|request| request.path == path).count()
    }

    /// Forgets all requests.
    pub fn forget(&self) {
        self.seen.requests.lock().expect("no thread panics with the lock").clear();
    }

    /// Waits until this path was asked for.
    pub fn wait_for(&self, path: &str) {
        wait_for(&self.seen, path, Duration::from_secs(60));
    }

    /// Starts one that answers no request for one of two paths before the other has been asked for as well.
    pub fn rendezvous(first: &'static str, second: &'static str) -> Self {
        let holder: Arc<Mutex<Option<Arc<Seen>>>> = Arc::default();
        let server = Self::start(None, {
            let holder = Arc::clone(&holder);
            move |request| {
                let seen = holder
                    .lock()
                    .expect("no thread panics with the lock")
                    .clone()
                    .expect("set before use");
                let other = if request.path == first { second } else { first };
                if wait_for_quietly(&seen, other, Duration::from_secs(20)) {
                    Reply::status(200, "met\n")
                } else {
                    Reply::status(504, "alone\n")
                }
            }
        });
        *holder.lock().expect("no thread panics with the lock") = Some(Arc::clone(&server.seen));
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread that waits for a client.
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn wait_for_quietly(seen: &Seen, path: &str, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    let mut requests = seen.requests.lock().expect("no thread panics with the lock");
    while !requests.iter().any(|request| request.path == path) {
        let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
        requests =
            seen.changed.wait_timeout(requests, left).expect("no thread panics with the lock").0;
    }
    true
}

fn wait_for(seen: &Seen, path: &str, patience: Duration) {
    assert!(wait_for_quietly(seen, path, patience), "nobody asked for {path} within {patience:?}");
}

fn serve(
    client: TcpStream,
    upstream: Option<&str>,
    seen: &Seen,
    rule: &Rule,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut writer = client;
    let Some((head, request)) = read_request(&mut reader)? else { return Ok(()) };
    seen.requests.lock().expect("no thread panics with the lock").push(request.clone());
    seen.changed.notify_all();
    let forward = || -> std::io::Result<Vec<u8>> {
        let mut server =
            TcpStream::connect(upstream.expect("a rule that forwards has an upstream"))?;
        // One request for each connection: the end of the answer is the end of the stream.
        server.write_all(head.trim_end_matches("\r\n").as_bytes())?;
        server.write_all(b"\r\nConnection: close\r\n\r\n")?;
        server.write_all(&request.body)?;
        let mut answer = vec![];
        server.read_to_end(&mut answer)?;
        Ok(answer)
    };
    match rule(&request) {
        Reply::Forward => writer.write_all(&forward()?),
        Reply::Corrupt => {
            let mut answer = forward()?;
            let body = body_start(&answer);
            if let Some(byte) = answer.get_mut(body..).and_then(<[u8]>::last_mut) {
                *byte ^= 1;
            }
            writer.write_all(&answer)
        }
        Reply::Truncate(count) => {
            let answer = forward()?;
            let end = (body_start(&answer) + count).min(answer.len());
            writer.write_all(&answer[..end])
        }
        Reply::Answer(code, headers, body) => {
            let mut answer = format!(
                "HTTP/1.1 {code} scripted\r\nContent-Length: {}\r\nConnection: close\r\n",
                body.len()
            );
            for (name, value) in headers {
                answer.push_str(&format!("{name}: {value}\r\n"));
            }
            answer.push_str("\r\n");
            writer.write_all(answer.as_bytes())?;
            if request.method == "HEAD" { Ok(()) } else { writer.write_all(&body) }
        }
        Reply::Close => Ok(()),
    }
}

fn body_start(answer: &[u8]) -> usize {
    answer.windows(4).position(|window| window == b"\r\n\r\n").map_or(answer.len(), |at| at + 4)
}

/// Reads a request; its head comes back as it is to be passed on, without words about the connection.
fn read_request(reader: &mut impl BufRead) -> std::io::Result<Option<(String, Request)>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut head = line.clone();
    let mut words = line.split_whitespace();
    let (method, path) =
        (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let mut headers = vec![];
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line == "\r\n" {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            let name = name.trim().to_ascii_lowercase();
            if name != "connection" {
                head.push_str(&line);
            }
            headers.push((name, value.trim().to_owned()));
        }
    }
    let request = Request { method, path, headers, body: vec![] };
    let mut body = vec![];
    if request
        .header("transfer-encoding")
        .is_some_and(|value| value.eq_ignore_ascii_case("chunked"))
    {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size)?;
            let count =
                usize::from_str_radix(size.trim().split(';').next().unwrap_or_default(), 16)
                    .unwrap_or(0);
            body.extend_from_slice(size.as_bytes());
            let from = body.len();
            body.resize(from + count + 2, 0);
            reader.read_exact(&mut body[from..])?;
            if count == 0 {
                break;
            }
        }
    } else if let Some(count) =
        request.header("content-length").and_then(|value| value.parse().ok())
    {
        body.resize(count, 0);
        reader.read_exact(&mut body)?;
    }
    Ok(Some((head, Request { body, ..request })))
}
