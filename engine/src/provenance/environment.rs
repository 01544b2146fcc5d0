//! What the administrator adds to the provenance of all results.

use std::io;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::EngineError;

/// Where the files are that say so, unless a configuration file says otherwise.
pub const DEFAULT_FOLDER: &str = "/etc/buildkit/provenance.d";

/// Names that are the builder's own.
const RESERVED: [&str; 3] = ["buildConfig", "builderPlatform", "platform"];

/// Reads all files of a folder whose names end in `.json`, each an object; a later one goes before an earlier one. A folder
/// that is not there says nothing.
///
/// # Errors
/// [`EngineError::Provenance`] when a file cannot be read, is no object, or has a name that is the builder's own.
pub fn read(folder: &Path) -> Result<Map<String, Value>, EngineError> {
    let wrong = |path: &Path, why: &dyn std::fmt::Display| {
        EngineError::Provenance(format!("{}: {why}", path.display()))
    };
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(error) => return Err(wrong(folder, &error)),
    };
    let mut files = vec![];
    for entry in entries {
        let path = entry.map_err(|error| wrong(folder, &error))?.path();
        if path.extension().is_some_and(|ending| ending == "json") && !path.is_dir() {
            files.push(path);
        }
    }
    files.sort();
    let mut environment = Map::new();
    for path in files {
        let bytes = std::fs::read(&path).map_err(|error| wrong(&path, &error))?;
        let told: Map<String, Value> =
            serde_json::from_slice(&bytes).map_err(|error| wrong(&path, &error))?;
        if let Some(name) = told.keys().find(|name| RESERVED.contains(&name.as_str())) {
            return Err(wrong(&path, &format_args!("{name:?} is the builder's own; remove it")));
        }
        environment.extend(told);
    }
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_add_to_each_other_and_say_where_they_are_wrong() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read(&folder.path().join("none")).unwrap().is_empty());
        let write =
            |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("b.json", r#"{"runner": "b", "site": {"a": 1}}"#);
        write("a.json", r#"{"runner": "a"}"#);
        write("notes.txt", "nothing");
        let expected = serde_json::json!({ "runner": "b", "site": { "a": 1 } });
        assert_eq!(Value::from(read(folder.path()).unwrap()), expected);
        for (text, expected) in [
            ("[1]", "c.json: invalid type"),
            (r#"{"builderPlatform": "x"}"#, "c.json: \"builderPlatform\" is the builder's own"),
        ] {
            write("c.json", text);
            let error = read(folder.path()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
