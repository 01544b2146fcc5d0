//! Sockets of every kind, with clients.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use futures::StreamExt as _;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};

use super::*;

fn address(text: &str) -> Address {
    text.parse().unwrap()
}

fn unix(path: &Path) -> Address {
    Address::Unix(path.to_path_buf())
}

async fn bind(address: &Address) -> Result<Listeners, ListenError> {
    Listeners::bind(std::slice::from_ref(address), &ListenOptions::default()).await
}

fn port(listeners: &Listeners) -> u16 {
    listeners.addresses()[0].rsplit_once(':').unwrap().1.parse().unwrap()
}

/// Sends a word there and back.
async fn greet(incoming: &mut Incoming, mut client: impl AsyncRead + AsyncWrite + Unpin) {
    let mut server = incoming.next().await.unwrap().unwrap();
    client.write_all(b"hello").await.unwrap();
    client.flush().await.unwrap();
    let mut word = [0; 5];
    server.read_exact(&mut word).await.unwrap();
    server.write_all(&word).await.unwrap();
    server.flush().await.unwrap();
    client.read_exact(&mut word).await.unwrap();
    assert_eq!(&word, b"hello");
}

#[tokio::test]
async fn sockets_in_the_file_system_are_for_owner_and_group() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("made/a.sock");
    let uid = rustix::process::geteuid();
    // Only root may give files away.
    let owner = if uid.is_root() { 1234 } else { uid.as_raw() };
    let group = if uid.is_root() { 5678 } else { rustix::process::getegid().as_raw() };
    let options = ListenOptions { tls: None, owner: Some(owner), group: Some(group) };
    let listeners = Listeners::bind(&[unix(&path)], &options).await.unwrap();
    let found = std::fs::metadata(&path).unwrap();
    assert_eq!(found.permissions().mode() & 0o7777, 0o660);
    assert_eq!((found.uid(), found.gid()), (owner, group));
    let made = std::fs::metadata(path.parent().unwrap()).unwrap();
    assert_eq!((made.uid(), made.gid()), (owner, group));
    assert_eq!(listeners.addresses(), [format!("unix://{}", path.display())]);
    let mut incoming = listeners.incoming();
    greet(&mut incoming, UnixStream::connect(&path).await.unwrap()).await;
    drop(incoming);
    assert!(!path.exists());
}

#[tokio::test]
async fn a_socket_that_nobody_answers_at_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let mut incoming = bind(&unix(&path)).await.unwrap().incoming();
    greet(&mut incoming, UnixStream::connect(&path).await.unwrap()).await;
}

#[tokio::test]
async fn a_socket_that_somebody_answers_at_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sock");
    let first = bind(&unix(&path)).await.unwrap();
    let error = bind(&unix(&path)).await.unwrap_err();
    assert_eq!(error.kind(), ListenErrorKind::InUse);
    assert_eq!(
        error.to_string(),
        format!("cannot listen: \"unix://{}\" is in use: a daemon answers there", path.display())
    );
    // The first still has its socket.
    let mut incoming = first.incoming();
    // The second looked whether somebody answers.
    drop(incoming.next().await.unwrap().unwrap());
    greet(&mut incoming, UnixStream::connect(&path).await.unwrap()).await;
}

#[tokio::test]
async fn files_that_are_no_sockets_stay() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sock");
    std::fs::write(&path, "precious").unwrap();
    let error = bind(&unix(&path)).await.unwrap_err();
    assert_eq!(error.kind(), ListenErrorKind::InUse);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[tokio::test]
async fn the_socket_of_a_later_daemon_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sock");
    let first = bind(&unix(&path)).await.unwrap();
    std::fs::remove_file(&path).unwrap();
    let second = bind(&unix(&path)).await.unwrap();
    drop(first);
    assert!(path.exists());
    drop(second);
    assert!(!path.exists());
}

#[tokio::test]
async fn paths_that_are_too_long_are_refused_by_name() {
    let path = Path::new("/tmp").join("x".repeat(120));
    let error = bind(&unix(&path)).await.unwrap_err();
    assert_eq!(error.kind(), ListenErrorKind::Address);
    assert!(error.to_string().contains("107 bytes"), "{error}");
}

#[tokio::test]
async fn several_addresses_are_listened_at_together() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sock");
    let addresses = [address("tcp://127.0.0.1:0"), address("tcp://:0"), unix(&path)];
    let listeners = Listeners::bind(&addresses, &ListenOptions::default()).await.unwrap();
    let ports: Vec<u16> = listeners.addresses()[..2]
        .iter()
        .map(|address| address.rsplit_once(':').unwrap().1.parse().unwrap())
        .collect();
    let mut incoming = listeners.incoming();
    for port in ports {
        let client = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        greet(&mut incoming, client).await;
    }
    greet(&mut incoming, UnixStream::connect(&path).await.unwrap()).await;
}

#[tokio::test]
async fn all_addresses_are_had_or_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sock");
    let first = bind(&address("tcp://127.0.0.1:0")).await.unwrap();
    let taken = Address::Tcp { host: "127.0.0.1".into(), port: port(&first) };
    let error = Listeners::bind(&[unix(&path), taken.clone()], &ListenOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ListenErrorKind::InUse);
    assert!(error.to_string().contains(&taken.to_string()), "{error}");
    assert!(!path.exists());
    assert_eq!(
        Listeners::bind(&[], &ListenOptions::default()).await.unwrap_err().kind(),
        ListenErrorKind::Address
    );
}

/// An authority, with certificates that it signed, as PEM files.
struct Authority {
    folder: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.pem"), certificate.pem()).unwrap();
        Self { folder, issuer: Issuer::new(params, key) }
    }

    fn sign(&self, name: &str) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".into()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(self.file(&format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(self.file(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// A client that trusts this authority and shows a certificate of another or none.
    fn client(&self, shown: Option<(&Self, &str)>) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.file("ca.pem")).unwrap()).unwrap();
        let builder =
            ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots);
        let mut config = match shown {
            None => builder.with_no_client_auth(),
            Some((authority, name)) => {
                let file = |suffix: &str| authority.file(&format!("{name}.{suffix}"));
                let chain = vec![CertificateDer::from_pem_file(file("pem")).unwrap()];
                let key = PrivateKeyDer::from_pem_file(file("key")).unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        TlsConnector::from(Arc::new(config))
    }
}

async fn connect(
    connector: &TlsConnector,
    port: u16,
) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    connector.connect(ServerName::try_from("localhost").unwrap(), stream).await
}

#[tokio::test]
async fn clients_must_show_a_certificate_of_the_authority() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    authority.sign("server");
    authority.sign("client");
    stranger.sign("client");
    let tls = TlsFiles {
        cert: authority.file("server.pem"),
        key: authority.file("server.key"),
        ca: Some(authority.file("ca.pem")),
    };
    let options = ListenOptions { tls: Some(tls), ..ListenOptions::default() };
    let listeners = Listeners::bind(&[address("tcp://127.0.0.1:0")], &options).await.unwrap();
    let port = port(&listeners);
    let mut incoming = listeners.incoming();
    // Somebody who says nothing does not keep the others waiting.
    let _silent = TcpStream::connect(("127.0.0.1", port)).await.unwrap();

    let client = connect(&authority.client(Some((&authority, "client"))), port).await.unwrap();
    assert_eq!(client.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    greet(&mut incoming, client).await;

    for shown in [None, Some((&stranger, "client"))] {
        // With TLS 1.3 the client learns of the refusal when it reads.
        let refused = async {
            let mut client = connect(&authority.client(shown), port).await?;
            client.read_u8().await
        };
        assert!(refused.await.is_err());
    }
    // Nor may anybody speak without TLS.
    let mut plain = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut answer = vec![];
    let _reset = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"\0"), "an HTTP/2 server would begin with its settings");
    // None of them was let in, or it would come first.
    greet(
        &mut incoming,
        connect(&authority.client(Some((&authority, "client"))), port).await.unwrap(),
    )
    .await;
}

#[tokio::test]
async fn without_an_authority_clients_need_no_certificate() {
    let authority = Authority::new();
    authority.sign("server");
    let tls = TlsFiles {
        cert: authority.file("server.pem"),
        key: authority.file("server.key"),
        ca: None,
    };
    let options = ListenOptions { tls: Some(tls), ..ListenOptions::default() };
    let listeners = Listeners::bind(&[address("tcp://127.0.0.1:0")], &options).await.unwrap();
    let port = port(&listeners);
    let mut incoming = listeners.incoming();
    let client = connect(&authority.client(None), port).await.unwrap();
    greet(&mut incoming, client).await;
}

#[tokio::test]
async fn files_for_tls_that_cannot_be_used_are_named() {
    let authority = Authority::new();
    authority.sign("server");
    authority.sign("other");
    std::fs::write(authority.file("empty.pem"), "").unwrap();
    let file = |name: &str| authority.file(name);
    for (cert, key, ca, named) in [
        ("none.pem", "server.key", "ca.pem", "none.pem"),
        ("server.pem", "none.key", "ca.pem", "none.key"),
        ("server.pem", "server.key", "none.pem", "none.pem"),
        ("empty.pem", "server.key", "ca.pem", "empty.pem"),
        ("server.pem", "server.key", "empty.pem", "empty.pem"),
        ("server.pem", "server.pem", "ca.pem", "server.pem"),
        ("server.pem", "other.key", "ca.pem", "server.pem"),
    ] {
        let tls = TlsFiles { cert: file(cert), key: file(key), ca: Some(file(ca)) };
        let options = ListenOptions { tls: Some(tls), ..ListenOptions::default() };
        let error = Listeners::bind(&[address("tcp://127.0.0.1:0")], &options).await.unwrap_err();
        assert_eq!(error.kind(), ListenErrorKind::Tls, "{error}");
        let expected = format!("cannot listen: {:?} cannot be used for TLS: ", file(named));
        assert!(error.to_string().starts_with(&expected), "{error}");
    }
}
