//! Paths as images for Windows name them. They become paths with `/` below the root of the system's drive.

use slipway_spec::pattern::clean_path;

use super::super::problem::{Problem, Result};

/// The shell of images that name none.
pub(super) const DEFAULT_SHELL: [&str; 3] = ["cmd", "/S", "/C"];

/// Returns a path with `/` and without its drive, which must be the system's; a slash at the end stays.
pub(super) fn without_drive(path: &str) -> Result<String> {
    let path = path.replace('\\', "/");
    if path.starts_with("//") {
        return Err(Problem::new(format!("UNC paths are not supported: {path}")));
    }
    let path = match path.split_once(':') {
        None => path.as_str(),
        Some((_, "")) => {
            return Err(Problem::new(format!("No relative path specified in {path:?}")));
        }
        Some((drive, rest)) if drive.eq_ignore_ascii_case("c") => rest,
        Some(_) => {
            let message = format!("The specified path is not on the system drive (C:): {path}");
            return Err(Problem::new(message));
        }
    };
    let mut clean = clean_path(path);
    if path.ends_with('/') && !clean.ends_with('/') {
        clean.push('/');
    }
    Ok(clean)
}

/// Returns a path as the config of an image has it.
pub(super) fn with_backslashes(path: &str) -> String {
    path.replace('/', "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_systems_drive_can_be_named() {
        for (path, expected) in [
            ("C:\\a\\b", "/a/b"),
            ("c:/a/", "/a/"),
            ("\\a\\..\\b", "/b"),
            ("C:rel", "rel"),
            ("a\\b", "a/b"),
            ("C:\\", "/"),
            (".", "."),
        ] {
            assert_eq!(without_drive(path).unwrap(), expected, "{path}");
        }
        for bad in ["D:\\a", "C:", "\\\\server\\share"] {
            assert!(without_drive(bad).is_err(), "{bad}");
        }
        assert_eq!(with_backslashes("/a/b"), "\\a\\b");
    }
}
