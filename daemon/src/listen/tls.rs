//! What is shown to clients, and what they must show.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto};

use super::error::ListenError;

/// TLS, as PEM files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate to show, with those that sign it.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Who must have signed the certificates of clients; without it they need none.
    pub ca: Option<PathBuf>,
}

impl TlsFiles {
    /// Reads the files.
    pub(super) fn load(&self) -> Result<ServerConfig, ListenError> {
        let bad = |file: &Path| {
            let file = file.display().to_string();
            move |error: tokio_rustls::rustls::Error| ListenError::tls(file, error)
        };
        let provider = Arc::new(crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(bad(&self.cert))?;
        let builder = match &self.ca {
            None => builder.with_no_client_auth(),
            Some(ca) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(ca)? {
                    roots.add(certificate).map_err(bad(ca))?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .build()
                        .map_err(|error| ListenError::tls(ca.display(), error))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .map_err(|error| ListenError::tls(self.key.display(), error))?;
        let mut config =
            builder.with_single_cert(certificates(&self.cert)?, key).map_err(bad(&self.cert))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, ListenError> {
    let found =
        CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match found {
        Ok(found) if found.is_empty() => {
            Err(ListenError::tls(file.display(), "it holds no certificate"))
        }
        Ok(found) => Ok(found),
        Err(error) => Err(ListenError::tls(file.display(), error)),
    }
}
