//! Docker's folder of certificates: `<host[:port]>/*.crt` are authorities, `*.cert` with `*.key` shows who we are.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use slipway_engine::store::registry::HostOptions;

use crate::failure::Failure;

/// Reads the folder; one that does not exist is empty.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn hosts(folder: &Path) -> Result<BTreeMap<String, HostOptions>, Failure> {
    let mut hosts = BTreeMap::new();
    for path in list(folder)? {
        let Some(host) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if !path.is_dir() {
            continue;
        }
        let mut options = HostOptions::default();
        for file in list(&path)? {
            match file.extension().and_then(|extension| extension.to_str()) {
                Some("crt") => options.ca_files.push(file),
                Some("cert") => {
                    let key = file.with_extension("key");
                    options.client_cert = Some((file, key));
                }
                _ => {}
            }
        }
        hosts.insert(host.to_owned(), options);
    }
    Ok(hosts)
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    let failed = |error| {
        Failure::new(format!("cannot read the certificates in {}: {error}", folder.display()))
    };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
            return Ok(vec![]);
        }
        Err(error) => return Err(failed(error)),
    };
    let mut paths = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>, std::io::Error>>()
        .map_err(failed)?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_and_keys_are_found_by_host() {
        let folder = tempfile::tempdir().unwrap();
        let host = folder.path().join("registry.test:5000");
        fs::create_dir(&host).unwrap();
        for name in ["ca.crt", "client.cert", "client.key", "README"] {
            fs::write(host.join(name), "").unwrap();
        }
        let hosts = hosts(folder.path()).unwrap();
        let options = &hosts["registry.test:5000"];
        assert_eq!(options.ca_files, [host.join("ca.crt")]);
        assert_eq!(options.client_cert, Some((host.join("client.cert"), host.join("client.key"))));
        assert!(super::hosts(&folder.path().join("nowhere")).unwrap().is_empty());
    }
}
