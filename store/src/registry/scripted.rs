//! An HTTP server for tests that answers as it is told and remembers what it was asked.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// A request as it arrived.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    pub(crate) method: String,
    pub(crate) target: String,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Received {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// Method and target in one, to match on.
    pub(crate) fn line(&self) -> String {
        format!("{} {}", self.method, self.target)
    }

    pub(crate) fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }
}

/// An answer and what goes wrong with it.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    cut: Option<usize>,
    hang: Option<usize>,
    chunked: bool,
    instead: Option<Instead>,
}

/// What comes where an answer should.
#[derive(Clone, Copy, Debug)]
enum Instead {
    Closing,
    Silence,
    Garbage,
}

impl Reply {
    pub(crate) fn new(status: u16) -> Self {
        Self {
            status,
            headers: vec![],
            body: vec![],
            cut: None,
            hang: None,
            chunked: false,
            instead: None,
        }
    }

    pub(crate) fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self::new(200).body(body)
    }

    pub(crate) fn json(text: &str) -> Self {
        Self::ok(text).header("content-type", "application/json")
    }

    pub(crate) fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub(crate) fn body(self, body: impl Into<Vec<u8>>) -> Self {
        Self { body: body.into(), ..self }
    }

    /// Closes the connection after so many bytes of the body.
    pub(crate) fn cut(self, bytes: usize) -> Self {
        Self { cut: Some(bytes), ..self }
    }

    /// Falls silent after so many bytes of the body.
    pub(crate) fn hang(self, bytes: usize) -> Self {
        Self { hang: Some(bytes), ..self }
    }

    /// Does not say how long the body is.
    pub(crate) fn chunked(self) -> Self {
        Self { chunked: true, ..self }
    }

    /// Closes the connection in the middle of the request's body, answering nothing.
    pub(crate) fn unread() -> Self {
        Self { instead: Some(Instead::Closing), ..Self::new(0) }
    }

    /// Keeps the connection and answers nothing.
    pub(crate) fn silent() -> Self {
        Self { instead: Some(Instead::Silence), ..Self::new(0) }
    }

    /// Answers in another language.
    pub(crate) fn garbage() -> Self {
        Self { instead: Some(Instead::Garbage), ..Self::new(0) }
    }
}

type Handler = dyn FnMut(&Received) -> Reply + Send;

pub(crate) struct Scripted {
    address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
    greetings: Arc<Mutex<usize>>,
}

impl Scripted {
    pub(crate) async fn start(handler: impl FnMut(&Received) -> Reply + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::start_on(listener, handler)
    }

    /// For handlers that must know the server's own address.
    pub(crate) fn start_on(
        listener: TcpListener,
        handler: impl FnMut(&Received) -> Reply + Send + 'static,
    ) -> Self {
        let address = listener.local_addr().unwrap();
        let received = Arc::new(Mutex::new(Vec::new()));
        let greetings = Arc::new(Mutex::new(0));
        let handler: Arc<Mutex<Handler>> = Arc::new(Mutex::new(handler));
        let (log, count) = (Arc::clone(&received), Arc::clone(&greetings));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(
                    stream,
                    Arc::clone(&handler),
                    Arc::clone(&log),
                    Arc::clone(&count),
                ));
            }
        });
        Self { address, received, greetings }
    }

    pub(crate) fn authority(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.received().iter().map(Received::line).collect()
    }

    /// How often somebody tried TLS.
    pub(crate) fn greetings(&self) -> usize {
        *self.greetings.lock().unwrap()
    }
}

async fn serve(
    mut stream: TcpStream,
    handler: Arc<Mutex<Handler>>,
    log: Arc<Mutex<Vec<Received>>>,
    greetings: Arc<Mutex<usize>>,
) -> Option<()> {
    let mut buffer = Vec::new();
    loop {
        let head_end = loop {
            if buffer.first() == Some(&0x16) {
                // A TLS greeting at a plain port gets what common servers answer.
                *greetings.lock().unwrap() += 1;
                stream
                    .write_all(b"HTTP/1.0 400 Bad Request\r\n\r\nplain HTTP only\n")
                    .await
                    .ok()?;
                return None;
            }
            if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            read_more(&mut stream, &mut buffer).await?;
        };
        let head = String::from_utf8_lossy(&buffer[..head_end]).into_owned();
        buffer.drain(..head_end);
        let mut lines = head.lines();
        let mut words = lines.next()?.split(' ');
        let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
        let headers: Vec<(String, String)> = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        let length = headers
            .iter()
            .find(|(name, _)| name == "content-length")
            .and_then(|(_, text)| text.parse().ok());
        let mut request = Received { method, target, headers, body: Vec::new() };
        let length: usize = length.unwrap_or(0);
        if length > 0 {
            while buffer.is_empty() {
                read_more(&mut stream, &mut buffer).await?;
            }
        }
        let reply = (handler.lock().unwrap())(&request);
        if let Some(instead) = reply.instead {
            log.lock().unwrap().push(request);
            match instead {
                Instead::Closing => {}
                Instead::Silence => tokio::time::sleep(Duration::from_secs(60)).await,
                Instead::Garbage => stream.write_all(b"220 mail.example ESMTP\r\n").await.ok()?,
            }
            return None;
        }
        while buffer.len() < length {
            read_more(&mut stream, &mut buffer).await?;
        }
        request.body = buffer.drain(..length).collect();
        let is_head = request.method == "HEAD";
        log.lock().unwrap().push(request);
        answer(&mut stream, &reply, is_head).await?;
    }
}

async fn read_more(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<()> {
    let count = stream.read_buf(buffer).await.ok()?;
    (count > 0).then_some(())
}

async fn answer(stream: &mut TcpStream, reply: &Reply, is_head: bool) -> Option<()> {
    let mut head = format!("HTTP/1.1 {} Scripted\r\n", reply.status);
    for (name, value) in &reply.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let says_length = reply.headers.iter().any(|(name, _)| name == "content-length");
    if reply.chunked {
        head.push_str("transfer-encoding: chunked\r\n");
    } else if !says_length && reply.status != 204 {
        head.push_str(&format!("content-length: {}\r\n", reply.body.len()));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await.ok()?;
    if is_head {
        return Some(());
    }
    let stop = reply.cut.or(reply.hang).unwrap_or(reply.body.len());
    let body = &reply.body[..stop];
    if reply.chunked && !body.is_empty() {
        stream.write_all(format!("{:x}\r\n", body.len()).as_bytes()).await.ok()?;
    }
    stream.write_all(body).await.ok()?;
    if reply.chunked && reply.cut.is_none() {
        let end: &[u8] = if body.is_empty() { b"0\r\n\r\n" } else { b"\r\n0\r\n\r\n" };
        stream.write_all(end).await.ok()?;
    }
    stream.flush().await.ok()?;
    if reply.hang.is_some() {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    if reply.cut.is_some() { None } else { Some(()) }
}
