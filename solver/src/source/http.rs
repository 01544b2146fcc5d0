//! Files from the web.

use futures::stream;
use slipway_spec::Digest;
use slipway_spec::llb::pb;
use slipway_store::download::{Download, receive};
use slipway_store::registry::web::unescape;
use slipway_store::registry::{RegistryError, RegistryErrorKind};
use slipway_store::{Error, ErrorKind, Store, blocking};
use tokio::io::AsyncReadExt as _;

use super::file::{Looks, SingleFile, safe_name};
use crate::client::{ByteStream, Services};
use crate::error::{Cause, Result, SolveError};

/// The host name under which clients offer files of their own.
const UPLOAD_HOST: &str = "buildkit-session";
/// No download is larger, in bytes.
pub(crate) const MAX_BYTES: u64 = 64 << 30;
/// The name of a file that nothing gives a name.
const NAMELESS: &str = "download";

/// A file as a definition names it.
#[derive(Clone, Debug)]
pub(crate) struct HttpSource {
    url: String,
    checksum: Option<Digest>,
    filename: Option<String>,
    looks: Looks,
    auth_secret: Option<String>,
    headers: Vec<(String, String)>,
}

impl HttpSource {
    pub(crate) fn read(source: &pb::SourceOp) -> Result<Self> {
        let url = source.identifier.clone();
        if let Some(name) = source.attrs.keys().find(|name| name.starts_with("http.sig.")) {
            return Err(Cause::Unsupported(format!("verifying signatures ({name})")).into());
        }
        let checksum = source
            .attrs
            .get("http.checksum")
            .filter(|text| !text.is_empty())
            .map(|text| {
                text.parse()
                    .map_err(|error| Cause::Invalid(format!("source {}: {error}", shown(&url))))
            })
            .transpose()?;
        let text = |name: &str| source.attrs.get(name).filter(|text| !text.is_empty()).cloned();
        let headers = ["accept", "user-agent"].into_iter().filter_map(|name| {
            let (_, value) = source.attrs.iter().find(|(key, _)| {
                key.strip_prefix("http.header.").is_some_and(|key| key.eq_ignore_ascii_case(name))
            })?;
            Some((name.to_owned(), value.clone()))
        });
        Ok(Self {
            checksum,
            filename: text("http.filename").map(|name| safe_name(&name, NAMELESS)),
            looks: Looks::read(source)?,
            auth_secret: text("http.authheadersecret"),
            headers: headers.collect(),
            url,
        })
    }

    /// Returns the file if everything that identifies it is known without asking anybody.
    pub(crate) fn pinned(&self) -> Option<SingleFile> {
        let digest = self.checksum.clone()?;
        let name = self.name(None);
        Some(SingleFile { digest, name, looks: self.looks, mtime: 0 })
    }

    /// Makes sure that the file is content of the store, downloading it unless it is known to be unchanged.
    pub(crate) async fn fetch(
        &self,
        store: &Store,
        services: &Services,
        progress: &(dyn Fn(u64, u64) + Send + Sync),
    ) -> Result<SingleFile> {
        if let Some(path) = self.upload_path() {
            let Some(upload) = services.uploads.open(&path).await? else {
                return Err(
                    Cause::Missing(format!("the client has nothing to send for {path:?}")).into()
                );
            };
            let digest =
                save_stream(store, &self.url, upload, self.checksum.as_ref(), progress).await?;
            let name = self.name(None);
            return Ok(SingleFile { digest, name, looks: self.looks, mtime: 0 });
        }
        let memory = self.memory_key();
        let (reader, key, checksum) = (store.clone(), memory.clone(), self.checksum.clone());
        // What is remembered is of use only while its content is here.
        let known = blocking::run(move || {
            let Some(known) = reader.download(&key)? else { return Ok(None) };
            let usable = match (&known.digest, checksum) {
                (Some(digest), Some(wanted)) if *digest != wanted => false,
                (Some(digest), _) => reader.has_blob(digest)?,
                (None, _) => false,
            };
            Ok(Some(known).filter(|_| usable))
        })
        .await?;
        let mut headers = self.headers.clone();
        headers.extend(self.authorization(services).await?);
        if let Some(known) = &known {
            if let Some(etag) = &known.etag {
                headers.push(("if-none-match".into(), etag.clone()));
                // Some servers send everything whatever they are told of. One that does not know the question, or does not
                // allow it, is asked the other way.
                let brief = services.web.head(&self.url, &headers).await;
                if let (Ok(brief), Some(digest)) = (brief, &known.digest)
                    && brief.header("etag").map_or(brief.is_unchanged(), |new| is_same(new, etag))
                {
                    return Ok(self.found(digest.clone(), known));
                }
            } else if let Some(time) = &known.last_modified {
                headers.push(("if-modified-since".into(), time.clone()));
            }
        }
        let answer = services.web.get(&self.url, &headers).await;
        let mut answer = answer.map_err(|error| self.advise(error))?;
        if answer.is_unchanged() {
            // Only a server that was told of a version may say so.
            let Some((known, digest)) =
                known.and_then(|known| known.digest.clone().map(|digest| (known, digest)))
            else {
                return Err(Cause::Invalid(format!(
                    "{}: the server says that nothing changed, but it was not asked that",
                    shown(&self.url)
                ))
                .into());
            };
            return Ok(self.found(digest, &known));
        }
        let mut download = Download {
            digest: None,
            etag: answer.header("etag").map(ToOwned::to_owned),
            last_modified: answer.header("last-modified").map(ToOwned::to_owned),
            filename: answer.header("content-disposition").and_then(disposition_name),
        };
        let total = answer.announced_size().unwrap_or(0);
        if total > MAX_BYTES {
            return Err(Cause::Invalid(format!(
                "{} has {total} bytes, and at most {MAX_BYTES} are allowed",
                shown(&self.url)
            ))
            .into());
        }
        let chunks = Box::pin(stream::unfold((&mut answer, false), |(answer, ended)| async move {
            if ended {
                return None;
            }
            match answer.chunk().await {
                Ok(chunk) => Some((Ok(chunk?), (answer, false))),
                Err(error) => Some((Err(Error::from(error)), (answer, true))),
            }
        }));
        let report = |current: u64| progress(current, total);
        let what = shown(&self.url);
        let received =
            receive(store, &what, chunks, MAX_BYTES, self.checksum.as_ref(), &report).await;
        let (digest, _) = received.map_err(|error| match error.kind() {
            ErrorKind::Corrupt => SolveError::from(Cause::Invalid(format!(
                "{error}; if the file was meant to change, change its checksum as well"
            ))),
            _ => error.into(),
        })?;
        download.digest = Some(digest.clone());
        let found = self.found(digest, &download);
        let writer = store.clone();
        blocking::run(move || writer.remember_download(&memory, &download)).await?;
        Ok(found)
    }

    /// Says what to do about an answer that is none.
    fn advise(&self, error: RegistryError) -> RegistryError {
        let host = self.host();
        let advice = match error.kind() {
            RegistryErrorKind::NotFound => "check the URL".to_owned(),
            RegistryErrorKind::Unauthorized | RegistryErrorKind::Denied => format!(
                "if it needs credentials, give them as the secret HTTP_AUTH_TOKEN_{host} or HTTP_AUTH_HEADER_{host}"
            ),
            _ => return error,
        };
        let message = format!("{}; {advice}", error.message());
        RegistryError::new(error.kind(), error.subject(), message)
    }

    fn found(&self, digest: Digest, download: &Download) -> SingleFile {
        let changed = download.last_modified.as_deref();
        let changed = changed.and_then(parse_date);
        let mtime = changed
            .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
            .map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(0));
        let name = self.name(download.filename.as_deref());
        SingleFile { digest, name, looks: self.looks, mtime }
    }

    fn name(&self, given: Option<&str>) -> String {
        if let Some(name) = self.filename.as_deref().or(given) {
            return safe_name(name, NAMELESS);
        }
        let path = self.url.split_once("://").map_or("", |(_, rest)| rest);
        let path = path.split(['?', '#']).next().unwrap_or_default();
        let path = path.find('/').map_or("", |at| &path[at..]);
        safe_name(&unescape(path), NAMELESS)
    }

    fn host(&self) -> &str {
        let rest = self.url.split_once("://").map_or("", |(_, rest)| rest);
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let host = authority.rsplit('@').next().unwrap_or_default();
        if host.starts_with('[') {
            return host.split(']').next().unwrap_or_default().trim_start_matches('[');
        }
        host.split(':').next().unwrap_or_default()
    }

    fn upload_path(&self) -> Option<String> {
        (self.host() == UPLOAD_HOST && self.url.starts_with("http://")).then(|| {
            let rest = self.url.trim_start_matches("http://");
            rest.find('/').map_or_else(|| "/".into(), |at| rest[at..].to_owned())
        })
    }

    /// The secret that the definition names must be there; those that go by the host's name may.
    async fn authorization(&self, services: &Services) -> Result<Option<(String, String)>> {
        let header = |value: String| Some(("authorization".to_owned(), value));
        let text = |secret: crate::client::SecretBytes| {
            String::from_utf8_lossy(secret.expose()).trim_end_matches(['\r', '\n']).to_owned()
        };
        if let Some(id) = &self.auth_secret {
            let secret = services.secrets.secret(id).await?.ok_or_else(|| {
                Cause::Missing(format!("secret {id}: not found; {} needs it", shown(&self.url)))
            })?;
            return Ok(header(text(secret)));
        }
        let host = self.host();
        if let Some(secret) = services.secrets.secret(&format!("HTTP_AUTH_HEADER_{host}")).await? {
            return Ok(header(text(secret)));
        }
        let token = services.secrets.secret(&format!("HTTP_AUTH_TOKEN_{host}")).await?;
        Ok(token.and_then(|secret| header(format!("Bearer {}", text(secret)))))
    }

    /// What a server's answer depends on; the values of secrets are not part of it.
    fn memory_key(&self) -> Vec<u8> {
        let mut key = self.url.clone().into_bytes();
        for (name, value) in &self.headers {
            key.extend(format!("\0{name}\0{value}").into_bytes());
        }
        key.extend(format!("\0{}", self.auth_secret.as_deref().unwrap_or_default()).into_bytes());
        key
    }
}

/// Compares two entity tags as RFC 9110, section 8.8.3.2, does for content that is kept.
fn is_same(one: &str, other: &str) -> bool {
    let plain = |tag: &str| tag.strip_prefix("W/").unwrap_or(tag).to_owned();
    plain(one) == plain(other)
}

/// Saves what the client sends.
pub(crate) async fn save_stream(
    store: &Store,
    what: &str,
    from: ByteStream,
    expected: Option<&Digest>,
    progress: &(dyn Fn(u64, u64) + Send + Sync),
) -> slipway_store::Result<Digest> {
    let chunks = Box::pin(stream::unfold(Some(from), |from| async move {
        let mut from = from?;
        let mut chunk = bytes::BytesMut::with_capacity(128 * 1024);
        match from.read_buf(&mut chunk).await {
            Ok(0) => None,
            Ok(_) => Some((Ok(chunk.freeze()), Some(from))),
            Err(error) => Some((Err(Error::io("cannot read what the client sends", error)), None)),
        }
    }));
    let report = |current: u64| progress(current, 0);
    Ok(receive(store, what, chunks, MAX_BYTES, expected, &report).await?.0)
}

/// Returns the name in a `Content-Disposition` header.
fn disposition_name(header: &str) -> Option<String> {
    let value = header.split(';').skip(1).find_map(|part| {
        let (name, value) = part.split_once('=')?;
        name.trim().eq_ignore_ascii_case("filename").then(|| value.trim())
    })?;
    let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
    Some(value.replace('\\', "")).filter(|name| !name.is_empty() && !name.ends_with('/'))
}

/// Reads the date of a header. The zone is always the same one, but some servers call it by its newer name.
fn parse_date(text: &str) -> Option<std::time::SystemTime> {
    let text = text.trim_end();
    let renamed = text.strip_suffix("UTC").map(|rest| format!("{rest}GMT"));
    httpdate::parse_http_date(renamed.as_deref().unwrap_or(text)).ok()
}

/// A URL without what may be a credential.
fn shown(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.into() };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let host = rest[..end].rsplit('@').next().unwrap_or_default();
    let path = rest[end..].split(['?', '#']).next().unwrap_or_default();
    format!("{scheme}://{host}{path}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(url: &str, attrs: &[(&str, &str)]) -> HttpSource {
        let attrs = attrs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        HttpSource::read(&pb::SourceOp { identifier: url.into(), attrs }).unwrap()
    }

    #[test]
    fn names_come_from_the_definition_the_server_or_the_url() {
        let plain = source("https://h/d/a%20b.txt?x=/y#z", &[]);
        assert_eq!(plain.name(None), "a b.txt");
        assert_eq!(plain.name(Some("../s")), "s");
        assert_eq!(source("https://h", &[]).name(None), "download");
        assert_eq!(source("https://h/..%2f..", &[]).name(None), "download");
        let named = source("https://h/x", &[("http.filename", "n")]);
        assert_eq!(named.name(Some("s")), "n");
        for (header, name) in [
            ("attachment; filename=\"a b\"", Some("a b")),
            ("inline; FileName=x", Some("x")),
            ("attachment", None),
            ("attachment; filename=\"\"", None),
        ] {
            assert_eq!(disposition_name(header).as_deref(), name, "{header}");
        }
    }

    #[test]
    fn dates_are_read_in_every_form_that_servers_send() {
        let wanted = std::time::UNIX_EPOCH + std::time::Duration::from_secs(784_111_777);
        for text in [
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 UTC",
            "Sun Nov  6 08:49:37 1994",
        ] {
            assert_eq!(parse_date(text), Some(wanted), "{text}");
        }
        assert_eq!(parse_date("yesterday"), None);
    }

    #[test]
    fn hosts_and_uploads_are_told_apart() {
        assert_eq!(source("https://u:p@h:8/x", &[]).host(), "h");
        assert_eq!(source("http://[::1]:8/x", &[]).host(), "::1");
        let upload = source("http://buildkit-session/abc", &[]);
        assert_eq!(upload.upload_path().as_deref(), Some("/abc"));
        assert_eq!(source("http://buildkit-session.evil/abc", &[]).upload_path(), None);
        assert_eq!(shown("https://u:p@h/x?token=y"), "https://h/x");
    }

    #[test]
    fn attributes_are_checked() {
        let read = |name: &str, value: &str| {
            let attrs = [(name.to_owned(), value.to_owned())].into();
            HttpSource::read(&pb::SourceOp { identifier: "https://h/x".into(), attrs })
        };
        assert!(read("http.checksum", "sha256:zz").is_err());
        assert!(read("http.perm", "rwx").is_err());
        assert!(read("http.sig.pubkey", "x").is_err());
        let headers = read("http.header.Accept", "text/plain").unwrap().headers;
        assert_eq!(headers, [("accept".to_owned(), "text/plain".to_owned())]);
        assert!(read("http.header.x-other", "y").unwrap().headers.is_empty());
        let digest = Digest::of(b"x").to_string();
        assert!(read("http.checksum", &digest).unwrap().pinned().is_some());
    }
}
